"""For tests of Triton kernels: the mode they need, ops on the Triton backend, and machine code without the machine.

Triton interprets or compiles for a whole process, so a test may need another one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tlkernels
from tlkernels.ops import _registry

INTERPRETING = _registry.interpreting()
DEVICES = ["interpreter", *(["cuda"] if torch.cuda.is_available() else [])]

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic algorithms want on a GPU


@functools.cache
def other_process(file: Path, interpret: bool, tests: tuple[str, ...]) -> dict[str, str]:
    """Run tests of a file where Triton does (not) interpret: what failed, by name; "" is a pass."""
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret))}
    environment.pop("TLKERNELS_BACKEND", None)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
        nodes = [f"{file}::{test}" for test in tests]
        run = subprocess.run(
            [*command, f"--junitxml={report}", *nodes], env=environment, capture_output=True, text=True, timeout=900
        )
        if not report.exists():
            raise RuntimeError(f"{' '.join(command)} wrote no report:\n{run.stdout}\n{run.stderr}")
        cases = ET.parse(report).iter("testcase")
        return {c.attrib["name"]: "\n".join(f"{e.attrib.get('message')}\n{e.text}" for e in c) for c in cases}


def triton_mode(interpret: Callable[[dict[str, Any]], bool]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test in the mode that its arguments ask for, in another process when this one has the other mode."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        names = tuple(inspect.signature(test).parameters)

        @functools.wraps(test)
        def run(request: pytest.FixtureRequest, **arguments: Any) -> None:
            mode = interpret(arguments)
            if mode == INTERPRETING:
                test(**{name: arguments[name] for name in names})
                return
            tests = tuple(
                item.name for item in request.session.items
                if item.path == request.path and item.function.__dict__["interpret"](_parameters(item)) == mode
            )  # fmt: skip
            failure = other_process(request.path, mode, tests).get(request.node.name, "it was not run")
            if failure:
                pytest.fail(f"with TRITON_INTERPRET={int(mode)}: {failure}", pytrace=False)

        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("request", *names)]
        run.__signature__ = inspect.Signature(parameters)
        run.__dict__["interpret"] = interpret
        return run

    return decorate


def _parameters(item: Any) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def on_every_device(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test with the Triton backend, in the interpreter and on a GPU if there is one; it takes `device`."""
    decorated = triton_mode(lambda arguments: arguments["device"] == "interpreter")(test)
    return pytest.mark.parametrize("device", DEVICES)(decorated)


def compiled(test: Callable[..., None]) -> Callable[..., None]:
    return triton_mode(lambda arguments: False)(test)


# ---- calls ----------------------------------------------------------------------------------------------------------


def target(device: str) -> torch.device:
    return torch.device("cpu" if device == "interpreter" else device)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(device: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """An op on the Triton backend, with its tensors on the device and its results back."""
    place = target(device)
    args = tuple(a.to(place) if isinstance(a, Tensor) and place.type != "cpu" else a for a in args)
    with tlkernels.backend("triton"):
        out = getattr(torch.ops.tlkernels, name).default(*args, **kwargs)
    if name.endswith("_"):
        return args[0].cpu()
    return tuple(t.cpu() for t in out) if isinstance(out, tuple) else out.cpu()


def outcome(backend: str, name: str, arguments: dict[str, Any]) -> tuple[str, str] | None:
    """What an op raises on a backend: the name of the error and its words."""
    with tlkernels.backend(backend):
        try:
            getattr(torch.ops.tlkernels, name).default(**arguments)
        except Exception as error:
            return type(error).__name__, str(error)
    return None


def ops_of(family: str) -> list[str]:
    """The ops whose kernels are in the module ``triton_kernels.<family>``."""
    return [name for name, op in _registry.OPS.items() if (op.triton or "").startswith(f"{family}:")]


def check_signature(name: str) -> None:
    """The launcher of an op takes what the op's schema says."""
    op = _registry.OPS[name]
    module, _, function = (op.triton or "").partition(":")
    launcher = getattr(importlib.import_module(f"tlkernels.triton_kernels.{module}"), function)
    parameters = inspect.signature(launcher).parameters.values()
    for argument, parameter in zip(op.overload._schema.arguments, parameters, strict=True):
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        expected = (argument.name, argument.kwarg_only, default)
        got = (parameter.name, parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter.default)
        assert got == expected, f"{name}: the launcher takes {got}; expected {expected}"


# ---- machine code, without the machine ------------------------------------------------------------------------------


def build(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], *, unaligned: Collection[str],
    ones: Collection[str] = (), capability: int = 90, **options: Any,
) -> Any:  # fmt: skip
    """Compile a kernel for a GPU that need not be there.

    Pointers and integers divide by 16, but for those in `unaligned`. Integers in `ones` are 1, which Triton compiles as
    a constant that is no tensor.
    """
    import triton
    from tlkernels.triton_kernels import nf4
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
    names = kernel.arg_names
    constants = {**constants, **{name: 1 for name in ones if name in arguments}}
    arguments = {name: kind for name, kind in arguments.items() if name not in ones}
    signature = {name: arguments.get(name, "constexpr") for name in names}
    values = {(i,): constants.get(name) for i, name in enumerate(names) if name not in arguments}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in arguments and name not in unaligned and arguments[name] != "fp32"
    }
    source = ASTSource(kernel, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**nf4.LAUNCH_OPTIONS, **options})


def integers_of(arguments: dict[str, str]) -> set[str]:
    """Which of a kernel's arguments are numbers, not pointers."""
    return {name for name, kind in arguments.items() if kind in ("i32", "i64")}
