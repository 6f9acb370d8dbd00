"""Scores equal those of one forward per prompt and answer; the summary follows the benchmark's definitions."""

from __future__ import annotations

import math

import pytest
import torch
from support.language_models import FACTS, FAMILIES, POST_NORM, tiny, tokenizer

from rlsedit.facts import Fact
from rlsedit.metrics import evaluate, score_answers, summarise
from rlsedit.models import Adapter
from rlsedit.prompts import encode

QUERIES = [
    ("The capital of Norway is", "Oslo"),
    ("The capital of Norway is", "Lima in Peru"),
    ("Tokyo lies in", "Japan"),
    ("I", "think the twin city of Wellington is Sydney"),
    ("Because the mother tongue of Danielle Darrieux and of you and me is", "French"),
]


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text"])
@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_equal_to_one_by_one(family: str, max_tokens: int) -> None:
    model = tiny(family)
    found = score_answers(Adapter.for_model(model, edit=False), tokenizer(), QUERIES, max_tokens=max_tokens)
    for prompt, answer in QUERIES:
        enc = encode(tokenizer(), prompt, target=answer)
        with torch.no_grad():
            logits = model(torch.tensor([enc.ids])).logits[0, enc.prompt_len - 1 : -1]
        target = torch.tensor(enc.target)
        wanted = float(logits.log_softmax(-1).gather(1, target[:, None]).mean())
        got = found[prompt, answer]
        assert got.log_probability == pytest.approx(wanted, rel=1e-5 if family == "gptj" else 1e-9)
        assert got.is_argmax == bool((logits.argmax(-1) == target).all())


def test_argmax_is_found() -> None:
    model = tiny("llama")
    prompt = "The capital of Norway is"
    ids = list(encode(tokenizer(), prompt).ids)
    with torch.no_grad():
        for _ in range(2):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    answer = tokenizer().decode(ids[-2:])
    if not answer.startswith(" ") or encode(tokenizer(), prompt, target=answer[1:]).ids != tuple(ids):
        with torch.no_grad():  # make " Oslo" the answer to everything: the likeliest token always is
            token = encode(tokenizer(), prompt, target="Oslo").target
            model.lm_head.weight.zero_()
            model.lm_head.bias = torch.nn.Parameter(torch.zeros(400, dtype=torch.float64))
            model.lm_head.bias[token[0]] = 5.0
        answer = " Oslo"
        assert len(token) == 1
    assert score_answers(Adapter.for_model(model), tokenizer(), [(prompt, answer[1:])])[prompt, answer[1:]].is_argmax


def test_evaluate_counts_by_the_definitions() -> None:
    """A model whose answer to everything is 'Norway', then 'Peru': every score is known."""
    model = tiny("llama")
    norway, peru = (encode(tokenizer(), "a", target=name).target for name in ("Norway", "Peru"))
    assert len(norway) == len(peru) == 1
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(400, dtype=torch.float64))
        model.lm_head.bias[norway[0]], model.lm_head.bias[peru[0]] = 9.0, 8.0
    facts = [
        Fact("x", "{} is in", "Lima", "Norway", "Peru", ("So Lima is in",),
             ("Oslo is in", "Cusco is in"), ("Norway", "Peru")),
        Fact("y", "{} is in", "Oslo", "Peru", "Norway", ("So Oslo is in",), ("Bergen is in",)),
        Fact("z", "{} is in", "Quito", "Norway"),
    ]  # fmt: skip
    report = evaluate(model, tokenizer(), facts)
    x, y, z = report.rows
    assert (x["efficacy_success"], x["efficacy_accuracy"], x["paraphrase_success"]) == (1, 1, 1)
    assert x["neighbourhood_success"] == 0  # "Peru" against "Norway" fails; "Norway" against itself is no comparison
    assert x["neighbourhood_accuracy"] == 0.5
    assert (y["efficacy_success"], y["efficacy_accuracy"], y["neighbourhood_success"]) == (0, 0, 1)
    assert (z["efficacy_success"], z["efficacy_accuracy"], z["paraphrase_accuracy"]) == (None, 1, None)
    assert report.summary["efficacy_success"].mean == 0.5
    assert report.summary["efficacy_success"].stderr == pytest.approx(0.5)
    assert report.summary["efficacy_accuracy"].count == 3
    log_z = math.log(math.exp(9) + math.exp(8) + 398)
    assert x["log_probability_new"] == pytest.approx(9 - log_z)
    assert x["log_probability_true"] == pytest.approx(8 - log_z)


def test_summary() -> None:
    names = ("efficacy", "paraphrase", "neighbourhood")
    rows = [{f"{n}_{k}": v for n in names for k in ("success", "accuracy")} for v in (1.0, 1.0, 0.5, 1.0)]
    summary = summarise(rows)
    assert summary["score"].mean == pytest.approx(0.875)
    assert summary["score"].stderr == pytest.approx(summary["efficacy_success"].stderr)  # the jackknife of a mean
    empty = summarise([{key: None for key in rows[0]}])
    assert empty["score"].count == 1
    assert math.isnan(empty["score"].mean)


def test_families_with_a_norm_behind_the_mlp_are_measured_too() -> None:
    for family in POST_NORM:
        assert evaluate(tiny(family, torch.float32), tokenizer(), FACTS).summary["efficacy_success"].count == 4


def test_no_facts() -> None:
    with pytest.raises(ValueError, match="evaluate: facts must hold at least one fact, got none"):
        evaluate(tiny("llama"), tokenizer(), [])
