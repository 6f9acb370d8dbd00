"""Models that `accelerate` has put on devices layer by layer; the CPU is the only one here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.editors import editor, everything, facts, same_bits
from support.language_models import tiny, tokenizer

from rlsedit import Editor


def test_a_model_behind_the_hooks_of_a_device_map_is_edited_to_the_same_bits() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = editor("rlsedit")
    model: Any = tiny("llama", torch.float32)
    parts = {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"}
    places = {name: "cpu" for name in parts | {f"model.layers.{n}" for n in range(5)}}
    accelerate.dispatch_model(model, places, force_hooks=True)
    assert all(hasattr(layer, "_hf_hook") for layer in model.model.layers)
    hooked = Editor(model, tokenizer(), "rlsedit", plain.config, moments=plain._moments)
    for one in (plain, hooked):
        one.edit(facts(4), batch_size=2)
        one.undo()
        one.edit(facts(2, 6))
    assert same_bits(everything(plain), everything(hooked))
