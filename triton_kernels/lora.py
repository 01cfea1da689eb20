"""LoRA on Triton: the forward product, its gradients, many adapters in one batch, norms and merging.

Computes what the equations and references in `tlkernels.ops.lora` say, for any rank, any sizes, dense and 4-bit base
weights. Sums are float32; y, s and ds are rounded once to x's dtype; the dropout mask has the reference's bits and is
made again wherever it is needed. Not yet measured on a GPU: the choices below are arithmetic, for 8192 rows,
in = out = 4096, rank 16, 16 bits, on an H200 (790 TFLOP/s, 4.2 TB/s), where the frozen product takes 350 us.

===============  ==================================================  ===============================================
kernel           bytes moved (n rows, e bytes per value); flops      cut of the work
===============  ==================================================  ===============================================
down             e n in; 2 n in r: s, 67 MB, 16 us                   up to 64 rows a program, and parts of the sum
down, with dB    e n out + 8 out r n / 256 + ds; 4 n out r: 84 MB,   256 rows x a part of the columns a program: one
                 20 us, where two passes over dy are 134 MB          reading of dy gives both
factor           e n in; 2 n in r: dA, 67 MB, 16 us                  128 columns x a chunk of rows a program
product          the frozen product's, s, B; 2 n out r more:         a tile of y a program; few tiles: the reduction
                 0.4 % of its flops                                  is cut too, and a second launch adds the parts
norm             W once for every 64 of the rank                     32 rows of W a program
merge            W twice                                             a tile of 64 x 128 a program
mask             n in                                                a tile of 16 x 512 a program
===============  ==================================================  ===============================================

*s is not computed in the base product.* There each tile of y would need it, and so compute it: r / 256 of the flops
again in matrix instructions that take at least 16 columns (22 us for rank 16, 88 for 64), and registers. A kernel of
its own reads x once, which the product then finds in the L2 cache in part. The same holds for ds before dx.

*The update comes first.* The accumulator of a tile starts from ``s B^T``, rank block by rank block, and the base
product is added: while the long loop runs there is one accumulator only, also where dropout zeroes elements of the
update or the tile's rows have several adapters. The bias comes last. A product whose reduction is cut leaves float32
parts; the launch that adds them starts from the update as well, and `lora_grouped_delta_` is that launch with y itself
as the one part.

*Dropout.* A thread draws 128 random bits for 8 neighbouring columns, the 16 bytes that it loads. Elements are zeroed
in x's dtype; the division by 1 - p stands in the scale of the result, so matrix instructions see x's own values. Some
100 integer instructions a draw are 30 us (14 T/s) for s, for dA and for dx, where they do not hide behind the loads.

*Many adapters.* Rows are taken in the order of their adapters, which torch sorts on the device; the host learns
nothing. ``bounds[g]`` is where adapter g's rows begin. Kernels that add over rows, and `down`, cut them in chunks of
one adapter each: the grid has room for the worst case, and a program finds its chunk by a scan of the bounds. The base
product does not: its tiles are full, and each starts from the updates of the adapters that occur in it, one mostly.

*float32* has no matrix instructions that keep its bits: for many rows cuBLAS multiplies, and a launch of its own adds
the update, 2 % of the time.

*4 bits.* Tiles are decoded in the product's loop with the steps of `nf4`; for so many rows that decoding again and
again costs more than memory, a slab of 32 MiB is decoded and multiplied, as there.

Not done: Hopper's bulk tensor copies (operands come by asynchronous copies of 16 bytes), and one launch for several
adapters of one input. The first is what to try when the product is measured against cuBLAS.

The order of additions depends on the shapes, the dtype, the adapters' rows and the number of multiprocessors only;
nothing is atomic. The first call with a new shape tries several tile shapes, which stops the device: do it before
capturing a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from tlkernels.triton_kernels import nf4
from tlkernels.triton_kernels.nf4 import _decode_tile, _launch
from torch import Tensor

from tlkernels.ops import lora as ops
from tlkernels.ops._common import check_device, check_float, check_sizes
from tlkernels.ops._registry import interpreting

__all__ = [
    "dora_weight_norm",
    "lora_dropout_mask",
    "lora_grad_ab",
    "lora_grad_x",
    "lora_grouped_delta_",
    "lora_grouped_grad",
    "lora_grouped_grad_x",
    "lora_linear",
    "lora_linear_grouped",
    "lora_merge_",
    "nf4_dora_weight_norm",
    "nf4_lora_grad_x",
    "nf4_lora_linear",
]

# ---- steps of the kernels -------------------------------------------------------------------------------------------


@triton.jit
def _seeds(rng):
    """Load the seed and the two halves of the offset; before a loop, which would load them again."""
    offset = tl.load(rng + 1).to(tl.uint64, bitcast=True)
    return tl.load(rng).to(tl.uint64, bitcast=True), (offset & 0xFFFFFFFF).to(tl.uint32), (offset >> 32).to(tl.uint32)


@triton.jit
def _keep(seed, low, high, row, octet0, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements [row, 8 octet0 : 8 octet0 + COLUMNS] dropout keeps."""
    zero = tl.zeros([ROWS, COLUMNS // 8], tl.uint32)
    octet = zero + (octet0 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :]
    w0, w1, w2, w3 = tl.philox(seed, octet, zero + row.to(tl.uint32)[:, None], zero + low, zero + high)
    # a join adds a last dimension: of the words 0, 2 and 1, 3, of the two, and of the halves of each word
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS, COLUMNS])
    return halves.to(tl.int32) >= threshold


