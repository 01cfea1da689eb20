r"""(IA)^3: a frozen linear layer with a learned factor for every feature of its output, or of its input.

.. math::
    y = l \circ (x W^T + b) \quad\text{(keys and values)}, \qquad
    y = (l \circ x) W^T + b \quad\text{(the second layer of a feed-forward block)} .

:math:`l` is a vector of ones at first, and all that is trained.

Haokun Liu, Derek Tam, Mohammed Muqeeth, Jay Mohta, Tenghao Huang, Mohit Bansal, Colin Raffel. *Few-Shot
Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning.* NeurIPS 2022, arXiv:2205.05638.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tlkernels.methods.peft._dense import DenseTuner, adapter_dtype, device_of
from tlkernels.methods.peft._tuner import TunerConfig, has_suffix

__all__ = ["IA3Config", "IA3Linear"]


class IA3Linear(DenseTuner):
    r"""A frozen linear layer, rescaled: :math:`l \circ f(x)`, or :math:`f(l \circ x)` where `feedforward` is set.

    Parameters
    ----------
    base_layer : torch.nn.Module
        A linear layer.
    feedforward : bool
        Rescale the input instead of the output.

    Attributes
    ----------
    scale : torch.nn.Parameter
        l: ``[in_features]`` where `feedforward` is set, else ``[out_features]``; ones at first. Of the layer's dtype,
        float32 for layers in 16 bits or less.

    Raises
    ------
    TypeError
        If `base_layer` is no linear layer.

    Notes
    -----
    Merged, :math:`W' = \mathrm{diag}(l) W` and :math:`b' = l \circ b`, or :math:`W' = W \mathrm{diag}(l)`.

    References
    ----------
    Liu et al., NeurIPS 2022, arXiv:2205.05638.
    """

    def __init__(self, base_layer: nn.Module, *, feedforward: bool = False) -> None:
        super().__init__(base_layer)
        self.feedforward = feedforward
        size = self.in_features if feedforward else self.out_features
        self.scale = nn.Parameter(torch.ones(size, dtype=adapter_dtype(base_layer), device=device_of(base_layer)))

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``, of the base layer's dtype."""
        if self.merged:
            return self.base_layer(input)
        if self.feedforward:
            return self.base_layer((input * self.scale).to(input.dtype))
        output = self.base_layer(input)
        return (output * self.scale).to(output.dtype)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The weight with the factors in its columns or rows."""
        return weight * (self.scale if self.feedforward else self.scale[:, None])

    def merged_bias(self, bias: Tensor) -> Tensor:
        """The bias, rescaled where the output is."""
        return bias if self.feedforward else bias * self.scale

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the layer."""
        return f"{self.in_features}, {self.out_features}, feedforward={self.feedforward}"


@dataclass(frozen=True, kw_only=True)
class IA3Config(TunerConfig):
    """What (IA)^3 does with a model.

    Attributes
    ----------
    target_modules : str or sequence of str
        As for `TunerConfig`: the projections of keys and values, and the second layers of the feed-forward blocks.
        In BERT ``["key", "value", "output.dense"]``, in Llama ``["k_proj", "v_proj", "down_proj"]``.
    feedforward_modules : str or sequence of str
        Which of these are rescaled at their input, in the same notation.

    References
    ----------
    Liu et al., NeurIPS 2022, arXiv:2205.05638.

    Examples
    --------
    >>> config = IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])
    """

    feedforward_modules: str | Sequence[str] = ()

    def check(self) -> None:
        """Raise if a field has a value that it cannot have."""
        super().check()
        self._check_names("feedforward_modules", self.feedforward_modules)
        if not isinstance(self.target_modules, str) and not isinstance(self.feedforward_modules, str):
            extra = [m for m in self.feedforward_modules if not any(has_suffix(m, [t]) for t in self.target_modules)]
            if extra:
                self._fail("feedforward_modules", f"some of target_modules; {extra[0]!r} is not among them")

    def wrap(self, name: str, module: nn.Module) -> IA3Linear:
        """Build the `IA3Linear` for a linear layer.

        Raises
        ------
        TypeError
            If it is none.
        """
        which = self.feedforward_modules
        inner = re.fullmatch(which, name) is not None if isinstance(which, str) else has_suffix(name, which)
        try:
            return IA3Linear(module, feedforward=inner)
        except TypeError as error:
            raise TypeError(f"IA3Config: {name}: {error}") from error
