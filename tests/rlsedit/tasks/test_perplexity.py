"""Perplexity against the model's own forward pass, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from support.language_models import SENTENCES, tiny, tokenizer

from rlsedit.models import Adapter
from rlsedit.tasks.perplexity import perplexity

TEXTS = [*SENTENCES[:2], "Is Quito a city? I think so."]


def one_by_one(model: torch.nn.Module, ids: list[int], front: list[int], window: int, stride: int) -> list[float]:
    """-log p of each token, given what the first window that holds it has before it."""
    room = window - len(front)
    found = []
    for t in range(len(ids)):
        start = 0
        while t >= start + room:
            start += stride
        before = [*front, *ids[start:t]]
        if before:
            with torch.no_grad():
                logits = model(torch.tensor([before])).logits[0, -1]
            found.append(-float(logits.double().log_softmax(-1)[ids[t]]))
    return found


@pytest.mark.parametrize(("family", "bos"), [("llama", False), ("gpt2", True), ("gemma3_text", True)])
@pytest.mark.parametrize(("window", "stride"), [(16, 8), (17, 5), (80, 40)])
def test_every_token_is_scored_once_with_its_window_before_it(family, bos, window, stride) -> None:
    model, tok = tiny(family), tokenizer(bos)
    text = "\n\n".join(TEXTS)
    ids = tok(text, add_special_tokens=False)["input_ids"]
    expected = one_by_one(model, ids, [1] if bos else [], window, stride)
    for budget in (1, 100, 10_000):
        report = perplexity(
            Adapter.for_model(model, edit=False), tok, TEXTS, window=window, stride=stride, max_tokens=budget
        )
        assert report.summary["nll"].mean == pytest.approx(sum(expected) / len(expected), rel=1e-9)
        assert report.summary["perplexity"].mean == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-8)
        assert report.settings["tokens"] == len(expected) == sum(row["tokens"] for row in report.rows)
    at = 0
    for row in report.rows:
        assert row["start"] == at + (0 if bos else 1)
        assert row["nll"] == pytest.approx(sum(expected[at : at + row["tokens"]]), rel=1e-9)
        at += row["tokens"]
    size = len(text.encode()) - (0 if bos else len(tok.decode(ids[:1]).encode()))
    assert report.settings["bytes"] == size
    assert report.summary["bits_per_byte"].mean == pytest.approx(sum(expected) / math.log(2) / size)


def test_the_standard_error_takes_windows_as_observations() -> None:
    adapter = Adapter.for_model(tiny("llama"), edit=False)
    report = perplexity(adapter, tokenizer(), TEXTS, window=16, stride=8)
    sums, counts = [row["nll"] for row in report.rows], [row["tokens"] for row in report.rows]
    n, mean = len(sums), sum(sums) / sum(counts)
    variance = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True)) * n / (n - 1)
    nll, ppl = report.summary["nll"], report.summary["perplexity"]
    assert nll.stderr == pytest.approx(math.sqrt(variance) / sum(counts))
    assert ppl.stderr == pytest.approx(nll.stderr * ppl.mean)
    assert nll.low < nll.mean < nll.high
    assert ppl.low == pytest.approx(math.exp(nll.low))
    single = perplexity(adapter, tokenizer(), TEXTS[:1], window=90, stride=8)
    assert len(single.rows) == 1
    assert math.isnan(single.summary["nll"].stderr)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    report = perplexity(Adapter.for_model(model, edit=False), tokenizer(), TEXTS, window=32, stride=16)
    assert report.summary["perplexity"].mean == pytest.approx(400)
    assert report.summary["perplexity"].stderr == pytest.approx(0, abs=1e-9)


def test_a_broken_model_has_no_perplexity() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    report = perplexity(Adapter.for_model(model, edit=False), tokenizer(), TEXTS, window=32, stride=16)
    assert all(math.isnan(value.mean) for value in report.summary.values())  # not infinite: nobody knows it


def test_the_window_is_cut_to_what_the_model_reads_and_the_model_is_left_as_it_was() -> None:
    model = tiny("gpt2", n_positions=24).train()
    done = []
    adapter = Adapter.for_model(model, edit=False)
    report = perplexity(adapter, tokenizer(), TEXTS, window=512, stride=12, progress=lambda *a: done.append(a))
    assert report.settings["window"] == 24
    assert done[-1] == (len(report.rows), len(report.rows))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bos", [False, True])
def test_a_stride_that_a_short_model_leaves_no_room_for_is_half_of_its_window(bos: bool) -> None:
    """The usual 256 was refused for every model of fewer positions; a stride that fits stays."""
    adapter = Adapter.for_model(tiny("gpt2", n_positions=24), edit=False)
    usual = perplexity(adapter, tokenizer(bos), TEXTS)
    assert (usual.settings["window"], usual.settings["stride"]) == (24, 11 if bos else 12)
    given = perplexity(adapter, tokenizer(bos), TEXTS, window=24, stride=usual.settings["stride"])
    assert usual.summary["nll"] == given.summary["nll"]
    assert perplexity(adapter, tokenizer(bos), TEXTS, stride=20).settings["stride"] == 20


@pytest.mark.parametrize(
    ("texts", "window", "stride", "words"),
    [(TEXTS, 1, 1, "window must be"), (TEXTS, 8, 8, "stride"), (TEXTS, 8, 0, "stride"), (["."], 8, 4, "two tokens")],
)
def test_wrong_calls(texts, window, stride, words) -> None:
    with pytest.raises(ValueError, match=words):
        perplexity(Adapter.for_model(tiny("llama"), edit=False), tokenizer(), texts, window=window, stride=stride)
