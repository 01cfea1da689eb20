"""Streams of tasks over any labelled data: split, permuted, rotated, or one data set after the other.

.. code-block:: python

    stream = split_stream((x, y), 5, test=(x_test, y_test), scenario="class", seed=0)
    for task in stream:
        for inputs, labels in task.loader(32, seed=task.number):
            ...
        accuracy = [accuracy_of(model, other.test_inputs, other.test_targets) for other in stream]

The three scenarios (van de Ven and Tolias, 2019, arXiv:1904.07734) differ in what is asked for at test time:

=========  =========================================  ======================================
scenario   targets                                    the model
=========  =========================================  ======================================
"class"    the data's own labels                      one head for all classes
"task"     0, 1, ... within the task                  is told the task: a head for each
"domain"   0, 1, ... within the task                  is not told: the tasks share one head
=========  =========================================  ======================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["Stream", "Task", "domain_stream", "permuted_stream", "rotated_stream", "split_stream"]

_SCENARIOS = ("class", "task", "domain")


@dataclass(frozen=True)
class Task:
    """A task of a stream.

    Attributes
    ----------
    number : int
        Its place in the stream, from 0: the task id.
    name : str
    inputs : Tensor [N, ...]
    targets : Tensor [N], int64
    classes : tuple of int
        The task's classes, by the data's own labels; target k of the scenarios "task" and "domain" is ``classes[k]``.
    mask : Tensor [classes of the stream], bool
        Which of the stream's classes are the task's: ``logits.masked_fill(~mask, -inf)`` tells a model with one head
        the task.
    test_inputs, test_targets : Tensor or None
        As `inputs` and `targets`.
    """

    number: int
    name: str
    inputs: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    classes: tuple[int, ...]
    mask: Tensor = field(repr=False)
    test_inputs: Tensor | None = field(default=None, repr=False)
    test_targets: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.targets)

    def dataset(self, *, test: bool = False, task_ids: bool = False) -> TensorDataset:
        """Return the samples as a data set of (input, target) or (input, target, task id).

        Parameters
        ----------
        test : bool
            Those of the test data.
        task_ids : bool
            Default False.

        Raises
        ------
        ValueError
            If there is no test data.
        """
        x, y = (self.test_inputs, self.test_targets) if test else (self.inputs, self.targets)
        if x is None or y is None:
            raise ValueError("Task: test is True, but the stream was made without test data")
        return TensorDataset(x, y, *([torch.full_like(y, self.number)] if task_ids else []))

    def loader(
        self, batch_size: int, *, seed: int | None = None, test: bool = False, task_ids: bool = False
    ) -> DataLoader[tuple[Tensor, ...]]:
        """Return a loader of the samples: shuffled by `seed`, anew at each pass, or in order without one.

        Parameters
        ----------
        batch_size : int
        seed : int, optional
        test, task_ids : bool
            As for `dataset`.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        data = self.dataset(test=test, task_ids=task_ids)
        return DataLoader(data, batch_size, shuffle=seed is not None, generator=generator)


