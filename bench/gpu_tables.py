"""What was predicted for a GPU, beside what bench/gpu.py measured there: the tables of docs/cuda.md and docs/triton.md.

A prediction is written down before the run that tests it and stays when it turns out wrong: what changes is the column
beside it. The reasoning behind each is in the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]

Span = tuple[float, float]


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of a comparison of bench/gpu.py on an H200, from and to, by entry; `shape` as its rows have it."""

    what: str
    shape: dict[str, int]
    spans: dict[str, Span]
    label: str = ""

    def text(self, name: str) -> str:
        sizes = ", ".join(f"{key} = {value}" for key, value in self.shape.items())
        own = f", {name.partition(', ')[2]}" if "," in name else ""
        return (self.label or f"`{self.what}`") + f", {sizes}{own}"


WHOLE = "update of state and weight"
PREDICTIONS = (
    Prediction(
        WHOLE, {"u": 100}, {"cuda": (1.2, 1.4), "cuda, wgmma": (1.0, 1.15), "triton": (1.5, 1.7)}, "state and weight"
    ),
    Prediction("gain_products", {"u": 100}, {"cuda": (0.5, 0.55), "cuda, wgmma": (0.35, 0.4)}),
    Prediction("gain_solve", {"u": 100}, {"cuda": (0.03, 0.04), "triton": (0.05, 0.06)}),
    Prediction("key_products", {"u": 100}, {"cuda": (0.16, 0.17), "cuda, wgmma": (0.1, 0.11)}),
    Prediction("weight_update_", {"u": 100}, {"cuda": (0.3, 0.3), "cuda, wgmma": (0.24, 0.24)}),
    Prediction("downdate_", {"u": 100}, {"cuda": (0.33, 0.4)}),
    Prediction(WHOLE, {"u": 1}, {"cuda": (0.8, 0.85)}, "state and weight"),
    Prediction("downdate_gain_products_", {"u": 1}, {"cuda": (0.45, 0.45)}),
    Prediction("cholesky", {"count": 5, "u": 128}, {"cuda": (0.015, 0.015)}),
    Prediction("cholesky", {"count": 5, "u": 256}, {"cuda": (0.032, 0.04)}),
    Prediction("qr_append_", {"u": 100}, {"cuda": (5.0, 5.0), "triton": (6.5, 7.4)}),
    Prediction("qr_gain", {"u": 100}, {"cuda": (1.5, 2.0), "triton": (2.5, 2.5)}),
)


def _row(result: Result | None, what: str, shape: dict[str, int], name: str) -> Result | None:
    for row in (result or {}).get("rows", ()):
        if row["what"] == what and row["name"] == name and all(row.get(k) == v for k, v in shape.items()):
            return dict(row)
    return None


def _number(value: float) -> str:
    return f"{value:.3g}"


def _span(span: Span) -> str:
    return _number(span[0]) if span[0] == span[1] else f"{_number(span[0])} to {_number(span[1])}"


def _measured(row: Result | None) -> str:
    if row is None:
        return ""
    if "median_ms" not in row:
        return f"failed: {row['failed']}"
    return f"{_number(row['median_ms'])} ({_number(row['p20_ms'])} to {_number(row['p80_ms'])})"


def _error(row: Result | None) -> str:
    return f"{row['error']:.1e}" if row is not None and "error" in row else ""


RIVALS = ("plain torch Woodbury", "plain torch", "torch.linalg.cholesky_ex", "torch.linalg.qr of the stack", "torch")
"""What stands in the column of torch, the first that a comparison has."""


def comparison(result: Result | None, backend: str) -> str:
    """A row a prediction: predicted, floor, measured with its spread, torch beside it, and both errors."""
    if result is None:
        return "Not measured yet: no GPU was at hand."
    settings = result["settings"]
    head = f"{settings['gpu']}, torch {result['machine']['torch']}, commit {result['machine']['commit']}"
    head += f", d = {settings['d']}, v = {settings['v']}. Median and, in brackets, from 20 % to 80 % of the calls."
    if not settings.get("finished", True):
        head += " The run did not come to its end."
    lines = [head, "", "| ms | predicted | measured | floor | torch | error | of torch |", "|---" * 7 + "|"]
    for prediction, name in ((p, name) for p in PREDICTIONS for name in p.spans if name.startswith(backend)):
        row = _row(result, prediction.what, prediction.shape, name)
        rivals = (_row(result, prediction.what, prediction.shape, rival) for rival in RIVALS)
        rival = next((found for found in rivals if found is not None), None)
        least = row.get("floor_ms") if row is not None else None
        cells = [
            prediction.text(name),
            _span(prediction.spans[name]),
            _measured(row),
            "" if least is None else _number(least),
        ]
        cells += [_measured(rival), _error(row), _error(rival)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def targets(result: Result | None) -> str:
    """Figures to reach, as the run judged them."""
    rows = [row for row in (result or {}).get("rows", ()) if row["what"] == "target"]
    if not rows:
        return ""
    lines = ["", "| target | wanted | measured | |", "|---|---|---|---|"]
    for row in rows:
        verdict = {None: "not measured", True: "reached", False: "**missed**"}[row["met"]]
        got = "" if row["measured"] is None else _number(row["measured"])
        lines.append(f"| {row['name']} | {_number(row['wanted'])} | {got} | {verdict} |")
    return "\n".join(lines)
