"""The lora ops as citizens of torch: gradients, opcheck, compile, torch.func, autocast, checkpointing, memory."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formula
import pytest
import torch
from formula import Exact, flat, same_bits
from tolerances import TOLERANCES, relative_error
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck
from torch.utils.checkpoint import checkpoint

import tlkernels
from tlkernels import ops
from tlkernels.ops import NF4Weight, _registry

OUT, IN, RANK = 24, 50, 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SEEDS = (2**40 + 17, -(2**35))
OPS = [
    "lora_linear", "nf4_lora_linear", "lora_grad_ab", "lora_grad_x", "nf4_lora_grad_x", "lora_dropout_mask",
    "lora_linear_grouped", "lora_grouped_grad", "lora_grouped_grad_x", "lora_grouped_delta_", "dora_weight_norm",
    "nf4_dora_weight_norm", "lora_merge_",
]  # fmt: skip
DIFFERENTIABLE = ("lora_linear", "nf4_lora_linear", "lora_linear_grouped")


def op(name: str) -> Any:
    return getattr(torch.ops.tlkernels, name).default


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def factors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (randn(RANK, IN, seed=1) / IN**0.5).to(dtype), randn(OUT, RANK, seed=2, dtype=dtype)


@pytest.fixture(params=["dense", "4 bits", "4 bits, nested"])
def weight(request: pytest.FixtureRequest) -> Tensor | NF4Weight:
    w = randn(OUT, IN, seed=3)
    return w if request.param == "dense" else ops.nf4_quantize(w, double_quant="nested" in request.param)


def of_dtype(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor | NF4Weight:
    return weight if isinstance(weight, NF4Weight) else weight.to(dtype)


def values(weight: Tensor | NF4Weight) -> Tensor:
    return ops.nf4_dequantize(weight, dtype=torch.float32) if isinstance(weight, NF4Weight) else weight


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def test_the_list_of_ops_here_is_complete(lora_calls: Any) -> None:
    family = {name for name in _registry.OPS if "lora" in name or "dora" in name}
    assert set(OPS) == family == set(lora_calls(1, 1))


# ---- gradients ------------------------------------------------------------------------------------------------------

GRADS: dict[str, Callable[..., Tensor]] = {
    "random": lambda *shape, dtype: randn(*shape, seed=8, dtype=dtype),
    "expanded from a sum": lambda *shape, dtype: torch.ones((), dtype=dtype).expand(shape),
    "one element": lambda *shape, dtype: torch.eye(shape[-1], dtype=dtype)[3].expand(shape),
    "transposed": lambda *shape, dtype: randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype).mT,
    "every second": lambda *shape, dtype: randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2],
    "zero": lambda *shape, dtype: torch.zeros(shape, dtype=dtype),
    "large": lambda *shape, dtype: randn(*shape, dtype=dtype) * 100,
}


def check(out: Tensor, e: Exact, dtype: torch.dtype, context: object) -> None:
    Exact(*(t.view(out.shape) if isinstance(t, Tensor) else t for t in vars(e).values())).check(out, dtype, context)


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(4,), (2, 7), (70,), ()], ids=str)
def test_gradients_against_float64(
    backend: str, weight: Tensor | NF4Weight, leading: tuple[int, ...], dtype: torch.dtype, grad: str
) -> None:
    """Of x, bias, both factors and a dense weight, for a gradient that need not be uniform nor contiguous."""
    if grad == "transposed" and not leading:
        leading = (1,)  # a vector has no transpose
    p, rng = (0.5, torch.tensor(SEEDS)) if leading == (2, 7) else (0.0, None)
    x, bias, a, b = leaves(randn(*leading, IN, dtype=dtype), randn(OUT, dtype=dtype), *factors(dtype))
    w = of_dtype(weight, dtype)
    if isinstance(w, Tensor):
        (w,) = leaves(w)
    dy = GRADS[grad](*leading, OUT, dtype=dtype)
    y = ops.lora_linear(x, w, bias, a, b, 0.75, dropout=p, rng=rng)
    assert y.shape == (*leading, OUT) and y.dtype == dtype
    y.backward(dy)

    rows, rows_dy = flat(x.detach()), flat(dy)
    mask = formula.dropout_mask(*SEEDS, len(rows), IN, p) if p else None
    dense, a_, b_ = values(w).detach(), a.detach(), b.detach()
    check(y.detach(), formula.lora_linear(rows, dense, bias.detach(), a_, b_, 0.75, mask, p)[0], dtype, "y")
    _, *expected = formula.lora_gradients(rows_dy, rows, dense, a_, b_, 0.75, mask, p)
    for name, leaf, e in zip(("dA", "dB", "dx"), (a, b, x), expected, strict=True):
        assert leaf.grad.dtype == dtype
        check(leaf.grad, e, dtype, name)
    check(bias.grad, formula.product(torch.ones(1, len(rows)), rows_dy), dtype, "bias")
    if isinstance(w, Tensor):
        e = formula.product(rows_dy.T, rows)
        excess = (w.grad.double() - e.value).abs() - e.bound(dtype, dtype)
        assert w.grad.dtype == dtype and (excess <= 0).all(), "weight"


@pytest.mark.parametrize("factor_dtype", DTYPES, ids=lambda d: f"factors {d}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_come_in_the_dtypes_of_the_parameters(
    backend: str, weight: Tensor | NF4Weight, dtype: torch.dtype, factor_dtype: torch.dtype
) -> None:
    """float32 factors under a bfloat16 model, and the reverse: summed in float32, rounded once to theirs."""
    x, bias = leaves(randn(9, IN, dtype=dtype), randn(OUT, dtype=factor_dtype))
    a, b = leaves(*factors(factor_dtype))
    dy = randn(9, OUT, seed=5, dtype=dtype)
    ops.lora_linear(x, of_dtype(weight, dtype), bias, a, b, 0.75).backward(dy)
    assert x.grad.dtype == dtype and bias.grad.dtype == a.grad.dtype == b.grad.dtype == factor_dtype
    expected = formula.lora_gradients(dy, x.detach(), values(weight), a.detach(), b.detach(), 0.75)
    for name, leaf, e in zip(("dA", "dB", "dx"), (a, b, x), expected[1:], strict=True):
        e.check(leaf.grad, dtype, name)


def test_factor_gradients_are_summed_in_float32(backend: str, weight: Tensor | NF4Weight) -> None:
    """1001 rows of ones: a bfloat16 sum would stop at 256, and one rounded to bfloat16 on the way be 1000."""
    for dtype in (torch.bfloat16, torch.float16):
        x, ones = torch.ones(1001, IN, dtype=dtype), torch.ones
        for factor_dtype in (dtype, torch.float32):
            bias, a, b = leaves(
                torch.zeros(OUT, dtype=factor_dtype), ones(1, IN, dtype=factor_dtype), ones(OUT, 1, dtype=factor_dtype)
            )
            dy = torch.eye(OUT, dtype=dtype)[0].expand(1001, -1)
            ops.lora_linear(x, of_dtype(weight, dtype), bias, a, b, 1.0).backward(dy)
            assert torch.equal(a.grad, torch.full_like(a, 1001))
            assert torch.equal(b.grad[0, 0], torch.tensor(1001.0 * IN).to(factor_dtype))
            assert torch.equal(bias.grad[0], torch.tensor(1001.0).to(factor_dtype))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["dense", "4 bits"])
def test_gradcheck_of_the_float64_path(backend: str, kind: str, p: float) -> None:
    rng = torch.tensor(SEEDS) if p else None
    w = randn(5, 7).double() if kind == "dense" else ops.nf4_quantize(randn(5, 7))
    tensors = [randn(2, 3, 7, seed=1), randn(5, seed=2), randn(3, 7, seed=3), randn(5, 3, seed=4)]
    if isinstance(w, Tensor):
        inputs = leaves(*(t.double() for t in (*tensors, w)))
        assert gradcheck(lambda x, bias, a, b, w: ops.lora_linear(x, w, bias, a, b, 0.75, dropout=p, rng=rng), inputs)
    else:
        inputs = leaves(*(t.double() for t in tensors))
        assert gradcheck(lambda x, bias, a, b: ops.lora_linear(x, w, bias, a, b, 0.75, dropout=p, rng=rng), inputs)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_only_asked_gradients_are_computed(backend: str, weight: Tensor | NF4Weight, dtype: torch.dtype) -> None:
    """Each alone gives what it gives among all, and what was not asked for stays None."""
    tensors = {"x": randn(7, IN), "bias": randn(OUT), "a": factors()[0], "b": factors()[1]}
    if isinstance(weight, Tensor):
        tensors["weight"] = weight
    dy, grads = randn(7, OUT, seed=6, dtype=dtype), {}
    for chosen in (tuple(tensors), *((name,) for name in tensors), ("a", "b"), ("x", "bias")):
        t = {k: v.to(dtype).clone().requires_grad_(k in chosen) for k, v in tensors.items()}
        w = t.get("weight", weight)
        ops.lora_linear(t["x"], w, t["bias"], t["a"], t["b"], 0.75).backward(dy)
        assert {k for k, v in t.items() if v.grad is not None} == set(chosen)
        for name in chosen:
            grads.setdefault(name, t[name].grad)
            assert relative_error(t[name].grad, grads[name]) <= 2 * TOLERANCES[dtype].unit, (chosen, name)


def test_a_result_that_needs_no_gradient_has_none(backend: str, weight: Tensor | NF4Weight) -> None:
    x = randn(3, IN).requires_grad_()
    a, b = leaves(*factors())
    expected = ops.lora_linear(x, weight, None, a, b, 1.0)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            out = ops.lora_linear(x, weight, None, a, b, 1.0)
            assert not out.requires_grad and same_bits(out, expected.detach())
    assert not ops.lora_linear(x.detach(), weight, None, a.detach(), b.detach(), 1.0).requires_grad
    _, s = op("lora_linear")(x, values(weight), None, a, b, None, scaling=1.0)
    assert not s.requires_grad


def test_gradients_accumulate_over_two_uses_of_the_factors(backend: str, weight: Tensor | NF4Weight) -> None:
    a, b = leaves(*factors())
    x, other, dy = randn(5, IN), randn(5, IN, seed=7), randn(5, OUT, seed=6)
    both = ops.lora_linear(x, weight, None, a, b, 1.0) + ops.lora_linear(other, weight, None, a, b, 0.5)
    both.backward(dy)
    expected = [
        formula.lora_gradients(dy, t, values(weight), a.detach(), b.detach(), scaling)
        for t, scaling in ((x, 1.0), (other, 0.5))
    ]
    for i, leaf in ((1, a), (2, b)):
        assert relative_error(leaf.grad, expected[0][i].value + expected[1][i].value) <= 1e-6


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_second_derivative_is_refused(backend: str, weight: Tensor | NF4Weight) -> None:
    """With its sentence, never a silent zero."""
    x, a, b = leaves(randn(3, IN), *factors())
    y = ops.lora_linear(x, weight, None, a, b, 1.0)
    first = torch.autograd.grad(y.square().sum(), (x, a, b), create_graph=True)
    for gradient, name in zip(first, ("lora_grad_x", "lora_grad_ab", "lora_grad_ab"), strict=True):
        with pytest.raises(RuntimeError, match=rf"{name} is not differentiable: .*expected one differentiation"):
            gradient.sum().backward(retain_graph=True)


def test_a_second_derivative_of_the_grouped_op_is_refused(backend: str, lora_calls: Any) -> None:
    arguments = lora_calls(6, 8)["lora_linear_grouped"]
    for name in ("x", "lora_a", "lora_b"):
        t = {**arguments, name: arguments[name].clone().requires_grad_()}
        (gradient,) = torch.autograd.grad(
            ops.lora_linear_grouped(**t).square().sum(), t[name], create_graph=True
        )  # fmt: skip
        with pytest.raises(RuntimeError, match=r"lora_grouped_grad\w* is not differentiable"):
            gradient.sum().backward()


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "absmax": lambda leaf: ops.lora_linear(
        randn(2, IN), _weight()._replace(absmax=leaf * _weight().absmax), None, *factors(), 1.0
    ),
    "code": lambda leaf: ops.lora_linear(
        randn(2, IN), _weight()._replace(code=leaf * formula.NF4), None, *factors(), 1.0
    ),
    "the norm of DoRA": lambda leaf: op("dora_weight_norm")(leaf * randn(OUT, IN), *factors(), scaling=1.0),
    "the factors of the norm": lambda leaf: op("nf4_dora_weight_norm")(
        _weight().packed, _weight().absmax, None, None, None, leaf * factors()[0], factors()[1], OUT, IN, scaling=1.0
    ),
    "lora_grad_x": lambda leaf: op("lora_grad_x")(
        leaf * randn(2, OUT), randn(OUT, IN), randn(2, 4), factors()[0], None
    ),
    "lora_grad_ab": lambda leaf: op("lora_grad_ab")(
        randn(2, OUT), leaf * randn(2, IN), randn(2, 4), *factors(), None, scaling=1.0
    )[1],
}


def _weight() -> NF4Weight:
    return ops.nf4_quantize(randn(OUT, IN))


@pytest.mark.parametrize("what", REFUSED)
def test_gradients_that_mean_nothing_are_refused(backend: str, what: str) -> None:
    leaf = torch.tensor(1.0, requires_grad=True)
    out = REFUSED[what](leaf)
    with pytest.raises(RuntimeError, match=r"(lora|dora)_\w+ is not differentiable"):
        out.sum().backward()


def test_the_norm_of_dora_is_a_constant(backend: str, weight: Tensor | NF4Weight) -> None:
    a, b = leaves(*factors())
    w = weight.clone().requires_grad_() if isinstance(weight, Tensor) else weight
    assert not ops.dora_weight_norm(w, a, b, 1.0).requires_grad


def test_forward_mode_is_refused(backend: str, weight: Tensor | NF4Weight, lora_calls: Any) -> None:
    x, (a, b) = randn(3, IN), factors()
    functions: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "x": (lambda t: ops.lora_linear(t, weight, None, a, b, 1.0), x),
        "lora_a": (lambda t: ops.lora_linear(x, weight, None, t, b, 1.0), a),
        "lora_b": (lambda t: ops.lora_linear(x, weight, None, a, t, 1.0), b),
    }
    grouped = lora_calls(6, 8)["lora_linear_grouped"]
    functions["grouped"] = lambda t: ops.lora_linear_grouped(**{**grouped, "lora_a": t}), grouped["lora_a"]
    for name, (function, t) in functions.items():
        refusal = r"lora_linear\w*: forward-mode AD is not supported; use reverse mode"
        with pytest.raises(RuntimeError, match=refusal):
            torch.func.jvp(function, (t,), (t,))
        with pytest.raises(RuntimeError, match=refusal):
            torch.func.jacfwd(function)(t)
        with forward_ad.dual_level():
            assert function(t).dim() == 2, name  # a plain tensor inside a dual level is nothing special
            with pytest.raises(RuntimeError, match=refusal):
                function(forward_ad.make_dual(t, t))


# ---- torch.library.opcheck ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(backend: str, lora_calls: Any, name: str, nested: bool) -> None:
    if nested and "nf4" not in name:
        pytest.skip("this op has no 4-bit weight")
    dtypes = ((torch.float32, 0.25), (torch.bfloat16, 0.0))
    for dtype, dropout in dtypes if backend == "cpu" else dtypes[:1]:
        arguments = lora_calls(7, 33, dtype=dtype, nested=nested, dropout=dropout)[name]
        if name in DIFFERENTIABLE:
            for leaf in ("x", "lora_a", "lora_b", "bias"):
                arguments[leaf] = arguments[leaf].clone().requires_grad_()
        positional = [a.name for a in op(name)._schema.arguments if not a.kwarg_only]
        args = tuple(arguments[k] for k in positional)
        kwargs = {k: v for k, v in arguments.items() if k not in positional}
        torch.library.opcheck(op(name), args, kwargs, atol=4 * TOLERANCES[dtype].unit, rtol=4 * TOLERANCES[dtype].unit)


@pytest.mark.parametrize("name", OPS)
def test_fake_tensors_have_the_real_shapes_dtypes_and_strides(backend: str, lora_calls: Any, name: str) -> None:
    """For odd sizes, one row, non-contiguous inputs: what a graph assumes is what a kernel returns."""
    for size in ((7, 33), (1, 1), (64, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            arguments = lora_calls(*size, dtype=dtype, factor_dtype=torch.float32)[name]
            strided = {
                k: v.mT.contiguous().mT if isinstance(v, Tensor) and v.dim() > 1 else v for k, v in arguments.items()
            }
            for given in (arguments, strided):
                real = op(name)(**given)
                with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
                    fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in given.items()}
                    fake = op(name)(**fakes)
                if real is None:
                    assert fake is None
                    continue
                for r, f in zip(*(t if isinstance(t, tuple) else (t,) for t in (real, fake)), strict=True):
                    assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device), size


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors_need_no_memory(lora_calls: Any, name: str) -> None:
    arguments = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in lora_calls(7, 33)[name].items()}
    out = op(name)(**arguments)
    for t in out if isinstance(out, tuple) else () if out is None else (out,):
        assert t.is_meta


# ---- torch.compile and torch.export ---------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def loss(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor, weight: Tensor | NF4Weight, rng: Tensor | None, p: float
) -> Tensor:
    """A LoRA layer, a DoRA norm, and pointwise work around them to fuse."""
    y = torch.nn.functional.gelu(ops.lora_linear(x * 2, weight, bias, a, b, 0.75, dropout=p, rng=rng))
    return (y / ops.dora_weight_norm(weight, a, b, 0.75).to(y.dtype)).sin().float().mean()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_compile_fullgraph_with_backward(
    fresh_dynamo: None, weight: Tensor | NF4Weight, dtype: torch.dtype, compiler: str
) -> None:
    if compiler == "inductor" and (dtype != torch.float32 or isinstance(weight, NF4Weight)):
        pytest.skip("inductor takes seconds for each: one of them")
    rng = torch.tensor(SEEDS)
    tensors = leaves(randn(6, IN, dtype=dtype), *factors(), randn(OUT))
    w = of_dtype(weight, dtype)
    expected = loss(*tensors, w, rng, 0.5)
    gradients = torch.autograd.grad(expected, tensors)
    out = torch.compile(loss, fullgraph=True, backend=compiler)(*tensors, w, rng, 0.5)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=1e-5)
    for a, b in zip(torch.autograd.grad(out, tensors), gradients, strict=True):
        assert a.dtype == b.dtype and relative_error(a, b) <= tolerance


def test_compile_draws_one_mask_for_forward_and_backward(fresh_dynamo: None) -> None:
    """The rng is drawn inside the graph: y is linear in x, so <dy, y> = <dx, x> only with the same mask."""
    x, dy, (a, b), w = randn(16, IN).requires_grad_(), randn(16, OUT, seed=4), factors(), torch.zeros(OUT, IN)

    def layer(x: Tensor) -> Tensor:
        return ops.lora_linear(x, w, None, a, b, 1.0, dropout=0.5)

    whole = ops.lora_linear(x.detach(), w, None, a, b, 1.0)
    for compiler in ("aot_eager", "inductor"):
        torch.manual_seed(1)
        y = torch.compile(layer, fullgraph=True, backend=compiler)(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert relative_error(y.detach(), whole) > 0.1, "nothing was dropped"
        assert torch.isclose((dy * y).sum(), (dx * x).sum(), rtol=1e-4), compiler
        again = torch.compile(layer, fullgraph=True, backend=compiler)(x)
        assert relative_error(again.detach(), y.detach()) > 0.1, "the second call drew the first one's mask"


def test_compile_with_dynamic_shapes(fresh_dynamo: None, weight: Tensor | NF4Weight) -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    a, b = factors()
    rng = torch.tensor(SEEDS)

    def layer(x: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, None, a, b, 0.5, dropout=0.5, rng=rng).relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    counts = []
    for rows in (9, 3, 17, 80):  # first a number that no other size here has: torch takes equal sizes for the same
        x, dy = randn(rows, IN).requires_grad_(), randn(rows, OUT, seed=rows)
        out, expected = compiled(x), layer(x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*(torch.autograd.grad(t, x, dy)[0] for t in (out, expected)))
        counts.append(graphs.frame_count)
    assert len(set(counts)) == 1, "one graph serves every number of rows"


def test_compile_of_the_ops_that_work_in_place(fresh_dynamo: None, lora_calls: Any) -> None:
    calls = lora_calls(6, 8)
    merge, delta = calls["lora_merge_"], calls["lora_grouped_delta_"]

    def step(w: Tensor, y: Tensor) -> Tensor:
        ops.lora_merge_(w, merge["lora_a"], merge["lora_b"], 0.75)
        ops.lora_grouped_delta_(y, **{k: v for k, v in delta.items() if k != "y"})
        return w.sum() + y.sum()

    expected = [t.clone() for t in (merge["weight"], delta["y"])]
    total = step(*expected)
    out = [t.clone() for t in (merge["weight"], delta["y"])]
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*out), total)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b)


class Layer(torch.nn.Module):
    def __init__(self, weight: Tensor | NF4Weight) -> None:
        super().__init__()
        self.rest = weight if isinstance(weight, NF4Weight) else None
        tensors = weight[:2] if isinstance(weight, NF4Weight) else (weight,)
        for i, t in enumerate(tensors):
            self.register_buffer(f"w{i}", t)
        self.a, self.b = (torch.nn.Parameter(t) for t in factors())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.w0 if self.rest is None else self.rest._replace(packed=self.w0, absmax=self.w1)
        return ops.lora_linear(x, weight, None, self.a, self.b, 0.5)


@pytest.mark.parametrize("kind", ["dense", "4 bits"])
def test_export_with_a_dynamic_batch(kind: str) -> None:
    layer = Layer(randn(OUT, IN) if kind == "dense" else _weight())
    program = torch.export.export(layer, (randn(4, IN),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert f"tlkernels.{'' if kind == 'dense' else 'nf4_'}lora_linear.default" in targets
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (2, 9):
        torch.testing.assert_close(loaded(randn(rows, IN)), layer(randn(rows, IN)))


# ---- torch.func -----------------------------------------------------------------------------------------------------


def test_func_grad_vjp_and_jacrev(backend: str, weight: Tensor | NF4Weight) -> None:
    x, (a, b) = randn(4, IN, dtype=torch.float64), factors(torch.float64)
    weight = of_dtype(weight, torch.float64)
    whole = values(weight).double() + 0.5 * b @ a
    grad = torch.func.grad(lambda x: ops.lora_linear(x, weight, None, a, b, 0.5).sin().sum())(x)
    torch.testing.assert_close(grad, (x @ whole.T).cos() @ whole)
    torch.testing.assert_close(torch.func.jacrev(lambda x: ops.lora_linear(x, weight, None, a, b, 0.5))(x[0]), whole)
    _, pull = torch.func.vjp(lambda x, a, b: ops.lora_linear(x, weight, None, a, b, 0.5), x, a, b)
    g = randn(4, OUT, dtype=torch.float64)
    for t, expected in zip(pull(g), (g @ whole, 0.5 * (g @ b).T @ x, 0.5 * g.T @ (x @ a.T)), strict=True):
        torch.testing.assert_close(t, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
def test_vmap_over_x(backend: str, weight: Tensor | NF4Weight, in_dim: int, dtype: torch.dtype) -> None:
    x, bias, (a, b) = randn(3, 4, IN, dtype=dtype), randn(OUT, dtype=dtype), factors(dtype)
    w = of_dtype(weight, dtype)
    batched = x.movedim(0, in_dim).contiguous()
    out = torch.func.vmap(lambda x: ops.lora_linear(x, w, bias, a, b, 0.5), in_dims=in_dim)(batched)
    e, _ = formula.lora_linear(flat(x), values(weight).to(dtype), bias, a, b, 0.5)
    check(out, e, dtype, in_dim)


def test_vmap_with_dropout_is_a_loop(backend: str, weight: Tensor | NF4Weight) -> None:
    """The mask depends on a row's number: in a batch, each sample counts its rows from 0."""
    x, (a, b), rng = randn(3, 4, IN), factors(), torch.tensor(SEEDS)

    def layer(x: Tensor, rng: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, None, a, b, 0.5, dropout=0.5, rng=rng)

    torch.testing.assert_close(
        torch.func.vmap(layer, in_dims=(0, None))(x, rng), torch.stack([layer(t, rng) for t in x])
    )
    rngs = torch.tensor([[1, 2], [3, 4], [5, 6]])
    expected = torch.stack([layer(t, r) for t, r in zip(x, rngs, strict=True)])
    torch.testing.assert_close(torch.func.vmap(layer)(x, rngs), expected)


