"""Writes what an evaluation found: results.json, tables, figures, and one HTML page that shows all of it."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..paths import atomic_write_text
from .figures import FIGURES, draw
from .records import Folder, RunRecord
from .tables import Table, batches_csv, means_csv, scores_csv, tables

__all__ = ["write_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.9rem; } .wide { overflow-x: auto; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td { font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 0.8rem; }
.note { color: #a33; }
"""


def write_report(folder: Folder) -> list[str]:
    """Write results.json, results.md, scores.csv, means.csv, batches.csv, the figures and index.html from the records.

    Returns:
        Names of the files.

    Raises:
        ValueError: no evaluation is in the folder, or none of its runs has begun.
    """
    records = folder.runs()
    if not records:
        raise ValueError(f"{folder.path}: no run has begun")
    head, found = folder.plan(), tables(records)
    files = {
        "results.json": json.dumps(folder.results(), indent=1, ensure_ascii=False) + "\n",
        "results.md": _markdown(head, records, found),
        "scores.csv": scores_csv(records),
        "means.csv": means_csv(records),
        "batches.csv": batches_csv(records),
    }
    for name, text in files.items():
        atomic_write_text(folder.path / name, text)
    pictures = []
    for name in FIGURES:
        if draw(name, records, folder.path / f"{name}.svg"):
            draw(name, records, folder.path / f"{name}.png")
            pictures.append(name)
    drawings = {name: (folder.path / f"{name}.svg").read_text(encoding="utf-8") for name in pictures}
    atomic_write_text(folder.path / "index.html", _html(head, records, found, drawings))
    return ["index.html", *files, *(f"{name}.{kind}" for name in pictures for kind in ("svg", "png"))]


def _title(plan: Mapping[str, Any]) -> str:
    return f"{plan['model'].rstrip('/').split('/')[-1]}: {', '.join(plan['methods'])}"


def _caption(head: Mapping[str, Any], records: Sequence[RunRecord]) -> str:
    plan, where = head["plan"], head["environment"]
    written = max((run.batches[-1]["facts"] for run in records if run.batches), default=0)
    packages = ", ".join(f"{name} {version}" for name, version in where.get("packages", {}).items() if version)
    return (
        f"{written} facts of {plan['facts']} in batches of {plan['batch']}; seeds {plan['seeds']}, orders "
        f"{plan['orders']}, conflicts {plan['conflicts']}. {where.get('platform')}, {where.get('threads')} threads; "
        f"{packages}."
    )


def _notes(records: Sequence[RunRecord]) -> list[str]:
    notes = [f"{run.spec.name} stopped: {run.error}" for run in records if run.error]
    return notes + [f"{run.spec.name} has not come to its end" for run in records if not run.complete and not run.error]


def _markdown(head: Mapping[str, Any], records: Sequence[RunRecord], found: Sequence[Table]) -> str:
    parts = [f"# {_title(head['plan'])}", "", _caption(head, records), ""]
    parts += [f"- {note}" for note in _notes(records)]
    return "\n".join(parts) + "\n" + "\n".join(table.markdown() for table in found)


def _html(
    head: Mapping[str, Any], records: Sequence[RunRecord], found: Sequence[Table], drawings: Mapping[str, str]
) -> str:
    parts = [f"<h1>{html.escape(_title(head['plan']))}</h1>", f"<p>{html.escape(_caption(head, records))}</p>"]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in _notes(records)]
    for table in found:
        parts += [f"<h2>{html.escape(table.title)}</h2>", f"<p>{html.escape(table.about)}</p>", _table(table)]
    for name, drawing in drawings.items():
        parts += [f"<h2>{name.capitalize()}</h2>", drawing[drawing.index("<svg") :]]
    plan = json.dumps(head["plan"], indent=1, ensure_ascii=False)
    configs = json.dumps({run.spec.name: run.config for run in records}, indent=1)
    parts += [
        f"<h2>Plan</h2><pre>{html.escape(plan)}</pre>",
        f"<h2>Configurations</h2><pre>{html.escape(configs)}</pre>",
    ]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(_title(head["plan"]))}'
        f"</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
