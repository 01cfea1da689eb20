"""The Triton kernels of lora: run by Triton's interpreter on CPU, on a GPU where there is one, and compiled for Hopper.

Whether Triton interprets is decided when it is imported, and torch.compile imports it too. So the tests that need the
other mode run once, together, in a process of their own; each reports its own result here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import formula
import pytest
import torch
import triton_modes
from formula import Exact, exact, product
from tolerances import TOLERANCES
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
from tlkernels.ops import NF4Weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ops_of("lora")
# (rows, out, in): whole tiles; one off; rows that start inside a byte; one of each
SHAPES = [(64, 128, 64), (33, 67, 130), (5, 40, 33), (70, 1, 9), (1, 7, 1)]
SEEDS = (2**40 + 17, -(2**35))  # both halves of both numbers count


# ---- helpers --------------------------------------------------------------------------------------------------------


def quantized(*shape: int, nested: bool = False, block_size: int = 64, seed: int = 0) -> NF4Weight:
    with tlkernels.backend("reference"):
        return ops.nf4_quantize(randn(*shape, seed=seed), block_size=block_size, double_quant=nested)


def decoded(weight: NF4Weight) -> Tensor:
    with tlkernels.backend("reference"):
        return ops.nf4_dequantize(weight, dtype=torch.float32)


def parts(weight: NF4Weight) -> tuple[tuple[Tensor | None, ...], tuple[int, ...], dict[str, int]]:
    tensors = (weight.packed, weight.absmax, weight.code, weight.absmax_scale, weight.absmax_offset)
    blocks = {"block_size": weight.block_size, "absmax_block_size": weight.absmax_block_size}
    return tensors, weight.shape, blocks


def noise(dropout: float) -> Tensor | None:
    return torch.tensor(SEEDS) if dropout else None


def mask_of(x: Tensor, dropout: float) -> Tensor | None:
    return formula.dropout_mask(*SEEDS, *x.shape, dropout) if dropout else None


def check_adapter(
    device: str, x: Tensor, dy: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, a: Tensor, b: Tensor,
    dropout: float = 0.0, scaling: float = 0.75, context: object = "",
) -> None:  # fmt: skip
    """y, s, ds, dA, dB and dx of rows x against the formula."""
    dtype, mask, rng = x.dtype, mask_of(x, dropout), noise(dropout)
    if isinstance(weight, NF4Weight):
        tensors, sizes, blocks = parts(weight)
        w = decoded(weight)
        y, s = call(
            device, "nf4_lora_linear", x, *tensors, bias, a, b, rng, *sizes, scaling=scaling, dropout=dropout, **blocks
        )
    else:
        w = weight
        y, s = call(device, "lora_linear", x, weight, bias, a, b, rng, scaling=scaling, dropout=dropout)
    assert y.dtype == s.dtype == dtype
    want_y, want_s = formula.lora_linear(x, w, bias, a, b, scaling, mask, dropout, s=s)
    want_s.check(s, dtype, ("s", context))
    want_y.check(y, dtype, ("y", context))
    ds, grad_a, grad_b = call(device, "lora_grad_ab", dy, x, s, a, b, rng, scaling=scaling, dropout=dropout)
    if isinstance(weight, NF4Weight):
        grad_x = call(device, "nf4_lora_grad_x", dy, *tensors, ds, a, rng, *sizes, dropout=dropout, **blocks)
    else:
        grad_x = call(device, "lora_grad_x", dy, weight, ds, a, rng, dropout=dropout)
    assert (ds.dtype, grad_a.dtype, grad_b.dtype, grad_x.dtype) == (dtype, a.dtype, b.dtype, dtype)
    wanted = formula.lora_gradients(dy, x, w, a, b, scaling, mask, dropout, s=s, ds=ds)
    for name, want, got in zip(("ds", "dA", "dB", "dx"), wanted, (ds, grad_a, grad_b, grad_x), strict=True):
        want.check(got, dtype, (name, context))


def adapter(rank: int, out_features: int, in_features: int, dtype: torch.dtype, *adapters: int) -> tuple[Tensor, ...]:
    a = randn(*adapters, rank, in_features, seed=4, dtype=dtype) / in_features**0.5
    return a.to(dtype), randn(*adapters, out_features, rank, seed=5, dtype=dtype)


# ---- the mask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [(0, 0), SEEDS, (-1, -1), (2**63 - 1, -(2**63)), (7, 2**33)], ids=str)
@on_every_device
def test_the_mask_is_the_formula_s(device: str, seeds: tuple[int, int]) -> None:
    rng = torch.tensor(seeds)
    for rows, cols, p in ((1, 1, 0.5), (17, 8, 0.3), (33, 515, 0.1), (3, 1030, 0.7), (5, 40, 0.999999), (5, 40, 0.0)):
        got = call(device, "lora_dropout_mask", rng, rows, cols, p)
        assert got.dtype == torch.bool and torch.equal(got, formula.dropout_mask(*seeds, rows, cols, p)), (cols, p)
    strided = torch.stack([rng, rng + 1], 1)[:, 0]
    assert torch.equal(
        call(device, "lora_dropout_mask", strided, 5, 9, 0.4), formula.dropout_mask(*seeds, 5, 9, 0.4)
    )  # fmt: skip


@on_every_device
def test_the_mask_gives_the_known_answer(device: str) -> None:
    """Random123's first vector: seed, offset, row and column 0. An element with bits h is kept at h / 65536 at most."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    rng = torch.zeros(2, dtype=torch.int64)
    for col, bits in enumerate(half for word in words for half in (word & 0xFFFF, word >> 16)):
        for p, kept in ((bits / 65536, True), ((bits + 1) / 65536, False)):
            assert bool(call(device, "lora_dropout_mask", rng, 1, 8, p)[0, col]) is kept, (col, p)


