"""Target hidden states z* of a batch of facts, optimised together (Meng et al. 2022, MEMIT, sec. 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import EditConfig
from ..facts import Fact
from ..models.adapter import Adapter
from ..prompts import Context
from .bucket import Bucket, make_buckets
from .descend import Stopping, Targets, descend, wide
from .prepare import Prepared, prepare_rows
from .rows import Row, fact_rows


def optimise_targets(
    adapter: Adapter,
    tokenizer: Any,
    facts: Sequence[Fact],
    contexts: Sequence[Context],
    config: EditConfig,
    progress: Callable[[int, int], None] | None = None,
    *,
    stopping: Stopping | None = None,
) -> Targets:
    """Minimise the objective of `targets.objective` over delta for each fact, |delta| <= clamp |h|.

    Facts are independent: the loss is their sum, Adam acts on each coordinate alone, and a fact whose loss falls below
    `config.stop_loss` leaves the batch with the delta it has. The result is that of one fact at a time.

    Args:
        facts: at least one.
        contexts: the bare prompt first.
        progress: called with (facts done, all facts) after each step.
        stopping: when a fact leaves early beside the loss; None for never.

    Raises:
        ValueError: no facts, a fact that cannot be encoded, or a loss that is not finite.
    """
    if not facts:
        raise ValueError("optimise_targets: facts must hold at least one fact, got none")
    rows = fact_rows(tokenizer, facts, contexts)
    layer = config.layers[-1]
    with adapter.frozen():
        module = config.relative_to == "module"
        prepared = prepare_rows(adapter, rows, layer, 4 * config.max_tokens, inside=module)

        def divide(active: Sequence[bool]) -> list[Bucket]:
            wanted = [p for p in prepared if active[p.row.fact]]
            return make_buckets(adapter, wanted, layer, len(contexts), config.max_tokens)

        start = _starts(prepared, len(facts), adapter.behind(layer) is not None)
        size = adapter.factor * _starts(prepared, len(facts), True) if module else start
        return descend(divide, start, facts, config, progress, stopping, adapter.processes, size)


def _starts(prepared: Sequence[Prepared], count: int, inside: bool) -> Tensor:
    """Hidden states behind layer L, or outputs of its edited module, (F, d), of the bare prompts at the pivot."""
    first = prepared[0].hidden
    start = torch.empty(count, first.shape[1], dtype=wide(first.dtype), device=first.device)
    for p in prepared:
        if p.row.kind == "nll" and p.row.context == 0:
            found = p.inner if inside else p.hidden[p.at]
            assert found is not None
            start[p.row.fact] = found.to(start.dtype)
    return start


__all__ = ["Row", "Stopping", "Targets", "optimise_targets"]
