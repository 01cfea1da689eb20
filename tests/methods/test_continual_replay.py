"""Replay losses: their equations, with the buffer's own draws, and exact resumption."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tlkernels.methods.continual.buffers import ReservoirBuffer
from tlkernels.methods.continual.replay import DER, ER, ERACE, DERPlusPlus, GenerativeReplay


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def batch(seed: int = 0, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator).double(), torch.randint(0, 3, (n,), generator=generator)


def filled(make: Any, **options: Any) -> tuple[nn.Linear, Any]:
    net = model()
    method = make(net, ReservoirBuffer(10, seed=1), batch_size=4, **options)
    for seed in range(3):
        x, y = batch(seed)
        method.observe(x, y, net(x))
    with torch.no_grad():
        net.weight += 0.3
    return net, method


def test_nothing_is_replayed_at_first() -> None:
    for make in (ER, ERACE, DER, DERPlusPlus):
        method = make(model(), ReservoirBuffer(4))
        assert method.penalty() == 0


def test_er() -> None:
    net, method = filled(ER, weight=0.7)
    x, y = copy.deepcopy(method.buffer).sample(4)
    torch.testing.assert_close(method.penalty(), 0.7 * functional.cross_entropy(net(x), y))
    other = ER(net, method.buffer, criterion=lambda out, labels: out.square().mean())
    assert other.penalty().requires_grad


def test_der_keeps_the_logits_of_the_step() -> None:
    net, method = filled(DER, alpha=0.3)
    x, _, z = copy.deepcopy(method.buffer).sample(4)
    torch.testing.assert_close(z, functional.linear(x, net.weight - 0.3, net.bias).detach())
    loss = method.penalty()
    torch.testing.assert_close(loss, 0.3 * (net(x) - z).square().mean())
    assert loss > 0
    loss.backward()
    assert net.weight.grad is not None


def test_der_plus_plus_draws_twice() -> None:
    net, method = filled(DERPlusPlus, alpha=0.3, beta=0.9)
    buffer = copy.deepcopy(method.buffer)
    x, _, z = buffer.sample(4)
    x2, y2, _ = buffer.sample(4)
    assert not torch.equal(x, x2)
    expected = 0.3 * functional.mse_loss(net(x), z) + 0.9 * functional.cross_entropy(net(x2), y2)
    torch.testing.assert_close(method.penalty(), expected)


def test_a_head_that_grew_is_compared_on_the_old_logits() -> None:
    net, method = filled(DER)
    grown = nn.Linear(4, 5).double()
    with torch.no_grad():
        grown.weight[:3], grown.bias[:3] = net.weight, net.bias
    expected = copy.deepcopy(method).penalty()
    method.model = grown
    torch.testing.assert_close(method.penalty(), expected)


def test_er_ace_leaves_old_classes_out() -> None:
    net = model()
    method = ERACE(net, ReservoirBuffer(10), batch_size=4)
    x, _ = batch()
    y = torch.tensor([2, 2, 2, 2, 2, 2])
    torch.testing.assert_close(method.incoming(net(x), y), functional.cross_entropy(net(x), y))  # nothing is old
    method.observe(x, torch.tensor([0, 0, 1, 1, 0, 1]))
    out = net(x)
    assert method.incoming(out, y) == 0  # the only class
    mixed = torch.tensor([2, 1, 2, 1, 2, 2])
    expected = functional.cross_entropy(out[:, 1:], mixed - 1)
    torch.testing.assert_close(method.incoming(out, mixed), expected)
    (grad,) = torch.autograd.grad(method.incoming(out, mixed), out)
    assert not grad[:, 0].any() and grad[:, 1:].any()
    drawn, labels = copy.deepcopy(method.buffer).sample(4)
    torch.testing.assert_close(method.penalty(), functional.cross_entropy(net(drawn), labels))


def test_generative_replay() -> None:
    net, before = model(), model()
    with torch.no_grad():
        before.weight *= -1
    x, _ = batch(n=5)
    asked: list[int] = []

    def generate(n: int) -> Tensor:
        asked.append(n)
        return x

    method = GenerativeReplay(net, generate, before, batch_size=5, weight=0.4)
    assert method.penalty() == 0 and not asked
    method.after_task()
    torch.testing.assert_close(method.penalty(), 0.4 * functional.cross_entropy(net(x), before(x).argmax(1)))
    assert asked == [5]
    soft = GenerativeReplay(net, generate, before, batch_size=5, soft=True)
    soft.after_task()
    expected = -(before(x).softmax(1) * net(x).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(soft.penalty(), expected)


@pytest.mark.parametrize("make", [ER, ERACE, DER, DERPlusPlus])
def test_resumes_exactly(make: Any) -> None:
    _, method = filled(make)
    method.after_task()
    net, again = filled(make)
    again.penalty()
    again.load_state_dict(method.state_dict())
    method.model = net
    assert again.tasks == 1
    assert torch.equal(again.penalty(), method.penalty())
    x, y = batch(9)
    for one in (method, again):
        one.observe(x, y, net(x))
    assert all(torch.equal(a, b) for a, b in zip(method.buffer.tensors, again.buffer.tensors, strict=True))


def test_wrong_calls() -> None:
    net, buffer = model(), ReservoirBuffer(4)
    for call, error, says in (
        (lambda: ER(net, []), TypeError, "ER: buffer is a list"),
        (lambda: ER(net, buffer, batch_size=0), ValueError, "batch_size is 0"),
        (lambda: ER(net, buffer, weight=-1), ValueError, "weight is -1"),
        (lambda: DER(net, buffer, alpha=float("nan")), ValueError, "alpha is nan"),
        (lambda: DERPlusPlus(net, buffer, beta=-1), ValueError, "beta is -1"),
        (lambda: DER(net, buffer).observe(*batch()), ValueError, "outputs is None"),
        (lambda: ERACE(net, buffer).incoming(torch.ones(3), torch.ones(3)), ValueError, r"expected \(N, C\)"),
        (lambda: GenerativeReplay(net, 3, net), TypeError, "generate is a int"),
        (lambda: GenerativeReplay(net, net, net, batch_size=0), ValueError, "batch_size is 0"),
        (lambda: ER(3, buffer), TypeError, "model is a int"),
        (lambda: ER(net, buffer).load_state_dict({"class": "DER"}), ValueError, "has class 'DER'"),
    ):
        with pytest.raises(error, match=says):
            call()  # type: ignore[no-untyped-call]
