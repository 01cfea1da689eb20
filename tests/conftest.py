"""What all tests share: poisoned memory, the backends to test, a right call of every op."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `import formula, tolerances`, whichever import mode pytest runs in

import tlkernels
from tlkernels.ops import _registry

hypothesis.settings.register_profile(
    "tlkernels",
    deadline=None,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tlkernels")


if "PYTEST_XDIST_WORKER" in os.environ:  # one core per worker; the tests of threads set their own number
    torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "isa: also runs once for every instruction-set level below this machine's own")


def pytest_report_header(config: pytest.Config) -> list[str]:
    rows = [f"tlkernels: {name}: {state}" for name, state in _registry.describe_libraries().items()]
    if importlib.util.find_spec("tlkernels._numpy") is not None:
        from tlkernels import _numpy

        rows.append(f"tlkernels: instruction set: {_numpy.level()}: {_numpy.reason()}")
    return rows


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN (or the largest integer), so an element that a kernel leaves unwritten fails a test."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that serves CPU tensors. TLKERNELS_REQUIRE=cpu makes a missing library fail the import instead."""
    if request.param == "cpu" and _registry.LIBRARIES["cpu"] != "loaded":
        pytest.skip(f"compiled CPU library: {_registry.LIBRARIES['cpu']}")
    with tlkernels.backend(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone at the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def nf4_calls() -> Callable[..., dict[str, dict[str, Any]]]:
    """`nf4_calls(out_features, in_features, ...)`: the arguments of a right call of every nf4 op, by the op's name."""

    def calls(
        out_features: int, in_features: int, *, rows: int = 5, dtype: torch.dtype = torch.float32, nested: bool = False,
        block_size: int = 64,
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        w = randn(out_features, in_features)
        weight = tlkernels.ops.nf4_quantize(w, block_size=block_size, double_quant=nested)
        absmax = tlkernels.ops.nf4_quantize(w, block_size=block_size).absmax
        q, scale, offset = tlkernels.ops.absmax_quantize(absmax)
        tensors = {
            "packed": weight.packed,
            "absmax": weight.absmax,
            "code": torch.tensor(tlkernels.ops.NF4_CODE),
            "absmax_scale": weight.absmax_scale,
            "absmax_offset": weight.absmax_offset,
        }
        sizes = {"out_features": out_features, "in_features": in_features}
        blocks = {"block_size": block_size, "absmax_block_size": 256}
        indices = torch.randint(0, max(1, out_features), (min(rows, out_features),), generator=generator)
        linear = {"x": randn(rows, in_features), **tensors, "bias": randn(out_features), **sizes, **blocks}
        return {
            "nf4_quantize": {"w": w, "code": tensors["code"], "block_size": block_size},
            "absmax_quantize": {"absmax": absmax, "offset": None, "block_size": 256},
            "absmax_dequantize": {"q": q, "scale": scale, "offset": offset, "block_size": 256},
            "nf4_dequantize": {**tensors, "shape": [out_features, in_features], "dtype": dtype, **blocks},
            "nf4_dequantize.out": {
                **tensors, "shape": [out_features, in_features], **blocks,
                "out": torch.empty(out_features, in_features, dtype=dtype),
            },
            "nf4_linear": linear,
            "nf4_linear_many": dict(linear),
            "nf4_linear_t": {"grad_output": randn(rows, out_features), **tensors, **sizes, **blocks},
            "nf4_embedding": {
                "indices": indices, **tensors, "num_embeddings": out_features, "embedding_dim": in_features,
                "dtype": dtype, **blocks,
            },
        }  # fmt: skip

    return calls


@pytest.fixture(scope="session")
def lora_calls(nf4_calls: Callable[..., dict[str, dict[str, Any]]]) -> Callable[..., dict[str, dict[str, Any]]]:
    """`lora_calls(out_features, in_features, ...)`: the arguments of a right call of every lora op, by its name."""

    def calls(
        out_features: int, in_features: int, *, rows: int = 5, rank: int = 3, adapters: int = 4,
        dtype: torch.dtype = torch.float32, factor_dtype: torch.dtype | None = None, nested: bool = False,
        block_size: int = 64, dropout: float = 0.25,
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        generator = torch.Generator().manual_seed(1)

        def randn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        def draw(low: int, high: int, n: int) -> torch.Tensor:
            return torch.randint(low, high, (n,), generator=generator)

        right = nf4_calls(out_features, in_features, rows=rows, dtype=dtype, nested=nested, block_size=block_size)
        dense, linear = {"weight": right["nf4_quantize"]["w"]}, right["nf4_linear"]
        packed = {k: linear[k] for k in ("packed", "absmax", "code", "absmax_scale", "absmax_offset")}
        sizes = {k: linear[k] for k in ("out_features", "in_features")}
        blocks = {k: linear[k] for k in ("block_size", "absmax_block_size")}
        x, bias, grad_output = {"x": linear["x"]}, {"bias": linear["bias"]}, {"grad_output": randn(rows, out_features)}
        s, ds = {"s": randn(rows, rank)}, {"ds": randn(rows, rank)}
        kind = factor_dtype or dtype
        factors = {
            "lora_a": randn(rank, in_features, dtype=kind) / max(1, in_features) ** 0.5,
            "lora_b": randn(out_features, rank, dtype=kind),
        }
        rng = {"rng": torch.tensor([2**40 + 17, -(2**35)])}
        noise, scaling = {"dropout": dropout}, {"scaling": 0.75}
        ids, ranks = {"adapter_ids": draw(-1, adapters, rows)}, {"ranks": draw(0, rank + 1, adapters)}
        a, b = (randn(adapters, *factors[name].shape, dtype=kind) for name in ("lora_a", "lora_b"))
        group = {"lora_a": a, "lora_b": b, **ids, "scalings": randn(adapters, dtype=torch.float32), **ranks}
        grad_x = {"lora_a": factors["lora_a"], **rng}
        return {
            "lora_linear": {**x, **dense, **bias, **factors, **rng, **scaling, **noise},
            "nf4_lora_linear": {**x, **packed, **bias, **factors, **rng, **sizes, **scaling, **noise, **blocks},
            "lora_grad_ab": {**grad_output, **x, **s, **factors, **rng, **scaling, **noise},
            "lora_grad_x": {**grad_output, **dense, **ds, **grad_x, **noise},
            "nf4_lora_grad_x": {**grad_output, **packed, **ds, **grad_x, **sizes, **noise, **blocks},
            "lora_dropout_mask": {**rng, "rows": rows, "cols": in_features, "p": dropout},
            "lora_linear_grouped": {**x, **dense, **bias, **group},
            "lora_grouped_grad": {**grad_output, **x, **s, **group},
            "lora_grouped_grad_x": {**grad_output, **dense, **ds, "lora_a": a, **ids, **ranks},
            "lora_grouped_delta_": {"y": randn(rows, out_features + 3), **x, **group, "start": 2},
            "dora_weight_norm": {**dense, **factors, **scaling},
            "nf4_dora_weight_norm": {**packed, **factors, **sizes, **scaling, **blocks},
            "lora_merge_": {"weight": dense["weight"].clone(), **factors, **scaling},
        }

    return calls


@pytest.fixture(scope="session")
def contrastive_calls() -> Callable[..., dict[str, dict[str, Any]]]:
    """`contrastive_calls(rows, columns, features, ...)`: a right call of every contrastive op, by the op's name."""

    def calls(
        rows: int, columns: int, features: int, *, dtype: torch.dtype = torch.float32, scale: float = 5.0,
        symmetric: bool = False,
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        columns = rows if symmetric else columns
        generator = torch.Generator().manual_seed(2)
        acc = torch.promote_types(dtype, torch.float32)

        def randn(*shape: int, dtype: torch.dtype = acc) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        def draw() -> torch.Tensor:
            return torch.randint(-1, columns, (rows,), generator=generator)

        x, y = (torch.nn.functional.normalize(randn(n, features), dim=1).to(dtype) for n in (rows, columns))
        other = None if symmetric else y
        scalars = {"logit_scale": torch.tensor(scale), "logit_bias": torch.tensor(-0.5)}
        z = scale * x.double() @ (x if symmetric else y).double().T - 0.5
        column = (None, None) if symmetric else (z.logsumexp(0).to(acc), randn(columns))
        softmax = {"x": x, "y": other, **scalars, "labels": draw(), "exclude": draw()}
        sigmoid = {"x": x, "y": y, **scalars, "labels": softmax["labels"]}
        needs = {"need_x": True, "need_y": True}
        return {
            "sim_lse": {**softmax, "cols": True},
            "sim_lse_backward": {
                **softmax, "lse_row": z.logsumexp(1).to(acc), "lse_col": column[0], "grad_row": randn(rows),
                "grad_col": column[1], "grad_pair": randn(rows), **needs,
            },
            "sigmoid_contrastive": sigmoid,
            "sigmoid_contrastive_backward": {**sigmoid, "grad_loss": randn(rows), **needs},
            "sigmoid_contrastive_sum": {**sigmoid, **needs},
        }  # fmt: skip

    return calls


@pytest.fixture(scope="session")
def mmd_calls() -> Callable[..., dict[str, dict[str, Any]]]:
    """`mmd_calls(n, m, features, ...)`: a right call of every op of mmd, coral and drift, by the op's name."""

    def calls(
        n: int, m: int, features: int, *, dtype: torch.dtype = torch.float32, kind: str = "gaussian", kernels: int = 3,
        ranks: int = 1, problems: int = 1,
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        generator = torch.Generator().manual_seed(3)
        acc = torch.promote_types(dtype, torch.float32)
        kernels = 1 if kind == "energy" else kernels

        def randn(*shape: int, dtype: torch.dtype = acc) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        def weights(rows: int) -> torch.Tensor:
            return (torch.rand(rows, ranks, generator=generator) + 0.5).to(acc) / max(1, rows)

        def rows(count: int) -> torch.Tensor:
            return torch.cat([randn(count, features) * (1 + p) for p in range(problems)])

        x, y = rows(n).to(dtype), (rows(m) + 0.3).to(dtype)
        doubled = 0.7 * max(1, features) * 2.0 ** torch.arange(kernels).to(acc)
        sigma2 = None if kind == "energy" else (doubled * torch.ones(problems, 1).to(acc)).contiguous()
        beta = (torch.rand(problems, kernels, generator=generator) + 0.2).to(acc)
        coef = torch.tensor([[1.25, 1.5, -1.0]]).to(acc).repeat(problems, 1)
        samples = {"x": x, "y": y}
        return {
            "kernel_mmd2": {
                **samples, "sigma2": sigma2, "beta": beta, "coef": coef, "wx": weights(n * problems),
                "wy": weights(m * problems), "x_offsets": [n * p for p in range(problems + 1)],
                "y_offsets": [m * p for p in range(problems + 1)], "widths": [features], "kernels": [kernels],
                "kind": kind, "degree": 3, "coef0": 1.0, "diagonal": False, "need_x": True, "need_y": True,
                "need_w": True, "need_k": True,
            },
            "mmd2_permutation": {
                **samples, "sigma2": None if sigma2 is None else sigma2[0].clone(), "beta": beta[0].clone(),
                "n_perm": 20, "seed": 5, "kind": kind,
            },
            "median_sqdist": samples,
            "paired_sqdist": samples,
            "paired_sqdist_backward": {**samples, "grad": randn(min(n, m) * problems // 2, 4)},
            "pairwise_sqdist": {**samples, "center": True},
            "covariance": {"x": x, "weight": weights(n * problems)[:, 0].contiguous() * n + 1, "ddof": 1},
            "coral_sq": {**samples, "centered": False, "need_x": True, "need_y": True},
            "feature_histogram": {"x": x, "edges": randn(features, 5).sort().values},
        }  # fmt: skip

    return calls


@pytest.fixture(scope="session")
def fisher_calls() -> Callable[..., dict[str, dict[str, Any]]]:
    """`fisher_calls(...)`: a right call of every op of fisher and gradgram, by the op's name.

    The tokens of a sample correlate, as those of a sample do.
    """

    def calls(
        samples: int = 3, tokens: int = 4, inputs: int = 7, outputs: int = 5, *, dtype: torch.dtype = torch.float32,
        ragged: bool = False, tasks: int = 3,
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        generator = torch.Generator().manual_seed(11)
        acc = torch.promote_types(dtype, torch.float32)

        def randn(*shape: int, dtype: torch.dtype = acc) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        def positive(*shape: int) -> torch.Tensor:
            return (torch.rand(shape, generator=generator) + 0.5).to(acc)

        def correlated(features: int) -> torch.Tensor:
            one = torch.randn(samples, 1, features, generator=generator)
            many = (one + 0.3 * torch.randn(samples, tokens, features, generator=generator)).to(dtype)
            return many.flatten(0, 1) if ragged else many

        offsets = [0, *(max(0, tokens * n - n % 2) for n in range(1, samples)), samples * tokens] if ragged else []
        act, grad_out = correlated(inputs), correlated(outputs)
        how = {"sample_offsets": offsets, "scale": 0.75, "sample_weight": positive(samples)}
        indices = torch.randint(0, 6, tuple(grad_out.shape[:-1]), generator=generator)
        shapes = ((3, 5), (17,), (), (0, 4), (40, 3))
        lists = {name: [randn(*s, dtype=dtype) for s in shapes] for name in ("params", "anchors")}
        lists["importances"] = [positive(*s) for s in shapes]
        sums = [positive(*s) for s in shapes]
        grads = [randn(*s, dtype=dtype) for _ in range(tasks) for s in shapes]
        if tasks > 1:
            grads[len(shapes) + 1] = randn(0, dtype=dtype)
        x = randn(*act.shape, dtype=dtype) + 1
        return {
            "diag_fisher_linear_": {
                "act": act, "grad_out": grad_out, "f_w": positive(outputs, inputs), "f_b": positive(outputs), **how,
            },
            "diag_fisher_conv2d_": {
                "act": randn(samples, 4, 8, 6, dtype=dtype), "grad_out": randn(samples, 6, 4, 4, dtype=dtype),
                "f_w": positive(6, 2, 3, 2), "f_b": positive(6), "stride": [2, 2], "padding": [1, 1],
                "dilation": [1, 1], "groups": 2, "scale": 0.75, "sample_weight": positive(samples),
            },
            "diag_fisher_embedding_": {
                "grad_out": grad_out, "indices": indices, "f_w": positive(6, outputs), "padding_idx": 2, **how,
            },
            "diag_fisher_norm_": {
                "x": x, "grad_out": act, "f_w": positive(inputs), "f_b": positive(inputs), "norm": "layer",
                "eps": 1e-5, **how,
            },
            "diag_fisher_channel_norm_": {
                "x": randn(samples, 5, 9, dtype=dtype) + 1, "grad_out": randn(samples, 5, 9, dtype=dtype),
                "f_w": positive(5), "f_b": positive(5), "mean": randn(5), "rstd": positive(5), "scale": 0.75,
                "sample_weight": positive(samples),
            },
            "per_sample_sqnorm_linear": {"act": act, "grad_out": grad_out, "sample_offsets": offsets},
            "kfac_factors_linear_": {
                "act": act, "grad_out": grad_out, "A": positive(inputs + 1, inputs + 1),
                "G": positive(outputs, outputs), "bias": True, "approx": "expand", "sample_offsets": offsets,
                "token_weight": positive(*act.shape[:-1]), "scale_a": 0.5, "scale_g": 2.0,
            },
            "importance_accum_": {
                "grads": lists["params"], "acc": sums, "kind": "sq", "decay": 0.9, "scale": 0.5,
            },
            "si_accum_": {"grads": lists["params"], "omega": sums, "deltas": lists["anchors"], "scale": -1.0},
            "quad_penalty": lists,
            "quad_penalty_backward": {**lists, "grad": torch.tensor(1.5).to(acc)},
            "quad_penalty_grad_": {**lists, "grads": [randn(*s, dtype=dtype) for s in shapes], "scale": 0.75},
            "task_gram": {"grads": grads, "tasks": tasks},
            "task_combine_": {
                "out": [randn(*s, dtype=dtype) for s in shapes * 2], "grads": grads,
                "weights": positive(2, tasks), "accumulate": True,
            },
        }  # fmt: skip

    return calls
