"""The contrastive ops compute their formula, within what rounding may do to it; the losses their closed forms.

Every test runs on every backend that serves CPU tensors; those marked `isa` run again at each instruction-set level.
The formula of the ops stands in tests/formula.py, in float64; those of the losses here, on a stored matrix of logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import formula
import pytest
import torch
from formula import Exact, check_finite, non_finite, same_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from levels import levels_of_this_machine, run_capped
from tolerances import TOLERANCES, relative_error
from torch import Tensor
from torch.nn import functional

from tlkernels import ops
from tlkernels.ops import _registry

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [0, 1, 2, 3, 13, 31, 33, 64, 127, 131, 133, 253, 257, 300]
LABELS = ("none", "own", "any", "few")
OPS = [
    "sim_lse", "sim_lse_backward", "sigmoid_contrastive", "sigmoid_contrastive_backward", "sigmoid_contrastive_sum",
]  # fmt: skip
INF = math.inf


def op(name: str) -> Any:
    return getattr(torch.ops.tlkernels, name).default


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return functional.normalize(randn(*shape, seed=seed), dim=-1).to(dtype)


def compiled(backend: str, name: str) -> bool:
    return backend == "cpu" and name in _registry.native_ops("cpu")


def indices(kind: str, rows: int, columns: int, seed: int = 0) -> Tensor | None:
    """Of a column for each row: none, its own as long as there is one, any or none (-1), or one of a few."""
    if kind == "none":
        return None
    if kind == "own":
        index = torch.arange(rows)
        return index.where(index < columns, -1)
    return torch.randint(-1, min(columns, 3) if kind == "few" else columns, (rows,), generator=seeded(seed + 9))


def test_the_list_of_ops_here_is_complete(contrastive_calls: Any) -> None:
    family = {name for name in _registry.OPS if name.startswith(("sim_lse", "sigmoid_"))}
    assert set(OPS) == family == set(contrastive_calls(2, 2, 2))


# ---- the formula, at any shape --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Features, and all that a call of an op may be given."""

    x: Tensor
    y: Tensor | None
    scale: Tensor
    bias: Tensor | None
    labels: Tensor | None
    exclude: Tensor | None

    @property
    def columns(self) -> int:
        return len(self.x if self.y is None else self.y)

    def of_sigmoid(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        assert self.y is not None
        return self.x, self.y, self.scale, torch.tensor(-10.0) if self.bias is None else self.bias, self.labels


def same(t: Tensor) -> Tensor:
    return t


def problem(
    rows: int, columns: int, size: int, dtype: torch.dtype, *, symmetric: bool = False, scale: float = 10.0,
    bias: float | None = None, labels: str = "any", exclude: str = "none", offset: float = 0.0, seed: int = 0,
    layout: Callable[[Tensor], Tensor] = same, scalar_dtype: torch.dtype = torch.float32,
) -> Problem:  # fmt: skip
    columns = rows if symmetric else columns
    x, y = (randn(n, size, seed=seed + i) / max(1, size) ** 0.5 + offset for i, n in enumerate((rows, columns)))
    index = [indices(kind, rows, columns, seed + i) for i, kind in enumerate((labels, exclude))]
    return Problem(
        layout(x.to(dtype)), None if symmetric else layout(y.to(dtype)), torch.tensor(scale, dtype=scalar_dtype),
        None if bias is None else torch.tensor([bias], dtype=scalar_dtype),
        *(None if t is None else layout(t) for t in index),
    )  # fmt: skip


def stored(backend: str, dtype: torch.dtype) -> torch.dtype:
    """What gradients of logits are rounded to before the products: bfloat16 where an instruction takes pairs of it."""
    if dtype == torch.bfloat16 and compiled(backend, "sim_lse_backward"):
        from tlkernels import _numpy

        if _numpy.level() == "avx512_bf16":
            return torch.bfloat16
    return torch.float64


def of_sum(e: Exact, p: Problem) -> Exact:
    """What a sum over rows or columns may be off by: equal terms err alike, so their errors add up without a root."""
    alike = any(t is not None and len(t) > 1 and t.stride(0) == 0 for t in (p.x, p.y))
    return replace(e, terms=e.terms**2) if alike else e


def assert_softmax(backend: str, p: Problem, *, cols: bool = True, seed: int = 0) -> None:
    """sim_lse and its gradients, for non-uniform gradients of all it returns."""
    dtype, acc = p.x.dtype, wide(p.x.dtype)
    inputs = (p.x, p.y, p.scale, p.bias, p.labels, p.exclude)
    out = op("sim_lse")(*inputs, cols=cols)
    for name, t, e in zip(("row", "col", "nll_row", "nll_col"), out, formula.sim_lse(*inputs, cols), strict=True):
        assert t.dtype == acc and t.is_contiguous()
        check_finite(e, t, dtype, name)
    grad_row, grad_col = (randn(n, seed=seed + i, dtype=acc) for i, n in enumerate((len(p.x), p.columns), 20))
    lse_col, grad_col = (out[1], grad_col) if cols and p.y is not None else (None, None)
    grad_pair = None if p.labels is None else randn(len(p.x), seed=seed + 22, dtype=acc)
    given_ = (*inputs, out[0], lse_col, grad_row, grad_col, grad_pair)
    gradients = op("sim_lse_backward")(*given_)
    expected = list(formula.sim_lse_gradients(*given_, stored(backend, dtype)))
    if p.y is None:
        assert gradients[1].shape == (0,) and gradients[1].dtype == dtype
        gradients, expected = gradients[::2], expected[::2]
    names = ("dx", "ds") if p.y is None else ("dx", "dy", "ds")
    for name, t, e in zip(names, gradients, expected, strict=True):
        assert t.dtype == (acc if name == "ds" else dtype) and t.is_contiguous(), name
        of_sum(e, p).check(t, dtype, name)


def assert_sigmoid(backend: str, p: Problem, *, seed: int = 0) -> None:
    """The three sigmoid ops, for non-uniform gradients of the rows' losses."""
    dtype, acc = p.x.dtype, wide(p.x.dtype)
    inputs = p.of_sigmoid()
    loss = op("sigmoid_contrastive")(*inputs)
    rows = formula.sigmoid_contrastive(*inputs)
    assert loss.dtype == acc and loss.is_contiguous()
    of_sum(rows, p).check(loss, dtype, "loss")
    total, *made = op("sigmoid_contrastive_sum")(*inputs)
    assert total.dtype == acc
    all_of = Exact(rows.value.sum(), rows.magnitude.sum(), len(p.x) * p.columns, rows.inherited.sum())
    of_sum(all_of, p).check(total, dtype, "sum")
    for grad, gradients in (
        (torch.ones(len(p.x), dtype=acc), made),
        (w := randn(len(p.x), seed=seed + 20, dtype=acc), op("sigmoid_contrastive_backward")(*inputs, w)),
    ):
        expected = formula.sigmoid_gradients(*inputs, grad, stored(backend, dtype))
        for name, t, e in zip(("dx", "dy", "ds", "db"), gradients, expected, strict=True):
            assert t.dtype == (acc if t.dim() == 0 else dtype) and t.is_contiguous(), name
            of_sum(e, p).check(t, dtype, name)


def case(i: int) -> Any:
    """Two cases of each number of rows; all columns and features, with all else in turn."""
    rows, half = SIZES[i % 14], i // 14
    values = {
        "rows": rows, "columns": SIZES[(5 * i + half + 3) % 14], "size": SIZES[(3 * i + 5 * half + 4) % 14],
        "symmetric": i % 5 == 2, "bias": (None, -0.5, 3.0)[i % 3], "labels": LABELS[(i + half) % 4],
        "exclude": LABELS[(i // 2 + half) % 4], "scale": (10.0, 1.0, 30.0, -5.0)[(i + half) % 4],
    }  # fmt: skip
    marks = [pytest.mark.isa] if i % 2 == half else []
    return pytest.param(values, i % 4 != 1, marks=marks, id="-".join(str(v) for v in values.values()))


CASES = [case(i) for i in range(28)]


def test_the_cases_cover_every_size() -> None:
    for name in ("rows", "columns", "size"):
        assert {c.values[0][name] for c in CASES} == set(SIZES), name
    for name in ("labels", "exclude"):
        assert {c.values[0][name] for c in CASES} == set(LABELS)
    assert {c.values[0]["symmetric"] for c in CASES} == {c.values[1] for c in CASES} == {True, False}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("options", "cols"), CASES)
def test_any_shape(backend: str, options: dict[str, Any], cols: bool, dtype: torch.dtype) -> None:
    p = problem(**options, dtype=dtype)
    assert_softmax(backend, p, cols=cols)
    if p.y is not None:
        assert_sigmoid(backend, p)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 15, 16, 17, 47, 49, 65, 97])
