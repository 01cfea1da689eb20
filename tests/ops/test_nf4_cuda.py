"""The CUDA kernels of the nf4 family: their arithmetic on the host (any machine with nvcc), and the ops on a GPU.

The host part compiles the functions that the kernels are made of (nf4_cuda_host.cu) and holds them against the format
in NumPy, bit for bit, and against the layout of the tensor cores' operands. The GPU part runs every op. With
TLKERNELS_REQUIRE=cuda a missing compiler or GPU fails instead of skipping.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import formula
import numpy as np
import pytest
import torch
from tolerances import TOLERANCES, relative_error
from torch import Tensor

import tlkernels
from tlkernels.ops import FP4_CODE, NF4Weight, _registry
from tlkernels.ops import nf4 as ops

REQUIRED = "cuda" in os.environ.get("TLKERNELS_REQUIRE", "").split(",")
ROOT = Path(__file__).resolve().parents[2]
SIXTEEN_BIT = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *SIXTEEN_BIT]
CODES = {
    "nf4": formula.NF4,
    "fp4": torch.tensor(FP4_CODE),
    "shuffled": formula.NF4[torch.randperm(16, generator=torch.Generator().manual_seed(1))],
    "repeated": formula.NF4.round(),
    "positive": torch.linspace(0.25, 3.0, 16),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adversarial(numel: int) -> Tensor:
    """Midpoints and their neighbours, denormals, one huge value, zeros of both signs, NaN and both infinities."""
    midpoint = torch.from_numpy(formula.midpoints(formula.NF4.numpy()))
    infinity = torch.tensor(math.inf)
    ties = torch.cat([midpoint, midpoint.nextafter(infinity), midpoint.nextafter(-infinity), torch.ones(1)])
    w = torch.cat([
        ties.repeat(12)[:512], randn(256) * 1e-39, torch.zeros(128), -torch.zeros(128), randn(64) * 1e30,
        randn(512, seed=1), torch.full((64,), math.inf), randn(777, seed=2),
    ])  # fmt: skip
    w[1200] = 3e38
    w[1300] = math.nan
    w[1400], w[1401] = math.inf, -math.inf
    return w.repeat(-(-numel // len(w)))[:numel].clone()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit, except that all NaN count as one."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(bits), b[~nan].view(bits))


# ---- on the host ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels' functions, compiled for the host."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        if REQUIRED:
            pytest.fail("TLKERNELS_REQUIRE asks for cuda, but nvcc is not on the PATH")
        pytest.skip("nvcc is not on the PATH")
    library = tmp_path_factory.mktemp("nf4_cuda") / "host.so"
    source = Path(__file__).with_name("nf4_cuda_host.cu")
    host_flags = "-Xcompiler=-fPIC,-Wall,-Wextra,-ffp-contract=off"
    command = [nvcc, "-std=c++20", "-O1", "-shared", "-Werror", "all-warnings", host_flags, "-arch=sm_90"]
    command += ["-cudart", "static", f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return ctypes.CDLL(str(library))


def pointer(t: Tensor | np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr() if isinstance(t, Tensor) else t.ctypes.data)


def size(n: int) -> ctypes.c_int64:
    return ctypes.c_int64(n)


def host_quantize(host: ctypes.CDLL, w: Tensor, block_size: int, code: Tensor) -> tuple[Tensor, Tensor]:
    packed = torch.full(((len(w) + 1) // 2,), 0x5A, dtype=torch.uint8)
    absmax = torch.full((-(-len(w) // block_size),), math.nan)
    host.host_nf4_quantize(pointer(w), size(len(w)), size(block_size), pointer(code), pointer(packed), pointer(absmax))
    return packed, absmax


def test_host_tables(host: ctypes.CDLL) -> None:
    nf4, dynamic = torch.empty(16), torch.empty(256)
    host.host_tables(pointer(nf4), pointer(dynamic))
    assert same_bits(nf4, formula.NF4)
    assert same_bits(dynamic, formula.dynamic_table())


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    ("numel", "block_size"), [(4096, 64), (4095, 64), (4001, 32), (9000, 4096), (1, 64), (33, 256)]
)
def test_host_quantize_is_the_format(host: ctypes.CDLL, numel: int, block_size: int, code: str) -> None:
    for w in (randn(numel), adversarial(numel)):
        packed, absmax = host_quantize(host, w, block_size, CODES[code])
        want = formula.nf4_quantize(w, block_size, CODES[code])
        assert same_bits(absmax, want[1])
        assert torch.equal(packed, want[0])


def test_host_encode_every_float16(host: ctypes.CDLL) -> None:
    """Every float16 value, each in a block whose absmax is 1."""
    values = torch.arange(2**16).to(torch.uint16).view(torch.float16).float()
    values = values[values.abs() <= 1]
    w = torch.ones(len(values), 32)
    w[:, 0] = values
    assert torch.equal(host_quantize(host, w.view(-1), 32, formula.NF4)[0], formula.nf4_quantize(w, 32)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
def test_host_dequantize_is_the_format(host: ctypes.CDLL, code: str, dtype: torch.dtype) -> None:
    w = adversarial(5001)
    packed, absmax = formula.nf4_quantize(w, 64, CODES[code])
    out = torch.empty(len(w), dtype=dtype)
    host.host_nf4_dequantize(
        pointer(packed), pointer(absmax), size(len(w)), size(64), pointer(CODES[code]),
        ctypes.c_int(DTYPES.index(dtype)), pointer(out),
    )  # fmt: skip
    assert same_bits(out, formula.nf4_dequantize(packed, absmax, (len(w),), dtype, 64, CODES[code]))


@pytest.mark.parametrize(("n", "block_size"), [(4096, 256), (1000, 256), (77, 32), (1, 256)])
def test_host_double_quantization_is_the_format(host: ctypes.CDLL, n: int, block_size: int) -> None:
    absmax = randn(n).abs() * 0.05
    want_q, want_scale, offset = formula.absmax_quantize(absmax, block_size)
    q, scale, back = torch.zeros(n, dtype=torch.uint8), torch.empty(len(want_scale)), torch.empty(n)
    o = ctypes.c_float(float(offset))
    host.host_absmax_quantize(pointer(absmax), size(n), size(block_size), o, pointer(q), pointer(scale))
    assert torch.equal(q, want_q) and same_bits(scale, want_scale)
    host.host_absmax_dequantize(pointer(q), pointer(scale), o, size(n), size(block_size), pointer(back))
    assert same_bits(back, formula.absmax_dequantize(q, scale, offset, block_size))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_host_fragments_multiply(host: ctypes.CDLL, dtype: torch.dtype) -> None:
    """The lanes' fragments, put together by the layout of mma.m16n8k16, are a matrix product.

    The 16-bit table is computed here too, so that only the layout and the sums are in question.
    """
    out_features, in_features, rows = 16, 192, 8
    packed = torch.randint(0, 256, (out_features * in_features // 2,), dtype=torch.uint8, generator=torch.Generator())
    code = randn(16)
    x = randn(rows, in_features, seed=3).to(dtype)
    factor = {torch.bfloat16: 1.4367, torch.float16: 1.3662}[dtype]
    table = (code * factor).to(dtype).double() / factor
    w = table[torch.stack([packed >> 4, packed & 15], 1).view(out_features, in_features).long()]
    for k in range(0, in_features, 64):
        y = torch.full((out_features, rows), math.nan)
        host.host_multiply_group(
            pointer(packed), size(in_features), size(k), pointer(code), pointer(x), ctypes.c_int(DTYPES.index(dtype)),
            pointer(y),
        )  # fmt: skip
        want = w[:, k : k + 64] @ x[:, k : k + 64].double().T
        assert relative_error(y, want) < 1e-6


MULTIPROCESSORS_AND_SHARED = [(132, 232448), (108, 166912), (148, 232448), (170, 101376), (1, 101376)]


@pytest.mark.parametrize(("multiprocessors", "shared"), MULTIPROCESSORS_AND_SHARED)
@pytest.mark.parametrize(
    "shape", [(14336, 4096), (4096, 14336), (16, 64), (1, 1024), (1024, 1024), (11008, 4160), (1000, 53248)]
)
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16])
def test_host_cut_covers_every_batch_once(
    host: ctypes.CDLL, rows: int, shape: tuple[int, int], multiprocessors: int, shared: int
) -> None:
    out_features, in_features = shape
    cut = np.zeros(7, np.int64)
    host.host_linear_cut(
        size(rows), size(out_features), size(in_features), ctypes.c_int(multiprocessors), size(shared), pointer(cut)
    )
    tensor_cores, shift, ctas, splits, split_k, shared_bytes, workspace = (int(v) for v in cut)
    assert tensor_cores == 1 and 0 <= shift <= 4 and ctas >= 1
    assert shared_bytes <= shared
    assert split_k % 256 == 0 and (splits - 1) * split_k < in_features <= splits * split_k
    assert ctas * splits <= max(multiprocessors, splits)
    assert workspace == (splits * rows * out_features if splits > 1 else 0)
    # the loops of linear_mma_kernel
    strips, strips_at_once, k_step = -(-out_features // 16), 16 >> shift, 256 << shift
    seen = np.zeros((strips, -(-in_features // 256)), int)
    for split in range(splits):
        length = min(in_features - split * split_k, split_k)
        rounds = -(-length // k_step)
        for cta in range(ctas):
            for warp in range(16):
                for first in range(cta * strips_at_once, strips, ctas * strips_at_once):
                    strip = first + (warp >> shift)
                    for k in range((warp & ((1 << shift) - 1)) * 256, rounds * k_step, k_step):
                        if strip < strips and k < length:
                            seen[strip, (split * split_k + k) // 256] += 1
    assert (seen == 1).all()


def test_host_cut_is_even(host: ctypes.CDLL) -> None:
    """Model-sized weights on an H200: the busiest warp gets little more than its share of the batches."""
    for out_features, in_features, at_most in [
        (14336, 4096, 1.05),
        (4096, 14336, 1.2),
        (11008, 4096, 1.2),
        (4096, 4096, 1.05),
    ]:
        for rows in (1, 8):
            cut = np.zeros(7, np.int64)
            host.host_linear_cut(
                size(rows), size(out_features), size(in_features), ctypes.c_int(132), size(232448), pointer(cut)
            )
            _, shift, ctas, _, split_k, _, _ = (int(v) for v in cut)
            strip_sets = -(-out_features // (16 * (16 >> shift)))
            busiest = -(-strip_sets // ctas) * -(-split_k // (256 << shift))
            share = out_features / 16 * in_features / 256 / (132 * 16)
            assert busiest <= math.ceil(share * at_most), (out_features, in_features, rows, busiest, share)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> Any:
    """The device, with the ops on this backend. (Used by every test below.)"""
    if not torch.cuda.is_available() or _registry.LIBRARIES["cuda"] != "loaded":
        reason = f"no GPU, or no compiled CUDA library: {_registry.LIBRARIES['cuda']}"
        if REQUIRED:
            pytest.fail(f"TLKERNELS_REQUIRE asks for cuda: {reason}")
        pytest.skip(reason)
    with tlkernels.backend("cuda"):
        yield torch.device("cuda")


def to(weight: NF4Weight, device: torch.device) -> NF4Weight:
    return NF4Weight(*(v.to(device) if isinstance(v, Tensor) else v for v in weight))


def quantized(
    *shape: int, nested: bool = False, block_size: int = 64, code: Tensor | None = None, w: Tensor | None = None
) -> NF4Weight:
    """A weight on the CPU, by the formula."""
    w = randn(*shape) if w is None else w
    packed, absmax = formula.nf4_quantize(w, block_size, formula.NF4 if code is None else code)
    weight = NF4Weight(packed, absmax, shape, torch.float32, block_size, code)
    if not nested:
        return weight
    q, scale, offset = formula.absmax_quantize(absmax)
    return weight._replace(absmax=q, absmax_scale=scale, absmax_offset=offset)


def dense(weight: NF4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    absmax = weight.absmax
    if weight.absmax_scale is not None:
        absmax = formula.absmax_dequantize(absmax, weight.absmax_scale, weight.absmax_offset, weight.absmax_block_size)
    code = formula.NF4 if weight.code is None else weight.code
    return formula.nf4_dequantize(weight.packed, absmax, weight.shape, dtype, weight.block_size, code)


# Beyond rounding the result once: tensor-core products round the table of 16 codes to x's dtype (0.78e-3 and 0.80e-4).
TABLE_ROUNDING = {torch.bfloat16: 1.0e-3, torch.float16: 1.1e-4}


def assert_linear(y: Tensor, x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> None:
    """y against float64 of the same dequantized weights; everything on the CPU."""
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], weight.shape[0])
    w = dense(weight).double()
    bias = torch.zeros(1).double() if bias is None else bias.double()
    ref = x.double() @ w.T + bias
    magnitude = x.double().abs() @ w.abs().T + bias.abs()
    tensor_cores = x.dtype in TABLE_ROUNDING and weight.shape[1] % 64 == 0 and weight.block_size >= 64
    unit = TOLERANCES[x.dtype].unit
    # 2**-9 and 2**-12 are the largest errors of an entry of the table; float32 sums of K terms add K * 2**-24
    entry = unit if tensor_cores else 0.0
    bound = unit * (ref.abs() + torch.finfo(y.dtype).tiny) + (entry + (8 + x.shape[-1]) * 2.0**-24) * magnitude
    assert y.isfinite().all() and ((y.double() - ref).abs() <= bound).all()
    if y.numel() >= 1024:
        beyond = TABLE_ROUNDING[x.dtype] if tensor_cores else 1e-6
        assert relative_error(y, ref) <= math.hypot(1.02 * relative_error(ref.to(y.dtype), ref), beyond)


SHAPES = [(64, 128), (63, 128), (65, 129), (64, 96), (7, 33), (1, 1), (1, 77), (2, 4096), (300, 1000), (5, 100003)]


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_is_the_format(cuda: torch.device, dtype: torch.dtype, block_size: int) -> None:
    for shape in SHAPES:
        for w in (randn(*shape), adversarial(math.prod(shape)).view(shape)):
            w = w.to(dtype)
            weight = ops.nf4_quantize(w.to(cuda), block_size=block_size)
            packed, absmax = formula.nf4_quantize(w, block_size)
            assert same_bits(weight.absmax.cpu(), absmax), shape
            assert torch.equal(weight.packed.cpu(), packed), shape


@pytest.mark.parametrize("code", CODES)
def test_quantize_with_any_code(cuda: torch.device, code: str) -> None:
    w = adversarial(10001)
    weight = ops.nf4_quantize(w.to(cuda), code=CODES[code].to(cuda))
    assert torch.equal(weight.packed.cpu(), formula.nf4_quantize(w, 64, CODES[code])[0])


def test_quantize_views(cuda: torch.device) -> None:
    """Strided, and contiguous but not aligned to 16 bytes; float64 as float32; empty."""
    w = randn(65, 130).to(cuda)
    for view in (w.T, w[:, ::2], w.view(-1)[1:], w.view(-1)[3:].to(torch.bfloat16), w.double()):
        weight = ops.nf4_quantize(view)
        packed, absmax = formula.nf4_quantize(view.cpu())
        assert torch.equal(weight.packed.cpu(), packed) and same_bits(weight.absmax.cpu(), absmax)
    assert ops.nf4_quantize(w[:0]).packed.numel() == 0


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dequantize_is_the_format(cuda: torch.device, dtype: torch.dtype, nested: bool) -> None:
    for shape in SHAPES:
        for block_size in (32, 64, 4096):
            weight = quantized(*shape, nested=nested, block_size=block_size)
            want = dense(weight, dtype)
            assert same_bits(ops.nf4_dequantize(to(weight, cuda), dtype=dtype).cpu(), want), (shape, block_size)
            out = torch.empty(shape, dtype=dtype, device=cuda)
            assert ops.nf4_dequantize(to(weight, cuda), out=out) is out and same_bits(out.cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_not_aligned(cuda: torch.device, dtype: torch.dtype) -> None:
    weight = quantized(50, 64, code=CODES["shuffled"])
    there = to(weight, cuda)
    there = there._replace(packed=torch.cat([there.packed[:1], there.packed])[1:])
    assert same_bits(ops.nf4_dequantize(there, dtype=dtype).cpu(), dense(weight, dtype))
    memory = torch.empty(50 * 64 + 1, dtype=dtype, device=cuda)
    ops.nf4_dequantize(to(weight, cuda), out=memory[1:].view(50, 64))
    assert same_bits(memory[1:].view(50, 64).cpu(), dense(weight, dtype))


def test_dequantize_nan_and_inf(cuda: torch.device) -> None:
    w = adversarial(6001)
    assert same_bits(ops.nf4_dequantize(ops.nf4_quantize(w.to(cuda))).cpu(), dense(quantized(6001, w=w)))


@pytest.mark.parametrize(("n", "block_size"), [(100000, 256), (4096, 4096), (1000, 32), (1, 256)])
def test_double_quantization_is_the_format(cuda: torch.device, n: int, block_size: int) -> None:
    absmax = randn(n).abs() * 0.05
    for offset in (None, torch.tensor(0.031)):
        want = formula.absmax_quantize(absmax, block_size, offset)
        got = ops.absmax_quantize(
            absmax.to(cuda), block_size=block_size, offset=None if offset is None else offset.to(cuda)
        )
        for g, w in zip(got, want, strict=True):
            assert same_bits(g.cpu(), w.reshape(g.shape))
        back = ops.absmax_dequantize(*got, block_size=block_size)
        assert same_bits(back.cpu(), formula.absmax_dequantize(*want, block_size))
    absmax[n // 2] = math.nan
    assert ops.absmax_quantize(absmax.to(cuda))[2].isnan()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(100, 64), (100, 96), (77, 33), (5, 4096), (3, 1), (1000, 20)])
def test_embedding_is_the_format(cuda: torch.device, shape: tuple[int, int], dtype: torch.dtype, nested: bool) -> None:
    weight = quantized(*shape, nested=nested)
    indices = torch.randint(0, shape[0], (4, 37), generator=torch.Generator().manual_seed(0))
    for index_dtype in (torch.int64, torch.int32):
        out = ops.nf4_embedding(indices.to(cuda, index_dtype), to(weight, cuda), dtype=dtype)
        assert same_bits(out.cpu(), dense(weight)[indices].to(dtype))


@pytest.mark.parametrize("dim", [64, 33])
def test_embedding_out_of_range_is_nan(cuda: torch.device, dim: int) -> None:
    weight = quantized(10, dim)
    indices = torch.tensor([0, 10, -1, 9, 2**40, -(2**62), 5])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        out = ops.nf4_embedding(indices.to(cuda), to(weight, cuda), dtype=dtype).cpu()
        inside = (indices >= 0) & (indices < 10)
        assert out[~inside].isnan().all()
        assert same_bits(out[inside], dense(weight)[indices[inside]].to(dtype))


@pytest.mark.parametrize("rows", range(1, 18))
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rows(cuda: torch.device, dtype: torch.dtype, rows: int) -> None:
    """Tensor cores (16 bits) and FMA (float32); more than 16 rows are another kernel's."""
    for nested in (False, True):
        weight = quantized(176, 1088, nested=nested)
        x, bias = randn(rows, 1088, seed=1).to(dtype), randn(176, seed=2)
        y = ops.nf4_linear(x.to(cuda), to(weight, cuda), bias.to(cuda))
        if rows <= 16:
            assert_linear(y.cpu(), x, weight, bias)
        assert relative_error(y.cpu(), x.double() @ dense(weight).double().T + bias.double()) < 3e-3


