r"""VeRA: an update of low rank whose factors are random, frozen and shared by all layers; two vectors are trained.

With the shared :math:`A` (``[r, in]``) and :math:`B` (``[out, r]``), and :math:`d` (``[r]``) and :math:`b` (``[out]``)
of each layer:

.. math::
    u = x A^T, \qquad y = x W^T + \mathrm{bias} + b \circ \big( (d \circ u) B^T \big) ,

    dz = (b \circ dy) B, \qquad \nabla d = \sum_\mathrm{rows} dz \circ u, \qquad
    \nabla b = \mathrm{diag}\big( dy^T (d \circ u) B^T \big), \qquad dx = dy \, W + (d \circ dz) A .

As A and B are frozen, :math:`u` (``[rows, r]``) is all that the update keeps for the backward pass.

Dawid Kopiczko, Tijmen Blankevoort, Yuki Asano. *VeRA: Vector-based Random Matrix Adaptation.* ICLR 2024,
arXiv:2310.11454.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tlkernels.methods.peft._dense import DenseTuner, adapter_dtype, device_of, linear_features
from tlkernels.methods.peft._tuner import TunerConfig
from tlkernels.nn.nf4 import _autocast_dtype
from tlkernels.ops._common import no_autocast

__all__ = ["VeraConfig", "VeraLinear", "VeraProjection"]


class VeraProjection(nn.Module):
    r"""The frozen factors that all layers of a model share; a layer takes the columns and rows that it needs.

    Parameters
    ----------
    rank : int
        r, >= 1.
    in_features, out_features : int
        The largest of any layer.
    seed : int
        Both are drawn from it on the CPU, A first, with Kaiming's uniform distribution: entries of A up to
        :math:`\sqrt{6 / \mathrm{in}}` in magnitude, of B up to :math:`\sqrt{6 / r}`. The PEFT library makes the same
        matrices from the same ``projection_prng_key``.

    Attributes
    ----------
    a : Tensor
        float32 ``[rank, in_features]``.
    b : Tensor
        float32 ``[out_features, rank]``. Neither is in the ``state_dict()``: the seed gives them back.

    Raises
    ------
    ValueError
        If a size is less than 1.
    """

    a: Tensor
    b: Tensor

    def __init__(self, rank: int, in_features: int, out_features: int, *, seed: int = 0) -> None:
        super().__init__()
        for name, size in (("rank", rank), ("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"VeraProjection: {name} is {size}; expected >= 1")
        self.rank, self.seed = rank, seed
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("a", (rank, in_features)), ("b", (out_features, rank))):
            # The bound in two steps, as PEFT's code has it: rounded otherwise the matrices differ in the last bit.
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
            self.register_buffer(name, torch.empty(shape).uniform_(-bound, bound, generator=generator), False)

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the factors."""
        return f"rank={self.rank}, a={tuple(self.a.shape)}, b={tuple(self.b.shape)}, seed={self.seed}"


