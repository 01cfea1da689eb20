"""Transfer gain, layer transfer, CKA, domain distances and baselines, against closed forms, SciPy and scikit-learn."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor, nn

from tlkernels.methods import fundamentals as fn

matplotlib.use("Agg")

Array = np.ndarray[Any, Any]


# ---- transfer gain and negative-transfer gap ------------------------------------------------------------------------


def correctness(rng: np.random.Generator, n: int, both: float, first: float, second: float) -> tuple[Array, Array]:
    """Of two models on n examples, with the probabilities that both, only the first, only the second are right."""
    kind = rng.choice(4, n, p=[both, first, second, 1 - both - first - second])
    return (kind <= 1).astype(float), ((kind == 0) | (kind == 2)).astype(float)


def test_gain_and_gap_are_opposite() -> None:
    a, b = correctness(np.random.default_rng(0), 300, 0.5, 0.2, 0.1)
    gain = fn.transfer_gain(a, b)
    gap = fn.negative_transfer_gap(torch.from_numpy(a), b.tolist(), alternative="two-sided")
    assert gain.value == pytest.approx(a.mean() - b.mean()) and gap.value == pytest.approx(
        (1 - a).mean() - (1 - b).mean()
    )
    assert (gap.low, gap.high) == pytest.approx((-gain.high, -gain.low), abs=0.01)
    assert gain.low < gain.value < gain.high and gain.significant and not gain.high < 0
    assert str(gain).startswith(f"{gain.value:+.4f} (95% CI")


def test_standard_error_of_pairs() -> None:
    a, b = correctness(np.random.default_rng(1), 500, 0.5, 0.2, 0.1)
    paired = fn.transfer_gain(a, b, resamples=20000)
    assert paired.standard_error == pytest.approx((a - b).std() / math.sqrt(500), rel=0.03)
    apart = fn.transfer_gain(a, b, paired=False, resamples=20000)
    assert apart.standard_error == pytest.approx(math.sqrt((a.var() + b.var()) / 500), rel=0.03)
    assert paired.standard_error < 0.8 * apart.standard_error
    # many different scores, which are not counted by value
    x, y = np.random.default_rng(2).normal(size=(2, 500))
    gain = fn.transfer_gain(x, y)
    assert gain.standard_error == pytest.approx((x - y).std() / math.sqrt(500), rel=0.06)
    z = scipy.stats.norm.ppf(0.975) * gain.standard_error
    assert (gain.low, gain.high) == pytest.approx((gain.value - z, gain.value + z), abs=0.15 * z)


def test_coverage() -> None:
    # 1000 test sets of one population, in which the gain is 0.1: 95 % of the intervals hold it
    rng = np.random.default_rng(3)
    found = [
        [
            fn.transfer_gain(*pair, alternative=alternative, resamples=400, seed=i)
            for alternative in ("two-sided", "greater")
        ]
        for i in range(1000)
        for pair in [correctness(rng, 250, 0.5, 0.2, 0.1)]
    ]
    two_sided = np.mean([two.low <= 0.1 <= two.high for two, _ in found])
    one_sided = np.mean([one.low <= 0.1 for _, one in found])
    assert 0.93 < two_sided < 0.97 and 0.93 < one_sided < 0.97
    assert all(one.high == math.inf and one.low >= two.low for two, one in found)
    # where there is no gain, p-values are below 5 % in 5 % of the cases
    null = [
        fn.negative_transfer_gap(*correctness(rng, 250, 0.5, 0.15, 0.15), resamples=400).p_value for _ in range(1000)
    ]
    assert 0.03 < np.mean(np.array(null) < 0.05) < 0.07


def test_seeds_and_examples() -> None:
    # scores that are a sum of an effect of the seed and one of the example: the variance is that of both means
    rng = np.random.default_rng(4)
    rows, columns = rng.normal(size=(12, 1)), rng.normal(size=(1, 200)) * 3
    a, b = rows + columns, np.zeros((12, 200))
    gain = fn.transfer_gain(a, b, resamples=6000)
    assert gain.value == pytest.approx(a.mean())
    assert gain.standard_error == pytest.approx(math.sqrt(rows.var() / 12 + columns.var() / 200), rel=0.05)
    # seeds apart, of different number: the examples are shared, and cancel
    other = rng.normal(size=(7, 1)) + columns
    gain = fn.transfer_gain(a, other, paired=False, resamples=6000)
    assert gain.standard_error == pytest.approx(math.sqrt(rows.var() / 12 + other[:, 0].var() / 7), rel=0.05)
    # one row is the same as examples alone
    first = fn.transfer_gain(a[:1], b[:1], seed=3)
    assert (first.low, first.high) == pytest.approx((fn.transfer_gain(a[0], b[0], seed=3).low, first.high))


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_t_as_scipy(alternative: Any) -> None:
    rng = np.random.default_rng(5)
    a, b, c = rng.normal(0.3, 1, 6), rng.normal(0, 1, 6), rng.normal(0, 3, 4)
    for paired, other, want in (
        (True, b, scipy.stats.ttest_rel(a, b, alternative=alternative)),
        (False, c, scipy.stats.ttest_ind(a, c, equal_var=False, alternative=alternative)),
    ):
        gain = fn.transfer_gain(a, other, paired=paired, method="t", alternative=alternative, confidence=0.9)
        interval = want.confidence_interval(0.9)
        assert (gain.low, gain.high, gain.p_value) == pytest.approx((interval.low, interval.high, want.pvalue))
    # of seeds and examples, the seeds' means
    x, y = rng.normal(size=(2, 5, 30))
    both, means = fn.transfer_gain(x, y, method="t"), fn.transfer_gain(x.mean(1), y.mean(1), method="t")
    assert (both.low, both.high, both.p_value) == pytest.approx((means.low, means.high, means.p_value))
    assert math.isnan(fn.transfer_gain([0.5], [0.4], method="t").low)
    same = fn.transfer_gain([0.6, 0.7], [0.5, 0.6], method="t")
    assert same.low == pytest.approx(0.1) and same.high == pytest.approx(0.1)


def test_wrong_scores() -> None:
    a = [0.0, 1.0, 1.0]
    for call, match in (
        (
            lambda: fn.transfer_gain(a, a[:2]),
            r"transfer_gain: scratch has shape \(2,\), and transfer \(3,\); .* same shape",
        ),
        (lambda: fn.transfer_gain([a], [a[:2]], paired=False), "expected the same examples"),
        (lambda: fn.transfer_gain([], []), r"transfer has shape \(0,\); expected \[n\] or \[seeds, n\]"),
        (lambda: fn.negative_transfer_gap([math.nan], [1.0]), "negative_transfer_gap: transfer has NaN"),
        (lambda: fn.transfer_gain(a, a, confidence=95), "confidence is 95; expected between 0 and 1"),
        (lambda: fn.transfer_gain(a, a, alternative="both"), "alternative is 'both'"),
        (lambda: fn.transfer_gain(a, a, method="z"), "method is 'z'; expected 'bootstrap' or 't'"),
        (lambda: fn.transfer_gain(a, a, resamples=0), "resamples is 0; expected at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scipy.stats", "sklearn.model_selection", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    for call, package in (
        (lambda: fn.transfer_gain([1.0, 2.0], [1.0, 1.0], method="t"), "scipy"),
        (lambda: fn.proxy_a_distance(np.ones((9, 2)), np.ones((9, 2))), "scikit-learn"),
        (lambda: fn.CKAMatrix(torch.ones(1, 1), ("a",), ("b",)).plot(), "matplotlib"),
    ):
        with pytest.raises(ImportError, match=f"pip install {package}"):
            call()


# ---- CKA ------------------------------------------------------------------------------------------------------------


def cka_formula(x: Array, y: Array) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def hsic_formula(k: Array, el: Array) -> float:
    """Song 2012, equation 5."""
    n, one = len(k), np.ones(len(k))
    k, el = k - np.diag(np.diag(k)), el - np.diag(np.diag(el))
    total = np.trace(k @ el) + (one @ k @ one) * (one @ el @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (one @ k @ el @ one)) / (n * (n - 3))


def features(n: int, p: int, q: int, seed: int = 0) -> tuple[Array, Array]:
    """Two representations, of which some directions agree, with offsets."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, 3))
    return tuple(  # type: ignore[return-value]
        shared @ rng.normal(size=(3, d)) + rng.normal(size=(n, d)) + 5 * rng.normal(size=d) for d in (p, q)
    )


