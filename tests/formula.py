"""The families as formulas: what the kernels and the references are both held against.

Nothing here comes from tlkernels. The NF4 format is in NumPy, with tensors in and out; its arithmetic is float32, as
the format is defined. LoRA is in float64, with a bound on what rounding may do to each element; its random numbers are
in NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from tolerances import TOLERANCES
from torch import Tensor

# ---- NF4 ------------------------------------------------------------------------------------------------------------

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def dynamic_table() -> Tensor:
    """The signed 8-bit table: seven decades, decade i the centres of 2**i parts of [0.1, 1] times 10**(i - 6)."""
    edges = [torch.linspace(0.1, 1.0, 2**i + 1) for i in range(7)]
    decades = torch.cat([(e[:-1] + e[1:]) / 2 * 10.0 ** (i - 6) for i, e in enumerate(edges)])
    return torch.cat([-decades, decades, torch.tensor([0.0, 1.0])]).sort().values


def midpoints(table: np.ndarray) -> np.ndarray:
    return (table[1:] + table[:-1]) * np.float32(0.5)


def blockwise_index(flat: np.ndarray, block_size: int, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per element the number of midpoints of `table` below its normalised value, and per block the absmax."""
    starts = np.arange(0, len(flat), block_size)
    absmax = np.maximum.reduceat(np.abs(flat), starts) if len(flat) else flat
    divisor = np.repeat(np.maximum(absmax, np.float32(1e-38)), block_size)[: len(flat)]
    full = len(flat) - len(flat) % block_size
    with np.errstate(invalid="ignore"):
        v = np.concatenate([flat[:full] * (np.float32(1) / divisor[:full]), flat[full:] / divisor[full:]])
    v = np.where(np.isinf(flat), np.sign(flat), v)
    return np.searchsorted(midpoints(table), v), absmax  # side "left": midpoints < v; NaN stands behind them all


def nf4_quantize(w: Tensor, block_size: int = 64, code: Tensor = NF4) -> tuple[Tensor, Tensor]:
    order = np.argsort(code.numpy(), kind="stable")
    table = code.numpy()[order]
    index, absmax = blockwise_index(w.float().reshape(-1).numpy(), block_size, table)
    spare = np.searchsorted(midpoints(table), np.zeros(len(index) % 2, np.float32))  # an odd tensor ends on a zero
    nibbles = order[np.concatenate([index, spare])]
    return torch.from_numpy((nibbles[::2] << 4 | nibbles[1::2]).astype(np.uint8)), torch.from_numpy(absmax)


def nf4_dequantize(
    packed: Tensor, absmax: Tensor, shape: tuple[int, ...], dtype: torch.dtype, block_size: int = 64, code: Tensor = NF4
) -> Tensor:
    numel = math.prod(shape)
    nibbles = torch.stack([packed >> 4, packed & 15], 1).view(-1)[:numel]
    return (code[nibbles.long()] * absmax.repeat_interleave(block_size)[:numel]).to(dtype).view(shape)


def absmax_quantize(absmax: Tensor, block_size: int = 256, offset: Tensor | None = None) -> tuple[Tensor, ...]:
    if offset is None:
        offset = torch.tensor(math.fsum(absmax.tolist()) / max(1, len(absmax)), dtype=torch.float32)
    index, scale = blockwise_index((absmax - offset).numpy(), block_size, dynamic_table().numpy())
    return torch.from_numpy(index.astype(np.uint8)), torch.from_numpy(scale), offset


def absmax_dequantize(q: Tensor, scale: Tensor, offset: Tensor, block_size: int = 256) -> Tensor:
    return dynamic_table()[q.long()] * scale.repeat_interleave(block_size)[: len(q)] + offset


# ---- Philox-4x32-10 (Salmon et al., SC 2011, section 3.3) and the dropout mask --------------------------------------

