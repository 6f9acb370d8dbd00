"""Writers for methods that work on a layer's inputs at all tokens of the statements, with or without gradients.

The rows are the bare prompts with their new answers; as in the released code every token counts that the model reads,
which is all but the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import get_method
from ..methods.simie import SimIESolver
from ..models.adapter import Adapter
from ..models.replay import capture
from ..prompts import Context, align
from ..targets.reading import read_terms
from ..targets.rows import Row, fact_rows
from .job import Job, LayerState, Written
from .targets import write_targets


@dataclass(frozen=True)
class Features:
    """Of one layer: inputs (n, d) of the edited module, and gradients (n, v) of the loss in its outputs or None."""

    keys: Tensor
    gradients: Tensor | None


def write_tokens(job: Job) -> Written:
    """SimIE: the editor underneath writes, its change is read and undone, and the ridge makes a shift of it."""
    base = get_method("memit")
    states = {n: replace(state, solver=_simie(state).base) for n, state in job.states.items()}
    before = {n: job.weights.wide(n).clone() for n in job.config.layers}
    features, _ = features_of(job, gradients=False)
    underneath = write_targets(replace(job, method=base, states=states))
    changes = {n: job.weights.wide(n) - before[n] for n in job.config.layers}
    job.weights.undo()
    seen = {n: rows.keys for n, rows in job.rows.items()}
    states = {
        n: replace(state, solver=replace(_simie(state), base=underneath.states[n].solver))
        for n, state in job.states.items()
    }
    job = replace(job, states=states)
    following = {n: job.apply(n, part.keys, part.keys @ changes[n], seen=seen[n]) for n, part in features.items()}
    return replace(underneath, states=following, owners=token_owners(job))


def write_gradients(job: Job) -> Written:
    """UltraEdit: gradients of the loss of the new answers, all layers at once."""
    job.stage("targets", 0, len(job.facts))
    features, loss = features_of(job, gradients=True)
    following: dict[int, LayerState] = {}
    for n, part in features.items():
        assert part.gradients is not None
        following[n] = job.apply(n, part.keys, part.gradients)
    return Written(following, loss, 1.0, token_owners(job))


def token_owners(job: Job) -> tuple[int, ...]:
    """Index of the fact of each row of `features_of`."""
    rows = [row for row in fact_rows(job.tokenizer, job.facts, [Context("", 1.0)]) if row.kind == "nll"]
    return tuple(row.fact for row in rows for _ in row.inputs)


def features_of(job: Job, gradients: bool) -> tuple[dict[int, Features], float]:
    """Features of all edited layers with the weights as they are, and the mean loss of the answer tokens."""
    bare = [Context("", 1.0)]
    rows = [row for row in fact_rows(job.tokenizer, job.facts, bare) if row.kind == "nll"]
    answers = sum(len(row.wanted) for row in rows)
    layers = job.config.layers
    found: dict[int, list[Features]] = {n: [] for n in layers}
    loss = 0.0
    with job.adapter.frozen():
        for group in token_groups(rows, job.config.max_tokens):
            parts, part_loss = _group_features(job.adapter, group, layers, answers, gradients)
            loss += part_loss
            for n, part in parts.items():
                found[n].append(part)
            job.stage("targets" if gradients else "keys", 0, len(layers))
    return {n: _joined(parts, job.weights.dtype(n)) for n, parts in found.items()}, loss


def _group_features(
    adapter: Adapter, rows: Sequence[Row], layers: Sequence[int], answers: int, gradients: bool
) -> tuple[dict[int, Features], float]:
    batch = align([row.inputs for row in rows], [0] * len(rows), adapter.device)
    real = batch.mask.bool()
    calls = capture(adapter, batch.ids, batch.mask, batch.positions)
    inputs: dict[int, Tensor] = {}
    offsets: dict[int, Tensor] = {}

    def look(n: int) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            inputs[n] = args[0][real].detach()
            if not gradients:
                return None
            offsets[n] = torch.zeros_like(output, requires_grad=True)
            return output + offsets[n]

        return hook

    handles = [adapter.edited(n).register_forward_hook(look(n)) for n in layers]
    try:
        with torch.set_grad_enabled(gradients):
            stop = adapter.num_layers if gradients else layers[-1] + 1
            hidden = calls.run(adapter, calls.hidden, 0, stop)
            if not gradients:
                return {n: Features(inputs[n], None) for n in layers}, 0.0
            places = [(b, at, row.encoding.ids[at + 1]) for b, row in enumerate(rows) for at in row.wanted]
            tokens = torch.tensor([p[2] for p in places], device=hidden.device)
            read = read_terms(adapter, hidden[[p[0] for p in places], [p[1] for p in places]], tokens)
            loss = read.answer.sum() / answers
            found = torch.autograd.grad(loss, [offsets[n] for n in layers])
    finally:
        for handle in handles:
            handle.remove()
    return {n: Features(inputs[n], g[real]) for n, g in zip(layers, found, strict=True)}, float(loss.detach())


def _joined(parts: Sequence[Features], dtype: torch.dtype) -> Features:
    keys = torch.cat([part.keys for part in parts]).to(dtype)
    gradients = [part.gradients for part in parts if part.gradients is not None]
    return Features(keys, torch.cat(gradients).to(dtype) if gradients else None)


def token_groups(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Rows in their order, in groups of at most about `max_tokens` tokens."""
    groups: list[list[Row]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.inputs)) if groups else len(row.inputs)
        if groups and (len(groups[-1]) + 1) * longest <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = len(row.inputs)
    return groups


def _simie(state: LayerState) -> SimIESolver:
    if not isinstance(state.solver, SimIESolver):
        raise TypeError(f"write_tokens: the solver must be one of SimIE, got {type(state.solver).__name__}")
    return state.solver