def test_vmap_over_everything_else(backend: str) -> None:
    w, bias = randn(3, OUT, IN), randn(3, OUT)
    a, b = randn(3, RANK, IN, seed=1), randn(3, OUT, RANK, seed=2)
    x = randn(3, 2, IN, seed=3)
    expected = torch.stack([ops.lora_linear(*t, 0.5) for t in zip(x, w, bias, a, b, strict=True)])
    out = torch.func.vmap(lambda x, w, bias, a, b: ops.lora_linear(x, w, bias, a, b, 0.5))(x, w, bias, a, b)
    torch.testing.assert_close(out, expected)
    out = torch.func.vmap(lambda a: ops.lora_linear(x[0], w[0], bias[0], a, b[0], 0.5))(a)
    torch.testing.assert_close(out, torch.stack([ops.lora_linear(x[0], w[0], bias[0], t, b[0], 0.5) for t in a]))
    norms = torch.func.vmap(lambda a, b: ops.dora_weight_norm(w[0], a, b, 0.5))(a, b)
    torch.testing.assert_close(norms, (w[0] + 0.5 * b @ a).norm(dim=2))


def test_vmap_of_the_grouped_op(backend: str, lora_calls: Any) -> None:
    arguments = lora_calls(6, 8, rows=12)["lora_linear_grouped"]
    expected = ops.lora_linear_grouped(**arguments)
    x, ids = arguments["x"].view(3, 4, 8), arguments["adapter_ids"].view(3, 4)
    out = torch.func.vmap(lambda x, ids: ops.lora_linear_grouped(**{**arguments, "x": x, "adapter_ids": ids}))(x, ids)
    torch.testing.assert_close(out, expected.view(3, 4, 6))
    out = torch.func.vmap(lambda x: ops.lora_linear_grouped(**{**arguments, "x": x, "adapter_ids": ids[0]}))(x)
    loop = [ops.lora_linear_grouped(**{**arguments, "x": t, "adapter_ids": ids[0]}) for t in x]
    torch.testing.assert_close(out, torch.stack(loop))


