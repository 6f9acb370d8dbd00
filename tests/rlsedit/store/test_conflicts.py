"""Rewriting a fact about the same: reported, kept beside, put in the place of the old one, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.editors import differing, editor, everything, facts, resumed

from rlsedit.facts import Fact
from rlsedit.reports import Conflict

FIRST = facts(4)
NEW = Fact("new", FIRST[1].prompt.upper().replace("{}", "{}"), f" {FIRST[1].subject}".strip().lower(), "Quito")


def test_what_is_about_the_same(caplog: pytest.LogCaptureFixture) -> None:
    one = editor(steps=2, contexts=0)
    related = replace(FIRST[0], relation="P1")
    one.edit([related, *FIRST[1:]], batch_size=2)
    report = one.edit([NEW])
    assert report.conflicts == [Conflict("new", "f1", NEW.subject)]
    assert "edits about the same: 'new' and 'f1'" in caplog.text
    assert "both are kept" in caplog.text
    assert {"f1", "new"} <= set(one._journal.index.live)  # type: ignore[union-attr]
    by_relation = Fact("r", "In {} people speak", FIRST[0].subject, "yen", relation="p1 ")
    other = Fact("o", "In {} people speak", FIRST[0].subject, "yen", relation="P2")
    assert one.edit([by_relation]).conflicts == [Conflict("r", "f0", FIRST[0].subject)]
    assert one.edit([other]).conflicts == [Conflict("o", "r", FIRST[0].subject)]  # the same prompt
    assert one.edit([Fact("n", "{} is near", FIRST[0].subject, "yen")]).conflicts == []


def test_refuse_writes_nothing(tmp_path: Path) -> None:
    one = editor(steps=2, contexts=0)
    one.save(tmp_path)
    one.edit(FIRST)
    before, files = everything(one), {p: p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="about what has been edited already: 'new' and 'f1'"):
        one.edit([facts(1, 8)[0], NEW], on_conflict="refuse")
    twins = [Fact("p", "{} is near", "Lima", "Peru"), Fact("q", "{} is near", "Lima", "Japan")]
    with pytest.raises(ValueError, match="'q' and 'p'"):
        one.edit(twins, on_conflict="refuse")
    with pytest.raises(ValueError, match=r"ids that are not in the model, got \['f2'\]"):
        one.edit([replace(FIRST[2], prompt="{} is near")])
    with pytest.raises(ValueError, match="on_conflict must be one of"):
        one.edit([NEW], on_conflict="maybe")  # type: ignore[arg-type]
    assert differing(everything(one), before) == []
    assert {p: p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()} == files
    one.edit(facts(1, 8), on_conflict="refuse")


@pytest.mark.parametrize("method", ["rlsedit", "memit", "simie"])
def test_replace_is_a_removal_and_a_write_in_one_step(method: str, tmp_path: Path) -> None:
    """The same weights as removing and then writing; one record; resumed and undone to the bit."""
    one, twin = editor(method, torch.float64), editor(method, torch.float64)
    one.save(tmp_path, every=100)
    for e in (one, twin):
        e.edit(FIRST, batch_size=2)
    before = everything(one)
    report = one.edit([NEW, *facts(1, 8)], on_conflict="replace")
    assert [conflict.old for conflict in report.conflicts] == ["f1"]
    twin.remove(["f1"])
    twin.edit([NEW, *facts(1, 8)])
    for n in (1, 2):
        torch.testing.assert_close(one._weights.wide(n), twin._weights.wide(n), rtol=1e-12, atol=1e-13)
    assert one.folder is not None
    assert [(r.fact.id, r.state, r.reason) for r in one.folder.ledger.edits()][1] == ("f1", "removed", "replaced")
    after = everything(one)
    one.close()
    again = resumed(tmp_path, torch.float64)
    assert differing(everything(again), after) == []
    again.undo()
    assert differing(everything(again), before) == []
    again.edit([replace(FIRST[3], target_new="Quito")], on_conflict="replace")  # the same id
    states = [(r.fact.id, r.state) for r in again.folder.ledger.edits(name="f3")]  # type: ignore[union-attr]
    assert states == [("f3", "removed"), ("f3", "applied")]


def test_twins_in_one_request_are_written_one_after_the_other() -> None:
    one = editor(steps=2, contexts=0)
    twins = [Fact("p", "{} is near", "Lima", "Peru"), *facts(1), Fact("q", "{} is near", "Lima", "Japan")]
    report = one.edit(twins, on_conflict="replace", batch_size=10)
    assert [batch.ids for batch in report.batches] == [("p", "f0"), ("q",)]
    assert set(one._journal.index.live) == {"f0", "q"}  # type: ignore[union-attr]


def test_a_failed_replacement_leaves_the_old_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    one = editor("simie", steps=2, contexts=0)
    one.edit(FIRST)
    before, states = everything(one), one._layers
    add, calls = one._weights.add, []

    def fail(layer: int, update: torch.Tensor) -> None:
        calls.append(layer)
        add(layer, update)
        if len(calls) == 6:  # two for the removal, two of the editor underneath, the second of SimIE itself
            raise RuntimeError("in the last layer")

    monkeypatch.setattr(one._weights, "add", fail)
    with pytest.raises(RuntimeError, match="in the last layer"):
        one.edit([NEW], on_conflict="replace")
    assert calls == [1, 2, 1, 2, 1, 2]
    assert one._layers is states
    assert differing(everything(one), before) == []


def test_a_method_that_cannot_remove_cannot_replace() -> None:
    one = editor("evoedit", steps=2, contexts=0)
    one.edit(FIRST)
    before = everything(one)
    with pytest.raises(ValueError, match="cannot take single edits back"):
        one.edit([NEW], on_conflict="replace")
    assert differing(everything(one), before) == []
    one.edit(facts(1, 8), on_conflict="replace")  # nothing to replace
