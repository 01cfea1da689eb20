"""The tile engine alone: every layout, type, map and kind of product, at every level, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import tlkernels.numpy

_numpy = pytest.importorskip("tlkernels._numpy")
LEVELS = _numpy.levels()
DTYPES = ("float32", "bfloat16", "float16")
# tile-aligned, one off, primes, one, several blocks, deeper than a chunk, narrow (one vector) and wide
SIZES = [
    (1, 1, 1),
    (12, 32, 256),
    (13, 33, 257),
    (11, 31, 255),
    (300, 16, 70),
    (257, 17, 600),
    (7, 301, 3),
    (530, 270, 97),
]


def stored(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The array as the engine takes it, and the float64 values that it then holds."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    out = values.astype(dtype)
    return out, out.astype(np.float64)


def loaded(values: np.ndarray, dtype: str) -> np.ndarray:
    return stored_values(values) if dtype == "bfloat16" else values.astype(np.float64)


def stored_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def poisoned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.full(shape, 0x7FC0, np.uint16) if dtype == "bfloat16" else np.full(shape, np.nan, dtype)


def assert_close(c: np.ndarray, a: np.ndarray, b: np.ndarray, dtype: str, context: Any = "") -> None:
    """c = a b^T within one rounding of the result and the error of a float32 sum (Higham & Mary 2019)."""
    exact, magnitude = a @ np.swapaxes(b, -1, -2), np.abs(a) @ np.abs(np.swapaxes(b, -1, -2))
    unit = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    bound = unit * np.abs(exact) + (8 + 4 * a.shape[-1] ** 0.5) * 2**-24 * magnitude + 2**-24
    error = np.abs(loaded(c, dtype) - exact)
    assert np.isfinite(error).all() and (error <= bound).all(), (context, float((error - bound).max()))


def operand(rng: np.random.Generator, rows: int, k: int, dtype: str, across: bool) -> tuple[np.ndarray, np.ndarray]:
    array, values = stored(rng.standard_normal((rows, k)), dtype)
    return np.ascontiguousarray(array.T if across else array), values


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout(level: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    for (m, n, k), across_a, across_b in itertools.product(SIZES, (False, True), (False, True)):
        a, wide_a = operand(rng, m, k, dtype, across_a)
        b, wide_b = operand(rng, n, k, dtype, across_b)
        c = poisoned((m, n), dtype)
        _numpy.gemm(a, b, c, dtype=dtype, a_across=across_a, b_across=across_b, level=level)
        assert_close(c, wide_a, wide_b, dtype, (m, n, k, across_a, across_b))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("across", [False, True])
def test_symmetric(level: str, dtype: str, across: bool) -> None:
    rng = np.random.default_rng(1)
    for n, k in ((1, 3), (31, 64), (33, 257), (300, 40), (530, 300)):
        a, wide = operand(rng, n, k, dtype, across)
        c, full = poisoned((n, n), dtype), poisoned((n, n), dtype)
        _numpy.gemm(a, a, c, dtype=dtype, a_across=across, b_across=across, symmetric=True, level=level)
        assert_close(c, wide, wide, dtype, (n, k))
        assert np.array_equal(c, c.T)
        _numpy.gemm(a, a, full, dtype=dtype, a_across=across, b_across=across, level=level)
        lower = np.tril_indices(n)
        assert np.array_equal(c[lower], full[lower])  # half of the work, the same bits


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("across", [False, True])
def test_batched(level: str, dtype: str, across: bool) -> None:
    rng = np.random.default_rng(2)
    for batch, m, n, k in ((1, 5, 7, 9), (7, 33, 40, 65), (3, 300, 17, 260)):
        pairs = [(operand(rng, m, k, dtype, across), operand(rng, n, k, dtype, across)) for _ in range(batch)]
        a, b = (np.stack([pair[i][0] for pair in pairs]) for i in (0, 1))
        c = poisoned((batch, m, n), dtype)
        _numpy.gemm(a, b, c, dtype=dtype, a_across=across, b_across=across, level=level)
        for i, ((_, wide_a), (_, wide_b)) in enumerate(pairs):
            assert_close(c[i], wide_a, wide_b, dtype, (batch, i))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged(level: str, dtype: str) -> None:
    rng = np.random.default_rng(3)
    offsets, n, k = np.array([0, 0, 5, 6, 300, 300, 341, 341]), 45, 70
    a, wide_a = operand(rng, 341, k, dtype, False)
    b, wide_b = stored(rng.standard_normal((7, n, k)), dtype)
    c = poisoned((341, n), dtype)
    _numpy.gemm(a, b, c, dtype=dtype, offsets=offsets, level=level)
    for i, (first, last) in enumerate(itertools.pairwise(offsets)):
        assert_close(c[first:last], wide_a[first:last], wide_b[i], dtype, i)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("across", [False, True])
def test_maps(level: str, across: bool) -> None:
    """Squares, a factor, and a mean (along what stands contiguously) are applied before the product, at any offset."""
    rng = np.random.default_rng(4)
    m, n, k = 65, 65, 310
    a, _ = operand(rng, m, k, "float32", across)
    a += 100
    mean = a.mean(0, dtype=np.float64).astype(np.float32)
    shifted = (a.astype(np.float64) - mean) if not across else (a.astype(np.float64) - mean).T
    plain = a.astype(np.float64).T if across else a.astype(np.float64)
    for name, values, options in (
        ("squared", plain**2, {}),
        ("scaled", 0.5 * plain, {"factor": 0.5}),
        ("shifted", shifted, {"mean": mean}),
    ):
        c = poisoned((m, n), "float32")
        _numpy.gemm(a, a, c, a_across=across, b_across=across, map=name, level=level, **options)
        tolerance = 2e-6 * (np.abs(values) @ np.abs(values).T)
        assert (np.abs(c - values @ values.T) <= tolerance).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype: str) -> None:
    rng = np.random.default_rng(5)
    before, results = tlkernels.numpy.get_num_threads(), []
    a, _ = operand(rng, 700, 520, dtype, False)
    b, _ = operand(rng, 300, 520, dtype, False)
    try:
        for threads in (1, 2, 3, 7):
            tlkernels.numpy.set_num_threads(threads)
            c = poisoned((700, 300), dtype)
            _numpy.gemm(a, b, c, dtype=dtype)
            results.append(c)
    finally:
        tlkernels.numpy.set_num_threads(before)
    assert all(np.array_equal(results[0], c) for c in results[1:])


def test_an_element_does_not_depend_on_how_c_is_cut() -> None:
    """The same row and column in products of other sizes: the order of the sum depends on k alone."""
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((600, 900), np.float32), rng.standard_normal((400, 900), np.float32)
    whole = poisoned((600, 400), "float32")
    _numpy.gemm(a, b, whole)
    for rows, cols in (((0, 1), (0, 40)), ((100, 113), (7, 300)), ((350, 600), (0, 17))):
        part = poisoned((rows[1] - rows[0], cols[1] - cols[0]), "float32")
        _numpy.gemm(np.ascontiguousarray(a[slice(*rows)]), np.ascontiguousarray(b[slice(*cols)]), part)
        assert np.array_equal(part, whole[slice(*rows), slice(*cols)])


def test_empty_sizes() -> None:
    for m, n, k in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        c = poisoned((m, n), "float32")
        _numpy.gemm(np.ones((m, k), np.float32), np.ones((n, k), np.float32), c)
        assert (c == 0).all()


def test_wrong_calls_raise() -> None:
    a, c = np.ones((4, 5), np.float32), np.ones((4, 4), np.float32)
    for wrong, message in (
        ({"b": np.ones((4, 6), np.float32)}, "b does not have the 5 products"),
        ({"c": np.ones((4, 5), np.float32)}, "c has 20 elements; expected 16"),
        ({"b": a.astype(np.float64)}, "b has dtype float64; expected float32"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"map": "cubed"}, "map is 'cubed'"),
        ({"offsets": np.array([0, 3])}, "offsets do not cut the 4 rows"),
        ({"map": "shifted", "mean": np.ones(3, np.float32)}, "mean has 3 elements"),
        ({"symmetric": True, "b_across": True, "b": np.ones((5, 4), np.float32)}, "mixed layouts"),
    ):
        call = {"a": a, "b": a, "c": c.copy(), **wrong}
        with pytest.raises((ValueError, TypeError), match=message):
            _numpy.gemm(call.pop("a"), call.pop("b"), call.pop("c"), **call)
