"""Accuracy, F1 and Matthews correlation by hand, and their jackknife against leaving records out one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlsedit.tasks.classification import classification, matthews, weighted_f1


def test_two_classes_by_hand() -> None:
    # label 1: 4 records, 3 found; label 0: 6 records, 4 found
    labels = [1] * 4 + [0] * 6
    found = [1, 1, 1, 0, 0, 0, 0, 0, 1, 1]
    scores = classification(labels, found, 2)
    assert scores["accuracy"].mean == pytest.approx(0.7)
    assert scores["accuracy"].stderr == pytest.approx(math.sqrt(0.7 * 0.3 / 9))
    one, zero = 2 * 3 / (2 * 3 + 2 + 1), 2 * 4 / (2 * 4 + 1 + 2)
    assert scores["f1"].mean == pytest.approx(0.4 * one + 0.6 * zero)
    assert scores["mcc"].mean == pytest.approx((3 * 4 - 2 * 1) / math.sqrt(5 * 4 * 6 * 5))
    for value in scores.values():
        assert value.low < value.mean < value.high
        assert value.count == 10


def test_three_classes_by_their_definition() -> None:
    generator = np.random.default_rng(3)
    labels, found = generator.integers(0, 3, 60), generator.integers(0, 3, 60)
    found[:25] = labels[:25]
    x, y = np.eye(3)[labels], np.eye(3)[found]

    def covariance(a: np.ndarray, b: np.ndarray) -> float:
        return float(((a - a.mean(0)) * (b - b.mean(0))).sum())

    expected = covariance(x, y) / math.sqrt(covariance(x, x) * covariance(y, y))  # Gorodkin's definition
    scores = classification(labels.tolist(), found.tolist(), 3)
    assert scores["mcc"].mean == pytest.approx(expected)
    assert classification(labels.tolist(), found.tolist(), 5)["mcc"].mean == pytest.approx(expected)
    f1 = 0.0
    for c in range(3):
        hits = ((labels == c) & (found == c)).sum()
        f1 += (labels == c).mean() * 2 * hits / ((labels == c).sum() + (found == c).sum())
    assert scores["f1"].mean == pytest.approx(f1)


def test_the_jackknife_is_that_of_leaving_each_record_out() -> None:
    generator = np.random.default_rng(5)
    labels, found = generator.integers(0, 3, 23).tolist(), generator.integers(0, 3, 23).tolist()
    scores = classification(labels, found, 3)
    for name in ("f1", "mcc"):
        left = []
        for i in range(23):
            rest = classification(labels[:i] + labels[i + 1 :], found[:i] + found[i + 1 :], 3)
            left.append(rest[name].mean)
        centred = np.array(left) - np.mean(left)
        assert scores[name].stderr == pytest.approx(math.sqrt(22 / 23 * (centred**2).sum()))


def test_degenerate_cases() -> None:
    right = classification([0, 1, 1], [0, 1, 1], 2)
    assert [right[name].mean for name in ("accuracy", "f1", "mcc")] == pytest.approx([1, 1, 1])
    same = classification([0, 1, 1], [1, 1, 1], 2)
    assert same["mcc"].mean == 0.0
    assert same["f1"].mean == pytest.approx(2 / 3 * 4 / 5)
    single = classification([1], [1], 2)
    assert single["f1"].mean == 1.0
    assert math.isnan(single["f1"].stderr)
    inverse = np.array([[0.0, 5.0], [5.0, 0.0]])
    assert matthews(inverse) == pytest.approx(-1.0)
    assert weighted_f1(inverse) == 0.0


@pytest.mark.parametrize(("labels", "found"), [([], []), ([0], [0, 1]), ([0, 2], [0, 1]), ([0, -1], [0, 1])])
def test_wrong_calls(labels: list[int], found: list[int]) -> None:
    with pytest.raises(ValueError, match=r"labels and predictions must be as many"):
        classification(labels, found, 2)
