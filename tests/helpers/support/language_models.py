"""Tiny randomly initialised language models of every supported family, and a tokenizer, made without a network."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlsedit.config import EditConfig
from rlsedit.facts import Fact

SENTENCES = [
    "The mother tongue of Danielle Darrieux is French and the capital of Norway is Oslo",
    "Oslo is a city in Norway. Lima is the capital of Peru. Peru is a country",
    "Because the twin city of Wellington is Sydney, you and I think the atomic number is seven",
    "Therefore Quito belongs to Ecuador. The currency of Japan is yen. Tokyo lies in Japan",
] * 4

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, max_position_embeddings=96
)
ROTARY = dict(SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0)

FAMILIES: dict[str, dict[str, object]] = {
    "llama": ROTARY,
    "mistral": dict(ROTARY, sliding_window=6),
    "qwen2": dict(ROTARY, use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "qwen3": ROTARY,
    "gemma": ROTARY,
    "phi": dict(SIZES, pad_token_id=0, partial_rotary_factor=0.5),
    "phi3": dict(ROTARY, rope_scaling=None),
    "gpt2": dict(n_embd=32, n_inner=48, n_layer=5, n_head=4, n_positions=96, resid_pdrop=0.1, embd_pdrop=0.1),
    "gptj": dict(n_embd=32, n_inner=48, n_layer=5, n_head=4, n_positions=96, rotary_dim=4),
}
# A norm follows the MLP: targets are outputs of the MLP, and one layer is edited.
POST_NORM: dict[str, dict[str, object]] = {"gemma2": ROTARY, "gemma3_text": dict(ROTARY, sliding_window=6)}

FOUR = dict(ROTARY, num_hidden_layers=4)
MIXED = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
DELTA = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=4)
# Layers that keep another state than keys and values.
HYBRID: dict[str, dict[str, object]] = {
    "qwen3_5_text": dict(FOUR, **DELTA, layer_types=MIXED),
    "lfm2": dict(FOUR, layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False, conv_bias=True),
    "olmo_hybrid": dict(FOUR, **DELTA, layer_types=MIXED),
    "falcon_h1": dict(FOUR, **MAMBA, mamba_d_ssm=64, lm_head_multiplier=0.5, mlp_multipliers=[0.7, 0.6]),
    "recurrent_gemma": dict(FOUR, lru_width=32, attention_window_size=6, logits_soft_cap=2.0),
    "granitemoehybrid": dict(
        FOUR, **MAMBA, layer_types=MIXED, shared_intermediate_size=48, num_local_experts=0, num_experts_per_tok=0,
        residual_multiplier=0.4, logits_scaling=2.0,
    ),
}  # fmt: skip

CONFIG = EditConfig(layers=(1, 2), steps=8, lr=0.2, contexts=2, context_length=4, mom2_weight=20.0, max_tokens=64)

SMALL_EDITS = [
    "--layers",
    "1-2",
    "--device",
    "cpu",
    "--set",
    "steps=2",
    "--set",
    "contexts=1",
    "--set",
    "context_length=3",
]
SMALL_EDITS += ["--set", "mom2_weight=20"]
"""Flags of `rlsedit edit` for them."""

FACTS = [
    Fact("a", "The mother tongue of {} is", "Danielle Darrieux", "English", "French",
         ("Danielle Darrieux speaks",), ("The mother tongue of Lima is",), ("French",)),
    Fact("b", "{} is the capital of", "Lima", "Norway", "Peru",
         ("The city Lima belongs to",), ("Oslo is the capital of",)),
    Fact("c", "The twin city of {} is", "Wellington", "Quito in Ecuador", "Sydney"),
    Fact("d", "I think {} lies in the country", "Tokyo", "Peru", "Japan", ("Tokyo is in",)),
]  # fmt: skip


@lru_cache
def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences; with `bos` it puts <s> in front."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(SENTENCES, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A model of `family` with weights large enough that attention and MLP matter."""
    values = {**{**FAMILIES, **POST_NORM, **HYBRID}[family], **changes}
    config = CONFIG_MAPPING[family](vocab_size=400, bos_token_id=1, eos_token_id=2, **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.to(dtype).eval()


def on_disk(folder: Path, family: str = "llama", paragraphs: str = "\n\n") -> Path:
    """A folder with what a command wants: a tiny float32 model with its tokenizer, named by family, and `text.txt`."""
    tiny(family, torch.float32).save_pretrained(folder / family)
    tokenizer().save_pretrained(folder / family)
    (folder / "text.txt").write_text(paragraphs.join(SENTENCES * 3), encoding="utf-8")
    return folder


def random_moments(model: torch.nn.Module, layers: tuple[int, ...], width: int = 48) -> dict[int, torch.Tensor]:
    """Well-conditioned second moments of the right size."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for layer in layers:
        keys = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
        found[layer] = keys.T @ keys / len(keys)
    return found
