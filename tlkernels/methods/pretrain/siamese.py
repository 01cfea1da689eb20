r"""BYOL and SimSiam: predict one view's projection from the other's, with no gradient into the target.

.. math:: \cos(p, z) = \frac{p}{\|p\|} \cdot \frac{z}{\|z\|}
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from tlkernels.methods._common import wide
from tlkernels.methods.pretrain._common import check_rows

__all__ = ["byol_loss", "negative_cosine_similarity", "simsiam_loss"]


def negative_cosine_similarity(p: Tensor, z: Tensor) -> Tensor:
    r"""The mean of :math:`-\cos(p_i, z_i)`, with z held constant.

    Parameters
    ----------
    p : Tensor [N, D], float32, bfloat16, float16 or float64
        Predictions, N >= 1.
    z : Tensor [N, D] of p's dtype
        Targets; detached here.

    Returns
    -------
    Tensor
        0-d, float32 (float64 for float64). A row of zeros counts as cosine 0.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.
    """
    return _negative_cosine("negative_cosine_similarity", p=p, z=z)


def _negative_cosine(op: str, **pair: Tensor) -> Tensor:
    check_rows(op, 1, "the loss is a mean over rows", **pair)
    p, z = pair.values()
    return -(F.normalize(wide(p), dim=1) * F.normalize(wide(z.detach()), dim=1)).sum(1).mean()


def byol_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    r"""The loss of BYOL: squared distances of unit vectors, symmetric.

    .. math:: L = \frac1N \sum_i \left( 2 - 2 \cos(p_{1i}, \mathrm{sg}[z_{2i}]) \right)
        + \left( 2 - 2 \cos(p_{2i}, \mathrm{sg}[z_{1i}]) \right)

    Parameters
    ----------
    p1, p2 : Tensor [N, D], float32, bfloat16, float16 or float64
        The online network's predictions from two views, N >= 1.
    z1, z2 : Tensor [N, D] of that dtype
        The target network's projections of the same views (`MomentumEncoder`); detached here.

    Returns
    -------
    Tensor
        0-d, between 0 and 8.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Grill et al., Bootstrap Your Own Latent, NeurIPS 2020, arXiv:2006.07733, equation 2.
    """
    op = "byol_loss"
    return 4 + 2 * (_negative_cosine(op, p1=p1, z2=z2) + _negative_cosine(op, p2=p2, z1=z1))


def simsiam_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    r"""The loss of SimSiam: negative cosines with stopped gradients, symmetric.

    .. math:: L = -\frac{1}{2 N} \sum_i \cos(p_{1i}, \mathrm{sg}[z_{2i}]) + \cos(p_{2i}, \mathrm{sg}[z_{1i}])

    Parameters
    ----------
    p1, p2 : Tensor [N, D], float32, bfloat16, float16 or float64
        Predictions from two views, N >= 1.
    z1, z2 : Tensor [N, D] of that dtype
        Projections of the same views by the same network; detached here: without that the network collapses.

    Returns
    -------
    Tensor
        0-d, between -1 and 1.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Chen and He, Exploring Simple Siamese Representation Learning, CVPR 2021, arXiv:2011.10566, equation 4.
    """
    op = "simsiam_loss"
    return (_negative_cosine(op, p1=p1, z2=z2) + _negative_cosine(op, p2=p2, z1=z1)) / 2
