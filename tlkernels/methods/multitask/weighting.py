r"""Weights of tasks' losses: one loss of several, by the losses alone or by the sizes of their gradients.

Each is an `nn.Module` that is called with the losses of a step and returns the scalar to differentiate. What it learns
are its parameters: give them to the optimizer. What it remembers is in its ``state_dict``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["DWA", "FAMO", "GLS", "IMTLL", "RLW", "STCH", "GradNorm", "Uncertainty", "Uniform", "Weighting"]


class Weighting(nn.Module):
    """The base: checks losses and stacks them.

    Parameters
    ----------
    tasks : int
        Number of losses, at least 1.

    Raises
    ------
    ValueError
        If `tasks` is not positive.
    """

    def __init__(self, tasks: int) -> None:
        super().__init__()
        if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1:
            raise ValueError(f"{type(self).__name__}: tasks is {tasks!r}; expected a positive number of tasks")
        self.tasks = tasks

    def extra_repr(self) -> str:
        """What repr() shows."""
        return f"tasks={self.tasks}"

    def stacked(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        """The losses as one tensor ``[tasks]``, each checked.

        Raises
        ------
        TypeError, ValueError
            If there are more or fewer than `tasks`, or one is not a scalar.
        """
        name = type(self).__name__
        if isinstance(losses, Tensor):
            rows: Sequence[Tensor] = losses.unbind() if losses.dim() else [losses]
        elif isinstance(losses, (list, tuple)):
            rows = losses
        else:
            raise TypeError(f"{name}: losses is a {type(losses).__name__}; expected a tensor or a list of scalars")
        if len(rows) != self.tasks:
            raise ValueError(f"{name}: losses holds {len(rows)}; expected {self.tasks}, one for each task")
        for t, loss in enumerate(rows):
            if not isinstance(loss, Tensor):
                raise TypeError(f"{name}: losses[{t}] is a {type(loss).__name__}; expected a tensor")
            if loss.numel() != 1 or not loss.dtype.is_floating_point:
                raise ValueError(
                    f"{name}: losses[{t}] has dtype {str(loss.dtype).removeprefix('torch.')} and shape "
                    f"{tuple(loss.shape)}; expected one floating-point number"
                )
        wide = torch.promote_types(rows[0].dtype, torch.float32)
        return torch.stack([loss.reshape(()).to(wide) for loss in rows])


class Uniform(Weighting):
    r"""The mean, or sum, of the losses.

    Parameters
    ----------
    tasks : int
    reduction : "mean" or "sum"

    Raises
    ------
    ValueError
        If `reduction` is neither.
    """

    def __init__(self, tasks: int, *, reduction: str = "mean") -> None:
        super().__init__(tasks)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"Uniform: reduction is {reduction!r}; expected 'mean' or 'sum'")
        self.reduction = reduction

    def forward(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        """The scalar to differentiate, of losses ``[tasks]``."""
        total = self.stacked(losses).sum()
        return total / self.tasks if self.reduction == "mean" else total


class Uncertainty(Weighting):
    r"""Weights by homoscedastic uncertainty: :math:`\sum_t L_t / (2\sigma_t^2) + \log \sigma_t`.

    Parameters
    ----------
    tasks : int
    init : float
        First value of :math:`\log \sigma_t^2`, which is what is learned (LibMTL starts at -0.5).

    Raises
    ------
    ValueError
        If `init` is not finite.

    Notes
    -----
    With :math:`s_t = \log \sigma_t^2` the sum is :math:`\sum_t \tfrac12 e^{-s_t} L_t + \tfrac12 s_t`. At the optimum
    :math:`e^{s_t} = L_t`: tasks of large loss weigh less.

    References
    ----------
    Kendall, Gal & Cipolla, Multi-task learning using uncertainty to weigh losses, CVPR 2018, arXiv:1705.07115.
    """

    def __init__(self, tasks: int, *, init: float = 0.0) -> None:
        super().__init__(tasks)
        if not math.isfinite(init):
            raise ValueError(f"Uncertainty: init is {init}; expected a finite number")
        self.log_variance = nn.Parameter(torch.full((tasks,), float(init)))

    def forward(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        """The scalar to differentiate, of losses ``[tasks]``."""
        rows = self.stacked(losses)
        s = self.log_variance.to(rows)
        return 0.5 * (rows * (-s).exp() + s).sum()


class IMTLL(Weighting):
    r"""Impartial multi-task learning by losses (IMTL-L): :math:`\sum_t e^{s_t} L_t - s_t`, with learned :math:`s_t`.

    Parameters
    ----------
    tasks : int

    Notes
    -----
    At the optimum every :math:`e^{s_t} L_t` is 1.

    References
    ----------
    Liu et al., Towards impartial multi-task learning, ICLR 2021.
    """

    def __init__(self, tasks: int) -> None:
        super().__init__(tasks)
        self.log_scale = nn.Parameter(torch.zeros(tasks))

    def forward(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        """The scalar to differentiate, of losses ``[tasks]``."""
        rows = self.stacked(losses)
        s = self.log_scale.to(rows)
        return (s.exp() * rows - s).sum()


class GLS(Weighting):
    r"""Geometric loss strategy: :math:`(\prod_t L_t)^{1/T}`, of positive losses.

    Parameters
    ----------
    tasks : int

    Raises
    ------
    ValueError
        On a call, if a loss is not positive (its logarithm would be no number).

    References
    ----------
    Chennupati et al., MultiNet++, CVPR workshops 2019, arXiv:1904.08492.
    """

    def forward(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        """The scalar to differentiate, of losses ``[tasks]``."""
        rows = self.stacked(losses)
        _check_positive("GLS", rows.detach())
        return rows.log().mean().exp()


def _check_positive(name: str, losses: Tensor) -> None:
    """NaN passes: it shows in the result."""
    bad = (losses <= 0).nonzero()
    if len(bad):
        t = int(bad[0])
        raise ValueError(f"{name}: losses[{t}] is {float(losses[t]):g}; expected > 0")


class RLW(Weighting):
    r"""Random loss weighting: each step's weights are a softmax of normal numbers.

    Parameters
    ----------
    tasks : int
    generator : torch.Generator, optional
        Where the numbers come from; default torch's own. Its state is part of ``state_dict``.

    References
    ----------
    Lin et al., Reasonable effectiveness of random weighting, TMLR 2022, arXiv:2111.10603.
    """

    def __init__(self, tasks: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(tasks)
        self.generator = generator

    def forward(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        """The scalar to differentiate, of losses ``[tasks]``."""
        rows = self.stacked(losses)
        device = self.generator.device if self.generator is not None else torch.device("cpu")
        weights = torch.randn(self.tasks, generator=self.generator, device=device).softmax(0)
        return (weights.to(rows) * rows).sum()

    def get_extra_state(self) -> Tensor | None:
        """The generator's state."""
        return None if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state: Tensor | None) -> None:
        """Continue where the saved generator was."""
        if state is not None and self.generator is not None:
            self.generator.set_state(state)


