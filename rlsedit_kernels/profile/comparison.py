"""Two profiles side by side: what has become faster or slower, and what else was different."""

from __future__ import annotations

from dataclasses import dataclass

from rlsedit_kernels.profile.result import Profile, Row

__all__ = ["Comparison", "compare"]

_MACHINE = ("cpu", "gpu", "threads", "system", "python", "torch", "cuda", "rlsedit_kernels")


@dataclass(frozen=True)
class Comparison:
    """One row that both profiles measured.

    Attributes:
        name: of the contender.
        problem: what the two have in common: d, v, u, layers, dtype, device, history.
        first, second: medians in seconds.
        change: second over first.
        relative: the same with each time divided by that of its own profile's baseline; None where one has none.
            Between two machines this is the figure that says something about the contender.
        apart: whether the two spreads (second to eighth decile) do not touch.
        errors: the two errors against float64.
    """

    name: str
    problem: dict[str, object]
    first: float
    second: float
    change: float
    relative: float | None
    apart: bool
    errors: tuple[float | None, float | None]


def compare(first: Profile, second: Profile) -> tuple[list[Comparison], list[str]]:
    """Match the rows of two profiles by contender and problem.

    Returns:
        What both have measured, in the order of the first, and sentences about what was different or is missing.
    """
    others = {_key(row): row for row in second.rows if row.times is not None and row.status == "measured"}
    mine = {_key(row): row for row in first.rows if row.times is not None and row.status == "measured"}
    rows = [_pair(row, others[key]) for key, row in mine.items() if key in others]
    notes = [
        f"{name} differs: {first.machine.get(name)} and {second.machine.get(name)}"
        for name in _MACHINE
        if first.machine.get(name) != second.machine.get(name)
    ]
    for name in sorted(set(first.settings) | set(second.settings)):
        if first.settings.get(name) != second.settings.get(name):
            notes.append(f"setting {name} differs: {first.settings.get(name)} and {second.settings.get(name)}")
    for title, keys in (("first", mine.keys() - others.keys()), ("second", others.keys() - mine.keys())):
        if keys:
            notes.append(f"only in the {title}: {len(keys)} rows, such as {sorted(key[0] for key in keys)[0]}")
    return rows, notes


def _key(row: Row) -> tuple[str, tuple[tuple[str, object], ...]]:
    return row.name, tuple(sorted((k, v) for k, v in row.problem.items() if k != "seed"))


def _pair(a: Row, b: Row) -> Comparison:
    assert a.times is not None
    assert b.times is not None
    relative = None if not a.ratio or not b.ratio else b.ratio / a.ratio
    return Comparison(
        name=a.name,
        problem={key: value for key, value in a.problem.items() if key != "seed"},
        first=a.times.median,
        second=b.times.median,
        change=b.times.median / a.times.median,
        relative=relative,
        apart=a.times.p80 < b.times.p20 or b.times.p80 < a.times.p20,
        errors=(a.error, b.error),
    )
