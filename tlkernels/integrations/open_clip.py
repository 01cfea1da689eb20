r"""open_clip's losses under its names, for one process or many, without its N x N logits.

`create_loss` takes the arguments of open_clip's training script, as ``open_clip.create_loss`` does; the script runs
on these losses when it is started with

.. code-block:: python

    import sys

    import open_clip
    from tlkernels.integrations.open_clip import create_loss

    open_clip.create_loss = create_loss  # before the script imports it
    from open_clip_train.main import main

    main(sys.argv[1:])

Code of one's own imports `ClipLoss`, `SigLipLoss`, `CoCaLoss` or `DistillClipLoss` from here instead of
``open_clip.loss``. open_clip itself is not needed. In one process they are the losses of `tlkernels.nn`, in several
those of `tlkernels.distributed`; their docstrings say what differs from open_clip's.

Alec Radford et al. *Learning Transferable Visual Models From Natural Language Supervision.* ICML 2021 (CLIP).
Xiaohua Zhai et al. *Sigmoid Loss for Language Image Pre-Training.* ICCV 2023 (SigLIP).
Jiahui Yu et al. *CoCa: Contrastive Captioners are Image-Text Foundation Models.* TMLR 2022.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tlkernels import ops
from tlkernels.nn.contrastive import CLIPLoss, SigLIPLoss, _check_paired, _dots, _ready
from tlkernels.ops._common import check_device, no_autocast
from tlkernels.ops.contrastive import _acc, _as_scalar, _scalar

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss", "create_loss"]


def _check_processes(op: str, rank: int, world_size: int) -> None:
    """That `torch.distributed` says the same, which is what `tlkernels.distributed` goes by."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not initialized:
        raise RuntimeError(
            f"{op}: world_size is {world_size}, but torch.distributed is not initialized; "
            "call torch.distributed.init_process_group first"
        )
    found = (torch.distributed.get_rank(), torch.distributed.get_world_size())
    if found != (rank, world_size):
        raise ValueError(
            f"{op}: rank is {rank} and world_size {world_size}; expected {found[0]} and {found[1]}, "
            "as torch.distributed has them"
        )


class _ScaledGradient(torch.autograd.Function):
    """The tensor, and its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factor, None


def _scaled_gradient(features: Any, factor: float) -> Any:
    """What is no tensor is for the loss to refuse, which tells the other processes: raised here, they would wait."""
    return _ScaledGradient.apply(features, factor) if isinstance(features, Tensor) else features


class ClipLoss(nn.Module):
    r"""CLIP's loss, with the arguments of ``open_clip.loss.ClipLoss``.

    Parameters
    ----------
    local_loss : bool
        In several processes: return the mean over this process's pairs, not over all. Either way they are compared
        with the features of all processes.
    gather_with_grad : bool
        In several processes: features get gradients from the losses of all.
    cache_labels : bool
        Without effect: there are no labels to cache.
    rank, world_size : int
        As `torch.distributed` has them.
    use_horovod : bool
        False, unless `world_size` is 1.
    exchange : "gather" or "ring"
        In several processes: how features meet, see `tlkernels.distributed`. "ring" needs memory for two chunks only.

    Raises
    ------
    ValueError, RuntimeError
        If the arguments are not those of `torch.distributed`, or ask for Horovod.

    Notes
    -----
    Differences from the model in one process are those of `tlkernels.nn.CLIPLoss`. In several, gradients of features
    are the model's in three of its four modes:

    ============ ================== ===================================================================
    `local_loss` `gather_with_grad`
    ============ ================== ===================================================================
    any          True               the model's; after DDP's mean, the exact gradient of the whole loss
    False        False              the model's: 1 / `world_size` of that
    True         False              not the model's, which leaves out what this process's features do to the other
                                    processes' losses: with a warning, those of `gather_with_grad`
    ============ ================== ===================================================================

    The gradient of the logit scale is that of the whole loss on every process: the model's after DDP's mean.
    No process computes logits of pairs that another does: half as many as the model with `local_loss`, one in
    `world_size` without. Processes may bring batches of different sizes.
    """

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, cache_labels: bool = False, rank: int = 0,
        world_size: int = 1, use_horovod: bool = False, *, exchange: str = "gather",
    ) -> None:  # fmt: skip
        super().__init__()
        op = type(self).__name__
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod
        self.loss: nn.Module
        if world_size == 1:
            self.loss = CLIPLoss(rank=rank)
            return
        if use_horovod:
            raise ValueError(f"{op}: use_horovod is True in {world_size} processes; expected torch.distributed")
        _check_processes(op, rank, world_size)
        from tlkernels import distributed

        if local_loss and not gather_with_grad:
            warnings.warn(
                f"{op}: local_loss without gather_with_grad has no exact gradient; it is computed with it",
                stacklevel=2,
            )
        self.loss = distributed.CLIPLoss(local_loss=local_loss, exchange=exchange)

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Compute the loss of this process's features; arguments and result are those of `tlkernels.nn.CLIPLoss`."""
        if self.world_size == 1:
            _check_paired(type(self).__name__, image_features=image_features, text_features=text_features)
        elif not self.local_loss and not self.gather_with_grad:
            image_features, text_features = (
                _scaled_gradient(t, 1.0 / self.world_size) for t in (image_features, text_features)
            )
        return self.loss(image_features, text_features, logit_scale, logit_bias, output_dict=output_dict)


