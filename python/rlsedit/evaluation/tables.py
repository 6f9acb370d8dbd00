"""The tables of an evaluation, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..metrics import paired_differences
from ..report.stages import STAGES, TITLES, booked
from ..report.tables import markdown_table
from .records import RunRecord

__all__ = ["Table", "batches_csv", "means_csv", "scores_csv", "tables"]

COLUMNS = (
    ("counterfact", "efficacy_success", "efficacy"),
    ("counterfact", "paraphrase_success", "generalisation"),
    ("counterfact", "neighbourhood_success", "specificity"),
    ("counterfact", "score", "score"),
    ("counterfact", "efficacy_tokens", "efficacy, tokens"),
    ("counterfact", "paraphrase_tokens", "generalisation, tokens"),
    ("counterfact", "neighbourhood_tokens", "specificity, tokens"),
    ("counterfact", "portability_accuracy", "portability"),
    ("writing", "fluency", "fluency, bits"),
    ("writing", "consistency", "consistency"),
)
"""Metric, name in the summary, title; all but fluency in percent."""


class Table:
    """A title, a sentence about what stands in it, a header and rows of cells."""

    def __init__(self, title: str, about: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.title, self.about, self.header, self.rows = title, about, list(header), [list(row) for row in rows]

    def markdown(self) -> str:
        """With a heading of the third level."""
        return "\n".join([f"### {self.title}", "", self.about, "", markdown_table(self.header, self.rows)]) + "\n"


def tables(records: Sequence[RunRecord]) -> list[Table]:
    """All that can be said of these runs; a table without rows is left out."""
    found = [
        _scores(records),
        _differences(records),
        _retention(records),
        _objective(records),
        _speed(records),
        _ability(records),
    ]
    return [table for table in found if table.rows]


def by_method(records: Iterable[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs of each method, in their order."""
    found: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        found[record.spec.method].append(record)
    return dict(found)


def value_of(entry: Mapping[str, Any] | None, group: str, metric: str, name: str) -> tuple[float, float]:
    """Mean and standard error of a metric at a checkpoint; NaN where it was not measured."""
    found = ((entry or {}).get("groups", {}).get(group) or {}).get(metric, {}).get(name)
    if found is None or found["mean"] is None:
        return math.nan, math.nan
    return float(found["mean"]), math.nan if found["stderr"] is None else float(found["stderr"])


def several(records: Iterable[RunRecord]) -> bool:
    """Whether a method has more than one run, so that errors are over runs; otherwise they are over facts."""
    return any(len(runs) > 1 for runs in by_method(records).values())


def averaged(pairs: Sequence[tuple[float, float]], over_runs: bool) -> tuple[float, float]:
    """Mean of the means, and its standard error: over runs (NaN for a single one), or that of one run over facts."""
    known = [pair for pair in pairs if not math.isnan(pair[0])]
    if not known:
        return math.nan, math.nan
    mean = sum(m for m, _ in known) / len(known)
    if not over_runs:
        return mean, known[0][1] if len(known) == 1 else math.nan
    if len(known) == 1:
        return mean, math.nan
    return mean, math.sqrt(sum((m - mean) ** 2 for m, _ in known) / (len(known) - 1) / len(known))


def spread(records: Iterable[RunRecord], of_one: str = "facts") -> str:
    """What stands behind the ± of a table, in words."""
    if several(records):
        return "Means over the runs (seeds and orders); ± is the standard error over them, a single run has none."
    return f"± is the standard error over {of_one}."


def _corner(records: Iterable[RunRecord], of_one: str = "facts") -> str:
    """The same for the header, where a terminal shows the table without its caption."""
    return f"± over {'runs' if several(records) else of_one}"


def _before(records: Sequence[RunRecord]) -> list[RunRecord]:
    """One record for each seed and order: before its first batch a stream is the same for every method."""
    return list({(r.spec.seed, r.spec.order): r for r in reversed(records)}.values())


def _scores(records: Sequence[RunRecord]) -> Table:
    def cells(entries: Sequence[Mapping[str, Any] | None]) -> list[str]:
        return [
            _cell(averaged([value_of(entry, "all", m, n) for entry in entries], several(records)), n != "fluency")
            for m, n, _ in COLUMNS
        ]

    rows = []
    starts = [record.checkpoints[0] for record in _before([r for r in records if r.checkpoints])]
    if starts:
        rows.append(["before", "", *cells(starts)])
    for method, runs in by_method(records).items():
        lasts = [run.last for run in runs]
        known = [entry for entry in lasts if entry is not None]
        if known:
            written = sorted({entry["facts"] for entry in known})
            rows.append([method, ", ".join(map(str, written)), *cells(known)])
    kept = [i for i in range(len(COLUMNS)) if any(row[2 + i] != "" for row in rows)]
    header = [_corner(records), "facts", *(COLUMNS[i][2] for i in kept)]
    about = f"All facts of the stream (or a sample of them) behind its last batch, percent. {spread(records)}"
    return Table("Scores", about, header, [[row[0], row[1], *(row[2 + i] for i in kept)] for row in rows])


