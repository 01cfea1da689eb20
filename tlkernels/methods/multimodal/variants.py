r"""Losses around CLIP's: what CyCLIP, SLIP, DeCLIP, CoCa, ALBEF and VSE++ add to it, or put in its place.

=============================  ==================================================================  =================
`cyclip_loss`                  similarities agree across and within modalities                     Goel et al. 2022
`slip_loss`                    + SimCLR on two views of each image                                 Mu et al. 2022
`declip_loss`                  + self, multi-view and nearest-neighbour supervision                Li et al. 2022
`coca_loss`                    + cross-entropy of captions                                         Yu et al. 2022
`momentum_distillation_loss`   soft targets from slow encoders, queues of both modalities          Li et al. 2021
`vse_loss`                     hinge on the hardest negative of each image and text                Faghri et al. 2018
=============================  ==================================================================  =================

DCL and label smoothing are options of `ops.info_nce`, FILIP is in `tokenwise`. Embeddings are taken as they are:
normalized ones give cosine similarities. None of these losses stores an N x N matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tlkernels import ops
from tlkernels.methods._common import (
    accumulator,
    check_not_negative,
    check_reduction,
    check_tensor,
    normalized,
    reduced,
    wide,
)
from tlkernels.methods.multimodal._checks import check_pairs, mean_info_nce
from tlkernels.ops._common import name_of, no_autocast

__all__ = [
    "CaptioningLosses",
    "CyclicLosses",
    "MultiSupervisionLosses",
    "SelfSupervisedLosses",
    "coca_loss",
    "cyclic_consistency",
    "cyclip_loss",
    "declip_loss",
    "momentum_distillation_loss",
    "slip_loss",
    "vse_loss",
]

_BLOCK = 2**22  # similarities at a time where the hardest is looked for


# ---- CyCLIP ----------------------------------------------------------------------------------------------------------


class CyclicLosses(NamedTuple):
    """What `cyclip_loss` returns; 0-d each."""

    #: the weighted sum
    loss: Tensor
    contrastive: Tensor
    cross_modal: Tensor
    in_modal: Tensor


def cyclic_consistency(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""How far similarities are from being the same across the modalities, and within each: CyCLIP's two terms.

    .. math::
        L_C = \frac1N \sum_{jk} (x_j \cdot y_k - x_k \cdot y_j)^2, \qquad
        L_I = \frac1N \sum_{jk} (x_j \cdot x_k - y_j \cdot y_k)^2

    Parameters
    ----------
    x, y : Tensor [N, D], float32, bfloat16, float16 or float64
        Row i of one belongs to row i of the other.

    Returns
    -------
    (cross_modal, in_modal) : tuple of Tensor
        0-d, float32 (float64 for float64). Of N = 0 they are 0.

    Raises
    ------
    TypeError, ValueError
        If x and y are not as stated.

    Notes
    -----
    With :math:`u = x - y`, :math:`v = x + y` and :math:`S = u v^T`, both are parts of one matrix,

    .. math::
        N L_C = \tfrac14 \lVert S - S^T \rVert_F^2, \qquad N L_I = \tfrac14 \lVert S + S^T \rVert_F^2,

    and from traces of products, with D x D matrices instead of N x N,

    .. math::
        \tfrac14 \lVert S \pm S^T \rVert_F^2 = \tfrac12 \big( \langle u^T u, v^T v \rangle
        \pm \langle u^T v, (u^T v)^T \rangle \big) .

    The smaller of the two forms is taken: memory is O(N D + min(N, D)^2). Both scale with u, which is small where the
    modalities agree: products of x and y themselves would cancel there.

    References
    ----------
    Shashank Goel, Hritik Bansal, Sumit Bhatia, Ryan Rossi, Vishwa Vinay, Aditya Grover. *CyCLIP: Cyclic Contrastive
    Language-Image Pretraining.* NeurIPS 2022, arXiv:2205.14459.
    """
    number, features = check_pairs("cyclic_consistency", x=x, y=y)
    with no_autocast(x.device):
        wide_x, wide_y = wide(x), wide(y)
        u, v = wide_x - wide_y, wide_x + wide_y
        if number <= features:
            s = u @ v.T
            cross, within = 0.25 * (s - s.T).square().sum(), 0.25 * (s + s.T).square().sum()
        else:
            both = 0.5 * ((u.T @ u) * (v.T @ v)).sum()
            c = u.T @ v
            skew = 0.5 * (c * c.T).sum()
            # one of the two may be far the smaller, and then below 0 by a rounding
            cross, within = (both - skew).clamp(min=0.0), (both + skew).clamp(min=0.0)
    return cross / max(number, 1), within / max(number, 1)


