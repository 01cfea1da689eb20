r"""LoRA: a frozen linear layer with a trainable update of low rank, as one product.

With the frozen weight :math:`W` (``[out, in]``), the factors :math:`A` (``lora_a``, ``[r, in]``) and :math:`B`
(``lora_b``, ``[out, r]``), the scaling :math:`\gamma` and a dropout mask :math:`M` on the adapter's input alone:

.. math::
    s = \gamma \, \frac{M \circ x}{1 - p} A^T, \qquad y = x W^T + b + s B^T,

    ds = \gamma \, dy \, B, \qquad dA = ds^T \frac{M \circ x}{1 - p}, \qquad dB = dy^T s,
    \qquad dx = dy \, W + \frac{M}{1 - p} \circ (ds \, A) .

Sums are float32 (float64 for float64); y, s and ds are rounded once to x's dtype, and the factors count with their
values in that dtype. Saved for the backward pass are x and s, ``[rows, r]``: no mask and no masked copy of x.

The mask comes from a counter, so it is the same on every backend and is made again wherever it is needed. With
``rng = (seed, offset)``, element (row, col) reads 16 bits of Philox-4x32-10: key = the two halves of the seed, counter
= (col // 8, row, the two halves of the offset); of the four output words, word ``(col % 8) // 2``, its low half for an
even column. The element is kept where these 16 bits, as a number, are not below ``round(65536 p)``.

Edward Hu et al. *LoRA: Low-Rank Adaptation of Large Language Models.* ICLR 2022, arXiv:2106.09685.
John Salmon et al. *Parallel Random Numbers: As Easy as 1, 2, 3.* SC 2011 (Philox).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tlkernels.ops._common import (
    batch_of_rows,
    changed,
    check_device,
    check_float,
    check_sizes,
    name_of,
    no_autocast,
)
from tlkernels.ops._registry import call, define, not_differentiable
from tlkernels.ops.nf4 import (
    NF4Weight,
    _blocks_of,
    _check_weight,
    _decode,
    _matrix,
    _tensors,
    nf4_dequantize,
    nf4_linear,
    nf4_quantize,
)

__all__ = [
    "dora_weight_norm",
    "lora_dropout_mask",
    "lora_grouped_delta_",
    "lora_linear",
    "lora_linear_grouped",
    "lora_merge",
    "lora_merge_",
]


def _flat(t: Tensor) -> Tensor:
    """[..., n] -> [rows, n], also where there is nothing."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


# ---- argument checks ------------------------------------------------------------------------------------------------


def _check_rows(op: str, name: str, x: Tensor, features: int, why: str) -> None:
    check_float(op, **{name: x})
    if x.dim() == 0 or x.shape[-1] != features:
        got = x.shape[-1] if x.dim() else 0
        raise ValueError(f"{op}: {name} has {got} features; expected {features}, {why}")


def _check_a(op: str, lora_a: Tensor, in_features: int) -> int:
    if lora_a.dim() != 2 or lora_a.shape[1] != in_features:
        raise ValueError(f"{op}: lora_a has shape {tuple(lora_a.shape)}; expected (rank, {in_features})")
    if lora_a.shape[0] < 1:
        raise ValueError(f"{op}: lora_a has rank {lora_a.shape[0]}; expected at least 1")
    return lora_a.shape[0]


def _check_factors(op: str, lora_a: Tensor, lora_b: Tensor, out_features: int, in_features: int) -> int:
    check_float(op, lora_a=lora_a, lora_b=lora_b)
    rank = _check_a(op, lora_a, in_features)
    if tuple(lora_b.shape) != (out_features, rank):
        raise ValueError(f"{op}: lora_b has shape {tuple(lora_b.shape)}; expected ({out_features}, {rank})")
    return rank


def _check_dropout(op: str, rng: Tensor | None, dropout: float, name: str = "dropout") -> None:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: {name} is {dropout}; expected 0 <= {name} < 1")
    if rng is None:
        if dropout > 0.0:
            raise ValueError(f"{op}: rng is None; expected int64 (2,), seed and offset, for dropout {dropout}")
    elif rng.dtype != torch.int64 or tuple(rng.shape) != (2,):
        raise ValueError(
            f"{op}: rng has dtype {name_of(rng.dtype)} and shape {tuple(rng.shape)}; "
            "expected int64 (2,), seed and offset"
        )


