"""Cosines, conflicts, affinity, groups, gates and the delta-m metric, by their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from tlkernels.methods.multitask.analysis import (
    ConflictReport,
    affinity,
    conflict_rate,
    cosine_gate,
    cosines,
    delta_m,
    group_tasks,
    magnitude_similarity,
)


def vectors() -> torch.Tensor:
    return torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 3.0], [0.0, 0.0]]).double()


def test_cosines_and_conflicts() -> None:
    g = vectors()
    gram = g @ g.T
    c = cosines(gram)
    torch.testing.assert_close(c[0, 2], torch.tensor(-(0.5**0.5)).double())
    torch.testing.assert_close(c[1, 2], torch.tensor(0.5**0.5).double())
    assert c[0, 1] == 0 and c[3].isnan().all() and c[:, 3].isnan().all()
    assert conflict_rate(gram) == pytest.approx(1 / 3)
    assert math.isnan(conflict_rate(gram[:1, :1]))
    sizes = magnitude_similarity(gram)
    assert float(sizes[0, 1]) == pytest.approx(2 * 1 * 2 / 5) and float(sizes[0, 0]) == 1


def test_a_report_over_training() -> None:
    report = ConflictReport(["a", "b"])
    for cosine in (0.5, -0.2, 0.3, -0.8):
        report.update(torch.tensor([[1.0, cosine * 2], [cosine * 2, 4.0]]))
    assert report.mean_cosine[0, 1] == pytest.approx(-0.05) and report.conflicts[0, 1] == 0.5
    assert report.rate() == 0.5 and report.rates == [0, 1, 0, 1]
    report.update(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))  # a gradient of 0 says nothing
    assert report.mean_cosine[0, 1] == pytest.approx(-0.05) and report.steps == 5
    again = ConflictReport(["a", "b"])
    again.load_state_dict(report.state_dict())
    np.testing.assert_array_equal(again.mean_cosine, report.mean_cosine)
    pytest.importorskip("matplotlib").use("Agg")
    ax = report.plot()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b"] and len(ax.texts) == 4
    for call, says in (
        (lambda: ConflictReport([]), "names is empty"),
        (lambda: report.update(torch.ones(3, 3)), "expected 2 tasks"),
        (lambda: report.update(torch.ones(3)), "expected a square matrix"),
        (lambda: ConflictReport(["x", "y"]).load_state_dict(report.state_dict()), "state_dict has names"),
    ):
        with pytest.raises(ValueError, match=says):
            call()  # type: ignore[no-untyped-call]


def test_affinity_by_hand_and_nothing_moves() -> None:
    """L_j = |w - t_j|^2 / 2: a step of task i takes w to w - lr (w - t_i)."""
    targets = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 3.0]]).double()
    w = nn.Parameter(torch.tensor([2.0, 2.0]).double())
    unused = nn.Parameter(torch.ones(2).double())
    z = affinity(lambda: [(w - t).square().sum() / 2 for t in targets], [w, unused], lr=0.1)
    start = w.detach()
    for i, j in itertools.product(range(3), repeat=2):
        stepped = start - 0.1 * (start - targets[i])
        expected = 1 - (stepped - targets[j]).square().sum() / (start - targets[j]).square().sum()
        assert z[i, j] == pytest.approx(float(expected))
    assert z[0, 1] > 0 > z[0, 2]
    assert torch.equal(w, torch.tensor([2.0, 2.0]).double()) and w.grad is None
    calls = iter([[w.sum()], RuntimeError("stop")])

    def failing() -> list[torch.Tensor]:
        result = next(calls)
        if isinstance(result, Exception):
            raise result
        return result

    with pytest.raises(RuntimeError, match="stop"):
        affinity(failing, [w], lr=0.1)
    assert torch.equal(w, torch.tensor([2.0, 2.0]).double())
    with pytest.raises(ValueError, match="lr is 0"):
        affinity(lambda: [], [w], lr=0)
    with pytest.raises(ValueError, match="holds none"):
        affinity(lambda: [], [], lr=1)


def brute(z: np.ndarray, groups: int) -> float:
    tasks = range(len(z))
    candidates = [c for n in range(1, len(z) + 1) for c in itertools.combinations(tasks, n)]

    def score(members: tuple[int, ...], j: int) -> float:
        if j not in members:
            return -np.inf
        others = [i for i in members if i != j]
        return float(z[others, j].mean()) if others else 0.0

    best = -np.inf
    for n in range(1, groups + 1):
        for chosen in itertools.combinations(candidates, n):
            best = max(best, sum(max(score(c, j) for c in chosen) for j in tasks))
    return best


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups_are_the_best_there_are(groups: int) -> None:
    for seed in range(8):
        z = np.random.default_rng(seed).normal(size=(4, 4))
        found = group_tasks(z, groups)
        assert 1 <= len(found) <= groups and set().union(*found) == set(range(4))
        total = 0.0
        for j in range(4):
            total += max(
                (np.mean([z[i, j] for i in c if i != j]) if len(c) > 1 else 0.0) for c in found if j in c
            )  # fmt: skip
        assert total == pytest.approx(brute(z, groups))


def test_groups_of_friends() -> None:
    z = -np.ones((5, 5))
    z[:2, :2], z[2:, 2:] = 1, 1
    assert group_tasks(z, 2) == [(0, 1), (2, 3, 4)]
    assert group_tasks([[0.0]], 3) == [(0,)]
    for bad, groups, says in (
        (np.ones((2, 3)), 1, "expected a square"), (np.full((2, 2), np.nan), 1, "finite"),
        (np.ones((13, 13)), 1, "of 13 tasks"), (np.ones((2, 2)), 0, "groups is 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            group_tasks(bad, groups)


def test_a_gate_for_auxiliary_tasks() -> None:
    g = torch.tensor([[1.0, 1.0], [1.0, 0.0], [-1.0, 0.5], [0.0, 0.0]]).double()
    gram = g @ g.T
    assert cosine_gate(gram).tolist() == [1, 1, 0, 0]
    assert cosine_gate(gram, weighted=True).tolist() == pytest.approx([1, 0.5**0.5, 0, 0])
    assert cosine_gate(gram, main=2).tolist() == [0, 0, 1, 0]
    with pytest.raises(ValueError, match="main is 4"):
        cosine_gate(gram, main=4)


def test_delta_m() -> None:
    assert delta_m([0.9, 2.0], [0.8, 4.0], [True, False]) == pytest.approx(100 * (0.125 + 0.5) / 2)
    assert delta_m([0.9, 2.0], [0.9, 2.0], [True, False]) == 0
    with pytest.raises(ValueError, match=r"baselines\[1\] is 0"):
        delta_m([1, 1], [1, 0], [True, True])
    with pytest.raises(ValueError, match="one number of each"):
        delta_m([1], [1, 2], [True])
