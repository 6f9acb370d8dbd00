"""Where each supported model family keeps the parts that locate-then-edit methods touch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Dotted paths of one family, relative to the causal LM (`module`: relative to a decoder layer)."""

    layers: str
    module: str
    norm: str
    head: str = "lm_head"
    refusal: str | None = None


_LLAMA = Family("model.layers", "mlp.down_proj", "model.norm")
_NORM_BEHIND_MLP = (
    "a norm follows the MLP, so the hidden state is not linear in the edited weight and a target optimised on the "
    "hidden state cannot be turned into a residual of `down_proj`; the target would have to be an output of the MLP "
    "itself, which is not implemented"
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": Family("model.layers", "mlp.down_proj", "model.norm", refusal=_NORM_BEHIND_MLP),
    "gemma3_text": Family("model.layers", "mlp.down_proj", "model.norm", refusal=_NORM_BEHIND_MLP),
    "gemma3": Family(
        "model.language_model.layers", "mlp.down_proj", "model.language_model.norm", refusal=_NORM_BEHIND_MLP
    ),
    "phi": Family("model.layers", "mlp.fc2", "model.final_layernorm"),
    "gpt2": Family("transformer.h", "mlp.c_proj", "transformer.ln_f"),
    "gptj": Family("transformer.h", "mlp.fc_out", "transformer.ln_f"),
}
