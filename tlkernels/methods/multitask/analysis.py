r"""What tasks do to each other: conflicts of gradients, the effect of one's step on another's loss, groups, gates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

__all__ = [
    "ConflictReport",
    "affinity",
    "conflict_rate",
    "cosine_gate",
    "cosines",
    "delta_m",
    "group_tasks",
    "magnitude_similarity",
]


def _gram(op: str, gram: Tensor) -> Tensor:
    if not isinstance(gram, Tensor) or gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        got = tuple(gram.shape) if isinstance(gram, Tensor) else type(gram).__name__
        raise ValueError(f"{op}: gram is {got}; expected a square matrix (tasks, tasks)")
    return gram.detach().to("cpu", torch.float64)


def cosines(gram: Tensor) -> Tensor:
    r"""Cosines of the tasks' gradients.

    Parameters
    ----------
    gram : Tensor [T, T]
        Inner products: `tlkernels.ops.task_gram`, or the `Step` of `backward`.

    Returns
    -------
    float64 Tensor [T, T], on the CPU
        NaN in the rows and columns of gradients that are 0: they have no direction.

    Raises
    ------
    ValueError
        If it is no square matrix.
    """
    g = _gram("cosines", gram)
    lengths = g.diagonal().clamp(min=0).sqrt()
    out = (g / lengths[:, None] / lengths).clamp(-1, 1)
    out[lengths == 0], out[:, lengths == 0] = math.nan, math.nan
    return out


def _pairs(matrix: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(len(matrix), len(matrix), offset=1)
    values = matrix[rows, columns]
    return values[~values.isnan()]


def conflict_rate(gram: Tensor) -> float:
    r"""The share of pairs of tasks whose gradients have a negative cosine; NaN where there is no pair.

    Parameters
    ----------
    gram : Tensor [T, T]

    Raises
    ------
    ValueError
        If it is no square matrix.

    References
    ----------
    Yu et al., Gradient surgery for multi-task learning, NeurIPS 2020, arXiv:2001.06782.
    """
    pairs = _pairs(cosines(gram))
    return float((pairs < 0).double().mean())


def magnitude_similarity(gram: Tensor) -> Tensor:
    r"""How alike the gradients' lengths are: :math:`2 \|g_i\| \|g_j\| / (\|g_i\|^2 + \|g_j\|^2)`, 1 for equal ones.

    NaN where both are 0.

    Parameters
    ----------
    gram : Tensor [T, T]

    Returns
    -------
    float64 Tensor [T, T], on the CPU

    Raises
    ------
    ValueError
        If it is no square matrix.

    References
    ----------
    Yu et al., Gradient surgery for multi-task learning, NeurIPS 2020, arXiv:2001.06782, definition 2.
    """
    square = _gram("magnitude_similarity", gram).diagonal().clamp(min=0)
    return 2 * (square[:, None] * square).sqrt() / (square[:, None] + square)


class ConflictReport:
    """Cosines and conflicts over training: `update` it with each step's Gram matrix.

    Parameters
    ----------
    names : sequence of str
        The tasks.

    Raises
    ------
    ValueError
        If there is no name; on `update`, if the matrix is of another size.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        if not self.names:
            raise ValueError("ConflictReport: names is empty; expected the tasks' names")
        tasks = len(self.names)
        self.steps = 0
        self._sum = np.zeros((tasks, tasks))
        self._count = np.zeros((tasks, tasks))
        self._negative = np.zeros((tasks, tasks))
        self.rates: list[float] = []

    def update(self, gram: Tensor) -> None:
        """Add a step's Gram matrix ``[T, T]``."""
        g = _gram("ConflictReport", gram)
        if len(g) != len(self.names):
            raise ValueError(f"ConflictReport: gram is {tuple(g.shape)}; expected {len(self.names)} tasks")
        c = cosines(g).numpy()
        seen = ~np.isnan(c)
        self._sum += np.where(seen, c, 0)
        self._count += seen
        self._negative += np.where(seen, c < 0, False)
        self.rates.append(conflict_rate(g))
        self.steps += 1

    @property
    def mean_cosine(self) -> NDArray[np.float64]:
        """Mean cosine of each pair ``[T, T]``; NaN where a gradient was always 0."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self._sum / self._count)

    @property
    def conflicts(self) -> NDArray[np.float64]:
        """Share of the steps in which each pair conflicted ``[T, T]``."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self._negative / self._count)

    def rate(self) -> float:
        """Mean conflict rate of all steps that had pairs."""
        return float(np.nanmean(self.rates)) if any(not math.isnan(r) for r in self.rates) else math.nan

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "names": list(self.names), "steps": self.steps, "sum": self._sum.copy(), "count": self._count.copy(),
            "negative": self._negative.copy(), "rates": list(self.rates),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, of the same tasks."""
        if list(state["names"]) != self.names:
            raise ValueError(f"ConflictReport: state_dict has names {state['names']}; expected {self.names}")
        self.steps, self.rates = state["steps"], list(state["rates"])
        self._sum, self._count, self._negative = (state[k].copy() for k in ("sum", "count", "negative"))

    def plot(self, ax: Any = None) -> Any:
        """Draw the mean cosines as a heat map, with the share of conflicts in each cell; returns the Axes.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        if ax is None:
            try:
                import matplotlib.pyplot as plt
            except ImportError as error:
                raise ImportError("ConflictReport.plot needs matplotlib: pip install matplotlib") from error
            _, ax = plt.subplots()
        ax.imshow(self.mean_cosine, vmin=-1, vmax=1, cmap="RdBu")
        for i, j in itertools.product(range(len(self.names)), repeat=2):
            ax.text(j, i, f"{self.mean_cosine[i, j]:.2f}\n{self.conflicts[i, j]:.0%}", ha="center", va="center")
        ax.set_xticks(range(len(self.names)), self.names)
        ax.set_yticks(range(len(self.names)), self.names)
        ax.set_title("mean cosine, share of conflicts")
        return ax


