"""General ability: what a model can do beside the facts that are written into it, from local files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from ..models.adapter import Adapter
from . import code, glue, gsm8k, known, mmlu, perplexity
from .known import retained
from .sandbox import Limits, Outcome, isolation, run_program
from .task import Progress, Task, TaskOptions, TaskReport

__all__ = [
    "TASKS",
    "Limits",
    "Outcome",
    "Task",
    "TaskOptions",
    "TaskReport",
    "isolation",
    "list_tasks",
    "retained",
    "run_program",
    "run_task",
]

TASKS: dict[str, Task] = {
    task.name: task for task in (perplexity.TASK, *glue.TASKS, mmlu.TASK, gsm8k.TASK, *code.TASKS, known.TASK)
}
"""Name -> task."""


def list_tasks() -> list[str]:
    """Names of the tasks."""
    return list(TASKS)


def run_task(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    records: Sequence[Any] | None = None,
    limit: int | None = None,
    options: TaskOptions | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    adapter: Adapter | None = None,
    progress: Progress | None = None,
) -> TaskReport:
    """Runs one task on a model.

    Args:
        name: one of `list_tasks()`.
        model, tokenizer: a causal LM and its fast tokenizer.
        path: file of its records, in the data set's own fields, JSON lines or an array, `.gz` or not; text for
            perplexity.
        records: what `TASKS[name].load` has given for a file, instead of `path`, so that several models read it once.
        limit: scored records at most, instead of `options.limit`.
        options: shots, tokens, samples, ...; see `TaskOptions`.
        on_error: "raise" stops at the first bad record, "skip" leaves bad ones out with a warning for each.
        adapter: for architectures that `Adapter.for_model` does not know.
        progress: called with (done, all).

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown task, a bad record (file, line and field), too few records, or a prompt that the model
            cannot read.
        TypeError: both path and records, or none of them.
    """
    if name not in TASKS:
        raise ValueError(f"run_task: name must be one of {', '.join(TASKS)}, got {name!r}")
    if (path is None) == (records is None):
        raise TypeError("run_task: needs either path or records")
    task, options = TASKS[name], options or TaskOptions()
    if limit is not None:
        options = replace(options, limit=limit)
    if path is not None:
        records = task.load(path, on_error)
    assert records is not None
    adapter = adapter or Adapter.for_model(model, edit=False)
    return task.run(adapter, tokenizer, records, options, progress)
