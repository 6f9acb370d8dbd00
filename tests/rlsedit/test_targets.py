"""z* of a batch with all accelerations equals the plain one: one fact at a time through the model's own forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.language_models import CONFIG, FACTS, FAMILIES, tiny, tokenizer
from support.plain_editing import nll_rows, read

from rlsedit.models import Adapter
from rlsedit.prompts import Context
from rlsedit.targets import optimise_targets, plain_targets
from rlsedit.targets.bucket import BUCKET_COST, divide
from rlsedit.targets.prepare import prepare_rows
from rlsedit.targets.rows import fact_rows

# GPT-J's attention computes in float32 whatever the model's dtype, so its batch sizes and lengths show at 1e-7.
TOLERANCE = {"gptj": dict(rtol=1e-5, atol=1e-6)}
TIGHT = dict(rtol=1e-8, atol=1e-9)

CONTEXTS = [Context("", 0.5), Context("The yen is. ", 0.25), Context("Because you and I think Oslo is. ", 0.25)]


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text"])
def test_batched_targets_equal_the_plain_ones(family: str) -> None:
    adapter = Adapter.for_model(tiny(family))
    fast = optimise_targets(adapter, tokenizer(), FACTS, CONTEXTS, CONFIG)
    plain = plain_targets(adapter, tokenizer(), FACTS, CONTEXTS, CONFIG)
    tolerance = TOLERANCE.get(family, TIGHT)
    torch.testing.assert_close(fast.start, plain.start, **tolerance)
    torch.testing.assert_close(fast.z, plain.z, **tolerance)
    torch.testing.assert_close(fast.losses, plain.losses, **tolerance)
    assert (plain.z - plain.start).norm(dim=1).min() > 0.1  # the variable did move


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("layer", [0, 4])
def test_first_and_last_layer(family: str, layer: int) -> None:
    adapter = Adapter.for_model(tiny(family))
    config = replace(CONFIG, layers=(layer,), steps=4)
    fast = optimise_targets(adapter, tokenizer(), FACTS, CONTEXTS, config)
    plain = plain_targets(adapter, tokenizer(), FACTS, CONTEXTS, config)
    torch.testing.assert_close(fast.z, plain.z, **TIGHT)


def test_converged_facts_leave_with_the_same_result() -> None:
    adapter = Adapter.for_model(tiny("llama"))
    config = replace(CONFIG, steps=25, stop_loss=5.8, kl=0.1)
    fast = optimise_targets(adapter, tokenizer(), FACTS, CONTEXTS, config)
    plain = plain_targets(adapter, tokenizer(), FACTS, CONTEXTS, config)
    assert fast.steps.tolist() == plain.steps.tolist()
    assert len(set(fast.steps.tolist())) > 2, "facts must leave at different steps for this test to say something"
    torch.testing.assert_close(fast.z, plain.z, **TIGHT)


@pytest.mark.parametrize("max_tokens", [1, 16, 100000])
def test_the_token_budget_changes_nothing(max_tokens: int) -> None:
    adapter = Adapter.for_model(tiny("qwen2"))
    known = optimise_targets(adapter, tokenizer(), FACTS, CONTEXTS, CONFIG)
    other = optimise_targets(adapter, tokenizer(), FACTS, CONTEXTS, replace(CONFIG, max_tokens=max_tokens))
    torch.testing.assert_close(known.z, other.z, **TIGHT)


def test_a_token_in_front_and_subjects_at_the_start() -> None:
    for bos in (False, True):
        adapter = Adapter.for_model(tiny("llama"))
        fast = optimise_targets(adapter, tokenizer(bos), FACTS[1:2], CONTEXTS[:1], CONFIG)
        plain = plain_targets(adapter, tokenizer(bos), FACTS[1:2], CONTEXTS[:1], CONFIG)
        torch.testing.assert_close(fast.z, plain.z, **TIGHT)


def test_the_norm_of_the_change_is_clamped() -> None:
    adapter = Adapter.for_model(tiny("llama"))
    config = replace(CONFIG, clamp=0.05, lr=1.0)
    result = optimise_targets(adapter, tokenizer(), FACTS, CONTEXTS, config)
    ratio = (result.z - result.start).norm(dim=1) / result.start.norm(dim=1)
    assert ratio.max() <= 0.05 * (1 + 1e-9)
    assert ratio.max() > 0.049


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_bounds_relative_to_the_output_of_the_module(family: str) -> None:
    """ROME's bound and norm term; behind a norm that output is what delta is added to anyway."""
    adapter = Adapter.for_model(tiny(family))
    config = replace(CONFIG, layers=(2,), clamp=0.05, decay=2.0, lr=1.0, relative_to="module")
    fast = optimise_targets(adapter, tokenizer(), FACTS, CONTEXTS, config)
    plain = plain_targets(adapter, tokenizer(), FACTS, CONTEXTS, config)
    torch.testing.assert_close(fast.z, plain.z, **TIGHT)
    torch.testing.assert_close(fast.losses, plain.losses, **TIGHT)
    sizes = [read(adapter, adapter.edited(2), row)[1][row.pivot].norm() for row in nll_rows(FACTS)]
    ratio = (fast.z - fast.start).norm(dim=1) / torch.stack(sizes)
    assert 0.049 < ratio.max() <= 0.05 * (1 + 1e-9)
    other = optimise_targets(adapter, tokenizer(), FACTS, CONTEXTS, replace(config, relative_to="hidden"))
    assert torch.equal(other.z, fast.z) == (family == "gemma3_text")


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("gpt2").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    adapter = Adapter.for_model(model)
    optimise_targets(adapter, tokenizer(), FACTS, CONTEXTS, replace(CONFIG, steps=2))
    assert model.training
    assert all(module.training for module in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all("forward" not in layer.__dict__ for layer in adapter.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_float32_targets(dtype: torch.dtype) -> None:
    adapter = Adapter.for_model(tiny("llama", dtype))
    result = optimise_targets(adapter, tokenizer(), FACTS, CONTEXTS, CONFIG)
    assert result.z.dtype == torch.float32
    exact = optimise_targets(Adapter.for_model(tiny("llama")), tokenizer(), FACTS, CONTEXTS, CONFIG)
    change, wanted = result.z - result.start, (exact.z - exact.start).float()
    cosine = torch.nn.functional.cosine_similarity(change, wanted)
    assert cosine.min() > 0.8


@pytest.mark.parametrize("count", [1, 4])
def test_what_is_constant_takes_three_passes(count: int) -> None:
    """Whatever the number of contexts: what prompts begin with, the layers up to L, and tokens before p above them."""
    adapter = Adapter.for_model(tiny("llama"))
    passes = [0] * adapter.num_layers
    for n, layer in enumerate(adapter.layers):
        layer.mlp.register_forward_pre_hook(lambda _module, _args, n=n: passes.__setitem__(n, passes[n] + 1))
    with adapter.frozen():
        rows = fact_rows(tokenizer(), FACTS[:count], CONTEXTS)
        prepared = prepare_rows(adapter, rows, 2, 1 << 20)
    assert len(prepared) == count * (len(CONTEXTS) + 1)
    assert passes == [2, 2, 2, *([2, 2] if count > 1 else [1, 1])]  # one fact: nothing is left before p


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 40))
def test_buckets_cost_the_least(lengths: list[int], max_tokens: int) -> None:
    """The division is the best of all contiguous ones, found by trying them all."""
    lengths = sorted(lengths, reverse=True)

    def cost(spans: list[tuple[int, int]]) -> float:
        sizes = [lengths[a] * (b - a) for a, b in spans]
        fits = all(size <= max_tokens or b - a == 1 for size, (a, b) in zip(sizes, spans, strict=True))
        return sum(sizes) + BUCKET_COST * len(spans) if fits else float("inf")

    n = len(lengths)
    every = []
    for cuts in range(2 ** (n - 1)):
        ends = [i + 1 for i in range(n - 1) if cuts >> i & 1] + [n]
        every.append(cost(list(zip([0, *ends[:-1]], ends, strict=True))))
    found = divide(lengths, max_tokens)
    assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])]
    assert cost(found) == min(every)


def test_wrong_input_is_named() -> None:
    adapter = Adapter.for_model(tiny("llama"))
    with pytest.raises(ValueError, match=r"optimise_targets: facts must hold at least one fact, got none"):
        optimise_targets(adapter, tokenizer(), [], CONTEXTS, CONFIG)
    with torch.no_grad():
        adapter.model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match=r"the loss must be finite, got NaN or Inf for facts \['a'"):
        optimise_targets(adapter, tokenizer(), FACTS, CONTEXTS, CONFIG)
