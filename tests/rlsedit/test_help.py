"""What a newcomer reads first: every command shows examples that it takes, and says what an option is by default."""

from __future__ import annotations

import argparse
import shlex

import pytest

from rlsedit.cli import main
from rlsedit.cli.main import build_parser


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


@pytest.mark.parametrize("name", [*commands(), None])
def test_help_has_examples_that_are_taken(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"] if name is None else [name, "--help"]) == 0
    text = capsys.readouterr().out
    lines = [line.strip() for line in text[text.index("\nexamples:\n") :].splitlines()[2:]]
    assert lines
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "rlsedit"
        assert name in (None, words[0])
        if words[-1] != "--help":
            assert build_parser().parse_args(words).command == words[0]


@pytest.mark.parametrize("name", commands())
def test_help_says_what_an_option_is_by_default(name: str) -> None:
    parser = commands()[name]
    assert parser.description is not None
    assert not parser.description.split()[0].endswith("s"), "in the imperative, like the others"
    for action in parser._actions:
        if isinstance(action.default, (int, float, str)) and action.default not in (False, argparse.SUPPRESS):
            told = (action.help or "") % {"default": action.default}
            shown = f"{action.default:g}" if isinstance(action.default, float) else str(action.default)
            assert "default" in told, action.option_strings
            assert shown in told, action.option_strings
