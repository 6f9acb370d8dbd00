"""Continuations: greedy by hand, the same alone and in a batch, stop texts, sampling frequencies."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from support.language_models import tiny, tokenizer

from rlsedit.metrics.generation import generate
from rlsedit.models import Adapter
from rlsedit.tasks.completing import complete

PROMPTS = ["The capital of Norway is", "Tokyo lies in", "I", "Because the mother tongue of you and me is\n"]


def adapter(family: str = "llama", **changes: object) -> Adapter:
    return Adapter.for_model(tiny(family, **changes), edit=False)


def greedy(model: torch.nn.Module, prompt: str, count: int) -> str:
    ids = tokenizer()(prompt)["input_ids"]
    size = len(ids)
    with torch.no_grad():
        while len(ids) < size + count:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert 2 not in ids[size:], "the end of a text would need a case of its own"
    return tokenizer().decode(ids[size:], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_greedy_is_the_models_own_whatever_the_batch(family: str) -> None:
    own = adapter(family)
    expected = [[greedy(own.model, prompt, 12)] for prompt in PROMPTS]
    for rows in (1, 3):
        done: list[tuple[int, int]] = []
        show = partial(lambda seen, *counts: seen.append(counts), done)
        found = complete(own, tokenizer(), PROMPTS, new_tokens=12, rows=rows, progress=show)
        assert found == expected
        assert done == [(i, 4) for i in range(1, 5)]


def test_a_text_ends_before_its_first_stop_text_and_others_go_on() -> None:
    own = adapter()
    plain = complete(own, tokenizer(), PROMPTS, new_tokens=16)
    marks = [plain[0][0][4:7], plain[2][0][9:12]]
    found = complete(own, tokenizer(), PROMPTS, new_tokens=16, stop=marks)
    for (before,), (after,) in zip(plain, found, strict=True):
        cuts = [before.find(mark) for mark in marks if mark in before]
        assert after == (before[: min(cuts)] if cuts else before)
    assert len(found[0][0]) <= 4


WORD = 300
"""A token of the vocabulary, nothing special."""


@pytest.mark.parametrize(("written", "listed", "ends"), [
    (2, 2, True), (2, None, True), (1, [2, 1], True), (1, 1, True), (1, 2, False), (WORD, [2, WORD], False),
])  # fmt: skip
def test_the_end_tokens_of_tokenizer_and_generation_configuration_end_a_text(written, listed, ends) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(400, dtype=torch.float64))
        model.lm_head.bias[written] = 5.0
    model.generation_config.eos_token_id = listed
    own = Adapter.for_model(model, edit=False)
    counted: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: counted.append(1))
    complete(own, tokenizer(), PROMPTS, new_tokens=5)
    assert len(counted) == (1 if ends else 5)
    counted.clear()
    size = max(len(tokenizer()(prompt)["input_ids"]) for prompt in PROMPTS)
    texts = generate(own, tokenizer(), PROMPTS, length=size + 5, top_k=1)
    assert (texts == PROMPTS) is (ends or written < WORD)  # special tokens are not shown
    assert (len(counted) == 1) is ends


def test_samples_do_not_depend_on_the_batch_and_differ() -> None:
    own = adapter()
    together = complete(own, tokenizer(), PROMPTS, new_tokens=8, samples=3, seed=1)
    alone = [complete(own, tokenizer(), [prompt], new_tokens=8, samples=3, seed=1, rows=1)[0] for prompt in PROMPTS]
    assert together == alone
    assert all(len(set(texts)) == 3 for texts in together)
    assert complete(own, tokenizer(), PROMPTS, new_tokens=8, samples=3, seed=2) != together
    assert complete(own, tokenizer(), PROMPTS[:1], new_tokens=8, samples=2, seed=1) == [together[0][:2]]


def test_draws_follow_the_nucleus() -> None:
    """Probabilities 0.6, 0.3 and 0.1 of three words; with top_p 0.8 the third never comes, and two share 0.9."""
    model = tiny("llama")
    words = [" Oslo", " Lima", " Peru"]
    tokens = [tokenizer()(f"a{word}")["input_ids"][-1] for word in words]
    assert len(set(tokens)) == 3
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.full((400,), -1e4, dtype=torch.float64))
        for token, share in zip(tokens, (0.6, 0.3, 0.1), strict=True):
            model.lm_head.bias[token] = math.log(share)
    own = Adapter.for_model(model, edit=False)
    draw = dict(new_tokens=1, samples=400, temperature=1.0, rows=400)
    (found,) = complete(own, tokenizer(), ["The"], top_p=0.8, **draw)
    assert set(found) == {" Oslo", " Lima"}
    assert found.count(" Oslo") / 400 == pytest.approx(0.6 / 0.9, abs=0.08)
    (found,) = complete(own, tokenizer(), ["The"], top_p=1.0, **draw)
    assert [found.count(word) / 400 for word in words] == pytest.approx([0.6, 0.3, 0.1], abs=0.08)


def test_the_room_of_the_model_is_kept() -> None:
    own = adapter("gpt2", n_positions=12)
    size = len(tokenizer()(PROMPTS[0])["input_ids"])
    (text,) = complete(own, tokenizer(), PROMPTS[:1], new_tokens=50)[0]
    assert text == greedy(own.model, PROMPTS[0], 12 - size)
    with pytest.raises(ValueError, match="leaves no room in the 12"):
        complete(own, tokenizer(), ["Oslo is a city in Norway. " * 5], new_tokens=5)
