"""The number tables of the NF4 format, without torch: they serve the torch ops and `tlkernels.numpy` alike."""

from __future__ import annotations

import numpy as np

#: The 16 values of NF4, quantiles of the normal distribution scaled to [-1, 1] (Dettmers et al. 2023), float32.
NF4_CODE: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

#: The 16 values of a 4-bit float (1 sign, 2 exponent, 1 mantissa bits), numbered by their bits, scaled to [-1, 1].
FP4_CODE: tuple[float, ...] = tuple(
    float(np.float32(sign * v / 12.0)) for sign in (1.0, -1.0) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)


def _dynamic_code() -> tuple[float, ...]:
    """The signed 8-bit "dynamic" table: 7 decades, each twice as fine as the one below, and 0 and 1.

    Decade i (i = 0 .. 6) holds the centres of 2**i equal parts of [0.1, 1], times 10**(i - 6), with both signs.
    """
    values = [0.0, 1.0]
    for i in range(7):
        steps = 2**i
        step = np.float32(np.float32(1.0) - np.float32(0.1)) / np.float32(steps)
        j = np.arange(steps + 1)
        # each half counts from its own end, one rounding an edge: the same bits as torch.linspace
        up, down = float(np.float32(0.1)) + float(step) * j, 1.0 - float(step) * (steps - j)
        edges = np.where(j < (steps + 1) // 2, up, down).astype(np.float32)
        centres = ((edges[:-1] + edges[1:]) / np.float32(2.0)) * np.float32(10.0 ** (i - 6))
        values += [float(v) for c in centres for v in (c, -c)]
    return tuple(sorted(values))


#: The 256 values of the signed dynamic table (Dettmers et al. 2022), ascending, float32.
DYNAMIC_CODE: tuple[float, ...] = _dynamic_code()
