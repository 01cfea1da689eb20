"""Hugging Face checkpoints straight into 4 bits: the dense model never exists.

The model is built on the meta device; transformers walks the checkpoint, renames and converts its keys, and asks for
one tensor after another; each weight of a linear layer is quantized when it arrives. Memory at the peak: the 4-bit
model, and one tensor as stored and as it is quantized.

Tim Dettmers, Artidoro Pagnoni, Ari Holtzman, Luke Zettlemoyer. *QLoRA: Efficient Finetuning of Quantized LLMs.*
NeurIPS 2023, arXiv:2305.14314.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlkernels._safetensors import Entry, FileError, Reader
from tlkernels.integrations.bitsandbytes import quantization_config as _bitsandbytes_config
from tlkernels.nn import NF4Linear, _nf4_state
from tlkernels.nn import quantize as _quantize
from tlkernels.ops import nf4 as ops
from tlkernels.ops.nf4 import NF4Weight

__all__ = ["from_pretrained_nf4"]

_METHOD = "tlkernels_nf4"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_STATE_MARK = ".quant_state."
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _transformers() -> Any:
    try:
        import safetensors
        import transformers
    except ImportError as error:
        raise ImportError(
            "from_pretrained_nf4 needs transformers and safetensors; install them with `pip install transformers`"
        ) from error
    del safetensors
    return transformers


def from_pretrained_nf4(
    name_or_path: str | os.PathLike[str],
    *,
    model_class: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 64,
    double_quant: bool = True,
    skip_modules: Sequence[str] = ("lm_head",),
    device: torch.device | str = "cpu",
    strict: bool = True,
    **kwargs: Any,
) -> Any:
    """Load a Hugging Face checkpoint with its linear layers in 4 bits, tensor by tensor.

    Parameters
    ----------
    name_or_path : str or path
        A directory, or a name on the Hugging Face hub: ``model.safetensors``, or shards with their index. Dense, or
        in bitsandbytes' 4-bit layout (which is loaded as it is, without quantizing again).
    model_class : type, optional
        ``transformers.AutoModelForCausalLM`` and the like, or a model's own class. By default
        ``transformers.AutoModel``.
    dtype : torch.dtype
        Of all that stays dense, and of the weights when they are quantized, as in ``from_pretrained(dtype=...)``.
    block_size : int
        Weights per scale, a power of two from 32 to 4096.
    double_quant : bool
        Store the scales in 8 bits.
    skip_modules : sequence of str
        Patterns of modules that stay dense, as for `tlkernels.quantize_model`.
    device : torch.device or str
        Where the model goes; anything but the CPU needs the package accelerate.
    strict : bool
        Refuse a checkpoint that lacks parameters of the model or holds others. With False, transformers initializes
        the former, ignores the latter, and reports both.
    **kwargs
        To ``from_pretrained``: ``config``, ``revision``, ``token``, ``cache_dir``, ``attn_implementation``,
        ``key_mapping``, arguments of the model (``add_pooling_layer=False``) or of its configuration.

    Returns
    -------
    transformers.PreTrainedModel
        In eval mode. Bit for bit what ``from_pretrained(name_or_path, dtype=dtype)`` and then
        `tlkernels.quantize_model` give.

    Raises
    ------
    ImportError
        If transformers or safetensors is not installed; if accelerate is not, and `device` is not the CPU.
    FileNotFoundError
        If there is no safetensors checkpoint under that name.
    TypeError
        If `dtype` is not a floating-point dtype.
    ValueError
        If the checkpoint does not fit the model (naming the keys), a file is damaged or cut short (naming the file),
        or the checkpoint is quantized in another way.

    Warns
    -----
    UserWarning
        Names the linear layers that stay dense although nobody skipped them, as `tlkernels.quantize_model` does, and
        says how many ``Conv1D`` layers (GPT-2; their weight is transposed) and fused weights of experts (mixtures of
        experts; they are 3-dimensional) stay dense.

    Notes
    -----
    Renamed and converted keys, tied weights, buffers that are not in the checkpoint, parameters kept in float32 and the
    generation configuration are transformers' work, the same code as in ``from_pretrained``. Files are read piece by
    piece instead of mapped, so that no parameter keeps a whole file in memory.

    The model is an ordinary one with `NF4Linear` layers: no quantizer is attached (``is_quantized`` is False), so
    ``transformers.Trainer`` and ``.to()`` take it as it is. As 4-bit weights do not train, what does is up to you:
    adapters from PEFT (`tlkernels.integrations.peft.register`) or from `tlkernels.methods.peft`.

    ``model.config.quantization_config`` is set for bitsandbytes, whose layout ``save_pretrained`` writes: the
    directory loads here, with every bit the same, and through plain transformers with bitsandbytes' layers.

    Models whose code comes with the checkpoint (``trust_remote_code``), and adapter directories, are not supported.

    References
    ----------
    Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM  # doctest: +SKIP
    >>> model = from_pretrained_nf4("llama-7b/", model_class=AutoModelForCausalLM)  # doctest: +SKIP
    """
    transformers = _transformers()
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"from_pretrained_nf4: dtype is {dtype!r}; expected a floating-point torch.dtype")
    ops._check_block_size("from_pretrained_nf4", block_size)
    skip = _quantize._patterns("skip_modules", skip_modules)
    if kwargs.get("trust_remote_code"):
        raise ValueError("from_pretrained_nf4: trust_remote_code is not supported; expected a model of transformers")
    model_class = transformers.AutoModel if model_class is None else model_class
    name = os.fspath(name_or_path)
    hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
    config, kwargs = _config(transformers, model_class, name, hub, kwargs)
    model_class, config = _model_class(model_class, config)
    quantizer_config = _classes()["NF4Config"](block_size, double_quant, skip)
    with contextlib.ExitStack() as stack:
        state = _entries(_readers(name, hub, stack))
        if torch.device(device).type != "cpu":
            kwargs["device_map"] = {"": device}
        try:
            model, info = model_class.from_pretrained(
                None, config=config, state_dict=state, dtype=dtype, quantization_config=quantizer_config,
                output_loading_info=True, **{**kwargs, "ignore_mismatched_sizes": True},  # `_check_fit` refuses them
            )  # fmt: skip
        except (FileError, _nf4_state.StateError) as error:
            raise ValueError(f"from_pretrained_nf4: {error}") from None
    _check_fit(name, info, model.hf_quantizer, strict)
    notes = _convert(model, model.hf_quantizer)
    _forget_quantizer(model)
    model.config.name_or_path = model.name_or_path = name
    if any(isinstance(module, NF4Linear) for module in model.modules()):
        model.config.quantization_config = _bitsandbytes_config(model)
    if model.can_generate() and "generation_config" not in kwargs:
        _load_generation_config(transformers, model, name, hub)
    if notes:
        warnings.warn("from_pretrained_nf4: " + "; ".join(notes), stacklevel=2)
    return model


# ---- the checkpoint -------------------------------------------------------------------------------------------------


def _config(
    transformers: Any, model_class: Any, name: str, hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model's configuration, marked as not quantized, and the arguments that it had no use for."""
    config = kwargs.pop("config", None)
    if config is None:
        source = getattr(model_class, "config_class", None) or transformers.AutoConfig
        config, kwargs = source.from_pretrained(name, return_unused_kwargs=True, **hub, **kwargs)
    given = getattr(config, "quantization_config", None)
    if given is not None:
        entries = given if isinstance(given, Mapping) else given.to_dict()
        if not entries.get("load_in_4bit"):
            method = entries.get("quant_method", entries)
            raise ValueError(f"{name} is quantized by {method!s}; expected a dense checkpoint, or bitsandbytes' 4 bits")
        del config.quantization_config
    return config, kwargs


