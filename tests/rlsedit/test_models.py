"""Adapters find the right parts in every family and refuse what cannot be edited; replay equals the model's forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import language_models as lm
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from rlsedit.config import EditConfig
from rlsedit.editor import Editor
from rlsedit.models import FAMILIES, Adapter
from rlsedit.models.replay import capture, frozen_cache
from rlsedit.prompts import align

LIKE_LLAMA = dict(layers="model.layers", module="mlp.down_proj", norm="model.norm", head="lm_head")


@pytest.mark.parametrize("family", lm.FAMILIES)
def test_parts(family: str) -> None:
    model = lm.tiny(family)
    adapter = Adapter.for_model(model)
    module = adapter.edited(1)
    assert adapter.num_layers == 5
    assert adapter.layout == ("in_out" if isinstance(module, Conv1D) else "out_in")
    assert adapter.rows(1).shape == (48, 32)
    x = torch.randn(3, 48, dtype=torch.float64)
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(module(x), x @ adapter.rows(1) + bias)
    adapter.rows(1)[0, 0] = 7.0  # a view, not a copy
    assert module.weight.detach()[0, 0] == 7.0


def test_a_square_conv1d_is_not_taken_for_a_linear() -> None:
    adapter = Adapter.for_model(lm.tiny("gpt2", n_inner=32))
    assert adapter.layout == "in_out"
    assert adapter.rows(0).data_ptr() == adapter.edited(0).weight.data_ptr()
    assert adapter.rows(0).stride() == adapter.edited(0).weight.stride()


@pytest.mark.parametrize("family", [*lm.FAMILIES, *lm.POST_NORM])
@pytest.mark.parametrize("window", [False, True])
def test_replay_equals_the_model(family: str, window: bool) -> None:
    """Padded rows, split in the middle: first part into a cache, second part on top of it, logits at chosen places."""
    # Gemma 2 computes its softmax in float32, where the mask value of float64 is minus infinity: test it in float32.
    dtype = torch.float32 if family == "gemma2" else torch.float64
    known = {**lm.FAMILIES, **lm.POST_NORM}[family]
    model = lm.tiny(family, dtype, **({"sliding_window": 3} if window and "sliding_window" in known else {}))
    adapter = Adapter.for_model(model, edit=False)
    rows = [[5, 9, 40, 41, 7, 300], [77, 8, 6], [12, 13, 14, 15, 16, 17, 18, 19, 20]]
    pivots = [3, 0, 6]
    batch = align(rows, pivots)
    p = batch.column
    cache = DynamicCache()
    with torch.no_grad():
        first = capture(adapter, batch.ids[:, :p], batch.mask[:, :p], batch.positions[:, :p], cache)
        first.run(adapter, first.hidden, 0, 5)
        past = frozen_cache(cache, p, 5)
        for _ in range(2):  # the cache is read, not written
            second = capture(adapter, batch.ids[:, p:], batch.mask, batch.positions[:, p:], past)
            logits = adapter.logits(second.run(adapter, second.hidden, 0, 5))
        for i, (row, pivot) in enumerate(zip(rows, pivots, strict=True)):
            wanted = model(torch.tensor([row])).logits[0, pivot:]
            tolerance = 1e-4 if family in ("gemma2", "gptj") else 1e-9
            torch.testing.assert_close(logits[i, : len(row) - pivot], wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", lm.POST_NORM)
@torch.no_grad()
def test_behind_a_norm_the_target_is_an_output_of_the_mlp(family: str) -> None:
    """A shift of the MLP's output moves the hidden state as `shifted` says, and not one for one."""
    model = lm.tiny(family, torch.float32 if family == "gemma2" else torch.float64)
    adapter = Adapter.for_model(model)
    assert adapter.target(2) is adapter.edited(2)
    ids, delta = torch.tensor([[5, 17, 9]]), torch.linspace(-1, 1, 32, dtype=next(model.parameters()).dtype)
    inner: list[torch.Tensor] = []

    def behind(shift: torch.Tensor) -> torch.Tensor:
        handle = adapter.target(2).register_forward_hook(lambda _m, _a, out: inner.append(out) or out + shift)
        try:
            return model(ids, output_hidden_states=True).hidden_states[3]
        finally:
            handle.remove()

    hidden, moved = behind(torch.zeros_like(delta)), behind(delta)
    torch.testing.assert_close(adapter.shifted(2, hidden, inner[0], delta), moved, rtol=1e-5, atol=1e-5)
    assert (moved - hidden - delta).norm() > 1e-2


