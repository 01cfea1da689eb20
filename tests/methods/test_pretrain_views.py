"""BYOL, SimSiam, Barlow Twins, VICReg, SwAV, DINO, iBOT: against closed forms and lightly, on one and two processes."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.peers import submodule
from tlkernels.methods import pretrain


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def views(number: int, rows: int = 6, features: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(rows, features, dtype=dtype).mul_(3).requires_grad_() for _ in range(number)]


def agree(loss: Callable[..., Tensor], formula: Callable[..., Tensor], *tensors: Tensor, tol: float = 1e-11) -> None:
    """Values and the gradients of 1.7 times the loss."""
    values, gradients = [], []
    for f in (loss, formula):
        value = f(*tensors)
        wanted = [t for t in tensors if t.requires_grad]
        gradients.append(torch.autograd.grad(1.7 * value, wanted, materialize_grads=True))
        values.append(value.detach())
    torch.testing.assert_close(values[0], values[1], rtol=tol, atol=tol)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)


def in_two_processes(work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """Run ``work(rank, reduce)`` in two threads whose `reduce` adds up their tensors, in one graph."""
    barrier, slots, results, errors = threading.Barrier(2, timeout=30), [torch.empty(0)] * 2, [None] * 2, []

    def run(rank: int) -> None:
        def reduce(x: Tensor) -> Tensor:
            slots[rank] = x
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        try:
            results[rank] = work(rank, reduce)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


# ---- BYOL and SimSiam ------------------------------------------------------------------------------------------------


def test_byol_and_simsiam() -> None:
    p1, p2, z1, z2 = views(4)
    z1, z2 = z1.detach(), z2.detach()

    def distance(p: Tensor, z: Tensor) -> Tensor:
        return (p / p.norm(dim=1, keepdim=True) - z / z.norm(dim=1, keepdim=True)).square().sum(1).mean()

    agree(pretrain.byol_loss, lambda p1, p2, z1, z2: distance(p1, z2) + distance(p2, z1), p1, p2, z1, z2)
    agree(pretrain.simsiam_loss, lambda p1, p2, z1, z2: (distance(p1, z2) + distance(p2, z1)) / 4 - 1, p1, p2, z1, z2)
    peer = submodule("lightly.loss.negative_cosine_similarity").NegativeCosineSimilarity()
    agree(pretrain.negative_cosine_similarity, peer, p1, z1)
    agree(pretrain.simsiam_loss, lambda p1, p2, z1, z2: 0.5 * (peer(p1, z2) + peer(p2, z1)), p1, p2, z1, z2)


def test_targets_get_no_gradient() -> None:
    p1, p2, z1, z2 = views(4)
    for loss in (pretrain.byol_loss, pretrain.simsiam_loss):
        loss(p1, p2, z1, z2).backward()
        assert z1.grad is None and z2.grad is None and p1.grad is not None and p2.grad is not None
    opposite = pretrain.byol_loss(p1, p2, -2 * p2, -3 * p1)
    assert opposite.item() == pytest.approx(8) and pretrain.byol_loss(p1, p2, p2, p1).item() == pytest.approx(0)
    assert pretrain.simsiam_loss(p1, p2, p2, p1).item() == pytest.approx(-1)


def test_cosines_of_low_precision() -> None:
    p, z = views(2, 16, 64, torch.float32)
    exact = pretrain.negative_cosine_similarity(p.double(), z.double()).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert pretrain.negative_cosine_similarity(p, z).item() == pytest.approx(exact, rel=1e-5)
    large, small = (p.detach() * 3e3).half(), (z.detach() * 1e-2).half()
    loss = pretrain.negative_cosine_similarity(large, small)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, abs=1e-3)
    zero = torch.zeros(2, 3, requires_grad=True)
    pretrain.negative_cosine_similarity(zero, torch.ones(2, 3)).backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


def test_siamese_wrong_calls() -> None:
    p1, p2, z1, z2 = views(4)
    with pytest.raises(ValueError, match=r"byol_loss: z1 has dtype float64 and shape \(2, 5\); expected .* like p2"):
        pretrain.byol_loss(p1, p2, z1[:2], z2)
    with pytest.raises(ValueError, match="simsiam_loss: p1 has 0 rows; expected at least 1"):
        pretrain.simsiam_loss(p1[:0], p2[:0], z1[:0], z2[:0])


# ---- Barlow Twins and VICReg -----------------------------------------------------------------------------------------


def barlow_formula(a: Tensor, b: Tensor, lambd: float, eps: float) -> Tensor:
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + eps).sqrt() for z in (a, b))
    loss = a.new_zeros(())
    for i in range(a.shape[1]):
        for j in range(a.shape[1]):
            c = (a[:, i] * b[:, j]).mean()
            loss = loss + ((1 - c) ** 2 if i == j else lambd * c**2)
    return loss


def test_barlow_twins() -> None:
    z1, z2 = views(2)
    agree(
        lambda a, b: pretrain.barlow_twins_loss(a, b, lambd=0.3, eps=0.01),
        lambda a, b: barlow_formula(a, b, 0.3, 0.01), z1, z2,
    )  # fmt: skip
    peer = submodule("lightly.loss.barlow_twins_loss").BarlowTwinsLoss(lambda_param=0.0051)
    agree(pretrain.barlow_twins_loss, peer, z1, z2)
    one = views(2, features=1)
    agree(pretrain.barlow_twins_loss, lambda a, b: barlow_formula(a, b, 0.3, 1e-5), *one)  # nothing beside the diagonal


def vicreg_formula(a: Tensor, b: Tensor, eps: float, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    def of_one(z: Tensor) -> tuple[Tensor, Tensor]:
        cov = torch.cov(z.T)
        off = torch.stack([cov[i, j] ** 2 for i in range(z.shape[1]) for j in range(z.shape[1]) if i != j]).sum()
        return F.relu(gamma - (z.var(0) + eps).sqrt()).mean(), off / z.shape[1]

    (va, ca), (vb, cb) = of_one(a), of_one(b)
    return ((a - b) ** 2).sum(1).mean() / a.shape[1], (va + vb) / 2, ca + cb


def test_vicreg() -> None:
    z1, z2 = views(2)
    with torch.no_grad():  # some features below, some above the wanted deviation
        z1 *= torch.tensor([0.1, 0.2, 1.0, 0.3, 2.0])
        z2 *= torch.tensor([2.0, 0.2, 1.0, 0.1, 0.3])

    def formula(a: Tensor, b: Tensor) -> Tensor:
        invariance, variance, covariance = vicreg_formula(a, b, 0.01, 2.0)
        return 3 * invariance + 7 * variance + 0.5 * covariance

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return pretrain.vicreg_loss(
            a, b, invariance_weight=3, variance_weight=7, covariance_weight=0.5, gamma=2.0, eps=0.01
        ).loss

    agree(loss, formula, z1, z2)
    terms = pretrain.vicreg_loss(z1, z2)
    expected = vicreg_formula(z1, z2, 1e-4, 1.0)
    assert 0 < expected[1].item() < 1
    for ours, theirs in zip(terms[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    peer = submodule("lightly.loss.vicreg_loss").VICRegLoss()
    agree(lambda a, b: pretrain.vicreg_loss(a, b).loss, peer, z1, z2)


def test_moments_far_from_zero_and_in_low_precision() -> None:
    """The mean is taken off before squares are summed, and nothing is summed in 16 bits."""
    z1, z2 = (z.detach() for z in views(2, 256, 8))
    for loss in (pretrain.barlow_twins_loss, lambda a, b: pretrain.vicreg_loss(a, b).loss):
        exact = loss(z1 + 500, z2 + 500)
        assert loss((z1 + 500).float(), (z2 + 500).float()).item() == pytest.approx(exact.item(), rel=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            lowered = loss(z1.float(), z2.float())
        assert lowered.item() == pytest.approx(loss(z1, z2).item(), rel=1e-5)
        rounded = loss(z1.bfloat16(), z2.bfloat16())
        assert rounded.dtype == torch.float32
        assert rounded.item() == pytest.approx(loss(z1.bfloat16().double(), z2.bfloat16().double()).item(), rel=1e-5)


def test_one_sample_has_no_variance() -> None:
    z1, z2 = views(2)
    for loss, name in ((pretrain.barlow_twins_loss, "barlow_twins_loss"), (pretrain.vicreg_loss, "vicreg_loss")):
        with pytest.raises(ValueError, match=f"{name}: z1 has 1 rows; expected at least 2, the variance of the batch"):
            loss(z1[:1], z2[:1])
        with pytest.raises(ValueError, match=f"{name}: the batch has 1 samples; expected at least 2, the variance"):
            loss(z1[:1], z2[:1], reduce=lambda x: x)
    with pytest.raises(ValueError, match="barlow_twins_loss: lambd is -1; expected >= 0"):
        pretrain.barlow_twins_loss(z1, z2, lambd=-1)
    with pytest.raises(ValueError, match="vicreg_loss: variance_weight is -1; expected >= 0"):
        pretrain.vicreg_loss(z1, z2, variance_weight=-1)
    with pytest.raises(ValueError, match=r"vicreg_loss: z1 has shape \(6, 0\); expected \(N, D\) with D >= 1"):
        pretrain.vicreg_loss(z1[:, :0], z2[:, :0])


@pytest.mark.parametrize("cut", [3, 1, 5])
@pytest.mark.parametrize("name", ["barlow_twins_loss", "vicreg_loss"])
def test_moments_over_processes(name: str, cut: int) -> None:
    """Two processes, of unequal batches too: loss and gradients are those of one batch."""
    z1, z2 = views(2)

    def loss(a: Tensor, b: Tensor, **more: Any) -> Tensor:
        out = getattr(pretrain, name)(a, b, **more)
        return out if isinstance(out, Tensor) else out.loss

    expected = loss(z1, z2)
    whole = torch.autograd.grad(expected, (z1, z2))
    parts = [slice(0, cut), slice(cut, None)]
    losses = in_two_processes(lambda rank, reduce: loss(z1[parts[rank]], z2[parts[rank]], reduce=reduce))
    for of_rank in losses:
        torch.testing.assert_close(of_rank, expected)
        for ours, theirs in zip(torch.autograd.grad(of_rank, (z1, z2), retain_graph=True), whole, strict=True):
            torch.testing.assert_close(ours, theirs)


# ---- SwAV ------------------------------------------------------------------------------------------------------------


def sinkhorn_formula(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The paper's: a B x K matrix of sum 1, whose rows and columns are scaled in turn."""
    q = (scores / epsilon).exp()
    q = q / q.sum()
    rows, columns = q.shape
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / columns
        q = q / q.sum(1, keepdim=True) / rows
    return q * rows


