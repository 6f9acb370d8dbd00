"""Tables of a profile, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlsedit.report.tables import seconds, table
from rlsedit_kernels.profile import Comparison, Profile, Row, StageRow

__all__ = ["comparison_table", "edit_table", "markdown", "profile_table", "stage_table", "sweep_table"]

_HEADER = ("", "a batch", "p20 .. p80", "an edit", "ratio", "GB", "GFLOP", "of ceiling", "extra memory", "error")
_STAGES = ("", "stage", "time", "share", "GB/s", "GFLOP/s", "of ceiling")


def profile_table(profile: Profile) -> str:
    """One line for each contender; below it what the columns mean, and what was skipped or failed, and why."""
    shown = [row for row in profile.rows if row.times is not None]
    lines = [table(_HEADER, [(row.name, *_cells(row)) for row in shown]), "", _legend(profile)] if shown else []
    return "\n".join([*lines, *_notes(profile.rows)])


def stage_table(profile: Profile) -> str:
    """Where the time of each contender goes: stages that take at least a hundredth of it."""
    rows = []
    for row in profile.rows:
        name = row.name
        for stage in row.stages:
            if row.times is None or stage.seconds < 0.01 * row.times.median:
                continue
            share = f"{100 * stage.seconds / row.times.median:.0f} %"
            rows.append((name, stage.name, seconds(stage.seconds), share, *_rates(stage)))
            name = ""
    return table(_STAGES, rows, align="llrrrrr")


def sweep_table(profile: Profile) -> str:
    """One line for each contender, one column for each value of the axis: time of a batch, extrapolated ones marked."""
    axis = profile.kind
    values = sorted({int(row.problem[axis]) for row in profile.rows})
    names = list(dict.fromkeys(row.name for row in profile.rows))
    found = {(row.name, int(row.problem[axis])): row for row in profile.rows}
    rows = []
    for name in names:
        cells = [_time(found.get((name, value))) for value in values]
        first, last = found.get((name, values[0])), found.get((name, values[-1]))
        grown = (
            ""
            if not (first and last and first.times and last.times)
            else (f"{last.times.median / first.times.median:.2f}")
        )
        rows.append((name, *cells, grown))
    head = [f"{axis} {value}" if axis != "history" else f"after {value}" for value in values]
    return "\n".join([table(["", *head, "last / first"], rows), *_notes(profile.rows)])


def edit_table(profile: Profile) -> str:
    """Whole edits: one line for each method, one column for each stage, with its share."""
    stages = [stage.name for stage in profile.rows[0].stages]
    rows = []
    for row in profile.rows:
        assert row.times is not None
        parts = [f"{seconds(s.seconds)} ({100 * s.seconds / row.times.median:.1f} %)" for s in row.stages]
        facts = str(row.problem["u"])
        rows.append((row.name, facts, seconds(row.times.median), *parts, _edit(row), _times(row)))
    return table(("method", "facts", "a batch", *stages, "an edit", "ratio"), rows)


def comparison_table(rows: Sequence[Comparison]) -> str:
    """Two profiles: times, their ratio, and the ratio with each side's baseline divided out."""
    cells = [
        (
            f"{row.name}, d {row.problem['d']}, u {row.problem['u']}"
            + (f", after {row.problem['history']}" if row.problem["history"] else ""),
            seconds(row.first),
            seconds(row.second),
            f"{row.change:.2f}",
            "-" if row.relative is None else f"{row.relative:.2f}",
            "yes" if row.apart else "no",
            _error(row.errors[0]),
            _error(row.errors[1]),
        )
        for row in rows
    ]
    header = ("", "first", "second", "second / first", "to baseline", "spreads apart", "error", "error")
    return table(header, cells)


def markdown(profile: Profile) -> str:
    """The table of a profile in Markdown, with device and ceilings above it."""
    lines = [f"{_machine(profile)}", ""]
    if profile.kind == "shape":
        lines += _rows(("", "a batch", "an edit", "ratio", "of ceiling", "extra memory", "error"), _markdown(profile))
    else:
        axis = profile.kind
        lines += _rows(
            ("", "after" if axis == "history" else axis, "a batch", "an edit", "ratio", "error"),
            (
                (row.name, str(row.problem[axis]), _time(row), _edit(row), _times(row), _error(row.error))
                for row in profile.rows
                if row.times is not None
            ),
        )
    notes = _notes(profile.rows)
    return "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes)]) + "\n"


def _markdown(profile: Profile) -> Iterable[tuple[str, ...]]:
    for row in profile.rows:
        if row.times is not None:
            _batch, _spread, edit, times, _gb, _gf, reached, memory, error = _cells(row)
            yield (row.name, _time(row), edit, times, reached, memory, error)


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = "|" + "|".join(["---", *["---:"] * (len(header) - 1)]) + "|"
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def _legend(profile: Profile) -> str:
    batches = max((row.error_batches for row in profile.rows if row.error_batches), default=1)
    return (
        f"ratio: to {profile.settings.get('baseline')!r}; GB, GFLOP: of a batch, counted; of ceiling: of what the "
        f"machine reaches;\nextra memory: at the peak of a batch; error: |W - W_exact| / |W_exact - W_0| after "
        f"{batches} batches (MEMIT: 1), against float64"
    )


def _machine(profile: Profile) -> str:
    found, ceilings = profile.machine, profile.ceilings
    device = found.get("gpu") or f"{found.get('cpu')}, {found.get('threads')} threads"
    rates = ", ".join(f"{name} {1e-9 * rate:.0f} GFLOP/s" for name, rate in ceilings.flops_per_s.items())
    return f"{device}; torch {found.get('torch')}; a copy {1e-9 * ceilings.bytes_per_s:.1f} GB/s, a product {rates}."


def _cells(row: Row) -> tuple[str, ...]:
    assert row.times is not None
    measured = row.status == "measured"
    return (
        _time(row),
        f"{seconds(row.times.p20)} .. {seconds(row.times.p80)}" if measured and row.times.repetitions > 1 else "-",
        _edit(row),
        _times(row),
        "-" if row.bytes is None else f"{1e-9 * row.bytes:.3g}",
        "-" if row.flops is None else f"{1e-9 * row.flops:.3g}",
        "-" if row.of_ceiling is None else f"{100 * row.of_ceiling:.0f} %",
        "-" if row.peak_bytes is None else f"{1e-6 * row.peak_bytes:.3g} MB",
        _error(row.error),
    )


def _rates(stage: StageRow) -> tuple[str, str, str]:
    def rate(work: float) -> str:
        return f"{1e-9 * work / stage.seconds:.3g}" if work and stage.seconds else "-"

    return rate(stage.bytes), rate(stage.flops), "-" if stage.of_ceiling is None else f"{100 * stage.of_ceiling:.0f} %"


def _time(row: Row | None) -> str:
    if row is None or row.times is None:
        return "-"
    return ("~ " if row.status == "extrapolated" else "") + seconds(row.times.median)


def _edit(row: Row) -> str:
    return "-" if row.per_edit is None else seconds(row.per_edit)


def _times(row: Row) -> str:
    return "-" if row.ratio is None else f"{row.ratio:.2f}" if row.ratio < 10 else f"{row.ratio:.0f}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _notes(rows: Iterable[Row]) -> list[str]:
    """What stands below a table: rows without a time of their own, each once."""
    found = (f"{row.name}: {row.status}: {row.reason}" for row in rows if row.status != "measured")
    return list(dict.fromkeys(found))
