"""The instruction-set levels of this machine, and a run of the tests marked `isa` at a lower one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import tlkernels
from tlkernels.ops import _registry

LEVELS = ["scalar", "avx2", "avx512", "avx512_bf16"]


def levels_of_this_machine() -> list[str]:
    """As torch sees the machine, not as tlkernels does."""
    has = torch.cpu.get_capabilities()
    avx2 = all(has.get(flag, False) for flag in ("avx2", "fma3"))
    avx512 = avx2 and all(has.get(f"avx512_{part}", False) for part in ("f", "bw", "vl", "dq"))
    return LEVELS[: 1 + avx2 + avx512 + (avx512 and has.get("avx512_bf16", False))]


def run_capped(level: str, folder: Path, files: Sequence[Path]) -> None:
    """The tests marked `isa` in `files` once more, on the compiled kernels, with the instruction set capped."""
    if _registry.LIBRARIES["cpu"] != "loaded":
        pytest.skip(f"compiled CPU library: {_registry.LIBRARIES['cpu']}")
    capped = {
        "TLKERNELS_CPU_ISA": level,
        "TLKERNELS_REQUIRE": "cpu",
        "PYTHONPATH": str(Path(tlkernels.__file__).parents[1]),
    }
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "--import-mode=importlib", "--tb=short"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-m", "isa", "-k", "cpu", *map(str, files)],
        env={**os.environ, **capped},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    chosen = f"instruction set: {level}: capped by TLKERNELS_CPU_ISA={level}"
    assert chosen in run.stdout, run.stdout[:3000] + run.stderr
    assert run.returncode == 0 and "skipped" not in run.stdout, run.stdout[-8000:]
