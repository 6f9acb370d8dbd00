"""One batch of keys over ranks, with the sums that every form and the probes need of it."""

from __future__ import annotations

import torch

from rlsedit_kernels.distributed.batch_keys import BatchKeys, aligned
from rlsedit_kernels.distributed.ranks import Ranks

__all__ = ["Batch"]


class Batch:
    """Checked keys; u (1 + p) numbers are added up when it is made.

    Attributes:
        local: (u, d_p), the columns of this rank.
        largest: largest squared norm of a key.
        seen: (u, p) float64 = K z, z the probes of the state; the same on all ranks.
    """

    def __init__(self, keys: BatchKeys, ranks: Ranks, d: int, z: torch.Tensor) -> None:
        self._keys, self._ranks, self._d = keys, ranks, d
        self._whole = None if keys.full is None else aligned(keys.full)
        self.local = keys.local
        wide = keys.local.to(torch.float64)
        sums = ranks.ordered_sum(torch.cat([wide.square().sum(dim=1, keepdim=True), wide @ z], dim=1))
        self.largest = float(sums[:, 0].max())
        self.seen = sums[:, 1:]

    @property
    def u(self) -> int:
        return self.local.shape[0]

    def whole(self) -> torch.Tensor:
        """K (u, d) on every rank: where it came sharded, by one all-gather when it is first asked for."""
        if self._whole is None:
            self._whole = aligned(self._keys.everywhere(self._ranks, self._d))
        return self._whole