LINEAR_SHAPES = [  # strips with a rest, one batch or a part of it, many; rows at a nibble; k cut between thread blocks
    (16, 64), (1, 64), (17, 320), (1000, 256), (4096, 4096), (2, 16384), (3000, 448), (64, 96), (63, 129), (7, 33),
    (1, 1), (5, 10001), (256, 40),
]  # fmt: skip


@pytest.mark.parametrize("shape", LINEAR_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_linear_shapes(cuda: torch.device, rows: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    for block_size, nested in ((32, False), (64, True), (128, False), (4096, True)):
        weight = quantized(*shape, nested=nested, block_size=block_size)
        x = randn(rows, shape[1], seed=1).to(dtype)
        assert_linear(ops.nf4_linear(x.to(cuda), to(weight, cuda)).cpu(), x, weight)


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_linear_when_x_does_not_fit_in_shared_memory(cuda: torch.device, rows: int) -> None:
    weight = quantized(48, 131072)
    x = randn(rows, 131072, seed=1).to(torch.bfloat16)
    bias = randn(48, seed=2).to(torch.bfloat16)
    assert_linear(ops.nf4_linear(x.to(cuda), to(weight, cuda), bias.to(cuda)).cpu(), x, weight, bias)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("magnitude", [1.0, 1e6, 1e-6])
def test_linear_with_any_code(cuda: torch.device, code: str, magnitude: float) -> None:
    """Codes beyond float16's range too: the table is scaled."""
    weight = quantized(64, 512, code=CODES[code] * magnitude)._replace(absmax=torch.full((512,), 1.0 / magnitude))
    x = randn(4, 512, seed=1)
    for dtype in DTYPES:
        y = ops.nf4_linear(x.to(cuda, dtype), to(weight, cuda)).cpu()
        ref = x.to(dtype).double() @ dense(weight).double().T
        assert relative_error(y, ref) <= {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


def test_linear_leading_shapes_and_views(cuda: torch.device) -> None:
    weight = quantized(48, 128)
    there = to(weight, cuda)
    for dtype in DTYPES:
        x = randn(2, 3, 128, seed=1).to(dtype)
        assert_linear(ops.nf4_linear(x.to(cuda), there).cpu(), x, weight)
        assert_linear(ops.nf4_linear(x.to(cuda)[0, 0], there).cpu(), x[0, 0], weight)
        assert_linear(ops.nf4_linear(x.to(cuda).transpose(0, 1), there).cpu(), x.transpose(0, 1), weight)
        not_aligned = torch.cat([x.view(-1)[:1], x.view(-1)]).to(cuda)[1:].view(2, 3, 128)
        assert_linear(ops.nf4_linear(not_aligned, there).cpu(), x, weight)
        packed = torch.cat([there.packed[:1], there.packed])[1:]
        assert_linear(ops.nf4_linear(x.to(cuda), there._replace(packed=packed)).cpu(), x, weight)
    assert ops.nf4_linear(torch.empty(0, 128, device=cuda), there).shape == (0, 48)
    empty = to(quantized(4, 0), cuda)
    assert torch.equal(
        ops.nf4_linear(torch.empty(2, 0, device=cuda), empty, torch.ones(4, device=cuda)).cpu(), torch.ones(2, 4)
    )


@pytest.mark.parametrize("bias_dtype", [*DTYPES, torch.float64])
def test_linear_bias_dtypes(cuda: torch.device, bias_dtype: torch.dtype) -> None:
    weight = quantized(48, 128)
    x, bias = randn(3, 128, seed=1).to(torch.bfloat16), randn(48, seed=2).to(bias_dtype)
    assert_linear(ops.nf4_linear(x.to(cuda), to(weight, cuda), bias.to(cuda)).cpu(), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [512, 515])
def test_linear_nan_and_inf(cuda: torch.device, in_features: int, dtype: torch.dtype) -> None:
    """The pattern of NaN and infinities is that of the dense product."""
    w = randn(40, in_features)
    w[3, 70] = math.nan
    w[5, 200] = math.inf
    w.view(-1)[7 * 512 : 7 * 512 + 64] = math.inf  # a whole block: it stays infinite, its other elements are none
    weight = quantized(40, in_features, w=w)
    x = randn(6, in_features, seed=1).abs() + 0.1
    x[1, 9] = math.nan
    x[2, 11] = math.inf
    x[4, 300] = 0.0
    x = x.to(dtype)
    ref = x.double() @ dense(weight).double().T
    y = ops.nf4_linear(x.to(cuda), to(weight, cuda)).cpu()
    assert torch.equal(y.isnan(), ref.isnan())
    assert torch.equal(y.isposinf(), ref.isposinf()) and torch.equal(y.isneginf(), ref.isneginf())


def test_same_bits_every_time(cuda: torch.device) -> None:
    weight = quantized(4096, 4096, nested=True)
    there = to(weight, cuda)
    absmax = randn(300000).abs().to(cuda)
    offset = ops.absmax_quantize(absmax)[2]
    for dtype in DTYPES:
        for rows in (1, 7, 16):
            x = randn(rows, 4096, seed=1).to(cuda, dtype)
            first = ops.nf4_linear(x, there)
            assert all(same_bits(ops.nf4_linear(x, there), first) for _ in range(10))
    assert all(same_bits(ops.absmax_quantize(absmax)[2], offset) for _ in range(10))


def test_rows_do_not_depend_on_each_other(cuda: torch.device) -> None:
    """A row's result is the same bits beside any other rows of the same call shape."""
    there = to(quantized(256, 1024), cuda)
    x = randn(8, 1024, seed=1).to(cuda, torch.bfloat16)
    other = x.clone()
    other[1:] = math.nan
    assert same_bits(ops.nf4_linear(x, there)[0], ops.nf4_linear(other, there)[0])


def test_streams_and_graphs(cuda: torch.device) -> None:
    """The kernels run on torch's current stream, and nothing in them waits for the host."""
    weight = quantized(512, 1024, nested=True)
    there, x = to(weight, cuda), randn(4, 1024, seed=1).to(cuda, torch.bfloat16)
    want = ops.nf4_linear(x, there), ops.nf4_dequantize(there)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert same_bits(ops.nf4_linear(x, there), want[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, w = ops.nf4_linear(x, there), ops.nf4_dequantize(there)
    y.zero_(), w.zero_()
    graph.replay()
    assert same_bits(y, want[0]) and same_bits(w, want[1])


def test_float64_runs_the_reference(cuda: torch.device) -> None:
    weight = quantized(48, 128)
    x = randn(3, 128, seed=1).double()
    y = ops.nf4_linear(x.to(cuda), to(weight, cuda)).cpu()
    assert relative_error(y, x @ dense(weight).double().T) < 1e-14


def test_more_than_2_to_31_elements(cuda: torch.device) -> None:
    """Index arithmetic is 64-bit: the last rows of a weight of 2.2 G elements."""
    if torch.cuda.get_device_properties(cuda).total_memory < 24 << 30:
        pytest.skip("needs 24 GB of device memory")
    rows, dim = 540_000, 4096
    block = randn(1000, dim)
    small = quantized(1000, dim, w=block)
    packed = small.packed.to(cuda).repeat(rows // 1000)
    weight = small._replace(packed=packed, absmax=small.absmax.to(cuda).repeat(rows // 1000), shape=(rows, dim))
    want = dense(small)
    last = torch.arange(rows - 1000, rows, device=cuda)
    assert same_bits(ops.nf4_embedding(last, weight).cpu(), want)
    assert same_bits(ops.nf4_dequantize(weight, dtype=torch.bfloat16)[-1000:].cpu(), want.to(torch.bfloat16))
    for dtype in DTYPES:
        x = randn(2, dim, seed=1).to(dtype)
        assert_linear(ops.nf4_linear(x.to(cuda), weight)[:, -1000:].cpu(), x, small)
