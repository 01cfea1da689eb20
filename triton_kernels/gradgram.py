"""Gram matrix and weighted sums of several tasks' gradients on Triton: many tensors in one launch.

Computes what the references in `tlkernels.ops.gradgram` say. Both kernels read each gradient once, which is what they
cost: 2 T P bytes in 16 bits, and 2 R P written. Not yet measured on a GPU.

*Many tensors.* A table on the device has the address of each tensor, 0 where a task has none, another the tensor and
the first element of each program: a launch for each dtype, and one for sizes that 16 does not divide, however many
parameters there are. The tables are made on the host and copied: a call cannot be captured in a CUDA graph.

*Gram.* A program multiplies 16384 elements of up to 64 tasks with those of up to 64, in runs of 2048 that are summed
in float32 and added in float64. 16-bit products are exact, float32 keeps its bits. The programs' sums are added last,
in their order: at most a quarter as many bytes as the gradients. Without atomics no bit depends on chance.

*Combinations.* For each element the sum over tasks in their order, in float32, for up to 16 results at a time.

float64 goes to the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from tlkernels.triton_kernels import nf4
from tlkernels.triton_kernels.lora import _tile
from tlkernels.triton_kernels.nf4 import _launch
from torch import Tensor

from tlkernels.ops import gradgram as ops
from tlkernels.ops._common import FLOATS

__all__ = ["task_combine_", "task_gram"]

# Elements of a program, of a float32 sum, and of a step of the product; of a step of a combination.
_CHUNK, _RUN, _DEPTH = 16384, 2048, 64
_STEP = 1024
# Tasks of a tile of the Gram matrix, and results that are added up at a time.
_TASKS, _RESULTS = 64, 16

_POINTERS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _addresses(table, row, rows, of, count, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return which rows have a tensor, and pointers to it; aligned ones say so."""
    address = tl.load(table + row.to(tl.int64) * count + of, mask=row < rows, other=0)
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return address != 0, pointer


@triton.jit
def _place(places, sizes, program, chunk, ALIGNED: tl.constexpr):
    """Return a program's tensor, its first element and where it ends; aligned ones say so."""
    of, first = tl.load(places + 2 * program), tl.load(places + 2 * program + 1)
    end = tl.minimum(first + chunk, tl.load(sizes + of))
    if ALIGNED:
        first, end = tl.multiple_of(first, 16), tl.multiple_of(end, 16)
    return of, first, end


