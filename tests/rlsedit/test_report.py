"""Tables, bars, plots and paths: what a user sees, on a terminal and in a file."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from rlsedit.metrics import Estimate, EvalReport
from rlsedit.metrics.counterfact import METRICS, PORTABILITY
from rlsedit.paths import atomic_directory, atomic_write_text, cache_dir
from rlsedit.report import Console, estimate, markdown_table, seconds, table
from rlsedit.report.plots import plot_objective
from rlsedit.report.scores import finite, score_table
from rlsedit.reports import BatchReport
from rlsedit.texts import installed_prose, paragraphs, read_text


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Pipe(io.StringIO):
    encoding = "ascii"


def test_columns_line_up_whatever_the_script() -> None:
    lines = table(("name", "value"), [("é", "1"), ("東京", "22"), ("two\nlines\x07", "333")]).splitlines()
    assert lines[0] == "name       value"
    assert lines[2] == "é              1"
    assert lines[3] == "東京          22", "wide characters take two columns"
    assert lines[4] == "two lines    333"
    assert table(("a",), [("123456789",)], limit=6).splitlines()[2] == "123..."
    with pytest.raises(ValueError, match="must have 2 columns"):
        table(("a", "b"), [("1",)])


def test_a_bar_in_a_cell_is_no_border_in_markdown() -> None:
    text = markdown_table(("", "|W|"), [("a|b", "two\nlines")])
    assert text == "|  | \\|W\\| |\n|---|---:|\n| a\\|b | two lines |"
    assert markdown_table(("a", "b"), [], align="ll").endswith("|---|---|")
    with pytest.raises(ValueError, match="must have 2 columns"):
        markdown_table(("a", "b"), [("1",)])


@pytest.mark.parametrize(
    ("value", "text"), [(12.345, "12.35 s"), (1.0, "1.00 s"), (0.01234, "12.3 ms"), (2e-5, "20 us"), (0.0, "0 us")]
)
def test_times(value: float, text: str) -> None:
    assert seconds(value) == text


def test_estimates() -> None:
    assert estimate(0.933, 0.0321) == "93.3 ± 3.2"
    assert estimate(0.5, math.nan) == "50.0"
    assert estimate(math.nan, math.nan) == "n/a"


def test_a_pipe_gets_whole_ascii_lines_and_a_terminal_gets_a_bar() -> None:
    outputs = []
    for stream in (Pipe(), Terminal()):
        console = Console(stream)
        console.heading("Täble ± 1")
        with console.bar("work", 10) as bar:
            for step in range(11):
                bar.update(step, "now")
            bar.finish("done → well")
        with console.bar("unknown", None) as bar:
            bar.update(1)
        outputs.append(stream.getvalue())
        assert console.transcript() == "".join(f"{line}\n" for line in console.lines)
    piped, shown = outputs
    assert piped.isascii()
    assert all(c == "\n" or c.isprintable() for c in piped)
    assert "work: done -> well\n" in piped
    assert piped.count("work") == 1
    assert "█" in shown
    assert "100 %" in shown
    assert "unknown ..." in shown
    assert "work: done → well\n" in shown


def test_a_bar_that_fails_leaves_no_line() -> None:
    stream = Pipe()
    with pytest.raises(RuntimeError), Console(stream).bar("work", 3):
        raise RuntimeError
    assert stream.getvalue() == ""


def test_score_table_and_json() -> None:
    none = Estimate(math.nan, math.nan, 0)
    summary = {name: none if "portability" in name else Estimate(0.5, 0.1, 4) for name in METRICS}
    summary["paraphrase_accuracy"] = none
    summary["score"] = Estimate(0.25, 0.0, 4)
    report = EvalReport([], summary)
    text = score_table({"before": report, "after": report})
    assert "25.0 ± 0.0" in text
    assert text.count("n/a") == 2
    assert text.count("tokens") == 3  # zsRE's accuracy
    assert "portability" not in text
    asked = EvalReport([], {**summary, **{name: Estimate(0.125, 0.01, 4) for name in PORTABILITY}})
    text = score_table({"before": report, "after": asked})
    assert [line.split()[-3:] for line in text.splitlines() if line.startswith("portability")] == [
        ["12.5", "±", "1.0"]
    ] * 3
    plain = finite({"a": summary["paraphrase_accuracy"], "b": (1, math.inf, "x")})
    assert plain == {"a": {"mean": None, "stderr": None, "count": 0, "low": None, "high": None}, "b": [1, None, "x"]}
    json.dumps(plain, allow_nan=False)


def test_plot_is_a_picture_of_all_runs(tmp_path: Path) -> None:
    def batch(i: int) -> BatchReport:
        return BatchReport((str(i),), {}, 10.0**i, 1.0 + i, 2.0, None, None, 0.0, 1.0)

    plot_objective({"one": [batch(i) for i in range(4)], "two": [batch(0)]}, tmp_path / "p.png", "title")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="at least one batch"):
        plot_objective({}, tmp_path / "q.png")


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path))
    assert cache_dir("a", "b") == tmp_path / "a" / "b"
    monkeypatch.delenv("RLSEDIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir("a") == tmp_path / "rlsedit" / "a"
    assert list(tmp_path.iterdir()) == [], "asking makes nothing"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target) as work:
        (work / "a").write_text("new")
        assert not target.exists()
    assert (target / "a").read_text() == "new"

    def fails_halfway() -> None:
        with atomic_directory(target, replace=True) as work:
            (work / "a").write_text("broken")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails_halfway()
    assert (target / "a").read_text() == "new"
    with atomic_directory(target, replace=True) as work:
        (work / "b").write_text("newer")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing is left behind"


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "f", "é")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(tmp_path / "f", "\ud800")
    assert (tmp_path / "f").read_text(encoding="utf-8") == "é"
    assert len(list(tmp_path.iterdir())) == 1


def test_prose() -> None:
    code = "for i in range(10): x[i] = {i: i ** 2} # " * 9 + "."
    prose = "A paragraph of plain words that goes on for a while and ends as a sentence does. " * 4
    assert list(paragraphs(f"{code}\n\nshort.\n\n{prose}\n")) == [prose.strip()]
    found = installed_prose(2000)
    assert found == installed_prose(2000)
    assert found != installed_prose(2000, seed=1)
    assert len(set(found)) == len(found)
    assert 8_000 < sum(map(len, found)) < 14_000


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\ntwo\n \nthree\n", encoding="utf-8")
    assert read_text(tmp_path / "t.txt") == ["one\ntwo", "three"]
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(tmp_path / "bad.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="no text"):
        read_text(tmp_path / "empty.txt")


def test_a_bar_on_a_terminal_without_unicode() -> None:
    """The name of a folder may be in its label."""

    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    stream = Terminal(io.BytesIO(), encoding="ascii")
    with Console(stream).bar("loading modèle", None):
        pass
    stream.seek(0)
    assert "loading mod?le ..." in stream.read()
