"""The inverse root over ranks: rows of A in C = A A', or of A~ in C = T A~ A~' T'.

F = A'K' is a sum over the rows of A, so that keys that come sharded over d are used as they are. Where the root is kept
in whitened coordinates of a prior with a root T, a rank needs its rows of T'K' before, and all of Y after.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rlsedit_kernels.distributed.batch import Batch
from rlsedit_kernels.distributed.factor import ShardedFactor, identity_rows
from rlsedit_kernels.distributed.rows import add_, filled, largest_of_all, saved_rows, times, transposed_times
from rlsedit_kernels.distributed.whitened import RootRows
from rlsedit_kernels.states.inverse_root import mapped
from rlsedit_kernels.states.products import Change, Products

__all__ = ["InverseRootRows"]


class InverseRootRows:
    """Rows A_p (m_p, r); m = d in the coordinates of the keys, m = r in whitened ones (`maps`)."""

    name = "inverse_root"
    dense = True

    def __init__(self, root: RootRows, A: torch.Tensor, maps: bool) -> None:
        self.root, self.A, self.maps, self.ranks = root, A, maps, root.ranks

    @classmethod
    def start(cls, factor: ShardedFactor, dtype: torch.dtype, *, wide: bool = False) -> InverseRootRows:
        """A_0 = T or A~_0 = I; in float64 for a state that is rounded to `dtype` later (`wide`)."""
        kept = torch.float64 if wide else dtype
        if mapped(factor, dtype):
            return cls(RootRows.of(factor, kept), identity_rows(factor.ranks, factor.rank, kept), True)
        assert factor.root is not None
        A = factor.root.to(device=factor.ranks.device, dtype=kept, copy=True).contiguous()  # as it is after a restart
        return cls(_no_root(factor), A, False)

    def clone(self) -> InverseRootRows:
        """An independent copy; the prior's root, which nothing changes, is shared."""
        return InverseRootRows(self.root, self.A.clone(), self.maps)

    def to_(self, dtype: torch.dtype) -> None:
        """Round in place; the coordinates stay."""
        self.root, self.A = self.root.to(dtype), self.A.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def columns(self) -> int:
        """Columns of the representation: all of them."""
        return self.A.shape[1]

    @property
    def rows(self) -> int:
        """m, rows of A on all ranks together."""
        return self.root.rank if self.maps else self.root.d

    def coordinates(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """This rank's columns (u, m_p) of the keys in the coordinates of the form."""
        K = batch.local.to(dtype)
        if self.root.root is None:
            return K * self.root.scale
        return self.ranks.ordered_rows(transposed_times(self.root.root, K.mT).mT.contiguous()).mT

    def largest(self, batch: Batch, K: torch.Tensor) -> float:
        """Largest squared norm of a key in the coordinates of the form."""
        if self.root.root is None:
            return batch.largest * self.root.scale**2
        return float(self.ranks.ordered_sum(batch.lengths(K)).max())

    def products(self, K: torch.Tensor) -> Products:
        """F (r, u) = A'K' and G = F'F on every rank; of Y = A F this rank's rows, or all where T maps gains back."""
        F = self.ranks.ordered_sum(transposed_times(self.A, K.mT)).mT
        G = F.mT @ F
        wide = self._image if F.dtype == torch.float64 else None
        return Products(self._image(F), (G + G.mT).mul_(0.5), F, wide)

    def _image(self, X: torch.Tensor) -> torch.Tensor:
        """This rank's rows of A X for columns X (r, p) that all ranks have, or all rows where T maps gains back."""
        Y = times(self.A, X)
        return filled(Y) if self.root.root is None else self.ranks.gather(Y, self.rows)

    def back(self, gain: torch.Tensor) -> torch.Tensor:
        """This rank's rows (d_p, u) of a gain in the coordinates of the keys."""
        if self.root.root is None:
            return gain[: self.A.shape[0]] * self.root.scale
        return self.root.back(gain)

    def change_(self, change: Change, sign: float) -> None:
        """A_p <- A_p + sign left_p right'."""
        assert change.right is not None
        rows = slice(self.A.shape[0]) if self.root.root is None else self.ranks.rows(self.rows)
        add_(self.A, change.left[rows], change.right, sign)

    change64_ = change_

    def scale_(self, factor: float) -> None:
        """C <- factor C."""
        self.A.mul_(factor**0.5)

    def largest_diagonal(self) -> float:
        """The largest number of A A'; all ranks ask together."""
        return largest_of_all(self.ranks, self.A.square().sum(dim=1))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows (m_p, p) of A A'x, for float64 columns x (m, p) that all ranks have."""
        inner = self.ranks.ordered_sum(transposed_times(self.A, x[self.ranks.rows(self.rows)]))
        return times(self.A, inner.mT.contiguous())

    def saved(self) -> dict[str, object]:
        """What `restore` needs; the prior's root comes from the prior."""
        return {"A": self.ranks.dtensor(self.A.clone(), self.rows), "maps": self.maps}

    @classmethod
    def restore(cls, saved: Mapping[str, object], factor: ShardedFactor, dtype: torch.dtype) -> InverseRootRows:
        """The form that `saved` was taken from, by a sharded state or a single one."""
        maps = saved.get("maps")
        if not isinstance(maps, bool):
            raise ValueError(f"load_state_dict: maps must be a bool, got {type(maps).__name__}")
        root = RootRows.of(factor, dtype) if maps else _no_root(factor)
        shape = (factor.rank if maps else factor.d, factor.rank)
        return cls(root, saved_rows(saved, "A", shape, dtype, factor.ranks), maps)


def _no_root(factor: ShardedFactor) -> RootRows:
    """The map of a form in the coordinates of the keys: the identity."""
    return RootRows(factor.ranks, factor.d, factor.rank, None, 1.0)
