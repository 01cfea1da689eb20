r"""Fisher information and parameter importance: squares of per-sample gradients, and sweeps over parameter lists.

The diagonal of the empirical Fisher is a mean over samples of *squared per-sample* gradients. A sample with several
tokens has one gradient, the sum over its tokens, so for a linear layer

.. math:: F_{oi} = \sum_n \Big(\sum_t g_{nto} a_{nti}\Big)^2 ,

the square after the sum. Squares of tokens one by one leave out the products of different tokens; the square of a
batch's mean gradient is about the batch size too small. Here the inner sum is a product of matrices whose result is
squared and added while it is in registers and cache: nothing of size samples x parameters is written.

Every function adds to *accumulators* that the caller made (float32; float64 for float64 data), in place, and none is
differentiable but `quad_penalty`. Kunstner et al., Limitations of the empirical Fisher approximation, NeurIPS 2019,
arXiv:1905.12558.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tlkernels.ops._common import changed, check_device, check_float, name_of, no_autocast
from tlkernels.ops._registry import call, define, not_differentiable

__all__ = [
    "diag_fisher_channel_norm_",
    "diag_fisher_conv1d_",
    "diag_fisher_conv2d_",
    "diag_fisher_embedding_",
    "diag_fisher_linear_",
    "diag_fisher_lora_",
    "diag_fisher_norm_",
    "ekfac_diag_linear_",
    "importance_accum_",
    "kfac_factors_linear_",
    "per_sample_sqnorm_linear",
    "quad_penalty",
    "quad_penalty_grad_",
    "si_accum_",
]

NORMS = ("layer", "rms", "none")
APPROXIMATIONS = ("expand", "reduce")
MODES = ("sq", "abs")


# ---- argument checks: the same sentences as the compiled bindings --------------------------------------------------


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_accumulator(op: str, name: str, t: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if t is None:
        return
    want = _accumulator(like.dtype)
    if t.dtype != want:
        raise TypeError(
            f"{op}: {name} has dtype {name_of(t.dtype)}; expected {name_of(want)}: sums of many small squares"
        )
    if tuple(t.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected {shape}")
    check_device(op, like.device, **{name: t})


def _check_offsets(op: str, offsets: Sequence[int], tokens: int) -> None:
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != tokens:
        shown = list(offsets[:8])
        raise ValueError(f"{op}: sample_offsets is {shown}; expected bounds from 0 to {tokens}, the tokens")
    for a, b in itertools.pairwise(offsets):
        if b < a:
            raise ValueError(f"{op}: sample_offsets goes from {a} to {b}; expected ascending bounds")


def _check_tokens(op: str, x_name: str, x: Tensor, grad_out: Tensor, offsets: Sequence[int]) -> int:
    """Of x and grad_out, [N, T, width], or [tokens, width] where `offsets` are given; returns the samples."""
    check_float(op, grad_out=grad_out)
    ragged = len(offsets) > 0
    want = "(tokens, features) with sample_offsets" if ragged else "(samples, tokens, features)"
    for name, t in ((x_name, x), ("grad_out", grad_out)):
        if t.dim() != (2 if ragged else 3):
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected {want}")
    if grad_out.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{op}: grad_out has shape {tuple(grad_out.shape)}; expected {tuple(x.shape[:-1])} before the last, "
            f"like {x_name}"
        )
    check_device(op, grad_out.device, **{x_name: x})
    if not ragged:
        return x.shape[0]
    _check_offsets(op, offsets, x.shape[0])
    return len(offsets) - 1


def _check_same_dtype(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    if t.dtype != like.dtype:
        raise TypeError(f"{op}: {name} has dtype {name_of(t.dtype)}; expected {name_of(like.dtype)}, like {like_name}")


def _check_weight(op: str, sample_weight: Tensor | None, samples: int, like: Tensor) -> None:
    if sample_weight is None:
        return
    want = _accumulator(like.dtype)
    if sample_weight.dtype != want or tuple(sample_weight.shape) != (samples,):
        raise ValueError(
            f"{op}: sample_weight has dtype {name_of(sample_weight.dtype)} and shape {tuple(sample_weight.shape)}; "
            f"expected {name_of(want)} ({samples},)"
        )
    check_device(op, like.device, sample_weight=sample_weight)


def _check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def _samples(x: Tensor, offsets: Sequence[int]) -> Iterator[Tensor]:
    if len(offsets) == 0:
        yield from x.unbind(0)
    else:
        for a, b in itertools.pairwise(offsets):
            yield x[a:b]


def _weights(scale: float, sample_weight: Tensor | None, samples: int) -> Iterator[float | Tensor]:
    for n in range(samples):
        yield scale if sample_weight is None else scale * sample_weight[n]


# ---- references -----------------------------------------------------------------------------------------------------


def _reference_linear(
    f_w: Tensor | None, f_b: Tensor | None, act: Tensor, grad_out: Tensor, *, sample_offsets: Sequence[int] = (),
    scale: float = 1.0, sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    op = "diag_fisher_linear_"
    check_float(op, act=act)
    _check_same_dtype(op, "grad_out", grad_out, "act", act)
    samples = _check_tokens(op, "act", act, grad_out, sample_offsets)
    _check_accumulator(op, "f_w", f_w, (grad_out.shape[-1], act.shape[-1]), act)
    _check_accumulator(op, "f_b", f_b, (grad_out.shape[-1],), act)
    _check_weight(op, sample_weight, samples, act)
    acc = _accumulator(act.dtype)
    with no_autocast(act.device), torch.no_grad():
        rows = zip(_samples(act, sample_offsets), _samples(grad_out, sample_offsets), strict=True)
        for (a, g), w in zip(rows, _weights(scale, sample_weight, samples), strict=True):
            g = g.to(acc)
            if f_w is not None:
                f_w += w * (g.T @ a.to(acc)).square()
            if f_b is not None:
                f_b += w * g.sum(0).square()


def _reference_conv2d(
    f_w: Tensor, f_b: Tensor | None, act: Tensor, grad_out: Tensor, *, stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1), groups: int = 1, scale: float = 1.0,
    sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    op = "diag_fisher_conv2d_"
    check_float(op, act=act)
    _check_same_dtype(op, "grad_out", grad_out, "act", act)
    for name, t in (("act", act), ("grad_out", grad_out), ("f_w", f_w)):
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected four dimensions")
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{op}: {name} is {list(pair)}; expected two numbers >= {least}")
    samples, channels, height, width = act.shape
    outs, kernel_size = grad_out.shape[1], tuple(f_w.shape[2:])
    if groups < 1 or channels % groups or outs % groups:
        raise ValueError(
            f"{op}: groups is {groups}; expected a divisor of the channels, {channels} of act and {outs} of grad_out"
        )
    size = [
        (extent + 2 * p - d * (k - 1) - 1) // s + 1
        for extent, p, d, k, s in zip((height, width), padding, dilation, kernel_size, stride, strict=True)
    ]
    if tuple(grad_out.shape) != (samples, outs, *size) or min(size) < 1:
        raise ValueError(
            f"{op}: grad_out has shape {tuple(grad_out.shape)}; expected {(samples, outs, *size)}, the result of this "
            f"convolution of act"
        )
    check_device(op, act.device, grad_out=grad_out)
    _check_accumulator(op, "f_w", f_w, (outs, channels // groups, *kernel_size), act)
    _check_accumulator(op, "f_b", f_b, (outs,), act)
    _check_weight(op, sample_weight, samples, act)
    acc = _accumulator(act.dtype)
    with no_autocast(act.device), torch.no_grad():
        for n, w in enumerate(_weights(scale, sample_weight, samples)):
            g = grad_out[n].flatten(1).to(acc)
            if f_b is not None:
                f_b += w * g.sum(1).square()
            patches = functional.unfold(
                act[n : n + 1].to(acc), kernel_size, dilation=tuple(dilation), padding=tuple(padding),
                stride=tuple(stride),
            )  # [1, channels * kernel, positions]  # fmt: skip
            per = patches.reshape(groups, -1, patches.shape[-1])
            f_w += w * (g.reshape(groups, -1, g.shape[-1]) @ per.mT).reshape(f_w.shape).square()


def _reference_embedding(
    f_w: Tensor, indices: Tensor, grad_out: Tensor, *, padding_idx: int = -1, sample_offsets: Sequence[int] = (),
    scale: float = 1.0, sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    op = "diag_fisher_embedding_"
    check_float(op, grad_out=grad_out)
    if indices.dtype != torch.int64:
        raise TypeError(f"{op}: indices has dtype {name_of(indices.dtype)}; expected int64")
    ragged = len(sample_offsets) > 0
    if indices.dim() != (1 if ragged else 2):
        want = "(tokens,) with sample_offsets" if ragged else "(samples, tokens)"
        raise ValueError(f"{op}: indices has shape {tuple(indices.shape)}; expected {want}")
    samples = _check_tokens(op, "indices", indices[..., None], grad_out, sample_offsets)
    if f_w.dim() != 2:
        raise ValueError(f"{op}: f_w has shape {tuple(f_w.shape)}; expected (embeddings, features)")
    _check_accumulator(op, "f_w", f_w, (f_w.shape[0], grad_out.shape[-1]), grad_out)
    _check_weight(op, sample_weight, samples, grad_out)
    if padding_idx < -1 or padding_idx >= f_w.shape[0]:
        raise ValueError(f"{op}: padding_idx is {padding_idx}; expected -1 (none) or an index below {f_w.shape[0]}")
    if indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= f_w.shape[0]:
            raise IndexError(
                f"{op}: indices holds {low if low < 0 else high}; expected 0 <= index < {f_w.shape[0]}, the embeddings"
            )
    with torch.no_grad():
        rows = zip(_samples(indices, sample_offsets), _samples(grad_out, sample_offsets), strict=True)
        for (index, g), w in zip(rows, _weights(scale, sample_weight, samples), strict=True):
            distinct, place = index.unique(return_inverse=True)
            total = g.new_zeros((len(distinct), g.shape[1]), dtype=f_w.dtype).index_add_(0, place, g.to(f_w.dtype))
            kept = distinct != padding_idx
            f_w.index_add_(0, distinct[kept], w * total[kept].square())


def _normalized(x: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "none":
        return x
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _reference_norm(
    f_w: Tensor | None, f_b: Tensor | None, x: Tensor, grad_out: Tensor, *, norm: str = "layer", eps: float = 1e-5,
    sample_offsets: Sequence[int] = (), scale: float = 1.0, sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    op = "diag_fisher_norm_"
    check_float(op, x=x)
    _check_choice(op, "norm", norm, NORMS)
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}; expected >= 0")
    _check_same_dtype(op, "grad_out", grad_out, "x", x)
    samples = _check_tokens(op, "x", x, grad_out, sample_offsets)
    if grad_out.shape != x.shape:
        raise ValueError(f"{op}: grad_out has shape {tuple(grad_out.shape)}; expected {tuple(x.shape)}, like x")
    _check_accumulator(op, "f_w", f_w, (x.shape[-1],), x)
    _check_accumulator(op, "f_b", f_b, (x.shape[-1],), x)
    _check_weight(op, sample_weight, samples, x)
    acc = _accumulator(x.dtype)
    with no_autocast(x.device), torch.no_grad():
        rows = zip(_samples(x, sample_offsets), _samples(grad_out, sample_offsets), strict=True)
        for (x_n, g), w in zip(rows, _weights(scale, sample_weight, samples), strict=True):
            g = g.to(acc)
            if f_w is not None:
                f_w += w * (_normalized(x_n.to(acc), norm, eps) * g).sum(0).square()
            if f_b is not None:
                f_b += w * g.sum(0).square()


def _reference_channel_norm(
    f_w: Tensor | None, f_b: Tensor | None, x: Tensor, grad_out: Tensor, mean: Tensor, rstd: Tensor, *,
    scale: float = 1.0, sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    op = "diag_fisher_channel_norm_"
    check_float(op, x=x)
    _check_same_dtype(op, "grad_out", grad_out, "x", x)
    if x.dim() != 3:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (samples, channels, positions)")
    if grad_out.shape != x.shape:
        raise ValueError(f"{op}: grad_out has shape {tuple(grad_out.shape)}; expected {tuple(x.shape)}, like x")
    check_device(op, x.device, grad_out=grad_out)
    samples, channels = x.shape[:2]
    for name, t in (("f_w", f_w), ("f_b", f_b), ("mean", mean), ("rstd", rstd)):
        _check_accumulator(op, name, t, (channels,), x)
    _check_weight(op, sample_weight, samples, x)
    acc = _accumulator(x.dtype)
    with no_autocast(x.device), torch.no_grad():
        for n, w in enumerate(_weights(scale, sample_weight, samples)):
            g = grad_out[n].to(acc)
            if f_w is not None:
                f_w += w * (((x[n].to(acc) - mean[:, None]) * g).sum(1) * rstd).square()
            if f_b is not None:
                f_b += w * g.sum(1).square()


def _reference_per_sample_sqnorm_linear(
    act: Tensor, grad_out: Tensor, *, sample_offsets: Sequence[int] = ()
) -> Tensor:  # fmt: skip
    op = "per_sample_sqnorm_linear"
    check_float(op, act=act)
    _check_same_dtype(op, "grad_out", grad_out, "act", act)
    samples = _check_tokens(op, "act", act, grad_out, sample_offsets)
    acc = _accumulator(act.dtype)
    out = act.new_zeros((samples,), dtype=acc)
    with no_autocast(act.device):
        rows = zip(_samples(act, sample_offsets), _samples(grad_out, sample_offsets), strict=True)
        for n, (a, g) in enumerate(rows):
            out[n] = (g.to(acc).T @ a.to(acc)).square().sum()
    return out


def _reference_kfac(
    A: Tensor | None, G: Tensor | None, act: Tensor, grad_out: Tensor, *, bias: bool, approx: str = "expand",
    sample_offsets: Sequence[int] = (), token_weight: Tensor | None = None, scale_a: float = 1.0,
    scale_g: float = 1.0,
) -> None:  # fmt: skip
    op = "kfac_factors_linear_"
    check_float(op, act=act)
    _check_choice(op, "approx", approx, APPROXIMATIONS)
    _check_same_dtype(op, "grad_out", grad_out, "act", act)
    _check_tokens(op, "act", act, grad_out, sample_offsets)
    side = act.shape[-1] + int(bias)
    _check_accumulator(op, "A", A, (side, side), act)
    _check_accumulator(op, "G", G, (grad_out.shape[-1], grad_out.shape[-1]), act)
    _check_accumulator(op, "token_weight", token_weight, tuple(act.shape[:-1]), act)
    acc = _accumulator(act.dtype)
    with no_autocast(act.device), torch.no_grad():
        a = act.to(acc)
        if bias:
            a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
        w = a.new_ones(a.shape[:-1]) if token_weight is None else token_weight
        g = grad_out.to(acc)
        if approx == "reduce":
            pieces = list(zip(*(_samples(t, sample_offsets) for t in (a, g, w)), strict=True))
            if not pieces:
                return
            # a sample without tokens has no mean, and no part
            a = torch.stack([(w_n[:, None] * a_n).sum(0) / _at_least_one(w_n.sum()) for a_n, _, w_n in pieces])
            g = torch.stack([(w_n[:, None] * g_n).sum(0) for _, g_n, w_n in pieces])
            w = a.new_ones(a.shape[:-1])
        a, g, w = a.flatten(0, -2), g.flatten(0, -2), w.flatten()
        if A is not None:
            A += scale_a * ((w[:, None] * a).T @ a)
        if G is not None:
            G += scale_g * ((w[:, None] * g).T @ g)


def _at_least_one(total: Tensor) -> Tensor:
    return torch.where(total == 0, torch.ones_like(total), total)


# ---- references of the sweeps ---------------------------------------------------------------------------------------


def _check_lists(
    op: str, first: str, lists: dict[str, Sequence[Tensor]], *, wide: tuple[str, ...] = (), same: tuple[str, ...] = ()
) -> None:
    """Lists of equal length and shapes; those of `wide` hold accumulators of the dtype of `first`'s tensors."""
    leading = lists[first]
    for name, tensors in lists.items():
        if len(tensors) != len(leading):
            raise ValueError(f"{op}: {name} has {len(tensors)} tensors; expected {len(leading)}, like {first}")
        for i, (t, like) in enumerate(zip(tensors, leading, strict=True)):
            check_float(op, **{f"{name}[{i}]": t})
            if t.shape != like.shape:
                raise ValueError(
                    f"{op}: {name}[{i}] has shape {tuple(t.shape)}; expected {tuple(like.shape)}, like {first}"
                )
            check_device(op, like.device, **{f"{name}[{i}]": t})
            if name in same:
                _check_same_dtype(op, f"{name}[{i}]", t, f"{first}[{i}]", like)
            if name in wide and t.dtype != _accumulator(like.dtype):
                raise TypeError(
                    f"{op}: {name}[{i}] has dtype {name_of(t.dtype)}; expected {name_of(_accumulator(like.dtype))}: "
                    f"sums of many small numbers"
                )


