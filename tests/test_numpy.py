"""tlkernels.numpy and the compiled `_numpy`: every instruction-set level, and plain NumPy, against the formula."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import formula
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_product

import tlkernels
import tlkernels.numpy as tnp
from tlkernels import _numpy_reference

LOADED = tnp.LIBRARY == "loaded"
FUNCTIONS = (
    "nf4_quantize", "absmax_quantize", "absmax_dequantize", "nf4_dequantize", "nf4_embedding", "nf4_linear",
    "nf4_linear_t",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = [(), (0,), (1,), (2,), (31,), (64,), (65,), (127,), (128, 64), (3, 7, 11), (1009,), (64, 96), (33, 4097)]


def _implementations() -> dict[str, SimpleNamespace]:
    found = {"numpy": SimpleNamespace(**{f: getattr(_numpy_reference, f) for f in FUNCTIONS})}
    if LOADED:
        from tlkernels import _numpy

        for level in _numpy.levels():
            bound = {f: functools.partial(getattr(_numpy, f), level=level) for f in FUNCTIONS}
            found[level] = SimpleNamespace(**bound)
    return found


IMPLEMENTATIONS = _implementations()
needs_library = pytest.mark.skipif(not LOADED, reason=f"compiled NumPy library: {tnp.LIBRARY}")


@pytest.fixture(params=list(IMPLEMENTATIONS))
def kernels(request: pytest.FixtureRequest) -> SimpleNamespace:
    return IMPLEMENTATIONS[request.param]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = tnp.get_num_threads()
    yield tnp.set_num_threads
    tnp.set_num_threads(before)


def torch_dtype(dtype: str) -> torch.dtype:
    return getattr(torch, dtype)


def to_torch(array: np.ndarray, dtype: str) -> torch.Tensor:
    """Storage (uint16 for bfloat16) as a tensor."""
    array = np.ascontiguousarray(array)
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_storage(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def randn(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return to_storage(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch_dtype(dtype)))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal dtype, shape and bits; any NaN equals any other."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}.get(a.dtype.itemsize, np.uint8)
    equal = a.view(bits) == b.view(bits) if a.size else np.ones(a.shape, bool)
    if a.dtype.kind == "f":
        equal = equal | (np.isnan(a) & np.isnan(b))
    return bool(np.all(equal))


def adversarial() -> np.ndarray:
    """Blocks of 64 where rounding, zero or overflow goes wrong first, and a short last one."""
    table = np.array(tlkernels.numpy.NF4_CODE, np.float32)
    midpoints = (table[1:] + table[:-1]) * np.float32(0.5)
    ties = np.concatenate([midpoints, np.nextafter(midpoints, 2, dtype="f4"), np.nextafter(midpoints, -2, dtype="f4")])
    blocks = [np.resize(np.append(ties, np.float32(1.0)), 64)]
    blocks += [blocks[0] * np.float32(s) for s in (3.0, 1e-30, 1e-38, 1e-40, 1e38)]
    blocks += [np.zeros(64, "f4"), np.full(64, -0.0, "f4"), np.full(64, 1e-45, "f4"), np.full(64, -2.5, "f4")]
    base = np.linspace(-1, 1, 64, dtype="f4")
    for value in (np.nan, -np.nan, np.inf, -np.inf, 3e38, -1e-45):
        block = base.copy()
        block[17] = value
        blocks.append(block)
    both = base.copy()
    both[[3, 9, 40]] = np.inf, -np.inf, np.nan
    return np.concatenate([*blocks, both, base[:37]]).astype(np.float32)


def quantized(shape: tuple[int, ...], nested: bool = False, block_size: int = 64, seed: int = 0) -> tuple[Any, ...]:
    """(the arguments of a weight, its dense float32 values)."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    packed, absmax = formula.nf4_quantize(w, block_size)
    if not nested:
        dense = formula.nf4_dequantize(packed, absmax, shape, torch.float32, block_size)
        return (packed.numpy(), absmax.numpy(), None, None, None), dense
    q, scale, offset = formula.absmax_quantize(absmax)
    decoded = formula.absmax_dequantize(q, scale, offset)
    dense = formula.nf4_dequantize(packed, decoded, shape, torch.float32, block_size)
    return (packed.numpy(), q.numpy(), None, scale.numpy(), offset.numpy()), dense


# ---- the library itself ---------------------------------------------------------------------------------------------


def test_the_compiled_library_is_there_where_it_must_be() -> None:
    if "cpu" in os.environ.get("TLKERNELS_REQUIRE", "").split(","):
        assert tnp.LIBRARY == "loaded"


@needs_library
def test_levels() -> None:
    from tlkernels import _numpy

    assert _numpy.levels()[-1] == "scalar" and _numpy.level() in _numpy.levels() and _numpy.reason()
    with pytest.raises(ValueError, match=r"level is 'sse9'; available here: .*scalar"):
        _numpy.nf4_quantize(np.zeros(4, np.float32), level="sse9")


