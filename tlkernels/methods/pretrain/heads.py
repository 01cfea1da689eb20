r"""Projectors and predictors: the small networks between an encoder and a self-supervised loss.

Each is :math:`W_L \, a(\mathrm{BN}(W_{L-1} \cdots a(\mathrm{BN}(W_1 x))))`, and the methods differ in the number of
layers, their widths, where batch norm stands, and whether it also ends the network:

========================  ======  ==========================  ===================  ===========  ==========
function                  layers  widths after the first      batch norm, hidden   at the end   last bias
========================  ======  ==========================  ===================  ===========  ==========
`simclr_projector`        2       2048, 128                   yes                  yes          no
`moco_v1_projector`       1       128                         -                    no           yes
`moco_v2_projector`       2       2048, 128                   no                   no           yes
`moco_v3_projector`       3       4096, 4096, 256             yes                  not affine   no
`moco_v3_predictor`       2       4096, 256                   yes                  not affine   no
`byol_projector`          2       4096, 256                   yes                  no           no
`byol_predictor`          2       4096, 256                   yes                  no           no
`simsiam_projector`       3       2048, 2048, 2048            yes                  not affine   no
`simsiam_predictor`       2       512, 2048                   yes                  no           yes
`barlow_twins_projector`  3       8192, 8192, 8192            yes                  no           no
`vicreg_projector`        3       8192, 8192, 8192            yes                  no           no
`swav_projector`          2       2048, 128                   yes                  no           yes
`DINOHead`                3 + 1   2048, 2048, 256 | 65536     no (GELU)            no           yes | no
========================  ======  ==========================  ===================  ===========  ==========

Linear layers followed by batch norm have no bias: it would cancel. Across processes, put
`torch.nn.SyncBatchNorm.convert_sync_batchnorm` around the model, as the papers do.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlkernels.methods._common import wide

__all__ = [
    "DINOHead",
    "ProjectionHead",
    "barlow_twins_projector",
    "byol_predictor",
    "byol_projector",
    "cancel_gradients",
    "moco_v1_projector",
    "moco_v2_projector",
    "moco_v3_predictor",
    "moco_v3_projector",
    "simclr_projector",
    "simsiam_predictor",
    "simsiam_projector",
    "swav_projector",
    "vicreg_projector",
]


class ProjectionHead(nn.Sequential):
    """A multilayer perceptron with ReLU, and batch norm where the paper has it; the functions below choose.

    Parameters
    ----------
    *widths : int
        Of the input, of each hidden layer, of the output: at least two.
    batch_norm : bool
        After each hidden linear layer.
    last_batch_norm : {"none", "affine", "plain"}
        After the last linear layer: none, with, or without learned scale and shift.
    last_bias : bool
        Whether the last linear layer has a bias; it has none before a batch norm.

    Raises
    ------
    ValueError
        If an argument is not as stated; on a call in training, if a batch norm gets fewer than two rows, whose
        variance is undefined.
    """

    def __init__(
        self, *widths: int, batch_norm: bool = True, last_batch_norm: Literal["none", "affine", "plain"] = "none",
        last_bias: bool = True,
    ) -> None:  # fmt: skip
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"ProjectionHead: widths are {widths}; expected at least two, each >= 1")
        if last_batch_norm not in ("none", "affine", "plain"):
            raise ValueError(
                f"ProjectionHead: last_batch_norm is {last_batch_norm!r}; expected 'none', 'affine' or 'plain'"
            )
        layers: list[nn.Module] = []
        for i, (width, following) in enumerate(pairwise(widths)):
            last = i == len(widths) - 2
            normed = last_batch_norm != "none" if last else batch_norm
            layers.append(nn.Linear(width, following, bias=not normed and (last_bias or not last)))
            if normed:
                layers.append(nn.BatchNorm1d(following, affine=not last or last_batch_norm == "affine"))
            if not last:
                layers.append(nn.ReLU())
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Project features.

        Parameters
        ----------
        x : Tensor [N, in]
            Without batch norms ``[..., in]``.

        Returns
        -------
        Tensor [N, out]
        """
        if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in self):
            if x.dim() != 2:
                raise ValueError(f"ProjectionHead: x has shape {tuple(x.shape)}; expected (N, {self[0].in_features})")
            _check_rows_of_norm(self, "ProjectionHead", x)
        return super().forward(x)


