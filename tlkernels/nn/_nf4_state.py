"""A 4-bit weight as the entries of a ``state_dict``, in the layout that bitsandbytes writes and reads.

For a layer's ``weight`` of n elements in b blocks:

==========================================  =================================================================
``weight``                                  uint8 ``[ceil(n / 2), 1]``, the even element in the high nibble
``weight.absmax``                           float32 ``[b]``, or uint8 ``[b]`` when double-quantized
``weight.quant_map``                        float32 ``[16]``, the table of 4-bit values
``weight.nested_absmax``                    float32 ``[ceil(b / nested_blocksize)]``, when double-quantized
``weight.nested_quant_map``                 float32 ``[256]``, the table of 8-bit scales, when double-quantized
``weight.quant_state.bitsandbytes__nf4``    uint8, the bytes of a JSON object with the numbers that are no tensors
==========================================  =================================================================

The last key ends in ``bitsandbytes__fp4`` for the FP4 table. bitsandbytes' kernels know these two tables only and
do not look at ``quant_map``, so a weight with any other table ends in ``tlkernels__table``, which it refuses to load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tlkernels._nf4_format import DYNAMIC_CODE, FP4_CODE, NF4_CODE
from tlkernels.ops.nf4 import NF4Weight

_TABLES = {"nf4": NF4_CODE, "fp4": FP4_CODE}
_QUANT_STATES = {
    "nf4": ".quant_state.bitsandbytes__nf4",
    "fp4": ".quant_state.bitsandbytes__fp4",
    "table": ".quant_state.tlkernels__table",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class StateError(ValueError):
    """An entry of a state_dict that cannot be part of a 4-bit weight."""


def quant_type(code: Tensor | None) -> str:
    """The name of a table: "nf4", "fp4", or "table" for any other."""
    if code is None:
        return "nf4"
    if code.is_meta:
        return "table"
    values = code.tolist()
    return next((name for name, table in _TABLES.items() if values == _float32(table).tolist()), "table")


def code_of(table: Tensor, name: str) -> Tensor | None:
    """The `NF4Weight.code` for a table: None for NF4, which the kernels know."""
    return None if name == "nf4" else table


def _float32(table: tuple[float, ...], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(table, dtype=torch.float32, device=device)


def write(weight: NF4Weight) -> dict[str, Tensor]:
    """What follows ``weight`` in each key, and its tensor. Bytes are shared with `weight`; the tables are fresh.

    safetensors refuses tensors that share memory, so the constant tables may not be one tensor for all layers.
    """
    device = weight.packed.device
    name = quant_type(weight.code)
    table = _float32(NF4_CODE, device) if weight.code is None else weight.code
    state = {"": weight.packed.view(-1, 1), ".absmax": weight.absmax, ".quant_map": table}
    numbers: dict[str, Any] = {
        "quant_type": name,
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if weight.absmax_scale is not None and weight.absmax_offset is not None:
        state[".nested_absmax"] = weight.absmax_scale
        state[".nested_quant_map"] = _float32(DYNAMIC_CODE, device)
        numbers["nested_blocksize"] = weight.absmax_block_size
        numbers["nested_dtype"] = "float32"
        # the shortest decimal of the double that equals the float32: reading it back gives the same bits
        numbers["nested_offset"] = 0.0 if device.type == "meta" else weight.absmax_offset.item()
    blob = torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8)
    state[_QUANT_STATES[name]] = blob.to("meta") if device.type == "meta" else blob
    return state


def missing(state: Mapping[str, Tensor]) -> list[str]:
    """The entries (what follows ``weight``) that `read` needs and `state` lacks."""
    wanted = ["", ".absmax", ".quant_map"]
    if not any(key in state for key in _QUANT_STATES.values()):
        wanted.append(_QUANT_STATES["nf4"])
    if ".absmax" in state and state[".absmax"].dtype == torch.uint8:
        wanted += [".nested_absmax", ".nested_quant_map"]
    return [key for key in wanted if key not in state]


def unexpected(state: Mapping[str, Tensor]) -> list[str]:
    """The entries that `read` has no use for."""
    known = {"", ".absmax", ".quant_map", *_QUANT_STATES.values()}
    if ".absmax" in state and state[".absmax"].dtype == torch.uint8:
        known |= {".nested_absmax", ".nested_quant_map"}
    return [key for key in state if key not in known]


def read(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> NF4Weight:
    """The weight of `shape` that the entries of `state` hold; `name` is the key of the weight, for messages.

    Raises
    ------
    StateError
        If an entry is not what the layout says; the message names its key.
    """
    numel = shape[0] * shape[1]
    packed = _bytes(state[""], name, numel, shape) if "" in state else None
    if packed is None or missing(state):
        raise StateError(f"{name} is incomplete: expected also {', '.join(name + key for key in missing(state))}")
    for key, tensor in state.items():
        if tensor.is_meta:
            raise StateError(f"{name}{key} is on the meta device, which holds no values")
    kinds = [kind for kind, key in _QUANT_STATES.items() if key in state]
    if len(kinds) != 1:
        raise StateError(f"{name}: found {' and '.join(name + _QUANT_STATES[k] for k in kinds)}; expected one of them")
    kind = kinds[0]
    numbers = _numbers(state[_QUANT_STATES[kind]], name + _QUANT_STATES[kind], kind, shape)
    blocks = -(-numel // numbers["blocksize"])
    absmax = _sized(state[".absmax"], f"{name}.absmax", blocks, torch.uint8, torch.float32)
    table = _sized(state[".quant_map"], f"{name}.quant_map", 16, torch.float32)
    if kind in _TABLES and table.tolist() != _float32(_TABLES[kind]).tolist():
        raise StateError(f"{name}.quant_map is not the table of {kind.upper()}, as {name}{_QUANT_STATES[kind]} says")
    if not bool(table.isfinite().all()):
        raise StateError(f"{name}.quant_map has entries that are not finite; expected 16 finite values")
    weight = NF4Weight(
        packed, absmax, tuple(shape), _DTYPES[numbers["dtype"]], numbers["blocksize"], code_of(table, kind)
    )
    if absmax.dtype == torch.float32:
        return weight
    size, offset = _nested_numbers(numbers, name + _QUANT_STATES[kind])
    scale = _sized(state[".nested_absmax"], f"{name}.nested_absmax", -(-blocks // size), torch.float32)
    dynamic = _sized(state[".nested_quant_map"], f"{name}.nested_quant_map", 256, torch.float32)
    if dynamic.tolist() != _float32(DYNAMIC_CODE).tolist():
        raise StateError(f"{name}.nested_quant_map is not the signed dynamic table, the only one that scales decode by")
    return weight._replace(
        absmax_scale=scale,
        absmax_offset=torch.tensor(offset, dtype=torch.float32, device=packed.device),
        absmax_block_size=size,
    )


def _numbers(blob: Tensor, key: str, kind: str, shape: tuple[int, ...]) -> dict[str, Any]:
    try:
        if blob.dtype != torch.uint8:
            raise ValueError(f"its dtype is {str(blob.dtype).removeprefix('torch.')}, not uint8")
        numbers = json.loads(bytes(blob.reshape(-1).tolist()).decode())
        if not isinstance(numbers, dict):
            raise ValueError(f"it holds a {type(numbers).__name__}")
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise StateError(f"{key} is not the bytes of a JSON object: {error}") from None
    absent = [field for field in ("quant_type", "blocksize", "dtype", "shape") if field not in numbers]
    if absent:
        raise StateError(f"{key} lacks {', '.join(absent)}")
    if numbers["quant_type"] != kind:
        raise StateError(f"{key}: quant_type is {numbers['quant_type']!r}; expected {kind!r}, as the key says")
    _block_size(numbers["blocksize"], f"{key}: blocksize")
    if numbers["dtype"] not in _DTYPES:
        raise StateError(f"{key}: dtype is {numbers['dtype']!r}; expected one of {', '.join(_DTYPES)}")
    if numbers["shape"] != list(shape):
        raise StateError(f"size mismatch for {key}: shape is {numbers['shape']}; this layer has {list(shape)}")
    return numbers


def _nested_numbers(numbers: dict[str, Any], key: str) -> tuple[int, float]:
    absent = [field for field in ("nested_blocksize", "nested_dtype", "nested_offset") if field not in numbers]
    if absent:
        raise StateError(f"{key} lacks {', '.join(absent)}, which uint8 scales need")
    if numbers["nested_dtype"] != "float32":
        raise StateError(f"{key}: nested_dtype is {numbers['nested_dtype']!r}; expected 'float32'")
    if type(numbers["nested_offset"]) not in (int, float):
        raise StateError(f"{key}: nested_offset is {numbers['nested_offset']!r}; expected a number")
    return _block_size(numbers["nested_blocksize"], f"{key}: nested_blocksize"), float(numbers["nested_offset"])


def _block_size(size: Any, what: str) -> int:
    if type(size) is not int or not 32 <= size <= 4096 or size & (size - 1):
        raise StateError(f"{what} is {size!r}; expected a power of two from 32 to 4096")
    return size


def _bytes(packed: Tensor, key: str, numel: int, shape: tuple[int, ...]) -> Tensor:
    """The codes as uint8 ``[ceil(numel / 2)]``: they come as ``[n, 1]``, ``[1, n]``, or a float view of the bytes."""
    want, got = (numel + 1) // 2, packed.numel() * packed.element_size()
    if got == want and packed.dtype in (torch.uint8, torch.bfloat16, torch.float16, torch.float32):
        return packed.reshape(-1).view(torch.uint8)
    dtype = str(packed.dtype).removeprefix("torch.")
    if packed.is_floating_point() and packed.shape == shape:
        raise StateError(
            f"{key} is a dense {dtype} matrix; expected 4-bit codes. Load it into the dense layer, then quantize that"
        )
    raise StateError(
        f"size mismatch for {key}: {dtype} of shape {tuple(packed.shape)} is {got} bytes; "
        f"expected {want} bytes of 4-bit codes for a layer of shape {tuple(shape)}"
    )


def _sized(tensor: Tensor, key: str, length: int, *dtypes: torch.dtype) -> Tensor:
    if tensor.dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in (*dtypes, tensor.dtype)]
        raise StateError(f"{key} has dtype {names[-1]}; expected {' or '.join(names[:-1])}")
    if tensor.shape != (length,):
        raise StateError(f"size mismatch for {key}: its shape is {tuple(tensor.shape)}; expected ({length},)")
    return tensor
