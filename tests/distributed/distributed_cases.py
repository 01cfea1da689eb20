"""What runs inside a group of processes: cases, each of which all processes of the group run, in the same order.

Every process makes the whole batch from the same seed, takes its part of it, and holds the results against the whole
batch's loss in plain torch, with the matrix of logits stored.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import tlkernels.distributed as tld  # noqa: E402
from tlkernels.ops import contrastive as contrastive_ops  # noqa: E402

CASES: dict[str, tuple[tuple[int, ...], Callable[[], None]]] = {}
EXCHANGES = ("gather", "ring")
D = 5


def case(*worlds: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Run the function in groups of these sizes."""

    def register(run: Callable[[], None]) -> Callable[[], None]:
        CASES[run.__name__] = (worlds, run)
        return run

    return register


def run_group(rank: int, world: int, store: str, report: str) -> None:
    """Run, in one process of a group, all cases for groups of this size; write what failed to `report`.`rank`."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=20)
    )
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    results: dict[str, str] = {}
    for name, (worlds, run) in CASES.items():
        if world not in worlds:
            continue
        try:
            run()
            results[name] = ""
        except BaseException:
            results[name] = f"rank {rank}:\n{traceback.format_exc()}"
            break  # the others are told by the connection, not by a timeout
    Path(f"{report}.{rank}").write_text(json.dumps(results))
    if all(not r for r in results.values()):
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)


# ---- the whole batch ------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """A batch and its parts. `rows` and `columns` are the sizes of the parts."""

    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor
    rows: list[int]
    columns: list[int]
    rank: int

    def part(self, t: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        counts = self.rows if counts is None else counts
        return t.split(list(counts))[self.rank]

    def mine(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Leaves: this process's x and y, its copies of scale and bias."""
        parts = (self.part(self.x), self.part(self.y, self.columns), self.scale, self.bias)
        return tuple(t.detach().clone().requires_grad_() for t in parts)  # type: ignore[return-value]

    def whole(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of the whole batch, in float64."""
        whole = (self.x, self.y, self.scale, self.bias)
        return tuple(t.detach().double().requires_grad_() for t in whole)  # type: ignore[return-value]

    def labels(self) -> Tensor:
        """The column of each row, when row i of a part belongs to row i of the same part of y."""
        starts = torch.tensor([sum(self.columns[:r]) for r in range(len(self.rows))])
        return torch.cat([start + torch.arange(n) for start, n in zip(starts, self.rows, strict=True)])


def batch(
    seed: int, rows: list[int], columns: list[int] | None = None, *, dtype: torch.dtype = torch.float64,
    scale: float = 3.0, width: int = D, rank: int | None = None, near: float = 1.0,
) -> Batch:  # fmt: skip
    """Normalized features; `near` is how far a pair is apart."""
    generator = torch.Generator().manual_seed(seed)
    columns = rows if columns is None else columns
    x = torch.randn(sum(rows), width, dtype=torch.float64, generator=generator)
    y = torch.randn(sum(columns), width, dtype=torch.float64, generator=generator)
    made = Batch(x, y, torch.tensor(scale), torch.tensor(-0.7), rows, columns, rank_of() if rank is None else rank)
    y[made.labels()] = x * (1 - near) + near * y[made.labels()]
    made.x, made.y = F.normalize(x, dim=1).to(dtype), F.normalize(y, dim=1).to(dtype)
    if dtype == torch.float64:
        made.scale, made.bias = made.scale.double(), made.bias.double()
    return made


def rank_of() -> int:
    return dist.get_rank()


def world() -> int:
    return dist.get_world_size()


def sizes() -> list[list[int]]:
    """Sizes of the parts: equal, unequal, with an empty one, with a single pair."""
    w = world()
    unequal = [4, 1, 6, 3][:w]
    empty = [3, 0, 5, 2][:w]
    return [[4] * w, unequal, empty, [0] * (w - 1) + [3], [1] * w]


def logits_of(b: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    x, y, scale, bias = b
    return scale * x @ y.T + bias


def info_nce_of_rows(
    z: Tensor, labels: Tensor, *, symmetric: bool = True, decoupled: bool = False, smoothing: float = 0.0
) -> Tensor:  # fmt: skip
    """Each row's loss, 0 where its label is negative, by the formula."""
    chosen, column, i = labels >= 0, labels.clamp(min=0), torch.arange(len(labels))
    target = z[i, column]
    if smoothing:
        assert not decoupled
        loss = F.cross_entropy(z, column, label_smoothing=smoothing, reduction="none")
        if symmetric:
            loss = 0.5 * (loss + F.cross_entropy(z.T[column], i, label_smoothing=smoothing, reduction="none"))
        return torch.where(chosen, loss, 0.0)
    if decoupled:
        at = torch.zeros_like(z, dtype=torch.bool)
        at[i[chosen], column[chosen]] = True
        z = z.masked_fill(at, -torch.inf)
    loss = z.logsumexp(1) - target
    if symmetric:
        loss = 0.5 * (loss + z.logsumexp(0)[column] - target)
    return torch.where(chosen, loss, 0.0)


def sigmoid_of_rows(z: Tensor, labels: Tensor) -> Tensor:
    sign = -torch.ones_like(z)
    i = torch.arange(len(labels))
    sign[i[labels >= 0], labels[labels >= 0]] = 1.0
    return -F.logsigmoid(sign * z).sum(1)


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """The norm of the error relative to that of what is wanted, with something to be relative to where that is 0."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.isfinite().all(), f"{what}: not finite"
    error = float((got.double() - want.double()).norm())
    assert error <= tolerance * (1e-3 + float(want.double().norm())), f"{what}: off by {error:.3g}"


def total(t: Tensor) -> Tensor:
    t = t.detach().clone()
    dist.all_reduce(t)
    return t


def check_gradients(
    b: Batch, mine: Sequence[Tensor], whole: Sequence[Tensor], tolerance: float, what: str, times: float
) -> None:  # fmt: skip
    """`times`: the gradient of features is that of the sum over processes, of which `whole` has the mean's."""
    x, y, scale, bias = mine
    close(x.grad, times * b.part(whole[0].grad), tolerance, f"{what}: x.grad")  # type: ignore[arg-type, operator]
    close(y.grad, times * b.part(whole[1].grad, b.columns), tolerance, f"{what}: y.grad")  # type: ignore[arg-type, operator]
    close(scale.grad, whole[2].grad, tolerance, f"{what}: scale.grad")  # type: ignore[arg-type]
    if bias.grad is not None:
        # of the softmax losses it is 0: what is left is rounding, of terms that sum to 1
        assert float((bias.grad - whole[3].grad).abs()) < 40 * tolerance, f"{what}: bias.grad {bias.grad}"


# ---- losses ---------------------------------------------------------------------------------------------------------


def check_loss(
    b: Batch, loss: Callable[..., Tensor], of_rows: Callable[[Tensor], Tensor], pairs: int, tolerance: float, what: str
) -> None:  # fmt: skip
    """Value and gradients of both kinds of `local_loss`, with a grad_output of each process's own."""
    w, rank = world(), rank_of()
    factor = [1.0 + 0.5 * r for r in range(w)]
    for local_loss in (True, False):
        mine, whole = b.mine(), b.whole()
        got = loss(*mine, local_loss=local_loss)
        each = of_rows(logits_of(whole))
        mean = each.sum() / max(pairs, 1)
        where = f"{what}, local_loss={local_loss}, rows={b.rows}"
        want = w / max(pairs, 1) * b.part(each).sum() if local_loss else mean
        close(got.detach(), want.detach(), tolerance, f"{where}: loss")
        (got * factor[rank]).backward()
        per_row = torch.cat([torch.full((n,), f) for n, f in zip(b.rows, factor, strict=True)]).double()
        scored = each * (per_row if local_loss else sum(factor) / w)
        (scored.sum() / max(pairs, 1)).backward()
        check_gradients(b, mine, whole, tolerance, where, w)


@case(1, 2, 3, 4)
def info_nce_in_float64() -> None:
    for exchange in EXCHANGES:
        for seed, rows in enumerate(sizes()):
            for symmetric, decoupled in ((True, False), (False, False), (True, True)):
                if not (symmetric and not decoupled) and seed not in (1, 4):
                    continue
                if decoupled and sum(rows) < 2:
                    continue  # a sum over nothing
                b = batch(seed, rows)
                check_loss(
                    b,
                    lambda *m, s=symmetric, d=decoupled, e=exchange, **k: tld.info_nce(
                        *m, symmetric=s, decoupled=d, exchange=e, **k
                    ),
                    lambda z, s=symmetric, d=decoupled, b=b: info_nce_of_rows(z, b.labels(), symmetric=s, decoupled=d),
                    sum(rows),
                    1e-12,
                    f"{exchange}, symmetric={symmetric}, decoupled={decoupled}",
                )


@case(2, 3)
def info_nce_with_labels() -> None:
    """More candidates than anchors, labels of the own part, some twice, some ignored."""
    rows, columns = [4, 2, 0, 5][: world()], [6, 3, 4, 5][: world()]
    local = [torch.tensor(t) for t in ([5, 0, -100, 0], [2, -100], [], [1, 1, 3, -100, 4])][: world()]
    local = [t.long() for t in local]
    starts = [sum(columns[:r]) for r in range(world())]
    labels = torch.cat([torch.where(t >= 0, t + s, -1) for t, s in zip(local, starts, strict=True)])
    b = batch(3, rows, columns)
    for exchange in EXCHANGES:
        for decoupled in (False, True):
            check_loss(
                b,
                lambda *m, e=exchange, d=decoupled, **k: tld.info_nce(
                    *m, local[rank_of()], exchange=e, decoupled=d, **k
                ),
                lambda z, d=decoupled: info_nce_of_rows(z, labels, decoupled=d),
                int((labels >= 0).sum()),
                1e-12,
                f"{exchange}, decoupled={decoupled}",
            )


@case(1, 2, 3)
def info_nce_with_label_smoothing() -> None:
    """Spread over the candidates of all processes; parts of unequal size, labels that are ignored, a frozen y."""
    rows, columns = [4, 2, 0][: world()], [6, 3, 4][: world()]
    local = [torch.tensor(t).long() for t in ([5, 0, -100, 0], [2, -100], [])][: world()]
    starts = [sum(columns[:r]) for r in range(world())]
    labels = torch.cat([torch.where(t >= 0, t + s, -1) for t, s in zip(local, starts, strict=True)])
    for exchange in EXCHANGES:
        for symmetric in (True, False):
            paired = batch(5, [3, 1, 0][: world()])
            for b, given, at in (
                (batch(3, rows, columns), local[rank_of()], labels), (paired, None, paired.labels())
            ):  # fmt: skip
                check_loss(
                    b,
                    lambda *m, e=exchange, s=symmetric, g=given, **k: tld.info_nce(
                        *m, g, exchange=e, symmetric=s, label_smoothing=0.3, **k
                    ),
                    lambda z, s=symmetric, at=at: info_nce_of_rows(z, at, symmetric=s, smoothing=0.3),
                    int((at >= 0).sum()),
                    1e-12,
                    f"{exchange}, symmetric={symmetric}",
                )
        b = batch(6, [2] * world())
        whole, mine = b.whole(), list(b.mine())
        info_nce_of_rows(logits_of(whole), b.labels(), smoothing=0.3).mean().backward()
        mine[1].requires_grad_(rank_of() != 0)
        mine[2].requires_grad_(rank_of() == 0)
        tld.info_nce(*mine, label_smoothing=0.3, exchange=exchange).backward()
        close(mine[0].grad, world() * b.part(whole[0].grad), 1e-12, "x")
        if rank_of() != 0:
            close(mine[1].grad, world() * b.part(whole[1].grad), 1e-12, "y")
        else:
            close(mine[2].grad, whole[2].grad, 1e-12, "scale")
        for dtype, tolerance in ((torch.float32, 4e-6), (torch.bfloat16, 8e-3)):
            b = batch(7, [3, 5, 2][: world()], dtype=dtype, scale=14.0, near=0.5)
            mine, whole = b.mine(), b.whole()
            with torch.autocast("cpu", torch.bfloat16):  # which must not lower the products with mean features
                got = tld.info_nce(*mine, label_smoothing=0.3, exchange=exchange, local_loss=False)
            want = info_nce_of_rows(logits_of(whole), b.labels(), smoothing=0.3).mean()
            close(got.detach(), want.detach(), tolerance, f"{dtype}")
            got.backward()
            want.backward()
            check_gradients(b, mine, whole, tolerance, f"{dtype}", world())


@case(1, 2)
def labels_that_could_not_be_looked_at() -> None:
    """On a GPU values are not read: a label beyond the own columns is none, and never a column of the next process."""
    b = batch(3, [3] * world(), [4] * world())
    readable = contrastive_ops._readable
    contrastive_ops._readable = lambda t: False
    try:
        for exchange in EXCHANGES:
            found = []
            for beyond in (4, -1):
                mine, labels = b.mine(), torch.tensor([0, 1, beyond])
                lse = tld.sim_lse(*mine, labels=labels, exclude=labels.roll(1), exchange=exchange)
                (lse.nll_row @ torch.tensor([1.0, 2.0, 3.0]).double() + lse.nll_col.square().sum()).backward()
                found.append([*(t.detach() for t in lse), *(t.grad for t in mine)])
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
    finally:
        contrastive_ops._readable = readable


@case(1, 2)
def many_float16() -> None:
    """The gradient of the sum over all pairs is beyond the range of float16, that of the mean is not."""
    n = 4096 // world()
    for exchange in EXCHANGES:
        x, y = (torch.full((n, 4), 0.5, dtype=torch.float16, requires_grad=True) for _ in range(2))
        tld.sigmoid_contrastive(x, y, 100.0, -100.0, exchange=exchange).backward()
        wanted = torch.full((n, 4), 50.0 * (0.5 - 1 / 4096) * world())
        for t in (x, y):
            torch.testing.assert_close(t.grad.float(), wanted, rtol=2e-3, atol=0)  # type: ignore[union-attr]


@case(1, 2, 3, 4)
def sigmoid_in_float64() -> None:
    for exchange in EXCHANGES:
        for seed, rows in enumerate(sizes()[1:4]):
            b = batch(seed, rows)
            check_loss(
                b,
                lambda *m, e=exchange, **k: tld.sigmoid_contrastive(*m, exchange=e, **k),
                lambda z, b=b: sigmoid_of_rows(z, b.labels()),
                sum(rows),
                1e-12,
                f"{exchange}",
            )
        rows, columns = [2, 4, 0, 3][: world()], [3, 4, 1, 5][: world()]
        local = [torch.tensor(t).long() for t in ([2, -100], [0, 3, 3, -100], [], [4, 0, 1])][: world()]
        starts = [sum(columns[:r]) for r in range(world())]
        labels = torch.cat([torch.where(t >= 0, t + s, -1) for t, s in zip(local, starts, strict=True)])
        check_loss(
            batch(4, rows, columns),
            lambda *m, e=exchange, local=local, **k: tld.sigmoid_contrastive(
                *m, labels=local[rank_of()], exchange=e, **k
            ),
            lambda z, labels=labels: sigmoid_of_rows(z, labels),
            sum(rows),
            1e-12,
            f"{exchange}, labels",
        )


@case(2, 3)
def float32_and_16_bits() -> None:
    """Held against float64 from the same rounded features, up to a scale of 100."""
    for dtype, tolerance in ((torch.float32, 4e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        for exchange in EXCHANGES:
            for scale in (14.0, 100.0):
                rows = [3, 5, 2, 4][: world()]
                b = batch(7, rows, dtype=dtype, scale=scale, near=0.5)
                # at 100 a rounding of a logit is 4e-6, and a loss may be smaller than 1
                loose = tolerance * (10 if scale == 100.0 else 1)
                for loss, of_rows in ((tld.info_nce, info_nce_of_rows), (tld.sigmoid_contrastive, sigmoid_of_rows)):
                    mine, whole = b.mine(), b.whole()
                    got = loss(*mine, exchange=exchange)
                    assert got.dtype == torch.float32 and mine[0].grad is None
                    each = of_rows(logits_of(whole), b.labels())
                    what = f"{loss.__name__} {dtype} {exchange} {scale}"
                    close(got.detach(), world() / sum(rows) * b.part(each).sum().detach(), loose, f"{what}: loss")
                    got.backward()
                    (each.sum() / sum(rows)).backward()
                    assert mine[0].grad.dtype == mine[1].grad.dtype == dtype and mine[2].grad.dtype == torch.float32
                    check_gradients(b, mine, whole, loose, what, world())


@case(2, 3)
def losses_near_zero() -> None:
    """Each pair is far nearer than all others: a loss of 1e-4, and not that less a rounding of a log-sum-exp of 10."""
    rows = [2] * world()
    x = torch.eye(sum(rows), dtype=torch.float64)
    for exchange in EXCHANGES:
        b = Batch(x.float(), x.float(), torch.tensor(10.0), torch.tensor(0.0), rows, rows, rank_of())
        lse = tld.sim_lse(*b.mine(), labels=torch.arange(2), exchange=exchange)
        want = torch.full((2,), math.log1p((sum(rows) - 1) * math.exp(-10.0)))
        for nll in (lse.nll_row, lse.nll_col):
            torch.testing.assert_close(nll.detach(), want, rtol=2e-3, atol=0.0)


@case(1, 2, 3, 4)
def log_sum_exps() -> None:
    """Any function of the four outputs has exact gradients, with and without labels, columns and exclusions."""
    rows, columns = [3, 5, 0, 2][: world()], [4, 5, 2, 6][: world()]
    b = batch(11, rows, columns)
    own, first = columns[rank_of()], sum(columns[: rank_of()])
    generator = torch.Generator().manual_seed(5)
    local = [torch.randint(0, m, (n,), generator=generator) for n, m in zip(rows, columns, strict=True)]
    out = [torch.where(t % 2 == 0, t, -1) for t in local]
    starts = [sum(columns[:r]) for r in range(world())]
    labels = torch.cat([t + s for t, s in zip(local, starts, strict=True)])
    exclude = torch.cat([torch.where(t >= 0, t + s, -1) for t, s in zip(out, starts, strict=True)])
    for exchange in EXCHANGES:
        for with_labels, with_exclude, cols in ((1, 1, True), (1, 0, True), (0, 0, True), (1, 0, False)):
            what = f"{exchange} {with_labels} {with_exclude} {cols}"
            mine, whole = b.mine(), b.whole()
            got = tld.sim_lse(
                *mine, labels=local[rank_of()] if with_labels else None, cols=cols, exchange=exchange,
                exclude=out[rank_of()] if with_exclude else None,
            )  # fmt: skip
            z = logits_of(whole)
            kept = z
            if with_exclude:
                at = exclude[:, None] == torch.arange(sum(columns))
                kept = z.masked_fill(at, -torch.inf)
            row, col = kept.logsumexp(1), kept.logsumexp(0)
            target = z.gather(1, labels[:, None])[:, 0]
            want = [b.part(row), col[first : first + own], b.part(row - target), b.part(col[labels] - target)]
            used = [True, cols, bool(with_labels), bool(with_labels) and cols]
            loss, reference = torch.zeros(()).double(), torch.zeros(()).double()
            generator = torch.Generator().manual_seed(9)
            for k, (g, v, whole_v) in enumerate(
                zip(got, want, (row, col, row - target, col[labels] - target), strict=True)
            ):
                weights = torch.randn(whole_v.shape, dtype=torch.float64, generator=generator)
                if not used[k]:
                    assert g.numel() == 0
                    continue
                close(g.detach(), v.detach(), 1e-12, f"{what}: output {k}")
                counts = columns if k == 1 else rows
                loss = loss + (g * weights.split(counts)[rank_of()]).sum()
                reference = reference + (whole_v * weights).sum()
            loss.backward()
            reference.backward()
            for t in whole[2:]:
                t.grad /= world()  # the mean over processes
            check_gradients(b, mine, whole, 1e-11, what, 1.0)


@case(2)
def what_needs_a_gradient() -> None:
    """Frozen towers, numbers for scalars, no gradients at all."""
    b = batch(2, [3] * world())
    for exchange in EXCHANGES:
        for loss, of_rows in ((tld.info_nce, info_nce_of_rows), (tld.sigmoid_contrastive, sigmoid_of_rows)):
            whole = b.whole()
            of_rows(logits_of(whole), b.labels()).mean().backward()
            for frozen in ((0,), (1,), (0, 1), (2, 3), (0, 2, 3)):
                mine = list(b.mine())
                for k in frozen:
                    mine[k].requires_grad_(False)
                loss(*mine, exchange=exchange).backward()
                what = f"{loss.__name__} {exchange} without {frozen}"
                assert [t.grad is None for t in mine] == [k in frozen for k in range(4)], what
                if 0 not in frozen:
                    close(mine[0].grad, world() * b.part(whole[0].grad), 1e-12, what)
                if 1 not in frozen:
                    close(mine[1].grad, world() * b.part(whole[1].grad), 1e-12, what)
                if 2 not in frozen:
                    close(mine[2].grad, whole[2].grad, 1e-12, what)
            x, y, _, _ = b.mine()
            numbers = loss(x, y, 3.0, -0.7, exchange=exchange)
            with torch.no_grad():
                silent = loss(x, y, 3.0, -0.7, exchange=exchange)
            assert not silent.requires_grad
            close(silent, numbers.detach(), 1e-14, "no_grad")
            # a process whose y is frozen still adds to the gradients of the others'
            mine = list(b.mine())
            mine[1].requires_grad_(rank_of() != 0)
            loss(*mine, exchange=exchange).backward()
            if rank_of() != 0:
                close(mine[1].grad, world() * b.part(whole[1].grad), 1e-12, "y of some")


@case(2, 3)
def not_a_number() -> None:
    """A NaN of one process is everyone's, whichever way the features meet."""
    for exchange in EXCHANGES:
        for loss in (tld.info_nce, tld.sigmoid_contrastive):
            mine = batch(1, [2] * world()).mine()
            if rank_of() == world() - 1:
                with torch.no_grad():
                    mine[1][0, 0] = torch.nan
            got = loss(*mine, exchange=exchange)
            assert got.isnan(), f"{exchange} {loss.__name__}: {got}"
            got.backward()
            assert mine[0].grad.isnan().any()  # type: ignore[union-attr]


@case(1, 2)
def twice_raises() -> None:
    b = batch(1, [3] * world())
    for exchange in EXCHANGES:
        for loss in (tld.info_nce, tld.sigmoid_contrastive):
            mine = b.mine()
            (grad,) = torch.autograd.grad(loss(*mine, exchange=exchange), mine[:1], create_graph=True)
            says("may be differentiated once", lambda grad=grad: (mine[0].sum() + grad.sum()).backward())  # noqa: B023


@case(2, 3)
def modules() -> None:
    """The modules compute what the functions do, and are those of one process over the whole batch."""
    from tlkernels import nn as one

    b = batch(8, [3, 4, 2][: world()], dtype=torch.float32)
    whole, n = b.whole(), sum(b.rows)
    hard = F.normalize(torch.randn(2 * world(), D, generator=torch.Generator().manual_seed(1)), dim=1)
    for exchange in EXCHANGES:
        x, y, scale, bias = b.mine()
        options = {"exchange": exchange, "local_loss": False}
        clip, siglip = tld.CLIPLoss(**options), tld.SigLIPLoss(**options)
        close(clip(x, y, scale).detach(), one.CLIPLoss()(*whole[:3]).detach(), 1e-5, "CLIPLoss")
        assert set(clip(x, y, scale, bias, output_dict=True)) == {"contrastive_loss"}
        close(siglip(x, y, scale).detach(), one.SigLIPLoss()(*whole[:3]).detach(), 1e-5, "SigLIPLoss")
        assert set(siglip(x, y, scale, bias, output_dict=True)) == {"contrastive_loss"}
        assert exchange in repr(clip) and exchange in repr(siglip)
        nce = tld.InfoNCELoss(0.2, learnable_temperature=True, **options)
        same = one.InfoNCELoss(0.2, learnable_temperature=True, in_batch=True).double()
        mine = hard.split(2)[rank_of()]
        loss, reference = nce(2 * x, y, mine), same(whole[0], whole[1], hard.double())
        close(loss.detach(), reference.detach(), 1e-5, "InfoNCELoss")
        loss.backward()
        reference.backward()
        smooth = tld.InfoNCELoss(0.2, decoupled=True, label_smoothing=0.1, **options)
        assert "label_smoothing=0.1, decoupled=True" in repr(smooth)
        plain = tld.info_nce(x, y, 5.0, symmetric=False, decoupled=True, label_smoothing=0.1, **options)
        torch.testing.assert_close(smooth(2 * x, y), plain, rtol=1e-5, atol=1e-6)
        close(nce.logit_scale.grad, same.logit_scale.grad, 1e-5, "InfoNCELoss: logit_scale.grad")
        assert nce.logit_scale.grad != 0 and f"exchange='{exchange}'" in repr(nce)
        lowered = torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16):
            lowered = clip(x.bfloat16(), y, scale)  # of two dtypes: autocast makes them one
        close(lowered.detach(), one.CLIPLoss()(*whole[:3]).detach(), 2e-2, "autocast")
        assert n == sum(b.rows) and lowered.dtype == torch.float32


class _Seen(TorchDispatchMode):
    """The tiles that are computed, and the most rows of any tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.tiles: list[tuple[str, int, int]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "tlkernels":
            self.tiles.append((func._opname, args[0].shape[0], args[1].shape[0]))
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.dim():
                self.most = max(self.most, max(t.shape))
        return out


@case(2, 4)
def work_and_memory() -> None:
    """Each process computes its rows against all columns once; around the ring, nothing is as large as the batch."""
    rows = [40] * world()
    b = batch(6, rows)
    for loss, forward, backward in (
        (tld.info_nce, "sim_lse", "sim_lse_backward"),
        (tld.sigmoid_contrastive, "sigmoid_contrastive", "sigmoid_contrastive_backward"),
    ):
        for exchange in EXCHANGES:
            mine = b.mine()
            with _Seen() as seen:
                loss(*mine, exchange=exchange).backward()
            one_pass = loss is tld.sigmoid_contrastive and exchange == "gather"
            names = ["sigmoid_contrastive_sum"] if one_pass else [forward, backward]
            for name in names:
                tiles = [(n, m) for op, n, m in seen.tiles if op == name]
                assert tiles == ([(40, 40 * world())] if exchange == "gather" else [(40, 40)] * world()), (name, tiles)
            assert len(seen.tiles) == sum(op in names for op, _, _ in seen.tiles), seen.tiles
            if exchange == "ring":
                assert seen.most == 40, seen.most


@case(3, 4)
def subset_of_the_world() -> None:
    """A group of two of the processes, in another order than theirs; the others are told that they are none of it."""
    members = [2, 0]
    group = dist.new_group(members, use_local_synchronization=False)
    inside = rank_of() in members
    if not inside:
        says(
            "process_group does not hold this process",
            lambda: tld.info_nce(*batch(0, [1] * 4).mine(), process_group=group),
        )
    else:
        place = dist.get_rank(group)
        b = batch(5, [3, 2], rank=place)
        for exchange in EXCHANGES:
            for loss, of_rows in ((tld.info_nce, info_nce_of_rows), (tld.sigmoid_contrastive, sigmoid_of_rows)):
                mine, whole = b.mine(), b.whole()
                got = loss(*mine, process_group=group, exchange=exchange, local_loss=False)
                want = of_rows(logits_of(whole), b.labels()).mean()
                close(got.detach(), want.detach(), 1e-12, "subset: loss")
                got.backward()
                want.backward()
                check_gradients(b, mine, whole, 1e-12, f"subset {exchange}", 2)
    dist.barrier()


# ---- wrong calls ----------------------------------------------------------------------------------------------------


def says(text: str, run: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...] = Exception) -> None:
    try:
        run()
    except error as raised:
        assert text in str(raised), f"said {str(raised)!r}, not {text!r}"
    else:
        raise AssertionError(f"did not raise {text!r}")


@case(2, 3)
def wrong_calls_raise_everywhere() -> None:
    """One process is wrong, all raise, none waits; the group is of use afterwards."""
    first = rank_of() == 0
    b = batch(0, [3] * world())

    def agree(**changes: Any) -> Callable[[], Tensor]:
        x, y, scale, bias = b.mine()
        given = {"x": x, "y": y, "logit_scale": scale, "logit_bias": bias} | changes
        return lambda: tld.info_nce(**given)

    wide = batch(0, [3] * world(), width=D + first).mine()
    says(f"info_nce: the processes differ in the number of features: D = {D + 1} on rank 0; D = {D} on rank 1",
         agree(x=wide[0], y=wide[1]), ValueError)  # fmt: skip
    low = batch(0, [3] * world(), dtype=torch.bfloat16 if first else torch.float32).mine()
    says("the dtype of the features: bfloat16 on rank 0; float32 on rank 1", agree(x=low[0], y=low[1]), ValueError)
    says("differ in what they call", agree(exchange="ring" if first else "gather"), ValueError)
    says("differ in what they call", agree(symmetric=first), ValueError)
    says("differ in what they call", agree(label_smoothing=0.1 if first else 0.2), ValueError)
    says("differ in what they call", agree(logit_bias=None if first else 0.5), ValueError)
    other = tld.sigmoid_contrastive if first else tld.info_nce
    says("differ in what they call", lambda: other(*b.mine()), ValueError)
    frozen = [t.requires_grad_(not first) for t in b.mine()]
    says("differ in gradients: not recorded on rank 0; recorded on rank 1", lambda: tld.info_nce(*frozen), ValueError)

    for changes, own in (
        ({"x": torch.ones(3)}, "x has shape (3,); expected (N, D)"),
        ({"x": [1.0]}, "x is list; expected a tensor"),
        ({"y": torch.ones(3, D + 2, dtype=torch.float64)}, "y has shape"),
        ({"y": torch.ones(2, D, dtype=torch.float64)}, "y has 2 rows; expected 3 or more, like x"),
        ({"labels": [0, 1, 2]}, "labels is list; expected a tensor"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; expected 0 <= label_smoothing <= 1"),
        ({"labels": torch.tensor([0, 1, 3])}, "labels has an entry 3; expected less than 3"),
        ({"labels": torch.tensor([0, 1, -7])}, "labels has an entry -7"),
        ({"logit_scale": torch.ones(2)}, "logit_scale has shape (2,)"),
        ({"logit_scale": "1"}, "logit_scale is str"),
        (dict.fromkeys("xy", torch.ones(3, D, device="meta")), "x is on meta; expected cpu"),
        ({"exchange": "mail"}, "exchange is 'mail'; expected 'gather' or 'ring'"),
    ):
        if first:
            says(own, agree(**changes))
        else:
            says("info_nce: rank 0 of the group refused its arguments", agree(), RuntimeError)

    for loss, name in ((tld.CLIPLoss(), "CLIPLoss"), (tld.SigLIPLoss(exchange="ring"), "SigLIPLoss")):
        x, y, scale, bias = b.mine()
        if first:
            says(f"{name}: text_features has 2 rows; expected 3", lambda: loss(x, y[:2], scale, bias), ValueError)  # noqa: B023
        else:
            says(f"{name}: rank 0 of the group", lambda: loss(x, y, scale, bias), RuntimeError)  # noqa: B023
        if first:
            says(f"{name}: image_features is list", lambda: loss([1.0], y, scale, bias), TypeError)  # noqa: B023
        else:
            says(f"{name}: rank 0 of the group", lambda: loss(x, y, scale, bias), RuntimeError)  # noqa: B023
    nce = tld.InfoNCELoss()
    x, y, _, _ = b.mine()
    if first:
        says("InfoNCELoss: negative_keys has shape (2, 9)", lambda: nce(x, y, torch.ones(2, 9).double()), ValueError)
    else:
        says("InfoNCELoss: rank 0 of the group", lambda: nce(x, y), RuntimeError)
    assert tld.info_nce(*b.mine()).isfinite()


# ---- peers ----------------------------------------------------------------------------------------------------------


def averaged(grads: Sequence[Tensor | None]) -> list[Tensor]:
    """What DDP makes of gradients."""
    return [total(g) / world() for g in grads if g is not None]


class Towers(nn.Module):
    """Two encoders, a scale and a bias. The weights are the same on every process."""

    def __init__(self, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.image = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)).to(dtype)
            self.text = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)).to(dtype)
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=dtype))
        self.bias = nn.Parameter(torch.tensor(-0.5, dtype=dtype))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return x, y, self.scale.exp(), self.bias


def samples(rows: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(21)
    return tuple(torch.randn(sum(rows), k, dtype=torch.float64, generator=generator) for k in (6, 3))  # type: ignore[return-value]


def reference_gradients(
    rows: list[int], of_rows: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    model = Towers()
    x, y, scale, bias = model(*samples(rows))
    loss = of_rows(scale * x @ y.T + bias, torch.arange(sum(rows))).mean()
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@case(1, 2, 3, 4)
def open_clip() -> None:
    """The loss that each process returns, the gradients of features, and those of parameters after DDP's mean."""
    from bench.peers import submodule

    peers = submodule("open_clip.loss")
    b = batch(13, [4] * world(), dtype=torch.float32, scale=10.0)
    place = {"rank": rank_of(), "world_size": world()}
    warnings.simplefilter("ignore", FutureWarning)  # of the collectives that they call
    for exchange in EXCHANGES:
        for local_loss in (True, False):
            theirs = peers.ClipLoss(local_loss=local_loss, gather_with_grad=True, **place)
            ours = tld.CLIPLoss(local_loss=local_loss, exchange=exchange)
            compare_with_peer(b, theirs, ours)
        for implementation in ("bidir", "shift", "reduce", "gather"):
            theirs = peers.SigLipLoss(dist_impl=implementation, **place)
            compare_with_peer(b, theirs, tld.SigLIPLoss(exchange=exchange))


def compare_with_peer(b: Batch, theirs: nn.Module, ours: nn.Module) -> None:
    mine, peer = b.mine(), b.mine()
    got, want = ours(*mine), theirs(*peer)
    close(got.detach(), want.detach(), 1e-5, f"{type(theirs).__name__}: loss")
    got.backward()
    want.backward()
    for k, name in enumerate(("x", "y")):
        close(mine[k].grad, peer[k].grad, 2e-5, f"{type(theirs).__name__}: {name}.grad")
    (scale, bias), (peer_scale, peer_bias) = ([t.grad for t in m[2:]] for m in (mine, peer))
    close(scale, averaged([peer_scale])[0], 2e-5, f"{type(theirs).__name__}: scale.grad")
    assert float((bias - averaged([peer_bias])[0]).abs()) < 1e-5


@case(1, 2, 3, 4)
def under_ddp() -> None:
    """Parameters get the gradient of the whole batch's mean, with parts of any size."""
    rows = [5, 2, 4, 1][: world()]
    images, texts = (t.split(rows)[rank_of()] for t in samples(rows))
    for of_rows, module in ((info_nce_of_rows, tld.CLIPLoss), (sigmoid_of_rows, tld.SigLIPLoss)):
        _, want = reference_gradients(rows, of_rows)
        for exchange in EXCHANGES:
            for local_loss in (True, False):
                model = Towers()
                parallel = DistributedDataParallel(model)  # held: its hooks go when it goes
                loss = module(exchange=exchange, local_loss=local_loss)
                loss(*parallel(images, texts)).backward()
                for name, p in model.named_parameters():
                    close(p.grad, want[name], 1e-11, f"{module.__name__} {exchange} {local_loss}: {name}")


@case(2, 3)
def under_fsdp2() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world(),))
    rows = [5, 2, 4][: world()]
    images, texts = (t.split(rows)[rank_of()] for t in samples(rows))
    _, want = reference_gradients(rows, info_nce_of_rows)
    for exchange in EXCHANGES:
        model = Towers()
        # a parameter without dimensions cannot be sharded
        scalars = {model.scale, model.bias}
        for tower in (model.image, model.text):
            fully_shard(tower, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=scalars)
        x, y, scale, bias = model(images, texts)
        tld.CLIPLoss(exchange=exchange)(x, y, scale, bias).backward()
        for name, p in model.named_parameters():
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            close(grad, want[name], 1e-11, f"{exchange}: {name}")


