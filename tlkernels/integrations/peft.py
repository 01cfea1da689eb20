r"""PEFT's LoRA and DoRA layers on this library's kernels, and PEFT adapters on `NF4Linear` layers.

`accelerate` gives PEFT's layers another ``forward``, layer by layer; everything else of PEFT works on, because the
parameters, the module tree and all of PEFT's methods stay where they are. What a call computes, with the active
adapters stacked into one :math:`A` and :math:`B` with the scalings :math:`\gamma` in :math:`B`:

.. math::
    y = x W^T + b + \gamma \, \mathrm{drop}(x) A^T B^T
    \qquad \text{(LoRA)}, \qquad
    y = g \circ (x W^T + \gamma \, x A^T B^T) + b, \quad g = \frac{m}{\lVert W + \gamma B A \rVert}
    \qquad \text{(DoRA)}.

`register` lets PEFT wrap `NF4Linear`, which it does not know.

Edward Hu et al. *LoRA: Low-Rank Adaptation of Large Language Models.* ICLR 2022, arXiv:2106.09685.
Shih-Yang Liu et al. *DoRA: Weight-Decomposed Low-Rank Adaptation.* ICML 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tlkernels import ops
from tlkernels.nn import NF4Linear
from tlkernels.nn.nf4 import _autocast_dtype
from tlkernels.ops._common import FLOATS, name_of, no_autocast
from tlkernels.ops.nf4 import NF4Weight

__all__ = ["Accelerated", "accelerate", "register", "restore"]

_BASE = "__base__"  # PEFT's name for "no adapter" in a mixed batch


def _peft() -> Any:
    try:
        import peft
        import peft.tuners.lora
        import peft.tuners.lora.dora
        import peft.tuners.tuners_utils
    except ImportError as error:
        raise ImportError(
            "tlkernels.integrations.peft needs peft and transformers; install them with `pip install peft`"
        ) from error
    return peft


# ---- accelerate -----------------------------------------------------------------------------------------------------


class Accelerated:
    """What `accelerate` did to a model. Prints as a report; undoes itself at the end of a ``with`` block.

    Attributes
    ----------
    changed : tuple of str
        Names of the layers whose forward this call replaced.
    already : tuple of str
        Names of the layers that ran on this library before: an earlier call's, and adapters on `NF4Linear`.
    left : dict of str to str
        Layers of PEFT that were left alone, each with the reason.
    partly : dict of str to str
        Of the accelerated layers, those that pass some calls on to PEFT's own forward, each with when and why.
    """

    def __init__(
        self, changed: Mapping[str, nn.Module], already: Sequence[str], left: dict[str, str], partly: dict[str, str]
    ) -> None:
        self.changed = tuple(changed)
        self.already = tuple(already)
        self.left = left
        self.partly = partly
        # weak: merge_and_unload drops the layers, and this report should not keep them
        self._layers = [weakref.ref(layer) for layer in changed.values()]

    def restore(self) -> None:
        """Give the layers in `changed` PEFT's forward back. Doing it twice is harmless."""
        for reference in self._layers:
            layer = reference()
            if layer is not None:
                _restore(layer)

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *exc: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        counts = f"{len(self.changed)} changed, {len(self.already)} already, {len(self.left)} left"
        lines = [f"Accelerated: {counts}", *(f"  left {name}: {why}" for name, why in self.left.items())]
        return "\n".join([*lines, *(f"  partly {name}: {why}" for name, why in self.partly.items())])


