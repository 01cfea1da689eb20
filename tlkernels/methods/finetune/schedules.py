r"""Learning-rate schedules of fine-tuning, and the learning-rate range test.

The schedules are `torch.optim.lr_scheduler.LambdaLR`: factors on the learning rate of every parameter group, so that
layer-wise rates keep their ratios. ``scheduler.step()`` follows each ``optimizer.step()``.
"""

from __future__ import annotations

import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "LRFinderResult",
    "lr_find",
    "slanted_triangular_schedule",
    "warmup_cosine_schedule",
    "warmup_linear_schedule",
]

Batch = TypeVar("Batch")


# ---- the factors, as functions of modules: LambdaLR objects with them can be pickled ---------------------------------


def _slanted_triangular(step: int, *, cut: int, total: int, ratio: float) -> float:
    p = step / cut if step < cut else max(0.0, 1 - (step - cut) / (total - cut))
    return (1 + p * (ratio - 1)) / ratio


def _warmup_linear(step: int, *, warmup: int, total: int) -> float:
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


def _warmup_cosine(step: int, *, warmup: int, total: int, num_cycles: float, min_lr_ratio: float) -> float:
    if step < warmup:
        return step / max(1, warmup)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(2 * math.pi * num_cycles * progress))


def slanted_triangular_schedule(
    optimizer: Optimizer, num_training_steps: int, *, cut_frac: float = 0.1, ratio: float = 32.0, last_epoch: int = -1
) -> LambdaLR:
    r"""Slanted triangular learning rates: a short linear rise, a long linear decay.

    .. math::
        \mathrm{cut} &= \lfloor T \cdot \mathrm{cut\_frac} \rfloor \\
        p &= \begin{cases} t / \mathrm{cut} & t < \mathrm{cut} \\
             1 - \dfrac{t - \mathrm{cut}}{T - \mathrm{cut}} & \text{otherwise} \end{cases} \\
        \eta_t &= \eta_{\max} \, \frac{1 + p \, (\mathrm{ratio} - 1)}{\mathrm{ratio}}

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Its learning rates are :math:`\eta_{\max}`.
    num_training_steps : int
        T, >= 1.
    cut_frac : float
        The share of steps in which the rate rises, in (0, 1).
    ratio : float
        How much smaller the lowest rate is than the highest, >= 1.
    last_epoch : int
        The last step made, when training goes on.

    Returns
    -------
    torch.optim.lr_scheduler.LambdaLR

    Raises
    ------
    ValueError
        If an argument is not as stated.

    Notes
    -----
    The paper writes :math:`\mathrm{cut}\,(1/\mathrm{cut\_frac} - 1)` for :math:`T - \mathrm{cut}`. The two are equal
    where :math:`T \cdot \mathrm{cut\_frac}` is whole; elsewhere the paper's p falls below 0 before the end, and with it
    the learning rate. After step T the rate stays at its lowest.

    References
    ----------
    Howard and Ruder, Universal Language Model Fine-tuning for Text Classification, ACL 2018, equation 3.

    Examples
    --------
    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.32)
    >>> scheduler = slanted_triangular_schedule(optimizer, 20)
    >>> round(scheduler.get_last_lr()[0], 4)
    0.01
    """
    op = "slanted_triangular_schedule"
    _check_steps(op, num_training_steps)
    if not 0 < cut_frac < 1:
        raise ValueError(f"{op}: cut_frac is {cut_frac}; expected 0 < cut_frac < 1")
    if not (math.isfinite(ratio) and ratio >= 1):
        raise ValueError(f"{op}: ratio is {ratio}; expected a finite number >= 1")
    cut = math.floor(num_training_steps * cut_frac + 1e-9)  # 100 * 0.29 is 28.999999999999996
    factor = partial(_slanted_triangular, cut=cut, total=num_training_steps, ratio=ratio)
    return LambdaLR(optimizer, factor, last_epoch)


def warmup_linear_schedule(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, *, last_epoch: int = -1
) -> LambdaLR:
    r"""Linear warm-up to the learning rate of the optimizer, then linear decay to 0.

    .. math::
        \eta_t / \eta = \begin{cases} t / W & t < W \\ \max(0, (T - t) / (T - W)) & \text{otherwise} \end{cases}

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    num_warmup_steps : int
        W, 0 to T.
    num_training_steps : int
        T, >= 1.
    last_epoch : int
        The last step made, when training goes on.

    Returns
    -------
    torch.optim.lr_scheduler.LambdaLR

    Raises
    ------
    ValueError
        If an argument is not as stated.

    References
    ----------
    Devlin et al., BERT, NAACL 2019, arXiv:1810.04805, appendix A.2.
    """
    _check_steps("warmup_linear_schedule", num_training_steps, num_warmup_steps)
    factor = partial(_warmup_linear, warmup=num_warmup_steps, total=num_training_steps)
    return LambdaLR(optimizer, factor, last_epoch)


