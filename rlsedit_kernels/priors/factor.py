"""Factors of a prior in float64: C_0 = T T' with T (d, r), and what had to be done to get it.

Two roads. An eigendecomposition gives the exact spectrum and can lift a singular matrix; it costs about
9 d^3 flops and is taken up to d = `EIGEN_LIMIT`, or where the matrix turns out to need it. Above that a
Cholesky factor S = L L' costs d^3 / 3 and gives T = L^-T; its extreme eigenvalues are estimated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

EIGEN_LIMIT = 2048
"""Largest d at which the spectrum is computed and not estimated."""

LIFT = 1e-12
"""Eigenvalues of a singular precision are lifted to this fraction of the largest: what float64 can resolve
of a second moment that was itself accumulated in floating point, with a margin of about 1e4."""

NEGATIVE = 1e-6
"""Eigenvalues below minus this fraction of the largest are no rounding error (float32 accumulation included)."""

CONDITION_WARNING = 1e9
"""From this condition on `health()` says that the prior is ill-conditioned."""

_CHOLESKY_CONDITION = 1e11
_POWER_STEPS = 50


@dataclass(frozen=True)
class PriorFactor:
    """C_0 = T T' and its inverse, in float64.

    Attributes:
        d: dimension of a key.
        rank: r, columns of T; less than d for a null space.
        scale: for a ridge, T = scale * I and no matrix is kept; otherwise None.
        root: T (d, r), or None for a ridge.
        root_inverse: (r, d) with root_inverse @ T = I, or None for a ridge.
        largest, smallest: extreme eigenvalues of C_0 on its range.
        method: "scalar", "basis", "eigen" or "cholesky".
        lifted: number of eigenvalues of the precision that were raised to make it definite.
        notes: what a user should know, one sentence each; part of `health()`.
    """

    d: int
    rank: int
    scale: float | None
    root: torch.Tensor | None
    root_inverse: torch.Tensor | None
    largest: float
    smallest: float
    method: str
    lifted: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def condition(self) -> float:
        """Ratio of the extreme eigenvalues of C_0 on its range."""
        return self.largest / self.smallest

    def covariance(self, device: torch.device | None = None) -> torch.Tensor:
        """C_0 (d, d) float64, worked out where the root lies and brought to `device`; None leaves it there."""
        if self.root is None:
            assert self.scale is not None
            return torch.eye(self.d, dtype=torch.float64, device=device or "cpu").mul_(self.scale**2)
        product = self.root @ self.root.mT
        return (product + product.mT).mul_(0.5).to(device or product.device)

    def precision(self, device: torch.device | None = None) -> torch.Tensor:
        """S_0 (d, d) float64 likewise; on the range of C_0 where that is a proper subspace (pseudo-inverse)."""
        if self.root_inverse is None:
            assert self.scale is not None
            return torch.eye(self.d, dtype=torch.float64, device=device or "cpu").div_(self.scale**2)
        product = self.root_inverse.mT @ self.root_inverse
        return (product + product.mT).mul_(0.5).to(device or product.device)


def scalar(d: int, scale: float) -> PriorFactor:
    """T = scale * I."""
    return PriorFactor(d, d, scale, None, None, scale**2, scale**2, "scalar")


def from_basis(Q: torch.Tensor, l2: float) -> PriorFactor:
    """T = Q / sqrt(l2) for an orthonormal Q (d, r)."""
    d, rank = Q.shape
    root = Q / l2**0.5
    return PriorFactor(d, rank, None, root, Q.mT * l2**0.5, 1.0 / l2, 1.0 / l2, "basis")


def from_precision(S: torch.Tensor, *, name: str, lift: float | None) -> PriorFactor:
    """Factor a symmetric S_0 (d, d) float64.

    Args:
        S: symmetric.
        name: how the argument is called in messages.
        lift: fraction of the largest eigenvalue to which smaller ones are lifted, and reported (a second
            moment); None refuses a singular S_0 (a given precision).

    Raises:
        ValueError: S is not positive (semi-)definite.
    """
    if S.shape[-1] > EIGEN_LIMIT:
        factor = _by_cholesky(S)
        if factor is not None:
            return factor
    return _by_eigen(S, name=name, lift=lift)


def _by_eigen(S: torch.Tensor, *, name: str, lift: float | None) -> PriorFactor:
    values, vectors = torch.linalg.eigh(S)
    low, high = float(values[0]), float(values[-1])
    if not (high > 0.0 and low >= -NEGATIVE * high) or (lift is None and low <= 0.0):
        raise ValueError(
            f"{name} must be positive {'' if lift is None else 'semi-'}definite, "
            f"got eigenvalues from {low:.3e} to {high:.3e}"
            + ("; a null-space prior or a ridge (lam > 0) may be what is meant" if lift is None else "")
        )
    floor = (lift or 0.0) * high
    lifted = int((values < floor).sum())
    notes = []
    if lifted:
        values = values.clamp_min(floor)
        notes.append(
            f"{lifted} of {values.numel()} eigenvalues of {name} were below {lift:g} of the largest "
            f"(smallest {low:.2e}) and were lifted to {floor:.2e}: keys in these directions are hardly held back; "
            "a ridge (lam > 0) would"
        )
    smallest = float(values[0])
    if high / smallest >= CONDITION_WARNING:
        notes.append(f"the prior is ill-conditioned: {high / smallest:.1e}")
    roots = values.sqrt()
    return PriorFactor(
        d=S.shape[-1],
        rank=S.shape[-1],
        scale=None,
        root=vectors / roots,
        root_inverse=(vectors * roots).mT.contiguous(),
        largest=1.0 / smallest,
        smallest=1.0 / high,
        method="eigen",
        lifted=lifted,
        notes=tuple(notes),
    )


def _by_cholesky(S: torch.Tensor) -> PriorFactor | None:
    """The factor, or None where S is too near singular for a Cholesky factor to be trusted."""
    L, info = torch.linalg.cholesky_ex(S)
    if int(info) != 0:
        return None
    largest_S = _power(lambda x: S @ x, S)
    largest_C = _power(lambda x: torch.cholesky_solve(x, L), S)
    condition = largest_S * largest_C
    if not condition < _CHOLESKY_CONDITION:
        return None
    identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    root = torch.linalg.solve_triangular(L.mT, identity, upper=True)
    notes = (f"the prior is ill-conditioned: {condition:.1e}",) if condition >= CONDITION_WARNING else ()
    return PriorFactor(
        d=S.shape[-1],
        rank=S.shape[-1],
        scale=None,
        root=root,
        root_inverse=L.mT.contiguous(),
        largest=largest_C,
        smallest=1.0 / largest_S,
        method="cholesky",
        notes=notes,
    )


def _power(apply, S: torch.Tensor) -> float:  # type: ignore[no-untyped-def]
    """Largest eigenvalue by block power iteration from a fixed start, with its usual margin of a few percent."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(S.shape[-1], 4, dtype=S.dtype, generator=generator, device="cpu").to(S.device)
    for _ in range(_POWER_STEPS):
        x, _r = torch.linalg.qr(apply(x))
    return float(torch.linalg.eigvalsh(x.mT @ apply(x))[-1])
