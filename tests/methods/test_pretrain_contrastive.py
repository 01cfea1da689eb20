"""SimCLR, DCL, MoCo, SupCon, queues, momentum encoders and heads, against closed forms, lightly and other libraries."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml
from torch import Tensor, nn
from torch.nn import functional as F

from bench.peers import submodule
from tlkernels.methods import pretrain

MODULES = (
    "_common",
    "contrastive",
    "dino",
    "heads",
    "mae",
    "momentum",
    "queue",
    "redundancy",
    "siamese",
    "swav",
    "text",
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(f"tlkernels.methods.pretrain.{name}")
    assert doctest.testmod(module).failed == 0
    public = set(module.__all__) & set(pretrain.__all__)
    assert public and all(getattr(pretrain, n) is getattr(module, n) for n in public)
    if name != "_common":
        assert public == set(module.__all__)


def views(number: int, rows: int = 6, features: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(rows, features, dtype=dtype).mul_(3).requires_grad_() for _ in range(number)]


def agree(
    loss: Callable[..., Tensor], formula: Callable[..., Tensor], *tensors: Tensor, weight: Tensor | float = 1.7,
    tol: float = 1e-11,
) -> None:  # fmt: skip
    """Values and the gradients of ``(weight * loss).sum()``."""
    values, gradients = [], []
    for f in (loss, formula):
        value = f(*tensors)
        wanted = [t for t in tensors if t.requires_grad]
        gradients.append(torch.autograd.grad((weight * value).sum(), wanted))
        values.append(value.detach())
    torch.testing.assert_close(values[0], values[1], rtol=tol, atol=tol)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)


# ---- SimCLR and DCL --------------------------------------------------------------------------------------------------


def pairwise(z1: Tensor, z2: Tensor, temperature: float, decoupled: bool = False) -> Tensor:
    """NT-Xent and DCL, [2 N], term by term."""
    z = [row / row.norm() for row in torch.cat([z1, z2])]
    half, losses = len(z1), []
    for i in range(len(z)):
        p = (i + half) % len(z)
        below = [torch.exp(z[i] @ z[k] / temperature) for k in range(len(z)) if k != i and not (decoupled and k == p)]
        losses.append(-(z[i] @ z[p]) / temperature + torch.stack(below).sum().log())
    return torch.stack(losses)


def test_simclr() -> None:
    z1, z2 = views(2)
    weight = torch.rand(12, dtype=torch.float64)
    agree(
        lambda a, b: pretrain.simclr_loss(a, b, temperature=0.3, reduction="none"),
        lambda a, b: pairwise(a, b, 0.3), z1, z2, weight=weight,
    )  # fmt: skip
    agree(lambda a, b: pretrain.simclr_loss(a, b), lambda a, b: pairwise(a, b, 0.5).mean(), z1, z2)
    peer = submodule("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=0.3)
    agree(lambda a, b: pretrain.simclr_loss(a, b, temperature=0.3), peer, z1, z2)
    assert pretrain.simclr_loss(z1[:1], z2[:1]).item() == pytest.approx(0, abs=1e-12)  # nobody else


def test_simclr_of_low_precision() -> None:
    z1, z2 = views(2, 16, 32, torch.float32)
    exact = pretrain.simclr_loss(z1.double(), z2.double())
    with torch.autocast("cpu", torch.bfloat16):
        loss = pretrain.simclr_loss(z1, z2)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-6)
    half = pretrain.simclr_loss(z1.bfloat16(), z2.bfloat16())
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact.item(), rel=5e-3)
    large = pretrain.simclr_loss((z1 * 3e3).half(), (z2 * 3e3).half())  # whose squares are no float16 numbers
    assert large.item() == pytest.approx(exact.item(), rel=5e-3)


def test_dcl() -> None:
    z1, z2 = views(2)
    weight = torch.rand(12, dtype=torch.float64)
    agree(
        lambda a, b: pretrain.dcl_loss(a, b, temperature=0.2, reduction="none"),
        lambda a, b: pairwise(a, b, 0.2, decoupled=True), z1, z2, weight=weight,
    )  # fmt: skip
    module = submodule("lightly.loss.dcl_loss")
    agree(lambda a, b: pretrain.dcl_loss(a, b, temperature=0.2), module.DCLLoss(0.2), z1, z2)
    total = pretrain.dcl_loss(z1, z2, reduction="sum")
    assert total.item() == pytest.approx(12 * pretrain.dcl_loss(z1, z2).item())


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_weighted_dcl() -> None:
    z1, z2 = views(2)

    def formula(a: Tensor, b: Tensor) -> Tensor:
        s = F.cosine_similarity(a, b)
        push = pairwise(a, b, 0.2, decoupled=True) + torch.cat([s, s]) / 0.2
        kernel = (s.detach() / 0.5).exp()
        weight = 2 - kernel / kernel.mean()
        return (push - torch.cat([weight, weight]) * torch.cat([s, s]) / 0.2).mean()

    agree(lambda a, b: pretrain.dcl_loss(a, b, temperature=0.2, sigma=0.5), formula, z1, z2)
    peer = submodule("lightly.loss.dcl_loss").DCLWLoss(temperature=0.2, sigma=0.5)
    agree(lambda a, b: pretrain.dcl_loss(a, b, temperature=0.2, sigma=0.5), peer, z1, z2)


def test_wrong_pairs() -> None:
    z1, z2 = views(2)
    with pytest.raises(
        ValueError, match=r"simclr_loss: z2 has dtype float64 and shape \(5, 5\); expected float64 \(6, 5\)"
    ):
        pretrain.simclr_loss(z1, z2[:5])
    with pytest.raises(TypeError, match="simclr_loss: z1 has dtype int64; expected float32"):
        pretrain.simclr_loss(z1.long(), z2)
    with pytest.raises(ValueError, match="simclr_loss: z1 has 0 rows; expected at least 1"):
        pretrain.simclr_loss(z1[:0], z2[:0])
    with pytest.raises(ValueError, match=r"simclr_loss: z1 has shape \(5,\); expected \(N, D\)"):
        pretrain.simclr_loss(z1[0], z2[0])
    with pytest.raises(ValueError, match="temperature is 0; expected > 0"):
        pretrain.simclr_loss(z1, z2, temperature=0)
    with pytest.raises(ValueError, match="dcl_loss: z1 has 1 rows; expected at least 2, of one sample there are no"):
        pretrain.dcl_loss(z1[:1], z2[:1])
    with pytest.raises(ValueError, match="dcl_loss: sigma is -1; expected > 0"):
        pretrain.dcl_loss(z1, z2, sigma=-1)
    with pytest.raises(ValueError, match="dcl_loss: reduction is 'max'; expected 'mean', 'sum' or 'none'"):
        pretrain.dcl_loss(z1, z2, reduction="max")


# ---- MoCo ------------------------------------------------------------------------------------------------------------


def moco_formula(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64), reduction="none")


def test_moco() -> None:
    q, k = views(2)
    loss_fn = pretrain.MoCoLoss(5, 16, temperature=0.2, dtype=torch.float64).eval()
    queue = loss_fn.queue.storage.clone()
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(16, dtype=torch.float64))
    weight = torch.rand(6, dtype=torch.float64)
    agree(
        lambda q, k: loss_fn(q, k, reduction="none"), lambda q, k: moco_formula(q, k, queue, 0.2), q, k.detach(),
        weight=weight,
    )  # fmt: skip
    assert int(loss_fn.queue.written) == 0  # eval mode
    loss = loss_fn(q, k)
    loss.backward()
    assert k.grad is None and q.grad is not None
    assert loss_fn(q, k, reduction="sum").item() == pytest.approx(6 * loss.item())


def test_moco_in_batch_negatives() -> None:
    q, k = views(2)
    loss_fn = pretrain.MoCoLoss(5, 4, temperature=0.2, in_batch_negatives=True, dtype=torch.float64).eval()

    def formula(q: Tensor, k: Tensor) -> Tensor:
        every = torch.cat([F.normalize(k, dim=1), loss_fn.queue.storage])
        return F.cross_entropy(F.normalize(q, dim=1) @ every.T / 0.2, torch.arange(4))

    agree(loss_fn, formula, q.detach()[:4].requires_grad_(), k.detach()[:4])


@pytest.mark.parametrize("batch", [5, 4, 7, 16])
def test_moco_over_steps_against_lightly(batch: int) -> None:
    """A queue of 16: lightly cuts a batch off at the end of the bank, so that oracle's own queue is a list here."""
    loss_fn = pretrain.MoCoLoss(5, 16, temperature=0.1, dtype=torch.float64)
    peer = submodule("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=0.1, memory_bank_size=(16, 5))
    peer.memory_bank.bank = loss_fn.queue.storage.clone()
    held = list(loss_fn.queue.storage.clone())
    for step in range(6):
        q, k = views(2, batch)
        with torch.no_grad():
            peer.memory_bank.bank = torch.stack(held)
        expected = peer(q, k.detach())
        loss = loss_fn(q, k)
        loss.backward()  # after the keys went into the queue
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(q.grad, torch.autograd.grad(expected, q)[0])
        for i, key in enumerate(F.normalize(k.detach(), dim=1)):
            held[(step * batch + i) % 16] = key
    torch.testing.assert_close(loss_fn.queue.storage, torch.stack(held))


def test_moco_resumes_in_the_middle_of_an_epoch() -> None:
    torch.manual_seed(1)
    online = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    batches = [torch.randn(2, 6, 4) for _ in range(7)]

    def run(parts: list[list[Tensor]]) -> tuple[list[float], dict[str, Any]]:
        model, saved = copy.deepcopy(online), b""
        losses: list[float] = []
        for part in parts:
            torch.manual_seed(len(losses))  # the fresh queue starts elsewhere
            target = pretrain.MomentumEncoder(online, pretrain.cosine_momentum(0.9, 7))
            loss_fn = pretrain.MoCoLoss(5, 16, temperature=0.2)
            state = nn.ModuleDict({"model": model, "target": target, "loss": loss_fn})
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            if saved:
                held = torch.load(io.BytesIO(saved), weights_only=True)
                state.load_state_dict(held["state"])
                optimizer.load_state_dict(held["optimizer"])
            for first, second in part:
                loss = loss_fn(model(first), target(second))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                target.update(model)
                losses.append(loss.item())
            file = io.BytesIO()
            torch.save({"state": state.state_dict(), "optimizer": optimizer.state_dict()}, file)
            saved = file.getvalue()
        return losses, torch.load(io.BytesIO(saved), weights_only=True)["state"]

    whole, expected = run([batches])
    parts, state = run([batches[:3], batches[3:]])
    assert parts == whole and len(set(whole)) == 7
    assert expected.keys() == state.keys()
    for name, value in expected.items():
        assert torch.equal(value, state[name]) if isinstance(value, Tensor) else str(value) == str(state[name])
    assert int(state["loss.queue.written"]) == 42


def test_moco_wrong_calls_leave_the_queue() -> None:
    loss_fn = pretrain.MoCoLoss(5, 4)
    before = loss_fn.queue.storage.clone()
    q, k = views(2, dtype=torch.float32)
    with pytest.raises(ValueError, match="features has 6 rows, more than the queue's size; expected at most 4"):
        loss_fn(q, k)
    with pytest.raises(ValueError, match="features has 6 rows, more than the queue's size"):
        loss_fn(q[:2], k[:2], enqueue=k)
    with pytest.raises(ValueError, match=r"MoCoLoss: k has dtype float32 and shape \(3, 5\); expected float32 \(2,"):
        loss_fn(q[:2], k[:3])
    with pytest.raises(ValueError, match="MoCoLoss: reduction is 'max'"):
        loss_fn(q[:2], k[:2], reduction="max")
    with pytest.raises(ValueError, match=r"features has dtype float32 and shape \(2, 3\); expected .* \(N, 5\)"):
        loss_fn(q[:2, :3], k[:2, :3])
    assert torch.equal(loss_fn.queue.storage, before) and int(loss_fn.queue.written) == 0
    loss_fn(q[:1], k[:1], enqueue=k[:4])
    assert torch.equal(loss_fn.queue.storage, F.normalize(k.detach()[:4], dim=1))
    with pytest.raises(ValueError, match="MoCoLoss: temperature is 0; expected > 0"):
        pretrain.MoCoLoss(5, 4, temperature=0)


def test_moco_with_an_empty_queue() -> None:
    q, k = views(2, dtype=torch.float32)
    loss_fn = pretrain.MoCoLoss(5, 8, start="empty")
    loss = loss_fn(q, k)
    loss.backward()
    assert loss.item() == 0 and torch.equal(q.grad, torch.zeros_like(q))  # type: ignore[arg-type]
    loss = loss_fn(q, k)  # six negatives now, each key its own copy
    expected = moco_formula(q, k, F.normalize(k, dim=1), 0.07).mean()
    torch.testing.assert_close(loss, expected)


def test_moco_v3() -> None:
    q1, q2, k1, k2 = views(4)

    def ctr(q: Tensor, k: Tensor) -> Tensor:
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.2
        return 2 * 0.2 * F.cross_entropy(logits, torch.arange(len(q)) + 2)

    def formula(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        return ctr(q1, k2) + ctr(q2, k1)

    q1, q2 = (q.detach()[:3].requires_grad_() for q in (q1, q2))
    agree(
        lambda *t: pretrain.moco_v3_loss(*t, temperature=0.2, label_offset=2), formula, q1, q2, k1.detach(), k2.detach()
    )
    pretrain.moco_v3_loss(q1, q2, k1, k2).backward()
    assert k1.grad is None and k2.grad is None
    # a uniform answer: log N each, times 2 tau, twice
    same = torch.ones(4, 5)
    assert pretrain.moco_v3_loss(same, same, same, same, temperature=0.3).item() == pytest.approx(1.2 * math.log(4))
    with pytest.raises(
        ValueError, match=r"label_offset is 4; expected float64 \(M, 5\) with 0 <= label_offset <= M - "
    ):
        pretrain.moco_v3_loss(q1, q2, k1, k2, label_offset=4)


# ---- SupCon ----------------------------------------------------------------------------------------------------------


def supcon_formula(features: Tensor, labels: Tensor, temperature: float, anchors: int) -> Tensor:
    """Over the first `anchors` views."""
    z = F.normalize(features, dim=2).flatten(0, 1)
    labels = labels.repeat_interleave(features.shape[1])
    s, losses = z @ z.T / temperature, []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        if i % features.shape[1] < anchors and positives:
            losses.append(torch.logsumexp(s[i, others], 0) - s[i, positives].mean())
    return torch.stack(losses).mean()


def test_supcon() -> None:
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 0, 2, 1])
    agree(lambda x: pretrain.supcon_loss(x, y, temperature=0.3), lambda x: supcon_formula(x, y, 0.3, 3), x)
    agree(
        lambda x: pretrain.supcon_loss(x, y, temperature=0.3, contrast_mode="one"),
        lambda x: supcon_formula(x, y, 0.3, 1), x,
    )  # fmt: skip
    agree(
        lambda x: pretrain.supcon_loss(x, y, temperature=0.3, base_temperature=0.1),
        lambda x: 3 * supcon_formula(x, y, 0.3, 3), x,
    )  # fmt: skip
    peer = pml.SupConLoss(temperature=0.3)
    agree(
        lambda x: pretrain.supcon_loss(x, y, temperature=0.3),
        lambda x: peer(x.flatten(0, 1), y.repeat_interleave(3)), x, tol=1e-7,
    )  # fmt: skip


