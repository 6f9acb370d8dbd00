"""Least squares from rows, without ever forming a Gram matrix: the error grows with the condition, not its square."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import qr, solve_triangular

from rlsedit_kernels.reference.arrays import Array, float64

HARD_RANK = 1e-10
"""Part of a key, relative to the key, below which nothing of it counts as free."""


def prior_rows(prior: Any) -> tuple[Array, Array]:
    """(A, N): rows A (m, d) with N'A'A N = N'S_0 N, and a basis N (d, r) of the space in which edits may lie.

    Reads only `kind`, `d`, `lam`, `mu`, `l2` and `arrays` of the prior.
    """
    eye = np.eye(prior.d)
    if prior.kind == "ridge":
        return prior.lam * eye, eye
    if prior.kind == "precision":
        return _factor(float64(prior.arrays["S0"])), eye
    if prior.kind == "anchor":
        return _factor(prior.lam**2 * eye + prior.mu**2 * float64(prior.arrays["second_moment"])), eye
    if prior.kind == "anchor_keys":
        return np.concatenate([prior.lam * eye, prior.mu * float64(prior.arrays["K0"])]), eye
    if prior.kind == "null_space":
        Q = float64(prior.arrays["basis"])
        return np.sqrt(prior.l2) * Q.T, Q
    raise ValueError(f"unknown kind of prior: {prior.kind!r}")


def _factor(S: Array) -> Array:
    """R with R'R = S, of S scaled to the diagonal 1, so that bad scaling does no harm."""
    scale = np.sqrt(np.diagonal(S))
    return np.linalg.cholesky(S / np.outer(scale, scale)).T * scale


class Factor:
    """Q R of rows A (m, n), m >= n: long rows first and columns exchanged, which keeps what is small beside the large.

    Raises:
        LinAlgError: the rows do not span all n directions.
    """

    def __init__(self, rows: Array) -> None:
        self._order = np.argsort(-np.linalg.norm(rows, axis=1), kind="stable")
        self._Q, self._R, self._columns = qr(rows[self._order], mode="economic", pivoting=True)
        n = rows.shape[1]
        if self._R.shape[0] < n or not np.all(np.abs(np.diagonal(self._R)) > 0.0):
            raise np.linalg.LinAlgError(f"the rows do not determine all {n} directions")

    def solve(self, sides: Array) -> Array:
        """The minimiser X (n, v) of |A X - sides|, sides (m, v)."""
        X = np.empty((self._R.shape[1], sides.shape[1]))
        X[self._columns] = solve_triangular(self._R, self._Q.T @ sides[self._order])
        return X

    def root(self) -> Array:
        """L (n, n) with L L' = (A'A)^-1."""
        L = np.empty_like(self._R)
        L[self._columns] = solve_triangular(self._R, np.eye(len(self._R)))
        return L


def triangle(rows: Array) -> tuple[Array, Array]:
    """(R, Q) of rows (..., m, n), m >= n: R (..., n, n) upper triangular with a diagonal >= 0, Q (..., m, n).

    Long rows are taken first: beside them a short one keeps its digits, in whatever order they come.
    """
    R, Q = np.empty((*rows.shape[:-2], rows.shape[-1], rows.shape[-1])), np.empty_like(rows)
    for index in np.ndindex(*rows.shape[:-2]):
        order = np.argsort(-np.linalg.norm(rows[index], axis=1), kind="stable")
        q, r = np.linalg.qr(rows[index][order])
        signs = np.where(np.diagonal(r) < 0.0, -1.0, 1.0)
        R[index] = np.triu(r * signs[:, None])
        Q[index][order] = q * signs
    return R, Q


def told(K: Array, N: Array) -> tuple[Array, Array, Array]:
    """U (u, w), s (w) and V (r, w) of K N = U diag(s) V' for keys K (u, d), without what is rounding of K."""
    if N.shape[1] == 0:
        return np.zeros((len(K), 0)), np.zeros(0), np.zeros((0, 0))
    U, s, Vt = np.linalg.svd(K @ N, full_matrices=False)
    keep = s > HARD_RANK * np.linalg.norm(K, 2)
    return U[:, keep], s[keep], Vt[keep].T


def unit_rows(K: Array) -> tuple[Array, Array]:
    """Keys (u, d) divided by their lengths, and the lengths (u); a key of zeros stays one."""
    lengths = np.linalg.norm(K, axis=1)
    lengths = np.where(lengths > 0.0, lengths, 1.0)
    return K / lengths[:, None], lengths


def complement(N: Array, K: Array) -> Array:
    """The part of the span of N (d, r) that keys K (u, d) map to zero, as a basis."""
    V = told(unit_rows(K)[0], N)[2]
    if V.shape[1] == 0:
        return N
    Q, _ = np.linalg.qr(V, mode="complete")
    return N @ Q[:, V.shape[1] :]
