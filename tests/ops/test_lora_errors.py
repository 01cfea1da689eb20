"""Wrong calls: each raises, and the sentence names the op, the argument, what it got and what it wants.

One table serves the compiled kernels, the reference and meta tensors (so a wrong call fails while tracing, too).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from formula import same_bits
from torch import Tensor
from wrong_calls import ERRORS, Wrong, longer, shorter, to

from tlkernels import ops

OUT, IN, RANK, ADAPTERS, ROWS = 12, 80, 3, 4, 5  # 960 weights: 480 bytes, 15 blocks of 64
INTEGERS = (torch.int64, torch.uint8, torch.bool, torch.complex64)
NAN, INF = float("nan"), float("inf")


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def narrower(t: Tensor) -> Tensor:
    return t[..., :-1]


def row(t: Tensor) -> Tensor:
    return t[None]


def holding(value: float, at: int = 2) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[at] = value
        return t

    return change


SHAPES: dict[str, tuple[int, ...]] = {
    "x": (ROWS, IN), "grad_output": (ROWS, OUT), "s": (ROWS, RANK), "ds": (ROWS, RANK), "weight": (OUT, IN),
    "bias": (OUT,), "lora_a": (RANK, IN), "lora_b": (OUT, RANK), "adapter_ids": (ROWS,), "scalings": (ADAPTERS,),
    "ranks": (ADAPTERS,),
}  # fmt: skip
GROUPED_SHAPES = {**SHAPES, "lora_a": (ADAPTERS, RANK, IN), "lora_b": (ADAPTERS, OUT, RANK)}


def after(shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> str:
    return str(tuple(change(torch.empty(shape)).shape))


def wrong_floats(op: str, *names: str) -> Iterator[Wrong]:
    for name in names:
        for dtype in INTEGERS:
            says = (f"{name} has dtype {named(dtype)}", "float32")
            yield Wrong(op, TypeError, says, {name: to(dtype)})


def wrong_devices(op: str, *names: str) -> Iterator[Wrong]:
    for name in names:
        yield Wrong(op, ValueError, (f"{name} is on meta", "cpu"), {name: to("meta")})


def wrong_shapes(
    op: str, name: str, wanted: str, *changes: Callable[[Tensor], Tensor], grouped: bool = False
) -> Iterator[Wrong]:
    shape = (GROUPED_SHAPES if grouped else SHAPES)[name]
    for change in changes:
        says = (f"{name} has shape {after(shape, change)}", wanted)
        yield Wrong(op, ValueError, says, {name: change})


def wrong_rows(op: str, name: str) -> Iterator[Wrong]:
    """Of x and grad_output, where the weight says how many features they have."""
    features = SHAPES[name][-1]
    for n in (0, 1, features - 1):
        yield Wrong(op, ValueError, (f"{name} has {n} features", f"{features}"), {name: lambda t, n=n: t[:, :n]})
    yield Wrong(op, ValueError, (f"{name} has {features + 1} features", f"{features}"), {name: _wider})
    yield Wrong(op, ValueError, (name, f"{features}"), {name: lambda t: t[0, 0]})
    yield Wrong(op, ValueError, (f"{name} has {ROWS} features", f"{features}"), {name: lambda t: t.t()})


def _wider(t: Tensor) -> Tensor:
    return torch.cat([t, t[..., :1]], -1)


def wrong_factors(op: str) -> Iterator[Wrong]:
    yield from wrong_floats(op, "lora_a", "lora_b")
    yield from wrong_shapes(op, "lora_a", f"(rank, {IN})", narrower, _wider, row, lambda t: t[0], lambda t: t.t())
    yield from wrong_shapes(
        op, "lora_b", f"({OUT}, {RANK})", narrower, _wider, shorter, longer, row, lambda t: t[0], lambda t: t.t()
    )
    yield Wrong(op, ValueError, (f"lora_b has shape ({OUT}, 3)", f"({OUT}, 2)"), {"lora_a": shorter})
    yield Wrong(
        op, ValueError, ("lora_a has rank 0", "at least 1"), {"lora_a": lambda t: t[:0], "lora_b": lambda t: t[:, :0]}
    )


def wrong_dropout(op: str, name: str = "dropout") -> Iterator[Wrong]:
    for value in (1.0, 1.5, -1e-9, -1.0, INF, -INF, NAN):
        yield Wrong(op, ValueError, (f"{name} is {value:g}", "0 <=", "< 1"), {name: value})
    for dtype in (torch.int32, torch.uint8, torch.float32, torch.bool):
        yield Wrong(op, ValueError, (f"rng has dtype {named(dtype)}", "int64 (2,)"), {"rng": to(dtype)})
    for change, shape in ((shorter, "(1,)"), (longer, "(3,)"), (row, "(1, 2)"), (lambda t: t[0], "()")):
        yield Wrong(op, ValueError, ("rng", shape, "int64 (2,)"), {"rng": change})
    yield Wrong(op, ValueError, ("rng has dtype int32", "int64 (2,)"), {"rng": to(torch.int32), name: 0.0})
    if op != "lora_dropout_mask":
        yield Wrong(op, ValueError, ("rng is None", "0.25"), {"rng": None})
        yield from wrong_devices(op, "rng")


def wrong_weights(op: str) -> Iterator[Wrong]:
    """What test_nf4_errors.py tries on the ops of that family, in a shorter form."""
    for change, nbytes in ((shorter, 479), (longer, 481), (lambda t: t[:0], 0)):
        yield Wrong(op, ValueError, (f"packed holds {nbytes} bytes", "480"), {"packed": change})
    yield Wrong(op, TypeError, ("packed has dtype int32", "uint8"), {"packed": to(torch.int32)})
    for change, shape in ((shorter, "(14,)"), (longer, "(16,)"), (row, "(1, 15)")):
        yield Wrong(op, ValueError, (f"absmax has shape {shape}", "(15,)"), {"absmax": change})
    for dtype in (torch.float64, torch.bfloat16):
        yield Wrong(op, TypeError, (f"absmax has dtype {named(dtype)}", "float32"), {"absmax": to(dtype)})
    for name in ("block_size", "absmax_block_size"):
        for size in (0, -64, 16, 48, 8192):
            yield Wrong(op, ValueError, (f"{name} is {size};", "power of two from 32 to 4096"), {name: size})
    yield Wrong(op, ValueError, ("code has shape (15,)", "(16,)"), {"code": shorter})
    yield Wrong(op, TypeError, ("code has dtype float64", "float32"), {"code": to(torch.float64)})
    yield Wrong(op, ValueError, ("code", "finite"), {"code": holding(NAN)}, reads_values=True)
    yield from wrong_devices(op, "absmax", "code")
    yield Wrong(op, ValueError, ("absmax has dtype uint8", "absmax_scale"), {"absmax": to(torch.uint8)})
    yield Wrong(op, TypeError, ("absmax_scale", "float32"), {"absmax_scale": torch.ones(1)})
    for name in ("absmax_scale", "absmax_offset"):
        yield Wrong(op, ValueError, ("absmax has dtype uint8", name), {name: None}, nested=True)
        yield Wrong(op, TypeError, (name, "float64", "float32"), {name: to(torch.float64)}, nested=True)
    yield Wrong(op, ValueError, ("absmax_scale has shape (2,)", "(1,)"), {"absmax_scale": longer}, nested=True)
    for name in ("out_features", "in_features"):
        yield Wrong(op, ValueError, (f"{name} is -1;", ">= 0"), {name: -1})
    yield Wrong(op, ValueError, (f"({2**32}, {2**32})", "2**62"), {"out_features": 2**32, "in_features": 2**32})


def wrong_dense(op: str, like: str) -> Iterator[Wrong]:
    yield from wrong_floats(op, "weight")
    yield from wrong_shapes(op, "weight", "(out_features, in_features)", row, lambda t: t[0], lambda t: t[0, 0])
    if like:
        for dtype in (torch.bfloat16, torch.float64):
            yield Wrong(op, TypeError, (f"weight has dtype {named(dtype)}", "float32", like), {"weight": to(dtype)})
        yield from wrong_devices(op, "weight")


def wrong_bias(op: str) -> Iterator[Wrong]:
    yield from wrong_floats(op, "bias")
    yield from wrong_shapes(op, "bias", f"({OUT},)", shorter, longer, row, lambda t: t[0])
    yield from wrong_devices(op, "bias")


def wrong_saved(op: str, name: str, like: str) -> Iterator[Wrong]:
    """s and ds: x's (or the gradient's) rows and dtype."""
    for dtype in (torch.bfloat16, torch.float64, torch.int64):
        yield Wrong(op, TypeError, (f"{name} has dtype {named(dtype)}", "float32", like), {name: to(dtype)})
    wanted = f"({ROWS}, {RANK})"
    yield from wrong_shapes(op, name, wanted, shorter, longer, narrower, _wider, row, lambda t: t[0], lambda t: t.t())
    yield from wrong_devices(op, name)


def wrong_group(op: str, b: bool = True, base: bool = False) -> Iterator[Wrong]:
    yield from wrong_floats(op, "lora_a", "lora_b")
    yield from wrong_devices(op, "lora_a", "lora_b", "scalings")
    wanted = f"(adapters, rank, {IN})"
    changes = narrower, _wider, row, lambda t: t[0], lambda t: t.mT, lambda t: t[:, :0]
    yield from wrong_shapes(op, "lora_a", wanted, *changes, grouped=True)
    changes = narrower, _wider, shorter, longer, row, lambda t: t[0]
    yield from wrong_shapes(op, "lora_b", f"({ADAPTERS}, ", *changes, grouped=True)
    if base:
        changes = (lambda t: t[:, :-1], lambda t: torch.cat([t, t[:, :1]], 1))
        yield from wrong_shapes(op, "lora_b", f"({ADAPTERS}, {OUT}, {RANK})", *changes, grouped=True)
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        says = ("scalings", named(dtype), f"float32 ({ADAPTERS},)")
        yield Wrong(op, ValueError, says, {"scalings": to(dtype)})
    for change, shape in ((shorter, "(3,)"), (longer, "(5,)"), (row, "(1, 4)"), (lambda t: t[0], "()")):
        yield Wrong(op, ValueError, ("scalings", shape, f"float32 ({ADAPTERS},)"), {"scalings": change})
    yield from wrong_ids(op)


def wrong_ids(op: str) -> Iterator[Wrong]:
    for dtype in (torch.float32, torch.uint8, torch.int16, torch.bool):
        says = (f"adapter_ids has dtype {named(dtype)}", "int64")
        yield Wrong(op, TypeError, says, {"adapter_ids": to(dtype)})
    yield from wrong_shapes(op, "adapter_ids", f"({ROWS},)", shorter, longer, row, lambda t: t[0], lambda t: t[:, None])
    yield from wrong_devices(op, "adapter_ids", "ranks")
    for kind in (torch.int64, torch.int32):
        for index in (ADAPTERS, -2, 2**31 - 1, -(2**31)):
            says = ("adapter_ids has an entry", f"{index}", f"-1 <= id < {ADAPTERS}")
            changes = {"adapter_ids": lambda t, index=index, kind=kind: holding(index)(t.to(kind))}
            yield Wrong(op, IndexError, says, changes, reads_values=True)
        for rank in (RANK + 1, -1, 2**31 - 1):
            says = ("ranks has an entry", f"{rank}", f"0 <= rank <= {RANK}")
            changes = {"ranks": lambda t, rank=rank, kind=kind: holding(rank)(t.to(kind))}
            yield Wrong(op, ValueError, says, changes, reads_values=True)
    for index in (2**40, -(2**63)):
        says = ("adapter_ids has an entry", f"{index}")
        yield Wrong(op, IndexError, says, {"adapter_ids": holding(index)}, reads_values=True)
    for dtype in (torch.float32, torch.uint8, torch.bool):
        says = ("ranks", named(dtype), f"int64 ({ADAPTERS},)")
        yield Wrong(op, ValueError, says, {"ranks": to(dtype)})
    for change, shape in ((shorter, "(3,)"), (longer, "(5,)"), (row, "(1, 4)"), (lambda t: t[0], "()")):
        yield Wrong(op, ValueError, ("ranks", shape, f"int64 ({ADAPTERS},)"), {"ranks": change})


def table() -> Iterator[Wrong]:
    for op in ("lora_linear", "nf4_lora_linear"):
        yield from wrong_floats(op, "x")
        yield from wrong_rows(op, "x")
        yield from wrong_factors(op)
        yield from wrong_devices(op, "lora_a", "lora_b")
        yield from wrong_bias(op)
        yield from wrong_dropout(op)
    for op in ("lora_grad_x", "nf4_lora_grad_x"):
        yield from wrong_floats(op, "grad_output", "lora_a")
        yield from wrong_rows(op, "grad_output")
        yield from wrong_saved(op, "ds", "grad_output")
        yield from wrong_shapes(op, "lora_a", f"(rank, {IN})", narrower, _wider, row, lambda t: t[0])
        changes = {"lora_a": lambda t: t[:0], "ds": lambda t: t[:, :0]}
        yield Wrong(op, ValueError, ("lora_a has rank 0", "at least 1"), changes)
        yield Wrong(op, ValueError, ("ds has shape (5, 3)", "(5, 2)"), {"lora_a": shorter})
        yield from wrong_devices(op, "lora_a")
        yield from wrong_dropout(op)
    for op in ("nf4_lora_linear", "nf4_lora_grad_x", "nf4_dora_weight_norm"):
        yield from wrong_weights(op)
    yield from wrong_dense("lora_linear", "x")
    yield from wrong_dense("lora_grad_x", "grad_output")

    op = "lora_grad_ab"
    yield from wrong_floats(op, "x", "grad_output")
    yield from wrong_factors(op)
    yield from wrong_saved(op, "s", "x")
    for dtype in (torch.bfloat16, torch.float64):
        says = (f"grad_output has dtype {named(dtype)}", "float32", "x")
        yield Wrong(op, TypeError, says, {"grad_output": to(dtype)})
    yield from wrong_shapes(op, "grad_output", f"({ROWS}, {OUT})", shorter, longer, row, lambda t: t[0])
    yield Wrong(op, ValueError, ("lora_b has shape (12, 3)", "(11, 3)"), {"grad_output": narrower})
    yield Wrong(op, ValueError, ("lora_a has shape (3, 80)", "(rank, 79)"), {"x": narrower})
    for name in ("x", "grad_output"):
        yield Wrong(op, ValueError, (f"{name} has ",), {name: lambda t: t[0, 0]})
    yield from wrong_devices(op, "grad_output", "lora_a", "lora_b")
    yield from wrong_dropout(op)

    op = "lora_dropout_mask"
    yield from wrong_dropout(op, "p")
    for name in ("rows", "cols"):
        for size in (-1, -(2**40)):
            yield Wrong(op, ValueError, (f"{name} is {size};", ">= 0"), {name: size})
    yield Wrong(op, ValueError, (f"rows is {2**32};", "2**32"), {"rows": 2**32, "cols": 1})
    yield Wrong(op, ValueError, ("2**62",), {"rows": 2**31, "cols": 2**32})

    op = "lora_linear_grouped"
    yield from wrong_floats(op, "x")
    yield from wrong_rows(op, "x")
    yield from wrong_dense(op, "x")
    yield from wrong_bias(op)
    yield from wrong_group(op, base=True)

    op = "lora_grouped_grad"
    yield from wrong_floats(op, "x")
    yield from wrong_group(op)
    yield from wrong_saved(op, "s", "x")
    for dtype in (torch.bfloat16, torch.float64, torch.int64):
        says = (f"grad_output has dtype {named(dtype)}", "float32", "x")
        yield Wrong(op, TypeError, says, {"grad_output": to(dtype)})
    yield from wrong_shapes(
        op, "grad_output", f"({ROWS}, {OUT})", shorter, longer, narrower, _wider, row, lambda t: t[0]
    )
    yield from wrong_devices(op, "grad_output")

    op = "lora_grouped_grad_x"
    yield from wrong_floats(op, "grad_output")
    yield from wrong_rows(op, "grad_output")
    yield from wrong_dense(op, "")
    yield Wrong(op, TypeError, ("weight has dtype bfloat16", "float32"), {"weight": to(torch.bfloat16)})
    yield Wrong(op, TypeError, ("ds has dtype bfloat16", "float32"), {"ds": to(torch.bfloat16)})
    yield from wrong_shapes(op, "ds", f"({ROWS}, {RANK})", shorter, longer, narrower, _wider, row)
    changes = narrower, _wider, row, lambda t: t[0], lambda t: t[:, :0]
    yield from wrong_shapes(op, "lora_a", f", {IN})", *changes, grouped=True)
    yield from wrong_floats(op, "lora_a")
    yield from wrong_devices(op, "weight", "ds", "lora_a")
    yield from wrong_ids(op)

    op = "lora_grouped_delta_"
    yield from wrong_floats(op, "x")
    yield from wrong_group(op)
    for dtype in (torch.bfloat16, torch.float64, torch.int64):
        yield Wrong(op, TypeError, (f"y has dtype {named(dtype)}", "float32", "x"), {"y": to(dtype)})
    for change, shape in ((shorter, "(4, 15)"), (longer, "(6, 15)"), (row, "(1, 5, 15)"), (lambda t: t[0], "(15,)")):
        yield Wrong(op, ValueError, (f"y has shape {shape}", f"({ROWS}, "), {"y": change})
    yield Wrong(op, ValueError, ("y has shape ()",), {"y": lambda t: t[0, 0]})
    for start in (-1, 4, 15, 2**40, -(2**63), 2**63 - 1):
        yield Wrong(op, ValueError, (f"start is {start} ", "0 <= start <= 3"), {"start": start})
    yield Wrong(op, ValueError, ("start is 2 ", "0 <= start <= 1"), {"y": lambda t: t[:, :13]})
    yield Wrong(op, ValueError, ("start is 0 ", "11"), {"y": lambda t: t[:, :11], "start": 0})
    yield from wrong_devices(op, "y")

    for op in ("dora_weight_norm", "lora_merge_"):
        yield from wrong_dense(op, "")
        yield from wrong_factors(op)
        yield from wrong_devices(op, "lora_a", "lora_b")
    yield from wrong_factors("nf4_dora_weight_norm")
    yield from wrong_devices("nf4_dora_weight_norm", "lora_a", "lora_b")


TABLE = list(table())


def check(wrong: Wrong, arguments: dict[str, Any], errors: tuple[type[Exception], ...]) -> None:
    with pytest.raises(errors) as caught:
        getattr(torch.ops.tlkernels, wrong.op).default(**arguments)
    sentence = str(caught.value)
    for words in (f"{wrong.op}: ", *wrong.says):
        assert words in sentence, sentence


@pytest.mark.parametrize("wrong", TABLE, ids=str)
def test_wrong_call(backend: str, lora_calls: Any, wrong: Wrong) -> None:
    arguments = wrong.arguments(lora_calls(OUT, IN, nested=wrong.nested)[wrong.op])
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor) and not v.is_meta}
    # the C++ side has one exception type, so from there a RuntimeError is right as well
    check(wrong, arguments, (wrong.error, RuntimeError) if backend == "cpu" else (wrong.error,))
    for name, t in before.items():
        if t.is_floating_point():
            assert same_bits(arguments[name], t), f"{name} was changed"


@pytest.mark.parametrize(
    "wrong", [w for w in TABLE if not w.reads_values and not any("meta" in words for words in w.says)], ids=str
)
def test_wrong_call_while_tracing(lora_calls: Any, wrong: Wrong) -> None:
    arguments = wrong.arguments(lora_calls(OUT, IN, nested=wrong.nested)[wrong.op])
    meta = {
        k: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") if isinstance(v, Tensor) else v
        for k, v in arguments.items()
    }
    check(wrong, meta, (wrong.error,))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("op", sorted({w.op for w in TABLE}))
def test_the_call_that_the_table_changes_is_right(backend: str, lora_calls: Any, op: str, nested: bool) -> None:
    getattr(torch.ops.tlkernels, op).default(**lora_calls(OUT, IN, nested=nested)[op])


def test_the_table_has_every_op_and_every_tensor(lora_calls: Any) -> None:
    for op, arguments in lora_calls(OUT, IN).items():
        changed = {name for wrong in TABLE if wrong.op == op for name in wrong.changes}
        tensors = {name for name, value in arguments.items() if isinstance(value, Tensor)}
        assert tensors <= changed, (op, tensors - changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_wrong_merge_leaves_the_weight_as_it_was(backend: str, dtype: torch.dtype) -> None:
    """Also where the fault is in the last thing that is looked at."""
    right = {"lora_a": torch.randn(2, 8), "lora_b": torch.randn(6, 2)}
    for changes in (
        {"lora_a": torch.randn(2, 7)}, {"lora_b": torch.randn(5, 2)}, {"lora_b": torch.randn(6, 3)},
        {"lora_a": torch.ones(2, 8, dtype=torch.int64)}, {"lora_b": torch.randn(6, 2, device="meta")},
        {"lora_a": torch.randn(0, 8), "lora_b": torch.randn(6, 0)},
    ):  # fmt: skip
        w = torch.randn(6, 8).to(dtype)
        before = w.clone()
        with pytest.raises(ERRORS, match=r"lora_merge_: lora_[ab] "):
            ops.lora_merge_(w, **{**right, **changes}, scaling=1.0)
        assert same_bits(w, before)


def test_a_merge_into_memory_that_rows_share_is_refused(backend: str) -> None:
    """An expanded weight has no place for the sum of each row."""
    w = torch.zeros(1, 8)
    with pytest.raises(ERRORS):
        ops.lora_merge_(w.expand(6, 8), torch.randn(2, 8), torch.randn(6, 2), 1.0)
    assert not w.any()


@pytest.mark.parametrize("start", [-1, 4])
def test_a_wrong_update_leaves_y_as_it_was(backend: str, lora_calls: Any, start: int) -> None:
    right = lora_calls(OUT, IN)["lora_grouped_delta_"]
    before = right["y"].clone()
    for changes in (
        {"start": start}, {"adapter_ids": holding(7, at=4)(right["adapter_ids"])},
        {"ranks": holding(9, at=3)(right["ranks"])}, {"scalings": right["scalings"].double()},
    ):  # fmt: skip
        with pytest.raises(ERRORS, match="lora_grouped_delta_: "):
            ops.lora_grouped_delta_(**{**right, **changes})
        assert same_bits(right["y"], before)


# ---- the public functions -------------------------------------------------------------------------------------------


def test_dropout_of_the_public_function(backend: str) -> None:
    x, w, a, b = torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    for weight in (w, ops.nf4_quantize(w)):
        state = torch.get_rng_state()
        for dropout in (1.0, -0.1, 2, NAN):
            with pytest.raises(ValueError, match=rf"lora_linear: dropout is {dropout}; expected 0 <= dropout < 1"):
                ops.lora_linear(x, weight, None, a, b, 1.0, dropout=dropout)
        assert torch.equal(torch.get_rng_state(), state)
        with pytest.raises(ERRORS, match="lora_linear: rng has dtype int32"):
            ops.lora_linear(x, weight, None, a, b, 1.0, dropout=0.5, rng=torch.zeros(2, dtype=torch.int32))


def test_public_functions_of_4_bit_weights_want_a_matrix(backend: str) -> None:
    cube, x = ops.nf4_quantize(torch.randn(2, 3, 8)), torch.randn(3, 8)
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    for name, call in {
        "lora_linear": lambda: ops.lora_linear(x, cube, None, a, b, 1.0),
        "dora_weight_norm": lambda: ops.dora_weight_norm(cube, a, b, 1.0),
        "lora_merge": lambda: ops.lora_merge(cube, a, b, 1.0),
    }.items():
        with pytest.raises(
            ValueError, match=rf"{name}: weight was quantized from shape \(2, 3, 8\); expected a matrix"
        ):
            call()
    with pytest.raises(TypeError, match="lora_merge: weight is a Tensor; expected an NF4Weight"):
        ops.lora_merge(torch.randn(6, 8), a, b, 1.0)


def test_wrong_factors_of_a_4_bit_merge(backend: str) -> None:
    weight = ops.nf4_quantize(torch.randn(6, 8))
    packed = weight.packed.clone()
    for a, b in ((torch.randn(2, 7), torch.randn(6, 2)), (torch.randn(2, 8), torch.randn(5, 2))):
        with pytest.raises(ERRORS, match=r"lora_merge_?: lora_[ab] has shape"):
            ops.lora_merge(weight, a, b, 1.0)
    assert torch.equal(weight.packed, packed)


def test_lora_b_of_a_grouped_4_bit_base_has_its_features(backend: str, lora_calls: Any) -> None:
    arguments = lora_calls(OUT, IN)["lora_linear_grouped"]
    arguments["weight"] = ops.nf4_quantize(arguments["weight"])
    arguments["lora_b"] = arguments["lora_b"][:, :-1]
    with pytest.raises(ERRORS, match=rf"lora_linear_grouped: lora_b has shape .*; expected \({ADAPTERS}, {OUT}, 3\)"):
        ops.lora_linear_grouped(**arguments)


def test_a_grouped_4_bit_base_names_what_is_wrong(backend: str, lora_calls: Any) -> None:
    arguments = lora_calls(OUT, IN)["lora_linear_grouped"]
    arguments["weight"] = ops.nf4_quantize(arguments["weight"])
    for name, change in (("x", narrower), ("adapter_ids", shorter), ("scalings", shorter), ("bias", longer)):
        with pytest.raises(ERRORS, match=rf": {name} has "):
            ops.lora_linear_grouped(**{**arguments, name: change(arguments[name])})
