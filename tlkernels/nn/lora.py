r"""Layers with a trainable update of low rank beside a frozen weight: LoRA and DoRA.

`LoRALinear`, `LoRAConv2d` and `LoRAEmbedding` compute :math:`(W + \gamma B A) x`, `DoRALinear` rescales the rows of
that matrix. :math:`W` stays in `base_layer`, frozen, dense or (linear layers and embeddings) in 4 bits;
`tlkernels.ops.lora` has the equations. Factors have the names and shapes of the PEFT library.

Edward Hu et al. *LoRA: Low-Rank Adaptation of Large Language Models.* ICLR 2022, arXiv:2106.09685.
Damjan Kalajdzievski. *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA.* 2023, arXiv:2312.03732.
Shih-Yang Liu et al. *DoRA: Weight-Decomposed Low-Rank Adaptation.* ICML 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tlkernels import ops
from tlkernels.nn.nf4 import NF4Embedding, NF4Linear, _NF4Module
from tlkernels.ops.nf4 import NF4Weight

__all__ = ["BaseWeight", "DoRALinear", "LoRAConv2d", "LoRAEmbedding", "LoRALinear", "TunerModule"]


class TunerModule(nn.Module):
    """A layer that took another's place: what all methods of parameter-efficient tuning put into a model.

    The layer that was there is `base_layer`, frozen. Parameters that are not below it are the adapter's.

    Attributes
    ----------
    base_layer : torch.nn.Module
    merged : bool
        Whether the update is in the base layer's weights; the forward pass then uses the base layer alone.
    """

    base_layer: nn.Module
    merged: bool = False

    def check_merge(self) -> None:
        """Raise if `merge` cannot be done. Called for every layer of a model before any of them is merged."""
        if type(self).merge is TunerModule.merge:
            self.merge()

    def merge(self) -> None:
        """Put the update into the base layer's weights. On an error nothing has changed."""
        raise NotImplementedError(f"{type(self).__name__}: its update cannot be merged into the base layer")

    def unmerge(self) -> None:
        """Take the update out of the base layer's weights again."""
        raise NotImplementedError(f"{type(self).__name__}: its update cannot be merged into the base layer")

    def restore(self) -> nn.Module:
        """Return the layer to put back when this one is removed; called when it is not merged."""
        return self.base_layer

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's own parameters, with their names in this module."""
        for name, parameter in self.named_parameters():
            if not name.startswith("base_layer."):
                yield name, parameter