def _check_same_dtype(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    if t.dtype != like.dtype:
        raise TypeError(f"{op}: {name} has dtype {name_of(t.dtype)}; expected {name_of(like.dtype)}, like {like_name}")


def _check_bias(op: str, bias: Tensor | None, out_features: int) -> None:
    if bias is not None:
        check_float(op, bias=bias)
        if tuple(bias.shape) != (out_features,):
            raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; expected ({out_features},)")


def _check_dense(op: str, weight: Tensor) -> tuple[int, int]:
    check_float(op, weight=weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; expected (out_features, in_features)")
    return weight.shape[0], weight.shape[1]


# ---- the mask -------------------------------------------------------------------------------------------------------

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _philox(counter: list[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Philox-4x32-10 on int64 tensors that hold 32-bit words. A product that wraps still has the right 64 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + _PHILOX_W[0] & _LOW, k1 + _PHILOX_W[1] & _LOW
    return [c0, c1, c2, c3]


def _threshold(p: float) -> int:
    return min(65535, int(p * 65536.0 + 0.5))


def _reference_dropout_mask(rng: Tensor, rows: int, cols: int, p: float) -> Tensor:
    op = "lora_dropout_mask"
    check_sizes(op, rows=rows, cols=cols)
    if rows >= 2**32:
        raise ValueError(f"{op}: rows is {rows}; expected fewer than 2**32")
    _check_dropout(op, rng, p, "p")
    seed, offset = rng[0], rng[1]
    col = torch.arange(-(-cols // 8), device=rng.device)[None, :]
    row = torch.arange(rows, device=rng.device)[:, None]
    shape = torch.zeros_like(row * col)
    counter = [col + shape, row + shape, (offset & _LOW) + shape, (offset >> 32 & _LOW) + shape]
    words = torch.stack(_philox(counter, (seed & _LOW, seed >> 32 & _LOW)), -1)
    halves = torch.stack([words & 0xFFFF, words >> 16], -1)
    return (halves >= _threshold(p)).reshape(rows, 8 * col.numel())[:, :cols].contiguous()


def _kept(x: Tensor, rng: Tensor | None, dropout: float) -> Tensor:
    """x as the adapter sees it: masked and scaled up, in x's dtype."""
    if rng is None or dropout == 0.0:
        return x
    rows = _flat(x)
    mask = _reference_dropout_mask(rng, rows.shape[0], rows.shape[1], dropout)
    return (torch.where(mask, rows, torch.zeros((), dtype=x.dtype, device=x.device)) * (1.0 / (1.0 - dropout))).view(
        x.shape
    )


# ---- one adapter ----------------------------------------------------------------------------------------------------


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` with the precision of `dtype`, in its accumulator's type."""
    return t.to(dtype).to(_acc(dtype))


def _forward(
    x: Tensor, w: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, rng: Tensor | None, scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula; w has x's precision in the accumulator's type."""
    acc = _acc(x.dtype)
    with no_autocast(x.device):
        wide = x.to(acc)
        s = (scaling * (_kept(wide, rng, dropout) @ _as(lora_a, x.dtype).T)).to(x.dtype)
        y = torch.nn.functional.linear(wide, w, None if bias is None else bias.to(acc))
        return (y + s.to(acc) @ _as(lora_b, x.dtype).T).to(x.dtype), s


def _grad_x(
    grad_output: Tensor, w: Tensor, ds: Tensor, lora_a: Tensor, rng: Tensor | None, dropout: float
) -> Tensor:  # fmt: skip
    acc = _acc(grad_output.dtype)
    with no_autocast(grad_output.device):
        update = _kept(ds.to(acc) @ _as(lora_a, grad_output.dtype), rng, dropout)
        return (grad_output.to(acc) @ w + update).to(grad_output.dtype)


def _reference_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, rng: Tensor | None, *,
    scaling: float, dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "lora_linear"
    out_features, in_features = _check_dense(op, weight)
    _check_rows(op, "x", x, in_features, f"like weight of shape {tuple(weight.shape)}")
    _check_same_dtype(op, "weight", weight, "x", x)
    _check_factors(op, lora_a, lora_b, out_features, in_features)
    _check_bias(op, bias, out_features)
    _check_dropout(op, rng, dropout)
    check_device(op, x.device, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, rng=rng)
    return _forward(x, weight.to(_acc(x.dtype)), bias, lora_a, lora_b, rng, scaling, dropout)


def _reference_nf4_lora_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None,
    absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, rng: Tensor | None, out_features: int, in_features: int, *,
    scaling: float, dropout: float = 0.0, block_size: int = 64, absmax_block_size: int = 256,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op, nested = "nf4_lora_linear", (absmax_scale, absmax_offset, absmax_block_size)
    check_sizes(op, out_features=out_features, in_features=in_features)
    _check_rows(op, "x", x, in_features, f"like the weight of shape ({out_features}, {in_features})")
    _check_weight(op, packed, absmax, out_features * in_features, block_size, code, *nested, x.device)
    _check_factors(op, lora_a, lora_b, out_features, in_features)
    _check_bias(op, bias, out_features)
    _check_dropout(op, rng, dropout)
    check_device(op, x.device, bias=bias, lora_a=lora_a, lora_b=lora_b, rng=rng)
    w = _decode(packed, absmax, out_features * in_features, block_size, code, *nested).view(out_features, in_features)
    return _forward(x, _as(w, x.dtype), bias, lora_a, lora_b, rng, scaling, dropout)


def _reference_lora_grad_ab(
    grad_output: Tensor, x: Tensor, s: Tensor, lora_a: Tensor, lora_b: Tensor, rng: Tensor | None, *,
    scaling: float, dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "lora_grad_ab"
    check_float(op, grad_output=grad_output, x=x)
    for name, t in (("grad_output", grad_output), ("x", x)):
        if t.dim() == 0:
            raise ValueError(f"{op}: {name} has no dimensions; expected (..., features)")
    out_features, in_features = grad_output.shape[-1], x.shape[-1]
    rank = _check_factors(op, lora_a, lora_b, out_features, in_features)
    for name, t, last in (("grad_output", grad_output, out_features), ("s", s, rank)):
        _check_same_dtype(op, name, t, "x", x)
        if tuple(t.shape) != (*x.shape[:-1], last):
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected {(*x.shape[:-1], last)}")
    _check_dropout(op, rng, dropout)
    check_device(op, x.device, grad_output=grad_output, s=s, lora_a=lora_a, lora_b=lora_b, rng=rng)
    acc = _acc(x.dtype)
    with no_autocast(x.device):
        dy = _flat(grad_output).to(acc)
        ds = (scaling * (dy @ _as(lora_b, x.dtype))).to(x.dtype)
        kept = _kept(_flat(x).to(acc), rng, dropout)
        grad_a = (ds.to(acc).T @ kept).to(lora_a.dtype)
        grad_b = (dy.T @ _flat(s).to(acc)).to(lora_b.dtype)
    return ds.view(s.shape), grad_a, grad_b


def _reference_lora_grad_x(
    grad_output: Tensor, weight: Tensor, ds: Tensor, lora_a: Tensor, rng: Tensor | None, *, dropout: float = 0.0
) -> Tensor:  # fmt: skip
    op = "lora_grad_x"
    out_features, in_features = _check_dense(op, weight)
    _check_rows(op, "grad_output", grad_output, out_features, f"like weight of shape {tuple(weight.shape)}")
    _check_same_dtype(op, "weight", weight, "grad_output", grad_output)
    _check_update(op, grad_output, ds, lora_a, in_features)
    _check_dropout(op, rng, dropout)
    check_device(op, grad_output.device, weight=weight, ds=ds, lora_a=lora_a, rng=rng)
    return _grad_x(grad_output, weight.to(_acc(grad_output.dtype)), ds, lora_a, rng, dropout)


def _check_update(op: str, grad_output: Tensor, ds: Tensor, lora_a: Tensor, in_features: int) -> None:
    check_float(op, lora_a=lora_a)
    _check_same_dtype(op, "ds", ds, "grad_output", grad_output)
    _check_a(op, lora_a, in_features)
    if tuple(ds.shape) != (*grad_output.shape[:-1], lora_a.shape[0]):
        want = (*grad_output.shape[:-1], lora_a.shape[0])
        raise ValueError(f"{op}: ds has shape {tuple(ds.shape)}; expected {want}")


def _reference_nf4_lora_grad_x(
    grad_output: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None,
    absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    ds: Tensor, lora_a: Tensor, rng: Tensor | None, out_features: int, in_features: int, *,
    dropout: float = 0.0, block_size: int = 64, absmax_block_size: int = 256,
) -> Tensor:  # fmt: skip
    op, nested = "nf4_lora_grad_x", (absmax_scale, absmax_offset, absmax_block_size)
    check_sizes(op, out_features=out_features, in_features=in_features)
    shape = f"like the weight of shape ({out_features}, {in_features})"
    _check_rows(op, "grad_output", grad_output, out_features, shape)
    _check_weight(op, packed, absmax, out_features * in_features, block_size, code, *nested, grad_output.device)
    _check_update(op, grad_output, ds, lora_a, in_features)
    _check_dropout(op, rng, dropout)
    check_device(op, grad_output.device, ds=ds, lora_a=lora_a, rng=rng)
    w = _decode(packed, absmax, out_features * in_features, block_size, code, *nested).view(out_features, in_features)
    return _grad_x(grad_output, _as(w, grad_output.dtype), ds, lora_a, rng, dropout)


# ---- many adapters in one batch -------------------------------------------------------------------------------------


def _check_group(
    op: str, x: Tensor, lora_a: Tensor, lora_b: Tensor, adapter_ids: Tensor, scalings: Tensor, ranks: Tensor | None
) -> None:  # fmt: skip
    """Everything but the features of lora_b, which the caller knows."""
    check_float(op, x=x, lora_a=lora_a, lora_b=lora_b)
    in_features = x.shape[-1] if x.dim() else 0
    if lora_a.dim() != 3 or lora_a.shape[2] != in_features or lora_a.shape[1] < 1:
        raise ValueError(f"{op}: lora_a has shape {tuple(lora_a.shape)}; expected (adapters, rank, {in_features})")
    adapters, rank = lora_a.shape[:2]
    if lora_b.dim() != 3 or (lora_b.shape[0], lora_b.shape[2]) != (adapters, rank):
        raise ValueError(f"{op}: lora_b has shape {tuple(lora_b.shape)}; expected ({adapters}, out_features, {rank})")
    _check_ids(op, adapter_ids, ranks, tuple(x.shape[:-1]), adapters, rank, "x")
    if scalings.dtype != torch.float32 or tuple(scalings.shape) != (adapters,):
        raise ValueError(
            f"{op}: scalings has dtype {name_of(scalings.dtype)} and shape {tuple(scalings.shape)}; "
            f"expected float32 ({adapters},)"
        )
    check_device(
        op, x.device, lora_a=lora_a, lora_b=lora_b, adapter_ids=adapter_ids, scalings=scalings, ranks=ranks
    )  # fmt: skip


def _check_ids(
    op: str, adapter_ids: Tensor, ranks: Tensor | None, shape: tuple[int, ...], adapters: int, rank: int, rows_of: str
) -> None:  # fmt: skip
    if adapter_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: adapter_ids has dtype {name_of(adapter_ids.dtype)}; expected int64 or int32")
    if tuple(adapter_ids.shape) != shape:
        raise ValueError(
            f"{op}: adapter_ids has shape {tuple(adapter_ids.shape)}; expected {shape}, one for each row of {rows_of}"
        )
    if ranks is not None and (ranks.dtype not in (torch.int64, torch.int32) or tuple(ranks.shape) != (adapters,)):
        raise ValueError(
            f"{op}: ranks has dtype {name_of(ranks.dtype)} and shape {tuple(ranks.shape)}; expected int64 ({adapters},)"
        )
    if type(adapter_ids) is Tensor and adapter_ids.device.type == "cpu" and adapter_ids.numel():
        low, high = int(adapter_ids.min()), int(adapter_ids.max())
        if low < -1 or high >= adapters:
            bad = low if low < -1 else high
            raise IndexError(f"{op}: adapter_ids has an entry {bad}; expected -1 <= id < {adapters}")
    if type(ranks) is Tensor and ranks.device.type == "cpu" and ranks.numel():
        low, high = int(ranks.min()), int(ranks.max())
        if low < 0 or high > rank:
            bad = low if low < 0 else high
            raise ValueError(f"{op}: ranks has an entry {bad}; expected 0 <= rank <= {rank}")


def _selected(adapter_ids: Tensor, adapter: int, rank: int, ranks: Tensor | None) -> Tensor:
    """1 where a row belongs to the adapter and the column is below its rank, else 0: [rows, rank]."""
    chosen = (adapter_ids.reshape(-1, 1) == adapter).expand(-1, rank)
    if ranks is not None:
        chosen = chosen & (torch.arange(rank, device=chosen.device) < ranks[adapter])
    return chosen


def _down_grouped(
    x: Tensor, lora_a: Tensor, adapter_ids: Tensor, scalings: Tensor, ranks: Tensor | None
) -> Tensor:  # fmt: skip
    """s [rows, R]: each row's product with its adapter's lora_a [L, R, in], scaled and rounded to x's dtype."""
    rank = lora_a.shape[1]
    rows = _flat(x).to(_acc(x.dtype))
    s = rows.new_zeros(rows.shape[0], rank)
    for adapter in range(lora_a.shape[0]):
        update = scalings[adapter].to(s.dtype) * (rows @ _as(lora_a[adapter], x.dtype).T)
        s = torch.where(_selected(adapter_ids, adapter, rank, ranks), update, s)
    return s.to(x.dtype)


def _up_grouped(s: Tensor, lora_b: Tensor, adapter_ids: Tensor, ranks: Tensor | None) -> Tensor:
    """For each row of s [rows, R] the product with its adapter's lora_b [L, out, R], in the accumulator's type."""
    wide = s.to(_acc(s.dtype))
    y = wide.new_zeros(s.shape[0], lora_b.shape[1])
    for adapter in range(lora_b.shape[0]):
        chosen = _selected(adapter_ids, adapter, s.shape[1], ranks)
        # rows of another adapter and columns above the rank do not count, whatever stands in them
        b = _as(lora_b[adapter], s.dtype)
        if ranks is not None:
            b = torch.where(torch.arange(s.shape[1], device=s.device) < ranks[adapter], b, torch.zeros_like(b))
        update = torch.where(chosen, wide, torch.zeros_like(wide)) @ b.T
        y = torch.where(adapter_ids.reshape(-1, 1) == adapter, update, y)
    return y


def _reference_lora_linear_grouped(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, adapter_ids: Tensor,
    scalings: Tensor, ranks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "lora_linear_grouped"
    out_features, in_features = _check_dense(op, weight)
    _check_rows(op, "x", x, in_features, f"like weight of shape {tuple(weight.shape)}")
    _check_same_dtype(op, "weight", weight, "x", x)
    _check_group(op, x, lora_a, lora_b, adapter_ids, scalings, ranks)
    if lora_b.shape[1] != out_features:
        want = (lora_a.shape[0], out_features, lora_a.shape[1])
        raise ValueError(f"{op}: lora_b has shape {tuple(lora_b.shape)}; expected {want}")
    _check_bias(op, bias, out_features)
    check_device(op, x.device, weight=weight, bias=bias)
    acc = _acc(x.dtype)
    with no_autocast(x.device):
        s = _down_grouped(x, lora_a, adapter_ids, scalings, ranks)
        y = torch.nn.functional.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
        y = y + _up_grouped(s, lora_b, adapter_ids, ranks).view(y.shape)
    return y.to(x.dtype), s.view(*x.shape[:-1], lora_a.shape[1])


def _reference_lora_grouped_delta_(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, adapter_ids: Tensor, scalings: Tensor,
    ranks: Tensor | None, *, start: int = 0,
) -> None:  # fmt: skip
    op = "lora_grouped_delta_"
    _check_group(op, x, lora_a, lora_b, adapter_ids, scalings, ranks)
    _check_same_dtype(op, "y", y, "x", x)
    check_device(op, x.device, y=y)
    out_features = lora_b.shape[1]
    if y.dim() == 0 or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"{op}: y has shape {tuple(y.shape)}; expected the rows of x, {tuple(x.shape)}")
    if start < 0 or start + out_features > y.shape[-1]:
        raise ValueError(
            f"{op}: start is {start} for {out_features} columns of y, which has {y.shape[-1]}; "
            f"expected 0 <= start <= {y.shape[-1] - out_features}"
        )
    with no_autocast(x.device), torch.no_grad():  # in place, and without a gradient
        s = _down_grouped(x, lora_a, adapter_ids, scalings, ranks)
        part = y.narrow(-1, start, out_features)
        delta = _up_grouped(s, lora_b, adapter_ids, ranks).view(part.shape)
        # where, not + 0: rows without an adapter keep every bit
        part.copy_(torch.where(adapter_ids[..., None] >= 0, part.to(delta.dtype) + delta, part.to(delta.dtype)))


def _reference_lora_grouped_grad(
    grad_output: Tensor, x: Tensor, s: Tensor, lora_a: Tensor, lora_b: Tensor, adapter_ids: Tensor, scalings: Tensor,
    ranks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "lora_grouped_grad"
    _check_group(op, x, lora_a, lora_b, adapter_ids, scalings, ranks)
    adapters, rank = lora_a.shape[:2]
    for name, t, last in (("grad_output", grad_output, lora_b.shape[1]), ("s", s, rank)):
        _check_same_dtype(op, name, t, "x", x)
        if tuple(t.shape) != (*x.shape[:-1], last):
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected {(*x.shape[:-1], last)}")
    check_device(op, x.device, grad_output=grad_output, s=s)
    acc = _acc(x.dtype)
    with no_autocast(x.device):
        dy, rows = _flat(grad_output).to(acc), _flat(x).to(acc)
        ds = _down_grouped(grad_output, lora_b.transpose(1, 2), adapter_ids, scalings, ranks)
        zero = torch.zeros((), dtype=acc, device=x.device)
        grad_a, grad_b = [], []
        for adapter in range(adapters):
            chosen = _selected(adapter_ids, adapter, rank, ranks)
            mine = adapter_ids.reshape(-1, 1) == adapter  # NaN in another adapter's rows is not this one's
            grad_a.append(torch.where(chosen, ds.to(acc), zero).T @ torch.where(mine, rows, zero))
            grad_b.append(torch.where(mine, dy, zero).T @ torch.where(chosen, _flat(s).to(acc), zero))
    a = torch.stack(grad_a) if adapters else torch.zeros_like(lora_a)
    b = torch.stack(grad_b) if adapters else torch.zeros_like(lora_b)
    return ds.view(s.shape), a.to(lora_a.dtype), b.to(lora_b.dtype)


# ---- norms and merging ----------------------------------------------------------------------------------------------


def _norm(w: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Row norms of w + scaling B A. The sum is never formed: |w|^2 + 2 s <w A^T, B> + s^2 <B A A^T, B>."""
    with no_autocast(w.device):
        a, b = lora_a.to(w.dtype), lora_b.to(w.dtype)
        square = (w * w).sum(1) + (2 * scaling) * ((w @ a.T) * b).sum(1) + scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
        return square.clamp(min=0).sqrt()


def _reference_dora_weight_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scaling: float) -> Tensor:
    op = "dora_weight_norm"
    _check_factors(op, lora_a, lora_b, *_check_dense(op, weight))
    check_device(op, weight.device, lora_a=lora_a, lora_b=lora_b)
    return _norm(weight.to(_acc(weight.dtype)), lora_a, lora_b, scaling)


def _reference_nf4_dora_weight_norm(
    packed: Tensor, absmax: Tensor, code: Tensor | None, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    lora_a: Tensor, lora_b: Tensor, out_features: int, in_features: int, *,
    scaling: float, block_size: int = 64, absmax_block_size: int = 256,
) -> Tensor:  # fmt: skip
    op, nested = "nf4_dora_weight_norm", (absmax_scale, absmax_offset, absmax_block_size)
    check_sizes(op, out_features=out_features, in_features=in_features)
    _check_weight(op, packed, absmax, out_features * in_features, block_size, code, *nested, packed.device)
    _check_factors(op, lora_a, lora_b, out_features, in_features)
    check_device(op, packed.device, lora_a=lora_a, lora_b=lora_b)
    w = _decode(packed, absmax, out_features * in_features, block_size, code, *nested).view(out_features, in_features)
    return _norm(w, lora_a, lora_b, scaling)


def _reference_lora_merge_(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scaling: float) -> None:
    op = "lora_merge_"
    _check_factors(op, lora_a, lora_b, *_check_dense(op, weight))
    check_device(op, weight.device, lora_a=lora_a, lora_b=lora_b)
    acc = _acc(weight.dtype)
    with no_autocast(weight.device), torch.no_grad():  # in place, and without a gradient
        weight.copy_(weight.to(acc) + scaling * (lora_b.to(acc) @ lora_a.to(acc)))


# ---- schemas and gradients ------------------------------------------------------------------------------------------

_WEIGHT = "Tensor packed, Tensor absmax, Tensor? code, Tensor? absmax_scale, Tensor? absmax_offset"
_BLOCKS = "int block_size=64, int absmax_block_size=256"
_GROUP = "Tensor lora_a, Tensor lora_b, Tensor adapter_ids, Tensor scalings, Tensor? ranks"


def _setup(ctx: Any, x: Tensor, s: Tensor, base: tuple[Any, ...], bias: Tensor | None, *factors: Any) -> None:
    """Saved: x, s, the frozen weight and the factors as they came. s is not to be differentiated itself."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(s)
    ctx.save_for_backward(x, s, *factors, *base)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _adapter_gradients(
    ctx: Any, saved: Any, grad_output: Tensor, a: int, needs_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(ds, dA, dB), each None where nothing needs it; `a` is the position of lora_a among the inputs."""
    x, s, lora_a, lora_b, rng, *_ = saved
    needs_a, needs_b = ctx.needs_input_grad[a : a + 2]
    if not (needs_x or needs_a or needs_b):
        return None, None, None
    ds, grad_a, grad_b = call(
        "lora_grad_ab", grad_output, x, s, lora_a, lora_b, rng, scaling=ctx.scaling, dropout=ctx.dropout
    )
    return ds, grad_a if needs_a else None, grad_b if needs_b else None


def _grad_bias(ctx: Any, grad_output: Tensor, needed: bool) -> Tensor | None:
    if ctx.bias_dtype is None or not needed:
        return None
    rows = _flat(grad_output)
    return rows.sum(0, dtype=_acc(rows.dtype)).to(ctx.bias_dtype)


def _grad_weight(grad_output: Tensor, x: Tensor) -> Tensor:
    """Of a base that is not frozen after all: the ordinary product."""
    with no_autocast(x.device):
        return _flat(grad_output).T @ _flat(x)


def _lora_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, lora_a, lora_b, rng, scaling, dropout = inputs
    _setup(ctx, x, output[1], (weight,), bias, lora_a, lora_b, rng)
    ctx.scaling, ctx.dropout = scaling, dropout


def _lora_linear_backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad_output is None:
        return (None,) * 8
    x, _s, lora_a, _b, rng, weight = saved = ctx.saved_tensors
    needs = ctx.needs_input_grad
    ds, grad_a, grad_b = _adapter_gradients(ctx, saved, grad_output, 3, needs[0])
    grad_x = None
    if needs[0]:
        grad_x = call("lora_grad_x", grad_output, weight, ds, lora_a, rng, dropout=ctx.dropout)
    grad_weight = _grad_weight(grad_output, x) if needs[1] else None
    return grad_x, grad_weight, _grad_bias(ctx, grad_output, needs[2]), grad_a, grad_b, None, None, None


def _nf4_lora_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weight, bias, lora_a, lora_b, rng, out_features, in_features, scaling, dropout, block, absmax_block = inputs
    _setup(ctx, x, output[1], tuple(weight), bias, lora_a, lora_b, rng)
    ctx.scaling, ctx.dropout, ctx.sizes = scaling, dropout, (out_features, in_features)
    ctx.blocks = {"block_size": block, "absmax_block_size": absmax_block}


def _nf4_lora_linear_backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    if any(needs[1:6]):
        raise RuntimeError("nf4_lora_linear is not differentiable in its weight: 4-bit weights are frozen")
    if grad_output is None:
        return (None,) * 16
    _x, _s, lora_a, _b, rng, *weight = saved = ctx.saved_tensors
    ds, grad_a, grad_b = _adapter_gradients(ctx, saved, grad_output, 7, needs[0])
    grad_x = None
    if needs[0]:
        grad_x = call(
            "nf4_lora_grad_x", grad_output, *weight, ds, lora_a, rng, *ctx.sizes, dropout=ctx.dropout, **ctx.blocks
        )
    grad_bias = _grad_bias(ctx, grad_output, needs[6])
    return (grad_x, *(None,) * 5, grad_bias, grad_a, grad_b, *(None,) * 7)


def _grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, *group = inputs
    _setup(ctx, x, output[1], (weight,), bias, *group)


def _grouped_backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    if needs[6]:
        raise RuntimeError("lora_linear_grouped is not differentiable in its scalings; expected them detached")
    if grad_output is None:
        return (None,) * 8
    x, s, lora_a, lora_b, adapter_ids, scalings, ranks, weight = ctx.saved_tensors
    grad_x = grad_a = grad_b = None
    if needs[0] or needs[3] or needs[4]:
        ds, grad_a, grad_b = call(
            "lora_grouped_grad", grad_output, x, s, lora_a, lora_b, adapter_ids, scalings, ranks
        )  # fmt: skip
        if needs[0]:  # dy W + ds A: the same op again, with both weights transposed and nothing left to scale
            grad_x = call("lora_grouped_grad_x", grad_output, weight, ds, lora_a, adapter_ids, ranks)
    grad_weight = _grad_weight(grad_output, x) if needs[1] else None
    grad_bias = _grad_bias(ctx, grad_output, needs[2])
    return (
        grad_x, grad_weight, grad_bias, grad_a if needs[3] else None, grad_b if needs[4] else None, None, None, None,
    )  # fmt: skip


def _check_grouped_grad_x(
    grad_output: Tensor, weight: Tensor, ds: Tensor, lora_a: Tensor, adapter_ids: Tensor, ranks: Tensor | None
) -> None:  # fmt: skip
    op = "lora_grouped_grad_x"
    out_features, in_features = _check_dense(op, weight)
    _check_rows(op, "grad_output", grad_output, out_features, f"like weight of shape {tuple(weight.shape)}")
    _check_same_dtype(op, "weight", weight, "grad_output", grad_output)
    _check_same_dtype(op, "ds", ds, "grad_output", grad_output)
    check_float(op, lora_a=lora_a)
    if lora_a.dim() != 3 or lora_a.shape[2] != in_features or lora_a.shape[1] < 1:
        raise ValueError(f"{op}: lora_a has shape {tuple(lora_a.shape)}; expected (adapters, rank, {in_features})")
    want = (*grad_output.shape[:-1], lora_a.shape[1])
    if tuple(ds.shape) != want:
        raise ValueError(f"{op}: ds has shape {tuple(ds.shape)}; expected {want}")
    _check_ids(op, adapter_ids, ranks, tuple(want[:-1]), lora_a.shape[0], lora_a.shape[1], "grad_output")
    check_device(
        op, grad_output.device, weight=weight, ds=ds, lora_a=lora_a, adapter_ids=adapter_ids, ranks=ranks
    )  # fmt: skip


def _reference_lora_grouped_grad_x(
    grad_output: Tensor, weight: Tensor, ds: Tensor, lora_a: Tensor, adapter_ids: Tensor, ranks: Tensor | None
) -> Tensor:  # fmt: skip
    _check_grouped_grad_x(grad_output, weight, ds, lora_a, adapter_ids, ranks)
    acc = _acc(grad_output.dtype)
    with no_autocast(grad_output.device):
        update = _up_grouped(_flat(ds), lora_a.transpose(1, 2), adapter_ids, ranks)
        base = grad_output.to(acc) @ weight.to(acc)
        return (base + update.view(base.shape)).to(grad_output.dtype)


def _refusal(op: str, why: str) -> dict[str, Any]:
    return dict(zip(("setup_context", "backward"), not_differentiable(op, why), strict=True))


_TWICE = "its gradient has no gradient of its own here; expected one differentiation"
_ONCE = {
    op: _refusal(op, _TWICE)
    for op in ("lora_grad_ab", "lora_grad_x", "nf4_lora_grad_x", "lora_grouped_grad", "lora_grouped_grad_x")
}
_CONSTANT = {
    op: _refusal(op, "DoRA takes the norm as a constant; detach the factors")
    for op in ("dora_weight_norm", "nf4_dora_weight_norm")
}

define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? rng, *, float scaling, "
    "float dropout=0.0) -> (Tensor, Tensor)",
    _reference_lora_linear,
    setup_context=_lora_linear_setup,
    backward=_lora_linear_backward,
    vmap=batch_of_rows("lora_linear", unless=5),
    triton="lora:lora_linear",
    gradient="yes",
)
define(
    f"nf4_lora_linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? rng, int out_features, "
    f"int in_features, *, float scaling, float dropout=0.0, {_BLOCKS}) -> (Tensor, Tensor)",
    _reference_nf4_lora_linear,
    setup_context=_nf4_lora_linear_setup,
    backward=_nf4_lora_linear_backward,
    vmap=batch_of_rows("nf4_lora_linear", unless=9),
    triton="lora:nf4_lora_linear",
    gradient="yes",
)
define(
    "lora_grad_ab(Tensor grad_output, Tensor x, Tensor s, Tensor lora_a, Tensor lora_b, Tensor? rng, *, "
    "float scaling, float dropout=0.0) -> (Tensor, Tensor, Tensor)",
    _reference_lora_grad_ab,
    **_ONCE["lora_grad_ab"],
    vmap=batch_of_rows("lora_grad_ab", rows=()),
    triton="lora:lora_grad_ab",
)
define(
    "lora_grad_x(Tensor grad_output, Tensor weight, Tensor ds, Tensor lora_a, Tensor? rng, *, float dropout=0.0) "
    "-> Tensor",
    _reference_lora_grad_x,
    **_ONCE["lora_grad_x"],
    vmap=batch_of_rows("lora_grad_x", rows=(0, 2), unless=4),
    triton="lora:lora_grad_x",
)
define(
    f"nf4_lora_grad_x(Tensor grad_output, {_WEIGHT}, Tensor ds, Tensor lora_a, Tensor? rng, int out_features, "
    f"int in_features, *, float dropout=0.0, {_BLOCKS}) -> Tensor",
    _reference_nf4_lora_grad_x,
    **_ONCE["nf4_lora_grad_x"],
    vmap=batch_of_rows("nf4_lora_grad_x", rows=(0, 6), unless=8),
    triton="lora:nf4_lora_grad_x",
)
define(
    "lora_dropout_mask(Tensor rng, SymInt rows, SymInt cols, float p) -> Tensor",
    _reference_dropout_mask,
    triton="lora:lora_dropout_mask",
    dtypes=("bool",),
    gradient="none",
)
define(
    f"lora_linear_grouped(Tensor x, Tensor weight, Tensor? bias, {_GROUP}) -> (Tensor, Tensor)",
    _reference_lora_linear_grouped,
    setup_context=_grouped_setup,
    backward=_grouped_backward,
    vmap=batch_of_rows("lora_linear_grouped", rows=(0, 5)),
    triton="lora:lora_linear_grouped",
    gradient="yes",
)
define(
    f"lora_grouped_grad(Tensor grad_output, Tensor x, Tensor s, {_GROUP}) -> (Tensor, Tensor, Tensor)",
    _reference_lora_grouped_grad,
    **_ONCE["lora_grouped_grad"],
    vmap=batch_of_rows("lora_grouped_grad", rows=()),
    triton="lora:lora_grouped_grad",
)
define(
    "lora_grouped_grad_x(Tensor grad_output, Tensor weight, Tensor ds, Tensor lora_a, Tensor adapter_ids, "
    "Tensor? ranks) -> Tensor",
    _reference_lora_grouped_grad_x,
    **_ONCE["lora_grouped_grad_x"],
    vmap=batch_of_rows("lora_grouped_grad_x", rows=(0, 2, 4)),
    triton="lora:lora_grouped_grad_x",
)
define(
    f"lora_grouped_delta_(Tensor(a!) y, Tensor x, {_GROUP}, *, int start=0) -> ()",
    _reference_lora_grouped_delta_,
    triton="lora:lora_grouped_delta_",
    gradient="none",
)
define(
    "dora_weight_norm(Tensor weight, Tensor lora_a, Tensor lora_b, *, float scaling) -> Tensor",
    _reference_dora_weight_norm,
    **_CONSTANT["dora_weight_norm"],
    vmap=batch_of_rows("dora_weight_norm", rows=()),
    triton="lora:dora_weight_norm",
)
define(
    f"nf4_dora_weight_norm({_WEIGHT}, Tensor lora_a, Tensor lora_b, int out_features, int in_features, *, "
    f"float scaling, {_BLOCKS}) -> Tensor",
    _reference_nf4_dora_weight_norm,
    **_CONSTANT["nf4_dora_weight_norm"],
    vmap=batch_of_rows("nf4_dora_weight_norm", rows=()),
    triton="lora:nf4_dora_weight_norm",
    dtypes=("float32",),
)
define(
    "lora_merge_(Tensor(a!) weight, Tensor lora_a, Tensor lora_b, *, float scaling) -> ()",
    _reference_lora_merge_,
    triton="lora:lora_merge_",
    gradient="none",
)


# ---- public functions -----------------------------------------------------------------------------------------------


def _autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The arguments in autocast's dtype where it is on, as `torch.nn.functional.linear` would take them."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return (x, *tensors)
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Tensor | None) -> Tensor | None:
        lower = t is not None and t.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return t.to(dtype) if t is not None and lower else t

    return tuple(cast(t) for t in (x, *tensors))


def lora_linear(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float, *,
    dropout: float = 0.0, rng: Tensor | None = None,
) -> Tensor:  # fmt: skip
    r"""A frozen linear layer and its LoRA update: :math:`y = x W^T + b + \gamma \, \mathrm{drop}(x) A^T B^T`.

    Parameters
    ----------
    x : Tensor
        ``[..., in_features]``, float32, bfloat16, float16 or float64.
    weight : Tensor or NF4Weight
        ``[out_features, in_features]``: dense, of x's dtype, or in 4 bits (then never made dense).
    bias : Tensor or None
        ``[out_features]``, a float dtype.
    lora_a, lora_b : Tensor
        ``[rank, in_features]`` and ``[out_features, rank]``, any float dtype; they count with x's precision.
    scaling : float
        ``lora_alpha / rank``, or ``lora_alpha / sqrt(rank)`` for rsLoRA.
    dropout : float
        Probability, in [0, 1), with which an element of the adapter's input is zeroed; the rest is divided by
        ``1 - dropout``. The frozen layer's input is left alone. The mask resolves the probability to multiples of
        2**-16, so that the expectation is off by at most ``2**-17 / (1 - dropout)``, relatively.
    rng : Tensor, optional
        int64 ``[2]``, seed and offset: the mask is a function of them. By default drawn from torch's generator where
        ``dropout > 0``; nothing is drawn at 0.

    Returns
    -------
    Tensor
        ``[..., out_features]``, of x's dtype; under autocast of autocast's dtype.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If an argument has another dtype or size than stated.

    Notes
    -----
    Differentiable once, in x, bias, lora_a, lora_b, and a dense weight (which is usually frozen); the gradients of the
    factors are summed in float32 and have the factors' dtypes. Saved for backward: x and ``[rows, rank]``. Two calls
    with the same `rng` drop the same elements. With ``lora_b = 0`` the result is that of the base product bit for bit.

    References
    ----------
    Hu et al., LoRA, ICLR 2022, arXiv:2106.09685. Kalajdzievski, rsLoRA, 2023, arXiv:2312.03732. Dettmers et al.,
    QLoRA, NeurIPS 2023, arXiv:2305.14314.

    Examples
    --------
    >>> import torch, tlkernels
    >>> x, w = torch.randn(3, 64), torch.randn(128, 64)
    >>> a, b = torch.randn(8, 64), torch.zeros(128, 8)
    >>> tlkernels.ops.lora_linear(x, w, None, a, b, scaling=2.0).shape
    torch.Size([3, 128])
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"lora_linear: dropout is {dropout}; expected 0 <= dropout < 1")
    if dropout == 0.0:
        rng = None
    elif rng is None:
        rng = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=x.device)
    options = {"scaling": float(scaling), "dropout": float(dropout)}
    if isinstance(weight, NF4Weight):
        sizes = _matrix("lora_linear", weight)
        x, bias = _autocast(x, bias)
        return call(
            "nf4_lora_linear", x, *_tensors(weight), bias, lora_a, lora_b, rng, *sizes, **options, **_blocks_of(weight)
        )[0]
    x, weight, bias = _autocast(x, weight, bias)
    return call("lora_linear", x, weight, bias, lora_a, lora_b, rng, **options)[0]


def lora_dropout_mask(rng: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """Which elements of a ``[rows, cols]`` input `lora_linear` keeps, for this `rng`.

    Parameters
    ----------
    rng : Tensor
        int64 ``[2]``: seed and offset.
    rows, cols : int
        Size of the input with its leading dimensions flattened; ``rows < 2**32``.
    p : float
        Dropout probability, in [0, 1).

    Returns
    -------
    Tensor
        bool ``[rows, cols]``, True where the element is kept. The same on every backend.

    Raises
    ------
    ValueError, RuntimeError
        If an argument has another dtype or size than stated.

    References
    ----------
    Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
    """
    return call("lora_dropout_mask", rng, rows, cols, p)


def lora_linear_grouped(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, adapter_ids: Tensor,
    scalings: Tensor, *, ranks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    r"""A frozen linear layer with an adapter of its own for each row: :math:`y_i = W x_i + b + \gamma_l B_l A_l x_i`.

    Parameters
    ----------
    x : Tensor
        ``[..., in_features]``.
    weight : Tensor or NF4Weight
        ``[out_features, in_features]``: dense, of x's dtype, or in 4 bits (then inference only: no gradient).
    bias : Tensor or None
        ``[out_features]``.
    lora_a, lora_b : Tensor
        ``[adapters, rank, in_features]`` and ``[adapters, out_features, rank]``: stacked, padded to the largest rank.
    adapter_ids : Tensor
        int64 or int32, ``x.shape[:-1]``: the adapter of each row, in any order; -1 is none.
    scalings : Tensor
        float32 ``[adapters]``.
    ranks : Tensor, optional
        int64 or int32 ``[adapters]``: the rank of each; what stands above it in the factors is not read.

    Returns
    -------
    Tensor
        ``[..., out_features]``, of x's dtype.

    Raises
    ------
    IndexError, TypeError, ValueError, RuntimeError
        If an id is out of range (checked on the CPU only; a GPU cannot raise and takes such a row for one without an
        adapter), or an argument has another dtype or size than stated.

    Notes
    -----
    Differentiable once, in x, bias, lora_a, lora_b and a dense weight.

    References
    ----------
    Chen et al., Punica: Multi-Tenant LoRA Serving, MLSys 2024, arXiv:2310.18547. Sheng et al., S-LoRA, MLSys 2024,
    arXiv:2311.03285.
    """
    if isinstance(weight, NF4Weight):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, lora_a, lora_b)):
            raise RuntimeError(
                "lora_linear_grouped: with a 4-bit weight it has no gradient; call it under torch.no_grad(), or train "
                "with lora_linear"
            )
        if lora_b.dim() == 3 and lora_b.shape[1] != weight.shape[0]:
            want = (lora_b.shape[0], weight.shape[0], lora_b.shape[2])
            raise ValueError(f"lora_linear_grouped: lora_b has shape {tuple(lora_b.shape)}; expected {want}")
        x, bias = _autocast(x, bias)
        y = nf4_linear(x, weight, bias)
        return lora_grouped_delta_(y, x, lora_a, lora_b, adapter_ids, scalings, ranks=ranks)
    x, weight, bias = _autocast(x, weight, bias)
    return call("lora_linear_grouped", x, weight, bias, lora_a, lora_b, adapter_ids, scalings, ranks)[0]


def lora_grouped_delta_(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, adapter_ids: Tensor, scalings: Tensor, *,
    ranks: Tensor | None = None, start: int = 0,
) -> Tensor:  # fmt: skip
    r"""Add each row's update :math:`\gamma_l B_l A_l x_i` to the columns of y from `start` on: a packed qkv projection.

    Parameters
    ----------
    y : Tensor
        ``[..., columns]``, of x's dtype; changed in place.
    x, lora_a, lora_b, adapter_ids, scalings, ranks
        As for `lora_linear_grouped`.
    start : int
        First column; ``start + lora_b.shape[1] <= columns``.

    Returns
    -------
    Tensor
        y.

    Raises
    ------
    IndexError, TypeError, ValueError, RuntimeError
        As `lora_linear_grouped`; also if a gradient would be needed: this form is for inference.

    References
    ----------
    Chen et al., Punica, MLSys 2024, arXiv:2310.18547.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, lora_a, lora_b)):
        raise RuntimeError(
            "lora_grouped_delta_: it works in place and has no gradient; call it under torch.no_grad(), or use "
            "lora_linear_grouped"
        )
    call("lora_grouped_delta_", y, x, lora_a, lora_b, adapter_ids, scalings, ranks, start=start)
    changed(y)
    return y


def dora_weight_norm(weight: Tensor | NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    r"""Norms of the rows of :math:`W + \gamma B A`, which is never formed.

    Parameters
    ----------
    weight : Tensor or NF4Weight
        ``[out_features, in_features]``.
    lora_a, lora_b : Tensor
        ``[rank, in_features]`` and ``[out_features, rank]``, any float dtype.
    scaling : float

    Returns
    -------
    Tensor
        ``[out_features]``, float32 (float64 for float64): :math:`\sqrt{|W|^2 + 2\gamma \langle W A^T, B\rangle +
        \gamma^2 \langle B A A^T, B\rangle}`, row by row. A constant: no gradient flows through it (DoRA, section 4.3).

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If an argument has another dtype or size than stated.

    References
    ----------
    Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, arXiv:2402.09353.
    """
    lora_a, lora_b = lora_a.detach(), lora_b.detach()
    if isinstance(weight, NF4Weight):
        sizes = _matrix("dora_weight_norm", weight)
        return call(
            "nf4_dora_weight_norm", *_tensors(weight), lora_a, lora_b, *sizes, scaling=float(scaling),
            **_blocks_of(weight),
        )  # fmt: skip
    return call("dora_weight_norm", weight.detach(), lora_a, lora_b, scaling=float(scaling))


def lora_merge_(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    r"""Add :math:`\gamma B A` to a dense weight in place, summed in float32 and rounded once. -scaling takes it back.

    Parameters
    ----------
    weight : Tensor
        ``[out_features, in_features]``; changed in place, also where it requires a gradient.
    lora_a, lora_b : Tensor
        ``[rank, in_features]`` and ``[out_features, rank]``, any float dtype, with their own precision.
    scaling : float

    Returns
    -------
    Tensor
        weight.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If an argument has another dtype or size than stated; the weight is then as it was.

    References
    ----------
    Hu et al., LoRA, ICLR 2022, arXiv:2106.09685, section 4.1.
    """
    with torch.no_grad():
        call("lora_merge_", weight.detach(), lora_a.detach(), lora_b.detach(), scaling=float(scaling))
    changed(weight)
    return weight


def lora_merge(weight: NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float) -> tuple[NF4Weight, float]:
    r"""A 4-bit weight with :math:`\gamma B A` merged: decoded, added in float32, quantized again.

    Parameters
    ----------
    weight : NF4Weight
        Of shape ``(out_features, in_features)``; it is left alone.
    lora_a, lora_b : Tensor
        ``[rank, in_features]`` and ``[out_features, rank]``.
    scaling : float

    Returns
    -------
    merged : NF4Weight
        With the same table, block size and kind of scales.
    error : float
        Root mean square of what quantizing the sum lost, relative to that of the sum. Unlike a dense merge, this one
        cannot be taken back.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If an argument has another dtype or size than stated.

    References
    ----------
    Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314.
    """
    _matrix("lora_merge", weight)
    with torch.no_grad():
        dense = lora_merge_(nf4_dequantize(weight, dtype=torch.float32), lora_a, lora_b, scaling)
        merged = nf4_quantize(
            dense, block_size=weight.block_size, code=weight.code, double_quant=weight.absmax.dtype == torch.uint8
        )._replace(dtype=weight.dtype)
        lost = nf4_dequantize(merged, dtype=torch.float32).sub_(dense).norm()
        return merged, float(lost / dense.norm().clamp(min=torch.finfo(torch.float32).tiny))
