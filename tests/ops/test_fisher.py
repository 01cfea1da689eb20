"""The fisher ops: squares of per-sample gradients that autograd finds, second moments, and sweeps over parameters.

Every test runs on every backend that serves CPU tensors; those marked `isa` run again at each instruction-set level.
The tokens of a sample correlate here, as those of a sample do: independent ones would hide squares of single tokens.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from formula import same_bits
from levels import levels_of_this_machine, run_capped
from torch import Tensor, nn

import tlkernels
from tlkernels import ops
from tlkernels.ops import _registry

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# samples, tokens, in, out: around tiles (12 x 32), runs (256), few tokens (16, 8) and blocks (384)
SHAPES = [
    (1, 1, 1, 1),
    (3, 1, 40, 31),
    (5, 7, 33, 17),
    (2, 2, 5, 9),
    (4, 3, 130, 7),
    (6, 16, 16, 24),
    (3, 17, 65, 13),
    (2, 300, 31, 26),
    (2, 128, 97, 401),
    (2, 513, 12, 3),
    (3, 9, 400, 1),
]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(wide(dtype)).eps / 2


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def positive(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def correlated(n: int, t: int, d: int, *, seed: int, dtype: torch.dtype, offset: float = 0.5) -> Tensor:
    return (randn(n, 1, d, seed=seed) + 0.3 * randn(n, t, d, seed=seed + 1) + offset).to(dtype)


def below(out: Tensor, exact: Tensor, bound: Tensor, context: object = "") -> None:
    """Element by element."""
    error = (out.double() - exact).abs()
    worst = (error - bound).max() if error.numel() else torch.tensor(0.0)
    assert out.shape == exact.shape and bool((error <= bound).all()), (context, float(worst), float(error.max()))


def squares(
    pairs: Sequence[tuple[Tensor, Tensor]], weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Weight and bias by their definition in float64, and how far rounding may take them from there.

    A sum of k products is off by k u times the sum of their sizes, in any order; so is a square by 2 u more, and a sum
    of n of them by n u more.
    """
    u = unit(dtype)
    values: list[list[Tensor]] = [[], []]
    bounds: list[list[Tensor]] = [[], []]
    for (a, g), w in zip(pairs, weights, strict=True):
        a, g = a.double(), g.double()
        for place, (sums, sizes) in enumerate(((g.T @ a, g.abs().T @ a.abs()), (g.sum(0), g.abs().sum(0)))):
            off = (len(a) + 2) * u * sizes
            values[place].append(w * sums.square())
            bounds[place].append(w * (2 * sums.abs() * off + off.square() + 4 * u * sums.square()))
    f_w, f_b = (torch.stack(v).sum(0) for v in values)
    # an accumulator that begins at 1 rounds as well
    n = len(pairs) + 2
    e_w, e_b = (torch.stack(b).sum(0) + n * u * (f + 1) for b, f in zip(bounds, (f_w, f_b), strict=True))
    return f_w, f_b, e_w, e_b


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    n, t, i, o = shape
    act, grad = correlated(n, t, i, seed=0, dtype=dtype), correlated(n, t, o, seed=5, dtype=dtype, offset=-0.2)
    pairs = list(zip(act, grad, strict=True))
    for weight in (None, positive(n)):
        w64 = torch.ones(n, dtype=torch.float64) if weight is None else weight.to(wide(dtype)).double()
        f_w, f_b = torch.ones(o, i, dtype=wide(dtype)), torch.ones(o, dtype=wide(dtype))
        ops.diag_fisher_linear_(
            f_w, f_b, act, grad, scale=0.5, sample_weight=None if weight is None else weight.to(wide(dtype))
        )
        exact_w, exact_b, bound_w, bound_b = squares(pairs, 0.5 * w64, dtype)
        below(f_w, exact_w + 1, bound_w, "weight")
        below(f_b, exact_b + 1, bound_b, "bias")
    alone = torch.zeros(o, i, dtype=wide(dtype))
    ops.diag_fisher_linear_(alone, None, act, grad)
    below(alone, exact_of(pairs, dtype)[0], exact_of(pairs, dtype)[2], "weight alone")
    bias = torch.zeros(o, dtype=wide(dtype))
    ops.diag_fisher_linear_(None, bias, act, grad)
    below(bias, exact_of(pairs, dtype)[1], exact_of(pairs, dtype)[3], "bias alone")


