"""Merging of models, and of task tensors, against PEFT, torch, closed forms and least squares."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import merge_utils as peft
from torch import Tensor, nn

import tlkernels
from tlkernels.methods.finetune import merging

State = dict[str, Tensor]


def task_tensors(
    count: int = 3, shape: tuple[int, ...] = (7, 5, 3), dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Of different magnitudes, bfloat16 too: which of equal ones are trimmed is left open."""
    generator = torch.Generator().manual_seed(count)
    numel = math.prod(shape)
    assert numel < 256
    magnitudes = [torch.randperm(numel, generator=generator).view(shape) + 1 for _ in range(count)]
    signs = [torch.randint(0, 2, shape, generator=generator) * 2 - 1 for _ in range(count)]
    return [(m * s / 64).to(dtype) for m, s in zip(magnitudes, signs, strict=True)]


class Net(nn.Module):
    """Linear layers, batch norm with its counter, and a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4, bias=False)
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.second(torch.relu(self.norm(self.first(x))))


def nets(count: int, dtype: torch.dtype = torch.float32) -> list[Net]:
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = Net()
        model(torch.randn(9, 6))  # moves the running statistics, and the counter
        models.append(model.to(dtype))
    return models


def floats(state: State) -> dict[str, np.ndarray[Any, Any]]:
    return {key: value.double().numpy() for key, value in state.items() if value.is_floating_point()}


def assert_state(out: State, want: dict[str, Any], **tolerance: float) -> None:
    got = floats(out)
    assert got.keys() == want.keys()
    for key in want:
        np.testing.assert_allclose(got[key], want[key], err_msg=key, **(tolerance or {"rtol": 1e-6, "atol": 1e-6}))


# ---- task tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, 0.1, 0.55, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_as_peft(density: float, dtype: torch.dtype) -> None:
    tensors, weights = task_tensors(4, dtype=dtype), torch.tensor([0.7, -0.2, 1.3, 0.5])
    # PEFT computes in the tensors' dtype; ours is float32, rounded once
    wide = [t if dtype == torch.float64 else t.float() for t in tensors]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that density 1 prunes nothing
        pairs = [
            (merging.task_arithmetic(tensors, weights), peft.task_arithmetic(wide, weights)),
            (merging.magnitude_prune(tensors, weights, density), peft.magnitude_prune(wide, weights, density)),
            (merging.ties(tensors, weights, density), peft.ties(wide, weights, density)),
            (
                merging.ties(tensors, weights, density, "frequency"),
                peft.ties(wide, weights, density, majority_sign_method="frequency"),
            ),
        ]
    for ours, theirs in pairs:
        assert ours.dtype == dtype and ours.shape == tensors[0].shape
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=1e-6 if dtype != torch.bfloat16 else 0.01, atol=1e-6)
    assert pairs[0][0].abs().min() > 0 and (density in (0.0, 1.0) or (pairs[2][0] == 0).any())


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.9])
def test_dare_as_peft(method: Any, density: float) -> None:
    tensors, weights = task_tensors(3), [0.5, 1.0, -2.0]
    for ours, theirs, args in (
        (merging.dare_linear, peft.dare_linear, ()),
        (merging.dare_ties, peft.dare_ties, (method,)),
    ):
        torch.manual_seed(5)
        want = theirs(tensors, torch.tensor(weights), density, *args)
        torch.manual_seed(5)
        torch.testing.assert_close(ours(tensors, weights, density, *args), want, rtol=1e-6, atol=1e-6)
        # the same from a generator, which leaves torch's own alone
        before = torch.get_rng_state()
        drawn = ours(tensors, weights, density, *args, generator=torch.Generator().manual_seed(5))
        assert torch.equal(before, torch.get_rng_state())
        torch.testing.assert_close(drawn, want, rtol=1e-6, atol=1e-6)


def test_dare_keeps_the_mean() -> None:
    tensors, generator = task_tensors(2, (40,)), torch.Generator().manual_seed(0)
    draws = torch.stack([merging.dare_linear(tensors, 0.5, 0.25, generator) for _ in range(4000)])
    mean = merging.task_arithmetic(tensors, 0.5)
    # an element's variance is (1 - d) / d * sum (w tau)^2
    error = (3 * sum((0.5 * t) ** 2 for t in tensors) / 4000).sqrt()
    assert ((draws.mean(0) - mean).abs() < 4.5 * error).all()
    one = merging.dare_linear(tensors[:1], 1.0, 0.25, generator)
    kept = one != 0
    assert 0 < kept.sum() < 40
    torch.testing.assert_close(one[kept], tensors[0][kept] * 4)


def test_ties_by_hand() -> None:
    a = torch.tensor([5.0, -4.0, 0.1, 3.0, -2.0, 0.2])
    b = torch.tensor([-6.0, -2.0, 4.0, 0.1, 0.3, -1.0])
    # the three largest of each: a keeps 5, -4, 3; b keeps -6, -2, 4. Sums: -1, -6, 4, 3, 0, 0
    want = torch.tensor([-6.0, -3.0, 4.0, 3.0, 0.0, 0.0])
    assert torch.equal(merging.ties([a, b], 1.0, 0.5), want)
    # weights scale the values and elect nothing: -6 * 3; (-4 - 2 * 3) / 2; 4 * 3; 3
    assert torch.equal(merging.ties([a, b], [1.0, 3.0], 0.5), torch.tensor([-18.0, -5.0, 12.0, 3.0, 0.0, 0.0]))
    # by number, the first element is a draw, which counts as positive
    assert merging.ties([a, b], 1.0, 0.5, "frequency")[0] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "wide", "equal", "special"])
def test_trimming(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, generator=generator, dtype=dtype)
    if kind == "wide":  # from subnormal to infinite
        x = x * 10 ** (torch.rand(3000, generator=generator, dtype=dtype) * 90 - 46)
    elif kind == "equal":
        x = torch.where(x > 0, torch.ones(()).to(dtype), -torch.ones(()).to(dtype))
    elif kind == "special":
        x[:5], x[5:9], x[9:2000] = math.inf, -math.inf, 0.0
    for density in (0.0, 0.0004, 0.001, 0.2, 0.5, 0.9999):
        k = int(density * 3000)
        kept = merging._largest(x, density)
        assert kept.sum() == k
        # the magnitudes that were kept are the k largest, whichever of equal ones they are
        assert torch.equal(x[kept].abs().sort(descending=True).values, x.abs().sort(descending=True).values[:k])


def test_gradients_of_task_tensors() -> None:
    tensors = [t.double().requires_grad_() for t in task_tensors(3, (6, 2))]
    weights = torch.tensor([0.3, 1.0, -0.4], dtype=torch.float64, requires_grad=True)
    for function in (
        lambda w, *t: merging.task_arithmetic(t, w),
        lambda w, *t: merging.ties(t, w, 0.5),
        lambda w, *t: merging.dare_linear(t, w, 0.5, torch.Generator().manual_seed(1)),
    ):
        assert torch.autograd.gradcheck(function, (weights, *tensors))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda t: merging.ties([], 1.0, 0.5), ValueError, "ties: tensors is empty; expected one tensor per task"),
        (lambda t: merging.ties([t[0], t[1][:3]], 1.0, 0.5), ValueError, r"ties: tensors\[1\] has shape \(3, 5, 3\)"),
        (lambda t: merging.ties([t[0], t[1].long()]), TypeError, r"tensors\[1\] has dtype int64; expected floating"),
        (lambda t: merging.ties(t, [1.0, 2.0], 0.5), ValueError, "ties: weights has 2 entries; expected 3"),
        (lambda t: merging.ties(t, torch.ones(2), 0.5), ValueError, r"weights has shape \(2,\); expected \(3,\)"),
        (lambda t: merging.ties(t, math.nan, 0.5), ValueError, "expected finite numbers"),
        (lambda t: merging.magnitude_prune(t, 1.0, 1.2), ValueError, "density is 1.2; expected 0 to 1"),
        (lambda t: merging.dare_linear(t, 1.0, 0.0), ValueError, "density is 0.0; expected above 0 and up to 1"),
        (lambda t: merging.dare_ties(t, 1.0, 0.5, "mean"), ValueError, "'mean'; expected 'total' or 'frequency'"),
    ],
)
def test_wrong_task_tensors(call: Callable[[list[Tensor]], Tensor], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(task_tensors(3))


# ---- averages -------------------------------------------------------------------------------------------------------


def test_wise_ft() -> None:
    a, b = nets(2)
    start, end = a.state_dict(), b.state_dict()
    assert all(torch.equal(merging.wise_ft(a, b, 0.0)[k], v) for k, v in start.items() if v.is_floating_point())
    assert all(torch.equal(merging.wise_ft(a, b, 1.0)[k], v) for k, v in end.items() if v.is_floating_point())
    x, y = floats(start), floats(end)
    assert_state(merging.wise_ft(start, end, 0.3), {k: 0.7 * x[k] + 0.3 * y[k] for k in x})
    with pytest.raises(ValueError, match=r"wise_ft: alpha is 1\.1; expected 0 to 1"):
        merging.wise_ft(a, b, 1.1)


def test_soup_as_averaged_model() -> None:
    models = nets(4)
    averaged = torch.optim.swa_utils.AveragedModel(models[0], use_buffers=True)
    for model in models:
        averaged.update_parameters(model)
    assert_state(merging.model_soup(models), floats(averaged.module.state_dict()))
    values = [floats(m.state_dict()) for m in models]
    want = {k: (1 * values[0][k] + 3 * values[2][k]) / 4 for k in values[0]}
    assert_state(merging.model_soup(models, [1, 0, 3, 0]), want)
    for bad in ([1, -1, 1, 1], [0, 0, 0, 0]):
        with pytest.raises(ValueError, match="expected numbers >= 0 that are not all 0"):
            merging.model_soup(models, bad)


def test_greedy_soup() -> None:
    # the score of a model is how near to 10 its value is
    values = [4.0, 13.0, 8.0, 40.0, 9.5]
    seen: list[float] = []

    def evaluate(state: State) -> float:
        seen.append(float(state["w"]))
        state["w"].fill_(math.nan)  # it may do what it wants with what it gets
        return -abs(seen[-1] - 10)

    models = [{"w": torch.tensor(v)} for v in values]
    soup = merging.greedy_soup(models, evaluate)
    # from 9.5: with 8 it would be 8.75, worse; with 13 it is 11.25, worse; with 4, worse; with 40, worse
    assert soup.ingredients == (4,) and soup.score == -0.5 and soup.scores == (-6, -3, -2, -30, -0.5)
    assert seen == [*values, 8.75, 11.25, 6.75, 24.75]

    # alone 10.8, 12 and 8; 10.8 with 8 is 9.4 (better), and with 12 then 10.2666 (better)
    soup = merging.greedy_soup([{"w": torch.tensor(v)} for v in (8.0, 12.0, 10.8)], lambda s: -abs(float(s["w"]) - 10))
    assert soup.ingredients == (2, 0, 1) and soup.score == pytest.approx(-0.8 / 3, abs=1e-5)
    torch.testing.assert_close(soup.state["w"], torch.tensor(30.8 / 3))
    # a model that changes nothing joins
    assert merging.greedy_soup([models[0], models[0]], lambda s: float(s["w"])).ingredients == (0, 1)
    with pytest.raises(ValueError, match="evaluate returned NaN"):
        merging.greedy_soup(models, lambda state: math.nan)
    with pytest.raises(ValueError, match="models is empty"):
        merging.greedy_soup([], evaluate)


def test_slerp() -> None:
    def on_circle(angle: float) -> Tensor:
        return torch.tensor([math.cos(angle), math.sin(angle)])

    for end in (0.001, 0.7, 2.0, 3.1):  # the point at the share t of the angle, whatever it is
        for t in (0.0, 0.25, 1.0):
            out = merging.merge_slerp({"w": on_circle(0.3)}, {"w": on_circle(0.3 + end)}, t)["w"]
            torch.testing.assert_close(out, on_circle(0.3 + t * end), atol=2e-6, rtol=0)
    # the sine rule where lengths differ; straight where there is no great circle
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    torch.testing.assert_close(merging.merge_slerp({"w": a}, {"w": b})["w"], (a + b) * math.sqrt(0.5))
    for a, b in ((torch.ones(3), 3 * torch.ones(3)), (torch.zeros(3), torch.ones(3)), (torch.ones(3), -torch.ones(3))):
        torch.testing.assert_close(merging.merge_slerp({"w": a}, {"w": b}, 0.25)["w"], 0.75 * a + 0.25 * b)
    with pytest.raises(ValueError, match="merge_slerp: t is -1; expected 0 to 1"):
        merging.merge_slerp({"w": a}, {"w": b}, -1)


# ---- task vectors ---------------------------------------------------------------------------------------------------


def test_task_vectors() -> None:
    base, a, b = nets(3)
    x, y, z = (floats(m.state_dict()) for m in (base, a, b))
    vector = merging.task_vector(base, a)
    assert "norm.num_batches_tracked" not in vector and all(v.dtype == torch.float32 for v in vector.values())
    assert_state(vector, {k: y[k] - x[k] for k in x})
    want = {k: x[k] + 0.4 * (y[k] - x[k]) - 1.5 * (z[k] - x[k]) for k in x}
    assert_state(merging.merge_task_vectors(base, [a, b], [0.4, -1.5]), want)
    assert_state(merging.merge_task_vectors(base, [a], 1.0), y)
    assert_state(merging.merge_task_vectors(base, [a], -1.0), {k: 2 * x[k] - y[k] for k in x})


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("bucket", [2**24, 10])
def test_merge_ties(method: Any, bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_BUCKET", bucket)
    base, *tuned = nets(4)
    weights = torch.tensor([1.0, 0.5, 2.0])
    vectors = [merging.task_vector(base, model) for model in tuned]
    # of the whole model: PEFT on the task vectors laid end to end
    flat = peft.ties([torch.cat([t.flatten() for t in v.values()]) for v in vectors], weights, 0.3, method)
    start = floats(base.state_dict())
    parts = flat.split([v.numel() for v in vectors[0].values()])
    want = {k: start[k] + 0.7 * p.double().numpy().reshape(start[k].shape) for k, p in zip(start, parts, strict=True)}
    options: dict[str, Any] = {"weights": weights, "scaling": 0.7, "majority_sign_method": method}
    assert_state(merging.merge_ties(base, tuned, 0.3, **options), want)
    want = {
        k: start[k] + 0.7 * peft.ties([v[k] for v in vectors], weights, 0.3, method).double().numpy() for k in start
    }
    assert_state(merging.merge_ties(base, tuned, 0.3, trim="tensor", **options), want)
    # nothing is trimmed in either way
    whole = floats(merging.merge_ties(base, tuned, 1.0, **options))
    assert_state(merging.merge_ties(base, tuned, 1.0, trim="tensor", **options), whole)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_merge_dare(method: Any) -> None:
    base, a, b = nets(3)
    x, vectors = floats(base.state_dict()), [merging.task_vector(base, model) for model in (a, b)]
    torch.manual_seed(3)
    merge = peft.dare_linear if method == "linear" else peft.dare_ties
    want = {k: x[k] + 2 * merge([v[k] for v in vectors], torch.tensor([0.5, 1.0]), 0.4).double().numpy() for k in x}
    generator = torch.Generator().manual_seed(3)
    options: dict[str, Any] = {"weights": [0.5, 1.0], "scaling": 2.0, "method": method, "generator": generator}
    assert_state(merging.merge_dare(base, [a, b], 0.4, **options), want)


def test_wrong_options() -> None:
    a, b = nets(2)
    for call, match in (
        (lambda: merging.merge_ties(a, [b], trim="layer"), "merge_ties: trim is 'layer'; expected 'model' or 'tensor'"),
        (lambda: merging.merge_ties(a, [b], 2.0), "merge_ties: density is 2.0; expected 0 to 1"),
        (lambda: merging.merge_ties(a, [b], scaling=math.inf), "scaling is inf; expected a finite number"),
        (lambda: merging.merge_ties(a, []), "merge_ties: finetuned is empty"),
        (lambda: merging.merge_dare(a, [b], 0), "density is 0; expected above 0"),
        (lambda: merging.merge_dare(a, [b], method="magnitude"), "method is 'magnitude'; expected 'linear' or 'ties'"),
        (lambda: merging.merge_task_vectors(a, [b], [1, 2]), "weights has 2 entries; expected 1"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# ---- Fisher ---------------------------------------------------------------------------------------------------------


def test_fisher() -> None:
    models = nets(3)
    rng = np.random.default_rng(0)
    keys = [k for k, _ in models[0].named_parameters() if k != "scale"]
    fishers = [
        {k: torch.from_numpy(rng.exponential(1e-6, models[0].state_dict()[k].shape)) for k in keys} for _ in models
    ]
    shares, values = [0.2, 1.0, 0.7], [floats(m.state_dict()) for m in models]
    want = {}
    for k in values[0]:
        f = [lam * (np.maximum(g[k].numpy(), 1e-6) if k in g else 1) for lam, g in zip(shares, fishers, strict=True)]
        want[k] = sum(fi * v[k] for fi, v in zip(f, values, strict=True)) / sum(f)
    assert_state(merging.merge_fisher(models, fishers, weights=shares), want)
    # Fisher values far apart, near the ends of float32, take nothing from the model that they point to
    sure = [{k: torch.full_like(v, scale) for k, v in fishers[0].items()} for scale in (1e30, 1e37, 1e-37)]
    out = floats(merging.merge_fisher(models, sure))
    for k in keys:
        np.testing.assert_allclose(out[k], values[1][k], rtol=2e-6, atol=2e-6)


def test_fisher_is_exact_where_laplace_is() -> None:
    # orthogonal designs: the posterior of least squares is a Gaussian with diagonal precision X'X
    rng = np.random.default_rng(1)
    data = []
    for n in (30, 50):
        x = np.linalg.qr(rng.normal(size=(n, 5)))[0] * rng.uniform(0.5, 3, 5)
        data.append((x, rng.normal(size=n)))
    models = [{"w": torch.from_numpy(np.linalg.lstsq(x, y)[0])} for x, y in data]
    fishers = [{"w": torch.from_numpy(np.diag(x.T @ x).copy())} for x, _ in data]
    together = np.linalg.lstsq(np.concatenate([x for x, _ in data]), np.concatenate([y for _, y in data]))[0]
    np.testing.assert_allclose(merging.merge_fisher(models, fishers)["w"], together, rtol=1e-12)


def test_wrong_fisher() -> None:
    a, b = ({"w": torch.ones(2, 3), "n": torch.tensor(1)} for _ in range(2))
    good = {"w": torch.ones(2, 3)}
    for fishers, match in (
        ([good], "fishers has 1 entries; expected 2, one per model"),
        ([good, {}], r"fishers\[1\] has no 'w', which others have"),
        ([good, {**good, "v": torch.ones(1)}], "fishers has 'v', which is no floating-point entry"),
        ([{"n": torch.ones(())}] * 2, "fishers has 'n', which is no floating-point entry"),
        ([good, {"w": torch.ones(3)}], r"fishers\[1\]\['w'\] has shape \(3,\); expected \(2, 3\)"),
        ([good, {"w": -torch.ones(2, 3)}], "negative values or NaN"),
        ([good, {"w": torch.full((2, 3), math.nan)}], "negative values or NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            merging.merge_fisher([a, b], fishers)
    with pytest.raises(ValueError, match="floor is 0; expected a finite number above 0"):
        merging.merge_fisher([a, b], [good, good], floor=0)


# ---- RegMean --------------------------------------------------------------------------------------------------------


def linear_tasks(seed: int = 0) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Inputs of unequal size, scale and correlation, and targets."""
    rng = np.random.default_rng(seed)
    tasks = []
    for n, scale in ((40, 1.0), (70, 30.0), (25, 0.1)):
        x = rng.normal(size=(n, 6)) @ rng.normal(size=(6, 6)) * scale
        tasks.append((x, rng.normal(size=(n, 4)) * scale))
    return tasks


