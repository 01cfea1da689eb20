"""NF4 on Triton: quantize, dequantize, row look-up, and the two products that read the weight in 4 bits.

Computes what the equations and references in `tlkernels.ops.nf4` say, for any table, block size, parity of
in_features and length of the last block. Quantizing and decoding give the reference's bits, so no kernel may fuse a
multiply and an add or divide approximately: every launch has ``enable_fp_fusion=False`` (without it ptxas turns
``table[q] * scale + offset`` into one rounding) and divisions are `tl.div_rn`. The products round each decoded
weight to x's dtype, as `nf4_dequantize` does, and add in float32.

===============  ================================================  ================================================
kernel           bytes moved, for n weights and e bytes per value  cut of the work
===============  ================================================  ================================================
quantize         (e + 0.5 + 4 / block_size) n                      4096 consecutive elements a program
dequantize       (e + 0.5 + 4 / block_size) n                      4096 consecutive elements a program
rows             the same, for the rows that are read              a tile of 16 rows x 128 columns a program
product          (0.5 + 4 / block_size) n, x and y;                a tile of y a program; few tiles: the reduction
                 2 rows n flops                                    is cut as well, and a second kernel adds the parts
===============  ================================================  ================================================

Double-quantized scales take 1 byte + 4 / absmax_block_size instead of 4 and are decoded in the same kernels.

*Look-up.* `tl.gather` from the 16 entries, on the flattened tile: Triton keeps the table in shared memory, whose 16
entries lie in 16 banks, so one load instruction decodes 32 weights with no conflict. Loading from global memory by
index looks simpler, but in the product's loop Triton's pipeliner then copies each entry to shared memory by an
asynchronous copy of its own (130 of them in the machine code instead of 3), and a tree of selects takes 16
instructions a weight.

*Nibbles.* The two codes of a byte are joined to neighbours, which renames registers. Two products, on even and on odd
columns, would need x with stride 2, which neither asynchronous copies nor Hopper's matrix instructions can read.

*The product* is computed transposed, ``y^T = W x^T``: the many features are the matrix instruction's long side (64 or
more), the rows its short one (8 or more), so 16 rows cost 16, and the decoded weight is the operand that may stay in
registers. Programs with the same weight tile are neighbours (row tiles run fastest): what runs at one time shares its
weight tiles and all of x through the L2 cache.

The order of additions depends on the shapes, the dtype and the number of multiprocessors only; nothing is atomic. The
first product of a new shape tries several tile heights, which stops the device: do it before capturing a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlkernels.ops import _common
from tlkernels.ops import nf4 as ops
from tlkernels.ops._registry import interpreting

__all__ = ["nf4_dequantize", "nf4_dequantize_out", "nf4_embedding", "nf4_linear", "nf4_linear_t", "nf4_quantize"]

_TINY = tl.constexpr(ops._TINY)
_INF_BITS = tl.constexpr(0x7F800000)

# ---- steps of the kernels -------------------------------------------------------------------------------------------


@triton.jit
def _look_up(table, index):
    """Look up table[index] of 16 entries, for any shape of index; flat, because gather wants one rank for both."""
    flat = tl.reshape(index, [index.numel]).to(tl.int32)
    return tl.reshape(tl.gather(tl.load(table + tl.arange(0, 16)), flat, 0), index.shape)


@triton.jit
def _scales(absmax, absmax_scale, absmax_offset, dynamic_code, block, mask, ABSMAX_BLOCK_SIZE: tl.constexpr):
    """Load or decode the float32 scales of some blocks, 0 where masked."""
    scale = tl.load(absmax + block, mask=mask, other=0)
    if absmax_scale is not None:
        second = tl.load(absmax_scale + block // ABSMAX_BLOCK_SIZE, mask=mask, other=0.0)
        scale = tl.load(dynamic_code + scale.to(tl.int32)) * second + tl.load(absmax_offset)
        scale = tl.where(mask, scale, 0.0)
    return scale


@triton.jit
def _decode_tile(
    packed, absmax, code, absmax_scale, absmax_offset, dynamic_code, row, pair0, num_rows, in_features, row_bytes,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ABSMAX_BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Decode W[row, 2 pair0 : 2 pair0 + COLUMNS] to float32, 0 outside W.

    RUN is the largest power of two that divides in_features and block_size: so many columns share a scale, and an odd
    row length (RUN 1) is where a row may start inside a byte. The column is given in pairs, and row_bytes beside
    in_features, because Triton loses alignment, and with it wide loads, over a division.
    """
    GROUP: tl.constexpr = min(COLUMNS, RUN)
    row = row.to(tl.int64)[:, None]
    inside = row < num_rows
    first = 2 * pair0 + tl.arange(0, COLUMNS // GROUP)[None, :] * GROUP
    scale = _scales(
        absmax, absmax_scale, absmax_offset, dynamic_code, (row * in_features + first) // BLOCK_SIZE,
        inside & (first < in_features), ABSMAX_BLOCK_SIZE,
    )  # fmt: skip
    if GROUP > 1:
        pair = pair0 + tl.arange(0, COLUMNS // 2)[None, :]
        byte = tl.load(packed + (row * row_bytes + pair), mask=inside & (pair < row_bytes), other=0)
        nibble = tl.join(byte >> 4, byte & 15)
    else:
        column = 2 * pair0 + tl.arange(0, COLUMNS)[None, :]
        flat = row * in_features + column
        byte = tl.load(packed + flat // 2, mask=inside & (column < in_features), other=0)
        nibble = (byte >> (4 - 4 * (flat % 2)).to(tl.uint8)) & 15
    value = tl.reshape(_look_up(code, nibble), [ROWS, COLUMNS // GROUP, GROUP]) * scale[:, :, None]
    return tl.reshape(value, [ROWS, COLUMNS])


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _quantize_kernel(
    w, midpoints, order, packed, absmax, numel, nbytes, BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    HALF: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside = at < numel
    value = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    # as integers, magnitudes have the order of the floats, and NaN stands above infinity, so it wins the maximum
    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax + block, largest, mask=block * BLOCK_SIZE < numel)

    divisor = tl.where(largest < _TINY, _TINY, largest)[:, None]
    v = value * tl.div_rn(tl.full([BLOCKS, 1], 1.0, tl.float32), divisor)
    if (tl.program_id(0).to(tl.int64) + 1) * (BLOCKS * BLOCK_SIZE) > numel:  # only the last program divides
        short = ((block + 1) * BLOCK_SIZE > numel)[:, None]
        v = tl.where(short, tl.div_rn(value, tl.broadcast_to(divisor, [BLOCKS, BLOCK_SIZE])), v)
    v = tl.where(magnitude == _INF_BITS, tl.where(value > 0, 1.0, -1.0), v)
    v = tl.where(inside, v, 0.0)  # so that a spare nibble holds the code of zero

    # binary search for the number of midpoints not >= v; NaN compares false and goes to 15
    index = tl.zeros([BLOCKS, BLOCK_SIZE], tl.int32)
    for bit in tl.static_range(4):
        middle = _look_up(midpoints, index + ((8 >> bit) - 1))
        index = tl.where(v <= middle, index, index + (8 >> bit))
    if order is not None:
        index = _look_up(order, index)
    high, low = tl.split(tl.reshape(index, [BLOCKS, HALF, 2]))
    byte_at = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed + byte_at, (high * 16 + low).to(tl.uint8), mask=byte_at < nbytes)


@triton.jit
def _dequantize_kernel(
    packed, absmax, code, absmax_scale, absmax_offset, dynamic_code, out, numel, nbytes,
    BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, ABSMAX_BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte_at = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    byte = tl.load(packed + byte_at, mask=byte_at < nbytes, other=0)
    value = tl.reshape(_look_up(code, tl.join(byte >> 4, byte & 15)), [BLOCKS, BLOCK_SIZE])
    inside = block * BLOCK_SIZE < numel
    scale = _scales(absmax, absmax_scale, absmax_offset, dynamic_code, block, inside, ABSMAX_BLOCK_SIZE)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(out + at, (value * scale[:, None]).to(out.dtype.element_ty), mask=at < numel)


@triton.jit
def _rows_kernel(
    indices, packed, absmax, code, absmax_scale, absmax_offset, dynamic_code, out,
    count, row0, pair0, columns, num_rows, in_features, row_bytes,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ABSMAX_BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Write out[i, j] = W[indices[i], 2 pair0 + j], i < count and j < columns; without indices, W[row0 + i, ...]."""
    tiles = tl.cdiv(columns, COLUMNS)
    pid = tl.program_id(0).to(tl.int64)
    i = (pid // tiles) * ROWS + tl.arange(0, ROWS)
    tile = pid % tiles
    row = row0 + i if indices is None else tl.load(indices + i, mask=i < count, other=0).to(tl.int64)
    valid = (row >= 0) & (row < num_rows)
    value = _decode_tile(
        packed, absmax, code, absmax_scale, absmax_offset, dynamic_code, tl.where(valid, row, num_rows),
        pair0 + tile * (COLUMNS // 2), num_rows, in_features, row_bytes,
        ROWS, COLUMNS, RUN, BLOCK_SIZE, ABSMAX_BLOCK_SIZE,
    )  # fmt: skip
    value = tl.where(valid[:, None], value, float("nan"))  # a kernel cannot raise
    j = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = (i < count)[:, None] & (j < columns)[None, :]
    tl.store(out + (i[:, None] * columns + j[None, :]), value.to(out.dtype.element_ty), mask=inside)


def _configs() -> list[triton.Config]:
    """Tile heights and pipeline depths to try; none changes the order of additions. The interpreter takes only one."""
    if interpreting():
        return [triton.Config({"BLOCK_OUT": 64})]
    return [
        triton.Config({"BLOCK_OUT": block_out}, num_warps=warps, num_stages=stages)
        for block_out, warps, stages in ((64, 4, 3), (64, 4, 5), (128, 4, 3), (128, 8, 3), (128, 8, 4))
    ]


@triton.autotune(_configs(), key=["out_features", "in_features", "TRANSPOSED", "SPLITS", "BLOCK_ROWS"])
@triton.jit(do_not_specialize=["rows"])
def _product_kernel(
    x, packed, absmax, code, absmax_scale, absmax_offset, dynamic_code, bias, out,
    rows, out_features, in_features, row_bytes, x_stride,
    TRANSPOSED: tl.constexpr, SPLITS: tl.constexpr, RUN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ABSMAX_BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Write x W^T + bias, or x W when TRANSPOSED; with SPLITS > 1 that many partial sums, one a slice of out."""
    depth = out_features if TRANSPOSED else in_features
    width = in_features if TRANSPOSED else out_features
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    pid = tl.program_id(0).to(tl.int64)
    row = (pid % row_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = pid // row_tiles
    column = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)

    split = tl.program_id(1)
    steps = tl.cdiv(depth, BLOCK_DEPTH)
    share = tl.cdiv(steps, SPLITS)
    acc = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for step in range(split * share, tl.minimum(steps, (split + 1) * share)):
        k = step * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
        inside = (row < rows)[:, None] & (k < depth)[None, :]
        panel = tl.load(x + (row[:, None] * x_stride + k[None, :]), mask=inside, other=0.0)
        if TRANSPOSED:
            weight = tl.trans(_decode_tile(
                packed, absmax, code, absmax_scale, absmax_offset, dynamic_code, k, tile * (BLOCK_OUT // 2),
                out_features, in_features, row_bytes, BLOCK_DEPTH, BLOCK_OUT, RUN, BLOCK_SIZE, ABSMAX_BLOCK_SIZE,
            ))  # fmt: skip
        else:
            weight = _decode_tile(
                packed, absmax, code, absmax_scale, absmax_offset, dynamic_code, column, step * (BLOCK_DEPTH // 2),
                out_features, in_features, row_bytes, BLOCK_OUT, BLOCK_DEPTH, RUN, BLOCK_SIZE, ABSMAX_BLOCK_SIZE,
            )  # fmt: skip
        acc = tl.dot(weight.to(panel.dtype), tl.trans(panel), acc, input_precision="ieee")

    if bias is not None:
        acc += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[:, None]
    at = (split.to(tl.int64) * rows + row)[None, :] * width + column[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(row < rows)[None, :] & (column < width)[:, None])


@triton.jit
def _sum_splits_kernel(partial, bias, out, numel, width, SPLITS: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < numel
    total = tl.load(partial + at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial + (at + split * numel), mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


# ---- launching ------------------------------------------------------------------------------------------------------

# Elements a program of the elementwise kernels holds: 32 per thread, and the largest block fits.
_TILE = 4096

# Above so many rows the weight is decoded to memory, a slab at a time, and torch multiplies: decoding then costs
# less than cuBLAS gains over this kernel. 16 bits, H200: fusing can save 1.18x at 1024 rows and 1.02x at 8192.
# float32 multiplies without matrix instructions, and decoding to memory (8 bytes a weight at 4 TB/s: 2 ps) weighs
# as much as 64 rows of it (2 flops at 67 TFLOP/s: 0.03 ps a row).
_FUSED_ROWS = {torch.bfloat16: 1024, torch.float16: 1024, torch.float32: 64}

# Elements of such a slab: 32 MiB in 16 bits, so that it is read back from the L2 cache (50 MB) and a dense copy of a
# large weight never exists.
_SLAB = 2**24

# Rows of a tile of y at most, and steps of the reduction: 128 x 64 fills 16-bit matrix instructions; float32 keeps
# its operands in registers.
_TILE_ROWS = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 32}
_DEPTH = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}


class _Operands(NamedTuple):
    """The weight as the kernels take it: contiguous tensors, None where there is none."""

    packed: Tensor
    absmax: Tensor
    code: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    dynamic_code: Tensor | None


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Copy NF4's table, its midpoints and the table of the 8-bit scales to a device, once."""
    code = torch.tensor(ops.NF4_CODE, dtype=torch.float32, device=device)
    return code, _midpoints(code), torch.tensor(ops.DYNAMIC_CODE, dtype=torch.float32, device=device)


def _midpoints(table: Tensor) -> Tensor:
    """Return the 15 midpoints of an ascending table, and one entry that is never asked for."""
    return torch.nn.functional.pad((table[1:] + table[:-1]) * 0.5, (0, 1))


def _operands(
    packed: Tensor, absmax: Tensor, code: Tensor | None, absmax_scale: Tensor | None, absmax_offset: Tensor | None
) -> _Operands:
    nf4_code, _, dynamic_code = _tables(packed.device)
    return _Operands(
        packed.contiguous().view(torch.uint8),
        absmax.contiguous(),
        nf4_code if code is None else code.contiguous(),
        None if absmax_scale is None else absmax_scale.contiguous(),
        absmax_offset,
        None if absmax_scale is None else dynamic_code,
    )


#: How every kernel is compiled: no multiply and add in one rounding.
LAUNCH_OPTIONS = {"enable_fp_fusion": False}


def _launch(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **constants, **LAUNCH_OPTIONS)


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype a kernel works in: Triton's interpreter truncates to bfloat16, so there torch rounds instead."""
    return torch.float32 if dtype == torch.bfloat16 and interpreting() else dtype


def _run(in_features: int, block_size: int) -> int:
    """Return the largest power of two that divides both."""
    return math.gcd(in_features, block_size)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def nf4_quantize(w: Tensor, code: Tensor | None = None, *, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Run the op ``nf4_quantize``; see `tlkernels.ops.nf4_quantize`."""
    if w.dtype == torch.float64:
        return ops._reference_nf4_quantize(w, code, block_size=block_size)
    _common.check_float("nf4_quantize", w=w)
    ops._check_block_size("nf4_quantize", block_size)
    ops._check_code("nf4_quantize", code)
    _common.check_device("nf4_quantize", w.device, code=code)
    numel, nbytes = w.numel(), (w.numel() + 1) // 2
    packed = torch.empty(nbytes, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device=w.device)
    if numel == 0:
        return packed, absmax
    if code is None:
        midpoints, order = _tables(w.device)[1], None
    else:
        table, order = torch.sort(code, stable=True)
        midpoints, order = _midpoints(table), order.to(torch.int32)
    flat = w.reshape(-1).to(_kernel_dtype(w.dtype)).contiguous()
    _launch(
        _quantize_kernel, (triton.cdiv(numel, _TILE),), flat, midpoints, order, packed, absmax, numel, nbytes,
        BLOCKS=_TILE // block_size, BLOCK_SIZE=block_size, num_warps=8,
    )  # fmt: skip
    return packed, absmax


def nf4_dequantize(
    packed: Tensor, absmax: Tensor, code: Tensor | None, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    shape: list[int], *, dtype: torch.dtype, block_size: int = 64, absmax_block_size: int = 256,
) -> Tensor:  # fmt: skip
    """Run the op ``nf4_dequantize``; see `tlkernels.ops.nf4_dequantize`."""
    weight = (packed, absmax, code, absmax_scale, absmax_offset)
    blocks = {"block_size": block_size, "absmax_block_size": absmax_block_size}
    if dtype not in _FUSED_ROWS:  # float64, or an error
        return ops._reference_nf4_dequantize(*weight, shape, dtype=dtype, **blocks)
    numel = _common.checked_numel("nf4_dequantize", shape)
    _check_weight("nf4_dequantize", *weight, numel, packed.device, **blocks)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    _dequantize(_operands(*weight), out, block_size, absmax_block_size)
    return out


def nf4_dequantize_out(
    packed: Tensor, absmax: Tensor, code: Tensor | None, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    shape: list[int], *, block_size: int = 64, absmax_block_size: int = 256, out: Tensor,
) -> None:  # fmt: skip
    """Run the op ``nf4_dequantize.out``; see `tlkernels.ops.nf4_dequantize`."""
    weight = (packed, absmax, code, absmax_scale, absmax_offset)
    blocks = {"block_size": block_size, "absmax_block_size": absmax_block_size}
    # what cannot be written by the kernel is float64, or an error that the reference words
    fits = list(out.shape) == list(shape) and out.is_contiguous() and out.device == packed.device
    if not fits or out.dtype not in _FUSED_ROWS:
        ops._reference_nf4_dequantize_out(*weight, shape, **blocks, out=out)
        return
    _check_weight("nf4_dequantize", *weight, _common.checked_numel("nf4_dequantize", shape), packed.device, **blocks)
    _dequantize(_operands(*weight), out, block_size, absmax_block_size)


def _dequantize(weight: _Operands, out: Tensor, block_size: int, absmax_block_size: int) -> None:
    numel = out.numel()
    if numel == 0:
        return
    dtype = _kernel_dtype(out.dtype)
    target = out if dtype == out.dtype else torch.empty_like(out, dtype=dtype)
    _launch(
        _dequantize_kernel, (triton.cdiv(numel, _TILE),), *weight, target, numel, (numel + 1) // 2,
        BLOCKS=_TILE // block_size, BLOCK_SIZE=block_size, ABSMAX_BLOCK_SIZE=absmax_block_size,
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


def nf4_embedding(
    indices: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None,
    absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    num_embeddings: int, embedding_dim: int, *, dtype: torch.dtype, block_size: int = 64, absmax_block_size: int = 256,
) -> Tensor:  # fmt: skip
    """Run the op ``nf4_embedding``; see `tlkernels.ops.nf4_embedding`."""
    weight = (packed, absmax, code, absmax_scale, absmax_offset)
    blocks = {"block_size": block_size, "absmax_block_size": absmax_block_size}
    sizes = (num_embeddings, embedding_dim)
    if dtype not in _FUSED_ROWS:
        return ops._reference_nf4_embedding(indices, *weight, *sizes, dtype=dtype, **blocks)
    ops._check_indices("nf4_embedding", indices, *sizes)
    _check_weight("nf4_embedding", *weight, num_embeddings * embedding_dim, indices.device, **blocks)
    out = torch.empty((*indices.shape, embedding_dim), dtype=_kernel_dtype(dtype), device=indices.device)
    if out.numel():
        flat = indices.reshape(-1).contiguous()
        _decode_rows(flat, _operands(*weight), out.view(-1, embedding_dim), 0, 0, *sizes, **blocks)
    return out.to(dtype)


def _decode_rows(
    indices: Tensor | None, weight: _Operands, out: Tensor, row0: int, column0: int, num_rows: int, in_features: int,
    *, block_size: int, absmax_block_size: int,
) -> None:  # fmt: skip
    """Fill the matrix `out` with rows of the weight, from an even column on."""
    count, columns = out.shape
    rows, tile = 16, 128
    _launch(
        _rows_kernel, (triton.cdiv(count, rows) * triton.cdiv(columns, tile),), indices, *weight, out,
        count, row0, column0 // 2, columns, num_rows, in_features, in_features // 2,
        ROWS=rows, COLUMNS=tile, RUN=_run(in_features, block_size),
        BLOCK_SIZE=block_size, ABSMAX_BLOCK_SIZE=absmax_block_size,
    )  # fmt: skip


def nf4_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None,
    absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    bias: Tensor | None, out_features: int, in_features: int, *, block_size: int = 64, absmax_block_size: int = 256,
) -> Tensor:  # fmt: skip
    """Run the op ``nf4_linear``; see `tlkernels.ops.nf4_linear`."""
    op = "nf4_linear"
    weight = (packed, absmax, code, absmax_scale, absmax_offset)
    blocks = {"block_size": block_size, "absmax_block_size": absmax_block_size}
    if x.dtype == torch.float64:
        return ops._reference_nf4_linear(x, *weight, bias, out_features, in_features, **blocks)
    ops._check_product(op, "x", x, in_features, out_features, in_features)
    _check_weight(op, *weight, out_features * in_features, x.device, **blocks)
    ops._check_bias(op, bias, out_features, x.device)
    if bias is not None:
        bias = bias.contiguous().to(_kernel_dtype(bias.dtype))
    return _product(x, _operands(*weight), bias, out_features, in_features, transposed=False, **blocks)


def nf4_linear_t(
    grad_output: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None,
    absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    out_features: int, in_features: int, *, block_size: int = 64, absmax_block_size: int = 256,
) -> Tensor:  # fmt: skip
    """Run the op ``nf4_linear_t``; see `tlkernels.ops.nf4_linear_t`."""
    op = "nf4_linear_t"
    weight = (packed, absmax, code, absmax_scale, absmax_offset)
    blocks = {"block_size": block_size, "absmax_block_size": absmax_block_size}
    if grad_output.dtype == torch.float64:
        return ops._reference_nf4_linear_t(grad_output, *weight, out_features, in_features, **blocks)
    ops._check_product(op, "grad_output", grad_output, out_features, out_features, in_features)
    _check_weight(op, *weight, out_features * in_features, grad_output.device, **blocks)
    return _product(grad_output, _operands(*weight), None, out_features, in_features, transposed=True, **blocks)


def _check_weight(
    op: str, packed: Tensor, absmax: Tensor, code: Tensor | None, absmax_scale: Tensor | None,
    absmax_offset: Tensor | None, numel: int, device: torch.device, *, block_size: int, absmax_block_size: int,
) -> None:  # fmt: skip
    ops._check_weight(
        op, packed, absmax, numel, block_size, code, absmax_scale, absmax_offset, absmax_block_size, device
    )


def _product(
    x: Tensor, weight: _Operands, bias: Tensor | None, out_features: int, in_features: int,
    *, transposed: bool, block_size: int, absmax_block_size: int,
) -> Tensor:  # fmt: skip
    """Return x W^T + bias, or x W when transposed, for checked arguments."""
    width, depth = (in_features, out_features) if transposed else (out_features, in_features)
    rows = math.prod(x.shape[:-1])
    dtype = _kernel_dtype(x.dtype)
    matrix = x.reshape(rows, depth).to(dtype)
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    out = torch.empty((rows, width), dtype=dtype, device=x.device)
    if out.numel():
        multiply = _multiply_fused if rows <= _FUSED_ROWS[dtype] or depth == 0 else _multiply_in_slabs
        multiply(matrix, weight, bias, out, out_features, in_features, transposed, block_size, absmax_block_size)
    return out.view(*x.shape[:-1], width).to(x.dtype)


def _multiply_fused(
    x: Tensor, weight: _Operands, bias: Tensor | None, out: Tensor, out_features: int, in_features: int,
    transposed: bool, block_size: int, absmax_block_size: int,
) -> None:  # fmt: skip
    rows, width = out.shape
    block_rows = min(max(16, triton.next_power_of_2(rows)), _TILE_ROWS[x.dtype])
    row_tiles, depth = triton.cdiv(rows, block_rows), _DEPTH[x.dtype]
    splits = _splits(row_tiles * triton.cdiv(width, 128), triton.cdiv(x.shape[1], depth), _processors(x.device))
    partial = out if splits == 1 else torch.empty((splits, rows, width), dtype=torch.float32, device=out.device)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return row_tiles * triton.cdiv(width, meta["BLOCK_OUT"]), splits

    _launch(
        _product_kernel, grid, x, *weight, bias if splits == 1 else None, partial,
        rows, out_features, in_features, in_features // 2, x.stride(0),
        TRANSPOSED=transposed, SPLITS=splits, RUN=_run(in_features, block_size),
        BLOCK_SIZE=block_size, ABSMAX_BLOCK_SIZE=absmax_block_size, BLOCK_ROWS=block_rows, BLOCK_DEPTH=depth,
    )  # fmt: skip
    if splits > 1:
        tile = 1024
        _launch(
            _sum_splits_kernel, (triton.cdiv(out.numel(), tile),), partial, bias, out, out.numel(), width,
            SPLITS=splits, TILE=tile,
        )  # fmt: skip


def _splits(tiles: int, steps: int, processors: int) -> int:
    """Into how many parts the reduction is cut, so that few tiles still fill the device: each keeps 8 steps or more."""
    splits = 1
    while 2 * splits * tiles <= processors and steps >= 16 * splits:
        splits *= 2
    return splits


def _multiply_in_slabs(
    x: Tensor, weight: _Operands, bias: Tensor | None, out: Tensor, out_features: int, in_features: int,
    transposed: bool, block_size: int, absmax_block_size: int,
) -> None:  # fmt: skip
    """Decode the part of the weight that makes some columns of out, multiply, and forget it."""
    width, depth = out.shape[1], x.shape[1]
    step = max(128, _SLAB // depth // 128 * 128)  # whole groups of columns with one scale
    for start in range(0, width, step):
        size = min(step, width - start)
        shape, origin = ((depth, size), (0, start)) if transposed else ((size, depth), (start, 0))
        slab = torch.empty(shape, dtype=x.dtype, device=x.device)
        _decode_rows(
            None, weight, slab, *origin, out_features, in_features,
            block_size=block_size, absmax_block_size=absmax_block_size,
        )  # fmt: skip
        factor, target = slab if transposed else slab.t(), out[:, start : start + size]
        if bias is None:
            torch.mm(x, factor, out=target)
        else:
            torch.addmm(bias[start : start + size].to(x.dtype), x, factor, out=target)
