"""The accuracy matrix and its measures, by numbers worked out by hand."""

from __future__ import annotations

import doctest
import math

import matplotlib as mpl
import numpy as np
import pytest

from tlkernels.methods.continual import metrics
from tlkernels.methods.continual.metrics import AccuracyMatrix, summarize

mpl.use("Agg")

R = [[0.9, 0.2, 0.1], [0.95, 0.8, 0.3], [0.5, 0.7, 0.6]]


def filled(**options):
    r = AccuracyMatrix(3, baseline=[0.1, 0.15, 0.2], joint=[0.9, 0.85, 0.8], **options)
    for t, row in enumerate(R):
        r.update(t, row)
    return r


def test_examples():
    assert doctest.testmod(metrics).failed == 0


def test_measures_by_hand():
    r = filled()
    assert r.average_accuracy() == pytest.approx((0.5 + 0.7 + 0.6) / 3)
    assert r.average_accuracy(1) == pytest.approx((0.95 + 0.8) / 2)
    assert r.average_incremental_accuracy() == pytest.approx((0.9 + 0.875 + 0.6) / 3)
    # task 0 was best after task 1
    assert r.forgetting() == pytest.approx(((0.95 - 0.5) + (0.8 - 0.7)) / 2)
    assert r.forgetting(1) == pytest.approx(0.9 - 0.95)
    assert r.backward_transfer() == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)
    assert r.forward_transfer() == pytest.approx(((0.2 - 0.15) + (0.3 - 0.2)) / 2)
    assert r.forward_transfer(1) == pytest.approx(0.05)
    assert r.intransigence() == pytest.approx((0.0 + 0.05 + 0.2) / 3)
    assert list(r.summary()) == [
        "average_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer", "forward_transfer",
        "intransigence",
    ]  # fmt: skip
    np.testing.assert_array_equal(r.matrix, R)
    r.matrix[0, 0] = 7  # a copy
    assert r.matrix[0, 0] == 0.9


def test_filling_and_what_is_missing():
    r = AccuracyMatrix(3)
    with pytest.raises(ValueError, match="average_accuracy after 0 tasks; expected 1 at least"):
        r.average_accuracy()
    r.update(0, [0.9])
    assert r.learned == 1 and r.average_accuracy() == 0.9 and set(r.summary()) == {
        "average_accuracy", "average_incremental_accuracy",
    }  # fmt: skip
    with pytest.raises(ValueError, match="forgetting after 1 tasks; expected 2 at least"):
        r.forgetting()
    with pytest.raises(ValueError, match="backward_transfer after 1 tasks"):
        r.backward_transfer()
    r.update(1, {1: 0.8})
    with pytest.raises(
        ValueError, match="average_accuracy needs the accuracy of task 0 after task 1, which is missing"
    ):
        r.average_accuracy()
    r.update(1, {0: 0.7})
    assert r.forgetting() == pytest.approx(0.2) and r.average_accuracy() == 0.75
    with pytest.raises(ValueError, match="forward_transfer needs baseline"):
        r.forward_transfer()
    with pytest.raises(ValueError, match="intransigence needs joint"):
        r.intransigence()
    lower = AccuracyMatrix(2, baseline=[0.5, 0.5])  # the tasks to come were not measured
    lower.update(0, [0.9])
    lower.update(1, [0.8, 0.9])
    assert "forward_transfer" not in lower.summary() and lower.summary()["forgetting"] == pytest.approx(0.1)


