"""Facts that are given again: ids made from texts, ids of earlier versions, and what was taken out of the model."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import answers, edit, given, resume, same, states, written
from support.editors import facts

from rlsedit.cli import main
from rlsedit.facts import Fact, load_facts
from rlsedit.facts.ids import numbered, text_id
from rlsedit.store.again import FormerIds, told_apart
from rlsedit.store.ledger import Edit

pytestmark = pytest.mark.usefixtures("cache")


def bare(some: list[Fact]) -> list[dict[str, Any]]:
    """Records as README has them, without ids."""
    return [{k: v for k, v in fact.to_dict().items() if k != "id"} for fact in some]


def test_more_facts_without_ids_are_appended(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second command of README's "A model on disk", with facts in README's own format."""
    out, four = tmp_path / "out", bare(facts(4))
    assert main(edit(root, written(tmp_path / "facts.jsonl", four[:3]), out)) == 0
    assert main(resume(out, written(tmp_path / "more.jsonl", four[3:]), out)) == 0
    assert "1 facts are left" in capsys.readouterr().out
    assert states(out) == {text_id(fact): "applied" for fact in facts(4)}
    # either file again, both in another order, and a stream of the same lines
    for source in ("facts.jsonl", "more.jsonl"):
        assert main(resume(out, tmp_path / source, out)) == 0
        assert "0 facts are left" in capsys.readouterr().out
    assert main(resume(root / "llama", written(tmp_path / "all.jsonl", four[::-1]), out)) == 0
    assert "0 facts are left" in capsys.readouterr().out
    given(monkeypatch, *four)
    assert main(resume(out, "-", out)) == 0
    assert [answer["status"] for answer in answers(capsys)] == ["already"] * 4


def test_equal_facts_of_a_file_are_counted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = bare(facts(2))
    out, source, name = tmp_path / "out", written(tmp_path / "f.jsonl", [one, two, one]), text_id(facts(1)[0])
    assert main(edit(root, source, out)) == 0
    assert states(out) == {name: "applied", text_id(facts(2)[1]): "applied", f"{name}-2": "applied"}
    assert main(resume(root / "llama", source, out)) == 0
    assert "0 facts are left" in capsys.readouterr().out
    # a stream is a request that may be sent again: the second one, in the same batch, is in the model already
    three = bare(facts(3))[2]
    given(monkeypatch, three, three)
    assert main(resume(root / "llama", "-", out)) == 0
    assert [answer["status"] for answer in answers(capsys)] == ["applied", "already"]


def test_ids_of_earlier_versions() -> None:
    """Numbers of lines, hashes of lines, and places within a record; in the order in which equal facts came."""
    rows = [
        Edit(i, replace(fact, id=name), "applied", 1, None, "", "", True)
        for i, (fact, name) in enumerate(
            [(facts(1)[0], "7"), (facts(2)[1], "0123456789ab"), (facts(1)[0], "9.1"), (facts(3)[2], "own")]
        )
    ]
    former = FormerIds(rows)
    renamed = [former.renamed(numbered(facts(1)[0], times)).id for times in (1, 2, 3)]
    assert renamed == ["7", "9.1", f"{text_id(facts(1)[0])}-3"]
    assert former.renamed(numbered(facts(2)[1])).id == "0123456789ab"
    assert former.renamed(numbered(facts(3)[2])).id == text_id(facts(3)[2])
    assert former.renamed(replace(facts(1)[0], id="mine")).id == "mine"


def test_a_number_may_be_an_id_of_ones_own() -> None:
    """Beside the same statement without an id, in the folder or in the file, each stays what it is."""
    plain = numbered(facts(1)[0])
    own = replace(plain, id="5")

    def rows(*states: tuple[Fact, str]) -> list[Edit]:
        return [Edit(i, fact, state, 1, None, "", "", True) for i, (fact, state) in enumerate(states)]

    def left(given: list[Fact], *states: tuple[Fact, str]) -> list[str]:
        return [fact.id for fact in told_apart(given, rows(*states), False, False).left]

    assert left([own, plain], (own, "planned"), (plain, "planned")) == ["5", plain.id]  # cut short
    assert left([own, plain], (own, "applied")) == [plain.id]  # the second is new
    assert left([plain], (own, "applied")) == []  # of an earlier version
    assert left([plain], (own, "applied"), (plain, "planned")) == [plain.id]
    assert FormerIds(rows((own, "removed"), (plain, "applied"))).renamed(plain) == plain


