"""What the losses of this package share: argument checks as sentences, sums over processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tlkernels.methods._common import accumulator, check_float, wide
from tlkernels.ops._common import name_of

__all__ = [
    "GroupSum",
    "Reduce",
    "alone",
    "check_positive",
    "check_rows",
    "check_share",
    "count",
    "soft_cross_entropy",
]

#: From partial sums of one process to the sums over all, differentiable.
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GroupSum:
    r"""Sum a tensor over the processes of a group, with its gradient: the `reduce` of this package's losses.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        By default the one of all processes.

    Raises
    ------
    RuntimeError
        On a call, if torch.distributed is not initialised.

    Notes
    -----
    The gradient of a sum over processes is the sum of all their gradients. Each process computes the loss of the whole
    batch; with the mean that `torch.nn.parallel.DistributedDataParallel` takes, parameters then get the gradient of
    that loss, as if the batch had been on one machine:

    .. math:: \frac1W \sum_w \frac{\partial \sum_v L_v}{\partial \theta_w} = \sum_w \frac{\partial L}{\partial \theta_w}

    Examples
    --------
    >>> from tlkernels.methods.pretrain import GroupSum, barlow_twins_loss
    >>> reduce = GroupSum()  # and, where the processes run: barlow_twins_loss(z1, z2, reduce=reduce)
    """

    group: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        from torch import distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("GroupSum: torch.distributed is not initialised; expected init_process_group before")
        total: Tensor = _AllReduce.apply(x, self.group)
        return total


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        from torch import distributed as dist

        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grad, ctx.group), None


def alone(x: Tensor) -> Tensor:
    """The `reduce` of one process."""
    return x


def check_rows(op: str, at_least: int = 0, why: str = "", **tensors: Tensor) -> None:
    """Floating-point tensors [N, D], all like the first, of N >= `at_least`."""
    check_float(op, **tensors)
    (first, like), *_ = tensors.items()
    for name, t in tensors.items():
        if t.dim() != 2 or t.shape[1] < 1:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected (N, D) with D >= 1")
        if t.shape != like.shape or t.dtype != like.dtype:
            raise ValueError(
                f"{op}: {name} has dtype {name_of(t.dtype)} and shape {tuple(t.shape)}; "
                f"expected {name_of(like.dtype)} {tuple(like.shape)}, like {first}"
            )
    if like.shape[0] < at_least:
        raise ValueError(f"{op}: {first} has {like.shape[0]} rows; expected at least {at_least}, {why}")


def check_positive(op: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{op}: {name} is {value}; expected > 0")


def check_share(op: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{op}: {name} is {value}; expected 0 <= {name} <= 1")


def count(op: str, rows: int, reduce: Reduce, like: Tensor, why: str) -> Tensor:
    """The number of samples over all processes, checked to be two at least where that needs no wait for a device."""
    total = reduce(torch.full((), float(rows), dtype=like.dtype, device=like.device)).detach()
    if (reduce is alone or total.device.type == "cpu") and float(total) < 2:
        raise ValueError(f"{op}: the batch has {int(total)} samples; expected at least 2, {why}")
    return total


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over rows of ``-sum(targets * log_softmax(logits))``, in float32."""
    return F.cross_entropy(wide(logits), targets.to(accumulator(logits.dtype)))
