"""What `rlsedit profile` shows and writes of a result: tables, figures, JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsedit.report import Console
    from rlsedit_kernels.profile import Profile

__all__ = ["show"]


def show(console: Console, result: Profile, out: Path | None) -> int:
    """The tables of a result, and its files where --out asks for them.

    Returns:
        The exit status: 1 where nothing was measured.
    """
    from rlsedit.report.profile_tables import edit_table, profile_table, stage_table, sweep_table

    if result.kind == "edit":
        console.line()
        console.line(edit_table(result))
        _write(console, result, out)
        return 0
    rates = ", ".join(f"{1e-9 * rate:.0f} GFLOP/s in {name}" for name, rate in result.ceilings.flops_per_s.items())
    console.line(f"ceilings  a copy {1e-9 * result.ceilings.bytes_per_s:.1f} GB/s, a product {rates}\n")
    if result.kind == "shape":
        console.line(profile_table(result))
        if any(row.stages for row in result.rows):
            console.heading("Stages")
            console.line(stage_table(result))
    else:
        console.line(sweep_table(result))
    _write(console, result, out)
    return 0 if any(row.times is not None for row in result.rows) else 1


def _write(console: Console, result: Profile, out: Path | None) -> None:
    """FILE.json alone, or a folder with the result, its tables and its figures."""
    from rlsedit.paths import atomic_write_text
    from rlsedit.report.profile_tables import markdown

    if out is None:
        return
    if out.suffix == ".json":
        result.save(out)
        console.line(f"\nwritten to {out}")
        return
    result.save(out / "profile.json")
    atomic_write_text(out / "profile.md", markdown(result))
    names = ["profile.json", "profile.md", *_draw(result, out)]
    console.line(f"\nwritten to {out}: {', '.join(names)}")


def _draw(result: Profile, folder: Path) -> list[str]:
    from rlsedit.report.profile_plots import plot_axis, plot_bars, plot_edit, plot_roofline

    if not any(row.times is not None for row in result.rows):
        return []
    figures: dict[str, Any] = {"growth": plot_axis}
    if result.kind == "shape":
        figures = {"cost": plot_bars, "roofline": plot_roofline}
    elif result.kind == "edit":
        figures = {"stages": plot_edit}
    names = []
    for name, draw in figures.items():
        for kind in ("svg", "png"):
            names.append(f"{name}.{kind}")
            draw(result, folder / names[-1])
    return names
