r"""The diagonal of the Fisher information: the mean over samples of squared per-sample gradients.

Runs at about the cost of an ordinary backward pass; see `tlkernels.ops.fisher` for why squaring a batch's gradient, or
taking tokens for samples, is wrong, and by how much.

James Kirkpatrick et al. *Overcoming catastrophic forgetting in neural networks.* PNAS 2017, arXiv:1612.00796.
Frederik Kunstner et al. *Limitations of the empirical Fisher approximation.* NeurIPS 2019, arXiv:1905.12558.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tlkernels.nn.fisher._batches import Forward, progress_bar
from tlkernels.nn.fisher._engine import Engine, Report, trainable
from tlkernels.nn.fisher._layers import Use, accumulator
from tlkernels.nn.fisher._losses import Loss
from tlkernels.nn.fisher._taps import Unit

__all__ = ["FisherDiagonal"]

#: batches after which the float32 sums go into float64 ones: k sums of positive numbers err by at most (k - 1) 2^-24
FOLD_EVERY = 16


class Sums:
    """Sums over batches of tensors by name: float32 for the kernels, float64 for what has come together.

    The float64 part is made when there is something to put into it. Tensors of float64 are that all the way.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.now = {  # in rows, whatever the memory format of the parameters
            name: torch.zeros(t.shape, dtype=accumulator(t.dtype), device=t.device) for name, t in like.items()
        }
        self.total: dict[str, Tensor] = {}
        self.batches = 0

    def step(self) -> None:
        """A batch has been added to `now`."""
        self.batches += 1
        if self.batches % FOLD_EVERY == 0:
            self.fold()

    def fold(self) -> None:
        """Put `now` into the totals."""
        with torch.no_grad():
            for name, t in self.now.items():
                if name in self.total:
                    self.total[name].add_(t)
                else:
                    self.total[name] = t.to(torch.float64, copy=True)
                t.zero_()

    def sum(self, name: str) -> Tensor:
        """The sum so far, float64."""
        now = self.now[name].to(torch.float64, copy=True)
        return now.add_(self.total[name]) if name in self.total else now

    def state_dict(self) -> dict[str, Any]:
        copies = ({name: t.clone() for name, t in part.items()} for part in (self.now, self.total))
        return dict(zip(("now", "total"), copies, strict=True), batches=self.batches)

    def check(self, op: str, state: Any) -> None:
        """Raise if a state is not of these tensors."""
        if not isinstance(state, dict) or not {"now", "total", "batches"} <= set(state):
            raise ValueError(f"{op}: state_dict is not one of {op}")
        for part in ("now", "total"):
            if part == "total" and not state[part]:
                continue
            missing, more = set(self.now) - set(state[part]), set(state[part]) - set(self.now)
            if missing or more:
                name = min(missing or more)
                raise ValueError(
                    f"{op}: state_dict {'lacks' if missing else 'has'} {name!r}; expected the same parameters"
                )
            for name, t in state[part].items():
                if t.shape != self.now[name].shape:
                    raise ValueError(
                        f"{op}: state_dict has {name!r} of shape {tuple(t.shape)}; expected "
                        f"{tuple(self.now[name].shape)}"
                    )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.now = {name: state["now"][name].to(t, copy=True) for name, t in self.now.items()}
        self.total = {name: t.to(self.now[name].device, torch.float64, copy=True) for name, t in state["total"].items()}
        self.batches = int(state["batches"])


