"""The table of ops x backends is what the dispatcher does, forced or not, from Python or from the environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tlkernels
from tlkernels import ops
from tlkernels.ops import _registry

# What may be differentiated ("twice": its gradient too; "raises": asking for it is refused; "none": there is nothing to
# ask for), an argument that shows it, and whether there is a batching rule.
EXPECTED: dict[str, tuple[str, str, bool]] = {
    "nf4_quantize": ("raises", "w", False),
    "absmax_quantize": ("raises", "absmax", False),
    "absmax_dequantize": ("raises", "scale", False),
    "nf4_dequantize": ("raises", "absmax", False),
    "nf4_dequantize.out": ("raises", "", False),
    "nf4_linear": ("twice", "x", True),
    "nf4_linear_many": ("twice", "x", True),
    "nf4_linear_t": ("twice", "grad_output", True),
    "nf4_embedding": ("raises", "absmax", True),
    "lora_linear": ("yes", "lora_a", True),
    "nf4_lora_linear": ("yes", "lora_b", True),
    "lora_grad_ab": ("raises", "x", True),
    "lora_grad_x": ("raises", "ds", True),
    "nf4_lora_grad_x": ("raises", "grad_output", True),
    "lora_dropout_mask": ("none", "", False),
    "lora_linear_grouped": ("yes", "x", True),
    "lora_grouped_grad": ("raises", "grad_output", True),
    "lora_grouped_grad_x": ("raises", "lora_a", True),
    "lora_grouped_delta_": ("none", "lora_a", False),
    "dora_weight_norm": ("raises", "lora_b", True),
    "nf4_dora_weight_norm": ("raises", "lora_a", True),
    "lora_merge_": ("none", "lora_b", False),
    "sim_lse": ("yes", "x", True),
    "sim_lse_backward": ("raises", "grad_row", True),
    "sigmoid_contrastive": ("yes", "logit_scale", True),
    "sigmoid_contrastive_backward": ("raises", "x", True),
    "sigmoid_contrastive_sum": ("yes", "y", True),
    "kernel_mmd2": ("twice", "x", True),
    "paired_sqdist": ("twice", "y", True),
    "paired_sqdist_backward": ("raises", "grad", True),
    "pairwise_sqdist": ("twice", "x", True),
    "median_sqdist": ("raises", "x", True),
    "mmd2_permutation": ("raises", "y", True),
    "covariance": ("twice", "weight", True),
    "coral_sq": ("twice", "x", True),
    "feature_histogram": ("raises", "", True),
    "diag_fisher_linear_": ("none", "act", False),
    "diag_fisher_conv2d_": ("none", "grad_out", False),
    "diag_fisher_embedding_": ("none", "grad_out", False),
    "diag_fisher_norm_": ("none", "x", False),
    "diag_fisher_channel_norm_": ("none", "x", False),
    "per_sample_sqnorm_linear": ("raises", "act", False),
    "kfac_factors_linear_": ("none", "act", False),
    "importance_accum_": ("none", "", False),
    "si_accum_": ("none", "", False),
    "quad_penalty": ("twice", "params", False),
    "quad_penalty_backward": ("twice", "grad", False),
    "quad_penalty_grad_": ("none", "", False),
    "task_gram": ("raises", "grads", False),
    "task_combine_": ("none", "", False),
}
FLOATS = ("float32", "bfloat16", "float16", "float64")
OTHER_DTYPES = {
    "absmax_quantize": ("float32",),
    "absmax_dequantize": ("float32",),
    "lora_dropout_mask": ("bool",),
    "nf4_dora_weight_norm": ("float32",),
}
WEIGHT = ops.nf4_quantize(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))


def dispatch_table(name: str) -> dict[str, str]:
    """What torch's dispatcher would run for each dispatch key: {"CPU": "registered at ...", ...}."""
    lines = torch._C._dispatch_dump_table(f"tlkernels::{name}").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def served_by(op: str) -> str:
    """Who registered the dispatcher's kernel for CPU tensors: C++ ("cpu") or Python ("reference")."""
    entry = dispatch_table(op)["CPU"]
    return "reference" if "default backend kernel" in entry or ".py:" in entry else "cpu"


