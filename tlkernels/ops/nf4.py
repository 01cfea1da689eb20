r"""NF4: weights in 4 bits, and the products that read them in that form.

A tensor is cut, flat, into blocks of ``block_size`` elements (the last may be short). With the 16-entry table
:math:`c`, ascending, and the midpoints :math:`m_i = (c_i + c_{i+1}) / 2`, all in float32:

.. math::
    a_b = \max_{j \in b} |w_j|, \qquad
    q_j = \#\{i : m_i < w_j \, r_b\}, \quad r_b = 1 / \max(a_b, 10^{-38}), \qquad
    \hat w_j = c_{q_j} \, a_b ,

the product rounded once to the output's dtype. The even element of a pair is in the high nibble. A short last block
divides by the same quantity instead of multiplying by its reciprocal. This is, bit for bit, the format of
bitsandbytes. NaN makes its whole block NaN; next to an infinity every finite element becomes NaN.

Double quantization stores the scales in 8 bits: with the offset :math:`o` (their mean), :math:`a - o` is quantized in
the same way in blocks of 256 with a 256-entry table, and decoded as ``table[q] * scale + o``.

Tim Dettmers, Artidoro Pagnoni, Ari Holtzman, Luke Zettlemoyer. *QLoRA: Efficient Finetuning of Quantized LLMs.*
NeurIPS 2023, arXiv:2305.14314. The 8-bit table: *8-bit Optimizers via Block-wise Quantization*, ICLR 2022,
arXiv:2110.02861.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._nf4_format import DYNAMIC_CODE, FP4_CODE, NF4_CODE
from tlkernels.ops._common import (
    FLOATS,
    batch_of_rows,
    changed,
    check_device,
    check_float,
    check_sizes,
    checked_numel,
    name_of,
    no_autocast,
)
from tlkernels.ops._registry import call, define, not_differentiable

__all__ = [
    "FP4_CODE",
    "NF4_CODE",
    "NF4Weight",
    "absmax_dequantize",
    "absmax_quantize",
    "nf4_dequantize",
    "nf4_embedding",
    "nf4_linear",
    "nf4_linear_t",
    "nf4_quantize",
]

_TINY = 1e-38  # below this the reciprocal of a block's absmax would overflow


# ---- argument checks: each names the argument, what it got and what it wants ----------------------------------------


def _check_block_size(op: str, block_size: int, name: str = "block_size") -> None:
    if not 32 <= block_size <= 4096 or block_size & (block_size - 1):
        raise ValueError(f"{op}: {name} is {block_size}; expected a power of two from 32 to 4096")


def _check_code(op: str, code: Tensor | None) -> None:
    if code is None:
        return
    if code.dtype != torch.float32:
        raise TypeError(f"{op}: code has dtype {name_of(code.dtype)}; expected float32")
    if code.shape != (16,):
        raise ValueError(f"{op}: code has shape {tuple(code.shape)}; expected (16,)")
    if type(code) is Tensor and code.device.type == "cpu" and not bool(torch.isfinite(code).all()):
        raise ValueError(f"{op}: code has entries that are not finite; expected 16 finite values")


def _check_weight(
    op: str, packed: Tensor, absmax: Tensor, numel: int, block_size: int, code: Tensor | None,
    absmax_scale: Tensor | None, absmax_offset: Tensor | None, absmax_block_size: int, device: torch.device,
) -> None:  # fmt: skip
    _check_block_size(op, block_size)
    _check_block_size(op, absmax_block_size, "absmax_block_size")
    _check_code(op, code)
    if packed.dtype not in (torch.uint8, torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(
            f"{op}: packed has dtype {name_of(packed.dtype)}; expected uint8 (or a float view of the bytes)"
        )
    nbytes, want = packed.numel() * packed.element_size(), (numel + 1) // 2
    if nbytes != want:
        raise ValueError(f"{op}: packed holds {nbytes} bytes; expected {want} for {numel} elements of 4 bits")
    blocks = -(-numel // block_size)
    if absmax.shape != (blocks,):
        raise ValueError(
            f"{op}: absmax has shape {tuple(absmax.shape)}; expected ({blocks},): "
            f"{numel} elements in blocks of {block_size}"
        )
    if absmax.dtype == torch.uint8:
        _check_nested(op, absmax_scale, absmax_offset, blocks, absmax_block_size)
    elif absmax.dtype != torch.float32:
        raise TypeError(
            f"{op}: absmax has dtype {name_of(absmax.dtype)}; expected float32, or uint8 (double-quantized)"
        )
    elif absmax_scale is not None or absmax_offset is not None:
        raise TypeError(f"{op}: absmax_scale and absmax_offset go with a uint8 absmax; absmax has dtype float32")
    check_device(
        op, device, packed=packed, absmax=absmax, code=code, absmax_scale=absmax_scale, absmax_offset=absmax_offset
    )  # fmt: skip


def _check_nested(op: str, scale: Tensor | None, offset: Tensor | None, blocks: int, block_size: int) -> None:
    if scale is None or offset is None:
        raise ValueError(f"{op}: absmax has dtype uint8 (double-quantized); expected absmax_scale and absmax_offset")
    want = -(-blocks // block_size)
    if scale.dtype != torch.float32 or offset.dtype != torch.float32:
        raise TypeError(
            f"{op}: absmax_scale and absmax_offset have dtypes {name_of(scale.dtype)} and {name_of(offset.dtype)}; "
            "expected float32"
        )
    if scale.shape != (want,):
        raise ValueError(
            f"{op}: absmax_scale has shape {tuple(scale.shape)}; expected ({want},): "
            f"{blocks} scales in blocks of {block_size}"
        )
    if offset.numel() != 1:
        raise ValueError(f"{op}: absmax_offset has {offset.numel()} elements; expected 1")


def _check_product(op: str, name: str, x: Tensor, features: int, out_features: int, in_features: int) -> None:
    """Of nf4_linear (features of x are the weight's input) and nf4_linear_t (its output)."""
    check_float(op, **{name: x})
    check_sizes(op, out_features=out_features, in_features=in_features)
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(
            f"{op}: {name} has {x.shape[-1] if x.dim() else 0} features, but the weight was quantized from shape "
            f"({out_features}, {in_features}); expected {name}.shape[-1] == {features}"
        )


def _check_bias(op: str, bias: Tensor | None, out_features: int, device: torch.device) -> None:
    if bias is None:
        return
    check_float(op, bias=bias)
    if bias.shape != (out_features,):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; expected ({out_features},)")
    check_device(op, device, bias=bias)


def _check_indices(op: str, indices: Tensor, num_embeddings: int, embedding_dim: int) -> None:
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: indices has dtype {name_of(indices.dtype)}; expected int64 or int32")
    check_sizes(op, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
    if type(indices) is Tensor and indices.device.type == "cpu" and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= num_embeddings:
            bad = low if low < 0 else high
            raise IndexError(f"{op}: indices has an entry {bad}; expected 0 <= index < {num_embeddings}")


# ---- the format, in plain torch -------------------------------------------------------------------------------------


def _table(code: Tensor | None, device: torch.device) -> Tensor:
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device) if code is None else code


def _blocks(flat: Tensor, block_size: int) -> Tensor:
    """[n] -> [ceil(n / block_size), block_size], the last block filled up with zeros."""
    count = -(-flat.numel() // block_size)
    return torch.nn.functional.pad(flat, (0, count * block_size - flat.numel())).view(count, block_size)


def _normalised(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Each element over its block's absmax, and the absmax."""
    w = _blocks(flat, block_size)
    absmax = w.abs().amax(1) if w.numel() else w.new_zeros(0)
    divisor = absmax.clamp(min=_TINY)[:, None]
    v = w * (1.0 / divisor)
    if flat.numel() % block_size:
        v = torch.cat([v[:-1], w[-1:] / divisor[-1:]])
    return torch.where(w.isinf(), w.sign(), v).view(-1)[: flat.numel()], absmax


def _count_below(v: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest entry of an ascending table; NaN counts as above every midpoint."""
    midpoints = (table[1:] + table[:-1]) * 0.5
    index = torch.zeros_like(v, dtype=torch.uint8)
    for m in midpoints:
        index += ~(v <= m)
    return index


def _reference_nf4_quantize(w: Tensor, code: Tensor | None = None, *, block_size: int = 64) -> tuple[Tensor, Tensor]:
    check_float("nf4_quantize", w=w)
    _check_block_size("nf4_quantize", block_size)
    _check_code("nf4_quantize", code)
    check_device("nf4_quantize", w.device, code=code)
    table, order = torch.sort(_table(code, w.device), stable=True)
    v, absmax = _normalised(w.reshape(-1).float(), block_size)
    index = order.to(torch.uint8)[_count_below(v, table).long()]
    if index.numel() % 2:  # the spare nibble holds the code of zero
        zero = order.to(torch.uint8)[_count_below(v.new_zeros(1), table).long()]
        index = torch.cat([index, zero])
    index = index.view(-1, 2)
    return index[:, 0] << 4 | index[:, 1], absmax


def _reference_absmax_quantize(
    absmax: Tensor, offset: Tensor | None = None, *, block_size: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    op = "absmax_quantize"
    if absmax.dtype != torch.float32 or absmax.dim() != 1:
        raise TypeError(
            f"{op}: absmax has dtype {name_of(absmax.dtype)} and shape {tuple(absmax.shape)}; expected float32 [n]"
        )
    _check_block_size(op, block_size)
    if offset is not None and (offset.dtype != torch.float32 or offset.numel() != 1):
        raise TypeError(
            f"{op}: offset has dtype {name_of(offset.dtype)} and {offset.numel()} elements; expected 1 float32"
        )
    check_device(op, absmax.device, offset=offset)
    if offset is None:
        offset = absmax.double().mean().float() if absmax.numel() else absmax.new_zeros(())
    else:
        offset = offset.reshape(()).clone()
    v, scale = _normalised(absmax - offset, block_size)
    table = torch.tensor(DYNAMIC_CODE, dtype=torch.float32, device=absmax.device)
    return _count_below(v, table), scale, offset


def _reference_absmax_dequantize(q: Tensor, scale: Tensor, offset: Tensor, *, block_size: int = 256) -> Tensor:
    op = "absmax_dequantize"
    if q.dtype != torch.uint8 or q.dim() != 1:
        raise TypeError(f"{op}: q has dtype {name_of(q.dtype)} and shape {tuple(q.shape)}; expected uint8 [n]")
    _check_block_size(op, block_size)
    _check_nested(op, scale, offset, q.numel(), block_size)
    check_device(op, q.device, scale=scale, offset=offset)
    table = torch.tensor(DYNAMIC_CODE, dtype=torch.float32, device=q.device)
    return table[q.long()] * scale.repeat_interleave(block_size)[: q.numel()] + offset.reshape(())


def _decode(
    packed: Tensor, absmax: Tensor, numel: int, block_size: int, code: Tensor | None,
    absmax_scale: Tensor | None, absmax_offset: Tensor | None, absmax_block_size: int,
) -> Tensor:  # fmt: skip
    """The flat float32 values code[nibble] * absmax."""
    if absmax_scale is not None and absmax_offset is not None:
        absmax = _reference_absmax_dequantize(absmax, absmax_scale, absmax_offset, block_size=absmax_block_size)
    p = packed.contiguous().view(torch.uint8).reshape(-1)
    index = torch.stack([p >> 4, p & 15], 1).view(-1)[:numel]
    return _table(code, packed.device)[index.long()] * absmax.repeat_interleave(block_size)[:numel]


def _reference_nf4_dequantize(
    packed: Tensor, absmax: Tensor, code: Tensor | None, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    shape: list[int], *, dtype: torch.dtype, block_size: int = 64, absmax_block_size: int = 256,
) -> Tensor:  # fmt: skip
    numel = checked_numel("nf4_dequantize", shape)
    if dtype not in FLOATS:
        raise TypeError(f"nf4_dequantize: dtype is {name_of(dtype)}; expected float32, bfloat16, float16 or float64")
    nested = (absmax_scale, absmax_offset, absmax_block_size)
    _check_weight("nf4_dequantize", packed, absmax, numel, block_size, code, *nested, packed.device)
    return _decode(packed, absmax, numel, block_size, code, *nested).to(dtype).view(shape)


def _reference_nf4_dequantize_out(
    packed: Tensor, absmax: Tensor, code: Tensor | None, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    shape: list[int], *, block_size: int = 64, absmax_block_size: int = 256, out: Tensor,
) -> None:  # fmt: skip
    if list(out.shape) != list(shape):
        raise ValueError(f"nf4_dequantize: out has shape {tuple(out.shape)}; expected {tuple(shape)}")
    if not out.is_contiguous():
        raise ValueError(f"nf4_dequantize: out has strides {out.stride()}; expected a contiguous tensor")
    check_device("nf4_dequantize", packed.device, out=out)
    out.copy_(
        _reference_nf4_dequantize(
            packed, absmax, code, absmax_scale, absmax_offset, shape, dtype=out.dtype, block_size=block_size,
            absmax_block_size=absmax_block_size,
        )
    )  # fmt: skip


def _reference_nf4_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None,
    absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    bias: Tensor | None, out_features: int, in_features: int, *, block_size: int = 64, absmax_block_size: int = 256,
) -> Tensor:  # fmt: skip
    op, nested = "nf4_linear", (absmax_scale, absmax_offset, absmax_block_size)
    _check_product(op, "x", x, in_features, out_features, in_features)
    _check_weight(op, packed, absmax, out_features * in_features, block_size, code, *nested, x.device)
    _check_bias(op, bias, out_features, x.device)
    acc = torch.promote_types(x.dtype, torch.float32)
    w = _decode(packed, absmax, out_features * in_features, block_size, code, *nested).view(out_features, in_features)
    with no_autocast(x.device):
        y = torch.nn.functional.linear(x.to(acc), w.to(x.dtype).to(acc), None if bias is None else bias.to(acc))
    return y.to(x.dtype)


def _reference_nf4_linear_t(
    grad_output: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None,
    absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    out_features: int, in_features: int, *, block_size: int = 64, absmax_block_size: int = 256,
) -> Tensor:  # fmt: skip
    op, nested = "nf4_linear_t", (absmax_scale, absmax_offset, absmax_block_size)
    _check_product(op, "grad_output", grad_output, out_features, out_features, in_features)
    _check_weight(op, packed, absmax, out_features * in_features, block_size, code, *nested, grad_output.device)
    acc = torch.promote_types(grad_output.dtype, torch.float32)
    w = _decode(packed, absmax, out_features * in_features, block_size, code, *nested).view(out_features, in_features)
    with no_autocast(grad_output.device):
        y = torch.matmul(grad_output.to(acc), w.to(grad_output.dtype).to(acc))
    return y.to(grad_output.dtype)


def _reference_nf4_embedding(
    indices: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None,
    absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    num_embeddings: int, embedding_dim: int, *, dtype: torch.dtype, block_size: int = 64, absmax_block_size: int = 256,
) -> Tensor:  # fmt: skip
    op, nested = "nf4_embedding", (absmax_scale, absmax_offset, absmax_block_size)
    _check_indices(op, indices, num_embeddings, embedding_dim)
    if dtype not in FLOATS:
        raise TypeError(f"{op}: dtype is {name_of(dtype)}; expected float32, bfloat16, float16 or float64")
    numel = num_embeddings * embedding_dim
    _check_weight(op, packed, absmax, numel, block_size, code, *nested, indices.device)
    w = _decode(packed, absmax, numel, block_size, code, *nested).view(num_embeddings, embedding_dim)
    return w[indices.long()].to(dtype)


# ---- schemas, gradients and batching rules --------------------------------------------------------------------------

# Tensors stand before the *: torch cannot register a gradient for an op with keyword-only tensors.
_WEIGHT = "Tensor packed, Tensor absmax, Tensor? code, Tensor? absmax_scale, Tensor? absmax_offset"
_BLOCKS = "int block_size=64, int absmax_block_size=256"

_define_quantize = not_differentiable("nf4_quantize", "rounding to 4 bits has no useful derivative; detach the weight")
_define_decode = not_differentiable("nf4_dequantize", "4-bit weights are frozen; train an adapter beside them")
_define_embedding = not_differentiable("nf4_embedding", "4-bit weights are frozen; train an adapter beside them")


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Saved: the 4-bit weight as it came. Never a dense copy: that is QLoRA's whole point."""
    _x, *weight, bias, out_features, in_features, block_size, absmax_block_size = inputs
    ctx.save_for_backward(*weight)
    ctx.sizes = (out_features, in_features)
    ctx.blocks = {"block_size": block_size, "absmax_block_size": absmax_block_size}
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    _refuse_weight_gradient(ctx, "nf4_linear")
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = call("nf4_linear_t", grad_output, *ctx.saved_tensors, *ctx.sizes, **ctx.blocks)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
        acc = torch.promote_types(grad_output.dtype, torch.float32)
        grad_bias = grad_output.reshape(-1, ctx.sizes[0]).sum(0, dtype=acc).to(ctx.bias_dtype)
    return (grad_x, *_NO_WEIGHT, grad_bias, None, None, None, None)


def _linear_t_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _linear_setup(ctx, (*inputs[:6], None, *inputs[6:]), output)


def _linear_t_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    _refuse_weight_gradient(ctx, "nf4_linear_t")
    grad = None
    if ctx.needs_input_grad[0]:
        grad = call("nf4_linear", grad_output, *ctx.saved_tensors, None, *ctx.sizes, **ctx.blocks)
    return (grad, *_NO_WEIGHT, None, None, None, None)


_NO_WEIGHT = (None,) * 5  # the gradients of packed, absmax, code, absmax_scale, absmax_offset


def _refuse_weight_gradient(ctx: Any, op: str) -> None:
    if any(ctx.needs_input_grad[1:6]):
        raise RuntimeError(f"{op} is not differentiable in its weight: 4-bit weights are frozen")


define(
    "nf4_quantize(Tensor w, Tensor? code=None, *, int block_size=64) -> (Tensor, Tensor)",
    _reference_nf4_quantize,
    setup_context=_define_quantize[0],
    backward=_define_quantize[1],
    triton="nf4:nf4_quantize",
    cuda_default="cuda",
)
define(
    "absmax_quantize(Tensor absmax, Tensor? offset=None, *, int block_size=256) -> (Tensor, Tensor, Tensor)",
    _reference_absmax_quantize,
    setup_context=_define_quantize[0],
    backward=_define_quantize[1],
    dtypes=("float32",),
)
define(
    "absmax_dequantize(Tensor q, Tensor scale, Tensor offset, *, int block_size=256) -> Tensor",
    _reference_absmax_dequantize,
    setup_context=_define_decode[0],
    backward=_define_decode[1],
    dtypes=("float32",),
)
define(
    f"nf4_dequantize({_WEIGHT}, SymInt[] shape, *, ScalarType dtype, {_BLOCKS}) -> Tensor",
    _reference_nf4_dequantize,
    setup_context=_define_decode[0],
    backward=_define_decode[1],
    triton="nf4:nf4_dequantize",
    cuda_default="cuda",
)
define(
    f"nf4_dequantize.out({_WEIGHT}, SymInt[] shape, *, {_BLOCKS}, Tensor(a!) out) -> ()",
    _reference_nf4_dequantize_out,
    triton="nf4:nf4_dequantize_out",
    cuda_default="cuda",
)
define(
    f"nf4_linear(Tensor x, {_WEIGHT}, Tensor? bias, int out_features, int in_features, *, {_BLOCKS}) -> Tensor",
    _reference_nf4_linear,
    setup_context=_linear_setup,
    backward=_linear_backward,
    vmap=batch_of_rows("nf4_linear"),
    triton="nf4:nf4_linear",
    cuda_default="cuda",
    gradient="twice",
)
# What the CUDA library calls from nf4_linear for more rows than its own kernel serves; nobody else does.
define(
    f"nf4_linear_many(Tensor x, {_WEIGHT}, Tensor? bias, int out_features, int in_features, *, {_BLOCKS}) -> Tensor",
    _reference_nf4_linear,
    setup_context=_linear_setup,
    backward=_linear_backward,
    vmap=batch_of_rows("nf4_linear_many"),
    triton="nf4:nf4_linear",
    gradient="twice",
)
define(
    f"nf4_linear_t(Tensor grad_output, {_WEIGHT}, int out_features, int in_features, *, {_BLOCKS}) -> Tensor",
    _reference_nf4_linear_t,
    setup_context=_linear_t_setup,
    backward=_linear_t_backward,
    vmap=batch_of_rows("nf4_linear_t"),
    triton="nf4:nf4_linear_t",
    gradient="twice",
)
define(
    f"nf4_embedding(Tensor indices, {_WEIGHT}, int num_embeddings, int embedding_dim, *, ScalarType dtype, "
    f"{_BLOCKS}) -> Tensor",
    _reference_nf4_embedding,
    setup_context=_define_embedding[0],
    backward=_define_embedding[1],
    vmap=batch_of_rows("nf4_embedding"),
    triton="nf4:nf4_embedding",
    cuda_default="cuda",
)


# ---- public functions -----------------------------------------------------------------------------------------------


class NF4Weight(NamedTuple):
    """A tensor in 4-bit storage: what `nf4_quantize` returns and the other functions take.

    Attributes
    ----------
    packed : Tensor
        uint8 ``[ceil(numel / 2)]``, two codes a byte, the even element in the high nibble. The layouts ``[n, 1]`` and
        ``[1, n]`` and a bfloat16, float16 or float32 view of the same bytes are accepted too.
    absmax : Tensor
        float32 ``[ceil(numel / block_size)]``, or uint8 of the same length when double-quantized.
    shape : tuple of int
        Shape of the tensor that was quantized.
    dtype : torch.dtype
        Its dtype, the default of `nf4_dequantize`.
    block_size : int
        Elements per scale, a power of two from 32 to 4096.
    code : Tensor or None
        float32 ``[16]``, the table; None is NF4.
    absmax_scale, absmax_offset : Tensor or None
        float32 ``[ceil(len(absmax) / absmax_block_size)]`` and float32 ``[]``: the scales' own scales and offset, when
        double-quantized.
    absmax_block_size : int
        Scales per second-level scale.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    block_size: int = 64
    code: Tensor | None = None
    absmax_scale: Tensor | None = None
    absmax_offset: Tensor | None = None
    absmax_block_size: int = 256

    @property
    def nbytes(self) -> int:
        """Bytes of storage: codes, scales and tables."""
        tensors = (self.packed, self.absmax, self.code, self.absmax_scale, self.absmax_offset)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _tensors(weight: NF4Weight) -> tuple[Tensor | None, ...]:
    return weight.packed, weight.absmax, weight.code, weight.absmax_scale, weight.absmax_offset


def _blocks_of(weight: NF4Weight) -> dict[str, int]:
    return {"block_size": weight.block_size, "absmax_block_size": weight.absmax_block_size}


def _matrix(op: str, weight: NF4Weight) -> tuple[int, int]:
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"{op}: weight is a {type(weight).__name__}; expected an NF4Weight, as nf4_quantize returns it")
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: weight was quantized from shape {tuple(weight.shape)}; expected a matrix")
    return weight.shape[0], weight.shape[1]


def nf4_quantize(
    w: Tensor, *, block_size: int = 64, code: Tensor | None = None, double_quant: bool = False
) -> NF4Weight:
    """Quantize a tensor to 4 bits.

    Parameters
    ----------
    w : Tensor
        float32, bfloat16, float16 or float64 (quantized as float32), any shape and strides.
    block_size : int
        Elements per scale: a power of two from 32 to 4096. Blocks run over the flat tensor.
    code : Tensor, optional
        float32 ``[16]``, finite, in any order: another table than NF4, e.g. ``torch.tensor(FP4_CODE)``.
    double_quant : bool
        Store the scales in 8 bits (0.127 bits per weight instead of 0.5 at block_size 64).

    Returns
    -------
    NF4Weight

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If an argument has another dtype or size than stated. Asking for a gradient raises.

    Notes
    -----
    The module's docstring gives the equation. NaN makes its block NaN; an infinity stays, and its finite neighbours
    in the block become NaN.

    References
    ----------
    Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314, section 3.

    Examples
    --------
    >>> import torch, tlkernels
    >>> weight = tlkernels.ops.nf4_quantize(torch.randn(128, 64))
    >>> weight.packed.shape, weight.absmax.shape
    (torch.Size([4096]), torch.Size([128]))
    """
    packed, absmax = call("nf4_quantize", w.detach(), code, block_size=block_size)
    weight = NF4Weight(packed, absmax, tuple(w.shape), w.dtype, block_size, code)
    if not double_quant:
        return weight
    q, scale, offset = absmax_quantize(absmax)
    return weight._replace(absmax=q, absmax_scale=scale, absmax_offset=offset)


def absmax_quantize(
    absmax: Tensor, *, block_size: int = 256, offset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: store scales in 8 bits.

    Parameters
    ----------
    absmax : Tensor
        float32 ``[n]``.
    block_size : int
        Scales per second-level scale, a power of two from 32 to 4096.
    offset : Tensor, optional
        float32, one element: what to subtract first. By default the mean, summed in float64 and rounded once, so that
        it does not depend on the number of threads (a float32 mean does, in its last bit).

    Returns
    -------
    q : Tensor
        uint8 ``[n]``.
    scale : Tensor
        float32 ``[ceil(n / block_size)]``.
    offset : Tensor
        float32 ``[]``.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If an argument has another dtype or size than stated.

    References
    ----------
    Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314, section 3, "double quantization".
    """
    return call("absmax_quantize", absmax, offset, block_size=block_size)


def absmax_dequantize(q: Tensor, scale: Tensor, offset: Tensor, *, block_size: int = 256) -> Tensor:
    """The float32 scales ``table[q] * scale[i // block_size] + offset`` that `absmax_quantize` stored.

    Parameters
    ----------
    q : Tensor
        uint8 ``[n]``.
    scale : Tensor
        float32 ``[ceil(n / block_size)]``.
    offset : Tensor
        float32, one element.
    block_size : int
        As given to `absmax_quantize`.

    Returns
    -------
    Tensor
        float32 ``[n]``.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If an argument has another dtype or size than stated.

    References
    ----------
    Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314, section 3.
    """
    return call("absmax_dequantize", q, scale, offset, block_size=block_size)


def nf4_dequantize(weight: NF4Weight, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Decode a 4-bit tensor.

    Parameters
    ----------
    weight : NF4Weight
    dtype : torch.dtype, optional
        Of the result; by default the dtype that was quantized.
    out : Tensor, optional
        Contiguous, of the weight's shape: is written and returned, instead of new memory (whose page faults cost more
        than decoding for large weights). Its dtype is used; `dtype`, if also given, must agree.

    Returns
    -------
    Tensor
        Of the weight's shape; ``code[nibble] * absmax`` in float32, rounded once to the dtype.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If the parts of `weight` do not fit together, or `out` does not fit. Asking for a gradient raises.

    References
    ----------
    Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314.
    """
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"nf4_dequantize: weight is a {type(weight).__name__}; expected an NF4Weight")
    if out is None:
        dtype = weight.dtype if dtype is None else dtype
        return call("nf4_dequantize", *_tensors(weight), weight.shape, dtype=dtype, **_blocks_of(weight))
    if dtype is not None and dtype != out.dtype:
        raise TypeError(
            f"nf4_dequantize: dtype is {name_of(dtype)}, but out has dtype {name_of(out.dtype)}; expected the same"
        )
    call("nf4_dequantize.out", *_tensors(weight), weight.shape, **_blocks_of(weight), out=out)
    changed(out)
    return out


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    r"""The linear layer :math:`y = x \hat W^T + b` with a 4-bit weight, never made dense.

    Parameters
    ----------
    x : Tensor
        ``[..., in_features]``, float32, bfloat16, float16 or float64.
    weight : NF4Weight
        Of shape ``(out_features, in_features)``.
    bias : Tensor, optional
        ``[out_features]``, a float dtype.

    Returns
    -------
    Tensor
        ``[..., out_features]``, of x's dtype: ``F.linear(x, nf4_dequantize(weight, dtype=x.dtype), bias)`` with sums in
        float32 (float64 for float64), rounded once.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If an argument has another dtype or size than stated, or the parts of `weight` do not fit together.

    Notes
    -----
    Differentiable in x and bias, twice; the weight is frozen. Saved for backward: the 4-bit weight only.

    References
    ----------
    Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314.

    Examples
    --------
    >>> import torch, tlkernels
    >>> weight = tlkernels.ops.nf4_quantize(torch.randn(128, 64))
    >>> tlkernels.ops.nf4_linear(torch.randn(3, 64), weight).shape
    torch.Size([3, 128])
    """
    sizes = _matrix("nf4_linear", weight)
    return call("nf4_linear", x, *_tensors(weight), bias, *sizes, **_blocks_of(weight))


def nf4_linear_t(grad_output: Tensor, weight: NF4Weight) -> Tensor:
    r"""The product :math:`g \hat W` with a 4-bit weight: the input gradient of `nf4_linear`.

    Parameters
    ----------
    grad_output : Tensor
        ``[..., out_features]``, float32, bfloat16, float16 or float64.
    weight : NF4Weight
        Of shape ``(out_features, in_features)``.

    Returns
    -------
    Tensor
        ``[..., in_features]``, of grad_output's dtype.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If an argument has another dtype or size than stated, or the parts of `weight` do not fit together.

    Notes
    -----
    Differentiable in grad_output, twice.

    References
    ----------
    Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314.
    """
    sizes = _matrix("nf4_linear_t", weight)
    return call("nf4_linear_t", grad_output, *_tensors(weight), *sizes, **_blocks_of(weight))


def nf4_embedding(indices: Tensor, weight: NF4Weight, *, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of a 4-bit table, decoded.

    Parameters
    ----------
    indices : Tensor
        int64 or int32, any shape, each in ``[0, num_embeddings)``.
    weight : NF4Weight
        Of shape ``(num_embeddings, embedding_dim)``.
    dtype : torch.dtype, optional
        Of the result; by default the dtype that was quantized.

    Returns
    -------
    Tensor
        ``[*indices.shape, embedding_dim]``.

    Raises
    ------
    IndexError, RuntimeError
        If an index is out of range (on CPU; a CUDA kernel cannot raise and returns NaN rows instead).
    TypeError, ValueError, RuntimeError
        If an argument has another dtype or size than stated. Asking for a gradient raises.

    References
    ----------
    Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314.
    """
    sizes = _matrix("nf4_embedding", weight)
    dtype = weight.dtype if dtype is None else dtype
    return call("nf4_embedding", indices, *_tensors(weight), *sizes, dtype=dtype, **_blocks_of(weight))
