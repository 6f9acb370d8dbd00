"""`rlsedit edit` in many processes: the model that one process writes, one voice, the same exit status everywhere.

torchrun itself, which imports everything anew in each process, starts two of the commands here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.editors import facts
from support.language_models import tokenizer
from support.processes import Done, rlsedit
from support.spread_models import model_of

from rlsedit.cli import main
from rlsedit.store.check import problems

SETTINGS = ("--layers", "1,2", "--batch", "2", "--set", "steps=2", "--set", "contexts=1", "--set", "context_length=2",
            "--no-evaluate")  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, facts and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    model: Any = model_of("one", None, "llama", torch.float32)
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    lines = [{"id": f.id, "prompt": f.prompt, "subject": f.subject, "target_new": f.target_new} for f in facts(3)]
    (folder / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "text.txt").write_text("Oslo is a city in Norway. Lima is the capital of Peru. " * 40)
    return folder


@pytest.fixture(autouse=True)
def cache(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second moments are measured once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(inputs / "cache"))


@pytest.fixture(scope="module")
def alone(inputs: Path) -> Path:
    """The facts as one process writes them; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(inputs / "cache"))
        assert main([*map(str, _edit(inputs, inputs / "alone")), "--device", "cpu"]) == 0
    return inputs / "alone"


def _edit(inputs: Path, out: Path, given: str = "facts.jsonl") -> tuple[object, ...]:
    return (
        "edit", inputs / "model", "--facts", inputs / given, "--out", out, "--text", inputs / "text.txt", *SETTINGS,
    )  # fmt: skip


def _resume(out: Path, given: Path, *more: str) -> tuple[object, ...]:
    return "edit", out, "--facts", given, "--out", out, "--resume", "--no-evaluate", *more


def _torchrun(processes: int, *command: object) -> Any:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "rlsedit"]
    return subprocess.run(
        [sys.executable, *launch, *map(str, command)],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _written(path: Path, **record: str) -> Path:
    path.write_text(json.dumps(record) + "\n")
    return path


def _ended(done: Done) -> Done:
    """A command that all its processes have ended well."""
    assert set(done.codes) == {0}, done.stderr
    assert done.stdout.count("written to") == 1
    return done


def _same(inputs: Path, many: Path, one: Path) -> None:
    """The weights are equal to a thousandth of what the edits have changed."""
    before, ours, theirs = (load_file(path / "model.safetensors") for path in (inputs / "model", many, one))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        change = (weight - before[name]).norm()
        assert (change > 0) == (".1.mlp.down_proj" in name or ".2.mlp.down_proj" in name)
        assert (ours[name] - weight).norm() <= 1e-3 * change


def test_many_processes_write_the_model_that_one_does(inputs: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "many"
    many = _torchrun(2, *_edit(inputs, out), "--parallel", "tp", "--states", "sharded")
    assert many.returncode == 0, many.stderr
    assert many.stdout.count("written to") == 1
    assert many.stdout.count("lies     on 2 processes (tp), rows") == 1
    assert problems(out) == []
    assert "distributed_config" not in json.loads((out / "config.json").read_text())
    _same(inputs, out, alone)


def test_a_folder_is_resumed_by_another_number_of_processes(inputs: Path, alone: Path, tmp_path: Path) -> None:
    more = _written(tmp_path / "more.jsonl", id="late", prompt="{} lies in", subject="The city of Lima",
                    target_new="Norway")  # fmt: skip
    one, many = tmp_path / "one", tmp_path / "many"
    shutil.copytree(alone, one)
    assert main([*map(str, _resume(one, more)), "--device", "cpu"]) == 0
    _ended(rlsedit(2, tmp_path, *_edit(inputs, many), "--parallel", "fsdp"))
    _ended(rlsedit(3, tmp_path, *_resume(many, more, "--parallel", "fsdp")))
    assert problems(many) == []
    _same(inputs, many, one)


def test_edits_are_taken_out_and_replaced_by_many_processes_as_by_one(
    inputs: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = facts(1)[0]
    new = _written(tmp_path / "new.jsonl", id="new", prompt=first.prompt, subject=first.subject, target_new="Quito")
    one, many = tmp_path / "one", tmp_path / "many"
    spread = ("--parallel", "fsdp", "--states", "sharded")
    shutil.copytree(alone, one)
    _ended(rlsedit(2, tmp_path, *_edit(inputs, many), *spread))
    found = {}
    for out in (one, many):
        steps: list[tuple[tuple[object, ...], str]] = [
            (("remove", out, "f1", "f2"), "taken out: f1, f2"),
            (("remove", out, "--undo"), "taken back: the last step"),
            (_resume(out, new, "--on-conflict", "replace"), "written to"),
        ]
        for step, told in steps:
            if out == one:
                assert main([*map(str, step), "--device", "cpu"]) == 0
            else:
                assert _ended(rlsedit(2, tmp_path, *step, *spread)).stdout.count(told) == 1
        assert problems(out) == []
        capsys.readouterr()
        assert main(["log", str(out), "--json"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found[out.name] = sorted((row["id"], row["state"]) for row in rows)
    assert found["many"] == found["one"] == sorted(
        [("f0", "removed"), ("f1", "applied"), ("f2", "applied"), ("new", "applied")]
    )  # fmt: skip
    _same(inputs, many, one)


def test_a_bad_fact_ends_all_processes_with_one_line_and_status_2(inputs: Path, tmp_path: Path) -> None:
    _written(inputs / "bad.jsonl", id="a", prompt="{} is in", subject="Oslo")
    found = _torchrun(2, *_edit(inputs, tmp_path / "out", "bad.jsonl"))
    said = [line for line in found.stderr.splitlines() if line.startswith("rlsedit:")]
    assert len(said) == 1, found.stderr
    assert "target_new" in said[0]
    assert "exitcode  : 2" in found.stderr
    assert "exitcode  : 1" not in found.stderr
    assert not (tmp_path / "out").exists()


def test_commands_of_one_process_are_refused_in_many(inputs: Path, tmp_path: Path) -> None:
    """Each process would do all of it, and write to the same folder."""
    out = tmp_path / "out"
    found = rlsedit(2, tmp_path, "export", inputs / "model", "--base", inputs / "model", "--to", "hf", "--out", out)
    said = [line for line in found.stderr.splitlines() if line.startswith("rlsedit:")]
    assert said == ["rlsedit: export: is for one process, got 2; torchrun is for edit and remove"]
    assert set(found.codes) == {2}
    assert not out.exists()


def test_options_of_many_processes_are_refused_without_torchrun(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*map(str, _edit(inputs, tmp_path / "out")), "--parallel", "tp"]) == 2
    assert "torchrun" in capsys.readouterr().err
