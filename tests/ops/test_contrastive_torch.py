"""The contrastive ops as citizens of torch: gradients, opcheck, compile, torch.func, autocast, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formula import same_bits
from tolerances import TOLERANCES, relative_error
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tlkernels
from tlkernels import ops
from tlkernels.ops import _registry

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPS = (
    "sim_lse", "sim_lse_backward", "sigmoid_contrastive", "sigmoid_contrastive_backward", "sigmoid_contrastive_sum",
)  # fmt: skip
SOFTMAX_LOSSES = ("info_nce", "everything", "nt_xent", "sup_con", "sup_con, others", "sim_lse")
LABELS = torch.tensor([2, 2, -100, 5, 4, 0])
CLASSES = torch.tensor([0, 1, 0, 2, 1, 3])


def op(name: str) -> Any:
    return getattr(torch.ops.tlkernels, name).default


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(t, dim=-1).to(dtype)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def weights(t: Tensor) -> Tensor:
    """Not uniform, and of both signs."""
    return torch.linspace(-1.0, 1.7, len(t), device=t.device, dtype=torch.promote_types(t.dtype, torch.float32))


# every loss as a function of (x [6, D], y [9, D], scale, bias), a sum with weights of its own
LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda x, y, s, b: 3 * ops.info_nce(x, y, s, b),
    "everything": lambda x, y, s, b: sum(
        (t * weights(t) * (i + 1)).sum()
        for i, t in enumerate(
            ops.info_nce(
                x, y, s, b, LABELS, x_negatives=y[:4] + 0.1, y_negatives=x.flip(1), decoupled=True,
                label_smoothing=0.2, reduction="none", return_lse=True,
            )
        )
    ),
    "nt_xent": lambda x, y, s, b: 3 * ops.nt_xent(x, y[:6], temperature=1 / s) + 0 * b,
    "sup_con": lambda x, y, s, b: 3 * ops.sup_con(x, CLASSES, temperature=1 / s) + 0 * b * y.sum(),
    "sup_con, others": lambda x, y, s, b: 3 * ops.sup_con(
        x, CLASSES, y, torch.arange(9) % 4, temperature=1 / s, no_positive="zero"
    ) + 0 * b,
    "sim_lse": lambda x, y, s, b: sum(
        (t * weights(t) * (i + 1)).sum()
        for i, t in enumerate(ops.sim_lse(x, y, s, b, labels=LABELS.clamp(min=-1), exclude=CLASSES))
    ),
    "sigmoid_contrastive": lambda x, y, s, b: 3 * ops.sigmoid_contrastive(x, y, s, b),
    "sigmoid_contrastive, each": lambda x, y, s, b: (
        ops.sigmoid_contrastive(x, y, s, b, labels=LABELS, reduction="none") * weights(x[:, 0])
    ).sum(),
    "sigmoid_contrastive, negative": lambda x, y, s, b: ops.sigmoid_contrastive(
        x, y, s, b, negative_only=True, reduction="sum"
    ),
}  # fmt: skip


def inputs(dtype: torch.dtype = torch.float32, size: int = 12) -> tuple[Tensor, ...]:
    acc = torch.promote_types(dtype, torch.float32)
    scalars = torch.tensor(5.0, dtype=acc), torch.tensor(-0.5, dtype=acc)
    return leaves(features(6, size, dtype=dtype), features(9, size, seed=1, dtype=dtype), *scalars)


def used(name: str, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Those whose gradient is not 0 or none by the formula."""
    if name.startswith("sup_con") or name == "nt_xent":
        return [tensors[0], tensors[2]] if name == "sup_con" else list(tensors[:3])
    return list(tensors[:3]) if name == "info_nce" else list(tensors)


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_of_the_float64_path(backend: str, name: str) -> None:
    assert gradcheck(LOSSES[name], inputs(torch.float64, size=5), atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_float64(backend: str, name: str, dtype: torch.dtype) -> None:
    """Of the rounded features; several rounded gradients may add up to one."""
    tensors = inputs(dtype)
    exact = leaves(*(t.double() for t in tensors))
    grads, expected = (
        torch.autograd.grad(LOSSES[name](*t), used(name, t), allow_unused=True) for t in (tensors, exact)
    )
    for t, grad, e in zip(used(name, tensors), grads, expected, strict=True):
        assert grad.dtype == t.dtype and grad.shape == t.shape
        error = float((grad.double() - e).norm())
        rounding = max(TOLERANCES[dtype].unit, TOLERANCES[t.dtype].unit)
        assert error <= (5 * rounding + 1e-5) * float(e.norm() + (0 if t.dim() else 5)), (name, t.shape, error)


@pytest.mark.parametrize("name", LOSSES)
def test_only_asked_gradients_are_computed(backend: str, name: str) -> None:
    """Each alone is what it is among all, and what was not asked for stays None."""
    everything = inputs()
    LOSSES[name](*everything).backward()
    for i in range(4):
        alone = [t.detach().clone().requires_grad_(i == j) for j, t in enumerate(everything)]
        loss = LOSSES[name](*alone)
        if not loss.requires_grad:
            assert name == "sup_con" and i in (1, 3)
            continue
        loss.backward()
        assert [j for j, t in enumerate(alone) if t.grad is not None] in ([i], [])
        if alone[i].grad is None:
            continue
        torch.testing.assert_close(alone[i].grad, everything[i].grad, rtol=1e-4, atol=1e-5)


def test_one_output_at_a_time(backend: str) -> None:
    """Gradients of each of the four alone: autograd hands over None for the others."""
    for dtype in DTYPES:
        for index in range(4):
            grads = []
            for kind in (dtype, torch.float64):
                x, y, s, b = leaves(*(t.to(kind) for t in inputs(dtype)))
                if kind == dtype:
                    out = ops.sim_lse(x, y, s, b, labels=CLASSES, exclude=CLASSES + 1)[index]
                else:
                    z = s * x @ y.T + b
                    kept = z.masked_fill(functional.one_hot(CLASSES + 1, 9).bool(), -torch.inf)
                    row, col, own = kept.logsumexp(1), kept.logsumexp(0), z[torch.arange(6), CLASSES]
                    out = (row, col, row - own, col[CLASSES] - own)[index]
                by = weights(out)
                grads.append(torch.autograd.grad((out * by).sum(), (x, y, s, b), allow_unused=True))
            for i, (grad, e) in enumerate(zip(*grads, strict=True)):
                e = torch.zeros_like(grad) if e is None else e
                scale = float(e.norm()) + (3 if i > 1 else 0)
                bound = (2 * TOLERANCES[dtype].unit + (1e-12 if dtype == torch.float64 else 1e-5)) * scale
                assert float((grad.double() - e).norm()) <= bound, (dtype, index, i)


def test_the_gradient_of_the_bias_of_a_softmax_is_0_where_it_cancels(backend: str) -> None:
    for name in ("info_nce", "nt_xent"):
        tensors = inputs()
        grad = torch.autograd.grad(LOSSES[name](*tensors), tensors[3])[0]
        assert abs(grad) <= 1e-6


def test_gradients_accumulate_and_a_graph_may_be_kept(backend: str) -> None:
    for name, loss in LOSSES.items():
        tensors = inputs()
        total = loss(*tensors)
        first = torch.autograd.grad(total, used(name, tensors), retain_graph=True)
        second = torch.autograd.grad(2 * total, used(name, tensors))
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(2 * a, b, rtol=1e-5, atol=1e-6)


def test_a_result_that_needs_no_gradient_has_none(backend: str) -> None:
    for name, loss in LOSSES.items():
        tensors = inputs()
        expected = loss(*tensors)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                out = loss(*tensors)
            assert not out.requires_grad
            torch.testing.assert_close(out, expected.detach(), rtol=1e-6, atol=1e-6, msg=name)
        assert not loss(*(t.detach() for t in tensors)).requires_grad


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing(backend: str, reentrant: bool) -> None:
    tensors = inputs()
    expected = torch.autograd.grad(LOSSES["info_nce"](*tensors), tensors[:3])
    checkpoint(LOSSES["info_nce"], *tensors, use_reentrant=reentrant).backward()
    for t, e in zip(tensors, expected, strict=False):
        assert same_bits(t.grad, e)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_refused(backend: str, name: str) -> None:
    """With its sentence, never a silent zero: of each argument, also by torch.func."""
    tensors = inputs()
    total = LOSSES[name](*tensors).square()
    refusal = r"(sim_lse|sigmoid_contrastive)_backward is not differentiable: it is the gradient of"
    # that of a softmax's bias is a sum of the weights: with a derivative, and a right one
    count = 3 if name in SOFTMAX_LOSSES else 4
    first = torch.autograd.grad(total, used(name, tensors)[:count], create_graph=True)
    for grad in first:
        with pytest.raises(RuntimeError, match=refusal):
            grad.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=refusal):
        torch.func.grad(lambda x: torch.func.grad(LOSSES[name])(x, *tensors[1:]).square().sum())(tensors[0].detach())
    with pytest.raises(RuntimeError, match=refusal):
        torch.autograd.functional.hessian(lambda x: LOSSES[name](x, *tensors[1:]), tensors[0].detach())


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_refused(backend: str, name: str) -> None:
    x, *rest = (t.detach() for t in inputs())
    refusal = r"(sim_lse|sigmoid_contrastive(_sum)?): forward-mode AD is not supported; use reverse mode"
    with pytest.raises(RuntimeError, match=refusal):
        torch.func.jvp(lambda x: LOSSES[name](x, *rest), (x,), (x,))
    with pytest.raises(RuntimeError, match=refusal):
        torch.func.jacfwd(lambda x: LOSSES[name](x, *rest))(x)
    with forward_ad.dual_level():
        assert LOSSES[name](x, *rest).dim() == 0  # a plain tensor inside a dual level is nothing special
        with pytest.raises(RuntimeError, match=refusal):
            LOSSES[name](forward_ad.make_dual(x, x), *rest)


