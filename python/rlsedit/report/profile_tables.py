"""Tables of a profile, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlsedit.report.stages import TITLES, booked
from rlsedit.report.tables import markdown_table, seconds, table
from rlsedit_kernels.profile import Comparison, Profile, Row, StageRow

__all__ = ["comparison_table", "edit_table", "markdown", "profile_table", "stage_table", "sweep_table"]

_HEADER = (
    "", "a batch", "calls", "p20 .. p80", "an edit", "ratio", "to", "GB", "GFLOP", "of ceiling", "extra memory",
    "error",
)  # fmt: skip
_STAGES = ("", "stage", "time", "share", "GB/s", "GFLOP/s", "of ceiling")

_SWEEP_LEGEND = "Medians of a batch; ~: extrapolated; last / first: of the two times in the row."
_EDIT_LEGEND = """facts: of a batch; a batch and its stages: medians of so many batches; z*: targets, or the gradients
that stand for them; the steps of fine-tuning are its update; ratio: a batch over that of the first row (the methods
run one after the other)"""

Cells = tuple[Sequence[str], list[Sequence[str]]]


def profile_table(profile: Profile) -> str:
    """One line for each contender; sizes above it; below it what the columns mean, and what was skipped, and why."""
    header, rows = _shape(profile)
    lines = [_sizes(profile), "", table(header, rows), "", _legend(profile)] if rows else []
    return "\n".join([*lines, *_notes(profile.rows)])


def stage_table(profile: Profile) -> str:
    """Where the time of each contender goes: stages that take at least a hundredth of it."""
    return table(*_stages(profile), align="llrrrrr")


def sweep_table(profile: Profile) -> str:
    """One line for each contender, one column for each value of the axis: time of a batch, extrapolated ones marked."""
    lines = [_sizes(profile), "", table(*_sweep(profile)), "", _SWEEP_LEGEND]
    return "\n".join([*lines, *_notes(profile.rows)])


def edit_table(profile: Profile) -> str:
    """Whole edits: one line for each method, one column for each stage, with its share."""
    return "\n".join([_sizes(profile), "", table(*_edits(profile)), "", _EDIT_LEGEND])


def _shape(profile: Profile) -> Cells:
    return _HEADER, [(row.name, *_cells(row)) for row in profile.rows if row.times is not None]


def _stages(profile: Profile) -> Cells:
    rows: list[Sequence[str]] = []
    for row in profile.rows:
        name = row.name
        for stage in row.stages:
            if row.times is None or stage.seconds < 0.01 * row.times.median:
                continue
            share = f"{100 * stage.seconds / row.times.median:.0f} %"
            rows.append((name, stage.name, seconds(stage.seconds), share, *_rates(stage)))
            name = ""
    return _STAGES, rows


def _sweep(profile: Profile) -> Cells:
    axis = profile.kind
    values = sorted({int(row.problem[axis]) for row in profile.rows})
    names = list(dict.fromkeys(row.name for row in profile.rows))
    found = {(row.name, int(row.problem[axis])): row for row in profile.rows}
    rows: list[Sequence[str]] = []
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
    return ["", *head, "last / first"], rows


def _edits(profile: Profile) -> Cells:
    rows: list[Sequence[str]] = []
    for row in profile.rows:
        assert row.times is not None
        spent = booked(row.name, {stage.name: stage.seconds for stage in row.stages})
        parts = [f"{seconds(s)} ({100 * s / row.times.median:.1f} %)" for s in spent.values()]
        batches, facts = str(row.times.repetitions), str(row.problem["u"])
        rows.append((row.name, facts, batches, seconds(row.times.median), *parts, _edit(row), _times(row)))
    return ("method", "facts", "batches", "a batch", *TITLES.values(), "an edit", "ratio"), rows


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
    """The tables of a profile in Markdown: sizes, device and ceilings above them, what the columns mean below."""
    parts = [_sizes(profile), _machine(profile)]
    if profile.kind == "edit":
        parts += [markdown_table(*_edits(profile)), _EDIT_LEGEND]
    elif profile.kind == "shape":
        parts += [markdown_table(*_shape(profile)), _legend(profile)]
        header, rows = _stages(profile)
        if rows:
            about = "Where the time goes, stages of at least a hundredth; of ceiling: of what the machine reaches."
            parts += [about, markdown_table(header, rows, align="llrrrrr")]
    else:
        parts += [markdown_table(*_sweep(profile)), _SWEEP_LEGEND, markdown_table(*_points(profile))]
        parts.append(_legend(profile))
    notes = "\n".join(f"- {note}" for note in _notes(profile.rows))
    return "\n\n".join([*parts, *([notes] if notes else [])]) + "\n"


def _points(profile: Profile) -> Cells:
    """A sweep in full: one line for each contender and value."""
    axis = profile.kind
    rows = [(row.name, str(row.problem[axis]), *_cells(row)) for row in profile.rows if row.times is not None]
    return ("", "after" if axis == "history" else axis, *_HEADER[1:]), list(rows)


def _sizes(profile: Profile) -> str:
    """What the rows have in common, and the axis along which they differ."""

    def all_of(name: str) -> str:
        return ", ".join(str(value) for value in dict.fromkeys(row.problem.get(name) for row in profile.rows))

    layers = all_of("layers")
    where = f"{layers} layer{'' if layers == '1' else 's'} of d = {all_of('d')}, v = {all_of('v')}"
    where += f", {all_of('dtype')}, {all_of('device')}"
    if profile.kind == "edit":
        return f"{all_of('model')}: {all_of('facts')} facts, batches of {all_of('u')}; {where}."
    written = "" if all_of("history") == "0" else f"; {all_of('history')} batches written before"
    return f"A batch of {all_of('u')} keys, state and weight; {where}{written}."


def _legend(profile: Profile) -> str:
    batches = max((row.error_batches for row in profile.rows if row.error_batches), default=1)
    caches = "caches flushed before each" if profile.settings.get("cold") else "caches as they are"
    return (
        f"a batch: median of so many calls, {caches}; ratio: to {profile.settings.get('baseline')!r} in turns\n"
        "with the row, whose median stands in 'to' with its calls (what does not fit into memory together is\n"
        "measured in groups, each with its own); GB, GFLOP: of a batch, counted; of ceiling: of what the machine\n"
        "reaches; extra memory: at the peak of a batch; error: |W - W_exact| / |W_exact - W_0| against float64\n"
        f"after {batches} batches (MEMIT: 1)"
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
        str(row.times.repetitions) if measured else "-",
        f"{seconds(row.times.p20)} .. {seconds(row.times.p80)}" if measured and row.times.repetitions > 1 else "-",
        _edit(row),
        _times(row),
        _beside(row),
        "-" if row.bytes is None else f"{1e-9 * row.bytes:.3g}",
        "-" if row.flops is None else f"{1e-9 * row.flops:.3g}" + "+" * bool(row.uncounted),
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


def _beside(row: Row) -> str:
    if row.compared_with is None:
        return "-"
    calls = row.baseline_repetitions
    return seconds(row.compared_with) + (f" ({calls})" if calls is not None else "")


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _notes(rows: Iterable[Row]) -> list[str]:
    """What stands below a table: rows without a time of their own, and what is not counted of others, each once."""
    rows = list(rows)
    found = [f"{row.name}: {row.status}: {row.reason}" for row in rows if row.status != "measured"]
    found += [
        f"{row.name}: GFLOP+ and of ceiling leave out {', '.join(row.uncounted)}, of which no number of operations is "
        "known" for row in rows if row.uncounted
    ]  # fmt: skip
    return list(dict.fromkeys(found))