@needs_library
def test_tables() -> None:
    from tlkernels import _numpy

    assert same_bits(_numpy.nf4_code(), np.array(tnp.NF4_CODE, np.float32))
    assert same_bits(_numpy.dynamic_code(), formula.dynamic_table().numpy())


# ---- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize(kernels: SimpleNamespace, dtype: str, block_size: int) -> None:
    for shape in SHAPES:
        w = randn(*shape, dtype=dtype)
        packed, absmax = kernels.nf4_quantize(w, block_size=block_size, dtype=dtype)
        want = formula.nf4_quantize(to_torch(w, dtype), block_size)
        assert same_bits(packed, want[0].numpy()) and same_bits(absmax, want[1].numpy()), shape


@pytest.mark.parametrize("code", ["nf4", "fp4", "learned", "degenerate"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_adversarial(kernels: SimpleNamespace, dtype: str, code: str) -> None:
    table = {
        "nf4": np.array(tnp.NF4_CODE, "f4"),
        "fp4": np.array(tnp.FP4_CODE, "f4"),
        "learned": randn(16, seed=3),
        "degenerate": np.resize(np.array([0.5, -1, 0, 1], "f4"), 16),
    }[code]
    w = to_storage(torch.from_numpy(adversarial()).to(torch_dtype(dtype)))
    packed, absmax = kernels.nf4_quantize(w, table, dtype=dtype)
    want = formula.nf4_quantize(to_torch(w, dtype), 64, torch.from_numpy(table))
    assert same_bits(packed, want[0].numpy()) and same_bits(absmax, want[1].numpy())


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 5000])
@pytest.mark.parametrize("block_size", [32, 256, 4096])
def test_double_quantization(kernels: SimpleNamespace, n: int, block_size: int) -> None:
    absmax = np.abs(randn(n)) * np.float32(0.02)
    for offset in (None, np.array(0.01, "f4"), np.array([-3.5], "f4")):
        q, scale, mean = kernels.absmax_quantize(absmax, offset, block_size=block_size)
        given = None if offset is None else torch.from_numpy(offset).reshape(())
        want = formula.absmax_quantize(torch.from_numpy(absmax), block_size, given)
        assert mean.shape == () and all(same_bits(a, b.numpy()) for a, b in zip((q, scale, mean), want, strict=True))
        decoded = kernels.absmax_dequantize(q, scale, mean, block_size=block_size)
        assert same_bits(decoded, formula.absmax_dequantize(*want, block_size).numpy())


def test_every_scale_code_decodes(kernels: SimpleNamespace) -> None:
    q, scale = np.arange(256, dtype=np.uint8), np.array([0.37], "f4")
    want = formula.absmax_dequantize(*map(torch.from_numpy, (q, scale)), torch.tensor(0.11)).numpy()
    assert same_bits(kernels.absmax_dequantize(q, scale, np.array(0.11, "f4")), want)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(kernels: SimpleNamespace, dtype: str, nested: bool) -> None:
    for shape in SHAPES:
        for block_size in (32, 64, 4096):
            weight, dense = quantized(shape, nested, block_size)
            want = to_storage(dense.to(torch_dtype(dtype)))
            numel = dense.numel()
            got = kernels.nf4_dequantize(*weight, numel, dtype=dtype, block_size=block_size)
            assert same_bits(got.reshape(shape), want), (shape, block_size)
            poison = (
                np.full(numel + 2, 0xFF, want.dtype) if dtype == "bfloat16" else np.full(numel + 2, np.nan, want.dtype)
            )
            guard = poison.copy()
            out = poison[1:-1]
            assert kernels.nf4_dequantize(*weight, numel, dtype=dtype, block_size=block_size, out=out) is out
            assert same_bits(out.reshape(shape), want), (shape, block_size)
            assert same_bits(poison[[0, -1]], guard[[0, -1]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_adversarial(kernels: SimpleNamespace, dtype: str) -> None:
    packed, absmax = formula.nf4_quantize(torch.from_numpy(adversarial()))
    numel = adversarial().size
    got = kernels.nf4_dequantize(packed.numpy(), absmax.numpy(), None, None, None, numel, dtype=dtype)
    want = formula.nf4_dequantize(packed, absmax, (numel,), torch_dtype(dtype))
    got = to_torch(got, dtype)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()
    bits = torch.int32 if dtype == "float32" else torch.int16
    assert torch.equal(got.view(bits)[~got.isnan()], want.view(bits)[~want.isnan()])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 17, 130])
def test_products(kernels: SimpleNamespace, rows: int, dtype: str, nested: bool) -> None:
    for out_features, in_features in ((1, 1), (48, 32), (65, 129), (128, 320), (7, 1)):
        weight, dense = quantized((out_features, in_features), nested, 64)
        sizes = (out_features, in_features)
        x, bias = randn(rows, in_features, dtype=dtype), randn(out_features, seed=1)
        for b in (None, bias):
            y = kernels.nf4_linear(x, *weight, b, *sizes, dtype=dtype)
            tb = None if b is None else torch.from_numpy(b)
            if rows:
                assert_product(to_torch(y, dtype), to_torch(x, dtype), dense, tb, f"{sizes}")
            assert y.shape == (rows, out_features)
        grad = randn(rows, out_features, dtype=dtype)
        g = kernels.nf4_linear_t(grad, *weight, *sizes, dtype=dtype)
        assert g.shape == (rows, in_features)
        if rows:
            assert_product(to_torch(g, dtype), to_torch(grad, dtype), dense.T, None, f"{sizes}")