@pytest.mark.parametrize(("n", "p", "q"), [(50, 4, 7), (8, 30, 20), (4, 1, 1), (2, 3, 3)])
@pytest.mark.parametrize("form", ["auto", "features", "gram"])
def test_cka(n: int, p: int, q: int, form: Any) -> None:
    x, y = features(n, p, q)
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    assert float(fn.linear_cka(tx, ty, form=form)) == pytest.approx(cka_formula(x, y), rel=1e-12)
    single = fn.linear_cka(tx.float(), ty.float(), form=form)
    assert single.dtype == torch.float32 and float(single) == pytest.approx(cka_formula(x, y), rel=1e-5)
    assert float(fn.linear_cka(tx, tx, form=form)) == pytest.approx(1, rel=1e-12)
    if n >= 4:
        k, el = x @ x.T, y @ y.T
        want = hsic_formula(k, el) / math.sqrt(hsic_formula(k, k) * hsic_formula(el, el))
        assert float(fn.linear_cka(tx, ty, unbiased=True)) == pytest.approx(want, rel=1e-9)


def test_cka_invariances() -> None:
    x, y = (torch.from_numpy(v) for v in features(40, 6, 5))
    want = fn.linear_cka(x, y)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    for other in (x @ rotation, x * 1e-3, x * -7, x + torch.randn(6) * 100, x[:, [3, 1, 0, 5, 4, 2]]):
        torch.testing.assert_close(fn.linear_cka(other, y), want)
        torch.testing.assert_close(fn.linear_cka(y, other), want)
    stretched = x * torch.tensor([1.0, 10, 1, 1, 1, 1])
    assert abs(fn.linear_cka(stretched, y) - want) > 0.01  # not under every linear map
    assert fn.linear_cka(x, y) < 0.999
    assert torch.isnan(fn.linear_cka(torch.ones(9, 3), torch.randn(9, 2)))


