"""Architectures that the table does not know: their parts are found in a run, and what cannot be edited is refused."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from support import language_models as lm
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlsedit.config import EditConfig
from rlsedit.editor import Editor
from rlsedit.facts import Fact
from rlsedit.models import FAMILIES, Adapter
from rlsedit.models.detect import detect
from rlsedit.models.probe import check_replay, other_states
from rlsedit.models.replay import outputs_of
from rlsedit.targets import Targets, optimise_targets

WORDS = dict(vocab_size=400, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIZES = dict(lm.SIZES, num_hidden_layers=3)
ROTARY = dict(lm.ROTARY, num_hidden_layers=3)
GPT = dict(n_embd=32, n_inner=48, n_layer=3, n_head=4, n_positions=96)
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
DEEPSEEK = {**ROTARY, **LATENT, **EXPERTS, "num_key_value_heads": 4}
LOCAL = dict(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
PER_LAYER = dict(vocab_size_per_layer_input=400, hidden_size_per_layer_input=8, num_kv_shared_layers=0)

# kind -> configuration, the edited module, a norm behind it
FOUND: dict[str, tuple[dict[str, object], str, str | None]] = {
    "apertus": (ROTARY, "mlp.down_proj", None),
    "arcee": (ROTARY, "mlp.down_proj", None),
    "biogpt": (SIZES, "fc2", None),
    "bitnet": (ROTARY, "mlp.down_proj", None),
    "bloom": (dict(hidden_size=32, n_layer=3, n_head=4), "mlp.dense_4h_to_h", None),
    "codegen": (dict(GPT, rotary_dim=4), "mlp.fc_out", None),
    "cohere": (dict(ROTARY, logit_scale=0.25), "mlp.down_proj", None),
    "cohere2": (ROTARY, "mlp.down_proj", None),
    "cwm": (ROTARY, "mlp.down_proj", None),
    "deepseek_v3": (dict(DEEPSEEK, first_k_dense_replace=3), "mlp.down_proj", None),
    "ernie4_5": (ROTARY, "mlp.down_proj", None),
    "exaone4": (ROTARY, "mlp.down_proj", "post_feedforward_layernorm"),
    "glm": (ROTARY, "mlp.down_proj", None),
    "glm4": (ROTARY, "mlp.down_proj", "post_mlp_layernorm"),
    "gpt_bigcode": (GPT, "mlp.c_proj", None),
    "gpt_neo": (LOCAL, "mlp.c_proj", None),
    "gpt_neox": (SIZES, "mlp.dense_4h_to_h", None),
    "granite": (dict(ROTARY, logits_scaling=8.0), "mlp.down_proj", None),
    "helium": (ROTARY, "mlp.down_proj", None),
    "hunyuan_v1_dense": (ROTARY, "mlp.down_proj", None),
    "lfm2": (dict(ROTARY, layer_types=["full_attention"] * 3, block_auto_adjust_ff_dim=False), "feed_forward.w2", None),
    "ministral": (ROTARY, "mlp.down_proj", None),
    "mpt": (dict(d_model=32, n_layers=3, n_heads=4), "ffn.down_proj", None),
    "nanochat": (ROTARY, "mlp.fc2", None),
    "nemotron": (ROTARY, "mlp.down_proj", None),
    "olmo": (ROTARY, "mlp.down_proj", None),
    "olmo2": (ROTARY, "mlp.down_proj", "post_feedforward_layernorm"),
    "olmo3": (ROTARY, "mlp.down_proj", "post_feedforward_layernorm"),
    "persimmon": (SIZES, "mlp.dense_4h_to_h", None),
    "seed_oss": (ROTARY, "mlp.down_proj", None),
    "smollm3": (ROTARY, "mlp.down_proj", None),
    "stablelm": (ROTARY, "mlp.down_proj", None),
    "starcoder2": (ROTARY, "mlp.c_proj", None),
    "vaultgemma": (ROTARY, "mlp.down_proj", None),
    "xglm": (dict(d_model=32, ffn_dim=48, num_layers=3, attention_heads=4), "fc2", None),
}  # fmt: skip

REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "mixtral": (ROTARY, "no plain nn.Linear or Conv1D beside its attention .*experts"),
    "falcon_mamba": (SIZES, "no plain nn.Linear or Conv1D beside its attention .* a state space"),
    "gemma4_text": (
        dict(ROTARY, **PER_LAYER, global_head_dim=8),
        "does not move one for one with 'mlp.down_proj'",
    ),
    "bert": (dict(SIZES, is_decoder=True), "bert.encoder, which holds bert.encoder.layer, takes no input_ids"),
    "xlm": (dict(emb_dim=32, n_layers=2, n_heads=4, n_words=400), "no norm alone stands between"),
}  # fmt: skip


def model_of(kind: str, values: dict[str, object]) -> nn.Module:
    config = CONFIG_MAPPING[kind](**{**WORDS, **values})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.eval()


@pytest.mark.parametrize("family", [*lm.FAMILIES, *lm.POST_NORM])
def test_it_finds_what_the_table_says(family: str) -> None:
    known = FAMILIES[family]
    assert asdict(detect(lm.tiny(family, torch.float32))) == {**asdict(known), "attention": None}


@pytest.mark.parametrize("kind", FOUND)
def test_parts_of_architectures_beyond_the_table(kind: str) -> None:
    values, module, post = FOUND[kind]
    model = model_of(kind, values)
    adapter = Adapter.for_model(model)
    assert kind not in FAMILIES
    assert (adapter.module, adapter.post) == (module, post)
    assert (adapter.cached, other_states(model.config)) == (True, False)
    ids = torch.tensor([[5, 9, 40, 41, 7, 300]])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        wanted = model(ids).logits
        assert len(hidden) == adapter.num_layers + 1
    edited = adapter.edited(1)
    assert edited.weight.numel() == adapter.rows(1).numel()
    with torch.no_grad():
        adapter.rows(1).zero_()
        assert not torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_edited_is_refused_with_the_reason(kind: str) -> None:
    values, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        Adapter.for_model(model_of(kind, values))


GRANITE = dict(ROTARY, residual_multiplier=0.22, logits_scaling=8.0, embedding_multiplier=12.0)


def test_a_factor_behind_the_mlp_is_found() -> None:
    adapter = Adapter.for_model(model_of("granite", GRANITE))
    assert (adapter.factor, adapter.direct) == (0.22, True)
    model = model_of("granite", GRANITE)
    model.config.residual_multiplier = 5.0  # the layers have kept theirs
    assert Adapter.for_model(model).factor == pytest.approx(0.22, rel=1e-3)
    model.model.layers[2].residual_multiplier = 0.5
    with pytest.raises(ValueError, match="nor by one factor in all layers"):
        Adapter.for_model(model)
    with pytest.raises(ValueError, match=r"does not move one for one with 'mlp.down_proj'"):  # and a norm
        Adapter.for_model(model_of("hyperclovax", dict(ROTARY, residual_multiplier=0.5, use_post_norm=True)))


@pytest.mark.parametrize("method", ["memit", "rome", "r_rome"])
def test_a_residual_is_in_the_units_of_the_module(method: str) -> None:
    """With Sigma almost left out, the hidden state behind the last edited layer becomes z* whatever the factor is."""
    model = model_of("granite", GRANITE).double()
    layers = (2,) if method != "memit" else (1, 2)
    config = EditConfig(layers=layers, steps=4, lr=0.3, clamp=4.0, contexts=0, mom2_weight=1e-6)
    adapter = Adapter.for_model(model)
    fact = Fact("a", "We go to {}", "Lima", "Norway", "Peru")
    found: list[Targets] = []

    def find(*args: Any, **options: Any) -> Targets:
        found.append(optimise_targets(*args, **options))
        return found[0]

    editor = Editor(model, lm.tokenizer(), method, config, moments=lm.random_moments(model, layers), targets=find)
    editor.edit([fact])
    ids = lm.tokenizer()("We go to Lima").input_ids
    with torch.no_grad(), outputs_of(adapter.layers[2]) as seen:
        model(torch.tensor([ids]))
    assert (found[0].z[0] - found[0].start[0]).norm() > 0.1
    torch.testing.assert_close(seen[0][0, -1], found[0].z[0], rtol=1e-3, atol=1e-3)


def test_methods_that_take_no_factor_refuse_it() -> None:
    model = model_of("granite", GRANITE)
    adapter = Adapter.for_model(model, attention="self_attn")
    with pytest.raises(ValueError, match=r"does not fit 'pmet': what the MLP adds is scaled by 0\.22"):
        Editor(
            model, lm.tokenizer(), "pmet", EditConfig(layers=(1,)), adapter=adapter,
            moments=lm.random_moments(model, (1,)),
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["bloom", "gpt_neox", "mpt", "olmo2", "stablelm"])
def test_facts_are_written_into_them(kind: str) -> None:
    model = model_of(kind, FOUND[kind][0])
    facts = [Fact("a", "We go to {}", "Lima", "Norway", "Peru"), Fact("b", "It is near {}", "Tokyo", "Quito", "Japan")]
    config = EditConfig.for_model(model, "memit", steps=25, lr=0.3, clamp=4.0, contexts=0, mom2_weight=0.01)
    assert len(config.layers) == 1
    width = Adapter.for_model(model).rows(0).shape[0]
    editor = Editor(model, lm.tokenizer(), "memit", config, moments=lm.random_moments(model, config.layers, width))
    before = editor.evaluate(facts).rows
    editor.edit(facts)
    after = editor.evaluate(facts).rows
    rises = [new["log_probability_new"] - old["log_probability_new"] for new, old in zip(after, before, strict=True)]
    assert min(rises) > 1.0


def test_one_part_may_be_named_and_the_others_found() -> None:
    model = model_of("gpt_neox", FOUND["gpt_neox"][0])
    assert Adapter.for_model(model, module="mlp.dense_h_to_4h").direct is False
    assert Adapter.for_model(model, attention="attention").attention(1) is model.gpt_neox.layers[1].attention
    with pytest.raises(ValueError, match=r"norm='gpt_neox.norm' is not in GPTNeoXForCausalLM"):
        Adapter.for_model(model, norm="gpt_neox.norm")


def test_a_mode_and_hooks_are_put_back() -> None:
    model = model_of("stablelm", ROTARY).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    detect(model)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    model.model.norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(ValueError, match=r"does not run on four tokens alone \(RuntimeError: no\)"):
        detect(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_cannot_be_run_one_by_one_are_refused() -> None:
    """A layer that forgets what stands in the cache is run on whole rows; one that sees what follows is not."""
    model = model_of("stablelm", ROTARY)
    adapter = Adapter.for_model(model)
    forward = type(model.model.layers[1]).forward

    def forgetful(hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        return forward(model.model.layers[1], hidden * (1 + 0.1 * (hidden.shape[1] == 2)), *args, **kwargs)

    assert check_replay(adapter)
    model.model.layers[1].forward = forgetful
    alone = r"the logits differ by 0\.\d+ of their norm"
    with pytest.raises(
        ValueError, match=rf"neither on a cache of keys and values \({alone}\) nor on whole rows \({alone}"
    ):
        check_replay(adapter)  # of two tokens alone it gives something else than of two before others

    def late(hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        cache = kwargs.get("past_key_values")
        return forward(model.model.layers[1], hidden if cache is None else 1.1 * hidden, *args, **kwargs)

    model.model.layers[1].forward = late
    assert not check_replay(adapter)


def test_a_layer_of_experts_is_named_when_it_is_edited() -> None:
    values = dict(DEEPSEEK, first_k_dense_replace=2)
    adapter = Adapter.for_model(model_of("deepseek_v3", values))
    adapter.edited(1)
    with pytest.raises(ValueError, match=r"module='mlp.down_proj' is not in DeepseekV3DecoderLayer"):
        adapter.edited(2)


def test_detection_is_a_proposal_that_overrides_replace() -> None:
    model = model_of("olmo2", ROTARY)
    family = detect(model)
    assert family.post == "post_feedforward_layernorm"
    given = {name: value for name, value in asdict(family).items() if name in ("layers", "module", "norm", "head")}
    adapter = Adapter.for_model(model, **given)  # four names do not say that a norm follows
    assert (adapter.post, adapter.direct) == (None, False)
