"""The lora ops compute their formula: the mask bit for bit, the products to the tolerance table.

Every test runs on every backend that serves CPU tensors; those marked `isa` run again at each instruction-set level.
The formula and the random numbers stand in tests/formula.py, in float64 and NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import formula
import numpy as np
import pytest
import torch
from formula import Exact, exact, non_finite, product, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import levels_of_this_machine, run_capped
from tolerances import TOLERANCES, relative_error
from torch import Tensor

from tlkernels import ops
from tlkernels.ops import NF4Weight, _registry

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS = [0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 48, 49, 64, 97, 130, 257, 300]
FEATURES = [1, 2, 3, 7, 31, 33, 64, 65, 100, 127, 128, 257, 384, 520]
RANKS = [1, 2, 3, 5, 8, 16, 17, 33, 64, 100, 256, 300]
DROPOUT = [0.0, 0.1, 0.5]
SEEDS = (2**40 + 17, -(2**35))  # both halves of both numbers count
OPS = [
    "lora_linear", "nf4_lora_linear", "lora_grad_ab", "lora_grad_x", "nf4_lora_grad_x", "lora_dropout_mask",
    "lora_linear_grouped", "lora_grouped_grad", "lora_grouped_grad_x", "lora_grouped_delta_", "dora_weight_norm",
    "nf4_dora_weight_norm", "lora_merge_",
]  # fmt: skip


def op(name: str) -> Any:
    return getattr(torch.ops.tlkernels, name).default


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


def compiled(backend: str, name: str) -> bool:
    return backend == "cpu" and name in _registry.native_ops("cpu")


def assert_same_product(backend: str, name: str, a: Tensor, b: Tensor, context: object = "") -> None:
    """The same bits from a compiled kernel; the reference's BLAS (float64's too) may sum in another order."""
    if name == "lora_dropout_mask" or (compiled(backend, name) and a.dtype != torch.float64):
        assert same_bits(a, b), (name, context)
    else:
        assert a.dtype == b.dtype and a.shape == b.shape, (name, context)
        assert relative_error(a, b) <= max(TOLERANCES[a.dtype].norm, TOLERANCES[a.dtype].unit), (name, context)


def decoded(weight: NF4Weight) -> Tensor:
    """The float32 values, by the formula."""
    absmax = weight.absmax
    if weight.absmax_scale is not None:
        absmax = formula.absmax_dequantize(absmax, weight.absmax_scale, weight.absmax_offset, weight.absmax_block_size)
    code = formula.NF4 if weight.code is None else weight.code
    return formula.nf4_dequantize(weight.packed, absmax, weight.shape, torch.float32, weight.block_size, code)


def parts(weight: NF4Weight) -> tuple[tuple[Tensor | None, ...], tuple[int, int], dict[str, int]]:
    tensors = (weight.packed, weight.absmax, weight.code, weight.absmax_scale, weight.absmax_offset)
    blocks = {"block_size": weight.block_size, "absmax_block_size": weight.absmax_block_size}
    return tensors, weight.shape, blocks


def forward(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float = 1.0,
    p: float = 0.0, rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, s) of the op itself, which hands out s as well."""
    options = {"scaling": scaling, "dropout": p}
    if not isinstance(weight, NF4Weight):
        return op("lora_linear")(x, weight, bias, a, b, rng, **options)
    tensors, sizes, blocks = parts(weight)
    return op("nf4_lora_linear")(x, *tensors, bias, a, b, rng, *sizes, **options, **blocks)


def grad_x(
    dy: Tensor, weight: Tensor | NF4Weight, ds: Tensor, a: Tensor, p: float = 0.0, rng: Tensor | None = None
) -> Tensor:
    if not isinstance(weight, NF4Weight):
        return op("lora_grad_x")(dy, weight, ds, a, rng, dropout=p)
    tensors, sizes, blocks = parts(weight)
    return op("nf4_lora_grad_x")(dy, *tensors, ds, a, rng, *sizes, dropout=p, **blocks)


def name_of(kind: str, weight: Tensor | NF4Weight) -> str:
    return f"nf4_{kind}" if isinstance(weight, NF4Weight) else kind


# ---- the mask -------------------------------------------------------------------------------------------------------