def _model_class(model_class: Any, config: Any) -> tuple[Any, Any]:
    """The class that one of transformers' Auto classes stands for, and its part of the configuration."""
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        return model_class, config
    from transformers.models.auto.auto_factory import _get_model_class

    if type(config) not in mapping:
        kind = f"{type(config).__name__} (model type {config.model_type!r})"
        raise ValueError(f"from_pretrained_nf4: {model_class.__name__} has no model for a {kind}")
    model_class = _get_model_class(config, mapping)
    text = config.sub_configs.get("text_config")
    inside = text is not None and getattr(model_class, "config_class", None) is text
    return model_class, config.get_text_config() if inside else config


def _readers(name: str, hub: dict[str, Any], stack: contextlib.ExitStack) -> Iterable[Reader]:
    """The open files of a checkpoint. All headers are read before the model is built."""
    try:
        return [stack.enter_context(Reader(path)) for path in _files(name, hub)]
    except FileError as error:
        raise ValueError(f"from_pretrained_nf4: {error}") from None


def _files(name: str, hub: dict[str, Any]) -> list[Path]:
    from transformers.utils import cached_file

    def find(file: str) -> Path | None:
        options = {**hub, "_raise_exceptions_for_missing_entries": False}
        found = cached_file(name, file, **options)
        return None if found is None else Path(found)

    index = find(_INDEX)
    if index is None:
        single = find(_SINGLE)
        if single is None:
            raise FileNotFoundError(
                f"from_pretrained_nf4: {name} has neither {_SINGLE} nor {_INDEX}; expected a safetensors checkpoint"
            )
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"from_pretrained_nf4: {index}: not a valid index: {error!r}") from None
    paths = []
    for file in names:
        path = find(file)
        if path is None:
            raise FileNotFoundError(f"from_pretrained_nf4: {name} has no {file}, which {_INDEX} names")
        paths.append(path)
    return paths


