r"""FILIP: similarity of an image and a text as the mean over tokens of the best match among the other's tokens.

.. math::
    s^{xy}_{ij} = \frac{1}{|P_i|} \sum_{p \in P_i} \max_{t \in T_j} x_{ip} \cdot y_{jt}, \qquad
    s^{yx}_{ij} = \frac{1}{|T_j|} \sum_{t \in T_j} \max_{p \in P_i} x_{ip} \cdot y_{jt}

with :math:`P_i` and :math:`T_j` the tokens that are no padding. Both come from the same products, which are made block
by block, forward and backward: N x M similarities are kept, and never those of tokens, which are hundreds or thousands
times as many.

Lewei Yao et al. *FILIP: Fine-grained Interactive Language-Image Pre-Training.* ICLR 2022, arXiv:2111.07783.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tlkernels.methods._common import (
    accumulator,
    check_float,
    check_reduction,
    check_scalar,
    check_tensor,
    reduced,
)
from tlkernels.methods.multimodal._checks import check_pairs
from tlkernels.ops._common import name_of, no_autocast

__all__ = ["TokenSimilarities", "filip_loss", "token_similarities"]


class TokenSimilarities(NamedTuple):
    """What `token_similarities` returns; ``[N, M]`` each."""

    #: the mean over the tokens of x
    xy: Tensor
    #: the mean over the tokens of y
    yx: Tensor


def _blocks(x: Tensor, y: Tensor, limit: int) -> list[tuple[slice, slice]]:
    """Cuts of N and M so that a block has about `limit` products of tokens."""
    (n, p), (m, t) = x.shape[:2], y.shape[:2]
    columns = max(1, min(m, limit // (p * t)))
    rows = max(1, limit // (p * t * columns))
    return [(slice(i, i + rows), slice(j, j + columns)) for i in range(0, n, rows) for j in range(0, m, columns)]


def _products(x: Tensor, y: Tensor) -> Tensor:
    """[n, P, D] and [m, T, D] -> [n, P, m, T]."""
    z = x.flatten(0, 1) @ y.flatten(0, 1).T
    return z.view(*x.shape[:2], *y.shape[:2])


def _weights(mask: Tensor | None, like: Tensor) -> Tensor:
    """The weight of each token in the mean: [N, P]."""
    if mask is None:
        return like.new_full(like.shape[:2], 1.0 / like.shape[1])
    return mask.to(like.dtype) / mask.sum(1, keepdim=True).clamp(min=1)


class _TokenSimilarities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, limit: int
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(x, y, x_mask, y_mask)
        ctx.limit = limit
        ctx.set_materialize_grads(False)
        acc = accumulator(x.dtype)
        x, y = x.to(acc), y.to(acc)
        wx, wy = _weights(x_mask, x), _weights(y_mask, y)
        xy = x.new_empty(x.shape[0], y.shape[0])
        yx = torch.empty_like(xy)
        for i, j in _blocks(x, y, limit):
            z = _products(x[i], y[j])
            best = _hide(z, None, y_mask, j).amax(3)
            xy[i, j] = torch.einsum("npm,np->nm", best, wx[i])
            best = _hide(z, x_mask, None, i).amax(1)
            yx[i, j] = torch.einsum("nmt,mt->nm", best, wy[j])
        return xy, yx

    @staticmethod
    def backward(ctx: Any, grad_xy: Tensor | None, grad_yx: Tensor | None) -> tuple[Any, ...]:
        x, y, x_mask, y_mask = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[:2]
        with no_autocast(x.device):
            grad_x, grad_y = _token_gradients(x, y, x_mask, y_mask, ctx.limit, grad_xy, grad_yx, need_x, need_y)
        return grad_x, grad_y, None, None, None


def _token_gradients(
    x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, limit: int, grad_xy: Tensor | None,
    grad_yx: Tensor | None, need_x: bool, need_y: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    dtype, acc = x.dtype, accumulator(x.dtype)
    x, y = x.to(acc), y.to(acc)
    wx, wy = _weights(x_mask, x), _weights(y_mask, y)
    grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
    for i, j in _blocks(x, y, limit):
        z = _products(x[i], y[j])
        # what each product of tokens weighs: at the maxima, and else nothing
        g = torch.zeros_like(z)
        if grad_xy is not None:
            at = _hide(z, None, y_mask, j).max(3, keepdim=True).indices  # on the CPU faster than argmax
            g.scatter_(3, at, (wx[i][:, :, None] * grad_xy[i, j][:, None])[..., None])
        if grad_yx is not None:
            at = _hide(z, x_mask, None, i).max(1, keepdim=True).indices
            g += torch.zeros_like(z).scatter_(1, at, (wy[j] * grad_yx[i, j][..., None])[:, None])
        g = g.view(z.shape[0] * z.shape[1], -1)
        if need_x:
            grad_x[i] += (g @ y[j].flatten(0, 1)).view_as(grad_x[i])
        if need_y:
            grad_y[j] += (g.T @ x[i].flatten(0, 1)).view_as(grad_y[j])
    return grad_x.to(dtype) if need_x else None, grad_y.to(dtype) if need_y else None


def _hide(z: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, which: slice) -> Tensor:
    if x_mask is not None:
        return z.masked_fill(~x_mask[which][:, :, None, None], -torch.inf)
    return z if y_mask is None else z.masked_fill(~y_mask[which], -torch.inf)


def token_similarities(
    x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None, *, block_size: int = 2**22
) -> TokenSimilarities:  # fmt: skip
    r"""The token-wise similarities of all pairs, in both directions.

    .. math::
        s^{xy}_{ij} = \operatorname{mean}_p \max_t x_{ip} \cdot y_{jt}, \qquad
        s^{yx}_{ij} = \operatorname{mean}_t \max_p x_{ip} \cdot y_{jt}

    Parameters
    ----------
    x : Tensor [N, P, D], float32, bfloat16, float16 or float64
        Embeddings of the tokens of N images; of length 1 in the paper.
    y : Tensor [M, T, D] of x's dtype
        Of M texts. With T = 1, ``yx`` is the similarity of BLIP-2, the best of an image's queries.
    x_mask, y_mask : bool Tensor [N, P] and [M, T], optional
        True for tokens that count; at least one in each row.
    block_size : int
        About how many products of tokens are made at a time.

    Returns
    -------
    TokenSimilarities
        ``[N, M]`` each, float32 (float64 for float64), differentiable with respect to x and y. Where a maximum is
        reached twice, the gradient goes to the first.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Yao et al., FILIP, ICLR 2022, arXiv:2111.07783, section 3.1.
    """
    op = "token_similarities"
    check_float(op, x=x, y=y)
    if x.dim() != 3 or not x.shape[1]:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (N, P, D) with P >= 1")
    if y.dtype != x.dtype:
        raise TypeError(f"{op}: y has dtype {name_of(y.dtype)}; expected {name_of(x.dtype)}, like x")
    if y.dim() != 3 or y.shape[2] != x.shape[2] or not y.shape[1]:
        raise ValueError(f"{op}: y has shape {tuple(y.shape)}; expected (M, T, {x.shape[2]}) with T >= 1")
    if block_size < 1:
        raise ValueError(f"{op}: block_size is {block_size}; expected >= 1")
    for name, mask, tokens in (("x_mask", x_mask, x), ("y_mask", y_mask, y)):
        if mask is None:
            continue
        check_tensor(op, **{name: mask})
        if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"{op}: {name} has dtype {name_of(mask.dtype)} and shape {tuple(mask.shape)}; expected bool "
                f"{tuple(tokens.shape[:2])}"
            )
        if mask.device.type == "cpu" and not bool(mask.any(1).all()):
            row = int((~mask.any(1)).nonzero()[0])
            raise ValueError(f"{op}: {name} has no token in row {row}; expected at least one")
    with no_autocast(x.device):
        xy, yx = _TokenSimilarities.apply(x, y, x_mask, y_mask, block_size)
    return TokenSimilarities(xy, yx)


def filip_loss(
    x: Tensor, y: Tensor, logit_scale: float | Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None, *,
    label_smoothing: float = 0.0, reduction: str = "mean", block_size: int = 2**22,
) -> Tensor:  # fmt: skip
    r"""CLIP's loss with token-wise similarities: each direction with its own.

    .. math::
        \ell_i = -\frac12 \Big( \log \frac{e^{s \, s^{xy}_{ii}}}{\sum_j e^{s \, s^{xy}_{ij}}}
        + \log \frac{e^{s \, s^{yx}_{ii}}}{\sum_j e^{s \, s^{yx}_{ji}}} \Big)

    Parameters
    ----------
    x : Tensor [N, P, D]
        Embeddings of length 1 of the tokens of each image.
    y : Tensor [N, T, D] of x's dtype
        Of each text.
    logit_scale : float or Tensor of one element
        s.
    x_mask, y_mask, block_size
        As for `token_similarities`.
    label_smoothing : float in [0, 1]
    reduction : "mean", "sum" or "none"

    Returns
    -------
    Tensor
        0-d, or [N] with "none"; float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Yao et al., FILIP, ICLR 2022, arXiv:2111.07783, section 3.1.
    """
    op = "filip_loss"
    check_reduction(op, reduction)
    check_scalar(op, logit_scale=logit_scale)
    number, _ = check_pairs(op, 3, x=x, y=y)
    xy, yx = token_similarities(x, y, x_mask, y_mask, block_size=block_size)
    itself = torch.arange(number, device=x.device)
    scale = logit_scale.reshape(()) if isinstance(logit_scale, Tensor) else logit_scale
    losses = [
        functional.cross_entropy(scale * s, itself, label_smoothing=label_smoothing, reduction="none")
        for s in (xy, yx.T)
    ]
    return reduced(0.5 * (losses[0] + losses[1]), reduction)