def _check_rows_of_norm(head: nn.Module, op: str, x: Tensor) -> None:
    """Raise for a batch without a deviation; of a synchronized norm the batch is that of all processes."""
    alone = any(isinstance(layer, nn.BatchNorm1d) for layer in head.modules())
    if alone and head.training and x.shape[0] < 2:
        raise ValueError(
            f"{op}: x has {x.shape[0]} rows in training; expected at least 2, "
            "batch norm divides by the batch's deviation"
        )


def _hidden(op: str, width: int, hidden_features: int, num_layers: int) -> tuple[int, ...]:
    if num_layers < 1:
        raise ValueError(f"{op}: num_layers is {num_layers}; expected >= 1")
    return (width, *[hidden_features] * (num_layers - 1))


def simclr_projector(
    in_features: int = 2048, hidden_features: int = 2048, out_features: int = 128, num_layers: int = 2
) -> ProjectionHead:  # fmt: skip
    """The projector of SimCLR: batch norm after every layer, also the last. SimCLR v2 has three layers.

    Parameters
    ----------
    in_features, hidden_features, out_features, num_layers : int

    Returns
    -------
    ProjectionHead

    Raises
    ------
    ValueError
        If a number is below 1.

    References
    ----------
    Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020, arXiv:2002.05709,
    and the authors' code, which has the batch norms.
    """
    return ProjectionHead(
        *_hidden("simclr_projector", in_features, hidden_features, num_layers), out_features, last_batch_norm="affine"
    )


def moco_v1_projector(in_features: int = 2048, out_features: int = 128) -> ProjectionHead:
    """The projector of MoCo: one linear layer.

    Parameters
    ----------
    in_features, out_features : int

    Returns
    -------
    ProjectionHead

    Raises
    ------
    ValueError
        If a number is below 1.

    References
    ----------
    He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020, arXiv:1911.05722.
    """
    return ProjectionHead(in_features, out_features)


def moco_v2_projector(
    in_features: int = 2048, hidden_features: int = 2048, out_features: int = 128
) -> ProjectionHead:  # fmt: skip
    """The projector of MoCo v2: two layers, no batch norm.

    Parameters
    ----------
    in_features, hidden_features, out_features : int

    Returns
    -------
    ProjectionHead

    Raises
    ------
    ValueError
        If a number is below 1.

    References
    ----------
    Chen et al., Improved Baselines with Momentum Contrastive Learning, 2020, arXiv:2003.04297.
    """
    return ProjectionHead(in_features, hidden_features, out_features, batch_norm=False)


def moco_v3_projector(
    in_features: int = 768, hidden_features: int = 4096, out_features: int = 256, num_layers: int = 3
) -> ProjectionHead:  # fmt: skip
    """The projector of MoCo v3: batch norm after every layer, the last one without scale and shift.

    Parameters
    ----------
    in_features, hidden_features, out_features, num_layers : int
        Three layers behind a vision transformer; the authors' code has two behind a ResNet.

    Returns
    -------
    ProjectionHead

    Raises
    ------
    ValueError
        If a number is below 1.

    References
    ----------
    Chen, Xie and He, An Empirical Study of Training Self-Supervised Vision Transformers, ICCV 2021, arXiv:2104.02057.
    """
    return ProjectionHead(
        *_hidden("moco_v3_projector", in_features, hidden_features, num_layers), out_features, last_batch_norm="plain"
    )


def moco_v3_predictor(
    in_features: int = 256, hidden_features: int = 4096, out_features: int = 256
) -> ProjectionHead:  # fmt: skip
    """The predictor of MoCo v3, on the query side only; layers as in `moco_v3_projector`.

    Parameters
    ----------
    in_features, hidden_features, out_features : int

    Returns
    -------
    ProjectionHead

    Raises
    ------
    ValueError
        If a number is below 1.
    """
    return ProjectionHead(in_features, hidden_features, out_features, last_batch_norm="plain")


