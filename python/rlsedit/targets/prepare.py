"""What is constant in the objective of each row, computed once: hidden states behind L, keys and values above it.

Let L be the last edited layer and p the last subject token, where delta is added behind layer L. Then
 - hidden states behind layer L do not depend on delta: layers 0 .. L run once;
 - tokens before p do not depend on it in any layer: their keys and values above L are computed once;
 - rows of one context begin with the same tokens: these are read once for all of them, and for all contexts together.

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
    owner = {name: g for g, name in enumerate(groups)}
    owners = [owner[row.kind, row.context] for row in rows]
    begin = _read_shared(adapter, list(groups.values())) if adapter.cached else None
    left = [len(row.inputs) - (begin.lengths[g] if begin else 0) for row, g in zip(rows, owners, strict=True)]
    order = sorted(range(len(rows)), key=left.__getitem__)
    found: list[Prepared] = []
    while order:
        take = len(order)
        while take > 1 and take * left[order[take - 1]] > max_tokens:
            take -= 1
        part = [rows[i] for i in order[:take]]
        if begin is None:
            found += _prepare_whole(adapter, part, layer, inside)
        else:
            found += _prepare_behind(adapter, part, [owners[i] for i in order[:take]], begin, layer, inside)
        order = order[take:]
    return found


@dataclass(frozen=True)
class _Beginnings:
    """What the rows of each group begin with, read once.

    Attributes:
        lengths: number of tokens, by group.
        cache: their keys and values in every layer, padded in front to one length P.
        places: (groups,) int64, rows of the cache; any where a group has no such tokens.
        mask: (groups, P), 1 for tokens.
    """

    lengths: list[int]
    cache: Cache
    places: Tensor
    mask: Tensor


def _read_shared(adapter: Adapter, groups: Sequence[Sequence[Row]]) -> _Beginnings:
    """The tokens with which all rows of a group begin, of all groups together; a group without any is not looked at."""
    lengths = [_common_length([row.inputs[: row.pivot] for row in group]) for group in groups]
    some = [g for g, length in enumerate(lengths) if length > 0]
    cache, device = DynamicCache(), adapter.device
    places = torch.zeros(len(groups), dtype=torch.long, device=device)
    mask = torch.zeros(len(groups), max(lengths), dtype=torch.long, device=device)
    if some:
        batch = align([groups[g][0].inputs[: lengths[g]] for g in some], [lengths[g] - 1 for g in some], device)
        calls = capture(adapter, batch.ids, batch.mask, batch.positions, cache)
        calls.run(adapter, calls.hidden, 0, adapter.num_layers)
        places[some], mask[some] = torch.arange(len(some), device=device), batch.mask
    return _Beginnings(lengths, cache, places, mask)


def _prepare_behind(
    adapter: Adapter, rows: Sequence[Row], owners: Sequence[int], begin: _Beginnings, layer: int, inside: bool
) -> list[Prepared]:
    """Rows padded on the right, behind what the groups `owners` begin with."""
    layers, longest = adapter.num_layers, begin.mask.shape[1]
    known = [begin.lengths[g] for g in owners]
    owner = torch.tensor(owners, device=adapter.device)
    batch = align([row.inputs[n:] for row, n in zip(rows, known, strict=True)], [0] * len(rows), adapter.device)
    positions = batch.positions + begin.mask[owner].sum(1, keepdim=True)
    mask = torch.cat([begin.mask[owner], batch.mask], 1)
    past = frozen_cache(begin.cache, longest, layers, begin.places[owner])
    lower = capture(adapter, batch.ids, mask, positions, past)
    with outputs_of(adapter.edited(layer) if inside else adapter.layers[layer]) as outputs:
        hidden = lower.run(adapter, lower.hidden, 0, layer + 1)
    before = max(row.pivot - n for row, n in zip(rows, known, strict=True))
    growing = _growing(past)
    if before > 0:
        ids, seen = batch.ids[:, :before], mask[:, : longest + before]
        prefix = capture(adapter, ids, seen, positions[:, :before], growing)
        prefix.run(adapter, hidden[:, :before], layer + 1, layers)
    return [
        Prepared(
            row,
            hidden[b, row.pivot - n : len(row.inputs) - n].clone(),
            [_states(growing, m, b, longest - n, row.pivot) for m in range(layer + 1, layers)] if row.pivot > 0 else [],
            inner=outputs[0][b, row.pivot - n].clone() if inside else None,
        )
        for b, (row, n) in enumerate(zip(rows, known, strict=True))
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


def _growing(past: Cache) -> Cache:
    """A cache that starts from `past` and keeps what the layers read."""
    cache = DynamicCache()
    for n, part in enumerate(past.layers):
        keys, values = getattr(part, "keys", None), getattr(part, "values", None)
        if keys is not None and values is not None:
            cache.update(keys, values, n)
    return cache


def _states(cache: Cache, layer: int, row: int, start: int, length: int) -> tuple[Tensor, Tensor]:
    part: Any = cache.layers[layer]
    here = slice(start, start + length)
    return part.keys[row, :, here].clone(), part.values[row, :, here].clone()


def _common_length(rows: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all rows begin."""
    return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))))
