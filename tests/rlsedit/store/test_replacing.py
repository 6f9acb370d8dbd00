"""--on-conflict replace: the later fact wins, however many lines arrive together and whatever the model had before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from support.commands import answers, arriving, edit, given, resume, states, written
from support.editors import facts

from rlsedit.cli import main
from rlsedit.facts import Fact

pytestmark = pytest.mark.usefixtures("cache")

A, OTHER = facts(2)
B, C = replace(A, id="b", target_new="Quito"), replace(A, id="c", target_new="Sydney")
SAME_ID = replace(OTHER, id=A.id, subject="Tokyo")
REPLACE = ("--on-conflict", "replace")

ARRIVALS = {
    "what is in the model, behind what replaces it": [B, A],
    "so, and something new about it": [B, A, C, OTHER],
    "twice, and something new about it": [B, B, C],
    "the id of what is replaced": [B, SAME_ID],
    "there and back": [B, C, A, B, A, C],
}


@pytest.fixture(scope="module")
def holding(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose model holds A."""
    folder = tmp_path_factory.mktemp("holding")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSEDIT_CACHE", str(root / "cache"))
        assert main(edit(root, written(folder / "a.jsonl", [A.to_dict()]), folder / "out")) == 0
    return folder / "out"


@pytest.mark.parametrize("again", [(), ("--again",)], ids=["", "again"])
@pytest.mark.parametrize("some", ARRIVALS.values(), ids=list(ARRIVALS))
def test_lines_that_arrive_together_are_answered_as_if_they_came_one_by_one(
    holding: Path, root: Path, tmp_path: Path, some: list[Fact], again: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def answered(size: int) -> tuple[Any, dict[str, str]]:
        out = shutil.copytree(holding, tmp_path / str(size))
        arriving(monkeypatch, repeat(size))
        given(monkeypatch, *(fact.to_dict() for fact in some))
        capsys.readouterr()
        assert main(resume(root / "llama", "-", out, *REPLACE, *again)) == 0
        found = sorted((a["id"], a["status"], str(a.get("replaced"))) for a in answers(capsys))
        return found, states(out)

    assert answered(len(some)) == answered(1)


def test_a_line_that_the_next_one_replaces_says_where_it_was_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arriving(monkeypatch, repeat(2))
    given(monkeypatch, A.to_dict(), B.to_dict())
    assert main(edit(root, "-", tmp_path / "out", *REPLACE)) == 0
    assert answers(capsys) == [
        {"id": "f0", "status": "applied", "batch": 1},
        {"id": "b", "status": "applied", "batch": 2, "replaced": ["f0"]},
    ]


def test_what_was_written_and_replaced_is_not_written_again_when_the_batch_fails(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Facts about the same are written one after the other; the third of them fails."""
    from rlsedit.writing import targets

    real = targets.fact_rows

    def picky(tokenizer: Any, some: Any, contexts: Any) -> Any:
        if any(fact.id == "c" for fact in some):
            raise ValueError("the loss must be finite, got NaN")
        return real(tokenizer, some, contexts)

    monkeypatch.setattr(targets, "fact_rows", picky)
    arriving(monkeypatch, repeat(3))
    given(monkeypatch, *(fact.to_dict() for fact in (A, B, C)))
    assert main(edit(root, "-", tmp_path / "out", *REPLACE)) == 0
    found = [(a["id"], a["status"], a.get("batch")) for a in answers(capsys)]
    assert found == [("f0", "applied", 1), ("b", "applied", 2), ("c", "failed", None)]
    assert states(tmp_path / "out") == {"f0": "removed", "b": "applied", "c": "failed"}


def test_what_the_model_has_is_not_replaced_by_an_earlier_fact_of_a_file(
    holding: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(holding, tmp_path / "out")
    source = written(tmp_path / "f.jsonl", [fact.to_dict() for fact in (B, A, OTHER)])
    assert main(resume(root / "llama", source, out, *REPLACE)) == 0
    assert "left out 1 that later facts replace, which the model has already: b" in capsys.readouterr().out
    assert states(out) == {"f0": "applied", "f1": "applied"}
    assert main(resume(root / "llama", source, out)) == 0  # both are kept
    assert states(out) == {"f0": "applied", "f1": "applied", "b": "applied"}
