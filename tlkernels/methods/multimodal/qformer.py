r"""The Q-Former of BLIP-2, and its first stage of training: contrast, matching and generation with one set of weights.

A fixed number of learned queries reads an image through cross-attention to its frozen tokens, in every other layer.
Queries and text go through the same self-attention; which of them sees which makes three tasks of it:

=======  =========================================  ==========================================
mode     queries see                                text tokens see
=======  =========================================  ==========================================
"itc"    queries                                    text (alone, in a pass without the image)
"itm"    queries and text                           queries and text
"itg"    queries                                    queries, and text up to themselves
=======  =========================================  ==========================================

In "itg" the queries are what they are in "itc", so their keys and values are kept from there, and only the text goes
through the layers again.

.. math::
    L = L_\mathrm{ITC} + L_\mathrm{ITM} + L_\mathrm{ITG}, \qquad
    z_{ij} = s \max_q \, x_{iq} \cdot y_j

Junnan Li, Dongxu Li, Silvio Savarese, Steven Hoi. *BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image
Encoders and Large Language Models.* ICML 2023, arXiv:2301.12597, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlkernels.methods._common import check_tensor, normalized, wide
from tlkernels.methods.multimodal.itm import ImageTextMatchingHead, hard_negatives, itm_loss
from tlkernels.methods.multimodal.tokenwise import token_similarities
from tlkernels.ops._common import name_of

__all__ = ["QFormer", "QFormerLosses", "QFormerOutput", "QFormerPretraining"]

_INIT_STD = 0.02  # BERT's

KeyValue = tuple[Tensor, Tensor]


class QFormerOutput(NamedTuple):
    """What a `QFormer` returns."""

    #: ``[B, num_queries, hidden_size]``, or None without an image
    queries: Tensor | None
    #: ``[B, T, hidden_size]``, or None without text
    text: Tensor | None
    #: keys and values of the queries in each layer, ``[B, heads, num_queries, head_size]``, for `QFormer.text_given`;
    #: where they did not see text
    query_states: list[KeyValue] | None


class _SelfAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = k, v
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return _attend(q, k, v, mask, self.dropout if self.training else 0.0), seen


class _CrossAttention(nn.Module):
    def __init__(self, hidden_size: int, image_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(image_size, 2 * hidden_size)

    def forward(self, x: Tensor, image: Tensor, mask: Tensor | None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(image).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return _attend(q, k, v, mask, self.dropout if self.training else 0.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """[B, heads, L, head_size] -> [B, L, hidden_size]; in `mask` True is what is seen."""
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


class _Residual(nn.Module):
    """A linear layer, dropout, the residual, and the norm behind it."""

    def __init__(self, in_features: int, hidden_size: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(in_features, hidden_size), nn.LayerNorm(hidden_size, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.norm(self.dropout(self.linear(x)) + residual)
        return out


class _FeedForward(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = _Residual(intermediate_size, hidden_size, dropout, eps)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.gelu(self.up(x)), x)
        return out


class _Layer(nn.Module):
    def __init__(
        self, hidden_size: int, num_heads: int, intermediate_size: int, image_size: int | None, text: bool,
        dropout: float, eps: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention = _SelfAttention(hidden_size, num_heads, dropout)
        self.attention_out = _Residual(hidden_size, hidden_size, dropout, eps)
        self.cross_attention = self.cross_attention_out = None
        if image_size is not None:
            self.cross_attention = _CrossAttention(hidden_size, image_size, num_heads, dropout)
            self.cross_attention_out = _Residual(hidden_size, hidden_size, dropout, eps)
        self.query_feed_forward = _FeedForward(hidden_size, intermediate_size, dropout, eps)
        self.text_feed_forward = _FeedForward(hidden_size, intermediate_size, dropout, eps) if text else None

    def forward(
        self, x: Tensor, num_queries: int, mask: Tensor | None, image: Tensor | None, image_mask: Tensor | None,
        past: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:  # fmt: skip
        attended, seen = self.attention(x, mask, past)
        x = self.attention_out(attended, x)
        queries, text = x[:, :num_queries], x[:, num_queries:]
        parts = []
        if num_queries:
            if self.cross_attention is not None and self.cross_attention_out is not None:
                queries = self.cross_attention_out(self.cross_attention(queries, image, image_mask), queries)
            parts.append(self.query_feed_forward(queries))
        if text.shape[1]:
            assert self.text_feed_forward is not None
            parts.append(self.text_feed_forward(text))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1), seen


class QFormer(nn.Module):
    r"""The querying transformer: from any number of image tokens to a fixed number of states, with or without text.

    Parameters
    ----------
    image_size : int
        Features of the image's tokens.
    hidden_size, num_layers, num_heads, intermediate_size : int
        As of BERT-base.
    num_queries : int
        32 in the paper.
    cross_attention_every : int
        Layers 0, this, twice this, ... have cross-attention.
    vocab_size : int or None
        Of the text; None leaves the text's embeddings and feed-forward networks out.
    max_positions : int
        Of the text.
    dropout : float
        Of attention and of each sublayer's output.
    layer_norm_eps : float

    Attributes
    ----------
    queries : torch.nn.Parameter
        ``[num_queries, hidden_size]``.

    Raises
    ------
    ValueError
        If a size is not positive, or `hidden_size` no multiple of `num_heads`.

    Notes
    -----
    Queries have no positions. The text has no cross-attention: it hears of the image through the queries alone.
    Attention is `torch.nn.functional.scaled_dot_product_attention`. `load_blip2` takes the weights of a checkpoint.

    References
    ----------
    Li et al., BLIP-2, ICML 2023, arXiv:2301.12597, section 3.1.

    Examples
    --------
    >>> import torch
    >>> model = QFormer(
    ...     8, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, num_queries=4, vocab_size=10
    ... )
    >>> model(torch.randn(3, 20, 8)).queries.shape
    torch.Size([3, 4, 16])
    """

    def __init__(
        self, image_size: int = 1408, *, hidden_size: int = 768, num_layers: int = 12, num_heads: int = 12,
        intermediate_size: int = 3072, num_queries: int = 32, cross_attention_every: int = 2,
        vocab_size: int | None = 30523, max_positions: int = 512, dropout: float = 0.1, layer_norm_eps: float = 1e-12,
    ) -> None:  # fmt: skip
        sizes = {
            "image_size": image_size, "hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads,
            "intermediate_size": intermediate_size, "num_queries": num_queries, "max_positions": max_positions,
            "cross_attention_every": cross_attention_every, "vocab_size": 1 if vocab_size is None else vocab_size,
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"QFormer: {name} is {size}; expected >= 1")
        if hidden_size % num_heads:
            raise ValueError(f"QFormer: hidden_size is {hidden_size}; expected a multiple of num_heads, {num_heads}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"QFormer: dropout is {dropout}; expected 0 <= dropout < 1")
        super().__init__()
        self.image_size, self.hidden_size, self.num_queries = image_size, hidden_size, num_queries
        self.queries = nn.Parameter(torch.empty(num_queries, hidden_size))
        self.words = None if vocab_size is None else nn.Embedding(vocab_size, hidden_size)
        self.positions = None if vocab_size is None else nn.Embedding(max_positions, hidden_size)
        self.norm, self.dropout = nn.LayerNorm(hidden_size, eps=layer_norm_eps), nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            _Layer(
                hidden_size, num_heads, intermediate_size, None if i % cross_attention_every else image_size,
                vocab_size is not None, dropout, layer_norm_eps,
            )
            for i in range(num_layers)
        )  # fmt: skip
        nn.init.normal_(self.queries, std=_INIT_STD)
        self.apply(_initialize)

    def forward(
        self, image: Tensor | None = None, input_ids: Tensor | None = None, *, image_mask: Tensor | None = None,
        text_mask: Tensor | None = None, mode: Literal["itc", "itm", "itg"] = "itm",
    ) -> QFormerOutput:  # fmt: skip
        """Read images, texts, or both.

        Parameters
        ----------
        image : Tensor [B, P, image_size], optional
            The image's tokens, of a frozen encoder.
        input_ids : int64 Tensor [B, T], optional
            The text.
        image_mask : bool Tensor [B, P], optional
            True for tokens that count.
        text_mask : bool or integer Tensor [B, T], optional
            Not 0 for tokens that count, at the front of each row; what is returned for others means nothing.
        mode : {"itc", "itm", "itg"}
            Who sees whom; without an image or without text all modes but "itg" are the same.

        Returns
        -------
        QFormerOutput

        Raises
        ------
        TypeError, ValueError, IndexError
            If an argument is not as stated.
        """
        if mode not in ("itc", "itm", "itg"):
            raise ValueError(f"QFormer: mode is {mode!r}; expected 'itc', 'itm' or 'itg'")
        if image is None and input_ids is None:
            raise ValueError("QFormer: image and input_ids are None; expected at least one")
        if mode == "itg" and (image is None or input_ids is None):
            name = "image" if image is None else "input_ids"
            raise ValueError(f"QFormer: {name} is None with mode 'itg'; expected both")
        image_seen = self._check_image(image, image_mask)
        seen = None if input_ids is None else self._check_text(input_ids, text_mask)
        if image is not None and input_ids is not None and image.shape[0] != input_ids.shape[0]:
            raise ValueError(f"QFormer: input_ids has {input_ids.shape[0]} rows; expected {image.shape[0]}, like image")
        if image is None:
            assert input_ids is not None
            x, _ = self._run(self._embed_text(input_ids), 0, _of_keys(seen), None, None, None)
            return QFormerOutput(None, x, None)
        queries = self.norm(self.queries).expand(image.shape[0], -1, -1)
        if input_ids is None or mode != "itm":
            q, states = self._run(self.dropout(queries), self.num_queries, None, image, image_seen, None)
            if input_ids is None:
                return QFormerOutput(q, None, states)
            if mode == "itg":
                return QFormerOutput(q, self.text_given(states, input_ids, text_mask), states)
            x, _ = self._run(self._embed_text(input_ids), 0, _of_keys(seen), None, None, None)
            return QFormerOutput(q, x, states)
        both = torch.cat([self.dropout(queries), self._embed_text(input_ids)], 1)
        mask = None if seen is None else _of_keys(functional.pad(seen, (self.num_queries, 0), value=True))
        x, _ = self._run(both, self.num_queries, mask, image, image_seen, None)
        return QFormerOutput(x[:, : self.num_queries], x[:, self.num_queries :], None)

    def text_given(
        self, query_states: list[KeyValue], input_ids: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """The text's states in mode "itg", given the queries' keys and values.

        Parameters
        ----------
        query_states : list
            ``query_states`` of an output of this model for the same images.
        input_ids, text_mask
            As for `forward`.

        Returns
        -------
        Tensor [B, T, hidden_size]

        Raises
        ------
        TypeError, ValueError, IndexError
            If an argument is not as stated.
        """
        seen = self._check_text(input_ids, text_mask)
        if len(query_states) != len(self.layers) or query_states[0][0].shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"QFormer: query_states has {len(query_states)} layers, input_ids {input_ids.shape[0]} rows; expected "
                f"{len(self.layers)} layers of as many rows"
            )
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        mask = causal if seen is None else causal & seen[:, None, None]
        mask = functional.pad(mask, (self.num_queries, 0), value=True)
        x, _ = self._run(self._embed_text(input_ids), 0, mask, None, None, query_states)
        return x

    def _embed_text(self, input_ids: Tensor) -> Tensor:
        assert self.words is not None and self.positions is not None
        positions = self.positions.weight[: input_ids.shape[1]]
        x: Tensor = self.dropout(self.norm(self.words(input_ids) + positions))
        return x

    def _run(
        self, x: Tensor, num_queries: int, mask: Tensor | None, image: Tensor | None, image_mask: Tensor | None,
        past: list[KeyValue] | None,
    ) -> tuple[Tensor, list[KeyValue]]:  # fmt: skip
        states = []
        image = None if image is None else image.to(self.queries.dtype)
        for i, layer in enumerate(self.layers):
            x, seen = layer(x, num_queries, mask, image, image_mask, None if past is None else past[i])
            if x.shape[1] == num_queries:  # of use only to a text that comes later
                states.append(seen)
        return x, states

    def _check_image(self, image: Tensor | None, mask: Tensor | None) -> Tensor | None:
        if image is None:
            if mask is not None:
                raise ValueError("QFormer: image_mask is given without image; expected None")
            return None
        check_tensor("QFormer", image=image)
        if not image.is_floating_point():
            raise TypeError(f"QFormer: image has dtype {name_of(image.dtype)}; expected floating point")
        if image.dim() != 3 or image.shape[2] != self.image_size or not image.shape[1]:
            raise ValueError(
                f"QFormer: image has shape {tuple(image.shape)}; expected (B, P, {self.image_size}) with P >= 1"
            )
        return None if mask is None else _of_keys(_check_mask("image_mask", mask, image.shape[:2]))

    def _check_text(self, input_ids: Tensor, mask: Tensor | None) -> Tensor | None:
        if self.words is None or self.positions is None:
            raise ValueError("QFormer: input_ids is given, and vocab_size was None; expected a model with text")
        check_tensor("QFormer", input_ids=input_ids)
        if input_ids.dtype != torch.int64 or input_ids.dim() != 2 or not input_ids.shape[1]:
            raise ValueError(
                f"QFormer: input_ids has dtype {name_of(input_ids.dtype)} and shape {tuple(input_ids.shape)}; expected "
                "int64 (B, T) with T >= 1"
            )
        if input_ids.shape[1] > self.positions.num_embeddings:
            raise ValueError(
                f"QFormer: input_ids has {input_ids.shape[1]} tokens; expected at most max_positions, "
                f"{self.positions.num_embeddings}"
            )
        return None if mask is None else _check_mask("text_mask", mask, input_ids.shape)

    @torch.no_grad()
    def load_blip2(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of the Q-Former of transformers.

        Parameters
        ----------
        state : mapping of str to Tensor
            The ``state_dict`` of a ``Blip2QFormerModel``, or of a model that has one as ``qformer``:
            ``Blip2ForImageTextRetrieval`` with queries and embeddings, ``Blip2Model`` with queries. Parts that it does
            not have stay as they are here: queries and embeddings. Parts that only it has are passed over.

        Raises
        ------
        ValueError
            If a weight of the layers is missing, or one has another shape; no weight has changed then.
        """
        prefix = "qformer." if any(name.startswith("qformer.") for name in state) else ""
        pairs: list[tuple[Tensor, list[str]]] = []

        def layer(module: nn.Linear | nn.LayerNorm, *names: str) -> None:
            for kind in ("weight", "bias"):
                pairs.append((getattr(module, kind), [f"{prefix}{name}.{kind}" for name in names]))

        def residual(module: _Residual, name: str) -> None:
            layer(module.linear, f"{name}.dense")
            layer(module.norm, f"{name}.LayerNorm")

        layer(self.norm, "layernorm")
        for i, mine in enumerate(self.layers):
            assert isinstance(mine, _Layer)
            at = f"encoder.layer.{i}"
            layer(mine.attention.qkv, *(f"{at}.attention.attention.{part}" for part in ("query", "key", "value")))
            residual(mine.attention_out, f"{at}.attention.output")
            if mine.cross_attention is not None and mine.cross_attention_out is not None:
                layer(mine.cross_attention.q, f"{at}.crossattention.attention.query")
                layer(mine.cross_attention.kv, *(f"{at}.crossattention.attention.{part}" for part in ("key", "value")))
                residual(mine.cross_attention_out, f"{at}.crossattention.output")
            layer(mine.query_feed_forward.up, f"{at}.intermediate_query.dense")
            residual(mine.query_feed_forward.down, f"{at}.output_query")
            if mine.text_feed_forward is not None:
                layer(mine.text_feed_forward.up, f"{at}.intermediate.dense")
                residual(mine.text_feed_forward.down, f"{at}.output")
        optional: list[tuple[Tensor | None, str]] = [
            (self.queries, "query_tokens"),
            (None if self.words is None else self.words.weight, "embeddings.word_embeddings.weight"),
            (None if self.positions is None else self.positions.weight, "embeddings.position_embeddings.weight"),
        ]
        pairs += [(own, [name]) for own, name in optional if own is not None and name in state]
        ready = []
        for own, names in pairs:
            missing = [name for name in names if name not in state]
            if missing:
                raise ValueError(f"QFormer.load_blip2: state has no {missing[0]}; expected a Q-Former of this form")
            value = torch.cat([state[name].squeeze(0) if own is self.queries else state[name] for name in names])
            if value.shape != own.shape:
                raise ValueError(
                    f"QFormer.load_blip2: {names[0]} gives shape {tuple(value.shape)}; expected {tuple(own.shape)}"
                )
            ready.append((own, value))
        for own, value in ready:
            own.copy_(value)

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the model."""
        return f"num_queries={self.num_queries}, hidden_size={self.hidden_size}, image_size={self.image_size}"


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=_INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _of_keys(seen: Tensor | None) -> Tensor | None:
    """[B, L] -> [B, 1, 1, L]: the same for all heads and all that look."""
    return None if seen is None else seen[:, None, None]


def _check_mask(name: str, mask: Tensor, shape: torch.Size) -> Tensor:
    check_tensor("QFormer", **{name: mask})
    if mask.is_floating_point() or mask.shape != shape:
        raise ValueError(
            f"QFormer: {name} has dtype {name_of(mask.dtype)} and shape {tuple(mask.shape)}; expected bool "
            f"{tuple(shape)}"
        )
    mask = mask != 0
    if mask.device.type == "cpu" and not bool(mask.any(1).all()):
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"QFormer: {name} has no token in row {row}; expected at least one")
    return mask


# ---- the first stage of training -------------------------------------------------------------------------------------


class QFormerLosses(NamedTuple):
    """What `QFormerPretraining` returns; 0-d each."""

    #: the sum of the three
    loss: Tensor
    contrastive: Tensor
    matching: Tensor
    generation: Tensor


class _LanguageHead(nn.Module):
    """BERT's: dense, GELU, norm, and the word embeddings as classifier with a bias of its own."""

    def __init__(self, words: nn.Embedding, eps: float) -> None:
        super().__init__()
        size = words.embedding_dim
        self.transform, self.norm = nn.Linear(size, size), nn.LayerNorm(size, eps=eps)
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))
        _initialize(self.transform)

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        return functional.linear(self.norm(functional.gelu(self.transform(states))), words, self.bias)


