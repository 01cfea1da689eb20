"""Adapters in files, in the PEFT library's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

What is saved here, PEFT loads, and the other way round: LoRA, rsLoRA and DoRA for linear layers, LoRA for embeddings
and 2-d convolutions, modules trained whole, biases, ranks and alphas that differ between layers.

Only safetensors files are read, never pickles. Everything is checked before anything is changed: keys, shapes, dtypes,
and the fields of the config that this library has no counterpart of.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlkernels.methods.peft._tuner import ALL_LINEAR, has_suffix
from tlkernels.methods.peft.apply import Applied, Plan, applied, discard, install, plan
from tlkernels.methods.peft.lora import LoRAConfig
from tlkernels.nn.lora import LoRAConv2d, LoRAEmbedding, LoRALinear, TunerModule, _LoRAModule

__all__ = ["Adapter", "get_adapter", "load_adapter", "read_adapter", "save_adapter", "write_adapter"]

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OWN_FIELDS = ("adapter_dtype", "loftq_config")  # of LoRAConfig, and not of a plain adapter in PEFT's file
# Values of PEFT's init_lora_weights that leave the base weight alone: the factors in the file are all there is to know.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_SUPPORTED_INITS = ("pissa", "olora")  # what they take out of the base weight is computed from it, without chance
# Fields that change what an adapter computes, or where it stands, in a way that there is none of here.
_UNSUPPORTED = (
    "target_parameters", "layer_replication", "alora_invocation_tokens", "trainable_token_indices", "use_qalora",
    "velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config",
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter apart from a model.

    Attributes
    ----------
    config : LoRAConfig
    tensors : dict of str to Tensor
        By PEFT's names without the prefix ``base_model.model.``: ``layers.0.q_proj.lora_A.weight`` and so on.
    """

    config: LoRAConfig
    tensors: dict[str, Tensor]
    base_model_name_or_path: str | None = field(default=None, repr=False)
    fan_in_fan_out: bool = field(default=False, repr=False)


# ---- names ----------------------------------------------------------------------------------------------------------


def _keys(module: TunerModule) -> dict[str, str]:
    """PEFT's name for each parameter of an adapted layer."""
    if not isinstance(module, (LoRALinear, LoRAConv2d, LoRAEmbedding)):
        raise TypeError(
            f"save_adapter: {type(module).__name__} has no form in a LoRA file; expected LoRA or DoRA layers"
        )
    names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias"}
    return {name: names.get(name, name) for name, _ in module.adapter_parameters()}


def _places(plan: Plan) -> dict[str, Tensor]:
    """Every tensor of an adapter, by its name in a file."""
    found: dict[str, Tensor] = {}
    for name, module in plan.tuners.items():
        assert isinstance(module, TunerModule)
        own = dict(module.adapter_parameters())
        found.update((f"{name}.{key}", own[parameter].data) for parameter, key in _keys(module).items())
    for name, module in plan.copies.items():
        found.update((f"{name}.{key}", value.detach()) for key, value in module.state_dict(keep_vars=True).items())
    return found


