"""How far a product may be from float64: one table, for every test that compares floating-point results."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Bounds for one dtype of input and output."""

    unit: float  # largest relative error of rounding a number to the dtype
    accumulator: float  # the same of the accumulator
    norm: float  # ||out - ref|| / ||ref||, beyond that of the exact result rounded once


# Rounding once is off by 1.6e-3 in bfloat16 and 2.0e-4 in float16 (root mean square, up to 2.3e-3 and 2.8e-4 where most
# values lie just above a power of two). Products of 16-bit numbers are exact in float32, so little is added to that.
TOLERANCES = {
    torch.bfloat16: Tolerance(unit=2**-8, accumulator=2**-24, norm=1e-5),
    torch.float16: Tolerance(unit=2**-11, accumulator=2**-24, norm=1e-5),
    torch.float32: Tolerance(unit=2**-24, accumulator=2**-24, norm=1e-6),
    torch.float64: Tolerance(unit=2**-53, accumulator=2**-53, norm=1e-14),
}


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref|| in float64 (0 when both are 0)."""
    ref = ref.double()
    error = (out.double() - ref).norm()
    return float(error / ref.norm()) if error else 0.0


def assert_product(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None, context: str = "") -> None:
    """`out` is ``x @ w.T + bias``, with w rounded to x's dtype, within the table: in norm and element by element.

    The element-wise bound is one rounding of the result, plus, relative to the sum of magnitudes, the errors of a sum
    of K terms, which grow like sqrt(K) (Higham & Mary 2019).
    """
    tolerance = TOLERANCES[x.dtype]
    assert out.dtype == x.dtype and out.shape == (*x.shape[:-1], w.shape[0]), context
    x, w, bias = x.double(), w.to(x.dtype).double(), torch.zeros(1).double() if bias is None else bias.double()
    ref, magnitude = x @ w.T + bias, x.abs() @ w.abs().T + bias.abs()
    sums = (8 + 4 * x.shape[-1] ** 0.5) * tolerance.accumulator
    bound = tolerance.unit * (ref.abs() + torch.finfo(out.dtype).smallest_normal) + 1.01 * sums * magnitude
    excess = (out.double() - ref).abs() - bound
    assert out.isfinite().all() and (excess <= 0).all(), f"{context}: element off by {excess.max():.3g} above its bound"
    if out.numel() >= 1024:  # errors average out over many elements; the bound above holds the few
        error, rounding = relative_error(out, ref), relative_error(ref.to(out.dtype), ref)
        assert error <= math.hypot(rounding, tolerance.norm), f"{context}: relative error {error:.4g} ({rounding:.4g})"
