"""`rlsedit facts`: a file that the other commands read."""

from __future__ import annotations

import pytest

from rlsedit.cli import main
from rlsedit.facts import load_facts
from rlsedit.facts.sources import PACKAGES, TOWNS
from rlsedit.facts.world import world_facts

for package in (*PACKAGES, TOWNS):
    pytest.importorskip(package)


def test_the_file_holds_the_stream(tmp_path, capsys) -> None:
    out = tmp_path / "facts.jsonl"
    assert main(["facts", "--out", str(out), "--limit", "30", "--seed", "2"]) == 0
    assert load_facts(out) == world_facts(2, limit=30)
    assert "30 facts of 8 relations" in capsys.readouterr().out
    assert main(["facts", "--out", str(out), "--relations", "symbol,town", "--limit", "6", "--force"]) == 0
    assert {fact.relation for fact in load_facts(out)} == {"symbol", "town"}
    assert main(["facts", "--out", str(out), "--relations", "all", "--limit", "9", "--force"]) == 0
    assert len({fact.relation for fact in load_facts(out)}) == 9


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--relations", "mayor"], "got 'mayor'"),
        (["--limit", "0"], "needs a whole number of at least 1"),
        ([], "is there; needs another name"),
    ],
)
def test_wrong_input(flags, words, tmp_path, capsys) -> None:
    out = tmp_path / "facts.jsonl"
    if not flags:
        out.touch()
    assert main(["facts", "--out", str(out), *flags]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists() or out.stat().st_size == 0
