"""The contrastive rows: losses over a similarity matrix, forward and backward, beside what stores the matrix.

The peers are of three kinds. Packages (open_clip, pytorch-metric-learning, lightly) write the formula down, and store
the matrix several times; so does the formula under torch.compile, with one product. `F.linear_cross_entropy` stores
chunks of it. And "Python tiles" is this family's own algorithm, block by block in torch, on the fastest products that
torch can reach: what it loses to is fusion alone.

    python -m bench.contrastive --most 65536

measures another thing: the peak memory of CLIP's loss against the batch, each batch in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import tlkernels
from bench.harness import extra_memory
from bench.peers import submodule
from bench.registry import PRODUCT_TOLERANCE, Case, Problem, Provider, Ratio, Run, Selection, Sizes, sizes
from tlkernels import ops
from tlkernels.ops import _registry

DTYPES = (torch.float32, torch.bfloat16)
#: Both: the loss and all its gradients. info_nce is CLIP's loss with its learned scale, siglip that with a bias too.
OPS = ("info_nce_both", "siglip_both", "supcon_both", "ntxent_both", "moco_both", "info_nce_forward")

#: batch x dimension; for moco queue x dimension, with the batch as rows. A batch of ntxent is both views together.
_SIZES: dict[str, Sizes] = {
    "info_nce_both": (((4096, 512), ()), ((1024, 512), ()), ((8192, 128), ()), ((8192, 768), ())),
    "moco_both": (((65536, 128), (256,)),),
    "info_nce_forward": (((4096, 512), ()),),
}
_SIZES |= {op: (((4096, 512), ()), ((1024, 512), ())) for op in OPS if op not in _SIZES}
RATIOS = (
    Ratio("over open_clip", "open_clip"),
    Ratio("over the formula compiled", "formula compiled"),
    Ratio("over linear_cross_entropy", "linear_cross_entropy"),
    Ratio("over Python tiles", "Python tiles"),
)
#: The ops that are plotted.
PLOTTED = ("info_nce_both", "siglip_both", "supcon_both", "ntxent_both")

SCALE, BIAS = 14.25, -10.0  # about what CLIP and SigLIP start from, and bfloat16 numbers
TEMPERATURE = 1.0 / SCALE
PER_CLASS = 4  # samples of a class in supcon
TILE = 256  # rows of a Python tile: the fastest of 128 to 2048 at a batch of 4096
#: pytorch-metric-learning's NTXentLoss holds a matrix of positive x negative pairs: the cube of the batch.
MOST_PAIRS_BATCH = 512
#: Logits in bfloat16 are off by 2^-9 of their size, up to 14 here: what a user of bfloat16 gets from whoever stores
#: them in it. That counts as right, or half of the peers would be none. Ours are summed and kept in float32.
TOLERANCE = PRODUCT_TOLERANCE | {torch.bfloat16: 3e-2}


class ContrastiveFamily:
    """The benchmarks of the family contrastive; see `bench.registry.Family`."""

    name = "contrastive"
    ops = OPS

    def cases(self, selection: Selection) -> list[Case]:
        """All cases, or what the selection leaves of them; shapes and rows it names replace the listed ones."""
        cases = []
        for op, dtype in product(OPS, selection.dtypes or DTYPES):
            listed = _quick_sizes(op) if selection.quick else _SIZES[op]
            cases += [Case(op, shape, dtype, rows) for shape, rows in sizes(listed, selection)]
        return [case for case in cases if selection.ops is None or case.op in selection.ops]

    def problem(self, case: Case, device: torch.device) -> Problem:
        """Random directions, pairs of them closer than others, and the judge."""
        data = _data(case, device)
        size, work = case.dtype.itemsize, _work(case)
        features = sum(t.numel() * size for t in data.values() if t.is_floating_point() and t.dim() == 2)
        gradients = sum(data[name].numel() * size for name in _leaves(case.op) if data[name].dim() == 2)
        backward = not case.op.endswith("forward")
        return Problem(
            case,
            data,
            Judge(case, data),
            TOLERANCE[case.dtype],
            bytes_read=features * (1 + backward),
            bytes_written=gradients * backward,
            output_bytes=gradients * backward,
            flops=work,
            ceiling="bf16" if case.dtype == torch.bfloat16 else "fp32",
        )

    def providers(self, device: torch.device) -> list[Provider]:
        """This library once per backend, then the peers. Each prints the errors of its loss and gradients apart."""
        names = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
        loaded = [name for name in names if _registry.LIBRARIES.get(name) == "loaded"]
        listed = [
            *(Provider(f"tlkernels {n}", True, _on_backend(n), lambda n=n: tlkernels.backend(n)) for n in loaded),
            Provider("reference eager", False, _ours, lambda: tlkernels.backend("reference")),
            Provider("formula compiled", False, _formula_compiled),
            Provider("linear_cross_entropy", False, _linear_cross_entropy),
            Provider("Python tiles", False, _tiles),
            Provider("moco by hand", False, _moco_by_hand),
        ]
        if _installed("open_clip"):
            listed += [
                Provider("open_clip", False, _open_clip),
                Provider("open_clip compiled", False, _open_clip_compiled),
            ]
        if _installed("pytorch_metric_learning"):
            listed.append(Provider("pytorch-metric-learning", False, _metric_learning))
        if _installed("lightly"):
            listed.append(Provider("lightly", False, _lightly))
        return [replace(p, prepare=partial(_saying_errors, p)) for p in listed]

    def missing(self, device: torch.device) -> list[str]:
        """Who would be here and is not."""
        wanted = ("cpu",) if device.type == "cpu" else ("triton",)
        lines = []
        for name in wanted:
            if _registry.LIBRARIES.get(name) != "loaded":
                lines.append(f"tlkernels {name}: {_registry.LIBRARIES.get(name)}")
            else:
                lines += [f"tlkernels {name}: {op} has no kernel there" for op in OPS if not _native(name, op)]
        packages = {"open_clip": "open_clip_torch", "lightly": "lightly"}
        lines += [f"{n}: not installed (pip install --no-deps {p})" for n, p in packages.items() if not _installed(n)]
        if not _installed("pytorch_metric_learning"):
            lines.append("pytorch-metric-learning: not installed (pip install pytorch-metric-learning)")
        else:
            lines.append(
                "pytorch-metric-learning ntxent_both: holds the batch cubed in memory, so only up to "
                f"{MOST_PAIRS_BATCH} rows"
            )
        return lines


FAMILY = ContrastiveFamily()


def _quick_sizes(op: str) -> Sizes:
    return (((1024, 64), (64,)),) if op == "moco_both" else (((256, 64), ()),)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ---- problems -------------------------------------------------------------------------------------------------------


def _work(case: Case) -> int:
    """What the problem takes without storing a matrix.

    A product of the features takes 2 N M D. info_nce: one product forward, one again backward, one for each of two
    gradients: 8 N M D. siglip needs no sum before its gradients, so its tiles are made once: 6. supcon and ntxent have
    a symmetric matrix: half a product forward, half of it again, and one for the gradient: 4. moco: one forward, one
    again, one gradient: 6.
    """
    n = case.rows if case.rows is not None else case.shape[0]
    cube = n * case.shape[0] * case.shape[1]
    times = {"info_nce_both": 8, "siglip_both": 6, "supcon_both": 4, "ntxent_both": 4, "moco_both": 6}
    return times.get(case.op, 2) * cube


def _leaves(op: str) -> tuple[str, ...]:
    """What is differentiated with respect to. MoCo's keys and queue come from another network, without gradient."""
    if op in ("supcon_both", "ntxent_both", "moco_both"):
        return ("x",)
    return ("x", "y", "scale", "bias") if op == "siglip_both" else ("x", "y", "scale")