def cyclip_loss(
    x: Tensor, y: Tensor, logit_scale: float | Tensor, *, cross_weight: float = 0.25, in_weight: float = 0.25,
    **options: Any,
) -> CyclicLosses:  # fmt: skip
    r"""CLIP's loss and the two consistencies of similarities, which are not scaled.

    .. math:: L = L_\mathrm{CLIP} + \lambda_1 L_I + \lambda_2 L_C

    Parameters
    ----------
    x, y : Tensor [N, D]
        Embeddings of length 1.
    logit_scale : float or Tensor of one element
    cross_weight, in_weight : float
        :math:`\lambda_2` and :math:`\lambda_1`, >= 0.
    **options
        For `ops.info_nce`, whose result here is 0-d: not ``reduction="none"``.

    Returns
    -------
    CyclicLosses

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Goel et al., CyCLIP, NeurIPS 2022, arXiv:2205.14459.
    """
    check_not_negative("cyclip_loss", cross_weight=cross_weight, in_weight=in_weight)
    cross, within = cyclic_consistency(x, y)
    contrastive = mean_info_nce("cyclip_loss", x, y, logit_scale, options)
    return CyclicLosses(contrastive + in_weight * within + cross_weight * cross, contrastive, cross, within)


# ---- SLIP and DeCLIP -------------------------------------------------------------------------------------------------


class SelfSupervisedLosses(NamedTuple):
    """What `slip_loss` returns; 0-d each."""

    #: the weighted sum
    loss: Tensor
    contrastive: Tensor
    self_supervised: Tensor


def slip_loss(
    x: Tensor, y: Tensor, logit_scale: float | Tensor, view: Tensor, view_other: Tensor, *, weight: float = 1.0,
    temperature: float = 0.1, **options: Any,
) -> SelfSupervisedLosses:  # fmt: skip
    r"""CLIP's loss and SimCLR's, on two further views of the images.

    .. math:: L = L_\mathrm{CLIP}(x, y) + \lambda \, L_\mathrm{NT-Xent}(v, v')

    Parameters
    ----------
    x, y : Tensor [N, D]
        Embeddings of length 1 of images and texts.
    logit_scale : float or Tensor of one element
    view, view_other : Tensor [K, E]
        What SimCLR's head makes of two views of the images; normalized here.
    weight : float
        :math:`\lambda`, >= 0.
    temperature : float
        Of NT-Xent.
    **options
        For `ops.info_nce`, whose result here is 0-d: not ``reduction="none"``.

    Returns
    -------
    SelfSupervisedLosses

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Norman Mu, Alexander Kirillov, David Wagner, Saining Xie. *SLIP: Self-supervision meets Language-Image
    Pre-training.* ECCV 2022, arXiv:2112.12750.
    """
    op = "slip_loss"
    check_not_negative(op, weight=weight)
    check_pairs(op, view=view, view_other=view_other)
    contrastive = mean_info_nce(op, x, y, logit_scale, options)
    own = ops.nt_xent(normalized(view), normalized(view_other), temperature=temperature)
    return SelfSupervisedLosses(contrastive + weight * own, contrastive, own)


