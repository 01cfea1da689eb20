"""Putting adapters into a model, taking them out again, and merging them into its weights.

These work with every `TunerConfig`, whatever the method: it says which modules are replaced by what. A model holds the
adapters of one config at a time. Each function either does all it is asked, or raises and leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tlkernels.methods.peft._tuner import TunerConfig, TunerModule, has_suffix
from tlkernels.nn.nf4 import _NF4Module

__all__ = ["Applied", "TrainableReport", "applied", "apply", "merge", "remove", "trainable_parameters", "unmerge"]

_ATTRIBUTE = "_tlkernels_peft"


@dataclass
class Applied:
    """What `apply` did to a model. The model holds it too; see `applied`.

    Attributes
    ----------
    config : TunerConfig
    targets : tuple of str
        Names of the modules that were replaced; each is a `TunerModule` now.
    saved : tuple of str
        Names of the modules that are trained whole: copies, so that a weight they were tied to stays as it is.
    """

    config: TunerConfig
    targets: tuple[str, ...]
    saved: tuple[str, ...]
    _originals: dict[str, nn.Module] = field(default_factory=dict, repr=False)  # of the modules trained whole
    _biases: dict[str, Tensor] = field(default_factory=dict, repr=False)  # of the model, as they were
    _flags: dict[str, bool] = field(default_factory=dict, repr=False)  # requires_grad, as it was


@dataclass
class Plan:
    """The replacements for a model that has not been touched yet, but for its parameters' ``requires_grad``."""

    config: TunerConfig
    tuners: dict[str, nn.Module]
    copies: dict[str, nn.Module]
    flags: dict[str, bool]


def apply(model: nn.Module, config: TunerConfig) -> Applied:
    """Replace modules of a model by adapted ones, and freeze all else.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place. A module that stands at several places is replaced at all of them.
    config : TunerConfig
        Of the method: `LoRAConfig` and the like.

    Returns
    -------
    Applied
        What was replaced.

    Raises
    ------
    TypeError, ValueError
        If a field of the config is wrong, nothing matches, a module that matches is none that the method can adapt, or
        the model has adapters already. The model is then as it was.

    Notes
    -----
    Adapter parameters and those of `modules_to_save` are the only ones that require a gradient (and biases, where the
    config says so): build the optimizer after this.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.methods.peft.lora import LoRAConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    >>> apply(model, LoRAConfig(r=4, target_modules=["0"])).targets
    ('0',)
    """
    return install(model, plan(model, config))


def applied(model: nn.Module) -> Applied:
    """Return what `apply` did to this model.

    Raises
    ------
    ValueError
        If the model has no adapters.
    """
    found = vars(model).get(_ATTRIBUTE)
    if not isinstance(found, Applied):
        raise ValueError(f"the model (a {type(model).__name__}) has no adapters; expected one that apply was called on")
    return found


