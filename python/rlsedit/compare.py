"""Methods side by side on one stream of facts: scores, and each solve as published beside the recursion."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .config import EditConfig
from .editor import Editor
from .facts import Fact, without_edited_neighbours
from .methods import Method, Proposal, Solver, Start
from .methods.dense import Solve, published
from .methods.simie import SimIESolver
from .metrics import EvalReport
from .models.adapter import Adapter
from .targets import TargetCache

SCORES = ("efficacy_success", "paraphrase_success", "neighbourhood_success")


@dataclass
class Record:
    """Both solves of one layer over a stream: seconds, and the sums of their changes."""

    solve: Solve
    here: float = 0.0
    dense: float = 0.0
    batches: int = 0
    ours: Tensor | None = None
    theirs: Tensor | None = None

    @property
    def difference(self) -> float:
        """|sum of our changes - sum of theirs| / |sum of theirs|, Frobenius norms."""
        if self.ours is None or self.theirs is None:
            return math.nan
        norm = float(torch.linalg.matrix_norm(self.theirs))
        return float(torch.linalg.matrix_norm(self.ours - self.theirs)) / norm if norm > 0 else math.nan


@dataclass(frozen=True)
class Paired:
    """A solver that also runs the published solve on the same keys and residuals; what it proposes is its own."""

    ours: Solver
    record: Record

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, Paired]:
        """As the solver inside."""
        record = self.record
        start = _now(keys)
        proposal, following = self.ours.propose(keys, residual, bare)
        middle = _now(keys)
        other = record.solve(keys, residual, bare)
        end = _now(keys)
        record.here, record.dense = record.here + middle - start, record.dense + end - middle
        record.batches += 1
        update, exact = proposal.update.double(), other.double()
        record.ours = update if record.ours is None else record.ours + update
        record.theirs = exact if record.theirs is None else record.theirs + exact
        return proposal, replace(self, ours=following)

    def health(self) -> dict[str, object]:
        """Of the solver inside."""
        return self.ours.health()


@dataclass(frozen=True)
class Compared:
    """One method on the stream.

    Attributes:
        method: its name.
        scores: after the last batch.
        batches: solves of each layer.
        published, here: seconds of all solves, all layers; None where there is no solve.
        difference: largest over the layers of the relative difference between the changes of the weights that both
            solves give on the same keys and residuals; None where there is no solve, NaN where one is not finite.
        seconds: wall time of the whole edit, both solves included.
    """

    method: str
    scores: EvalReport
    batches: int
    published: float | None
    here: float | None
    difference: float | None
    seconds: float
    config: EditConfig = field(repr=False, default_factory=EditConfig)


def largest_difference(records: Sequence[Record]) -> float:
    """Of the layers; NaN where one has none, as where the published solve is not finite."""
    return float(torch.tensor([record.difference for record in records], dtype=torch.float64, device="cpu").max())


def paired(method: Method, records: list[Record]) -> Method:
    """`method` whose solvers run the published solve beside their own; a record a layer is added to `records`."""

    def make(start: Start) -> Solver:
        solver = method.start(start.moment, start.config, start.dtype, start.device)
        solve = published(method.name, start)
        if solve is None:
            return solver
        records.append(Record(solve))
        if isinstance(solver, SimIESolver):  # the editor underneath is not what is compared
            return replace(solver, ridge=Paired(solver.ridge, records[-1]))
        return Paired(solver, records[-1])

    return replace(method, solver=make)


def compare(
    adapter: Adapter,
    tokenizer: Any,
    facts: Sequence[Fact],
    configs: Mapping[str, EditConfig],
    moments: Mapping[int, Tensor],
    *,
    batch_size: int,
    targets: TargetCache | None = None,
    scored: Sequence[Fact] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Compared]:
    """Write the same facts by each method, from the same weights, and measure; neighbours that they edit are left out.

    Args:
        adapter, tokenizer: the model; its weights are put back, bit for bit, behind each method.
        facts: at least one.
        configs: by the names of methods.
        moments: E[k k'] of all layers that the configurations edit.
        batch_size: facts of one batch.
        targets: cache of z*, shared by the methods: they begin with the same weights.
        scored: the facts as they are measured, for callers that have left those neighbours out already.
        progress: called with (method, facts done, all facts).
    """
    cache = TargetCache() if targets is None else targets
    scored, found = without_edited_neighbours(facts) if scored is None else scored, []
    for name, config in configs.items():
        records: list[Record] = []
        editor = Editor(adapter.model, tokenizer, name, config, moments=moments, adapter=adapter, targets=cache)
        editor.method = paired(editor.method, records)
        begin = time.perf_counter()
        try:
            for first in range(0, len(facts), batch_size):
                if progress is not None:
                    progress(name, first, len(facts))
                part = facts[first : first + batch_size]
                editor.edit(part, batch_size=batch_size, finish=first + batch_size >= len(facts))
            took = time.perf_counter() - begin
            scores = editor.evaluate(scored)
        finally:
            editor.reset()
        solved = bool(records)
        found.append(
            Compared(
                name,
                scores,
                records[0].batches if solved else 0,
                sum(record.dense for record in records) if solved else None,
                sum(record.here for record in records) if solved else None,
                largest_difference(records) if solved else None,
                took,
                config,
            )
        )
    return found


def rows(found: Sequence[Compared], before: EvalReport) -> list[tuple[str, ...]]:
    """Cells of a table: method, three scores in percent, seconds as published and here, difference."""

    def scores(report: EvalReport) -> list[str]:
        return [_percent(report.summary[name].mean) for name in SCORES]

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [("before", *scores(before), "", "", "")] + [
        (
            each.method,
            *scores(each.scores),
            cell(each.published, ".2f"),
            cell(each.here, ".2f"),
            cell(each.difference, ".0e"),
        )
        for each in found
    ]


HEADER = ("method", "efficacy", "paraphrase", "neighbourhood", "solve as published, s", "here, s", "difference")


def markdown(found: Sequence[Compared], before: EvalReport, caption: str) -> str:
    """The table in Markdown, under a caption that says what was run."""
    lines = [caption, "", "| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows(found, before))]) + "\n"


def content(found: Sequence[Compared], before: EvalReport) -> dict[str, Any]:
    """What was measured, as plain values."""
    summary = {name: asdict(value) for name, value in before.summary.items()}
    entries = []
    for each in found:
        entry = {k: getattr(each, k) for k in ("method", "batches", "published", "here", "difference", "seconds")}
        scores = {name: asdict(value) for name, value in each.scores.summary.items()}
        entries.append({**entry, "scores": scores, "config": asdict(each.config)})
    return {"before": summary, "methods": entries}


def _percent(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{100 * value:.1f}"


def _now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
