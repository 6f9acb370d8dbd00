"""bench/gpu_tables.py: what was predicted stands beside what a run of bench/gpu.py measured."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu_tables")


def row(what: str, name: str, median: float, **more: object) -> dict[str, object]:
    return {"what": what, "name": name, "median_ms": median, "p20_ms": 0.9 * median, "p80_ms": 1.1 * median, **more}


def result(*rows: dict[str, object]) -> dict[str, Any]:
    return {
        "machine": {"torch": "2.11.0", "commit": "abc"},
        "settings": {"gpu": "a GPU", "d": 14336, "v": 4096},
        "rows": list(rows),
    }


def test_measured_beside_predicted(tables) -> None:
    given = result(
        row("qr_append_", "cuda", 6.25, u=100, error=1.25e-7, floor_ms=0.333),
        row("qr_append_", "triton", 10.0, u=100),
        row("qr_append_", "cuda", 1.0, u=1),
        row("qr_append_", "torch.linalg.qr of the stack", 250.0, u=100, error=2e-7),
        {"what": "qr_gain", "name": "cuda", "u": 100, "failed": "RuntimeError: no"},
    )
    lines = tables.comparison(given, "cuda").splitlines()
    assert lines[0].startswith("a GPU, torch 2.11.0, commit abc, d = 14336, v = 4096.")
    assert "| `qr_append_`, u = 100 | 5 | 6.25 (5.62 to 6.88) | 0.333 | 250 (225 to 275) | 1.2e-07 | 2.0e-07 |" in lines
    assert any(line.startswith("| `qr_gain`, u = 100 | 1.5 to 2 | failed: RuntimeError: no |") for line in lines)
    assert "| `qr_append_`, u = 100 | 6.5 to 7.4 | 10 (9 to 11) |" in tables.comparison(given, "triton")


def test_targets_reached_missed_and_not_measured(tables) -> None:
    given = result(
        {"what": "target", "name": "ms", "wanted": 1.3, "measured": 1.25, "met": True},
        {"what": "target", "name": "times", "wanted": 100.0, "measured": 87.5, "met": False},
        {"what": "target", "name": "other", "wanted": 3.0, "measured": None, "met": None},
    )
    text = tables.targets(given)
    assert "| ms | 1.3 | 1.25 | reached |" in text
    assert "| times | 100 | 87.5 | **missed** |" in text
    assert "| other | 3 |  | not measured |" in text


def test_without_a_run_the_page_says_so(tables) -> None:
    assert tables.comparison(None, "cuda") == "Not measured yet: no GPU was at hand."
    assert tables.targets(None) == ""


def test_every_prediction_names_a_comparison_of_the_benchmark(tables) -> None:
    source = (BENCH / "gpu_cases.py").read_text(encoding="utf-8")
    for prediction in tables.PREDICTIONS:
        assert f'"{prediction.what}"' in source
        assert all(name in ("cuda", "cuda, wgmma", "triton") for name in prediction.spans)
