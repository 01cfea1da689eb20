"""The gemm rows: the tile engine alone, c = a b^T and its other layouts, beside the products of torch.

The engine is reached through `tlkernels._numpy.gemm`, into given memory, with as many threads as torch has. Everything
in csrc/cpu that multiplies stands on it, so what it leaves of the arithmetic peak is left by all of them.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.registry import PRODUCT_TOLERANCE, Case, Problem, Provider, Ratio, Run, Selection, Sizes, dtype_name, sizes

DTYPES = (torch.float32, torch.bfloat16)
REST_SECONDS = 0.02
OPS = ("nt", "nn", "tn")  # BLAS's letters: c = a b^T (a forward pass), a b (an input's gradient), a^T b (a weight's)
#: (n, k) and m, as a linear layer has them: n features out, k in, m rows.
SIZES: Sizes = (
    ((2048, 2048), (2048,)),
    ((4096, 512), (4096,)),
    ((4096, 4096), (512,)),
    ((1024, 1024), (2048,)),
)
QUICK_SIZES: Sizes = (((512, 512), (512,)),)
RATIOS = (
    Ratio("over torch.mm", "torch.mm"),
    Ratio("over oneDNN", "oneDNN"),
    Ratio("over oneDNN prepacked", "oneDNN prepacked"),
)


class GemmFamily:
    """The benchmarks of the tile engine; see `bench.registry.Family`."""

    name = "gemm"
    ops = OPS

    def cases(self, selection: Selection) -> list[Case]:
        """All cases, or what the selection leaves of them. The layouts but `nt` are measured at the first size only."""
        listed = QUICK_SIZES if selection.quick else SIZES
        return [
            Case(op, shape, dtype, rows)
            for op in OPS
            if selection.ops is None or op in selection.ops
            for dtype in selection.dtypes or DTYPES
            for shape, rows in sizes(listed if op == "nt" else listed[:1], selection)
        ]

    def problem(self, case: Case, device: torch.device) -> Problem:
        """Random normal matrices, stored as the layout has them, and a judge that samples rows of c."""
        (n, k), m = case.shape, case.rows or 1
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(*((k, m) if case.op == "tn" else (m, k)), generator=generator).to(case.dtype)
        b = torch.randn(*((n, k) if case.op == "nt" else (k, n)), generator=generator).to(case.dtype)
        data = {"a": a, "b": b, "c": torch.empty(m, n, dtype=case.dtype)}
        left, right = _oriented(case.op, a, b)
        size = case.dtype.itemsize
        return Problem(
            case,
            data,
            lambda result: _error(result, left, right),
            PRODUCT_TOLERANCE[case.dtype],
            bytes_read=(m + n) * k * size,
            bytes_written=m * n * size,
            output_bytes=0,
            flops=2 * m * n * k,
            ceiling="bf16" if case.dtype == torch.bfloat16 else "fp32",
        )

    def providers(self, device: torch.device) -> list[Provider]:
        """The engine, where it is built, torch.mm, and oneDNN called past torch's choice of library."""
        if device.type != "cpu":
            return []
        return [
            *([Provider("tlkernels engine", True, _engine, _turn)] if _kernels() is not None else []),
            Provider("torch.mm", False, _mm, _turn),
            Provider("oneDNN", False, _onednn, _turn),
            Provider("oneDNN prepacked", False, _onednn_prepacked, _turn),
        ]

    def missing(self, device: torch.device) -> list[str]:
        """Who would be here and is not."""
        if device.type != "cpu":
            return ["gemm: the tile engine is for CPUs"]
        lines = [] if _kernels() is not None else ["tlkernels engine: tlkernels._numpy is not built"]
        if not torch.backends.mkldnn.is_available():
            lines.append("oneDNN: this torch is built without it")
        return lines


FAMILY = GemmFamily()


def _oriented(op: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a and b with c = left @ right."""
    return (a.T if op == "tn" else a), (b.T if op == "nt" else b)


def _error(result: Tensor, left: Tensor, right: Tensor) -> float:
    """The relative error of the worst row, over at most 32 rows spread evenly; infinite where a value is not finite."""
    shape = (left.shape[0], right.shape[1])
    if tuple(result.shape) != shape or result.dtype != left.dtype or not result.isfinite().all():
        return float("inf")
    rows = torch.linspace(0, shape[0] - 1, min(32, shape[0])).round().long().unique()
    want = left[rows].double() @ right.double()
    return float(((result[rows].double() - want).norm(dim=1) / want.norm(dim=1)).max())


# ---- providers ------------------------------------------------------------------------------------------------------


def _kernels() -> Any:
    try:
        module = importlib.import_module("tlkernels._numpy")
    except ImportError:
        return None
    return module if hasattr(module, "gemm") else None


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    """The engine's own pool with torch's number of threads, after a rest.

    OpenMP's threads spin for some milliseconds after their work, on the core that the engine's would need.
    """
    time.sleep(REST_SECONDS)
    kernels = _kernels()
    if kernels is None:
        yield
        return
    before = kernels.get_num_threads()
    kernels.set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        kernels.set_num_threads(before)


def _engine(problem: Problem) -> Run:
    gemm: Callable[..., None] = _kernels().gemm
    op, dtype = problem.case.op, dtype_name(problem.case.dtype)
    arrays = [_array(problem.data[name]) for name in "abc"]
    across = {"a_across": op == "tn", "b_across": op != "nt"}
    result = problem.data["c"]

    def call() -> Tensor:
        gemm(*arrays, dtype=dtype, **across)
        return result

    return Run(call)


def _array(t: Tensor) -> Any:
    """The tensor's memory as NumPy has it; bfloat16 as its bits."""
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


def _mm(problem: Problem) -> Run:
    """Into given memory too."""
    left, right = _oriented(problem.case.op, problem.data["a"], problem.data["b"])
    result = torch.empty_like(problem.data["c"])
    return Run(lambda: torch.mm(left, right, out=result))


def _onednn(problem: Problem) -> Run | None:
    """What torch.compile calls for a linear layer, which is how float32 reaches oneDNN; it allocates its result."""
    return _linear_pointwise(problem, prepacked=False)


def _onednn_prepacked(problem: Problem) -> Run | None:
    """The same with b reordered beforehand, outside the time: what only a constant b allows."""
    return _linear_pointwise(problem, prepacked=True)


def _linear_pointwise(problem: Problem, prepacked: bool) -> Run | None:
    if problem.case.op != "nt" or not torch.backends.mkldnn.is_available():
        return None
    a, b = problem.data["a"], problem.data["b"]
    if prepacked:
        b = torch.ops.mkldnn._reorder_linear_weight(b, a.shape[0])
    return Run(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