def plan(model: nn.Module, config: TunerConfig) -> Plan:
    """Check everything and build all replacements."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply: model is a {type(model).__name__}; expected a torch.nn.Module")
    if not isinstance(config, TunerConfig):
        raise TypeError(f"apply: config is a {type(config).__name__}; expected a TunerConfig, such as LoRAConfig")
    config.check()
    there = next((name for name, module in model.named_modules() if isinstance(module, TunerModule)), None)
    if there is not None or _ATTRIBUTE in vars(model):
        raise ValueError(f"apply: the model has adapters already ({there}); expected none: remove them first")
    targets = config.targets(model) if config.target_modules else {}
    if "" in targets:
        kind = type(model).__name__
        raise ValueError(f"apply: the model itself, a {kind}, is to be replaced; expected it inside another module")
    saved = _saved(model, config)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    try:
        tuners = config.wrap_all(targets)
        copies = {name: deepcopy(module).requires_grad_(True) for name, module in saved.items()}
    except BaseException:
        _restore_flags(model, flags)
        raise
    return Plan(config, tuners, copies, flags)


def install(model: nn.Module, plan: Plan) -> Applied:
    """Put the replacements into the model. Nothing here can fail half-way."""
    model.requires_grad_(False)
    bias = getattr(plan.config, "bias", "none")
    biases: dict[str, Tensor] = {}
    for name, module in plan.tuners.items():
        _replace(model, model.get_submodule(name), module)
        if isinstance(module, TunerModule):
            for _, parameter in module.adapter_parameters():
                parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        of_tuner = name.endswith(".base_layer.bias") and name.removesuffix(".base_layer.bias") in plan.tuners
        if (bias == "all" and (name == "bias" or name.endswith(".bias"))) or (bias.endswith("_only") and of_tuner):
            biases[name] = parameter.detach().clone()
            parameter.requires_grad_(True)
    originals = {name: model.get_submodule(name) for name in plan.copies}
    for name, module in plan.copies.items():
        _replace(model, originals[name], module)
    made = Applied(plan.config, tuple(plan.tuners), tuple(plan.copies), originals, biases, plan.flags)
    setattr(model, _ATTRIBUTE, made)
    return made


def discard(model: nn.Module, plan: Plan) -> None:
    """Undo what building a plan did to the model."""
    _restore_flags(model, plan.flags)


def remove(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Take the adapters out of a model.

    Parameters
    ----------
    model : torch.nn.Module
        One that `apply` was called on; changed in place.
    merge : bool
        False: the modules are those from before, with their weights, and the adapters are lost. True: the weights hold
        the updates, and the modules that were trained whole stay. Parameters get back the ``requires_grad`` they had.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    ValueError
        If the model has no adapters, or `merge` is asked for and impossible; nothing has changed then.

    Notes
    -----
    Without `merge`, weights are exactly as before, but for what merging and unmerging rounded, and for initializations
    that moved a part of the weight into the factors (PiSSA, OLoRA): that part is added again, to rounding. Layers that
    LoftQ quantized stay in 4 bits.
    """
    made = applied(model)
    if merge:
        _merge(model)
    else:
        unmerge(model)
        with torch.no_grad():
            for name, bias in made._biases.items():
                model.get_parameter(name).copy_(bias)
    for _, module in list(_tuners(model)):
        _replace(model, module, module.base_layer if merge else module.restore())
    if not merge:
        for name, original in made._originals.items():
            trained = model.get_submodule(name)
            _replace(model, trained, _moved(original, trained))
    delattr(model, _ATTRIBUTE)
    _restore_flags(model, made._flags)
    return model


def merge(model: nn.Module) -> None:
    """Put all updates into the weights of the base layers, which the forward pass then uses alone.

    Parameters
    ----------
    model : torch.nn.Module
        With adapters. Layers that are merged already are left alone.

    Raises
    ------
    NotImplementedError
        If a layer's method has no merged form.
    ValueError
        If the model has no adapters; if an update is not finite or cannot be merged for another reason; or if a base
        weight is tied to another module's, which would change with it. No layer is merged then (those that were before
        still are).
    """
    _merge(model)


def _merge(model: nn.Module) -> None:
    todo = [(name, module) for name, module in _found(model, "merge") if not module.merged]
    owners: dict[int, set[str]] = {}
    for owner, holder in model.named_modules():
        for parameter in holder.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(owner)
    for name, module in todo:
        try:
            module.check_merge()
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"merge: {name}: {error}") from error
        weight = module.base_layer._parameters.get("weight")
        if others := owners.get(id(weight), set()) - {f"{name}.base_layer"}:
            raise ValueError(f"merge: {name}: its weight is tied to {min(others)}, which would change too")
    done: list[TunerModule] = []
    try:
        for _, module in todo:
            module.merge()
            done.append(module)
    except BaseException:
        for module in done:
            module.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Take all updates out of the weights again; a model that is not merged is left alone.

    Parameters
    ----------
    model : torch.nn.Module
        With adapters.

    Raises
    ------
    ValueError
        If the model has no adapters.

    Notes
    -----
    Dense weights are what they were before up to rounding in their dtype, 4-bit weights exactly.
    """
    for _, module in _found(model, "unmerge"):
        if module.merged:
            module.unmerge()


# ---- what can be trained --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainableReport:
    """What of a model is trained; ``str()`` of it is a table.

    Attributes
    ----------
    trainable, total : int
        Numbers of parameters. A 4-bit weight counts as the matrix that it stands for.
    trainable_bytes, total_bytes : int
        What they hold in memory.
    layers : dict of str to int
        For each replaced module, the number of its adapter's parameters: for LoRA ``r * (d_in + d_out)``.
    """

    trainable: int
    total: int
    trainable_bytes: int
    total_bytes: int
    layers: dict[str, int]

    @property
    def percentage(self) -> float:
        """100 * trainable / total."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        width = max(map(len, self.layers), default=0)
        rows = [f"{name:<{width}}  {count:>12,}" for name, count in self.layers.items()]
        share = f"{self.trainable:,} of {self.total:,} parameters ({self.percentage:.4f} %)"
        return "\n".join([*rows, f"trainable: {share}, {self.trainable_bytes:,} of {self.total_bytes:,} bytes"])


