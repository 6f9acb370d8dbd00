"""One batch of keys over ranks, with the sums that every form and the probes need of it."""

from __future__ import annotations

import copy

import torch

from rlsedit_kernels.distributed.batch_keys import BatchKeys, aligned
from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.states import scaled

__all__ = ["Batch"]


class Batch:
    """Checked keys; u (1 + p) numbers are added up when it is made.

    Attributes:
        local: (u, d_p), the columns of this rank.
        largest: largest squared norm of a key as it was given.
        seen: (u, p) float64 = K z, z the probes of the state; the same on all ranks.
        scales: s (u,) float64, where this is the batch with keys diag(s) K (`times`).
    """

    scales: torch.Tensor | None = None

    def __init__(self, keys: BatchKeys, ranks: Ranks, d: int, z: torch.Tensor) -> None:
        self._keys, self._ranks, self._d = keys, ranks, d
        self._whole = None if keys.full is None else aligned(keys.full)
        self.local = keys.local
        wide = keys.local.to(torch.float64)
        sums = ranks.ordered_sum(torch.cat([wide.square().sum(dim=1, keepdim=True), wide @ z], dim=1))
        self._squares = sums[:, 0]
        self.largest = float(self._squares.max())
        self.seen = sums[:, 1:]

    @property
    def u(self) -> int:
        return self.local.shape[0]

    def whole(self) -> torch.Tensor:
        """K (u, d) on every rank: where it came sharded, by one all-gather when it is first asked for."""
        if self._whole is None:
            self._whole = aligned(self._keys.everywhere(self._ranks, self._d))
        return self._whole

    def in_range(self, noise: float) -> tuple[Batch, scaled.Scaled | None]:
        """The batch as it is factored, and what it was scaled by, if by anything (`states/scaled.py`)."""
        if not scaled.needed(self.local.dtype, self.largest, noise):
            return self, None
        scales = scaled.factors(self._squares.sqrt(), noise, self.local.dtype)
        twin = copy.copy(self)
        twin.scales, twin.local, twin._whole = scales, scaled.times(self.local, scales), None
        twin._keys = BatchKeys(twin.local, None if self._keys.full is None else scaled.times(self.whole(), scales), 0.0)
        return twin, scaled.Scaled(twin.local, scaled.noise_of(noise, scales), scales)

    def lengths(self, inner: torch.Tensor) -> torch.Tensor:
        """|k|^2 (u,) float64 of keys as they were given, for keys (u, m) of this batch in some coordinates."""
        squares = inner.to(torch.float64).square().sum(dim=1)
        return squares if self.scales is None else squares / self.scales.square()