def byol_projector(
    in_features: int = 2048, hidden_features: int = 4096, out_features: int = 256
) -> ProjectionHead:  # fmt: skip
    """The projector of BYOL: batch norm after the hidden layer alone.

    Parameters
    ----------
    in_features, hidden_features, out_features : int

    Returns
    -------
    ProjectionHead

    Raises
    ------
    ValueError
        If a number is below 1.

    References
    ----------
    Grill et al., Bootstrap Your Own Latent, NeurIPS 2020, arXiv:2006.07733, section 3.3.
    """
    return ProjectionHead(in_features, hidden_features, out_features, last_bias=False)


def byol_predictor(in_features: int = 256, hidden_features: int = 4096, out_features: int = 256) -> ProjectionHead:
    """The predictor of BYOL, on the online side only; layers as in `byol_projector`.

    Parameters
    ----------
    in_features, hidden_features, out_features : int

    Returns
    -------
    ProjectionHead

    Raises
    ------
    ValueError
        If a number is below 1.
    """
    return byol_projector(in_features, hidden_features, out_features)


def simsiam_projector(
    in_features: int = 2048, hidden_features: int = 2048, out_features: int = 2048, num_layers: int = 3
) -> ProjectionHead:  # fmt: skip
    """The projector of SimSiam: batch norm after every layer, the last one without scale and shift.

    Parameters
    ----------
    in_features, hidden_features, out_features, num_layers : int

    Returns
    -------
    ProjectionHead

    Raises
    ------
    ValueError
        If a number is below 1.

    References
    ----------
    Chen and He, Exploring Simple Siamese Representation Learning, CVPR 2021, arXiv:2011.10566.
    """
    return ProjectionHead(
        *_hidden("simsiam_projector", in_features, hidden_features, num_layers), out_features, last_batch_norm="plain"
    )


def simsiam_predictor(
    in_features: int = 2048, hidden_features: int = 512, out_features: int = 2048
) -> ProjectionHead:  # fmt: skip
    """The predictor of SimSiam: a bottleneck, batch norm after the hidden layer alone.

    Parameters
    ----------
    in_features, hidden_features, out_features : int

    Returns
    -------
    ProjectionHead

    Raises
    ------
    ValueError
        If a number is below 1.
    """
    return ProjectionHead(in_features, hidden_features, out_features)


def barlow_twins_projector(
    in_features: int = 2048, hidden_features: int = 8192, out_features: int = 8192, num_layers: int = 3
) -> ProjectionHead:  # fmt: skip
    """The projector of Barlow Twins: wide; batch norm after the hidden layers alone.

    Parameters
    ----------
    in_features, hidden_features, out_features, num_layers : int

    Returns
    -------
    ProjectionHead

    Raises
    ------
    ValueError
        If a number is below 1.

    References
    ----------
    Zbontar et al., Barlow Twins, ICML 2021, arXiv:2103.03230, section 2.2.
    """
    return ProjectionHead(
        *_hidden("barlow_twins_projector", in_features, hidden_features, num_layers), out_features, last_bias=False
    )


def vicreg_projector(
    in_features: int = 2048, hidden_features: int = 8192, out_features: int = 8192, num_layers: int = 3
) -> ProjectionHead:  # fmt: skip
    """The expander of VICReg, the same network as `barlow_twins_projector`.

    Parameters
    ----------
    in_features, hidden_features, out_features, num_layers : int

    Returns
    -------
    ProjectionHead

    Raises
    ------
    ValueError
        If a number is below 1.

    References
    ----------
    Bardes, Ponce and LeCun, VICReg, ICLR 2022, arXiv:2105.04906, section 4.2.
    """
    return barlow_twins_projector(in_features, hidden_features, out_features, num_layers)