# ---- torch.library.opcheck, fake and meta tensors -------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True], ids=["x and y", "symmetric"])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(backend: str, contrastive_calls: Any, name: str, symmetric: bool) -> None:
    if symmetric and not name.startswith("sim_lse"):
        pytest.skip("this op has no symmetric form")
    dtype = torch.float32 if (backend == "cpu") != symmetric else torch.bfloat16
    arguments = contrastive_calls(7, 9, 5, dtype=dtype, symmetric=symmetric)[name]
    if not name.endswith("_backward"):
        for leaf in ("x", "y", "logit_scale", "logit_bias"):
            if arguments[leaf] is not None:
                arguments = {**arguments, leaf: arguments[leaf].clone().requires_grad_()}
    positional = [a.name for a in op(name)._schema.arguments if not a.kwarg_only]
    args = tuple(arguments[k] for k in positional)
    kwargs = {k: v for k, v in arguments.items() if k not in positional}
    tolerance = 8 * TOLERANCES[dtype].unit
    torch.library.opcheck(op(name), args, kwargs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", OPS)
def test_fake_tensors_have_the_real_shapes_dtypes_and_strides(
    backend: str, contrastive_calls: Any, name: str
) -> None:  # fmt: skip
    for shape in ((7, 9, 5), (1, 1, 1), (64, 40, 32), (3, 5, 0)):
        for dtype in DTYPES:
            right = contrastive_calls(*shape, dtype=dtype)[name]
            variants = [right]
            variants.append({k: v.mT.contiguous().mT if isinstance(v, Tensor) and v.dim() > 1 else v
                             for k, v in right.items()})  # fmt: skip
            variants += [{**right, k: False} for k in ("cols", "need_x", "need_y") if k in right]
            if "grad_pair" in right:
                variants.append({**right, "labels": None, "grad_pair": None})
            elif name == "sim_lse":
                variants.append({**right, "labels": None})
            for given in variants:
                real = op(name)(**given)
                with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
                    fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in given.items()}
                    fake = op(name)(**fakes)
                for r, f in zip(*(t if isinstance(t, tuple) else (t,) for t in (real, fake)), strict=True):
                    assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device), shape


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors_need_no_memory(contrastive_calls: Any, name: str) -> None:
    arguments = contrastive_calls(7, 9, 5)[name]
    out = op(name)(**{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()})
    assert all(t.is_meta for t in (out if isinstance(out, tuple) else (out,)))


