"""TorchJD's training steps with this library's aggregators: autojac, multi-task and autogram."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tlkernels import ops
from tlkernels.integrations import torchjd as ours
from tlkernels.integrations.torchjd import METHODS, aggregator, weighting

torchjd = pytest.importorskip("torchjd")
from torchjd import aggregation, autogram, autojac  # noqa: E402

#: method -> options, and TorchJD's class of the same method, where it computes the same without other packages
CLASSES: dict[str, tuple[dict[str, Any], Any]] = {
    "aligned": ({}, aggregation.AlignedMTL()),
    "config": ({}, aggregation.ConFIG()),
    "imtl_g": ({}, aggregation.IMTLG()),
    "pcgrad": ({}, aggregation.PCGrad()),
}


def jacobian(tasks: int = 4, size: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(tasks, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def options_of(method: str) -> dict[str, Any]:
    """Orders that are drawn are fixed: one for every call."""
    return {"orders": [[0, 1, 2, 3]] * 4} if method in ("pcgrad", "gradvac") else {}


def model(seed: int = 0) -> tuple[nn.Module, list[nn.Module], Tensor, list[Tensor]]:
    """A trunk, three heads, a batch and the heads' targets, which conflict."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    heads = [nn.Linear(4, 1).double() for _ in range(3)]
    x = torch.randn(16, 5).double()
    return trunk, list(heads), x, [torch.randn(16, 1).double() for _ in heads]


def losses_of(heads: list[nn.Module], features: Tensor, targets: list[Tensor]) -> list[Tensor]:
    return [nn.functional.mse_loss(head(features), y) for head, y in zip(heads, targets, strict=True)]