def test_per_sample_gradients(backend: str, weight: Tensor | NF4Weight) -> None:
    """vmap over grad: the gradients of each sample's own loss."""
    x, bias, (a, b), target = randn(6, IN), randn(OUT), factors(), randn(6, OUT, seed=5)

    def sample_loss(x: Tensor, bias: Tensor, a: Tensor, b: Tensor, target: Tensor) -> Tensor:
        return (ops.lora_linear(x, weight, bias, a, b, 0.5) - target).square().sum()

    per_sample = torch.func.grad(sample_loss, argnums=(0, 1, 2, 3))
    batch = torch.func.vmap(per_sample, in_dims=(0, None, None, None, 0))(x, bias, a, b, target)
    w = values(weight)
    for i in range(6):
        dy = 2 * (x[i : i + 1] @ (w + 0.5 * b @ a).T + bias - target[i])
        _, grad_a, grad_b, grad_x = (
            e.value for e in formula.lora_gradients(dy, x[i : i + 1], w, a, b, 0.5)
        )  # fmt: skip
        for t, e in zip(batch, (grad_x[0], dy[0], grad_a, grad_b), strict=True):
            assert relative_error(t[i], e) <= 1e-5


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DTYPES[1:3], ids=str)
def test_autocast_is_a_call_in_its_dtype(backend: str, weight: Tensor | NF4Weight, kind: torch.dtype) -> None:
    """As torch.nn.functional.linear: a float32 model computes in autocast's dtype, and its gradients are float32."""
    x, bias, a, b = leaves(randn(9, IN), randn(OUT), *factors())
    (w,) = leaves(weight) if isinstance(weight, Tensor) else (weight,)
    rng, dy = torch.tensor(SEEDS), randn(9, OUT, seed=4, dtype=kind)
    with torch.autocast("cpu", dtype=kind):
        y = ops.lora_linear(x, w, bias, a, b, 0.5, dropout=0.5, rng=rng)
    assert y.dtype == kind
    y.backward(dy)
    mask = formula.dropout_mask(*SEEDS, 9, IN, 0.5)
    dense, a_, b_ = values(w).detach(), a.detach(), b.detach()
    rows = x.detach().to(kind)
    e, _ = formula.lora_linear(rows, dense, bias.detach().to(kind), a_, b_, 0.5, mask, 0.5)
    e.check(y.detach(), kind, "y")
    _, *expected = formula.lora_gradients(dy, rows, dense, a_, b_, 0.5, mask, 0.5)
    for name, leaf, e in zip(("dA", "dB"), (a, b), expected, strict=False):
        assert leaf.grad.dtype == torch.float32
        e.check(leaf.grad, kind, name)
    expected[2].check(x.grad.to(kind), kind, "dx")
    assert same_bits(x.grad, x.grad.to(kind).float()) and x.grad.dtype == bias.grad.dtype == torch.float32
    if isinstance(w, Tensor):
        assert w.grad.dtype == torch.float32 and relative_error(w.grad, dy.double().T @ rows.double()) <= 2**-7


