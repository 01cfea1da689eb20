"""Build tlkernels: CMake and Ninja compile what this machine can compile, setuptools packs it with the Python package.

Everything else about the package stands in pyproject.toml. What is compiled depends on what is there (a C++
compiler, torch, nvcc) and on environment variables:

TLKERNELS_NO_EXT=1        compile nothing: the pure-Python package, which runs on its references
TLKERNELS_CUDA            auto (default: on when nvcc is found and the installed torch is a CUDA build), on, off
TLKERNELS_CUDA_ARCHS      CUDA targets, such as "90a;100"; CMakeLists.txt has the default
TLKERNELS_ASAN=1          with AddressSanitizer and UndefinedBehaviorSanitizer, in a build directory of its own
TLKERNELS_BUILD_DIR       the build directory, which is kept between builds; default build/<configuration>
CXX, CMAKE_ARGS, CMAKE_BUILD_PARALLEL_LEVEL      as CMake reads them
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LEAST_TORCH = (2, 11)


@dataclass(frozen=True)
class Plan:
    """What to compile, and with what."""

    cmake: str
    ninja: str
    pybind11_dir: str
    torch_dir: Path | None
    cuda: bool
    asan: bool

    @property
    def build_dir(self) -> Path:
        name = f"{'asan' if self.asan else 'release'}-{sys.implementation.cache_tag}"
        return Path(os.environ.get("TLKERNELS_BUILD_DIR") or ROOT / "build" / name).resolve()

    @property
    def cmake_arguments(self) -> list[str]:
        options = {
            "TLKERNELS_TORCH": "OFF" if self.torch_dir is None else "ON",
            "TLKERNELS_CUDA": "ON" if self.cuda else "OFF",
            "TLKERNELS_ASAN": "ON" if self.asan else "OFF",
            "TORCH_DIR": self.torch_dir or "",
            "CMAKE_MAKE_PROGRAM": self.ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": self.pybind11_dir,
        }
        if archs := os.environ.get("TLKERNELS_CUDA_ARCHS"):
            options["TLKERNELS_CUDA_ARCHS"] = archs
        return [f"-D{name}={value}" for name, value in options.items()] + shlex.split(os.environ.get("CMAKE_ARGS", ""))


def make_plan() -> Plan | None:
    """What can be compiled here; None, with a warning that says why, when nothing can."""
    if _switch("TLKERNELS_NO_EXT"):
        return _nothing("TLKERNELS_NO_EXT is set")
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        return _nothing(f"there is no C++ compiler ({', '.join(compilers)})")
    pybind11 = importlib.util.find_spec("pybind11")
    cmake, ninja = _tool("cmake"), _tool("ninja")
    missing = [name for name, it in (("cmake", cmake), ("ninja", ninja), ("pybind11", pybind11)) if it is None]
    if missing or pybind11 is None or pybind11.origin is None or cmake is None or ninja is None:
        return _nothing(f"{' and '.join(missing)} not found; `pip install {' '.join(missing)}`")
    torch_dir = _torch_dir()
    return Plan(
        cmake=cmake,
        ninja=ninja,
        pybind11_dir=str(Path(pybind11.origin).parent / "share" / "cmake" / "pybind11"),
        torch_dir=torch_dir,
        cuda=_wants_cuda(torch_dir),
        asan=_switch("TLKERNELS_ASAN"),
    )


def _nothing(why: str) -> None:
    _warn(f"no compiled library will be built: {why}. The package will run on its references, correct but slow.")


def _warn(text: str) -> None:
    warnings.warn(f"\n\n    tlkernels: {text}\n", stacklevel=3)


def _switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} is {value!r}; expected 0 or 1")
    return value == "1"


def _tool(name: str) -> str | None:
    """The program that belongs to this Python (the PyPI package puts it there), or the system's."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def _torch_dir() -> Path | None:
    spec = importlib.util.find_spec("torch")  # found, not imported: importing it takes seconds
    if spec is None or spec.origin is None:
        _warn("torch is not installed for this Python, so only the NumPy library will be built")
        return None
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_TORCH:
        raise SystemExit(f"torch {version} is installed; tlkernels needs {'.'.join(map(str, LEAST_TORCH))} or later")
    return Path(spec.origin).parent


def _wants_cuda(torch_dir: Path | None) -> bool:
    asked = os.environ.get("TLKERNELS_CUDA") or "auto"
    if asked not in ("auto", "on", "off"):
        raise SystemExit(f"TLKERNELS_CUDA is {asked!r}; expected auto, on or off")
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if asked == "on" and (nvcc is None or torch_dir is None):
        raise SystemExit(f"TLKERNELS_CUDA is 'on', but {'nvcc' if nvcc is None else 'torch'} was not found")
    if asked != "auto":
        return asked == "on"
    if nvcc is None or torch_dir is None:
        return False
    return runpy.run_path(str(torch_dir / "version.py")).get("cuda") is not None


class CMakeBuild(build_ext):
    """One CMake build stands for all extensions."""

    plan: Plan

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        destination = ROOT / "tlkernels" if in_place else Path(self.build_lib).resolve() / "tlkernels"
        _place(self._compile(), destination)
        if self.inplace and not self.editable_mode:  # an editable installation maps the package by itself
            link = destination / "triton_kernels"
            if not link.is_symlink():
                link.symlink_to(Path("..") / "triton_kernels", target_is_directory=True)

    def _compile(self) -> list[Path]:
        plan = self.plan
        stage = plan.build_dir / "stage"
        shutil.rmtree(stage, ignore_errors=True)
        jobs = self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1
        for command in (
            [plan.cmake, "-S", str(ROOT), "-B", str(plan.build_dir), "-G", "Ninja", *plan.cmake_arguments],
            [plan.cmake, "--build", str(plan.build_dir), "--parallel", str(jobs)],
            [plan.cmake, "--install", str(plan.build_dir), "--prefix", str(stage)],
        ):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                why = f"`{shlex.join(command)}` failed with status {error.returncode}; its messages stand above"
                raise SystemExit(f"tlkernels: {why}. TLKERNELS_NO_EXT=1 installs without compiled libraries.") from None
        return sorted(stage.glob("*.so"))

    def get_outputs(self) -> list[str]:
        if self.inplace or self.editable_mode:
            return []
        return [str(path) for path in _libraries(Path(self.build_lib, "tlkernels"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in lists them


def _libraries(folder: Path) -> list[Path]:
    return [*folder.glob("_C*.so"), *folder.glob("_numpy*.so")]


def _place(built: list[Path], destination: Path) -> None:
    """Make `destination` hold just these libraries; each is replaced in one step, as a process may be running it."""
    destination.mkdir(parents=True, exist_ok=True)
    for library in _libraries(destination):
        if library.name not in {path.name for path in built}:
            library.unlink()
    for path in built:
        target = destination / path.name
        with contextlib.suppress(FileNotFoundError):
            if target.read_bytes() == path.read_bytes():
                continue
        partial = target.with_suffix(".partial")
        shutil.copy2(path, partial)
        partial.replace(target)


def main() -> None:
    plan = make_plan()
    if plan is not None:
        CMakeBuild.plan = plan
    setup(
        packages=[
            *find_packages(include=["tlkernels*"], exclude=["tlkernels.triton_kernels"]),
            "tlkernels.triton_kernels",
        ],
        package_dir={"tlkernels.triton_kernels": "triton_kernels"},
        ext_modules=[] if plan is None else [Extension("tlkernels._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )


main()
