"""Classifiers on features: scikit-learn's where it has them, the papers' algorithms written again elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tlkernels.methods.continual.classifiers import (
    SLDA,
    BiasCorrection,
    ICaRL,
    NearestClassMean,
    RanPAC,
    align_weights,
    herding,
)


def data(n: int = 90, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=generator) * 2  # classes 0, 2, 4
    centres = torch.randn(5, dim, generator=generator) * 2
    mix = torch.randn(dim, dim, generator=generator)
    return centres[y] + torch.randn(n, dim, generator=generator) @ mix + 1, y


def pieces(x: Tensor, y: Tensor, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(9))
    return [(x[i], y[i]) for i in order.split(size)]


def test_herding_is_the_papers_loop() -> None:
    x = data(30, seed=3)[0]
    rows = functional.normalize(x.double(), dim=1).numpy()
    chosen: list[int] = []
    for k in range(1, 13):
        best = min(
            (i for i in range(30) if i not in chosen),
            key=lambda i: np.linalg.norm(rows.mean(0) - (rows[i] + rows[chosen].sum(0)) / k),
        )
        chosen.append(best)
    assert herding(x, 12).tolist() == chosen
    assert herding(x, 5).tolist() == chosen[:5]
    assert sorted(herding(x, 30).tolist()) == list(range(30))
    for count in (0, 31):
        with pytest.raises(ValueError, match=f"count is {count}; expected 1 to 30"):
            herding(x, count)


def test_nearest_class_mean_is_scikit_learns() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y = data()
    ours = NearestClassMean()
    for part in pieces(x, y):
        ours.add(*part)
    theirs = neighbors.NearestCentroid().fit(x.numpy(), y.numpy())
    test = data(200, seed=5)[0]
    assert ours.predict(test).tolist() == theirs.predict(test.numpy()).tolist()
    np.testing.assert_allclose(ours.means.numpy(), theirs.centroids_, rtol=1e-5)
    scaled = NearestClassMean(normalize=True)
    scaled.add(x, y)
    cosine = functional.normalize(test.double(), dim=1) @ scaled.means.T
    assert scaled.predict(test).tolist() == [scaled.classes[i] for i in cosine.argmax(1)]
    again = NearestClassMean()
    again.load_state_dict(ours.state_dict())
    again.add(x, y)
    torch.testing.assert_close(again.means, ours.means)


@pytest.mark.parametrize("shrinkage", [1e-4, 0.3])
def test_slda_is_linear_discriminant_analysis(shrinkage: float) -> None:
    x, y = data(300)
    ours = SLDA(shrinkage=shrinkage)
    for part in pieces(x + 1000, y):  # far from 0 nothing is lost
        ours.add(*part)
    rows = (x + 1000).double()
    centred = torch.cat([rows[y == c] - rows[y == c].mean(0) for c in (0, 2, 4)])
    covariance = centred.T @ centred / len(y)
    torch.testing.assert_close(ours.covariance, covariance, rtol=1e-8, atol=1e-8)
    precision = torch.linalg.inv((1 - shrinkage) * covariance + shrinkage * torch.eye(5).double())
    means = torch.stack([rows[y == c].mean(0) for c in (0, 2, 4)])
    test = data(100, seed=7)[0].double() + 1000
    scores = test @ precision @ means.T - 0.5 * (means @ precision * means).sum(1)
    torch.testing.assert_close(
        ours.scores(test) - ours.scores(test)[:, :1], scores - scores[:, :1], rtol=1e-4, atol=1e-2
    )
    assert ours.predict(test).tolist() == [ours.classes[i] for i in scores.argmax(1)]
    again = SLDA(shrinkage=shrinkage)
    again.load_state_dict(ours.state_dict())
    ours.add(x, y)
    torch.testing.assert_close(again.covariance, covariance, rtol=1e-8, atol=1e-8)
    assert not torch.equal(ours.covariance, again.covariance)


def test_slda_agrees_with_scikit_learn() -> None:
    discriminant = pytest.importorskip("sklearn.discriminant_analysis")
    x, y = data(300)
    ours = SLDA(shrinkage=0.0)
    ours.add(x, y)
    theirs = discriminant.LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3).fit(
        x.double().numpy(), y.numpy()
    )
    test = data(200, seed=5)[0]
    # scikit-learn's covariance weighs classes by their priors: nearly the same with nearly equal classes
    assert np.mean(ours.predict(test).numpy() == theirs.predict(test.double().numpy())) > 0.98


class TestICaRL:
    def test_exemplars(self) -> None:
        torch.manual_seed(0)
        features = nn.Linear(5, 4)
        x, y = data(90)
        memory = ICaRL(10)
        first = y != 4
        memory.update(features, x[first], y[first])
        inputs, classes = memory.tensors
        assert classes.tolist() == [0] * 5 + [2] * 5
        of_0 = x[y == 0]
        assert torch.equal(inputs[:5], of_0[herding(features(of_0).detach(), 5)])
        memory.update(features, x[~first], y[~first])
        cut, classes = memory.tensors
        assert classes.tolist() == [0] * 3 + [2] * 3 + [4] * 3
        assert torch.equal(cut[:3], inputs[:3])  # the best stay
        means = torch.stack([
            functional.normalize(functional.normalize(features(cut[classes == c]), dim=1).mean(0), dim=0)
            for c in (0, 2, 4)
        ])  # fmt: skip
        test = data(40, seed=2)[0]
        expected = torch.cdist(functional.normalize(features(test), dim=1), means).argmin(1) * 2
        assert torch.equal(memory.predict(features, test), expected)
        again = ICaRL(10)
        again.load_state_dict(memory.state_dict())
        assert torch.equal(again.predict(features, test), expected)

    def test_wrong_calls(self) -> None:
        x, y = data(20)
        memory = ICaRL(3)
        with pytest.raises(ValueError, match="there are no exemplars"):
            memory.predict(lambda t: t, x)
        memory.update(lambda t: t, x[y == 0], y[y == 0])
        with pytest.raises(ValueError, match="class 0, which has exemplars"):
            memory.update(lambda t: t, x, y)
        with pytest.raises(ValueError, match="capacity is 3 for 4 classes"):
            memory.update(lambda t: t, x, torch.arange(20) % 3 + 5)
        assert memory.classes == [0]
        with pytest.raises(ValueError, match="capacity is 0"):
            ICaRL(0)


def test_ranpac_is_ridge_regression_on_projections() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = data(200)
    ours = RanPAC(5, projected=40, ridge=0.3, seed=2)
    for part in pieces(x, y):
        ours.add(*part)
    z = (x.double() @ ours.projection).clamp(min=0).numpy()
    one_hot = (y[:, None] == torch.tensor([0, 2, 4])).double().numpy()
    theirs = linear_model.Ridge(alpha=0.3, fit_intercept=False, solver="cholesky").fit(z, one_hot)
    np.testing.assert_allclose(ours.weights().numpy(), theirs.coef_.T, rtol=1e-6, atol=1e-9)
    test, labels = data(150, seed=5)
    z = (test.double() @ ours.projection).clamp(min=0).numpy()
    assert ours.predict(test).tolist() == [2 * int(i) for i in theirs.predict(z).argmax(1)]
    again = RanPAC(5, projected=40, seed=9)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again.predict(test), ours.predict(test))
    target = (labels[:, None] == torch.tensor([0, 2, 4])).double().numpy()
    ridges = [1e-6, 1e-2, 1.0, 1e2, 1e6]
    seen = (x.double() @ ours.projection).clamp(min=0).numpy()
    fits = [linear_model.Ridge(alpha=r, fit_intercept=False, solver="cholesky").fit(seen, one_hot) for r in ridges]
    errors = [((fit.predict(z) - target) ** 2).mean() for fit in fits]
    assert ours.choose_ridge(test, labels, ridges) == ridges[int(np.argmin(errors))] == ours.ridge
    for call, says in (
        (lambda: RanPAC(0), "dim is 0"), (lambda: RanPAC(2, ridge=-1), "ridge is -1"),
        (lambda: RanPAC(2).predict(torch.ones(1, 2)), "no class was seen"),
        (lambda: ours.choose_ridge(test, labels, []), "ridges is empty"),
        (lambda: ours.choose_ridge(test, labels + 1, ridges), "labels holds class 1"),
        (lambda: ours.add(torch.ones(2, 4), torch.tensor([0, 1])), "has 4 columns; expected 5"),
        (lambda: again.load_state_dict(RanPAC(5, projected=3).state_dict()), "state_dict has projection"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            call()  # type: ignore[no-untyped-call]


def test_bias_correction_finds_what_was_done() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 4, generator=generator) * 2
    labels = torch.distributions.Categorical(logits=logits).sample()
    shifted = logits.clone()
    shifted[:, 2:] = (logits[:, 2:] - 0.7) / 0.5  # new classes too large, and too sure
    correction = BiasCorrection(torch.tensor([2, 3]))
    loss = correction.fit(shifted, labels)
    assert float(correction.alpha) == pytest.approx(0.5, abs=0.03) and float(correction.beta) == pytest.approx(
        0.7, abs=0.1
    )
    assert loss <= float(functional.cross_entropy(logits, labels)) + 1e-6
    assert torch.equal(correction(shifted)[:, :2], shifted[:, :2])
    with pytest.raises(ValueError, match="new has shape"):
        BiasCorrection(torch.tensor([]))


def test_weights_are_aligned() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 5.0], [6.0, 8.0], [0.0, 20.0]])
    gamma = align_weights(weight, torch.tensor([2, 3]))
    assert gamma == pytest.approx(5 / 15)
    assert float(weight[2:].norm(dim=1).mean()) == pytest.approx(5) and weight[0].tolist() == [3, 4]
    for new, says in (([], "new has 0 of 4"), ([0, 1, 2, 3], "new has 4 of 4")):
        with pytest.raises(ValueError, match=says):
            align_weights(weight, torch.tensor(new, dtype=torch.int64))
    with pytest.raises(ValueError, match="weight is 0 in all new rows"):
        align_weights(torch.zeros(2, 2), torch.tensor([1]))


def test_wrong_features() -> None:
    for make in (NearestClassMean, SLDA):
        ours = make()
        with pytest.raises(ValueError, match="no class was seen"):
            ours.predict(torch.ones(2, 3))
        ours.add(torch.ones(2, 3), torch.tensor([0, 1]))
        for features, labels, says in (
            (torch.ones(2), torch.tensor([0, 1]), "expected floating-point"),
            (torch.ones(2, 4), torch.tensor([0, 1]), "has 4 columns; expected 3"),
            (torch.ones(2, 3), torch.tensor([0]), "expected integer classes"),
            (torch.ones(2, 3), torch.tensor([0, -1]), "labels holds -1"),
        ):
            with pytest.raises(ValueError, match=says):
                ours.add(features, labels)
    with pytest.raises(ValueError, match="shrinkage is 2"):
        SLDA(shrinkage=2)
