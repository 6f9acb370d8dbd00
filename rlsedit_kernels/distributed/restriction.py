"""What a restricted state over ranks remembers: rows of a basis of the directions that nothing may change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.distributed.rows import saved_rows
from rlsedit_kernels.states import restriction

__all__ = ["joined", "own_rows", "restored"]


def own_rows(op: str, Q: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """This rank's rows (d_p, q) of directions, float64: of a tensor that all ranks have, or of a DTensor.

    Raises:
        ValueError: a DTensor over another mesh, or not sharded over d; what it holds elsewhere is not looked at.
    """
    if not isinstance(Q, DTensor):
        return Q.detach()[ranks.rows(Q.shape[0])].to(device=ranks.device, dtype=torch.float64, copy=True)
    if Q.device_mesh != ranks.mesh or tuple(Q.placements) not in ((Shard(0),), (Replicate(),)):
        raise ValueError(
            f"{op}: Q must be sharded over d (Shard(0)) or replicated on {ranks.mesh}, got {Q.placements} on "
            f"{Q.device_mesh}"
        )
    local = Q.to_local()
    return own_rows(op, local, ranks) if isinstance(Q.placements[0], Replicate) else local.to(torch.float64, copy=True)


def joined(held: torch.Tensor | None, rows: torch.Tensor, d: int, ranks: Ranks) -> torch.Tensor:
    """This rank's rows (d_p, q) of an orthonormal basis of what was held so far and these directions.

    d x q numbers of both are gathered; the basis, which is not unique, is that of rank 0.
    """
    if held is None:
        return rows
    known = ranks.gather(torch.cat([held, rows], dim=1), d)
    with ranks.confirmed("restrict") as numbers:
        basis = restriction.joined(known[:, : held.shape[1]], known[:, held.shape[1] :])
        numbers["the number of directions"] = basis.shape[1]
    return ranks.broadcast(basis.contiguous(), 0)[ranks.rows(d)].clone()


def restored(saved: Mapping[str, object], d: int, ranks: Ranks) -> torch.Tensor | None:
    """Rows of what a state has saved, over ranks or alone; earlier versions over ranks did not. Nothing is sent."""
    value = saved.get("restriction")
    if value is None:
        return None
    q = value.shape[1] if isinstance(value, torch.Tensor) and value.dim() == 2 else 0
    return saved_rows(saved, "restriction", (d, q), torch.float64, ranks)
