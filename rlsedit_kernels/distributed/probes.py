"""The probes of a sharded state: random z and S z in float64, each rank its rows."""

from __future__ import annotations

from typing import Any

import torch

from rlsedit_kernels.distributed.batch_keys import BatchKeys
from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states.health import Probes

__all__ = ["ShardedProbes"]


class ShardedProbes:
    """Rows of z and of its image S z; see `Probes`. `drift` and `moved` communicate.

    Args:
        ranks: that share the state.
        z, image: (d_p, p) float64.
    """

    def __init__(self, ranks: Ranks, z: torch.Tensor, image: torch.Tensor) -> None:
        self.ranks, self.z, self.image = ranks, z, image

    @classmethod
    def start(cls, full: Probes, ranks: Ranks) -> ShardedProbes:
        """Those of rank 0, for the root of a prior by which they are made is not unique."""
        both = ranks.broadcast(torch.cat([full.z, full.image], dim=1).to(ranks.device).contiguous(), 0)
        z, image = (ranks.shard(part) for part in both.chunk(2, dim=1))
        return cls(ranks, z, image)

    def clone(self) -> ShardedProbes:
        """An independent copy."""
        return ShardedProbes(self.ranks, self.z.clone(), self.image.clone())

    def moved(self, keys: BatchKeys, factor: float, forget: float = 1.0) -> ShardedProbes:
        """The probes for S <- forget S + factor K'K: u x p numbers are added up."""
        K = keys.local.to(torch.float64)
        image = self.image if forget == 1.0 else self.image * forget
        return ShardedProbes(
            self.ranks, self.z, torch.addmm(image, K.mT, self.ranks.ordered_sum(K @ self.z), alpha=factor)
        )

    def begun_again(self, form: Any) -> ShardedProbes:
        """Probes for a covariance that has become singular: the same images y, and z = C y."""
        return ShardedProbes(self.ranks, form.apply(self.image), self.image)

    def drift(self, form: Any, _factor: PriorFactor) -> float:
        """max over the probes of |z'S C S z / z'S z - 1|, as for the forms that keep a root; the same on all ranks."""
        with self.ranks.guarded("health"):
            H = form.half(form.inner64(self.image))
            sizes = self.ranks.ordered_sum((self.image * self.z).sum(dim=0))
        ratio = H.square().sum(dim=0) / sizes - 1.0
        return float(ratio.abs().max()) if bool(torch.isfinite(ratio).all()) else float("inf")