@pytest.mark.parametrize("out_features, in_features", [(0, 5), (5, 0), (0, 0)])
def test_products_of_nothing(kernels: SimpleNamespace, out_features: int, in_features: int) -> None:
    weight, _ = quantized((out_features, in_features))
    bias = np.arange(out_features, dtype="f4")
    y = kernels.nf4_linear(np.ones((3, in_features), "f4"), *weight, bias, out_features, in_features)
    assert y.shape == (3, out_features) and (y == bias).all()
    g = kernels.nf4_linear_t(np.ones((3, out_features), "f4"), *weight, out_features, in_features)
    assert g.shape == (3, in_features) and (g == 0).all()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(kernels: SimpleNamespace, dtype: str, nested: bool) -> None:
    for dim in (1, 3, 32, 65, 384):
        weight, dense = quantized((50, dim), nested)
        indices = np.array([0, 49, 7, 7, 31], np.int64)
        for chosen in (indices, indices[:0]):
            got = kernels.nf4_embedding(chosen, *weight, 50, dim, dtype=dtype)
            assert same_bits(got, to_storage(dense[torch.from_numpy(chosen)].to(torch_dtype(dtype))))


@given(
    shape=st.lists(st.integers(0, 23), max_size=3).map(tuple),
    block_size=st.sampled_from([32, 64, 128, 1024]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-40, 1e-20, 1.0, 1e30]),
)
def test_any_weight_at_every_level(
    shape: tuple[int, ...], block_size: int, dtype: str, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = to_storage((torch.randn(shape, generator=generator) * scale).to(torch_dtype(dtype)))
    want = formula.nf4_quantize(to_torch(w, dtype), block_size)
    for name, kernels in IMPLEMENTATIONS.items():
        packed, absmax = kernels.nf4_quantize(w, block_size=block_size, dtype=dtype)
        assert same_bits(packed, want[0].numpy()) and same_bits(absmax, want[1].numpy()), name
        got = kernels.nf4_dequantize(packed, absmax, None, None, None, w.size, dtype=dtype, block_size=block_size)
        dense = formula.nf4_dequantize(*want, shape, torch_dtype(dtype), block_size)
        assert same_bits(got.reshape(shape), to_storage(dense)), name


# ---- threads, processes, the GIL ------------------------------------------------------------------------------------


def _every_result(kernels: SimpleNamespace, dtype: str) -> list[np.ndarray]:
    """Large enough that every kernel cuts its work."""
    w = randn(512, 1031, dtype=dtype)
    packed, absmax = kernels.nf4_quantize(w, dtype=dtype)
    q, scale, offset = kernels.absmax_quantize(absmax)
    weight = (packed, q, None, scale, offset)
    x, grad = randn(70, 1031, dtype=dtype, seed=1), randn(70, 512, dtype=dtype, seed=2)
    return [
        packed, absmax, q, scale, offset, kernels.absmax_dequantize(q, scale, offset),
        kernels.nf4_dequantize(*weight, w.size, dtype=dtype),
        kernels.nf4_embedding(np.arange(512)[::-1].copy(), *weight, 512, 1031, dtype=dtype),
        *(kernels.nf4_linear(x[:r], *weight, None, 512, 1031, dtype=dtype) for r in (1, 5, 70)),
        *(kernels.nf4_linear_t(grad[:r], *weight, 512, 1031, dtype=dtype) for r in (1, 5, 70)),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(
    kernels: SimpleNamespace, threads: Callable[[int], None], dtype: str
) -> None:
    threads(1)
    want = _every_result(kernels, dtype)
    for n in (2, 3):
        threads(n)
        assert all(same_bits(a, b) for a, b in zip(_every_result(kernels, dtype), want, strict=True)), n


@needs_library
def test_set_num_threads(threads: Callable[[int], None]) -> None:
    threads(5)
    assert tnp.get_num_threads() == 5
    for n in (0, -1, 1025, 2**70):
        with pytest.raises(ValueError, match=f"n is {n}; expected an integer from 1 to 1024"):
            threads(n)
    with pytest.raises(TypeError, match=r"n is 1.5; expected an integer"):
        threads(1.5)
    assert tnp.get_num_threads() == 5


@needs_library
def test_workers_come_and_go_with_the_setting(threads: Callable[[int], None]) -> None:
    w = randn(1 << 20)

    def running() -> int:
        tnp.nf4_quantize(w)
        return len(os.listdir("/proc/self/task"))

    threads(2)
    pair = running()
    threads(4)
    assert running() == pair + 2
    threads(2)
    assert running() == pair


def _run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )


@needs_library
def test_number_of_threads_from_the_environment() -> None:
    # without torch: its import is slow and none of this needs it
    code = "import sys; sys.modules['torch'] = None; import tlkernels.numpy as t; print(t.get_num_threads())"
    assert _run(code, TLKERNELS_NUM_THREADS="3").stdout.strip() == "3"
    one_core = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    assert _run(one_core + code, TLKERNELS_NUM_THREADS="").stdout.strip() == "1"
    assert _run(code, TLKERNELS_NUM_THREADS="").stdout.strip() == str(len(os.sched_getaffinity(0)))
    for wrong in ("0", "-2", "two", "1.5", "99999999999999999999"):
        failed = _run(code, TLKERNELS_NUM_THREADS=wrong)
        assert f"ValueError: TLKERNELS_NUM_THREADS is '{wrong}'; expected an integer from 1 to 1024" in failed.stderr


def _child(w: np.ndarray, connection: Any) -> None:
    packed, absmax, *_ = tnp.nf4_quantize(w)
    connection.send((packed.tobytes(), absmax.tobytes(), tnp.get_num_threads(), len(os.listdir("/proc/self/task"))))


@needs_library
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_its_own_pool(threads: Callable[[int], None]) -> None:
    """Also when the fork falls into a call of another thread, with the pool's mutex held or its workers busy."""
    threads(3)
    w = randn(1 << 18)
    packed, absmax, *_ = tnp.nf4_quantize(w)
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            tnp.nf4_quantize(w)

    worker = threading.Thread(target=busy)
    worker.start()
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(10):
            receive, send = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(w, send))
            child.start()
            assert receive.poll(60), "the child hangs"
            *bits, count, tasks = receive.recv()
            assert bits == [packed.tobytes(), absmax.tobytes()] and count == 3 and tasks == 3
            child.join(60)
            assert child.exitcode == 0
    finally:
        stop.set()
        worker.join()