@pytest.mark.parametrize("form", ["features", "gram"])
def test_cka_of_large_numbers(form: Any) -> None:
    x, y = features(60, 5, 4)
    want = cka_formula(x, y)
    # an offset of 1e6: exact but for what the rounding of the input to float32 took
    far = (torch.from_numpy(x) + 1e6).float()
    rounded = cka_formula(far.double().numpy(), y)
    assert float(fn.linear_cka(far, torch.from_numpy(y).float(), form=form)) == pytest.approx(rounded, rel=2e-5)
    double = fn.linear_cka(far, torch.from_numpy(y).float(), form=form, dtype=torch.float64)
    assert double.dtype == torch.float64 and float(double) == pytest.approx(rounded, rel=1e-6)
    # the fourth power of 1e20 or 1e-20 is no float32
    for scale in (1e20, 1e-20):
        out = fn.linear_cka((torch.from_numpy(x) * scale).float(), torch.from_numpy(y).float(), form=form)
        assert float(out) == pytest.approx(want, rel=1e-5)
    half = fn.linear_cka(torch.from_numpy(x).bfloat16(), torch.from_numpy(y).bfloat16(), form=form)
    assert half.dtype == torch.float32 and float(half) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("options", [{"form": "features"}, {"form": "gram"}, {"unbiased": True}])
def test_cka_gradient(options: dict[str, Any]) -> None:
    x, y = (torch.from_numpy(v).requires_grad_() for v in features(7, 3, 2))
    assert torch.autograd.gradcheck(lambda x, y: 3 * fn.linear_cka(x, y, **options), (x, y))


def test_wrong_cka() -> None:
    x = torch.randn(5, 3)
    for call, error, match in (
        (
            lambda: fn.linear_cka(x.int(), x),
            TypeError,
            "linear_cka: x is a torch.int32; expected a floating-point tensor",
        ),
        (lambda: fn.linear_cka(x, x[0]), ValueError, r"y has shape \(3,\); expected \[examples, features\]"),
        (
            lambda: fn.linear_cka(x, x[:4]),
            ValueError,
            "representations of 5 and 4 examples; expected the same examples",
        ),
        (lambda: fn.linear_cka(x[:3], x[:3], unbiased=True), ValueError, "3 examples; expected at least 4"),
        (lambda: fn.linear_cka(x, x, form="kernel"), ValueError, "form is 'kernel'; expected 'auto'"),
        (lambda: fn.linear_cka(x, x, dtype=torch.float16), TypeError, "expected torch.float32 or torch.float64"),
        (lambda: fn.MinibatchCKA(1, 0), ValueError, "x_layers and y_layers are 1 and 0"),
        (lambda: fn.MinibatchCKA(1, 2).update([x], [x]), ValueError, "got 1 and 1 representations; expected 1 and 2"),
        (lambda: fn.MinibatchCKA(1, 1).update([x], [x[:4]]), ValueError, "representations of 5 and 4 examples"),
    ):
        with pytest.raises(error, match=match):
            call()


def test_minibatch_cka() -> None:
    x, y = features(600, 8, 6)
    z = np.random.default_rng(9).normal(size=(600, 5))
    # sums over minibatches, of unequal size, of the formula
    cuts = [100, 250, 254]
    sums = np.zeros((3, 3))
    cka = fn.MinibatchCKA(3, 3)
    for parts in zip(*(np.split(v, cuts) for v in (x, y, z)), strict=True):
        grams = [v @ v.T for v in parts]
        sums += [[hsic_formula(k, el) for el in grams] for k in grams]
        cka.update([torch.from_numpy(v).float() for v in parts], [torch.from_numpy(v).float() for v in parts])
    want = sums / np.sqrt(np.outer(np.diag(sums), np.diag(sums)))
    np.testing.assert_allclose(cka.compute(), want, atol=1e-5)
    # an offset is not seen, by float32 either
    near, far = (fn.MinibatchCKA(1, 1) for _ in range(2))
    tx, ty = (torch.from_numpy(v).float() for v in (x, y))
    near.update([(tx + 1e5) - 1e5], [ty])
    far.update([tx + 1e5], [ty])
    torch.testing.assert_close(near.compute(), far.compute(), rtol=1e-5, atol=0)
    # independent features have nothing in common, however few the examples: the biased estimator says otherwise
    rng = np.random.default_rng(10)
    cka, biased = fn.MinibatchCKA(1, 1), []
    for _ in range(200):
        a, b = (torch.from_numpy(rng.normal(size=(8, 40))) for _ in range(2))
        cka.update([a], [b])
        biased.append(float(fn.linear_cka(a, b)))
    assert abs(float(cka.compute())) < 0.03 and np.mean(biased) > 0.5