def test_regmean_is_least_squares() -> None:
    tasks = linear_tasks()
    models = [{"layer.weight": torch.from_numpy(np.linalg.lstsq(x, y)[0].T)} for x, y in tasks]
    grams = [{"layer.weight": torch.from_numpy(x.T @ x)} for x, _ in tasks]
    out = merging.merge_regmean(models, grams, alpha=1.0)["layer.weight"]
    together = np.linalg.lstsq(np.concatenate([x for x, _ in tasks]), np.concatenate([y for _, y in tasks]))[0]
    np.testing.assert_allclose(out, together.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_regmean_formula(alpha: float) -> None:
    rng = np.random.default_rng(2)
    weights = [rng.normal(size=(4, 6)) for _ in range(3)]
    grams = [x.T @ x for x, _ in linear_tasks()]
    shrunk = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in grams]
    want = np.linalg.inv(sum(shrunk)) @ sum(g @ w.T for g, w in zip(shrunk, weights, strict=True))
    models = [{"w": torch.from_numpy(w)} for w in weights]
    out = merging.merge_regmean(models, [{"w": torch.from_numpy(g)} for g in grams], alpha=alpha)["w"]
    np.testing.assert_allclose(out, want.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_regmean_of_too_little_data(alpha: float) -> None:
    # fewer rows than features, and a feature that is always zero
    rng = np.random.default_rng(3)
    xs = [rng.normal(size=(2, 8)) for _ in range(2)]
    for x in xs:
        x[:, 3] = 0
    weights = [rng.normal(size=(3, 8)) for _ in range(2)]
    models = [{"w": torch.from_numpy(w)} for w in weights]
    out = merging.merge_regmean(models, [{"w": torch.from_numpy(x.T @ x)} for x in xs], alpha=alpha)["w"].numpy()
    mean = (weights[0] + weights[1]) / 2
    np.testing.assert_array_equal(out[:, 3], mean[:, 3])
    assert np.abs(out).max() < 10
    if alpha == 1:  # four rows, seven features: both models' outputs can be had exactly
        for x, w in zip(xs, weights, strict=True):
            np.testing.assert_allclose(x @ out.T, x @ w.T, atol=1e-10)


def test_input_grams() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.9), nn.ReLU(), nn.Linear(6, 3))
    model[1].eval()  # a mode of its own, which must be found as it was
    batches = [torch.randn(4, 7, 5), torch.randn(2, 7, 5)]
    rows = torch.cat([b.flatten(0, 1) for b in batches])
    hidden = torch.relu(model[0](rows)).detach()
    for given in (batches, [(b, torch.zeros(1)) for b in batches], [{"input": b} for b in batches]):
        grams = merging.input_grams(model, given)
        assert list(grams) == ["0.weight", "3.weight"]
        torch.testing.assert_close(grams["0.weight"], rows.T @ rows)
        torch.testing.assert_close(grams["3.weight"], hidden.T @ hidden)
    assert model.training and model[0].training and not model[1].training
    assert not any(m._forward_hooks for m in model.modules())
    mean = merging.input_grams(model, batches, layers=["3"], normalize=True)
    torch.testing.assert_close(mean, {"3.weight": hidden.T @ hidden / 42})
    double = merging.input_grams(copy.deepcopy(model).double(), [b.double() for b in batches])
    torch.testing.assert_close(double["0.weight"], rows.double().T @ rows.double())
    half = merging.input_grams(model.bfloat16(), [b.bfloat16() for b in batches])
    assert half["0.weight"].dtype == torch.float32
    torch.testing.assert_close(half["0.weight"], rows.bfloat16().float().T @ rows.bfloat16().float())


