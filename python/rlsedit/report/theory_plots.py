"""Figures of what theory says: bounds along streams, where W_t goes, and the limits of the objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsedit.report.stability_plots import COLOURS, MARKS, STYLES, new_figure, save_figure, styled

__all__ = ["plot_bounds", "plot_consistency", "plot_limits"]

STREAMS = ("weak-1", "condition-1e6", "anchored", "correlated", "mixed", "wind-up")
BATCHES = 1000
LONG = 10_000


def plot_bounds(path: Path, batches: int = BATCHES) -> None:
    """Deviations and gains as fractions of their bounds: nothing may lie above 1."""
    from rlsedit_kernels.diagnostics.streams import make_stream
    from rlsedit_kernels.diagnostics.theory import follow_bounds
    from rlsedit_kernels.diagnostics.truth import checkpoints

    figure = new_figure((9.0, 3.6))
    axes = figure.subplots(1, 2, sharey=True)
    for i, name in enumerate(STREAMS):
        bounds = follow_bounds(make_stream(name, 64, 8), batches, checkpoints(batches))
        x = [b.batches for b in bounds]
        style: dict[str, Any] = {
            "color": COLOURS[i],
            "ls": STYLES[i],
            "marker": MARKS[i],
            "ms": 3,
            "lw": 1.4,
            "label": name,
        }
        axes[0].plot(x, [b.parameter / b.parameter_bound for b in bounds], **style)
        axes[1].plot(x, [b.gain / b.gain_bound for b in bounds], **style)
    axes[0].set_title(r"$\|W_t-W_0\|_F$ over its bound $\|E\|/2\lambda$")
    axes[1].set_title(r"$\|C_tK_t^\top\|_2$ over its bound $1/2\lambda$")
    for axis in axes:
        axis.axhline(1.0, color="0.3", lw=1.0)
        axis.set(xscale="log", yscale="log", xlabel="batches written")
        styled(axis)
    axes[0].set_ylabel("fraction of the bound")
    axes[1].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_consistency(path: Path, batches: int = LONG) -> None:
    """Distance of W_t from where it goes, against the number of batches."""
    from rlsedit_kernels.diagnostics.theory import consistency
    from rlsedit_kernels.diagnostics.truth import checkpoints

    found = consistency(batches=batches, at=checkpoints(batches, 6))
    titles = {
        "lambda fixed": r"$\lambda$ fixed: to the population's $W$",
        "lambda^2 = t": r"$\lambda^2=t$: to the ridge solution of the population",
        "lambda^2 = t^1.5": r"$\lambda^2=t^{1.5}$: to $W_0$",
        "mu^2 = t^1.5": r"$\mu^2=t^{1.5}$: $K_0W_t$ to $K_0W_0$",
    }
    _falling(
        path, {titles[name]: pairs for name, pairs in found.items()}, "batches written, t", "relative distance", -0.5
    )


def plot_limits(path: Path) -> None:
    """What is left as lambda, mu or 1 / noise grow."""
    from rlsedit_kernels.diagnostics.theory import limits

    found = limits([10.0 ** (i / 2) for i in range(11)])
    titles = {
        "lambda": r"$\lambda$: $\|W_t-W_0\|$ (freezes)",
        "mu": r"$\mu$: $\|K_0(W_t-W_0)\|$ (anchors)",
        "1 / noise": r"$1/\nu$: $\|V-KW_t\|$ (writes hard)",
    }
    _falling(
        path, {titles[n]: p for n, p in found.items()}, "value, relative to the keys", "relative to the first", None
    )


def _falling(
    path: Path, lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, slope: float | None
) -> None:
    figure = new_figure((6.0, 4.0))
    axis = figure.subplots()
    for i, (name, pairs) in enumerate(lines.items()):
        xs = [a for a, _ in pairs]
        axis.plot(xs, [b for _, b in pairs], color=COLOURS[i], ls=STYLES[i], marker=MARKS[i], ms=4, lw=1.5, label=name)
        if slope is not None and i == 0:
            ends = (xs[0], xs[-1])
            level = pairs[-1][1] * 1.6
            shown = [level * (e / ends[1]) ** slope for e in ends]
            axis.plot(ends, shown, color="0.5", lw=0.9, label=f"slope {slope:g}")
    axis.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axis.legend(frameon=False, fontsize=8)
    styled(axis)
    save_figure(figure, path)