@pytest.mark.parametrize("interrupted", [False, True])
def test_folders_with_numbers_of_lines_for_ids_go_on(
    root: Path, tmp_path: Path, interrupted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What earlier versions have written, whole or cut short in a batch, is taken for the same facts."""
    from rlsedit.editor import Editor

    six = bare(facts(6))
    numbered = written(tmp_path / "numbered.jsonl", [{**r, "id": str(i)} for i, r in enumerate(six, 1)])
    plain, whole, out = written(tmp_path / "facts.jsonl", six), tmp_path / "whole", tmp_path / "out"
    assert main(edit(root, numbered, whole)) == 0
    commit, calls = Editor._commit, []

    def cut(self: Editor, *args: Any) -> Any:
        calls.append(1)
        if interrupted and len(calls) == 2:
            os._exit(9)
        return commit(self, *args)

    pid = os.fork()
    if pid == 0:
        Editor._commit = cut  # type: ignore[method-assign]
        torch.set_num_threads(1)
        os._exit(main(edit(root, numbered, out)))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (9 if interrupted else 0)
    capsys.readouterr()
    assert main(resume(root / "llama", plain, out)) == 0
    assert f"{4 if interrupted else 0} facts are left" in capsys.readouterr().out
    assert same(out, whole)
    names = {str(i): "applied" for i in range(1, 5)}
    names |= {text_id(f): "applied" for f in facts(2, 4)} if interrupted else {"5": "applied", "6": "applied"}
    assert states(out) == names
    # another file whose first line is another fact, and the same facts in another order
    more = written(tmp_path / "more.jsonl", [*bare(facts(1, 6)), *six[::-1]])
    assert main(resume(root / "llama", more, out)) == 0
    assert "1 facts are left" in capsys.readouterr().out
    assert main(["log", str(out), "--check"]) == 0
    capsys.readouterr()
    given(monkeypatch, six[2])
    assert main(resume(root / "llama", "-", out)) == 0
    assert [(a["id"], a["status"]) for a in answers(capsys)] == [("3", "already")]


def test_a_stream_that_brings_nothing_changes_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PRUNE's step at the end of a sequence is taken once behind a batch, not at every start of a stream."""
    source, out = written(tmp_path / "f.jsonl", bare(facts(2))), tmp_path / "out"
    assert main(edit(root, source, out, "--method", "prune")) == 0
    three = bare(facts(3))[2]
    for more, steps in (((), 2), ((three,), 4), ((), 4), ((three,), 4)):  # a batch and a finish each
        given(monkeypatch, *more)
        assert main(resume(root / "llama", "-", out)) == 0
        assert len(list((out / "rlsedit" / "records").iterdir())) == steps
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [answer["status"] for answer in shown] == ["applied", "already"]


def test_what_was_taken_out_stays_out_until_it_is_wanted_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same in a file and in a stream: named with the reason, written again with --again."""
    some = facts(4)
    source, out = written(tmp_path / "f.jsonl", [fact.to_dict() for fact in some]), tmp_path / "out"
    assert main(edit(root, source, out)) == 0
    assert main(["remove", str(out), "--undo", "--device", "cpu"]) == 0
    assert main(["remove", str(out), "f0", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(resume(root / "llama", source, out)) == 0
    shown = capsys.readouterr().out
    assert "0 facts are left" in shown
    assert "left out 3 written before and taken out of the model since (1 taken out, 2 undone): f0, f2, f3" in shown
    assert "--again" in shown
    given(monkeypatch, *(fact.to_dict() for fact in some))
    assert main(resume(root / "llama", "-", out)) == 0
    assert [(a["id"], a["status"], a.get("reason")) for a in answers(capsys)] == [
        ("f0", "removed", "taken out"), ("f1", "already", None), ("f2", "removed", "undone"),
        ("f3", "removed", "undone"),
    ]  # fmt: skip
    # the id is free for something else
    given(monkeypatch, {**some[0].to_dict(), "target_new": "Quito"})
    assert main(resume(root / "llama", "-", out)) == 0
    assert [a["status"] for a in answers(capsys)] == ["applied"]
    assert main(["remove", str(out), "--undo", "--device", "cpu"]) == 0
    capsys.readouterr()
    given(monkeypatch, some[2].to_dict())
    assert main(resume(root / "llama", "-", out, "--again")) == 0
    assert answers(capsys)[-1]["status"] == "applied"
    assert main(resume(root / "llama", source, out, "--again")) == 0
    assert "2 facts are left" in capsys.readouterr().out
    assert set(states(out).values()) == {"applied"}
    assert main(["log", str(out), "--check"]) == 0
    assert main([*edit(root, source, tmp_path / "new"), "--again"]) == 2
    assert "--again: goes with --resume" in capsys.readouterr().err


def test_what_a_later_fact_replaced_is_not_brought_back(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The later of two facts about the same wins, however often the file is given."""
    first, other = facts(2)
    later = replace(first, id="g", target_new="Quito")
    source, out = written(tmp_path / "f.jsonl", [f.to_dict() for f in (first, other, later)]), tmp_path / "out"
    assert main(edit(root, source, out, "--on-conflict", "replace")) == 0
    capsys.readouterr()
    for more, told in (((), "--again writes"), (("--again",), "later facts of the file replace them")):
        assert main(resume(root / "llama", source, out, "--on-conflict", "replace", *more)) == 0
        shown = capsys.readouterr().out
        assert "0 facts are left" in shown
        assert "(1 replaced): f0" in shown
        assert told in shown
    assert states(out) == {"f0": "removed", "f1": "applied", "g": "applied"}


def test_what_was_planned_when_the_run_ended_is_still_wanted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlsedit.editor import Editor

    source, out = written(tmp_path / "f.jsonl", [f.to_dict() for f in facts(2)]), tmp_path / "out"
    assert main(edit(root, source, out)) == 0
    assert main(["remove", str(out), "--undo", "--device", "cpu"]) == 0

    def interrupted(self: Editor, *_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Editor, "_commit", interrupted)
        assert main(resume(root / "llama", source, out, "--again")) == 130
    capsys.readouterr()
    assert main(resume(root / "llama", source, out)) == 0
    assert "2 facts are left" in capsys.readouterr().out
    assert set(states(out).values()) == {"applied"}


def test_the_log_tells_states_and_its_lines_are_facts(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What docs/ledger.md and the refusals of `remove` advise: the edits that shall stay, into the first model."""
    source, out = written(tmp_path / "f.jsonl", [f.to_dict() for f in facts(4)]), tmp_path / "out"
    assert main(edit(root, source, out)) == 0
    assert main(["remove", str(out), "f1", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["log", str(out), "--json"]) == 0
    assert [(a["id"], a["state"]) for a in answers(capsys)] == [
        ("f0", "applied"), ("f1", "removed"), ("f2", "applied"), ("f3", "applied"),
    ]  # fmt: skip
    assert main(["log", str(out), "--state", "applied", "--json"]) == 0
    (tmp_path / "stay.jsonl").write_text(capsys.readouterr().out, encoding="utf-8")
    assert [fact.id for fact in load_facts(tmp_path / "stay.jsonl")] == ["f0", "f2", "f3"]
    assert main(edit(root, tmp_path / "stay.jsonl", tmp_path / "new")) == 0
    assert states(tmp_path / "new") == {"f0": "applied", "f2": "applied", "f3": "applied"}