# ---- GradCache ------------------------------------------------------------------------------------------------------


@case(1, 2, 3)
def grad_cache_under_ddp() -> None:
    """One encoder each in DDP, chunks of unequal parts, an empty part; the gradient is exchanged once."""
    for rows in ([5, 3, 4][: world()], [2, 0, 7][: world()]):
        images, texts = (t.split(rows)[rank_of()] for t in samples(rows))
        _, want = reference_gradients(rows, info_nce_of_rows)
        for exchange in EXCHANGES:
            model = Towers()
            towers = [DistributedDataParallel(model.image), DistributedDataParallel(model.text)]
            syncs = [0, 0]
            for k, tower in enumerate(towers):
                tower.register_comm_hook(k, lambda k, bucket, syncs=syncs: counted(k, bucket, syncs))
            loss = tld.CLIPLoss(exchange=exchange, local_loss=False)

            def unit(x: Tensor, y: Tensor, loss: nn.Module = loss, model: Towers = model) -> Tensor:
                return loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), model.scale.exp(), model.bias)

            cache = tld.GradCache(towers, 2, unit)
            got = cache.step(images, texts)
            close(got, reference_gradients(rows, info_nce_of_rows)[0], 1e-12, "loss")
            for name, p in model.named_parameters():
                close(p.grad, want[name], 1e-11, f"{exchange}: {name}")
            assert syncs == [1, 1], syncs


