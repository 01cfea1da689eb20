"""The lora rows: a frozen layer with its adapter, forward and backward, many adapters in one batch, norms and merging.

What an adapter costs is what it adds to the layer that it is put on, so the frozen layer alone is measured beside it:
a yardstick, not a peer. Adapters are float32, as PEFT makes them and optimizers want them, with values that the
model's dtype holds too: everybody is asked for the same product, whichever dtype he computes it in.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional

import tlkernels
from bench.nf4 import BLOCK_SIZE, _bitsandbytes_state
from bench.registry import PRODUCT_TOLERANCE, Case, Problem, Provider, Ratio, Run, Selection, Sizes, sizes
from tlkernels import ops
from tlkernels.ops import NF4Weight, _registry

DTYPES = (torch.bfloat16, torch.float32)
SCALING = 2.0  # lora_alpha = 2 rank
DROPOUT = 0.1
ADAPTERS = 8
SEED = 7


@dataclass(frozen=True)
class Layer:
    """What an op of a layer measures: `kind` is forward, backward or both."""

    kind: str
    nf4: bool = False
    dropout: float = 0.0
    rank: int = 16


#: The ops of one layer with one adapter. What training needs, forward and backward together, comes first.
LAYERS = {
    f"{'nf4_' * nf4}{kind}{'_dropout' * bool(dropout)}": Layer(kind, nf4, dropout)
    for kind, nf4, dropout in product(("both", "forward", "backward"), (False, True), (0.0, DROPOUT))
} | {"both_rank64": Layer("both", rank=64)}
OPS = (*LAYERS, "grouped", "grouped_delta", "dora_weight_norm", "merge")

_LAYER_SIZES: Sizes = (((1024, 1024), (16, 512, 2048)), ((4096, 4096), (8, 512, 2048)))
_ONE_SIZE: dict[str, Sizes] = {
    "both_rank64": (((1024, 1024), (2048,)),),
    "grouped": (((4096, 4096), (64,)),),
    "grouped_delta": (((4096, 4096), (64,)),),
    "dora_weight_norm": (((4096, 4096), ()),),
    "merge": (((4096, 4096), ()),),
}
RATIOS = (
    Ratio("of the frozen layer", "frozen layer", cost=True),
    Ratio("of one adapter", "one adapter", cost=True),
    Ratio("over PEFT", "PEFT"),
    Ratio("over PEFT + bitsandbytes", "PEFT bitsandbytes"),
)
#: The ops that are plotted.
PLOTTED = ("both", "both_dropout", "nf4_both", "nf4_both_dropout")


class LoraFamily:
    """The benchmarks of the family lora; see `bench.registry.Family`."""

    name = "lora"
    ops = OPS

    def cases(self, selection: Selection) -> list[Case]:
        """All cases, or what the selection leaves of them; shapes and rows it names replace the listed ones."""
        cases = []
        for op in OPS:
            listed = _quick_sizes(op) if selection.quick else _ONE_SIZE.get(op, _LAYER_SIZES)
            dtypes = selection.dtypes or (DTYPES if not selection.quick or op == "forward" else DTYPES[:1])
            cases += [Case(op, shape, dtype, rows) for dtype in dtypes for shape, rows in sizes(listed, selection)]
        return [case for case in cases if selection.ops is None or case.op in selection.ops]

    def problem(self, case: Case, device: torch.device) -> Problem:
        """Random normal data for a case, and its judge."""
        if case.op in LAYERS:
            return _layer_problem(case, device)
        return _group_problem(case, device) if case.op.startswith("grouped") else _weight_problem(case, device)

    def providers(self, device: torch.device) -> list[Provider]:
        """This library once per backend, the yardsticks, then the peers."""
        names = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
        loaded = [name for name in names if _registry.LIBRARIES.get(name) == "loaded"]
        listed = [
            *(Provider(f"tlkernels {n}", True, _on_backend(n), lambda n=n: tlkernels.backend(n)) for n in loaded),
            Provider("frozen layer", False, _frozen),
            Provider("one adapter", False, _one_adapter),
            Provider("tlkernels one adapter", False, _our_one_adapter),
            Provider("reference eager", False, _ours, lambda: tlkernels.backend("reference")),
            Provider("addmm by hand", False, _by_hand),
            Provider("loop over adapters", False, _loop),
            Provider("gather", False, _gather),
            Provider("formed sum", False, _formed),
        ]
        if _installed("peft"):
            listed += [
                Provider("PEFT", False, _peft),
                Provider("PEFT model-dtype", False, _peft_model_dtype),
                Provider("PEFT compiled", False, _peft_compiled),
            ]
            if _installed("bitsandbytes"):
                listed += [Provider("PEFT bitsandbytes", False, _peft_bitsandbytes)]
        return listed

    def missing(self, device: torch.device) -> list[str]:
        """Who would be here and is not."""
        wanted = ("cpu",) if device.type == "cpu" else ("triton",)
        libraries = _registry.LIBRARIES
        lines = [f"tlkernels {n}: {libraries.get(n)}" for n in wanted if libraries.get(n) != "loaded"]
        lines += [f"{n}: not installed (pip install {n})" for n in ("peft", "bitsandbytes") if not _installed(n)]
        return lines


FAMILY = LoraFamily()


def _quick_sizes(op: str) -> Sizes:
    rows = () if op in ("dora_weight_norm", "merge") else (64,) if op.startswith("grouped") else (16,)
    return (((1024, 1024), rows),)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ---- problems -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _weight(shape: tuple[int, ...], device: str) -> tuple[Tensor, NF4Weight]:
    """A normal matrix with rows of norm 1, in float32 and in 4 bits."""
    generator = torch.Generator(device).manual_seed(0)
    dense = torch.randn(*shape, generator=generator, device=device) / shape[1] ** 0.5
    return dense, ops.nf4_quantize(dense, block_size=BLOCK_SIZE)


def _normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device, std: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)


def _factors(shape: tuple[int, ...], rank: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """float32 factors that `dtype` holds exactly, with an update half as large as the product it is added to."""
    out_features, in_features = shape
    a = _normal((rank, in_features), 1, dtype, device, in_features**-0.5)
    b = _normal((out_features, rank), 2, dtype, device, rank**-0.5 / (2 * SCALING))
    return {"a": a.float(), "b": b.float()}


def _ceiling(dtype: torch.dtype, device: torch.device) -> str:
    half = (torch.bfloat16,) if device.type == "cpu" else (torch.bfloat16, torch.float16)
    return "bf16" if dtype in half else "fp32"


@lru_cache(maxsize=2)
def _mask(seed: int, rows: int, cols: int, p: float, device: str) -> tuple[Tensor, Tensor]:
    """(seed and offset, the mask that they stand for): by the reference, which no kernel had a hand in."""
    rng = torch.tensor([seed, 3], device=device)
    with tlkernels.backend("reference"):
        return rng, ops.lora_dropout_mask(rng, rows, cols, p)


def _layer_problem(case: Case, device: torch.device) -> Problem:
    layer, rows, dtype = LAYERS[case.op], case.rows or 1, case.dtype
    out_features, in_features = case.shape
    dense, packed = _weight(case.shape, str(device))
    data: dict[str, Any] = {
        "weight": packed._replace(dtype=dtype) if layer.nf4 else dense.to(dtype),
        "x": _normal((rows, in_features), 3, dtype, device),
        "grad": _normal((rows, out_features), 4, dtype, device),
        "rng": None,
        "mask": None,
        **_factors(case.shape, layer.rank, dtype, device),
    }
    if layer.dropout:
        data["rng"], data["mask"] = _mask(SEED, rows, in_features, layer.dropout, str(device))
    size, weights, rank = dtype.itemsize, out_features * in_features, layer.rank
    stored = packed.nbytes if layer.nf4 else weights * size
    factors = 4 * rank * (in_features + out_features)
    forward, backward = layer.kind != "backward", layer.kind != "forward"
    # forward: x, W, A and B give y and s. backward: dy, x, s, W, A and B give dx, dA and dB.
    read = rows * in_features * size + stored + factors
    return Problem(
        case,
        data,
        _LayerJudge(case, data, data["mask"]),
        PRODUCT_TOLERANCE[dtype],
        bytes_read=forward * read + backward * (read + rows * (out_features + rank) * size),
        bytes_written=forward * rows * (out_features + rank) * size + backward * (rows * in_features * size + factors),
        output_bytes=rows * out_features * size + backward * (rows * in_features * size + factors),
        flops=2 * rows * ((forward + backward) * weights + (forward + 2 * backward) * rank * sum(case.shape)),
        ceiling=_ceiling(dtype, device),
    )


@dataclass(frozen=True)
class _LayerJudge:
    """The largest error among a layer's results, against float64: the worst of 32 rows of y and dx, dA and dB whole.

    The mask is that of the provider, or None; the frozen layer has no adapter.
    """

    case: Case
    data: dict[str, Any]
    mask: Tensor | None = None
    frozen: bool = False

    def __call__(self, results: dict[str, Tensor]) -> float:
        layer = LAYERS[self.case.op]
        names = {"y"} if layer.kind == "forward" else {"dx"} if layer.kind == "backward" else {"y", "dx"}
        if not self.frozen and layer.kind != "forward":
            names |= {"da", "db"}
        if set(results) != names:
            return math.inf
        x, dy = self.data["x"], self.data["grad"]
        rows = torch.linspace(0, x.shape[0] - 1, min(32, x.shape[0])).round().long().unique().to(x.device)
        want = self._wanted(rows, names)
        worst = 0.0
        for name, result in results.items():
            full = {"y": dy, "dx": x, "da": self.data["a"], "db": self.data["b"]}[name]
            if result.shape != full.shape or (name in ("y", "dx") and result.dtype != x.dtype):
                return math.inf
            if not result.isfinite().all():
                return math.inf
            got = result.detach()[rows] if name in ("y", "dx") else result.detach().reshape(1, -1)
            expected = want[name].reshape(got.shape)
            worst = max(worst, float(((got.double() - expected).norm(dim=1) / expected.norm(dim=1)).max()))
        return worst

    def _wanted(self, rows: Tensor, names: set[str]) -> dict[str, Tensor]:
        data, layer = self.data, LAYERS[self.case.op]
        weight = data["weight"]
        if layer.nf4:  # 4-bit weights count with the precision of x
            with tlkernels.backend("reference"):
                weight = ops.nf4_dequantize(weight)
        weight = weight.double()
        x, dy, a, b = (data[name].double() for name in ("x", "grad", "a", "b"))
        if self.frozen:
            b = torch.zeros_like(b)
        kept = x if self.mask is None else x * self.mask / (1.0 - layer.dropout)
        s, ds = SCALING * kept @ a.T, SCALING * dy @ b
        want = {}
        if "y" in names:
            want["y"] = x[rows] @ weight.T + s[rows] @ b.T
        if "dx" in names:
            update = ds[rows] @ a
            if self.mask is not None:
                update *= self.mask[rows] / (1.0 - layer.dropout)
            want["dx"] = dy[rows] @ weight + update
        if "da" in names:
            want |= {"da": ds.T @ kept, "db": dy.T @ s}
        return want


def _group_problem(case: Case, device: torch.device) -> Problem:
    """Rows in any order, each with one of the adapters, which have the model's dtype: this is for serving."""
    rows, dtype, rank = case.rows or 1, case.dtype, 16
    out_features, in_features = case.shape
    dense, _ = _weight(case.shape, str(device))
    generator = torch.Generator(device).manual_seed(5)
    data = {
        "weight": dense.to(dtype),
        "x": _normal((rows, in_features), 3, dtype, device),
        "y": _normal((rows, out_features), 4, dtype, device),
        "a": _normal((ADAPTERS, rank, in_features), 1, dtype, device, in_features**-0.5),
        "b": _normal((ADAPTERS, out_features, rank), 2, dtype, device, rank**-0.5),
        "ids": torch.randint(ADAPTERS, (rows,), generator=generator, device=device),
        "scalings": torch.linspace(0.5, 1.5, ADAPTERS, device=device),
    }
    size = dtype.itemsize
    whole = case.op == "grouped"  # with the frozen layer; else the update alone, into given memory
    taken = len(data["ids"].unique()) * rank * (in_features + out_features)
    given = out_features * in_features if whole else rows * out_features
    return Problem(
        case,
        data,
        lambda result: _group_error(case, data, result, data["ids"]),
        PRODUCT_TOLERANCE[dtype],
        bytes_read=(rows * in_features + taken + given) * size,
        bytes_written=rows * out_features * size,
        output_bytes=whole * rows * out_features * size,
        flops=2 * rows * (rank * (in_features + out_features) + whole * out_features * in_features),
        ceiling=_ceiling(dtype, device),
    )


