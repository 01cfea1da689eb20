r"""Two towers with one space for both: CLIP, SigLIP, ALIGN, and LiT with a locked tower.

Images and texts go through an encoder each, optionally a projection, and become embeddings x and y of length 1. Their
similarity counts with a learned scale s, in SigLIP also with a learned bias b:

.. math::
    z_{ij} = s \, x_i \cdot y_j + b .

=========  =======================================  =========================  ===============================
\          loss                                     learned                    at first
=========  =======================================  =========================  ===============================
CLIP       `ops.info_nce`, both directions          :math:`\log s`             s = 1 / 0.07, at most 100
SigLIP     `ops.sigmoid_contrastive`                :math:`\log s` and b       s = 10, b = -10
ALIGN      CLIP's with label smoothing 0.1          :math:`\tau = 1 / s`       :math:`\tau` = 1
LiT        CLIP's; one tower is a `LockedTower`     as CLIP                    as CLIP
=========  =======================================  =========================  ===============================

No loss here stores the N x N logits.

Alec Radford et al. *Learning Transferable Visual Models From Natural Language Supervision.* ICML 2021,
arXiv:2103.00020. Xiaohua Zhai et al. *Sigmoid Loss for Language Image Pre-Training.* ICCV 2023, arXiv:2303.15343. Chao
Jia et al. *Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision.* ICML 2021,
arXiv:2102.05918. Xiaohua Zhai et al. *LiT: Zero-Shot Transfer with Locked-image text Tuning.* CVPR 2022,
arXiv:2111.07991.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tlkernels import ops
from tlkernels.methods._common import accumulator, normalized
from tlkernels.ops._common import no_autocast

__all__ = ["LockedTower", "TwoTower", "TwoTowerOutput", "linear_projection"]


class TwoTowerOutput(NamedTuple):
    """What a `TwoTower` returns: all that a loss needs, so that it also works behind wrappers such as DDP."""

    #: ``[N, D]``
    image_embeds: Tensor
    #: ``[M, D]``
    text_embeds: Tensor
    #: s itself, not its logarithm: 0-d
    logit_scale: Tensor
    #: b: 0-d, or None
    logit_bias: Tensor | None


class LockedTower(nn.Module):
    """A frozen encoder, as LiT has it: never trained, always in evaluation mode, and outside every graph.

    ``train()`` on a model around it does not reach it, so its batch norms and dropout stay as in evaluation, and its
    forward pass keeps no activations.

    Parameters
    ----------
    module : torch.nn.Module
        Its parameters lose ``requires_grad`` until `unlock`.

    Raises
    ------
    TypeError
        If `module` is no module.

    References
    ----------
    Zhai et al., LiT, CVPR 2022, arXiv:2111.07991.

    Examples
    --------
    >>> import torch
    >>> tower = LockedTower(torch.nn.Linear(2, 2)).train()
    >>> tower.module.training, tower(torch.ones(1, 2)).requires_grad
    (False, False)
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"LockedTower: module is a {type(module).__name__}; expected a torch.nn.Module")
        super().__init__()
        self._trainable = [name for name, p in module.named_parameters() if p.requires_grad]
        self.module = module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> LockedTower:
        """Only this wrapper takes `mode`; the encoder stays in evaluation."""
        self.training = mode
        self.module.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the encoder returns, without a graph."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def unlock(self) -> nn.Module:
        """Return the encoder with the ``requires_grad`` that it came with, in this wrapper's mode."""
        parameters = dict(self.module.named_parameters())
        for name in self._trainable:
            parameters[name].requires_grad_(True)
        return self.module.train(self.training)


