"""Weights from a Gram matrix: conditions of optimality, closed forms, scipy, and torchjd's aggregators."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tlkernels.ops import _gram_solvers as solvers
from tlkernels.ops._gram_solvers import (
    agem_coefficient,
    aligned_weights,
    cagrad_weights,
    config_weights,
    dualproj_weights,
    fairgrad_weights,
    gem_weights,
    gradvac_weights,
    imtl_g_weights,
    mgda_weights,
    nash_weights,
    pcgrad_weights,
    upgrad_weights,
)

Array = np.ndarray
ALL: dict[str, Callable[..., Any]] = {
    name: getattr(solvers, name) for name in solvers.__all__ if name not in ("agem_coefficient", "gem_weights")
}


def weights_of(name: str, gram: Tensor, **options: Any) -> Tensor:
    """A function's weights; orders are fixed for those that draw some."""
    if name in ("pcgrad_weights", "gradvac_weights"):
        options.setdefault("orders", [list(range(gram.shape[0]))] * gram.shape[0])
    out = ALL[name](gram, **options)
    return out[0] if isinstance(out, tuple) else out


def solve(function: Callable[..., Tensor], j: Array, *args: Any, **options: Any) -> tuple[Array, Array]:
    """Weights and direction for the gradients in the rows of `j`."""
    w = function(torch.from_numpy(j @ j.T), *args, **options).numpy()
    return w, w @ j


