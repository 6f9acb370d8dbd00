"""Editors on tiny models, facts enough for a stream, and everything of an editor that must agree to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsedit.editor import Editor
from rlsedit.facts import Fact
from rlsedit.methods import get_method
from rlsedit.store.packing import pack

from .language_models import CONFIG, random_moments, tiny, tokenizer

_SUBJECTS = ("Oslo", "Lima", "Quito", "Sydney", "Wellington", "Tokyo", "Danielle Darrieux", "Peru", "Norway", "Japan")
_PROMPTS = ("The mother tongue of {} is", "I think {} lies in the country", "The twin city of {} is", "Because {} is")
_ANSWERS = ("French", "Peru", "yen", "Ecuador", "Sydney", "English", "Japan")

SETTINGS: dict[str, Any] = dict(steps=2, contexts=1, context_length=2, ft_steps=3)


def facts(count: int, first: int = 0) -> list[Fact]:
    """Distinct statements; ids "f0", "f1", ..."""
    found = []
    for i in range(first, first + count):
        subject = _SUBJECTS[i % len(_SUBJECTS)] + (f" {i // 40}" if i >= 40 else "")
        prompt = _PROMPTS[i // len(_SUBJECTS) % len(_PROMPTS)]
        found.append(Fact(f"f{i}", prompt, subject, _ANSWERS[i % len(_ANSWERS)]))
    return found


def editor(
    method: str = "rlsedit", dtype: torch.dtype = torch.float32, family: str = "llama", **changes: Any
) -> Editor:
    """An editor on a tiny model; cheap targets."""
    if get_method(method).single:
        changes.setdefault("layers", (2,))
    config = replace(CONFIG, **{"null_threshold": 1.0, **SETTINGS, **changes})
    model = tiny(family, dtype)
    return Editor(model, tokenizer(), method, config, moments=random_moments(model, config.layers))


def resumed(folder: Path, dtype: torch.dtype = torch.float32, family: str = "llama", **more: Any) -> Editor:
    """What a new process would have."""
    return Editor.resume(folder, tiny(family, dtype), tokenizer(), **more)


def everything(one: Editor) -> dict[str, Tensor]:
    """Weights of the model, masters, states and running figures."""
    parts: dict[str, Tensor] = {f"model.{name}": value for name, value in one.model.state_dict().items()}
    for n in one.config.layers:
        parts[f"master.{n}"] = one._weights.wide(n)
    values: list[float] = []
    for n, state in (one._layers or {}).items():
        kept: dict[str, Tensor] = {}
        tree = pack(state, f"state.{n}", kept)
        parts.update(kept)
        values += _numbers(tree)
    parts["numbers"] = torch.tensor(values, dtype=torch.float64)
    return {name: value.detach().clone() for name, value in parts.items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal names, shapes and bits."""
    return one.keys() == other.keys() and all(
        value.shape == other[name].shape and value.dtype == other[name].dtype and torch.equal(value, other[name])
        for name, value in one.items()
    )


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names that differ, for messages."""
    names = sorted(one.keys() ^ other.keys())
    return names + [n for n in one.keys() & other.keys() if not same_bits({n: one[n]}, {n: other[n]})]


def _numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [x for key in sorted(tree) for x in _numbers(tree[key])]
    if isinstance(tree, list):
        return [x for inner in tree for x in _numbers(inner)]
    return [float(tree)] if isinstance(tree, (int, float)) and not isinstance(tree, bool) else []