class MultiSupervisionLosses(NamedTuple):
    """What `declip_loss` returns; 0-d each, 0 for a part that is not given."""

    #: the weighted sum
    loss: Tensor
    contrastive: Tensor
    self_supervised: Tensor
    multi_view: Tensor
    nearest_neighbor: Tensor


def declip_loss(
    x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], logit_scale: float | Tensor, *,
    image_loss: Tensor | None = None, text_loss: Tensor | None = None, neighbors: Tensor | None = None,
    self_weight: float = 0.2, view_weight: float = 0.2, neighbor_weight: float = 0.2, **options: Any,
) -> MultiSupervisionLosses:  # fmt: skip
    r"""DeCLIP: CLIP's loss, self-supervision within each modality, further pairs of views, and a neighbour's text.

    .. math::
        L = (1 - \alpha - \beta - \gamma) \, L_\mathrm{CLIP}(x, y) + \alpha \, (L_\mathrm{image} + L_\mathrm{text})
        + \frac\beta3 \big( L_\mathrm{CLIP}(x', y) + L_\mathrm{CLIP}(x, y') + L_\mathrm{CLIP}(x', y') \big)
        + \frac\gamma2 \big( L_\mathrm{CLIP}(x, n) + L_\mathrm{CLIP}(x', n) \big)

    Parameters
    ----------
    x : pair of Tensor [N, D]
        Embeddings of length 1 of two views of the images, x and x'.
    y : pair of Tensor [N, D]
        Of two views of the texts.
    logit_scale : float or Tensor of one element
    image_loss : Tensor, optional
        0-d, the self-supervised loss of the images: `pretrain.simsiam_loss` in the paper.
    text_loss : Tensor, optional
        0-d, that of the texts: masked language modelling in the paper.
    neighbors : Tensor [N, D], optional
        n: of each text the nearest of a queue of texts, `nearest_neighbors` among those of a
        `PairQueue`.
    self_weight, view_weight, neighbor_weight : float
        :math:`\alpha, \beta, \gamma`; >= 0, with a sum of at most 1.
    **options
        For `ops.info_nce`, whose result here is 0-d: not ``reduction="none"``.

    Returns
    -------
    MultiSupervisionLosses

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    The weight of CLIP's loss does not depend on which parts are given. The paper does not say whether the losses of
    the further pairs are added; here each weight is that of a mean.

    References
    ----------
    Yangguang Li et al. *Supervision Exists Everywhere: A Data Efficient Contrastive Language-Image Pre-training
    Paradigm.* ICLR 2022, arXiv:2110.05208, section 3.
    """
    op = "declip_loss"
    check_not_negative(op, self_weight=self_weight, view_weight=view_weight, neighbor_weight=neighbor_weight)
    rest = 1.0 - self_weight - view_weight - neighbor_weight
    if rest < -1e-9:
        raise ValueError(f"{op}: self_weight + view_weight + neighbor_weight is {1.0 - rest}; expected at most 1")
    for name, pair in (("x", x), ("y", y)):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{op}: {name} is a {type(pair).__name__}; expected a pair of tensors, two views")
    for name, part in (("image_loss", image_loss), ("text_loss", text_loss)):
        if part is not None:
            check_tensor(op, **{name: part})
            if part.dim():
                raise ValueError(f"{op}: {name} has shape {tuple(part.shape)}; expected 0-d, a mean")
    given = {"x[0]": x[0], "x[1]": x[1], "y[0]": y[0], "y[1]": y[1]}
    check_pairs(op, 2, **(given if neighbors is None else given | {"neighbors": neighbors}))

    def clip(image: Tensor, text: Tensor) -> Tensor:
        return mean_info_nce(op, image, text, logit_scale, options)

    contrastive = clip(x[0], y[0])
    zero = torch.zeros_like(contrastive)
    own = sum((part for part in (image_loss, text_loss) if part is not None), zero)
    views = (clip(x[1], y[0]) + clip(x[0], y[1]) + clip(x[1], y[1])) / 3 if view_weight else zero
    near = zero if neighbors is None else (clip(x[0], neighbors) + clip(x[1], neighbors)) / 2
    loss = max(rest, 0.0) * contrastive + self_weight * own + view_weight * views + neighbor_weight * near
    return MultiSupervisionLosses(loss, contrastive, own, views, near)


