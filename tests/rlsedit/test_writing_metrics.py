"""Fluency and consistency by hand, generation that does not depend on its batch."""

from __future__ import annotations

import math

import pytest
import torch
from support.language_models import tiny, tokenizer

from rlsedit.facts import Fact
from rlsedit.metrics import evaluate_writing
from rlsedit.metrics.generation import generate
from rlsedit.metrics.texts import InverseFrequencies, ngram_entropy, similarity
from rlsedit.models import Adapter
from rlsedit.prompts import encode

PROMPTS = ["The capital of Norway is", "Tokyo lies in", "I", "Because the mother tongue of you and me is"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c d e", (2 / 3 * math.log2(4) + 4 / 3 * math.log2(3)) / 2),  # all different
        ("a a a a a a", 0.0),  # one bigram, one trigram
        ("a b a b a", (2 / 3 * 1.0 + 4 / 3 * -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))) / 2),
        ("It's so.", (2 / 3 * math.log2(2) + 4 / 3 * 0.0) / 2),  # three tokens: It's, so, .
        ("word", 0.0),
        ("", 0.0),
    ],
)
def test_entropy_by_hand(text, expected) -> None:
    assert ngram_entropy(text) == pytest.approx(expected)


def test_similarity_by_hand() -> None:
    inverse = InverseFrequencies(["the cat sat", "the dog sat", "a bird flew"])
    the, cat = math.log(4 / 3) + 1, math.log(4 / 2) + 1
    assert inverse.vector("The the cat of x nowhere") == pytest.approx({"the": 2 * the, "cat": cat})
    found = similarity("the cat", "the dog", inverse)
    assert found == pytest.approx(the * the / (the * the + cat * cat))
    assert similarity("the cat sat", "sat cat the", inverse) == pytest.approx(1.0)
    assert similarity("nothing known", "the cat", inverse) == 0.0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_text_is_the_same_alone_and_in_a_batch(family) -> None:
    adapter = Adapter.for_model(tiny(family), edit=False)
    together = generate(adapter, tokenizer(), PROMPTS, length=14, seed=3)
    alone = [generate(adapter, tokenizer(), [prompt], length=14, seed=3)[0] for prompt in PROMPTS]
    pairs = generate(adapter, tokenizer(), PROMPTS[::-1], length=14, seed=3, rows=2)[::-1]
    assert together == alone == pairs
    assert generate(adapter, tokenizer(), PROMPTS, length=14, seed=4) != together


def test_greedy_takes_the_likeliest_token_and_stops_at_the_length() -> None:
    model = tiny("llama")
    adapter = Adapter.for_model(model, edit=False)
    (text,) = generate(adapter, tokenizer(), PROMPTS[:1], length=9, top_k=1)
    ids = list(encode(tokenizer(), PROMPTS[0]).ids)
    with torch.no_grad():
        while len(ids) < 9:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    special = set(tokenizer().all_special_ids)
    assert text == tokenizer().decode([i for i in ids if i not in special])
    (longer,) = generate(adapter, tokenizer(), [PROMPTS[3]], length=1, top_k=1)
    assert longer.startswith(PROMPTS[3])


def test_draws_follow_the_probabilities() -> None:
    """A model that says Oslo with 0.7 and Lima with 0.3, whatever it reads: 400 draws of one token."""
    model = tiny("llama")
    oslo, lima = (encode(tokenizer(), "a", target=name).target[0] for name in ("Oslo", "Lima"))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.full((400,), -1e4, dtype=torch.float64))
        model.lm_head.bias[oslo], model.lm_head.bias[lima] = math.log(0.7), math.log(0.3)
    adapter = Adapter.for_model(model, edit=False)
    texts = [generate(adapter, tokenizer(), ["The"], length=2, seed=seed)[0] for seed in range(400)]
    share = sum("Oslo" in text for text in texts) / 400
    assert set(texts) == {"The Oslo", "The Lima"}
    assert share == pytest.approx(0.7, abs=0.08)


def test_report() -> None:
    facts = [
        Fact("x", "{} is in", "Lima", "Peru", generation=("Lima is", "Lima lies in"), references=("Lima is in Peru",)),
        Fact("y", "{} is in", "Oslo", "Norway"),
    ]
    report = evaluate_writing(tiny("llama"), tokenizer(), facts, length=10)
    x, y = report.rows
    assert len(x["texts"]) == 2
    assert len(y["texts"]) == 1
    assert y["texts"][0].startswith("Oslo is in")
    assert x["fluency"] == pytest.approx(sum(map(ngram_entropy, x["texts"])) / 2)
    assert 0.0 <= x["consistency"] <= 1.0
    assert y["consistency"] is None
    assert report.summary["fluency"].count == 2
    assert report.summary["consistency"].count == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [({"length": 0}, "length must be at least 1"), ({"top_k": 0}, "top_k"), ({"rows": 0}, "rows")],
)
def test_wrong_calls(values, words) -> None:
    adapter = Adapter.for_model(tiny("llama"), edit=False)
    with pytest.raises(ValueError, match=words):
        generate(adapter, tokenizer(), ["x"], **values)
    with pytest.raises(ValueError, match="at least one fact"):
        evaluate_writing(tiny("llama"), tokenizer(), [])
