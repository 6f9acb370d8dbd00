"""The factor of a prior over ranks: every rank works out all of it in float64 and keeps its own rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsedit_kernels.distributed.agreement import digest, digest_of_prior
from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.priors import Prior, PriorFactor
from rlsedit_kernels.priors.prior import KINDS

__all__ = ["PriorName", "ShardedFactor", "sharded_factor"]


class PriorName(Prior):
    """A prior without its arrays: what a sharded state keeps of one, so that nothing d x d is held alive."""

    def __init__(self, prior: Prior) -> None:
        scalars = {name: value for name in ("lam", "mu", "l2") if (value := getattr(prior, name)) is not None}
        super().__init__(prior.kind, prior.d, {}, **scalars)
        self._signature = prior.signature()

    def signature(self) -> dict[str, object]:
        """That of the whole prior."""
        return dict(self._signature)

    def information(self) -> torch.Tensor:
        """Raises:
        RuntimeError: always; the arrays are not here.
        """
        raise RuntimeError("a sharded state does not keep its prior: make Prior(...).information() from the original")


@dataclass(frozen=True, kw_only=True)
class ShardedFactor(PriorFactor):
    """C_0 = T T' of which a rank has the rows T_p (d_p, r), with the small products that probes are made of.

    `root` holds the rows, float64, where the prior's arrays are; `root_inverse` the columns (r, d_p) of T^-1, or None
    where `weights` (r) gives them: T^-1 = diag(weights) T' for an orthogonal T. Vectors in whitened coordinates are
    whole on every rank, those in the coordinates of the keys are rows.

    Attributes:
        ranks: that share it.
        weights: (r) float64, or None.
        C: rows (d_p, d) of C_0, float64, for a state that may be plain; otherwise None, and None for a ridge.
    """

    ranks: Ranks
    weights: torch.Tensor | None = None
    C: torch.Tensor | None = None

    def covariance(self, device: torch.device | None = None) -> torch.Tensor:
        """Rows (d_p, d) of C_0, float64."""
        C = self.C if self.scale is None else identity_rows(self.ranks, self.d, torch.float64, self.scale**2)
        assert C is not None
        return C.to(device or C.device)

    def precision(self, device: torch.device | None = None) -> torch.Tensor:
        """Raises:
        RuntimeError: always: it would take all rows on one rank.
        """
        raise RuntimeError("the precision of a sharded prior is not formed: take it from the Prior")

    def outward(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows (d_p, p) of T x, for float64 columns x (r, p) that all ranks have."""
        if self.root is None:
            return x[self.ranks.rows(self.d)] * (self.scale or 1.0)
        return (self.root @ x.to(self.root.device)).to(x.device)

    def inward(self, y: torch.Tensor) -> torch.Tensor:
        """T'y (r, p) on all ranks, from this rank's rows (d_p, p) of float64 columns y."""
        if self.root is None:
            return self.ranks.gather(y, self.d) * (self.scale or 1.0)
        return self.ranks.ordered_sum((self.root.mT @ y.to(self.root.device)).to(y.device))

    def whiten(self, z: torch.Tensor) -> torch.Tensor:
        """T^-1 z (r, p) on all ranks, from this rank's rows of float64 columns z."""
        if self.root is None:
            return self.ranks.gather(z, self.d) / (self.scale or 1.0)
        if self.weights is not None:
            return self.inward(z) * self.weights.to(z.device)[:, None]
        assert self.root_inverse is not None
        return self.ranks.ordered_sum((self.root_inverse @ z.to(self.root.device)).to(z.device))

    def image(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows (d_p, p) of T^-T x, for float64 columns x (r, p) that all ranks have."""
        if self.root is None:
            return x[self.ranks.rows(self.d)] / (self.scale or 1.0)
        if self.weights is not None:
            return self.outward(x * self.weights.to(x.device)[:, None])
        assert self.root_inverse is not None
        return (self.root_inverse.mT @ x.to(self.root.device)).to(x.device)


def sharded_factor(prior: Prior, ranks: Ranks, what: str, *, plain: bool) -> ShardedFactor:
    """Factor a prior on every rank, check that all have found the same bits, and keep this rank's rows.

    Args:
        prior: that every rank has; its factor is let go unless it was there before.
        ranks: that share the state.
        what: for messages.
        plain: whether rows of C_0 are to be kept.

    Raises:
        ValueError: the prior cannot be factored, or the ranks have different priors, or found different roots: a
            decomposition may differ between machines of two kinds, or between versions of a library.
    """
    there = "factor" in prior.__dict__
    with ranks.confirmed(what) as numbers:
        try:
            full = prior.factor
            numbers["the kind of the prior"] = KINDS.index(prior.kind)
            numbers["a digest of the prior"] = digest_of_prior(prior)
            numbers[
                "a digest of the prior's root (machines of two kinds, or two versions of a library, may find different "
                "ones: use one kind, or give Prior.null_space a basis from a file)"
            ] = 0.0 if full.root is None else digest(full.root)
            found = _rows(full, ranks, plain)
        finally:
            if not there:
                prior.__dict__.pop("factor", None)
    return found


def identity_rows(ranks: Ranks, n: int, dtype: torch.dtype, value: float = 1.0) -> torch.Tensor:
    """This rank's rows (n_p, n) of value I."""
    rows = ranks.rows(n)
    A = torch.zeros(rows.stop - rows.start, n, dtype=dtype, device=ranks.device)
    A[:, rows].diagonal().fill_(value)
    return A


def _rows(full: PriorFactor, ranks: Ranks, plain: bool) -> ShardedFactor:
    rows = ranks.rows(full.d)
    root, inverse, weights, C = full.root, full.root_inverse, None, None
    if root is not None and inverse is not None:
        if full.method in ("eigen", "basis"):
            weights, inverse = inverse.norm(dim=1) / root.norm(dim=0), None
        else:
            inverse = inverse[:, rows].clone()
        C = full.covariance()[rows].clone() if plain else None
        root = root[rows].clone()
    return ShardedFactor(
        d=full.d,
        rank=full.rank,
        scale=full.scale,
        root=root,
        root_inverse=inverse,
        largest=full.largest,
        smallest=full.smallest,
        method=full.method,
        lifted=full.lifted,
        notes=full.notes,
        ranks=ranks,
        weights=weights,
        C=C,
    )
