"""The example of pre-training without labels on real digits, with less of everything."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "simclr_digits.py"


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simclr_digits", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["simclr_digits"] = module
    spec.loader.exec_module(module)
    return module


example: Any = _example()


@pytest.fixture(scope="module")
def data() -> Any:
    return example.load()


# ---- the data -------------------------------------------------------------------------------------------------------


def test_splits_are_apart_and_hold_every_digit(data: Any) -> None:
    splits = (data.train, data.validation, data.test)
    assert [len(split.labels) for split in splits] == [1000, 200, 597]
    for split in splits:
        assert split.images.shape[1:] == (1, 8, 8) and 0.0 <= split.images.min() < split.images.max() <= 1.0
        assert (torch.bincount(split.labels) > len(split.labels) / 12).all()
    rows = [tuple(image.flatten().tolist()) for split in splits for image in split.images]
    assert len(set(rows)) == len(rows), "an image is in two splits"


def test_few_labels_are_so_many_of_each_digit(data: Any) -> None:
    for labels in example.LABELS:
        chosen = example.few(data.train, labels, seed=3)
        assert torch.bincount(chosen.labels).tolist() == [labels] * 10
        index = {tuple(i.flatten().tolist()): y for i, y in zip(data.train.images, data.train.labels, strict=True)}
        for image, label in zip(chosen.images, chosen.labels, strict=True):
            assert index[tuple(image.flatten().tolist())] == label
    first, again, other = (example.few(data.train, 5, seed).images for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="few: labels is 500; expected at most"):
        example.few(data.train, 500, 0)


def test_views_differ_but_stay_near(data: Any) -> None:
    images = data.train.images[:200]
    views = example.augment(images, torch.Generator().manual_seed(0))
    again = example.augment(images, torch.Generator().manual_seed(0))
    assert views.shape == images.shape and torch.equal(views, again)
    assert not torch.equal(views, example.augment(images, torch.Generator().manual_seed(1)))

    def centred(x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1) - x.flatten(1).mean(1, keepdim=True)
        return flat / flat.norm(dim=1, keepdim=True)

    own = (centred(views) * centred(images)).sum(1)
    other = (centred(views) * centred(images.roll(1, 0))).sum(1)
    assert other.mean() + 0.1 < own.mean() and own.max() < 0.999


def test_a_view_is_no_mirror_image() -> None:
    """A bar on the left stays there: shifts are of a pixel or so, and nothing is flipped."""
    images = torch.zeros(64, 1, 8, 8)
    images[:, :, 1:7, 1:3] = 1.0
    views = example.augment(images, torch.Generator().manual_seed(0))
    assert (views[..., :4].sum((1, 2, 3)) > views[..., 4:].sum((1, 2, 3)) + 2).float().mean() > 0.95


# ---- pre-training ---------------------------------------------------------------------------------------------------


def test_pretraining_sees_no_labels_and_is_reproducible(data: Any) -> None:
    assert list(inspect.signature(example.pretrain).parameters) == ["images", "epochs", "seed", "tick"]
    done: list[float] = []
    images = data.train.images[:500]
    encoder, losses = example.pretrain(images, epochs=2, seed=1, tick=done.append)
    assert not encoder.training and done == [0.25, 0.5, 0.75, 1.0] and len(losses) == 4
    assert losses == example.pretrain(images, epochs=2, seed=1)[1] != example.pretrain(images, epochs=2, seed=2)[1]
    assert abs(losses[0] - math.log(2 * 250 - 1)) < 1.0, "no view is known yet"


def test_pretraining_helps_a_linear_probe(data: Any) -> None:
    """Against the same encoder with its first weights, on the validation images."""
    torch.manual_seed(0)
    random = example.Encoder()
    random(data.train.images)  # for the statistics of its normalization
    trained, losses = example.pretrain(data.train.images, epochs=10, seed=0)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    chosen = example.few(data.train, 5, 0)
    scores = []
    for encoder in (random, trained):
        known = example.features(encoder, data.validation.images)
        scores.append(
            example.probe(example.features(encoder, chosen.images), chosen.labels, known, data.validation.labels)
        )
    assert scores[1] > scores[0] + 0.02 and scores[1] > 0.75, scores


def test_scratch_learns_from_its_labels(data: Any) -> None:
    accuracy = example.from_scratch(example.few(data.train, 10, 0), data.validation, steps=40, seed=0)
    assert accuracy > 0.6


def test_probe_is_the_accuracy_of_a_linear_model() -> None:
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    assert example.probe(x[:200], y[:200], x[200:], y[200:]) > 0.95
    assert example.probe(x[:200], y[:200], x[200:], 1 - y[200:]) < 0.05


# ---- what it says ---------------------------------------------------------------------------------------------------


def _results(ours: float, scratch: float) -> list[Any]:
    numbers = {example.PRETRAINED: ours, example.SCRATCH: scratch, example.PIXELS: 0.99}
    return [example.Result(name, {n: [value] for n in example.LABELS}) for name, value in numbers.items()]


def test_complaints() -> None:
    falling, rising = [3.0] * 8 + [1.0] * 8, [1.0] * 8 + [3.0] * 8
    assert example.complaints(_results(0.9, 0.8), falling) == []
    worse = example.complaints(_results(0.8, 0.8), falling)
    assert len(worse) == len(example.JUDGED)
    assert worse[0] == "1 labels of each digit: pre-training has 0.800, scratch 0.800"
    assert len(example.complaints(_results(float("nan"), 0.8), falling)) == len(example.JUDGED)
    assert len(example.complaints(_results(0.9, 0.8), rising)) == 1
    uneven = _results(0.9, 0.8)
    uneven[0].accuracies[5] = [0.9, 0.5]
    assert len(example.complaints(uneven, falling)) == 1, "means are compared"
    assert uneven[0].spread(5) == pytest.approx(0.4 / math.sqrt(2))


def test_the_whole_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(example, "SHORT_SIZE", example.Size(epochs=2, steps=5, seeds=1))
    picture, numbers = tmp_path / "s.png", tmp_path / "s.json"
    arguments = ["--short", "--seeds", "2", "--split", "validation", "--output", str(picture), "--json", str(numbers)]
    status = example.main(arguments)
    assert picture.read_bytes().startswith(b"\x89PNG")
    record = json.loads(numbers.read_text())
    assert record["split"] == "validation" and len(record["loss"]) == 8
    assert [r["name"] for r in record["results"]] == [example.PRETRAINED, example.SCRATCH, example.PIXELS]
    for result in record["results"]:
        assert {int(n): len(found) for n, found in result["accuracies"].items()} == dict.fromkeys(example.LABELS, 2)
    out, err = capsys.readouterr()
    assert example.PRETRAINED in out
    assert status == (1 if err else 0)


def test_losing_to_scratch_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "plot", lambda *_: None)
    for ours, status in ((0.9, 0), (0.7, 1)):
        monkeypatch.setattr(example, "measure", lambda *_, ours=ours: (_results(ours, 0.8), [2.0, 2.0, 2.0, 2.0, 1.0]))
        assert example.main(["--output", str(tmp_path / "s.png")]) == status
        assert ("pre-training has 0.700, scratch 0.800" in capsys.readouterr().err) == bool(status)


def test_a_wrong_number_of_seeds_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["--seeds", "0"])
    assert "--seeds 0: expected 1 or more" in capsys.readouterr().err
