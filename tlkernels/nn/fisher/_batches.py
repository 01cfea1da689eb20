"""Batches of any shape: how many samples one holds, some of its samples, and what a model makes of it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]


def plain(batch: Any, device: torch.device | None) -> Any:
    """The batch in dicts, lists and tuples, its tensors detached and on `device`."""
    if isinstance(batch, Tensor):
        return batch.detach() if device is None else batch.detach().to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: plain(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(plain(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(plain(value, device) for value in batch)
    return batch


def labels_of(batch: Mapping[str, Any]) -> str | None:
    return next((key for key in ("labels", "label") if key in batch), None)


def count_samples(op: str, batch: Any) -> int:
    """The rows of the labels: of a dict's "labels", of the last part of a tuple; else of the first tensor."""
    part = batch
    if isinstance(batch, dict):
        key = labels_of(batch)
        part = batch if key is None else batch[key]
    elif isinstance(batch, (tuple, list)) and batch:
        part = batch[-1]
    for leaf in [*pytree.tree_leaves(part), *pytree.tree_leaves(batch)]:
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError(
        f"{op}: loader gives a {type(batch).__name__} without a tensor; expected tensors with samples first"
    )


class Samples:
    """A batch of n samples, taken apart: its tensors with n rows are cut along them, everything else is shared."""

    def __init__(self, batch: Any, n: int) -> None:
        self.n = n
        self._leaves, self._spec = pytree.tree_flatten(batch)
        self._cut = [i for i, t in enumerate(self._leaves) if isinstance(t, Tensor) and t.dim() and t.shape[0] == n]

    @property
    def tensors(self) -> list[Tensor]:
        """Those that have the samples as their rows."""
        return [self._leaves[i] for i in self._cut]

    def of(self, tensors: Iterable[Tensor]) -> Any:
        """The batch with these in place of `tensors`."""
        leaves = list(self._leaves)
        for i, t in zip(self._cut, tensors, strict=True):
            leaves[i] = t
        return pytree.tree_unflatten(leaves, self._spec)

    def take(self, index: slice | list[int]) -> Any:
        """The batch of these samples alone."""
        return self.of(t[index] for t in self.tensors)

    def part(self, index: list[int]) -> Samples:
        """These samples alone, with the same tensors shared."""
        part = copy.copy(self)
        part.n, part._leaves = len(index), list(self._leaves)
        for i in self._cut:
            part._leaves[i] = self._leaves[i][index]
        return part

    @property
    def batch(self) -> Any:
        """All of it."""
        return pytree.tree_unflatten(self._leaves, self._spec)

    def two(self) -> list[int]:
        """The first sample, and one that differs from it where there is one among the first 64."""
        for j in range(1, min(self.n, 64)):
            if any(not torch.equal(t[0], t[j]) for t in self.tensors):
                return [0, j]
        return list(range(min(self.n, 2)))


def default_forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """(output, target) of ``(x, y)``, ``(x1, x2, ..., y)``, a dict with or without "labels", or a lone tensor.

    A dict's entries are keyword arguments, but for the labels. An output with ``logits``, or a tuple, is taken apart.
    """
    target: Any = None
    if isinstance(batch, dict):
        key = labels_of(batch)
        target = None if key is None else batch[key]
        out = model(**{name: value for name, value in batch.items() if name != key})
    elif isinstance(batch, (tuple, list)):
        *inputs, target = batch if len(batch) > 1 else (*batch, None)
        if len(inputs) == 1 and isinstance(inputs[0], dict):
            out = model(**inputs[0])
        elif len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):
            out = model(*inputs[0])
        else:
            out = model(*inputs)
    else:
        out = model(batch)
    return logits_of(out), target


def logits_of(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out
    if isinstance(out, Mapping) and "logits" in out:
        return out["logits"]
    if hasattr(out, "logits"):
        return out.logits
    return out[0] if isinstance(out, (tuple, list)) and out else out


def progress_bar(op: str, loader: Iterable[Any], show: bool | None) -> Iterator[Any]:
    """The loader's batches, with a bar on stderr where `show`, or where it is None and stderr is a terminal."""
    if sys.stderr.isatty() if show is None else show:
        try:
            from tqdm import tqdm
        except ImportError:
            if show:
                raise ImportError(f"{op}: progress=True needs tqdm; install it with `pip install tqdm`") from None
        else:
            loader = tqdm(loader, desc=op, unit="batch", leave=False, file=sys.stderr)
    yield from loader