@needs_library
def test_the_gil_is_released() -> None:
    """With a switch interval of minutes another thread runs only if a call lets go of the GIL by itself."""
    w = randn(1 << 22)
    go, ran = threading.Lock(), []
    go.acquire()

    def other() -> None:
        with go:
            ran.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    before = sys.getswitchinterval()
    sys.setswitchinterval(300)
    try:
        go.release()
        held = not ran  # nothing has let the other thread in so far
        for _ in range(50):
            tnp.nf4_quantize(w)
        assert held and ran
    finally:
        sys.setswitchinterval(before)
        thread.join()


@needs_library
def test_calls_from_many_threads(threads: Callable[[int], None]) -> None:
    threads(2)
    inputs = [randn(1 << 16, seed=i) for i in range(8)]
    want = [tnp.nf4_quantize(w) for w in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            got = tnp.nf4_quantize(inputs[i])
            if not (same_bits(got.packed, want[i].packed) and same_bits(got.absmax, want[i].absmax)):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# ---- wrong calls: the compiled library and plain NumPy say the same -------------------------------------------------

F4, U1 = np.float32, np.uint8


def _weight(**changes: Any) -> tuple[Any, ...]:
    parts = {"packed": np.zeros(32, U1), "absmax": np.ones(1, F4), "code": None, "scale": None, "offset": None}
    return tuple({**parts, **changes}.values())


NESTED = {"absmax": np.zeros(1, U1), "scale": np.ones(1, F4), "offset": np.array(0, F4)}

WRONG: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "w a list": ("nf4_quantize", ([1.0],), {}, TypeError, "w is a list; expected a NumPy array of float32"),
    "w float64": ("nf4_quantize", (np.zeros(3),), {}, TypeError, "w has dtype float64; expected float32"),
    "w int": ("nf4_quantize", (np.zeros(3, int),), {}, TypeError, "w has dtype int64; expected float32"),
    "w byte order": ("nf4_quantize", (np.zeros(3, ">f4"),), {}, TypeError, "w has dtype >f4; expected float32"),
    "w not bfloat16": (
        "nf4_quantize",
        (np.zeros(3, F4),),
        {"dtype": "bfloat16"},
        TypeError,
        "w has dtype float32; expected uint16 (the bits of bfloat16)",
    ),
    "w strided": ("nf4_quantize", (np.zeros((4, 4), F4)[:, ::2],), {}, ValueError, "w is not contiguous"),
    "dtype": ("nf4_quantize", (np.zeros(3, F4),), {"dtype": "int8"}, TypeError, "dtype is 'int8'; expected 'float32'"),
    **{
        f"block_size {b}": (
            "nf4_quantize",
            (np.zeros(99, F4),),
            {"block_size": b},
            ValueError,
            f"block_size is {b}; expected a power of two from 32 to 4096",
        )
        for b in (0, -64, 16, 48, 8192, -(2**63))
    },
    "code short": (
        "nf4_quantize",
        (np.zeros(3, F4), np.zeros(15, F4)),
        {},
        ValueError,
        "code has shape (15,); expected (16,)",
    ),
    "code 2-d": ("nf4_quantize", (np.zeros(3, F4), np.zeros((4, 4), F4)), {}, ValueError, "code has shape (4, 4)"),
    "code float64": ("nf4_quantize", (np.zeros(3, F4), np.zeros(16)), {}, TypeError, "code has dtype float64"),
    "code nan": (
        "nf4_quantize",
        (np.zeros(3, F4), np.full(16, np.nan, F4)),
        {},
        ValueError,
        "code has entries that are not finite",
    ),
    "code inf": (
        "nf4_quantize",
        (np.zeros(3, F4), np.full(16, np.inf, F4)),
        {},
        ValueError,
        "code has entries that are not finite",
    ),
    "scales 2-d": (
        "absmax_quantize",
        (np.zeros((2, 2), F4),),
        {},
        ValueError,
        "absmax has shape (2, 2); expected (n,)",
    ),
    "scales float64": ("absmax_quantize", (np.zeros(2),), {}, TypeError, "absmax has dtype float64; expected float32"),
    "offsets": (
        "absmax_quantize",
        (np.zeros(2, F4), np.zeros(2, F4)),
        {},
        ValueError,
        "offset has 2 elements; expected 1",
    ),
    "q int8": (
        "absmax_dequantize",
        (np.zeros(2, "i1"), np.ones(1, F4), np.ones(1, F4)),
        {},
        TypeError,
        "q has dtype int8; expected uint8",
    ),
    "scale short": (
        "absmax_dequantize",
        (np.zeros(257, U1), np.ones(1, F4), np.ones(1, F4)),
        {},
        ValueError,
        "scale has shape (1,); expected (2,): 257 scales in blocks of 256",
    ),
    "packed short": (
        "nf4_dequantize",
        (*_weight(packed=np.zeros(31, U1)), 64),
        {},
        ValueError,
        "packed holds 31 bytes; expected 32 for 64 elements of 4 bits",
    ),
    "packed long": ("nf4_dequantize", (*_weight(packed=np.zeros(33, U1)), 64), {}, ValueError, "packed holds 33 bytes"),
    "packed int8": (
        "nf4_dequantize",
        (*_weight(packed=np.zeros(32, "i1")), 64),
        {},
        TypeError,
        "packed has dtype int8",
    ),
    "absmax short": (
        "nf4_dequantize",
        (*_weight(packed=np.zeros(33, U1)), 65),
        {},
        ValueError,
        "absmax has shape (1,); expected (2,): 65 elements in blocks of 64",
    ),
    "absmax long": (
        "nf4_dequantize",
        (*_weight(absmax=np.ones(2, F4)), 64),
        {},
        ValueError,
        "absmax has shape (2,); expected (1,)",
    ),
    "absmax float16": (
        "nf4_dequantize",
        (*_weight(absmax=np.ones(1, "f2")), 64),
        {},
        TypeError,
        "absmax has dtype float16; expected float32, or uint8 (double-quantized)",
    ),
    "no scale": (
        "nf4_dequantize",
        (*_weight(absmax=np.zeros(1, U1)), 64),
        {},
        ValueError,
        "expected absmax_scale and absmax_offset",
    ),
    "scale for nothing": (
        "nf4_dequantize",
        (*_weight(scale=np.ones(1, F4)), 64),
        {},
        TypeError,
        "absmax_scale and absmax_offset go with a uint8 absmax",
    ),
    "nested scale long": (
        "nf4_dequantize",
        (*_weight(**{**NESTED, "scale": np.ones(2, F4)}), 64),
        {},
        ValueError,
        "absmax_scale has shape (2,); expected (1,)",
    ),
    "nested scale float64": (
        "nf4_dequantize",
        (*_weight(**{**NESTED, "scale": np.ones(1)}), 64),
        {},
        TypeError,
        "absmax_scale has dtype float64",
    ),
    "nested offsets": (
        "nf4_dequantize",
        (*_weight(**{**NESTED, "offset": np.ones(0, F4)}), 64),
        {},
        ValueError,
        "absmax_offset has 0 elements; expected 1",
    ),
    "absmax_block_size": (
        "nf4_dequantize",
        (*_weight(), 64),
        {"absmax_block_size": 100},
        ValueError,
        "absmax_block_size is 100; expected a power of two",
    ),
    "numel negative": ("nf4_dequantize", (*_weight(), -1), {}, ValueError, "numel is -1; expected >= 0"),
    "numel huge": (
        "nf4_dequantize",
        (*_weight(), 2**62),
        {},
        ValueError,
        "numel is 4611686018427387904; expected less than 2**62",
    ),
    "out short": (
        "nf4_dequantize",
        (*_weight(), 64),
        {"out": np.zeros(63, F4)},
        ValueError,
        "out has 63 elements; expected 64",
    ),
    "out float64": (
        "nf4_dequantize",
        (*_weight(), 64),
        {"out": np.zeros(64)},
        TypeError,
        "out has dtype float64; expected float32",
    ),
    "out strided": (
        "nf4_dequantize",
        (*_weight(), 64),
        {"out": np.zeros(128, F4)[::2]},
        ValueError,
        "out is not contiguous",
    ),
    "index high": (
        "nf4_embedding",
        (np.array([0, 8]), *_weight(), 8, 8),
        {},
        IndexError,
        "indices has an entry 8; expected 0 <= index < 8",
    ),
    "index negative": ("nf4_embedding", (np.array([-1]), *_weight(), 8, 8), {}, IndexError, "indices has an entry -1"),
    "index of nothing": (
        "nf4_embedding",
        (np.array([0]), np.zeros(0, U1), np.zeros(0, F4), None, None, None, 0, 8),
        {},
        IndexError,
        "expected 0 <= index < 0",
    ),
    "indices int32": (
        "nf4_embedding",
        (np.zeros(1, "i4"), *_weight(), 8, 8),
        {},
        TypeError,
        "indices has dtype int32; expected int64",
    ),
    "rows negative": (
        "nf4_embedding",
        (np.array([0]), *_weight(), -8, 8),
        {},
        ValueError,
        "num_embeddings is -8; expected >= 0",
    ),
    "product huge": (
        "nf4_linear",
        (np.zeros((1, 8), F4), *_weight(), None, 2**40, 2**40),
        {},
        ValueError,
        "out_features * in_features is 1099511627776 * 1099511627776; expected less than 2**62",
    ),
    "x 1-d": (
        "nf4_linear",
        (np.zeros(8, F4), *_weight(), None, 8, 8),
        {},
        ValueError,
        "x has shape (8,); expected (rows, 8)",
    ),
    "x wide": (
        "nf4_linear",
        (np.zeros((2, 9), F4), *_weight(), None, 8, 8),
        {},
        ValueError,
        "x has shape (2, 9); expected (rows, 8)",
    ),
    "bias short": (
        "nf4_linear",
        (np.zeros((2, 8), F4), *_weight(), np.zeros(7, F4), 8, 8),
        {},
        ValueError,
        "bias has shape (7,); expected (8,)",
    ),
    "bias float64": (
        "nf4_linear",
        (np.zeros((2, 8), F4), *_weight(), np.zeros(8), 8, 8),
        {},
        TypeError,
        "bias has dtype float64; expected float32",
    ),
    "features": (
        "nf4_linear_t",
        (np.zeros((2, 9), F4), *_weight(), 8, 8),
        {},
        ValueError,
        "grad_output has shape (2, 9); expected (rows, 8)",
    ),
    "in_features": (
        "nf4_linear_t",
        (np.zeros((2, 8), F4), *_weight(), 8, -8),
        {},
        ValueError,
        "in_features is -8; expected >= 0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(kernels: SimpleNamespace, case: str) -> None:
    function, args, kwargs, error, message = WRONG[case]
    with pytest.raises(error) as caught:
        getattr(kernels, function)(*args, **kwargs)
    said = str(caught.value)
    assert said.startswith(f"{function}: ") and message in said
    with pytest.raises(error) as reference:
        getattr(_numpy_reference, function)(*args, **kwargs)
    assert said == str(reference.value)


def test_out_may_not_be_read_only_or_shared(kernels: SimpleNamespace) -> None:
    frozen = np.zeros(64, F4)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        kernels.nf4_dequantize(*_weight(), 64, out=frozen)
    memory = np.zeros(288, U1)
    with pytest.raises(ValueError, match="out shares memory with an input"):
        kernels.nf4_dequantize(*_weight(packed=memory[240:272]), 64, out=memory[:256].view(F4))
    assert kernels.nf4_dequantize(*_weight(packed=memory[256:]), 64, out=memory[:256].view(F4)) is not None


# ---- the public functions -------------------------------------------------------------------------------------------


def test_strides_do_not_matter() -> None:
    w = randn(48, 80)
    want = tnp.nf4_quantize(w.copy())
    for view in (np.asfortranarray(w), np.repeat(w, 2, 1)[:, ::2], w[::-1][::-1], w.astype(">f4"), w.tolist()):
        got = tnp.nf4_quantize(view)
        assert same_bits(got.packed, want.packed) and same_bits(got.absmax, want.absmax) and got.shape == (48, 80)
    flipped = tnp.nf4_quantize(w.T)
    assert same_bits(flipped.packed, tnp.nf4_quantize(w.T.copy()).packed) and flipped.shape == (80, 48)
    x = randn(80, 6)
    assert same_bits(tnp.nf4_linear(x.T, want), tnp.nf4_linear(x.T.copy(), want))


@pytest.mark.parametrize("shape", [(), (0,), (0, 7), (1,), (5, 1, 3)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    w = randn(*shape)
    for nested in (False, True):
        weight = tnp.nf4_quantize(w, double_quant=nested)
        back = tnp.nf4_dequantize(weight)
        assert weight.shape == back.shape == shape and back.dtype == np.float32
        assert np.abs(back - w).max(initial=0.0) <= 0.2 * np.abs(w).max(initial=0.0)


def test_float64() -> None:
    w = randn(40, 70).astype(np.float64)
    weight = tnp.nf4_quantize(w)
    assert weight.dtype == np.float64 and same_bits(weight.packed, tnp.nf4_quantize(w.astype("f4")).packed)
    dense = tnp.nf4_dequantize(weight)
    assert dense.dtype == np.float64 and (dense == tnp.nf4_dequantize(weight, np.float32)).all()
    x, bias, grad = (randn(*s, seed=i).astype(np.float64) for i, s in enumerate([(2, 3, 70), (40,), (2, 3, 40)]))
    np.testing.assert_allclose(tnp.nf4_linear(x, weight, bias), x @ dense.T + bias, rtol=1e-14)
    np.testing.assert_allclose(tnp.nf4_linear_t(grad, weight), grad @ dense, rtol=1e-14)
    assert (tnp.nf4_embedding([[3, 39]], weight) == dense[[[3, 39]]]).all()
    out = np.full((40, 70), np.nan)
    assert tnp.nf4_dequantize(weight, out=out) is out and (out == dense).all()
    huge = tnp.nf4_quantize(np.array([1e300, 1.0]))  # float32 infinity
    assert np.isposinf(tnp.nf4_dequantize(huge)[0])


def test_bfloat16_as_bits_and_as_ml_dtypes() -> None:
    bits = randn(48, 64, dtype="bfloat16")
    array = bits.view(ml_dtypes.bfloat16)
    weight, typed = tnp.nf4_quantize(bits, dtype="bfloat16"), tnp.nf4_quantize(array)
    assert same_bits(weight.packed, typed.packed) and weight.dtype == "bfloat16" and typed.dtype == array.dtype
    back = tnp.nf4_dequantize(weight)
    assert back.dtype == np.uint16 and tnp.nf4_dequantize(typed).dtype == array.dtype
    assert (tnp.nf4_dequantize(typed).view(np.uint16) == back).all()
    assert (tnp.nf4_dequantize(weight, ml_dtypes.bfloat16).view(np.uint16) == back).all()
    assert (tnp.nf4_dequantize(tnp.nf4_quantize(array.astype("f4")), "bfloat16") == back).all()
    for out in (np.zeros_like(bits), np.zeros_like(array)):
        assert tnp.nf4_dequantize(weight, out=out) is out and (out.view(np.uint16) == back).all()
    x, bias = bits[:3], randn(48, dtype="bfloat16", seed=4)
    y = tnp.nf4_linear(x, weight, bias, dtype="bfloat16")
    typed_y = tnp.nf4_linear(x.view(array.dtype), typed, bias.view(array.dtype))
    assert y.dtype == np.uint16 and typed_y.dtype == array.dtype and (typed_y.view(np.uint16) == y).all()
    dense = to_torch(tnp.nf4_dequantize(weight, "float32"), "float32")
    assert_product(to_torch(y, "bfloat16"), to_torch(x, "bfloat16"), dense, to_torch(bias, "bfloat16").float())
    assert tnp.nf4_embedding([1], typed).dtype == array.dtype
    assert tnp.nf4_linear_t(randn(2, 48, dtype="bfloat16"), weight, dtype="bfloat16").dtype == np.uint16


def test_packed_layouts() -> None:
    weight = tnp.nf4_quantize(randn(16, 16), double_quant=True)
    want = tnp.nf4_dequantize(weight)
    packed = weight.packed
    for same in (packed[:, None], packed[None], packed.view("f4"), packed.view("f2"), packed.view(ml_dtypes.bfloat16)):
        assert same_bits(tnp.nf4_dequantize(weight._replace(packed=same)), want)
    assert weight.nbytes == 128 + 4 + 4 + 4


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_same_bits_as_the_torch_ops(dtype: str, double_quant: bool) -> None:
    w = torch.randn(65, 96, generator=torch.Generator().manual_seed(5)).to(torch_dtype(dtype))
    ours = tnp.nf4_quantize(to_storage(w), double_quant=double_quant, dtype=dtype)
    theirs = tlkernels.ops.nf4_quantize(w, double_quant=double_quant)
    for name in ("packed", "absmax", "absmax_scale", "absmax_offset"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None and b is None) or same_bits(a, b.numpy()), name
    assert same_bits(tnp.nf4_dequantize(ours), to_storage(tlkernels.ops.nf4_dequantize(theirs)))
    assert ours.nbytes == theirs.nbytes


WEIGHT = tnp.nf4_quantize(randn(8, 8))
WRONG_PUBLIC: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "w int": (lambda: tnp.nf4_quantize(np.zeros(3, int)), TypeError, "w has dtype int64; expected float32, bfloat16"),
    "w uint16": (lambda: tnp.nf4_quantize(np.zeros(3, "u2")), TypeError, 'give dtype="bfloat16"'),
    "w text": (lambda: tnp.nf4_quantize("w"), TypeError, "w has dtype <U1"),
    "dtype differs": (
        lambda: tnp.nf4_quantize(np.zeros(3, F4), dtype="float16"),
        TypeError,
        "dtype is float16, but w has dtype float32",
    ),
    "dtype unknown": (lambda: tnp.nf4_dequantize(WEIGHT, "float8"), TypeError, "dtype is 'float8'; expected float32"),
    "block_size text": (
        lambda: tnp.nf4_quantize(np.zeros(3, F4), block_size="64"),
        TypeError,
        "block_size is '64'; expected an integer",
    ),
    "block_size huge": (
        lambda: tnp.nf4_quantize(np.zeros(3, F4), block_size=2**80),
        ValueError,
        "expected a power of two",
    ),
    "not a weight": (lambda: tnp.nf4_dequantize(np.zeros(3)), TypeError, "weight is a ndarray; expected an NF4Array"),
    "not a matrix": (
        lambda: tnp.nf4_linear(np.zeros(3, F4), tnp.nf4_quantize(np.zeros(3, F4))),
        ValueError,
        "expected a matrix",
    ),
    "shape negative": (lambda: tnp.nf4_dequantize(WEIGHT._replace(shape=(-8, -8))), ValueError, "expected sizes >= 0"),
    "shape huge": (
        lambda: tnp.nf4_dequantize(WEIGHT._replace(shape=(2**40, 2**40))),
        ValueError,
        "expected fewer than 2**62",
    ),
    "shape wrong": (
        lambda: tnp.nf4_dequantize(WEIGHT._replace(shape=(8, 9))),
        ValueError,
        "packed holds 32 bytes; expected 36",
    ),
    "packed int": (
        lambda: tnp.nf4_dequantize(WEIGHT._replace(packed=np.zeros(4, int))),
        TypeError,
        "packed has dtype int64",
    ),
    "features": (
        lambda: tnp.nf4_linear(np.zeros((2, 9), F4), WEIGHT),
        ValueError,
        "x has 9 features, but the weight was quantized from shape (8, 8); expected x.shape[-1] == 8",
    ),
    "x scalar": (lambda: tnp.nf4_linear(1.0, WEIGHT), ValueError, "x has 0 features"),
    "bias": (
        lambda: tnp.nf4_linear(np.zeros((2, 8), F4), WEIGHT, np.zeros((8, 1))),
        ValueError,
        "bias has shape (8, 1); expected (8,)",
    ),
    "grad": (lambda: tnp.nf4_linear_t(np.zeros((2, 9), F4), WEIGHT), ValueError, "grad_output has 9 features"),
    "indices float": (
        lambda: tnp.nf4_embedding([0.5], WEIGHT),
        TypeError,
        "indices has dtype float64; expected int64 or int32",
    ),
    "out type": (lambda: tnp.nf4_dequantize(WEIGHT, out=[0]), TypeError, "out is a list"),
    "out shape": (
        lambda: tnp.nf4_dequantize(WEIGHT, out=np.zeros(64, F4)),
        ValueError,
        "out has shape (64,); expected (8, 8)",
    ),
    "out strides": (
        lambda: tnp.nf4_dequantize(WEIGHT, out=np.zeros((8, 8), F4).T[:]),
        ValueError,
        "expected a C-contiguous array",
    ),
    "out and dtype": (
        lambda: tnp.nf4_dequantize(WEIGHT, np.float16, out=np.zeros((8, 8), F4)),
        TypeError,
        "dtype is float16, but out has dtype float32",
    ),
    "out uint16": (lambda: tnp.nf4_dequantize(WEIGHT, out=np.zeros((8, 8), "u2")), TypeError, "out has dtype uint16"),
}


@pytest.mark.parametrize("case", WRONG_PUBLIC)
def test_wrong_calls_of_the_public_functions(case: str) -> None:
    call, error, message = WRONG_PUBLIC[case]
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_without_the_compiled_library() -> None:
    """One warning, and the same bits."""
    code = (
        "import sys, warnings, hashlib, numpy as np; sys.modules['torch'] = None; hide = {hide}\n"
        "if hide: sys.modules['tlkernels._numpy'] = None\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always'); import tlkernels.numpy as t; import tlkernels.numpy\n"
        "w = t.nf4_quantize(np.random.default_rng(0).standard_normal((65, 33)), double_quant=True)\n"
        "print(hashlib.sha256(b''.join(a.tobytes() for a in (*w[:2], *w[6:8]))).hexdigest(), len(said), t.LIBRARY)\n"
    )
    hidden, found = (_run(code.format(hide=hide)) for hide in (True, False))
    assert hidden.returncode == found.returncode == 0, hidden.stderr + found.stderr
    assert hidden.stdout.split()[1:] == ["1", "not", "built"]
    assert hidden.stdout.split()[0] == found.stdout.split()[0]


def test_import_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\nimport tlkernels, tlkernels.cli, numpy as np\n"
        "assert not hasattr(tlkernels, 'ops') and 'torch' in sys.modules and sys.modules['torch'] is None\n"
        "assert tlkernels.numpy.nf4_quantize(np.ones(4)).packed.tolist() == [0xFF, 0xFF]\n"
    )
    done = _run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(ctypes, "pythonapi"), reason="reference counts are CPython's")
def test_wrong_calls_leak_nothing(kernels: SimpleNamespace) -> None:
    w = np.zeros(64, F4)
    before = sys.getrefcount(w)
    for _ in range(100):
        with pytest.raises(ValueError):
            kernels.nf4_quantize(w, block_size=48)
        kernels.nf4_quantize(w)
    assert sys.getrefcount(w) == before
