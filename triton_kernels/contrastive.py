"""Contrastive losses on Triton: log-sum-exps of rows and columns, sigmoid losses, and their gradients, tile by tile.

Computes what the equations and references in `tlkernels.ops.contrastive` say, for any sizes. The N x M logits are
never stored. Logits, exponentials and sums are float32; gradients of features are rounded once to their dtype. Not yet
measured on a GPU: the choices below are arithmetic, for N = M = 32768, D = 768, 16 bits, on an H200 (790 TFLOP/s,
4.2 TB/s, 132 multiprocessors, 50 MB of L2 cache), where one product of 2 N M D flops takes 2.1 ms.

==========  =======================================  ===============================================================
kernel      flops; bytes moved                       cut of the work
==========  =======================================  ===============================================================
lse         2 N M D; x and y once a panel, and 8     a tile of 128 x 128 logits a program, in panels of 64 x 128
            bytes a row or column of each tile       tiles, whose partial statistics are 17 MB, for any N and M
merge       those 17 MB, mostly in L2                64 rows or columns of a panel's parts a program
weights     2 N M D; writes G, 2 N M                 the same tiles, in chunks of 16 MB of G
accumulate  4 N M D; reads G twice, from L2, and     a tile of dx or dy a program; few tiles: the reduction is cut
            float32 dx and dy once a chunk: 5 GB     too, and another launch adds the parts
sigmoid     2 N M D                                  as lse without, as weights with a gradient
==========  =======================================  ===============================================================

*One tile, two directions.* A tile's rows and columns each get their own maximum and sum: exponentials relative to one
maximum for all would lose the rows that lie far below it. Two exponentials an element are 0.25 of a multiprocessor's
cycles, and the rest of the steps about 0.15, where the matrix instructions of D = 768 take 0.38: what follows the
product costs as much as the product, unless it overlaps with the next tile's. The target logit comes from the same
tile, so no logit exceeds its own log-sum-exp.

*Pairs (maximum, sum).* The sum is relative to the maximum, or to 0 where the maximum is infinite, and a merged pair is
again one. What is written last is ``maximum + log(sum)``, and for a label ``(maximum - logit) + log(sum)``: exactly 0
where the label has all of the weight.

*Backward.* A chunk of the logits' gradient G, in the features' dtype and small enough to be found in the L2 cache
again, is fed to both products, which add to float32 accumulators: 8 N M D flops in all with the forward pass. Storing
G rounds it once more than computing it in registers would, each element on its own; 16-bit matrix instructions would
round it as well. In float16 it is first multiplied by a power of two that brings the largest gradient to 2^12:
1 / N times a probability is below float16's numbers. The gradient of the scale is summed in the tile, from G before it
is rounded. In float32, which has no matrix instructions that keep its bits, cuBLAS makes the two products.

*Symmetric matrices* (no y): tiles on and above the diagonal serve rows by their rows and by their columns; so do the
chunks of ``G + G^T``: 3 N^2 D flops backward instead of 4.

*Masks cost where they strike.* Labels, excluded pairs and the matrix' edge are looked for per tile, with one branch.

Not done: two programs a multiprocessor (tiles of 128 x 64 take 100 registers a thread, but 1.5 times the operands from
L2), tiles of 128 x 256 (0.75 of the operands), Hopper's bulk tensor copies, both products of a chunk in one launch.
The first two are what to try when this is measured.

The order of additions depends on the shapes, the dtype and the number of multiprocessors only; nothing is atomic, and
nothing waits for the host. The first call with a new D tries several pipeline depths, which stops the device: do it
before capturing a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from tlkernels.triton_kernels import nf4
from tlkernels.triton_kernels.lora import _rows, _sum_chunks, _tile
from tlkernels.triton_kernels.nf4 import _launch
from torch import Tensor

from tlkernels.ops import contrastive as ops
from tlkernels.ops._common import check_device
from tlkernels.ops._registry import interpreting

__all__ = [
    "sigmoid_contrastive",
    "sigmoid_contrastive_backward",
    "sigmoid_contrastive_sum",
    "sim_lse",
    "sim_lse_backward",
]

_INF = tl.constexpr(float("inf"))

# ---- steps of the kernels -------------------------------------------------------------------------------------------


@triton.jit
def _tile_at(pid, row_tiles, tiles, BAND: tl.constexpr):
    """Find a program's row tile and column tile: those that run together make a band, which shares most through L2."""
    band = pid // (BAND * tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    within = pid % (BAND * tiles)
    return band * BAND + within % height, within // height


