"""The nf4 ops as citizens of torch: gradients, opcheck, compile, export, torch.func, autocast."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import formula
import pytest
import torch
from tolerances import TOLERANCES, assert_product, relative_error
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import tlkernels
from tlkernels import ops
from tlkernels.ops import NF4Weight

OUT, IN = 24, 50
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPS = [
    "nf4_quantize", "absmax_quantize", "absmax_dequantize", "nf4_dequantize", "nf4_dequantize.out", "nf4_linear",
    "nf4_linear_many", "nf4_linear_t", "nf4_embedding",
]  # fmt: skip


def overload(name: str) -> Any:
    packet, _, suffix = name.partition(".")
    return getattr(getattr(torch.ops.tlkernels, packet), suffix or "default")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[False, True], ids=["plain", "nested"])
def weight(request: pytest.FixtureRequest) -> NF4Weight:
    return ops.nf4_quantize(randn(OUT, IN), double_quant=request.param)


def dense(weight: NF4Weight) -> Tensor:
    return ops.nf4_dequantize(weight, dtype=torch.float64)


def test_the_list_of_ops_here_is_complete(nf4_calls: Any) -> None:
    assert set(OPS) == set(nf4_calls(1, 1)) <= set(tlkernels.ops._registry.OPS)


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_gradcheck_of_the_float64_path(backend: str, weight: NF4Weight) -> None:
    x, g, bias = (randn(*s, dtype=torch.float64).requires_grad_() for s in ((2, 3, IN), (3, OUT), (OUT,)))
    for check in (gradcheck, gradgradcheck):
        assert check(lambda x, bias: ops.nf4_linear(x, weight, bias), (x, bias))
        assert check(lambda g: ops.nf4_linear_t(g, weight), (g,))


GRADS: dict[str, Callable[..., Tensor]] = {
    "random": randn,
    "expanded from a sum": lambda *shape, dtype: torch.ones((), dtype=dtype).expand(shape),
    "one element": lambda *shape, dtype: torch.eye(shape[-1], dtype=dtype)[3].expand(shape),
    "transposed": lambda *shape, dtype: randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype).mT,
    "every second": lambda *shape, dtype: randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2],
    "zero": lambda *shape, dtype: torch.zeros(shape, dtype=dtype),
    "large": lambda *shape, dtype: randn(*shape, dtype=dtype) * 100,
}


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(4,), (2, 7), (70,), ()], ids=str)
def test_gradients_against_float64(
    backend: str, weight: NF4Weight, leading: tuple[int, ...], dtype: torch.dtype, grad: str
) -> None:
    if grad == "transposed" and not leading:
        leading = (1,)  # a vector has no transpose
    x, bias = randn(*leading, IN, dtype=dtype).requires_grad_(), randn(OUT, dtype=dtype).requires_grad_()
    grad_y, w = GRADS[grad](*leading, OUT, dtype=dtype), dense(weight)
    ops.nf4_linear(x, weight, bias).backward(grad_y)
    assert_product(x.grad, grad_y, w.t(), context="x")
    assert bias.grad.dtype == dtype
    summed = grad_y.double().reshape(-1, OUT).sum(0)
    assert relative_error(bias.grad, summed) <= 2 * TOLERANCES[dtype].unit
    g = GRADS[grad](*leading, OUT, dtype=dtype).detach().clone().requires_grad_()
    grad_x = GRADS[grad](*leading, IN, dtype=dtype)
    ops.nf4_linear_t(g, weight).backward(grad_x)
    assert_product(g.grad, grad_x, w, context="linear_t")


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_gradient_comes_in_the_dtype_of_the_bias(
    backend: str, weight: NF4Weight, dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    bias = torch.zeros(OUT, dtype=bias_dtype, requires_grad=True)
    ops.nf4_linear(torch.zeros(1000, IN, dtype=dtype), weight, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((OUT,), 1000, dtype=bias_dtype))  # a bfloat16 sum would stop at 256


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_double_backward_of_kernels(backend: str, weight: NF4Weight, dtype: torch.dtype) -> None:
    """y = f(x), gx = d<g, y>/dx = g W, and d<v, gx>/dg = v W^T."""
    x, g, v = (
        randn(5, IN, dtype=dtype).requires_grad_(),
        randn(5, OUT, seed=1, dtype=dtype),
        randn(5, IN, seed=2, dtype=dtype),
    )
    g.requires_grad_()
    (grad_x,) = torch.autograd.grad(ops.nf4_linear(x, weight), x, g, create_graph=True)
    (grad_g,) = torch.autograd.grad(grad_x, g, v, create_graph=True)
    assert_product(grad_x, g.detach(), dense(weight).t())
    assert_product(grad_g, v, dense(weight))
    with pytest.raises(RuntimeError, match=r"not have been used|does not require grad"):
        torch.autograd.grad(grad_x.sum(), x)  # linear: the second derivative in x is zero, and torch says unused


def test_only_asked_gradients_are_computed(backend: str, weight: NF4Weight) -> None:
    bias = randn(OUT).requires_grad_()
    x = randn(3, IN)
    ops.nf4_linear(x, weight, bias).sum().backward()
    assert x.grad is None and torch.equal(bias.grad, torch.full((OUT,), 3.0))
    x.requires_grad_()
    ops.nf4_linear(x, weight, bias.detach()).sum().backward()
    assert x.grad is not None


def test_nothing_dense_is_saved_for_backward(backend: str, weight: NF4Weight) -> None:
    saved: list[Tensor] = []
    x = randn(5, IN).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.nf4_linear(x, weight, randn(OUT))
    parts = {
        t.data_ptr() for t in (weight.packed, weight.absmax, weight.absmax_scale, weight.absmax_offset) if t is not None
    }
    assert saved and {t.data_ptr() for t in saved} <= parts


REFUSED: dict[str, Callable[[NF4Weight, Tensor], Tensor]] = {
    "absmax": lambda w, leaf: ops.nf4_linear(randn(2, IN), w._replace(absmax=leaf * w.absmax, absmax_scale=None)),
    "code": lambda w, leaf: ops.nf4_linear(randn(2, IN), w._replace(code=leaf * formula.NF4)),
    "code of linear_t": lambda w, leaf: ops.nf4_linear_t(randn(2, OUT), w._replace(code=leaf * formula.NF4)),
    "code of dequantize": lambda w, leaf: ops.nf4_dequantize(w._replace(code=leaf * formula.NF4)),
    "code of embedding": lambda w, leaf: ops.nf4_embedding(torch.tensor([1]), w._replace(code=leaf * formula.NF4)),
    "quantize": lambda w, leaf: torch.ops.tlkernels.nf4_quantize(leaf * randn(4, 64))[1],
    "absmax_quantize": lambda w, leaf: ops.absmax_quantize(leaf * torch.ones(5))[1],
    "absmax_dequantize": lambda w, leaf: ops.absmax_dequantize(
        torch.zeros(5, dtype=torch.uint8), leaf * torch.ones(1), torch.ones(())
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_gradients_that_mean_nothing_are_refused(backend: str, what: str) -> None:
    """Never a silent zero: asking for one raises a sentence."""
    leaf = torch.tensor(1.0, requires_grad=True)
    out = REFUSED[what](ops.nf4_quantize(randn(OUT, IN)), leaf)
    with pytest.raises(RuntimeError, match=r"(nf4|absmax)_\w+ is not differentiable.*(frozen|detach)"):
        out.sum().backward()


def test_quantize_of_a_parameter_detaches_it(backend: str) -> None:
    weight = ops.nf4_quantize(torch.nn.Parameter(randn(4, 64)))
    assert not weight.absmax.requires_grad and not ops.nf4_dequantize(weight).requires_grad


@pytest.mark.parametrize("op", ["nf4_linear", "nf4_linear_t"])
def test_forward_mode_is_refused(backend: str, op: str, weight: NF4Weight) -> None:
    x = randn(3, IN if op == "nf4_linear" else OUT)
    function = getattr(ops, op)
    refusal = rf"{op}: forward-mode AD is not supported; use reverse mode"
    with pytest.raises(RuntimeError, match=refusal):
        torch.func.jvp(lambda x: function(x, weight), (x,), (x,))
    with pytest.raises(RuntimeError, match=refusal):
        torch.func.jacfwd(lambda x: function(x, weight))(x)
    with forward_ad.dual_level():
        assert function(x, weight).shape[0] == 3  # a plain tensor inside a dual level is nothing special
        with pytest.raises(RuntimeError, match=refusal):
            function(forward_ad.make_dual(x, x), weight)


# ---- torch.library.opcheck ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(backend: str, nf4_calls: Any, name: str, nested: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = nf4_calls(7, 33, dtype=dtype, nested=nested)[name]
        if "linear" in name:
            first = next(iter(arguments))
            arguments[first] = arguments[first].requires_grad_()
        op = overload(name)
        positional = [a.name for a in op._schema.arguments if not a.kwarg_only]
        args = tuple(arguments[k] for k in positional)
        kwargs = {k: v for k, v in arguments.items() if k not in positional}
        torch.library.opcheck(op, args, kwargs, atol=2 * TOLERANCES[dtype].unit, rtol=2 * TOLERANCES[dtype].unit)


@pytest.mark.parametrize("name", OPS)
def test_fake_tensors_have_the_real_shapes_dtypes_and_strides(backend: str, nf4_calls: Any, name: str) -> None:
    """For odd sizes, no rows, one row, a non-contiguous input: what a graph assumes is what a kernel returns."""
    for size in ((7, 33), (1, 1), (0, 3), (3, 0), (64, 64)):
        arguments = nf4_calls(*size)[name]
        arguments = {k: v.mT.contiguous().mT if k in ("w", "x", "grad_output") else v for k, v in arguments.items()}
        real = overload(name)(**arguments)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
            fake = overload(name)(**fakes)
        if real is None:
            assert fake is None
            continue
        for r, f in zip(*(t if isinstance(t, tuple) else (t,) for t in (real, fake)), strict=True):
            assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device), size


# ---- torch.compile and torch.export ---------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def loss(x: Tensor, bias: Tensor, weight: NF4Weight) -> Tensor:
    """Both products, an embedding and a decode in one graph, with pointwise work around them to fuse."""
    y = torch.nn.functional.gelu(ops.nf4_linear(x * 2, weight, bias))
    back = ops.nf4_linear_t(y, weight)
    rows = ops.nf4_embedding(torch.arange(3), weight, dtype=x.dtype)
    return (back.sin().mean() + rows.mean() + ops.nf4_dequantize(weight, dtype=x.dtype).mean() + y.mean()).float()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_compile_fullgraph_with_backward(fresh_dynamo: None, weight: NF4Weight, dtype: torch.dtype) -> None:
    x, bias = randn(6, IN, dtype=dtype).requires_grad_(), randn(OUT, dtype=dtype).requires_grad_()
    expected = loss(x, bias, weight)
    gradients = torch.autograd.grad(expected, (x, bias))
    compiled = torch.compile(loss, fullgraph=True)(x, bias, weight)
    torch.testing.assert_close(compiled, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(compiled, (x, bias)), gradients, strict=True):
        assert a.dtype == b.dtype and relative_error(a, b) <= (3e-2 if dtype == torch.bfloat16 else 1e-5)


def test_compile_with_dynamic_shapes(fresh_dynamo: None, weight: NF4Weight) -> None:
    compiled = torch.compile(lambda x, w: ops.nf4_linear(x, w).relu(), fullgraph=True, dynamic=True)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    counted = torch.compile(lambda x, w: ops.nf4_linear(x, w).relu(), fullgraph=True, dynamic=True, backend=graphs)
    for rows in (2, 3, 17, 80):
        x = randn(rows, IN).requires_grad_()
        out = counted(x, weight)
        expected = ops.nf4_linear(x, weight).relu()
        torch.testing.assert_close(out, expected)
        (a,), (b,) = torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(compiled(x.detach(), weight), expected.detach())
    assert graphs.frame_count == 1, "one graph serves every number of rows"


def test_compile_of_quantize_and_the_out_form(fresh_dynamo: None) -> None:
    @torch.compile(fullgraph=True)
    def round_trip(w: Tensor, out: Tensor) -> Tensor:
        weight = ops.nf4_quantize(w + 1.0, double_quant=True)
        ops.nf4_dequantize(weight, out=out)
        return out * 2.0

    w, out = randn(7, 33), torch.empty(7, 33)
    expected = ops.nf4_dequantize(ops.nf4_quantize(w + 1.0, double_quant=True))
    assert torch.equal(round_trip(w, out), expected * 2.0) and torch.equal(out, expected)


class Layer(torch.nn.Module):
    """The ops as a module that holds the parts of a weight as buffers."""

    def __init__(self, weight: NF4Weight) -> None:
        super().__init__()
        self.rest = weight
        for name in ("packed", "absmax", "absmax_scale", "absmax_offset"):
            self.register_buffer(name, getattr(weight, name))

    def forward(self, x: Tensor) -> Tensor:
        names = ("packed", "absmax", "absmax_scale", "absmax_offset")
        weight = self.rest._replace(**{name: getattr(self, name) for name in names})
        return ops.nf4_linear(x, weight) + ops.nf4_embedding(torch.arange(1), weight, dtype=x.dtype).sum()


def test_export_with_a_dynamic_batch(weight: NF4Weight) -> None:
    layer = Layer(weight)
    program = torch.export.export(layer, (randn(4, IN),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"tlkernels.nf4_linear.default", "tlkernels.nf4_embedding.default"} <= targets
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (2, 9):
        torch.testing.assert_close(loaded(randn(rows, IN)), layer(randn(rows, IN)))


# ---- torch.func -----------------------------------------------------------------------------------------------------


def test_func_grad_vjp_and_jacrev(backend: str, weight: NF4Weight) -> None:
    x, w = randn(4, IN, dtype=torch.float64), dense(weight)
    grad = torch.func.grad(lambda x: ops.nf4_linear(x, weight).sin().sum())(x)
    torch.testing.assert_close(grad, (x @ w.t()).cos() @ w)
    torch.testing.assert_close(torch.func.jacrev(lambda x: ops.nf4_linear(x, weight))(x[0]), w)
    torch.testing.assert_close(
        torch.func.jacrev(lambda g: ops.nf4_linear_t(g, weight))(randn(OUT, dtype=torch.float64)), w.t()
    )
    _, pull = torch.func.vjp(lambda x: ops.nf4_linear(x, weight), x)
    g = randn(4, OUT, dtype=torch.float64)
    torch.testing.assert_close(pull(g)[0], g @ w)


def test_func_second_derivatives(backend: str, weight: NF4Weight) -> None:
    x, w = randn(IN, dtype=torch.float64), dense(weight)
    hessian = torch.func.jacrev(torch.func.jacrev(lambda x: ops.nf4_linear(x, weight).sin().sum()))(x)
    torch.testing.assert_close(hessian, w.t() @ torch.diag(-(w @ x).sin()) @ w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
def test_vmap_over_x(backend: str, weight: NF4Weight, in_dim: int, dtype: torch.dtype) -> None:
    x, bias = randn(3, 4, IN, dtype=dtype), randn(OUT, dtype=dtype)
    batched = x.movedim(0, in_dim).contiguous()
    out = torch.func.vmap(lambda x: ops.nf4_linear(x, weight, bias), in_dims=in_dim)(batched)
    assert_product(out, x, dense(weight), bias)
    g = randn(3, 4, OUT, dtype=dtype)
    back = torch.func.vmap(lambda g: ops.nf4_linear_t(g, weight), in_dims=in_dim)(g.movedim(0, in_dim).contiguous())
    assert_product(back, g, dense(weight).t())


def test_vmap_over_weights_biases_and_indices(backend: str) -> None:
    weights = [ops.nf4_quantize(randn(OUT, IN, seed=s)) for s in range(3)]
    packed, absmax = (torch.stack([getattr(w, name) for w in weights]) for name in ("packed", "absmax"))
    x, biases, indices = randn(3, 2, IN), randn(3, OUT), torch.tensor([[0, 5], [23, 1], [2, 2]])

    def with_parts(packed: Tensor, absmax: Tensor) -> NF4Weight:
        return weights[0]._replace(packed=packed, absmax=absmax)

    cases = {
        "linear": (lambda x, p, a, b: ops.nf4_linear(x, with_parts(p, a), b), (x, packed, absmax, biases)),
        "linear_t": (lambda g, p, a: ops.nf4_linear_t(g, with_parts(p, a)), (randn(3, 2, OUT), packed, absmax)),
        "embedding": (lambda i, p, a: ops.nf4_embedding(i, with_parts(p, a)), (indices, packed, absmax)),
    }
    for name, (function, inputs) in cases.items():
        expected = torch.stack([function(*(t[i] for t in inputs)) for i in range(3)])
        torch.testing.assert_close(torch.func.vmap(function)(*inputs), expected, msg=name)
    shared = torch.func.vmap(lambda b: ops.nf4_linear(x[0], weights[0], b))(biases)
    torch.testing.assert_close(shared, torch.stack([ops.nf4_linear(x[0], weights[0], b) for b in biases]))


def test_per_sample_gradients(backend: str, weight: NF4Weight) -> None:
    """vmap over grad: the gradient of each sample's own loss."""
    x, bias = randn(6, IN), randn(OUT)

    def sample_loss(x: Tensor, bias: Tensor) -> Tensor:
        return ops.nf4_linear(x, weight, bias).square().sum()

    grad_x, grad_bias = torch.func.vmap(torch.func.grad(sample_loss, argnums=(0, 1)), in_dims=(0, None))(x, bias)
    for i in range(6):
        a, b = torch.func.grad(sample_loss, argnums=(0, 1))(x[i], bias)
        assert relative_error(grad_x[i], a) <= 2e-6 and relative_error(grad_bias[i], b) <= 2e-6


