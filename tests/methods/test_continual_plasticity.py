"""Continual backprop: utilities against sums in float64, who is replaced and when, what a reset changes, state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tlkernels.methods.continual.plasticity import ContinualBackprop

DTYPE = torch.float64
UNITS = [("0", "1", "2")]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).to(DTYPE)


@pytest.mark.parametrize("utility", ["contribution", "mean_corrected", "adaptation"])
def test_utilities(utility):
    model = mlp()
    method = ContinualBackprop(model, UNITS, rate=0.0, decay=0.9, utility=utility)
    want, mean = [0.0] * 5, [0.0] * 5
    for t in range(1, 5):
        x = randn(7, 4, seed=t)
        h = model[1](model[0](x)).detach()
        model(x)
        method.after_step()
        for i in range(5):
            mean[i] = 0.9 * mean[i] + 0.1 * float(h[:, i].mean())
            shift = 0.0 if utility == "contribution" else mean[i] / (1 - 0.9**t)
            y = sum(abs(float(v) - shift) for v in h[:, i]) / 7 * float(model[2].weight[:, i].detach().abs().sum())
            if utility == "adaptation":
                y /= float(model[0].weight[i].detach().abs().sum())
            want[i] = 0.9 * want[i] + 0.1 * y
    torch.testing.assert_close(method.utilities()[0], torch.tensor(want, dtype=DTYPE) / (1 - 0.9**4))


def test_fractions_add_up_and_maturity_protects():
    method = ContinualBackprop(mlp(), UNITS, rate=0.08, maturity=3)
    counts = []
    for t in range(9):
        method.model(randn(6, 4, seed=t))
        method.after_step()
        counts.append(method.replaced)
    # 5 eligible units from the fourth step on give 0.4 a step: 0.4, 0.8, 1.2; then 4 eligible: 0.2 + 0.32 ...
    assert counts == [0, 0, 0, 0, 0, 1, 1, 1, 2]
    assert int(method.ages[0].min()) == 0


@pytest.mark.parametrize("utility", ["contribution", "mean_corrected"])
def test_a_reset_changes_the_least_useful_unit_alone(utility):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method = ContinualBackprop(model, UNITS, optimizer, rate=0.2, maturity=0, utility=utility)
    with torch.no_grad():
        model[2].weight[:, 3] *= 1e-6
    x = randn(8, 4)
    model(x).square().sum().backward()
    optimizer.step()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    moments = optimizer.state[model[0].weight]["exp_avg"].clone()
    with torch.no_grad():
        model[2].weight[:, 3] = before["2.weight"][:, 3] = 1e-6
        mean = float(torch.relu(x @ before["0.weight"][3] + before["0.bias"][3]).mean())
    model(x)
    method.after_step()
    assert method.replaced == 1
    others = [0, 1, 2, 4]
    assert torch.equal(model[0].weight[others], before["0.weight"][others])
    assert torch.equal(model[0].bias[others], before["0.bias"][others])
    assert torch.equal(model[2].weight[:, others], before["2.weight"][:, others])
    assert not torch.equal(model[0].weight[3], before["0.weight"][3])
    assert model[0].weight[3].abs().max() <= 0.5
    assert model[0].bias[3] == 0
    assert not model[2].weight[:, 3].any()
    gain = 0.0 if utility == "contribution" else mean * 1e-6
    torch.testing.assert_close(model[2].bias - before["2.bias"], torch.full((3,), gain, dtype=DTYPE), rtol=1e-6, atol=0)
    state = optimizer.state[model[0].weight]
    assert not state["exp_avg"][3].any() and not state["exp_avg_sq"][3].any()
    assert torch.equal(state["exp_avg"][others], moments[others])
    assert not optimizer.state[model[2].weight]["exp_avg"][:, 3].any()
    assert optimizer.state[model[2].weight]["exp_avg"][:, 0].any()
    assert optimizer.state[model[0].bias]["exp_avg_sq"][3] == 0
    assert method.ages[0].tolist() == [1, 1, 1, 0, 1]


def test_convolution_read_by_a_flattened_linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).to(DTYPE)
    method = ContinualBackprop(model, [("0", "1", "3")], rate=0.34, maturity=0)
    x = randn(4, 1, 3, 3)
    h = model[1](model[0](x)).detach()
    y = [float(h[:, c].mean() * model[3].weight.detach()[:, 4 * c : 4 * c + 4].abs().sum()) for c in range(3)]
    worst = y.index(min(y))
    model(x)
    method.after_step()
    assert method.replaced == 1
    zero = (model[3].weight == 0).all(0).nonzero().flatten().tolist()
    assert zero == list(range(4 * worst, 4 * worst + 4))


def test_resumes_exactly():
    def run(model, method, steps):
        for t in steps:
            model(randn(6, 4, seed=t))
            method.after_step()

    a = mlp()
    first = ContinualBackprop(a, UNITS, rate=0.3, maturity=1)
    run(a, first, range(4))
    b = mlp(7)
    second = ContinualBackprop(b, UNITS, rate=0.3, maturity=1)
    b.load_state_dict(a.state_dict())
    second.load_state_dict(first.state_dict())
    for model, method in ((a, first), (b, second)):
        run(model, method, range(4, 9))
    assert first.replaced == second.replaced > 2
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    wide = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="of other layers"):
        ContinualBackprop(wide, UNITS).load_state_dict(first.state_dict())


def test_misuse():
    model = mlp()
    for kwargs, match in (
        ({"rate": 2.0}, "rate is 2"),
        ({"decay": 1.0}, "decay is 1"),
        ({"maturity": -1}, "maturity is -1"),
        ({"utility": "x"}, "utility is 'x'"),
    ):
        with pytest.raises(ValueError, match=match):
            ContinualBackprop(model, UNITS, **kwargs)
    with pytest.raises(ValueError, match="units has '1'"):
        ContinualBackprop(model, [("1", "1", "2")])
    with pytest.raises(ValueError, match="units has '9'"):
        ContinualBackprop(model, [("0", "9", "2")])
    with pytest.raises(ValueError, match="units is empty"):
        ContinualBackprop(model, [])
    with pytest.raises(ValueError, match="expected a multiple of 3 units"):
        ContinualBackprop(model, [("2", "1", "0")])
    method = ContinualBackprop(model, UNITS)
    with pytest.raises(RuntimeError, match="no activations seen"):
        method.after_step()
    model(torch.full((2, 4), math.nan, dtype=DTYPE))
    with pytest.raises(ValueError, match="not finite"):
        method.after_step()
    assert method.ages[0].tolist() == [0] * 5