# ---- one adapter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_one_adapter(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, out_features, in_features = shape
    x, dy = randn(rows, in_features, dtype=dtype), randn(rows, out_features, seed=1, dtype=dtype)
    w, bias = randn(out_features, in_features, seed=2, dtype=dtype), randn(out_features, seed=3)
    for rank, dropout, factors in (
        (1, 0.3, dtype),
        (3, 0.0, torch.float32),
        (17, 0.3, torch.float32),
        (40, 0.0, dtype),
    ):
        a, b = adapter(rank, out_features, in_features, factors)
        check_adapter(device, x, dy, w, None if rank == 3 else bias, a, b, dropout, context=(rank, dropout))


@on_every_device
def test_a_base_in_4_bits(device: str) -> None:
    """In the interpreter bfloat16 rounds the results only, not what is decoded."""
    for (rows, out_features, in_features), rank, dropout, nested, block_size in (
        ((33, 67, 130), 16, 0.3, True, 64), ((5, 40, 33), 3, 0.0, False, 32), ((70, 66, 96), 17, 0.3, False, 32),
        ((1, 7, 1), 1, 0.0, True, 4096),
    ):  # fmt: skip
        weight = quantized(out_features, in_features, nested=nested, block_size=block_size)
        a, b = adapter(rank, out_features, in_features, torch.float32)
        for dtype in DTYPES[:2] if device == "interpreter" else DTYPES:
            x, dy = randn(rows, in_features, dtype=dtype), randn(rows, out_features, seed=1, dtype=dtype)
            bias = randn(out_features, seed=3, dtype=dtype)
            check_adapter(device, x, dy, weight, bias, a, b, dropout, context=(dtype, rows, rank, nested))


@pytest.mark.parametrize("rank", [64, 65, 300])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@on_every_device
def test_ranks_of_many_blocks(device: str, dtype: torch.dtype, rank: int) -> None:
    x, dy, w = randn(19, 21, dtype=dtype), randn(19, 37, seed=1, dtype=dtype), randn(37, 21, seed=2, dtype=dtype)
    a, b = adapter(rank, 37, 21, dtype)
    check_adapter(device, x, dy, w, None, a / 8, b / 8, 0.3)
    weight = quantized(37, 21)
    check_adapter(device, x, dy, weight, None, a / 8, b / 8)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@on_every_device
def test_divided_reductions(device: str, dtype: torch.dtype) -> None:
    """Few tiles for many multiprocessors: every sum is cut into parts, which other launches add in their order."""
    from tlkernels.triton_kernels import lora, nf4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "_processors", lambda device: 8)
        kernels = []
        patch.setattr(lora, "_launch", lambda kernel, *a, **k: (kernels.append(kernel), nf4._launch(kernel, *a, **k)))
        long = 530 if dtype == torch.float32 else 1060  # 16 steps and a bit, of dy and of x
        for out_features, in_features, rows in ((long, 20, 6), (20, 2 * long, 5), (30, 24, 150)):
            x, dy = randn(rows, in_features, dtype=dtype), randn(rows, out_features, seed=1, dtype=dtype)
            w, bias = randn(out_features, in_features, seed=2, dtype=dtype), randn(out_features, seed=3, dtype=dtype)
            a, b = adapter(5, out_features, in_features, dtype)
            check_adapter(device, x, dy, w, bias, a, b, 0.3, context=(out_features, in_features))
        check_adapter(device, randn(5, long, dtype=dtype), randn(5, 21, dtype=dtype), quantized(21, long), None,
                      *adapter(3, 21, long, dtype), 0.3)  # fmt: skip
        assert kernels.count(nf4._sum_splits_kernel) >= 2 and kernels.count(lora._sum_chunks_kernel) >= 4
        assert kernels.count(lora._product_kernel.fn) >= 3


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@on_every_device
def test_many_rows(device: str, dtype: torch.dtype) -> None:
    """dB a few chunks at a time, and a base in 4 bits a slab at a time, whose columns have their own dropout."""
    from tlkernels.triton_kernels import lora, nf4

    slabs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "_SLAB_ROWS", 50)
        patch.setattr(nf4, "_FUSED_ROWS", dict.fromkeys(DTYPES, 4))
        patch.setattr(nf4, "_SLAB", 128 * 33)
        decode = nf4._decode_rows
        patch.setattr(nf4, "_decode_rows", lambda *a, **k: (slabs.append(a[2].shape), decode(*a, **k)))
        for out_features, in_features in ((150, 33), (33, 141)):
            x, dy = randn(130, in_features, dtype=dtype), randn(130, out_features, seed=1, dtype=dtype)
            weight, bias = quantized(out_features, in_features, nested=True), randn(out_features, seed=3)
            a, b = adapter(5, out_features, in_features, dtype)
            check_adapter(device, x, dy, weight, bias, a, b, 0.3)
        assert len(slabs) == 6 and all(min(shape) <= 128 for shape in slabs)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@on_every_device
