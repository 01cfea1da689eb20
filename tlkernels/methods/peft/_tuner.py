"""What all methods of parameter-efficient tuning share: which modules they replace, and by what."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tlkernels.nn.lora import TunerModule, is_conv1d
from tlkernels.nn.nf4 import NF4Linear

__all__ = ["TunerConfig", "TunerModule", "has_suffix", "is_conv1d", "is_linear", "pattern_value"]

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class TunerConfig:
    """What a method of parameter-efficient tuning is to do with a model; `tlkernels.methods.peft.apply` does it.

    A method adds its fields, its checks and `wrap`. Names and their rules are those of the PEFT library's configs.

    Attributes
    ----------
    target_modules : str or sequence of str
        Which modules to replace. A string is a regular expression that must match a module's whole name; a sequence
        holds names, or their last parts (``"q_proj"`` stands for ``"layers.0.attn.q_proj"``). ``"all-linear"``: every
        linear layer but the output head of a transformers model.
    exclude_modules : str or sequence of str
        Modules to leave alone, in the same notation.
    modules_to_save : sequence of str
        Modules to train and save whole, by name or last part of it. None of them, nor what is below, is replaced.
    layers_to_transform : int, sequence of int or None
        With a sequence for `target_modules`: only those in layers of these numbers.
    layers_pattern : str, sequence of str or None
        The name before the number, such as ``"layers"``; by default the first part of the name that is a number
        counts.
    """

    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    def check(self) -> None:
        """Raise if a field has a value that it cannot have.

        Raises
        ------
        TypeError, ValueError
            Naming the field.
        """
        for field in ("target_modules", "exclude_modules"):
            self._check_names(field, getattr(self, field))
        if isinstance(self.modules_to_save, str):
            self._fail("modules_to_save", "a sequence of names, such as ['classifier']", TypeError)
        self._check_names("modules_to_save", self.modules_to_save)
        if not self.target_modules and not self.modules_to_save:
            self._fail("target_modules", "at least one name, or a regular expression")
        layers = self.layers_to_transform
        if layers is not None:
            numbers = [layers] if isinstance(layers, int) else layers
            if not all(isinstance(number, int) and number >= 0 for number in numbers):
                self._fail("layers_to_transform", "layer numbers, 0 or more")
            if isinstance(self.target_modules, str):
                self._fail("layers_to_transform", "None where target_modules is a regular expression")
        elif self.layers_pattern:
            self._fail("layers_pattern", "None where layers_to_transform is None")

    def wrap(self, name: str, module: nn.Module) -> nn.Module:
        """Build the module that takes the place of `module`; change nothing in the model.

        Parameters
        ----------
        name : str
            Its full name in the model.
        module : torch.nn.Module

        Returns
        -------
        torch.nn.Module
            A `TunerModule` whose ``base_layer`` is `module`.

        Raises
        ------
        TypeError, ValueError
            If this method has no adapter for such a module; the message names it.
        """
        raise NotImplementedError(f"{type(self).__name__}: wrap")

    def wrap_all(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """`wrap` every module; a method whose adapters share tensors does it here, for all together."""
        return {name: self.wrap(name, module) for name, module in modules.items()}

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to replace, by name; a module that stands at several places under its first one.

        Raises
        ------
        ValueError
            If nothing matches.
        """
        head = _output_head(model)
        found: dict[int, tuple[str, nn.Module]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if self.target_modules == ALL_LINEAR:
                hit = is_linear(module) and module is not head and not self._is_excluded(name)
            else:
                hit = self.matches(name)
            if hit and id(module) not in found:
                found[id(module)] = (name, module)
        if not found and self.target_modules:
            names = [name for name, _ in model.named_modules() if name]
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(
                f"{type(self).__name__}: target_modules is {self.target_modules!r}, which matches no module; "
                f"the model has {shown or 'no submodules'}"
            )
        return dict(found.values())

    def matches(self, name: str) -> bool:
        """Whether the module of this name is one to replace (``"all-linear"`` looks at its kind instead)."""
        if self._is_excluded(name):
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        if name in self.target_modules:
            return True  # as in PEFT: a name in full needs no layer number
        return has_suffix(name, self.target_modules) and self._is_in_layers(name)

    def _is_excluded(self, name: str) -> bool:
        if any(re.match(rf"(^|.*\.){re.escape(saved)}($|\..*)", name) for saved in self.modules_to_save):
            return True
        if isinstance(self.exclude_modules, str):
            return bool(self.exclude_modules) and re.fullmatch(self.exclude_modules, name) is not None
        return has_suffix(name, self.exclude_modules)

    def _is_in_layers(self, name: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or (not isinstance(layers, int) and len(layers) == 0):
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        searches = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\."]
        for search in searches:
            match = re.match(search, name)
            if match is not None:
                return int(match.group(1)) in ([layers] if isinstance(layers, int) else layers)
        return False

    def _check_names(self, field: str, value: object) -> None:
        if isinstance(value, str):
            if value != ALL_LINEAR:
                try:
                    re.compile(value)
                except re.error as error:
                    self._fail(field, f"a regular expression ({error})")
        elif not isinstance(value, (Sequence, set, frozenset)) or not all(isinstance(v, str) for v in value):
            self._fail(field, "names, or a regular expression", TypeError)

    def _fail(self, field: str, want: str, kind: type[Exception] = ValueError) -> None:
        raise kind(f"{type(self).__name__}: {field} is {getattr(self, field)!r}; expected {want}")


def has_suffix(name: str, names: Sequence[str]) -> bool:
    """Whether `name` is one of `names` or ends with one, at a dot."""
    return any(name == n or name.endswith(f".{n}") for n in names)


def pattern_value(patterns: Mapping[str, float], name: str) -> float | None:
    """The value of the first pattern (a regular expression) that matches the last parts of `name`, or None."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether ``"all-linear"`` stands for this module: a linear layer that computes its output itself."""
    # torch.nn.MultiheadAttention reads the weight of its output projection and never calls it
    read_by_owner = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return (isinstance(module, (nn.Linear, NF4Linear)) or is_conv1d(module)) and not read_by_owner


def _output_head(model: nn.Module) -> nn.Module | None:
    head = getattr(model, "get_output_embeddings", None)
    try:
        return head() if callable(head) else None
    except NotImplementedError:  # a transformers model without one
        return None
