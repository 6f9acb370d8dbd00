"""What was at --out: put aside and brought back, replaced behind a link, left as it was where nothing was written."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import edit
from support.editors import facts

from rlsedit.cli import main
from rlsedit.facts import save_facts

pytestmark = pytest.mark.usefixtures("cache")
FAILING = ["--set", "lr=1e200"]


@pytest.fixture
def two(root: Path) -> Path:
    save_facts(facts(2), root / "two.jsonl")
    return root / "two.jsonl"


def test_an_empty_folder_is_empty_again_where_no_edit_was_written(
    root: Path, two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise the next run would have to go on with hyper-parameters that have failed."""
    out = tmp_path / "out"
    out.mkdir()
    assert main(edit(root, two, out, *FAILING)) == 2
    assert "the loss must be finite" in capsys.readouterr().err
    assert not list(out.iterdir())
    assert main(edit(root, two, out)) == 0


def test_behind_a_link_the_folder_is_replaced(root: Path, two: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("old")
    (tmp_path / "link").symlink_to("real")
    assert main(edit(root, two, tmp_path / "link", "--force")) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()
    assert not (tmp_path / "real" / "old").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}
    command = ["export", str(tmp_path / "real"), "--to", "hf", "--out", str(tmp_path / "hub"), "--force"]
    (tmp_path / "files").mkdir()
    (tmp_path / "hub").symlink_to("files")
    assert main(command) == 0
    assert main(command) == 0
    assert (tmp_path / "hub").is_symlink()
    assert (tmp_path / "files" / "config.json").is_file()


def test_what_a_killed_run_has_put_aside_is_named(
    root: Path, two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aside = tmp_path / ".out.replaced-1"
    aside.mkdir()
    (aside / "old").write_text("old")
    assert main(edit(root, two, tmp_path / "out", "--force")) == 0
    assert f"is {aside}" in capsys.readouterr().err
    assert (aside / "old").read_text() == "old"