def _data(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Unit rows x; y (and the rows of a class) at a cosine of about 0.4; scalars in float32."""
    generator = torch.Generator().manual_seed(0)
    count, dim = case.shape
    if case.op == "ntxent_both" and count % 2:
        raise ValueError(f"ntxent_both: a batch of {count}; expected an even number, two views of each sample")

    def normal(n: int) -> Tensor:
        return functional.normalize(torch.randn(n, dim, generator=generator), dim=1)

    def near(centre: Tensor) -> Tensor:
        return functional.normalize(0.45 * centre + normal(len(centre)), dim=1)

    data: dict[str, Tensor] = {}
    if case.op == "supcon_both":
        classes = max(count // PER_CLASS, 1)
        labels = torch.arange(count) % classes
        data = {"x": near(normal(classes)[labels]), "labels": labels}
    elif case.op == "ntxent_both":
        first = normal(count // 2)
        data = {"x": torch.cat([first, near(first)])}
    elif case.op == "moco_both":
        x = normal(case.rows or 1)
        data = {"x": x, "y": near(x), "queue": normal(count)}
    else:
        x = normal(count)
        data = {"x": x, "y": near(x), "scale": torch.tensor(SCALE)}
        if case.op.startswith("siglip"):
            data["bias"] = torch.tensor(BIAS)
    return {
        name: (t.to(case.dtype) if t.is_floating_point() and t.dim() == 2 else t).to(device) for name, t in data.items()
    }


@dataclass
class Judge:
    """Holds a result against float64: the loss, the scalars' gradients, and the worst of 32 rows of the features'.

    A call returns the largest of the relative errors, `errors` that of the loss and that of the gradients. `projected`
    is for who normalizes rows himself: his gradient has no part along the row.
    """

    case: Case
    data: dict[str, Tensor]
    projected: bool = False

    def __call__(self, results: dict[str, Tensor]) -> float:
        return max(self.errors(results))

    def errors(self, results: dict[str, Tensor]) -> tuple[float, float]:
        """Of the loss, and of the gradients (0 where there are none)."""
        backward = not self.case.op.endswith("forward")
        if set(results) != {"loss"} | ({f"d{name}" for name in _leaves(self.case.op)} if backward else set()):
            return math.inf, math.inf
        worst = {"loss": 0.0, "gradients": 0.0}
        for name, got in results.items():
            shape = () if name == "loss" else self.data[name[1:]].shape
            if got.shape != shape or not got.isfinite().all():
                return math.inf, math.inf
            want, result = self.wanted[name], got.detach().double()
            if got.dim() == 2:
                if got.dtype != self.case.dtype:
                    return math.inf, math.inf
                result = result[self.rows]
                if self.projected:
                    unit = functional.normalize(self.data[name[1:]][self.rows].double(), dim=1)
                    want = want - (want * unit).sum(1, keepdim=True) * unit
                error = float(((result - want).norm(dim=1) / want.norm(dim=1)).max())
            else:
                error = float((result - want).abs() / want.abs())
            key = "loss" if name == "loss" else "gradients"
            worst[key] = max(worst[key], error)
        return worst["loss"], worst["gradients"]

    @cached_property
    def rows(self) -> Tensor:
        x = self.data["x"]
        return torch.linspace(0, x.shape[0] - 1, min(32, x.shape[0])).round().long().unique().to(x.device)

    @cached_property
    def wanted(self) -> dict[str, Tensor]:
        """Loss, gradients of the scalars, and rows of the features' gradients, by the formulas in float64."""
        op = self.case.op
        if op == "moco_both":
            return self._moco()
        if op == "siglip_both":
            return self._siglip()
        return self._symmetric() if op in ("supcon_both", "ntxent_both") else self._info_nce()

    def _blocks(self, x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Row blocks of x y^T."""
        for start in range(0, x.shape[0], 512):
            yield slice(start, start + 512), x[start : start + 512] @ y.T

    def _info_nce(self) -> dict[str, Tensor]:
        x, y, s, at = self.data["x"].double(), self.data["y"].double(), float(self.data["scale"]), self.rows
        n = x.shape[0]
        rows, columns, moments = (x.new_zeros(n) for _ in range(3))
        row_mean, paired = x.new_zeros(n), (x * y).sum(1)
        for block, dots in self._blocks(x, y):
            e = (s * dots).exp()  # of unit rows: no larger than e^s
            rows[block] = e.sum(1)
            row_mean[block] = (e * dots).sum(1) / rows[block]
            columns += e.sum(0)
            moments += (e * dots).sum(0)
        want = {"loss": (0.5 * (rows.log() + columns.log()) - s * paired).mean()}
        want["dscale"] = 0.5 * (row_mean + moments / columns - 2 * paired).mean()
        for name, a, b, own, other in (("dx", x, y, rows, columns), ("dy", y, x, columns, rows)):
            e = (s * a[at] @ b.T).exp()
            want[name] = s / (2 * n) * ((e / own[at, None] + e / other) @ b - 2 * b[at])
        return want

    def _siglip(self) -> dict[str, Tensor]:
        x, y, at = self.data["x"].double(), self.data["y"].double(), self.rows
        s, b, n = float(self.data["scale"]), float(self.data["bias"]), x.shape[0]
        # dl/dz is sigmoid(z) off the diagonal and sigmoid(z) - 1 on it
        paired = (x * y).sum(1)
        want = {"loss": -(s * paired + b).sum(), "dscale": -paired.sum(), "dbias": x.new_tensor(-float(n))}
        for _, dots in self._blocks(x, y):
            z = s * dots + b
            want["loss"] = want["loss"] + functional.softplus(z).sum()
            want["dscale"] = want["dscale"] + (z.sigmoid() * dots).sum()
            want["dbias"] = want["dbias"] + z.sigmoid().sum()
        for name, a, other in (("dx", x, y), ("dy", y, x)):
            want[name] = s * ((s * a[at] @ other.T + b).sigmoid() @ other - other[at])
        return {name: value / n for name, value in want.items()}

    def _symmetric(self) -> dict[str, Tensor]:
        """With weights T of the positives, each row's summing to 1: dz = (P + P^T - T - T^T) z / (temperature N)."""
        z, at = self.data["x"].double(), self.rows
        n = z.shape[0]
        sums, near = z.new_zeros(n), z.new_zeros(n)
        index = torch.arange(n, device=z.device)
        for block, dots in self._blocks(z, z):
            here = index[block]
            e = (dots / TEMPERATURE).exp()
            e[here - here[0], here] = 0.0
            sums[block] = e.sum(1)
            near[block] = (self._positives(here) * dots).sum(1)
        e = (z[at] @ z.T / TEMPERATURE).exp()
        e[torch.arange(len(at), device=z.device), at] = 0.0
        weights = self._positives(at)  # the numbers of positives are equal within a class, so T is symmetric
        dz = (e / sums[at, None] + e / sums - 2 * weights) @ z / (TEMPERATURE * n)
        return {"loss": (sums.log() - near / TEMPERATURE).mean(), "dx": dz}

    def _positives(self, rows: Tensor) -> Tensor:
        n = self.data["x"].shape[0]
        index = torch.arange(n, device=rows.device)
        if self.case.op == "ntxent_both":
            found = index == ((rows + n // 2) % n)[:, None]
        else:
            found = (self.data["labels"] == self.data["labels"][rows, None]) & (index != rows[:, None])
        return found / found.sum(1, keepdim=True).double()

    def _moco(self) -> dict[str, Tensor]:
        q, k, queue = (self.data[name].double() for name in ("x", "y", "queue"))
        z = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / TEMPERATURE
        p = z.softmax(1)
        dq = (p[:, 1:] @ queue + (p[:, :1] - 1.0) * k) / (TEMPERATURE * q.shape[0])
        return {"loss": -z.log_softmax(1)[:, 0].mean(), "dx": dq[self.rows]}


def _saying_errors(provider: Provider, problem: Problem) -> Run | None:
    """The provider's run, with a line for the errors of its loss and of its gradients when it is judged."""
    run = provider.prepare(problem)
    if run is None:
        return None
    judge = run.error or problem.error
    assert isinstance(judge, Judge)

    def error(results: dict[str, Tensor]) -> float:
        loss, gradients = judge.errors(results)
        print(f"    {provider.name:26} loss off by {loss:.1e}, gradients by {gradients:.1e}", flush=True)
        return max(loss, gradients)

    return replace(run, error=error)


# ---- a loss, whoever computes it ------------------------------------------------------------------------------------

Loss = Callable[[dict[str, Tensor]], Tensor]


def _run(problem: Problem, loss: Loss, projected: bool = False) -> Run:
    """Forward: the loss without gradients. Both: the loss and its gradients."""
    case, data = problem.case, problem.data
    judge = Judge(case, data, projected=True) if projected else None
    if case.op.endswith("forward"):
        return Run(torch.no_grad()(lambda: {"loss": loss(data)}), error=judge)
    leaves = {name: data[name].clone().requires_grad_() for name in _leaves(case.op)}
    inputs = {**data, **leaves}

    def both() -> dict[str, Tensor]:
        value = loss(inputs)
        found = torch.autograd.grad(value, tuple(leaves.values()))
        return {"loss": value.detach(), **{f"d{name}": g for name, g in zip(leaves, found, strict=True)}}

    return Run(both, error=judge)


def _needed(op: str) -> set[str]:
    """The registry's ops that this library runs for a benchmarked one."""
    if op == "siglip_both":
        return {"sigmoid_contrastive_sum"}
    return {"sim_lse"} if op.endswith("forward") else {"sim_lse", "sim_lse_backward"}


def _native(name: str, op: str) -> bool:
    if name == "triton":
        return all(_registry.OPS[needed].triton is not None for needed in _needed(op))
    return _registry.native_ops(name).issuperset(_needed(op))


def _on_backend(name: str) -> Callable[[Problem], Run | None]:
    """This library, where that backend has kernels for the op."""
    return lambda problem: _ours(problem) if _native(name, problem.case.op) else None


def _ours(problem: Problem) -> Run:
    return _run(problem, _OURS[problem.case.op.partition("_forward")[0].removesuffix("_both")])


def _our_moco(d: dict[str, Tensor]) -> Tensor:
    """The keys of the batch are no negatives of each other in MoCo, so the positives are added apart."""
    negatives = ops.sim_lse(d["x"], d["queue"], SCALE, cols=False).row
    positive = SCALE * (d["x"].float() * d["y"].float()).sum(1)
    return functional.softplus(negatives - positive).mean()


_OURS: dict[str, Loss] = {
    "info_nce": lambda d: ops.info_nce(d["x"], d["y"], d["scale"]),
    "siglip": lambda d: ops.sigmoid_contrastive(d["x"], d["y"], d["scale"], d["bias"]),
    "supcon": lambda d: ops.sup_con(d["x"], d["labels"], temperature=TEMPERATURE),
    "ntxent": lambda d: ops.nt_xent(d["x"], temperature=TEMPERATURE),
    "moco": _our_moco,
}


# ---- peers that store the matrix ------------------------------------------------------------------------------------


def _open_clip_loss(op: str) -> Loss | None:
    if op.startswith("info_nce"):
        clip = submodule("open_clip.loss").ClipLoss()
        return lambda d: clip(d["x"], d["y"], d["scale"].to(d["x"].dtype))
    if op == "siglip_both":
        siglip = submodule("open_clip.loss").SigLipLoss()
        return lambda d: siglip(d["x"], d["y"], d["scale"].to(d["x"].dtype), d["bias"].to(d["x"].dtype))
    return None


def _open_clip(problem: Problem) -> Run | None:
    loss = _open_clip_loss(problem.case.op)
    return None if loss is None else _run(problem, loss)


def _open_clip_compiled(problem: Problem) -> Run | None:
    loss = _open_clip_loss(problem.case.op)
    return None if loss is None else _run(problem, _compiled(loss))


def _compiled(loss: Loss) -> Loss:
    """For the case's own shape, the faster form; a function may have as many as there are cases."""
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
    return torch.compile(loss, dynamic=False)


def _formula_compiled(problem: Problem) -> Run:
    """The formula with one product, the logits in float32, as torch.compile fuses it."""
    return _run(problem, _compiled(_FORMULAS[problem.case.op.removesuffix("_forward").removesuffix("_both")]))


def _info_nce(d: dict[str, Tensor]) -> Tensor:
    logits = d["scale"] * (d["x"] @ d["y"].T).float()
    target = torch.arange(logits.shape[0], device=logits.device)
    return 0.5 * (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target))


def _siglip(d: dict[str, Tensor]) -> Tensor:
    logits = d["scale"] * (d["x"] @ d["y"].T).float() + d["bias"]
    sign = 2.0 * torch.eye(logits.shape[0], device=logits.device) - 1.0
    return -functional.logsigmoid(sign * logits).sum() / logits.shape[0]


def _without_self(d: dict[str, Tensor]) -> Tensor:
    logits = (d["x"] @ d["x"].T).float() / TEMPERATURE
    return logits.masked_fill(torch.eye(logits.shape[0], dtype=torch.bool, device=logits.device), -torch.inf)


def _supcon(d: dict[str, Tensor]) -> Tensor:
    log_p = _without_self(d).log_softmax(1)
    same = d["labels"] == d["labels"][:, None]
    same = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    return -(torch.where(same, log_p, 0.0).sum(1) / same.sum(1)).mean()


def _ntxent(d: dict[str, Tensor]) -> Tensor:
    n = d["x"].shape[0]
    target = (torch.arange(n, device=d["x"].device) + n // 2) % n
    return functional.cross_entropy(_without_self(d), target)


def _moco(d: dict[str, Tensor]) -> Tensor:
    """As in the paper's listing: the positives are column 0."""
    positive = (d["x"] * d["y"]).sum(1, keepdim=True)
    logits = torch.cat([positive, d["x"] @ d["queue"].T], 1).float() / TEMPERATURE
    return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


_FORMULAS: dict[str, Loss] = {
    "info_nce": _info_nce,
    "siglip": _siglip,
    "supcon": _supcon,
    "ntxent": _ntxent,
    "moco": _moco,
}


def _moco_by_hand(problem: Problem) -> Run | None:
    return _run(problem, _moco) if problem.case.op == "moco_both" else None


def _metric_learning(problem: Problem) -> Run | None:
    """With plain dot products, as the rows are of unit length already."""
    op, n = problem.case.op, problem.case.shape[0]
    if op not in ("supcon_both", "ntxent_both") or (op == "ntxent_both" and n > MOST_PAIRS_BATCH):
        return None
    from pytorch_metric_learning import distances, losses

    kind = losses.SupConLoss if op == "supcon_both" else losses.NTXentLoss
    module = kind(temperature=TEMPERATURE, distance=distances.DotProductSimilarity(normalize_embeddings=False))
    labels = problem.data.get("labels")
    if labels is None:
        labels = torch.arange(n // 2, device=problem.data["x"].device).repeat(2)
    return _run(problem, lambda d: module(d["x"], labels))


def _lightly(problem: Problem) -> Run | None:
    """It normalizes the rows itself, and copies its memory bank at each call."""
    op, data = problem.case.op, problem.data
    if op not in ("ntxent_both", "moco_both"):
        return None
    loss = submodule("lightly.loss.ntx_ent_loss").NTXentLoss
    if op == "ntxent_both":
        module = loss(temperature=TEMPERATURE).to(data["x"].device)
        return _run(problem, lambda d: module(*d["x"].chunk(2)), projected=True)
    bank = loss(temperature=TEMPERATURE, memory_bank_size=problem.case.shape).to(data["x"].device)
    bank.memory_bank.bank = data["queue"].clone()
    return _run(problem, lambda d: bank(d["x"], d["y"]), projected=True)


def _linear_cross_entropy(problem: Problem) -> Run | None:
    """torch's chunked loss of a linear layer, in both directions: the other side's features are the weight."""
    if not problem.case.op.startswith("info_nce") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    target = torch.arange(problem.case.shape[0], device=problem.data["x"].device)
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(d: dict[str, Tensor]) -> Tensor:
        scale = d["scale"].to(d["x"].dtype)
        of_rows = functional.linear_cross_entropy(scale * d["x"], d["y"], target, options=options)
        return 0.5 * (of_rows + functional.linear_cross_entropy(scale * d["y"], d["x"], target, options=options))

    return _run(problem, loss)


# ---- Python tiles: the same algorithm in torch ----------------------------------------------------------------------


def _nt(a: Tensor, b: Tensor) -> Tensor:
    """a b^T. On CPU float32 goes to oneDNN, past torch.mm, which takes MKL there: twice as fast on some machines."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.T)


class _InfoNCETiles(torch.autograd.Function):
    """CLIP's loss by blocks of rows: sums of rows and columns on the way, and each block again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        s, n = float(scale), x.shape[0]
        rows = torch.empty(n, device=x.device)
        columns = torch.full((y.shape[0],), -torch.inf, device=x.device)
        for start in range(0, n, TILE):
            z = _nt(x[start : start + TILE], y).float().mul_(s)
            rows[start : start + TILE] = z.logsumexp(1)
            columns = torch.logaddexp(columns, z.logsumexp(0))
        paired = (x.float() * y.float()).sum(1)
        ctx.save_for_backward(x, y, rows, columns, paired)
        ctx.scale = s
        return 0.5 * (rows.mean() + columns.mean()) - s * paired.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, rows, columns, paired = ctx.saved_tensors
        s, n = ctx.scale, x.shape[0]
        dx, dy = torch.empty_like(x), torch.zeros_like(y, dtype=torch.float32)
        weight = 0.5 * float(grad) / n
        dscale = -2 * paired.sum()
        for start in range(0, n, TILE):
            block = slice(start, start + TILE)
            dots = _nt(x[block], y).float()
            z = dots * s
            g = (z - rows[block, None]).exp_().add_(z.sub_(columns).exp_())
            dscale += dots.mul_(g).sum()  # torch.dot would sum in one chain of float32
            g.diagonal(start).sub_(2.0)
            g = g.mul_(s * weight).to(x.dtype)
            dx[block] = _nt(g, y.T)
            dy += _nt(g.T, x[block].T)
        return dx, dy.to(y.dtype), dscale * weight


class _RowTiles(torch.autograd.Function):
    """A loss whose rows do not know each other, by blocks of rows, its gradients in the forward pass.

    ``terms(z, start)`` takes logits in float32, may overwrite them, and returns the sum of the block's losses and its
    derivative with respect to the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, terms: Callable[[Tensor, int], Any], whose: str
    ) -> Tensor:  # fmt: skip
        s, b, n = float(scale), float(bias), x.shape[0]
        total, dscale, dbias = (torch.zeros((), device=x.device) for _ in range(3))
        dx = torch.empty_like(x, dtype=torch.float32)
        dy = torch.zeros_like(y, dtype=torch.float32) if whose != "x" else None
        for start in range(0, n, TILE):
            block = slice(start, start + TILE)
            dots = _nt(x[block], y).float()
            loss, g = terms(dots * s + b if whose == "all" else dots.mul_(s), start)
            total += loss
            if whose == "all":
                dscale += dots.mul_(g).sum()
                dbias += g.sum()
            g = g.mul_(s).to(x.dtype)
            dx[block] = _nt(g, y.T)
            if dy is not None:
                dy += _nt(g.T, x[block].T)
        if whose == "both are x":
            dx, dy = dx + dy, None
        ctx.save_for_backward(dx, *(() if dy is None else (dy,)), dscale, dbias)
        ctx.n, ctx.dtype = n, x.dtype
        return total / n

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, *dy, dscale, dbias = (t * (grad / ctx.n) for t in ctx.saved_tensors)
        return dx.to(ctx.dtype), dy[0].to(ctx.dtype) if dy else None, dscale, dbias, None, None


def _tiles(problem: Problem) -> Run:
    op, data = problem.case.op, problem.data
    if op.startswith("info_nce"):
        return _run(problem, lambda d: _InfoNCETiles.apply(d["x"], d["y"], d["scale"]))
    n, device = data["x"].shape[0], data["x"].device
    scale, none = torch.tensor(SCALE), torch.tensor(0.0)

    def siglip(z: Tensor, start: int) -> tuple[Tensor, Tensor]:
        loss = functional.softplus(z).sum() - z.diagonal(start).sum()
        g = z.sigmoid_()
        g.diagonal(start).sub_(1.0)
        return loss, g

    def softmax(z: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The log-sum-exps of rows without themselves, and the weights."""
        z.diagonal(start).fill_(-torch.inf)
        lse = z.logsumexp(1)
        return lse, z.sub_(lse[:, None]).exp_()

    def ntxent(z: Tensor, start: int) -> tuple[Tensor, Tensor]:
        here = torch.arange(len(z), device=device)
        partner = (here + start + n // 2) % n
        near = z[here, partner].sum()
        lse, g = softmax(z, start)
        g[here, partner] -= 1.0
        return lse.sum() - near, g

    def supcon(z: Tensor, start: int) -> tuple[Tensor, Tensor]:
        labels = data["labels"]
        same = (labels == labels[start : start + len(z), None]).float()
        same.diagonal(start).fill_(0.0)
        same /= same.sum(1, keepdim=True)
        near = (same * z).sum()
        lse, g = softmax(z, start)
        return lse.sum() - near, g.sub_(same)

    if op == "siglip_both":
        return _run(problem, lambda d: _RowTiles.apply(d["x"], d["y"], d["scale"], d["bias"], siglip, "all"))
    if op != "moco_both":
        terms = ntxent if op == "ntxent_both" else supcon
        return _run(problem, lambda d: _RowTiles.apply(d["x"], d["x"].detach(), scale, none, terms, "both are x"))

    def moco(d: dict[str, Tensor]) -> Tensor:
        positive = SCALE * (d["x"].float() * d["y"].float()).sum(1)
        weights = []

        def terms(z: Tensor, start: int) -> tuple[Tensor, Tensor]:
            mine = positive.detach()[start : start + len(z)]
            lse = torch.logaddexp(z.logsumexp(1), mine)
            weights.append((mine - lse).exp_().sub_(1.0))
            return (lse - mine).sum(), z.sub_(lse[:, None]).exp_()

        loss = _RowTiles.apply(d["x"], d["queue"], scale, none, terms, "x")
        pull = (torch.cat(weights) * positive).mean()  # what the blocks know nothing of: the gradient by the positives
        return loss + (pull - pull.detach())

    return _run(problem, moco)


# ---- memory against the batch ---------------------------------------------------------------------------------------

LIMIT = 8 * 2**30
#: Matrices of float32 that open_clip holds at once, forward: two of logits, two of log-softmaxes.
STORED = 4


@dataclass
class Curve:
    """The peak memory of CLIP's loss and its gradients beyond features and gradients, in bytes, by batch."""

    dim: int
    dtype: str
    limit: int = LIMIT
    #: provider -> batch -> bytes, None where it was not run
    peaks: dict[str, dict[int, int | None]] = field(default_factory=dict)

    def arithmetic(self, batch: int) -> int:
        """What the matrices of open_clip take."""
        return STORED * batch * batch * getattr(torch, self.dtype).itemsize


_CURVES = ("tlkernels cpu", "Python tiles", "linear_cross_entropy", "open_clip")


def peak_memory(provider: str, batch: int, dim: int = 512, dtype: str = "float32") -> int:
    """Peak resident memory of one loss with its gradients, beyond features and gradients, in this process.

    A small batch goes first: libraries are loaded, and scratch that stays is counted with the process. Linux only.
    """
    device = torch.device("cpu")
    found = [p for p in FAMILY.providers(device) if p.name == provider]
    if not found:
        raise ValueError(f"peak_memory: got {provider!r}; expected one of those installed here")
    peak = None
    with contextlib.redirect_stdout(sys.stderr), found[0].context():
        for n in (64, batch):
            problem = FAMILY.problem(Case("info_nce_both", (n, dim), getattr(torch, dtype)), device)
            run = found[0].prepare(problem)
            if run is None:
                raise ValueError(f"peak_memory: {provider} has no kernel for info_nce_both here")
            peak = extra_memory(run.call, problem.output_bytes, device)
    if peak is None:
        raise RuntimeError("peak_memory: this system has no counter of a process's peak memory")
    return peak


def measure_memory(
    most: int, least: int = 1024, dim: int = 512, dtype: str = "float32", limit: int = LIMIT
) -> Curve:  # fmt: skip
    """Double the batch from `least` to `most`; each measurement in a process of its own."""
    curve = Curve(dim, dtype, limit)
    available = {p.name for p in FAMILY.providers(torch.device("cpu"))}
    native = _native("cpu", "info_nce_both")
    for provider in _CURVES:
        if provider not in available or (provider.startswith("tlkernels") and not native):
            print(f"{provider}: not here, left out", flush=True)
            continue
        peaks = curve.peaks.setdefault(provider, {})
        batch = least
        while batch <= most:
            if provider == "open_clip" and curve.arithmetic(batch) > limit:
                peaks[batch] = None
            else:
                command = [sys.executable, "-m", "bench.contrastive", "--one", provider, "--batch", str(batch)]
                command += ["--dim", str(dim), "--dtype", dtype]
                root = Path(__file__).resolve().parent.parent
                done = subprocess.run(command, cwd=root, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{provider}, batch {batch}: {done.stderr.strip()[-2000:]}")
                peaks[batch] = json.loads(done.stdout)
            print(f"{provider:26} {batch:6}  {_mib(peaks[batch])}", flush=True)
            batch *= 2
    return curve


def _mib(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def memory_table(curve: Curve) -> str:
    """A Markdown table, one line a batch; "-" is what was not run, with what its matrices would take."""
    batches = sorted({n for peaks in curve.peaks.values() for n in peaks})
    lines = [["batch", "features and gradients", *curve.peaks, "open_clip's matrices, by arithmetic"]]
    lines.append(["---"] * len(lines[0]))
    for n in batches:
        own = 4 * n * curve.dim * getattr(torch, curve.dtype).itemsize
        measured = [_mib(peaks.get(n)) for peaks in curve.peaks.values()]
        lines.append([str(n), _mib(own), *measured, _mib(curve.arithmetic(n))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot_memory(curve: Curve, path: Path) -> None:
    """Both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, axis = pyplot.subplots(figsize=(7.2, 4.4))
    for (name, peaks), marker in zip(curve.peaks.items(), "osD^", strict=False):
        points = [(n, max(size, 4096)) for n, size in sorted(peaks.items()) if size is not None]
        ours = name.startswith("tlkernels")
        axis.plot(*zip(*points, strict=True), marker=marker, linewidth=2.6 if ours else 1.3, label=name)
    batches = sorted({n for peaks in curve.peaks.values() for n in peaks})
    axis.plot(batches, [curve.arithmetic(n) for n in batches], "k:", linewidth=1.0, label="four matrices")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=4)
    axis.set_xticks(batches, [f"{n:,}" for n in batches])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _mib(round(y))))
    axis.set(xlabel="batch", ylabel="peak beyond features and gradients")
    axis.set_title(f"CLIP's loss, forward and backward, dimension {curve.dim}, {curve.dtype}", fontsize=11)
    axis.grid(True, color="#dddddd", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Measure the curve, print it, and where asked for write it into the page of benchmarks."""
    parser = argparse.ArgumentParser("bench.contrastive", description="Peak memory of CLIP's loss against the batch.")
    parser.add_argument("--least", type=int, default=1024, help="the first batch")
    parser.add_argument("--most", type=int, default=16384, help="the last batch; above the default it takes minutes")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--limit", type=float, default=LIMIT / 2**30, help="GiB that open_clip may take")
    parser.add_argument("--write-docs", action="store_true", help="write table and plot into docs/benchmarks.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one is not None:
        print(peak_memory(options.one, options.batch, options.dim, options.dtype))
        return 0
    if not 1 <= options.least <= options.most:
        parser.error(f"--least {options.least} --most {options.most}: expected 1 <= least <= most")
    curve = measure_memory(options.most, options.least, options.dim, options.dtype, int(options.limit * 2**30))
    table = memory_table(curve)
    print(table)
    if options.write_docs:
        from bench.report import replace_between

        docs = Path(__file__).resolve().parent.parent / "docs"
        picture = "bench-contrastive-cpu-batch.png"
        plot_memory(curve, docs / picture)
        page = docs / "benchmarks.md"
        content = f"{table}\n\n![peak memory against batch]({picture})"
        page.write_text(replace_between(page.read_text(), "contrastive-memory", content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
