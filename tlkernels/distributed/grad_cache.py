r"""GradCache: the gradient of a contrastive loss over a batch whose activations do not fit.

The loss couples all samples, so a batch cannot be cut into parts with a loss each. But with features
:math:`f_i = \phi(x_i; \theta)`,

.. math::
    \frac{\partial L}{\partial \theta} = \sum_i \frac{\partial L}{\partial f_i} \frac{\partial f_i}{\partial \theta} ,

and the first factor needs features only. So: all features, chunk by chunk, without activations; the loss and its
gradient with respect to them; then each chunk again, with activations, and its share of that gradient backwards through
it. Activations are those of one chunk, at the cost of a second forward pass. The result is that of one pass, provided
that both passes of a chunk compute the same: random numbers are those of the first pass, and what differs in spite of
that is an error.

Luyu Gao, Yunyi Zhang, Jiawei Han, Jamie Callan. *Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup.* RepL4NLP 2021, arXiv:2101.06983.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["CachedFeatures", "GradCache"]


class GradCache:
    """Gradients over a batch of which one chunk at a time fits.

    Parameters
    ----------
    encoders : callable or sequence of callable
        Modules or functions that make features of inputs, such as an image and a text encoder; the same one may stand
        twice. What they return is a tensor, or a tuple, list or dict of tensors, with one row per sample.
    chunk_size : int or sequence of int
        Samples per chunk, for each encoder or for all.
    loss : callable, optional
        ``loss(*features, **arguments)`` -> 0-d tensor, for `step`. Its own parameters get their gradients as usual.
    modules : sequence of Module, optional
        The modules behind encoders that are functions. Those that communicate in the backward pass (DDP, FSDP) do so
        in the last chunk only, and buffers that the forward pass changes, such as running statistics, change once.
        Default: the encoders that are modules, and those whose methods they are.
    verify : bool
        Compare the features of the second pass with those of the first.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    Where samples of a chunk depend on each other, as in batch normalization while training, the result is that of
    chunks, not of the whole batch. Random numbers are those of torch's default generators, on the CPU and on the
    devices of inputs and parameters; after the step they are where one forward pass, chunk by chunk, leaves them.
    Others (Python's, NumPy's, a generator of your own) cannot be repeated, and `verify` finds that out.

    In several processes each runs its own chunks. Under FSDP, which communicates in every forward pass, and under DDP
    with buffers that it broadcasts, all must have the same number of chunks.

    References
    ----------
    Gao 2021.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.distributed import CLIPLoss, GradCache
    >>> encoders = torch.nn.Linear(6, 4), torch.nn.Linear(3, 4)
    >>> scale = torch.nn.Parameter(torch.zeros(()))
    >>> images, texts = torch.ones(256, 6), torch.ones(256, 3)
    >>> cache = GradCache(encoders, chunk_size=64, loss=CLIPLoss(exchange="ring"))
    >>> cache.step(images, texts, logit_scale=scale.exp())  # log(256): all alike
    tensor(5.5452)

    In a loop of your own:

    >>> cached = cache.encode(images, texts)
    >>> loss = CLIPLoss()(*cached.features, scale.exp())
    >>> loss.backward()
    >>> cached.backward()
    """

    def __init__(
        self, encoders: Callable[..., Any] | Sequence[Callable[..., Any]], chunk_size: int | Sequence[int],
        loss: Callable[..., Tensor] | None = None, *, modules: Sequence[nn.Module] | None = None, verify: bool = True,
    ) -> None:  # fmt: skip
        given: Any = encoders
        if not callable(given) and not isinstance(given, Iterable):
            got = type(given).__name__
            raise TypeError(f"GradCache: encoders is {got}; expected a module, a function, or a sequence of them")
        if loss is not None and not callable(loss):
            raise TypeError(f"GradCache: loss is {type(loss).__name__}; expected a module or a function")
        self.encoders: list[Callable[..., Any]] = [encoders] if callable(encoders) else list(encoders)
        for k, encoder in enumerate(self.encoders):
            if not callable(encoder):
                raise TypeError(
                    f"GradCache: encoders[{k}] is {type(encoder).__name__}; expected a module or a function"
                )
        if not self.encoders:
            raise ValueError("GradCache: encoders is empty; expected at least one")
        self.chunk_sizes = (
            list(chunk_size) if isinstance(chunk_size, Iterable) else [chunk_size] * len(self.encoders)
        )  # fmt: skip
        if len(self.chunk_sizes) != len(self.encoders):
            raise ValueError(
                f"GradCache: chunk_size has {len(self.chunk_sizes)} entries for {len(self.encoders)} encoders; "
                "expected one number, or one for each"
            )
        for size in self.chunk_sizes:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"GradCache: chunk_size is {size}; expected an integer >= 1")
        if modules is not None and not isinstance(modules, Iterable):
            raise TypeError(f"GradCache: modules is {type(modules).__name__}; expected a sequence of modules")
        self.loss, self.verify = loss, verify
        #: for each encoder, the modules behind it
        self._behind: list[list[nn.Module]] = [
            list(modules) if modules is not None else [m] if (m := _module_of(encoder)) is not None else []
            for encoder in self.encoders
        ]
        for m in modules or ():
            if not isinstance(m, nn.Module):
                raise TypeError(f"GradCache: modules holds {type(m).__name__}; expected modules")

    def encode(self, *inputs: Any) -> CachedFeatures:
        """Compute all features, chunk by chunk, without a graph.

        Parameters
        ----------
        *inputs : Tensor, tuple, list or dict, one for each encoder
            A tensor is the encoder's argument, a tuple or list its arguments, a dict its keyword arguments. Tensors
            with dimensions are cut along the first, which is the samples; all else goes to every chunk.

        Returns
        -------
        CachedFeatures

        Raises
        ------
        TypeError, ValueError, RuntimeError
            Naming the argument. Random number generators are then where they were.
        """
        if len(inputs) != len(self.encoders):
            raise ValueError(f"GradCache: got {len(inputs)} inputs for {len(self.encoders)} encoders; expected as many")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("GradCache: inference mode is on; expected off, its tensors can have no gradient")
        runs = [
            _Run(encoder, _chunks(k, given, size), behind)
            for k, (encoder, given, size, behind) in enumerate(
                zip(self.encoders, inputs, self.chunk_sizes, self._behind, strict=True)
            )
        ]
        buffers = _Buffers(m for behind in self._behind for m in behind)
        devices = sorted({d for run in runs for d in run.devices()}, key=str)
        before = _Generators(devices)
        autocast = _Autocast({"cpu", *(d.type for d in devices)})
        try:
            features = [run.first(devices, autocast) for run in runs]
        except BaseException:
            before.restore()
            raise
        buffers.note_changes()
        return CachedFeatures(tuple(features), runs, devices, autocast, buffers, self.verify)

    def step(self, *inputs: Any, backward: Callable[[Tensor], Any] | None = None, **arguments: Any) -> Tensor:
        """Add the gradient of ``loss(*features, **arguments)`` to the ``.grad`` of all parameters behind it.

        Parameters
        ----------
        *inputs
            See `encode`.
        backward : callable, optional
            Called with the loss instead of ``loss.backward()``: ``lambda loss: scaler.scale(loss).backward()``.
        **arguments
            Further arguments of the loss.

        Returns
        -------
        Tensor
            The loss, detached.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            Naming the argument.
        """
        if self.loss is None:
            raise ValueError("GradCache: step needs loss, which is None; give one, or use encode")
        if not torch.is_grad_enabled():
            raise RuntimeError("GradCache: gradients are disabled; expected torch.enable_grad, step computes them")
        cached = self.encode(*inputs)
        loss = self.loss(*cached.features, **arguments)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"GradCache: loss returned {got}; expected a tensor of one element")
        if backward is None:
            loss.backward()
        else:
            backward(loss)
        cached.backward()
        return loss.detach()


class CachedFeatures:
    """All features of a batch, and what it takes to compute them again; made by `GradCache.encode`.

    Attributes
    ----------
    features : tuple
        What each encoder returned for all samples, leaves that collect a gradient. Those of a module that has nothing
        to learn, and got nothing to learn, collect none, and are not computed again.
    """

    def __init__(
        self, features: tuple[Any, ...], runs: list[_Run], devices: list[torch.device], autocast: _Autocast,
        buffers: _Buffers, verify: bool,
    ) -> None:  # fmt: skip
        self.features = features
        self._runs, self._devices, self._autocast, self._buffers = runs, devices, autocast, buffers
        self._verify, self._used = verify, False

    def backward(self) -> None:
        """Compute the features again, chunk by chunk, and send the gradients they collected backwards.

        Raises
        ------
        RuntimeError
            If no features have a gradient, if it was called before, or if the second pass makes other features than the
            first. Random number generators and buffers are then as they were; gradients may be there in part.
        """
        if self._used:
            raise RuntimeError("GradCache: backward was called before; encode again")
        wanted = [run for run in self._runs if any(leaf.grad is not None for leaf in run.leaves)]
        if not wanted:
            raise RuntimeError("GradCache: no features have a gradient; call backward on a loss of them first")
        self._used = True
        jobs = [(run, k) for run in wanted for k in range(len(run.chunks))]
        last = {id(m): j for j, (run, _) in enumerate(jobs) for m in run.behind}
        differs: list[Tensor] = []
        before = _Generators(self._devices)
        try:
            for j, (run, k) in enumerate(jobs):
                with contextlib.ExitStack() as stack:
                    for m in run.behind:
                        if last[id(m)] != j:
                            stack.enter_context(_no_sync(m))
                    differs += run.again(k, self._autocast, self._verify)
        finally:
            before.restore()
            self._buffers.restore()
        if differs and bool(torch.stack([d.to(differs[0].device) for d in differs]).any()):
            raise RuntimeError(
                "GradCache: the second pass made other features than the first, so the gradient is wrong; expected "
                "encoders that give the same twice: random numbers from torch's default generators only, no state "
                "that changes what they return"
            )


# ---- one encoder ----------------------------------------------------------------------------------------------------


class _Run:
    """One encoder's two passes over its chunks."""

    def __init__(self, encoder: Callable[..., Any], chunks: list[Any], behind: list[nn.Module]) -> None:
        self.encoder, self.chunks, self.behind = encoder, chunks, behind
        self.states: list[_Generators] = []
        self.leaves: list[Tensor] = []
        self.rows: list[int] = []

    def devices(self) -> set[torch.device]:
        """Where random numbers may come from, besides the CPU."""
        tensors = [t for t in tree_leaves(self.chunks) if isinstance(t, Tensor)]
        tensors += [p for m in self.behind for p in m.parameters()]
        return {t.device for t in tensors if t.device.type not in ("cpu", "meta")}

    def learns(self) -> bool:
        """Whether the second pass can have anything to do. Of a function whose modules are unknown: yes."""
        known = [p for m in self.behind for p in m.parameters()]
        given = [t for t in tree_leaves(self.chunks) if isinstance(t, Tensor)]
        return not self.behind or any(t.requires_grad for t in (*known, *given))

    def call(self, chunk: Any) -> Any:
        if isinstance(chunk, Mapping):
            return self.encoder(**chunk)
        return self.encoder(*chunk) if isinstance(chunk, (tuple, list)) else self.encoder(chunk)

    def first(self, devices: list[torch.device], autocast: _Autocast) -> Any:
        parts: list[list[Tensor]] = []
        spec: TreeSpec | None = None
        for k, chunk in enumerate(self.chunks):
            self.states.append(_Generators(devices))
            with torch.no_grad():
                leaves, spec = tree_flatten(self.call(chunk))
            rows = _rows(chunk)
            for leaf in leaves:
                if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != rows:
                    got = f"shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
                    raise ValueError(
                        f"GradCache: an encoder returned {got} for chunk {k} of {rows} samples; expected tensors of "
                        f"{rows} rows"
                    )
            parts.append(leaves)
            self.rows.append(rows)
        # autocast keeps cast weights: those made without a graph must not serve the second pass
        autocast.forget()
        learns = self.learns() and torch.is_grad_enabled()
        self.leaves = [torch.cat(column).detach() for column in zip(*parts, strict=True)]
        for leaf in self.leaves:
            leaf.requires_grad_(learns and leaf.is_floating_point())
        assert spec is not None
        return tree_unflatten(self.leaves, spec)

    def again(self, k: int, autocast: _Autocast, verify: bool) -> list[Tensor]:
        """Chunk k's second pass; tensors that are true where its features are not those of the first."""
        self.states[k].restore()
        start, stop = sum(self.rows[:k]), sum(self.rows[: k + 1])
        with torch.enable_grad(), autocast.again():
            autocast.forget()
            outputs = tree_leaves(self.call(self.chunks[k]))
        cached = [leaf.detach()[start:stop] for leaf in self.leaves]
        if [o.shape for o in outputs] != [c.shape for c in cached]:
            raise RuntimeError(
                f"GradCache: the second pass returned shapes {[tuple(o.shape) for o in outputs]} for chunk {k}; "
                f"expected {[tuple(c.shape) for c in cached]}, as the first"
            )
        pairs = [
            (o, leaf.grad[start:stop])
            for o, leaf in zip(outputs, self.leaves, strict=True)
            if o.requires_grad and leaf.grad is not None
        ]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        if not verify:
            return []
        return [_differs(o.detach(), c) for o, c in zip(outputs, cached, strict=True) if c.is_floating_point()]


