"""The plain way to z*: one fact at a time, the whole model on all tokens in each step. For tests and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import EditConfig
from ..facts import Fact
from ..models.adapter import Adapter
from ..models.replay import outputs_of
from ..prompts import Context
from .descend import Targets
from .objective import answer_loss, clamp_norm, divergence, log_probabilities, norm_penalty
from .rows import Row, fact_rows


def plain_targets(
    adapter: Adapter,
    tokenizer: Any,
    facts: Sequence[Fact],
    contexts: Sequence[Context],
    config: EditConfig,
    patience: int | None = None,
) -> Targets:
    """z* by `torch.optim.Adam` through the model's own forward, right-padded, all logits formed."""
    with adapter.frozen():
        parts = [_one(adapter, fact_rows(tokenizer, [fact], contexts), config, patience) for fact in facts]
    z, start, losses, steps = zip(*parts, strict=True)
    return Targets(torch.stack(z), torch.stack(start), torch.stack(losses), torch.tensor(steps))


def _one(
    adapter: Adapter, rows: Sequence[Row], config: EditConfig, patience: int | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    length = max(len(row.inputs) for row in rows)
    ids = torch.tensor([list(row.inputs) + [0] * (length - len(row.inputs)) for row in rows], device=adapter.device)
    mask = torch.tensor(
        [[1] * len(row.inputs) + [0] * (length - len(row.inputs)) for row in rows], device=adapter.device
    )
    pivots = torch.tensor([row.pivot for row in rows], device=adapter.device)
    contexts = sum(row.kind == "nll" for row in rows)
    hidden: list[Tensor] = []
    variable: list[Tensor] = []

    def add(_module: Any, _args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        hidden[:] = hidden or [first.detach()[0, rows[0].pivot]]
        if variable:
            first = first.clone()
            first[torch.arange(len(rows)), pivots] += variable[0].to(first.dtype)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    handle = adapter.target(config.layers[-1]).register_forward_hook(add)
    try:
        with torch.no_grad(), outputs_of(adapter.edited(config.layers[-1])) as inner:
            logits = adapter.model(input_ids=ids, attention_mask=mask).logits
            log_start = log_probabilities(logits[-1:, len(rows[-1].inputs) - 1])
        start = hidden[0].to(torch.float64 if hidden[0].dtype == torch.float64 else torch.float32)
        module = adapter.factor * inner[0][0, rows[0].pivot].to(start.dtype)
        size = start if config.relative_to == "hidden" else module
        delta = torch.zeros_like(start, requires_grad=True)
        variable.append(delta)
        adam = torch.optim.Adam([delta], lr=config.lr)
        hits = 0
        for step in range(1, config.steps + 1):
            adam.zero_grad()
            logits = adapter.model(input_ids=ids, attention_mask=mask).logits
            loss = config.decay * norm_penalty(delta[None], size[None])[0]
            right = True
            for b, row in enumerate(rows[:-1]):
                tokens = torch.tensor(row.encoding.target, device=ids.device)
                loss = loss + answer_loss(logits[b, list(row.wanted)], tokens).mean() / contexts
                right = right and bool((logits[b, list(row.wanted)].argmax(-1) == tokens).all())
            hits += right
            loss = loss + config.kl * divergence(logits[-1:, len(rows[-1].inputs) - 1], log_start)[0]
            if loss < config.stop_loss or step == config.steps or (patience is not None and hits >= patience):
                break
            loss.backward()
            adam.step()
            with torch.no_grad():
                delta.copy_(clamp_norm(delta[None], size[None], config.clamp)[0])
    finally:
        handle.remove()
    return (start + delta).detach(), start, loss.detach(), step
