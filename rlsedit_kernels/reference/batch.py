"""The minimiser of the whole objective by one dense float64 factorisation, never by a recursion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlsedit_kernels.reference.arrays import Array, float64
from rlsedit_kernels.reference.rows import Factor, complement, prior_rows, told, unit_rows

Batch = Sequence[Any]
"""(K, V) or (K, V, noise); V is ignored where only the covariance is asked for."""

_Split = list[tuple[Array, "Array | None", float]]


def _split(batches: Iterable[Batch]) -> _Split:
    found: _Split = []
    for batch in batches:
        noise = float(batch[2]) if len(batch) > 2 else 1.0
        found.append((float64(batch[0]), None if batch[1] is None else float64(batch[1]), noise))
    return found


def _weights(split: _Split, forget: float) -> tuple[float, list[float]]:
    """Square roots of the weights that the prior and every batch have by now; 0 for a hard one."""
    ages = range(len(split) - 1, -1, -1)
    others = [(forget**a / noise) ** 0.5 if noise > 0.0 else 0.0 for a, (_, _, noise) in zip(ages, split, strict=True)]
    return forget ** (0.5 * len(split)), others


def _rows(prior: Any, split: _Split, forget: float) -> tuple[Array, Array]:
    """Rows A (m, d) of the prior and the soft batches with A'A = S, and the prior's N."""
    A, N = prior_rows(prior)
    first, others = _weights(split, forget)
    return np.concatenate([first * A, *(w * K for w, (K, _, _) in zip(others, split, strict=True) if w > 0.0)]), N


def _free(N: Array, split: _Split) -> Array:
    """The part of the span of N that no hard batch (noise 0) has fixed."""
    hard = [unit_rows(K)[0] for K, _, noise in split if noise == 0.0]
    return complement(N, np.concatenate(hard)) if hard else N


def batch_precision(prior: Any, batches: Iterable[Batch], forget: float = 1.0) -> Array:
    """S = forget^t S_0 + sum_s forget^(t-s) K_s'K_s / noise_s (d, d), soft batches only."""
    rows, _ = _rows(prior, _split(batches), forget)
    return rows.T @ rows


def batch_covariance(prior: Any, batches: Iterable[Batch], forget: float = 1.0) -> Array:
    """C = N (N'S N)^-1 N' (d, d), with N what the prior and the hard batches leave free."""
    split = _split(batches)
    rows, N = _rows(prior, split, forget)
    N = _free(N, split)
    if N.shape[1] == 0:
        return np.zeros((prior.d, prior.d))
    root = N @ Factor(rows @ N).root()
    return root @ root.T


def batch_solution(prior: Any, batches: Iterable[Batch], weight: Any = None, forget: float = 1.0) -> Array:
    """Minimiser of J_t(W) = sum_s |K_s W - V_s|^2 / noise_s + |W - W_0|^2_{S_0} by one QR factorisation of all rows.

    Args:
        prior: a `Prior` (or anything with its attributes).
        batches: (K (u, d), V (u, v)) or (K, V, noise); noise 0 makes an equality constraint, which must be
            consistent with the others.
        weight: W_0 (d, v); zeros where not given.
        forget: forgetting factor applied at each batch.

    Returns:
        W (d, v) float64.

    Numerics: off by about the unit roundoff times the root of the condition of S, in the S-norm relative to W - W_0.
    """
    split = _split(batches)
    if not split and weight is None:
        raise ValueError("batch_solution: batches must not be empty where no weight is given")
    targets = [V for _, V, _ in split if V is not None]
    if len(targets) < len(split):
        raise ValueError("batch_solution: every batch needs its targets V")
    W_0 = float64(weight) if weight is not None else np.zeros((prior.d, targets[0].shape[1]))
    rows, N = _rows(prior, split, forget)
    errors = [V - K @ W_0 for (K, _, _), V in zip(split, targets, strict=True)]
    others = _weights(split, forget)[1]
    soft = [w * E for w, E in zip(others, errors, strict=True) if w > 0.0]
    anchored = len(rows) - sum(map(len, soft))
    sides = np.concatenate([np.zeros((anchored, W_0.shape[1])), *soft])
    x = np.zeros_like(W_0)
    hard = [s for s, (_, _, noise) in enumerate(split) if noise == 0.0]
    if hard:  # a particular solution within the range of the prior, then the free part below
        K, lengths = unit_rows(np.concatenate([split[s][0] for s in hard]))
        U, s, V = told(K, N)
        x = N @ (V @ ((U.T @ (np.concatenate([errors[i] for i in hard]) / lengths[:, None])) / s[:, None]))
    N = _free(N, split)
    if N.shape[1]:
        x = x + N @ Factor(rows @ N).solve(sides - rows @ x)
    return W_0 + x


def batch_objective(prior: Any, batches: Iterable[Batch], W: Any, weight: Any = None, forget: float = 1.0) -> float:
    """J_t at W: soft batches and the two anchors, the older terms discounted by `forget`."""
    W = float64(W)
    shift = W - (float64(weight) if weight is not None else 0.0)
    value = float(np.sum((prior_rows(prior)[0] @ shift) ** 2))
    for K, V, noise in _split(batches):
        value *= forget
        if noise > 0.0 and V is not None:
            value += float(np.sum((K @ W - V) ** 2)) / noise
    return value
