"""One batch seen by a state: the factored u x u system, the gain and the columns of the downdate.

Everything a commit could fail on is found here, before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsedit_kernels import ops
from rlsedit_kernels.errors import BreakdownError, LeverageError

PIVOT_SLACK = 32.0
"""A pivot of chol(noise I + G) may fall below the noise by this many times u eps max(G) before it is called
a breakdown: the rounding error of G itself."""

TRUNCATION = 8.0
"""Eigenvalues of G below this many times max(u, 8) eps max(G) count as zero when noise = 0."""

LEVERAGE_MARGIN = 1e4
"""Removal is refused where 1 - leverage is below this many eps: four digits are then left at least."""


@dataclass(frozen=True)
class BatchFactor:
    """A batch with M = (noise I + G)^-1 in factored form, in the coordinates of the form that made it.

    Attributes:
        gain: (r, u) = Y M.
        Z: (r, w) with Z Z' = gain Y'; w = u, or the rank of G where the system was truncated.
        G: (u, u) = K Y.
        root: (u, w), root root' = M.
        pivot: smallest pivot of the factored system divided by the noise (>= 1 for a healthy state), or
            None where noise = 0.
        rank: w.
    """

    gain: torch.Tensor
    Z: torch.Tensor
    G: torch.Tensor
    root: torch.Tensor
    pivot: float | None
    rank: int


def factor(Y: torch.Tensor, G: torch.Tensor, noise: float) -> BatchFactor:
    """Factor noise I + G; for noise = 0, or a system singular to rounding, on the range of G.

    Raises:
        BreakdownError: G has a negative eigenvalue beyond its rounding error: the covariance is broken.
    """
    u = G.shape[-1]
    eps = torch.finfo(G.dtype).eps
    largest = float(G.diagonal().max())
    if noise > 0.0:
        shifted = G.clone()
        shifted.diagonal().add_(noise)
        L, info = ops.cholesky(shifted)
        if int(info) == 0:
            pivot = float(L.diagonal().min()) ** 2
            if pivot >= noise - PIVOT_SLACK * u * eps * largest:
                gain, Z, _ = ops.gain_solve(Y, G, noise)
                identity = torch.eye(u, dtype=G.dtype, device=G.device)
                root = torch.linalg.solve_triangular(L.mT, identity, upper=True)
                return BatchFactor(gain, Z, G, root, pivot / noise, u)
    return _truncated(Y, G, noise)


def _truncated(Y: torch.Tensor, G: torch.Tensor, noise: float) -> BatchFactor:
    u = G.shape[-1]
    eps = torch.finfo(G.dtype).eps
    values, vectors = torch.linalg.eigh(G.to(torch.float64))
    low, high = float(values[0]), float(values[-1])
    tolerance = TRUNCATION * max(u, 8) * eps * max(abs(high), abs(low))
    if low < -4.0 * tolerance - noise * 1e-3:
        raise BreakdownError(
            f"K C K' has the negative eigenvalue {low:.3e} beside {high:.3e}: the covariance is no longer positive "
            "semi-definite in this precision; nothing was written. Rebuild with refactor(batches), or use "
            "form='whitened' or dtype=torch.float64"
        )
    shifted = values.clamp_min(0.0) + noise
    keep = shifted > tolerance
    inverse_roots = (vectors[:, keep] / shifted[keep].sqrt()).to(G.dtype)
    Z = Y @ inverse_roots
    pivot = float(shifted[0]) / noise if noise > 0.0 else None
    return BatchFactor(Z @ inverse_roots.mT, Z, G, inverse_roots, pivot, int(keep.sum()))


def removal(F: torch.Tensor, H: torch.Tensor, noise: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Gain and columns for taking a batch back (design, fact 5).

    With F = C K' and A = noise I - K F: gain = F A^-1 and X = F chol(A)^-T, so that C <- C + X X'.

    Args:
        F: (r, u).
        H: (u, u) = K F, symmetric.
        noise: > 0, that of the batch when it was written.

    Returns:
        gain (r, u), X (r, u) and the leverage, the largest eigenvalue of K F / noise.

    Raises:
        LeverageError: the leverage is 1 to working precision.
    """
    values = torch.linalg.eigvalsh(H.to(torch.float64))
    leverage = float(values[-1]) / noise
    margin = LEVERAGE_MARGIN * torch.finfo(H.dtype).eps
    if not 1.0 - leverage > margin:
        raise LeverageError(
            f"the batch has leverage {leverage:.9g} (1 - leverage must exceed {margin:.1e} in {H.dtype}): this state "
            "knows these directions by this batch alone, or the batch was never written; nothing was changed. "
            "Rebuild with refactor(batches that stay)"
        )
    A = (-H).to(torch.float64)
    A.diagonal().add_(noise)
    L = torch.linalg.cholesky(A)
    root = torch.linalg.solve_triangular(L.mT, torch.eye(L.shape[-1], dtype=L.dtype, device=L.device), upper=True)
    root = root.to(F.dtype)
    X = F @ root
    return X @ root.mT, X, leverage
