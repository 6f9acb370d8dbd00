"""Facts and texts that are longer than what a model reads: refused by name before the model fails on them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import language_models as lm
from support.editors import editor, facts

from rlsedit.checking import TooLongError
from rlsedit.cli import main
from rlsedit.facts import Fact, save_facts
from rlsedit.metrics import evaluate
from rlsedit.metrics.generation import generate
from rlsedit.metrics.writing import evaluate_writing
from rlsedit.models import Adapter
from rlsedit.moments import second_moments
from rlsedit.prompts import encode, make_contexts
from rlsedit.prompts.contexts import OPENINGS
from rlsedit.store.check import reading

LONG = Fact("long", "The capital of {} is", " ".join(["Peru"] * 120), "Rome")
SMALL = [*lm.SMALL_EDITS, "--batch", "3"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lengths")
    return lm.on_disk(folder, "gpt2", ". ")  # one paragraph, longer than the model reads


@pytest.fixture(autouse=True)
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSEDIT_CACHE", str(root / "cache"))


def edit(root: Path, source: Path | str, out: Path, *more: str) -> list[str]:
    return ["edit", str(root / "gpt2"), "--facts", str(source), "--out", str(out), "--text", str(root / "text.txt"),
            *SMALL, *more]  # fmt: skip


def behind_a_prefix(adapter: Adapter) -> Fact:
    """Fits by itself to the last position, and not behind a prefix."""
    for count in range(1, 120):
        fact = Fact("tight", "The capital of {} is", " ".join(["Peru"] * count), "Rome")
        read = len(encode(lm.tokenizer(), fact.text, target=fact.target_new).ids) - 1
        if read >= 94:
            return fact
    raise AssertionError


def test_an_editor_refuses_them_by_name() -> None:
    one = editor(family="gpt2")
    before = {n: one.adapter.rows(n).clone() for n in one.config.layers}
    with pytest.raises(TooLongError, match="fact 'long': too long for the model, which reads 96 tokens"):
        one.edit([*facts(1), LONG])
    with pytest.raises(TooLongError, match=r"'tight'.* behind the prefixes"):
        one.edit([behind_a_prefix(one.adapter)])
    assert all(torch.equal(one.adapter.rows(n), rows) for n, rows in before.items())
    assert one.edit(facts(1)).facts == 1
    # without prefixes there is room for it, and the model reads it
    assert editor(family="gpt2", contexts=0).edit([behind_a_prefix(one.adapter)]).facts == 1
    assert editor("ft", family="gpt2").edit([behind_a_prefix(one.adapter)]).facts == 1


def test_scores_name_the_fact() -> None:
    model = lm.tiny("gpt2")
    paraphrase = replace(facts(1)[0], id="wordy", paraphrases=(LONG.text,))
    for fact in (LONG, paraphrase):
        with pytest.raises(ValueError, match=f"fact '{fact.id}': too long for the model, which reads 96 tokens"):
            evaluate(model, lm.tokenizer(), [*facts(1, 1), fact])
    assert len(evaluate(model, lm.tokenizer(), [behind_a_prefix(Adapter.for_model(model))]).rows) == 1


def test_texts_are_cut_to_what_the_model_reads(tmp_path: Path) -> None:
    model = lm.tiny("gpt2")
    text = ". ".join(lm.SENTENCES)
    assert len(lm.tokenizer()(text)["input_ids"]) > 96
    found = second_moments(model, lm.tokenizer(), [1], [text])
    assert torch.equal(found[1], second_moments(model, lm.tokenizer(), [1], [text], max_length=96)[1])
    adapter = Adapter.for_model(model)
    assert len(generate(adapter, lm.tokenizer(), ["Oslo"], length=500)) == 1
    fits = behind_a_prefix(adapter).text
    assert generate(adapter, lm.tokenizer(), ["Oslo", fits])[0] == generate(adapter, lm.tokenizer(), ["Oslo"])[0]
    with pytest.raises(ValueError, match="fact 'long': too long for the model, which reads 96 tokens"):
        evaluate_writing(model, lm.tokenizer(), [LONG])
    with pytest.raises(ValueError, match="too long for the model, which reads 96 tokens"):
        generate(adapter, lm.tokenizer(), [LONG.text])
    with pytest.raises(ValueError, match=r"context_length must be at most \d+ for a model that reads 96 tokens"):
        make_contexts(adapter, lm.tokenizer(), 5, 96, 0)
    openings = max(len(encode(lm.tokenizer(), word).ids) for word in OPENINGS)
    assert len(make_contexts(adapter, lm.tokenizer(), 5, 97 - openings, 0)) == 6


def test_the_commands_refuse_a_file_before_they_write(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_facts([*facts(4), LONG], tmp_path / "f.jsonl")
    for command in (
        edit(root, tmp_path / "f.jsonl", tmp_path / "out"),
        ["evaluate", str(root / "gpt2"), "--facts", str(tmp_path / "f.jsonl"), "--device", "cpu"],
    ):
        assert main(command) == 2
        assert "rlsedit: fact 'long': too long for the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    save_facts([*facts(4), behind_a_prefix(Adapter.for_model(lm.tiny("gpt2")))], tmp_path / "tight.jsonl")
    assert main(edit(root, tmp_path / "tight.jsonl", tmp_path / "out", "--no-evaluate")) == 2
    assert "behind the prefixes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_resume_checks_what_it_writes_and_what_it_scores(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the folder holds is not refused; a paraphrase that cannot be scored is, before anything is written."""
    out, wordy = tmp_path / "out", replace(facts(3)[2], paraphrases=(LONG.text,))
    resume = ["edit", str(root / "gpt2"), "--out", str(out), "--resume", "--device", "cpu", "--facts"]
    save_facts([replace(facts(1)[0], id="long")], tmp_path / "short.jsonl")
    assert main(edit(root, tmp_path / "short.jsonl", out, "--no-evaluate")) == 0
    save_facts([*facts(1), wordy], tmp_path / "wordy.jsonl")
    capsys.readouterr()
    assert main([*resume, str(tmp_path / "wordy.jsonl")]) == 2
    error = capsys.readouterr().err
    assert f"fact {wordy.id!r}: too long for the model" in error
    assert "--no-evaluate leaves the scores out" in error
    with reading(out) as (ledger, _):
        assert [row.fact.id for row in ledger.edits()] == ["long"]
    # a fact that is too long is in the folder, as earlier versions let it, and the file has one more
    save_facts([LONG, wordy], tmp_path / "both.jsonl")
    monkeypatch.setattr("rlsedit.store.again.statement", lambda fact: fact.id)
    assert main([*resume, str(tmp_path / "both.jsonl"), "--no-evaluate"]) == 0
    with reading(out) as (ledger, _):
        assert {row.fact.id: row.state for row in ledger.edits()} == {"long": "applied", wordy.id: "applied"}


