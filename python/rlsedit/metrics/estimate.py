"""Means over facts with standard errors and bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Estimate", "bootstrap", "estimate", "estimate_of_means", "harmonic"]

LEVEL = 0.95
RESAMPLES = 1000
_CHUNK = 100


@dataclass(frozen=True)
class Estimate:
    """Mean over facts, its standard error, the number of facts, and a 95 % bootstrap interval; NaN where not known."""

    mean: float
    stderr: float
    count: int
    low: float = math.nan
    high: float = math.nan


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The mean, s / sqrt(n) with s of n - 1, and the percentile bootstrap over the values."""
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, 0)
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if n == 1:
        return Estimate(mean, math.nan, 1)
    low, high = bootstrap(array[:, None], lambda means: means[..., 0], seed=seed)
    return Estimate(mean, float(array.std(ddof=1)) / math.sqrt(n), n, low, high)


def bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a statistic of column means (Efron 1979), facts resampled with all their columns.

    Args:
        values: (n, k), a row for each fact, NaN where a fact has no such value.
        statistic: from column means (..., k) to numbers (...).
        seed: of the resampling.
    """
    generator = np.random.default_rng(seed)
    n = len(values)
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    found = []
    for start in range(0, RESAMPLES, _CHUNK):
        size = min(_CHUNK, RESAMPLES - start)
        counts = generator.multinomial(n, np.full(n, 1.0 / n), size=size)  # how often each fact is drawn
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(statistic((counts @ filled) / (counts @ known)))
    results = np.concatenate(found)
    results = results[~np.isnan(results)]
    if len(results) == 0:
        return math.nan, math.nan
    low, high = np.quantile(results, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def estimate_of_means(values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """A statistic of column means, with the standard error of the jackknife over facts and the bootstrap's interval.

    Args:
        values, statistic: as for `bootstrap`.
    """
    known, filled, n = ~np.isnan(values), np.nan_to_num(values), len(values)
    counts, sums = known.sum(axis=0), filled.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = float(statistic(sums / counts))
        without = statistic((sums - filled) / (counts - known))  # each fact left out in turn
    without = without[~np.isnan(without)] if n > 1 else without[:0]
    m = len(without)
    stderr = math.sqrt((m - 1) / m * float(((without - without.mean()) ** 2).sum())) if m > 1 else math.nan
    low, high = bootstrap(values, statistic) if n > 1 and not math.isnan(mean) else (math.nan, math.nan)
    return Estimate(mean, stderr, n, low, high)


def harmonic(means: np.ndarray) -> np.ndarray:
    """Harmonic mean over the last axis; 0 where one of them is 0, NaN where one is."""
    with np.errstate(divide="ignore"):
        return means.shape[-1] / (1.0 / means).sum(axis=-1)
