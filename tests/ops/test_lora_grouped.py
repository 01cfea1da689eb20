"""Many adapters in one batch: each row's result is that of its own adapter alone, and no row touches another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import formula
import pytest
import torch
from formula import exact, flat, non_finite, product, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES, relative_error
from torch import Tensor
from torch.autograd import gradcheck

from tlkernels import ops
from tlkernels.ops import _registry

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def op(name: str) -> Any:
    return getattr(torch.ops.tlkernels, name).default


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randint(low: int, high: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, (n,), generator=torch.Generator().manual_seed(seed))


def compiled(backend: str, name: str) -> bool:
    return backend == "cpu" and name in _registry.native_ops("cpu")


def assert_same_product(backend: str, name: str, a: Tensor, b: Tensor, context: object = "") -> None:
    """The same bits from a compiled kernel; the reference's BLAS (float64's too) may sum in another order."""
    if compiled(backend, name) and a.dtype != torch.float64:
        assert same_bits(a, b), (name, context)
    else:
        assert a.dtype == b.dtype and a.shape == b.shape, (name, context)
        assert relative_error(a, b) <= max(TOLERANCES[a.dtype].norm, TOLERANCES[a.dtype].unit), (name, context)


def group(
    rows: int, out_features: int, in_features: int, rank: int, adapters: int, dtype: torch.dtype, *,
    factor_dtype: torch.dtype | None = None, ranks: bool = True, seed: int = 0, ids: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of lora_linear_grouped. Where there are ranks, NaN stands above them in the factors."""
    kind = factor_dtype or dtype
    a = (randn(adapters, rank, in_features, seed=seed + 1) / in_features**0.5).to(kind)
    b = randn(adapters, out_features, rank, seed=seed + 2).to(kind)
    each = randint(0, rank + 1, adapters, seed + 3)
    if ranks:
        for adapter, r in enumerate(each.tolist()):
            a[adapter, r:] = float("nan")
            b[adapter, :, r:] = float("nan")
    return {
        "x": randn(rows, in_features, seed=seed + 4, dtype=dtype),
        "weight": randn(out_features, in_features, seed=seed + 5, dtype=dtype),
        "bias": randn(out_features, seed=seed + 6),
        "lora_a": a,
        "lora_b": b,
        "adapter_ids": randint(-1, adapters, rows, seed + 7) if ids is None else ids,
        "scalings": randn(adapters, seed=seed + 8),
        "ranks": each if ranks else None,
    }


def members(arguments: dict[str, Any]) -> list[tuple[int, Tensor, int, Tensor, Tensor, float]]:
    """(adapter, its rows, its rank, its lora_a, its lora_b, its scaling) of each."""
    a, b, ids, scalings, ranks = (arguments[k] for k in ("lora_a", "lora_b", "adapter_ids", "scalings", "ranks"))
    each = [a.shape[1]] * len(a) if ranks is None else ranks.tolist()
    return [
        (i, (ids.reshape(-1) == i).nonzero()[:, 0], r, a[i, :r], b[i, :, :r], float(scalings[i]))
        for i, r in enumerate(each)
    ]


