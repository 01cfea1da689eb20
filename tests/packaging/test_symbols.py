"""What the linker was given and what it made: read with nm and readelf.

A weak symbol in the objects of one instruction-set level is a trap: of all copies of an inline function the linker
keeps any one, and if that was compiled for AVX-512, other processors die of an illegal instruction.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import tlkernels

PACKAGE = Path(tlkernels.__file__).resolve().parent
BUILD = Path(
    os.environ.get("TLKERNELS_BUILD_DIR")
    or Path(__file__).resolve().parents[2] / "build" / f"release-{sys.implementation.cache_tag}"
)
NUMPY_LIBRARY = f"_numpy{sysconfig.get_config_var('EXT_SUFFIX')}"

#: What an op library may take from elsewhere: the stable ABI, and the C and C++ run-time libraries. Members of std may
#: be found in libtorch, which carries newer ones for old systems, or in libstdc++.
TORCH_STABLE_ABI = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+")
RUN_TIME = re.compile(
    r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+|_Z(N[KRO]*)?St.+|_ITM_\w+|__gmon_start__|__tls_get_addr.*"
)


def run(*command: object) -> list[str]:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout.splitlines()


def merged_by_the_linker(file: Path) -> list[str]:
    """The weak (V, W) and unique (u) symbols that an object file defines."""
    return [line for line in run("nm", file) if re.search(r" [VWu] ", line)]


def undefined(library: Path) -> set[str]:
    return {line.split()[-1] for line in run("nm", "-D", "--undefined-only", library)}


def dynamic(library: Path, tag: str) -> list[str]:
    return [match[1] for line in run("readelf", "-d", library) if (match := re.search(rf"\({tag}\).*\[(.*)\]", line))]


def libraries() -> list[Path]:
    return [PACKAGE / "_C.abi3.so", PACKAGE / NUMPY_LIBRARY, *PACKAGE.glob("_C_cuda.so")]


def kernel_objects() -> dict[str, list[Path]]:
    """Instruction-set level -> its object files."""
    found: dict[str, list[Path]] = {}
    for folder in BUILD.glob("CMakeFiles/kernels_*.dir"):
        found[folder.name.removeprefix("kernels_").removesuffix(".dir")] = sorted(folder.rglob("*.o"))
    return found


def test_kernel_objects_are_all_there() -> None:
    objects = kernel_objects()
    assert {"scalar", "dispatch"} <= set(objects), f"no build of the kernels in {BUILD}"
    names = {level: [file.name for file in files] for level, files in objects.items() if level != "dispatch"}
    assert all({"level.cpp.o", "nf4.cpp.o", "roofline.cpp.o"} <= set(files) for files in names.values())
    if os.uname().machine == "x86_64":
        assert set(names) == {"scalar", "avx2", "avx512", "avx512_bf16"}


def test_kernel_objects_hold_nothing_that_the_linker_merges() -> None:
    for level, files in kernel_objects().items():
        if level != "dispatch":  # compiled for the baseline, so its copies may serve everybody
            for file in files:
                assert not merged_by_the_linker(file), f"{level}: {file.name}"


def test_kernel_objects_know_no_framework() -> None:
    """Neither torch nor Python, nor a thread library: what they need is handed in."""
    for level, files in kernel_objects().items():
        for file in files:
            names = {line.split()[-1] for line in run("nm", "--undefined-only", file)}
            foreign = {
                name for name in names if re.match(r"(aoti_)?torch_|Py|_Py|_ZN?K?(2at|3c10|5torch)|GOMP|omp_", name)
            }
            assert not foreign, f"{level}: {file.name}"


def test_the_check_for_merged_symbols_can_fail(tmp_path: Path) -> None:
    source = tmp_path / "inline.cpp"
    source.write_text("inline int twice(int x) { return 2 * x; }\nint (*address)(int) = twice;\n")
    subprocess.run([os.environ.get("CXX", "g++"), "-O2", "-c", source, "-o", tmp_path / "inline.o"], check=True)
    assert merged_by_the_linker(tmp_path / "inline.o")


@pytest.mark.parametrize("library", libraries(), ids=lambda path: path.name.split(".")[0])
def test_libraries_depend_on_what_every_machine_has(library: Path) -> None:
    assert library.exists(), f"{library.name} is not built"
    assert not dynamic(library, "RPATH") and not dynamic(library, "RUNPATH")
    torch = {"libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so"}
    system = {
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libpthread.so.0",
        "libdl.so.2",
        "librt.so.1",
    }
    needed = {name for name in dynamic(library, "NEEDED") if not name.startswith("ld-linux")}
    assert needed <= (system if library.name.startswith("_numpy") else system | torch)


@pytest.mark.parametrize(
    "library", [lib for lib in libraries() if lib.name.startswith("_C")], ids=lambda path: path.name
)
def test_op_libraries_use_the_stable_abi_alone(library: Path) -> None:
    """No symbol of the classic C++ interface (at::, c10::), which changes with every torch, and none of Python's."""
    names = undefined(library)
    assert any(TORCH_STABLE_ABI.fullmatch(name) for name in names)
    other = {name for name in names if not TORCH_STABLE_ABI.fullmatch(name) and not RUN_TIME.fullmatch(name)}
    assert not other