KNOWN_ANSWERS = [  # Random123, kat_vectors: philox4x32-10, counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_the_formula_gives_the_known_answers(counter: str, key: str, result: str) -> None:
    counter_, key_, expected = (np.array([int(word, 16) for word in t.split()]) for t in (counter, key, result))
    assert np.array_equal(formula.philox(counter_, key_), expected)


@pytest.mark.isa
def test_the_mask_gives_the_known_answer(backend: str) -> None:
    """The first vector: seed, offset, row and column 0. An element with the bits h is kept at h / 65536, no further."""
    words = [int(word, 16) for word in KNOWN_ANSWERS[0][2].split()]
    bits = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    rng = torch.zeros(2, dtype=torch.int64)
    for col, h in enumerate(bits):
        for p, kept in ((h / 65536, True), ((h + 1) / 65536, False)):
            assert bool(ops.lora_dropout_mask(rng, 1, 8, p)[0, col]) is kept, (col, p)


@pytest.mark.isa
@pytest.mark.parametrize(
    "seeds",
    [(0, 0), (1, 0), (0, 1), SEEDS, (-1, -1), (2**63 - 1, -(2**63)), (-(2**63), 2**63 - 1), (2**31, 2**32), (7, 2**33)],
    ids=str,
)
def test_the_mask_is_the_formula(backend: str, seeds: tuple[int, int]) -> None:
    rng = torch.tensor(seeds)
    for rows, cols in [(1, 1), (1, 8), (3, 9), (17, 31), (33, 100), (5, 257), (300, 7), (2, 1000)]:
        for p in (0.1, 0.5, 0.987):
            mask = ops.lora_dropout_mask(rng, rows, cols, p)
            assert mask.dtype == torch.bool and mask.is_contiguous()
            assert torch.equal(mask, formula.dropout_mask(*seeds, rows, cols, p)), (rows, cols, p)


@pytest.mark.isa
@pytest.mark.parametrize("shape", [(70_001, 3), (3, 70_001), (66_000, 9)], ids=str)
def test_the_mask_beyond_16_bits_of_a_position(backend: str, shape: tuple[int, int]) -> None:
    mask = ops.lora_dropout_mask(torch.tensor(SEEDS), *shape, 0.3)
    assert torch.equal(mask, formula.dropout_mask(*SEEDS, *shape, 0.3))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_an_empty_mask(backend: str, shape: tuple[int, int]) -> None:
    mask = ops.lora_dropout_mask(torch.tensor(SEEDS), *shape, 0.3)
    assert mask.shape == shape and mask.dtype == torch.bool


@pytest.mark.isa
def test_the_mask_at_every_kind_of_probability(backend: str) -> None:
    """Multiples of 2**-16, a half rounded up; 0 keeps all, and next to 1 an element is still kept now and then."""
    unit = 2.0**-16
    bits = formula.dropout_bits(*SEEDS, np.arange(301)[:, None], np.arange(1003)[None, :])
    for p in (0.0, 0.4 * unit, 0.5 * unit, 0.6 * unit, unit, 1.5 * unit, 0.25, 0.75 - 0.5 * unit, 1 - unit, 1 - 1e-12):
        mask = ops.lora_dropout_mask(torch.tensor(SEEDS), 301, 1003, p)
        assert np.array_equal(mask.numpy(), bits >= min(65535, int(65536 * p + 0.5))), p
        if p < 0.5 * unit:
            assert mask.all()
    assert mask.any() and not mask.all()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements(backend: str, p: float) -> None:
    """Within five standard deviations of a binomial: as a whole, in each row, and in each column."""
    mask = ops.lora_dropout_mask(torch.tensor([3, 4]), 1024, 1024, p)
    resolved = round(65536 * p) / 65536
    for n, dropped in ((2**20, (~mask).sum()[None]), (1024, (~mask).sum(0)), (1024, (~mask).sum(1))):
        assert ((dropped - n * resolved).abs() <= 5 * (n * resolved * (1 - resolved)) ** 0.5).all()
    neighbours = (~mask[:, 1:] & ~mask[:, :-1]).float().mean(), (~mask[1:] & ~mask[:-1]).float().mean()
    for share in neighbours:  # independent: both dropped with probability p**2
        assert abs(float(share) - resolved**2) <= 5 * resolved / 1024


def test_every_part_of_the_seed_and_the_offset_counts(backend: str) -> None:
    """One bit changed anywhere gives another mask: half of the elements with the same fate at p = 0.5."""
    base = ops.lora_dropout_mask(torch.tensor(SEEDS), 64, 256, 0.5)
    for which in (0, 1):
        for bit in (0, 1, 31, 32, 33, 62, 63):
            seeds = list(SEEDS)
            seeds[which] ^= 1 << bit if bit < 63 else -(2**63)
            other = ops.lora_dropout_mask(torch.tensor(seeds), 64, 256, 0.5)
            assert 0.46 <= float((base == other).float().mean()) <= 0.54, (which, bit)


def test_a_smaller_mask_is_the_corner_of_a_larger_one(backend: str) -> None:
    large = ops.lora_dropout_mask(torch.tensor(SEEDS), 40, 90, 0.5)
    for rows, cols in [(1, 1), (7, 13), (40, 89), (39, 90)]:
        assert torch.equal(ops.lora_dropout_mask(torch.tensor(SEEDS), rows, cols, 0.5), large[:rows, :cols])


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("leading", [(6,), (2, 3), (1, 6), (6, 1), (3, 1, 2)], ids=str)
def test_the_ops_drop_what_the_mask_says(backend: str, leading: tuple[int, ...], dtype: torch.dtype) -> None:
    """Seen with factors that hand each element through. Rows are counted over the flattened leading dimensions."""
    n, p, rng = 37, 0.5, torch.tensor([1, *SEEDS])[1:]  # an rng that is part of another tensor
    kept = formula.dropout_mask(*SEEDS, 6, n, p).view(*leading, n) * (1 / (1 - p))
    eye, zero = torch.eye(n, dtype=dtype), torch.zeros(n, n, dtype=dtype)
    x, g = randn(*leading, n, dtype=dtype), randn(*leading, n, seed=1, dtype=dtype)
    strided = torch.tensor([SEEDS[0], 5, SEEDS[1], 5])[::2]
    for generator in (rng, strided):
        y, s = forward(x, zero, None, eye, eye, 1.0, p, generator)
        expected = (x.double() * kept).to(dtype)
        assert same_bits(s.abs(), expected.abs()) and same_bits(y.abs(), expected.abs())
        ds, grad_a, _ = op("lora_grad_ab")(g, x, s, eye, eye, generator, scaling=1.0, dropout=p)
        assert same_bits(ds.abs(), g.abs())
        rows = (x.double() * kept).reshape(6, n)
        product(ds.reshape(6, n).T, rows).check(grad_a, dtype)
        assert same_bits(grad_x(g, zero, ds, eye, p, generator).abs(), (g.double() * kept).to(dtype).abs())


# ---- the formula, at any shape --------------------------------------------------------------------------------------


def assert_formula(
    rows: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype, *, p: float = 0.0,
    bias_dtype: torch.dtype | None = None, factor_dtype: torch.dtype | None = None, scaling: float = 0.75,
    nested: bool = False, block_size: int = 64, seed: int = 0, offset: float = 0.0,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
) -> None:  # fmt: skip
    """y, s, ds, dA, dB and dx of a dense weight and one in 4 bits, each from the rounded factors the op had."""
    rng, mask = None, None
    if p:
        rng, mask = torch.tensor([seed, SEEDS[1]]), formula.dropout_mask(seed, SEEDS[1], rows, in_features, p)
    x, dy = (
        layout(randn(rows, n, seed=seed + i, dtype=dtype) + offset) for i, n in enumerate((in_features, out_features))
    )
    kind = factor_dtype or dtype
    a = layout((randn(rank, in_features, seed=seed + 2) / in_features**0.5).to(kind))
    b = layout((randn(out_features, rank, seed=seed + 3) + offset / 8).to(kind))
    bias = None if bias_dtype is None else layout((randn(out_features, seed=seed + 4) + 9 * offset).to(bias_dtype))
    w = randn(out_features, in_features, seed=seed + 5) + offset / 8
    dense, quantized = layout(w.to(dtype)), ops.nf4_quantize(w, block_size=block_size, double_quant=nested)
    for weight, values in ((dense, dense), (quantized, decoded(quantized))):
        y, s = forward(x, weight, bias, a, b, scaling, p, rng)
        assert y.dtype == s.dtype == dtype
        y_exact, s_exact = formula.lora_linear(x, values, bias, a, b, scaling, mask, p, s)
        s_exact.check(s, dtype, name_of("s", weight))
        y_exact.check(y, dtype, name_of("y", weight))
        ds, grad_a, grad_b = op("lora_grad_ab")(dy, x, s, a, b, rng, scaling=scaling, dropout=p)
        assert ds.dtype == dtype and grad_a.dtype == grad_b.dtype == kind
        expected = formula.lora_gradients(dy, x, values, a, b, scaling, mask, p, s, ds)
        dx = grad_x(dy, weight, ds, a, p, rng)
        assert dx.dtype == dtype
        for name, t, e in zip(("ds", "dA", "dB", "dx"), (ds, grad_a, grad_b, dx), expected, strict=True):
            e.check(t, dtype, name_of(name, weight))


def case(i: int) -> Any:
    """Three cases of each number of rows; all features and ranks, both as input and output, with all else in turn."""
    rows, third = ROWS[i % 18], i // 18
    p = DROPOUT[(i + third) % 3]
    values = (
        rows, FEATURES[(5 * i + third) % 14], FEATURES[(3 * i + i // 14) % 14], RANKS[(7 * i + i // 12) % 12], p,
        (None, torch.float32, torch.bfloat16, torch.float64)[i % 4], bool(i // 2 % 2), (32, 64, 256)[i % 3],
    )  # fmt: skip
    marks = [pytest.mark.isa] if i % 2 else []
    return pytest.param(*values, marks=marks, id="-".join(str(v).removeprefix("torch.") for v in values))


CASES = [case(i) for i in range(54)]


def test_the_cases_cover_every_size() -> None:
    rows, out_features, in_features, ranks, *_ = zip(*(c.values for c in CASES), strict=True)
    assert (set(rows), set(out_features), set(in_features), set(ranks)) == (
        set(ROWS), set(FEATURES), set(FEATURES), set(RANKS),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "rank", "p", "bias_dtype", "nested", "block_size"), CASES
)
def test_any_shape(
    backend: str, rows: int, out_features: int, in_features: int, rank: int, p: float, bias_dtype: torch.dtype | None,
    nested: bool, block_size: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    assert_formula(
        rows, out_features, in_features, rank, dtype, p=p, bias_dtype=bias_dtype, nested=nested, block_size=block_size
    )


@pytest.mark.parametrize("rows", [1, 16, 49, 130])
def test_float64(backend: str, rows: int) -> None:
    """Which every backend hands to the reference."""
    for shape in ((7, 33, 2), (65, 128, 8), (257, 100, 33)):
        for factor_dtype in (torch.float64, torch.float32):
            assert_formula(rows, *shape, torch.float64, p=0.1, bias_dtype=torch.float64, factor_dtype=factor_dtype)
    for layout in STRIDED.values():
        with torch.no_grad():
            assert_formula(rows, 37, 50, 5, torch.float64, p=0.1, bias_dtype=torch.float32, layout=layout, offset=5.0)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rows", range(1, 35))
def test_any_number_of_rows(backend: str, rows: int, dtype: torch.dtype) -> None:
    assert_formula(rows, 45, 70, 6, dtype, p=DROPOUT[rows % 3], bias_dtype=dtype, seed=rows)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 7, 9, 15, 16, 17, 24, 31, 32, 33, 48, 65, 128])
def test_any_rank(backend: str, rank: int, dtype: torch.dtype) -> None:
    for rows in (1, 20):
        assert_formula(rows, 40, 50, rank, dtype, p=0.1, seed=rank)


@pytest.mark.isa
@pytest.mark.parametrize("factor_dtype", DTYPES, ids=lambda d: f"factors {d}")
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_factors_of_another_dtype_count_with_the_precision_of_x(
    backend: str, dtype: torch.dtype, factor_dtype: torch.dtype
) -> None:
    for rows, rank in ((1, 3), (9, 16), (70, 5)):
        assert_formula(rows, 48, 130, rank, dtype, factor_dtype=factor_dtype, p=0.1, bias_dtype=factor_dtype)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every second element": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "offset by one element": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    "rows of a wider tensor": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand_as(t),
    "one element expanded": lambda t: t.reshape(-1)[0].expand_as(t),
    "flipped": lambda t: t.flip(0),
    "requires grad": lambda t: t.clone().requires_grad_(),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_any_layout(backend: str, layout: str, dtype: torch.dtype) -> None:
    """Of every argument at once: the formula does not know strides."""
    with torch.no_grad():
        for rows, p in ((1, 0.0), (9, 0.5), (40, 0.1)):
            assert_formula(rows, 37, 50, 5, dtype, p=p, bias_dtype=torch.float32, layout=STRIDED[layout])


def test_layout_does_not_change_a_bit(backend: str, lora_calls: Any) -> None:
    """A strided or unaligned argument gives the bits of its contiguous copy, in every op."""
    for dtype in DTYPES[:3]:
        for name, right in lora_calls(37, 50, rows=9, rank=5, dtype=dtype).items():
            for layout in ("transposed", "every second element", "offset by one element", "rows of a wider tensor"):
                strided = {
                    k: STRIDED[layout](v.clone()) if isinstance(v, Tensor) and v.dim() else v for k, v in right.items()
                }
                for a, b in zip(run(name, right), run(name, strided), strict=True):
                    assert_same_product(backend, name, a, b, (layout, dtype))


def run(name: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The results of a call, of an op that works in place what it changed: of a copy."""
    first = next(iter(arguments))
    in_place = name.endswith("_")
    if in_place:
        copy = torch.empty_strided(arguments[first].shape, arguments[first].stride(), dtype=arguments[first].dtype)
        arguments = {**arguments, first: copy.copy_(arguments[first])}
    out = op(name)(**arguments)
    return (arguments[first],) if in_place else out if isinstance(out, tuple) else (out,)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rows", [1, 6, 90])
def test_with_a_large_offset(backend: str, rows: int, dtype: torch.dtype) -> None:
    """Inputs, weights and lora_b far from zero: the sums are large, and still right to the table's relative error."""
    assert_formula(
        rows, 60, 200, 8, dtype, p=0.1, bias_dtype=torch.float32, factor_dtype=torch.float32, offset=20.0, scaling=0.1
    )


@pytest.mark.parametrize("scaling", [0.0, -1.5, 1e-3, 16.0, 1 / 3])
def test_any_scaling(backend: str, scaling: float) -> None:
    for dtype in DTYPES:
        assert_formula(10, 30, 40, 4, dtype, scaling=scaling, p=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_any_code_table_and_weight_address(backend: str, dtype: torch.dtype, nested: bool) -> None:
    """The weight's table, and parts that start at any byte or lie with strides."""
    code = formula.NF4[torch.randperm(16, generator=seeded(1))]
    plain = ops.nf4_quantize(randn(37, 77), code=code, double_quant=nested)
    shifted = plain._replace(
        packed=torch.cat([plain.packed.new_zeros(1), plain.packed])[1:],
        absmax=plain.absmax.repeat_interleave(2)[::2],
        code=torch.cat([torch.zeros(1), code])[1:],
    )
    x, dy, a, b = (randn(*s, dtype=dtype) for s in ((6, 77), (6, 37), (4, 77), (37, 4)))
    for weight in (plain, shifted):
        y, s = forward(x, weight, None, a, b)
        formula.lora_linear(x, decoded(plain), None, a, b, 1.0, s=s)[0].check(y, dtype)
        dx = grad_x(dy, weight, s, a)
        formula.lora_gradients(dy, x, decoded(plain), a, b, 1.0, s=s, ds=s)[3].check(dx, dtype)
        norm = op("nf4_dora_weight_norm")(*parts(weight)[0], a, b, 37, 77, scaling=1.0)
        assert_norm(norm, decoded(plain), a, b, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(), (24,), (2, 12), (2, 3, 4), (24, 1), (4, 1, 6)], ids=str)
def test_leading_shape_does_not_matter(backend: str, leading: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, p, rng = 24 if leading else 1, 0.5, torch.tensor(SEEDS)
    x, dy, a, b = (
        randn(*s, dtype=dtype, seed=i) for i, s in enumerate(((rows, 72), (rows, 40), (5, 72), (40, 5)))
    )  # fmt: skip
    weight = ops.nf4_quantize(randn(40, 72))
    for w in (randn(40, 72, dtype=dtype), weight):
        flat = [*forward(x, w, None, a, b, 0.5, p, rng)]
        flat += op("lora_grad_ab")(dy, x, flat[1], a, b, rng, scaling=0.5, dropout=p)
        flat.append(grad_x(dy, w, flat[2], a, p, rng))
        shaped = [*forward(x.view(*leading, 72), w, None, a, b, 0.5, p, rng)]
        assert shaped[0].shape == (*leading, 40) and shaped[1].shape == (*leading, 5)
        gradient = dy.view(*leading, 40)
        shaped += op("lora_grad_ab")(
            gradient, x.view(*leading, 72), shaped[1], a, b, rng, scaling=0.5, dropout=p
        )  # fmt: skip
        shaped.append(grad_x(gradient, w, shaped[2], a, p, rng))
        assert shaped[2].shape == (*leading, 5) and shaped[5].shape == (*leading, 72)
        names = ["lora_linear"] * 2 + ["lora_grad_ab"] * 3 + ["lora_grad_x"]
        for name, one, other in zip(names, flat, shaped, strict=True):
            assert_same_product(backend, name, other.reshape(one.shape), one, leading)


@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 2)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_no_rows(backend: str, p: float, leading: tuple[int, ...]) -> None:
    """Empty results, and gradients of the factors that are zeros."""
    a, b, rng = randn(3, 8), randn(6, 3), torch.tensor(SEEDS)
    x, dy = torch.empty(*leading, 8), torch.empty(*leading, 6)
    for weight in (randn(6, 8), ops.nf4_quantize(randn(6, 8))):
        y, s = forward(x, weight, randn(6), a, b, 1.0, p, rng)
        assert y.shape == (*leading, 6) and s.shape == (*leading, 3)
        ds, grad_a, grad_b = op("lora_grad_ab")(dy, x, s, a, b, rng, scaling=1.0, dropout=p)
        assert ds.shape == s.shape and same_bits(grad_a, torch.zeros(3, 8)) and same_bits(grad_b, torch.zeros(6, 3))
        assert grad_x(dy, weight, ds, a, p, rng).shape == x.shape


@pytest.mark.parametrize(
    ("out_features", "in_features", "p"),
    [(0, 8, 0.0), (6, 0, 0.0), (6, 0, 0.5), (0, 0, 0.0)],
)
def test_no_features(backend: str, out_features: int, in_features: int, p: float) -> None:
    """A sum of no terms is zero, and the output the bias."""
    a, b, bias, rng = randn(3, in_features), randn(out_features, 3), randn(out_features), torch.tensor(SEEDS)
    x, dy = randn(4, in_features), torch.full((4, out_features), 2.0)
    w = randn(out_features, in_features)
    for weight in (w, ops.nf4_quantize(w)):
        y, s = forward(x, weight, bias, a, b, 1.0, p, rng)
        if not in_features:
            assert same_bits(y, bias.expand(4, out_features).contiguous()) and same_bits(s, torch.zeros(4, 3))
        ds, grad_a, grad_b = op("lora_grad_ab")(dy, x, s, a, b, rng, scaling=1.0, dropout=p)
        assert grad_a.shape == a.shape and grad_b.shape == b.shape and not grad_a.any()
        dx = grad_x(dy, weight, ds, a, p, rng)
        assert dx.shape == x.shape and not dx.any()
    assert op("dora_weight_norm")(w, a, b, scaling=1.0).shape == (out_features,)


# ---- how far from float64 -------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("factor_dtype", [None, torch.float32], ids=["factors like x", "float32 factors"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_error_is_that_of_torch_in_float32(
    backend: str, dtype: torch.dtype, p: float, factor_dtype: torch.dtype | None
) -> None:
    """||error|| of y, dx, dA, dB at 300 x 520 x 384, rank 16: at most 1.2 times that of torch in float32."""
    rows, in_features, out_features, rank, scaling = 300, 520, 384, 16, 2.0
    kind = factor_dtype or dtype
    x, dy, w, bias = (
        randn(*s, seed=i, dtype=dtype)
        for i, s in enumerate(((rows, in_features), (rows, out_features), (out_features, in_features), (out_features,)))
    )
    a, b = (randn(rank, in_features, seed=4) / in_features**0.5).to(kind), randn(out_features, rank, seed=5).to(kind)
    rng, mask = torch.tensor(SEEDS), formula.dropout_mask(*SEEDS, rows, in_features, p)

    keep = mask.float() * (1 / (1 - p))
    x32, dy32, w32, a32, b32 = (t.to(dtype).float() for t in (x, dy, w, a, b))
    s32 = (scaling * ((x32 * keep) @ a32.T)).to(dtype).float()
    ds32 = (scaling * (dy32 @ b32)).to(dtype).float()
    torchs = {
        "y": (torch.nn.functional.linear(x32, w32, bias.float()) + s32 @ b32.T).to(dtype),
        "dA": (ds32.T @ (x32 * keep)).to(kind),
        "dB": (dy32.T @ s32).to(kind),
        "dx": (dy32 @ w32 + keep * (ds32 @ a32)).to(dtype),
    }
    y, s = forward(x, w, bias, a, b, scaling, p, rng)
    ds, grad_a, grad_b = op("lora_grad_ab")(dy, x, s, a, b, rng, scaling=scaling, dropout=p)
    ours = {"y": y, "dA": grad_a, "dB": grad_b, "dx": grad_x(dy, w, ds, a, p, rng)}
    y_exact, _ = formula.lora_linear(x, w, bias, a, b, scaling, mask, p)
    _, *gradients = formula.lora_gradients(dy, x, w, a, b, scaling, mask, p)
    for name, e in zip(torchs, (y_exact, *gradients), strict=True):
        error, allowed = relative_error(ours[name], e.value), 1.2 * relative_error(torchs[name], e.value)
        assert error <= allowed, f"{name}: {error:.3g} above {allowed:.3g}"
        excess = (ours[name].double() - e.value).abs() - e.bound(ours[name].dtype, dtype)
        assert (excess <= 0).all(), f"{name}: element off by {excess.max():.3g} above its bound"


# ---- what must be the same to the bit -------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 16, 49, 130])
def test_with_lora_b_zero_the_result_is_that_of_the_base_product(backend: str, rows: int, dtype: torch.dtype) -> None:
    """Bit for bit, whatever rank, factor, scaling, or dropout stands before the zeros."""
    shape = (100, 257)
    x, bias, w, rng = randn(rows, 257, dtype=dtype), randn(100), randn(*shape), torch.tensor(SEEDS)
    for weight in (w.to(dtype), ops.nf4_quantize(w)):
        base, s = forward(x, weight, bias, torch.zeros(1, 257), torch.zeros(100, 1))
        assert same_bits(s, torch.zeros(rows, 1, dtype=dtype))
        values = decoded(weight) if isinstance(weight, NF4Weight) else weight
        (product(x, values.to(dtype).T) + exact(bias)).check(base, dtype)
        for rank in (1, 2, 16, 33, 64):
            y, s = forward(x, weight, bias, randn(rank, 257, seed=rank), torch.zeros(100, rank), 3.0, 0.5, rng)
            assert s.any() and same_bits(y, base), rank
        if isinstance(weight, NF4Weight) and compiled(backend, "nf4_lora_linear"):
            assert_same_product(backend, "nf4_linear", base, ops.nf4_linear(x, weight, bias))
        dx = grad_x(randn(rows, 100, dtype=dtype), weight, torch.zeros(rows, 1, dtype=dtype), randn(1, 257))
        for rank in (2, 33):
            zeros = torch.zeros(rows, rank, dtype=dtype)
            assert same_bits(
                dx, grad_x(randn(rows, 100, dtype=dtype), weight, zeros, randn(rank, 257, seed=rank), 0.5, rng)
            )


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_row_has_the_same_bits_wherever_it_stands(backend: str, dtype: torch.dtype) -> None:
    """All rows equal: all results equal, in full and in partial tiles; and a second call gives the first one's bits."""
    w, a, b, bias = (randn(*s, dtype=dtype) for s in ((65, 131), (9, 131), (65, 9), (65,)))
    for rows in (2, 5, 16, 17, 48, 97, 130):
        x, dy = randn(131, dtype=dtype).expand(rows, -1), randn(65, dtype=dtype).expand(rows, -1)
        for weight in (w, ops.nf4_quantize(w)):
            calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {
                name_of("lora_linear", weight): lambda x=x, weight=weight: forward(x, weight, bias, a, b),
                name_of("lora_grad_x", weight): lambda x=x, dy=dy, weight=weight: (
                    grad_x(dy, weight, x[:, :9].contiguous(), a),
                ),
                "lora_grad_ab": lambda x=x, dy=dy: op("lora_grad_ab")(
                    dy, x, x[:, :9].contiguous(), a, b, None, scaling=1.0
                ),
            }
            for name, call in calls.items():
                for t, again in zip(call(), call(), strict=True):
                    assert same_bits(t, again), (name, rows)
                    if t.shape[0] == rows and rows != 9 and rows != 65:  # not the gradients of the factors
                        assert_same_product(backend, name, t, t[:1].expand_as(t).contiguous(), rows)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", [(384, 520), (101, 2051)], ids=str)
def test_same_bits_for_any_number_of_threads(
    backend: str, threads: Callable[[int], None], lora_calls: Any, shape: tuple[int, int], dtype: torch.dtype,
    nested: bool,
) -> None:  # fmt: skip
    for rows in (1, 6, 150):
        for name, arguments in lora_calls(*shape, rows=rows, rank=16, dtype=dtype, nested=nested).items():
            if (nested and "nf4" not in name) or (rows != 6 and not compiled(backend, name)):
                continue  # the reference's threads are those of torch's own products
            results = []
            for count in (1, 2, 3):
                threads(count)
                results.append(run(name, arguments))
            for result in results[1:]:
                for a, b in zip(results[0], result, strict=True):
                    assert_same_product(backend, name, a, b, rows)


def test_arguments_are_left_alone(backend: str, lora_calls: Any) -> None:
    for name, arguments in lora_calls(33, 65, nested=True).items():
        first = next(iter(arguments))
        before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
        if name.endswith("_"):
            del before[first]
        op(name)(**arguments)
        assert all(same_bits(arguments[k], v) for k, v in before.items()), name


# ---- NaN, infinities, overflow --------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("rows", [1, 4, 20, 100])
def test_nan_and_inf_of_x_reach_their_row_only(backend: str, rows: int, p: float, dtype: torch.dtype) -> None:
    """And the adapter only where they are kept: a dropped NaN is zero."""
    out_features, in_features, rank = 19, 70, 5
    w, a, b = randn(out_features, in_features), randn(rank, in_features, dtype=dtype), randn(out_features, rank)
    rng, mask = torch.tensor(SEEDS), formula.dropout_mask(*SEEDS, rows, in_features, p)
    clean = randn(rows, in_features, dtype=dtype)
    for weight in (w.to(dtype), ops.nf4_quantize(w)):
        values = decoded(weight) if isinstance(weight, NF4Weight) else weight
        y_clean, s_clean = forward(clean, weight, None, a, b, 0.5, p, rng)
        for value in (float("nan"), float("inf"), float("-inf")):
            for row, column in ((0, 0), (rows - 1, in_features - 1), (rows // 2, 31), (rows // 2, 32)):
                x, others = clean.clone(), torch.arange(rows) != row
                x[row, column] = value
                y, s = forward(x, weight, None, a, b, 0.5, p, rng)
                y_exact, s_exact = formula.lora_linear(x, values, None, a, b, 0.5, mask, p)
                where = (value, row, column, bool(mask[row, column]))
                assert torch.equal(non_finite(s), non_finite(s_exact.value)), where
                assert torch.equal(non_finite(y), non_finite(y_exact.value)), where
                for t, expected in ((y, y_clean), (s, s_clean)):
                    assert_same_product(
                        backend, name_of("lora_linear", weight), t[others], expected[others], where
                    )  # fmt: skip


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rows", [1, 20, 100])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_of_any_other_argument(backend: str, value: float, rows: int, dtype: torch.dtype) -> None:
    """One in lora_a, lora_b, the bias, the weight, the gradient, s or ds reaches what float64 says it reaches."""
    out_features, in_features, rank, p, rng = 19, 70, 5, 0.5, torch.tensor(SEEDS)
    mask = formula.dropout_mask(*SEEDS, rows, in_features, p)
    clean = {
        name: randn(*shape, seed=i, dtype=dtype)
        for i, (name, shape) in enumerate({
            "x": (rows, in_features), "dy": (rows, out_features), "w": (out_features, in_features),
            "bias": (out_features,), "a": (rank, in_features), "b": (out_features, rank), "s": (rows, rank),
            "ds": (rows, rank),
        }.items())
    }  # fmt: skip
    for name in clean:
        for place in (0, -1):
            t = {k: v.clone() for k, v in clean.items()}
            t[name].view(-1)[place] = value
            results: dict[str, Tensor] = {}
            results["y"], results["s"] = forward(t["x"], t["w"], t["bias"], t["a"], t["b"], 0.5, p, rng)
            results["ds"], results["da"], results["db"] = op("lora_grad_ab")(
                t["dy"], t["x"], t["s"], t["a"], t["b"], rng, scaling=0.5, dropout=p
            )
            results["dx"] = grad_x(t["dy"], t["w"], t["ds"], t["a"], p, rng)
            y_exact, s_exact = formula.lora_linear(
                t["x"], t["w"], t["bias"], t["a"], t["b"], 0.5, mask, p, results["s"]
            )  # fmt: skip
            up, grad_a, grad_b, _ = formula.lora_gradients(
                t["dy"], t["x"], t["w"], t["a"], t["b"], 0.5, mask, p, t["s"], results["ds"]
            )
            dx = formula.lora_gradients(
                t["dy"], t["x"], t["w"], t["a"], t["b"], 0.5, mask, p, t["s"], t["ds"]
            )[3]  # fmt: skip
            expected = {"y": y_exact, "s": s_exact, "ds": up, "da": grad_a, "db": grad_b, "dx": dx}
            for result, e in expected.items():
                assert torch.equal(non_finite(results[result]), non_finite(e.value)), (name, place, result)


@pytest.mark.isa
def test_s_and_the_result_overflow_to_infinity_as_the_dtype_does(backend: str) -> None:
    """s is rounded to float16 before lora_b sees it: 81920 is infinite there, however small lora_b is."""
    x, w = torch.full((3, 64), 4.0, dtype=torch.float16), torch.zeros(8, 64, dtype=torch.float16)
    a, b = torch.full((2, 64), 320.0, dtype=torch.float16), torch.full((8, 2), 2.0**-10, dtype=torch.float16)
    y, s = forward(x, w, None, a, b)
    assert s.isinf().all() and y.isinf().all()
    y, s = forward(x, w, None, a, b, 0.5)
    assert torch.equal(s, torch.full_like(s, 40960.0)) and torch.equal(y, torch.full_like(y, 80.0))
    y, s = forward(x, w, None, a, torch.ones_like(b), 0.5)
    assert s.isfinite().all() and y.isinf().all()
    y, s = forward(x.bfloat16(), w.bfloat16(), None, a, b)
    assert torch.equal(s, torch.full_like(s, 81920.0)) and torch.equal(y, torch.full_like(y, 160.0))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_s_and_ds_are_rounded_before_they_count(backend: str, dtype: torch.dtype) -> None:
    """1 + unit does not survive in x's dtype: a kernel that keeps s or ds wider gives something else."""
    tiny = TOLERANCES[dtype].unit  # half a unit in the last place of 1: to even, that is to 1
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 2, dtype=dtype)
    x = torch.tensor([[1.0, tiny]], dtype=torch.float64).to(dtype)
    a, big = torch.ones(1, 2, dtype=dtype), torch.full((1, 2), 2.0, dtype=dtype)
    y, s = forward(x, torch.cat([-one, 0 * one], 1), None, a, one)  # -1 + s: what is left is the tail of s
    assert torch.equal(s, one) and torch.equal(y, 0 * one)
    ds, grad_a, _ = op("lora_grad_ab")(x, big, one, a, torch.ones(2, 1, dtype=dtype), None, scaling=1.0)
    assert torch.equal(ds, one) and torch.equal(grad_a, big)
    assert torch.equal(grad_x(x, torch.zeros(2, 2, dtype=dtype), ds, a), a) and not zero.any()


# ---- the norm of DoRA -----------------------------------------------------------------------------------------------


def assert_norm(out: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float, context: object = "") -> None:
    """|n - e| = |n^2 - e^2| / (n + e): the squares are sums with the usual error, which cancel where n is small."""
    dtype = torch.promote_types(w.dtype, torch.float32)
    assert out.dtype == dtype and out.shape == w.shape[:1], context
    norm, magnitude = formula.lora_weight_norm(w, a, b, scaling)
    terms = (8 + 4 * w.shape[1] ** 0.5) + 2 * (8 + 4 * a.shape[0] ** 0.5)
    square = 1.01 * terms * TOLERANCES[dtype].accumulator * magnitude
    bound = torch.minimum(square / norm.clamp(min=1e-300), square.sqrt()) + 2 * TOLERANCES[dtype].unit * norm
    excess = (out.double() - norm).abs() - bound
    assert out.isfinite().all() and (excess <= 0).all(), f"{context}: off by {excess.max():.3g} above its bound"


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("out_features", "in_features", "rank"),
    [(1, 1, 1), (3, 7, 2), (31, 33, 5), (64, 100, 8), (65, 257, 17), (128, 520, 64), (384, 127, 33), (7, 31, 300)],
)
def test_dora_weight_norm(backend: str, out_features: int, in_features: int, rank: int, dtype: torch.dtype) -> None:
    """The factors count with their own precision here, rounded to float32 at most."""
    w = randn(out_features, in_features)
    for factor_dtype, scaling in ((torch.float32, 0.5), (torch.bfloat16, -2.0), (torch.float64, 0.25)):
        a = randn(rank, in_features, seed=1).to(factor_dtype)
        b = randn(out_features, rank, seed=2).to(factor_dtype)
        assert_norm(ops.dora_weight_norm(w.to(dtype), a, b, scaling), w.to(dtype), a, b, scaling)
        for nested in (False, True):
            weight = ops.nf4_quantize(w.to(dtype), double_quant=nested)
            assert_norm(ops.dora_weight_norm(weight, a, b, scaling), decoded(weight), a, b, scaling, "nf4")
    assert_norm(ops.dora_weight_norm(w.to(dtype), a, b, 0.0), w.to(dtype), a, b, 0.0)
    for layout in ("transposed", "every second element", "offset by one element"):
        t = [STRIDED[layout](t) for t in (w.to(dtype), a, b)]
        assert_norm(ops.dora_weight_norm(*t, 0.5), *t, 0.5, layout)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_dora_weight_norm_where_the_update_cancels_the_weight(backend: str, dtype: torch.dtype) -> None:
    """W = -BA in whole and in some rows: never NaN of a small negative square, and zero to the sums' error."""
    a, b = randn(4, 50, dtype=dtype), randn(20, 4, dtype=dtype)
    w = (-(b.double() @ a.double())).to(dtype)
    w[::3] = randn(7, 50, seed=3, dtype=dtype)
    assert_norm(ops.dora_weight_norm(w, a, b, 1.0), w, a, b, 1.0)
    zero = ops.dora_weight_norm(torch.zeros(6, 9, dtype=dtype), torch.zeros(2, 9), torch.zeros(6, 2), 1.0)
    assert not zero.any()


def test_dora_weight_norm_of_non_finite_values(backend: str) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        w, a, b = randn(20, 30), randn(3, 30), randn(20, 3)
        w[4, 7] = value
        norm = ops.dora_weight_norm(w, a, b, 0.5)
        assert torch.equal(~norm.isfinite(), torch.arange(20) == 4)
        w, b[11, 2] = randn(20, 30), value
        norm = ops.dora_weight_norm(w, a, b, 0.5)
        assert torch.equal(~norm.isfinite(), torch.arange(20) == 11)


# ---- merging --------------------------------------------------------------------------------------------------------


def merged(w: Tensor, a: Tensor, b: Tensor, scaling: float) -> Exact:
    return product(b, a) * scaling + exact(w)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("out_features", "in_features", "rank"),
    [(1, 1, 1), (3, 7, 2), (31, 33, 5), (64, 100, 8), (65, 257, 17), (128, 520, 64), (384, 127, 33), (7, 31, 300),
     (0, 5, 2), (5, 0, 2)],
)  # fmt: skip
def test_merge_in_place(backend: str, out_features: int, in_features: int, rank: int, dtype: torch.dtype) -> None:
    """One rounding of the sum, with the factors' own precision; a second merge with -scaling takes it back."""
    before = randn(out_features, in_features, dtype=dtype)
    for factor_dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        a = randn(rank, in_features, seed=1).to(factor_dtype) / rank**0.5
        b = randn(out_features, rank, seed=2).to(factor_dtype)
        w = before.clone()
        assert ops.lora_merge_(w, a, b, 0.5) is w
        merged(before, a, b, 0.5).check(w, dtype, factor_dtype)
        once = w.clone()
        merged(once, a, b, -0.5).check(ops.lora_merge_(w, a, b, -0.5), dtype, "back")
        assert same_bits(ops.lora_merge_(once.clone(), a, b, 0.0), once)
        assert same_bits(ops.lora_merge_(once.clone(), a, torch.zeros_like(b), 2.0), once)


def test_merge_keeps_the_precision_of_float32_factors(backend: str) -> None:
    """In bfloat16 factors 1 + 2**-10 would be 1: nothing would be left of the sum."""
    w = torch.full((4, 64), -1.0, dtype=torch.bfloat16)
    ops.lora_merge_(w, torch.full((1, 64), 1 + 2.0**-10), torch.ones(4, 1), 1.0)
    assert torch.equal(w, torch.full_like(w, 2.0**-10))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_merge_into_a_view_writes_the_view_and_nothing_beside_it(backend: str, dtype: torch.dtype) -> None:
    out_features, in_features = 33, 50
    a, b = randn(4, in_features), randn(out_features, 4)
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "contiguous at an odd offset": lambda t: t[131 : 131 + out_features * in_features].view(-1, in_features),
        "rows of a wider tensor": lambda t: t[: 40 * 60].view(40, 60)[3 : 3 + out_features, 7 : 7 + in_features],
        "transposed": lambda t: t[1 : 1 + out_features * in_features].view(in_features, out_features).t(),
        "every second element": lambda t: t[: 2 * out_features * in_features].view(out_features, -1)[:, 1::2],
    }
    for name, view in views.items():
        buffer = randn(5000, dtype=dtype)
        before, beside = buffer.clone(), torch.ones(5000, dtype=torch.bool)
        view(beside).fill_(False)
        w = view(buffer)
        assert ops.lora_merge_(w, a, b, 0.5) is w
        merged(view(before), a, b, 0.5).check(view(buffer), dtype, name)
        assert same_bits(buffer[beside], before[beside]), name


