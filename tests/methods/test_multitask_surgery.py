"""`backward` in a user's loop: directions of all methods, heads, accumulation, mixed precision, wrong calls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tlkernels import ops
from tlkernels.methods.multitask.surgery import (
    METHODS,
    MGDA,
    AlignedMTL,
    CAGrad,
    FairGrad,
    GradDrop,
    GradVac,
    NashMTL,
    PCGrad,
    Surgery,
    UPGrad,
    backward,
)


class Net(nn.Module):
    """A trunk, heads of unequal size, and a part that only the second task uses."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        self.extra = nn.Linear(6, 5)
        self.unused = nn.Linear(2, 2)
        self.heads = nn.ModuleList([nn.Linear(5, 1), nn.Linear(5, 4), nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))])
        self.to(dtype)

    @property
    def shared(self) -> list[nn.Parameter]:
        return [*self.trunk.parameters(), *self.extra.parameters(), *self.unused.parameters()]

    def losses(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        inputs = (z, z + self.extra(x), -0.7 * z)
        targets = (1.0, -1.0, 0.5)
        return [(head(h) - t).square().mean() for head, h, t in zip(self.heads, inputs, targets, strict=True)]


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def jacobian(net: Net, x: Tensor) -> Tensor:
    """One row of the shared gradients for each task, zeros where there is none."""
    rows = []
    for loss in net.losses(x):
        grads = torch.autograd.grad(loss, net.shared, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                               for p, g in zip(net.shared, grads, strict=True)]))  # fmt: skip
    return torch.stack(rows)


def shared_grad(net: Net) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in net.shared])


def head_grads(net: Net) -> list[Tensor]:
    return [p.grad.clone() for p in net.heads.parameters()]


def seeded(name: str) -> Surgery:
    random = name in ("pcgrad", "gradvac", "graddrop")
    return METHODS[name](generator=torch.Generator().manual_seed(5)) if random else METHODS[name]()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_direction_and_heads(name: str) -> None:
    net, x = Net(), batch()
    J = jacobian(net, x)
    if name == "graddrop":
        expected = dropped(net, J)
    else:
        method = seeded(name)
        values = torch.stack(net.losses(x)).detach()
        expected = method.weights(J @ J.T, values) @ J
    step = backward(net.losses(x), net.shared, seeded(name))
    torch.testing.assert_close(shared_grad(net), expected)
    torch.testing.assert_close(step.gram, J @ J.T)
    if name != "graddrop":
        torch.testing.assert_close(step.weights @ J, expected)
    got = head_grads(net)
    net.zero_grad()
    sum(net.losses(x)).backward()
    for a, p in zip(got, net.heads.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)  # the plain gradient of its own task
    assert net.unused.weight.grad is None and net.extra.weight.grad is not None


def dropped(net: Net, J: Tensor) -> Tensor:
    """Chen et al.'s equations, tensor by tensor, with the same random numbers."""
    generator, parts, at = torch.Generator().manual_seed(5), [], 0
    for p in net.shared:
        g = J[:, at : at + p.numel()]
        at += p.numel()
        if p is net.unused.weight or p is net.unused.bias:
            parts.append(torch.zeros(p.numel(), dtype=J.dtype))
            continue
        sign = 0.5 * (1 + g.sum(0) / g.abs().sum(0))
        u = torch.rand(p.shape, generator=generator, dtype=J.dtype).flatten()
        mask = (sign > u) * (g > 0).double() + (sign <= u) * (g < 0).double()
        parts.append((mask * g).sum(0))
    return torch.cat(parts)