class Accumulation:
    """What the estimators of this package share: the pass over a loader, its state, and the all-reduce."""

    def __init__(
        self, model: nn.Module, loss: str | Callable[[Any, Any], Tensor], kind: str, *,
        parameters: Iterable[str] | None, forward: Forward | None, reduction: str | None, token_reduction: str,
        ignore_index: int, samples: int, generator: torch.Generator | None, verify: bool, eval_mode: bool,
        progress: bool | None, chunk_bytes: int = 1 << 20, allowed: Callable[[Any], bool] = lambda rule: True,
        fallback: bool = True,
    ) -> None:  # fmt: skip
        op = self._op = type(self).__name__
        wanted = trainable(op, model, parameters)
        spec = Loss(
            op, loss, kind=kind, reduction=reduction, ignore_index=ignore_index, token_reduction=token_reduction
        )  # fmt: skip
        if generator is None and kind == "sampled":
            generator = torch.Generator().manual_seed(0)
        self.model, self.progress = model, progress
        self._engine = Engine(
            op, model, wanted, spec, forward=forward, samples=samples, generator=generator, verify=verify,
            eval_mode=eval_mode, chunk_bytes=chunk_bytes, allowed=allowed, fallback=fallback,
        )  # fmt: skip
        self.count = 0
        self._broken = self._reduced = False

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # nothing is left to undo: a model is hooked only while a loader is read
        return None

    def report(self) -> Report:
        """How each parameter is served, and why; ``print`` it. Final after the first batch."""
        return self._engine.report()

    def _pass(self, loader: Iterable[Any], progress: bool | None, batch: Callable[[Any], int]) -> int:
        """`batch` for each batch of the loader; returns the number of samples."""
        op = self._op
        if not isinstance(loader, Iterable) or isinstance(loader, (Tensor, dict, str)):
            raise TypeError(f"{op}: loader is a {type(loader).__name__}; expected an iterable of batches")
        if self._broken:
            raise self._is_broken()
        if self._reduced:
            raise RuntimeError(f"{op}: accumulate after all_reduce would count other processes twice; call reset first")
        count = 0
        with self._engine.open():
            for item in progress_bar(op, loader, self.progress if progress is None else progress):
                try:
                    count += batch(item)
                except BaseException:
                    # whole batches count; a part of one cannot be taken out again
                    self._broken = self._engine.started
                    raise
                self._engine.started = False
        return count

    def _is_broken(self) -> RuntimeError:
        return RuntimeError(
            f"{self._op}: an accumulation was interrupted in the middle of a batch, of which a part was added; "
            "call reset or load_state_dict"
        )

    def _ready(self) -> None:
        if self._broken:
            raise self._is_broken()
        if not self.count:
            raise RuntimeError(f"{self._op}: nothing was accumulated; call accumulate with a loader that is not empty")

    def _settings(self) -> dict[str, Any]:
        loss = self._engine.loss
        return {"class": self._op, "kind": loss.kind, "loss": loss.name}

    def _generator_state(self) -> Tensor | None:
        generator = self._engine.generator
        return None if generator is None else generator.get_state()

    def _check_settings(self, state: Any) -> None:
        for key, mine in self._settings().items():
            if not isinstance(state, dict) or state.get(key) != mine:
                found = state.get(key) if isinstance(state, dict) else type(state).__name__
                raise ValueError(f"{self._op}: state_dict has {key} {found!r}; expected {mine!r}")

    def _load_common(self, state: dict[str, Any]) -> None:
        self.count, self._reduced = int(state["count"]), bool(state["reduced"])
        self._broken = False
        if self._engine.generator is not None and state["generator"] is not None:
            self._engine.generator.set_state(state["generator"].cpu())

    def _all_reduce(self, parts: Iterable[Sums], process_group: Any) -> None:
        """Sum `parts` and the count over the processes."""
        if self._broken:
            raise self._is_broken()
        if self._reduced:
            raise RuntimeError(f"{self._op}: all_reduce was called already; call reset first")
        if processes(self._op, process_group) > 1:
            tensors = []
            for sums in parts:
                sums.fold()
                tensors += [sums.total[name] for name in sums.now]
            count = torch.tensor(float(self.count), dtype=torch.float64, device=tensors[0].device)
            for t in [*tensors, count]:
                torch.distributed.all_reduce(t, group=process_group)
            self.count = round(float(count))
        self._reduced = True


def processes(op: str, process_group: Any) -> int:
    """How many processes are in the group; one where nothing was initialized.

    Raises
    ------
    RuntimeError
        If a launcher started several (WORLD_SIZE) and torch.distributed is not initialized, or a group is given then.
    """
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(process_group)
    started = os.environ.get("WORLD_SIZE", "1")
    if process_group is not None or (started.isdigit() and int(started) > 1):
        raise RuntimeError(
            f"{op}: torch.distributed is not initialized; call torch.distributed.init_process_group first"
        )
    return 1