def test_the_probe_finds_a_norm_that_the_table_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "gemma2", FAMILIES["llama"])
    with pytest.raises(ValueError, match=r"does not move one for one with 'mlp.down_proj'"):
        Adapter.for_model(lm.tiny("gemma2"))


def test_unknown_architectures_are_told_what_to_pass() -> None:
    model = lm.tiny("llama")
    model.config.model_type = "mystery"
    model.get_output_embeddings = lambda: None  # nothing that a run could show
    with pytest.raises(
        ValueError, match=r"'mystery' .* no output embeddings. Pass layers= .* module= .* norm= .* head="
    ):
        Adapter.for_model(model)
    parts = LIKE_LLAMA
    assert Adapter.for_model(model, **parts).edited(3) is model.model.layers[3].mlp.down_proj
    with pytest.raises(ValueError, match=r"module='mlp.fc9' is not in LlamaDecoderLayer .* children are"):
        Adapter.for_model(model, **{**parts, "module": "mlp.fc9"})
    with pytest.raises(TypeError, match=r"overrides must be among"):
        Adapter.for_model(model, weights="x")
    with pytest.raises(ValueError, match=r"attention='attn' is not in LlamaDecoderLayer .* children are"):
        Adapter.for_model(model, **parts, attention="attn")


def test_pmet_of_an_unknown_architecture_is_told_what_to_pass_and_takes_it() -> None:
    model, config = lm.tiny("llama"), replace(lm.CONFIG, steps=2)
    model.config.model_type = "mystery"
    changed = []
    for adapter in (
        Adapter.for_model(model, **LIKE_LLAMA),
        Adapter.for_model(model, **LIKE_LLAMA, attention="self_attn"),
    ):
        about = dict(adapter=adapter, moments=lm.random_moments(model, config.layers))
        if adapter.attention_path is None:
            with pytest.raises(ValueError, match="PMET needs it: pass attention= to"):
                Editor(model, lm.tokenizer(), "pmet", config, **about)
            continue
        editor = Editor(model, lm.tokenizer(), "pmet", config, **about)
        editor.edit(lm.FACTS[:2])
        changed.append(not torch.equal(editor.first_weights[1], adapter.rows(1)))
    assert changed == [True]