def test_json_and_state():
    r = filled(names=["a", "b", "c"])
    again = AccuracyMatrix.from_json(r.to_json())
    np.testing.assert_array_equal(again.matrix, r.matrix)
    assert again.names == ["a", "b", "c"] and again.summary() == r.summary()
    half = AccuracyMatrix(3)
    half.update(0, [0.5, math.nan])
    back = AccuracyMatrix.from_json(half.to_json())
    np.testing.assert_array_equal(back.matrix, half.matrix)
    assert "NaN" not in half.to_json() and back.baseline is None
    before = half.state_dict()
    for bad, match in (
        ({**r.state_dict(), "tasks": 2}, "state_dict has 2 tasks; expected 3"),
        ({"tasks": 3}, "state_dict lacks"),
        ({**r.state_dict(), "matrix": [[0.1] * 3, [0.2] * 3, [1.5] * 3]}, "accuracies has 1.5"),
        ({**r.state_dict(), "matrix": []}, "has 0 rows; expected 3"),
    ):
        with pytest.raises(ValueError, match=match):
            half.load_state_dict(bad)
    assert half.state_dict() == before
    with pytest.raises(ValueError, match="text is not what to_json returns"):
        AccuracyMatrix.from_json("[1]")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: AccuracyMatrix(0), ValueError, "tasks is 0; expected >= 1"),
        (lambda: AccuracyMatrix(2.0), TypeError, "tasks is a float"),
        (lambda: AccuracyMatrix(2, baseline=[0.1]), ValueError, "baseline has 1 accuracies; expected 2"),
        (lambda: AccuracyMatrix(2, joint=[0.1, 1.1]), ValueError, r"joint has 1.1; expected accuracies in \[0, 1\]"),
        (lambda: AccuracyMatrix(2, names=["a"]), ValueError, "names has 1 entries"),
        (lambda: AccuracyMatrix(2).update(2, [0.1]), ValueError, "trained is 2; expected one of 0 to 1"),
        (lambda: AccuracyMatrix(2).update(True, [0.1]), TypeError, "trained is a bool"),
        (lambda: AccuracyMatrix(2).update(0, [0.1, 0.2, 0.3]), ValueError, r"accuracies has shape \(3,\)"),
        (lambda: AccuracyMatrix(2).update(0, []), ValueError, "accuracies is empty"),
        (lambda: AccuracyMatrix(2).update(0, "ab"), TypeError, "accuracies is a str"),
        (lambda: AccuracyMatrix(2).update(0, {3: 0.5}), ValueError, "accuracies is 3; expected one of 0 to 1"),
        (lambda: filled().average_accuracy(3), ValueError, "after is 3"),
        (lambda: summarize([]), ValueError, "runs is empty"),
        (lambda: summarize([R]), TypeError, "runs has a list"),
        (lambda: summarize([filled(), AccuracyMatrix(2)]), ValueError, "expected equal numbers"),
    ],
)
def test_misuse(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_single_task():
    r = AccuracyMatrix(1, joint=[1.0])
    r.update(0, [0.75])
    assert r.summary() == {"average_accuracy": 0.75, "average_incremental_accuracy": 0.75, "intransigence": 0.25}


def test_mean_and_spread_over_seeds():
    runs = []
    for shift in (0.0, 0.1, 0.2):
        r = AccuracyMatrix(2)
        r.update(0, [0.5])
        r.update(1, [0.2 + shift, 0.4 + shift])
        runs.append(r)
    found = summarize(runs)
    assert found["average_accuracy"] == pytest.approx((0.4, 0.1))
    assert found["backward_transfer"] == pytest.approx((-0.2, 0.1))
    mean, spread = summarize(runs[:1])["forgetting"]
    assert mean == pytest.approx(0.3) and math.isnan(spread)


def test_plot():
    import matplotlib.pyplot as plt

    r = AccuracyMatrix(3, names=["a", "b", "c"])
    r.update(0, [0.9])
    r.update(1, [0.3, 0.8])
    _figure, ax = plt.subplots()
    assert r.plot(ax) is ax
    assert [t.get_text() for t in ax.texts] == ["0.90", "0.30", "0.80"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
    assert ax.images[0].get_array().mask.sum() == 6 and ax.images[0].get_clim() == (0, 1)
    other = r.plot(annotate=False)
    assert other is not ax and not other.texts
    plt.close("all")
