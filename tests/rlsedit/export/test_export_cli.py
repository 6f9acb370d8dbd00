"""`rlsedit export`: two plain folders in, three ways out; wrong input is one line and exit status 2."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import language_models as lm
from support.bits import same

from rlsedit.cli import main
from rlsedit.export import load_delta
from rlsedit.facts import save_facts


def command(edited: Path, to: str, out: Path, base: Path | None, *more: str) -> list[str]:
    return ["export", str(edited), "--to", to, "--out", str(out), *(["--base", str(base)] if base else []), *more]


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlsedit")
    assert error.count("\n") == 1, f"one line, got {error!r}"
    for word in words:
        assert word in error


@pytest.mark.parametrize("form", ["bits", "auto"])
def test_a_delta_there_and_back(pair: Any, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    delta = tmp_path / "edits.safetensors"
    assert main(command(pair.edited, "delta", delta, pair.base, "--form", form)) == 0
    shown = capsys.readouterr().out
    assert "2 weights: model.layers.1.mlp.down_proj, model.layers.2.mlp.down_proj" in shown
    assert f"written to {delta}" in shown
    assert "\x1b" not in shown
    assert main(command(delta, "hf", tmp_path / "out", pair.base)) == 0
    assert same(pair.load(tmp_path / "out"), pair.editor.model) == (form == "bits")
    assert main(command(delta, "lora", tmp_path / "lora", pair.base)) == 0
    assert "rank 4, exact to rounding; vLLM needs max_lora_rank 8" in capsys.readouterr().out
    fails(
        capsys, command(delta, "hf", tmp_path / "no", pair.edited), "layers.1.mlp.down_proj", "holds this edit already"
    )
    fails(capsys, command(delta, "delta", tmp_path / "no", pair.base), "is a delta already")
    assert not (tmp_path / "no").exists()


def test_a_folder(pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(pair.edited, "hf", tmp_path / "out", pair.base, "--link")) == 0
    assert "weight files differ from the base's" in capsys.readouterr().out
    assert same(pair.load(tmp_path / "out"), pair.editor.model)
    fails(capsys, command(pair.edited, "hf", tmp_path / "out", pair.base), "--out", "not empty", "--force")
    assert main(command(pair.edited, "hf", tmp_path / "out", pair.base, "--force")) == 0


def test_an_adapter_with_scores(pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_facts(lm.FACTS, tmp_path / "facts.jsonl")
    more = ["--rank", "2", "--facts", str(tmp_path / "facts.jsonl"), "--limit", "3", "--device", "cpu"]
    assert main(command(pair.edited, "lora", tmp_path / "out", pair.base, *more)) == 0
    shown = capsys.readouterr().out
    assert "efficacy lost to the rank" in shown
    assert "rank 2, truncated; vLLM needs max_lora_rank 8" in shown
    report = json.loads((tmp_path / "out" / "rlsedit-export.json").read_text())
    assert [row["id"] for row in report["scores"]["adapter"]["rows"]] == ["a", "b", "c"]
    assert report["base"]["name"] == str(pair.base)
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        pair.base
    )


def test_facts_without_a_former_answer(pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Success compares with it; the report is JSON for strict readers too."""
    save_facts([replace(fact, target_true=None) for fact in lm.FACTS], tmp_path / "facts.jsonl")
    more = ["--rank", "2", "--facts", str(tmp_path / "facts.jsonl"), "--device", "cpu"]
    assert main(command(pair.edited, "lora", tmp_path / "out", pair.base, *more)) == 0
    assert "nan" not in capsys.readouterr().out
    text = (tmp_path / "out" / "rlsedit-export.json").read_text()
    report = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert report["efficacy_loss"] is None
    assert report["scores"]["adapter"]["summary"]["efficacy_accuracy"]["count"] == len(lm.FACTS)


@pytest.mark.parametrize("more", [["--limit", "3"], ["--skip-bad"]])
def test_options_of_facts_without_facts(
    pair: Any, tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, command(pair.edited, "lora", tmp_path / "out", pair.base, *more), f"{more[0]} goes with --facts")


