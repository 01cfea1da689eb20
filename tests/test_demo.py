"""The demo on real data: real weights, real sentences, and thresholds that a broken method misses."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import tlkernels

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "nf4_minilm.py"


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nf4_minilm", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nf4_minilm"] = module
    spec.loader.exec_module(module)
    return module


demo: Any = _example()


@pytest.fixture(scope="module")
def sample() -> tuple[list[dict[str, Tensor]], list[str]]:
    """Every third sentence: 112 of them, 8 a topic."""
    sentences, topics = demo.load_sentences()
    return demo.tokenize(sentences[::3], 28), topics[::3]


@pytest.fixture(scope="module")
def exact(sample: tuple[list[dict[str, Tensor]], list[str]]) -> Tensor:
    with demo.quiet():
        return demo.embed(demo.build("float32"), sample[0])


@pytest.fixture(scope="module")
def quantized() -> Iterator[torch.nn.Module]:
    with demo.quiet():
        yield demo.build("tlkernels NF4, float32")


def _cosine(got: Tensor, exact: Tensor) -> Tensor:
    return (got * exact).sum(1)


# ---- the data -------------------------------------------------------------------------------------------------------


def test_the_sentences_are_many_balanced_and_different() -> None:
    groups = json.loads(demo.SENTENCES.read_text(encoding="utf-8"))
    sizes = {topic: len(sentences) for topic, sentences in groups.items()}
    assert len(groups) >= 12 and sum(sizes.values()) >= 300
    assert max(sizes.values()) == min(sizes.values()), sizes
    every = [sentence for sentences in groups.values() for sentence in sentences]
    words = [re.findall(r"[\w']+", sentence.lower()) for sentence in every]
    assert len({" ".join(w) for w in words}) == len(every), "a sentence occurs twice"
    assert all(5 <= len(w) <= 40 for w in words)
    assert all(s == s.strip() and s[-1] in ".?!" for s in every)
    openings = [" ".join(w[:3]) for w in words]
    assert max(openings.count(o) for o in set(openings)) <= 4, "sentences made from a template"
    # no two sentences share most of their words
    sets = [set(w) for w in words]
    for i, a in enumerate(sets):
        for j in range(i):
            assert len(a & sets[j]) / len(a | sets[j]) < 0.5, (every[i], every[j])


# ---- the method -----------------------------------------------------------------------------------------------------


def test_float32_embeddings_tell_the_topics_apart(sample: Any, exact: Tensor) -> None:
    accuracy = demo.retrieval_accuracy(exact, sample[1])
    assert accuracy > 0.5, f"chance is {1 / 14:.2f}; the pretrained model reached {accuracy:.2f}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_embeddings_keep_cosine_and_accuracy(
    dtype: torch.dtype, sample: Any, exact: Tensor, quantized: torch.nn.Module
) -> None:
    batches, topics = sample
    with demo.quiet():
        model = quantized if dtype == torch.float32 else demo.build("tlkernels NF4, bfloat16")
        got = demo.embed(model, batches)
    cosine = _cosine(got, exact)
    result = demo.Result("tlkernels", mean_cosine=float(cosine.mean()), worst_cosine=float(cosine.min()))
    result.accuracy = demo.retrieval_accuracy(got, topics)
    dense = demo.Result("float32", accuracy=demo.retrieval_accuracy(exact, topics))
    assert demo.complaints([dense, result]) == []


def test_kernels_and_reference_embed_alike(sample: Any, quantized: torch.nn.Module) -> None:
    got = demo.embed(quantized, sample[0])
    with tlkernels.backend("reference"):
        want = demo.embed(quantized, sample[0])
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_four_bits_are_what_is_stored(quantized: torch.nn.Module) -> None:
    with demo.quiet():
        dense = demo.build("float32")
    assert not any(type(m) in (torch.nn.Linear, torch.nn.Embedding) for m in quantized.modules())
    assert demo.linear_bytes(dense) / demo.linear_bytes(quantized) > 7.4
    assert demo.stored_bytes(dense) / demo.stored_bytes(quantized) > 7.4
    assert demo.stored_bytes(quantized) == pytest.approx(tlkernels.memory_report(quantized).total, rel=1e-3)


# ---- the thresholds can fail ----------------------------------------------------------------------------------------


def _swap_nibbles(module: Any) -> None:
    module.packed.copy_(module.packed << 4 | module.packed >> 4)


def _shift_scales(module: Any) -> None:
    module.absmax.copy_(module.absmax.roll(1))


def _one_code_up(module: Any) -> None:
    low, high = module.packed & 15, module.packed >> 4
    module.packed.copy_((high + 1).clamp(max=15) << 4 | (low + 1).clamp(max=15))


def _no_offset(module: Any) -> None:
    module.absmax_offset.zero_()


@pytest.mark.parametrize("damage", [_swap_nibbles, _shift_scales, _one_code_up, _no_offset])
def test_a_broken_format_is_noticed(damage: Any, sample: Any, exact: Tensor) -> None:
    batches, topics = sample
    with demo.quiet():
        model = demo.build("tlkernels NF4, float32")
    for module in model.modules():
        if isinstance(module, tlkernels.nn.NF4Linear):
            damage(module)
    got = demo.embed(model, batches)
    cosine = _cosine(got, exact)
    broken = demo.Result("tlkernels", mean_cosine=float(cosine.mean()), worst_cosine=float(cosine.min()))
    broken.accuracy = demo.retrieval_accuracy(got, topics)
    assert demo.complaints([demo.Result("float32", accuracy=demo.retrieval_accuracy(exact, topics)), broken])


def test_nan_is_a_complaint() -> None:
    bad = demo.Result("tlkernels", mean_cosine=float("nan"), worst_cosine=float("nan"), accuracy=float("nan"))
    assert len(demo.complaints([demo.Result("float32", accuracy=1.0), bad])) == 3


def test_the_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = [
        demo.Result(n, 4e7, 9e7, 1e8, 50.0 + i, 200.0, 0.97, 0.9, 0.7) for i, n in enumerate(demo.VARIANTS)
    ]  # fmt: skip
    demo.plot(results, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
