"""Stages of a step: what an editor names with `with stage("solve"):` is timed and counted by that name."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import torch

__all__ = ["OTHER", "Clock", "Meter", "stage"]

OTHER = "other"
"""What a step does outside of every stage."""


class Meter(Protocol):
    """What is told when a stage begins and ends."""

    def begin(self, name: str) -> None: ...
    def end(self, name: str) -> None: ...


_meter: ContextVar[Meter | None] = ContextVar("rlsedit_kernels_profile_meter", default=None)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Name a part of a step; costs a microsecond and does nothing where no profile is being taken.

    Stages do not nest: the outermost one counts.

    Args:
        name: such as "products", "solve", "commit", "weight", "transfer".
    """
    meter = _meter.get()
    if meter is None:
        yield
        return
    token = _meter.set(None)
    meter.begin(name)
    try:
        yield
    finally:
        meter.end(name)
        _meter.reset(token)


@contextlib.contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """Within the block, stages report to `meter`."""
    token = _meter.set(meter)
    try:
        yield
    finally:
        _meter.reset(token)


class Clock:
    """Times one step and its stages: device events on a GPU, the monotonic clock elsewhere.

    Args:
        device: where the step works. Nothing is synchronised between its stages.
        also: a meter that is told of the same stages.
    """

    def __init__(self, device: torch.device, also: Meter | None = None) -> None:
        self._device, self._cuda, self._also = device, device.type == "cuda", also
        self._marks: list[tuple[str, object, object]] = []
        self._open: object = None
        self._start: object = None
        self._stop: object = None

    def __enter__(self) -> Clock:
        if self._cuda:
            torch.cuda.synchronize(self._device)
        self._token = _meter.set(self)
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = self._now()
        _meter.reset(self._token)
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def begin(self, name: str) -> None:
        if self._also is not None:
            self._also.begin(name)
        self._open = self._now()

    def end(self, name: str) -> None:
        self._marks.append((name, self._open, self._now()))
        if self._also is not None:
            self._also.end(name)

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self._between(self._start, self._stop)

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage, in the order in which they first came; the rest under `OTHER`."""
        found: dict[str, float] = {}
        for name, start, stop in self._marks:
            found[name] = found.get(name, 0.0) + self._between(start, stop)
        found[OTHER] = found.get(OTHER, 0.0) + max(0.0, self.seconds - sum(found.values()))
        return found

    def _now(self) -> object:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))  # which need not be the current device's
        return event

    def _between(self, start: object, stop: object) -> float:
        if isinstance(start, float) and isinstance(stop, float):
            return stop - start
        assert isinstance(start, torch.cuda.Event)
        assert isinstance(stop, torch.cuda.Event)
        return float(start.elapsed_time(stop)) / 1e3
