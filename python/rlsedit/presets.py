"""Hyper-parameters by model and method: published presets, and values derived from the depth of other models."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, TypeVar

from .config import EditConfig
from .methods import Method, get_method
from .models.detect import detect
from .models.families import FAMILIES

_Config = TypeVar("_Config", bound=EditConfig)


def preset(config: _Config, model: Any, method: str | Method, changes: Mapping[str, Any]) -> _Config:
    """`config` with what the model and the method ask for, and `changes` on top; see `EditConfig.for_model`."""
    recipe = get_method(method) if isinstance(method, str) else method
    if unknown := set(changes) - {field.name for field in fields(config)}:
        raise TypeError(f"EditConfig.for_model: unknown fields {sorted(unknown)}")
    about = getattr(model, "config", model).get_text_config()
    shape = (about.model_type, about.num_hidden_layers, about.hidden_size)
    known = PRESETS.get(shape)
    usual = METHOD_PRESETS.get((recipe.name, None), {})
    values = {**usual, **(known if known is not None else derived(about.num_hidden_layers))}
    if recipe.single or _has_norm_behind(model, about.model_type):
        values["layers"] = values["layers"][-1:]
    own = METHOD_PRESETS.get((recipe.name, shape), {})
    found = replace(config, **{**values, **own, **changes})
    recipe.check(found)
    return found


def _has_norm_behind(model: Any, kind: str) -> bool:
    """Whether a norm stands behind the MLP; of an unknown architecture only a model, not a config, can tell."""
    family = FAMILIES.get(kind)
    if family is None and hasattr(model, "named_modules"):
        with suppress(ValueError):
            family = detect(model)
    return family is not None and family.post is not None


def derived(num_layers: int) -> dict[str, Any]:
    """Values for a model without a preset: up to five layers that end at about 0.3 of its depth."""
    last = max(0, round(0.3 * num_layers) - 1)
    return {"layers": _span(max(0, last - 4), last)}


def _span(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


# (model_type, layers, hidden size) -> fields that differ from the defaults of EditConfig
PRESETS: dict[tuple[str, int, int], dict[str, Any]] = {
    ("llama", 32, 4096): {"layers": _span(4, 8)},  # Llama-3-8B
    ("llama", 28, 3072): {"layers": _span(2, 6)},  # Llama-3.2-3B
    ("qwen2", 28, 3584): {"layers": _span(7, 11)},  # Qwen2.5-7B
    ("gpt2", 48, 1600): {"layers": _span(13, 17), "steps": 20, "lr": 0.5, "mom2_weight": 20000.0},  # GPT-2 XL
    ("gptj", 28, 4096): {"layers": _span(3, 8), "lr": 0.5},  # GPT-J
    # Gemma 3 270M, by trial on eight facts: keys are small beside those of Llama, so is the weight of the anchor.
    ("gemma3_text", 18, 640): {
        "layers": (5,),
        "lr": 0.5,
        "clamp": 0.75,
        "relative_to": "hidden",
        "stop_loss": 0.15,
        "contexts": 2,
        "mom2_weight": 30.0,
    },
    ("llama", 30, 576): {  # SmolLM2-135M, measured on facts about countries, cities and elements
        "layers": _span(4, 8),
        "lr": 0.5,
        "clamp": 0.6,
        "relative_to": "hidden",
        "stop_loss": 0.15,
        "contexts": 2,
        "mom2_weight": 3000.0,
    },
}


_GPT2_XL, _GPT_J, _LLAMA3 = ("gpt2", 48, 1600), ("gptj", 28, 4096), ("llama", 32, 4096)
_LLAMA32, _QWEN25 = ("llama", 28, 3072), ("qwen2", 28, 3584)


_ROME: dict[str, Any] = {"clamp": 4.0, "relative_to": "module", "contexts": 20}
"""ROME's release, for every model it has: twenty prefixes, a wide bound relative to the output of the MLP."""


# (method, shape of the model or None for all) -> fields in which the method's release differs from the above
METHOD_PRESETS: dict[tuple[str, tuple[str, int, int] | None], dict[str, Any]] = {
    **{
        (name, shape): {**_ROME, **values}
        for name in ("rome", "r_rome")
        for shape, values in (
            (None, {}),
            (_GPT2_XL, {"layers": (17,)}),
            (_GPT_J, {"layers": (5,), "steps": 20}),
            (_LLAMA3, {"layers": (5,), "lr": 0.5, "decay": 1e-3}),
        )
    },
    # The release multiplies E[k k'] by 1,000 and 10,000 and adds 0.1 I to K C_0 K': that is gamma 0.1 times as much.
    ("emmet", _GPT2_XL): {"layers": (17,), "gamma": 100.0},
    ("emmet", _GPT_J): {"layers": (5,), "gamma": 1000.0},
    ("encore", _GPT2_XL): {"norm_weight": 10.0, "patience": 4},
    ("encore", _LLAMA3): {"lr": 0.5},
    ("evoedit", _GPT2_XL): {"l2": 1.0},
    ("evoedit", _GPT_J): {"l2": 1.0},
    ("evoedit", _LLAMA3): {"l2": 4.0},
    ("evoedit", _LLAMA32): {"l2": 3.0},
    ("evoedit", _QWEN25): {"l2": 2.0},
    **{("lyaplock", shape): {"mom2_weight": 1000.0} for shape in (_GPT2_XL, _GPT_J, _LLAMA3)},
    ("pmet", None): {"kl": 1.0},
    ("pmet", _GPT_J): {"lr": 0.2, "steps": 30, "mom2_weight": 6000.0},
    ("ft", _GPT2_XL): {"layers": (0,)},
    ("ft", _GPT_J): {"layers": (21,)},
    ("ft", _LLAMA3): {"layers": (21,)},
}