class BaseWeight(Tensor):
    """What ``layer.weight`` is for an adapted layer: the frozen weight, without the update, sharing its memory.

    Its shape, dtype and device are those of the weight. Some code takes a layer's weight and does the product itself:
    torch's fused transformer layers step back at a subclass such as this one, and call the layer; others get an error
    instead of results without the adapter.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            # no TypeError, which torch turns into NotImplemented in x @ weight.t(), without the message
            raise RuntimeError(
                f"{func.__name__}: the weight of an adapted layer lacks the adapter's update; call the layer, or use "
                "layer.base_layer.weight"
            )
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        # the same weight in another form, as in x @ weight.t(); not what was only made like it, as in x.to(weight)
        return out.as_subclass(cls) if func in _FORMS and isinstance(args[0], cls) else out


_PRODUCTS = (
    nn.functional.linear, nn.functional.embedding, nn.functional.conv2d, torch.matmul, torch.mm, Tensor.matmul,
    Tensor.mm, Tensor.__matmul__, Tensor.__rmatmul__, torch.addmm,
)  # fmt: skip
_FORMS = (
    Tensor.t, torch.t, Tensor.transpose, torch.transpose, Tensor.T.__get__, Tensor.mT.__get__,  # type: ignore[attr-defined]
    Tensor.to, Tensor.float,
    Tensor.half, Tensor.bfloat16, Tensor.contiguous, Tensor.detach,
)  # fmt: skip


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D``, a linear layer with a weight ``[in_features, out_features]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


# ---- what the three kinds of layers share ---------------------------------------------------------------------------


class _LoRAModule(TunerModule):
    """Two factors beside a base layer: their sizes and initial values, and merging.

    A subclass says what the base layer may be, makes the factors, and gives them as matrices of the base weight's
    layout.
    """

    _FACTORS = ("lora_A", "lora_B")
    _LEAST = "min(in_features, out_features)"
    lora_bias: nn.Parameter | None
    _merged_a: Tensor | None
    _merged_b: Tensor | None
    _merged_bias: Tensor | None
    _initial_a: Tensor | None
    _initial_b: Tensor | None
    _before: NF4Weight | None = None
    merge_error: float | None = None

    def __init__(
        self, base_layer: nn.Module, rank: int, sizes: tuple[int, int], lora_alpha: float, dropout: float,
        use_rslora: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        name = type(self).__name__
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(sizes):
            raise ValueError(f"{name}: rank is {rank}; expected 1 to {self._LEAST} = {min(sizes)}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{name}: dropout is {dropout}; expected 0 <= dropout < 1")
        if not math.isfinite(lora_alpha):
            raise ValueError(f"{name}: lora_alpha is {lora_alpha}; expected a finite number")
        self.base_layer = base_layer.requires_grad_(False)
        self.rank, self.lora_alpha, self.dropout, self.use_rslora = rank, lora_alpha, float(dropout), use_rslora
        self.scaling = lora_alpha / (math.sqrt(rank) if use_rslora else rank)
        for buffer in ("_merged_a", "_merged_b", "_merged_bias", "_initial_a", "_initial_b"):
            self.register_buffer(buffer, None, persistent=False)
        self.register_parameter("lora_bias", None)
        self.train(base_layer.training)

    def _add_factors(self, shape_a: tuple[int, ...], shape_b: tuple[int, ...], dtype: torch.dtype | None) -> None:
        like = _weight_like(self.base_layer)
        if dtype is None:  # 16 bits are too few to sum small updates in
            dtype = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
        if not dtype.is_floating_point:
            raise TypeError(f"{type(self).__name__}: dtype is {dtype}; expected a floating-point dtype")
        for name, shape in zip(self._FACTORS, (shape_a, shape_b), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=like.device)))

    def _add_bias(self, lora_bias: bool, out_features: int) -> None:
        if lora_bias:
            a = self.factors[0]
            self.lora_bias = nn.Parameter(torch.zeros(out_features, dtype=a.dtype, device=a.device))

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The two factors, A and B, in their own layout."""
        a, b = (self._parameters[name] for name in self._FACTORS)
        assert a is not None and b is not None
        return a, b

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, without the update unless merged. Not for products; see `BaseWeight`."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        plain = type(weight) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
        return weight.detach().as_subclass(BaseWeight) if plain and not self.merged else weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)

    def reset_parameters(self, init_lora_weights: bool | str = True) -> None:
        r"""Draw the factors anew.

        Parameters
        ----------
        init_lora_weights : bool or str
            True: :math:`A` uniform within :math:`\pm 1/\sqrt{\mathrm{fan\_in}}`, :math:`B = 0`; ``"gaussian"``:
            :math:`A` normal with standard deviation ``1 / rank``, :math:`B = 0`; False: both as
            `torch.nn.Linear` draws its weight, so that the layer starts with an update.
        """
        a, b = self.factors
        self._check_init(init_lora_weights)
        with torch.no_grad():
            if init_lora_weights == "gaussian":
                nn.init.normal_(a, std=1 / self.rank)
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            if init_lora_weights is False:
                nn.init.kaiming_uniform_(b, a=math.sqrt(5))
            else:
                nn.init.zeros_(b)
            if self.lora_bias is not None:
                nn.init.zeros_(self.lora_bias)

    def _check_init(self, init_lora_weights: bool | str) -> None:
        if init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"{type(self).__name__}: init_lora_weights is {init_lora_weights!r}; expected True, False or "
                "'gaussian'; tlkernels.methods.peft.init has more"
            )

    def start_from(self, base_layer: nn.Module, lora_a: Tensor, lora_b: Tensor, *, part_of_base: bool) -> None:
        r"""Take factors that were computed from the base weight, and the base layer that goes with them.

        Parameters
        ----------
        base_layer : torch.nn.Module
            Of the same sizes, e.g. with what :math:`\gamma B A` leaves of the weight. It is frozen.
        lora_a, lora_b : Tensor
            Of the factors' shapes; copied.
        part_of_base : bool
            Whether :math:`\gamma B A` was taken out of the weight: `restore` then puts it back.
        """
        a, b = self.factors
        for name, new, old in (("lora_a", lora_a, a), ("lora_b", lora_b, b)):
            if new.shape != old.shape:
                raise ValueError(
                    f"{type(self).__name__}: {name} has shape {tuple(new.shape)}; expected {tuple(old.shape)}"
                )
        with torch.no_grad():
            a.copy_(lora_a)
            b.copy_(lora_b)
            self.base_layer = base_layer.requires_grad_(False)
            self._initial_a, self._initial_b = (a.clone(), b.clone()) if part_of_base else (None, None)

    def restore(self) -> nn.Module:
        """Return the base layer, with what the initialization took out of its weight added again (to rounding)."""
        if self._initial_a is not None and self._initial_b is not None:
            weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
            self._add(weight, *self._as_matrices(self._initial_a, self._initial_b), self.scaling)
            self._initial_a = self._initial_b = None
        return self.base_layer

    # ---- merging: the base weight, seen as a matrix, plus scaling * b @ a

    def _as_matrices(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """(a [r, cols], b [rows, r]) such that b @ a has the base weight's layout."""
        raise NotImplementedError

    def check_merge(self) -> None:
        """Raise if the update cannot be merged: not finite, or with a bias that the base layer has no place for."""
        name = type(self).__name__
        for parameter, value in self.adapter_parameters():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name}: {parameter} has values that are not finite; it cannot be merged")
        if self.lora_bias is not None and self.bias is None:
            raise ValueError(f"{name}: the base layer has no bias that lora_bias could be merged into")

    def merge(self) -> None:
        """Add the update to the base layer's weight, which the forward pass then uses alone.

        A dense weight is changed in place, summed in float32 and rounded once. A 4-bit weight is decoded, summed and
        quantized again: `merge_error` has the root mean square of what that lost, relative to the weight's. Does
        nothing where it is merged already.

        Raises
        ------
        ValueError
            If the update is not finite, or the sum overflows float16; nothing has changed then.
        """
        if self.merged:
            return
        self.check_merge()
        base = self.base_layer
        a, b = self._as_matrices(*(factor.detach().clone() for factor in self.factors))
        with torch.no_grad():
            if isinstance(base, _NF4Module):
                before = base.nf4_weight
                merged, self.merge_error = self._merged_nf4(before, a, b)
                base._hold(merged)
                self._before = before
            else:
                self._merge_dense(base.weight, a, b)  # type: ignore[arg-type]
                self._merged_a, self._merged_b = a, b
            if self.lora_bias is not None:
                bias: Tensor = base.bias  # type: ignore[assignment]
                self._merged_bias = bias.detach().clone()
                bias.add_(self.lora_bias.to(bias.dtype), alpha=self.scaling)
        self.merged = True

    def unmerge(self) -> None:
        """Take out again what `merge` put in, also if the factors have changed since.

        A dense weight is what it was before up to rounding in its dtype; a 4-bit weight, which was kept, exactly. Does
        nothing where it is not merged.
        """
        if not self.merged:
            return
        base = self.base_layer
        with torch.no_grad():
            if isinstance(base, _NF4Module):
                assert self._before is not None
                base._hold(_nf4_to(self._before, base.packed.device)._replace(dtype=base.dtype))
                self._before = self.merge_error = None
            else:
                assert self._merged_a is not None and self._merged_b is not None
                self._unmerge_dense(base.weight, self._merged_a, self._merged_b)  # type: ignore[arg-type]
                self._merged_a = self._merged_b = None
            if self._merged_bias is not None:
                base.bias.copy_(self._merged_bias)  # type: ignore[operator]
                self._merged_bias = None
        self.merged = False

    def _merge_dense(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        self._add(weight, a, b, self.scaling)

    def _unmerge_dense(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        self._add(weight, a, b, -self.scaling)

    def _merged_nf4(self, weight: NF4Weight, a: Tensor, b: Tensor) -> tuple[NF4Weight, float]:
        return ops.lora_merge(weight, a, b, self.scaling)

    def _add(self, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
        """Weight += scaling * b @ a, in place."""
        with torch.no_grad():
            flat = weight.detach().reshape(weight.shape[0], -1)
            if weight.dtype == torch.float16 or not flat.is_contiguous():
                flat = flat.clone(memory_format=torch.contiguous_format)
            ops.lora_merge_(flat, a, b, scaling)
            if weight.dtype == torch.float16 and not bool(torch.isfinite(flat).all()):
                raise ValueError(
                    f"{type(self).__name__}: the sum of weight and update exceeds float16; it cannot be merged"
                )
            if flat.data_ptr() != weight.data_ptr():
                weight.copy_(flat.view(weight.shape))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        if self.merged:
            error_msgs.append(f"{prefix[:-1] or type(self).__name__}: the update is merged; unmerge before loading")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the layer."""
        scaling = "use_rslora=True, " if self.use_rslora else ""
        bias = ", lora_bias=True" if self.lora_bias is not None else ""
        state = ", merged=True" if self.merged else ""
        return f"rank={self.rank}, lora_alpha={self.lora_alpha}, {scaling}dropout={self.dropout}{bias}{state}"


def _weight_like(base_layer: nn.Module) -> Tensor:
    """A tensor with the dtype and on the device of the layer's weight."""
    if isinstance(base_layer, _NF4Module):
        return torch.empty(0, dtype=base_layer.dtype, device=base_layer.packed.device)
    return base_layer.weight  # type: ignore[return-value]


def _nf4_to(weight: NF4Weight, device: torch.device) -> NF4Weight:
    moved = {field: value.to(device) for field, value in weight._asdict().items() if isinstance(value, Tensor)}
    return weight._replace(**moved)  # type: ignore[arg-type]


def _check_base(name: str, base_layer: nn.Module, kinds: tuple[type[nn.Module], ...], want: str) -> None:
    """Of a class whose forward pass is known, with a weight of its own and a forward pass that was not replaced."""
    known = any(isinstance(base_layer, kind) and type(base_layer).forward is kind.forward for kind in kinds)
    if not known or isinstance(base_layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(f"{name}: base_layer is a {type(base_layer).__name__}; expected {want}")
    if "forward" in vars(base_layer):
        raise TypeError(f"{name}: base_layer has a forward that was replaced; expected that of its class")
    if not isinstance(base_layer, _NF4Module) and "weight" not in base_layer._parameters:
        raise TypeError(f"{name}: base_layer has a weight that is computed by a hook; expected a parameter")


def _dropout(x: Tensor, p: float) -> Tensor:
    """`x` with the elements dropped that `tlkernels.ops.lora_linear` would drop, and the rest scaled up."""
    rng = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=x.device)
    kept = ops.lora_dropout_mask(rng, x.numel() // max(x.shape[-1], 1), x.shape[-1], p)
    return torch.where(kept.view(x.shape), x * (1.0 / (1.0 - p)), 0.0)


# ---- linear layers --------------------------------------------------------------------------------------------------


class LoRALinear(_LoRAModule):
    r"""A frozen linear layer with a trainable update: :math:`y = W x + b + \gamma B A \, \mathrm{drop}(x)`.

    Parameters
    ----------
    base_layer : torch.nn.Linear or NF4Linear
        Kept as ``base_layer`` and frozen. transformers' ``Conv1D`` is taken too.
    rank : int
        :math:`r`, 1 to ``min(in_features, out_features)``.
    lora_alpha : float
        :math:`\gamma` is ``lora_alpha / rank``, or ``lora_alpha / sqrt(rank)`` with `use_rslora`.
    dropout : float
        Probability, in [0, 1), with which an element of the update's input is zeroed in training.
    use_rslora : bool
        The rank-stabilized scaling.
    lora_bias : bool
        Whether the update has a bias, scaled as the update is: :math:`b + \gamma b_B`.
    init_lora_weights : bool or str
        True (a Kaiming-uniform :math:`A` and :math:`B = 0`), ``"gaussian"`` or False; see `reset_parameters`.
    dtype : torch.dtype, optional
        Of the factors. By default float32 beside a weight of 16 or 4 bits, else the weight's.

    Attributes
    ----------
    lora_A : Parameter
        ``[rank, in_features]``.
    lora_B : Parameter
        ``[out_features, rank]``.
    lora_bias : Parameter or None
        ``[out_features]``.
    scaling : float
        :math:`\gamma`.
    weight : BaseWeight
        The frozen weight, for code that asks for its dtype, device or shape.
    merge_error : float or None
        While merged into a 4-bit weight: what quantizing the sum lost, relative root mean square.

    Raises
    ------
    TypeError, ValueError
        If `base_layer` is another kind of layer (also a subclass with a forward pass of its own, or with hooks, which
        would not run), or an argument is out of its range.

    Notes
    -----
    The output has the input's dtype (under ``torch.autocast``, its dtype); a dense weight must have the input's dtype,
    the factors may have another and count with the input's precision. See `tlkernels.ops.lora_linear`, which does the
    whole layer.

    While merged, the forward pass is that of the base layer, in training too: the factors then get no gradient. The
    mode (train or eval) does not merge or unmerge. A ``state_dict()`` taken while merged holds the merged weight *and*
    the factors; loading one while merged raises.

    References
    ----------
    Hu et al., LoRA, ICLR 2022, arXiv:2106.09685. Kalajdzievski, rsLoRA, 2023, arXiv:2312.03732. Dettmers et al.,
    QLoRA, NeurIPS 2023, arXiv:2305.14314.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.nn.lora import LoRALinear
    >>> layer = LoRALinear(torch.nn.Linear(64, 128), rank=4, lora_alpha=8)
    >>> layer(torch.randn(3, 64)).shape
    torch.Size([3, 128])
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self, base_layer: nn.Module, rank: int = 8, lora_alpha: float = 8.0, *, dropout: float = 0.0,
        use_rslora: bool = False, lora_bias: bool = False, init_lora_weights: bool | str = True,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self._check_linear(base_layer)
        fan_in_fan_out = not isinstance(base_layer, (nn.Linear, NF4Linear))
        in_features, out_features = _sizes(base_layer, fan_in_fan_out)
        super().__init__(base_layer, rank, (in_features, out_features), lora_alpha, dropout, use_rslora)
        self.in_features, self.out_features, self.fan_in_fan_out = in_features, out_features, fan_in_fan_out
        self._add_factors((rank, in_features), (out_features, rank), dtype)
        self._add_bias(lora_bias, out_features)
        self.reset_parameters(init_lora_weights)

    def _check_linear(self, base_layer: nn.Module) -> None:
        name, want = type(self).__name__, "a torch.nn.Linear or tlkernels.nn.NF4Linear"
        kinds = (type(base_layer),) if is_conv1d(base_layer) else (nn.Linear, NF4Linear)
        _check_base(name, base_layer, kinds, want)
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(base_layer, hook) for hook in hooks):
            raise ValueError(f"{name}: base_layer has hooks, which would not run; expected them on the adapted layer")

    def _base_weight(self) -> Tensor | NF4Weight:
        """The base weight as the ops take it, ``[out_features, in_features]``."""
        base = self.base_layer
        if isinstance(base, NF4Linear):
            return base.nf4_weight
        weight: Tensor = base.weight  # type: ignore[assignment]
        return weight.t() if self.fan_in_fan_out else weight

    def _whole_bias(self) -> Tensor | None:
        bias = self.bias
        if self.lora_bias is None:
            return bias
        update = self.scaling * self.lora_bias
        return update if bias is None else bias + update

    def _as_matrices(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        return (lora_b.t().contiguous(), lora_a.t().contiguous()) if self.fan_in_fan_out else (lora_a, lora_b)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``; see `tlkernels.ops.lora_linear`."""
        if self.merged:
            return self.base_layer(x)
        dropout = self.dropout if self.training else 0.0
        return ops.lora_linear(
            x, self._base_weight(), self._whole_bias(), self.lora_A, self.lora_B, self.scaling, dropout=dropout
        )


def _sizes(base_layer: Any, fan_in_fan_out: bool) -> tuple[int, int]:
    return tuple(base_layer.weight.shape) if fan_in_fan_out else (base_layer.in_features, base_layer.out_features)


class DoRALinear(LoRALinear):
    r"""A frozen linear layer whose rows get trainable magnitudes and an update of their directions.

    .. math::
        y = g \circ (W x + \gamma B A x) + b, \qquad g_i = \frac{m_i}{\lVert (W + \gamma B A)_i \rVert_2} .

    Parameters
    ----------
    base_layer : torch.nn.Linear or NF4Linear
        Kept as ``base_layer`` and frozen. transformers' ``Conv1D`` is taken too.
    rank, lora_alpha, dropout, use_rslora, init_lora_weights, dtype
        As for `LoRALinear`.

    Attributes
    ----------
    lora_A, lora_B, scaling, weight, merge_error
        As for `LoRALinear`.
    lora_magnitude_vector : Parameter
        ``[out_features]``, :math:`m`; at first the norms of the rows, so that the layer starts as its base layer.

    Raises
    ------
    TypeError, ValueError
        As `LoRALinear`.

    Notes
    -----
    The norm is a constant in the backward pass (section 4.3 of the paper), computed by
    `tlkernels.ops.dora_weight_norm` without forming :math:`B A`. A row of zeros, whose norm is 0, stays zero instead of
    becoming NaN.

    In training with dropout the output is, as in the PEFT library,

    .. math::
        y = W x + b + (g - 1) \circ W \, \mathrm{drop}(x) + g \circ \gamma B A \, \mathrm{drop}(x) ,

    with one mask for both terms. It costs a second product with :math:`W`.

    References
    ----------
    Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, arXiv:2402.09353.
    """

    lora_magnitude_vector: nn.Parameter
    _merged_factor: Tensor | None
    _merged_rows: Tensor | None

    def __init__(
        self, base_layer: nn.Module, rank: int = 8, lora_alpha: float = 8.0, *, dropout: float = 0.0,
        use_rslora: bool = False, init_lora_weights: bool | str = True, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            base_layer, rank, lora_alpha, dropout=dropout, use_rslora=use_rslora, init_lora_weights=init_lora_weights,
            dtype=dtype,
        )  # fmt: skip
        a = self.lora_A
        self.lora_magnitude_vector = nn.Parameter(torch.empty(self.out_features, dtype=a.dtype, device=a.device))
        self.register_buffer("_merged_factor", None, persistent=False)
        self.register_buffer("_merged_rows", None, persistent=False)
        self.reset_magnitude()

    def reset_magnitude(self) -> None:
        r"""Set the magnitudes to the norms of the rows of :math:`W + \\gamma B A`: the layer is then its base layer."""
        if not self.lora_A.is_meta:
            with torch.no_grad():
                self.lora_magnitude_vector.copy_(self._norm())

    def start_from(self, base_layer: nn.Module, lora_a: Tensor, lora_b: Tensor, *, part_of_base: bool) -> None:
        """As `LoRALinear`; the magnitudes become those of the sum."""
        super().start_from(base_layer, lora_a, lora_b, part_of_base=part_of_base)
        self.reset_magnitude()

    def _norm(self) -> Tensor:
        return ops.dora_weight_norm(self._base_weight(), self.lora_A, self.lora_B, self.scaling)

    def _factor(self) -> Tensor:
        """The factor g of each row, [out_features]. A norm of 0 counts as tiny: the row and its output are 0 then."""
        norm = self._norm()
        return self.lora_magnitude_vector.to(norm.dtype) / norm.clamp(min=torch.finfo(norm.dtype).tiny)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``, as the class says."""
        if self.merged:
            return self.base_layer(x)
        dropped = _dropout(x, self.dropout) if self.training and self.dropout > 0.0 else x
        y = ops.lora_linear(dropped, self._base_weight(), None, self.lora_A, self.lora_B, self.scaling)
        out = self._factor() * y
        if dropped is not x:  # W x + b - W drop(x), in one product
            out = out + self.base_layer(x - dropped)
        elif self.bias is not None:
            out = out + self.bias
        return out.to(y.dtype)

    def _merge_dense(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        factor = self._factor()
        dense = self._scaled(weight, a, b, factor)
        merged = dense.to(weight.dtype)
        if not bool(torch.isfinite(merged).all()):
            raise ValueError(f"{type(self).__name__}: the merged weight has values that are not finite")
        lost = (factor == 0).nonzero().view(-1)  # what is multiplied by 0 cannot be divided out again
        self._merged_rows = weight.detach().index_select(1 if self.fan_in_fan_out else 0, lost).clone()
        self._merged_factor = factor
        weight.copy_(merged)

    def _unmerge_dense(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        assert self._merged_factor is not None and self._merged_rows is not None
        factor = self._merged_factor
        dense = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        dense /= self._of_rows(torch.where(factor == 0, 1.0, factor))
        ops.lora_merge_(dense, a, b, -self.scaling)
        weight.copy_(dense)
        lost = (factor == 0).nonzero().view(-1)
        weight.index_copy_(1 if self.fan_in_fan_out else 0, lost, self._merged_rows.to(weight.dtype))
        self._merged_factor = self._merged_rows = None

    def _merged_nf4(self, weight: NF4Weight, a: Tensor, b: Tensor) -> tuple[NF4Weight, float]:
        dense = self._scaled(ops.nf4_dequantize(weight, dtype=torch.float32), a, b, self._factor())
        double_quant = weight.absmax.dtype == torch.uint8
        merged = ops.nf4_quantize(
            dense, block_size=weight.block_size, code=weight.code, double_quant=double_quant
        )._replace(dtype=weight.dtype)
        lost = (ops.nf4_dequantize(merged, dtype=torch.float32) - dense).norm()
        return merged, float(lost / dense.norm().clamp(min=torch.finfo(torch.float32).tiny))

    def _scaled(self, weight: Tensor, a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
        """The matrix g * (W + scaling B A), at least in float32."""
        dense = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        return ops.lora_merge_(dense, a, b, self.scaling).mul_(self._of_rows(factor.detach()))

    def _of_rows(self, factor: Tensor) -> Tensor:
        return factor[None, :] if self.fan_in_fan_out else factor[:, None]


# ---- convolutions and embeddings ------------------------------------------------------------------------------------


class LoRAConv2d(_LoRAModule):
    r"""A frozen convolution with a trainable update: one to `rank` channels, then one of size 1 x 1.

    .. math::
        y = W * x + b + \gamma \, B * (A * \mathrm{drop}(x)) .

    Parameters
    ----------
    base_layer : torch.nn.Conv2d
        Kept as ``base_layer`` and frozen.
    rank : int
        1 to ``min(in_channels * kernel height * kernel width, out_channels)``, and a multiple of the base layer's
        groups.
    lora_alpha, dropout, use_rslora, lora_bias, init_lora_weights, dtype
        As for `LoRALinear`; the elements to drop are drawn by `torch.nn.functional.dropout`.

    Attributes
    ----------
    lora_A : Parameter
        ``[rank, in_channels, *kernel_size]``; applied with the base layer's stride, padding, dilation and padding mode.
    lora_B : Parameter
        ``[out_channels, rank / groups, 1, 1]``; applied with the base layer's groups.
    scaling, lora_bias
        As for `LoRALinear`.

    Raises
    ------
    TypeError, ValueError
        If `base_layer` is another kind of layer, or an argument is out of its range.

    Notes
    -----
    With groups the first factor sees all channels, so the update is none that a grouped convolution could do, and
    cannot be merged. These are the PEFT library's shapes; that library ignores dilation and padding mode.

    References
    ----------
    Hu et al., LoRA, ICLR 2022, arXiv:2106.09685.
    """

    _LEAST = "min(in_channels * kernel size, out_channels)"
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    base_layer: nn.Conv2d

    def __init__(
        self, base_layer: nn.Conv2d, rank: int = 8, lora_alpha: float = 8.0, *, dropout: float = 0.0,
        use_rslora: bool = False, lora_bias: bool = False, init_lora_weights: bool | str = True,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        _check_base(type(self).__name__, base_layer, (nn.Conv2d,), "a torch.nn.Conv2d")
        in_channels, out_channels, groups = base_layer.in_channels, base_layer.out_channels, base_layer.groups
        cols = in_channels * math.prod(base_layer.kernel_size)
        super().__init__(base_layer, rank, (cols, out_channels), lora_alpha, dropout, use_rslora)
        if rank % groups:
            raise ValueError(f"LoRAConv2d: rank is {rank}; expected a multiple of the base layer's {groups} groups")
        self.in_channels, self.out_channels = in_channels, out_channels
        kernel = base_layer.kernel_size
        self._add_factors((rank, in_channels, *kernel), (out_channels, rank // groups, 1, 1), dtype)
        self._add_bias(lora_bias, out_channels)
        self.reset_parameters(init_lora_weights)

    def _as_matrices(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        return lora_a.flatten(1), lora_b.flatten(1)

    def check_merge(self) -> None:
        """Raise if the update cannot be merged: also where the base layer has groups."""
        super().check_merge()
        if self.base_layer.groups > 1:
            groups = self.base_layer.groups
            raise ValueError(f"LoRAConv2d: the base layer has {groups} groups; the update cannot be merged into it")

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, in_channels, height, width]`` -> ``[batch, out_channels, ...]``, as the class says."""
        base = self.base_layer
        y = base(x)
        if self.merged:
            return y
        if self.training and self.dropout > 0.0:
            x = nn.functional.dropout(x, self.dropout)
        padding = base.padding
        if base.padding_mode != "zeros":
            x = nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = (0, 0)
        s = nn.functional.conv2d(x, self.lora_A.to(x.dtype), None, base.stride, padding, base.dilation)
        bias = None if self.lora_bias is None else (self.scaling * self.lora_bias).to(s.dtype)
        return y + nn.functional.conv2d(self.scaling * s, self.lora_B.to(s.dtype), bias, groups=base.groups)


class LoRAEmbedding(_LoRAModule):
    r"""A frozen embedding with a trainable update of its rows: :math:`y_i = W_i + \gamma B A_{:,i}`.

    Parameters
    ----------
    base_layer : torch.nn.Embedding or NF4Embedding
        Kept as ``base_layer`` and frozen.
    rank : int
        1 to ``min(num_embeddings, embedding_dim)``.
    lora_alpha, use_rslora, dtype
        As for `LoRALinear`. There is no dropout: indices have no elements to drop.
    init_lora_weights : bool or str
        True or ``"gaussian"``: :math:`A = 0` and a standard normal :math:`B`; False: both standard normal.

    Attributes
    ----------
    lora_embedding_A : Parameter
        ``[rank, num_embeddings]``.
    lora_embedding_B : Parameter
        ``[embedding_dim, rank]``.
    scaling : float

    Raises
    ------
    TypeError, ValueError
        If `base_layer` is another kind of layer, an argument is out of its range, or the embedding has a ``max_norm``:
        it writes to its weight when called, and would renormalize merged rows.

    Notes
    -----
    The base layer's ``padding_idx`` and ``scale_grad_by_freq`` hold for the update too: the padding row gets no
    gradient, so its update stays 0. The gradient is dense also where the base layer's is sparse.

    References
    ----------
    Hu et al., LoRA, ICLR 2022, arXiv:2106.09685.
    """

    _FACTORS = ("lora_embedding_A", "lora_embedding_B")
    _LEAST = "min(num_embeddings, embedding_dim)"
    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter

    def __init__(
        self, base_layer: nn.Module, rank: int = 8, lora_alpha: float = 8.0, *, use_rslora: bool = False,
        init_lora_weights: bool | str = True, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        want = "a torch.nn.Embedding or tlkernels.nn.NF4Embedding"
        _check_base(type(self).__name__, base_layer, (nn.Embedding, NF4Embedding), want)
        max_norm = getattr(base_layer, "max_norm", None)
        if max_norm is not None:
            raise ValueError(
                f"LoRAEmbedding: base_layer has max_norm {max_norm}; expected None: it writes to the frozen weight"
            )
        num_embeddings, embedding_dim = base_layer.num_embeddings, base_layer.embedding_dim
        assert isinstance(num_embeddings, int) and isinstance(embedding_dim, int)
        super().__init__(base_layer, rank, (num_embeddings, embedding_dim), lora_alpha, 0.0, use_rslora)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx: int | None = base_layer.padding_idx  # type: ignore[assignment]
        self._add_factors((rank, num_embeddings), (embedding_dim, rank), dtype)
        self.reset_parameters(init_lora_weights)

    def reset_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Draw the factors anew, as the class says of `init_lora_weights`."""
        self._check_init(init_lora_weights)
        a, b = self.factors
        with torch.no_grad():
            nn.init.normal_(b)
            nn.init.normal_(a) if init_lora_weights is False else nn.init.zeros_(a)

    def _as_matrices(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        return lora_b.t().contiguous(), lora_a.t().contiguous()

    def forward(self, indices: Tensor) -> Tensor:
        """Indices ``[...]`` -> ``[..., embedding_dim]``, of the base layer's dtype."""
        y = self.base_layer(indices)
        if self.merged:
            return y
        by_freq = bool(getattr(self.base_layer, "scale_grad_by_freq", False))
        s = nn.functional.embedding(
            indices, self.lora_embedding_A.t(), padding_idx=self.padding_idx, scale_grad_by_freq=by_freq
        )
        return (y + (s @ self.lora_embedding_B.t()) * self.scaling).to(y.dtype)
