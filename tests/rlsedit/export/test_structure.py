"""Names on disk and names in the model, where families write them differently."""

from __future__ import annotations

import pytest
import torch
from support import language_models as lm
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlsedit.export.structure import Structure


def nest(path: str, leaf: nn.Module, root: nn.Module) -> None:
    *parents, name = path.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(name, leaf)


@pytest.fixture
def wrapped() -> Structure:
    """A text model and a vision tower inside one, named as Gemma 3 in transformers."""
    model = nn.Module()
    model.base_model_prefix = "model"
    for layer in (1, 11):
        nest(f"model.language_model.layers.{layer}.mlp.down_proj", nn.Linear(3, 2), model)
        nest(f"model.language_model.layers.{layer}.self_attn.q_proj", nn.Linear(3, 2), model)
        nest(f"model.vision_tower.encoder.layers.{layer}.self_attn.q_proj", nn.Linear(3, 2), model)
    nest("lm_head", nn.Linear(2, 5), model)
    return Structure(model)


def test_wrappers_in_another_order(wrapped: Structure) -> None:
    wanted = "model.language_model.layers.1.mlp.down_proj.weight"
    for name in (wanted, "language_model.model.layers.1.mlp.down_proj.weight", wanted.removeprefix("model.")):
        assert wrapped.parameter(name) == wanted
    assert wrapped.linear(wanted) == ("model.language_model.layers.1.mlp.down_proj", "out_in")
    eleven = "language_model.model.layers.11.mlp.down_proj.weight"
    assert wrapped.parameter(eleven) == "model.language_model.layers.11.mlp.down_proj.weight"


def test_names_that_could_be_either_stay_as_they_are(wrapped: Structure) -> None:
    for name in (
        "a.layers.1.self_attn.q_proj.weight",
        "layers.2.mlp.down_proj.weight",
        "h.0.attn.bias",
        "q_proj.weight",
    ):
        assert wrapped.parameter(name) == name
        assert wrapped.linear(name) is None
    mine = "vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight"
    assert wrapped.parameter(mine) == "model.vision_tower.encoder.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("family", lm.FAMILIES)
def test_every_family_is_found_without_its_weights(tmp_path: object, family: str) -> None:
    model = lm.tiny(family, torch.float32)
    model.config.save_pretrained(tmp_path)
    empty, full = Structure.of_folder(tmp_path), Structure(model)  # type: ignore[arg-type]
    assert empty.names == full.names
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D):
            assert empty.linear(f"{name}.weight") == (name, "in_out" if type(module) is Conv1D else "out_in")
    assert empty.linear(next(name for name in empty.names if "embed" in name or "wte" in name)) is None
