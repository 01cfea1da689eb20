r"""Serving many LoRA adapters of one frozen model at once: a batch in which every row names its own.

The factors of all adapters of a layer lie stacked in memory, ``[slots, R, in]`` and ``[slots, out, R]``, padded to one
rank. A row :math:`i` of the batch that names the adapter in slot :math:`l` gets

.. math::
    y_i = W x_i + b + \gamma_l B_l A_l x_i ,

for all rows in one call of `tlkernels.ops.lora_linear_grouped` (`tlkernels.ops.lora_grouped_delta_` on a 4-bit base),
so that the product with :math:`W` is shared, whatever the mixture.

Adapters come and go while the model runs. A new version of an adapter is written into a slot that nobody reads, and
only then takes over the name; a forward pass keeps the versions that it began with, and its slots are written again
only after it has ended. For that there is one slot more than the bank's capacity.

Lequn Chen et al. *Punica: Multi-Tenant LoRA Serving.* MLSys 2024, arXiv:2310.18547.
Ying Sheng et al. *S-LoRA: Serving Thousands of Concurrent LoRA Adapters.* MLSys 2024, arXiv:2311.03285.

Examples
--------
>>> import torch
>>> from tlkernels.methods.peft import AdapterBank, LoRAConfig
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)).eval()
>>> bank = AdapterBank(model, capacity=4, max_rank=8, target_modules=["0"]).install()
>>> state = {"0.lora_A.weight": torch.randn(2, 64), "0.lora_B.weight": torch.randn(256, 2)}
>>> bank.load("french", state, config=LoRAConfig(r=2, lora_alpha=4))
>>> with torch.no_grad(), bank.use(["french", None, "french"]):
...     model(torch.randn(3, 64)).shape
torch.Size([3, 10])
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tlkernels import ops
from tlkernels.methods.peft._tuner import ALL_LINEAR, TunerConfig, has_suffix
from tlkernels.methods.peft.apply import _replace
from tlkernels.methods.peft.checkpoint import _PREFIX, Adapter, read_adapter
from tlkernels.methods.peft.lora import LoRAConfig
from tlkernels.nn.lora import BaseWeight, TunerModule, _check_base, _sizes, _weight_like, is_conv1d
from tlkernels.nn.nf4 import NF4Linear

__all__ = ["AdapterBank", "BankLinear", "BankMemory"]

_NONE = -1  # the slot of a row without an adapter, as the op has it
_FACTORS = (".lora_A.weight", ".lora_B.weight")


# ---- one call -------------------------------------------------------------------------------------------------------


class _Use:
    """A ``with bank.use(...)`` block: the slot of each row, fixed when it began."""

    def __init__(self, bank: AdapterBank, rows: Sequence[int], outer: _Use | None) -> None:
        self.bank, self.rows, self.outer = bank, rows, outer
        self.slots = sorted(set(rows) - {_NONE})
        self.all_rows = _NONE not in rows
        self._ids: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def ids(self, x: Tensor) -> Tensor:
        """The slot of each row of x, ``x.shape[:-1]``; the layers of a model share a few tensors."""
        if x.dim() < 2 or x.shape[0] != len(self.rows):
            raise ValueError(
                f"AdapterBank.use: adapters has {len(self.rows)} entries, but a layer's input has shape "
                f"{tuple(x.shape)}; expected one entry for each row of the batch, the first dimension"
            )
        key = (x.shape[:-1], x.device)
        if key not in self._ids:
            ids = torch.tensor(self.rows, dtype=torch.int64, device=x.device)
            self._ids[key] = ids.view(-1, *(1,) * (x.dim() - 2)).expand(key[0]).contiguous()
        return self._ids[key]


# Of the thread (or asyncio task) that runs the model: blocks of several threads do not see each other.
_ACTIVE: ContextVar[_Use | None] = ContextVar("tlkernels_adapter_bank", default=None)


def _active(bank: AdapterBank) -> _Use | None:
    """The innermost block of this bank; blocks of other banks, for other models, may lie around it."""
    use = _ACTIVE.get()
    while use is not None and use.bank is not bank:
        use = use.outer
    return use


# ---- one layer ------------------------------------------------------------------------------------------------------


class _Factors(nn.Module):
    """The stacked factors for the columns of a layer from `start` on, under the name that adapters know them by."""

    lora_a: Tensor
    lora_b: Tensor
    scalings: Tensor
    ranks: Tensor

    def __init__(
        self, name: str, start: int, in_features: int, out_features: int, slots: int, rank: int, like: Tensor
    ) -> None:
        super().__init__()
        self.name, self.start, self.in_features, self.out_features = name, start, in_features, out_features
        self.rank_of = [0] * slots  # what `ranks` holds, without a copy from the device
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        # not in the state_dict, which is the model's
        self.register_buffer("lora_a", torch.zeros(slots, rank, in_features, **options), persistent=False)
        self.register_buffer("lora_b", torch.zeros(slots, out_features, rank, **options), persistent=False)
        self.register_buffer("scalings", torch.zeros(slots, device=like.device, dtype=torch.float32), persistent=False)
        self.register_buffer("ranks", torch.zeros(slots, device=like.device, dtype=torch.int64), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move as any module does, but keep float32 scalings in a model of 16 bits."""
        scalings = self.scalings
        super()._apply(fn, recurse)
        self.scalings = scalings.to(self.lora_a.device)
        return self

    def write(self, slot: int, factors: tuple[Tensor, Tensor, float] | None) -> None:
        """Fill a slot; what stands above the rank is never read."""
        rank = 0
        if factors is not None:
            a, b, scaling = factors
            rank = len(a)
            self.lora_a[slot, :rank].copy_(a)
            self.lora_b[slot, :, :rank].copy_(b)
            self.scalings[slot] = scaling
        self.ranks[slot] = rank
        self.rank_of[slot] = rank

    def bytes_of(self, rank: int) -> int:
        """What an adapter of this rank takes."""
        return rank * (self.in_features + self.out_features) * self.lora_a.element_size()


