"""Writers for methods with z*: keys and residuals layer by layer, ascending (Meng et al. 2023, MEMIT, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..keys import KeyStream
from ..methods import Signals
from ..prompts import Context
from ..targets import Stopping, Targets, component_targets
from ..targets.rows import fact_rows
from .job import Job, LayerState, Written


def write_targets(job: Job) -> Written:
    """z* behind the last edited layer."""
    stopping = Stopping(patience=job.config.patience) if job.method.early_stop else None
    job.stage("targets", 0, len(job.facts))
    targets = job.find(
        job.adapter,
        job.tokenizer,
        job.facts,
        job.contexts,
        job.config,
        lambda done, total: job.stage("targets", done, total),
        stopping=stopping,
    )
    processes = job.adapter.processes
    if processes.many:
        targets = Targets(*processes.same(targets.z, targets.start, targets.losses, targets.steps))
    return _written(job, targets, insert(job, targets.z))


def write_components(job: Job) -> Written:
    """Targets for the output of the last MLP, beside a free attention (PMET)."""
    job.stage("targets", 0, len(job.facts))
    targets = component_targets(
        job.adapter,
        job.tokenizer,
        job.facts,
        job.contexts,
        job.config,
        lambda done, total: job.stage("targets", done, total),
    )
    return _written(job, targets, insert(job, targets.z, job.adapter.edited(job.config.layers[-1])))


@torch.no_grad()
def insert(job: Job, z: Tensor, module: nn.Module | None = None) -> dict[int, LayerState]:
    """Write targets (F, d) for `module` of the last edited layer, by default what `Adapter.target` names."""
    layers = job.config.layers
    job.stage("keys", 0, len(layers))
    rows = [row for row in fact_rows(job.tokenizer, job.facts, job.contexts) if row.kind == "nll"]
    contexts = even(job.contexts) if job.method.single else job.contexts
    following: dict[int, LayerState] = {}
    with job.adapter.frozen():
        stream = KeyStream(job.adapter, rows, contexts, 4 * job.config.max_tokens)
        for i, n in enumerate(layers):
            job.stage("keys", i, len(layers))
            dtype = job.weights.dtype(n)
            weight = job.weights.wide(n)
            keys, bare = (part.to(weight.device, dtype) for part in stream.both(n))
            h = stream.hidden(layers[-1], module)
            wanted, h = z.to(weight.device, dtype), h.to(weight.device, dtype)
            if module is None and job.adapter.factor != 1.0:  # in the units of the module's output
                wanted = h + (wanted - h) / job.adapter.factor
            signals = Signals(wanted, h, len(layers) - i, keys, bare, weight)
            following[n] = job.apply(n, keys, job.method.residual(signals), bare)
    return following


def even(contexts: Sequence[Context]) -> list[Context]:
    """Contexts of equal weight, the bare prompt among them (ROME)."""
    return [replace(context, weight=1 / len(contexts)) for context in contexts]


def _written(job: Job, targets: Targets, states: dict[int, LayerState]) -> Written:
    return Written(states, float(targets.losses.mean()), float(targets.steps.double().mean()))
