"""`rlsedit edit` started by torchrun: the model that one process writes, one voice, the same exit status everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.editors import facts
from support.language_models import tokenizer
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


def _command(inputs: Path, out: Path, *more: str, processes: int = 1, given: str = "facts.jsonl") -> Any:
    edit = ("edit", inputs / "model", "--facts", inputs / given, "--out", out, *SETTINGS, *more)
    return _rlsedit(inputs, *edit, processes=processes)


def _rlsedit(inputs: Path, *command: object, processes: int = 1) -> Any:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    home = {"XDG_CACHE_HOME": str(inputs / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launch, "-m", "rlsedit", *map(str, command)],
        capture_output=True, text=True, timeout=280, env={**os.environ, **home},
    )  # fmt: skip


def test_many_processes_write_the_model_that_one_does(inputs: Path, tmp_path: Path) -> None:
    text = ("--text", str(inputs / "text.txt"))
    one = _command(inputs, tmp_path / "one", *text)
    assert one.returncode == 0, one.stderr
    many = _command(inputs, tmp_path / "many", *text, "--parallel", "tp", "--states", "sharded", processes=2)
    assert many.returncode == 0, many.stderr
    assert many.stdout.count("written to") == 1
    assert many.stdout.count("lies     on 2 processes (tp), rows") == 1
    assert problems(tmp_path / "many") == []
    before = load_file(inputs / "model" / "model.safetensors")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("many", "one"))
    assert ours.keys() == theirs.keys()
    assert "distributed_config" not in json.loads((tmp_path / "many" / "config.json").read_text())
    for name, weight in theirs.items():
        change = (weight - before[name]).norm()
        assert (change > 0) == (".1.mlp.down_proj" in name or ".2.mlp.down_proj" in name)
        assert (ours[name] - weight).norm() <= 1e-3 * change


def test_a_folder_is_resumed_by_another_number_of_processes(inputs: Path, tmp_path: Path) -> None:
    text = ("--text", str(inputs / "text.txt"))
    more = [{"id": "late", "prompt": "{} lies in", "subject": "The city of Lima", "target_new": "Norway"}]
    (inputs / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in more))
    for name, processes, way in (("one", 1, ()), ("many", 2, ("--parallel", "fsdp"))):
        first = _command(inputs, tmp_path / name, *text, *way, processes=processes)
        assert first.returncode == 0, first.stderr
    source = inputs / "model"
    for name, processes, way in (("one", 1, ()), ("many", 3, ("--parallel", "fsdp"))):
        again = _rlsedit(
            inputs, "edit", tmp_path / name, "--facts", inputs / "more.jsonl", "--out", tmp_path / name, "--resume",
            "--no-evaluate", *way, processes=processes,
        )  # fmt: skip
        assert again.returncode == 0, again.stderr
    assert problems(tmp_path / "many") == []
    before = load_file(source / "model.safetensors")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("many", "one"))
    for name, weight in theirs.items():
        assert (ours[name] - weight).norm() <= 1e-3 * (weight - before[name]).norm()


def test_edits_are_taken_out_and_replaced_by_many_processes_as_by_one(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(inputs / "cache"))
    first = facts(1)[0]
    new = {"id": "new", "prompt": first.prompt, "subject": first.subject, "target_new": "Quito"}
    (inputs / "new.jsonl").write_text(json.dumps(new) + "\n")
    found = {}
    for name in ("one", "many"):
        out = tmp_path / name
        steps: list[tuple[object, ...]] = [
            ("edit", inputs / "model", "--facts", inputs / "facts.jsonl", "--out", out, "--text", inputs / "text.txt",
             *SETTINGS),
            ("remove", out, "f1", "f2"),
            ("remove", out, "--undo"),
            ("edit", out, "--facts", inputs / "new.jsonl", "--out", out, "--resume", "--no-evaluate", "--on-conflict",
             "replace"),
        ]  # fmt: skip
        for step in steps:
            if name == "one":
                assert main([*map(str, step), "--device", "cpu"]) == 0
                continue
            done = _rlsedit(inputs, *step, "--parallel", "fsdp", "--states", "sharded", processes=2)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("written to") == 1
            if step[0] == "remove":
                assert done.stdout.count("taken back: the last step" if "--undo" in step else "taken out: f1, f2") == 1
        assert problems(out) == []
        capsys.readouterr()
        assert main(["log", str(out), "--json"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found[name] = sorted((row["id"], row["state"]) for row in rows)
    assert found["many"] == found["one"] == sorted(
        [("f0", "removed"), ("f1", "applied"), ("f2", "applied"), ("new", "applied")]
    )  # fmt: skip
    before = load_file(inputs / "model" / "model.safetensors")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("many", "one"))
    for name, weight in theirs.items():
        assert (ours[name] - weight).norm() <= 1e-3 * (weight - before[name]).norm()


def test_a_bad_fact_ends_all_processes_with_one_line_and_status_2(inputs: Path, tmp_path: Path) -> None:
    (inputs / "bad.jsonl").write_text('{"id": "a", "prompt": "{} is in", "subject": "Oslo"}\n')
    found = _command(inputs, tmp_path / "out", processes=2, given="bad.jsonl")
    said = [line for line in found.stderr.splitlines() if line.startswith("rlsedit:")]
    assert len(said) == 1, found.stderr
    assert "target_new" in said[0]
    assert "exitcode  : 2" in found.stderr
    assert "exitcode  : 1" not in found.stderr
    assert not (tmp_path / "out").exists()


def test_commands_of_one_process_are_refused_in_many(inputs: Path, tmp_path: Path) -> None:
    """Each process would do all of it, and write to the same folder."""
    out = tmp_path / "out"
    export = ("export", inputs / "model", "--base", inputs / "model", "--to", "hf", "--out", out)
    found = _rlsedit(inputs, *export, processes=2)
    said = [line for line in found.stderr.splitlines() if line.startswith("rlsedit:")]
    assert said == ["rlsedit: export: is for one process, got 2; torchrun is for edit and remove"]
    assert "exitcode  : 2" in found.stderr
    assert not out.exists()


def test_options_of_many_processes_are_refused_without_torchrun(inputs: Path, tmp_path: Path) -> None:
    found = _command(inputs, tmp_path / "out", "--parallel", "tp")
    assert found.returncode == 2
    assert "torchrun" in found.stderr