class QFormerPretraining(nn.Module):
    r"""A Q-Former with the heads and losses of BLIP-2's first stage.

    .. math::
        L = L_\mathrm{ITC} + L_\mathrm{ITM} + L_\mathrm{ITG}

    ============  ==================================================================================================
    ITC           CLIP's loss on :math:`s \max_q x_{iq} \cdot y_j`; y is from the first text token
    ITM           `itm_loss` on the N right pairs and 2 N of `hard_negatives`; logits are means over the queries
    ITG           cross-entropy of each next text token, given the image's queries and the tokens before it
    ============  ==================================================================================================

    Parameters
    ----------
    qformer : QFormer
        With text.
    bos_token_id : int
        What stands in place of the first text token where text is generated: it tells this task from the others.
    embed_dim : int
        Of x and y; 256 in BLIP-2.
    temperature : float
        :math:`1 / s` at first; it is learned.
    label_smoothing : float in [0, 1]
        Of ITC and ITG. The authors' code has 0.1, the paper says nothing.

    Attributes
    ----------
    temperature : torch.nn.Parameter
        0-d.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    The images' frozen encoder stays outside: what is given are its tokens, once for the whole training if they are
    kept. The vocabulary's logits are made only where a token is to be predicted.

    References
    ----------
    Li et al., BLIP-2, ICML 2023, arXiv:2301.12597, section 3.2.
    """

    def __init__(
        self, qformer: QFormer, bos_token_id: int, *, embed_dim: int = 256, temperature: float = 0.07,
        label_smoothing: float = 0.0,
    ) -> None:  # fmt: skip
        own = type(self).__name__
        if not isinstance(qformer, QFormer):
            raise TypeError(f"{own}: qformer is a {type(qformer).__name__}; expected a QFormer")
        if qformer.words is None:
            raise ValueError(f"{own}: qformer was made with vocab_size None; expected one with text")
        if not 0 <= bos_token_id < qformer.words.num_embeddings:
            raise ValueError(
                f"{own}: bos_token_id is {bos_token_id}; expected 0 <= bos_token_id < {qformer.words.num_embeddings}"
            )
        if embed_dim < 1:
            raise ValueError(f"{own}: embed_dim is {embed_dim}; expected >= 1")
        if not 0 < temperature < math.inf:
            raise ValueError(f"{own}: temperature is {temperature}; expected > 0")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"{own}: label_smoothing is {label_smoothing}; expected 0 <= label_smoothing <= 1")
        super().__init__()
        self.qformer, self.bos_token_id, self.label_smoothing = qformer, bos_token_id, label_smoothing
        self.image_projection = nn.Linear(qformer.hidden_size, embed_dim)
        self.text_projection = nn.Linear(qformer.hidden_size, embed_dim)
        self.matching_head = ImageTextMatchingHead(qformer.hidden_size)
        self.language_head = _LanguageHead(qformer.words, qformer.norm.eps)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        for module in (self.image_projection, self.text_projection, self.matching_head.linear):
            _initialize(module)

    def encode_image(self, image: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """The embeddings ``[B, num_queries, embed_dim]`` of images, of length 1."""
        return self._embed_image(self.qformer(image, image_mask=image_mask).queries)

    def encode_text(self, input_ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """The embeddings ``[B, embed_dim]`` of texts, of length 1."""
        return self._embed_text(self.qformer(None, input_ids, text_mask=text_mask).text)

    def _embed_image(self, states: Tensor) -> Tensor:
        return normalized(self.image_projection(states))

    def _embed_text(self, states: Tensor) -> Tensor:
        return normalized(self.text_projection(states[:, 0]))

    def match(
        self, image: Tensor, input_ids: Tensor, *, image_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """The logits ``[B, 2]`` of pairs, column 1 for "matches"; arguments as for `QFormer.forward`."""
        output = self.qformer(image, input_ids, image_mask=image_mask, text_mask=text_mask, mode="itm")
        return self.matching_head(output.queries)

    def forward(
        self, image: Tensor, input_ids: Tensor, *, image_mask: Tensor | None = None, text_mask: Tensor | None = None,
        groups: Tensor | None = None, generator: torch.Generator | None = None,
    ) -> QFormerLosses:  # fmt: skip
        """The losses of a batch of pairs.

        Parameters
        ----------
        image, input_ids, image_mask, text_mask
            As for `QFormer.forward`; image i belongs to text i. Each text begins with a token that stands for all of
            it, BERT's [CLS].
        groups, generator
            As for `hard_negatives`.

        Returns
        -------
        QFormerLosses
            Each a mean: over pairs and directions, over pairs, over tokens.

        Raises
        ------
        TypeError, ValueError, IndexError
            If an argument is not as stated, or there are not two pairs.
        """
        output = self.qformer(image, input_ids, image_mask=image_mask, text_mask=text_mask, mode="itc")
        x, y = self._embed_image(output.queries), self._embed_text(output.text)
        wrong = hard_negatives(x.detach(), y.detach(), 1.0 / self.temperature, groups=groups, generator=generator)
        images, texts = wrong.pairs()
        logits = self.match(
            image[images], input_ids[texts], image_mask=None if image_mask is None else image_mask[images],
            text_mask=None if text_mask is None else text_mask[texts],
        )  # fmt: skip
        contrastive, matching = self._contrast(x, y), itm_loss(logits, images == texts)
        generation = self._generate(output.query_states, input_ids, text_mask)
        return QFormerLosses(contrastive + matching + generation, contrastive, matching, generation)

    def _contrast(self, x: Tensor, y: Tensor) -> Tensor:
        z = token_similarities(x, y[:, None]).yx / self.temperature
        itself = torch.arange(z.shape[0], device=z.device)
        to_text, to_image = (
            functional.cross_entropy(one, itself, label_smoothing=self.label_smoothing) for one in (z, z.T)
        )
        return 0.5 * (to_text + to_image)

    def _generate(self, query_states: list[KeyValue], input_ids: Tensor, text_mask: Tensor | None) -> Tensor:
        assert self.qformer.words is not None
        given = input_ids.index_fill(1, torch.zeros(1, dtype=torch.int64, device=input_ids.device), self.bos_token_id)
        states = self.qformer.text_given(query_states, given, text_mask)[:, :-1]
        labels = input_ids[:, 1:]
        if text_mask is not None:
            wanted = text_mask[:, 1:] != 0
            states, labels = states[wanted], labels[wanted]
        logits = self.language_head(states.flatten(0, -2), self.qformer.words.weight)
        labels = labels.flatten()
        total = functional.cross_entropy(wide(logits), labels, label_smoothing=self.label_smoothing, reduction="sum")
        return total / max(labels.shape[0], 1)
