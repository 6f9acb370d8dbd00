"""Writer for fine-tuning: Adam on the edited weights, with a bound on every entry (FT-L) or a decay (FT-W)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.adapter import Adapter
from ..models.replay import Calls, capture
from ..prompts import Context, align
from ..targets.reading import read_terms
from ..targets.rows import Row, fact_rows
from .features import token_groups
from .job import Job, LayerState, Written

STOP = 1e-2
"""Loss below which the published code stops."""


@dataclass(frozen=True)
class _Group:
    """Rows that run together, their hidden states entering the first edited layer, and where the loss looks."""

    calls: Calls
    hidden: Tensor
    places: Tensor
    tokens: Tensor
    weights: Tensor


def write_steps(job: Job) -> Written:
    """At most `ft_steps` steps on the mean negative log-likelihood of the new answers after their bare prompts."""
    config, adapter, layers = job.config, job.adapter, job.config.layers
    rows = [row for row in fact_rows(job.tokenizer, job.facts, [Context("", 1.0)]) if row.kind == "nll"]
    job.stage("targets", 0, len(job.facts))
    first = {n: job.weights.wide(n).clone() for n in layers}
    masters = {n: weight.clone() for n, weight in first.items()}
    adam = torch.optim.Adam(list(masters.values()), lr=config.ft_rate, weight_decay=config.ft_decay)
    loss, taken = 0.0, 0
    with adapter.frozen():
        groups = [_prepare(adapter, group, layers[0], len(rows)) for group in token_groups(rows, config.max_tokens)]
        try:
            for step in range(config.ft_steps):
                loss, gradients = _gradients(adapter, groups, layers)
                taken = step + 1
                if not loss < float("inf"):
                    raise ValueError(f"ft: the loss must be finite, got {loss} in step {taken}; lower ft_rate")
                if loss < STOP:
                    break
                _step(adam, masters, first, gradients, config.ft_bound)
                for n, master in masters.items():
                    job.weights.show(n, master)
                job.stage("targets", min(step + 1, len(job.facts)), len(job.facts))
        finally:
            job.weights.undo()
    following: dict[int, LayerState] = {}
    for n in layers:
        following[n] = job.change(n, masters[n] - first[n])
    return Written(following, loss, float(taken))


@torch.no_grad()
def _step(
    adam: torch.optim.Adam, masters: dict[int, Tensor], first: dict[int, Tensor], gradients: list[Tensor], bound: float
) -> None:
    for master, gradient in zip(masters.values(), gradients, strict=True):
        master.grad = gradient.to(master.dtype)
    adam.step()
    if bound > 0:
        for n, master in masters.items():
            master.copy_(torch.maximum(torch.minimum(master, first[n] + bound), first[n] - bound))


@torch.no_grad()
def _prepare(adapter: Adapter, rows: Sequence[Row], layer: int, facts: int) -> _Group:
    batch = align([row.inputs for row in rows], [0] * len(rows), adapter.device)
    calls = capture(adapter, batch.ids, batch.mask, batch.positions)
    hidden = calls.run(adapter, calls.hidden, 0, layer)
    places = [
        (b, at, row.encoding.ids[at + 1], 1 / (facts * len(row.wanted)))
        for b, row in enumerate(rows)
        for at in row.wanted
    ]
    device = hidden.device
    return _Group(
        calls,
        hidden,
        torch.tensor([p[:2] for p in places], device=device).T,
        torch.tensor([p[2] for p in places], device=device),
        torch.tensor([p[3] for p in places], dtype=torch.float64, device=device),
    )


def _gradients(adapter: Adapter, groups: Sequence[_Group], layers: Sequence[int]) -> tuple[float, list[Tensor]]:
    """The loss with the weights as they are, and its gradients (d, v) in the edited ones."""
    parameters = [adapter.edited(n).weight for n in layers]
    for parameter in parameters:
        parameter.requires_grad_(True)  # type: ignore[operator, union-attr]
    total, sums = 0.0, [torch.zeros_like(adapter.rows(n)) for n in layers]
    try:
        for group in groups:
            hidden = group.calls.run(adapter, group.hidden, layers[0], adapter.num_layers)
            terms = read_terms(adapter, hidden[group.places[0], group.places[1]], group.tokens).answer
            loss = (terms * group.weights.to(terms.dtype)).sum()
            for into, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):  # type: ignore[arg-type]
                into += gradient if adapter.layout == "in_out" else gradient.T
            total += float(loss.detach())
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)  # type: ignore[operator, union-attr]
    return total, sums
