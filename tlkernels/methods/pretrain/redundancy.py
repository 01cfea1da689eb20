r"""Barlow Twins and VICReg: no negatives; the second moments of the batch keep features apart.

Moments are computed in float32 (float64 for float64), centred before they are squared, and over all processes where
`reduce` sums over them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels.methods._common import check_not_negative, wide
from tlkernels.methods.pretrain._common import Reduce, alone, check_rows, count
from tlkernels.ops._common import no_autocast

__all__ = ["VICRegTerms", "barlow_twins_loss", "vicreg_loss"]

_VARIANCE = "the variance of the batch is undefined"


def barlow_twins_loss(
    z1: Tensor, z2: Tensor, *, lambd: float = 0.0051, eps: float = 1e-5, reduce: Reduce | None = None
) -> Tensor:  # fmt: skip
    r"""The loss of Barlow Twins: the correlation of two views becomes the identity.

    .. math:: L = \sum_i (1 - C_{ii})^2 + \lambda \sum_i \sum_{j \ne i} C_{ij}^2, \qquad
        C_{ij} = \frac1N \sum_b \hat z_{1bi} \hat z_{2bj}, \qquad
        \hat z_{bi} = \frac{z_{bi} - \mu_i}{\sqrt{\sigma_i^2 + \epsilon}}

    with the batch's mean and biased variance.

    Parameters
    ----------
    z1, z2 : Tensor [N, D], float32, bfloat16, float16 or float64
        Projections of two views; over all processes at least 2 samples.
    lambd : float >= 0
        :math:`\lambda`; 0.0051 in the authors' code, 0.005 in the paper.
    eps : float >= 0
        :math:`\epsilon`, that of the batch norm in the authors' code.
    reduce : callable, optional
        Sums a tensor over all processes, differentiably: `GroupSum`. The loss is then that of the whole batch on each
        process, and the averaged gradients are its gradients.

    Returns
    -------
    Tensor
        0-d, float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    The authors' code lets each process normalise by its own moments (unless its batch norm is made synchronous).

    References
    ----------
    Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, ICML 2021, arXiv:2103.03230.
    """
    op = "barlow_twins_loss"
    check_rows(op, 0 if reduce else 2, _VARIANCE, z1=z1, z2=z2)
    check_not_negative(op, lambd=lambd, eps=eps)
    reduce = reduce or alone
    with no_autocast(z1.device):
        a, b = wide(z1), wide(z2)
        number = count(op, a.shape[0], reduce, a, _VARIANCE)
        mean = reduce(torch.stack([a.sum(0), b.sum(0)])) / number
        a, b = a - mean[0], b - mean[1]
        variance = reduce(torch.stack([(a * a).sum(0), (b * b).sum(0)])) / number
        scale = (variance + eps).rsqrt()
        c = reduce((a * scale[0]).T @ (b * scale[1])) / number
        return (1 - c.diagonal()).square().sum() + lambd * _off_diagonal(c).square().sum()


def _off_diagonal(c: Tensor) -> Tensor:
    """[..., D, D] without the diagonal, [..., D - 1, D]: without the last entry, every (D + 1)-th is on it."""
    n = c.shape[-1]
    return c.flatten(-2)[..., :-1].unflatten(-1, (n - 1, n + 1))[..., 1:]


class VICRegTerms(NamedTuple):
    """What `vicreg_loss` returns: all 0-d. The terms are not weighted."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def vicreg_loss(
    z1: Tensor, z2: Tensor, *, invariance_weight: float = 25.0, variance_weight: float = 25.0,
    covariance_weight: float = 1.0, gamma: float = 1.0, eps: float = 1e-4, reduce: Reduce | None = None,
) -> VICRegTerms:  # fmt: skip
    r"""The loss of VICReg: views agree, no feature is constant, no two features covary.

    .. math:: L = \lambda \, s(Z, Z') + \mu \, \tfrac12 (v(Z) + v(Z')) + \nu \, (c(Z) + c(Z'))

        s = \frac{1}{N D} \sum_b \|z_b - z'_b\|^2, \quad
        v = \frac1D \sum_j \max\left(0, \gamma - \sqrt{\mathrm{Var}(z_j) + \epsilon}\right), \quad
        c = \frac1D \sum_{i \ne j} \mathrm{Cov}(z)_{ij}^2

    with variance and covariance divided by N - 1.

    Parameters
    ----------
    z1, z2 : Tensor [N, D], float32, bfloat16, float16 or float64
        Projections of two views; over all processes at least 2 samples.
    invariance_weight, variance_weight, covariance_weight : float >= 0
        :math:`\lambda, \mu, \nu`.
    gamma : float >= 0
        The deviation that each feature shall have.
    eps : float >= 0
        :math:`\epsilon`.
    reduce : callable, optional
        As for `barlow_twins_loss`.

    Returns
    -------
    VICRegTerms
        (loss, invariance, variance, covariance), float32 (float64 for float64): `variance` is the mean of both views,
        `covariance` the sum, as in the loss.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    This is the loss of the authors' code, for which the default weights are meant. The paper prints :math:`v + v'`
    without the half, and s without the 1 / D.

    References
    ----------
    Bardes, Ponce and LeCun, VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning, ICLR
    2022, arXiv:2105.04906, equations 1 to 6.
    """
    op = "vicreg_loss"
    check_rows(op, 0 if reduce else 2, _VARIANCE, z1=z1, z2=z2)
    check_not_negative(
        op, invariance_weight=invariance_weight, variance_weight=variance_weight, covariance_weight=covariance_weight,
        gamma=gamma, eps=eps,
    )  # fmt: skip
    reduce = reduce or alone
    with no_autocast(z1.device):
        a, b = wide(z1), wide(z2)
        features = a.shape[1]
        number = count(op, a.shape[0], reduce, a, _VARIANCE)
        invariance = reduce((a - b).square().sum()) / (number * features)
        mean = reduce(torch.stack([a.sum(0), b.sum(0)])) / number
        products = [z.T @ z for z in (a - mean[0], b - mean[1])]
        covariances = reduce(torch.stack(products)) / (number - 1)
        of_each = covariances.diagonal(dim1=1, dim2=2)
        variance = 0.5 * (gamma - (of_each + eps).sqrt()).clamp(min=0).sum() / features
        covariance = _off_diagonal(covariances).square().sum() / features
        loss = invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    return VICRegTerms(loss, invariance, variance, covariance)
