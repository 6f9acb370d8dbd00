"""Decoders in which layers keep another state than keys and values: run on whole rows, exactly as one row alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from support.language_models import CONFIG, FACTS, HYBRID, random_moments, tiny, tokenizer
from support.plain_editing import joint_targets, mean_keys
from torch import nn

from rlsedit.config import EditConfig
from rlsedit.editor import Editor
from rlsedit.facts import Fact
from rlsedit.keys import KeyStream
from rlsedit.metrics import score_answers
from rlsedit.metrics.generation import generate
from rlsedit.models import Adapter
from rlsedit.models.probe import other_states
from rlsedit.models.replay import capture
from rlsedit.moments import second_moments
from rlsedit.prompts import Context, align, encode, make_contexts
from rlsedit.targets import component_targets, optimise_targets, plain_targets
from rlsedit.targets.rows import fact_rows
from rlsedit.tasks.completing import complete

CONTEXTS = [Context("", 0.5), Context("The yen is. ", 0.25), Context("Because you and I think Oslo is. ", 0.25)]
ROUNDING = dict(rtol=1e-4, atol=2e-5)
"""The recurrences are computed in float32 whatever the model's dtype, in chunks."""

PROMPTS = ["The capital of Norway is", "Tokyo lies in", "I", "Because the mother tongue of you and me is"]
QUERIES = [
    ("The capital of Norway is", "Oslo"),
    ("The capital of Norway is", "Lima in Peru"),
    ("The capital of Norway is", "Lima in Quito"),
    ("Tokyo lies in", "Japan"),
    ("I", "think the twin city of Wellington is Sydney"),
]


