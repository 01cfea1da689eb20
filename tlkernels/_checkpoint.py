"""Quantized checkpoints: writing one from a safetensors file, and saying what one holds.

The layout is that of bitsandbytes, which transformers and `tlkernels.nn` read. A tensor ``X`` becomes

- ``X``: uint8 ``[ceil(numel / 2), 1]``, the codes;
- ``X.absmax``: float32 ``[blocks]``, or uint8 when double-quantized;
- ``X.quant_map``: float32 ``[16]``, the table;
- ``X.nested_absmax``, ``X.nested_quant_map``: float32, the scales of the scales and their table, when double-quantized;
- ``X.quant_state.bitsandbytes__nf4``: uint8, the bytes of a JSON object with block sizes, dtype, shape and offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from tlkernels import numpy as tnp
from tlkernels._nf4_format import DYNAMIC_CODE
from tlkernels._safetensors import PIECE, Entry, FileError, Reader, check_target, damage, layout, writing

#: Names that are left alone by default: embeddings, and output heads, which share or mirror them.
DEFAULT_SKIP = ("*embed*", "wte", "wpe", "shared", "relative_attention_bias", "*lm_head*", "predictions.decoder")

#: safetensors' spelling -> (the storage NumPy has for it, the dtype's name, the name recorded in the file).
#: bitsandbytes knows no float64 weights; they are float32 from here on.
_FLOATS: dict[str, tuple[str, str, str]] = {
    "F64": ("<f8", "float64", "float32"),
    "F32": ("<f4", "float32", "float32"),
    "F16": ("<f2", "float16", "float16"),
    "BF16": ("<u2", "bfloat16", "bfloat16"),
}
_STATE = ".quant_state.bitsandbytes__nf4"
_STATE_MARK = ".quant_state."
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_NESTED_BLOCK_SIZE = 256

Advance = Callable[[int, str], None]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern (of shell wildcards) fits the name, or some of its dot-separated parts that stand in a row."""
    return any(fnmatchcase(f".{name}.", f"*.{p}.*") for p in patterns)


# ---- quantize -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Which tensors to quantize, and how."""

    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    min_size: int = 0
    block_size: int = 64
    double_quant: bool = False
    force: bool = False

    def selects(self, entry: Entry) -> bool:
        """Floating-point matrices: named ``*.weight`` and not in `DEFAULT_SKIP`, or, with `only`, matching that."""
        if len(entry.shape) != 2 or entry.dtype not in _FLOATS or math.prod(entry.shape) < max(self.min_size, 1):
            return False
        if matches(entry.name, self.skip):
            return False
        if self.only:
            return matches(entry.name, self.only)
        return entry.name.endswith(".weight") and not matches(entry.name, DEFAULT_SKIP)


@dataclass
class Result:
    """What `quantize_file` did."""

    quantized: int = 0
    copied: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    nonfinite: dict[str, int] = field(default_factory=dict)  # tensor -> blocks that hold NaN or an infinity