def _reference_importance_accum(
    acc: Sequence[Tensor], grads: Sequence[Tensor], *, kind: str = "sq", decay: float = 1.0, scale: float = 1.0
) -> None:
    op = "importance_accum_"
    _check_choice(op, "mode", kind, MODES)
    _check_lists(op, "grads", {"grads": grads, "acc": acc}, wide=("acc",))
    with torch.no_grad():
        for a, g in zip(acc, grads, strict=True):
            g = g.to(a.dtype)
            a.mul_(decay).add_(g.square() if kind == "sq" else g.abs(), alpha=scale)


def _reference_si_accum(
    omega: Sequence[Tensor], grads: Sequence[Tensor], deltas: Sequence[Tensor], *, scale: float = -1.0
) -> None:
    op = "si_accum_"
    _check_lists(op, "grads", {"grads": grads, "deltas": deltas, "omega": omega}, wide=("omega",), same=("deltas",))
    with torch.no_grad():
        for o, g, d in zip(omega, grads, deltas, strict=True):
            o.addcmul_(g.to(o.dtype), d.to(o.dtype), value=scale)


def _check_penalty(op: str, params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor]) -> None:
    lists = {"params": params, "anchors": anchors, "importances": importances}
    _check_lists(op, "params", lists, wide=("importances",), same=("anchors",))
    for i, p in enumerate(params):
        check_device(op, params[0].device, **{f"params[{i}]": p})


