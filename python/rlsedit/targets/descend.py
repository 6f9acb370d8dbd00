"""Adam on the variables of all facts together; facts are independent and leave when they are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..config import EditConfig
from ..facts import Fact
from ..parallel import OneProcess
from .objective import Terms, clamp_norm, norm_penalty

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's usual constants, as in the published code


@dataclass(frozen=True)
class Targets:
    """Targets of F facts.

    Attributes:
        z: (F, d) target hidden states behind the last edited layer (outputs of its MLP where a norm follows that, and
            for PMET), float32 (float64 for a float64 model).
        start: (F, d) the hidden states they started from (bare prompt).
        losses: (F,) last loss evaluated.
        steps: (F,) evaluations of the loss.
    """

    z: Tensor
    start: Tensor
    losses: Tensor
    steps: Tensor


@dataclass(frozen=True)
class Stopping:
    """When a fact leaves although its loss is above `stop_loss`; it "is right" once all answer tokens are likeliest.

    Attributes:
        patience: it leaves at the n-th evaluation in which it is right (ENCORE, most-probable early stopping).
        ease: factor of its answer term from then on, while it is right (PMET); 1 for none.
        drift: it leaves when it is right and its weighted KL term is at most this (PMET).
    """

    patience: int | None = None
    ease: float = 1.0
    drift: float | None = None


class Evaluates(Protocol):
    """A batch of rows whose terms are evaluated together."""

    def terms(self, delta: Tensor) -> Terms:
        """Terms for each fact, differentiable in `delta`."""


def descend(
    divide: Callable[[Sequence[bool]], Sequence[Evaluates]],
    start: Tensor,
    facts: Sequence[Fact],
    config: EditConfig,
    progress: Callable[[int, int], None] | None,
    stopping: Stopping | None = None,
    processes: OneProcess | None = None,
    size: Tensor | None = None,
) -> Targets:
    """Minimise answer + kl * drift + decay * |delta| / |h|^2 for each fact, |delta| <= clamp |h|.

    Args:
        divide: makes the rows of the facts that are still active ready.
        start: what delta is added to, (F, d), or (F, parts, d) for several variables, each with its own bound.
        facts: for messages.
        config: hyper-parameters.
        progress: called with (facts done, all facts) after each step.
        stopping: further reasons to leave.
        processes: those that hold the model; all of them take the losses and gradients of the first.
        size: h, of the shape of `start`; None for `start` itself.

    Raises:
        ValueError: a loss that is not finite.
    """
    stopping, processes = stopping or Stopping(), processes or OneProcess()
    start, size = processes.same(start, start if size is None else size)
    count = len(start)
    delta = torch.zeros_like(start)
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    losses = torch.full((count,), torch.inf, dtype=start.dtype, device=start.device)
    steps = torch.zeros(count, dtype=torch.long, device=start.device)
    hits = torch.zeros_like(steps)
    emphasis = torch.ones_like(losses)
    active = torch.ones(count, dtype=torch.bool, device=start.device)
    inside, buckets = count, divide([True] * count)
    for step in range(1, config.steps + 1):
        loss, grad, terms = _evaluate(buckets, delta, size, config, emphasis)
        loss, grad, *others = processes.same(loss, grad, terms.drift, terms.misses)
        terms = Terms(loss, *others)
        losses, steps = torch.where(active, loss, losses), steps + active
        with processes.in_step():
            _check_finite(losses, facts, step)
        right = active & (terms.misses == 0)
        hits = hits + right
        active = active & (losses >= config.stop_loss)
        if stopping.patience is not None:
            active = active & (hits < stopping.patience)
        if stopping.drift is not None:
            active = active & ~(right & (config.kl * terms.drift <= stopping.drift))
        emphasis = torch.where(right, stopping.ease, 1.0).to(losses)
        if progress is not None:
            progress(count - int(active.sum()) if step < config.steps else count, count)
        if step == config.steps or not bool(active.any()):
            break
        mean = BETA1 * mean + (1 - BETA1) * grad
        square = BETA2 * square + (1 - BETA2) * grad**2
        scale = (square / (1 - BETA2**step)).sqrt() + EPSILON
        moved = delta - config.lr * (mean / (1 - BETA1**step)) / scale
        stays = active.view(-1, *[1] * (delta.ndim - 1))
        delta = torch.where(stays, clamp_norm(moved, size, config.clamp), delta)
        if int(active.sum()) < inside:
            inside, buckets = int(active.sum()), divide(active.tolist())
    return Targets(start + delta, start, losses, steps)


def _check_finite(losses: Tensor, facts: Sequence[Fact], step: int) -> None:
    if not bool(torch.isfinite(losses).all()):
        bad = [facts[i].id for i in (~torch.isfinite(losses)).nonzero().flatten().tolist()]
        raise ValueError(f"optimise_targets: the loss must be finite, got NaN or Inf for facts {bad} in step {step}")


def _evaluate(
    buckets: Sequence[Evaluates], delta: Tensor, size: Tensor, config: EditConfig, emphasis: Tensor
) -> tuple[Tensor, Tensor, Terms]:
    """Losses (F,), their gradient and the terms; entries of facts that have left are those of the norm term alone."""
    delta = delta.detach().requires_grad_()
    penalty = config.decay * norm_penalty(delta, size).reshape(len(delta), -1).sum(1)
    (grad,) = torch.autograd.grad(penalty.sum(), delta)
    loss = penalty.detach()
    drift, misses = torch.zeros_like(loss), torch.zeros_like(loss)
    for bucket in buckets:
        terms = bucket.terms(delta)
        part = terms.answer * emphasis.to(terms.answer.dtype) + config.kl * terms.drift
        grad = grad + torch.autograd.grad(part.sum(), delta)[0]  # and of no weight, whatever FSDP2 marks as trained
        loss = loss + part.detach().to(loss.dtype)
        drift, misses = drift + terms.drift.detach().to(loss.dtype), misses + terms.misses.to(loss.dtype)
    return loss, grad, Terms(loss, drift, misses)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of variables for a model of `dtype`: float32, or float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32