@triton.jit(do_not_specialize=["tasks", "count", "chunk"])
def _gram_kernel(
    table, sizes, places, parts, tasks, count, chunk,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write to parts [program, task, task] the products of a chunk of one tensor of each task."""
    across = tl.cdiv(tasks, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    tile, program = pid % (across * across), pid // (across * across)
    if tile // across > tile % across:  # the mirror image of another
        return
    of, first, end = _place(places, sizes, program, chunk, ALIGNED)
    i = tile // across * BLOCK + tl.arange(0, BLOCK)
    j = tile % across * BLOCK + tl.arange(0, BLOCK)
    has_x, x = _addresses(table, i, tasks, of, count, DTYPE, ALIGNED)
    has_y, y = _addresses(table, j, tasks, of, count, DTYPE, ALIGNED)
    total = tl.zeros([BLOCK, BLOCK], tl.float64)
    for start in range(first, end, RUN):
        run = tl.zeros([BLOCK, BLOCK], tl.float32)
        for step in range(start, tl.minimum(start + RUN, end), DEPTH):
            k = step + tl.arange(0, DEPTH)
            left = tl.load(x[:, None] + k[None, :], mask=has_x[:, None] & (k < end)[None, :], other=0.0)
            right = tl.load(y[:, None] + k[None, :], mask=has_y[:, None] & (k < end)[None, :], other=0.0)
            run = tl.dot(left, tl.trans(right), run, input_precision="ieee")
        total += run.to(tl.float64)
    # products with a task that has no tensor are 0, also of infinities
    total = tl.where(has_x[:, None] & has_y[None, :], total, 0.0)
    above = (i[:, None] <= j[None, :]) & (j < tasks)[None, :]
    tl.store(parts + ((program * tasks + i)[:, None] * tasks + j[None, :]), total, mask=above)
    tl.store(
        parts + ((program * tasks + j)[None, :] * tasks + i[:, None]), total, mask=above & (i[:, None] < j[None, :])
    )  # fmt: skip


@triton.jit(do_not_specialize=["tasks", "results", "count", "chunk"])
def _combine_kernel(
    table, out_table, sizes, places, weights, tasks, results, count, chunk,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ACCUMULATE: tl.constexpr, RESULTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Write sums of weights [result, task] times tensors, of a chunk of one tensor of each task."""
    across = tl.cdiv(results, RESULTS)
    pid = tl.program_id(0).to(tl.int64)
    r = pid % across * RESULTS + tl.arange(0, RESULTS)
    program = pid // across
    of, first, end = _place(places, sizes, program, chunk, ALIGNED)
    _, out = _addresses(out_table, r, results, of, count, DTYPE, ALIGNED)
    for start in range(first, end, STEP):
        k = start + tl.arange(0, STEP)
        inside = (r < results)[:, None] & (k < end)[None, :]
        total = tl.zeros([RESULTS, STEP], tl.float32)
        if ACCUMULATE:
            total = tl.load(out[:, None] + k[None, :], mask=inside, other=0.0).to(tl.float32)
        for t in range(0, tasks):
            address = tl.load(table + (of + t * count))
            if address != 0:
                pointer = address.to(tl.pointer_type(DTYPE))
                if ALIGNED:
                    pointer = tl.multiple_of(pointer, 16)
                g = tl.load(pointer + k, mask=k < end, other=0.0).to(tl.float32)
                w = tl.load(weights + (r.to(tl.int64) * tasks + t), mask=r < results, other=0.0)
                total += w[:, None] * g[None, :]
        tl.store(out[:, None] + k[None, :], total.to(DTYPE), mask=inside)


def _matches(grads: Sequence[Tensor], tasks: int, like: Sequence[Tensor] | None = None) -> bool:
    """Each parameter's gradients have one shape and dtype, no float64, on one device; or no elements."""
    if tasks < 1 or not grads or len(grads) % tasks:
        return False
    count = len(grads) // tasks
    for p in range(count):
        first = None if like is None else like[p]
        for g in grads[p::count]:
            if g.dtype not in FLOATS or g.dtype == torch.float64:
                return False
            if g.numel() == 0:
                continue
            first = g if first is None else first
            if g.shape != first.shape or g.dtype != first.dtype or g.device != grads[0].device:
                return False
    return True


def _readable(t: Tensor) -> Tensor:
    return t.to(nf4._kernel_dtype(t.dtype)).contiguous()


class _Many:
    """Tensors [row][parameter] of one dtype, as addresses, sizes and the places where programs begin."""

    def __init__(self, rows: Sequence[Sequence[Tensor]], sizes: Sequence[int], device: torch.device) -> None:
        self.rows = rows  # to be alive until the kernels are launched
        programs = [triton.cdiv(size, _CHUNK) for size in sizes]
        of = np.repeat(np.arange(len(sizes)), programs)
        first = np.concatenate([np.arange(n) for n in programs]) * _CHUNK
        self.programs, self.count, self.device = len(of), len(sizes), device
        addresses = [[t.data_ptr() if t.numel() else 0 for t in row] for row in rows]
        self.aligned = all(a % 16 == 0 for row in (*addresses, sizes) for a in row)
        self.table = torch.tensor(addresses, dtype=torch.int64).to(device)
        self.sizes = torch.tensor(list(sizes), dtype=torch.int64).to(device)
        self.places = torch.from_numpy(np.stack([of, first], 1).astype(np.int64)).to(device)

    def addresses(self, rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, bool]:
        found = [[t.data_ptr() for t in row] for row in rows]
        aligned = all(a % 16 == 0 for row in found for a in row)
        return torch.tensor(found, dtype=torch.int64).to(self.device), aligned


def _by_dtype(
    grads: Sequence[Tensor], tasks: int, like: Sequence[Tensor] | None = None
) -> list[tuple[torch.dtype, list[int]]]:
    """Parameters that have elements, by the kernels' dtype; without `like` those that a task has.

    Those whose size a wide word does not divide are on their own, so that the others can be read in wide words.
    """
    count = len(grads) // tasks
    found: dict[tuple[torch.dtype, bool], list[int]] = {}
    for p in range(count):
        some = next((g for g in grads[p::count] if g.numel()), None) if like is None else like[p]
        if some is not None and some.numel():
            found.setdefault((nf4._kernel_dtype(some.dtype), some.numel() % 16 == 0), []).append(p)
    return [(dtype, of) for (dtype, _), of in found.items()]


def task_gram(grads: Sequence[Tensor], tasks: int) -> Tensor:
    """Run the op ``task_gram``; see `tlkernels.ops.task_gram`."""
    if not _matches(grads, tasks):
        return ops._reference_task_gram(grads, tasks)
    count, device = len(grads) // tasks, grads[0].device
    gram = torch.zeros((tasks, tasks), dtype=torch.float64, device=device)
    block = _tile(tasks, _TASKS)
    tiles = triton.cdiv(tasks, block) ** 2
    for dtype, of in _by_dtype(grads, tasks):
        rows = [[_readable(grads[t * count + p]) for p in of] for t in range(tasks)]
        many = _Many(rows, [max(row[p].numel() for row in rows) for p in range(len(of))], device)
        parts = torch.empty((many.programs, tasks, tasks), dtype=torch.float64, device=device)
        _launch(
            _gram_kernel, (many.programs * tiles,), many.table, many.sizes, many.places, parts, tasks, many.count,
            _CHUNK, DTYPE=_POINTERS[dtype], ALIGNED=many.aligned, BLOCK=block, RUN=_RUN, DEPTH=_DEPTH,
        )  # fmt: skip
        gram += parts.sum(0)
    return gram


def task_combine_(
    out: Sequence[Tensor], grads: Sequence[Tensor], weights: Tensor, *, accumulate: bool = False
) -> None:  # fmt: skip
    """Run the op ``task_combine_``; see `tlkernels.ops.task_combine_`."""
    results, tasks = weights.shape if weights.dim() == 2 else (0, 0)
    count = len(out) // results if results else 0
    if not (
        count and len(out) % results == 0 and weights.dtype in ops.WEIGHTS and tasks and len(grads) == count * tasks
        and _matches(out, results, out[:count]) and _matches(grads, tasks, out[:count])
        and all(t.numel() == out[p % count].numel() for p, t in enumerate(out))
        and weights.device == out[0].device == grads[0].device
    ):  # fmt: skip
        return ops._reference_task_combine_(out, grads, weights, accumulate=accumulate)
    device, narrow = out[0].device, weights.to(torch.float32).contiguous()
    height = min(_RESULTS, triton.next_power_of_2(results))
    for dtype, of in _by_dtype(grads, tasks, out[:count]):
        rows = [[_readable(grads[t * count + p]) for p in of] for t in range(tasks)]
        many = _Many(rows, [out[p].numel() for p in of], device)
        into = [[_readable(out[r * count + p]) for p in of] for r in range(results)]
        addresses, aligned = many.addresses(into)
        _launch(
            _combine_kernel, (many.programs * triton.cdiv(results, height),), many.table, addresses, many.sizes,
            many.places, narrow, tasks, results, many.count, _CHUNK, DTYPE=_POINTERS[dtype],
            ALIGNED=aligned and many.aligned, ACCUMULATE=accumulate, RESULTS=height, STEP=_STEP // height,
        )  # fmt: skip
        for r in range(results):
            for i, p in enumerate(of):
                if into[r][i] is not out[r * count + p]:
                    out[r * count + p].copy_(into[r][i])
    return None