def model_of(kind: str) -> nn.Module:
    """With biases, which tokens that are padded get too."""
    model = tiny(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and not parameter.any():
                parameter.normal_(std=0.1)
    return model


@lru_cache
def adapter_of(kind: str) -> Adapter:
    """Of a model that no test changes; a llama is run as the others are although it need not be."""
    if kind == "llama":
        return replace(Adapter.for_model(tiny(kind)), cached=False)
    return Adapter.for_model(model_of(kind))


@contextmanager
def inputs_of(module: nn.Module, seen: list[torch.Tensor]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", HYBRID)
def test_logits_are_those_of_the_model(kind: str) -> None:
    adapter = adapter_of(kind)
    assert (adapter.cached, other_states(adapter.model.config)) == (False, True)
    rows = [[5, 9, 40, 41, 7, 300, 8, 13], [7, 6], [50, 60, 70]]
    batch = align(rows, [0] * 3, front=False)
    with adapter.frozen(), torch.no_grad():
        calls = capture(adapter, batch.ids, batch.mask, batch.positions)
        logits = adapter.logits(calls.run(adapter, calls.hidden, 0, adapter.num_layers))
        for b, row in enumerate(rows):
            wanted = adapter.model(torch.tensor([row]), use_cache=False).logits[0]
            torch.testing.assert_close(logits[b, : len(row)], wanted, **ROUNDING)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind", [*HYBRID, "llama"])
def test_targets_equal_the_plain_ones(kind: str, layer: int) -> None:
    adapter = adapter_of(kind)
    config = replace(CONFIG, layers=(layer,), steps=4 if layer != 1 else 8)
    fast = optimise_targets(adapter, tokenizer(), FACTS, CONTEXTS, config)
    plain = plain_targets(adapter, tokenizer(), FACTS, CONTEXTS, config)
    torch.testing.assert_close(fast.start, plain.start, **ROUNDING)
    torch.testing.assert_close(fast.z, plain.z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fast.losses, plain.losses, **ROUNDING)
    assert (plain.z - plain.start).norm(dim=1).min() > 0.1


def test_the_same_with_and_without_a_cache() -> None:
    whole = adapter_of("llama")
    cached = replace(whole, cached=True)
    config = replace(CONFIG, relative_to="module")
    tight = dict(rtol=1e-8, atol=1e-9)
    one, two = (optimise_targets(a, tokenizer(), FACTS, CONTEXTS, config) for a in (whole, cached))
    torch.testing.assert_close(one.z, two.z, **tight)
    assert one.steps.tolist() == two.steps.tolist()
    assert make_contexts(whole, tokenizer(), 4, 5, 0) == make_contexts(cached, tokenizer(), 4, 5, 0)
    post = Adapter.for_model(tiny("gemma3_text"))
    config = replace(CONFIG, layers=(2,))
    one, two = (optimise_targets(a, tokenizer(), FACTS, CONTEXTS, config) for a in (replace(post, cached=False), post))
    torch.testing.assert_close(one.z, two.z, **tight)


@pytest.mark.parametrize("max_tokens", [1, 30, 1000])
@pytest.mark.parametrize("kind", [*HYBRID, "llama"])
def test_scores_equal_those_of_one_prompt_at_a_time(kind: str, max_tokens: int) -> None:
    adapter = adapter_of(kind)
    done: list[tuple[int, int]] = []
    found = score_answers(
        adapter, tokenizer(), QUERIES, max_tokens=max_tokens, progress=lambda *counts: done.append(counts)
    )
    assert done[-1] == (3, 3)
    for prompt, answer in QUERIES:
        enc = encode(tokenizer(), prompt, target=answer)
        with torch.no_grad():
            logits = adapter.model(torch.tensor([enc.ids]), use_cache=False).logits[0, enc.prompt_len - 1 : -1]
        target = torch.tensor(enc.target)
        wanted = float(logits.log_softmax(-1).gather(1, target[:, None]).mean())
        got = found[prompt, answer]
        assert got.log_probability == pytest.approx(wanted, rel=1e-5)
        assert got.share == pytest.approx(float((logits.argmax(-1) == target).double().mean()))


@pytest.mark.parametrize("kind", [*HYBRID, "llama"])
def test_texts_are_those_of_one_row_at_a_time(kind: str) -> None:
    adapter = adapter_of(kind)
    wanted = []
    for prompt in PROMPTS:
        ids = list(encode(tokenizer(), prompt).ids)
        size = len(ids)
        with torch.no_grad():
            while len(ids) < size + 6:
                ids.append(int(adapter.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        wanted.append([tokenizer().decode(ids[size:], skip_special_tokens=True)])
    assert complete(adapter, tokenizer(), PROMPTS, new_tokens=6, rows=3) == wanted
    together = generate(adapter, tokenizer(), PROMPTS, length=12, seed=3)
    assert together == [generate(adapter, tokenizer(), [prompt], length=12, seed=3)[0] for prompt in PROMPTS]
    contexts = make_contexts(adapter, tokenizer(), 2, 4, 0)
    assert contexts == make_contexts(adapter, tokenizer(), 2, 4, 0)
    assert len({context.prefix for context in contexts}) == 3


@pytest.mark.parametrize("kind", HYBRID)
def test_keys_and_hidden_states_are_those_of_one_row(kind: str) -> None:
    adapter = adapter_of(kind)
    rows = [row for row in fact_rows(tokenizer(), FACTS, CONTEXTS) if row.kind == "nll"]
    with adapter.frozen():
        keys = KeyStream(adapter, rows, CONTEXTS, 64).keys(3)
        wanted, _ = mean_keys(adapter, 3, FACTS, CONTEXTS, [context.weight for context in CONTEXTS])
        torch.testing.assert_close(keys, wanted, **ROUNDING)


@pytest.mark.parametrize(("kind", "attention"), [("qwen3_5_text", "linear_attn"), ("lfm2", "self_attn")])
def test_targets_of_pmet(kind: str, attention: str) -> None:
    """The mixer of layer 1, which in LFM2 layer 0 does not have."""
    adapter = Adapter.for_model(adapter_of(kind).model, attention=attention)
    config = replace(CONFIG, layers=(1,), steps=4, kl=1.0)
    found = component_targets(adapter, tokenizer(), FACTS, CONTEXTS, config)
    with adapter.frozen():
        wanted = joint_targets(adapter, FACTS, CONTEXTS, config)
    torch.testing.assert_close(found.z, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", HYBRID)
@pytest.mark.parametrize(("method", "rise"), [("memit", 1.0), ("ft", 0.3)])
def test_an_edit_raises_the_probability_of_the_new_answer(kind: str, method: str, rise: float) -> None:
    model = model_of(kind)
    facts = [Fact("a", "We go to {}", "Lima", "Norway", "Peru"), Fact("b", "It is near {}", "Tokyo", "Quito", "Japan")]
    config = EditConfig.for_model(model, method, layers=(1,), steps=25, lr=0.3, clamp=4.0, contexts=1, mom2_weight=0.01)
    config = replace(config, context_length=3, **({"ft_rate": 0.005} if method == "ft" else {}))
    width = Adapter.for_model(model).rows(0).shape[0]
    editor = Editor(model, tokenizer(), method, config, moments=random_moments(model, (1,), width))
    before = editor.evaluate(facts).rows
    editor.edit(facts)
    copy = deepcopy(model)  # nothing of the optimisation is left in it
    assert all(torch.equal(one, two) for one, two in zip(copy.parameters(), model.parameters(), strict=True))
    after = editor.evaluate(facts).rows
    rises = [new["log_probability_new"] - old["log_probability_new"] for new, old in zip(after, before, strict=True)]
    assert min(rises) > rise


@pytest.mark.parametrize("kind", HYBRID)
def test_moments_are_those_of_each_text(kind: str) -> None:
    adapter = adapter_of(kind)
    texts = [*PROMPTS, "Lima"]
    found = second_moments(adapter.model, tokenizer(), (1, 3), texts, adapter=adapter)
    for layer in (1, 3):
        keys = []
        with inputs_of(adapter.edited(layer), keys), torch.no_grad():
            for text in texts:
                adapter.model(torch.tensor([tokenizer()(text).input_ids]), use_cache=False)
        every = torch.cat([key[0] for key in keys])
        torch.testing.assert_close(found[layer], every.T @ every / len(every), **ROUNDING)


def test_a_norm_behind_the_mlp_of_some_layers() -> None:
    """OLMo-Hybrid has one behind that of an attention, not behind that of a linear attention."""
    adapter = adapter_of("olmo_hybrid")
    assert [adapter.behind(n) for n in range(4)] == [None, None, "post_feedforward_layernorm", None]
    assert (adapter.unlike, adapter.direct) == (frozenset(), True)
    config = replace(CONFIG, layers=(2,), steps=4)
    fast = optimise_targets(adapter, tokenizer(), FACTS, CONTEXTS, config)
    plain = plain_targets(adapter, tokenizer(), FACTS, CONTEXTS, config)
    assert torch.equal(adapter.edited(2).weight, adapter.target(2).weight)
    torch.testing.assert_close(fast.z, plain.z, rtol=1e-3, atol=1e-3)
    model, moments = adapter.model, random_moments(adapter.model, (0, 1, 2))
    assert EditConfig.for_model(model, "memit").layers == (0,)
    Editor(model, tokenizer(), "memit", replace(CONFIG, layers=(0, 1)), moments=moments)
    with pytest.raises(ValueError, match=r"config\.layers must be one layer where a norm follows the MLP"):
        Editor(model, tokenizer(), "memit", replace(CONFIG, layers=(1, 2)), moments=moments)


def test_layers_that_are_unlike_the_others_take_no_residual() -> None:
    """Four names do not say that a norm follows in some layers."""
    model = model_of("olmo_hybrid")
    adapter = Adapter.for_model(model, layers="model.layers", module="mlp.down_proj", norm="model.norm", head="lm_head")
    assert (adapter.post, adapter.direct, adapter.unlike) == (None, True, {2})
    moments = random_moments(model, (1, 2))
    with pytest.raises(
        ValueError, match=r"must not have \[2\], got \(1, 2\): the output of these layers does not move"
    ):
        Editor(model, tokenizer(), "memit", replace(CONFIG, layers=(1, 2)), moments=moments, adapter=adapter)
    Editor(model, tokenizer(), "ultraedit", replace(CONFIG, layers=(1, 2)), moments=moments, adapter=adapter)
