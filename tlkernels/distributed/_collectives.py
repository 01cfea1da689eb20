"""What the losses need of `torch.distributed`: agreement on the call, rows of unequal number, and the ring.

Every function here is collective: all processes of the group call it, in the same order. A process that dies makes the
others' collectives raise, at the latest after the group's timeout. A group of one process communicates nothing, so
the losses run without `init_process_group` as well.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tlkernels.ops._common import FLOATS, name_of

# torch 2.13 has new names for both, and warns of the old ones
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


@dataclass(frozen=True)
class Group:
    """The place of this process among those that share a batch. `handle` is None where it is alone."""

    handle: Any
    rank: int
    size: int

    @property
    def device_types(self) -> list[str]:
        """The types of device for which the group has a backend."""
        return [entry.partition(":")[0] for entry in dist.get_backend_config(self.handle).split(",")]


def resolve(op: str, process_group: dist.ProcessGroup | None) -> Group:
    """The group to work in: `process_group`, or all processes, or, where nothing was initialized, this one alone.

    Raises
    ------
    RuntimeError
        If a launcher started several processes (WORLD_SIZE) and none of them called `init_process_group`: each would
        go its own way with its own negatives, and nothing would tell.
    ValueError
        If this process is not in `process_group`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise RuntimeError(f"{op}: process_group is given, but torch.distributed is not initialized")
        started = os.environ.get("WORLD_SIZE", "1")
        if started.isdigit() and int(started) > 1:
            raise RuntimeError(
                f"{op}: WORLD_SIZE is {started}, but torch.distributed is not initialized; "
                "call torch.distributed.init_process_group first"
            )
        return Group(None, 0, 1)
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ValueError(f"{op}: process_group does not hold this process; expected a group that it is a member of")
    size = dist.get_world_size(process_group)
    return Group(process_group if process_group is not None else dist.group.WORLD, rank, size)


# ---- agreement ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """What a process brings to a collective call."""

    settings: str  # all that has to be the same on every process, as one text
    rows: int  # of x
    columns: int  # of y
    features: int
    dtype: torch.dtype
    pairs: int  # rows that have a label
    grad_x: bool
    grad_y: bool
    recorded: bool  # whether a backward pass will be possible


@dataclass(frozen=True)
class Agreed:
    """What all processes bring."""

    group: Group
    calls: list[Call]

    @property
    def own(self) -> Call:
        return self.calls[self.group.rank]

    @property
    def columns(self) -> list[int]:
        return [c.columns for c in self.calls]

    @property
    def first(self) -> int:
        """Where this process's columns begin among those of all."""
        return sum(self.columns[: self.group.rank])

    @property
    def grad_y(self) -> bool:
        """Whether any process wants the gradient of its y, to which every other contributes."""
        return any(c.grad_y for c in self.calls)


def agree(op: str, group: Group, check: Callable[[], Call]) -> Agreed:
    """Exchange what every process brings, one small message each, so that a wrong call fails on all and hangs none.

    Where the group has a backend for CPU tensors, the message takes that, and no GPU is waited for
    (``init_process_group("cpu:gloo,cuda:nccl")``).

    Parameters
    ----------
    check : callable
        Checks this process's own arguments. What it raises is raised here, and makes the other processes raise.

    Raises
    ------
    TypeError, ValueError, IndexError, RuntimeError
        Naming what the processes do not agree on, on each of them.
    """
    if group.size == 1:
        return Agreed(group, [check()])
    line = [0] * 10
    fault: Exception | None = None
    try:
        mine = check()
        line[1:] = [
            zlib.crc32(f"{op}({mine.settings})".encode()), mine.rows, mine.columns, mine.features,
            FLOATS.index(mine.dtype), mine.pairs, int(mine.grad_x), int(mine.grad_y), int(mine.recorded),
        ]  # fmt: skip
    except Exception as error:  # whatever it is, the others must hear of it
        fault, line[0] = error, 1
    own = torch.tensor([line], device=_message_device(group))
    table = own.new_empty(group.size, len(line))
    _all_gather(table, own, group=group.handle)
    if fault is not None:
        raise fault
    lines: list[list[int]] = table.tolist()
    failed = [str(r) for r, other in enumerate(lines) if other[0]]
    if failed:
        raise RuntimeError(f"{op}: rank {', '.join(failed)} of the group refused its arguments; its own error says why")
    settings = ["as here" if o[1] == line[1] else "otherwise" for o in lines]
    _same(op, "what they call", settings, f"here: {op} with {mine.settings}")
    _same(op, "the number of features", [f"D = {o[4]}" for o in lines], "expected one D")
    _same(op, "the dtype of the features", [name_of(FLOATS[o[5]]) for o in lines], "expected one dtype")
    recorded = ["recorded" if o[9] else "not recorded" for o in lines]
    _same(op, "gradients", recorded, "expected all or none: the backward pass communicates too")
    calls = [
        Call(mine.settings, o[2], o[3], o[4], FLOATS[o[5]], o[6], bool(o[7]), bool(o[8]), bool(o[9])) for o in lines
    ]
    return Agreed(group, calls)


def _same(op: str, what: str, values: list[str], expected: str) -> None:
    if len(set(values)) > 1:
        # whole lists of a thousand ranks help nobody: each value with the first ranks that have it
        ranks = {v: [str(r) for r, other in enumerate(values) if other == v] for v in values}
        got = "; ".join(f"{v} on rank {', '.join(r[:8])}{', ...' if len(r) > 8 else ''}" for v, r in ranks.items())
        raise ValueError(f"{op}: the processes differ in {what}: {got} ({expected})")


