"""Figures of a profile: cost by contender and stage, cost along an axis, and the roofline."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from rlsedit.report.stages import TITLES, booked
from rlsedit.report.styles import COLOURS, HATCHES, point
from rlsedit.report.tables import seconds
from rlsedit_kernels.profile import Profile, Row

__all__ = ["plot_axis", "plot_bars", "plot_edit", "plot_roofline"]

_OURS, _PUBLISHED = "#0b6e99", "#9a9a9a"
_AXES = {
    "history": "batches written before",
    "d": "d, dimension of a key",
    "u": "u, keys of a batch",
    "layers": "layers",
}

Path = str | os.PathLike[str]


def plot_bars(profile: Profile, path: Path) -> None:
    """Milliseconds of a batch for each contender on a logarithmic axis, with times and ratios in words.

    A ratio stands with the baseline's time where that was measured anew, so that it can be told from the times drawn.

    Raises:
        ValueError: if there is nothing to draw.
    """
    rows = _drawn(profile)
    figure, axis = _figure(9.5, 0.8 + 0.36 * len(rows))
    values = [1e3 * row.times.median for row in rows if row.times]
    shades = [_OURS if _ours(row.name) else _PUBLISHED for row in rows]
    axis.barh(range(len(rows)), values, color=shades, height=0.62)
    first = next((row.times.median for row in rows if row.times and row.name == profile.settings.get("baseline")), None)
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        mark = "~ " if row.status == "extrapolated" else ""
        ratio = _ratio(row, first)
        axis.text(value * 1.06, place, f"{mark}{seconds(value / 1e3)}{ratio}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(min(values) / 3, max(values) * 14)
    about = (
        "blue: this package; grey: published sequences and one's own\n"
        f"in brackets: how many times {profile.settings.get('baseline')!r} as measured in turns with it, "
        "and its time where that is not the one drawn"
    )
    axis.set_title(about, fontsize=8, loc="left")
    axis.set_xlabel(f"milliseconds for a batch of {rows[0].problem['u']} keys ({_problem(rows[0])})", fontsize=9)
    _finish(figure, axis, path)


def plot_axis(profile: Profile, path: Path) -> None:
    """Milliseconds of a batch against the axis of a sweep, one curve for each contender.

    Raises:
        ValueError: if there is nothing to draw, or the profile is no sweep.
    """
    if profile.kind not in _AXES:
        raise ValueError(f"plot_axis: profile must be a sweep over {', '.join(_AXES)}, got kind {profile.kind!r}")
    rows = _drawn(profile)
    figure, axis = _figure(8.5, 5.0)
    handles: list[Any] = []
    for name, mark in _marks(rows).items():
        own = sorted((row for row in rows if row.name == name), key=lambda row: row.problem[profile.kind])
        x = [row.problem[profile.kind] for row in own]
        y = [1e3 * row.times.median for row in own if row.times]
        low = [1e3 * (row.times.median - row.times.p20) for row in own if row.times]
        high = [1e3 * (row.times.p80 - row.times.median) for row in own if row.times]
        style = "-" if _ours(name) else "--"
        axis.errorbar(x, y, yerr=(low, high), ms=6, lw=1.6, ls=style, capsize=2, elinewidth=0.8, **mark)
        handles += axis.plot([], [], ms=6, lw=1.6, ls=style, label=name, **mark)  # bars would cover the mark
    axis.set_xlabel(_AXES[profile.kind])
    axis.set_ylabel("milliseconds for a batch")
    axis.set_yscale("log")
    if profile.kind != "history":
        axis.set_xscale("log")
        ticks = sorted({row.problem[profile.kind] for row in rows})
        axis.set_xticks(ticks, [str(value) for value in ticks])
        axis.minorticks_off()
    axis.legend(handles=handles, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _finish(figure, axis, path)


def plot_edit(profile: Profile, path: Path) -> None:
    """Seconds of an edit by each method, stage by stage.

    Raises:
        ValueError: if there is nothing to draw.
    """
    rows = _drawn(profile)
    figure, axis = _figure(8.5, 1.2 + 0.45 * len(rows))
    spent = [booked(row.name, {stage.name: stage.seconds for stage in row.stages}) for row in rows]
    left = [0.0] * len(rows)
    for index, (stage, title) in enumerate(TITLES.items()):
        widths = [part[stage] / int(row.problem["u"]) for part, row in zip(spent, rows, strict=True)]
        axis.barh(
            [row.name for row in rows], widths, left=left, color=COLOURS[index], label=title, height=0.6,
            hatch=HATCHES[index], edgecolor="white", lw=0.0,
        )  # fmt: skip
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel(f"seconds for an edit, in batches of {rows[0].problem['u']} ({_problem(rows[0])})", fontsize=9)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _finish(figure, axis, path)


def plot_roofline(profile: Profile, path: Path) -> None:
    """Achieved rate against arithmetic intensity, below the ceilings that were measured in the same run.

    Raises:
        ValueError: if there is nothing to draw.
    """
    rows = [
        row for row in _drawn(profile) if row.status == "measured" and row.flops and row.bytes and not row.uncounted
    ]
    if not rows:
        raise ValueError("plot_roofline: profile must have measured rows with counted work, got none")
    figure, axis = _figure(8.5, 5.0)
    intensity = [row.flops / row.bytes for row in rows if row.flops and row.bytes]
    low, high = min(intensity) / 4, max(intensity) * 4
    for (name, rate), style in zip(profile.ceilings.flops_per_s.items(), ("-", "--"), strict=False):
        knee = rate / profile.ceilings.bytes_per_s
        x = [low, knee, max(high, 2 * knee)]
        y = [1e-9 * min(rate, profile.ceilings.bytes_per_s * value) for value in x]
        axis.plot(x, y, color="0.35", ls=style, lw=1.3, label=f"ceiling, {name}")
    marks = _marks(rows)
    for place, (row, value) in enumerate(zip(rows, intensity, strict=True)):  # the first on top
        assert row.times is not None
        assert row.flops is not None
        axis.plot(
            value,
            1e-9 * row.flops / row.times.median,
            ms=7,
            ls="",
            label=row.name,
            mew=1.5,
            zorder=3 - 0.01 * place,
            **marks[row.name],
        )
    rates = [1e-9 * row.flops / row.times.median for row in rows if row.flops and row.times]
    axis.set_ylim(
        10 ** math.floor(math.log10(min(rates) / 1.5)),
        1e-9 * 10 ** math.ceil(math.log10(1.02 * max(profile.ceilings.flops_per_s.values()))),
    )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("flops for each byte that has to be moved")
    axis.set_ylabel("GFLOP/s")
    axis.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _finish(figure, axis, path)


def _drawn(profile: Profile) -> Sequence[Row]:
    rows = [row for row in profile.rows if row.times is not None]
    if not rows:
        raise ValueError("profile: nothing was measured, so there is nothing to draw")
    return rows


def _marks(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """A style for each contender: filled marks for ours, open ones for the others."""
    names = list(dict.fromkeys(row.name for row in rows))
    kinds = {kind: [name for name in names if _ours(name) is kind] for kind in (True, False)}
    return {name: point(kinds[_ours(name)].index(name), filled=_ours(name)) for name in names}


def _problem(row: Row) -> str:
    layers = int(row.problem["layers"])
    several = f", {layers} layers" if layers > 1 else ""
    return f"d = {row.problem['d']}, v = {row.problem['v']}{several}, {row.problem['dtype']}"


def _ratio(row: Row, first: float | None) -> str:
    """How many times the baseline beside it, with that one's time where it differs from `first` as printed."""
    if row.ratio is None or row.compared_with is None:
        return ""
    times, beside = f"{row.ratio:.3g}", seconds(row.compared_with)
    return f"  ({times}x)" if first is not None and beside == seconds(first) else f"  ({times} x {beside})"


def _ours(name: str) -> bool:
    return name.startswith(("rlsedit", "RLSFilter")) or "by recursion" in name


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "rlsedit"  # the same file from the same figures
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    return figure, figure.subplots()


def _finish(figure: Any, axis: Any, path: Path) -> None:
    axis.grid(True, which="major", color="0.9")
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
