"""Keys of edited modules and hidden states at the last subject token, layer by layer while lower ones are edited.

Only tokens up to the last subject token matter, and only layers from the first edited one upward change: rows end
with this token, the layers below run once, and each further layer starts from
the hidden states kept behind the last layer that is final.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .models.adapter import Adapter
from .models.replay import Calls, capture, outputs_of
from .prompts import Context, align
from .targets.rows import Row


class KeyStream:
    """Hidden states of all fact rows, advanced through the layers as these become final.

    Args:
        adapter: the model.
        rows: rows of kind "nll", in the order fact, context.
        contexts: their contexts with the weights of the mean.
        max_tokens: token budget of one forward pass.
    """

    @torch.no_grad()
    def __init__(self, adapter: Adapter, rows: Sequence[Row], contexts: Sequence[Context], max_tokens: int) -> None:
        self._adapter, self._layer, self._facts = adapter, 0, len(rows) // len(contexts)
        self._processes = adapter.processes
        self._means = torch.tensor([c.weight for c in contexts], dtype=torch.float64, device=adapter.device)
        bare = [i for i, row in enumerate(rows) if row.context == 0]
        rest = [i for i, row in enumerate(rows) if row.context != 0]
        self._chunks = [_Chunk(adapter, rows, part) for part in _split(rows, bare, max_tokens)]
        self._bare = len(self._chunks)
        self._chunks += [_Chunk(adapter, rows, part) for part in _split(rows, rest, max_tokens)]

    def keys(self, layer: int) -> Tensor:
        """Keys (F, d) of `layer`, means over the contexts, in float32 (float64 for a float64 model).

        Layers below `layer` have to be final; the hidden states are advanced to its input.
        """
        return self.both(layer)[0]

    @torch.no_grad()
    def both(self, layer: int) -> tuple[Tensor, Tensor]:
        """Mean keys (F, d) of `layer` as `keys` gives them, and the keys (F, d) of the bare prompts."""
        self._advance(layer)
        found: Tensor | None = None
        for chunk in self._chunks:
            keys = chunk.inputs_of(self._adapter, layer)
            if found is None:
                found = torch.empty(self._facts * len(self._means), keys.shape[1], dtype=keys.dtype, device=keys.device)
            found[chunk.index.to(found.device)] = keys
        assert found is not None
        found = found.view(self._facts, len(self._means), -1)
        means = torch.einsum("fcd,c->fd", found, self._means.to(device=found.device, dtype=found.dtype))
        width = self._adapter.part(layer).d
        return self._processes.inputs(means, width), self._processes.inputs(found[:, 0], width)

    @torch.no_grad()
    def hidden(self, layer: int, module: nn.Module | None = None) -> Tensor:
        """What targets replace, (F, d): hidden states behind `layer`, or outputs of its MLP where a norm follows that.

        At the last subject token of the bare prompts, with today's weights; of another `module` of the layer if given.
        """
        module = self._adapter.target(layer) if module is None else module
        parts = [chunk.output_of(self._adapter, self._layer, layer, module) for chunk in self._chunks[: self._bare]]
        order = torch.cat([chunk.index for chunk in self._chunks[: self._bare]]).argsort()
        return self._processes.same(torch.cat(parts)[order.to(parts[0].device)])[0]

    def _advance(self, layer: int) -> None:
        if layer < self._layer:
            raise ValueError(f"KeyStream: layers must be asked for in ascending order, got {layer} after {self._layer}")
        for chunk in self._chunks:
            chunk.states = chunk.calls.run(self._adapter, chunk.states, self._layer, layer)
        self._layer = layer


class _Chunk:
    """Rows that run together: their layer arguments and the hidden states entering the current layer."""

    def __init__(self, adapter: Adapter, rows: Sequence[Row], part: Sequence[int]) -> None:
        pivots = [rows[i].pivot for i in part]
        ids = [rows[i].inputs[: rows[i].pivot + 1] for i in part]
        self.batch = batch = align(ids, pivots, adapter.device, front=adapter.cached)
        self.index = torch.tensor(part, device=adapter.device)
        self.calls: Calls = capture(adapter, batch.ids, batch.mask, batch.positions)
        self.states = self.calls.hidden

    def inputs_of(self, adapter: Adapter, layer: int) -> Tensor:
        """Inputs (n, d) of the edited module of `layer` at the last subject tokens."""
        seen: list[Tensor] = []

        def look(_module: Any, args: tuple[Tensor, ...]) -> None:
            seen.append(self.batch.chosen(args[0]).detach())

        handle = adapter.edited(layer).register_forward_pre_hook(look)
        try:
            self.calls.run(adapter, self.states, layer, layer + 1)
        finally:
            handle.remove()
        return _wide(seen[0])

    def output_of(self, adapter: Adapter, start: int, layer: int, module: nn.Module) -> Tensor:
        """Outputs (n, d) of a module of `layer` at the last subject tokens."""
        with outputs_of(module) as seen:
            self.calls.run(adapter, self.states, start, layer + 1)
        return _wide(self.batch.chosen(seen[0]))


def _split(rows: Sequence[Row], part: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices `part` in groups of similar length with at most about `max_tokens` tokens."""
    groups: list[list[int]] = []
    for i in sorted(part, key=lambda i: rows[i].pivot, reverse=True):
        if groups and (len(groups[-1]) + 1) * (rows[groups[-1][0]].pivot + 1) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _wide(states: Tensor) -> Tensor:
    return states if states.dtype == torch.float64 else states.float()
