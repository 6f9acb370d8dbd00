"""Fresh processes that run one stream over ranks with checkpoints, one of which is killed or stopped.

    outcome = run(Job(folder, size=3, victim=1, event=40))     # kills rank 1 at its 40th event

Events of a rank are its collectives and the steps of a save, counted from where all ranks have met. `stream` is what a
user would write: the public interface only.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from support.processes import end, fork

D, U, V = 19, 3, 4
BATCHES, EVERY = 7, 3
KINDS = ("square_root", "plain", "whitened", "inverse_root")
CARRIED = "carried"
"""A filter whose solution is carried, its weight read behind every batch."""
LIMIT = 240.0
"""Seconds within which all processes of a run must have ended."""


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        folder: of the checkpoints; `result.pt`, errors and counts are beside it.
        size: ranks.
        kind: of the state, one of `KINDS`, or `CARRIED`.
        victim, event: the rank that is ended and at which of its events; -1: none.
        after: seconds after which the victim is ended where `event` is -1.
        stop: whether it is stopped rather than killed.
        tcp: whether rank 0 keeps the store; otherwise it is a file.
        timeout, patience: of `Ranks`, and how long one waits for signs of life.
    """

    folder: str
    size: int = 3
    kind: str = "square_root"
    victim: int = -1
    event: int = -1
    after: float = -1.0
    stop: bool = False
    tcp: bool = False
    timeout: float = 20.0
    patience: float = 5.0


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        codes: exit codes by rank, -9 for the victim.
        errors: texts by rank; "" where there was none.
        phases: what each rank was doing last.
        seconds: from the end of the victim to that of the last survivor.
        hung: ranks that had to be ended.
        events: the phase of each event of each rank, where the run came to its end.
    """

    codes: list[int]
    errors: list[str]
    phases: list[str]
    seconds: float
    hung: list[int]
    events: list[list[str]]


class Meter:
    """Counts the events of a rank, and ends its process at one of them."""

    def __init__(self, at: int, sign: int, note: Path) -> None:
        self.at, self.sign, self.note = at, sign, note
        self.done, self.phase = 0, "start"
        self.log: list[str] = []

    def count(self) -> None:
        self.done += 1
        self.log.append(self.phase)
        if self.done == self.at:
            self.note.write_text(self.phase)
            os.kill(os.getpid(), self.sign)


def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K (u, d) and V (u, v) of a step, the same in every process."""
    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randn(U, D, generator=generator), torch.randn(U, V, generator=generator)


def stream(ranks: Any, folder: str, kind: str, meter: Meter | None = None, disk: Any = None) -> dict[str, Any]:
    """Begin, or go on from the last checkpoint; state and weight at the end."""
    from rlsedit_kernels import Prior
    from rlsedit_kernels import distributed as rd
    from rlsedit_kernels.distributed import checkpoint

    def phase(name: str) -> None:
        if meter is not None:
            meter.phase = name

    if kind == CARRIED:
        return _filtered(ranks, folder, phase, disk)
    root = torch.randn(60, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prior = Prior.anchor(root.mT @ root, mu=0.3, lam=0.1)
    state: Any
    if kind == "square_root":
        state = rd.ShardedSquareRootState(prior, ranks)
    else:
        state = rd.ShardedCovarianceState(prior, ranks, form=kind)
    mine = ranks.rows(D)
    weight = ranks.dtensor(torch.zeros(mine.stop - mine.start, V), D)
    position = 0
    phase("load")
    if checkpoint.latest(folder, ranks=ranks) is not None:
        found = checkpoint.load(folder, {"layer": state}, weights={"layer": weight})
        position = found.extra["position"]
    for index in range(position, BATCHES):
        phase("batch")
        keys, values = batch(index)
        rows = weight.to_local()
        with ranks.guarded("prediction"):
            predicted = ranks.ordered_sum(keys[:, mine] @ rows)
        gain = state.update(keys)
        rows += gain.to_local() @ (values - predicted)
        if (index + 1) % EVERY == 0:
            phase("save")
            checkpoint.save(
                folder,
                {"layer": state},
                step=index + 1,
                weights={"layer": weight},
                extra={"position": index + 1},
                **({} if disk is None else {"disk": disk}),
            )
    phase("end")
    with ranks.guarded("end"):
        tensors = {"weight": ranks.gather(weight.to_local(), D)}
        for name, value in state.state_dict()["tensors"].items():
            if isinstance(value, torch.Tensor):
                tensors[name] = ranks.gather(value.to_local(), value.shape[0])  # type: ignore[attr-defined]
    return {**tensors, "steps": state.steps}


def _filtered(ranks: Any, folder: str, phase: Callable[[str], None], disk: Any) -> dict[str, Any]:
    """`stream` by a filter, which is made anew from W_0 and the batches behind its last checkpoint."""
    from rlsedit_kernels import Prior
    from rlsedit_kernels import distributed as rd
    from rlsedit_kernels.distributed import checkpoint

    W_0 = ranks.dtensor(ranks.shard(torch.ones(D, V)), D)
    rls = rd.ShardedRLSFilter(W_0, Prior.ridge(D, 0.3), ranks, "square_root", layout="in_out")
    position = 0
    phase("load")
    if checkpoint.latest(folder, ranks=ranks) is not None:
        position = checkpoint.load(folder, {}, strict=False, ranks=ranks).extra["position"]
        rls.refactor([(*batch(index), 1.0) for index in range(position)])
    for index in range(position, BATCHES):
        phase("batch")
        rls.update(*batch(index))
        weight = rls.weight
        if (index + 1) % EVERY == 0:
            phase("save")
            checkpoint.save(
                folder,
                {"layer": rls.state},
                step=index + 1,
                weights={"layer": weight},
                extra={"position": index + 1},
                **({} if disk is None else {"disk": disk}),
            )
    phase("end")
    with ranks.guarded("end"):
        found = {"weight": ranks.gather(rls.weight.to_local(), D), "L": ranks.gather(rls.state._form.L, D)}
    return {**found, "steps": rls.state.steps}


def tcp_store(note: Path, rank: int, size: int) -> Any:
    """The store as `tcp://` makes it, kept by rank 0, on a port that nobody takes in between; `note` has its number."""
    import torch.distributed as dist

    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        aside = note.with_suffix(".new")
        aside.write_text(str(store.port))
        aside.rename(note)
        return store
    while not note.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(note.read_text()), size, is_master=False)


