"""One pass over data: the model borrowed and given back as it was, each parameter served by the fastest exact route.

``kernel``: taps (see `_taps`). ``vmap``: per-sample gradients by `torch.func`, a bounded chunk of samples at a time.
``loop``: one backward pass per sample, which always works.

Which route is right for a parameter is decided by numbers: before the first batch, two samples go through the taps, and
each parameter's squared gradients have to equal those of a plain loop.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tlkernels.nn.fisher._batches import Forward, Samples, count_samples, default_forward, plain
from tlkernels.nn.fisher._layers import BATCH_NORMS, Rule, Use, accumulator
from tlkernels.nn.fisher._losses import Loss, Probe
from tlkernels.nn.fisher._taps import Taps, Unit

Squares = dict[str, Tensor]
ScaledSink = Callable[[Unit, nn.Module, list[Use], float], None]

# Of gradients, relative to the parameter's largest, and to the largest of the model: a parameter whose true gradient
# is zero (the bias of attention keys) has nothing but rounding errors. A wrong route is wrong by factors.
_LIMITS = {torch.float64: (1e-6, 1e-10), torch.float32: (1e-2, 1e-5), torch.float16: (0.1, 1e-2)}
_LIMITS[torch.bfloat16] = _LIMITS[torch.float16]


@dataclass(frozen=True)
class Route:
    """How a parameter is served.

    Attributes
    ----------
    name : str
    route : str
        ``"kernel"``, ``"vmap"`` or ``"loop"``; for K-FAC ``"skipped"``.
    reason : str
        The op, or why there is none.
    """

    name: str
    route: str
    reason: str


class Report(tuple[Route, ...]):
    """The routes of all parameters; prints as a table."""

    def __str__(self) -> str:
        rows = [("parameter", "route", "reason"), *((r.name, r.route, r.reason) for r in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


@contextlib.contextmanager
def borrowed(op: str, model: nn.Module, others: Iterable[nn.Module], eval_mode: bool) -> Iterator[None]:
    """The model frozen, in eval mode if wanted, its gradients put aside; given back as it was, whatever happens."""
    roots = [model, *others]
    modes = {module: module.training for root in roots for module in root.modules()}
    state = [(p, p.requires_grad, p.grad) for root in roots for p in root.parameters()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # not module.eval(): a subclass may do more in it, such as merging weights
        for module in modes:
            module.training = module.training and not eval_mode
        for parameter, _, _ in state:
            parameter.requires_grad_(False)
            parameter.grad = None
        torch.backends.mha.set_fastpath_enabled(False)  # it calls no hooks
        for name, module in model.named_modules():
            if isinstance(module, BATCH_NORMS) and (module.training or module.running_mean is None):
                raise RuntimeError(
                    f"{op}: {name or type(module).__name__} is a batch norm that uses the batch's statistics, which "
                    "mix samples: there is no per-sample gradient; expected eval mode (eval_mode=True) and running "
                    "statistics"
                )
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes.items():
            module.training = mode
        for parameter, requires_grad, grad in state:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def trainable(op: str, model: nn.Module, parameters: Iterable[str] | None) -> dict[str, nn.Parameter]:
    """The parameters to serve, by name: all that require grad, or the named ones."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}; expected a torch.nn.Module")
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters is not None:
        names = [parameters] if isinstance(parameters, str) else list(parameters)
        for name in names:
            if name not in found:
                raise ValueError(f"{op}: parameters has {name!r}; expected names of parameters that require grad")
        found = {name: p for name, p in found.items() if name in names}
    if not found:
        raise ValueError(f"{op}: model has no parameter that requires grad; expected one or more")
    for name, p in found.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"{op}: model has a lazy parameter {name!r}; expected one forward pass before")
        if not p.is_floating_point():
            raise TypeError(f"{op}: model has a parameter {name!r} of {p.dtype}; expected floating point")
    return found


