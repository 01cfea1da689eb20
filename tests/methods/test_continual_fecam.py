"""FeCAM against its equations on the whole data, and scikit-learn's covariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tlkernels.methods.continual.fecam import FeCAM


def data(n: int = 120, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positive, correlated features of three classes of unequal size and spread."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 5, (n,), generator=generator).clamp(max=2)
    mix = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(9)).double()
    noise = torch.randn(n, 1, 4, generator=generator).double()
    x = (noise @ mix[y]).squeeze(1) + torch.tensor([[6.0, 4, 5, 9], [9, 5, 3, 4], [4, 8, 8, 5]])[y]
    return x.clamp(min=0.05), y * 2


def streamed(model: FeCAM, x: Tensor, y: Tensor) -> FeCAM:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(3))
    for i in order.split((1, 2, 30, 7, 80)):
        model.add(x[i], y[i])
    return model


def reference(x: Tensor, y: Tensor, test: Tensor, g1: float, g2: float, power: float, correlation: bool) -> np.ndarray:
    """The paper's equations with loops over entries."""

    def tukey(a: np.ndarray) -> np.ndarray:
        return np.log(a) if power == 0 else a**power

    def unit(a: np.ndarray) -> np.ndarray:
        return a / np.linalg.norm(a, axis=-1, keepdims=True)

    out = []
    for c in (0, 2, 4):
        mine = x[y == c].numpy()
        sigma = np.cov(tukey(mine).T)
        d = len(sigma)
        v1 = np.mean([sigma[i, i] for i in range(d)])
        v2 = np.mean([sigma[i, j] for i in range(d) for j in range(d) if i != j])
        shrunk = np.array([[sigma[i, j] + (g1 * v1 if i == j else g2 * v2) for j in range(d)] for i in range(d)])
        if correlation:
            shrunk = np.array(
                [[shrunk[i, j] / math.sqrt(shrunk[i, i] * shrunk[j, j]) for j in range(d)] for i in range(d)]
            )
        away = unit(tukey(test.numpy())) - unit(tukey(mine.mean(0)))
        out.append(-np.einsum("ni,ij,nj->n", away, np.linalg.inv(shrunk), away))
    return np.stack(out, 1)


@pytest.mark.parametrize(
    ("g1", "g2", "power", "correlation"),
    [(1.0, 1.0, 0.5, True), (0.0, 0.0, 0.5, True), (2.0, 0.3, 0.0, True), (0.5, 0.0, 1.0, False)],
)
def test_fecam_is_its_equations(g1: float, g2: float, power: float, correlation: bool) -> None:
    x, y = data()
    model = FeCAM(diagonal=g1, off_diagonal=g2, power=power, correlation=correlation)
    streamed(model, x, y)
    test, labels = data(60, seed=5)
    want = reference(x, y, test, g1, g2, power, correlation)
    np.testing.assert_allclose(model.scores(test).numpy(), want, rtol=1e-8, atol=1e-10)
    assert model.classes == [0, 2, 4]
    assert model.predict(test).tolist() == [2 * int(i) for i in want.argmax(1)]
    assert (model.predict(test) == labels).double().mean() > 0.8


def test_covariance_is_scikit_learns() -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    x, y = data()
    model = streamed(FeCAM(power=1.0), x + 1000, y)  # far from 0 nothing is lost
    for c in (0, 2, 4):
        mine = (x + 1000)[y == c].numpy()
        theirs = covariance.EmpiricalCovariance().fit(mine).covariance_ * len(mine) / (len(mine) - 1)
        np.testing.assert_allclose(model.covariance(c).numpy(), theirs, rtol=1e-8)


def test_fewer_examples_than_dimensions() -> None:
    x, y = data()
    few = torch.cat([(y == c).nonzero().flatten()[:3] for c in (0, 2, 4)])
    model = FeCAM()
    model.add(x[few], y[few])
    assert torch.isfinite(model.scores(x)).all()
    with pytest.raises(ValueError, match=r"covariance of class 0 is not positive definite; expected a larger diagonal"):
        bare = FeCAM(diagonal=0.0, off_diagonal=0.0)
        bare.add(x[few], y[few])
        bare.scores(x)


def test_state_round_trip() -> None:
    x, y = data()
    model = FeCAM(power=0.3)
    model.add(x[:50], y[:50])
    state = model.state_dict()
    other = FeCAM(power=0.3)
    other.load_state_dict(state)
    for each in (model, other):
        each.add(x[50:], y[50:])
    assert torch.equal(model.scores(x), other.scores(x))
    again = FeCAM(power=0.3)
    again.load_state_dict(state)  # what came after did not change it
    fresh = FeCAM(power=0.3)
    fresh.add(x[:50], y[:50])
    assert torch.equal(again.scores(x), fresh.scores(x))
    with pytest.raises(ValueError, match="state_dict has settings"):
        FeCAM().load_state_dict(state)
    with pytest.raises(ValueError, match="state_dict lacks 'centres'"):
        other.load_state_dict({k: v for k, v in state.items() if k != "centres"})


def test_refusals_change_nothing() -> None:
    x, y = data()
    model = FeCAM()
    with pytest.raises(ValueError, match="FeCAM: no class was seen"):
        model.predict(x)
    model.add(x, y)
    before = model.scores(x)
    negative, nan = x.clone(), x.clone()
    negative[0, 0], nan[0, 0] = -2.0, float("nan")
    for features, labels, match in (
        (negative, y, "FeCAM: features has -2; expected >= 0 with power 0.5"),
        (nan, y, "FeCAM: features has a NaN"),
        (x[:, :3], y, "FeCAM: features has 3 columns; expected 4"),
        (x, y[:5], "FeCAM: labels has shape"),
    ):
        with pytest.raises(ValueError, match=match):
            model.add(features, labels)
    assert torch.equal(model.scores(x), before)
    model.add(x[:1], torch.tensor([9]))
    with pytest.raises(ValueError, match="FeCAM: class 9 has 1 examples; expected two"):
        model.scores(x)
    model.add(x[:1], torch.tensor([9]))  # twice the same: no spread at all
    with pytest.raises(ValueError, match="covariance of class 9 is not positive definite"):
        model.scores(x)
    with pytest.raises(ValueError, match="FeCAM: features has 0; expected > 0 with power 0"):
        FeCAM(power=0.0).add(torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"FeCAM: power is 2.0; expected in \[0, 1\]"):
        FeCAM(power=2.0)
    with pytest.raises(ValueError, match="FeCAM: diagonal is -1"):
        FeCAM(diagonal=-1.0)
