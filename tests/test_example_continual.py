"""The example of continual learning on real digits, with less of everything."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tlkernels.methods import continual

pytest.importorskip("sklearn")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "continual_digits.py"


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("continual_digits", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["continual_digits"] = module
    spec.loader.exec_module(module)
    return module


example: Any = _example()


def test_the_short_run_keeps_its_promise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, record = tmp_path / "plot.png", tmp_path / "runs.json"
    assert example.main(["--short", "--workers", "1", "--output", str(plot), "--json", str(record)]) == 0
    out = capsys.readouterr().out
    assert "split digits" in out and "DER++" in out and f"written: {plot}" in out
    assert plot.stat().st_size > 10_000
    rows = json.loads(record.read_text())
    assert [row["method"] for row in rows] == ["naive", "EWC", "DER++"] and len(rows[0]["runs"]) == 2


@pytest.mark.parametrize("name", ["EWC", "online EWC", "SI", "MAS", "A-GEM", "DER++", "LwF"])
def test_methods_forget_less_on_permuted_digits(name: str) -> None:
    """Two epochs, one seed: the first task is kept better than by naive training, and nothing is NaN."""
    setting = replace(example.SETTINGS["permuted"], epochs=4, hidden=100)
    naive, kept = (example.learn(setting, n, 100) for n in ("naive", name))
    assert kept.forgetting() < naive.forgetting() + 0.02, name
    assert 0.3 < kept.average_accuracy() <= 1.0


def test_joint_training_is_the_ceiling() -> None:
    setting = replace(example.SETTINGS["split"], epochs=5)
    assert example.learn(setting, "joint", 0).average_accuracy() > 0.95


def test_what_is_not_kept_is_said() -> None:
    def row(method: str, accuracy: float) -> Any:
        runs = []
        for seed in range(2):
            matrix = continual.AccuracyMatrix(5)
            for task in range(5):
                matrix.update(task, [accuracy + 0.01 * seed] * 5)
            runs.append(matrix)
        return example.Row("split", method, runs)

    rows = [row("naive", 0.6), row("EWC", 0.6), row("SI", 0.9), row("online EWC", 0.5)]
    assert len(example.complaints(rows)) == 1 and "EWC gains 0.000" in example.complaints(rows)[0]
    assert example.gains(rows)["split", "SI"][0] == pytest.approx(0.3)


def test_streams_are_what_they_are_called() -> None:
    split, permuted = (example.stream_of(name, 0) for name in ("split", "permuted"))
    assert len(split) == len(permuted) == 5
    assert all(int(task.mask.sum()) == 2 for task in split) and all(bool(task.mask.all()) for task in permuted)
    first, second = permuted[0], permuted[1]
    assert torch.equal(first.test_inputs.sort(1).values, second.test_inputs.sort(1).values)
    assert not torch.equal(first.test_inputs, second.test_inputs)


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["--seeds", "0"])
    assert "--seeds 0: expected 1 or more" in capsys.readouterr().err
