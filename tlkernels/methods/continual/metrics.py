r"""The accuracy matrix of a sequence of tasks, and what is read from it.

:math:`R_{t,j}` is the accuracy on task j after task t was learned, tasks counted from 0. With T tasks learned:

.. math::
    ACC = \frac1T \sum_j R_{T-1,j}, \qquad
    BWT = \frac1{T-1} \sum_{j<T-1} (R_{T-1,j} - R_{j,j}), \qquad
    FWT = \frac1{T-1} \sum_{j>0} (R_{j-1,j} - b_j), \\
    F = \frac1{T-1} \sum_{j<T-1} \Big( \max_{j \le t < T-1} R_{t,j} - R_{T-1,j} \Big), \qquad
    I = \frac1T \sum_j (R^{joint}_j - R_{j,j}) .
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["AccuracyMatrix", "summarize"]


class AccuracyMatrix:
    r"""The accuracies of all tasks after each task, filled as a run goes on.

    Parameters
    ----------
    tasks : int
        T, >= 1.
    baseline : sequence of T floats, optional
        Accuracy :math:`b_j` of the model before any training, for `forward_transfer`.
    joint : sequence of T floats, optional
        Accuracy :math:`R^{joint}_j` on task j of a model trained on all of the tasks up to j at once, for
        `intransigence`.
    names : sequence of T str, optional
        For plots. By default the numbers.

    Attributes
    ----------
    matrix : numpy.ndarray [T, T], float64
        A copy; NaN where nothing was entered.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated; an accuracy is not in [0, 1].

    References
    ----------
    Lopez-Paz and Ranzato, NeurIPS 2017, arXiv:1706.08840 (ACC, BWT, FWT). Chaudhry et al., ECCV 2018, arXiv:1801.10112
    (forgetting, intransigence). Rebuffi et al., CVPR 2017, arXiv:1611.07725 (average incremental accuracy).

    Examples
    --------
    >>> r = AccuracyMatrix(2, baseline=[0.5, 0.5])
    >>> r.update(0, [0.9, 0.6])
    >>> r.update(1, [0.7, 0.8])
    >>> round(r.average_accuracy(), 2), round(r.forgetting(), 2), round(r.forward_transfer(), 2)
    (0.75, 0.2, 0.1)
    """

    def __init__(
        self, tasks: int, *, baseline: ArrayLike | None = None, joint: ArrayLike | None = None,
        names: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        if isinstance(tasks, bool) or not isinstance(tasks, (int, np.integer)):
            raise TypeError(f"AccuracyMatrix: tasks is a {type(tasks).__name__}; expected a whole number")
        if tasks < 1:
            raise ValueError(f"AccuracyMatrix: tasks is {tasks}; expected >= 1")
        self.tasks = int(tasks)
        self.baseline = None if baseline is None else self._row("baseline", baseline)
        self.joint = None if joint is None else self._row("joint", joint)
        self.names = [str(t) for t in range(self.tasks)] if names is None else [str(name) for name in names]
        if len(self.names) != self.tasks:
            raise ValueError(f"AccuracyMatrix: names has {len(self.names)} entries; expected {self.tasks}")
        self._r: NDArray[np.float64] = np.full((self.tasks, self.tasks), np.nan)

    def _row(self, name: str, values: ArrayLike) -> NDArray[np.float64]:
        """T accuracies; NaN where one is not known."""
        try:
            row = np.array(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"AccuracyMatrix: {name} is a {type(values).__name__}; expected numbers") from error
        if row.ndim != 1 or not len(row) <= self.tasks:
            raise ValueError(f"AccuracyMatrix: {name} has shape {row.shape}; expected {self.tasks} accuracies")
        if len(row) < self.tasks and name in ("baseline", "joint"):
            raise ValueError(f"AccuracyMatrix: {name} has {len(row)} accuracies; expected {self.tasks}")
        bad = row[~(np.isnan(row) | ((row >= 0) & (row <= 1)))]
        if len(bad):
            raise ValueError(f"AccuracyMatrix: {name} has {bad[0]}; expected accuracies in [0, 1]")
        return row

    def _task(self, name: str, value: int) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"AccuracyMatrix: {name} is a {type(value).__name__}; expected a whole number")
        if not 0 <= value < self.tasks:
            raise ValueError(f"AccuracyMatrix: {name} is {value}; expected one of 0 to {self.tasks - 1}")
        return int(value)

    def update(self, trained: int, accuracies: ArrayLike | Mapping[int, float]) -> None:
        """Enter the accuracies after a task.

        Parameters
        ----------
        trained : int
            The task that was learned last, from 0.
        accuracies : sequence of floats or mapping of int to float
            Of the tasks 0, 1, ... (at most T, NaN where one was not measured), or by task. Others stay as they are.

        Raises
        ------
        TypeError, ValueError
            If one is not as stated; nothing has changed then.
        """
        t = self._task("trained", trained)
        if isinstance(accuracies, Mapping):
            columns = [self._task("accuracies", j) for j in accuracies]
            row = self._row("accuracies", list(accuracies.values()))
        else:
            row = self._row("accuracies", accuracies)
            columns = list(range(len(row)))
        if not columns:
            raise ValueError("AccuracyMatrix: accuracies is empty; expected one at least")
        self._r[t, columns] = row

    @property
    def matrix(self) -> NDArray[np.float64]:
        """The matrix, a copy."""
        return self._r.copy()

    @property
    def learned(self) -> int:
        """The tasks learned so far: the last row that has an entry, and those before it."""
        rows = np.flatnonzero(~np.isnan(self._r).all(1))
        return int(rows[-1]) + 1 if len(rows) else 0

    def _entry(self, of: str, t: int, j: int) -> float:
        value = float(self._r[t, j])
        if math.isnan(value):
            raise ValueError(f"AccuracyMatrix: {of} needs the accuracy of task {j} after task {t}, which is missing")
        return value

    def _after(self, of: str, least: int, after: int | None) -> int:
        """The last task to count, which has `least` tasks before and with it."""
        last = self.learned - 1 if after is None else self._task("after", after)
        if last + 1 < least:
            raise ValueError(f"AccuracyMatrix: {of} after {last + 1} tasks; expected {least} at least")
        return last

    def average_accuracy(self, after: int | None = None) -> float:
        """Mean accuracy of the tasks learned so far.

        Parameters
        ----------
        after : int, optional
            The task learned last, from 0. By default the last that was entered; so for all of these.

        Raises
        ------
        ValueError
            If an entry that counts is missing, or nothing was learned; so for all of these.
        """
        of = "average_accuracy"
        last = self._after(of, 1, after)
        return math.fsum(self._entry(of, last, j) for j in range(last + 1)) / (last + 1)

    def average_incremental_accuracy(self, after: int | None = None) -> float:
        """Mean of `average_accuracy` after each of the tasks so far."""
        last = self._after("average_incremental_accuracy", 1, after)
        return math.fsum(self.average_accuracy(t) for t in range(last + 1)) / (last + 1)

    def forgetting(self, after: int | None = None) -> float:
        """Mean, over the earlier tasks, of how far their accuracy is below its best since they were learned.

        Negative where they got better. It needs two tasks.
        """
        of = "forgetting"
        last = self._after(of, 2, after)
        lost = [
            max(self._entry(of, t, j) for t in range(j, last)) - self._entry(of, last, j) for j in range(last)
        ]  # fmt: skip
        return math.fsum(lost) / last

    def backward_transfer(self, after: int | None = None) -> float:
        """Mean, over the earlier tasks, of how much their accuracy has changed since they were learned.

        It needs two tasks.
        """
        of = "backward_transfer"
        last = self._after(of, 2, after)
        return math.fsum(self._entry(of, last, j) - self._entry(of, j, j) for j in range(last)) / last

    def forward_transfer(self, after: int | None = None) -> float:
        """Mean, over the tasks but the first, of their accuracy just before they were learned above `baseline`.

        It needs two tasks, and the baseline.
        """
        of = "forward_transfer"
        last = self._after(of, 2, after)
        base = self._reference(of, "baseline", self.baseline)
        return math.fsum(self._entry(of, j - 1, j) - base[j] for j in range(1, last + 1)) / last

    def intransigence(self, after: int | None = None) -> float:
        """Mean, over the tasks so far, of how far the accuracy just after learning them is below `joint`.

        Chaudhry et al. give it for a single task, the k-th; this is the mean of theirs over the tasks.
        """
        of = "intransigence"
        last = self._after(of, 1, after)
        joint = self._reference(of, "joint", self.joint)
        return math.fsum(joint[j] - self._entry(of, j, j) for j in range(last + 1)) / (last + 1)

    @staticmethod
    def _reference(of: str, name: str, values: NDArray[np.float64] | None) -> NDArray[np.float64]:
        if values is None or bool(np.isnan(values).any()):
            raise ValueError(f"AccuracyMatrix: {of} needs {name}, which is missing; expected {name}=... at the start")
        return values

    def summary(self, after: int | None = None) -> dict[str, float]:
        """Return all measures that the entries, and the references given, allow, by their names."""
        last = self._after("summary", 1, after)
        names = ["average_accuracy", "average_incremental_accuracy"]
        if last:
            names += ["forgetting", "backward_transfer"]
            names += ["forward_transfer"] if self.baseline is not None else []
        names += ["intransigence"] if self.joint is not None else []
        found = {}
        for name in names:
            try:
                found[name] = float(getattr(self, name)(last))
            except ValueError:  # an entry above the diagonal was not measured
                if name != "forward_transfer":
                    raise
        return found

    def plot(self, ax: Any = None, *, annotate: bool = True, cmap: str = "viridis") -> Any:
        """Draw the matrix as a heat map.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            By default new ones.
        annotate : bool
            Write the numbers. Default True.
        cmap : str

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError("AccuracyMatrix.plot needs matplotlib: pip install matplotlib") from error
        if ax is None:
            _, ax = plt.subplots(figsize=(1.2 + 0.6 * self.tasks, 1 + 0.6 * self.tasks))
        image = ax.imshow(np.ma.masked_invalid(self._r), vmin=0.0, vmax=1.0, cmap=cmap)
        ax.set_xticks(range(self.tasks), self.names)
        ax.set_yticks(range(self.tasks), self.names)
        ax.set_xlabel("accuracy on task")
        ax.set_ylabel("after task")
        if annotate:
            for (t, j), value in np.ndenumerate(self._r):
                if not math.isnan(value):
                    # dark cells of a map such as viridis are the low ones
                    red, green, blue = image.cmap(image.norm(value))[:3]
                    light = 0.299 * red + 0.587 * green + 0.114 * blue
                    ax.text(
                        j, t, f"{value:.2f}", ha="center", va="center", fontsize=8, color="k" if light > 0.5 else "w"
                    )
        ax.figure.colorbar(image, ax=ax, label="accuracy", shrink=0.8)
        return ax

    def state_dict(self) -> dict[str, Any]:
        """Return the matrix and references as lists and numbers, None for what is missing."""

        def plain(values: NDArray[np.float64] | None) -> Any:
            return None if values is None else [None if math.isnan(v) else float(v) for v in values]

        return {
            "tasks": self.tasks, "names": list(self.names), "matrix": [plain(row) for row in self._r],
            "baseline": plain(self.baseline), "joint": plain(self.joint),
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises
        ------
        ValueError
            If it is of another number of tasks, or lacks something; nothing has changed then.
        """
        missing = sorted({"tasks", "names", "matrix", "baseline", "joint"} - set(state_dict))
        if missing:
            raise ValueError(f"AccuracyMatrix: state_dict lacks {missing[0]!r}; expected what state_dict() returns")
        if state_dict["tasks"] != self.tasks:
            raise ValueError(f"AccuracyMatrix: state_dict has {state_dict['tasks']} tasks; expected {self.tasks}")
        fresh = AccuracyMatrix(
            self.tasks, names=state_dict["names"],
            **{name: _with_nan(state_dict[name]) for name in ("baseline", "joint")},
        )  # fmt: skip
        if len(state_dict["matrix"]) != self.tasks:
            raise ValueError(f"AccuracyMatrix: state_dict has {len(state_dict['matrix'])} rows; expected {self.tasks}")
        for t, row in enumerate(state_dict["matrix"]):
            fresh.update(t, _with_nan(row) or [])
        self.names, self.baseline, self.joint, self._r = fresh.names, fresh.baseline, fresh.joint, fresh._r

    def to_json(self) -> str:
        """Return `state_dict` as JSON."""
        return json.dumps(self.state_dict())

    @classmethod
    def from_json(cls, text: str) -> AccuracyMatrix:
        """Make one from `to_json`'s text.

        Raises
        ------
        ValueError
            If it is no such JSON.
        """
        state = json.loads(text)
        if not isinstance(state, dict) or "tasks" not in state:
            raise ValueError("AccuracyMatrix: text is not what to_json returns; expected an object with 'tasks'")
        found = cls(state["tasks"])
        found.load_state_dict(state)
        return found


def _with_nan(values: Sequence[float | None] | None) -> list[float] | None:
    return None if values is None else [math.nan if v is None else v for v in values]


def summarize(runs: Sequence[AccuracyMatrix]) -> dict[str, tuple[float, float]]:
    """Mean and spread over seeds of every measure that all runs have.

    Parameters
    ----------
    runs : sequence of AccuracyMatrix
        One for each seed, of equal length.

    Returns
    -------
    dict of str to (float, float)
        Mean and sample standard deviation (n - 1; NaN for a single run), by the names of `AccuracyMatrix.summary`.

    Raises
    ------
    TypeError, ValueError
        If there is none, one is no AccuracyMatrix, or they differ in their number of tasks.
    """
    if not runs:
        raise ValueError("summarize: runs is empty; expected one AccuracyMatrix at least")
    for run in runs:
        if not isinstance(run, AccuracyMatrix):
            raise TypeError(f"summarize: runs has a {type(run).__name__}; expected AccuracyMatrix objects")
        if (run.tasks, run.learned) != (runs[0].tasks, runs[0].learned):
            raise ValueError(
                f"summarize: runs have {run.learned} of {run.tasks} and {runs[0].learned} of {runs[0].tasks} tasks; "
                "expected equal numbers"
            )
    found = [run.summary() for run in runs]
    names = [name for name in found[0] if all(name in one for one in found)]
    return {
        name: (
            float(np.mean([one[name] for one in found])),
            float(np.std([one[name] for one in found], ddof=1)) if len(found) > 1 else math.nan,
        )
        for name in names
    }