def _penalty_dtype(params: Sequence[Tensor]) -> torch.dtype:
    wide = any(p.dtype == torch.float64 for p in params)
    return torch.float64 if wide else torch.float32


def _penalty(params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor]) -> Tensor:
    out = _penalty_dtype(params)
    total = torch.zeros((), dtype=torch.float64, device=params[0].device if params else None)
    for p, a, f in zip(params, anchors, importances, strict=True):
        total = total + (f * (p.to(f.dtype) - a.to(f.dtype)).square()).sum(dtype=torch.float64)
    return (0.5 * total).to(out)


def _reference_quad_penalty(
    params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor]
) -> Tensor:
    _check_penalty("quad_penalty", params, anchors, importances)
    return _penalty(params, anchors, importances)


def _reference_quad_penalty_backward(
    grad: Tensor, params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor]
) -> list[Tensor]:
    op = "quad_penalty_backward"
    _check_penalty(op, params, anchors, importances)
    if grad.dim() != 0 or grad.dtype != _penalty_dtype(params):
        raise ValueError(
            f"{op}: grad has dtype {name_of(grad.dtype)} and shape {tuple(grad.shape)}; "
            f"expected {name_of(_penalty_dtype(params))} ()"
        )
    return [
        (grad.to(f.dtype) * f * (p.to(f.dtype) - a.to(f.dtype))).to(p.dtype)
        for p, a, f in zip(params, anchors, importances, strict=True)
    ]


def _reference_quad_penalty_grad_(
    grads: Sequence[Tensor], params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor], *,
    scale: float = 1.0,
) -> Tensor:  # fmt: skip
    op = "quad_penalty_grad_"
    lists = {"params": params, "grads": grads}
    _check_lists(op, "params", lists, same=("grads",))
    _check_penalty(op, params, anchors, importances)
    with torch.no_grad():
        for g, p, a, f in zip(grads, params, anchors, importances, strict=True):
            g.copy_(g.to(f.dtype) + scale * f * (p.to(f.dtype) - a.to(f.dtype)))
        return _penalty(params, anchors, importances) * scale


