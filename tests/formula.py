"""The NF4 format as a formula, in NumPy: what the kernels and the references are both held against.

Nothing here comes from tlkernels. Tensors go in and out; the arithmetic is float32, as the format is defined.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

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