# ---- torch.compile and torch.export ---------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


COMPILED = [name for name in LOSSES if not name.startswith("sup_con")]  # which counts classes: their number is data


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in COMPILED), ("info_nce", torch.bfloat16)], ids=str
)
def test_compile_fullgraph_with_backward(fresh_dynamo: None, name: str, dtype: torch.dtype) -> None:
    def step(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return LOSSES[name](functional.normalize(x, dim=-1), y * 1.5, s.exp(), b)

    tensors = inputs(dtype)
    tensors[2].data.fill_(1.5)
    expected = step(*tensors)
    gradients = torch.autograd.grad(expected, used(name, tensors))
    # inductor takes seconds for each: one of them
    compiler = "inductor" if (name, dtype) == ("info_nce", torch.float32) else "aot_eager"
    out = torch.compile(step, fullgraph=True, backend=compiler)(*tensors)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=1e-5)
    for a, b in zip(torch.autograd.grad(out, used(name, tensors)), gradients, strict=True):
        assert a.dtype == b.dtype and relative_error(a, b) <= tolerance + (1e-4 if a.dim() == 0 else 0)


def test_compile_with_dynamic_shapes(fresh_dynamo: None) -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, y: ops.info_nce(x, y, 9.0), fullgraph=True, dynamic=True, backend=graphs)
    counts = []
    for rows, columns in ((9, 12), (3, 30), (17, 21), (80, 81)):
        x, y = leaves(features(rows, 7), features(columns, 7, seed=1))
        out, expected = compiled(x, y), ops.info_nce(x, y, 9.0)
        torch.testing.assert_close(out, expected)
        for a, b in zip(*(torch.autograd.grad(t, (x, y)) for t in (out, expected)), strict=True):
            torch.testing.assert_close(a, b)
        counts.append(graphs.frame_count)
    assert len(set(counts)) == 1, "one graph serves every number of rows"


