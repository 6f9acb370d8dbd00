"""`rlsedit edit --resume`, a stream on standard input and from a growing file, `rlsedit log`, `rlsedit remove`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import answers, arriving, edit, encoded, given, resume, same, weights
from support.editors import facts

from rlsedit.cli import main
from rlsedit.facts import Fact, save_facts

pytestmark = pytest.mark.usefixtures("cache")


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str, status: int = 2) -> None:
    assert main(arguments) == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("rlsedit")
    for word in words:
        assert word in error


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """Six facts in batches of two, never interrupted."""
    save_facts(facts(6), root / "six.jsonl")
    os.environ["RLSEDIT_CACHE"] = str(root / "cache")
    assert main(edit(root, root / "six.jsonl", root / "whole")) == 0
    return root / "whole"


def test_resume_goes_on_to_the_same_bits(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlsedit.editor import Editor

    batch, calls = Editor._batch, []

    def interrupted(self: Editor, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch(self, *args)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Editor, "_batch", interrupted)
        assert main(edit(root, root / "six.jsonl", out)) == 130
    assert "--resume goes on" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"rlsedit"}
    fails(capsys, resume(root / "llama", root / "six.jsonl", out, "--set", "steps=3"), "made with steps = 2, got 3")
    fails(capsys, resume(root / "llama", root / "six.jsonl", out, "--method", "memit"), "made with 'rlsedit'")
    fails(capsys, resume(root / "llama", root / "six.jsonl", out, "--force"), "--resume", "--force")
    fails(capsys, resume(root / "llama", root / "six.jsonl", tmp_path / "none"), "holds no edits")
    changed = [Fact("f0", "{} is", "Oslo", "Peru"), *facts(5, 1)]
    save_facts(changed, tmp_path / "changed.jsonl")
    fails(capsys, resume(root / "llama", tmp_path / "changed.jsonl", out), "'f0' is that of another edit")
    assert main(resume(root / "llama", root / "six.jsonl", out)) == 0
    assert "2 facts are left" in capsys.readouterr().out
    assert same(out, whole)
    report = json.loads((out / "rlsedit-report.json").read_text())
    assert [entry["ids"] for entry in report["batches"]] == [["f0", "f1"], ["f2", "f3"], ["f4", "f5"]]
    assert main(["log", str(out), "--check"]) == 0


def test_a_stream_on_standard_input(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Good lines in pairs give the bits of the file; each bad one is answered by an error and nothing else happens."""
    six = [fact.to_dict() for fact in facts(6)]
    bad: list[object] = [
        b"{not json\n", b"\xff\xfe\n", {"prompt": "x"}, [1], 7, {**six[0], "id": "x", "prompt": "no"},
        b"[" * 100000 + b"\n", b'"' + b"x" * (1 << 21) + b'"\n', {**six[0], "id": "\ud800"},
        {**six[0], "id": "y", "subject": "\udfff"}, b"\n", {**six[0], "id": "z", "more": 1},
    ]  # fmt: skip
    out = tmp_path / "out"
    given(monkeypatch, *six[:2], *bad, *six[2:])
    arriving(monkeypatch, iter([2, len(bad) + 2, 2, 2, 2, 2]))
    assert main(edit(root, "-", out)) == 0
    found = answers(capsys)
    errors = [answer for answer in found if answer["status"] == "error"]
    assert len(errors) == len(bad) - 1  # an empty line is no request
    assert {answer["line"] for answer in errors} == {3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14}
    applied = [(answer["id"], answer["batch"]) for answer in found if answer["status"] == "applied"]
    assert applied == [("f0", 1), ("f1", 1), ("f2", 2), ("f3", 2), ("f4", 3), ("f5", 3)]
    assert same(out, whole)
    monkeypatch.undo()
    os.environ["RLSEDIT_CACHE"] = str(root / "cache")
    # sent again, and a conflict
    conflict = Fact("g", facts(1)[0].prompt, facts(1)[0].subject, "Quito")
    given(monkeypatch, six[3], conflict.to_dict(), {**six[3], "target_new": "x"})
    assert main(resume(root / "llama", "-", out, "--on-conflict", "refuse")) == 0
    found = answers(capsys)
    assert [answer["status"] for answer in found] == ["already", "refused", "refused"]
    assert found[0]["batch"] == 2
    assert found[1]["conflicts"] == ["f0"]
    assert same(out, whole)
    no_id = {key: value for key, value in conflict.to_dict().items() if key != "id"}
    for status in ("applied", "already"):  # the same line has the same id
        given(monkeypatch, no_id)
        assert main(resume(root / "llama", "-", out, "--on-conflict", "replace")) == 0
        (found_one,) = answers(capsys)
        assert found_one["status"] == status
    assert main(["log", str(out), "--state", "removed"]) == 0
    shown = capsys.readouterr().out
    assert "f0" in shown
    assert "(replaced)" in shown
    assert main(["log", str(out), "--check"]) == 0


