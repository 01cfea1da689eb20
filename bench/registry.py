"""What a benchmark is made of: cases, the problems they become, and the providers that solve them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

#: Families by name; each is a module of this package with an object `FAMILY`.
FAMILIES = ("contrastive", "coral", "fisher", "gemm", "gradgram", "lora", "mmd", "nf4")

#: A product whose relative error exceeds this is wrong. Twice and more what rounding the result to the dtype and
#: accumulating in another order costs, and below what a computation in a narrower dtype does: a float32 product done
#: in bfloat16 (3e-3) is not a float32 product.
PRODUCT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@dataclass(frozen=True)
class Case:
    """One line of the table of contents: an op at one size."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int | None = None

    @property
    def label(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.op} {size}" + (f" rows {self.rows}" if self.rows else "") + f" {dtype_name(self.dtype)}"


@dataclass
class Problem:
    """A case with its data, and how to judge a result.

    ``error(result)`` is the relative error against float64. ``bytes_read``, ``bytes_written`` and ``flops`` count what
    the problem itself needs, so that every provider's rates are over the same work. ``output_bytes`` is what a call
    must allocate: memory beyond it is extra.
    """

    case: Case
    data: dict[str, Any]
    error: Callable[[Any], float]
    tolerance: float
    bytes_read: int
    bytes_written: int
    output_bytes: int
    flops: int = 0
    ceiling: str = "fp32"  # which arithmetic peak bounds it: "fp32" or "bf16"


@dataclass
class Run:
    """A provider made ready for a problem: `call` is what is timed.

    ``whole`` is what memory is measured over where that is more than the timed call: for a backward pass the forward
    pass too, since what it saves is the point. ``error`` is the judge of its results where that is not the problem's: a
    provider that draws its own dropout mask, or a *yardstick*, which computes something else, such as the layer without
    its adapter. The rest is held against a yardstick, but it is no peer.
    """

    call: Callable[[], Any]
    whole: Callable[[], Any] | None = None
    error: Callable[[Any], float] | None = None
    yardstick: bool = False


@dataclass(frozen=True)
class Provider:
    """Something that solves problems: a backend of this library, or a peer.

    ``prepare`` returns None where the provider has no such computation, and raises where it should have one and
    fails; the row then shows the error.
    """

    name: str
    ours: bool
    prepare: Callable[[Problem], Run | None]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = field(default=contextlib.nullcontext)


@dataclass(frozen=True)
class Selection:
    """What the command line asks for; None is everything."""

    quick: bool = False
    ops: tuple[str, ...] | None = None
    shapes: tuple[tuple[int, ...], ...] | None = None
    rows: tuple[int, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    providers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Ratio:
    """A column of our rows: this provider's time over ours, or, as a `cost`, our time over this provider's."""

    heading: str
    provider: str
    cost: bool = False


class Family(Protocol):
    """A group of ops that is benchmarked together."""

    name: str
    ops: tuple[str, ...]

    def cases(self, selection: Selection) -> list[Case]: ...

    def problem(self, case: Case, device: torch.device) -> Problem: ...

    def providers(self, device: torch.device) -> list[Provider]: ...

    def missing(self, device: torch.device) -> list[str]:
        """One sentence for each provider that is not installed or not built here."""
        ...


def load(name: str) -> Family:
    """The family of that name."""
    if name not in FAMILIES:
        raise ValueError(f"family: got {name!r}, expected one of {', '.join(FAMILIES)}")
    return importlib.import_module(f"bench.{name}").FAMILY


def ratios(name: str) -> tuple[Ratio, ...]:
    """The columns that a family's module asks for in `RATIOS`, beside the speed-up over the best peer."""
    return getattr(importlib.import_module(f"bench.{name}"), "RATIOS", ())


def plotted(name: str) -> tuple[str, ...]:
    """The ops that a family's module wants plotted, in `PLOTTED`; nothing stands for all."""
    return getattr(importlib.import_module(f"bench.{name}"), "PLOTTED", ())


#: Shapes, each with its numbers of rows; no numbers where the op has no rows.
Sizes = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def sizes(listed: Sizes, selection: Selection) -> list[tuple[tuple[int, ...], int | None]]:
    """The listed sizes, or what the selection puts in their place; a shape that is not listed has the first's rows."""
    rows_of = dict(listed)
    pairs: list[tuple[tuple[int, ...], int | None]] = []
    for shape in selection.shapes or rows_of:
        rows = rows_of.get(shape, listed[0][1])
        pairs += [(shape, count) for count in ((selection.rows or rows) if rows else (None,))]
    return pairs


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wanted(provider: Provider, selection: Selection) -> bool:
    """Whether the command line asks for this provider."""
    return selection.providers is None or any(name in provider.name for name in selection.providers)
