"""Bytes that a rank receives in a batch of a square-root state; counted as in `volume.py`."""

from __future__ import annotations

import torch

from rlsedit_kernels.distributed.ranks import bounds
from rlsedit_kernels.distributed.volume import _gather, _sum, confirm_bytes
from rlsedit_kernels.states.health import PROBES

__all__ = ["append_bytes", "append_check_bytes", "carried_bytes"]

_WIDE = 8
OPS = ("gain", "update", "commit")
CARRIED = ("update", "step", "weight")


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
        total += others + _back(r, u, size, process, item, rank)
    if op != "gain":
        total += others + _sum(u * min(PROBES, r), size, _WIDE)
    return total


def carried_bytes(
    what: str,
    d: int,
    v: int,
    u: int,
    size: int,
    process: int,
    dtype: torch.dtype = torch.float32,
    *,
    place: str,
    rank: int | None = None,
    keys_sharded: bool = False,
    targets_sharded: bool = False,
) -> int:
    """Bytes that one rank receives for a batch of a `ShardedRLSFilter` with solution="carried", and for its weight.

    With s bytes a number and P ranks, to leading order, for the first rank, a prior on the whole space and keys that
    all ranks have:

    | what | weight by rows | weight by columns, or everywhere |
    |---|---|---|
    | "update": H = R^-T K', reflectors, K W_0 | 2 (P - 1) / P s (d u + u v) | 2 (P - 1) / P s d u |
    | "step": these, the gain, K (W - W_0) | (P - 1) / P s (3 d u + 4 u v) | 4 (P - 1) / P s d u |
    | "weight": B, R^-1 B | (P - 1) / P s d v (1 / P + 1) | as much, and (P - 1) / P^2 s d v, or (P - 1) / P s d v |

    A batch is a "step" where the weight was read behind the last one; reading it behind a step sends nothing.

    Args:
        what: "update", "step" or "weight".
        d, v, u: the weight is (d, v), the keys are (u, d).
        size: ranks.
        process: this one of them.
        dtype: of the state.
        place: where the weight lies: "rows", "columns" or "everywhere".
        rank: as for `append_bytes`.
        keys_sharded, targets_sharded: whether K comes sharded over d, V over v.

    Raises:
        ValueError: an unknown `what`.
    """
    if what not in CARRIED:
        raise ValueError(f"carried_bytes: what must be one of {', '.join(map(repr, CARRIED))}, got {what!r}")
    r, item = rank or d, dtype.itemsize
    edges = bounds(r, size)
    if what == "weight":
        total = 3 * confirm_bytes(size) + _turn(r, v, size, item) + _back(r, v, size, process, item, rank)
        moved = {"rows": 0, "columns": _turn(v, d, size, item), "everywhere": _gather(d, v, size, item)}
        return total + moved[place]
    half = confirm_bytes(size) + _sum(u, size, _WIDE) + (r - edges[process + 1] + edges[process]) * u * item
    if rank is not None:
        half += _sum(u * r, size, item)
    product = _sum(u * v, size, item) if place == "rows" else 0
    total = 3 * confirm_bytes(size) + _sum(u, size, _WIDE) + _sum(1, size, _WIDE) + _sum(3, size, _WIDE)
    total += product + half + append_bytes("commit", d, u, size, process, dtype, rank=rank)
    if keys_sharded and place != "rows":
        total += _gather(d, u, size, item)
    if targets_sharded and place != "columns":
        total += _gather(v, u, size, item)
    if what == "step":
        total += _back(r, u, size, process, item, rank) + _sum(1, size, _WIDE) + product
        total += 0 if place == "rows" else _gather(d, u, size, item)
    return total


def _back(r: int, width: int, size: int, process: int, item: int, rank: int | None) -> int:
    """R^-1 of columns, of which each rank has its rows, and these in the coordinates of the keys."""
    edges = bounds(r, size)
    later = sum(edges[q] < edges[q + 1] for q in range(process + 1, size))
    own = edges[process + 1] - edges[process]
    return later * own * width * item + (0 if rank is None else _gather(r, width, size, item))


def _turn(m: int, n: int, size: int, item: int) -> int:
    """An all-to-all from columns to rows of an (m, n) matrix (`Ranks.turn`)."""
    return (size - 1) * bounds(m, size)[1] * bounds(n, size)[1] * item


def append_check_bytes(d: int, size: int, process: int, *, rank: int | None = None) -> int:
    """Bytes that one rank receives in one check of the guard: a few probes in float64.

    `health` sends 8 bytes of each rank more, the smallest pivot.

    Arguments as those of `append_bytes`.
    """
    r = rank or d
    edges, p = bounds(r, size), min(PROBES, r)
    others = (r - edges[process + 1] + edges[process]) * p * _WIDE
    return others + _sum(p, size, _WIDE) + (0 if rank is None else _sum(r * p, size, _WIDE))