def _entries(readers: Iterable[Reader]) -> dict[str, Any]:
    """Name -> what reads the tensor when transformers asks for it. The parts of a 4-bit weight are one entry."""
    places: dict[str, tuple[Reader, Entry]] = {}
    for reader in readers:
        for entry in reader.tensors.values():
            if entry.name in places:
                raise ValueError(
                    f"from_pretrained_nf4: {entry.name} is in both {places[entry.name][0].path} and {reader.path}"
                )
            places[entry.name] = reader, entry
    quantized = {name.rpartition(_STATE_MARK)[0] for name in places if _STATE_MARK in name}
    parts: dict[str, dict[str, _Lazy]] = {name: {} for name in quantized}
    found: dict[str, Any] = {}
    for name, place in places.items():
        owner = next((base for base in _prefixes(name) if base in quantized), None)
        if owner is None:
            found[name] = _Lazy(*place)
        else:
            parts[owner][name[len(owner) :]] = _Lazy(*place)
    return found | {name: _LazyNF4(name, entries) for name, entries in parts.items()}


def _prefixes(name: str) -> list[str]:
    """The name and what it is a part of: "a.weight.absmax", "a.weight", "a"."""
    pieces = name.split(".")
    return [".".join(pieces[:i]) for i in range(len(pieces), 0, -1)]


class _Lazy:
    """A tensor in a file, with the part of the interface of safetensors' slices that transformers uses."""

    def __init__(self, reader: Reader, entry: Entry) -> None:
        self._reader, self._entry = reader, entry

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        return self._entry.dtype

    def __getitem__(self, index: Any) -> Tensor:
        entry, path = self._entry, self._reader.path
        if entry.dtype not in _DTYPES:
            raise FileError(f"{path}: {entry.name} has dtype {entry.dtype}; expected one of {', '.join(_DTYPES)}")
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        buffer: Any = data.numpy()
        target, done = memoryview(buffer), 0
        for piece in self._reader.pieces(entry):
            target[done : done + len(piece)] = piece
            done += len(piece)
        return data.view(_DTYPES[entry.dtype]).view(entry.shape)[index]