def network(seed: int, *, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Dropout(dropout), nn.Tanh(), nn.Linear(9, 4))


def test_cka_matrix() -> None:
    a, b = network(0, dropout=0.5), network(1)
    batches = [torch.randn(20, 6) for _ in range(3)]
    out = fn.cka_matrix(a, b, batches, layers_b=["3", "0"])
    assert out.layers_a == ("0", "1", "2", "3") and out.layers_b == ("3", "0") and out.values.shape == (4, 2)
    assert a.training and not any(m._forward_hooks for m in (*a.modules(), *b.modules()))
    cka = fn.MinibatchCKA(1, 1)
    for x in batches:
        cka.update([torch.tanh(a[0](x))], [b(x)])
    torch.testing.assert_close(out.values[2, 0], cka.compute()[0, 0])
    # in eval mode dropout is the identity; and a tuple or mapping is as good as a tensor
    torch.testing.assert_close(out.values[0], out.values[1])
    for other in ([(x, 0) for x in batches], [{"input": x} for x in batches]):
        torch.testing.assert_close(fn.cka_matrix(a, b, other, layers_b=["3", "0"]).values, out.values)
    own = fn.cka_matrix(a, None, batches)
    torch.testing.assert_close(own.values.diagonal(), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(own.values, own.values.T)
    torch.testing.assert_close(own.values[0, 2], fn.cka_matrix(a, a, batches).values[0, 2])

    ax = out.plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "2", "3"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["3", "0"]
    np.testing.assert_array_equal(ax.images[0].get_array(), out.values)


def test_wrong_cka_matrix() -> None:
    a, x = network(0), torch.randn(8, 6)
    for call, match in (
        (lambda: fn.cka_matrix(a, None, [x], layers_a=["4"]), "layers_a has '4', which the model has not"),
        (lambda: fn.cka_matrix(a, None, [x[:3]]), "3 examples; expected at least 4"),
        (lambda: fn.cka_matrix(a, None, []), "batches is empty"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    idle = nn.Sequential(nn.Linear(6, 2))
    idle.spare = nn.Linear(2, 2)
    idle.forward = idle[0].forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"layers_a has \['spare'\], which gave no features"):
        fn.cka_matrix(idle, None, [x], layers_a=["spare"])
    assert a.training and idle.training


# ---- domains --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(3000, 3000), (4500, 1500)])
def test_proxy_a_distance(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for gap in (0.0, 1.0, 2.5):  # of two normal distributions the best classifier errs with probability Phi(-gap / 2)
        source, target = rng.normal(size=(sizes[0], 4)), rng.normal(size=(sizes[1], 4))
        target[:, 0] += gap
        found = fn.proxy_a_distance(torch.from_numpy(source).float(), target)
        assert found.distance == pytest.approx(2 * (1 - 2 * scipy.stats.norm.cdf(-gap / 2)), abs=0.06)
        assert found.distance == max(0, 2 * (1 - 2 * found.error)) and len(found.fold_errors) == 5
        assert np.mean(found.fold_errors) == pytest.approx(found.error, abs=1e-3)
    assert fn.proxy_a_distance(source, source[: sizes[1]] + 100).distance == 2


def test_proxy_a_distance_is_cross_validated() -> None:
    # more features than examples separate any two samples, and mean nothing
    x = np.random.default_rng(1).normal(size=(80, 200))
    assert LogisticRegression().fit(x, np.arange(80) < 40).score(x, np.arange(80) < 40) == 1
    assert fn.proxy_a_distance(x[:40], x[40:]).distance < 0.5
    tree = fn.proxy_a_distance(x[:40], x[40:], classifier=DecisionTreeClassifier(max_depth=2, random_state=0), folds=4)
    assert len(tree.fold_errors) == 4 and tree.distance < 0.8


def test_joint_error_and_bound() -> None:
    rng = np.random.default_rng(2)
    xs, xt = rng.normal(size=(600, 2)), rng.normal(size=(200, 2))
    ys, yt = (x[:, 0] > 0 for x in (xs, xt))
    assert fn.ideal_joint_error(xs, ys, xt, yt) < 0.06
    # labels that contradict each other: no classifier is right on both, and both domains count the same
    assert fn.ideal_joint_error(xs, ys, torch.from_numpy(xt), torch.from_numpy(~yt)) == pytest.approx(1, abs=0.1)
    # 30 % of the source and 80 % of the target are alike and labelled apart: the better choice loses the 30 %, though
    # more of the examples there are the source's
    cell, other = np.repeat([[1.0], [0.0]], [300, 700], axis=0), np.repeat([[1.0], [0.0]], [80, 20], axis=0)
    tree = DecisionTreeClassifier(max_depth=1)
    assert fn.ideal_joint_error(cell, np.zeros(1000), other, other[:, 0], classifier=tree) == pytest.approx(0.3)
    bound = fn.ben_david_bound(0.1, 0.4, joint_error=0.05, vc_dim=3, unlabelled=10_000, delta=0.1)
    complexity = 4 * math.sqrt((6 * math.log(20_000) + math.log(20)) / 10_000)
    assert bound.complexity == pytest.approx(complexity) and bound.bound == pytest.approx(0.1 + 0.2 + 0.05 + complexity)
    assert fn.ben_david_bound(0.1, 0.4).bound == pytest.approx(0.3)
    assert f"{bound.bound:.4f}" in str(bound)


def test_wrong_domains() -> None:
    x = np.zeros((6, 2))
    for call, match in (
        (lambda: fn.proxy_a_distance(x, x[:, :1]), "target has 1 features; expected 2"),
        (lambda: fn.proxy_a_distance(x[0], x), r"source has shape \(2,\); expected \[examples, features\]"),
        (lambda: fn.proxy_a_distance(x, x * math.nan), "target has NaN"),
        (lambda: fn.proxy_a_distance(x, x[:3]), "folds is 5; expected 2 to 3"),
        (lambda: fn.ideal_joint_error(x, [0] * 5, x, [0] * 6), r"source_labels has shape \(5,\); expected \(6,\)"),
        (lambda: fn.ben_david_bound(1.2, 0), "source_error is 1.2; expected 0 to 1"),
        (lambda: fn.ben_david_bound(0.2, 2.1), "divergence is 2.1; expected 0 to 2"),
        (lambda: fn.ben_david_bound(0.2, 1, vc_dim=3), "vc_dim is 3 and unlabelled is None; expected both or neither"),
        (lambda: fn.ben_david_bound(0.2, 1, delta=0), "delta is 0; expected between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# ---- experiments on digits ------------------------------------------------------------------------------------------


class Convolutional(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU())
        self.head = nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x)).flatten(1))


Data = tuple[Tensor, Tensor]


def fit(model: nn.Module, data: Data, steps: int = 15) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()


def right(model: nn.Module, data: Data) -> Tensor:
    model.eval()
    with torch.no_grad():
        return (model(data[0]).argmax(1) == data[1]).float()


@pytest.fixture(scope="module")
def digits() -> dict[str, Data]:
    """Source: 900 digits. Target: digits that are inverted and darker, 30 to train on and 500 to test."""
    x, y = (torch.from_numpy(v) for v in load_digits(return_X_y=True))
    x = x.float().view(-1, 1, 8, 8) / 16
    other = 0.8 - 0.6 * x
    return {"source": (x[:900], y[:900]), "target": (other[900:930], y[900:930]), "test": (other[1297:], y[1297:])}


def test_baselines(digits: dict[str, Data]) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].sum(), random.getstate()
    starts: list[Tensor] = []

    def build() -> nn.Module:
        model = Convolutional()
        starts.append(model.head.weight.detach().clone())
        return model

    found = fn.baselines(
        build, fit, lambda m: right(m, digits["test"]), digits["source"], digits["target"], seeds=[3, 8]
    )
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].sum()
    assert before[2] == random.getstate()
    # each seed builds twice, the same model; another seed builds another
    assert len(starts) == 4 and torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])
    assert {arm: scores.shape for arm, scores in found.scores.items()} == dict.fromkeys(
        ("source only", "fine-tuned", "target only"), (2, 500)
    )
    means = {arm: scores.mean() for arm, scores in found.scores.items()}
    assert means["fine-tuned"] > means["target only"] + 0.05 and means["fine-tuned"] > means["source only"] + 0.2

    gain = found.transfer_gain()
    assert gain.value == pytest.approx(means["fine-tuned"] - means["target only"]) and gain.method == "bootstrap"
    rows = {row["method"]: row for row in found.table()}
    assert rows["fine-tuned"]["mean"] == pytest.approx(means["fine-tuned"]) and rows["fine-tuned"]["seeds"] == 2
    assert all(row["low"] < row["mean"] < row["high"] for row in rows.values())
    assert "fine-tuned" in str(found) and f"{gain.value:+.4f}" in str(found)
    ax = found.plot()
    assert [t.get_text() for t in ax.get_xticklabels()] == list(found.scores)
    with pytest.raises(ValueError, match="arm is 'joint'; expected one of"):
        found.interval("joint")


