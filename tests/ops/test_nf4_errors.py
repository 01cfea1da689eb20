"""Wrong calls: each raises, and the sentence names the op, the argument, what it got and what it wants.

One table serves the compiled kernels, the reference and meta tensors (so a wrong call fails while tracing, too).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from wrong_calls import ERRORS, Wrong, longer, shorter, to

import tlkernels
from tlkernels import ops
from tlkernels.ops import NF4Weight

OUT, IN = 12, 80  # 960 elements: 480 bytes, 15 blocks of 64
WEIGHT_OPS = ("nf4_dequantize", "nf4_dequantize.out", "nf4_linear", "nf4_linear_t", "nf4_embedding")
MATRIX_SIZES = {
    "nf4_linear": ("out_features", "in_features"),
    "nf4_linear_t": ("out_features", "in_features"),
    "nf4_embedding": ("num_embeddings", "embedding_dim"),
}


def row(t: Tensor) -> Tensor:
    return t[None]


def holding(value: float, at: int = 3) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[at] = value
        return t

    return change


def wrong_block_sizes(op: str, name: str = "block_size") -> Iterator[Wrong]:
    for size in (0, 1, -64, 16, 48, 96, 4095, 8192, 2**40, -(2**63)):
        yield Wrong(op, ValueError, (f"{name} is {size};", "power of two from 32 to 4096"), {name: size})


def wrong_codes(op: str) -> Iterator[Wrong]:
    yield Wrong(op, ValueError, ("code has shape (15,)", "(16,)"), {"code": shorter})
    yield Wrong(op, ValueError, ("code has shape (17,)", "(16,)"), {"code": longer})
    yield Wrong(op, ValueError, ("code has shape (1, 16)", "(16,)"), {"code": row})
    yield Wrong(op, TypeError, ("code has dtype float64", "float32"), {"code": to(torch.float64)})
    yield Wrong(op, TypeError, ("code has dtype bfloat16", "float32"), {"code": to(torch.bfloat16)})
    for value in (float("nan"), float("inf"), float("-inf")):
        yield Wrong(op, ValueError, ("code", "finite"), {"code": holding(value)}, reads_values=True)


def wrong_second_level(op: str, nested: bool, scale: str, offset: str) -> Iterator[Wrong]:
    """What absmax_dequantize and the weight of every other op have in common; 15 scales are one block of 256."""
    for change, shape in ((shorter, "(0,)"), (longer, "(2,)"), (row, "(1, 1)")):
        yield Wrong(op, ValueError, (f"{scale} has shape {shape}", "(1,)"), {scale: change}, nested)
    for dtype in (torch.float64, torch.bfloat16, torch.int32):
        got = str(dtype).removeprefix("torch.")
        yield Wrong(op, TypeError, (scale, got, "float32"), {scale: to(dtype)}, nested)
        yield Wrong(op, TypeError, (offset, got, "float32"), {offset: to(dtype)}, nested)
    yield Wrong(op, ValueError, (f"{offset} has 2 elements", "1"), {offset: lambda t: t.expand(2)}, nested)
    yield Wrong(op, ValueError, (f"{offset} has 0 elements", "1"), {offset: lambda t: t.expand(1)[:0]}, nested)
    for name in (scale, offset):
        yield Wrong(op, ValueError, (f"{name} is on meta", "cpu"), {name: to("meta")}, nested)


def wrong_weights(op: str) -> Iterator[Wrong]:
    yield Wrong(op, ValueError, ("packed holds 479 bytes", "480"), {"packed": shorter})
    yield Wrong(op, ValueError, ("packed holds 481 bytes", "480"), {"packed": longer})
    yield Wrong(op, ValueError, ("packed holds 0 bytes", "480"), {"packed": lambda t: t[:0]})
    for dtype in (torch.int8, torch.int32, torch.float64, torch.bool):
        got = str(dtype).removeprefix("torch.")
        yield Wrong(op, TypeError, (f"packed has dtype {got}", "uint8"), {"packed": to(dtype)})
    for change, shape in ((shorter, "(14,)"), (longer, "(16,)"), (row, "(1, 15)"), (lambda t: t[:0], "(0,)")):
        yield Wrong(op, ValueError, (f"absmax has shape {shape}", "(15,)"), {"absmax": change})
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64):
        got = str(dtype).removeprefix("torch.")
        yield Wrong(op, TypeError, (f"absmax has dtype {got}", "float32"), {"absmax": to(dtype)})
    yield from wrong_block_sizes(op)
    yield from wrong_block_sizes(op, "absmax_block_size")
    yield Wrong(op, ValueError, ("absmax has shape (15,)", "(30,)", "32"), {"block_size": 32})  # of another block size
    yield from wrong_codes(op)
    for name in ("absmax", "code"):
        yield Wrong(op, ValueError, (f"{name} is on meta", "cpu"), {name: to("meta")})
    yield Wrong(op, ValueError, ("is on ", "meta", "cpu"), {"packed": to("meta")})  # may say that the others are on cpu
    yield Wrong(op, ValueError, ("absmax has dtype uint8", "absmax_scale"), {"absmax": to(torch.uint8)})
    yield Wrong(op, TypeError, ("absmax_scale", "float32"), {"absmax_scale": torch.ones(1)})
    yield Wrong(op, TypeError, ("absmax_offset", "float32"), {"absmax_offset": torch.ones(())})
    for name in ("absmax_scale", "absmax_offset"):
        yield Wrong(op, ValueError, ("absmax has dtype uint8", name), {name: None}, nested=True)
    yield from wrong_second_level(op, True, "absmax_scale", "absmax_offset")


def wrong_sizes(op: str) -> Iterator[Wrong]:
    rows, columns = MATRIX_SIZES[op]
    for name in (rows, columns):
        yield Wrong(op, ValueError, (f"{name} is -1;", ">= 0"), {name: -1})
    for a, b in ((2**32, 2**32), (2**31, 2**31), (2**63 - 1, 2), (2**63 - 1, 2**63 - 1), (3, 2**62)):
        yield Wrong(op, ValueError, (f"({a}, {b})", "2**62"), {rows: a, columns: b})


def wrong_product_inputs(op: str, name: str, features: int) -> Iterator[Wrong]:
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        got = str(dtype).removeprefix("torch.")
        yield Wrong(op, TypeError, (f"{name} has dtype {got}", "float32"), {name: to(dtype)})
    for n in (0, 1, features - 1):
        yield Wrong(op, ValueError, (f"{name} has {n} features", f"{features}"), {name: lambda t, n=n: t[:, :n]})
    yield Wrong(op, ValueError, (name, f"{features}"), {name: lambda t: t[0, 0]})
    yield Wrong(op, ValueError, (name, f"{features}"), {name: lambda t: t.t()})


def table() -> Iterator[Wrong]:
    for op in WEIGHT_OPS:
        yield from wrong_weights(op)
    for op in MATRIX_SIZES:
        yield from wrong_sizes(op)

    op = "nf4_quantize"
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        got = str(dtype).removeprefix("torch.")
        yield Wrong(op, TypeError, (f"w has dtype {got}", "float32"), {"w": to(dtype)})
    yield from wrong_block_sizes(op)
    yield from wrong_codes(op)
    yield Wrong(op, ValueError, ("code is on meta", "cpu"), {"code": to("meta")})

    op = "absmax_quantize"
    for dtype in (torch.float64, torch.bfloat16, torch.uint8):
        got = str(dtype).removeprefix("torch.")
        yield Wrong(op, TypeError, (f"absmax has dtype {got}", "float32"), {"absmax": to(dtype)})
        yield Wrong(op, TypeError, (f"offset has dtype {got}", "float32"), {"offset": torch.ones((), dtype=dtype)})
    yield Wrong(op, TypeError, ("absmax", "(1, 15)", "[n]"), {"absmax": row})
    yield Wrong(op, TypeError, ("offset", "2 elements"), {"offset": torch.ones(2)})
    yield Wrong(op, ValueError, ("offset is on meta", "cpu"), {"offset": torch.ones((), device="meta")})
    yield from wrong_block_sizes(op)

    op = "absmax_dequantize"
    for dtype in (torch.int8, torch.int64, torch.float32):
        got = str(dtype).removeprefix("torch.")
        yield Wrong(op, TypeError, (f"q has dtype {got}", "uint8"), {"q": to(dtype)})
    yield Wrong(op, TypeError, ("q", "(1, 15)", "[n]"), {"q": row})
    yield from wrong_block_sizes(op)
    yield from wrong_second_level(op, False, "scale", "offset")

    for op in ("nf4_dequantize", "nf4_dequantize.out"):
        shapes = ([-12, -80], [OUT, -IN], [-1], [2**32, 2**32], [2**21, 2**21, 2**21], [2**63 - 1, 2**63 - 1])
        for shape in shapes:
            yield Wrong(
                op, ValueError, ("shape", f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"), {"shape": shape}
            )
    for shape, want in (([OUT, IN + 1], 486), ([OUT], 6), ([], 1), ([2**30, 2**30], 2**59)):
        yield Wrong("nf4_dequantize", ValueError, ("packed holds 480 bytes", f"{want}"), {"shape": shape})
    for op in ("nf4_dequantize", "nf4_embedding"):
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
            got = str(dtype).removeprefix("torch.")
            yield Wrong(op, TypeError, (f"dtype is {got}", "float32"), {"dtype": dtype})

    op = "nf4_dequantize.out"
    for shape in ((OUT * IN,), (IN, OUT), (OUT, IN, 1), (OUT + 1, IN), (0,)):
        yield Wrong(op, ValueError, (f"out has shape {shape}", f"({OUT}, {IN})"), {"out": torch.empty(shape)})
    yield Wrong(op, TypeError, ("int32", "float32"), {"out": to(torch.int32)})
    yield Wrong(op, ValueError, (f"out has strides (1, {OUT})", "contiguous"), {"out": torch.empty(IN, OUT).t()})
    yield Wrong(op, ValueError, ("out has strides (0, 0)", "contiguous"), {"out": torch.empty(()).expand(OUT, IN)})
    yield Wrong(op, ValueError, ("out", "meta", "cpu"), {"out": to("meta")})

    yield from wrong_product_inputs("nf4_linear", "x", IN)
    yield from wrong_product_inputs("nf4_linear_t", "grad_output", OUT)
    op = "nf4_linear"
    for change, shape in ((shorter, "(11,)"), (longer, "(13,)"), (row, "(1, 12)"), (lambda t: t[0], "()")):
        yield Wrong(op, ValueError, (f"bias has shape {shape}", "(12,)"), {"bias": change})
    yield Wrong(op, TypeError, ("bias has dtype int64", "float32"), {"bias": to(torch.int64)})
    yield Wrong(op, ValueError, ("bias is on meta", "cpu"), {"bias": to("meta")})

    op = "nf4_embedding"
    for dtype in (torch.float32, torch.uint8, torch.int16, torch.bool):
        got = str(dtype).removeprefix("torch.")
        yield Wrong(op, TypeError, (f"indices has dtype {got}", "int64"), {"indices": to(dtype)})
    for index in (OUT, -1, 2**62, -(2**63)):
        says = ("indices", f"{index}", f"{OUT}")
        yield Wrong(op, IndexError, says, {"indices": holding(index)}, reads_values=True)
    for index in (OUT, -1, 2**31 - 1):
        says = ("indices", f"{index}", f"{OUT}")
        changes = {"indices": lambda t, index=index: holding(index)(t.int())}
        yield Wrong(op, IndexError, says, changes, reads_values=True)


TABLE = list(table())


def check(wrong: Wrong, arguments: dict[str, Any], errors: tuple[type[Exception], ...]) -> None:
    packet, _, overload = wrong.op.partition(".")
    with pytest.raises(errors) as caught:
        getattr(getattr(torch.ops.tlkernels, packet), overload or "default")(**arguments)
    sentence = str(caught.value)
    for words in (f"{packet}: ", *wrong.says):
        assert words in sentence, sentence


@pytest.mark.parametrize("wrong", TABLE, ids=str)
def test_wrong_call(backend: str, nf4_calls: Any, wrong: Wrong) -> None:
    right = nf4_calls(OUT, IN, nested=wrong.nested)[wrong.op]
    # the C++ side has one exception type, so from there a RuntimeError is right as well
    check(wrong, wrong.arguments(right), (wrong.error, RuntimeError) if backend == "cpu" else (wrong.error,))


@pytest.mark.parametrize("wrong", [w for w in TABLE if not w.reads_values], ids=str)
def test_wrong_call_while_tracing(nf4_calls: Any, wrong: Wrong) -> None:
    arguments = wrong.arguments(nf4_calls(OUT, IN, nested=wrong.nested)[wrong.op])
    if any("meta" in words for words in wrong.says):
        pytest.skip("this call is wrong in mixing meta tensors with others")
    meta = {
        k: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") if isinstance(v, Tensor) else v
        for k, v in arguments.items()
    }
    check(wrong, meta, (wrong.error,))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("op", [*WEIGHT_OPS, "nf4_quantize", "absmax_quantize", "absmax_dequantize"])
def test_the_call_that_the_table_changes_is_right(backend: str, nf4_calls: Any, op: str, nested: bool) -> None:
    packet, _, overload = op.partition(".")
    getattr(getattr(torch.ops.tlkernels, packet), overload or "default")(**nf4_calls(OUT, IN, nested=nested)[op])


def test_a_block_larger_than_the_tensor_is_right(backend: str) -> None:
    weight = ops.nf4_quantize(torch.randn(3, 2), block_size=4096)
    assert weight.absmax.shape == (1,) and ops.nf4_dequantize(weight).shape == (3, 2)
    assert ops.nf4_linear(torch.randn(2), weight).shape == (3,)


def test_a_size_of_zero_is_right_next_to_any_other(backend: str) -> None:
    weight = ops.nf4_quantize(torch.empty(0, 2**40, device="meta")).packed
    assert weight.shape == (0,)
    empty = NF4Weight(torch.empty(0, dtype=torch.uint8), torch.empty(0), (0, 2**40))
    assert ops.nf4_dequantize(empty).shape == (0, 2**40)
    with pytest.raises((IndexError, RuntimeError), match=r"indices has an entry 0; expected 0 <= index < 0"):
        ops.nf4_embedding(torch.tensor([0]), empty)


def test_public_functions_want_an_nf4_weight() -> None:
    dense, cube = torch.randn(4, 4), ops.nf4_quantize(torch.randn(2, 3, 4))
    x = torch.randn(1, 4)
    for name, call in {
        "nf4_linear": lambda w: ops.nf4_linear(x, w),
        "nf4_linear_t": lambda w: ops.nf4_linear_t(x, w),
        "nf4_embedding": lambda w: ops.nf4_embedding(torch.tensor([0]), w),
        "nf4_dequantize": lambda w: ops.nf4_dequantize(w),
    }.items():
        with pytest.raises(TypeError, match=rf"{name}: weight is a Tensor; expected an NF4Weight"):
            call(dense)
        if name != "nf4_dequantize":
            with pytest.raises(
                ValueError, match=rf"{name}: weight was quantized from shape \(2, 3, 4\); expected a matrix"
            ):
                call(cube)
    with pytest.raises(TypeError, match=r"nf4_dequantize: dtype is float16, but out has dtype float32"):
        ops.nf4_dequantize(cube, dtype=torch.float16, out=torch.empty(2, 3, 4))


def test_a_wrong_call_leaves_out_alone(backend: str) -> None:
    weight = ops.nf4_quantize(torch.randn(8, 64))
    out = torch.full((8, 64), 7.0)
    with pytest.raises(ERRORS):
        ops.nf4_dequantize(weight._replace(absmax=weight.absmax[:-1]), out=out)
    assert (out == 7.0).all()


def test_backends_are_named_in_the_error() -> None:
    with (
        pytest.raises(ValueError, match=r"backend: got 'fpga', expected one of reference, cpu, cuda, triton"),
        tlkernels.backend("fpga"),
    ):
        pass
