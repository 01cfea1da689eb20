"""What the losses of several topics share: argument checks as sentences, lengths and sums in float32, reductions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tlkernels.ops import _common as of_ops

__all__ = [
    "accumulator",
    "check_float",
    "check_not_negative",
    "check_reduction",
    "check_scalar",
    "check_tensor",
    "normalized",
    "reduced",
    "wide",
]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over features of `dtype` are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or float64 if it is that: what statistics are computed in.

    Autocast then lowers nothing but products of matrices, which the losses that have some do in `no_autocast`.
    """
    return x.to(accumulator(x.dtype))


def normalized(x: Tensor) -> Tensor:
    """`x` with rows of length 1, of its dtype; the length is taken in float32 at least, and rounded once."""
    return functional.normalize(wide(x), dim=-1).to(x.dtype)


def check_tensor(op: str, **tensors: object) -> None:
    """Raise TypeError if one is no tensor."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}; expected a tensor")


def check_float(op: str, **tensors: Tensor) -> None:
    """Raise TypeError if one is no tensor, or not of one of the four floating-point dtypes."""
    check_tensor(op, **tensors)
    of_ops.check_float(op, **tensors)


def check_scalar(op: str, **scalars: float | Tensor) -> None:
    """Raise if one is neither a number nor a tensor of one element, which would not broadcast to rows."""
    for name, value in scalars.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; expected one element")
        elif not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} is a {type(value).__name__}; expected a number or a tensor of one element")


def check_not_negative(op: str, **values: float) -> None:
    """Raise if a number is negative or NaN."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{op}: {name} is {value}; expected >= 0")


def check_reduction(op: str, reduction: str) -> None:
    """Raise if `reduction` is none of the three."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """The losses ``[N]``, their sum, or their mean, which of none is 0."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(loss.shape[0], 1)