def _group_error(case: Case, data: dict[str, Tensor], result: Tensor, ids: Tensor | None) -> float:
    """The relative error of the worst row, with these adapters instead of the problem's, or without any."""
    x = data["x"]
    if result.shape != data["y"].shape or result.dtype != x.dtype or not result.isfinite().all():
        return math.inf
    want = x.double() @ data["weight"].double().T if case.op == "grouped" else data["y"].double()
    if ids is not None:
        for adapter in ids.unique().tolist():
            mine = ids == adapter
            s = x[mine].double() @ data["a"][adapter].double().T * float(data["scalings"][adapter])
            want[mine] += s @ data["b"][adapter].double().T
    return float(((result.double() - want).norm(dim=1) / want.norm(dim=1)).max())


def _weight_problem(case: Case, device: torch.device) -> Problem:
    """The norms of a sum's rows, and the sum in place."""
    out_features = case.shape[0]
    weight = _weight(case.shape, str(device))[0].to(case.dtype)
    data = {"weight": weight, **_factors(case.shape, 16, case.dtype, device)}
    size, weights, factors = case.dtype.itemsize, weight.numel(), 4 * 16 * sum(case.shape)
    norm = case.op == "dora_weight_norm"

    def error(result: Tensor) -> float:
        if result.shape != ((out_features,) if norm else weight.shape) or not result.isfinite().all():
            return math.inf
        if result.dtype != (torch.float32 if norm else weight.dtype):
            return math.inf
        want = weight.double() + SCALING * data["b"].double() @ data["a"].double()
        if norm:
            return float(((result.double() - want.norm(dim=1)) / want.norm(dim=1)).abs().max())
        return float(((result.double() - want).norm(dim=1) / want.norm(dim=1)).max())

    return Problem(
        case,
        data,
        error,
        PRODUCT_TOLERANCE[torch.float32 if norm else case.dtype],
        bytes_read=weights * size + factors,
        bytes_written=4 * out_features if norm else weights * size,
        output_bytes=4 * out_features if norm else 0,
        flops=2 * weights * 16,
        ceiling=_ceiling(case.dtype, device),
    )


