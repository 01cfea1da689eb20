"""Wrong calls: each raises, and the sentence names the op, the argument, what it got and what it wants.

One table serves the compiled kernels, the references and meta tensors (so a wrong call fails while tracing, too).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from wrong_calls import ERRORS, Wrong, longer, shorter, to

from tlkernels import ops

ROWS, COLUMNS, SIZE = 5, 7, 6
NAN, INF = float("nan"), float("inf")
OPS = (
    "sim_lse", "sim_lse_backward", "sigmoid_contrastive", "sigmoid_contrastive_backward", "sigmoid_contrastive_sum",
)  # fmt: skip


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def row(t: Tensor) -> Tensor:
    return t[None]


def narrower(t: Tensor) -> Tensor:
    return t[..., :-1]


def holding(value: int, at: int) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t[at] = value
        return t

    return change


def wrong_features(op: str) -> Iterator[Wrong]:
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        says = (f"x has dtype {named(dtype)}", "float32, bfloat16, float16 or float64")
        yield Wrong(op, TypeError, says, {"x": to(dtype)})
    for dtype in (torch.bfloat16, torch.float64, torch.int32):
        yield Wrong(op, TypeError, (f"y has dtype {named(dtype)}", "expected float32, like x"), {"y": to(dtype)})
    for change, shape in ((row, "(1, 5, 6)"), (lambda t: t[0], "(6,)"), (lambda t: t[0, 0], "()")):
        yield Wrong(op, ValueError, (f"x has shape {shape}", "expected (N, D)"), {"x": change})
    for change, shape in (
        (row, "(1, 7, 6)"), (lambda t: t[0], "(6,)"), (narrower, "(7, 5)"), (lambda t: t.t(), "(6, 7)"),
        (lambda t: t[:, :0], "(7, 0)"), (lambda t: t[0, 0], "()"),
    ):  # fmt: skip
        yield Wrong(op, ValueError, (f"y has shape {shape}", "expected (M, 6), like x"), {"y": change})
    yield Wrong(op, ValueError, ("y has shape (7, 6)", "expected (M, 5), like x"), {"x": narrower})
    yield Wrong(op, ValueError, ("y is on meta", "cpu"), {"y": to("meta")})


def wrong_scalars(op: str) -> Iterator[Wrong]:
    for name in ("logit_scale", "logit_bias"):
        for dtype in (torch.int64, torch.bool, torch.complex64):
            says = (f"{name} has dtype {named(dtype)}", "float32, bfloat16, float16 or float64")
            yield Wrong(op, TypeError, says, {name: to(dtype)})
        for shape in ((2,), (0,), (1, 3)):
            says = (f"{name} has shape {shape}", "expected one element")
            yield Wrong(op, ValueError, says, {name: lambda t, shape=shape: t.new_ones(shape)})
        yield Wrong(op, ValueError, (f"{name} is on meta", "cpu"), {name: to("meta")})


def wrong_index(op: str, name: str) -> Iterator[Wrong]:
    for dtype in (torch.int32, torch.uint8, torch.float32, torch.bool):
        says = (f"{name} has dtype {named(dtype)} and shape ({ROWS},)", f"expected int64 ({ROWS},)")
        yield Wrong(op, ValueError, says, {name: to(dtype)})
    for change, shape in ((shorter, "(4,)"), (longer, "(6,)"), (row, "(1, 5)"), (lambda t: t[0], "()")):
        says = (f"{name} has dtype int64 and shape {shape}", f"expected int64 ({ROWS},)")
        yield Wrong(op, ValueError, says, {name: change})
    for value in (COLUMNS, COLUMNS + 1, 2**31, 2**40, 2**63 - 1):
        says = (f"{name} has an entry {value};", f"expected less than {COLUMNS}")
        for at in (0, ROWS - 1):
            yield Wrong(op, IndexError, says, {name: holding(value, at)}, reads_values=True)
    yield Wrong(op, ValueError, (f"{name} is on meta", "cpu"), {name: to("meta")})


def wrong_vector(op: str, name: str, size: int) -> Iterator[Wrong]:
    for dtype in (torch.bfloat16, torch.float64, torch.int64):
        says = (f"{name} has dtype {named(dtype)} and shape ({size},)", f"expected float32 ({size},)")
        yield Wrong(op, ValueError, says, {name: to(dtype)})
    for change, shape in (
        (shorter, f"({size - 1},)"), (longer, f"({size + 1},)"), (row, f"(1, {size})"), (lambda t: t[0], "()"),
    ):  # fmt: skip
        says = (f"{name} has dtype float32 and shape {shape}", f"expected float32 ({size},)")
        yield Wrong(op, ValueError, says, {name: change})
    yield Wrong(op, ValueError, (f"{name} is on meta", "cpu"), {name: to("meta")})


def table() -> Iterator[Wrong]:
    for op in OPS:
        yield from wrong_features(op)
        yield from wrong_scalars(op)
        yield from wrong_index(op, "labels")
    for op in OPS[:2]:
        yield from wrong_index(op, "exclude")
        # without y the columns are the rows
        says = ("labels has an entry 5;", "expected less than 5")
        changes = {"y": None, "labels": holding(5, 1), "lse_col": None, "grad_col": None}
        yield Wrong(op, IndexError, says, changes, reads_values=True)
    op = "sim_lse_backward"
    for name, size in (("lse_row", ROWS), ("grad_row", ROWS), ("lse_col", COLUMNS), ("grad_col", COLUMNS)):
        yield from wrong_vector(op, name, size)
    yield from wrong_vector(op, "grad_pair", ROWS)
    yield Wrong(op, ValueError, ("lse_col", "grad_col", "expected both or neither"), {"lse_col": None})
    yield Wrong(op, ValueError, ("lse_col", "grad_col", "expected both or neither"), {"grad_col": None})
    yield Wrong(op, ValueError, ("labels", "grad_pair", "expected both or neither"), {"labels": None})
    yield Wrong(op, ValueError, ("labels", "grad_pair", "expected both or neither"), {"grad_pair": None})
    says = ("lse_col and grad_col are given without y", "expected None")
    yield Wrong(op, ValueError, says, {"y": None, "labels": lambda t: t % 5, "exclude": None})
    says = ("lse_row has dtype float32 and shape (5,)", "expected float64 (5,)")
    yield Wrong(op, ValueError, says, {"x": to(torch.float64), "y": to(torch.float64)})
    yield from wrong_vector("sigmoid_contrastive_backward", "grad_loss", ROWS)


TABLE = list(table())


def check(wrong: Wrong, arguments: dict[str, Any], errors: tuple[type[Exception], ...]) -> str:
    with pytest.raises(errors) as caught:
        getattr(torch.ops.tlkernels, wrong.op).default(**arguments)
    sentence = str(caught.value)
    for words in (f"{wrong.op}: ", *wrong.says):
        assert words in sentence, sentence
    return sentence


@pytest.mark.parametrize("wrong", TABLE, ids=str)
def test_wrong_call(backend: str, contrastive_calls: Any, wrong: Wrong) -> None:
    arguments = wrong.arguments(contrastive_calls(ROWS, COLUMNS, SIZE)[wrong.op])
    # the C++ side has one exception type, so from there a RuntimeError is right as well
    sentence = check(wrong, arguments, (wrong.error, RuntimeError) if backend == "cpu" else (wrong.error,))
    if backend == "cpu":  # and its first line is the reference's sentence, to the letter
        with pytest.raises(wrong.error) as caught:
            getattr(torch.ops.tlkernels_reference, wrong.op).default(**arguments)
        assert sentence.splitlines()[0] == str(caught.value)


@pytest.mark.parametrize(
    "wrong", [w for w in TABLE if not w.reads_values and not any("meta" in words for words in w.says)], ids=str
)
def test_wrong_call_while_tracing(contrastive_calls: Any, wrong: Wrong) -> None:
    arguments = wrong.arguments(contrastive_calls(ROWS, COLUMNS, SIZE)[wrong.op])
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    check(wrong, meta, (wrong.error,))


@pytest.mark.parametrize("op", OPS)
def test_the_call_that_the_table_changes_is_right(backend: str, contrastive_calls: Any, op: str) -> None:
    getattr(torch.ops.tlkernels, op).default(**contrastive_calls(ROWS, COLUMNS, SIZE)[op])


def test_the_table_has_every_op_and_every_tensor(contrastive_calls: Any) -> None:
    for op, arguments in contrastive_calls(ROWS, COLUMNS, SIZE).items():
        changed = {name for wrong in TABLE if wrong.op == op for name in wrong.changes}
        tensors = {name for name, value in arguments.items() if isinstance(value, Tensor)}
        assert tensors <= changed, (op, tensors - changed)


# ---- the public functions -------------------------------------------------------------------------------------------

X, Y = torch.randn(ROWS, SIZE), torch.randn(COLUMNS, SIZE)
LABELS = torch.tensor([0, 1, 2, 3, 6])
Z, CLASSES = torch.randn(6, SIZE), torch.tensor([0, 1, 2, 0, 1, 2])
REF, REF_CLASSES = torch.randn(9, SIZE), torch.arange(9) % 3

RIGHT: dict[str, dict[str, Any]] = {
    "sim_lse": {"x": X, "y": Y, "logit_scale": 2.0, "logit_bias": 0.1, "labels": LABELS, "exclude": LABELS},
    "info_nce": {"x": X, "y": Y, "logit_scale": 2.0, "logit_bias": 0.1, "labels": LABELS},
    "nt_xent": {"z": Z, "z_other": Z + 1, "temperature": 0.5},
    "sup_con": {
        "z": Z, "labels": CLASSES, "z_ref": REF, "ref_labels": REF_CLASSES, "temperature": 0.5, "ref_offset": 2,
    },
    "sigmoid_contrastive": {"x": X, "y": Y, "logit_scale": 2.0, "logit_bias": -1.0, "labels": LABELS},
}  # fmt: skip

# function, what is changed in its right call, the error, its sentence
PUBLIC: list[tuple[str, dict[str, Any], type[Exception], str]] = []
for function in ("sim_lse", "info_nce", "sigmoid_contrastive"):
    PUBLIC += [
        (function, {"x": X.long()}, TypeError, "x has dtype int64; expected float32, bfloat16, float16 or float64"),
        (function, {"x": X[0]}, ValueError, "x has shape (6,); expected (N, D)"),
        (function, {"y": Y.double()}, TypeError, "y has dtype float64; expected float32, like x"),
        (function, {"y": Y[:, 1:]}, ValueError, "y has shape (7, 5); expected (M, 6), like x"),
        (function, {"logit_scale": "2"}, TypeError, "logit_scale is str; expected a number or a tensor of one element"),
        (function, {"logit_bias": "2"}, TypeError, "logit_bias is str; expected a number or a tensor of one element"),
        (function, {"logit_scale": torch.ones(2)}, ValueError, "logit_scale has shape (2,); expected one element"),
        (function, {"logit_bias": torch.ones(2)}, ValueError, "logit_bias has shape (2,); expected one element"),
        (function, {"logit_scale": torch.tensor(2)}, TypeError, "logit_scale has dtype int64; expected float32"),
        (function, {"labels": LABELS[1:]}, ValueError, "labels has dtype int64 and shape (4,); expected int64 (5,)"),
        (function, {"labels": LABELS.float()}, ValueError, "labels has dtype float32 and shape (5,); expected int64"),
        (function, {"labels": LABELS + 1}, IndexError, "labels has an entry 7; expected less than 7"),
    ]
for function in ("info_nce", "sigmoid_contrastive"):
    PUBLIC += [
        (function, {"labels": LABELS > 2}, ValueError, "labels has dtype bool and shape (5,); expected int64 (5,)"),
        (
            function, {"labels": LABELS - 3}, IndexError,
            "labels has an entry -3; expected 0 <= label < 7, or -100",
        ),
        (
            function, {"labels": LABELS - 3, "ignore_index": -3}, IndexError,
            "labels has an entry -2; expected 0 <= label < 7, or -3",
        ),
        (function, {"label_offset": 2}, ValueError, "label_offset is 2 and labels are given; expected one of them"),
        (function, {"reduction": "average"}, ValueError, "reduction is 'average'; expected 'mean', 'sum' or 'none'"),
    ]  # fmt: skip
    for offset in (-1, 3):
        says = f"label_offset is {offset} for 5 rows of x and 7 of y; expected 0 <= label_offset <= 2"
        PUBLIC.append((function, {"labels": None, "label_offset": offset}, ValueError, says))
PUBLIC += [
    ("sim_lse", {"exclude": LABELS[1:]}, ValueError, "exclude has dtype int64 and shape (4,); expected int64 (5,)"),
    ("sim_lse", {"exclude": LABELS + 4}, IndexError, "exclude has an entry 10; expected less than 7"),
    ("info_nce", {"x_negatives": Y, "symmetric": False}, ValueError, "x_negatives are given without symmetric"),
    (
        "sigmoid_contrastive", {"negative_only": True}, ValueError,
        "labels are given with negative_only; expected None, no pair belongs together",
    ),
    ("nt_xent", {"z": Z.int()}, TypeError, "z has dtype int32; expected float32, bfloat16, float16 or float64"),
    ("nt_xent", {"z": Z[0]}, ValueError, "z has shape (6,); expected (N, D)"),
    (
        "nt_xent", {"z_other": Z[1:]}, ValueError,
        "z_other has dtype float32 and shape (5, 6); expected float32 (6, 6), like z",
    ),
    (
        "nt_xent", {"z_other": Z.half()}, ValueError,
        "z_other has dtype float16 and shape (6, 6); expected float32 (6, 6), like z",
    ),
    (
        "nt_xent", {"z": Z[1:], "z_other": None}, ValueError,
        "z has 5 rows; expected an even number, two views of each sample",
    ),
    ("sup_con", {"z": Z.int()}, TypeError, "z has dtype int32; expected float32, bfloat16, float16 or float64"),
    ("sup_con", {"z": Z[0]}, ValueError, "z has shape (6,); expected (N, D)"),
    ("sup_con", {"labels": CLASSES[1:]}, ValueError, "labels has dtype int64 and shape (5,); expected int64 (6,)"),
    ("sup_con", {"labels": CLASSES.float()}, ValueError, "labels has dtype float32 and shape (6,); expected int64"),
    ("sup_con", {"z_ref": REF.double()}, ValueError, "z_ref has dtype float64 and shape (9, 6); expected float32 (M,"),
    ("sup_con", {"z_ref": REF[:, 1:]}, ValueError, "z_ref has dtype float32 and shape (9, 5); expected float32 (M, 6)"),
    ("sup_con", {"z_ref": REF[0]}, ValueError, "z_ref has dtype float32 and shape (6,); expected float32 (M, 6)"),
    ("sup_con", {"z_ref": None}, ValueError, "one of z_ref and ref_labels is None; expected both or neither"),
    ("sup_con", {"ref_labels": None}, ValueError, "one of z_ref and ref_labels is None; expected both or neither"),
    (
        "sup_con", {"ref_labels": REF_CLASSES[1:]}, ValueError,
        "ref_labels has dtype int64 and shape (8,); expected int64 (9,)",
    ),
    ("sup_con", {"z_ref": None, "ref_labels": None}, ValueError, "ref_offset is 2 without z_ref; expected None"),
    ("sup_con", {"no_positive": "drop"}, ValueError, "no_positive is 'drop'; expected 'skip', 'zero' or 'error'"),
    (
        "sup_con", {"labels": CLASSES + 40, "no_positive": "error"}, ValueError,
        "anchor 0 of class 40 has no positive; expected one for each",
    ),
]  # fmt: skip
for offset in (-1, 4):
    says = f"ref_offset is {offset} for 6 rows of z and 9 of z_ref; expected 0 <= ref_offset <= 3"
    PUBLIC.append(("sup_con", {"ref_offset": offset}, ValueError, says))
for smoothing in (-0.1, 1.1, NAN, INF):
    says = f"label_smoothing is {smoothing}; expected 0 <= label_smoothing <= 1"
    PUBLIC.append(("info_nce", {"label_smoothing": smoothing}, ValueError, says))
for name in ("x_negatives", "y_negatives"):
    for t, got in (
        (Y.double(), "float64 and shape (7, 6)"), (Y[:, 1:], "float32 and shape (7, 5)"),
        (Y[0], "float32 and shape (6,)"),
    ):  # fmt: skip
        PUBLIC.append(("info_nce", {name: t}, ValueError, f"{name} has dtype {got}; expected float32 (K, 6)"))
for function in ("nt_xent", "sup_con"):
    for temperature in (0, 0.0, -1.0, NAN):
        says = f"temperature is {temperature}; expected > 0"
        PUBLIC.append((function, {"temperature": temperature}, ValueError, says))
    says = "temperature has shape (2,); expected one element"
    PUBLIC.append((function, {"temperature": torch.ones(2)}, ValueError, says))
    says = "temperature is str; expected a number or a tensor of one element"
    PUBLIC.append((function, {"temperature": "warm"}, TypeError, says))
    says = "reduction is None; expected 'mean', 'sum' or 'none'"
    PUBLIC.append((function, {"reduction": None}, ValueError, says))
for function, right in RIGHT.items():
    for name, value in right.items():
        if isinstance(value, Tensor):
            for other in (value.tolist(), value.numpy()):
                says = f"{name} is {type(other).__name__}; expected a tensor"
                PUBLIC.append((function, {name: other}, TypeError, says))
            if name not in ("x", "z"):
                PUBLIC.append((function, {name: value.to("meta")}, ValueError, f"{name} is on meta; expected cpu"))
for name in ("x_negatives", "y_negatives"):
    PUBLIC.append(("info_nce", {name: [1.0]}, TypeError, f"{name} is list; expected a tensor"))
    PUBLIC.append(("info_nce", {name: Y.to("meta")}, ValueError, f"{name} is on meta; expected cpu"))
for function in ("info_nce", "sigmoid_contrastive"):
    PUBLIC.append((function, {"y": None}, TypeError, "y is NoneType; expected a tensor"))
PUBLIC.append(("info_nce", {"label_smoothing": "0"}, TypeError, "label_smoothing is str; expected a number"))


@pytest.mark.parametrize(
    ("function", "changes", "error", "says"), PUBLIC, ids=[f"{f}: {says[:60]}" for f, _, _, says in PUBLIC]
)
def test_wrong_call_of_a_public_function(
    backend: str, function: str, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    """The sentence begins with the function that was called, or with the op that it calls."""
    with pytest.raises((error, RuntimeError) if backend == "cpu" else error) as caught:
        getattr(ops, function)(**{**RIGHT[function], **changes})
    sentence = str(caught.value)
    through = ("an entry" in says and "or -" not in says) or "on meta" in says
    names = (function, "sim_lse") if through else (function,)
    assert any(f"{name}: {says}" in sentence for name in names), sentence


def test_every_argument_of_a_public_function_is_in_the_table() -> None:
    booleans = {"cols", "symmetric", "return_lse", "ignore_index", "decoupled"}
    for function in RIGHT:
        code = getattr(ops, function).__code__
        arguments = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        changed = {name for f, changes, _, _ in PUBLIC if f == function for name in changes}
        assert arguments - booleans <= changed, (function, arguments - booleans - changed)


@pytest.mark.parametrize("function", RIGHT)
def test_the_public_call_that_is_changed_is_right(backend: str, function: str) -> None:
    getattr(ops, function)(**RIGHT[function])


def test_lse_merge() -> None:
    with pytest.raises(ValueError, match="lse_merge: got no tensors; expected at least one"):
        ops.lse_merge()
    with pytest.raises(TypeError, match="lse_merge: argument 0 is list; expected a tensor"):
        ops.lse_merge([torch.ones(5), torch.ones(5)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lse_merge: tensor 2 has shape \(4,\); expected \(5,\), like the first"):
        ops.lse_merge(torch.ones(5), torch.ones(5), torch.ones(4))


def test_a_wrong_call_leaves_gradients_alone(backend: str) -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(ERRORS):
        ops.info_nce(x, Y, 2.0, labels=LABELS + 1).backward()
    assert x.grad is None


@pytest.mark.parametrize("function", ["info_nce", "sigmoid_contrastive"])
def test_fewer_candidates_than_anchors(function: str) -> None:
    with pytest.raises(ValueError, match=f"{function}: y has 5 rows; expected 7 or more, like x, or labels"):
        getattr(ops, function)(torch.randn(7, 3), torch.randn(5, 3), 1.0, 0.0)
