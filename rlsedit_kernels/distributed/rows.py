"""Arithmetic on the rows of a matrix that a rank has: products in two precisions, a downdate that stays symmetric."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.distributed.tensor import DTensor, Shard

from rlsedit_kernels import ops
from rlsedit_kernels.distributed.ranks import Ranks, bounds
from rlsedit_kernels.states import wide
from rlsedit_kernels.states.coordinates import product
from rlsedit_kernels.states.saving import saved_tensor

__all__ = ["add_", "downdate_rows_", "filled", "largest_of_all", "saved_rows", "times", "transposed_times"]

_TILE = 1024


def times(A: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A x (n, p) in the dtype of x; a narrower A is widened block by block."""
    if _empty(A, x):
        return x.new_zeros(A.shape[0], x.shape[1])
    return product(A, x) if A.dtype == x.dtype else wide.product(A, x)


def transposed_times(A: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x'A (p, m) in the dtype of x (n, p), for A (n, m)."""
    if _empty(A, x):
        return x.new_zeros(x.shape[1], A.shape[1])
    return (product(A.mT, x) if A.dtype == x.dtype else wide.transposed_product(A, x)).mT


def downdate_rows_(ranks: Ranks, C: torch.Tensor, Z: torch.Tensor, sign: float) -> None:
    """C_p <- C_p + sign Z_p Z' in place, for all of Z (n, w) in the dtype of C or wider; rounded once.

    Blocks that lie mirrored on two ranks are worked out from the same product on both of them, so that the matrix of
    all rows stays exactly symmetric without a word between them.
    """
    edges = bounds(Z.shape[0], ranks.size)
    first, last = edges[ranks.rank : ranks.rank + 2]
    if first < last and Z.shape[1]:
        own = C[:, first:last]
        (ops.downdate_ if C.dtype == Z.dtype else wide.change_)(own, Z[first:last], sign)
    for rows in _tiles((first, last)):
        for columns in _tiles(edges):
            if first <= columns.start < last:
                continue
            mirrored = columns.start < rows.start
            part = (Z[columns] @ Z[rows].mT).mT if mirrored else Z[rows] @ Z[columns].mT
            block = C[rows.start - first : rows.stop - first, columns]
            if C.dtype == Z.dtype:
                block.add_(part, alpha=sign)
            else:
                block.copy_(block.to(Z.dtype).add_(part, alpha=sign))


def add_(A: torch.Tensor, left: torch.Tensor, right: torch.Tensor, sign: float) -> None:
    """A <- A + sign left right' in place; rounded once where left and right are wider."""
    if A.dtype == left.dtype:
        A.addmm_(left, right.mT, alpha=sign)
    elif A.numel():
        wide.add_(A, left, right, sign)


def filled(Y: torch.Tensor) -> torch.Tensor:
    """Y, or a row of zeros in the place of none: solvers of systems take no empty right-hand side."""
    return Y if Y.shape[0] else Y.new_zeros(1, Y.shape[1])


def largest_of_all(ranks: Ranks, values: torch.Tensor) -> float:
    """The largest of numbers of which each rank has some or none, on all of them: one all-gather of a number."""
    mine = values.max() if values.numel() else values.new_tensor(-math.inf)
    return float(ranks.gather(mine.to(torch.float64).reshape(1), ranks.size).max())


def saved_rows(
    saved: Mapping[str, object], name: str, shape: tuple[int, int], dtype: torch.dtype, ranks: Ranks
) -> torch.Tensor:
    """This rank's rows of a saved (n, m) matrix: a DTensor over the mesh of the ranks, or a tensor that all have."""
    value = saved.get(name)
    rows = ranks.rows(shape[0])
    if not isinstance(value, DTensor):
        return saved_tensor(saved, name, shape, dtype, torch.device("cpu"))[rows].to(ranks.device, copy=True)
    if tuple(value.shape) != shape or value.placements != (Shard(0),) or value.device_mesh != ranks.mesh:
        raise ValueError(
            f"load_state_dict: {name} must be a DTensor of shape {shape}, Shard(0) over {ranks.mesh}, got "
            f"{tuple(value.shape)}, {value.placements} over {value.device_mesh}"
        )
    local = {name: value.to_local()}
    return saved_tensor(local, name, (rows.stop - rows.start, shape[1]), dtype, ranks.device)


def _empty(A: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether a rank has nothing of a matrix, or there is nothing to multiply: ops take neither."""
    return 0 in A.shape or x.shape[1] == 0


def _tiles(edges: Sequence[int]) -> Iterator[slice]:
    """Rows in blocks that end where those of a rank do."""
    for start, stop in itertools.pairwise(edges):
        for at in range(start, stop, _TILE):
            yield slice(at, min(at + _TILE, stop))