def test_autocast_changes_nothing_else(backend: str) -> None:
    """float64 stays, as with torch's own linear; disabled autocast is none; inside it an op's sums are not lowered."""
    x, (a, b), w = randn(3, IN), factors(), randn(OUT, IN)
    expected = ops.lora_linear(x, w, None, a, b, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.lora_linear(x.double(), w.double(), None, a, b, 0.5).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert same_bits(ops.lora_linear(x, w, None, a, b, 0.5), expected)
        assert same_bits(op("lora_linear")(x, w, None, a, b, None, scaling=0.5)[0], expected)
        norm = ops.dora_weight_norm(w, a, b, 0.5)
        merged = ops.lora_merge_(w.clone(), a, b, 0.5)
    assert same_bits(norm, ops.dora_weight_norm(w, a, b, 0.5))
    assert same_bits(merged, ops.lora_merge_(w.clone(), a, b, 0.5))


def test_autocast_of_the_grouped_op(backend: str, lora_calls: Any) -> None:
    arguments = lora_calls(6, 8)["lora_linear_grouped"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.lora_linear_grouped(**arguments)
    lower = {k: arguments[k].bfloat16() for k in ("x", "weight", "bias")}
    assert y.dtype == torch.bfloat16 and same_bits(y, ops.lora_linear_grouped(**{**arguments, **lower}))


# ---- randomness -----------------------------------------------------------------------------------------------------


def test_torchs_seed_governs_the_mask(backend: str, weight: Tensor | NF4Weight) -> None:
    x, (a, b) = randn(9, IN), factors()

    def layer() -> Tensor:
        return ops.lora_linear(x, weight, None, a, b, 1.0, dropout=0.5)

    torch.manual_seed(5)
    first, second = layer(), layer()
    torch.manual_seed(5)
    assert same_bits(layer(), first) and same_bits(layer(), second)
    torch.manual_seed(6)
    assert not torch.equal(first, second) and not torch.equal(layer(), first)


def test_no_randomness_is_consumed_without_dropout_or_with_an_rng(backend: str, weight: Tensor | NF4Weight) -> None:
    x, a, b = leaves(randn(9, IN), *factors())
    rng = torch.tensor(SEEDS)
    before = torch.get_rng_state()
    plain = ops.lora_linear(x, weight, None, a, b, 1.0)
    assert same_bits(ops.lora_linear(x, weight, None, a, b, 1.0, dropout=0.0, rng=rng).detach(), plain.detach())
    dropped = ops.lora_linear(x, weight, None, a, b, 1.0, dropout=0.5, rng=rng)
    (plain.sum() + dropped.sum()).backward()
    ops.lora_dropout_mask(rng, 3, 4, 0.5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(rng, torch.tensor(SEEDS)), "the rng of the caller was changed"
    ops.lora_linear(x, weight, None, a, b, 1.0, dropout=0.5)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_given_rng_gives_the_mask_of_lora_dropout_mask(backend: str, weight: Tensor | NF4Weight) -> None:
    x, (a, b), rng = randn(2, 5, IN), factors(), torch.tensor(SEEDS)
    mask = ops.lora_dropout_mask(rng, 10, IN, 0.25).view(2, 5, IN)
    y = ops.lora_linear(x, weight, None, a, b, 0.5, dropout=0.25, rng=rng)
    expected = x @ values(weight).T + 0.5 * (x * mask / 0.75) @ a.T @ b.T
    assert relative_error(y, expected.double()) <= 1e-6


def test_the_expectation_over_masks_is_the_product_without(backend: str) -> None:
    x, (a, b), w = randn(1, IN), factors(), torch.zeros(OUT, IN)
    many = ops.lora_linear(x.expand(20_000, -1), w, None, a, b, 1.0, dropout=0.25, rng=torch.tensor(SEEDS))
    whole = ops.lora_linear(x, w, None, a, b, 1.0)[0]
    assert ((many.mean(0) - whole).abs() <= 5 * many.std(0) / 20_000**0.5).all()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_makes_the_same_mask_again(
    backend: str, weight: Tensor | NF4Weight, reentrant: bool
) -> None:
    tensors = leaves(randn(9, IN), *factors())
    dy = randn(9, OUT, seed=4)

    def block(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.gelu(ops.lora_linear(x, weight, None, a, b, 0.5, dropout=0.5))

    torch.manual_seed(1)
    y = block(*tensors)
    expected = torch.autograd.grad(y, tensors, dy)
    torch.manual_seed(1)
    again = checkpoint(block, *tensors, use_reentrant=reentrant)
    again.backward(dy)  # a reentrant checkpoint knows only this
    assert same_bits(again.detach(), y.detach())
    for leaf, e in zip(tensors, expected, strict=True):
        assert same_bits(leaf.grad, e)


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor_dtype", DTYPES[:2], ids=lambda d: f"factors {d}")
def test_saved_for_backward_are_x_the_weight_and_what_has_the_size_of_the_rank(
    backend: str, weight: Tensor | NF4Weight, dtype: torch.dtype, factor_dtype: torch.dtype, p: float
) -> None:
    saved: list[Tensor] = []
    x, bias, a, b = leaves(randn(40, IN, dtype=dtype), randn(OUT), *factors(factor_dtype))
    w, rng = of_dtype(weight, dtype), torch.tensor(SEEDS)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.lora_linear(x, w, bias, a, b, 0.5, dropout=p, rng=rng)
    own = {t.data_ptr() for t in (*(w if isinstance(w, NF4Weight) else (w,)), x, a, b, rng) if isinstance(t, Tensor)}
    others = [t for t in saved if t.data_ptr() not in own]
    assert x.data_ptr() in {t.data_ptr() for t in saved}
    assert [tuple(t.shape) for t in others] == [(40, RANK)] and others[0].dtype == dtype


def test_saved_by_the_grouped_op(backend: str, lora_calls: Any) -> None:
    arguments = lora_calls(30, 40, rows=20)["lora_linear_grouped"]
    for name in ("x", "lora_a", "lora_b", "bias"):
        arguments[name] = arguments[name].clone().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.lora_linear_grouped(**arguments)
    own = {t.data_ptr() for t in arguments.values() if isinstance(t, Tensor)}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in own] == [(20, 3)]


PEAK = """
import sys, torch
from tlkernels import ops

def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024

torch.set_num_threads(1)
n, rows, rank = 4096, 32, 8
weight = ops.nf4_quantize(torch.randn(n, n, dtype=torch.bfloat16))
small = ops.nf4_quantize(torch.randn(64, 64))

def step(weight, n):
    x = torch.randn(rows, n, dtype=torch.bfloat16, requires_grad=True)
    a, b = (torch.randn(*s, requires_grad=True) for s in ((rank, n), (n, rank)))
    ops.lora_linear(x, weight, None, a, b, 0.5, dropout=0.1).sum().backward()
    ops.dora_weight_norm(weight, a, b, 0.5)

step(small, 64)  # what a first call loads
with open("/proc/self/clear_refs", "w") as counter:
    counter.write("5")
before = resident("VmRSS")
step(weight, n)
print(resident("VmHWM") - before)
"""


def test_a_4_bit_base_is_never_dense(tmp_path: Path) -> None:
    """Forward, backward and norm of a 4096 x 4096 base, 32 MiB in bfloat16: the peak rises by less than half."""
    needed = {"nf4_lora_linear", "lora_grad_ab", "nf4_lora_grad_x", "nf4_dora_weight_norm", "lora_dropout_mask"}
    if not needed <= _registry.native_ops("cpu"):
        pytest.skip("the reference decodes the whole weight")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not count a process's peak")
    run = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(tlkernels.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 16 * 2**20, f"{int(run.stdout) / 2**20:.0f} MiB"
