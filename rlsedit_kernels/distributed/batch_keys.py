"""Keys of a batch as ranks have them: all of them everywhere, or each rank its columns (tensor parallelism)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from rlsedit_kernels.distributed.agreement import digest
from rlsedit_kernels.distributed.ranks import Ranks, bounds
from rlsedit_kernels.states.keys import checked_keys

__all__ = ["BatchKeys", "aligned", "batch_keys"]


@dataclass(frozen=True)
class BatchKeys:
    """A checked batch.

    Attributes:
        local: (u, d_p), the columns of this rank.
        full: (u, d), where every rank has all columns; None for a batch that came sharded.
        mark: digest of `full`; 0 for a sharded batch, of which no two ranks have the same.
        size: |K|^2, the same on all ranks, where somebody has added it up.
    """

    local: torch.Tensor
    full: torch.Tensor | None
    mark: float
    size: float = math.nan
    _gathered: list[torch.Tensor] = field(default_factory=list, repr=False, compare=False)

    @property
    def u(self) -> int:
        return self.local.shape[0]

    def everywhere(self, ranks: Ranks, d: int) -> torch.Tensor:
        """All of K (u, d): where it came sharded, by one all-gather when it is first asked for."""
        if self.full is not None:
            return self.full
        if not self._gathered:
            self._gathered.append(ranks.gather_columns(self.local, d))
        return self._gathered[0]

    def squared_norms(self, ranks: Ranks) -> torch.Tensor:
        """|k|^2 (u,) of the keys, float64: added up over the ranks, so that all of them have the same bits."""
        return ranks.ordered_sum(torch.linalg.vector_norm(self.local, dim=1, dtype=torch.float64).square())

    def tensor(self, ranks: Ranks, d: int) -> torch.Tensor:
        """What `batch_keys` takes for the same batch."""
        return ranks.dtensor(self.local, d, dim=1) if self.full is None else self.full


def aligned(A: torch.Tensor) -> torch.Tensor:
    """A laid out alike on all ranks: the bits of a product may depend on where a matrix begins in memory."""
    return A if A.is_contiguous() and A.data_ptr() % 64 == 0 else A.clone(memory_format=torch.contiguous_format)


def batch_keys(op: str, K: object, d: int, dtype: torch.dtype, ranks: Ranks) -> BatchKeys:
    """Check keys and take this rank's columns; nothing is sent.

    Args:
        K: (u, d), u >= 1, any floating dtype (cast to `dtype`): a tensor that all ranks have, or a DTensor over the
            mesh of the ranks, replicated or sharded over d (what a row-parallel layer sees).

    Raises:
        TypeError, ValueError: K does not fit; NaN or Inf.
    """
    if not isinstance(K, DTensor):
        full = aligned(checked_keys(op, K, d, dtype, ranks.device).rows)
        return BatchKeys(full[:, ranks.rows(d)].contiguous(), full, digest(full))
    if K.dim() != 2 or K.shape[1] != d:
        raise ValueError(f"{op}: K must have shape (u, d) with u >= 1 and d = {d}, got {tuple(K.shape)}")
    if K.device_mesh != ranks.mesh:
        raise ValueError(f"{op}: K must be a DTensor over the mesh of the state, {ranks.mesh}, got {K.device_mesh}")
    (placement,) = K.placements
    if isinstance(placement, Replicate):
        return batch_keys(op, K.to_local(), d, dtype, ranks)
    if placement != Shard(1):
        raise ValueError(f"{op}: K must be sharded over d (Shard(1)) or replicated, got {placement}; redistribute it")
    edges = bounds(d, ranks.size)
    width = edges[ranks.rank + 1] - edges[ranks.rank]
    return BatchKeys(checked_keys(op, K.to_local(), width, dtype, ranks.device).rows.contiguous(), None, 0.0)
