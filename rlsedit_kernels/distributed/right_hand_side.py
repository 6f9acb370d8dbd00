"""Matrices whose columns are shared out: right-hand sides of a triangular state, targets of a batch."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from rlsedit_kernels.distributed.agreement import digest
from rlsedit_kernels.distributed.batch_keys import aligned
from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.states.keys import finite

__all__ = ["carried", "targets"]


def carried(op: str, B: object, rows: int, dtype: torch.dtype, ranks: Ranks) -> torch.Tensor:
    """This rank's columns (r, v_p) of a right-hand side, not a copy.

    Raises:
        TypeError, ValueError: B is no DTensor (r, v) over the mesh, sharded over v.
    """
    if not isinstance(B, DTensor):
        raise TypeError(f"{op}: B must be a DTensor sharded over its columns, got {type(B).__name__}: see zeros(v)")
    if B.dim() != 2 or B.shape[0] != rows:
        raise ValueError(f"{op}: B must have shape (r, v) with r = {rows}, got {tuple(B.shape)}")
    if B.device_mesh != ranks.mesh or tuple(B.placements) != (Shard(1),):
        raise ValueError(
            f"{op}: B must be sharded over its columns (Shard(1)) on {ranks.mesh}, "
            f"got {B.placements} on {B.device_mesh}"
        )
    if B.dtype != dtype:
        raise TypeError(f"{op}: B must have the dtype of the state, {dtype}, got {B.dtype}")
    return B.to_local()


def targets(
    op: str, V: object, shape: tuple[int, int], dtype: torch.dtype, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Targets of a batch in `dtype`: this rank's columns (u, v_p), all of them where all ranks have them, a digest.

    Raises:
        TypeError, ValueError: V is no floating point tensor of this shape, replicated or a DTensor over the mesh that
            is replicated or sharded over v; NaN or Inf.
    """
    if not isinstance(V, torch.Tensor):
        raise TypeError(f"{op}: V must be a torch.Tensor, got {type(V).__name__}")
    if not V.dtype.is_floating_point:
        raise TypeError(f"{op}: V must be floating point, got {V.dtype}")
    if tuple(V.shape) != shape:
        raise ValueError(f"{op}: V must have shape (u, v) = {shape}, got {tuple(V.shape)}")
    if isinstance(V, DTensor):
        if V.device_mesh != ranks.mesh or tuple(V.placements) not in ((Shard(1),), (Replicate(),)):
            raise ValueError(f"{op}: V must be replicated or sharded over v (Shard(1)) on {ranks.mesh}, got "
                             f"{V.placements} on {V.device_mesh}")  # fmt: skip
        if tuple(V.placements) == (Shard(1),):
            return finite(op, "V", V.to_local().detach().to(dtype)), None, 0.0
        V = V.to_local()
    if V.device != ranks.device:
        raise ValueError(f"{op}: V must be on the device of the state, {ranks.device}, got {V.device}")
    full = aligned(finite(op, "V", V.detach().to(dtype)))
    return full[:, ranks.rows(shape[1])].contiguous(), full, digest(full)