def _differs(again: Tensor, first: Tensor) -> Tensor:
    """Beyond what kernels that add in any order may do: half the digits of the dtype."""
    again, first = (t.to(torch.promote_types(t.dtype, torch.float32)).nan_to_num() for t in (again, first))
    slack = torch.finfo(first.dtype).eps ** 0.5
    return (again - first).norm() > slack * first.norm()


def _rows(chunk: Any) -> int:
    return next(t.shape[0] for t in tree_leaves(chunk) if isinstance(t, Tensor) and t.dim())


def _chunks(which: int, given: Any, size: int) -> list[Any]:
    """The parts of an encoder's input, at least one: modules that communicate must run on every process."""
    leaves = [t for t in tree_leaves(given) if isinstance(t, Tensor) and t.dim()]
    if not leaves:
        raise TypeError(f"GradCache: inputs[{which}] holds no tensor with dimensions; expected one row per sample")
    counts = sorted({t.shape[0] for t in leaves})
    if len(counts) > 1:
        raise ValueError(
            f"GradCache: inputs[{which}] has tensors of {counts} rows; expected one row per sample in each"
        )

    def part(start: int) -> Any:
        return tree_map(lambda t: t[start : start + size] if isinstance(t, Tensor) and t.dim() else t, given)

    return [part(start) for start in range(0, max(counts[0], 1), size)]


