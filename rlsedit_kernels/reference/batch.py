"""The minimiser of the whole objective by one dense float64 solve, never by a recursion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve, null_space

from rlsedit_kernels.reference.arrays import Array, float64

Batch = Sequence[Any]
"""(K, V) or (K, V, noise); V is ignored where only the covariance is asked for."""

HARD_RANK = 1e-10
"""Singular values of hard-written keys below this fraction of the largest count as zero."""


def prior_matrices(prior: Any) -> tuple[Array, Array]:
    """(S_0, N): the information (d, d) of a prior and a basis N (d, r) of the space in which edits may lie.

    Reads only `kind`, `d`, `lam`, `mu`, `l2` and `arrays` of the prior.
    """
    eye = np.eye(prior.d)
    if prior.kind == "ridge":
        return prior.lam**2 * eye, eye
    if prior.kind == "precision":
        return float64(prior.arrays["S0"]), eye
    if prior.kind == "anchor":
        return prior.lam**2 * eye + prior.mu**2 * float64(prior.arrays["second_moment"]), eye
    if prior.kind == "anchor_keys":
        K0 = float64(prior.arrays["K0"])
        return prior.lam**2 * eye + prior.mu**2 * (K0.T @ K0), eye
    if prior.kind == "null_space":
        Q = float64(prior.arrays["basis"])
        return prior.l2 * (Q @ Q.T), Q
    raise ValueError(f"unknown kind of prior: {prior.kind!r}")


def _split(batch: Batch) -> tuple[Array, Array | None, float]:
    noise = float(batch[2]) if len(batch) > 2 else 1.0
    return float64(batch[0]), None if batch[1] is None else float64(batch[1]), noise


def _assembled(prior: Any, batches: Iterable[Batch], forget: float) -> tuple[Array, Array, list[tuple[Any, ...]]]:
    """S (soft batches), N, and the batches; a hard batch shrinks N to what it leaves free."""
    S, N = prior_matrices(prior)
    split = [_split(batch) for batch in batches]
    for K, _, noise in split:
        S = forget * S
        if noise > 0.0:
            S = S + K.T @ K / noise
    return S, N, split


def _free(N: Array, split: Sequence[tuple[Any, ...]]) -> Array:
    """The part of the span of N that no hard batch (noise 0) has fixed."""
    for K, _, noise in split:
        if noise == 0.0:
            N = N @ null_space(K @ N, rcond=HARD_RANK)
    return N


def batch_precision(prior: Any, batches: Iterable[Batch], forget: float = 1.0) -> Array:
    """S = forget^t S_0 + sum_s forget^(t-s) K_s'K_s / noise_s (d, d), soft batches only."""
    return _assembled(prior, batches, forget)[0]


def batch_covariance(prior: Any, batches: Iterable[Batch], forget: float = 1.0) -> Array:
    """C = N (N'S N)^-1 N' (d, d), with N what the prior and the hard batches leave free."""
    S, N, split = _assembled(prior, batches, forget)
    N = _free(N, split)
    if N.shape[1] == 0:
        return np.zeros_like(S)
    C = N @ cho_solve(cho_factor(N.T @ S @ N), N.T)
    return 0.5 * (C + C.T)


def batch_solution(prior: Any, batches: Iterable[Batch], weight: Any = None, forget: float = 1.0) -> Array:
    """Minimiser of J_t(W) = sum_s |K_s W - V_s|^2 / noise_s + |W - W_0|^2_{S_0} by one dense solve.

    Args:
        prior: a `Prior` (or anything with its attributes).
        batches: (K (u, d), V (u, v)) or (K, V, noise); noise 0 makes an equality constraint, which must be
            consistent with the others.
        weight: W_0 (d, v); zeros where not given.
        forget: forgetting factor applied at each batch.

    Returns:
        W (d, v) float64.
    """
    batches = [tuple(batch) for batch in batches]
    if not batches and weight is None:
        raise ValueError("batch_solution: batches must not be empty where no weight is given")
    S, N, split = _assembled(prior, batches, forget)
    W_0 = float64(weight) if weight is not None else np.zeros((prior.d, split[0][1].shape[1]))
    rhs = np.zeros_like(W_0)
    hard_K, hard_E = [], []
    for K, V, noise in split:
        rhs = forget * rhs
        error = V - K @ W_0
        if noise > 0.0:
            rhs = rhs + K.T @ error / noise
        else:
            hard_K.append(K)
            hard_E.append(error)
    x = np.zeros_like(W_0)
    if hard_K:  # a particular solution within the range of the prior, then the free part below
        A = np.concatenate(hard_K) @ N
        x = N @ (np.linalg.pinv(A, rcond=HARD_RANK) @ np.concatenate(hard_E))
    N = _free(N, split)
    if N.shape[1]:
        x = x + N @ cho_solve(cho_factor(N.T @ S @ N), N.T @ (rhs - S @ x))
    return W_0 + x


def batch_objective(prior: Any, batches: Iterable[Batch], W: Any, weight: Any = None, forget: float = 1.0) -> float:
    """J_t at W: soft batches and the two anchors, the older terms discounted by `forget`."""
    S_0, _ = prior_matrices(prior)
    split = [_split(batch) for batch in batches]
    W = float64(W)
    shift = W - (float64(weight) if weight is not None else 0.0)
    value = float(np.sum(shift * (S_0 @ shift)))
    for K, V, noise in split:
        value *= forget
        if noise > 0.0 and V is not None:
            value += float(np.sum((K @ W - V) ** 2)) / noise
    return value
