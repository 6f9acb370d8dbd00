"""How cost grows: sweeps over d, u and layers, and extrapolation from smaller sizes where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from rlsedit_kernels.profile.contenders import Contender
from rlsedit_kernels.profile.machine import Ceilings, ceilings, machine
from rlsedit_kernels.profile.measuring import Progress, Settings, require_room, rows_of
from rlsedit_kernels.profile.problem import Problem, check_sizes
from rlsedit_kernels.profile.result import Profile, Row, Times

__all__ = ["AXES", "extrapolated", "sweep"]

AXES = ("d", "u", "layers")

Contenders = Callable[[int], Sequence[Contender]]
"""Contenders for a number of layers."""

_SMALLER = (8, 4)


def sweep(
    axis: str,
    values: Sequence[int],
    contenders: Contenders,
    base: dict[str, Any],
    settings: Settings | None = None,
    *,
    found: Ceilings | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure the same contenders along one axis.

    Args:
        axis: "d", "u" or "layers".
        values: along it.
        contenders: such as `lambda layers: catalogue(device, layers)`.
        base: arguments of `Problem`; the one of the axis is replaced.
        settings: how it is measured.
        found: as for `measure`.
        progress: called with a line about what is being done.

    Raises:
        ValueError: an unknown axis, no values, or values that repeat.
    """
    if axis not in AXES:
        raise ValueError(f"profile: axis must be one of {', '.join(map(repr, AXES))}, got {axis!r}")
    if not values or len(set(values)) != len(values):
        raise ValueError(f"profile: values of {axis} must be distinct, at least one, got {list(values)}")
    sizes: dict[str, Any] = {name: base[name] for name in ("d", "v", "u", "layers", "dtype") if name in base}
    for value in values:  # before minutes are spent on the first of them
        sizes[axis] = value
        check_sizes(**sizes)
    settings = settings or Settings()
    require_room([{**sizes, **base, axis: value} for value in values], settings.memory)
    device = torch.device(base.get("device", "cpu"))
    found = found or ceilings(device)
    rows: list[Row] = []
    for value in sorted(values):
        problem = Problem(**{**base, axis: value})
        tell = None if progress is None else (lambda text, value=value: progress(f"{axis} = {value}: {text}"))  # type: ignore[misc]
        rows.extend(rows_of(contenders(problem.layers), problem, settings, found, progress=tell))
    return Profile(axis, machine(device), found, asdict(settings), tuple(rows))


def extrapolated(
    profile: Profile,
    contenders: Sequence[Contender],
    base: dict[str, Any],
    settings: Settings,
    *,
    progress: Progress | None = None,
) -> Profile:
    """Give the skipped rows of a profile a time, from runs at an eighth and a quarter of d and v.

    The rate at a quarter is taken for the whole: t = t_4 * flops / flops_4. How far the same rule was off from an
    eighth to a quarter stands in the row's `reason`. Nothing else of the row is filled in: error and memory are not
    extrapolated.

    Args:
        profile: of `measure`, on `Problem(**base)`.
        contenders: those it was made with; such as have no `flops` stay skipped.
        base: arguments of `Problem`.
        settings: how the small ones are measured.
        progress: called with a line about what is being done.
    """
    missing = {row.name for row in profile.rows if row.status == "skipped"}
    able = [one for one in contenders if one.name in missing and one.flops is not None]
    if not able:
        return profile
    small: list[dict[str, Row]] = []
    problems = [
        Problem(**{**base, "d": max(8, base["d"] // part), "v": max(1, base["v"] // part)}) for part in _SMALLER
    ]
    for problem in problems:
        tell = None if progress is None else (lambda text, d=problem.d: progress(f"d = {d}: {text}"))  # type: ignore[misc]
        rows = rows_of(able, problem, replace(settings, memory=None), profile.ceilings, progress=tell)
        small.append({row.name: row for row in rows})
    whole = _Size(
        **{key: base[key] for key in ("d", "v", "u")},
        dtype=base.get("dtype", torch.float32),
        layers=base.get("layers", 1),
    )
    by_name = {one.name: one for one in able}
    base_row = next((row for row in profile.rows if row.name == settings.baseline and row.times), None)
    return replace(
        profile,
        rows=tuple(
            _filled(row, by_name[row.name], [found[row.name] for found in small], problems, whole, base_row)
            if row.name in by_name
            else row
            for row in profile.rows
        ),
    )


class _Size:
    """What `Contender.flops` reads of a problem, without its matrices."""

    def __init__(self, d: int, v: int, u: int, dtype: torch.dtype, layers: int) -> None:
        self.d, self.v, self.u, self.dtype, self.layers = d, v, u, dtype, layers


def _filled(row: Row, one: Contender, small: list[Row], problems: list[Problem], whole: _Size, base: Row | None) -> Row:
    first, second = small
    if first.times is None or second.times is None or one.flops is None:
        return row
    flops = [one.flops(problem) for problem in problems]
    seconds = second.times.median * one.flops(whole) / flops[1]  # type: ignore[arg-type]
    guessed = first.times.median * flops[1] / flops[0]
    off = 100.0 * (guessed / second.times.median - 1.0)
    d = [problem.d for problem in problems]
    reason = (
        f"{row.reason}; from the rate at d = {d[1]}: the same rule was off by {off:+.0f} % from d = {d[0]} to {d[1]}"
    )
    row = replace(row, status="extrapolated", reason=reason, times=Times(seconds, seconds, seconds, 0))
    if base is None or base.times is None:
        return row
    known = base.times
    return replace(row, ratio=seconds / known.median, baseline=known.median, baseline_repetitions=known.repetitions)
