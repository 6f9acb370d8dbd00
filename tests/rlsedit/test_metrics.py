"""Scores equal those of one forward per prompt and answer; the summary follows the benchmark's definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.language_models import FACTS, FAMILIES, POST_NORM, tiny, tokenizer

from rlsedit.facts import Fact
from rlsedit.metrics import evaluate, paired_differences, score_answers, summarise
from rlsedit.metrics.estimate import estimate as estimate_of
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
    assert x["efficacy_magnitude"] == pytest.approx((math.exp(9) - math.exp(8)) / math.exp(log_z))
    assert y["neighbourhood_magnitude"] == pytest.approx(x["efficacy_magnitude"])
    assert (x["neighbourhood_tokens"], z["portability_accuracy"]) == (0.5, None)
    assert x["log_probability_new"] == pytest.approx(9 - log_z)
    assert x["log_probability_true"] == pytest.approx(8 - log_z)


def test_tokens_and_what_follows() -> None:
    """A model that always says 'Norway': of 'Norway Lima' one token of two is right, wherever the answer stands."""
    model = tiny("llama")
    norway, both = (encode(tokenizer(), "a", target=text).target for text in ("Norway", "Norway Lima"))
    assert (len(norway), len(both)) == (1, 2)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(400, dtype=torch.float64))
        model.lm_head.bias[norway[0]] = 9.0
    follows = (("Then", ("Peru", "Norway Lima")), ("So", ("Peru", "Norway")), ("Thus", ("Peru",)))
    fact = Fact("x", "{} is in", "Lima", "Norway Lima", portability=follows)
    report = evaluate(model, tokenizer(), [fact])
    (row,) = report.rows
    assert (row["efficacy_tokens"], row["efficacy_accuracy"]) == (0.5, 0.0)
    assert row["portability_tokens"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert row["portability_accuracy"] == pytest.approx(1 / 3)
    assert row["portability_any"] == 1.0
    assert report.summary["portability_any"].count == 1


def test_bootstrap_covers_the_mean() -> None:
    """Of 200 samples of 40 from a known distribution, the 95 % interval holds its mean in 180 to 200."""
    generator = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        found = estimate_of(generator.exponential(1.0, 40), seed=seed)
        assert found.low < found.mean < found.high
        assert (found.high - found.low) / found.stderr == pytest.approx(3.9, rel=0.25)
        held += found.low <= 1.0 <= found.high
    assert 175 <= held <= 199


def test_the_interval_of_the_score_is_that_of_a_harmonic_mean() -> None:
    names = ("efficacy", "paraphrase", "neighbourhood")
    rows = [{f"{n}_success": float(i % (k + 2) > 0) for k, n in enumerate(names)} for i in range(60)]
    score = summarise(rows)["score"]
    means = [sum(row[f"{n}_success"] for row in rows) / 60 for n in names]
    assert score.mean == pytest.approx(3 / sum(1 / mean for mean in means))
    assert score.low < score.mean < score.high
    assert (score.high - score.low) / score.stderr == pytest.approx(3.9, rel=0.15)


def test_paired_differences_have_the_error_of_the_difference() -> None:
    """Of two measurements that share what is hard about a fact, and of one with itself."""
    generator = np.random.default_rng(1)
    names = [f"{n}_success" for n in ("efficacy", "paraphrase", "neighbourhood")]
    hard = generator.uniform(0.2, 0.8, 200)

    def rows(shift: float) -> list[dict]:
        noise = generator.normal(0.0, 0.01, (200, 3))
        return [{"id": i, **dict(zip(names, hard[i] + shift + noise[i], strict=True))} for i in range(200)]

    one, two = rows(0.0), rows(0.1)
    found = paired_differences(two, one[::-1])
    for name in (*names, "score"):
        assert found[name].mean == pytest.approx(summarise(two)[name].mean - summarise(one)[name].mean)
        assert found[name].low < found[name].mean < found[name].high
        assert found[name].mean == pytest.approx(0.1, abs=4 * found[name].stderr)
        assert found[name].stderr < 0.1 * summarise(one)[name].stderr
        assert (found[name].high - found[name].low) / found[name].stderr == pytest.approx(3.9, rel=0.15)
    same = paired_differences(one, one)
    assert {(same[name].mean, same[name].stderr) for name in (*names, "score")} == {(0.0, 0.0)}
    assert math.isnan(same["efficacy_tokens"].mean)
    for other in (one[1:], [*one, one[0]], [{**one[0], "id": "x"}, *one[1:]]):
        with pytest.raises(ValueError, match="both must be of the same facts"):
            paired_differences(one, other)


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
