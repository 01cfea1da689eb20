r"""Fusion: how features of several modalities become one.

==========================  =========================================================================================
`EarlyFusion`               :math:`g([x_1, \dots, x_M])`
`LateFusion`                :math:`\sum_m w_m \ell_m`, of logits or of probabilities
`CrossAttention`            :math:`\mathrm{softmax}(Q_x K_y^T / \sqrt d) V_y`
`CoAttentionBlock`          both directions at once, each with its feed-forward network (ViLBERT)
`BottleneckFusion`          modalities see each other through a few shared tokens alone (MBT)
`GatedFusion`               :math:`\sum_m z_m \odot \tanh(W_m x_m)` (GMU)
`GatedCrossAttentionBlock`  :math:`x + \tanh(a) \, \mathrm{attention}(x, \mathrm{media})` (Flamingo)
`LLaVAConnector`            an MLP from image features to token embeddings
`TensorFusion`              :math:`W \, \mathrm{vec}([x_1; 1] \otimes \dots \otimes [x_M; 1])` (TFN)
`LowRankFusion`             the same with W of low rank, and without the tensor (LMF)
`ModalityDropout`           whole modalities left out in training
`OGMGE`                     gradients of the modality that runs ahead held back
==========================  =========================================================================================

Masks are those of `torch.nn.MultiheadAttention`: boolean, True for what is *not* seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "OGMGE",
    "BottleneckFusion",
    "CoAttentionBlock",
    "CrossAttention",
    "EarlyFusion",
    "GatedCrossAttentionBlock",
    "GatedFusion",
    "LLaVAConnector",
    "LateFusion",
    "LowRankFusion",
    "ModalityDropout",
    "TensorFusion",
    "insert_image_features",
    "media_attention_mask",
]

Activation = Callable[[Tensor], Tensor]


def _squared_relu(x: Tensor) -> Tensor:
    return functional.relu(x).square()


def _check_widths(op: str, in_features: Sequence[int], least: int = 1) -> tuple[int, ...]:
    widths = tuple(in_features)
    if len(widths) < least or any(width < 1 for width in widths):
        raise ValueError(f"{op}: in_features is {widths}; expected {least} or more sizes, each 1 or more")
    return widths


def _check_positive(op: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{op}: {name} is {value}; expected 1 or more")


def _check_number(op: str, name: str, tensors: object, count: int) -> None:
    """`count` tensors, one for each modality; one stacked tensor is none of that."""
    number = len(tensors) if isinstance(tensors, (list, tuple)) else None
    if number != count:
        got = f"a {type(tensors).__name__}" if number is None else f"{number} tensors"
        raise ValueError(f"{op}: {name} is {got}; expected a list of {count} tensors, one for each modality")


def _check_features(op: str, features: Sequence[Tensor], widths: Sequence[int]) -> None:
    """One tensor for each modality, ``[..., width]``, all with the same leading sizes."""
    _check_number(op, "features", features, len(widths))
    for m, (x, width) in enumerate(zip(features, widths, strict=True)):
        want = (*features[0].shape[:-1], width)
        if tuple(x.shape) != want:
            raise ValueError(f"{op}: features[{m}] has shape {tuple(x.shape)}; expected {want}")


# ---- vectors --------------------------------------------------------------------------------------------------------


class EarlyFusion(nn.Module):
    r"""Concatenate the modalities' features, and a network on top.

    Parameters
    ----------
    in_features : sequence of int
        The width of each modality.
    out_features : int
    hidden_features : sequence of int
        Widths of hidden layers with ReLU between; none makes it linear.
    dropout : float
        Probability in [0, 1), after each hidden layer.
    bias : bool

    Attributes
    ----------
    network : torch.nn.Sequential

    Raises
    ------
    ValueError
        If a size is not positive or `dropout` is out of range.

    Notes
    -----
    .. math:: y = g([x_1, \dots, x_M])

    References
    ----------
    Ngiam et al., Multimodal Deep Learning, ICML 2011. Baltrusaitis et al., Multimodal Machine Learning, TPAMI 2019,
    arXiv:1705.09406, section 6.
    """

    def __init__(
        self, in_features: Sequence[int], out_features: int, hidden_features: Sequence[int] = (), *,
        dropout: float = 0.0, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features = _check_widths("EarlyFusion", in_features)
        _check_positive("EarlyFusion", out_features=out_features)
        _check_probability("EarlyFusion", "dropout", dropout)
        for hidden in hidden_features:
            _check_positive("EarlyFusion", hidden_features=hidden)
        sizes = [sum(self.in_features), *hidden_features, out_features]
        layers: list[nn.Module] = []
        for size, following in itertools.pairwise(sizes):
            layers += [nn.Linear(size, following, bias=bias), nn.ReLU(), nn.Dropout(dropout)]
        self.network = nn.Sequential(*layers[:-2])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Fuse M tensors ``[..., in_features[m]]`` to ``[..., out_features]``."""
        _check_features("EarlyFusion", features, self.in_features)
        return self.network(torch.cat(list(features), dim=-1))