def affinity(
    losses: Callable[[], Sequence[Tensor]],
    shared_parameters: Iterable[Tensor],
    *,
    lr: float,
    buffers: Iterable[Tensor] = (),
) -> NDArray[np.float64]:
    r"""Task affinity by a step ahead: what a step of task i on the shared parameters does to the loss of task j.

    Parameters
    ----------
    losses : callable
        Returns the T losses of one and the same batch, each time it is called.
    shared_parameters : iterable of Tensor
    lr : float
        Of the step that is tried.
    buffers : iterable of Tensor
        What a forward pass changes, to be put back as well: ``model.buffers()`` where batch norms are training.

    Returns
    -------
    float64 array [T, T]
        :math:`Z_{ij} = 1 - L_j(\theta - \eta \nabla_\theta L_i) / L_j(\theta)`: positive where task i helps task j.

    Raises
    ------
    ValueError
        If `lr` is not positive, no parameter requires a gradient, `losses` returns none, or a loss is 0: there is
        nothing to compare with. Parameters and buffers are put back whatever happens.

    Notes
    -----
    Every call of `losses` draws the same random numbers (torch's default generators, which are where they were
    afterwards): the difference between two of them is the step's, not dropout's.

    References
    ----------
    Fifty et al., Efficiently identifying task groupings for multi-task learning, NeurIPS 2021, arXiv:2109.04617.
    """
    if not lr > 0:
        raise ValueError(f"affinity: lr is {lr}; expected > 0")
    shared = [p for p in shared_parameters if p.requires_grad]
    if not shared:
        raise ValueError("affinity: shared_parameters holds none that requires a gradient; expected at least one")
    changing = [*shared, *buffers]
    before = [p.detach().clone() for p in changing]
    devices = sorted({p.get_device() for p in shared if p.is_cuda})
    try:
        with torch.random.fork_rng(devices):
            now = list(losses())
        if not now:
            raise ValueError("affinity: losses returns none; expected at least one loss")
        grads = [
            torch.autograd.grad(loss, shared, retain_graph=t + 1 < len(now), allow_unused=True)
            for t, loss in enumerate(now)
        ]
        base = np.array([float(loss.detach()) for loss in now])
        if (base == 0).any():
            raise ValueError(f"affinity: losses[{int((base == 0).argmax())}] is 0; expected a number to divide by")
        out = np.empty((len(now), len(now)))
        for i, row in enumerate(grads):
            with torch.no_grad(), torch.random.fork_rng(devices):
                for p, start in zip(changing, before, strict=True):
                    p.copy_(start)
                for p, g in zip(shared, row, strict=True):
                    if g is not None:
                        p.sub_(lr * g)
                out[i] = 1 - np.array([float(loss) for loss in losses()]) / base
    finally:
        with torch.no_grad():
            for p, start in zip(changing, before, strict=True):
                p.copy_(start)
    return out


