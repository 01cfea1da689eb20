r"""Corruption of token sequences for pre-training and continued pre-training (DAPT, TAPT).

Masked language modelling minimises :math:`-\sum_{i \in \mathcal M} \log p(x_i \mid \tilde x)`: `mask_tokens` and
`mask_spans` choose :math:`\mathcal M` and make :math:`\tilde x`, `span_corruption` makes the input and target of an
encoder-decoder, `MLMCollator` makes batches.

Labels are -100 outside :math:`\mathcal M`, which `torch.nn.functional.cross_entropy` passes over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MLMCollator",
    "MaskedSpans",
    "MaskedTokens",
    "linear_mask_rate",
    "mask_spans",
    "mask_tokens",
    "span_corruption",
]

IGNORE_INDEX = -100


class MaskedTokens(NamedTuple):
    """What `mask_tokens` makes: both int64, of the shape of its input."""

    input_ids: Tensor
    labels: Tensor


class MaskedSpans(NamedTuple):
    """What `mask_spans` makes: all int64, of the shape of its input. `span_ids` counts in each row; -1 is no span."""

    input_ids: Tensor
    labels: Tensor
    span_ids: Tensor


def mask_tokens(
    input_ids: Tensor, *, mask_token_id: int, vocab_size: int, mask_rate: float = 0.15,
    special_token_ids: Sequence[int] = (), maskable: Tensor | None = None,
    replacement: tuple[float, float, float] = (0.8, 0.1, 0.1), word_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MaskedTokens:  # fmt: skip
    r"""Mask tokens as BERT does.

    Each token that may be masked is chosen with probability `mask_rate`, on its own; a chosen one becomes the mask
    token (80 %), a token drawn uniformly from the vocabulary (10 %), or stays (10 %).

    Parameters
    ----------
    input_ids : Tensor
        int64 ``[..., T]``. Not changed.
    mask_token_id : int
    vocab_size : int
        Random tokens are from 0 to this - 1, special ones among them, as in BERT.
    mask_rate : float
        In [0, 1]; 0.15 for BERT, 0.4 for large models according to Wettig.
    special_token_ids : sequence of int
        Tokens that are never masked: [CLS], [SEP], padding.
    maskable : Tensor, optional
        Bool ``[..., T]``: further restricts what may be masked, e.g. ``attention_mask.bool()``.
    replacement : tuple of three floats
        The shares of mask token, random token and the token itself; they sum to 1.
    word_ids : Tensor, optional
        int64 ``[..., T]``: the word that each token is part of, -1 for none; neighbours with one number are one word.
        Words are then chosen instead of tokens, and masked whole; what each token becomes is still drawn by token. A
        word with a token that may not be masked is left out.
    generator : torch.Generator, optional
        On the device of `input_ids`.

    Returns
    -------
    MaskedTokens
        ``input_ids``, corrupted, and ``labels``: the original at chosen places, -100 elsewhere.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Devlin et al., BERT, NAACL 2019, arXiv:1810.04805, section 3.1. Wettig et al., Should You Mask 15% in Masked
    Language Modeling?, EACL 2023, arXiv:2202.08005.

    Examples
    --------
    >>> import torch
    >>> ids = torch.tensor([[101, 7, 8, 9, 102]])
    >>> out = mask_tokens(ids, mask_token_id=103, vocab_size=200, mask_rate=1.0, special_token_ids=[101, 102],
    ...                   replacement=(1.0, 0.0, 0.0))
    >>> out.input_ids, out.labels
    (tensor([[101, 103, 103, 103, 102]]), tensor([[-100,    7,    8,    9, -100]]))
    """
    op = "mask_tokens"
    _check_common(op, input_ids, mask_token_id, vocab_size, mask_rate, replacement)
    allowed = _allowed(op, input_ids, special_token_ids, maskable)
    if word_ids is None:
        chosen = allowed & (_uniform(input_ids.shape, input_ids.device, generator) < mask_rate)
    else:
        word = _words(op, word_ids, input_ids.shape)
        whole = torch.ones_like(input_ids).scatter_reduce(-1, word, (allowed & (word_ids >= 0)).long(), "amin").bool()
        draw = _uniform(input_ids.shape, input_ids.device, generator) < mask_rate
        chosen = (draw & whole).gather(-1, word)
    return MaskedTokens(
        _replaced(input_ids, chosen, _uniform(input_ids.shape, input_ids.device, generator), mask_token_id, vocab_size,
                  replacement, generator),
        torch.where(chosen, input_ids, IGNORE_INDEX),
    )  # fmt: skip


def mask_spans(
    input_ids: Tensor, *, mask_token_id: int, vocab_size: int, mask_rate: float = 0.15, p: float = 0.2,
    max_span_length: int = 10, special_token_ids: Sequence[int] = (), maskable: Tensor | None = None,
    replacement: tuple[float, float, float] = (0.8, 0.1, 0.1), word_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MaskedSpans:  # fmt: skip
    r"""Mask contiguous spans as SpanBERT does.

    Spans are drawn until the budget of a row, :math:`\mathrm{round}(\mathrm{rate} \cdot n)` of the n tokens that may be
    masked and at least 1, is used up. A span starts at a place drawn uniformly from those left, and has a length from
    the geometric distribution, cut off and normalised:

    .. math:: P(\ell) = \frac{p (1 - p)^{\ell - 1}}{1 - (1 - p)^{\ell_{\max}}}, \qquad \ell = 1 \dots \ell_{\max}

    whose mean is 3.8 at the defaults. Mask token, random tokens or the original are chosen once for a whole span.

    Parameters
    ----------
    input_ids, mask_token_id, vocab_size, mask_rate, special_token_ids, maskable, replacement, generator
        As for `mask_tokens`; `input_ids` is on the CPU, and so is the generator. At `mask_rate` 0 nothing is masked.
    p : float
        In (0, 1).
    max_span_length : int
        >= 1.
    word_ids : Tensor, optional
        As for `mask_tokens`. Lengths then count words, spans begin and end with words, and the last one may exceed the
        budget by the rest of its word.

    Returns
    -------
    MaskedSpans
        As `mask_tokens`, and the number of each token's span, for objectives on span boundaries.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    A span ends early at a special token, at an earlier span, and where the budget ends.

    References
    ----------
    Joshi et al., SpanBERT, TACL 2020, arXiv:1907.10529, section 3.1.
    """
    op = "mask_spans"
    _check_common(op, input_ids, mask_token_id, vocab_size, mask_rate, replacement)
    if not 0 < p < 1:
        raise ValueError(f"{op}: p is {p}; expected 0 < p < 1")
    if max_span_length < 1:
        raise ValueError(f"{op}: max_span_length is {max_span_length}; expected >= 1")
    if input_ids.device.type != "cpu":
        raise ValueError(f"{op}: input_ids is on {input_ids.device}; expected the CPU")
    allowed = _allowed(op, input_ids, special_token_ids, maskable)
    length = input_ids.shape[-1]
    if word_ids is None:
        words = torch.arange(length).expand(input_ids.shape)
    else:
        words = _words(op, word_ids, input_ids.shape)
        whole = torch.ones_like(input_ids).scatter_reduce(-1, words, (allowed & (word_ids >= 0)).long(), "amin")
        allowed = whole.bool().gather(-1, words)
    lengths = (1 - p) ** torch.arange(max_span_length, dtype=torch.float64)
    span_ids = torch.full_like(input_ids, -1)
    matrix = (span_ids.numel() // max(1, length), length)
    rows = zip(allowed.reshape(matrix), words.reshape(matrix), span_ids.view(matrix), strict=True)
    for row, row_words, row_spans in rows:
        _draw_spans(row.clone(), row_words.tolist(), row_spans, mask_rate, lengths, generator)
    chosen = span_ids >= 0
    draw = _uniform(input_ids.shape, input_ids.device, generator).gather(-1, span_ids.clamp(min=0))  # one for each span
    return MaskedSpans(
        _replaced(input_ids, chosen, draw, mask_token_id, vocab_size, replacement, generator),
        torch.where(chosen, input_ids, IGNORE_INDEX),
        span_ids,
    )


def _draw_spans(
    free: Tensor, words: list[int], spans: Tensor, rate: float, lengths: Tensor, generator: torch.Generator | None
) -> None:
    """Write the span numbers of one row; `free` is what may still be masked."""
    budget = max(1, round(rate * int(free.sum()))) if rate > 0 and bool(free.any()) else 0
    span = 0
    while budget > 0:
        starts = free.nonzero()[:, 0]
        # the first token of the word: words are free or taken as a whole
        at = words[int(starts[int(torch.randint(len(starts), (), generator=generator))])]
        wanted = int(torch.multinomial(lengths, 1, generator=generator)) + 1
        while wanted > 0 and budget > 0 and at < len(words) and bool(free[at]):
            end = at + 1
            while end < len(words) and words[end] == at:
                end += 1
            spans[at:end] = span
            free[at:end] = False
            budget -= end - at
            wanted -= 1
            at = end
        span += 1


def span_corruption(
    input_ids: Tensor, sentinel_ids: Sequence[int], *, noise_density: float = 0.15, mean_span_length: float = 3.0,
    eos_token_id: int | None = None, generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""Corrupt a sequence as T5 does: each span becomes a sentinel, and the target is what the sentinels stand for.

    Of T tokens, :math:`n = \mathrm{round}(\mathrm{density} \cdot T)` (1 to T - 1) are noise, in
    :math:`\max(1, \mathrm{round}(n / \mathrm{mean}))` spans. Noise and the rest are each cut into that many pieces,
    every cut equally likely, and interleaved: the sequence begins with text and ends with a span of noise.

    Parameters
    ----------
    input_ids : Tensor
        int64 ``[T]``, T >= 2, on the CPU, without padding or end token.
    sentinel_ids : sequence of int
        In order of use: ``<extra_id_0>``, ``<extra_id_1>``, ...
    noise_density : float
        In (0, 1).
    mean_span_length : float
        >= 1.
    eos_token_id : int, optional
        Appended to both.
    generator : torch.Generator, optional
        On the CPU.

    Returns
    -------
    input_ids : Tensor
        int64 ``[T - n + spans (+ 1)]``: the text with sentinel k in the place of span k.
    labels : Tensor
        int64 ``[n + spans (+ 1)]``: sentinel 0, span 0, sentinel 1, span 1, ...

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated, or there are fewer sentinels than spans.

    References
    ----------
    Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, JMLR 2020,
    arXiv:1910.10683, section 3.1.4.

    Examples
    --------
    >>> import torch
    >>> inputs, labels = span_corruption(torch.arange(2), [100], noise_density=0.5)
    >>> inputs.tolist(), labels.tolist()
    ([0, 100], [100, 1])
    """
    op = "span_corruption"
    _check_ids(op, input_ids)
    if input_ids.dim() != 1 or len(input_ids) < 2:
        raise ValueError(f"{op}: input_ids has shape {tuple(input_ids.shape)}; expected [T] with T >= 2")
    if not 0 < noise_density < 1:
        raise ValueError(f"{op}: noise_density is {noise_density}; expected 0 < noise_density < 1")
    if not (math.isfinite(mean_span_length) and mean_span_length >= 1):
        raise ValueError(f"{op}: mean_span_length is {mean_span_length}; expected a finite number >= 1")
    total = len(input_ids)
    noise = min(max(round(noise_density * total), 1), total - 1)
    spans = min(max(round(noise / mean_span_length), 1), total - noise)
    if spans > len(sentinel_ids):
        raise ValueError(f"{op}: sentinel_ids has {len(sentinel_ids)} entries; expected {spans}, one for each span")
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    pieces = zip(_pieces(total - noise, spans, generator), _pieces(noise, spans, generator), strict=True)
    at = 0
    for (text, span), sentinel in zip(pieces, sentinel_ids, strict=False):
        mark = input_ids.new_tensor([sentinel])
        inputs += [input_ids[at : at + text], mark]
        labels += [mark, input_ids[at + text : at + text + span]]
        at += text + span
    end = [] if eos_token_id is None else [input_ids.new_tensor([eos_token_id])]
    return torch.cat(inputs + end), torch.cat(labels + end)


