"""The Triton kernels of the fisher and gradgram families: run by Triton's interpreter, on a GPU, and compiled.

They are held against the ops' float64 references, whose formulas tests/ops/test_fisher.py and its kin hold against
autograd's, and against figures that can be written down.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_modes
from formula import same_bits
from torch import Tensor
from triton_modes import check_signature, compiled, integers_of, on_every_device, ops_of, outcome, randn, target

import tlkernels
from tlkernels import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = [*ops_of("fisher"), *ops_of("gradgram")]
#: what of a call is changed, by its argument
WRITTEN = {
    "diag_fisher_linear_": ("f_w", "f_b"), "diag_fisher_conv2d_": ("f_w", "f_b"), "diag_fisher_embedding_": ("f_w",),
    "diag_fisher_norm_": ("f_w", "f_b"), "diag_fisher_channel_norm_": ("f_w", "f_b"),
    "kfac_factors_linear_": ("A", "G"), "importance_accum_": ("acc",), "si_accum_": ("omega",),
    "quad_penalty_grad_": ("grads",), "task_combine_": ("out",),
}  # fmt: skip


# ---- helpers --------------------------------------------------------------------------------------------------------


def changed(value: Any, how: Any) -> Any:
    """Each tensor of an argument, a list's too."""
    if isinstance(value, Tensor):
        return how(value)
    return [how(t) for t in value] if isinstance(value, list) and value and isinstance(value[0], Tensor) else value


def run(backend: str, name: str, arguments: dict[str, Any], device: str = "interpreter") -> list[Tensor]:
    """What an op returns, and what it has written."""
    place = target(device)

    def placed(t: Tensor) -> Tensor:
        # strides stay as they are
        return t.to(place) if place.type != "cpu" else t.clone()

    arguments = {k: changed(v, placed) for k, v in arguments.items()}
    with tlkernels.backend(backend):
        out = getattr(torch.ops.tlkernels, name).default(**arguments)
    found = [] if out is None else [out] if isinstance(out, Tensor) else list(out)
    for key in WRITTEN.get(name, ()):
        value = arguments[key]
        found += [] if value is None else [value] if isinstance(value, Tensor) else value
    return [t.cpu() for t in found]


