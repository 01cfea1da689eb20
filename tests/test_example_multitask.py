"""The example of multi-task learning on real digits, with less of everything."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "multitask_digits.py"


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("multitask_digits", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["multitask_digits"] = module
    spec.loader.exec_module(module)
    return module


example: Any = _example()


def test_the_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, record = tmp_path / "plot.png", tmp_path / "runs.json"
    assert example.main(["--short", "--workers", "1", "--output", str(plot), "--json", str(record)]) == 0
    out = capsys.readouterr().out
    assert "PCGrad" in out and "one network a task" in out and f"written: {plot}" in out
    assert plot.stat().st_size > 10_000
    saved = json.loads(record.read_text())
    assert len(saved["runs"]) == 3 + 4 and set(saved["oracles"]) == set(example.SURGERY)
    assert all(0 <= rate <= 1 for run in saved["runs"] for rate in run["rates"] if rate == rate)


@pytest.mark.parametrize("method", example.Size().methods)
def test_every_method_learns_all_tasks(method: str) -> None:
    run = example.learn(method, 1, replace(example.Size(), epochs=6))
    assert run.scores["digit"] > 0.7 and run.scores["parity"] > 0.8 and run.scores["strokes"] > 0.4
    assert run.scores["reconstruction"] < 0.25 and len(run.rates) == 6


def test_directions_on_recorded_gradients_are_their_oracles() -> None:
    jacobians = example.recorded(seed=3)
    assert any(bool(((J @ J.T) < 0).any()) for J in jacobians), "no conflict was recorded"
    errors = example.oracle_errors(jacobians)
    assert all(errors[m] <= example.LIMITS[m] for m in example.SURGERY), errors


def test_a_wrong_direction_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(example.ops, "mgda_weights", lambda gram: torch.full((4,), 0.25, dtype=torch.float64))
    size = replace(example.SHORT_SIZE, epochs=1, methods=("uniform",))
    monkeypatch.setattr(example, "SHORT_SIZE", size)
    assert example.main(["--short", "--workers", "1", "--output", str(tmp_path / "p.png")]) == 1
    assert "MGDA is" in capsys.readouterr().err


def test_strokes_are_runs_of_ink() -> None:
    image = np.zeros((1, 8, 8))
    image[0, 2:6, 3] = 16  # one upright stroke
    assert example.strokes_of(image).tolist() == [0]
    image[0, 2:6, 5] = 16  # two, side by side
    assert example.strokes_of(image).tolist() == [1]
    image[0, ::2, 0] = 16
    assert example.strokes_of(image).tolist() == [3]


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["--workers", "0"])
    assert "--workers 0: expected 1 or more" in capsys.readouterr().err