def test_baselines_by_hand() -> None:
    # a model is a number; training adds to it, so every score is known
    def build() -> nn.Module:
        model = nn.Module()
        model.register_buffer("value", torch.randint(0, 100, ()).double())
        return model

    def train(model: Any, amount: float) -> None:
        model.value += amount + torch.rand(())

    heads = []

    def prepare(model: nn.Module) -> None:
        heads.append(float(model.value))

    def fine_tune(model: Any, amount: float) -> nn.Module:
        tuned = copy.deepcopy(model)
        tuned.value += 10 * amount
        return tuned

    found = fn.baselines(build, train, lambda m: float(m.value), 1000, 5, seeds=3, prepare=prepare, fine_tune=fine_tune)
    for i, seed in enumerate((0, 1, 2)):
        start = float(torch.randint(0, 100, (), generator=torch.Generator().manual_seed(seed)))
        noise = float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
        got = {arm: scores[i] for arm, scores in found.scores.items()}
        want = {
            "source only": start + 1000 + noise,
            "fine-tuned": start + 1050 + noise,
            "target only": start + 5 + noise,
        }
        assert got == pytest.approx(want) and heads[i] == pytest.approx(want["source only"])
    interval = found.interval("target only")
    low, high = scipy.stats.t.interval(
        0.95, 2, *scipy.stats.describe(found.scores["target only"])[2:3], interval.standard_error
    )
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert found.transfer_gain().value == pytest.approx(1045) and found.transfer_gain().method == "t"
    single = fn.baselines(build, train, lambda m: 0.5, 1, 1, seeds=1)
    assert math.isnan(single.table()[0]["low"]) and single.plot() is not None


