"""The demonstration from end to end on a tiny model, and the parts it is made of."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import language_models as lm

from rlsedit.demo import DemoOptions, run_demo
from rlsedit.demo.completions import complete, showcase
from rlsedit.demo.known import choose_known
from rlsedit.facts import Fact, load_facts
from rlsedit.metrics import Answer
from rlsedit.models import Adapter, smollm2
from rlsedit.report import Console

QUICK = (("steps", 3), ("contexts", 1), ("context_length", 3), ("mom2_weight", 20.0), ("null_threshold", 1.0))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny model in the place of SmolLM2, that knows every fact, and a text it is measured on."""
    model = lm.tiny("llama", torch.float32)
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "is_cached", lambda: True)
    monkeypatch.setattr(smollm2, "load", lambda **_: (model, lm.tokenizer()))
    monkeypatch.setattr("rlsedit.facts.world.world_facts", lambda seed: list(lm.FACTS))
    monkeypatch.setattr("rlsedit.demo.run.choose_known", lambda a, t, stream, count, bar: _choice(stream, count))
    (tmp_path / "text.txt").write_text("\n\n".join(lm.SENTENCES * 3), encoding="utf-8")
    return model


def _choice(stream: list[Any], count: int) -> Any:
    from rlsedit.demo.known import Choice

    return Choice(stream[:count], count)


def test_end_to_end(tiny: Any, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    stream = io.StringIO()
    options = DemoOptions(
        facts=4, batch=2, out=tmp_path / "out", text=tmp_path / "text.txt", config=(*QUICK, ("layers", (1, 2)))
    )
    result = run_demo(options, Console(stream))
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items()), "first weights come back"
    shown = stream.getvalue()
    for words in ("batch 2 of 2", "Before and after", "What the model writes", "Time per fact", "RLSEdit", "AlphaEdit"):
        assert words in shown
    assert "\x1b" not in shown
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "facts.jsonl", "objective.png", "report.json", "report.txt",
    }  # fmt: skip
    assert load_facts(tmp_path / "out" / "facts.jsonl") == lm.FACTS
    assert (tmp_path / "out" / "report.txt").read_text(encoding="utf-8") in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [run["method"] for run in report["runs"]] == ["rlsedit", "alphaedit_dense"]
    assert all(len(run["batches"]) == 2 for run in report["runs"])
    assert len(report["completions"]) == len(result.prompts)
    mean = result.runs[0].scores.summary["efficacy_success"].mean
    assert report["runs"][0]["summary"]["efficacy_success"]["mean"] == mean
    assert f"{100 * mean:.1f}" in shown


def test_wrong_options(tiny: Any) -> None:
    with pytest.raises(ValueError, match="facts must be at most 4, got 9"):
        run_demo(DemoOptions(facts=9), Console(quiet=True))
    with pytest.raises(ValueError, match="batch must be at least 1"):
        run_demo(DemoOptions(batch=0), Console(quiet=True))
    with pytest.raises(ValueError, match="method must be one of"):
        run_demo(DemoOptions(method="magic"), Console(quiet=True))
    with pytest.raises(TypeError, match="stepz"):
        run_demo(DemoOptions(facts=1, config=(("stepz", 3),)), Console(quiet=True))


def test_known_facts_are_the_first_that_the_model_writes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def scores(_adapter: Any, _tokenizer: Any, queries: list[tuple[str, str]]) -> dict[tuple[str, str], Answer]:
        asked.extend(queries)
        return {query: Answer(-1.0, query[1].startswith("known"), 0.0) for query in queries}

    monkeypatch.setattr("rlsedit.metrics.score_answers", scores)
    facts = [Fact(str(i), "{} is", f"s{i}", "new", f"known {i}" if i % 3 == 0 else "not") for i in range(60)]
    facts.insert(1, Fact("no truth", "{} is", "t", "new"))
    choice = choose_known(None, None, facts, 7)  # type: ignore[arg-type]
    assert [fact.id for fact in choice.facts] == ["0", "3", "6", "9", "12", "15", "18"]
    assert choice.asked == 20, "up to the last one that was taken"
    assert len(asked) < 40, "no more are scored than needed"
    with pytest.raises(ValueError, match="the model knows 20 of the 61 facts there are, 21 wanted"):
        choose_known(None, None, facts, 21)  # type: ignore[arg-type]


def test_a_true_answer_is_known_by_the_likeliest_tokens() -> None:
    model, tokenizer = lm.tiny("llama", torch.float32), lm.tokenizer()
    facts = [Fact("a", "{} is the capital of", "Lima", "Norway", "Peru")]
    with pytest.raises(ValueError, match="the model knows 0 of the 1 facts"):
        choose_known(Adapter.for_model(model), tokenizer, facts, 1)


def test_completions_do_not_depend_on_the_company() -> None:
    model, tokenizer = lm.tiny("gpt2", torch.float64), lm.tokenizer()
    prompts = ["Oslo is", "The capital of Norway is", "Lima"]
    assert complete(model, tokenizer, prompts, 6) == [complete(model, tokenizer, [p], 6)[0] for p in prompts]
    assert complete(model, tokenizer, []) == []


def test_showcase_takes_one_fact_a_relation() -> None:
    from dataclasses import replace

    facts = [replace(fact, relation=name) for fact, name in zip(lm.FACTS, "xxyz", strict=True)]
    shown = showcase(facts, 2)
    assert [kind for kind, _ in shown] == ["edited", "paraphrase", "neighbour", "edited"]
    assert shown[0][1] == facts[0].text
    assert shown[3][1] == facts[2].text
