"""Bytes that a rank receives in a batch of a square-root state; counted as in `volume.py`."""

from __future__ import annotations

import torch

from rlsedit_kernels.distributed.ranks import bounds
from rlsedit_kernels.distributed.volume import _gather, _sum, confirm_bytes
from rlsedit_kernels.states.health import PROBES

__all__ = ["append_bytes", "append_check_bytes"]

_WIDE = 8
OPS = ("gain", "update", "commit")


def append_bytes(
    op: str, d: int, u: int, size: int, process: int, dtype: torch.dtype = torch.float32, *, rank: int | None = None
) -> int:
    """Bytes that one rank receives in one `update`, `commit` or `gain` of a regular `ShardedSquareRootState`.

    With s bytes a number, P ranks and this one the p-th of them, for a prior on the whole space, to leading order:

    | what | received |
    |---|---|
    | H = R^-T K' | (P - 1) / P s d u |
    | reflectors | (P - 1) / P s d u |
    | gain | (P - 1 - p) / P s d u |

    so 3 (P - 1) / P s d u for the first rank, two thirds of that for the last, and no more for keys that come sharded.
    A commit is the reflectors alone. Where edits live in a proper subspace, K times its basis is added up and the gain
    gathered: 3 (P - 1) / P s r u more.

    Args:
        op: "gain", "update" or "commit".
        d: dimension of a key.
        u: keys of the batch.
        size: ranks.
        process: this one of them.
        dtype: of the state.
        rank: r, the dimension of a proper subspace in which edits live; None where that is the whole space.

    Raises:
        ValueError: an unknown op.
    """
    if op not in OPS:
        raise ValueError(f"append_bytes: op must be one of {', '.join(map(repr, OPS))}, got {op!r}")
    r, item = rank or d, dtype.itemsize
    edges = bounds(r, size)
    own = edges[process + 1] - edges[process]
    others = (r - own) * u * item
    total = 3 * confirm_bytes(size) + _sum(u, size, _WIDE)
    if rank is not None:
        total += _sum(u * r, size, item)
    if op != "commit":
        later = sum(edges[q] < edges[q + 1] for q in range(process + 1, size))
        total += others + later * own * u * item + (0 if rank is None else _gather(r, u, size, item))
    if op != "gain":
        total += others + _sum(u * min(PROBES, r), size, _WIDE)
    return total


def append_check_bytes(d: int, size: int, process: int, *, rank: int | None = None) -> int:
    """Bytes that one rank receives in one check of the guard: a few probes in float64.

    `health` sends 8 bytes of each rank more, the smallest pivot.

    Arguments as those of `append_bytes`.
    """
    r = rank or d
    edges, p = bounds(r, size), min(PROBES, r)
    others = (r - edges[process + 1] + edges[process]) * p * _WIDE
    return others + _sum(p, size, _WIDE) + (0 if rank is None else _sum(r * p, size, _WIDE))