def counted(k: int, bucket: Any, syncs: list[int]) -> Any:
    syncs[k] += 1
    return dist.all_reduce(bucket.buffer() / world(), async_op=True).get_future().then(lambda f: f.value()[0])


@case(2)
def grad_cache_shared_ddp() -> None:
    """Both towers in one DDP module, used through functions: it is named, and communicates in the very last chunk."""

    class Either(Towers):
        def forward(self, images: Tensor | None, texts: Tensor | None) -> Tensor:  # type: ignore[override]
            return F.normalize(self.text(texts) if images is None else self.image(images), dim=-1)

    rows = [5, 3]
    images, texts = (t.split(rows)[rank_of()] for t in samples(rows))
    _, want = reference_gradients(rows, sigmoid_of_rows)
    inner = Either()
    scale, bias = nn.Parameter(inner.scale.detach().clone()), nn.Parameter(inner.bias.detach().clone())
    del inner.scale, inner.bias
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    cache = tld.GradCache(
        [lambda t: model(t, None), lambda t: model(None, t)], [2, 3],
        lambda x, y: tld.sigmoid_contrastive(x, y, scale.exp(), bias), modules=[model],
    )  # fmt: skip
    cache.step(images, texts)
    for name, p in inner.named_parameters():
        close(p.grad, want[name], 1e-11, name)
    close(scale.grad, want["scale"], 1e-11, "scale")
    close(bias.grad, want["bias"], 1e-11, "bias")


