"""A weight where it lies: rows of W on the ranks, columns of it, or all of it everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from rlsedit_kernels.distributed.batch_keys import BatchKeys
from rlsedit_kernels.distributed.ranks import Ranks, bounds
from rlsedit_kernels.distributed.rows import transposed_times
from rlsedit_kernels.states.modes import writing

__all__ = ["ShardedWeight", "Targets", "place_of"]


@dataclass(frozen=True)
class Targets:
    """Checked targets of a batch.

    Attributes:
        local: (u, v_p), the columns of this rank.
        full: (u, v), where every rank has all columns; None where they came sharded.
        v: columns in all.
    """

    local: torch.Tensor
    full: torch.Tensor | None
    v: int

    def everywhere(self, ranks: Ranks) -> torch.Tensor:
        """All of V (u, v): one all-gather where it came sharded."""
        return ranks.gather_columns(self.local, self.v) if self.full is None else self.full

    def tensor(self, ranks: Ranks) -> torch.Tensor:
        """What a filter takes for the same targets."""
        return ranks.dtensor(self.local, self.v, dim=1) if self.full is None else self.full


def place_of(weight: torch.Tensor, layout: str, ranks: Ranks) -> str:
    """Where a weight lies, in row form (d, v): "rows" of it on the ranks, "columns" of it, or all of it "everywhere".

    Raises:
        ValueError: a DTensor over another mesh, a sum that is still to be made, or a tensor on another device.
    """
    if not isinstance(weight, DTensor):
        if weight.device != ranks.device:
            raise ValueError(
                f"RLSFilter: weight must be on the device of the ranks, {ranks.device}, got {weight.device}"
            )
        return "everywhere"
    if weight.device_mesh != ranks.mesh:
        raise ValueError(f"RLSFilter: weight must be a DTensor over {ranks.mesh}, got {weight.device_mesh}")
    (placement,) = weight.placements
    if isinstance(placement, Replicate):
        return "everywhere"
    over_d, over_v = (0, 1) if layout == "in_out" else (1, 0)
    if placement in (Shard(over_d), Shard(over_d - 2)):
        return "rows"
    if placement in (Shard(over_v), Shard(over_v - 2)):
        return "columns"
    raise ValueError(f"RLSFilter: weight must be sharded or replicated, got {placement}; redistribute it")


class ShardedWeight:
    """W (d, v) over ranks.

    Methods named `sent_...` communicate; the others do not.

    Args:
        ranks: that share it.
        W: what this rank has of it, in row form: (d_p, v), (d, v_p) or (d, v).
        place: "rows", "columns" or "everywhere".
        shape: (d, v).
    """

    def __init__(self, ranks: Ranks, W: torch.Tensor, place: str, shape: tuple[int, int]) -> None:
        self.ranks, self.W, self.place, self.shape = ranks, W, place, shape

    def clone(self) -> ShardedWeight:
        """An independent copy."""
        return ShardedWeight(self.ranks, self.W.clone(), self.place, self.shape)

    def to(self, dtype: torch.dtype) -> ShardedWeight:
        """A copy in another dtype."""
        return ShardedWeight(self.ranks, self.W.to(dtype, copy=True), self.place, self.shape)

    def like(self, part: torch.Tensor) -> ShardedWeight:
        """Another matrix (d, v) that lies as W does, from this rank's part of it; a copy."""
        return ShardedWeight(self.ranks, torch.empty_like(self.W).copy_(part), self.place, self.shape)

    @property
    def split(self) -> bool:
        """Whether errors V - K W come as columns of this rank."""
        return self.place == "columns"

    def sent_error(self, keys: BatchKeys, targets: Targets) -> torch.Tensor:
        """V - K W: (u, v_p) for a weight whose columns are shared out, else all of it (u, v) on all ranks.

        Of a weight by rows u x v partial products are added up; W itself is never sent.
        """
        V = targets.local if self.split else targets.everywhere(self.ranks)
        return V.to(self.W.dtype) - self.sent_product(keys)

    def sent_product(self, keys: BatchKeys) -> torch.Tensor:
        """K W, as `sent_error` gives what it is taken from."""
        if self.place == "rows":
            return self.ranks.ordered_sum(transposed_times(self.W, keys.local.to(self.W.dtype).mT))
        return transposed_times(self.W, keys.everywhere(self.ranks, self.shape[0]).to(self.W.dtype).mT)

    def sent_share(self, gain: DTensor) -> torch.Tensor:
        """The rows of a gain (d, u) that this rank's part of W needs."""
        local = gain.to_local()
        return local if self.place == "rows" else self.ranks.gather(local, self.shape[0])

    def add_(self, share: torch.Tensor, E: torch.Tensor, alpha: float = 1.0) -> None:
        """W <- W + alpha g E in place."""
        with writing(self.W):
            self.W.addmm_(share, E, alpha=alpha)

    def put(self, W_0: ShardedWeight, change: ShardedWeight) -> None:
        """W <- W_0 + change in place."""
        with writing(self.W):
            torch.add(W_0.W, change.W, out=self.W)

    def sent_change(self, change: DTensor) -> torch.Tensor:
        """This rank's part of a (d, v) matrix that is sharded over its rows."""
        local = change.to_local()
        if self.place == "rows":
            return local
        if self.place == "columns":
            return self.ranks.turn(local.mT, self.shape[0]).mT
        return self.ranks.gather(local, self.shape[0])

    def sent_totals(self, *parts: float) -> list[float]:
        """Sums over the columns of an error, of what this rank found in its own; the same bits on all ranks."""
        if not self.split:
            return list(parts)
        return self.ranks.ordered_sum(torch.tensor(parts, dtype=torch.float64, device=self.W.device)).tolist()

    def sent_columns(self, E: torch.Tensor) -> torch.Tensor:
        """This rank's columns (u, v_p) of an error as `sent_error` gives it; nothing is sent."""
        return E if self.split else E[:, self.ranks.rows(self.shape[1])].contiguous()

    def sent_sums(self, *parts: float) -> list[float]:
        """Sums over the parts of the weight, of what this rank found in its own; the same bits on all ranks."""
        if self.place == "everywhere":
            return list(parts)
        return self.ranks.ordered_sum(torch.tensor(parts, dtype=torch.float64, device=self.W.device)).tolist()


def local_part(weight: torch.Tensor) -> torch.Tensor:
    """What this rank has of a weight, no copy."""
    return weight.to_local().detach() if isinstance(weight, DTensor) else weight.detach()


def check_part(weight: torch.Tensor, ranks: Ranks) -> None:
    """ValueError where the shards of a DTensor are not those of `Shard` (what FSDP2 and tensor parallelism make)."""
    if not isinstance(weight, DTensor) or isinstance(weight.placements[0], Replicate):
        return
    dim = weight.placements[0].dim % 2  # type: ignore[attr-defined]
    edges = bounds(weight.shape[dim], ranks.size)
    expected = edges[ranks.rank + 1] - edges[ranks.rank]
    if weight.to_local().shape[dim] != expected:
        raise ValueError(
            f"RLSFilter: rank {ranks.rank} must have {expected} of {weight.shape[dim]} along dimension {dim} of the "
            f"weight, got {weight.to_local().shape[dim]}"
        )
