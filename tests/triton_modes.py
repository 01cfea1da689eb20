"""For tests of Triton kernels: Triton interprets or compiles for a whole process, so a test may need another one."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
