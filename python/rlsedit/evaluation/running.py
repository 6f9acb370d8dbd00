"""Runs a plan: every stream from the same weights, measured at its checkpoints, resumed where it stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import EditConfig
from ..editor import Editor
from ..facts import Fact, without_edited_neighbours
from ..metrics import evaluate, evaluate_writing
from ..models.adapter import Adapter
from ..reports import BatchReport, Progress
from ..targets import TargetCache
from .objective import Objective, listening
from .plan import Plan, RunSpec
from .records import Folder, RunRecord
from .streams import groups, ordered, with_conflicts

__all__ = ["Ability", "run_plan"]

logger = logging.getLogger(__name__)

_FAILURES = (ValueError, ArithmeticError, torch.linalg.LinAlgError, torch.OutOfMemoryError)
"""What ends one stream and leaves the others to go on: a refusal, a solve that has no answer, too little memory."""

Tell = Callable[[str, float], None]
"""Called with what is being done and the share of the whole plan that is done."""

Ability = Callable[[str, Any], dict[str, Any]]
"""From the name of a task and the path of its file to its summary, for the model as it is."""


def run_plan(
    plan: Plan,
    adapter: Adapter,
    tokenizer: Any,
    facts: Sequence[Fact],
    moments: Mapping[int, Tensor],
    folder: Folder,
    *,
    ability: Ability | None = None,
    tell: Tell | None = None,
    only: Sequence[str] = (),
) -> list[RunRecord]:
    """Run what has not been run, and return the records of the chosen runs.

    A stream that was stopped is caught up with: its z* are kept, and are found again because the weights are the same
    to the bit; checkpoints that were measured are not measured again. A method that fails is recorded with its message
    and the other runs go on.

    Args:
        plan: what is run.
        adapter, tokenizer: the model; its weights are put back behind every run.
        facts: of the plan, limited.
        moments: E[k k'] of all layers that the plan's methods edit.
        folder: begun with this plan.
        ability: measures a task; None leaves the plan's tasks out.
        tell: progress.
        only: methods of the plan that are run, all if empty; several processes may share a folder that way.

    Raises:
        ValueError: a method that the plan does not have.
    """
    if unknown := set(only) - set(plan.methods):
        raise ValueError(f"only: methods must be of the plan, {', '.join(plan.methods)}; got {sorted(unknown)[0]!r}")
    tell = tell or (lambda text, share: None)
    cache = TargetCache(folder.targets)
    chosen = [spec for spec in plan.runs if not only or spec.method in only]
    records = []
    for index, spec in enumerate(chosen):
        record = folder.run(spec)
        if not record.complete:
            share = partial(_of_all, tell, index, len(chosen))
            record.error = ""
            try:
                _Run(plan, spec, adapter, tokenizer, facts, moments, folder, record, cache, ability, share).go()
            except _FAILURES as error:
                logger.warning("evaluate: %s stopped: %s", spec.name, error)
                record.error = " ".join(str(error).split())
                folder.save(record)
        records.append(record)
    return records


def _of_all(tell: Tell, index: int, runs: int, text: str, share: float) -> None:
    tell(text, (index + share) / runs)


def stream_of(plan: Plan, facts: Sequence[Fact], order: int) -> list[Fact]:
    """The facts of one run in the order in which they are written."""
    return without_edited_neighbours(with_conflicts(ordered(facts, order), plan.conflicts, seed=order))


class _Run:
    """One stream."""

    def __init__(
        self,
        plan: Plan,
        spec: RunSpec,
        adapter: Adapter,
        tokenizer: Any,
        facts: Sequence[Fact],
        moments: Mapping[int, Tensor],
        folder: Folder,
        record: RunRecord,
        cache: TargetCache,
        ability: Ability | None,
        tell: Tell,
    ) -> None:
        self.plan, self.spec, self.adapter, self.tokenizer = plan, spec, adapter, tokenizer
        self.folder, self.record, self.ability, self.tell = folder, record, ability, tell
        self.stream = stream_of(plan, facts, spec.order)
        self.config = EditConfig.for_model(adapter.model, spec.method, **plan.config(spec.method, spec.seed))
        record.config = asdict(self.config)
        self.editor = Editor(
            adapter.model,
            tokenizer,
            spec.method,
            self.config,
            moments=moments,
            adapter=adapter,
            targets=cache,
            record=False,
        )
        given: list[list[tuple[Tensor, Tensor]]] = []
        method = self.editor.method
        self.editor.method = listening(method, given)
        grams = {n: self.config.mom2_weight * moments[n].to(adapter.device) for n in self.config.layers}
        self.objective = Objective(
            adapter, self.config.layers, grams, given, lambda keys: method.noise(self.config, keys)
        )

    def go(self) -> None:
        """From the first batch to the end, or from where it stopped."""
        try:
            self._adopt()
            self._ability("before")
            self._checkpoint(0)
            self._edit()
            self._ability("after")
            self.record.complete = True
            self.folder.save(self.record)
        finally:
            self.editor.reset()

    def _adopt(self) -> None:
        """What another run of the folder has measured of the model before its first edit: it is the same model."""
        for other in self.folder.runs():
            if other.spec.order == self.spec.order and not self.record.done(0):  # another order samples other facts
                self.record.checkpoints += [entry for entry in other.checkpoints if entry["facts"] == 0]
            if "before" in other.ability and self.ability is not None:
                self.record.ability.setdefault("before", other.ability["before"])
        self.folder.save(self.record)

    def _edit(self) -> None:
        size, total = self.plan.batch, len(self.stream)
        wanted = [count for count in self.plan.checkpoints if count < total] + [total]
        for start in range(0, total, size):
            part = self.stream[start : start + size]
            end = start + len(part)
            reports = self._batch(part, start, last=end == total)
            index = start // size
            if index >= len(self.record.batches):  # one that was written before keeps its seconds
                self.record.batches.append(self._entry(end, reports))
                self.folder.save(self.record)
            if wanted and end >= wanted[0]:
                self._checkpoint(end)
                wanted = [count for count in wanted if count > end]

    def _batch(self, part: Sequence[Fact], start: int, last: bool) -> list[BatchReport]:
        def show(event: Progress) -> None:
            if event.stage == "batch":
                self.objective.absorb()
            share = (start + len(part) * event.done / max(1, event.total)) / len(self.stream)
            self.tell(f"{self.spec.name}: {start + len(part)} of {len(self.stream)} facts, {event.stage}", share)

        return self.editor.edit(part, batch_size=len(part), progress=show, finish=last).batches

    def _entry(self, facts: int, reports: Sequence[BatchReport]) -> dict[str, Any]:
        seconds: dict[str, float] = {}
        for report in reports:
            for stage, value in report.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + value
        terms = self.objective.terms()
        return {
            "facts": facts,
            "seconds": seconds,
            "fit": terms.fit,
            "parameter": terms.parameter,
            "anchor": terms.anchor,
            "parameter_bound": reports[-1].parameter_bound,
            "anchor_bound": reports[-1].anchor_bound,
            "target_loss": sum(report.target_loss for report in reports) / len(reports),
            "steps": sum(report.steps for report in reports) / len(reports),
        }

    def _checkpoint(self, facts: int) -> None:
        if self.record.done(facts):
            return
        written = self.stream[:facts] if facts else self.stream
        begin, found = time.perf_counter(), {}
        once = len(self.stream) // (1 + self.plan.conflicts)
        parts = groups(written, self.plan.batch, self.plan.first, self.plan.sample, once)
        if facts == 0:
            parts = {"all": parts["all"]}
        for name, part in parts.items():
            entry: dict[str, Any] = {"count": len(part)}
            if "counterfact" in self.plan.metrics:
                report = evaluate(
                    self.adapter.model, self.tokenizer, part, adapter=self.adapter,
                    progress=self._measuring(facts, name),
                )  # fmt: skip
                entry["counterfact"] = {key: asdict(value) for key, value in report.summary.items()}
                if name == "all":
                    self.record.rows = report.rows
            if "writing" in self.plan.metrics:
                texts = evaluate_writing(
                    self.adapter.model, self.tokenizer, part, adapter=self.adapter, length=self.plan.length,
                    progress=self._measuring(facts, f"{name}, writing"),
                )  # fmt: skip
                entry["writing"] = {key: asdict(value) for key, value in texts.summary.items()}
            found[name] = entry
        self.record.checkpoints.append({"facts": facts, "groups": found, "seconds": time.perf_counter() - begin})
        self.folder.save(self.record)

    def _measuring(self, facts: int, what: str) -> Callable[[int, int], None]:
        share = facts / len(self.stream)
        return lambda done, total: self.tell(
            f"{self.spec.name}: measuring {what} after {facts} facts, {done} of {total} prompts", share
        )

    def _ability(self, when: str) -> None:
        if self.ability is None or when in self.record.ability:
            return
        found = {}
        for task, file in self.plan.ability.items():
            self.tell(f"{self.spec.name}: {task} {when}", 0.0 if when == "before" else 1.0)
            found[task] = self.ability(task, file)
        self.record.ability[when] = found
        self.folder.save(self.record)