def _work(rank: int, job: Job, pipe: Any) -> None:
    import torch.distributed as dist

    from rlsedit_kernels.distributed import Ranks, failure
    from rlsedit_kernels.distributed.disk import Disk

    folder = Path(job.folder).parent
    torch.set_num_threads(1)
    failure.PATIENCE = job.patience
    if job.stop:
        failure.STORE_PATIENCE = job.timeout
    sign = signal.SIGSTOP if job.stop else signal.SIGKILL
    meter = Meter(job.event if rank == job.victim else -1, sign, folder / f"phase-{rank}")

    class Counted(Disk):
        def reached(self, point: str) -> None:
            meter.count()

    code = 0
    try:
        store = tcp_store(folder / "port", rank, job.size) if job.tcp else None
        dist.init_process_group(
            "gloo",
            init_method=None if job.tcp else f"file://{folder / 'store'}",
            store=store,
            rank=rank,
            world_size=job.size,
            timeout=timedelta(seconds=600),
        )
        del store
        ranks = Ranks(timeout=job.timeout)
        ranks.barrier()
        begin = ranks._wait

        def counted(what: str, start: Callable[[], Any]) -> None:
            meter.count()
            begin(what, start)

        ranks._wait = counted  # type: ignore[method-assign]
        pipe.send("met")
        result = stream(ranks, job.folder, job.kind, meter, Counted())
        if rank == 0:
            torch.save(result, folder / "result.pt")
        (folder / f"events-{rank}").write_text(json.dumps(meter.log))
    except BaseException as error:
        (folder / f"phase-{rank}").write_text(meter.phase)
        (folder / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
        code = 1
        del error
    ranks = begin = None  # type: ignore[assignment]
    dist.destroy_process_group()
    gc.collect()  # what is left of the group goes as it would when an interpreter ends
    os._exit(code)


def run(job: Job) -> Outcome:
    """Run a job to its end, however it ends; nothing of it is left running."""
    folder = Path(job.folder).parent
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("result.pt", "store", "port", *(f"{k}-{r}" for k in ("error", "events", "phase") for r in range(8))):
        (folder / name).unlink(missing_ok=True)
    pipes, processes = fork(job.size, _work, job)
    ended = time.monotonic()
    if job.victim >= 0:
        ended = _end_victim(job, pipes, processes)
    survivors = [rank for rank in range(job.size) if rank != job.victim]
    until, last = time.monotonic() + LIMIT, ended
    hung = []
    for rank in survivors:
        processes[rank].join(max(0.0, until - time.monotonic()))
        last = time.monotonic()
        if processes[rank].is_alive():
            hung.append(rank)
    end(processes)
    return Outcome(
        codes=[process.exitcode or 0 for process in processes],
        errors=[_text(folder / f"error-{rank}") for rank in range(job.size)],
        phases=[_text(folder / f"phase-{rank}") for rank in range(job.size)],
        seconds=last - ended,
        hung=hung,
        events=[json.loads(_text(folder / f"events-{rank}") or "[]") for rank in range(job.size)],
    )


def result(job: Job) -> dict[str, Any] | None:
    """What the last run of a job has left, if it came to its end."""
    path = Path(job.folder).parent / "result.pt"
    return torch.load(path) if path.exists() else None


def same(one: dict[str, Any] | None, other: dict[str, Any], exactly: bool) -> bool:
    """Whether two results are equal: to the bit, or to the rounding of another order of sums."""
    if one is None or one.keys() != other.keys() or one["steps"] != other["steps"]:
        return False
    pairs = [(one[name], other[name]) for name in other if name != "steps"]
    if exactly:
        return all(torch.equal(a, b) for a, b in pairs)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def _end_victim(job: Job, pipes: list[Any], processes: list[Any]) -> float:
    """Until the victim is gone or stopped, or its run is over; the moment of it."""
    victim = processes[job.victim]
    for pipe in pipes:
        if not pipe.poll(LIMIT):
            raise TimeoutError("the ranks have not met")
    if job.event < 0:
        time.sleep(job.after)
        if victim.is_alive():
            os.kill(victim.pid, signal.SIGSTOP if job.stop else signal.SIGKILL)
        return time.monotonic()
    until = time.monotonic() + LIMIT
    while victim.is_alive() and not _stopped(victim.pid) and time.monotonic() < until:
        time.sleep(0.01)
    return time.monotonic()


def _stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
