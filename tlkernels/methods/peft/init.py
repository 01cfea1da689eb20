r"""Initial values of LoRA's factors, drawn at random or computed from the weight.

With the weight :math:`W` (``[out, in]``), the scaling :math:`\gamma` and the rank :math:`r`:

==============  =====================================================================================================
``True``        :math:`A \sim U(\pm 1/\sqrt{\mathrm{in}})`, :math:`B = 0` (Hu 2022)
``"gaussian"``  :math:`A \sim N(0, 1/r^2)`, :math:`B = 0`
`orthogonal`    :math:`B A = 0` with both random: rows of :math:`A` and columns of :math:`B` mix orthogonal vectors
`pissa`         the :math:`r` largest singular triples: :math:`\gamma B A = U_r S_r V_r^T`; :math:`W - \gamma B A` stays
`olora`         of a QR decomposition :math:`B = Q_{:, :r}`, :math:`A = R_{:r}`; :math:`W - \gamma B A` stays
`loftq`         :math:`W \approx \hat W_4 + \gamma B A`, alternating 4-bit quantization and SVD
==============  =====================================================================================================

Fanxu Meng, Zhaohui Wang, Muhan Zhang. *PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
Language Models.* NeurIPS 2024, arXiv:2404.02948.
Kerim Büyükakyüz. *OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models.* 2024, arXiv:2406.01775.
Yixiao Li et al. *LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models.* ICLR 2024, arXiv:2310.08659.
"""

from __future__ import annotations

import copy
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tlkernels import ops
from tlkernels.nn.lora import LoRALinear, _LoRAModule
from tlkernels.nn.nf4 import NF4Linear
from tlkernels.ops.nf4 import NF4Weight

__all__ = ["Decomposition", "QuantizedDecomposition", "initialize", "loftq", "olora", "orthogonal", "pissa"]


class Decomposition(NamedTuple):
    """A weight as ``residual + scaling * lora_b @ lora_a``.

    Attributes
    ----------
    lora_a, lora_b : Tensor
        ``[rank, in_features]`` and ``[out_features, rank]``.
    residual : Tensor
        ``[out_features, in_features]``, of the weight's dtype.
    """

    lora_a: Tensor
    lora_b: Tensor
    residual: Tensor


class QuantizedDecomposition(NamedTuple):
    """A weight as about ``weight + scaling * lora_b @ lora_a``, with a 4-bit `weight`.

    Attributes
    ----------
    lora_a, lora_b : Tensor
        ``[rank, in_features]`` and ``[out_features, rank]``.
    weight : NF4Weight
        Of shape ``(out_features, in_features)``.
    """

    lora_a: Tensor
    lora_b: Tensor
    weight: NF4Weight


