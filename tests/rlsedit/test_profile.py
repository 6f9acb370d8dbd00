"""`rlsedit profile`: tables, files, wrong input, and whole edits of a small model."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from support import language_models as lm

from rlsedit.cli import main
from rlsedit.facts import save_facts
from rlsedit_kernels import profile
from rlsedit_kernels.profile import Ceilings

CEILINGS = Ceilings(1e10, {"float32": 1e11, "float64": 5e10})
SMALL = ["profile", "--dk", "32", "--dv", "8", "--batch", "4", "--repeat", "2", "--warm", "--device", "cpu"]


@pytest.fixture(autouse=True)
def no_ceilings(monkeypatch) -> None:
    """Seconds of copies and products that say nothing here."""
    for module in ("measuring", "growth"):
        monkeypatch.setattr(
            f"rlsedit_kernels.profile.{module}.ceilings",
            lambda device: Ceilings(1e10, {"float32": 1e11, "float64": 5e10}),
        )


def test_one_shape(tmp_path, capsys) -> None:
    assert main([*SMALL, "--only", "woodbury", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "plain torch Woodbury" in text
    assert "rlsedit, ops" in text  # what it is compared with comes along
    assert "AlphaEdit" not in text
    assert "products" in text  # a stage
    result = profile.load(tmp_path / "out" / "profile.json")
    assert {row.status for row in result.rows} == {"measured"}
    table = (tmp_path / "out" / "profile.md").read_text()
    assert table.count("| plain torch Woodbury |") == 1
    for name in ("cost.svg", "cost.png", "roofline.svg", "roofline.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_from_and_compare(tmp_path, capsys) -> None:
    for name in ("a", "b"):
        assert main([*SMALL, "--only", "woodbury", "--json", str(tmp_path / f"{name}.json")]) == 0
    capsys.readouterr()
    assert main(["profile", "--from", str(tmp_path / "a.json")]) == 0
    assert "plain torch Woodbury" in capsys.readouterr().out
    assert main(["profile", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert "second / first" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "kind", "heads"),
    [
        (["--history", "0,3"], "history", ("after 0", "after 3")),
        (["--sweep", "d=16,24"], "d", ("d 16", "d 24")),
        (["--sweep", "layers=1,2"], "layers", ("layers 1", "layers 2")),
    ],
)
def test_growth(flags, kind, heads, tmp_path, capsys) -> None:
    assert main([*SMALL, *flags, "--only", "layers at once", "--only", "woodbury", "--out", str(tmp_path / "o")]) == 0
    text = capsys.readouterr().out
    assert all(head in text for head in heads)
    assert "last / first" in text
    assert profile.load(tmp_path / "o" / "profile.json").kind == kind
    assert (tmp_path / "o" / "growth.svg").stat().st_size > 1000


def test_what_is_left_out_says_why_and_can_be_extrapolated(capsys) -> None:
    small = [*SMALL, "--dk", "64", "--only", "MEMIT"]
    assert main([*small, "--limit", "1e-9"]) == 1  # nothing at all was measured
    assert "MEMIT, float64: skipped: a batch would take about" in capsys.readouterr().out
    assert main([*small, "--limit", "1e-6", "--extrapolate"]) == 0
    text = capsys.readouterr().out
    assert "~ " in text
    assert "MEMIT, float64: extrapolated" in text


def test_list(capsys) -> None:
    assert main(["profile", "--list"]) == 0
    text = capsys.readouterr().out
    assert "llama3-8b" in text
    assert "14336" in text
    assert "MEMIT, float64" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "gpt-9"], "--shape: must be one of"),
        (["--shape", "gpt2-xl", "--dk", "5", "--dv", "5"], "give a shape, or --dk and --dv"),
        (["--dk", "16"], "--dk and --dv: give both"),
        (["--dk", "16", "--dv", "4", "--only", "nobody"], "none is called 'nobody'"),
        (["--sweep", "v=3,4"], "needs d=.., u=.. or layers=.."),
        (["--history", "0,0"], "needs each number once"),
        (["--history", "0,2", "--sweep", "d=16,32"], "one at a time"),
        (["--dtype", "bfloat16"], "float32 or float64"),
        (["--compare", "nowhere.json", "nowhere.json"], "nowhere.json"),
        (["--from", "nowhere.json"], "nowhere.json"),
        (["--model", "smollm2"], "--model and --facts: give both"),
        (["--model", "smollm2", "--facts", "nowhere.jsonl", "--methods", "rlsedit,nobody"], "nobody"),
        (["--model", "smollm2", "--facts", "nowhere.jsonl", "--methods", "memit,memit"], "each method once"),
        (["--model", "smollm2", "--facts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--seconds", "0", "--dk", "16", "--dv", "4"], "seconds must be positive"),
    ],
)
def test_wrong_input_is_one_line(flags, message, capsys) -> None:
    assert main(["profile", *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    save_facts(lm.FACTS, tmp_path / "facts.jsonl")
    (tmp_path / "text.txt").write_text("\n\n".join(lm.SENTENCES * 3), encoding="utf-8")
    lm.tiny("llama", torch.float32).save_pretrained(tmp_path / "model")
    lm.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def whole_edit(files, *more: str) -> list[str]:
    return ["profile", "--model", str(files / "model"), "--facts", str(files / "facts.jsonl"), "--batch", "2",
            "--text", str(files / "text.txt"), "--edited", "1-2", "--set", "steps=3", "--set", "contexts=1",
            "--set", "context_length=3", "--set", "mom2_weight=20", "--device", "cpu", *more]  # fmt: skip


def test_whole_edits_of_a_model(files, capsys, monkeypatch) -> None:
    from rlsedit import profiling

    monkeypatch.setattr(profiling, "ceilings", lambda device: CEILINGS)
    before = {path.name: path.read_bytes() for path in (files / "model").iterdir()}
    trace, out = files / "trace", files / "edit.json"
    assert main(whole_edit(files, "--trace", str(trace), "--json", str(out))) == 0
    text = capsys.readouterr().out
    assert "alphaedit_dense" in text
    assert "targets" in text
    result = profile.load(out)
    assert result.kind == "edit"
    assert [row.name for row in result.rows] == ["rlsedit", "alphaedit_dense"]
    for row in result.rows:
        assert row.problem["u"] == 2
        assert row.problem["layers"] == 2
        assert sum(stage.seconds for stage in row.stages) == pytest.approx(row.times.median, rel=0.5)
        events = json.loads(gzip.decompress((trace / f"{row.name}.json.gz").read_bytes()))["traceEvents"]
        assert {"rlsedit: targets", "rlsedit: solve"} <= {event.get("name") for event in events}
    assert result.rows[0].ratio == 1.0
    assert before == {path.name: path.read_bytes() for path in (files / "model").iterdir()}
    assert main(["profile", "--from", str(out)]) == 0
    assert "alphaedit_dense" in capsys.readouterr().out


def test_the_model_gets_its_weights_back(files) -> None:
    from rlsedit import EditConfig
    from rlsedit.models import Adapter
    from rlsedit.profiling import profile_edit

    model, tokenizer = lm.tiny("llama", torch.float32), lm.tokenizer()
    adapter = Adapter.for_model(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = EditConfig.for_model(model, "rlsedit", layers=(1,), steps=2, contexts=1, context_length=3)
    moments = {1: torch.eye(adapter.rows(1).shape[0], dtype=torch.float64)}
    seen = []
    profile_edit(
        model, tokenizer, lm.FACTS, {"rlsedit": config}, moments, batch=3, adapter=adapter,
        progress=lambda name, event: seen.append(event.stage),
    )  # fmt: skip
    assert "solve" in seen
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="at least one each"):
        profile_edit(model, tokenizer, [], {"rlsedit": config}, moments, batch=3)
