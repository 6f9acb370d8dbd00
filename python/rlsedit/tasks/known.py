"""Facts that a model knows: the share that it still completes, a measure of what editing has kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..metrics.estimate import Estimate, estimate
from ..metrics.scoring import score_answers
from ..models.adapter import Adapter
from .files import read_records, text_field
from .task import Progress, Task, TaskOptions, TaskReport

__all__ = ["TASK", "retained"]


def _check(record: dict[str, Any]) -> dict[str, Any]:
    identity = record.get("known_id", record.get("id"))
    prompt, answer = text_field(record, "prompt").rstrip(), text_field(record, "attribute").strip()
    return {"id": None if identity is None else str(identity), "prompt": prompt, "attribute": answer}


def _load(path: Path, on_error: Literal["raise", "skip"]) -> list[dict[str, Any]]:
    records = read_records(path, _check, on_error)
    for number, record in enumerate(records):
        record["id"] = record["id"] or str(number)
    return records


def _run(
    adapter: Adapter, tokenizer: Any, records: Sequence[dict[str, Any]], options: TaskOptions, progress: Progress | None
) -> TaskReport:
    if not records:
        raise ValueError("known: needs at least one record, got none")
    scored = list(records)[: options.limit]
    queries = [(record["prompt"], record["attribute"]) for record in scored]
    answers = score_answers(adapter, tokenizer, queries, max_tokens=options.max_tokens, progress=progress)
    rows = [
        {
            "id": record["id"],
            "known": answers[query].is_argmax,
            "tokens": answers[query].share,
            "probability": math.exp(answers[query].log_probability),
        }
        for record, query in zip(scored, queries, strict=True)
    ]
    summary = {name: estimate([float(row[name]) for row in rows]) for name in ("known", "tokens", "probability")}
    return TaskReport(rows, summary)


def retained(before: TaskReport, after: TaskReport) -> Estimate:
    """Of the facts that a model knew before an edit, the share that it knows after.

    Args:
        before, after: reports of the task "known" on the same records.

    Raises:
        ValueError: reports of different facts.
    """
    known = {row["id"]: row["known"] for row in after.rows}
    if [row["id"] for row in before.rows] != list(known):
        raise ValueError("retained: both reports must be of the same facts, in the same order, each once")
    return estimate([float(known[row["id"]]) for row in before.rows if row["known"]])


TASK = Task("known", "known facts: the share that the model completes", _load, _run)
