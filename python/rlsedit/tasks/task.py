"""What a task is, what it may be told, and what it reports."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..metrics.estimate import Estimate
from ..models.adapter import Adapter
from .sandbox import Limits

__all__ = ["HELD_OUT", "Progress", "Task", "TaskOptions", "TaskReport"]

HELD_OUT = 10
"""Records at the head of a file that serve as examples only, as in the published evaluation."""

Progress = Callable[[int, int], None]
"""Called with (done, all); what is counted depends on the task."""


@dataclass(frozen=True)
class TaskOptions:
    """What the tasks may be told; each reads what concerns it.

    Attributes:
        limit: scored records at most, None for all.
        shots: solved examples in front of each question, at most `held_out`; None for the task's own number.
        held_out: records at the head of the file that are examples and never scored, whatever `shots` is, so that
            scores with different `shots` are of the same records.
        max_tokens: token budget of one forward pass over prompts.
        rows: texts that are written side by side.
        new_tokens: tokens of an answer at most, None for the task's own number.
        samples: programs for each problem; one is greedy.
        temperature, top_p: of the sampling, where there are several.
        seed: of the sampling.
        window, stride: of perplexity, in tokens, 1 <= stride < window.
        limits: of each generated program.
        trust_code: run generated code also where this system does not enforce all of `sandbox.ISOLATION`.

    Raises:
        ValueError: a value out of range.
    """

    limit: int | None = None
    shots: int | None = None
    held_out: int = HELD_OUT
    max_tokens: int = 2048
    rows: int = 8
    new_tokens: int | None = None
    samples: int = 1
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    window: int = 512
    stride: int = 256
    limits: Limits = field(default_factory=Limits)
    trust_code: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("limit", 1), ("shots", 0), ("held_out", 0), ("max_tokens", 1), ("rows", 1), ("new_tokens", 1),
            ("samples", 1), ("seed", 0), ("window", 2), ("stride", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"TaskOptions: {name} must be a whole number of at least {least}, got {value!r}")
        if self.shots is not None and self.shots > self.held_out:
            raise ValueError(f"TaskOptions: shots must be at most held_out = {self.held_out}, got {self.shots}")
        if self.stride >= self.window:
            raise ValueError(f"TaskOptions: stride must be below window = {self.window}, got {self.stride}")
        if not self.temperature > 0:
            raise ValueError(f"TaskOptions: temperature must be above 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"TaskOptions: top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class TaskReport:
    """Result of a task.

    Attributes:
        rows: one dictionary for each scored record (each window for perplexity).
        summary: score -> Estimate; the first one is the task's main score.
        settings: what was done: shots, counts of labels, what was not enforced, ...
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Estimate]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A measure of what a model can do beside the facts that are written into it.

    Attributes:
        name, summary: for people.
        read: (path, on_error) -> records, of which `load` is the public form.
        run: (adapter, tokenizer, records, options, progress) -> TaskReport.
    """

    name: str
    summary: str
    read: Callable[[Path, Literal["raise", "skip"]], list[Any]]
    run: Callable[[Adapter, Any, Sequence[Any], TaskOptions, Progress | None], TaskReport]

    def load(self, path: str | os.PathLike[str], on_error: Literal["raise", "skip"] = "raise") -> list[Any]:
        """The records of a file, to be read once and measured with `run_task(..., records=)` on several models.

        Args:
            path: the file, in the data set's own fields.
            on_error: "raise" stops at the first bad record, "skip" leaves bad records out, each with a warning.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a bad record, with file, line and field; or no record.
        """
        return self.read(Path(path), on_error)


def split(name: str, records: Sequence[Any], options: TaskOptions, shots: int) -> tuple[list[Any], list[Any]]:
    """The examples and the records that are scored.

    Args:
        shots: the task's own number, where the options name none.

    Raises:
        ValueError: nothing is left to score, or fewer examples than asked for.
    """
    wanted = shots if options.shots is None else options.shots
    if wanted > options.held_out:
        raise ValueError(
            f"{name}: held_out must be at least the {wanted} examples that are shown (shots), got {options.held_out}"
        )
    scored = list(records[options.held_out :][: options.limit])
    if not scored:
        raise ValueError(
            f"{name}: needs more than {options.held_out} records, of which the first {options.held_out} are examples "
            f"(held_out) and {wanted} are shown (shots); got {len(records)}"
        )
    return list(records[:wanted]), scored
