"""The command line: `tlkernels quantize`, `inspect`, `info`, `bench`, in the process and as a process of its own."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import formula
import hypothesis
import numpy as np
import pytest
import safetensors
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import tlkernels
from tlkernels import _safetensors, cli
from tlkernels._checkpoint import DEFAULT_SKIP, matches

#: `python -m tlkernels` where torch is not found: the command needs none, and starts faster.
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from tlkernels.cli import main; sys.exit(main())"


def process(*args: Any, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "model.embed_tokens.weight": randn(50, 64),
        "model.layers.0.q_proj.weight": randn(128, 64, dtype=torch.bfloat16),
        "model.layers.0.q_proj.bias": randn(128),
        "model.layers.0.k_proj.weight": randn(33, 31, dtype=torch.float16),
        "model.layers.1.q_proj.weight": randn(7, 9),
        "model.layers.1.wide.weight": randn(3, 4096 * 700),
        "model.layers.1.double.weight": randn(64, 70, dtype=torch.float64),
        "model.norm.weight": randn(64),
        "conv.weight": randn(4, 3, 5, 5),
        "fp8.weight": randn(16, 16).to(torch.float8_e4m3fn),
        "lm_head.weight": randn(50, 64, dtype=torch.bfloat16),
        "position_ids": torch.arange(50),
        "mask": torch.tensor([True, False, True]),
        "empty.weight": torch.zeros(0, 5),
        "scale": torch.tensor(3.0),
        "stacked": randn(8, 8),
    }


QUANTIZED = {
    "model.layers.0.q_proj.weight", "model.layers.0.k_proj.weight", "model.layers.1.q_proj.weight",
    "model.layers.1.wide.weight", "model.layers.1.double.weight",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "in.safetensors"
    save_file(tensors(), path, metadata={"format": "pt", "note": 'naïve "quotes"'})
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    save_file({"a.weight": torch.randn(8, 64, generator=torch.Generator().manual_seed(1)), "b": torch.ones(3)}, path)
    return path


def run(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in args])
    return code, *capsys.readouterr()


def only_files(folder: Path, *names: str) -> bool:
    return sorted(p.name for p in folder.iterdir()) == sorted(names)


def state(entries: dict[str, Tensor], name: str) -> dict[str, Any]:
    return json.loads(bytes(entries[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))


# ---- quantize: what it writes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [64, 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_quantize(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], nested: bool, block_size: int
) -> None:
    out = tmp_path / "out.safetensors"
    flags = ["--double-quant"] * nested
    code, said, errors = run(capsys, "quantize", source, out, "--block-size", block_size, *flags)
    assert code == 0 and f"in 4 bits {len(QUANTIZED)} tensors" in said and not errors
    assert only_files(tmp_path, "out.safetensors")
    before, after = tensors(), load_file(out)
    assert {n.partition(".quant_state")[0] for n in after if ".quant_state" in n} == QUANTIZED
    for name, tensor in before.items():
        if name not in QUANTIZED:
            assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape
            assert torch.equal(after[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
            continue
        packed, absmax = formula.nf4_quantize(tensor, block_size)
        assert torch.equal(after[name], packed[:, None])
        assert torch.equal(after[f"{name}.quant_map"], formula.NF4)
        numbers = state(after, name)
        dtype = "float32" if tensor.dtype == torch.float64 else str(tensor.dtype).removeprefix("torch.")
        assert numbers["quant_type"] == "nf4" and numbers["shape"] == list(tensor.shape)
        assert numbers["blocksize"] == block_size and numbers["dtype"] == dtype
        if not nested:
            assert torch.equal(after[f"{name}.absmax"], absmax) and "nested_offset" not in numbers
            continue
        q, scale, offset = formula.absmax_quantize(absmax)
        assert torch.equal(after[f"{name}.absmax"], q) and torch.equal(after[f"{name}.nested_absmax"], scale)
        assert torch.equal(after[f"{name}.nested_quant_map"], formula.dynamic_table())
        assert numbers["nested_blocksize"] == 256 and numbers["nested_dtype"] == "float32"
        assert torch.tensor(numbers["nested_offset"]) == offset
    with safetensors.safe_open(out, "np") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt" and metadata["note"] == 'naïve "quotes"'


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_and_our_modules_read_it(source: Path, tmp_path: Path, nested: bool) -> None:
    out = tmp_path / "out.safetensors"
    assert cli.main(["quantize", str(source), str(out), *["--double-quant"] * nested]) == 0
    before, after = tensors(), load_file(out)
    for name in QUANTIZED - {"model.layers.1.wide.weight"}:
        entries = {k.removeprefix(f"{name}."): v for k, v in after.items() if k.startswith(f"{name}.")}
        theirs = bitsandbytes.nn.Params4bit.from_prequantized(after[name], dict(entries), device="cpu")
        assert tuple(theirs.quant_state.shape) == tuple(before[name].shape)
        weight = tlkernels.ops.nf4_quantize(before[name], double_quant=nested)
        dtype = torch.float32 if before[name].dtype == torch.float64 else before[name].dtype
        dense = tlkernels.ops.nf4_dequantize(weight, dtype=dtype)
        if before[name].shape[1] % 64 == 0:  # it decodes no others rightly
            assert torch.equal(bitsandbytes.functional.dequantize_4bit(theirs.data, theirs.quant_state), dense)
        out_features, in_features = before[name].shape
        with torch.device("meta"):
            layer = tlkernels.nn.NF4Linear(in_features, out_features, bias=False)
        layer = layer.to_empty(device="cpu")
        layer.load_state_dict({"weight": after[name]} | {f"weight.{k}": v for k, v in entries.items()}, strict=True)
        assert torch.equal(layer.dequantize().to(dtype), dense)


def test_selection(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def chosen(*flags: str) -> set[str]:
        out = tmp_path / "out.safetensors"
        assert run(capsys, "quantize", source, out, "--force", *flags)[0] == 0
        with safetensors.safe_open(out, "np") as opened:
            return {k.partition(".quant_state")[0] for k in opened.keys() if ".quant_state" in k}  # noqa: SIM118

    assert chosen("--skip", "layers.1") == {n for n in QUANTIZED if "layers.0" in n}
    assert chosen("--skip", "q_proj", "--skip", "wi?e") == QUANTIZED - {
        "model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight", "model.layers.1.wide.weight",
    }  # fmt: skip
    assert chosen("--only", "lm_head", "--only", "stacked") == {"lm_head.weight", "stacked"}
    assert chosen("--only", "layers.*", "--skip", "layers.1") == {n for n in QUANTIZED if "layers.0" in n}
    assert chosen("--min-size", "1024") == QUANTIZED - {"model.layers.0.k_proj.weight", "model.layers.1.q_proj.weight"}


def test_patterns() -> None:
    for name in (
        "model.embed_tokens.weight", "embeddings.word_embeddings.weight", "transformer.wte.weight", "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "lm_head.weight", "embed_out.weight",
        "cls.predictions.decoder.weight",
    ):  # fmt: skip
        assert matches(name, DEFAULT_SKIP), name
    for name in (
        "encoder.layer.0.attention.self.query.weight", "model.layers.3.mlp.shared_expert.down_proj.weight",
        "h.0.attn.c_attn.weight", "cls.predictions.transform.dense.weight",
    ):  # fmt: skip
        assert not matches(name, DEFAULT_SKIP), name
    assert matches("a.layer.1.b", ["layer.1"]) and not matches("a.layer.11.b", ["layer.1"])


def test_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    w = torch.randn(8, 64)
    bad = w.clone()
    bad[2, 3], bad[5, 0], bad[5, 1] = torch.nan, torch.inf, -torch.inf
    save_file({"good.weight": w, "bad.weight": bad}, source)
    for nested in (False, True):
        code, _, errors = run(capsys, "quantize", source, out, "--force", *["--double-quant"] * nested)
        assert code == 0 and errors == "tlkernels: warning: bad.weight has NaN or infinities in 2 blocks\n"
        after = load_file(out)
        assert after["bad.weight.absmax"].dtype == torch.float32 and only_files(tmp_path, source.name, out.name)
        assert after["good.weight.absmax"].dtype == (torch.uint8 if nested else torch.float32)
        dense = formula.nf4_dequantize(
            after["bad.weight"][:, 0], after["bad.weight.absmax"], (8, 64), torch.float32
        )  # the damage stays in its blocks
        assert dense[[0, 1, 3, 4, 6, 7]].isfinite().all() and dense[2].isnan().all()
        assert dense[5, 0] == torch.inf and dense[5, 1] == -torch.inf and dense[5, 2:].isnan().all()
        assert run(capsys, "inspect", out)[0] == 0


# ---- quantize: what it refuses --------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *args: Any) -> str:
    """The one line on stderr of a command that fails and changes nothing in the folder."""
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}
    code, out, errors = run(capsys, *args)
    assert code == 1 and not out and errors.startswith("tlkernels: error: ") and errors.count("\n") == 1
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()} == before
    return errors


def test_refusals(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no tensors here, but a text that is long enough for a header")
    (tmp_path / "there").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(small)

    def why(*args: Any) -> str:
        return refused(capsys, tmp_path, "quantize", *args)

    assert "nowhere: no such file or directory" in why(tmp_path / "nowhere", out)
    assert "folder: is a directory; expected a safetensors file" in why(tmp_path / "folder", out)
    assert "pipe: is not a regular file" in why(tmp_path / "pipe", out)
    assert "not a valid safetensors file" in why(tmp_path / "empty", out)
    assert "not a valid safetensors file" in why(tmp_path / "text", out)
    assert "there: already exists; give --force" in why(small, tmp_path / "there")
    assert "folder: is a directory; expected the name of the file" in why(small, tmp_path / "folder", "--force")
    assert "does not exist" in why(small, tmp_path / "nowhere" / "out.safetensors")
    for same in (small, tmp_path / "link", tmp_path / "folder" / ".." / small.name):
        assert "is the input file itself" in why(small, same, "--force")
    assert "nothing to quantize" in why(small, out, "--skip", "a")
    assert "nothing to quantize" in why(small, out, "--min-size", "513")
    assert run(capsys, "quantize", small, out)[0] == 0
    assert "is quantized already" in why(out, tmp_path / "again.safetensors")


def test_replacing_needs_force(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, link = tmp_path / "out.safetensors", tmp_path / "link"
    out.write_bytes(b"old")
    link.symlink_to(out)
    assert run(capsys, "quantize", small, link, "--force")[0] == 0
    assert link.is_symlink() and "a.weight.absmax" in load_file(out)  # what the link stands for was replaced
    mask = os.umask(0)
    os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("flags", [["--block-size", "48"], ["--block-size", "x"], ["--min-size", "-1"], ["--what"]])
def test_wrong_usage(small: Path, tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quantize", str(small), str(tmp_path / "out"), *flags])
    assert stopped.value.code == 2 and only_files(tmp_path, small.name)


def craft(path: Path, header: bytes | dict[str, Any], data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "U8", shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header, data",
    [
        (b'{"a":' + json.dumps(entry(0, 4)).encode() + b',"a":' + json.dumps(entry(0, 4)).encode() + b"}", 4),
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4),
        ({"a": entry(0, 4), "b": entry(6, 8)}, 8),
        ({"a": entry(0, 4)}, 3),
        ({"a": entry(0, 4)}, 5),
        ({"a": entry(4, 0, shape=(4,))}, 4),
        ({"a": entry(0, 4, "F32", (2,))}, 4),
        ({"a": entry(0, 4, "F7")}, 4),
        ({"a": entry(0, 4, shape=(-4,))}, 4),
        ({"a": entry(0, 2**63, shape=(2**63,))}, 4),
        ({"a": entry(0, 0, shape=(2**40, 2**40))}, 0),
        ({"a": {"dtype": "U8", "shape": [4]}}, 4),
        ({"a": 3}, 0),
        ({"__metadata__": {"n": 3}, "a": entry(0, 4)}, 4),
        (b"[]", 0),
        (b"[" * 100_000, 0),
        (b'{"a', 0),
        (b"\xff\xfe", 0),
    ],
    ids=range(19),
)
def test_bad_headers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], header: bytes | dict[str, Any], data: int
) -> None:
    bad = craft(tmp_path / "bad.safetensors", header, b"\0" * data)
    assert "not a valid safetensors file" in refused(capsys, tmp_path, "quantize", bad, tmp_path / "out")
    assert "not a valid safetensors file" in refused(capsys, tmp_path, "inspect", bad)


def test_truncated_anywhere(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, bad = small.read_bytes(), tmp_path / "bad.safetensors"
    for size in [*range(0, 300, 7), *range(300, len(whole), 211), len(whole) - 1]:
        bad.write_bytes(whole[:size])
        assert "not a valid safetensors file" in refused(capsys, tmp_path, "quantize", bad, tmp_path / "out"), size


def test_cut_short_while_being_read(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = _safetensors._check_header

    def check_then_cut(path: Path) -> None:
        check(path)
        os.truncate(path, path.stat().st_size - 100)

    monkeypatch.setattr(_safetensors, "_check_header", check_then_cut)
    code, _, errors = run(capsys, "quantize", small, tmp_path / "out")
    assert code == 1 and "it was cut short while being read" in errors and only_files(tmp_path, small.name)


@hypothesis.given(bit=st.integers(0, 8 * (8 + 152) - 1))
def test_flipped_bits_in_a_header(bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Either it is refused, and nothing is written, or what was written is whole."""
    folder = tmp_path_factory.mktemp("flipped")
    source, out = folder / "in.safetensors", folder / "out.safetensors"
    save_file({"a.weight": torch.randn(8, 64), "b": torch.ones(3)}, source)
    data = bytearray(source.read_bytes())
    assert int.from_bytes(data[:8], "little") >= 120
    data[bit // 8] ^= 1 << bit % 8
    source.write_bytes(data)
    code = cli.main(["quantize", str(source), str(out)])
    assert code == (0 if out.exists() else 1)
    assert only_files(folder, *[source.name] + [out.name] * out.exists())
    if out.exists():
        assert cli.main(["inspect", str(out)]) == 0


# ---- quantize: memory, interrupts, full disks -----------------------------------------------------------------------


def large(path: Path, mebibytes: int) -> Path:
    """One huge float32 matrix: nothing of it may be held as a whole."""
    rows = mebibytes * 2**20 // 4 // 4096
    text = json.dumps({"huge.weight": entry(0, rows * 4096 * 4, "F32", (rows, 4096))}).encode()
    row = np.linspace(-1, 1, 2**18, dtype="<f4").tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(mebibytes):
            file.write(row)
    return path


def peak(*args: Any) -> int:
    """Largest resident set, in bytes, of a command that succeeds."""
    running = process(*args)
    _, status, usage = os.wait4(running.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, running.stderr and running.stderr.read()
    return usage.ru_maxrss * 1024


@pytest.mark.parametrize("flags", [[], ["--double-quant"]])
def test_memory_is_bounded(tmp_path: Path, small: Path, flags: list[str]) -> None:
    source = large(tmp_path / "large.safetensors", 320)
    base = peak("quantize", small, tmp_path / "small.out", *flags)
    used = peak("quantize", source, tmp_path / "out", *flags) - base
    # pieces of 4 MiB, and scales: 1/64 of the elements, 4 or 5 bytes each, held once or twice
    assert used < 40 * 2**20, f"{used / 2**20:.0f} MiB for a file of 320 MiB"
    assert peak("inspect", tmp_path / "out") - base < 20 * 2**20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    source, folder = large(tmp_path / "in.safetensors", 600), tmp_path / "target"
    folder.mkdir()
    running = process("quantize", source, folder / "out", env={**os.environ, "TLKERNELS_CPU_ISA": "scalar"})
    deadline = time.monotonic() + 60
    while not any(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert any(p.suffix == ".tmp" for p in folder.iterdir()), "it never began"
    running.send_signal(number)
    running.send_signal(number)  # an impatient second one
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + number and only_files(folder)
    assert errors.splitlines()[-1].endswith("nothing was left behind") and "Traceback" not in errors


def test_interrupted_at_every_step(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupt in any of the calls that touch the disk leaves nothing, or the finished file."""
    out = tmp_path / "out.safetensors"
    for name in ("open", "posix_fallocate", "pwrite", "fsync", "close", "replace"):
        for when in ("before", "after"):
            real = getattr(os, name)

            def strike(*args: Any, real: Callable[..., Any] = real, when: str = when, **kwargs: Any) -> Any:
                monkeypatch.undo()
                result = real(*args, **kwargs) if when == "after" else None
                signal.raise_signal(signal.SIGINT)
                return result

            monkeypatch.setattr(os, name, strike)
            assert cli.main(["quantize", str(small), str(out)]) == 130, name
            monkeypatch.undo()
            if out.exists():
                assert (name, when) == ("replace", "after") and run(capsys, "inspect", out)[0] == 0
                out.unlink()
            assert only_files(tmp_path, small.name), (name, when)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as it was before


@pytest.mark.parametrize("at", ["posix_fallocate", "pwrite", "fsync"])
def test_disk_full(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: str
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, at, full)
    said = refused(capsys, tmp_path, "quantize", small, tmp_path / "out")
    assert "cannot be written: no space left on device; nothing was left behind" in said


def test_the_system_refuses_to_write(tmp_path: Path, source: Path) -> None:
    """A real limit on the size of files, which no check can foresee."""
    limit = 1 << 20
    running = process(
        "quantize", source, tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 1 and "file too large; nothing was left behind" in errors and only_files(tmp_path)


def test_where_space_cannot_be_reserved(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*args: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert run(capsys, "quantize", small, tmp_path / "out")[0] == 0
    assert run(capsys, "inspect", tmp_path / "out")[0] == 0


def test_a_place_where_no_file_can_be(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, tmp_path, "quantize", small, "/proc/out.safetensors")
    assert "/proc/out.safetensors: cannot be written: " in said


# ---- inspect --------------------------------------------------------------------------------------------------------


def test_inspect(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    run(capsys, "quantize", source, out, "--double-quant")
    code, said, errors = run(capsys, "inspect", out)
    assert code == 0 and not errors and "checksums: verified" in said
    lines = {line.split()[0]: line for line in said.splitlines() if line}
    assert "128x64" in lines["model.layers.0.q_proj.weight"] and "bfloat16" in lines["model.layers.0.q_proj.weight"]
    assert "nf4, blocks of 64, double-quantized" in lines["model.layers.0.k_proj.weight"]
    assert "as is" in lines["lm_head.weight"] and "scalar" in lines["scale"]
    numel = sum(t.numel() for n, t in tensors().items() if n in QUANTIZED)
    stored = sum(
        t.numel() * t.element_size() for n, t in load_file(out).items() if any(n.startswith(q) for q in QUANTIZED)
    )
    assert f"{len(QUANTIZED)} of them in 4 bits" in said and f"{8 * stored / numel:.3f} bits per weight" in said
    code, said, _ = run(capsys, "inspect", source)
    assert code == 0 and "checksums: none" in said and "in 4 bits" not in said


def test_every_flipped_bit_is_found(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, bad = tmp_path / "out.safetensors", tmp_path / "bad.safetensors"
    run(capsys, "quantize", small, out, "--double-quant")
    whole = out.read_bytes()
    rng = np.random.default_rng(0)
    for byte in {*range(8), *rng.integers(0, len(whole), 300).tolist(), len(whole) - 1}:
        flipped = bytearray(whole)
        flipped[byte] ^= 1 << int(rng.integers(8))
        bad.write_bytes(flipped)
        code, _, errors = run(capsys, "inspect", bad)
        assert code == 1 and errors.startswith("tlkernels: error: "), byte


def test_inspect_names_the_damaged_tensor(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    run(capsys, "quantize", small, out)
    with _safetensors.Reader(out) as reader:
        place = len(reader.header) + 8 + reader.tensors["a.weight"].begin
    data = bytearray(out.read_bytes())
    data[place] ^= 1
    out.write_bytes(data)
    code, said, errors = run(capsys, "inspect", out)
    assert code == 1 and "a.weight: the data does not match its checksum" in errors and errors.count("\n") == 1
    assert "checksums: verified" not in said


def quantized_entries() -> dict[str, Tensor]:
    layer = tlkernels.nn.NF4Linear.from_linear(torch.nn.Linear(64, 40, bias=False), double_quant=True)
    return {k: v.clone() for k, v in layer.state_dict().items()}


def numbers_with(**changes: Any) -> Tensor:
    numbers = json.loads(bytes(quantized_entries()["weight.quant_state.bitsandbytes__nf4"].tolist()))
    return torch.tensor(list(json.dumps({**numbers, **changes}).encode()), dtype=torch.uint8)


STATE = "weight.quant_state.bitsandbytes__nf4"
BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "absmax gone": ({"weight.absmax": None}, "weight: absmax is missing"),
    "absmax short": ({"weight.absmax": torch.zeros(39, dtype=torch.uint8)}, "absmax has 39 elements; expected 40"),
    "absmax float16": ({"weight.absmax": torch.zeros(40).half()}, "absmax has dtype F16; expected U8 or F32"),
    "codes short": (
        {"weight": torch.zeros(1279, 1, dtype=torch.uint8)},
        "the tensor of codes has 1279 bytes; expected 1280",
    ),
    "codes gone": ({"weight": None}, "the tensor of codes is missing"),
    "table": ({"weight.quant_map": torch.zeros(15)}, "quant_map has 15 elements; expected 16"),
    "table nan": (
        {"weight.quant_map": torch.full((16,), torch.nan)},
        "weight.quant_map has entries that are not finite",
    ),
    "nested gone": ({"weight.nested_absmax": None}, "nested_absmax is missing"),
    "nested table": ({"weight.nested_quant_map": torch.zeros(16)}, "nested_quant_map has 16 elements; expected 256"),
    "not JSON": ({STATE: torch.zeros(5, dtype=torch.uint8)}, "is not JSON"),
    "not an object": ({STATE: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "is not a JSON object"),
    "deep": ({STATE: torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)}, "is not JSON"),
    "shape": ({STATE: numbers_with(shape=[40, 65])}, "the tensor of codes has 1280 bytes; expected 1300"),
    "shape text": ({STATE: numbers_with(shape="40")}, "shape is '40'; expected a list of sizes"),
    "block size": ({STATE: numbers_with(blocksize=0)}, "blocksize is 0; expected a positive integer"),
    "offset": ({STATE: numbers_with(nested_offset=None)}, "nested_offset is None; expected a finite number"),
    "state gone": ({STATE: None}, "weight.absmax: has no weight.quant_state.bitsandbytes__nf4 beside it"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_inspect_finds_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    changes, message = BROKEN[case]
    path = tmp_path / "x.safetensors"
    save_file({k: v for k, v in {**quantized_entries(), **changes}.items() if v is not None}, path)
    code, _, errors = run(capsys, "inspect", path)
    assert code == 1 and message in errors and "Traceback" not in errors
    save_file(quantized_entries(), path)
    assert run(capsys, "inspect", path)[0] == 0


def test_inspect_reads_what_bitsandbytes_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("nf4", "fp4"):
        w = torch.randn(64, 128).bfloat16()
        packed, quant_state = bitsandbytes.functional.quantize_4bit(w, quant_type=kind, compress_statistics=True)
        entries = {"x.weight": packed} | {f"x.weight.{k}": v for k, v in quant_state.as_dict(packed=True).items()}
        save_file(entries, tmp_path / kind)
        code, said, errors = run(capsys, "inspect", tmp_path / kind)
        assert code == 0 and not errors and f"{kind}, blocks of 64, double-quantized" in said


# ---- info, bench, and the process -----------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = run(capsys, "info")
    assert code == 0 and torch.__version__ in said and tlkernels.__version__ in said
    rows = [line.split() for line in said.splitlines()]
    for row in tlkernels.backends():
        assert any(r[:3] == [row.op, row.device, row.backend] and row.gradient in r for r in rows), row
    for name in ("numpy", "cpu", "cuda", "triton"):
        assert any(r[:1] == [name] for r in rows), name


def test_info_without_torch() -> None:
    said, errors = process("info").communicate(timeout=60)
    assert "torch is not installed" in said and "threads, numpy" in said and "Traceback" not in errors


def test_the_reader_of_the_output_may_leave() -> None:
    running = process("info")
    assert running.stdout and running.stderr
    running.stdout.close()
    assert "Traceback" not in running.stderr.read() and running.wait(60) in (0, 1)


def test_module_and_version() -> None:
    done = subprocess.run([sys.executable, "-m", "tlkernels", "--version"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == f"tlkernels {tlkernels.__version__}"


def test_bench_outside_a_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_PACKAGE", tmp_path / "site-packages" / "tlkernels")
    code, _, errors = run(capsys, "bench", "--family", "nf4")
    assert code == 1 and "part of the source tree" in errors


def test_bench_forwards_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "bench" / "__main__.py").write_text(
        "import sys; assert __name__ == '__main__'; sys.exit(sys.argv[1:] != ['--family', 'nf4', '-h'])"
    )
    other = tmp_path / "other" / "bench"  # the working directory must not win
    other.mkdir(parents=True)
    (other / "__main__.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(other.parent)
    monkeypatch.setattr(cli, "_PACKAGE", tmp_path / "tlkernels")
    assert cli.main(["bench", "--family", "nf4", "-h"]) == 0
    assert cli.main(["bench", "--family"]) == 1