class _LazyNF4:
    """A weight that the checkpoint holds in 4 bits. `_Stored` carries it past transformers' casts."""

    def __init__(self, name: str, parts: dict[str, _Lazy]) -> None:
        self._name, self._parts = name, parts

    def get_dtype(self) -> str:
        return "U8"

    def __getitem__(self, index: Any) -> _Stored:
        state = {suffix: part[...] for suffix, part in self._parts.items()}
        missing = _nf4_state.missing(state)
        blob = next((t for suffix, t in state.items() if suffix.startswith(_STATE_MARK)), None)
        if missing or blob is None:
            raise _nf4_state.StateError(f"{self._name} lacks {', '.join(self._name + key for key in missing)}")
        try:
            rows, columns = json.loads(bytes(blob.tolist()).decode())["shape"]
        except (ValueError, KeyError, TypeError):
            raise _nf4_state.StateError(f"the quant_state of {self._name} is not the JSON object of a matrix") from None
        return _Stored(_nf4_state.read(state, self._name, (rows, columns)))


class _Stored:
    """An `NF4Weight` on its way through transformers, which moves it, and casts it in vain."""

    def __init__(self, weight: NF4Weight) -> None:
        self.weight = weight

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def to(self, device: Any = None, dtype: Any = None) -> _Stored:
        moved: dict[str, Any] = {k: t.to(device) for k, t in self.weight._asdict().items() if isinstance(t, Tensor)}
        return _Stored(self.weight._replace(**moved))


# ---- the quantizer --------------------------------------------------------------------------------------------------