# ---- the aggregators ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_update_is_the_weighted_sum(method: str, dtype: torch.dtype) -> None:
    j = jacobian(dtype=dtype).requires_grad_()
    update = aggregator(method, **options_of(method))(j)
    rows = [[row] for row in j.detach()]
    found = METHODS[method](ops.task_gram(rows), **options_of(method))
    weights = found[0] if isinstance(found, tuple) else found
    assert update.dtype == dtype and update.shape == (12,) and not update.requires_grad
    expected = (weights @ j.detach().double()).to(dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    assert torch.allclose(update, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", sorted(CLASSES))
def test_same_as_torchjds_class(method: str) -> None:
    options, theirs = CLASSES[method]
    for seed in range(5):
        j = jacobian(seed=seed)
        torch.manual_seed(seed)
        found = aggregator(method, **options)(j)
        torch.manual_seed(seed)
        assert torch.allclose(found, theirs(j), rtol=1e-9, atol=1e-12)


def test_upgrad_conflicts_with_no_task_where_torchjds_does() -> None:
    """A task whose gradient is short: TorchJD's regularisation of 1e-4 is larger than its part of the Gram matrix."""
    j = torch.tensor([[1.0, 0.0], [-1e-3, 1e-3]], dtype=torch.float64)
    assert (j @ aggregator("upgrad")(j)).min() >= -1e-18
    pytest.importorskip("quadprog")
    assert (j @ aggregation.UPGrad()(j)).min() < -1e-5


def test_options_reach_the_solver() -> None:
    j = jacobian()
    mean = aggregator("cagrad", c=0.0)(j)
    assert torch.allclose(mean, j.mean(0), rtol=1e-12)
    u = torch.tensor([1.0, 0.0, 0.0, 0.0])
    gram = j @ j.T
    assert torch.equal(weighting("upgrad", preference=u)(gram), ops.upgrad_weights(gram, u))
    drawn = [aggregator("pcgrad", generator=torch.Generator().manual_seed(3))(jacobian(6, 3)) for _ in range(2)]
    assert torch.equal(drawn[0], drawn[1])


def test_gradvac_carries_its_targets() -> None:
    gradvac, state = aggregator("gradvac", beta=0.3, **options_of("gradvac")), None
    saved = None
    for step in range(4):
        j = jacobian(seed=step)
        weights, state = ops.gradvac_weights(ops.task_gram([[r] for r in j]), state, beta=0.3, **options_of("gradvac"))
        assert torch.allclose(gradvac(j), weights @ j, rtol=1e-12, atol=1e-14)
        if step == 2:
            saved = copy.deepcopy(gradvac.state_dict())
            resumed = aggregator("gradvac", beta=0.3, **options_of("gradvac"))
            resumed.load_state_dict(saved)
            assert torch.equal(resumed(jacobian(seed=3)), copy.deepcopy(gradvac)(jacobian(seed=3)))
    with pytest.raises(ValueError, match="gradvac_weights: targets has shape"):
        aggregator_of_three = gradvac.gramian_weighting
        aggregator_of_three.options.pop("orders")
        aggregator_of_three(torch.eye(3))
    gradvac.reset()
    assert gradvac.gramian_weighting.targets is None and gradvac(jacobian(3)).isfinite().all()


# ---- TorchJD's training steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("from_gramian", [False, True])
def test_mtl_backward(method: str, from_gramian: bool) -> None:
    trunk, heads, x, targets = model()
    options = {"orders": [[0, 1, 2]] * 3} if method in ("pcgrad", "gradvac") else {}
    features = trunk(x)
    losses = losses_of(heads, features, targets)
    parameters = list(trunk.parameters())
    grads = [list(torch.autograd.grad(loss, parameters, retain_graph=True)) for loss in losses]
    own = [torch.autograd.grad(losses[t], heads[t].weight, retain_graph=True)[0] for t in range(3)]

    autojac.mtl_backward(losses, features=features)
    weights = autojac.jac_to_grad(
        parameters, aggregator(method, **options), optimize_gramian_computation=from_gramian
    )  # what TorchJD says the weights were, too

    found = METHODS[method](ops.task_gram(grads), **options)
    expected = found[0] if isinstance(found, tuple) else found
    assert torch.allclose(weights, expected, rtol=1e-8, atol=1e-10)
    for p, combined in zip(parameters, ops.task_combine(grads, expected), strict=True):
        assert torch.allclose(p.grad, combined, rtol=1e-8, atol=1e-10)
    for head, g in zip(heads, own, strict=True):
        assert torch.allclose(head.weight.grad, g, rtol=1e-12)


def test_backward_lowers_every_loss() -> None:
    """Small UPGrad steps on conflicting losses: none rises."""
    trunk, heads, x, targets = model(1)
    for head in heads:
        head.requires_grad_(False)
    before = [loss.item() for loss in losses_of(heads, trunk(x), targets)]
    upgrad, optimizer = aggregator("upgrad"), torch.optim.SGD(trunk.parameters(), lr=1e-2)
    for _ in range(20):
        autojac.backward(losses_of(heads, trunk(x), targets))
        autojac.jac_to_grad(trunk.parameters(), upgrad)
        optimizer.step()
        optimizer.zero_grad()
    after = [loss.item() for loss in losses_of(heads, trunk(x), targets)]
    assert all(b < a for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autogram_step_is_autojacs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
    x, y = torch.randn(4, 5, dtype=dtype), torch.randn(4, dtype=dtype)
    engine = autogram.Engine(net, batch_dim=0)
    losses = (net(x).squeeze(1) - y) ** 2
    weights = weighting("dualproj")(engine.compute_gramian(losses))
    assert weights.dtype == dtype
    losses.backward(weights)
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    plain = copy.deepcopy(net)
    autojac.backward((plain(x).squeeze(1) - y) ** 2)
    autojac.jac_to_grad(plain.parameters(), aggregator("dualproj"))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    for g, p in zip(found, plain.parameters(), strict=True):
        assert torch.allclose(g, p.grad, rtol=tolerance, atol=tolerance)


# ---- being modules of TorchJD ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(METHODS))
def test_kind_and_copies(method: str) -> None:
    made = aggregator(method, **options_of(method))
    assert isinstance(made, aggregation.GramianWeightedAggregator)
    assert isinstance(made.gramian_weighting, aggregation.Weighting) and type(made) is ours.GramAggregator
    assert isinstance(weighting(method), ours.GramWeighting)
    for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert torch.equal(again(jacobian()), made(jacobian())) or method == "gradvac"


def test_repr() -> None:
    assert repr(aggregator("cagrad", c=0.5, rescale=1)) == "GramAggregator('cagrad', c=0.5, rescale=1)"
    assert str(aggregator("mgda")) == "GramAggregator(mgda)"
    assert repr(weighting("cagrad", c=0.5)) == "GramWeighting('cagrad', c=0.5)"


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [aggregator, weighting])
def test_wrong_arguments(make: Any) -> None:
    name = make.__name__
    with pytest.raises(ValueError, match=f"{name}: method is 'graddrop'; expected one of aligned, cagrad,"):
        make("graddrop")
    with pytest.raises(TypeError, match=f"{name}: cagrad has no option alpha; it has c, rescale"):
        make("cagrad", alpha=1.0)
    with pytest.raises(TypeError, match=f"{name}: mgda has no option c; it has none"):
        make("mgda", c=1.0)
    with pytest.raises(TypeError, match=f"{name}: gradvac has no option targets; it has beta,"):
        make("gradvac", targets=None)


def test_wrong_matrices() -> None:
    with pytest.raises(ValueError, match="cagrad_weights: c is -1; expected >= 0"):
        aggregator("cagrad", c=-1)(jacobian())
    with pytest.raises(ValueError, match="mgda_weights: gram has a NaN or an infinity"):
        aggregator("mgda")(jacobian() * float("nan"))
    with pytest.raises(ValueError, match="mgda_weights: gram has shape"):
        weighting("mgda")(jacobian())
    with pytest.raises(ValueError, match="dimension 2"):
        aggregator("mgda")(torch.ones(3))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        ours.Nothing  # noqa: B018


def test_without_torchjd(monkeypatch: pytest.MonkeyPatch) -> None:
    ours._aggregator_class.cache_clear()
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ImportError, match="needs torchjd; install it with `pip install torchjd`"):
        aggregator("mgda")
    monkeypatch.undo()
    ours._aggregator_class.cache_clear()
