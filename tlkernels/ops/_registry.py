"""The one table of ops x backends, and the one place that knows that a backend exists.

Every op is defined here with its *reference* as the default kernel: plain torch, the formula itself. It serves
every device, dtype and fake tensor that has no kernel of its own, so the package works with no compiled library.
The compiled libraries register their kernels for the dispatch keys CPU and CUDA when they are loaded; Triton
kernels are registered from the table that `define` is given. What a call runs is what the dispatcher says:
`backends()` reads it back from there.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

BACKENDS = ("reference", "cpu", "cuda", "triton")

_LIB = torch.library.Library("tlkernels", "DEF")
# The same ops with nothing but the reference: what a compiled kernel calls for float64, and tests compare with.
_REFERENCE = torch.library.Library("tlkernels_reference", "DEF")


@dataclass(frozen=True)
class Op:
    """One op: its schema, its reference, how to differentiate it, and which Triton function serves it."""

    name: str
    reference: Callable[..., Any]
    setup_context: Callable[..., None] | None
    backward: Callable[..., Any] | None
    vmap: Callable[..., Any] | None
    triton: str | None  # "module:function" below tlkernels.triton_kernels
    cuda_default: str  # which of "cuda" and "triton" serves CUDA tensors when both are there
    dtypes: tuple[str, ...]
    gradient: str  # what `tlkernels info` says: "yes", "twice", "raises"
    kwonly: tuple[str, ...] = field(default=())
    function: type[torch.autograd.Function] | None = field(default=None)

    @property
    def overload(self) -> Any:
        packet, _, overload = self.name.partition(".")
        return getattr(getattr(torch.ops.tlkernels, packet), overload or "default")


OPS: dict[str, Op] = {}


def define(
    schema: str,
    reference: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
    triton: str | None = None,
    cuda_default: str = "triton",
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16", "float64"),
    gradient: str = "raises",
    fake: Callable[..., Any] | None = None,
) -> None:
    """Define an op by its schema, with `reference` as the kernel for everything that has no better one.

    ``setup_context(ctx, inputs, output)`` gets *all* inputs, keyword-only ones too, in schema order;
    ``backward(ctx, *grads)`` returns one gradient (or None) per input in the same order. The pair is used twice:
    as the op's autograd formula, and, while a ``torch.func`` transform is active, as an `autograd.Function`
    (ops with a registered formula alone raise under ``torch.func.grad``).
    ``vmap(info, in_dims, *inputs)`` is the op's batching rule, with all inputs in schema order as well.
    ``fake`` serves tensors without data where the reference cannot: it looks at values, or loops over them.
    """
    name = schema[: schema.index("(")]
    for lib in (_LIB, _REFERENCE):
        lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        lib.impl(name, reference, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"tlkernels::{name}", fake, lib=_LIB)
    packet, _, overload = name.partition(".")
    arguments = getattr(getattr(torch.ops.tlkernels, packet), overload or "default")._schema.arguments
    kwonly = tuple(a.name for a in arguments if a.kwarg_only)
    op = Op(
        name, reference, setup_context, backward, vmap, triton, cuda_default, dtypes, gradient, kwonly,
        _autograd_function(name, len(arguments) - len(kwonly), kwonly, setup_context, backward),
    )  # fmt: skip
    OPS[name] = op
    if backward is not None and setup_context is not None:
        positional = len(arguments) - len(kwonly)

        # torch passes keyword_only_inputs, by that name, only where an op has some
        def setup(
            ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: dict[str, Any] | None = None
        ) -> None:
            given = keyword_only_inputs or {}
            setup_context(ctx, (*inputs, *(given[k] for k in kwonly)), output)

        def formula(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
            return backward(ctx, *grads)[:positional]

        torch.library.register_autograd(f"tlkernels::{name}", formula, setup_context=setup, lib=_LIB)
    if vmap is not None:

        def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
            # the dispatcher leaves out arguments that equal their default
            args = (*args, *(a.default_value for a in arguments[len(args) : len(arguments) - len(kwonly)]))
            values = (*args, *(kwargs.get(a.name, a.default_value) for a in arguments if a.kwarg_only))
            return vmap(info, (*in_dims, *(None,) * (len(values) - len(in_dims))), *values)

        torch.library.register_vmap(f"tlkernels::{name}", rule, lib=_LIB)


def _autograd_function(
    name: str, positional: int, kwonly: tuple[str, ...], setup: Any, backward_: Any
) -> type[torch.autograd.Function] | None:
    if backward_ is None:
        return None

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return OPS[name].overload(*inputs[:positional], **dict(zip(kwonly, inputs[positional:], strict=True)))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward_(ctx, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(_NO_FORWARD_AD.format(name))

    Function.__name__ = Function.__qualname__ = name
    return Function


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """Call an op so that it also works under ``torch.func`` transforms. Every argument is given, in schema order."""
    op = OPS[name]
    if not torch.compiler.is_compiling():
        if op.function is not None and torch._C._are_functorch_transforms_active():
            return op.function.apply(*args, *(kwargs[k] for k in op.kwonly))
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
    return op.overload(*args, **kwargs)


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """torch drops the tangent of a dual tensor silently when an op has only a backward formula."""
    if any(isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise RuntimeError(_NO_FORWARD_AD.format(name))


_NO_FORWARD_AD = "{}: forward-mode AD is not supported; use reverse mode (torch.func.jacrev, torch.func.vjp)"


def not_differentiable(op: str, why: str) -> tuple[Callable[..., None], Callable[..., Any]]:
    """A (setup_context, backward) pair for an op whose gradient would be meaningless: asking for it raises."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{op} is not differentiable: {why}")

    return setup_context, backward


