r"""Memories of earlier examples: which are kept of a stream, and batches drawn from them.

A buffer holds tuples of tensors, one row an example: inputs, labels, logits, task numbers. What it draws comes from its
own generator, whose state is part of ``state_dict``: a run that is resumed goes on as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tlkernels.methods.continual._base import copied

__all__ = ["ClassBalancedBuffer", "GreedyBalancedBuffer", "ReplayBuffer", "ReservoirBuffer", "RingBuffer"]


class ReplayBuffer:
    """The base: storage, batches and state. Which examples stay is a subclass's `_place`.

    Parameters
    ----------
    capacity : int
        Most examples that are kept, at least 1.
    seed : int
        Of the buffer's own generator.
    label : int
        Which tensor of an example's tuple is its class, for the buffers that look at it.

    Raises
    ------
    ValueError
        If `capacity` is not positive or `label` is negative.
    """

    def __init__(self, capacity: int, *, seed: int = 0, label: int = 1) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"{self._op}: capacity is {capacity!r}; expected a positive number of examples")
        if label < 0:
            raise ValueError(f"{self._op}: label is {label}; expected the place of the classes in (x, y, ...)")
        self.capacity, self.label = capacity, label
        self.generator = torch.Generator().manual_seed(seed)
        self.seen = 0
        self._count = 0
        self._rows: list[Tensor] = []

    @property
    def _op(self) -> str:
        return type(self).__name__

    def __len__(self) -> int:
        """Examples that are kept."""
        return self._count

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is kept, one tensor for each part of the tuple; views of the storage."""
        return tuple(t[: self._count] for t in self._rows)

    def add(self, *tensors: Tensor) -> None:
        """Show the buffer a batch: tensors of equal first size, of which it keeps copies of some rows.

        Raises
        ------
        TypeError, ValueError
            If they are no tensors, of unequal length, or of other shapes or dtypes than before; nothing has changed
            then.
        """
        if not tensors:
            raise ValueError(f"{self._op}: add got no tensors; expected at least one")
        for i, t in enumerate(tensors):
            if not isinstance(t, Tensor):
                raise TypeError(f"{self._op}: tensors[{i}] is a {type(t).__name__}; expected a tensor")
            if t.dim() == 0 or len(t) != len(tensors[0]):
                want = len(tensors[0]) if tensors[0].dim() else "n"
                raise ValueError(f"{self._op}: tensors[{i}] has shape {tuple(t.shape)}; expected {want} rows")
        if self._rows:
            if len(tensors) != len(self._rows):
                raise ValueError(f"{self._op}: add got {len(tensors)} tensors; expected {len(self._rows)}, as before")
            for i, (t, kept) in enumerate(zip(tensors, self._rows, strict=True)):
                if t.shape[1:] != kept.shape[1:] or t.dtype != kept.dtype:
                    raise ValueError(
                        f"{self._op}: tensors[{i}] has rows of {t.dtype} {tuple(t.shape[1:])}; expected "
                        f"{kept.dtype} {tuple(kept.shape[1:])}, as before"
                    )
        self._check(tensors)
        if not self._rows:
            self._rows = [t.new_zeros((self.capacity, *t.shape[1:])).detach() for t in tensors]
        for row in range(len(tensors[0])):
            place = self._place(tuple(t[row] for t in tensors))
            self.seen += 1
            if place is not None:
                for t, kept in zip(tensors, self._rows, strict=True):
                    kept[place] = t[row].detach()
                self._count = max(self._count, place + 1)

    def sample(self, count: int) -> tuple[Tensor, ...]:
        """Draw that many different examples, or all where there are fewer.

        Raises
        ------
        ValueError
            If the buffer is empty or `count` is not positive.
        """
        if count < 1:
            raise ValueError(f"{self._op}: count is {count}; expected >= 1")
        if not self._count:
            raise ValueError(f"{self._op}: the buffer is empty; expected add() before sample()")
        chosen = torch.randperm(self._count, generator=self.generator)[:count]
        return tuple(t[chosen.to(t.device)] for t in self._rows)

    def state_dict(self) -> dict[str, Any]:
        """All that it holds, with the generator's state; tensors are copies."""
        return {
            "class": self._op, "capacity": self.capacity, "seen": self.seen, "count": self._count,
            "rows": copied(self._rows), "generator": self.generator.get_state(), **copied(self._state()),
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of a buffer of the same class and capacity.

        Raises
        ------
        ValueError
            If it is of another class or capacity; nothing has changed then.
        """
        for key, want in (("class", self._op), ("capacity", self.capacity)):
            if state_dict.get(key) != want:
                raise ValueError(f"{self._op}: state_dict has {key} {state_dict.get(key)!r}; expected {want!r}")
        missing = sorted({"seen", "count", "rows", "generator", *self._state()} - state_dict.keys())
        if missing:
            raise ValueError(f"{self._op}: state_dict lacks {missing[0]!r}; expected what state_dict() returns")
        self.seen, self._count = state_dict["seen"], state_dict["count"]
        self._rows = copied(state_dict["rows"])
        self.generator.set_state(state_dict["generator"])
        self._load(copied(state_dict))

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self.generator))

    def _one_of(self, places: Tensor) -> int:
        return int(places[self._below(len(places))])

    def _labels(self) -> Tensor:
        return self._rows[self.label][: self._count].cpu()

    def _check(self, tensors: tuple[Tensor, ...]) -> None:
        """Check what a subclass asks of a batch beyond shapes."""

    def _check_labels(self, tensors: tuple[Tensor, ...]) -> None:
        if self.label >= len(tensors):
            raise ValueError(f"{self._op}: add got {len(tensors)} tensors; expected labels at place {self.label}")
        labels = tensors[self.label]
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"{self._op}: tensors[{self.label}] has dtype {str(labels.dtype).removeprefix('torch.')} and shape "
                f"{tuple(labels.shape)}; expected integer classes (n,)"
            )

    def _place(self, example: tuple[Tensor, ...]) -> int | None:
        """Where the next example of the stream goes, or None."""
        raise NotImplementedError(f"{self._op}: _place is not written")

    def _state(self) -> dict[str, Any]:
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:
        pass


class ReservoirBuffer(ReplayBuffer):
    r"""A uniform sample of all that was seen: after n examples each is kept with probability capacity / n.

    Parameters
    ----------
    capacity : int
    seed : int

    References
    ----------
    Vitter, Random sampling with a reservoir (algorithm R), ACM TOMS 1985.
    """

    def _place(self, example: tuple[Tensor, ...]) -> int | None:
        if self._count < self.capacity:
            return self._count
        place = self._below(self.seen + 1)
        return place if place < self.capacity else None


class ClassBalancedBuffer(ReplayBuffer):
    r"""Class-balancing reservoir sampling: as equal as the stream allows, and uniform within a class.

    Parameters
    ----------
    capacity : int
    seed : int
    label : int

    Notes
    -----
    A full buffer gives an example of a class that has never been the largest the place of one of the largest class's;
    one of a class that has been takes a place of its own class with probability kept / seen of that class.

    References
    ----------
    Chrysakis & Moens, Online continual learning from imbalanced data, ICML 2020.
    """

    def __init__(self, capacity: int, *, seed: int = 0, label: int = 1) -> None:
        super().__init__(capacity, seed=seed, label=label)
        self._seen_of: dict[int, int] = {}
        self._full: set[int] = set()

    def _check(self, tensors: tuple[Tensor, ...]) -> None:
        self._check_labels(tensors)

    def _place(self, example: tuple[Tensor, ...]) -> int | None:
        y = int(example[self.label])
        self._seen_of[y] = self._seen_of.get(y, 0) + 1
        if self._count < self.capacity:
            return self._count
        labels = self._labels()
        classes, counts = labels.unique(return_counts=True)
        largest = classes[counts == counts.max()]
        self._full |= {int(c) for c in largest}
        if y not in self._full:
            return self._one_of((labels == self._one_of(largest)).nonzero().flatten())
        own = (labels == y).nonzero().flatten()
        if len(own) and self._below(self._seen_of[y]) < len(own):
            return self._one_of(own)
        return None

    def _state(self) -> dict[str, Any]:
        return {"seen_of": dict(self._seen_of), "full": sorted(self._full)}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._seen_of, self._full = dict(state["seen_of"]), set(state["full"])


class GreedyBalancedBuffer(ReplayBuffer):
    r"""GDumb's sampler: an example is kept while its class has less than its equal share.

    Parameters
    ----------
    capacity : int
    seed : int
    label : int

    Notes
    -----
    With k classes seen, each may have capacity / k. A class below it takes a place of the largest class's when the
    buffer is full. GDumb then trains a fresh model on `tensors` alone.

    References
    ----------
    Prabhu et al., GDumb: a simple approach that questions our progress in continual learning, ECCV 2020.
    """

    def __init__(self, capacity: int, *, seed: int = 0, label: int = 1) -> None:
        super().__init__(capacity, seed=seed, label=label)
        self._classes: set[int] = set()

    def _check(self, tensors: tuple[Tensor, ...]) -> None:
        self._check_labels(tensors)

    def _place(self, example: tuple[Tensor, ...]) -> int | None:
        y = int(example[self.label])
        self._classes.add(y)
        labels = self._labels()
        if int((labels == y).sum()) >= self.capacity / len(self._classes):
            return None
        if self._count < self.capacity:
            return self._count
        classes, counts = labels.unique(return_counts=True)
        return self._one_of((labels == self._one_of(classes[counts == counts.max()])).nonzero().flatten())

    def _state(self) -> dict[str, Any]:
        return {"classes": sorted(self._classes)}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._classes = set(state["classes"])


class RingBuffer(ReplayBuffer):
    r"""The newest examples of each class (or of each task), each with places of its own.

    Parameters
    ----------
    capacity : int
        Of all classes together.
    per_class : int
        Places of a class; capacity / per_class classes fit.
    seed : int
    label : int

    Raises
    ------
    ValueError
        If `per_class` is not in 1 to capacity; on `add`, if there are more classes than fit.

    References
    ----------
    Lopez-Paz & Ranzato, Gradient episodic memory, NeurIPS 2017; Chaudhry et al., On tiny episodic memories, 2019,
    arXiv:1902.10486.
    """

    def __init__(self, capacity: int, *, per_class: int, seed: int = 0, label: int = 1) -> None:
        super().__init__(capacity, seed=seed, label=label)
        if not 1 <= per_class <= capacity:
            raise ValueError(f"RingBuffer: per_class is {per_class}; expected 1 to {capacity}")
        self.per_class = per_class
        self._places: dict[int, list[int]] = {}
        self._next: dict[int, int] = {}

    def _check(self, tensors: tuple[Tensor, ...]) -> None:
        self._check_labels(tensors)
        classes = set(self._places) | {int(c) for c in tensors[self.label].unique()}
        if len(classes) * self.per_class > self.capacity:
            raise ValueError(
                f"RingBuffer: capacity is {self.capacity} for {len(classes)} classes of {self.per_class} examples; "
                f"expected at least {len(classes) * self.per_class}"
            )

    def _place(self, example: tuple[Tensor, ...]) -> int | None:
        y = int(example[self.label])
        places = self._places.setdefault(y, [])
        if len(places) < self.per_class:
            places.append(self._count)
            return self._count
        turn = self._next.get(y, 0)
        self._next[y] = (turn + 1) % self.per_class
        return places[turn]

    def _state(self) -> dict[str, Any]:
        return {"places": self._places, "next": self._next}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._places, self._next = dict(state["places"]), dict(state["next"])
