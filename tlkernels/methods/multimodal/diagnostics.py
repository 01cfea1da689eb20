r"""How the features of two modalities lie on the sphere: the gap between them, alignment and uniformity.

Uniformity is a mean over all pairs of a batch. It is a log-sum-exp of similarities, so `tlkernels.ops.sim_lse` computes
it, and its gradient, without the matrix of distances.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels import ops
from tlkernels.methods._common import check_float, check_tensor, normalized, wide
from tlkernels.methods.multimodal._checks import check_pairs

__all__ = [
    "ModalityGap",
    "alignment",
    "alignment_uniformity_loss",
    "mean_cosine",
    "modality_gap",
    "shift_modality_gap",
    "uniformity",
]


class ModalityGap(NamedTuple):
    """What `modality_gap` returns; float32, or float64 for float64."""

    #: [D], the mean of x less the mean of y
    vector: Tensor
    #: 0-d, its length
    distance: Tensor


def _wide(op: str, name: str, x: Tensor, normalize: bool, least: int = 1) -> Tensor:
    """The features in float32 at least, of length 1 if asked for."""
    check_float(op, **{name: x})
    if x.dim() != 2 or x.shape[0] < least:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)}; expected (rows, features) with {least} rows or more"
        )
    return normalized(wide(x)) if normalize else wide(x)


def modality_gap(x: Tensor, y: Tensor, *, normalize: bool = True) -> ModalityGap:
    r"""The gap between the features of two modalities: the difference of their means.

    Parameters
    ----------
    x : Tensor
        ``[N, D]``, float32, bfloat16, float16 or float64.
    y : Tensor
        ``[M, D]``.
    normalize : bool
        To length 1 first.

    Returns
    -------
    ModalityGap
        (vector, distance), differentiable.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit, or one has no rows.

    Notes
    -----
    .. math:: \Delta = \frac1N \sum_i x_i - \frac1M \sum_j y_j, \qquad \|\Delta\|

    Whether a classifier can tell the modalities apart is `tlkernels.methods.fundamentals.proxy_a_distance`.

    References
    ----------
    Liang et al., Mind the Gap, NeurIPS 2022, arXiv:2203.02053.
    """
    op = "modality_gap"
    x, y = _wide(op, "x", x, normalize), _wide(op, "y", y, normalize)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{op}: y has shape {tuple(y.shape)}; expected (rows, {x.shape[1]}), like x")
    vector = x.mean(0) - y.mean(0)
    return ModalityGap(vector, torch.linalg.vector_norm(vector))


def shift_modality_gap(x: Tensor, y: Tensor, shift: float, *, gap: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Move two modalities towards each other along their gap, or apart, and back to the sphere.

    Parameters
    ----------
    x, y : Tensor
        ``[N, D]`` and ``[M, D]``; they are normalized first.
    shift : float
        :math:`\lambda`: 0.5 would close the gap but for the normalization; below 0 it widens.
    gap : Tensor, optional
        ``[D]``; by default that of x and y. Give that of a training set to shift single examples.

    Returns
    -------
    tuple of Tensor
        float32 (float64 for float64), rows of length 1.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit.

    Notes
    -----
    .. math:: x_i' = \frac{x_i - \lambda \Delta}{\|x_i - \lambda \Delta\|}, \qquad
        y_i' = \frac{y_i + \lambda \Delta}{\|y_i + \lambda \Delta\|}

    References
    ----------
    Liang et al., Mind the Gap, NeurIPS 2022, arXiv:2203.02053.
    """
    op = "shift_modality_gap"
    x, y = _wide(op, "x", x, True), _wide(op, "y", y, True)
    if gap is None:
        gap = modality_gap(x, y, normalize=False).vector
    check_tensor(op, gap=gap)
    if tuple(gap.shape) != (x.shape[1],):
        raise ValueError(f"{op}: gap has shape {tuple(gap.shape)}; expected ({x.shape[1]},)")
    return normalized(x - shift * gap), normalized(y + shift * gap)


