"""The gradgram rows: the tasks' Gram matrix, and a whole PCGrad step from gradients to the combined one.

PCGrad as it is written down projects one task's gradient after another, over all parameters each time. From the Gram
matrix it needs two reads of the gradients, whatever the number of tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

import tlkernels
from bench.contrastive import _installed
from bench.fisher import RelativeError
from bench.mmd import native, not_here
from bench.registry import Case, Problem, Provider, Ratio, Run, Selection, Sizes, sizes
from tlkernels import ops
from tlkernels.ops import _registry

OPS = ("task_gram", "pcgrad_step")
DTYPES = (torch.float32, torch.bfloat16)

#: tasks, tensors, rows, columns
_SIZES: Sizes = (((8, 10, 1000, 1000), ()), ((3, 10, 1000, 1000), ()))
_NEEDED = {"task_gram": {"task_gram"}, "pcgrad_step": {"task_gram", "task_combine_"}}
RATIOS = (
    Ratio("over G @ G.T", "G @ G.T"),
    Ratio("over flatten and G @ G.T", "flatten, G @ G.T"),
    Ratio("over LibMTL's arithmetic", "LibMTL's arithmetic"),
    Ratio("over torchjd", "torchjd"),
)
#: Sums of ten million products in float32 are off by 2e-3 as a product of matrices makes them. That counts as right.
TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class GradgramFamily:
    """The benchmarks of the family gradgram; see `bench.registry.Family`."""

    name = "gradgram"
    ops = OPS

    def cases(self, selection: Selection) -> list[Case]:
        """All cases, or what the selection leaves of them; shapes it names replace the listed ones."""
        cases = []
        for op, dtype in product(OPS, selection.dtypes or DTYPES):
            listed: Sizes = (((3, 2, 16, 24), ()),) if selection.quick else _SIZES
            cases += [Case(op, shape, dtype, rows) for shape, rows in sizes(listed, selection)]
        return [case for case in cases if selection.ops is None or case.op in selection.ops]

    def problem(self, case: Case, device: torch.device) -> Problem:
        """Gradients with a common part, half of whose pairs conflict."""
        (tasks, count, *shape), generator = case.shape, torch.Generator().manual_seed(0)
        grads = [
            [torch.randn(shape, generator=generator).to(case.dtype).to(device) for _ in range(count)]
            for _ in range(tasks)
        ]
        flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])
        orders = [list(range(tasks)) for _ in range(tasks)]
        step = case.op == "pcgrad_step"

        def wanted() -> list[Tensor]:
            wide = flat.double()
            return [_libmtl(wide, orders)] if step else [wide @ wide.T]

        size = flat.numel() * case.dtype.itemsize
        return Problem(
            case,
            {"grads": grads, "flat": flat, "orders": orders, "out": [torch.empty_like(g) for g in grads[0]]},
            _Judge(wanted, slice(None)),
            TOLERANCE[case.dtype],
            bytes_read=size * (2 if step else 1),
            bytes_written=size // tasks if step else 8 * tasks**2,
            output_bytes=size // tasks if step else 8 * tasks**2,
        )

    def providers(self, device: torch.device) -> list[Provider]:
        """This library once per backend, then the peers."""
        names = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
        loaded = [name for name in names if _registry.LIBRARIES.get(name) == "loaded"]
        listed = [
            *(Provider(f"tlkernels {n}", True, _on_backend(n), lambda n=n: tlkernels.backend(n)) for n in loaded),
            Provider("reference eager", False, _ours, lambda: tlkernels.backend("reference")),
            Provider("G @ G.T", False, _product),
            Provider("flatten, G @ G.T", False, _flatten_product),
            Provider("LibMTL's arithmetic", False, _libmtl_step),
        ]
        if _installed("torchjd"):
            listed.append(Provider("torchjd", False, _torchjd))
        return listed

    def missing(self, device: torch.device) -> list[str]:
        """Who would be here and is not."""
        lines = not_here(device, _NEEDED)
        return lines + ([] if _installed("torchjd") else ["torchjd: not installed (pip install torchjd)"])


FAMILY = GradgramFamily()


class _Judge(RelativeError):
    """A step may be one flat gradient or one for each parameter."""

    def __call__(self, result: object) -> float:
        if isinstance(result, list):
            result = torch.cat([t.flatten() for t in result])
        return super().__call__(result)  # type: ignore[arg-type]


def _on_backend(name: str) -> Callable[[Problem], Run | None]:
    """This library, where that backend has kernels for the op."""
    return lambda problem: _ours(problem) if native(name, _NEEDED[problem.case.op]) else None


def _ours(problem: Problem) -> Run:
    d = problem.data
    if problem.case.op == "task_gram":
        return Run(lambda: ops.task_gram(d["grads"]))

    def step() -> list[Tensor]:
        weights = ops.pcgrad_weights(ops.task_gram(d["grads"]), orders=d["orders"])
        ops.task_combine_(d["out"], d["grads"], weights)
        return d["out"]

    return Run(step)


def _product(problem: Problem) -> Run | None:
    """Of gradients that are flat already, which those of a model are not."""
    flat = problem.data["flat"]
    return Run(lambda: flat @ flat.T) if problem.case.op == "task_gram" else None


def _flatten_product(problem: Problem) -> Run | None:
    grads = problem.data["grads"]

    def call() -> Tensor:
        flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])
        return flat @ flat.T

    return Run(call) if problem.case.op == "task_gram" else None


def _libmtl(grads: Tensor, orders: list[list[int]]) -> Tensor:
    """Yu et al.'s algorithm as LibMTL computes it: a copy, then one projection after another over all parameters."""
    projected = grads.clone()
    for t, order in enumerate(orders):
        for u in order:
            inner = torch.dot(projected[t], grads[u])
            if u != t and inner < 0:
                projected[t] -= inner * grads[u] / (grads[u].norm().pow(2) + 1e-8)
    return projected.sum(0)


def _libmtl_step(problem: Problem) -> Run | None:
    d = problem.data
    return Run(lambda: _libmtl(d["flat"], d["orders"])) if problem.case.op == "pcgrad_step" else None


def _torchjd(problem: Problem) -> Run | None:
    """Its order is its own, so only the time is comparable."""
    if problem.case.op != "pcgrad_step":
        return None
    from torchjd.aggregation import PCGrad

    aggregate, flat = PCGrad(), problem.data["flat"]
    return Run(lambda: aggregate(flat), error=lambda _: 0.0, yardstick=True)