class _Bound(nn.Module):
    """The model and what is done with it, as a module that torch.func can call with other parameters."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self._forward = model, forward

    def forward(self, batch: Any, probe: Probe, aux: Tensor | None) -> Tensor:
        output, target = self._forward(self.model, batch)
        return probe.value(output, target, aux)


class Engine:
    """Routes, their verification, the backward passes of a batch. Outside of `open` nothing of the model is changed."""

    def __init__(
        self, op: str, model: nn.Module, wanted: dict[str, nn.Parameter], loss: Loss, *, forward: Forward | None,
        samples: int, generator: torch.Generator | None, verify: bool, eval_mode: bool, chunk_bytes: int,
        allowed: Callable[[Rule], bool] = lambda rule: True, fallback: bool = True,
    ) -> None:  # fmt: skip
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"{op}: samples is {samples!r}; expected an integer >= 1")
        if samples != 1 and loss.kind != "sampled":
            raise ValueError(f"{op}: samples is {samples} with kind {loss.kind!r}; expected 1, or kind 'sampled'")
        if not chunk_bytes > 0:
            raise ValueError(f"{op}: chunk_bytes is {chunk_bytes}; expected > 0")
        self.op, self.model, self.wanted, self.loss = op, model, wanted, loss
        self.forward = default_forward if forward is None else forward
        self.samples, self.generator, self.verify, self.eval_mode = samples, generator, verify, eval_mode
        self.chunk_bytes = chunk_bytes
        devices = {p.device for p in model.parameters()}
        self.device = devices.pop() if len(devices) == 1 else None
        self.taps = Taps(model, wanted, guess=verify, allowed=allowed)
        self.slow: dict[str, str] = dict(self.taps.why)  # parameters that taps do not serve: why
        self.tier, self.tier_reason = ("vmap" if fallback else "skipped"), ""
        self.verified = 0  # samples that were compared
        self.started = False  # gradients of the current batch have been added

    def report(self) -> Report:
        """The routes as they are now."""
        rows = []
        served = {name: unit for unit in self.taps.units for name in unit.names}
        for name in self.wanted:
            if name in self.slow:
                tier = f"; no torch.func: {self.tier_reason}" if self.tier == "loop" and self.tier_reason else ""
                rows.append(Route(name, self.tier, self.slow[name] + tier))
            else:
                rows.append(Route(name, "kernel", served[name].rule.op))
        return Report(rows)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Borrow the model and hook it."""
        others = [self.loss.loss] if isinstance(self.loss.loss, nn.Module) else []
        with borrowed(self.op, self.model, others, self.eval_mode), torch.enable_grad():
            handles = self.taps.install()
            try:
                yield
            finally:
                self.taps.stop()
                for handle in handles:
                    handle.remove()

    # ---- a batch

    def run(self, batch: Any, sink: ScaledSink, slow: Squares | None) -> int:
        """All backward passes of a batch: `sink` gets units, `slow` (None: nothing) the other parameters' squares.

        Returns the number of samples. Where it raises while `started` is False, nothing was added.
        """
        self.started = False
        batch = plain(batch, self.device)
        n = count_samples(self.op, batch)
        if n == 0:
            return 0
        samples = Samples(batch, n)
        for t in samples._leaves if self.forward is default_forward else ():
            if isinstance(t, Tensor) and t.dim() and t.shape[0] != n and isinstance(batch, (tuple, list)):
                raise ValueError(
                    f"{self.op}: loader gives a batch with tensors of {t.shape[0]} and {n} rows; expected equal "
                    "numbers, or forward= that knows what they are"
                )
        if self.verify and self.verified < min(n, 2):
            self._verify(samples)
        output, target = self._forward(batch, n)
        if self.taps.reentrant and not self.taps.feeding:
            self.taps.feeding = True
            output, target = self._forward(batch, n)
        if self.taps.unknown:
            self._verify(samples)
            output, target = self._forward(batch, n)
        for unit in self.taps.units:
            if unit.failed:  # from now on; parts of it would be right for some batches only
                unit.dead = unit.failed
                self.slow.update(dict.fromkeys(unit.names, unit.dead))
        served = any(not unit.dead for unit in self.taps.units)
        probes = self.loss.probes(output, target, self.samples, self.generator)
        probe = next(probes, None)
        while probe is not None:
            following = next(probes, None)
            if served:
                self.started = True
                value = probe.value(output, target, probe.aux)
                self.taps.backward(value, partial(_scaled, sink, probe.scale), retain_graph=following is not None)
            if slow is not None and self.slow:
                self._slow(samples, probe, slow)
            probe = following
        self.taps.stop()
        return n

    def _forward(self, batch: Any, n: int) -> tuple[Any, Any]:
        """The model's output and the labels, with taps."""
        device = self.device or next(iter(self.wanted.values())).device
        self.taps.start(n, device)
        output, target = self._call(batch)
        self.loss.check(output, target, n)
        return output, target

    def _call(self, batch: Any) -> tuple[Any, Any]:
        found = self.forward(self.model, batch)
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(f"{self.op}: forward returned a {type(found).__name__}; expected (output, target)")
        return found

    # ---- the parameters that no kernel serves

    def _slow(self, samples: Samples, probe: Probe, acc: Squares) -> None:
        names = [name for name in self.slow if name in acc]
        if not names or self.tier == "skipped":
            return
        if self.tier == "vmap":
            try:
                with self.taps.paused(feeding=False):
                    self._vmap(samples, probe, names, acc)
                return
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                # what torch.func cannot do (data-dependent branches, checkpoints, ops without a batching rule); an
                # error of the model itself comes up again in the loop. Nothing was added by what failed.
                self.tier, self.tier_reason = "loop", _first_line(error)
        self._loop(samples, probe, names, acc)

    def _vmap(self, samples: Samples, probe: Probe, names: list[str], acc: Squares) -> None:
        bound = _Bound(self.model, self.forward)
        parameters = {f"model.{name}": self.wanted[name].detach() for name in names}
        per_sample = sum(p.numel() * p.element_size() for p in parameters.values())
        chunk = max(1, min(samples.n, self.chunk_bytes // max(per_sample, 1)))
        tensors, aux = samples.tensors, probe.aux

        def objective(values: dict[str, Tensor], rows: list[Tensor], aux_row: Tensor | None) -> Tensor:
            batch = samples.of(row[None] for row in rows)
            return torch.func.functional_call(
                bound, values, (batch, probe, None if aux_row is None else aux_row[None])
            )  # fmt: skip

        gradients = torch.func.vmap(
            torch.func.grad(objective), in_dims=(None, 0, None if aux is None else 0), randomness="different"
        )
        found: list[dict[str, Tensor]] = []
        for start in range(0, samples.n, chunk):
            part = slice(start, start + chunk)
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
                grads = gradients(parameters, [t[part] for t in tensors], None if aux is None else aux[part])
            squares = {name: g.to(acc[name[6:]].dtype).square().sum(0) for name, g in grads.items()}
            if not found:
                found.append(squares)
            else:  # into one sum, added at the end: a chunk that fails leaves nothing behind
                for name, square in squares.items():
                    found[0][name] += square
            del grads
        self.started = True
        for name, square in found[0].items():
            acc[name[6:]].add_(square, alpha=probe.scale)

    def _loop(self, samples: Samples, probe: Probe, names: list[str], acc: Squares) -> None:
        for i in range(samples.n):
            aux = None if probe.aux is None else probe.aux[i : i + 1]
            grads = self._plain(samples.take(slice(i, i + 1)), probe, aux, names)
            self.started = True
            for name, grad in grads.items():
                acc[name].add_(grad.to(acc[name].dtype).square(), alpha=probe.scale)

    def _plain(self, batch: Any, probe: Probe, aux: Tensor | None, names: Iterable[str]) -> dict[str, Tensor]:
        """The gradients of a batch by an ordinary backward pass; parameters without one are left out."""
        parameters = {name: self.wanted[name] for name in names}
        try:
            for p in parameters.values():
                p.requires_grad_(True)
            with self.taps.paused():
                output, target = self._call(batch)
                value = probe.value(output, target, aux)
                if value.requires_grad:
                    value.backward()
            grads = {name: p.grad.detach() for name, p in parameters.items() if p.grad is not None}
            return {name: g.to_dense() if g.is_sparse else g for name, g in grads.items()}
        finally:
            for p in parameters.values():
                p.requires_grad_(False)
                p.grad = None

    # ---- verification

    def _verify(self, samples: Samples) -> None:
        """Compare, on two samples, each parameter's route with a loop; decide layouts and routes."""
        try:
            self._compare(samples)
        finally:
            self.started = False

    def _compare(self, samples: Samples) -> None:
        part = samples.part(samples.two())
        n = part.n
        taps = self.taps
        taps.stop()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all is frozen, of which checkpoints warn
            output, target = self._call(part.batch)
        taps.feeding = taps.reentrant
        self.loss.check(output, target, n)
        probe = Probe(self.loss)
        if self.loss.kind != "empirical":  # any gradient of the output will do; there may be no labels
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
            probe = Probe(self.loss, linear=True, aux=noise.to(output))
        expected, total = self._zeros(), self._zeros()
        for i in range(n):
            aux = None if probe.aux is None else probe.aux[i : i + 1]
            for name, grad in self._plain(part.take(slice(i, i + 1)), probe, aux, self.wanted).items():
                expected[name] += grad.to(expected[name].dtype).square()
                total[name] += grad
        limits = self._limits(output)
        if n > 1:
            together = self._plain(part.batch, probe, probe.aux, self.wanted)
            self._check_mixing(total, together, limits)
            del together
        del total

        largest = max((float(_root(t).max()) for t in expected.values() if t.numel()), default=0.0)
        if self.verified < 2:  # one sample has told little
            taps.layouts.clear()
            taps.tried.clear()
        taps.trial = True
        try:
            self._settle(part, probe, expected, largest, limits)
        finally:
            taps.trial = False
        self.slow = dict(taps.why)
        for unit in taps.units:
            if unit.dead:
                self.slow.update(dict.fromkeys(unit.names, unit.dead))
        if self.slow and self.tier == "vmap":
            squares = {name: torch.zeros_like(expected[name]) for name in self.slow}
            self._slow(part, probe, squares)
            wrong = self._wrong(squares, expected, largest, limits)
            if wrong and self.tier == "vmap":
                self.tier, self.tier_reason = "loop", f"its result differs for {wrong[0]}"
        self.verified = max(self.verified, n)

    def _zeros(self) -> Squares:
        """Accumulators, in rows whatever the memory format of the parameters."""
        return {
            name: torch.zeros(p.shape, dtype=accumulator(p.dtype), device=p.device) for name, p in self.wanted.items()
        }

    def _settle(
        self, part: Samples, probe: Probe, expected: Squares, largest: float, limits: tuple[float, float]
    ) -> None:
        """Try layouts until the numbers are right, or there are no more."""
        taps = self.taps
        suspects: list[Unit] = []
        reason = ""
        known: set[nn.Module] = set()  # in layouts with which the model ran
        for _ in range(20):
            squares = self._zeros()
            try:
                output, target = self._forward(part.batch, part.n)

                def sink(unit: Unit, module: nn.Module, uses: list[Use], squares: Squares = squares) -> None:
                    unit.rule.add(module, {a: squares[name] for a, name in unit.slots.items()}, uses, 1.0)

                taps.backward(probe.value(output, target, probe.aux), sink, retain_graph=False)
                reason = "its gradient is not that of the layer's input and output alone"
                wrong = set(self._wrong(squares, expected, largest, limits))
                known = set(taps.layouts)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                repeated = [m for m, layout in taps.layouts.items() if layout in ("broadcast", "shared")]
                if taps.reject([m for m in repeated if m not in known] or repeated):
                    continue  # an output of another shape than the model expects
                reason = f"with hooks the model raises: {_first_line(error)}"
                wrong = set(expected)
            finally:
                taps.stop()
            for unit in taps.units:
                if unit.failed and not unit.dead:
                    unit.dead = unit.failed if not any(m in taps.tried for m in unit.modules) else reason
            suspects = [u for u in taps.units if not u.dead and wrong.intersection(u.names)]
            if not suspects:
                return
            doubtful = [m for u in suspects for m in u.modules if taps.layouts.get(m) in ("broadcast", "shared")]
            if taps.reject(doubtful):
                known.difference_update(doubtful)
                continue
            for unit in suspects:
                known.difference_update(unit.modules)
                if not taps.reject(unit.modules):
                    unit.dead = reason
        for unit in suspects:
            unit.dead = unit.dead or reason

    def _limits(self, output: Any) -> tuple[float, float]:
        """(of a parameter's own largest gradient, of the model's), by the coarsest dtype in play."""
        dtypes = {p.dtype for p in self.model.parameters()} | {
            output.dtype if isinstance(output, Tensor) else torch.float32
        }
        device = (self.device or next(iter(self.wanted.values())).device).type
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
        return max(_LIMITS.get(dtype, _LIMITS[torch.float16]) for dtype in dtypes)

    def _wrong(self, found: Squares, expected: Squares, largest: float, limits: tuple[float, float]) -> list[str]:
        wrong = []
        for name, square in found.items():
            root, want = _root(square), _root(expected[name])
            if not want.numel():
                continue
            top = float(want.max())
            off = float((root - want).abs().max()) > limits[0] * top + limits[1] * largest
            if off or (top > 0 and not bool(square.any())):
                wrong.append(name)
        return wrong

    def _check_mixing(self, total: Squares, together: dict[str, Tensor], limits: tuple[float, float]) -> None:
        largest = max((float(t.nan_to_num().abs().max()) for t in total.values() if t.numel()), default=0.0)
        for name, want in total.items():
            grad = together.get(name)
            difference = want if grad is None else grad.to(want.dtype) - want
            if not want.numel() or not bool(difference.isfinite().all()):
                continue
            if float(difference.abs().max()) > limits[0] * float(want.abs().max()) + limits[1] * largest:
                raise RuntimeError(
                    f"{self.op}: the gradient of two samples is not the sum of their gradients, for {name}: the model "
                    "mixes samples or is random (a batch norm or dropout in training mode), or the loss is no sum or "
                    "mean over samples (a mean over tokens: use token_reduction, or a loss of shape [N])"
                )


def _scaled(sink: ScaledSink, scale: float, unit: Unit, module: nn.Module, uses: list[Use]) -> None:
    sink(unit, module, uses, scale)


def _root(t: Tensor) -> Tensor:
    return t.nan_to_num().sqrt()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:120]
