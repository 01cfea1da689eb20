"""Taps: hooks that see each layer's input and the gradient of its output during one ordinary backward pass.

All parameters are frozen during a pass, so that no weight gradient is computed. What makes a graph are the taps: an
identity put on a layer's output, which saves the layer's input as autograd saves tensors (so that checkpointing and
offloading treat it as any other), and in the backward pass hands input and gradient to the rule of the layer. Nothing
outlives that call, but where a parameter is used several times: its per-sample gradient is the sum over uses, and they
are kept until the last one has its gradient.

Where samples are in a layer's input is its *layout*:

=========== ==============================================================================================
batch       first dimension
time        second dimension (time-first models)
flat        samples and tokens in the first dimension, sample by sample
broadcast   first dimension of size 1, shared by all samples, as of position embeddings
shared      none: the layer is computed once for all samples
=========== ==============================================================================================

The output of a layer in the last two is repeated for each sample, which leaves a gradient for each. All but the first
are guesses; they are taken only where numbers are compared afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tlkernels.nn.fisher._layers import TIED, EmbeddingRule, LinearRule, Rule, Use, rule_of

Sink = Callable[["Unit", nn.Module, list[Use]], None]


class _Tap(torch.autograd.Function):
    """The identity, in place; `arrive` gets (x, gradient)."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, anchor: Tensor, arrive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.arrive = arrive
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.arrive(x, grad)
        return grad, None, None, None


class Unit:
    """Parameters that are served together: of one layer, or of several that share all of them.

    `slots` maps a layer's attribute to the parameter's name in the model. `fires` counts uses in a forward pass,
    `failed` says why this forward pass is not served, `dead` why none is.
    """

    def __init__(self, rule: Rule, modules: list[nn.Module], slots: dict[str, str]) -> None:
        self.rule, self.modules, self.slots = rule, modules, slots
        self.fires = 0
        self.uses: list[Use] = []
        self.failed = self.dead = ""

    @property
    def names(self) -> Iterable[str]:
        return self.slots.values()


