"""The example of images and texts on real digits, with fewer of everything."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("sklearn")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "clip_digits.py"


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("clip_digits", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["clip_digits"] = module
    spec.loader.exec_module(module)
    return module


example: Any = _example()


# ---- the data -------------------------------------------------------------------------------------------------------


def test_held_out_texts_do_not_occur_in_training() -> None:
    for seed in range(3):
        texts = example.describe(seed)
        assert texts.held_out.keys() == {example.WORDING, example.SUMS}
        trained = {text for of_digit in texts.train for text in of_digit}
        held = [text for kind in texts.held_out.values() for of_digit in kind for text in of_digit]
        assert not trained & set(held) and len(set(held)) == len(held)
        assert sum(map(len, texts.train)) == len(trained), "a text stands for two digits"
        for digit in range(10):  # a sum that is held out in words is so in numerals
            sums = texts.held_out[example.SUMS][digit]
            assert len(sums) == (2 if digit == 0 else 4)
            assert sum(any(ch.isdigit() for ch in text) or "10" in text for text in sums) == len(sums) / 2
    assert example.describe(0) == example.describe(0) != example.describe(1)


def test_sums_mean_their_digit() -> None:
    """By arithmetic on the words, independent of how they were made."""
    value = {word: i for i, word in enumerate(example.NUMBERS)} | {str(i): i for i in range(11)}
    ups, downs = ("after", "plus", "more", "follows"), ("before", "minus", "less", "precedes")
    texts = example.describe(0)
    seen = 0
    for digits in (texts.train, texts.held_out[example.SUMS]):
        for digit, of_digit in enumerate(digits):
            for text in of_digit:
                words = text.split()
                sign = any(w in ups for w in words) - any(w in downs for w in words)
                if sign:
                    seen += 1
                    # of "one more than two" and "two plus one" the other number
                    numbers = [value[w] for w in words if w in value]
                    if len(numbers) == 2:
                        numbers.remove(1)
                    assert numbers[0] + sign == digit, text
    assert seen == 2 * (4 + 9 * 8)


def test_unknown_words_and_padding() -> None:
    vocabulary = example.Vocabulary(["the digit two", "two"])
    assert len(vocabulary) == 5
    ids = vocabulary.encode(["two", "the purple two"])
    index = vocabulary.index
    assert ids.tolist() == [[index["two"], 0, 0], [index["the"], 1, index["two"]]]
    assert min(index.values()) == 2


def test_splits_are_apart_and_hold_every_digit() -> None:
    splits = example.load()
    assert [len(split.labels) for split in splits] == [1000, 200, 597]
    for split in splits:
        assert split.images.shape[1:] == (1, 8, 8) and 0.0 <= split.images.min() < split.images.max() <= 1.0
        assert (torch.bincount(split.labels) > len(split.labels) / 12).all()
    rows = [tuple(image.flatten().tolist()) for split in splits for image in split.images]
    assert len(set(rows)) == len(rows), "an image is in two splits"


# ---- the model ------------------------------------------------------------------------------------------------------


def test_padding_does_not_change_a_text() -> None:
    torch.manual_seed(0)
    model = example.Towers(20).eval()
    alone, padded = torch.tensor([[5, 7, 9]]), torch.tensor([[5, 7, 9, 0, 0], [3, 4, 5, 6, 7]])
    torch.testing.assert_close(model.encode_text(alone)[0], model.encode_text(padded)[0])
    torch.testing.assert_close(model.encode_text(padded).norm(dim=1), torch.ones(2))


def _with_positives(x: Tensor, y: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Each side's mean over all fitting pairs, by a matrix."""
    logits = scale * x @ y.T
    same = (labels[:, None] == labels).double()
    rows = -(logits.log_softmax(1) * same).sum(1) / same.sum(1)
    columns = -(logits.log_softmax(0) * same).sum(0) / same.sum(0)
    return 0.5 * (rows.mean() + columns.mean())


