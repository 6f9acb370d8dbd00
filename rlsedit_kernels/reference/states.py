"""References of the states: the rows of prior and batches in float64, every answer by a dense factorisation."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import solve_triangular

from rlsedit_kernels.reference.arrays import Array, float64
from rlsedit_kernels.reference.rows import Factor, complement, prior_rows, told, triangle

_SAME = 1e-9


class CovarianceState:
    """The list of batches and nothing else; C, S and gains are computed from it when asked for."""

    def __init__(self, prior: Any) -> None:
        self.prior = prior
        self._prior, self._N = prior_rows(prior)
        self._batches: list[tuple[Array, float]] = []
        """(K, noise), noise over what was forgotten since."""

    def _rows(self) -> Array:
        """A (m, r) with A'A = N'S N."""
        return np.concatenate([self._prior, *(K / noise**0.5 for K, noise in self._batches)]) @ self._N

    def _root(self) -> Array:
        """A (d, r) with A A' = C."""
        return self._N @ Factor(self._rows()).root()

    def covariance(self) -> Array:
        """C (d, d)."""
        if self._N.shape[1] == 0:
            return np.zeros((self.prior.d, self.prior.d))
        root = self._root()
        return root @ root.T

    def precision(self) -> Array:
        """S (d, d) on the space in which edits may lie."""
        rows = self._rows() @ self._N.T
        return rows.T @ rows

    def gain(self, K: Any, noise: float = 1.0) -> Array:
        """C K' (noise I + K C K')^+ (d, u); for noise > 0 it is S_new^-1 K' / noise, S_new = S + K'K / noise."""
        K = float64(K)
        if self._N.shape[1] == 0:
            return np.zeros((self.prior.d, len(K)))
        if noise > 0.0:
            old = self._rows()
            sides = np.concatenate([np.zeros((len(old), len(K))), np.eye(len(K)) / noise**0.5])
            return self._N @ Factor(np.concatenate([old, K @ self._N / noise**0.5])).solve(sides)
        U, s, V = told(K, self._N)
        root = Factor(self._rows()).root()  # K N = U s V', and so gain = C V (V'C V)^-1 s^-1 U'
        R, Q = triangle(root.T @ V)
        return self._N @ root @ Q @ solve_triangular(R, (U / s).T, trans="T")

    def update(self, K: Any, noise: float = 1.0, forget: float = 1.0) -> Array:
        """Gain of the batch, and S <- forget S + K'K / noise; noise 0 removes the span of K from the space."""
        K = float64(K)
        self._prior = forget**0.5 * self._prior
        self._batches = [(k, nu / forget) for k, nu in self._batches]
        gain = self.gain(K, noise)
        if noise > 0.0:
            self._batches.append((K, float(noise)))
        else:
            self._N = complement(self._N, K)
        return gain

    def commit(self, K: Any, noise: float = 1.0, forget: float = 1.0) -> None:
        """As `update`, without the gain."""
        self.update(K, noise, forget)

    def remove(self, K: Any, noise: float = 1.0) -> Array:
        """Drop the batch with these keys and noise; the gain F A^-1, F = C K' of before, which is S_new^-1 K' / noise.

        Raises:
            ValueError: there is no such batch.
        """
        K = float64(K)
        for index, (k, nu) in enumerate(self._batches):
            if abs(nu - noise) <= _SAME * noise and np.array_equal(k, K):
                del self._batches[index]
                rows = self._rows()
                # S^-1 K' = A (A'K')
                root = Factor(rows).root()
                return self._N @ root @ (root.T @ (self._N.T @ K.T)) / noise
        raise ValueError("remove: no batch with these keys and noise was written")

    def restrict(self, Q: Any) -> None:
        """Edits leave Q (d, q) alone from now on."""
        self._N = complement(self._N, float64(Q).T)


class SquareRootState(CovarianceState):
    """As `CovarianceState`, and the triangular factor of S by a dense QR factorisation when it is asked for."""

    @property
    def factor(self) -> Array:
        """R (d, d) upper triangular, diagonal > 0, R'R = S; for a prior on the whole space."""
        return triangle(self._rows())[0]
