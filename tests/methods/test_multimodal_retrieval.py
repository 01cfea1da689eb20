"""Retrieval metrics against a brute force over the full matrix, scikit-learn, and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from tlkernels.methods.multimodal import retrieval as module
from tlkernels.methods.multimodal.retrieval import cross_modal_retrieval, retrieval_metrics


def integers(rows: int, width: int, seed: int, high: int = 3) -> Tensor:
    """Features whose products are exact: many ties, and equal ones are equal in any order of summation."""
    return torch.randint(-high, high + 1, (rows, width), generator=torch.Generator().manual_seed(seed)).double()


def brute_force(
    scores: Tensor, positive: Tensor, ties: str, exclude: Tensor | None = None
) -> tuple[list[float], list[float], list[float]]:  # fmt: skip
    """(rank of the best positive, AP, MAP@R) of each query with a positive: lists that are sorted, by the rule."""
    ranks, aps, at_r = [], [], []
    for i in range(scores.shape[0]):
        allowed = [j for j in range(scores.shape[1]) if exclude is None or j != int(exclude[i])]
        good = sorted((float(scores[i, j]) for j in allowed if positive[i, j]), reverse=True)
        bad = [float(scores[i, j]) for j in allowed if not positive[i, j]]
        if not good:
            continue
        terms, late = [], []
        for k, s in enumerate(good, 1):
            above, tied = sum(b > s for b in bad), sum(b == s for b in bad)
            before = above + {"optimistic": 0.0, "pessimistic": float(tied), "average": tied / 2}[ties]
            if k == 1:
                ranks.append(1.0 + before)
            terms.append(k / (k + before))
            late.append(k / (k + before) if k + before <= len(good) else 0.0)
        aps.append(sum(terms) / len(good))
        at_r.append(sum(late) / len(good))
    return ranks, aps, at_r


def assert_metrics(found: Any, ranks: list[float], aps: list[float] | None, at_r: list[float] | None) -> None:
    assert found.num_queries == len(ranks)
    assert found.ranks[found.ranks.isfinite()].tolist() == ranks
    assert found.median_rank == float(np.median(ranks))
    assert found.mean_rank == pytest.approx(float(np.mean(ranks)))
    assert found.mean_reciprocal_rank == pytest.approx(float(np.mean(1 / np.array(ranks))))
    for k, value in found.recall.items():
        assert value == pytest.approx(float(np.mean([r <= k for r in ranks])))
    if aps is None:
        assert found.mean_average_precision is None and found.map_at_r is None
    else:
        assert at_r is not None
        assert found.mean_average_precision == pytest.approx(float(np.mean(aps)), rel=1e-12)
        assert found.map_at_r == pytest.approx(float(np.mean(at_r)), rel=1e-12)


@pytest.mark.parametrize("ties", ["average", "optimistic", "pessimistic"])
@pytest.mark.parametrize("precision", [True, False])
@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_pairs_of_rows(ties: Any, precision: bool, block_size: int) -> None:
    x, y = integers(23, 3, 0), integers(23, 3, 1)
    scores = x @ y.T
    assert (scores[:, :, None] == scores.diagonal()[:, None, None]).sum() > 23  # there are ties
    found = cross_modal_retrieval(
        x, y, similarity="dot", ties=ties, average_precision=precision, block_size=block_size, ks=(1, 3, 10)
    )
    for side, matrix in ((found.x_to_y, scores), (found.y_to_x, scores.T)):
        ranks, aps, at_r = brute_force(matrix, torch.eye(23), ties)
        assert_metrics(side, ranks, aps if precision else None, at_r)
        assert len(ranks) == 23


@pytest.mark.parametrize("ties", ["average", "optimistic", "pessimistic"])
@pytest.mark.parametrize("precision", [True, False])
@pytest.mark.parametrize("block_size", [1, 5, 16, 100])
def test_several_positives(ties: Any, precision: bool, block_size: int) -> None:
    """Labels of very different frequency, some on one side only."""
    x, y = integers(31, 3, 2, high=2), integers(45, 3, 3, high=2)
    generator = torch.Generator().manual_seed(0)
    x_labels = torch.randint(0, 8, (31,), generator=generator) ** 2 - 5
    y_labels = torch.randint(0, 7, (45,), generator=generator) ** 2 - 5
    positive = x_labels[:, None] == y_labels
    assert not positive.any(1).all() and positive.sum(1).max() > 5
    options: dict[str, Any] = {"similarity": "dot", "ties": ties, "average_precision": precision,
                               "block_size": block_size}  # fmt: skip
    found = cross_modal_retrieval(x, y, x_labels=x_labels, y_labels=y_labels, **options)
    sides = ((found.x_to_y, x @ y.T, positive), (found.y_to_x, y @ x.T, positive.T))
    for side, scores, belongs in sides:
        ranks, aps, at_r = brute_force(scores, belongs, ties)
        assert_metrics(side, ranks, aps if precision else None, at_r)
        assert torch.equal(side.ranks.isnan(), ~belongs.any(1))
    pairs = positive.nonzero()[torch.randperm(int(positive.sum()), generator=generator)]
    by_pairs = cross_modal_retrieval(x, y, pairs=pairs, **options)
    assert str(by_pairs) == str(found) and by_pairs.y_to_x.ranks.equal(found.y_to_x.ranks) is bool(
        positive.any(0).all()
    )
    one_way = retrieval_metrics(x, y, labels=x_labels, candidate_labels=y_labels.numpy(), **options)
    assert str(one_way) == str(found.x_to_y)


@pytest.mark.parametrize("block_size", [4, 50])
def test_within_one_set(block_size: int) -> None:
    """Metric learning: each example among all others, without itself."""
    x = integers(40, 4, 5)
    labels = torch.arange(40) % 6
    found = retrieval_metrics(x, labels=labels, similarity="dot", block_size=block_size)
    same = (labels[:, None] == labels) & ~torch.eye(40, dtype=torch.bool)
    assert_metrics(found, *brute_force(x @ x.T, same, "average", exclude=torch.arange(40)))
    # an exclusion of one's own: others than the first positive
    exclude = (torch.arange(40) + 6) % 40
    exclude[3] = -1
    found = retrieval_metrics(x, x, labels=labels, candidate_labels=labels, exclude=exclude, similarity="dot")
    assert_metrics(found, *brute_force(x @ x.T, labels[:, None] == labels, "average", exclude=exclude))


def test_average_precision_as_sklearn() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (50, 120))
    x_labels, y_labels = torch.arange(50) % 9, torch.arange(120) % 9
    found = retrieval_metrics(x, y, labels=x_labels, candidate_labels=y_labels, block_size=33)
    scores = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(y).T
    want = [average_precision_score(y_labels == x_labels[i], scores[i]) for i in range(50)]
    assert found.mean_average_precision == pytest.approx(float(np.mean(want)), rel=1e-12)


def test_map_at_r_as_pytorch_metric_learning() -> None:
    """The formula of that library's accuracy calculator: the nearest R of each query, in order."""
    accuracy = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    generator = torch.Generator().manual_seed(2)
    x = torch.nn.functional.normalize(torch.randn(60, 5, generator=generator, dtype=torch.float64))
    labels = torch.arange(60) % 7
    found = retrieval_metrics(x, labels=labels)
    scores = (x @ x.T).fill_diagonal_(-torch.inf)
    nearest = labels[scores.argsort(1, descending=True)]
    for at_r, got in ((True, found.map_at_r), (False, found.mean_average_precision)):
        want = accuracy.mean_average_precision(
            nearest[:, :-1],
            labels[:, None],
            ref_includes_query=True,
            label_counts=(torch.arange(7), torch.bincount(labels)),
            avg_of_avgs=False,
            return_per_class=False,
            label_comparison_fn=torch.eq,
            at_r=at_r,
        )
        assert got == pytest.approx(float(want), rel=1e-12)


