"""Live bitsandbytes layers to 4-bit layers of this package, and back. The bytes of codes and scales are shared.

Checkpoints need neither function: the layers here save and load bitsandbytes' layout (see `tlkernels.nn.NF4Linear`).
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from tlkernels._nf4_format import FP4_CODE
from tlkernels.nn import NF4Embedding, NF4Linear, _nf4_state
from tlkernels.ops import nf4 as ops
from tlkernels.ops.nf4 import NF4Weight

__all__ = ["from_bitsandbytes", "quantization_config", "to_bitsandbytes"]


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            "tlkernels.integrations.bitsandbytes needs bitsandbytes; install it with `pip install bitsandbytes`"
        ) from error
    return bitsandbytes


def from_bitsandbytes(model: nn.Module) -> nn.Module:
    """Replace the 4-bit layers of bitsandbytes in a model, in place, by `NF4Linear` and `NF4Embedding`.

    Parameters
    ----------
    model : torch.nn.Module
        A model that holds ``Linear4bit`` or ``Embedding4bit`` layers (NF4 or FP4), or one such layer. Layers that
        bitsandbytes has not quantized yet are quantized here, with the block size and table they were made for.

    Returns
    -------
    torch.nn.Module
        The model itself; the new layer, where `model` is one layer.

    Raises
    ------
    ImportError
        If bitsandbytes is not installed.
    ValueError
        If a layer's tables are not those of the format.

    Warns
    -----
    UserWarning
        For a layer that bitsandbytes has run in eval mode on a CPU with bfloat16 dot products: it has rounded the
        scales to bfloat16 and discarded the others. The codes are restored; the scales stay rounded.

    Notes
    -----
    Codes, scales and biases share memory with the bitsandbytes layer. Hooks are not taken over.
    """
    bnb = _bitsandbytes()

    def convert(layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = _weight(layer, (layer.out_features, layer.in_features))
            return NF4Linear.from_weight(weight, layer.bias).train(layer.training)
        if isinstance(layer, bnb.nn.Embedding4bit):
            weight = _weight(layer, (layer.num_embeddings, layer.embedding_dim))._replace(dtype=layer.dtype)
            return NF4Embedding.from_weight(weight, layer.padding_idx).train(layer.training)
        return None

    return _replace(model, convert)


def to_bitsandbytes(model: nn.Module) -> nn.Module:
    """Replace the `NF4Linear` and `NF4Embedding` layers of a model, in place, by those of bitsandbytes.

    Parameters
    ----------
    model : torch.nn.Module
        A model that holds 4-bit layers of this package, or one such layer.

    Returns
    -------
    torch.nn.Module
        The model itself; the new layer, where `model` is one layer.

    Raises
    ------
    ImportError
        If bitsandbytes is not installed.
    ValueError
        If a layer's table is neither NF4 nor FP4, the only ones that bitsandbytes' kernels know.

    Warns
    -----
    UserWarning
        For a layer whose rows are not a multiple of its block size: bitsandbytes 0.50 decodes such a weight wrongly
        on a CPU, without an error.

    Notes
    -----
    Codes, scales and biases share memory with the layer. Hooks are not taken over.
    """
    bnb = _bitsandbytes()

    def convert(layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, NF4Linear):
            new: Any = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, device="meta")
            new.bias = layer.bias
        elif isinstance(layer, NF4Embedding):
            new = bnb.nn.Embedding4bit(layer.num_embeddings, layer.embedding_dim, dtype=layer.dtype, device="meta")
            new.padding_idx = layer.padding_idx
        else:
            return None
        new.weight = _params(bnb, layer.nf4_weight, new)
        new.train(layer.training)
        return cast(nn.Module, new)

    return _replace(model, convert)


def quantization_config(model: nn.Module) -> Any:
    """The ``transformers.BitsAndBytesConfig`` under which transformers loads what `model` saves.

    Parameters
    ----------
    model : torch.nn.Module
        A model that holds `NF4Linear` layers, e.g. a transformers model after `tlkernels.quantize_model`.

    Returns
    -------
    transformers.BitsAndBytesConfig
        4-bit, with the table and kind of scales of the layers, and all dense linear layers named in
        ``llm_int8_skip_modules``.

    Raises
    ------
    ImportError
        If transformers is not installed.
    ValueError
        If the model holds no 4-bit linear layer, layers of different tables, an `NF4Embedding` (which transformers
        would load as a dense embedding), or a table other than NF4 and FP4.

    Examples
    --------
    >>> model = tlkernels.quantize_model(model)  # doctest: +SKIP
    >>> model.config.quantization_config = quantization_config(model)  # doctest: +SKIP
    >>> model.save_pretrained("out")  # doctest: +SKIP
    """
    try:
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise ImportError(
            "quantization_config needs transformers; install it with `pip install transformers`"
        ) from error
    named = dict(model.named_modules())
    layers = {name: m for name, m in named.items() if isinstance(m, NF4Linear)}
    tables = {_nf4_state.quant_type(layer.code) for layer in layers.values()}
    embeddings = [name for name, m in named.items() if isinstance(m, NF4Embedding)]
    if embeddings:
        raise ValueError(f"quantization_config: {embeddings[0]} is an NF4Embedding, which transformers cannot load")
    if len(tables) != 1 or tables == {"table"}:
        raise ValueError(f"quantization_config: the 4-bit tables are {sorted(tables)}; expected all 'nf4' or all 'fp4'")
    first = next(iter(layers.values()))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=tables.pop(),
        bnb_4bit_use_double_quant=first.double_quant,
        bnb_4bit_compute_dtype=first.dtype,
        llm_int8_skip_modules=[name for name, m in named.items() if isinstance(m, nn.Linear)],
    )


def _replace(model: nn.Module, convert: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Put ``convert(module)``, where that is not None, in all places where the module stands."""
    places: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        places[module].append(name)
    for module, names in places.items():
        new = convert(module)
        if new is None:
            continue
        for name in names:
            if not name:
                return new
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    return model


