"""What the tuners share whose update makes another dense weight of a linear layer: VeRA, OFT, IA3, AdaLoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tlkernels.methods.peft._tuner import TunerModule, is_conv1d
from tlkernels.nn.lora import BaseWeight

__all__ = ["DenseTuner", "TunedLayer", "adapter_dtype", "device_of", "linear_features"]


def linear_features(owner: str, module: nn.Module) -> tuple[int, int]:
    """``in_features`` and ``out_features`` of a linear layer: torch's, transformers' ``Conv1D``, or a quantized one.

    Raises
    ------
    TypeError
        If it is no linear layer; `owner` stands first in the message.
    """
    if is_conv1d(module):
        return module.nx, module.nf  # type: ignore[return-value]
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(sizes[0], int) or not isinstance(sizes[1], int):
        raise TypeError(f"{owner}: the module is a {type(module).__name__}; expected a linear layer")
    return sizes[0], sizes[1]


def adapter_dtype(module: nn.Module) -> torch.dtype:
    """The dtype to train an adapter of `module` in: the layer's own, but not less than float32."""
    dtypes = [p.dtype for p in module.parameters() if p.is_floating_point()]
    own = getattr(module, "dtype", None)  # of a layer with packed weights
    dtype = own if isinstance(own, torch.dtype) and own.is_floating_point else (dtypes or [torch.float32])[0]
    return torch.promote_types(dtype, torch.float32)


def device_of(module: nn.Module) -> torch.device:
    """Where the tensors of `module` are."""
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


class TunedLayer(TunerModule):
    """A frozen layer in another's place, with the names under which other code looks for its weight and bias."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, without the update unless merged. Not for products: see `BaseWeight`."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        plain = type(weight) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
        return weight.detach().as_subclass(BaseWeight) if plain and not self.merged else weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)


class DenseTuner(TunedLayer):
    """A linear layer and an update that can be written as another dense weight, and another bias.

    While it is merged the layer keeps its first weight aside: `unmerge` puts it back bit for bit.

    Parameters
    ----------
    base_layer : torch.nn.Module
        A linear layer: ``torch.nn.Linear``, transformers' ``Conv1D``, or one with the same call and ``in_features``
        and ``out_features``, such as `tlkernels.nn.NF4Linear` (which cannot be merged into).
    """

    def __init__(self, base_layer: nn.Module) -> None:
        in_features, out_features = linear_features(type(self).__name__, base_layer)
        super().__init__(base_layer)
        self.in_features, self.out_features = in_features, out_features
        self._original: tuple[Tensor, Tensor | None] | None = None

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The weight, ``[out_features, in_features]``, with the update in it. Given in float32 at least."""
        raise NotImplementedError

    def merged_bias(self, bias: Tensor) -> Tensor:
        """The bias with the update in it."""
        return bias

    def check_merge(self) -> None:
        """Raise if the base layer has no dense weight.

        Raises
        ------
        NotImplementedError
            If the weight is not a dense matrix of a floating-point dtype.
        ValueError
            If the adapter has values that are not finite.
        """
        name = type(self).__name__
        for parameter, value in self.adapter_parameters():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name}: {parameter} has values that are not finite; it cannot be merged")
        weight = getattr(self.base_layer, "weight", None)
        shape = (self.in_features, self.out_features)
        shape = shape if is_conv1d(self.base_layer) else shape[::-1]
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or tuple(weight.shape) != shape:
            got = type(self.base_layer).__name__
            raise NotImplementedError(f"{name}: base_layer is a {got}; merging needs a layer with a dense weight")

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update into the base layer's weight and bias, computed in float32 at least, rounded once.

        Does nothing where it is merged already.

        Raises
        ------
        NotImplementedError, ValueError
            As `check_merge`, and if the result is not finite in the weight's dtype; nothing has changed then.
        """
        if self.merged:
            return
        self.check_merge()
        weight, bias = self._dense()
        acc = torch.promote_types(weight.dtype, torch.float32)
        conv1d = is_conv1d(self.base_layer)
        w = self.merged_weight(weight.to(acc).T if conv1d else weight.to(acc))
        b = None if bias is None else self.merged_bias(bias.to(acc)).to(bias.dtype)
        w = w.to(weight.dtype)
        if not bool(torch.isfinite(w).all()) or (b is not None and not bool(torch.isfinite(b).all())):
            raise ValueError(f"{type(self).__name__}.merge: the merged weight is not finite; expected finite values")
        self._original = (weight.detach().clone(), None if bias is None else bias.detach().clone())
        weight.copy_(w.T if conv1d else w)
        if bias is not None and b is not None:
            bias.copy_(b)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the first weight and bias back, bit for bit. Does nothing where it is not merged."""
        if self._original is None:
            return
        weight, bias = self._dense()
        weight.copy_(self._original[0])
        if bias is not None and self._original[1] is not None:
            bias.copy_(self._original[1])
        self._original, self.merged = None, False

    def _dense(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.base_layer.weight, getattr(self.base_layer, "bias", None)
        assert isinstance(weight, Tensor)
        return weight, bias if isinstance(bias, Tensor) else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.merged:
            errors: list[str] = args[-1]
            errors.append(f"{prefix[:-1]}: the update is merged; unmerge before loading a state dict")
        super()._load_from_state_dict(state_dict, prefix, *args)