def _matrix(op: str, weight: Tensor, rank: int) -> Tensor:
    """The weight in float32 (float64 for float64), checked."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{op}: weight is {got}; expected a floating-point matrix")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; expected (out_features, in_features)")
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"{op}: rank is {rank}; expected 1 to min(in_features, out_features) = {min(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{op}: weight has values that are not finite")
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _split(
    weight: Tensor, wide: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype | None
) -> Decomposition:
    """The factors, rounded to `dtype`, and what these leave of the weight."""
    a, b = (t.to(dtype or t.dtype).contiguous() for t in (a, b))
    residual = ops.lora_merge_(wide.clone(memory_format=torch.contiguous_format), a, b, -scaling)
    return Decomposition(a, b, residual.to(weight.dtype))


def _check_scaling(op: str, scaling: float) -> None:
    if not scaling > 0:
        raise ValueError(f"{op}: scaling is {scaling}; expected a number above 0")


def _truncated_svd(wide: Tensor, rank: int, niter: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, rank], S [rank], V^T [rank, in]: the largest singular triples."""
    if niter is None:
        u, s, vt = torch.linalg.svd(wide, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    u, s, v = torch.svd_lowrank(wide, rank, niter=niter)
    return u, s, v.t()


@torch.no_grad()
def pissa(
    weight: Tensor, rank: int, scaling: float = 1.0, *, niter: int | None = None, dtype: torch.dtype | None = None
) -> Decomposition:
    r"""PiSSA: the principal singular triples become the factors, the rest is frozen.

    Parameters
    ----------
    weight : Tensor
        ``[out_features, in_features]``, floating point.
    rank : int
        1 to ``min(in_features, out_features)``.
    scaling : float
        The layer's :math:`\gamma`, above 0.
    niter : int, optional
        Use a randomized SVD with this many power iterations (torch's generator). By default the exact SVD.
    dtype : torch.dtype, optional
        Of the factors; by default float32 (float64 for float64).

    Returns
    -------
    Decomposition

    Raises
    ------
    TypeError, ValueError
        If an argument has another dtype or size than stated, or the weight is not finite.

    Notes
    -----
    :math:`A = \sqrt{S_r / \gamma}\, V_r^T`, :math:`B = U_r \sqrt{S_r / \gamma}`. The signs of a pair of singular
    vectors are arbitrary; products are not.

    References
    ----------
    Meng et al., PiSSA, NeurIPS 2024, arXiv:2404.02948, section 3.
    """
    wide = _matrix("pissa", weight, rank)
    _check_scaling("pissa", scaling)
    if niter is not None and niter < 0:
        raise ValueError(f"pissa: niter is {niter}; expected 0 or more, or None")
    u, s, vt = _truncated_svd(wide, rank, niter)
    root = (s / scaling).sqrt()
    return _split(weight, wide, root[:, None] * vt, u * root, scaling, dtype)


@torch.no_grad()
def olora(weight: Tensor, rank: int, scaling: float = 1.0, *, dtype: torch.dtype | None = None) -> Decomposition:
    r"""OLoRA: the first columns of Q and rows of R become the factors, the rest is frozen.

    Parameters
    ----------
    weight, rank, scaling, dtype
        As for `pissa`.

    Returns
    -------
    Decomposition

    Raises
    ------
    TypeError, ValueError
        As `pissa`.

    Notes
    -----
    With :math:`W = Q R`: :math:`B = Q_{:, :r}` (orthonormal columns), :math:`A = R_{:r}`, and the frozen rest is
    :math:`W - \gamma B A`.

    References
    ----------
    Büyükakyüz, OLoRA, 2024, arXiv:2406.01775, algorithm 1.
    """
    wide = _matrix("olora", weight, rank)
    _check_scaling("olora", scaling)
    q, r = torch.linalg.qr(wide)
    return _split(weight, wide, r[:rank], q[:, :rank], scaling, dtype)


@torch.no_grad()
def loftq(
    weight: Tensor, rank: int, scaling: float = 1.0, *, iterations: int = 1, block_size: int = 64,
    double_quant: bool = False, dtype: torch.dtype | None = None,
) -> QuantizedDecomposition:  # fmt: skip
    r"""LoftQ: a 4-bit weight, and factors that make up for what quantizing lost.

    Parameters
    ----------
    weight, rank, scaling, dtype
        As for `pissa`.
    iterations : int
        1 or more: how often to quantize and decompose. More need not be better.
    block_size, double_quant
        Of the 4-bit format, as for `tlkernels.ops.nf4_quantize`.

    Returns
    -------
    QuantizedDecomposition

    Raises
    ------
    TypeError, ValueError
        As `pissa`.

    Notes
    -----
    From :math:`A_0 = B_0 = 0`, for :math:`t = 1, \dots, T`: :math:`Q_t = q_4(W - \gamma B_{t-1} A_{t-1})`, and
    :math:`\gamma B_t A_t` is the best approximation of rank :math:`r` to :math:`W - Q_t`.

    References
    ----------
    Li et al., LoftQ, ICLR 2024, arXiv:2310.08659, algorithm 1.
    """
    wide = _matrix("loftq", weight, rank)
    _check_scaling("loftq", scaling)
    if iterations < 1:
        raise ValueError(f"loftq: iterations is {iterations}; expected 1 or more")
    rest = wide
    for _ in range(iterations):
        quantized = ops.nf4_quantize(rest, block_size=block_size, double_quant=double_quant)
        u, s, vt = _truncated_svd(wide - ops.nf4_dequantize(quantized, dtype=wide.dtype), rank, None)
        root = (s / scaling).sqrt()
        split = _split(wide, wide, root[:, None] * vt, u * root, scaling, dtype)
        rest = split.residual
    return QuantizedDecomposition(split.lora_a, split.lora_b, quantized._replace(dtype=weight.dtype))


@torch.no_grad()
def orthogonal(
    rank: int, in_features: int, out_features: int, *, generator: torch.Generator | None = None,
    device: torch.device | str | None = None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""Random factors, neither of them zero, whose product is.

    Parameters
    ----------
    rank : int
        Even.
    in_features, out_features : int
    generator : torch.Generator, optional
        On the CPU.
    device, dtype
        Of the result.

    Returns
    -------
    lora_a, lora_b : Tensor
        ``[rank, in_features]`` and ``[out_features, rank]``.

    Raises
    ------
    ValueError
        If the rank is odd or below 2.

    Notes
    -----
    With the rows of a random orthogonal matrix in two halves, :math:`Q_1 Q_2^T = 0`: :math:`A = Q_1^T G_1 / 10` and
    :math:`B = G_2 Q_2 / 10` with standard normal :math:`G_1, G_2`, so that :math:`B A = 0`. The PEFT library's
    ``init_lora_weights="orthogonal"``.
    """
    if rank < 2 or rank % 2:
        raise ValueError(f"orthogonal: rank is {rank}; expected an even number from 2")
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    a = q[0::2].t() @ torch.randn(rank // 2, in_features, generator=generator, dtype=torch.float64) / 10
    b = torch.randn(out_features, rank // 2, generator=generator, dtype=torch.float64) @ q[1::2] / 10
    dtype = dtype or torch.get_default_dtype()
    return a.to(device, dtype), b.to(device, dtype)


# ---- a layer's ------------------------------------------------------------------------------------------------------


def initialize(
    layer: _LoRAModule, init_lora_weights: bool | str = True, *, loftq_iterations: int = 1, block_size: int = 64,
    double_quant: bool = False,
) -> None:  # fmt: skip
    r"""Give a layer's factors their initial values, and it the base layer that goes with them.

    Parameters
    ----------
    layer : LoRALinear, DoRALinear, LoRAConv2d or LoRAEmbedding
        Not merged.
    init_lora_weights : bool or str
        True, False or ``"gaussian"`` for all; for linear layers also ``"orthogonal"``, ``"pissa"``,
        ``"pissa_niter_4"`` (or another number of iterations), ``"olora"`` and ``"loftq"``.
    loftq_iterations, block_size, double_quant
        Of ``"loftq"``, as for `loftq`.

    Raises
    ------
    TypeError, ValueError
        If the layer or its base layer is none that the initialization can work on; nothing has changed then.

    Notes
    -----
    The last three replace ``layer.base_layer``: by a layer with the residual (``layer.restore()`` adds the rest to it
    again), or by an `NF4Linear`. The layer that was there is left as it was.
    """
    init = init_lora_weights
    if not isinstance(init, str) or init == "gaussian":
        return layer.reset_parameters(init)
    match = re.fullmatch(r"pissa(?:_niter_(\d+))?|olora|loftq|orthogonal", init)
    if match is None:
        want = "True, False, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_<n>', 'olora' or 'loftq'"
        raise ValueError(f"initialize: init_lora_weights is {init!r}; expected {want}")
    if not isinstance(layer, LoRALinear):
        raise TypeError(f"initialize: {init!r} is for linear layers; layer is a {type(layer).__name__}")
    if layer.merged:
        raise ValueError("initialize: layer is merged; expected it unmerged")
    if layer._initial_a is not None:
        raise ValueError("initialize: layer's base weight lacks an earlier initialization; expected a new layer")
    a, base, rank = layer.lora_A, layer.base_layer, layer.rank
    if init == "orthogonal":
        new_a, new_b = orthogonal(rank, layer.in_features, layer.out_features, device=a.device, dtype=a.dtype)
        return layer.start_from(base, new_a, new_b, part_of_base=False)
    if isinstance(base, NF4Linear):
        raise TypeError(f"initialize: {init!r} needs the dense weight; the layer's base_layer is an NF4Linear")
    weight: Tensor = base.weight.t() if layer.fan_in_fan_out else base.weight  # type: ignore[assignment, operator]
    if init == "loftq":
        if layer.fan_in_fan_out:
            raise TypeError(f"initialize: 'loftq' needs a torch.nn.Linear; base_layer is a {type(base).__name__}")
        found = loftq(
            weight, rank, layer.scaling, iterations=loftq_iterations, block_size=block_size, double_quant=double_quant,
            dtype=a.dtype,
        )  # fmt: skip
        bias: nn.Parameter | None = base.bias  # type: ignore[assignment]
        quantized = NF4Linear.from_weight(found.weight, bias).train(base.training)
        return layer.start_from(quantized, found.lora_a, found.lora_b, part_of_base=False)
    if init == "olora":
        split = olora(weight, rank, layer.scaling, dtype=a.dtype)
    else:
        niter = None if match.group(1) is None else int(match.group(1))
        split = pissa(weight, rank, layer.scaling, niter=niter, dtype=a.dtype)
    residual = split.residual.t().contiguous() if layer.fan_in_fan_out else split.residual
    return layer.start_from(_with_weight(base, residual), split.lora_a, split.lora_b, part_of_base=True)


def _with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """A layer like this one with another weight; the bias is shared."""
    new = copy.copy(layer)
    new._parameters = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return new
