"""`rlsedit ability` and `run_task`, end to end on a tiny model; wrong input gives one line and exit status 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from support import language_models as lm

from rlsedit.cli import ability, main
from rlsedit.tasks import TASKS, TaskOptions, list_tasks, run_task


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    lm.tiny("llama", torch.float32, max_position_embeddings=512).save_pretrained(folder)
    lm.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("\n\n".join(lm.SENTENCES[:4]))
    records = [{"sentence": f"Oslo is a city {i}", "label": i % 2} for i in range(16)]
    (tmp_path / "sst.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sums = [{"question": f"{i} + 1?", "answer": f"It is {i + 1}\n#### {i + 1}"} for i in range(12)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sums))
    known = [{"known_id": i, "prompt": f"{name} is in", "attribute": "Peru"} for i, name in enumerate(["Lima", "Oslo"])]
    (tmp_path / "known.json").write_text(json.dumps(known))
    return tmp_path


def test_a_table_and_a_file(model: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = files / "ability.json"
    tasks = [f"perplexity={files / 'text.txt'}", f"sst={files / 'sst.jsonl'}", f"known={files / 'known.json'}"]
    command = ["ability", model, "--task", *tasks, "--limit", "3", "--shots", "1", "--window", "32", "--device", "cpu"]
    assert main([*command, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    for word in ("perplexity", "nll", "bits_per_byte", "accuracy", "mcc", "±", "known", "written to"):
        assert word in shown
    found = json.loads(out.read_text())
    assert list(found["tasks"]) == ["perplexity", "sst", "known"]
    assert found["options"]["limit"] == 3
    assert (found["options"]["window"], found["options"]["stride"]) == (32, 16)
    assert found["tasks"]["sst"]["file"] == "sst.jsonl"
    assert len(found["tasks"]["sst"]["rows"]) == 3
    assert found["tasks"]["sst"]["settings"]["shots"] == 1
    assert set(found["tasks"]["sst"]["summary"]["f1"]) == {"mean", "stderr", "count", "low", "high"}
    again = run_task("sst", lm.tiny("llama", torch.float32, max_position_embeddings=512), lm.tokenizer(),
                     files / "sst.jsonl", limit=3, options=TaskOptions(shots=1))  # fmt: skip
    assert found["tasks"]["sst"]["summary"]["accuracy"]["mean"] == pytest.approx(again.summary["accuracy"].mean)


def test_wrong_input(model: str, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    sst = f"sst={files / 'sst.jsonl'}"
    (files / "bad.jsonl").write_text('{"sentence": "x", "label": 1}\n{"sentence": "x"}\n')
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for arguments, words in (
        ([], ("--task", "at least one NAME=PATH")),
        (["--task", "chess=file"], ("NAME=PATH", "perplexity", "chess")),
        (["--task", "sst"], ("NAME=PATH", "'sst'")),
        (["--task", sst, sst], ("each task once",)),
        (["--task", f"sst={files / 'none.jsonl'}"], ("none.jsonl", "No such file")),
        (["--task", f"sst={files / 'bad.jsonl'}"], ("bad.jsonl:2: label is missing",)),
        (["--task", sst, "--shots", "11"], ("shots must be at most held_out = 10",)),
        (
            ["--task", f"gsm8k={files / 'gsm8k.jsonl'}", "--held-out", "3"],
            ("gsm8k: held_out must be at least the 5", "got 3"),
        ),
        (["--task", sst, "--shots", "-1"], ("shots", "at least 0", "-1")),
        (["--task", sst, "--stride", "600"], ("stride must be below window = 512",)),
        (["--task", sst, "--limit", "0"], ("--limit", "at least 1")),
        (["--task", f"sst={files / 'bad.jsonl'}", "--skip-bad"], ("needs more than 10 records",)),
        (["--lm-eval", "rte"], ("lm-eval", "not installed")),
    ):
        assert main(["ability", model, *arguments]) == 2
        error = capsys.readouterr().err
        last = error.splitlines()[-1]
        assert last.startswith("rlsedit")
        assert "Traceback" not in error
        for word in words:
            assert word in last, (arguments, last)


def test_files_are_read_before_the_model(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ability", "nowhere", "--task", f"sst={files / 'none.jsonl'}"]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_the_registry() -> None:
    assert tuple(list_tasks()) == ability.NAMES
    assert all(task.name == name and task.summary for name, task in TASKS.items())
    model, tokenizer = lm.tiny("llama"), lm.tokenizer()
    with pytest.raises(ValueError, match=r"name must be one of perplexity, .*got 'chess'"):
        run_task("chess", model, tokenizer, "x")
    with pytest.raises(TypeError, match="either path or records"):
        run_task("sst", model, tokenizer)
    with pytest.raises(TypeError, match="either path or records"):
        run_task("sst", model, tokenizer, "x", records=[])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"limit": 0}, "limit must be a whole number of at least 1, got 0"),
        ({"rows": 1.5}, "rows must be a whole number"),
        ({"samples": True}, "samples must be"),
        ({"window": 1}, "window must be"),
        ({"window": 10, "stride": 10}, "stride must be below window = 10"),
        ({"shots": 3, "held_out": 2}, "shots must be at most held_out = 2"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": float("nan")}, "top_p must be in"),
    ],
)
def test_wrong_options(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TaskOptions(**values)