def cosines(rows: int, prototypes: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(rows, prototypes, dtype=dtype).mul_(2).sub_(1).requires_grad_()


def test_sinkhorn() -> None:
    scores = cosines(7)
    for iterations in (1, 3, 10):
        codes = pretrain.sinkhorn_codes(scores, epsilon=0.1, iterations=iterations)
        torch.testing.assert_close(codes, sinkhorn_formula(scores.detach(), 0.1, iterations))
        torch.testing.assert_close(
            codes, submodule("lightly.loss.swav_loss").sinkhorn(scores, iterations=iterations, epsilon=0.1)
        )
        assert not codes.requires_grad
        torch.testing.assert_close(codes.sum(1), torch.ones(7, dtype=torch.float64))
    many = pretrain.sinkhorn_codes(scores, epsilon=0.5, iterations=200)
    torch.testing.assert_close(many.sum(0), torch.full((4,), 7 / 4, dtype=torch.float64))  # evenly


def test_sinkhorn_does_not_overflow() -> None:
    scores = cosines(7).detach()
    scores[0, 0], scores[1, 1] = 1, -1
    exact = pretrain.sinkhorn_codes(scores, epsilon=1e-3)
    assert exact.isfinite().all()
    assert not sinkhorn_formula(scores.float(), 1e-3, 3).isfinite().all()  # exp(1000)
    torch.testing.assert_close(
        pretrain.sinkhorn_codes(scores.float(), epsilon=1e-3).double(), exact, rtol=1e-2, atol=1e-3
    )
    for dtype in (torch.float16, torch.bfloat16):
        codes = pretrain.sinkhorn_codes(scores.to(dtype), epsilon=0.05)
        assert codes.dtype == torch.float32
        torch.testing.assert_close(codes, pretrain.sinkhorn_codes(scores.to(dtype).float(), epsilon=0.05))


@pytest.mark.parametrize("epsilon", [0.05, 0.003])
def test_sinkhorn_over_processes(epsilon: float) -> None:
    scores = cosines(7).detach()
    scores[:3] += 0.9  # processes that see different things
    expected = pretrain.sinkhorn_codes(scores, epsilon=epsilon)
    parts = [slice(0, 3), slice(3, None)]
    codes = in_two_processes(
        lambda rank, reduce: pretrain.sinkhorn_codes(scores[parts[rank]], epsilon=epsilon, reduce=reduce)
    )
    torch.testing.assert_close(torch.cat(codes), expected)
    assert not torch.allclose(pretrain.sinkhorn_codes(scores[:3], epsilon=epsilon), expected[:3])
    scores = scores.float()
    codes = in_two_processes(
        lambda rank, reduce: pretrain.sinkhorn_codes(scores[parts[rank]], epsilon=epsilon, reduce=reduce)
    )
    torch.testing.assert_close(torch.cat(codes).double(), expected, rtol=1e-3, atol=1e-3)


def test_swav() -> None:
    scores = [cosines(6) for _ in range(4)]
    queue = [cosines(9) for _ in range(2)]

    def formula(*scores: Tensor) -> Tensor:
        total = scores[0].new_zeros(())
        for i in range(2):
            codes = sinkhorn_formula(torch.cat([scores[i], queue[i]]).detach(), 0.1, 3)[:6]
            for v in range(4):
                if v != i:
                    total = total - (codes * torch.log_softmax(scores[v] / 0.2, 1)).sum(1).mean() / 3
        return total / 2

    agree(lambda *s: pretrain.swav_loss(s, queue_scores=queue, temperature=0.2, epsilon=0.1), formula, *scores)
    peer = submodule("lightly.loss.swav_loss").SwaVLoss()
    agree(lambda *s: pretrain.swav_loss(s), lambda *s: peer(list(s[:2]), list(s[2:]))[0], *scores)
    agree(
        lambda *s: pretrain.swav_loss(s, queue_scores=queue),
        lambda *s: peer(list(s[:2]), list(s[2:]), queue)[0], *scores,
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        low = pretrain.swav_loss([s.float() for s in scores])
    assert low.dtype == torch.float32 and low.item() == pytest.approx(pretrain.swav_loss(scores).item(), rel=1e-5)


def test_swav_with_queues() -> None:
    prototypes = pretrain.SwAVPrototypes(5, 4).double()
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(4, dtype=torch.float64))
    loss_fn = pretrain.SwAVLoss(5, 9, epsilon=0.1).double()
    past: list[list[Tensor]] = [[], []]
    for step in range(5):
        crops = views(3, 4)
        unit = [F.normalize(c, dim=1) for c in crops]
        earlier = None
        if len(past[0]) >= 9:  # only a full queue takes part
            earlier = [torch.stack(p[-9:]) @ prototypes.weight.T for p in past]
        expected = pretrain.swav_loss([u @ prototypes.weight.T for u in unit], queue_scores=earlier, epsilon=0.1)
        gradients = torch.autograd.grad(expected, [*crops, prototypes.weight])
        if step == 2:
            other = pretrain.SwAVLoss(5, 9, epsilon=0.1).double()
            other.load_state_dict(copy.deepcopy(loss_fn.state_dict()))
            loss_fn = other
        loss = loss_fn(crops, prototypes)
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(torch.autograd.grad(loss, [*crops, prototypes.weight]), gradients, strict=True):
            torch.testing.assert_close(ours, theirs)
        for p, u in zip(past, unit, strict=False):
            p.extend(u.detach())
    written = [int(q.written) for q in loss_fn.queues]  # type: ignore[arg-type]
    assert written == [20, 20]
    without = loss_fn(crops, prototypes, use_queue=False)
    torch.testing.assert_close(without, pretrain.SwAVLoss(5, epsilon=0.1)(crops, prototypes))
    assert [int(q.written) for q in loss_fn.queues] == written  # type: ignore[arg-type]


def test_prototypes_stay_normal_and_frozen() -> None:
    prototypes = pretrain.SwAVPrototypes(5, 4)
    optimizer = torch.optim.SGD(prototypes.parameters(), 1.0)
    start = prototypes.weight.detach().clone()
    for step in range(4):
        optimizer.zero_grad()
        pretrain.SwAVLoss(5)(views(2, dtype=torch.float32), prototypes).backward()
        pretrain.cancel_gradients(prototypes, step, 2)
        optimizer.step()
        prototypes.normalize()
        torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(4))
        assert torch.allclose(prototypes.weight, start, atol=1e-6) == (step < 2)