@pytest.mark.parametrize(
    "name, theirs, options",
    [("mgda", "MGDA", {"epsilon": 1e-9, "max_iters": 20_000}),
     ("upgrad", "UPGrad", {}), ("dualproj", "DualProj", {}), ("imtl_g", "IMTLG", {}),
     ("aligned_mtl", "AlignedMTL", {}), ("config", "ConFIG", {}), ("mean", "Mean", {}), ("sum", "Sum", {})],
)  # fmt: skip
def test_directions_are_torchjds(name: str, theirs: str, options: dict[str, Any]) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    for seed in range(3):
        net, x = Net(), batch(seed)
        expected = getattr(aggregation, theirs)(**options)(jacobian(net, x))
        backward(net.losses(x), net.shared, name)
        ours = shared_grad(net)
        if name == "aligned_mtl":  # TorchJD weighs by 1 / T, which is our default too
            assert torch.nn.functional.cosine_similarity(ours, expected, dim=0) > 1 - 1e-6
        tolerance = 2e-3 if name in ("mgda", "upgrad", "dualproj") else 1e-6  # theirs iterate or regularise
        assert float((ours - expected).norm() / expected.norm()) < tolerance, seed


def test_conflicts_are_resolved() -> None:
    """PCGrad by the paper's algorithm on plain vectors; UPGrad's direction is no task's loss."""
    net, x = Net(), batch()
    J = jacobian(net, x)
    assert ((J @ J.T) < 0).any()
    torch.manual_seed(3)
    backward(net.losses(x), net.shared, PCGrad(generator=torch.Generator().manual_seed(1)))
    outcomes = []
    import itertools

    orders = list(itertools.permutations(range(3)))
    for choice in itertools.product(orders, repeat=3):
        rows = []
        for t, order in enumerate(choice):
            g = J[t].clone()
            for u in order:
                if u != t and g @ J[u] < 0:
                    g -= (g @ J[u]) / (J[u] @ J[u]) * J[u]
            rows.append(g)
        outcomes.append(torch.stack(rows).sum(0))
    assert min(float((shared_grad(net) - o).norm()) for o in outcomes) < 1e-12
    net.zero_grad()
    backward(net.losses(x), net.shared, "upgrad")
    assert bool((J @ shared_grad(net) >= -1e-9).all())


def test_gradients_add_up_over_pieces() -> None:
    net = Net()
    pieces, parts = [batch(1), batch(2)], []
    for piece in pieces:
        net.zero_grad()
        backward(net.losses(piece), net.shared, "cagrad")
        parts.append((shared_grad(net), head_grads(net)))
    net.zero_grad()
    for piece in pieces:
        backward(net.losses(piece), net.shared, "cagrad")
    torch.testing.assert_close(shared_grad(net), parts[0][0] + parts[1][0])
    for got, a, b in zip(head_grads(net), parts[0][1], parts[1][1], strict=True):
        torch.testing.assert_close(got, a + b)


def test_a_training_loop_twice_over_one_graph() -> None:
    net, x = Net(), batch()
    losses = net.losses(x)
    backward(losses, net.shared, "pcgrad", retain_graph=True)
    backward(losses, net.shared, "pcgrad")
    with pytest.raises(RuntimeError, match="second time"):
        backward(losses, net.shared, "pcgrad")


def test_one_task_gets_its_plain_gradient() -> None:
    for name in METHODS:
        net, x = Net(), batch()
        step = backward(net.losses(x)[1:2], net.shared, name)
        torch.testing.assert_close(shared_grad(net), jacobian(net, x)[1])
        assert step.weights.tolist() == [1.0]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_task_with_zero_gradient(name: str) -> None:
    net, x = Net(), batch()
    losses = net.losses(x)
    backward([losses[0], 0 * losses[1] + 1, losses[2]], net.shared, seeded(name))
    assert shared_grad(net).isfinite().all()
    if name in ("pcgrad", "sum", "gradvac"):  # the others' combination is as if it were not there
        net2 = Net()
        both = net2.losses(x)
        backward([both[0], both[2]], net2.shared, seeded("sum"))
        if name == "sum":
            torch.testing.assert_close(shared_grad(net), shared_grad(net2))


