"""What a batch tells while it is written and afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from ..config import EditConfig
from ..facts import Fact
from ..methods import Method
from ..reports import BatchReport, Progress
from .job import LayerState, Written

__all__ = ["ProgressCallback", "Stage", "batch_report"]

ProgressCallback = Callable[[Progress], None]


class Stage:
    """Sends progress events and adds up wall time by stage.

    Args:
        progress: where events go.
        batch, batches: which batch of how many.
    """

    def __init__(self, progress: ProgressCallback | None, batch: int, batches: int) -> None:
        self._progress, self._batch, self._batches = progress, batch, batches
        self._now: str | None = None
        self._since = 0.0
        self.seconds: dict[str, float] = {"targets": 0.0, "keys": 0.0, "solve": 0.0, "report": 0.0}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """A stage has come to `done` of `total`; time since the last call counts for the stage before."""
        now = time.perf_counter()
        if self._now in self.seconds:
            self.seconds[self._now] += now - self._since
        self._now, self._since = stage, now
        if self._progress is not None and stage != "report":
            self._progress(Progress(stage, self._batch, self._batches, done, total))


def batch_report(
    method: Method,
    config: EditConfig,
    facts: Sequence[Fact],
    written: Written,
    seconds: dict[str, float],
    layers: Mapping[int, LayerState],
) -> BatchReport:
    """Figures of a batch behind which the states are `layers`."""
    all_of = [layer.deviations for layer in layers.values()]
    bounds = [deviations.bounds(method, config) for deviations in all_of]
    return BatchReport(
        ids=tuple(fact.id for fact in facts),
        seconds=seconds,
        fit=sum(deviations.fit(method, config) for deviations in all_of),
        parameter_deviation=sum(deviations.parameter for deviations in all_of),
        anchor_deviation=sum(deviations.anchor for deviations in all_of),
        parameter_bound=_root_sum([parameter for parameter, _ in bounds]),
        anchor_bound=_root_sum([anchor for _, anchor in bounds]),
        target_loss=written.loss,
        steps=written.steps,
    )


def _root_sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(value**2 for value in known) ** 0.5 if len(known) == len(values) else None