class VeraLinear(DenseTuner):
    """A frozen linear layer with an update of shared random factors and two trained vectors of its own.

    Parameters
    ----------
    base_layer : torch.nn.Module
        A linear layer.
    projection : VeraProjection
        As large as the layer, or larger.
    d_initial : float
        The initial value of `scale_d`.
    dropout : float
        Of the update's input, 0 <= dropout < 1.

    Attributes
    ----------
    scale_d : torch.nn.Parameter
        d: ``[rank]``, `d_initial` at first. Of the layer's dtype, float32 for layers in 16 bits or less.
    scale_b : torch.nn.Parameter
        b: ``[out_features]``, zeros at first: the layer then computes what it did.

    Raises
    ------
    TypeError
        If `base_layer` is no linear layer.
    ValueError
        If the projection is too small, or `dropout` out of range.

    Notes
    -----
    The update cannot be differentiated twice; torch says so when it is tried.

    References
    ----------
    Kopiczko et al., ICLR 2024, arXiv:2310.11454.
    """

    def __init__(
        self, base_layer: nn.Module, projection: VeraProjection, *, d_initial: float = 0.1, dropout: float = 0.0
    ) -> None:
        super().__init__(base_layer)
        largest = projection.a.shape[1], projection.b.shape[0]
        if self.in_features > largest[0] or self.out_features > largest[1]:
            raise ValueError(
                f"VeraLinear: projection is for up to {largest[0]} inputs and {largest[1]} outputs; expected at least "
                f"{self.in_features} and {self.out_features}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"VeraLinear: dropout is {dropout}; expected 0 <= dropout < 1")
        self.projection, self.dropout = projection, dropout
        where: dict[str, Any] = {"dtype": adapter_dtype(base_layer), "device": device_of(base_layer)}
        self.scale_d = nn.Parameter(torch.full((projection.rank,), d_initial, **where))
        self.scale_b = nn.Parameter(torch.zeros(self.out_features, **where))

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (
            self.projection.a[:, : self.in_features].to(self.scale_d.device, dtype),
            self.projection.b[: self.out_features].to(self.scale_d.device, dtype),
        )

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``, of the base layer's dtype."""
        output = self.base_layer(input)
        if self.merged:
            return output
        x = nn.functional.dropout(input, self.dropout, self.training).to(_autocast_dtype(input) or input.dtype)
        a, b = self._factors(x.dtype)
        with no_autocast(x.device):
            update = _Update.apply(x, a, b, self.scale_d.to(x.dtype), self.scale_b.to(x.dtype))
        return output + update.to(output.dtype)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The weight plus the update, diag(b) B diag(d) A."""
        a, b = self._factors(weight.dtype)
        d, scale_b = self.scale_d.to(weight.dtype), self.scale_b.to(weight.dtype)
        return weight + (scale_b[:, None] * b) @ (d[:, None] * a)

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the layer."""
        return f"{self.in_features}, {self.out_features}, rank={self.projection.rank}, dropout={self.dropout}"


class _Update(torch.autograd.Function):
    """The update alone. Composed of torch's functions it would keep ``[rows, out]`` for the gradient of b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale_d: Tensor, scale_b: Tensor) -> Tensor:
        u = nn.functional.linear(x, a)
        ctx.save_for_backward(u, a, b, scale_d, scale_b)
        return nn.functional.linear(u * scale_d, b).mul_(scale_b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
        u, a, b, scale_d, scale_b = ctx.saved_tensors
        rank = u.shape[-1]
        dz = (grad_output * scale_b) @ b
        grad_d = (dz * u).reshape(-1, rank).sum(0)
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_b = ((rows.T @ (u * scale_d).reshape(-1, rank)) * b).sum(1)
        return (dz * scale_d) @ a if ctx.needs_input_grad[0] else None, None, None, grad_d, grad_b


@dataclass(frozen=True, kw_only=True)
class VeraConfig(TunerConfig):
    """What VeRA does with a model.

    Attributes
    ----------
    target_modules : str or sequence of str
        As for `TunerConfig`: linear layers.
    r : int
        Of the shared factors: 256 by default, more than LoRA's, since it costs r numbers a layer.
    d_initial : float
        The initial value of d.
    vera_dropout : float
        Of the update's input.
    projection_prng_key : int
        The seed of the shared factors.

    References
    ----------
    Kopiczko et al., ICLR 2024, arXiv:2310.11454.
    """

    r: int = 256
    d_initial: float = 0.1
    vera_dropout: float = 0.0
    projection_prng_key: int = 0

    def check(self) -> None:
        """Raise if a field has a value that it cannot have."""
        super().check()
        if self.r < 1:
            self._fail("r", "1 or more")
        if not 0.0 <= self.vera_dropout < 1.0:
            self._fail("vera_dropout", "0 <= dropout < 1")

    def wrap(self, name: str, module: nn.Module) -> nn.Module:
        """Build the `VeraLinear` of a layer alone, with factors of its own size; see `wrap_all`."""
        return self.wrap_all({name: module})[name]

    def wrap_all(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Build the layers, all with one `VeraProjection` of the largest sizes.

        Raises
        ------
        TypeError
            If a module is no linear layer.
        """
        sizes = [linear_features(f"VeraConfig: {name}", module) for name, module in modules.items()]
        if not sizes:
            return {}
        projection = VeraProjection(
            self.r, max(i for i, _ in sizes), max(o for _, o in sizes), seed=self.projection_prng_key
        )
        projection.to(device_of(next(iter(modules.values()))))
        return {
            name: VeraLinear(module, projection, d_initial=self.d_initial, dropout=self.vera_dropout)
            for name, module in modules.items()
        }