def mean_cosine(x: Tensor) -> Tensor:
    r"""The mean cosine similarity of all pairs of different rows: how narrow a cone the features fill.

    Parameters
    ----------
    x : Tensor
        ``[N, D]``, N >= 2, float32, bfloat16, float16 or float64.

    Returns
    -------
    Tensor
        0-d, float32 (float64 for float64), differentiable: near 0 for features in all directions, 1 for one direction.

    Raises
    ------
    TypeError, ValueError
        If the dtype or the shape does not fit.

    Notes
    -----
    .. math:: \frac{1}{N (N - 1)} \sum_{i \ne j} \hat x_i \cdot \hat x_j
        = \frac{\| \sum_i \hat x_i \|^2 - \sum_i \|\hat x_i\|^2}{N (N - 1)}

    References
    ----------
    Liang et al., Mind the Gap, NeurIPS 2022, arXiv:2203.02053, section 2 (the cone effect).
    """
    x = _wide("mean_cosine", "x", x, True, least=2)
    count = x.shape[0]
    return (x.sum(0).square().sum() - x.square().sum()) / (count * (count - 1))


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0, normalize: bool = True) -> Tensor:
    r"""Alignment: how far the two features of a pair are from each other.

    Parameters
    ----------
    x, y : Tensor
        ``[N, D]`` of one dtype, float32, bfloat16, float16 or float64; row i of both is a pair.
    alpha : float
        Power of the distance, > 0.
    normalize : bool
        To length 1 first.

    Returns
    -------
    Tensor
        0-d, float32 (float64 for float64), differentiable.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit, there are no rows, or `alpha` is not above 0.

    Notes
    -----
    .. math:: \frac1N \sum_i \|x_i - y_i\|^\alpha

    References
    ----------
    Wang and Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere, ICML 2020, arXiv:2005.10242.
    """
    op = "alignment"
    check_pairs(op, x=x, y=y)
    if not alpha > 0:
        raise ValueError(f"{op}: alpha is {alpha}; expected > 0")
    difference = _wide(op, "x", x, normalize) - _wide(op, "y", y, normalize)
    if alpha == 2.0:
        return difference.square().sum(1).mean()
    return torch.linalg.vector_norm(difference, dim=1).pow(alpha).mean()


def uniformity(x: Tensor, *, t: float = 2.0, normalize: bool = True) -> Tensor:
    r"""Uniformity: the logarithm of the mean Gaussian potential over all pairs of rows.

    Parameters
    ----------
    x : Tensor
        ``[N, D]``, N >= 2, float32, bfloat16, float16 or float64.
    t : float
        > 0; the paper's is 2.
    normalize : bool
        To length 1 first. Without it distances are those of the rows as they are, at a rounding error that grows with
        their squared lengths.

    Returns
    -------
    Tensor
        0-d, float32 (float64 for float64); at most 0, the lower the more uniform. Differentiable once.

    Raises
    ------
    TypeError, ValueError
        If the dtype or the shape does not fit, or `t` is not above 0.

    Notes
    -----
    .. math:: \log \frac{2}{N (N - 1)} \sum_{i < j} e^{-t \|x_i - x_j\|^2}

    For rows of length 1, :math:`-t \|x_i - x_j\|^2 = 2 t \, x_i \cdot x_j - 2 t`: it is `tlkernels.ops.sim_lse` of x
    with itself, with memory O(N) beside x.

    References
    ----------
    Wang and Isola, ICML 2020, arXiv:2005.10242.
    """
    op = "uniformity"
    if not 0 < t < math.inf:
        raise ValueError(f"{op}: t is {t}; expected > 0")
    x = _wide(op, "x", x, normalize, least=2)
    count = x.shape[0]
    itself = torch.arange(count, device=x.device)
    if normalize:
        rows, offset = ops.sim_lse(x, None, 2.0 * t, exclude=itself).row, 2.0 * t
    else:
        # [x, -|x|^2 / 2, 1] . [y, 1, -|y|^2 / 2] = -|x - y|^2 / 2
        half, ones = -0.5 * x.square().sum(1, keepdim=True), x.new_ones(count, 1)
        left, right = torch.cat([x, half, ones], 1), torch.cat([x, ones, half], 1)
        rows, offset = ops.sim_lse(left, right, 2.0 * t, exclude=itself, cols=False).row, 0.0
    return torch.logsumexp(rows, 0) - offset - math.log(count * (count - 1))


def alignment_uniformity_loss(
    x: Tensor, y: Tensor, *, alpha: float = 2.0, t: float = 2.0, weight: float = 1.0
) -> Tensor:  # fmt: skip
    r"""Alignment of the pairs and uniformity of both sides, as a loss.

    Parameters
    ----------
    x, y : Tensor
        ``[N, D]`` of one dtype, N >= 2; normalized here.
    alpha, t : float
        As for `alignment` and `uniformity`.
    weight : float
        :math:`\lambda`, of the uniformity.

    Returns
    -------
    Tensor
        0-d, float32 (float64 for float64). Differentiable once.

    Raises
    ------
    TypeError, ValueError
        As `alignment` and `uniformity`.

    Notes
    -----
    .. math:: L = L_{\text{align}}(x, y) + \lambda \, \frac{L_{\text{uniform}}(x) + L_{\text{uniform}}(y)}{2}

    References
    ----------
    Wang and Isola, ICML 2020, arXiv:2005.10242.
    """
    aligned = alignment(x, y, alpha=alpha)
    return aligned + weight * (uniformity(x, t=t) + uniformity(y, t=t)) / 2
