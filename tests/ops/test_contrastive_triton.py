"""The Triton kernels of the contrastive family: run by Triton's interpreter, on a GPU where there is one, and compiled.

They are held against the formula of tests/formula.py in float64, most with tiles, panels and chunks so small that every
seam between them occurs. Tests that need Triton's other mode run in a process of their own (tests/triton_modes.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import formula
import pytest
import torch
import triton_modes
from formula import Exact, same_bits
from tolerances import TOLERANCES, relative_error
from torch import Tensor
from triton_modes import (
    call,
    check_signature,
    compiled,
    integers_of,
    on_every_device,
    ops_of,
    outcome,
    randn,
    target,
)

import tlkernels
from tlkernels import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ops_of("contrastive")
# (N, M, D): whole tiles; one off; primes; more columns than rows by far, and the reverse; one of each
SHAPES = [(32, 64, 16), (33, 49, 17), (37, 19, 23), (3, 101, 40), (70, 5, 33), (1, 7, 1), (1, 1, 3)]
CASES = [(DTYPES[0], shape) for shape in SHAPES] + [(dtype, shape) for dtype in DTYPES[1:] for shape in SHAPES[1:4]]
INF = math.inf


# ---- helpers --------------------------------------------------------------------------------------------------------


def draw(low: int, high: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(low, max(high, low + 1), (n,), generator=torch.Generator().manual_seed(seed))


def reference(name: str, *args: Any, **kwargs: Any) -> Any:
    with tlkernels.backend("reference"):
        return getattr(torch.ops.tlkernels, name).default(*args, **kwargs)


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles of 16 x 16, panels of 2 x 3 of them, chunks of G of 2 x 2 where there are rows enough."""
    from tlkernels.triton_kernels import contrastive

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "_BLOCK", dict.fromkeys(DTYPES, 16))
        patch.setattr(contrastive, "_PANEL", (2, 3))
        patch.setattr(contrastive, "_CHUNK", dict.fromkeys(DTYPES, 32 * 32))
        patch.setattr(contrastive, "_CHUNK_COLUMNS", 32)
        yield


def with_rounded_weights(want: Exact, dtype: torch.dtype, other: Tensor, scale: Tensor, largest: float) -> Exact:
    """What a product may be off by when its weights were rounded to 16 bits, float16's after amplification to 2^11."""
    if dtype == torch.float32:
        return want
    subnormal = 2.0**-36 * largest * abs(float(scale)) * other.double().abs().sum(0)
    inherited = want.inherited + 1.01 * TOLERANCES[dtype].unit * want.magnitude + subnormal
    return dataclasses.replace(want, inherited=inherited)