class Taps:
    """The taps of a model, for the parameters in `wanted`; `why` has those that no layer's rule serves."""

    def __init__(
        self, model: nn.Module, wanted: dict[str, nn.Parameter], *, guess: bool,
        allowed: Callable[[Rule], bool] = lambda rule: True,
    ) -> None:  # fmt: skip
        self._model, self.guess = model, guess
        self._wanted = {id(p) for p in wanted.values()}
        self.active = self.in_backward = False
        self.n = 0
        self.layouts: dict[nn.Module, str] = {}
        self.tried: dict[nn.Module, set[str]] = {}
        self.trial = False  # layouts may be guessed now
        self.reentrant = False  # a layer with wanted parameters ran without gradients, as in a reentrant checkpoint
        self.feeding = False  # such a checkpoint needs an input that requires grad: whatever comes first gives one
        self.unknown = False  # a layer was reached that no trial has seen
        self.units, self.why = self._units(model, wanted, allowed)
        self.of: dict[nn.Module, list[Unit]] = {}
        self.rules: dict[nn.Module, Rule] = {}
        for unit in self.units:
            for module in unit.modules:
                self.of.setdefault(module, []).append(unit)
                rule, _ = rule_of(module, guess=guess)
                assert rule is not None
                self.rules[module] = rule
        self._sink: Sink = lambda unit, module, uses: None
        self._anchor = torch.zeros((), requires_grad=True)

    def _units(
        self, model: nn.Module, wanted: dict[str, nn.Parameter], allowed: Callable[[Rule], bool]
    ) -> tuple[list[Unit], dict[str, str]]:
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append((module, attribute))
        units: dict[tuple[frozenset[int], int], Unit] = {}
        why: dict[str, str] = {}
        for name, parameter in wanted.items():
            found = places[id(parameter)]
            rules = []
            for module, attribute in found:
                rule, reason = rule_of(module, guess=self.guess)
                if rule is None:
                    why[name] = reason
                elif attribute not in rule.attributes or not allowed(rule):
                    why[name] = f"no kernel for {attribute} of {type(module).__name__}"
                rules.append(rule)
            if name in why:
                continue
            (first, attribute), rule = found[0], rules[0]
            assert rule is not None
            same = all(
                r is rule and a == attribute and rule.settings(m) == rule.settings(first)
                for (m, a), r in zip(found, rules, strict=True)
            )
            if not same and all(
                type(r) in (LinearRule, EmbeddingRule) and a == "weight" for (_, a), r in zip(found, rules, strict=True)
            ):
                rule = TIED
            elif not same:
                why[name] = "shared by " + " and ".join(f"{type(m).__name__}.{a}" for m, a in found)
                continue
            key = (frozenset(id(m) for m, _ in found), id(rule))
            unit = units.setdefault(key, Unit(rule, [m for m, _ in found], {}))
            unit.slots[attribute] = name
        return list(units.values()), why

    # ---- hooks

    def install(self) -> list[RemovableHandle]:
        """Hook the layers, before all hooks that are there: those may change the output."""
        handles = []
        for module in self._model.modules():
            if any(not unit.dead for unit in self.of.get(module, ())):
                handles.append(module.register_forward_hook(self._after, prepend=True, with_kwargs=True))
            elif any(p is not None for p in module._parameters.values()):
                handles.append(module.register_forward_hook(self._beside))
        return handles

    def start(self, n: int, device: torch.device) -> None:
        """Begin a forward pass of n samples."""
        self.n, self.active, self.in_backward, self.unknown = n, True, False, False
        if self._anchor.device != device:
            self._anchor = torch.zeros((), requires_grad=True, device=device)
        for unit in self.units:
            unit.fires, unit.uses, unit.failed = 0, [], unit.dead

    def stop(self) -> None:
        """Be as if not there."""
        self.active = self.in_backward = False
        self._sink = lambda unit, module, uses: None
        for unit in self.units:
            unit.uses = []

    @contextlib.contextmanager
    def paused(self, feeding: bool = True) -> Iterator[None]:
        """As if not there, for other passes through the model; what is retained of this one stays usable."""
        before = self.active, self.feeding
        self.active, self.feeding = False, self.feeding and feeding
        try:
            yield
        finally:
            self.active, self.feeding = before

    def backward(self, value: Tensor, sink: Sink, retain_graph: bool) -> None:
        """One backward pass; `sink` gets every unit that did not fail, once, with all of its uses."""
        self._sink, self.in_backward = sink, True
        try:
            if value.requires_grad:
                value.backward(retain_graph=retain_graph)
            for unit in self.units:
                if unit.uses:
                    self._flush(unit, unit.modules[0])
        finally:
            for unit in self.units:
                unit.uses = []
            self.in_backward = False

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        units = [unit for unit in self.of[module] if not unit.dead]
        if not self.active or not units or self.rules[module].idle(module):
            return self._beside(module, args, out)
        if not self.in_backward:  # a recomputation is no further use
            for unit in units:
                unit.fires += 1
        x = args[0] if args else next(iter(kwargs.values()), None)
        layout = self._layout(module, self.rules[module], x, out)
        if layout is None or x is None:
            return self._beside(module, args, out)
        if layout in ("broadcast", "shared"):
            shape = out.shape[1:] if layout == "broadcast" else out.shape
            out = out.expand(self.n, *shape).clone()
        if not torch.is_grad_enabled():  # a checkpoint's first run: it runs again, with gradients
            self.reentrant = self.reentrant or not self.in_backward
            return out
        return self._tap(out, x.detach(), partial(self._arrive, module, layout, out.shape))

    def _beside(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """What is done to the output of a layer without a tap: mostly nothing."""
        if not torch.is_grad_enabled():
            if not self.in_backward and any(id(p) in self._wanted for p in module._parameters.values()):
                self.reentrant = True
            return None
        if self.feeding and isinstance(out, Tensor) and out.is_floating_point() and not out.requires_grad:
            return self._tap(out, self._anchor.detach(), lambda x, grad: None)
        return None

    def _tap(self, out: Tensor, x: Tensor, arrive: Callable[[Tensor, Tensor], None]) -> Tensor:
        if out.is_leaf and out.requires_grad:
            out = out.clone()
        base = out._base
        if base is None:
            return _Tap.apply(out, x, self._anchor, arrive)
        # a linear layer's result is a view, which in-place functions are slow on: do it to what it is a view of
        if base.numel() == out.numel() and base.is_contiguous() and out.is_contiguous() and not base._is_view():
            return _Tap.apply(base, x, self._anchor, arrive).view(out.shape)
        return _Tap.apply(out.clone(), x, self._anchor, arrive)

    def _layout(self, module: nn.Module, rule: Rule, x: Any, out: Any) -> str | None:
        """Where the samples are; None where it is not known, and the units failed."""
        if not isinstance(x, Tensor) or not isinstance(out, Tensor):
            return self._fail(module, "its input or output is no tensor")
        if module not in self.layouts:
            if self.guess and not self.trial:
                self.unknown = True
                return self._fail(module, "it was not reached when the pass was verified")
            tried = self.tried.get(module, ())
            found = next((k for k in self._candidates(module, rule, x, out) if k not in tried), None)
            if found is None:
                return self._fail(module, self._unsuited(x))
            if not self.guess:
                return found if found == "batch" else self._fail(module, self._unsuited(x))
            self.layouts[module] = found
        layout = self.layouts[module]
        if layout not in self._candidates(module, rule, x, out):
            return self._fail(module, self._unsuited(x))
        return layout

    def _unsuited(self, x: Tensor) -> str:
        return f"its input has shape {tuple(x.shape)} in a batch of {self.n} samples"

    def _fail(self, module: nn.Module, reason: str) -> str | None:
        for unit in self.of[module]:
            unit.failed = unit.failed or reason
        return None

    def _candidates(self, module: nn.Module, rule: Rule, x: Tensor, out: Tensor) -> Iterator[str]:
        a, b = rule.trailing(module)
        lead = x.shape[: x.dim() - a]
        if "time" not in rule.layouts:  # channels behind the samples
            if x.dim() == out.dim() and x.shape[0] == self.n and rule.batched(module, x):
                yield "batch"
            return
        if not lead or out.shape[: out.dim() - b] != lead:
            return
        n = self.n
        if lead[0] == n:
            yield "batch"
        if lead[0] == 1:
            yield "broadcast"
        if len(lead) > 1 and lead[1] == n:
            yield "time"
        if lead[0] % n == 0:
            yield "flat"
        yield "shared"

    def _arrive(self, module: nn.Module, layout: str, shape: torch.Size, x: Tensor, grad: Tensor) -> None:
        n = self.n
        grad = grad.view(shape) if grad.shape != shape else grad
        if layout == "time":
            x, grad = x.transpose(0, 1), grad.transpose(0, 1)
        elif layout == "flat":
            x, grad = (t.reshape(n, -1, *t.shape[1:]) for t in (x, grad))
        elif layout == "broadcast":
            x = x.expand(n, *x.shape[1:])
        elif layout == "shared":
            x = x.expand(n, *x.shape)
        use = self.rules[module].form(module, x, grad)
        for unit in self.of[module]:
            if unit.failed:
                continue
            unit.uses.append(unit.rule.adapt(module, use))
            if len(unit.uses) == unit.fires:
                self._flush(unit, module)

    def _flush(self, unit: Unit, module: nn.Module) -> None:
        uses, unit.uses = unit.uses, []
        self._sink(unit, module, uses)

    # ---- guesses

    def reject(self, modules: Iterable[nn.Module]) -> bool:
        """Take the next layout for these modules; False if none of them had one."""
        changed = False
        for module in modules:
            layout = self.layouts.pop(module, None)
            if layout is not None:
                self.tried.setdefault(module, set()).add(layout)
                changed = True
        return changed
