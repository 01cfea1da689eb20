"""What the installed wheel holds. ``TLKERNELS_WHEEL`` names the file; test_wheel.sh installs it and runs this.

The ops are tested by tests/ops, which runs in the same environment.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import tlkernels

pytestmark = pytest.mark.packaging

SITE_PACKAGES = Path(sysconfig.get_path("purelib")).resolve()
CUDA_TARGETS = {80, 90, 100, 120}  # the default ones of CMakeLists.txt


@pytest.fixture(scope="module")
def wheel() -> str:
    """The file's name, which says for what it is: pure Python ends with py3-none-any."""
    return Path(os.environ["TLKERNELS_WHEEL"]).name


@pytest.fixture(scope="module")
def installed() -> set[str]:
    """The files that the wheel put into the environment, relative to site-packages."""
    files = importlib.metadata.files("tlkernels")
    assert files is not None
    return {str(file) for file in files}


def is_pure(wheel: str) -> bool:
    return wheel.endswith("-py3-none-any.whl")


def test_the_wheel_is_what_is_imported() -> None:
    assert Path(tlkernels.__file__).resolve().is_relative_to(SITE_PACKAGES)
    assert importlib.metadata.version("tlkernels") == tlkernels.__version__


def test_the_wheel_holds_the_package_alone(wheel: str, installed: set[str]) -> None:
    python = {
        "tlkernels/ops/nf4.py",
        "tlkernels/triton_kernels/nf4.py",
        "tlkernels/_nf4_format.py",
        "tlkernels/py.typed",
    }
    assert python <= installed
    tops = {file.split("/")[0] for file in installed if not file.startswith("..")}  # "..": the command, in bin/
    assert tops <= {"tlkernels", f"tlkernels-{tlkernels.__version__}.dist-info", "tlkernels.libs"}
    assert not any(file.startswith("tlkernels.libs") for file in installed), "the audit copied a library into the wheel"
    assert f"tlkernels-{tlkernels.__version__}.dist-info/licenses/LICENSE" in installed
    libraries = {file for file in installed if file.endswith(".so")}
    numpy = f"tlkernels/_numpy{sysconfig.get_config_var('EXT_SUFFIX')}"
    cuda = {"tlkernels/_C_cuda.so"} if os.environ.get("TLKERNELS_WHEEL_CUDA") == "on" else set()
    assert libraries == (set() if is_pure(wheel) else {"tlkernels/_C.abi3.so", numpy} | cuda)
    assert is_pure(wheel) or "manylinux" in wheel


def test_the_wheel_says_what_it_needs(wheel: str) -> None:
    metadata = importlib.metadata.metadata("tlkernels")
    needs = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(needs) == ["numpy", "torch>=2.11"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_wheel_installs_the_command(wheel: str) -> None:
    command = shutil.which("tlkernels", path=str(Path(sys.executable).parent))
    assert command is not None
    run = subprocess.run([command, "info"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert tlkernels.__version__ in run.stdout and "nf4_linear" in run.stdout
    assert ("not built" in run.stdout) == is_pure(wheel)


def test_the_wheel_computes(wheel: str) -> None:
    """On the compiled library, or on the references with a warning that says so."""
    code = (
        "import torch, tlkernels\n"
        "w = torch.randn(96, 70, generator=torch.Generator().manual_seed(0))\n"
        "weight = tlkernels.ops.nf4_quantize(w)\n"
        "y = tlkernels.ops.nf4_linear(torch.eye(70), weight)\n"
        "print((y.T == tlkernels.ops.nf4_dequantize(weight)).all().item(), tlkernels.backends()[0].backend)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True", "reference" if is_pure(wheel) else "cpu"]
    assert ("RuntimeWarning: tlkernels: the compiled CPU library is not available" in run.stderr) == is_pure(wheel)


def test_the_wheel_holds_the_triton_kernels(wheel: str) -> None:
    module = importlib.import_module("tlkernels.triton_kernels.nf4")
    assert module.__file__ is not None and Path(module.__file__).resolve().is_relative_to(SITE_PACKAGES)


def test_the_wheel_holds_all_cuda_targets(wheel: str) -> None:
    """Machine code for every default target, and PTX of the newest for those to come."""
    library = Path(tlkernels.__file__).parent / "_C_cuda.so"
    if os.environ.get("TLKERNELS_WHEEL_CUDA") != "on" or is_pure(wheel):
        assert not library.exists()
        return
    ptx, machine_code = cuda_targets(library.read_bytes())
    assert machine_code == CUDA_TARGETS
    assert ptx == {max(CUDA_TARGETS)}


def cuda_targets(library: bytes) -> tuple[set[int], set[int]]:
    """The targets of (PTX, machine code) in nvcc's fat binaries: a header, then entries with a header each."""
    found: dict[int, set[int]] = {1: set(), 2: set()}
    at = library.find(b"\x50\xed\x55\xba")
    while at >= 0:
        _, header, size = struct.unpack_from("<HHQ", library, at + 4)
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", library, entry)
            found[kind].add(struct.unpack_from("<I", library, entry + 28)[0])
            entry += entry_header + entry_size
        at = library.find(b"\x50\xed\x55\xba", end)
    return found[1], found[2]
