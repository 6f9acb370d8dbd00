"""Processes with gloo that stay for the whole test session, and functions run on the first n of them.

    results = run(3, function, argument)      # [function(ranks, argument) of ranks 0, 1, 2]

`function` must be importable (a function of a test module). An exception of a rank comes back as an `Outcome`'s
`error` with `check=False`, otherwise it is raised. After a failure that ends a group, or one that hangs, the pool is
started afresh.
"""

from __future__ import annotations

import atexit
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from support.processes import end, fork

MOST = 4
TIMEOUT = 20.0
"""Seconds of `Ranks`."""


@dataclass
class Outcome:
    """What a rank returned, or raised."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""


def _work(rank: int, file: str, pipe: Any) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # tests.distributed.test_... by its name
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from rlsedit_kernels.distributed import Ranks

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=MOST, timeout=timedelta(seconds=60)
    )
    meshes = [DeviceMesh("cpu", list(range(n))) for n in range(1, MOST + 1)]
    while True:
        job = pipe.recv()
        if job is None:
            return
        n, function, args = job
        try:
            outcome = Outcome(function(Ranks(meshes[n - 1], timeout=TIMEOUT), *args))
        except BaseException as error:
            outcome = Outcome(error=error, trace=traceback.format_exc())
        try:
            pipe.send(outcome)
        except Exception as error:
            pipe.send(Outcome(error=RuntimeError(f"{outcome.error or error}"), trace=outcome.trace))


class Pool:
    """The processes."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = fork(MOST, _work, str(Path(self._folder.name) / "store"))

    def run(self, n: int, function: Callable[..., Any], args: tuple[Any, ...], limit: float) -> list[Outcome]:
        """One outcome a rank; one that does not come within `limit` seconds or whose process died is an error."""
        for pipe in self.pipes[:n]:
            pipe.send((n, function, args))
        found = []
        for rank, pipe in enumerate(self.pipes[:n]):
            try:
                if not pipe.poll(limit):
                    raise TimeoutError(f"rank {rank} has given no result within {limit} s")
                found.append(pipe.recv())
            except (EOFError, TimeoutError) as error:
                found.append(Outcome(error=error))
        return found

    def stop(self) -> None:
        end(self.processes)
        self._folder.cleanup()


_POOL: list[Pool] = []


def run(n: int, function: Callable[..., Any], *args: Any, check: bool = True, limit: float = 60.0) -> list[Any]:
    """Values of the ranks 0 .. n - 1, or their outcomes with `check=False`."""
    if not _POOL:
        _POOL.append(Pool())
        atexit.register(stop)
    outcomes = _POOL[0].run(n, function, args, limit)
    fatal = any(isinstance(o.error, (EOFError, TimeoutError)) or "has ended" in str(o.error) for o in outcomes)
    if fatal:
        stop()
    if not check:
        return outcomes
    for rank, outcome in enumerate(outcomes):
        if outcome.error is not None:
            raise AssertionError(f"rank {rank}: {outcome.error!r}\n{outcome.trace}")
    return [outcome.value for outcome in outcomes]


def stop() -> None:
    """End the processes; the next `run` starts new ones."""
    while _POOL:
        _POOL.pop().stop()
