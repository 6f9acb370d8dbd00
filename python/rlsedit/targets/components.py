"""Targets of PMET: attention and MLP of the last edited layer get a variable each (Li et al. 2024, sec. 4, and code).

The output of the attention is shifted by one variable and that of the MLP by the other, at the last subject token. Both
are optimised with the usual loss, each with its own norm term and bound; the target is the MLP's output plus its
variable. A fact whose answer tokens are all likeliest has its answer term weighted 0.1, and leaves once its KL term is
at most 0.01. Layers below run once; a step runs the last edited layer and those above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import EditConfig
from ..facts import Fact
from ..models.adapter import Adapter
from ..models.replay import capture, outputs_of
from ..prompts import Context, align
from .descend import Stopping, Targets, descend, wide
from .objective import Terms
from .reading import read_terms
from .rows import Row, fact_rows

STOPPING = Stopping(ease=0.1, drift=0.01)


def component_targets(
    adapter: Adapter,
    tokenizer: Any,
    facts: Sequence[Fact],
    contexts: Sequence[Context],
    config: EditConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Targets:
    """Targets (F, d) for the output of the MLP of the last edited layer.

    Raises:
        ValueError: no facts, a fact that cannot be encoded, a loss that is not finite, or a family whose attention is
            not known.
    """
    if not facts:
        raise ValueError("component_targets: facts must hold at least one fact, got none")
    rows = fact_rows(tokenizer, facts, contexts)
    with adapter.frozen():
        groups = [Joint(adapter, part, config.layers[-1], len(contexts)) for part in _split(rows, config.max_tokens)]
        start = _starts(groups, len(facts))
        both = descend(lambda active: [g for g in groups if g.any_of(active)], start, facts, config, progress, STOPPING)
    return Targets(both.z[:, 0], both.start[:, 0], both.losses, both.steps)


class Joint:
    """Rows that run together through the last edited layer and those above."""

    @torch.no_grad()
    def __init__(self, adapter: Adapter, rows: Sequence[Row], layer: int, contexts: int) -> None:
        self._adapter, self._layer, self._rows = adapter, layer, rows
        pivots = [row.pivot for row in rows]
        self._batch = batch = align([row.inputs for row in rows], pivots, adapter.device, front=adapter.cached)
        first = [column - pivot for column, pivot in zip(batch.at.tolist(), pivots, strict=True)]
        self._calls = capture(adapter, batch.ids, batch.mask, batch.positions)
        self._hidden = self._calls.run(adapter, self._calls.hidden, 0, layer)
        device = self._hidden.device
        self._facts = torch.tensor([row.fact for row in rows], device=device)
        answers = [
            (b, first[b] + at, row.encoding.ids[at + 1], 1 / (contexts * len(row.wanted)))
            for b, row in enumerate(rows)
            if row.kind == "nll"
            for at in row.wanted
        ]
        ends = [(b, first[b] + len(row.inputs) - 1) for b, row in enumerate(rows) if row.kind == "kl"]
        self._at = torch.tensor([a[:2] for a in answers] + ends, device=device).T
        self._tokens = torch.tensor([a[2] for a in answers], dtype=torch.long, device=device)
        self._weights = torch.tensor([a[3] for a in answers], dtype=torch.float64, device=device)
        self._starts: list[Tensor | None] = [None] * len(ends)  # known from the first evaluation on, where delta is 0

    def any_of(self, active: Sequence[bool]) -> bool:
        """Whether a row belongs to an active fact."""
        return any(active[row.fact] for row in self._rows)

    @torch.no_grad()
    def starts(self) -> dict[int, Tensor]:
        """Outputs (2, d) of MLP and attention at the pivot of the bare prompts, by fact."""
        mlp, attention = self._adapter.edited(self._layer), self._adapter.attention(self._layer)
        with outputs_of(mlp) as first, outputs_of(attention) as second:
            self._calls.run(self._adapter, self._hidden, self._layer, self._layer + 1)
        both = torch.stack([self._batch.chosen(first[0]), self._batch.chosen(second[0])], 1)
        return {row.fact: both[b] for b, row in enumerate(self._rows) if row.kind == "nll" and row.context == 0}

    def terms(self, delta: Tensor) -> Terms:
        """Terms for each fact, differentiable in `delta` (F, 2, d): of the MLP's output, and of the attention's."""
        moves = delta[self._facts].to(self._hidden.dtype)
        mlp, attention = self._adapter.edited(self._layer), self._adapter.attention(self._layer)
        handles = [
            mlp.register_forward_hook(self._shift(moves[:, 0])),
            attention.register_forward_hook(self._shift(moves[:, 1])),
        ]
        try:
            hidden = self._calls.run(self._adapter, self._hidden, self._layer, self._layer + 1)
        finally:
            for handle in handles:
                handle.remove()
        hidden = self._calls.run(self._adapter, hidden, self._layer + 1, self._adapter.num_layers)
        read = read_terms(self._adapter, hidden[self._at[0], self._at[1]], self._tokens, self._starts)
        return read.by_fact(self._facts[self._at[0]], self._weights, len(delta))

    def _shift(self, moves: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            moved = self._batch.replaced(first, self._batch.chosen(first) + moves)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook


def _starts(groups: Sequence[Joint], count: int) -> Tensor:
    found = {fact: value for group in groups for fact, value in group.starts().items()}
    start = torch.stack([found[fact] for fact in range(count)])
    return start.to(wide(start.dtype))


def _split(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Rows in groups of similar length with about `max_tokens` tokens at most."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.inputs), reverse=True):
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0].inputs) <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
