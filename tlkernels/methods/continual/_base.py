"""What the methods of this package share: the hooks that a training loop calls, their state, and checks of arguments.

.. code-block:: python

    for loader in stream:
        method.before_task(loader)
        for x, y in loader:
            optimizer.zero_grad()
            out = model(x)
            loss = criterion(out, y) + method.penalty(x, out)   # or leave it out: after_backward adds its gradient
            loss.backward()
            method.after_backward()
            optimizer.step()
            method.after_step()
        method.after_task(loader)

A method does something in some of them, and nothing in the others: the same loop serves all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ContinualMethod", "check_loader", "check_number", "copied", "split_batch", "trainable_parameters"]


class ContinualMethod:
    """The hooks of a method of continual learning, all of them empty.

    Parameters
    ----------
    model : torch.nn.Module
        The model that learns one task after the other. Its parameters are looked up anew in every hook, so that it may
        get new heads, or heads with more rows, between tasks.

    Attributes
    ----------
    model : torch.nn.Module
    tasks : int
        Tasks that `after_task` has closed.

    Raises
    ------
    TypeError
        If `model` is no module.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{self._op}: model is a {type(model).__name__}; expected a torch.nn.Module")
        self.model = model
        self.tasks = 0

    @property
    def _op(self) -> str:
        return type(self).__name__

    def before_task(self, loader: Iterable[Any] | None = None) -> None:
        """Call before a task's first step; `loader` gives its batches, for the methods that look at them."""

    def penalty(self, inputs: Any = None, outputs: Tensor | None = None) -> Tensor:
        """Return the term to add to the loss of a batch: a differentiable scalar, 0 where the method has none.

        Parameters
        ----------
        inputs : Tensor, optional
            The batch's inputs; needed by the methods that say so.
        outputs : Tensor, optional
            The model's outputs for them.
        """
        return zero(self.model)

    def after_backward(self) -> None:
        """Call between ``backward`` (and the unscaling of a gradient scaler) and ``optimizer.step``."""

    def after_step(self) -> None:
        """Call after ``optimizer.step``."""

    def after_task(self, loader: Iterable[Any] | None = None) -> None:
        """Call after a task's last step; `loader` gives its batches once more, for the methods that look at them."""
        self.tasks += 1

    def state_dict(self) -> dict[str, Any]:
        """Return all that the method knows, but for the model: what resumes it exactly. Tensors are copies."""
        return {"class": self._op, "tasks": self.tasks, **copied(self._state())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of an object of the same class and settings.

        Raises
        ------
        TypeError, ValueError
            If it is no state, or of another class; nothing has changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"{self._op}: state_dict is a {type(state_dict).__name__}; expected a mapping")
        if state_dict.get("class") != self._op:
            raise ValueError(f"{self._op}: state_dict has class {state_dict.get('class')!r}; expected {self._op!r}")
        missing = sorted({"tasks", *self._state()} - state_dict.keys())
        if missing:
            raise ValueError(f"{self._op}: state_dict lacks {missing[0]!r}; expected what state_dict() returns")
        self._load(copied({key: value for key, value in state_dict.items() if key != "class"}))
        self.tasks = int(state_dict["tasks"])

    def _state(self) -> dict[str, Any]:
        """What a subclass adds to `state_dict`; copied by the caller."""
        return {}

    def _load(self, state: dict[str, Any]) -> None:
        """Take over `_state` of another object, copied already; check all of it before the first change."""


def zero(model: nn.Module) -> Tensor:
    """A scalar 0 on the model's device, float64 if the model's first parameter is."""
    p = next(model.parameters(), None)
    return torch.zeros(()) if p is None else p.new_zeros((), dtype=torch.promote_types(p.dtype, torch.float32))


def trainable_parameters(op: str, model: nn.Module) -> dict[str, nn.Parameter]:
    """The floating-point parameters that require grad, by name.

    Raises
    ------
    ValueError
        If there is none.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    if not named:
        raise ValueError(f"{op}: model has no parameter that requires grad; expected one at least")
    return named


def check_loader(op: str, loader: Iterable[Any] | None) -> Iterable[Any]:
    """`loader`, if it is an iterable of batches.

    Raises
    ------
    TypeError
        If it is None, a lone tensor, a mapping or a string.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, (Tensor, Mapping, str)):
        raise TypeError(f"{op}: loader is a {type(loader).__name__}; expected an iterable of batches")
    return loader


def check_number(op: str, name: str, value: float, low: float = 0.0, high: float | None = None) -> float:
    """`value`, if it is a number of ``[low, high]``.

    Raises
    ------
    TypeError, ValueError
        If it is no number (or a truth value), not finite, or out of that range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}; expected a number")
    if not low <= value < float("inf") or (high is not None and value > high):
        wants = f">= {low:g}" if high is None else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{op}: {name} is {value}; expected {wants}")
    return float(value)


def split_batch(op: str, batch: Any) -> tuple[Tensor, Tensor | None]:
    """(inputs, labels) of a batch ``x``, ``(x,)``, ``(x, y)`` or ``(x, y, ...)``, such as one with task ids.

    Raises
    ------
    TypeError
        If a part is no tensor.
    """
    parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    x, y = (parts[0] if parts else None), (parts[1] if len(parts) > 1 else None)
    if not isinstance(x, Tensor) or not (y is None or isinstance(y, Tensor)):
        raise TypeError(f"{op}: loader gives a {type(batch).__name__}; expected tensors (inputs, labels)")
    return x, y


def copied(tree: Any) -> Any:
    """Dicts, lists and tuples as they are nested, with copies of the tensors in them, detached."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copied(value) for value in tree)
    return tree
