"""The whitened form over ranks: rows of C~ and of the prior's root T.

C~ is a matrix from the start: kept as columns, as one process does while they are few, it would take the products of
all columns with the keys from every rank with every batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlsedit_kernels.distributed.batch import Batch
from rlsedit_kernels.distributed.factor import ShardedFactor, identity_rows
from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.distributed.rows import downdate_rows_, largest_of_all, saved_rows, times, transposed_times
from rlsedit_kernels.states.products import Change, Products
from rlsedit_kernels.states.saving import saved_tensor

__all__ = ["RootRows", "WhitenedRows"]


class RootRows:
    """Rows T_p (d_p, r) of the prior's root, rounded once; a ridge has a number in their place."""

    def __init__(self, ranks: Ranks, d: int, rank: int, root: torch.Tensor | None, scale: float) -> None:
        self.ranks, self.d, self.rank, self.root, self.scale = ranks, d, rank, root, scale

    @classmethod
    def of(cls, factor: ShardedFactor, dtype: torch.dtype) -> RootRows:
        """Those of a prior, in a dtype."""
        root = None if factor.root is None else factor.root.to(device=factor.ranks.device, dtype=dtype)
        return cls(factor.ranks, factor.d, factor.rank, root, factor.scale or 1.0)

    def to(self, dtype: torch.dtype) -> RootRows:
        """In another dtype."""
        root = None if self.root is None else self.root.to(dtype)
        return RootRows(self.ranks, self.d, self.rank, root, self.scale)

    def inner(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """K~ = K T (u, r) on every rank, by a sum in the order of the ranks; for a ridge of keys that are whole."""
        if self.root is None:
            return batch.whole().to(dtype) * self.scale
        return self.ranks.ordered_sum(transposed_times(self.root, batch.local.to(dtype).mT))

    def back(self, gain: torch.Tensor) -> torch.Tensor:
        """This rank's rows (d_p, u) of T g~, for a g~ (r, u) that all ranks have."""
        if self.root is None:
            return gain[self.ranks.rows(self.d)] * self.scale
        return times(self.root, gain)


class WhitenedRows:
    """Rows C~_p (r_p, r) of C~ in C = T C~ T'."""

    name = "whitened"
    maps = True
    dense = True

    def __init__(self, root: RootRows, matrix: torch.Tensor) -> None:
        self.root, self.matrix, self.ranks = root, matrix, root.ranks

    @classmethod
    def start(cls, factor: ShardedFactor, dtype: torch.dtype, *, wide: bool = False) -> WhitenedRows:
        """C~_0 = I; in float64 for a state that is rounded later (`wide`)."""
        kept = torch.float64 if wide else dtype
        return cls(RootRows.of(factor, kept), identity_rows(factor.ranks, factor.rank, kept))

    def clone(self) -> WhitenedRows:
        """An independent copy; the root, which nothing changes, is shared."""
        return WhitenedRows(self.root, self.matrix.clone())

    def to_(self, dtype: torch.dtype) -> None:
        """Round in place."""
        self.root, self.matrix = self.root.to(dtype), self.matrix.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def columns(self) -> int:
        """Columns of the representation: all of them."""
        return self.root.rank

    def coordinates(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """K~ = K T (u, r), all of it on every rank."""
        return self.root.inner(batch, dtype)

    def largest(self, batch: Batch, K: torch.Tensor) -> float:
        """Largest squared norm of a key in the coordinates of the form."""
        return float(batch.lengths(K).max())

    def products(self, K: torch.Tensor) -> Products:
        """Y~ (r, u) on every rank, by one all-gather of C~_p K~', and G = K~ Y~; in the dtype of K~."""
        Y = self.ranks.gather(times(self.matrix, K.mT.contiguous()), self.columns)
        G = K @ Y
        return Products(Y, (G + G.mT).mul_(0.5))

    def back(self, gain: torch.Tensor) -> torch.Tensor:
        """This rank's rows (d_p, u) of T g~."""
        return self.root.back(gain)

    def change_(self, change: Change, sign: float) -> None:
        """C~_p <- C~_p + sign Z_p Z'."""
        downdate_rows_(self.ranks, self.matrix, change.left, sign)

    change64_ = change_

    def scale_(self, factor: float) -> None:
        """C~ <- factor C~."""
        self.matrix.mul_(factor)

    def largest_diagonal(self) -> float:
        """The largest number of C~; all ranks ask together."""
        return largest_of_all(self.ranks, self.matrix[:, self.ranks.rows(self.columns)].diagonal())

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows (r_p, p) of C~ x, for float64 columns x (r, p) that all ranks have."""
        return times(self.matrix, x)

    def saved(self) -> dict[str, object]:
        """What `restore` needs; the root comes from the prior."""
        return {"matrix": self.ranks.dtensor(self.matrix.clone(), self.columns)}

    @classmethod
    def restore(cls, saved: Mapping[str, object], factor: ShardedFactor, dtype: torch.dtype) -> WhitenedRows:
        """The form that `saved` was taken from, by a sharded state or a single one (whose columns become a matrix)."""
        form = cls.start(factor, dtype)
        if "matrix" in saved:
            form.matrix = saved_rows(saved, "matrix", (factor.rank, factor.rank), dtype, factor.ranks)
            return form
        form.matrix = form.matrix.to(torch.float64) * _number(saved, "identity")
        for Z, sign in zip(_list(saved, "chunks"), _list(saved, "signs"), strict=True):
            chunk = saved_tensor({"chunk": Z}, "chunk", (factor.rank, None), None, factor.ranks.device)
            downdate_rows_(factor.ranks, form.matrix, chunk.to(torch.float64), float(sign))
        form.matrix = form.matrix.to(dtype)
        return form


def _number(saved: Mapping[str, object], name: str) -> float:
    value = saved.get(name)
    if not isinstance(value, float):
        raise ValueError(f"load_state_dict: {name} must be a float, got {type(value).__name__}")
    return value


def _list(saved: Mapping[str, object], name: str) -> Sequence[Any]:
    value = saved.get(name)
    if not isinstance(value, list):
        raise ValueError(f"load_state_dict: {name} must be a list, got {type(value).__name__}")
    return value
