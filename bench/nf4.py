"""The nf4 rows: quantize, dequantize, linear (forward and backward) and embedding, and everyone who computes them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import tlkernels
from bench.registry import PRODUCT_TOLERANCE, Case, Problem, Provider, Run, Selection
from tlkernels.ops import nf4
from tlkernels.ops._registry import LIBRARIES, native_ops

BLOCK_SIZE = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LINEAR_SHAPES = ((1024, 1024), (4096, 4096), (11008, 4096))  # (out_features, in_features)
DECODE_SHAPES = (*LINEAR_SHAPES, (14336, 4096))
EMBEDDING_SHAPES = ((32000, 1024),)
ROWS = (1, 8, 64, 512, 4096)
EMBEDDING_ROWS = (1, 512)
OPS = ("quantize", "dequantize", "dequantize_out", "dequantize_nested", "linear", "linear_backward", "embedding")
_TABLE_OPS = {
    "quantize": ("nf4_quantize",),
    "dequantize": ("nf4_dequantize",),
    "dequantize_out": ("nf4_dequantize.out",),
    "dequantize_nested": ("nf4_dequantize",),
    "linear": ("nf4_linear",),
    "linear_backward": ("nf4_linear", "nf4_linear_t"),
    "embedding": ("nf4_embedding",),
}
#: What a user without 4-bit weights computes in; float16 products are slow on CPUs, so there the float32 ones stand in.
_DENSE = {
    "cpu": {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32},
    "cuda": {dtype: dtype for dtype in DTYPES},
}


class NF4Family:
    """The benchmarks of the family nf4; see `bench.registry.Family`."""

    name = "nf4"
    ops = OPS

    def cases(self, selection: Selection) -> list[Case]:
        """All cases, or what the selection leaves of them; shapes and rows it names replace the listed ones."""
        cases = []
        for op in OPS:
            shapes, rows, dtypes = _sizes(op, selection.quick)
            for dtype in selection.dtypes or dtypes:
                for shape in selection.shapes or shapes:
                    for count in (selection.rows or rows) if rows else (None,):
                        cases.append(Case(op, shape, dtype, count))
        return [case for case in cases if selection.ops is None or case.op in selection.ops]

    def problem(self, case: Case, device: torch.device) -> Problem:
        """Random normal data for a case, and its judge."""
        dense, weight, nested = _weight(case.shape, str(device))
        out_features, in_features = case.shape
        stored, size, numel = weight.nbytes, case.dtype.itemsize, out_features * in_features
        data: dict[str, Any] = {"weight": weight._replace(dtype=case.dtype)}
        if case.op == "quantize":
            data["dense"] = dense.to(case.dtype)
            exact = nf4.nf4_quantize(data["dense"], block_size=BLOCK_SIZE)
            return Problem(case, data, lambda result: _codes_error(result, exact), 0.0, numel * size, stored, stored)
        if case.op.startswith("dequantize"):
            if case.op == "dequantize_nested":
                data["weight"], stored = nested._replace(dtype=case.dtype), nested.nbytes
            data["out"] = torch.empty(case.shape, dtype=case.dtype, device=device)
            fresh = 0 if case.op == "dequantize_out" else numel * size
            judge = _values_judge(data["weight"], case.dtype)
            return Problem(case, data, judge, 0.0, stored, numel * size, fresh)
        generator = torch.Generator(device).manual_seed(1)
        rows = case.rows or 1
        if case.op == "embedding":
            data["indices"] = torch.randint(out_features, (rows,), generator=generator, device=device)
            values = rows * in_features
            judge = _values_judge(data["weight"], case.dtype, data["indices"])
            return Problem(case, data, judge, 0.0, values // 2 + values // 16, values * size, values * size)
        features = {"x": in_features, "grad": out_features}
        for name, width in features.items():
            data[name] = torch.randn(rows, width, generator=generator, device=device).to(case.dtype)
        backward = case.op == "linear_backward"
        source, made = (data["grad"], in_features) if backward else (data["x"], out_features)
        half = (torch.bfloat16,) if device.type == "cpu" else (torch.bfloat16, torch.float16)
        return Problem(
            case,
            data,
            lambda result: _product_error(result, source, weight, backward),
            PRODUCT_TOLERANCE[case.dtype],
            bytes_read=stored + source.numel() * size,
            bytes_written=rows * made * size,
            output_bytes=rows * (made + (out_features if backward else 0)) * size,
            flops=2 * rows * numel,
            ceiling="bf16" if case.dtype in half else "fp32",
        )

    def providers(self, device: torch.device) -> list[Provider]:
        """This library once per backend, then its peers."""
        ours = [
            Provider(f"tlkernels {name}", True, _on_backend(name), lambda name=name: tlkernels.backend(name))
            for name in (("cpu",) if device.type == "cpu" else ("cuda", "triton"))
            if LIBRARIES.get(name) == "loaded"
        ]
        if device.type == "cuda":  # what a caller gets who forces nothing
            ours.insert(0, Provider("tlkernels", True, _ours))
        peers = [
            Provider("reference eager", False, _ours, lambda: tlkernels.backend("reference")),
            Provider("reference compiled", False, _compiled),
        ]
        if importlib.util.find_spec("bitsandbytes") is not None:
            peers += [
                Provider("bitsandbytes", False, _bitsandbytes),
                Provider("bitsandbytes matmul_4bit", False, _bitsandbytes_matmul),
            ]
        return [*ours, *peers, Provider("dense", False, _dense)]

    def missing(self, device: torch.device) -> list[str]:
        """Who would be here and is not."""
        wanted = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
        lines = [f"tlkernels {n}: {LIBRARIES.get(n)}" for n in wanted if LIBRARIES.get(n) != "loaded"]
        if importlib.util.find_spec("bitsandbytes") is None:
            lines.append("bitsandbytes: not installed (pip install bitsandbytes)")
        return lines


FAMILY = NF4Family()


def _sizes(op: str, quick: bool) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...], tuple[torch.dtype, ...]]:
    linear = op.startswith("linear")
    if quick:
        shapes = ((1000, 512),) if op == "embedding" else ((1024, 1024),)
        return shapes, (1, 64) if linear else (64,) if op == "embedding" else (), DTYPES[:2] if linear else DTYPES[1:2]
    if op == "embedding":
        return EMBEDDING_SHAPES, EMBEDDING_ROWS, DTYPES
    return (LINEAR_SHAPES, ROWS, DTYPES) if linear else (DECODE_SHAPES, (), DTYPES)


@lru_cache(maxsize=8)
def _weight(shape: tuple[int, ...], device: str) -> tuple[Tensor, nf4.NF4Weight, nf4.NF4Weight]:
    """A normal matrix, in float32, in 4 bits, and in 4 bits with 8-bit scales."""
    generator = torch.Generator(device).manual_seed(0)
    dense = torch.randn(*shape, generator=generator, device=device)
    weight = nf4.nf4_quantize(dense, block_size=BLOCK_SIZE)
    q, scale, offset = nf4.absmax_quantize(weight.absmax)
    return dense, weight, weight._replace(absmax=q, absmax_scale=scale, absmax_offset=offset)


# ---- judges ---------------------------------------------------------------------------------------------------------


def _codes_error(result: tuple[Tensor, Tensor], exact: nf4.NF4Weight) -> float:
    """Relative error of the decoded result against the reference's, 0 where every bit agrees."""
    packed, absmax = result[0].reshape(-1), result[1].reshape(-1)
    if torch.equal(packed, exact.packed) and torch.equal(absmax, exact.absmax):
        return 0.0
    if packed.shape != exact.packed.shape or absmax.shape != exact.absmax.shape:
        return float("inf")
    with tlkernels.backend("reference"):
        got, want = (
            nf4.nf4_dequantize(w, dtype=torch.float64) for w in (exact._replace(packed=packed, absmax=absmax), exact)
        )
    return max(_relative(got, want), 1e-12)  # bits differ: never exactly right