def _message_device(group: Group) -> torch.device:
    """Where messages of the processes themselves lie: the same on all, wherever their features are."""
    types = group.device_types
    if "cpu" in types:
        return torch.device("cpu")
    return torch.device(types[0], torch.get_device_module(types[0]).current_device())


# ---- rows of unequal number -----------------------------------------------------------------------------------------


def gather_rows(rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """The rows of all processes, in the order of ranks. `counts` says how many each has."""
    if group.size == 1:
        return rows
    most = max(counts)
    own = _padded(rows, most).contiguous()
    out = own.new_empty(group.size * most, *own.shape[1:])
    _all_gather(out, own, group=group.handle)
    if min(counts) == most:
        return out
    return torch.cat([out[r * most : r * most + count] for r, count in enumerate(counts)])


def reduce_scatter_rows(rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """The transpose of `gather_rows`: of each process's share of `rows`, the sum over all processes."""
    if group.size == 1:
        return rows
    most = max(counts)
    if min(counts) != most:
        rows = torch.cat([_padded(part, most) for part in rows.split(list(counts))])
    out = rows.new_empty(most, *rows.shape[1:])
    _reduce_scatter(out, rows.contiguous(), group=group.handle)
    return out[: counts[group.rank]]


def _padded(rows: Tensor, count: int) -> Tensor:
    missing = count - rows.shape[0]
    return rows if missing == 0 else torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])


def sum_over_ranks(t: Tensor, group: Group) -> Tensor:
    if group.size > 1:
        t = t.clone()
        dist.all_reduce(t, group=group.handle)
    return t


def lse_of_others(lse: Tensor, group: Group, first: int, count: int) -> Tensor:
    """Of the columns [first, first + count), this process's own, the log-sum-exp over all other processes' rows.

    `lse` has every column's over this process's rows. The own ones are left out, for a merge that keeps what they
    are exactly: near a loss of 0 the others' share is far below a rounding of the sum.
    """
    if group.size == 1:
        return torch.full_like(lse, -torch.inf)
    lse = lse.clone()
    lse[first : first + count] = -torch.inf
    top = lse.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group.handle)
    top = torch.where(top.isinf(), torch.zeros_like(top), top)  # columns of nothing, and of inf
    total = (lse - top).exp()
    dist.all_reduce(total, group=group.handle)
    own = slice(first, first + count)
    return top[own] + total[own].log()


# ---- the ring -------------------------------------------------------------------------------------------------------


def ring(
    chunk: Sequence[Tensor],
    counts: Sequence[int],
    group: Group,
    visit: Callable[[int, Sequence[Tensor]], Tensor | None],
    merge: Callable[[Tensor, Tensor], Tensor],
) -> Tensor | None:
    """Send every process's chunk once around, and bring home what the others made of it.

    Parameters
    ----------
    chunk : sequence of Tensor [counts[rank], ...]
        What travels, to the right neighbour at each of `size - 1` steps.
    visit : callable (owner, chunk) -> Tensor [counts[owner], ...] or None
        Called once with each process's chunk, its own first. What it returns for a chunk of another travels on with
        the chunk; either all calls return something or none.
    merge : callable (sum, visit's) -> sum
        Adds what a visit returned to what came with the chunk.

    Returns
    -------
    Tensor [counts[rank], ...] or None
        The merged results of all other processes' visits of this one's chunk; None where there are none.

    Notes
    -----
    While a chunk is visited, the next one comes in, and the last sum goes out: both are started before the visit and
    waited for after it. Memory is two chunks and three sums, whatever the number of processes. A sum travels one step
    behind its chunk, so the last one needs one more step, home.
    """
    size, rank = group.size, group.rank
    held = list(chunk)
    acc: Tensor | None = None
    for step in range(size):
        owner, incoming = (rank - step) % size, (rank - step - 1) % size
        operations: list[Any] = []
        coming: list[Tensor] = []
        came = None
        if step < size - 1:
            coming = [t.new_empty(counts[incoming], *t.shape[1:]) for t in held]
            for tag, (out, into) in enumerate(zip(held, coming, strict=True)):
                operations += _exchange(out.contiguous(), into, group, 1 + tag)
        if step >= 2 and acc is not None:
            came = acc.new_empty(counts[owner], *acc.shape[1:])
            operations += _exchange(acc, came, group, 0)
        pending = dist.batch_isend_irecv(operations) if operations else []
        part = visit(owner, held)
        for work in pending:
            work.wait()
        if step >= 1 and part is not None:
            acc = (part if came is None else merge(came, part)).contiguous()
        held = coming
    if acc is None:
        return None
    home = acc.new_empty(counts[rank], *acc.shape[1:])
    operations = _exchange(acc, home, group, 0)
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    return home


def _exchange(out: Tensor, into: Tensor, group: Group, tag: int) -> list[Any]:
    """Send to the right, receive from the left. Both sides know the sizes, so nothing is sent of nothing."""
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    operations = []
    if out.numel():
        operations.append(dist.P2POp(dist.isend, out, group=group.handle, tag=tag, group_peer=right))
    if into.numel():
        operations.append(dist.P2POp(dist.irecv, into, group=group.handle, tag=tag, group_peer=left))
    return operations
