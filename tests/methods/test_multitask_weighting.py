"""Weights of tasks' losses: their papers' equations, and TorchJD's where it has them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tlkernels.methods.multitask import weighting
from tlkernels.methods.multitask.weighting import (
    DWA,
    FAMO,
    GLS,
    IMTLL,
    RLW,
    STCH,
    GradNorm,
    Uncertainty,
    Uniform,
    Weighting,
)


def losses(tasks: int = 3, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.rand(tasks, generator=torch.Generator().manual_seed(seed)).double() + 0.2) * scale


def scalarizer(name: str, *args: Any, **options: Any) -> Any:
    return getattr(pytest.importorskip("torchjd.scalarization"), name)(*args, **options)


def same(ours: Weighting, theirs: Any, values: Tensor) -> None:
    """Value and gradient."""
    leaves = [values.clone().requires_grad_() for _ in range(2)]
    outs = [ours(leaves[0]), theirs(leaves[1])]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(o, v)[0] for o, v in zip(outs, leaves, strict=True)))


def test_uniform() -> None:
    values = losses()
    assert Uniform(3)(values) == values.mean()
    assert Uniform(3, reduction="sum")(list(values.unbind())) == values.sum()


def test_uncertainty_is_torchjds_and_finds_its_optimum() -> None:
    values = losses()
    ours, theirs = Uncertainty(3).double(), scalarizer("UW", 3).double()
    with torch.no_grad():
        ours.log_variance.copy_(torch.tensor([0.3, -0.5, 1.0]))
        theirs.log_var.copy_(ours.log_variance)
    same(ours, theirs, values)
    optimizer = torch.optim.LBFGS(ours.parameters(), max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ours(values)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(ours.log_variance.exp(), values, rtol=1e-5, atol=0)
    sigma = ours.log_variance.detach().exp().sqrt()
    torch.testing.assert_close(ours(values).detach(), (values / (2 * sigma**2) + sigma.log()).sum())


def test_imtl_l_is_torchjds() -> None:
    ours, theirs = IMTLL(3).double(), scalarizer("IMTLL", 3).double()
    with torch.no_grad():
        ours.log_scale.copy_(torch.tensor([0.3, -0.5, 1.0]))
        theirs.log_scale.copy_(ours.log_scale)
    same(ours, theirs, losses())


def test_geometric_mean() -> None:
    same(GLS(3), scalarizer("GeometricMean"), losses())
    with pytest.raises(ValueError, match=r"GLS: losses\[1\] is 0; expected > 0"):
        GLS(2)(torch.tensor([1.0, 0.0]))
    assert GLS(2)(torch.tensor([1.0, math.nan])).isnan()


def test_tchebycheff_is_torchjds() -> None:
    weights, ideal = torch.tensor([0.5, 0.2, 0.3]).double(), torch.tensor([0.1, 0.0, -0.2]).double()
    same(STCH(3, mu=0.1).double(), scalarizer("STCH", 0.1), losses())
    same(STCH(3, mu=0.5, weights=weights, ideal=ideal), scalarizer("STCH", 0.5, weights, ideal), losses())
    assert STCH(2, mu=1e-3)(torch.tensor([1e4, 1.0])) == 5e3  # no overflow
    near_max = STCH(3, mu=1e-4, weights=torch.ones(3))(losses())
    torch.testing.assert_close(near_max, losses().max(), rtol=1e-3, atol=0)


def test_dwa_is_torchjds() -> None:
    ours, theirs = DWA(3, temperature=1.5), scalarizer("DWA", 1.5)
    for epoch in range(4):
        for batch in range(3):
            same(ours, theirs, losses(seed=10 * epoch + batch, scale=0.8**epoch))
        ours.step()
        theirs.step()
    torch.testing.assert_close(ours.weights.sum(), torch.tensor(3.0).double())
    again = DWA(3, temperature=1.5)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again.weights, ours.weights)
    before = ours.weights.clone()
    ours.step()  # nothing was seen
    assert torch.equal(ours.weights, before)


def test_random_weights_are_a_softmax_of_normal_numbers() -> None:
    generator = torch.Generator().manual_seed(3)
    ours = RLW(3, generator=generator)
    state = ours.state_dict()
    values = losses()
    first = ours(values)
    weights = torch.randn(3, generator=torch.Generator().manual_seed(3)).softmax(0).double()
    torch.testing.assert_close(first, (weights * values).sum())
    ours.load_state_dict(state)
    assert torch.equal(ours(values), first)


@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_famo_is_torchjds(decay: float) -> None:
    ours, theirs = FAMO(3, weight_decay=decay), scalarizer("FAMO", 3, weight_decay=decay)
    for step in range(5):
        same(ours, theirs, losses(seed=step).float())
        after = losses(seed=step).float() * torch.tensor([0.9, 0.5, 1.1])
        ours.update(after)
        theirs.update(after)
    torch.testing.assert_close(ours.logits.data, theirs._w.data)
    assert ours.logits[2] > ours.logits[1]  # the task that does not fall weighs more
    again = FAMO(3, weight_decay=decay)
    again.load_state_dict(ours.state_dict())
    for one in (ours, again):
        one(losses().float())
        one.update(0.9 * losses().float() ** 2)
    assert torch.equal(again.logits, ours.logits)
    with pytest.raises(ValueError, match="update was called before"):
        FAMO(2).update(torch.ones(2))


class TestGradNorm:
    def model(self) -> tuple[nn.Linear, Tensor]:
        torch.manual_seed(0)
        return nn.Linear(4, 3).double(), torch.randn(8, 4).double()

    def test_one_step_by_the_paper(self) -> None:
        layer, x = self.model()
        balance = GradNorm(3, [layer.weight], alpha=0.7, lr=0.1).double()
        scales = torch.tensor([1.0, 10.0, 0.1]).double()
        balance((layer(x).square().mean(0) * scales).unbind()).backward()  # sets the first losses
        start = balance.weights.clone()
        with torch.no_grad():
            layer.weight *= torch.tensor([[0.5], [0.9], [1.2]])
        now = layer(x).square().mean(0) * scales
        # the paper's way: weights as a leaf, the objective's gradient by autograd, the target a constant
        w = start.clone().requires_grad_()
        sizes = torch.stack([
            torch.autograd.grad(w[t] * now[t], layer.weight, create_graph=True)[0].norm() for t in range(3)
        ])  # fmt: skip
        ratio = (now / balance.first).detach()
        target = (sizes.mean() * (ratio / ratio.mean()) ** 0.7).detach()
        (slope,) = torch.autograd.grad((sizes - target).abs().sum(), w)
        moved = (start - 0.1 * slope).clamp(min=1e-6)
        total = balance(now.unbind())
        torch.testing.assert_close(total, (start * now).sum())
        torch.testing.assert_close(balance.weights, 3 * moved / moved.sum())
        total.backward()  # the graph is still there

    def test_norms_become_equal(self) -> None:
        layer, x = self.model()
        scales = torch.tensor([1.0, 4.0, 0.5]).double()
        balance = GradNorm(3, [layer.weight], alpha=0.0, lr=2e-3).double()
        for _ in range(4000):
            balance(layer(x).square().mean(0) * scales)
        norms = torch.stack([
            torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm()
            for loss in layer(x).square().mean(0) * scales
        ])  # fmt: skip
        sizes = balance.weights * norms
        assert float(sizes.max() / sizes.min()) < 1.05

    def test_unused_parameters_overflows_and_evaluation(self) -> None:
        layer, x = self.model()
        balance = GradNorm(2, [layer.weight]).double()
        constant = torch.tensor(2.0).double().requires_grad_()
        balance([layer(x).square().mean(), constant * 1]).backward()
        before = balance.weights.clone()
        balance([layer(x).square().mean() * math.inf, constant * 1])
        assert torch.equal(balance.weights, before)
        with torch.no_grad():
            balance([layer(x).square().mean(), constant])
        assert torch.equal(balance.weights, before)
        again = GradNorm(2, [layer.weight]).double()
        again.load_state_dict(balance.state_dict())
        assert torch.equal(again.weights, before) and torch.equal(again.first, balance.first)


@pytest.mark.parametrize("make", [Uniform, Uncertainty, IMTLL, GLS, RLW, DWA, FAMO, STCH])
def test_wrong_losses(make: type[Weighting]) -> None:
    name = make.__name__
    ours = make(2)
    with pytest.raises(ValueError, match=f"{name}: losses holds 3; expected 2"):
        ours(torch.ones(3))
    with pytest.raises(ValueError, match=rf"{name}: losses\[1\] has dtype float32 and shape \(2,\)"):
        ours([torch.ones(()), torch.ones(2)])
    with pytest.raises(TypeError, match=rf"{name}: losses\[0\] is a float"):
        ours([1.0, torch.ones(())])
    with pytest.raises(TypeError, match=f"{name}: losses is a dict"):
        ours({})
    for tasks in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match=f"{name}: tasks is"):
            make(tasks)  # type: ignore[arg-type]
    assert "tasks=2" in repr(ours)


def test_wrong_options() -> None:
    layer = nn.Linear(2, 2)
    for call, says in (
        (lambda: Uniform(2, reduction="max"), "reduction is 'max'"),
        (lambda: Uncertainty(2, init=math.nan), "init is nan"),
        (lambda: DWA(2, temperature=0), "temperature is 0"),
        (lambda: STCH(2, mu=0), "mu is 0"),
        (lambda: STCH(2, ideal=torch.ones(3)), r"ideal has shape \(3,\)"),
        (lambda: FAMO(2, lr=-1), "lr is -1"),
        (lambda: FAMO(2, min_losses=torch.ones(3)), r"min_losses has shape \(3,\)"),
        (lambda: GradNorm(2, []), "shared_parameters holds none"),
        (lambda: GradNorm(2, layer.parameters(), alpha=-1), "alpha is -1"),
        (lambda: FAMO(1)(torch.tensor([-1.0])), r"losses\[0\] is -1; expected > 0"),
        (lambda: GradNorm(1, layer.parameters())(layer.weight.sum() * 0), r"losses\[0\] is 0; expected > 0"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_half_precision_losses_are_summed_in_float32() -> None:
    assert Uniform(2)(torch.tensor([1.0, 3.0], dtype=torch.float16)).dtype == torch.float32
    assert set(weighting.__all__) == {
        "DWA", "FAMO", "GLS", "IMTLL", "RLW", "STCH", "GradNorm", "Uncertainty", "Uniform", "Weighting",
    }  # fmt: skip