# ---- a layer, whoever computes it -----------------------------------------------------------------------------------


def _layer_run(
    problem: Problem,
    layer: Callable[[Tensor], Tensor],
    parameters: dict[str, Tensor],
    error: Callable[[dict[str, Tensor]], float] | None = None,
    yardstick: bool = False,
) -> Run:
    """Forward: without gradient. Backward: the gradients alone; its memory with the forward pass. Both: both."""
    kind, x, grad = LAYERS[problem.case.op].kind, problem.data["x"], problem.data["grad"]
    if kind == "forward":
        return Run(torch.no_grad()(lambda: {"y": layer(x)}), error=error, yardstick=yardstick)
    leaf = x.clone().requires_grad_()
    leaves = {"dx": leaf, **parameters}

    def gradients(y: Tensor, again: bool = False) -> dict[str, Tensor]:
        found = torch.autograd.grad(y, tuple(leaves.values()), grad, retain_graph=again)
        return dict(zip(leaves, found, strict=True))

    def both() -> dict[str, Tensor]:
        y = layer(leaf)
        return {"y": y, **gradients(y)}

    if kind == "both":
        return Run(both, error=error, yardstick=yardstick)
    y = layer(leaf)
    return Run(lambda: gradients(y, again=True), both, error, yardstick)