def _module_of(encoder: Callable[..., Any]) -> nn.Module | None:
    owner = encoder if isinstance(encoder, nn.Module) else getattr(encoder, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


# ---- state that two passes share ------------------------------------------------------------------------------------


class _Generators:
    """Where torch's default random number generators are, on the CPU and on `devices`."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.others = [(d, torch.get_device_module(d.type).get_rng_state(d)) for d in devices]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.others:
            torch.get_device_module(device.type).set_rng_state(state, device)


@dataclass(frozen=True)
class _Cast:
    device_type: str
    dtype: torch.dtype
    enabled: bool


class _Autocast:
    """The autocast of the first pass, for the second, which may run outside of its `with` block."""

    def __init__(self, device_types: set[str]) -> None:
        self.casts = [
            _Cast(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d))
            for d in sorted(device_types)
            if torch.amp.is_autocast_available(d)
        ]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for cast in self.casts:
                if cast.enabled or torch.is_autocast_enabled(cast.device_type):
                    stack.enter_context(torch.autocast(cast.device_type, cast.dtype, cast.enabled))
            yield

    def forget(self) -> None:
        if any(cast.enabled for cast in self.casts):
            torch.clear_autocast_cache()


class _Buffers:
    """Buffers that the first pass changes: the second must not change them once more."""

    def __init__(self, modules: Iterator[nn.Module]) -> None:
        self.modules = list({id(m): m for m in modules}.values())
        self.before = [self._versions(m) for m in self.modules]
        self.saved: list[dict[str, Tensor]] = []

    @staticmethod
    def _versions(module: nn.Module) -> dict[str, tuple[int, int]]:
        return {name: (id(b), b._version) for name, b in module.named_buffers()}

    def note_changes(self) -> None:
        """Keep what the first pass left; of buffers that it did not touch, such as quantized weights, no copy."""
        for module, before in zip(self.modules, self.before, strict=True):
            now = self._versions(module)
            # torch counts no version when batch normalization writes its statistics
            unversioned = {
                id(b) for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) for b in m.buffers()
            }
            self.saved.append(
                {n: b.clone() for n, b in module.named_buffers() if id(b) in unversioned or before.get(n) != now[n]}
            )

    def restore(self) -> None:
        with torch.no_grad():
            for module, saved in zip(self.modules, self.saved, strict=True):
                for name, buffer in module.named_buffers():
                    if name in saved:
                        buffer.copy_(saved[name])


@contextlib.contextmanager
def _no_sync(module: Any) -> Iterator[None]:
    """Without the communication of gradients: DDP's and FSDP's `no_sync`, or what FSDP2 has for it."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(False)
        module.set_is_last_backward(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
            module.set_is_last_backward(True)
    elif hasattr(module, "no_sync"):
        with module.no_sync():
            yield
    else:
        yield
