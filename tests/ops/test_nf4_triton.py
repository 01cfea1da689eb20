"""The Triton kernels of nf4: run by Triton's interpreter on CPU, on a GPU where there is one, and compiled for Hopper.

Whether Triton interprets is decided when it is imported, and torch.compile imports it too. So the tests that need the
other mode run once, together, in a process of their own; each reports its own result here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import formula
import pytest
import torch
import triton_modes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerances import assert_product
from torch import Tensor
from triton_modes import check_signature, compiled, on_every_device, ops_of, randn, target

import tlkernels
from tlkernels.ops import FP4_CODE, NF4Weight
from tlkernels.ops import nf4 as ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK_SIZES = [32, 64, 256, 4096]
# whole tiles; one off; rows that are no multiple of a block; rows that start inside a byte; one column
SHAPES = [(64, 128), (65, 130), (40, 96), (7, 33), (129, 67), (5, 1), (1, 77)]
CODES = {
    "nf4": None,
    "fp4": torch.tensor(FP4_CODE),
    "learned, unsorted": torch.randn(16, generator=torch.Generator().manual_seed(2)) * 0.4,
    "repeated": formula.NF4.round(),
}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN (or the largest integer), so an element that a kernel leaves unwritten fails a test."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


# ---- helpers --------------------------------------------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    return formula.same_bits(a.cpu(), b.cpu())


def quantized(
    *shape: int,
    device: torch.device,
    block_size: int = 64,
    nested: bool = False,
    code: Tensor | None = None,
    seed: int = 0,
) -> NF4Weight:
    """A weight that the reference quantized."""
    with tlkernels.backend("reference"):
        weight = ops.nf4_quantize(randn(*shape, seed=seed), block_size=block_size, code=code, double_quant=nested)
    moved = {k: v.to(device) for k, v in weight._asdict().items() if isinstance(v, Tensor)}
    return weight._replace(**moved)


def decoded(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    with tlkernels.backend("reference"):
        return ops.nf4_dequantize(weight, dtype=dtype)


def assert_both_products(
    weight: NF4Weight, x: Tensor, g: Tensor, bias: Tensor | None = None, context: str = ""
) -> None:
    dense = decoded(weight, x.dtype)
    with tlkernels.backend("triton"):
        y, back = ops.nf4_linear(x, weight, bias), ops.nf4_linear_t(g, weight)
    assert_product(y, x, dense, bias, f"linear {context}")
    assert_product(back, g, dense.t(), None, f"linear_t {context}")


def spy(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """Record the arguments of a function of the kernels' module."""
    from tlkernels.triton_kernels import nf4

    calls, function = [], getattr(nf4, name)

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(nf4, name, record)
    return calls