class BankLinear(TunerModule):
    """A linear layer with the adapters of an `AdapterBank`, which makes it and puts it into the model.

    Outside a ``with bank.use(...)`` block it is its base layer, and so are rows without an adapter inside one.

    Attributes
    ----------
    base_layer : torch.nn.Linear, NF4Linear or transformers' Conv1D
        The model's own, left as it is.
    in_features, out_features : int
        Its sizes.
    sections : torch.nn.ModuleList
        The stacked factors: one entry, or for a packed layer one for each of the layers packed into it.
    """

    def __init__(self, bank: AdapterBank, base_layer: nn.Module, sections: Sequence[_Factors]) -> None:
        super().__init__()
        self._bank = bank
        self.base_layer = base_layer
        self.in_features, self.out_features = _sizes(base_layer, is_conv1d(base_layer))
        self.sections = nn.ModuleList(sections)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that asks for its shape, dtype or device. Not for products."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight.detach().as_subclass(BaseWeight) if type(weight) in (Tensor, nn.Parameter) else weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, ..., in_features]`` -> ``[batch, ..., out_features]``, with each row's adapter."""
        base = self.base_layer
        use = _active(self._bank)
        if use is None or not use.slots:
            return base(x)
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in base.parameters())):
            raise RuntimeError(
                "AdapterBank: it is for inference and has no gradient; run the model under torch.no_grad(), or train "
                "an adapter with tlkernels.methods.peft.apply"
            )
        ids = use.ids(x)
        touched = [
            section
            for section in self.sections
            if isinstance(section, _Factors) and any(section.rank_of[slot] for slot in use.slots)
        ]
        if use.all_rows and len(touched) == 1 and self._is_fusible(touched[0]):
            f = touched[0]
            return ops.lora_linear_grouped(
                x, base.weight, self.bias, f.lora_a, f.lora_b, ids, f.scalings, ranks=f.ranks  # type: ignore[arg-type]
            )  # fmt: skip
        # The base layer's own product, so that a row without an adapter is what it would be without the bank.
        y = base(x)
        for f in touched:
            ops.lora_grouped_delta_(
                y, x.to(y.dtype), f.lora_a, f.lora_b, ids, f.scalings, ranks=f.ranks, start=f.start
            )  # fmt: skip
        return y

    def _is_fusible(self, section: _Factors) -> bool:
        """Whether one call can do the whole layer: dense, not packed, without hooks that would not run."""
        base = self.base_layer
        hooked = base._forward_hooks or base._forward_pre_hooks
        return isinstance(base, nn.Linear) and not hooked and section.out_features == base.out_features

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the layer."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, capacity={self._bank.capacity}, max_rank={self._bank.max_rank}"