def test_any_number_of_rows(backend: str, rows: int, dtype: torch.dtype) -> None:
    """Few rows with many columns, many rows with few, and a triangle of a symmetric matrix."""
    for columns in (7, 150):
        for shape in ((rows, columns), (columns, rows)):
            p = problem(*shape, 21, dtype, labels="own", exclude="any", bias=1.0, seed=rows)
            assert_softmax(backend, p)
            assert_sigmoid(backend, p)
    assert_softmax(backend, problem(rows, rows, 21, dtype, symmetric=True, labels="any", exclude="own", seed=rows))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("size", [1, 2, 7, 15, 16, 17, 65, 255, 513, 1025])
def test_any_number_of_features(backend: str, size: int, dtype: torch.dtype) -> None:
    p = problem(35, 50, size, dtype, labels="few", seed=size)
    assert_softmax(backend, p)
    assert_sigmoid(backend, p)
    assert_softmax(backend, problem(50, 50, size, dtype, symmetric=True, exclude="own", seed=size))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", [(600, 45, 40), (45, 600, 40), (530, 530, 24)], ids=str)
def test_several_tiles_in_every_direction(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for exclude in ("none", "own"):
        p = problem(*shape, dtype, labels="any", exclude=exclude, bias=-1.0)
        assert_softmax(backend, p)
        assert_sigmoid(backend, p)
    if shape[0] == shape[1]:
        assert_softmax(backend, problem(*shape, dtype, symmetric=True, labels="own", exclude="any"))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 100.0, -10.0, 1000.0])
def test_any_scale(backend: str, scale: float, dtype: torch.dtype) -> None:
    """To logits of -1000 and 1000, of which no exponential is finite in float32."""
    for symmetric in (False, True):
        p = problem(70, 90, 24, dtype, symmetric=symmetric, labels="own", scale=scale)
        assert_softmax(backend, p)
    p = problem(70, 90, 24, dtype, labels="own", scale=scale, bias=-3.0)
    assert_sigmoid(backend, p)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [-1000.0, 1000.0, -90.0, 60.0])
def test_any_bias(backend: str, bias: float, dtype: torch.dtype) -> None:
    p = problem(40, 50, 16, dtype, labels="any", bias=bias)
    assert_softmax(backend, p)
    assert_sigmoid(backend, p)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [-12.0, -18.0, -30.0, -60.0])
def test_small_terms_of_the_sigmoid_loss_keep_their_digits(backend: str, bias: float, dtype: torch.dtype) -> None:
    """log(1 + e^-18) is 1.5e-8: a kernel that adds 1 first makes it 0, or a rounding of 1."""
    p = problem(30, 70, 16, dtype, labels="none", scale=2.0, bias=bias)
    assert_sigmoid(backend, p)
    loss = op("sigmoid_contrastive")(*p.of_sigmoid())
    exact = formula.sigmoid_contrastive(*p.of_sigmoid()).value
    assert relative_error(loss, exact) <= 1e-5 and (loss > 0).all()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("offset", [1.0, 20.0])
def test_with_a_large_offset(backend: str, offset: float, dtype: torch.dtype) -> None:
    """Features far from zero: similarities are large and nearly equal; the error is that of a sum of that size."""
    for symmetric in (False, True):
        p = problem(60, 70, 100, dtype, symmetric=symmetric, offset=offset, scale=1 / 16, labels="any", exclude="own")
        assert_softmax(backend, p)
        if not symmetric:
            assert_sigmoid(backend, p)


@pytest.mark.parametrize("scalar_dtype", DTYPES, ids=lambda d: f"scalars {d}")
def test_scalars_of_any_dtype_and_shape(backend: str, scalar_dtype: torch.dtype) -> None:
    for dtype in DTYPES:
        p = problem(9, 11, 5, dtype, scale=3.1, bias=-0.7, labels="own", scalar_dtype=scalar_dtype)
        for shape in ((), (1,), (1, 1)):
            q = Problem(p.x, p.y, p.scale.view(shape), p.bias.view(shape), p.labels, p.exclude)
            assert_softmax(backend, q)
            assert_sigmoid(backend, q)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every second element": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "offset by one element": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    "rows of a wider tensor": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand_as(t),
    "one element expanded": lambda t: t.reshape(-1)[0].expand_as(t),
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "requires grad": lambda t: t.clone().requires_grad_(t.is_floating_point()),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout(backend: str, layout: str, dtype: torch.dtype) -> None:
    """Of every argument at once: the formula does not know strides. Expanded features are all equal."""
    with torch.no_grad():
        for shape in ((5, 40, 17), (37, 29, 50)):
            p = problem(*shape, dtype, labels="any", exclude="few", bias=1.0, layout=STRIDED[layout])
            assert_softmax(backend, p)
            assert_sigmoid(backend, p)
        assert_softmax(backend, problem(40, 40, 33, dtype, symmetric=True, exclude="own", layout=STRIDED[layout]))