def test_arguments_of_any_layout(device: str, dtype: torch.dtype) -> None:
    """Transposed, sliced and expanded ones, of more than two dimensions, beside contiguous copies of them."""
    place = target(device)
    x, dy = randn(6, 4, 40, dtype=dtype), randn(6, 4, 24, seed=1, dtype=dtype)
    a, b = adapter(5, 24, 20, torch.float32)
    w, bias, rng = randn(24, 20, seed=2, dtype=dtype), randn(24, seed=3), torch.tensor(SEEDS)
    views: list[tuple[Tensor, ...]] = [
        (x[..., ::2], dy, w.t().contiguous().t(), bias, a.t().contiguous().t(), b.t().contiguous().t()),
        (x[..., 5:25], dy.transpose(0, 1).contiguous().transpose(0, 1), w.repeat(2, 3)[:24, 7:27],
         bias.repeat_interleave(3)[::3], torch.stack([a, a], 2)[..., 0], b.repeat(1, 2)[:, 2:7]),
        (x[:1, :1, :20].expand(3, 2, 20), dy[:1, :1, :1].expand(3, 2, 24), w[:, :1].expand(24, 20),
         bias[:1].expand(24), a[:, :1].expand(5, 20), b[:1].expand(24, 5)),
        (x[0, 0, :20], dy[0, 0], w, bias, a, b),
    ]  # fmt: skip
    for view in views:
        results = []
        for given in (view, tuple(t.contiguous() for t in view)):
            v, g, weight, c, down, up = (t.to(place) if place.type != "cpu" else t for t in given)
            y, s = call(device, "lora_linear", v, weight, c, down, up, rng, scaling=0.5, dropout=0.3)
            ds, *grads = call(device, "lora_grad_ab", g, v, s, down, up, rng, scaling=0.5, dropout=0.3)
            grad_x = call(device, "lora_grad_x", g, weight, ds, down, rng, dropout=0.3)
            norm = call(device, "dora_weight_norm", weight, down, up, scaling=0.5)
            results.append((y, s, ds, *grads, grad_x, norm))
        assert all(formula.same_bits(*pair) for pair in zip(*results, strict=True)), view[0].shape
        assert results[0][0].shape == (*view[0].shape[:-1], 24)


@pytest.mark.parametrize("bias_dtype", [*DTYPES, torch.float64], ids=str)
@on_every_device
def test_bias_and_factors_of_any_dtype(device: str, bias_dtype: torch.dtype) -> None:
    for dtype in DTYPES:
        x, dy, w = randn(9, 20, dtype=dtype), randn(9, 33, seed=1, dtype=dtype), randn(33, 20, seed=2, dtype=dtype)
        a, b = adapter(4, 33, 20, bias_dtype)
        check_adapter(device, x, dy, w, randn(33, seed=3).to(bias_dtype), a, b, 0.3, context=dtype)


@on_every_device
def test_nothing_to_compute(device: str) -> None:
    for rows, out_features, in_features in ((0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)):
        x, dy, w = torch.ones(rows, in_features), torch.ones(rows, out_features), torch.ones(out_features, in_features)
        a, b, bias = torch.ones(2, in_features), torch.ones(out_features, 2), randn(out_features)
        rng = torch.tensor(SEEDS)
        for weight in (w, quantized(out_features, in_features)):
            if isinstance(weight, NF4Weight):
                tensors, sizes, blocks = parts(weight)
                y, s = call(device, "nf4_lora_linear", x, *tensors, bias, a, b, rng, *sizes, scaling=1.0, **blocks)
                back = call(device, "nf4_lora_grad_x", dy, *tensors, s, a, rng, *sizes, dropout=0.5, **blocks)
            else:
                y, s = call(device, "lora_linear", x, w, bias, a, b, rng, scaling=1.0, dropout=0.5)
                back = call(device, "lora_grad_x", dy, w, s, a, rng, dropout=0.5)
            assert y.shape == dy.shape and s.shape == (rows, 2) and back.shape == x.shape
            if in_features == 0:
                assert torch.equal(y, bias.expand(rows, -1)) and not s.any()
        ds, grad_a, grad_b = call(device, "lora_grad_ab", dy, x, s, a, b, rng, scaling=1.0, dropout=0.5)
        assert ds.shape == s.shape and grad_a.shape == a.shape and grad_b.shape == b.shape
        if rows == 0:
            assert not grad_a.any() and not grad_b.any()
        assert call(device, "dora_weight_norm", w, a, b, scaling=1.0).shape == (out_features,)
        call(device, "lora_merge_", w, a, b, scaling=1.0)
    assert call(device, "lora_dropout_mask", torch.tensor(SEEDS), 0, 5, 0.5).shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_an_adapter_of_zeros_changes_no_bit(device: str, dtype: torch.dtype) -> None:
    x, w, bias = randn(21, 70, dtype=dtype), randn(33, 70, seed=2, dtype=dtype), randn(33, seed=3)
    weight, zero = quantized(33, 70), torch.zeros(33, 4)
    tensors, sizes, blocks = parts(weight)
    runs = [
        call(device, "lora_linear", x, w, bias, a, zero, torch.tensor(SEEDS), scaling=2.0, dropout=0.5)[0]
        for a in (randn(4, 70), torch.zeros(4, 70))
    ]
    assert formula.same_bits(*runs)
    y, s = call(device, "nf4_lora_linear", x, *tensors, bias, randn(4, 70), zero, None, *sizes, scaling=2.0, **blocks)
    assert formula.same_bits(y, call(device, "nf4_linear", x, *tensors, bias, *sizes, **blocks)) and s.any()


