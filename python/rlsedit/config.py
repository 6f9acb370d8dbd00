"""Hyper-parameters of an edit, with the published presets and derived values for other models."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from .models.families import FAMILIES

if TYPE_CHECKING:
    from .methods import Method

RELATIVE_TO = ("hidden", "module")


@dataclass(frozen=True)
class EditConfig:
    """Hyper-parameters; `EditConfig.for_model` fills in what depends on the model.

    Attributes:
        layers: edited layers, ascending; the target hidden state is taken behind the last of them.
        steps: evaluations of the target's loss at most (one Adam step less).
        lr: step size of Adam.
        clamp: bound of |delta| as a multiple of |h|; inf for none.
        kl: weight of the KL term on "{subject} is a".
        decay: weight of |delta| / |h|^2.
        relative_to: what |h| is in both: "hidden", the hidden state behind the last edited layer (MEMIT), or "module",
            the output of its edited module (ROME). PMET bounds each of its variables by the output that it shifts.
        stop_loss: a fact whose loss is below is done.
        contexts: number of random prefixes besides the bare prompt.
        context_length: sampled tokens in each prefix.
        seed: of the prefixes.
        mom2_weight: weight of the second moment E[k k'] in the anchor.
        mu: weight of the anchor term (RLSEdit, MEMIT).
        lam: weight lambda of the distance to the first weights (RLSEdit); 0 leaves the anchor alone.
        l2: regularisation of AlphaEdit.
        null_threshold: eigenvalues of E[k k'] below it span AlphaEdit's null space.
        noise: 1 / weight of a batch of facts.
        gamma: noise of a batch of more than one fact (EMMET).
        norm_weight: weight of |dW|^2 (ENCORE).
        patience: z* stops at the n-th evaluation in which every token of the new answer is the likeliest (ENCORE).
        langedit_samples: number of keys that E[k k'] stands for (LangEdit).
        lyap_alpha: bound of the anchor's loss as a multiple of that of the first batch (LyapLock).
        rect_share: share of the entries of a change that is kept (RECT).
        prune_base: base of the logarithm that restrains singular values (PRUNE).
        simie_ridge: weight lambda of the ridge (SimIE).
        ultraedit_rate: size of a step against the gradient (UltraEdit).
        ft_steps, ft_rate: steps and step size of Adam on the weights (FT).
        ft_bound: largest change of an entry in one batch, 0 for none (FT-L).
        ft_decay: weight decay (FT-W).
        batch_size: facts of one batch where `Editor.edit` is not told.
        max_tokens: token budget of one forward and backward pass; bounds memory, not results.
    """

    layers: tuple[int, ...] = ()
    steps: int = 25
    lr: float = 0.1
    clamp: float = 0.75
    kl: float = 0.0625
    decay: float = 0.5
    relative_to: str = "hidden"
    stop_loss: float = 0.05
    contexts: int = 5
    context_length: int = 10
    seed: int = 0
    mom2_weight: float = 15000.0
    mu: float = 1.0
    lam: float = 0.0
    l2: float = 10.0
    null_threshold: float = 2e-2
    noise: float = 1.0
    gamma: float = 0.1
    norm_weight: float = 20.0
    patience: int = 2
    langedit_samples: float = 100_000.0
    lyap_alpha: float = 60.0
    rect_share: float = 0.4
    prune_base: float = 1.2
    simie_ridge: float = 10.0
    ultraedit_rate: float = 1e-6
    ft_steps: int = 25
    ft_rate: float = 5e-4
    ft_bound: float = 0.0
    ft_decay: float = 0.0
    batch_size: int = 100
    max_tokens: int = 512

    def __post_init__(self) -> None:
        layers = tuple(self.layers) if isinstance(self.layers, Iterable) else (None,)
        if not all(type(layer) is int for layer in layers):
            raise TypeError(f"EditConfig: layers must be a list of whole numbers, got {self.layers!r}")
        object.__setattr__(self, "layers", layers)
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type == "int" and type(value) is not int:
                raise TypeError(f"EditConfig: {each.name} must be a whole number, got {value!r}")
            if each.type == "float" and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise TypeError(f"EditConfig: {each.name} must be a number, got {value!r}")
            if each.type == "float" and not abs(value) <= sys.float_info.max and each.name != "clamp":
                raise ValueError(f"EditConfig: {each.name} must be finite, got {value}")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"EditConfig: layers must be ascending and distinct, got {self.layers}")
        if not 0 <= self.seed < 2**63:  # as torch's generators take it
            raise ValueError(f"EditConfig: seed must be at least 0 and below 2^63, got {self.seed}")
        for name in ("steps", "context_length", "patience", "ft_steps", "batch_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"EditConfig: {name} must be at least 1, got {getattr(self, name)}")
        positive = (
            "lr", "clamp", "mom2_weight", "l2", "null_threshold", "langedit_samples", "lyap_alpha", "rect_share",
            "simie_ridge", "ultraedit_rate", "ft_rate",
        )  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"EditConfig: {name} must be positive, got {getattr(self, name)}")
        zero_or_more = (
            "kl", "decay", "stop_loss", "contexts", "mu", "lam", "noise", "gamma", "norm_weight", "ft_bound",
            "ft_decay",
        )  # fmt: skip
        for name in zero_or_more:
            if not getattr(self, name) >= 0:
                raise ValueError(f"EditConfig: {name} must not be negative, got {getattr(self, name)}")
        if self.relative_to not in RELATIVE_TO:
            raise ValueError(f"EditConfig: relative_to must be one of {RELATIVE_TO}, got {self.relative_to!r}")
        if not self.rect_share <= 1:
            raise ValueError(f"EditConfig: rect_share must be at most 1, got {self.rect_share}")
        if not self.prune_base > 1:
            raise ValueError(f"EditConfig: prune_base must be above 1, got {self.prune_base}")

    @classmethod
    def for_model(cls, model: Any, method: str | Method = "rlsedit", **changes: Any) -> EditConfig:
        """The preset of a known model for a method, or values derived from its depth; `changes` go on top.

        Args:
            model: a transformers causal LM, or its config.
            method: a name of `rlsedit.list_methods()`, or a recipe.
            **changes: fields of `EditConfig`.

        A family with a norm behind the MLP, and a method that edits one layer, get the last of the layers alone. What
        a method's release has for every model yields to the preset of a model, and that to the method's for the model.

        Raises:
            TypeError: unknown fields.
            ValueError: unknown method, values out of range, or a prior that would be zero.
        """
        from .methods import get_method

        recipe = get_method(method) if isinstance(method, str) else method
        if unknown := set(changes) - {field.name for field in fields(cls)}:
            raise TypeError(f"EditConfig.for_model: unknown fields {sorted(unknown)}")
        config = getattr(model, "config", model).get_text_config()
        shape = (config.model_type, config.num_hidden_layers, config.hidden_size)
        preset = PRESETS.get(shape)
        usual = METHOD_PRESETS.get((recipe.name, None), {})
        values = {**usual, **(preset if preset is not None else derived(config.num_hidden_layers))}
        if recipe.single or _has_norm_behind(model, config.model_type):
            values["layers"] = values["layers"][-1:]
        own = METHOD_PRESETS.get((recipe.name, shape), {})
        found = replace(cls(), **{**values, **own, **changes})
        recipe.check(found)
        return found


def _has_norm_behind(model: Any, kind: str) -> bool:
    """Whether a norm stands behind the MLP; of an unknown architecture only a model, not a config, can tell."""
    family = FAMILIES.get(kind)
    if family is None and hasattr(model, "named_modules"):
        from .models.detect import detect

        with suppress(ValueError):
            family = detect(model)
    return family is not None and family.post is not None


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


def derived(num_layers: int) -> dict[str, Any]:
    """Values for a model without a preset: up to five layers that end at about 0.3 of its depth."""
    last = max(0, round(0.3 * num_layers) - 1)
    return {"layers": _span(max(0, last - 4), last)}