# ---- definitions ----------------------------------------------------------------------------------------------------


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The fake kernel of an op that only writes in place."""


_ROWS = "SymInt[] sample_offsets, float scale=1.0, Tensor? sample_weight=None"
_SUMS = "Tensor(a!)? f_w, Tensor(b!)? f_b"

define(
    f"diag_fisher_linear_({_SUMS}, Tensor act, Tensor grad_out, *, {_ROWS}) -> ()",
    _reference_linear, triton="fisher:diag_fisher_linear_", gradient="none", fake=_nothing,
)  # fmt: skip
define(
    "diag_fisher_conv2d_(Tensor(a!) f_w, Tensor(b!)? f_b, Tensor act, Tensor grad_out, *, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups=1, float scale=1.0, Tensor? sample_weight=None) -> ()",
    _reference_conv2d, triton="fisher:diag_fisher_conv2d_", gradient="none", fake=_nothing,
)  # fmt: skip
define(
    f"diag_fisher_embedding_(Tensor(a!) f_w, Tensor indices, Tensor grad_out, *, SymInt padding_idx, {_ROWS}) -> ()",
    _reference_embedding, triton="fisher:diag_fisher_embedding_", gradient="none", fake=_nothing,
)  # fmt: skip
define(
    f"diag_fisher_norm_({_SUMS}, Tensor x, Tensor grad_out, *, str norm, float eps, {_ROWS}) -> ()",
    _reference_norm, triton="fisher:diag_fisher_norm_", gradient="none", fake=_nothing,
)  # fmt: skip
define(
    f"diag_fisher_channel_norm_({_SUMS}, Tensor x, Tensor grad_out, Tensor mean, Tensor rstd, *, float scale=1.0, "
    "Tensor? sample_weight=None) -> ()",
    _reference_channel_norm, triton="fisher:diag_fisher_channel_norm_", gradient="none", fake=_nothing,
)  # fmt: skip
_setup, _backward = not_differentiable("per_sample_sqnorm_linear", "it is a statistic of gradients")
define(
    "per_sample_sqnorm_linear(Tensor act, Tensor grad_out, *, SymInt[] sample_offsets) -> Tensor",
    _reference_per_sample_sqnorm_linear, setup_context=_setup, backward=_backward,
    triton="fisher:per_sample_sqnorm_linear",
)  # fmt: skip
define(
    "kfac_factors_linear_(Tensor(a!)? A, Tensor(b!)? G, Tensor act, Tensor grad_out, *, bool bias, str approx, "
    "SymInt[] sample_offsets, Tensor? token_weight=None, float scale_a=1.0, float scale_g=1.0) -> ()",
    _reference_kfac, triton="fisher:kfac_factors_linear_", gradient="none", fake=_nothing,
)  # fmt: skip
define(
    # the compiler passes a `mode` of its own
    "importance_accum_(Tensor(a!)[] acc, Tensor[] grads, *, str kind, float decay=1.0, float scale=1.0) -> ()",
    _reference_importance_accum, triton="fisher:importance_accum_", gradient="none", fake=_nothing,
)  # fmt: skip
define(
    "si_accum_(Tensor(a!)[] omega, Tensor[] grads, Tensor[] deltas, *, float scale=-1.0) -> ()",
    _reference_si_accum, triton="fisher:si_accum_", gradient="none", fake=_nothing,
)  # fmt: skip


def _setup_quad_penalty(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.count = len(inputs[0])
    ctx.save_for_backward(*inputs[0], *inputs[1], *inputs[2])


def _split(tensors: Sequence[Tensor], count: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return list(tensors[:count]), list(tensors[count : 2 * count]), list(tensors[2 * count : 3 * count])


def _backward_quad_penalty(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    params, anchors, importances = _split(ctx.saved_tensors, ctx.count)
    of_params = call("quad_penalty_backward", grad, params, anchors, importances)
    return (
        of_params,
        # autograd drops what nobody needs; a list has one answer for all its tensors
        [-g.to(a.dtype) for g, a in zip(of_params, anchors, strict=True)] if _wanted(anchors) else [None] * ctx.count,
        [
            (0.5 * grad.to(f.dtype) * (p.to(f.dtype) - a.to(f.dtype)).square()).to(f.dtype)
            for p, a, f in zip(params, anchors, importances, strict=True)
        ]
        if _wanted(importances)
        else [None] * ctx.count,
    )


def _wanted(tensors: Sequence[Tensor]) -> bool:
    return any(t.requires_grad for t in tensors)


def _setup_quad_penalty_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.count = len(inputs[1])
    ctx.save_for_backward(inputs[0], *inputs[1], *inputs[2], *inputs[3])


def _backward_quad_penalty_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    grad, *rest = ctx.saved_tensors
    params, anchors, importances = _split(rest, ctx.count)
    of_grad = torch.zeros_like(grad)
    of_params: list[Tensor | None] = []
    of_anchors: list[Tensor | None] = []
    of_importances: list[Tensor | None] = []
    for v, p, a, f in zip(grads, params, anchors, importances, strict=True):
        if v is None:
            for none in (of_params, of_anchors, of_importances):
                none.append(None)
            continue
        wide, delta = v.to(f.dtype), p.to(f.dtype) - a.to(f.dtype)
        of_grad = of_grad + (wide * f * delta).sum(dtype=torch.float64).to(grad.dtype)
        step = grad.to(f.dtype) * wide
        of_params.append((step * f).to(p.dtype))
        of_anchors.append((-step * f).to(a.dtype))
        of_importances.append(step * delta)
    return of_grad, of_params, of_anchors, of_importances


define(
    "quad_penalty(Tensor[] params, Tensor[] anchors, Tensor[] importances) -> Tensor",
    _reference_quad_penalty, setup_context=_setup_quad_penalty, backward=_backward_quad_penalty,
    triton="fisher:quad_penalty", gradient="twice",
)  # fmt: skip
define(
    "quad_penalty_backward(Tensor grad, Tensor[] params, Tensor[] anchors, Tensor[] importances) -> Tensor[]",
    _reference_quad_penalty_backward, setup_context=_setup_quad_penalty_backward,
    backward=_backward_quad_penalty_backward, triton="fisher:quad_penalty_backward", gradient="twice",
)  # fmt: skip
define(
    "quad_penalty_grad_(Tensor(a!)[] grads, Tensor[] params, Tensor[] anchors, Tensor[] importances, *, "
    "float scale=1.0) -> Tensor",
    _reference_quad_penalty_grad_, triton="fisher:quad_penalty_grad_", gradient="none",
)  # fmt: skip


# ---- public functions -----------------------------------------------------------------------------------------------


def _check_tensors(op: str, **tensors: Any) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}; expected a tensor")


def _span(t: Tensor) -> tuple[int, int]:
    """The bytes between the first and the last element."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def check_written(op: str, written: dict[str, Tensor | None], **read: Tensor | None) -> None:
    """What is added to must be memory of its own: not an expanded tensor, not a part of another argument."""
    if torch.compiler.is_compiling():
        return
    spans: dict[str, tuple[int, int]] = {}
    for name, t in (*written.items(), *read.items()):
        if t is None or t.numel() == 0 or not _has_memory(t):
            continue
        if name in written and any(s == 0 and n > 1 for n, s in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(f"{op}: {name} is an expanded tensor, strides {t.stride()}; expected memory of its own")
        low, high = _span(t)
        for other, (a, b) in spans.items():
            if low < b and a < high and (name in written or other in written):
                raise ValueError(f"{op}: {other} and {name} share memory; expected {other} to be memory of its own")
        spans[name] = low, high


def _has_memory(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def _wrote(*tensors: Tensor | None) -> None:
    for t in tensors:
        if t is not None:
            changed(t)


def _in_tokens(op: str, name: str, t: Tensor, offsets: Sequence[int] | None) -> Tensor:
    """[N, features] and [N, T1, T2, ..., features] as [N, T, features]; ragged input as it is."""
    _check_tensors(op, **{name: t})
    t = t.detach()
    if offsets is not None:
        return t
    if t.dim() < 2:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected (samples, ..., features)")
    return t[:, None] if t.dim() == 2 else t.flatten(1, -2)


def _offsets(op: str, sample_offsets: Sequence[int] | None, tokens: int) -> list[int]:
    if sample_offsets is None:
        return []
    offsets = [int(b) for b in sample_offsets]
    _check_offsets(op, offsets, tokens)
    return offsets


def _number(op: str, **numbers: float) -> None:
    for name, value in numbers.items():
        if not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} is a {type(value).__name__}; expected a number")
        if not math.isfinite(value):
            raise ValueError(f"{op}: {name} is {value}; expected a finite number")


def diag_fisher_linear_(
    f_w: Tensor | None, f_b: Tensor | None, act: Tensor, grad_out: Tensor, *,
    sample_offsets: Sequence[int] | None = None, scale: float = 1.0, sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    r"""Add the squared per-sample gradients of a linear layer to `f_w` and `f_b`.

    Parameters
    ----------
    f_w : Tensor [out_features, in_features] or None
        Accumulator of the weight, float32 (float64 for float64 inputs); changed in place. None: bias alone.
    f_b : Tensor [out_features] or None
        Accumulator of the bias, likewise.
    act : Tensor [N, in_features] or [N, ..., in_features]
        The layer's input; everything between the first and the last dimension are a sample's tokens. With
        `sample_offsets`: [tokens, in_features]. float32, bfloat16, float16 or float64.
    grad_out : Tensor
        Gradient of the *sum* of the samples' losses by the layer's output: like `act`, with out_features; same dtype.
    sample_offsets : sequence of N + 1 ints, optional
        Sample n owns the tokens ``sample_offsets[n] : sample_offsets[n + 1]`` of ragged input.
    scale : float
        Multiplies the squares. Gradients of a loss that is a mean over N samples want ``N**2``.
    sample_weight : Tensor [N], optional
        Multiplies each sample's squares; dtype of the accumulators.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument: dtypes, shapes, devices, offsets that do not ascend, memory shared with an accumulator.

    Notes
    -----
    .. math:: F_{oi} \mathrel{+}= s \sum_n w_n \Big(\sum_t g_{nto} a_{nti}\Big)^2, \qquad
              F_o \mathrel{+}= s \sum_n w_n \Big(\sum_t g_{nto}\Big)^2

    Exact also where the tokens of a sample correlate. 2 N T I O operations, no memory but the accumulators. NaN and
    inf propagate. Padding needs no mask: the gradient at a token that the loss does not see is 0.

    References
    ----------
    Goodfellow, Efficient per-example gradient computations, 2015, arXiv:1510.01799. Kunstner et al., NeurIPS 2019,
    arXiv:1905.12558.

    Examples
    --------
    >>> f = torch.zeros_like(layer.weight)
    >>> tlkernels.ops.diag_fisher_linear_(f, None, x, grad_out)
    """
    op = "diag_fisher_linear_"
    act, grad_out = _in_tokens(op, "act", act, sample_offsets), _in_tokens(op, "grad_out", grad_out, sample_offsets)
    offsets = _offsets(op, sample_offsets, act.shape[0])
    _number(op, scale=scale)
    check_written(op, {"f_w": f_w, "f_b": f_b}, act=act, grad_out=grad_out, sample_weight=sample_weight)
    call(
        op, _plain(f_w), _plain(f_b), act, grad_out, sample_offsets=offsets, scale=float(scale),
        sample_weight=_plain(sample_weight),
    )  # fmt: skip
    _wrote(f_w, f_b)


def _plain(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _pair(op: str, name: str, value: int | Sequence[int], dims: int) -> list[int]:
    if isinstance(value, int):
        return [value] * dims
    values = [int(v) for v in value]
    if len(values) != dims:
        raise ValueError(f"{op}: {name} has {len(values)} numbers; expected one or {dims}")
    return values


def _padded(
    op: str, act: Tensor, padding: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """`act` and the symmetric padding that is left to do."""
    if not isinstance(padding, str):
        return act, _pair(op, "padding", padding, len(kernel))
    if padding == "valid":
        return act, [0] * len(kernel)
    if padding != "same":
        raise ValueError(f"{op}: padding is {padding!r}; expected numbers, 'same' or 'valid'")
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if all(t % 2 == 0 for t in total):
        return act, [t // 2 for t in total]
    sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    return functional.pad(act, sides), [0] * len(kernel)


def diag_fisher_conv2d_(
    f_w: Tensor | None, f_b: Tensor | None, act: Tensor, grad_out: Tensor, *, stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0, dilation: int | Sequence[int] = 1, groups: int = 1, scale: float = 1.0,
    sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    r"""Add the squared per-sample gradients of a 2-d convolution to `f_w` and `f_b`.

    Parameters
    ----------
    f_w : Tensor [out_channels, in_channels / groups, kernel_h, kernel_w] or None
    f_b : Tensor [out_channels] or None
        Accumulators, float32 (float64 for float64 inputs); changed in place.
    act : Tensor [N, in_channels, height, width]
        The layer's input, before its padding.
    grad_out : Tensor [N, out_channels, out_h, out_w]
        Gradient of the sum of the samples' losses by the layer's output; act's dtype.
    stride, padding, dilation, groups
        Of the convolution; `padding` may be "same" or "valid". Padding that is not zeros is done beforehand, by the
        caller.
    scale, sample_weight
        As for `diag_fisher_linear_`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument; also where `grad_out` is not of the size that this convolution of `act` has.

    Notes
    -----
    As `diag_fisher_linear_` with positions as tokens and patches of the input as activations; patches are read where
    they stand, and no column matrix is written.
    """
    op = "diag_fisher_conv2d_"
    _check_tensors(op, act=act, grad_out=grad_out)
    act, grad_out = act.detach(), grad_out.detach()
    _number(op, scale=scale)
    check_written(op, {"f_w": f_w, "f_b": f_b}, act=act, grad_out=grad_out, sample_weight=sample_weight)
    if f_w is None:
        _bias_alone(op, f_b, grad_out, scale, sample_weight)
        return
    dilation = _pair(op, "dilation", dilation, 2)
    act, padding = _padded(op, act, padding, f_w.shape[2:], dilation)
    call(
        op, _plain(f_w), _plain(f_b), act, grad_out, stride=_pair(op, "stride", stride, 2), padding=padding,
        dilation=dilation, groups=int(groups), scale=float(scale), sample_weight=_plain(sample_weight),
    )  # fmt: skip
    _wrote(f_w, f_b)


def _bias_alone(
    op: str, f_b: Tensor | None, grad_out: Tensor, scale: float, sample_weight: Tensor | None
) -> None:  # fmt: skip
    if grad_out.dim() < 3:
        raise ValueError(f"{op}: grad_out has shape {tuple(grad_out.shape)}; expected (samples, channels, ...)")
    tokens = grad_out.flatten(2).transpose(1, 2)
    diag_fisher_linear_(None, f_b, tokens[..., :0], tokens, scale=scale, sample_weight=sample_weight)


def diag_fisher_conv1d_(
    f_w: Tensor | None, f_b: Tensor | None, act: Tensor, grad_out: Tensor, *, stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0, dilation: int | Sequence[int] = 1, groups: int = 1, scale: float = 1.0,
    sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    r"""Add the squared per-sample gradients of a 1-d convolution to `f_w` and `f_b`.

    Parameters
    ----------
    f_w : Tensor [out_channels, in_channels / groups, kernel] or None
    f_b : Tensor [out_channels] or None
        Accumulators, float32 (float64 for float64 inputs); changed in place.
    act : Tensor [N, in_channels, length]
    grad_out : Tensor [N, out_channels, out_length]
    stride, padding, dilation, groups, scale, sample_weight
        As for `diag_fisher_conv2d_`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument.
    """
    op = "diag_fisher_conv1d_"
    _check_tensors(op, act=act, grad_out=grad_out)
    for name, t in (("act", act), ("grad_out", grad_out), ("f_w", f_w)):
        if t is not None and t.dim() != 3:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected three dimensions")
    check_written(op, {"f_w": f_w, "f_b": f_b}, act=act, grad_out=grad_out, sample_weight=sample_weight)
    if f_w is None:
        _bias_alone(op, f_b, grad_out.detach(), scale, sample_weight)
        return
    dilation = _pair(op, "dilation", dilation, 1)
    act, padding = _padded(op, act, padding, f_w.shape[2:], dilation)
    diag_fisher_conv2d_(
        f_w.detach()[:, :, None], f_b, act[:, :, None], grad_out[:, :, None],
        stride=[1, *_pair(op, "stride", stride, 1)], padding=[0, *padding], dilation=[1, *dilation], groups=groups,
        scale=scale, sample_weight=sample_weight,
    )  # fmt: skip
    _wrote(f_w)


def diag_fisher_embedding_(
    f_w: Tensor, indices: Tensor, grad_out: Tensor, *, padding_idx: int | None = None,
    sample_offsets: Sequence[int] | None = None, scale: float = 1.0, sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    r"""Add the squared per-sample gradients of an embedding table to `f_w`.

    Parameters
    ----------
    f_w : Tensor [num_embeddings, embedding_dim]
        Accumulator, float32 (float64 for float64 gradients); changed in place.
    indices : int64 Tensor [N] or [N, ...]; with `sample_offsets` [tokens]
    grad_out : Tensor [..., embedding_dim]
        Gradient of the sum of the samples' losses by the looked-up rows.
    padding_idx : int, optional
        This row has no gradient; negative numbers count from the end.
    sample_offsets, scale, sample_weight
        As for `diag_fisher_linear_`.

    Raises
    ------
    IndexError
        An index outside of the table.
    TypeError, ValueError, RuntimeError
        Naming the argument.

    Notes
    -----
    .. math:: F_v \mathrel{+}= s \sum_n w_n \Big(\sum_{t:\, i_{nt} = v} g_{nt}\Big)^2

    A row that a sample looks up twice gets the square of the sum.
    """
    op = "diag_fisher_embedding_"
    _check_tensors(op, f_w=f_w, indices=indices, grad_out=grad_out)
    _number(op, scale=scale)
    grad_out = _in_tokens(op, "grad_out", grad_out, sample_offsets)
    if sample_offsets is None:
        if indices.dim() == 0:
            raise ValueError(f"{op}: indices has shape (); expected (samples, ...)")
        indices = indices[:, None] if indices.dim() == 1 else indices.flatten(1)
    offsets = _offsets(op, sample_offsets, indices.shape[0])
    rows = f_w.shape[0] if f_w.dim() else 0
    if padding_idx is None:
        padding_idx = -1
    elif not -rows <= padding_idx < rows:
        raise ValueError(f"{op}: padding_idx is {padding_idx}; expected None or an index of {rows} embeddings")
    elif padding_idx < 0:
        padding_idx += rows
    check_written(op, {"f_w": f_w}, indices=indices, grad_out=grad_out, sample_weight=sample_weight)
    call(
        op, _plain(f_w), indices, grad_out, padding_idx=padding_idx, sample_offsets=offsets, scale=float(scale),
        sample_weight=_plain(sample_weight),
    )  # fmt: skip
    _wrote(f_w)


def diag_fisher_norm_(
    f_w: Tensor | None, f_b: Tensor | None, x: Tensor, grad_out: Tensor, *, norm: str = "layer", eps: float = 1e-5,
    sample_offsets: Sequence[int] | None = None, scale: float = 1.0, sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    r"""Add the squared per-sample gradients of a norm's weight and bias to `f_w` and `f_b`.

    Parameters
    ----------
    f_w, f_b : Tensor [features] or None
        Accumulators, float32 (float64 for float64 inputs); changed in place.
    x : Tensor [N, features] or [N, ..., features]; with `sample_offsets` [tokens, features]
        The layer's input.
    grad_out : Tensor
        Gradient of the sum of the samples' losses by the layer's output: shape and dtype of x.
    norm : "layer", "rms" or "none"
        What is done to each token before the weight: LayerNorm, RMSNorm, or nothing (x is normalised already).
    eps : float
        Added to the variance, or mean square.
    sample_offsets, scale, sample_weight
        As for `diag_fisher_linear_`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument.

    Notes
    -----
    .. math:: F_i \mathrel{+}= s \sum_n w_n \Big(\sum_t g_{nti} \hat x_{nti}\Big)^2

    The normalised rows are computed again, in registers.
    """
    op = "diag_fisher_norm_"
    x, grad_out = _in_tokens(op, "x", x, sample_offsets), _in_tokens(op, "grad_out", grad_out, sample_offsets)
    offsets = _offsets(op, sample_offsets, x.shape[0])
    _number(op, scale=scale)
    check_written(op, {"f_w": f_w, "f_b": f_b}, x=x, grad_out=grad_out, sample_weight=sample_weight)
    call(
        op, _plain(f_w), _plain(f_b), x, grad_out, norm=norm, eps=float(eps), sample_offsets=offsets,
        scale=float(scale), sample_weight=_plain(sample_weight),
    )  # fmt: skip
    _wrote(f_w, f_b)


def diag_fisher_channel_norm_(
    f_w: Tensor | None, f_b: Tensor | None, x: Tensor, grad_out: Tensor, mean: Tensor, rstd: Tensor, *,
    scale: float = 1.0, sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    r"""Add the squared per-sample gradients of a batch norm in eval mode to `f_w` and `f_b`.

    Parameters
    ----------
    f_w, f_b : Tensor [channels] or None
        Accumulators, float32 (float64 for float64 inputs); changed in place.
    x, grad_out : Tensor [N, channels] or [N, channels, ...]
        The layer's input, and the gradient of the sum of the samples' losses by its output.
    mean, rstd : Tensor [channels]
        The running mean, and 1 / sqrt(running variance + eps); dtype of the accumulators.
    scale, sample_weight
        As for `diag_fisher_linear_`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument.

    Notes
    -----
    .. math:: F_c \mathrel{+}= s \sum_n w_n \Big(\sum_l g_{ncl} (x_{ncl} - \mu_c) r_c\Big)^2

    A batch norm in training mode mixes the samples of a batch; it has no per-sample gradient.
    """
    op = "diag_fisher_channel_norm_"
    _check_tensors(op, x=x, grad_out=grad_out, mean=mean, rstd=rstd)
    _number(op, scale=scale)
    shaped = []
    for name, t in (("x", x), ("grad_out", grad_out)):
        if t.dim() < 2:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected (samples, channels, ...)")
        shaped.append(t.detach()[..., None] if t.dim() == 2 else t.detach().flatten(2))
    check_written(
        op, {"f_w": f_w, "f_b": f_b}, x=x, grad_out=grad_out, mean=mean, rstd=rstd, sample_weight=sample_weight
    )
    call(
        op, _plain(f_w), _plain(f_b), *shaped, mean.detach(), rstd.detach(), scale=float(scale),
        sample_weight=_plain(sample_weight),
    )  # fmt: skip
    _wrote(f_w, f_b)


#: elements that a composed function may hold at a time, whatever the batch
_HELD = 1 << 20


def _pieces(
    x: Tensor, grad_out: Tensor, offsets: Sequence[int], sample_weight: Tensor | None, width: int
) -> Iterator[tuple[Tensor, Tensor, list[int], Tensor | None]]:
    """Runs of whole samples whose tokens times `width` stay below _HELD (or one sample)."""
    if not offsets:
        step = max(1, _HELD // max(1, x.shape[1] * width))
        for n in range(0, x.shape[0], step):
            weight = None if sample_weight is None else sample_weight[n : n + step]
            yield x[n : n + step], grad_out[n : n + step], [], weight
        return
    first, samples = 0, len(offsets) - 1
    while first < samples:
        last = first + 1
        while last < samples and (offsets[last + 1] - offsets[first]) * width <= _HELD:
            last += 1
        a, b = offsets[first], offsets[last]
        weight = None if sample_weight is None else sample_weight[first:last]
        yield x[a:b], grad_out[a:b], [o - a for o in offsets[first : last + 1]], weight
        first = last


def diag_fisher_lora_(
    f_a: Tensor | None, f_b: Tensor | None, x: Tensor, grad_out: Tensor, lora_a: Tensor, lora_b: Tensor, *,
    scaling: float, sample_offsets: Sequence[int] | None = None, scale: float = 1.0,
    sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    r"""Add the squared per-sample gradients of LoRA factors, of ``y = W x + scaling B A x``, to `f_a` and `f_b`.

    Parameters
    ----------
    f_a : Tensor [rank, in_features] or None
    f_b : Tensor [out_features, rank] or None
        Accumulators, float32 (float64 for float64 inputs); changed in place.
    x : Tensor [N, in_features] or [N, ..., in_features]; with `sample_offsets` [tokens, in_features]
        The layer's input (after dropout, where there is some).
    grad_out : Tensor
        Gradient of the sum of the samples' losses by the layer's output; x's dtype.
    lora_a, lora_b : Tensor [rank, in_features], [out_features, rank]
    scaling : float
    sample_offsets, scale, sample_weight
        As for `diag_fisher_linear_`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument.

    Notes
    -----
    The per-sample gradients are :math:`\gamma \sum_t (B^T g_t) x_t^T` and :math:`\gamma \sum_t g_t (A x_t)^T`.
    The two narrow products are made for a run of samples at a time, of bounded size.
    """
    op = "diag_fisher_lora_"
    _check_tensors(op, lora_a=lora_a, lora_b=lora_b)
    x, grad_out = _in_tokens(op, "x", x, sample_offsets), _in_tokens(op, "grad_out", grad_out, sample_offsets)
    offsets = _offsets(op, sample_offsets, x.shape[0])
    _number(op, scaling=scaling, scale=scale)
    rank = lora_a.shape[0] if lora_a.dim() else 0
    for name, t, shape in (("lora_a", lora_a, (rank, x.shape[-1])), ("lora_b", lora_b, (grad_out.shape[-1], rank))):
        if tuple(t.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected {shape}")
    samples = _check_tokens(op, "x", x, grad_out, offsets)
    _check_accumulator(op, "f_a", f_a, (rank, x.shape[-1]), x)
    _check_accumulator(op, "f_b", f_b, (grad_out.shape[-1], rank), x)
    _check_weight(op, sample_weight, samples, x)
    check_written(op, {"f_a": f_a, "f_b": f_b}, x=x, grad_out=grad_out, lora_a=lora_a, lora_b=lora_b)
    a, b = lora_a.detach().to(x.dtype), lora_b.detach().to(x.dtype)
    with no_autocast(x.device):
        for rows, grads, bounds, weight in _pieces(x, grad_out, offsets, sample_weight, rank):
            ragged = bounds or None
            if f_a is not None:
                down = (grads @ b) * scaling
                diag_fisher_linear_(f_a, None, rows, down, sample_offsets=ragged, scale=scale, sample_weight=weight)
            if f_b is not None:
                down = (rows @ a.T) * scaling
                diag_fisher_linear_(f_b, None, down, grads, sample_offsets=ragged, scale=scale, sample_weight=weight)


def per_sample_sqnorm_linear(
    act: Tensor, grad_out: Tensor, *, sample_offsets: Sequence[int] | None = None
) -> Tensor:  # fmt: skip
    r"""Squared Frobenius norms of a linear layer's per-sample weight gradients, which are never written.

    Parameters
    ----------
    act, grad_out, sample_offsets
        As for `diag_fisher_linear_`.

    Returns
    -------
    Tensor [N], float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument.

    Notes
    -----
    .. math:: \Big\|\sum_t g_t a_t^T\Big\|_F^2 = \sum_{t,u} (a_t \cdot a_u)(g_t \cdot g_u)

    By the left side, T I O operations, or by the right side, T^2 (I + O) ("ghost" norm): whichever is less.

    References
    ----------
    Li et al., Large language models can be strong differentially private learners, ICLR 2022, arXiv:2110.05679.
    """
    op = "per_sample_sqnorm_linear"
    act, grad_out = _in_tokens(op, "act", act, sample_offsets), _in_tokens(op, "grad_out", grad_out, sample_offsets)
    return call(op, act, grad_out, sample_offsets=_offsets(op, sample_offsets, act.shape[0]))


def kfac_factors_linear_(
    A: Tensor | None, G: Tensor | None, act: Tensor, grad_out: Tensor, *, bias: bool, approx: str = "expand",
    sample_offsets: Sequence[int] | None = None, token_weight: Tensor | None = None, scale_a: float = 1.0,
    scale_g: float = 1.0,
) -> None:  # fmt: skip
    r"""Add a linear layer's Kronecker factors: second moments of its inputs and of its output gradients.

    Parameters
    ----------
    A : Tensor [in_features (+ 1), in_features (+ 1)] or None
    G : Tensor [out_features, out_features] or None
        Accumulators, float32 (float64 for float64 inputs); changed in place, both triangles.
    act, grad_out, sample_offsets
        As for `diag_fisher_linear_`.
    bias : bool
        Append a 1 to the activations, so that A covers weight and bias together.
    approx : "expand" or "reduce"
        Tokens of a sample as samples of their own, or a sample's mean activation and summed gradient.
    token_weight : Tensor [N, ...] (or [tokens]), optional
        0 for padding; dtype of the accumulators. For "reduce", the weights of mean and sum.
    scale_a, scale_g : float

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument.

    Notes
    -----
    expand: :math:`A \mathrel{+}= s_a \sum_{nt} w_{nt} a_{nt} a_{nt}^T`,
    :math:`G \mathrel{+}= s_g \sum_{nt} w_{nt} g_{nt} g_{nt}^T`.
    reduce: the same of :math:`\bar a_n = \sum_t w_{nt} a_{nt} / \sum_t w_{nt}` and
    :math:`\hat g_n = \sum_t w_{nt} g_{nt}`. Factors are sums: the caller divides by what its definition wants.

    References
    ----------
    Martens & Grosse, ICML 2015, arXiv:1503.05671. Eschenhagen et al., Kronecker-factored approximate curvature for
    modern neural network architectures, NeurIPS 2023, arXiv:2311.00636.
    """
    op = "kfac_factors_linear_"
    act, grad_out = _in_tokens(op, "act", act, sample_offsets), _in_tokens(op, "grad_out", grad_out, sample_offsets)
    offsets = _offsets(op, sample_offsets, act.shape[0])
    _number(op, scale_a=scale_a, scale_g=scale_g)
    if token_weight is not None:
        _check_tensors(op, token_weight=token_weight)
        if sample_offsets is None:
            token_weight = token_weight[:, None] if token_weight.dim() == 1 else token_weight.flatten(1)
    check_written(op, {"A": A, "G": G}, act=act, grad_out=grad_out, token_weight=token_weight)
    call(
        op, _plain(A), _plain(G), act, grad_out, bias=bool(bias), approx=approx, sample_offsets=offsets,
        token_weight=_plain(token_weight), scale_a=float(scale_a), scale_g=float(scale_g),
    )  # fmt: skip
    _wrote(A, G)


def ekfac_diag_linear_(
    S: Tensor, act: Tensor, grad_out: Tensor, Ua: Tensor, Ug: Tensor, *, bias: bool,
    sample_offsets: Sequence[int] | None = None, scale: float = 1.0, sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    r"""Add the squared per-sample gradients of a linear layer, seen in the eigenbasis of its Kronecker factors.

    Parameters
    ----------
    S : Tensor [out_features, in_features (+ 1)]
        Accumulator, float32 (float64 for float64 inputs); changed in place.
    act, grad_out, sample_offsets, scale, sample_weight
        As for `diag_fisher_linear_`.
    Ua : Tensor [in_features (+ 1), in_features (+ 1)]
    Ug : Tensor [out_features, out_features]
        Eigenvectors in columns, of the factors A and G.
    bias : bool
        Whether a 1 is appended to the activations.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument.

    Notes
    -----
    .. math:: S \mathrel{+}= s \sum_n w_n \Big(U_g^T \big(\sum_t g_{nt} a_{nt}^T\big) U_a\Big)^{\circ 2}

    Tokens are rotated, a bounded run of samples at a time, and squared as in `diag_fisher_linear_`.

    References
    ----------
    George et al., Fast approximate natural gradient descent in a Kronecker-factored eigenbasis, NeurIPS 2018,
    arXiv:1806.03884.
    """
    op = "ekfac_diag_linear_"
    _check_tensors(op, S=S, Ua=Ua, Ug=Ug)
    act, grad_out = _in_tokens(op, "act", act, sample_offsets), _in_tokens(op, "grad_out", grad_out, sample_offsets)
    offsets = _offsets(op, sample_offsets, act.shape[0])
    _number(op, scale=scale)
    side, outs = act.shape[-1] + int(bias), grad_out.shape[-1]
    for name, t, want in (("Ua", Ua, (side, side)), ("Ug", Ug, (outs, outs))):
        if tuple(t.shape) != want:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected {want}")
    samples = _check_tokens(op, "act", act, grad_out, offsets)
    _check_accumulator(op, "S", S, (outs, side), act)
    _check_weight(op, sample_weight, samples, act)
    check_written(op, {"S": S}, act=act, grad_out=grad_out, Ua=Ua, Ug=Ug, sample_weight=sample_weight)
    wide = _accumulator(act.dtype)
    ua, ug = Ua.detach().to(wide), Ug.detach().to(wide)
    with no_autocast(act.device):
        for a, g, bounds, weight in _pieces(act, grad_out, offsets, sample_weight, side + outs):
            rotated = a.to(wide) @ ua[: act.shape[-1]]
            if bias:
                rotated = rotated + ua[-1]
            diag_fisher_linear_(
                S, None, rotated, g.to(wide) @ ug, sample_offsets=bounds or None, scale=scale, sample_weight=weight
            )


def _lists(op: str, **lists: Any) -> list[list[Tensor]]:
    for name, tensors in lists.items():
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{op}: {name} is a {type(tensors).__name__}; expected a list of tensors")
        for i, t in enumerate(tensors):
            if not isinstance(t, Tensor):
                raise TypeError(f"{op}: {name}[{i}] is a {type(t).__name__}; expected a tensor")
    return [[t.detach() if t.requires_grad else t for t in tensors] for tensors in lists.values()]


def _check_lists_written(op: str, written_name: str, written: Sequence[Tensor], **read: Sequence[Tensor]) -> None:
    """Each tensor that is added to must not be one of those read at its place, nor expanded."""
    if torch.compiler.is_compiling():
        return
    for i, t in enumerate(written):
        others = [r[i] for r in read.values() if i < len(r)]
        if _apart(t, others):  # as always: models have hundreds of small tensors
            continue
        check_written(op, {f"{written_name}[{i}]": t}, **{f"{n}[{i}]": r[i] for n, r in read.items() if i < len(r)})


def _apart(t: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors plainly lie apart."""
    if type(t) is not Tensor or not t.is_contiguous() or not _has_memory(t):
        return False
    low = t.data_ptr()
    high = low + t.nbytes
    for other in others:
        if type(other) is not Tensor or not other.is_contiguous():
            return False
        at = other.data_ptr()
        if at < high and low < at + other.nbytes:
            return False
    return True


def importance_accum_(
    acc: Sequence[Tensor], grads: Sequence[Tensor], *, mode: str = "sq", decay: float = 1.0, scale: float = 1.0
) -> None:
    r"""Add squares or absolute values of gradients to running importances, all parameters in one sweep.

    Parameters
    ----------
    acc : list of Tensor
        Accumulators, float32 (float64 for float64 gradients); changed in place.
    grads : list of Tensor
        Shapes of `acc`; any of the four floating-point dtypes.
    mode : "sq" or "abs"
        :math:`g^2` (online EWC), or :math:`|g|` (MAS).
    decay : float
        Multiplies what is there: ``acc = decay * acc + scale * g**2``.
    scale : float

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument and its place in the list.

    Notes
    -----
    The square of a *batch's* gradient is not the Fisher information: see `diag_fisher_linear_`.

    References
    ----------
    Schwarz et al., Progress & compress (online EWC), ICML 2018, arXiv:1805.06370. Aljundi et al., Memory aware
    synapses, ECCV 2018, arXiv:1711.09601.
    """
    op = "importance_accum_"
    into, by = _lists(op, acc=acc, grads=grads)
    _number(op, decay=decay, scale=scale)
    _check_lists_written(op, "acc", into, grads=by)
    call(op, into, by, kind=mode, decay=float(decay), scale=float(scale))
    _wrote(*acc)


def si_accum_(
    omega: Sequence[Tensor], grads: Sequence[Tensor], deltas: Sequence[Tensor], *, scale: float = -1.0
) -> None:
    r"""Add a step of the path integral of synaptic intelligence, :math:`\omega += s\, g\, \Delta\theta`, in one sweep.

    Parameters
    ----------
    omega : list of Tensor
        Accumulators, float32 (float64 for float64 gradients); changed in place.
    grads, deltas : list of Tensor
        The gradient of the task's own loss, and the parameters' change by the step; same shapes and dtypes.
    scale : float
        -1: what a step took off the loss counts as importance.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument and its place in the list.

    References
    ----------
    Zenke et al., Continual learning through synaptic intelligence, ICML 2017, arXiv:1703.04200.
    """
    op = "si_accum_"
    into, by, steps = _lists(op, omega=omega, grads=grads, deltas=deltas)
    _number(op, scale=scale)
    _check_lists_written(op, "omega", into, grads=by, deltas=steps)
    call(op, into, by, steps, scale=float(scale))
    _wrote(*omega)


def quad_penalty(
    params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor]
) -> Tensor:  # fmt: skip
    r"""The quadratic penalty of EWC and its kin, :math:`\frac12 \sum_i F_i (\theta_i - \theta_i^*)^2`.

    Parameters
    ----------
    params : list of Tensor
        Any of the four floating-point dtypes, on one device.
    anchors : list of Tensor
        Shapes and dtypes of `params`.
    importances : list of Tensor
        Shapes of `params`; float32 (float64 for float64 parameters).

    Returns
    -------
    Tensor []
        float32 (float64 if a parameter is float64). Differentiable by all three, and twice by all.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument and its place in the list.

    Notes
    -----
    Terms are float32, their sum float64 in a fixed order: no bit depends on the number of threads. The gradient is
    :math:`F (\theta - \theta^*)`; `quad_penalty_grad_` adds it to the gradients in the same pass.

    References
    ----------
    Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017, arXiv:1612.00796.
    """
    op = "quad_penalty"
    _lists(op, params=params, anchors=anchors, importances=importances)
    if torch._C._are_functorch_transforms_active():  # an op's formula does not reach into lists there
        _check_penalty(op, params, anchors, importances)
        return _penalty(params, anchors, importances)
    return call(op, list(params), list(anchors), list(importances))


def quad_penalty_grad_(
    grads: Sequence[Tensor], params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor], *,
    scale: float = 1.0,
) -> Tensor:  # fmt: skip
    r"""Add the gradient of ``scale * quad_penalty(...)`` to `grads`, and return that penalty: one pass over all.

    Parameters
    ----------
    grads : list of Tensor
        Shapes and dtypes of `params`; changed in place. The parameters' ``.grad``.
    params, anchors, importances : list of Tensor
        As for `quad_penalty`.
    scale : float

    Returns
    -------
    Tensor []
        The penalty times `scale`, without a gradient.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument and its place in the list.
    """
    op = "quad_penalty_grad_"
    into, p, a, f = _lists(op, grads=grads, params=params, anchors=anchors, importances=importances)
    _number(op, scale=scale)
    _check_lists_written(op, "grads", into, params=p, anchors=a, importances=f)
    total = call(op, into, p, a, f, scale=float(scale))
    _wrote(*grads)
    return total
