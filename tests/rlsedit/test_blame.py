"""What is wrong with a file or a name is said with the option, or the argument, that has given it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsedit.cli import main

FACT = '{"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("edit none --facts none --out o", "--facts: none: No such file or directory"),
        ("edit none --facts empty --out o", "--facts: empty: a folder, needs a file with one fact per line"),
        ("edit none --facts bad --out o", "--facts: bad:1: prompt is missing"),
        ("edit none --facts facts --out o", "MODEL: none is no folder"),
        ("evaluate empty --facts facts", "MODEL: empty has no config.json"),
        ("evaluate --plan none --out o", "--plan: none: No such file or directory"),
        ("evaluate --plan bad --out o", "--plan: bad: not valid TOML"),
        ("evaluate --from empty", "--from: empty: no evaluation in this folder"),
        ("evaluate --from full", "--from: full is not empty and holds no evaluation"),
        ("evaluate none --facts facts --methods rlsedit --out full", "--out: full is not empty and holds no eval"),
        ("evaluate none --facts facts --methods rlsedit --out facts", "--out: facts is a file, needs a folder"),
        ("evaluate none --facts facts --methods rlsedit --text none --out o", "--text: no file none"),
        ("evaluate none --facts facts --methods rlsedit --ability sst=none --out o", "--ability: no file none for sst"),
        ("evaluate none --facts facts --methods , --out o", "--methods: needs names with commas between them, got ','"),
        ("ability none --task sst=none", "--task: none: No such file or directory"),
        ("ability none --task sst=bad", "--task: bad:1: sentence is missing"),
        ("export empty --base none --to lora --out o", "--base: none is no folder"),
        ("log none", "DIR: none holds no edits"),
        ("log empty --check", "DIR: empty holds no edits"),
        ("remove empty x", "DIR: empty holds no edits"),
        ("profile --model none --facts facts", "--model: none is no folder"),
        ("profile --model none --facts facts --methods x", "--methods: method must be one of"),
        ("stability --stream none", "--stream: no file none"),
        ("stability --condition 0", "--condition: needs a number of at least 1, got '0'"),
        ("stability --streams x", "--streams: name must be condition-X with X >= 1"),
        ("facts --out o --relations x", "--relations: relations must be among"),
    ],
)
def test_a_message_names_the_option(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    (tmp_path / "facts").write_text(FACT)
    (tmp_path / "bad").write_text('{"a": 1}\n')
    assert main(line.split()) == 2
    told = capsys.readouterr().err.replace("argument ", "")
    assert message in told
    assert told.count("\n") == 1