def test_layout_does_not_change_a_bit(backend: str, contrastive_calls: Any) -> None:
    """A strided or unaligned argument gives the bits of its contiguous copy, in every op."""
    for dtype in DTYPES[:3]:
        for name, right in contrastive_calls(37, 50, 33, dtype=dtype).items():
            expected = results(name, right)
            for layout in ("transposed", "every second element", "offset by one element", "rows of a wider tensor"):
                strided = {k: STRIDED[layout](v) if isinstance(v, Tensor) and v.dim() else v for k, v in right.items()}
                for a, b in zip(expected, results(name, strided), strict=True):
                    assert_same(backend, name, a, b, (layout, dtype))


def results(name: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    out = op(name)(**arguments)
    return out if isinstance(out, tuple) else (out,)


def assert_same(backend: str, name: str, a: Tensor, b: Tensor, context: object = "") -> None:
    """The same bits from a compiled kernel; the reference's BLAS (float64's too) may sum in another order."""
    if compiled(backend, name) and a.dtype != torch.float64:
        assert same_bits(a, b), (name, context)
    else:
        assert a.dtype == b.dtype and a.shape == b.shape, (name, context)
        # a rounding of logits up to 10, and the cancelling sum of a scale's gradient
        assert relative_error(a, b) <= 32 * TOLERANCES[a.dtype].unit, (name, context)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_asked_gradients_are_computed(backend: str, contrastive_calls: Any, dtype: torch.dtype) -> None:
    """What is not asked for is empty, and what is has the same bits."""
    calls = contrastive_calls(37, 50, 33, dtype=dtype)
    for name, first in (("sim_lse_backward", 0), ("sigmoid_contrastive_backward", 0), ("sigmoid_contrastive_sum", 1)):
        everything = results(name, calls[name])
        for need_x in (True, False):
            for need_y in (True, False):
                out = results(name, {**calls[name], "need_x": need_x, "need_y": need_y})
                for i, (t, e) in enumerate(zip(out, everything, strict=True)):
                    if (i == first and not need_x) or (i == first + 1 and not need_y):
                        assert t.shape == (0,) and t.dtype == dtype
                    elif t.dim() or not compiled(backend, name):
                        assert_same(backend, name, t, e, (need_x, need_y))
                    else:  # which tile counts it may depend on what else is computed
                        assert abs(t - e) <= 1e-5 * abs(e) + 1e-4, (name, need_x, need_y)


def test_columns_that_are_not_asked_for_change_nothing_else(backend: str, contrastive_calls: Any) -> None:
    for dtype in DTYPES[:3]:
        arguments = contrastive_calls(37, 150, 33, dtype=dtype)["sim_lse"]
        both, one = (results("sim_lse", {**arguments, "cols": cols}) for cols in (True, False))
        assert one[1].shape == one[3].shape == (0,)
        for i in (0, 2):
            assert relative_error(one[i], both[i]) <= 4 * TOLERANCES[torch.float32].unit


def test_the_symmetric_matrix_is_that_of_x_and_itself(backend: str) -> None:
    for dtype in DTYPES:
        p = problem(133, 133, 40, dtype, symmetric=True, labels="any", exclude="own")
        inputs = (p.x, p.scale, p.bias, p.labels, p.exclude)
        one, two = (op("sim_lse")(p.x, y, *inputs[1:]) for y in (None, p.x.clone()))
        for i in (0, 2):
            assert relative_error(one[i], two[i]) <= 8 * TOLERANCES[wide(dtype)].unit
        grad, pair = randn(133, seed=1, dtype=wide(dtype)), randn(133, seed=2, dtype=wide(dtype))
        dx, _, ds = op("sim_lse_backward")(p.x, None, *inputs[1:], one[0], None, grad, None, pair)
        dx2, dy2, ds2 = op("sim_lse_backward")(p.x, p.x.clone(), *inputs[1:], one[0], None, grad, None, pair)
        allowed = 2 * TOLERANCES[dtype].unit + 16 * TOLERANCES[wide(dtype)].unit
        assert relative_error(dx, dx2.double() + dy2.double()) <= allowed
        assert abs(ds - ds2) <= 1e-4 * abs(ds2)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_error_is_that_of_torch_in_float32(backend: str, dtype: torch.dtype, offset: float) -> None:
    """||error|| of all results at 300 x 400 x 256: at most 1.5 times that of torch on a stored float32 matrix.

    With an offset, which makes long sums grow in one direction, 3 times: BLAS sums in several parts.
    """
    factor = 1.5 if offset == 0.0 else 3.0
    p = problem(300, 400, 256, dtype, labels="own", scale=20.0 if offset == 0.0 else 2.0, offset=offset / 4)
    x, y = p.x.float(), p.y.float()
    dots = x @ y.T
    z = p.scale * dots
    row, col, own = z.logsumexp(1), z.logsumexp(0), z.diagonal()
    out = op("sim_lse")(*vars(p).values())
    exact = formula.sim_lse(*vars(p).values())
    for name, t, torchs, e in zip(
        ("row", "col", "nll_row", "nll_col"), out, (row, col, row - own, col[:300] - own), exact, strict=True
    ):
        error, allowed = (float((v.double() - e.value).norm()) for v in (t, torchs))
        assert error <= factor * allowed, f"{name}: {error:.3g} above {factor} times {allowed:.3g}"
    grads = [randn(n, seed=i) for i, n in enumerate((300, 400, 300))]
    g = grads[0][:, None] * (z - row[:, None]).exp() + grads[1] * (z - col).exp()
    g = g + torch.where(formula.at(p.labels, 400), grads[2][:, None], 0.0)
    torchs = ((p.scale * (g @ y)).to(dtype), (p.scale * (g.T @ x)).to(dtype), (g * dots).sum())
    given_ = (*vars(p).values(), out[0], out[1], *grads)
    exact = formula.sim_lse_gradients(*vars(p).values(), *(e.value for e in exact[:2]), *grads)
    for name, t, theirs, e in zip(("dx", "dy"), op("sim_lse_backward")(*given_), torchs, exact, strict=False):
        error, allowed = (float((v.double() - e.value).norm()) for v in (t, theirs))
        assert error <= factor * allowed, f"{name}: {error:.3g} above {factor} times {allowed:.3g}"


# ---- nothing, one, and what is left out -----------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_nothing_are_minus_infinity(backend: str, dtype: torch.dtype) -> None:
    """Without rows or columns, and where all is excluded. Their gradient is 0, and no NaN."""
    x, y, one = features(4, 6, dtype=dtype), features(1, 6, seed=1, dtype=dtype), torch.tensor(5.0)
    exclude = torch.tensor([0, -1, 0, 0])
    row, col, *_ = op("sim_lse")(x, y, one, None, None, exclude)
    assert torch.equal(row.isinf(), exclude == 0) and (row[exclude == 0] == -INF).all() and col.isfinite().all()
    row, col, *_ = op("sim_lse")(x, y, one, None, None, torch.zeros(4, dtype=torch.int64))
    assert (row == -INF).all() and (col == -INF).all()
    grad = torch.ones(4, dtype=wide(dtype))
    exclude = torch.zeros(4, dtype=torch.int64)
    for t in op("sim_lse_backward")(x, y, one, None, None, exclude, row, col, grad, grad[:1], None):
        assert not t.any() and not t.isnan().any()
    row, *_ = op("sim_lse")(x[:1], None, one, None, None, exclude[:1])
    assert (row == -INF).all()
    dx, _, ds = op("sim_lse_backward")(x[:1], None, one, None, None, exclude[:1], row, None, grad[:1], None, None)
    assert not dx.any() and not ds.any()
    row, col, *_ = op("sim_lse")(x, y[:0], one, None, None, None)
    assert (row == -INF).all() and col.shape == (0,)
    row, col, *_ = op("sim_lse")(x[:0], y, one, None, None, None)
    assert row.shape == (0,) and (col == -INF).all() and col.shape == (1,)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_excluded_rows_of_the_autograd_formula_have_no_gradient(backend: str, dtype: torch.dtype) -> None:
    x, y = (features(n, 6, seed=n, dtype=dtype).requires_grad_() for n in (4, 1))
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (5.0, 1.0))
    out = ops.sim_lse(x, y, scale, bias, exclude=torch.tensor([0, 0, -1, 0]))
    (out.row[0] * 2 + out.row[1] + out.row[3]).backward()
    assert not any(t.grad.any() or t.grad.isnan().any() for t in (x, y, scale, bias))