def test_swav_wrong_calls() -> None:
    prototypes, crops = pretrain.SwAVPrototypes(5, 4), views(2, dtype=torch.float32)
    loss_fn = pretrain.SwAVLoss(5, 4)
    with pytest.raises(ValueError, match="features has 6 rows, more than the queue's size; expected at most 4"):
        loss_fn(crops, prototypes)
    assert [int(q.written) for q in loss_fn.queues] == [0, 0]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SwAVLoss: features has 1 crops; expected at least 2"):
        loss_fn(crops[:1], prototypes)
    with pytest.raises(ValueError, match=r"SwAVLoss: features\[1\] has dtype float32 and shape \(2, 5\); expected"):
        loss_fn([crops[0], crops[1][:2]], prototypes)
    with pytest.raises(ValueError, match="swav_loss: scores has 2 crops and num_assign is 3"):
        pretrain.swav_loss(crops, num_assign=3)
    with pytest.raises(ValueError, match="swav_loss: queue_scores has 1 entries; expected num_assign = 2"):
        pretrain.swav_loss(crops, queue_scores=crops[:1])
    with pytest.raises(ValueError, match=r"swav_loss: queue_scores\[0\] has shape \(6, 4\); expected \(M, 5\)"):
        pretrain.swav_loss(crops, queue_scores=[crops[0][:, :4], crops[1]])
    with pytest.raises(ValueError, match="sinkhorn_codes: epsilon is 0; expected > 0"):
        pretrain.sinkhorn_codes(crops[0], epsilon=0)
    with pytest.raises(ValueError, match="sinkhorn_codes: iterations is 0; expected >= 1"):
        pretrain.sinkhorn_codes(crops[0], iterations=0)
    with pytest.raises(ValueError, match="SwAVLoss: queue_size is -1; expected >= 0"):
        pretrain.SwAVLoss(5, -1)
    with pytest.raises(ValueError, match="SwAVPrototypes: num_prototypes is 0; expected >= 1"):
        pretrain.SwAVPrototypes(5, 0)


