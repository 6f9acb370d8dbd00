"""Accuracy, weighted F1 and Matthews correlation with standard errors and intervals, from the confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..metrics.estimate import Estimate, bootstrap, estimate

__all__ = ["classification", "matthews", "weighted_f1"]

Statistic = Callable[[np.ndarray], np.ndarray]


def weighted_f1(confusion: np.ndarray) -> np.ndarray:
    """F1 = 2 TP / (2 TP + FP + FN) of each class, averaged with the number of its records as weight; 0 where 0 / 0.

    Args:
        confusion: (..., c, c), counts or shares of (label, prediction).

    Returns:
        (...), what scikit-learn's `f1_score(average="weighted")` gives.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    support, predicted = confusion.sum(-1), confusion.sum(-2)
    both = support + predicted
    f1 = np.divide(2 * hits, both, out=np.zeros_like(hits, dtype=np.float64), where=both > 0)
    weighted: np.ndarray = (f1 * support).sum(-1) / support.sum(-1)
    return weighted


def matthews(confusion: np.ndarray) -> np.ndarray:
    """Matthews correlation of any number of classes (Gorodkin 2004, R_K); 0 where labels or predictions are all equal.

    Args:
        confusion: (..., c, c), counts or shares of (label, prediction).
    """
    shares = confusion / confusion.sum((-2, -1), keepdims=True)
    hits = np.trace(shares, axis1=-2, axis2=-1)
    support, predicted = shares.sum(-1), shares.sum(-2)
    spread = (1 - (support**2).sum(-1)) * (1 - (predicted**2).sum(-1))
    excess = hits - (support * predicted).sum(-1)
    root = np.sqrt(np.maximum(spread, 0))
    found: np.ndarray = np.divide(excess, root, out=np.zeros_like(excess), where=root > 1e-6)
    return found


def classification(labels: Sequence[int], predictions: Sequence[int], classes: int) -> dict[str, Estimate]:
    """Scores of predictions.

    Standard errors are s / sqrt(n) for the accuracy and those of the jackknife over records for the others; intervals
    are bootstrapped over records.

    Args:
        labels, predictions: (n,) in [0, classes).
        classes: number of classes.

    Returns:
        "accuracy", "f1" (weighted), "mcc".

    Raises:
        ValueError: different lengths, none, or a class out of range.
    """
    n, flat = len(labels), [*labels, *predictions]
    if n == 0 or len(predictions) != n or min(flat) < 0 or max(flat) >= classes:
        raise ValueError(
            f"classification: labels and predictions must be as many, at least one, in [0, {classes}); got {n} and "
            f"{len(predictions)} in [{min(flat, default=0)}, {max(flat, default=0)}]"
        )
    pairs = np.array(flat, dtype=np.int64).reshape(2, n)
    cells = np.eye(classes * classes)[pairs[0] * classes + pairs[1]]  # (n, classes^2), one 1 a row
    return {
        "accuracy": estimate((pairs[0] == pairs[1]).astype(float).tolist()),
        "f1": _estimate(cells, weighted_f1, classes),
        "mcc": _estimate(cells, matthews, classes),
    }


def _estimate(cells: np.ndarray, statistic: Statistic, classes: int) -> Estimate:
    n = len(cells)
    counts = cells.sum(0)

    def of(means: np.ndarray) -> np.ndarray:
        return statistic(means.reshape(*means.shape[:-1], classes, classes))

    mean = float(of(counts))
    if n == 1:
        return Estimate(mean, math.nan, 1)
    filled = np.flatnonzero(counts)  # leaving one record out gives one value for each cell that has records
    without = of(counts - np.eye(len(counts))[filled])
    weights = counts[filled] / n
    centre = float((weights * without).sum())
    stderr = math.sqrt((n - 1) * float((weights * (without - centre) ** 2).sum()))
    return Estimate(mean, stderr, n, *bootstrap(cells, of))