@pytest.mark.isa
@pytest.mark.parametrize("scale", [1.0, 7.3, 100.0, 1000.0, -3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_of_one_has_loss_0_and_gradient_0(backend: str, dtype: torch.dtype, scale: float) -> None:
    """Exactly: its logit is the log-sum-exp."""
    for size in (1, 7, 64, 100):
        leaves = [features(1, size, seed=i, dtype=dtype).requires_grad_() for i in range(2)]
        leaves += [torch.tensor(v, requires_grad=True) for v in (scale, 0.3)]
        x, y, s, b = leaves
        losses = {
            "info_nce": ops.info_nce(x, y, s, b),
            "one direction": ops.info_nce(x, y, s, b, symmetric=False),
            "nt_xent": ops.nt_xent(x, y, temperature=1 / abs(s)),
            "sup_con": ops.sup_con(x, torch.zeros(1, dtype=torch.int64)),
        }
        for name, loss in losses.items():
            assert same_bits(loss.detach(), torch.zeros((), dtype=wide(dtype))), (name, size)
            for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
                assert grad is None or not (grad.any() or grad.isnan().any()), (name, size, leaf)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0, 1000.0])
def test_no_nll_is_below_0(backend: str, scale: float, dtype: torch.dtype) -> None:
    """Also where it is nearly 0: pairs that are equal and far from all others, or equal to all others."""
    for rows, size in ((1, 5), (7, 64), (33, 16), (130, 300)):
        distinct, equal = features(rows, size, dtype=dtype), features(1, size, dtype=dtype).expand(rows, -1)
        near = torch.eye(rows, size, dtype=dtype) * 1.1
        for name, x, y in (
            ("pairs", distinct, distinct.clone()), ("symmetric", distinct, None), ("all equal", equal, equal),
            ("identity", near, near), ("large", 30 * distinct, 30 * distinct), ("opposite", distinct, -distinct),
        ):  # fmt: skip
            for bias in (None, torch.tensor(0.37)):
                out = op("sim_lse")(x, y, torch.tensor(scale), bias, torch.arange(rows), None)
                assert (out[2] >= 0).all() and (out[3] >= 0).all(), (name, rows, out[2].min())
                if name == "all equal":
                    level, rounding = torch.full_like(out[2], math.log(rows)), 4e-7 * (1 + scale)
                    torch.testing.assert_close(out[2], level, rtol=0, atol=rounding)
                    torch.testing.assert_close(out[3], level, rtol=0, atol=rounding)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_both_directions_know_the_same_target(backend: str, dtype: torch.dtype) -> None:
    """A matrix of equal logits, square: rows, columns and their nll have the same bits, whatever the logit is."""
    for rows in (2, 16, 40, 64):
        for scale in (1.0, 33.3):
            x, y = (features(1, 77, seed=i, dtype=dtype).expand(rows, -1) for i in range(2))
            row, col, nll_row, nll_col = op("sim_lse")(x, y, torch.tensor(scale), None, torch.arange(rows), None)
            assert relative_error(row, col) <= 2**-23 and relative_error(nll_row, nll_col) <= 2**-20
            target = (row.double() - nll_row.double(), col.double() - nll_col.double())
            assert (target[0] - target[1]).abs().max() <= 2**-22 * (1 + row.abs().max()), rows


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_transposing_swaps_the_directions(backend: str, dtype: torch.dtype) -> None:
    for shape in ((50, 50, 33), (130, 130, 64)):
        p = problem(*shape, dtype, labels="own", scale=30.0)
        a = op("sim_lse")(p.x, p.y, p.scale, None, p.labels, None)
        b = op("sim_lse")(p.y, p.x, p.scale, None, p.labels, None)
        for i, j in ((0, 1), (1, 0), (2, 3), (3, 2)):
            torch.testing.assert_close(a[i], b[j], rtol=1e-5, atol=1e-5)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_duplicates_share_their_weight(backend: str, dtype: torch.dtype) -> None:
    """Each of k equal candidates counts: the log-sum-exp is larger by log k, and each gets 1 / k of the gradient."""
    x, y = features(20, 24, dtype=dtype), features(15, 24, seed=1, dtype=dtype)
    many = y.repeat_interleave(4, 0)
    scale = torch.tensor(12.0)
    one, four = (op("sim_lse")(x, t, scale, None, None, None) for t in (y, many))
    torch.testing.assert_close(four[0], one[0] + math.log(4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(four[1], one[1].repeat_interleave(4), rtol=1e-5, atol=1e-5)
    grad = randn(20, seed=3)
    dx, dy, ds = op("sim_lse_backward")(x, many, scale, None, None, None, four[0], None, grad, None, None)
    dx1, dy1, ds1 = op("sim_lse_backward")(x, y, scale, None, None, None, one[0], None, grad, None, None)
    tolerance = 4 * TOLERANCES[dtype].unit + 1e-5
    assert (
        relative_error(dx, dx1) <= tolerance
        and relative_error(4 * dy.double(), dy1.repeat_interleave(4, 0)) <= tolerance
    )
    assert abs(ds - ds1) <= 1e-4 * abs(ds1)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_softmax_of_the_backward_pass_sums_to_1(backend: str, dtype: torch.dtype) -> None:
    """With y all ones along one feature and gradient 1 that column of dx is the scale, for every row."""
    for columns in (3, 50, 200):
        x, y = features(30, 17, dtype=dtype), features(columns, 17, seed=1, dtype=dtype)
        y[:, 4] = 1.0
        row, *_ = op("sim_lse")(x, y, torch.tensor(8.0), None, None, None)
        dx, *_ = op("sim_lse_backward")(
            x, y, torch.tensor(8.0), None, None, None, row, None, torch.ones(30), None, None
        )
        torch.testing.assert_close(dx[:, 4].float(), torch.full((30,), 8.0), rtol=1e-5, atol=0)


# ---- NaN, infinities, overflow --------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 40, 5), (40, 3, 33), (70, 90, 16)], ids=str)
def test_non_finite_features_reach_what_they_reach_in_float64(
    backend: str, shape: tuple[int, int, int], value: float, dtype: torch.dtype
) -> None:
    """In x and in y; other rows and columns keep their values."""
    rows, columns, _ = shape
    for which in (0, 1):
        for place in (0, -1):
            p = problem(*shape, dtype, labels="own", exclude="any", bias=-1.0)
            (p.x, p.y)[which].view(-1)[place] = value
            inputs = tuple(vars(p).values())
            out = op("sim_lse")(*inputs)
            exact = formula.sim_lse(*inputs)
            for name, t, e in zip(("row", "col", "nll_row", "nll_col"), out, exact, strict=True):
                assert torch.equal(non_finite(t), non_finite(e.value)), (name, which, place)
            grads = [randn(n, seed=i) for i, n in enumerate((rows, columns, rows), 3)]
            given_ = (*inputs, out[0], out[1], *grads)
            expected = formula.sim_lse_gradients(*given_)
            for name, t, e in zip(("dx", "dy", "ds"), op("sim_lse_backward")(*given_), expected, strict=True):
                assert torch.equal(t.isfinite(), e.value.isfinite()), (name, which, place)
            loss = op("sigmoid_contrastive")(*p.of_sigmoid())
            expected = formula.sigmoid_contrastive(*p.of_sigmoid()).value
            assert torch.equal(non_finite(loss), non_finite(expected)), (which, place)
            total, *made = op("sigmoid_contrastive_sum")(*p.of_sigmoid())
            assert torch.equal(non_finite(total), non_finite(expected.sum()))
            expected = formula.sigmoid_gradients(*p.of_sigmoid(), torch.ones(rows))
            for name, t, e in zip(("dx", "dy", "ds", "db"), made, expected, strict=True):
                assert torch.equal(t.isfinite(), e.value.isfinite()), (name, which, place)


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_non_finite_scalars_and_gradients(backend: str, value: float) -> None:
    """A NaN of the scale or the bias reaches every loss, that of a gradient the rows that it should."""
    p = problem(20, 30, 8, torch.float32, labels="own", bias=0.0)
    bad = torch.tensor(value)
    for scale, bias in ((bad, p.bias), (p.scale, bad)):
        out = op("sim_lse")(p.x, p.y, scale, bias, p.labels, None)
        for t, e in zip(out, formula.sim_lse(p.x, p.y, scale, bias, p.labels, None), strict=True):
            assert torch.equal(non_finite(t), non_finite(e.value))
        loss = op("sigmoid_contrastive")(p.x, p.y, scale, bias, p.labels)
        expected = formula.sigmoid_contrastive(p.x, p.y, scale, bias, p.labels).value
        assert torch.equal(non_finite(loss), non_finite(expected))
    row, col, *_ = op("sim_lse")(*vars(p).values())
    for i in range(3):
        grads = [randn(n, seed=i) for i, n in enumerate((20, 30, 20))]
        grads[i][3] = value
        out = op("sim_lse_backward")(*vars(p).values(), row, col, *grads)
        expected = formula.sim_lse_gradients(*vars(p).values(), row, col, *grads)
        for t, e in zip(out, expected, strict=True):
            assert torch.equal(t.isfinite(), e.value.isfinite()), i


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_large_logits_do_not_overflow(backend: str, dtype: torch.dtype) -> None:
    """Logits of 1e30, whose differences are exact: the largest takes all the weight."""
    x = torch.eye(5, 8, dtype=dtype)
    for scale in (1e4, 1e30, -1e30):
        row, col, nll_row, nll_col = op("sim_lse")(x, x.clone(), torch.tensor(scale), None, torch.arange(5), None)
        top = max(scale, 0.0)
        expected = torch.full((5,), top if scale > 0 else math.log(4.0))
        for t in (row, col):
            torch.testing.assert_close(t, expected, rtol=1e-6, atol=0)
        for t in (nll_row, nll_col):
            torch.testing.assert_close(t, expected - scale if scale < 0 else torch.zeros(5), rtol=1e-6, atol=0)
        loss = op("sigmoid_contrastive")(x, x, torch.tensor(scale), torch.tensor(0.0), torch.arange(5))
        torch.testing.assert_close(loss, torch.full((5,), 4 * math.log(2.0) + max(-scale, 0.0)), rtol=1e-6, atol=0)


# ---- what must be the same to the bit -------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["x and y", "symmetric"])
def test_same_bits_for_any_number_of_threads_and_every_time(
    backend: str, threads: Callable[[int], None], contrastive_calls: Any, symmetric: bool, dtype: torch.dtype
) -> None:
    for shape in ((3, 500, 40), (500, 3, 40), (300, 310, 70)):
        for name, arguments in contrastive_calls(*shape, dtype=dtype, symmetric=False).items():
            if symmetric:
                if not name.startswith("sim_lse") or shape[0] == 500:
                    continue
                arguments = contrastive_calls(shape[1], shape[1], 40, dtype=dtype, symmetric=True)[name]
            runs = []
            for count in (1, 2, 3, 1):
                threads(count)
                runs.append(results(name, arguments))
            for run in runs[1:]:
                for a, b in zip(runs[0], run, strict=True):
                    assert_same(backend, name, a, b, shape)


def test_arguments_are_left_alone(backend: str, contrastive_calls: Any) -> None:
    for dtype in DTYPES:
        for name, arguments in contrastive_calls(33, 40, 17, dtype=dtype).items():
            before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
            op(name)(**arguments)
            assert all(same_bits(arguments[k], v) for k, v in before.items()), name


@settings(max_examples=40)
@given(
    rows=st.integers(1, 90), columns=st.integers(1, 150), size=st.integers(1, 80), dtype=st.sampled_from(DTYPES),
    symmetric=st.booleans(), scale=st.sampled_from([0.0, 1.0, -4.0, 14.3, 100.0]), seed=st.integers(0, 2**31),
    bias=st.sampled_from([None, 0.5, -10.0]), labels=st.sampled_from(LABELS), exclude=st.sampled_from(LABELS),
    layout=st.sampled_from(list(STRIDED)), cols=st.booleans(),
)  # fmt: skip
@example(17, 50, 27, torch.float32, False, 1.0, 0, None, "own", "none", "expanded", False)
def test_property_the_formula(
    backend: str, rows: int, columns: int, size: int, dtype: torch.dtype, symmetric: bool, scale: float, seed: int,
    bias: float | None, labels: str, exclude: str, layout: str, cols: bool,
) -> None:  # fmt: skip
    with torch.no_grad():
        p = problem(
            rows, columns, size, dtype, symmetric=symmetric, scale=scale, bias=bias, labels=labels, exclude=exclude,
            seed=seed, layout=STRIDED[layout],
        )  # fmt: skip
        assert_softmax(backend, p, cols=cols, seed=seed)
        if not symmetric:
            assert_sigmoid(backend, p, seed=seed)


# ---- the losses, against their closed forms -------------------------------------------------------------------------


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def assert_loss(
    ours: Callable[..., Any], plain: Callable[..., Any], tensors: dict[str, Tensor], seed: int = 0, context: object = ""
) -> None:
    """All that `ours` returns is what `plain` makes of the same tensors in float64, and so are the gradients.

    They are those of a sum of all elements with weights of their own. Several rounded gradients may add up to one.
    """
    dtype = tensors["x"].dtype
    mine = {k: leaf(t) for k, t in tensors.items()}
    exact = {k: leaf(t.double()) for k, t in tensors.items()}
    results_, totals = [], []
    for function, arguments in ((ours, mine), (plain, exact)):
        out = function(**arguments)
        results_.append(out := out if isinstance(out, tuple) else (out,))
        weights = [randn(*t.shape, seed=seed + i).to(t.dtype) for i, t in enumerate(out)]
        totals.append(sum((t.where(t.isfinite(), 0) * w).sum() for t, w in zip(out, weights, strict=True)))
    sums = 1e-12 if dtype == torch.float64 else 1e-5
    for t, e in zip(*results_, strict=True):
        assert t.dtype == wide(dtype) and t.shape == e.shape, context
        torch.testing.assert_close(t.double(), e, rtol=sums, atol=sums, msg=lambda m: f"{context}: {m}")
    for total in totals:
        if total.requires_grad:
            total.backward()
    for name in tensors:
        grad, e = mine[name].grad, exact[name].grad
        if e is None or not e.any():  # none, or all its parts cancel
            assert grad is None or grad.abs().max() <= 40 * sums, (context, name)
            continue
        assert grad.dtype == mine[name].dtype, (context, name)
        rounding = max(TOLERANCES[t].unit for t in (dtype, grad.dtype))
        bound = (4 * rounding + sums) * (e.norm() if e.dim() else e.abs() + 5)
        assert (grad.double() - e).norm() <= bound, (context, name, grad, e)


def plain_info_nce(
    x: Tensor, y: Tensor, s: Tensor, b: Tensor, labels: Tensor | None = None, *, x_negatives: Tensor | None = None,
    y_negatives: Tensor | None = None, symmetric: bool = True, decoupled: bool = False, label_smoothing: float = 0.0,
    label_offset: int = 0, ignore_index: int = -100, reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, lse_row, lse_col), an anchor after the other."""
    target = (labels if labels is not None else torch.arange(len(x)) + label_offset).tolist()
    target = [-1 if t == ignore_index else t for t in target]

    def anchors(of: Tensor, others: Tensor, more: Tensor | None, out: list[set[int]]) -> tuple[list[Tensor], Tensor]:
        z = s * of @ (others if more is None else torch.cat([others, more])).T + b
        kept = [[j for j in range(z.shape[1]) if not (decoupled and j in left)] for left in out]
        lse = [torch.logsumexp(row[k], 0) for row, k in zip(z, kept, strict=True)]
        return lse, z

    def loss(lse: Tensor, z: Tensor, j: int) -> Tensor:
        return (1 - label_smoothing) * (lse - z[j]) + label_smoothing * (lse - z.mean())

    lse_row, z_row = anchors(x, y, y_negatives, [{t} for t in target])
    pairs = [{i for i, t in enumerate(target) if t == j} for j in range(len(y))]
    lse_col, z_col = anchors(y, x, x_negatives, pairs)
    losses = []
    for i, j in enumerate(target):
        if j < 0:
            losses.append(0 * s)
            continue
        losses.append(loss(lse_row[i], z_row[i], j))
        if symmetric:
            losses[-1] = (losses[-1] + loss(lse_col[j], z_col[j], i)) / 2
    each = torch.stack(losses)
    count = max(1, sum(t >= 0 for t in target))
    reduced = {"none": each, "sum": each.sum(), "mean": each.sum() / count}[reduction]
    return reduced, torch.stack(lse_row), torch.stack(lse_col) if symmetric else x.new_empty(0)


INFO_NCE: dict[str, dict[str, Any]] = {
    "plain": {},
    "one direction": {"symmetric": False},
    "offset": {"label_offset": 2},
    "labels": {"labels": [3, 0, -100, 5, 5, 1]},
    "labels, one direction": {"labels": [8, 8, -100, -100, 5, 1], "symmetric": False, "reduction": "sum"},
    "another ignore_index": {"labels": [3, -1, -1, 5, 0, 1], "ignore_index": -1},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing, one direction": {"label_smoothing": 0.3, "symmetric": False, "labels": [1, 2, -100, 7, 7, 0]},
    "all smoothed": {"label_smoothing": 1.0},
    "negatives of y": {"y_negatives": 5, "symmetric": False},
    "negatives on both sides": {"x_negatives": 4, "y_negatives": 5, "labels": [2, 1, -100, 8, 8, 3]},
    "negatives of x": {"x_negatives": 4, "reduction": "none"},
    "decoupled": {"decoupled": True},
    "decoupled, duplicates": {"decoupled": True, "labels": [2, 2, -100, 5, 4, 4], "reduction": "none"},
    "decoupled, one direction": {"decoupled": True, "symmetric": False, "y_negatives": 3},
    "everything": {
        "decoupled": True, "x_negatives": 4, "y_negatives": 5, "labels": [2, 2, -100, 5, 4, 0], "label_smoothing": 0.2,
        "reduction": "sum",
    },
    "smoothing with negatives": {"x_negatives": 4, "y_negatives": 5, "label_smoothing": 0.2, "label_offset": 1},
    "no label at all": {"labels": [-100] * 6},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INFO_NCE)
def test_info_nce(backend: str, name: str, dtype: torch.dtype) -> None:
    for reduction in (INFO_NCE[name].get("reduction", "mean"), "none"):
        options = {**INFO_NCE[name], "reduction": reduction}
        tensors = {
            "x": features(6, 12, dtype=dtype), "y": features(9, 12, seed=1, dtype=dtype), "s": torch.tensor(7.0),
            "b": torch.tensor(0.5),
        }  # fmt: skip
        for negatives in ("x_negatives", "y_negatives"):
            if negatives in options:
                tensors[negatives] = features(options.pop(negatives), 12, seed=3, dtype=dtype)
        if "labels" in options:
            options["labels"] = torch.tensor(options["labels"])
        assert_loss(
            lambda x, y, s, b, o=options, **more: ops.info_nce(x, y, s, b, **more, **o, return_lse=True),
            lambda x, y, s, b, o=options, **more: plain_info_nce(x, y, s, b, **more, **o),
            tensors, context=name,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_info_nce_is_cross_entropy(backend: str, dtype: torch.dtype) -> None:
    """Also label smoothing, ignored labels, every reduction, and MoCo: logits of a queue beside those of the batch."""
    x, y, queue = (features(n, 24, seed=n, dtype=dtype) for n in (40, 50, 130))
    labels = torch.randint(0, 50, (40,), generator=seeded()).masked_fill(torch.arange(40) % 7 == 3, -100)
    scale = torch.tensor(14.0)
    z = (scale * x.double() @ y.double().T, scale * x.double() @ queue.double().T)
    rtol = 1e-12 if dtype == torch.float64 else 3e-6
    for smoothing in (0.0, 0.1, 0.5, 1.0):
        for reduction in ("mean", "sum", "none"):
            for logits, negatives in ((z[0], None), (torch.cat(z, 1), queue)):
                for kind in (torch.int64, torch.int32):
                    loss = ops.info_nce(
                        x, y, scale, None, labels.to(kind), y_negatives=negatives, symmetric=False,
                        label_smoothing=smoothing, reduction=reduction,
                    )  # fmt: skip
                    expected = functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction=reduction)
                    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=rtol)


def test_info_nce_of_nothing_but_ignored_labels_is_0(backend: str) -> None:
    """Where torch's cross-entropy is NaN. And of no rows at all."""
    x, y = leaf(features(3, 5)), leaf(features(4, 5, seed=1))
    loss = ops.info_nce(x, y, 5.0, labels=torch.full((3,), -100))
    loss.backward()
    assert loss == 0.0 and not x.grad.any() and not y.grad.any()
    for symmetric in (False, True):
        assert ops.info_nce(x[:0], y, 5.0, symmetric=symmetric) == 0.0
        assert ops.info_nce(x[:0], y[:0], 5.0, symmetric=symmetric, label_smoothing=0.1) == 0.0
        assert ops.info_nce(x[:0], y, 5.0, symmetric=symmetric, reduction="none").shape == (0,)


def test_dcl_of_two_pairs_by_hand(backend: str) -> None:
    """The log of one exponential is its logit: each loss is the difference of two similarities."""
    x, y = features(2, 5), features(2, 5, seed=1)
    z = 3.0 * x @ y.T
    loss = ops.info_nce(x, y, 3.0, decoupled=True, reduction="none")
    across = torch.stack([z[0, 1] + z[1, 0], z[0, 1] + z[1, 0]]) / 2
    torch.testing.assert_close(loss, across - z.diagonal())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dcl_of_one_row_and_a_queue(backend: str, dtype: torch.dtype) -> None:
    """Without its positive, what is left of the sum is the queue."""
    tensors = {
        "x": features(1, 8, dtype=dtype), "y": features(1, 8, seed=1, dtype=dtype),
        "n": features(6, 8, seed=2, dtype=dtype), "m": features(6, 8, seed=3, dtype=dtype),
    }  # fmt: skip
    for symmetric in (False, True):

        def plain(x: Tensor, y: Tensor, n: Tensor, m: Tensor, symmetric: bool = symmetric) -> Tensor:
            row, col = (torch.logsumexp(5 * a @ q.T, 1).sum() - 5 * (x * y).sum() for a, q in ((x, n), (y, m)))
            return (row + col) / 2 if symmetric else row

        def ours(x: Tensor, y: Tensor, n: Tensor, m: Tensor, symmetric: bool = symmetric) -> Tensor:
            more = {"x_negatives": m} if symmetric else {}
            return ops.info_nce(x, y, 5.0, y_negatives=n, decoupled=True, symmetric=symmetric, **more)

        assert_loss(ours, plain, tensors, context=symmetric)


def plain_nt_xent(x: Tensor, temperature: Tensor, reduction: str) -> Tensor:
    n = len(x) // 2
    each = []
    for i in range(2 * n):
        z = x[i] @ x.T / temperature
        others = [k for k in range(2 * n) if k != i]
        each.append(torch.logsumexp(z[others], 0) - z[(i + n) % (2 * n)])
    losses = torch.stack(each)
    return {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nt_xent(backend: str, dtype: torch.dtype, reduction: str) -> None:
    for n in (1, 2, 3, 9):
        tensors = {"x": features(2 * n, 10, dtype=dtype), "temperature": torch.tensor(0.3, dtype=wide(dtype))}
        for two in (False, True):

            def ours(x: Tensor, temperature: Tensor, two: bool = two) -> Tensor:
                views = x.chunk(2) if two else (x, None)
                return ops.nt_xent(*views, temperature=temperature, reduction=reduction)

            assert_loss(
                ours, lambda x, temperature: plain_nt_xent(x, temperature, reduction), tensors, context=(n, two)
            )  # fmt: skip


def test_nt_xent_of_nothing_is_0(backend: str) -> None:
    assert ops.nt_xent(torch.empty(0, 4)) == 0.0 and ops.nt_xent(torch.empty(0, 4), torch.empty(0, 4)) == 0.0
    assert ops.nt_xent(torch.empty(0, 4), reduction="none").shape == (0,)


def plain_sup_con(
    x: Tensor, labels: Tensor, ref: Tensor | None, ref_labels: Tensor | None, temperature: Tensor,
    ref_offset: int | None, no_positive: str, reduction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, lse), by a loop over anchors and one over positives."""
    others, classes = (x, labels) if ref is None else (ref, ref_labels)
    own = 0 if ref is None else ref_offset
    losses, lses, counted = [], [], 0
    for i in range(len(x)):
        z = x[i] @ others.T / temperature
        among = [a for a in range(len(others)) if own is None or a != i + own]
        lse = torch.logsumexp(z[among], 0)
        positives = [a for a in among if classes[a] == labels[i]]
        loss = 0 * temperature
        for p in positives:
            loss = loss + (lse - z[p]) / len(positives)
        counted += bool(positives) or no_positive == "zero"
        losses.append(loss)
        lses.append(lse)
    each = torch.stack(losses)
    return {"none": each, "sum": each.sum(), "mean": each.sum() / max(1, counted)}[reduction], torch.stack(lses)


@pytest.mark.parametrize("no_positive", ["skip", "zero", "error"])
@pytest.mark.parametrize("form", ["itself", "others", "part of others"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sup_con(backend: str, dtype: torch.dtype, form: str, no_positive: str) -> None:
    labels = torch.tensor([7, -3, 7, 2**40, -3, 7] if no_positive == "error" else [7, -3, 7, 5, 11, 7])
    if no_positive == "error":
        labels[3] = 7
    tensors = {"x": features(6, 10, dtype=dtype), "temperature": torch.tensor(0.2, dtype=wide(dtype))}
    ref_labels, ref_offset = None, None
    if form != "itself":
        tensors["ref"] = features(13, 10, seed=4, dtype=dtype)
        ref_labels = torch.tensor([7, -3, 7, 7, 0, 1, 7, -3, 7, 2**40, -3, 7, 12])
        ref_offset = 6 if form == "part of others" else None
        if ref_offset is not None:
            tensors["ref"][6:12] = tensors["x"]
            ref_labels[6:12] = labels
    for reduction in ("mean", "none", "sum"):

        def ours(x: Tensor, temperature: Tensor, ref: Tensor | None = None, reduction: str = reduction) -> Any:
            loss, lse, positives = ops.sup_con(
                x, labels, ref, ref_labels, temperature=temperature, ref_offset=ref_offset, no_positive=no_positive,
                reduction=reduction, return_lse=True,
            )  # fmt: skip
            same_class = labels[:, None] == (labels if ref_labels is None else ref_labels)
            itself = 1 if ref is None or ref_offset is not None else 0
            assert torch.equal(positives, same_class.sum(1) - itself)
            return loss, lse

        def plain(x: Tensor, temperature: Tensor, ref: Tensor | None = None, reduction: str = reduction) -> Any:
            return plain_sup_con(x, labels, ref, ref_labels, temperature, ref_offset, no_positive, reduction)

        assert_loss(ours, plain, tensors, context=(form, reduction))


def test_sup_con_where_there_is_nothing(backend: str) -> None:
    """No anchors, one anchor, no reference: 0, with gradient 0."""
    z, labels = leaf(features(1, 4)), torch.tensor([3])
    for loss in (
        ops.sup_con(z[:0], labels[:0]), ops.sup_con(z, labels), ops.sup_con(z, labels, no_positive="zero"),
        ops.sup_con(z, labels, torch.empty(0, 4), labels[:0]),
        ops.sup_con(z, labels, features(2, 4), torch.tensor([1, 2])),
    ):  # fmt: skip
        assert loss == 0.0
        (grad,) = torch.autograd.grad(loss, z)
        assert not grad.any() and not grad.isnan().any()
    with pytest.raises(ValueError, match="sup_con: anchor 1 of class 9 has no positive; expected one for each"):
        ops.sup_con(features(3, 4), torch.tensor([3, 9, 3]), no_positive="error")


def test_sup_con_with_one_positive_each_is_nt_xent(backend: str) -> None:
    z = features(12, 8)
    labels = torch.arange(6).repeat(2)
    torch.testing.assert_close(ops.sup_con(z, labels, temperature=0.3), ops.nt_xent(z, temperature=0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sigmoid_contrastive(backend: str, dtype: torch.dtype, reduction: str) -> None:
    tensors = {
        "x": features(6, 12, dtype=dtype), "y": features(9, 12, seed=1, dtype=dtype), "s": torch.tensor(10.0),
        "b": torch.tensor(-3.0),
    }  # fmt: skip
    labels = torch.tensor([3, 0, -100, 5, 5, -100])
    for options, pairs in (
        ({}, torch.arange(6)), ({"label_offset": 3}, torch.arange(3, 9)),
        ({"negative_only": True}, torch.full((6,), -1)),
        ({"labels": labels}, labels), ({"labels": labels.int().where(labels >= 0, -7), "ignore_index": -7}, labels),
    ):  # fmt: skip

        def plain(x: Tensor, y: Tensor, s: Tensor, b: Tensor, pairs: Tensor = pairs) -> Tensor:
            sign = 2.0 * formula.at(pairs, 9) - 1.0
            each = torch.log1p(torch.exp(-sign * (s * x @ y.T + b))).sum(1)
            return {"none": each, "sum": each.sum(), "mean": each.sum() / 6}[reduction]

        assert_loss(
            lambda x, y, s, b, o=options: ops.sigmoid_contrastive(x, y, s, b, reduction=reduction, **o),
            plain, tensors, context=options,
        )  # fmt: skip


def test_sigmoid_contrastive_in_chunks_is_the_whole(backend: str) -> None:
    """As processes do: chunks of y, of which one holds the pairs."""
    x, y = features(8, 12), features(24, 12, seed=1)
    whole = ops.sigmoid_contrastive(x, y, 10.0, -5.0, label_offset=8, reduction="none")
    parts = [
        ops.sigmoid_contrastive(x, chunk, 10.0, -5.0, negative_only=i != 1, reduction="none")
        for i, chunk in enumerate(y.chunk(3))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_sigmoid_contrastive_has_one_value_with_and_without_gradients(backend: str) -> None:
    for dtype in DTYPES:
        x, y = features(33, 12, dtype=dtype), features(40, 12, seed=1, dtype=dtype)
        each = ops.sigmoid_contrastive(x, y, 10.0, -5.0, reduction="none")
        for reduction, expected in (("sum", each.sum()), ("mean", each.sum() / 33)):
            plain = ops.sigmoid_contrastive(x, y, 10.0, -5.0, reduction=reduction)
            graded = ops.sigmoid_contrastive(leaf(x), y, 10.0, -5.0, reduction=reduction)
            assert not plain.requires_grad and graded.requires_grad
            torch.testing.assert_close(plain, expected)
            torch.testing.assert_close(graded.detach(), expected)
    assert ops.sigmoid_contrastive(x[:0], y[:0], 1.0, 0.0) == 0.0
    assert ops.sigmoid_contrastive(leaf(x[:0]), y, 1.0, 0.0) == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_merge_of_blocks_is_the_whole(backend: str, dtype: torch.dtype) -> None:
    """With its gradient, and where a block holds nothing."""
    tensors = {"x": features(6, 10, dtype=dtype), "y": features(11, 10, seed=1, dtype=dtype)}

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return ops.lse_merge(*(ops.sim_lse(x, t, 9.0, cols=False).row for t in y.split([4, 0, 6, 1])))

    assert_loss(ours, lambda x, y: torch.logsumexp(9.0 * x @ y.T, 1), tensors)
    x = leaf(features(2, 4))
    nothing = ops.lse_merge(*(ops.sim_lse(x, torch.empty(0, 4), 1.0).row for _ in range(2)))
    assert (nothing == -INF).all()
    one = ops.sim_lse(x, x.detach(), 1.0).row
    assert ops.lse_merge(one) is one


@pytest.mark.parametrize("level", levels_of_this_machine()[:-1])
def test_every_lower_instruction_set_level(level: str, tmp_path: Path) -> None:
    run_capped(level, tmp_path, [Path(__file__)])
