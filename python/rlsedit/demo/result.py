"""What the demonstration is told, and what it measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsedit.config import EditConfig
    from rlsedit.demo.known import Choice
    from rlsedit.metrics import EvalReport
    from rlsedit.reports import EditReport

__all__ = ["DemoOptions", "DemoResult", "Run"]


@dataclass(frozen=True)
class DemoOptions:
    """What the demonstration does.

    Args:
        facts: number of facts written, at least 1.
        batch: facts of one batch, at least 1.
        method: a name of `list_methods()`, shown beside the published AlphaEdit solve.
        seed: of the stream of facts and of the random prefixes.
        device: where the model runs.
        out: folder for facts, report and plot; None writes nothing.
        text: file on which the second moments are measured; None for the prose that ships with Python.
        tokens: of that prose, about; at least one.
        config: fields of `EditConfig` that differ from the preset.
    """

    facts: int = 32
    batch: int = 8
    method: str = "rlsedit"
    seed: int = 0
    device: str = "cpu"
    out: Path | None = None
    text: Path | None = None
    tokens: int = 15_000
    config: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Run:
    """One method on the stream."""

    method: str
    label: str
    edit: EditReport
    scores: EvalReport
    completions: list[str]
    health: dict[int, dict[str, Any]]
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """All that was measured; what is shown and written comes from here."""

    options: DemoOptions
    config: EditConfig
    choice: Choice
    available: int
    prompts: list[tuple[str, str]]
    before: EvalReport
    completions: list[str]
    runs: list[Run]
    seconds: dict[str, float]