# ---- DINO and iBOT ---------------------------------------------------------------------------------------------------


def dino_formula(student: list[Tensor], teacher: list[Tensor], center: Tensor, tau: float) -> Tensor:
    terms = []
    for i, t in enumerate(teacher):
        q = ((t.detach() - center) / tau).softmax(1)
        terms += [-(q * (s / 0.1).log_softmax(1)).sum(1).mean() for v, s in enumerate(student) if v != i]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_dino(number: int) -> None:
    student, teacher = views(5), views(number)
    loss_fn = pretrain.DINOLoss(5, teacher_temperature=pretrain.linear_warmup(0.04, 0.08, 2)).double()
    peer = submodule("lightly.loss.dino_loss").DINOLoss(
        5, warmup_teacher_temp=0.04, teacher_temp=0.08, warmup_teacher_temp_epochs=3
    )
    peer = peer.double()
    peer.teacher_temp_schedule = peer.teacher_temp_schedule.double()
    center = torch.zeros(5, dtype=torch.float64)
    for step, tau in enumerate((0.04, 0.06, 0.08, 0.08)):
        state = copy.deepcopy(loss_fn.state_dict())

        def ours(*s: Tensor, step: int = step, state: Any = state, teacher: Any = teacher) -> Tensor:
            loss_fn.load_state_dict(state)  # one update of the centre in each round, however often it is called
            return loss_fn(s, teacher, step=step)

        agree(ours, lambda *s, t=teacher, c=center, tau=tau: dino_formula(list(s), t, c, tau), *student)
        expected = peer(teacher, student, epoch=step)
        torch.testing.assert_close(ours(*student), expected, rtol=1e-6, atol=1e-6)  # its temperatures are float32
        center = 0.9 * center + 0.1 * torch.cat(teacher).detach().mean(0)
        torch.testing.assert_close(loss_fn.center[0], center)
        torch.testing.assert_close(loss_fn.center, peer.center[0])
        teacher = views(number)
    loss_fn.eval()(student, teacher)
    torch.testing.assert_close(loss_fn.center[0], center)  # not moved
    assert all(t.grad is None for t in teacher)


