"""Rows of similar length whose objective is evaluated together, with everything constant computed once.

Let L be the last edited layer and p the last subject token, where delta is added behind layer L. Then
 - hidden states behind layer L do not depend on delta: layers 0 .. L run once;
 - tokens before p do not depend on it in any layer: their keys and values above L are computed once;
 - a step runs layers L+1 .. on tokens p, p+1, .. only, and forms logits where the objective looks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ..models.adapter import Adapter
from ..models.replay import capture, frozen_cache
from ..prompts import align
from .objective import answer_loss, divergence, log_probabilities
from .rows import Row


class Bucket:
    """A batch of rows, reduced to what changes with delta.

    Args:
        adapter: the model, frozen.
        rows: rows of similar length.
        layer: the last edited layer L.
        nll_weight: weight of a prompt (1 / number of contexts); the mean over the answer tokens is taken here.
    """

    @torch.no_grad()
    def __init__(self, adapter: Adapter, rows: Sequence[Row], layer: int, nll_weight: float) -> None:
        self._adapter, self._layer, self._weight = adapter, layer, nll_weight
        batch = align([row.inputs for row in rows], [row.pivot for row in rows], adapter.device)
        p = batch.column
        lower = capture(adapter, batch.ids, batch.mask, batch.positions)
        hidden = lower.run(adapter, lower.hidden, 0, layer + 1)
        past: Cache = DynamicCache()
        if p > 0:
            prefix = capture(adapter, batch.ids[:, :p], batch.mask[:, :p], batch.positions[:, :p], past)
            prefix.run(adapter, hidden[:, :p], layer + 1, adapter.num_layers)
        self._set(rows, batch.ids[:, p:], batch.mask, batch.positions[:, p:], hidden[:, p:], past, None)

    @torch.no_grad()
    def _set(
        self,
        rows: Sequence[Row],
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        hidden: Tensor,
        past: Cache,
        kept: Tensor | None,
    ) -> None:
        adapter, device = self._adapter, hidden.device
        length = mask.shape[1] - ids.shape[1]
        self.rows, self._ids, self._mask, self._positions = list(rows), ids, mask, positions
        self.hidden = hidden.contiguous()
        self._past = frozen_cache(past, length, adapter.num_layers, kept)
        self._calls = capture(adapter, ids, mask, positions, self._past)
        self.facts = torch.tensor([row.fact for row in self.rows], device=device)
        answers = [
            (b, at - row.pivot, row.encoding.ids[at + 1], self._weight / len(row.wanted))
            for b, row in enumerate(self.rows)
            if row.kind == "nll"
            for at in row.wanted
        ]
        anchors = [(b, at - row.pivot) for b, row in enumerate(self.rows) if row.kind == "kl" for at in row.wanted]
        self._count = len(answers)
        self._at = torch.tensor([a[:2] for a in answers] + anchors, device=device).T
        self._tokens = torch.tensor([a[2] for a in answers], dtype=torch.long, device=device)
        self._weights = torch.tensor([a[3] for a in answers], device=device, dtype=torch.float64)
        self._anchor_rows = [b for b, _ in anchors]
        self.log_start: Tensor | None = None

    @property
    def start(self) -> Tensor:
        """Hidden states (B, d) at the pivots behind layer L, without delta."""
        return self.hidden[:, 0]

    def loss(self, delta: Tensor, kl: float) -> Tensor:
        """Sum of the rows' terms for each fact (F,), differentiable in `delta` (F, d)."""
        shifted = (self.hidden[:, 0] + delta[self.facts].to(self.hidden.dtype)).unsqueeze(1)
        hidden = torch.cat([shifted, self.hidden[:, 1:]], 1)
        hidden = self._calls.run(self._adapter, hidden, self._layer + 1, self._adapter.num_layers)
        logits = self._adapter.logits(hidden[self._at[0], self._at[1]])
        terms = answer_loss(logits[: self._count], self._tokens)
        total = torch.zeros(len(delta), dtype=terms.dtype, device=delta.device)
        total = total.index_add(0, self.facts[self._at[0, : self._count]], terms * self._weights.to(terms.dtype))
        if self._anchor_rows:
            if self.log_start is None:  # delta is zero in the first step
                self.log_start = log_probabilities(logits[self._count :].detach())
            drift = divergence(logits[self._count :], self.log_start)
            total = total.index_add(0, self.facts[self._at[0, self._count :]], kl * drift)
        return total

    def keep(self, wanted: Sequence[bool]) -> bool:
        """Drop the rows of facts f without `wanted[f]`; False when none is left."""
        kept = [b for b, row in enumerate(self.rows) if wanted[row.fact]]
        if len(kept) < len(self.rows) and kept:
            index = torch.tensor(kept, device=self.hidden.device)
            log_start = self.log_start
            if log_start is not None:
                log_start = log_start[[i for i, b in enumerate(self._anchor_rows) if b in set(kept)]]
            self._set(
                [self.rows[b] for b in kept],
                self._ids[index],
                self._mask[index],
                self._positions[index],
                self.hidden[index],
                self._past,
                index,
            )
            self.log_start = log_start
        return bool(kept)


def make_buckets(adapter: Adapter, rows: Sequence[Row], layer: int, contexts: int, max_tokens: int) -> list[Bucket]:
    """Split rows into buckets of similar suffix length, of about `max_tokens` tokens that change with delta at most."""
    order = sorted(rows, key=lambda row: (len(row.inputs) - row.pivot, row.fact, row.pivot))
    groups: list[list[Row]] = []
    for row in reversed(order):
        length = len(row.inputs) - row.pivot
        if groups:
            longest = len(groups[-1][0].inputs) - groups[-1][0].pivot
            tokens = longest * len(groups[-1])
            if tokens + longest <= max_tokens and (length > 0.75 * longest or tokens < max_tokens // 8):
                groups[-1].append(row)
                continue
        groups.append([row])
    return [Bucket(adapter, group, layer, 1 / contexts) for group in groups]