def test_wrong_experiments() -> None:
    ok = Convolutional
    for call, error, match in (
        (lambda: fn.baselines(lambda: 3, fit, id, 0, 0), TypeError, "baselines: build returned a int"),
        (
            lambda: fn.baselines(ok, lambda m, d: 1.0, id, 0, 0),
            TypeError,
            "train returned a float; expected None, or the",
        ),
        (lambda: fn.baselines(ok, lambda m, d: None, lambda m: math.nan, 0, 0), ValueError, "evaluate returned nan"),
        (lambda: fn.baselines(ok, lambda m, d: None, lambda m: np.ones((2, 2)), 0, 0), ValueError, "(2, 2) scores"),
        (lambda: fn.baselines(ok, fit, id, 0, 0, seeds=0), ValueError, "seeds is 0; expected a number >= 1"),
    ):
        with pytest.raises(error, match=match.replace("(", r"\(").replace(")", r"\)")):
            call()


# ---- layer transfer -------------------------------------------------------------------------------------------------


def test_layer_transfer_curve(digits: dict[str, Data]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        source = Convolutional(classes=10)
        fit(source, (digits["target"][0].new_tensor(0.8) - 0.6 * digits["source"][0], digits["source"][1]), 40)
    states: list[dict[str, Tensor]] = []

    def train(model: nn.Module) -> None:
        frozen = sum(not p.requires_grad for p in model.parameters())
        fit(model, digits["target"])
        states.append({"frozen": torch.tensor(frozen), **{k: v.clone() for k, v in model.state_dict().items()}})

    before = copy.deepcopy(source.state_dict())
    curve = fn.layer_transfer_curve(
        Convolutional, train, lambda m: float(right(m, digits["test"]).mean()), source, seeds=2
    )
    assert curve.ks == (0, 1, 2) and curve.groups == (("one",), ("two",))  # the head is no group
    assert {arm: s.shape for arm, s in curve.scores.items()} == dict.fromkeys(("BnB", "BnB+", "AnB", "AnB+"), (2, 3))
    means = {arm: scores.mean(0) for arm, scores in curve.scores.items()}
    # k = 0 is the same model in all arms; copied layers of a good source beat what 30 examples teach
    assert len({float(m[0]) for m in means.values()}) == 1
    assert means["AnB"][2] > means["BnB"][0] + 0.1 and means["AnB+"][2] > means["BnB+"][2] + 0.1
    # 1 + 4 x 2 trainings of each of 2 seeds; layers were frozen where they should have been, batch norm's too
    assert [int(s["frozen"]) for s in states[:9]] == [0, 4, 8, 0, 0, 4, 8, 0, 0]
    for state, donor, frozen in ((states[2], states[0], True), (states[6], before, True), (states[8], before, False)):
        for key in ("one.0.weight", "two.1.running_var"):
            assert torch.equal(state[key], donor[key]) == frozen
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())

    ax = curve.plot()
    assert len(ax.get_legend().get_texts()) == 4
    np.testing.assert_allclose(ax.lines[0].get_ydata(), means["BnB"])