@on_every_device
def test_dropped_elements_are_nothing(device: str) -> None:
    """A NaN that dropout takes out does not reach s or dA; in the base product it stays."""
    mask = formula.dropout_mask(*SEEDS, 6, 20, 0.5)
    x, w = randn(6, 20), randn(9, 20, seed=2)
    a, b = adapter(3, 9, 20, torch.float32)
    bad = torch.where(mask, x, float("nan"))
    rng = torch.tensor(SEEDS)
    (y, s), (_, clean) = (
        call(device, "lora_linear", v, w, None, a, b, rng, scaling=1.0, dropout=0.5) for v in (bad, x)
    )
    assert formula.same_bits(s, clean) and y.isnan().any()
    dy = randn(6, 9, seed=1)
    grads = [call(device, "lora_grad_ab", dy, v, s, a, b, rng, scaling=1.0, dropout=0.5)[1] for v in (bad, x)]
    assert formula.same_bits(*grads)


@on_every_device
def test_autograd_through_the_public_function(device: str) -> None:
    place = target(device)
    x, w, bias = randn(3, 5, 20), randn(14, 20, seed=2), randn(14, seed=3)
    a, b = adapter(6, 14, 20, torch.float32)
    dy, rng = randn(3, 5, 14, seed=1), torch.tensor(SEEDS)
    for weight in (w, quantized(14, 20)):
        dense = weight if isinstance(weight, Tensor) else decoded(weight)
        leaves = [t.clone().to(place).requires_grad_() for t in (x, bias, a, b)]
        if isinstance(weight, NF4Weight):
            moved = weight._replace(**{k: v.to(place) for k, v in weight._asdict().items() if isinstance(v, Tensor)})
        else:
            moved = weight.to(place)
        with tlkernels.backend("triton"):
            y = ops.lora_linear(leaves[0], moved, *leaves[1:], 0.5, dropout=0.3, rng=rng.to(place))
            grads = torch.autograd.grad(y, leaves, dy.to(place))
        grad_x, grad_bias, grad_a, grad_b = (g.cpu() for g in grads)
        mask = formula.dropout_mask(*SEEDS, 15, 20, 0.3)
        rows, flat = x.view(15, 20), dy.view(15, 14)
        formula.lora_linear(rows, dense, bias, a, b, 0.5, mask, 0.3)[0].check(y.detach().cpu().view(15, 14), x.dtype)
        _, want_a, want_b, want_x = formula.lora_gradients(flat, rows, dense, a, b, 0.5, mask, 0.3)
        for want, got in ((want_a, grad_a), (want_b, grad_b), (want_x, grad_x.view(15, 20))):
            want.check(got, x.dtype)
        torch.testing.assert_close(grad_bias, flat.sum(0))


@on_every_device
def test_float64_runs_the_reference(device: str) -> None:
    x, dy, w = randn(7, 20).double(), randn(7, 9, seed=1).double(), randn(9, 20, seed=2).double()
    a, b = adapter(3, 9, 20, torch.float64)
    check_adapter(device, x, dy, w, None, a, b, 0.3)
    check_adapter(device, x, dy, quantized(9, 20), None, a, b, 0.3)


# ---- many adapters --------------------------------------------------------------------------------------------------


def check_group(
    device: str, x: Tensor, dy: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, ids: Tensor,
    scalings: Tensor, ranks: Tensor | None,
) -> None:  # fmt: skip
    """Each adapter's rows, and its gradients, are those of the adapter alone; the other rows are the base product."""
    dtype = x.dtype
    y, s = call(device, "lora_linear_grouped", x, w, bias, a, b, ids, scalings, ranks)
    ds, grad_a, grad_b = call(device, "lora_grouped_grad", dy, x, s, a, b, ids, scalings, ranks)
    grad_x = call(device, "lora_grouped_grad_x", dy, w, ds, a, ids, ranks)
    before = randn(len(x), len(w) + 9, seed=8, dtype=dtype)
    delta = call(device, "lora_grouped_delta_", before.clone(), x, a, b, ids, scalings, ranks, start=5)
    assert (y.dtype, s.dtype, ds.dtype, grad_x.dtype) == (dtype,) * 4
    assert (grad_a.dtype, grad_b.dtype) == (a.dtype, b.dtype)
    assert torch.equal(delta[:, :5], before[:, :5]) and torch.equal(delta[:, -4:], before[:, -4:])
    for adapter_id in range(-1, len(a)):
        rows = (ids == adapter_id).nonzero()[:, 0]
        rank = 0 if adapter_id < 0 else a.shape[1] if ranks is None else int(ranks[adapter_id])
        assert not s[rows, rank:].any() and not ds[rows, rank:].any()
        assert adapter_id < 0 or not (grad_a[adapter_id, rank:].any() or grad_b[adapter_id, :, rank:].any())
        down, up, scaling = a.new_empty(0, a.shape[2]), b.new_empty(b.shape[1], 0), 1.0
        if adapter_id >= 0:
            down, up, scaling = a[adapter_id, :rank], b[adapter_id, :, :rank], float(scalings[adapter_id])
        mine, theirs = x[rows], dy[rows]
        given = {"s": s[rows, :rank], "ds": ds[rows, :rank]}
        want_y, want_s = formula.lora_linear(mine, w, bias, down, up, scaling, s=given["s"])
        want_ds, want_a, want_b, want_x = formula.lora_gradients(theirs, mine, w, down, up, scaling, **given)
        alone = product(given["s"], up.to(dtype).T) + exact(before[rows, 5:-4])
        wanted: list[tuple[str, Exact, Tensor]] = [
            ("y", want_y, y[rows]), ("s", want_s, given["s"]), ("ds", want_ds, given["ds"]),
            ("dx", want_x, grad_x[rows]), ("delta", alone, delta[rows, 5:-4]),
        ]  # fmt: skip
        if adapter_id >= 0:
            wanted += [("dA", want_a, grad_a[adapter_id, :rank]), ("dB", want_b, grad_b[adapter_id, :, :rank])]
        for name, want, got in wanted:
            want.check(got, dtype, (name, adapter_id, rank))