# ---- the rest of torch ----------------------------------------------------------------------------------------------


def test_autocast_leaves_the_dtype_of_x(backend: str, weight: NF4Weight) -> None:
    """The ops are not on autocast's lists: they compute in the dtype that x has, whatever that is by then."""
    x, layer = randn(3, IN), torch.nn.Linear(IN, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.nf4_linear(x, weight).dtype == torch.float32
        assert ops.nf4_linear(layer(x), weight).dtype == torch.bfloat16


def test_inference_mode_and_no_grad(backend: str, weight: NF4Weight) -> None:
    x = randn(3, IN).requires_grad_()
    expected = ops.nf4_linear(x, weight)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            out = ops.nf4_linear(x, weight)
            assert not out.requires_grad and torch.equal(out, expected)
            quantized = ops.nf4_quantize(x)
        assert ops.nf4_dequantize(quantized).shape == x.shape


def test_activation_checkpointing(backend: str, weight: NF4Weight) -> None:
    x = randn(3, IN).requires_grad_()

    def block(x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(ops.nf4_linear(x, weight))

    (expected,) = torch.autograd.grad(block(x).sum(), x)
    (out,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum(), x)
    assert torch.equal(out, expected)


def test_a_weight_is_a_plain_value(weight: NF4Weight) -> None:
    """deepcopy, torch.save and nbytes of an NF4Weight."""
    file = io.BytesIO()
    torch.save(tuple(weight), file)
    file.seek(0)
    for other in (copy.deepcopy(weight), NF4Weight(*torch.load(file, weights_only=True))):
        assert torch.equal(ops.nf4_dequantize(other), ops.nf4_dequantize(weight))
        assert other.packed.data_ptr() != weight.packed.data_ptr()
    blocks = -(-OUT * IN // 64)
    nested = weight.absmax.dtype == torch.uint8
    assert weight.nbytes == OUT * IN // 2 + (blocks + 4 + 4 if nested else 4 * blocks)