# ---- compiled libraries ---------------------------------------------------------------------------------------------

_PACKAGE = Path(__file__).resolve().parent.parent
#: library -> "loaded", or the reason why it is not
LIBRARIES: dict[str, str] = {}


def _load(name: str, file: str) -> None:
    path = _PACKAGE / file
    if not path.exists():
        LIBRARIES[name] = "not built"
        return
    try:
        torch.ops.load_library(str(path))
        LIBRARIES[name] = "loaded"
    except (OSError, RuntimeError) as error:
        LIBRARIES[name] = str(error).strip().splitlines()[0]


def load_libraries() -> None:
    """Load what was compiled, say once what is missing, and apply TLKERNELS_REQUIRE and TLKERNELS_BACKEND."""
    _load("cpu", "_C.abi3.so")
    if torch.version.cuda is None:
        LIBRARIES["cuda"] = "not loaded: the installed torch is not a CUDA build"
    else:
        _load("cuda", "_C_cuda.so")
    if importlib.util.find_spec("triton") is None:
        LIBRARIES["triton"] = "not loaded: triton is not installed"
    elif torch.version.cuda is None and not interpreting():
        LIBRARIES["triton"] = "not loaded: the installed torch is not a CUDA build (TRITON_INTERPRET=1 runs on CPU)"
    else:
        LIBRARIES["triton"] = "loaded"
    for library in ("cpu", "cuda"):  # read what they registered before any override hides it
        native_ops(library)
    required = [name for name in os.environ.get("TLKERNELS_REQUIRE", "").split(",") if name]
    for name in required:
        if LIBRARIES.get(name) != "loaded":
            raise ImportError(f"TLKERNELS_REQUIRE asks for {name!r}, but: {LIBRARIES.get(name, 'no such backend')}")
    if LIBRARIES["cpu"] != "loaded":
        warnings.warn(
            f"tlkernels: the compiled CPU library is not available ({LIBRARIES['cpu']}); "
            "the ops run on their torch references, correct but slow",
            RuntimeWarning,
            stacklevel=3,
        )
    _apply(_checked(os.environ.get("TLKERNELS_BACKEND") or None))


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


# ---- which backend a call runs --------------------------------------------------------------------------------------

_lock = threading.RLock()
_forced: str | None = None
_overrides: torch.library.Library | None = None


def _checked(name: str | None) -> str | None:
    if name is None:
        return None
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    if name != "reference" and LIBRARIES.get(name) != "loaded":
        raise RuntimeError(f"backend: {name!r} is not available here: {LIBRARIES.get(name)}")
    return name


def _triton_launcher(op: Op) -> Callable[..., Any]:
    module, _, function = (op.triton or "").partition(":")

    def launch(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f"tlkernels.triton_kernels.{module}"), function)(*args, **kwargs)

    return launch


