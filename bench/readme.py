"""Write the tables of README.md, between their markers, from the results under bench/results/: nothing is typed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Result = dict[str, Any]


def device(result: Result) -> str:
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}"


def update(result: Result) -> str:
    """Time of a whole batch, with ratios and errors."""
    settings, rows = result["settings"], {row["variant"]: row for row in result["rows"]}
    base = rows["RLSFilter, no bounds"]["median_ms"]
    lines = [
        f"One whole batch, state and weight: d = {settings['d']}, u = {settings['u']}, v = {settings['v']}, "
        f"{settings['dtype']}, {settings['prior']} ({device(result)}).",
        "",
        "| | median ms | p20 to p80 | relative to RLSFilter | error of W against float64 |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['median_ms']:.0f} | {row['p20_ms']:.0f} to {row['p80_ms']:.0f} "
            f"| {row['median_ms'] / base:.1f} | {row['error_W']:.1e} |"
        )
    return "\n".join(lines)


def stream(result: Result) -> str:
    """Cost over a stream."""
    lines = [
        "",
        "Cost over a stream of the same size: time of a batch late in the stream over early, and the peak of memory "
        "above the state during an update.",
        "",
        "| form | batches written | median ms | late over early | peak above the state |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['form']} | {row['batches']} | {row['median_ms']:.0f} | {row['ratio_to_early']:.2f} "
            f"| {row['peak_extra_percent']:.1f} % |"
        )
    return "\n".join(lines)


SECTIONS: dict[str, tuple[tuple[str, Callable[[Result], str]], ...]] = {
    "update": (("update.json", update), ("stream.json", stream)),
}


def fill(text: str, name: str, body: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no markers for {name!r}")
    return pattern.sub(lambda match: f"{match[1]}{body}\n{match[2]}", text)


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    for name, parts in SECTIONS.items():
        bodies = [make(json.loads((RESULTS / file).read_text(encoding="utf-8"))) for file, make in parts]
        text = fill(text, name, "\n".join(bodies))
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
