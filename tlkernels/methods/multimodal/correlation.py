r"""Canonical correlations of two views: linear CCA, and the loss of deep CCA.

With the covariances of the centred views, :math:`\Sigma_{11} = X^T X / (n - 1) + r_1 I`, :math:`\Sigma_{22}` of y
alike, :math:`\Sigma_{12} = X^T Y / (n - 1)`, the canonical correlations are the singular values of the whitened
cross-covariance

.. math:: T = \Sigma_{11}^{-1/2} \Sigma_{12} \Sigma_{22}^{-1/2} = U D V^T,

and the projections :math:`A = \Sigma_{11}^{-1/2} U`, :math:`B = \Sigma_{22}^{-1/2} V`.

Hotelling, Relations Between Two Sets of Variates, Biometrika 1936.
Andrew, Arora, Bilmes, Livescu, Deep Canonical Correlation Analysis, ICML 2013.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tlkernels.methods._common import check_float
from tlkernels.ops._common import check_device, no_autocast

__all__ = ["CCA", "DCCALoss", "canonical_correlation", "cca"]

View: TypeAlias = "Tensor | np.ndarray[Any, Any]"
Regularization: TypeAlias = "float | tuple[float, float]"


def _both(op: str, reg: Regularization) -> tuple[float, float]:
    both = (float(reg), float(reg)) if isinstance(reg, (int, float)) else (float(reg[0]), float(reg[1]))
    if not all(0.0 <= r < math.inf for r in both):
        raise ValueError(f"{op}: reg is {reg}; expected one or two numbers of at least 0")
    return both


def _views(op: str, x: View, y: View) -> tuple[Tensor, Tensor]:
    views = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in (x, y)]
    for name, view in zip("xy", views, strict=True):
        check_float(op, **{name: view})
        if view.dim() != 2 or view.shape[0] != views[0].shape[0] or view.shape[1] < 1:
            rows = views[0].shape[0] if views[0].dim() == 2 else "samples"
            raise ValueError(f"{op}: {name} has shape {tuple(view.shape)}; expected ({rows}, features)")
    if views[0].shape[0] < 2:
        raise ValueError(f"{op}: x has {views[0].shape[0]} samples; expected 2 or more")
    check_device(op, views[0].device, y=views[1])
    return views[0], views[1]


# ---- linear ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CCA:
    """What `cca` found; float64 tensors.

    Attributes
    ----------
    correlations : Tensor
        ``[k]``, descending. With regularization they are below those of the projections.
    x_weights, y_weights : Tensor
        ``[p, k]`` and ``[q, k]``: A and B. The largest weight of each column of A is positive.
    x_mean, y_mean : Tensor
        ``[p]`` and ``[q]``.
    """

    correlations: Tensor
    x_weights: Tensor
    y_weights: Tensor
    x_mean: Tensor
    y_mean: Tensor

    def transform_x(self, x: View) -> Tensor:
        """Canonical variates of new samples of x, ``[n, p]`` to float64 ``[n, k]``."""
        return self._project("x", x, self.x_mean, self.x_weights)

    def transform_y(self, y: View) -> Tensor:
        """Canonical variates of new samples of y, ``[n, q]`` to float64 ``[n, k]``."""
        return self._project("y", y, self.y_mean, self.y_weights)

    @staticmethod
    def _project(name: str, view: View, mean: Tensor, weights: Tensor) -> Tensor:
        t = torch.from_numpy(view) if isinstance(view, np.ndarray) else view
        check_float("CCA", **{name: t})
        if t.dim() != 2 or t.shape[1] != mean.shape[0]:
            raise ValueError(f"CCA: {name} has shape {tuple(t.shape)}; expected (samples, {mean.shape[0]})")
        return (t.to(mean) - mean) @ weights


@torch.no_grad()
def cca(x: View, y: View, num_components: int | None = None, *, reg: Regularization = 0.0) -> CCA:
    r"""Linear canonical correlation analysis.

    Parameters
    ----------
    x : Tensor or ndarray
        ``[n, p]``, floating point; n >= 2.
    y : Tensor or ndarray
        ``[n, q]``, the same samples.
    num_components : int, optional
        k; by default as many as there are, the smaller rank of the two.
    reg : float or pair of float
        :math:`r_1, r_2 \ge 0`, added to the variances.

    Returns
    -------
    CCA

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit, or k is more than there are.

    Notes
    -----
    In float64, from the singular value decompositions of both centred views, so that no covariance squares a condition
    number: of :math:`X = U S V^T`, :math:`\Sigma_{11}^{-1/2} = V (S^2 / (n - 1) + r_1)^{-1/2} V^T`. Directions of no
    variance are left out. Variates have variance 1 (without `reg`) and are uncorrelated.

    References
    ----------
    Hotelling 1936. Bjorck and Golub, Numerical Methods for Computing Angles between Linear Subspaces, 1973 (through
    orthogonal bases). Vinod, Canonical Ridge, J. Econometrics 1976 (`reg`).
    """
    op = "cca"
    first, second = _views(op, x, y)
    regs = _both(op, reg)
    means, bases, scales, shares = [], [], [], []
    for name, view, r in zip("xy", (first, second), regs, strict=True):
        wide = view.detach().to(torch.float64)
        if not bool(wide.isfinite().all()):
            raise ValueError(f"{op}: {name} has a value that is not finite; expected finite samples")
        mean = wide.mean(0)
        u, s, vh = torch.linalg.svd(wide - mean, full_matrices=False)
        kept = s > s[:1].clamp(min=0) * max(wide.shape) * torch.finfo(torch.float64).eps
        variance = s[kept].square() / (wide.shape[0] - 1)
        deviation = (variance + r).sqrt()
        means.append(mean)
        bases.append(u[:, kept])
        scales.append(vh[kept].T / deviation)
        shares.append(variance.sqrt() / deviation)
    most = min(basis.shape[1] for basis in bases)
    k = most if num_components is None else num_components
    if not 1 <= k <= most:
        raise ValueError(f"{op}: num_components is {num_components}; expected 1 to {most}, the smaller rank of x and y")
    u, d, vh = torch.linalg.svd(shares[0][:, None] * (bases[0].T @ bases[1]) * shares[1], full_matrices=False)
    a, b = scales[0] @ u[:, :k], scales[1] @ vh[:k].T
    sign = a.gather(0, a.abs().argmax(0, keepdim=True)).sign()
    return CCA(d[:k].clamp(max=1.0), a * sign, b * sign, means[0], means[1])


# ---- deep -----------------------------------------------------------------------------------------------------------


def _whitening(op: str, name: str, centred: Tensor, reg: float) -> Tensor:
    """The inverse square root of the covariance, ``[d, d]``."""
    covariance = centred.T @ centred / (centred.shape[0] - 1)
    values, vectors = torch.linalg.eigh(covariance)
    values = values + reg
    if not bool(values[0] > values[-1] * values.shape[0] * torch.finfo(values.dtype).eps):
        raise ValueError(
            f"{op}: the covariance of {name} has an eigenvalue of {float(values[0]):.3g}, with the largest "
            f"{float(values[-1]):.3g}; expected a larger reg, or more samples than features"
        )
    return (vectors * values.rsqrt()) @ vectors.T


class _Correlation(torch.autograd.Function):
    """The sum of the k largest singular values of T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, k: int, reg: tuple[float, float], op: str) -> Tensor:
        centred_x, centred_y = x - x.mean(0), y - y.mean(0)
        white_x, white_y = _whitening(op, "x", centred_x, reg[0]), _whitening(op, "y", centred_y, reg[1])
        cross = centred_x.T @ centred_y / (x.shape[0] - 1)
        u, d, vh = torch.linalg.svd(white_x @ cross @ white_y, full_matrices=False)
        ctx.save_for_backward(x, y, white_x @ u[:, :k], white_y @ vh[:k].T, d[:k])
        return d[:k].sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_y = _CorrelationGradient.apply(*ctx.saved_tensors, grad)
        return grad_x, grad_y, None, None, None


