"""A whole model in 4 bits, layer by layer, and an account of what its memory holds."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from tlkernels.nn.nf4 import NF4Embedding, NF4Linear, _NF4Module, _quantize
from tlkernels.ops import nf4 as ops

__all__ = ["MemoryReport", "memory_report", "quantize_model"]

DEFAULT_SKIP = ("lm_head",)


def quantize_model(
    model: nn.Module,
    skip: Sequence[str] = DEFAULT_SKIP,
    *,
    embeddings: bool | Sequence[str] = False,
    block_size: int = 64,
    double_quant: bool = True,
    progress: bool | None = None,
) -> nn.Module:
    """Replace the linear layers of a model (and its embeddings, when asked) by 4-bit ones, in place.

    Parameters
    ----------
    model : torch.nn.Module
        On any device; weights are quantized where they are. Layer by layer, so the memory needed beyond the dense
        model is that of one layer. A model on the meta device gets the layers that a 4-bit checkpoint loads into.
    skip : sequence of str
        Patterns (``fnmatch``) of modules to leave alone, with all below them. A pattern stands for a full name or for
        its last parts: ``"lm_head"`` also skips ``"decoder.lm_head"``, ``"layer.0"`` the whole of
        ``"encoder.layer.0"``.
    embeddings : bool or sequence of str
        Whether to quantize embeddings too, or the patterns of those to quantize.
    block_size : int
        Weights per scale, a power of two from 32 to 4096.
    double_quant : bool
        Store the scales in 8 bits.
    progress : bool, optional
        Show a progress bar on stderr (rich or tqdm, whichever is installed). By default, when stderr is a terminal.

    Returns
    -------
    torch.nn.Module
        The model itself; the new layer, where the model is a single layer.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.
    ImportError
        If `progress` is True and neither rich nor tqdm is installed.

    Warns
    -----
    UserWarning
        Names the layers that were asked for and left dense, and why:

        - subclasses of `torch.nn.Linear` or `torch.nn.Embedding`, whose owners may read their weight (such as the
          output projection of `torch.nn.MultiheadAttention`);
        - weights that are tied to a parameter that stays dense. Where all layers that share a weight are quantized
          (an embedding and its output head, with ``embeddings=True, skip=()``), they share the 4-bit weight;
        - layers whose weight is made by a hook (weight norm, pruning), or whose ``forward`` was replaced;
        - embeddings with ``max_norm``, and weights that are not floating-point.

        It also names patterns that match nothing.

    Notes
    -----
    Calling it again changes nothing. Biases stay the same Parameter objects, hooks and the mode (train or eval) are
    kept. Layers that transformers wants in float32 (``_keep_in_fp32_modules``) are skipped: such models convert the
    input to the dtype of ``weight``, which for 4-bit codes is uint8.

    References
    ----------
    Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314.

    Examples
    --------
    >>> import torch, tlkernels
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))
    >>> model = tlkernels.quantize_model(model, skip=["2"])
    >>> [type(layer).__name__ for layer in model]
    ['NF4Linear', 'ReLU', 'Linear']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model: model is a {type(model).__name__}; expected a torch.nn.Module")
    skip = _patterns("skip", skip)
    tables = _patterns("embeddings", ("*",) if embeddings is True else embeddings or ())
    ops._check_block_size("quantize_model", block_size)

    layers, notes = _layers(model, skip, tables)
    notes += _useless(model, [p for p in skip if p not in DEFAULT_SKIP], [p for p in tables if p != "*"])
    # Only names are held from here on, so that each dense weight is freed as soon as it is replaced.
    groups, tied = _sharing(model, layers)
    notes += tied
    sizes = [_weight(model, names[0]).numel() for names in groups]
    with _progress_bar(sum(sizes), progress) as advance:
        for names, size in zip(groups, sizes, strict=True):
            model = _quantize_group(model, names, block_size, double_quant)
            advance(size)
    if notes:
        warnings.warn("quantize_model: " + "; ".join(notes), stacklevel=2)
    return model