# ---- CoCa ------------------------------------------------------------------------------------------------------------


class CaptioningLosses(NamedTuple):
    """What `coca_loss` returns; 0-d each."""

    #: the weighted sum
    loss: Tensor
    contrastive: Tensor
    caption: Tensor


def coca_loss(
    x: Tensor, y: Tensor, logit_scale: float | Tensor, caption_logits: Tensor, caption_labels: Tensor, *,
    contrastive_weight: float = 1.0, caption_weight: float = 2.0, ignore_index: int = -100, **options: Any,
) -> CaptioningLosses:  # fmt: skip
    r"""CoCa: CLIP's loss and the cross-entropy of a caption's next tokens.

    .. math::
        L = \lambda_\mathrm{con} L_\mathrm{CLIP} - \lambda_\mathrm{cap} \operatorname{mean} \log p(t_i \mid t_{<i}, x)

    Parameters
    ----------
    x, y : Tensor [N, D]
        Embeddings of length 1.
    logit_scale : float or Tensor of one element
    caption_logits : Tensor [N, L, V]
        Of the decoder: position i predicts ``caption_labels[:, i]``, so the labels are one token ahead of its input.
    caption_labels : int64 Tensor [N, L]
    contrastive_weight, caption_weight : float
        >= 0.
    ignore_index : int
        The label of positions that do not count: padding. The mean is over all others of the batch, of none it is 0.
    **options
        For `ops.info_nce`, whose result here is 0-d: not ``reduction="none"``.

    Returns
    -------
    CaptioningLosses

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Jiahui Yu, Zirui Wang, Vijay Vasudevan, Legg Yeung, Mojtaba Seyedhosseini, Yonghui Wu. *CoCa: Contrastive
    Captioners are Image-Text Foundation Models.* TMLR 2022, arXiv:2205.01917.
    """
    op = "coca_loss"
    check_not_negative(op, contrastive_weight=contrastive_weight, caption_weight=caption_weight)
    check_tensor(op, caption_logits=caption_logits, caption_labels=caption_labels)
    if caption_logits.dim() != 3:
        raise ValueError(f"{op}: caption_logits has shape {tuple(caption_logits.shape)}; expected (N, L, V)")
    if caption_labels.dtype != torch.int64 or caption_labels.shape != caption_logits.shape[:2]:
        raise ValueError(
            f"{op}: caption_labels has dtype {name_of(caption_labels.dtype)} and shape {tuple(caption_labels.shape)}; "
            f"expected int64 {tuple(caption_logits.shape[:2])}"
        )
    contrastive = mean_info_nce(op, x, y, logit_scale, options)
    logits = wide(caption_logits).flatten(0, 1)
    labels = caption_labels.flatten()
    total = functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    caption = total / (labels != ignore_index).sum().clamp(min=1)
    return CaptioningLosses(contrastive_weight * contrastive + caption_weight * caption, contrastive, caption)


# ---- ALBEF -----------------------------------------------------------------------------------------------------------


