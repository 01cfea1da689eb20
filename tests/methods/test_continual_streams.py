"""Streams of tasks over arrays, tensors, data sets and scikit-learn's digits."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, TensorDataset

from tlkernels.methods.continual import streams
from tlkernels.methods.continual.streams import domain_stream, permuted_stream, rotated_stream, split_stream


def pair(n=24, classes=6, seed=0):
    x = torch.arange(n * 3, dtype=torch.float32).reshape(n, 3)
    return x, torch.arange(n) % classes


def test_examples():
    assert doctest.testmod(streams).failed == 0


def test_split_by_classes_keeps_labels_and_partitions_the_data():
    x, y = pair()
    stream = split_stream((x, y), 3, test=(x[:6], y[:6]))
    assert len(stream) == 3 and stream.num_classes == stream.outputs == 6
    assert [t.classes for t in stream] == [(0, 1), (2, 3), (4, 5)]
    assert torch.equal(torch.cat([t.inputs for t in stream])[:, 0].sort().values, x[:, 0])
    for task in stream:
        assert set(task.targets.tolist()) == set(task.classes)
        assert task.mask.nonzero().flatten().tolist() == list(task.classes)
        assert torch.equal(y[(task.inputs[:, 0] / 3).long()], task.targets)
        assert len(task.test_targets) == 2
    assert stream[1].number == 1 and stream[1].name == "classes 2 3" and stream[-1] is stream.tasks[2]


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_targets_within_tasks(scenario):
    stream = split_stream(pair(), [[5, 0], [3, 1, 2]], scenario=scenario)
    assert stream.outputs == 3 and stream.num_classes == 6
    _, y = pair()
    for task in stream:
        own = y[(task.inputs[:, 0] / 3).long()]
        assert [task.classes[k] for k in task.targets.tolist()] == own.tolist()
    assert torch.equal(stream[0].mask, torch.tensor([True, False, False, False, False, True]))


def test_split_sizes_and_seeds():
    assert [len(t.classes) for t in split_stream(pair(), 4)] == [2, 2, 1, 1]
    a, b, c = (split_stream(pair(), 3, seed=s) for s in (1, 1, 2))
    assert [t.classes for t in a] == [t.classes for t in b] != [t.classes for t in c]
    assert sorted(k for t in a for k in t.classes) == list(range(6))
    gaps = split_stream((np.zeros((4, 2)), np.array([3, 7, 7, 9])), 3)
    assert [t.classes for t in gaps] == [(3,), (7,), (9,)] and gaps.num_classes == 10


def test_loaders_and_task_ids():
    task = split_stream(pair(), 2)[1]
    x, y, t = next(iter(task.loader(5, task_ids=True)))
    assert torch.equal(x, task.inputs[:5]) and torch.equal(y, task.targets[:5]) and t.tolist() == [1] * 5
    first, again, other = (torch.cat([y for _, y in task.loader(5, seed=s)]) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first.sort().values, task.targets.sort().values)
    with pytest.raises(ValueError, match="test is True, but the stream was made without test data"):
        task.loader(5, test=True)


def test_joint_data():
    stream = split_stream(pair(), 3, test=pair())
    x, y, t = stream.joint(1).tensors
    assert set(y.tolist()) == {0, 1, 2, 3} and torch.equal(t, y // 2) and len(x) == 16
    assert len(stream.joint()) == len(stream.joint(test=True)) == 24
    with pytest.raises(ValueError, match="upto is 3; expected one of 0 to 2"):
        stream.joint(3)


def test_any_data_set():
    class Pairs(Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, i):
            return x[i], int(y[i])

    x, y = pair()
    expected = split_stream((x, y), 2)
    for data in (Pairs(), TensorDataset(x, y), (x.numpy(), y.numpy()), [x.tolist(), y.tolist()]):
        found = split_stream(data, 2, dtype=torch.float32)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


def test_scikit_learns_digits():
    digits = load_digits()
    stream = split_stream(digits, 5, dtype=torch.float32)
    assert sum(map(len, stream)) == 1797 and stream[0].inputs.shape[1:] == (64,)
    assert stream[0].inputs.dtype == torch.float32
    turned = rotated_stream((digits.images, digits.target), 3)
    assert [t.name for t in turned] == ["0 degrees", "60 degrees", "120 degrees"]
    assert turned[1].inputs.shape == (1797, 8, 8) and turned[1].inputs.dtype == torch.float64


def test_permuted():
    x, y = torch.randn(10, 2, 3, 4), torch.arange(10) % 3
    stream = permuted_stream((x, y), 3, test=(x[:4], y[:4]), seed=5)
    assert torch.equal(stream[0].inputs, x) and stream.outputs == 3 and stream.scenario == "domain"
    for task in stream:
        assert torch.equal(task.targets, y) and task.inputs.shape == x.shape and task.classes == (0, 1, 2)
        assert torch.equal(task.inputs.flatten(1).sort().values, x.flatten(1).sort().values)
        assert torch.equal(task.test_inputs, task.inputs[:4])  # the same order for train and test
    assert not torch.equal(stream[1].inputs, x) and not torch.equal(stream[1].inputs, stream[2].inputs)
    longer = permuted_stream((x, y), 4, seed=5)
    assert torch.equal(longer[2].inputs, stream[2].inputs)
    assert not torch.equal(permuted_stream((x, y), 2, seed=6)[1].inputs, stream[1].inputs)
    assert not torch.equal(permuted_stream((x, y), 1, identity_first=False)[0].inputs, x)


def test_rotated_quarters_are_exact_and_other_angles_turn_the_same_way():
    x, y = torch.rand(3, 2, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 1])
    stream = rotated_stream((x, y), [0, 90, 180, -90, 450])
    for task, quarters in zip(stream, (0, 1, 2, 3, 1), strict=True):
        assert torch.equal(task.inputs, torch.rot90(x, quarters, (2, 3)))
    near = rotated_stream((x, y), [90.0001, 180.0001], test=(x[:1], y[:1]))
    for task, quarters in zip(near, (1, 2), strict=True):
        torch.testing.assert_close(task.inputs, torch.rot90(x, quarters, (2, 3)), rtol=0, atol=1e-4)
        torch.testing.assert_close(task.test_inputs, task.inputs[:1])


def test_rotation_of_an_image_that_is_not_square_keeps_lengths():
    """A blob 3 to the right of the centre is 3 above it after a quarter, in pixels, not in units of the sides."""
    x = torch.zeros(1, 9, 15)
    x[0, 4, 10] = 1
    turned = rotated_stream((x, torch.tensor([0])), [90.0])[0].inputs
    assert turned.shape == x.shape
    torch.testing.assert_close(turned[0, 1, 7], torch.tensor(1.0), rtol=0, atol=1e-4)
    assert float(turned.sum()) == pytest.approx(1, abs=1e-4)


def test_domains():
    a, b = pair(12, 3), pair(6, 2)
    stream = domain_stream([a, b], tests=[b, a], names=["clean", "noisy"])
    assert [t.name for t in stream] == ["clean", "noisy"] and stream.outputs == 3
    assert stream[1].classes == (0, 1) and stream[1].mask.tolist() == [True, True, False]
    assert torch.equal(stream[0].test_inputs, b[0]) and torch.equal(stream[1].inputs, b[0])


X, Y = pair()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: split_stream((X, Y), 7), ValueError, "tasks is 7; expected at most 6"),
        (lambda: split_stream((X, Y), 0), ValueError, "tasks is 0; expected >= 1"),
        (lambda: split_stream((X, Y), [[0], [0, 1]]), ValueError, "expected disjoint classes"),
        (lambda: split_stream((X, Y), [[0], []]), ValueError, "one at least for each task"),
        (lambda: split_stream((X, Y), [[9]]), ValueError, "tasks has class 9, which data has not"),
        (lambda: split_stream((X, Y), [[0]], seed=1), ValueError, "seed is 1 with classes given in tasks"),
        (lambda: split_stream((X, Y), 2, scenario="both"), ValueError, "scenario is 'both'"),
        (lambda: split_stream((X, Y[:3]), 2), ValueError, r"inputs \(24, 3\) and labels \(3,\)"),
        (lambda: split_stream((X, Y - 1), 2), ValueError, "data has a label -1; expected >= 0"),
        (lambda: split_stream((X, Y.float()), 2), TypeError, "labels of torch.float32; expected whole numbers"),
        (lambda: split_stream((X,), 2), ValueError, r"data has 1 parts; expected \(inputs, labels\)"),
        (lambda: split_stream(3, 2), TypeError, "data is a int"),
        (lambda: split_stream((X[:0], Y[:0]), 1), ValueError, "data is empty"),
        (lambda: split_stream((X, Y), 2, test=(X, Y[:2])), ValueError, "test has inputs"),
        (lambda: permuted_stream((X, Y), 0), ValueError, "tasks is 0"),
        (lambda: permuted_stream((X, Y), 1.5), TypeError, "tasks is a float"),
        (
            lambda: permuted_stream((X, Y), 2, test=(X[:, :2], Y)),
            ValueError,
            r"test has inputs \(2,\); expected \(3,\)",
        ),
        (lambda: rotated_stream((X, Y), 2), ValueError, r"inputs \(24, 3\); expected \[N, H, W\]"),
        (lambda: rotated_stream((X.long()[:, None], Y), 2), TypeError, "inputs of torch.int64"),
        (lambda: rotated_stream((X[:, None], Y), [float("nan")]), ValueError, "angles is"),
        (lambda: domain_stream([]), ValueError, "domains is empty"),
        (lambda: domain_stream([(X, Y)], tests=[]), ValueError, "tests has 0 entries; expected 1"),
        (lambda: domain_stream([(X, Y)], names=["a", "b"]), ValueError, "names has 2 entries"),
    ],
)
def test_misuse(call, error, match):
    with pytest.raises(error, match=match):
        call()