def _pieces(total: int, count: int, generator: torch.Generator | None) -> list[int]:
    """`total` as a sum of `count` numbers >= 1, each such sum equally likely."""
    cuts = sorted((torch.randperm(total - 1, generator=generator)[: count - 1] + 1).tolist())
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def linear_mask_rate(start: float, end: float, num_steps: int) -> Callable[[int], float]:
    r"""A mask rate that goes linearly from one value to another, for `MLMCollator`.

    .. math:: r(t) = r_0 + (r_1 - r_0) \min(1, t / T)

    Parameters
    ----------
    start, end : float
        :math:`r_0` and :math:`r_1`, in [0, 1].
    num_steps : int
        T, >= 1.

    Returns
    -------
    callable
        From the number of a batch to its mask rate.

    Raises
    ------
    ValueError
        If an argument is not as stated.

    References
    ----------
    Yang, Zhang and Zhao, Learning Better Masking for Better Language Model Pre-training, ACL 2023, arXiv:2208.10806.
    """
    for name, value in (("start", start), ("end", end)):
        if not 0 <= value <= 1:
            raise ValueError(f"linear_mask_rate: {name} is {value}; expected 0 <= {name} <= 1")
    if num_steps < 1:
        raise ValueError(f"linear_mask_rate: num_steps is {num_steps}; expected >= 1")
    return _LinearRate(start, end, num_steps)