@case(2)
def grad_cache_under_fsdp2() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world(),))
    rows = [5, 6]  # as many chunks
    images, texts = (t.split(rows)[rank_of()] for t in samples(rows))
    _, want = reference_gradients(rows, info_nce_of_rows)
    model = Towers()
    towers = [fully_shard(model.image, mesh=mesh), fully_shard(model.text, mesh=mesh)]
    loss = tld.CLIPLoss(exchange="ring")
    cache = tld.GradCache(
        towers, 2, lambda x, y: loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), model.scale.exp(), model.bias)
    )
    cache.step(images, texts)
    for name, p in model.named_parameters():
        close(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad, want[name], 1e-11, name)


# ---- a process dies -------------------------------------------------------------------------------------------------


def die(rank: int, world: int, store: str, report: str, exchange: str, when: str) -> None:
    """The last process leaves without a word; the others write what they were told, or that they were not."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=4)
    )
    torch.set_num_threads(1)
    b = batch(0, [3] * world)
    tld.info_nce(*b.mine(), exchange=exchange).backward()  # connections are there
    if rank == world - 1:
        if when == "backward":
            tld.info_nce(*b.mine(), exchange=exchange)
        os._exit(1)
    said = "nothing"
    try:
        tld.info_nce(*b.mine(), exchange=exchange).backward()
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
    Path(f"{report}.{rank}").write_text(said)
    os._exit(0)


__all__ = ["CASES", "die", "run_group"]