def momentum_distillation_loss(
    x: Tensor, y: Tensor, x_momentum: Tensor, y_momentum: Tensor, logit_scale: float | Tensor, *,
    x_queue: Tensor | None = None, y_queue: Tensor | None = None, alpha: float = 0.4, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    r"""ALBEF's contrastive loss: against embeddings of slow encoders, with soft targets that these give.

    .. math::
        \ell_i = -\tfrac12 \sum_j \big( t^{xy}_{ij} \log p(y^m_j \mid x_i) + t^{yx}_{ij} \log p(x^m_j \mid y_i) \big),
        \qquad t^{xy}_{ij} = (1 - \alpha) [i = j] + \alpha \, p^m(y^m_j \mid x^m_i)

    where p is the softmax of :math:`s \, x_i \cdot y^m_j` over the batch's slow embeddings and those of the queue, and
    :math:`p^m` that of the slow embeddings among themselves.

    Parameters
    ----------
    x, y : Tensor [N, D]
        Embeddings of length 1 of images and texts.
    x_momentum, y_momentum : Tensor [N, D]
        The same of the slow encoders (`pretrain.MomentumEncoder`). They get no gradient.
    logit_scale : float or Tensor of one element
        s, the same for both softmaxes. Targets give it no gradient.
    x_queue, y_queue : Tensor [K, D], optional
        Slow embeddings of past batches (`PairQueue.negatives`). Both or neither.
    alpha : float in [0, 1]
        The weight of the soft targets; ALBEF lets it grow to 0.4 over the first epoch.
    reduction : "mean", "sum" or "none"

    Returns
    -------
    Tensor
        0-d, or [N] with "none"; float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    No softmax is stored: with :math:`r_i` the log-sum-exp of row i,

    .. math:: -\sum_j p^m_{ij} \log p_{ij} = r_i - s \, x_i \cdot \sum_j p^m_{ij} \, y^m_j ,

    and the last sum is attention with the slow embeddings as queries, keys and values. The paper writes the divergence
    from the soft targets; the cross-entropy here, as in the authors' code, is more by their entropy, which has no
    gradient.

    References
    ----------
    Junnan Li et al. *Align before Fuse: Vision and Language Representation Learning with Momentum Distillation.*
    NeurIPS 2021, arXiv:2107.07651, sections 3.2 and 3.3.
    """
    op = "momentum_distillation_loss"
    check_reduction(op, reduction)
    check_pairs(op, x=x, y=y, x_momentum=x_momentum, y_momentum=y_momentum)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"{op}: alpha is {alpha}; expected 0 <= alpha <= 1")
    if (x_queue is None) != (y_queue is None):
        raise ValueError(f"{op}: one of x_queue and y_queue is None; expected both or neither")
    pairs = []
    for name, slow, queue in (("x_queue", x_momentum, x_queue), ("y_queue", y_momentum, y_queue)):
        if queue is not None:
            check_tensor(op, **{name: queue})
        if queue is not None and (queue.dim() != 2 or queue.shape[1] != x.shape[1] or queue.dtype != x.dtype):
            raise ValueError(
                f"{op}: {name} has dtype {name_of(queue.dtype)} and shape {tuple(queue.shape)}; expected "
                f"{name_of(x.dtype)} (K, {x.shape[1]})"
            )
        pairs.append(slow.detach() if queue is None else torch.cat([slow, queue]).detach())
    xs, ys = pairs
    to_text = _distilled(x, x_momentum, ys, logit_scale, alpha)
    to_image = _distilled(y, y_momentum, xs, logit_scale, alpha)
    return reduced(0.5 * (to_text + to_image), reduction)


def _distilled(x: Tensor, slow: Tensor, candidates: Tensor, scale: float | Tensor, alpha: float) -> Tensor:
    itself = torch.arange(x.shape[0], device=x.device)
    lse, _, nll, _ = ops.sim_lse(x, candidates, scale, labels=itself, cols=False)
    if alpha == 0.0 or not x.shape[0]:
        return nll
    acc = accumulator(x.dtype)
    with no_autocast(x.device):
        fixed = scale.detach().reshape(()) if isinstance(scale, Tensor) else scale
        # with dimensions for batch and heads: kernels that do not store the softmax want them
        query, key = (slow.detach().to(acc) * fixed).to(acc)[None, None], candidates.to(acc)[None, None]
        expected = functional.scaled_dot_product_attention(query, key, key, scale=1.0)[0, 0]
        target = (x.to(acc) * expected).sum(1) * (scale.reshape(()) if isinstance(scale, Tensor) else scale)
    return (1.0 - alpha) * nll + alpha * (lse - target)