class SigLipLoss(nn.Module):
    r"""SigLIP's loss, with the arguments of ``open_clip.loss.SigLipLoss``.

    Parameters
    ----------
    cache_labels : bool
        Without effect: there are no labels to cache.
    rank, world_size : int
        As `torch.distributed` has them.
    dist_impl : "bidir", "shift", "reduce" or "gather", optional
        In several processes: how texts meet images. "bidir" (the default) and "shift" pass texts around,
        ``exchange="ring"`` of `tlkernels.distributed`; "reduce" and "gather" are ``exchange="gather"``.

    Raises
    ------
    ValueError, RuntimeError
        If the arguments are not those of `torch.distributed`, or `dist_impl` is none of these.

    Notes
    -----
    Differences from the model in one process are those of `tlkernels.nn.SigLIPLoss`. In several, each returns the loss
    of its own images, and gradients of features are the model's; those of the scale and the bias are the model's after
    DDP's mean, on every process. Processes may bring batches of different sizes.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        one = SigLIPLoss(cache_labels, dist_impl=dist_impl)
        self.cache_labels, self.rank, self.world_size, self.dist_impl = cache_labels, rank, world_size, one.dist_impl
        self.loss: nn.Module
        if world_size == 1:
            self.loss = one
            return
        _check_processes("SigLipLoss", rank, world_size)
        from tlkernels import distributed

        exchange = "ring" if one.dist_impl in ("bidir", "shift") else "gather"
        self.loss = distributed.SigLIPLoss(local_loss=True, exchange=exchange)

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Compute the loss of this process's features; arguments and result are those of `tlkernels.nn.SigLIPLoss`."""
        if self.world_size == 1:
            _check_paired("SigLipLoss", image_features=image_features, text_features=text_features)
        return self.loss(image_features, text_features, logit_scale, logit_bias, output_dict=output_dict)