@triton.jit
def _chunk(bounds, index, rows, groups, GROUPS: tl.constexpr, CHUNK: tl.constexpr):
    """Find chunk `index`: its adapter, and its first and last place in the rows' order; none: first >= last.

    With adapters, a chunk holds rows of one, and each begins a chunk; GROUPS is their number, or more.
    """
    index = index.to(tl.int64)
    if bounds is None:
        group = index * 0
        first = index * CHUNK
        last = tl.minimum(first + CHUNK, rows)
    else:
        g = tl.arange(0, GROUPS)
        start, end, upto = _chunks_upto(bounds, g, groups, CHUNK)
        group = tl.sum((upto <= index).to(tl.int64), 0)
        mine = g == group
        before = tl.sum(tl.where(mine, upto - (end - start + CHUNK - 1) // CHUNK, 0), 0)
        first = tl.sum(tl.where(mine, start, 0), 0) + (index - before) * CHUNK
        last = tl.minimum(first + CHUNK, tl.sum(tl.where(mine, end, 0), 0))
    return group, first, last


@triton.jit
def _chunks_upto(bounds, g, groups, CHUNK: tl.constexpr):
    """Load where the rows of each adapter start and end, and count the chunks of it and those before it."""
    start = tl.load(bounds + g, mask=g < groups, other=0)
    end = tl.load(bounds + g + 1, mask=g < groups, other=0)
    return start, end, tl.cumsum((end - start + CHUNK - 1) // CHUNK, 0)


@triton.jit
def _row_at(order, i, valid):
    """Return which rows stand at these places of the order."""
    row = i
    if order is not None:
        row = tl.load(order + i, mask=valid, other=0)
    return row


@triton.jit
def _rank_of(ranks, group, rank):
    used = rank
    if ranks is not None:
        used = tl.minimum(tl.load(ranks + group).to(tl.int32), rank)
    return used


@triton.jit
def _update(
    acc, s, f, row, valid, column, width, rank, used, f_width, f_rank,
    BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """Return acc + f[column, :used] s[row, :used]^T, a rank block at a time."""
    for rank0 in tl.range(0, used, BLOCK_RANK, num_stages=1):
        j = (rank0 + tl.arange(0, BLOCK_RANK)).to(tl.int64)
        right = tl.load(
            s + (row[:, None] * rank + j[None, :]), mask=valid[:, None] & (j < used)[None, :], other=0.0
        )  # fmt: skip
        left = tl.load(
            f + (column[:, None] * f_width + j[None, :] * f_rank),
            mask=(column < width)[:, None] & (j < used)[None, :], other=0.0,
        ).to(right.dtype)  # fmt: skip
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    return acc


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["threshold"])
def _mask_kernel(rng, out, rows, cols, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles = tl.cdiv(cols, COLUMNS)
    pid = tl.program_id(0).to(tl.int64)
    row, tile = pid // tiles * ROWS + tl.arange(0, ROWS), pid % tiles
    seed, low, high = _seeds(rng)
    keep = _keep(seed, low, high, row, tile * (COLUMNS // 8), threshold, ROWS, COLUMNS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < cols)[None, :]
    tl.store(out + (row[:, None] * cols + column[None, :]), keep.to(tl.uint8), mask=inside)


def _pipelines() -> list[triton.Config]:
    """Warps and pipeline depths to try; none changes the order of additions. The interpreter takes only one."""
    if interpreting():
        return [triton.Config({})]
    return [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in ((4, 3), (4, 4), (8, 2), (8, 3))]


@triton.autotune(_pipelines(), key=["depth", "rank", "BLOCK_ROWS", "SPLITS"])
@triton.jit(do_not_specialize=["rows", "groups", "threshold"])
def _down_kernel(
    x, f, right, rng, out, partial, order, bounds, ranks, scalings,
    rows, depth, rank, groups, x_stride, f_group, f_rank, f_depth, scale, threshold,
    GROUPS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Write scale (M o x) f^T of a chunk of rows; with SPLITS > 1 that many partial sums, one a slice of out.

    With `right` also partial[chunk] = x^T right, from the same loads; then there is no mask.
    """
    chunk = tl.program_id(0).to(tl.int64)
    group, first, last = _chunk(bounds, chunk, rows, groups, GROUPS, BLOCK_ROWS)
    if first >= last:
        return
    i = first + tl.arange(0, BLOCK_ROWS)
    valid = i < last
    row = _row_at(order, i, valid)
    j = tl.program_id(2) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    used = _rank_of(ranks, group, rank)
    if right is not None:
        p = tl.load(
            right + (row[:, None] * rank + j[None, :]), mask=valid[:, None] & (j < used)[None, :], other=0.0
        )  # fmt: skip

    split = tl.program_id(1)
    steps = tl.cdiv(depth, BLOCK_DEPTH)
    share = tl.cdiv(steps, SPLITS)
    if rng is not None:
        seed, low, high = _seeds(rng)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)
    for step in range(split * share, tl.minimum(steps, (split + 1) * share)):
        k = step * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
        inside = valid[:, None] & (k < depth)[None, :]
        panel = tl.load(x + (row[:, None] * x_stride + k[None, :]), mask=inside, other=0.0)
        factor = tl.load(
            f + (group * f_group + j[:, None].to(tl.int64) * f_rank + k[None, :].to(tl.int64) * f_depth),
            mask=(j < used)[:, None] & (k < depth)[None, :], other=0.0,
        ).to(panel.dtype)  # fmt: skip
        if right is not None:
            product = tl.where((j < used)[None, :], tl.dot(tl.trans(panel), p, input_precision="ieee"), 0.0)
            tl.store(
                partial + ((chunk * depth + k)[:, None] * rank + j[None, :]), product,
                mask=(k < depth)[:, None] & (j < rank)[None, :],
            )  # fmt: skip
        if rng is not None:
            keep = _keep(seed, low, high, row, step * (BLOCK_DEPTH // 8), threshold, BLOCK_ROWS, BLOCK_DEPTH)
            panel = tl.where(keep, panel, 0.0)
        acc = tl.dot(panel, tl.trans(factor), acc, input_precision="ieee")

    if scalings is not None:
        scale = scale * tl.load(scalings + group)
    value = tl.where((j < used)[None, :], acc * scale, 0.0)
    at = (split.to(tl.int64) * rows + row)[:, None] * rank + j[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=valid[:, None] & (j < rank)[None, :])


@triton.autotune(_pipelines(), key=["width", "rank", "CHUNK"])
@triton.jit(do_not_specialize=["rows", "groups", "threshold"])
def _factor_kernel(
    p, x, rng, out, order, bounds, ranks,
    rows, width, rank, groups, x_stride, scale, threshold,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write out[chunk] = scale p^T (M o x) over the rows of a chunk: [rank, width]."""
    tiles = tl.cdiv(width, BLOCK_COLUMNS)
    pid = tl.program_id(0).to(tl.int64)
    chunk, tile = pid // tiles, pid % tiles
    group, first, last = _chunk(bounds, chunk, rows, groups, GROUPS, CHUNK)
    if first >= last:
        return
    column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    j = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    used = _rank_of(ranks, group, rank)
    if rng is not None:
        seed, low, high = _seeds(rng)
    acc = tl.zeros([BLOCK_COLUMNS, BLOCK_RANK], tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        i = start + tl.arange(0, BLOCK_ROWS)
        valid = i < last
        row = _row_at(order, i, valid)
        inside = valid[:, None] & (column < width)[None, :]
        panel = tl.load(x + (row[:, None] * x_stride + column[None, :]), mask=inside, other=0.0)
        if rng is not None:
            keep = _keep(seed, low, high, row, tile * (BLOCK_COLUMNS // 8), threshold, BLOCK_ROWS, BLOCK_COLUMNS)
            panel = tl.where(keep, panel, 0.0)
        left = tl.load(
            p + (row[:, None] * rank + j[None, :]), mask=valid[:, None] & (j < used)[None, :], other=0.0
        )  # fmt: skip
        acc = tl.dot(tl.trans(panel), left, acc, input_precision="ieee")
    value = tl.where((j < used)[None, :], acc * scale, 0.0)
    at = (chunk * rank + j)[None, :] * width + column[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=(j < rank)[None, :] & (column < width)[:, None])


@triton.jit(do_not_specialize=["groups", "chunks"])
def _sum_chunks_kernel(
    partial, bounds, out, size, groups, chunks,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, ADD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the sum of each adapter's chunks, in their order; with ADD on top of what is there."""
    tiles = tl.cdiv(size, TILE)
    pid = tl.program_id(0).to(tl.int64)
    group, at = pid // tiles, pid % tiles * TILE + tl.arange(0, TILE)
    inside = at < size
    if bounds is None:
        begin = group * 0
        end = begin + chunks
    else:
        g = tl.arange(0, GROUPS)
        _, _, upto = _chunks_upto(bounds, g, groups, CHUNK)
        begin = tl.sum(tl.where(g == group - 1, upto, 0), 0)
        end = tl.sum(tl.where(g == group, upto, 0), 0)
    total = tl.zeros([TILE], tl.float32)
    if ADD:
        total = tl.load(out + (group * size + at), mask=inside, other=0.0)
    for chunk in range(begin, end):
        total += tl.load(partial + (chunk * size + at), mask=inside, other=0.0)
    tl.store(out + (group * size + at), total.to(out.dtype.element_ty), mask=inside)


def _tiles() -> list[triton.Config]:
    """Tile heights and pipeline depths to try; none changes the order of additions. The interpreter takes only one."""
    if interpreting():
        return [triton.Config({"BLOCK_OUT": 64})]
    shapes = (
        (32, 4, 5), (64, 4, 3), (64, 4, 5), (128, 4, 3), (128, 8, 3), (128, 8, 4), (256, 8, 3), (256, 8, 4),
    )  # fmt: skip
    return [triton.Config({"BLOCK_OUT": out}, num_warps=warps, num_stages=stages) for out, warps, stages in shapes]


def _tiles_that_fit(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """Leave out what cannot win: tall tiles for few rows or float32, which needs registers, and flat ones for many."""
    rows, wide = {**arguments, **constants}["BLOCK_ROWS"], arguments["x"].element_size() == 4
    heights = (32, 64) if wide else (32, 64, 128) if rows < 64 else (64, 128, 256)
    return [config for config in configs if config.kwargs["BLOCK_OUT"] in heights]


@triton.autotune(
    _tiles(), key=["width", "depth", "rank", "NF4", "TRANSPOSED", "SPLITS", "BLOCK_ROWS"],
    prune_configs_by={"early_config_prune": _tiles_that_fit},
)  # fmt: skip
@triton.jit(do_not_specialize=["rows", "groups", "parts", "column0", "threshold"])
def _product_kernel(
    x, w, absmax, code, absmax_scale, absmax_offset, dynamic_code, bias, base, s, f, rng, out,
    order, ids, bounds, ranks, rows, width, depth, rank, groups, row_bytes, x_stride, w_width, w_depth,
    base_part, base_stride, parts, f_group, f_width, f_rank, out_part, out_stride, column0, scale, threshold,
    NF4: tl.constexpr, TRANSPOSED: tl.constexpr, SPLITS: tl.constexpr, RUN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ABSMAX_BLOCK_SIZE: tl.constexpr, BAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Write M o (scale s f^T) + x w^T + base + bias, computed transposed; of x, s, base and bias any may be None.

    w is [width, depth] through its strides, or in 4 bits, [depth, width] when TRANSPOSED. With SPLITS > 1 there are
    that many partial sums of x w^T alone, one a slice of out. base is the sum of that many parts.
    """
    row_tiles, tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(width, BLOCK_OUT)
    # programs that run together make a band of BAND row tiles: near a square, so they share the most through L2
    pid = tl.program_id(0).to(tl.int64)
    band = pid // (BAND * tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    within = pid % (BAND * tiles)
    place = (band * BAND + within % height) * BLOCK_ROWS
    tile = within // height
    i = place + tl.arange(0, BLOCK_ROWS)
    valid = i < rows
    row = _row_at(order, i, valid)
    column = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    split = tl.program_id(1)

    acc = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    if s is not None:
        if bounds is None:
            acc = _update(acc, s, f, row, valid, column, width, rank, rank, f_width, f_rank, BLOCK_RANK)
        else:
            none = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
            at = tl.maximum(place, tl.load(bounds))
            end = tl.minimum(tl.minimum(place + BLOCK_ROWS, rows), tl.load(bounds + groups))
            while at < end:
                group = tl.load(ids + at).to(tl.int64)
                upto = tl.load(bounds + group + 1)
                mine = (i >= at) & (i < upto)
                update = _update(
                    none, s, f + group * f_group, row, mine, column, width, rank, _rank_of(ranks, group, rank),
                    f_width, f_rank, BLOCK_RANK,
                )  # fmt: skip
                acc = tl.where(mine[None, :], update, acc)  # a NaN of one adapter stays in its rows
                at = tl.minimum(upto, end)
        if rng is not None:
            seed, low, high = _seeds(rng)
            keep = _keep(seed, low, high, row, (column0 + tile * BLOCK_OUT) // 8, threshold, BLOCK_ROWS, BLOCK_OUT)
            acc = tl.where(tl.trans(keep), acc * scale, 0.0)

    if x is not None:
        steps = tl.cdiv(depth, BLOCK_DEPTH)
        share = tl.cdiv(steps, SPLITS)
        for step in range(split * share, tl.minimum(steps, (split + 1) * share)):
            k = step * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
            inside = valid[:, None] & (k < depth)[None, :]
            panel = tl.load(x + (row[:, None] * x_stride + k[None, :]), mask=inside, other=0.0)
            if NF4 and TRANSPOSED:
                weight = tl.trans(_decode_tile(
                    w, absmax, code, absmax_scale, absmax_offset, dynamic_code, k, tile * (BLOCK_OUT // 2),
                    depth, width, row_bytes, BLOCK_DEPTH, BLOCK_OUT, RUN, BLOCK_SIZE, ABSMAX_BLOCK_SIZE,
                )).to(panel.dtype)  # fmt: skip
            elif NF4:
                weight = _decode_tile(
                    w, absmax, code, absmax_scale, absmax_offset, dynamic_code, column, step * (BLOCK_DEPTH // 2),
                    width, depth, row_bytes, BLOCK_OUT, BLOCK_DEPTH, RUN, BLOCK_SIZE, ABSMAX_BLOCK_SIZE,
                ).to(panel.dtype)  # fmt: skip
            else:
                weight = tl.load(
                    w + (column[:, None] * w_width + k[None, :].to(tl.int64) * w_depth),
                    mask=(column < width)[:, None] & (k < depth)[None, :], other=0.0,
                )  # fmt: skip
            acc = tl.dot(weight, tl.trans(panel), acc, input_precision="ieee")

    inside = valid[None, :] & (column < width)[:, None]
    if base is not None:
        from_base = base + (row[None, :] * base_stride + column[:, None])
        for _ in range(parts):
            acc += tl.load(from_base, mask=inside, other=0.0).to(tl.float32)
            from_base += base_part
    if bias is not None:
        acc += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[:, None]
    at = split.to(tl.int64) * out_part + (row[None, :] * out_stride + column[:, None])
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_kernel(
    w, absmax, code, absmax_scale, absmax_offset, dynamic_code, a, b, gram, out,
    out_features, in_features, rank, row_bytes, w_out, w_in, a_rank, a_in, b_out, b_rank, twice, square_of_scaling,
    NF4: tl.constexpr, WIDE: tl.constexpr, RUN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ABSMAX_BLOCK_SIZE: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Write the norms of rows of W + scaling B A: sqrt(|w|^2 + 2 scaling <w A^T, b> + scaling^2 <b A A^T, b>).

    WIDE multiplies in float32; else W and A have one 16-bit dtype, whose products are exact anyway.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    base = tl.zeros([BLOCK_OUT], tl.float32)
    cross = tl.zeros([BLOCK_OUT], tl.float32)
    quadratic = tl.zeros([BLOCK_OUT], tl.float32)
    for rank0 in range(0, rank, BLOCK_RANK):
        j = (rank0 + tl.arange(0, BLOCK_RANK)).to(tl.int64)
        projected = tl.zeros([BLOCK_OUT, BLOCK_RANK], tl.float32)
        for step in range(0, tl.cdiv(in_features, BLOCK_DEPTH)):
            k = (step * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)).to(tl.int64)
            if NF4:
                weight = _decode_tile(
                    w, absmax, code, absmax_scale, absmax_offset, dynamic_code, row, step * (BLOCK_DEPTH // 2),
                    out_features, in_features, row_bytes,
                    BLOCK_OUT, BLOCK_DEPTH, RUN, BLOCK_SIZE, ABSMAX_BLOCK_SIZE,
                )  # fmt: skip
            else:
                weight = tl.load(
                    w + (row[:, None] * w_out + k[None, :] * w_in),
                    mask=(row < out_features)[:, None] & (k < in_features)[None, :], other=0.0,
                )  # fmt: skip
            factor = tl.load(
                a + (j[:, None] * a_rank + k[None, :] * a_in),
                mask=(j < rank)[:, None] & (k < in_features)[None, :], other=0.0,
            )  # fmt: skip
            wide = weight.to(tl.float32)
            base += tl.where(rank0 == 0, tl.sum(wide * wide, 1), 0.0)
            if WIDE:
                projected = tl.dot(wide, tl.trans(factor.to(tl.float32)), projected, input_precision="ieee")
            else:
                projected = tl.dot(weight, tl.trans(factor), projected)
        valid = (row < out_features)[:, None]
        up = tl.load(
            b + (row[:, None] * b_out + j[None, :] * b_rank), mask=valid & (j < rank)[None, :], other=0.0
        ).to(tl.float32)  # fmt: skip
        cross += tl.sum(projected * up, 1)
        for rank1 in range(0, rank, BLOCK_RANK):
            i = (rank1 + tl.arange(0, BLOCK_RANK)).to(tl.int64)
            left = tl.load(
                b + (row[:, None] * b_out + i[None, :] * b_rank), mask=valid & (i < rank)[None, :], other=0.0
            ).to(tl.float32)  # fmt: skip
            inner = tl.load(
                gram + (i[:, None] * rank + j[None, :]), mask=(i < rank)[:, None] & (j < rank)[None, :], other=0.0
            )  # fmt: skip
            quadratic += tl.sum(tl.dot(left, inner, input_precision="ieee") * up, 1)
    square = base + twice * cross + square_of_scaling * quadratic
    square = tl.where(square < 0.0, 0.0, square)  # rounding; NaN stays
    tl.store(out + row, tl.sqrt_rn(square), mask=row < out_features)


@triton.jit
def _merge_kernel(
    w, a, b, out_features, in_features, rank, w_out, w_in, a_rank, a_in, b_out, b_rank, scaling,
    WIDE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """Add scaling B A to a tile of w, in place. WIDE multiplies in float32; else A and B have one 16-bit dtype."""
    tiles = tl.cdiv(in_features, BLOCK_IN)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // tiles * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column = pid % tiles * BLOCK_IN + tl.arange(0, BLOCK_IN)
    acc = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    for rank0 in range(0, rank, BLOCK_RANK):
        j = (rank0 + tl.arange(0, BLOCK_RANK)).to(tl.int64)
        inside = (row < out_features)[:, None] & (j < rank)[None, :]
        left = tl.load(b + (row[:, None] * b_out + j[None, :] * b_rank), mask=inside, other=0.0)
        inside = (j < rank)[:, None] & (column < in_features)[None, :]
        right = tl.load(a + (j[:, None] * a_rank + column[None, :] * a_in), mask=inside, other=0.0)
        if WIDE:
            acc = tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(left, right, acc)
    at = row[:, None] * w_out + column[None, :] * w_in
    inside = (row < out_features)[:, None] & (column < in_features)[None, :]
    weight = tl.load(w + at, mask=inside, other=0.0)
    tl.store(w + at, (weight.to(tl.float32) + scaling * acc).to(weight.dtype), mask=inside)


# ---- launching ------------------------------------------------------------------------------------------------------

# Row tiles of a band of the product: of tiles of 128 x 256, the 132 programs of an H200 that run together make 12 x 11
# and read 12 MB of x and 23 MB of W where the depth is 4096. The L2 cache holds 50 MB.
_BAND = 12

# Rows whose factor gradient one chunk adds at most when there are adapters, and the rows of one step.
_CHUNK, _STEP = 512, 64

# Rows whose dB is added at a time: the float32 parts of 64 chunks, an eighth of the bytes of dy for rank 16.
_SLAB_ROWS = 64 * 256


class _Group(NamedTuple):
    """Which adapter each row has, in the order of the adapters; nothing when there is but one."""

    order: Tensor | None = None  # the rows
    ids: Tensor | None = None  # their adapters, ascending
    bounds: Tensor | None = None  # where each adapter's rows begin, and where the last one's end
    ranks: Tensor | None = None
    scalings: Tensor | None = None
    adapters: int = 1

    @property
    def padded(self) -> int:
        return triton.next_power_of_2(max(1, self.adapters))

    def chunks(self, rows: int, size: int) -> int:
        """Return how many chunks of so many rows there may be: each adapter's last may be short."""
        return triton.cdiv(rows, size) + (0 if self.bounds is None else self.adapters)


_ONE = _Group()


class _Dropout(NamedTuple):
    """The mask, and what the kept elements are divided by."""

    rng: Tensor | None = None
    threshold: int = 0
    keep: float = 1.0


_NONE = _Dropout()


def _dropout(rng: Tensor | None, dropout: float, rows: int) -> _Dropout:
    if rng is None or dropout == 0.0:
        return _NONE
    if rows >= 2**32:  # which a mask cannot have
        ops._reference_dropout_mask(rng, rows, 1, dropout)
    return _Dropout(rng.contiguous(), ops._threshold(dropout), 1.0 - dropout)


def _group(adapter_ids: Tensor, ranks: Tensor | None, scalings: Tensor | None, adapters: int) -> _Group:
    """Sort the rows by their adapters, on their device. Negative ids come before, too large ones behind them all."""
    ids, order = torch.sort(adapter_ids.reshape(-1), stable=True)
    bounds = torch.searchsorted(ids, torch.arange(adapters + 1, dtype=ids.dtype, device=ids.device))
    ranks, scalings = (None if t is None else t.contiguous() for t in (ranks, scalings))
    return _Group(order, ids, bounds, ranks, scalings, adapters)


def _rows(t: Tensor) -> Tensor:
    """As a matrix of the kernels' dtype, whose rows are contiguous."""
    matrix = t.reshape(math.prod(t.shape[:-1]), t.shape[-1]).to(nf4._kernel_dtype(t.dtype))
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _loadable(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that counts with its value in `dtype`, in a dtype that a kernel can load and round to that."""
    if t.dtype == torch.float64 or (dtype == torch.bfloat16 and interpreting()):
        t = t.to(dtype)
    return t.to(nf4._kernel_dtype(t.dtype))


def _tile(size: int, most: int) -> int:
    """Return a power of two that matrix instructions can take."""
    return min(max(16, triton.next_power_of_2(size)), most)


def _block_rank(rank: int, dtype: torch.dtype) -> int:
    return _tile(rank, 32 if dtype == torch.float32 else 64)


def _down(
    x: Tensor, factor: Tensor, scale: float, dropout: _Dropout = _NONE, group: _Group = _ONE,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, int]:  # fmt: skip
    """Return scale (M o x) factor^T [rows, rank], with `right` the parts of x^T right, and the rows of each part.

    factor is [rank, depth], or [adapters, rank, depth].
    """
    rows, depth = x.shape
    rank, wide = factor.shape[-2], x.dtype == torch.float32
    most, block_depth = ((32, 32) if wide else (64, 128)) if right is None else ((64, 32) if wide else (256, 64))
    block_rows = _tile(triton.cdiv(rows, max(1, group.adapters)), most)
    block_rank = _block_rank(rank, x.dtype)
    chunks, blocks = group.chunks(rows, block_rows), triton.cdiv(rank, block_rank)
    splits = nf4._splits(chunks * blocks, triton.cdiv(depth, block_depth), nf4._processors(x.device))
    # rows without an adapter are in no chunk
    fresh = torch.empty if group.bounds is None else torch.zeros
    out = fresh((splits, rows, rank), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    partial = None
    if right is not None:
        partial = torch.empty((chunks, depth, rank), dtype=torch.float32, device=x.device)
    if chunks:
        _launch(
            _down_kernel, (chunks, splits, blocks), x, factor, right, dropout.rng, out, partial,
            group.order, group.bounds, group.ranks, group.scalings, rows, depth, rank, group.adapters,
            x.stride(0), factor.stride(0) if factor.dim() == 3 else 0, factor.stride(-2), factor.stride(-1),
            scale / dropout.keep, dropout.threshold,
            GROUPS=group.padded, SPLITS=splits, BLOCK_ROWS=block_rows, BLOCK_RANK=block_rank, BLOCK_DEPTH=block_depth,
        )  # fmt: skip
    return _sum_splits(out, x.dtype), partial, block_rows


def _sum_splits(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Add the parts of a divided reduction."""
    if len(parts) == 1 or parts.numel() == 0:
        return parts[0].to(dtype)
    out, tile = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device), 1024
    _launch(
        nf4._sum_splits_kernel, (triton.cdiv(out.numel(), tile),), parts, None, out, out.numel(), 1,
        SPLITS=len(parts), TILE=tile,
    )  # fmt: skip
    return out


def _sum_chunks(partial: Tensor, out: Tensor, chunk: int, group: _Group = _ONE, add: bool = False) -> None:
    """Add each adapter's chunks of so many rows to out [adapters, ...]; with `add` on top of what is there."""
    size, tile = math.prod(partial.shape[1:]), 1024
    if out.numel():
        _launch(
            _sum_chunks_kernel, (triton.cdiv(size, tile) * group.adapters,), partial, group.bounds, out, size,
            group.adapters, len(partial), GROUPS=group.padded, CHUNK=chunk, ADD=add, TILE=tile,
        )  # fmt: skip


def _factor_gradient(
    p: Tensor, x: Tensor, like: Tensor, dropout: _Dropout = _NONE, group: _Group = _ONE
) -> Tensor:  # fmt: skip
    """Return p^T (M o x), [rank, width] or one for each adapter, in the shape and dtype of `like`."""
    (rows, width), rank = x.shape, p.shape[1]
    block_columns, step = (64, 32) if x.dtype == torch.float32 else (128, _STEP)
    block_rank = _block_rank(rank, x.dtype)
    tiles, blocks = triton.cdiv(width, block_columns), triton.cdiv(rank, block_rank)
    size = _CHUNK
    if group.bounds is None:  # twice as many programs as multiprocessors; powers of two, to compile for few sizes
        wanted = max(1, 2 * nf4._processors(x.device) // max(1, tiles * blocks))
        size = triton.next_power_of_2(max(step, triton.cdiv(rows, wanted)))
    chunks = group.chunks(rows, size)
    out = torch.empty(like.shape, dtype=_result_dtype(like.dtype), device=x.device)
    single = chunks == 1 and group.bounds is None
    parts = out if single else torch.empty((chunks, rank, width), dtype=torch.float32, device=x.device)
    if chunks * tiles:
        _launch(
            _factor_kernel, (chunks * tiles, blocks), p, x, dropout.rng, parts, group.order, group.bounds, group.ranks,
            rows, width, rank, group.adapters, x.stride(0), 1.0 / dropout.keep, dropout.threshold,
            GROUPS=group.padded, CHUNK=size, BLOCK_ROWS=step, BLOCK_RANK=block_rank, BLOCK_COLUMNS=block_columns,
        )  # fmt: skip
    if not single:
        _sum_chunks(parts, out, size, group)
    return out.to(like.dtype)


def _result_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a kernel writes what torch then casts to `dtype`, if that is another."""
    return torch.float32 if dtype == torch.float64 else nf4._kernel_dtype(dtype)


def _both_gradients(
    dy: Tensor, factor: Tensor, s: Tensor, like: Tensor, scale: float, group: _Group = _ONE
) -> tuple[Tensor, Tensor]:
    """Return ds = scale dy factor^T, [rows, rank], and dB = dy^T s in the shape and dtype of `like`."""
    rows = len(s)
    slab = _SLAB_ROWS if group.bounds is None else max(1, rows)
    once = rows <= slab
    dtype = _result_dtype(like.dtype) if once else torch.float32
    ds, total = torch.empty_like(s), torch.empty(like.shape, dtype=dtype, device=dy.device)
    for start in range(0, max(1, rows), slab):
        here = slice(start, start + slab)
        part, partial, chunk = _down(dy[here], factor, scale, group=group, right=s[here])
        assert partial is not None
        _sum_chunks(partial, total, chunk, group, add=start > 0)
        if once:
            ds = part
        else:
            ds[here] = part
    return ds, total.to(like.dtype)


class _Base(NamedTuple):
    """A weight [width, depth], dense, or in 4 bits, [depth, width] when transposed."""

    width: int
    depth: int
    dense: Tensor | None = None
    packed: nf4._Operands | None = None
    transposed: bool = False
    block_size: int = 64
    absmax_block_size: int = 256


class _Update(NamedTuple):
    """s factor^T: s [rows, rank], factor [width, rank] or one for each adapter; the mask is on the product."""

    s: Tensor
    factor: Tensor
    group: _Group = _ONE
    dropout: _Dropout = _NONE


def _product(x: Tensor, base: _Base, bias: Tensor | None, update: _Update) -> Tensor:
    """Return x base^T + bias + update."""
    rows = len(x)
    out = torch.empty((rows, base.width), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    bias = None if bias is None else _loadable(bias, torch.float32).contiguous()
    if base.packed is None or rows <= nf4._FUSED_ROWS[x.dtype] or base.depth == 0:
        _multiply(x, base, bias, update, out)
        return out
    step = max(128, nf4._SLAB // base.depth // 128 * 128)  # as nf4 does: whole groups of columns with one scale
    sizes = (base.depth, base.width) if base.transposed else (base.width, base.depth)
    for start in range(0, base.width, step):
        here = slice(start, min(start + step, base.width))
        size = here.stop - start
        shape, origin = ((base.depth, size), (0, start)) if base.transposed else ((size, base.depth), (start, 0))
        slab = torch.empty(shape, dtype=x.dtype, device=x.device)
        blocks = {"block_size": base.block_size, "absmax_block_size": base.absmax_block_size}
        nf4._decode_rows(None, base.packed, slab, *origin, *sizes, **blocks)
        part = _Base(size, base.depth, slab.t() if base.transposed else slab)
        narrowed = update._replace(factor=update.factor[here])
        _multiply(x, part, None if bias is None else bias[here], narrowed, out[:, here], start)
    return out


def _multiply(
    x: Tensor, base: _Base, bias: Tensor | None, update: _Update, out: Tensor, column0: int = 0
) -> None:  # fmt: skip
    """Fill out, whose first column is `column0` of the mask."""
    rows, width = out.shape
    block_rows, block_depth = _tile(rows, nf4._TILE_ROWS[x.dtype]), nf4._DEPTH[x.dtype]
    if x.dtype == torch.float32 and rows > nf4._FUSED_ROWS[x.dtype] and base.dense is not None and base.depth:
        torch.mm(x, base.dense.t(), out=out)  # in out's own precision, so nothing is lost by adding to it
        _launch_product(None, base, bias, out[None], update, out, column0, 1, block_rows, block_depth)
        return
    row_tiles, steps = triton.cdiv(rows, block_rows), triton.cdiv(base.depth, block_depth)
    splits = nf4._splits(row_tiles * triton.cdiv(width, 128), steps, nf4._processors(x.device))
    if splits == 1:
        _launch_product(x, base, bias, None, update, out, column0, 1, block_rows, block_depth)
        return
    parts = torch.empty((splits, rows, width), dtype=torch.float32, device=x.device)
    _launch_product(x, base, None, None, None, parts, 0, splits, block_rows, block_depth)
    _launch_product(None, base, bias, parts, update, out, column0, 1, block_rows, block_depth)


def _add(y: Tensor, update: _Update) -> None:
    """Add the update to a matrix in place."""
    block_rows = _tile(len(y), nf4._TILE_ROWS[y.dtype])
    base = _Base(y.shape[1], 0)
    _launch_product(None, base, None, y[None], update, y, 0, 1, block_rows, nf4._DEPTH[y.dtype])


def _launch_product(
    x: Tensor | None, base: _Base, bias: Tensor | None, parts: Tensor | None, update: _Update | None, out: Tensor,
    column0: int, splits: int, block_rows: int, block_depth: int,
) -> None:  # fmt: skip
    rows, width = out.shape[-2:]
    dense, packed, group, dropout = base.dense, base.packed, _ONE, _NONE
    # without x there is no weight, and with in-place addition no second try: one tile shape, and no tuning
    tuned, fixed = x is not None, {} if x is not None else {"BLOCK_OUT": 64}
    weight: tuple[Any, ...] = (dense, None, None, None, None, None) if packed is None else packed
    if x is None:
        weight = (None,) * 6
    s = factor = None
    rank, strides = 1, (0, 0, 0)
    if update is not None:
        s, factor, group, dropout = update
        rank = s.shape[1]
        strides = (factor.stride(0) if factor.dim() == 3 else 0, factor.stride(-2), factor.stride(-1))
    in_features = base.width if base.transposed else base.depth

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(rows, block_rows) * triton.cdiv(width, meta["BLOCK_OUT"]), splits

    _launch(
        _product_kernel if tuned else _product_kernel.fn, grid,
        x, *weight, bias, parts, s, factor, dropout.rng, out, group.order, group.ids, group.bounds, group.ranks,
        rows, width, base.depth, rank, group.adapters, in_features // 2, 0 if x is None else x.stride(0),
        *((0, 0) if dense is None else dense.stride()),
        *((0, 0, 0) if parts is None else (parts.stride(0), parts.stride(1), len(parts))), *strides,
        0 if splits == 1 else out.stride(0), out.stride(-2), column0, 1.0 / dropout.keep, dropout.threshold,
        NF4=packed is not None, TRANSPOSED=base.transposed, SPLITS=splits,
        RUN=nf4._run(in_features, base.block_size), BLOCK_SIZE=base.block_size,
        ABSMAX_BLOCK_SIZE=base.absmax_block_size, BAND=_BAND, BLOCK_ROWS=block_rows,
        BLOCK_RANK=_block_rank(rank, torch.float32 if s is None else s.dtype), BLOCK_DEPTH=block_depth, **fixed,
    )  # fmt: skip


def _forward(
    x: Tensor, base: _Base, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float,
    dropout: _Dropout = _NONE, group: _Group = _ONE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (y, s) for checked arguments."""
    matrix = _rows(x)
    s = _down(matrix, _loadable(lora_a, x.dtype), scaling, dropout, group)[0].to(x.dtype)
    update = _Update(_rows(s), _loadable(lora_b, x.dtype), group)
    y = _product(matrix, base, bias, update).to(x.dtype)
    return y.view(*x.shape[:-1], base.width), s.view(*x.shape[:-1], s.shape[1])


def _backward_x(
    grad_output: Tensor, base: _Base, ds: Tensor, lora_a: Tensor, dropout: _Dropout = _NONE, group: _Group = _ONE
) -> Tensor:  # fmt: skip
    """Return dx for checked arguments."""
    factor = _loadable(lora_a, grad_output.dtype).transpose(-1, -2)
    update = _Update(_rows(ds).contiguous(), factor, group, dropout)
    grad_x = _product(_rows(grad_output), base, None, update)
    return grad_x.view(*grad_output.shape[:-1], base.width).to(grad_output.dtype)


def _dense(weight: Tensor, transposed: bool = False) -> _Base:
    w = weight.to(nf4._kernel_dtype(weight.dtype))
    w = w.t() if transposed else w
    return _Base(w.shape[0], w.shape[1], w)


def _in_4_bits(
    weight: tuple[Any, ...], out_features: int, in_features: int, blocks: dict[str, Any], transposed: bool = False
) -> _Base:  # fmt: skip
    sizes = (in_features, out_features) if transposed else (out_features, in_features)
    return _Base(*sizes, packed=nf4._operands(*weight), transposed=transposed, **blocks)


# ---- the ops: checks, in the reference's words or by the reference, then the kernels --------------------------------


def lora_dropout_mask(rng: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """Run the op ``lora_dropout_mask``; see `tlkernels.ops.lora_dropout_mask`."""
    op = "lora_dropout_mask"
    check_sizes(op, rows=rows, cols=cols)
    if rows >= 2**32:
        return ops._reference_dropout_mask(rng, rows, cols, p)
    ops._check_dropout(op, rng, p, "p")
    out = torch.empty((rows, cols), dtype=torch.uint8, device=rng.device)
    if out.numel():
        height, width = 16, 512
        _launch(
            _mask_kernel, (triton.cdiv(rows, height) * triton.cdiv(cols, width),), rng.contiguous(), out, rows, cols,
            ops._threshold(p), ROWS=height, COLUMNS=width,
        )  # fmt: skip
    return out.view(torch.bool)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, rng: Tensor | None, *,
    scaling: float, dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the op ``lora_linear``; see `tlkernels.ops.lora_linear`."""
    op = "lora_linear"
    if x.dtype == torch.float64:
        return ops._reference_lora_linear(x, weight, bias, lora_a, lora_b, rng, scaling=scaling, dropout=dropout)
    out_features, in_features = ops._check_dense(op, weight)
    ops._check_rows(op, "x", x, in_features, f"like weight of shape {tuple(weight.shape)}")
    ops._check_same_dtype(op, "weight", weight, "x", x)
    ops._check_factors(op, lora_a, lora_b, out_features, in_features)
    ops._check_bias(op, bias, out_features)
    ops._check_dropout(op, rng, dropout)
    check_device(op, x.device, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, rng=rng)
    mask = _dropout(rng, dropout, math.prod(x.shape[:-1]))
    return _forward(x, _dense(weight), bias, lora_a, lora_b, scaling, mask)


def nf4_lora_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None,
    absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, rng: Tensor | None, out_features: int, in_features: int, *,
    scaling: float, dropout: float = 0.0, block_size: int = 64, absmax_block_size: int = 256,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the op ``nf4_lora_linear``; see `tlkernels.ops.lora_linear`."""
    op, weight = "nf4_lora_linear", (packed, absmax, code, absmax_scale, absmax_offset)
    blocks: dict[str, Any] = {"block_size": block_size, "absmax_block_size": absmax_block_size}
    if x.dtype == torch.float64:
        return ops._reference_nf4_lora_linear(
            x, *weight, bias, lora_a, lora_b, rng, out_features, in_features,
            scaling=scaling, dropout=dropout, **blocks,
        )  # fmt: skip
    check_sizes(op, out_features=out_features, in_features=in_features)
    ops._check_rows(op, "x", x, in_features, f"like the weight of shape ({out_features}, {in_features})")
    nf4._check_weight(op, *weight, out_features * in_features, x.device, **blocks)
    ops._check_factors(op, lora_a, lora_b, out_features, in_features)
    ops._check_bias(op, bias, out_features)
    ops._check_dropout(op, rng, dropout)
    check_device(op, x.device, bias=bias, lora_a=lora_a, lora_b=lora_b, rng=rng)
    mask = _dropout(rng, dropout, math.prod(x.shape[:-1]))
    base = _in_4_bits(weight, out_features, in_features, blocks)
    return _forward(x, base, bias, lora_a, lora_b, scaling, mask)


def lora_grad_ab(
    grad_output: Tensor, x: Tensor, s: Tensor, lora_a: Tensor, lora_b: Tensor, rng: Tensor | None, *,
    scaling: float, dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the op ``lora_grad_ab``: (ds, dA, dB) as `tlkernels.ops.lora` defines them."""
    op, rank = "lora_grad_ab", lora_a.shape[0] if lora_a.dim() else 0
    if x.dtype == torch.float64 or not _alike(x, (grad_output, None), (s, rank)):
        return ops._reference_lora_grad_ab(
            grad_output, x, s, lora_a, lora_b, rng, scaling=scaling, dropout=dropout
        )  # fmt: skip
    check_float(op, grad_output=grad_output, x=x)
    ops._check_factors(op, lora_a, lora_b, grad_output.shape[-1], x.shape[-1])
    ops._check_dropout(op, rng, dropout)
    check_device(op, x.device, grad_output=grad_output, s=s, lora_a=lora_a, lora_b=lora_b, rng=rng)
    rows = math.prod(x.shape[:-1])
    factor = _loadable(lora_b, x.dtype).t()
    ds, grad_b = _both_gradients(_rows(grad_output), factor, _rows(s).contiguous(), lora_b, scaling)
    ds = ds.to(x.dtype)
    grad_a = _factor_gradient(_rows(ds), _rows(x), lora_a, _dropout(rng, dropout, rows))
    return ds.view(s.shape), grad_a, grad_b


def _alike(x: Tensor, *others: tuple[Tensor, int | None]) -> bool:
    """Whether these have x's dtype and rows, and so many columns; if not, the reference says what is wrong."""
    return x.dim() > 0 and all(
        t.dtype == x.dtype and t.dim() > 0 and t.shape[:-1] == x.shape[:-1] and columns in (None, t.shape[-1])
        for t, columns in others
    )


def lora_grad_x(
    grad_output: Tensor, weight: Tensor, ds: Tensor, lora_a: Tensor, rng: Tensor | None, *, dropout: float = 0.0
) -> Tensor:  # fmt: skip
    """Run the op ``lora_grad_x``: dx as `tlkernels.ops.lora` defines it."""
    op = "lora_grad_x"
    if grad_output.dtype == torch.float64:
        return ops._reference_lora_grad_x(grad_output, weight, ds, lora_a, rng, dropout=dropout)
    out_features, in_features = ops._check_dense(op, weight)
    ops._check_rows(op, "grad_output", grad_output, out_features, f"like weight of shape {tuple(weight.shape)}")
    ops._check_same_dtype(op, "weight", weight, "grad_output", grad_output)
    ops._check_update(op, grad_output, ds, lora_a, in_features)
    ops._check_dropout(op, rng, dropout)
    check_device(op, grad_output.device, weight=weight, ds=ds, lora_a=lora_a, rng=rng)
    mask = _dropout(rng, dropout, math.prod(grad_output.shape[:-1]))
    return _backward_x(grad_output, _dense(weight, transposed=True), ds, lora_a, mask)


def nf4_lora_grad_x(
    grad_output: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None,
    absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    ds: Tensor, lora_a: Tensor, rng: Tensor | None, out_features: int, in_features: int, *,
    dropout: float = 0.0, block_size: int = 64, absmax_block_size: int = 256,
) -> Tensor:  # fmt: skip
    """Run the op ``nf4_lora_grad_x``: dx as `tlkernels.ops.lora` defines it."""
    op, weight = "nf4_lora_grad_x", (packed, absmax, code, absmax_scale, absmax_offset)
    blocks: dict[str, Any] = {"block_size": block_size, "absmax_block_size": absmax_block_size}
    if grad_output.dtype == torch.float64:
        return ops._reference_nf4_lora_grad_x(
            grad_output, *weight, ds, lora_a, rng, out_features, in_features, dropout=dropout, **blocks
        )
    check_sizes(op, out_features=out_features, in_features=in_features)
    shape = f"like the weight of shape ({out_features}, {in_features})"
    ops._check_rows(op, "grad_output", grad_output, out_features, shape)
    nf4._check_weight(op, *weight, out_features * in_features, grad_output.device, **blocks)
    ops._check_update(op, grad_output, ds, lora_a, in_features)
    ops._check_dropout(op, rng, dropout)
    check_device(op, grad_output.device, ds=ds, lora_a=lora_a, rng=rng)
    mask = _dropout(rng, dropout, math.prod(grad_output.shape[:-1]))
    base = _in_4_bits(weight, out_features, in_features, blocks, transposed=True)
    return _backward_x(grad_output, base, ds, lora_a, mask)


def lora_linear_grouped(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, adapter_ids: Tensor,
    scalings: Tensor, ranks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the op ``lora_linear_grouped``; see `tlkernels.ops.lora_linear_grouped`."""
    op = "lora_linear_grouped"
    fits = lora_b.dim() != 3 or weight.dim() != 2 or lora_b.shape[1] == weight.shape[0]
    if x.dtype == torch.float64 or not fits:
        return ops._reference_lora_linear_grouped(x, weight, bias, lora_a, lora_b, adapter_ids, scalings, ranks)
    out_features, in_features = ops._check_dense(op, weight)
    ops._check_rows(op, "x", x, in_features, f"like weight of shape {tuple(weight.shape)}")
    ops._check_same_dtype(op, "weight", weight, "x", x)
    ops._check_group(op, x, lora_a, lora_b, adapter_ids, scalings, ranks)
    ops._check_bias(op, bias, out_features)
    check_device(op, x.device, weight=weight, bias=bias)
    group = _group(adapter_ids, ranks, scalings, len(lora_a))
    return _forward(x, _dense(weight), bias, lora_a, lora_b, 1.0, group=group)


def lora_grouped_delta_(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, adapter_ids: Tensor, scalings: Tensor,
    ranks: Tensor | None, *, start: int = 0,
) -> None:  # fmt: skip
    """Run the op ``lora_grouped_delta_``; see `tlkernels.ops.lora_grouped_delta_`."""
    op, out_features = "lora_grouped_delta_", lora_b.shape[1] if lora_b.dim() == 3 else 0
    fits = _alike(x, (y, None)) and 0 <= start <= y.shape[-1] - out_features
    if x.dtype == torch.float64 or not fits:
        ops._reference_lora_grouped_delta_(y, x, lora_a, lora_b, adapter_ids, scalings, ranks, start=start)
        return
    ops._check_group(op, x, lora_a, lora_b, adapter_ids, scalings, ranks)
    check_device(op, x.device, y=y)
    part = y.narrow(-1, start, out_features)
    if part.numel() == 0:
        return
    group = _group(adapter_ids, ranks, scalings, len(lora_a))
    s = _down(_rows(x), _loadable(lora_a, x.dtype), 1.0, group=group)[0].to(x.dtype)
    target = _rows(part)  # y itself, or a copy where its rows are not a matrix in memory
    _add(target, _Update(_rows(s), _loadable(lora_b, x.dtype), group))
    if target.data_ptr() != part.data_ptr():
        part.copy_(target.view(part.shape))


def lora_grouped_grad(
    grad_output: Tensor, x: Tensor, s: Tensor, lora_a: Tensor, lora_b: Tensor, adapter_ids: Tensor, scalings: Tensor,
    ranks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the op ``lora_grouped_grad``: (ds, dA, dB) of each adapter."""
    op = "lora_grouped_grad"
    _, out_features, rank = lora_b.shape if lora_b.dim() == 3 else (0, None, None)
    if x.dtype == torch.float64 or not _alike(x, (grad_output, out_features), (s, rank)):
        return ops._reference_lora_grouped_grad(grad_output, x, s, lora_a, lora_b, adapter_ids, scalings, ranks)
    ops._check_group(op, x, lora_a, lora_b, adapter_ids, scalings, ranks)
    check_device(op, x.device, grad_output=grad_output, s=s)
    group = _group(adapter_ids, ranks, scalings, len(lora_a))
    factor = _loadable(lora_b, x.dtype).transpose(1, 2)
    ds, grad_b = _both_gradients(_rows(grad_output), factor, _rows(s).contiguous(), lora_b, 1.0, group)
    ds = ds.to(x.dtype)
    grad_a = _factor_gradient(_rows(ds), _rows(x), lora_a, group=group)
    return ds.view(s.shape), grad_a, grad_b


def lora_grouped_grad_x(
    grad_output: Tensor, weight: Tensor, ds: Tensor, lora_a: Tensor, adapter_ids: Tensor, ranks: Tensor | None
) -> Tensor:
    """Run the op ``lora_grouped_grad_x``: dx, each row with its adapter's lora_a."""
    ops._check_grouped_grad_x(grad_output, weight, ds, lora_a, adapter_ids, ranks)
    if grad_output.dtype == torch.float64:
        return ops._reference_lora_grouped_grad_x(grad_output, weight, ds, lora_a, adapter_ids, ranks)
    group = _group(adapter_ids, ranks, None, len(lora_a))
    return _backward_x(grad_output, _dense(weight, transposed=True), ds, lora_a, group=group)


def dora_weight_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scaling: float) -> Tensor:
    """Run the op ``dora_weight_norm``; see `tlkernels.ops.dora_weight_norm`."""
    op = "dora_weight_norm"
    if weight.dtype == torch.float64:
        return ops._reference_dora_weight_norm(weight, lora_a, lora_b, scaling=scaling)
    ops._check_factors(op, lora_a, lora_b, *ops._check_dense(op, weight))
    check_device(op, weight.device, lora_a=lora_a, lora_b=lora_b)
    return _norm(_dense(weight), lora_a, lora_b, scaling)


def nf4_dora_weight_norm(
    packed: Tensor, absmax: Tensor, code: Tensor | None, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    lora_a: Tensor, lora_b: Tensor, out_features: int, in_features: int, *,
    scaling: float, block_size: int = 64, absmax_block_size: int = 256,
) -> Tensor:  # fmt: skip
    """Run the op ``nf4_dora_weight_norm``; see `tlkernels.ops.dora_weight_norm`."""
    op, weight = "nf4_dora_weight_norm", (packed, absmax, code, absmax_scale, absmax_offset)
    blocks: dict[str, Any] = {"block_size": block_size, "absmax_block_size": absmax_block_size}
    check_sizes(op, out_features=out_features, in_features=in_features)
    nf4._check_weight(op, *weight, out_features * in_features, packed.device, **blocks)
    ops._check_factors(op, lora_a, lora_b, out_features, in_features)
    check_device(op, packed.device, lora_a=lora_a, lora_b=lora_b)
    return _norm(_in_4_bits(weight, out_features, in_features, blocks), lora_a, lora_b, scaling)


def _norm(base: _Base, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    rank, dense = len(lora_a), base.dense
    out = torch.empty(base.width, dtype=torch.float32, device=lora_a.device)
    if base.width == 0:
        return out
    a, b = _loadable(lora_a, torch.float32), _loadable(lora_b, torch.float32)
    gram = _down(_rows(a).float(), a, 1.0)[0]
    weight: tuple[Any, ...] = (dense, None, None, None, None, None) if base.packed is None else base.packed
    block_out = 32
    _launch(
        _norm_kernel, (triton.cdiv(base.width, block_out),), *weight, a, b, gram, out,
        base.width, base.depth, rank, base.depth // 2, *((0, 0) if dense is None else dense.stride()),
        *a.stride(), *b.stride(), 2.0 * scaling, scaling * scaling,
        NF4=base.packed is not None, WIDE=dense is None or not _same_16_bits(dense, a),
        RUN=nf4._run(base.depth, base.block_size), BLOCK_SIZE=base.block_size,
        ABSMAX_BLOCK_SIZE=base.absmax_block_size, BLOCK_OUT=block_out, BLOCK_RANK=_tile(rank, 64), BLOCK_DEPTH=64,
    )  # fmt: skip
    return out


def _same_16_bits(one: Tensor, other: Tensor) -> bool:
    """Whether matrix instructions multiply the two exactly."""
    return one.dtype == other.dtype and one.dtype != torch.float32


def lora_merge_(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scaling: float) -> None:
    """Run the op ``lora_merge_``; see `tlkernels.ops.lora_merge_`."""
    op = "lora_merge_"
    if weight.dtype == torch.float64:
        ops._reference_lora_merge_(weight, lora_a, lora_b, scaling=scaling)
        return
    ops._check_factors(op, lora_a, lora_b, *ops._check_dense(op, weight))
    check_device(op, weight.device, lora_a=lora_a, lora_b=lora_b)
    if weight.numel() == 0:
        return
    a, b = _loadable(lora_a, torch.float32), _loadable(lora_b, torch.float32)
    target = weight.to(nf4._kernel_dtype(weight.dtype))
    height, width = 64, 128
    _launch(
        _merge_kernel, (triton.cdiv(weight.shape[0], height) * triton.cdiv(weight.shape[1], width),), target, a, b,
        *weight.shape, len(a), *target.stride(), *a.stride(), *b.stride(), scaling,
        WIDE=not _same_16_bits(a, b), BLOCK_OUT=height, BLOCK_IN=width, BLOCK_RANK=_tile(len(a), 32),
    )  # fmt: skip
    if target is not weight:
        weight.copy_(target)
