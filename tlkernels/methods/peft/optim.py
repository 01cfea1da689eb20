r"""Optimizers for adapters: learning rates of LoRA+, and states in 8 or 4 bits, paged or offloaded, as in QLoRA.

LoRA+ trains the factor that starts at zero faster:

.. math:: \eta_B = \lambda \, \eta_A, \qquad \lambda \gg 1 .

Soufiane Hayou, Nikhil Ghosh, Bin Yu. *LoRA+: Efficient Low Rank Adaptation of Large Models.* ICML 2024,
arXiv:2402.12354. Tim Dettmers, Artidoro Pagnoni, Ari Holtzman, Luke Zettlemoyer. *QLoRA: Efficient Finetuning of
Quantized LLMs.* NeurIPS 2023, arXiv:2305.14314. Tim Dettmers, Mike Lewis, Sam Shleifer, Luke Zettlemoyer. *8-bit
Optimizers via Block-wise Quantization.* ICLR 2022, arXiv:2110.02861.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["PickedOptimizer", "loraplus_groups", "qlora_optimizer"]

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


def loraplus_groups(
    model: nn.Module, lr: float, lr_ratio: float = 16.0, *, lr_embedding: float = 1e-6, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    r"""Optimizer parameter groups with the learning rates of LoRA+.

    Parameters
    ----------
    model : torch.nn.Module
        With LoRA layers, this library's or the PEFT library's. Parameters that require gradients are taken.
    lr : float
        :math:`\eta_A`, > 0.
    lr_ratio : float
        :math:`\lambda`, > 0: 16 is what the paper recommends to begin with.
    lr_embedding : float
        Of the factors of embeddings, > 0.
    weight_decay : float
        Of all but biases and the weights of norms, >= 0.

    Returns
    -------
    list of dict
        ``lora_a`` (also whatever else trains and has two dimensions or more), ``embedding``, ``lora_b`` and
        ``no_decay`` (biases, norms and other vectors, at the rate of B), each with ``name``, ``params``, ``lr`` and
        ``weight_decay``. Groups without parameters are left out.

    Raises
    ------
    ValueError
        If a number is out of range, or nothing requires gradients.

    References
    ----------
    Hayou et al., ICML 2024, arXiv:2402.12354.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.nn.lora import LoRALinear
    >>> [(g["name"], g["lr"]) for g in loraplus_groups(LoRALinear(torch.nn.Linear(64, 64), rank=4), 1e-4)]
    [('lora_a', 0.0001), ('lora_b', 0.0016)]
    """
    for name, value in (("lr", lr), ("lr_ratio", lr_ratio), ("lr_embedding", lr_embedding)):
        if not value > 0:
            raise ValueError(f"loraplus_groups: {name} is {value}; expected more than 0")
    if not weight_decay >= 0:
        raise ValueError(f"loraplus_groups: weight_decay is {weight_decay}; expected 0 or more")
    groups: dict[str, list[nn.Parameter]] = {"lora_a": [], "embedding": [], "lora_b": [], "no_decay": []}
    of_norms = {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if "lora_embedding_" in name:
            groups["embedding"].append(p)
        elif re.search(r"(^|\.)lora_[bB](\.|$)", name) or p.ndim <= 1:
            decayed = p.ndim > 1 and id(p) not in of_norms
            groups["lora_b" if decayed else "no_decay"].append(p)
        else:
            groups["lora_a"].append(p)
    if not any(groups.values()):
        raise ValueError("loraplus_groups: no parameter of model requires gradients; expected at least one")
    rates = {"lora_a": lr, "embedding": lr_embedding, "lora_b": lr * lr_ratio, "no_decay": lr * lr_ratio}
    return [
        {"name": name, "params": params, "lr": rates[name], "weight_decay": 0.0 if name == "no_decay" else weight_decay}
        for name, params in groups.items()
        if params
    ]


class PickedOptimizer(NamedTuple):
    """An optimizer, and what it is.

    Attributes
    ----------
    optimizer : torch.optim.Optimizer
    name : str
        Of its class, with the library: ``"bitsandbytes.optim.PagedAdamW8bit"``.
    reason : str
        Why it was picked.
    """

    optimizer: torch.optim.Optimizer
    name: str
    reason: str


def qlora_optimizer(
    params: nn.Module | Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float = 2e-4, *, bits: int = 8,
    paged: bool | None = None, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: float = 0.0, library: str | None = None,
) -> PickedOptimizer:  # fmt: skip
    """Pick an AdamW with small, paged or offloaded states from an installed library, and say which.

    ======== ========== =========================================================================
    device   bits       picked, in this order
    ======== ========== =========================================================================
    CUDA     8, paged   bitsandbytes ``PagedAdamW8bit`` (QLoRA's)
    CUDA     32, paged  bitsandbytes ``PagedAdamW32bit``; torchao ``CPUOffloadOptimizer`` of AdamW
    any      8          bitsandbytes ``AdamW8bit``; torchao ``AdamW8bit``
    any      4          torchao ``AdamW4bit``
    any      32         ``torch.optim.AdamW``
    ======== ========== =========================================================================

    Parameters
    ----------
    params : torch.nn.Module, or iterable of parameters or of groups
        Of a module those that require gradients; of groups as `torch.optim.Optimizer` takes them.
    lr, betas, eps, weight_decay
        Of AdamW, for groups that do not say otherwise.
    bits : int
        Of each of the two states: 8, 4 or 32.
    paged : bool, optional
        States in memory that moves between GPU and host by need. By default where all parameters are on a CUDA device,
        and not for 4 bits.
    library : str, optional
        ``"bitsandbytes"``, ``"torchao"`` or ``"torch"``: this one or none.

    Returns
    -------
    PickedOptimizer

    Raises
    ------
    ImportError
        If no library that has such an optimizer is installed; it says what to install.
    ValueError
        If an argument is out of range, the parameters are on several kinds of devices, or no library has what is asked
        for.

    Notes
    -----
    States of less than 4096 elements stay in 32 bits, in both libraries. On CPUs torchao compiles its step with
    torch.compile, and needs a C++ compiler.

    References
    ----------
    Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314.

    Examples
    --------
    >>> import torch
    >>> qlora_optimizer(torch.nn.Linear(4, 4), bits=32).name
    'torch.optim.AdamW'
    """
    op = "qlora_optimizer"
    if bits not in (4, 8, 32):
        raise ValueError(f"{op}: bits is {bits}; expected 8, 4 or 32")
    if not lr > 0:
        raise ValueError(f"{op}: lr is {lr}; expected more than 0")
    if library not in (None, "bitsandbytes", "torchao", "torch"):
        raise ValueError(f"{op}: library is {library!r}; expected 'bitsandbytes', 'torchao', 'torch' or None")
    groups = _groups(op, params)
    kinds = {p.device.type for group in groups for p in group["params"]}
    if len(kinds) > 1:
        raise ValueError(f"{op}: the parameters are on {' and '.join(sorted(kinds))}; expected one kind of device")
    cuda = kinds == {"cuda"}
    if paged is None:
        paged = cuda and bits != 4
    if paged and not cuda:
        raise ValueError(f"{op}: paged is True for parameters on {kinds.pop()}; expected a CUDA device, or False")
    candidates = [c for c in _candidates(bits, paged) if library in (None, c[0])]
    if not candidates:
        raise ValueError(f"{op}: {library or 'no library'} has no AdamW with bits={bits}, paged={paged}")
    missing: dict[str, ImportError] = {}
    arguments: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    for module, name, reason in candidates:
        try:
            optimizer = _build(module, name, groups, arguments)
        except ImportError as error:
            missing[module] = error
            continue
        skipped = "".join(f"; {other} is not installed" for other in missing)
        return PickedOptimizer(optimizer, _full_name(module, name), reason + skipped)
    raise ImportError(
        f"{op}: bits={bits}, paged={paged} needs {' or '.join(missing)}: pip install {next(iter(missing))}"
    )


def _groups(op: str, params: Any) -> list[dict[str, Any]]:
    if isinstance(params, nn.Module):
        params = [p for p in params.parameters() if p.requires_grad]
    listed = list(params)
    if all(isinstance(p, Tensor) for p in listed):
        listed = [{"params": listed}]
    if not all(isinstance(group, dict) and "params" in group for group in listed):
        raise TypeError(f"{op}: params mixes groups and parameters; expected the one or the other")
    groups = [{**group, "params": list(group["params"])} for group in listed]
    if not any(group["params"] for group in groups):
        raise ValueError(f"{op}: params is empty; expected at least one parameter that requires gradients")
    return groups


def _candidates(bits: int, paged: bool) -> list[tuple[str, str, str]]:
    """Library, class, reason: the first that is installed is taken."""
    if paged:
        found = {
            8: [("bitsandbytes", "PagedAdamW8bit", "paged states in 8 bits")],
            32: [
                ("bitsandbytes", "PagedAdamW32bit", "paged states in 32 bits"),
                ("torchao", "CPUOffloadOptimizer", "states and step in host memory instead of pages"),
            ],
        }
        return found.get(bits, [])
    return {
        8: [("bitsandbytes", "AdamW8bit", "states in 8 bits"), ("torchao", "AdamW8bit", "states in 8 bits")],
        4: [("torchao", "AdamW4bit", "states in 4 bits")],
        32: [("torch", "AdamW", "states in 32 bits, not paged")],
    }[bits]


def _full_name(module: str, name: str) -> str:
    return f"{module}.optim.{name}"


def _build(module: str, name: str, groups: list[dict[str, Any]], arguments: dict[str, Any]) -> torch.optim.Optimizer:
    if module == "torch":
        return torch.optim.AdamW(groups, **arguments)
    if module == "bitsandbytes":
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(groups, **arguments)
    torchao = importlib.import_module("torchao.optim")
    if name == "CPUOffloadOptimizer":
        return torchao.CPUOffloadOptimizer(groups, torch.optim.AdamW, **arguments)
    return getattr(torchao, name)(groups, **arguments)