def _bias_places(model: nn.Module, config: LoRAConfig, targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The model's own biases that are trained, by their names in a file; `model` has no adapters yet, or has them."""
    found = {}
    for name, parameter in model.named_parameters():
        if name != "bias" and not name.endswith(".bias"):
            continue
        owner = name.rpartition(".")[0].removesuffix(".base_layer")
        key = f"{owner}.base_layer.bias" if owner in targets else name
        if config.bias == "all" or (config.bias == "lora_only" and owner in targets):
            found[key] = parameter.detach()
    return found


def _current(model: nn.Module, made: Applied) -> tuple[Plan, dict[str, Tensor]]:
    """The adapters in a model as a plan, and all their tensors by their names in a file."""
    if not isinstance(made.config, LoRAConfig):
        kind = type(made.config).__name__
        raise TypeError(
            f"the model's adapters are of a {kind}; expected those of a LoRAConfig: PEFT's LORA file has none"
        )
    tuners = {name: model.get_submodule(name) for name in made.targets}
    present = Plan(made.config, tuners, {name: model.get_submodule(name) for name in made.saved}, {})
    places = _places(present)
    biases = _bias_places(model, made.config, tuners)
    return present, {**{key: value for key, value in biases.items() if key not in places}, **places}


# ---- a model's adapter ----------------------------------------------------------------------------------------------


def get_adapter(model: nn.Module) -> Adapter:
    r"""Copy the adapter out of a model, as `save_adapter` would save it.

    Parameters
    ----------
    model : torch.nn.Module
        One that `apply` was called on with a `LoRAConfig`.

    Returns
    -------
    Adapter
        Copies, on the CPU.

    Raises
    ------
    TypeError, ValueError
        If the model has no adapters, or those of another method.

    Notes
    -----
    After PiSSA or OLoRA the base weight is :math:`W - \gamma B_0 A_0`. What is returned fits :math:`W` itself, as a
    plain adapter of twice the rank: :math:`\gamma (B A - B_0 A_0) = \gamma [B, -B_0] [A; A_0]` (or, where that exceeds
    the smaller side of the weight, of that rank, as the product and an identity).
    """
    made = applied(model)
    present, places = _current(model, made)
    config = made.config
    if made.config.bias != "none" and any(m._merged_bias is not None for m in present.tuners.values()):  # type: ignore[attr-defined]
        raise ValueError("save_adapter: the trained biases hold a merged lora_bias; unmerge first")
    assert isinstance(config, LoRAConfig)
    tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in places.items()}
    config = replace(config, **_plain_init(config))
    ranks: dict[str, int] = {}
    for name, module in present.tuners.items():
        assert isinstance(module, _LoRAModule)
        if module._initial_a is not None and module._initial_b is not None:
            ranks[name] = _make_plain(tensors, name, module)
    if ranks:  # the scaling stays: alpha grows with the rank, or with its root
        alphas = {}
        for name, rank in ranks.items():
            alphas[name] = made.config.scaling_of(name) * (math.sqrt(rank) if config.use_rslora else rank)  # type: ignore[attr-defined]
        common = max(ranks.values())
        top = next(name for name, rank in ranks.items() if rank == common)
        config = replace(
            config, r=common, lora_alpha=alphas[top],
            rank_pattern={_exactly(name): rank for name, rank in ranks.items() if rank != common},
            alpha_pattern={_exactly(name): alpha for name, alpha in alphas.items() if alpha != alphas[top]},
        )  # fmt: skip
    if config.target_modules == ALL_LINEAR:
        config = replace(config, target_modules=_names(model, made.targets), exclude_modules=())
    conv1d = any(getattr(module, "fan_in_fan_out", False) for module in present.tuners.values())
    path = getattr(getattr(model, "config", None), "name_or_path", None) or None
    return Adapter(config, tensors, path if isinstance(path, str) else None, conv1d)


def _plain_init(config: LoRAConfig) -> dict[str, Any]:
    return {"init_lora_weights": True, "loftq_config": {}, "adapter_dtype": None, "task_type": config.task_type}


def _make_plain(tensors: dict[str, Tensor], name: str, module: _LoRAModule) -> int:
    """Replace a layer's factors by ones that fit the weight from before the initialization; return their rank."""
    key_a, key_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    a, b = tensors[key_a], tensors[key_b]
    assert module._initial_a is not None and module._initial_b is not None
    a = torch.cat([a, module._initial_a.to("cpu", a.dtype)], 0)
    b = torch.cat([b, -module._initial_b.to("cpu", b.dtype)], 1)
    tensors[key_a], tensors[key_b] = at_most_full_rank(a, b)
    return tensors[key_a].shape[0]


