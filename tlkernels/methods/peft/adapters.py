r"""Adapters: small bottlenecks inside a frozen network, and their fusion by attention.

A bottleneck with the non-linearity :math:`\sigma`, down to r features and up again, on h:

.. math::
    A(h) = W_\mathrm{up} \, \sigma(W_\mathrm{down} h + b_\mathrm{down}) + b_\mathrm{up} ,

serial, after a layer f (Houlsby, Pfeiffer), or parallel to it (He):

.. math::
    y = f(x) + s \, A(f(x)), \qquad y = f(x) + s \, A(x) .

`bottleneck` computes :math:`y = h_0 + s A(h)` in one step. With :math:`z = W_\mathrm{down} h + b_\mathrm{down}`
(``[rows, r]``) and :math:`d\sigma = s \, dy \, W_\mathrm{up}`, :math:`dz = d\sigma \circ \sigma'(z)`:

.. math::
    \nabla W_\mathrm{up} = s \, dy^T \sigma(z), \quad \nabla b_\mathrm{up} = s \sum dy, \quad
    \nabla W_\mathrm{down} = dz^T h, \quad \nabla b_\mathrm{down} = \sum dz, \quad dh = dz \, W_\mathrm{down} .

Saved for the backward pass are h and z: :math:`\sigma(z)` is made again, and no other tensor with a value for every
feature is kept.

Neil Houlsby et al. *Parameter-Efficient Transfer Learning for NLP.* ICML 2019, arXiv:1902.00751. Jonas Pfeiffer et al.
*MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer.* EMNLP 2020, arXiv:2005.00052. Jonas Pfeiffer
et al. *AdapterFusion: Non-Destructive Task Composition for Transfer Learning.* EACL 2021, arXiv:2005.00247. Junxian He
et al. *Towards a Unified View of Parameter-Efficient Transfer Learning.* ICLR 2022, arXiv:2110.04366.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tlkernels.methods.peft._dense import TunedLayer, adapter_dtype, device_of, linear_features
from tlkernels.methods.peft._tuner import TunerConfig
from tlkernels.nn.nf4 import _autocast_dtype
from tlkernels.ops._common import no_autocast

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterFusion",
    "AdapterFusionConfig",
    "AdapterFusionLayer",
    "AdapterLayer",
    "adapters_of",
    "bottleneck",
]

_aten: Any = torch.ops.aten

# name -> the function, and the gradient of its input from that of its output and its input
_ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "relu": (torch.relu, lambda grad, z: _aten.threshold_backward(grad, z, 0)),
    "gelu": (nn.functional.gelu, lambda grad, z: _aten.gelu_backward(grad, z)),
    "gelu_tanh": (
        lambda z: nn.functional.gelu(z, approximate="tanh"),
        lambda grad, z: _aten.gelu_backward(grad, z, approximate="tanh"),
    ),
    "silu": (nn.functional.silu, lambda grad, z: _aten.silu_backward(grad, z)),
    "tanh": (torch.tanh, lambda grad, z: _aten.tanh_backward(grad, torch.tanh(z))),
    "identity": (lambda z: z, lambda grad, z: grad),
}
_INITS = ("zero", "small", "kaiming")


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, h0: Tensor | None, down: Tensor, b_down: Tensor | None, up: Tensor, b_up: Tensor | None,
        activation: str, scaling: float, serial: bool,
    ) -> Tensor:  # fmt: skip
        rows = h.reshape(-1, h.shape[-1])
        h0 = h if serial else h0  # one argument: torch.compile takes no tensor twice
        z = nn.functional.linear(rows, down, b_down)
        ctx.save_for_backward(rows, z, down, up)
        ctx.activation, ctx.scaling, ctx.serial, ctx.shape = activation, scaling, serial, h.shape
        ctx.has_bias = b_down is not None, b_up is not None
        s = _ACTIVATIONS[activation][0](z)
        if h0 is None:
            y = nn.functional.linear(s, up, b_up)
            y = y if scaling == 1.0 else y.mul_(scaling)
        else:
            y = torch.addmm(h0.reshape(rows.shape[0], -1), s, up.T, alpha=scaling)
            y = y if b_up is None else y.add_(b_up, alpha=scaling)
        return y.reshape(*h.shape[:-1], up.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, z, down, up = ctx.saved_tensors
        function, derivative = _ACTIVATIONS[ctx.activation]
        need = ctx.needs_input_grad
        dy = grad_output.reshape(-1, grad_output.shape[-1])
        # The scaling goes into the product with r columns: dy has a value for every feature.
        grad_up = (dy.T @ function(z)).mul_(ctx.scaling) if need[4] else None
        grad_b_up = dy.sum(0).mul_(ctx.scaling) if ctx.has_bias[1] and need[5] else None
        dz = derivative((dy @ up).mul_(ctx.scaling), z)
        dh = None
        if need[0]:
            dh = (torch.addmm(dy, dz, down) if ctx.serial else dz @ down).reshape(ctx.shape)
        return (
            dh,
            grad_output if need[1] else None,
            dz.T @ rows if need[2] else None,
            dz.sum(0) if ctx.has_bias[0] and need[3] else None,
            grad_up,
            grad_b_up,
            None,
            None,
            None,
        )


def bottleneck(
    h: Tensor, w_down: Tensor, b_down: Tensor | None, w_up: Tensor, b_up: Tensor | None, *,
    residual: Tensor | None = None, activation: str = "relu", scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    r"""Down, a non-linearity, up, scaled and added to a residual, with no intermediate kept but the smallest.

    .. math:: y = h_0 + s \, \big( W_\mathrm{up} \, \sigma(W_\mathrm{down} h + b_\mathrm{down}) + b_\mathrm{up} \big)

    Parameters
    ----------
    h : Tensor
        ``[..., in]``, floating point.
    w_down : Tensor
        ``[r, in]``. This and the others count with their values in h's dtype.
    b_down : Tensor or None
        ``[r]``.
    w_up : Tensor
        ``[out, r]``.
    b_up : Tensor or None
        ``[out]``.
    residual : Tensor, optional
        :math:`h_0`: ``[..., out]`` of h's dtype; h itself for a serial adapter. Nothing is added by default.
    activation : str
        ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"tanh"`` or ``"identity"``.
    scaling : float
        s.

    Returns
    -------
    Tensor
        ``[..., out]`` of h's dtype (under autocast, of its dtype).

    Raises
    ------
    TypeError
        If h is not floating point, or the residual has another dtype.
    ValueError
        If shapes do not fit, or the activation is unknown.

    Notes
    -----
    Saved for the backward pass: h, the r-sized pre-activation, and the two matrices. It cannot be differentiated
    twice; torch says so when it is tried.

    References
    ----------
    Houlsby et al., ICML 2019, arXiv:1902.00751.
    """
    op = "bottleneck"
    if not h.is_floating_point():
        raise TypeError(f"{op}: h has dtype {h.dtype}; expected a floating-point dtype")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; expected one of {', '.join(_ACTIVATIONS)}")
    features = h.shape[-1] if h.dim() else 0
    if w_down.dim() != 2 or w_down.shape[1] != features:
        raise ValueError(f"{op}: w_down has shape {tuple(w_down.shape)}; expected (r, {features})")
    rank = w_down.shape[0]
    if w_up.dim() != 2 or w_up.shape[1] != rank:
        raise ValueError(f"{op}: w_up has shape {tuple(w_up.shape)}; expected (out, {rank})")
    for name, bias, size in (("b_down", b_down, rank), ("b_up", b_up, w_up.shape[0])):
        if bias is not None and tuple(bias.shape) != (size,):
            raise ValueError(f"{op}: {name} has shape {tuple(bias.shape)}; expected ({size},)")
    if residual is not None and residual.shape != (*h.shape[:-1], w_up.shape[0]):
        want = (*h.shape[:-1], w_up.shape[0])
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}; expected {tuple(want)}")
    if residual is not None and residual.dtype != h.dtype:
        raise TypeError(f"{op}: residual has dtype {residual.dtype}; expected {h.dtype}, like h")
    dtype = _autocast_dtype(h) or h.dtype
    serial = residual is h
    given = (h, None if serial else residual, w_down, b_down, w_up, b_up)
    tensors = [None if t is None else t.to(dtype) for t in given]
    with no_autocast(h.device):
        return _Bottleneck.apply(*tensors, activation, scaling, serial)


class Adapter(nn.Module):
    r"""A bottleneck: :math:`A(h) = W_\mathrm{up} \sigma(W_\mathrm{down} h + b_\mathrm{down}) + b_\mathrm{up}`.

    Called with h it returns :math:`h_0 + s A(h)`.

    Parameters
    ----------
    in_features : int
        Of h.
    rank : int
        r, the size of the bottleneck, >= 1.
    out_features : int, optional
        Of A(h); as h by default.
    activation : str
        As for `bottleneck`.
    init : str
        ``"zero"``: the up-projection is zero, the down-projection Kaiming-uniform, so A(h) = 0 exactly at first.
        ``"small"``: both normal with standard deviation 0.01, cut at two of them, and biases zero, as in Houlsby's
        paper. ``"kaiming"``: both as `torch.nn.Linear`: no near-identity, for use with a learned scaling.
    scaling : float or "learned"
        s, or a trained number that is one at first.
    layer_norm : str
        ``"none"``; ``"before"``: of h, on the way into the bottleneck; ``"after"``: of the bottleneck's output.
    dropout : float
        Of the bottleneck's output, 0 <= dropout < 1.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    down, up : torch.nn.Linear
        Their weights ``[rank, in_features]`` and ``[out_features, rank]``.
    scale : torch.nn.Parameter or None
        Where the scaling is learned: a scalar.
    norm : torch.nn.LayerNorm or None

    Raises
    ------
    ValueError
        If an argument has another value than stated.

    References
    ----------
    Houlsby et al., ICML 2019, arXiv:1902.00751. He et al., ICLR 2022, arXiv:2110.04366 (scaling, parallel form).

    Examples
    --------
    >>> import torch
    >>> adapter, h = Adapter(64, 8), torch.randn(2, 3, 64)
    >>> torch.equal(adapter(h, residual=h), h)
    True
    """

    def __init__(
        self, in_features: int, rank: int, out_features: int | None = None, *, activation: str = "relu",
        init: str = "zero", scaling: float | str = 1.0, layer_norm: str = "none", dropout: float = 0.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_adapter("Adapter", rank, activation, init, scaling, layer_norm, dropout)
        out_features = in_features if out_features is None else out_features
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.activation, self.init, self.layer_norm, self.dropout = activation, init, layer_norm, dropout
        self.down = nn.Linear(in_features, rank, **where)
        self.up = nn.Linear(rank, out_features, **where)
        self.scaling = 1.0 if isinstance(scaling, str) else float(scaling)
        self.scale = nn.Parameter(torch.ones((), **where)) if isinstance(scaling, str) else None
        width = in_features if layer_norm == "before" else out_features
        self.norm = None if layer_norm == "none" else nn.LayerNorm(width, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as `init` says."""
        for layer in (self.down, self.up):
            if self.init == "small":
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
                nn.init.zeros_(layer.bias)
            elif self.init == "kaiming":
                layer.reset_parameters()
        if self.init == "zero":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            for t in (self.down.bias, self.up.weight, self.up.bias):
                nn.init.zeros_(t)
        if self.scale is not None:
            nn.init.ones_(self.scale)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``: :math:`s A(h)`, plus the residual where one is given."""
        h = input
        if self.norm is not None and self.layer_norm == "before":
            h = nn.functional.layer_norm(h.to(self.norm.weight.dtype), *self._norm_arguments()).to(input.dtype)
        weights = self.down.weight, self.down.bias, self.up.weight, self.up.bias
        # Together in one step where nothing comes in between
        if self.scale is None and self.layer_norm != "after" and not (self.training and self.dropout):
            return bottleneck(h, *weights, residual=residual, activation=self.activation, scaling=self.scaling)
        a = bottleneck(h, *weights, activation=self.activation)
        if self.norm is not None and self.layer_norm == "after":
            a = nn.functional.layer_norm(a.to(self.norm.weight.dtype), *self._norm_arguments()).to(a.dtype)
        a = nn.functional.dropout(a, self.dropout, self.training)
        a = a * (self.scaling if self.scale is None else self.scale.to(a.dtype))
        return a if residual is None else residual + a

    def _norm_arguments(self) -> tuple[Any, ...]:
        assert self.norm is not None
        return self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the adapter."""
        scaling = self.scaling if self.scale is None else "learned"
        return (
            f"activation={self.activation!r}, init={self.init!r}, scaling={scaling!r}, "
            f"layer_norm={self.layer_norm!r}, dropout={self.dropout}"
        )


