"""MIR and GSS against their papers' algorithms written out for every parameter and example."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tlkernels.methods.continual.buffers import ReservoirBuffer
from tlkernels.methods.continual.replay_selection import GSS, MIR, GradientBuffer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()


def batch(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator).double(), torch.randint(0, 3, (n,), generator=generator)


def mir(**options: float) -> tuple[nn.Sequential, MIR]:
    model = net().eval()
    method = MIR(model, ReservoirBuffer(20, seed=1), lr=0.5, candidates=12, batch_size=4, **options)  # type: ignore[arg-type]
    method.observe(*batch(30, seed=1))
    return model, method


def test_mir_replays_what_the_step_harms_most() -> None:
    model, method = mir(weight=0.7)
    x, y = batch(5, seed=2)
    functional.cross_entropy(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    bx, by = copy.deepcopy(method.buffer).sample(12)
    stepped = copy.deepcopy(model)
    for p, g in zip(stepped.parameters(), grads, strict=True):
        p.grad = g.clone()
    torch.optim.SGD(stepped.parameters(), lr=0.5).step()
    with torch.no_grad():
        harm = [
            float(functional.cross_entropy(stepped(bx[i : i + 1]), by[i : i + 1]))
            - float(functional.cross_entropy(model(bx[i : i + 1]), by[i : i + 1]))
            for i in range(12)
        ]
    torch.testing.assert_close(method.interference(bx, by), torch.tensor(harm).double(), rtol=1e-6, atol=1e-7)
    worst = sorted(range(12), key=lambda i: -harm[i])[:4]
    loss = 0.7 * functional.cross_entropy(model(bx[worst]), by[worst])
    extra = torch.autograd.grad(loss, list(model.parameters()))
    assert method.penalty(x) == 0
    method.after_backward()
    for p, g, e in zip(model.parameters(), grads, extra, strict=True):
        torch.testing.assert_close(p.grad, g + e)


def test_mir_leaves_mode_and_weights() -> None:
    model, method = mir()
    model.train()
    before = copy.deepcopy(model.state_dict())
    x, y = batch(5, seed=2)
    functional.cross_entropy(model(x), y).backward()
    a = method.interference(x, y)
    assert torch.equal(a, method.interference(x, y))  # dropout is off
    method.after_backward()
    assert all(m.training for m in model.modules())
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])


def test_mir_parameters_without_gradient_and_resumption() -> None:
    model, method = mir()
    other_model, other = mir()
    x, y = batch(5, seed=2)
    method.buffer.sample(3)
    other.load_state_dict(method.state_dict())
    for m in (model, other_model):
        head = m[3](m[:3](x).detach())  # the body has no gradient of the stream's batch
        functional.cross_entropy(head, y).backward()
        assert m[0].weight.grad is None
    method.after_backward()
    other.after_backward()
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)


def test_mir_refuses() -> None:
    model, method = mir()
    with pytest.raises(RuntimeError, match="MIR: no parameter has a gradient"):
        method.after_backward()
    MIR(model, ReservoirBuffer(2), lr=0.1).after_backward()  # an empty buffer: nothing to do
    with pytest.raises(ValueError, match="MIR: candidates is 5; expected at least batch_size, 10"):
        MIR(model, ReservoirBuffer(2), lr=0.1, candidates=5)
    with pytest.raises(ValueError, match="MIR: lr is -1"):
        MIR(model, ReservoirBuffer(2), lr=-1.0)
    mean = MIR(model, method.buffer, lr=0.1, criterion=functional.cross_entropy)
    functional.cross_entropy(model(batch(2)[0]), batch(2)[1]).backward()
    with pytest.raises(ValueError, match=r"criterion gives shape \(\); expected a loss of each, \(20,\)"):
        mean.after_backward()


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = functional.cross_entropy(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_gss_is_algorithm_2() -> None:
    model = net().train()
    method = GSS(model, GradientBuffer(6, seed=4), compared=3)
    x, y = batch(40, seed=3)
    method.observe(x[:25], y[:25])
    method.observe(x[25:], y[25:])
    assert model.training
    model.eval()
    generator = torch.Generator().manual_seed(4)
    kept: list[tuple[int, float]] = []
    for i in range(40):
        c = 1.0
        if kept:
            g = gradient(model, x[i : i + 1], y[i : i + 1])
            drawn = torch.randperm(len(kept), generator=generator)[:3].tolist()
            others = [gradient(model, x[kept[j][0]][None], y[kept[j][0]][None]) for j in drawn]
            c = 1 + max(float(torch.dot(g, o) / (g.norm() * o.norm())) for o in others)
        if len(kept) < 6:
            kept.append((i, c))
        elif c < 1:
            scores = torch.tensor([s for _, s in kept], dtype=torch.float64)
            j = int(torch.multinomial(scores, 1, generator=generator))
            if float(torch.rand((), generator=generator, dtype=torch.float64)) < kept[j][1] / (kept[j][1] + c):
                kept[j] = (i, c)
    bx, by, scores = method.buffer.tensors
    assert torch.equal(bx, x[[i for i, _ in kept]]) and torch.equal(by, y[[i for i, _ in kept]])
    torch.testing.assert_close(scores, torch.tensor([c for _, c in kept], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert max(i for i, _ in kept) >= 6  # some were replaced


def test_gss_keeps_what_points_elsewhere() -> None:
    """A linear model whose gradients are the inputs: one against all others stays, one at a right angle does not."""
    found = Counter[int]()
    for seed in range(10):
        model = nn.Linear(2, 1, bias=False).double()
        method = GSS(model, GradientBuffer(6, seed=seed), compared=6, criterion=lambda out, y: out.sum())
        x = torch.tensor([[1.0, 0.01 * i] for i in range(60)]).double()
        x[20], x[40] = torch.tensor([-1.0, 0.0]), torch.tensor([0.0, -1.0])
        method.observe(x, torch.zeros(60).long())
        rows = method.buffer.tensors[0].tolist()
        found[20] += [-1.0, 0.0] in rows
        found[40] += [0.0, -1.0] in rows
    assert found[20] == 10 and found[40] == 0


def test_gradient_buffers_odds() -> None:
    """Replacement frequencies of one newcomer against P(i) C_i / (C_i + c)."""
    scores, c, runs = torch.tensor([0.2, 0.6, 1.2]).double(), 0.3, 4000
    shares = scores / scores.sum() * scores / (scores + c)
    counts = torch.zeros(3)
    for seed in range(runs):
        buffer = GradientBuffer(3, seed=seed)
        buffer.add(torch.arange(3.0), torch.zeros(3).long(), scores)
        buffer.add(torch.tensor([9.0]), torch.zeros(1).long(), torch.tensor([c]).double())
        counts += buffer.tensors[0] == 9
    sigma = (shares * (1 - shares) / runs).sqrt()
    assert bool(((counts / runs - shares).abs() < 4 * sigma).all())
    buffer.add(torch.tensor([7.0]), torch.zeros(1).long(), torch.ones(1).double())
    assert 7.0 not in buffer.tensors[0].tolist()


def test_gss_resumes_exactly() -> None:
    model = net()
    x, y = batch(40, seed=3)
    method = GSS(model, GradientBuffer(6, seed=4), compared=3, batch_size=4)
    method.observe(x[:20], y[:20])
    other = GSS(model, GradientBuffer(6), compared=3, batch_size=4)
    other.load_state_dict(method.state_dict())
    model.eval()
    for each in (method, other):
        each.observe(x[20:], y[20:])
    for a, b in zip(method.buffer.tensors, other.buffer.tensors, strict=True):
        assert torch.equal(a, b)
    assert method.penalty() == other.penalty() > 0


def test_gss_refuses() -> None:
    model = net()
    x, y = batch(4)
    method = GSS(model, GradientBuffer(3))
    method.observe(x[:2], y[:2])
    with pytest.raises(ValueError, match="GSS: a gradient has a NaN"):
        method.observe(x[:1] * float("nan"), y[:1])
    with pytest.raises(ValueError, match="GSS: got 2 inputs and 1 labels"):
        method.observe(x[:2], y[:1])
    assert method.buffer.seen == 2
    with pytest.raises(TypeError, match="GSS: buffer is a ReservoirBuffer; expected a GradientBuffer"):
        GSS(model, ReservoirBuffer(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="GSS: compared is 0"):
        GSS(model, GradientBuffer(3), compared=0)
    with pytest.raises(ValueError, match="GradientBuffer: tensors has no scores"):
        GradientBuffer(3).add(x, y)
    with pytest.raises(ValueError, match=r"score out of \[0, 2\]"):
        GradientBuffer(3).add(x, y, torch.full((4,), 2.5))


def test_gss_of_a_zero_gradient() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    method = GSS(model, GradientBuffer(3), criterion=lambda out, y: out.sum())
    method.observe(torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]]).double(), torch.zeros(3).long())
    assert method.buffer.tensors[2].tolist() == [1.0, 1.0, 2.0]