def test_wrong_regmean() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU())
    with pytest.raises(ValueError, match="layers has 'head', which the model does not"):
        merging.input_grams(model, [], layers=["head"])
    with pytest.raises(TypeError, match="layer '1' is a ReLU; expected a Linear"):
        merging.input_grams(model, [], layers=["1"])
    with pytest.raises(ValueError, match=r"layers \['0'\] were never called"):
        merging.input_grams(model, [], layers=["0"])
    gram = {"0.weight": torch.eye(5)}
    for grams, alpha, match in (
        ([gram, gram], 1.5, "alpha is 1.5; expected 0 to 1"),
        ([gram, {}], 0.9, r"grams\[1\] has no '0.weight'"),
        ([gram, {"0.weight": torch.eye(6)}], 0.9, r"has shape \(6, 6\); expected \[in_features, in_features\]"),
        ([gram, {"0.weight": torch.full((5, 5), math.inf)}], 0.9, "has NaN or infinite values"),
        ([{"0.weight": 2 - torch.eye(5)}] * 2, 0.9, "a matrix at '0.weight' with negative eigenvalues"),
        ([{"0.bias": torch.eye(6)}] * 2, 0.9, r"grams\[0\]\['0.bias'\] has shape \(6, 6\)"),
    ):
        with pytest.raises(ValueError, match=match):
            merging.merge_regmean([model, model], grams, alpha=alpha)


