"""Wrong calls of ops, for the tests of errors: a right call, what is changed in it, and what the error must say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ERRORS = (TypeError, ValueError, IndexError, RuntimeError)


@dataclass(frozen=True)
class Wrong:
    """A right call with some arguments changed, the error, and what its sentence must say besides the op's name."""

    op: str
    error: type[Exception]
    says: tuple[str, ...]
    changes: dict[str, Any]  # by argument: a new value, or a function of the right one
    nested: bool = False
    reads_values: bool = False  # cannot be seen in a meta tensor, which has no values

    def __str__(self) -> str:
        return f"{self.op}: {' '.join(self.says)}"

    def arguments(self, right: dict[str, Any]) -> dict[str, Any]:
        return {
            name: self.changes[name](value) if callable(self.changes.get(name)) else self.changes.get(name, value)
            for name, value in right.items()
        }


def to(target: torch.dtype | str) -> Callable[[Tensor], Tensor]:
    return lambda t: t.to(target)


def shorter(t: Tensor) -> Tensor:
    return t[:-1]


def longer(t: Tensor) -> Tensor:
    return torch.cat([t, t[:1]])