def quantize_file(source: Path, target: Path, options: Options, advance: Advance) -> Result:
    """Write `target`, the quantized form of the safetensors file `source`, in bounded memory.

    Tensors are read in pieces. Held are one piece, and the scales of one tensor (1/64 of its elements), because a
    double-quantized scale depends on the mean of all.

    A tensor with NaN or infinities keeps float32 scales even with `double_quant`: their mean would spread the damage
    of a block over the whole tensor. As this is known only after reading it, the work then starts again.

    ``advance(n, name)`` is called for every n bytes read of a tensor; n = 0 says that its work begins.

    Raises
    ------
    FileError
        If a file cannot be read or written, or there is nothing to do.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise FileError(f"{target}: is the input file itself; expected another name")
    check_target(target, force=options.force)
    with Reader(source) as reader:
        _refuse_quantized(reader)
        selected = [e for e in reader.tensors.values() if options.selects(e)]
        if not selected:
            raise FileError(
                f"{source}: nothing to quantize: none of its {len(reader.tensors)} tensors is a floating-point matrix "
                "that the patterns select"
            )
        _refuse_collisions(reader, selected)
        nested = {e.name for e in selected if options.double_quant}
        try:
            return _write(reader, target, selected, nested, options, advance)
        except _NonFinite as found:
            return _write(reader, target, selected, nested - found.names, options, advance)


class _NonFinite(Exception):
    """Tensors that were to be double-quantized and cannot be."""

    def __init__(self, names: set[str]) -> None:
        self.names = names


def _refuse_quantized(reader: Reader) -> None:
    for name in reader.tensors:
        if _STATE_MARK in name:
            raise FileError(f"{reader.path}: is quantized already: it holds {name}")


def _refuse_collisions(reader: Reader, selected: Sequence[Entry]) -> None:
    for entry in selected:
        for part in (*_PARTS, _STATE):
            if entry.name + part in reader.tensors:
                raise FileError(f"{reader.path}: holds {entry.name + part}, a name that quantizing {entry.name} needs")


def _state(entry: Entry, block_size: int, offset: float | None) -> bytes:
    """The JSON object; with an offset (of a double-quantized tensor) it has the same length for every value of it."""
    numbers: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": block_size,
        "dtype": _FLOATS[entry.dtype][2],
        "shape": entry.shape,
    }
    if offset is None:
        return json.dumps(numbers).encode()
    numbers |= {"nested_blocksize": _NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": offset}
    longest = len(json.dumps({**numbers, "nested_offset": 0.0})) + len("-1.2345678901234567e-100") - len("0.0")
    return json.dumps(numbers).ljust(longest).encode()


def _outputs(entry: Entry, nested: bool, block_size: int) -> list[tuple[str, str, Sequence[int], int]]:
    """What a tensor becomes: (name, dtype, shape, bytes)."""
    numel = math.prod(entry.shape)
    packed, blocks = -(-numel // 2), -(-numel // block_size)
    state = len(_state(entry, block_size, 0.0 if nested else None))
    outputs: list[tuple[str, str, Sequence[int], int]] = [
        (entry.name, "U8", (packed, 1), packed),
        (f"{entry.name}.absmax", "U8" if nested else "F32", (blocks,), blocks if nested else 4 * blocks),
        (f"{entry.name}.quant_map", "F32", (16,), 64),
        (f"{entry.name}{_STATE}", "U8", (state,), state),
    ]
    if nested:
        groups = -(-blocks // _NESTED_BLOCK_SIZE)
        outputs += [
            (f"{entry.name}.nested_absmax", "F32", (groups,), 4 * groups),
            (f"{entry.name}.nested_quant_map", "F32", (256,), 1024),
        ]
    return outputs


def _write(
    reader: Reader, target: Path, selected: Sequence[Entry], nested: set[str], options: Options, advance: Advance
) -> Result:
    names = {e.name for e in selected}
    outputs = []
    for entry in reader.tensors.values():
        if entry.name in names:
            outputs += _outputs(entry, entry.name in nested, options.block_size)
        else:
            outputs.append((entry.name, entry.dtype, entry.shape, entry.nbytes))
    entries = layout(outputs)
    result = Result(len(names), len(reader.tensors) - len(names), reader.nbytes, sum(e.nbytes for e in entries))
    with writing(target, entries, reader.metadata, force=options.force) as writer:
        for entry in reader.tensors.values():
            advance(0, entry.name)
            if entry.name not in names:
                for piece in reader.pieces(entry):
                    writer.write(entry.name, piece)
                    advance(len(piece), entry.name)
                continue
            scales = _quantize(reader, entry, writer, options, advance)
            bad = int(np.count_nonzero(~np.isfinite(scales)))
            if bad:
                result.nonfinite[entry.name] = bad
            _write_scales(writer, entry, scales, entry.name in nested, options.block_size)
        if nested & result.nonfinite.keys():
            raise _NonFinite(nested & result.nonfinite.keys())
    return result


def _quantize(reader: Reader, entry: Entry, writer: Any, options: Options, advance: Advance) -> np.ndarray[Any, Any]:
    """Write the codes of a tensor; return its scales."""
    storage, dtype, _ = _FLOATS[entry.dtype]
    scales = np.empty(-(-math.prod(entry.shape) // options.block_size), np.float32)
    done = 0
    for piece in reader.pieces(entry):
        values = np.frombuffer(piece, storage)
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
        part = tnp.nf4_quantize(values, block_size=options.block_size, dtype=dtype)
        writer.write(entry.name, part.packed)
        scales[done : done + part.absmax.size] = part.absmax
        done += part.absmax.size
        advance(len(piece), entry.name)
    return scales


def _write_scales(writer: Any, entry: Entry, scales: np.ndarray[Any, Any], nested: bool, block_size: int) -> None:
    little = np.dtype("<f4")
    writer.write(f"{entry.name}.quant_map", np.array(tnp.NF4_CODE, little))
    offset = None
    if nested:
        if not np.isfinite(scales).all():
            scales = np.zeros_like(scales)  # `_write` discards this file
        q, nested_scale, mean = tnp.absmax_quantize(scales, block_size=_NESTED_BLOCK_SIZE)
        offset = float(mean)
        writer.write(f"{entry.name}.absmax", q)
        writer.write(f"{entry.name}.nested_absmax", nested_scale.astype(little))
        writer.write(f"{entry.name}.nested_quant_map", np.array(DYNAMIC_CODE, little))
    else:
        writer.write(f"{entry.name}.absmax", scales.astype(little))
    writer.write(f"{entry.name}{_STATE}", _state(entry, block_size, offset))


# ---- inspect --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor as `inspect_file` found it."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # of the tensor that was quantized; of the tensor itself where it was not
    storage: str  # "nf4", "fp4", or "" where it was not quantized
    block_size: int
    double_quant: bool
    nbytes: int  # with scales and tables


@dataclass
class Report:
    """What a file holds."""

    tensors: list[Stored]
    problems: list[str]
    checked: bool  # whether the file carries checksums


def inspect_file(path: Path, advance: Callable[[int], None]) -> Report:
    """Read a file, compare it with its checksums (where it has them), and check that its parts fit together.

    Raises
    ------
    FileError
        If it cannot be read at all.
    """
    with Reader(path) as reader:
        found = damage(reader, advance)
        report = Report([], found or [], found is not None)
        owned: set[str] = set()
        for name in sorted(reader.tensors):
            base, mark, kind = name.rpartition(_STATE_MARK)
            if not mark:
                continue
            owned |= {base, name, *(base + part for part in _PARTS)}
            try:
                report.tensors.append(_stored(reader, base, name, kind))
            except ValueError as error:
                report.problems.append(f"{base}: {error}")
        for name, entry in reader.tensors.items():
            if name in owned:
                continue
            report.tensors.append(Stored(name, entry.shape, _dtype_name(entry), "", 0, False, entry.nbytes))
            base = next((name.removesuffix(p) for p in _PARTS if name.endswith(p)), "")
            if base in reader.tensors:
                report.problems.append(f"{name}: has no {base}{_STATE} beside it")
        report.tensors.sort(key=lambda t: t.name)
        return report


def _dtype_name(entry: Entry) -> str:
    return _FLOATS[entry.dtype][1] if entry.dtype in _FLOATS else entry.dtype


def _stored(reader: Reader, base: str, state: str, kind: str) -> Stored:
    """A quantized tensor, or a ValueError that says what of it does not fit."""
    numbers = _numbers(reader, state)
    shape, block_size = tuple(numbers["shape"]), numbers["blocksize"]
    numel = math.prod(shape)
    blocks = -(-numel // block_size)
    parts = {part: reader.tensors.get(base + part) for part in ("", *_PARTS)}
    _want(parts, "", ("U8", "BF16", "F16", "F32"), nbytes=-(-numel // 2))
    scales = _want(parts, ".absmax", ("U8", "F32"), numel=blocks)
    _want(parts, ".quant_map", ("F32",), numel=16)
    tables = [".quant_map"]
    nested = scales.dtype == "U8"
    if nested:
        size = _positive(numbers, "nested_blocksize")
        offset = numbers.get("nested_offset")
        if not isinstance(offset, (int, float)) or not math.isfinite(offset):
            raise ValueError(f"nested_offset is {offset!r}; expected a finite number")
        _want(parts, ".nested_absmax", ("F32",), numel=-(-blocks // size))
        _want(parts, ".nested_quant_map", ("F32",), numel=256)
        tables.append(".nested_quant_map")
    for part in tables:
        if not np.isfinite(np.frombuffer(reader.read(base + part), "<f4")).all():
            raise ValueError(f"{base}{part} has entries that are not finite")
    nbytes = reader.tensors[state].nbytes + sum(e.nbytes for e in parts.values() if e is not None)
    storage = kind.removeprefix("bitsandbytes__").removeprefix("tlkernels__")
    return Stored(base, shape, str(numbers["dtype"]), storage, block_size, nested, nbytes)


def _numbers(reader: Reader, state: str) -> dict[str, Any]:
    if reader.tensors[state].nbytes > PIECE:
        raise ValueError(f"{state} has {reader.tensors[state].nbytes} bytes; expected a short JSON object")
    try:
        numbers = json.loads(reader.read(state).decode())
    except (ValueError, RecursionError):
        raise ValueError(f"{state} is not JSON") from None
    if not isinstance(numbers, dict):
        raise ValueError(f"{state} is not a JSON object")
    shape = numbers.get("shape")
    if not isinstance(shape, list) or not all(type(s) is int and s >= 0 for s in shape):
        raise ValueError(f"shape is {shape!r}; expected a list of sizes")
    _positive(numbers, "blocksize")
    if not isinstance(numbers.get("dtype"), str):
        raise ValueError(f"dtype is {numbers.get('dtype')!r}; expected a name")
    return numbers


def _positive(numbers: dict[str, Any], key: str) -> int:
    value = numbers.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} is {value!r}; expected a positive integer")
    return value


def _want(
    parts: dict[str, Entry | None], part: str, dtypes: tuple[str, ...], *, numel: int | None = None,
    nbytes: int | None = None,
) -> Entry:  # fmt: skip
    entry = parts[part]
    what = part.removeprefix(".") or "the tensor of codes"
    if entry is None:
        raise ValueError(f"{what} is missing")
    if entry.dtype not in dtypes:
        raise ValueError(f"{what} has dtype {entry.dtype}; expected {' or '.join(dtypes)}")
    if numel is not None and math.prod(entry.shape) != numel:
        raise ValueError(f"{what} has {math.prod(entry.shape)} elements; expected {numel}")
    if nbytes is not None and entry.nbytes != nbytes:
        raise ValueError(f"{what} has {entry.nbytes} bytes; expected {nbytes}")
    return entry
