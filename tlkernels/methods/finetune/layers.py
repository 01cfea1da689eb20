r"""A model's parameters in groups ordered by depth, and learning rates by group.

With groups :math:`0 \dots L`, bottom to top (embeddings, each block, head):

.. math::
    \eta_l = \eta_L \, / \, 2.6^{\,L-l} \quad\text{(discriminative fine-tuning)}, \qquad
    \eta_l = \eta_L \, d^{\,L-l} \quad\text{(layer-wise decay)} .

:math:`l` counts layers. All parameters of a block share its rate, however many they are.

Jeremy Howard, Sebastian Ruder. *Universal Language Model Fine-tuning for Text Classification.* ACL 2018,
arXiv:1801.06146, section 3.2. Kevin Clark et al. *ELECTRA.* ICLR 2020, arXiv:2003.10555, appendix B. Hangbo Bao et al.
*BEiT.* ICLR 2022, arXiv:2106.08254.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from tlkernels.nn.quantize import _matches

__all__ = ["LayerGroup", "discriminative_lr_groups", "layer_groups", "layerwise_decay_groups"]


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """One layer of a model, as fine-tuning counts layers.

    Attributes
    ----------
    name : str
        ``"embeddings"``, the path of a block such as ``"encoder.layer.3"``, or ``"head"``; with patterns, the patterns.
    parameters : dict of str to torch.nn.Parameter
        By full name. A parameter that several layers share stands in the lowest of them alone.
    modules : dict of str to torch.nn.Module
        By full name: the modules of the layer that own parameters or buffers themselves, batch norms for one.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    modules: dict[str, nn.Module]

    @property
    def numel(self) -> int:
        """The number of weights."""
        return sum(p.numel() for p in self.parameters.values())


Layers: TypeAlias = Sequence[LayerGroup] | Sequence[str | Sequence[str]]