def assert_group(arguments: dict[str, Any], context: object = "") -> None:
    """y, s and all gradients, adapter by adapter, from the rounded s and ds that the op had."""
    x, weight, bias, lora_a, lora_b, ids = (
        arguments[k] for k in ("x", "weight", "bias", "lora_a", "lora_b", "adapter_ids")
    )
    dtype, out_features, rank = x.dtype, weight.shape[0], lora_a.shape[1]
    y, s = op("lora_linear_grouped")(**arguments)
    assert y.dtype == s.dtype == dtype
    assert y.shape == (*x.shape[:-1], out_features) and s.shape == (*x.shape[:-1], rank)
    dy = randn(*y.shape, seed=9, dtype=dtype)
    rest = {k: arguments[k] for k in ("lora_a", "lora_b", "adapter_ids", "scalings", "ranks")}
    ds, grad_a, grad_b = op("lora_grouped_grad")(dy, x, s, **rest)
    assert ds.dtype == dtype and grad_a.dtype == lora_a.dtype and grad_b.dtype == lora_b.dtype
    assert grad_a.shape == lora_a.shape and grad_b.shape == lora_b.shape and ds.shape == s.shape
    dx = op("lora_grouped_grad_x")(dy, weight, ds, lora_a, ids, arguments["ranks"])
    assert dx.dtype == dtype and dx.shape == x.shape

    x, y, s, dy, ds, dx = (flat(t) for t in (x, y, s, dy, ds, dx))
    alone = (ids.reshape(-1) == -1).nonzero()[:, 0]
    base = product(x[alone], weight.T)
    (base if bias is None else base + exact(bias)).check(y[alone], dtype, (context, "no adapter"))
    product(dy[alone], weight).check(dx[alone], dtype, (context, "dx, no adapter"))
    assert not s[alone].any() and not ds[alone].any(), context
    for adapter, rows, r, a, b, scaling in members(arguments):
        where = (context, adapter, len(rows), r)
        y_exact, s_exact = formula.lora_linear(x[rows], weight, bias, a, b, scaling, s=s[rows, :r])
        s_exact.check(s[rows, :r], dtype, (where, "s"))
        y_exact.check(y[rows], dtype, (where, "y"))
        gradients = formula.lora_gradients(
            dy[rows], x[rows], weight, a, b, scaling, s=s[rows, :r], ds=ds[rows, :r]
        )  # fmt: skip
        results = ds[rows, :r], grad_a[adapter, :r], grad_b[adapter, :, :r], dx[rows]
        for name, t, e in zip(("ds", "dA", "dB", "dx"), results, gradients, strict=True):
            e.check(t, dtype, (where, name))
        for t in (s[rows, r:], ds[rows, r:], grad_a[adapter, r:], grad_b[adapter, :, r:]):
            assert not t.any(), (where, "above the rank")  # NaN counts as something


# ---- the formula, adapter by adapter --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("adapters", range(1, 34))
def test_any_number_of_adapters(backend: str, adapters: int, dtype: torch.dtype) -> None:
    """With unequal ranks, from 0, and NaN above them; most adapters have few rows, some none."""
    assert_group(group(40, 33, 50, 6, adapters, dtype, seed=adapters))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("ranks", [False, True], ids=["one rank", "unequal ranks"])