def linear_projection(
    in_features: int, embed_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Linear:  # fmt: skip
    """CLIP's projection: linear without bias, drawn with standard deviation ``in_features ** -0.5``.

    Parameters
    ----------
    in_features, embed_dim : int
    device, dtype
        As for `torch.nn.Linear`.

    Returns
    -------
    torch.nn.Linear
        From ``[..., in_features]`` to ``[..., embed_dim]``.

    Raises
    ------
    ValueError
        If a size is not positive.
    """
    for name, size in (("in_features", in_features), ("embed_dim", embed_dim)):
        if size < 1:
            raise ValueError(f"linear_projection: {name} is {size}; expected >= 1")
    layer = nn.Linear(in_features, embed_dim, bias=False, device=device, dtype=dtype)
    nn.init.normal_(layer.weight, std=in_features**-0.5)
    return layer


class TwoTower(nn.Module):
    r"""Two encoders with one embedding space, a learned scale, and the loss that trains them.

    Parameters
    ----------
    image_encoder, text_encoder : torch.nn.Module
        Any two modules. Each returns embeddings ``[N, features]``, or an object with such a ``pooler_output``, as the
        models of transformers do. A `LockedTower` is not trained.
    image_projection, text_projection : torch.nn.Module, optional
        From the encoder's features to the D that both have in common, e.g. `linear_projection`.
    objective : {"softmax", "sigmoid"}
        CLIP's loss or SigLIP's.
    logit_scale : float
        s at first, > 0.
    logit_bias : float, optional
        b at first; it is learned. By default there is none; the sigmoid loss needs one.
    learn : {"log_scale", "temperature"}
        What the parameter is: ``self.logit_scale`` with the value :math:`\log s`, or ``self.temperature`` with the
        value :math:`1 / s`.
    max_logit_scale : float or None
        What `clamp_logit_scale` keeps s to; >= `logit_scale`.
    label_smoothing : float in [0, 1]
        For the softmax loss.
    decoupled : bool
        Leave the positive pair out of the softmax's sums (DCL).
    normalize : bool
        Whether embeddings are scaled to length 1.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    `clip`, `siglip` and `align` are the defaults of these papers. As in CLIP, the bound on s changes the parameter, not
    the forward pass, where it would stop the gradient: call `clamp_logit_scale` after each optimizer step, or
    `clamp_after` once. Without that s grows as it likes.

    References
    ----------
    Radford et al., ICML 2021, arXiv:2103.00020; Zhai et al., ICCV 2023, arXiv:2303.15343; Jia et al., ICML 2021,
    arXiv:2102.05918; Zhai et al., CVPR 2022, arXiv:2111.07991; Yeh et al., ECCV 2022, arXiv:2110.06848 (DCL).

    Examples
    --------
    >>> import torch
    >>> model = TwoTower(torch.nn.Linear(8, 4), torch.nn.Linear(6, 4))
    >>> output = model(torch.randn(5, 8), torch.randn(5, 6))
    >>> output.image_embeds.shape, round(output.logit_scale.item(), 2)
    (torch.Size([5, 4]), 14.29)
    >>> model.loss(output).backward()
    """

    def __init__(
        self, image_encoder: nn.Module, text_encoder: nn.Module, *, image_projection: nn.Module | None = None,
        text_projection: nn.Module | None = None, objective: Literal["softmax", "sigmoid"] = "softmax",
        logit_scale: float = 1 / 0.07, logit_bias: float | None = None,
        learn: Literal["log_scale", "temperature"] = "log_scale", max_logit_scale: float | None = 100.0,
        label_smoothing: float = 0.0, decoupled: bool = False, normalize: bool = True,
    ) -> None:  # fmt: skip
        op = type(self).__name__
        modules = {
            "image_encoder": image_encoder, "text_encoder": text_encoder, "image_projection": image_projection,
            "text_projection": text_projection,
        }  # fmt: skip
        for name, module in modules.items():
            if not isinstance(module, nn.Module) and (module is not None or name.endswith("encoder")):
                raise TypeError(f"{op}: {name} is a {type(module).__name__}; expected a torch.nn.Module")
        if objective not in ("softmax", "sigmoid"):
            raise ValueError(f"{op}: objective is {objective!r}; expected 'softmax' or 'sigmoid'")
        if learn not in ("log_scale", "temperature"):
            raise ValueError(f"{op}: learn is {learn!r}; expected 'log_scale' or 'temperature'")
        if not 0 < logit_scale < math.inf:
            raise ValueError(f"{op}: logit_scale is {logit_scale}; expected > 0 and finite")
        if max_logit_scale is not None and not max_logit_scale >= logit_scale:
            raise ValueError(
                f"{op}: max_logit_scale is {max_logit_scale}; expected at least logit_scale, {logit_scale}, or None"
            )
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"{op}: label_smoothing is {label_smoothing}; expected 0 <= label_smoothing <= 1")
        if objective == "sigmoid" and logit_bias is None:
            raise ValueError(f"{op}: logit_bias is None with objective 'sigmoid'; expected a number, such as -10")
        if objective == "sigmoid" and (label_smoothing or decoupled):
            name = "label_smoothing" if label_smoothing else "decoupled"
            raise ValueError(f"{op}: {name} is set with objective 'sigmoid'; expected it with 'softmax' only")
        super().__init__()
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.image_projection, self.text_projection = image_projection, text_projection
        self.objective, self.max_logit_scale = objective, max_logit_scale
        self.label_smoothing, self.decoupled, self.normalize = label_smoothing, decoupled, normalize
        self.logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale))) if learn == "log_scale" else None
        self.temperature = nn.Parameter(torch.tensor(1 / logit_scale)) if learn == "temperature" else None
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(float(logit_bias)))

    @classmethod
    def clip(cls, image_encoder: nn.Module, text_encoder: nn.Module, **options: Any) -> TwoTower:
        """CLIP: the defaults of the constructor."""
        return cls(image_encoder, text_encoder, **options)

    @classmethod
    def siglip(cls, image_encoder: nn.Module, text_encoder: nn.Module, **options: Any) -> TwoTower:
        """SigLIP: the sigmoid loss, a scale of 10 and a bias of -10 at first, and no bound on the scale."""
        defaults: dict[str, Any] = {"objective": "sigmoid", "logit_scale": 10.0, "logit_bias": -10.0}
        defaults["max_logit_scale"] = None
        return cls(image_encoder, text_encoder, **(defaults | options))

    @classmethod
    def align(cls, image_encoder: nn.Module, text_encoder: nn.Module, **options: Any) -> TwoTower:
        """ALIGN: the temperature itself is learned, from 1, and the labels are smoothed with 0.1.

        The paper adds the losses of the two directions where ours, as CLIP's, is their mean.
        """
        defaults: dict[str, Any] = {"learn": "temperature", "logit_scale": 1.0, "label_smoothing": 0.1}
        return cls(image_encoder, text_encoder, **(defaults | options))

    def encode_image(self, image: Any) -> Tensor:
        """The embeddings ``[N, D]`` of images.

        Parameters
        ----------
        image : Any
            What the image encoder takes: a mapping is given as keyword arguments, a tuple as arguments, anything else
            as the one argument.

        Raises
        ------
        TypeError, ValueError
            If the encoder returns no embeddings.
        """
        return self._embed("image", self.image_encoder, self.image_projection, image)

    def encode_text(self, text: Any) -> Tensor:
        """The embeddings ``[M, D]`` of texts; as `encode_image`."""
        return self._embed("text", self.text_encoder, self.text_projection, text)

    def _embed(self, which: str, encoder: nn.Module, projection: nn.Module | None, given: Any) -> Tensor:
        if isinstance(given, Mapping):
            output = encoder(**given)
        else:
            output = encoder(*given) if isinstance(given, tuple) else encoder(given)
        features = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
        if not isinstance(features, Tensor):
            raise TypeError(
                f"{type(self).__name__}: {which}_encoder returns a {type(output).__name__}; expected a tensor, or an "
                "object with a pooler_output"
            )
        if projection is not None:
            features = projection(features)
        if features.dim() != 2:
            raise ValueError(
                f"{type(self).__name__}: the {which} embeddings have shape {tuple(features.shape)}; expected (N, D)"
            )
        return normalized(features) if self.normalize else features

    def scale(self) -> Tensor:
        """s as it is now: 0-d, differentiable."""
        if self.temperature is not None:
            return 1.0 / self.temperature
        assert self.logit_scale is not None
        return self.logit_scale.exp()

    def forward(self, image: Any, text: Any) -> TwoTowerOutput:
        """Embed images and texts; arguments as for `encode_image` and `encode_text`."""
        return TwoTowerOutput(self.encode_image(image), self.encode_text(text), self.scale(), self.logit_bias)

    def logits(self, output: TwoTowerOutput) -> Tensor:
        """The logits ``[N, M]`` of every pair, float32 or float64, for predictions; losses do not need them."""
        x, y, scale, bias = output
        acc = accumulator(torch.promote_types(x.dtype, y.dtype))
        with no_autocast(x.device):
            z = scale * (x.to(acc) @ y.to(acc).T)
            return z if bias is None else z + bias

    def loss(
        self, output: TwoTowerOutput, *, labels: Tensor | None = None, image_negatives: Tensor | None = None,
        text_negatives: Tensor | None = None, reduction: str = "mean",
    ) -> Tensor:  # fmt: skip
        """The loss of a batch whose image i belongs to text i.

        Parameters
        ----------
        output : TwoTowerOutput
            N images and M >= N texts.
        labels : integer Tensor [N], optional
            The text of each image, if not the one of the same number; -100 for none.
        image_negatives, text_negatives : Tensor [K, D], optional
            More embeddings that belong to no pair, e.g. `PairQueue.negatives`, of any floating dtype; for the softmax
            loss.
        reduction : "mean", "sum" or "none"

        Returns
        -------
        Tensor
            As `ops.info_nce` and `ops.sigmoid_contrastive` return it.

        Raises
        ------
        TypeError, ValueError, IndexError
            As these.
        """
        x, y, scale, bias = output
        common = torch.promote_types(x.dtype, y.dtype)  # under autocast, towers may end in different dtypes
        x, y = x.to(common), y.to(common)
        if self.objective == "softmax":
            # a queue keeps its dtype where autocast gives the towers another one
            image_negatives, text_negatives = (
                more.to(common) if isinstance(more, Tensor) else more for more in (image_negatives, text_negatives)
            )
            return ops.info_nce(
                x, y, scale, bias, labels, x_negatives=image_negatives, y_negatives=text_negatives,
                decoupled=self.decoupled, label_smoothing=self.label_smoothing, reduction=reduction,
            )  # fmt: skip
        if image_negatives is not None or text_negatives is not None:
            raise ValueError(
                f"{type(self).__name__}: negatives are given with objective 'sigmoid'; expected 'softmax' for them"
            )
        assert bias is not None
        return ops.sigmoid_contrastive(x, y, scale, bias, labels=labels, reduction=reduction)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Bring the parameter back to where s is at most `max_logit_scale`; after each optimizer step."""
        if self.max_logit_scale is None:
            return
        if self.logit_scale is not None:
            self.logit_scale.clamp_(max=math.log(self.max_logit_scale))
        if self.temperature is not None:
            self.temperature.clamp_(min=1 / self.max_logit_scale)

    def clamp_after(self, optimizer: Optimizer) -> RemovableHandle:
        """Let every ``optimizer.step()`` end with `clamp_logit_scale`.

        Returns
        -------
        RemovableHandle
            Its ``remove()`` ends that.
        """
        return optimizer.register_step_post_hook(lambda *_: self.clamp_logit_scale())

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the settings."""
        return f"objective={self.objective!r}, max_logit_scale={self.max_logit_scale}"