def warmup_cosine_schedule(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, *, num_cycles: float = 0.5,
    min_lr_ratio: float = 0.0, last_epoch: int = -1,
) -> LambdaLR:  # fmt: skip
    r"""Linear warm-up to the learning rate of the optimizer, then cosine decay.

    .. math::
        \eta_t / \eta = \begin{cases} t / W & t < W \\
        m + (1 - m) \, \tfrac12 \left(1 + \cos\left(2 \pi c \, \frac{t - W}{T - W}\right)\right) & \text{otherwise}
        \end{cases}

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    num_warmup_steps : int
        W, 0 to T.
    num_training_steps : int
        T, >= 1. After it the rate stays where it is.
    num_cycles : float
        c, > 0. The half wave of 0.5 ends at the lowest rate.
    min_lr_ratio : float
        m, the lowest rate over the highest, in [0, 1].
    last_epoch : int
        The last step made, when training goes on.

    Returns
    -------
    torch.optim.lr_scheduler.LambdaLR

    Raises
    ------
    ValueError
        If an argument is not as stated.

    References
    ----------
    Loshchilov and Hutter, SGDR, ICLR 2017, arXiv:1608.03983, equation 5.
    """
    op = "warmup_cosine_schedule"
    _check_steps(op, num_training_steps, num_warmup_steps)
    if not (math.isfinite(num_cycles) and num_cycles > 0):
        raise ValueError(f"{op}: num_cycles is {num_cycles}; expected a finite number > 0")
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"{op}: min_lr_ratio is {min_lr_ratio}; expected 0 <= min_lr_ratio <= 1")
    factor = partial(
        _warmup_cosine, warmup=num_warmup_steps, total=num_training_steps, num_cycles=num_cycles,
        min_lr_ratio=min_lr_ratio,
    )  # fmt: skip
    return LambdaLR(optimizer, factor, last_epoch)


def _check_steps(op: str, total: int, warmup: int = 0) -> None:
    if total < 1:
        raise ValueError(f"{op}: num_training_steps is {total}; expected >= 1")
    if not 0 <= warmup <= total:
        raise ValueError(f"{op}: num_warmup_steps is {warmup}; expected 0 to num_training_steps = {total}")


# ---- the range test --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LRFinderResult:
    """What `lr_find` saw. The last point is the one that diverged, where `diverged` is true.

    Attributes
    ----------
    lrs : list of float
        The learning rate of each step, of the parameter group with the highest.
    losses : list of float
        As measured, before the step with that rate.
    smoothed : list of float
        Their exponential moving average, bias-corrected.
    diverged : bool
        Whether the test ended early: the loss was not finite, or above the limit.
    suggestion : float or None
        The rate where the smoothed loss falls most steeply over log(lr); None where it never falls.
    """

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    diverged: bool
    suggestion: float | None

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the smoothed loss over the learning rate, with the suggestion.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            To draw on; a new figure's by default.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        if ax is None:
            try:
                import matplotlib.pyplot as plt
            except ImportError as error:
                raise ImportError(
                    "LRFinderResult.plot needs matplotlib; install it with `pip install matplotlib`"
                ) from error
            ax = plt.subplots()[1]
        ax.plot(self.lrs, self.losses, color="0.75", label="loss")
        ax.plot(self.lrs, self.smoothed, label="smoothed")
        if self.suggestion is not None:
            ax.axvline(self.suggestion, color="0.4", linestyle="--", label=f"steepest descent: {self.suggestion:.2g}")
        ax.set_xscale("log")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("loss")
        ax.legend()
        return ax


