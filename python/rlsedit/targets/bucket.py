"""Rows of similar length whose objective is evaluated together.

A step runs the layers above L on the tokens p, p+1, .. of each row only (on all where these layers cannot be run on a
cache), and forms logits where the objective looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..models.adapter import Adapter
from ..models.replay import FrozenLayer, capture
from ..prompts import align
from .objective import Terms
from .prepare import Prepared
from .reading import read_terms


class Bucket:
    """A batch of prepared rows.

    Args:
        adapter: the model, frozen.
        rows: rows of similar length.
        layer: the last edited layer L.
        nll_weight: weight of a prompt (1 / number of contexts); the mean over the answer tokens is taken here.
    """

    @torch.no_grad()
    def __init__(self, adapter: Adapter, rows: Sequence[Prepared], layer: int, nll_weight: float) -> None:
        self._adapter, self._layer, self._rows = adapter, layer, list(rows)
        pivots = [p.row.pivot for p in rows]
        self._batch = batch = align([p.row.inputs for p in rows], pivots, adapter.device, front=adapter.cached)
        start = batch.column if adapter.cached else 0
        past = _past(rows, start, layer, adapter.num_layers) if adapter.cached else None
        self._calls = capture(adapter, batch.ids[:, start:], batch.mask, batch.positions[:, start:], past)
        self._hidden = torch.nn.utils.rnn.pad_sequence([p.hidden for p in rows], batch_first=True)
        inner = [p.inner for p in rows if p.inner is not None]
        self._inner = torch.stack(inner) if inner else None
        answers = [
            (b, at - p.row.pivot + p.at, p.row.encoding.ids[at + 1], nll_weight / len(p.row.wanted))
            for b, p in enumerate(rows)
            if p.row.kind == "nll"
            for at in p.row.wanted
        ]
        self._anchors = [b for b, p in enumerate(rows) if p.row.kind == "kl"]
        ends = [(b, rows[b].length - 1) for b in self._anchors]
        device = self._hidden.device
        self._at = torch.tensor([a[:2] for a in answers] + ends, device=device).T
        self._facts = torch.tensor([p.row.fact for p in rows], device=device)
        self._tokens = torch.tensor([a[2] for a in answers], dtype=torch.long, device=device)
        self._weights = torch.tensor([a[3] for a in answers], dtype=torch.float64, device=device)

    def loss(self, delta: Tensor, kl: float) -> Tensor:
        """Sum of the rows' terms for each fact (F,), differentiable in `delta` (F, d); zero for facts not in here."""
        terms = self.terms(delta)
        return terms.answer + kl * terms.drift

    def terms(self, delta: Tensor) -> Terms:
        """The terms of the loss for each fact, differentiable in `delta` (F, d); zero for facts not in here."""
        moves = delta[self._facts].to(self._hidden.dtype)
        if self._adapter.cached:
            shifted = self._adapter.shifted(self._layer, self._hidden[:, 0], self._inner, moves).unsqueeze(1)
            hidden = torch.cat([shifted, self._hidden[:, 1:]], 1)
        else:
            start = self._batch.chosen(self._hidden)
            hidden = self._batch.replaced(self._hidden, self._adapter.shifted(self._layer, start, self._inner, moves))
        hidden = self._calls.run(self._adapter, hidden, self._layer + 1, self._adapter.num_layers)
        at = self._at.to(hidden.device)  # layers may lie on several devices
        starts = [self._rows[b].log_start for b in self._anchors]
        read = read_terms(self._adapter, hidden[at[0], at[1]], self._tokens, starts)
        for b, known in zip(self._anchors, starts, strict=True):  # from the first step on, where delta is 0
            self._rows[b].log_start = known
        return read.by_fact(self._facts[self._at[0]], self._weights, len(delta))


def _past(rows: Sequence[Prepared], length: int, layer: int, num_layers: int) -> Cache:
    """Keys and values of the rows, padded on the left to `length` tokens; layers up to `layer` have none."""
    layers: list[Any] = [FrozenLayer(None, None, length) for _ in range(layer + 1)]
    for n in range(num_layers - layer - 1):
        parts = [(p.row.pivot, *p.past[n]) for p in rows if p.past] if length else []
        if not parts:
            layers.append(FrozenLayer(None, None, length))
            continue
        heads, _, size = parts[0][1].shape
        keys = parts[0][1].new_zeros(len(rows), heads, length, size)
        values = parts[0][2].new_zeros(len(rows), heads, length, parts[0][2].shape[-1])
        for b, p in enumerate(rows):
            if p.past:
                keys[b, :, length - p.row.pivot :], values[b, :, length - p.row.pivot :] = p.past[n]
        layers.append(FrozenLayer(keys, values, length))
    return Cache(layers=layers)


BUCKET_COST = 160
"""What a further bucket costs, in tokens of padding: it reads all weights once more, and padding is not multiplied."""


def make_buckets(
    adapter: Adapter, rows: Sequence[Prepared], layer: int, contexts: int, max_tokens: int
) -> list[Bucket]:
    """Split rows into buckets of about `max_tokens` tokens that change with delta at most, at least cost in tokens."""
    ordered = sorted(rows, key=lambda p: (-p.length, p.row.fact))
    groups = divide([p.length for p in ordered], max_tokens)
    return [Bucket(adapter, ordered[a:b], layer, 1 / contexts) for a, b in groups]


def divide(lengths: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """Spans [a, b) of descending `lengths` with the least sum of padded tokens and `BUCKET_COST` a span.

    A span holds `max_tokens` padded tokens at most, or one row.
    """
    best: list[tuple[int, int]] = [(0, 0)]  # for the first b rows: cost, start of the last span
    for b in range(1, len(lengths) + 1):
        options = []
        for a in range(b - 1, -1, -1):
            tokens = lengths[a] * (b - a)
            if tokens > max_tokens and b - a > 1:
                break
            options.append((best[a][0] + tokens + BUCKET_COST, a))
        best.append(min(options))
    spans: list[tuple[int, int]] = []
    b = len(lengths)
    while b > 0:
        spans.append((best[b][1], b))
        b = best[b][1]
    return spans[::-1]
