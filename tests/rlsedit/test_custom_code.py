"""A model folder with code of its own: the code is never run, and nothing is asked on standard input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import language_models as lm
from support.commands import given
from support.editors import facts

from rlsedit.cli import main
from rlsedit.facts import save_facts


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of an unknown type, which its folder has the classes of."""
    lm.on_disk(tmp_path)
    file = tmp_path / "llama" / "config.json"
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config = {**json.loads(file.read_text()), "model_type": "own", "architectures": ["Model"], "auto_map": classes}
    file.write_text(json.dumps(config))
    (tmp_path / "llama" / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    save_facts(facts(2), tmp_path / "facts.jsonl")
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "edit llama --facts facts.jsonl --out out --layers 1-2",
        "edit llama --facts - --out out --layers 1-2",
        "evaluate llama --facts facts.jsonl",
        "ability llama --task perplexity=text.txt",
        "export llama --base llama --to hf --out out",
    ],
)
def test_it_is_refused(
    here: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given(monkeypatch, b"y\n")
    assert main(command.split()) == 2
    shown = capsys.readouterr()
    assert "contains custom code" in shown.err.splitlines()[-1]
    assert "y/N" not in shown.out + shown.err
    assert not (here / "run").exists()