@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "rank", "adapters"),
    [(1, 1, 1, 1, 1), (1, 65, 257, 16, 3), (2, 7, 3, 2, 5), (5, 33, 31, 17, 2), (17, 127, 64, 8, 4),
     (33, 100, 128, 33, 6), (64, 384, 65, 64, 2), (130, 31, 520, 5, 8), (257, 64, 100, 3, 3), (48, 2, 7, 300, 2)],
)  # fmt: skip
def test_any_shape(
    backend: str, rows: int, out_features: int, in_features: int, rank: int, adapters: int, ranks: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    arguments = group(rows, out_features, in_features, rank, adapters, dtype, ranks=ranks)
    assert_group(arguments)
    assert_group({**arguments, "bias": None})


def rows_of(*counts: tuple[int, int]) -> Tensor:
    return torch.cat([torch.full((n,), adapter) for adapter, n in counts])


IDS: dict[str, Tensor] = {
    "all of one": rows_of((2, 40)),
    "all without": rows_of((-1, 40)),
    "sorted": rows_of((-1, 7), (0, 16), (1, 1), (3, 16)),
    "sorted down": rows_of((3, 9), (2, 9), (0, 21), (-1, 1)),
    "in turn": torch.arange(40) % 5 - 1,
    "last adapter only at the end": rows_of((0, 39), (3, 1)),
    "first row without": rows_of((-1, 1), (1, 39)),
    "17 rows beside 16": rows_of((1, 17), (0, 16), (2, 7)),
}


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("kind", IDS)
def test_any_order_and_size_of_the_groups(backend: str, kind: str, dtype: torch.dtype) -> None:
    arguments = group(40, 45, 70, 8, 4, dtype, ids=IDS[kind])
    arguments["ranks"] = torch.tensor([8, 3, 8, 1])
    arguments["lora_a"], arguments["lora_b"] = arguments["lora_a"].nan_to_num(0.25), arguments["lora_b"].nan_to_num(2)
    assert_group(arguments)
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert_group({**arguments, "adapter_ids": arguments["adapter_ids"][shuffle]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids_and_ranks_in_any_integer_dtype_and_layout(backend: str, dtype: torch.dtype) -> None:
    arguments = group(30, 24, 40, 5, 4, dtype)
    expected = op("lora_linear_grouped")(**arguments)
    ids, ranks, scalings = (arguments[k] for k in ("adapter_ids", "ranks", "scalings"))
    for change in (
        {"adapter_ids": ids.int()},
        {"ranks": ranks.int()},
        {"adapter_ids": ids.int(), "ranks": ranks.int()},
        {"adapter_ids": ids.repeat_interleave(2)[::2], "ranks": ranks.repeat_interleave(3)[1::3]},
        {"adapter_ids": torch.cat([ids[:1], ids]).int()[1:], "scalings": scalings.repeat_interleave(2)[::2]},
    ):
        for a, b in zip(op("lora_linear_grouped")(**{**arguments, **change}), expected, strict=True):
            assert same_bits(a, b), change
        assert_group({**arguments, **change})


@pytest.mark.isa
@pytest.mark.parametrize("factor_dtype", DTYPES, ids=lambda d: f"factors {d}")
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_factors_of_another_dtype(backend: str, dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    assert_group(group(35, 48, 70, 5, 4, dtype, factor_dtype=factor_dtype))


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every second element": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "offset by one element": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    "flipped": lambda t: t.flip(0),
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout(backend: str, layout: str, dtype: torch.dtype) -> None:
    arguments = group(30, 24, 41, 5, 4, dtype, ranks=False)
    assert_group({k: STRIDED[layout](v) if isinstance(v, Tensor) else v for k, v in arguments.items()}, layout)


@pytest.mark.parametrize("leading", [(24,), (2, 12), (2, 3, 4), (24, 1), (4, 1, 6)], ids=str)
def test_leading_shape_does_not_matter(backend: str, leading: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        arguments = group(24, 20, 36, 4, 3, dtype)
        shaped = {
            **arguments, "x": arguments["x"].view(*leading, 36), "adapter_ids": arguments["adapter_ids"].view(leading),
        }  # fmt: skip
        assert_group(shaped)
        y, _ = op("lora_linear_grouped")(**shaped)
        assert_same_product(
            backend, "lora_linear_grouped", y.view(24, 20), op("lora_linear_grouped")(**arguments)[0], leading
        )


def test_one_row_without_a_batch_dimension(backend: str) -> None:
    arguments = group(1, 20, 36, 4, 3, torch.float32, ids=torch.tensor([2]), ranks=False)
    one = {**arguments, "x": arguments["x"][0], "adapter_ids": torch.tensor(2)}
    assert_group(one)
    y = randn(25)
    before = y.clone()
    ops.lora_grouped_delta_(y, **without_base(one), start=3)
    assert_delta(y, before, one, 3)


@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 2)], ids=str)
@pytest.mark.parametrize("adapters", [0, 3])
def test_no_rows(backend: str, adapters: int, leading: tuple[int, ...]) -> None:
    arguments = group(0, 6, 8, 2, adapters, torch.float32)
    arguments["x"], arguments["adapter_ids"] = torch.empty(*leading, 8), torch.empty(leading, dtype=torch.int64)
    assert_group(arguments)
    y = torch.empty(*leading, 9)
    op("lora_grouped_delta_")(y, **without_base(arguments), start=1)
    assert y.shape == (*leading, 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_adapters_is_the_base(backend: str, dtype: torch.dtype) -> None:
    arguments = group(12, 9, 20, 4, 0, dtype, ids=torch.full((12,), -1))
    assert_group(arguments)
    some = group(12, 9, 20, 4, 3, dtype, ids=torch.full((12,), -1))
    assert same_bits(op("lora_linear_grouped")(**arguments)[0], op("lora_linear_grouped")(**some)[0])


def test_no_features(backend: str) -> None:
    for out_features, in_features in ((6, 0), (0, 6)):
        arguments = group(5, out_features, max(1, in_features), 2, 3, torch.float32)
        for name in ("x", "weight", "lora_a"):
            arguments[name] = arguments[name][..., :in_features]
        y, s = op("lora_linear_grouped")(**arguments)
        if not in_features:
            assert same_bits(y, arguments["bias"].expand(5, 6).contiguous()) and not s.any()
        rest = {k: arguments[k] for k in ("lora_a", "lora_b", "adapter_ids", "scalings", "ranks")}
        _, grad_a, grad_b = op("lora_grouped_grad")(torch.ones_like(y), arguments["x"], s, **rest)
        assert grad_a.shape == arguments["lora_a"].shape and grad_b.shape == arguments["lora_b"].shape


@settings(max_examples=40)
@given(
    rows=st.integers(0, 70), out_features=st.integers(1, 90), in_features=st.integers(1, 90), rank=st.integers(1, 40),
    adapters=st.integers(0, 12), dtype=st.sampled_from(DTYPES), factor_dtype=st.sampled_from([None, *DTYPES]),
    ranks=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_property_the_formula(
    backend: str, rows: int, out_features: int, in_features: int, rank: int, adapters: int, dtype: torch.dtype,
    factor_dtype: torch.dtype | None, ranks: bool, seed: int,
) -> None:  # fmt: skip
    ids = None if adapters else torch.full((rows,), -1)
    assert_group(
        group(
            rows, out_features, in_features, rank, adapters, dtype, factor_dtype=factor_dtype, ranks=ranks, seed=seed,
            ids=ids,
        )
    )  # fmt: skip


# ---- who may touch whom ---------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 40, 130])
def test_rows_without_an_adapter_have_the_bits_of_the_base(backend: str, rows: int, dtype: torch.dtype) -> None:
    for shape in ((33, 50), (64, 257)):
        ids = randint(-1, 3, rows, seed=rows)
        ids[0] = -1
        arguments = group(rows, *shape, 8, 3, dtype, ids=ids)
        base, _ = op("lora_linear_grouped")(**{**arguments, "adapter_ids": torch.full_like(ids, -1)})
        y, _ = op("lora_linear_grouped")(**arguments)
        assert same_bits(y[ids == -1], base[ids == -1])
        zero = {**arguments, "lora_b": torch.zeros_like(arguments["lora_b"])}
        assert same_bits(op("lora_linear_grouped")(**zero)[0], base)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_order_of_the_rows_does_not_change_a_bit(backend: str, dtype: torch.dtype) -> None:
    for rows in (7, 40, 97):
        arguments = group(rows, 45, 70, 8, 4, dtype)
        y, s = op("lora_linear_grouped")(**arguments)
        shuffle = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
        shuffled = {**arguments, "x": arguments["x"][shuffle], "adapter_ids": arguments["adapter_ids"][shuffle]}
        for a, b in zip(op("lora_linear_grouped")(**shuffled), (y[shuffle], s[shuffle]), strict=True):
            assert_same_product(backend, "lora_linear_grouped", a, b, rows)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_or_an_adapter_that_is_not_finite_reaches_no_other_result(
    backend: str, value: float, dtype: torch.dtype
) -> None:
    clean = group(40, 33, 50, 6, 4, dtype, ranks=False)
    y_clean, s_clean = op("lora_linear_grouped")(**clean)
    ids = clean["adapter_ids"]
    for name, place, reached in (
        ("x", (7, 3), torch.arange(40) == 7),
        ("x", (39, 49), torch.arange(40) == 39),
        ("lora_a", (2, 5, 1), ids == 2),
        ("lora_b", (0, 32, 0), ids == 0),
        ("scalings", (1,), ids == 1),
    ):
        t = {k: v.clone() if isinstance(v, Tensor) else v for k, v in clean.items()}
        t[name][place] = value
        y, s = op("lora_linear_grouped")(**t)
        assert torch.equal(~y.isfinite().all(1), reached), name
        if name != "lora_b":
            assert torch.equal(~s.isfinite().all(1), reached & (ids >= 0)), name
        for a, b in ((y, y_clean), (s, s_clean)):
            assert_same_product(backend, "lora_linear_grouped", a[~reached], b[~reached], name)


@pytest.mark.parametrize("name", ["x", "grad_output", "s"])
def test_a_row_that_is_not_finite_reaches_no_other_adapters_gradient(backend: str, name: str) -> None:
    """As in a loop over single adapters, where the others never see the row; nor does anyone see a row without one."""
    arguments = group(40, 33, 50, 6, 4, torch.float32)
    for row in (7, int((arguments["adapter_ids"] == -1).nonzero()[0])):
        t = {"grad_output": randn(40, 33), "x": arguments["x"].clone(), "s": randn(40, 6)}
        t[name][row] = float("nan")
        rest = {k: arguments[k] for k in ("lora_a", "lora_b", "adapter_ids", "scalings", "ranks")}
        owner = int(arguments["adapter_ids"][row])
        _, *gradients = op("lora_grouped_grad")(**t, **rest)
        for gradient in gradients:
            others = torch.arange(4) != owner
            assert gradient[others].isfinite().all(), (name, owner)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_without_rows_have_zero_gradients(backend: str, dtype: torch.dtype) -> None:
    arguments = group(20, 12, 30, 4, 5, dtype, ids=torch.full((20,), 3), ranks=False)
    a, b = (arguments[k].requires_grad_() for k in ("lora_a", "lora_b"))
    ops.lora_linear_grouped(**arguments).backward(randn(20, 12, seed=1, dtype=dtype))
    for t in (a.grad, b.grad):
        assert torch.equal(t.flatten(1).any(1), torch.arange(5) == 3)


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [False, True], ids=["one rank", "unequal ranks"])
def test_against_a_loop_over_single_adapters(backend: str, ranks: bool, dtype: torch.dtype) -> None:
    """lora_linear on each adapter's rows: the results, and the gradients of all that has one."""
    arguments = group(50, 24, 41, 5, 6, dtype, ranks=ranks)
    names = ("x", "weight", "bias", "lora_a", "lora_b")
    leaves = {k: arguments[k].clone().requires_grad_() for k in names}
    dy = randn(50, 24, seed=1, dtype=dtype)
    y = ops.lora_linear_grouped(**{**arguments, **leaves})
    y.backward(dy)

    loop = {k: arguments[k].clone().requires_grad_() for k in names}
    parts = torch.nn.functional.linear(loop["x"], loop["weight"], loop["bias"].to(dtype))
    for _, rows, r, a, b, scaling in members({**arguments, **loop}):
        if len(rows) and r:
            part = ops.lora_linear(loop["x"][rows], loop["weight"], loop["bias"], a, b, scaling)
            parts = parts.index_copy(0, rows, part)
    parts.backward(dy)
    assert relative_error(y.detach(), parts.detach()) <= 4 * TOLERANCES[dtype].unit + TOLERANCES[dtype].norm
    for name in names:
        a, b = leaves[name].grad, loop[name].grad
        coarser = max((TOLERANCES[t] for t in (dtype, a.dtype)), key=lambda t: t.unit)
        assert a.dtype == arguments[name].dtype
        assert relative_error(a, b) <= 8 * coarser.unit + 2 * coarser.norm, name


def test_gradcheck(backend: str) -> None:
    arguments = group(7, 5, 6, 3, 3, torch.float64, ids=torch.tensor([2, -1, 0, 0, 2, -1, 2]), ranks=False)
    names = ("x", "weight", "bias", "lora_a", "lora_b")
    leaves = tuple(arguments[k].double().requires_grad_() for k in names)

    def function(*leaves: Tensor) -> Tensor:
        return ops.lora_linear_grouped(**{**arguments, **dict(zip(names, leaves, strict=True))})

    assert gradcheck(function, leaves)


def test_nan_above_the_ranks_reaches_no_gradient(backend: str) -> None:
    arguments = group(30, 24, 41, 5, 4, torch.float32)
    assert arguments["lora_a"].isnan().any() and arguments["lora_b"].isnan().any()
    leaves = {k: arguments[k].requires_grad_() for k in ("x", "lora_a", "lora_b")}
    ops.lora_linear_grouped(**arguments).backward(randn(30, 24, seed=3))
    for name, leaf in leaves.items():
        assert leaf.grad.isfinite().all() and leaf.grad.any(), name


def test_only_asked_gradients_are_computed(backend: str) -> None:
    arguments = group(9, 5, 6, 3, 3, torch.float32, ranks=False)
    names = ("x", "weight", "bias", "lora_a", "lora_b")
    dy, grads = randn(9, 5, seed=1), {}
    for chosen in (*((name,) for name in names), names):
        leaves = {k: arguments[k].clone().requires_grad_(k in chosen) for k in names}
        ops.lora_linear_grouped(**{**arguments, **leaves}).backward(dy)
        assert {k for k, v in leaves.items() if v.grad is not None} == set(chosen)
        for name in chosen:
            grads.setdefault(name, leaves[name].grad)
            assert relative_error(leaves[name].grad, grads[name]) <= 1e-6, chosen


def test_the_scalings_have_no_gradient(backend: str) -> None:
    arguments = group(9, 5, 6, 3, 3, torch.float32)
    arguments["scalings"].requires_grad_()
    with pytest.raises(RuntimeError, match="lora_linear_grouped is not differentiable in its scalings"):
        ops.lora_linear_grouped(**arguments).sum().backward()


# ---- a packed projection --------------------------------------------------------------------------------------------


def without_base(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if k not in ("weight", "bias")}


def assert_delta(y: Tensor, before: Tensor, arguments: dict[str, Any], start: int, context: object = "") -> None:
    """Only the columns of the rows with an adapter changed, by the update."""
    ids, dtype = arguments["adapter_ids"].reshape(-1), y.dtype
    y, before, x = flat(y), flat(before), flat(arguments["x"])
    end = start + arguments["lora_b"].shape[1]
    assert same_bits(y[:, :start], before[:, :start]) and same_bits(y[:, end:], before[:, end:]), context
    assert same_bits(y[ids == -1], before[ids == -1]), context
    for adapter, rows, _, a, b, scaling in members(arguments):
        s = (product(x[rows], a.to(dtype).T) * scaling).rounded(dtype)
        e = exact(before[rows, start:end]) + product(s, b.to(dtype).T)
        e.check(y[rows, start:end], dtype, (context, adapter))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17, 40, 130])
def test_updates_of_a_packed_qkv_projection(backend: str, rows: int, dtype: torch.dtype) -> None:
    """q, k and v of unequal widths in one output: each into its own columns, the rest bit for bit as it was."""
    widths, y = (48, 17, 33), randn(rows, 98, seed=2, dtype=dtype)
    start = 0
    for i, width in enumerate(widths):
        arguments, before = group(rows, width, 70, 6, 4, dtype, seed=10 * i), y.clone()
        assert ops.lora_grouped_delta_(y, **without_base(arguments), start=start) is y
        assert_delta(y, before, arguments, start, width)
        start += width
    for start in (0, 1, 15, 31, 65):
        before = y.clone()
        ops.lora_grouped_delta_(y, **without_base(arguments), start=start)
        assert_delta(y, before, arguments, start)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_update_of_a_view_writes_the_view_and_nothing_beside_it(backend: str, dtype: torch.dtype) -> None:
    rows, columns = 20, 40
    arguments = group(rows, 33, 50, 6, 4, dtype)
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "contiguous at an odd offset": lambda t: t[131 : 131 + rows * columns].view(-1, columns),
        "rows of a wider tensor": lambda t: t[:1800].view(30, 60)[3 : 3 + rows, 7 : 7 + columns],
        "transposed": lambda t: t[1 : 1 + rows * columns].view(columns, rows).t(),
        "every second element": lambda t: t[: 2 * rows * columns].view(rows, -1)[:, 1::2],
        "three dimensions": lambda t: t[5 : 5 + rows * columns].view(4, 5, columns),
    }
    for name, view in views.items():
        buffer = randn(3000, dtype=dtype)
        before, beside = buffer.clone(), torch.ones(3000, dtype=torch.bool)
        view(beside).fill_(False)
        y = view(buffer)
        leading = y.shape[:-1]
        shaped = {
            **arguments, "x": arguments["x"].view(*leading, 50), "adapter_ids": arguments["adapter_ids"].view(leading),
        }  # fmt: skip
        assert ops.lora_grouped_delta_(y, **without_base(shaped), start=4) is y
        assert_delta(view(buffer), view(before), shaped, 4, name)
        assert same_bits(buffer[beside], before[beside]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_an_adapter_keep_negative_zeros(backend: str, dtype: torch.dtype) -> None:
    arguments = group(10, 6, 8, 2, 2, dtype, ids=torch.tensor([-1, 0] * 5))
    y = -torch.zeros(10, 6, dtype=dtype)
    ops.lora_grouped_delta_(y, **without_base(arguments))
    assert same_bits(y[::2], -torch.zeros(5, 6, dtype=dtype))


def test_the_update_is_what_the_whole_op_adds(backend: str) -> None:
    for dtype in DTYPES:
        arguments = group(30, 24, 41, 5, 4, dtype)
        y, _ = op("lora_linear_grouped")(**arguments)
        base, _ = op("lora_linear_grouped")(**{**arguments, "adapter_ids": torch.full((30,), -1)})
        ops.lora_grouped_delta_(base, **without_base(arguments))
        assert relative_error(base, y) <= 2 * TOLERANCES[dtype].unit


def test_the_update_of_values_that_are_not_finite(backend: str) -> None:
    """NaN of y stays, NaN of x reaches its own row's columns."""
    arguments = group(20, 12, 30, 4, 3, torch.float32, ranks=False, ids=torch.arange(20) % 4 - 1)
    y = randn(20, 20, seed=1)
    y[3, 5] = y[4, 0] = arguments["x"][9, 2] = arguments["x"][8, 2] = float("nan")
    expected = non_finite(y)
    expected[9, 4:16] = 2.0  # row 8 has no adapter
    ops.lora_grouped_delta_(y, **without_base(arguments), start=4)
    assert torch.equal(non_finite(y), expected)


def test_the_update_counts_as_a_change_for_autograd(backend: str) -> None:
    """A backward pass that saved y before must not use the changed one silently."""
    arguments, y = group(9, 5, 6, 3, 3, torch.float32), randn(9, 5, seed=1)
    leaf, version = randn(9, 5, seed=2).requires_grad_(), y._version
    loss = (leaf * y).sum()
    ops.lora_grouped_delta_(y, **without_base(arguments))
    assert y._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_update_refuses_gradients(backend: str) -> None:
    arguments = group(9, 5, 6, 3, 3, torch.float32)
    for name in ("y", "x", "lora_a", "lora_b"):
        t = {"y": randn(9, 5), **without_base(arguments)}
        before = t["y"].clone()
        t[name] = t[name].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=r"lora_grouped_delta_: .* no gradient; .* torch.no_grad"):
            ops.lora_grouped_delta_(**t)
        assert torch.equal(t["y"], before)
        with torch.no_grad():
            assert not torch.equal(ops.lora_grouped_delta_(**t), before)


