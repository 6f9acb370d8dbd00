"""Terms of the loss read from hidden states behind the last layer, with the logits of a few positions at a time.

Each position has a term of its own, so its gradient is taken as soon as its logits are there: neither these nor what
softmax and backward pass keep of them is ever held for all positions of a batch. A model over many processes has
them all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..models.adapter import Adapter
from .objective import Terms, answer_loss, divergence, log_probabilities


@dataclass(frozen=True)
class Reading:
    """Terms of single positions.

    Attributes:
        answer: (n,) negative log-likelihood of each answer token.
        wrong: (n,) bool, whether another token is likelier at its place.
        drift: (k,) KL divergence at each of the places behind.
    """

    answer: Tensor
    wrong: Tensor
    drift: Tensor

    def by_fact(self, owner: Tensor, weights: Tensor, count: int) -> Terms:
        """Sums over the positions of each of `count` facts.

        Args:
            owner: (n + k,) int64, the fact of each position.
            weights: (n,) of each answer token in the answer term.
            count: F.
        """
        n, zero = len(self.answer), self.answer.new_zeros(count)
        return Terms(
            zero.index_add(0, owner[:n], self.answer * weights.to(self.answer.dtype)),
            zero.index_add(0, owner[n:], self.drift),
            zero.index_add(0, owner[:n], self.wrong.to(zero.dtype)),
        )


def read_terms(adapter: Adapter, hidden: Tensor, tokens: Tensor, starts: list[Tensor | None] | None = None) -> Reading:
    """Read the terms of answer tokens and of KL prompts, differentiable in `hidden`.

    Args:
        adapter: the model, whose head is not trained.
        hidden: (n + k, d), states behind the last layer: where `tokens` follow, and at the ends of the KL prompts.
        tokens: (n,) int64, answer tokens.
        starts: k log-probabilities (vocabulary,) that drift is measured from; a None is replaced by those of now.
    """
    count, starts = len(tokens), [] if starts is None else starts
    wrong = torch.zeros(count, dtype=torch.bool, device=tokens.device)

    def measure(part: Tensor, first: int) -> Tensor:
        logits = adapter.headed(part).to(tokens.device)  # layers may lie on several devices
        n = min(max(0, count - first), len(logits))
        heads, tails = logits.split([n, len(logits) - n])
        wanted = tokens[first : first + n]
        wrong[first : first + n] = heads.detach().argmax(-1) != wanted
        found, begin = answer_loss(heads, wanted), first + n - count
        if len(tails) == 0:
            return found
        for k, row in enumerate(tails.detach(), begin):
            if starts[k] is None:
                starts[k] = log_probabilities(row)
        known = [start for start in starts[begin : begin + len(tails)] if start is not None]
        return torch.cat([found, divergence(tails, torch.stack(known))])

    normed = adapter.normed(hidden)
    # FSDP2 takes weights away behind every backward pass: of a model over many processes there must be one alone.
    terms = measure(normed, 0) if adapter.processes.many else _ByParts.apply(normed, measure, adapter.at_once)
    return Reading(terms[:count], wrong, terms[count:])


class _ByParts(torch.autograd.Function):
    """Terms (n,) of states (n, d), the i-th of the i-th alone, a part of them at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, measure: Callable[[Tensor, int], Tensor], size: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        terms: list[Tensor] = []
        gradients: list[Tensor] = []
        for first in range(0, len(hidden), size):
            part = hidden[first : first + size].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                found = measure(part, first)
                gradients += torch.autograd.grad(found.sum(), part) if wanted else []
            terms.append(found.detach())
        ctx.save_for_backward(*([torch.cat(gradients)] if wanted else []))
        return torch.cat(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * outer.to(gradients)[:, None], None, None