class _CorrelationGradient(torch.autograd.Function):
    """The paper's gradient; a function of its own, so that a second derivative does not take it for a constant.

    For each component, d sigma = a' dS12 b - sigma / 2 (a' dS11 a + b' dS22 b): no gaps between singular values or
    eigenvalues in a denominator, as a derivative of the decompositions would have.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, d: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        xa, yb = (x - x.mean(0)) @ a, (y - y.mean(0)) @ b
        scale = grad / (x.shape[0] - 1)
        return scale * (yb - xa * d) @ a.T, scale * (xa - yb * d) @ b.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("canonical_correlation: its gradient may not be differentiated; expected one derivative")


def canonical_correlation(
    x: Tensor, y: Tensor, num_components: int | None = None, *, reg: Regularization = 1e-4,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    r"""The total correlation of two views, differentiable: the objective of deep CCA.

    Parameters
    ----------
    x : Tensor
        ``[n, p]``, float32, bfloat16, float16 or float64: a batch of outputs of one network.
    y : Tensor
        ``[n, q]``, the same samples through the other.
    num_components : int, optional
        k: the sum of the k largest correlations; by default all, ``min(p, q)``.
    reg : float or pair of float
        :math:`r_1, r_2 \ge 0`, added to the variances. 0 needs covariances of full rank.
    dtype : torch.dtype, optional
        Of the computation and the result: float32 or float64. By default float64 where an input is, else float32.

    Returns
    -------
    Tensor
        0-d. Differentiable once, in both; gradients have the inputs' dtypes.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit, k is out of range, or a covariance is singular.
    RuntimeError
        On a second derivative.

    Notes
    -----
    .. math:: \mathrm{corr} = \sum_{i \le k} D_{ii}, \quad
        \frac{\partial \mathrm{corr}}{\partial X} = \frac{1}{n - 1} (2 X \nabla_{11} + Y \nabla_{12}^T), \quad
        \nabla_{12} = \Sigma_{11}^{-1/2} U V^T \Sigma_{22}^{-1/2}, \quad
        \nabla_{11} = -\tfrac12 \Sigma_{11}^{-1/2} U D U^T \Sigma_{11}^{-1/2}

    with the first k columns of U and V. Of equal k-th and next correlations it is a subgradient.

    References
    ----------
    Andrew 2013, equations 10 to 13.
    """
    op = "canonical_correlation"
    x, y = _views(op, x, y)
    most = min(x.shape[1], y.shape[1])
    k = most if num_components is None else num_components
    if not 1 <= k <= most:
        raise ValueError(f"{op}: num_components is {num_components}; expected 1 to {most}")
    if dtype not in (None, torch.float32, torch.float64):
        raise TypeError(f"{op}: dtype is {dtype}; expected torch.float32, torch.float64 or None")
    wide = dtype or torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with no_autocast(x.device):
        return _Correlation.apply(x.to(wide), y.to(wide), k, _both(op, reg), op)


class DCCALoss(nn.Module):
    r"""The loss of deep CCA: the total correlation of two networks' outputs, negative.

    Parameters
    ----------
    num_components, reg, dtype
        As for `canonical_correlation`. The decompositions gain from ``dtype=torch.float64``.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range.

    Notes
    -----
    The covariances are those of the batch: take batches much larger than the outputs are wide. After training, `cca` of
    all outputs gives the projections.

    References
    ----------
    Andrew et al., Deep Canonical Correlation Analysis, ICML 2013. Wang et al., Unsupervised Learning of Acoustic
    Features via Deep CCA, ICASSP 2015 (in batches).
    """

    def __init__(
        self, num_components: int | None = None, *, reg: Regularization = 1e-4, dtype: torch.dtype | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        if num_components is not None and num_components < 1:
            raise ValueError(f"DCCALoss: num_components is {num_components}; expected 1 or more")
        if dtype not in (None, torch.float32, torch.float64):
            raise TypeError(f"DCCALoss: dtype is {dtype}; expected torch.float32, torch.float64 or None")
        self.num_components, self.reg, self.dtype = num_components, _both("DCCALoss", reg), dtype

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of ``[n, p]`` and ``[n, q]``, 0-d; raises as `canonical_correlation`."""
        return -canonical_correlation(x, y, self.num_components, reg=self.reg, dtype=self.dtype)