def group_tasks(affinities: ArrayLike, groups: int) -> list[tuple[int, ...]]:
    r"""The groups of tasks to train together, at most `groups` of them, that serve every task best.

    Parameters
    ----------
    affinities : array [T, T]
        ``affinities[i, j]``: what training with task i gives task j.
    groups : int
        Networks that may be trained.

    Returns
    -------
    list of tuples of ints
        Groups may overlap; each task is served by the group that is best for it. Their order is by size and number.

    Raises
    ------
    ValueError
        If it is no square matrix of finite numbers, or of more than 12 tasks, or `groups` is not positive.

    Notes
    -----
    A task's score in a group is the mean affinity of the others for it (0 alone). The set of groups with the largest
    total of best scores is found by branch and bound over all 2^T - 1 groups, bounded by every task's best score
    anywhere and by what each further group would add alone.

    References
    ----------
    Standley et al., Which tasks should be learned together, ICML 2020, arXiv:1905.07553. Fifty et al., NeurIPS 2021.
    """
    z = np.asarray(affinities, dtype=np.float64)
    if z.ndim != 2 or z.shape[0] != z.shape[1] or not np.isfinite(z).all():
        raise ValueError(f"group_tasks: affinities has shape {z.shape}; expected a square matrix of finite numbers")
    tasks = len(z)
    if not 1 <= tasks <= 12:
        raise ValueError(f"group_tasks: affinities is of {tasks} tasks; expected 1 to 12: all groups of them are tried")
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"group_tasks: groups is {groups!r}; expected an integer >= 1")
    candidates = [c for size in range(1, tasks + 1) for c in itertools.combinations(range(tasks), size)]
    scores = np.full((len(candidates), tasks), -np.inf)
    for k, members in enumerate(candidates):
        for j in members:
            others = [i for i in members if i != j]
            scores[k, j] = z[others, j].mean() if others else 0.0
    order = np.argsort(-np.where(np.isfinite(scores), scores, 0).sum(1), kind="stable")
    # a task that no group serves costs more than any choice of groups can gain
    unserved = -4.0 * tasks * (1.0 + float(np.abs(z).max()))
    table = np.where(np.isfinite(scores), scores, unserved)[order]
    remaining = np.maximum.accumulate(table[::-1])[::-1]  # every task's best score in this group or a later one
    best: tuple[float, list[int]] = (-np.inf, [])

    def search(at: int, chosen: list[int], have: NDArray[np.float64]) -> None:
        nonlocal best
        totals = np.maximum(have, table[at:]).sum(1)
        top = int(totals.argmax())
        if totals[top] > best[0] + 1e-12:
            best = float(totals[top]), [*chosen, at + top]
        slots = groups - len(chosen) - 1
        if slots == 0:
            return
        # more groups add at most what each would alone, and no task gets more than its best score
        gains = np.maximum.accumulate((totals - have.sum())[::-1])[::-1]
        bounds = np.minimum(totals + slots * gains, np.maximum(np.maximum(have, table[at:]), remaining[at:]).sum(1))
        for k in range(len(totals) - 1):
            if bounds[k] > best[0] + 1e-12:
                search(at + k + 1, [*chosen, at + k], np.maximum(have, table[at + k]))

    groups = min(groups, tasks)  # more cannot help: each task is served by one
    search(0, [], np.full(tasks, unserved))
    best = best[0], [int(order[k]) for k in best[1]]
    # a group that serves nobody best is left out
    used = sorted({int(k) for k in scores[best[1]].argmax(0)})
    return sorted((candidates[best[1][k]] for k in used), key=lambda c: (len(c), c))


def cosine_gate(gram: Tensor, main: int = 0, *, weighted: bool = False) -> Tensor:
    r"""Which auxiliary tasks to follow: those whose gradient does not conflict with the main task's.

    Parameters
    ----------
    gram : Tensor [T, T]
    main : int
        The main task.
    weighted : bool
        Weight by the cosine itself instead of 1.

    Returns
    -------
    float64 Tensor [T], on gram's device
        Weights for `tlkernels.ops.task_combine`: 1 for the main task; for the others 1 (or the cosine) where the
        cosine is positive, else 0.

    Raises
    ------
    ValueError
        If it is no square matrix or `main` is no task.

    References
    ----------
    Du et al., Adapting auxiliary losses using gradient similarity, 2018, arXiv:1812.02224.
    """
    c = cosines(gram)
    if not 0 <= main < len(c):
        raise ValueError(f"cosine_gate: main is {main}; expected a task below {len(c)}")
    row = c[main].nan_to_num(0.0)
    weights = row.clamp(min=0) if weighted else (row > 0).double()
    weights[main] = 1.0
    return weights.to(gram.device)


def delta_m(metrics: ArrayLike, baselines: ArrayLike, higher_is_better: Sequence[bool]) -> float:
    r"""Mean relative gain of a multi-task model on its single-task baselines, in percent.

    Parameters
    ----------
    metrics, baselines : array [M]
        Of the multi-task model, and of one model a task.
    higher_is_better : sequence of M bools

    Returns
    -------
    float
        :math:`\frac{100}{M} \sum_i (-1)^{l_i} (m_i - b_i) / b_i`, with l = 1 where lower is better: positive is a gain.

    Raises
    ------
    ValueError
        If lengths differ or a baseline is 0.

    References
    ----------
    Maninis et al., Attentive single-tasking of multiple tasks, CVPR 2019, arXiv:1904.08918.
    """
    m, b = np.asarray(metrics, dtype=np.float64), np.asarray(baselines, dtype=np.float64)
    if m.ndim != 1 or m.shape != b.shape or len(higher_is_better) != len(m) or not len(m):
        raise ValueError(
            f"delta_m: metrics has shape {m.shape}, baselines {b.shape}, higher_is_better {len(higher_is_better)}; "
            f"expected one number of each for every metric"
        )
    if (b == 0).any():
        raise ValueError(f"delta_m: baselines[{int((b == 0).argmax())}] is 0; expected a number to divide by")
    signs = np.where(np.asarray(higher_is_better, dtype=bool), 1.0, -1.0)
    return float(100 * (signs * (m - b) / b).mean())
