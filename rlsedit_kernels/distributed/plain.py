"""The plain form over ranks: rows of C. One all-gather of Y a batch, and one of K where it comes sharded."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rlsedit_kernels.distributed.batch import Batch
from rlsedit_kernels.distributed.factor import ShardedFactor
from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.distributed.rows import downdate_rows_, largest_of_all, saved_rows, times
from rlsedit_kernels.states.products import Change, Products

__all__ = ["PlainRows"]


class PlainRows:
    """Rows C_p (d_p, d)."""

    name = "plain"
    maps = False
    dense = True

    def __init__(self, ranks: Ranks, C: torch.Tensor) -> None:
        self.ranks, self.C = ranks, C

    @classmethod
    def start(cls, factor: ShardedFactor, dtype: torch.dtype, *, wide: bool = False) -> PlainRows:
        """Rows of C_0, rounded once, or in float64 for a state that is rounded later (`wide`)."""
        kept = torch.float64 if wide else dtype
        return cls(factor.ranks, factor.covariance().to(device=factor.ranks.device, dtype=kept, copy=True))

    def clone(self) -> PlainRows:
        """An independent copy."""
        return PlainRows(self.ranks, self.C.clone())

    def to_(self, dtype: torch.dtype) -> None:
        """Round in place."""
        self.C = self.C.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.C.dtype

    @property
    def columns(self) -> int:
        """Columns of the representation: all of them."""
        return self.C.shape[1]

    def coordinates(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """K (u, d), all of it on every rank."""
        return batch.whole().to(dtype)

    def largest(self, batch: Batch, K: torch.Tensor) -> float:
        """Largest squared norm of a key in the coordinates of the form."""
        return batch.largest

    def products(self, K: torch.Tensor) -> Products:
        """Y (d, u) on every rank, by one all-gather of C_p K', and G = K Y; in the dtype of K."""
        Y = self.ranks.gather(times(self.C, K.mT.contiguous()), self.columns)
        G = K @ Y
        return Products(Y, (G + G.mT).mul_(0.5))

    def back(self, gain: torch.Tensor) -> torch.Tensor:
        """This rank's rows (d_p, u) of a gain."""
        return gain[self.ranks.rows(self.columns)]

    def change_(self, change: Change, sign: float) -> None:
        """C_p <- C_p + sign Z_p Z'."""
        downdate_rows_(self.ranks, self.C, change.left, sign)

    change64_ = change_

    def scale_(self, factor: float) -> None:
        """C <- factor C."""
        self.C.mul_(factor)

    def largest_diagonal(self) -> float:
        """The largest number of C; all ranks ask together."""
        return largest_of_all(self.ranks, self.C[:, self.ranks.rows(self.columns)].diagonal())

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows (d_p, p) of C x, for float64 columns x (d, p) that all ranks have."""
        return times(self.C, x)

    def saved(self) -> dict[str, object]:
        """What `restore` needs."""
        return {"C": self.ranks.dtensor(self.C.clone(), self.columns)}

    @classmethod
    def restore(cls, saved: Mapping[str, object], factor: ShardedFactor, dtype: torch.dtype) -> PlainRows:
        """The form that `saved` was taken from, by a sharded state or a single one."""
        return cls(factor.ranks, saved_rows(saved, "C", (factor.d, factor.d), dtype, factor.ranks))