def test_table_is_what_the_dispatcher_does() -> None:
    rows = tlkernels.backends()
    assert {row.op for row in rows} == set(_registry.OPS)
    assert len(rows) == len({(row.op, row.device) for row in rows})
    for row in rows:
        if row.device == "cpu":
            assert row.backend == served_by(row.op), row
        gradient, _, vmap = EXPECTED[row.op]
        assert (row.gradient, row.vmap) == (gradient, vmap), row
        assert row.dtypes == OTHER_DTYPES.get(row.op, FLOATS), row


@pytest.fixture(scope="session")
def calls(
    nf4_calls: Any, lora_calls: Any, contrastive_calls: Any, mmd_calls: Any, fisher_calls: Any
) -> Callable[..., dict[str, dict[str, Any]]]:  # fmt: skip
    """A right call of every op, for features of a dtype."""

    def of(dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Any]]:
        return {
            **nf4_calls(8, 64, dtype=dtype),
            **lora_calls(8, 64, dtype=dtype),
            **contrastive_calls(8, 9, 16, dtype=dtype),
            **mmd_calls(8, 9, 5, dtype=dtype),
            **fisher_calls(dtype=dtype),
        }

    return of


@pytest.mark.parametrize("name", [name for name, (_, leaf, _) in EXPECTED.items() if leaf])
def test_the_gradient_column_is_what_autograd_does(backend: str, calls: Any, name: str) -> None:
    gradient, leaf_name, _ = EXPECTED[name]
    arguments = calls()[name]
    given = arguments[leaf_name]
    listed = isinstance(given, list)
    leaf = (given[0] if listed else given).clone().requires_grad_()
    out = _registry.OPS[name].overload(**{**arguments, leaf_name: [leaf, *given[1:]] if listed else leaf})
    outs = out if isinstance(out, (tuple, list)) else (out,)
    results = [t for t in outs if t is not None and t.requires_grad]
    if gradient == "none":
        assert not results
    elif gradient == "raises":
        assert results
        with pytest.raises(RuntimeError, match="is not differentiable"):
            results[0].sum().backward()
    else:
        (first,) = torch.autograd.grad(results[0].square().sum(), leaf, create_graph=True)
        if gradient == "twice":
            torch.autograd.grad(first.square().sum(), leaf)
        else:
            with pytest.raises(RuntimeError, match="is not differentiable"):
                first.sum().backward()


def test_every_op_has_a_right_call(calls: Any) -> None:
    """Of which the tests of all ops make wrong ones."""
    right = calls()
    assert set(right) == set(EXPECTED) == set(_registry.OPS)
    for name, arguments in right.items():
        schema = _registry.OPS[name].overload._schema
        assert set(arguments) <= {a.name for a in schema.arguments}, name


def test_every_op_has_a_compiled_cpu_kernel() -> None:
    if _registry.LIBRARIES["cpu"] != "loaded":
        pytest.skip(f"compiled CPU library: {_registry.LIBRARIES['cpu']}")
    assert _registry.native_ops("cpu") == frozenset(_registry.OPS)


def test_every_op_of_the_namespace_is_in_the_table() -> None:
    names = {str(s.name).removeprefix("tlkernels::") + (f".{s.overload_name}" if s.overload_name else "")
             for s in torch._C._jit_get_all_schemas() if str(s.name).startswith("tlkernels::")}  # fmt: skip
    assert names == set(_registry.OPS)


OF_FLOATS = ["nf4_linear", "nf4_linear_t", "nf4_quantize"]  # the other nf4 ops take what the format holds
OF_FLOATS += [name for name in EXPECTED if "nf4" not in name and name not in OTHER_DTYPES and "absmax" not in name]
OF_FLOATS += ["nf4_lora_linear", "nf4_lora_grad_x"]