def exact_of(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return squares(pairs, torch.ones(len(pairs), dtype=torch.float64), dtype)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(3, 0, 5, 1), (1, 1, 1), (300, 2, 0), (0, 0), (17, 16, 8, 9)], ids=str)
def test_ragged_samples(backend: str, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    total, (i, o) = sum(lengths), (35, 14)
    act, grad = (correlated(1, total, d, seed=s, dtype=dtype)[0] for d, s in ((i, 0), (o, 3)))
    offsets = [0, *itertools.accumulate(lengths)]
    pairs = [(act[a:b], grad[a:b]) for a, b in itertools.pairwise(offsets)]
    f_w, f_b = torch.zeros(o, i, dtype=wide(dtype)), torch.zeros(o, dtype=wide(dtype))
    ops.diag_fisher_linear_(f_w, f_b, act, grad, sample_offsets=offsets)
    exact_w, exact_b, bound_w, bound_b = exact_of(pairs, dtype)
    below(f_w, exact_w, bound_w)
    below(f_b, exact_b, bound_b)
    norms = ops.per_sample_sqnorm_linear(act, grad, sample_offsets=offsets)
    for norm, pair in zip(norms, pairs, strict=True):
        want, _, bound, _ = exact_of([pair], dtype)
        below(norm, want.sum(), bound.sum() + 64 * unit(dtype) * want.sum())


def test_several_token_dimensions_are_one(backend: str) -> None:
    act, grad = randn(3, 2, 4, 6, dtype=torch.float32), randn(3, 2, 4, 5, seed=1, dtype=torch.float32)
    f = [torch.zeros(5, 6) for _ in range(2)]
    ops.diag_fisher_linear_(f[0], None, act, grad)
    ops.diag_fisher_linear_(f[1], None, act.flatten(1, 2), grad.flatten(1, 2))
    assert torch.equal(*f)
    one = [torch.zeros(5, 6) for _ in range(2)]
    ops.diag_fisher_linear_(one[0], None, act[:, 0, 0], grad[:, 0, 0])
    ops.diag_fisher_linear_(one[1], None, act[:, 0, :1], grad[:, 0, :1])
    assert torch.equal(*one)


def test_tokens_are_not_samples(backend: str) -> None:
    """With equal tokens the exact value is T times the sum of the tokens' squares."""
    act, grad = randn(2, 1, 6).expand(2, 8, 6), randn(2, 1, 5, seed=1).expand(2, 8, 5)
    exact, wrong = torch.zeros(5, 6, dtype=torch.float64), torch.zeros(5, 6, dtype=torch.float64)
    ops.diag_fisher_linear_(exact, None, act, grad)
    ops.diag_fisher_linear_(wrong, None, act.flatten(0, 1), grad.flatten(0, 1))
    torch.testing.assert_close(exact, 8 * wrong)


def test_padding_adds_nothing(backend: str) -> None:
    act, grad = randn(3, 6, 10, dtype=torch.float32), randn(3, 6, 4, seed=1, dtype=torch.float32)
    grad[0, 4:], grad[2, 1:] = 0, 0
    padded, ragged = torch.zeros(4, 10), torch.zeros(4, 10)
    ops.diag_fisher_linear_(padded, None, act, grad)
    rows = [slice(0, 4), slice(0, 6), slice(0, 1)]
    ops.diag_fisher_linear_(
        ragged, None, torch.cat([act[n, r] for n, r in enumerate(rows)]),
        torch.cat([grad[n, r] for n, r in enumerate(rows)]), sample_offsets=[0, 4, 10, 11],
    )  # fmt: skip
    torch.testing.assert_close(padded, ragged, rtol=1e-6, atol=0)


# ---- the layers by autograd, sample by sample ----------------------------------------------------------------------


def by_autograd(layer: nn.Module, x: Tensor, grad: Tensor, weights: Tensor | None = None) -> list[Tensor]:
    """Squares of the gradients of each sample alone, in float64."""
    layer = layer.double()
    parameters = list(layer.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for n in range(len(x)):
        x_n = x[n : n + 1] if not x.dtype.is_floating_point else x[n : n + 1].double()
        out = layer(x_n)
        grads = torch.autograd.grad(out, parameters, grad[n : n + 1].double())
        for t, g in zip(total, grads, strict=True):
            t += (1.0 if weights is None else weights[n]) * g.square()
    return total


def near(out: Tensor, exact: Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    """In norm: sums here are of some hundred terms of one size."""
    error = float((out.double() - exact).norm() / (exact.norm() + 1e-300))
    assert error < times * 50 * unit(dtype), error


CONVOLUTIONS = [
    # channels, out, kernel, stride, padding, dilation, groups, height, width
    (4, 6, (3, 3), (1, 1), (1, 1), (1, 1), 2, 9, 8),
    (8, 8, (3, 5), (2, 1), (1, 2), (1, 1), 8, 17, 11),
    (3, 40, (7, 7), (2, 2), (3, 3), (1, 1), 1, 33, 30),
    (16, 12, (1, 1), (1, 1), (0, 0), (1, 1), 1, 20, 20),
    (6, 10, (2, 3), (3, 3), (2, 2), (2, 2), 1, 15, 14),
    (2, 3, (3, 2), (1, 3), (4, 0), (1, 2), 1, 3, 9),
    (5, 20, (1, 4), (1, 1), (0, 3), (1, 1), 1, 1, 70),
    (1, 33, (2, 2), (2, 2), (0, 0), (1, 1), 1, 2, 2),
]


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv2d(backend: str, case: tuple[Any, ...], dtype: torch.dtype) -> None:
    c, o, kernel, stride, padding, dilation, groups, height, width = case
    layer = nn.Conv2d(c, o, kernel, stride, padding, dilation, groups)
    x = (randn(3, c, height, width) + 0.3).to(dtype)
    grad = randn(*layer(x.float()).shape, seed=1, dtype=dtype) + 0.1
    weight = positive(3)
    exact = by_autograd(layer, x, grad, weight)
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    f_w, f_b = (torch.zeros(p.shape, dtype=wide(dtype)) for p in exact)
    ops.diag_fisher_conv2d_(f_w, f_b, x, grad, **how, sample_weight=weight.to(wide(dtype)))
    near(f_w, exact[0], dtype)
    near(f_b, exact[1], dtype)
    alone = torch.zeros_like(f_b)
    ops.diag_fisher_conv2d_(None, alone, x, grad, **how, sample_weight=weight.to(wide(dtype)))
    near(alone, exact[1], dtype)
    images = torch.zeros_like(f_w).contiguous(memory_format=torch.channels_last)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, grad)]
    ops.diag_fisher_conv2d_(images, None, *last, **how, sample_weight=weight.to(wide(dtype)))
    near(images, f_w.double(), dtype)


@pytest.mark.parametrize("padding", ["same", "valid", 2])
@pytest.mark.parametrize("kernel", [3, 4])
def test_conv1d_and_padding_by_name(backend: str, kernel: int, padding: Any) -> None:
    layer = nn.Conv1d(4, 6, kernel, padding=padding, dilation=2, groups=2).double()
    x = randn(3, 4, 19)
    grad = randn(*layer(x).shape, seed=1)
    exact = by_autograd(layer, x, grad)
    f_w, f_b = (torch.zeros_like(e, dtype=torch.float32) for e in exact)
    ops.diag_fisher_conv1d_(f_w, f_b, x.float(), grad.float(), padding=padding, dilation=2, groups=2)
    near(f_w, exact[0], torch.float32)
    near(f_b, exact[1], torch.float32)
    flat = nn.Conv2d(4, 6, (kernel, 1), padding=padding).double()
    image = x[..., None]
    grad = randn(*flat(image).shape, seed=2)
    f_w = torch.zeros_like(flat.weight.detach(), dtype=torch.float32)
    ops.diag_fisher_conv2d_(f_w, None, image.float(), grad.float(), padding=padding)
    near(f_w, by_autograd(flat, image, grad)[0], torch.float32)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_embedding(backend: str, padding_idx: int | None, dtype: torch.dtype) -> None:
    """Rows looked up more than once in a sample get the square of the sum."""
    layer = nn.Embedding(11, 300, padding_idx=padding_idx)
    index = torch.randint(0, 11, (4, 20), generator=torch.Generator().manual_seed(0))
    grad, weight = correlated(4, 20, 300, seed=1, dtype=dtype), positive(4)
    (exact,) = by_autograd(layer, index, grad, weight)
    f = torch.zeros(11, 300, dtype=wide(dtype))
    ops.diag_fisher_embedding_(f, index, grad, padding_idx=padding_idx, sample_weight=weight.to(wide(dtype)))
    near(f, exact, dtype)
    assert padding_idx is None or not f[padding_idx].any()
    ragged = torch.zeros_like(f)
    ops.diag_fisher_embedding_(
        ragged, index.flatten(), grad.flatten(0, 1), padding_idx=padding_idx, sample_offsets=range(0, 81, 20),
        sample_weight=weight.to(wide(dtype)),
    )  # fmt: skip
    assert torch.equal(ragged, f)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 5, 6), (20, 4, 33), (2, 1, 130)], ids=str)
