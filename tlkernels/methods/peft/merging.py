r"""One adapter out of several, without a model: weighted sums of LoRA updates, exact or factor by factor.

With weights :math:`w_i`, scalings :math:`\gamma_i` and factors :math:`A_i, B_i` of one layer, and
:math:`c_i = w_i \gamma_i`:

=========================  ==========================================================================================
``"cat"``                  :math:`A = [c_1 A_1; c_2 A_2; \dots]`, :math:`B = [B_1, B_2, \dots]`: exactly
                           :math:`\sum_i c_i B_i A_i`, of the sum of the ranks (or full rank)
``"svd"``                  the best approximation of that sum of a given rank
``"linear"``               :math:`A = \sum_i \pm\sqrt{|c_i|}\, A_i`, :math:`B = \sum_i \sqrt{|c_i|}\, B_i`, with the
                           sign of :math:`c_i`: cheap, and not the sum of the updates
``"ties"`` and others      as ``"linear"``, with another merge of the factors: TIES, DARE, pruning
``"ties_svd"`` and others  that merge of the updates :math:`\gamma_i B_i A_i`, then as ``"svd"``
=========================  ==========================================================================================

These are the combinations of the PEFT library's ``add_weighted_adapter``.

Prateek Yadav et al. *TIES-Merging: Resolving Interference When Merging Models.* NeurIPS 2023, arXiv:2306.01708.
Le Yu et al. *Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch.* ICML 2024,
arXiv:2311.03099.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tlkernels.methods.finetune.merging import (
    MajoritySign,
    dare_linear,
    dare_ties,
    magnitude_prune,
    task_arithmetic,
    ties,
)
from tlkernels.methods.peft.checkpoint import Adapter, _exactly, at_most_full_rank

__all__ = ["merge_adapters"]

_FACTORS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = ("linear", "svd", "cat", *_PRUNING, *(f"{name}_svd" for name in _PRUNING))

Combine = Callable[[list[Tensor], list[float]], Tensor]


def merge_adapters(
    adapters: Sequence[Adapter], weights: Sequence[float], method: str = "linear", *, density: float | None = None,
    majority_sign_method: MajoritySign = "total", svd_rank: int | None = None,
    generator: torch.Generator | None = None,
) -> Adapter:  # fmt: skip
    """Merge LoRA adapters into one.

    Parameters
    ----------
    adapters : sequence of Adapter
        As `read_adapter` and `get_adapter` return them: plain LoRA (no DoRA, no biases, no modules trained whole) of
        the same layers. They are left as they are.
    weights : sequence of float
        One for each; negative ones subtract.
    method : str
        ``"cat"``, ``"svd"``, ``"linear"``, ``"ties"``, ``"dare_linear"``, ``"dare_ties"``, ``"magnitude_prune"``, or
        one of the last four with ``"_svd"``.
    density : float, optional
        The share of values that pruning keeps, in (0, 1]; needed by the methods that prune, and only by these.
    majority_sign_method : {"total", "frequency"}
        Of TIES.
    svd_rank : int, optional
        Of the result of ``"svd"`` and the like; by default the largest rank that goes in. Layers whose smaller side is
        below it get that rank.
    generator : torch.Generator, optional
        Of DARE's draws.

    Returns
    -------
    Adapter
        With a scaling of 1 in all layers. Its config is the first adapter's otherwise.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated, or the adapters do not fit together; the message names the tensor.

    References
    ----------
    Yadav et al., TIES-Merging, NeurIPS 2023, arXiv:2306.01708. Yu et al., DARE, ICML 2024, arXiv:2311.03099.
    """
    op = "merge_adapters"
    if method not in METHODS:
        raise ValueError(f"{op}: method is {method!r}; expected one of {', '.join(METHODS)}")
    values = _check_weights(op, adapters, weights)
    on_updates, kind = method.endswith("svd"), method.removesuffix("_svd")
    combine = _combination(op, kind, density, majority_sign_method, generator)
    if svd_rank is not None and (not on_updates or svd_rank < 1):
        raise ValueError(f"{op}: svd_rank is {svd_rank}; expected 1 or more, with a method that ends in 'svd'")
    layers = [_layers(op, i, adapter) for i, adapter in enumerate(adapters)]
    _check_same(op, layers, same_rank=not on_updates and kind != "cat")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, (key_a, key_b, *_) in layers[0].items():
        factors = [(layer[name][2], layer[name][3]) for layer in layers]
        scalings = [adapter.config.scaling_of(name) for adapter in adapters]
        coefficients = [w * s for w, s in zip(values, scalings, strict=True)]
        if kind == "cat":
            _check_ungrouped(op, key_b, *factors[0])
            a = torch.cat([c * a for c, (a, _) in zip(coefficients, factors, strict=True)], 0)
            a, b = at_most_full_rank(a, torch.cat([b for _, b in factors], 1))
        elif on_updates:
            _check_ungrouped(op, key_b, *factors[0])
            a, b = _merged_updates(factors, scalings, values, svd_rank, combine)
        else:
            roots = [math.sqrt(abs(c)) for c in coefficients]
            signed = [math.copysign(root, c) for root, c in zip(roots, coefficients, strict=True)]
            a, b = combine([a for a, _ in factors], signed), combine([b for _, b in factors], roots)
        like_a, like_b = factors[0]
        tensors[key_a], tensors[key_b] = a.to(like_a.dtype).contiguous(), b.to(like_b.dtype).contiguous()
        ranks[name] = a.shape[0]
    rank = max(ranks.values())
    others = {_exactly(name): r for name, r in ranks.items() if r != rank}
    config = replace(
        adapters[0].config, r=rank, lora_alpha=float(rank), use_rslora=False, rank_pattern=others,
        alpha_pattern={name: float(r) for name, r in others.items()},
    )  # fmt: skip
    return replace(adapters[0], config=config, tensors=tensors)


def _combination(
    op: str, kind: str, density: float | None, majority_sign_method: MajoritySign, generator: torch.Generator | None
) -> Combine:
    if kind not in _PRUNING:
        if density is not None:
            raise ValueError(f"{op}: density is {density}; expected None, for a method that prunes nothing")
        return task_arithmetic
    if density is None or not 0 < density <= 1:
        raise ValueError(f"{op}: density is {density}; expected a share above 0 and up to 1")
    if kind == "magnitude_prune":
        return partial(magnitude_prune, density=density)
    if kind == "ties":
        return partial(ties, density=density, majority_sign_method=majority_sign_method)
    if kind == "dare_linear":
        return partial(dare_linear, density=density, generator=generator)
    return partial(dare_ties, density=density, majority_sign_method=majority_sign_method, generator=generator)


def _merged_updates(
    factors: list[tuple[Tensor, Tensor]], scalings: list[float], weights: list[float], svd_rank: int | None,
    combine: Combine,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(A, B) of the best approximation to the merged updates scaling * B A."""
    wide = torch.promote_types(factors[0][0].dtype, torch.float32)
    updates = [s * (b.flatten(1).to(wide) @ a.flatten(1).to(wide)) for s, (a, b) in zip(scalings, factors, strict=True)]
    u, s, vt = torch.linalg.svd(combine(updates, weights), full_matrices=False)
    rank = min(svd_rank or max(a.shape[0] for a, _ in factors), len(s))
    a, b = factors[0]
    return vt[:rank].reshape(rank, *a.shape[1:]), (u[:, :rank] * s[:rank]).reshape(b.shape[0], rank, *b.shape[2:])


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_weights(op: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> list[float]:
    if not adapters or not all(isinstance(adapter, Adapter) for adapter in adapters):
        kinds = [type(adapter).__name__ for adapter in adapters]
        raise TypeError(f"{op}: adapters is {kinds}; expected at least one Adapter, as read_adapter returns it")
    values = [float(w) for w in weights]
    if len(values) != len(adapters):
        raise ValueError(f"{op}: weights has {len(values)} entries; expected {len(adapters)}, one for each adapter")
    if not all(math.isfinite(w) for w in values):
        raise ValueError(f"{op}: weights is {values}; expected finite numbers")
    return values


def _layers(op: str, index: int, adapter: Adapter) -> dict[str, tuple[str, str, Tensor, Tensor]]:
    """Each layer's keys and factors. Anything else in an adapter cannot be merged."""
    found = {}
    rest = set(adapter.tensors)
    for suffix_a, suffix_b in _FACTORS:
        for key in adapter.tensors:
            name = key.removesuffix(suffix_a)
            if name != key:
                if name + suffix_b not in adapter.tensors:
                    raise ValueError(f"{op}: adapters[{index}] has {key!r}, but no {name + suffix_b!r}")
                found[name] = (key, name + suffix_b, adapter.tensors[key], adapter.tensors[name + suffix_b])
                rest -= {key, name + suffix_b}
    if rest:
        raise ValueError(f"{op}: adapters[{index}] has {min(rest)!r}; expected LoRA's two factors for each layer only")
    if not found:
        raise ValueError(f"{op}: adapters[{index}] has no tensors")
    return found


def _check_same(op: str, layers: list[dict[str, tuple[str, str, Tensor, Tensor]]], *, same_rank: bool) -> None:
    first = layers[0]
    for index, other in enumerate(layers[1:], 1):
        for name in sorted(set(first) ^ set(other)):
            has, lacks = (
                ("adapters[0]", f"adapters[{index}]") if name in first else (f"adapters[{index}]", "adapters[0]")
            )
            key = (first.get(name) or other[name])[0]
            raise ValueError(f"{op}: {lacks} has no {key!r}, which {has} has; expected the same layers")
        for name, (key_a, key_b, a, b) in first.items():
            for key, mine, its, rank_at in ((key_a, a, other[name][2], 0), (key_b, b, other[name][3], 1)):
                want, got = list(mine.shape), list(its.shape)
                if not same_rank and len(want) == len(got) > 1:
                    want[rank_at] = got[rank_at]
                if want != got:
                    shapes = f"shape {tuple(got)} at {key!r}; expected {tuple(want)}"
                    raise ValueError(f"{op}: adapters[{index}] has {shapes}, adapters[0]'s")


def _check_ungrouped(op: str, key: str, a: Tensor, b: Tensor) -> None:
    if b.shape[1] != a.shape[0]:
        raise ValueError(f"{op}: {key!r} is of a convolution with groups; expected a method that merges the factors")
