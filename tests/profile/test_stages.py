"""The clock of a step on a GPU: events on the stream of the device that works, which need not be the current one."""

from __future__ import annotations

from typing import Any

import torch

from rlsedit_kernels.profile import stage
from rlsedit_kernels.profile.stages import Clock


def test_a_step_on_another_gpu_is_timed_there(monkeypatch) -> None:
    ticks = iter(range(100))

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self, stream: Any = None) -> None:
            assert stream == "the stream of cuda:1"
            self.at = next(ticks)

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    settled: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: settled.append(device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device}")
    device = torch.device("cuda:1")
    with Clock(device) as clock, stage("solve"):
        pass
    assert settled == [device, device]
    assert (clock.seconds, clock.stages) == (3.0, {"solve": 1.0, "other": 2.0})