def widened(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def check(device: str, name: str, arguments: dict[str, Any], bound: float = 1e-6, context: object = "") -> list[Tensor]:
    """Of the same numbers, with no rounding but that of the numbers themselves, and of results to their dtype."""
    got = run("triton", name, arguments, device)
    want = run("reference", name, {k: changed(v, widened) for k, v in arguments.items()})
    assert len(got) == len(want) > 0
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(g.dtype, 0.0)
        assert torch.equal(g.isnan(), w.isnan()), (name, context)
        g, w = g.double().nan_to_num(), w.nan_to_num()
        assert (g - w).norm() <= (bound + rounding) * w.norm(), (name, context, float((g - w).norm() / w.norm()))
    return got


def positive(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).abs() + 0.2


def linear(
    tokens: int | list[int], ins: int, outs: int, *, samples: int = 5, dtype: torch.dtype = torch.float32,
    weight: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """A call of ``diag_fisher_linear_``, on accumulators that are not 0; ragged where tokens are bounds."""
    ragged = isinstance(tokens, list)
    rows = (tokens[-1],) if isinstance(tokens, list) else (samples, tokens)
    samples = len(tokens) - 1 if isinstance(tokens, list) else samples
    return {
        "f_w": positive(outs, ins, seed=1), "f_b": positive(outs, seed=2),
        "act": randn(*rows, ins, seed=3, dtype=dtype),
        "grad_out": randn(*rows, outs, seed=4, dtype=dtype), "sample_offsets": tokens if ragged else [], "scale": 0.7,
        "sample_weight": positive(samples, seed=5) if weight else None,
    }  # fmt: skip


def without(arguments: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    return {**{k: v for k, v in arguments.items() if k not in names}, **more}


def conv(
    size: tuple[int, ...], outs: int, kernel: tuple[int, int], *, groups: int = 1, dtype: torch.dtype = torch.float32,
    stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0), dilation: tuple[int, int] = (1, 1),
) -> dict[str, Any]:  # fmt: skip
    n, channels = size[:2]
    result = [
        (e + 2 * p - d * (k - 1) - 1) // s + 1
        for e, p, d, k, s in zip(size[2:], padding, dilation, kernel, stride, strict=True)
    ]
    return {
        "f_w": positive(outs, channels // groups, *kernel, seed=1), "f_b": positive(outs, seed=2),
        "act": randn(*size, seed=3, dtype=dtype), "grad_out": randn(n, outs, *result, seed=4, dtype=dtype),
        "stride": list(stride), "padding": list(padding), "dilation": list(dilation), "groups": groups, "scale": 1.3,
        "sample_weight": positive(n, seed=5),
    }  # fmt: skip


def penalty(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Tensors of less than a program, of more than one, without elements and without dimensions."""
    shapes = [(3, 5), (9000,), (0, 4), ()]
    lists: dict[str, list[Tensor]] = {
        name: [randn(*s, seed=10 * k + i, dtype=dtype) for i, s in enumerate(shapes)]
        for k, name in enumerate(("params", "anchors"))
    }
    wide = torch.promote_types(dtype, torch.float32)
    return {**lists, "importances": [positive(*s, seed=30 + i).to(wide) for i, s in enumerate(shapes)]}


def tasks_of(
    tasks: int, shapes: list[tuple[int, ...]], *, absent: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Gradients of tasks, one task's after another's; those that `absent` counts are none."""
    every = [randn(*s, seed=t * 17 + p, dtype=dtype) for t in range(tasks) for p, s in enumerate(shapes)]
    return [t.new_empty(0) if i in absent else t for i, t in enumerate(every)]


@contextlib.contextmanager
def many_parts() -> Iterator[None]:
    """Samples cut into as many parts as there are."""
    from tlkernels.triton_kernels import fisher

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fisher, "_WAVES", 1000)
        yield


# ---- squares --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_linear_sizes_and_cuts(device: str, dtype: torch.dtype) -> None:
    """Whole tiles, one more, one less; one token and many; samples in one part, and each in one of its own."""
    for tokens, ins, outs in ((1, 16, 16), (1, 65, 130), (3, 17, 33), (33, 64, 1), (40, 1, 5), (2, 129, 66), (0, 3, 4)):
        arguments = linear(tokens, ins, outs, dtype=dtype)
        check(device, "diag_fisher_linear_", arguments, context=(tokens, ins, outs))
        with many_parts():
            check(device, "diag_fisher_linear_", arguments, context=(tokens, ins, outs))
    for tokens in (1, 3):
        check(device, "diag_fisher_linear_", linear(tokens, 17, 33, dtype=dtype, weight=False), context=tokens)


@on_every_device
def test_linear_ragged(device: str) -> None:
    """Samples of one token, of many, of none, the first and the last of none too."""
    for offsets in ([0, 0, 3, 3, 4, 40, 40], [0, 21], [0, 1, 2, 3]):
        arguments = linear(offsets, 19, 7)
        check(device, "diag_fisher_linear_", arguments, context=offsets)
        with many_parts():
            check(device, "diag_fisher_linear_", arguments, context=offsets)


@on_every_device
def test_linear_parts_of_a_call(device: str) -> None:
    arguments = linear(4, 6, 5)
    check(device, "diag_fisher_linear_", {**arguments, "f_w": None})
    check(device, "diag_fisher_linear_", {**arguments, "f_b": None})
    none = linear(4, 6, 5, samples=0)
    assert all(torch.equal(a, b) for a, b in zip(run("triton", "diag_fisher_linear_", none, device),
                                                 (none["f_w"], none["f_b"]), strict=True))  # fmt: skip


@on_every_device
def test_a_square_of_a_sum_is_not_a_sum_of_squares(device: str) -> None:
    """Two equal tokens count four times one of them, and opposite ones nothing."""
    a, g = randn(1, 1, 4), randn(1, 1, 3, seed=1)
    for sign, factor in ((1.0, 4.0), (-1.0, 0.0)):
        arguments = {
            "f_w": torch.zeros(3, 4), "f_b": torch.zeros(3), "act": torch.cat([a, a], 1),
            "grad_out": torch.cat([g, sign * g], 1), "sample_offsets": [],
        }  # fmt: skip
        f_w, f_b = run("triton", "diag_fisher_linear_", arguments, device)
        torch.testing.assert_close(f_w, factor * (g[0].mT @ a[0]).square())
        torch.testing.assert_close(f_b, factor * g[0, 0].square())


@on_every_device
def test_strided_tensors(device: str) -> None:
    """Inputs and accumulators whose elements do not follow one another."""
    right = linear(5, 12, 10)
    arguments = {
        **right, "act": randn(5, 12, 5).mT, "grad_out": randn(5, 5, 20, seed=1)[..., ::2],
        "f_w": right["f_w"].mT.contiguous().mT, "sample_weight": positive(10)[::2],
    }  # fmt: skip
    got = check(device, "diag_fisher_linear_", arguments)
    assert same_bits(got[0], run("triton", "diag_fisher_linear_", {**arguments, "f_w": right["f_w"]}, device)[0])
    check(device, "diag_fisher_linear_", linear([0, 4, 9], 6, 5) | {"act": randn(6, 9).mT})
    one = linear(1, 12, 10)
    check(device, "diag_fisher_linear_", {**one, "act": randn(5, 1, 24)[..., ::2], "f_w": positive(12, 10).mT})
    arguments = conv((2, 4, 6, 6), 6, (3, 3), padding=(1, 1))
    last = {"memory_format": torch.channels_last}
    arguments |= {k: arguments[k].contiguous(**last) for k in ("f_w", "act", "grad_out")}
    check(device, "diag_fisher_conv2d_", arguments)


@pytest.mark.parametrize("name", ["diag_fisher_linear_", "per_sample_sqnorm_linear"])
@on_every_device
def test_nan_and_infinity_stay_where_they_belong(device: str, name: str) -> None:
    for tokens in (1, 3):
        arguments = linear(tokens, 20, 18)
        if name == "per_sample_sqnorm_linear":
            arguments = without(arguments, "f_w", "f_b", "scale", "sample_weight")
        arguments["act"][2, 0, 7] = float("nan")
        got = check(device, name, arguments)
        assert int(got[0].isnan().sum()) == (18 if name == "diag_fisher_linear_" else 1)
        arguments["act"][2, 0, 7] = float("inf")
        got = run("triton", name, arguments, device)
        assert int(got[0].isinf().sum()) == (18 if name == "diag_fisher_linear_" else 1)
        assert not got[0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_convolutions(device: str, dtype: torch.dtype) -> None:
    for arguments in (
        conv((3, 2, 5, 7), 4, (3, 3), dtype=dtype), conv((2, 6, 9, 8), 4, (3, 2), groups=2, stride=(2, 1), dtype=dtype),
        conv((2, 3, 6, 6), 3, (3, 3), groups=3, padding=(1, 2), dilation=(2, 1), dtype=dtype),
        conv((2, 18, 4, 4), 20, (1, 1), dtype=dtype), conv((4, 5, 1, 1), 3, (1, 1), dtype=dtype),
        conv((2, 3, 7, 5), 17, (4, 4), stride=(3, 2), padding=(2, 3), dtype=dtype),
    ):  # fmt: skip
        context = arguments["f_w"].shape
        check(device, "diag_fisher_conv2d_", arguments, context=context)
        with many_parts():
            check(device, "diag_fisher_conv2d_", {**arguments, "sample_weight": None}, context=context)
    check(device, "diag_fisher_conv2d_", {**arguments, "f_b": None})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_embeddings(device: str, dtype: torch.dtype) -> None:
    """An index in several samples, several times in one, and in none."""
    generator = torch.Generator().manual_seed(0)
    for width, offsets, padding in ((10, [], 2), (1, [], -1), (300, [0, 3, 3, 24], 0)):
        samples = len(offsets) - 1 if offsets else 4
        rows = (24,) if offsets else (4, 6)
        arguments = {
            "f_w": positive(7, width), "indices": torch.randint(0, 6, rows, generator=generator),
            "grad_out": randn(*rows, width, dtype=dtype), "padding_idx": padding, "sample_offsets": offsets,
            "scale": 0.6, "sample_weight": positive(samples),
        }  # fmt: skip
        (got,) = check(device, "diag_fisher_embedding_", arguments)
        assert torch.equal(got[6], arguments["f_w"][6])
        assert padding < 0 or torch.equal(got[padding], arguments["f_w"][padding])
        check(device, "diag_fisher_embedding_", {**arguments, "sample_weight": None})
    arguments["f_w"], arguments["grad_out"] = positive(300, 7).mT, randn(300, 24).mT
    check(device, "diag_fisher_embedding_", arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_norms(device: str, dtype: torch.dtype) -> None:
    for norm in ("layer", "rms", "none"):
        for tokens, width in ((1, 5), (17, 64), (2, 300), ([0, 2, 2, 19, 20], 65)):
            right = linear(tokens, width, width, dtype=dtype)
            arguments = without(right, "act", f_w=positive(width), x=right["act"] + 3, norm=norm, eps=1e-3)
            check(device, "diag_fisher_norm_", arguments, 3e-6, (norm, tokens, width))
        with many_parts():
            check(device, "diag_fisher_norm_", {**arguments, "f_b": None}, 3e-6, norm)
    check(device, "diag_fisher_norm_", {**arguments, "f_w": None})
    strided = linear(4, 9, 9)
    strided = without(strided, "act", f_w=positive(9), x=randn(5, 9, 4).mT, norm="layer", eps=1e-5)
    check(device, "diag_fisher_norm_", strided, 3e-6)
    # a row of equal numbers has no direction: 0 with an eps, 0 / 0 without
    strided["x"] = torch.ones(5, 4, 9)
    assert torch.equal(run("triton", "diag_fisher_norm_", strided, device)[0], strided["f_w"])
    assert run("triton", "diag_fisher_norm_", {**strided, "eps": 0.0}, device)[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_channel_norms(device: str, dtype: torch.dtype) -> None:
    for size in ((3, 5, 1), (2, 70, 33), (4, 1, 9)):
        arguments = {
            "f_w": positive(size[1]), "f_b": positive(size[1]), "x": randn(*size, seed=1, dtype=dtype),
            "grad_out": randn(*size, seed=2, dtype=dtype), "mean": randn(size[1], seed=3),
            "rstd": positive(size[1], seed=4), "scale": 2.0, "sample_weight": positive(size[0], seed=5),
        }  # fmt: skip
        check(device, "diag_fisher_channel_norm_", arguments, 3e-6, size)
        with many_parts():
            check(device, "diag_fisher_channel_norm_", {**arguments, "sample_weight": None}, 3e-6, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_norms_of_samples(device: str, dtype: torch.dtype) -> None:
    for tokens, ins, outs in ((1, 6, 5), (9, 130, 66), (40, 16, 17), ([0, 0, 3, 30], 20, 70), (3, 0, 4)):
        arguments = without(linear(tokens, ins, outs, dtype=dtype), "f_w", "f_b", "scale", "sample_weight")
        check(device, "per_sample_sqnorm_linear", arguments, context=(tokens, ins, outs))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@on_every_device
def test_kronecker_factors(device: str, approx: str) -> None:
    for dtype in DTYPES:
        for tokens, ins, outs, bias in (
            (1, 6, 5, True), *([(7, 65, 16, True), (2, 16, 66, False)] if dtype == torch.float32 else []),
            ([0, 4, 4, 9], 3, 4, True),
        ):  # fmt: skip
            right = linear(tokens, ins, outs, dtype=dtype)
            side, rows = ins + bias, right["act"].shape[:-1]
            arguments = {
                "A": positive(side, side, seed=7), "G": positive(outs, outs, seed=8), "bias": bias, "approx": approx,
                "scale_a": 0.4, "scale_g": 1.7, **without(right, "f_w", "f_b", "scale", "sample_weight"),
            }  # fmt: skip
            for weight in (None, (positive(*rows) > 0.5).float() * positive(*rows, seed=2)):
                context = (dtype, tokens, ins, outs, weight is None)
                check(device, "kfac_factors_linear_", {**arguments, "token_weight": weight}, context=context)
                fresh = {**arguments, "A": torch.zeros(side, side), "G": torch.zeros(outs, outs)}
                with many_parts():
                    got = check(device, "kfac_factors_linear_", {**fresh, "token_weight": weight}, context=context)
                assert all(torch.equal(t, t.mT) for t in got)
    check(device, "kfac_factors_linear_", {**arguments, "A": None})
    check(device, "kfac_factors_linear_", {**arguments, "G": None, "A": arguments["A"].mT})


# ---- sweeps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_sweeps(device: str, dtype: torch.dtype) -> None:
    lists = penalty(dtype)
    for kind in ("sq", "abs"):
        arguments = {"acc": lists["importances"], "grads": lists["params"], "kind": kind, "decay": 0.9, "scale": 0.3}
        check(device, "importance_accum_", arguments)
    arguments = {"omega": lists["importances"], "grads": lists["params"], "deltas": lists["anchors"], "scale": -0.3}
    check(device, "si_accum_", arguments)
    check(device, "quad_penalty", lists)
    check(device, "quad_penalty_backward", {"grad": torch.tensor(1.7), **lists})
    arguments = {"grads": [randn(*p.shape, seed=50, dtype=dtype) for p in lists["params"]], **lists, "scale": 0.3}
    check(device, "quad_penalty_grad_", arguments)


@on_every_device
def test_sweeps_of_strided_and_mixed_tensors(device: str) -> None:
    lists = {k: [t[:, ::2].mT for t in (randn(4, 6, seed=i), randn(8, 10, seed=9 * i))] for i, k in
             enumerate(("params", "anchors", "importances", "grads"))}  # fmt: skip
    for name in ("params", "anchors", "grads"):
        lists[name][1] = lists[name][1].half()
    check(device, "quad_penalty_grad_", {**lists, "scale": 2.0})
    check(device, "importance_accum_", {"acc": lists["importances"], "grads": lists["grads"], "kind": "sq"})
    check(device, "quad_penalty", without(lists, "grads"))
    lists["params"][0][1, 1] = float("nan")
    assert run("triton", "quad_penalty", without(lists, "grads"), device)[0].isnan()


@on_every_device
def test_gradients_of_the_penalty(device: str) -> None:
    """Through autograd, with a factor that is not 1, by all three lists."""
    found = []
    for backend in ("reference", "triton"):
        lists = {k: [t.to(target(device)).requires_grad_() for t in v] for k, v in penalty().items()}
        with tlkernels.backend(backend):
            (3 * ops.quad_penalty(*lists.values())).backward()
        found.append([t.grad.cpu() for v in lists.values() for t in v])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---- tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_gram_matrices(device: str, dtype: torch.dtype) -> None:
    """One program and several for a tensor, more tasks than a tile has, tensors of some tasks only."""
    for tasks, shapes, absent in (
        (1, [(5,)], ()), (3, [(40, 500), (7,), (3, 3)], (1, 5)), (70, [(33,), (9, 8)], (0, 4)),
        (2, [(), (0, 3), (2,)], ()),
    ):  # fmt: skip
        grads = tasks_of(tasks, shapes, absent=absent, dtype=dtype)
        (gram,) = check(device, "task_gram", {"grads": grads, "tasks": tasks}, context=(tasks, shapes))
        assert gram.dtype == torch.float64 and torch.equal(gram, gram.mT)


@on_every_device
def test_gram_matrices_of_mixed_strided_and_infinite_tensors(device: str) -> None:
    grads = []
    for k in range(3):
        grads += [randn(6, 8, seed=k)[:, 1::2], randn(9, seed=k)[1:].half(), randn(4, 5, seed=k).mT]
    check(device, "task_gram", {"grads": grads, "tasks": 3})
    grads[0][2, 1], grads[3] = float("inf"), torch.empty(0)
    (gram,) = run("triton", "task_gram", {"grads": grads, "tasks": 3}, device)
    assert gram[0, 0].isinf() and gram[0, 2].isinf() and gram[0, 1].isfinite() and gram[1:, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_combinations(device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    from tlkernels.triton_kernels import gradgram

    shapes: list[tuple[int, ...]] = [(40, 500), (7,), (), (0, 2), (4, 8)]
    grads = tasks_of(2, shapes[:1], dtype=dtype)
    arguments = {"out": [torch.zeros(40, 500, dtype=dtype)], "grads": grads, "weights": randn(1, 2)}
    check(device, "task_combine_", arguments)
    monkeypatch.setattr(gradgram, "_CHUNK", 256)
    shapes[0] = (12, 50)
    for tasks, results in ((1, 1), (3, 1), (4, 3), (2, 19)):
        grads = tasks_of(tasks, shapes, absent=(1, 4), dtype=dtype)
        for accumulate in (False, True):
            out = [randn(*s, seed=90 + r, dtype=dtype) for r in range(results) for s in shapes]
            weights = randn(results, tasks, seed=5, dtype=torch.float64)
            arguments = {"out": out, "grads": grads, "weights": weights, "accumulate": accumulate}
            check(device, "task_combine_", arguments, context=(tasks, results, accumulate))
    strided = [t.mT.contiguous().mT if t.dim() == 2 else t for t in out]
    check(device, "task_combine_", {**arguments, "out": strided, "weights": weights.float().T.contiguous().T})


@on_every_device
def test_an_absent_gradient_is_not_multiplied(device: str) -> None:
    """A weight of infinity leaves it nothing; NaN elsewhere stays."""
    grads = tasks_of(2, [(4,), (5,)], absent=(0,))
    grads[3][2] = float("nan")
    weights = torch.tensor([[float("inf"), 2.0]])
    first, second = run("triton", "task_combine_", {
        "out": [torch.zeros(4), torch.zeros(5)], "grads": grads, "weights": weights}, device)  # fmt: skip
    assert torch.equal(first, 2 * grads[2])
    assert second[2].isnan() and second.isinf().sum() == 4


# ---- every op -------------------------------------------------------------------------------------------------------


def calls(dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Any]]:
    """A right call of every op."""
    wide = torch.promote_types(dtype, torch.float32)
    right = linear([0, 3, 9, 20], 12, 12, dtype=dtype)
    right |= {k: right[k].to(wide) for k in ("f_w", "f_b", "sample_weight")}
    pictures = conv((3, 4, 6, 5), 4, (3, 2), groups=2, dtype=dtype)
    pictures |= {k: pictures[k].to(wide) for k in ("f_w", "f_b", "sample_weight")}
    lists, vector = penalty(dtype), right["f_b"]
    grads = tasks_of(3, [(40, 5), (7,)], absent=(1,), dtype=dtype)
    tokens = without(right, "f_w", "f_b", "scale", "sample_weight")
    of_norm = without(right, "act", f_w=vector.clone(), x=right["act"])
    return {
        "diag_fisher_linear_": right, "diag_fisher_conv2d_": pictures,
        "diag_fisher_embedding_": without(right, "act", "f_b", indices=torch.arange(20) % 7, padding_idx=2),
        "diag_fisher_norm_": {**of_norm, "norm": "layer", "eps": 1e-5},
        "diag_fisher_channel_norm_": {
            "f_w": vector.clone(), "f_b": vector.clone(), "x": randn(3, 12, 4, dtype=dtype),
            "grad_out": randn(3, 12, 4, seed=1, dtype=dtype), "mean": vector, "rstd": vector,
            "sample_weight": right["sample_weight"],
        },
        "per_sample_sqnorm_linear": tokens,
        "kfac_factors_linear_": {
            **tokens, "A": torch.zeros(13, 13, dtype=wide), "G": torch.zeros(12, 12, dtype=wide), "bias": True,
            "approx": "reduce", "token_weight": positive(20).to(wide),
        },
        "importance_accum_": {"acc": lists["importances"], "grads": lists["params"], "kind": "sq"},
        "si_accum_": {"omega": lists["importances"], "grads": lists["params"], "deltas": lists["anchors"]},
        "quad_penalty": lists, "quad_penalty_backward": {"grad": torch.tensor(2.0, dtype=wide), **lists},
        "quad_penalty_grad_": {"grads": [p + 1 for p in lists["params"]], **lists, "scale": 0.5},
        "task_gram": {"grads": grads, "tasks": 3},
        "task_combine_": {
            "out": [torch.zeros(40, 5, dtype=dtype), torch.zeros(7, dtype=dtype)], "grads": grads,
            "weights": positive(1, 3),
        },
    }  # fmt: skip


def wrong(arguments: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each argument of a right call, wrong in one way."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield f"{name}: dtype", {name: value.to(torch.int32)}
            yield f"{name}: another float", {name: value.half()}
            yield f"{name}: elsewhere", {name: value.to("meta")}
            if value.dim():
                yield f"{name}: one less", {name: value.narrow(-1, 0, value.shape[-1] - 1)}
                yield f"{name}: one row", {name: value[:1]}
                yield f"{name}: flat", {name: value[0]}
            if value.dtype == torch.int64:
                yield f"{name}: large", {name: value + 9}
                yield f"{name}: below", {name: value - 1}
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            yield f"{name}: one less", {name: value[:-1]}
            yield f"{name}: dtype", {name: [value[0].int(), *value[1:]]}
            yield f"{name}: another float", {name: [value[0].half(), *value[1:]]}
            yield f"{name}: flat", {name: [value[0][0], *value[1:]]}
            yield f"{name}: elsewhere", {name: [*value[:-1], value[-1].to("meta")]}
        elif name == "sample_offsets":
            yield f"{name}: too short", {name: value[:-1]}
            yield f"{name}: descends", {name: [0, 9, 3, 20]}
            yield f"{name}: none", {name: []}
        elif name in ("stride", "dilation", "padding"):
            yield f"{name}: negative", {name: [-1, 1]}
            yield f"{name}: of one", {name: value[:1]}
            yield f"{name}: larger", {name: [v + 1 for v in value]}
        elif isinstance(value, str):
            yield f"{name}: unknown", {name: "other"}
    for name, value in (
        ("groups", 3), ("groups", 0), ("eps", -1.0), ("padding_idx", 99), ("padding_idx", -2), ("tasks", 0),
        ("tasks", 4),
    ):  # fmt: skip
        if name in arguments:
            yield f"{name}: {value}", {name: value}


@pytest.mark.parametrize("name", NAMES)
@on_every_device
def test_wrong_calls_get_the_reference_s_words(device: str, name: str) -> None:
    place, said = target(device), 0
    right = {k: changed(v, lambda t: t.to(place)) for k, v in calls()[name].items()}
    assert outcome("triton", name, right) is None
    for how, change in wrong(right):
        said_by, got = (outcome(backend, name, {**right, **change}) for backend in ("reference", "triton"))
        assert (got is None) == (said_by is None), (how, got, said_by)
        if said_by is not None and said_by[1].startswith(f"{name}:"):
            assert got == said_by, (how, got, said_by)
            said += 1
    assert said >= 4, "too few sentences to compare"


@on_every_device
def test_the_same_bits_every_time(device: str) -> None:
    assert set(calls()) == set(NAMES)
    for name, right in calls(torch.float16).items():
        once, again = (run("triton", name, right, device) for _ in range(2))
        assert all(same_bits(a, b) for a, b in zip(once, again, strict=True)), name


@on_every_device
def test_float64_runs_the_reference(device: str) -> None:
    for name, right in calls(torch.float64).items():
        for got, want in zip(run("triton", name, right, device), run("reference", name, right), strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", NAMES)
@compiled
def test_a_kernel_takes_what_its_schema_says(name: str) -> None:
    check_signature(name)


# ---- machine code, without the machine ------------------------------------------------------------------------------


def of(kind: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def build(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], *, ones: bool = False, **options: Any
) -> Any:
    """With `ones` the sizes that are looked at are 1."""
    hidden = {kernel.arg_names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize}
    sizes = integers_of(arguments) - hidden if ones else ()
    return triton_modes.build(kernel, arguments, constants, unaligned=hidden, ones=sizes, **options)


STRIDES = "sample token column"
PLACES = "out_width height width kernel kernel_width step_h step_w pad_h pad_w dilation_h dilation_w a_channel"


def build_squares(dtype: str, *, block: int = 32, conv: bool = False, ragged: bool = False, precision: str = "ieee",
                  total: bool = False, **options: Any) -> Any:  # fmt: skip
    from tlkernels.triton_kernels import fisher

    arguments = {**of(dtype, "a g"), **of("*fp32", "weight out"), **(of("*i64", "bounds") if ragged else {})}
    arguments |= of("i32", "tokens samples outs ins parts chunk") | {"scale": "fp32"}
    arguments |= of("i32", " ".join(f"{t}_{s}" for t in "ag" for s in STRIDES.split()))
    arguments |= of("i32", PLACES) if conv else {}
    constants = {
        "CONV": conv, "SUM": total, "ADD": not total, "BLOCK_OUT": block, "BLOCK_IN": block, "BLOCK_TOKENS": 32,
        "PRECISION": precision,
    }  # fmt: skip
    return build(fisher._squares_kernel, arguments, constants, **options)


def build_moments(dtype: str, *, block: int = 32, square: bool = False, weight: bool = True, bias: bool = True,
                  precision: str = "ieee", **options: Any) -> Any:  # fmt: skip
    from tlkernels.triton_kernels import fisher

    arguments = {**of(dtype, "x y"), **of("*fp32", "weight out" if weight else "out"), "scale": "fp32"}
    arguments |= of("i32", "rows x_width y_width parts chunk x_row x_column y_row y_column")
    constants = {
        "SQUARE": square, "SYMMETRIC": not square, "BIAS": bias, "ADD": True, "BLOCK": block, "BLOCK_ROWS": 32,
        "PRECISION": precision,
    }  # fmt: skip
    return build(fisher._moments_kernel, arguments, constants, **options)


def build_others(dtype: str, **options: Any) -> Iterator[Any]:
    from tlkernels.triton_kernels import fisher

    for norm in ("row", "column"):
        arguments = {**of(dtype, "x g"), **of("*fp32", "mean rstd weight out_w out_b"), "bounds": "*i64"}
        arguments |= {**of("i32", "tokens samples width parts chunk row_sample"), "scale": "fp32"}
        arguments |= of("i32", " ".join(f"{t}_{s}" for t in "xg" for s in STRIDES.split()))
        constants = {"NORM": norm, "ADD": True, "COLUMNS": 64, "TOKENS": 16}
        yield build(fisher._columns_kernel, arguments, constants, **options)
    strides = of("i32", "x_sample x_token x_column")
    arguments = {"x": dtype, **of("*fp32", "mean rstd"), **of("i32", "rows tokens width"), "eps": "fp32", **strides}
    yield build(fisher._statistics_kernel, arguments, {"CENTRED": True, "ROWS": 16, "COLUMNS": 256}, **options)
    arguments = {"x": dtype, "bounds": "*i64", **of("*fp32", "weight out"), **strides}
    arguments |= of("i32", "tokens width row_sample")
    yield build(fisher._token_sums_kernel, arguments, {"COLUMNS": 64, "TOKENS": 16}, **options)
    arguments = {"g": dtype, **of("*i64", "order sample starts index"), **of("*fp32", "weight out"), "scale": "fp32"}
    arguments |= of("i32", "width padding g_row g_column")
    yield build(fisher._rows_kernel, arguments, {"COLUMNS": 256}, **options)
    arguments = {"acc": "*fp32", **of(dtype, "x y"), "numel": "i32", **of("fp32", "decay scale")}
    yield build(fisher._accumulate_kernel, arguments, {"KIND": "product", "CHUNK": 4096, "STEP": 1024}, **options)
    arguments = {**of(dtype, "p anchor grad"), **of("*fp32", "importance factor"), "parts": "*fp64", "numel": "i32"}
    arguments |= {"scale": "fp32"}
    yield build(fisher._penalty_kernel, arguments, {"ADD": True, "CHUNK": 4096, "STEP": 1024}, **options)
    yield from build_tasks(dtype, **options)


def build_tasks(dtype: str, **options: Any) -> Iterator[Any]:
    import triton.language as tl
    from tlkernels.triton_kernels import gradgram

    number = {"*fp32": tl.float32, "*bf16": tl.bfloat16, "*fp16": tl.float16}[dtype]
    arguments = {**of("*i64", "table sizes places"), **of("i32", "tasks count chunk")}
    constants = {"DTYPE": number, "ALIGNED": True}
    gram = {**constants, "BLOCK": 16, "RUN": 2048, "DEPTH": 64}
    yield build(gradgram._gram_kernel, {**arguments, "parts": "*fp64"}, gram, **options)
    arguments |= {"out_table": "*i64", "weights": "*fp32", "results": "i32"}
    constants |= {"ACCUMULATE": True, "RESULTS": 1, "STEP": 1024}
    yield build(gradgram._combine_kernel, arguments, constants, **options)


@pytest.mark.parametrize(("capability", "ones"), [(80, False), (90, True), (100, False)])
@compiled
def test_every_kernel_compiles_for_every_target(capability: int, ones: bool) -> None:
    """Also for strides and sizes of 1; nothing is atomic, and nothing leaves the registers."""
    gpu: dict[str, Any] = {"capability": capability, "ones": ones}
    for kernel in (
        build_squares("*bf16", **gpu), build_squares("*fp32", ragged=True, **gpu),
        build_squares("*fp16", conv=True, **gpu), build_squares("*fp32", total=True, **gpu),
        build_moments("*fp32", **gpu),
        build_moments("*bf16", square=True, bias=False, precision="tf32x3", **gpu),
        build_moments("*fp16", weight=False, **gpu), *build_others("*fp32" if ones else "*bf16", **gpu),
    ):  # fmt: skip
        ptx = kernel.asm["ptx"]
        assert not re.search(r"\b(atom|red)\.[\w.:]*global", ptx)
        assert kernel.metadata.shared <= 227 * 1024


@compiled
def test_products_use_the_instructions_that_they_are_for() -> None:
    """float32 its own, at its full precision; 16 bits theirs, and TF32's three times for their squares."""
    wide: dict[str, Any] = {"block": 128, "num_warps": 8, "num_stages": 3}
    for kernel in (build_squares("*fp32", block=64), build_moments("*fp32", block=64)):
        ptx = kernel.asm["ptx"]
        assert "fma.rn.f32" in ptx and "mma" not in ptx and "tf32" not in ptx and "ld.local" not in ptx
    for kernel in (build_squares("*bf16", **wide), build_moments("*bf16", weight=False, bias=False, **wide)):
        ptx = kernel.asm["ptx"]
        assert "wgmma.mma_async" in ptx and ".f32.bf16.bf16" in ptx and "ld.local" not in ptx
    ptx = build_moments("*bf16", square=True, bias=False, precision="tf32x3", **wide).asm["ptx"]
    assert "tf32" in ptx and "wgmma.mma_async" in ptx and "ld.local" not in ptx


@compiled
def test_aligned_tensors_are_read_in_wide_words() -> None:
    for kernel in build_tasks("*bf16"):
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32|cp\.async[\w.:]* .*0x10", kernel.asm["ptx"])
