"""Tables of stability trials, on a terminal and in docs/stability.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit.report.tables import markdown_table, table

if TYPE_CHECKING:
    from rlsedit_kernels.diagnostics import Trial

__all__ = ["PAGE", "RESULTS", "error_table", "health_table", "markdown", "messages", "sizes", "write_page"]

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "bench" / "results" / "stability.json"
PAGE = ROOT / "docs" / "stability.md"
FIGURES = ROOT / "docs" / "stability"

BEGIN, END = "<!-- begin: rlsedit stability --page -->", "<!-- end -->"


def error_table(trials: Sequence[Trial]) -> str:
    """Largest error of W along each stream, by form; where it refused or failed, and at which batch."""
    header, rows = _errors(trials)
    return table(header, rows)


def health_table(trials: Sequence[Trial]) -> str:
    """What `health()` said, by form."""
    header, rows = _health(trials)
    return table(header, rows)


def markdown(settings: dict[str, Any], trials: Sequence[Trial]) -> str:
    """Both tables, with the sizes they were measured at."""
    failed = any(trial.failed_at is not None for trial in trials)
    said = "".join(f"- {line}\n" for line in messages(trials))
    ended = f"†: refused at the batch behind it{_FAILED if failed else ''}"
    return (
        f"Largest error of W in the S-norm, relative to W − W_0, along each stream ({sizes(settings)}). **Bold**: "
        f"above 1e-2, first at the batch behind the @. {ended}.\n\n"
        f"{_markdown(*_errors(trials, bold=True))}\n\n"
        + (
            f"What ended them, and at which batch (figures in a message are those of the first):\n\n{said}\n"
            if said
            else ""
        )
        + f"What `health()` said:\n\n{_markdown(*_health(trials))}\n"
    )


_FAILED = "; ‡: ended there by an error of the step, which is no refusal (0: when it was made)"


def sizes(settings: dict[str, Any]) -> str:
    """Dimensions and batches of the streams as they were followed, where they ran."""
    if "sizes" in settings:
        known = list(settings["sizes"].values())
        d, v, batches = (_span([entry[name] for entry in known]) for name in ("d", "v", "batches"))
        u = _span([keys for entry in known for keys in entry["u"]])
        text = f"d = {d}, u = {u}, v = {v}, {batches} batch{'' if batches == '1' else 'es'}"
    else:  # a file older than this entry
        text = f"d = {settings['d']}, u = {settings['u']}, v = {settings['v']}, at most {settings['batches']} batches"
    if settings.get("device", "cpu") != "cpu":
        text += f", on {settings['device']}"
    if settings.get("backend"):
        text += f", back end {settings['backend']}"
    return text


def messages(trials: Sequence[Trial]) -> list[str]:
    """What ended trials, in the step's own words: one line for each step and kind of message."""
    found: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        if trial.ended_at is not None:
            kind = "refused" if trial.failed_at is None else "error"
            found.setdefault((trial.step, kind, re.sub(r"-?\d[\d.e+-]*", "#", trial.reason or "")), []).append(trial)
    lines = []
    for (step, kind, _), ended in found.items():
        where = ", ".join(f"{t.stream} " + (f"at {t.ended_at}" if t.ended_at else "when made") for t in ended)
        lines.append(f"{step}: {kind}: {where}: {ended[0].reason}")
    return lines


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def write_page(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Put tables and figures of `results` between the markers of `page`.

    Raises:
        ValueError: the page lacks the markers.
    """
    from rlsedit.report import stability_plots, theory_plots
    from rlsedit_kernels.diagnostics import load

    settings, trials = load(results)
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page.name} must hold {BEGIN} and {END} once each")
    folder = page.parent / "stability"
    folder.mkdir(exist_ok=True)
    stability_plots.plot_errors(trials, folder / "errors.svg")
    stability_plots.plot_health(trials, folder / "health.svg")
    theory_plots.plot_bounds(folder / "bounds.svg")
    theory_plots.plot_consistency(folder / "consistency.svg")
    theory_plots.plot_limits(folder / "limits.svg")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    body = markdown(settings, trials)
    figures = (
        "![error of W against batches, six streams](stability/errors.svg)\n\n"
        "![drift against the error of W](stability/health.svg)\n"
    )
    page.write_text(f"{before}{BEGIN}\n{body}\n{figures}\n{_machine(settings)}\n{END}{after}", encoding="utf-8")


def _machine(settings: dict[str, Any]) -> str:
    found = settings["environment"]
    return (
        f"Measured on {found['platform']}, Python {found['python']}, torch {found['packages']['torch']}, "
        f"{found['threads']} thread."
    )


def _errors(trials: Sequence[Trial], bold: bool = False) -> tuple[list[str], list[list[str]]]:
    steps = list(dict.fromkeys(trial.step for trial in trials))
    found = {(trial.stream, trial.step): trial for trial in trials}
    rows = []
    for stream in dict.fromkeys(trial.stream for trial in trials):
        cells = [found.get((stream, step)) for step in steps]
        rows.append([stream, *("" if trial is None else _cell(trial, bold) for trial in cells)])
    return ["stream", *steps], rows


def _cell(trial: Trial, bold: bool) -> str:
    if trial.ended_at is not None:
        marks = ("†", "refused ") if trial.failed_at is None else ("‡", "error ")
        at = f"{marks[0] if bold else marks[1]}{trial.ended_at}"
        if trial.broke_at is None:
            return at
        return (
            f"**{trial.worst:.0e}** @{trial.broke_at}, {at}" if bold else f"{trial.worst:.0e} @{trial.broke_at}, {at}"
        )
    text = f"{trial.worst:.0e}"
    if trial.broke_at is None:
        return text
    return f"**{text}** @{trial.broke_at}" if bold else f"{text} @{trial.broke_at}"


def _health(trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    header = ["form", "streams", "W passed 1e-2", "said before", "said too late", "held at 1e-4", "false alarms"]
    rows = []
    for step in dict.fromkeys(trial.step for trial in trials):
        every = [trial for trial in trials if trial.step == step]
        own = [trial for trial in every if trial.points]
        if not own and any(trial.failed_at is not None for trial in every):  # a step that never came to be looked at
            rows.append([step, f"0 of {len(every)}", *["-"] * (len(header) - 2)])
            continue
        if not any(point.status is not None for trial in own for point in trial.points):
            continue
        broke = [trial for trial in own if trial.broke_at is not None]
        healthy = [trial for trial in own if trial.worst <= 1e-4 and trial.ended_at is None]
        late = [trial.stream for trial in broke if not trial.warned_in_time]
        false = [trial.stream for trial in own if trial.false_alarm]
        rows.append(
            [
                step,
                str(len(own)) if len(own) == len(every) else f"{len(own)} of {len(every)}",
                str(len(broke)),
                str(len(broke) - len(late)),
                _listed(late),
                str(len(healthy)),
                _listed(false),
            ]
        )
    return header, rows


def _listed(names: Sequence[str]) -> str:
    return "0" if not names else f"{len(names)} ({', '.join(names)})"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(header, rows, align="l" * len(header))