@dataclass(frozen=True)
class _LinearRate:  # not a closure: collators travel to the workers of a DataLoader
    start: float
    end: float
    num_steps: int

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / self.num_steps)


class MLMCollator:
    """Make padded, masked batches of token sequences, drawn anew each time: dynamic masking.

    Parameters
    ----------
    mask_token_id, vocab_size, special_token_ids, replacement
        As for `mask_tokens`.
    pad_token_id : int
        Never masked.
    mask_rate : float or callable
        A constant, or a function of the number of the batch, such as `linear_mask_rate`.
    masking : {"token", "span"}
        `mask_tokens` or `mask_spans`.
    pad_to_multiple_of : int
        Lengths are rounded up to a multiple of this, >= 1.
    generator : torch.Generator, optional
        On the CPU.

    Attributes
    ----------
    step : int
        The number of the next batch. In a `torch.utils.data.DataLoader` with workers each has a copy, which counts its
        own batches: there, set it (or a constant rate) before each epoch.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated; from a call, if a sequence is not.

    Examples
    --------
    >>> collate = MLMCollator(mask_token_id=103, vocab_size=200, pad_token_id=0, special_token_ids=[101, 102])
    >>> batch = collate([[101, 7, 8, 102], [101, 9, 102]])
    >>> sorted(batch), batch["attention_mask"].tolist()
    (['attention_mask', 'input_ids', 'labels'], [[1, 1, 1, 1], [1, 1, 1, 0]])
    """

    def __init__(
        self, *, mask_token_id: int, vocab_size: int, pad_token_id: int, special_token_ids: Sequence[int] = (),
        mask_rate: float | Callable[[int], float] = 0.15, replacement: tuple[float, float, float] = (0.8, 0.1, 0.1),
        masking: Literal["token", "span"] = "token", pad_to_multiple_of: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        if masking not in ("token", "span"):
            raise ValueError(f"MLMCollator: masking is {masking!r}; expected 'token' or 'span'")
        if pad_to_multiple_of < 1:
            raise ValueError(f"MLMCollator: pad_to_multiple_of is {pad_to_multiple_of}; expected >= 1")
        rate = mask_rate(0) if callable(mask_rate) else mask_rate
        _check_common("MLMCollator", torch.zeros(1, dtype=torch.int64), mask_token_id, vocab_size, rate, replacement)
        self.mask_token_id, self.vocab_size, self.pad_token_id = mask_token_id, vocab_size, pad_token_id
        self.special_token_ids, self.mask_rate, self.replacement = tuple(special_token_ids), mask_rate, replacement
        self.masking, self.pad_to_multiple_of, self.generator = masking, pad_to_multiple_of, generator
        self.step = 0

    def __call__(self, examples: Sequence[Mapping[str, Any] | Tensor | Sequence[int]]) -> dict[str, Tensor]:
        """Make a batch.

        Parameters
        ----------
        examples : sequence
            Token sequences ``[T_i]`` (tensors or lists), or mappings with ``"input_ids"`` and, if wanted,
            ``"word_ids"``: for each token its word, -1 or None for special tokens.

        Returns
        -------
        dict of str to Tensor
            ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[B, T]``; ``span_ids`` too with spans.
        """
        if not examples:
            raise ValueError("MLMCollator: examples is empty; expected at least one")
        mappings = [example if isinstance(example, Mapping) else {"input_ids": example} for example in examples]
        ids = [torch.as_tensor(example["input_ids"], dtype=torch.int64) for example in mappings]
        for row in ids:
            if row.dim() != 1:
                raise ValueError(f"MLMCollator: an example has shape {tuple(row.shape)}; expected [T]")
        width = -(-max(len(row) for row in ids) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = torch.full((len(ids), width), self.pad_token_id)
        attention_mask = torch.zeros_like(batch)
        word_ids = torch.full_like(batch, -1) if all("word_ids" in example for example in mappings) else None
        for i, row in enumerate(ids):
            batch[i, : len(row)] = row
            attention_mask[i, : len(row)] = 1
            if word_ids is not None:
                words = [-1 if word is None else int(word) for word in mappings[i]["word_ids"]]
                if len(words) != len(row):
                    raise ValueError(
                        f"MLMCollator: an example has {len(words)} word_ids and {len(row)} input_ids; expected as many"
                    )
                word_ids[i, : len(row)] = torch.tensor(words, dtype=torch.int64)
        rate = self.mask_rate(self.step) if callable(self.mask_rate) else self.mask_rate
        masked = (mask_tokens if self.masking == "token" else mask_spans)(
            batch, mask_token_id=self.mask_token_id, vocab_size=self.vocab_size, mask_rate=rate,
            special_token_ids=self.special_token_ids, maskable=attention_mask.bool(), replacement=self.replacement,
            word_ids=word_ids, generator=self.generator,
        )  # fmt: skip
        self.step += 1
        return {**masked._asdict(), "attention_mask": attention_mask}


# ---- shared parts ----------------------------------------------------------------------------------------------------


def _check_ids(op: str, input_ids: Tensor) -> None:
    if input_ids.dtype != torch.int64:
        raise TypeError(f"{op}: input_ids has dtype {str(input_ids.dtype).removeprefix('torch.')}; expected int64")


def _check_common(
    op: str, input_ids: Tensor, mask_token_id: int, vocab_size: int, mask_rate: float,
    replacement: tuple[float, float, float],
) -> None:  # fmt: skip
    _check_ids(op, input_ids)
    if input_ids.dim() < 1:
        raise ValueError(f"{op}: input_ids has shape (); expected [..., T]")
    if vocab_size < 1:
        raise ValueError(f"{op}: vocab_size is {vocab_size}; expected >= 1")
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"{op}: mask_token_id is {mask_token_id}; expected 0 to vocab_size - 1 = {vocab_size - 1}")
    if not 0 <= mask_rate <= 1:
        raise ValueError(f"{op}: mask_rate is {mask_rate}; expected 0 <= mask_rate <= 1")
    if len(replacement) != 3 or min(replacement) < 0 or abs(sum(replacement) - 1) > 1e-6:
        raise ValueError(f"{op}: replacement is {tuple(replacement)}; expected three shares >= 0 that sum to 1")


def _allowed(op: str, input_ids: Tensor, special_token_ids: Sequence[int], maskable: Tensor | None) -> Tensor:
    special = torch.tensor(list(special_token_ids), dtype=torch.int64, device=input_ids.device)
    allowed = ~torch.isin(input_ids, special)
    if maskable is None:
        return allowed
    if maskable.dtype != torch.bool:
        raise TypeError(f"{op}: maskable has dtype {str(maskable.dtype).removeprefix('torch.')}; expected bool")
    if maskable.shape != input_ids.shape:
        raise ValueError(
            f"{op}: maskable has shape {tuple(maskable.shape)}; expected {tuple(input_ids.shape)}, like input_ids"
        )
    return allowed & maskable


def _words(op: str, word_ids: Tensor, shape: torch.Size) -> Tensor:
    """Name each word by the place of its first token."""
    if word_ids.shape != shape:
        raise ValueError(f"{op}: word_ids has shape {tuple(word_ids.shape)}; expected {tuple(shape)}, like input_ids")
    first = torch.ones_like(word_ids, dtype=torch.bool)
    first[..., 1:] = word_ids[..., 1:] != word_ids[..., :-1]
    place = torch.arange(shape[-1], device=word_ids.device).expand(shape)
    return torch.where(first, place, 0).cummax(-1).values if shape[-1] else place


def _uniform(shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, device=device, generator=generator)


def _replaced(
    input_ids: Tensor, chosen: Tensor, draw: Tensor, mask_token_id: int, vocab_size: int,
    replacement: tuple[float, float, float], generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """`draw`, uniform in [0, 1), says what becomes of each chosen token."""
    random = torch.randint(vocab_size, input_ids.shape, device=input_ids.device, generator=generator)
    masked, randomised = replacement[0], replacement[0] + replacement[1]
    out = torch.where(chosen & (draw < masked), mask_token_id, input_ids)
    return torch.where(chosen & (draw >= masked) & (draw < randomised), random, out)