def _values_judge(
    weight: nf4.NF4Weight, dtype: torch.dtype, indices: Tensor | None = None
) -> Callable[[Tensor], float]:
    """Dequantizing is exact: the float32 product, rounded once. What differs in a bit has an error."""

    def error(result: Tensor) -> float:
        with tlkernels.backend("reference"):
            want = nf4.nf4_dequantize(weight, dtype=dtype)
        want = want if indices is None else want[indices]
        if result.dtype != dtype or result.shape != want.shape:
            return float("inf")
        return 0.0 if torch.equal(result, want) else max(_relative(result.double(), want.double()), 1e-12)

    return error


def _product_error(result: Tensor, source: Tensor, weight: nf4.NF4Weight, transposed: bool) -> float:
    """The relative error of the worst row, over at most 32 rows spread evenly; infinite where any value is not finite.

    The weight is decoded to float64 a slice at a time: it would not fit twice beside the largest dense peer otherwise.
    """
    out_features, in_features = weight.shape
    width = in_features if transposed else out_features
    if result.shape != (source.shape[0], width) or result.dtype != source.dtype or not result.isfinite().all():
        return float("inf")
    rows = torch.linspace(0, source.shape[0] - 1, min(32, source.shape[0])).round().long().unique().to(source.device)
    x, got = source[rows].double(), result.detach()[rows].double()
    want = torch.zeros_like(got)
    with tlkernels.backend("reference"):
        decoded = nf4.nf4_dequantize(weight, dtype=torch.float32)
    for begin in range(0, out_features, 1024):
        part = slice(begin, min(begin + 1024, out_features))
        if transposed:
            want += x[:, part] @ decoded[part].double()
        else:
            want[:, part] = x @ decoded[part].double().T
    return float(((got - want).norm(dim=1) / want.norm(dim=1)).max())