def trainable_parameters(model: nn.Module) -> TrainableReport:
    """Count what of a model is trained.

    Parameters
    ----------
    model : torch.nn.Module
        With or without adapters. Parameters that stand at several places count once.

    Returns
    -------
    TrainableReport
    """
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    quantized = [module for module in model.modules() if isinstance(module, _NF4Module)]
    total = sum(p.numel() for p in parameters) + sum(m._shape()[0] * m._shape()[1] for m in quantized)
    total_bytes = sum(p.nbytes for p in parameters) + sum(m.nf4_weight.nbytes for m in quantized)
    layers = {
        name: sum(p.numel() for _, p in module.adapter_parameters() if p.requires_grad)
        for name, module in _tuners(model)
    }
    return TrainableReport(
        sum(p.numel() for p in trained), total, sum(p.nbytes for p in trained), total_bytes, layers
    )  # fmt: skip


# ---- the tree of modules --------------------------------------------------------------------------------------------


def _tuners(model: nn.Module) -> Iterator[tuple[str, TunerModule]]:
    for name, module in model.named_modules():
        if isinstance(module, TunerModule):
            yield name, module


def _found(model: nn.Module, op: str) -> list[tuple[str, TunerModule]]:
    found = list(_tuners(model))
    if not found and _ATTRIBUTE not in vars(model):
        raise ValueError(f"{op}: the model (a {type(model).__name__}) has no adapters")
    return found


def _saved(model: nn.Module, config: TunerConfig) -> dict[str, nn.Module]:
    """The modules to train whole: those that are named, without what is inside another."""
    found: dict[str, nn.Module] = {}
    names = [name for name, _ in model.named_modules() if name]
    for wanted in config.modules_to_save:
        hits = [name for name in names if has_suffix(name, [wanted])]
        if not hits:
            raise ValueError(f"{type(config).__name__}: modules_to_save has {wanted!r}, which matches no module")
        found.update((name, model.get_submodule(name)) for name in hits)
    for name, module in found.items():
        if any(isinstance(inner, _NF4Module) for inner in module.modules()):
            raise ValueError(
                f"{type(config).__name__}: modules_to_save has {name}, whose weight is in 4 bits and cannot be trained"
            )
    return {name: module for name, module in found.items() if not any(name.startswith(f"{other}.") for other in found)}


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands."""
    places: Iterable[tuple[nn.Module, str]] = [
        (parent, child) for parent in model.modules() for child, module in parent._modules.items() if module is old
    ]
    for parent, child in places:
        if parent is not new:
            parent._modules[child] = new


def _moved(module: nn.Module, like: nn.Module) -> nn.Module:
    """`module`, on the devices, in the dtypes and in the mode of its copy, which has moved along with the model."""
    with torch.no_grad():
        for own, other in zip(
            (*module.parameters(), *module.buffers()), (*like.parameters(), *like.buffers()), strict=True
        ):
            own.data = own.data.to(other.device, other.dtype)
    return module.train(like.training)


def _restore_flags(model: nn.Module, flags: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in flags:
            parameter.requires_grad_(flags[name])