def test_norms(backend: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, t, d = size
    x, grad, weight = (randn(n, t, d) + 3).to(dtype), correlated(n, t, d, seed=2, dtype=dtype), positive(n)
    w = weight.to(wide(dtype))
    for norm, layer in (("layer", nn.LayerNorm(d, eps=1e-3)), ("rms", nn.RMSNorm(d, eps=1e-3, dtype=torch.float64))):
        exact = by_autograd(layer, x, grad, weight)
        sums = [torch.zeros(d, dtype=wide(dtype)) for _ in exact]
        ops.diag_fisher_norm_(
            sums[0], sums[1] if len(sums) > 1 else None, x, grad, norm=norm, eps=1e-3, sample_weight=w
        )
        for f, e in zip(sums, exact, strict=True):
            near(f, e, dtype, 20)  # a mean of 3 is taken off first
    plain = torch.zeros(d, dtype=wide(dtype))
    ops.diag_fisher_norm_(plain, None, x, grad, norm="none", sample_weight=w)
    near(plain, (weight[:, None] * (x.double() * grad.double()).sum(1).square()).sum(0), dtype)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rest", [(), (9,), (5, 7)], ids=str)
def test_batch_norm_in_eval_mode(backend: str, rest: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[len(rest)](6).double().eval()
    layer.running_mean.copy_(randn(6, seed=3))
    layer.running_var.copy_(positive(6))
    x, grad, weight = randn(4, 6, *rest, dtype=dtype), randn(4, 6, *rest, seed=1, dtype=dtype), positive(4)
    exact = by_autograd(layer, x, grad, weight)
    f_w, f_b = (torch.zeros(6, dtype=wide(dtype)) for _ in range(2))
    rstd = (layer.running_var + layer.eps).rsqrt().to(wide(dtype))
    ops.diag_fisher_channel_norm_(
        f_w, f_b, x, grad, layer.running_mean.to(wide(dtype)), rstd, sample_weight=weight.to(wide(dtype))
    )
    near(f_w, exact[0], dtype)
    near(f_b, exact[1], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_lora_factors(backend: str, monkeypatch: pytest.MonkeyPatch, ragged: bool, dtype: torch.dtype) -> None:
    a, b, scaling = randn(3, 8, seed=1), randn(5, 3, seed=2), 0.7
    x, grad, weight = correlated(6, 4, 8, seed=3, dtype=dtype), correlated(6, 4, 5, seed=5, dtype=dtype), positive(6)
    exact = [torch.zeros_like(a), torch.zeros_like(b)]
    for n in range(6):
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        out = scaling * x[n].double() @ leaves[0].T @ leaves[1].T
        for e, g in zip(exact, torch.autograd.grad(out, leaves, grad[n].double()), strict=True):
            e += weight[n] * g.square()
    data = (x.flatten(0, 1), grad.flatten(0, 1)) if ragged else (x, grad)
    offsets = range(0, 25, 4) if ragged else None
    for held in (1, 30, 1 << 20):  # samples one by one, two by two, all at once
        monkeypatch.setattr("tlkernels.ops.fisher._HELD", held)
        f = [torch.zeros_like(e, dtype=dtype) for e in exact]
        ops.diag_fisher_lora_(
            *f, *data, a.to(dtype), b.to(dtype), scaling=scaling, sample_offsets=offsets,
            sample_weight=weight.to(dtype),
        )  # fmt: skip
        for got, e in zip(f, exact, strict=True):
            near(got, e, dtype)


# ---- second moments ------------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:9], ids=str)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_kronecker_factors(backend: str, approx: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    n, t, i, o = shape
    act, grad = correlated(n, t, i, seed=0, dtype=dtype), correlated(n, t, o, seed=5, dtype=dtype)
    for weight, bias in ((None, True), (positive(n, t), True), (positive(n, t), False)):
        w = torch.ones(n, t, 1, dtype=torch.float64) if weight is None else weight[..., None]
        a, g = act.double(), grad.double()
        if bias:
            a = torch.cat([a, torch.ones(n, t, 1, dtype=torch.float64)], -1)
        if approx == "reduce":
            a, g = (w * a).sum(1) / w.sum(1), (w * g).sum(1)
            w = torch.ones(n, 1, dtype=torch.float64)
        A = torch.ones(i + bias, i + bias, dtype=wide(dtype))
        G = torch.ones(o, o, dtype=wide(dtype))
        ops.kfac_factors_linear_(
            A, G, act, grad, bias=bias, approx=approx, scale_a=0.5, scale_g=2.0,
            token_weight=None if weight is None else weight.to(wide(dtype)),
        )  # fmt: skip
        near(A, 1 + 0.5 * (w * a).flatten(0, -2).T @ a.flatten(0, -2), dtype)
        near(G, 1 + 2.0 * (w * g).flatten(0, -2).T @ g.flatten(0, -2), dtype)
        near(A, A.T.double(), dtype)
        near(G, G.T.double(), dtype)


def test_a_sample_without_weight_has_no_part(backend: str) -> None:
    act, grad = randn(2, 3, 4, dtype=torch.float32), randn(2, 3, 2, seed=1, dtype=torch.float32)
    weight = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    A, G, only_a, only_g = torch.zeros(5, 5), torch.zeros(2, 2), torch.zeros(5, 5), torch.zeros(2, 2)
    ops.kfac_factors_linear_(A, G, act, grad, bias=True, approx="reduce", token_weight=weight)
    ops.kfac_factors_linear_(only_a, only_g, act[:1, :2], grad[:1, :2], bias=True, approx="reduce")
    torch.testing.assert_close(A, only_a)
    torch.testing.assert_close(G, only_g)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_squares_in_the_eigenbasis(backend: str, monkeypatch: pytest.MonkeyPatch, ragged: bool, bias: bool) -> None:
    act, grad, weight = (
        correlated(6, 4, 5, seed=0, dtype=torch.float32),
        randn(6, 4, 3, dtype=torch.float32),
        positive(6),
    )
    ua, ug = torch.linalg.qr(randn(5 + bias, 5 + bias))[0], torch.linalg.qr(randn(3, 3, seed=1))[0]
    a = torch.cat([act.double(), torch.ones(6, 4, 1)], -1) if bias else act.double()
    per = torch.einsum("nto,nti->noi", grad.double(), a)
    exact = (weight[:, None, None] * (ug.T @ per @ ua).square()).sum(0)
    data = (act.flatten(0, 1), grad.flatten(0, 1)) if ragged else (act, grad)
    for held in (1, 80, 1 << 20):
        monkeypatch.setattr("tlkernels.ops.fisher._HELD", held)
        s = torch.zeros(3, 5 + bias)
        ops.ekfac_diag_linear_(
            s, *data, ua.float(), ug.float(), bias=bias, sample_offsets=range(0, 25, 4) if ragged else None,
            sample_weight=weight.float(),
        )  # fmt: skip
        near(s, exact, torch.float32)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_of_per_sample_gradients(backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    n, t, i, o = shape
    act, grad = correlated(n, t, i, seed=0, dtype=dtype), correlated(n, t, o, seed=5, dtype=dtype)
    norms = ops.per_sample_sqnorm_linear(act, grad)
    near(norms, torch.einsum("nto,nti->noi", grad.double(), act.double()).square().sum((1, 2)), dtype)


# ---- sweeps --------------------------------------------------------------------------------------------------------

LISTS = [(3, 5), (17,), (), (0, 4), (40, 1000), (1,), (4096,)]


def lists(dtype: torch.dtype, count: int = 3) -> Iterator[list[Tensor]]:
    for k in range(count):
        yield [randn(*s, seed=10 * k + j, dtype=dtype) for j, s in enumerate(LISTS)]


def ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sweeps(backend: str, dtype: torch.dtype) -> None:
    p, a, g = lists(dtype)
    f = [positive(*s, seed=j).to(wide(dtype)) for j, s in enumerate(LISTS)]
    for mode, of in (("sq", torch.square), ("abs", torch.abs)):
        acc = [t.clone() for t in f]
        ops.importance_accum_(acc, g, mode=mode, decay=0.9, scale=0.5)
        for got, before, grad in zip(acc, f, g, strict=True):
            torch.testing.assert_close(
                got.double(), 0.9 * before.double() + 0.5 * of(grad.double()), rtol=1e-6, atol=1e-6
            )
    omega = [t.clone() for t in f]
    ops.si_accum_(omega, g, p)
    for got, before, grad, delta in zip(omega, f, g, p, strict=True):
        torch.testing.assert_close(got.double(), before.double() - grad.double() * delta.double(), rtol=1e-6, atol=1e-6)
    exact = sum(0.5 * (w.double() * (t.double() - b.double()).square()).sum() for t, b, w in zip(p, a, f, strict=True))
    value = ops.quad_penalty(p, a, f)
    assert value.dtype == wide(dtype)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    grads = [t.clone() for t in g]
    again = ops.quad_penalty_grad_(grads, p, a, f, scale=0.7)
    torch.testing.assert_close(again.double(), 0.7 * exact, rtol=1e-6, atol=0)
    for got, before, t, b, w in zip(grads, g, p, a, f, strict=True):
        want = before.double() + 0.7 * w.double() * (t.double() - b.double())
        torch.testing.assert_close(got.double(), want, rtol=ulp(dtype), atol=1e-5 if dtype != torch.float64 else 1e-12)
    leaves = [t.clone().requires_grad_() for t in p]
    (ops.quad_penalty(leaves, a, f) * 2.5).backward()
    for leaf, t, b, w in zip(leaves, p, a, f, strict=True):
        want = 2.5 * w.double() * (t.double() - b.double())
        torch.testing.assert_close(
            leaf.grad.double(), want, rtol=ulp(dtype), atol=1e-5 if dtype != torch.float64 else 0
        )


def test_lists_of_mixed_dtypes(backend: str) -> None:
    p = [randn(5, dtype=torch.bfloat16), randn(3, 4), randn(7, dtype=torch.float32)]
    a, f = [t + 1 for t in p], [torch.ones(t.shape, dtype=wide(t.dtype)) for t in p]
    value = ops.quad_penalty(p, a, f)
    assert value.dtype == torch.float64
    exact = sum(0.5 * (t.double() - b.double()).square().sum() for t, b in zip(p, a, strict=True))
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)
    assert ops.quad_penalty([], [], []) == 0


def test_penalty_twice_differentiable(backend: str) -> None:
    p, a = ([randn(3, 2, seed=s).requires_grad_(), randn(4, seed=s + 1).requires_grad_()] for s in (0, 5))
    f = [positive(3, 2).requires_grad_(), positive(4).requires_grad_()]

    def penalty(*t: Tensor) -> Tensor:
        return ops.quad_penalty(t[:2], t[2:4], t[4:])

    assert torch.autograd.gradcheck(penalty, [*p, *a, *f])
    assert torch.autograd.gradgradcheck(penalty, [*p, *a, *f])
    under = torch.func.grad(lambda t: ops.quad_penalty([t], [a[0].detach()], [f[0].detach()]))(p[0].detach())
    torch.testing.assert_close(under, (f[0] * (p[0] - a[0])).detach())


def test_float32_sums_stall_no_earlier_than_said(backend: str) -> None:
    """1e5 equal small squares: float32 sums drift by less than half a unit each time."""
    acc, grad = [torch.zeros(3)], [torch.full((3,), 1e-3)]
    for _ in range(100_000 if backend == "cpu" else 2_000):
        torch.ops.tlkernels.importance_accum_(acc, grad, kind="sq", decay=1.0, scale=1.0)
    count = 100_000 if backend == "cpu" else 2_000
    exact = count * float(grad[0][0].double() ** 2)
    assert abs(float(acc[0][0]) - exact) / exact < count * 2**-24


# ---- gradgram ------------------------------------------------------------------------------------------------------


def task_gradients(tasks: int, dtype: torch.dtype, *, absent: bool = True) -> list[list[Tensor | None]]:
    grads: list[list[Tensor | None]] = [
        [randn(*s, seed=100 * t + j, dtype=dtype) for j, s in enumerate(LISTS)] for t in range(tasks)
    ]
    if absent and tasks > 1:
        grads[1][0] = grads[0][4] = None
    return grads


def flat(grads: list[list[Tensor | None]]) -> Tensor:
    return torch.stack([
        torch.cat([torch.zeros(math.prod(s)).double() if g is None else g.double().flatten()
                   for g, s in zip(row, LISTS, strict=True)]) for row in grads
    ])  # fmt: skip


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 4, 5, 9])
def test_gram_and_combinations(backend: str, tasks: int, dtype: torch.dtype) -> None:
    grads = task_gradients(tasks, dtype)
    rows = flat(grads)
    gram = ops.task_gram(grads)
    assert gram.dtype == torch.float64 and torch.equal(gram, gram.T)
    # sums of 128 products a lane are float32
    below(gram, rows @ rows.T, (256 if dtype != torch.float64 else 1e5) * unit(dtype) * (rows.abs() @ rows.abs().T))
    weights = randn(3, tasks, seed=7)
    used = [p for p in range(len(LISTS)) if any(row[p] is not None for row in grads)]
    kept = [[row[p] for p in used] for row in grads]
    combined = ops.task_combine(kept, weights.float())
    for r in range(3):
        for out, p in zip(combined[r], used, strict=True):
            parts = [weights[r, t] * row[p].double() for t, row in enumerate(grads) if row[p] is not None]
            want, size = sum(parts), sum(x.abs() for x in parts)
            smallest = torch.finfo(dtype).smallest_normal * ulp(dtype)
            below(out, want, ulp(dtype) * want.abs() + 16 * unit(torch.float32) * size + smallest)
    into = [t.clone() for t in combined[0]]
    ops.task_combine_(into, kept, weights[0].to(wide(dtype)), accumulate=True)
    for out, t in zip(into, combined[0], strict=True):
        torch.testing.assert_close(out, 2 * t, rtol=4 * ulp(dtype), atol=1e-2 if dtype in DTYPES[1:3] else 1e-5)


def test_gram_of_long_gradients_keeps_its_digits(backend: str) -> None:
    """Sums of ten million products in float32 would be off by a thousandth."""
    size = 3_000_000
    grads = [[torch.full((size,), 1.0)], [torch.full((size,), 0.1)]]
    gram = ops.task_gram(grads)
    tenth = float(torch.tensor(0.1).double())
    torch.testing.assert_close(gram, size * torch.tensor([[1, tenth], [tenth, tenth**2]]).double(), rtol=1e-6, atol=0)


# ---- everywhere ----------------------------------------------------------------------------------------------------


def written(arguments: dict[str, Any]) -> list[Tensor]:
    """What an op wrote to, flat."""
    names = ("f_w", "f_b", "A", "G", "acc", "omega", "grads", "out")
    found = [arguments[n] for n in names if n in arguments]
    return [t for x in found for t in (x if isinstance(x, list) else [x])]


def outcome(name: str, arguments: dict[str, Any]) -> list[Tensor]:
    """A call's results and what it wrote to, of its own copies."""

    def copy(x: Any) -> Any:
        return [t.clone() for t in x] if isinstance(x, list) and x and isinstance(x[0], Tensor) else (
            x.clone() if isinstance(x, Tensor) else x)  # fmt: skip

    own = {k: copy(v) for k, v in arguments.items()}
    out = _registry.OPS[name].overload(**own)
    results = [] if out is None else list(out) if isinstance(out, (list, tuple)) else [out]
    return [*results, *written(own)]


NAMES = [
    "diag_fisher_linear_", "diag_fisher_conv2d_", "diag_fisher_embedding_", "diag_fisher_norm_",
    "diag_fisher_channel_norm_", "per_sample_sqnorm_linear", "kfac_factors_linear_", "importance_accum_", "si_accum_",
    "quad_penalty", "quad_penalty_backward", "quad_penalty_grad_", "task_gram", "task_combine_",
]  # fmt: skip


@pytest.mark.isa
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_for_any_number_of_threads(
    backend: str, fisher_calls: Any, threads: Callable[[int], None], name: str
) -> None:
    for dtype in DTYPES[:3]:
        arguments = fisher_calls(40, 33, 70, 90, dtype=dtype)[name]
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(outcome(name, arguments))
        for other in results[1:]:
            assert all(same_bits(x, y) for x, y in zip(results[0], other, strict=True)), dtype


@pytest.mark.isa
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_go_where_the_reference_has_them(
    backend: str, fisher_calls: Any, name: str, bad: float
) -> None:  # fmt: skip
    for argument, value in fisher_calls()[name].items():
        if argument in ("sample_weight", "token_weight", "weights", "rstd"):
            continue
        arguments = fisher_calls()[name]
        spoilt = value[0] if isinstance(value, list) and value and isinstance(value[0], Tensor) else value
        if not isinstance(spoilt, Tensor) or not spoilt.dtype.is_floating_point or spoilt.numel() == 0:
            continue
        changed = spoilt.clone()
        changed.view(-1)[changed.numel() // 2] = bad
        arguments[argument] = [changed, *value[1:]] if isinstance(value, list) else changed
        got = outcome(name, arguments)
        with tlkernels.backend("reference"):
            want = outcome(name, arguments)
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x.isfinite(), y.isfinite()), (argument, bad)
        assert not all(bool(x.isfinite().all()) for x in got), argument


@pytest.mark.parametrize("name", NAMES)
def test_strided_arguments(backend: str, fisher_calls: Any, name: str) -> None:
    """Inputs, and what is added to, in another layout: the same numbers, and nothing beside them is touched."""

    def strided(t: Tensor) -> Tensor:
        big = torch.full([2 * s + 1 for s in t.shape], 7.0).to(t.dtype)
        view = big[tuple(slice(1, None, 2) for _ in t.shape)]
        return view.copy_(t)

    arguments = fisher_calls(ragged=True)[name]
    want = outcome(name, arguments)
    own = {
        k: [strided(t) for t in v] if isinstance(v, list) and v and isinstance(v[0], Tensor)
        else strided(v) if isinstance(v, Tensor) else v for k, v in arguments.items()
    }  # fmt: skip
    out = _registry.OPS[name].overload(**own)
    results = [] if out is None else list(out) if isinstance(out, (list, tuple)) else [out]
    for x, y in zip([*results, *written(own)], want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n, t, i, o", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_of_something(backend: str, n: int, t: int, i: int, o: int) -> None:
    act, grad = torch.ones(n, t, i), torch.ones(n, t, o)
    f_w, f_b = torch.ones(o, i), torch.ones(o)
    ops.diag_fisher_linear_(f_w, f_b, act, grad)
    assert torch.equal(f_w, torch.ones(o, i) + n * t * t)
    assert torch.equal(f_b, torch.ones(o) + n * t * t)
    assert torch.equal(ops.per_sample_sqnorm_linear(act, grad), torch.full((n,), float(t * t * i * o)))
    A, G = torch.zeros(i + 1, i + 1), torch.zeros(o, o)
    for approx in ("expand", "reduce"):
        ops.kfac_factors_linear_(A, G, act, grad, bias=True, approx=approx)
    f = torch.zeros(i)
    ops.diag_fisher_norm_(f, None, act, act, norm="none")
    table = torch.zeros(3, o)
    ops.diag_fisher_embedding_(table, torch.zeros(n, t, dtype=torch.int64), grad)
    assert torch.equal(table[0], torch.full((o,), float(n * t * t))) and not table[1:].any()
    if n == 0 or t == 0:
        assert not A.any() and not G.any() and not f.any()


def test_what_is_written_counts_as_changed() -> None:
    """A compiled kernel writes past torch: autograd must still notice."""
    p = torch.ones(3, requires_grad=True)
    importance = torch.ones(3)
    loss = (p * importance).sum()
    ops.importance_accum_([importance], [torch.ones(3)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


PEAK = """
import sys, torch
from tlkernels import ops

def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024

torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])

def peak(n, t, i, o):
    act, grad = torch.randn(n, t, i).to(dtype), torch.randn(n, t, o).to(dtype)
    x = torch.randn(n, 16, 24, t // 16).to(dtype)
    f_w, f_b, f_i, A, G = torch.zeros(o, i), torch.zeros(o), torch.zeros(i), torch.zeros(i, i), torch.zeros(o, o)
    index, table = torch.randint(0, 50, (n, t)), torch.zeros(50, o)
    images, f_c = x, torch.zeros(16, 16, 3, 3)
    S, Ua, Ug = torch.zeros(o, i), torch.eye(i), torch.eye(o)
    params, *lists = [[torch.randn(i, o) for _ in range(4)] for _ in range(5)]
    with open("/proc/self/clear_refs", "w") as counter:
        counter.write("5")
    before = resident("VmRSS")
    ops.diag_fisher_linear_(f_w, f_b, act, grad)
    ops.diag_fisher_conv2d_(f_c, None, images, images, padding=1)
    ops.diag_fisher_norm_(f_i, None, act, act)
    ops.diag_fisher_embedding_(table, index, grad)
    ops.kfac_factors_linear_(A, G, act, grad, bias=False)
    ops.per_sample_sqnorm_linear(act, grad)
    ops.ekfac_diag_linear_(S, act, grad, Ua, Ug, bias=False)
    ops.quad_penalty_grad_(*lists)
    ops.task_gram([params, params])
    return resident("VmHWM") - before

peak(4, 64, 128, 128)  # what a first call loads
for size in ((32, 128, 256, 256), (64, 128, 256, 256), (32, 256, 256, 256), (32, 128, 512, 512)):
    print(peak(*size))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_batch_tokens_or_layers(tmp_path: Path, dtype: str) -> None:
    """Per-sample gradients would be 8 MiB, then 16, 8 and 32. A product packs 8 MiB of an operand at most; the ops take
    no more than that and some small blocks beside their accumulators, whatever is doubled.
    """
    if not set(NAMES) <= _registry.native_ops("cpu"):
        pytest.skip("the references store per-sample gradients")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not count a process's peak")
    run = subprocess.run(
        [sys.executable, "-c", PEAK, dtype], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(tlkernels.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    peaks = [int(line) / 2**20 for line in run.stdout.split()]
    assert len(peaks) == 4 and max(peaks) < 16, peaks


@pytest.mark.parametrize("level", levels_of_this_machine()[:-1])
def test_every_lower_instruction_set_level(level: str, tmp_path: Path) -> None:
    run_capped(level, tmp_path, [Path(__file__)])