def _relative(got: Tensor, want: Tensor) -> float:
    error = float((got - want).norm() / want.norm())
    return error if error == error else float("inf")


# ---- providers ------------------------------------------------------------------------------------------------------


def _on_backend(name: str) -> Callable[[Problem], Run | None]:
    """This library, where that backend has kernels for the op."""

    def prepare(problem: Problem) -> Run | None:
        if name in ("cpu", "cuda") and not native_ops(name).issuperset(_TABLE_OPS[problem.case.op]):
            return None
        if name == "triton" and any(nf4.OPS[op].triton is None for op in _TABLE_OPS[problem.case.op]):
            return None
        return _ours(problem)

    return prepare


def _ours(problem: Problem) -> Run:
    data, op = problem.data, problem.case.op
    weight = data["weight"]
    if op == "quantize":
        return Run(lambda: nf4.nf4_quantize(data["dense"], block_size=BLOCK_SIZE)[:2])
    if op == "dequantize_out":
        return Run(lambda: nf4.nf4_dequantize(weight, out=data["out"]))
    if op.startswith("dequantize"):
        return Run(lambda: nf4.nf4_dequantize(weight))
    if op == "embedding":
        return Run(lambda: nf4.nf4_embedding(data["indices"], weight))
    return _product(problem, lambda x: nf4.nf4_linear(x, weight))


def _product(problem: Problem, layer: Callable[[Tensor], Tensor]) -> Run:
    """Forward: the layer without gradient. Backward: the input gradient alone; its memory with the forward pass."""
    x = problem.data["x"]
    if problem.case.op == "linear":
        return Run(torch.no_grad()(lambda: layer(x)))
    leaf, grad = x.clone().requires_grad_(), problem.data["grad"]
    y = layer(leaf)

    def whole() -> tuple[Tensor, Tensor]:
        fresh = layer(leaf)
        return fresh, torch.autograd.grad(fresh, leaf, grad)[0]

    return Run(lambda: torch.autograd.grad(y, leaf, grad, retain_graph=True)[0], whole)


@cache
def _compile(op: str) -> Callable[..., Any]:
    """torch.compile of a reference, for any size: a compilation per size would outlast the measurements."""
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.config.cache_size_limit = 64
    torch._functorch.config.donated_buffer = False  # the backward pass is timed again and again on one graph
    reference = getattr(nf4, f"_reference_nf4_{op}")
    return torch.compile(reference, dynamic=True)