PHILOX_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
PHILOX_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint32)  # the golden ratio and sqrt(3) - 1


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Ten rounds on uint32 ``[..., 4]`` with the key ``[2]``, which is bumped between rounds: uint32 ``[..., 4]``."""
    words = counter.astype(np.uint32)
    for round_ in range(10):
        bumped = (key.astype(np.uint64) + np.uint64(round_) * PHILOX_WEYL).astype(np.uint32)
        product = words[..., ::2] * PHILOX_MULTIPLIERS  # of words 0 and 2, in 64 bits
        high, low = (product >> np.uint64(32)).astype(np.uint32), product.astype(np.uint32)
        swapped = high[..., ::-1] ^ words[..., 1::2] ^ bumped
        words = np.stack([swapped[..., 0], low[..., 1], swapped[..., 1], low[..., 0]], -1)
    return words


def halves(number: int) -> tuple[int, int]:
    """The low and the high 32 bits of an int64."""
    return number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF


def dropout_bits(seed: int, offset: int, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """The 16 bits of each element (row, col)."""
    row, col = np.broadcast_arrays(row, col)
    counter = np.stack([col // 8, row, *(np.full(row.shape, half) for half in halves(offset))], -1)
    words = philox(counter, np.array(halves(seed)))
    word = np.take_along_axis(words, (col % 8 // 2)[..., None], -1)[..., 0]
    return np.where(col % 2 == 0, word & 0xFFFF, word >> 16)


def dropout_mask(seed: int, offset: int, rows: int, cols: int, p: float) -> Tensor:
    """True where the element is kept: where its 16 bits are not below round(65536 p), a half rounded up."""
    bits = dropout_bits(seed, offset, np.arange(rows)[:, None], np.arange(cols)[None, :])
    return torch.from_numpy(bits >= min(65535, math.floor(65536 * p + 0.5)))


# ---- LoRA -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """A sum in float64, and what its rounding may be off by.

    `magnitude` is the same sum of absolute terms, `terms` their number: the error of the sum grows like sqrt(terms)
    (Higham & Mary 2019). `inherited` bounds what the errors of rounded factors add to it.
    """

    value: Tensor
    magnitude: Tensor
    terms: int
    inherited: Tensor

    def __add__(self, other: Exact) -> Exact:
        return Exact(
            self.value + other.value, self.magnitude + other.magnitude, self.terms + other.terms,
            self.inherited + other.inherited,
        )  # fmt: skip

    def __mul__(self, factor: float | Tensor) -> Exact:
        size = abs(factor)
        return Exact(self.value * factor, self.magnitude * size, self.terms, self.inherited * size)

    def kept(self, mask: Tensor | None, p: float) -> Exact:
        """Dropped elements are 0, whatever they were; the others are divided by 1 - p."""
        return Exact(*(dropped(t, mask, p) if isinstance(t, Tensor) else t for t in vars(self).values()))

    def bound(self, out: torch.dtype, dtype: torch.dtype) -> Tensor:
        """Of each element's error, when it is summed in the accumulator of `dtype` and rounded to `out`."""
        sums = 1.01 * (8 + 4 * self.terms**0.5) * TOLERANCES[dtype].accumulator
        rounding = TOLERANCES[out].unit * (self.value.abs() + torch.finfo(out).smallest_normal)
        return rounding + sums * self.magnitude + 1.01 * self.inherited

    def rounded(self, dtype: torch.dtype) -> Exact:
        """As a factor of another product, after it was rounded to `dtype`."""
        return Exact(self.value, self.value.abs(), 0, self.bound(dtype, dtype))

    def check(self, out: Tensor, dtype: torch.dtype, context: object = "") -> None:
        """`out` is this, summed in the accumulator of `dtype` and rounded to its own: element by element, and in norm.

        The norm is held where nothing is inherited: errors average out over many elements, the bound holds the few. Its
        measure is the norm that terms of random signs would have, should they cancel more than that.
        """
        assert out.shape == self.value.shape, f"{context}: shape {tuple(out.shape)}"
        excess = (out.double() - self.value).abs() - self.bound(out.dtype, dtype)
        assert out.isfinite().all() and (excess <= 0).all(), f"{context}: off by {excess.max():.3g} above its bound"
        if out.numel() >= 1024 and not self.inherited.any():
            norm = max(TOLERANCES[out.dtype].norm, TOLERANCES[torch.promote_types(dtype, torch.float32)].norm)
            size = max(float(self.value.norm()), float(self.magnitude.norm()) / max(1, self.terms) ** 0.5, 1e-300)
            error, rounding = (float((t.double() - self.value).norm()) / size for t in (out, self.value.to(out.dtype)))
            assert error <= math.hypot(rounding, norm), f"{context}: relative error {error:.4g} ({rounding:.4g})"