@triton.jit
def _dots(
    x, y, row, column, rows, columns, depth, x_stride, y_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Return x[row] y[column]^T, 0 outside."""
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for step in range(0, tl.cdiv(depth, BLOCK_DEPTH)):
        k = step * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
        left = tl.load(
            x + (row[:, None] * x_stride + k[None, :]), mask=(row < rows)[:, None] & (k < depth)[None, :], other=0.0
        )  # fmt: skip
        right = tl.load(
            y + (column[:, None] * y_stride + k[None, :]),
            mask=(column < columns)[:, None] & (k < depth)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    return acc


@triton.jit
def _logits(dots, scale, bias):
    """Return scale dots + bias, rounded once."""
    s = tl.load(scale)
    return dots * s if bias is None else tl.fma(dots, s, tl.load(bias))


@triton.jit
def _place(index, i, size, first, limit, BLOCK: tl.constexpr):
    """Return where in the BLOCK entries from `first` on, and below `limit`, index[i] is; -1: nowhere."""
    value = tl.load(index + i, mask=i < size, other=-1)
    inside = (value >= first) & (value < tl.minimum(first + BLOCK, limit))
    return tl.where(inside, value - first, -1).to(tl.int32)


@triton.jit
def _at_columns(place, COLUMNS: tl.constexpr):
    """Return true at (i, place[i])."""
    return place[:, None] == tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _at_rows(place, ROWS: tl.constexpr):
    """Return true at (place[j], j)."""
    return tl.arange(0, ROWS)[:, None] == place[None, :]


@triton.jit
def _base(top):
    """Return what the sum beside a maximum is relative to."""
    return tl.where((top == _INF) | (top == -_INF), 0.0, top)


@triton.jit
def _lse_and_grad(lse, grad, i, size):
    """Load them. Relative to +inf everything weighs nothing: in rows of nothing, and in those outside."""
    value = tl.load(lse + i, mask=i < size, other=_INF)
    return tl.where(value == -_INF, _INF, value), tl.load(grad + i, mask=i < size, other=0.0)


@triton.jit
def _log1p(u):
    """Return log(1 + u) for 0 <= u <= 1 to 2 roundings: 2 artanh(r) = 2 (r + r^3 / 3 + ...), r = u / (2 + u) <= 1/3."""
    r = u / (2.0 + u)
    square = r * r
    series = tl.fma(square, 1.0 / 17.0, 1.0 / 15.0)
    series = tl.fma(square, series, 1.0 / 13.0)
    series = tl.fma(square, series, 1.0 / 11.0)
    series = tl.fma(square, series, 1.0 / 9.0)
    series = tl.fma(square, series, 1.0 / 7.0)
    series = tl.fma(square, series, 1.0 / 5.0)
    series = tl.fma(square, series, 1.0 / 3.0)
    twice = r + r
    return tl.fma(twice * square, series, twice)


# ---- kernels --------------------------------------------------------------------------------------------------------


def _pipelines() -> list[triton.Config]:
    """Pipeline depths to try. A sum inside a tile depends on the warps, so the tile's size alone says how many."""
    if interpreting():
        return [triton.Config({})]
    return [triton.Config({}, num_warps=warps, num_stages=stages) for warps in (4, 8) for stages in (2, 3, 4)]


def _warps_of_tile(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    size = constants["BLOCK_ROWS"] * constants["BLOCK_COLUMNS"]
    return [config for config in configs if config.num_warps == (8 if size > 64 * 64 else 4)]


_tuned_by_depth = triton.autotune(
    _pipelines(), key=["depth", "BLOCK_ROWS", "BLOCK_COLUMNS"],
    prune_configs_by=None if interpreting() else {"early_config_prune": _warps_of_tile},
)  # fmt: skip
_NOT_SIZES = ["row0", "column0", "rows", "columns", "height", "width"]


@_tuned_by_depth
@triton.jit(do_not_specialize=_NOT_SIZES)
def _lse_kernel(
    x, y, scale, bias, labels, exclude, row_max, row_sum, column_max, column_sum, target,
    row0, column0, rows, columns, height, width, depth, x_stride, y_stride,
    SYMMETRIC: tl.constexpr, BAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Write the (maximum, sum) pairs of a tile's rows and columns, and the logits of labels that lie in it.

    The panel begins at (row0, column0) and has `height` rows, `width` columns; column_max may be None. In a symmetric
    matrix the columns stand for rows of the other half; tiles below the diagonal, and columns on it, hold nothing.
    """
    row_tiles, tiles = tl.cdiv(height, BLOCK_ROWS), tl.cdiv(width, BLOCK_COLUMNS)
    row_tile, tile = _tile_at(tl.program_id(0), row_tiles, tiles, BAND)
    i = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first_row = row0 + row_tile.to(tl.int64) * BLOCK_ROWS
    first_column = column0 + tile.to(tl.int64) * BLOCK_COLUMNS
    row, column = first_row + tl.arange(0, BLOCK_ROWS), first_column + tl.arange(0, BLOCK_COLUMNS)
    row_part = tile.to(tl.int64) * height + i
    column_part = row_tile.to(tl.int64) * width + j
    if SYMMETRIC:  # noqa: SIM102 (apart, what is known when it compiles leaves no code)
        if first_column < first_row:
            nothing = tl.full([BLOCK_ROWS], -_INF, tl.float32)
            tl.store(row_max + row_part, nothing, mask=i < height)
            tl.store(row_sum + row_part, tl.zeros_like(nothing), mask=i < height)
            nothing = tl.full([BLOCK_COLUMNS], -_INF, tl.float32)
            tl.store(column_max + column_part, nothing, mask=j < width)
            tl.store(column_sum + column_part, tl.zeros_like(nothing), mask=j < width)
            return
    z = _logits(
        _dots(
            x, y, row, column, rows, columns, depth, x_stride, y_stride, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH
        ),
        scale, bias,
    )  # fmt: skip
    if (first_row + BLOCK_ROWS > rows) | (first_column + BLOCK_COLUMNS > columns):
        z = tl.where((row < rows)[:, None] & (column < columns)[None, :], z, -_INF)
    if labels is not None:
        place = _place(labels, row, rows, first_column, columns, BLOCK_COLUMNS)
        if tl.max(place, 0) >= 0:
            own = tl.sum(tl.where(_at_columns(place, BLOCK_COLUMNS), z, 0.0), 1)
            tl.store(target + row, own, mask=place >= 0)
        if SYMMETRIC:
            place = _place(labels, column, columns, first_row, rows, BLOCK_ROWS)
            if (tl.max(place, 0) >= 0) & (first_row < first_column):
                own = tl.sum(tl.where(_at_rows(place, BLOCK_ROWS), z, 0.0), 0)
                tl.store(target + column, own, mask=place >= 0)
    by_row = z
    if exclude is not None:
        place = _place(exclude, row, rows, first_column, columns, BLOCK_COLUMNS)
        if tl.max(place, 0) >= 0:
            by_row = tl.where(_at_columns(place, BLOCK_COLUMNS), -_INF, z)
    top = tl.max(by_row, 1)
    total = tl.sum(tl.exp(by_row - _base(top)[:, None]), 1)
    tl.store(row_max + row_part, top, mask=i < height)
    tl.store(row_sum + row_part, total, mask=i < height)
    if column_max is not None:
        by_column = by_row
        if SYMMETRIC:
            by_column = z
            if exclude is not None:
                place = _place(exclude, column, columns, first_row, rows, BLOCK_ROWS)
                if tl.max(place, 0) >= 0:
                    by_column = tl.where(_at_rows(place, BLOCK_ROWS), -_INF, z)
        top = tl.max(by_column, 0)
        total = tl.sum(tl.exp(by_column - _base(top)[None, :]), 0)
        if SYMMETRIC:  # on the diagonal, the rows are all
            top = tl.where(first_row < first_column, top, -_INF)
            total = tl.where(first_row < first_column, total, 0.0)
        tl.store(column_max + column_part, top, mask=j < width)
        tl.store(column_sum + column_part, total, mask=j < width)


@triton.jit(do_not_specialize=["start", "size", "parts"])
def _merge_kernel(
    part_max, part_sum, best, total, start, size, parts, PARTS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Merge parts[:, i] of a panel into the pair at start + i."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    part = tl.arange(0, PARTS)
    inside = i < size
    at = part[:, None].to(tl.int64) * size + i[None, :]
    here = (part < parts)[:, None] & inside[None, :]
    m = tl.load(part_max + at, mask=here, other=-_INF)
    s = tl.load(part_sum + at, mask=here, other=0.0)
    m0 = tl.load(best + (start + i), mask=inside, other=-_INF)
    s0 = tl.load(total + (start + i), mask=inside, other=0.0)
    top = tl.maximum(tl.max(m, 0), m0)
    base = _base(top)
    # a pair of nothing has no weight, however far 0 is above the maximum
    s = tl.where(m == -_INF, s, s * tl.exp(_base(m) - base[None, :]))
    s0 = tl.where(m0 == -_INF, s0, s0 * tl.exp(_base(m0) - base))
    tl.store(best + (start + i), top, mask=inside)
    tl.store(total + (start + i), s0 + tl.sum(s, 0), mask=inside)


@triton.jit(do_not_specialize=["size", "rows", "columns"])
def _finish_kernel(
    best, total, lse, labels, target, nll, size, rows, columns, OF_COLUMNS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Write the pairs' log-sum-exps, and what a row's, or that of its label's column, is above its label's logit."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = tl.load(best + i, mask=i < size, other=0.0)
    s = tl.load(total + i, mask=i < size, other=1.0)
    tl.store(lse + i, _base(m) + _log(s), mask=i < size)
    if labels is not None:
        label = tl.load(labels + i, mask=i < rows, other=-1)
        chosen = (label >= 0) & (label < columns)
        if OF_COLUMNS:
            m = tl.load(best + label, mask=chosen, other=0.0)
            s = tl.load(total + label, mask=chosen, other=1.0)
        own = tl.load(target + i, mask=chosen, other=0.0)
        value = tl.where(chosen, (_base(m) - own) + _log(s), 0.0)
        tl.store(nll + i, value, mask=i < rows)


@triton.jit
def _log(s):
    return tl.where(s == 0.0, -_INF, tl.log(tl.where(s == 0.0, 1.0, s)))


@_tuned_by_depth
@triton.jit(do_not_specialize=_NOT_SIZES)
def _weights_kernel(
    x, y, scale, bias, labels, exclude, lse_row, lse_col, grad_row, grad_col, grad_pair, amplifier, g, sums,
    row0, column0, rows, columns, height, width, depth, x_stride, y_stride, g_stride,
    SYMMETRIC: tl.constexpr, BAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Write a tile of G, the gradient of the logits, to a chunk g (or None), and the tile's sum of G x y^T to sums.

    The chunk is whole tiles, 0 outside the matrix.
    In a symmetric matrix, where lse_col is lse_row and grad_col is grad_row, G + G^T.
    """
    row_tiles, tiles = tl.cdiv(height, BLOCK_ROWS), tl.cdiv(width, BLOCK_COLUMNS)
    row_tile, tile = _tile_at(tl.program_id(0), row_tiles, tiles, BAND)
    i = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first_row = row0 + row_tile.to(tl.int64) * BLOCK_ROWS
    first_column = column0 + tile.to(tl.int64) * BLOCK_COLUMNS
    row, column = first_row + tl.arange(0, BLOCK_ROWS), first_column + tl.arange(0, BLOCK_COLUMNS)
    dots = _dots(
        x, y, row, column, rows, columns, depth, x_stride, y_stride, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH
    )  # fmt: skip
    z = _logits(dots, scale, bias)
    from_row, grad = _lse_and_grad(lse_row, grad_row, row, rows)
    weight = grad[:, None] * tl.exp(z - from_row[:, None])
    if lse_col is not None:
        from_column, grad_across = _lse_and_grad(lse_col, grad_col, column, columns)
        weight += grad_across[None, :] * tl.exp(z - from_column[None, :])
    if exclude is not None:
        place = _place(exclude, row, rows, first_column, columns, BLOCK_COLUMNS)
        if SYMMETRIC:
            across = _place(exclude, column, columns, first_row, rows, BLOCK_ROWS)
            if (tl.max(place, 0) >= 0) | (tl.max(across, 0) >= 0):  # made again: to keep both terms takes registers
                term = tl.where(_at_columns(place, BLOCK_COLUMNS), 0.0, grad[:, None] * tl.exp(z - from_row[:, None]))
                weight = grad_across[None, :] * tl.exp(z - from_column[None, :])
                weight = term + tl.where(_at_rows(across, BLOCK_ROWS), 0.0, weight)
        elif tl.max(place, 0) >= 0:
            weight = tl.where(_at_columns(place, BLOCK_COLUMNS), 0.0, weight)
    if labels is not None:
        place = _place(labels, row, rows, first_column, columns, BLOCK_COLUMNS)
        if tl.max(place, 0) >= 0:
            pair = tl.load(grad_pair + row, mask=row < rows, other=0.0)
            weight += tl.where(_at_columns(place, BLOCK_COLUMNS), pair[:, None], 0.0)
        if SYMMETRIC:
            place = _place(labels, column, columns, first_row, rows, BLOCK_ROWS)
            if tl.max(place, 0) >= 0:
                pair = tl.load(grad_pair + column, mask=column < columns, other=0.0)
                weight += tl.where(_at_rows(place, BLOCK_ROWS), pair[None, :], 0.0)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if (first_row + BLOCK_ROWS > rows) | (first_column + BLOCK_COLUMNS > columns):
        weight = tl.where(inside, weight, 0.0)
    tl.store(sums + (row_tile * tiles + tile), tl.sum(weight * dots))
    if g is not None:
        if amplifier is not None:
            weight *= tl.load(amplifier)
        tl.store(g + (i[:, None] * g_stride + j[None, :]), weight.to(g.dtype.element_ty))


@_tuned_by_depth
@triton.jit(do_not_specialize=[*_NOT_SIZES, "sums_stride"])
def _sigmoid_kernel(
    x, y, scale, bias, labels, weights, loss, amplifier, g, sums,
    row0, column0, rows, columns, height, width, depth, x_stride, y_stride, g_stride, sums_stride,
    BAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Write, of a tile, what is not None: the rows' sums of the loss, and with sums, of all of it and of its gradient.

    g is as in `_weights_kernel`. weights are those of the rows, 1 where None; sums are of G x y^T, of G, and without
    weights of the loss.
    """
    row_tiles, tiles = tl.cdiv(height, BLOCK_ROWS), tl.cdiv(width, BLOCK_COLUMNS)
    row_tile, tile = _tile_at(tl.program_id(0), row_tiles, tiles, BAND)
    i = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first_row = row0 + row_tile.to(tl.int64) * BLOCK_ROWS
    first_column = column0 + tile.to(tl.int64) * BLOCK_COLUMNS
    row, column = first_row + tl.arange(0, BLOCK_ROWS), first_column + tl.arange(0, BLOCK_COLUMNS)
    dots = _dots(
        x, y, row, column, rows, columns, depth, x_stride, y_stride, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH
    )  # fmt: skip
    # the loss is log(1 + e^w): w is z, and -z at a label
    w = _logits(dots, scale, bias)
    if labels is not None:
        place = _place(labels, row, rows, first_column, columns, BLOCK_COLUMNS)
        if tl.max(place, 0) >= 0:
            w = tl.where(_at_columns(place, BLOCK_COLUMNS), -w, w)
    u = tl.exp(-tl.abs(w))
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    on_edge = (first_row + BLOCK_ROWS > rows) | (first_column + BLOCK_COLUMNS > columns)
    if weights is None:
        each = tl.maximum(w, 0.0) + _log1p(u)
        if on_edge:
            each = tl.where(inside, each, 0.0)
        of_rows = tl.sum(each, 1)
        if loss is not None:
            tl.store(loss + (tile.to(tl.int64) * height + i), of_rows, mask=row < rows)
    if sums is not None:
        share = tl.where(w >= 0.0, 1.0, u) / (1.0 + u)
        if labels is not None:  # noqa: SIM102
            if tl.max(place, 0) >= 0:
                share = tl.where(_at_columns(place, BLOCK_COLUMNS), -share, share)
        if weights is not None:
            share *= tl.load(weights + row, mask=row < rows, other=0.0)[:, None]
        if on_edge:
            share = tl.where(inside, share, 0.0)
        at = row_tile * tiles + tile
        tl.store(sums + at, tl.sum(share * dots))
        tl.store(sums + (sums_stride + at), tl.sum(share))
        if weights is None:
            tl.store(sums + (2 * sums_stride + at), tl.sum(of_rows, 0))
        if g is not None:
            if amplifier is not None:
                share *= tl.load(amplifier)
            tl.store(g + (i[:, None] * g_stride + j[None, :]), share.to(g.dtype.element_ty))


def _tiles() -> list[triton.Config]:
    """Tile widths and pipeline depths to try; none changes the order of additions. The interpreter takes only one."""
    if interpreting():
        return [triton.Config({"BLOCK_COLUMNS": 64})]
    shapes = ((64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3), (128, 8, 4), (256, 8, 3))
    return [triton.Config({"BLOCK_COLUMNS": width}, num_warps=warps, num_stages=n) for width, warps, n in shapes]


@triton.autotune(_tiles(), key=["columns", "TRANSPOSED", "SPLITS", "BLOCK_ROWS"], restore_value=["out"])
@triton.jit(do_not_specialize=["rows", "depth"])
def _accumulate_kernel(
    g, w, out, rows, columns, depth, g_rows, g_depth, g_stride, w_stride, out_part, out_stride,
    TRANSPOSED: tl.constexpr, ADD: tl.constexpr, SPLITS: tl.constexpr, BAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Write g w, or g^T w, with ADD on top of out; with SPLITS > 1 that many partial sums, one a slice of out.

    g has g_rows and g_depth, multiples of 16, which lets its loads be wide: zeros follow the product's own. It is
    small, so 32 bits hold its indices.
    """
    row_tiles, tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    row_tile, tile = _tile_at(tl.program_id(0), row_tiles, tiles, BAND)
    i, j = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    row, column = row_tile * BLOCK_ROWS + i, tile * BLOCK_COLUMNS + j
    split, d = tl.program_id(1), tl.arange(0, BLOCK_DEPTH)
    steps = tl.cdiv(depth, BLOCK_DEPTH)
    share = tl.cdiv(steps, SPLITS)
    first = split * share * BLOCK_DEPTH
    w += first.to(tl.int64) * w_stride
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for k in range(first, tl.minimum(steps, (split + 1) * share) * BLOCK_DEPTH, BLOCK_DEPTH):
        if TRANSPOSED:
            inside = (k + d < g_depth)[:, None] & (row < g_rows)[None, :]
            left = tl.trans(tl.load(g + ((k + d)[:, None] * g_stride + row[None, :]), mask=inside, other=0.0))
        else:
            inside = (row < g_rows)[:, None] & (k + d < g_depth)[None, :]
            left = tl.load(g + (row[:, None] * g_stride + (k + d)[None, :]), mask=inside, other=0.0)
        inside = (k + d < depth)[:, None] & (column < columns)[None, :]
        right = tl.load(w + (d[:, None] * w_stride + column[None, :]), mask=inside, other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        w += BLOCK_DEPTH * w_stride
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    out += split.to(tl.int64) * out_part + row_tile.to(tl.int64) * BLOCK_ROWS * out_stride
    at = out + (i[:, None] * out_stride + column[None, :])
    if ADD:
        acc += tl.load(at, mask=inside, other=0.0)
    tl.store(at, acc, mask=inside)


# ---- launching ------------------------------------------------------------------------------------------------------

# Sides of a tile of logits at most. A program of 128 x 128 takes 180 to 255 registers in each of 256 threads, most of
# them for what follows the product; three steps of 64 are 96 KB. float32 keeps its operands in registers.
_BLOCK = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}

# Tiles of a panel of the forward pass: 62 for each of 132 multiprocessors, so the last wave costs 2 %; 17 MB of partial
# statistics with tiles of 128 x 128, which stay in L2.
_PANEL = (64, 128)

# Elements of a chunk of G: 16 MB in 16 bits and in float32. 16 MB stay in the L2 cache between the kernel that writes
# them and the two that read them; larger chunks would read and write the accumulators less often.
_CHUNK = {torch.bfloat16: 2**23, torch.float16: 2**23, torch.float32: 2**22}

# Columns of a chunk that has rows enough. It is less than half of the rows: while the chunks of some rows follow one
# another, dx stays in L2, and what is read and written in memory is dy, of these columns.
_CHUNK_COLUMNS = 2048

# Row tiles of a band: the programs that run together on 132 multiprocessors make 12 x 11 tiles.
_BAND = 12


_Part = tuple[int, int, int, int]  # first row, first column, rows, columns


class _Matrix(NamedTuple):
    """The logits scale x y^T + bias that are never stored, and how they are cut into tiles."""

    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor | None
    symmetric: bool
    block_rows: int
    block_columns: int

    @property
    def size(self) -> tuple[int, int]:
        return self.x.shape[0], self.y.shape[0]

    def tiles(self, height: int, width: int) -> tuple[int, int]:
        return triton.cdiv(height, self.block_rows), triton.cdiv(width, self.block_columns)

    def parts(self, height: int, width: int) -> Iterator[_Part]:
        """Row by row the parts of so many rows and columns, as (row0, column0, rows, columns); none below a diagonal.

        Of a symmetric matrix, they must be square.
        """
        rows, columns = self.size
        for row0 in range(0, rows if columns else 0, height):
            for column0 in range(row0 if self.symmetric else 0, columns, width):
                yield row0, column0, min(height, rows - row0), min(width, columns - column0)

    def launch(self, kernel: Any, part: _Part, *args: Any, more: Any = (), **constants: Any) -> None:
        """Run a kernel on the tiles of a part: x, y, scale, bias, args, the part's place and sizes, strides, more."""
        row0, column0, height, width = part
        row_tiles, tiles = self.tiles(height, width)
        _launch(
            kernel, (row_tiles * tiles,), self.x, self.y, self.scale, self.bias, *args,
            row0, column0, *self.size, height, width, self.x.shape[1], self.x.stride(0), self.y.stride(0), *more,
            **constants, BAND=_BAND, BLOCK_ROWS=self.block_rows, BLOCK_COLUMNS=self.block_columns,
            BLOCK_DEPTH=_tile(self.x.shape[1], nf4._DEPTH[self.x.dtype]),
        )  # fmt: skip


def _matrix(x: Tensor, y: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None) -> _Matrix:
    left = _rows(x)
    right = left if y is None else _rows(y)
    most = _BLOCK[left.dtype]
    return _Matrix(
        left, right, _scalar(logit_scale), None if logit_bias is None else _scalar(logit_bias), y is None,
        _tile(len(left), most), _tile(len(right), most),
    )  # fmt: skip


def _scalar(t: Tensor) -> Tensor:
    return t.reshape(1).to(torch.float32)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _merge(parts: tuple[Tensor | None, ...], running: tuple[Tensor, Tensor], start: int, size: int, count: int) -> None:
    """Merge `count` parts of `size` pairs each into the pairs from `start` on."""
    padded = triton.next_power_of_2(count)
    tile = min(256, 8192 // padded)
    _launch(
        _merge_kernel, (triton.cdiv(size, tile),), *parts, *running, start, size, count, PARTS=padded, TILE=tile
    )  # fmt: skip


def _finish(
    running: tuple[Tensor, Tensor], labels: Tensor | None, target: Tensor | None, columns: int, *, of_columns: bool
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exps, and what they exceed the labels' logits by."""
    size, rows, tile = len(running[0]), 0 if labels is None else len(labels), 256
    lse = torch.empty_like(running[0])
    nll = lse.new_empty(rows)
    if size or rows:
        _launch(
            _finish_kernel, (triton.cdiv(max(size, rows), tile),), *running, lse, labels, target, nll,
            size, rows, columns, OF_COLUMNS=of_columns, TILE=tile,
        )  # fmt: skip
    return lse, nll


def _chunk(m: _Matrix) -> tuple[int, int]:
    """Return the rows and columns of a chunk of G, whole tiles."""

    def whole(size: int, most: int, block: int) -> int:
        return max(1, min(triton.cdiv(size, block), most // block)) * block

    elements, (rows, columns) = _CHUNK[m.x.dtype], m.size
    if m.symmetric:
        return (whole(rows, math.isqrt(elements), m.block_rows),) * 2
    height = whole(rows, elements // whole(columns, _CHUNK_COLUMNS, m.block_columns), m.block_rows)
    return height, whole(columns, elements // height, m.block_columns)


def _accumulate(g: Tensor, w: Tensor, out: Tensor, *, add: bool, transposed: bool = False) -> None:
    """Write g w, or g^T w, to the float32 out, or add it to what is there; g has zeros behind its rows and columns."""
    (rows, columns), depth = out.shape, len(w)
    if g.dtype == torch.float32:
        own = g[:depth, :rows].t() if transposed else g[:rows, :depth]
        out.addmm_(own, w, beta=int(add))
        return
    if columns == 0:
        return
    block, block_depth = _tile(rows, _BLOCK[g.dtype]), nf4._DEPTH[g.dtype]
    row_tiles = triton.cdiv(rows, block)
    splits = nf4._splits(
        row_tiles * triton.cdiv(columns, 128), triton.cdiv(depth, block_depth), nf4._processors(g.device)
    )  # fmt: skip
    target = out[None] if splits == 1 else out.new_empty((splits, rows, columns))

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return row_tiles * triton.cdiv(columns, meta["BLOCK_COLUMNS"]), splits

    _launch(
        _accumulate_kernel, grid, g, w, target, rows, columns, depth, *(g.shape[::-1] if transposed else g.shape),
        g.stride(0), w.stride(0), 0 if splits == 1 else target.stride(0), target.stride(1),
        TRANSPOSED=transposed, ADD=add and splits == 1, SPLITS=splits, BAND=_BAND, BLOCK_ROWS=block,
        BLOCK_DEPTH=block_depth,
    )  # fmt: skip
    if splits > 1:
        _sum_chunks(target, out[None], 1, add=add)


def _gradients(
    m: _Matrix, fill: Callable[..., None], sums: int, dtype: torch.dtype, amplifier: Tensor | None, need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Return dx, dy, empty what is not needed, and so many sums over all tiles.

    fill(part, g, sums) writes a chunk of the amplified G, and each tile's sums.
    """
    (rows, columns), depth, device = m.size, m.x.shape[1], m.x.device
    height, width = _chunk(m)
    row_tiles, tiles = m.tiles(height, width)
    g = torch.empty((height, width), dtype=m.x.dtype, device=device) if need_x or need_y else None
    parts = torch.zeros((sums, row_tiles * tiles), dtype=torch.float32, device=device)
    total = torch.zeros((sums, row_tiles * tiles), dtype=torch.float64, device=device)
    made = torch.empty if rows and columns else torch.zeros
    grad_x = made((rows if need_x else 0, depth), dtype=torch.float32, device=device)
    grad_y = made((columns if need_y else 0, depth), dtype=torch.float32, device=device)
    for part in m.parts(height, width):
        row0, column0, here, there = part
        fill(part, g, parts)
        row_tiles, tiles = m.tiles(here, there)
        diagonal = m.symmetric and row0 == column0  # has each pair of rows twice
        total[:, : row_tiles * tiles].add_(parts[:, : row_tiles * tiles], alpha=0.5 if diagonal else 1.0)
        if g is None:
            continue
        chunk = g[: row_tiles * m.block_rows, : tiles * m.block_columns]
        in_x, in_y = slice(row0, row0 + here), slice(column0, column0 + there)
        if need_x:
            # the rows of a symmetric matrix were columns of the chunks above
            _accumulate(chunk, m.y[in_y], grad_x[in_x], add=column0 > 0)
        if m.symmetric and not diagonal:
            _accumulate(chunk, m.x[in_x], grad_x[in_y], add=row0 > 0, transposed=True)
        if need_y:
            _accumulate(chunk, m.x[in_x], grad_y[in_y], add=row0 > 0, transposed=True)
    scale = m.scale if amplifier is None else m.scale / amplifier
    return (
        _scaled(grad_x, scale, dtype) if need_x else grad_x.new_empty(0, dtype=dtype),
        _scaled(grad_y, scale, dtype) if need_y else grad_y.new_empty(0, dtype=dtype),
        [each.sum().to(torch.float32) for each in total],
    )


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply, and round once."""
    return torch.mul(grad, scale, out=grad if dtype == torch.float32 else torch.empty_like(grad, dtype=dtype))


def _amplifier(dtype: torch.dtype, *grads: Tensor | None) -> Tensor | None:
    """Return the power of two that brings G's largest term, of at most four, to 2^12; in float16, on its device."""
    given = [g.abs().amax() for g in grads if g is not None and g.numel()]
    if dtype != torch.float16 or not given:
        return None
    exponent = torch.frexp(torch.stack(given).amax()).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ones((), dtype=torch.float32, device=exponent.device), 12 - exponent)


# ---- the ops: checks, in the reference's words or by the reference, then the kernels --------------------------------


def sim_lse(
    x: Tensor, y: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None, labels: Tensor | None,
    exclude: Tensor | None, *, cols: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the op ``sim_lse``; see `tlkernels.ops.sim_lse`."""
    op = "sim_lse"
    if x.dtype == torch.float64:
        return ops._reference_sim_lse(x, y, logit_scale, logit_bias, labels, exclude, cols=cols)
    rows, columns = _check_logits(op, x, y, logit_scale, logit_bias, labels, exclude)
    m, cols = _matrix(x, y, logit_scale, logit_bias), cols and y is not None
    labels, exclude = _contiguous(labels, exclude)
    both = cols or m.symmetric
    of_rows, of_columns = _nothing(rows, x.device), _nothing(columns if cols else 0, x.device)
    target = None if labels is None else torch.zeros(rows, dtype=torch.float32, device=x.device)

    height, width = _PANEL[0] * m.block_rows, _PANEL[0 if m.symmetric else 1] * m.block_columns
    for part in m.parts(height, width):
        row0, column0, here, there = part
        row_tiles, tiles = m.tiles(here, there)
        row_parts = _pairs((tiles, here), x.device)
        column_parts = _pairs((row_tiles, there), x.device) if both else (None, None)
        m.launch(_lse_kernel, part, labels, exclude, *row_parts, *column_parts, target, SYMMETRIC=m.symmetric)
        _merge(row_parts, of_rows, row0, here, tiles)
        if both:
            _merge(column_parts, of_rows if m.symmetric else of_columns, column0, there, row_tiles)

    lse_row, nll_row = _finish(of_rows, labels, target, columns, of_columns=False)
    if not cols:
        return lse_row, lse_row.new_empty(0), nll_row, lse_row.new_empty(0)
    lse_col, nll_col = _finish(of_columns, labels, target, columns, of_columns=True)
    return lse_row, lse_col, nll_row, nll_col


def _pairs(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Maxima and sums, to be written."""
    first, second = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    return first, second


def _nothing(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Maxima and sums over nothing."""
    best, total = _pairs((size,), device)
    return best.fill_(-torch.inf), total.zero_()


def _check_logits(
    op: str, x: Tensor, y: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None, labels: Tensor | None,
    exclude: Tensor | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Check what all ops take, and return N and M."""
    rows, columns = ops._check_features(op, x, y)
    ops._check_scalars(op, logit_scale=logit_scale, logit_bias=logit_bias)
    ops._check_index(op, "labels", labels, rows, columns)
    ops._check_index(op, "exclude", exclude, rows, columns)
    check_device(op, x.device, y=y, logit_scale=logit_scale, logit_bias=logit_bias, labels=labels, exclude=exclude)
    return rows, columns


def sim_lse_backward(
    x: Tensor, y: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None, labels: Tensor | None,
    exclude: Tensor | None, lse_row: Tensor, lse_col: Tensor | None, grad_row: Tensor, grad_col: Tensor | None,
    grad_pair: Tensor | None, *, need_x: bool = True, need_y: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the op ``sim_lse_backward``: dx, dy and ds as `tlkernels.ops.contrastive` defines them."""
    op = "sim_lse_backward"
    unpaired = (lse_col is None) != (grad_col is None) or (labels is None) != (grad_pair is None)
    if x.dtype == torch.float64 or unpaired or (y is None and lse_col is not None):
        return ops._reference_sim_lse_backward(
            x, y, logit_scale, logit_bias, labels, exclude, lse_row, lse_col, grad_row, grad_col, grad_pair,
            need_x=need_x, need_y=need_y,
        )  # fmt: skip
    rows, columns = _check_logits(op, x, y, logit_scale, logit_bias, labels, exclude)
    for name, t, size in (
        ("lse_row", lse_row, rows), ("grad_row", grad_row, rows), ("lse_col", lse_col, columns),
        ("grad_col", grad_col, columns), ("grad_pair", grad_pair, rows),
    ):  # fmt: skip
        ops._check_vector(op, name, t, size, torch.float32)
    check_device(
        op, x.device, lse_row=lse_row, lse_col=lse_col, grad_row=grad_row, grad_col=grad_col, grad_pair=grad_pair
    )
    m = _matrix(x, y, logit_scale, logit_bias)
    amplifier = _amplifier(m.x.dtype, grad_row, grad_col, grad_pair)
    if m.symmetric:
        lse_col, grad_col = lse_row, grad_row
        m = m._replace(block_columns=min(64, m.block_columns))  # masks for both directions take registers
    indices = _contiguous(labels, exclude)
    vectors = _contiguous(lse_row, lse_col, grad_row, grad_col, grad_pair)

    def fill(part: _Part, g: Tensor | None, sums: Tensor) -> None:
        m.launch(
            _weights_kernel, part, *indices, *vectors, amplifier, g, sums, more=(_stride(g),), SYMMETRIC=m.symmetric
        )  # fmt: skip

    need_x, need_y = need_x or m.symmetric, need_y and not m.symmetric
    grad_x, grad_y, (grad_scale,) = _gradients(m, fill, 1, x.dtype, amplifier, need_x, need_y)
    return grad_x, grad_y, grad_scale


def _stride(g: Tensor | None) -> int:
    return 0 if g is None else g.stride(0)


def sigmoid_contrastive(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, labels: Tensor | None
) -> Tensor:  # fmt: skip
    """Run the op ``sigmoid_contrastive``; see `tlkernels.ops.sigmoid_contrastive`."""
    op = "sigmoid_contrastive"
    if x.dtype == torch.float64:
        return ops._reference_sigmoid_contrastive(x, y, logit_scale, logit_bias, labels)
    rows, columns = _check_logits(op, x, y, logit_scale, logit_bias, labels)
    m, (labels,) = _matrix(x, y, logit_scale, logit_bias), _contiguous(labels)
    loss = (torch.empty if columns else torch.zeros)(rows, dtype=torch.float32, device=x.device)
    for part in m.parts(_PANEL[0] * m.block_rows, _PANEL[1] * m.block_columns):
        row0, column0, here, there = part
        parts = torch.empty((m.tiles(here, there)[1], here), dtype=torch.float32, device=x.device)
        m.launch(_sigmoid_kernel, part, labels, None, parts, None, None, None, more=(0, 0))
        _sum_chunks(parts, loss[None, row0 : row0 + here], 1, add=column0 > 0)
    return loss


def sigmoid_contrastive_backward(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, labels: Tensor | None, grad_loss: Tensor, *,
    need_x: bool = True, need_y: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the op ``sigmoid_contrastive_backward``: dx, dy, and the gradients of scale and bias."""
    op = "sigmoid_contrastive_backward"
    if x.dtype == torch.float64:
        return ops._reference_sigmoid_contrastive_backward(
            x, y, logit_scale, logit_bias, labels, grad_loss, need_x=need_x, need_y=need_y
        )
    rows, _ = ops._check_features(op, x, y)
    ops._check_vector(op, "grad_loss", grad_loss, rows, torch.float32)
    check_device(op, x.device, grad_loss=grad_loss)
    _check_logits(op, x, y, logit_scale, logit_bias, labels)
    m = _matrix(x, y, logit_scale, logit_bias)
    grad_x, grad_y, (grad_scale, grad_bias) = _sigmoid_gradients(m, x.dtype, labels, grad_loss, need_x, need_y)
    return grad_x, grad_y, grad_scale, grad_bias


def sigmoid_contrastive_sum(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, labels: Tensor | None, *,
    need_x: bool = True, need_y: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the op ``sigmoid_contrastive_sum``: the sum of all losses, and its gradients, from the same tiles."""
    op = "sigmoid_contrastive_sum"
    if x.dtype == torch.float64:
        return ops._reference_sigmoid_contrastive_sum(
            x, y, logit_scale, logit_bias, labels, need_x=need_x, need_y=need_y
        )
    _check_logits(op, x, y, logit_scale, logit_bias, labels)
    m = _matrix(x, y, logit_scale, logit_bias)
    grad_x, grad_y, (grad_scale, grad_bias, loss) = _sigmoid_gradients(m, x.dtype, labels, None, need_x, need_y)
    return loss, grad_x, grad_y, grad_scale, grad_bias


def _sigmoid_gradients(
    m: _Matrix, dtype: torch.dtype, labels: Tensor | None, weights: Tensor | None, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return dx, dy, ds, db of the weighted sum of the rows' losses; without weights, of their sum, and it."""
    amplifier = _amplifier(m.x.dtype, m.scale.new_ones(1) if weights is None else weights)
    vectors = _contiguous(labels, weights)

    def fill(part: _Part, g: Tensor | None, sums: Tensor) -> None:
        m.launch(
            _sigmoid_kernel, part, *vectors, None, amplifier, g, sums, more=(_stride(g), sums.stride(0))
        )  # fmt: skip

    return _gradients(m, fill, 3 if weights is None else 2, dtype, amplifier, need_x, need_y)
