"""Finding the parts of an architecture that the table does not know, by watching one run of the model.

What is found is a proposal: `Adapter.for_model` compares it with the model itself (the hidden state moves one for one,
the logits are the model's, the layers run one by one on a cache give the same), and refuses what does not agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..parallel import plain_class
from .families import Family
from .modes import evaluating

_MIXERS = frozenset(
    (
        "attention_mask", "position_embeddings", "position_ids", "past_key_values", "past_key_value", "layer_past",
        "alibi", "cache", "cache_params", "cache_position",
    )
)  # fmt: skip
"""Arguments that only what mixes tokens is called with: attention, a state space, a convolution."""


@dataclass(frozen=True)
class _Call:
    """One call of a module: its path, its first tensor, what it gave, and the names of its other arguments."""

    path: str
    module: nn.Module
    given: Tensor
    gave: Tensor
    names: frozenset[str]


def detect(model: nn.Module) -> Family:
    """Where a causal LM keeps its decoder layers, the MLP's output projection, the final norm and the head.

    Args:
        model: a causal LM of transformers; it is run once on four tokens.

    Returns:
        Family whose `module` is that linear map of the first decoder layer, outside of its attention, that gives hidden
        states and reads the widest rows (of several the last), and whose `post` is the norm that reads what this map
        gives, if one does in any layer. `attention` is None.

    Raises:
        ValueError: a part that was not found; the message says which.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        raise ValueError("it has no output embeddings")
    calls = _watched(model)
    layers, stack = _layers(model, calls)
    base = layers.rpartition(".")[0]
    if "input_ids" not in signature(model.get_submodule(base).forward).parameters:
        raise ValueError(f"{base}, which holds {layers}, takes no input_ids")
    behind = [call.gave for call in calls if call.module is stack[-1]]
    before = [call.given for call in calls if call.module is head]
    if not before:
        raise ValueError("its output embeddings are not called")
    beside = [call for call in calls if not call.path.startswith(f"{layers}.")]
    norms = [call.path for call in beside if _same(call.given, behind[-1]) and _same(call.gave, before[-1])]
    if not norms:
        raise ValueError(f"no norm alone stands between {layers} and the head")
    parts = [_module(calls, f"{layers}.{n}.", behind[-1].shape[-1]) for n in range(len(stack))]
    module = parts[0][0]
    if module is None:
        raise ValueError(
            f"{type(stack[0]).__name__} has no plain nn.Linear or Conv1D beside its attention that gives hidden states "
            "(experts, a state space?)"
        )
    post = next((post for path, post in parts if path == module and post is not None), None)
    return Family(layers, module, norms[-1], _path(model, head), post, None)


def _watched(model: nn.Module) -> list[_Call]:
    """Every call of a module in one run on four tokens, in the order in which they end."""
    calls: list[_Call] = []

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            gave = output[0] if isinstance(output, tuple) and output else output
            if given is not None and isinstance(gave, Tensor):
                calls.append(_Call(path, module, given, gave, frozenset(kwargs)))

        return hook

    named = [(path, module) for path, module in model.named_modules() if path]
    handles = [module.register_forward_hook(watch(path), with_kwargs=True) for path, module in named]
    try:
        with torch.no_grad(), evaluating(model):
            model(input_ids=torch.arange(1, 5, device=next(model.parameters()).device)[None], use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"it does not run on four tokens alone ({type(error).__name__}: {error})") from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _layers(model: nn.Module, calls: Sequence[_Call]) -> tuple[str, nn.ModuleList]:
    """The outermost list of as many modules as the configuration has layers, all of which were called."""
    called = {id(call.module) for call in calls}
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[operator, union-attr]
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and all(id(part) in called for part in module):
            return path, module
    raise ValueError(f"no nn.ModuleList of {count} layers, as many as the configuration names, is called")


def _module(calls: Sequence[_Call], layer: str, size: int) -> tuple[str | None, str | None]:
    """Path, inside of a layer, of the MLP's output projection, and of the norm that reads its output."""
    calls = [call for call in calls if call.path.startswith(layer)]
    mixers = tuple(f"{call.path}." for call in calls if call.names & _MIXERS)
    calls = [call for call in calls if not f"{call.path}.".startswith(mixers)] if mixers else calls
    maps = [call for call in calls if plain_class(call.module) in (nn.Linear, Conv1D) and call.gave.shape[-1] == size]
    if not maps:
        return None, None
    widest = max(call.given.shape[-1] for call in maps)
    last = [call for call in maps if call.given.shape[-1] == widest][-1]
    readers = (call for call in calls if _same(call.given, last.gave) and "norm" in type(call.module).__name__.lower())
    post = next((call.path.removeprefix(layer) for call in readers), None)
    return last.path.removeprefix(layer), post


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.device == right.device and torch.equal(left, right)


def _path(model: nn.Module, part: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is part)
