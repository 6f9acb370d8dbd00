"""A stream whose ranks are ended once or twice, begun again each time, and what is wrong with how it went."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlsedit_kernels.distributed import checkpoint, disk
from support.rank_kills import BATCHES, CARRIED, EVERY, Job, Outcome, result, run, same

PHASES = ("start", "load", "batch", "save", "end")


@dataclass(frozen=True)
class Reference:
    """A stream that nobody interrupted: its result, and the phase of each event of each rank."""

    result: dict[str, Any]
    events: list[list[str]]


@dataclass
class Ended:
    """One rank that was ended.

    Attributes:
        phase: what it was doing; "over" where its run had come to its end before.
        how: "killed" or "stopped".
        rank, size: which of how many.
        seconds: until the last of the others had failed.
    """

    phase: str
    how: str
    rank: int
    size: int
    seconds: float


def reference(folder: Path, size: int, kind: str) -> Reference:
    """Run a stream to its end."""
    job = Job(str(folder / f"reference-{kind}-{size}" / "checkpoints"), size, kind)
    outcome = run(job)
    found = result(job)
    if outcome.codes != [0] * size or found is None:
        raise RuntimeError(f"an uninterrupted stream failed: {outcome}")
    return Reference(found, outcome.events)


def trial(
    folder: Path, jobs: list[Job], then: int, references: Mapping[tuple[str, int], Reference]
) -> tuple[list[Ended], list[str]]:
    """End a rank in each of `jobs`, one after the other in one folder; begin again with `then` ranks, to the end.

    Returns:
        what was ended, and what was wrong.
    """
    ended, wrong, sizes = [], [], {then}
    checkpoints = str(folder / "checkpoints")
    for job in jobs:
        job = replace(job, folder=checkpoints)
        outcome = run(job)
        over = outcome.codes[job.victim] == 0
        phase = "over" if over else outcome.phases[job.victim] or "at any time"
        ended.append(Ended(phase, "stopped" if job.stop else "killed", job.victim, job.size, outcome.seconds))
        wrong += [f"{job}: {text}" for text in judge(job, outcome, phase)]
        wrong += [f"{job}: {text}" for text in _folder(Path(checkpoints))]
        sizes.add(job.size)
    last = Job(checkpoints, then, jobs[0].kind)
    outcome = run(last)
    if outcome.codes != [0] * then or outcome.hung:
        wrong.append(f"{last}: did not come to its end: {outcome}")
    known = references[last.kind, then].result
    if not same(result(last), known, exactly=len(sizes) == 1 and last.kind != CARRIED):  # which is made anew
        wrong.append(f"{last} after {jobs}: another result than without interruption")
    if checkpoint.latest(checkpoints) != BATCHES - BATCHES % EVERY or any(Path(checkpoints).glob("*.partial")):
        wrong.append(f"{last}: left {sorted(path.name for path in Path(checkpoints).iterdir())}")
    shutil.rmtree(folder, ignore_errors=True)
    return ended, wrong


def judge(job: Job, outcome: Outcome, phase: str) -> list[str]:
    """What is wrong with how the other ranks took it."""
    if outcome.hung:
        return [f"ranks {outcome.hung} were still there: {outcome}"]
    wrong = []
    for rank in range(job.size):
        code, error = outcome.codes[rank], outcome.errors[rank]
        if rank == job.victim or (code == 0 and phase in ("end", "over", "at any time")):
            continue
        if code != 1 or not error.startswith("RankError"):
            wrong.append(f"rank {rank} ended with {code}: {error!r}")
        elif not names(error, job.victim):
            wrong.append(f"rank {rank} does not name rank {job.victim}: {error!r}")
    return wrong


def names(error: str, victim: int) -> bool:
    """Whether a text says which rank is gone."""
    listed = re.search(r"no sign of life from rank ([\d, ]+) for", error)
    if listed is not None:
        return str(victim) in listed[1].split(", ")
    return victim == 0 and "the process that keeps the store of this group (that of rank 0) is gone" in error


def drawn(choose: random.Random, size: int, kind: str, phase: str, found: Reference) -> Job:
    """A job in which one rank is ended somewhere in `phase`, or at any time where that is "at any time"."""
    victim, stop = choose.randrange(size), choose.random() < 0.1
    job = Job("", size, kind, victim, stop=stop, tcp=choose.random() < 0.5, timeout=8.0 if stop else 20.0)
    if phase == "at any time":
        return replace(job, after=choose.uniform(0.0, 1.5))
    places = [index for index, name in enumerate(found.events[victim], 1) if name == phase]
    return replace(job, event=choose.choice(places))


def again(choose: random.Random, job: Job) -> Job:
    """One that is ended while it loads, or soon after."""
    return replace(job, victim=choose.randrange(job.size), event=choose.randint(1, 40), after=-1.0, stop=False)


def _folder(checkpoints: Path) -> list[str]:
    """What is there under the name of a checkpoint must be one."""
    newest = checkpoint.latest(checkpoints)
    if newest is None:
        return []
    path = checkpoints / f"step-{newest:010d}"
    content, _ = disk.read_manifest(path)
    disk.verify(path, content["files"], 0, 1)
    return [] if content["extra"] == {"position": newest} else [f"{path}: {content['extra']}"]
