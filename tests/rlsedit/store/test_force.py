"""The folder of a run: what was there before, what stays where nothing was written, and who else writes to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.commands import edit, same
from support.editors import editor, facts

import rlsedit.cli.edit as commands
from rlsedit.cli import main
from rlsedit.facts import save_facts
from rlsedit.store.check import problems
from rlsedit.store.errors import StoreError
from rlsedit.store.files import Disk

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


def test_the_folder_of_a_process_that_was_first_stays(
    root: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two that begin at the same time: the second is refused, and clears nothing of the first."""
    out, first, real = tmp_path / "out", editor(), commands._editor

    def late(*args: Any) -> Any:
        first.save(out)
        return real(*args)

    monkeypatch.setattr(commands, "_editor", late)
    assert main(edit(root, two, out)) == 2
    assert "holds edits already" in capsys.readouterr().err
    first.edit(facts(2))
    first.close()
    assert problems(out) == []


def test_a_folder_that_appears_while_one_is_made(tmp_path: Path) -> None:
    class Late(Disk):
        def rename(self, old: Path, new: Path) -> None:
            if new.name == "rlsedit":
                (new / "records").mkdir(parents=True)
            super().rename(old, new)

    with pytest.raises(StoreError, match="out: another process has begun"):
        editor().save(tmp_path / "out", disk=Late())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rlsedit"]


def test_a_resumed_run_has_batches_of_the_size_of_the_first(root: Path, tmp_path: Path) -> None:
    """To the bits of one that was never interrupted, though only that one was told a size."""
    for count in (2, 6):
        save_facts(facts(count), root / f"{count}.jsonl")
    assert main(edit(root, root / "6.jsonl", tmp_path / "whole")) == 0
    assert main(edit(root, root / "2.jsonl", tmp_path / "out")) == 0
    more = ["--out", str(tmp_path / "out"), "--resume", "--no-evaluate", "--device", "cpu"]
    assert main(["edit", str(root / "llama"), "--facts", str(root / "6.jsonl"), *more]) == 0
    assert same(tmp_path / "out", tmp_path / "whole")