def _served(
    root: Path, out: Path, some: list[Fact], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, tuple[str, str]]:
    data = b"".join(json.dumps(fact.to_dict()).encode() + b"\n" for fact in some)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(edit(root, "-", out)) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {answer["id"]: (answer["status"], answer.get("error", "")) for answer in found}


def test_a_stream_answers_failed_and_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    four = facts(4)
    found = _served(root, tmp_path / "out", [*four[:2], LONG, *four[2:]], monkeypatch, capsys)
    assert {name: status for name, (status, _) in found.items()} == {
        "f0": "applied", "f1": "applied", "long": "failed", "f2": "applied", "f3": "applied",
    }  # fmt: skip
    assert "too long for the model" in found["long"][1]
    with reading(tmp_path / "out") as (ledger, _):
        assert [row.reason[:22] for row in ledger.edits(state="failed")] == ["fact 'long': too long "]
    assert main(["log", str(tmp_path / "out"), "--check"]) == 0


def test_a_planned_fact_that_is_refused_is_planned_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that a run had planned when it ended, and that the next cannot write."""
    from rlsedit.cli import serving

    one = editor(steps=2)
    one.save(tmp_path)
    assert one.folder is not None
    one.folder.plan([LONG])
    serving._write(one, [LONG], "keep")
    assert json.loads(capsys.readouterr().out)["status"] == "failed"
    with reading(tmp_path) as (ledger, _):
        assert [row.state for row in ledger.edits()] == ["failed"]


@pytest.mark.parametrize("where", ["rlsedit.cli.serving._fact", "rlsedit.writing.targets.fact_rows"])
def test_any_other_failure_of_one_fact_is_an_answer(
    root: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib

    module, _, name = where.rpartition(".")
    real = getattr(importlib.import_module(module), name)

    def fails(*args: Any) -> Any:
        found = real(*args)
        several = args[1] if name == "fact_rows" else [found]
        if any(fact.id == "f1" for fact in several):
            raise IndexError("index out of range in self")
        return found

    monkeypatch.setattr(where, fails)
    data = b"".join(json.dumps(fact.to_dict()).encode() + b"\n" for fact in facts(3))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(edit(root, "-", tmp_path / "out")) == 0
    found = sorted(json.loads(line)["status"] for line in capsys.readouterr().out.splitlines())
    assert found == ["applied", "applied", "failed" if name == "fact_rows" else "error"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_ctrl_c_end_a_stream(
    root: Path,
    tmp_path: Path,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rlsedit.editor import Editor

    commit, calls = Editor._commit, []

    def full(self: Editor, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return commit(self, *args)

    monkeypatch.setattr(Editor, "_commit", full)
    data = b"".join(json.dumps(fact.to_dict()).encode() + b"\n" for fact in facts(9))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(edit(root, "-", tmp_path / "out", "--batch", "1")) == (
        130 if isinstance(error, KeyboardInterrupt) else 2
    )
    shown = capsys.readouterr()
    assert [json.loads(line)["id"] for line in shown.out.splitlines()] == ["f0"]
    assert "--resume goes on" in shown.err
    assert main(["log", str(tmp_path / "out"), "--check"]) == 0