def dropped(t: Tensor, mask: Tensor | None, p: float) -> Tensor:
    return t if mask is None else torch.where(mask.view(t.shape), t, torch.zeros((), dtype=t.dtype)) / (1.0 - p)


def exact(t: Tensor) -> Exact:
    t = t.double()
    return Exact(t, t.abs(), 1, torch.zeros_like(t))


def product(left: Tensor | Exact, right: Tensor | Exact) -> Exact:
    left, right = (t if isinstance(t, Exact) else exact(t) for t in (left, right))
    (a, b), (size_a, size_b) = (left.value, right.value), (left.value.abs(), right.value.abs())
    inherited = left.inherited @ (size_b + right.inherited) + size_a @ right.inherited
    return Exact(a @ b, size_a @ size_b, b.shape[0], inherited)


def flat(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def lora_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, mask: Tensor | None = None,
    p: float = 0.0, s: Tensor | None = None,
) -> tuple[Exact, Exact]:  # fmt: skip
    """(y, s) of rows x ``[n, in]``; y with the given, already rounded `s`, or with the error that rounding s adds."""
    dtype = x.dtype
    down = product(dropped(x.double(), mask, p), a.to(dtype).T) * scaling
    y = product(x, w.to(dtype).T) + product(down.rounded(dtype) if s is None else s, b.to(dtype).T)
    return (y if bias is None else y + exact(bias)), down


def lora_gradients(
    dy: Tensor, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float, mask: Tensor | None = None,
    p: float = 0.0, s: Tensor | None = None, ds: Tensor | None = None,
) -> tuple[Exact, Exact, Exact, Exact]:  # fmt: skip
    """(ds, dA, dB, dx) of rows; with the given, rounded s and ds, or with the errors that rounding them adds."""
    dtype, kept = x.dtype, dropped(x.double(), mask, p)
    down = (product(kept, a.to(dtype).T) * scaling).rounded(dtype) if s is None else exact(s)
    up = product(dy, b.to(dtype)) * scaling
    given = up.rounded(dtype) if ds is None else exact(ds)
    grad_a = product(Exact(*(t.T if isinstance(t, Tensor) else t for t in vars(given).values())), kept)
    grad_x = product(dy, w.to(dtype)) + product(given, a.to(dtype)).kept(mask, p)
    return up, grad_a, product(dy.T, down), grad_x


def lora_weight_norm(w: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Row norms of w + scaling b a, and the magnitude of the terms of their squares' expansion."""
    w, a, b = w.double(), a.double(), b.double()
    first, second = w.abs() @ a.abs().T, b.abs() @ (a.abs() @ a.abs().T)
    magnitude = (w * w).sum(1) + 2 * abs(scaling) * (first * b.abs()).sum(1) + scaling**2 * (second * b.abs()).sum(1)
    return (w + scaling * (b @ a)).norm(dim=1), magnitude


# ---- comparison -----------------------------------------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit, except that all NaN count as one."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.nan_to_num(0.5).view(bits), b.nan_to_num(0.5).view(bits)) and torch.equal(a.isnan(), b.isnan())


def non_finite(t: Tensor) -> Tensor:
    """What each element is: 0 finite, 1 or -1 infinite, 2 NaN."""
    return torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.sign(), torch.zeros_like(t))).double()
