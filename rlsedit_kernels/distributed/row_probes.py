"""The probes of a sharded covariance: rows of random z and of S z on every rank, and the drift of a form from them."""

from __future__ import annotations

from typing import Any

import torch

from rlsedit_kernels.distributed.batch import Batch
from rlsedit_kernels.distributed.factor import ShardedFactor
from rlsedit_kernels.states.health import _TINY, ROOTS, _directions, _largest

__all__ = ["RowProbes", "applied", "dense_rows"]


class RowProbes:
    """Rows z, image = S z (d_p, p) float64; see `states.health.Probes`. `drift` and `begin_again` communicate."""

    def __init__(self, z: torch.Tensor, image: torch.Tensor) -> None:
        self.z, self.image = z, image

    @classmethod
    def start(cls, factor: ShardedFactor, seed: int = 20) -> RowProbes:
        """Images under S_0 of the prior itself."""
        x = _directions(factor.rank, seed).to(factor.ranks.device)
        return cls(factor.outward(x), factor.image(x))

    def to(self, device: torch.device) -> RowProbes:
        """An independent copy."""
        return RowProbes(self.z.to(device, copy=True), self.image.to(device, copy=True))

    def write(self, batch: Batch, noise: float, forget: float) -> None:
        """S <- forget S + K'K / noise; nothing is sent."""
        if forget != 1.0:
            self.image *= forget
        self.image.addmm_(batch.local.to(torch.float64).mT, batch.seen, alpha=1.0 / noise)

    def remove(self, batch: Batch, noise: float) -> None:
        """S <- S - K'K / noise; nothing is sent."""
        self.image.addmm_(batch.local.to(torch.float64).mT, batch.seen, alpha=-1.0 / noise)

    def begin_again(self, form: Any, factor: ShardedFactor, seed: int) -> None:
        """New probes for a covariance that has become singular (noise 0, a restriction): z = C y, S z = y."""
        image = RowProbes.start(factor, seed).image
        self.z, self.image = applied(form, factor, image), image

    def drift(self, form: Any, factor: ShardedFactor) -> float:
        """See `Probes.drift`: the same measure, from products with p vectors; the same bits on all ranks."""
        ranks = factor.ranks
        if form is not None and form.maps:
            inner = factor.inward(self.image)
            product = ranks.gather(form.apply(inner), factor.rank)
            if form.name in ROOTS:
                sizes = ranks.ordered_sum((self.image * self.z).sum(dim=0))
                return _largest((inner * product).sum(dim=0) / sizes - 1.0)
            x = factor.whiten(self.z)
            return _largest((product - x).norm(dim=0) / x.norm(dim=0).clamp_min(_TINY))
        rows = applied(form, factor, self.image)
        if form is not None and form.name in ROOTS:
            both = torch.stack([(self.image * rows).sum(dim=0), (self.image * self.z).sum(dim=0)])
            sums = ranks.ordered_sum(both)
            return _largest(sums[0] / sums[1] - 1.0)
        found = factor.whiten(torch.cat([rows - self.z, self.z], dim=1)).norm(dim=0)
        error, size = found.chunk(2)
        return _largest(error / size.clamp_min(_TINY))


def dense_rows(form: Any, factor: ShardedFactor, columns: int) -> torch.Tensor:
    """This rank's rows (d_p, d) of C in float64, from products with unit vectors, so many at a time."""
    d, own = factor.d, factor.ranks.rows(factor.d)
    rows = torch.empty(own.stop - own.start, d, dtype=torch.float64, device=factor.ranks.device)
    for start in range(0, d, columns):
        stop = min(start + columns, d)
        x = torch.zeros(own.stop - own.start, stop - start, dtype=torch.float64, device=rows.device)
        for row in range(max(own.start, start), min(own.stop, stop)):
            x[row - own.start, row - start] = 1.0
        rows[:, start:stop] = applied(form, factor, x)
    return rows


def applied(form: Any, factor: ShardedFactor, y: torch.Tensor) -> torch.Tensor:
    """This rank's rows (d_p, p) of C y in float64 arithmetic, from its rows of float64 columns y."""
    if form is None:
        return factor.outward(factor.inward(y))
    if not form.maps:
        return form.apply(factor.ranks.gather(y, factor.d))
    return factor.outward(factor.ranks.gather(form.apply(factor.inward(y)), factor.rank))