def _patterns(name: str, patterns: Sequence[str]) -> tuple[str, ...]:
    if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"quantize_model: {name} is {patterns!r}; expected a sequence of patterns, such as ['lm_head']")
    return tuple(patterns)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern is the name of this module or of one that it is part of, in full or by its last parts."""
    parts = name.split(".")
    chain = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(fnmatchcase(n, p) or fnmatchcase(n, f"*.{p}") for n in chain for p in patterns)


def _useless(model: nn.Module, *patterns: Sequence[str]) -> list[str]:
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    unused = [p for group in patterns for p in group if not any(_matches(name, [p]) for name in names)]
    return [f"no module matches the pattern {p!r}" for p in unused]


def _layers(model: nn.Module, skip: Sequence[str], tables: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names of the layers to quantize, at every place where they stand, and a note for each that cannot be."""
    names: list[str] = []
    notes: dict[int, str] = {}
    kept = {p for m in model.modules() for p in getattr(m, "_keep_in_fp32_modules", None) or ()}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, (nn.Linear, nn.Embedding)) or _matches(name, (*skip, *kept)):
            continue
        if isinstance(module, nn.Embedding) and not _matches(name, tables):
            continue
        why = _why_not(module)
        if why is None:
            names.append(name)
        else:
            notes.setdefault(id(module), f"{name or 'the model'} stays dense: {why}")
    return names, list(notes.values())


def _why_not(module: nn.Linear | nn.Embedding) -> str | None:
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "torch.nn.MultiheadAttention reads its weight"
    if type(module) not in (nn.Linear, nn.Embedding):
        return f"{type(module).__name__} is a subclass with a meaning of its own"
    if "weight" not in module._parameters:
        return "its weight is computed by a hook"
    if "forward" in vars(module):
        return "its forward was replaced"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm writes to its weight"
    if not module.weight.is_floating_point():
        return f"its weight has dtype {str(module.weight.dtype).removeprefix('torch.')}"
    return None


def _sharing(model: nn.Module, layers: list[str]) -> tuple[list[list[str]], list[str]]:
    """The layers in groups that share one weight, less those whose weight something else uses; and notes on these."""
    wanted = {f"{name}.weight".lstrip(".") for name in layers}
    uses: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)].append(name)
    groups, notes = [], []
    for names in uses.values():
        dense = [name for name in names if name not in wanted]
        if not dense:
            groups.append([name.removesuffix("weight").removesuffix(".") for name in names])
        elif len(dense) < len(names):
            quantized = ", ".join(name for name in names if name in wanted)
            notes.append(f"{quantized} stays dense: it is tied to {', '.join(dense)}")
    return groups, notes


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight".lstrip("."))


def _quantize_group(model: nn.Module, names: list[str], block_size: int, double_quant: bool) -> nn.Module:
    """Put 4-bit layers, which share one weight, in the places of `names`; returns the model (new, where a layer)."""
    weight = _quantize(_weight(model, names[0]), block_size, double_quant)
    replacements: dict[int, tuple[nn.Module, _NF4Module]] = {}  # holds the old modules: ids of dead ones are reused
    for name in names:
        old = model.get_submodule(name)
        _, new = replacements.setdefault(id(old), (old, _replacement(old, weight)))
        if not name:
            return new
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def _replacement(old: Any, weight: ops.NF4Weight) -> _NF4Module:
    new: _NF4Module
    if isinstance(old, nn.Embedding):
        new = NF4Embedding.from_weight(weight, old.padding_idx)
    else:
        new = NF4Linear.from_weight(weight, old.bias)
    for hooks in (
        "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
    ):  # fmt: skip
        setattr(new, hooks, getattr(old, hooks))  # the very dictionaries, so that a handle's remove() still works
    return new.train(old.training)


@contextlib.contextmanager
def _progress_bar(total: int, show: bool | None) -> Iterator[Callable[[int], object]]:
    """A bar over `total` weights, on stderr; yields what to call after each layer with its number of weights."""
    found = [name for name in ("rich", "tqdm") if importlib.util.find_spec(name)]
    if show and not found:
        raise ImportError("quantize_model: progress=True needs rich or tqdm; install one with `pip install rich`")
    if not (sys.stderr.isatty() if show is None else show) or not found or not total:
        yield lambda size: None
    elif found[0] == "rich":
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("quantizing", total=total)
            yield lambda size: bar.advance(task, size)
    else:
        from tqdm import tqdm

        with tqdm(total=total, desc="quantizing", unit="w", unit_scale=True, leave=False, file=sys.stderr) as bar:
            yield bar.update