def layer_groups(model: nn.Module, layers: Layers | None = None) -> list[LayerGroup]:
    """Split a model's parameters into groups ordered by depth, from the input to the output.

    Parameters
    ----------
    model : torch.nn.Module
        On any device.
    layers : sequence of str or of sequences of str, optional
        One entry for each group, bottom to top: a pattern (``fnmatch``) or several. A pattern stands for the full name
        of a parameter or of a module around it, or for the last parts of such a name: ``"layer.0"`` is all of
        ``"encoder.layer.0"``. The first entry that matches takes the parameter, so a last ``"*"`` takes the rest.
        Groups that `layer_groups` made are handed back as they are.

    Returns
    -------
    list of LayerGroup
        Each parameter of the model in exactly one group, tied ones in the lowest of theirs. No group is empty of
        parameters.

    Raises
    ------
    TypeError
        If `model` is not a module, or `layers` no sequence of patterns.
    ValueError
        If the model has no parameters; if a pattern matches none, or a parameter no pattern.

    Notes
    -----
    Without `layers` the blocks are the children of the longest `torch.nn.ModuleList` or `torch.nn.Sequential`; lists
    inside the blocks of another list do not count. Other lists follow it or precede it if their blocks are of the same
    class (the stages of a ResNet) or, on average, at least a quarter of the size (the decoder after the encoder). A
    child with vectors only, such as a norm, goes with the child before it. What is registered before the first block
    is ``"embeddings"``, what comes after the last one ``"head"``, what stands between goes with the block before.
    Without such a list, every module that owns a matrix is a layer. The order is the order in which the modules were
    registered; where that is not the order of the computation, or two towers stand side by side, name the `layers`.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    >>> [(group.name, sorted(group.parameters)) for group in layer_groups(model)]
    [('0', ['0.bias', '0.weight', '1.bias', '1.weight']), ('2', ['2.bias', '2.weight'])]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"layer_groups: model is a {type(model).__name__}; expected a torch.nn.Module")
    if not any(True for _ in model.parameters()):
        raise ValueError(f"layer_groups: model ({type(model).__name__}) has no parameters; expected at least one")
    if layers is None:
        return _by_depth(model)
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise TypeError(f"layer_groups: layers is {layers!r}; expected a sequence with the patterns of each group")
    made = [layer for layer in layers if isinstance(layer, LayerGroup)]
    if made:
        if len(made) < len(layers):
            raise TypeError("layer_groups: layers mixes groups and patterns; expected the one or the other")
        return made
    patterns = [(layer,) if isinstance(layer, str) else tuple(layer) for layer in layers]  # type: ignore[arg-type]
    if not all(isinstance(p, str) for group in patterns for p in group):
        raise TypeError(f"layer_groups: layers is {layers!r}; expected a sequence with the patterns of each group")
    return _by_patterns(model, patterns)


def discriminative_lr_groups(
    model: nn.Module, lr: float, factor: float = 2.6, *, layers: Layers | None = None,
    weight_decay: float | None = None, decay_bias_and_norm: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    r"""Optimizer parameter groups with a learning rate that falls by a factor from layer to layer.

    .. math:: \eta_{l-1} = \eta_l / \mathrm{factor}

    Parameters
    ----------
    model : torch.nn.Module
        Its floating-point parameters are taken, frozen ones included: what a schedule unfreezes later must be known to
        the optimizer from the start. Optimizers pass over parameters without gradient.
    lr : float
        Of the top group, > 0.
    factor : float
        >= 1; 2.6 in the paper.
    layers
        As for `layer_groups`, bottom to top.
    weight_decay : float, optional
        Of matrices. By default the groups say nothing, and the optimizer's own value holds for all.
    decay_bias_and_norm : bool
        Whether `weight_decay` is also for parameters with less than two dimensions: biases and the weights of norms.

    Returns
    -------
    list of dict
        Bottom to top, each with ``name``, ``params``, ``lr`` and, where `weight_decay` is given, ``weight_decay``. A
        group whose vectors are not decayed is followed by theirs, ``name + ".no_decay"``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated, and as `layer_groups`.

    References
    ----------
    Howard and Ruder, Universal Language Model Fine-tuning for Text Classification, ACL 2018, section 3.2.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(discriminative_lr_groups(model, lr=0.26))
    >>> [(group["name"], round(group["lr"], 3)) for group in optimizer.param_groups]
    [('0', 0.1), ('1', 0.26)]
    """
    op = "discriminative_lr_groups"
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(f"{op}: factor is {factor}; expected a finite number >= 1")
    return _optimizer_groups(op, layer_groups(model, layers), lr, 1 / factor, weight_decay, decay_bias_and_norm)


def layerwise_decay_groups(
    model: nn.Module, lr: float, decay: float = 0.95, *, layers: Layers | None = None,
    weight_decay: float | None = None, decay_bias_and_norm: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    r"""Optimizer parameter groups with layer-wise learning-rate decay.

    .. math:: \eta_l = \eta \, d^{\,L-l}, \qquad l = 0 \dots L

    Parameters
    ----------
    model, layers, weight_decay, decay_bias_and_norm
        As for `discriminative_lr_groups`.
    lr : float
        Of the top group, > 0.
    decay : float
        d, in (0, 1]. ELECTRA uses 0.8 and 0.9, BEiT 0.65.

    Returns
    -------
    list of dict
        As `discriminative_lr_groups`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated, and as `layer_groups`.

    Notes
    -----
    The exponent counts layers: in a model with 12 blocks between embeddings and head, the embeddings get
    :math:`d^{13}`. That is BEiT's numbering.

    References
    ----------
    Clark et al., ELECTRA, ICLR 2020, arXiv:2003.10555. Bao et al., BEiT, ICLR 2022, arXiv:2106.08254.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    >>> [(group["name"], group["lr"]) for group in layerwise_decay_groups(model, lr=1.0, decay=0.5)]
    [('0', 0.25), ('1', 0.5), ('2', 1.0)]
    """
    op = "layerwise_decay_groups"
    if not 0 < decay <= 1:
        raise ValueError(f"{op}: decay is {decay}; expected 0 < decay <= 1")
    return _optimizer_groups(op, layer_groups(model, layers), lr, decay, weight_decay, decay_bias_and_norm)


def _optimizer_groups(
    op: str, groups: list[LayerGroup], lr: float, ratio: float, weight_decay: float | None, decay_bias_and_norm: bool
) -> list[dict[str, Any]]:
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"{op}: lr is {lr}; expected a finite number > 0")
    if weight_decay is not None and not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"{op}: weight_decay is {weight_decay}; expected a finite number >= 0, or None")
    result: list[dict[str, Any]] = []
    for depth, group in enumerate(groups):
        own_lr = lr * ratio ** (len(groups) - 1 - depth)
        floats = [p for p in group.parameters.values() if p.is_floating_point()]
        if weight_decay is None:
            parts: list[tuple[str, list[nn.Parameter], dict[str, float]]] = [(group.name, floats, {})]
        elif decay_bias_and_norm:
            parts = [(group.name, floats, {"weight_decay": weight_decay})]
        else:
            matrices, vectors = [p for p in floats if p.dim() > 1], [p for p in floats if p.dim() <= 1]
            parts = [
                (group.name, matrices, {"weight_decay": weight_decay}),
                (f"{group.name}.no_decay", vectors, {"weight_decay": 0.0}),
            ]
        result += [{"name": name, "params": params, "lr": own_lr, **rest} for name, params, rest in parts if params]
    return result


# ---- where a parameter belongs ---------------------------------------------------------------------------------------


def _by_patterns(model: nn.Module, patterns: list[tuple[str, ...]]) -> list[LayerGroup]:
    def place(name: str) -> int | None:
        return next((i for i, group in enumerate(patterns) if _matches(name, group)), None)

    homes: dict[int, int] = {}  # the lowest group of each parameter, under all of its names
    names = list(model.named_parameters(remove_duplicate=False))
    for name, p in names:
        index = place(name)
        if index is not None:
            homes[id(p)] = min(index, homes.get(id(p), index))
    for pattern in (pattern for group in patterns for pattern in group):
        if not any(_matches(name, [pattern]) for name, _ in names):
            raise ValueError(f"layer_groups: layers has the pattern {pattern!r}, which matches no parameter")
    first = dict(model.named_parameters())
    lost = [name for name, p in first.items() if id(p) not in homes]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ValueError(
            f"layer_groups: no pattern of layers matches {', '.join(lost[:3])}{more}; "
            "expected a group for every parameter"
        )
    groups = [LayerGroup(", ".join(group), {}, {}) for group in patterns]
    for name, p in first.items():
        groups[homes[id(p)]].parameters[name] = p
    for name, module in model.named_modules():
        own = [homes[id(p)] for p in module.parameters(recurse=False)]
        index = min(own) if own else place(name)
        if index is not None and _owns(module):
            groups[index].modules[name] = module
    return [group for group in groups if group.parameters]  # one whose parameters are all tied to lower ones is empty


def _by_depth(model: nn.Module) -> list[LayerGroup]:
    blocks = _find_blocks(model)
    groups = [
        LayerGroup("embeddings", {}, {}),
        *(LayerGroup(block[0], {}, {}) for block in blocks),
        LayerGroup("head", {}, {}),
    ]
    index_of = {path: i for i, block in enumerate(blocks, 1) for path in block}
    first = dict(model.named_parameters())
    last = 0
    for name, module in model.named_modules():
        inside = next((index_of[path] for path in _ancestors(name) if path in index_of), None)
        if inside is not None:
            last = inside
        index = inside if inside is not None else (len(blocks) + 1 if last == len(blocks) else last)
        groups[index].parameters.update((key, p) for key, p in _own_parameters(name, module) if key in first)
        if _owns(module):
            groups[index].modules[name] = module
    return [group for group in groups if group.parameters]


@dataclass(frozen=True)
class _BlockList:
    blocks: list[list[str]]  # the path of each block, and of the vectors-only children that go with it
    kind: type[nn.Module] | None  # the class of all its blocks, where they have one in common
    nested: bool  # whether the blocks have children, so that they are more than single layers
    numel: int


def _find_blocks(model: nn.Module) -> list[list[str]]:
    lists: list[_BlockList] = []
    inner: set[str] = set()  # the blocks of lists of like blocks: what lists they hold are their own affair
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not inner.intersection(_ancestors(name)):
            found = _block_list(name, module)
            if len(found.blocks) >= 2:
                lists.append(found)
                if found.kind is not None:
                    inner.update(block[0] for block in found.blocks)
    if not lists:
        modules = model.named_modules()
        return [[name] for name, module in modules if any(p.dim() > 1 for _, p in _own_parameters(name, module))]
    longest = max(lists, key=lambda found: len(found.blocks))
    size = longest.numel / len(longest.blocks)
    chosen = [
        found
        for found in lists
        if found is longest
        or (
            longest.kind is not None
            and found.nested
            and found.kind is not None
            and (found.kind is longest.kind or found.numel / len(found.blocks) >= size / 4)
        )
    ]
    return [block for found in chosen for block in found.blocks]


def _block_list(name: str, container: nn.ModuleList | nn.Sequential) -> _BlockList:
    blocks: list[list[str]] = []
    members: list[nn.Module] = []
    for key, child in container.named_children():
        path = f"{name}.{key}".lstrip(".")
        if _has_matrix(child):
            blocks.append([path])
            members.append(child)
        elif blocks and any(True for _ in child.parameters()):
            blocks[-1].append(path)
    kinds = {type(member) for member in members}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is not None and issubclass(kind, (nn.ModuleList, nn.Sequential)):
        kind = None
    nested = any(True for member in members for _ in member.children())
    return _BlockList(blocks, kind, nested, sum(p.numel() for member in members for p in member.parameters()))


def _has_matrix(module: nn.Module) -> bool:
    if any(p.dim() > 1 for p in module.parameters()):
        return True
    weights = (getattr(m, "weight", None) for m in module.modules())  # in 4 bits they are no parameters
    return any(isinstance(weight, Tensor) and weight.dim() > 1 for weight in weights)


def _ancestors(name: str) -> list[str]:
    """List "a", "a.b" and "a.b.c" for "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))] if name else []


def _own_parameters(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((f"{name}.{key}".lstrip("."), p) for key, p in module.named_parameters(recurse=False))


def _owns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))
