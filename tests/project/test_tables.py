"""Tables of the pages are those of the results that are committed beside them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_no_table_differs_from_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    readme = importlib.import_module("readme")
    stale = [path.name for path, text in readme.pages().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run: python bench/readme.py"


def test_a_page_without_the_markers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    readme = importlib.import_module("readme")
    with pytest.raises(ValueError, match="no markers for 'update'"):
        readme.fill("<!-- begin updates -->\n<!-- end update -->", "update", "body")