def _missing(op: Op, name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{op.name}: the forced backend {name!r} has no kernel for this op on this device")

    return refuse


def _apply(forced: str | None) -> None:
    """Make the dispatcher's table say what `forced` (or, when None, the default) says."""
    global _overrides, _forced
    with _lock:
        if _overrides is not None:
            _overrides._destroy()
        _overrides = torch.library.Library("tlkernels", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of every override: here it is what was asked for
            for op in OPS.values():
                for key in ("CPU", "CUDA"):
                    kernel = _override(op, key, forced)
                    if kernel is not None:
                        _overrides.impl(op.name, kernel, key, allow_override=True)
        _forced = forced


def _override(op: Op, key: str, forced: str | None) -> Callable[..., Any] | None:
    """The Python kernel that must stand above what a compiled library registered, or None to leave that alone."""
    if forced == "reference":
        return op.reference
    if key == "CPU":
        if forced == "triton":
            return _triton_launcher(op) if op.triton and interpreting() else _missing(op, forced)
        return _missing(op, forced) if forced == "cuda" else None
    if forced == "triton" or (forced is None and _cuda_winner(op) == "triton"):
        return _triton_launcher(op) if op.triton else _missing(op, "triton")
    return _missing(op, forced) if forced == "cpu" else None


def _native(op: Op, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"tlkernels::{op.name}", key)


def _cuda_winner(op: Op) -> str:
    """The default backend for CUDA tensors: the table's choice, or whichever of the two is there."""
    have = {
        "cuda": LIBRARIES.get("cuda") == "loaded" and op.name in native_ops("cuda"),
        "triton": LIBRARIES.get("triton") == "loaded" and op.triton is not None and torch.version.cuda is not None,
    }
    other = "cuda" if op.cuda_default == "triton" else "triton"
    return op.cuda_default if have[op.cuda_default] else other if have[other] else "reference"


def native_ops(library: str) -> frozenset[str]:
    """The ops for which a loaded library holds compiled kernels, as it registered them."""
    if library not in _native_cache:
        key = {"cpu": "CPU", "cuda": "CUDA"}[library]
        _native_cache[library] = frozenset(
            name for name, op in OPS.items() if LIBRARIES.get(library) == "loaded" and _native(op, key)
        )
    return _native_cache[library]


_native_cache: dict[str, frozenset[str]] = {}


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op on one backend, for the whole process, until the block ends.

    Parameters
    ----------
    name : "reference", "cpu", "cuda" or "triton"
        "triton" also serves CPU tensors when Triton's interpreter is on (``TRITON_INTERPRET=1``).

    Raises
    ------
    ValueError
        If there is no such backend.
    RuntimeError
        If it is not available here, or, on a call, if it has no kernel for the op.

    Notes
    -----
    The choice is made in torch's dispatcher, so compiled graphs and backward passes that run inside the block obey
    it as well. The environment variable ``TLKERNELS_BACKEND`` does the same from the start of the process.

    Examples
    --------
    >>> with tlkernels.backend("reference"):
    ...     y = tlkernels.ops.nf4_linear(x, weight)
    """
    _checked(name)
    with _lock:
        before = _forced
        _apply(name)
    try:
        yield
    finally:
        _apply(before)


def forced_backend() -> str | None:
    """The backend that is forced at the moment, or None."""
    return _forced


@dataclass(frozen=True)
class Row:
    """A line of the table that `backends()` returns."""

    op: str
    device: str
    backend: str
    dtypes: tuple[str, ...]
    gradient: str
    vmap: bool


def backends() -> list[Row]:
    """The real table of this machine: which backend serves each op on each device, read off the loaded libraries."""
    rows = []
    for op in OPS.values():
        for device in ("cpu", "cuda"):
            if device == "cuda" and torch.version.cuda is None:
                continue
            if _forced is not None:
                serving = _forced
            elif device == "cpu":
                serving = "cpu" if op.name in native_ops("cpu") else "reference"
            else:
                serving = _cuda_winner(op)
            rows.append(Row(op.name, device, serving, op.dtypes, op.gradient, op.vmap is not None))
    return rows


def describe_libraries() -> dict[str, str]:
    """What loaded, and why not what did not: {"cpu": "loaded", "cuda": "not loaded: ...", ...}."""
    table = dict(LIBRARIES)
    table["python"] = sys.version.split()[0]
    table["torch"] = torch.__version__
    return table
