"""Running a span of decoder layers on given hidden states, with the arguments the model itself would pass.

The model's own forward prepares masks, rotary embeddings and cache; `capture` lets it do so with every layer
replaced by a pass-through, and keeps each layer's arguments. `run` then calls layers `start .. stop-1` with them.
Nothing of a family's attention is rewritten here. Tested with transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from .parts import Parts
from .products import Tokens

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Calls:
    """Arguments of every decoder layer for one batch, and the hidden states entering layer 0."""

    def __init__(self, hidden: Tensor, calls: list[Call], tokens: Tokens | None = None) -> None:
        self.hidden = hidden
        self._calls, self._tokens = calls, tokens

    def run(self, adapter: Parts, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Hidden states (B, T, d) behind layer `stop - 1`, given those entering layer `start`."""
        adapter.processes.awake()
        layers = adapter.layers[start:stop]
        with adapter.products(layers.modules(), self._tokens):
            for layer, (args, kwargs) in zip(layers, self._calls[start:stop], strict=True):
                hidden = _tensor(layer(hidden, *args, **kwargs))
        return hidden


@torch.no_grad()
def capture(adapter: Parts, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None = None) -> Calls:
    """Prepare layer calls for a batch without running any layer.

    Args:
        ids: token ids (B, T), int64.
        mask: (B, past + T), 1 for real tokens.
        positions: (B, T), position of each token in its own sequence.
        cache: keys and values of the past; layers that are run later read it (and write it, if it is a growing one).
    """
    calls: list[Call] = []
    entering: list[Tensor] = []

    def stub(hidden: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.pop("hidden_states") if hidden is None else hidden
        entering[:] = entering or [hidden]
        calls.append((args, kwargs))
        return (hidden, None) if adapter.tuples else hidden

    adapter.processes.awake()
    with _Forwards(adapter, stub), adapter.processes.idle(list(adapter.layers)):
        adapter.base(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
    return Calls(entering[0], calls, Tokens.of(mask[:, mask.shape[1] - ids.shape[1] :]))


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Outputs of a module, call by call, while the block runs."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _args, output: seen.append(_tensor(output)))
    try:
        yield seen
    finally:
        handle.remove()


class FrozenLayer(DynamicLayer):
    """Past keys and values (B, heads, P, head size) that `update` prepends and never changes."""

    def __init__(self, keys: Tensor | None, values: Tensor | None, length: int) -> None:
        super().__init__()
        self.keys, self.values, self._length = keys, values, length
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Past and new states together; the past stays as it is, so that gradients flow through the new part only."""
        if self._length == 0:
            return key_states, value_states
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)

    def get_seq_length(self) -> int:
        """Length of the past."""
        return self._length


def frozen_cache(cache: Cache, length: int, num_layers: int, rows: Tensor | None = None) -> Cache:
    """Read-only view of the first `length` columns of a cache, for batch `rows`; unfilled layers stay empty."""

    def part(states: Tensor | None) -> Tensor | None:
        if states is None or states.numel() == 0:
            return None
        states = states[..., :length, :]
        return states if rows is None else states[rows.to(states.device)]

    filled = list(cache.layers) + [None] * (num_layers - len(cache.layers))
    return Cache(
        layers=[
            FrozenLayer(part(getattr(layer, "keys", None)), part(getattr(layer, "values", None)), length)
            for layer in filled
        ]
    )


class _Forwards:
    """Replaces the `forward` of every decoder layer while active."""

    def __init__(self, adapter: Parts, stub: Callable[..., Any]) -> None:
        self._layers, self._stub = adapter.layers, stub
        self._own: list[Any] = []

    def __enter__(self) -> None:
        for layer in self._layers:
            self._own.append(layer.__dict__.get("forward"))
            layer.forward = self._stub

    def __exit__(self, *_: object) -> None:
        for layer, own in zip(self._layers, self._own, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
