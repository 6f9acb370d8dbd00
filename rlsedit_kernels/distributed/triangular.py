"""The triangular form over ranks: rows of L = R', each rank the columns of R that are its own."""

from __future__ import annotations

import math

import torch

from rlsedit_kernels.backends import fallback
from rlsedit_kernels.distributed.agreement import digest
from rlsedit_kernels.distributed.batch_keys import BatchKeys
from rlsedit_kernels.distributed.ranks import Ranks, bounds
from rlsedit_kernels.distributed.rows import largest_of_all, times, transposed_times
from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states import triangular
from rlsedit_kernels.states.pivots import Pivoted
from rlsedit_kernels.states.reading import squared_norm

__all__ = ["ShardedTriangular"]

_COLUMNS = 1024


class ShardedTriangular(Pivoted):
    """Rows of L = R' (r, r) in a basis (d, r) of the space of edits; no basis where that is the whole space.

    The sums that R takes part in run over its rows, so that a rank needs no row of another one: what is sent are
    reflectors (u x r in all for a batch), blocks of R^-T K' (the same), and parts of R^-1 H. Restrictions are not
    worked into R: with U an orthonormal basis of the range of R^-T Q, the restricted covariance is
    R^-1 (I - U U') R^-T (docs/distributed.md).

    Args:
        ranks: that share it.
        L: (r_p, r), the rows of this rank; zeros right of the diagonal of R'.
        basis: (d_p, r), the rows of this rank, or None.
        trace: |R|^2.
        regular: whether R can be solved with.
        held: (r, q) float64, what edits leave alone, orthonormal, in the basis; the same on all ranks; or None.
    """

    name = "square_root"
    maps = False
    """Whether `apply` speaks whitened coordinates."""

    def __init__(
        self,
        ranks: Ranks,
        L: torch.Tensor,
        basis: torch.Tensor | None,
        trace: float,
        regular: bool,
        held: torch.Tensor | None = None,
    ) -> None:
        self.ranks, self.L, self.basis, self.trace, self.held = ranks, L, basis, trace, held
        self.edges = bounds(L.shape[1], ranks.size)
        self.own = slice(self.edges[ranks.rank], self.edges[ranks.rank + 1])
        self._regular = regular
        self._pivots: torch.Tensor | None = None

    @classmethod
    def start(cls, factor: PriorFactor, dtype: torch.dtype, ranks: Ranks) -> tuple[ShardedTriangular, float]:
        """R_0 from the float64 factor of the prior, rounded once; every rank makes its own rows of it, nothing is sent.

        Returns:
            the form, to be completed by `measure`, and a digest of the basis that must be the same on all ranks.
        """
        if factor.scale is not None:
            form = cls.nothing(factor.d, dtype, ranks)
            form.L[:, form.own].diagonal().fill_(1.0 / factor.scale)
            form._regular = True
            return form, 0.0
        R, full = triangular.start(factor, torch.device("cpu"))
        L = R.mT[ranks.rows(R.shape[0])].to(dtype=dtype, device=ranks.device).contiguous()
        if full is None:
            return cls(ranks, L, None, math.nan, True), 0.0
        basis = full[ranks.rows(factor.d)].to(dtype=dtype, device=ranks.device)
        return cls(ranks, L, basis, math.nan, True), digest(full)

    @classmethod
    def nothing(cls, d: int, dtype: torch.dtype, ranks: Ranks) -> ShardedTriangular:
        """R = 0, to be completed by `measure`."""
        rows = ranks.rows(d)
        L = torch.zeros(rows.stop - rows.start, d, dtype=dtype, device=ranks.device)
        return cls(ranks, L, None, math.nan, False)

    def replaced(self, L: torch.Tensor, trace: float) -> ShardedTriangular:
        """The form with another factor."""
        return ShardedTriangular(self.ranks, L, self.basis, trace, self._regular, self.held)

    def clone(self) -> ShardedTriangular:
        """An independent copy."""
        return self._twin(self.replaced(self.L.clone(), self.trace))

    def with_held(self, held: torch.Tensor) -> ShardedTriangular:
        """The form that leaves these directions alone."""
        return self._twin(ShardedTriangular(self.ranks, self.L, self.basis, self.trace, self._regular, held))

    def to_dtype(self, dtype: torch.dtype) -> ShardedTriangular:
        """A copy in another dtype."""
        basis = None if self.basis is None else self.basis.to(dtype)
        L = self.L.to(dtype, copy=True)
        return self._twin(ShardedTriangular(self.ranks, L, basis, self.trace, self._regular, self.held))

    def _twin(self, twin: ShardedTriangular) -> ShardedTriangular:
        twin._pivots = self._pivots
        return twin

    @property
    def dtype(self) -> torch.dtype:
        return self.L.dtype

    @property
    def rank(self) -> int:
        """Dimension of the space of edits."""
        return self.L.shape[1] - (0 if self.held is None else self.held.shape[1])

    @property
    def pivots(self) -> torch.Tensor:
        """The diagonal of R (r) on all ranks; kept only while R is not regular."""
        assert self._pivots is not None
        return self._pivots

    def smallest_pivot(self) -> float:
        """That of R; all ranks ask together."""
        return -largest_of_all(self.ranks, -self.L[:, self.own].diagonal())

    def measure(self) -> None:
        """Work out |R|^2 where it is not known, and bring the pivots to all ranks where R may be singular."""
        if math.isnan(self.trace):
            size = torch.tensor([squared_norm(self.L)], dtype=torch.float64, device=self.L.device)
            self.trace = float(self.ranks.ordered_sum(size))
        if not self._regular:
            self._pivots = self.ranks.gather(self.L[:, self.own].diagonal().contiguous(), self.L.shape[1])

    def coordinates(self, keys: BatchKeys, norms: torch.Tensor) -> tuple[torch.Tensor, float]:
        """This rank's columns (u, r_p) of the keys in the basis, and the sum of squares of all of them.

        Args:
            keys: of the batch.
            norms: (u,) their squared norms.
        """
        if self.basis is None:
            return keys.local.clone(), float(norms.sum())
        inner = self.ranks.ordered_sum(keys.local @ self.basis)
        size = float(torch.linalg.vector_norm(inner, dtype=torch.float64))
        return inner[:, self.own].clone(), size * size  # infinite, not an error, where it is too large

    def everywhere64(self, y: torch.Tensor) -> torch.Tensor:
        """All rows (r, p), in the basis, of columns of which this rank has the rows (d_p, p); float64."""
        wide = y.to(torch.float64)
        if self.basis is None:
            return self.ranks.gather(wide, self.L.shape[1])
        return self.ranks.ordered_sum(self.basis.to(torch.float64).mT @ wide)

    def inner64(self, y: torch.Tensor) -> torch.Tensor:
        """This rank's rows (r_p, p) of the same."""
        return y.to(torch.float64) if self.basis is None else self.everywhere64(y)[self.own]

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows (d_p, p) of columns of which it has the rows (r_p, p) in the basis."""
        if self.basis is None:
            return x
        basis, r = self.basis.to(x.dtype), self.L.shape[1]
        return torch.cat([basis @ self.ranks.gather(part, r) for part in x.split(_COLUMNS, dim=1)], dim=1)

    def forward(self, rhs: torch.Tensor) -> torch.Tensor:
        """H (r, p) = R^-T K' on all ranks, from this rank's rows (r_p, p) of K', in their dtype.

        The owner of each block of rows solves for it and broadcasts it: r x p numbers in all.
        """
        ranks, edges = self.ranks, self.edges
        H = torch.empty(self.L.shape[1], rhs.shape[1], dtype=rhs.dtype, device=rhs.device)
        rhs = rhs.clone()
        for owner in range(ranks.size):
            rows = slice(edges[owner], edges[owner + 1])
            if rows.start == rows.stop:
                break
            if owner == ranks.rank:
                H[rows] = self._solve(rhs, transposed=False)
            ranks.broadcast(H[rows], owner)
            if owner < ranks.rank:
                rhs -= times(self.L[:, rows], H[rows])
        return H

    def backward(self, y: torch.Tensor) -> torch.Tensor:
        """This rank's rows (r_p, p) of R^-1 Y, from its rows of Y, in their dtype.

        Each rank hands to every earlier one what its block contributes there; they are subtracted from the last block
        to the first.
        """
        ranks, edges = self.ranks, self.edges
        x = y.clone(memory_format=torch.contiguous_format)
        if x.shape[0] == 0:
            return x
        for later in range(ranks.size - 1, ranks.rank, -1):
            if edges[later] < edges[later + 1]:
                x -= ranks.receive(torch.empty_like(x), later)
        x = self._solve(x, transposed=True).contiguous()
        for earlier in range(ranks.rank - 1, -1, -1):
            part = times(self.L[:, edges[earlier] : edges[earlier + 1]].mT, x)
            ranks.send(part.contiguous(), earlier)
        return x

    def half(self, rhs: torch.Tensor) -> torch.Tensor:
        """`forward` less what the restrictions take: K C K' = H'H. The form must be regular."""
        if self.held is None:
            return self.forward(rhs)
        p = rhs.shape[1]
        found = self.forward(torch.cat([rhs.to(torch.float64), self.held[self.own]], dim=1))
        return _outside(found[:, :p], found[:, p:]).to(rhs.dtype)

    def weighted(self, H: torch.Tensor, system: torch.Tensor) -> torch.Tensor:
        """This rank's rows (r_p, u) of H (L L')^-1, of which the gain is R^-1: H (r, u) = R^-T K', L its `system`."""
        return torch.cholesky_solve(H[self.own].to(torch.float64).mT, system).mT.to(self.dtype)

    def outside_held(self, B: torch.Tensor) -> torch.Tensor:
        """(I - U U') B for this rank's columns of a right-hand side."""
        if self.held is None:
            return B
        return _outside(B.to(torch.float64), self.forward(self.held[self.own])).to(B.dtype)

    def apply(self, y: torch.Tensor) -> torch.Tensor:
        """This rank's rows (d_p, p) of C y, from its rows of y; float64 arithmetic."""
        return self.back(self.backward(self.half(self.inner64(y))[self.own]))

    def extremes(self) -> tuple[float, float]:
        """`triangular.extremes` of R, the same on all ranks."""
        ranks, r = self.ranks, self.L.shape[1]

        def multiplied(x: torch.Tensor, transposed: bool) -> torch.Tensor:
            if transposed:
                return ranks.gather(times(self.L, x), r)
            return ranks.ordered_sum(transposed_times(self.L, x[self.own])).mT

        def solved(x: torch.Tensor, transposed: bool) -> torch.Tensor:
            return self.forward(x[self.own]) if transposed else ranks.gather(self.backward(x[self.own]), r)

        return triangular.extremes_of(multiplied, solved, r, self.L.device)

    def appended(
        self,
        rows: torch.Tensor,
        forget: float,
        trace: float,
        B: torch.Tensor | None = None,
        V: torch.Tensor | None = None,
    ) -> ShardedTriangular:
        """The form with R'R = forget R'R + rows'rows, in memory of its own; B and V are changed in place.

        Panel by panel: the owner of its columns makes the reflectors, all ranks apply them (`ops.qr_append_`).

        Args:
            rows: (u, r_p), this rank's columns of what is appended.
            forget: forgetting factor.
            trace: what `room_for` gave.
            B, V: this rank's columns of a right-hand side (r, v_p) and of its targets (u, v_p), or None.
        """
        ranks, scale = self.ranks, math.sqrt(forget)
        L = self.L.clone() if forget == 1.0 else self.L * scale
        rows, first = rows.clone(), self.own.start
        if B is not None and forget != 1.0:
            B.mul_(scale)
        for owner in range(ranks.size):
            for start in range(self.edges[owner], self.edges[owner + 1], fallback.PANEL):
                stop = min(start + fallback.PANEL, self.edges[owner + 1])
                X = torch.empty(rows.shape[0], stop - start, dtype=L.dtype, device=L.device)
                here = slice(start - first, stop - first)
                if owner == ranks.rank:
                    X.copy_(fallback.reflectors(L[here, start:stop].mT.triu() + 0.0, rows[:, here]))
                ranks.broadcast(X, owner)
                N, E = fallback.reflector_factors(X)
                if owner <= ranks.rank:
                    right = slice(max(here.start, 0) if owner == ranks.rank else 0, None)
                    place = L[right, start:stop].mT
                    new = fallback.reflect_(X, N, E, place, rows[:, right])
                    if owner == ranks.rank:
                        new.diagonal().abs_()
                        new = new.triu()
                    place.copy_(new)
                if B is not None and V is not None:
                    B[start:stop].copy_(fallback.reflect_(X, N, E, B[start:stop], V))
        form = self.replaced(L, trace)
        form.measure()
        return form

    def without(self, X: torch.Tensor, A: torch.Tensor, B: torch.Tensor | None) -> torch.Tensor:
        """The rows of L without those rows of R for which X is known (`triangular.remove_rows_`); nothing is sent.

        Args:
            X: (u, r) float64 = K R^-1 / sqrt(noise), on all ranks.
            A: (u, u) = I - X X'.
            B: this rank's columns (r, v_p) of a right-hand side, float64, changed in place; or None.
        """
        L, a, b = self.L.clone(), self.own.start, self.own.stop
        u = X.shape[0]
        taken = torch.zeros(u, b - a, dtype=torch.float64, device=L.device)
        taken_B = None if B is None else torch.zeros(u, B.shape[1], dtype=torch.float64, device=L.device)
        for start, stop, Q1, Q2 in triangular.removal_panels(X, A):
            if start < b:
                from_ = max(start - a, 0)
                place = L[from_:, start:stop].mT
                below = torch.cat([place.to(torch.float64), taken[:, from_:]])
                place.copy_((Q1 @ below).triu(start - a - from_))
                taken[:, from_:] = Q2 @ below
            if B is not None and taken_B is not None:
                below = torch.cat([B[start:stop], taken_B])
                B[start:stop] = Q1 @ below
                taken_B = Q2 @ below
        return L

    def _solve(self, rhs: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """The diagonal block of this rank, L or R, solved with; in the dtype of `rhs`."""
        block = self.L[:, self.own]
        if rhs.dtype == block.dtype:
            matrix = block.mT if transposed else block
            return torch.linalg.solve_triangular(matrix, rhs, upper=transposed)
        if transposed:
            return triangular.solve_columns(block.mT, rhs)
        return triangular.solve_rows(block.mT, rhs.mT).mT


def _outside(H: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """(I - U U') H, U an orthonormal basis of what these columns span; float64."""
    U = torch.linalg.qr(directions)[0]
    for _ in range(2):
        H = H - U @ (U.mT @ H)
    return H
