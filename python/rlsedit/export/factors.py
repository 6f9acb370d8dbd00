"""The low-rank factors of what an edit changed, one pair for each weight."""

from __future__ import annotations

from collections.abc import Sequence

from .changes import Change
from .lowrank import LowRank, low_rank, noise_edge

__all__ = ["Factors", "factorise"]

Factors = list[tuple[Change, LowRank]]


def factorise(changes: Sequence[Change], rank: int | None = None) -> Factors:
    """The best factors of rank at most `rank` for each change, by truncated singular value decomposition in float64.

    The change is that of the float32 master where there is one; a change between two models in half precision holds
    their rounding, which the rank leaves out.

    Raises:
        ValueError: a rank below 1 or above the size of a weight.
    """
    found = []
    for change in changes:
        edge = noise_edge(change.before(), change.after().dtype)
        found.append((change, low_rank(change.difference(), edge, rank)))
    return found
