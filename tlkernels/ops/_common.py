"""What the ops of every family share: argument checks as sentences, and a batching rule."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from tlkernels.ops._registry import OPS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(op: str, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.dtype not in FLOATS:
            got = name_of(t.dtype)
            raise TypeError(f"{op}: {name} has dtype {got}; expected float32, bfloat16, float16 or float64")


def check_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise ValueError(f"{op}: {name} is on {t.device}; expected {device}, like the other arguments")


def check_sizes(op: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 0:
            raise ValueError(f"{op}: {name} is {value}; expected >= 0")
    checked_numel(op, tuple(sizes.values()))


def checked_numel(op: str, shape: tuple[int, ...] | list[int]) -> int:
    if any(s < 0 for s in shape):
        raise ValueError(f"{op}: shape is {tuple(shape)}; expected sizes >= 0")
    numel = math.prod(shape)
    if numel >= 2**62:
        raise ValueError(f"{op}: shape {tuple(shape)} has {numel} elements; expected fewer than 2**62")
    return numel


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """An op is one kernel, and its inside not for autocast to lower."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def batch_of_rows(name: str, rows: tuple[int, ...] = (0,), unless: int | None = None) -> Any:
    """A batching rule: a batch of the arguments `rows` is more rows; any other batch is a loop.

    It is a loop as well where the argument `unless` is given: random numbers that depend on a row's position.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        op = OPS[name]
        positional = len(inputs) - len(op.kwonly)

        def run(values: tuple[Any, ...]) -> Any:
            return op.overload(*values[:positional], **dict(zip(op.kwonly, values[positional:], strict=True)))

        batched = tuple(i for i, d in enumerate(in_dims) if d is not None)
        if batched == rows and (unless is None or inputs[unless] is None):
            out = run(tuple(v if d is None else v.movedim(d, 0) for v, d in zip(inputs, in_dims, strict=True)))
            return out, (0,) * len(out) if isinstance(out, tuple) else 0
        samples = [
            run(tuple(v if d is None else v.select(d, i) for v, d in zip(inputs, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], tuple):
            return tuple(torch.stack(s) for s in zip(*samples, strict=True)), (0,) * len(samples[0])
        return torch.stack(samples), 0

    return rule


def changed(t: Tensor) -> None:
    """Tell autograd, which may have saved the tensor, that a kernel wrote into it: a compiled one writes past torch."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(t)