def _differences(records: Sequence[RunRecord]) -> Table:
    """Beside the first method, on the same facts: the errors of two rows of "Scores" do not tell this one."""
    ended = [run for run in records if run.complete and run.rows]
    first = ended[0].spec.method if ended else ""
    beside = {(run.spec.seed, run.spec.order): run for run in ended if run.spec.method == first}
    columns = [(name, title) for metric, name, title in COLUMNS if metric == "counterfact"]
    rows = []
    for method, runs in by_method(ended).items():
        pairs = [(run, beside.get((run.spec.seed, run.spec.order))) for run in runs if method != first]
        found = [
            paired_differences(run.rows, other.rows)
            for run, other in pairs
            if other is not None and {row["id"] for row in run.rows} == {row["id"] for row in other.rows}
        ]
        if found:
            each = [[(one[name].mean, one[name].stderr) for one in found] for name, _ in columns]
            rows.append([method, *(_cell(averaged(pair, several(records)), True, sign="+") for pair in each)])
    kept = [i for i in range(len(columns)) if any(row[1 + i] for row in rows)]
    about = (
        f"How far scores behind the last batch are above (+) or below those of {first}, percentage points, the same "
        f"facts compared one by one. {spread(records)}"
    )
    header = [_corner(records), *(columns[i][1] for i in kept)]
    return Table(f"Differences from {first}", about, header, [[row[0], *(row[1 + i] for i in kept)] for row in rows])


def _retention(records: Sequence[RunRecord]) -> Table:
    counts = sorted({entry["facts"] for r in records for entry in r.checkpoints if "first" in entry["groups"]})
    rows = []
    for method, runs in by_method(records).items():
        cells = []
        for count in counts:
            entries = [entry for run in runs for entry in run.checkpoints if entry["facts"] == count]
            pairs = [value_of(entry, "first", "counterfact", "efficacy_success") for entry in entries]
            cells.append(_cell(averaged(pairs, several(records)), True))
        if any(cells):
            rows.append([method, *cells])
    about = (
        "Efficacy of the first facts of the stream after so many facts (figure 4 of the paper), percent. "
        f"{spread(records)}"
    )
    return Table("Retention", about, [_corner(records), *(f"after {count}" for count in counts)], rows)


def _objective(records: Sequence[RunRecord]) -> Table:
    rows = []
    for method, runs in by_method(records).items():
        lasts = [run.batches[-1] for run in runs if run.batches]
        if lasts:
            cells = [_number(_mean([entry[name] for entry in lasts])) for name in ("fit", "parameter", "anchor")]
            bounds = [_number(_mean([_squared(entry[f"{name}_bound"]) for entry in lasts]))
                      for name in ("parameter", "anchor")]  # fmt: skip
            rows.append([method, cells[0], cells[1], bounds[0], cells[2], bounds[1]])
    about = (
        "Behind the last batch, sums over the edited layers: fit to all edits, squared distance from the first weights "
        "and change of the anchor map, with the squares of their bounds where the method has them (figure 2)"
        f"{'; means over the runs' if several(records) else ''}."
    )
    header = ("", "fit", "|W - W_0|²", "at most", "|K_0 (W - W_0)|²", "at most")
    return Table("Objective", about, header, rows)


def _speed(records: Sequence[RunRecord]) -> Table:
    rows = []
    for method, runs in by_method(records).items():
        facts = sum(run.batches[-1]["facts"] for run in runs if run.batches)
        if not facts:
            continue
        parts = [booked(method, b["seconds"]) for run in runs for b in run.batches]
        spent = {stage: sum(part[stage] for part in parts) for stage in STAGES}
        batch = sum(len(run.batches) for run in runs)
        cells = [f"{spent[stage] / facts:.4f}" if spent[stage] else "" for stage in STAGES]
        rows.append([method, *cells, f"{sum(spent.values()) / facts:.3f}", f"{spent['solve'] / batch:.4f}"])
    about = (
        "Seconds for a fact by stage, and for the update of one batch, all layers. z*: targets, or the gradients that "
        "stand for them; the steps of fine-tuning are its update."
    )
    header = ("", *TITLES.values(), "a fact", "update of a batch")
    return Table("Speed", about, header, rows)