def _trainable(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "da": problem.data["a"].to(dtype).clone().requires_grad_(),
        "db": problem.data["b"].to(dtype).clone().requires_grad_(),
    }


def _needed(op: str) -> set[str]:
    """The registry's ops that this library runs for a benchmarked one."""
    if op in LAYERS:
        layer = LAYERS[op]
        prefix = "nf4_" * layer.nf4
        backward = {"lora_grad_ab", f"{prefix}lora_grad_x"} if layer.kind != "forward" else set()
        return {f"{prefix}lora_linear"} | backward
    return {
        "grouped": {"lora_linear_grouped"},
        "grouped_delta": {"lora_grouped_delta_"},
        "dora_weight_norm": {"dora_weight_norm"},
        "merge": {"lora_merge_"},
    }[op]


def _on_backend(name: str) -> Callable[[Problem], Run | None]:
    """This library, where that backend has kernels for the op."""

    def prepare(problem: Problem) -> Run | None:
        needed = _needed(problem.case.op)
        if name == "triton":
            there = all(_registry.OPS[op].triton is not None for op in needed)
        else:
            there = _registry.native_ops(name).issuperset(needed)
        return _ours(problem) if there else None

    return prepare


def _ours(problem: Problem) -> Run:
    data, op = problem.data, problem.case.op
    if op in LAYERS:
        adapter = _trainable(problem, torch.float32)
        options = {"dropout": LAYERS[op].dropout, "rng": data["rng"]}

        def layer(x: Tensor) -> Tensor:
            return ops.lora_linear(x, data["weight"], None, adapter["da"], adapter["db"], SCALING, **options)

        return _layer_run(problem, layer, adapter)
    if op.startswith("grouped"):
        return _our_group(problem, data["ids"])
    if op == "dora_weight_norm":
        return Run(lambda: ops.dora_weight_norm(data["weight"], data["a"], data["b"], SCALING))
    target = data["weight"].clone()
    return Run(lambda: ops.lora_merge_(target, data["a"], data["b"], SCALING))