def test_merge_counts_as_a_change_for_autograd(backend: str) -> None:
    """A backward pass that saved the weight before must not use the merged one silently."""
    w, a, b, x = randn(6, 8).requires_grad_(), randn(2, 8), randn(6, 2), randn(3, 8).requires_grad_()
    y, version = (x @ w.T).sum(), w._version
    assert ops.lora_merge_(w, a, b, 1.0) is w and w.requires_grad and w.is_leaf
    assert w._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merge_of_non_finite_values(backend: str, value: float) -> None:
    w, a, b = randn(20, 30), randn(3, 30), randn(20, 3)
    w[4, 7] = a[1, 5] = value
    expected = merged(w, a, b, 0.5).value
    assert torch.equal(non_finite(ops.lora_merge_(w, a, b, 0.5)), non_finite(expected))


@pytest.mark.isa
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (31, 257), (7, 33)], ids=str)
def test_merge_of_a_4_bit_weight(backend: str, shape: tuple[int, int], dtype: torch.dtype, nested: bool) -> None:
    """The float32 values, the update added, quantized by the format; and how much that lost."""
    for block_size, code in ((64, None), (128, formula.NF4.flip(0))):
        weight = ops.nf4_quantize(randn(*shape, dtype=dtype), block_size=block_size, double_quant=nested, code=code)
        copies = [None if t is None else t.clone() for t in parts(weight)[0]]
        a, b = randn(4, shape[1], seed=1) * 0.1, randn(shape[0], 4, seed=2)
        result, error = ops.lora_merge(weight, a, b, 0.5)
        for t, copy in zip(parts(weight)[0], copies, strict=True):
            assert t is copy is None or same_bits(t, copy)
        assert result.shape == shape and result.dtype == dtype and result.block_size == block_size
        assert result.absmax.dtype == weight.absmax.dtype and (result.code is None) == (code is None)
        e = merged(decoded(weight), a, b, 0.5)
        dense = ops.lora_merge_(decoded(weight), a, b, 0.5)
        e.check(dense, torch.float32)
        packed, absmax = formula.nf4_quantize(dense, block_size, formula.NF4 if code is None else code)
        assert same_bits(result.packed, packed)
        if nested:
            assert same_bits(result.absmax, formula.absmax_quantize(absmax)[0])
        else:
            assert same_bits(result.absmax, absmax)
        lost = relative_error(decoded(result), e.value)
        assert 0.05 < lost < 0.2 and abs(error - lost) <= 1e-5 * lost


