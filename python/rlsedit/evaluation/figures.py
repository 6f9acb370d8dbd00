"""The figures of an evaluation: scores and retention over the stream, terms of the objective, seconds by stage."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from ..report.stages import STAGES, TITLES, booked
from ..report.styles import COLOURS, HATCHES, point
from .records import RunRecord
from .tables import averaged, by_method, several, value_of

__all__ = ["FIGURES", "draw"]

_SCORES = (
    ("efficacy_success", "efficacy"),
    ("paraphrase_success", "generalisation"),
    ("neighbourhood_success", "specificity"),
    ("score", "score (harmonic mean)"),
)
_TERMS = (
    ("fit", "fit to all edits", r"$\sum_s \|K_s W_t - V_s\|^2 / \nu_s$"),
    ("parameter", "distance from the first weights", r"$\|W_t - W_0\|_F^2$"),
    ("anchor", "change of the anchor map", r"$\|K_0 (W_t - W_0)\|_F^2$"),
)


def draw(name: str, records: Sequence[RunRecord], path: str | os.PathLike[str]) -> bool:
    """Draw one of `FIGURES`; False, and no file, where the runs have nothing for it."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "rlsedit"  # the same file from the same figures
    figure = FIGURES[name](records)
    if figure is None:
        return False
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
    return True


def _scores(records: Sequence[RunRecord]) -> Any:
    return _over_checkpoints(records, "all", _SCORES, "facts written")


def _retention(records: Sequence[RunRecord]) -> Any:
    return _over_checkpoints(records, "first", _SCORES[:2], "facts written; scores of the first of them")


def _over_checkpoints(records: Sequence[RunRecord], group: str, panels: Sequence[tuple[str, str]], label: str) -> Any:
    if not any(group in entry["groups"] for r in records for entry in r.checkpoints):
        return None
    figure, axes = _figure(len(panels))
    for axis, (name, title) in zip(axes, panels, strict=True):
        for index, (method, runs) in enumerate(by_method(records).items()):
            counts = sorted({entry["facts"] for run in runs for entry in run.checkpoints if group in entry["groups"]})
            x, y, errors = [], [], []
            for count in counts:
                entries = [entry for run in runs for entry in run.checkpoints if entry["facts"] == count]
                pairs = [value_of(entry, group, "counterfact", name) for entry in entries]
                mean, error = averaged(pairs, several(records))
                if not math.isnan(mean):
                    x.append(count)
                    y.append(100 * mean)
                    errors.append(0.0 if math.isnan(error) else 100 * error)
            if x:
                axis.errorbar(x, y, yerr=errors, capsize=2, elinewidth=0.8, **_style(index, method))
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 102)
        _finish(axis, label)
    axes[0].set_ylabel("percent; bars: standard error over " + ("runs" if several(records) else "facts"), fontsize=9)
    return _with_legend(figure, axes, records)


def _objective(records: Sequence[RunRecord]) -> Any:
    if not any(record.batches for record in records):
        return None
    figure, axes = _figure(len(_TERMS))
    for axis, (name, title, formula) in zip(axes, _TERMS, strict=True):
        positive: list[float] = []
        for index, (method, runs) in enumerate(by_method(records).items()):
            label = method
            for run in runs:
                known = [(b["facts"], b[name]) for b in run.batches if b[name] is not None and math.isfinite(b[name])]
                if known:
                    axis.plot(*zip(*known, strict=True), **{**_style(index, label), "ms": 3.5})
                    label = "_nolegend_"
                    positive += [value for _, value in known if value > 0]
        axis.set_title(f"{title}\n{formula}", fontsize=10)
        if positive and max(positive) > 20 * min(positive):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        _finish(axis, "facts written")
    return _with_legend(figure, axes, records)


def _time(records: Sequence[RunRecord]) -> Any:
    methods = {name: [run for run in runs if run.batches] for name, runs in by_method(records).items()}
    methods = {name: runs for name, runs in methods.items() if runs}
    if not methods:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 1.2 + 0.45 * len(methods)), dpi=130, layout="constrained")
    axis = figure.subplots()
    left = [0.0] * len(methods)
    for index, stage in enumerate(STAGES):
        widths = [
            sum(booked(name, b["seconds"])[stage] for run in runs for b in run.batches)
            / sum(run.batches[-1]["facts"] for run in runs)
            for name, runs in methods.items()
        ]
        axis.barh(
            list(methods), widths, left=left, color=COLOURS[index], label=TITLES[stage], height=0.6,
            hatch=HATCHES[index], edgecolor="white", lw=0.0,
        )  # fmt: skip
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _finish(axis, "seconds for a fact")
    return figure


FIGURES = {"scores": _scores, "retention": _retention, "objective": _objective, "time": _time}


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.7 * panels + 1.0, 3.6), dpi=130, layout="constrained")
    return figure, figure.subplots(1, panels)


def _style(index: int, label: str) -> dict[str, Any]:
    return {**point(index), "ms": 5, "lw": 1.6, "label": label}


def _with_legend(figure: Any, axes: Any, records: Sequence[RunRecord]) -> Any:
    """Methods in the order of the tables, also those that the first panel has nothing of."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = [name for name in by_method(records) if name in found]
    figure.legend([found[name] for name in labels], labels, frameon=False, fontsize=8, loc="outside right center")
    return figure


def _finish(axis: Any, label: str) -> None:
    axis.set_xlabel(label, fontsize=9)
    axis.set_xlim(left=0)
    axis.grid(True, which="major", color="0.9")
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