def test_a_batch_that_fails_is_tried_one_by_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlsedit.writing import targets

    real = targets.fact_rows
    held: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def picky(tokenizer: Any, some: Any, contexts: Any) -> Any:
        alive.append(any(buffer() is not None for buffer in held))
        buffer = torch.zeros(3)
        held.append(weakref.ref(buffer))
        if any(fact.id == "f1" for fact in some):
            raise ValueError("optimise_targets: the loss must be finite, got NaN")
        return real(tokenizer, some, contexts)

    monkeypatch.setattr(targets, "fact_rows", picky)
    given(monkeypatch, *(f.to_dict() for f in facts(3)))
    arriving(monkeypatch, iter([2, 3, 2]))
    out = tmp_path / "out"
    assert main(edit(root, "-", out, "--batch", "3")) == 0
    found = {answer["id"]: answer for answer in answers(capsys)}
    assert {name: answer["status"] for name, answer in found.items()} == {
        "f0": "applied",
        "f1": "failed",
        "f2": "applied",
    }
    assert "loss must be finite" in found["f1"]["error"]
    assert alive == [False] * 4  # what the batch had on a device is free before its facts are tried
    assert main(["log", str(out), "--state", "failed"]) == 0
    assert "loss must be finite" in capsys.readouterr().out


@pytest.mark.slow
def test_a_growing_file_until_sigterm(root: Path, whole: Path, tmp_path: Path) -> None:
    """A process of its own: answers come while it runs, SIGTERM ends it cleanly, a resume goes on to the same bits."""
    source, out = tmp_path / "grows.jsonl", tmp_path / "out"
    six = encoded(*(fact.to_dict() for fact in facts(6)))
    cut = six.index(b"\n", six.index(b"f1")) + 1
    source.write_bytes(six[:cut])
    path = os.pathsep.join(part for part in sys.path if part)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rlsedit", *edit(root, source, out, "--follow")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    try:
        first = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert [(answer["id"], answer["status"]) for answer in first] == [("f0", "applied"), ("f1", "applied")]
        assert main(["log", str(out)]) == 0  # reading while it is written
        with open(source, "ab") as stream:
            stream.write(six[cut : cut + 20])
            stream.flush()
            time.sleep(0.3)
            stream.write(six[cut + 20 :])  # a line in two pieces is one line
        rest = [json.loads(process.stdout.readline()) for _ in range(4)]
        assert [answer["id"] for answer in rest] == ["f2", "f3", "f4", "f5"]
        process.send_signal(signal.SIGTERM)
        output, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, error.decode()
    assert output == b""
    assert main(["log", str(out), "--check"]) == 0
    assert len(weights(out)) == len(weights(whole))  # a whole model is there
    batches = {answer["batch"] for answer in first + rest}
    if batches == {1, 2, 3}:
        assert same(out, whole)


def test_log(root: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*arguments: str) -> str:
        assert main(["log", str(whole), *arguments]) == 0
        return capsys.readouterr().out

    assert [line.split()[0] for line in shown().splitlines()[2:8]] == [f"f{i}" for i in range(6)]
    assert "6 shown; in the folder 6 applied" in shown()
    assert [json.loads(line)["id"] for line in shown("--step", "2", "--json").splitlines()] == ["f2", "f3"]
    assert "0 shown" in shown("--state", "failed")
    assert "1 shown" in shown("--last", "1")
    assert "f1" in shown("--find", facts(2)[1].subject.upper())
    one = shown("f3")
    assert '"Sydney"' in one
    assert "applied by step 2" in one
    assert "behind step 3 of 3" in one
    assert "efficacy" in one
    assert "efficacy" not in shown("f3", "--no-evaluate")
    fails(capsys, ["log", str(whole), "nobody"], "no edit 'nobody'")
    for option in ("--step", "--last"):  # SQLite has 64 bits
        fails(capsys, ["log", str(whole), option, str(2**63)], f"{option}: needs a whole number of at most {2**63 - 1}")
    fails(capsys, ["log", str(root)], "holds no edits")