# ---- the format, bit for bit ----------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def ties(numel: int) -> Tensor:
    """Every midpoint exactly, and its two neighbours, in blocks whose absmax is 1."""
    middle = torch.from_numpy(formula.midpoints(formula.NF4.numpy()))
    pattern = torch.cat([middle, middle.nextafter(torch.tensor(INF)), middle.nextafter(torch.tensor(-INF))])
    w = pattern.repeat(-(-numel // len(pattern)))[:numel].clone()
    w[::32] = 1.0
    return w


def holding(*values: float) -> Callable[[int], Tensor]:
    def draw(numel: int) -> Tensor:
        w = randn(numel)
        w[::97] = torch.tensor(values).repeat(numel)[: len(w[::97])]
        return w

    return draw


WEIGHTS: dict[str, Callable[[int], Tensor]] = {
    "normal": randn,
    "ties": ties,
    "denormal": lambda numel: randn(numel) * 10.0 ** (-37.0 - torch.arange(numel) // 32 % 9),
    "huge": lambda numel: randn(numel).clamp(-3, 3) * 1e38,
    "outlier": holding(1e4),
    "zeros": torch.zeros,
    "negative zeros": lambda numel: -torch.zeros(numel),
    "nan": holding(NAN, 1.0, 2.0),
    "infinite": holding(INF, 1.0, -INF),
    "nan and infinite": holding(NAN, -INF, -0.0, INF),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_quantize_and_dequantize_are_the_format(device: str, dtype: torch.dtype, kind: str) -> None:
    for numel, block_size in ((8192 + 64, 64), (4096 + 33, 32), (5000, 4096), (1, 64), (63, 128)):
        w = WEIGHTS[kind](numel).to(dtype)
        packed, absmax = formula.nf4_quantize(w, block_size=block_size)
        with tlkernels.backend("triton"):
            weight = ops.nf4_quantize(w.to(target(device)), block_size=block_size)
            assert same_bits(weight.absmax, absmax) and same_bits(weight.packed, packed), (numel, block_size)
            for out in DTYPES:
                want = formula.nf4_dequantize(packed, absmax, (numel,), out, block_size)
                assert same_bits(ops.nf4_dequantize(weight, dtype=out), want), (numel, block_size, out)


@on_every_device
def test_a_short_block_divides_and_a_full_one_multiplies(device: str) -> None:
    middle, differ = torch.from_numpy(formula.midpoints(formula.NF4.numpy())), 0
    for largest in (0.7, 1.3, 3.7, 1e-3):
        near = middle * largest  # where the last bit of the quotient decides the code
        near = torch.cat([near.nextafter(torch.tensor(-INF)), near, near.nextafter(torch.tensor(INF))])
        short = torch.cat([torch.tensor([largest]), near])  # 46 elements of a block of 64
        full = torch.nn.functional.pad(short, (0, 18))
        for w in (short, full, torch.cat([full, short])):
            packed, absmax = formula.nf4_quantize(w)
            with tlkernels.backend("triton"):
                weight = ops.nf4_quantize(w.to(target(device)))
            assert same_bits(weight.packed, packed) and same_bits(weight.absmax, absmax), (largest, len(w))
        differ += int((packed[:23] != packed[32:]).sum())
    assert differ  # or the test could not tell


@pytest.mark.parametrize("name", CODES)
@on_every_device
def test_any_code_table(device: str, name: str) -> None:
    code, w = CODES[name], randn(37, 85)
    table = formula.NF4 if code is None else code
    packed, absmax = formula.nf4_quantize(w, 64, table)
    moved = None if code is None else torch.stack([code, code], 1).to(target(device))[:, 0]  # with stride 2
    with tlkernels.backend("triton"):
        weight = ops.nf4_quantize(w.to(target(device)), code=moved)
        assert same_bits(weight.packed, packed) and same_bits(weight.absmax, absmax)
        assert same_bits(
            ops.nf4_dequantize(weight), formula.nf4_dequantize(packed, absmax, (37, 85), w.dtype, 64, table)
        )
    assert_both_products(weight, randn(3, 85).to(target(device)), randn(3, 37).to(target(device)))


@pytest.mark.parametrize("nested_block_size", [32, 256])
@on_every_device
def test_nested_scales_decode_with_two_roundings(device: str, nested_block_size: int) -> None:
    """Every 8-bit code, with a scale and an offset whose product and sum both round."""
    blocks, place = 1024, target(device)
    q = torch.arange(256, dtype=torch.uint8).repeat(4)
    scale, offset = randn(blocks // nested_block_size).abs() + 0.1, torch.tensor(0.7103)
    steps = formula.dynamic_table()[q.long()] * scale.repeat_interleave(nested_block_size)
    absmax = steps + offset
    fused = (
        formula.dynamic_table().double()[q.long()] * scale.double().repeat_interleave(nested_block_size) + offset
    ).float()
    assert not torch.equal(absmax, fused)  # or the test could not tell
    packed = torch.randint(0, 256, (blocks * 16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    want = formula.nf4_dequantize(packed, absmax, (blocks, 32), torch.float32, 32)
    weight = NF4Weight(
        packed.to(place), q.to(place), (blocks, 32), block_size=32, absmax_scale=scale.to(place),
        absmax_offset=offset.to(place), absmax_block_size=nested_block_size,
    )  # fmt: skip
    rows = torch.arange(blocks).flip(0)
    with tlkernels.backend("triton"):
        assert same_bits(ops.nf4_dequantize(weight), want)
        assert same_bits(ops.nf4_embedding(rows.to(place), weight), want[rows])


@pytest.mark.parametrize("layout", ["column", "row", "strided", "bfloat16", "float16", "float32"])
@on_every_device
def test_packed_in_any_layout(device: str, layout: str) -> None:
    weight = quantized(32, 96, device=target(device), nested=True)
    views = {
        "column": lambda t: t[:, None],
        "row": lambda t: t[None],
        "strided": lambda t: torch.stack([t, t ^ 255], 1)[:, 0],
        "bfloat16": lambda t: t.view(torch.bfloat16),
        "float16": lambda t: t.view(torch.float16)[:, None],
        "float32": lambda t: t.view(torch.float32),
    }
    other = weight._replace(
        packed=views[layout](weight.packed),
        absmax=torch.stack([weight.absmax, weight.absmax + 1], 1)[:, 0],
        absmax_scale=weight.absmax_scale.expand(2, -1).t().contiguous()[:, 0],
        absmax_offset=weight.absmax_offset.reshape(1, 1),
    )
    with tlkernels.backend("triton"):
        assert same_bits(ops.nf4_dequantize(other), decoded(weight, torch.float32))
    x, g = randn(5, 96).to(target(device)), randn(5, 32).to(target(device))
    assert_both_products(other, x, g)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@on_every_device
def test_out_is_written_in_full_and_nothing_beside_it(device: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = quantized(*shape, device=target(device))
        around = torch.full((weight.shape[0] * weight.shape[1] + 2,), 7.0, dtype=dtype, device=target(device))
        out = around[1:-1].view(shape)  # at an odd address
        with tlkernels.backend("triton"):
            assert ops.nf4_dequantize(weight, out=out) is out
        assert same_bits(out, decoded(weight, dtype)) and float(around[0]) == float(around[-1]) == 7.0, shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_layout_of_the_weight_does_not_matter(device: str, dtype: torch.dtype) -> None:
    base = randn(40, 60).to(dtype)
    for w in (base.t(), base[:, ::2], base[1:, 3:-2], base[:1].expand(9, 60), base.view(4, 10, 60).transpose(0, 1)):
        packed, absmax = formula.nf4_quantize(w)
        with tlkernels.backend("triton"):
            weight = ops.nf4_quantize(w.to(target(device)) if device == "cuda" else w)
        assert same_bits(weight.packed, packed) and same_bits(weight.absmax, absmax), w.stride()


# ---- products and rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@on_every_device
def test_products_of_any_shape(device: str, dtype: torch.dtype, shape: tuple[int, int], block_size: int) -> None:
    place, (out_features, in_features) = target(device), shape
    for nested in (False, True):
        weight = quantized(*shape, device=place, block_size=block_size, nested=nested)
        bias = randn(out_features, seed=3).to(place)
        for rows in (1, 3, 50):
            x, g = randn(rows, in_features).to(place, dtype), randn(rows, out_features).to(place, dtype)
            assert_both_products(weight, x, g, bias, f"{rows} rows, nested {nested}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_products_of_many_terms(device: str, dtype: torch.dtype) -> None:
    """Many steps and several tiles each way; in the interpreter bfloat16 rounds the result only."""
    place = target(device)
    weight = quantized(70, 736, device=place, nested=True)
    wide, tall = quantized(736, 70, device=place), randn(33, 736)
    x, bias = tall.to(place, dtype), randn(70).to(place)
    for w, product in ((weight, ops.nf4_linear), (wide, ops.nf4_linear_t)):
        b = (bias,) if product is ops.nf4_linear else ()
        with tlkernels.backend("triton"):
            y = product(x, w, *b)
            exact = product(x.float(), w, *b)
        if device == "interpreter" and dtype == torch.bfloat16:
            assert same_bits(y, exact.to(dtype))
            continue
        dense = decoded(w, dtype)
        assert_product(y, x, dense if b else dense.t(), *b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@on_every_device
def test_a_divided_reduction(device: str, dtype: torch.dtype) -> None:
    """With few tiles for many multiprocessors the sum is cut into parts, a fixed number of steps each."""
    from tlkernels.triton_kernels import nf4

    assert nf4._splits(tiles=1, steps=15, processors=132) == 1
    assert nf4._splits(tiles=32, steps=64, processors=132) == 4
    assert nf4._splits(tiles=67, steps=64, processors=132) == 1
    assert nf4._splits(tiles=1, steps=64, processors=132) == 8
    place = target(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "_processors", lambda device: 8)
        sums = spy(patch, "_launch")
        for weight in (quantized(50, 1090, device=place), quantized(1090, 51, device=place, nested=True)):
            out_features, in_features = weight.shape
            x, g = randn(5, in_features).to(place, dtype), randn(5, out_features).to(place, dtype)
            assert_both_products(weight, x, g, randn(out_features, seed=3).to(place))
        assert sum(call[0] is nf4._sum_splits_kernel for call in sums) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@on_every_device
def test_many_rows_multiply_slabs(device: str, dtype: torch.dtype) -> None:
    """More rows than the fused kernel is for: decode, multiply, a slab at a time; never the whole weight."""
    from tlkernels.triton_kernels import nf4

    place = target(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "_FUSED_ROWS", {dtype: 4})
        patch.setattr(nf4, "_SLAB", 128 * 200)
        slabs, fused = spy(patch, "_decode_rows"), spy(patch, "_multiply_fused")
        for shape in ((200, 150), (141, 177)):
            weight = quantized(*shape, device=place, nested=True)
            for b in (None, randn(shape[0], seed=3).to(place, dtype)):
                x, g = randn(5, shape[1]).to(place, dtype), randn(5, shape[0]).to(place, dtype)
                assert_both_products(weight, x, g, b, str(shape))
        assert len(slabs) == 2 * 2 * 2 * 2 and not fused  # two each: shapes, biases, products, slabs
        assert all(min(out.shape) <= 128 for _, _, out, *_ in slabs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@on_every_device
def test_input_of_any_layout(device: str, dtype: torch.dtype) -> None:
    weight = quantized(40, 72, device=target(device))
    for features, product, dense in (
        (72, ops.nf4_linear, decoded(weight, dtype)),
        (40, ops.nf4_linear_t, decoded(weight, dtype).t()),
    ):
        base = randn(6, 4, 2 * features).to(target(device), dtype)
        for x in (
            base[..., ::2], base[..., :features], base[:, 0, -features:], base[0, 0, :features],
            base.transpose(0, 2)[:features].transpose(0, 2), base[:1, :1, :features].expand(3, 2, features),
            base[..., :1].expand(6, 4, features), base.movedim(0, 1)[..., :features], base[:0, :, :features],
        ):  # fmt: skip
            with tlkernels.backend("triton"):
                y = product(x, weight)
            assert_product(y, x, dense, context=f"{product.__name__} {tuple(x.shape)} {x.stride()}")


@pytest.mark.parametrize("bias_dtype", [*DTYPES, torch.float64], ids=str)
@on_every_device
def test_bias_of_any_dtype_and_layout(device: str, bias_dtype: torch.dtype) -> None:
    weight, x = quantized(48, 64, device=target(device)), randn(3, 64).to(target(device))
    bias = randn(48).to(target(device), bias_dtype)
    for b in (bias, bias.repeat_interleave(3)[::3], bias[:1].expand(48)):
        with tlkernels.backend("triton"):
            y = ops.nf4_linear(x, weight, b)
        assert_product(y, x, decoded(weight, torch.float32), b)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_every_device
def test_embedding_is_rows_of_the_decoded_table(device: str, shape: tuple[int, int]) -> None:
    place = target(device)
    many = torch.randint(0, shape[0], (19, 3), generator=torch.Generator().manual_seed(0)).to(place)
    for nested in (False, True):
        weight = quantized(*shape, device=place, nested=nested)
        for dtype in (*DTYPES, torch.float64):
            table = decoded(weight, dtype)
            for indices in (many, many.int(), many[::2, 1], many[0, 0], many[:0]):
                with tlkernels.backend("triton"):
                    out = ops.nf4_embedding(indices, weight, dtype=dtype)
                assert same_bits(out, table[indices.long()]), (dtype, indices.shape)


@on_every_device
def test_embedding_of_rows_that_are_not_there(device: str) -> None:
    weight = quantized(5, 40, device=target(device))
    for bad in (-1, 5, 2**62, -(2**63)):
        indices = torch.tensor([2, bad], device=target(device))
        with tlkernels.backend("triton"):
            if device == "interpreter":
                with pytest.raises(IndexError, match=f"indices has an entry {bad}; expected 0 <= index < 5"):
                    ops.nf4_embedding(indices, weight)
            else:
                out = ops.nf4_embedding(indices, weight)
                assert out[1].isnan().all() and same_bits(out[0], decoded(weight, torch.float32)[2])


@on_every_device
def test_embedding_beyond_2_to_the_31_elements(device: str) -> None:
    """Rows whose first element does not fit 32 bits, in a table of 1 GiB of zeros but for its last row."""
    dim, rows = 4096, 2**19 + 3
    last = quantized(1, dim, device=target(device), block_size=4096)
    packed = torch.empty(0, dtype=torch.uint8, device=target(device)).new_zeros(rows * dim // 2)
    packed[-dim // 2 :] = last.packed
    absmax = torch.ones(rows, device=target(device))
    absmax[-1:] = last.absmax
    weight = NF4Weight(packed, absmax, (rows, dim), block_size=4096)
    with tlkernels.backend("triton"):
        out = ops.nf4_embedding(torch.tensor([rows - 1, 0, rows - 2], device=target(device)), weight)
    assert same_bits(out[0], decoded(last, torch.float32)[0])
    assert (out[1:] == -1.0).all()


@on_every_device
def test_nothing_to_compute(device: str) -> None:
    place = target(device)
    with tlkernels.backend("triton"):
        for shape in ((0, 5), (5, 0), (0, 0)):
            weight = ops.nf4_quantize(torch.empty(shape, device=place))
            assert weight.packed.shape == weight.absmax.shape == (0,) and ops.nf4_dequantize(weight).shape == shape
            bias = randn(shape[0]).to(place)
            for leading in ((), (3,), (0,), (2, 0)):
                y = ops.nf4_linear(torch.ones(*leading, shape[1], device=place), weight, bias)
                assert torch.equal(y, bias.expand(*leading, shape[0]))
                back = ops.nf4_linear_t(torch.ones(*leading, shape[0], device=place), weight)
                assert torch.equal(back, back.new_zeros(*leading, shape[1]))
            none = torch.empty(0, dtype=torch.int64, device=place)
            assert ops.nf4_embedding(none, weight).shape == (0, shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@on_every_device
def test_nan_and_inf_reach_their_own_outputs_only(device: str, dtype: torch.dtype) -> None:
    place = target(device)
    for shape in ((70, 96), (33, 37)):
        weight = quantized(*shape, device=place, block_size=32)
        for features, product in ((shape[1], ops.nf4_linear), (shape[0], ops.nf4_linear_t)):
            x = randn(4, features).to(place, dtype)
            with tlkernels.backend("triton"):
                before = product(x, weight)
                x[1, -1], x[2, 0] = NAN, INF
                after = product(x, weight)
            assert after[1].isnan().all() and not after[2].isfinite().any()
            assert same_bits(after[[0, 3]], before[[0, 3]])
        absmax = weight.absmax.clone()
        absmax[-1] = NAN  # the last block lies in the last row
        bad, x = weight._replace(absmax=absmax), randn(2, shape[1]).to(place, dtype)
        with tlkernels.backend("triton"):
            y, clean = ops.nf4_linear(x, bad), ops.nf4_linear(x, weight)
        assert y[:, -1].isnan().all() and same_bits(y[:, :-1], clean[:, :-1]) and clean.isfinite().all()


@on_every_device
def test_float64_runs_the_reference(device: str) -> None:
    weight, x = quantized(20, 33, device=target(device)), randn(3, 33).double().to(target(device))
    w = randn(20, 33).double()
    with tlkernels.backend("triton"):
        y, dense = ops.nf4_linear(x, weight), ops.nf4_dequantize(weight, dtype=torch.float64)
        again = ops.nf4_quantize(w.to(target(device)))
    assert same_bits(dense, decoded(weight, torch.float64))
    assert_product(y, x, dense)
    assert same_bits(again.packed, formula.nf4_quantize(w)[0])


@on_every_device
def test_gradients(device: str) -> None:
    place = target(device)
    weight, g = quantized(30, 52, device=place, nested=True), randn(7, 30).to(place)
    x, bias = (t.to(place).requires_grad_() for t in (randn(7, 52), randn(30)))
    with tlkernels.backend("triton"):
        grad_x, grad_bias = torch.autograd.grad(ops.nf4_linear(x, weight, bias), (x, bias), g)
    dense = decoded(weight, torch.float32)
    assert_product(grad_x, g, dense.t())
    torch.testing.assert_close(grad_bias, g.sum(0))


@given(
    shape=st.tuples(st.integers(0, 140), st.integers(0, 140)), rows=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES[:2]), block_size=st.sampled_from(BLOCK_SIZES), nested=st.booleans(),
    code=st.sampled_from(list(CODES)), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(shape=(3, 64), rows=1, dtype=torch.float16, block_size=32, nested=True, code="fp4", seed=0)
@settings(max_examples=40)
def property_everything_agrees_with_the_formula(
    place: torch.device, shape: tuple[int, int], rows: int, dtype: torch.dtype, block_size: int, nested: bool,
    code: str, seed: int,
) -> None:  # fmt: skip
    table = CODES[code]
    w = randn(*shape, seed=seed)
    packed, absmax = formula.nf4_quantize(w, block_size, formula.NF4 if table is None else table)
    with tlkernels.backend("triton"):
        ours = ops.nf4_quantize(w.to(place), block_size=block_size, code=None if table is None else table.to(place))
    assert same_bits(ours.packed, packed) and same_bits(ours.absmax, absmax)
    weight = quantized(*shape, device=place, block_size=block_size, nested=nested, code=table, seed=seed)
    with tlkernels.backend("triton"):
        assert same_bits(ops.nf4_dequantize(weight, dtype=dtype), decoded(weight, dtype))
    x, g = randn(rows, shape[1], seed=seed + 1).to(place, dtype), randn(rows, shape[0], seed=seed + 2).to(place, dtype)
    assert_both_products(weight, x, g, randn(shape[0], seed=seed + 3).to(place))


@on_every_device
def test_everything_agrees_with_the_formula(device: str) -> None:
    property_everything_agrees_with_the_formula(target(device))


# ---- calls ----------------------------------------------------------------------------------------------------------

OUT, IN = 12, 80


def wrong_calls(weight: NF4Weight) -> Iterator[tuple[str, Callable[[], Any]]]:
    """One wrong call per check that stands in the launchers, by what the sentence must say."""
    short, place = weight._replace(absmax=weight.absmax[:-1]), weight.packed.device
    x, g, rows = randn(2, IN).to(place), randn(2, OUT).to(place), torch.tensor([1], device=place)
    away, code = torch.device("meta"), torch.tensor(FP4_CODE, device=place)
    out, w = torch.empty(OUT, IN, device=place), randn(OUT, IN).to(place)
    yield "nf4_quantize: w has dtype int64", lambda: ops.nf4_quantize(w.long())
    yield "nf4_quantize: block_size is 48", lambda: ops.nf4_quantize(w, block_size=48)
    yield r"nf4_quantize: code has shape \(15,\)", lambda: ops.nf4_quantize(w, code=code[:-1])
    for name, call in {
        "nf4_dequantize": lambda v: ops.nf4_dequantize(v),
        "nf4_dequantize:": lambda v: ops.nf4_dequantize(v, out=out),
        "nf4_linear": lambda v: ops.nf4_linear(x, v),
        "nf4_linear_t": lambda v: ops.nf4_linear_t(g, v),
        "nf4_embedding": lambda v: ops.nf4_embedding(rows, v),
    }.items():
        name = name.rstrip(":")
        yield rf"{name}: absmax has shape \(14,\)", lambda call=call: call(short)
        yield f"{name}: packed holds 479 bytes", lambda call=call: call(weight._replace(packed=weight.packed[:-1]))
        yield f"{name}: block_size is 0", lambda call=call: call(weight._replace(block_size=0))
        yield f"{name}: code is on meta", lambda call=call: call(weight._replace(code=code.to(away)))
    yield "nf4_dequantize: dtype is int32", lambda: ops.nf4_dequantize(weight, dtype=torch.int32)
    yield r"nf4_dequantize: out has shape \(80, 12\)", lambda: ops.nf4_dequantize(weight, out=out.view(IN, OUT))
    yield "nf4_dequantize: out has strides", lambda: ops.nf4_dequantize(weight, out=out.view(IN, OUT).t())
    yield "dtype is int32", lambda: ops.nf4_dequantize(weight, out=out.int())
    yield "nf4_linear: x has dtype int64", lambda: ops.nf4_linear(x.long(), weight)
    yield "nf4_linear: x has 79 features", lambda: ops.nf4_linear(x[:, 1:], weight)
    yield "nf4_linear: x has 0 features", lambda: ops.nf4_linear(x[0, 0], weight)
    yield r"nf4_linear: bias has shape \(11,\)", lambda: ops.nf4_linear(x, weight, g[0, 1:])
    yield "nf4_linear: bias has dtype int32", lambda: ops.nf4_linear(x, weight, g[0].int())
    yield "nf4_linear: bias is on meta", lambda: ops.nf4_linear(x, weight, g[0].to(away))
    yield "nf4_linear_t: grad_output has 11 features", lambda: ops.nf4_linear_t(g[:, 1:], weight)
    yield "nf4_linear_t: grad_output has dtype bool", lambda: ops.nf4_linear_t(g.bool(), weight)
    yield "nf4_linear: out_features is -1", lambda: ops.nf4_linear(x, weight._replace(shape=(-1, IN)))
    yield "nf4_embedding: indices has dtype float32", lambda: ops.nf4_embedding(x, weight)
    yield "nf4_embedding: dtype is bool", lambda: ops.nf4_embedding(rows, weight, dtype=torch.bool)
    yield "nf4_embedding: num_embeddings is -1", lambda: ops.nf4_embedding(rows, weight._replace(shape=(-1, IN)))


@on_every_device
def test_wrong_calls(device: str) -> None:
    for says, call in wrong_calls(quantized(OUT, IN, device=target(device))):
        with tlkernels.backend("triton"), pytest.raises((TypeError, ValueError), match=says):
            call()
    from tlkernels.triton_kernels import nf4

    # torch sends a call with a meta tensor elsewhere, so ask the launcher: a table in CPU memory would crash a GPU
    with pytest.raises(ValueError, match="nf4_quantize: code is on meta; expected"):
        nf4.nf4_quantize(randn(64).to(target(device)), torch.tensor(FP4_CODE, device="meta"))


@pytest.mark.parametrize("name", ops_of("nf4"))
@compiled
def test_a_kernel_takes_what_its_schema_says(name: str) -> None:
    check_signature(name)


# ---- machine code, without the machine ------------------------------------------------------------------------------

PLAIN = {"packed": "*u8", "absmax": "*fp32", "code": "*fp32"}
NESTED = {**PLAIN, "absmax": "*u8", "absmax_scale": "*fp32", "absmax_offset": "*fp32", "dynamic_code": "*fp32"}
BLOCKS = {"BLOCK_SIZE": 64, "ABSMAX_BLOCK_SIZE": 256}
SIZES = dict.fromkeys(("rows", "out_features", "in_features", "row_bytes", "x_stride"), "i32")


build = functools.partial(triton_modes.build, unaligned={"rows"})


def build_product(dtype: str, transposed: bool, nested: bool, capability: int, rows: int = 128, **options: Any) -> Any:
    from tlkernels.triton_kernels import nf4

    values = {f"*{dtype}": ("x", "bias", "out")}
    arguments = {**(NESTED if nested else PLAIN), **SIZES, **dict.fromkeys(values[f"*{dtype}"], f"*{dtype}")}
    depth = nf4._DEPTH[torch.float32 if dtype == "fp32" else torch.bfloat16]
    constants = {
        "TRANSPOSED": transposed,
        "SPLITS": 1,
        "RUN": 64,
        "BLOCK_ROWS": rows,
        "BLOCK_OUT": 64,
        "BLOCK_DEPTH": depth,
    }
    return build(nf4._product_kernel, arguments, {**constants, **BLOCKS}, capability=capability, **options)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "linear_t"])
@pytest.mark.parametrize("rows", [16, 128])
@compiled
def test_products_use_matrix_instructions(transposed: bool, nested: bool, rows: int) -> None:
    """And read packed bytes and x 16 bytes at a time, and look codes up in shared memory, not by copies one by one."""
    hopper = build_product("bf16", transposed, nested, 90, rows).asm["ptx"]
    assert f"wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.bf16.bf16" in hopper
    assert "cp.async.cg.shared.global [" in hopper
    assert hopper.count("cp.async.ca") <= 8  # scales, and nested their codes: a handful a step
    ampere = build_product("fp16", transposed, nested, 80, rows).asm["ptx"]
    assert "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in ampere


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "linear_t"])
@compiled
def test_float32_products_keep_all_their_bits(transposed: bool) -> None:
    ptx = build_product("fp32", transposed, False, 90, rows=32).asm["ptx"]
    assert "fma.rn.f32" in ptx and "mma" not in ptx and "tf32" not in ptx


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@compiled
def test_dequantize_rounds_twice_and_moves_whole_words(dtype: str) -> None:
    """The multiply and the add of nested scales are not fused, in the code that the GPU runs."""
    from tlkernels.triton_kernels import nf4

    arguments = {**NESTED, "out": f"*{dtype}", "numel": "i64", "nbytes": "i64"}
    kernel = build(nf4._dequantize_kernel, arguments, {"BLOCKS": 64, **BLOCKS})
    assert "ld.global.v4.b32" in kernel.asm["ptx"] and "st.global.v4.b32" in kernel.asm["ptx"]
    assert ".ftz" not in kernel.asm["ptx"]
    assert "FMUL" in kernel.asm["sass"] and "FADD" in kernel.asm["sass"] and "FFMA" not in kernel.asm["sass"]
    fused = build(nf4._dequantize_kernel, arguments, {"BLOCKS": 64, **BLOCKS}, enable_fp_fusion=True)
    assert "FFMA" in fused.asm["sass"]  # or the line above could not tell


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@compiled
def test_quantize_divides_exactly(dtype: str) -> None:
    from tlkernels.triton_kernels import nf4

    arguments = {
        "w": f"*{dtype}",
        "midpoints": "*fp32",
        "packed": "*u8",
        "absmax": "*fp32",
        "numel": "i64",
        "nbytes": "i64",
    }
    for order in ({}, {"order": "*i32"}):
        ptx = build(nf4._quantize_kernel, {**arguments, **order}, {"BLOCKS": 64, "BLOCK_SIZE": 64}, num_warps=8).asm[
            "ptx"
        ]
        assert "div.rn.f32" in ptx
        assert not any(word in ptx for word in ("div.full", "div.approx", "rcp.approx", ".ftz"))


@pytest.mark.parametrize(("capability", "run"), [(80, 64), (90, 1), (90, 2), (100, 64), (120, 1)])
@compiled
def test_every_kernel_compiles_for_every_target(capability: int, run: int) -> None:
    """Also with a row of odd length, whose codes start inside a byte, and with one column."""
    from tlkernels.triton_kernels import nf4

    names = ("count", "row0", "pair0", "columns", "num_rows", "in_features", "row_bytes")
    for weight in (PLAIN, NESTED):
        rows = {**weight, "out": "*bf16", **dict.fromkeys(names, "i32")}
        constants = {"ROWS": 16, "COLUMNS": 128, "RUN": run, **BLOCKS}
        build(nf4._rows_kernel, rows, constants, capability=capability)
        build(nf4._rows_kernel, {**rows, "indices": "*i64"}, constants, capability=capability)
        sizes = SIZES if run > 1 else {k: v for k, v in SIZES.items() if k != "in_features"}
        arguments = {**weight, **sizes, "x": "*bf16", "out": "*fp32"}
        tile = {"SPLITS": 4, "RUN": run, "BLOCK_ROWS": 16, "BLOCK_OUT": 64, "BLOCK_DEPTH": 64, **BLOCKS}
        for transposed in (False, True):
            constants = {"TRANSPOSED": transposed, **tile, **({} if run > 1 else {"in_features": 1})}
            build(nf4._product_kernel, arguments, constants, capability=capability)
    arguments = {"partial": "*fp32", "bias": "*bf16", "out": "*bf16", "numel": "i64", "width": "i32"}
    build(nf4._sum_splits_kernel, arguments, {"SPLITS": 4, "TILE": 1024}, capability=capability)