# ---- the bank -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BankMemory:
    """What an `AdapterBank` holds in memory; ``str()`` of it is a line.

    Attributes
    ----------
    adapters, capacity : int
        Loaded, and at most.
    layers : int
        How many layers have stacked factors.
    slot_bytes : int
        What one adapter of the largest rank on every layer takes.
    total_bytes : int
        Of all factors, allocated once: ``(capacity + 1) * slot_bytes``. The spare slot is for swaps.
    used_bytes : int
        What the loaded adapters would take without padding.
    """

    adapters: int
    capacity: int
    layers: int
    slot_bytes: int
    total_bytes: int
    used_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.adapters} of {self.capacity} adapters on {self.layers} layers: {self.total_bytes:,} bytes, "
            f"{self.slot_bytes:,} a slot, {self.used_bytes:,} of them in use"
        )


class AdapterBank:
    """Up to `capacity` LoRA adapters of one frozen model, any mixture of them in a batch.

    Parameters
    ----------
    model : torch.nn.Module
        Dense (`torch.nn.Linear`, transformers' ``Conv1D``) or in 4 bits (`NF4Linear`). Nothing is changed until
        `install`, and `remove` leaves it as it was.
    capacity : int
        How many adapters may be loaded, 1 or more. Memory for one more is allocated, for swaps.
    max_rank : int
        The largest rank that an adapter may have, 1 or more.
    target_modules : str or sequence of str
        The layers that adapters may be on, as for `TunerConfig`: by default all linear layers but a model's output
        head.
    exclude_modules : str or sequence of str
        Layers to leave alone, in the same notation.
    packed : mapping of str to mapping of str to int, optional
        Layers into which several that adapters know were packed, by name or last part of it, with the names and widths
        of their parts in order: ``{"qkv": {"q_proj": 384, "k_proj": 384, "v_proj": 384}}``.
    lru : bool
        What `load` does when the bank is full: False, raise; True, evict the adapter that was used the longest time
        ago and is not pinned.
    dtype : torch.dtype, optional
        Of the factors; by default that of each layer's weight (for a layer in 4 bits, its ``dtype``). They count with
        the precision of the layer's input in any case.

    Attributes
    ----------
    model : torch.nn.Module
    capacity, max_rank : int
    lru : bool
    layers : dict of str to BankLinear
        By the layers' names in the model.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated, a name matches no layer or one of another kind, or the model has adapters.

    Notes
    -----
    *Rows.* The first dimension of every adapted layer's input must be the batch, in the order of the names (beams of a
    search count as rows). Each name is broadcast over the rest, such as tokens.

    *Results.* A row that names None is the model's own output bit for bit, for the same batch. Where every row names an
    adapter, dense layers run as one product, rounded once; otherwise the update is added to the base layer's rounded
    output.

    *Threads.* Any number of threads may run the model in blocks of their own while others `load` and `evict`. A block
    keeps the versions that it began with until it ends. `install` and `remove` are not for running models.

    *Limits.* Inference only. LoRA and rsLoRA on linear layers: no DoRA, no biases, no modules trained whole. While the
    bank is installed the model cannot be copied, pickled or exported, and `torch.compile` breaks its graph at each of
    the bank's layers.

    References
    ----------
    Chen et al., Punica, MLSys 2024, arXiv:2310.18547. Sheng et al., S-LoRA, MLSys 2024, arXiv:2311.03285.

    Examples
    --------
    >>> bank = AdapterBank(model, capacity=32, max_rank=16, target_modules=["query", "value"], lru=True)
    ... # doctest: +SKIP
    >>> bank.install()  # doctest: +SKIP
    >>> bank.load("legal", "adapters/legal")  # doctest: +SKIP
    >>> bank.forward(ids, adapters=["legal", None])  # doctest: +SKIP
    """

    def __init__(
        self, model: nn.Module, capacity: int, max_rank: int, target_modules: str | Sequence[str] = ALL_LINEAR, *,
        exclude_modules: str | Sequence[str] = (), packed: Mapping[str, Mapping[str, int]] | None = None,
        lru: bool = False, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise TypeError(f"AdapterBank: model is a {type(model).__name__}; expected a torch.nn.Module")
        for argument, value in (("capacity", capacity), ("max_rank", max_rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"AdapterBank: {argument} is {value!r}; expected 1 or more")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"AdapterBank: dtype is {dtype}; expected a floating-point dtype")
        _check_free(model, "AdapterBank")
        config = TunerConfig(target_modules=target_modules, exclude_modules=exclude_modules)
        config.check()
        if not target_modules:
            raise ValueError(f"AdapterBank: target_modules is {target_modules!r}; expected at least one name")
        self.model, self.capacity, self.max_rank, self.lru = model, capacity, max_rank, lru
        targets = config.targets(model)
        for key in packed or {}:
            if not any(has_suffix(name, [key]) for name in targets):
                raise ValueError(f"AdapterBank: packed has {key!r}, which matches none of the target modules")
        self.layers = {name: self._layer(name, module, packed or {}, dtype) for name, module in targets.items()}
        self._sections: dict[str, _Factors] = {}
        for layer in self.layers.values():
            self._sections.update((section.name, section) for section in layer.sections)  # type: ignore[misc]
        self._installed = False
        self._names: dict[str, int] = {}  # name -> slot, the least recently used first
        self._pinned: set[str] = set()
        self._readers = [0] * (capacity + 1)  # blocks that read each slot
        self._changed = threading.Condition()  # guards the four above
        self._loading = threading.Lock()  # one load at a time; runs do not take it

    def _layer(
        self, name: str, module: nn.Module, packed: Mapping[str, Mapping[str, int]], dtype: torch.dtype | None
    ) -> BankLinear:  # fmt: skip
        if not name:
            kind = type(self.model).__name__
            raise ValueError(f"AdapterBank: model is itself a target, a {kind}; expected it inside another module")
        kinds = (type(module),) if is_conv1d(module) else (nn.Linear, NF4Linear)
        _check_base(f"AdapterBank: {name}", module, kinds, "a torch.nn.Linear or tlkernels.nn.NF4Linear")
        in_features, out_features = _sizes(module, is_conv1d(module))
        parent = name.rpartition(".")[0]
        parts = next((parts for key, parts in packed.items() if has_suffix(name, [key])), None)
        widths = {name: out_features}
        if parts is not None:
            widths = {f"{parent}.{part}" if parent else part: width for part, width in parts.items()}
            if sum(widths.values()) != out_features or min(widths.values()) < 1:
                raise ValueError(
                    f"AdapterBank: packed has widths {list(widths.values())} for {name}; expected positive ones whose "
                    f"sum is its out_features, {out_features}"
                )
        like = _weight_like(module)
        like = like.new_empty(0, dtype=dtype or like.dtype)
        sections, start = [], 0
        for part, width in widths.items():
            sections.append(_Factors(part, start, in_features, width, self.capacity + 1, self.max_rank, like))
            start += width
        return BankLinear(self, module, sections)

    # ---- in and out of the model

    @property
    def installed(self) -> bool:
        """Whether the model's layers are the bank's now."""
        return self._installed

    def install(self) -> AdapterBank:
        """Put the bank's layers into the model, around its own.

        Returns
        -------
        AdapterBank
            The bank.

        Raises
        ------
        RuntimeError, ValueError
            If it is installed, the model has other adapters now, or its layers are others than when the bank was made.
        """
        if self._installed:
            raise RuntimeError("AdapterBank.install: it is installed already")
        _check_free(self.model, "AdapterBank.install")
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name, layer in self.layers.items():
            if modules.get(name) is not layer.base_layer:
                raise RuntimeError(
                    f"AdapterBank.install: {name} of the model was replaced since the bank was made; make a new one"
                )
        for layer in self.layers.values():
            layer.sections.to(_weight_like(layer.base_layer).device)  # the model may have moved
            layer.train(layer.base_layer.training)
            _replace(self.model, layer.base_layer, layer)
        self._installed = True
        return self

    def remove(self) -> nn.Module:
        """Take the bank's layers out of the model again. The adapters stay loaded.

        Returns
        -------
        torch.nn.Module
            The model, with its own layers, to which nothing was done.

        Raises
        ------
        RuntimeError
            If the bank is not installed, or a block of `use` is running.
        """
        self._check_installed("remove")
        with self._changed:
            if any(self._readers):
                raise RuntimeError("AdapterBank.remove: a forward pass is running in a `use` block; wait for its end")
            for layer in self.layers.values():
                _replace(self.model, layer, layer.base_layer)
            self._installed = False
        return self.model

    def _check_installed(self, method: str) -> None:
        if not self._installed:
            raise RuntimeError(f"AdapterBank.{method}: the bank is not in the model; call install() first")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("AdapterBank: it cannot be copied or pickled; remove() it from the model first")

    # ---- adapters

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded adapters, the least recently used (or loaded) first."""
        with self._changed:
            return tuple(self._names)

    @property
    def pinned(self) -> tuple[str, ...]:
        """The adapters that are not evicted to make room."""
        with self._changed:
            return tuple(name for name in self._names if name in self._pinned)

    def __contains__(self, name: object) -> bool:
        with self._changed:
            return name in self._names

    def __len__(self) -> int:
        with self._changed:
            return len(self._names)

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        return f"AdapterBank({kind}, capacity={self.capacity}, max_rank={self.max_rank}, names={list(self.names)})"

    def load(
        self, name: str, adapter: str | os.PathLike[str] | Adapter | Mapping[str, Tensor], *,
        config: LoRAConfig | None = None, pin: bool = False, timeout: float = 60.0,
    ) -> None:  # fmt: skip
        """Load an adapter, or another version of one: the name then stands for the new one.

        Parameters
        ----------
        name : str
            By which rows name it.
        adapter : path, Adapter or mapping of str to Tensor
            A directory in the PEFT library's format (see `read_adapter`), what `read_adapter`, `get_adapter` or
            `merge_adapters` returned, or the factors by PEFT's names, ``layers.0.q_proj.lora_A.weight`` and so on, with
            or without its prefix. Layers of the bank that it says nothing of are left as the model has them.
        config : LoRAConfig, optional
            For a mapping, and needed there: rank, alpha and their patterns.
        pin : bool
            Whether to `pin` it too.
        timeout : float
            Seconds to wait for running blocks, which is needed only where they still read an older version in the
            spare slot.

        Raises
        ------
        FileNotFoundError
            If a file is not there.
        TypeError, ValueError
            If the files are damaged, or the adapter does not fit the bank: a layer that it has not, another shape, a
            rank above `max_rank`, values that are not finite in the bank's dtype, or more than LoRA factors.
        RuntimeError
            If the bank is full, and `lru` False or everything pinned; or inside a `use` block of this bank.
        TimeoutError
            If no slot became free.

        Notes
        -----
        Everything is checked before the first copy. On an error the bank is as it was, the old version under this name
        included. Blocks that run keep the old version; blocks that begin after the return have the new one.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"AdapterBank.load: name is {name!r}; expected a string that is not empty")
        if _active(self) is not None:
            raise RuntimeError("AdapterBank.load: called inside a `use` block of this bank, whose end it may wait for")
        staged = self._staged(name, self._read(adapter, config))
        with self._loading:
            with self._changed:
                self._check_room(name)
                if not self._changed.wait_for(lambda: self._free_slot() is not None, timeout):
                    raise TimeoutError(
                        f"AdapterBank.load: no slot became free in {timeout} s; running `use` blocks still read older "
                        "versions"
                    )
                slot = self._free_slot()
                assert slot is not None
            # Nobody reads this slot, and no name leads to it: blocks run on meanwhile, and an error loses nothing.
            self._write(slot, staged)
            with self._changed:
                victim = self._check_room(name)
                if victim is not None:
                    del self._names[victim]
                self._names.pop(name, None)
                self._names[name] = slot
                if pin:
                    self._pinned.add(name)

    def evict(self, name: str) -> None:
        """Forget an adapter. Blocks that run keep it until they end.

        Raises
        ------
        ValueError
            If there is none of this name, or it is pinned.
        """
        with self._changed:
            self._check_known("evict", "name", name)
            if name in self._pinned:
                raise ValueError(f"AdapterBank.evict: name is {name!r}, which is pinned; unpin it first")
            del self._names[name]
            self._changed.notify_all()

    def pin(self, name: str) -> None:
        """Keep an adapter from being evicted; loading another version under its name is possible, and is pinned too.

        Raises
        ------
        ValueError
            If there is none of this name.
        """
        with self._changed:
            self._check_known("pin", "name", name)
            self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Take a `pin` back; nothing happens where there is none.

        Raises
        ------
        ValueError
            If there is no adapter of this name.
        """
        with self._changed:
            self._check_known("unpin", "name", name)
            self._pinned.discard(name)

    def memory(self) -> BankMemory:
        """What the bank holds in memory."""
        sections = self._sections.values()
        with self._changed:
            slots = list(self._names.values())
        slot_bytes = sum(section.bytes_of(self.max_rank) for section in sections)
        return BankMemory(
            adapters=len(slots), capacity=self.capacity, layers=len(self.layers), slot_bytes=slot_bytes,
            total_bytes=sum(section.lora_a.nbytes + section.lora_b.nbytes for section in sections),
            used_bytes=sum(section.bytes_of(section.rank_of[slot]) for section in sections for slot in slots),
        )  # fmt: skip

    # ---- running the model

    @contextmanager
    def use(self, adapters: Sequence[str | None]) -> Iterator[None]:
        """Run the model, in this block and thread, with an adapter of its own for each row of the batch.

        Parameters
        ----------
        adapters : sequence of str or None
            A name for each row, None for the model as it is. Names are resolved here: the block keeps the versions
            that there are now.

        Raises
        ------
        TypeError, ValueError
            If it is not a sequence of names, or a name is not loaded; in the block, where a layer's input has another
            number of rows.
        RuntimeError
            If the bank is not installed; in the block, if a gradient would be needed.
        """
        self._check_installed("use")
        if isinstance(adapters, str) or not isinstance(adapters, Sequence):
            raise TypeError(f"AdapterBank.use: adapters is a {type(adapters).__name__}; expected a list of names")
        with self._changed:
            for name in adapters:
                if name is not None:
                    self._check_known("use", "adapters", name)
            active = _Use(self, [_NONE if name is None else self._names[name] for name in adapters], _ACTIVE.get())
            for name in dict.fromkeys(name for name in adapters if name is not None):
                self._names[name] = self._names.pop(name)  # to the end: the most recently used
            for slot in active.slots:
                self._readers[slot] += 1
        token = _ACTIVE.set(active)
        try:
            yield
        finally:
            with self._changed:
                for slot in active.slots:
                    self._readers[slot] -= 1
                self._changed.notify_all()
            _ACTIVE.reset(token)

    def forward(self, *args: Any, adapters: Sequence[str | None], **kwargs: Any) -> Any:
        """Call the model with an adapter for each row, without gradients: ``with bank.use(adapters): model(...)``.

        Parameters
        ----------
        *args, **kwargs
            The model's.
        adapters : sequence of str or None
            As for `use`.

        Returns
        -------
        What the model returns.
        """
        with torch.no_grad(), self.use(adapters):
            return self.model(*args, **kwargs)

    # ---- what `load` does, step by step

    def _read(self, adapter: Any, config: LoRAConfig | None) -> Adapter:
        if isinstance(adapter, Mapping):
            if not isinstance(config, LoRAConfig):
                raise TypeError(
                    f"AdapterBank.load: config is a {type(config).__name__}; expected a LoRAConfig for a mapping of "
                    "tensors, which does not say its scaling"
                )
            config.check()
            tensors = {str(key).removeprefix(_PREFIX): value for key, value in adapter.items()}
            for key, value in tensors.items():
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                    raise TypeError(f"AdapterBank.load: adapter has a {kind} for {key!r}; expected a float tensor")
            return Adapter(config, tensors)
        if config is not None:
            raise ValueError("AdapterBank.load: config is given beside an adapter that has its own; expected None")
        if isinstance(adapter, Adapter):
            return adapter
        if isinstance(adapter, (str, os.PathLike)):
            return read_adapter(adapter)
        raise TypeError(
            f"AdapterBank.load: adapter is a {type(adapter).__name__}; expected a directory, an Adapter or a mapping "
            "of names to tensors"
        )

    def _staged(self, name: str, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor, float]]:
        """The factors and the scaling for each section that the adapter has, checked, as they will be copied."""
        config, where = adapter.config, f"AdapterBank.load: adapter {name!r}"
        for flag in ("use_dora", "lora_bias"):
            if getattr(config, flag):
                raise ValueError(f"{where} has {flag}=True; expected False: a bank holds plain LoRA factors")
        if isinstance(config.init_lora_weights, str) and config.init_lora_weights in ("pissa", "olora"):
            raise ValueError(
                f"{where} has init_lora_weights={config.init_lora_weights!r} and goes with another base weight; save "
                "it as a plain adapter (save_adapter does)"
            )
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in adapter.tensors.items():
            suffix = next((suffix for suffix in _FACTORS if key.endswith(suffix)), None)
            if suffix is None:
                raise ValueError(f"{where} has {key!r}; expected only lora_A and lora_B of linear layers")
            found.setdefault(key.removesuffix(suffix), {})[suffix] = value
        if not found:
            raise ValueError(f"{where} is empty; expected lora_A and lora_B of at least one layer")
        staged = {}
        for layer, factors in found.items():
            section = self._sections.get(layer)
            if section is None:
                known = ", ".join(list(self._sections)[:4]) + (", ..." if len(self._sections) > 4 else "")
                raise ValueError(f"{where} has the layer {layer!r}, which the bank has not; it has {known}")
            rank = config.rank_of(layer)
            if rank > self.max_rank:
                raise ValueError(f"{where} has rank {rank} on {layer}; expected at most max_rank, {self.max_rank}")
            ready = []
            wanted = ((rank, section.in_features), (section.out_features, rank))
            for suffix, shape in zip(_FACTORS, wanted, strict=True):
                if suffix not in factors:
                    raise ValueError(f"{where} has no {layer + suffix!r}, but the other factor of that layer")
                value = factors[suffix].detach()
                if tuple(value.shape) != shape:
                    raise ValueError(
                        f"{where} has {layer + suffix!r} of shape {tuple(value.shape)}; expected {shape}, by its "
                        "config's rank and the layer"
                    )
                value = value.to(section.lora_a.dtype)
                if not bool(value.isfinite().all()):
                    raise ValueError(
                        f"{where} has values in {layer + suffix!r} that are not finite in {section.lora_a.dtype}"
                    )
                ready.append(value)
            staged[layer] = (ready[0], ready[1], config.scaling_of(layer))
        return staged

    def _write(self, slot: int, staged: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
        devices = {section.lora_a.device for section in self._sections.values() if section.lora_a.device.type != "cpu"}
        with torch.no_grad():
            # A block ends when its kernels are queued: on an accelerator they may still read what was in this slot.
            for device in devices:
                torch.accelerator.synchronize(device)
            for name, section in self._sections.items():
                section.write(slot, staged.get(name))
            for device in devices:
                torch.accelerator.synchronize(device)

    def _free_slot(self) -> int | None:
        """A slot that no name leads to and no block reads."""
        named = set(self._names.values())
        return next((s for s, readers in enumerate(self._readers) if not readers and s not in named), None)

    def _check_room(self, name: str) -> str | None:
        """The adapter to evict for this one, None where there is room."""
        if name in self._names or len(self._names) < self.capacity:
            return None
        loaded = ", ".join(self._names)
        if not self.lru:
            raise RuntimeError(
                f"AdapterBank.load: the bank is full, capacity is {self.capacity} ({loaded}); evict one, or make the "
                "bank with lru=True"
            )
        victim = next((other for other in self._names if other not in self._pinned), None)
        if victim is None:
            raise RuntimeError(
                f"AdapterBank.load: the bank is full, capacity is {self.capacity}, and all are pinned ({loaded}); "
                "unpin one"
            )
        return victim

    def _check_known(self, method: str, argument: str, name: object) -> None:
        if not isinstance(name, str) or name not in self._names:
            loaded = ", ".join(self._names) or "none"
            raise ValueError(
                f"AdapterBank.{method}: {argument} has {name!r}, which is not loaded; loaded are: {loaded}"
            )


def _check_free(model: nn.Module, who: str) -> None:
    there = next((name for name, module in model.named_modules() if isinstance(module, TunerModule)), None)
    if there is not None:
        raise ValueError(f"{who}: model has adapters already ({there}); expected none: remove or merge them first")
