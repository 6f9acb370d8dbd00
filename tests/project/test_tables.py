"""Tables of the pages are those of the results that are committed beside them."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
from support.markdown import tables

from rlsedit.evaluation import Folder
from rlsedit.evaluation.page import write_report
from rlsedit.report import stability
from rlsedit_kernels.diagnostics import load

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


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


MARKDOWN = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part[0] == "." or part == "build" for part in path.relative_to(ROOT).parts)
)


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_row_of_a_table_has_the_cells_of_its_header(path: Path) -> None:
    tables(path.read_text(encoding="utf-8"))


def test_a_bar_in_a_cell_is_noticed() -> None:
    with pytest.raises(AssertionError, match="cells below"):
        tables("| | |W| |\n|---|---|\n| a | 1 |\n")
    assert tables("| | \\|W\\| |\n|---|---|\n| a | 1 |\n") == [[["", "\\|W\\|"], ["a", "1"]]]


@pytest.mark.parametrize("folder", sorted(path.parent for path in RESULTS.glob("*/plan.json")), ids=lambda p: p.name)
def test_a_committed_evaluation_is_that_of_its_runs(folder: Path, tmp_path: Path) -> None:
    """Tables and CSV files; figures differ by the version of matplotlib."""
    shutil.copytree(folder, tmp_path / "copy")
    write_report(Folder(tmp_path / "copy"))
    for file in folder.iterdir():
        if file.suffix in (".md", ".csv"):
            assert file.read_text(encoding="utf-8") == (tmp_path / "copy" / file.name).read_text(encoding="utf-8"), (
                f"{file.name}: run: rlsedit evaluate --from"
            )


def test_the_tables_of_stability_are_those_of_its_results() -> None:
    """Written by `rlsedit stability --page`."""
    assert stability.markdown(*load(stability.RESULTS)) in stability.PAGE.read_text(encoding="utf-8")


def test_a_ratio_stands_with_what_it_is_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever divides a time by what its ratio is said to be of gets the ratio."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    readme = importlib.import_module("readme")
    result = json.loads((RESULTS / readme.SHAPES[-1]).read_text(encoding="utf-8"))
    text = readme.shapes(result)
    (table,) = tables(text)
    shown = _seconds(table[1][1].split(" (")[0])
    seen = 0
    for row in table[1:]:
        time, _, inside = row[1].removesuffix(")").partition(" (")
        ratio, _, beside = inside.partition(";")[0].partition(" × ")
        seen += bool(beside)
        assert _seconds(time) / float(ratio) == pytest.approx(_seconds(beside) if beside else shown, rel=0.03), row
    assert seen > 5
    example = re.search(r"behind the ratio: .*?: (\S+ m?s) = \S+ × \S+ m?s, and (\d+) times the (\S+ m?s) that", text)
    assert example is not None
    assert example[3] == table[1][1].split(" (")[0]
    assert int(example[2]) == pytest.approx(_seconds(example[1]) / shown, abs=0.6)


def _seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) / {"ms": 1000.0, "s": 1.0}[unit]