def test_a_dry_run_of_a_resumed_folder_counts_what_is_left(
    root: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is in the folder, and what was taken out of it, is not written again; it was counted."""
    import shutil

    out = tmp_path / "out"
    shutil.copytree(whole, out)
    assert main(["remove", str(out), "f1", "--device", "cpu"]) == 0
    given = [*facts(8), Fact(id="late", prompt=facts(3)[2].prompt, subject=facts(3)[2].subject, target_new="Quito")]
    save_facts(given, tmp_path / "more.jsonl")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    def shown(*more: str) -> str:
        capsys.readouterr()
        assert main([*resume(root / "llama", tmp_path / "more.jsonl", out), "--dry-run", *more]) == 0
        return capsys.readouterr().out

    assert "resumed  behind step 4: 3 facts are left" in shown()
    assert "facts    3 in 2 batches of at most 2" in shown()
    assert "1 taken out" in shown()
    assert "facts    4 in 2 batches of at most 2" in shown("--again")
    dry = [*resume(root / "llama", tmp_path / "more.jsonl", out), "--dry-run"]
    fails(capsys, [*dry, "--on-conflict", "refuse"], "'late' and 'f2'", "nothing was written")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_conflicts_of_a_file_with_itself_are_refused_before_the_model_is_loaded(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = facts(1)[0]
    save_facts([first, Fact("late", first.prompt, first.subject, "Quito")], tmp_path / "twice.jsonl")
    monkeypatch.setattr("rlsedit.models.smollm2.load_model", lambda *_, **__: pytest.fail("loading takes minutes"))
    command = edit(root, tmp_path / "twice.jsonl", tmp_path / "out", "--on-conflict", "refuse")
    fails(capsys, command, "'late' and 'f0'", "nothing was written")
    assert not (tmp_path / "out").exists()


def test_the_dtype_of_a_model_is_said_as_it_was_when_edits_are_taken_out(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder in which no model is yet, made with --dtype: the first model's files have another."""
    out = tmp_path / "out"
    save_facts(facts(4), tmp_path / "four.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("rlsedit.cli.edit.finish", lambda *_: None)
        assert main([*edit(root, tmp_path / "four.jsonl", out), "--dtype", "float64"]) == 0
    fails(capsys, ["remove", str(out), "f1", "f2", "f1"], "ID: needs each edit once, got 'f1' again")
    remove = ["remove", str(out), "f1", "--device", "cpu", "--base", str(root / "llama")]
    fails(capsys, remove, "float64")
    assert main([*remove, "--dtype", "float64"]) == 0
    assert {value.dtype for value in weights(out).values()} == {torch.float64}


def test_remove_and_undo(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    out = tmp_path / "out"
    shutil.copytree(whole, out)
    assert main(["remove", str(out), "f1", "f4", "--device", "cpu"]) == 0
    assert "taken out: f1, f4" in capsys.readouterr().out
    assert not same(out, whole)
    assert main(["log", str(out), "--state", "removed", "--json"]) == 0
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == ["f1", "f4"]
    fails(capsys, ["remove", str(out), "f1", "--device", "cpu"], "in the model, got 'f1', which is removed")
    with monkeypatch.context() as patch:  # known before the model is
        patch.setattr(
            "rlsedit.models.smollm2.load_model", lambda *_, **__: pytest.fail("a model takes minutes to load")
        )
        fails(capsys, ["remove", str(out), "f2", "nobody"], "got 'nobody', of which the folder knows nothing")
    fails(capsys, ["remove", str(out)], "name at least one edit")
    fails(capsys, ["remove", str(root / "llama"), "f1"], "holds no edits")
    assert main(["remove", str(out), "--undo", "--device", "cpu"]) == 0
    assert same(out, whole)
    assert main(["log", str(out), "--check"]) == 0
    # more into the folder itself, from its own model
    save_facts(facts(1, 6), tmp_path / "more.jsonl")
    assert main(["edit", str(out), "--facts", str(tmp_path / "more.jsonl"), "--out", str(out), "--resume",
                 "--no-evaluate", "--device", "cpu"]) == 0  # fmt: skip
    assert not same(out, whole)
    (out / "model.safetensors").write_bytes(b"broken")
    assert main(["log", str(out), "--check"]) == 1
    assert str(out / "model.safetensors") in capsys.readouterr().out
    assert main(resume(root / "llama", tmp_path / "more.jsonl", out)) == 0  # written anew from the first model
    assert main(["log", str(out), "--check"]) == 0


def test_what_the_log_cannot_do_together(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No option is passed over in silence."""
    for more in (["f0"], ["--json"], ["--last", "1"]):
        fails(capsys, ["log", str(whole), *more, "--check"], "--check: reads all files; leave out")
    fails(capsys, ["log", str(whole), "f0", "--state", "planned"], "no edit 'f0' that fits --state")
    assert main(["log", str(whole), "f0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {**facts(1)[0].to_dict(), "state": "applied"}