def check_softmax(
    device: str, x: Tensor, y: Tensor | None, scale: Tensor, bias: Tensor | None, labels: Tensor | None,
    exclude: Tensor | None, cols: bool = True, context: object = "", size: float = 1.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Log-sum-exps and gradients against the formula, the latter with the given log-sum-exps."""
    out = call(device, "sim_lse", x, y, scale, bias, labels, exclude, cols=cols)
    wanted = formula.sim_lse(x, y, scale, bias, labels, exclude, cols)
    for name, got, want in zip(("lse_row", "lse_col", "nll_row", "nll_col"), out, wanted, strict=True):
        assert got.dtype == torch.float32
        low = want.value == -INF
        assert torch.equal(got == -INF, low), (name, context)
        finite = dataclasses.replace(want, value=want.value.where(~low, 0))
        finite.check(got.where(~low, 0), torch.float32, (name, context))
    rows, columns = len(x), len(x if y is None else y)
    cols = cols and y is not None
    lse_row, lse_col = out[0], out[1] if cols else None
    grad_row = randn(rows, seed=7) * size
    grad_col, grad_pair = (randn(columns, seed=8) * size if cols else None), None
    if labels is not None:
        grad_pair = randn(rows, seed=9) * size
    given = (x, y, scale, bias, labels, exclude, lse_row, lse_col, grad_row, grad_col, grad_pair)
    grads = call(device, "sim_lse_backward", *given)
    wants = formula.sim_lse_gradients(*given)
    largest = max(float(g.abs().max()) for g in (grad_row, grad_col, grad_pair) if g is not None)
    grad_x = with_rounded_weights(wants[0], x.dtype, x if y is None else y, scale, largest)
    grad_x.check(grads[0], torch.float32, ("dx", context))
    assert grads[0].dtype == x.dtype and grads[2].dtype == torch.float32
    if y is None:
        assert grads[1].shape == (0,)
    else:
        grad_y = with_rounded_weights(wants[1], x.dtype, x, scale, largest)
        grad_y.check(grads[1], torch.float32, ("dy", context))
    wants[2].check(grads[2], torch.float32, ("dscale", context))
    return (*out, *grads)


# ---- softmax --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
@on_every_device
def test_rows_and_columns(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    x, y = randn(rows, depth, dtype=dtype), randn(columns, depth, seed=1, dtype=dtype)
    scale, bias = torch.tensor(3.0 / depth**0.5), torch.tensor([0.7])
    labels, exclude = draw(-2, columns, rows), draw(-1, columns, rows, seed=1)
    with small_tiles():
        check_softmax(device, x, y, scale, bias, labels, exclude)
        check_softmax(device, x, y, -scale, None, None, None)
        if dtype == torch.float32:
            check_softmax(device, x, y, scale, None, labels, None, cols=False)
            check_softmax(device, x, y, scale, bias, None, exclude, cols=False)


@pytest.mark.parametrize("rows", [1, 17, 32, 51])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@on_every_device
def test_symmetric_matrices(device: str, dtype: torch.dtype, rows: int) -> None:
    x, scale = randn(rows, 21, dtype=dtype), torch.tensor(0.6)
    itself = torch.arange(rows)
    with small_tiles():
        check_softmax(device, x, None, scale, None, itself.roll(rows // 2), itself)
        check_softmax(device, x, None, scale, torch.tensor(-0.4), draw(-2, rows, rows), draw(-2, rows, rows, seed=1))
        check_softmax(device, x, None, scale, None, None, None)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@on_every_device
def test_tiles_as_they_are(device: str, dtype: torch.dtype) -> None:
    rows, columns, depth = 150, 270, 70
    x, y = (randn(n, depth, seed=n, dtype=dtype) for n in (rows, columns))
    scale, bias = torch.tensor(0.3), torch.tensor(1.0)
    labels, exclude = draw(0, columns, rows), draw(0, columns, rows, seed=1)
    out = check_softmax(device, x, y, scale, bias, labels, exclude)
    if dtype == torch.float16:  # rounding G and rounding the result add up to less than one unit, on average
        wants = formula.sim_lse_gradients(
            x, y, scale, bias, labels, exclude, out[0], out[1], randn(rows, seed=7), randn(columns, seed=8),
            randn(rows, seed=9),
        )  # fmt: skip
        assert max(relative_error(out[4 + i], wants[i].value) for i in (0, 1)) < TOLERANCES[dtype].unit
    check_softmax(device, x, None, scale, None, draw(0, rows, rows), torch.arange(rows))


@on_every_device
def test_divided_reductions(device: str) -> None:
    """Few tiles for many multiprocessors: the products' sums are cut into parts, which another launch adds in order."""
    from tlkernels.triton_kernels import contrastive, lora, nf4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "_processors", lambda device: 64)
        launched = []
        patch.setattr(lora, "_launch", lambda kernel, *a, **k: (launched.append(kernel), nf4._launch(kernel, *a, **k)))
        patch.setattr(contrastive, "_CHUNK", dict.fromkeys(DTYPES, 16 * 1152))
        x, y = randn(5, 8, dtype=torch.float16), randn(2300, 8, seed=1, dtype=torch.float16)
        check_softmax(device, x, y, torch.tensor(1.0), None, draw(0, 2300, 5), None, cols=False)
        check_softmax(device, y[:1100], x, torch.tensor(1.0), None, None, None)
        assert launched.count(lora._sum_chunks_kernel) >= 3


@on_every_device
def test_large_logits(device: str) -> None:
    """Every maximum is a row's or a column's own: rows 2000 apart in one tile do not lose each other."""
    x, y = randn(20, 20), randn(33, 20, seed=1)
    x, y = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
    labels = draw(0, 33, 20)
    with small_tiles():
        for scale, bias in ((1000.0, None), (-1000.0, 1000.0), (1e-3, -1000.0), (1e4, None)):
            offset = None if bias is None else torch.tensor(bias)
            out = check_softmax(device, x, y, torch.tensor(scale), offset, labels, None)
            assert all(t.isfinite().all() for t in out) and (out[2] >= 0).all() and (out[3] >= 0).all()
        levels = torch.linspace(-1, 1, 20)[:, None]
        x = torch.cat([x[:, :19] * 0.1, levels], 1)
        y = torch.cat([y[:, :19] * 0.1, torch.full((33, 1), 1000.0)], 1)
        check_softmax(device, x, y, torch.tensor(1.0), None, labels, None)
        check_softmax(device, y, x, torch.tensor(1.0), None, None, draw(0, 20, 33))


