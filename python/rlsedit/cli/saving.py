"""Where an edited model goes: a folder that holds its edits, and the model around them."""

from __future__ import annotations

import glob
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsedit.parallel import OneProcess

__all__ = ["REPORT", "check_out", "replacing", "save_model"]

logger = logging.getLogger(__name__)

REPORT = "rlsedit-report.json"
_ASIDE = ".replaced-"
_BESIDES = ("LICENSE*", "NOTICE*", "*.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.*")


def check_out(out: Path, force: bool, model: str, resume: bool | None = False) -> None:
    """Refuses an --out that holds something, or that is the model itself, before any work is done.

    Args:
        out, force, resume: the options; `resume` is None for a command that has no --resume.
        model: what is read.

    Raises:
        ValueError: saying what is in the way.
    """
    from rlsedit.store.folder import store_of

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file, needs a folder that is not there yet")
    if resume:
        if force:
            raise ValueError(
                "--resume: goes on with what is in --out, where --force would replace it; give one of them"
            )
        if not store_of(out).is_dir():
            raise ValueError(f"--resume: {out} holds no edits; leave --resume out to begin")
        return
    if out.exists() and out.resolve() == Path(model).resolve():
        more = "" if resume is None else ", or --resume to write more into it"
        raise ValueError(f"--out: {out} is the model itself; needs another folder{more}")
    if out.is_dir() and any(out.iterdir()) and not force:
        if resume is not None and store_of(out).is_dir():
            raise ValueError(f"--out: {out} holds edits; --resume goes on with them, --force begins anew")
        raise ValueError(f"--out: {out} is not empty; needs another folder, or --force to replace it")


@contextmanager
def replacing(out: Path) -> Iterator[None]:
    """What is at `out` is put aside, and removed when the block succeeds.

    It comes back when the block fails before an edit has been written; otherwise it stays beside, under a name that
    is logged, now or, where the process was killed, when `out` is to be replaced again.
    """
    for former in out.parent.glob(f".{glob.escape(out.name)}{_ASIDE}*"):
        logger.warning("what was at %s before a run that was killed, or replaced it and failed, is %s", out, former)
    if not (out.is_dir() and any(out.iterdir())):
        yield
        return
    aside = out.parent / f".{out.name}{_ASIDE}{os.getpid()}"
    os.rename(out, aside)
    try:
        yield
    except BaseException:
        if out.exists():
            logger.warning("what was at %s is now %s", out, aside)
        else:
            os.rename(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def save_model(
    model: Any, tokenizer: Any, source: Path, out: Path, number: int, report: str, processes: OneProcess | None = None
) -> None:
    """Puts weights, tokenizer, what else the tokenizer had on disk, and the report into `out`; see `store.modelfiles`.

    Args:
        model, tokenizer: what is saved.
        source: where the model came from.
        out: a folder that holds edits.
        number: of the record that the model stands behind.
        report: content of rlsedit-report.json.
        processes: those that hold the model; all of them call this, and rank 0 writes.

    Raises:
        OSError: if it cannot be written; the model that was at --out, and all edits, are then still there.
    """
    from rlsedit.paths import saving_tensors
    from rlsedit.store.modelfiles import place

    state: dict[str, Any] | None = None
    if processes is not None and processes.many:
        from rlsedit.parallel.saving import gathered, unspread

        state = gathered(model, processes.writes)

    def write(work: Path) -> None:
        with saving_tensors(out):
            if state is None:
                model.save_pretrained(work)
            else:
                with unspread(model):
                    model.save_pretrained(work, state_dict=state)
        tokenizer.save_pretrained(work)
        if source.is_dir():
            for pattern in _BESIDES:
                for file in source.glob(pattern):
                    if file.is_file() and not (work / file.name).exists():
                        shutil.copyfile(file, work / file.name)
        for file in work.iterdir():
            if file.is_file():
                file.chmod(0o666 & out.stat().st_mode)
        (work / REPORT).write_text(report, encoding="utf-8")

    with nullcontext() if processes is None else processes.together("saving"):
        if processes is None or processes.writes:
            place(out, number, write)
