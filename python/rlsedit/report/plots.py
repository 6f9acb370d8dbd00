"""The objective over a stream of edits, as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Protocol

from rlsedit.report.styles import point

__all__ = ["BatchTerms", "plot_objective"]


class BatchTerms(Protocol):
    """What is plotted of a batch; `rlsedit.BatchReport` has it."""

    @property
    def ids(self) -> tuple[str, ...]: ...
    @property
    def fit(self) -> float: ...
    @property
    def parameter_deviation(self) -> float: ...
    @property
    def anchor_deviation(self) -> float: ...


_PANELS = (
    ("fit", "fit to all facts so far", r"$\sum_s \|K_s W_t - V_s\|^2 / \nu_s$"),
    ("parameter_deviation", "distance from the first weights", r"$\|W_t - W_0\|_F^2$"),
    ("anchor_deviation", "change of the anchor map", r"$\|K_0 (W_t - W_0)\|_F^2$"),
)


def plot_objective(runs: Mapping[str, Sequence[BatchTerms]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draws the three terms of the objective against the number of facts written, one curve for each run.

    Args:
        runs: batches by the name of the run, as in ``EditReport.batches``.
        path: the PNG to write.
        title: a line over the panels.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if not any(runs.values()):
        raise ValueError("plot_objective: runs must have at least one batch, got none")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.9), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(_PANELS))
    for axis, (name, label, formula) in zip(axes, _PANELS, strict=True):
        for index, (run, batches) in enumerate(runs.items()):
            written, total = [], 0
            for batch in batches:
                total += len(batch.ids)
                written.append(total)
            values = [getattr(batch, name) for batch in batches]
            axis.plot(written, values, ms=4.5, lw=1.8, label=run, **point(index))
        axis.set_title(f"{label}\n{formula}", fontsize=10)
        axis.set_xlabel("facts written")
        axis.set_xlim(left=0)
        positive = [v for batches in runs.values() for v in (getattr(b, name) for b in batches) if v > 0]
        if positive and max(positive) > 20 * min(positive):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(True, which="major", color="0.9")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path)
