"""Kills a real editing process with SIGKILL, at random times and at every step of a commit, and compares bits.

A server imports everything once and forks: each trial is a process of its own that edits a tiny model in a folder, is
killed, and is followed by another one that resumes. What that one finds must be the bits of an uninterrupted stream
behind the same step, and so must what it ends with; ledger, files and model in the folder must agree.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers

from rlsedit.editor import Editor
from rlsedit.facts import Fact
from rlsedit.store import modelfiles
from rlsedit.store.check import problems
from rlsedit.store.files import DISK, Disk
from rlsedit.store.folder import store_of
from support.editors import differing, editor, everything, facts, resumed

SETTINGS: dict[str, Any] = dict(steps=2, contexts=0)
EVERY = 2
AGAIN = Fact("again", facts(1)[0].prompt, facts(1)[0].subject, "yen")  # replaces f0

STEPS: tuple[Callable[[Editor], object], ...] = (
    lambda e: e.edit(facts(2)),
    lambda e: e.edit(facts(2, 2)),
    lambda e: e.remove(["f1"]),
    lambda e: e.edit(facts(2, 4)),
    lambda e: e.edit([AGAIN, *facts(1, 6)], on_conflict="replace"),
    lambda e: e.edit(facts(2, 7)),
    lambda e: e.undo(),
    lambda e: e.edit(facts(1, 9)),
)
"""Each writes one record."""


class Deadly(Disk):
    """Kills its own process at the n-th thing it does; a write may stop half way."""

    def __init__(self, at: int = -1) -> None:
        self.done, self.at = 0, at

    def _next(self) -> bool:
        self.done += 1
        return self.done == self.at

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write(self, stream: BinaryIO, data: bytes) -> None:
        if self._next():
            super().write(stream, data[: len(data) // 2])
            stream.flush()
            self._die()
        super().write(stream, data)

    def sync(self, stream: BinaryIO) -> None:
        if self._next():
            self._die()
        super().sync(stream)

    def rename(self, old: Path, new: Path) -> None:
        if self._next():
            self._die()
        super().rename(old, new)

    def sync_folder(self, folder: Path) -> None:
        if self._next():
            self._die()
        super().sync_folder(folder)

    def remove(self, path: Path) -> None:
        if self._next():
            self._die()
        super().remove(path)

    def reached(self, point: str) -> None:
        if self._next():
            self._die()


def work(folder: Path, disk: Disk, look: Callable[[Editor], None] = lambda _: None) -> None:
    """Begin or resume, do the steps that are left, and put the model into the folder."""
    if store_of(folder).is_dir():
        one = resumed(folder, every=EVERY, disk=disk)
        modelfiles.mend(folder, disk)
    else:
        one = editor(**SETTINGS)
        one.save(folder, every=EVERY, disk=disk)
    look(one)
    assert one.folder is not None
    for step in STEPS[len(one.folder.journal.entries) :]:
        step(one)
        look(one)
    modelfiles.place(folder, len(STEPS), one.model.save_pretrained, disk)  # type: ignore[operator, arg-type]
    one.close()


def states(folder: Path) -> list[dict[str, Any]]:
    """Everything behind each step of a stream that is not interrupted."""
    found: list[dict[str, Any]] = []
    work(folder, DISK, lambda one: found.append(everything(one)))
    return found


def rows(folder: Path) -> list[tuple[Any, ...]]:
    """The ledger, less times."""
    from rlsedit.store.check import reading

    with reading(folder) as (ledger, note):
        assert note == ""
        return sorted((r.fact.id, r.state, r.batch or 0, r.removed_by or 0, r.reason, r.whole) for r in ledger.edits())


def follow(folder: Path, reference: Path) -> None:
    """What the process after a kill finds and ends with must be what the reference has."""
    wanted = torch.load(reference / "states.pt", weights_only=False)

    def look(one: Editor) -> None:
        assert one.folder is not None
        step = len(one.folder.journal.entries)
        assert differing(everything(one), wanted[step]) == [], f"behind step {step}"
        assert len(one.planned) <= 2

    work(folder, DISK, look)
    assert problems(folder) == [], problems(folder)
    assert rows(folder) == rows(reference)
    left = [path.name for path in folder.rglob("*") if path.name.endswith(".partial")]
    assert left == [], left
    mine, theirs = (folder / "model.safetensors").read_bytes(), (reference / "model.safetensors").read_bytes()
    assert mine == theirs, "model files"


def _child(job: Callable[[], None], log: Path, kill_after: float | None = None) -> int:
    """Run a job in a process of its own; its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            job()
            status = 0
        except BaseException:
            log.write_text(traceback.format_exc())
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def run(count: int, seed: int, scratch: Path) -> dict[str, Any]:
    """At least `count` kills.

    Returns:
        How many streams and kills of which kind, how far the streams had come, and what went wrong.
    """
    choose = random.Random(seed)
    reference, log = scratch / "reference", scratch / "log"
    work(scratch / "warm", DISK)  # here, so that no child has to import anything
    begin = time.perf_counter()
    status = _child(lambda: torch.save(states(reference), reference / "states.pt"), log)
    if status != 0:
        raise RuntimeError(log.read_text())
    span = time.perf_counter() - begin
    counted = Deadly()

    def count_steps() -> None:
        work(scratch / "counted", counted)
        (scratch / "operations").write_text(str(counted.done))

    if _child(count_steps, log) != 0:
        raise RuntimeError(log.read_text())
    operations = int((scratch / "operations").read_text())
    kinds: Counter[str] = Counter()
    reached: Counter[int] = Counter()
    wrong: list[str] = []
    trial = 0
    while kinds["at a random time"] + kinds["at a step of a commit"] < count:
        trial += 1
        folder = scratch / f"trial-{trial}"
        for _ in range(choose.choice((1, 1, 2))):  # a third of the streams is killed again while it resumes
            log.unlink(missing_ok=True)
            if choose.random() < 0.5:
                kind, at = "at a random time", choose.uniform(0.0, 0.8 * span)
                status = _child(lambda f=folder: work(f, DISK), log, at)  # type: ignore[misc]
            else:
                kind, at = "at a step of a commit", choose.randint(1, operations)
                status = _child(lambda f=folder, n=at: work(f, Deadly(n)), log)  # type: ignore[misc]
            kinds[kind if status == -signal.SIGKILL else "had ended before"] += 1
            if status > 0:
                wrong.append(f"trial {trial}, {kind} {at}: {log.read_text()}")
        records = store_of(folder) / "records"
        reached[len([p for p in records.glob("0*")]) if records.is_dir() else 0] += 1
        log.unlink(missing_ok=True)
        if _child(lambda f=folder: follow(f, reference), log) != 0:  # type: ignore[misc]
            wrong.append(f"trial {trial} (seed {seed}): {log.read_text()}")
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "streams": trial,
        "kills": {name: kinds[name] for name in sorted(kinds)},
        "steps reached when killed": dict(sorted(reached.items())),
        "operations of a commit that were aimed at": operations,
        "seconds of an uninterrupted stream": round(span, 2),
        "seconds": round(time.perf_counter() - begin, 1),
        "wrong": wrong,
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        result = run(args.count, args.seed, Path(scratch))
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