def _ability(records: Sequence[RunRecord]) -> Table:
    tasks = list(dict.fromkeys(task for r in records for part in r.ability.values() for task in part))
    names = {task: _headline(records, task) for task in tasks}
    rows = []
    of_runs = several(records)
    starts = [record.ability["before"] for record in _before([r for r in records if "before" in r.ability])]
    if starts:
        rows.append(["before", *(_task(starts, task, names[task], of_runs) for task in tasks)])
    for method, runs in by_method(records).items():
        after = [run.ability["after"] for run in runs if "after" in run.ability]
        if after:
            rows.append([method, *(_task(after, task, names[task], of_runs) for task in tasks)])
    about = (
        "General ability before and behind the stream; the first figure that each task reports. "
        f"{spread(records, 'the items of the task')}"
    )
    header = [_corner(records, "items"), *(f"{task}, {names[task]}" for task in tasks)]
    return Table("Ability", about, header, rows if tasks else [])


def _headline(records: Sequence[RunRecord], task: str) -> str:
    return next((next(iter(p[task])) for r in records for p in r.ability.values() if p.get(task)), "")


def _task(parts: Sequence[Mapping[str, Any]], task: str, name: str, over_runs: bool) -> str:
    pairs = []
    for part in parts:
        entry = (part.get(task) or {}).get(name)
        if entry is not None and entry["mean"] is not None:
            pairs.append((float(entry["mean"]), math.nan if entry["stderr"] is None else float(entry["stderr"])))
    mean, error = averaged(pairs, over_runs)
    return "" if math.isnan(mean) else f"{mean:.3g}" + ("" if math.isnan(error) else f" ± {error:.2g}")


def scores_csv(records: Sequence[RunRecord]) -> str:
    """Every metric of every run, checkpoint and group: one line each; stderr is over facts."""
    rows = []
    for r in records:
        for entry in r.checkpoints:
            for group, found in entry["groups"].items():
                for metric in ("counterfact", "writing"):
                    for name, value in (found.get(metric) or {}).items():
                        parts = [value.get(key) for key in ("mean", "stderr", "low", "high", "count")]
                        rows.append([r.spec.method, r.spec.seed, r.spec.order, entry["facts"], group, name, *parts])
    header = ("method", "seed", "order", "facts", "group", "metric", "mean", "stderr", "low", "high", "count")
    return _csv(header, rows)


def means_csv(records: Sequence[RunRecord]) -> str:
    """Every metric of every method, checkpoint and group over its runs, with both standard errors: one line each.

    That over facts is the root of the mean square of the runs': the error of one run.
    """
    found: dict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)
    for r in records:
        for entry in r.checkpoints:
            for group, values in entry["groups"].items():
                for metric in ("counterfact", "writing"):
                    for name in values.get(metric) or {}:
                        pair = value_of(entry, group, metric, name)
                        if not math.isnan(pair[0]):
                            found[r.spec.method, entry["facts"], group, name].append(pair)
    rows = []
    for key, pairs in found.items():
        mean, over_runs = averaged(pairs, True)
        over_facts = math.sqrt(sum(error**2 for _, error in pairs) / len(pairs))
        errors = ["" if math.isnan(error) else error for error in (over_runs, over_facts)]
        rows.append([*key, len(pairs), mean, *errors])
    return _csv(("method", "facts", "group", "metric", "runs", "mean", "stderr_over_runs", "stderr_over_facts"), rows)


def batches_csv(records: Sequence[RunRecord]) -> str:
    """Terms of the objective and seconds of every batch: one line each."""
    names = ("fit", "parameter", "anchor", "parameter_bound", "anchor_bound", "target_loss", "steps")
    rows = [
        [r.spec.method, r.spec.seed, r.spec.order, b["facts"], *(b[n] for n in names),
         *booked(r.spec.method, b["seconds"]).values()]
        for r in records for b in r.batches
    ]  # fmt: skip
    return _csv(("method", "seed", "order", "facts", *names, *(f"seconds_{stage}" for stage in STAGES)), rows)


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def _cell(pair: tuple[float, float], percent: bool, sign: str = "") -> str:
    mean, error = pair
    if math.isnan(mean):
        return ""
    scale, digits = (100.0, 1) if percent else (1.0, 2)
    return f"{scale * mean:{sign}.{digits}f}" + ("" if math.isnan(error) else f" ± {scale * error:.{digits}f}")


def _mean(values: Sequence[float | None]) -> float:
    known = [float(value) for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _squared(value: float | None) -> float | None:
    return None if value is None else value * value


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"