def _frozen(problem: Problem) -> Run | None:
    """The layer without its adapter: its product, and the gradient of its input. In 4 bits it is ours."""
    data, op = problem.data, problem.case.op
    weight = data["weight"]
    if op == "grouped":
        return Run(
            lambda: functional.linear(data["x"], weight),
            error=lambda result: _group_error(problem.case, data, result, None),
            yardstick=True,
        )
    if op not in LAYERS:
        return None
    judge = _LayerJudge(problem.case, data, frozen=True)
    linear = ops.nf4_linear if LAYERS[op].nf4 else functional.linear
    return _layer_run(problem, lambda x: linear(x, weight), {}, judge, yardstick=True)


# ---- peers of a layer -----------------------------------------------------------------------------------------------


class _Addmm(torch.autograd.Function):
    """The layer as one writes it by hand: two additions fused into products, and nothing saved that is not needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, dropout: float) -> Tensor:
        a_, b_ = a.to(x.dtype), b.to(x.dtype)
        kept = functional.dropout(x, dropout) if dropout else x
        s = SCALING * (kept @ a_.T)
        ctx.save_for_backward(kept, weight, a_, b_, s)
        ctx.dropout, ctx.dtype = dropout, a.dtype
        return functional.linear(x, weight).addmm_(s, b_.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, a, b, s = ctx.saved_tensors
        ds = SCALING * (dy @ b)
        grad_a, grad_b = (ds.T @ kept).to(ctx.dtype), (dy.T @ s).to(ctx.dtype)
        dx = dy @ weight
        if ctx.dropout:  # dropped elements of x are 0 in `kept`: so is their gradient
            dx += torch.where(kept != 0, ds @ a, 0) / (1.0 - ctx.dropout)
        else:
            dx.addmm_(ds, a)
        return dx, None, grad_a, grad_b, None


def _by_hand(problem: Problem) -> Run | None:
    data, op = problem.data, problem.case.op
    if op == "merge":
        target = data["weight"].clone()
        a, b = data["a"].to(target.dtype), data["b"].to(target.dtype)
        return Run(lambda: target.addmm_(b, a, alpha=SCALING))
    if op not in LAYERS or LAYERS[op].nf4:
        return None
    adapter = _trainable(problem, torch.float32)
    dropout = LAYERS[op].dropout

    def layer(x: Tensor) -> Tensor:
        return _Addmm.apply(x, data["weight"], adapter["da"], adapter["db"], dropout)

    return _seeded(problem, problem.case.dtype, lambda error: _layer_run(problem, layer, adapter, error))


def _seeded(problem: Problem, dtype: torch.dtype, make: Callable[[Any], Run]) -> Run:
    """Make a run that draws its own mask, with the judge that knows the mask of its first call.

    torch's generator starts from the same seed there, so that drawing once for ones of the same shape and dtype tells
    which elements it drops. A backward pass belongs to the forward pass made here.
    """
    p = LAYERS[problem.case.op].dropout
    if not p:
        return make(None)
    torch.manual_seed(SEED)
    mask = functional.dropout(torch.ones_like(problem.data["x"], dtype=dtype), p) != 0
    torch.manual_seed(SEED)
    return make(_LayerJudge(problem.case, problem.data, mask))


def _dense_base(problem: Problem) -> torch.nn.Linear:
    out_features, in_features = problem.case.shape
    base = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
    base.weight = Parameter(problem.data["weight"], requires_grad=False)
    return base


def _bitsandbytes_base(problem: Problem) -> torch.nn.Module:
    import bitsandbytes

    (out_features, in_features), dtype = problem.case.shape, problem.case.dtype
    weight = problem.data["weight"]
    base = bitsandbytes.nn.Linear4bit(
        in_features, out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    base.weight = bitsandbytes.nn.Params4bit(
        weight.packed.clone().view(-1, 1), requires_grad=False, quant_state=_bitsandbytes_state(weight, dtype),
        blocksize=BLOCK_SIZE, quant_type="nf4", bnb_quantized=True,
    )  # fmt: skip
    return base


def _peft_layer(problem: Problem, dtype: torch.dtype) -> torch.nn.Module:
    """PEFT's module around the frozen layer, with this case's adapter in that dtype."""
    from peft import LoraConfig
    from peft.tuners import lora

    layer, data = LAYERS[problem.case.op], problem.data
    options = {"r": layer.rank, "lora_alpha": int(SCALING * layer.rank)}
    kind, base = (lora.Linear4bit, _bitsandbytes_base) if layer.nf4 else (lora.Linear, _dense_base)
    module = kind(base(problem), "default", config=LoraConfig(lora_dropout=layer.dropout, **options), **options)
    for factor, name in ((module.lora_A, "a"), (module.lora_B, "b")):
        factor["default"].weight = Parameter(data[name].to(dtype).clone())
    return module.train(layer.kind != "forward" or layer.dropout > 0.0)


def _peft_run(problem: Problem, dtype: torch.dtype) -> Run:
    module = _peft_layer(problem, dtype)
    adapter = {"da": module.lora_A["default"].weight, "db": module.lora_B["default"].weight}
    return _seeded(problem, dtype, lambda error: _layer_run(problem, module, adapter, error))


def _peft(problem: Problem) -> Run | None:
    """With float32 adapters, as `get_peft_model` makes them in a bfloat16 model; it computes with them in float32."""
    data, op = problem.data, problem.case.op
    if op == "merge":
        target = data["weight"].clone()
        return Run(lambda: target.add_((SCALING * (data["b"] @ data["a"])).to(target.dtype)))
    return _peft_run(problem, torch.float32) if op in LAYERS and not LAYERS[op].nf4 else None


def _peft_model_dtype(problem: Problem) -> Run | None:
    """With ``autocast_adapter_dtype=False``: adapters in the model's dtype."""
    op, dtype = problem.case.op, problem.case.dtype
    if op not in LAYERS or LAYERS[op].nf4 or dtype == torch.float32:
        return None
    return _peft_run(problem, dtype)