class DWA(Weighting):
    r"""Dynamic weight average: tasks whose loss falls slowly weigh more.

    Parameters
    ----------
    tasks : int
    temperature : float
        Positive; large values make weights equal. The paper's is 2.

    Raises
    ------
    ValueError
        If `temperature` is not positive.

    Notes
    -----
    :math:`w = T\, \mathrm{softmax}(r / \tau)` with :math:`r_t` the mean loss of the last epoch over that of the one
    before (1 where that was 0); ones in the first two epochs. Call `step` at the end of each epoch. A step with a loss
    that is inf or NaN does not count in the mean.

    References
    ----------
    Liu, Johns & Davison, End-to-end multi-task learning with attention, CVPR 2019, arXiv:1803.10704.
    """

    total: Tensor
    count: Tensor
    history: Tensor
    epochs: Tensor

    def __init__(self, tasks: int, *, temperature: float = 2.0) -> None:
        super().__init__(tasks)
        if not temperature > 0:
            raise ValueError(f"DWA: temperature is {temperature}; expected > 0")
        self.temperature = temperature
        self.register_buffer("total", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("history", torch.ones(2, tasks, dtype=torch.float64))  # the epoch before, the last
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))

    @property
    def weights(self) -> Tensor:
        """The weights ``[tasks]`` of this epoch, float64; their sum is the number of tasks."""
        if int(self.epochs) < 2:
            return torch.ones_like(self.total)
        ratio = torch.where(self.history[0] == 0, 1.0, self.history[1] / self.history[0])
        return self.tasks * (ratio / self.temperature).softmax(0)

    def forward(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        """The scalar to differentiate, of losses ``[tasks]``; remembers the losses for the epoch's mean."""
        rows = self.stacked(losses)
        weights = self.weights.to(rows)
        with torch.no_grad():
            if bool(rows.isfinite().all()):  # an overflow must not stay in the mean
                self.total += rows.to(self.total)
                self.count += 1
        return (weights * rows).sum()

    def step(self) -> None:
        """End an epoch. Without a call since the last one nothing happens."""
        if int(self.count) == 0:
            return
        with torch.no_grad():
            self.history[0] = self.history[1]
            self.history[1] = self.total / self.count
            self.total.zero_()
            self.count.zero_()
            self.epochs += 1


class GradNorm(Weighting):
    r"""Weights that bring the tasks' gradients on the shared parameters to one size, and slow tasks above it.

    Parameters
    ----------
    tasks : int
    shared_parameters : iterable of Tensor
        Where gradients are measured: usually the last shared layer's weight.
    alpha : float
        Strength of the pull towards equal training rates; 0: equal norms. The paper uses 0.12 to 1.5.
    lr : float
        Of the weights' own gradient step.

    Raises
    ------
    ValueError
        If there are no shared parameters, or `alpha` or `lr` is negative; on a call, if a first loss is not positive.

    Notes
    -----
    With :math:`G_t = \|\nabla_\theta w_t L_t\|`, its mean :math:`\bar G`, and :math:`r_t` the task's loss over its
    first, divided by the mean of these ratios, the weights descend

    .. math:: \sum_t \big| G_t - \bar G\, r_t^\alpha \big| ,

    the target being constant, and are then scaled to sum to the number of tasks. The norms of the unweighted gradients
    are all that enters (:math:`G_t = w_t \|\nabla L_t\|`), so one graph serves the weights and the loss that is
    returned, and the weights' step needs no second derivative. A step with a loss or norm that is inf or NaN leaves the
    weights as they are, and first losses are those of the first step without. A list of losses costs a backward pass of
    each task; one tensor of them as many passes of all.

    References
    ----------
    Chen et al., GradNorm, ICML 2018, arXiv:1711.02257.
    """

    weights: Tensor
    first: Tensor
    started: Tensor

    def __init__(
        self, tasks: int, shared_parameters: Iterable[Tensor], *, alpha: float = 1.5, lr: float = 0.025
    ) -> None:
        super().__init__(tasks)
        self.shared = [p for p in shared_parameters if p.requires_grad]
        if not self.shared:
            raise ValueError("GradNorm: shared_parameters holds none that requires a gradient; expected at least one")
        for name, value in (("alpha", alpha), ("lr", lr)):
            if not value >= 0:
                raise ValueError(f"GradNorm: {name} is {value}; expected >= 0")
        self.alpha, self.lr = alpha, lr
        self.register_buffer("weights", torch.ones(tasks, device=self.shared[0].device))
        self.register_buffer("first", torch.ones(tasks, device=self.shared[0].device))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        """The scalar to differentiate, of losses ``[tasks]``, with the weights of before; then moves the weights."""
        if isinstance(losses, Tensor):
            losses = list(losses.unbind()) if losses.dim() else [losses]
        rows = self.stacked(losses)
        if not bool(self.started):
            _check_positive("GradNorm", rows.detach())
        total = (self.weights.to(rows, copy=True) * rows).sum()
        if not torch.is_grad_enabled():
            return total
        norms = []
        for loss in losses:  # not of `rows`: a row's gradient goes through the graphs of all that are stacked
            grads = torch.autograd.grad(loss, self.shared, retain_graph=True, allow_unused=True)
            sizes = [g.detach().to(rows.dtype).norm() for g in grads if g is not None]
            norms.append(torch.stack(sizes).norm() if sizes else rows.new_zeros(()))
        self._move(torch.stack(norms).to(self.weights), rows.detach().to(self.weights))
        return total

    @torch.no_grad()
    def _move(self, norms: Tensor, losses: Tensor) -> None:
        if not bool(self.started):
            if not bool(losses.isfinite().all()):
                return
            self.first.copy_(losses)
            self.started.fill_(True)
        ratio = losses / self.first
        rate = ratio / ratio.mean()
        sizes = self.weights * norms
        slope = (sizes - sizes.mean() * rate**self.alpha).sign() * norms
        moved = (self.weights - self.lr * slope).clamp_(min=1e-6)  # a weight below 0 would turn its task around
        if bool(moved.isfinite().all()):  # an overflow of mixed precision must not stay in the weights
            self.weights.copy_(moved * (self.tasks / moved.sum()))


class FAMO(Weighting):
    r"""Fast adaptive multi-task optimization: equal decrease of all losses' logarithms, by the losses alone.

    Parameters
    ----------
    tasks : int
    lr : float
        Of the logits' Adam.
    weight_decay : float
        Of the logits.
    min_losses : Tensor [tasks], optional
        Lower bounds of the losses; default 0.
    eps : float
        Added below the logarithm.

    Raises
    ------
    ValueError
        If a number is negative or `min_losses` has another shape; on a call or `update`, if a loss is not above its
        bound; `update` without a call before it.

    Notes
    -----
    With :math:`z = \mathrm{softmax}(\xi)` and :math:`D_t = L_t - b_t + \epsilon` the loss is
    :math:`c \sum_t z_t \log D_t`, :math:`c = (\sum_t z_t / D_t)^{-1}` a constant. After the model's step call `update`
    with the losses of the same batch: :math:`\xi` descends along
    :math:`J_z^T (\log D^{before} - \log D^{after})`. An `update` with a loss that is inf or NaN, before or after,
    leaves the weights as they are.

    References
    ----------
    Liu et al., FAMO: fast adaptive multitask optimization, NeurIPS 2023, arXiv:2306.03792.
    """

    bounds: Tensor
    before: Tensor
    called: Tensor

    def __init__(
        self, tasks: int, *, lr: float = 0.025, weight_decay: float = 1e-3, min_losses: Tensor | None = None,
        eps: float = 1e-8,
    ) -> None:  # fmt: skip
        super().__init__(tasks)
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
            if not value >= 0:
                raise ValueError(f"FAMO: {name} is {value}; expected >= 0")
        if min_losses is not None and tuple(min_losses.shape) != (tasks,):
            raise ValueError(f"FAMO: min_losses has shape {tuple(min_losses.shape)}; expected ({tasks},)")
        self.eps = eps
        self.logits = nn.Parameter(torch.zeros(tasks), requires_grad=False)  # not the model's optimizer's
        self.register_buffer("bounds", torch.zeros(tasks) if min_losses is None else min_losses.detach().float())
        self.register_buffer("before", torch.full((tasks,), math.nan))
        self.register_buffer("called", torch.zeros((), dtype=torch.bool))
        self.optimizer = torch.optim.Adam([self.logits], lr=lr, weight_decay=weight_decay)

    def _distance(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        rows = self.stacked(losses)
        return rows - self.bounds.to(rows) + self.eps

    def forward(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        """The scalar to differentiate, of losses ``[tasks]``."""
        distance = self._distance(losses)
        _check_positive("FAMO", distance.detach())
        z = self.logits.softmax(0).to(distance)
        self.before.copy_(distance.detach())
        self.called.fill_(True)
        return (z * distance.log()).sum() / (z / distance.detach()).sum()

    def update(self, losses: Tensor | Sequence[Tensor]) -> None:
        """Move the weights by the same batch's losses ``[tasks]`` after the model's step."""
        if not bool(self.called):
            raise ValueError("FAMO: update was called before the weighting itself; expected a step in between")
        with torch.no_grad():
            distance = self._distance(losses).to(self.before)
            _check_positive("FAMO", distance)
            delta = self.before.log() - distance.log()
            if not bool(delta.isfinite().all()):  # it would stay in the logits and in Adam's moments
                return
            z = self.logits.softmax(0)
            self.logits.grad = z * (delta - (z * delta).sum())
        self.optimizer.step()
        self.logits.grad = None

    def get_extra_state(self) -> dict[str, object]:
        """The logits' optimizer."""
        return copy.deepcopy(self.optimizer.state_dict())  # its own tensors: a state that is kept must not move on

    def set_extra_state(self, state: dict[str, object]) -> None:
        """Continue with the saved optimizer."""
        self.optimizer.load_state_dict(copy.deepcopy(state))


class STCH(Weighting):
    r"""Smooth Tchebycheff scalarization: :math:`\mu \log \sum_t \exp(w_t (L_t - z_t) / \mu)`.

    Parameters
    ----------
    tasks : int
    mu : float
        Smoothness, positive: small values come close to the largest weighted loss.
    weights : Tensor [tasks], optional
        Preference, none negative; default 1 / tasks each.
    ideal : Tensor [tasks], optional
        The ideal point z; default 0.

    Raises
    ------
    ValueError
        If `mu` is not positive, `weights` or `ideal` has another shape, or a weight is negative.

    References
    ----------
    Lin et al., Smooth Tchebycheff scalarization for multi-objective optimization, ICML 2024, arXiv:2402.19078.
    """

    weights: Tensor
    ideal: Tensor

    def __init__(
        self, tasks: int, *, mu: float = 1.0, weights: Tensor | None = None, ideal: Tensor | None = None
    ) -> None:
        super().__init__(tasks)
        if not mu > 0:
            raise ValueError(f"STCH: mu is {mu}; expected > 0")
        self.mu = mu
        for name, value, default in (
            ("weights", weights, torch.full((tasks,), 1.0 / tasks)), ("ideal", ideal, torch.zeros(tasks)),
        ):  # fmt: skip
            if value is not None and tuple(value.shape) != (tasks,):
                raise ValueError(f"STCH: {name} has shape {tuple(value.shape)}; expected ({tasks},)")
            self.register_buffer(name, default if value is None else value.detach().clone())
        if not bool((self.weights >= 0).all()):
            raise ValueError(f"STCH: weights is {self.weights.tolist()}; expected no negative number")

    def forward(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        """The scalar to differentiate, of losses ``[tasks]``."""
        rows = self.stacked(losses)
        return self.mu * (self.weights.to(rows) * (rows - self.ideal.to(rows)) / self.mu).logsumexp(0)
