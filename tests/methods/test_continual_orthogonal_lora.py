"""O-LoRA: the term and its gradient against sums in float64, what the end of a task keeps, state and misuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tlkernels.methods.continual.orthogonal_lora import OLoRA
from tlkernels.nn.lora import LoRALinear

DTYPE = torch.float64


def made(seed=0, weight=0.7):
    torch.manual_seed(seed)
    layers = [LoRALinear(nn.Linear(a, b).to(DTYPE), 2, 4.0) for a, b in ((6, 5), (5, 3))]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    return model, OLoRA(model, weight, generator=torch.Generator().manual_seed(1))


def train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(8, 6, dtype=DTYPE, generator=torch.Generator().manual_seed(2))
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return x


def test_penalty_and_gradient():
    model, method = made()
    assert method.penalty() == 0
    for _ in range(2):
        train(model)
        method.after_task()
    want, grads = 0.0, {}
    for name in ("0", "2"):
        a = model[int(name)].lora_A.detach()
        grads[name] = torch.zeros_like(a)
        for known in method.earlier[name]:
            for i in range(2):
                for j in range(2):
                    o = float(a[i] @ known[j])
                    want += 0.7 * abs(o)
                    grads[name][i] += 3 * 0.7 * math.copysign(1, o) * known[j]
    assert len(method.earlier["0"]) == 2
    penalty = method.penalty()
    assert float(penalty.detach()) == pytest.approx(want, rel=1e-12)
    model.zero_grad()
    penalty.backward(torch.tensor(3.0, dtype=DTYPE))
    for name, grad in grads.items():
        torch.testing.assert_close(model[int(name)].lora_A.grad, grad)


def test_orthogonal_factors_cost_nothing():
    layer = LoRALinear(nn.Linear(4, 3).to(DTYPE), 2)
    method = OLoRA(layer)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(4, dtype=DTYPE)[:2])
    method.after_task()
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(4, dtype=DTYPE)[2:])
    assert method.penalty() == 0
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(4, dtype=DTYPE)[1:3])
    assert method.penalty() == 0.5


def test_end_of_task_keeps_the_outputs():
    model, method = made()
    x = train(model)
    before, weight = model(x).detach().clone(), model[0].base_layer.weight.detach().clone()
    update = model[0].scaling * model[0].lora_B.detach() @ model[0].lora_A.detach()
    method.after_task()
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model[0].base_layer.weight.detach(), weight + update, rtol=1e-6, atol=1e-6)
    assert not model[0].lora_B.any()
    assert not model[0].base_layer.weight.requires_grad
    assert model[0].lora_A.abs().max() <= 1 / math.sqrt(6)


def test_penalty_makes_the_subspaces_orthogonal():
    model, method = made(weight=1.0)
    train(model)
    method.after_task()
    first = float(method.penalty().detach())
    optimizer = torch.optim.SGD([m.lora_A for m in (model[0], model[2])], lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        method.penalty().backward()
        optimizer.step()
    assert float(method.penalty().detach()) < 0.2 * first


def test_state_resumes_exactly():
    (a, first), (b, second) = made(), made(4)
    train(a)
    first.after_task()
    b.load_state_dict(a.state_dict())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.penalty(), second.penalty())
    first.after_task()
    second.after_task()
    assert torch.equal(a[0].lora_A, b[0].lora_A)
    assert second.tasks == 2
    other = OLoRA(LoRALinear(nn.Linear(4, 4), 2))
    with pytest.raises(ValueError, match="of other layers"):
        other.load_state_dict(first.state_dict())


def test_misuse():
    with pytest.raises(ValueError, match="has no LoRALinear"):
        OLoRA(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="layer '0' is another kind"):
        OLoRA(nn.Sequential(LoRALinear(nn.Linear(4, 4), 2, lora_bias=True)))
    with pytest.raises(ValueError, match="weight is -1"):
        OLoRA(LoRALinear(nn.Linear(4, 4), 2), -1)
    model, method = made()
    model[2].merge()
    with pytest.raises(ValueError, match="layer '2' is merged"):
        method.after_task()
    model[2].unmerge()
    with torch.no_grad():
        model[2].lora_A[0, 0] = math.nan
    before = model[0].base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="factors of '2' are not finite"):
        method.after_task()
    assert torch.equal(model[0].base_layer.weight, before)
    assert method.earlier["0"] == []