@pytest.mark.parametrize("name", example.LOSSES)
def test_losses_are_what_they_are_called(name: str) -> None:
    torch.manual_seed(1)
    model = example.Towers(4, bias=name == example.SIGLIP).double()
    x, y = (functional.normalize(torch.randn(12, 8, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2))
    labels = torch.arange(12) % 4
    loss = example.loss_of(name, model, x, y, labels)
    scale = model.scale
    if name == example.SIGLIP:
        sign = 2.0 * torch.eye(12, dtype=torch.float64) - 1.0
        want = -functional.logsigmoid(sign * (scale * x @ y.T + model.bias)).sum() / 12
    elif name == example.CLIP:
        want = example.formula(x, y, scale)
    else:
        want = _with_positives(x, y, labels, scale)
    torch.testing.assert_close(loss, want)
    leaves = [x, y, model.log_scale]
    for got, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_best_loss_of_repeated_digits_is_the_log_of_their_number() -> None:
    """What the module's text says of a batch with k pairs of each digit."""
    digits = torch.eye(4, dtype=torch.float64)[torch.arange(12) % 4]
    assert float(example.tlkernels.nn.CLIPLoss()(digits, digits, 100.0)) == pytest.approx(
        torch.tensor(3.0).log().item()
    )


def test_the_loss_is_the_formula() -> None:
    assert example.difference(60) < example.MOST_DIFFERENCE


def test_scores_are_counted_right() -> None:
    """A model that knows half of the digits, and texts of which some lie."""

    class Known(torch.nn.Module):
        def encode_image(self, images: Tensor) -> Tensor:
            return functional.one_hot(images.long(), 10).float()

        def encode_text(self, ids: Tensor) -> Tensor:
            return functional.one_hot(ids, 10).float()

    class Numbers:
        def encode(self, texts: list[str]) -> Tensor:
            return torch.tensor([int(text) for text in texts])

    digits = torch.arange(10)
    images = example.Split(torch.cat([digits, (digits + 1) % 10]), digits.repeat(2))  # the second half is wrong
    known = example.Split(digits, digits)
    right = [[str(d)] * 3 for d in range(10)]
    lying = [[str(d), str((d + 2) % 10), str(d), str(d)] for d in range(10)]
    texts = example.Texts(right, {example.WORDING: lying, example.SUMS: [[str((d + 1) % 10)] for d in range(10)]})
    of_images, of_texts = example.score(Known(), Numbers(), images, known, texts)
    # the texts for sums are those of the next digit, which is what the wrong half shows
    assert of_images == {example.KNOWN: 0.5, example.WORDING: 0.5, example.SUMS: 0.5}
    assert of_texts == {example.KNOWN: 1.0, example.WORDING: 0.75, example.SUMS: 0.0}


def test_training_is_reproducible_and_learns() -> None:
    images, validation, _ = example.load()
    texts = example.describe(0)

    def run(seed: int, epochs: int) -> Any:
        return example.train(example.CLIP, images, texts, epochs=epochs, seed=seed)

    assert run(1, 1)[2] == run(1, 1)[2] != run(2, 1)[2]
    model, vocabulary, losses = run(0, 20)
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])
    of_images, of_texts = example.score(model, vocabulary, validation, images, texts)
    assert of_images[example.KNOWN] > 0.9 and of_images[example.WORDING] > 0.9
    assert of_texts[example.WORDING] > 0.9


# ---- what it says ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters of memory")
def test_the_formula_stores_four_matrices() -> None:
    batch = 1024
    stored = example.peak_memory(example.EAGER, batch)
    assert 0.9 * 16 * batch**2 < stored < 2.5 * 16 * batch**2


def test_a_memory_that_cannot_be_measured_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's counters of memory")
    with pytest.raises(RuntimeError, match="the memory of 'nobody' could not be measured"):
        example.peak_memory("nobody", 64)


def _result(name: str, accuracy: float) -> Any:
    of = {kind: [accuracy] for kind in example.KINDS}
    return example.Result(name, of, dict(of), [2.0, 1.0], [1.0])


def test_complaints() -> None:
    memory = {example.OURS: {512: 100, 1024: 200}, example.EAGER: {512: 90, 1024: 900}}
    fine = [_result(name, 0.95) for name in example.LOSSES]
    assert example.complaints(fine, memory, 1e-7) == [] == example.complaints(fine, {}, 1e-7)
    assert len(example.complaints([*fine[:2], _result(example.SIGLIP, 0.5)], memory, 1e-7)) == 2
    assert len(example.complaints([_result(example.CLIP, float("nan"))], memory, 1e-7)) == 2
    assert "differs from the formula by 1.0e-02" in example.complaints(fine, memory, 1e-2)[0]
    more = {example.OURS: {1024: 900}, example.EAGER: {1024: 900}}
    assert example.complaints(fine, more, 1e-7) == ["batch 1024: 900 bytes; the formula takes 900"]


def test_the_whole_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(example, "SHORT_SIZE", example.Size(epochs=2, seeds=1, batches=(64, 128)))
    monkeypatch.setattr(example, "peak_memory", lambda name, batch: batch * (100 if name == example.OURS else 1000))
    picture, numbers = tmp_path / "c.png", tmp_path / "c.json"
    arguments = ["--short", "--seeds", "2", "--output", str(picture), "--json", str(numbers)]
    assert example.main(arguments) == 1, "two epochs are too few, and it says so"
    assert picture.read_bytes().startswith(b"\x89PNG")
    record = json.loads(numbers.read_text())
    assert [r["name"] for r in record["results"]] == list(example.LOSSES)
    for result in record["results"]:
        assert all(len(result[side][kind]) == 2 for side in ("images", "texts") for kind in example.KINDS)
        assert len(result["losses"]) == 8 and len(result["seconds"]) == 2
    assert record["memory"] == {example.OURS: {"64": 6400, "128": 12800}, example.EAGER: {"64": 64000, "128": 128000}}
    assert 0.9 < record["pixels"] < 1.0 and record["difference"] < 1e-4
    out, err = capsys.readouterr()
    assert "Peak memory" in out and "clip_digits: CLIP: " in err


def test_a_wrong_number_of_seeds_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["--seeds", "0"])
    assert "--seeds 0: expected 1 or more" in capsys.readouterr().err
