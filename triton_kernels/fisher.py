"""Fisher information and parameter importance on Triton: squares of per-sample gradients, and sweeps over lists.

Computes what the equations and references in `tlkernels.ops.fisher` say, for any sizes. Nothing of size samples x
parameters is written. Not yet measured on a GPU: the cuts below are arithmetic, for an H200 (790 TFLOP/s in 16 bits,
60 in float32, 4.2 TB/s).

============  ==========================================  ===========================================================
kernel        flops; bytes moved                          cut of the work
============  ==========================================  ===========================================================
squares       2 N T I O; reads act O / 128 times, and     a tile of the accumulator a program, through all samples; few
              grad_out I / 128 times, mostly from L2      tiles: the samples are cut too, and the parts added in order
moments       2 rows I O, or half of it (symmetric)       the same, through rows
columns       reads x and grad_out once                   64 columns a program, through samples
statistics    reads x three times, from L2 but for once   16 rows a program
rows          reads grad_out once                         a distinct index a program, through its tokens in order
sweeps        one read of each list, one write            4096 elements a program
============  ==========================================  ===========================================================

*Squares.* A program multiplies the tokens of one sample, squares the tile in registers, adds it to a second tile in
registers, and goes to the next sample. Where a sample has one token the gradient is a product of two numbers, and its
square the product of their squares: the sum over samples is then one product of matrices, ``(w g^2)^T a^2``. (A
square beyond float32, of a number above 1.8e19, is infinite there though the other factor be tiny.)

*Convolutions.* The same kernel: tokens are positions, activations are the input's pixels under the kernel, whose
places are computed in registers, group by group.

*Precision.* Sums are float32. 16-bit numbers are multiplied as they are, their products are exact; float32 keeps its
bits: by its own instructions, or, where ``torch.set_float32_matmul_precision`` allows it, by three TF32 products. So do
squares of 16-bit numbers.

*Embeddings.* Tokens are sorted by (index, sample); the sort is stable, so a program adds the tokens of a sample in
their order, and the samples in theirs. A very frequent index is a long program.

*Penalties.* Terms are float32, their sums float64.

Not done: a cut of long samples (a convolution with few weights and samples, of many positions, has few programs), a
square that stays finite where ``a^2`` does not, one launch for a whole list.

float64 goes to the reference. Each number has one owner; nothing is atomic: the order of additions depends on the
shapes, the dtypes and the number of multiprocessors only. Bounds of ragged samples are copied to the device: they stop
a CUDA graph from being captured, and embeddings wait for the host.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from tlkernels.triton_kernels import nf4
from tlkernels.triton_kernels.lora import _sum_chunks, _tile
from tlkernels.triton_kernels.mmd import _options, _precision
from tlkernels.triton_kernels.nf4 import _launch
from torch import Tensor

from tlkernels.ops import fisher as ops
from tlkernels.ops._common import FLOATS

__all__ = [
    "diag_fisher_channel_norm_",
    "diag_fisher_conv2d_",
    "diag_fisher_embedding_",
    "diag_fisher_linear_",
    "diag_fisher_norm_",
    "importance_accum_",
    "kfac_factors_linear_",
    "per_sample_sqnorm_linear",
    "quad_penalty",
    "quad_penalty_backward",
    "quad_penalty_grad_",
    "si_accum_",
]

# Sides of a tile: what fits into registers twice, the product and the sum of squares.
_BLOCK = {"ieee": 64, "tf32x3": 128}
# Programs a multiprocessor that samples are cut for, and the elements that all parts of an accumulator may have.
_WAVES, _PARTS = 4, 2**24
# Columns and tokens of a step of the column kernels; rows and features of a step of the statistics.
_COLUMNS, _TOKENS = 64, 16
# Elements of a step of a sweep, and of its program.
_STEP, _CHUNK = 1024, 4096


# ---- kernels of squares ---------------------------------------------------------------------------------------------


@triton.jit
def _span_of(bounds, n, tokens):
    """Return where the tokens of sample n begin and end: in the sample, or in all of ragged tokens."""
    if bounds is None:
        begin = n * 0
        end = begin + tokens
    else:
        begin = tl.load(bounds + n)
        end = tl.load(bounds + n + 1)
    return begin, end


@triton.jit
def _weight_of(weight, n, scale):
    return scale if weight is None else scale * tl.load(weight + n)


@triton.jit
def _patches(
    a, token, column, end, columns, a_token, a_column, out_width, height, width, kernel, kernel_width,
    step_h, step_w, pad_h, pad_w, dilation_h, dilation_w, a_channel,
):  # fmt: skip
    """Return the input's pixels [token, column] under the kernel; a_token and a_column are the strides of a pixel."""
    channel, within = column // kernel, column % kernel
    row = (token // out_width * step_h - pad_h)[:, None] + (within // kernel_width * dilation_h)[None, :]
    place = (token % out_width * step_w - pad_w)[:, None] + (within % kernel_width * dilation_w)[None, :]
    inside = (token < end)[:, None] & (column < columns)[None, :]
    inside = inside & (row >= 0) & (row < height) & (place >= 0) & (place < width)
    return tl.load(a + ((channel * a_channel)[None, :] + row * a_token + place * a_column), mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tokens", "samples", "parts", "chunk", "pad_h", "pad_w", "scale"])
def _squares_kernel(
    a, g, bounds, weight, out, tokens, samples, outs, ins, parts, chunk, scale,
    a_sample, a_token, a_column, g_sample, g_token, g_column,
    out_width, height, width, kernel, kernel_width, step_h, step_w, pad_h, pad_w, dilation_h, dilation_w, a_channel,
    CONV: tl.constexpr, SUM: tl.constexpr, ADD: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write to a tile of out [part, group, outs, ins] what the part's samples add, or with ADD add it.

    With SUM write to out [part, tile] the sum of the tile instead; parts are then samples.
    """
    pid = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(ins, BLOCK_IN)
    tiles = tl.cdiv(outs, BLOCK_OUT) * across
    tile, rest = pid % tiles, pid // tiles
    part, group = rest % parts, rest // parts
    o = tile // across * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i = tile % across * BLOCK_IN + tl.arange(0, BLOCK_IN)
    total = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    for n in range(part * chunk, tl.minimum((part + 1) * chunk, samples)):
        begin, end = _span_of(bounds, n, tokens)
        of_g = g + n * g_sample + group * outs * g_column
        product = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
        for start in range(begin, end, BLOCK_TOKENS):
            t = start + tl.arange(0, BLOCK_TOKENS)
            left = tl.load(
                of_g + (t[None, :] * g_token + o[:, None] * g_column), mask=(o < outs)[:, None] & (t < end)[None, :],
                other=0.0,
            )  # fmt: skip
            if CONV:
                right = _patches(
                    a + n * a_sample + group * (ins // kernel) * a_channel, t, i, end, ins, a_token, a_column,
                    out_width, height, width, kernel, kernel_width, step_h, step_w, pad_h, pad_w, dilation_h,
                    dilation_w, a_channel,
                )  # fmt: skip
            else:
                right = tl.load(
                    a + n * a_sample + (t[:, None] * a_token + i[None, :] * a_column),
                    mask=(t < end)[:, None] & (i < ins)[None, :], other=0.0,
                )  # fmt: skip
            product = tl.dot(left, right, product, input_precision=PRECISION)
        total += _weight_of(weight, n, scale) * (product * product)
    if SUM:
        # outside there are products of zeros, also with infinities
        total = tl.where((o < outs)[:, None] & (i < ins)[None, :], total, 0.0)
        tl.store(out + (part * tiles + tile), tl.sum(tl.sum(total, 1), 0))
    else:
        # parts are of all groups: out is [part, group * outs, ins]
        groups = tl.num_programs(0).to(tl.int64) // (tiles * parts)
        at = out + (((part * groups + group) * outs + o)[:, None] * ins + i[None, :])
        inside = (o < outs)[:, None] & (i < ins)[None, :]
        if ADD:
            total += tl.load(at, mask=inside, other=0.0)
        tl.store(at, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "parts", "chunk", "scale"])
def _moments_kernel(
    x, y, weight, out, rows, x_width, y_width, parts, chunk, scale, x_row, x_column, y_row, y_column,
    SQUARE: tl.constexpr, SYMMETRIC: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write to out [part, x column, y column] the part's scale sum_r w_r x_r y_r^T, with SQUARE of squares, or add it.

    SYMMETRIC: x is y; tiles below the diagonal are those above it. BIAS: another column of both, of ones.
    """
    pid = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(y_width + BIAS, BLOCK)
    tiles = tl.cdiv(x_width + BIAS, BLOCK) * across
    tile, part = pid % tiles, pid // tiles
    if not SYMMETRIC or tile // across <= tile % across:
        i = tile // across * BLOCK + tl.arange(0, BLOCK)
        j = tile % across * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        end = tl.minimum((part + 1) * chunk, rows)
        for start in range(part * chunk, end, BLOCK_ROWS):
            r = start + tl.arange(0, BLOCK_ROWS)
            left = tl.load(
                x + (r[None, :] * x_row + i[:, None] * x_column), mask=(i < x_width)[:, None] & (r < end)[None, :],
                other=0.0,
            )  # fmt: skip
            right = tl.load(
                y + (r[:, None] * y_row + j[None, :] * y_column), mask=(r < end)[:, None] & (j < y_width)[None, :],
                other=0.0,
            )  # fmt: skip
            if BIAS:
                left = tl.where((i == x_width)[:, None] & (r < end)[None, :], 1.0, left.to(tl.float32)).to(left.dtype)
                right = tl.where((j == y_width)[None, :] & (r < end)[:, None], 1.0, right.to(tl.float32)).to(
                    right.dtype
                )
            if SQUARE:
                left, right = left.to(tl.float32), right.to(tl.float32)
                left, right = left * left, right * right
            if weight is not None:
                left = left.to(tl.float32) * tl.load(weight + r, mask=r < end, other=0.0)[None, :]
                right = right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision=PRECISION)
        total *= scale
        width = y_width + BIAS
        origin = out + part * (x_width + BIAS) * width
        inside = (i < x_width + BIAS)[:, None] & (j < width)[None, :]
        if SYMMETRIC:
            # elements on and above the diagonal count, so that both triangles have the same bits
            inside = inside & (i[:, None] <= j[None, :])
            at = origin + (j[None, :] * width + i[:, None])
            below = inside & (i[:, None] < j[None, :])
            mirrored = total
            if ADD:
                mirrored += tl.load(at, mask=below, other=0.0)
            tl.store(at, mirrored, mask=below)
        at = origin + (i[:, None] * width + j[None, :])
        if ADD:
            total += tl.load(at, mask=inside, other=0.0)
        tl.store(at, total, mask=inside)


@triton.jit(do_not_specialize=["tokens", "samples", "parts", "chunk", "scale"])
def _columns_kernel(
    x, g, mean, rstd, bounds, weight, out_w, out_b, tokens, samples, width, parts, chunk, row_sample, scale,
    x_sample, x_token, x_column, g_sample, g_token, g_column,
    NORM: tl.constexpr, ADD: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write to out [part, column] what the part's samples add, or with ADD add it.

    To out_w the squares of sums of x g, with NORM "row" or "column" of x normalised by the row's or column's mean and
    rstd; to out_b those of sums of g. Each may be None.
    """
    pid = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(width, COLUMNS)
    part = pid // across
    d = pid % across * COLUMNS + tl.arange(0, COLUMNS)
    of_w, of_b = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    if NORM == "column":
        middle, unit = tl.load(mean + d, mask=d < width, other=0.0), tl.load(rstd + d, mask=d < width, other=0.0)
    for n in range(part * chunk, tl.minimum((part + 1) * chunk, samples)):
        begin, end = _span_of(bounds, n, tokens)
        sum_w, sum_b = tl.zeros([TOKENS, COLUMNS], tl.float32), tl.zeros([TOKENS, COLUMNS], tl.float32)
        for start in range(begin, end, TOKENS):
            t = start + tl.arange(0, TOKENS)
            inside = (t < end)[:, None] & (d < width)[None, :]
            by = tl.load(g + n * g_sample + (t[:, None] * g_token + d[None, :] * g_column), mask=inside, other=0.0)
            by = by.to(tl.float32)
            if out_w is not None:
                value = tl.load(
                    x + n * x_sample + (t[:, None] * x_token + d[None, :] * x_column), mask=inside, other=0.0
                ).to(tl.float32)  # fmt: skip
                if NORM == "row":
                    row = n * row_sample + t
                    value = value - tl.load(mean + row, mask=t < end, other=0.0)[:, None]
                    value = value * tl.load(rstd + row, mask=t < end, other=0.0)[:, None]
                if NORM == "column":
                    value = value - middle[None, :]
                # an infinite mean must not make a NaN of what lies outside
                sum_w += tl.where(inside, value * by, 0.0)
            sum_b += by
        w = _weight_of(weight, n, scale)
        if out_w is not None:
            gradient = tl.sum(sum_w, 0)
            if NORM == "column":
                gradient = gradient * unit
            of_w += w * (gradient * gradient)
        gradient = tl.sum(sum_b, 0)
        of_b += w * (gradient * gradient)
    at = part * width + d
    if out_w is not None:
        if ADD:
            of_w += tl.load(out_w + at, mask=d < width, other=0.0)
        tl.store(out_w + at, of_w, mask=d < width)
    if out_b is not None:
        if ADD:
            of_b += tl.load(out_b + at, mask=d < width, other=0.0)
        tl.store(out_b + at, of_b, mask=d < width)


@triton.jit(do_not_specialize=["rows", "tokens", "eps"])
def _statistics_kernel(
    x, mean, rstd, rows, tokens, width, eps, x_sample, x_token, x_column,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write each row's mean, 0 unless CENTRED, and 1 / sqrt(mean square about it + eps)."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    origin = x + (r // tokens * x_sample + r % tokens * x_token)
    middle = tl.zeros([ROWS], tl.float32)
    if CENTRED:
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, width, COLUMNS):
            d = start + tl.arange(0, COLUMNS).to(tl.int64)
            inside = (r < rows)[:, None] & (d < width)[None, :]
            total += tl.load(origin[:, None] + (d * x_column)[None, :], mask=inside, other=0.0).to(tl.float32)
        middle = tl.sum(total, 1) / width
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        d = start + tl.arange(0, COLUMNS).to(tl.int64)
        inside = (r < rows)[:, None] & (d < width)[None, :]
        value = tl.load(origin[:, None] + (d * x_column)[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - middle[:, None], 0.0)
        total += value * value
    tl.store(mean + r, middle, mask=r < rows)
    tl.store(rstd + r, 1.0 / tl.sqrt(tl.sum(total, 1) / width + eps), mask=r < rows)


@triton.jit(do_not_specialize=["tokens"])
def _token_sums_kernel(
    x, bounds, weight, out, tokens, width, row_sample, x_sample, x_token, x_column,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write to out [sample, column] the sums over tokens of w x."""
    pid = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(width, COLUMNS)
    n = pid // across
    d = pid % across * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = _span_of(bounds, n, tokens)
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in range(begin, end, TOKENS):
        t = start + tl.arange(0, TOKENS)
        value = tl.load(
            x + n * x_sample + (t[:, None] * x_token + d[None, :] * x_column),
            mask=(t < end)[:, None] & (d < width)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        if weight is not None:
            value *= tl.load(weight + (n * row_sample + t), mask=t < end, other=0.0)[:, None]
        total += value
    tl.store(out + (n * width + d), tl.sum(total, 0), mask=d < width)


@triton.jit(do_not_specialize=["padding", "scale"])
def _rows_kernel(
    g, order, sample, starts, index, weight, out, width, padding, scale, g_row, g_column, COLUMNS: tl.constexpr
):  # fmt: skip
    """Add to a distinct index' row of out the squares of its samples' sums; tokens are sorted by (index, sample)."""
    pid = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(width, COLUMNS)
    which = pid // across
    d = pid % across * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(index + which)
    if row != padding:
        begin, end = tl.load(starts + which), tl.load(starts + which + 1)
        last = tl.load(sample + begin)
        total, gradient = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
        for k in range(begin, end):
            n = tl.load(sample + k)
            value = tl.load(g + tl.load(order + k) * g_row + d * g_column, mask=d < width, other=0.0).to(tl.float32)
            if n != last:
                total += _weight_of(weight, last, scale) * (gradient * gradient)
                gradient = value
            else:
                gradient += value
            last = n
        total += _weight_of(weight, last, scale) * (gradient * gradient)
        at = out + row * width + d
        tl.store(at, tl.load(at, mask=d < width, other=0.0) + total, mask=d < width)


# ---- kernels of the sweeps ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["numel", "decay", "scale"])
def _accumulate_kernel(acc, x, y, numel, decay, scale, KIND: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr):
    """Write decay acc + scale x^2, or |x|, or x y."""
    first = tl.program_id(0).to(tl.int64) * CHUNK
    for start in tl.static_range(0, CHUNK, STEP):
        at = first + start + tl.arange(0, STEP)
        value = tl.load(x + at, mask=at < numel, other=0.0).to(tl.float32)
        if KIND == "sq":
            value = value * value
        elif KIND == "abs":
            value = tl.abs(value)
        else:
            value = value * tl.load(y + at, mask=at < numel, other=0.0).to(tl.float32)
        before = tl.load(acc + at, mask=at < numel, other=0.0) * decay
        tl.store(acc + at, before + scale * value, mask=at < numel)


@triton.jit(do_not_specialize=["numel", "scale"])
def _penalty_kernel(
    p, anchor, importance, grad, factor, parts, numel, scale,
    ADD: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Write to parts [program] sums of F (p - a)^2, and to grad scale F (p - a), or with ADD add it; either is None.

    `factor` is a number on the device, or None: it multiplies the gradient.
    """
    pid = tl.program_id(0).to(tl.int64)
    total = tl.zeros([STEP], tl.float64)
    if factor is not None:
        scale = tl.load(factor)
    for start in tl.static_range(0, CHUNK, STEP):
        at = pid * CHUNK + start + tl.arange(0, STEP)
        inside = at < numel
        difference = tl.load(p + at, mask=inside, other=0.0).to(tl.float32)
        difference -= tl.load(anchor + at, mask=inside, other=0.0).to(tl.float32)
        f = tl.load(importance + at, mask=inside, other=0.0)
        if parts is not None:
            total += (f * (difference * difference)).to(tl.float64)
        if grad is not None:
            step = scale * f * difference
            if ADD:
                step = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) + step
            tl.store(grad + at, step.to(grad.dtype.element_ty), mask=inside)
    if parts is not None:
        tl.store(parts + pid, tl.sum(total, 0))


# ---- what the launchers share ---------------------------------------------------------------------------------------


def _narrow(*tensors: Tensor | None) -> bool:
    """All of the first one's dtype, not float64, and on its device."""
    first = tensors[0]
    assert first is not None
    same = all(t is None or (t.dtype == first.dtype and t.device == first.device) for t in tensors)
    return first.dtype in FLOATS and first.dtype != torch.float64 and same


def _fits(t: Tensor | None, shape: tuple[int, ...], device: torch.device) -> bool:
    return t is None or (tuple(t.shape) == shape and t.dtype == torch.float32 and t.device == device)


def _samples_of(x: Tensor, grad_out: Tensor, offsets: Sequence[int]) -> int:
    """How many samples there are; -1: these are no tokens."""
    if x.dim() != (2 if len(offsets) else 3) or x.shape[:-1] != grad_out.shape[:-1] or x.dim() != grad_out.dim():
        return -1
    if not len(offsets):
        return x.shape[0]
    ascends = all(a <= b for a, b in itertools.pairwise(offsets))
    right = len(offsets) >= 2 and offsets[0] == 0 and offsets[-1] == x.shape[0] and ascends
    return len(offsets) - 1 if right else -1


class _Samples(NamedTuple):
    """Where samples begin: `bounds` of ragged tokens, or so many `tokens` each."""

    count: int
    tokens: int
    bounds: Tensor | None

    @classmethod
    def of(cls, x: Tensor, offsets: Sequence[int]) -> _Samples:
        if not len(offsets):
            return cls(x.shape[0], x.shape[1], None)
        return cls(len(offsets) - 1, x.shape[0], torch.tensor(list(offsets), dtype=torch.int64).to(x.device))

    @property
    def one_token(self) -> bool:
        return self.bounds is None and self.tokens == 1

    @property
    def longest(self) -> int:
        """Tokens of a step are not more than this."""
        return self.tokens

    @property
    def row_sample(self) -> int:
        """What a sample adds to the number of a row of all tokens."""
        return 0 if self.bounds is not None else self.tokens


def _loadable(t: Tensor) -> Tensor:
    return t.to(nf4._kernel_dtype(t.dtype))


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Of samples, tokens and columns; ragged tokens are found without their sample."""
    return (t.stride(0), t.stride(1), t.stride(2)) if t.dim() == 3 else (0, t.stride(0), t.stride(1))


def _weight(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@contextlib.contextmanager
def _contiguous(t: Tensor) -> Iterator[Tensor]:
    """What a kernel may write in place of t: t itself, or a copy that t is set to."""
    buffer = t.contiguous()
    yield buffer
    if buffer is not t:
        with torch.no_grad():
            t.copy_(buffer)


def _cut(count: int, tiles: int, size: int, least: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts samples or rows are cut, and how many a part has: a multiple of `least`."""
    wanted = max(1, min(_WAVES * nf4._processors(device) // max(1, tiles), _PARTS // max(1, size)))
    chunk = triton.cdiv(triton.cdiv(count, wanted), least) * least
    return triton.cdiv(count, chunk), chunk


@contextlib.contextmanager
def _parts_of(out: Tensor, parts: int) -> Iterator[Tensor]:
    """What a kernel writes [part, ...] to, and adds to where there is but one part; the parts are added in order."""
    with _contiguous(out) as into:
        if parts == 1:
            yield into
            return
        partial = torch.empty((parts, *into.shape), dtype=torch.float32, device=out.device)
        yield partial
        _sum_chunks(partial, into[None], parts, add=True)


def _add_squares(
    f_w: Tensor, g: Tensor, a: Tensor, of: _Samples, scale: float, weight: Tensor | None,
    conv: tuple[int, ...] | None = None, a_strides: tuple[int, ...] | None = None, groups: int = 1,
) -> None:  # fmt: skip
    """Add to f_w [groups * outs, ins] the squares of g^T a."""
    outs, ins = f_w.shape[0] // groups, f_w.shape[1]
    if f_w.numel() == 0 or of.count == 0:
        return
    narrow, precision = g.dtype != torch.float32, _precision(g.dtype)
    block = _BLOCK[precision]
    block_out, block_in = _tile(outs, block), _tile(ins, block)
    tiles = triton.cdiv(outs, block_out) * triton.cdiv(ins, block_in) * groups
    parts, chunk = _cut(of.count, tiles, f_w.numel(), 1, g.device)
    with _parts_of(f_w, parts) as out:
        _launch(
            _squares_kernel, (tiles * parts,), a, g, of.bounds, weight, out, of.tokens, of.count, outs, ins, parts,
            chunk, scale, *(a_strides or _strides(a)), *_strides(g), *(conv or (None,) * 12), CONV=conv is not None,
            SUM=False, ADD=parts == 1, BLOCK_OUT=block_out, BLOCK_IN=block_in,
            BLOCK_TOKENS=_tile(of.longest, 64 if narrow else 32), PRECISION=precision,
            **_options(max(block_out, block_in)),
        )  # fmt: skip


def _add_moments(
    out: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, scale: float, *, precision: str,
    square: bool = False, bias: bool = False,
) -> None:  # fmt: skip
    """Add scale sum_r w_r x_r y_r^T to out, of x itself where there is no y."""
    if out.numel() == 0 or x.shape[0] == 0:
        return
    other = x if y is None else y
    block = _tile(max(out.shape), _BLOCK[precision])
    tiles = triton.cdiv(out.shape[0], block) * triton.cdiv(out.shape[1], block)
    step = 32
    parts, chunk = _cut(x.shape[0], tiles, out.numel(), step, x.device)
    with _parts_of(out, parts) as into:
        _launch(
            _moments_kernel, (tiles * parts,), x, other, weight, into, x.shape[0], x.shape[1], other.shape[1], parts,
            chunk, scale, *x.stride(), *other.stride(), SQUARE=square, SYMMETRIC=y is None, BIAS=bias, ADD=parts == 1,
            BLOCK=block, BLOCK_ROWS=step, PRECISION=precision, **_options(block),
        )  # fmt: skip


def _add_columns(
    f_w: Tensor | None, f_b: Tensor | None, x: Tensor | None, g: Tensor, of: _Samples, scale: float,
    weight: Tensor | None, norm: str = "none", mean: Tensor | None = None, rstd: Tensor | None = None,
) -> None:  # fmt: skip
    """Add to f_w the squares of sums of x g, to f_b those of sums of g; tokens x columns of a sample may be strided."""
    width = g.shape[-1]
    if (f_w is None and f_b is None) or width == 0 or of.count == 0:
        return
    across = triton.cdiv(width, _COLUMNS)
    parts, chunk = _cut(of.count, across, width, 1, g.device)
    with contextlib.ExitStack() as stack:
        of_w, of_b = (None if f is None else stack.enter_context(_parts_of(f, parts)) for f in (f_w, f_b))
        _launch(
            _columns_kernel, (across * parts,), x, g, mean, rstd, of.bounds, weight, of_w, of_b, of.tokens, of.count,
            width, parts, chunk, of.row_sample, scale, *((0, 0, 0) if x is None else _strides(x)), *_strides(g),
            NORM=norm, ADD=parts == 1, COLUMNS=_COLUMNS, TOKENS=_TOKENS,
        )  # fmt: skip


# ---- the ops: where a call is right, by the kernels; else the reference says what is wrong with it ------------------


def diag_fisher_linear_(
    f_w: Tensor | None, f_b: Tensor | None, act: Tensor, grad_out: Tensor, *, sample_offsets: Sequence[int],
    scale: float = 1.0, sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    """Run the op ``diag_fisher_linear_``; see `tlkernels.ops.diag_fisher_linear_`."""
    samples = _samples_of(act, grad_out, sample_offsets)
    if not (
        _narrow(act, grad_out) and samples >= 0 and _fits(f_w, (grad_out.shape[-1], act.shape[-1]), act.device)
        and _fits(f_b, (grad_out.shape[-1],), act.device) and _fits(sample_weight, (samples,), act.device)
    ):  # fmt: skip
        return ops._reference_linear(
            f_w, f_b, act, grad_out, sample_offsets=sample_offsets, scale=scale, sample_weight=sample_weight
        )
    of, weight = _Samples.of(act, sample_offsets), _weight(sample_weight)
    a, g = _loadable(act), _loadable(grad_out)
    if f_w is not None and of.one_token:
        by = torch.full((of.count,), scale, dtype=torch.float32, device=g.device) if weight is None else scale * weight
        _add_moments(f_w, g[:, 0], a[:, 0], by, 1.0, precision=_precision(act.dtype), square=True)
    elif f_w is not None:
        _add_squares(f_w, g, a, of, scale, weight)
    _add_columns(None, f_b, None, g, of, scale, weight)
    return None


def diag_fisher_conv2d_(
    f_w: Tensor, f_b: Tensor | None, act: Tensor, grad_out: Tensor, *, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int = 1, scale: float = 1.0, sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    """Run the op ``diag_fisher_conv2d_``; see `tlkernels.ops.diag_fisher_conv2d_`."""
    if not (
        _narrow(act, grad_out) and act.dim() == grad_out.dim() == f_w.dim() == 4
        and len(stride) == len(padding) == len(dilation) == 2 and min(*stride, *dilation) >= 1 and min(padding) >= 0
        and groups >= 1 and act.shape[1] % groups == grad_out.shape[1] % groups == 0
        and _fits(f_w, (grad_out.shape[1], act.shape[1] // groups, *f_w.shape[2:]), act.device)
        and _fits(f_b, (grad_out.shape[1],), act.device) and _fits(sample_weight, (act.shape[0],), act.device)
        and tuple(grad_out.shape) == (act.shape[0], grad_out.shape[1], *_sizes(act, f_w, stride, padding, dilation))
        and min(grad_out.shape[2:]) >= 1
    ):  # fmt: skip
        return ops._reference_conv2d(
            f_w, f_b, act, grad_out, stride=stride, padding=padding, dilation=dilation, groups=groups, scale=scale,
            sample_weight=sample_weight,
        )  # fmt: skip
    a, g = _loadable(act), _loadable(grad_out).flatten(2).transpose(1, 2)  # [N, positions, outs]
    weight = _weight(sample_weight)
    of = _Samples(g.shape[0], g.shape[1], None)
    (height, width), (kernel_height, kernel_width) = act.shape[2:], f_w.shape[2:]
    conv = (
        grad_out.shape[3], height, width, kernel_height * kernel_width, kernel_width, *stride, *padding, *dilation,
        a.stride(1),
    )  # fmt: skip
    strides = (a.stride(0), a.stride(2), a.stride(3))
    with _contiguous(f_w) as into:
        _add_squares(into.flatten(1), g, a, of, scale, weight, conv, strides, groups)
    _add_columns(None, f_b, None, g, of, scale, weight)
    return None


def _sizes(
    act: Tensor, f_w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Iterator[int]:
    for extent, p, d, k, s in zip(act.shape[2:], padding, dilation, f_w.shape[2:], stride, strict=True):
        yield (extent + 2 * p - d * (k - 1) - 1) // s + 1


def diag_fisher_embedding_(
    f_w: Tensor, indices: Tensor, grad_out: Tensor, *, padding_idx: int, sample_offsets: Sequence[int],
    scale: float = 1.0, sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    """Run the op ``diag_fisher_embedding_``; see `tlkernels.ops.diag_fisher_embedding_`."""
    samples = _samples_of(indices[..., None], grad_out, sample_offsets)
    if not (
        _narrow(grad_out) and indices.dtype == torch.int64 and indices.device == grad_out.device and samples >= 0
        and f_w.dim() == 2 and _fits(f_w, (f_w.shape[0], grad_out.shape[-1]), grad_out.device)
        and _fits(sample_weight, (samples,), grad_out.device) and -1 <= padding_idx < f_w.shape[0]
        and (indices.numel() == 0 or (int(indices.min()) >= 0 and int(indices.max()) < f_w.shape[0]))
    ):  # fmt: skip
        return ops._reference_embedding(
            f_w, indices, grad_out, padding_idx=padding_idx, sample_offsets=sample_offsets, scale=scale,
            sample_weight=sample_weight,
        )  # fmt: skip
    width = grad_out.shape[-1]
    if indices.numel() == 0 or width == 0:
        return None
    device, flat = indices.device, indices.flatten()
    g = _loadable(grad_out).flatten(0, -2)
    n = torch.arange(samples, device=device)
    if len(sample_offsets):
        sizes = torch.tensor([b - a for a, b in itertools.pairwise(sample_offsets)], dtype=torch.int64).to(device)
        n = n.repeat_interleave(sizes, output_size=len(flat))
    else:
        n = n.repeat_interleave(indices.shape[1])
    # tokens come sample by sample: a stable sort by index alone leaves them so
    ordered, order = flat.sort(stable=True)
    index, counts = ordered.unique_consecutive(return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    columns = min(256, triton.next_power_of_2(width))
    with _contiguous(f_w) as into:
        _launch(
            _rows_kernel, (len(index) * triton.cdiv(width, columns),), g, order, n[order], starts, index,
            _weight(sample_weight), into, width, padding_idx, scale, *g.stride(), COLUMNS=columns,
        )  # fmt: skip
    return None


def diag_fisher_norm_(
    f_w: Tensor | None, f_b: Tensor | None, x: Tensor, grad_out: Tensor, *, norm: str, eps: float,
    sample_offsets: Sequence[int], scale: float = 1.0, sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    """Run the op ``diag_fisher_norm_``; see `tlkernels.ops.diag_fisher_norm_`."""
    samples, width = _samples_of(x, grad_out, sample_offsets), x.shape[-1] if x.dim() else 0
    if not (
        _narrow(x, grad_out) and samples >= 0 and grad_out.shape == x.shape and norm in ops.NORMS and eps >= 0
        and _fits(f_w, (width,), x.device) and _fits(f_b, (width,), x.device)
        and _fits(sample_weight, (samples,), x.device)
    ):  # fmt: skip
        return ops._reference_norm(
            f_w, f_b, x, grad_out, norm=norm, eps=eps, sample_offsets=sample_offsets, scale=scale,
            sample_weight=sample_weight,
        )  # fmt: skip
    of, value, g = _Samples.of(x, sample_offsets), _loadable(x), _loadable(grad_out)
    mean = rstd = None
    rows = x.numel() // width if width else 0
    if norm != "none" and f_w is not None and rows:
        mean, rstd = (torch.empty((rows,), dtype=torch.float32, device=x.device) for _ in range(2))
        tile = 16
        _launch(
            _statistics_kernel, (triton.cdiv(rows, tile),), value, mean, rstd, rows, of.tokens, width, eps,
            *_strides(value), CENTRED=norm == "layer", ROWS=tile, COLUMNS=min(256, triton.next_power_of_2(width)),
        )  # fmt: skip
    by = "none" if mean is None else "row"
    _add_columns(f_w, f_b, value, g, of, scale, _weight(sample_weight), by, mean, rstd)
    return None


def diag_fisher_channel_norm_(
    f_w: Tensor | None, f_b: Tensor | None, x: Tensor, grad_out: Tensor, mean: Tensor, rstd: Tensor, *,
    scale: float = 1.0, sample_weight: Tensor | None = None,
) -> None:  # fmt: skip
    """Run the op ``diag_fisher_channel_norm_``; see `tlkernels.ops.diag_fisher_channel_norm_`."""
    if not (
        _narrow(x, grad_out) and x.dim() == 3 and grad_out.shape == x.shape
        and all(_fits(t, (x.shape[1],), x.device) for t in (f_w, f_b, mean, rstd))
        and _fits(sample_weight, (x.shape[0],), x.device)
    ):  # fmt: skip
        return ops._reference_channel_norm(f_w, f_b, x, grad_out, mean, rstd, scale=scale, sample_weight=sample_weight)
    value, g = (_loadable(t).transpose(1, 2) for t in (x, grad_out))  # [N, positions, channels]
    of = _Samples(g.shape[0], g.shape[1], None)
    _add_columns(
        f_w, f_b, value, g, of, scale, _weight(sample_weight), "column", mean.contiguous(), rstd.contiguous()
    )  # fmt: skip
    return None


def per_sample_sqnorm_linear(act: Tensor, grad_out: Tensor, *, sample_offsets: Sequence[int]) -> Tensor:
    """Run the op ``per_sample_sqnorm_linear``: tile by tile of each sample's gradient."""
    if not (_narrow(act, grad_out) and _samples_of(act, grad_out, sample_offsets) >= 0):
        return ops._reference_per_sample_sqnorm_linear(act, grad_out, sample_offsets=sample_offsets)
    of, a, g = _Samples.of(act, sample_offsets), _loadable(act), _loadable(grad_out)
    outs, ins = g.shape[-1], a.shape[-1]
    if of.count * outs * ins == 0:
        return torch.zeros((of.count,), dtype=torch.float32, device=act.device)
    precision = _precision(g.dtype)
    block_out, block_in = _tile(outs, _BLOCK[precision]), _tile(ins, _BLOCK[precision])
    tiles = triton.cdiv(outs, block_out) * triton.cdiv(ins, block_in)
    sums = torch.empty((of.count, tiles), dtype=torch.float32, device=act.device)
    _launch(
        _squares_kernel, (tiles * of.count,), a, g, of.bounds, None, sums, of.tokens, of.count, outs, ins, of.count, 1,
        1.0, *_strides(a), *_strides(g), *(None,) * 12, CONV=False, SUM=True, ADD=False, BLOCK_OUT=block_out,
        BLOCK_IN=block_in, BLOCK_TOKENS=_tile(of.longest, 32 if g.dtype == torch.float32 else 64),
        PRECISION=precision, **_options(max(block_out, block_in)),
    )  # fmt: skip
    return sums.sum(1, dtype=torch.float64).to(torch.float32)


def kfac_factors_linear_(
    A: Tensor | None, G: Tensor | None, act: Tensor, grad_out: Tensor, *, bias: bool, approx: str,
    sample_offsets: Sequence[int], token_weight: Tensor | None = None, scale_a: float = 1.0, scale_g: float = 1.0,
) -> None:  # fmt: skip
    """Run the op ``kfac_factors_linear_``; see `tlkernels.ops.kfac_factors_linear_`."""
    samples = _samples_of(act, grad_out, sample_offsets)
    side, outs = (act.shape[-1] + int(bias), grad_out.shape[-1]) if samples >= 0 else (0, 0)
    if not (
        _narrow(act, grad_out) and samples >= 0 and approx in ops.APPROXIMATIONS
        and _fits(A, (side, side), act.device) and _fits(G, (outs, outs), act.device)
        and _fits(token_weight, tuple(act.shape[:-1]), act.device)
    ):  # fmt: skip
        return ops._reference_kfac(
            A, G, act, grad_out, bias=bias, approx=approx, sample_offsets=sample_offsets, token_weight=token_weight,
            scale_a=scale_a, scale_g=scale_g,
        )  # fmt: skip
    a, g, weight, precision = _loadable(act), _loadable(grad_out), _weight(token_weight), _precision(act.dtype)
    if approx == "reduce":
        of = _Samples.of(act, sample_offsets)
        ones = act.new_ones((1,), dtype=torch.float32).expand(*act.shape[:-1], 1)
        total = _token_sums(ones if weight is None else weight[..., None], of, None)
        mass = torch.where(total == 0, 1.0, total)  # a sample without tokens has no mean, and no part
        a = _token_sums(a, of, weight) / mass
        if bias:
            a, bias = torch.cat([a, total / mass], 1), False
        # sums are float32, whatever their terms were
        g, weight, precision = _token_sums(g, of, weight), None, _precision(torch.float32)
    a, g = a.flatten(0, -2), g.flatten(0, -2)
    weight = None if weight is None else weight.flatten()
    if A is not None:
        _add_moments(A, a, None, weight, scale_a, precision=precision, bias=bias)
    if G is not None:
        _add_moments(G, g, None, weight, scale_g, precision=precision)
    return None


def _token_sums(x: Tensor, of: _Samples, weight: Tensor | None) -> Tensor:
    """Sums over each sample's tokens, [N, width]."""
    width = x.shape[-1]
    out = torch.zeros((of.count, width), dtype=torch.float32, device=x.device)
    if out.numel():
        _launch(
            _token_sums_kernel, (of.count * triton.cdiv(width, _COLUMNS),), x, of.bounds, weight, out, of.tokens, width,
            of.row_sample, *_strides(x), COLUMNS=_COLUMNS, TOKENS=_TOKENS,
        )  # fmt: skip
    return out


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def _lists_match(
    first: Sequence[Tensor], wide: Sequence[Tensor], *same: Sequence[Tensor], one_device: bool = False
) -> bool:
    """Of `first`'s shapes and devices, tensor by tensor; `same` of its dtypes, `wide` float32; nothing is float64."""
    if not all(len(tensors) == len(first) for tensors in (wide, *same)):
        return False
    for t, w, *others in zip(first, wide, *same, strict=True):
        if not (_narrow(t, *others) and _fits(w, tuple(t.shape), t.device)):
            return False
        if any(o.shape != t.shape for o in others) or (one_device and t.device != first[0].device):
            return False
    return True


def _flat(t: Tensor) -> Tensor:
    return _loadable(t).contiguous()


def _accumulate(
    into: Sequence[Tensor], x: Sequence[Tensor], y: Sequence[Tensor], kind: str, decay: float, scale: float
) -> None:  # fmt: skip
    for acc, a, b in zip(into, x, y, strict=True):
        if acc.numel():
            with _contiguous(acc) as out:
                _launch(
                    _accumulate_kernel, (triton.cdiv(acc.numel(), _CHUNK),), out, _flat(a),
                    _flat(b) if kind == "product" else None, acc.numel(), decay, scale, KIND=kind, CHUNK=_CHUNK,
                    STEP=_STEP,
                )  # fmt: skip


def importance_accum_(
    acc: Sequence[Tensor], grads: Sequence[Tensor], *, kind: str, decay: float = 1.0, scale: float = 1.0
) -> None:
    """Run the op ``importance_accum_``: a launch for each tensor."""
    if not (kind in ops.MODES and _lists_match(grads, acc)):
        return ops._reference_importance_accum(acc, grads, kind=kind, decay=decay, scale=scale)
    return _accumulate(acc, grads, grads, kind, decay, scale)


def si_accum_(
    omega: Sequence[Tensor], grads: Sequence[Tensor], deltas: Sequence[Tensor], *, scale: float = -1.0
) -> None:
    """Run the op ``si_accum_``: a launch for each tensor."""
    if not _lists_match(grads, omega, deltas):
        return ops._reference_si_accum(omega, grads, deltas, scale=scale)
    return _accumulate(omega, grads, deltas, "product", 1.0, scale)


def _penalty(
    params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None, scale: float = 1.0, factor: Tensor | None = None, value: bool = True,
) -> Tensor:  # fmt: skip
    """Write the gradients to `grads`, or add them where there is no `factor`; return the float64 penalty."""
    programs = [triton.cdiv(p.numel(), _CHUNK) for p in params]
    starts = list(itertools.accumulate(programs, initial=0))
    parts = torch.zeros((starts[-1] if value else 0,), dtype=torch.float64, device=params[0].device)
    for i, (p, a, f) in enumerate(zip(params, anchors, importances, strict=True)):
        if not p.numel():
            continue
        into = None if grads is None else _flat(grads[i])
        _launch(
            _penalty_kernel, (programs[i],), _flat(p), _flat(a), f.contiguous(), into, factor,
            parts[starts[i] :] if value else None, p.numel(), scale, ADD=factor is None, CHUNK=_CHUNK, STEP=_STEP,
        )  # fmt: skip
        if grads is not None and into is not grads[i]:
            grads[i].copy_(into)
    return 0.5 * parts.sum()


def quad_penalty(params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor]) -> Tensor:
    """Run the op ``quad_penalty``: a launch for each tensor."""
    if not (params and _lists_match(params, importances, anchors, one_device=True)):
        return ops._reference_quad_penalty(params, anchors, importances)
    return _penalty(params, anchors, importances).to(torch.float32)


def quad_penalty_backward(
    grad: Tensor, params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor]
) -> list[Tensor]:
    """Run the op ``quad_penalty_backward``: the gradients of `quad_penalty` by the parameters."""
    if not (
        params and _lists_match(params, importances, anchors, one_device=True) and _fits(grad, (), params[0].device)
    ):
        return ops._reference_quad_penalty_backward(grad, params, anchors, importances)
    out = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in params]
    _penalty(params, anchors, importances, out, factor=grad.contiguous(), value=False)
    return out


def quad_penalty_grad_(
    grads: Sequence[Tensor], params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor], *,
    scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Run the op ``quad_penalty_grad_``: value and gradients in one pass, a launch for each tensor."""
    if not (params and _lists_match(params, importances, anchors, grads, one_device=True)):
        return ops._reference_quad_penalty_grad_(grads, params, anchors, importances, scale=scale)
    value = _penalty(params, anchors, importances, grads, scale)
    # rounded before it is multiplied, as the reference does
    return value.to(torch.float32) * scale