def test_export_with_a_dynamic_batch() -> None:
    class Loss(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return ops.info_nce(x, y, 9.0)

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Loss(), (features(4, 7), features(4, 7)), dynamic_shapes=({0: rows}, {0: rows}))
    assert "tlkernels.sim_lse.default" in {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    for count in (2, 19):
        x, y = features(count, 7), features(count, 7, seed=1)
        torch.testing.assert_close(program.module()(x, y), ops.info_nce(x, y, 9.0))


# ---- torch.func -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_func_grad_is_autograd(backend: str, name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        tensors = inputs(dtype)
        which = tuple(i for i, t in enumerate(tensors) if any(t is u for u in used(name, tensors)))
        expected = torch.autograd.grad(LOSSES[name](*tensors), used(name, tensors))
        grads = torch.func.grad(LOSSES[name], argnums=which)(*(t.detach() for t in tensors))
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    x, y, s, b = (t.detach() for t in tensors)
    jacobian = torch.func.jacrev(lambda x: ops.sim_lse(x, y, s, b).row)(x)
    softmax = (s * x @ y.T + b).softmax(1)
    for i in range(6):
        torch.testing.assert_close(jacobian[i, i], s * softmax[i] @ y)
        assert not jacobian[i, torch.arange(6) != i].any()


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_is_a_loop(backend: str, name: str) -> None:
    """Over x, over all arguments, and over the gradient of each sample."""
    _, y, s, b = (t.detach() for t in inputs())
    xs, ys = features(3, 6, 12, seed=5), features(3, 9, 12, seed=6)
    scales = torch.tensor([1.0, 5.0, 9.0])
    out = torch.func.vmap(lambda x: LOSSES[name](x, y, s, b))(xs)
    torch.testing.assert_close(out, torch.stack([LOSSES[name](x, y, s, b) for x in xs]))
    out = torch.func.vmap(lambda x, y, s: LOSSES[name](x, y, s, b))(xs, ys, scales)
    expected = torch.stack([LOSSES[name](*t, b) for t in zip(xs, ys, scales, strict=True)])
    torch.testing.assert_close(out, expected)
    grads = torch.func.vmap(torch.func.grad(LOSSES[name]), in_dims=(0, 0, None, None))(xs, ys, s, b)
    loop = torch.stack([torch.func.grad(LOSSES[name])(x, y, s, b) for x, y in zip(xs, ys, strict=True)])
    torch.testing.assert_close(grads, loop, rtol=1e-4, atol=1e-5)


def test_vmap_over_labels(backend: str) -> None:
    x, y, s, b = (t.detach() for t in inputs())
    labels = torch.stack([LABELS, LABELS.flip(0), torch.arange(6)])
    for loss in (
        lambda labels: ops.info_nce(x, y, s, b, labels),
        lambda labels: ops.sigmoid_contrastive(x, y, s, b, labels=labels),
        lambda labels: ops.sim_lse(x, y, s, b, labels=labels.clamp(min=-1)).nll_col,
    ):
        torch.testing.assert_close(torch.func.vmap(loss)(labels), torch.stack([loss(t) for t in labels]))


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(backend: str, name: str, kind: torch.dtype) -> None:
    """Losses of float32 features are float32, inside of an op and in what is around it."""
    tensors = inputs()
    expected = LOSSES[name](*tensors)
    gradients = torch.autograd.grad(expected, used(name, tensors))
    with torch.autocast("cpu", dtype=kind):
        out = LOSSES[name](*tensors)
        assert out.dtype == torch.float32
        inside = torch.autograd.grad(out, used(name, tensors), retain_graph=True)
    for a, b, c in zip(torch.autograd.grad(out, used(name, tensors)), inside, gradients, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_for_backward_are_the_features_and_what_has_the_size_of_the_rows(
    backend: str, dtype: torch.dtype
) -> None:
    rows, columns, size = 30, 50, 16
    x, y = leaves(features(rows, size, dtype=dtype), features(columns, size, seed=1, dtype=dtype))
    losses: dict[str, Callable[[], Tensor]] = {
        "info_nce": lambda: ops.info_nce(x, y, 5.0, y_negatives=y.detach(), x_negatives=y.detach()),
        "nt_xent": lambda: ops.nt_xent(x),
        "sigmoid_contrastive": lambda: ops.sigmoid_contrastive(x, y, 5.0, -5.0, reduction="none").sum(),
    }
    for name, loss in losses.items():
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            loss()
        own = {t.data_ptr() for t in (x, y)}
        assert own & {t.data_ptr() for t in saved}
        largest = max(t.untyped_storage().nbytes() // t.element_size() for t in saved if t.data_ptr() not in own)
        assert largest <= max(rows, columns), name


PEAK = """
import sys, torch
from tlkernels import ops

def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024

torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])

def step(n):
    x, y = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1).to(dtype).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(5.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True)
    ops.info_nce(x, y, scale, label_smoothing=0.1).backward()
    ops.sup_con(x, torch.arange(n) % 7).backward()
    ops.sigmoid_contrastive(x, y, scale, bias).backward()
    ops.nt_xent(x).backward()
    with torch.no_grad():
        ops.info_nce(x, y, scale, bias, x_negatives=x, y_negatives=y)
        ops.sigmoid_contrastive(x, y, scale, bias)

step(64)  # what a first call loads
with open("/proc/self/clear_refs", "w") as counter:
    counter.write("5")
before = resident("VmRSS")
step(6000)
print(resident("VmHWM") - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_matrix_is_never_stored(tmp_path: Path, dtype: str) -> None:
    """All losses and gradients of 6000 rows, whose matrix would be 137 MiB: the peak rises by less than an eighth."""
    if not set(OPS) <= _registry.native_ops("cpu"):
        pytest.skip("the references store the matrix")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not count a process's peak")
    run = subprocess.run(
        [sys.executable, "-c", PEAK, dtype], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(tlkernels.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 17 * 2**20, f"{int(run.stdout) / 2**20:.0f} MiB"
