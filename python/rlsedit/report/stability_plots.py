"""Figures of stability trials: error along the streams, and what the drift says of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit.report.styles import point

if TYPE_CHECKING:
    from rlsedit_kernels.diagnostics import Trial

__all__ = ["COLOURS", "MARKS", "STYLES", "new_figure", "plot_errors", "plot_health", "save_figure", "styled"]

# Okabe and Ito's colours, distinct to the colour-blind; line styles and marks tell them apart in grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9", "#7f7f7f", "#b8a400")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (4, 2)), (0, (2, 2)))
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

PANELS = ("repeated", "wind-up", "weak-0.01", "condition-1e8", "conflict", "mixed")
"""Streams of the first figure, where they are among the trials."""

FLOOR, CEILING = 1e-16, 1e2


def plot_errors(trials: Sequence[Trial], path: Path) -> None:
    """Error of W against the number of batches: a panel for each of up to six streams, a line for each form.

    A line that an exception ended ends in a large mark.

    Raises:
        ValueError: there is nothing to draw.
    """
    streams = list(dict.fromkeys(trial.stream for trial in trials if trial.points))
    chosen = [name for name in PANELS if name in streams] or streams[:6]
    chosen += [name for name in streams if name not in chosen][: max(0, min(6, len(streams)) - len(chosen))]
    if not chosen:
        raise ValueError("plot_errors: trials must hold at least one point, got none")
    steps = list(dict.fromkeys(trial.step for trial in trials))
    columns = min(3, len(chosen))
    figure = new_figure((4.1 * columns, 3.2 * -(-len(chosen) // columns) + 0.6))
    axes = figure.subplots(-(-len(chosen) // columns), columns, sharex=True, sharey=True, squeeze=False)
    for axis, stream in zip(axes.flat, chosen, strict=False):
        for trial in (t for t in trials if t.stream == stream and t.points):
            i = steps.index(trial.step)
            values = [min(max(p.error_W, FLOOR), CEILING) for p in trial.points]
            axis.plot([p.batches for p in trial.points], values, **_style(i, len(values)))
            if trial.ended_at is not None:
                axis.plot(trial.points[-1].batches, values[-1], **{**_style(i), "ls": "", "ms": 8, "markevery": 1})
        axis.axhline(1e-2, color="0.5", lw=0.8)
        axis.set(xscale="log", yscale="log", title=stream)
        styled(axis)
    for axis in axes[-1]:
        axis.set_xlabel("batches written")
    for axis in axes[:, 0]:
        axis.set_ylabel(r"$\|W-W^*\|_S \,/\, \|W^*-W_0\|_S$")
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    handles = [_line(i, name) for i, name in enumerate(steps)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(steps)), frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_health(trials: Sequence[Trial], path: Path) -> None:
    """Drift that `health()` measures against the error of W, a point for each checkpoint, a panel for each measure."""
    figure = new_figure((9.0, 4.0))
    axes = figure.subplots(1, 2, sharey=True)
    from rlsedit_kernels.states.health import DRIFT_BROKEN, DRIFT_WARNING

    panels = (
        ("covariance kept (plain, whitened)", ("plain", "whitened")),
        ("root kept", ("inverse_root", "square_root")),
    )
    for axis, (title, forms) in zip(axes, panels, strict=True):
        for status, colour, mark in (("ok", "#0072b2", "o"), ("warning", "#e69f00", "^"), ("broken", "#d55e00", "X")):
            points = [
                p for t in trials for p in t.points
                if p.status == status and p.form is not None and p.form.split()[0] in forms and p.drift is not None
            ]  # fmt: skip
            x = [min(max(p.drift or 0.0, FLOOR), 1e6) for p in points]
            axis.plot(x, [min(max(p.error_W, FLOOR), CEILING) for p in points], mark, color=colour, ms=3, alpha=0.6,
                      label=f"health() says {status}")  # fmt: skip
        axis.axhline(1e-2, color="0.5", lw=0.8)
        axis.axvline(DRIFT_WARNING[forms[0]], color="0.5", lw=0.8, ls="--")
        axis.axvline(DRIFT_BROKEN[forms[0]], color="0.5", lw=0.8, ls=":")
        axis.set(xscale="log", yscale="log", title=title, xlabel="drift of the probes (no unit)")
        styled(axis)
    axes[0].set_ylabel(r"$\|W-W^*\|_S \,/\, \|W^*-W_0\|_S$")
    axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path, rasterised=True)


def styled(axis: Any) -> None:
    """Grid behind the data, no frame on top and right."""
    axis.grid(True, which="major", color="0.9")
    axis.set_axisbelow(True)
    axis.title.set_fontsize(10)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def save_figure(figure: Any, path: Path, *, rasterised: bool = False) -> None:
    """Write an SVG that is the same for the same data: fixed identifiers, no date."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    if rasterised:
        for axis in figure.axes:
            for line in axis.lines:
                line.set_rasterized(len(line.get_xdata()) > 50)
    with matplotlib.rc_context({"svg.hashsalt": "rlsedit", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def new_figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need matplotlib: pip install matplotlib") from None
    return Figure(figsize=size, dpi=130, layout="constrained")


def _line(i: int, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **_style(i))


def _style(i: int, points: int = 1) -> dict[str, Any]:
    """Line `i` of so many points: dashes alone are too much alike in grey, so that every fifth point has a mark."""
    mark = {**point(i), "color": COLOURS[i % 9]}
    return {**mark, "ls": STYLES[i % 9], "lw": 1.3, "ms": 4, "markevery": (min(i % 5, points - 1), 5)}