def randn(*shape: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def lengths(j: Array) -> Array:
    return np.linalg.norm(j, axis=1)


def sweep(count: int, seed: int, *, tasks: int = 9, spread: float = 3.0, zeros: bool = True) -> Iterator[Array]:
    """Gradients of 1 to `tasks` tasks: independent ones and dependent, alike, opposite, zero, short and long ones."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        t = int(rng.integers(1, tasks + 1))
        j = rng.standard_normal((t, int(rng.integers(1, 12)) if rng.random() < 0.5 else 40))
        if rng.random() < 0.3:
            j += 2 * rng.standard_normal(j.shape[1])
        if rng.random() < 0.3:
            j *= 10 ** rng.uniform(-spread, spread, (t, 1))
        if t > 1 and rng.random() < 0.2:
            j[1] = j[0] * rng.uniform(0.1, 3)
        if t > 1 and rng.random() < 0.2:
            j[-1] = -j[0] * rng.uniform(0.1, 3)
        if zeros and rng.random() < 0.1:
            j[rng.integers(t)] = 0
        yield j * 10 ** rng.uniform(-3, 3)


def recorded(count: int = 12, *, full_rank: bool = True) -> list[Array]:
    rng = np.random.default_rng(11)
    shapes = [(int(rng.integers(2, 9)), 20 if full_rank else int(rng.integers(1, 5))) for _ in range(count)]
    return [rng.standard_normal(s) * rng.uniform(0.3, 3, (s[0], 1)) for s in shapes]


# ---- MGDA -----------------------------------------------------------------------------------------------------------


def test_mgda_of_two_tasks() -> None:
    """The closed form for two: where the segment is nearest to zero."""
    for seed in range(30):
        j = randn(2, 3, seed=seed) * [[1.0], [10.0 ** (seed % 5 - 2)]]
        a, b = j
        first = np.clip((b - a) @ b / ((a - b) @ (a - b)), 0, 1)
        np.testing.assert_allclose(solve(mgda_weights, j)[0], [first, 1 - first], rtol=1e-10, atol=1e-13)


def test_mgda_is_the_shortest_vector_of_the_hull() -> None:
    for j in sweep(400, 0):
        w, d = solve(mgda_weights, j)
        n = lengths(j).max()
        assert w.min() >= 0 and abs(w.sum() - 1) < 1e-13
        # <g_t, d> >= |d|^2, or in numbers: what cancels to d is of length n
        assert (d @ d - (j @ d).min()) <= 1e-8 * n * np.linalg.norm(d) + 1e-14 * n * n
        assert (w * (j @ d - d @ d)).max() <= 1e-8 * n * np.linalg.norm(d) + 1e-14 * n * n


def hull_by_enumeration(j: Array) -> float:
    """Length of the shortest vector, over the affine hulls of all subsets whose nearest point is inside."""
    best = np.inf
    for size in range(1, len(j) + 1):
        for members in itertools.combinations(range(len(j)), size):
            k = j[list(members)]
            kkt = np.block([[k @ k.T, np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            w = np.linalg.lstsq(kkt, np.r_[np.zeros(size), 1.0], rcond=None)[0][:size]
            if w.min() >= -1e-9 and abs(w.sum() - 1) < 1e-6:
                best = min(best, float(np.linalg.norm(np.maximum(w, 0) / np.maximum(w, 0).sum() @ k)))
    return best


def test_mgda_against_enumeration() -> None:
    for j in sweep(60, 1, tasks=5, spread=1.0):
        found, n = np.linalg.norm(solve(mgda_weights, j)[1]), lengths(j).max()
        assert abs(found - hull_by_enumeration(j)) <= 1e-7 * n


def test_mgda_gives_zero_gradients_the_weight() -> None:
    j = randn(4, 5, seed=0)
    j[[1, 3]] = 0
    np.testing.assert_array_equal(solve(mgda_weights, j)[0], [0, 0.5, 0, 0.5])
    assert mgda_weights(torch.zeros(3, 3)).tolist() == [pytest.approx(1 / 3)] * 3


# ---- projections on the dual cone ---------------------------------------------------------------------------------


def cone_by_enumeration(j: Array, u: Array) -> Array:
    """The projection of u'J on {d: Jd >= 0}: the shortest of those with some constraints tight that are in it."""
    target, best, found = u @ j, np.inf, np.zeros(j.shape[1])
    for size in range(len(j) + 1):
        for tight in itertools.combinations(range(len(j)), size):
            k = j[list(tight)]
            d = target - np.linalg.pinv(k) @ (k @ target) if size else target
            away = float(np.linalg.norm(d - target))
            if (j @ d >= -1e-9 * lengths(j) * np.linalg.norm(target)).all() and away < best:
                best, found = away, d
    return found


def test_dualproj_against_enumeration() -> None:
    for j in sweep(60, 2, tasks=5, spread=1.0):
        u = np.random.default_rng(len(j)).uniform(0, 1, len(j))
        d = solve(dualproj_weights, j, u.tolist())[1]
        assert np.linalg.norm(d - cone_by_enumeration(j, u)) <= 1e-7 * (u * lengths(j)).sum()


def test_dualproj_fulfils_the_conditions_of_the_minimum() -> None:
    for j in sweep(400, 3):
        w, d = solve(dualproj_weights, j)
        n = lengths(j)
        size = (w * n).sum()
        assert (w >= 1 / len(j) - 1e-15).all()
        assert (j @ d >= -1e-13 * n * size).all()  # feasible: no conflict
        assert (np.abs((w - 1 / len(j)) * (j @ d)) <= 1e-13 * size * size).all()  # tight where raised


def test_upgrad_conflicts_with_no_task() -> None:
    for j in sweep(400, 4):
        w, d = solve(upgrad_weights, j)
        assert (w >= 1 / len(j) - 1e-15).all()
        assert (j @ d >= -1e-13 * lengths(j) * (w * lengths(j)).sum()).all()


def test_upgrad_is_the_preferred_sum_of_projected_gradients() -> None:
    for j in sweep(40, 5, tasks=5, spread=1.0):
        u = np.random.default_rng(len(j)).uniform(0, 1, len(j))
        expected = sum(x * cone_by_enumeration(j, e) for x, e in zip(u, np.eye(len(j)), strict=True))
        d = solve(upgrad_weights, j, torch.from_numpy(u))[1]
        assert np.linalg.norm(d - expected) <= 1e-7 * (u * lengths(j)).sum()


@pytest.mark.parametrize("function", [upgrad_weights, dualproj_weights])
def test_without_conflict_nothing_is_projected(function: Callable[..., Tensor]) -> None:
    j = np.abs(randn(6, 9, seed=1))
    np.testing.assert_allclose(solve(function, j)[0], np.full(6, 1 / 6), rtol=1e-15)
    u = [0.1, 0.0, 2.0, 0.3, 0.0, 0.5]
    np.testing.assert_allclose(solve(function, j, u)[0], u, rtol=1e-14)


@pytest.mark.parametrize("function", [upgrad_weights, dualproj_weights])
def test_opposite_tasks_cancel(function: Callable[..., Tensor]) -> None:
    g = randn(7, seed=2)
    w, d = solve(function, np.stack([g, -2 * g]))
    assert np.abs(d).max() < 1e-15 and (w >= 0.5).all()
    w, d = solve(function, np.stack([g, 0 * g, -g]), [0.2, 0.7, 0.5])
    assert w[1] == 0.7 and np.abs(d).max() < 1e-15


def test_upgrad_does_not_drown_short_gradients() -> None:
    """Lengths 1e-9 and 1e6: the direction agrees with the short task to all digits."""
    j = randn(5, 30, seed=3) - 0.5 * randn(1, 30, seed=4)
    j /= lengths(j)[:, None]
    scale = np.array([1e-9, 1e6, 1.0, 1e3, 1e-4])[:, None]
    _, d = solve(upgrad_weights, j * scale)
    assert ((j @ d) / np.linalg.norm(d)).min() > -1e-14


def test_quadratic_programs_scale_to_64_tasks() -> None:
    for rank in (32, 64, 200):
        j = randn(64, rank, seed=rank)
        for function in (upgrad_weights, dualproj_weights):
            w, d = solve(function, j)
            assert ((j @ d) / lengths(j)).min() > -1e-12 * (w * lengths(j)).sum()
        w, d = solve(mgda_weights, j)
        assert (j @ d).min() >= d @ d - 1e-11


# ---- GEM and A-GEM --------------------------------------------------------------------------------------------------


def test_gem_projects_on_the_memories() -> None:
    for j in sweep(200, 6, tasks=6, spread=1.0):
        g = randn(j.shape[1], seed=len(j)) * lengths(j).max()
        v = gem_weights(torch.from_numpy(j @ j.T), torch.from_numpy(j @ g)).numpy()
        new = g + v @ j
        size = np.linalg.norm(g) + (v * lengths(j)).sum()
        assert v.min() >= 0 and (j @ new >= -1e-12 * lengths(j) * size).all()
        assert np.abs(v * (j @ new)).max() <= 1e-12 * size * size


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_gem_against_quadprog(margin: float) -> None:
    quadprog = pytest.importorskip("quadprog")
    for seed in range(20):
        j, g = randn(5, 12, seed=seed), randn(12, seed=100 + seed)
        gram, products = j @ j.T, j @ g
        expected = quadprog.solve_qp(gram, -products, np.eye(5), np.full(5, margin))[0]
        found = gem_weights(torch.from_numpy(gram), torch.from_numpy(products), margin).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_gem_without_conflict_adds_the_margin() -> None:
    gram = torch.eye(3, dtype=torch.float64)
    assert gem_weights(gram, torch.tensor([1.0, 0.0, 2.0])).tolist() == [0, 0, 0]
    assert gem_weights(gram, torch.tensor([1.0, 0.0, 2.0]), 0.5).tolist() == [0.5] * 3
    assert gem_weights(torch.zeros(2, 2), torch.zeros(2), 0.5).tolist() == [0.5] * 2
    assert gem_weights(gram, torch.tensor([-3.0, 1.0, -0.25]), 0.5).tolist() == [3, 0.5, 0.5]


def test_gem_of_one_memory_is_agem() -> None:
    for seed in range(10):
        g, r = randn(2, 6, seed=seed)
        c = agem_coefficient(float(g @ r), float(r @ r))
        assert c == pytest.approx(max(0.0, -(g @ r) / (r @ r)), rel=1e-14)
        assert (g + c * r) @ r >= -1e-14 and isinstance(c, float)
        v = gem_weights(torch.tensor([[r @ r]]), torch.tensor([g @ r]))
        assert v.item() == pytest.approx(c, rel=1e-14)


def test_agem_of_nothing() -> None:
    assert agem_coefficient(torch.tensor(2.0), torch.tensor([4.0])) == 0.0
    assert agem_coefficient(torch.tensor(-2.0, requires_grad=True), 4) == 0.5
    assert agem_coefficient(-1.0, 0.0) == 0.0


# ---- CAGrad ---------------------------------------------------------------------------------------------------------


def cagrad_dual(j: Array, c: float, w: Array) -> float:
    mean = j.mean(0)
    return float(w @ j @ mean + c * np.linalg.norm(mean) * np.linalg.norm(w @ j))


@pytest.mark.parametrize("c", [0.05, 0.4, 1.0, 2.0])
def test_cagrad_closes_the_duality_gap(c: float) -> None:
    """The worst task's gain is the dual's minimum, so both are optimal; and the ball is kept."""
    for j in sweep(250, 7, spread=1.5):
        w, d = solve(cagrad_weights, j, c)
        mean, n = j.mean(0), lengths(j).max()
        radius = c * np.linalg.norm(mean)
        step = w - 1 / len(j)
        assert step.min() >= -1e-15 * w.max()
        away = np.linalg.norm(d - mean)
        assert away <= radius * (1 + 1e-6) + 1e-12 * n
        inner = away < radius * (1 - 1e-6)  # a Pareto-stationary point: the best gain is 0
        dual = 0.0 if inner or step.sum() <= 0 else cagrad_dual(j, c, step / step.sum())
        # both sides scale with |g||g_0|; near stationary points digits of g_w cancel
        assert -1e-6 <= (dual - (j @ d).min()) / (n * np.linalg.norm(mean) + 1e-12 * n * n + 1e-300) <= 1e-6


def test_cagrad_against_scipy() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    for j in recorded(10):
        t = len(j)
        result = optimize.minimize(
            lambda w, j=j: cagrad_dual(j, 0.4, w), np.full(t, 1 / t), bounds=[(0, 1)] * t, tol=1e-13,
            constraints={"type": "eq", "fun": lambda w: 1 - w.sum()}, options={"maxiter": 1000},
        )  # fmt: skip
        w, d = solve(cagrad_weights, j, 0.4)
        ours = (w - 1 / t) / (w - 1 / t).sum()
        assert cagrad_dual(j, 0.4, ours) <= result.fun + 1e-13
        np.testing.assert_allclose(ours, result.x, atol=2e-5)
        theirs = j.mean(0) + 0.4 * np.linalg.norm(j.mean(0)) * (result.x @ j) / np.linalg.norm(result.x @ j)
        np.testing.assert_allclose(d, theirs, atol=1e-4)


def test_cagrad_serves_the_worst_task_better_than_the_mean() -> None:
    """And is not the degenerate problem, shortest g with g.g_t >= 0, whose answer is zero."""
    for j in recorded():
        _, d = solve(cagrad_weights, j, 0.4)
        assert (j @ d).min() > (j @ j.mean(0)).min()
        assert np.linalg.norm(d) >= 0.6 * np.linalg.norm(j.mean(0)) * (1 - 1e-12)


def test_cagrad_of_c_0_is_the_mean_and_rescale_divides() -> None:
    for j in sweep(20, 8):
        assert (solve(cagrad_weights, j, 0.0)[0] == 1 / len(j)).all()
        plain = solve(cagrad_weights, j, 0.5)[0]
        np.testing.assert_allclose(solve(cagrad_weights, j, 0.5, rescale=1)[0], plain / 1.25, rtol=1e-15)
        np.testing.assert_allclose(solve(cagrad_weights, j, 0.5, rescale=2)[0], plain / 1.5, rtol=1e-15)


def test_cagrad_of_trivial_tasks() -> None:
    g = randn(4, seed=0)
    np.testing.assert_allclose(solve(cagrad_weights, g[None], 0.4)[0], [1.4], rtol=1e-14)
    d = solve(cagrad_weights, np.stack([g, g, g]), 0.4)[1]  # alike: each way of sharing is optimal
    np.testing.assert_allclose(d, 1.4 * g, rtol=1e-13)
    assert solve(cagrad_weights, np.stack([g, -g]), 0.4)[0].tolist() == [0.5, 0.5]  # no mean, no ball
    assert cagrad_weights(torch.zeros(2, 2), 0.4).tolist() == [0.5, 0.5]
    # opposite tasks: the hull holds zero, the ball holds no direction that hurts neither; half way there is optimal
    _, d = solve(cagrad_weights, np.stack([g, -3 * g]), 0.5)
    np.testing.assert_allclose(d, -0.5 * g, rtol=1e-12)
    np.testing.assert_allclose(solve(cagrad_weights, np.stack([g, -3 * g]), 1.0)[1], 0 * g, atol=1e-15)
    # a task without a gradient: nothing better than 0 for it, and the others are not hurt
    j = np.stack([[1.0, 0.2], [-0.5, 1.0], [0.0, 0.0]])
    d = solve(cagrad_weights, j, 0.4)[1]
    assert (j @ d).min() == 0 and np.linalg.norm(d - j.mean(0)) <= 0.4 * np.linalg.norm(j.mean(0))


# ---- Nash-MTL and FairGrad ------------------------------------------------------------------------------------------


def stationary(j: Array) -> bool:
    """Whether the hull of the unit gradients comes near zero, where no bargain exists."""
    unit = j[lengths(j) > 0]
    return len(unit) == 0 or hull_length(unit / lengths(unit)[:, None]) < 1e-3


def hull_length(j: Array) -> float:
    return float(np.linalg.norm(solve(mgda_weights, j)[1]))


def test_nash_solves_its_equation() -> None:
    """G w = 1 / w to 1e-10, and the direction's length is the square root of the number of tasks."""
    tried = 0
    for j in sweep(300, 9, spread=4.0):
        if stationary(j):
            continue
        tried += 1
        w, d = solve(nash_weights, j)
        some = lengths(j) > 0
        assert (w[some] > 0).all() and (w[~some] == 0).all()
        np.testing.assert_allclose((j @ d)[some] * w[some], 1.0, rtol=0, atol=1e-10)
        assert np.linalg.norm(d) == pytest.approx(np.sqrt(some.sum()), rel=1e-10)
    assert tried > 150


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fairgrad_solves_its_equation(alpha: float) -> None:
    tried = 0
    for j in sweep(200, 10, spread=1.0):
        if stationary(j):
            continue
        tried += 1
        w, d = solve(fairgrad_weights, j, alpha)
        some = lengths(j) > 0
        assert (w[some] > 0).all() and (w[~some] == 0).all()
        np.testing.assert_allclose((j @ d)[some] * w[some] ** (1 / alpha), 1.0, rtol=0, atol=1e-7)
    assert tried > 100


def test_fairgrad_of_alpha_1_is_nash_and_of_little_alpha_the_sum() -> None:
    for j in recorded(6):
        gram = torch.from_numpy(j @ j.T)
        assert torch.equal(fairgrad_weights(gram, 1.0), nash_weights(gram))
    j = np.abs(randn(4, 10, seed=1))
    w, d = solve(fairgrad_weights, j, 0.05)
    np.testing.assert_allclose(w, (j @ d) ** -0.05, rtol=1e-12)
    np.testing.assert_allclose(w, np.ones(4), atol=0.2)


def test_nash_and_fairgrad_of_orthogonal_tasks() -> None:
    n = np.array([1e-6, 0.5, 3.0, 1e5])
    np.testing.assert_allclose(solve(nash_weights, np.diag(n))[0], 1 / n, rtol=1e-13)
    for alpha in (0.3, 2.0, 7.0):
        expected = n ** (-2 * alpha / (1 + alpha))
        np.testing.assert_allclose(solve(fairgrad_weights, np.diag(n), alpha)[0], expected, rtol=1e-12)
    assert nash_weights(torch.tensor([[4.0]])).item() == pytest.approx(0.5, rel=1e-14)


def test_nash_at_a_stationary_point_has_no_direction() -> None:
    g = randn(5, seed=0)
    for j in (np.stack([g, -3 * g]), np.stack([g, randn(5, seed=1), -2 * g]), np.eye(3)[[0, 0]] * [[1], [-1]]):
        for function in (nash_weights, fairgrad_weights):
            w, d = solve(function, j)
            assert w.min() >= 0 and w.sum() == pytest.approx(1) and np.abs(d).max() < 1e-14
    np.testing.assert_allclose(solve(nash_weights, np.stack([g, -3 * g]))[0], [0.75, 0.25], rtol=1e-13)
    assert nash_weights(torch.zeros(2, 2)).tolist() == [0, 0]


def test_nash_near_a_stationary_point() -> None:
    for angle in (1e-2, 1e-4, 1e-5):
        j = np.array([[1.0, angle], [-1.0, angle]])
        w, d = solve(nash_weights, j)
        np.testing.assert_allclose(w, 1 / (np.sqrt(2) * angle), rtol=1e-5)
        np.testing.assert_allclose(d, [0, np.sqrt(2)], rtol=1e-5, atol=1e-8)


# ---- IMTL-G, Aligned-MTL, ConFIG ------------------------------------------------------------------------------------


def test_imtl_g_has_equal_projections() -> None:
    for seed in range(30):
        j = randn(1 + seed % 7, 12, seed=seed) * 10 ** np.random.default_rng(seed).uniform(-5, 5, (1 + seed % 7, 1))
        w, d = solve(imtl_g_weights, j)
        assert w.sum() == pytest.approx(1, rel=1e-12)
        projections = j @ d / lengths(j)
        np.testing.assert_allclose(projections, projections[0], rtol=1e-9)


def test_imtl_g_of_dependent_tasks() -> None:
    g, h = randn(2, 5, seed=0)
    w, d = solve(imtl_g_weights, np.stack([g, 2 * g, h]))
    unit = np.stack([g, h]) / lengths(np.stack([g, h]))[:, None]
    assert w.sum() == pytest.approx(1) and (unit @ d)[0] == pytest.approx((unit @ d)[1])
    assert solve(imtl_g_weights, np.stack([g, -g]))[0].tolist() == [0, 0]
    assert imtl_g_weights(torch.zeros(3, 3)).tolist() == [0, 0, 0]
    assert solve(imtl_g_weights, np.stack([g, 0 * g]))[0].tolist() == [1, 0]


def test_aligned_gradients_have_equal_singular_values() -> None:
    j = randn(4, 9, seed=5)
    gram = torch.from_numpy(j @ j.T)
    for scale, pick in (
        ("min", np.min),
        ("median", lambda s: np.sort(s)[1]),
        ("rmse", lambda s: np.sqrt((s**2).mean())),
    ):
        aligned = np.stack([aligned_weights(gram, row, scale=scale).numpy() for row in np.eye(4)]) @ j
        np.testing.assert_allclose(np.linalg.svd(aligned)[1], pick(np.linalg.svd(j)[1]), rtol=1e-12)
        summed = aligned_weights(gram, scale=scale).numpy() @ j
        np.testing.assert_allclose(summed, aligned.mean(0), rtol=1e-12)


def test_aligned_of_trivial_tasks() -> None:
    g = randn(5, seed=0)
    np.testing.assert_allclose(solve(aligned_weights, g[None])[0], [1.0], rtol=1e-15)
    np.testing.assert_allclose(solve(aligned_weights, np.diag([2.0, 8.0]))[0], [0.5, 0.125], rtol=1e-14)
    assert aligned_weights(torch.zeros(2, 2), [0.3, 0.7]).tolist() == [0.3, 0.7]
    assert np.abs(solve(aligned_weights, np.stack([g, -g]))[1]).max() < 1e-15
    assert solve(aligned_weights, np.stack([g, 0 * g]))[0].tolist() == [pytest.approx(0.5), 0]


def test_config_has_equal_cosines_and_the_length_of_the_projections() -> None:
    for seed in range(20):
        j = randn(5, 12, seed=seed) * 10 ** np.random.default_rng(seed).uniform(-3, 3, (5, 1))
        p = np.random.default_rng(seed).uniform(0.2, 2, 5)
        for options in ((), (p.tolist(),)):
            _, d = solve(config_weights, j, *options)
            unit = d / np.linalg.norm(d)
            ratio = (j @ unit) / lengths(j) / (p if options else 1.0)
            np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
            assert np.linalg.norm(d) == pytest.approx((j @ unit).sum(), rel=1e-9)


def test_config_of_trivial_tasks() -> None:
    g = randn(5, seed=0)
    np.testing.assert_allclose(solve(config_weights, g[None])[0], [1.0], rtol=1e-14)
    assert solve(config_weights, np.stack([g, -2 * g]))[0].tolist() == [0, 0]
    np.testing.assert_allclose(solve(config_weights, np.stack([g, 0 * g, g]))[1], 2 * g, rtol=1e-13)
    assert config_weights(torch.zeros(2, 2)).tolist() == [0, 0]


# ---- PCGrad and GradVac ---------------------------------------------------------------------------------------------


def pcgrad_on_vectors(j: Array, orders: list[list[int]]) -> Array:
    total = np.zeros(j.shape[1])
    for i, order in enumerate(orders):
        g = j[i].copy()
        for k in order:
            if k != i and g @ j[k] < 0:
                g -= (g @ j[k]) / (j[k] @ j[k]) * j[k]
        total += g
    return total


def permutations(tasks: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(tasks).tolist() for _ in range(tasks)]


def test_pcgrad_is_the_algorithm_on_vectors() -> None:
    for k, j in enumerate(sweep(100, 12, spread=1.0)):
        orders = permutations(len(j), k)
        size = lengths(j).sum()
        _, d = solve(pcgrad_weights, j, orders=orders)
        assert np.abs(d - pcgrad_on_vectors(j, orders)).max() <= 1e-12 * size
        _, mean = solve(pcgrad_weights, j, orders=torch.tensor(orders), reduction="mean")
        assert np.abs(mean - d / len(j)).max() <= 1e-14 * size


def test_pcgrad_depends_on_the_order() -> None:
    j = np.array([[1.0, 0.0], [-1.0, 0.5], [-0.5, -1.0]])
    a = solve(pcgrad_weights, j, orders=[[1, 2, 0], [0, 2, 1], [0, 1, 2]])[1]
    b = solve(pcgrad_weights, j, orders=[[2, 1, 0], [2, 0, 1], [1, 0, 2]])[1]
    assert np.abs(a - b).max() > 0.1


def test_pcgrad_of_two_tasks_in_closed_form() -> None:
    a, b = np.array([2.0, 0.0]), np.array([-1.0, 1.0])
    # a loses its part along b, b its part along a
    np.testing.assert_allclose(solve(pcgrad_weights, np.stack([a, b]))[0], [1.5, 2.0], rtol=1e-15)
    assert solve(pcgrad_weights, np.stack([a, -b]))[0].tolist() == [1, 1]


def test_pcgrad_draws_orders_that_can_be_drawn_again() -> None:
    j = randn(6, 4, seed=0)
    gram = torch.from_numpy(j @ j.T)
    draw = [pcgrad_weights(gram, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    torch.manual_seed(0)
    assert torch.equal(pcgrad_weights(gram), draw[0])
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(6, generator=generator) for _ in range(6)])
    assert torch.equal(pcgrad_weights(gram, orders=orders), draw[0])


@pytest.mark.parametrize("name", ["pcgrad_weights", "gradvac_weights"])
def test_tasks_without_gradient_keep_their_weight(name: str) -> None:
    j = randn(4, 3, seed=0)
    j[2] = 0
    gram = torch.from_numpy(j @ j.T)
    assert weights_of(name, gram)[2] == 1 and weights_of(name, gram, reduction="mean")[2] == 0.25
    kept = [0, 1, 3]
    rest = weights_of(name, gram[kept][:, kept])
    assert torch.allclose(weights_of(name, gram)[kept], rest, rtol=1e-13)
    assert weights_of(name, torch.zeros(3, 3)).tolist() == [1, 1, 1]


def gradvac_on_vectors(
    j: Array, targets: Array, beta: float, orders: list[list[int]]
) -> tuple[Array, Array, list[Any]]:
    total, targets, turned = np.zeros(j.shape[1]), targets.copy(), []
    for i, order in enumerate(orders):
        g = j[i].copy()
        for k in order:
            if k == i:
                continue
            n, m = np.linalg.norm(g), np.linalg.norm(j[k])
            phi, target = g @ j[k] / (n * m), targets[i, k]
            if phi < target:
                sine = np.sqrt(1 - target**2)
                g = g + n * (target * np.sqrt(1 - phi**2) - phi * sine) / (m * sine) * j[k]
                turned.append((g @ j[k] / np.linalg.norm(g) / m, target))
            targets[i, k] = (1 - beta) * target + beta * phi
        total += g
    return total, targets, turned


def test_gradvac_is_the_algorithm_on_vectors() -> None:
    """Over several calls, with its state; and each turn reaches the target's cosine."""
    for t in (1, 2, 5, 8):
        state, expected, turns = None, np.zeros((t, t)), 0
        for step in range(6):
            j = randn(t, 12, seed=10 * t + step) * np.random.default_rng(step).uniform(0.1, 10, (t, 1))
            orders = permutations(t, step)
            d, expected, turned = gradvac_on_vectors(j, expected, 0.3, orders)
            before = None if state is None else state.clone()
            w, new = gradvac_weights(torch.from_numpy(j @ j.T), state, beta=0.3, orders=orders)
            assert state is None or torch.equal(state, before)
            state = new
            np.testing.assert_allclose(w.numpy() @ j, d, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(state.numpy(), expected, rtol=1e-10, atol=1e-13)
            turns += len(turned)
            for reached, target in turned:
                assert reached == pytest.approx(target, abs=1e-12)
        assert turns > 0 or t == 1


def test_gradvac_with_targets_of_zero_that_stay_is_pcgrad() -> None:
    for k, j in enumerate(recorded()):
        orders = permutations(len(j), k)
        gram = torch.from_numpy(j @ j.T)
        w, targets = gradvac_weights(gram, beta=0.0, orders=orders)
        assert torch.allclose(w, pcgrad_weights(gram, orders=orders), rtol=1e-12) and not targets.any()


def test_gradvac_with_a_target_of_one_stays_finite() -> None:
    w, targets = gradvac_weights(torch.eye(2), torch.ones(2, 2), orders=[[0, 1], [0, 1]])
    assert torch.isfinite(w).all() and targets[0, 1] == 0.5
    j = randn(3, 4, seed=0)
    j[1] = 0
    state = torch.full((3, 3), 0.25, dtype=torch.float64)
    _, new = gradvac_weights(torch.from_numpy(j @ j.T), state, orders=permutations(3, 0))
    assert (new[1] == 0.25).all() and (new[:, 1] == 0.25).all() and new[0, 2] != 0.25  # no cosine with zero


# ---- torchjd --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchjd() -> Any:
    return pytest.importorskip("torchjd.aggregation")


def parity(found: Array, aggregator: Any, j: Array, rtol: float = 1e-8) -> None:
    expected = aggregator(torch.from_numpy(j)).numpy()
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * lengths(j).max())


def test_cone_projections_are_torchjds(torchjd: Any) -> None:
    """With its regularisation of 1e-4 off."""
    pytest.importorskip("quadprog")
    from torchjd.linalg import QuadprogProjector

    exact = QuadprogProjector(norm_eps=0.0, reg_eps=0.0)
    for j in recorded():
        u = np.random.default_rng(0).uniform(0, 1, len(j))
        for pref in (None, torch.from_numpy(u)):
            parity(solve(upgrad_weights, j, pref)[1], torchjd.UPGrad(pref, exact), j)
            parity(solve(dualproj_weights, j, pref)[1], torchjd.DualProj(pref, exact), j)
    for j in recorded(full_rank=False):  # on: near
        parity(solve(upgrad_weights, j)[1], torchjd.UPGrad(), j, rtol=0.02)


def test_mgda_is_where_torchjds_goes(torchjd: Any) -> None:
    for j in recorded():
        d = solve(mgda_weights, j)[1]
        theirs = torchjd.MGDA(epsilon=1e-9, max_iters=5000)(torch.from_numpy(j)).numpy()
        assert np.linalg.norm(d) <= np.linalg.norm(theirs) * (1 + 1e-12)
        np.testing.assert_allclose(d, theirs, atol=2e-2)


@pytest.mark.parametrize("full_rank", [True, False])
def test_closed_forms_are_torchjds(torchjd: Any, full_rank: bool) -> None:
    for j in recorded(full_rank=full_rank):
        u = np.random.default_rng(0).uniform(0.1, 1, len(j))
        parity(solve(imtl_g_weights, j)[1], torchjd.IMTLG(), j)
        for pref in (None, torch.from_numpy(u)):
            parity(solve(config_weights, j, pref)[1], torchjd.ConFIG(pref), j)
            for scale in ("min", "median", "rmse"):
                parity(solve(aligned_weights, j, pref, scale=scale)[1], torchjd.AlignedMTL(pref, scale), j)


def test_pcgrad_is_torchjds_with_the_same_seed(torchjd: Any) -> None:
    for seed, j in enumerate(recorded() + recorded(full_rank=False)):
        torch.manual_seed(seed)
        d = solve(pcgrad_weights, j)[1]
        torch.manual_seed(seed)
        parity(d, torchjd.PCGrad(), j)


def test_gradvac_is_torchjds_with_its_orders(torchjd: Any) -> None:
    t = 6
    theirs, state = torchjd.GradVac(beta=0.4, eps=0.0), None
    for step in range(8):
        j = randn(t, 15, seed=step)
        torch.manual_seed(step)
        drawn = [torch.randperm(t - 1).tolist() for _ in range(t)]
        orders = [[[k for k in range(t) if k != i][p] for p in order] + [i] for i, order in enumerate(drawn)]
        w, state = gradvac_weights(torch.from_numpy(j @ j.T), state, beta=0.4, orders=orders)
        torch.manual_seed(step)
        parity(w.numpy() @ j, theirs, j)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_fairgrad_is_torchjds(torchjd: Any, alpha: float) -> None:
    pytest.importorskip("scipy")
    for j in recorded(6):
        parity(solve(fairgrad_weights, j, alpha)[1], torchjd.FairGrad(alpha), j, rtol=1e-4)


# ---- what all have in common ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("tasks", [1, 2, 5, 64])
def test_result(name: str, tasks: int) -> None:
    j = torch.from_numpy(randn(tasks, 80, seed=tasks)).float()
    gram = (j @ j.T).requires_grad_()
    before = gram.detach().clone()
    w = weights_of(name, gram)
    assert w.dtype == torch.float64 and w.shape == (tasks,) and w.device == gram.device and not w.requires_grad
    assert torch.isfinite(w).all() and torch.equal(gram, before)
    exact = weights_of(name, (j.double() @ j.double().T))
    assert torch.allclose(w, exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))
    assert torch.equal(w, weights_of(name, gram.detach().T))  # any strides; and reproducible