@pytest.mark.parametrize("name", OF_FLOATS)
def test_dtypes_of_the_table_run_and_others_raise(backend: str, calls: Any, name: str) -> None:
    op = _registry.OPS[name]
    assert op.dtypes == FLOATS
    first = "x" if name == "lora_grouped_delta_" else next(iter(calls()[name]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        op.overload(**calls(dtype)[name])
    for dtype in (torch.int32, torch.bool, torch.complex64):
        arguments = calls()[name]
        given, place = arguments[first], first
        if isinstance(given, list):
            wrong, place = [given[0].to(dtype), *given[1:]], re.escape(f"{first}[0]")
            place = place.replace("0\\]", "0\\](?:\\[0\\])?")  # grads[task][parameter]
        else:
            wrong = given.to(dtype)
        with pytest.raises((TypeError, ValueError, RuntimeError), match=f"{name}: {place} has dtype"):
            op.overload(**{**arguments, first: wrong})


# ---- forcing a backend ----------------------------------------------------------------------------------------------


def test_forced_reference_runs_python_and_is_undone() -> None:
    before = {name: served_by(name) for name in _registry.OPS}
    with tlkernels.backend("reference"):
        assert _registry.forced_backend() == "reference"
        assert {served_by(name) for name in _registry.OPS} == {"reference"}
        assert {row.backend for row in tlkernels.backends()} == {"reference"}
        with tlkernels.backend("reference"):
            pass
        assert _registry.forced_backend() == "reference"
    assert _registry.forced_backend() is None
    assert {name: served_by(name) for name in _registry.OPS} == before


def test_forced_backend_is_undone_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), tlkernels.backend("reference"):
        _ = 1 / 0
    assert _registry.forced_backend() is None


def test_forced_backend_holds_in_other_threads_and_in_backward() -> None:
    """Autograd's own threads and the user's obey as well: the choice stands in the dispatcher."""
    seen: list[str] = []
    with tlkernels.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(served_by("nf4_linear_t")))
        thread.start()
        thread.join()
        x = torch.randn(2, 64, requires_grad=True)
        ops.nf4_linear(x, WEIGHT).sum().backward()
        expected = ops.nf4_linear_t(torch.ones(2, 16), WEIGHT)
    assert seen == ["reference"] and torch.equal(x.grad, expected)


def test_unknown_and_missing_backends_raise_at_the_with() -> None:
    with pytest.raises(ValueError, match="backend: got 'gpu', expected one of reference, cpu, cuda, triton"):
        tlkernels.backend("gpu").__enter__()
    for name in ("cpu", "cuda", "triton"):
        if _registry.LIBRARIES[name] != "loaded":
            with pytest.raises(RuntimeError, match=f"backend: '{name}' is not available here: "):
                tlkernels.backend(name).__enter__()
    assert _registry.forced_backend() is None


# ---- the environment, in fresh processes ----------------------------------------------------------------------------

REPORT = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import tlkernels
import torch
weight = tlkernels.ops.nf4_quantize(torch.ones(4, 64))
print(json.dumps({
    "backends": sorted({r.backend for r in tlkernels.backends() if r.device == "cpu"}),
    "libraries": tlkernels.ops._registry.LIBRARIES,
    "warnings": [str(w.message) for w in caught if "tlkernels" in str(w.message)],
    "sum": float(tlkernels.ops.nf4_linear(torch.ones(64), weight).sum()),
    "modules": sorted({"triton", "bitsandbytes", "transformers", "safetensors", "rich"} & set(sys.modules)),
}))
"""


def fresh(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TLKERNELS_")}
    return subprocess.run(
        [sys.executable, "-c", REPORT], capture_output=True, text=True, cwd=tmp_path,
        env={**kept, "PYTHONPATH": str(Path(tlkernels.__file__).parents[1]), **environment},
    )  # fmt: skip


def test_plain_import(tmp_path: Path) -> None:
    """It says once what is missing, nothing else, and imports no optional dependency."""
    report = json.loads(fresh(tmp_path).stdout)
    loaded = _registry.LIBRARIES["cpu"] == "loaded"
    assert report["backends"] == ["cpu" if loaded else "reference"]
    assert len(report["warnings"]) == (0 if loaded else 1)
    assert report["sum"] == 4 * 64
    assert report["modules"] == []


def test_environment_forces_the_reference(tmp_path: Path) -> None:
    report = json.loads(fresh(tmp_path, TLKERNELS_BACKEND="reference").stdout)
    assert report["backends"] == ["reference"] and report["sum"] == 4 * 64


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        (
            {"TLKERNELS_BACKEND": "fpga"},
            "ValueError: backend: got 'fpga', expected one of reference, cpu, cuda, triton",
        ),
        ({"TLKERNELS_REQUIRE": "fpga"}, "ImportError: TLKERNELS_REQUIRE asks for 'fpga', but: no such backend"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_environment_that_cannot_be_met_fails_the_import(
    tmp_path: Path, environment: dict[str, str], error: str
) -> None:
    run = fresh(tmp_path, **environment)
    assert run.returncode != 0
    assert error in run.stderr, run.stderr
