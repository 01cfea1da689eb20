r"""Contrastive losses as modules, with the arguments of the classes they stand in for: change the import.

What they compute is in `tlkernels.ops.contrastive`: no module here stores a matrix of similarities, so the memory that
a batch of N takes beyond its features is O(N). Each docstring says which class is its model and where it differs.

Aaron van den Oord et al. *Representation Learning with Contrastive Predictive Coding.* arXiv:1807.03748 (InfoNCE).
Alec Radford et al. *Learning Transferable Visual Models From Natural Language Supervision.* ICML 2021 (CLIP).
Xiaohua Zhai et al. *Sigmoid Loss for Language Image Pre-Training.* ICCV 2023 (SigLIP).
Prannay Khosla et al. *Supervised Contrastive Learning.* NeurIPS 2020 (SupCon).
Ting Chen et al. *A Simple Framework for Contrastive Learning of Visual Representations.* ICML 2020 (NT-Xent).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tlkernels import ops
from tlkernels.nn.nf4 import _autocast_dtype
from tlkernels.ops._common import check_device, check_float, name_of, no_autocast
from tlkernels.ops.contrastive import (
    _acc,
    _check_given,
    _check_reduction,
    _check_smoothing,
    _check_tensors,
    _readable,
    _reduce,
)

__all__ = ["CLIPLoss", "InfoNCELoss", "NTXentLoss", "SigLIPLoss", "SupConLoss"]


# ---- what they share ------------------------------------------------------------------------------------------------


def _check_matrices(op: str, **features: Tensor) -> None:
    """Floating-point matrices of one dtype, row length and device, like the first; autocast makes the dtypes one."""
    _check_tensors(op, **features)
    check_float(op, **features)
    first_name, first = next(iter(features.items()))
    check_device(op, first.device, **features)
    for name, t in features.items():
        if t.dim() != 2 or t.shape[1] != first.shape[-1]:
            width = "D" if t is first else str(first.shape[-1])
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected (N, {width})")
        if t.dtype != first.dtype and _autocast_dtype(t) is None:
            raise TypeError(
                f"{op}: {name} has dtype {name_of(t.dtype)}; expected {name_of(first.dtype)}, like {first_name}"
            )


def _check_paired(op: str, **features: Tensor) -> None:
    """Two matrices whose rows belong together."""
    _check_matrices(op, **features)
    (first_name, first), (name, second) = features.items()
    if second.shape[0] != first.shape[0]:
        raise ValueError(f"{op}: {name} has {second.shape[0]} rows; expected {first.shape[0]}, like {first_name}")


def _check_temperature(op: str, temperature: float) -> float:
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"{op}: temperature is {type(temperature).__name__}; expected a number")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature is {temperature}; expected > 0")
    return float(temperature)


def _check_one_process(op: str, world_size: int, rank: int) -> None:
    if world_size != 1:
        raise ValueError(
            f"{op}: world_size is {world_size}; expected 1, this module knows one process: "
            f"tlkernels.distributed.{op} takes the batches of all, and tlkernels.integrations.open_clip chooses"
        )
    if rank != 0:
        raise ValueError(f"{op}: rank is {rank} of world_size 1; expected 0")


def _ready(x: Tensor, normalize: bool) -> Tensor:
    """Rows of length 1 where `normalize`, in the dtype in which autocast would multiply them.

    Lengths are float32: one rounded to 16 bits would scale all logits of its row by up to 0.4 %.
    """
    if normalize:
        x = nn.functional.normalize(x.to(_acc(x.dtype)), dim=1).to(x.dtype)
    return x.to(_autocast_dtype(x) or x.dtype)


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """The similarity of each row of x with the same row of y."""
    with no_autocast(x.device):
        return (x.to(_acc(x.dtype)) * y.to(_acc(y.dtype))).sum(-1)


def _nll(target: Tensor, lse: Tensor) -> Tensor:
    """The cross-entropy of a target logit against others, of which `lse` is the log-sum-exp: log(1 + e^(lse - t)).

    Against none it is 0, and so are its gradients: that of the function at infinity is NaN.
    """
    none = lse == -torch.inf
    loss = -nn.functional.logsigmoid(target - lse.masked_fill(none, 0.0))
    return loss.masked_fill(none, 0.0)


# ---- CLIP and SigLIP ------------------------------------------------------------------------------------------------


class CLIPLoss(nn.Module):
    r"""CLIP's loss: each image finds its text among all texts of the batch, and each text its image.

    In the place of ``open_clip.loss.ClipLoss``. `InfoNCELoss` is the one with a temperature of its own and label
    smoothing, `tlkernels.ops.info_nce` the function.

    Parameters
    ----------
    local_loss, gather_with_grad, cache_labels, use_horovod : bool
        Accepted, and without effect in one process: no labels are made that could be cached.
    rank : int, 0
    world_size : int, 1
        Several processes: `tlkernels.distributed.CLIPLoss`, or `tlkernels.integrations.open_clip.create_loss`.

    Raises
    ------
    ValueError
        If `world_size` is not 1, or `rank` not 0.

    Notes
    -----
    With :math:`z_{ij} = s \, x_i \cdot y_j + b`,

    .. math:: L = \frac{1}{2 N} \sum_i \left( \log \sum_j e^{z_{ij}} + \log \sum_j e^{z_{ji}} - 2 z_{ii} \right)

    Differences from ``ClipLoss``: memory is O(N) instead of O(N\ :sup:`2`). The loss is float32 whatever the dtype of
    the features (float64 for float64); of no pairs it is 0, not NaN. Under autocast only the features are
    rounded, not the logits. `logit_bias` cancels in the value, and its gradient is 0 up to rounding. It cannot be
    differentiated twice. There are no ``get_logits`` and ``get_ground_truth``: nothing here has logits.

    References
    ----------
    Radford 2021.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.nn import CLIPLoss
    >>> features = torch.nn.functional.normalize(torch.ones(4, 8), dim=1)
    >>> CLIPLoss()(features, features, logit_scale=torch.tensor(10.0))  # log(4): all alike
    tensor(1.3863)
    """

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, cache_labels: bool = False, rank: int = 0,
        world_size: int = 1, use_horovod: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_one_process("CLIPLoss", world_size, rank)
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Compute the loss.

        Parameters
        ----------
        image_features, text_features : Tensor [N, D], float32, bfloat16, float16 or float64
            Of one dtype, unless under autocast. Used as they are: CLIP normalizes in its model.
        logit_scale : float or Tensor of one element
            The factor itself, ``model.logit_scale.exp()``.
        logit_bias : float or Tensor of one element, optional
        output_dict : bool
            Return ``{"contrastive_loss": loss}``.

        Returns
        -------
        Tensor, or dict of it
            0-d.

        Raises
        ------
        TypeError, ValueError
            Naming the argument.
        """
        _check_paired("CLIPLoss", image_features=image_features, text_features=text_features)
        loss = ops.info_nce(_ready(image_features, False), _ready(text_features, False), logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLIPLoss(nn.Module):
    r"""SigLIP's loss: each pair of an image and a text is one binary decision.

    In the place of ``open_clip.loss.SigLipLoss``. `tlkernels.ops.sigmoid_contrastive` is the function.

    Parameters
    ----------
    cache_labels : bool
        Accepted, and without effect: no labels are made that could be cached.
    rank : int, 0
    world_size : int, 1
        Several processes: `tlkernels.distributed.SigLIPLoss`, or `tlkernels.integrations.open_clip.create_loss`.
    dist_impl : "bidir", "shift", "reduce" or "gather", optional
        How processes would exchange their texts, default "bidir"; without effect in one.

    Raises
    ------
    ValueError
        If `world_size` is not 1, `rank` not 0, or `dist_impl` none of these.

    Notes
    -----
    .. math:: L = \frac1N \sum_{ij} \log \left( 1 + e^{-\sigma_{ij} (s \, x_i \cdot y_j + b)} \right), \qquad
        \sigma_{ij} = 2 [i = j] - 1

    Differences from ``SigLipLoss``: memory is O(N) instead of O(N\ :sup:`2`). The loss is float32 whatever the dtype of
    the features (float64 for float64); of no pairs it is 0, not NaN. Under autocast only the features are
    rounded, not the logits. It cannot be differentiated twice. There are no ``get_logits`` and ``get_ground_truth``.

    References
    ----------
    Zhai 2023.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.nn import SigLIPLoss
    >>> SigLIPLoss()(torch.zeros(1, 8), torch.zeros(1, 8), logit_scale=10.0, logit_bias=0.0)  # log(2)
    tensor(0.6931)
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        _check_one_process("SigLIPLoss", world_size, rank)
        if (dist_impl or "bidir") not in ("bidir", "shift", "reduce", "gather"):
            raise ValueError(
                f"SigLIPLoss: dist_impl is {dist_impl!r}; expected 'bidir', 'shift', 'reduce', 'gather' or None"
            )
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl = dist_impl or "bidir"

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Compute the loss.

        Parameters
        ----------
        image_features, text_features : Tensor [N, D], float32, bfloat16, float16 or float64
            Of one dtype, unless under autocast. Used as they are: SigLIP normalizes in its model.
        logit_scale : float or Tensor of one element
            The factor itself, ``model.logit_scale.exp()``. SigLIP starts from 10.
        logit_bias : float or Tensor of one element, optional
            SigLIP starts from -10; None is 0.
        output_dict : bool
            Return ``{"contrastive_loss": loss}``.

        Returns
        -------
        Tensor, or dict of it
            0-d.

        Raises
        ------
        TypeError, ValueError
            Naming the argument.
        """
        _check_paired("SigLIPLoss", image_features=image_features, text_features=text_features)
        loss = ops.sigmoid_contrastive(
            _ready(image_features, False), _ready(text_features, False), logit_scale,
            0.0 if logit_bias is None else logit_bias,
        )  # fmt: skip
        return {"contrastive_loss": loss} if output_dict else loss


# ---- InfoNCE --------------------------------------------------------------------------------------------------------


class InfoNCELoss(nn.Module):
    r"""InfoNCE: each query finds its key among negatives, those of the batch or given ones.

    The arguments are those of the package ``info-nce-pytorch``, with `symmetric`, `in_batch`, `label_smoothing` and a
    temperature that can be learned. `tlkernels.ops.info_nce` is the function.

    Parameters
    ----------
    temperature : float > 0
        Where it starts from, with `learnable_temperature`.
    reduction : "mean", "sum" or "none"
    negative_mode : "unpaired" or "paired"
        Whether `negative_keys` are [M, D], the same for all queries (a queue), or [N, M, D], each query's own.
    normalize : bool
        Divide all vectors by their length, so that similarities are cosines.
    symmetric : bool
        Also the other direction, each key among all queries, and the mean of both. It implies `in_batch`;
        `negative_keys` are negatives of queries only.
    in_batch : bool, optional
        Whether the keys of the other queries are negatives. Default: where no `negative_keys` are given. True with
        unpaired `negative_keys` has both kinds, as dense retrieval with hard negatives has.
    label_smoothing : float in [0, 1]
        The weight that is spread evenly over all candidates, as in `torch.nn.functional.cross_entropy`.
    learnable_temperature : bool
        Learn the logarithm of 1 / temperature, a float32 parameter named ``logit_scale``, as CLIP does: keep weight
        decay off it.
    max_logit_scale : float
        What 1 / temperature may grow to while it is learned. In training, a parameter beyond it is set back to it
        before it is used.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    .. math:: \ell_i = -\log \frac{e^{q_i \cdot k_i / \tau}}{e^{q_i \cdot k_i / \tau} + \sum_n e^{q_i \cdot n / \tau}}

    Differences from ``info_nce.InfoNCE``: memory is O(N + M) instead of O(N M), but for paired negatives, whose logits
    are as few as they are. The loss is float32 whatever the dtype of the inputs (float64 for float64), and 16-bit
    vectors are normalized in float32; of no queries it is 0. It cannot be differentiated twice, but for paired
    negatives.

    References
    ----------
    van den Oord 2018; He 2020 (MoCo, unpaired negatives); Karpukhin 2020 (DPR, `in_batch` with negatives).

    Examples
    --------
    >>> import torch
    >>> from tlkernels.nn import InfoNCELoss
    >>> InfoNCELoss()(torch.ones(4, 8), torch.ones(4, 8))  # log(4): all alike
    tensor(1.3863)
    >>> InfoNCELoss()(torch.ones(4, 8), torch.ones(4, 8), torch.ones(9, 8))  # log(1 + 9)
    tensor(2.3026)
    """

    logit_scale: nn.Parameter | None

    def __init__(
        self, temperature: float = 0.1, reduction: str = "mean", negative_mode: str = "unpaired", *,
        normalize: bool = True, symmetric: bool = False, in_batch: bool | None = None, label_smoothing: float = 0.0,
        learnable_temperature: bool = False, max_logit_scale: float = 100.0,
    ) -> None:  # fmt: skip
        super().__init__()
        op = "InfoNCELoss"
        temperature = _check_temperature(op, temperature)
        _check_reduction(op, reduction)
        if negative_mode not in ("unpaired", "paired"):
            raise ValueError(f"{op}: negative_mode is {negative_mode!r}; expected 'unpaired' or 'paired'")
        _check_smoothing(op, label_smoothing)
        if symmetric and in_batch is False:
            raise ValueError(f"{op}: in_batch is False with symmetric; expected True or None, keys are anchors too")
        if negative_mode == "paired" and (in_batch or symmetric):
            raise ValueError(
                f"{op}: negative_mode is 'paired' with {'in_batch' if in_batch else 'symmetric'}; expected 'unpaired', "
                "each query's own negatives are all it is compared with"
            )
        if learnable_temperature and not 1 / temperature <= max_logit_scale:
            raise ValueError(
                f"{op}: max_logit_scale is {max_logit_scale} for temperature {temperature}; expected at least "
                f"{1 / temperature:g}, what 1 / temperature starts from"
            )
        self.reduction, self.negative_mode, self.normalize, self.symmetric = (
            reduction, negative_mode, normalize, symmetric,
        )  # fmt: skip
        self.in_batch, self.label_smoothing, self.max_logit_scale = in_batch, label_smoothing, max_logit_scale
        self._temperature = temperature
        start = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable_temperature else None
        self.register_parameter("logit_scale", start)

    @property
    def temperature(self) -> float:
        """The present temperature."""
        return self._temperature if self.logit_scale is None else float((-self.logit_scale.detach()).exp())

    def _scale(self) -> float | Tensor:
        if self.logit_scale is None:
            return 1.0 / self._temperature
        if self.training:  # the parameter, not what is made of it: it would have no gradient to come back with
            with torch.no_grad():
                self.logit_scale.clamp_(max=math.log(self.max_logit_scale))
        return self.logit_scale.exp()

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Parameters
        ----------
        query, positive_key : Tensor [N, D], float32, bfloat16, float16 or float64
            Of one dtype, unless under autocast.
        negative_keys : Tensor [M, D], or [N, M, D] in mode "paired", optional
            What queries are compared with instead of each other's keys, or besides with `in_batch`.

        Returns
        -------
        Tensor
            0-d, or [N] with reduction "none".

        Raises
        ------
        TypeError, ValueError
            Naming the argument.
        """
        op = "InfoNCELoss"
        _check_paired(op, query=query, positive_key=positive_key)
        paired = self.negative_mode == "paired"
        if negative_keys is None:
            if self.in_batch is False:
                raise ValueError(f"{op}: in_batch is False without negative_keys; expected one of them")
        elif paired:
            _check_tensors(op, negative_keys=negative_keys)
            rows, width = query.shape
            if negative_keys.dim() != 3 or negative_keys.shape[0] != rows or negative_keys.shape[2] != width:
                raise ValueError(
                    f"{op}: negative_keys has shape {tuple(negative_keys.shape)}; expected ({rows}, M, {width}) in "
                    "negative_mode 'paired'"
                )
            _check_matrices(op, query=query, negative_keys=negative_keys.flatten(0, 1))
        else:
            _check_matrices(op, query=query, negative_keys=negative_keys)
        x, y = _ready(query, self.normalize), _ready(positive_key, self.normalize)
        if negative_keys is None or self.in_batch or self.symmetric:
            more = None if negative_keys is None else _ready(negative_keys, self.normalize)
            with no_autocast(x.device):  # the mean logit of label smoothing is a product
                return ops.info_nce(
                    x, y, self._scale(), y_negatives=more, symmetric=self.symmetric,
                    label_smoothing=self.label_smoothing, reduction=self.reduction,
                )  # fmt: skip
        with no_autocast(x.device):
            scale = torch.as_tensor(self._scale(), dtype=_acc(x.dtype), device=x.device)
        if paired:
            negatives = _ready(negative_keys.flatten(0, 1), self.normalize).unflatten(0, negative_keys.shape[:2])
            loss = self._paired(x, y, negatives, scale)
        else:
            loss = self._unpaired(x, y, _ready(negative_keys, self.normalize), scale)
        return _reduce(loss, self.reduction, x.shape[0])

    def _paired(self, x: Tensor, y: Tensor, negatives: Tensor, scale: Tensor) -> Tensor:
        keys = torch.cat([y[:, None], negatives], 1)
        with no_autocast(x.device):
            logits = scale * (keys.to(scale.dtype) @ x.to(scale.dtype)[:, :, None])[:, :, 0]
        target = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        return nn.functional.cross_entropy(
            logits, target, label_smoothing=self.label_smoothing, reduction="none"
        )  # fmt: skip

    def _unpaired(self, x: Tensor, y: Tensor, negatives: Tensor, scale: Tensor) -> Tensor:
        target = scale * _dots(x, y)
        lse = ops.sim_lse(x, negatives, scale, cols=False).row
        loss = _nll(target, lse)
        if self.label_smoothing > 0.0:
            # the mean logit is that of the mean negative: no matrix
            total = target + scale * _dots(x, negatives.sum(0, dtype=_acc(x.dtype)))
            smooth = ops.lse_merge(lse, target) - total / (1 + negatives.shape[0])
            loss = (1.0 - self.label_smoothing) * loss + self.label_smoothing * smooth
        return loss

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        shown = f"temperature={self.temperature:.4g}, reduction={self.reduction!r}"
        shown += f", negative_mode={self.negative_mode!r}"
        for name, default in (("normalize", True), ("symmetric", False), ("in_batch", None), ("label_smoothing", 0.0)):
            if getattr(self, name) != default:
                shown += f", {name}={getattr(self, name)}"
        return shown if self.logit_scale is None else f"{shown}, learnable_temperature=True"


# ---- SupCon and NT-Xent ---------------------------------------------------------------------------------------------


class _Anchors:
    """The arguments that SupConLoss and NTXentLoss share, checked: anchors, what they are compared with, and classes.

    Where the labels of the references are the anchors' own, the very same tensor or none, row i of the references is
    taken for anchor i itself.
    """

    def __init__(
        self, op: str, embeddings: Tensor, labels: Tensor | None, ref_emb: Tensor | None, ref_labels: Tensor | None,
        normalize: bool,
    ) -> None:  # fmt: skip
        if ref_emb is None:
            if ref_labels is not None:
                raise ValueError(f"{op}: ref_labels are given without ref_emb; expected both or neither")
            _check_matrices(op, embeddings=embeddings)
        else:
            _check_matrices(op, embeddings=embeddings, ref_emb=ref_emb)
        self.with_self = ref_emb is None or ref_labels is None or ref_labels is labels
        self.x = _ready(embeddings, normalize)
        self.y = None if ref_emb is None else _ready(ref_emb, normalize)
        rows, columns = embeddings.shape[0], embeddings.shape[0] if ref_emb is None else ref_emb.shape[0]
        self.labels, self.ref_labels = labels, labels if ref_labels is None else ref_labels
        for name, classes, count in (("labels", labels, rows), ("ref_labels", self.ref_labels, columns)):
            if classes is None:
                continue
            _check_tensors(op, **{name: classes})
            if classes.is_floating_point() or classes.is_complex() or tuple(classes.shape) != (count,):
                which = "labels, which are those of ref_emb too," if classes is labels and name != "labels" else name
                raise ValueError(
                    f"{op}: {which} has dtype {name_of(classes.dtype)} and shape {tuple(classes.shape)}; "
                    f"expected int64 ({count},)"
                )

    def classes(self) -> tuple[Tensor, Tensor]:
        """The labels of anchors and references on the features' device."""
        assert self.labels is not None and self.ref_labels is not None
        return self.labels.to(self.x.device), self.ref_labels.to(self.x.device)

    def pairs(self, op: str, indices_tuple: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a miner found, checked."""
        columns = (self.x if self.y is None else self.y).shape[0]
        return _pairs(op, indices_tuple, self.x.shape[0], columns, self.x.device)

    def logits(self, temperature: float) -> Tensor:
        """[N, M], stored."""
        with no_autocast(self.x.device):
            x, y = (t.to(_acc(t.dtype)) for t in (self.x, self.x if self.y is None else self.y))
            return x @ y.T / temperature


def _pairs(
    op: str, indices_tuple: Sequence[Tensor], rows: int, columns: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(anchors, positives, anchors, negatives) of a miner's triplets or pairs, as int64."""
    if not isinstance(indices_tuple, (tuple, list)):
        raise TypeError(f"{op}: indices_tuple is {type(indices_tuple).__name__}; expected a tuple of 3 or 4 tensors")
    if len(indices_tuple) not in (3, 4):
        raise ValueError(
            f"{op}: indices_tuple has {len(indices_tuple)} tensors; expected 3 (triplets: anchors, positives, "
            "negatives) or 4 (pairs: anchors, positives, anchors, negatives)"
        )
    below = (rows, columns, columns) if len(indices_tuple) == 3 else (rows, columns, rows, columns)
    found = []
    for k, (index, bound) in enumerate(zip(indices_tuple, below, strict=True)):
        name = f"indices_tuple[{k}]"
        _check_given(op, device, **{name: index})
        like = 0 if len(indices_tuple) == 3 else k // 2 * 2  # the anchors of the same triplets or pairs
        integer = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
        if not integer or index.dim() != 1 or index.shape[0] != indices_tuple[like].shape[0]:
            got = f"dtype {name_of(index.dtype)} and shape {tuple(index.shape)}"
            count = "K" if k == like else str(indices_tuple[like].shape[0])
            raise ValueError(f"{op}: {name} has {got}; expected int64 ({count},)")
        index = index.to(torch.int64)
        if _readable(index) and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < bound:
            wrong = index[(index < 0) | (index >= bound)]
            raise IndexError(f"{op}: {name} has an entry {int(wrong[0])}; expected 0 <= index < {bound}")
        found.append(index)
    anchors, positives, *_, negatives = found
    return anchors, positives, anchors if len(found) == 3 else found[2], negatives


def _need_labels(op: str, labels: Tensor | None, indices_tuple: Sequence[Tensor] | None) -> None:
    if labels is None and indices_tuple is None:
        raise ValueError(f"{op}: labels and indices_tuple are None; expected one of them")


class SupConLoss(nn.Module):
    r"""Supervised contrastive loss: all samples of an anchor's class are its positives.

    In the place of ``pytorch_metric_learning.losses.SupConLoss``. `tlkernels.ops.sup_con` is the function.

    Parameters
    ----------
    temperature : float > 0
    normalize : bool
        Divide all vectors by their length, so that similarities are cosines. False is the model's
        ``distance=DotProductSimilarity(normalize_embeddings=False)``.
    reduction : "mean", "sum" or "none"
        "mean" is over the anchors whose loss is above 0, as in the model; "none" is 0 where there is no positive.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    .. math:: \ell_i = \log \sum_{a \in A(i)} e^{z_i \cdot z_a / \tau}
        - \frac{1}{|P(i)|} \sum_{p \in P(i)} z_i \cdot z_p / \tau

    with A(i) all but i itself, and P(i) those of A(i) in its class. As in the model, the loss is 0 where the batch has
    no positive or no negative pair, and a `ref_labels` that is the very same tensor as `labels`, or is missing, means
    that row i of `ref_emb` is anchor i itself: give a copy of the labels where it is another view.

    Differences from the model: memory is O(N) instead of O(N\ :sup:`2`), but for a call with `indices_tuple`, which
    stores the matrix as the miner did. The loss is float32 whatever the dtype of the embeddings (float64 for float64),
    and 16-bit vectors are normalized in float32. Losses of about one rounding may fall on the other side of 0, which
    changes what the mean is over. A NaN among the embeddings makes the mean NaN, where the model leaves it out, and
    has a loss of 0 without a gradient. One positive and one negative pair in all, which the model takes for none, have
    their loss. There are no ``distance``, ``reducer`` and ``embedding_regularizer``. It cannot be differentiated twice,
    but for `indices_tuple`.

    References
    ----------
    Khosla 2020, the form L_out.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.nn import SupConLoss
    >>> SupConLoss()(torch.ones(4, 8), torch.tensor([0, 0, 1, 1]))  # log(3): all alike
    tensor(1.0986)
    """

    def __init__(self, temperature: float = 0.1, *, normalize: bool = True, reduction: str = "mean") -> None:
        super().__init__()
        self.temperature = _check_temperature("SupConLoss", temperature)
        _check_reduction("SupConLoss", reduction)
        self.normalize, self.reduction = normalize, reduction

    def forward(
        self, embeddings: Tensor, labels: Tensor | None = None, indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute the loss.

        Parameters
        ----------
        embeddings : Tensor [N, D], float32, bfloat16, float16 or float64
            The anchors.
        labels : integer Tensor [N]
            The class of each. Not needed with `indices_tuple`.
        indices_tuple : 3 or 4 integer Tensors, optional
            What a miner found: triplets (anchors, positives, negatives) or pairs (anchors, positives, anchors,
            negatives). Pairs that occur twice count once.
        ref_emb : Tensor [M, D], optional
            What anchors are compared with, default `embeddings`.
        ref_labels : integer Tensor [M], optional
            The classes of `ref_emb`, default `labels`.

        Returns
        -------
        Tensor
            0-d, or [N] with reduction "none".

        Raises
        ------
        TypeError, ValueError
            Naming the argument.
        """
        op = "SupConLoss"
        _need_labels(op, labels, indices_tuple)
        given = _Anchors(op, embeddings, labels, ref_emb, ref_labels, self.normalize)
        if indices_tuple is not None:
            loss = self._of_pairs(given, given.pairs(op, indices_tuple))
        else:
            mine, theirs = given.classes()
            if given.y is None:
                loss = ops.sup_con(given.x, mine, temperature=self.temperature, reduction="none")
            else:
                offset = 0 if given.with_self else None
                loss = ops.sup_con(
                    given.x, mine, given.y, theirs, temperature=self.temperature, ref_offset=offset, reduction="none"
                )
            both = torch.cat([mine, theirs])
            loss = torch.where((both != both[:1]).any(), loss, torch.zeros_like(loss))
        if self.reduction != "mean":
            return _reduce(loss, self.reduction, 1)
        above = ~(loss <= 0)  # of NaN too, which must not pass for nothing to learn
        return _reduce(torch.where(above, loss, torch.zeros_like(loss)), "mean", above.sum())

    def _of_pairs(self, given: _Anchors, pairs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        z = given.logits(self.temperature)
        positive, negative = torch.zeros_like(z, dtype=torch.bool), torch.zeros_like(z, dtype=torch.bool)
        positive[pairs[0], pairs[1]] = True
        negative[pairs[2], pairs[3]] = True
        if bool((positive & negative).any()):
            raise ValueError("SupConLoss: indices_tuple has a pair that is positive and negative; expected one of them")
        zero = z.new_zeros(())
        count = positive.sum(1)
        mean = torch.where(positive, z, zero).sum(1) / count.clamp(min=1)
        lse = z.masked_fill(~(positive | negative), -torch.inf).logsumexp(1)
        return torch.where((count > 0) & negative.any(), torch.where(count > 0, lse, zero) - mean, zero)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"temperature={self.temperature}, normalize={self.normalize}, reduction={self.reduction!r}"


class NTXentLoss(nn.Module):
    r"""NT-Xent, SimCLR's loss, of two views or of classes: each positive pair against all negatives of its anchor.

    In the place of ``pytorch_metric_learning.losses.NTXentLoss``, called with labels, and of
    ``lightly.loss.NTXentLoss``, called with two views. `tlkernels.ops.nt_xent` is the function, for two views.

    Parameters
    ----------
    temperature : float > 0, optional
        Default: that of the model, 0.07 with labels or pairs and 0.5 with two views.
    memory_bank_size : int, 0
        lightly's. For a queue of negatives use `InfoNCELoss`, which takes them as ``negative_keys``.
    gather_distributed : bool, False
        lightly's. For several processes use `tlkernels.distributed`.
    normalize : bool
        Divide all vectors by their length, so that similarities are cosines.
    reduction : "mean", "sum" or "none"
        "mean" is over all positive pairs; "none" is the sum of the pairs of each anchor.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    .. math:: \ell_{ip} = -\log \frac{e^{z_i \cdot z_p / \tau}}
        {e^{z_i \cdot z_p / \tau} + \sum_{n \in N(i)} e^{z_i \cdot z_n / \tau}}

    for every other p in the class of i, with N(i) those of other classes: the other positives are not in the
    denominator, unlike in `SupConLoss`. Two views of N samples are 2 N anchors in N classes.

    Differences from the model of pytorch_metric_learning: memory is O(N K), for classes of at most K, instead of
    O(N\ :sup:`2` K): the references are taken apart into the first of each class, the second and so on, which are one
    call of `tlkernels.ops.sim_lse` each; it is one call in all for classes of at most two compared with themselves. A
    call with `indices_tuple` stores the matrix as the miner did. The loss is float32 whatever the dtype of the
    embeddings (float64 for float64), 16-bit vectors are normalized in float32, and a large loss is not capped at the
    logarithm of the smallest number. One positive and one negative pair in all, which the model takes for none, have
    their loss. As in the model, a `ref_labels` that is the very same tensor as `labels`, or is missing, means that row
    i of `ref_emb` is anchor i itself. There are no ``distance``, ``reducer`` and ``embedding_regularizer``. The sizes
    of classes are read on the host: with labels, ``torch.compile`` breaks the graph; with two views it does not. It
    cannot be differentiated twice, but for `indices_tuple`.

    Differences from lightly's: without a memory bank and processes, values are the same.

    References
    ----------
    Chen 2020; Sohn 2016 for several positives, each a loss of its own.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.nn import NTXentLoss
    >>> NTXentLoss()(torch.ones(4, 8), torch.ones(4, 8))  # log(7): all alike
    tensor(1.9459)
    >>> NTXentLoss()(torch.ones(6, 8), torch.tensor([0, 0, 0, 1, 1, 1]))  # log(1 + 3)
    tensor(1.3863)
    """

    def __init__(
        self, temperature: float | None = None, memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False, *, normalize: bool = True, reduction: str = "mean",
    ) -> None:  # fmt: skip
        super().__init__()
        op = "NTXentLoss"
        self.temperature = None if temperature is None else _check_temperature(op, temperature)
        if memory_bank_size != 0 and (isinstance(memory_bank_size, int) or list(memory_bank_size)[:1] != [0]):
            raise ValueError(
                f"{op}: memory_bank_size is {memory_bank_size}; expected 0: use InfoNCELoss, and give the rows of a "
                "queue as negative_keys"
            )
        if gather_distributed:
            raise ValueError(f"{op}: gather_distributed is True; expected False: tlkernels.distributed has the losses")
        _check_reduction(op, reduction)
        self.normalize, self.reduction = normalize, reduction

    def forward(
        self, embeddings: Tensor, labels: Tensor | None = None, indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute the loss.

        Parameters
        ----------
        embeddings : Tensor [N, D], float32, bfloat16, float16 or float64
            The anchors, or one view of each sample.
        labels : integer Tensor [N], or Tensor [N, D] of the dtype of `embeddings`
            The class of each anchor; or the other view of each sample. Not needed with `indices_tuple`.
        indices_tuple : 3 or 4 integer Tensors, optional
            What a miner found: triplets (anchors, positives, negatives) or pairs (anchors, positives, anchors,
            negatives). Pairs that occur twice count twice.
        ref_emb : Tensor [M, D], optional
            What anchors are compared with, default `embeddings`.
        ref_labels : integer Tensor [M], optional
            The classes of `ref_emb`, default `labels`.

        Returns
        -------
        Tensor
            0-d, or with reduction "none" [N], [2 N] for two views.

        Raises
        ------
        TypeError, ValueError
            Naming the argument.
        """
        op = "NTXentLoss"
        _need_labels(op, labels, indices_tuple)
        if labels is not None:
            _check_tensors(op, labels=labels)
        if labels is not None and labels.is_floating_point() and labels.dim() == 2:
            for name, t in (("indices_tuple", indices_tuple), ("ref_emb", ref_emb), ("ref_labels", ref_labels)):
                if t is not None:
                    raise ValueError(f"{op}: {name} is given with two views; expected None")
            _check_paired(op, embeddings=embeddings, labels=labels)
            first, second = _ready(embeddings, self.normalize), _ready(labels, self.normalize)
            temperature = 0.5 if self.temperature is None else self.temperature
            return ops.nt_xent(first, second, temperature=temperature, reduction=self.reduction)
        temperature = 0.07 if self.temperature is None else self.temperature
        given = _Anchors(op, embeddings, labels, ref_emb, ref_labels, self.normalize)
        if indices_tuple is not None:
            loss, count = _nt_xent_of_pairs(given, given.pairs(op, indices_tuple), temperature)
        else:
            loss, count = _nt_xent_of_classes(given, temperature)
        return _reduce(loss, self.reduction, count)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"temperature={self.temperature}, normalize={self.normalize}, reduction={self.reduction!r}"


def _nt_xent_of_pairs(
    given: _Anchors, pairs: tuple[Tensor, Tensor, Tensor, Tensor], temperature: float
) -> tuple[Tensor, Tensor | int]:
    """(sum of each anchor's pairs [N], number of pairs)."""
    a1, p, a2, n = pairs
    z = given.logits(temperature)
    times = torch.zeros_like(z).index_put((a2, n), z.new_ones(()), accumulate=True)
    lse = (z + times.clamp(min=1.0).log()).masked_fill(times == 0, -torch.inf).logsumexp(1)
    return z.new_zeros(z.shape[0]).index_add(0, a1, _nll(z[a1, p], lse[a1])), a1.shape[0]


def _nt_xent_of_classes(given: _Anchors, temperature: float) -> tuple[Tensor, Tensor | int]:
    """(sum of each anchor's pairs [N], number of pairs).

    The k-th references of all classes are one block of columns. In it an anchor has at most one of its own class,
    which `exclude` of `sim_lse` leaves out, so the log-sum-exp over all negatives is merged from blocks: nothing is
    subtracted, which would leave no digit of small negatives beside large positives.
    """
    mine, theirs = given.classes()
    x, reference = given.x, given.x if given.y is None else given.y
    rows, columns = x.shape[0], reference.shape[0]
    device = x.device
    itself = torch.arange(rows, device=device)
    _, index = torch.unique(torch.cat([mine, theirs]), return_inverse=True)
    mine, theirs = index[:rows], index[rows:]
    by_class = torch.argsort(theirs, stable=True)
    grouped = theirs[by_class]
    position = torch.arange(columns, device=device) - torch.searchsorted(grouped, grouped)  # in its class
    sizes: list[int] = torch.bincount(position).tolist()  # how many classes have a k-th; the one wait for the device
    scale = torch.full((), 1.0 / temperature, dtype=_acc(x.dtype), device=device)
    if not sizes:
        return x.sum(1, dtype=_acc(x.dtype)) * 0.0, 0

    if given.y is None and len(sizes) <= 2:
        # one positive at most, and then all others are the denominator: half of one symmetric matrix
        second = position == 1
        first = second.roll(-1)
        own = torch.where(first, by_class.roll(-1), torch.where(second, by_class.roll(1), -1))
        partner = torch.empty_like(own).index_put((by_class,), own)
        nll = ops.sim_lse(x, None, scale, labels=partner, exclude=itself).nll_row
        return nll, (partner >= 0).sum()

    blocks, targets, chosen = [], [], []
    for members in by_class[torch.argsort(position, stable=True)].split(sizes):
        size = members.shape[0]
        column_of = torch.full((rows + columns,), -1, device=device)
        column_of[theirs[members]] = torch.arange(size, device=device)
        own = column_of[mine]
        block = reference[members]
        sums = ops.sim_lse(x, block, scale, labels=own, exclude=own, cols=False)
        is_positive = own >= 0
        if given.with_self:
            is_positive = is_positive & (members[own.clamp(min=0)] != itself)
        blocks.append(sums.row)
        # of one column, an anchor of its class has a sum over nothing, which has no difference to give
        targets.append(sums.row - sums.nll_row if size > 1 else scale * _dots(x, block))
        chosen.append(is_positive)
    negatives, positive = torch.stack(blocks, 1), torch.stack(chosen, 1)
    none = (negatives == -torch.inf).all(1, keepdim=True)  # the log-sum-exp of nothing has NaN for a gradient
    lse = negatives.masked_fill(none, 0.0).logsumexp(1, keepdim=True).masked_fill(none, -torch.inf)
    pairs = _nll(torch.stack(targets, 1), lse)
    return torch.where(positive, pairs, torch.zeros_like(pairs)).sum(1), positive.sum()