def test_layer_transfer_options() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))

    source = {k: torch.full_like(v, 7.0) for k, v in build().state_dict().items() if not k.startswith("2")}
    seen: list[float] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(float(sum((p == 7).all() for p in model.parameters())))
        return seen[-1]

    curve = fn.layer_transfer_curve(
        build,
        lambda m: None,
        evaluate,
        source,
        groups=["0.weight", ["0.bias", "1"]],
        ks=[2, 1],
        arms=["AnB"],
        seeds=[5],
    )
    assert curve.scores["AnB"].tolist() == [[4, 1]] and seen == [0, 4, 1]

    def stubborn(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1

    with pytest.raises(RuntimeError, match=r"train changed '0.weight', which is frozen"):
        fn.layer_transfer_curve(build, stubborn, evaluate, source, groups=["0"], arms=["AnB"])
    short = {**source, "0.weight": torch.ones(3, 2)}
    call: Callable[..., Any] = fn.layer_transfer_curve
    for options, given, match in (
        ({"groups": ["body"]}, source, "groups has 'body', which the model has not"),
        ({"groups": ["0", "2"]}, source, "source has no '2.weight'"),
        ({}, short, r"source has shape \(3, 2\) at '0.weight'; expected \(2, 2\)"),
        ({"ks": [3]}, source, "ks is \\[3\\]; expected numbers from 0 to 2"),
        ({"arms": ["A3B"]}, source, "arms is \\['A3B'\\]; expected some of"),
        ({"seeds": []}, source, "seeds is \\[\\]"),
    ):
        with pytest.raises(ValueError, match=match):
            call(build, lambda m: None, evaluate, given, **options)


# ---- ensemble, feature augmentation, TrAdaBoost ---------------------------------------------------------------------


def test_ensemble() -> None:
    a, b, x = network(0), network(1), torch.randn(12, 6)
    want = 0.25 * a(x).softmax(-1) + 0.75 * b(x).softmax(-1)
    ensemble = fn.ProbabilityEnsemble(a, b, weights=[1, 3])
    torch.testing.assert_close(ensemble(x).exp(), want)
    torch.testing.assert_close(ensemble(x).softmax(-1), want)
    torch.testing.assert_close(fn.ProbabilityEnsemble(a, b)(x).exp(), (a(x).softmax(-1) + b(x).softmax(-1)) / 2)
    # probabilities that are no float32: logits, and so the gradient, are right still
    far = torch.tensor([[0.0, -200.0]], dtype=torch.float64, requires_grad=True)
    pair = fn.ProbabilityEnsemble(nn.Identity(), nn.Identity()).double()
    torch.testing.assert_close(pair(far)[0, 1], torch.tensor(-200.0, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda z: pair(z) * torch.tensor([0.3, -2.0]), far)
    for args, weights, error, match in (
        ((), None, ValueError, "no models"),
        ((a, 3), None, TypeError, "model 1 is a int"),
        ((a, b), [1], ValueError, "expected 2 numbers >= 0"),
        ((a, b), [1, -1], ValueError, "expected 2 numbers >= 0"),
    ):
        with pytest.raises(error, match=match):
            fn.ProbabilityEnsemble(*args, weights=weights)


def test_ensemble_guards(digits: dict[str, Data]) -> None:
    torch.manual_seed(0)
    transfer, scratch = Convolutional(), Convolutional()
    fit(transfer, digits["source"], 20)
    fit(transfer, digits["target"], 8)
    fit(scratch, digits["target"], 25)
    alone = [float(right(m, digits["test"]).mean()) for m in (transfer, scratch)]
    assert float(right(fn.ProbabilityEnsemble(transfer, scratch), digits["test"]).mean()) > max(alone) - 0.03


def test_augment_features() -> None:
    x = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    want = np.array([[1, 2, 1, 2, 0, 0], [3, 4, 0, 0, 3, 4], [5, 6, 0, 0, 0, 0]], dtype=float)
    np.testing.assert_array_equal(fn.augment_features(x, [0, 1, -1]), want)
    out = fn.augment_features(torch.from_numpy(x).float(), torch.tensor([0, 1, -1]))
    assert out.dtype == torch.float32 and torch.equal(out, torch.from_numpy(want).float())
    np.testing.assert_array_equal(fn.augment_features(x, 2, 3)[:, [6, 7]], x)
    # the kernel of the paper: twice as near within a domain as across
    gram = fn.augment_features(x, [0, 0, 1]) @ fn.augment_features(x, [0, 0, 1]).T
    np.testing.assert_array_equal(gram, (x @ x.T) * np.array([[2, 2, 1], [2, 2, 1], [1, 1, 2]]))
    for call, match in (
        (lambda: fn.augment_features(x[0], 0), r"x has shape \(2,\); expected \[examples, features\]"),
        (lambda: fn.augment_features(x, [0, 1]), r"domain has shape \(2,\)"),
        (lambda: fn.augment_features(x, 2), "domain has 2; expected below domains = 2"),
        (lambda: fn.augment_features(x, [0.5, 1, 1]), "dtype float64; expected an integer"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def shifted_problem(seed: int, n: int, m: int) -> tuple[Array, Array, Array, Array]:
    """A source of which a fifth follows another rule, and a small target."""
    rng = np.random.default_rng(seed)
    xs, xt = rng.normal(size=(n, 2)), rng.normal(size=(m, 2))
    rule = np.array([1.0, 0.6])
    ys, yt = (xs @ rule > 0).astype(int), (xt @ rule > 0).astype(int)
    wrong = xs[:, 0] > 0.8
    ys[wrong] = 1 - ys[wrong]
    return xs, ys, xt, yt


def test_tradaboost_as_in_the_paper() -> None:
    xs, ys, xt, yt = shifted_problem(2, 60, 60)
    n, rounds = 60, 7
    x, y = np.concatenate([xs, xt]), np.concatenate([ys, yt])
    # the paper's figure 1, line by line
    w, beta = np.ones(120), 1 / (1 + math.sqrt(2 * math.log(n) / rounds))
    hypotheses, betas = [], []
    for _ in range(rounds):
        h = DecisionTreeClassifier(max_depth=1).fit(x, y, sample_weight=w / w.sum())
        loss = np.abs(h.predict(x) - y)
        error = min((w[n:] * loss[n:]).sum() / w[n:].sum(), 0.5)
        betas.append(error / (1 - error))
        hypotheses.append(h)
        w = np.concatenate([w[:n] * beta ** loss[:n], w[n:] * betas[-1] ** -loss[n:]])
    points = np.random.default_rng(1).normal(size=(400, 2))
    late = range(math.ceil(rounds / 2) - 1, rounds)
    product = np.prod([betas[t] ** -hypotheses[t].predict(points) for t in late], axis=0)
    want = (product >= np.prod([betas[t] ** -0.5 for t in late])).astype(int)

    boost = fn.TrAdaBoost(n_estimators=rounds).fit(xs, ys, xt, yt)
    errors = np.minimum(boost.errors_, 0.5)
    np.testing.assert_allclose(errors / (1 - errors), betas)
    assert 0 < errors.min() < errors.max() < 0.5
    np.testing.assert_allclose(boost.sample_weight_, w / w.sum())
    np.testing.assert_array_equal(boost.predict(points), want)
    assert 0 < want.mean() < 1 and boost.score(points, want) == 1
    assert boost.decision_function(points).shape == (400, 2)


def test_tradaboost_leaves_what_does_not_fit() -> None:
    xs, ys, xt, yt = shifted_problem(2, 400, 40)
    learner = DecisionTreeClassifier(max_depth=3, random_state=0)
    boost = fn.TrAdaBoost(learner, n_estimators=30).fit(xs, ys, xt, yt)
    points = np.random.default_rng(3).normal(size=(2000, 2))
    labels = (points @ np.array([1.0, 0.6]) > 0).astype(int)
    both = learner.fit(np.concatenate([xs, xt]), np.concatenate([ys, yt])).score(points, labels)
    assert boost.score(points, labels) > both + 0.1
    wrong = xs[:, 0] > 0.8
    weight = boost.sample_weight_[:400]
    assert np.median(weight[wrong]) < 0.01 * np.median(weight[~wrong])
    # labels of any kind
    names = np.array(["no", "yes"])
    named = fn.TrAdaBoost(learner, n_estimators=30).fit(xs, names[ys], xt, names[yt])
    np.testing.assert_array_equal(named.predict(points), names[boost.predict(points)])


def test_tradaboost_parameters() -> None:
    import sklearn.base

    boost = fn.TrAdaBoost(n_estimators=3)
    again = sklearn.base.clone(boost)
    assert again.n_estimators == 3 and again.set_params(n_estimators=4).n_estimators == 4
    xs, ys, xt, yt = shifted_problem(0, 30, 10)
    with pytest.raises(RuntimeError, match="TrAdaBoost: not fitted"):
        boost.predict(xs)
    for call, match in (
        (lambda: boost.set_params(depth=1), "no parameter 'depth'"),
        (lambda: boost.fit(xs, ys[:3], xt, yt), "source has shape .* with labels"),
        (lambda: boost.fit(xs, ys, xt[:, :1], yt), "target has 1 features; expected 2"),
        (lambda: fn.TrAdaBoost(n_estimators=0).fit(xs, ys, xt, yt), "n_estimators is 0"),
        (
            lambda: boost.fit(np.repeat(xs, 9, 0), 1 - np.repeat(xs[:, 0] > 0, 9), xt, xt[:, 0] > 0),
            "every voting round errs on half",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    # a target that the learner separates: an error of 0, and a vote that is finite
    easy = fn.TrAdaBoost(n_estimators=3).fit(xs, xs[:, 0] > 0, xt, xt[:, 0] > 0)
    assert np.isfinite(easy.decision_function(xt)).all() and easy.score(xt, xt[:, 0] > 0) == 1