def at_most_full_rank(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors with the same product (to rounding), of a rank that is no larger than that of any matrix of its size."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    least = min(flat_a.shape[1], flat_b.shape[0])
    if len(flat_a) <= least:
        return a, b
    wide = torch.promote_types(a.dtype, torch.float32)
    product, one = (flat_b.to(wide) @ flat_a.to(wide)).to(a.dtype), torch.eye(least, dtype=a.dtype, device=a.device)
    flat_a, flat_b = (product, one) if len(flat_b) == least else (one, product)
    return flat_a.reshape(least, *a.shape[1:]), flat_b.reshape(b.shape[0], least, *b.shape[2:])


def _exactly(name: str) -> str:
    """A regular expression for this name; the ^ is for rank_pattern, where parts of a name may stand before a match."""
    return "^" + name.replace(".", r"\.")


def _names(model: nn.Module, targets: tuple[str, ...]) -> list[str] | str:
    """The names of the targets as target_modules: as a list, unless PEFT would find more than these with it."""
    names = {name.removesuffix(".base_layer") for name, _ in model.named_modules()}
    exact = {name for name in names if has_suffix(name, targets)} == set(targets)
    return sorted(targets) if exact else "|".join(_exactly(name) for name in sorted(targets))


# ---- files ----------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Save a model's adapter for `load_adapter`, or for ``peft.PeftModel.from_pretrained``.

    Parameters
    ----------
    model : torch.nn.Module
        One that `apply` was called on with a `LoRAConfig`, merged or not.
    directory : path
        Made if it is not there. Each file is written under another name and then renamed, the weights first.

    Returns
    -------
    pathlib.Path
        The directory.

    Raises
    ------
    TypeError, ValueError
        If the model has no adapters, or those of another method.
    ImportError
        If safetensors is not installed.

    Notes
    -----
    Adapters that PiSSA or OLoRA initialized are saved as plain adapters of the original weight; see `get_adapter`. What
    LoftQ initialized goes with the 4-bit weights: load it into a model that has the same ones.
    """
    return write_adapter(get_adapter(model), directory)


def write_adapter(adapter: Adapter, directory: str | os.PathLike[str]) -> Path:
    """Save an adapter that is apart from a model; see `save_adapter`."""
    save_file = _safetensors().save_file
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + key: value for key, value in _unshared(adapter.tensors).items()}
    text = json.dumps(_to_peft(adapter), indent=2, sort_keys=True) + "\n"
    _write(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _write(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    return folder


def read_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """Read an adapter's files, without a model to put it into.

    Parameters
    ----------
    directory : path
        With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns
    -------
    Adapter
        Tensors on the CPU.

    Raises
    ------
    FileNotFoundError
        If a file is not there.
    ValueError
        If one is damaged, is not of a LoRA adapter, or needs what this library has not; the message names the file
        and the field or key.
    ImportError
        If safetensors is not installed.
    """
    folder = Path(directory)
    config, extra = _from_peft(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    safetensors = _safetensors()
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which can run code; it is not read)"
        there = (folder / "adapter_model.bin").exists()
        raise FileNotFoundError(f"{path}: there is no such file{pickled if there else ''}")
    try:
        stored = safetensors.load_file(path)
    except Exception as error:  # SafetensorError, OSError, ValueError: whatever the file's bytes made it fail with
        raise ValueError(f"{path}: damaged, or no safetensors file ({error})") from error
    for key, value in stored.items():
        if not key.startswith(_PREFIX):
            raise ValueError(f"{path}: has the key {key!r}; expected keys that begin with {_PREFIX!r}")
        if ".lora_" in key and not value.is_floating_point():
            raise ValueError(f"{path}: {key!r} has dtype {value.dtype}; expected floating point")
    return Adapter(config, {key.removeprefix(_PREFIX): value for key, value in stored.items()}, *extra)


def load_adapter(
    model: nn.Module, adapter: str | os.PathLike[str] | Adapter, *, trainable: bool = False
) -> Applied:  # fmt: skip
    """Put a saved adapter into a model.

    Parameters
    ----------
    model : torch.nn.Module
        The base model, as it was before the adapter was trained; or one that has adapters of the same config, whose
        values are then replaced.
    adapter : path or Adapter
        The directory of the files, or what `read_adapter`, `get_adapter` or
        `tlkernels.methods.peft.merging.merge_adapters` returned.
    trainable : bool
        Whether the loaded adapter is to be trained further. A model that has adapters keeps what it trains.

    Returns
    -------
    Applied

    Raises
    ------
    FileNotFoundError, ValueError, TypeError
        If the files are missing or damaged, are not of a LoRA adapter, or a key is missing, unexpected, or of another
        shape than the model's; the message names it. The model is then as it was.
    ImportError
        If safetensors is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_adapter: model is a {type(model).__name__}; expected a torch.nn.Module")
    found = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    try:
        made = applied(model)
    except ValueError:
        return _load_new(model, found, trainable)
    present, places = _current(model, made)
    if any(module.merged for module in present.tuners.values() if isinstance(module, TunerModule)):
        raise ValueError("load_adapter: the model's adapters are merged; unmerge them first")
    for name, module in present.tuners.items():
        assert isinstance(module, _LoRAModule)
        if module._initial_a is not None:
            raise ValueError(
                f"load_adapter: {name}: its base weight lacks what {made.config.init_lora_weights!r} took out of it; "  # type: ignore[attr-defined]
                "remove the adapters first"
            )
        if not math.isclose(found.config.scaling_of(name), module.scaling, rel_tol=1e-6):
            raise ValueError(
                f"load_adapter: {name} has scaling {found.config.scaling_of(name)} in the file; "
                f"expected {module.scaling}, the model's"
            )
    _copy(_checked(model, found, places, made.targets), places)
    return made


def _load_new(model: nn.Module, adapter: Adapter, trainable: bool) -> Applied:
    names = [name for name, _ in model.named_modules()]
    # PEFT writes all names that a head can have; one without a module has no tensors either
    saved = [wanted for wanted in adapter.config.modules_to_save if any(has_suffix(name, [wanted]) for name in names)]
    planned = plan(model, replace(adapter.config, modules_to_save=saved))
    try:
        biases = {name: value.clone() for name, value in _bias_places(model, adapter.config, planned.tuners).items()}
        places = _places(planned)
        biases = {key: value for key, value in biases.items() if key not in places}
        values = _checked(model, adapter, {**biases, **places}, tuple(planned.tuners))
    except BaseException:
        discard(model, planned)
        raise
    _copy({key: values[key] for key in places}, places)
    made = install(model, planned)
    own = _bias_places(model, adapter.config, planned.tuners)
    _copy({key: values[key] for key in biases}, own)
    if not trainable:
        model.requires_grad_(False)
    return made


def _copy(values: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in values.items():
            places[key].copy_(value)


def _checked(
    model: nn.Module, adapter: Adapter, places: Mapping[str, Tensor], targets: tuple[str, ...]
) -> dict[str, Tensor]:  # fmt: skip
    """The file's tensors, which fit the model's one to one."""
    values = dict(adapter.tensors)
    for name in targets:
        # PEFT adds the base weight of an adapted embedding: it must be the model's
        key = f"{name}.base_layer.weight"
        if key in values and key not in places:
            _check_base(model, name, key, values.pop(key))
    for key, place in places.items():
        if key not in values:
            raise ValueError(f"load_adapter: the adapter has no {_PREFIX + key!r}, which the model's config calls for")
        if values[key].shape != place.shape:
            got, want = tuple(values[key].shape), tuple(place.shape)
            raise ValueError(f"load_adapter: {_PREFIX + key!r} has shape {got}; expected {want}, the model's")
        if values[key].is_floating_point() != place.is_floating_point():
            dtypes = f"dtype {values[key].dtype}; expected {place.dtype}, the model's"
            raise TypeError(f"load_adapter: {_PREFIX + key!r} has {dtypes}")
    if unexpected := sorted(set(values) - set(places)):
        raise ValueError(f"load_adapter: the adapter has {_PREFIX + unexpected[0]!r}, which the model has no place for")
    return values


def _check_base(model: nn.Module, name: str, key: str, value: Tensor) -> None:
    layer = model.get_submodule(name)
    own = getattr(layer.base_layer if isinstance(layer, TunerModule) else layer, "weight", None)
    if not isinstance(own, Tensor) or own.shape != value.shape:
        got = None if not isinstance(own, Tensor) else tuple(own.shape)
        raise ValueError(
            f"load_adapter: {_PREFIX + key!r} has shape {tuple(value.shape)}; the model's base weight {got}"
        )
    if not torch.equal(own.detach().cpu(), value.to(own.dtype)):
        raise ValueError(
            f"load_adapter: {_PREFIX + key!r} differs from the model's base weight; expected the same model"
        )


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory."""
    seen: set[int] = set()
    out = {}
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        start = value.untyped_storage().data_ptr()
        if start in seen or value.numel() * value.element_size() != value.untyped_storage().nbytes():
            value = value.clone()
        seen.add(start)
        out[key] = value
    return out


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name in the same folder, bring it to the disk, and rename it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("adapters are saved as safetensors files: pip install safetensors") from error
    return safetensors.torch


# ---- PEFT's config --------------------------------------------------------------------------------------------------


def _to_peft(adapter: Adapter) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig."""
    config = adapter.config
    out: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _OWN_FIELDS}
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
        value = out[name]
        if not isinstance(value, (str, int)) and value is not None:
            value = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
        out[name] = value if value or value == 0 else None
    out["rank_pattern"], out["alpha_pattern"] = dict(config.rank_pattern), dict(config.alpha_pattern)
    if float(config.lora_alpha).is_integer():  # PEFT's field is an int
        out["lora_alpha"] = int(config.lora_alpha)
    out["init_lora_weights"] = True
    return {
        **out, "peft_type": "LORA", "auto_mapping": None, "revision": None, "inference_mode": True, "loftq_config": {},
        "base_model_name_or_path": adapter.base_model_name_or_path, "fan_in_fan_out": adapter.fan_in_fan_out,
    }  # fmt: skip


def _from_peft(path: Path) -> tuple[LoRAConfig, tuple[str | None, bool]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or no JSON ({error})") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path}: holds a {type(stored).__name__}; expected an object")
    if stored.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {stored.get('peft_type')!r}; expected 'LORA'")
    for name in _UNSUPPORTED:
        if stored.get(name):
            raise ValueError(f"{path}: {name} is {stored[name]!r}; an adapter with it is not supported")
    init = stored.get("init_lora_weights", True)
    if init not in (*_PLAIN_INITS, *_SUPPORTED_INITS):
        raise ValueError(
            f"{path}: init_lora_weights is {init!r}, which changed the base weight in a way that cannot be repeated; "
            "expected a plain adapter (PEFT's save_pretrained converts to one)"
        )
    known = {f.name for f in fields(LoRAConfig)} - {*_OWN_FIELDS, "init_lora_weights"}
    given = {name: value for name, value in stored.items() if name in known and value is not None}
    for name, kinds, want in (
        ("r", (int,), "a whole number"), ("lora_alpha", (int, float), "a number"),
        ("lora_dropout", (int, float), "a number"), ("bias", (str,), "a name"),
    ):  # fmt: skip
        if name in given and (isinstance(given[name], bool) or not isinstance(given[name], kinds)):
            raise ValueError(f"{path}: {name} is {given[name]!r}; expected {want}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(given.get(name, {}), dict):
            raise ValueError(f"{path}: {name} is {given[name]!r}; expected an object")
    if "target_modules" not in given:
        raise ValueError(f"{path}: target_modules is missing; expected names, or a regular expression")
    config = LoRAConfig(**given, init_lora_weights=init if init in _SUPPORTED_INITS else True)
    try:
        config.check()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    name_or_path = stored.get("base_model_name_or_path")
    return config, (name_or_path if isinstance(name_or_path, str) else None, bool(stored.get("fan_in_fan_out")))
