"""Sharing architectures: closed forms at particular weights, and gradients that reach what is shared."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from tlkernels.methods.multitask.sharing import CGC, MTAN, CrossStitch, HardSharing, MMoE, SoftSharing
from tlkernels.methods.multitask.surgery import backward


def heads(size: int = 4) -> dict[str, nn.Module]:
    return {"a": nn.Linear(size, 1), "b": nn.Linear(size, 3)}


def batch() -> Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(0))


def block(inputs: int = 5, outputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh())


def test_hard_sharing_and_surgery() -> None:
    model = HardSharing(block(), heads())
    out = model(batch())
    torch.testing.assert_close(out["b"], model.heads["b"](model.trunk(batch())))
    backward([v.square().mean() for v in out.values()], model.shared_parameters, "upgrad")
    assert all(p.grad is not None for p in model.parameters())


def test_soft_sharing_is_the_sum_over_pairs() -> None:
    model = SoftSharing(block, {**heads(), "c": nn.Linear(4, 2)}, strength=0.3)
    rows = [list(t.parameters()) for t in model.trunks.values()]
    pairs = sum((p - q).square().sum() for a, b in itertools.combinations(rows, 2) for p, q in zip(a, b, strict=True))
    torch.testing.assert_close(model.penalty(), 0.3 * pairs)
    out = model(batch())
    assert not torch.equal(model.trunks["a"](batch()), model.trunks["b"](batch())) and out["c"].shape == (7, 2)
    with torch.no_grad():
        for p, q, r in zip(*rows, strict=True):
            q.copy_(p)
            r.copy_(p)
    assert model.penalty() < 1e-10


def test_cross_stitch() -> None:
    makes = [block, lambda: block(4, 4)]
    separate = CrossStitch(makes, heads(), own=1.0)
    column = separate.columns["a"]
    torch.testing.assert_close(separate(batch())["a"], separate.heads["a"](column[1](column[0](batch()))))
    mixed = CrossStitch(makes[:1], heads(), own=0.7)
    a, b = (mixed.columns[t][0](batch()) for t in ("a", "b"))
    torch.testing.assert_close(mixed(batch())["a"], mixed.heads["a"](0.7 * a + 0.3 * b))
    torch.testing.assert_close(mixed(batch())["b"], mixed.heads["b"](0.3 * a + 0.7 * b))
    mixed(batch())["a"].sum().backward()
    assert mixed.stitches[0].grad is not None and mixed.columns["b"][0][0].weight.grad is not None
    assert CrossStitch(makes, {"a": nn.Linear(4, 1)})(batch())["a"].shape == (7, 1)


def test_mtan() -> None:
    masks = [(4, 4), (9, 6)]
    model = MTAN([block(), block(4, 6)], lambda d: nn.Linear(*masks[d]), lambda d: nn.Linear(4, 3), heads(6))
    x = batch()
    p0 = model.blocks[0](x)
    p1 = model.blocks[1](p0)
    own = model.carry["b"][0](model.attention["b"][0](p0).sigmoid() * p0)
    masked = model.attention["b"][1](torch.cat([p1, own], 1)).sigmoid() * p1
    torch.testing.assert_close(model(x)["b"], model.heads["b"](masked))
    with torch.no_grad():  # masks of one half everywhere
        for p in model.attention.parameters():
            p.zero_()
    torch.testing.assert_close(model(x)["a"], model.heads["a"](0.5 * p1))
    backward([v.square().mean() for v in model(x).values()], model.shared_parameters, "pcgrad")
    assert all(p.grad is not None for p in model.shared_parameters)
    wrong = MTAN([block()], lambda d: nn.Linear(4, 3), lambda d: nn.Identity(), heads())
    with pytest.raises(ValueError, match=r"attention gives \(7, 3\); expected \(7, 4\)"):
        wrong(x)


def test_mmoe() -> None:
    model = MMoE(block, 3, 5, heads())
    x = batch()
    weights = model.gates["a"](x).softmax(1)
    torch.testing.assert_close(weights.sum(1), torch.ones(7))
    mixed = sum(weights[:, k : k + 1] * model.experts[k](x) for k in range(3))
    torch.testing.assert_close(model(x)["a"], model.heads["a"](mixed))
    with torch.no_grad():  # a gate that is sure
        model.gates["b"].weight.zero_()
        model.gates["b"].weight[1] = 1e4 * torch.sign(x[0])
    torch.testing.assert_close(model(x)["b"][0], model.heads["b"](model.experts[1](x))[0])
    backward([v.square().mean() for v in model(x).values()], model.shared_parameters, "mgda")
    assert all(p.grad is not None for p in model.parameters())


def test_cgc_and_ple() -> None:
    x = batch()
    one = CGC([block], [5], heads(), shared=2, own=1)
    g = one.gates[0]["a"](x).softmax(1)
    rows = [one.own[0]["a"][0](x), one.shared[0][0](x), one.shared[0][1](x)]
    torch.testing.assert_close(one(x)["a"], one.heads["a"](sum(g[:, k : k + 1] * r for k, r in enumerate(rows))))
    assert len(one.shared_gates) == 0
    two = CGC([block, lambda: block(4, 4)], [5, 4], heads(), shared=1, own=1)
    own = {t: two.own[0][t][0](x) for t in "ab"}
    common = two.shared[0][0](x)
    s = two.shared_gates[0](x).softmax(1)
    shared = s[:, :1] * own["a"] + s[:, 1:2] * own["b"] + s[:, 2:] * common
    w = two.gates[0]["b"](x).softmax(1)
    mine = w[:, :1] * own["b"] + w[:, 1:] * common
    w = two.gates[1]["b"](mine).softmax(1)
    expected = two.heads["b"](w[:, :1] * two.own[1]["b"][0](mine) + w[:, 1:] * two.shared[1][0](shared))
    torch.testing.assert_close(two(x)["b"], expected)
    backward([v.square().mean() for v in two(x).values()], two.shared_parameters, "cagrad")
    assert all(p.grad is not None for p in two.parameters())


def test_wrong_parts() -> None:
    for call, says in (
        (lambda: HardSharing(block(), {}), "HardSharing: heads is dict"),
        (lambda: SoftSharing(block, heads(), strength=-1), "strength is -1"),
        (lambda: CrossStitch([], heads()), "blocks is empty"),
        (lambda: MTAN([], lambda d: block(), lambda d: block(), heads()), "blocks is empty"),
        (lambda: MMoE(block, 0, 5, heads()), "experts is 0"),
        (lambda: MMoE(block, 1, True, heads()), "features is True"),
        (lambda: CGC([block], [5, 4], heads()), "expected one size for each layer"),
        (lambda: CGC([block], [5], heads(), own=0), "own is 0"),
    ):
        with pytest.raises(ValueError, match=says):
            call()  # type: ignore[no-untyped-call]