@pytest.mark.parametrize("name", sorted(ALL))
def test_one_task(name: str) -> None:
    expected = {"cagrad_weights": 1.4, "nash_weights": 0.5, "fairgrad_weights": 0.5}.get(name, 1.0)
    for dtype in (torch.float32, torch.float64):
        assert weights_of(name, torch.tensor([[4.0]], dtype=dtype)).item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", sorted(ALL))
def test_weights_move_with_the_tasks(name: str) -> None:
    j = randn(6, 20, seed=8) * [[0.1], [3.0], [1.0], [1.0], [20.0], [0.5]]
    permutation = [3, 0, 5, 1, 4, 2]
    gram = torch.from_numpy(j @ j.T)
    orders = permutations(6, 0)
    options, moved = {}, {}
    if name in ("pcgrad_weights", "gradvac_weights"):
        options = {"orders": orders}
        moved = {"orders": [[permutation.index(k) for k in orders[p]] for p in permutation]}
    expected = weights_of(name, gram, **options)[permutation]
    found = weights_of(name, gram[permutation][:, permutation], **moved)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_weights_do_not_depend_on_the_unit(name: str, factor: float) -> None:
    """But Nash-MTL's and FairGrad's, which go with it."""
    j = randn(5, 20, seed=9)
    gram = torch.from_numpy(j @ j.T)
    power = {"nash_weights": -1.0, "fairgrad_weights": -1.0}.get(name, 0.0)
    expected = weights_of(name, gram) * factor**power
    assert torch.allclose(weights_of(name, gram * factor**2), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", sorted(ALL))
def test_singular_matrices_give_finite_weights(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        for j in sweep(60, 13):
            rows = torch.from_numpy(j).to(dtype)
            w = weights_of(name, rows @ rows.T)
            assert torch.isfinite(w).all()


@pytest.mark.parametrize("name", sorted(ALL))
def test_gradients_near_the_end_of_the_range(name: str) -> None:
    j = torch.from_numpy(randn(3, 5, seed=0))
    for factor in (1e-152, 1e-170, 1e140):
        assert torch.isfinite(weights_of(name, (j @ j.T) * factor * factor)).all()
    short = (j @ j.T).float() * 1e-44  # float32 without digits: counts as zero
    assert torch.equal(weights_of(name, short), weights_of(name, torch.zeros(3, 3)))


@pytest.mark.parametrize("name", sorted(ALL))
def test_within_torch_compile_it_is_a_graph_break(name: str) -> None:
    j = torch.from_numpy(randn(4, 6, seed=0))

    def step(rows: Tensor) -> Tensor:
        return weights_of(name, rows @ rows.T) @ rows

    torch._dynamo.reset()
    assert torch.allclose(torch.compile(step, backend="eager")(j), step(j), rtol=1e-12)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", sorted(ALL))
def test_weights_are_on_the_matrix_device(name: str) -> None:
    j = torch.from_numpy(randn(5, 9, seed=0))
    w = weights_of(name, (j @ j.T).cuda())
    assert w.is_cuda and torch.equal(w.cpu(), weights_of(name, j @ j.T))


# ---- errors ---------------------------------------------------------------------------------------------------------

NAN = float("nan")
WRONG: list[tuple[Any, type[Exception], str]] = [
    ([[1.0]], TypeError, "gram is a list; expected a tensor"),
    (torch.eye(2).half(), TypeError, "gram has dtype float16; expected float32 or float64"),
    (torch.eye(2).long(), TypeError, "gram has dtype int64; expected float32 or float64"),
    (torch.ones(2, 3), ValueError, r"gram has shape \(2, 3\); expected \(T, T\) with T >= 1"),
    (torch.ones(4), ValueError, r"gram has shape \(4,\)"),
    (torch.ones(0, 0), ValueError, r"gram has shape \(0, 0\)"),
    (torch.ones(2, 2, 2), ValueError, r"gram has shape \(2, 2, 2\)"),
    (torch.tensor([[1.0, NAN], [NAN, 1.0]]), ValueError, "gram has a NaN or an infinity"),
    (torch.tensor([[float("inf"), 0.0], [0.0, 1.0]]), ValueError, "gram has a NaN or an infinity"),
    (torch.tensor([[1.0, 0.0], [0.0, -2.0]]), ValueError, r"gram\[1, 1\] is -2; expected a squared length"),
    (torch.tensor([[1.0, 0.5], [0.2, 1.0]]), ValueError, r"gram is not symmetric at \[0, 1\]"),
    (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), ValueError, r"gram has a negative eigenvalue \(-1 times"),
    (1.9 * torch.eye(3) - 0.9, ValueError, r"gram has a negative eigenvalue \(-0.8 times"),
    (torch.tensor([[1.0, 0.3], [0.3, 0.0]]), ValueError, r"gram\[1, 1\] is 0 and gram\[1, 0\] is 0.3"),
    (torch.tensor([[0.0, 0.3], [0.3, 0.0]]), ValueError, r"gram\[0, 0\] is 0 and gram\[0, 1\] is 0.3"),
]


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize(("gram", "error", "message"), WRONG, ids=[m for _, _, m in WRONG])
def test_no_gram_matrix(name: str, gram: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{name}: {message}"):
        ALL[name](gram)


@pytest.mark.parametrize(("gram", "error", "message"), WRONG, ids=[m for _, _, m in WRONG])
def test_no_gram_matrix_of_memories(gram: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"gem_weights: {message.replace('gram', 'gram_memory')}"):
        gem_weights(gram, torch.ones(2))


@pytest.mark.parametrize("name", ["aligned_weights", "config_weights", "dualproj_weights", "upgrad_weights"])
def test_no_preference(name: str) -> None:
    for wrong, message in (
        ([1.0], r"preference has shape \(1,\); expected \(2,\), one for each task"),
        (torch.ones(2, 2), r"preference has shape \(2, 2\)"),
        ([1.0, -0.5], r"preference is \[1.0, -0.5\]; expected finite numbers >= 0"),
        ([1.0, NAN], r"preference is \[1.0, nan\]"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            ALL[name](torch.eye(2), wrong)


@pytest.mark.parametrize("name", ["pcgrad_weights", "gradvac_weights"])
def test_no_orders(name: str) -> None:
    for wrong in (
        [[0, 1]],
        [[0, 1], [0, 0]],
        [[0, 1], [0]],
        [0, 1],
        [[0.0, 1.0], [1.0, 0.0]],
        torch.zeros(2, 3).long(),
    ):
        with pytest.raises(ValueError, match=f"{name}: orders is .*; expected 2 permutations of 0 to 1"):
            ALL[name](torch.eye(2), orders=wrong)
    with pytest.raises(ValueError, match=f"{name}: got orders and generator; expected one of them"):
        ALL[name](torch.eye(2), orders=[[0, 1], [1, 0]], generator=torch.Generator())
    with pytest.raises(ValueError, match=f"{name}: reduction is 'none'; expected 'sum' or 'mean'"):
        ALL[name](torch.eye(2), reduction="none")


def test_no_options() -> None:
    eye = torch.eye(2)
    for call, error, message in (
        (lambda: cagrad_weights(eye, -0.1), ValueError, "cagrad_weights: c is -0.1; expected >= 0, finite"),
        (lambda: cagrad_weights(eye, NAN), ValueError, "cagrad_weights: c is nan"),
        (lambda: cagrad_weights(eye, "1"), TypeError, "cagrad_weights: c is a str; expected a number"),  # type: ignore
        (lambda: cagrad_weights(eye, rescale=3), ValueError, "rescale is 3; expected 0, 1 or 2"),  # type: ignore
        (lambda: fairgrad_weights(eye, 0.0), ValueError, r"alpha is 0.0; expected a number in \[0.05, 20.0\]"),
        (lambda: fairgrad_weights(eye, 100), ValueError, r"fairgrad_weights: alpha is 100.0; expected a number in"),
        (lambda: fairgrad_weights(eye, -1), ValueError, r"fairgrad_weights: alpha is -1; expected >= 0, finite"),
        (lambda: fairgrad_weights(eye, True), TypeError, "fairgrad_weights: alpha is a bool"),
        (lambda: aligned_weights(eye, scale="max"), ValueError, "scale is 'max'; expected 'min', 'median' or"),  # type: ignore
        (lambda: gradvac_weights(eye, beta=1.5), ValueError, r"gradvac_weights: beta is 1.5; expected .* in \[0, 1\]"),
        (lambda: gradvac_weights(eye, [0]), TypeError, "targets is a list; expected a tensor"),  # type: ignore
        (lambda: gradvac_weights(eye, eye.long()), TypeError, "targets has dtype int64"),
        (lambda: gradvac_weights(eye, torch.eye(3)), ValueError, r"targets has shape \(3, 3\); expected \(2, 2\)"),
        (lambda: gradvac_weights(eye, eye * NAN), ValueError, r"targets has elements outside \[-1, 1\] or NaN"),
        (lambda: gem_weights(eye, [1, 2]), TypeError, "products is a list; expected a tensor"),  # type: ignore
        (lambda: gem_weights(eye, torch.ones(2).long()), TypeError, "products has dtype int64"),
        (lambda: gem_weights(eye, torch.ones(3)), ValueError, r"products has shape \(3,\); expected \(2,\)"),
        (lambda: gem_weights(eye, torch.tensor([NAN, 0])), ValueError, "products has a NaN or an infinity"),
        (lambda: gem_weights(eye, torch.ones(2), -1.0), ValueError, "margin is -1.0; expected >= 0"),
        (lambda: agem_coefficient(NAN, 1.0), ValueError, "agem_coefficient: dot is nan; expected a finite number"),
        (lambda: agem_coefficient(1.0, -1.0), ValueError, "reference_square is -1.0; expected >= 0"),
        (lambda: agem_coefficient(torch.ones(2), 1.0), ValueError, r"dot has shape \(2,\); expected one element"),
        (lambda: agem_coefficient(1.0, None), TypeError, "reference_square is a NoneType"),  # type: ignore
    ):
        with pytest.raises(error, match=message):
            call()
