"""Streams on a tiny model: terms of the objective, checkpoints, resuming, failures, files, and the command."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from support import language_models as lm

from rlsedit import Editor
from rlsedit.cli import main
from rlsedit.config import EditConfig
from rlsedit.evaluation import Folder, Plan, run_plan, running
from rlsedit.evaluation.objective import Objective, listening
from rlsedit.facts import save_facts
from rlsedit.methods import get_method
from rlsedit.models import Adapter
from rlsedit.report.scores import finite

SMALL = {"layers": (1, 2), "steps": 3, "contexts": 1, "context_length": 3, "mom2_weight": 20, "null_threshold": 0.9}


@pytest.fixture
def model():
    return lm.tiny("llama")


def moments_of(adapter: Adapter) -> dict[int, torch.Tensor]:
    d = adapter.rows(1).shape[0]
    generator = torch.Generator().manual_seed(0)
    found = {}
    for n in (1, 2):
        X = torch.randn(4 * d, d, generator=generator, dtype=torch.float64)
        found[n] = X.mT @ X / (4 * d)
    return found


@pytest.fixture
def facts_file(tmp_path) -> Path:
    save_facts(lm.FACTS, tmp_path / "facts.jsonl")
    return tmp_path / "facts.jsonl"


def plan_of(file: Path, **changes) -> Plan:
    values = {"batch": 2, "first": 1, "methods": ("rlsedit", "memit"), "settings": {"all": SMALL}, **changes}
    return Plan("tiny", file, **values)


@pytest.mark.parametrize("name", ["rlsedit", "alphaedit", "memit", "rect", "prune", "rome"])
def test_terms_are_those_of_all_batches_at_once(model, name) -> None:
    """The running sums against V_s - K_s W formed anew for every batch from what the solvers were given."""
    adapter, tokenizer = Adapter.for_model(model), lm.tokenizer()
    moments = moments_of(adapter)
    single = get_method(name).single
    config = EditConfig.for_model(model, name, **{**SMALL, "layers": (2,) if single else (1, 2)})
    editor = Editor(model, tokenizer, name, config, moments=moments, adapter=adapter)
    method, given = editor.method, []
    editor.method = listening(method, given)
    grams = {n: 20 * moments[n] for n in config.layers}
    objective = Objective(adapter, config.layers, grams, given, lambda keys: method.noise(config, keys))
    first = {n: adapter.rows(n).double().clone() for n in config.layers}
    history: list[tuple[int, torch.Tensor, torch.Tensor, float]] = []

    def show(event) -> None:
        if event.stage != "batch":
            return
        for n, pairs in zip(config.layers, given, strict=True):
            for K, E in pairs:
                V = K.double() @ before[n] + E.double()
                history.append((n, K.double(), V, method.noise(config, len(K)) or 1.0))
            before[n] = adapter.rows(n).double().clone()
        objective.absorb()

    before = {n: weight.clone() for n, weight in first.items()}
    for i in range(0, 4, 2):
        editor.edit(lm.FACTS[i : i + 2], batch_size=2, progress=show, finish=i == 2)
    found = objective.terms()
    weights = {n: adapter.rows(n).double() for n in config.layers}
    fit = sum(float((V - K @ weights[n]).square().sum()) / noise for n, K, V, noise in history)
    assert history
    assert found.fit == pytest.approx(fit, rel=1e-8)
    assert found.parameter == pytest.approx(sum(float((weights[n] - first[n]).square().sum()) for n in first))
    anchor = sum(float(((weights[n] - first[n]).T @ grams[n] @ (weights[n] - first[n])).trace()) for n in first)
    assert found.anchor == pytest.approx(anchor)


def test_fine_tuning_has_no_fit(model, tmp_path, facts_file) -> None:
    adapter = Adapter.for_model(model)
    plan = plan_of(facts_file, methods=("ft",), settings={"ft": {"layers": (1,), "ft_steps": 2}})
    folder = Folder(tmp_path / "out")
    folder.begin(plan, {})
    (record,) = run_plan(plan, adapter, lm.tokenizer(), lm.FACTS, moments_of(adapter), folder)
    assert record.complete
    assert math.isnan(record.batches[-1]["fit"])
    assert record.batches[-1]["parameter"] > 0


def run(plan: Plan, model, out: Path, **more):
    adapter = Adapter.for_model(model)
    folder = Folder(out)
    folder.begin(plan, {})
    return run_plan(plan, adapter, lm.tokenizer(), lm.FACTS, moments_of(adapter), folder, **more), folder


def same(a, b) -> None:
    """But for times, two records say the same."""
    for mine, theirs in zip(a.batches, b.batches, strict=True):
        assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
    groups = [finite([entry["groups"] for entry in record.checkpoints]) for record in (a, b)]  # from disk, null for NaN
    assert groups[0] == groups[1]
    assert finite(a.rows) == finite(b.rows)


def test_checkpoints_and_the_weights_afterwards(model, tmp_path, facts_file) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told: list[tuple[str, float]] = []
    records, _ = run(plan_of(facts_file), model, tmp_path / "out", tell=lambda text, share: told.append((text, share)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for record in records:
        assert record.complete
        assert [entry["facts"] for entry in record.checkpoints] == [0, 4]
        assert [entry["facts"] for entry in record.batches] == [2, 4]
        assert set(record.checkpoints[0]["groups"]) == {"all"}
        assert set(record.checkpoints[1]["groups"]) == {"batch", "all", "first"}
        assert record.checkpoints[1]["groups"]["first"]["count"] == 1
        assert len(record.rows) == 4
    first, second = (record.checkpoints[0]["groups"] for record in records)
    assert finite(first) == finite(second)  # the same weights at the start
    shares = [share for _, share in told]
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert max(shares) > 0.9


def test_two_processes_may_share_a_plan(model, tmp_path, facts_file) -> None:
    plan = plan_of(facts_file)
    whole, _ = run(plan, model, tmp_path / "whole")
    parts, _ = run(plan, model, tmp_path / "shared", only=plan.methods[1:])
    assert [record.spec.method for record in parts] == list(plan.methods[1:])
    _, folder = run(plan, model, tmp_path / "shared", only=plan.methods[:1])
    for one, other in zip(whole, folder.runs(), strict=True):
        same(one, other)
    with pytest.raises(ValueError, match="methods must be of the plan"):
        run(plan, model, tmp_path / "shared", only=("ft",))


def test_a_stream_that_stops_goes_on_where_it_was(model, tmp_path, facts_file, monkeypatch) -> None:
    plan = plan_of(facts_file, checkpoints=(2,), methods=("rlsedit",))
    (whole,), _ = run(plan, model, tmp_path / "whole")
    real = running.evaluate
    calls = []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) > 4:  # behind the checkpoint at 2 facts, before the one at the end
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(running, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        run(plan, model, tmp_path / "out")
    half = Folder(tmp_path / "out").run(plan.runs[0])
    assert not half.complete
    assert [entry["facts"] for entry in half.checkpoints] == [0, 2]
    monkeypatch.setattr(running, "evaluate", real)
    optimised = []
    monkeypatch.setattr(
        "rlsedit.targets.cache.optimise_targets",
        lambda *args, **kwargs: optimised.append(1) or pytest.fail("z* was kept"),
    )
    (record,), _ = run(plan, model, tmp_path / "out")
    assert record.complete
    same(record, whole)
    assert [b["seconds"] for b in record.batches] == [b["seconds"] for b in half.batches]  # of when they were optimised


@pytest.mark.parametrize("kind", [ValueError, ArithmeticError, torch.linalg.LinAlgError, torch.OutOfMemoryError])
def test_a_method_that_fails_is_recorded_and_the_others_go_on(kind, model, tmp_path, facts_file, monkeypatch) -> None:
    from rlsedit.methods import solver

    real = solver.RecursionSolver.propose if hasattr(solver, "RecursionSolver") else None
    assert real is not None

    def breaks(self, keys, residual, bare=None):
        raise kind("the state has\nbroken down")

    plan = plan_of(facts_file, methods=("rlsedit", "ft"), settings={"all": {**SMALL, "layers": (1,)}})
    monkeypatch.setattr(solver.RecursionSolver, "propose", breaks)
    records, folder = run(plan, model, tmp_path / "out")
    assert [record.error for record in records] == ["the state has broken down", ""]
    assert records[1].complete
    monkeypatch.setattr(solver.RecursionSolver, "propose", real)
    records, _ = run(plan, model, tmp_path / "out")
    assert all(record.complete and not record.error for record in records)
    assert len(folder.runs()) == 2


def test_a_folder_belongs_to_one_plan(model, tmp_path, facts_file) -> None:
    folder = Folder(tmp_path / "out")
    folder.begin(plan_of(facts_file), {})
    Folder(tmp_path / "out").begin(plan_of(facts_file), {})
    with pytest.raises(ValueError, match="holds an evaluation with batch = 2, this one has 3"):
        folder.begin(plan_of(facts_file, batch=3), {})
    facts_file.write_text(facts_file.read_text() + "\n")
    with pytest.raises(ValueError, match="facts_sha256"):
        folder.begin(plan_of(facts_file), {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(ValueError, match="not empty and holds no evaluation"):
        Folder(tmp_path / "other")
    with pytest.raises(ValueError, match="is a file"):
        Folder(facts_file)


@pytest.mark.parametrize("field", ["text", "ability"])
def test_a_folder_belongs_to_what_is_in_its_files(field: str, tmp_path, facts_file) -> None:
    """The plan names them without their folder: another file of the same name made other moments and scores."""
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "text.txt").write_text(f"Text of {place}.")
    plans = [
        plan_of(facts_file, **{field: file if field == "text" else {"perplexity": file}})
        for file in (tmp_path / "a" / "text.txt", tmp_path / "b" / "text.txt")
    ]
    folder = Folder(tmp_path / "o")
    folder.begin(plans[0], {})
    with pytest.raises(ValueError, match="evaluation with files_sha256"):
        folder.begin(plans[1], {})
    (tmp_path / "b" / "text.txt").write_text("Text of a.")
    folder.begin(plans[1], {})
    file = tmp_path / "o" / "plan.json"
    older = json.loads(file.read_text())
    del older["plan"]["files_sha256"]
    file.write_text(json.dumps(older))
    folder.begin(plans[0], {})  # written before there were any
    assert folder.plan()["plan"]["files_sha256"]


def test_a_plan_may_grow_by_methods_and_change_what_has_not_begun(model, tmp_path, facts_file) -> None:
    own = {"all": SMALL, "memit": {"mom2_weight": 30.0}}
    _, folder = run(
        plan_of(facts_file, methods=("rlsedit", "memit"), settings=own), model, tmp_path / "o", only=("rlsedit",)
    )
    later = plan_of(facts_file, methods=("rlsedit", "memit", "ft"), settings={**own, "memit": {"mom2_weight": 40.0}})
    folder.begin(later, {})
    assert folder.plan()["plan"]["methods"] == ["rlsedit", "memit", "ft"]
    assert folder.plan()["plan"]["settings"]["memit"] == {"mom2_weight": 40.0}
    with pytest.raises(ValueError, match="evaluation with settings"):
        folder.begin(plan_of(facts_file, methods=later.methods, settings={**own, "rlsedit": {"lam": 1.0}}), {})
    with pytest.raises(ValueError, match="evaluation with methods"):
        folder.begin(plan_of(facts_file, methods=("rlsedit",), settings={"all": SMALL}), {})


def test_ability_is_measured_on_both_sides(model, tmp_path, facts_file) -> None:
    seen = []

    def ability(task: str, file) -> dict:
        seen.append((task, file.name, float(model.state_dict()["model.layers.1.mlp.down_proj.weight"].sum())))
        return {"accuracy": {"mean": 0.5, "stderr": 0.1, "count": 4, "low": None, "high": None}}

    plan = plan_of(facts_file, methods=("rlsedit",), ability={"sst": tmp_path / "sst.jsonl"})
    (record,), folder = run(plan, model, tmp_path / "out", ability=ability)
    assert [entry[:2] for entry in seen] == [("sst", "sst.jsonl")] * 2
    assert seen[0][2] != seen[1][2]  # before and behind the edits
    from rlsedit.evaluation.tables import tables

    (table,) = (t for t in tables(folder.runs()) if t.title == "Ability")
    assert table.rows == [["before", "0.5 ± 0.1"], ["rlsedit", "0.5 ± 0.1"]]
    assert record.ability["after"]["sst"]["accuracy"]["count"] == 4


def test_the_model_before_its_edits_is_measured_once(model, tmp_path, facts_file, monkeypatch) -> None:
    weight = model.state_dict()["model.layers.1.mlp.down_proj.weight"]
    start, scored, asked = weight.clone(), [], []
    real = running.evaluate
    monkeypatch.setattr(
        running, "evaluate", lambda *args, **kw: scored.append(torch.equal(weight, start)) or real(*args, **kw)
    )

    def ability(task: str, file) -> dict:
        asked.append(torch.equal(weight, start))
        return {"accuracy": {"mean": float(len(asked)), "stderr": 0.1, "count": 4, "low": None, "high": None}}

    plan = plan_of(facts_file, orders=(0, 3), ability={"sst": tmp_path / "sst.jsonl"})
    records, folder = run(plan, model, tmp_path / "out", ability=ability)
    assert (sum(scored), sum(asked)) == (2, 1), "scores once for each order, ability once"
    assert (len(scored), len(asked)) == (2 + 4 * 3, 1 + 4)
    for record, disk in zip(records, folder.runs(), strict=True):
        assert [entry["facts"] for entry in record.checkpoints] == [0, 4]
        assert record.ability["before"]["sst"]["accuracy"]["mean"] == 1.0
        assert disk.ability["before"] == record.ability["before"]
        first = next(r for r in records if r.spec.order == record.spec.order)
        assert finite(record.checkpoints[0]) == finite(first.checkpoints[0])


@pytest.fixture
def files(tmp_path, monkeypatch, facts_file):
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n\n".join(lm.SENTENCES * 3), encoding="utf-8")
    lm.tiny("llama", torch.float32).save_pretrained(tmp_path / "model")
    lm.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "plan.toml").write_text(
        """
