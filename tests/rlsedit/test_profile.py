"""`rlsedit profile`: tables, files, wrong input, and whole edits of a small model."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch
from support import language_models as lm
from support import markdown

from rlsedit.cli import main
from rlsedit.facts import save_facts
from rlsedit.report import profile_plots, profile_tables
from rlsedit_kernels import profile
from rlsedit_kernels.profile import Ceilings, Row, StageRow, Times

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
    assert table.count("| plain torch Woodbury |") == 2  # its row, and its stages
    assert "4 keys, state and weight; 1 layer of d = 32, v = 8, float32, cpu" in table
    assert "error: |W - W_exact|" in table
    costs, stages = markdown.tables(table)
    assert costs[0][1:4] == ["a batch", "calls", "p20 .. p80"]
    assert stages[0][:3] == ["", "stage", "time"]
    assert "d = 32, v = 8, float32, cpu" in text
    for name in ("cost.svg", "cost.png", "roofline.svg", "roofline.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_from_and_compare(tmp_path, capsys) -> None:
    for name in ("a", "b"):
        assert main([*SMALL, "--only", "woodbury", "--out", str(tmp_path / f"{name}.json")]) == 0
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
        (["--sweep", "u=2,4"], "u", ("u 2", "u 4")),
        (["--sweep", "layers=1,2"], "layers", ("layers 1", "layers 2")),
    ],
)
def test_growth(flags, kind, heads, tmp_path, capsys) -> None:
    swept = {"d": "--dk", "u": "--batch"}.get(kind)  # has no effect beside --sweep
    small = SMALL if swept is None else [*SMALL[: SMALL.index(swept)], *SMALL[SMALL.index(swept) + 2 :]]
    assert main([*small, *flags, "--only", "layers at once", "--only", "woodbury", "--out", str(tmp_path / "o")]) == 0
    text = capsys.readouterr().out
    assert all(head in text for head in heads)
    assert "last / first" in text
    assert profile.load(tmp_path / "o" / "profile.json").kind == kind
    assert (tmp_path / "o" / "growth.svg").stat().st_size > 1000
    page = (tmp_path / "o" / "profile.md").read_text()
    assert len(markdown.tables(page)) == 2
    assert "v = 8, float32, cpu" in page
    assert "error: |W - W_exact|" in page


def test_what_is_left_out_says_why_and_can_be_extrapolated(capsys) -> None:
    small = [*SMALL, "--dk", "64", "--only", "MEMIT"]
    assert main([*small, "--longest", "1e-9"]) == 1  # nothing at all was measured
    assert "MEMIT, float64: skipped: a batch would take about" in capsys.readouterr().out
    assert main([*small, "--longest", "1e-6", "--extrapolate"]) == 0
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
        (["--shape", "gpt2-xl", "--dk", "8", "--dv", "5"], "give a shape, or --dk and --dv"),
        (["--dk", "5", "--dv", "5"], "--dk: needs a whole number of at least 8, got 5"),
        (["--dk", "16"], "--dk and --dv: give both"),
        (["--dk", "16", "--dv", "4", "--only", "nobody"], "none is called 'nobody'"),
        (["--dk", "16", "--dv", "4", "--only", ""], "--only: needs a part of a name, got ''"),
        (["--history", "10000000000000000000"], "--history: needs a whole number of at most 9223372036854775807"),
        (["--dk", "1000000", "--dv", "1000000", "--memory", "1"], "1.0 GB may be used; --memory says otherwise"),
        (["--sweep", "d=16,1000000", "--dv", "1000000", "--memory", "9"], "d = 1000000, v = 1000000, u = 100: weight"),
        (["--sweep", "v=3,4"], "needs d=.., u=.. or layers=.."),
        (["--history", "0,0"], "needs each number once"),
        (["--history", "0,2", "--sweep", "d=16,32"], "one at a time"),
        (["--dtype", "bfloat16"], "float32 or float64"),
        (["--compare", "nowhere.json", "nowhere.json"], "--compare: nowhere.json: No such file"),
        (["--from", "nowhere.json"], "--from: nowhere.json: No such file"),
        (["--from", str(Path(__file__))], "--from: "),
        (["--model", "smollm2"], "--model and --facts: give both"),
        (["--model", "smollm2", "--facts", "nowhere.jsonl", "--methods", "rlsedit,nobody"], "nobody"),
        (["--model", "smollm2", "--facts", "nowhere.jsonl", "--methods", "memit,memit"], "each method once"),
        (["--model", "smollm2", "--facts", "nowhere.jsonl"], "--facts: nowhere.jsonl: No such file"),
        (["--seconds", "0", "--dk", "16", "--dv", "4"], "--seconds: needs a number above 0, got '0'"),
        (["--longest", "nan"], "--longest: needs a number above 0, got 'nan'"),
        (["--memory", "x"], "--memory: needs a number above 0, got 'x'"),
        (["--limit", "3"], "--limit: has no effect without --model"),
        (["--trace", "there", "--dk", "16", "--dv", "4"], "--trace: has no effect without --model"),
        (
            ["--model", "smollm2", "--facts", "nowhere.jsonl", "--shape", "gpt2-xl"],
            "--shape: has no effect with --model",
        ),
        (
            ["--model", "smollm2", "--facts", "nowhere.jsonl", "--layers", "x"],
            "--layers: needs layers such as",
        ),
        (["--from", "nowhere.json", "--repeat", "3"], "--repeat: has no effect with --from"),
        (["--compare", "a.json", "b.json", "--out", "o"], "--out: has no effect with --compare"),
        (["--sweep", "d=8,16", "--extrapolate"], "--extrapolate: has no effect with --sweep"),
        (["--sweep", "u=2,4", "--batch", "100"], "--batch: has no effect with --sweep u="),
        (["--sweep", "d=8,16", "--dk", "8", "--dv", "4"], "--dk: has no effect with --sweep d="),
        (["--sweep", "layers=1,2", "--layer-count", "2"], "--layer-count: has no effect with --sweep layers="),
        (["--sweep", "u=0,2"], "--sweep: needs whole numbers of at least 1, got 'u=0,2'"),
        (["--sweep", "d=4,8"], "d must be an int of at least 8, got 4"),
        (["--layers", "4-8"], "--layers: has no effect without --model"),
        (["--layer-count", "2", "--model", "smollm2", "--facts", "x"], "--layer-count: has no effect with --model"),
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
            "--text", str(files / "text.txt"), "--layers", "1-2", "--set", "steps=3", "--set", "contexts=1",
            "--set", "context_length=3", "--set", "mom2_weight=20", "--device", "cpu", *more]  # fmt: skip


def test_whole_edits_of_a_model(files, capsys, monkeypatch) -> None:
    from rlsedit import profiling

    monkeypatch.setattr(profiling, "ceilings", lambda device: CEILINGS)
    before = {path.name: path.read_bytes() for path in (files / "model").iterdir()}
    trace, out = files / "trace", files / "edit.json"
    assert main(whole_edit(files, "--trace", str(trace), "--out", str(out))) == 0
    text = capsys.readouterr().out
    assert "alphaedit_dense" in text
    assert "z*" in text
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


def test_out_of_whole_edits_has_tables_and_figures(files, capsys, monkeypatch) -> None:
    from rlsedit import profiling

    monkeypatch.setattr(profiling, "ceilings", lambda device: CEILINGS)
    out = files / "out"
    assert main(whole_edit(files, "--methods", "rlsedit,ft", "--set", "ft_steps=2", "--out", str(out))) == 0
    text = capsys.readouterr().out
    assert {"profile.json", "profile.md", "stages.svg", "stages.png"} == {path.name for path in out.iterdir()}
    assert all(path.name in text for path in out.iterdir())
    sizes = "LlamaForCausalLM: 4 facts, batches of 2; 2 layers of d = 48, v = 32, float32, cpu."
    page = (out / "profile.md").read_text()
    for shown in (text, page):
        assert sizes in shown
        assert "the steps of fine-tuning are its update" in shown
    ((header, *rows),) = markdown.tables(page)
    found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert found["ft"]["z*"] == "0 us (0.0 %)"
    assert float(found["ft"]["update"].split("(")[1].split()[0]) > 50
    assert float(found["rlsedit"]["z*"].split("(")[1].split()[0]) > 50


def many(names: list[str], **more) -> profile.Profile:
    """Rows of equal work; the last takes a hundred times as long, beside a slower baseline."""
    problem = {"d": 8, "v": 4, "u": 2, "layers": 1, "dtype": "float32", "device": "cpu", "history": 0}
    stages = (StageRow("all", 0.1, 1e6, 1e6, 0.5),)
    rows = [
        Row(name, "", "measured", "", problem, Times(0.1, 0.1, 0.1, 3), 1.0, stages, 1e6, 1e6, baseline=0.1,
            baseline_repetitions=3)
        for name in names
    ]  # fmt: skip
    rows[-1] = dataclasses.replace(rows[-1], times=Times(10.0, 9.0, 11.0, 2), ratio=50.0, baseline=0.2)
    kind = {"kind": "shape", **more}["kind"]
    return profile.Profile(kind, {"cpu": "x"}, CEILINGS, {"baseline": names[0], "cold": True}, tuple(rows))


def test_a_ratio_stands_beside_what_it_is_to() -> None:
    result = many(["base", "other", "slow"])
    ((header, *rows), _) = markdown.tables(profile_tables.markdown(result))
    row = dict(zip(header, rows[-1], strict=True))
    assert (row["a batch"], row["calls"], row["ratio"], row["to"]) == ("10.00 s", "2", "50", "200.0 ms (3)")
    assert "ratio: to 'base' in turns" in profile_tables.profile_table(result)
    older = dataclasses.replace(
        result, rows=tuple(dataclasses.replace(r, baseline=None, baseline_repetitions=None) for r in result.rows)
    )
    ((header, *rows), _) = markdown.tables(profile_tables.markdown(older))
    assert dict(zip(header, rows[-1], strict=True))["to"] == "200.0 ms"


def test_a_bar_has_its_ratio_and_what_it_is_to(tmp_path, monkeypatch) -> None:
    texts = []
    monkeypatch.setattr(
        profile_plots, "_finish", lambda figure, axis, path: texts.extend(t.get_text() for t in axis.texts)
    )
    profile_plots.plot_bars(many(["base", "other", "slow"]), tmp_path / "x.svg")
    assert texts == ["100.0 ms  (1x)", "100.0 ms  (1x)", "10.00 s  (50 x 200.0 ms)"]


@pytest.mark.parametrize("draw", ["plot_roofline", "plot_axis"])
def test_no_two_contenders_look_alike_in_grey(draw, tmp_path, monkeypatch) -> None:
    names = [one.name for one in profile.catalogue("cpu", 2)] + [f"rlsedit, ops [{i}]" for i in range(8)]
    names += [f"one's own {i}" for i in range(8)]
    seen = []

    def look(figure, axis, path) -> None:
        handles = axis.get_legend().legend_handles
        seen.extend((h.get_marker(), h.get_fillstyle()) for h in handles if h.get_marker() != "None")

    monkeypatch.setattr(profile_plots, "_finish", look)
    getattr(profile_plots, draw)(many(names, kind="history" if draw == "plot_axis" else "shape"), tmp_path / "x.svg")
    assert len(seen) == len(set(seen)) == len(names)


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
        model, tokenizer, lm.FACTS, {"rlsedit": config}, moments, batch_size=3, adapter=adapter,
        progress=lambda name, event: seen.append(event.stage),
    )  # fmt: skip
    assert "solve" in seen
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="at least one each"):
        profile_edit(model, tokenizer, [], {"rlsedit": config}, moments, batch_size=3)