def swav_projector(
    in_features: int = 2048, hidden_features: int = 2048, out_features: int = 128
) -> ProjectionHead:  # fmt: skip
    """The projector of SwAV, before normalisation and `SwAVPrototypes`.

    Parameters
    ----------
    in_features, hidden_features, out_features : int

    Returns
    -------
    ProjectionHead

    Raises
    ------
    ValueError
        If a number is below 1.

    References
    ----------
    Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, NeurIPS 2020,
    arXiv:2006.09882.
    """
    return ProjectionHead(in_features, hidden_features, out_features)


class _WeightNormLinear(nn.Module):
    """``x @ (g v / |v|).T``; names as in the authors' checkpoints."""

    def __init__(self, in_features: int, out_features: int, learn_g: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=learn_g)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_g * F.normalize(wide(self.weight_v), dim=1).to(self.weight_v.dtype)
        return F.linear(x, weight)


class DINOHead(nn.Module):
    r"""The head of DINO: a perceptron, normalisation, and a linear layer whose rows have length 1.

    .. math:: y_k = g_k \, \frac{v_k}{\|v_k\|} \cdot \frac{h}{\|h\|}, \qquad h = W_3 \, a(W_2 \, a(W_1 x))

    with a = GELU; g = 1 is not trained, so that logits are cosines.

    Parameters
    ----------
    in_features : int
    out_features : int
        The number of prototypes K.
    hidden_features, bottleneck_features : int
    num_layers : int
        Of the perceptron, >= 1.
    batch_norm : bool
        After the hidden layers; for convolutional networks.
    norm_last_layer : bool
        Keep g = 1. False trains g, which can be better for small transformers and is less stable.

    Attributes
    ----------
    mlp, last_layer : torch.nn.Module
        ``last_layer.weight_g`` ``[K, 1]`` and ``last_layer.weight_v`` ``[K, bottleneck]``. Names of parameters are
        those of the authors' checkpoints.

    Raises
    ------
    ValueError
        If an argument is not as stated; on a call in training with batch norm, of fewer than two rows.

    References
    ----------
    Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021, arXiv:2104.14294.
    """

    def __init__(
        self, in_features: int, out_features: int = 65536, *, hidden_features: int = 2048,
        bottleneck_features: int = 256, num_layers: int = 3, batch_norm: bool = False, norm_last_layer: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = (*_hidden("DINOHead", in_features, hidden_features, num_layers), bottleneck_features)
        layers: list[nn.Module] = []
        for i, (width, following) in enumerate(pairwise(widths)):
            linear = nn.Linear(width, following)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers.append(linear)
            if i < num_layers - 1:
                layers += [nn.BatchNorm1d(following), nn.GELU()] if batch_norm else [nn.GELU()]
        # one layer stands alone in the authors' checkpoints
        self.mlp = nn.Sequential(*layers) if num_layers > 1 else layers[0]
        self.last_layer = _WeightNormLinear(bottleneck_features, out_features, not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Logits over the prototypes, before any temperature.

        Parameters
        ----------
        x : Tensor [N, in_features]
            Without batch norm ``[..., in_features]``: the tokens of iBOT.

        Returns
        -------
        Tensor [N, out_features]
        """
        _check_rows_of_norm(self, "DINOHead", x)
        x = self.mlp(x)
        return self.last_layer(F.normalize(wide(x), dim=-1).to(x.dtype))


def cancel_gradients(module: nn.Module, step: int, freeze_steps: int) -> None:
    """Drop a module's gradients during the first steps; between ``backward()`` and the optimizer's step.

    The last layer of DINO is held for its first epoch, the prototypes of SwAV for their first 313 steps (or an epoch).
    Unlike ``requires_grad_(False)`` this changes no graph, and suits wrapped, compiled models.

    Parameters
    ----------
    module : torch.nn.Module
    step : int
        The number of the present step (or epoch), from 0.
    freeze_steps : int
        How many steps (or epochs) the module is held for.
    """
    if step < freeze_steps:
        for parameter in module.parameters():
            parameter.grad = None
