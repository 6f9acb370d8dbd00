"""The batch solution of a stream so far: in float64, accumulated as it runs, and in 50 digits for small d."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from rlsedit_kernels.diagnostics.streams import Batch, Stream

DIGITS = 50


@dataclass(frozen=True)
class Exact:
    """What a state should hold after a number of batches, float64.

    Attributes:
        S: (r, r) the precision on the space of edits.
        rhs: (r, v), S times W - W_0 there.
        W_0: (d, v).
        basis: N (d, r) with orthonormal columns, the space of edits of a null-space prior; None for all of it.
    """

    S: torch.Tensor
    rhs: torch.Tensor
    W_0: torch.Tensor
    basis: torch.Tensor | None = None

    @cached_property
    def L(self) -> torch.Tensor:
        """Lower factor of S, taken after the diagonal has been scaled to 1: its error does not see bad scaling."""
        scale = self.S.diagonal().sqrt()
        return scale[:, None] * torch.linalg.cholesky(self.S / torch.outer(scale, scale))

    @cached_property
    def shift(self) -> torch.Tensor:
        """W - W_0 (d, v), with one step of refinement."""
        x = torch.cholesky_solve(self.rhs, self.L)
        return self._extended(x + torch.cholesky_solve(self.rhs - self.S @ x, self.L))

    @property
    def W(self) -> torch.Tensor:
        """The minimiser (d, v)."""
        return self.W_0 + self.shift

    @cached_property
    def C(self) -> torch.Tensor:
        """The covariance (d, d), S^-1 on the space of edits."""
        inverse = torch.cholesky_inverse(self.L)
        return inverse if self.basis is None else self.basis @ inverse @ self.basis.mT

    def weighted(self, X: torch.Tensor) -> torch.Tensor:
        """L'N'X for columns X (d, p): their lengths are those in the S-norm."""
        return self.L.mT @ self._reduced(X)

    def norm(self, X: torch.Tensor) -> float:
        """|X| in the S-norm, sqrt(tr X'S X)."""
        return float(self.weighted(X).norm())

    def half(self, K: torch.Tensor) -> torch.Tensor:
        """H (r, u) with H'H = K C K' for keys K (u, d)."""
        return torch.linalg.solve_triangular(self.L, self._reduced(K.to(torch.float64).mT), upper=False)

    def _reduced(self, X: torch.Tensor) -> torch.Tensor:
        return X if self.basis is None else self.basis.mT @ X

    def _extended(self, X: torch.Tensor) -> torch.Tensor:
        return X if self.basis is None else self.basis @ X


class Truth:
    """Runs beside a stream: S and its right-hand side in float64, O(d^2 u) a batch, a factor when it is asked for."""

    def __init__(self, stream: Stream) -> None:
        prior = stream.prior
        self._W_0 = stream.W_0.to(torch.float64)
        self._basis = prior.arrays["basis"] if prior.kind == "null_space" else None
        if self._basis is not None:
            assert prior.l2 is not None
            self._S = prior.l2 * torch.eye(self._basis.shape[1], dtype=torch.float64, device="cpu")
        else:
            self._S = prior.factor.precision() if prior.factor.lifted else prior.information()
        self._rhs = torch.zeros(len(self._S), stream.v, dtype=torch.float64, device="cpu")
        self.innovations = 0.0
        """sum |V - K W_0|^2 / noise, forgotten like the rest."""

    def add(self, batch: Batch) -> None:
        """One batch more."""
        K, D = batch.K.to(torch.float64), batch.V.to(torch.float64)
        D = D - K @ self._W_0
        K = K if self._basis is None else K @ self._basis
        self._S.mul_(batch.forget).addmm_(K.mT, K, alpha=1.0 / batch.noise)
        self._rhs.mul_(batch.forget).addmm_(K.mT, D, alpha=1.0 / batch.noise)
        self.innovations = batch.forget * self.innovations + float(D.square().sum()) / batch.noise

    def now(self) -> Exact:
        """The batch solution of all batches so far."""
        return Exact((self._S + self._S.mT) * 0.5, self._rhs.clone(), self._W_0, self._basis)


def in_digits(stream: Stream, batches: int, digits: int = DIGITS) -> np.ndarray:
    """W (d, v) after `batches` batches, worked out in `digits` decimal digits and rounded once to float64.

    For small d and short streams: about d^2 u batches multiplications of mpmath. It tells how wrong `Truth` is.

    Raises:
        ImportError: mpmath is not installed.
        ValueError: digits below 16.
    """
    if digits < 16:
        raise ValueError(f"in_digits: digits must be >= 16, got {digits}")
    import mpmath

    with mpmath.workdps(digits):
        S, W_0 = _exact(mpmath, stream.prior.information()), _exact(mpmath, stream.W_0)
        rhs = W_0 * mpmath.mpf(0)
        source = stream.batches()
        for _ in range(batches):
            batch = next(source)
            K, V = _exact(mpmath, batch.K), _exact(mpmath, batch.V)
            weight, forget = 1 / mpmath.mpf(batch.noise), mpmath.mpf(batch.forget)
            S = forget * S + weight * (K.T @ K)
            rhs = forget * rhs + weight * (K.T @ (V - K @ W_0))
        x = _solved(S, rhs)
        return (W_0 + x).astype(np.float64)


def _exact(mpmath: Any, A: torch.Tensor) -> np.ndarray:
    return np.vectorize(lambda entry: mpmath.mpf(float(entry)), otypes=[object])(A.to(torch.float64).numpy())


def _solved(S: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """S^-1 rhs by Gaussian elimination on numbers of any kind; no pivoting is needed for a positive definite S."""
    A, X = S.copy(), rhs.copy()
    n = len(A)
    for i in range(n):
        if not A[i, i] > 0:
            raise ValueError("in_digits: the precision matrix is not positive definite; use more digits")
        for j in range(i + 1, n):
            factor = A[j, i] / A[i, i]
            A[j, i:] = A[j, i:] - factor * A[i, i:]
            X[j] = X[j] - factor * X[i]
    for i in reversed(range(n)):
        X[i] = (X[i] - A[i, i + 1 :] @ X[i + 1 :]) / A[i, i] if i + 1 < n else X[i] / A[i, i]
    return X


def checkpoints(batches: int, each_decade: int = 12) -> tuple[int, ...]:
    """Numbers of batches after which errors are looked at: geometric, from 1 to `batches`."""
    count = max(1, math.ceil(each_decade * math.log10(max(batches, 2))))
    return tuple(sorted({min(batches, round(10 ** (i / each_decade))) for i in range(count + 1)} | {batches}))