class CoCaLoss(ClipLoss):
    r"""CLIP's loss and the cross-entropy of a caption, with the arguments of ``open_clip.loss.CoCaLoss``.

    Parameters
    ----------
    caption_loss_weight, clip_loss_weight : float
        With a `clip_loss_weight` of 0 that loss is the constant 0.
    pad_id : int
        The token that the caption's loss leaves out.
    local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, exchange
        See `ClipLoss`.

    Raises
    ------
    ValueError, RuntimeError
        As `ClipLoss`.

    Notes
    -----
    .. math:: L = w_{clip} L_{clip} + w_{caption} \, \mathrm{mean}_{t \ne pad}
        \left( \log \sum_v e^{u_{tv}} - u_{t, label_t} \right)

    The caption's loss is torch's, of this process's captions, as in the model.

    References
    ----------
    Yu 2022.
    """

    def __init__(
        self, caption_loss_weight: float, clip_loss_weight: float, pad_id: int = 0, local_loss: bool = False,
        gather_with_grad: bool = False, cache_labels: bool = False, rank: int = 0, world_size: int = 1,
        use_horovod: bool = False, *, exchange: str = "gather",
    ) -> None:  # fmt: skip
        super().__init__(
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, exchange=exchange
        )  # fmt: skip
        self.clip_loss_weight, self.caption_loss_weight = clip_loss_weight, caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self, image_features: Tensor, text_features: Tensor, logits: Tensor, labels: Tensor,
        logit_scale: float | Tensor, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Compute both losses.

        Parameters
        ----------
        image_features, text_features : Tensor [N, D]
        logits : Tensor [N, T, V]
            Of the caption's tokens.
        labels : int64 Tensor [N, T]
        logit_scale : float or Tensor of one element
        output_dict : bool
            Return ``{"contrastive_loss": ..., "caption_loss": ...}``.

        Returns
        -------
        tuple of Tensor, or dict
            (contrastive, caption), 0-d, each times its weight.

        Raises
        ------
        TypeError, ValueError
            Naming the argument.
        """
        if self.clip_loss_weight:
            clip_loss = self.clip_loss_weight * super().forward(image_features, text_features, logit_scale)
        else:
            clip_loss = torch.tensor(0, device=logits.device)
        caption_loss = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": clip_loss, "caption_loss": caption_loss}
        return clip_loss, caption_loss


class DistillClipLoss(nn.Module):
    r"""CLIP's loss, and the cross-entropy to a teacher's softmax, with the arguments of ``open_clip``'s.

    Parameters
    ----------
    local_loss, gather_with_grad, cache_labels, use_horovod : bool
        Without effect in one process.
    rank : int, 0
    world_size : int, 1
        Several processes are not supported: open_clip's own class has them.

    Raises
    ------
    ValueError
        If `world_size` is not 1, or `rank` not 0.

    Notes
    -----
    With p the teacher's probabilities, the cross-entropy to the softmax over each row,

    .. math:: - \sum_j p_{ij} \log \frac{e^{z_{ij}}}{\sum_k e^{z_{ik}}}
        = \log \sum_k e^{z_{ik}} - s \, x_i \cdot \sum_j p_{ij} y_j,

    needs of the teacher only the average of the student's texts under its attention, which
    `torch.nn.functional.scaled_dot_product_attention` computes: neither model's logits are stored where that has a
    fused kernel for the width. The mean of both directions, images and texts, is returned.

    Differences from the model: those of `tlkernels.nn.CLIPLoss`.

    References
    ----------
    Hinton 2015, *Distilling the Knowledge in a Neural Network*, with temperature 1.
    """

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, cache_labels: bool = False, rank: int = 0,
        world_size: int = 1, use_horovod: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if (rank, world_size) != (0, 1):
            raise ValueError(
                f"DistillClipLoss: rank is {rank} and world_size {world_size}; expected 0 and 1: in several processes "
                "use open_clip.loss.DistillClipLoss"
            )
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, dist_image_features: Tensor,
        dist_text_features: Tensor, dist_logit_scale: float | Tensor, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Compute both losses.

        Parameters
        ----------
        image_features, text_features : Tensor [N, D]
            The student's, float32, bfloat16, float16 or float64.
        logit_scale : float or Tensor of one element
        dist_image_features, dist_text_features : Tensor [N, E]
            The teacher's, which may be of another width and dtype.
        dist_logit_scale : float or Tensor of one element
        output_dict : bool
            Return ``{"contrastive_loss": ..., "distill_loss": ...}``.

        Returns
        -------
        tuple of Tensor, or dict
            (contrastive, distill), 0-d.

        Raises
        ------
        TypeError, ValueError
            Naming the argument.
        """
        op = "DistillClipLoss"
        _check_paired(op, image_features=image_features, text_features=text_features)
        _check_paired(op, dist_image_features=dist_image_features, dist_text_features=dist_text_features)
        check_device(op, image_features.device, dist_image_features=dist_image_features)
        if dist_image_features.shape[0] != image_features.shape[0]:
            raise ValueError(
                f"{op}: dist_image_features has {dist_image_features.shape[0]} rows; expected "
                f"{image_features.shape[0]}, like image_features"
            )
        x, y = _ready(image_features, False), _ready(text_features, False)
        contrastive, lse_row, lse_col = ops.info_nce(x, y, logit_scale, return_lse=True)
        with no_autocast(x.device):
            # float32 all through: products with the teacher's features are few beside the student's own
            wide_x, wide_y = x.to(_acc(x.dtype)), y.to(_acc(y.dtype))
            teacher = [t.to(wide_x.dtype) for t in (dist_image_features, dist_text_features)]
            scale = _scalar(_as_scalar(op, "logit_scale", logit_scale, x), wide_x)
            scaled = _scalar(_as_scalar(op, "dist_logit_scale", dist_logit_scale, x), wide_x) * teacher[0]
            of_rows = lse_row - scale * _dots(wide_x, _attend(scaled, teacher[1], wide_y))
            of_cols = lse_col - scale * _dots(wide_y, _attend(teacher[1], scaled, wide_x))
            distill = 0.5 * (of_rows + of_cols).sum() / max(x.shape[0], 1)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"rank={self.rank}, world_size={self.world_size}"


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key') value, [N, D]."""
    width = max(query.shape[1], value.shape[1])  # fused kernels want one; zeros change nothing
    q, k, v = (nn.functional.pad(t, (0, width - t.shape[1]))[None, None] for t in (query, key, value))
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)[0, 0, :, : value.shape[1]]


