"""What the losses of this topic check alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tlkernels.ops._common import check_float, name_of

__all__ = ["accumulator", "check_pairs", "check_reduction", "check_weights", "normalized", "reduced"]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over features of `dtype` are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def normalized(x: Tensor) -> Tensor:
    """`x` with rows of length 1, of its dtype; the length is taken in float32 at least."""
    return functional.normalize(x.to(accumulator(x.dtype)), dim=-1).to(x.dtype)


def check_pairs(op: str, dim: int = 2, **features: Tensor) -> tuple[int, int]:
    """The number of pairs and of features, which all `features` have, with `dim` dimensions and one dtype."""
    check_float(op, **features)
    (name, first), *others = features.items()
    form = {2: "(N, D)", 3: "(N, tokens, D)"}[dim]
    if first.dim() != dim:
        raise ValueError(f"{op}: {name} has shape {tuple(first.shape)}; expected {form}")
    for other, t in others:
        if t.dtype != first.dtype:
            raise TypeError(f"{op}: {other} has dtype {name_of(t.dtype)}; expected {name_of(first.dtype)}, like {name}")
        if t.dim() != dim or t.shape[0] != first.shape[0] or t.shape[-1] != first.shape[-1]:
            wanted = tuple(first.shape) if dim == 2 else f"({first.shape[0]}, tokens, {first.shape[2]})"
            raise ValueError(f"{op}: {other} has shape {tuple(t.shape)}; expected {wanted}, like {name}")
    return first.shape[0], first.shape[-1]


def check_reduction(op: str, reduction: str) -> None:
    """Raise if `reduction` is none of the three."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")


def check_weights(op: str, **weights: float) -> None:
    """Raise if a weight is negative or no number."""
    for name, value in weights.items():
        if not value >= 0:
            raise ValueError(f"{op}: {name} is {value}; expected >= 0")


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """The losses ``[N]``, their sum, or their mean, which of none is 0."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(loss.shape[0], 1)