# ---- VSE++ -----------------------------------------------------------------------------------------------------------


def vse_loss(
    x: Tensor, y: Tensor, *, margin: float = 0.2, hardest: bool = True, reduction: str = "mean"
) -> Tensor:  # fmt: skip
    r"""The triplet loss of VSE++: each image and each text against its hardest negative in the batch.

    .. math::
        \ell_i = \max_{j \ne i} [m - x_i \cdot y_i + x_i \cdot y_j]_+
        + \max_{j \ne i} [m - x_i \cdot y_i + x_j \cdot y_i]_+

    Parameters
    ----------
    x, y : Tensor [N, D], float32, bfloat16, float16 or float64
        Embeddings; of length 1 in the paper.
    margin : float
        m, >= 0.
    hardest : bool
        Otherwise sums stand in place of both maxima, the loss that the paper starts from.
    reduction : "mean", "sum" or "none"
        The paper adds over the batch.

    Returns
    -------
    Tensor
        0-d, or [N] with "none"; float32 (float64 for float64). Of one pair, which has no negative, it is 0.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    The similarities are made in blocks of rows. With `hardest` the gradient is that of 2 N chosen pairs: O(N D). Else
    the backward pass makes the blocks again.

    References
    ----------
    Fartash Faghri, David J. Fleet, Jamie Ryan Kiros, Sanja Fidler. *VSE++: Improving Visual-Semantic Embeddings with
    Hard Negatives.* BMVC 2018, arXiv:1707.05612, section 3.2.
    """
    op = "vse_loss"
    check_reduction(op, reduction)
    check_not_negative(op, margin=margin)
    number, _ = check_pairs(op, x=x, y=y)
    with no_autocast(x.device):
        wide_x, wide_y = wide(x), wide(y)
        own = (wide_x * wide_y).sum(1)
        if number < 2:
            return reduced(0.0 * own, reduction)
        step = max(1, _BLOCK // number)
        if hardest:
            text, image = _hardest(wide_x.detach(), wide_y.detach(), step)
            to_text = functional.relu(margin - own + (wide_x * wide_y[text]).sum(1))
            to_image = functional.relu(margin - own + (wide_x[image] * wide_y).sum(1))
            return reduced(to_text + to_image, reduction)
        of_text, of_image = own.new_zeros(number), []
        for start in range(0, number, step):
            rows, columns = checkpoint(
                _hinges, wide_x[start : start + step], wide_y, own, margin, start, use_reentrant=False
            )
            of_image.append(rows)
            of_text = of_text + columns
        return reduced(torch.cat(of_image) + of_text, reduction)


@torch.no_grad()
def _hardest(x: Tensor, y: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Of each row of x the most similar other row of y, and of each row of y that of x."""
    number = x.shape[0]
    top = x.new_full((number,), -torch.inf)
    image = torch.zeros(number, dtype=torch.int64, device=x.device)
    text = []
    for start in range(0, number, step):
        z = x[start : start + step] @ y.T
        rows = torch.arange(z.shape[0], device=x.device)
        z[rows, rows + start] = -torch.inf
        text.append(z.argmax(1))
        value, index = z.max(0)
        better = value > top
        top, image = torch.where(better, value, top), torch.where(better, index + start, image)
    return torch.cat(text), image


def _hinges(x: Tensor, y: Tensor, own: Tensor, margin: float, start: int) -> tuple[Tensor, Tensor]:
    """The sums over rows and columns of a block of rows, which begins at `start`."""
    z = x @ y.T
    rows = torch.arange(z.shape[0], device=z.device)
    other = torch.ones_like(z).index_put((rows, rows + start), z.new_zeros(()))
    to_text = functional.relu(margin - own[start : start + z.shape[0], None] + z) * other
    to_image = functional.relu(margin - own + z) * other
    return to_text.sum(1), to_image.sum(0)
