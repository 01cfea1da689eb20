"""Buffers: what is kept of a stream by their papers' algorithms, batches, exact resumption."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tlkernels.methods.continual.buffers import (
    ClassBalancedBuffer,
    GreedyBalancedBuffer,
    ReplayBuffer,
    ReservoirBuffer,
    RingBuffer,
)

MAKES: list[Any] = [
    ReservoirBuffer,
    ClassBalancedBuffer,
    GreedyBalancedBuffer,
    lambda capacity, **k: RingBuffer(capacity, per_class=max(1, capacity // 10), **k),
]


def stream(n: int, classes: int = 3, seed: int = 0, start: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.arange(start, start + n).float()[:, None].expand(n, 2).contiguous()
    return x, torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))


def kept(buffer: ReplayBuffer) -> list[int]:
    return [int(v) for v in buffer.tensors[0][:, 0]]


def test_a_reservoir_keeps_each_example_with_the_same_probability() -> None:
    """Chi-square of how often each of 40 was kept in 3000 runs of capacity 8: 39 degrees of freedom, p > 1e-4."""
    counts = torch.zeros(40)
    for seed in range(3000):
        buffer = ReservoirBuffer(8, seed=seed)
        buffer.add(torch.arange(40))
        counts[buffer.tensors[0]] += 1
        assert len(buffer) == 8 and buffer.seen == 40
    expected = 3000 * 8 / 40
    # the 8 places of a run are not independent: the variance of a count is n p (1 - p)
    statistic = float((counts - expected).square().sum() / (expected * (1 - 8 / 40))) * 39 / 40
    assert 39 - 4 * 8.8 < statistic < 39 + 4.5 * 8.8
    assert counts.min() > 500 and counts.max() < 700


def test_a_reservoir_is_algorithm_r() -> None:
    buffer, generator = ReservoirBuffer(3, seed=4), torch.Generator().manual_seed(4)
    rows: list[int] = []
    for n in range(50):
        buffer.add(torch.tensor([n]))
        if len(rows) < 3:
            rows.append(n)
        else:
            place = int(torch.randint(n + 1, (), generator=generator))
            if place < 3:
                rows[place] = n
        assert buffer.tensors[0].tolist() == rows


def test_classes_are_balanced_whatever_the_stream() -> None:
    x = torch.arange(1000)
    y = torch.cat([torch.zeros(700), torch.ones(280), torch.full((20,), 2)]).long()
    for order in (torch.arange(1000), torch.randperm(1000, generator=torch.Generator().manual_seed(0))):
        for make in (ClassBalancedBuffer, GreedyBalancedBuffer):
            buffer = make(45, seed=1)
            buffer.add(x[order], y[order])
            assert buffer.tensors[1].bincount().tolist() == [15, 15, 15], make
            assert torch.equal(y[buffer.tensors[0]], buffer.tensors[1])


def test_class_balanced_is_uniform_within_a_class() -> None:
    counts = torch.zeros(60)
    y = torch.arange(60) % 2
    for seed in range(1500):
        buffer = ClassBalancedBuffer(10, seed=seed)
        buffer.add(torch.arange(60), y)
        counts[buffer.tensors[0]] += 1
    expected = 1500 * 10 / 60
    assert float((counts - expected).abs().max()) < 5 * expected**0.5


def test_a_ring_keeps_the_newest_of_each_class() -> None:
    buffer = RingBuffer(6, per_class=2)
    y = torch.tensor([0, 0, 1, 0, 0, 2, 0, 1, 1])
    buffer.add(torch.arange(9), y)
    for c in range(3):
        mine = buffer.tensors[0][buffer.tensors[1] == c].sort().values
        assert torch.equal(mine, torch.arange(9)[y == c][-2:])
    with pytest.raises(ValueError, match="capacity is 6 for 4 classes of 2 examples; expected at least 8"):
        buffer.add(torch.arange(1), torch.tensor([7]))
    assert buffer.seen == 9


@pytest.mark.parametrize("make", MAKES)
def test_batches(make: Any) -> None:
    buffer = make(30, seed=2)
    x, y = stream(100)
    buffer.add(x[:50], y[:50])
    buffer.add(x[50:], y[50:])
    a, b = buffer.sample(5)
    assert a.shape == (5, 2) and b.shape == (5,) and a.dtype == x.dtype and b.dtype == y.dtype
    assert len({float(v) for v in a[:, 0]}) == 5  # without replacement
    assert torch.equal(y[a[:, 0].long()], b)  # rows stay together
    assert len(buffer.sample(1000)[0]) == len(buffer)


@pytest.mark.parametrize("make", MAKES)
def test_resumes_exactly(make: Any) -> None:
    whole, first = make(12, seed=5), make(12, seed=5)
    x, y = stream(200)
    for begin in range(0, 200, 20):
        whole.add(x[begin : begin + 20], y[begin : begin + 20])
        whole.sample(3)
    for begin in range(0, 100, 20):
        first.add(x[begin : begin + 20], y[begin : begin + 20])
        first.sample(3)
    second = make(12, seed=99)
    second.load_state_dict(first.state_dict())
    first.add(x[:20], y[:20])  # must not reach into the other
    for begin in range(100, 200, 20):
        second.add(x[begin : begin + 20], y[begin : begin + 20])
        second.sample(3)
    assert kept(second) == kept(whole) and second.seen == whole.seen
    assert all(torch.equal(a, b) for a, b in zip(second.sample(6), whole.sample(6), strict=True))


def test_whole_batches_and_single_examples_are_the_same_stream() -> None:
    for make in MAKES:
        one, many = make(10, seed=3), make(10, seed=3)
        x, y = stream(60)
        many.add(x, y)
        for k in range(60):
            one.add(x[k : k + 1], y[k : k + 1])
        assert kept(one) == kept(many)


def test_wrong_calls() -> None:
    for capacity in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="ReservoirBuffer: capacity is"):
            ReservoirBuffer(capacity)  # type: ignore[arg-type]
    buffer = ReservoirBuffer(4)
    with pytest.raises(ValueError, match="the buffer is empty"):
        buffer.sample(1)
    buffer.add(torch.ones(2, 3), torch.tensor([0, 1]))
    for call, error, says in (
        (lambda: buffer.add(), ValueError, "add got no tensors"),
        (lambda: buffer.add([1, 2]), TypeError, r"tensors\[0\] is a list"),
        (lambda: buffer.add(torch.ones(2, 3), torch.ones(3)), ValueError, r"tensors\[1\] has shape \(3,\); expected 2"),
        (lambda: buffer.add(torch.ones(2, 3)), ValueError, "add got 1 tensors; expected 2"),
        (lambda: buffer.add(torch.ones(2, 4), torch.tensor([0, 1])), ValueError, r"tensors\[0\] has rows of"),
        (lambda: buffer.add(torch.ones(2, 3), torch.ones(2)), ValueError, r"tensors\[1\] has rows of torch.float32"),
        (lambda: buffer.sample(0), ValueError, "count is 0"),
        (lambda: buffer.load_state_dict({"class": "RingBuffer"}), ValueError, "has class 'RingBuffer'"),
        (lambda: buffer.load_state_dict(ReservoirBuffer(5).state_dict()), ValueError, "capacity 5; expected 4"),
        (lambda: ClassBalancedBuffer(3).add(torch.ones(2)), ValueError, "expected labels at place 1"),
        (lambda: ClassBalancedBuffer(3).add(torch.ones(2), torch.ones(2)), ValueError, "expected integer classes"),
        (lambda: ClassBalancedBuffer(3, label=-1), ValueError, "label is -1"),
        (lambda: RingBuffer(3, per_class=4), ValueError, "per_class is 4"),
        (lambda: ReplayBuffer(3).add(torch.ones(1)), NotImplementedError, "_place"),
    ):
        with pytest.raises(error, match=says):
            call()  # type: ignore[no-untyped-call]
    state = buffer.state_dict()
    del state["generator"]
    with pytest.raises(ValueError, match="state_dict lacks 'generator'"):
        buffer.load_state_dict({**state, "seen": 99})
    assert len(buffer) == 2 and buffer.seen == 2
    leaf = torch.ones(1, 3, requires_grad=True)
    buffer.add(leaf * 2, torch.tensor([1]))
    assert not buffer.tensors[0].requires_grad