def test_merge_of_nothing_loses_only_what_a_second_quantization_loses(backend: str) -> None:
    weight = ops.nf4_quantize(randn(32, 64))
    result, error = ops.lora_merge(weight, randn(2, 64), torch.zeros(32, 2), 1.0)
    assert error == 0.0 and same_bits(result.packed, weight.packed) and same_bits(result.absmax, weight.absmax)
    zero = ops.nf4_quantize(torch.zeros(4, 64))
    assert ops.lora_merge(zero, randn(2, 64), torch.zeros(4, 2), 1.0)[1] == 0.0


# ---- properties -----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    rows=st.integers(1, 80), out_features=st.integers(1, 150), in_features=st.integers(1, 150),
    rank=st.integers(1, 40), dtype=st.sampled_from(DTYPES), factor_dtype=st.sampled_from([None, *DTYPES]),
    bias_dtype=st.sampled_from([None, *DTYPES]), p=st.floats(0.0, 0.95), seed=st.integers(-(2**31), 2**31),
    scaling=st.sampled_from([0.0, 1.0, -2.0, 0.1, 1 / 3, 4.0]), block_size=st.sampled_from([32, 64, 4096]),
    nested=st.booleans(), layout=st.sampled_from(["transposed", "flipped", "rows of a wider tensor", "expanded"]),
)  # fmt: skip
def test_property_the_formula(
    backend: str, rows: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype, p: float,
    factor_dtype: torch.dtype | None, bias_dtype: torch.dtype | None, seed: int, scaling: float, block_size: int,
    nested: bool, layout: str,
) -> None:  # fmt: skip
    assert_formula(
        rows, out_features, in_features, rank, dtype, p=p, factor_dtype=factor_dtype, bias_dtype=bias_dtype,
        seed=seed, scaling=scaling, block_size=block_size, nested=nested, layout=STRIDED[layout],
    )  # fmt: skip


