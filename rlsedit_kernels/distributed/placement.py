"""Which rank keeps which state: longest first to the least loaded, states of one shape side by side where that is free.

A state that lives whole on one rank needs no communication at all, so many layers or experts are spread over the ranks
and only what does not fit one of them is sharded over all (`ShardedCovarianceState`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

__all__ = ["Placement", "place"]

TOLERANCE = 0.05
"""By this fraction the largest load may exceed that of longest-first for the sake of groups."""


@dataclass(frozen=True)
class Placement:
    """States on ranks.

    Attributes:
        owners: rank of each state, in the order in which they were given; None for one sharded over all ranks.
        loads: sum of the work on each rank, its parts of sharded states included.
        bytes: sum of the sizes on each rank, likewise.
    """

    owners: tuple[int | None, ...]
    loads: tuple[float, ...]
    bytes: tuple[float, ...]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.loads)

    @property
    def sharded(self) -> tuple[int, ...]:
        """Positions of the states that no rank can keep whole."""
        return tuple(i for i, owner in enumerate(self.owners) if owner is None)

    @property
    def balance(self) -> float:
        """Largest load over the mean: 1 is even, and the speed-up over one rank is `ranks / balance`."""
        mean = sum(self.loads) / self.ranks
        return max(self.loads) / mean if mean > 0.0 else 1.0

    def of(self, rank: int) -> tuple[int, ...]:
        """Positions of the states that a rank keeps whole, ascending."""
        return tuple(i for i, owner in enumerate(self.owners) if owner == rank)


def place(
    sizes: Sequence[float],
    ranks: int,
    *,
    work: Sequence[float] | None = None,
    groups: Sequence[Hashable] | None = None,
    memory: float | None = None,
) -> Placement:
    """Put states on ranks so that the largest load is small; the same answer for the same arguments, on every rank.

    Longest first, each to the least loaded rank that has room: where nothing is sharded for want of room the largest
    load is at most mean + (1 - 1 / ranks) largest (Graham 1966, theorem 1) and 4/3 of the best possible (Graham 1969).
    With groups a state goes to a rank that has others of its group as long as that is not filled beyond the mean; the
    result is taken if its largest load is at most 5 % above that of longest-first, and else longest-first.

    Args:
        sizes: bytes of each state, > 0.
        ranks: number of ranks, >= 1.
        work: what is balanced, >= 0 each (flops, or expected batches times bytes); None for the sizes.
        groups: states with the same entry (one shape, form and dtype) are kept together; None for no preference.
        memory: bytes that a rank has for states; None for no limit. A state that is larger, or that finds no rank with
            room, is sharded over all ranks.

    Returns:
        The placement; states that are to be sharded have no owner.

    Raises:
        TypeError, ValueError: an argument does not fit, or all ranks together have too little memory.
    """
    sizes = _numbers("sizes", sizes, least=0.0, beyond=True)
    work = sizes if work is None else _numbers("work", work, least=0.0, beyond=False)
    if isinstance(ranks, bool) or not isinstance(ranks, int):
        raise TypeError(f"place: ranks must be an int, got {type(ranks).__name__}")
    if ranks < 1:
        raise ValueError(f"place: ranks must be >= 1, got {ranks}")
    for name, other in (("work", work), ("groups", groups)):
        if other is not None and len(other) != len(sizes):
            raise ValueError(f"place: {name} must have one entry a state, {len(sizes)}, got {len(other)}")
    if memory is not None and not memory > 0.0:
        raise ValueError(f"place: memory must be positive, got {memory}")
    room = math.inf if memory is None else float(memory)
    simple = _within(sizes, work, None, ranks, room)
    if groups is None:
        return simple
    together = _within(sizes, work, groups, ranks, room)
    fewer = len(together.sharded) <= len(simple.sharded)
    return together if fewer and max(together.loads) <= (1.0 + TOLERANCE) * max(simple.loads) else simple


def _within(
    sizes: Sequence[float], work: Sequence[float], groups: Sequence[Hashable] | None, ranks: int, room: float
) -> Placement:
    """The placement under a limit: whatever finds no room is sharded, and the rest placed again."""
    sharded = {i for i, size in enumerate(sizes) if size > room}
    while True:
        part = sum(sizes[i] for i in sharded) / ranks
        if part > room:
            raise ValueError(
                f"place: the states take {sum(sizes):.4g} bytes and {ranks} ranks have {ranks * room:.4g}: more ranks, "
                "more memory a rank, or a smaller dtype"
            )
        found = _longest_first(sizes, work, groups, ranks, room, sharded)
        if isinstance(found, Placement):
            return found
        sharded.add(found)


def _longest_first(
    sizes: Sequence[float],
    work: Sequence[float],
    groups: Sequence[Hashable] | None,
    ranks: int,
    room: float,
    sharded: set[int],
) -> Placement | int:
    """The placement, or the first state that finds no rank with room."""
    loads = [sum(work[i] for i in sorted(sharded)) / ranks] * ranks
    kept = [sum(sizes[i] for i in sorted(sharded)) / ranks] * ranks
    mean = sum(work) / ranks * (1.0 + 1e-12)  # what fills a rank to the mean may differ from it by rounding
    members: list[dict[Hashable, int]] = [{} for _ in range(ranks)]
    owners: list[int | None] = [None] * len(sizes)
    for i in sorted(set(range(len(sizes))) - sharded, key=lambda i: (-work[i], -sizes[i], i)):
        able = [rank for rank in range(ranks) if kept[rank] + sizes[i] <= room]
        if not able:
            return i
        rank = min(able, key=lambda rank: (loads[rank], kept[rank], rank))
        if groups is not None:
            name = groups[i]
            friends = [rank for rank in able if members[rank].get(name) and loads[rank] + work[i] <= mean]
            rank = max(friends, key=lambda rank: (members[rank][name], -rank)) if friends else rank
            members[rank][name] = members[rank].get(name, 0) + 1
        owners[i] = rank
        loads[rank] += work[i]
        kept[rank] += sizes[i]
    return Placement(tuple(owners), tuple(loads), tuple(kept))


def _numbers(name: str, values: Sequence[float], *, least: float, beyond: bool) -> tuple[float, ...]:
    """Finite numbers of at least `least`, or greater than it."""
    numbers = []
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"place: {name}[{i}] must be a number, got {type(value).__name__}")
        if not math.isfinite(value) or value < least or (beyond and value == least):
            raise ValueError(f"place: {name}[{i}] must be finite and {'>' if beyond else '>='} {least:g}, got {value}")
        numbers.append(float(value))
    return tuple(numbers)