class LateFusion(nn.Module):
    r"""Average what the modalities' own classifiers say.

    Parameters
    ----------
    num_modalities : int
        M.
    weights : sequence of float, "learned" or None
        None: all alike. Numbers, at least 0 and not all 0: their ratios count. "learned": the softmax of a parameter
        that starts at 0.
    space : {"logits", "probabilities"}
        What is averaged.

    Attributes
    ----------
    weights : tuple of float
        The fixed weights, with the sum 1.
    weight_logits : torch.nn.Parameter or None
        ``[M]``, with "learned".

    Raises
    ------
    ValueError
        If an argument is not as stated.

    Notes
    -----
    .. math:: y = \sum_m w_m \ell_m \quad\text{or}\quad y = \log \sum_m w_m \operatorname{softmax}(\ell_m), \qquad
        \sum_m w_m = 1

    Both are logits; the second are log-probabilities. Where modalities of a sample are missing, the weights of the
    others are scaled to sum to 1.

    References
    ----------
    Kittler et al., On Combining Classifiers, TPAMI 1998. Baltrusaitis et al., TPAMI 2019, arXiv:1705.09406.
    """

    def __init__(
        self, num_modalities: int, *, weights: Sequence[float] | Literal["learned"] | None = None,
        space: Literal["logits", "probabilities"] = "logits",
    ) -> None:  # fmt: skip
        super().__init__()
        _check_positive("LateFusion", num_modalities=num_modalities)
        if space not in ("logits", "probabilities"):
            raise ValueError(f"LateFusion: space is {space!r}; expected 'logits' or 'probabilities'")
        self.num_modalities, self.space = num_modalities, space
        fixed = [1.0] * num_modalities
        if isinstance(weights, str):
            if weights != "learned":
                raise ValueError(f"LateFusion: weights is {weights!r}; expected numbers, 'learned' or None")
        elif weights is not None:
            fixed = [float(w) for w in weights]
            if len(fixed) != num_modalities or min(fixed) < 0 or not 0 < sum(fixed) < math.inf:
                raise ValueError(
                    f"LateFusion: weights is {fixed}; expected {num_modalities} numbers of at least 0, not all 0"
                )
        total = sum(fixed)
        # numbers, not a buffer: exact in whatever dtype the logits have
        self.weights = tuple(w / total for w in fixed)
        self.weight_logits = nn.Parameter(torch.zeros(num_modalities)) if weights == "learned" else None

    def forward(self, logits: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """Fuse M tensors ``[batch, classes]`` to one.

        Parameters
        ----------
        logits : sequence of Tensor
        present : bool Tensor, optional
            ``[batch, M]``, which modalities each sample has; at least one each. What stands in the logits of the
            others does not matter, NaN included.

        Raises
        ------
        ValueError
            If shapes do not fit, or a sample has no modality.
        """
        _check_number("LateFusion", "logits", logits, self.num_modalities)
        for m, x in enumerate(logits):
            if x.dim() != 2 or x.shape != logits[0].shape:
                want = f"{tuple(logits[0].shape)}, like the first" if m else "(batch, classes)"
                raise ValueError(f"LateFusion: logits[{m}] has shape {tuple(x.shape)}; expected {want}")
        stacked = torch.stack(list(logits), dim=1)
        if self.weight_logits is None:
            weights = stacked.new_tensor(self.weights)
        else:
            weights = self.weight_logits.softmax(0).to(stacked.dtype)
        weights = weights.expand(stacked.shape[:2])
        if present is not None:
            if present.dtype != torch.bool or present.shape != weights.shape:
                raise ValueError(
                    f"LateFusion: present has dtype {present.dtype} and shape {tuple(present.shape)}; "
                    f"expected torch.bool {tuple(weights.shape)}"
                )
            weights = weights.masked_fill(~present, 0.0)
            total = weights.sum(1, keepdim=True)
            if bool((total == 0).any()):
                row = int((total[:, 0] == 0).nonzero()[0])
                raise ValueError(f"LateFusion: sample {row} has no modality of a weight above 0; expected at least one")
            weights = weights / total
            stacked = stacked.masked_fill(~present[:, :, None], 0.0)
        if self.space == "logits":
            return (weights[:, :, None] * stacked).sum(1)
        # the logarithm of 0 would turn the gradient of learned weights into NaN
        absent = weights == 0
        log_weights = weights.masked_fill(absent, 1.0).log().masked_fill(absent, -torch.inf)
        return torch.logsumexp(log_weights[:, :, None] + stacked.log_softmax(-1), dim=1)


class GatedFusion(nn.Module):
    r"""The gated multimodal unit: how much of each modality passes is decided element by element, by all of them.

    Parameters
    ----------
    in_features : sequence of int
        The width of each of M >= 2 modalities.
    out_features : int
    bias : bool
        Biases of the hidden layers and the gates; the paper's equations have none.

    Attributes
    ----------
    hidden : torch.nn.ModuleList
        M linear layers.
    gates : torch.nn.ModuleList
        M linear layers from all features, or one for two modalities.

    Raises
    ------
    ValueError
        If a size is not positive.

    Notes
    -----
    .. math:: h_m = \tanh(W_m x_m), \qquad z_m = \sigma(Z_m [x_1, \dots, x_M]), \qquad y = \sum_m z_m \odot h_m

    For M = 2 there is one gate, and :math:`z_2 = 1 - z_1`.

    References
    ----------
    Arevalo et al., Gated Multimodal Units for Information Fusion, 2017, arXiv:1702.01992.
    """

    def __init__(self, in_features: Sequence[int], out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features = _check_widths("GatedFusion", in_features, least=2)
        _check_positive("GatedFusion", out_features=out_features)
        self.hidden = nn.ModuleList(nn.Linear(width, out_features, bias=bias) for width in self.in_features)
        gates = 1 if len(self.in_features) == 2 else len(self.in_features)
        self.gates = nn.ModuleList(nn.Linear(sum(self.in_features), out_features, bias=bias) for _ in range(gates))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Fuse M tensors ``[..., in_features[m]]`` to ``[..., out_features]``."""
        _check_features("GatedFusion", features, self.in_features)
        hidden = [torch.tanh(layer(x)) for layer, x in zip(self.hidden, features, strict=True)]
        together = torch.cat(list(features), dim=-1)
        gates = [torch.sigmoid(layer(together)) for layer in self.gates]
        if len(gates) == 1:
            return torch.lerp(hidden[1], hidden[0], gates[0])
        return torch.stack([z * h for z, h in zip(gates, hidden, strict=True)]).sum(0)


class TensorFusion(nn.Module):
    r"""Tensor fusion: a linear layer on all products of features of different modalities, of every order.

    Parameters
    ----------
    in_features : sequence of int
        The width :math:`d_m` of each modality.
    out_features : int
    bias : bool

    Attributes
    ----------
    linear : torch.nn.Linear
        From :math:`\prod_m (d_m + 1)` features, the last modality's index the fastest, and the 1 after the features.

    Raises
    ------
    ValueError
        If a size is not positive.

    Notes
    -----
    .. math:: y = W \operatorname{vec}\left( [x_1; 1] \otimes \dots \otimes [x_M; 1] \right) + b

    `LowRankFusion` has the same form without the product's size.

    References
    ----------
    Zadeh et al., Tensor Fusion Network for Multimodal Sentiment Analysis, EMNLP 2017, arXiv:1707.07250.
    """

    def __init__(self, in_features: Sequence[int], out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features = _check_widths("TensorFusion", in_features)
        _check_positive("TensorFusion", out_features=out_features)
        self.linear = nn.Linear(math.prod(width + 1 for width in self.in_features), out_features, bias=bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Fuse M tensors ``[..., in_features[m]]`` to ``[..., out_features]``."""
        _check_features("TensorFusion", features, self.in_features)
        tensor: Tensor | None = None
        for x in features:
            extended = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
            tensor = extended if tensor is None else (tensor[..., :, None] * extended[..., None, :]).flatten(-2)
        return self.linear(tensor)


class LowRankFusion(nn.Module):
    r"""Low-rank multimodal fusion: tensor fusion whose weight is a sum of r products of one factor a modality.

    Parameters
    ----------
    in_features : sequence of int
        The width :math:`d_m` of each modality.
    out_features : int
    rank : int
        r >= 1.
    bias : bool

    Attributes
    ----------
    factors : torch.nn.ParameterList
        M of them, ``[rank, in_features[m] + 1, out_features]``; the last row of the middle dimension belongs to the
        constant 1. They start normal, scaled so that unit inputs give outputs of variance 1.
    bias : torch.nn.Parameter or None

    Raises
    ------
    ValueError
        If a size is not positive.

    Notes
    -----
    .. math:: y = \sum_{i=1}^r \prod_m \left( {w_m^{(i)}}^T [x_m; 1] \right) + b

    with the product element by element: :math:`r \sum_m (d_m + 1)` weights for an output where `TensorFusion` has
    :math:`\prod_m (d_m + 1)`. `weight` is the matrix that `TensorFusion` would need for the same result.

    References
    ----------
    Liu et al., Efficient Low-rank Multimodal Fusion with Modality-Specific Factors, ACL 2018, arXiv:1806.00064.
    """

    def __init__(self, in_features: Sequence[int], out_features: int, rank: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features = _check_widths("LowRankFusion", in_features)
        _check_positive("LowRankFusion", out_features=out_features, rank=rank)
        count = len(self.in_features)
        self.factors = nn.ParameterList(
            torch.randn(rank, width + 1, out_features) * rank ** (-0.5 / count) * (width + 1) ** -0.5
            for width in self.in_features
        )
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Fuse M tensors ``[..., in_features[m]]`` to ``[..., out_features]``."""
        _check_features("LowRankFusion", features, self.in_features)
        product: Tensor | None = None
        for x, factor in zip(features, self.factors, strict=True):
            # [..., rank, out_features]; the constant's row is added, not multiplied with ones
            mapped = torch.einsum("...d,rdo->...ro", x, factor[:, :-1]) + factor[:, -1]
            product = mapped if product is None else product * mapped
        assert product is not None
        fused = product.sum(-2)
        return fused if self.bias is None else fused + self.bias

    def weight(self) -> Tensor:
        """The matrix that the factors stand for, ``[out_features, prod(in_features[m] + 1)]``; differentiable."""
        full: Tensor | None = None
        for factor in self.factors:
            full = factor if full is None else (full[:, :, None] * factor[:, None]).flatten(1, 2)
        assert full is not None
        return full.sum(0).T


# ---- sequences ------------------------------------------------------------------------------------------------------


def _check_probability(op: str, name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{op}: {name} is {value}; expected 0 <= {name} < 1")


class CrossAttention(nn.Module):
    r"""Multi-head attention from one modality to another, on `torch.nn.functional.scaled_dot_product_attention`.

    Parameters
    ----------
    features : int
        Width of the queries and of the result.
    num_heads : int
    context_features : int, optional
        Width of what is attended to; by default `features`.
    attention_features : int, optional
        Width of all heads together, a multiple of `num_heads`; by default `features`.
    dropout : float
        Probability, in [0, 1), of dropping an attention weight in training.
    bias : bool
        Biases of the four projections.

    Attributes
    ----------
    q_proj, k_proj, v_proj, out_proj : torch.nn.Linear

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    .. math:: y = W_o \, [h_1, \dots, h_H], \qquad
        h = \operatorname{softmax}\left( (W_q x)(W_k c)^T / \sqrt{d_h} \right) W_v c

    A query that may see nothing (all of its context is padding) gets 0, where `torch.nn.MultiheadAttention` has NaN.

    References
    ----------
    Vaswani et al., Attention Is All You Need, NeurIPS 2017, arXiv:1706.03762. Tan and Bansal, LXMERT, EMNLP 2019,
    arXiv:1908.07490 (between modalities).
    """

    def __init__(
        self, features: int, num_heads: int, *, context_features: int | None = None,
        attention_features: int | None = None, dropout: float = 0.0, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        context = features if context_features is None else context_features
        inner = features if attention_features is None else attention_features
        _check_positive(
            "CrossAttention", features=features, num_heads=num_heads, context_features=context,
            attention_features=inner,
        )  # fmt: skip
        _check_probability("CrossAttention", "dropout", dropout)
        if inner % num_heads:
            raise ValueError(f"CrossAttention: attention_features is {inner}; expected a multiple of {num_heads} heads")
        self.features, self.context_features, self.num_heads, self.dropout = features, context, num_heads, dropout
        self.q_proj = nn.Linear(features, inner, bias=bias)
        self.k_proj = nn.Linear(context, inner, bias=bias)
        self.v_proj = nn.Linear(context, inner, bias=bias)
        self.out_proj = nn.Linear(inner, features, bias=bias)

    def forward(
        self, x: Tensor, context: Tensor, key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Attend.

        Parameters
        ----------
        x : Tensor
            ``[batch, queries, features]``.
        context : Tensor
            ``[batch, keys, context_features]``.
        key_padding_mask : bool Tensor, optional
            ``[batch, keys]``, True for padding.
        attn_mask : bool Tensor, optional
            ``[queries, keys]`` or ``[batch, queries, keys]``, True for what a query may not see.

        Returns
        -------
        Tensor
            ``[batch, queries, features]``.

        Raises
        ------
        ValueError
            If shapes or the masks' dtypes do not fit.
        """
        op = "CrossAttention"
        for name, t, width in (("x", x, self.features), ("context", context, self.context_features)):
            if t.dim() != 3 or t.shape[2] != width or t.shape[0] != x.shape[0]:
                raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected ({x.shape[0]}, tokens, {width})")
        batch, queries, keys = x.shape[0], x.shape[1], context.shape[1]
        hidden = _hidden(op, batch, queries, keys, key_padding_mask, attn_mask)
        q, k, v = (
            t.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.q_proj(x), self.k_proj(context), self.v_proj(context))
        )
        blind = None
        if hidden is not None:
            # Queries that see nothing look at everything, and their result is put to 0: the softmax of nothing differs
            # between the kernels behind the call.
            blind = hidden.all(-1, keepdim=True)
            hidden = ~(hidden & ~blind)[:, None]
        attended = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=hidden, dropout_p=self.dropout if self.training else 0.0
        )
        out = self.out_proj(attended.transpose(1, 2).flatten(2))
        if keys == 0:
            return torch.zeros_like(out)
        return out if blind is None else out.masked_fill(blind, 0.0)


def _hidden(
    op: str, batch: int, queries: int, keys: int, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> Tensor | None:  # fmt: skip
    """Both masks in one, broadcastable to ``[batch, queries, keys]``."""
    hidden: Tensor | None = None
    if key_padding_mask is not None:
        _check_mask(op, "key_padding_mask", key_padding_mask, ((batch, keys),))
        hidden = key_padding_mask[:, None]
    if attn_mask is not None:
        _check_mask(op, "attn_mask", attn_mask, ((queries, keys), (batch, queries, keys)))
        mask = attn_mask if attn_mask.dim() == 3 else attn_mask[None]
        hidden = mask if hidden is None else hidden | mask
    return hidden


def _check_mask(op: str, name: str, mask: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
        want = " or ".join(map(str, shapes))
        raise ValueError(
            f"{op}: {name} has dtype {mask.dtype} and shape {tuple(mask.shape)}; expected torch.bool {want}"
        )


class _FeedForward(nn.Module):
    def __init__(self, features: int, hidden: int, activation: Activation, dropout: float, bias: bool = True) -> None:
        super().__init__()
        self.linear1 = nn.Linear(features, hidden, bias=bias)
        self.linear2 = nn.Linear(hidden, features, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class _CrossAttentionStream(nn.Module):
    """One side of a co-attention block: attention to the other side, and a feed-forward network, norms after each."""

    def __init__(
        self, features: int, other: int, inner: int, num_heads: int, hidden: int, dropout: float, eps: float
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention = CrossAttention(
            features, num_heads, context_features=other, attention_features=inner, dropout=dropout
        )
        self.norm1 = nn.LayerNorm(features, eps=eps)
        self.feed_forward = _FeedForward(features, hidden, functional.gelu, dropout)
        self.norm2 = nn.LayerNorm(features, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, other: Tensor, other_padding_mask: Tensor | None) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(x, other, other_padding_mask)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class CoAttentionBlock(nn.Module):
    r"""Co-attention: each of two modalities attends to the other, as it was before the block.

    Parameters
    ----------
    x_features, y_features : int
        Widths of the two streams.
    num_heads : int
    attention_features : int, optional
        Width of all heads together, in both streams; by default `x_features`.
    x_hidden_features, y_hidden_features : int, optional
        Hidden widths of the feed-forward networks (GELU); by default four times the stream's.
    dropout : float
        Probability, in [0, 1), for attention weights, hidden features, and each sublayer's result.
    eps : float
        Of the layer norms.

    Attributes
    ----------
    x_stream, y_stream : torch.nn.Module
        Each with ``attention`` (`CrossAttention`), ``norm1``, ``feed_forward`` and ``norm2``.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    .. math:: x' = \mathrm{LN}(x + \mathrm{attention}(x, y)), \quad x'' = \mathrm{LN}(x' + \mathrm{FFN}(x')), \quad
        y' = \mathrm{LN}(y + \mathrm{attention}(y, x)), \quad y'' = \mathrm{LN}(y' + \mathrm{FFN}(y'))

    This is ViLBERT's co-attentional transformer layer, which it follows by a transformer layer of each stream alone
    (`torch.nn.TransformerEncoderLayer`).

    References
    ----------
    Lu et al., ViLBERT, NeurIPS 2019, arXiv:1908.02265, section 2.2.
    """

    def __init__(
        self, x_features: int, y_features: int, num_heads: int, *, attention_features: int | None = None,
        x_hidden_features: int | None = None, y_hidden_features: int | None = None, dropout: float = 0.0,
        eps: float = 1e-12,
    ) -> None:  # fmt: skip
        super().__init__()
        inner = x_features if attention_features is None else attention_features
        x_hidden = 4 * x_features if x_hidden_features is None else x_hidden_features
        y_hidden = 4 * y_features if y_hidden_features is None else y_hidden_features
        _check_positive("CoAttentionBlock", x_hidden_features=x_hidden, y_hidden_features=y_hidden)
        self.x_stream = _CrossAttentionStream(x_features, y_features, inner, num_heads, x_hidden, dropout, eps)
        self.y_stream = _CrossAttentionStream(y_features, x_features, inner, num_heads, y_hidden, dropout, eps)

    def forward(
        self, x: Tensor, y: Tensor, x_padding_mask: Tensor | None = None, y_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Both streams after the block.

        Parameters
        ----------
        x : Tensor
            ``[batch, x_tokens, x_features]``.
        y : Tensor
            ``[batch, y_tokens, y_features]``.
        x_padding_mask, y_padding_mask : bool Tensor, optional
            ``[batch, tokens]``, True for padding.

        Returns
        -------
        tuple of Tensor
            With the shapes of x and y.

        Raises
        ------
        ValueError
            If shapes do not fit.
        """
        return self.x_stream(x, y, y_padding_mask), self.y_stream(y, x, x_padding_mask)


class BottleneckFusion(nn.Module):
    r"""Transformer layers of several modalities that exchange information through a few shared tokens alone.

    Parameters
    ----------
    features : int
        Width of the tokens of all modalities.
    num_heads : int
    num_layers : int
        Layers with fusion. MBT has layers of each modality alone before them: those are the encoders.
    num_modalities : int
        M >= 2.
    num_bottlenecks : int
        Shared tokens B, the paper's default 4. They start normal with standard deviation 0.02.
    hidden_features : int, optional
        Of the feed-forward networks (GELU), by default ``4 * features``.
    dropout : float
        As for `torch.nn.TransformerEncoderLayer`.
    update : {"mean", "sequential"}
        "mean": each modality updates the shared tokens of the layer before, and their mean goes on, as in the paper.
        "sequential": each modality takes what the one before it left.

    Attributes
    ----------
    layers : torch.nn.ModuleList
        ``layers[l][m]``: a `torch.nn.TransformerEncoderLayer`, norms first.
    bottlenecks : torch.nn.Parameter
        ``[num_bottlenecks, features]``.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    .. math:: [z_m^{l+1}, \hat b_m] = \mathrm{Transformer}_{l, m}([z_m^l, b^l]), \qquad
        b^{l+1} = \frac1M \sum_m \hat b_m

    Attention costs :math:`\sum_m (T_m + B)^2` pairs instead of :math:`(\sum_m T_m)^2`.

    References
    ----------
    Nagrani et al., Attention Bottlenecks for Multimodal Fusion, NeurIPS 2021, arXiv:2107.00135, equations 8 and 9.
    """

    def __init__(
        self, features: int, num_heads: int, num_layers: int, *, num_modalities: int = 2, num_bottlenecks: int = 4,
        hidden_features: int | None = None, dropout: float = 0.0, update: Literal["mean", "sequential"] = "mean",
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = 4 * features if hidden_features is None else hidden_features
        _check_positive(
            "BottleneckFusion", features=features, num_heads=num_heads, num_layers=num_layers,
            num_bottlenecks=num_bottlenecks, hidden_features=hidden,
        )  # fmt: skip
        if num_modalities < 2:
            raise ValueError(f"BottleneckFusion: num_modalities is {num_modalities}; expected 2 or more")
        if features % num_heads:
            raise ValueError(f"BottleneckFusion: features is {features}; expected a multiple of {num_heads} heads")
        if update not in ("mean", "sequential"):
            raise ValueError(f"BottleneckFusion: update is {update!r}; expected 'mean' or 'sequential'")
        _check_probability("BottleneckFusion", "dropout", dropout)
        self.features, self.num_modalities, self.update = features, num_modalities, update
        self.bottlenecks = nn.Parameter(torch.randn(num_bottlenecks, features) * 0.02)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                nn.TransformerEncoderLayer(
                    features, num_heads, hidden, dropout, functional.gelu, batch_first=True, norm_first=True
                )
                for _ in range(num_modalities)
            )
            for _ in range(num_layers)
        )

    def forward(
        self, tokens: Sequence[Tensor], key_padding_masks: Sequence[Tensor | None] | None = None
    ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
        """Run all layers.

        Parameters
        ----------
        tokens : sequence of Tensor
            M of them, ``[batch, tokens_m, features]``.
        key_padding_masks : sequence of bool Tensor or None, optional
            M of them, ``[batch, tokens_m]``, True for padding.

        Returns
        -------
        tuple of list of Tensor and Tensor
            The tokens of each modality, in the shapes they came in, and the shared ones,
            ``[batch, num_bottlenecks, features]``.

        Raises
        ------
        ValueError
            If shapes do not fit.
        """
        op, count, shared = "BottleneckFusion", self.num_modalities, self.bottlenecks.shape[0]
        _check_number(op, "tokens", tokens, count)
        masks: list[Tensor | None] = [None] * count if key_padding_masks is None else list(key_padding_masks)
        if len(masks) != count:
            raise ValueError(f"{op}: key_padding_masks has {len(masks)} entries; expected {count}")
        batch = tokens[0].shape[0]
        for m, (x, mask) in enumerate(zip(tokens, masks, strict=True)):
            if x.dim() != 3 or x.shape[0] != batch or x.shape[2] != self.features:
                want = f"({batch}, tokens, {self.features})"
                raise ValueError(f"{op}: tokens[{m}] has shape {tuple(x.shape)}; expected {want}")
            if mask is not None:
                _check_mask(op, f"key_padding_masks[{m}]", mask, (tuple(x.shape[:2]),))
                masks[m] = functional.pad(mask, (0, shared), value=False)
        streams = list(tokens)
        bottlenecks = self.bottlenecks.expand(batch, -1, -1)
        for layer in self.layers:
            updated, before = [], bottlenecks
            for m, block in enumerate(cast(nn.ModuleList, layer)):
                out = block(torch.cat([streams[m], before], dim=1), src_key_padding_mask=masks[m])
                streams[m], after = out.split([streams[m].shape[1], shared], dim=1)
                updated.append(after)
                before = after if self.update == "sequential" else before
            bottlenecks = before if self.update == "sequential" else torch.stack(updated).mean(0)
        return streams, bottlenecks


class GatedCrossAttentionBlock(nn.Module):
    r"""Flamingo's gated cross-attention: image features enter a frozen language model, by nothing at the start.

    Parameters
    ----------
    features : int
        Width of the text.
    num_heads : int
    media_features : int, optional
        Width of the image tokens; by default `features`.
    attention_features : int, optional
        Width of all heads together; by default `features`.
    hidden_features : int, optional
        Of the feed-forward network; by default ``4 * features``.
    activation : callable
        Of the feed-forward network; by default the squared ReLU, as in the paper.
    dropout : float
        Probability, in [0, 1), of dropping an attention weight.

    Attributes
    ----------
    attention : CrossAttention
        Without biases, like the feed-forward network.
    attention_norm, feed_forward_norm : torch.nn.LayerNorm
        Of the text. Media are taken as they are.
    attention_gate, feed_forward_gate : torch.nn.Parameter
        Scalars, 0 at the start.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    .. math:: x' = x + \tanh(a) \, \mathrm{attention}(\mathrm{LN}(x), \mathrm{media}), \qquad
        y = x' + \tanh(b) \, \mathrm{FFN}(\mathrm{LN}(x'))

    With both gates at 0 the block is the identity.

    References
    ----------
    Alayrac et al., Flamingo, NeurIPS 2022, arXiv:2204.14198, section 2.2 and figure 4.
    """

    def __init__(
        self, features: int, num_heads: int, *, media_features: int | None = None,
        attention_features: int | None = None, hidden_features: int | None = None,
        activation: Activation = _squared_relu, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = 4 * features if hidden_features is None else hidden_features
        _check_positive("GatedCrossAttentionBlock", features=features, hidden_features=hidden)
        self.attention_norm = nn.LayerNorm(features)
        self.attention = CrossAttention(
            features, num_heads, context_features=media_features, attention_features=attention_features,
            dropout=dropout, bias=False,
        )  # fmt: skip
        self.attention_gate = nn.Parameter(torch.zeros(()))
        self.feed_forward_norm = nn.LayerNorm(features)
        self.feed_forward = _FeedForward(features, hidden, activation, 0.0, bias=False)
        self.feed_forward_gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, media: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Text that has looked at the media.

        Parameters
        ----------
        x : Tensor
            ``[batch, text, features]``.
        media : Tensor
            ``[batch, media_tokens, media_features]``, the tokens of all images one after the other.
        attn_mask : bool Tensor, optional
            ``[text, media_tokens]`` or ``[batch, text, media_tokens]``, True for what is not seen; see
            `media_attention_mask`. Text that sees nothing gets nothing from the attention.

        Returns
        -------
        Tensor
            ``[batch, text, features]``.

        Raises
        ------
        ValueError
            If shapes do not fit.
        """
        attended = self.attention(self.attention_norm(x), media, attn_mask=attn_mask)
        x = x + self.attention_gate.tanh() * attended
        return x + self.feed_forward_gate.tanh() * self.feed_forward(self.feed_forward_norm(x))


def media_attention_mask(
    media_locations: Tensor, num_media: int, tokens_per_media: int, *, only_last: bool = True
) -> Tensor:  # fmt: skip
    """Which image tokens each text token may not see in Flamingo: all but those of the last image before it.

    Parameters
    ----------
    media_locations : bool Tensor
        ``[batch, text]``, True where the text has the tag of an image; the tag itself sees that image.
    num_media : int
        Images of each sample.
    tokens_per_media : int
        Tokens of each image.
    only_last : bool
        Otherwise all images before are seen.

    Returns
    -------
    bool Tensor
        ``[batch, text, num_media * tokens_per_media]``, True for what is not seen.

    Raises
    ------
    ValueError
        If `media_locations` is no boolean matrix, or a text has more tags than images.

    References
    ----------
    Alayrac et al., Flamingo, 2022, arXiv:2204.14198, section 2.3.
    """
    op = "media_attention_mask"
    if media_locations.dtype != torch.bool or media_locations.dim() != 2:
        got = f"dtype {media_locations.dtype} and shape {tuple(media_locations.shape)}"
        raise ValueError(f"{op}: media_locations has {got}; expected torch.bool (batch, text)")
    _check_positive(op, num_media=num_media, tokens_per_media=tokens_per_media)
    seen_so_far = media_locations.cumsum(1)
    if media_locations.numel() and int(seen_so_far.max()) > num_media:
        most = int(seen_so_far.max())
        raise ValueError(f"{op}: media_locations has {most} tags in a text; expected at most num_media, {num_media}")
    number = torch.arange(1, num_media + 1, device=media_locations.device).repeat_interleave(tokens_per_media)
    return (seen_so_far[:, :, None] != number) if only_last else (seen_so_far[:, :, None] < number)


class LLaVAConnector(nn.Module):
    r"""The network from image features to embeddings of a language model: linear layers with GELU between.

    Parameters
    ----------
    vision_features, text_features : int
        Widths of the image tokens and of the embeddings.
    depth : int
        Linear layers: 1 is the projection of LLaVA, 2 (the default) the MLP of LLaVA-1.5.
    drop_class_token : bool
        Leave the first image token out, the class token of a CLIP tower.
    bias : bool

    Attributes
    ----------
    network : torch.nn.Sequential
        Linear, GELU, Linear, ...; all but the first layer are ``text_features`` wide.

    Raises
    ------
    ValueError
        If a size is not positive.

    References
    ----------
    Liu et al., Visual Instruction Tuning, NeurIPS 2023, arXiv:2304.08485. Liu et al., Improved Baselines with Visual
    Instruction Tuning, CVPR 2024, arXiv:2310.03744.
    """

    def __init__(
        self, vision_features: int, text_features: int, depth: int = 2, *, drop_class_token: bool = False,
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_positive("LLaVAConnector", vision_features=vision_features, text_features=text_features, depth=depth)
        self.vision_features, self.drop_class_token = vision_features, drop_class_token
        layers: list[nn.Module] = [nn.Linear(vision_features, text_features, bias=bias)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(text_features, text_features, bias=bias)]
        self.network = nn.Sequential(*layers)

    def forward(self, image_features: Tensor) -> Tensor:
        """Map ``[images, tokens, vision_features]`` to ``[images, tokens or one less, text_features]``."""
        if image_features.dim() != 3 or image_features.shape[2] != self.vision_features:
            raise ValueError(
                f"LLaVAConnector: image_features has shape {tuple(image_features.shape)}; "
                f"expected (images, tokens, {self.vision_features})"
            )
        return self.network(image_features[:, 1:] if self.drop_class_token else image_features)


def insert_image_features(
    inputs_embeds: Tensor, input_ids: Tensor, image_features: Tensor, image_token_id: int
) -> Tensor:  # fmt: skip
    """Put image tokens into a text, in the places that hold the image token, in order.

    Parameters
    ----------
    inputs_embeds : Tensor
        ``[batch, length, features]``, the embeddings of the text.
    input_ids : Tensor
        ``[batch, length]``: `image_token_id` stands once for each image token.
    image_features : Tensor
        ``[..., features]``, from `LLaVAConnector`; all leading dimensions in the order of the text.
    image_token_id : int

    Returns
    -------
    Tensor
        ``[batch, length, features]`` of `inputs_embeds`' dtype; differentiable in both.

    Raises
    ------
    ValueError
        If shapes do not fit, or there are more or fewer places than image tokens.

    References
    ----------
    Liu et al., Visual Instruction Tuning, NeurIPS 2023, arXiv:2304.08485.
    """
    op = "insert_image_features"
    if inputs_embeds.dim() != 3 or input_ids.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"{op}: inputs_embeds has shape {tuple(inputs_embeds.shape)} and input_ids {tuple(input_ids.shape)}; "
            "expected (batch, length, features) and (batch, length)"
        )
    if image_features.shape[-1] != inputs_embeds.shape[2]:
        got, want = tuple(image_features.shape), inputs_embeds.shape[2]
        raise ValueError(f"{op}: image_features has shape {got}; expected (..., {want})")
    flat, places = image_features.reshape(-1, inputs_embeds.shape[2]), input_ids == image_token_id
    if int(places.sum()) != flat.shape[0]:
        raise ValueError(
            f"{op}: input_ids has the image token {int(places.sum())} times; "
            f"expected {flat.shape[0]} times, once for each of image_features"
        )
    return inputs_embeds.masked_scatter(places[:, :, None], flat.to(inputs_embeds.dtype))


# ---- balance in training --------------------------------------------------------------------------------------------


class ModalityDropout(nn.Module):
    r"""Leave out whole modalities of samples in training, so that none is relied on alone.

    Parameters
    ----------
    num_modalities : int
        M.
    p : float or sequence of float
        Probability, in [0, 1], that a modality is left out: one for all or one each.
    keep_one : bool
        Where all of a sample would go, one of them stays, each with the same probability. With one p for all a
        modality is then left out with probability :math:`p - p^M / M`.
    learned : sequence of int, optional
        The modalities' widths: what is left out is replaced by a learned vector (0 at the start) instead of 0.
    generator : torch.Generator, optional
        Of the CPU, for the draws.

    Attributes
    ----------
    missing : torch.nn.ParameterList or None
        ``[width]`` each, with `learned`.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Nothing is rescaled, and in eval mode nothing is drawn.

    References
    ----------
    Neverova et al., ModDrop: Adaptive Multi-modal Gesture Recognition, TPAMI 2016, arXiv:1501.00102.
    """

    def __init__(
        self, num_modalities: int, p: float | Sequence[float] = 0.5, *, keep_one: bool = True,
        learned: Sequence[int] | None = None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_positive("ModalityDropout", num_modalities=num_modalities)
        each = [float(p)] * num_modalities if isinstance(p, (int, float)) else [float(q) for q in p]
        if len(each) != num_modalities or not all(0.0 <= q <= 1.0 for q in each):
            raise ValueError(f"ModalityDropout: p is {p}; expected one or {num_modalities} numbers from 0 to 1")
        if learned is not None and len(learned) != num_modalities:
            raise ValueError(f"ModalityDropout: learned has {len(learned)} widths; expected {num_modalities}")
        self.p, self.keep_one, self.generator = tuple(each), keep_one, generator
        self.missing = None if learned is None else nn.ParameterList(torch.zeros(width) for width in learned)

    def forward(
        self, features: Sequence[Tensor], present: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
        """Drop modalities.

        Parameters
        ----------
        features : sequence of Tensor
            M of them, ``[batch, ...]``; with `learned` the last dimension is the width.
        present : bool Tensor, optional
            ``[batch, M]``, which modalities the samples have at all: the others are replaced too, in eval mode as well.

        Returns
        -------
        tuple of list of Tensor and bool Tensor
            The features, and ``[batch, M]``, which of them are left.

        Raises
        ------
        ValueError
            If shapes do not fit.
        """
        op, count = "ModalityDropout", len(self.p)
        _check_number(op, "features", features, count)
        batch, device = features[0].shape[0], features[0].device
        for m, x in enumerate(features):
            if x.shape[0] != batch:
                raise ValueError(f"{op}: features[{m}] has shape {tuple(x.shape)}; expected {batch} samples")
        if present is not None:
            _check_mask(op, "present", present, ((batch, count),))
        kept = torch.ones(batch, count, dtype=torch.bool) if present is None else present.cpu()
        if self.training:
            # the order of the modalities in which a sample that would lose all looks for one it has
            draws = torch.rand(batch, count, generator=self.generator)
            left = kept & (draws >= torch.tensor(self.p))
            if self.keep_one:
                order = torch.rand(batch, count, generator=self.generator).masked_fill(~kept, -1.0)
                rescued = functional.one_hot(order.argmax(1), count).bool() & kept
                left = torch.where(left.any(1, keepdim=True), left, rescued)
            kept = left
        kept = kept.to(device)
        out = []
        for m, x in enumerate(features):
            mask = kept[:, m].view(-1, *[1] * (x.dim() - 1))
            other = x.new_zeros(()) if self.missing is None else self.missing[m].to(x.dtype)
            out.append(torch.where(mask, x, other))
        return out, kept


class OGMGE:
    r"""On-the-fly gradient modulation: hold back the encoder of the modality that is ahead, and add noise (OGM-GE).

    Call between ``backward()`` and ``optimizer.step()``.

    Parameters
    ----------
    encoders : mapping of str to torch.nn.Module
        The two modalities' encoders, by name, without shared parameters.
    alpha : float
        How much the discrepancy counts, > 0; the paper takes 0.1 to 0.8.
    noise : bool
        GE: Gaussian noise with the standard deviation of each parameter's gradient.
    min_dim : int
        Parameters of fewer dimensions are left alone. The paper's code takes convolutions only: 4.
    generator : torch.Generator, optional
        For the noise; on the parameters' device.

    Attributes
    ----------
    ratios, coefficients : dict of str to float
        :math:`\rho` and :math:`k` of the last step.

    Raises
    ------
    ValueError
        If there are not two encoders, they share a parameter, or `alpha` is not above 0.

    Notes
    -----
    With :math:`s^m` the sum over the batch of the probability that modality m alone gives to the label,

    .. math:: \rho^m = s^m / s^{m'}, \qquad k^m = \begin{cases} 1 - \tanh(\alpha \rho^m) & \rho^m > 1 \\ 1 \end{cases},
        \qquad g^m \leftarrow k^m g^m + \epsilon, \quad \epsilon \sim \mathcal N(0, \operatorname{std}(g^m)^2)

    For a linear classifier on concatenated features, modality m's logits are :math:`W_m x_m + b / 2`.

    References
    ----------
    Peng et al., Balanced Multimodal Learning via On-the-fly Gradient Modulation, CVPR 2022, arXiv:2203.15332.
    """

    def __init__(
        self, encoders: Mapping[str, nn.Module], alpha: float = 0.3, *, noise: bool = True, min_dim: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        if len(encoders) != 2:
            raise ValueError(f"OGMGE: encoders has {len(encoders)} entries; expected 2 modalities")
        if not 0 < alpha < math.inf:
            raise ValueError(f"OGMGE: alpha is {alpha}; expected > 0")
        first, second = encoders.values()
        if {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}:
            raise ValueError("OGMGE: encoders share a parameter; expected none in common")
        self.encoders, self.alpha, self.noise, self.min_dim = dict(encoders), alpha, noise, min_dim
        self.generator = generator
        self.ratios: dict[str, float] = {}
        self.coefficients: dict[str, float] = {}

    @torch.no_grad()
    def step(self, logits: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
        """Modulate the gradients of both encoders in place.

        Parameters
        ----------
        logits : mapping of str to Tensor
            ``[batch, classes]`` of each modality alone.
        labels : int64 Tensor
            ``[batch]``.

        Returns
        -------
        dict of str to float
            The coefficients.

        Raises
        ------
        ValueError
            If names or shapes do not fit, or a modality gives the labels no probability at all; gradients are as they
            were.
        """
        if set(logits) != set(self.encoders):
            raise ValueError(f"OGMGE: logits is of {sorted(logits)}; expected {sorted(self.encoders)}")
        scores: dict[str, float] = {}
        for name, of in logits.items():
            if of.dim() != 2 or labels.shape != of.shape[:1]:
                got = f"shape {tuple(of.shape)} and labels {tuple(labels.shape)}"
                raise ValueError(f"OGMGE: logits[{name!r}] has {got}; expected (batch, classes) and (batch,)")
            scores[name] = float(of.double().softmax(1).gather(1, labels[:, None]).sum())
            if not 0 < scores[name] < math.inf:
                raise ValueError(f"OGMGE: logits[{name!r}] give the labels {scores[name]} in all; expected above 0")
        a, b = self.encoders
        self.ratios = {a: scores[a] / scores[b], b: scores[b] / scores[a]}
        self.coefficients = {
            name: 1.0 - math.tanh(self.alpha * ratio) if ratio > 1 else 1.0 for name, ratio in self.ratios.items()
        }
        for name, encoder in self.encoders.items():
            for parameter in encoder.parameters():
                gradient = parameter.grad
                if gradient is None or gradient.dim() < self.min_dim:
                    continue
                deviation = gradient.std() if self.noise and gradient.numel() > 1 else None
                gradient.mul_(self.coefficients[name])
                if deviation is not None:
                    drawn = torch.empty_like(gradient).normal_(generator=self.generator)
                    gradient.add_(drawn.mul_(deviation))
        return dict(self.coefficients)
