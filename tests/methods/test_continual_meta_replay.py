"""MER against a transcription of algorithm 1, OML against unrolled steps and numeric derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from tlkernels.methods.continual.buffers import ReservoirBuffer, RingBuffer
from tlkernels.methods.continual.meta_replay import MER, OML


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def stream(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator).double(), torch.randint(0, 3, (n,), generator=generator)


def mer_reference(model: nn.Module, x: Tensor, y: Tensor, alpha: float, beta: float, gamma: float) -> dict[str, Tensor]:
    """Algorithm 1 with s = 2, k = 4 and buffer capacity 5, weights as dictionaries."""
    buffer = ReservoirBuffer(5, seed=3)
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    for i in range(len(x)):
        theta_a = dict(theta)
        for _ in range(2):
            batch = [(x[i : i + 1], y[i : i + 1])]
            if len(buffer):
                bx, by = buffer.sample(3)
                batch += [(bx[j : j + 1], by[j : j + 1]) for j in range(len(bx))]
            w = dict(theta)
            for a, b in batch:
                g = torch.func.grad(lambda p, a=a, b=b: functional.cross_entropy(functional_call(model, p, a), b))(w)
                w = {n: w[n] - alpha * g[n] for n in w}
            theta = {n: theta[n] + beta * (w[n] - theta[n]) for n in w}
        theta = {n: theta_a[n] + gamma * (theta[n] - theta_a[n]) for n in theta}
        buffer.add(x[i : i + 1], y[i : i + 1])
    return theta


@pytest.mark.parametrize(("beta", "gamma"), [(0.3, 0.6), (1.0, 1.0), (0.0, 1.0), (0.4, 0.0)])
def test_mer_is_algorithm_1(beta: float, gamma: float) -> None:
    model = net()
    start = copy.deepcopy(model)
    x, y = stream(9)
    want = mer_reference(model, x, y, 0.2, beta, gamma)
    method = MER(model, ReservoirBuffer(5, seed=3), lr=0.2, beta=beta, gamma=gamma, batches=2, batch_size=4)
    first = method.step(x[:4], y[:4])
    method.step(x[4:], y[4:])
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), want[name])
        assert p.grad is None
        if beta * gamma == 0:
            assert torch.equal(p, start.get_parameter(name))
    assert 0.1 < first < 5 and method.buffer.seen == 9


def test_mer_of_one_step_is_gradient_descent() -> None:
    """k = s = 1, beta = gamma = 1: the loss is that of the weights of before, the step -lr times its gradient."""
    model = net()
    x, y = stream(1)
    loss = functional.cross_entropy(model(x), y)
    want = [
        p.detach() - 0.1 * g
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True)
    ]
    method = MER(model, ReservoirBuffer(2), lr=0.1, beta=1.0, gamma=1.0, batches=1, batch_size=1)
    assert method.step(x, y) == pytest.approx(float(loss))
    torch.testing.assert_close([p.detach() for p in model.parameters()], want)


def test_mer_resumes_exactly() -> None:
    x, y = stream(12)
    model = net()
    method = MER(model, ReservoirBuffer(4, seed=1), batches=2, batch_size=3)
    method.step(x[:6], y[:6])
    twin = copy.deepcopy(model)
    other = MER(twin, ReservoirBuffer(4, seed=9), batches=2, batch_size=3)
    other.load_state_dict(method.state_dict())
    assert method.step(x[6:], y[6:]) == other.step(x[6:], y[6:])
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_mer_failure_leaves_the_weights() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    method = MER(model, ReservoirBuffer(4), batches=2, batch_size=2)
    x, y = stream(3)
    method.step(x, y)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="loss of an example is nan; expected a finite"):
        method.step(torch.full((1, 3), float("nan")).double(), y[:1])
    with pytest.raises(IndexError):
        method.step(x[:1], torch.tensor([7]))
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b)
    assert method.buffer.seen == 3
    assert torch.equal(model[0].bias, net()[0].bias)


def test_mer_refuses() -> None:
    x, y = stream(2)
    with pytest.raises(ValueError, match="MER: got 2 inputs and 1 labels"):
        MER(net(), ReservoirBuffer(2)).step(x, y[:1])
    with pytest.raises(TypeError, match="MER: buffer is a RingBuffer; expected a ReservoirBuffer"):
        MER(net(), RingBuffer(2, per_class=1))
    with pytest.raises(ValueError, match=r"MER: beta is 1.5; expected in \[0, 1\]"):
        MER(net(), ReservoirBuffer(2), beta=1.5)
    with pytest.raises(ValueError, match="MER: batches is 0"):
        MER(net(), ReservoirBuffer(2), batches=0)


def oml(seed: int = 2, lr: float = 0.3) -> tuple[OML, nn.Module, nn.Module]:
    model = net()
    buffer = ReservoirBuffer(6, seed=seed)
    buffer.add(*stream(6, seed=5))
    head = nn.Sequential(model[1], model[2])
    return OML(model[0], head, buffer, lr=lr, batch_size=4), model[0], head


def test_oml_is_the_unrolled_loss_and_its_derivative() -> None:
    """Against the same trajectory written out with torch.func, and that against central differences."""
    method, body, head = oml()
    x, y = stream(4, seed=7)
    bx, by = copy.deepcopy(method.buffer).sample(4)

    def value(theta: Tensor, bias: Tensor, w: Tensor, b: Tensor) -> Tensor:
        def out(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
            return functional.linear(functional.linear(x, theta, bias).tanh(), w, b)

        for j in range(4):
            g = torch.func.grad(
                lambda w, b, j=j: functional.cross_entropy(out(w, b, x[j : j + 1]), y[j : j + 1]), argnums=(0, 1)
            )(w, b)
            w, b = w - 0.3 * g[0], b - 0.3 * g[1]
        return functional.cross_entropy(out(w, b, torch.cat([x, bx])), torch.cat([y, by]))

    params = [*body.parameters(), *head.parameters()]
    loss = method.meta_loss(x, y)
    torch.testing.assert_close(loss, value(*params))
    got = torch.autograd.grad(loss, params)
    with torch.no_grad():
        for i, p in enumerate(params):
            numeric = torch.zeros_like(p)
            for at in range(p.numel()):
                ends = []
                for e in (1e-5, -1e-5):
                    moved = [q.clone() for q in params]
                    moved[i].view(-1)[at] += e
                    ends.append(value(*moved))
                numeric.view(-1)[at] = (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close(got[i], numeric, atol=1e-8, rtol=1e-6)


def test_oml_without_steps_or_buffer() -> None:
    method, _, _ = oml(lr=0.0)
    x, y = stream(4, seed=7)
    bx, by = copy.deepcopy(method.buffer).sample(4)
    want = functional.cross_entropy(method.model(torch.cat([x, bx])), torch.cat([y, by]))
    torch.testing.assert_close(method.meta_loss(x, y), want)
    _, body, head = oml()
    empty = OML(body, head, ReservoirBuffer(2), lr=0.0)
    torch.testing.assert_close(empty.meta_loss(x, y), functional.cross_entropy(head(body(x)), y))


def test_oml_adapt_takes_the_steps_for_good() -> None:
    method, body, head = oml()
    x, y = stream(4, seed=7)
    features = [p.detach().clone() for p in body.parameters()]
    twin = copy.deepcopy(head)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.3)
    for j in range(4):
        optimizer.zero_grad()
        functional.cross_entropy(twin(body(x[j : j + 1]).detach()), y[j : j + 1]).backward()
        optimizer.step()
    method.adapt(x, y)
    torch.testing.assert_close(list(head.parameters()), list(twin.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(body.parameters(), features, strict=True))
    assert method.buffer.seen == 10
    before = [p.detach().clone() for p in head.parameters()]
    with pytest.raises(IndexError):
        method.adapt(x[:2], torch.tensor([0, 9]))
    assert all(torch.equal(p, q) for p, q in zip(head.parameters(), before, strict=True))


def test_oml_meta_training_lowers_what_is_forgotten() -> None:
    """Outer steps on the features: a fixed trajectory interferes less with the buffer after them."""
    method, body, _ = oml()
    x, y = stream(4, seed=7)
    optimizer = torch.optim.SGD(body.parameters(), lr=0.5)
    losses = []
    for _ in range(30):
        method.buffer.generator.manual_seed(0)
        loss = method.meta_loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_oml_refuses() -> None:
    method, body, head = oml()
    with pytest.raises(ValueError, match="OML: got 0 inputs and 0 labels"):
        method.meta_loss(torch.zeros(0, 3).double(), torch.zeros(0, dtype=torch.long))
    with pytest.raises(TypeError, match="OML: prediction is a int"):
        OML(body, 3, ReservoirBuffer(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="OML: lr is -1"):
        OML(body, head, ReservoirBuffer(2), lr=-1.0)
    head.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        method.meta_loss(*stream(2))
