"""The fisher rows: squares of per-sample gradients of one layer and of a whole model, their norms, and the penalty.

The straightforward way writes every sample's gradient and squares it (materialising), a loop makes one product per
sample. The gradient of the whole batch, which every training step computes anyway, is measured beside them: it does
the same multiplications, but squares nothing, so it is a yardstick.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import tlkernels
from bench.contrastive import _compiled, _installed
from bench.mmd import native, not_here
from bench.registry import Case, Problem, Provider, Ratio, Run, Selection, Sizes, sizes
from tlkernels import ops
from tlkernels.ops import _registry

OPS = ("diag_fisher", "diag_fisher_conv2d", "diag_fisher_model", "per_sample_sqnorm", "quad_penalty_both")
DTYPES = (torch.float32, torch.bfloat16)

#: samples, tokens, in, out; samples, channels, out channels, side (3 x 3 kernel); samples, in, hidden, classes;
#: tensors, rows, columns
_SIZES: dict[str, Sizes] = {
    "diag_fisher": (((64, 128, 768, 768), ()), ((64, 16, 768, 768), ()), ((256, 4, 512, 512), ()),
                    ((256, 1, 784, 512), ())),
    "diag_fisher_conv2d": (((32, 64, 64, 28), ()),),
    "diag_fisher_model": (((256, 784, 512, 10), ()),),
    "per_sample_sqnorm": (((64, 128, 768, 768), ()), ((64, 512, 768, 768), ())),
    "quad_penalty_both": (((24, 1024, 1024), ()),),
}  # fmt: skip
_QUICK: dict[str, Sizes] = {
    "diag_fisher": (((4, 8, 32, 48), ()),),
    "diag_fisher_conv2d": (((2, 8, 8, 8), ()),),
    "diag_fisher_model": (((8, 20, 16, 4), ()),),
    "per_sample_sqnorm": (((4, 8, 32, 48), ()),),
    "quad_penalty_both": (((3, 16, 16), ()),),
}
_NEEDED = {
    "diag_fisher": {"diag_fisher_linear_"},
    "diag_fisher_conv2d": {"diag_fisher_conv2d_"},
    "diag_fisher_model": {"diag_fisher_linear_"},
    "per_sample_sqnorm": {"per_sample_sqnorm_linear"},
    "quad_penalty_both": {"quad_penalty", "quad_penalty_backward"},
}
RATIOS = (
    Ratio("over materialising", "materialising"),
    Ratio("over loop", "loop of products"),
    Ratio("over weight gradient", "weight gradient alone"),
    Ratio("over BackPACK", "BackPACK"),
    Ratio("over vmap(grad)", "torch.func vmap(grad)"),
    Ratio("over eager", "eager"),
)
#: In bfloat16 a per-sample gradient that is rounded before it is squared counts as right.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class FisherFamily:
    """The benchmarks of the family fisher; see `bench.registry.Family`."""

    name = "fisher"
    ops = OPS

    def cases(self, selection: Selection) -> list[Case]:
        """All cases, or what the selection leaves of them; shapes it names replace the listed ones."""
        cases = []
        for op, dtype in product(OPS, selection.dtypes or DTYPES):
            if op in ("diag_fisher_model", "quad_penalty_both") and dtype != torch.float32:
                continue
            listed = (_QUICK if selection.quick else _SIZES)[op]
            cases += [Case(op, shape, dtype, rows) for shape, rows in sizes(listed, selection)]
        return [case for case in cases if selection.ops is None or case.op in selection.ops]

    def problem(self, case: Case, device: torch.device) -> Problem:
        """Random activations and gradients whose tokens correlate, as those of a sample do."""
        return {
            "diag_fisher_conv2d": _conv,
            "diag_fisher_model": _model,
            "quad_penalty_both": _penalty,
        }.get(case.op, _layer)(case, device)

    def providers(self, device: torch.device) -> list[Provider]:
        """This library once per backend, then the peers."""
        names = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
        loaded = [name for name in names if _registry.LIBRARIES.get(name) == "loaded"]
        listed = [
            *(Provider(f"tlkernels {n}", True, _on_backend(n), lambda n=n: tlkernels.backend(n)) for n in loaded),
            Provider("tlkernels into .grad", True, _into_grad),
            Provider("reference eager", False, _ours, lambda: tlkernels.backend("reference")),
            Provider("materialising", False, _by(_MATERIALISING)),
            Provider("materialising compiled", False, _by({k: _later(f) for k, f in _MATERIALISING.items()})),
            Provider("loop of products", False, _by(_LOOP)),
            Provider("ghost form", False, _by({"per_sample_sqnorm": _ghost})),
            Provider("weight gradient alone", False, _weight_gradient),
            Provider("plain backward", False, _plain_backward),
            Provider("torch.func vmap(grad)", False, _vmap_grad),
            Provider("eager", False, _eager_penalty),
            Provider("eager foreach", False, _foreach_penalty),
        ]
        if _installed("backpack"):
            listed.append(Provider("BackPACK", False, _backpack))
        if _installed("opacus"):
            listed.append(Provider("opacus grad_sample", False, _opacus))
        return listed

    def missing(self, device: torch.device) -> list[str]:
        """Who would be here and is not."""
        packages = {"backpack": "backpack-for-pytorch", "opacus": "opacus"}
        return not_here(device, _NEEDED) + [
            f"{name}: not installed (pip install --no-deps {name})" for p, name in packages.items() if not _installed(p)
        ]


FAMILY = FisherFamily()


# ---- problems -------------------------------------------------------------------------------------------------------


@dataclass
class RelativeError:
    """The relative error of the rows that are looked at, by their float64 values."""

    wanted_: Callable[[], list[Tensor]]
    rows: slice

    def __call__(self, result: Tensor | Sequence[Tensor]) -> float:
        results = [result] if isinstance(result, Tensor) else list(result)
        worst = 0.0
        for got, want in zip(results, self.wanted, strict=True):
            part = got[self.rows].double() if got.dim() else got.double()
            if part.shape != want.shape or not part.isfinite().all():
                return float("inf")
            worst = max(worst, float((part - want).norm() / want.norm()))
        return worst

    @cached_property
    def wanted(self) -> list[Tensor]:
        return self.wanted_()


def _correlated(n: int, t: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 1, d, generator=generator) + 0.5 * torch.randn(n, t, d, generator=generator)


def _layer(case: Case, device: torch.device) -> Problem:
    (n, t, i, o), generator = case.shape, torch.Generator().manual_seed(0)
    act = _correlated(n, t, i, generator).to(case.dtype).to(device)
    grad = _correlated(n, t, o, generator).to(case.dtype).to(device)
    norms = case.op == "per_sample_sqnorm"

    def wanted() -> list[Tensor]:
        if norms:
            per = torch.einsum("nto,nti->noi", grad[:2].double(), act[:2].double())
            return [per.square().sum((1, 2))]
        return [torch.einsum("nto,nti->noi", grad[..., :4].double(), act.double()).square().sum(0)]

    direct, ghost = t * i * o, t * t * (i + o) // 2
    return Problem(
        case,
        {"act": act, "grad": grad, "f": torch.zeros(o, i, device=device)},
        RelativeError(wanted, slice(0, 2 if norms else 4)),
        TOLERANCE[case.dtype],
        bytes_read=n * t * (i + o) * case.dtype.itemsize,
        bytes_written=4 * n if norms else 4 * o * i,
        output_bytes=4 * n if norms else 4 * o * i,
        flops=2 * n * (min(direct, ghost) if norms else direct),
        ceiling="bf16" if case.dtype == torch.bfloat16 and t > 1 else "fp32",
    )


def _conv(case: Case, device: torch.device) -> Problem:
    (n, c, o, side), generator = case.shape, torch.Generator().manual_seed(0)
    act = torch.randn(n, c, side, side, generator=generator).to(case.dtype).to(device)
    grad = torch.randn(n, o, side, side, generator=generator).to(case.dtype).to(device)

    def wanted() -> list[Tensor]:
        patches = functional.unfold(act.double(), 3, padding=1)
        per = torch.einsum("nol,nil->noi", grad[:, :4].double().flatten(2), patches)
        return [per.square().sum(0).view(4, c, 3, 3)]

    return Problem(
        case,
        {"act": act, "grad": grad, "f": torch.zeros(o, c, 3, 3, device=device)},
        RelativeError(wanted, slice(0, 4)),
        TOLERANCE[case.dtype],
        bytes_read=n * side * side * (c + o) * case.dtype.itemsize,
        bytes_written=4 * o * c * 9,
        output_bytes=4 * o * c * 9,
        flops=2 * n * side * side * o * c * 9,
        ceiling="bf16" if case.dtype == torch.bfloat16 else "fp32",
    )


def _model(case: Case, device: torch.device) -> Problem:
    n, inputs, hidden, classes = case.shape
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        ).to(device)
    x = torch.randn(n, inputs, generator=generator).to(device)
    y = torch.randint(0, classes, (n,), generator=generator).to(device)

    def wanted() -> list[Tensor]:
        """By hand: one token a sample, so squares of gradients are products of squares."""
        wide, h, inputs_of, outs = copy.deepcopy(model).double(), x.double(), [], []
        for layer in wide:
            if isinstance(layer, nn.Linear):
                inputs_of.append(h.detach())
                h = layer(h)
                outs.append(h)
            else:
                h = layer(h)
        grads = torch.autograd.grad(functional.cross_entropy(h, y, reduction="sum"), outs)
        result = []
        for a, g in zip(inputs_of, grads, strict=True):
            result += [(g.square().T @ a.square())[:4], g.square().sum(0)[:4]]
        return result

    weights = sum(p.numel() for p in model.parameters())
    return Problem(
        case,
        {"model": model, "x": x, "y": y},
        RelativeError(wanted, slice(0, 4)),
        TOLERANCE[case.dtype],
        bytes_read=4 * weights,
        bytes_written=4 * weights,
        output_bytes=4 * weights,
        flops=2 * n * weights * 3,  # forward, the gradients of activations, the squares
    )


def _penalty(case: Case, device: torch.device) -> Problem:
    (count, *shape), generator = case.shape, torch.Generator().manual_seed(0)
    p = [torch.randn(shape, generator=generator).to(device).requires_grad_() for _ in range(count)]
    a = [t.detach() + 0.1 * torch.randn(shape, generator=generator).to(device) for t in p]
    f = [torch.rand(shape, generator=generator).to(device) for _ in range(count)]
    for t in p:
        t.grad = torch.zeros_like(t)

    def wanted() -> list[Tensor]:
        delta = p[0].detach().double() - a[0].double()
        total = sum(
            (w.double() * (t.detach().double() - b.double()).square()).sum() for t, b, w in zip(p, a, f, strict=True)
        )
        return [0.5 * total, (f[0].double() * delta)[:4]]  # type: ignore[list-item]

    size = 4 * sum(t.numel() for t in p)
    return Problem(
        case,
        {"p": p, "a": a, "f": f},
        RelativeError(wanted, slice(0, 4)),
        TOLERANCE[case.dtype],
        bytes_read=4 * size,  # parameters, anchors, importances, gradients
        bytes_written=size,
        output_bytes=0,
    )


# ---- this library ---------------------------------------------------------------------------------------------------


def _on_backend(name: str) -> Callable[[Problem], Run | None]:
    """This library, where that backend has kernels for the op."""
    return lambda problem: _ours(problem) if native(name, _NEEDED[problem.case.op]) else None


def _ours(problem: Problem) -> Run:
    d = problem.data

    def layer() -> Tensor:
        ops.diag_fisher_linear_(d["f"].zero_(), None, d["act"], d["grad"])
        return d["f"]

    def conv() -> Tensor:
        ops.diag_fisher_conv2d_(d["f"].zero_(), None, d["act"], d["grad"], padding=1)
        return d["f"]

    def model() -> list[Tensor]:
        with tlkernels.FisherDiagonal(d["model"], loss="cross_entropy", verify=False, progress=False) as fisher:
            fisher.accumulate([(d["x"], d["y"])])
        return [v * len(d["x"]) for v in fisher.diagonal().values()]

    return Run(
        {
            "diag_fisher": layer,
            "diag_fisher_conv2d": conv,
            "diag_fisher_model": model,
            "per_sample_sqnorm": lambda: ops.per_sample_sqnorm_linear(d["act"], d["grad"]),
            "quad_penalty_both": lambda: _backward(d, ops.quad_penalty(d["p"], d["a"], d["f"])),
        }[problem.case.op]
    )


def _backward(d: dict[str, Any], loss: Tensor) -> list[Tensor]:
    """Adds to .grad, as a training step does, and leaves zeros there before."""
    torch._foreach_zero_([p.grad for p in d["p"]])
    loss.backward()
    return [loss.detach(), d["p"][0].grad]


def _into_grad(problem: Problem) -> Run | None:
    """The penalty and its gradient in one sweep, as `after_backward` of the methods does it."""
    if problem.case.op != "quad_penalty_both" or problem.data["p"][0].device.type != "cpu":
        return None
    d = problem.data

    def call() -> list[Tensor]:
        grads = [p.grad for p in d["p"]]
        torch._foreach_zero_(grads)
        return [ops.quad_penalty_grad_(grads, d["p"], d["a"], d["f"]), grads[0]]

    return Run(call)


# ---- peers ----------------------------------------------------------------------------------------------------------


def _by(forms: dict[str, Callable[..., Tensor]]) -> Callable[[Problem], Run | None]:
    def prepare(problem: Problem) -> Run | None:
        form = forms.get(problem.case.op)
        return None if form is None else Run(lambda: form(problem.data["act"], problem.data["grad"]))

    return prepare


def _later(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    made: list[Callable[..., Tensor]] = []

    def call(*args: Tensor) -> Tensor:
        if not made:
            made.append(_compiled(form))
        return made[0](*args)

    return call


def _materialised(act: Tensor, grad: Tensor) -> Tensor:
    return torch.einsum("nto,nti->noi", grad, act).float().square().sum(0)


def _materialised_conv(act: Tensor, grad: Tensor) -> Tensor:
    patches = functional.unfold(act, 3, padding=1)
    per = torch.einsum("nol,nil->noi", grad.flatten(2), patches)
    return per.float().square().sum(0).view(grad.shape[1], act.shape[1], 3, 3)


def _ghost(act: Tensor, grad: Tensor) -> Tensor:
    return ((act @ act.mT).float() * (grad @ grad.mT).float()).sum((1, 2))


_MATERIALISING = {
    "diag_fisher": _materialised,
    "diag_fisher_conv2d": _materialised_conv,
    "per_sample_sqnorm": lambda a, g: torch.einsum("nto,nti->noi", g, a).float().square().sum((1, 2)),
}


def _looped(act: Tensor, grad: Tensor) -> Tensor:
    total = torch.zeros(grad.shape[-1], act.shape[-1], device=act.device)
    for a, g in zip(act, grad, strict=True):
        total += (g.T @ a).float().square()
    return total


def _looped_conv(act: Tensor, grad: Tensor) -> Tensor:
    total = torch.zeros(grad.shape[1], act.shape[1], 3, 3, device=act.device)
    for n in range(len(act)):
        total += nn.grad.conv2d_weight(act[n : n + 1], total.shape, grad[n : n + 1], padding=1).float().square()
    return total


_LOOP = {"diag_fisher": _looped, "diag_fisher_conv2d": _looped_conv}


def _weight_gradient(problem: Problem) -> Run | None:
    """What a training step computes: no squares, so it is no peer."""
    act, grad = problem.data.get("act"), problem.data.get("grad")
    if problem.case.op == "diag_fisher":
        return Run(lambda: grad.flatten(0, 1).T @ act.flatten(0, 1), error=lambda _: 0.0, yardstick=True)
    if problem.case.op == "diag_fisher_conv2d":
        shape = problem.data["f"].shape
        return Run(
            lambda: nn.grad.conv2d_weight(act, shape, grad, padding=1), error=lambda _: 0.0, yardstick=True
        )  # fmt: skip
    return None


def _plain_backward(problem: Problem) -> Run | None:
    if problem.case.op != "diag_fisher_model":
        return None
    model, x, y = (problem.data[k] for k in ("model", "x", "y"))

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(functional.cross_entropy(model(x), y, reduction="sum"), list(model.parameters()))

    return Run(call, error=lambda _: 0.0, yardstick=True)


def _vmap_grad(problem: Problem) -> Run | None:
    if problem.case.op != "diag_fisher_model":
        return None
    model, x, y = (problem.data[k] for k in ("model", "x", "y"))
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], x_n: Tensor, y_n: Tensor) -> Tensor:
        return functional.cross_entropy(torch.func.functional_call(model, p, (x_n[None],)), y_n[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    return Run(lambda: [g.square().sum(0) for g in per_sample(parameters, x, y).values()])


def _backpack(problem: Problem) -> Run | None:
    if problem.case.op != "diag_fisher_model":
        return None
    import backpack

    model = backpack.extend(copy.deepcopy(problem.data["model"]))
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    x, y = problem.data["x"], problem.data["y"]

    def call() -> list[Tensor]:
        model.zero_grad()
        with backpack.backpack(backpack.extensions.SumGradSquared()):
            loss(model(x), y).backward()
        return [p.sum_grad_squared for p in model.parameters()]

    return Run(call)


def _opacus(problem: Problem) -> Run | None:
    if problem.case.op != "diag_fisher_model":
        return None
    from opacus.grad_sample import GradSampleModule

    model = GradSampleModule(copy.deepcopy(problem.data["model"]), loss_reduction="sum")
    x, y = problem.data["x"], problem.data["y"]

    def call() -> list[Tensor]:
        model.zero_grad()
        functional.cross_entropy(model(x), y, reduction="sum").backward()
        return [p.grad_sample.square().sum(0) for p in model.parameters()]

    return Run(call)


def _eager_penalty(problem: Problem) -> Run | None:
    if problem.case.op != "quad_penalty_both":
        return None
    d = problem.data

    def call() -> list[Tensor]:
        terms = [(f * (p - a) ** 2).sum() for p, a, f in zip(d["p"], d["a"], d["f"], strict=True)]
        return _backward(d, 0.5 * torch.stack(terms).sum())

    return Run(call)


def _foreach_penalty(problem: Problem) -> Run | None:
    """The gradient by foreach operations, straight into .grad, and the value from the same products."""
    if problem.case.op != "quad_penalty_both":
        return None
    d = problem.data

    def call() -> list[Tensor]:
        with torch.no_grad():
            grads = [p.grad for p in d["p"]]
            torch._foreach_zero_(grads)
            delta = torch._foreach_sub(d["p"], d["a"])
            slope = torch._foreach_mul(delta, d["f"])
            torch._foreach_add_(grads, slope)
            torch._foreach_mul_(delta, slope)
            return [0.5 * torch.stack([t.sum() for t in delta]).sum(), grads[0]]

    return Run(call)
