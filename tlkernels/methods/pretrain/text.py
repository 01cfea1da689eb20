r"""Objectives of language models besides masking: the next token, sentence pairs, replaced tokens.

What masked language models need, `mask_tokens`, `mask_spans`, rates that change, a collator, is in
`tlkernels.methods.finetune.masking`, since adaptive pre-training needs it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tlkernels.methods._common import check_float, check_tensor, wide
from tlkernels.ops._common import name_of

__all__ = [
    "ReplacedTokens",
    "SentencePair",
    "causal_lm_loss",
    "next_sentence_pairs",
    "replace_tokens",
    "replaced_token_loss",
    "sentence_order_pairs",
]

T = TypeVar("T")


def causal_lm_loss(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    r"""The mean negative log-likelihood of each token given those before it.

    .. math:: L = -\frac{1}{|M|} \sum_{(n, t) \in M} \log p(x_{n, t+1} \mid x_{n, \le t})

    Parameters
    ----------
    logits : Tensor [..., T, V], float32, bfloat16, float16 or float64
        At each place, of the token that follows: the last one is not used.
    labels : int64 Tensor [..., T]
        The tokens themselves, shifted here.
    ignore_index : int
        A label that does not count: padding, a prompt. If none counts the loss is 0.

    Returns
    -------
    Tensor
        0-d, float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Radford et al., Improving Language Understanding by Generative Pre-Training, 2018, equation 1.
    """
    op = "causal_lm_loss"
    check_float(op, logits=logits)
    check_tensor(op, labels=labels)
    if logits.dim() < 2 or labels.shape != logits.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{op}: labels has dtype {name_of(labels.dtype)} and shape {tuple(labels.shape)}, logits has shape "
            f"{tuple(logits.shape)}; expected int64 (..., T) and (..., T, V)"
        )
    following = labels[..., 1:].reshape(-1)
    total = F.cross_entropy(
        wide(logits[..., :-1, :]).flatten(0, -2), following, ignore_index=ignore_index, reduction="sum"
    )
    return total / (following != ignore_index).sum().clamp(min=1)


@dataclass(frozen=True)
class SentencePair(Generic[T]):
    """Two segments; `label` is 0 where the second follows the first in the text, else 1."""

    first: T
    second: T
    label: int


def next_sentence_pairs(
    documents: Sequence[Sequence[T]], *, generator: torch.Generator | None = None
) -> list[SentencePair[T]]:  # fmt: skip
    """Pairs for next-sentence prediction: half of the second segments are from another document.

    Parameters
    ----------
    documents : sequence of sequences
        Segments, of any type, in their order.
    generator : torch.Generator, optional
        On the CPU.

    Returns
    -------
    list of SentencePair
        One for each two neighbours in a document. With probability 1/2 the second is replaced by one drawn uniformly
        from all other documents, and the label is 1.

    Raises
    ------
    ValueError
        If fewer than two documents have segments.

    References
    ----------
    Devlin et al., BERT, NAACL 2019, arXiv:1810.04805, section 3.1.
    """
    everything = [segment for document in documents for segment in document]
    if sum(len(document) > 0 for document in documents) < 2:
        raise ValueError(
            f"next_sentence_pairs: {len(everything)} segments are in one document; expected two documents with segments"
        )
    pairs: list[SentencePair[T]] = []
    begin = 0
    for document in documents:
        others = len(everything) - len(document)
        for first, second in pairwise(document):
            if bool(torch.rand((), generator=generator) < 0.5):
                pairs.append(SentencePair(first, second, 0))
            else:
                at = int(torch.randint(others, (), generator=generator))
                pairs.append(SentencePair(first, everything[at if at < begin else at + len(document)], 1))
        begin += len(document)
    return pairs


def sentence_order_pairs(
    documents: Sequence[Sequence[T]], *, generator: torch.Generator | None = None
) -> list[SentencePair[T]]:  # fmt: skip
    """Pairs for sentence-order prediction: half of the neighbours are swapped.

    Parameters
    ----------
    documents, generator
        As for `next_sentence_pairs`; one document is enough.

    Returns
    -------
    list of SentencePair
        One for each two neighbours in a document; with probability 1/2 they are swapped, and the label is 1.

    References
    ----------
    Lan et al., ALBERT, ICLR 2020, arXiv:1909.11942, section 3.1.
    """
    pairs: list[SentencePair[T]] = []
    for document in documents:
        for first, second in pairwise(document):
            swapped = bool(torch.rand((), generator=generator) < 0.5)
            pairs.append(SentencePair(second, first, 1) if swapped else SentencePair(first, second, 0))
    return pairs


class ReplacedTokens(NamedTuple):
    """What `replace_tokens` makes, of the shape of its input: int64 ids, and bool, true where an id is another one."""

    input_ids: Tensor
    replaced: Tensor


@torch.no_grad()
def replace_tokens(
    input_ids: Tensor, labels: Tensor, logits: Tensor, *, ignore_index: int = -100,
    generator: torch.Generator | None = None,
) -> ReplacedTokens:  # fmt: skip
    """Fill masked places with samples from a small masked language model: the input of ELECTRA's discriminator.

    Parameters
    ----------
    input_ids : int64 Tensor [..., T]
        Masked tokens, from `mask_tokens`.
    labels : int64 Tensor [..., T]
        The originals at masked places, `ignore_index` elsewhere.
    logits : Tensor [..., T, V], float32, bfloat16, float16 or float64
        The generator network's, for `input_ids`.
    ignore_index : int
    generator : torch.Generator, optional
        On the device of `logits`.

    Returns
    -------
    ReplacedTokens
        A sample that is the original by chance counts as original.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Clark et al., ELECTRA, ICLR 2020, arXiv:2003.10555, section 2.
    """
    op = "replace_tokens"
    check_float(op, logits=logits)
    check_tensor(op, input_ids=input_ids, labels=labels)
    for name, t in (("input_ids", input_ids), ("labels", labels)):
        if t.dtype != torch.int64 or t.shape != input_ids.shape:
            raise ValueError(
                f"{op}: {name} has dtype {name_of(t.dtype)} and shape {tuple(t.shape)}; "
                f"expected int64 {tuple(input_ids.shape)}"
            )
    if logits.dim() < 2 or logits.shape[:-1] != input_ids.shape:
        raise ValueError(f"{op}: logits has shape {tuple(logits.shape)}; expected {(*input_ids.shape, 'V')}")
    chosen = labels != ignore_index
    out = input_ids.clone()
    if bool(chosen.any()):
        drawn = torch.multinomial(torch.softmax(wide(logits[chosen]), -1), 1, generator=generator)
        out[chosen] = drawn[:, 0]
    return ReplacedTokens(out, chosen & (out != labels))


def replaced_token_loss(logits: Tensor, replaced: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    r"""The loss of ELECTRA's discriminator: for each token, whether it was replaced.

    .. math:: L = -\frac{1}{|A|} \sum_{t \in A} r_t \log \sigma(d_t) + (1 - r_t) \log (1 - \sigma(d_t))

    Parameters
    ----------
    logits : Tensor [..., T], float32, bfloat16, float16 or float64
        d.
    replaced : Tensor [..., T]
        r: bool, or 0 and 1.
    attention_mask : Tensor [..., T], optional
        Bool, or 0 and 1: the tokens A that count, by default all. Of none the loss is 0.

    Returns
    -------
    Tensor
        0-d, float32 (float64 for float64). The paper adds it to the generator's loss with weight 50.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Clark et al., ELECTRA, ICLR 2020, arXiv:2003.10555, section 2.
    """
    op = "replaced_token_loss"
    check_float(op, logits=logits)
    others = {"replaced": replaced} | ({} if attention_mask is None else {"attention_mask": attention_mask})
    check_tensor(op, **others)
    for name, t in others.items():
        if t.shape != logits.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected {tuple(logits.shape)}, like logits")
    d = wide(logits)
    of_token = F.binary_cross_entropy_with_logits(d, replaced.to(d.dtype), reduction="none")
    share = torch.ones_like(d) if attention_mask is None else attention_mask.to(d.dtype)
    return (of_token * share).sum() / share.sum().clamp(min=1)