def test_gradients_at_the_representation() -> None:
    """MGDA-UB: the Gram matrix of the gradients there; the combination goes through the trunk once."""
    net, x = Net(), batch()

    def losses() -> tuple[list[Tensor], Tensor]:
        z = net.trunk(x)
        return [(head(z) - t).square().mean() for head, t in zip(net.heads, (1.0, -1.0, 0.5), strict=True)], z

    rows, z = losses()
    at = torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in rows])
    weights = ops.mgda_weights(at @ at.T)
    expected = torch.autograd.grad((weights * torch.stack(rows)).sum(), list(net.trunk.parameters()))
    rows, z = losses()
    step = backward(rows, net.trunk.parameters(), "mgda", features=z)
    torch.testing.assert_close(step.weights, weights)
    for p, want in zip(net.trunk.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want)
    assert net.heads[1].weight.grad is not None


class TestScaler:
    def test_scaled_losses(self) -> None:
        net, x = Net(torch.float32), batch(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        step = backward(net.losses(x), net.shared, "cagrad", scaler=scaler)
        scaler.unscale_(optimizer)
        scaled, heads = shared_grad(net), head_grads(net)
        net.zero_grad()
        plain = backward(net.losses(x), net.shared, "cagrad")
        torch.testing.assert_close(step.gram, plain.gram, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(scaled, shared_grad(net), rtol=1e-4, atol=1e-6)
        for a, b in zip(heads, head_grads(net), strict=True):
            torch.testing.assert_close(a, b)

    def test_an_overflow_is_seen_and_left_out(self) -> None:
        net, x = Net(torch.float32), batch(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        losses = net.losses(x)
        before = [p.detach().clone() for p in net.parameters()]
        backward([losses[0] * math.inf, *losses[1:]], net.shared, "upgrad", scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_heads_that_are_given() -> None:
    net, x = Net(), batch()
    backward(net.losses(x), net.shared, "mean", task_parameters=[[], net.heads[1].parameters(), []])
    assert net.heads[0].weight.grad is None and net.heads[1].weight.grad is not None


def test_a_head_of_two_tasks_gets_both_gradients() -> None:
    net, x = Net(), batch()
    z = net.trunk(x)
    losses = [net.heads[0](z).square().mean(), net.heads[0](-z).exp().mean()]
    want = torch.autograd.grad(sum(losses), net.heads[0].weight, retain_graph=True)[0]
    backward(losses, net.trunk.parameters(), "mgda")
    torch.testing.assert_close(net.heads[0].weight.grad, want)


def test_normalizations_of_mgda() -> None:
    gram = torch.tensor([[4.0, 0.5], [0.5, 0.25]]).double()
    losses = torch.tensor([2.0, 0.5]).double()
    for how, by in (("l2", [2.0, 0.5]), ("loss", [2.0, 0.5]), ("loss+", [4.0, 0.25])):
        d = torch.tensor(by).double()
        torch.testing.assert_close(
            MGDA(normalization=how).weights(gram, losses),
            ops.mgda_weights(gram / d / d[:, None]),  # type: ignore[arg-type]
        )
    zero = torch.diag(torch.tensor([0.0, 1.0])).double()
    assert MGDA(normalization="l2").weights(zero, losses).isfinite().all()
    with pytest.raises(ValueError, match=r"MGDA: losses\[1\] is -1"):
        MGDA(normalization="loss").weights(gram, torch.tensor([1.0, -1.0]))


class TestState:
    def test_nash_keeps_its_weights(self) -> None:
        method = NashMTL(update_weights_every=2)
        grams = [torch.diag(torch.tensor([float(k + 1), 2.0])).double() for k in range(4)]
        got = [method.weights(g, torch.ones(2)) for g in grams]
        assert got[0] is got[1] and got[2] is got[3] and not torch.equal(got[1], got[2])
        again = NashMTL(update_weights_every=2)
        again.load_state_dict(method.state_dict())
        torch.testing.assert_close(again.weights(grams[1], torch.ones(2)), ops.nash_weights(grams[1]))

    @pytest.mark.parametrize("make", [PCGrad, GradVac, GradDrop])
    def test_random_methods_resume(self, make: Any) -> None:
        method = make(generator=torch.Generator().manual_seed(0))
        again = make(generator=torch.Generator().manual_seed(9))

        def step(one: Surgery) -> Tensor:
            net, x = Net(), batch()
            backward(net.losses(x), net.shared, one)
            return shared_grad(net)

        step(method)
        state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in method.state_dict().items()}
        again.load_state_dict(state)
        assert torch.equal(step(method), step(again))
        if make is not GradVac:
            with pytest.raises(ValueError, match="expected generator="):
                make().load_state_dict(state)

    def test_gradvac_moves_its_targets(self) -> None:
        method = GradVac(generator=torch.Generator().manual_seed(0))
        net, x = Net(), batch()
        backward(net.losses(x), net.shared, method)
        assert method.state_dict()["targets"].shape == (3, 3)
        with pytest.raises(ValueError, match="losses holds 2; expected 3"):
            backward(net.losses(x)[:2], net.shared, method)

    def test_of_the_others_nothing(self) -> None:
        assert UPGrad().state_dict() == {}
        with pytest.raises(ValueError, match="expected nothing"):
            UPGrad().load_state_dict({"a": 1})


def test_wrong_calls() -> None:
    net, x = Net(), batch()
    frozen = nn.Linear(2, 2).requires_grad_(False)
    for call, error, says in (
        (lambda: backward([], net.shared), ValueError, "losses is empty"),
        (lambda: backward(net.losses(x)[0], net.shared), TypeError, "losses is a Tensor"),
        (lambda: backward([1.0], net.shared), TypeError, r"losses\[0\] is a float"),
        (lambda: backward([net.trunk(x)], net.shared), ValueError, r"losses\[0\] has shape \(16, 5\)"),
        (lambda: backward([net.losses(x)[0].detach()], net.shared), ValueError, r"losses\[0\] does not require"),
        (lambda: backward(net.losses(x), []), ValueError, "shared_parameters holds none"),
        (lambda: backward(net.losses(x), frozen.parameters()), ValueError, "shared_parameters holds none"),
        (lambda: backward(net.losses(x), nn.Linear(2, 2).parameters()), ValueError, "shared_parameters holds none"),
        (lambda: backward(net.losses(x), [1]), TypeError, "shared_parameters holds a int"),
        (lambda: backward(net.losses(x), [net.trunk(x)]), ValueError, "expected leaves"),
        (lambda: backward(net.losses(x), net.shared, "pc"), ValueError, "method is 'pc'"),
        (lambda: backward(net.losses(x), net.shared, 3), TypeError, "method is a int"),
        (lambda: backward(net.losses(x), net.shared, task_parameters=[[]]), ValueError, "task_parameters has 1 lists"),
        (lambda: backward(net.losses(x), net.shared, task_parameters=[[], [], net.shared]), ValueError, r"rs\[2\]"),
        (lambda: backward(net.losses(x), net.shared, features=x), ValueError, "features does not require"),
        (lambda: CAGrad(-1), ValueError, "c is -1"),
        (lambda: CAGrad(rescale=3), ValueError, "rescale is 3"),
        (lambda: FairGrad(0), ValueError, "alpha is 0"),
        (lambda: NashMTL(update_weights_every=0), ValueError, "update_weights_every is 0"),
        (lambda: GradVac(beta=2), ValueError, "beta is 2"),
        (lambda: PCGrad(reduction="max"), ValueError, "reduction is 'max'"),
        (lambda: AlignedMTL(scale="max"), ValueError, "scale is 'max'"),
    ):  # fmt: skip
        with pytest.raises(error, match=says):
            call()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(NotImplementedError, match="weights is not written"):
        backward(net.losses(x), net.shared, Surgery())
    assert all(p.grad is None for p in net.parameters())
    assert "c=0.4" in repr(CAGrad())