def test_a_module_that_sees_all_tokens_in_one_row_is_refused() -> None:
    """OPT runs rows together before its MLP: keys at a column of each row would not be found there."""
    config = CONFIG_MAPPING["opt"](
        vocab_size=400, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    parts = dict(layers="model.decoder.layers", module="fc2", norm="model.decoder.final_layer_norm", head="lm_head")
    assert Adapter.for_model(model, edit=False, **parts).num_layers == 2
    with pytest.raises(ValueError, match=r"module='fc2' must be called with inputs of shape \(rows, tokens, d\)"):
        Adapter.for_model(model, **parts)


def test_several_layers_in_front_of_norms_are_for_methods_without_a_residual() -> None:
    model = lm.tiny("gemma2", torch.float32)
    about = dict(adapter=Adapter.for_model(model), moments=lm.random_moments(model, (1, 2)))
    for name in ("ultraedit", "ft"):
        editor = Editor(model, lm.tokenizer(), name, EditConfig(layers=(1, 2), ft_steps=1), **about)
        editor.edit(lm.FACTS[:2])
        assert not torch.equal(editor.first_weights[1], editor.adapter.rows(1))
        editor.reset()
    with pytest.raises(ValueError, match="must be one layer where a norm follows the MLP"):
        Editor(model, lm.tokenizer(), "memit", EditConfig(layers=(1, 2)), **about)


def outside_the_table(kind: str, **changes: object) -> nn.Module:
    config = CONFIG_MAPPING[kind](vocab_size=400, bos_token_id=1, eos_token_id=2, **{**lm.ROTARY, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.mark.parametrize(("kind", "changes"), [("cohere", {"logit_scale": 0.25}), ("granite", {"logits_scaling": 8.0})])
def test_a_factor_of_the_logits_is_taken_along(kind: str, changes: dict[str, object]) -> None:
    """Without it z* and all scores were those of another model, in silence."""
    model = outside_the_table(kind, **changes)
    adapter = Adapter.for_model(model, **LIKE_LLAMA)
    ids = torch.tensor([[5, 9, 40, 41, 7, 300]])
    batch = align(ids.tolist(), [0])
    with torch.no_grad():
        calls = capture(adapter, batch.ids, batch.mask, batch.positions)
        logits = adapter.logits(calls.run(adapter, calls.hidden, 0, adapter.num_layers))
        torch.testing.assert_close(logits, model(ids).logits)


def test_parts_that_do_not_give_the_logits_of_the_model_are_refused() -> None:
    model = outside_the_table("cohere", logit_scale=0.25)
    model.config.logit_scale = None  # the model has kept it: a factor that the adapter does not know of
    with pytest.raises(ValueError, match=r"must be the logits of the model; they differ by 3 of their norm"):
        Adapter.for_model(model, edit=False, **LIKE_LLAMA)
    model = lm.tiny("llama")
    model.model.norm.weight.data.normal_()
    with pytest.raises(ValueError, match="they differ by"):
        Adapter.for_model(model, norm="model.layers.1.input_layernorm")


@pytest.mark.parametrize(
    ("family", "module"), [("llama", "mlp.gate_proj"), ("gemma2", "mlp.up_proj"), ("gpt2", "mlp.c_fc")]
)
def test_a_module_inside_of_the_mlp_is_for_methods_without_a_residual(family: str, module: str) -> None:
    """UltraEdit's release edits such projections."""
    model = lm.tiny(family, torch.float32)
    adapter = Adapter.for_model(model, module=module)
    moments = lm.random_moments(model, (2,), width=32)
    before = adapter.rows(2).clone()
    for name in ("ultraedit", "ft"):
        editor = Editor(
            model, lm.tokenizer(), name, EditConfig(layers=(2,), ft_steps=1), adapter=adapter, moments=moments
        )
        editor.edit(lm.FACTS[:2])
        assert bool((adapter.rows(2) != before).any())
        editor.reset()
    for name in ("memit", "rome", "pmet", "simie"):
        with pytest.raises(ValueError, match=rf"adapter does not fit '{name}': .* one for one with '{module}'"):
            Editor(model, lm.tokenizer(), name, EditConfig(layers=(2,)), adapter=adapter, moments=moments)


def test_quantised_layers_are_refused_with_advice() -> None:
    model = lm.tiny("llama", torch.float32)
    quantised = nn.Module()
    quantised.weight = nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), requires_grad=False)
    model.model.layers[0].mlp.down_proj = quantised
    with pytest.raises(ValueError, match=r"must be a plain nn.Linear or Conv1D .* got Module .*int8; load a quantised"):
        Adapter.for_model(model)


def test_parts_stay_in_training_or_out_of_it() -> None:
    """A part that is kept in evaluation mode while the rest trains was put into training with the rest."""
    model = lm.tiny("gpt2").train()
    model.transformer.h[1].eval()
    model.transformer.wte.weight.requires_grad_(False)
    before = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()]
    Adapter.for_model(model, norm="transformer.ln_f")
    assert [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()] == before


def test_a_model_that_is_not_finite() -> None:
    model = lm.tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="model must have finite activations, got NaN or Inf in layer 0"):
        Adapter.for_model(model)


def test_layers_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"layer must be in \[0, 5\), got 5"):
        Adapter.for_model(lm.tiny("llama")).edited(5)