@settings(max_examples=40)
@given(
    rows=st.integers(1, 200), cols=st.integers(1, 300), p=st.floats(0.0, 1.0, exclude_max=True),
    seed=st.integers(-(2**63), 2**63 - 1), offset=st.integers(-(2**63), 2**63 - 1),
)  # fmt: skip
def test_property_the_mask(backend: str, rows: int, cols: int, p: float, seed: int, offset: int) -> None:
    mask = ops.lora_dropout_mask(torch.tensor([seed, offset]), rows, cols, p)
    assert torch.equal(mask, formula.dropout_mask(seed, offset, rows, cols, p))


@settings(max_examples=25)
@given(
    rows=st.integers(1, 60), out_features=st.integers(1, 90), in_features=st.integers(1, 90), rank=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES), p=st.sampled_from(DROPOUT), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_property_forward_and_backward_are_adjoint(
    backend: str, rows: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype, p: float, seed: int
) -> None:
    """<dy, y> = <dx, x> without bias: y is linear in x, so the backward drops what the forward dropped."""
    x, dy = randn(rows, in_features, seed=seed, dtype=dtype), randn(rows, out_features, seed=seed + 1, dtype=dtype)
    w, a, b = (
        randn(*shape, seed=seed + i, dtype=dtype)
        for i, shape in enumerate(((out_features, in_features), (rank, in_features), (out_features, rank)), 2)
    )
    rng = torch.tensor([seed, seed])
    y, _ = forward(x, w, None, a, b, 0.5, p, rng)
    ds, _, _ = op("lora_grad_ab")(dy, x, y.new_zeros(rows, rank), a, b, rng, scaling=0.5, dropout=p)
    dx = grad_x(dy, w, ds, a, p, rng)
    left, right = (dy.double() * y.double()).sum(), (dx.double() * x.double()).sum()
    update = x.double().abs() @ a.double().abs().T @ b.double().abs().T / (1 - p)
    magnitude = (dy.double().abs() * (x.double().abs() @ w.double().abs().T + update)).sum()
    assert abs(left - right) <= (4 * TOLERANCES[dtype].unit + 1e3 * TOLERANCES[dtype].accumulator) * magnitude


# ---- instruction sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", levels_of_this_machine()[:-1])
def test_every_lower_instruction_set_level(level: str, tmp_path: Path) -> None:
    run_capped(level, tmp_path, [Path(__file__), Path(__file__).with_name("test_lora_grouped.py")])