def _peft_bitsandbytes(problem: Problem) -> Run | None:
    """QLoRA: Linear4bit on the same codes and scales, and float32 adapters."""
    op = problem.case.op
    return _peft_run(problem, torch.float32) if op in LAYERS and LAYERS[op].nf4 else None


#: Compiled modules and their adapters, by all that a compilation depends on but the number of rows.
_COMPILED: dict[tuple[Any, ...], tuple[Any, dict[str, Tensor]]] = {}


def _peft_compiled(problem: Problem) -> Run | None:
    """Forward and backward, adapters in the model's dtype, one compilation for all numbers of rows.

    Its dropout draws numbers that no check can foresee, so it is compiled without.
    """
    if problem.case.op != "both":
        return None
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # a graph's backward pass may run again
    dtype = problem.case.dtype
    key = (problem.case.shape, dtype, problem.data["x"].device, torch.get_num_threads())
    if key not in _COMPILED:
        module = _peft_layer(problem, dtype)
        adapter = {"da": module.lora_A["default"].weight, "db": module.lora_B["default"].weight}
        _COMPILED[key] = torch.compile(module, dynamic=True), adapter
    compiled, adapter = _COMPILED[key]
    return _layer_run(problem, compiled, adapter)


# ---- many adapters --------------------------------------------------------------------------------------------------


