"""Shared by the benchmarks: timing in turns, summaries, the machine, and results as JSON of one schema."""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlsedit_kernels import profile

SCHEMA = "rlsedit-bench/1"
ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """Device, versions, threads and commit: what a figure means nothing without."""
    return {**profile.machine(), "commit": _commit()}


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git here: a result of minutes is not lost for it
        return "unknown"
    return done.stdout.strip() or "unknown"


def in_turns(
    functions: Mapping[str, Callable[[int], object]], repetitions: Mapping[str, int]
) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns, so that a drifting machine favours none.

    Before that each is called twice, uncounted, or once where it has fewer than three repetitions.

    Args:
        functions: by name; called with the number of the repetition.
        repetitions: by name; slow ones may have fewer, spread evenly over the rounds.
    """
    rounds = max(repetitions.values())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():
        for i in range(2 if repetitions[name] >= 3 else 1):
            function(-1 - i)
    for i in range(rounds):
        for name, function in functions.items():
            if (i + 1) * repetitions[name] // rounds > i * repetitions[name] // rounds:
                begin = time.perf_counter()
                function(i)
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def summary(seconds: list[float]) -> dict[str, float | int]:
    """Median and spread, in milliseconds."""
    found = profile.Times.of([1e3 * s for s in seconds])
    return {"p20_ms": found.p20, "median_ms": found.median, "p80_ms": found.p80, "repetitions": found.repetitions}


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with --json, which every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the result there")
    return parser


def result_of(name: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written as JSON."""
    return {"schema": SCHEMA, "benchmark": name, "machine": machine(), "settings": settings, "rows": rows}


def write(result: dict[str, Any], target: Path) -> None:
    """A result as a file, which is there whole or as it was before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.new")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    beside.replace(target)


def report(name: str, settings: dict[str, Any], rows: list[dict[str, Any]], target: Path | None) -> None:
    """Print the rows, without what is nested in them, and write the result where asked."""
    columns = list(dict.fromkeys(k for row in rows for k, value in row.items() if not isinstance(value, (dict, list))))
    print("  ".join(f"{column:>18}" for column in columns))
    for row in rows:
        print("  ".join(f"{_text(row.get(column)):>18}" for column in columns))
    if target is not None:
        write(result_of(name, settings, rows), target)
        print(f"written to {target}")


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value if value is not None else "-")
