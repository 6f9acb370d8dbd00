"""Where a model on disk comes from: kept through removals and more facts; and folders in which no model is yet."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import language_models as lm
from support.editors import facts

from rlsedit.cli import main
from rlsedit.export import load_delta
from rlsedit.facts import save_facts
from rlsedit.store.origin import origin_of

SMALL = [*lm.SMALL_EDITS, "--no-evaluate", "--batch", "2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin")
    lm.on_disk(folder)
    save_facts(facts(4), folder / "facts.jsonl")
    save_facts(facts(1, 4), folder / "more.jsonl")
    return folder


@pytest.fixture(autouse=True)
def here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are given relative paths, as a user would."""
    monkeypatch.setenv("RLSEDIT_CACHE", str(root / "cache"))
    monkeypatch.chdir(root)


def edit(out: Path, *more: str) -> list[str]:
    return ["edit", "llama", "--facts", "facts.jsonl", "--out", str(out), "--text", "text.txt", *SMALL, *more]


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "rlsedit-report.json").read_text(encoding="utf-8"))
    return found


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    for word in words:
        assert word in error


def test_export_finds_the_base_from_anywhere(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(edit(out)) == 0
    monkeypatch.chdir(tmp_path)
    for to, name in (("delta", "d"), ("hf", "hf"), ("lora", "lora")):
        assert main(["export", "out", "--to", to, "--out", name]) == 0
    assert load_delta(tmp_path / "d").base == "llama"
    fails(capsys, ["export", "out", "--to", "hf", "--out", str(root / "llama"), "--force"], "the model itself")
    # a model that was copied without its edits
    shutil.copytree(out, tmp_path / "copy", ignore=lambda folder, _: ["rlsedit"] if folder == str(out) else [])
    assert main(["export", "copy", "--to", "delta", "--out", "e"]) == 0
    told = report(tmp_path / "copy")
    (tmp_path / "copy" / "rlsedit-report.json").write_text(json.dumps({**told, "base": str(tmp_path / "gone")}))
    fails(capsys, ["export", "copy", "--to", "delta", "--out", "f"], "--base: needed", "gone, which is not there")


@pytest.mark.parametrize("earlier", [False, True])
def test_what_it_comes_from_is_kept(
    root: Path, tmp_path: Path, earlier: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through removals and more facts; a folder of an earlier version still has the path of its model."""
    out, first = tmp_path / "out", edit(tmp_path / "out")
    first[1] = str(root / "llama") if earlier else "llama"
    assert main(first) == 0
    if earlier:
        (out / "rlsedit" / "origin.json").unlink()
        old = {**report(out), "facts": {"file": "facts.jsonl", "written": 4}}
        del old["base"]
        (out / "rlsedit-report.json").write_text(json.dumps(old))
    assert main(["remove", str(out), "f3", "--device", "cpu"]) == 0
    found = report(out)
    assert (found["model"], found["base"], found["text"]) == ("llama", str(root / "llama"), "text.txt")
    assert found["facts"] == {"file": "facts.jsonl", "files": ["facts.jsonl"], "written": 3}
    assert main(["edit", str(out), "--facts", "more.jsonl", "--out", str(out), "--resume", "--no-evaluate",
                 "--device", "cpu"]) == 0  # fmt: skip
    found = report(out)
    assert (found["model"], found["base"], found["text"]) == ("llama", str(root / "llama"), "text.txt")
    assert found["facts"] == {"file": "more.jsonl", "files": ["facts.jsonl", "more.jsonl"], "written": 4}
    assert main(["export", str(out), "--to", "delta", "--out", str(tmp_path / "d")]) == 0
    assert main(["log", str(out), "--check"]) == 0


def test_a_relative_path_of_an_earlier_version_is_not_taken_for_a_model_here(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(edit(out)) == 0
    (out / "rlsedit" / "origin.json").unlink()
    (out / "rlsedit-report.json").unlink()
    assert (Path.cwd() / "llama" / "config.json").is_file()
    assert origin_of(out).base is None


@pytest.mark.parametrize("by", ["a stream", "a removal"])
def test_who_names_the_model_tells_the_base_where_the_folder_does_not(
    root: Path, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of an earlier version, begun by a relative path; nothing new arrives."""
    out = tmp_path / "out"
    assert main(edit(out)) == 0
    (out / "rlsedit" / "origin.json").unlink()
    told = report(out)
    del told["base"], told["facts"]["files"]
    (out / "rlsedit-report.json").write_text(json.dumps(told), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    more = ["--device", "cpu", "--no-evaluate", "--resume"]
    if by == "a stream":
        assert main(["edit", "llama", "--facts", "-", "--out", str(out), *more]) == 0
    else:
        assert main(["remove", str(out), "f0", "--base", "llama", "--device", "cpu"]) == 0
    assert report(out)["base"] == str(root / "llama")


def test_a_folder_without_a_model_yet_is_told_the_same_everywhere(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlsedit.editor import Editor

    batch, calls = Editor._batch, []

    def interrupted(self: Editor, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return batch(self, *args)

    out, cut = tmp_path / "out", str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Editor, "_batch", interrupted)
        assert main(edit(out)) == 130
    capsys.readouterr()
    words = f"{cut}: no model in the folder yet: `rlsedit edit MODEL --facts FILE --out {cut} --resume` puts it there"
    known, text = ["--facts", "facts.jsonl", "--device", "cpu"], tmp_path / "known.json"
    text.write_text('[{"prompt": "Oslo is in", "attribute": "Norway"}]')
    for command in (
        ["export", cut, "--base", "llama", "--to", "delta", "--out", str(tmp_path / "d")],
        ["export", cut, "--to", "delta", "--out", str(tmp_path / "d")],
        ["export", "llama", "--base", cut, "--to", "delta", "--out", str(tmp_path / "d")],
        ["evaluate", cut, *known],
        ["edit", cut, *known, "--out", cut, "--resume"],
        ["edit", cut, *known, "--out", str(tmp_path / "other")],
        ["ability", cut, "--task", f"known={text}"],
        ["stats", cut, "--text", "text.txt"],
        ["remove", cut, "f0"],
    ):
        fails(capsys, command, words)
    assert main(["log", cut, "f0"]) == 0
    assert words in capsys.readouterr().out
    # and it does put it there, with the text that the first run was given
    assert main(["edit", "llama", *known, "--out", cut, "--resume", "--no-evaluate"]) == 0
    assert report(out)["text"] == "text.txt"
    assert main(["export", cut, "--to", "delta", "--out", str(tmp_path / "d")]) == 0
