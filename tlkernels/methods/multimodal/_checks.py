"""What the losses of this topic check alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tlkernels import ops
from tlkernels.methods._common import check_float
from tlkernels.ops._common import name_of

__all__ = ["check_pairs", "mean_info_nce"]


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


def mean_info_nce(op: str, x: Tensor, y: Tensor, logit_scale: float | Tensor, options: dict[str, Any]) -> Tensor:
    """`ops.info_nce` with a caller's options, 0-d: a loss for each row would broadcast with the terms added to it."""
    for name, value in (("reduction", "none"), ("return_lse", True)):
        if options.get(name) == value:
            raise ValueError(f"{op}: {name} is {value!r}; expected a loss that is one number")
    loss: Tensor = ops.info_nce(x, y, logit_scale, **options)
    return loss