model = "model"
facts = "facts.jsonl"
text = "text.txt"
methods = ["rlsedit", "memit"]
batch = 2
first = 1
checkpoints = [2]
metrics = ["counterfact", "writing"]
length = 8
device = "cpu"
[settings.all]
layers = [1, 2]
steps = 3
contexts = 1
context_length = 3
mom2_weight = 20
"""
    )
    return tmp_path


def test_the_command_writes_a_folder_that_can_be_drawn_again(files, capsys) -> None:
    out = files / "out"
    assert main(["evaluate", "--plan", str(files / "plan.toml"), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for title in ("Scores", "Retention", "Objective", "Speed"):
        assert title in text
    for name in (
        "results.json",
        "results.md",
        "index.html",
        "scores.svg",
        "retention.png",
        "objective.svg",
        "time.svg",
    ):
        assert (out / name).stat().st_size > 500, name
    results = json.loads((out / "results.json").read_text())
    assert results["schema"] == "rlsedit-evaluation/1"
    assert results["environment"]["packages"]["torch"] == torch.__version__
    assert [entry["complete"] for entry in results["runs"]] == [True, True]
    assert results["runs"][0]["config"]["steps"] == 3
    rows = list(csv.DictReader((out / "scores.csv").open()))
    summary = results["runs"][1]["checkpoints"][-1]["groups"]["all"]["counterfact"]["efficacy_success"]
    (row,) = (
        r for r in rows
        if (r["method"], r["facts"], r["group"], r["metric"]) == ("memit", "4", "all", "efficacy_success")
    )  # fmt: skip
    assert float(row["mean"]) == summary["mean"]
    assert len(list(csv.DictReader((out / "batches.csv").open()))) == 4
    page = (out / "index.html").read_text()
    assert page.count("<svg") == 4
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.suffix != ".png"}
    assert main(["evaluate", "--from", str(out)]) == 0
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.name in before}
    capsys.readouterr()
    assert main(["evaluate", "--plan", str(files / "plan.toml"), "--out", str(out), "--batch", "3"]) == 2
    assert "holds an evaluation with batch = 2" in capsys.readouterr().err


def test_a_plan_that_does_not_fit_the_model_takes_no_folder(files, capsys, monkeypatch) -> None:
    """The mended plan was refused by the folder that the first one had left."""
    monkeypatch.setattr("rlsedit.moments.second_moments", lambda *_, **__: pytest.fail("takes minutes"))
    plan, out = files / "plan.toml", files / "out"
    plan.write_text(plan.read_text().replace("[1, 2]", "[1, 9]"))
    assert main(["evaluate", "--plan", str(plan), "--out", str(out)]) == 2
    assert "settings: layers of 'rlsedit': must be within 0 to 4, got [1, 9]" in capsys.readouterr().err
    assert not out.exists()
    plan.write_text(plan.read_text().replace("[1, 9]", "[1, 2]").replace('"memit"]', '"rome"]'))
    assert main(["evaluate", "--plan", str(plan), "--out", str(out)]) == 2
    assert "layers must be one layer for 'rome', got [1, 2]" in capsys.readouterr().err
    assert not out.exists()


def test_a_plan_of_flags(files, capsys) -> None:
    arguments = [
        "evaluate", str(files / "model"), "--facts", str(files / "facts.jsonl"), "--methods", "memit", "--batch", "4",
        "--text", str(files / "text.txt"), "--layers", "1-2", "--set", "steps=3", "--set", "contexts=1", "--device",
        "cpu", "--set", "context_length=3", "--conflicts", "1", "--orders", "0,3", "--out", str(files / "o"),
    ]  # fmt: skip
    assert main(arguments) == 0
    runs = json.loads((files / "o" / "results.json").read_text())["runs"]
    assert [(entry["spec"]["order"], entry["batches"][-1]["facts"]) for entry in runs] == [(0, 8), (3, 8)]
    assert runs[0]["config"]["layers"] == [1, 2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--plan", "nowhere.toml", "--out", "o"], "nowhere.toml"),
        (["--from", "nowhere"], "--from: no folder nowhere"),
        (["--methods", "rlsedit"], "MODEL and --facts: give both"),
        (["m", "--facts", "f", "--methods", "nobody"], "nobody"),
        (["m", "--facts", "f", "--methods", "memit"], "--out: needs a folder"),
        (["m", "--facts", "nowhere.jsonl", "--methods", "memit", "--out", "o"], "nowhere.jsonl"),
        (
            ["m", "--facts", "f", "--methods", "memit", "--only", "ft", "--out", "o"],
            "--only: methods must be of the plan",
        ),
        (["m", "--facts", "f", "--methods", "memit", "--seeds", "x"], "needs a whole number"),
        (["m", "--facts", "f", "--methods", "memit", "--ability", "sst"], "needs TASK=FILE"),
        ([], "MODEL and --facts: give both, or --plan FILE, or --from DIR"),
        (["m", "--facts", "f", "--checkpoints", "3"], "--checkpoints: has no effect without --plan, --methods or"),
        (["m", "--facts", "f", "--set", "steps=3"], "--set: has no effect without --plan"),
        (["m", "--facts", "f", "--compare", "memit", "--first", "3"], "--first: has no effect with --compare"),
        (["m", "--facts", "f", "--methods", "memit", "--compare", "ft", "--out", "o"], "--compare: has no effect with"),
        (["m", "--facts", "f", "--methods", "memit", "--seed", "3", "--out", "o"], "--seeds takes them"),
        (["--from", ".", "--methods", "memit"], "--methods: has no effect with --from"),
    ],
)
def test_wrong_input(flags, words, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()
