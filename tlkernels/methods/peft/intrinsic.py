r"""Training in a random subspace: all weights of a model as a fixed linear function of a few trained numbers.

With the pre-trained weights :math:`\theta_0` (D of them) and the intrinsic parameters :math:`\theta_d` (d of them,
zero at first):

.. math::
    \theta = \theta_0 + P \, \theta_d, \qquad P = S H G \Pi H B ,

where nothing of P is stored but three vectors of length :math:`n`, the next power of two: B has random signs on its
diagonal, H is the Walsh-Hadamard matrix (entries ±1, :math:`H H = n I`), :math:`\Pi` a random permutation, G a normal
diagonal scaled to :math:`\sum_i G_{ii}^2 = n`, and S keeps D of the n rows and divides by :math:`\sqrt{D n}`. Of the
n columns the first d are used. A product costs :math:`O(n \log n)`. The columns are orthonormal on average,

.. math:: \mathrm{E}[P^T P] = I_d ,

because the signs of G are symmetric: :math:`\mathrm{E}[G H S^2 H G] = I / n`. With :math:`D = n` every column has
length 1 exactly. The gradient is :math:`P^T \nabla_\theta L`.

Chunyuan Li, Heerad Farkhoor, Rosanne Liu, Jason Yosinski. *Measuring the Intrinsic Dimension of Objective Landscapes.*
ICLR 2018, arXiv:1804.08838. Armen Aghajanyan, Sonal Gupta, Luke Zettlemoyer. *Intrinsic Dimensionality Explains the
Effectiveness of Language Model Fine-Tuning.* ACL 2021, arXiv:2012.13255. Quoc Le, Tamas Sarlos, Alexander Smola.
*Fastfood - Computing Hilbert Space Expansions in loglinear time.* ICML 2013, arXiv:1408.3060.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tlkernels.methods.finetune.layers import layer_groups
from tlkernels.nn.quantize import _matches

__all__ = ["Fastfood", "IntrinsicModel", "fast_walsh_hadamard"]

_FACTOR_BITS = 6  # H of 2^18 is three products with a 64 x 64 matrix, which fits the first-level cache in float32


def fast_walsh_hadamard(x: Tensor) -> Tensor:
    r"""Multiply the last dimension by the Walsh-Hadamard matrix, in :math:`O(n \log n)`.

    .. math:: y = H_n x, \qquad H_1 = (1), \quad H_{2n} = \begin{pmatrix} H_n & H_n \\ H_n & -H_n \end{pmatrix} .

    Parameters
    ----------
    x : Tensor
        ``[..., n]``, floating point, n a power of two.

    Returns
    -------
    Tensor
        ``[..., n]`` of x's dtype. Not divided by anything: applied twice it multiplies by n. H is symmetric, so the
        gradient of x is the same transform of y's.

    Raises
    ------
    TypeError
        If x is not floating point.
    ValueError
        If n is not a power of two.

    Examples
    --------
    >>> import torch
    >>> fast_walsh_hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([10., -2., -4.,  0.])
    """
    if not x.is_floating_point():
        raise TypeError(f"fast_walsh_hadamard: x has dtype {x.dtype}; expected a floating-point dtype")
    n = x.shape[-1] if x.dim() else 0
    if n < 1 or n & (n - 1):
        raise ValueError(f"fast_walsh_hadamard: x has {n} elements in its last dimension; expected a power of two")
    shape, bits = x.shape, n.bit_length() - 1
    y, done = x.reshape(-1, 1, n), 1
    # H_{ab} = H_a (x) H_b: a group of bits of the index is one product along an axis of its own.
    while bits:
        size = 1 << min(bits, _FACTOR_BITS)
        rest = n // done // size
        y = _hadamard(size, x) @ y.reshape(-1, size, rest)
        done, bits = done * size, bits - (size.bit_length() - 1)
    return y.reshape(shape)


def _hadamard(n: int, like: Tensor) -> Tensor:
    h = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


class Fastfood(nn.Module):
    r"""A random matrix P, ``[out_features, in_features]``, that is never stored: see the module's equation.

    Parameters
    ----------
    in_features : int
        d, >= 1: the intrinsic dimension.
    out_features : int
        D, >= 1: the number of weights.
    seed : int
        Of the signs, the permutation and the normal diagonal. The same on every device: they are drawn on the CPU.

    Attributes
    ----------
    signs : Tensor
        B: int8 ``[n]``, n the next power of two from max(d, D).
    permutation : Tensor
        :math:`\Pi`: int32 ``[n]``; row i of the product is row ``permutation[i]`` of what it permutes.
    gaussian : Tensor
        G: float32 ``[n]`` with a sum of squares of n.

    Raises
    ------
    ValueError
        If a size is less than 1.

    Notes
    -----
    Only the seed needs to be kept: the buffers (nine bytes for each of the n) are not in the ``state_dict()``.

    References
    ----------
    Le, Sarlos, Smola, Fastfood, ICML 2013, arXiv:1408.3060.
    """

    signs: Tensor
    permutation: Tensor
    gaussian: Tensor

    def __init__(self, in_features: int, out_features: int, *, seed: int = 0) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"Fastfood: {name} is {size}; expected >= 1")
        self.in_features, self.out_features, self.seed = in_features, out_features, seed
        n = 1 << (max(in_features, out_features) - 1).bit_length()
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8) * 2 - 1
        gaussian = torch.randn(n, generator=generator)
        permutation = torch.randperm(n, generator=generator, dtype=torch.int32)
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("gaussian", gaussian * (math.sqrt(n) / gaussian.norm()), persistent=False)
        self.register_buffer("permutation", permutation, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``: the product with P, in the input's dtype."""
        if input.shape[-1:] != (self.in_features,):
            got = input.shape[-1] if input.dim() else 0
            raise ValueError(f"Fastfood: input has {got} features; expected {self.in_features}")
        n = self.signs.numel()
        x = nn.functional.pad(input, (0, n - self.in_features)) * self.signs
        x = fast_walsh_hadamard(x).index_select(-1, self.permutation) * self.gaussian.to(input.dtype)
        return fast_walsh_hadamard(x)[..., : self.out_features] / math.sqrt(self.out_features * n)

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the matrix."""
        return f"in_features={self.in_features}, out_features={self.out_features}, seed={self.seed}"


class IntrinsicModel(nn.Module):
    r"""A model whose weights move only in a random subspace of a given dimension.

    .. math:: \theta_i = \theta_{0,i} + \sqrt{D_i / D} \, P_i \, \theta_d \qquad \text{(DID)}

    for every parameter tensor i with :math:`D_i` of the :math:`D` weights, each with a `Fastfood` matrix of its own.
    Stacked, they are one P with :math:`\mathrm{E}[P^T P] = I`. The structure-aware variant gives a number of the d to
    each layer :math:`l(i)` for the size of its step:

    .. math:: \theta_i = \theta_{0,i} + \lambda_{l(i)} \sqrt{D_i / D} \, P_i \, \theta_{d - m} \qquad \text{(SAID)}

    Parameters
    ----------
    model : torch.nn.Module
        Frozen here: `restore` gives back its ``requires_grad`` flags. Its weights stay :math:`\theta_0`.
    dimension : int
        d: how many numbers are trained, for SAID the :math:`\lambda` among them.
    modules_to_save : sequence of str
        Patterns (``fnmatch``) of parameters, or of modules around them, by full name or its last parts: these are
        trained directly, as a new head is. They stay parameters of the model.
    structure_aware : bool
        SAID instead of DID. Layers are those of `tlkernels.methods.finetune.layer_groups`.
    seed : int
        Of the matrices.

    Attributes
    ----------
    theta : torch.nn.Parameter
        ``[d]``, or ``[d - m]`` for SAID: zero at first, so the model is at :math:`\theta_0`.
    layer_scale : torch.nn.Parameter or None
        :math:`\lambda`, ``[m]``, one at first.
    model : torch.nn.Module

    Raises
    ------
    TypeError
        If `model` is not a module.
    ValueError
        If `dimension` is out of range, or a pattern matches nothing, or nothing is left to project.

    Notes
    -----
    A call computes all weights anew: :math:`O(D \log D)` beyond the call itself. `merge` writes them into the model.

    The intrinsic dimension of a task at level a (0.9 in both papers) is the smallest d whose solution reaches a times
    the score of training all weights.

    References
    ----------
    Li et al., ICLR 2018, arXiv:1804.08838. Aghajanyan et al., ACL 2021, arXiv:2012.13255.

    Examples
    --------
    >>> import torch
    >>> model = IntrinsicModel(torch.nn.Linear(100, 10), 20)
    >>> [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    [('theta', 20)]
    """

    def __init__(
        self, model: nn.Module, dimension: int, *, modules_to_save: Sequence[str] = (), structure_aware: bool = False,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"IntrinsicModel: model is a {type(model).__name__}; expected a torch.nn.Module")
        named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        for pattern in modules_to_save:
            if not any(_matches(name, [pattern]) for name in named):
                raise ValueError(f"IntrinsicModel: modules_to_save has {pattern!r}, which matches no parameter")
        saved = {name for name in named if _matches(name, modules_to_save)}
        projected = {name: p for name, p in named.items() if name not in saved and p.numel()}
        if not projected:
            raise ValueError("IntrinsicModel: no parameter is left to project; expected at least one")
        total = sum(p.numel() for p in projected.values())
        groups = layer_groups(model) if structure_aware else []
        layer_of = {name: i for i, group in enumerate(groups) for name in group.parameters if name in projected}
        used = sorted(set(layer_of.values()))
        if not 1 <= dimension - len(used) <= total:
            of = f", {len(used)} of them for the layers' scales" if structure_aware else ""
            low, high = 1 + len(used), total + len(used)
            raise ValueError(f"IntrinsicModel: dimension is {dimension}; expected {low} to {high}{of}")
        first = next(iter(projected.values()))
        self.dimension, self.seed = dimension, seed
        self.theta = nn.Parameter(torch.zeros(dimension - len(used), device=first.device, dtype=torch.float32))
        self.layer_scale = nn.Parameter(torch.ones(len(used), device=first.device)) if structure_aware else None
        self._layer_of = {name: used.index(layer) for name, layer in layer_of.items()}
        seeds = torch.randint(2**62, (len(projected),), generator=torch.Generator().manual_seed(seed)).tolist()
        self._names = list(projected)
        self.projections = nn.ModuleList(
            Fastfood(self.theta.numel(), p.numel(), seed=s).to(p.device)
            for p, s in zip(projected.values(), seeds, strict=True)
        )
        self._total = total
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            if p.is_floating_point():
                p.requires_grad_(name in saved)
        self.model = model

    def deltas(self) -> dict[str, Tensor]:
        r"""What is added to each weight, :math:`\theta_i - \theta_{0,i}`: differentiable, by the parameter's name."""
        parameters = dict(self.model.named_parameters())
        deltas = {}
        for name, projection in zip(self._names, self.projections, strict=True):
            p = parameters[name]
            delta = projection(self.theta.to(p.device)) * math.sqrt(p.numel() / self._total)
            if self.layer_scale is not None:
                delta = delta * self.layer_scale[self._layer_of[name]].to(p.device)
            deltas[name] = delta.view(p.shape).to(p.dtype)
        return deltas

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model at the present weights."""
        parameters = dict(self.model.named_parameters())
        weights = {name: parameters[name] + delta for name, delta in self.deltas().items()}
        return torch.func.functional_call(self.model, weights, args, kwargs)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        r"""Write the present weights into the model and start from there: :math:`\theta_d` is zero afterwards.

        Returns
        -------
        torch.nn.Module
            The model, with the flags that `restore` gives it.
        """
        parameters, deltas = dict(self.model.named_parameters()), self.deltas()
        torch._foreach_add_([parameters[name] for name in deltas], list(deltas.values()))
        self.theta.zero_()
        if self.layer_scale is not None:
            self.layer_scale.fill_(1.0)
        return self.restore()

    def restore(self) -> nn.Module:
        """Give the model's parameters the ``requires_grad`` flags that they had, and return the model."""
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._flags[name])
        return self.model

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the model."""
        return f"dimension={self.dimension}, weights={self._total}, seed={self.seed}"
