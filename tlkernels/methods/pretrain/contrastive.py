r"""Losses that tell a sample's other view from other samples: SimCLR, DCL, MoCo v1 to v3, SupCon.

All are functions of log-sum-exps over similarities, which `tlkernels.ops.contrastive` computes without storing the
matrix. Features are normalised here, in float32, and rounded to their own dtype for the products; sums and losses are
float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlkernels import ops
from tlkernels.methods._common import check_float, check_reduction, check_tensor, normalized, reduced, wide
from tlkernels.methods.pretrain._common import check_positive, check_rows
from tlkernels.methods.pretrain.queue import FeatureQueue
from tlkernels.ops._common import name_of

__all__ = ["MoCoLoss", "dcl_loss", "moco_v3_loss", "simclr_loss", "supcon_loss"]


def simclr_loss(z1: Tensor, z2: Tensor, *, temperature: float | Tensor = 0.5, reduction: str = "mean") -> Tensor:
    r"""NT-Xent on normalised projections, the loss of SimCLR.

    .. math:: \ell_i = -\log \frac{e^{\cos(z_i, z_{p(i)}) / \tau}}{\sum_{k \ne i} e^{\cos(z_i, z_k) / \tau}}

    over all 2 N views i, with p(i) the other view of the same sample.

    Parameters
    ----------
    z1, z2 : Tensor [N, D], float32, bfloat16, float16 or float64
        Projections of two views, N >= 1; normalised here.
    temperature : float > 0, or Tensor of one element
    reduction : "mean", "sum" or "none"

    Returns
    -------
    Tensor
        0-d, or [2 N] with "none", first those of z1.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020, arXiv:2002.05709.
    """
    check_rows("simclr_loss", 1, "a view needs its other view", z1=z1, z2=z2)
    return ops.nt_xent(normalized(z1), normalized(z2), temperature=temperature, reduction=reduction)


def dcl_loss(
    z1: Tensor, z2: Tensor, *, temperature: float = 0.1, sigma: float | None = None, reduction: str = "mean"
) -> Tensor:  # fmt: skip
    r"""Decoupled contrastive loss: NT-Xent without the positive among those it is compared with.

    .. math:: \ell_i = -w_i \, \frac{\cos(z_i, z_{p(i)})}{\tau}
        + \log \sum_{k \notin \{i, p(i)\}} e^{\cos(z_i, z_k) / \tau}, \qquad
        w_i = 2 - \frac{e^{\cos(z_i, z_{p(i)}) / \sigma}}{\frac1N \sum_j e^{\cos(z_j, z_{p(j)}) / \sigma}}

    and w = 1 without `sigma`. The weights are constants for the gradient.

    Parameters
    ----------
    z1, z2 : Tensor [N, D], float32, bfloat16, float16 or float64
        Projections of two views, N >= 2; normalised here.
    temperature : float > 0
    sigma : float > 0, optional
        Weigh the positives by the negative von Mises-Fisher function (DCLW; 0.5 in the paper).
    reduction : "mean", "sum" or "none"

    Returns
    -------
    Tensor
        0-d, or [2 N] with "none", first those of z1. It may be negative.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated: of one sample there are no negatives.

    References
    ----------
    Yeh et al., Decoupled Contrastive Learning, ECCV 2022, arXiv:2110.06848, equations 5 to 7.
    """
    op = "dcl_loss"
    check_rows(op, 2, "of one sample there are no negatives", z1=z1, z2=z2)
    check_positive(op, temperature=temperature)
    if sigma is not None:
        check_positive(op, sigma=sigma)
    check_reduction(op, reduction)
    z1, z2 = normalized(z1), normalized(z2)
    itself = torch.arange(z1.shape[0], device=z1.device)
    across = ops.sim_lse(z1, z2, 1 / temperature, exclude=itself)
    within1 = ops.sim_lse(z1, None, 1 / temperature, exclude=itself).row
    within2 = ops.sim_lse(z2, None, 1 / temperature, exclude=itself).row
    positive = (wide(z1) * wide(z2)).sum(1)
    pull = positive / temperature
    if sigma is not None:
        pull = pull * (2 - len(itself) * torch.softmax(positive.detach() / sigma, 0))
    loss = torch.cat([ops.lse_merge(across.row, within1) - pull, ops.lse_merge(across.col, within2) - pull])
    return reduced(loss, reduction)


class MoCoLoss(nn.Module):
    r"""InfoNCE against a queue of earlier keys, the loss of MoCo v1 and v2.

    .. math:: \ell_i = -\log \frac{e^{\cos(q_i, k_i) / \tau}}
        {e^{\cos(q_i, k_i) / \tau} + \sum_{j=1}^{K} e^{q_i \cdot n_j / \tau}}

    with unit vectors n in the queue. In training mode the keys are enqueued after the loss is computed.

    Parameters
    ----------
    num_features : int
        D.
    queue_size : int
        K, not smaller than a batch.
    temperature : float > 0
        0.07 in MoCo v1, 0.2 in v2.
    in_batch_negatives : bool
        Also take the batch's other keys for negatives. Not in the paper; the queue can then be small.
    start, dtype, generator
        Of the `FeatureQueue`.

    Attributes
    ----------
    queue : FeatureQueue
        Its buffers are in the ``state_dict``.

    Raises
    ------
    ValueError
        If an argument is not as stated.

    Notes
    -----
    Keys come from a `MomentumEncoder`. The paper shuffles samples across processes before the key encoder, so that
    batch norm cannot tell which key is whose; on one process, or with layer norm, that has no effect.

    References
    ----------
    He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020, arXiv:1911.05722.
    Chen et al., Improved Baselines with Momentum Contrastive Learning, 2020, arXiv:2003.04297.

    Examples
    --------
    >>> import torch
    >>> loss_fn = MoCoLoss(8, queue_size=16)
    >>> q, k = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    >>> loss_fn(q, k).backward()
    >>> int(loss_fn.queue.written)
    4
    """

    def __init__(
        self, num_features: int = 128, queue_size: int = 65536, *, temperature: float = 0.07,
        in_batch_negatives: bool = False, start: Literal["random", "empty"] = "random",
        dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_positive("MoCoLoss", temperature=temperature)
        self.temperature, self.in_batch_negatives = temperature, in_batch_negatives
        self.queue = FeatureQueue(num_features, queue_size, start=start, dtype=dtype, generator=generator)

    def forward(
        self, q: Tensor, k: Tensor, *, enqueue: Tensor | None = None, reduction: Literal["mean", "sum", "none"] = "mean"
    ) -> Tensor:  # fmt: skip
        """Compute the loss; in training mode, enqueue the keys.

        Parameters
        ----------
        q : Tensor [N, D], float32, bfloat16, float16 or float64
            Queries, N >= 1; normalised here.
        k : Tensor [N, D] of q's dtype
            Keys, row by row the other views; normalised and detached here.
        enqueue : Tensor [M, D], optional
            The keys to enqueue instead, those of all processes; normalised here.
        reduction : "mean", "sum" or "none"

        Returns
        -------
        Tensor
            0-d, or [N] with "none".

        Raises
        ------
        TypeError, ValueError
            If an argument is not as stated, or has more rows than the queue; the queue is as it was then.
        """
        op = "MoCoLoss"
        check_rows(op, 1, "a query needs its key", q=q, k=k)
        check_reduction(op, reduction)
        following = k if enqueue is None else enqueue
        self.queue.check(following)
        q, k = normalized(q), normalized(k.detach())
        # a copy: the backward pass reads it, after the keys were written into the queue
        negatives = self.queue.features().to(q.dtype, copy=True)
        scale = 1 / self.temperature
        if self.in_batch_negatives:
            loss = ops.info_nce(q, k, scale, y_negatives=negatives, symmetric=False, reduction="none")
        else:
            positive = scale * (wide(q) * wide(k)).sum(1)
            loss = -F.logsigmoid(positive - ops.sim_lse(q, negatives, scale, cols=False).row)
        if self.training:
            self.queue.enqueue(normalized(following.detach()))
        return reduced(loss, reduction)


def moco_v3_loss(
    q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, *, temperature: float = 0.2, label_offset: int = 0
) -> Tensor:  # fmt: skip
    r"""The loss of MoCo v3: symmetric, negatives from the batch, no queue.

    .. math:: L = \mathrm{ctr}(q_1, k_2) + \mathrm{ctr}(q_2, k_1), \qquad
        \mathrm{ctr}(q, k) = -\frac{2 \tau}{N} \sum_i \log \frac{e^{\cos(q_i, k_i) / \tau}}
        {\sum_j e^{\cos(q_i, k_j) / \tau}}

    Parameters
    ----------
    q1, q2 : Tensor [N, D], float32, bfloat16, float16 or float64
        Predictions from two views, N >= 1; normalised here.
    k1, k2 : Tensor [M, D] of that dtype
        Projections of the same views by the momentum encoder, of all processes; normalised and detached here. M = N on
        one process.
    temperature : float > 0
        0.2 with vision transformers, 1.0 with ResNets.
    label_offset : int
        Where this process's rows begin among those of k1 and k2.

    Returns
    -------
    Tensor
        0-d.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Chen, Xie and He, An Empirical Study of Training Self-Supervised Vision Transformers, ICCV 2021, arXiv:2104.02057,
    algorithm 1.
    """
    op = "moco_v3_loss"
    check_rows(op, 1, "a query needs its key", q1=q1, q2=q2)
    check_rows(op, k1=k1, k2=k2)
    check_positive(op, temperature=temperature)
    if k1.dtype != q1.dtype or k1.shape[1] != q1.shape[1] or not 0 <= label_offset <= k1.shape[0] - q1.shape[0]:
        raise ValueError(
            f"{op}: k1 has dtype {name_of(k1.dtype)} and shape {tuple(k1.shape)}, label_offset is {label_offset}; "
            f"expected {name_of(q1.dtype)} (M, {q1.shape[1]}) with 0 <= label_offset <= M - {q1.shape[0]}"
        )
    first, second = (
        ops.info_nce(normalized(q), normalized(k.detach()), 1 / temperature, symmetric=False, label_offset=label_offset)
        for q, k in ((q1, k2), (q2, k1))
    )
    return 2 * temperature * (first + second)


def supcon_loss(
    features: Tensor, labels: Tensor | None = None, *, temperature: float = 0.07, base_temperature: float | None = None,
    contrast_mode: Literal["all", "one"] = "all",
) -> Tensor:  # fmt: skip
    r"""Supervised contrastive loss of several views of each sample.

    .. math:: \ell_i = -\frac{\tau}{\tau_0} \frac{1}{|P(i)|} \sum_{p \in P(i)}
        \log \frac{e^{\cos(z_i, z_p) / \tau}}{\sum_{a \ne i} e^{\cos(z_i, z_a) / \tau}}

    over all views i of all samples, with P(i) the other views of i's class. The mean is over views that have a
    positive.

    Parameters
    ----------
    features : Tensor [N, V, D], float32, bfloat16, float16 or float64
        Projections of V views; normalised here.
    labels : integer Tensor [N], optional
        Classes. Without them each sample is its own class: SimCLR with V views.
    temperature : float > 0
    base_temperature : float > 0, optional
        :math:`\tau_0`; by default the factor :math:`\tau / \tau_0` is left out, as if it were `temperature`.
    contrast_mode : "all" or "one"
        Whether all views are anchors, or the first alone (compared with all).

    Returns
    -------
    Tensor
        0-d; 0 if no view has a positive.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, arXiv:2004.11362, equation 2 (L_out).
    """
    op = "supcon_loss"
    check_float(op, features=features)
    if features.dim() != 3 or features.shape[1] < 1:
        raise ValueError(f"{op}: features has shape {tuple(features.shape)}; expected (N, V, D) with V >= 1")
    if contrast_mode not in ("all", "one"):
        raise ValueError(f"{op}: contrast_mode is {contrast_mode!r}; expected 'all' or 'one'")
    check_positive(op, temperature=temperature)
    if base_temperature is not None:
        check_positive(op, base_temperature=base_temperature)
    samples, views, _ = features.shape
    if labels is None:
        labels = torch.arange(samples, device=features.device)
    check_tensor(op, labels=labels)
    if labels.is_floating_point() or tuple(labels.shape) != (samples,):
        raise ValueError(
            f"{op}: labels has dtype {name_of(labels.dtype)} and shape {tuple(labels.shape)}; "
            f"expected integers ({samples},)"
        )
    z = normalized(features).transpose(0, 1).reshape(samples * views, -1)  # all first views, all second ones, ...
    classes = labels.repeat(views)
    if contrast_mode == "all":
        loss = ops.sup_con(z, classes, temperature=temperature)
    else:
        loss = ops.sup_con(z[:samples].contiguous(), labels, z, classes, temperature=temperature, ref_offset=0)
    return loss if base_temperature is None else loss * (temperature / base_temperature)