@pytest.mark.parametrize("rank", [1, 3, 17, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_many_adapters(device: str, dtype: torch.dtype, rank: int) -> None:
    """Unsorted, some without rows, some rows without an adapter, ranks from 0 on; more rows than a tile."""
    rows, out_features, in_features, adapters = 75, 37, 41, 6
    x, dy = randn(rows, in_features, dtype=dtype), randn(rows, out_features, seed=1, dtype=dtype)
    w, bias = randn(out_features, in_features, seed=2, dtype=dtype), randn(out_features, seed=3, dtype=dtype)
    a, b = adapter(rank, out_features, in_features, torch.float32 if rank == 17 else dtype, adapters)
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(-1, adapters, (rows,), generator=generator)
    ids[ids == 2] = 4
    ranks = torch.randint(0, rank + 1, (adapters,), generator=generator)
    ranks[:2] = torch.tensor([rank, 0])
    scalings = randn(adapters, seed=7)
    check_group(device, x, dy, w, bias, a, b, ids, scalings, ranks)
    if rank == 3 and dtype == torch.float32:
        check_group(device, x, dy, w, None, a, b, ids.int(), scalings, ranks.int())
        check_group(device, x, dy, w, None, a, b, torch.full_like(ids, 3), scalings, None)
        check_group(device, x, dy, w, None, a, b, torch.full_like(ids, -1), scalings, None)
        none = torch.stack([scalings, scalings], 1)[:, 0]
        check_group(device, x[:5], dy[:5], w, None, a, b, ids.repeat_interleave(2)[:10:2], none, ranks)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@on_every_device
def test_many_adapters_and_divided_reductions(device: str, dtype: torch.dtype) -> None:
    from tlkernels.triton_kernels import lora, nf4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "_processors", lambda device: 8)
        patch.setattr(lora, "_CHUNK", 32)
        long = 530 if dtype == torch.float32 else 2070
        x, dy = randn(150, long, dtype=dtype), randn(150, 12, seed=1, dtype=dtype)
        a, b = adapter(3, 12, long, dtype, 2)
        ids = torch.randint(-1, 2, (150,), generator=torch.Generator().manual_seed(0))
        check_group(device, x[:7], dy[:7], randn(12, long, dtype=dtype), None, a, b, ids[:7], randn(2), None)
        check_group(
            device, x[:, :20], dy, randn(12, 20, dtype=dtype), None, a[..., :20], b, ids, randn(2), torch.tensor([3, 2])
        )


@on_every_device
def test_no_adapters_and_no_rows(device: str) -> None:
    x, w = randn(4, 6), randn(5, 6, seed=2)
    a, b, none = torch.empty(0, 3, 6), torch.empty(0, 5, 3), torch.full((4,), -1)
    check_group(device, x, randn(4, 5), w, None, a, b, none, torch.empty(0), None)
    a, b = adapter(3, 5, 6, torch.float32, 2)
    check_group(device, x[:0], randn(0, 5), w, None, a, b, none[:0], torch.ones(2), None)


@on_every_device
def test_what_is_not_an_adapter_s_own_is_not_read(device: str) -> None:
    """NaN in one adapter stays in its rows, and what stands above a rank counts nowhere."""
    x, dy, w = randn(40, 20), randn(40, 30, seed=1), randn(30, 20, seed=2)
    a, b = adapter(5, 30, 20, torch.float32, 3)
    ids, scalings = torch.arange(40) % 4 - 1, torch.ones(3)
    ranks = torch.tensor([2, 5, 5])
    bad_a, bad_b = a.clone(), b.clone()
    bad_a[0, 2:] = bad_b[0, :, 2:] = float("nan")
    bad_a[2] = bad_b[2] = float("nan")
    own = ids != 2
    results = []
    for down, up in ((a, b), (bad_a, bad_b)):
        y, s = call(device, "lora_linear_grouped", x, w, None, down, up, ids, scalings, ranks)
        ds, grad_a, grad_b = call(device, "lora_grouped_grad", dy, x, s, down, up, ids, scalings, ranks)
        grad_x = call(device, "lora_grouped_grad_x", dy, w, ds, down, ids, ranks)
        delta = call(device, "lora_grouped_delta_", torch.zeros(40, 30), x, down, up, ids, scalings, ranks)
        results.append((y[own], s[own], ds[own], grad_x[own], delta[own], grad_a[:2], grad_b[:2]))
        assert bool(y[~own].isnan().all()) == bool(down.isnan().any())
    assert all(formula.same_bits(*pair) for pair in zip(*results, strict=True))
    x[1, 3] = dy[1, 3] = float("nan")  # of adapter 0, whose rank is 2
    _, s = call(device, "lora_linear_grouped", x, w, None, a, b, ids, scalings, ranks)
    ds, grad_a, grad_b = call(device, "lora_grouped_grad", dy, x, s, a, b, ids, scalings, ranks)
    for t in (s[1], ds[1], grad_a[0].T, grad_b[0]):
        assert t[..., :2].isnan().any() and not t[..., 2:].any()
    assert not grad_a[1:].isnan().any() and not grad_b[1:].isnan().any()


@on_every_device
def test_a_gpu_takes_ids_out_of_range_for_none(device: str) -> None:
    x, w = randn(6, 20), randn(9, 20, seed=2)
    a, b = adapter(3, 9, 20, torch.float32, 2)
    ids = torch.tensor([0, 5, -7, 1, 2, -1])
    call_it = functools.partial(call, device, "lora_linear_grouped", x, w, None, a, b)
    if device == "interpreter":
        with pytest.raises(IndexError, match="adapter_ids has an entry -7; expected -1 <= id < 2"):
            call_it(ids, torch.ones(2), None)
        from tlkernels.triton_kernels import lora

        with pytest.MonkeyPatch.context() as patch:  # past the check, which a GPU does not have
            patch.setattr(lora.ops, "_check_group", lambda *a: None)
            y, s = call_it(ids, torch.ones(2), None)
    else:
        moved = [t.to(device) for t in (x, w, a, b, ids, torch.ones(2))]
        with tlkernels.backend("triton"):

            def run() -> tuple[Tensor, Tensor]:
                return torch.ops.tlkernels.lora_linear_grouped.default(*moved[:2], None, *moved[2:], None)

            run()  # which tries tile shapes
            torch.cuda.set_sync_debug_mode("error")  # nor may it wait for the device to look
            try:
                y, s = run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        y, s = y.cpu(), s.cpu()
    none = torch.where((ids < 0) | (ids > 1), -1, ids)
    want, want_s = call_it(none, torch.ones(2), None)
    assert formula.same_bits(y, want) and formula.same_bits(s, want_s)


@on_every_device
def test_delta_of_any_layout(device: str) -> None:
    """Into a slice of rows that are a matrix in memory, and of rows that are not."""
    if device == "cuda":
        return  # `call` copies; what is tested is the launcher
    a, b = adapter(3, 9, 20, torch.float32, 2)
    x, ids, scalings = randn(4, 6, 20), torch.arange(24).view(4, 6) % 3 - 1, torch.tensor([0.5, -2.0])
    base = randn(6, 4, 40, seed=6)
    want = base.transpose(0, 1)[..., 3:27].clone()
    with tlkernels.backend("triton"):
        ops.lora_grouped_delta_(want, x, a, b, ids, scalings, start=5)
        for y in (base.clone().transpose(0, 1)[..., 3:27], base.repeat_interleave(2, 2).transpose(0, 1)[..., 6:54:2]):
            assert ops.lora_grouped_delta_(y, x, a, b, ids, scalings, start=5) is y
            assert torch.equal(y, want)


# ---- norms and merging ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_device
def test_weight_norm(device: str, dtype: torch.dtype) -> None:
    for (out_features, in_features), rank, factors in (
        ((40, 70), 3, dtype), ((67, 33), 17, torch.float32), ((33, 130), 70, torch.float16), ((1, 1), 1, torch.float64)
    ):  # fmt: skip
        a, b = adapter(rank, out_features, in_features, factors)
        weight = quantized(out_features, in_features, nested=rank == 17, block_size=32)
        tensors, sizes, blocks = parts(weight)
        w = randn(out_features, in_features, dtype=dtype)
        dense = call(device, "dora_weight_norm", w, a, b, scaling=0.5)
        four_bits = call(device, "nf4_dora_weight_norm", *tensors, a, b, *sizes, scaling=0.5, **blocks)
        for got, values in ((dense, w), (four_bits, decoded(weight))):
            want, magnitude = formula.lora_weight_norm(values, a, b, 0.5)
            unit = TOLERANCES[torch.float32].accumulator
            bound = (8 + 4 * (in_features + 2 * rank) ** 0.5) * unit * magnitude / want + 2 * unit * want
            assert got.dtype == torch.float32 and bool(((got.double() - want).abs() <= bound).all()), (rank, factors)


@on_every_device
def test_weight_norm_of_nearly_nothing(device: str) -> None:
    """Rounding may make the square negative, which has no root; NaN stays NaN."""
    a, b = randn(2, 30), randn(11, 2, seed=1)
    w = -(b @ a)
    w[3, 5] = float("nan")
    norm = call(device, "dora_weight_norm", w, a, b, scaling=1.0)
    assert norm[3].isnan() and bool((norm[torch.arange(11) != 3] < 0.01).all())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@on_every_device
def test_merge(device: str, dtype: torch.dtype) -> None:
    for (out_features, in_features), rank, factors in (
        ((70, 140), 3, dtype), ((33, 65), 40, torch.float32), ((1, 1), 1, torch.bfloat16), ((5, 9), 300, torch.float16)
    ):  # fmt: skip
        a, b = adapter(rank, out_features, in_features, factors)
        w = randn(out_features, in_features, dtype=dtype)
        want = exact(w) + product(b.double(), a.double()) * 0.5
        want.check(call(device, "lora_merge_", w.clone(), a, b, scaling=0.5), dtype, (rank, factors))
    if device == "interpreter":
        around = randn(70, 300, dtype=dtype)
        view, want_view = around[2:35, 3:133:2], around[2:35, 3:133:2].clone()
        with tlkernels.backend("triton"):
            a, b = adapter(40, 33, 65, torch.float32)
            ops.lora_merge_(want_view, a, b, 0.5)
            ops.lora_merge_(view, a, b, 0.5)
        assert torch.equal(view, want_view) and torch.equal(around[:2], randn(70, 300, dtype=dtype)[:2])


# ---- calls ----------------------------------------------------------------------------------------------------------


def wrong(arguments: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each argument of a right call, wrong in one way."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield f"{name}: dtype", {name: value.to(torch.bool) if value.dtype != torch.bool else value.long()}
            if value.dim():
                yield f"{name}: one less", {name: value.narrow(-1, 0, value.shape[-1] - 1)}
                yield f"{name}: a row less", {name: value.narrow(0, 0, value.shape[0] - 1)}
                yield f"{name}: flat", {name: value[0]}
            if value.is_floating_point() and name not in ("lora_a", "lora_b", "bias"):
                yield f"{name}: another float", {name: value.half()}
        elif isinstance(value, int):
            yield f"{name}: negative", {name: -1}
    for name, value in (("dropout", 1.0), ("p", -0.1), ("rng", None), ("block_size", 48), ("start", 4)):
        if name in arguments:
            yield f"{name}: {value}", {name: value}


@pytest.mark.parametrize("name", NAMES)
@on_every_device
def test_wrong_calls_get_the_reference_s_words(
    device: str, name: str, lora_calls: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    right, place, said = lora_calls(12, 80, nested=True)[name], target(device), 0
    right = {k: v.to(place) if isinstance(v, Tensor) else v for k, v in right.items()}
    assert outcome("triton", name, right) is None
    for how, change in wrong(right):
        expected = outcome("reference", name, {**right, **change})
        if expected is None:
            continue
        got = outcome("triton", name, {**right, **change})
        if expected[1].startswith(f"{name}:"):
            assert got == expected, (how, got, expected)
            said += 1
        else:
            assert got is not None, (how, expected)
    assert said >= 4, "too few sentences to compare"


@pytest.mark.parametrize("name", NAMES)
@compiled
def test_a_kernel_takes_what_its_schema_says(name: str) -> None:
    check_signature(name)


# ---- machine code, without the machine ------------------------------------------------------------------------------

NESTED = {"absmax": "*u8", "code": "*fp32", "absmax_scale": "*fp32", "absmax_offset": "*fp32", "dynamic_code": "*fp32"}
ORDER = {"order": "*i64", "bounds": "*i64", "ranks": "*i64"}
UNALIGNED = {"rows", "groups", "parts", "threshold", "column0", "rank"}


def integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def build(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], *, ones: bool = False, **options: Any
) -> Any:
    """With `ones` most sizes are 1."""
    sizes = integers_of(arguments) - (UNALIGNED - {"rank"}) if ones else ()
    return triton_modes.build(kernel, arguments, constants, unaligned=UNALIGNED, ones=sizes, **options)


def build_product(
    dtype: str, *, four_bits: bool = False, transposed: bool = False, dropout: bool = False, grouped: bool = False,
    rows: int = 128, out: int = 128, **options: Any,
) -> Any:  # fmt: skip
    from tlkernels.triton_kernels import lora

    arguments = {
        **dict.fromkeys(("x", "w", "s", "out"), f"*{dtype}"), "bias": "*fp32", "f": "*fp32", "scale": "fp32",
        **integers("rows width depth rank groups row_bytes x_stride base_part base_stride parts f_group f_width"),
        **integers("out_part out_stride column0 threshold w_depth w_width"),
    }  # fmt: skip
    constants = {
        "NF4": four_bits, "TRANSPOSED": transposed, "SPLITS": 1, "RUN": 64, "BLOCK_SIZE": 64, "ABSMAX_BLOCK_SIZE": 256,
        "BAND": 12, "BLOCK_ROWS": rows, "BLOCK_OUT": out, "BLOCK_DEPTH": 32 if dtype == "fp32" else 64,
        "BLOCK_RANK": 16, "f_rank": 1,
    }  # fmt: skip
    del arguments["w_width" if transposed else "w_depth"]  # a stride of 1 is known when it compiles
    constants["w_width" if transposed else "w_depth"] = 1
    if four_bits:
        arguments |= {"w": "*u8", **NESTED}
    if dropout:
        arguments |= {"rng": "*i64"}
    if grouped:
        arguments |= {**ORDER, "ids": "*i64"}
    return build(lora._product_kernel, arguments, constants, **options)


@pytest.mark.parametrize("kind", ["forward", "grad_x", "grouped", "4 bits", "4 bits grad_x"])
@compiled
def test_products_use_matrix_instructions(kind: str) -> None:
    """In the long loop and for the update, with the operands copied 16 bytes at a time, past the registers."""
    wide = {"forward": 256, "grad_x": 256}.get(kind, 128)
    kernel = build_product(
        "bf16", four_bits="4 bits" in kind, transposed="grad_x" in kind, dropout="grad_x" in kind,
        grouped=kind == "grouped", out=wide, num_warps=8, num_stages=3,
    )  # fmt: skip
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16" in ptx and "mma.sync" not in ptx
    assert "cp.async.cg.shared.global [" in ptx and "ld.local" not in ptx
    assert kernel.metadata.shared <= 227 * 1024


def build_down(dtype: str, *, both: bool = False, dropout: bool = False, grouped: bool = False, **options: Any) -> Any:
    from tlkernels.triton_kernels import lora

    wide = dtype == "fp32"
    rows, depth = ((64, 32) if wide else (256, 64)) if both else ((32, 32) if wide else (64, 128))
    arguments = {
        "x": f"*{dtype}", "f": "*fp32", "out": f"*{dtype}", "scale": "fp32",
        **integers("rows depth rank groups x_stride f_group threshold f_rank f_depth"),
    }  # fmt: skip
    arguments.pop("f_rank" if both else "f_depth")
    constants = {"GROUPS": 8, "SPLITS": 4, "BLOCK_ROWS": rows, "BLOCK_RANK": 32, "BLOCK_DEPTH": depth}
    constants["f_rank" if both else "f_depth"] = 1
    if both:
        arguments |= {"right": f"*{dtype}", "partial": "*fp32"}
    if dropout:
        arguments |= {"rng": "*i64"}
    if grouped:
        arguments |= {**ORDER, "scalings": "*fp32"}
    return build(lora._down_kernel, arguments, constants, **options)


def build_factor(dtype: str, *, dropout: bool = False, grouped: bool = False, **options: Any) -> Any:
    from tlkernels.triton_kernels import lora

    arguments = {
        "p": f"*{dtype}", "x": f"*{dtype}", "out": "*fp32", "scale": "fp32",
        **integers("rows width rank groups x_stride threshold"),
    }  # fmt: skip
    columns, rows = (64, 32) if dtype == "fp32" else (128, 64)
    constants = {"GROUPS": 8, "CHUNK": 512, "BLOCK_ROWS": rows, "BLOCK_RANK": 32, "BLOCK_COLUMNS": columns}
    if dropout:
        arguments |= {"rng": "*i64"}
    return build(lora._factor_kernel, {**arguments, **(ORDER if grouped else {})}, constants, **options)


@compiled
def test_sums_over_rows_use_matrix_instructions() -> None:
    for kernel in (
        build_down("bf16", num_warps=4, num_stages=3), build_down("bf16", dropout=True, num_warps=4, num_stages=3),
        build_down("bf16", both=True, num_warps=8, num_stages=3), build_factor("bf16", dropout=True),
    ):  # fmt: skip
        ptx = kernel.asm["ptx"]
        assert "wgmma.mma_async" in ptx and "mma.sync" not in ptx and "ld.local" not in ptx
        assert "cp.async.cg.shared.global [" in ptx and not re.search(r"\b(atom|red)\.", ptx)
        assert kernel.metadata.shared <= 227 * 1024


@compiled
def test_float32_keeps_all_its_bits() -> None:
    for kernel in (
        build_product("fp32", rows=32, out=64, dropout=True), build_down("fp32", both=True), build_factor("fp32"),
    ):  # fmt: skip
        ptx = kernel.asm["ptx"]
        assert "fma.rn.f32" in ptx and "mma" not in ptx and "tf32" not in ptx


@pytest.mark.parametrize(("capability", "ones"), [(80, False), (90, False), (90, True), (100, False)])
@compiled
def test_every_kernel_compiles_for_every_target(capability: int, ones: bool) -> None:
    """Also for sizes of 1."""
    from tlkernels.triton_kernels import lora

    gpu: dict[str, Any] = {"capability": capability, "ones": ones}
    build_product("fp16", grouped=True, out=64, **gpu)
    build_product("bf16", four_bits=True, transposed=True, dropout=True, rows=16, out=64, **gpu)
    build_down("fp16", both=True, grouped=True, **gpu, num_stages=2)
    build_factor("fp16", dropout=True, grouped=True, **gpu)
    arguments = {"partial": "*fp32", "bounds": "*i64", "out": "*bf16", **integers("size groups chunks")}
    build(lora._sum_chunks_kernel, arguments, {"GROUPS": 8, "CHUNK": 64, "ADD": False, "TILE": 1024}, **gpu)
    strides = integers("out_features in_features rank a_rank b_out w_out row_bytes")
    ones = {"a_in": 1, "b_rank": 1, "w_in": 1}
    merge = {"w": "*bf16", "a": "*bf16", "b": "*bf16", "scaling": "fp32", **strides}
    del merge["row_bytes"]
    build(lora._merge_kernel, merge, {**ones, "WIDE": False, "BLOCK_OUT": 64, "BLOCK_IN": 128, "BLOCK_RANK": 16}, **gpu)
    norm = {"a": "*bf16", "b": "*fp32", "gram": "*fp32", "out": "*fp32", **strides}
    norm |= {"twice": "fp32", "square_of_scaling": "fp32"}
    constants = {**ones, "RUN": 64, "BLOCK_SIZE": 64, "ABSMAX_BLOCK_SIZE": 256}
    constants |= {"BLOCK_OUT": 32, "BLOCK_RANK": 16, "BLOCK_DEPTH": 64}
    build(lora._norm_kernel, {**norm, "w": "*bf16"}, {**constants, "NF4": False, "WIDE": False}, **gpu)
    build(lora._norm_kernel, {**norm, "w": "*u8", **NESTED}, {**constants, "NF4": True, "WIDE": True}, **gpu)
    mask = {"rng": "*i64", "out": "*u8", "rows": "i64", "cols": "i32", "threshold": "i32"}
    build(lora._mask_kernel, mask, {"ROWS": 16, "COLUMNS": 512}, **gpu)


@compiled
def test_tile_shapes_that_are_tried() -> None:
    from tlkernels.triton_kernels import lora

    def heights(dtype: torch.dtype, rows: int) -> set[int]:
        tried = lora._tiles_that_fit(lora._tiles(), {"x": torch.empty(1, dtype=dtype)}, BLOCK_ROWS=rows)
        return {config.kwargs["BLOCK_OUT"] for config in tried}

    assert heights(torch.bfloat16, 128) == {64, 128, 256}
    assert heights(torch.bfloat16, 16) == {32, 64, 128}
    assert heights(torch.float32, 32) == {32, 64}
