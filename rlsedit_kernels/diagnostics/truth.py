"""The batch solution of a stream so far: in float64, accumulated as it runs, and in 50 digits for small d."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from rlsedit_kernels.diagnostics.streams import Batch, Stream
from rlsedit_kernels.priors import Prior

DIGITS = 50


@dataclass(frozen=True)
class Exact:
    """What a state should hold after a number of batches, float64.

    Attributes:
        R: (r, r) upper triangular, R'R the precision on the space of edits.
        B: (r, v), R times W - W_0 there.
        W_0: (d, v).
        basis: N (d, r) with orthonormal columns, the space of edits of a null-space prior; None for all of it.
    """

    R: torch.Tensor
    B: torch.Tensor
    W_0: torch.Tensor
    basis: torch.Tensor | None = None

    @cached_property
    def shift(self) -> torch.Tensor:
        """W - W_0 (d, v)."""
        return self._extended(torch.linalg.solve_triangular(self.R, self.B, upper=True))

    @property
    def W(self) -> torch.Tensor:
        """The minimiser (d, v)."""
        return self.W_0 + self.shift

    @cached_property
    def C(self) -> torch.Tensor:
        """The covariance (d, d), S^-1 on the space of edits."""
        inverse = torch.cholesky_inverse(self.R, upper=True)
        return inverse if self.basis is None else self.basis @ inverse @ self.basis.mT

    def weighted(self, X: torch.Tensor) -> torch.Tensor:
        """R N'X for columns X (d, p): their lengths are those in the S-norm."""
        return self.R @ self._reduced(X)

    def norm(self, X: torch.Tensor) -> float:
        """|X| in the S-norm, sqrt(tr X'S X)."""
        return float(self.weighted(X).norm())

    def half(self, K: torch.Tensor) -> torch.Tensor:
        """H (r, u) with H'H = K C K' for keys K (u, d)."""
        return torch.linalg.solve_triangular(self.R.mT, self._reduced(K.to(torch.float64).mT), upper=False)

    def _reduced(self, X: torch.Tensor) -> torch.Tensor:
        return X if self.basis is None else self.basis.mT @ X

    def _extended(self, X: torch.Tensor) -> torch.Tensor:
        return X if self.basis is None else self.basis @ X


class Truth:
    """Runs beside a stream: R with R'R = S and R (W - W_0) in float64, by QR factorisations of what has come.

    Rows are gathered until there are as many as R has, so that a batch costs O(d^2 u). Neither S nor its inverse is
    formed: the error grows with the root of the condition of S, not with the condition.
    """

    def __init__(self, stream: Stream) -> None:
        prior = stream.prior
        self._W_0 = stream.W_0.to(torch.float64, copy=True)
        self._basis = prior.arrays["basis"] if prior.kind == "null_space" else None
        self._R = _root(prior)
        self._B = torch.zeros(len(self._R), stream.v, dtype=torch.float64, device="cpu")
        self._rows: list[torch.Tensor] = []
        self.innovations = 0.0
        """sum |V - K W_0|^2 / noise, forgotten like the rest."""

    def add(self, batch: Batch) -> None:
        """One batch more.

        Raises:
            ValueError: shapes, noise or forget do not fit; a hard write (noise 0) has no finite precision.
        """
        d, v = self._W_0.shape
        if batch.K.dim() != 2 or batch.K.shape[1] != d or batch.V.shape != (len(batch.K), v):
            raise ValueError(
                f"Truth: K and V of a batch must have shapes (u, {d}) and (u, {v}), got {tuple(batch.K.shape)} and "
                f"{tuple(batch.V.shape)}"
            )
        if not 0.0 < batch.noise < math.inf:
            raise ValueError(f"Truth: noise of a batch must be > 0 and finite, got {batch.noise}")
        if not 0.0 < batch.forget <= 1.0:
            raise ValueError(f"Truth: forget of a batch must be in (0, 1], got {batch.forget}")
        K, D = batch.K.to(torch.float64), batch.V.to(torch.float64)
        D = D - K @ self._W_0
        K = K if self._basis is None else K @ self._basis
        if batch.forget != 1.0:
            for rows in (self._R, self._B, *self._rows):
                rows.mul_(math.sqrt(batch.forget))
        self._rows.append(torch.cat([K, D], dim=1).div_(math.sqrt(batch.noise)))
        self.innovations = batch.forget * self.innovations + float(D.square().sum()) / batch.noise
        if sum(map(len, self._rows)) >= len(self._R):
            self._R, self._B = self._folded()
            self._rows = []

    def _folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first rows of Q'[R B; K D], long rows first: a short one keeps its digits below them."""
        if not self._rows:
            return self._R.clone(), self._B.clone()
        stacked = torch.cat([torch.cat([self._R, self._B], dim=1), *self._rows])
        n = len(self._R)
        order = stacked[:, :n].norm(dim=1).argsort(descending=True, stable=True)
        _, found = torch.linalg.qr(stacked[order], mode="r")
        return found[:n, :n].contiguous(), found[:n, n:].contiguous()

    def now(self) -> Exact:
        """The batch solution of all batches so far; whether and when it is asked for changes nothing.

        Raises:
            ValueError: float64 cannot hold it, or prior and batches do not determine it.
        """
        R, B = self._folded()
        pivots = R.diagonal().abs()
        if not bool((pivots > 0.0).all() & torch.isfinite(R).all() & torch.isfinite(B).all()):
            raise ValueError(
                f"Truth: the batch solution is not determined, or beyond float64: pivots of its factor are "
                f"{float(pivots.min()):.1e} to {float(pivots.max()):.1e}"
            )
        return Exact(R, B, self._W_0, self._basis)


def _root(prior: Prior) -> torch.Tensor:
    """R_0 (r, r) float64, upper triangular, R_0'R_0 the precision of the prior on its space of edits."""
    if prior.kind == "null_space":
        assert prior.l2 is not None
        return math.sqrt(prior.l2) * torch.eye(prior.arrays["basis"].shape[1], dtype=torch.float64, device="cpu")
    if prior.kind == "ridge":
        return (prior.lam or 0.0) * torch.eye(prior.d, dtype=torch.float64, device="cpu")
    S = prior.factor.precision() if prior.factor.lifted else prior.information()
    scale = S.diagonal().sqrt()  # a factor of a matrix with the diagonal 1 does not see bad scaling
    return torch.linalg.cholesky(S / torch.outer(scale, scale)).mT * scale


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