# ---- the rules of all ---------------------------------------------------------------------------------------------

Merge = Callable[[Any, Any], State]
MERGES: dict[str, Merge] = {
    "wise_ft": lambda a, b: merging.wise_ft(a, b, 0.25),
    "model_soup": lambda a, b: merging.model_soup([a, b]),
    "merge_slerp": merging.merge_slerp,
    "merge_task_vectors": lambda a, b: merging.merge_task_vectors(a, [b], 0.5),
    "merge_ties": lambda a, b: merging.merge_ties(a, [b, b]),
    "merge_dare": lambda a, b: merging.merge_dare(a, [b], generator=torch.Generator().manual_seed(0)),
    "merge_fisher": lambda a, b: merging.merge_fisher([a, b], [{}, {}]),
    "merge_regmean": lambda a, b: merging.merge_regmean([a, b], [{"second.weight": torch.eye(8)}] * 2),
}


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rules(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = nets(2, dtype)
    with torch.no_grad():
        b.norm.num_batches_tracked += 7
    before = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    out = MERGES[name](a, b)
    # the inputs as they were, the outputs of the first model's dtypes and memory of their own, in the model's order
    owned = {t.data_ptr() for m in (a, b) for t in m.state_dict().values()}
    assert list(out) == list(before[0])
    for key, value in out.items():
        assert value.dtype == before[0][key].dtype and value.shape == before[0][key].shape, key
        assert not value.requires_grad and value.data_ptr() not in owned, key
        for model, state in zip((a, b), before, strict=True):
            assert torch.equal(model.state_dict()[key], state[key]), key
    assert out["norm.num_batches_tracked"] == 1
    Net().to(dtype).load_state_dict(out)
    # float32 arithmetic, rounded once; buckets change nothing
    monkeypatch.setattr(merging, "_BUCKET", 10)

    def widened(state: State) -> State:
        return {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in state.items()}

    wide = MERGES[name](*map(widened, before))
    for key, value in out.items():
        assert torch.equal(value, wide[key].to(value.dtype)), key


@pytest.mark.parametrize("name", MERGES)
def test_wrong_models(name: str) -> None:
    a = nets(1)[0].state_dict()
    without = {k: v for k, v in a.items() if k != "second.weight"}
    for b, error, match in (
        (without, ValueError, "has no 'second.weight', which .* has"),
        ({**a, "more": torch.ones(1)}, ValueError, "has 'more', which .* has not"),
        ({**a, "first.bias": torch.ones(9)}, ValueError, r"has shape \(9,\) at 'first.bias'; expected \(8,\)"),
        ({**a, "first.bias": torch.ones(8).int()}, TypeError, "has dtype int32 at 'first.bias'; .* has float32"),
        ({**a, "first.bias": [1.0]}, TypeError, "has a list at 'first.bias'; expected tensors"),
        ({**a, "first.bias": torch.ones(8) * 1j}, TypeError, "complex64 at 'first.bias'; expected real"),
        (3, TypeError, "is a int; expected a model"),
    ):
        with pytest.raises(error, match=f"{name}: .*{match}"):
            MERGES[name](a, b)


def test_integers() -> None:
    a = {"w": torch.ones(2), "mask": torch.tensor([True, False]), "steps": torch.tensor(3)}
    b = {"w": torch.zeros(2), "mask": torch.tensor([True, False]), "steps": torch.tensor(9)}
    out = merging.model_soup([a, b])
    assert torch.equal(out["mask"], a["mask"]) and out["mask"] is not a["mask"] and out["steps"] == 3
    with pytest.raises(ValueError, match=r"model_soup: 'mask' is bool and differs .* integers cannot be averaged"):
        merging.model_soup([a, {**b, "mask": torch.tensor([True, True])}])


def test_quantized_models_are_not_merged() -> None:
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(tlkernels.quantize_model(nn.Sequential(nn.Linear(64, 64)), skip=(), double_quant=False))
    with pytest.raises(ValueError, match=r"'0.weight' is uint8 and differs .*dequantize quantized weights first"):
        merging.model_soup(models)


# ---- on data --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> dict[str, Any]:
    """A start trained a little on all digits, and two models tuned from it, on 0 to 4 and on 5 to 9 only."""
    from sklearn.datasets import load_digits

    x, y = (torch.from_numpy(v) for v in load_digits(return_X_y=True))
    x = x.float() / 16 - 0.3
    train, test = slice(0, 1200), slice(1200, None)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model

    fit(base, x[:300], y[:300], 15)
    halves = [(x[train][own], y[train][own]) for own in (y[train] < 5, y[train] >= 5)]
    tuned = [fit(copy.deepcopy(base), *half, 40) for half in halves]

    def accuracy(state: Any, classes: slice = slice(0, 10)) -> float:
        model = copy.deepcopy(base)
        model.load_state_dict(state if isinstance(state, dict) else state.state_dict())
        own = (y[test] >= classes.start) & (y[test] < classes.stop)
        with torch.no_grad():
            return float((model(x[test][own]).argmax(1) == y[test][own]).float().mean())

    return {"base": base, "tuned": tuned, "halves": halves, "accuracy": accuracy}


def test_digits(digits: dict[str, Any]) -> None:
    base, tuned, accuracy = digits["base"], digits["tuned"], digits["accuracy"]
    apart = max(accuracy(model) for model in tuned)
    grams = [merging.input_grams(model, [x]) for model, (x, _) in zip(tuned, digits["halves"], strict=True)]
    merged = {
        "soup": accuracy(merging.model_soup(tuned)),
        "ties": accuracy(merging.merge_ties(base, tuned, 0.5)),
        "task vectors": accuracy(merging.merge_task_vectors(base, tuned, 0.7)),
        "dare": accuracy(merging.merge_dare(base, tuned, 0.7, weights=0.7, generator=torch.Generator().manual_seed(0))),
        "regmean": accuracy(merging.merge_regmean(tuned, grams)),
    }
    assert apart < 0.6  # each alone has forgotten the other's digits
    assert min(merged.values()) > apart + 0.15
    assert merged["regmean"] > merged["soup"]
    # forgetting by negation: the digits that were taken away go, the others stay
    negated = merging.merge_task_vectors(base, tuned[:1], -0.3)
    few, many = slice(0, 5), slice(5, 10)
    assert accuracy(negated, few) < accuracy(base, few) - 0.3 and accuracy(negated, many) > accuracy(base, many) - 0.05


def test_greedy_soup_on_digits(digits: dict[str, Any]) -> None:
    models = [digits["base"], *digits["tuned"]]
    soup = merging.greedy_soup(models, digits["accuracy"])
    assert soup.score >= max(soup.scores) and soup.score == digits["accuracy"](soup.state)
    assert_state(soup.state, floats(merging.model_soup([models[i] for i in soup.ingredients])))
