r"""O-LoRA: each task's low-rank update reads a subspace orthogonal to those of the tasks before it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tlkernels import ops
from tlkernels.methods.continual._base import ContinualMethod, check_number, zero
from tlkernels.nn.lora import LoRALinear

__all__ = ["OLoRA"]


class OLoRA(ContinualMethod):
    r"""Orthogonal low-rank adaptation of the `LoRALinear` layers of a model.

    Parameters
    ----------
    model : torch.nn.Module
        With one `tlkernels.nn.lora.LoRALinear` at least, unmerged, over a dense ``nn.Linear`` and without a bias of its
        own.
    weight : float
        >= 0, the weight :math:`\lambda_1` of the orthogonality term. Default 0.5.
    generator : torch.Generator, optional
        CPU. For the new factors of the next task; seed 0 by default.

    Attributes
    ----------
    earlier : dict of str to list of Tensor
        Of each layer the factors A ``[rank, in_features]`` of the tasks learned.

    Raises
    ------
    TypeError, ValueError
        If there is no such layer, one is of another kind, or `weight` is out of its range.

    Notes
    -----
    ``penalty`` returns, over the layers and the earlier tasks k of the running task t,

    .. math:: \lambda_1 \sum_{k < t} \sum_{i,j} \big| (A_t A_k^T)_{ij} \big| .

    ``after_task`` adds :math:`\gamma B_t A_t` to the frozen weight, keeps :math:`A_t`, and starts new factors: A
    uniform in :math:`\pm 1 / \sqrt{\mathrm{in\,features}}`, B zero. The outputs stay the same up to the rounding of
    that sum. The state of an optimizer belongs to the old factors: make a new one.

    ``state_dict`` has the earlier factors; weights and factors are in the model's own.

    References
    ----------
    Wang et al., Orthogonal Subspace Learning for Language Model Continual Learning, EMNLP Findings 2023,
    arXiv:2310.14152.
    """

    def __init__(self, model: nn.Module, weight: float = 0.5, *, generator: torch.Generator | None = None) -> None:
        super().__init__(model)
        self.weight = check_number(self._op, "weight", weight)
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
        if not self._layers:
            raise ValueError(f"{self._op}: model has no LoRALinear; expected one at least")
        for name, layer in self._layers.items():
            if type(layer) is not LoRALinear or type(layer.base_layer) is not nn.Linear or layer.lora_bias is not None:
                raise TypeError(f"{self._op}: layer {name!r} is another kind; expected LoRALinear over a dense Linear")
        self._unmerged()
        self.earlier: dict[str, list[Tensor]] = {name: [] for name in self._layers}

    def _unmerged(self) -> None:
        for name, layer in self._layers.items():
            if layer.merged:
                raise ValueError(f"{self._op}: layer {name!r} is merged; expected unmerged layers")

    def penalty(self, inputs: Any = None, outputs: Tensor | None = None) -> Tensor:
        """Return the orthogonality term, differentiable in the running task's factors A."""
        total = zero(self.model)
        for name, layer in self._layers.items():
            if self.earlier[name]:
                known = torch.cat(self.earlier[name]).to(layer.lora_A)
                total = total + (layer.lora_A @ known.T).abs().sum()
        return self.weight * total

    @torch.no_grad()
    def after_task(self, loader: Iterable[Any] | None = None) -> None:
        """Add the task's update to the frozen weights and start new factors.

        Raises
        ------
        ValueError
            If a factor is not finite or a layer is merged; nothing has changed then.
        """
        self._unmerged()
        for name, layer in self._layers.items():
            if not (layer.lora_A.isfinite().all() and layer.lora_B.isfinite().all()):
                raise ValueError(f"{self._op}: the factors of {name!r} are not finite; expected finite ones")
        for name, layer in self._layers.items():
            self.earlier[name].append(layer.lora_A.detach().clone())
            base: Any = layer.base_layer
            ops.lora_merge_(base.weight.detach(), layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling)
            drawn = torch.rand(layer.lora_A.shape, generator=self.generator, dtype=torch.float64)
            layer.lora_A.copy_((2 * drawn - 1) / math.sqrt(layer.in_features))
            layer.lora_B.zero_()
        super().after_task(loader)

    def _state(self) -> dict[str, Any]:
        return {"earlier": self.earlier, "generator": self.generator.get_state()}

    def _load(self, state: dict[str, Any]) -> None:
        earlier = state["earlier"]
        if earlier.keys() != self._layers.keys() or any(
            a.shape[1] != self._layers[name].in_features for name, factors in earlier.items() for a in factors
        ):
            raise ValueError(f"{self._op}: earlier of state_dict is of other layers; expected those of the model")
        self.generator.set_state(state["generator"])
        self.earlier = earlier