def _group_run(
    problem: Problem, update: Callable[[Tensor, Tensor], Any], ids: Tensor | None = None, yardstick: bool = False
) -> Run:
    """`update(y, x)` adds in place: to the frozen layer's product, or to given memory, call after call."""
    case, data = problem.case, problem.data

    def error(result: Tensor) -> float:
        return _group_error(case, data, result, data["ids"] if ids is None else ids)

    if case.op == "grouped":

        def call() -> Tensor:
            y = functional.linear(data["x"], data["weight"])
            update(y, data["x"])
            return y
    else:
        y = data["y"].clone()

        def call() -> Tensor:
            update(y, data["x"])
            return y

    return Run(torch.no_grad()(call), error=error, yardstick=yardstick)


def _our_group(problem: Problem, ids: Tensor, yardstick: bool = False) -> Run:
    data = problem.data
    group = (data["a"], data["b"], ids, data["scalings"])
    if problem.case.op == "grouped_delta":
        return _group_run(problem, lambda y, x: ops.lora_grouped_delta_(y, x, *group), ids, yardstick)
    return Run(
        torch.no_grad()(lambda: ops.lora_linear_grouped(data["x"], data["weight"], None, *group)),
        error=lambda result: _group_error(problem.case, data, result, ids),
        yardstick=yardstick,
    )


def _grouped(problem: Problem) -> bool:
    return problem.case.op.startswith("grouped")


def _our_one_adapter(problem: Problem) -> Run | None:
    """Our op where all rows have the same adapter."""
    return _our_group(problem, torch.zeros_like(problem.data["ids"]), yardstick=True) if _grouped(problem) else None


def _one_adapter(problem: Problem) -> Run | None:
    """One adapter for all rows, as torch computes it: as many operations, an eighth of the factors."""
    if not _grouped(problem):
        return None
    data = problem.data
    a, b, scaling = data["a"][0].T, data["b"][0].T, float(data["scalings"][0])
    return _group_run(
        problem, lambda y, x: y.addmm_(x @ a, b, alpha=scaling), torch.zeros_like(data["ids"]), yardstick=True
    )


def _loop(problem: Problem) -> Run | None:
    """Adapter by adapter, the rows that have it: PEFT's way with `adapter_names`."""
    if not _grouped(problem):
        return None
    data = problem.data
    a, b, ids, scalings = data["a"], data["b"], data["ids"], data["scalings"].tolist()

    def update(y: Tensor, x: Tensor) -> None:
        for adapter, scaling in enumerate(scalings):
            rows = (ids == adapter).nonzero().squeeze(1)
            if len(rows):
                y.index_add_(0, rows, (x[rows] @ a[adapter].T) @ b[adapter].T, alpha=scaling)

    return _group_run(problem, update)


def _gather(problem: Problem) -> Run | None:
    """Each row with its own copy of its adapter, in two batched products."""
    if not _grouped(problem):
        return None
    data = problem.data
    a, b, ids, scalings = data["a"], data["b"], data["ids"], data["scalings"].to(data["x"].dtype)

    def update(y: Tensor, x: Tensor) -> None:
        s = torch.bmm(a[ids], x.unsqueeze(2)) * scalings[ids].view(-1, 1, 1)
        y += torch.bmm(b[ids], s).squeeze(2)

    return _group_run(problem, update)


# ---- norms and merging ----------------------------------------------------------------------------------------------


def _formed(problem: Problem) -> Run | None:
    """The row norms of W + scaling B A, formed in float32, as PEFT does; `reference eager` has the Gram form."""
    if problem.case.op != "dora_weight_norm":
        return None
    weight, a, b = (problem.data[name] for name in ("weight", "a", "b"))
    return Run(lambda: (weight.float() + SCALING * (b @ a)).norm(dim=1))