class FisherDiagonal(Accumulation):
    r"""The exact diagonal of the Fisher information of a model over a data set.

    Parameters
    ----------
    model : torch.nn.Module
        Its parameters that require grad are served. It is changed only while a loader is read, and given back as it
        was (mode, ``requires_grad``, ``.grad``, hooks), also if that is interrupted.
    loss : "cross_entropy", "mse" or callable
        A sample's loss :math:`\ell_n`. ``"cross_entropy"``: output ``[N, ..., classes]``, labels ``[N, ...]`` (int64,
        or probabilities like the output); the sum over a sample's positions. ``"mse"``: :math:`\tfrac12 \|f - y\|^2`.
        A callable gets ``(output, target)`` and returns losses ``[N, ...]`` (further dimensions are summed), or a
        scalar, with `reduction`.
    kind : "empirical", "sampled" or "exact"
        Whose labels: the data's; drawn from the model's predictive distribution (for "mse" normal with unit variance);
        or the expectation over them, at one backward pass per class and position (per output for "mse").
    parameters : iterable of str, optional
        Names of the parameters to serve. All that require grad by default.
    forward : callable, optional
        ``forward(model, batch) -> (output, target)``. By default a batch is ``(x, y)``, ``(x1, x2, ..., y)``, or a dict
        of keyword arguments with ``"labels"``; an output's ``logits`` are taken. Tensors in a batch have their samples
        first; tensors of other sizes are shared by all samples.
    reduction : "mean" or "sum", optional
        What a scalar of a callable is of the *samples'* losses. It is undone exactly, also for a short last batch.
        Default None; a module such as ``nn.CrossEntropyLoss()`` says it by its own ``reduction``.
    token_reduction : "sum" or "mean"
        Of a sample's positions whose label is not `ignore_index`, for "cross_entropy". Default "sum".
    ignore_index : int
        Label of positions that do not count. Default -100.
    samples : int
        Draws per sample for "sampled", averaged. Default 1.
    generator : torch.Generator, optional
        For "sampled"; by default one of our own with seed 0. Its state is part of `state_dict`.
    verify : bool
        Before the first batch, compare two samples with a plain loop, parameter by parameter, and serve those that
        differ in another way: weights used outside of their layer, samples not in the first dimension. Without it
        only layers with the samples first are served by kernels, and nothing is compared. Default True.
    eval_mode : bool
        Put the model into eval mode during the pass. Default True.
    progress : bool, optional
        A progress bar on stderr (needs tqdm). By default where stderr is a terminal.
    chunk_bytes : int
        Most memory for the gradients of a chunk of samples of parameters without a kernel. Default 256 MiB.

    Attributes
    ----------
    count : int
        Samples so far.

    Raises
    ------
    TypeError, ValueError
        Naming the argument: a model without trainable parameters, an unknown loss or kind, labels out of range.
    RuntimeError
        For a model that mixes samples (batch norm in training mode), or use after an interruption within a batch.

    Notes
    -----
    .. math:: F_i = \frac1N \sum_n \mathbb{E}_{y} \Big(\frac{\partial \ell_n(y)}{\partial \theta_i}\Big)^2

    The square is of a whole sample's gradient: of the sum over its tokens, over the uses of a shared layer, and over
    the places of a tied weight. Gradient checkpointing of both kinds, ``torch.autocast`` around `accumulate`, layers
    used several times and tied weights are exact.

    Sums are kept in float32 and every 16 batches added to float64, so that small terms are not lost in a large sum;
    squares below float32's range (gradients below 1e-23 or so) are. NaN or infinite gradients make the entries of
    their parameters NaN or infinite. A parameter that the loss does not depend on gets 0.

    Memory beyond an ordinary pass: the sums (4 bytes a parameter, after 16 batches 12), once for the verification
    four times the parameters, and for parameters without a kernel `chunk_bytes`. The uses of a layer that is used
    several times are kept until the last one's gradient is there; an embedding that is also the output layer takes a
    second tensor of the size of the logits besides.

    `accumulate` freezes the parameters; a callable loss that is a module is frozen as well.

    References
    ----------
    Kirkpatrick et al., 2017, arXiv:1612.00796. Kunstner et al., 2019, arXiv:1905.12558.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.nn.fisher import FisherDiagonal
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> loader = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(2)]
    >>> with FisherDiagonal(model, loss="cross_entropy", progress=False) as fisher:
    ...     fisher.accumulate(loader).count
    10
    >>> {name: tuple(f.shape) for name, f in fisher.diagonal().items()}
    {'0.weight': (8, 4), '0.bias': (8,), '2.weight': (3, 8), '2.bias': (3,)}
    """

    def __init__(
        self, model: nn.Module, loss: str | Callable[[Any, Any], Tensor] = "cross_entropy", kind: str = "empirical", *,
        parameters: Iterable[str] | None = None, forward: Forward | None = None, reduction: str | None = None,
        token_reduction: str = "sum", ignore_index: int = -100, samples: int = 1,
        generator: torch.Generator | None = None, verify: bool = True, eval_mode: bool = True,
        progress: bool | None = None, chunk_bytes: int = 256 << 20,
    ) -> None:  # fmt: skip
        super().__init__(
            model, loss, kind, parameters=parameters, forward=forward, reduction=reduction,
            token_reduction=token_reduction, ignore_index=ignore_index, samples=samples, generator=generator,
            verify=verify, eval_mode=eval_mode, progress=progress, chunk_bytes=chunk_bytes,
        )  # fmt: skip
        self._sums = Sums(self._engine.wanted)

    def __enter__(self) -> FisherDiagonal:
        return self

    def accumulate(self, loader: Iterable[Any], *, progress: bool | None = None) -> FisherDiagonal:
        """Add the samples of a loader.

        Parameters
        ----------
        loader : iterable of batches
        progress : bool, optional
            Overrides the constructor's.

        Returns
        -------
        FisherDiagonal
            This object.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As the class says, and whatever loader and model raise. Batches before the one that failed count; the
            object can be used on, unless it failed in a batch's backward pass, where a part of it was added already.
        """
        self._pass(loader, progress, self._batch)
        return self

    def _batch(self, batch: Any) -> int:
        now = self._sums.now

        def sink(unit: Unit, module: nn.Module, uses: list[Use], scale: float) -> None:
            unit.rule.add(module, {a: now[name] for a, name in unit.slots.items()}, uses, scale)

        n = self._engine.run(batch, sink, now)
        if n:
            self._sums.step()
            self.count += n
        return n

    def diagonal(self) -> dict[str, Tensor]:
        """Return the diagonal, by name, in the shapes of the parameters: float32, or float64 for those of float64.

        Returns
        -------
        dict of str to Tensor
            New tensors.

        Raises
        ------
        RuntimeError
            If nothing was accumulated, or an interruption left a part of a batch in it.
        """
        self._ready()
        return {name: (self._sums.sum(name) / self.count).to(t.dtype) for name, t in self._sums.now.items()}

    def reset(self) -> None:
        """Forget what was accumulated."""
        self._sums = Sums(self._engine.wanted)
        self.count = 0
        self._broken = self._reduced = False

    def all_reduce(self, process_group: Any = None) -> FisherDiagonal:
        """Sum squares and counts over all processes of a group, each of which accumulated its part of the data.

        Parameters
        ----------
        process_group : torch.distributed.ProcessGroup, optional
            All processes by default. Without torch.distributed there is one, and nothing to do.

        Returns
        -------
        FisherDiagonal
            This object, the same on all processes.

        Raises
        ------
        RuntimeError
            If called twice without `reset`.
        """
        self._all_reduce([self._sums], process_group)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return all that continues the accumulation exactly: sums, counts, generator state. Tensors are copies.

        Raises
        ------
        RuntimeError
            If an interruption left a part of a batch in the sums.
        """
        if self._broken:
            raise self._is_broken()
        return {
            **self._settings(), "count": self.count, "reduced": self._reduced, "generator": self._generator_state(),
            "sums": self._sums.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where another object was.

        Raises
        ------
        ValueError
            If it is of another kind, loss or model; nothing has changed then.
        """
        self._check_settings(state_dict)
        self._sums.check(self._op, state_dict.get("sums"))
        self._sums.load_state_dict(state_dict["sums"])
        self._load_common(state_dict)