def test_supcon_without_labels_is_simclr() -> None:
    x = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    agree(
        lambda x: pretrain.supcon_loss(x, temperature=0.3),
        lambda x: pretrain.simclr_loss(x[:, 0], x[:, 1], temperature=0.3), x,
    )  # fmt: skip
    # one view, no class twice: no positives at all
    assert pretrain.supcon_loss(x[:, :1]).item() == 0
    with pytest.raises(ValueError, match=r"supcon_loss: features has shape \(5, 2\); expected \(N, V, D\)"):
        pretrain.supcon_loss(x[..., 0])
    with pytest.raises(ValueError, match=r"supcon_loss: labels has dtype int64 and shape \(3,\); expected integers"):
        pretrain.supcon_loss(x, torch.arange(3))
    with pytest.raises(ValueError, match="supcon_loss: contrast_mode is 'two'; expected 'all' or 'one'"):
        pretrain.supcon_loss(x, contrast_mode="two")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="supcon_loss: base_temperature is 0; expected > 0"):
        pretrain.supcon_loss(x, base_temperature=0)


# ---- the queue -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 8])
def test_queue_is_a_ring(size: int) -> None:
    queue = pretrain.FeatureQueue(2, size, start="empty")
    held: dict[int, Tensor] = {}
    written = 0
    for number in (1, size, 0, max(1, size - 2), size // 2, size, 1):
        x = torch.randn(number, 2)
        queue.enqueue(x)
        for row in x:
            held[written % size] = row
            written += 1
        rows = queue.features()
        assert torch.equal(rows, torch.stack([held[i] for i in range(len(rows))]))
        assert len(rows) == min(written, size) and queue.full == (written >= size)
        assert int(queue.written) == written
    again = pretrain.FeatureQueue(2, size, start="empty")
    again.load_state_dict(queue.state_dict())
    x = torch.randn(1, 2)
    queue.enqueue(x)
    again.enqueue(x)
    assert torch.equal(again.features(), queue.features())


def test_queue_start() -> None:
    first, second = (
        pretrain.FeatureQueue(4, 3, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first.storage, second.storage) and first.storage.dtype == torch.bfloat16
    torch.testing.assert_close(first.features().float().norm(dim=1), torch.ones(3), atol=1e-2, rtol=0)
    x = torch.randn(2, 4, requires_grad=True)
    first.enqueue(x)
    assert torch.equal(first.storage[:2], x.detach().bfloat16()) and not first.storage.requires_grad and not first.full
    with pytest.raises(ValueError, match="FeatureQueue: size is 0; expected >= 1"):
        pretrain.FeatureQueue(4, 0)
    with pytest.raises(ValueError, match="FeatureQueue: start is 'full'; expected 'random' or 'empty'"):
        pretrain.FeatureQueue(4, 3, start="full")  # type: ignore[arg-type]


# ---- momentum --------------------------------------------------------------------------------------------------------


def test_cosine_momentum() -> None:
    momentum = pickle.loads(pickle.dumps(pretrain.cosine_momentum(0.9, 40, 0.98)))
    schedule = submodule("lightly.utils.scheduler").cosine_schedule
    for step in (0, 1, 13, 39):
        # lightly is at its end in the last step, step T - 1; the paper after it
        assert momentum(step) == pytest.approx(schedule(step, 41, 0.9, 0.98), abs=1e-15)
        assert momentum(step) == pytest.approx(0.98 - 0.08 * (math.cos(math.pi * step / 40) + 1) / 2, abs=1e-15)
    assert momentum(40) == momentum(1000) == 0.98
    with pytest.raises(ValueError, match=r"cosine_momentum: start is 1.5; expected 0 <= start <= 1"):
        pretrain.cosine_momentum(1.5, 10)
    with pytest.raises(ValueError, match="cosine_momentum: num_steps is 0; expected >= 1"):
        pretrain.cosine_momentum(0.9, 0)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("buffers", ["own", "copy", "average"])
def test_momentum_encoder(buffers: Any) -> None:
    online = network().double()
    target = pretrain.MomentumEncoder(online, lambda t: [0.9, 0.5, 1.0][t], buffers=buffers)
    expected = [p.detach().clone() for p in online.parameters()]
    mean = torch.zeros(4, dtype=torch.float64)
    own = torch.zeros(4, dtype=torch.float64)
    for momentum in (0.9, 0.5, 1.0):
        with torch.no_grad():
            for p in online.parameters():
                p.add_(torch.randn_like(p))
        x = torch.randn(8, 3, dtype=torch.float64)
        online(x)
        online(x + 1)
        y = target(x)
        assert not y.requires_grad
        hidden = F.linear(x, target.target[0].weight, target.target[0].bias)
        own = 0.9 * (mean if buffers != "own" else own) + 0.1 * hidden.mean(0)
        assert target.update(online) == momentum
        expected = [
            momentum * a + (1 - momentum) * p.detach() for a, p in zip(expected, online.parameters(), strict=True)
        ]
        for a, p in zip(expected, target.target.parameters(), strict=True):
            torch.testing.assert_close(p, a)
            assert not p.requires_grad
        running = online[1].running_mean
        assert isinstance(running, Tensor)
        mean = {"own": own, "copy": running, "average": momentum * own + (1 - momentum) * running}[buffers].clone()
        torch.testing.assert_close(target.target[1].running_mean, mean)  # type: ignore[index]
    assert target.num_updates == 3
    batches = target.target[1].num_batches_tracked  # type: ignore[index]
    assert int(batches) == (3 if buffers == "own" else 6)


def test_momentum_in_bfloat16_does_not_stand_still() -> None:
    online = nn.Linear(16, 16, bias=False).bfloat16()
    target = pretrain.MomentumEncoder(online, 0.999)
    start = target.target.weight.detach().float().clone()
    with torch.no_grad():
        online.weight.add_(0.1)
    end = online.weight.detach().float()
    for step in range(40):
        if step == 20:  # saved and loaded on the way
            saved = copy.deepcopy(target.state_dict())
            target = pretrain.MomentumEncoder(nn.Linear(16, 16, bias=False).bfloat16(), 0.999)
            target.load_state_dict(saved)
        target.update(online)
    expected = end + (start - end) * 0.999**40
    weight = target.target.weight.detach()
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected.bfloat16())
    assert not torch.equal(weight.float(), start)
    with torch.no_grad():
        target.target.weight.zero_()
    target.update(online)  # from what was written
    torch.testing.assert_close(target.target.weight.float(), 0.001 * end, rtol=1e-2, atol=0)


def test_momentum_wrong_calls() -> None:
    online = network()
    target = pretrain.MomentumEncoder(online, lambda t: 0.5 if t < 1 else 1.2)
    with pytest.raises(RuntimeError, match=r"is not in online as it was when it was copied .* expected the same names"):
        target.update(nn.DataParallel(online))
    with pytest.raises(RuntimeError, match=r"0.weight is not in online as it was when it was copied"):
        target.update(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    assert target.num_updates == 0
    target.update(online)
    with pytest.raises(ValueError, match=r"MomentumEncoder.update: momentum is 1.2; expected 0 <= momentum <= 1"):
        target.update(online)
    assert target.num_updates == 1
    with pytest.raises(TypeError, match=r"MomentumEncoder: online is a list; expected a torch.nn.Module"):
        pretrain.MomentumEncoder([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MomentumEncoder: buffers is 'all'"):
        pretrain.MomentumEncoder(online, buffers="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MomentumEncoder: momentum is 2; expected 0 <= momentum <= 1"):
        pretrain.MomentumEncoder(online, 2)


# ---- heads -----------------------------------------------------------------------------------------------------------

# a head at small sizes, and its layers: (width, bias, batch norm: None or whether affine, ReLU)
Layer = tuple[int, bool, bool | None, bool]
HIDDEN: Layer = (6, False, True, True)
LINEAR: list[Layer] = [(4, True, None, False)]
HEADS: dict[str, tuple[nn.Module, list[Layer]]] = {
    "simclr": (pretrain.simclr_projector(5, 6, 4), [HIDDEN, (4, False, True, False)]),
    "simclr v2": (pretrain.simclr_projector(5, 6, 4, 3), [HIDDEN, HIDDEN, (4, False, True, False)]),
    "moco v1": (pretrain.moco_v1_projector(5, 4), LINEAR),
    "moco v2": (pretrain.moco_v2_projector(5, 6, 4), [(6, True, None, True), *LINEAR]),
    "moco v3": (pretrain.moco_v3_projector(5, 6, 4), [HIDDEN, HIDDEN, (4, False, False, False)]),
    "moco v3 predictor": (pretrain.moco_v3_predictor(5, 6, 4), [HIDDEN, (4, False, False, False)]),
    "byol": (pretrain.byol_projector(5, 6, 4), [HIDDEN, (4, False, None, False)]),
    "byol predictor": (pretrain.byol_predictor(5, 6, 4), [HIDDEN, (4, False, None, False)]),
    "simsiam": (pretrain.simsiam_projector(5, 6, 4), [HIDDEN, HIDDEN, (4, False, False, False)]),
    "simsiam predictor": (pretrain.simsiam_predictor(5, 6, 4), [HIDDEN, *LINEAR]),
    "barlow twins": (pretrain.barlow_twins_projector(5, 6, 4), [HIDDEN, HIDDEN, (4, False, None, False)]),
    "vicreg": (pretrain.vicreg_projector(5, 6, 4), [HIDDEN, HIDDEN, (4, False, None, False)]),
    "swav": (pretrain.swav_projector(5, 6, 4), [HIDDEN, *LINEAR]),
}


@pytest.mark.parametrize("name", HEADS)
def test_head(name: str) -> None:
    head, layers = HEADS[name]
    head = copy.deepcopy(head).double()
    for p in head.parameters():  # also the scales and shifts of batch norms
        nn.init.normal_(p)
    rest = list(head.parameters())
    x = y = torch.randn(7, 5, dtype=torch.float64)
    for out, bias, norm, relu in layers:
        weight = rest.pop(0)
        assert weight.shape == (out, y.shape[1])
        y = F.linear(y, weight, rest.pop(0) if bias else None)
        if norm is not None:
            y = (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()
            y = y * rest.pop(0) + rest.pop(0) if norm else y
        y = y.clamp(min=0) if relu else y
    assert not rest
    torch.testing.assert_close(head(x), y)
    if any(norm is not None for _, _, norm, _ in layers):
        with pytest.raises(ValueError, match="ProjectionHead: x has 1 rows in training; expected at least 2"):
            head(x[:1])
        with pytest.raises(ValueError, match=r"ProjectionHead: x has shape \(7, 1, 5\); expected \(N, 5\)"):
            head(x[:, None])
    else:
        assert head(x[:, None]).shape == (7, 1, 4)
    assert head.eval()(x[:1]).shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "ours", "arguments"),
    [
        ("SimCLRProjectionHead", pretrain.simclr_projector, (8, 8, 4)),
        ("MoCoProjectionHead", pretrain.moco_v2_projector, (8, 8, 4)),
        ("SimSiamProjectionHead", pretrain.simsiam_projector, (8, 8, 4)),
        ("SimSiamPredictionHead", pretrain.simsiam_predictor, (8, 6, 4)),
        ("SwaVProjectionHead", pretrain.swav_projector, (8, 8, 4)),
    ],
)
def test_head_against_lightly(name: str, ours: Callable[..., nn.Module], arguments: tuple[int, ...]) -> None:
    """Those of BYOL, Barlow Twins, MoCo v3 and VICReg differ there from the authors' code in a bias or a scale."""
    peer = getattr(submodule("lightly.models.modules.heads"), name)(*arguments)
    head = ours(*arguments)
    shapes = [[p.shape for p in m.parameters()] for m in (head, peer)]
    assert shapes[0] == shapes[1]
    for p, q in zip(head.parameters(), peer.parameters(), strict=True):
        p.data.copy_(q.data)
    x = torch.randn(9, 8)
    torch.testing.assert_close(head(x), peer(x))


def test_default_widths() -> None:
    with torch.device("meta"):
        for head, widths in (
            (pretrain.simclr_projector(), [2048, 128]), (pretrain.moco_v1_projector(), [128]),
            (pretrain.moco_v2_projector(), [2048, 128]), (pretrain.moco_v3_projector(), [4096, 4096, 256]),
            (pretrain.moco_v3_predictor(), [4096, 256]), (pretrain.byol_projector(), [4096, 256]),
            (pretrain.simsiam_projector(), [2048, 2048, 2048]), (pretrain.simsiam_predictor(), [512, 2048]),
            (pretrain.barlow_twins_projector(), [8192] * 3), (pretrain.vicreg_projector(), [8192] * 3),
            (pretrain.swav_projector(), [2048, 128]),
        ):  # fmt: skip
            assert [m.out_features for m in head if isinstance(m, nn.Linear)] == widths
    with pytest.raises(ValueError, match="simclr_projector: num_layers is 0; expected >= 1"):
        pretrain.simclr_projector(num_layers=0)
    with pytest.raises(ValueError, match=r"ProjectionHead: widths are \(3,\); expected at least two"):
        pretrain.ProjectionHead(3)
    with pytest.raises(ValueError, match="last_batch_norm is 'yes'; expected 'none', 'affine' or 'plain'"):
        pretrain.ProjectionHead(3, 2, last_batch_norm="yes")  # type: ignore[arg-type]


def test_byol_head_trains_under_autocast() -> None:
    head = pretrain.byol_projector(5, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = head(torch.randn(7, 5))
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_one_row_of_a_synchronized_norm_is_left_to_it() -> None:
    # the batch is that of all processes: torch knows its size, and says so itself where there is one process
    for head in (pretrain.byol_projector(3, 4, 2), pretrain.DINOHead(3, 5, hidden_features=4, batch_norm=True)):
        x = torch.randn(1, 3)
        with pytest.raises(ValueError, match="x has 1 rows in training"):
            head(x)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            nn.SyncBatchNorm.convert_sync_batchnorm(head)(x)


def test_what_is_no_tensor_is_told_so() -> None:
    x = torch.randn(4, 3)
    mask = torch.ones(1, 2)
    for call, message in (
        (lambda: pretrain.simclr_loss(None, x), "simclr_loss: z1 is a NoneType; expected a tensor"),
        (lambda: pretrain.byol_loss(x, x, x, x.numpy()), "byol_loss: z2 is a ndarray; expected a tensor"),
        (lambda: pretrain.supcon_loss(x[:, None], [0, 1, 0, 1]), "supcon_loss: labels is a list; expected a tensor"),
        (lambda: pretrain.FeatureQueue(3, 4).enqueue(None), "FeatureQueue.enqueue: features is a NoneType"),
        (lambda: pretrain.IBOTLoss(3)(x[None], None, mask), "IBOTLoss: teacher is a NoneType; expected a tensor"),
        (lambda: pretrain.mae_loss(x[None], x[None], None), "mae_loss: mask is a NoneType; expected a tensor"),
        (lambda: pretrain.causal_lm_loss(x, [1, 2]), "causal_lm_loss: labels is a list; expected a tensor"),
        (lambda: pretrain.replaced_token_loss(x, None), "replaced_token_loss: replaced is a NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
