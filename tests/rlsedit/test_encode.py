"""The last subject token and the border of the target, in spite of what tokenizers do at word borders."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.language_models import FACTS, SENTENCES, tiny, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlsedit.models import Adapter
from rlsedit.prompts import Context, encode, make_contexts
from rlsedit.targets.rows import fact_rows


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Metaspace words, and an end-of-text token that the tokenizer appends."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"]))
    from tokenizers.processors import TemplateProcessing

    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


def merging_spaces() -> PreTrainedTokenizerFast:
    """No pre-tokenizer: merges cross word borders, so that prompt and target are not tokenised apart."""
    core = Tokenizer(models.BPE())
    core.decoder = decoders.Fuse()
    core.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=200, special_tokens=["<pad>"]))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")


@pytest.mark.parametrize("make", [tokenizer, lambda: tokenizer(True), sentencepiece_like, merging_spaces])
def test_pieces_spell_prompt_and_target(make) -> None:  # type: ignore[no-untyped-def]
    tok = make()
    prompt, subject, target = "The capital of Norway is", "Norway", "Oslo in Peru"
    start = prompt.index(subject)
    enc = encode(tok, prompt, subject=(start, start + len(subject)), target=target)
    text = lambda ids: tok.decode(ids, skip_special_tokens=True).strip()  # noqa: E731
    assert text(enc.ids[: enc.prompt_len]) == prompt
    assert text(enc.target) == target
    assert text(enc.ids[: enc.pivot + 1]).rstrip().startswith("The capital of Norway")
    assert "Norway" not in text(enc.ids[: enc.pivot])
    alone = encode(tok, prompt)
    assert enc.ids[: enc.prompt_len] == alone.ids  # one prompt, whatever follows


def test_a_last_character_of_several_tokens() -> None:
    tok = tokenizer()
    prompt = "I visited Malmö yesterday"
    enc = encode(tok, prompt, subject=(10, 15))
    assert tok.decode(enc.ids[: enc.pivot + 1]) == "I visited Malmö"


def test_contexts_move_the_subject() -> None:
    rows = fact_rows(tokenizer(True), FACTS, [Context("", 0.5), Context("You and I. ", 0.5)])
    assert [row.kind for row in rows[:3]] == ["nll", "nll", "kl"]
    for row in rows:
        upto = tokenizer().decode(row.encoding.ids[: row.pivot + 1])
        assert upto.endswith(FACTS[row.fact].subject)
    assert tokenizer().decode(rows[1].inputs).startswith("<s>You and I. The mother tongue")


def test_contexts_are_reproducible() -> None:
    adapter = Adapter.for_model(tiny("llama"))
    first, again, other = (make_contexts(adapter, tokenizer(), 5, 6, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[0].prefix == ""
    assert sum(context.weight for context in first) == pytest.approx(1)
    assert first[0].weight == 0.5
    assert not any("{" in context.prefix or "}" in context.prefix for context in first)
    assert make_contexts(adapter, tokenizer(), 0, 6, 0)[0].weight == 1.0


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"encode: target must be a non-empty text, got ' '"):
        encode(tokenizer(), "Oslo is", target=" ")
    with pytest.raises(ValueError, match=r"encode: prompt must have at least one token, got ''"):
        encode(tokenizer(), "")
    with pytest.raises(ValueError, match=r"encode: subject must cover at least one token"):
        encode(tokenizer(), "Oslo is", subject=(20, 25))
    with pytest.raises(TypeError, match=r"encode: tokenizer must be a fast one"):
        encode(SimpleNamespace(is_fast=False), "Oslo is")
    broken = SimpleNamespace(id="x", prompt="no place", subject="Oslo", target_new="a")
    with pytest.raises(ValueError, match=r"fact 'x': prompt must contain '\{\}' once"):
        fact_rows(tokenizer(), [broken], [Context("", 1.0)])  # type: ignore[list-item]