@on_every_device
def test_a_label_with_all_of_the_weight_leaves_nothing(device: str) -> None:
    """Loss and gradient are 0, not nearly, where the sum is the label's exponential; a single pair is such a case."""
    with small_tiles():
        for rows, depth, scale in ((1, 5, 3.7), (20, 20, 1000.0)):
            x = torch.eye(rows, depth) if rows > 1 else randn(1, depth)
            labels, ones = torch.arange(rows), torch.ones(rows)
            given = (x, x.clone(), torch.tensor(scale), None, labels, None)
            row, col, nll_row, nll_col = call(device, "sim_lse", *given)
            assert torch.equal(row, col) and not nll_row.any() and not nll_col.any()
            grads = call(device, "sim_lse_backward", *given, row, col, ones, ones, -2 * ones)
            assert not any(g.any() for g in grads)


@on_every_device
def test_sums_over_nothing(device: str) -> None:
    """A row whose one column is excluded: -inf, and no gradient, however far 0 is from the other rows' logits."""
    x, y = torch.tensor([[1.0], [2.0], [-3.0]]), torch.tensor([[100.0]])
    exclude, labels, scale = torch.tensor([0, -1, -1]), torch.tensor([0, 0, -1]), torch.tensor(-4.0)
    given = (x, y, scale, None, labels, exclude)
    out = call(device, "sim_lse", *given)
    for got, want in zip(out, reference("sim_lse", *given), strict=True):
        assert torch.equal(got, want)
    assert out[0][0] == -INF and out[2][0] == -INF
    given = (*given, out[0], out[1], torch.ones(3), torch.ones(1), torch.zeros(3))
    for got, want in zip(call(device, "sim_lse_backward", *given), reference("sim_lse_backward", *given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    row = call(device, "sim_lse", x[:1], None, scale, None, None, torch.tensor([0]))[0]
    assert row.tolist() == [-INF]
    given = (x[:1], None, scale, None, None, torch.tensor([0]), row, None, torch.ones(1), None, None)
    zero = call(device, "sim_lse_backward", *given)
    assert not zero[0].any() and not zero[2].any()
    with small_tiles():  # all of many rows, in several tiles
        x = randn(40, 3) * 50
        row = call(device, "sim_lse", x, x[:1], scale, None, None, torch.zeros(40, dtype=torch.int64))[0]
        assert (row == -INF).all()


@on_every_device
def test_scale_of_zero(device: str) -> None:
    x, y = randn(20, 9), randn(23, 9, seed=1)
    with small_tiles():
        out = check_softmax(device, x, y, torch.tensor(0.0), torch.tensor(2.0), draw(0, 23, 20), None)
    assert not out[4].any() and not out[5].any() and out[6] != 0


@pytest.mark.parametrize("symmetric", [False, True], ids=["two", "symmetric"])
@on_every_device
def test_an_index_that_is_no_column_is_none(device: str, symmetric: bool) -> None:
    """Also where its value could not be checked, and far outside."""
    from tlkernels.ops import contrastive

    x, y = randn(37, 9), None if symmetric else randn(37, 9, seed=1)
    clean = draw(-1, 37, 37)
    outside = torch.tensor([37, 38, 47, 48, 2**40, -(2**40), -1, -37, 2**63 - 1, -(2**63)])
    bad = clean.where(clean >= 0, outside[torch.arange(37) % 10])
    bad[-9:] = clean[-9:]
    assert (bad >= 37).any()
    scale, grad = torch.tensor(1.5), randn(37, seed=3)
    lse = reference("sim_lse", x, y, scale, None, None, clean)
    across = (None, None) if symmetric else (lse[1], grad)
    results = []
    with pytest.MonkeyPatch.context() as patch, small_tiles():
        patch.setattr(contrastive, "_check_index", lambda *a: None)
        for index in (clean, bad):
            given = (x, y, scale, None, index, index)
            out = call(device, "sim_lse", *given)
            out += call(device, "sim_lse_backward", *given, lse[0], across[0], grad, across[1], grad)
            if y is not None:
                out += (call(device, "sigmoid_contrastive", x, y, scale, scale, index),)
            results.append(out)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


# ---- sigmoid --------------------------------------------------------------------------------------------------------


def check_sigmoid(device: str, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, labels: Tensor | None) -> None:
    dtype, given = x.dtype, (x, y, scale, bias, labels)
    loss = call(device, "sigmoid_contrastive", *given)
    assert loss.dtype == torch.float32
    want = formula.sigmoid_contrastive(*given)
    want.check(loss, torch.float32, "loss")
    whole = Exact(*(t.sum() if isinstance(t, Tensor) else t * len(x) for t in vars(want).values()))
    for weights in (None, randn(len(x), seed=5)):
        grad = torch.ones(len(x)) if weights is None else weights
        if weights is None:
            total, *grads = call(device, "sigmoid_contrastive_sum", *given)
            whole.check(total, torch.float32, "sum")
        else:
            grads = call(device, "sigmoid_contrastive_backward", *given, weights)
        assert [g.dtype for g in grads] == [dtype, dtype, torch.float32, torch.float32]
        wants = formula.sigmoid_gradients(*given, grad)
        largest = float(grad.abs().max())
        grad_x = with_rounded_weights(wants[0], dtype, y, scale, largest)
        grad_y = with_rounded_weights(wants[1], dtype, x, scale, largest)
        for name, expected, got in zip(("dx", "dy", "ds", "db"), (grad_x, grad_y, *wants[2:]), grads, strict=True):
            expected.check(got, torch.float32, (name, weights is None))


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
@on_every_device
def test_sigmoid(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    x, y = randn(rows, depth, dtype=dtype), randn(columns, depth, seed=1, dtype=dtype)
    with small_tiles():
        check_sigmoid(device, x, y, torch.tensor(2.0 / depth**0.5), torch.tensor(-0.3), draw(-2, columns, rows))
        if dtype == torch.float32:
            check_sigmoid(device, x, y, torch.tensor(2.0 / depth**0.5), torch.tensor([1.0]), None)


@on_every_device
def test_sigmoid_losses_of_any_size(device: str) -> None:
    """Each to its own precision: of 1e-13 as of 1000, and of 10^-5 the gradient in float16."""
    x, y = randn(17, 6), randn(18, 6, seed=1)
    x, y = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
    labels = draw(-1, 18, 17)
    with small_tiles():
        for scale, bias in ((1.0, -30.0), (1.0, 30.0), (10.0, -10.0), (1000.0, 0.0), (0.01, -88.0), (0.0, -4.0)):
            check_sigmoid(device, x, y, torch.tensor(scale), torch.tensor(bias), labels)
        check_sigmoid(device, x.half(), y.half(), torch.tensor(1.0), torch.tensor(-12.0), None)
        check_sigmoid(device, x.half(), y.half(), torch.tensor(10.0), torch.tensor(-10.0), labels)


@on_every_device
def test_log1p_is_accurate_for_every_argument(device: str) -> None:
    """One pair with logit w is log(1 + e^w): relative to its float64 value, from where e^w is 1 to where it is tiny."""
    w = torch.cat([torch.linspace(-87, 0, 200), torch.linspace(0, 88, 40), -torch.logspace(-7, 0, 40)])
    loss = call(device, "sigmoid_contrastive", w[:, None], torch.ones(1, 1), torch.tensor(1.0), torch.tensor(0.0), None)
    want = torch.logaddexp(w.double(), torch.zeros(len(w), dtype=torch.float64))
    # the exponential's argument is rounded after a multiplication by log2(e): |w| units; the rest takes a few
    assert (((loss.double() - want) / want).abs() <= (6 + 2 * w.double().abs()) * 2**-24).all()


# ---- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 0, 4), (5, 20, 0), (0, 0, 2), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@on_every_device
def test_nothing(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    x, y = randn(rows, depth, dtype=dtype), randn(columns, depth, dtype=dtype)
    labels = torch.full((rows,), columns - 1)
    scalars, per_row, per_column = (torch.tensor(2.0), torch.tensor(-0.5)), randn(rows) + 40, randn(columns) + 40
    for name, args in (
        ("sim_lse", (x, y, *scalars, labels, None)), ("sim_lse", (x, None, *scalars, None, None)),
        ("sim_lse_backward", (x, y, *scalars, labels, labels, *[per_row, per_column] * 2, per_row)),
        ("sim_lse_backward", (x, None, *scalars, None, None, per_row, None, per_row, None, None)),
        ("sigmoid_contrastive", (x, y, *scalars, labels)), ("sigmoid_contrastive_sum", (x, y, *scalars, None)),
        ("sigmoid_contrastive_backward", (x, y, *scalars, labels, per_row)),
    ):  # fmt: skip
        outs = (call(device, name, *args), reference(name, *args))
        for got, want in zip(*(o if isinstance(o, tuple) else (o,) for o in outs), strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape
            torch.testing.assert_close(got, want, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)


def strided(t: Any) -> Any:
    """The same values, with gaps between them; a matrix transposed."""
    if not isinstance(t, Tensor) or t.dim() == 0:
        return t
    around = torch.full((*t.shape, 3), -77 if t.dtype == torch.int64 else float("nan"), dtype=t.dtype)
    if t.dim() == 2:
        around = around.transpose(0, 1).contiguous().transpose(0, 1)
    around[..., 1] = t
    return around[..., 1]


@pytest.mark.parametrize("symmetric", [False, True], ids=["two", "symmetric"])
@on_every_device
def test_strided_arguments_and_scalars_of_any_kind(
    device: str, symmetric: bool, contrastive_calls: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    for dtype in DTYPES[:2]:
        for name, right in contrastive_calls(21, 34 - 13 * symmetric, 10, dtype=dtype, symmetric=symmetric).items():
            if symmetric and not name.startswith("sim_lse"):
                continue
            positional = [v for v in right.values() if not isinstance(v, bool)]
            apart = [strided(v) for v in positional]
            at = list(right).index("logit_scale")
            apart[at], apart[at + 1] = apart[at].double().view(1, 1), apart[at + 1].half()
            with small_tiles():
                want, got = call(device, name, *positional), call(device, name, *apart)
            pairs = zip(*(o if isinstance(o, tuple) else (o,) for o in (want, got)), strict=True)
            assert all(same_bits(a, b) for a, b in pairs), name
    rows = randn(40, 12)[::2, :11]  # rows apart, as of a slice
    want = call(device, "sim_lse", rows.contiguous(), None, torch.tensor(1.0), None, None, None)
    assert same_bits(call(device, "sim_lse", rows, None, torch.tensor(1.0), None, None, None)[0], want[0])


@on_every_device
def test_what_is_not_needed_is_empty(
    device: str, contrastive_calls: Callable[..., dict[str, dict[str, Any]]]
) -> None:  # fmt: skip
    for dtype in DTYPES[:2]:
        for name in ("sim_lse_backward", "sigmoid_contrastive_backward", "sigmoid_contrastive_sum"):
            right = contrastive_calls(19, 34, 7, dtype=dtype)[name]
            args = [v for v in right.values() if not isinstance(v, bool)]
            with small_tiles():
                whole = call(device, name, *args)
                first = len(whole) - (3 if name == "sim_lse_backward" else 4)
                for need_x, need_y in ((True, False), (False, True), (False, False)):
                    out = call(device, name, *args, need_x=need_x, need_y=need_y)
                    for i, (got, want) in enumerate(zip(out, whole, strict=True)):
                        gone = (i == first and not need_x) or (i == first + 1 and not need_y)
                        assert got.shape == (0,) if gone else same_bits(got, want), (name, i)
                        assert got.dtype == want.dtype


@on_every_device
def test_small_and_large_gradients_in_float16(device: str) -> None:
    """1 / N times a probability is below float16's numbers, and so is not what the products are fed with."""
    x, y = (randn(24, 16, seed=s, dtype=torch.float16) for s in (0, 1))
    scale = torch.tensor(0.01)
    with small_tiles():
        for size in (1e-30, 1e-6, 1.0, 1e6):  # the scale brings the results to where float16 has its numbers
            wide = torch.tensor(min(100.0 / size, 1e38))
            lse, grad = torch.full((24,), 4.0), torch.full((24,), size)
            got = call(device, "sim_lse_backward", x * 0, y, wide, None, None, None, lse, None, grad, None, None)[0]
            want = float(wide) * size * math.exp(-4) * y.double().sum(0).expand(24, 16)
            assert relative_error(got, want) < 2 * TOLERANCES[torch.float16].unit, size
        check_softmax(device, x, y, scale, None, draw(0, 24, 24), None, size=1e-7)
        lse = call(device, "sim_lse", x, y, scale, None, None, None)
        zero, grad = torch.zeros(24), torch.ones(24)
        out = call(device, "sim_lse_backward", x, y, scale, None, None, None, *lse[:2], zero, zero, None)
        assert not any(t.any() for t in out)
        grad[3] = INF  # what a gradient scaler must see
        out = call(device, "sim_lse_backward", x, y, scale, None, None, None, *lse[:2], grad, zero, None)
        assert not out[0].isfinite().all() and not out[1].isfinite().all()


@on_every_device
def test_infinite_and_undefined_features(device: str) -> None:
    """They are seen where the reference shows them, and nowhere else."""
    x, y = randn(34, 5), randn(37, 5, seed=1).abs()
    x[3, 2], x[20, 0], x[33, 4] = INF, -INF, float("nan")
    given = (x, y, torch.tensor(1.0), None, draw(0, 37, 34), None)
    for cols in (False, True):
        with small_tiles():
            outs = call(device, "sim_lse", *given, cols=cols), reference("sim_lse", *given, cols=cols)
        for got, want in zip(*outs, strict=True):
            assert torch.equal(formula.non_finite(got), formula.non_finite(want))
    given = (x, y, torch.tensor(1.0), torch.tensor(0.0), given[4])
    with small_tiles():
        got, want = call(device, "sigmoid_contrastive", *given), reference("sigmoid_contrastive", *given)
    assert torch.equal(formula.non_finite(got), formula.non_finite(want))


@on_every_device
def test_the_same_bits_every_time(
    device: str, contrastive_calls: Callable[..., dict[str, dict[str, Any]]]
) -> None:  # fmt: skip
    for name, right in contrastive_calls(19, 34, 20, dtype=torch.float16).items():
        args = [v for v in right.values() if not isinstance(v, bool)]
        with small_tiles():
            once, again = (call(device, name, *args) for _ in range(2))
        pairs = zip(*(o if isinstance(o, tuple) else (o,) for o in (once, again)), strict=True)
        assert all(same_bits(a, b) for a, b in pairs), name


@on_every_device
def test_autograd_through_the_public_functions(device: str) -> None:
    place = target(device)
    weights = randn(2 * 22, seed=4)
    classes = draw(0, 6, 22)

    def losses(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Iterator[Tensor]:
        w, c = weights.to(x.device), classes.to(x.device)
        yield (w[:22] * ops.info_nce(x, y, scale, bias, label_smoothing=0.1, reduction="none")).sum()
        yield ops.info_nce(x, y, scale, y_negatives=y.flip(0), symmetric=False, decoupled=True)
        yield (w * ops.nt_xent(x, y, temperature=0.7, reduction="none")).sum()
        yield (w[:22] * ops.sup_con(x, c, temperature=0.5, reduction="none")).sum()
        yield ops.sigmoid_contrastive(x, y, scale, bias)
        yield (w[:22] * ops.sigmoid_contrastive(x, y, scale, bias, reduction="none")).sum()

    results = []
    for backend, where in (("triton", place), ("reference", torch.device("cpu"))):
        leaves = [randn(22, 9), randn(22, 9, seed=1), torch.tensor(1.3), torch.tensor(-0.2)]
        leaves = [t.to(where).requires_grad_() for t in leaves]
        with tlkernels.backend(backend), small_tiles():
            results.append([
                (loss.detach().cpu(), torch.autograd.grad(loss, leaves, allow_unused=True)) for loss in losses(*leaves)
            ])  # fmt: skip
    for (loss, grads), (want, wanted) in zip(*results, strict=True):
        torch.testing.assert_close(loss, want)
        for grad, expected in zip(grads, wanted, strict=True):
            assert (grad is None) == (expected is None)
            if grad is not None and expected is not None:
                torch.testing.assert_close(grad.cpu(), expected, rtol=1e-5, atol=2e-6)


@on_every_device
def test_float64_runs_the_reference(
    device: str, contrastive_calls: Callable[..., dict[str, dict[str, Any]]]
) -> None:  # fmt: skip
    for name, right in contrastive_calls(5, 8, 4, dtype=torch.float64).items():
        args = [v for v in right.values() if not isinstance(v, bool)]
        outs = (call(device, name, *args), reference(name, *args))
        for got, want in zip(*(o if isinstance(o, tuple) else (o,) for o in outs), strict=True):
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, want)


# ---- cutting --------------------------------------------------------------------------------------------------------


@compiled
def test_memory_beyond_the_results_does_not_grow() -> None:
    """Partial statistics and chunks of G of a million rows are a few MB; parts cover each pair of any sizes once."""
    from tlkernels.triton_kernels import contrastive

    def matrix(rows: int, columns: int | None, dtype: torch.dtype) -> Any:
        x, *y = (None if n is None else torch.empty(n, 768, dtype=dtype, device="meta") for n in (rows, columns))
        scale = torch.empty((), device="meta")
        return contrastive._matrix(x, y[0], scale, None)

    for dtype in DTYPES:
        for rows, columns in (
            (2**20, 2**20), (2**20, None), (2**20, 3), (7, 2**20), (40_000, 1000), (33, None), (5, 9)
        ):  # fmt: skip
            m = matrix(rows, columns, dtype)
            height, width = contrastive._chunk(m)
            whole = (rows * (columns or rows)) * dtype.itemsize
            assert height % m.block_rows == 0 and width % m.block_columns == 0
            assert min(2**22, whole // 2) <= height * width * dtype.itemsize <= 2**24
            tall, wide = (
                n * block for n, block in zip(contrastive._PANEL, (m.block_rows, m.block_columns), strict=True)
            )
            row_tiles, tiles = m.tiles(tall, wide)
            assert 8 * (row_tiles * wide + tiles * tall) <= 2**25
    for rows, columns, step in ((50, 37, (16, 32)), (70, None, (32, 32)), (16, 16, (16, 16))):
        m, covered = matrix(rows, columns, torch.float32), torch.zeros(rows, columns or rows)
        for row0, column0, height, width in m.parts(*step):
            covered[row0 : row0 + height, column0 : column0 + width] += 1
            if columns is None and row0 < column0:
                covered[column0 : column0 + width, row0 : row0 + height] += 1
        assert (covered == 1).all()


# ---- calls ----------------------------------------------------------------------------------------------------------


def wrong(arguments: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each argument of a right call, wrong in one way."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield f"{name}: dtype", {name: value.to(torch.int32)}
            if value.dim():
                yield f"{name}: one less", {name: value.narrow(-1, 0, value.shape[-1] - 1)}
                yield f"{name}: a row less", {name: value.narrow(0, 0, value.shape[0] - 1)}
                yield f"{name}: flat", {name: value[0]}
            else:
                yield f"{name}: two", {name: value.repeat(2)}
            if value.is_floating_point() and value.dim():
                yield f"{name}: another float", {name: value.half()}
                yield f"{name}: elsewhere", {name: value.to("meta")}
        if name in ("labels", "exclude"):
            yield f"{name}: too large", {name: value + 1000}
        if name in ("labels", "grad_pair", "lse_col", "grad_col"):
            yield f"{name}: missing", {name: None}
    if "lse_col" in arguments:
        yield "y: missing", {"y": None}


@pytest.mark.parametrize("name", NAMES)
@on_every_device
def test_wrong_calls_get_the_reference_s_words(
    device: str, name: str, contrastive_calls: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    right, place, said = contrastive_calls(5, 8, 6)[name], target(device), 0
    right = {k: v.to(place) if isinstance(v, Tensor) else v for k, v in right.items()}
    assert outcome("triton", name, right) is None
    for how, change in wrong(right):
        if place.type != "cpu" and "too large" in how:  # cannot be seen without waiting for the device
            continue
        expected, got = (outcome(backend, name, {**right, **change}) for backend in ("reference", "triton"))
        if expected is None:
            assert got is None, (how, got)
        elif expected[1].startswith(f"{name}:"):
            assert got == expected, (how, got, expected)
            said += 1
        else:
            assert got is not None, (how, expected)
    assert said >= 10, "too few sentences to compare"


@pytest.mark.parametrize("name", NAMES)
@compiled
def test_a_kernel_takes_what_its_schema_says(name: str) -> None:
    check_signature(name)


# ---- machine code, without the machine ------------------------------------------------------------------------------

UNALIGNED = {"rows", "columns", "height", "width", "row0", "column0", "sums_stride", "size", "parts", "start"}


def of(kind: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def build(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], *, ones: bool = False, **options: Any
) -> Any:
    """With `ones` the sizes that are looked at are 1."""
    sizes = integers_of(arguments) - UNALIGNED if ones else ()
    return triton_modes.build(kernel, arguments, constants, unaligned=UNALIGNED, ones=sizes, **options)


def tiles(dtype: str, block: int = 0, columns: int = 0) -> tuple[dict[str, str], dict[str, Any]]:
    block = block or (64 if dtype == "fp32" else 128)
    arguments = {**of(f"*{dtype}", "x y"), **of("*fp32", "scale bias"), "labels": "*i64"}
    arguments |= of("i32", "row0 column0 rows columns height width depth x_stride y_stride")
    return arguments, {
        "BAND": 12, "BLOCK_ROWS": block, "BLOCK_COLUMNS": columns or block,
        "BLOCK_DEPTH": 32 if dtype == "fp32" else 64,
    }  # fmt: skip


def build_lse(dtype: str, *, block: int = 0, symmetric: bool = False, cols: bool = True, **options: Any) -> Any:
    from tlkernels.triton_kernels import contrastive

    arguments, constants = tiles(dtype, block)
    arguments |= {**of("*fp32", "row_max row_sum target"), "exclude": "*i64"}
    arguments |= of("*fp32", "column_max column_sum") if cols else {}
    return build(contrastive._lse_kernel, arguments, {**constants, "SYMMETRIC": symmetric}, **options)


def build_weights(dtype: str, *, block: int = 0, symmetric: bool = False, g: bool = True, **options: Any) -> Any:
    from tlkernels.triton_kernels import contrastive

    arguments, constants = tiles(dtype, block, 64 if symmetric else 0)
    arguments |= of("*fp32", "lse_row lse_col grad_row grad_col grad_pair sums") | {"exclude": "*i64"}
    arguments |= ({"g": f"*{dtype}"} if g else {}) | ({"amplifier": "*fp32"} if dtype == "fp16" else {})
    arguments |= {"g_stride": "i32"}
    return build(contrastive._weights_kernel, arguments, {**constants, "SYMMETRIC": symmetric}, **options)


def build_sigmoid(dtype: str, kind: str, *, block: int = 0, **options: Any) -> Any:
    from tlkernels.triton_kernels import contrastive

    arguments, constants = tiles(dtype, block)
    arguments |= of("i32", "g_stride sums_stride")
    if kind == "loss":
        arguments |= {"loss": "*fp32"}
    else:
        arguments |= {"g": f"*{dtype}", "sums": "*fp32"} | ({"amplifier": "*fp32"} if dtype == "fp16" else {})
    arguments |= {"weights": "*fp32"} if kind == "backward" else {}
    return build(contrastive._sigmoid_kernel, arguments, constants, **options)


def build_accumulate(dtype: str, *, transposed: bool, columns: int = 128, splits: int = 1, **options: Any) -> Any:
    from tlkernels.triton_kernels import contrastive

    arguments = {**of(f"*{dtype}", "g w"), "out": "*fp32"}
    arguments |= of("i32", "rows columns depth g_rows g_depth g_stride w_stride out_part out_stride")
    constants = {"TRANSPOSED": transposed, "ADD": splits == 1, "SPLITS": splits, "BAND": 12}
    constants |= {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": columns, "BLOCK_DEPTH": 64}
    return build(contrastive._accumulate_kernel, arguments, constants, **options)


WIDE: dict[str, Any] = {"num_warps": 8, "num_stages": 3}


@compiled
def test_products_use_matrix_instructions() -> None:
    """With the operands copied 16 bytes at a time, past the registers, and nothing atomic."""
    for kernel in (
        build_lse("bf16", **WIDE), build_weights("bf16", **WIDE),
        build_weights("fp16", symmetric=True, **WIDE), build_sigmoid("bf16", "sum", **WIDE),
        build_sigmoid("bf16", "loss", **WIDE), build_accumulate("bf16", transposed=False, **WIDE),
        build_accumulate("fp16", transposed=True, **WIDE),
    ):  # fmt: skip
        ptx = kernel.asm["ptx"]
        assert "wgmma.mma_async" in ptx and "mma.sync" not in ptx and "ld.local" not in ptx
        assert "cp.async.cg.shared.global [" in ptx and "cp.async.ca" not in ptx
        assert not re.search(r"\b(atom|red)\.", ptx)
        assert kernel.metadata.shared <= 227 * 1024


@compiled
def test_float32_keeps_all_its_bits() -> None:
    for kernel in (
        build_lse("fp32", block=32), build_weights("fp32", block=32), build_sigmoid("fp32", "backward", block=32)
    ):  # fmt: skip
        ptx = kernel.asm["ptx"]
        assert "fma.rn.f32" in ptx and "mma" not in ptx and "tf32" not in ptx


@compiled
def test_logarithms_are_accurate() -> None:
    """Not `lg2.approx`, which is off by 2^-22 next to 1, where losses near 0 are."""
    from tlkernels.triton_kernels import contrastive

    arguments = {**of("*fp32", "best total lse target nll"), "labels": "*i64", **of("i32", "size rows columns")}
    kernel = build(contrastive._finish_kernel, arguments, {"OF_COLUMNS": True, "TILE": 256})
    assert "lg2.approx" not in kernel.asm["ptx"]
    assert "lg2.approx" not in build_sigmoid("fp32", "loss", block=32).asm["ptx"]


@pytest.mark.parametrize(("capability", "ones"), [(80, False), (90, False), (90, True), (100, False)])
@compiled
def test_every_kernel_compiles_for_every_target(capability: int, ones: bool) -> None:
    """Also for strides and sizes of 1."""
    from tlkernels.triton_kernels import contrastive

    gpu: dict[str, Any] = {"capability": capability, "ones": ones}
    build_lse("bf16", block=64, **gpu)
    build_lse("fp32", block=32, symmetric=True, **gpu)
    build_lse("fp16", block=64, cols=False, **gpu)
    build_weights("bf16", block=64, **gpu)
    build_weights("fp16", block=64, symmetric=True, **gpu)
    build_weights("fp32", block=32, g=False, **gpu)
    build_sigmoid("fp16", "backward", block=64, **gpu)
    build_sigmoid("fp32", "sum", block=32, **gpu)
    build_sigmoid("bf16", "loss", block=64, **gpu)
    build_accumulate("bf16", transposed=False, columns=64, **gpu, **WIDE)
    build_accumulate("fp16", transposed=True, columns=64, splits=2, **gpu, num_warps=4)
    merge = {**of("*fp32", "part_max part_sum best total"), **of("i32", "start size parts")}
    build(contrastive._merge_kernel, merge, {"PARTS": 128, "TILE": 64}, **gpu)
    finish = {**of("*fp32", "best total lse target nll"), "labels": "*i64", **of("i32", "size rows columns")}
    build(contrastive._finish_kernel, finish, {"OF_COLUMNS": False, "TILE": 256}, **gpu)


@compiled
def test_pipelines_that_are_tried() -> None:
    """They differ in depth alone: the order of a tile's sums depends on the warps."""
    from tlkernels.triton_kernels import contrastive

    for rows, columns, warps in ((128, 128, 8), (128, 64, 8), (64, 64, 4), (16, 128, 4)):
        tried = contrastive._warps_of_tile(contrastive._pipelines(), {}, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns)
        assert {config.num_warps for config in tried} == {warps} and len({c.num_stages for c in tried}) == 3
