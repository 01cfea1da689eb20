r"""Retrieval metrics between two sets of features, without their similarity matrix.

The rank of a query is a count: one more than the candidates that score above its best positive. Scores are made block
by block; a first pass keeps those of the positives, a second one counts what lies above them, for both directions at
once. Memory is O(N + M + positives + block), and nothing is sorted but each query's positives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tlkernels.methods._common import accumulator, check_float, normalized, wide
from tlkernels.ops._common import check_device, name_of, no_autocast

__all__ = ["CrossModalRetrieval", "RetrievalMetrics", "cross_modal_retrieval", "retrieval_metrics"]

Features: TypeAlias = "Tensor | np.ndarray[Any, Any]"
Labels: TypeAlias = "Tensor | np.ndarray[Any, Any] | Sequence[int]"
Similarity: TypeAlias = Literal["cosine", "dot"]
Ties: TypeAlias = Literal["average", "optimistic", "pessimistic"]


@dataclass(frozen=True)
class RetrievalMetrics:
    """How well queries find their positives among the candidates.

    All means are over the queries that have a positive.

    Attributes
    ----------
    recall : dict of int to float
        Recall@K: the share of queries whose best positive has a rank of at most K.
    median_rank, mean_rank : float
        Of the best positive's rank; 1 is the first.
    mean_reciprocal_rank : float
    mean_average_precision : float or None
        mAP; None where it was not asked for.
    map_at_r : float or None
        MAP@R: as mAP, but a positive below the first R ranks counts 0, for R positives.
    num_queries : int
        Queries that have a positive.
    ranks : Tensor
        float64 ``[queries]``, the best positive's rank, NaN for a query without one. On the features' device.
    """

    recall: dict[int, float]
    median_rank: float
    mean_rank: float
    mean_reciprocal_rank: float
    mean_average_precision: float | None
    map_at_r: float | None
    num_queries: int
    ranks: Tensor

    def __str__(self) -> str:
        parts = [f"R@{k} {100 * value:.2f} %" for k, value in self.recall.items()]
        if self.mean_average_precision is not None:
            parts.append(f"mAP {self.mean_average_precision:.4f}")
        parts += [f"median rank {self.median_rank:g}", f"mean rank {self.mean_rank:.2f}", f"{self.num_queries} queries"]
        return ", ".join(parts)


class CrossModalRetrieval(NamedTuple):
    """What `cross_modal_retrieval` returns."""

    #: each x among all y: image to text, say
    x_to_y: RetrievalMetrics
    #: each y among all x
    y_to_x: RetrievalMetrics


def retrieval_metrics(
    queries: Features, candidates: Features | None = None, *, labels: Labels | None = None,
    candidate_labels: Labels | None = None, pairs: Labels | None = None, exclude: Labels | None = None,
    ks: Sequence[int] = (1, 5, 10), similarity: Similarity = "cosine", ties: Ties = "average",
    average_precision: bool = True, block_size: int = 2048,
) -> RetrievalMetrics:  # fmt: skip
    r"""Recall@K, ranks and mean average precision of queries among candidates.

    Parameters
    ----------
    queries : Tensor or ndarray
        ``[N, D]``, float32, bfloat16, float16 or float64.
    candidates : Tensor or ndarray, optional
        ``[M, D]`` of the same dtype. By default the queries, each among all others, by `labels`.
    labels, candidate_labels : integers, optional
        ``[N]`` and ``[M]``: a candidate with the query's label is a positive. For captions, their image's number.
    pairs : integers, optional
        ``[P, 2]``, (query, candidate) for each positive, instead of labels, each pair once. Without labels or pairs,
        query i has the positive i.
    exclude : integers, optional
        ``[N]``, a candidate for each query that is left out of its ranking, such as the query itself; negative for
        none. By default, without `candidates`, the query itself.
    ks : sequence of int
        The K of Recall@K.
    similarity : {"cosine", "dot"}
    ties : {"average", "optimistic", "pessimistic"}
        Where candidates that are no positives score exactly what a positive does: half of them come before it, none,
        or all. A model that gives all the same features has the rank (M + 1) / 2, 1 or M.
    average_precision : bool
        Whether mAP and MAP@R are wanted: they need the ranks of all positives, not of the best alone.
    block_size : int
        Rows and columns of scores that are held at a time.

    Returns
    -------
    RetrievalMetrics

    Raises
    ------
    TypeError, ValueError, IndexError
        If an argument is not as stated, a feature is not finite, or no query has a positive.

    Notes
    -----
    With :math:`b_p` the candidates that are no positives and come before positive p of query i, and :math:`k_p` = 1, 2,
    ... its place among the positives,

    .. math:: \mathrm{rank}_i = 1 + b_{p_1}, \qquad
        \mathrm{AP}_i = \frac{1}{|P_i|} \sum_{p \in P_i} \frac{k_p}{k_p + b_p}

    Scores are float32 products (float64 for float64), and compared as they are: a tie is an equal number. 2 N M D
    flops, and up to as many again for blocks that hold a positive.

    References
    ----------
    Karpathy and Fei-Fei, CVPR 2015, arXiv:1412.2306 (Recall@K and median rank in both directions). Musgrave et al., A
    Metric Learning Reality Check, ECCV 2020, arXiv:2003.08505 (MAP@R).

    Examples
    --------
    >>> import torch
    >>> retrieval_metrics(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]], ks=(1, 2)).recall
    {1: 0.5, 2: 0.5}
    """
    op = "retrieval_metrics"
    x = _features(op, "queries", queries)
    if candidates is None:
        if labels is None and pairs is None:
            raise ValueError(
                f"{op}: candidates is None, without labels or pairs; expected to know what belongs together"
            )
        y = x
        if exclude is None:
            exclude = torch.arange(x.shape[0])
        if labels is not None and candidate_labels is None:
            candidate_labels = labels
    else:
        y = _features(op, "candidates", candidates)
    plan = _plan(op, ("queries", "candidates"), x, y, labels, candidate_labels, pairs, exclude, ks, similarity, ties)
    return _metrics(op, plan, ks, ties, average_precision, block_size, both=False)[0]


def cross_modal_retrieval(
    x: Features, y: Features, *, x_labels: Labels | None = None, y_labels: Labels | None = None,
    pairs: Labels | None = None, ks: Sequence[int] = (1, 5, 10), similarity: Similarity = "cosine",
    ties: Ties = "average", average_precision: bool = True, block_size: int = 2048,
) -> CrossModalRetrieval:  # fmt: skip
    """`retrieval_metrics` in both directions, from scores that are made once.

    Parameters
    ----------
    x, y : Tensor or ndarray
        ``[N, D]`` and ``[M, D]`` of one dtype: images and texts.
    x_labels, y_labels : integers, optional
        ``[N]`` and ``[M]``; what has the same label belongs together. Five captions an image: ``arange(N)`` and
        ``arange(N).repeat_interleave(5)``.
    pairs : integers, optional
        ``[P, 2]``, rows of x and y that belong together, instead of labels. Without either, row i and row i.
    ks, similarity, ties, average_precision, block_size
        As for `retrieval_metrics`.

    Returns
    -------
    CrossModalRetrieval
        (x_to_y, y_to_x).

    Raises
    ------
    TypeError, ValueError, IndexError
        As `retrieval_metrics`.
    """
    op = "cross_modal_retrieval"
    plan = _plan(
        op, ("x", "y"), _features(op, "x", x), _features(op, "y", y), x_labels, y_labels, pairs, None, ks, similarity,
        ties,
    )  # fmt: skip
    return CrossModalRetrieval(*_metrics(op, plan, ks, ties, average_precision, block_size, both=True))


# ---- what belongs together ------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    x: Tensor
    y: Tensor
    #: int64 [P] each, the positives, ordered by row and then column
    rows: Tensor
    columns: Tensor
    #: int64 [N], -1 for none
    exclude: Tensor | None
    cosine: bool


def _features(op: str, name: str, features: Features) -> Tensor:
    t = torch.from_numpy(features) if isinstance(features, np.ndarray) else features
    check_float(op, **{name: t})
    if t.dim() != 2:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected (rows, features)")
    if not bool(t.isfinite().all()):
        raise ValueError(f"{op}: {name} has a value that is not finite; expected finite features")
    return t.detach()


def _integers(op: str, name: str, value: Labels, shape: tuple[int, ...], device: torch.device) -> Tensor:
    t = torch.as_tensor(value)
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool or tuple(t.shape) != shape:
        raise ValueError(
            f"{op}: {name} has dtype {name_of(t.dtype)} and shape {tuple(t.shape)}; expected integers {shape}"
        )
    return t.to(device, torch.int64)


def _plan(
    op: str, names: tuple[str, str], x: Tensor, y: Tensor, x_labels: Labels | None, y_labels: Labels | None,
    pairs: Labels | None, exclude: Labels | None, ks: Sequence[int], similarity: str, ties: str,
) -> _Plan:  # fmt: skip
    if y.dtype != x.dtype:
        got, want = name_of(y.dtype), name_of(x.dtype)
        raise TypeError(f"{op}: {names[1]} has dtype {got}; expected {want}, like {names[0]}")
    if y.shape[1] != x.shape[1]:
        got_shape, want_shape = tuple(y.shape), f"({y.shape[0]}, {x.shape[1]}), like {names[0]}"
        raise ValueError(f"{op}: {names[1]} has shape {got_shape}; expected {want_shape}")
    check_device(op, x.device, **{names[1]: y})
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"{op}: similarity is {similarity!r}; expected 'cosine' or 'dot'")
    if ties not in ("average", "optimistic", "pessimistic"):
        raise ValueError(f"{op}: ties is {ties!r}; expected 'average', 'optimistic' or 'pessimistic'")
    if any(k < 1 for k in ks):
        raise ValueError(f"{op}: ks is {tuple(ks)}; expected numbers of 1 or more")
    count, others, device = x.shape[0], y.shape[0], x.device
    label_names = ("labels", "candidate_labels") if names[0] == "queries" else ("x_labels", "y_labels")
    if (x_labels is None) != (y_labels is None):
        raise ValueError(f"{op}: one of {label_names[0]} and {label_names[1]} is None; expected both or neither")
    left_out = None if exclude is None else _integers(op, "exclude", exclude, (count,), device)
    if left_out is not None and bool((left_out >= others).any()):
        raise IndexError(f"{op}: exclude has an entry {int(left_out.max())}; expected less than {others}")
    if pairs is not None:
        if x_labels is not None:
            raise ValueError(f"{op}: pairs and {label_names[0]} are given; expected one of them")
        given = torch.as_tensor(pairs)
        listed = _integers(op, "pairs", given, (given.shape[0] if given.dim() else 0, 2), device)
        if listed.numel() and (int(listed.min()) < 0 or bool((listed >= listed.new_tensor([count, others])).any())):
            raise IndexError(f"{op}: pairs has a row that is none; expected 0 <= rows < {count} and {others}")
        code = (listed[:, 0] * others + listed[:, 1]).sort().values
        if bool((code[1:] == code[:-1]).any()):
            raise ValueError(f"{op}: pairs has a pair twice; expected each once")
        rows, columns = code // max(others, 1), code % max(others, 1)
    elif x_labels is not None and y_labels is not None:
        mine = _integers(op, label_names[0], x_labels, (count,), device)
        theirs = _integers(op, label_names[1], y_labels, (others,), device)
        rows, columns = _same_label(mine, theirs)
    else:
        if count != others:
            raise ValueError(
                f"{op}: {names[0]} and {names[1]} have {count} and {others} rows; "
                "expected as many, or labels or pairs that tell what belongs together"
            )
        rows = columns = torch.arange(count, device=device)
    if left_out is not None:
        stays = left_out[rows] != columns
        rows, columns = rows[stays], columns[stays]
    if not rows.numel():
        raise ValueError(f"{op}: no row of {names[0]} has a positive; expected at least one that has")
    return _Plan(x, y, rows, columns, left_out, similarity == "cosine")


def _same_label(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """All (row, column) with the same label, ordered by row and then column."""
    order = theirs.argsort(stable=True)
    sorted_labels = theirs[order]
    first = torch.searchsorted(sorted_labels, mine)
    count = torch.searchsorted(sorted_labels, mine, right=True) - first
    rows = torch.arange(mine.shape[0], device=mine.device).repeat_interleave(count)
    return rows, order[first[rows] + _places(count)]


def _places(count: Tensor) -> Tensor:
    """0, 1, ... count[0] - 1, 0, 1, ... count[1] - 1, and so on."""
    start = count.cumsum(0) - count
    return torch.arange(int(count.sum()), device=count.device) - start.repeat_interleave(count)


# ---- counting -------------------------------------------------------------------------------------------------------


class _Side:
    """One direction: the thresholds of each query, and how many scores lie above each of them.

    The thresholds of a query are the scores of its positives, ascending. A score falls into one of the intervals
    between them; `above` and `at_least` count by interval, so that one entry is written for a score however many
    positives there are. With the best positive alone there is one threshold.
    """

    def __init__(self, owner: Tensor, scores: Tensor, queries: int, best_only: bool, ties: str) -> None:
        self.queries = queries
        self.number = torch.bincount(owner, minlength=queries)
        # by owner, then score: the stable sort by owner keeps the order of the scores
        order = scores.argsort(stable=True)
        order = order[owner[order].argsort(stable=True)]
        self.owner, self.scores = owner[order], scores[order]
        if best_only:
            best = torch.cat([self.owner[1:] != self.owner[:-1], self.owner.new_ones(1, dtype=torch.bool)])
            equal_best = self._equal_to_best(best)
            self.owner, self.scores = self.owner[best], self.scores[best]
            self.tied_positives: Tensor | None = equal_best
        else:
            self.tied_positives = None
        self.count = torch.bincount(self.owner, minlength=queries)
        self.start = self.count.cumsum(0) - self.count
        buckets = self.scores.shape[0] + queries  # one more interval than thresholds for each
        self.above = self.owner.new_zeros(buckets) if ties != "pessimistic" else None
        self.at_least = self.owner.new_zeros(buckets) if ties != "optimistic" else None

    def _equal_to_best(self, best: Tensor) -> Tensor:
        """How many positives of each owner that has one score what its best does."""
        top = self.scores[best].repeat_interleave(torch.bincount(self.owner)[self.owner[best]])
        return torch.bincount(self.owner[self.scores == top], minlength=self.queries)[self.owner[best]]

    def add(self, begin: int, block: Tensor) -> None:
        """Count a block of scores, ``[queries of the block, candidates]``."""
        rows = block.shape[0]
        count, start = self.count[begin : begin + rows], self.start[begin : begin + rows]
        most = int(count.max()) if rows else 0
        if most == 0:
            return
        place = torch.arange(most, device=block.device)
        index = (start[:, None] + place).clamp(max=self.scores.shape[0] - 1)
        thresholds = torch.where(place < count[:, None], self.scores[index], torch.inf)
        first = start + torch.arange(begin, begin + rows, device=block.device)  # of the query's intervals
        for counts, right in ((self.above, False), (self.at_least, True)):
            if counts is None:
                continue
            if most == 1:
                over = (block >= thresholds if right else block > thresholds).sum(1)
                has = count > 0
                counts.index_add_(0, first[has] + 1, over[has])
            else:
                interval = torch.searchsorted(thresholds, block, right=right)
                size = most + 1
                flat = interval + torch.arange(0, rows * size, size, device=block.device)[:, None]
                found = torch.bincount(flat.flatten(), minlength=rows * size).view(rows, size)
                place_of = torch.arange(size, device=block.device)
                inside = place_of <= count[:, None]
                counts.index_add_(0, (first[:, None] + place_of)[inside], found[inside])

    def _over(self, counts: Tensor) -> Tensor:
        """For each threshold, the scores that were counted over it: the intervals to its right."""
        total = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        place = torch.arange(self.scores.shape[0], device=counts.device)
        interval = place + self.owner  # that to the left of the threshold
        end = self.start + self.count + torch.arange(self.queries, device=counts.device) + 1
        return total[end[self.owner]] - total[interval + 1]

    def before(self) -> tuple[Tensor, Tensor]:
        """For each threshold: the candidates before it that are no positives, and its place among the positives."""
        index = torch.arange(self.scores.shape[0], device=self.owner.device) - self.start[self.owner]
        place = self.count[self.owner] - index
        parts = []
        if self.above is not None:
            higher = self._positives_over(strictly=True, place=place)
            parts.append(self._over(self.above) - higher)
        if self.at_least is not None:
            parts.append(self._over(self.at_least) - self._positives_over(strictly=False, place=place))
        return torch.stack(parts).double().mean(0), place

    def _positives_over(self, strictly: bool, place: Tensor) -> Tensor:
        """For each threshold, the positives of the same query that score above it, or at least as much."""
        if self.tied_positives is not None:
            return torch.zeros_like(place) if strictly else self.tied_positives
        new = torch.ones_like(self.owner, dtype=torch.bool)
        new[1:] = (self.owner[1:] != self.owner[:-1]) | (self.scores[1:] != self.scores[:-1])
        group = new.cumsum(0) - 1
        size = torch.bincount(group)
        # `place` counts from the best: the first of its group has all positives at least as good, itself included
        at_least = place[new][group]
        return at_least - size[group] if strictly else at_least


@torch.no_grad()
def _metrics(
    op: str, plan: _Plan, ks: Sequence[int], ties: str, average_precision: bool, block_size: int, both: bool
) -> list[RetrievalMetrics]:  # fmt: skip
    if block_size < 1:
        raise ValueError(f"{op}: block_size is {block_size}; expected 1 or more")
    x, y, rows, columns = plan.x, plan.y, plan.rows, plan.columns
    blocks = _Blocks(plan, block_size)
    scores = torch.empty(rows.shape[0], dtype=accumulator(x.dtype), device=x.device)
    # Pass 1: the positives' scores, from the very blocks that are counted later. A product of single rows would be
    # summed in another order, and a tie would be decided by a rounding.
    grid = -(-y.shape[0] // block_size)
    cell = (rows // block_size) * grid + columns // block_size
    order = cell.argsort(stable=True)
    for number, members in _runs(cell[order]):
        at = order[members[0] : members[1]]
        i, j = divmod(number, grid)
        scores[at] = blocks(i, j)[rows[at] - i * block_size, columns[at] - j * block_size]
    # Pass 2: all blocks, for both directions
    sides = [_Side(rows, scores, x.shape[0], not average_precision, ties)]
    if both:
        sides.append(_Side(columns, scores, y.shape[0], not average_precision, ties))
    for i in range(-(-x.shape[0] // block_size)):
        for j in range(grid):
            block = blocks(i, j)
            sides[0].add(i * block_size, block)
            if both:
                sides[1].add(j * block_size, block.T.contiguous())
    return [_summary(side, ks, average_precision) for side in sides]


def _runs(cells: Tensor) -> Iterator[tuple[int, tuple[int, int]]]:
    """The different entries of a sorted vector, each with where its run begins and ends."""
    found, count = torch.unique_consecutive(cells, return_counts=True)
    end = count.cumsum(0).tolist()
    return zip(found.tolist(), zip([0, *end[:-1]], end, strict=True), strict=True)


class _Blocks:
    """Blocks of scores; the same one twice has the same bits."""

    def __init__(self, plan: _Plan, size: int) -> None:
        self.plan, self.size = plan, size

    def _part(self, features: Tensor, number: int) -> Tensor:
        part = wide(features[number * self.size : (number + 1) * self.size])
        return normalized(part) if self.plan.cosine else part

    def __call__(self, i: int, j: int) -> Tensor:
        plan = self.plan
        with no_autocast(plan.x.device):
            block = self._part(plan.x, i) @ self._part(plan.y, j).T
        if plan.exclude is not None:
            column = plan.exclude[i * self.size : i * self.size + block.shape[0]] - j * self.size
            inside = (column >= 0) & (column < block.shape[1])
            block[inside.nonzero()[:, 0], column[inside]] = -torch.inf
        return block


def _summary(side: _Side, ks: Sequence[int], average_precision: bool) -> RetrievalMetrics:
    before, place = side.before()
    has = side.number > 0
    ranks = torch.full((side.queries,), torch.nan, dtype=torch.float64, device=before.device)
    # the last threshold of each query is its best
    best = (side.start + side.count - 1)[has]
    found = 1.0 + before[best]
    ranks[has] = found
    number = int(has.sum())
    precision: float | None = None
    at_r: float | None = None
    if average_precision:
        share = place / (place + before) / side.number[side.owner]
        precision = float(share.sum()) / number
        at_r = float(share[place + before <= side.number[side.owner]].sum()) / number
    ordered = found.sort().values
    middle = (ordered[(number - 1) // 2] + ordered[number // 2]) / 2
    return RetrievalMetrics(
        recall={int(k): float((found <= k).double().mean()) for k in ks},
        median_rank=float(middle),
        mean_rank=float(found.mean()),
        mean_reciprocal_rank=float((1.0 / found).mean()),
        mean_average_precision=precision,
        map_at_r=at_r,
        num_queries=number,
        ranks=ranks,
    )
