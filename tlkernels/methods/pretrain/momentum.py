r"""Momentum encoders, the targets of MoCo, BYOL and DINO, and schedules of momenta and temperatures.

.. math:: \bar\theta \leftarrow m_t \, \bar\theta + (1 - m_t) \, \theta
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tlkernels.methods.pretrain._common import check_share

__all__ = ["MomentumEncoder", "cosine_momentum", "linear_warmup"]


@dataclass(frozen=True)
class _Cosine:  # not a closure: schedules are saved with their objects
    start: float
    end: float
    num_steps: int

    def __call__(self, step: int) -> float:
        progress = min(step / self.num_steps, 1.0)
        return self.end - (self.end - self.start) * (math.cos(math.pi * progress) + 1) / 2


@dataclass(frozen=True)
class _Linear:
    start: float
    end: float
    num_steps: int

    def __call__(self, step: int) -> float:
        return self.end if step >= self.num_steps else self.start + (self.end - self.start) * step / self.num_steps


def cosine_momentum(start: float, num_steps: int, end: float = 1.0) -> Callable[[int], float]:
    r"""A momentum that rises along half a cosine, for `MomentumEncoder`.

    .. math:: m_t = m_T - (m_T - m_0) \, \frac{\cos(\pi t / T) + 1}{2}, \qquad m_t = m_T \text{ for } t > T

    Parameters
    ----------
    start : float
        :math:`m_0` in [0, 1]; 0.996 for BYOL and DINO, 0.99 for MoCo v3.
    num_steps : int
        T, >= 1: the updates of the whole training.
    end : float
        :math:`m_T` in [0, 1].

    Returns
    -------
    callable
        From the number of an update, from 0, to its momentum. Can be pickled.

    Raises
    ------
    ValueError
        If an argument is not as stated.

    References
    ----------
    Grill et al., BYOL, NeurIPS 2020, arXiv:2006.07733, section 3.3.

    Examples
    --------
    >>> momentum = cosine_momentum(0.996, 100)
    >>> momentum(0), momentum(50), momentum(100)
    (0.996, 0.998, 1.0)
    """
    check_share("cosine_momentum", start=start, end=end)
    if num_steps < 1:
        raise ValueError(f"cosine_momentum: num_steps is {num_steps}; expected >= 1")
    return _Cosine(start, end, num_steps)


def linear_warmup(start: float, end: float, num_steps: int) -> Callable[[int], float]:
    r"""A value that goes linearly to its end and stays there: the teacher temperature of DINO.

    .. math:: \tau_t = \tau_0 + (\tau_1 - \tau_0) \min(1, t / T)

    Parameters
    ----------
    start, end : float
        :math:`\tau_0` and :math:`\tau_1`; 0.04 and 0.07 for DINO.
    num_steps : int
        T >= 1; the value is `end` from step T on.

    Returns
    -------
    callable
        From a step (or epoch), from 0, to the value. Can be pickled.

    Raises
    ------
    ValueError
        If `num_steps` is below 1.

    Notes
    -----
    The authors of DINO are at the end in the last epoch of the warm-up: theirs of E epochs is
    ``linear_warmup(start, end, E - 1)``.

    Examples
    --------
    >>> temperature = linear_warmup(0.04, 0.08, 4)
    >>> temperature(0), temperature(2), temperature(9)
    (0.04, 0.06, 0.08)
    """
    if num_steps < 1:
        raise ValueError(f"linear_warmup: num_steps is {num_steps}; expected >= 1")
    return _Linear(start, end, num_steps)


class MomentumEncoder(nn.Module):
    r"""A copy of a network whose weights follow by exponential moving average, and get no gradients.

    .. math:: \bar\theta \leftarrow m_t \, \bar\theta + (1 - m_t) \, \theta

    Parameters
    ----------
    online : torch.nn.Module
        Copied with its weights: encoder and projector, without a predictor. Not held.
    momentum : float or callable
        m in [0, 1], or a function of the number of the update, such as `cosine_momentum`. MoCo has 0.999.
    buffers : {"own", "copy", "average"}
        What becomes of floating-point buffers, the statistics of batch norms: "own" leaves them to the target's own
        forward passes in training mode, as the authors of MoCo, BYOL and DINO do; "copy" takes the online ones;
        "average" treats them like weights. Integer buffers are copied unless "own".

    Attributes
    ----------
    target : torch.nn.Module
    num_updates : int

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    One multi-tensor interpolation per update. Parameters in bfloat16 and float16, in which a step of
    :math:`1 - m` would be rounded away, are followed by a float32 average, which is saved in the ``state_dict``.

    ``train()`` and ``eval()`` reach the target as any submodule. With "own" buffers and a target in eval mode, batch
    norm would keep the statistics of the start: use "copy" or "average" there.

    References
    ----------
    He et al., MoCo, CVPR 2020, arXiv:1911.05722. Grill et al., BYOL, NeurIPS 2020, arXiv:2006.07733.

    Examples
    --------
    >>> import torch
    >>> online = torch.nn.Linear(4, 2)
    >>> target = MomentumEncoder(online, cosine_momentum(0.996, 1000))
    >>> keys = target(torch.ones(3, 4))  # no gradient
    >>> target.update(online)  # after each optimizer.step(); returns the momentum
    0.996
    """

    def __init__(
        self, online: nn.Module, momentum: float | Callable[[int], float] = 0.999, *,
        buffers: Literal["own", "copy", "average"] = "own",
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(online, nn.Module):
            raise TypeError(f"MomentumEncoder: online is a {type(online).__name__}; expected a torch.nn.Module")
        if buffers not in ("own", "copy", "average"):
            raise ValueError(f"MomentumEncoder: buffers is {buffers!r}; expected 'own', 'copy' or 'average'")
        check_share("MomentumEncoder", momentum=momentum(0) if callable(momentum) else momentum)
        self.target = copy.deepcopy(online).requires_grad_(False)
        self.momentum, self.buffer_mode = momentum, buffers
        self.num_updates = 0
        self._averages: dict[str, Tensor] = {}  # float32, of what is held in fewer bits

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The target's output, without gradients."""
        return self.target(*args, **kwargs)

    @torch.no_grad()
    def update(self, online: nn.Module) -> float:
        """Follow the online network; after ``optimizer.step()``.

        Parameters
        ----------
        online : torch.nn.Module
            Of the form it was copied from; of a wrapped one, ``ddp.module``.

        Returns
        -------
        float
            The momentum of this update.

        Raises
        ------
        ValueError
            If the schedule gives a momentum outside [0, 1]; nothing has changed then.
        RuntimeError
            If `online` has other parameters or buffers; nothing has changed then.
        """
        momentum = self.momentum(self.num_updates) if callable(self.momentum) else self.momentum
        check_share("MomentumEncoder.update", momentum=momentum)
        sides: list[tuple[Mapping[str, Tensor], Mapping[str, Tensor], str]] = [
            (dict(self.target.named_parameters()), dict(online.named_parameters()), "average"),
            (dict(self.target.named_buffers()), dict(online.named_buffers()), self.buffer_mode),
        ]
        for held, found, _ in sides:
            odd = sorted(held.keys() ^ found.keys())
            odd += [name for name in held if not odd and held[name].shape != found[name].shape]
            if odd:
                raise RuntimeError(
                    f"MomentumEncoder.update: {odd[0]} is not in online as it was when it was copied "
                    f"({len(odd)} such); expected the same names and shapes"
                )
        averages: list[Tensor] = []
        values: list[Tensor] = []
        rounded: list[tuple[Tensor, Tensor]] = []
        for held, found, mode in sides:
            for name, target in held.items():
                value = found[name].detach()
                if mode == "average" and target.is_floating_point():
                    average = target
                    if target.dtype in (torch.bfloat16, torch.float16):
                        average = self._average_of(name, target)
                        rounded.append((target, average))
                    averages.append(average)
                    values.append(value.to(average))
                elif mode != "own":
                    target.copy_(value)
        if averages:
            torch._foreach_lerp_(averages, values, 1 - momentum)
        for target, average in rounded:
            target.copy_(average)
        self.num_updates += 1
        return momentum

    def _average_of(self, name: str, target: Tensor) -> Tensor:
        average = self._averages.get(name)
        if average is not None:
            average = average.to(target.device)
        # someone else may have written the target since, and then is right
        if average is None or average.shape != target.shape or not torch.equal(average.to(target.dtype), target):
            average = target.detach().float()
        self._averages[name] = average
        return average

    def get_extra_state(self) -> dict[str, Any]:
        """The number of updates and the float32 averages, for ``state_dict()``."""
        return {"num_updates": self.num_updates, "averages": dict(self._averages)}

    def set_extra_state(self, state: Any) -> None:
        """Restore what `get_extra_state` gave."""
        self.num_updates = int(state["num_updates"])
        self._averages = {name: average.detach().clone() for name, average in state["averages"].items()}