def accelerate(model: nn.Module) -> Accelerated:
    """Run PEFT's LoRA and DoRA layers on `tlkernels.ops.lora_linear`, in place.

    Parameters
    ----------
    model : torch.nn.Module
        A ``peft.PeftModel``, or any module with PEFT layers in it (``peft.inject_adapter_in_model``,
        ``transformers``' ``model.add_adapter``).

    Returns
    -------
    Accelerated
        What was changed, what was left and why. Also a context manager that restores on exit.

    Raises
    ------
    ImportError
        If peft is not installed.
    TypeError
        If `model` is not a module.
    ValueError
        If `model` holds no layer of PEFT.

    Notes
    -----
    Accelerated are ``lora.Linear`` on a dense `torch.nn.Linear` or an `NF4Linear`, and ``lora.Linear4bit`` on
    bitsandbytes' ``Linear4bit``, whose codes and scales are used where they lie. Calling it again adds what is new.
    Each layer decides at every call, by what is active then, so all of PEFT's methods work on: add, set, disable,
    merge, unmerge, delete and unload adapters, mixed batches (``adapter_names``), save and load. An adapter added
    later runs on the kernels where its layer was accelerated; for layers that PEFT wraps later, call it again.

    Left to PEFT, call by call: variants other than DoRA; DoRA with other adapters active beside it, or with PEFT's
    DoRA cache on; dropout modules other than `torch.nn.Dropout`; layers or adapters with hooks (offloading, FSDP). In
    a mixed batch with ``lora_bias``, active dropout, or gradients through a 4-bit weight only the base product is this
    library's.

    What differs from PEFT:

    - *Precision.* PEFT takes x up to the adapter's dtype (float32, as a rule) and the adapter's output down again.
      Here the adapter counts with x's precision, as autocast would have it: sums are float32 and the output is
      rounded once. Gradients of the adapter have its own dtype.
    - *Random numbers.* A dropout mask comes from `tlkernels.ops.lora_dropout_mask`, with a key drawn from torch's
      generator: reproducible with ``torch.manual_seed``, but another mask than `torch.nn.Dropout`'s. DoRA uses
      `torch.nn.Dropout` itself, and the same masks as in PEFT. Without dropout no random number is drawn.
    - *bitsandbytes.* The layer's compute dtype is respected; where none was given, it is that of x at each call, not
      that of the first call. The scales are not repacked for CPU inference (which rounds them to bfloat16), and rows
      that are not a multiple of the block are decoded as the format says, which bitsandbytes 0.50 does not on a CPU.

    References
    ----------
    Hu et al., LoRA, ICLR 2022, arXiv:2106.09685. Liu et al., DoRA, ICML 2024, arXiv:2402.09353.

    Examples
    --------
    >>> model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))  # doctest: +SKIP
    >>> print(accelerate(model))  # doctest: +SKIP
    Accelerated: 12 changed, 0 already, 0 left
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is a {type(model).__name__}; expected a torch.nn.Module with PEFT layers")
    tuner_layer = _peft().tuners.tuners_utils.BaseTunerLayer
    layers = {name: module for name, module in model.named_modules() if isinstance(module, tuner_layer)}
    if not layers:
        raise ValueError("accelerate: model holds no layer of PEFT; expected a model from peft.get_peft_model")
    changed: dict[str, nn.Module] = {}
    already: list[str] = []
    left: dict[str, str] = {}
    partly: dict[str, str] = {}
    for name, layer in layers.items():
        if _is_ours(layer):
            already.append(name)
        elif (why := _why_not(layer)) is not None:
            left[name] = why
            continue
        else:
            changed[name] = layer
        if exceptions := _exceptions(layer):
            partly[name] = "; ".join(exceptions)
    for layer in changed.values():
        layer.forward = _Forward(layer)
    return Accelerated(changed, already, left, partly)


def restore(model: nn.Module) -> None:
    """Give all layers of a model PEFT's forward back: undo every `accelerate`.

    Parameters
    ----------
    model : torch.nn.Module
        Accelerated or not. Adapters on `NF4Linear` (see `register`) have no other forward and stay.

    Raises
    ------
    TypeError
        If `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model is a {type(model).__name__}; expected a torch.nn.Module")
    for layer in model.modules():
        _restore(layer)


class _Forward:
    """What stands in a layer's ``forward``. An object of the instance: no class is changed, and a copy has its own."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = _run(self.layer, x, args, kwargs)
        return type(self.layer).forward(self.layer, x, *args, **kwargs) if out is None else out


def _restore(layer: nn.Module) -> None:
    if isinstance(vars(layer).get("forward"), _Forward):
        del layer.forward


def _is_ours(layer: nn.Module) -> bool:
    return isinstance(vars(layer).get("forward"), _Forward) or getattr(type(layer), "_tlkernels", False)


def _why_not(layer: Any) -> str | None:
    """Why a layer of PEFT cannot run on the kernels, whatever is active on it."""
    lora = _peft().tuners.lora
    name = ".".join([*type(layer).__module__.split(".")[-2:-1], type(layer).__name__])
    if type(layer) is not lora.Linear and type(layer) is not getattr(lora, "Linear4bit", None):
        return f"a {name}; expected lora.Linear or lora.Linear4bit"
    if "forward" in vars(layer):
        return "its forward was replaced"
    if layer.fan_in_fan_out:
        return "its weight is transposed (fan_in_fan_out, Conv1D)"
    if (why := _why_not_base(layer.base_layer)) is not None:
        return why
    variants = {name: layer.lora_variant.get(name) for name in layer.lora_A}
    if variants and all(v is not None and not _is_dora(v) for v in variants.values()):
        return f"its adapters are of a variant without a kernel: {_variant_names(variants)}"
    return None


def _why_not_base(base: Any) -> str | None:
    kind = type(base).__name__
    if isinstance(base, NF4Linear):
        return None
    if _is_bnb(base):
        state = getattr(base.weight, "quant_state", None)
        if state is None:
            return "bitsandbytes has not quantized its weight yet; move the model to its device first"
        if getattr(state, "packing_format_for_cpu", False):
            return "bitsandbytes has run it in eval mode on a CPU, and repacked its weight; accelerate before that"
        from tlkernels.integrations.bitsandbytes import _weight

        try:  # reads all entries and tables; at a call only the tensors are taken
            _weight(base, (base.out_features, base.in_features))
        except ValueError as error:
            return f"its 4-bit weight cannot be used: {error}"
        return None
    if not isinstance(base, nn.Linear) or type(base).forward is not nn.Linear.forward:
        return f"its base layer is a {kind}; expected torch.nn.Linear, NF4Linear or bitsandbytes' Linear4bit"
    if not _is_plain(base.weight):
        return f"its base layer's weight is a {type(base.weight).__name__}; expected a plain Parameter"
    if base.weight.dtype not in FLOATS:
        return f"its base layer's weight has dtype {name_of(base.weight.dtype)}"
    return None


def _exceptions(layer: Any) -> list[str]:
    """What of an accelerated layer, as it is now, still runs on PEFT's own forward."""
    odd = {n: v for n, v in layer.lora_variant.items() if n in layer.lora_A and not _is_dora(v)}
    found = [f"PEFT's forward where {_variant_names(odd)} is active"] if odd else []
    if any(_is_dora(v) for v in layer.lora_variant.values()) and len(layer.lora_A) > 1:
        found.append("PEFT's forward where a DoRA adapter is active together with another")
    parts = [m for n in layer.lora_A for m in (layer.lora_A[n], layer.lora_B[n], layer.lora_dropout[n])]
    if _hooked(layer.base_layer, *parts):
        found.append("PEFT's forward as long as there are hooks on its base layer or adapters")
    return found


def _variant_names(variants: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({type(v).__name__})" for name, v in variants.items())


# ---- one call -------------------------------------------------------------------------------------------------------


class _Base(NamedTuple):
    """A frozen layer as the ops take it. `compute` is the dtype that x is taken to, None for x's own."""

    weight: Tensor | NF4Weight
    bias: Tensor | None
    compute: torch.dtype | None = None


class _Adapter(NamedTuple):
    """An active adapter; `p` is 0 where its dropout does nothing now."""

    name: str
    a: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: float
    p: float


def _run(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The layer's output; None where the call is one for PEFT's own forward."""
    if args or not isinstance(x, Tensor) or any(v is not None for k, v in kwargs.items() if k != "adapter_names"):
        return None
    base = _base(layer.base_layer, x)
    if base is None:
        return None
    names = kwargs.get("adapter_names")
    if names is not None:
        layer._check_forward_args(x, adapter_names=names)
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
        base = _base(layer.base_layer, x)
    if base is None:
        return None
    if names is not None and not layer.disable_adapters:
        return _mixed(layer, base, x, names)
    active = [] if layer.disable_adapters or layer.merged else [n for n in layer.active_adapters if n in layer.lora_A]
    if not active:
        return _frozen(base, x)
    adapters = []
    for name in active:
        adapter = _adapter(layer, name)
        if adapter is None:
            return None
        adapters.append(adapter)
    if not any(name in layer.lora_variant for name in active):
        return _lora(layer, base, x, adapters)
    return _dora(layer, base, x, adapters[0]) if len(active) == 1 else None


def _base(module: Any, x: Tensor) -> _Base | None:
    """The frozen layer's tensors; None where it must be called itself."""
    if not x.is_floating_point() or _hooked(module):
        return None
    if isinstance(module, NF4Linear):
        return _Base(module.nf4_weight, module.bias)
    if _is_bnb(module):
        weight = _bnb_weight(module)
        return None if weight is None else _Base(weight, module.bias, _bnb_compute(module, x))
    weight = module.weight
    if not _is_plain(weight):
        return None
    if weight.dtype != x.dtype and _autocast_dtype(x) is None:
        return None  # torch says what is wrong
    return _Base(weight, module.bias)


def _adapter(layer: Any, name: str) -> _Adapter | None:
    down, up, drop = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    variant = layer.lora_variant.get(name)
    if variant is not None and not _is_dora(variant):
        return None
    # other classes and hooks mean that someone shards, offloads or parametrizes the factors
    if any(type(m) is not nn.Linear or not _is_plain(m.weight) for m in (down, up)) or _hooked(down, up, drop):
        return None
    p = 0.0
    if type(drop) is nn.Dropout:
        p = drop.p if drop.training else 0.0
    elif type(drop) is not nn.Identity:
        return None
    if p >= 1.0:
        return None
    return _Adapter(name, down.weight, up.weight, up.bias, float(layer.scaling[name]), p)


def _frozen(base: _Base, x: Tensor) -> Tensor | None:
    """The base layer alone: the kernel's where the weight is in 4 bits. bitsandbytes' own call may repack it."""
    if not isinstance(base.weight, NF4Weight):
        return None
    dtype = _autocast_dtype(x) or base.compute or x.dtype
    with no_autocast(x.device):
        out = ops.nf4_linear(x.to(dtype), base.weight, base.bias)
    return out if base.compute is None else out.to(x.dtype)


def _lora(layer: Any, base: _Base, x: Tensor, adapters: list[_Adapter]) -> Tensor:
    """One product for the base, with all adapters that share x; those with a mask of their own come after."""
    together = [adapter for adapter in adapters if adapter.p == 0.0] or adapters[:1]
    bias = base.bias
    for adapter in together:
        if adapter.bias is not None:
            update = adapter.scaling * adapter.bias
            bias = update if bias is None else bias + update
    a, b, scaling = _stack(together)
    cast = x if base.compute is None else x.to(base.compute)
    out = ops.lora_linear(cast, base.weight, bias, a, b, scaling, dropout=together[0].p)
    if base.compute is not None:
        out = out.to(x.dtype)
    if len(together) == len(adapters):
        return out
    dtype = out.dtype
    for adapter in adapters:
        if adapter not in together:
            dropped = layer.lora_dropout[adapter.name](layer._cast_input_dtype(x, adapter.a.dtype))
            out = out + layer.lora_B[adapter.name](layer.lora_A[adapter.name](dropped)) * adapter.scaling
    return out.to(dtype)


def _stack(adapters: list[_Adapter]) -> tuple[Tensor, Tensor, float]:
    """Factors of the sum of the adapters, and the scaling that is left to apply."""
    if len(adapters) == 1:
        return adapters[0].a, adapters[0].b, adapters[0].scaling
    a = torch.cat([adapter.a for adapter in adapters])
    if len({adapter.scaling for adapter in adapters}) == 1:
        return a, torch.cat([adapter.b for adapter in adapters], 1), adapters[0].scaling
    # float32, so that a 16-bit factor is not rounded again
    scaled = [
        adapter.b.to(torch.promote_types(adapter.b.dtype, torch.float32)) * adapter.scaling for adapter in adapters
    ]
    return a, torch.cat(scaled, 1), 1.0


def _dora(layer: Any, base: _Base, x: Tensor, adapter: _Adapter) -> Tensor | None:
    """PEFT's DoRA. In training with dropout, d = drop(x) takes x's place in all but the base product.

    W x + b + (g - 1) W d + g s B A d = (W (x - d) + b) + g (W d + s B A d): two products, as without dropout's d.
    """
    dora = _peft().tuners.lora.dora
    magnitude = layer.lora_magnitude_vector[adapter.name]
    if type(magnitude) is not dora.DoraLinearLayer or _hooked(magnitude) or adapter.bias is not None:
        return None
    if dora.ENABLE_DORA_CACHING and not layer.training:
        return None
    cast = x if base.compute is None else x.to(base.compute)
    drop = layer.lora_dropout[adapter.name]
    rest: Tensor | None
    if isinstance(drop, nn.Identity) or not layer.training:
        inner, rest = cast, base.bias
    else:
        inner = drop(cast)
        rest = _linear(base._replace(compute=None), cast - inner)
    norm = ops.dora_weight_norm(base.weight, adapter.a, adapter.b, adapter.scaling)
    gain = magnitude.weight / norm
    out = ops.lora_linear(inner, base.weight, None, adapter.a, adapter.b, adapter.scaling)
    result = gain * out
    if rest is not None:
        result = result + rest
    return result.to(out.dtype if base.compute is None else x.dtype)


def _linear(base: _Base, x: Tensor) -> Tensor:
    out = _frozen(base, x)
    return nn.functional.linear(x, base.weight, base.bias) if out is None else out  # type: ignore[arg-type]


def _mixed(layer: Any, base: _Base, x: Tensor, names: Sequence[str]) -> Tensor | None:
    """A batch in which each sample names its adapter."""
    used = sorted({name for name in names if name != _BASE and name in layer.lora_A})
    adapters = []
    for name in used:
        adapter = _adapter(layer, name)
        if adapter is None or name in layer.lora_variant:
            return None
        adapters.append(adapter)
    if not adapters:
        return _frozen(base, x)
    learns = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, *(t for adapter in adapters for t in (adapter.a, adapter.b)))
    )
    four_bit = isinstance(base.weight, NF4Weight)
    if any(adapter.p > 0.0 or adapter.bias is not None for adapter in adapters) or (four_bit and learns):
        return _one_by_one(layer, base, x, names, adapters)
    sizes = [adapter.a.shape[0] for adapter in adapters]
    rank = max(sizes)
    pad = nn.functional.pad
    a = torch.stack([pad(adapter.a, (0, 0, 0, rank - size)) for adapter, size in zip(adapters, sizes, strict=True)])
    b = torch.stack([pad(adapter.b, (0, rank - size)) for adapter, size in zip(adapters, sizes, strict=True)])
    place = {name: i for i, name in enumerate(used)}
    ids = torch.tensor([place.get(name, -1) for name in names], device=x.device)
    ids = ids.view(-1, *(1,) * (x.dim() - 2)).expand(x.shape[:-1])
    scalings = torch.tensor([adapter.scaling for adapter in adapters], dtype=torch.float32, device=x.device)
    ranks = torch.tensor(sizes, device=x.device) if min(sizes) < rank else None
    if not four_bit:
        return ops.lora_linear_grouped(x, base.weight, base.bias, a, b, ids, scalings, ranks=ranks)
    cast = x.to(_autocast_dtype(x) or base.compute or x.dtype)
    with no_autocast(x.device):
        out = ops.lora_linear_grouped(cast, base.weight, base.bias, a, b, ids, scalings, ranks=ranks)
    return out if base.compute is None else out.to(x.dtype)


def _one_by_one(layer: Any, base: _Base, x: Tensor, names: Sequence[str], adapters: list[_Adapter]) -> Tensor:
    """What the grouped op has not: biases, masks, and gradients with a 4-bit weight."""
    out = _linear(base, x)
    for adapter in adapters:
        rows = torch.tensor([i for i, name in enumerate(names) if name == adapter.name], device=x.device)
        own = layer.lora_dropout[adapter.name](layer._cast_input_dtype(x[rows], adapter.a.dtype))
        update = layer.lora_B[adapter.name](layer.lora_A[adapter.name](own)) * adapter.scaling
        out = out.index_add(0, rows, update.to(out.dtype))
    return out


def _hooked(*modules: nn.Module) -> bool:
    """Whether a call of one of the modules does more than its forward."""
    return any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
        for m in modules
    )


def _is_plain(t: Any) -> bool:
    """A tensor that is what it looks like: no DTensor, no quantized subclass."""
    return type(t) is nn.Parameter or type(t) is Tensor


def _is_dora(variant: Any) -> bool:
    return any(c.__name__ == "DoraLinearVariant" for c in type(variant).__mro__)


def _is_bnb(module: Any) -> bool:
    # by name: asking bitsandbytes for its class would import it for models that have nothing to do with it
    return any(c.__name__ == "Linear4bit" and c.__module__.startswith("bitsandbytes.") for c in type(module).__mro__)


def _bnb_weight(module: Any) -> NF4Weight | None:
    """A bitsandbytes weight, in memory shared with it; its tables were checked by `_why_not_base`."""
    state = getattr(module.weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    packed = module.weight.data.reshape(-1).view(torch.uint8)
    code = None if state.quant_type == "nf4" else state.code
    weight = NF4Weight(packed, state.absmax, tuple(state.shape), state.dtype, state.blocksize, code)
    if not state.nested:
        return weight
    return weight._replace(
        absmax_scale=state.state2.absmax, absmax_offset=state.offset, absmax_block_size=state.state2.blocksize
    )


def _bnb_compute(module: Any, x: Tensor) -> torch.dtype:
    """What bitsandbytes takes x to: the compute dtype it was made with, else that of x."""
    return (module.compute_dtype if module.compute_type_is_set else None) or x.dtype


# ---- adapters on NF4Linear ------------------------------------------------------------------------------------------


def register(config: Any, model: nn.Module | None = None) -> Any:
    """Make a ``LoraConfig`` able to put adapters on `NF4Linear` layers.

    Parameters
    ----------
    config : peft.LoraConfig
        LoRA, rsLoRA, DoRA, ``lora_bias``; ``init_lora_weights`` may be a bool, "gaussian", "eva" or "orthogonal", as
        the others decompose a dense weight. Changed in place.
    model : torch.nn.Module, optional
        Needed for ``target_modules="all-linear"``, which PEFT resolves to dense layers only: it becomes the names
        of the model's linear layers, dense and in 4 bits, without the output head.

    Returns
    -------
    peft.LoraConfig
        `config`.

    Raises
    ------
    ImportError
        If peft is not installed.
    TypeError
        If `config` is not a ``LoraConfig``.
    ValueError
        For "all-linear" without `model`.

    Notes
    -----
    PEFT wraps the layer types it knows and refuses others; ``LoraConfig._register_custom_module`` is its (experimental)
    way to add one. The mapping is not saved with the adapter, so loading needs it again:
    ``PeftModel.from_pretrained(model, path, config=register(LoraConfig.from_pretrained(path)))``. A second adapter on
    the same layers needs nothing (``load_adapter``, ``add_adapter``).

    The adapter layers always run on this library's kernels; no `accelerate` is needed. The adapters are float32.
    ``merge`` decodes, adds in float32 and quantizes once, whatever the number of adapters; unlike in PEFT's 4-bit
    layers, ``unmerge`` gives back exactly the weight there was, which is kept meanwhile.

    References
    ----------
    Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314.

    Examples
    --------
    >>> model = tlkernels.quantize_model(model)  # doctest: +SKIP
    >>> model = peft.get_peft_model(model, register(peft.LoraConfig(target_modules=["q_proj"])))  # doctest: +SKIP
    """
    peft = _peft()
    if not isinstance(config, peft.LoraConfig):
        raise TypeError(f"register: config is a {type(config).__name__}; expected a peft.LoraConfig")
    target = config.target_modules
    if isinstance(target, str) and target.lower() == "all-linear":
        if model is None:
            raise ValueError(
                'register: target_modules is "all-linear", which PEFT resolves to dense layers only; '
                "give register the model too, or name the layers"
            )
        config = peft.tuners.tuners_utils._maybe_include_all_linear_layers(config, model)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        four_bit = {n for n, m in model.named_modules() if isinstance(m, NF4Linear) and m is not head}
        config.target_modules = set(config.target_modules) | four_bit
    config._register_custom_module({NF4Linear: _nf4_lora_linear()})
    return config


def __getattr__(name: str) -> Any:
    # classes that extend PEFT's, which is imported only when they are asked for; pickle finds them here
    makers: dict[str, Callable[[], type]] = {"NF4LoraLinear": _nf4_lora_linear, "NF4DoraVariant": _nf4_dora_variant}
    if name in makers:
        return makers[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _nf4_dora_variant() -> type:
    peft = _peft()
    from peft.tuners.lora.variants import DoraLinearVariant

    class NF4DoraVariant(DoraLinearVariant):
        """DoRA whose norms come from the 4-bit weight, which is never made dense for them."""

        @staticmethod
        def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
            if not module.lora_magnitude_vector:
                module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
            magnitude = peft.tuners.lora.dora.DoraLinearLayer(fan_in_fan_out=False)
            magnitude.weight = nn.Parameter(_norm(module, adapter_name))
            module.lora_magnitude_vector[adapter_name] = magnitude

        @staticmethod
        def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
            """PEFT's formula, on top of what other adapters made of the base layer's output."""
            drop, base = module.lora_dropout[active_adapter], module.base_layer
            if isinstance(drop, nn.Identity) or not module.training:
                frozen = result if base.bias is None else result - base.bias
            else:
                x = drop(x)
                frozen = ops.nf4_linear(x, base.nf4_weight)
            gain = module.lora_magnitude_vector[active_adapter].weight / _norm(module, active_adapter)
            update = module.lora_B[active_adapter](module.lora_A[active_adapter](x)) * module.scaling[active_adapter]
            return result + (gain - 1) * frozen + gain * update

    def _norm(module: Any, name: str) -> Tensor:
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        if a.is_meta:  # PEFT's low_cpu_mem_usage: the checkpoint has it
            return a.new_empty(b.shape[0])
        return ops.dora_weight_norm(module.base_layer.nf4_weight, a, b, module.scaling[name])

    return _named(NF4DoraVariant)


@functools.cache
def _nf4_lora_linear() -> type:
    peft = _peft()
    dense_layer: Any = peft.tuners.lora.Linear

    class NF4LoraLinear(dense_layer):  # type: ignore[misc]
        """PEFT's LoRA layer on an `NF4Linear`."""

        _tlkernels = True

        def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
            super().__init__(base_layer, adapter_name, config, **kwargs)
            self.fan_in_fan_out = False  # whatever the configuration says of a model's Conv1D layers
            self._unmerged: tuple[NF4Weight, nn.Parameter | None] | None = None

        @property
        def lora_variants(self) -> dict[tuple[str, ...], Any]:
            return {(): None, ("use_dora",): _nf4_dora_variant()}

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.in_features, module.out_features

        def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
            init = config.init_lora_weights
            if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal"):
                raise ValueError(
                    f"NF4LoraLinear: init_lora_weights is {init!r}, which decomposes a dense weight; "
                    "expected True, False, 'gaussian', 'eva' or 'orthogonal'"
                )
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = _run(self, x, args, kwargs)
            return super().forward(x, *args, **kwargs) if out is None else out

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            names = peft.tuners.tuners_utils.check_adapters_to_merge(self, adapter_names)
            names = [name for name in names if name in self.lora_A]
            if not names:
                return
            base: NF4Linear = self.base_layer
            original, bias = self._unmerged or (base.nf4_weight, base.bias)
            dense: Tensor = ops.nf4_dequantize(original, dtype=torch.float32)
            shift = None if bias is None else bias.data.clone()
            # From the original on, so that it is quantized once and DoRA's norms are those of the forward. An adapter
            # that was deleted while merged is out of the sum from here on.
            names = [name for name in self.merged_adapters if name in self.lora_A] + names
            for name in names:
                dense, shift = self._add(name, original, dense, shift)
                if safe_merge and not bool(dense.isfinite().all() and (shift is None or shift.isfinite().all())):
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            quantized = ops.nf4_quantize(
                dense, block_size=original.block_size, code=original.code, double_quant=base.double_quant
            )
            self._unmerged = original, bias
            base._hold(quantized._replace(dtype=base.dtype))
            if bias is not None and shift is not None:
                base.bias = nn.Parameter(shift, requires_grad=bias.requires_grad)
            self.merged_adapters[:] = names

        def _add(
            self, name: str, original: NF4Weight, dense: Tensor, bias: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            """The sum with one adapter more."""
            a, b, scaling = self.lora_A[name].weight.detach(), self.lora_B[name].weight.detach(), self.scaling[name]
            ops.lora_merge_(dense, a, b, scaling)
            if name in self.lora_variant:
                norm = ops.dora_weight_norm(original, a, b, scaling)
                dense = dense * (self.lora_magnitude_vector[name].weight.detach() / norm)[:, None]
            extra = self.lora_B[name].bias
            if extra is not None:
                if bias is None:
                    raise RuntimeError(
                        "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias."
                    )
                bias = bias + (scaling * extra.detach()).to(bias.dtype)
            return dense, bias

        def unmerge(self) -> None:
            if self._unmerged is None:
                warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
                return
            weight, bias = self._unmerged
            base = self.base_layer
            device = base.packed.device  # the model may have moved meanwhile
            moved: dict[str, Any] = {k: t.to(device) for k, t in weight._asdict().items() if isinstance(t, Tensor)}
            base._hold(weight._replace(dtype=base.dtype, **moved))
            if bias is not None:
                bias.data = bias.data.to(device=device, dtype=base.bias.dtype)
                base.bias = bias
            self._unmerged = None
            self.merged_adapters.clear()

    return _named(NF4LoraLinear)


def _named(cls: type) -> type:
    """The class under the name by which `__getattr__` hands it out."""
    cls.__module__, cls.__qualname__ = __name__, cls.__name__
    return cls