def _compiled(problem: Problem) -> Run:
    data, op, shape = problem.data, problem.case.op, problem.case.shape
    weight, dtype = data["weight"], problem.case.dtype
    parts = (weight.packed, weight.absmax, weight.code, weight.absmax_scale, weight.absmax_offset)
    if op == "quantize":
        return Run(lambda: _compile("quantize")(data["dense"]))
    if op == "dequantize_out":
        return Run(lambda: _compile("dequantize_out")(*parts, list(shape), out=data["out"]) or data["out"])
    if op.startswith("dequantize"):
        return Run(lambda: _compile("dequantize")(*parts, list(shape), dtype=dtype))
    if op == "embedding":
        return Run(lambda: _compile("embedding")(data["indices"], *parts, *shape, dtype=dtype))
    return _product(problem, lambda x: _compile("linear")(x, *parts, None, *shape))


def _dense(problem: Problem) -> Run | None:
    """F.linear on the decoded weight: eight to four times the bytes, and no decoding."""
    if not problem.case.op.startswith("linear"):
        return None
    dtype, device = problem.case.dtype, problem.data["x"].device.type
    compute = _DENSE[device][dtype]
    decoded = nf4.nf4_dequantize(problem.data["weight"], dtype=compute)
    return _product(problem, lambda x: functional.linear(x.to(compute), decoded).to(dtype))


def _bitsandbytes_state(weight: nf4.NF4Weight, dtype: torch.dtype) -> Any:
    from bitsandbytes import functional as bnb

    code = bnb.get_4bit_type("nf4", device=weight.packed.device)
    absmax, nested = weight.absmax, {}
    if weight.absmax_scale is not None:
        scales = {"absmax": weight.absmax_scale.clone(), "dtype": torch.float32, "blocksize": weight.absmax_block_size}
        table = bnb.create_dynamic_map().to(weight.packed.device)
        nested = {"offset": weight.absmax_offset, "state2": bnb.QuantState(code=table, **scales)}
    return bnb.QuantState(
        absmax=absmax.clone(), shape=torch.Size(weight.shape), code=code, blocksize=weight.block_size,
        quant_type="nf4", dtype=dtype, **nested,
    )  # fmt: skip


def _bitsandbytes(problem: Problem) -> Run | None:
    """Its functions, and Linear4bit: in eval mode, on CPUs with AVX-512 its repacked fast path."""
    import bitsandbytes

    data, case = problem.data, problem.case
    weight = data["weight"]
    state, packed = _bitsandbytes_state(weight, case.dtype), weight.packed.clone().view(-1, 1)
    if case.op == "quantize":

        def quantize() -> tuple[Tensor, Tensor]:
            codes, quantized = bitsandbytes.functional.quantize_4bit(
                data["dense"], blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=False
            )
            return codes, quantized.absmax

        return Run(quantize)
    if case.op == "dequantize_out":
        return Run(lambda: bitsandbytes.functional.dequantize_4bit(packed, state, out=data["out"]))
    if case.op.startswith("dequantize"):
        return Run(lambda: bitsandbytes.functional.dequantize_4bit(packed, state))
    parameter = bitsandbytes.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=BLOCK_SIZE, quant_type="nf4", bnb_quantized=True
    )
    if case.op == "embedding":
        table = bitsandbytes.nn.Embedding4bit(*case.shape, dtype=case.dtype, quant_type="nf4", device="meta")
        table.weight = parameter
        return Run(lambda: table(data["indices"]))
    out_features, in_features = case.shape
    layer = bitsandbytes.nn.Linear4bit(
        in_features, out_features, bias=False, compute_dtype=case.dtype, quant_type="nf4", device="meta"
    )
    layer.weight = parameter
    return _product(problem, layer.train(case.op == "linear_backward"))


def _bitsandbytes_matmul(problem: Problem) -> Run | None:
    """matmul_4bit on the storage format itself: what Linear4bit does outside its fast path."""
    import bitsandbytes

    if problem.case.op != "linear":
        return None
    weight = problem.data["weight"]
    state, packed = _bitsandbytes_state(weight, problem.case.dtype), weight.packed.view(-1, 1)
    return _product(problem, lambda x: bitsandbytes.matmul_4bit(x, packed, quant_state=state))
