"""Target hidden states z* of a batch of facts, optimised together (Meng et al. 2022, MEMIT, sec. 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import EditConfig
from ..facts import Fact
from ..models.adapter import Adapter
from ..prompts import Context
from .bucket import Bucket, make_buckets
from .objective import clamp_norm, norm_penalty
from .prepare import Prepared, prepare_rows
from .rows import Row, fact_rows

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's usual constants, as in the published code


@dataclass(frozen=True)
class Targets:
    """Result of `optimise_targets` for F facts.

    Attributes:
        z: (F, d) target hidden states behind the last edited layer (outputs of its MLP where a norm follows that),
            float32 (float64 for a float64 model).
        start: (F, d) the hidden states they started from (bare prompt).
        losses: (F,) last loss evaluated.
        steps: (F,) evaluations of the loss.
    """

    z: Tensor
    start: Tensor
    losses: Tensor
    steps: Tensor


def optimise_targets(
    adapter: Adapter,
    tokenizer: Any,
    facts: Sequence[Fact],
    contexts: Sequence[Context],
    config: EditConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Targets:
    """Minimise the objective of `targets.objective` over delta for each fact, |delta| <= clamp |h|.

    Facts are independent: the loss is their sum, Adam acts on each coordinate alone, and a fact whose loss falls below
    `config.stop_loss` leaves the batch with the delta it has. The result is that of one fact at a time.

    Args:
        facts: at least one.
        contexts: the bare prompt first.
        progress: called with (facts done, all facts) after each step.

    Raises:
        ValueError: no facts, a fact that cannot be encoded, or a loss that is not finite.
    """
    if not facts:
        raise ValueError("optimise_targets: facts must hold at least one fact, got none")
    rows = fact_rows(tokenizer, facts, contexts)
    layer = config.layers[-1]
    with adapter.frozen():
        prepared = prepare_rows(adapter, rows, layer, 4 * config.max_tokens)

        def divide(active: Sequence[bool]) -> list[Bucket]:
            wanted = [p for p in prepared if active[p.row.fact]]
            return make_buckets(adapter, wanted, layer, len(contexts), config.max_tokens)

        return _descend(divide, _starts(prepared, len(facts)), facts, config, progress)


def _starts(prepared: Sequence[Prepared], count: int) -> Tensor:
    """What delta is added to, (F, d), for the bare prompts at the last subject token."""
    first = prepared[0].hidden
    start = torch.empty(count, first.shape[1], dtype=_wide(first.dtype), device=first.device)
    for p in prepared:
        if p.row.kind == "nll" and p.row.context == 0:
            start[p.row.fact] = (p.hidden[0] if p.inner is None else p.inner).to(start.dtype)
    return start


def _descend(
    divide: Callable[[Sequence[bool]], list[Bucket]],
    start: Tensor,
    facts: Sequence[Fact],
    config: EditConfig,
    progress: Callable[[int, int], None] | None,
) -> Targets:
    count = len(start)
    delta = torch.zeros_like(start)
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    losses = torch.full((count,), torch.inf, dtype=start.dtype, device=start.device)
    steps = torch.zeros(count, dtype=torch.long, device=start.device)
    active = torch.ones(count, dtype=torch.bool, device=start.device)
    inside, buckets = count, divide([True] * count)
    for step in range(1, config.steps + 1):
        loss, grad = _evaluate(buckets, delta, start, config)
        losses, steps = torch.where(active, loss, losses), steps + active
        if not bool(torch.isfinite(losses).all()):
            bad = [facts[i].id for i in (~torch.isfinite(losses)).nonzero().flatten().tolist()]
            raise ValueError(
                f"optimise_targets: the loss must be finite, got NaN or Inf for facts {bad} in step {step}"
            )
        active = active & (losses >= config.stop_loss)
        if progress is not None:
            progress(count - int(active.sum()) if step < config.steps else count, count)
        if step == config.steps or not bool(active.any()):
            break
        mean = BETA1 * mean + (1 - BETA1) * grad
        square = BETA2 * square + (1 - BETA2) * grad**2
        scale = (square / (1 - BETA2**step)).sqrt() + EPSILON
        moved = delta - config.lr * (mean / (1 - BETA1**step)) / scale
        delta = torch.where(active[:, None], clamp_norm(moved, start, config.clamp), delta)
        if int(active.sum()) < inside:
            inside, buckets = int(active.sum()), divide(active.tolist())
    return Targets(start + delta, start, losses, steps)


def _evaluate(buckets: Sequence[Bucket], delta: Tensor, start: Tensor, config: EditConfig) -> tuple[Tensor, Tensor]:
    """Losses (F,) and their gradient (F, d); entries of facts that have left are those of the norm term alone."""
    delta = delta.detach().requires_grad_()
    penalty = config.decay * norm_penalty(delta, start)
    penalty.sum().backward()
    loss = penalty.detach()
    for bucket in buckets:
        terms = bucket.loss(delta, config.kl)
        terms.sum().backward()
        loss = loss + terms.detach().to(loss.dtype)
    assert delta.grad is not None
    return loss, delta.grad


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


__all__ = ["Row", "Targets", "optimise_targets"]