def _weight(layer: Any, shape: tuple[int, int]) -> NF4Weight:
    """The weight of a bitsandbytes layer, in memory shared with it."""
    params = layer.weight
    state = getattr(params, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:  # not quantized yet: bitsandbytes does that on the first move to a device
        code = torch.tensor(FP4_CODE, device=params.device) if params.quant_type == "fp4" else None
        double_quant = bool(params.compress_statistics)
        return ops.nf4_quantize(params.data, block_size=params.blocksize, code=code, double_quant=double_quant)
    data = params.data
    if getattr(state, "packing_format_for_cpu", False):
        data, state = _unpacked(data, state)
    entries = {f".{key}": tensor.detach() for key, tensor in state.as_dict(packed=True).items()}
    return _nf4_state.read({"": data, **entries}, "weight", shape)


def _unpacked(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Codes and state from the layout that bitsandbytes gives a weight in eval mode on a CPU with bfloat16 products."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    warnings.warn(
        "from_bitsandbytes: bitsandbytes has run this layer in eval mode, which rounded its scales to bfloat16; "
        "convert before the first call to keep them",
        stacklevel=4,
    )
    state = copy.copy(state)  # the inverse writes to it
    state.original_nested = False  # the 8-bit scales are gone; quantizing the rounded ones again would lose more
    absmax = state.absmax.T.reshape(-1).float()
    data, state = _convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax = absmax
    return data, state


def _params(bnb: Any, weight: NF4Weight, module: nn.Module) -> Any:
    """A weight as the parameter of a bitsandbytes layer, in memory shared with it."""
    table = _nf4_state.quant_type(weight.code)
    if table == "table":
        raise ValueError("to_bitsandbytes: a layer's table is neither NF4 nor FP4; bitsandbytes knows no other")
    if weight.shape[1] % weight.block_size:
        warnings.warn(
            f"to_bitsandbytes: rows of {weight.shape[1]} are not a multiple of block_size {weight.block_size}; "
            "bitsandbytes decodes such a weight wrongly on a CPU",
            stacklevel=4,
        )
    entries = _nf4_state.write(weight)
    data = entries.pop("").detach()
    stats = {suffix[1:]: tensor.detach() for suffix, tensor in entries.items()}
    return bnb.nn.Params4bit.from_prequantized(data, stats, device=data.device, module=module)