class Stream(Sequence[Task]):
    """A sequence of tasks.

    Parameters
    ----------
    tasks : sequence of Task
    num_classes : int
        Of all tasks together.
    scenario : "class", "task" or "domain"

    Attributes
    ----------
    tasks, num_classes, scenario
        As given.
    outputs : int
        What a single head needs: `num_classes`, or for targets within tasks the most classes of a task.
    """

    def __init__(self, tasks: Sequence[Task], num_classes: int, scenario: str) -> None:
        self.tasks, self.num_classes, self.scenario = tuple(tasks), num_classes, scenario
        own = scenario == "class"
        self.outputs = num_classes if own else max(len(task.classes) for task in self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Task, ...]: ...

    def __getitem__(self, index: int | slice) -> Task | tuple[Task, ...]:
        return self.tasks[index]

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __repr__(self) -> str:
        return f"Stream({len(self)} tasks, {self.num_classes} classes, scenario={self.scenario!r})"

    def joint(self, upto: int | None = None, *, test: bool = False) -> TensorDataset:
        """Return all samples of the tasks 0 to `upto` (the last by default) as one data set (input, target, task id).

        Raises
        ------
        ValueError
            If there is no such task, or no test data.
        """
        last = len(self) - 1 if upto is None else upto
        if not 0 <= last < len(self):
            raise ValueError(f"Stream: upto is {upto}; expected one of 0 to {len(self) - 1}")
        parts = [task.dataset(test=test, task_ids=True).tensors for task in self.tasks[: last + 1]]
        return TensorDataset(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _arrays(op: str, name: str, data: Any, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """(inputs, int64 labels) of a pair of arrays, an object with ``data`` and ``target``, or a data set."""
    if not isinstance(data, (tuple, list)) and hasattr(data, "data") and hasattr(data, "target"):
        data = (data.data, data.target)  # scikit-learn's bunches
    if isinstance(data, (tuple, list)):
        if len(data) != 2:
            raise ValueError(f"{op}: {name} has {len(data)} parts; expected (inputs, labels)")
        x, y = (t if isinstance(t, Tensor) else torch.from_numpy(np.array(t)) for t in data)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        pairs = [data[i] for i in range(len(data))]
        if not pairs:
            raise ValueError(f"{op}: {name} is empty; expected one sample at least")
        x = torch.stack([torch.as_tensor(np.asarray(pair[0])) for pair in pairs])
        y = torch.tensor([int(pair[1]) for pair in pairs])
    else:
        raise TypeError(f"{op}: {name} is a {type(data).__name__}; expected (inputs, labels) or a data set")
    if x.dim() < 1 or y.dim() != 1 or len(x) != len(y):
        raise ValueError(
            f"{op}: {name} has inputs {tuple(x.shape)} and labels {tuple(y.shape)}; expected [N, ...] and [N]"
        )
    if not len(y):
        raise ValueError(f"{op}: {name} is empty; expected one sample at least")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"{op}: {name} has labels of {y.dtype}; expected whole numbers")
    if int(y.min()) < 0:
        raise ValueError(f"{op}: {name} has a label {int(y.min())}; expected >= 0")
    return (x if dtype is None else x.to(dtype)), y.long()


def _count(op: str, name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}; expected a whole number")
    if value < least:
        raise ValueError(f"{op}: {name} is {value}; expected >= {least}")
    return int(value)


def _check_scenario(op: str, scenario: str) -> None:
    if scenario not in _SCENARIOS:
        raise ValueError(f"{op}: scenario is {scenario!r}; expected 'class', 'task' or 'domain'")


def split_stream(
    data: Any, tasks: int | Sequence[Sequence[int]], *, test: Any = None, scenario: str = "class",
    seed: int | None = None, dtype: torch.dtype | None = None,
) -> Stream:  # fmt: skip
    """Tasks of different classes: class-, task- or domain-incremental learning, such as split MNIST.

    Parameters
    ----------
    data : (inputs [N, ...], labels [N]), an object with ``data`` and ``target``, or a map-style data set
        Tensors or arrays; labels are whole numbers >= 0. A data set is read once, and its inputs stacked.
    tasks : int or sequence of sequences of int
        The number of tasks, which share the classes in order, the first ones one more if need be; or their classes.
    test : as `data`, optional
    scenario : "class", "task" or "domain"
        What the targets are; see the module. Default "class".
    seed : int, optional
        Shuffles the classes before they are shared out. By default they are in the order of their labels.
    dtype : torch.dtype, optional
        Of the inputs; their own by default.

    Returns
    -------
    Stream

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated; more tasks than classes; a class in two tasks, or in none of the data.

    References
    ----------
    Zenke et al., ICML 2017, arXiv:1703.04200 (split MNIST). van de Ven and Tolias, 2019, arXiv:1904.07734.

    Examples
    --------
    >>> x, y = torch.randn(12, 3), torch.arange(12) % 4
    >>> [(task.classes, len(task)) for task in split_stream((x, y), 2)]
    [((0, 1), 6), ((2, 3), 6)]
    """
    op = "split_stream"
    _check_scenario(op, scenario)
    x, y = _arrays(op, "data", data, dtype)
    present = y.unique().tolist()
    if isinstance(tasks, (int, np.integer)):
        count = _count(op, "tasks", tasks)
        if count > len(present):
            raise ValueError(f"{op}: tasks is {count}; expected at most {len(present)}, one class for each")
        order = list(present)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            order = [present[i] for i in torch.randperm(len(present), generator=generator).tolist()]
        groups = [[int(c) for c in part] for part in np.array_split(order, count)]
    else:
        groups = [[int(c) for c in group] for group in tasks]
        if seed is not None:
            raise ValueError(f"{op}: seed is {seed} with classes given in tasks; expected one of the two")
        flat = [c for group in groups for c in group]
        if not groups or not all(groups) or len(set(flat)) < len(flat):
            raise ValueError(f"{op}: tasks is {groups}; expected disjoint classes, one at least for each task")
        for c in flat:
            if c not in present:
                raise ValueError(f"{op}: tasks has class {c}, which data has not")
    num_classes = max(present) + 1
    pair = None if test is None else _arrays(op, "test", test, dtype)
    found = []
    for number, group in enumerate(groups):
        part = _of_classes(x, y, group, scenario)
        other = (None, None) if pair is None else _of_classes(*pair, group, scenario)
        name = "classes " + " ".join(map(str, group))
        found.append(Task(number, name, *part, tuple(group), _mask(group, num_classes), *other))
    return Stream(found, num_classes, scenario)


def _of_classes(x: Tensor, y: Tensor, group: Sequence[int], scenario: str) -> tuple[Tensor, Tensor]:
    chosen = torch.isin(y, torch.tensor(group, device=y.device))
    x, y = x[chosen], y[chosen]
    if scenario != "class":
        place = torch.zeros(max(group) + 1, dtype=torch.long, device=y.device)
        place[torch.tensor(group, device=y.device)] = torch.arange(len(group), device=y.device)
        y = place[y]
    return x, y


def _mask(group: Sequence[int], num_classes: int) -> Tensor:
    mask = torch.zeros(num_classes, dtype=torch.bool)
    mask[list(group)] = True
    return mask


def _same_classes(
    op: str, parts: Sequence[tuple[str, tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]]
) -> Stream:  # fmt: skip
    """A stream whose tasks have the same labels, and so one head."""
    classes = sorted({c for _, (_, y), _ in parts for c in y.unique().tolist()})
    num_classes = classes[-1] + 1
    found = []
    for number, (name, (x, y), test) in enumerate(parts):
        own = tuple(y.unique().tolist())
        found.append(Task(number, name, x, y, own, _mask(own, num_classes), *(test or (None, None))))
    stream = Stream(found, num_classes, "domain")
    stream.outputs = num_classes  # targets are the data's own labels
    return stream


def permuted_stream(
    data: Any, tasks: int, *, test: Any = None, seed: int = 0, identity_first: bool = True,
    dtype: torch.dtype | None = None,
) -> Stream:  # fmt: skip
    """Tasks with the features in different fixed orders, such as permuted MNIST: domain-incremental learning.

    Parameters
    ----------
    data, test, dtype
        As for `split_stream`. An input's elements are permuted all together, and keep its shape.
    tasks : int
    seed : int
        Of the permutations. Default 0. A stream of more tasks begins with the tasks of a shorter one.
    identity_first : bool
        The first task has the features in order. Default True.

    Returns
    -------
    Stream
        All tasks have all labels.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Goodfellow et al., 2014, arXiv:1312.6211. Kirkpatrick et al., PNAS 2017, arXiv:1612.00796.
    """
    op = "permuted_stream"
    count = _count(op, "tasks", tasks)
    x, y = _arrays(op, "data", data, dtype)
    pair = None if test is None else _arrays(op, "test", test, dtype)
    if pair is not None and pair[0].shape[1:] != x.shape[1:]:
        raise ValueError(f"{op}: test has inputs {tuple(pair[0].shape[1:])}; expected {tuple(x.shape[1:])}, like data")
    generator = torch.Generator().manual_seed(seed)
    parts: list[tuple[str, tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]] = []
    size = x[0].numel()
    for number in range(count):
        order = torch.arange(size)
        if number or not identity_first:
            order = torch.randperm(size, generator=generator)
        other = None if pair is None else (_permuted(pair[0], order), pair[1])
        parts.append((f"permutation {number}", (_permuted(x, order), y), other))
    return _same_classes(op, parts)


def _permuted(x: Tensor, order: Tensor) -> Tensor:
    return x.flatten(1)[:, order.to(x.device)].reshape(x.shape) if x.dim() > 1 else x.clone()


def rotated_stream(
    data: Any, angles: int | Sequence[float], *, test: Any = None, dtype: torch.dtype | None = None
) -> Stream:  # fmt: skip
    """Tasks with the images turned by different angles, such as rotated MNIST: domain-incremental learning.

    Parameters
    ----------
    data, test, dtype
        As for `split_stream`, with floating-point images ``[N, H, W]`` or ``[N, C, H, W]``.
    angles : int or sequence of float
        Degrees, counter-clockwise, one for each task; or the number of tasks, which share 180 degrees: 0, 180/T, ...

    Returns
    -------
    Stream
        All tasks have all labels.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    Bilinear, about the centre; what comes from outside is 0. Square images turn by multiples of 90 degrees exactly.

    References
    ----------
    Lopez-Paz and Ranzato, NeurIPS 2017, arXiv:1706.08840.
    """
    op = "rotated_stream"
    if isinstance(angles, (int, np.integer)):
        count = _count(op, "angles", angles)
        degrees = [180.0 * t / count for t in range(count)]
    else:
        degrees = [float(a) for a in angles]
        if not degrees or not all(math.isfinite(a) for a in degrees):
            raise ValueError(f"{op}: angles is {degrees}; expected finite numbers, one at least")
    pairs = [_arrays(op, "data", data, dtype)] + ([] if test is None else [_arrays(op, "test", test, dtype)])
    for name, (x, _) in zip(("data", "test"), pairs, strict=False):
        if x.dim() not in (3, 4):
            raise ValueError(f"{op}: {name} has inputs {tuple(x.shape)}; expected [N, H, W] or [N, C, H, W]")
        if not x.is_floating_point():
            raise TypeError(f"{op}: {name} has inputs of {x.dtype}; expected floating point, or dtype=torch.float32")
    parts = []
    for angle in degrees:
        turned = [(_turned(x, angle), y) for x, y in pairs]
        parts.append((f"{angle:g} degrees", turned[0], turned[1] if len(turned) > 1 else None))
    return _same_classes(op, parts)


def _turned(x: Tensor, angle: float) -> Tensor:
    quarter, rest = divmod(angle, 90.0)
    if not rest and (x.shape[-1] == x.shape[-2] or not quarter % 2):
        return torch.rot90(x, int(quarter) % 4, (-2, -1)).clone()
    images = x if x.dim() == 4 else x[:, None]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    # affine_grid's units are half the image's sides, which differ
    ratio = images.shape[-2] / images.shape[-1]
    matrix = torch.tensor([[cos, -sin * ratio, 0.0], [sin / ratio, cos, 0.0]], dtype=x.dtype, device=x.device)
    grid = functional.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", align_corners=False).reshape(x.shape)


def domain_stream(
    domains: Sequence[Any], *, tests: Sequence[Any] | None = None, names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Stream:  # fmt: skip
    """One data set after the other, all with the same labels: domain-incremental learning.

    Parameters
    ----------
    domains : sequence
        Each as `data` of `split_stream`.
    tests : sequence, optional
        Of the same length.
    names : sequence of str, optional
    dtype : torch.dtype, optional
        Of the inputs; their own by default.

    Returns
    -------
    Stream
        A task's `classes` are those that its data set has.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.
    """
    op = "domain_stream"
    parts = [_arrays(op, f"domains[{i}]", data, dtype) for i, data in enumerate(domains)]
    if not parts:
        raise ValueError(f"{op}: domains is empty; expected one data set at least")
    others: list[tuple[Tensor, Tensor] | None] = [None] * len(parts)
    if tests is not None:
        others = [_arrays(op, f"tests[{i}]", data, dtype) for i, data in enumerate(tests)]
    labels = [f"domain {i}" for i in range(len(parts))] if names is None else list(names)
    for name, values in (("tests", others), ("names", labels)):
        if len(values) != len(parts):
            raise ValueError(f"{op}: {name} has {len(values)} entries; expected {len(parts)}, like domains")
    return _same_classes(op, list(zip(labels, parts, others, strict=True)))