def _check_adapter(
    owner: str, rank: int, activation: str, init: str, scaling: float | str, layer_norm: str, dropout: float
) -> None:
    if rank < 1:
        raise ValueError(f"{owner}: rank is {rank}; expected 1 or more")
    for name, value, known in (
        ("activation", activation, tuple(_ACTIVATIONS)),
        ("init", init, _INITS),
        ("layer_norm", layer_norm, ("none", "before", "after")),
    ):
        if value not in known:
            raise ValueError(f"{owner}: {name} is {value!r}; expected one of {', '.join(known)}")
    if isinstance(scaling, str) and scaling != "learned":
        raise ValueError(f"{owner}: scaling is {scaling!r}; expected a number, or 'learned'")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{owner}: dropout is {dropout}; expected 0 <= dropout < 1")


class _AdapterModule(TunedLayer):
    """What cannot be merged, as there is a non-linearity in it."""

    def check_merge(self) -> None:
        raise NotImplementedError(
            f"{type(self).__name__}: an adapter with a non-linearity is no change of weights, and cannot be merged"
        )

    def merge(self) -> None:
        self.check_merge()


def _first(output: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
    """The hidden states of a module's output: itself, or the first of a tuple."""
    if isinstance(output, tuple):
        return output[0], output[1:]
    return output, None


class AdapterLayer(_AdapterModule):
    r"""A frozen layer with an adapter behind it, :math:`y = f(x) + s A(f(x))`, or beside it, :math:`f(x) + s A(x)`.

    Parameters
    ----------
    base_layer : torch.nn.Module
        Called as before; of a tuple that it returns the first tensor is adapted. Its first argument is x.
    adapter : Adapter
        With f(x)'s features in and out; beside the layer, with x's features in.
    parallel : bool
        Beside the layer instead of behind it.

    Raises
    ------
    ValueError
        If the sizes of a linear layer and of its adapter do not fit.

    References
    ----------
    Houlsby et al., ICML 2019, arXiv:1902.00751. He et al., ICLR 2022, arXiv:2110.04366.
    """

    def __init__(self, base_layer: nn.Module, adapter: Adapter, *, parallel: bool = False) -> None:
        super().__init__(base_layer)
        try:
            sizes = linear_features("AdapterLayer", base_layer)
        except TypeError:
            sizes = None  # another module: its sizes show when it is called
        want = None if sizes is None else (sizes[0] if parallel else sizes[1], sizes[1])
        if want is not None and (adapter.in_features, adapter.out_features) != want:
            raise ValueError(
                f"AdapterLayer: adapter goes from {adapter.in_features} to {adapter.out_features} features; expected "
                f"{want[0]} to {want[1]}"
            )
        self.adapter, self.parallel = adapter.train(base_layer.training), parallel

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer and adapt its output."""
        hidden, rest = _first(self.base_layer(*args, **kwargs))
        adapted = self.adapter(args[0] if self.parallel else hidden, residual=hidden)
        return adapted if rest is None else (adapted, *rest)

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the layer."""
        return f"parallel={self.parallel}"


# Sub-layers of transformers' models: after attention, after feed-forward, the feed-forward block as one module
_ATTENTION = (
    r"attention\.output\.dense|attn\.c_proj|(?:self_attn|attn|attention)\.(?:o_proj|out_proj|out_lin)"
    r"|(?:self_)?attention\.dense"
)
_FEEDFORWARD = r"(?<!attention\.)output\.dense|mlp\.(?:c_proj|down_proj|fc_out|dense_4h_to_h)|fc2|ffn\.lin2"
_BLOCK = r"mlp|ffn"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(TunerConfig):
    r"""Where adapters go, and how they are built. `houlsby`, `pfeiffer` and `parallel_to_feedforward` are ready-made.

    Attributes
    ----------
    target_modules : str or sequence of str
        As for `TunerConfig`: the layers behind or beside which an adapter stands. By a suffix, ``"output.dense"`` is
        also ``"attention.output.dense"``; a regular expression tells them apart.
    reduction_factor : float
        r is the layer's ``out_features`` divided by it, rounded down, at least 1.
    rank : int or None
        r itself, instead.
    parallel : bool
        Beside the layer.
    features : int or None
        The width of the hidden states, for target modules that are no linear layers.
    activation, init, scaling, layer_norm, dropout
        As for `Adapter`.

    Notes
    -----
    Houlsby's adapters stand behind the two projections that a transformer block ends its halves with, before the
    residual connection around the half: with ``target_modules`` naming those projections that is what is built. Where
    the model applies dropout to the projection, the adapter comes first here, and after it in the paper's code; they
    are the same without dropout.

    Pfeiffer's variant keeps the second of them only. MAD-X also feeds it the layer norm's output instead of the
    projection's, and AdapterHub follows that; here its input is the projection's, with ``layer_norm="before"`` for a
    norm of its own.

    References
    ----------
    Houlsby et al., ICML 2019, arXiv:1902.00751. Pfeiffer et al., EMNLP 2020, arXiv:2005.00052. He et al., ICLR 2022,
    arXiv:2110.04366.

    Examples
    --------
    >>> AdapterConfig.pfeiffer(reduction_factor=8).parallel
    False
    """

    reduction_factor: float = 16.0
    rank: int | None = None
    parallel: bool = False
    features: int | None = None
    activation: str = "relu"
    init: str = "zero"
    scaling: float | str = 1.0
    layer_norm: str = "none"
    dropout: float = 0.0

    @classmethod
    def houlsby(cls, **fields: Any) -> AdapterConfig:
        """After attention and after feed-forward, in transformers' models.

        By the names that BERT, DistilBERT, ViT, CLIP, GPT-2, GPT-J, GPT-NeoX, BLOOM, OPT, Llama and their like have.
        """
        return cls(**{"target_modules": rf"(?:.*\.)?(?:{_ATTENTION}|{_FEEDFORWARD})", "activation": "gelu", **fields})

    @classmethod
    def pfeiffer(cls, **fields: Any) -> AdapterConfig:
        """After feed-forward only."""
        return cls(**{"target_modules": rf"(?:.*\.)?(?:{_FEEDFORWARD})", **fields})

    @classmethod
    def parallel_to_feedforward(cls, features: int, **fields: Any) -> AdapterConfig:
        """Beside the feed-forward block of models that have it as one module (GPT-2, Llama), with He's scaling of 4.

        `features` is the width of the hidden states.
        """
        target = rf"(?:.*\.)?(?:{_BLOCK})"
        given = {"target_modules": target, "parallel": True, "features": features, "scaling": 4.0, **fields}
        return cls(**given)

    def check(self) -> None:
        """Raise if a field has a value that it cannot have."""
        super().check()
        rank = 1 if self.rank is None else self.rank
        _check_adapter("AdapterConfig", rank, self.activation, self.init, self.scaling, self.layer_norm, self.dropout)
        if not self.reduction_factor > 0:
            self._fail("reduction_factor", "more than 0")
        if self.features is not None and self.features < 1:
            self._fail("features", "1 or more")

    def wrap(self, name: str, module: nn.Module) -> AdapterLayer:
        """Build the `AdapterLayer` for a module.

        Raises
        ------
        TypeError
            If it is no linear layer and `features` is None.
        """
        try:
            sizes = linear_features(f"AdapterConfig: {name}", module)
        except TypeError as error:
            if self.features is None:
                raise TypeError(f"{error}, or features, the width of its input and output") from error
            sizes = self.features, self.features
        rank = max(1, int(sizes[1] / self.reduction_factor)) if self.rank is None else self.rank
        adapter = Adapter(
            sizes[0] if self.parallel else sizes[1], rank, sizes[1], activation=self.activation, init=self.init,
            scaling=self.scaling, layer_norm=self.layer_norm, dropout=self.dropout,
            device=device_of(module), dtype=adapter_dtype(module),
        )  # fmt: skip
        return AdapterLayer(module, adapter, parallel=self.parallel)


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """Return copies of a model's serial adapters, by the name of the layer behind which each stands.

    Parameters
    ----------
    model : torch.nn.Module
        With adapters applied.

    Returns
    -------
    dict of str to Adapter
        What `AdapterFusionConfig` takes, once for each task.

    Raises
    ------
    ValueError
        If there are none.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AdapterLayer) and not m.parallel}
    if not layers:
        raise ValueError("adapters_of: model has no serial adapters; expected a model with an AdapterConfig applied")
    return {name: copy.deepcopy(layer.adapter) for name, layer in layers.items()}


class AdapterFusion(nn.Module):
    r"""Attention over the outputs of several adapters.

    .. math::
        \alpha = \mathrm{softmax}_n \big( (W_q h + b_q)^T W_k z_n \big), \qquad
        o = \sum_n \alpha_n W_v z_n .

    Parameters
    ----------
    features : int
        Of h and of every :math:`z_n`.
    dropout : float
        Of the attention weights.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    query : torch.nn.Linear
        ``[features, features]`` with a bias, drawn as `torch.nn.Linear` draws it.
    key : torch.nn.Linear
        As `query`, without bias: it would add the same to the scores of all n.
    value : torch.nn.Linear
        Without bias, the identity at first.

    Raises
    ------
    ValueError
        If `dropout` is out of range.

    References
    ----------
    Pfeiffer et al., AdapterFusion, EACL 2021, arXiv:2005.00247.
    """

    def __init__(
        self, features: int, *, dropout: float = 0.0, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"AdapterFusion: dropout is {dropout}; expected 0 <= dropout < 1")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dropout = dropout
        self.query = nn.Linear(features, features, **where)
        self.key = nn.Linear(features, features, bias=False, **where)
        self.value = nn.Linear(features, features, bias=False, **where)
        nn.init.eye_(self.value.weight)

    def weights(self, hidden: Tensor, outputs: Tensor) -> Tensor:
        r"""The attention :math:`\alpha`, ``[..., n]``, of h ``[..., features]`` to the outputs ``[..., n, features]``.

        Since :math:`q^T W_k z = (W_k^T q)^T z`, the keys are never formed.
        """
        q = self.query(hidden) @ self.key.weight
        return torch.softmax((outputs @ q.unsqueeze(-1)).squeeze(-1), dim=-1)

    def forward(self, hidden: Tensor, outputs: Tensor) -> Tensor:
        """h ``[..., features]`` and the adapters' outputs ``[..., n, features]`` -> ``[..., features]``."""
        weights = nn.functional.dropout(self.weights(hidden, outputs), self.dropout, self.training)
        # The values' projection is linear: once, after the sum, instead of for every n
        return self.value((weights.unsqueeze(-2) @ outputs).squeeze(-2))

    def value_penalty(self) -> Tensor:
        r"""The regulariser of the value matrix, :math:`\| I - W_v \|_F^2`, a scalar."""
        eye = torch.eye(self.value.in_features, dtype=self.value.weight.dtype, device=self.value.weight.device)
        return (eye - self.value.weight).square().sum()


class AdapterFusionLayer(_AdapterModule):
    r"""A frozen layer with several frozen adapters behind it, and a trained fusion of their outputs.

    .. math:: h = f(x), \qquad z_n = h + s_n A_n(h), \qquad y = o(h, z_1, \dots, z_N) .

    Parameters
    ----------
    base_layer : torch.nn.Module
    adapters : sequence of Adapter
        At least one; frozen here.
    fusion : AdapterFusion

    Raises
    ------
    ValueError
        If there are no adapters, or one has another number of features than the fusion.
    """

    def __init__(self, base_layer: nn.Module, adapters: Sequence[Adapter], fusion: AdapterFusion) -> None:
        super().__init__(base_layer)
        if not adapters:
            raise ValueError("AdapterFusionLayer: adapters is empty; expected at least one")
        features = fusion.query.in_features
        for i, adapter in enumerate(adapters):
            if (adapter.in_features, adapter.out_features) != (features, features):
                raise ValueError(
                    f"AdapterFusionLayer: adapter {i} goes from {adapter.in_features} to {adapter.out_features} "
                    f"features; expected {features}, like fusion"
                )
        self.fusion = fusion.train(base_layer.training)
        self.adapters = nn.ModuleList(adapters).requires_grad_(False).train(base_layer.training)

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained: the fusion alone."""
        for name, parameter in self.fusion.named_parameters():
            yield f"fusion.{name}", parameter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer, its adapters, and fuse what they make of its output."""
        hidden, rest = _first(self.base_layer(*args, **kwargs))
        outputs = torch.stack([adapter(hidden, residual=hidden) for adapter in self.adapters], dim=-2)
        dtype = self.fusion.query.weight.dtype
        fused = self.fusion(hidden.to(dtype), outputs.to(dtype)).to(hidden.dtype)
        return fused if rest is None else (fused, *rest)


@dataclass(frozen=True, kw_only=True)
class AdapterFusionConfig(TunerConfig):
    """Fuse adapters that were trained on several tasks; only the fusion is trained.

    Attributes
    ----------
    target_modules : str or sequence of str
        As for `TunerConfig`; layers behind which every task has an adapter.
    adapters : sequence of mapping of str to Adapter
        For each task what `adapters_of` returned for its model. They are copied.
    dropout : float
        Of the attention weights.

    References
    ----------
    Pfeiffer et al., AdapterFusion, EACL 2021, arXiv:2005.00247.
    """

    adapters: Sequence[Mapping[str, Adapter]] = ()
    dropout: float = 0.0

    def check(self) -> None:
        """Raise if a field has a value that it cannot have."""
        super().check()
        if not self.adapters:
            raise ValueError("AdapterFusionConfig: adapters is empty; expected the adapters of one task or more")
        if not 0.0 <= self.dropout < 1.0:
            self._fail("dropout", "0 <= dropout < 1")

    def wrap(self, name: str, module: nn.Module) -> AdapterFusionLayer:
        """Build the `AdapterFusionLayer` for a module.

        Raises
        ------
        ValueError
            If a task has no adapter behind it.
        """
        missing = [i for i, task in enumerate(self.adapters) if name not in task]
        if missing:
            raise ValueError(f"AdapterFusionConfig: adapters[{missing[0]}] has none for {name}; expected one")
        adapters = [copy.deepcopy(task[name]) for task in self.adapters]
        fusion = AdapterFusion(
            adapters[0].out_features, dropout=self.dropout, device=device_of(module), dtype=adapter_dtype(module)
        )
        return AdapterFusionLayer(module, adapters, fusion)