@functools.cache
def _classes() -> dict[str, type]:
    """The classes by which transformers lets others quantize while it loads, registered there once."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(_METHOD)
    class NF4Config(QuantizationConfigMixin):
        """What to quantize, and how."""

        skip_modules: list[str]

        def __init__(
            self, block_size: int = 64, double_quant: bool = True, skip_modules: Sequence[str] = (), **kwargs: Any
        ) -> None:
            method: Any = _METHOD
            self.quant_method = method
            self.block_size, self.double_quant, self.skip_modules = block_size, double_quant, list(skip_modules)

    @register_quantizer(_METHOD)
    class NF4Quantizer(HfQuantizer):
        """Chooses the layers on the meta model, and quantizes each weight that arrives for one of them."""

        @property
        def config(self) -> Any:
            return self.quantization_config

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            self.names, self.notes = _select(model, self.config.skip_modules)
            self.mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            return param_name.removesuffix(".weight") in self.names and param_name.endswith(".weight")

        def get_quantize_ops(self) -> Any:
            return Quantize(self)

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    class Quantize(ConversionOps):
        """A dense weight, or one in 4 bits already, as a parameter that holds its codes."""

        def __init__(self, quantizer: Any) -> None:
            self.quantizer = quantizer

        def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
            model = kwargs["model"]
            # of what one stored tensor is split into (packed q, k and v), some may have to stay dense
            chosen = {name for name in input_dict if self.quantizer.param_needs_quantization(model, name)}
            return {n: self._quantized(n, value, model) if n in chosen else value for n, value in input_dict.items()}

        def _quantized(self, name: str, value: Any, model: Any) -> nn.Parameter:
            value = value[0] if isinstance(value, list) else value
            want = tuple(model.get_parameter(name).shape)
            if tuple(value.shape) != want:
                self.quantizer.mismatched[name] = tuple(value.shape), want
                return nn.Parameter(torch.empty(0))
            config = self.quantizer.config
            weight = (
                value.weight
                if isinstance(value, _Stored)
                else ops.nf4_quantize(value, block_size=config.block_size, double_quant=config.double_quant)
            )
            parameter = nn.Parameter(weight.packed, requires_grad=False)
            parameter.nf4_weight = weight  # type: ignore[attr-defined]
            return parameter

    return {"NF4Config": NF4Config, "NF4Quantizer": NF4Quantizer}


def _select(model: Any, skip: Sequence[str]) -> tuple[set[str], list[str]]:
    """The linear layers to quantize, by name, and notes on those that stay dense."""
    layers, notes = _quantize._layers(model, skip, ())
    notes += _quantize._useless(model, [p for p in skip if p not in _quantize.DEFAULT_SKIP])
    groups, tied = _quantize._sharing(model, layers)
    names = {name for group in groups for name in group}
    notes += tied
    # on the meta device weights are tied by name only
    for pair in getattr(model, "all_tied_weights_keys", {}).items():
        inside = [p.removesuffix(".weight") for p in pair if p.removesuffix(".weight") in names]
        if len(inside) == 1:
            other = next(p for p in pair if p.removesuffix(".weight") != inside[0])
            notes.append(f"{inside[0]} stays dense: it is tied to {other.removesuffix('.weight')}")
            names.remove(inside[0])
    transposed = sum(type(module).__name__ == "Conv1D" for module in model.modules())
    if transposed:
        notes.append(f"{transposed} Conv1D layers stay dense: their weights are [in_features, out_features]")
    experts = sum(p.dim() == 3 and "experts" in name for name, p in model.named_parameters())
    if experts:
        notes.append(f"{experts} parameters of experts stay dense: they are 3-dimensional, not linear layers")
    return names, notes


def _check_fit(name: str, info: dict[str, Any], quantizer: Any, strict: bool) -> None:
    """Raise a ValueError that says how the checkpoint does not fit the model."""
    faults = [
        f"{key} has shape {tuple(got)} in the checkpoint, {tuple(want)} in the model"
        for key, (got, want) in sorted(quantizer.mismatched.items())
    ]
    faults += [
        f"{key} has shape {tuple(got)} in the checkpoint, {tuple(want)} in the model"
        for key, got, want in sorted(info["mismatched_keys"])
    ]
    hint = ""
    for what, keys in (("missing", info["missing_keys"]), ("unexpected", info["unexpected_keys"])):
        if strict and keys:
            shown = ", ".join(sorted(keys)[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            faults.append(f"{len(keys)} {what} key{'s' if len(keys) > 1 else ''}: {shown}")
            hint = "; strict=False allows missing and unexpected keys"
    if faults:
        raise ValueError(f"from_pretrained_nf4: {name} does not fit the model: {'; '.join(faults)}{hint}")


def _convert(model: Any, quantizer: Any) -> list[str]:
    """Put `NF4Linear` layers where the quantized weights are; returns the notes to warn with."""
    config = quantizer.config
    weights: dict[int, NF4Weight] = {}  # of tied layers once
    layers: dict[int, NF4Linear] = {}
    for name in sorted(quantizer.names):
        old = model.get_submodule(name)
        parameter = old.weight
        weight = weights.get(id(parameter)) or getattr(parameter, "nf4_weight", None)
        if weight is None:  # not in the checkpoint: transformers has initialized it
            weight = ops.nf4_quantize(parameter.data, block_size=config.block_size, double_quant=config.double_quant)
        weights[id(parameter)] = weight
        new = layers.setdefault(id(old), NF4Linear.from_weight(weight, old.bias).train(old.training))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return list(quantizer.notes)


def _forget_quantizer(model: Any) -> None:
    """Undo the marks by which transformers would refuse what these layers can do: train, move, change dtype."""
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_is_quantized", False):
            del config._is_quantized


def _load_generation_config(transformers: Any, model: Any, name: str, hub: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the checkpoint has none: the model has made its own from its configuration
        model.generation_config = transformers.GenerationConfig.from_pretrained(name, **hub)
