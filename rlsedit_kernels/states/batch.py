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

CAREFUL_FROM = 2e-5
"""From this value of (unit roundoff) max(K C K') / noise on, a batch is worked out in float64: what it leaves
of C is then smaller than C by the reciprocal, and a difference formed in working precision would lose it."""

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


def needs_care(G: torch.Tensor, noise: float) -> bool:
    """Whether this batch tells so much more than the state knew that working precision would not do.

    The update is a difference, C - Y (noise I + G)^-1 Y'; with s = max(G) / noise it leaves about C / s in the
    direction of the keys, at a rounding error of eps |C|. Stored values may well be of working precision: errors
    that C brings along are contracted by the update, those of the difference itself are not.
    """
    eps = 0.5 * torch.finfo(G.dtype).eps
    return G.dtype == torch.float32 and noise > 0.0 and eps * float(G.diagonal().max()) > CAREFUL_FROM * noise


def factor(Y: torch.Tensor, G: torch.Tensor, noise: float, eps: float) -> BatchFactor:
    """Factor noise I + G; for noise = 0, or a system singular to rounding, on the range of G.

    Args:
        Y, G: products of the batch.
        noise: >= 0.
        eps: machine epsilon of the covariance they were made with (Y and G may be wider).

    Raises:
        BreakdownError: G has a negative eigenvalue beyond its rounding error: the covariance is broken.
    """
    u = G.shape[-1]
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
    return _truncated(Y, G, noise, eps)


def _truncated(Y: torch.Tensor, G: torch.Tensor, noise: float, eps: float) -> BatchFactor:
    u = G.shape[-1]
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


def removal(F: torch.Tensor, H: torch.Tensor, noise: float, eps: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Gain and columns for taking a batch back (docs/mathematics.md, fact 5).

    With F = C K' and A = noise I - K F: gain = F A^-1 and X = F chol(A)^-T, so that C <- C + X X'.

    Args:
        F: (r, u) float64.
        H: (u, u) float64 = K F, symmetric.
        noise: > 0, that of the batch when it was written.
        eps: machine epsilon of the covariance.

    Returns:
        gain (r, u), X (r, u) and the leverage, the largest eigenvalue of K F / noise.

    Raises:
        LeverageError: the leverage is 1 to working precision.
    """
    leverage = float(torch.linalg.eigvalsh(H)[-1]) / noise
    margin = LEVERAGE_MARGIN * eps
    if not 1.0 - leverage > margin:
        raise LeverageError(
            f"the batch has leverage {leverage:.9g} and 1 - leverage must exceed {margin:.1e} in this precision: the "
            "state knows these directions by this batch alone, or the batch was never written; nothing was changed. "
            "Rebuild with refactor(batches that stay)"
        )
    A = -H
    A.diagonal().add_(noise)
    L = torch.linalg.cholesky(A)
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    root = torch.linalg.solve_triangular(L.mT, identity, upper=True)
    X = F @ root
    return X @ root.mT, X, leverage