def test_dino_of_low_precision() -> None:
    student, teacher = views(3, 8, 32, torch.float32), views(2, 8, 32, torch.float32)
    losses, centers = [], []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        loss_fn = pretrain.DINOLoss(32, teacher_temperature=1.0)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = [[v.bfloat16().to(dtype) for v in side] for side in (student, teacher)]
            losses.append(loss_fn(*rounded).double())
        centers.append(loss_fn.center.clone())
        assert loss_fn.center.dtype == torch.float32
    for loss, center in zip(losses, centers, strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(center, centers[0], rtol=1e-5, atol=1e-6)


def test_dino_center_over_processes() -> None:
    student, teacher = views(3), views(2)
    whole = pretrain.DINOLoss(5).double()
    expected = whole(student, teacher)
    parts = [slice(0, 2), slice(2, None)]

    def work(rank: int, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        loss_fn = pretrain.DINOLoss(5, reduce=reduce).double()
        loss = loss_fn([s[parts[rank]] for s in student], [t[parts[rank]] for t in teacher])
        return loss, loss_fn.center

    (first, center), (second, other) = in_two_processes(work)
    torch.testing.assert_close(center, whole.center)
    torch.testing.assert_close(other, whole.center)
    torch.testing.assert_close((2 * first + 4 * second) / 6, expected)


def test_ibot() -> None:
    student, teacher = (torch.randn(3, 4, 5, dtype=torch.float64).mul_(2).requires_grad_() for _ in range(2))
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    loss_fn = pretrain.IBOTLoss(5, teacher_temperature=0.3).double()
    center = torch.randn(1, 5, dtype=torch.float64)

    def formula(student: Tensor) -> Tensor:
        q = ((teacher.detach() - center) / 0.3).softmax(-1)
        of_token = -(q * (student / 0.1).log_softmax(-1)).sum(-1)
        return (of_token[0, [0, 2, 3]].mean() + of_token[2, 1]) / 3  # the second image has none

    def ours(student: Tensor, mask: Tensor = mask) -> Tensor:
        loss_fn.center.copy_(center)
        return loss_fn(student, teacher, mask)

    agree(ours, formula, student)
    agree(lambda s: ours(s, mask.float()), formula, student)
    torch.testing.assert_close(loss_fn.center, 0.9 * center + 0.1 * teacher.detach().mean((0, 1))[None])
    peer = submodule("lightly.loss.ibot_loss").IBOTPatchLoss(5, teacher_temp=0.3).double()
    peer.center.center.copy_(center)
    chosen = peer(teacher[mask], student[mask], mask[:, None])  # lightly's centre follows the masked tokens alone
    torch.testing.assert_close(ours(student), chosen)
    assert teacher.grad is None


def test_dino_wrong_calls() -> None:
    student, teacher = views(3), views(2)
    loss_fn = pretrain.DINOLoss(5)
    with pytest.raises(ValueError, match="DINOLoss: student has 1 views and teacher 1; expected at least 2 and 1"):
        loss_fn(student[:1], teacher[:1])
    with pytest.raises(ValueError, match="DINOLoss: student has 2 views and teacher 3"):
        loss_fn(teacher, student)
    with pytest.raises(ValueError, match=r"DINOLoss: teacher\[1\] has dtype float64 and shape \(2, 5\)"):
        loss_fn(student, [teacher[0], teacher[1][:2]])
    with pytest.raises(ValueError, match=r"DINOLoss: student\[0\] has 4 logits; expected 5"):
        loss_fn([s[:, :4] for s in student], [t[:, :4] for t in teacher])
    scheduled = pretrain.DINOLoss(5, teacher_temperature=lambda step: 0.04 - 0.04 * step)
    with pytest.raises(ValueError, match=r"DINOLoss: teacher_temperature is 0.0; expected > 0"):
        scheduled(student, teacher, step=1)
    assert not loss_fn.center.any() and not scheduled.center.any()
    with pytest.raises(ValueError, match="DINOLoss: center_momentum is 2; expected 0 <= center_momentum <= 1"):
        pretrain.DINOLoss(5, center_momentum=2)
    with pytest.raises(ValueError, match="IBOTLoss: num_prototypes is 0; expected >= 1"):
        pretrain.IBOTLoss(0)
    ibot, tokens = pretrain.IBOTLoss(5), torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match=r"IBOTLoss: mask has shape \(2, 4\); expected \(2, 3\)"):
        ibot(tokens, tokens, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"IBOTLoss: student has shape \(3, 5\); expected \(N, L, 5\)"):
        ibot(tokens[0], tokens[0], torch.ones(3))
    with pytest.raises(ValueError, match=r"IBOTLoss: teacher has shape \(1, 3, 5\); expected \(2, 3, 5\)"):
        ibot(tokens, tokens[:1], torch.ones(2, 3))
    with pytest.raises(ValueError, match="linear_warmup: num_steps is 0; expected >= 1"):
        pretrain.linear_warmup(0, 1, 0)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("batch_norm", [False, True])
def test_dino_head(batch_norm: bool) -> None:
    head = pretrain.DINOHead(5, 7, hidden_features=6, bottleneck_features=4, batch_norm=batch_norm).double()
    peer = submodule("lightly.models.modules.heads").DINOProjectionHead(5, 6, 4, 7, batch_norm=batch_norm).double()
    linear = [m for m in head.mlp.modules() if isinstance(m, nn.Linear)]
    for m, p in zip(linear, [m for m in peer.layers if isinstance(m, nn.Linear)], strict=True):
        assert m.weight.std() < 0.04 and not m.bias.any()
        nn.init.normal_(m.weight)
        p.weight.data.copy_(m.weight)
    nn.init.normal_(head.last_layer.weight_v)
    peer.last_layer.weight_v.data.copy_(head.last_layer.weight_v)
    x = torch.randn(8, 5, dtype=torch.float64)
    y = head(x)
    torch.testing.assert_close(y, peer(x))
    # cosines with the rows of v
    h = head.mlp(x)
    torch.testing.assert_close(y, F.cosine_similarity(h[:, None], head.last_layer.weight_v[None], dim=2))
    assert not head.last_layer.weight_g.requires_grad
    (y * torch.randn_like(y)).sum().backward()
    pretrain.cancel_gradients(head.last_layer, 0, 1)
    assert head.last_layer.weight_v.grad is None and linear[0].weight.grad is not None
    copy.deepcopy(head)  # for the teacher, also after a forward pass
    if batch_norm:
        with pytest.raises(ValueError, match="DINOHead: x has 1 rows in training; expected at least 2"):
            head(x[:1])
    else:
        assert head(x[None]).shape == (1, 8, 7)  # tokens


def test_dino_head_forms() -> None:
    head = pretrain.DINOHead(5, 7, bottleneck_features=4, num_layers=1, norm_last_layer=False)
    assert isinstance(head.mlp, nn.Linear) and head.last_layer.weight_g.requires_grad
    with torch.no_grad():
        head.last_layer.weight_g.copy_(torch.arange(1.0, 8)[:, None])
    x = torch.randn(3, 5)
    expected = F.normalize(head.mlp(x), dim=1) @ F.normalize(head.last_layer.weight_v, dim=1).T * torch.arange(1.0, 8)
    torch.testing.assert_close(head(x), expected)
    assert {n for n, _ in pretrain.DINOHead(5, 7).named_parameters()} == {
        "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "mlp.4.weight", "mlp.4.bias",
        "last_layer.weight_g", "last_layer.weight_v",
    }  # fmt: skip
    with pytest.raises(ValueError, match="DINOHead: num_layers is 0; expected >= 1"):
        pretrain.DINOHead(5, 7, num_layers=0)


# ---- two real processes ----------------------------------------------------------------------------------------------

WORKER = """
import sys, torch
from torch import distributed as dist, nn
from tlkernels.methods import pretrain

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt")
reduce, mine = pretrain.GroupSum(), slice(4 * rank, 4 * rank + 4)
results = {}
for name in ("barlow_twins_loss", "vicreg_loss"):
    model = nn.parallel.DistributedDataParallel(nn.Linear(6, 5).double())
    model.module.load_state_dict(data["model"])
    out = getattr(pretrain, name)(model(data["x1"][mine]), model(data["x2"][mine]), reduce=reduce)
    loss = out if isinstance(out, torch.Tensor) else out.loss
    loss.backward()
    results[name] = (loss.detach(), model.module.weight.grad)
results["codes"] = pretrain.sinkhorn_codes(data["scores"][mine], reduce=reduce)
dino = pretrain.DINOLoss(5, reduce=reduce).double()
dino([data["scores"][mine], data["scores"][mine] / 2], [data["scores"][mine]])
results["center"] = dino.center
torch.save(results, f"{folder}/{rank}.pt")
"""


def test_two_processes(tmp_path: Path) -> None:
    model = nn.Linear(6, 5).double()
    data: dict[str, Any] = {
        "model": model.state_dict(), "x1": torch.randn(8, 6, dtype=torch.float64),
        "x2": torch.randn(8, 6, dtype=torch.float64), "scores": torch.rand(8, 5, dtype=torch.float64),
    }  # fmt: skip
    torch.save(data, tmp_path / "data.pt")
    root, environment = Path(__file__).resolve().parents[2], {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)],
            cwd=root,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in ("barlow_twins_loss", "vicreg_loss"):
        out = getattr(pretrain, name)(model(data["x1"]), model(data["x2"]))
        loss = out if isinstance(out, Tensor) else out.loss
        (gradient,) = torch.autograd.grad(loss, model.weight)
        for result in results:
            torch.testing.assert_close(result[name][0], loss.detach())
            torch.testing.assert_close(result[name][1], gradient)  # after DDP's mean
    torch.testing.assert_close(torch.cat([r["codes"] for r in results]), pretrain.sinkhorn_codes(data["scores"]))
    for result in results:
        torch.testing.assert_close(result["center"], 0.1 * data["scores"].mean(0, keepdim=True))


def test_group_sum_without_a_group() -> None:
    with pytest.raises(RuntimeError, match=r"GroupSum: torch.distributed is not initialised; expected init_process"):
        pretrain.GroupSum()(torch.ones(2))
    assert math.isfinite(pretrain.barlow_twins_loss(*views(2)).item())


@pytest.mark.parametrize("patches", [False, True])
def test_the_center_of_a_model_in_float16(patches: bool) -> None:
    rows, value = 200, 1000.0  # whose sum float16 does not hold
    if patches:
        ibot = pretrain.IBOTLoss(4, center_momentum=0.75).half()
        tokens = torch.full((rows, 2, 4), value, dtype=torch.float16)
        ibot(tokens, tokens, torch.ones(rows, 2))
        center = ibot.center
    else:
        dino = pretrain.DINOLoss(4, center_momentum=0.75).half()
        logits = [torch.full((rows, 4), value, dtype=torch.float16)] * 2
        dino(logits, logits)
        center = dino.center
    assert center.dtype == torch.float16 and center.tolist() == [[250.0] * 4]
