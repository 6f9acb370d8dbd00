"""Hyper-parameters of an edit; `presets.py` has those of known models and methods."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .methods import Method

RELATIVE_TO = ("hidden", "module")

_MOST = {"contexts": 10_000, "context_length": 100_000, "steps": 1_000_000, "ft_steps": 1_000_000}
"""Beyond these an edit would not end: every prefix and every step is a run of the model."""


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
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"EditConfig: {name} must be at most {most}, got {getattr(self, name)}")
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
        from .presets import preset  # it knows methods and models, which stand above this file

        return preset(cls(), model, method, changes)