def lr_find(
    model: nn.Module, optimizer: Optimizer, loss_fn: Callable[[nn.Module, Batch], Tensor], data: Iterable[Batch], *,
    start: float = 1e-7, end: float = 1.0, steps: int = 100, smoothing: float = 0.9, divergence: float = 4.0,
) -> LRFinderResult:  # fmt: skip
    r"""Learning-rate range test: train with a rate that grows with each step, and watch the loss.

    .. math:: \eta_i = \eta_0 \, (\eta_{n-1} / \eta_0)^{i / (n-1)}, \qquad i = 0 \dots n-1

    Parameters
    ----------
    model : torch.nn.Module
        In the mode (train or eval) in which it is to be tested.
    optimizer : torch.optim.Optimizer
        Over parameters of the model. Groups with unlike rates keep their ratios; the highest follows :math:`\eta_i`.
    loss_fn : callable
        ``loss_fn(model, batch)``, the scalar loss of a batch, with graph.
    data : iterable
        The batches; run through again when it ends. Not an iterator, which could not be put back.
    start, end : float
        :math:`\eta_0` and :math:`\eta_{n-1}`, 0 < start < end.
    steps : int
        n, >= 2.
    smoothing : float
        Of the moving average, in [0, 1).
    divergence : float
        The test ends once the smoothed loss is above this multiple of its lowest value, > 1.

    Returns
    -------
    LRFinderResult

    Raises
    ------
    TypeError
        If `data` is an iterator, or the loss not a scalar tensor.
    ValueError
        If an argument is not as stated, or `data` is empty.

    Notes
    -----
    Afterwards, also after an error, everything is as before, bit for bit: parameters, buffers, gradients and modes of
    the model, state and rates of the optimizer, the random numbers of torch (CPU and CUDA), NumPy and Python, and the
    generators of a `torch.utils.data.DataLoader` and its sampler.

    References
    ----------
    Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017, arXiv:1506.01186, section 3.3.
    """
    if not 0 < start < end or not math.isfinite(end):
        raise ValueError(f"lr_find: start and end are {start} and {end}; expected 0 < start < end")
    if steps < 2:
        raise ValueError(f"lr_find: steps is {steps}; expected >= 2")
    if not 0 <= smoothing < 1:
        raise ValueError(f"lr_find: smoothing is {smoothing}; expected 0 <= smoothing < 1")
    if not divergence > 1:
        raise ValueError(f"lr_find: divergence is {divergence}; expected > 1")
    if isinstance(data, Iterator):
        raise TypeError(
            f"lr_find: data is an iterator ({type(data).__name__}), which could not be put back; "
            "expected an iterable that starts anew, such as a list or a DataLoader"
        )
    highest = max(float(group["lr"]) for group in optimizer.param_groups)
    if highest <= 0:
        raise ValueError(f"lr_find: the highest lr of optimizer is {highest}; expected > 0: groups keep their ratios")

    lrs: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    average, diverged = 0.0, False
    with _everything_restored(model, optimizer, data):
        base = [float(group["lr"]) / highest for group in optimizer.param_groups]
        batches = _endless(data)
        for step in range(steps):
            lr = start * (end / start) ** (step / (steps - 1))
            for group, scale in zip(optimizer.param_groups, base, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr * scale)
                else:
                    group["lr"] = lr * scale
            optimizer.zero_grad()
            loss = loss_fn(model, next(batches))
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
                raise TypeError(f"lr_find: loss_fn returned {got}; expected a tensor with one element")
            value = float(loss.detach())
            average = smoothing * average + (1 - smoothing) * value
            lrs.append(lr)
            losses.append(value)
            smoothed.append(average / (1 - smoothing ** (step + 1)))
            if not math.isfinite(value) or smoothed[-1] > divergence * min(smoothed) > 0:
                diverged = True
                break
            loss.backward()
            optimizer.step()
    return LRFinderResult(lrs, losses, smoothed, diverged, _steepest(lrs, smoothed, diverged))


def _steepest(lrs: list[float], smoothed: list[float], diverged: bool) -> float | None:
    count = len(lrs) - diverged  # what diverged is no slope to go down
    if count < 2:
        return None
    slope = np.gradient(np.array(smoothed[:count]), np.log(lrs[:count]))
    index = int(slope.argmin())
    return lrs[index] if slope[index] < 0 else None


def _endless(data: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise ValueError("lr_find: data is empty; expected at least one batch")


@contextmanager
def _everything_restored(model: nn.Module, optimizer: Optimizer, data: object) -> Iterator[None]:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for group in optimizer.param_groups:
        tensors.update((id(p), p) for p in group["params"])
    values = {key: t.detach().clone() for key, t in tensors.items()}
    leaves = [t for t in tensors.values() if t.is_leaf]
    grads = [(t, t.grad, t if t.grad is None else t.grad.detach().clone()) for t in leaves]
    modes = [(module, module.training) for module in model.modules()]
    # The test works on a copy of the state, so that afterwards the optimizer has its own tensors back, untouched.
    state = optimizer.state
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]  # a forward may replace them
    generators = _generators(data)
    generator_states = [g.get_state() for g in generators]
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numbers = torch.get_rng_state(), np.random.get_state(), random.getstate()
    optimizer.state = defaultdict(dict, {p: copy.deepcopy(own) for p, own in state.items()})
    for group in optimizer.param_groups:
        group.update({key: copy.deepcopy(value) for key, value in group.items() if key != "params"})
    try:
        yield
    finally:
        with torch.no_grad():
            for key, t in tensors.items():
                t.copy_(values[key])
            for t, grad, value in grads:
                if grad is not None:
                    grad.copy_(value)
                t.grad = grad
        for owner, entries in buffers:
            owner.update(entries)
        for module, training in modes:
            module.training = training
        optimizer.state = state
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            for added in group.keys() - saved.keys() - {"params"}:
                del group[added]
            group.update(saved)
        for generator, generator_state in zip(generators, generator_states, strict=True):
            generator.set_state(generator_state)
        torch.set_rng_state(numbers[0])
        np.random.set_state(numbers[1])
        random.setstate(numbers[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _generators(data: Any) -> list[torch.Generator]:
    """Of a DataLoader and its sampler, each once."""
    sampler = getattr(data, "sampler", None)
    found = [getattr(owner, "generator", None) for owner in (data, sampler)]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
