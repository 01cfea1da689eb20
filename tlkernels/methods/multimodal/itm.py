r"""Image-text matching: does this text describe this image, asked of a model that sees both, and on hard wrong pairs.

A batch of N pairs has N right ones. Wrong ones are drawn from the similarities that the contrastive loss has anyway: a
text for image i, and an image for text i, with

.. math:: P(j \mid i) = \frac{e^{z_{ij}} [j \ne i]}{\sum_{k \ne i} e^{z_{ik}}} ,

so that those are drawn most which are hardest to tell apart. The draw is that of the largest
:math:`z_{ij} - \log E_{ij}`, with E exponentially distributed, over blocks of rows: no N x N matrix, and no softmax
that may underflow.

Junnan Li et al. *Align before Fuse: Vision and Language Representation Learning with Momentum Distillation.* NeurIPS
2021, arXiv:2107.07651. Junnan Li et al. *BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders
and Large Language Models.* ICML 2023, arXiv:2301.12597.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlkernels.methods._common import (
    accumulator,
    check_float,
    check_reduction,
    check_scalar,
    check_tensor,
    reduced,
    wide,
)
from tlkernels.ops._common import name_of, no_autocast

__all__ = ["HardNegatives", "ImageTextMatchingHead", "hard_negatives", "itm_loss"]


class HardNegatives(NamedTuple):
    """What `hard_negatives` returns; int64 [N] each."""

    #: of each image the number of a text that is not its own
    texts: Tensor
    #: of each text the number of an image that is not its own
    images: Tensor

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The images and texts of a batch for matching, int64 [3 N] each; a pair matches where they are the same.

        First the right pairs, then a wrong image with each text, then a wrong text with each image.
        """
        itself = torch.arange(self.texts.shape[0], device=self.texts.device)
        return torch.cat([itself, self.images, itself]), torch.cat([itself, itself, self.texts])