# ---- a base in 4 bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_base_in_4_bits(backend: str, dtype: torch.dtype, nested: bool) -> None:
    """nf4_linear, then the update: two roundings."""
    for leading in ((40,), (4, 10)):
        arguments = group(40, 33, 50, 6, 4, dtype)
        weight = ops.nf4_quantize(arguments["weight"], double_quant=nested)
        shaped = {
            **arguments, "weight": weight, "x": arguments["x"].view(*leading, 50),
            "adapter_ids": arguments["adapter_ids"].view(leading),
        }  # fmt: skip
        y = ops.lora_linear_grouped(**shaped)
        base = ops.nf4_linear(shaped["x"], weight, shaped["bias"])
        assert y.shape == base.shape and y.dtype == dtype
        assert_delta(y, base, shaped, 0)


@pytest.mark.parametrize("name", ["x", "bias", "lora_a", "lora_b"])
def test_a_base_in_4_bits_refuses_gradients(backend: str, name: str) -> None:
    """It is for inference; a result that drops a gradient without a word is wrong."""
    arguments = group(9, 5, 6, 3, 3, torch.float32)
    arguments["weight"] = ops.nf4_quantize(arguments["weight"])
    arguments[name] = arguments[name].clone().requires_grad_()
    with torch.no_grad():
        assert ops.lora_linear_grouped(**arguments).shape == (9, 5)
    with pytest.raises(RuntimeError, match=r"lora_linear_grouped: .*gradient.*"):
        ops.lora_linear_grouped(**arguments)