@dataclass(frozen=True)
class MemoryReport:
    """What the memory of a model holds, in bytes; tensors that share memory count once. Prints as a table.

    Attributes
    ----------
    layers : int
        4-bit layers.
    weights : int
        Weights (numbers, not bytes) that are stored in 4 bits.
    codes, scales : int
        Bytes of the 4-bit codes, and of their scales, offsets and tables.
    parameters : int
        Bytes of all parameters, none of which is in 4 bits.
    buffers : int
        Bytes of all buffers that are not part of a 4-bit weight.
    float32, bfloat16 : int
        Bytes of the same model with all weights and floating-point parameters in that dtype.
    """

    layers: int
    weights: int
    codes: int
    scales: int
    parameters: int
    buffers: int
    float32: int
    bfloat16: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.codes + self.scales + self.parameters + self.buffers

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of codes and scales per weight that is stored in 4 bits; None without any."""
        return 8 * (self.codes + self.scales) / self.weights if self.weights else None

    def __str__(self) -> str:
        bits = "" if self.bits_per_weight is None else f"{self.bits_per_weight:.3f} bits a weight"
        rows = [
            (
                "4-bit codes",
                self.codes,
                f"{self.weights:,} weights in {self.layers} layer{'' if self.layers == 1 else 's'}",
            ),
            ("scales", self.scales, bits),
            ("other parameters", self.parameters, ""),
            ("buffers", self.buffers, ""),
            ("total", self.total, ""),
            ("in bfloat16", self.bfloat16, _ratio(self.bfloat16, self.total)),
            ("in float32", self.float32, _ratio(self.float32, self.total)),
        ]
        lines = [f"{name:<16}  {_bytes(size):>10}  {note}".rstrip() for name, size, note in rows]
        rule = "-" * max(map(len, lines))
        return "\n".join([*lines[:4], rule, lines[4], rule, *lines[5:]])


def _ratio(size: int, total: int) -> str:
    return f"{size / total:.2f} x the total" if total else ""


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, {"B": "KiB", "KiB": "MiB", "MiB": "GiB", "GiB": "TiB"}[unit]
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def memory_report(model: nn.Module) -> MemoryReport:
    """Count what a model's weights take, by kind.

    Parameters
    ----------
    model : torch.nn.Module
        On any device, the meta device included.

    Returns
    -------
    MemoryReport

    Raises
    ------
    TypeError
        If `model` is not a module.

    Examples
    --------
    >>> import torch, tlkernels
    >>> layer = tlkernels.nn.NF4Linear(1024, 1024, bias=False)
    >>> round(tlkernels.memory_report(layer).bits_per_weight, 2)
    4.13
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"memory_report: model is a {type(model).__name__}; expected a torch.nn.Module")
    seen: set[tuple[object, ...]] = set()

    def first(tensor: Tensor) -> bool:
        place = id(tensor) if tensor.is_meta else tensor.data_ptr()
        key = (tensor.device, place, tensor.numel() * tensor.element_size())
        return key not in seen and not seen.add(key)  # type: ignore[func-returns-value]

    layers = weights = codes = scales = 0
    for module in model.modules():
        if isinstance(module, _NF4Module):
            layers += 1
            if first(module.packed):
                weights += module._shape()[0] * module._shape()[1]
                codes += module.packed.numel()
            scales += sum(
                t.numel() * t.element_size() for t in ops._tensors(module.nf4_weight)[1:] if t is not None and first(t)
            )
    parameters = [p for p in model.parameters() if first(p)]
    buffers = [b for b in model.buffers() if first(b)]
    numbers = weights + sum(p.numel() for p in parameters if p.is_floating_point())
    fixed = _nbytes(buffers) + _nbytes([p for p in parameters if not p.is_floating_point()])
    return MemoryReport(
        layers, weights, codes, scales, _nbytes(parameters), _nbytes(buffers), 4 * numbers + fixed, 2 * numbers + fixed
    )


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