@torch.no_grad()
def hard_negatives(
    x: Tensor, y: Tensor, logit_scale: float | Tensor = 1.0, *, groups: Tensor | None = None,
    generator: torch.Generator | None = None, block_size: int = 2**22,
) -> HardNegatives:  # fmt: skip
    r"""Draw a wrong text for each image, and a wrong image for each text, by the softmax of their similarities.

    Parameters
    ----------
    x : Tensor [N, D] or [N, Q, D], float32, bfloat16, float16 or float64
        Embeddings of images; with Q of them for each image, as of a `QFormer`, the most similar one counts.
    y : Tensor [N, D] of x's dtype
        Of texts; text i belongs to image i.
    logit_scale : float or Tensor of one element
        s in :math:`z_{ij} = s \, x_i \cdot y_j`.
    groups : integer Tensor [N], optional
        Pairs of one group are no negatives of each other, e.g. several texts of one image. By default each is a group.
    generator : torch.Generator, optional
        On x's device.
    block_size : int
        About how many similarities are made at a time. On the CPU, a seed draws the same for all sizes of blocks.

    Returns
    -------
    HardNegatives

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated, a similarity is NaN, or a pair has nothing to be drawn.

    References
    ----------
    Li et al., ALBEF, NeurIPS 2021, arXiv:2107.07651, section 3.2.
    """
    op = "hard_negatives"
    check_float(op, x=x, y=y)
    check_scalar(op, logit_scale=logit_scale)
    if x.dim() not in (2, 3) or (x.dim() == 3 and not x.shape[1]):
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (N, D) or (N, Q, D)")
    if y.dtype != x.dtype:
        raise TypeError(f"{op}: y has dtype {name_of(y.dtype)}; expected {name_of(x.dtype)}, like x")
    number = x.shape[0]
    if y.shape != (number, x.shape[-1]):
        raise ValueError(f"{op}: y has shape {tuple(y.shape)}; expected {(number, x.shape[-1])}, like x")
    if groups is not None:
        check_tensor(op, groups=groups)
    if groups is not None and (groups.is_floating_point() or groups.shape != (number,)):
        raise ValueError(
            f"{op}: groups has dtype {name_of(groups.dtype)} and shape {tuple(groups.shape)}; expected int64 "
            f"({number},)"
        )
    if block_size < 1:
        raise ValueError(f"{op}: block_size is {block_size}; expected >= 1")
    group = torch.arange(number, device=x.device) if groups is None else groups
    acc = accumulator(x.dtype)
    scale = logit_scale.reshape(()) if isinstance(logit_scale, Tensor) else logit_scale
    best = torch.full((number,), -torch.inf, dtype=acc, device=x.device)
    images = torch.zeros(number, dtype=torch.int64, device=x.device)
    texts, tops = [images[:0]], [best[:0]]
    step = max(1, block_size // max(1, number * (x.shape[1] if x.dim() == 3 else 1)))
    with no_autocast(x.device):
        candidates = wide(y)
        for start in range(0, number, step):
            rows = wide(x[start : start + step])
            z = rows.flatten(0, -2) @ candidates.T
            z = (z.view(*rows.shape[:-1], number).amax(1) if x.dim() == 3 else z) * scale
            z = z.masked_fill(group[start : start + step, None] == group, -torch.inf)
            # one draw for both directions, row by row: then the numbers do not depend on the blocks
            noise = torch.empty(z.shape[0], 2, number, dtype=acc, device=x.device).exponential_(generator=generator)
            noise = noise.clamp_(min=torch.finfo(acc).tiny).log_()
            top, index = (z - noise[:, 0]).max(1)
            tops.append(top)
            texts.append(index)
            top, index = (z - noise[:, 1]).max(0)
            better = top > best
            best, images = torch.where(better, top, best), torch.where(better, index + start, images)
    # as a mask of groups is symmetric, an image has something to be drawn where its text has
    best_text = torch.cat(tops)
    if bool(best_text.isnan().any()):  # it is above nothing: the draw would fall on the pair itself
        row = int(best_text.isnan().nonzero()[0])
        raise ValueError(f"{op}: pair {row} has a similarity that is NaN; expected numbers")
    nothing = best_text == -torch.inf
    if bool(nothing.any()):
        row = int(nothing.nonzero()[0])
        raise ValueError(f"{op}: pair {row} has no negative among {number} pairs; expected one of another group")
    return HardNegatives(torch.cat(texts), images)


def itm_loss(logits: Tensor, matched: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""The cross-entropy of two classes, "does not match" and "matches".

    .. math:: \ell_i = -\log \operatorname{softmax}(z_i)_{m_i}

    Parameters
    ----------
    logits : Tensor [B, 2], floating point
        Column 1 is "matches".
    matched : bool Tensor [B]
        Whether the pair is a right one: :math:`m_i`.
    reduction : "mean", "sum" or "none"

    Returns
    -------
    Tensor
        0-d, or [B] with "none"; float32 (float64 for float64). Of no pairs it is 0.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Li et al., ALBEF, NeurIPS 2021, arXiv:2107.07651, section 3.2.
    """
    op = "itm_loss"
    check_float(op, logits=logits)
    check_tensor(op, matched=matched)
    check_reduction(op, reduction)
    if logits.dim() != 2 or logits.shape[1] != 2:
        raise ValueError(f"{op}: logits has shape {tuple(logits.shape)}; expected (B, 2)")
    if matched.dtype != torch.bool or matched.shape != logits.shape[:1]:
        raise ValueError(
            f"{op}: matched has dtype {name_of(matched.dtype)} and shape {tuple(matched.shape)}; expected bool "
            f"({logits.shape[0]},)"
        )
    return reduced(functional.cross_entropy(wide(logits), matched.long(), reduction="none"), reduction)


class ImageTextMatchingHead(nn.Module):
    """Two logits for a pair, from what a model that sees both makes of it.

    Parameters
    ----------
    hidden_size : int
        Features of each state; >= 1.

    Raises
    ------
    ValueError
        If `hidden_size` is not positive.

    References
    ----------
    Li et al., ALBEF, NeurIPS 2021, arXiv:2107.07651 (one state); Li et al., BLIP-2, ICML 2023, arXiv:2301.12597 (the
    mean over the queries).
    """

    def __init__(self, hidden_size: int) -> None:
        if hidden_size < 1:
            raise ValueError(f"ImageTextMatchingHead: hidden_size is {hidden_size}; expected >= 1")
        super().__init__()
        self.linear = nn.Linear(hidden_size, 2)

    def forward(self, states: Tensor) -> Tensor:
        """``[B, hidden_size]``, or ``[B, Q, hidden_size]``, whose Q logits are averaged, to ``[B, 2]``."""
        if states.dim() == 3:
            states = states.mean(1)  # before the layer, which is linear: the mean of logits, with less work
        return self.linear(states)
