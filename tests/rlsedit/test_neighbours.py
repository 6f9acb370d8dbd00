"""Neighbours that the facts themselves edit: which they are, and that no command measures them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import language_models as lm

from rlsedit.cli import main
from rlsedit.compare import compare
from rlsedit.facts import Fact, save_facts, without_edited_neighbours
from rlsedit.models import Adapter

SAID = "1 of 2 neighbours are edited by these facts themselves and are not measured"


def test_without_relations_an_edited_neighbour_is_told_by_the_answer_that_was_right() -> None:
    """Locality of zsRE (KnowEdit) asks for another property of the subject that is edited."""
    own = Fact("a", "Which family is {} of?", "Ibis", "Noctuidae", "Aves", (), ("The rank of Ibis is",), ("genus",))
    other = Fact(
        "b", "{} is of", "Moth", "Aves", "Noctuidae", (), ("Ibis belongs to", "The rank of Ibis is"), ("Aves", "genus")
    )
    same = Fact("c", "{} has", "Wren", "teeth", None, (), ("Moth is of",), ("something",))
    found = without_edited_neighbours([own, other, same])
    assert [fact.neighbours for fact in found] == [("The rank of Ibis is",), ("The rank of Ibis is",), ()]
    assert [fact.neighbour_answers for fact in found] == [("genus",), ("genus",), ()]


def test_neighbours_that_are_edited_are_none() -> None:
    stream = [
        Fact("a", "{} is in", "Lima", "Norway", "Peru", (), ("Oslo is in", "Osloville is in", "Rome is in"),
             ("Norway", "France", "Italy"), "in"),
        Fact("b", "{} is in", "Oslo", "Peru", "Norway", (), ("Lima is in", "Bern is in"), (), "in"),
        Fact("c", "{} is by", "Rome", "Bach", "Verdi", (), ("Oslo is by",), (), "by"),
    ]  # fmt: skip
    found = without_edited_neighbours(stream)
    assert found[0].neighbours == ("Osloville is in", "Rome is in")  # Rome is edited under another relation
    assert found[0].neighbour_answers == ("France", "Italy")
    assert found[1].neighbours == ("Bern is in",)
    assert found[2].neighbours == ("Oslo is by",)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, and its facts with one more, about a neighbour of another."""
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    lm.tiny("llama", torch.float32).save_pretrained(tmp_path / "llama")
    lm.tokenizer().save_pretrained(tmp_path / "llama")
    save_facts(facts(), tmp_path / "facts.jsonl")
    (tmp_path / "text.txt").write_text("\n\n".join(lm.SENTENCES * 3), encoding="utf-8")
    return tmp_path


def facts() -> list[Fact]:
    tongue, capital, twin, _ = (replace(fact, relation=name) for fact, name in zip(lm.FACTS, "abcd", strict=True))
    return [tongue, capital, twin, Fact("e", "{} is the capital of", "Oslo", "Peru", "Norway", relation="b")]


def with_neighbours(rows: list[dict[str, Any]]) -> list[str]:
    """Ids of the facts of which a neighbour was measured; the one of "b" asks for the capital that "e" changes."""
    return [row["id"] for row in rows if row["neighbourhood_success"] is not None]


def test_no_command_measures_them(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, more = str(files / "llama"), ["--facts", str(files / "facts.jsonl"), "--device", "cpu"]
    assert main(["evaluate", model, *more, "--out", str(files / "scores.json")]) == 0
    assert SAID in capsys.readouterr().out
    assert with_neighbours(json.loads((files / "scores.json").read_text())["rows"]) == ["a"]
    settings = ("steps=3", "contexts=1", "context_length=3", "mom2_weight=20")
    more += ["--text", str(files / "text.txt"), "--layers", "1-2", "--batch", "2", *(f"--set={s}" for s in settings)]
    assert main(["edit", model, *more, "--out", str(files / "out")]) == 0
    assert SAID in capsys.readouterr().out
    report = json.loads((files / "out" / "rlsedit-report.json").read_text())
    assert with_neighbours(report["before"]["rows"]) == with_neighbours(report["after"]["rows"]) == ["a"]
    assert main(["evaluate", model, *more, "--compare", "memit", "--out", str(files / "table.json")]) == 0
    assert SAID in capsys.readouterr().out


def test_a_comparison_of_methods_does_not_measure_them() -> None:
    model = lm.tiny("llama", torch.float32)
    found = compare(
        Adapter.for_model(model), lm.tokenizer(), facts(), {"memit": lm.CONFIG}, lm.random_moments(model, (1, 2)),
        batch_size=2,
    )  # fmt: skip
    assert with_neighbours(found[0].scores.rows) == ["a"]