def create_loss(args: Any, *, exchange: str = "gather") -> nn.Module:
    """The loss that the arguments of open_clip's training script ask for, as ``open_clip.create_loss`` chooses it.

    Parameters
    ----------
    args : argparse.Namespace
        What the script parsed: ``model``, ``distill``, ``siglip``, ``local_loss``, ``gather_with_grad``, ``rank``,
        ``world_size``, ``horovod``, ``loss_dist_impl``, and for CoCa ``coca_caption_loss_weight`` and
        ``coca_contrastive_loss_weight``.
    exchange : "gather" or "ring"
        See `ClipLoss`; SigLIP goes by ``args.loss_dist_impl``.

    Returns
    -------
    DistillClipLoss, CoCaLoss, SigLipLoss or ClipLoss
        The first that applies.

    Raises
    ------
    ValueError, RuntimeError
        If the class does not support what the arguments ask for.
    """
    common = {
        "local_loss": args.local_loss, "gather_with_grad": args.gather_with_grad, "rank": args.rank,
        "world_size": args.world_size, "use_horovod": args.horovod,
    }  # fmt: skip
    if args.distill:
        return DistillClipLoss(**common)
    if "coca" in args.model.lower():
        return CoCaLoss(args.coca_caption_loss_weight, args.coca_contrastive_loss_weight, exchange=exchange, **common)
    if getattr(args, "siglip", False):
        if args.horovod:
            raise ValueError("create_loss: horovod is True with siglip; expected torch.distributed")
        return SigLipLoss(
            rank=args.rank, world_size=args.world_size, dist_impl=getattr(args, "loss_dist_impl", None)
        )  # fmt: skip
    return ClipLoss(exchange=exchange, **common)
