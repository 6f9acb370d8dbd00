"""Places where nothing can be written are refused before any work is done; the cache says how to put it elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from support import language_models as lm
from support.editors import facts

from rlsedit.cli import main
from rlsedit.facts import save_facts
from rlsedit.moments import second_moments
from rlsedit.paths import check_writable
from rlsedit.targets import TargetCache


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inputs, and a file in the place of the folder that results should go to."""
    lm.on_disk(tmp_path)
    (tmp_path / "ability.json").write_text('[{"prompt": "Oslo is in", "attribute": "Norway"}]')
    (tmp_path / "plan.toml").write_text('model = "llama"\nfacts = "facts.jsonl"\nmethods = ["rlsedit"]\n')
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.json").mkdir()
    save_facts(facts(2), tmp_path / "facts.jsonl")
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = [
    "edit llama --facts facts.jsonl --out file/x",
    "edit llama --facts facts.jsonl --out out --record file/x",
    "evaluate llama --facts facts.jsonl --out file/x",
    "evaluate llama --facts facts.jsonl --compare memit --out file/x.md",
    "evaluate --plan plan.toml --out file/x",
    "ability llama --task known=ability.json --out file/x",
    "export llama --base llama --to delta --out file/x",
    "export llama --base llama --to hf --out file/x",
    "facts --limit 3 --out file/x",
    "demo --quick --out file/x",
    "profile --out file/x",
    "profile --out file/x.json",
    "profile --model llama --facts facts.jsonl --out file/x",
    "stability --out file/x",
    "edit llama --facts facts.jsonl --out out --record folder",
    "evaluate llama --facts facts.jsonl --out folder",
    "evaluate llama --facts facts.jsonl --compare memit --out folder",
    "ability llama --task known=ability.json --out folder",
    "facts --limit 3 --out folder --force",
    "profile --out folder.json",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_looks_before_it_works(
    here: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        "rlsedit.models.smollm2.load_model", "rlsedit.export.Checkpoint", "rlsedit_kernels.profile.measure",
        "rlsedit_kernels.diagnostics.run_trials", "rlsedit.facts.world.world_facts",
    ):  # fmt: skip
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("has begun to work"))
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    option = "--record" if "--record" in command else "--out"
    assert f"rlsedit: {option}" in error
    assert error.count("\n") == 1
    assert "file" in error
    assert not list((here / "folder.json").iterdir())
    assert (here / "file").read_text() == "mine"
    assert not (here / "out").exists()
    named = {"folder", "folder.json"}.intersection(command.split())
    assert all(f"{name} is a folder, needs a file" in error for name in named)
    assert not list((here / "folder").iterdir())


SPARED = [
    ("edit all/llama --facts facts.jsonl --out all --force", "--out: all holds all/llama"),
    ("edit llama --facts all/facts.jsonl --out all --force", "--out: all holds all/facts.jsonl"),
    ("edit llama --facts facts.jsonl --text all/text.txt --out all --force", "--out: all holds all/text.txt"),
    ("edit llama --facts link/facts.jsonl --out link --force", "/all holds link/facts.jsonl"),
    ("edit llama --facts facts.jsonl --out out --record facts.jsonl", "--record: facts.jsonl is facts.jsonl"),
    ("export all/llama --base llama --to hf --out all --force", "--out: all holds all/llama"),
    ("export llama --base all/llama --to lora --out all --force", "--out: all holds all/llama"),
    ("export llama --base all/llama --to delta --out all/llama/model.safetensors --force", "is all/llama/model."),
    ("evaluate llama --facts facts.jsonl --out facts.jsonl", "--out: facts.jsonl is facts.jsonl"),
    ("evaluate llama --facts facts.jsonl --compare memit --text text.txt --out text.txt", "--out: text.txt is"),
    ("ability llama --task known=ability.json --out ability.json", "--out: ability.json is ability.json"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "told"), SPARED)
def test_nothing_that_is_read_is_replaced(
    here: Path, command: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The models, facts and text in a folder that --force would replace; a link is followed."""
    shutil.copytree(here, here / "all", ignore=shutil.ignore_patterns("all", "cache"))
    (here / "link").symlink_to("all")
    before = sorted(here.rglob("*"))
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "read here and would be lost" in error
    assert sorted(here.rglob("*")) == before


def test_a_delta_beside_a_model_may_be_replaced(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = lm.tiny("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 1.0
    shutil.copytree(here / "llama", here / "other")
    model.save_pretrained(here / "other")
    command = "export other --base llama --to delta --out other/edits.safetensors"
    assert main(command.split()) == 0
    assert main([*command.split(), "--force"]) == 0
    assert main(command.split()) == 2
    assert "--force to replace it" in capsys.readouterr().err


def test_what_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for path in ("new", "deep/er", "there", "there/x"):
        check_writable("--out", tmp_path / path)
        check_writable("--out", tmp_path / path, beside=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=r"--out: cannot write to .*new: Permission denied"):
            check_writable("--out", tmp_path / "new")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("command", ["edit llama --facts facts.jsonl --out out --text text.txt --layers 1-2",
                                     "stats llama --text text.txt --layers 1-2"])  # fmt: skip
def test_the_cache_is_tried_before_anything_is_measured(
    here: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rlsedit.moments._measure", lambda *_: pytest.fail("has begun to measure"))
    monkeypatch.setenv("RLSEDIT_CACHE", str(here / "file"))
    assert main([*command.split(), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "rlsedit: cache: cannot write to" in error
    assert "RLSEDIT_CACHE" in error
    assert not (here / "out").exists()


def test_a_cache_that_has_everything_need_not_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = lm.tiny("llama"), list(lm.SENTENCES)
    second_moments(model, lm.tokenizer(), [1], texts, tmp_path)

    def refused(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", refused)
        second_moments(model, lm.tokenizer(), [1], texts, tmp_path)
        with pytest.raises(PermissionError, match="Permission denied; RLSEDIT_CACHE"):
            second_moments(model, lm.tokenizer(), [2], texts, tmp_path)
    with monkeypatch.context() as patch:  # full by the time that it is written
        patch.setattr("rlsedit.moments.atomic_save_tensors", full)
        with pytest.raises(OSError, match="No space left on device; RLSEDIT_CACHE"):
            second_moments(model, lm.tokenizer(), [2], texts, tmp_path)


def test_the_cache_of_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.editors import editor

    (tmp_path / "file").write_text("mine")
    one = editor()
    one._find_targets = TargetCache(tmp_path / "file" / "targets")
    monkeypatch.setattr("rlsedit.targets.cache.optimise_targets", lambda *_, **__: pytest.fail("has begun to work"))
    with pytest.raises(OSError, match="RLSEDIT_CACHE"):
        one.edit(facts(1))
