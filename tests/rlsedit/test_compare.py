"""Methods side by side: the published solves of the package against independent ones, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import language_models as lm
from support.method_streams import CONFIG, moment, stream
from support.published import RULES, published

from rlsedit.cli import main
from rlsedit.compare import HEADER, Record, compare, largest_difference, paired
from rlsedit.editor import Editor
from rlsedit.facts import save_facts
from rlsedit.methods import Start, dense, get_method, list_methods
from rlsedit.models import Adapter
from rlsedit.targets import TargetCache


@pytest.mark.parametrize("name", RULES)
def test_the_published_solves_are_those_of_the_papers(name: str) -> None:
    solve = dense.published(name, Start(moment(), CONFIG, torch.float64))
    assert solve is not None
    for batch, exact in zip(stream(name), published(name, moment(), CONFIG, stream(name)), strict=True):
        assert (solve(*batch) - exact).norm() <= 1e-8 * exact.norm()
    assert dense.published("ft", Start(moment(), CONFIG, torch.float64)) is None


@pytest.mark.parametrize("name", RULES)
def test_published_solves_that_divide_by_the_noise_refuse_none(name: str) -> None:
    """They gave NaN, which the table showed as no difference."""
    start = Start(moment(), replace(CONFIG, noise=0.0), torch.float64)
    if name in ("evoedit", "emmet", "rome", "r_rome", "simie", "ultraedit"):
        solve = dense.published(name, start)
        assert solve is not None
        assert bool(solve(*stream(name)[0]).isfinite().all())
    else:
        with pytest.raises(ValueError, match="noise must be positive for the published solve"):
            dense.published(name, start)


@pytest.mark.parametrize("name", list_methods())
def test_a_paired_method_proposes_what_it_would(name: str) -> None:
    model, config = lm.tiny("llama"), replace(lm.CONFIG, null_threshold=1.0)
    if get_method(name).single:
        config = replace(config, layers=(2,))
    moments = lm.random_moments(model, config.layers)
    editor = Editor(model, lm.tokenizer(), name, config, moments=moments)
    records: list = []
    editor.method = paired(editor.method, records)
    editor.edit(lm.FACTS, batch_size=2)
    twin = Editor(lm.tiny("llama"), lm.tokenizer(), name, config, moments=moments)
    twin.edit(lm.FACTS, batch_size=2)
    for n in config.layers:
        assert torch.equal(editor.adapter.rows(n), twin.adapter.rows(n))
    assert len(records) == (0 if name == "ft" else len(config.layers))
    for record in records:
        assert record.batches == (4 if editor.method.single else 2)
        assert record.difference < 1e-9
        assert record.here > 0 < record.dense


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_published_solve_that_breaks_in_one_layer_is_no_agreement(order: int, broken: float) -> None:
    ours = torch.ones(3, 2, dtype=torch.float64)
    fine, other = Record(torch.add, ours=ours, theirs=2 * ours), Record(torch.add, ours=ours, theirs=broken * ours)
    assert math.isnan(largest_difference([fine, other][::order]))
    assert largest_difference([fine, Record(torch.add, ours=ours, theirs=ours)][::order]) == 0.5


def test_the_model_is_as_it_was_and_targets_are_shared() -> None:
    model = lm.tiny("llama", torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    configs = {name: lm.CONFIG for name in ("memit", "memit_seq", "alphaedit")}
    configs["alphaedit"] = replace(lm.CONFIG, null_threshold=1.0)
    cache, events = TargetCache(), []
    found = compare(
        Adapter.for_model(model), lm.tokenizer(), lm.FACTS, configs, lm.random_moments(model, (1, 2)),
        batch_size=2, targets=cache, progress=lambda *event: events.append(event),
    )  # fmt: skip
    assert [each.method for each in found] == list(configs)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # found again: the first batch of the second and third method, and the second batch of sequential MEMIT, whose first
    # batch is MEMIT's to the bit
    assert (cache.hits, cache.misses) == (6, 6)
    assert events[:3] == [("memit", 0, 4), ("memit", 2, 4), ("memit_seq", 0, 4)]
    assert all(0 < each.difference < 1e-4 for each in found)
    assert found[0].scores.rows != found[2].scores.rows


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    lm.tiny("llama", torch.float32).save_pretrained(tmp_path / "llama")
    lm.tokenizer().save_pretrained(tmp_path / "llama")
    save_facts(lm.FACTS, tmp_path / "facts.jsonl")
    (tmp_path / "text.txt").write_text("\n\n".join(lm.SENTENCES * 3), encoding="utf-8")
    return tmp_path


def command(files: Path, *more: str) -> list[str]:
    settings = ("steps=3", "contexts=1", "context_length=3", "mom2_weight=20", "null_threshold=0.5", "ft_steps=2")
    return [
        "evaluate", str(files / "llama"), "--facts", str(files / "facts.jsonl"), "--text", str(files / "text.txt"),
        "--layers", "1-2", "--batch", "2", "--device", "cpu", *(f"--set={text}" for text in settings), *more,
    ]  # fmt: skip


def test_the_command_compares_all_methods(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(files, "--compare", "--out", str(files / "table.md"))) == 0
    shown = capsys.readouterr().out
    lines = (files / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "LlamaForCausalLM `llama`, 4 facts in batches of 2; percent."
    assert lines[2].strip("| ").split(" | ") == list(HEADER)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[0] for row in cells] == ["before", *list_methods()]
    for row in cells[1:]:
        assert row[0] in shown
        assert (row[-1] == "") == (row[0] == "ft")
        assert row[0] == "ft" or float(row[-1]) < 1e-3


def test_the_command_compares_some_methods_and_writes_json(files: Path) -> None:
    assert main(command(files, "--compare", "rome,memit", "--out", str(files / "table.json"))) == 0
    report = json.loads((files / "table.json").read_text(encoding="utf-8"))
    assert [entry["method"] for entry in report["methods"]] == ["rome", "memit"]
    assert report["methods"][0]["config"]["layers"] == [2]
    assert [entry["batches"] for entry in report["methods"]] == [4, 2]
    assert all(math.isfinite(entry["difference"]) for entry in report["methods"])
    assert report["facts"] == "facts.jsonl"
    assert report["text"] == "text.txt"
    assert not [word for word in json.dumps(report).split('"') if word.startswith("/")]


def test_what_is_finished_is_on_disk_when_a_later_method_fails(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(adapter, tokenizer, facts, configs, moments, **options):  # type: ignore[no-untyped-def]
        if "memit" in configs:
            raise ValueError("no more")
        return compare(adapter, tokenizer, facts, configs, moments, **options)

    monkeypatch.setattr("rlsedit.compare.compare", one)
    assert main(command(files, "--compare", "rome,memit", "--out", str(files / "table.json"))) == 2
    report = json.loads((files / "table.json").read_text(encoding="utf-8"))
    assert [entry["method"] for entry in report["methods"]] == ["rome"]


def test_the_facts_are_looked_through_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once more for each method."""
    monkeypatch.setattr("rlsedit.compare.without_edited_neighbours", lambda _: pytest.fail("done by the command"))
    assert main(command(files, "--compare", "rome")) == 0


@pytest.mark.parametrize(("methods", "message"), [("memit,grace", "got grace"), ("memit,memit", "each method once")])
def test_wrong_methods_take_one_line(
    files: Path, methods: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(files, "--compare", methods)) == 2
    assert message in capsys.readouterr().err