def test_closed_forms() -> None:
    n = 50
    eye = torch.eye(n)
    perfect = cross_modal_retrieval(eye, eye)
    for side in perfect:
        assert side.recall == {1: 1.0, 5: 1.0, 10: 1.0} and side.median_rank == side.mean_rank == 1.0
        assert side.mean_average_precision == side.map_at_r == side.mean_reciprocal_rank == 1.0
    # query i scores -|i - j|: candidate j = i is the first; with the pairing i <-> n - 1 - i the ranks are known
    a = torch.arange(n, dtype=torch.float64)
    x, y = torch.stack([2 * a, torch.ones(n)], 1), torch.stack([a, -(a**2)], 1)
    pairs = torch.stack([torch.arange(n), torch.zeros(n, dtype=torch.int64)], 1)
    found = retrieval_metrics(x.double(), y.double(), pairs=pairs, similarity="dot", ties="optimistic", ks=(1,))
    # above candidate 0 of query i: all j with |i - j| < i
    assert found.ranks.tolist() == [1.0 + sum(abs(i - j) < i for j in range(n)) for i in range(n)]
    # all features the same: by the rule, and never a success
    same = torch.ones(n, 3)
    for ties, rank in (("average", (n + 1) / 2), ("optimistic", 1.0), ("pessimistic", float(n))):
        for precision in (True, False):
            found = retrieval_metrics(same, same, ties=ties, average_precision=precision)  # type: ignore[arg-type]
            assert found.median_rank == found.mean_rank == rank


