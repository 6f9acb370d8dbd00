"""Presets, derived values and refused hyper-parameters."""

from __future__ import annotations

import pytest
from support.language_models import FAMILIES, tiny
from transformers import LlamaConfig, Qwen2Config

from rlsedit.config import EditConfig


def test_presets_of_the_papers() -> None:
    llama = LlamaConfig(num_hidden_layers=32, hidden_size=4096)
    config = EditConfig.for_model(llama)
    assert config.layers == (4, 5, 6, 7, 8)
    assert (config.mom2_weight, config.lam, config.mu, config.l2, config.null_threshold) == (15000, 0, 1, 10, 2e-2)
    assert (config.steps, config.lr, config.clamp, config.kl, config.decay) == (25, 0.1, 0.75, 0.0625, 0.5)
    assert EditConfig.for_model(Qwen2Config(num_hidden_layers=28, hidden_size=3584)).layers == (7, 8, 9, 10, 11)
    assert EditConfig.for_model(llama, layers=[3, 4], steps=7).layers == (3, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_derived_layers_exist(family: str) -> None:
    config = EditConfig.for_model(tiny(family))
    assert config.layers
    assert config.layers[-1] < 5


@pytest.mark.parametrize("layers", [1, 2, 7, 80])
def test_derived_layers_of_any_depth(layers: int) -> None:
    found = EditConfig.for_model(LlamaConfig(num_hidden_layers=layers, hidden_size=64)).layers
    assert 1 <= len(found) <= 5
    assert 0 <= found[0] <= found[-1] < layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (3, 2)}, r"layers must be ascending and distinct, got \(3, 2\)"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"noise": -1.0}, "noise must not be negative, got -1.0"),
        ({"clamp": float("nan")}, "clamp must be positive, got nan"),
    ],
)
def test_refused_values(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EditConfig(**changes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"unknown fields \['speed'\]"):
        EditConfig.for_model(tiny("llama"), speed=9)
