"""What is constant in the objective of each row, computed once: hidden states behind L, keys and values above it.

Let L be the last edited layer and p the last subject token, where delta is added behind layer L. Then
 - hidden states behind layer L do not depend on delta: layers 0 .. L run once;
 - tokens before p do not depend on it in any layer: their keys and values above L are computed once;
 - rows of one context begin with the same tokens: these are read once for all of them.

Layers that keep another state than keys and values run on whole rows: of these only the first holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ..models.adapter import Adapter
from ..models.replay import capture, frozen_cache, outputs_of
from ..prompts import align
from .rows import Row


@dataclass
class Prepared:
    """A row reduced to what a step needs.

    Attributes:
        row: the row.
        hidden: (S, d) hidden states behind layer L of the tokens p, p+1, ..., or of all where nothing is cached.
        past: for each layer above L, keys and values (heads, p, head size) of the tokens before p, if they are cached.
        at: place of p in `hidden`.
        inner: (d,) output of the edited module of layer L at p, where it was asked for.
        log_start: for a KL row, log-probabilities (vocabulary,) at delta = 0, known after the first step.
    """

    row: Row
    hidden: Tensor
    past: list[tuple[Tensor, Tensor]]
    at: int = 0
    inner: Tensor | None = None
    log_start: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens that a step reads."""
        return len(self.hidden)


@torch.no_grad()
def prepare_rows(
    adapter: Adapter, rows: Sequence[Row], layer: int, max_tokens: int, inside: bool = False
) -> list[Prepared]:
    """Reduce `rows` for a variable behind `layer`, in passes of about `max_tokens` tokens at most.

    `inside` asks for the outputs of the edited module too, as a norm behind it does.
    """
    inside = inside or adapter.behind(layer) is not None
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.context), []).append(row)
    found: list[Prepared] = []
    for group in groups.values():
        shared = _common_length([row.inputs[: row.pivot] for row in group]) if adapter.cached else 0
        cache = _read_shared(adapter, group[0].inputs[:shared]) if adapter.cached else None
        group = sorted(group, key=lambda row: len(row.inputs))
        while group:
            take = len(group)
            while take > 1 and take * (len(group[take - 1].inputs) - shared) > max_tokens:
                take -= 1
            if cache is None:
                found += _prepare_whole(adapter, group[:take], layer, inside)
            else:
                found += _prepare_group(adapter, group[:take], layer, shared, cache, inside)
            group = group[take:]
    return found


def _prepare_group(
    adapter: Adapter, rows: Sequence[Row], layer: int, shared: int, cache: Cache, inside: bool
) -> list[Prepared]:
    """Rows padded on the right, behind `shared` tokens whose keys and values are known."""
    count, layers = len(rows), adapter.num_layers
    same = torch.zeros(count, dtype=torch.long, device=adapter.device)
    batch = align([row.inputs[shared:] for row in rows], [0] * count, adapter.device)
    positions = batch.positions + shared
    mask = torch.cat([torch.ones(count, shared, dtype=torch.long, device=adapter.device), batch.mask], 1)
    past = frozen_cache(cache, shared, layers, same)
    lower = capture(adapter, batch.ids, mask, positions, past)
    with outputs_of(adapter.edited(layer) if inside else adapter.layers[layer]) as outputs:
        hidden = lower.run(adapter, lower.hidden, 0, layer + 1)
    before = max(row.pivot for row in rows) - shared
    growing = _growing(past)
    if before > 0:
        ids, seen = batch.ids[:, :before], mask[:, : shared + before]
        prefix = capture(adapter, ids, seen, positions[:, :before], growing)
        prefix.run(adapter, hidden[:, :before], layer + 1, layers)
    return [
        Prepared(
            row,
            hidden[b, row.pivot - shared : len(row.inputs) - shared].clone(),
            [_states(growing, n, b, row.pivot) for n in range(layer + 1, layers)] if row.pivot > 0 else [],
            inner=outputs[0][b, row.pivot - shared].clone() if inside else None,
        )
        for b, row in enumerate(rows)
    ]


def _prepare_whole(adapter: Adapter, rows: Sequence[Row], layer: int, inside: bool) -> list[Prepared]:
    """Rows padded on the right, of which all tokens are kept."""
    batch = align([row.inputs for row in rows], [row.pivot for row in rows], adapter.device, front=False)
    lower = capture(adapter, batch.ids, batch.mask, batch.positions)
    with outputs_of(adapter.edited(layer) if inside else adapter.layers[layer]) as outputs:
        hidden = lower.run(adapter, lower.hidden, 0, layer + 1)
    inner = batch.chosen(outputs[0])
    return [
        Prepared(row, hidden[b, : len(row.inputs)].clone(), [], row.pivot, inner[b].clone() if inside else None)
        for b, row in enumerate(rows)
    ]


def _read_shared(adapter: Adapter, ids: Sequence[int]) -> Cache:
    """Keys and values of the tokens with which all rows begin, in every layer."""
    cache = DynamicCache()
    if ids:
        batch = align([ids], [0], adapter.device)
        calls = capture(adapter, batch.ids, batch.mask, batch.positions, cache)
        calls.run(adapter, calls.hidden, 0, adapter.num_layers)
    return cache


def _growing(past: Cache) -> Cache:
    """A cache that starts from `past` and keeps what the layers read."""
    cache = DynamicCache()
    for n, part in enumerate(past.layers):
        keys, values = getattr(part, "keys", None), getattr(part, "values", None)
        if keys is not None and values is not None:
            cache.update(keys, values, n)
    return cache


def _states(cache: Cache, layer: int, row: int, length: int) -> tuple[Tensor, Tensor]:
    part: Any = cache.layers[layer]
    return part.keys[row, :, :length].clone(), part.values[row, :, :length].clone()


def _common_length(rows: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all rows begin."""
    return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))))