def test_equal_candidates_tie() -> None:
    """A candidate that stands twice ties with itself, whatever block it is in."""
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(64, 48, generator=generator)
    x = torch.randn(64, 48, generator=generator)
    twice = torch.cat([y, y])
    for block_size in (64, 32):
        once = retrieval_metrics(x, y, block_size=block_size)
        pairs = torch.stack([torch.arange(64), torch.arange(64)], 1)
        found = retrieval_metrics(x, twice, pairs=pairs, ties="optimistic", block_size=block_size)
        assert torch.equal(found.ranks, 2 * once.ranks - 1)
        found = retrieval_metrics(x, twice, pairs=pairs, ties="pessimistic", block_size=block_size)
        assert torch.equal(found.ranks, 2 * once.ranks)


def test_autocast_does_not_round_scores() -> None:
    x, y = integers(40, 8, 0, high=30).float() + 0.1, integers(40, 8, 1, high=30).float() + 0.1
    want = cross_modal_retrieval(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_modal_retrieval(x, y)
    assert torch.equal(found.x_to_y.ranks, want.x_to_y.ranks) and torch.equal(found.y_to_x.ranks, want.y_to_x.ranks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_numpy(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(70, 24, generator=generator).to(dtype) for _ in range(2))
    found = cross_modal_retrieval(x, y, similarity="dot", block_size=16)
    scores = x.double() @ y.double().T
    ranks, aps, _ = brute_force(scores, torch.eye(70), "average")
    assert found.x_to_y.ranks.tolist() == ranks
    assert found.x_to_y.mean_average_precision == pytest.approx(float(np.mean(aps)))
    if dtype == torch.float32:
        arrays = cross_modal_retrieval(x.numpy(), y.numpy(), similarity="dot", block_size=16)
        assert str(arrays) == str(found)
        labels = np.arange(70) // 5
        a = cross_modal_retrieval(x.numpy(), y.numpy(), x_labels=labels, y_labels=labels.tolist())
        b = cross_modal_retrieval(x, y, x_labels=torch.from_numpy(labels), y_labels=torch.from_numpy(labels))
        assert str(a) == str(b)
        scaled = cross_modal_retrieval(x * 8, y * torch.rand(70, 1, generator=generator).add(0.5))
        assert scaled.x_to_y.ranks.tolist() == cross_modal_retrieval(x, y).x_to_y.ranks.tolist()


def test_blocks_alone_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block is larger than asked for, and where positives lie on the diagonal only its blocks are made twice."""
    made: list[tuple[int, int]] = []
    original = module._Blocks.__call__

    def counted(self: Any, i: int, j: int) -> Tensor:
        block = original(self, i, j)
        assert max(block.shape) <= 8
        made.append((i, j))
        return block

    monkeypatch.setattr(module._Blocks, "__call__", counted)
    cross_modal_retrieval(integers(40, 3, 0), integers(40, 3, 1), block_size=8)
    assert len(made) == 25 + 5 and sorted(set(made)) == sorted(made[5:])


def test_string() -> None:
    found = retrieval_metrics(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]], ks=(1, 3))
    # the two that are swapped: their positives tie with two others at 0, below one at 1
    assert found.ranks.tolist() == [1.0, 1.0, 3.0, 3.0]
    assert str(found) == "R@1 50.00 %, R@3 100.00 %, mAP 0.6667, median rank 2, mean rank 2.00, 4 queries"


FEATURES = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"x": torch.ones(3)}, ValueError, r"x has shape \(3,\); expected \(rows, features\)"),
        ({"x": torch.ones(3, 2).long()}, TypeError, "x has dtype int64"),
        ({"x": FEATURES * math.nan}, ValueError, "x has a value that is not finite"),
        ({"y": torch.ones(3, 2).double()}, TypeError, "y has dtype float64; expected float32, like x"),
        ({"y": torch.ones(3, 4)}, ValueError, r"y has shape \(3, 4\); expected \(3, 2\), like x"),
        ({"y": torch.ones(4, 2)}, ValueError, "x and y have 3 and 4 rows; expected as many, or labels or pairs"),
        ({"x_labels": [1, 2, 3]}, ValueError, "one of x_labels and y_labels is None; expected both or neither"),
        ({"x_labels": [1, 2], "y_labels": [1, 2, 3]}, ValueError, r"x_labels has dtype int64 and shape \(2,\)"),
        ({"x_labels": [1, 2, 3], "y_labels": [1.0, 2, 3]}, ValueError, "y_labels has dtype float32"),
        ({"x_labels": [1, 2, 3], "y_labels": [4, 5, 6]}, ValueError, "no row of x has a positive"),
        ({"pairs": [[0, 0], [0, 0]]}, ValueError, "pairs has a pair twice"),
        ({"pairs": [[0, 3]]}, IndexError, "pairs has a row that is none; expected 0 <= rows < 3 and 3"),
        ({"pairs": [0, 1]}, ValueError, r"pairs has dtype int64 and shape \(2,\); expected integers \(2, 2\)"),
        ({"pairs": [[0, 0]], "x_labels": [1] * 3, "y_labels": [1] * 3}, ValueError, "pairs and x_labels are given"),
        ({"ks": (0,)}, ValueError, r"ks is \(0,\); expected numbers of 1 or more"),
        ({"similarity": "l2"}, ValueError, "similarity is 'l2'; expected 'cosine' or 'dot'"),
        ({"ties": "random"}, ValueError, "ties is 'random'; expected 'average', 'optimistic' or 'pessimistic'"),
        ({"block_size": 0}, ValueError, "block_size is 0; expected 1 or more"),
    ],
)
def test_wrong_calls(kwargs: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^cross_modal_retrieval: {message}"):
        cross_modal_retrieval(**{"x": FEATURES, "y": FEATURES, **kwargs})


def test_wrong_calls_of_one_set() -> None:
    with pytest.raises(ValueError, match="retrieval_metrics: candidates is None, without labels or pairs"):
        retrieval_metrics(FEATURES)
    with pytest.raises(IndexError, match="retrieval_metrics: exclude has an entry 3; expected less than 3"):
        retrieval_metrics(FEATURES, FEATURES, exclude=[0, 1, 3])
    with pytest.raises(ValueError, match="retrieval_metrics: no row of queries has a positive"):
        retrieval_metrics(FEATURES, labels=[1, 2, 3])
    with pytest.raises(ValueError, match="retrieval_metrics: one of labels and candidate_labels is None"):
        retrieval_metrics(FEATURES, FEATURES, labels=[1, 2, 3])