def test_half_precision_folders(make_pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = make_pair("llama", torch.bfloat16)
    assert main(command(pair.edited, "lora", tmp_path / "out", pair.base)) == 0
    assert "the error is the rounding of bfloat16 weights" in capsys.readouterr().out
    assert main(command(pair.edited, "delta", tmp_path / "d", pair.base)) == 0
    assert "bits" in capsys.readouterr().out


def test_what_an_edit_left_behind_is_read(pair: Any, tmp_path: Path) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(pair.edited, edited)
    (edited / "rlsedit-report.json").write_text(
        json.dumps({"method": "memit", "facts": {"written": 4}, "base": str(pair.base)})
    )
    assert main(command(edited, "delta", tmp_path / "d", None)) == 0
    assert (load_delta(tmp_path / "d").method, load_delta(tmp_path / "d").edits) == ("memit", 4)
    assert main(command(edited, "hf", tmp_path / "hf", None)) == 0
    report = json.loads((tmp_path / "hf" / "rlsedit-export.json").read_text())
    assert (report["kind"], report["method"], report["edits"]) == ("hf", "memit", 4)
    assert main(command(tmp_path / "hf", "delta", tmp_path / "again", pair.base)) == 0
    assert (load_delta(tmp_path / "again").method, load_delta(tmp_path / "again").edits) == ("memit", 4)


@pytest.mark.parametrize("content", ["", "[]", "3", '{"facts": 3}', '{"facts": {"written": null}, "base": 7}'])
def test_a_report_that_says_nothing(pair: Any, tmp_path: Path, content: str, capsys: Any) -> None:
    shutil.copytree(pair.edited, tmp_path / "edited")
    (tmp_path / "edited" / "rlsedit-report.json").write_text(content)
    fails(capsys, command(tmp_path / "edited", "delta", tmp_path / "d", None), "--base: needed")
    assert main(command(tmp_path / "edited", "delta", tmp_path / "d", pair.base)) == 0
    assert load_delta(tmp_path / "d").edits is None


def test_wrong_input_is_one_line(make_pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = make_pair()
    out, base, edited = tmp_path / "out", pair.base, pair.edited
    fails(capsys, command(edited, "zip", out, base), "--to", "hf", "delta", "lora")
    fails(capsys, command(tmp_path / "nothing", "hf", out, base), "no folder or delta", "nothing")
    fails(capsys, command(edited, "hf", out, tmp_path / "nothing"), "is no folder")
    fails(capsys, command(edited, "hf", out, tmp_path), "no config.json")
    fails(capsys, command(edited, "hf", out, None), "--base: needed")
    fails(capsys, command(base, "hf", out, base), "nothing to export")
    for there, words in (
        (base, "the model itself; needs another folder\n"),
        (edited, "the edited model itself; needs"),
    ):
        fails(capsys, command(edited, "hf", there, base), words)  # and no --resume, which there is not
    (tmp_path / "edits" / "rlsedit").mkdir(parents=True)
    fails(capsys, command(edited, "hf", tmp_path / "edits", base), "is not empty; needs another folder, or --force")
    fails(capsys, command(edited, "hf", edited, base, "--force"), "the edited model itself")
    fails(capsys, command(edited, "hf", out, make_pair("gpt2").base), "one architecture")
    fails(capsys, command(edited, "hf", out, base, "--rank", "3"), "--rank goes with --to lora, got --to hf")
    fails(capsys, command(edited, "lora", out, base, "--link"), "--link goes with --to hf")
    fails(capsys, command(edited, "lora", out, base, "--device", "cpu"), "--device goes with --facts")
    fails(capsys, command(edited, "lora", out, base, "--form", "bits"), "--form goes with --to delta")
    fails(capsys, command(edited, "lora", out, base, "--rank", "0"), "at least 1")
    fails(capsys, command(edited, "lora", out, base, "--rank", "99"), "rank must be in [1, 32]")
    fails(capsys, command(edited, "lora", out, base, "--facts", str(tmp_path / "none")), "none")
    fails(capsys, command(edited, "delta", tmp_path, base), "is a folder, needs a file")
    (tmp_path / "there").write_text("precious")
    fails(capsys, command(edited, "delta", tmp_path / "there", base), "--force")
    fails(capsys, command(tmp_path / "there", "hf", out, base), "there is no delta")
    assert (tmp_path / "there").read_text() == "precious"
    assert not out.exists()
