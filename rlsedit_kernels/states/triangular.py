"""Float64 algebra on a triangular factor R of any dtype: what is done once, or rarely, and has to be right.

No float64 copy of R is made except where a dense factorisation is asked for; R is read in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from rlsedit_kernels.errors import LeverageError
from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states.batch import LEVERAGE_MARGIN

_ROWS = 256
_POWERS = 5
_VECTORS = 4
_PANEL = 128


def factor_of(A: torch.Tensor) -> torch.Tensor:
    """The upper-triangular R with a diagonal >= 0 and R'R = A'A, for A (n, m), n >= m, float64."""
    R = torch.linalg.qr(A, mode="r")[1]
    R = R * torch.where(R.diagonal() < 0.0, -1.0, 1.0).to(R.dtype)[:, None]
    return R.triu()


def start(factor: PriorFactor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """R_0 (r, r) float64 of a prior, and the basis (d, r) of the space of edits where that is a proper subspace."""
    if factor.root_inverse is None:
        assert factor.scale is not None
        return torch.eye(factor.d, dtype=torch.float64, device=device) / factor.scale, None
    inverse = factor.root_inverse.to(device)
    if factor.rank == factor.d:
        return factor_of(inverse), None
    # S_0 = root_inverse' root_inverse = Q (R_0'R_0) Q' with an orthonormal basis Q of its range.
    basis, inner = torch.linalg.qr(inverse.mT)
    return factor_of(inner.mT), basis


def solve_rows(R: torch.Tensor, K: torch.Tensor) -> torch.Tensor:
    """X (u, r) float64 with X R = K: rows of the batch in whitened coordinates."""
    X, r = K.to(torch.float64, copy=True), R.shape[0]
    for start_ in range(0, r, _ROWS):
        stop = min(start_ + _ROWS, r)
        rows = R[start_:stop, start_:].to(torch.float64)
        block = torch.linalg.solve_triangular(rows[:, : stop - start_], X[:, start_:stop], upper=True, left=False)
        X[:, start_:stop] = block
        X[:, stop:].addmm_(block, rows[:, stop - start_ :], alpha=-1.0)
    return X


def solve_columns(R: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """W (r, v) float64 with R W = B."""
    W, r = B.to(torch.float64, copy=True), R.shape[0]
    for stop in range(r, 0, -_ROWS):
        start_ = max(stop - _ROWS, 0)
        rows = R[start_:stop, start_:].to(torch.float64)
        right = W[start_:stop].addmm_(rows[:, stop - start_ :], W[stop:], alpha=-1.0)
        W[start_:stop] = torch.linalg.solve_triangular(rows[:, : stop - start_], right, upper=True)
    return W


def extremes(R: torch.Tensor) -> tuple[float, float]:
    """|R| and |R^-1| in the 2-norm, estimated from below by block power iteration: 80 r^2 flops, for a regular R."""

    def times(x: torch.Tensor, transposed: bool) -> torch.Tensor:
        return ((R.mT if transposed else R) @ x.to(R.dtype)).to(torch.float64)

    def solve(x: torch.Tensor, transposed: bool) -> torch.Tensor:
        return solve_rows(R, x.mT).mT if transposed else solve_columns(R, x)

    return extremes_of(times, solve, R.shape[0], R.device)


Map = Callable[[torch.Tensor, bool], torch.Tensor]
"""Columns (r, p) float64 to R x or R^-1 x; the transposed of that where the second argument is true."""


def extremes_of(times: Map, solve: Map, r: int, device: torch.device) -> tuple[float, float]:
    """`extremes` of an R (r, r) of which products and solutions can be had."""
    generator = torch.Generator().manual_seed(0)
    start_ = torch.randn(r, min(_VECTORS, r), dtype=torch.float64, generator=generator, device="cpu").to(device)
    x, y, largest, smallest = start_, start_, 0.0, 0.0
    for _ in range(_POWERS):
        forward = times(torch.linalg.qr(x)[0], False)
        largest = float(torch.linalg.vector_norm(forward, dim=0).max())
        x = times(forward / max(largest, torch.finfo(torch.float64).tiny), True)
        y = solve(torch.linalg.qr(y)[0], True)
        smallest = float(torch.linalg.vector_norm(y, dim=0).max())
        y = solve(y / smallest, False)
    return largest, smallest


def system(H: torch.Tensor, noise: float) -> torch.Tensor:
    """Cholesky factor (u, u) float64 of noise I + H'H, for H (r, u) = R^-T K' and noise > 0.

    NaN where there is none, because H holds NaN or Inf: the host does not wait to find out.
    """
    wide = H.to(torch.float64)
    A = wide.mT @ wide
    A.diagonal().add_(noise)
    L, info = torch.linalg.cholesky_ex(A)
    return torch.where(info == 0, L, torch.nan)


def after(L: torch.Tensor, innovation: torch.Tensor, noise: float, forget: float) -> torch.Tensor:
    """What E = V - K W adds to the objective, <E, E_after> / noise, and |E_after|, E_after = noise' (L L')^-1 E.

    (2,) float64 on the device of E. L is `system` of noise' = forget noise: no difference is formed, however near the
    leverage is to 1.
    """
    E = innovation.to(torch.float64)
    residual = torch.cholesky_solve(E, L) * (forget * noise)
    return torch.stack([(E * residual).sum() / noise, residual.norm()])


def leverage(X: torch.Tensor, eps: float) -> tuple[torch.Tensor, float]:
    """I - X X' (u, u) and the largest eigenvalue of X X' for the rows X = K R^-1 of a batch, noise included.

    Raises:
        LeverageError: the leverage is 1 to working precision.
    """
    H = X @ X.mT
    H = (H + H.mT) * 0.5
    largest = float(torch.linalg.eigvalsh(H)[-1])
    margin = LEVERAGE_MARGIN * eps
    if not 1.0 - largest > margin:
        raise LeverageError(
            f"the batch has leverage {largest:.9g} and 1 - leverage must exceed {margin:.1e} in this precision: the "
            "state knows these directions by this batch alone, or the batch was never written; nothing was changed. "
            "Rebuild with refactor(batches that stay), or hand them to remove(..., remaining=batches)"
        )
    return torch.eye(H.shape[0], dtype=H.dtype, device=H.device) - H, largest


def remove_rows_(R: torch.Tensor, X: torch.Tensor, A: torch.Tensor, B: torch.Tensor | None) -> None:
    """R'R <- R'R - (X R)'(X R) in place, and the same rotation of B (Saunders 1972; LINPACK's xCHDD is its case u = 1).

    Args:
        R: (r, r), upper triangular, zeros below the diagonal.
        X: (u, r) float64.
        A: (u, u) = I - X X', positive definite.
        B: (r, v) or None.

    With L L' = A, [X'; L'] has orthonormal columns; an orthogonal Q that maps it to [0; I] maps [R; 0] to [R_new; rows
    taken out]. Q is put together from the last block of rows to the first, so that R_new stays triangular, each
    factor from a block X_c (n, u) of X' and the lower part L_b (u, u):
      top rows   [E, -E P], P = X_c L_b^-1, E upper triangular with E (I + P P') E' = I, diagonal > 0
      lower rows [(X_c M^-1)', (L_b M^-1)'], M'M = X_c'X_c + L_b'L_b.
    All of it in float64, R and B rounded once.
    """
    r, u = R.shape[0], X.shape[0]
    taken = torch.zeros(u, r, dtype=torch.float64, device=R.device)
    taken_B = None if B is None else torch.zeros(u, B.shape[1], dtype=torch.float64, device=R.device)
    for start_, stop, Q1, Q2 in removal_panels(X, A):
        below = torch.cat([R[start_:stop, start_:].to(torch.float64), taken[:, start_:]])
        R[start_:stop, start_:].copy_((Q1 @ below).triu())
        taken[:, start_:] = Q2 @ below
        if B is not None and taken_B is not None:
            below = torch.cat([B[start_:stop].to(torch.float64), taken_B])
            B[start_:stop].copy_(Q1 @ below)
            taken_B = Q2 @ below


def removal_panels(X: torch.Tensor, A: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Blocks of the Q of `remove_rows_`, the last first: start, stop, and the rows of Q that make [R; taken] new.

    Args:
        X: (u, r) float64.
        A: (u, u) = I - X X', positive definite.
    """
    lower = torch.linalg.cholesky(A).mT
    for stop in range(X.shape[1], 0, -_PANEL):
        start_ = max(stop - _PANEL, 0)
        Xc = X[:, start_:stop].mT
        P = torch.linalg.solve_triangular(lower, Xc, upper=True, left=False)
        inner = P @ P.mT
        inner.diagonal().add_(1.0)
        # inner = U U' with U upper triangular: a Cholesky factor read backwards.
        U = torch.linalg.cholesky(inner.flip(0, 1)).flip(0, 1)
        E = torch.linalg.solve_triangular(U, torch.eye(stop - start_, dtype=U.dtype, device=U.device), upper=True)
        stacked = torch.cat([Xc, lower])
        gram = stacked.mT @ stacked
        lower = torch.linalg.cholesky((gram + gram.mT) * 0.5).mT
        Q2 = torch.linalg.solve_triangular(lower, stacked, upper=True, left=False).mT
        yield start_, stop, torch.cat([E, -(E @ P)], dim=1), Q2


def complement(Q: torch.Tensor, tolerance: float = 1e-10) -> torch.Tensor:
    """Orthonormal basis (r, r - rank Q) of what is orthogonal to the columns of Q (r, q), float64."""
    U, sizes, _ = torch.linalg.svd(Q, full_matrices=True)
    return U[:, int((sizes > tolerance).sum()) :]
