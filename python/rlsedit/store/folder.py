"""A folder of edits on the disk: what it is about, journal, ledger, snapshots, and the lock of its one writer.

    DIR/rlsedit/  session.json  lock  ledger.sqlite  base/  records/  snapshots/  damaged/

A record counts from the moment its name is on the disk; ledger and snapshots follow, and are brought up to date or left
behind without harm (docs/ledger.md).
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..facts import Fact
from . import journal as journals
from . import tensors as files
from .errors import StoreError
from .files import DISK, Disk, clear_partial, intact, put
from .journal import FolderJournal
from .ledger import Ledger
from .lock import Lock
from .records import Entry, Record
from .session import Session
from .snapshots import Snapshots

__all__ = ["STORE", "Folder", "store_of"]

logger = logging.getLogger(__name__)

STORE = "rlsedit"
_PARTS = ("base", "records", "snapshots")


def store_of(path: str | os.PathLike[str]) -> Path:
    """The part of an output folder that holds its edits."""
    return Path(path) / STORE


class Folder:
    """An open folder, locked against other writers; make it with `create` or `open`.

    Attributes:
        path: the output folder.
        store: what holds the edits.
        session: what it is about.
        journal, snapshots, ledger: its parts.
        every: records between two snapshots.
    """

    def __init__(self, path: Path, lock: Lock, session: Session, disk: Disk, every: int) -> None:
        self.path, self.store, self.session, self.every = path, store_of(path), session, every
        self.disk, self._lock = disk, lock
        self.snapshots = Snapshots(self.store / "snapshots", disk)
        self.ledger = _ledger(self.store)
        self.journal = FolderJournal(self.store / "records", disk, self._entries())
        self._last: int | None = None  # number of the newest snapshot that fits
        self._sync()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        session: Session,
        base: Mapping[int, tuple[Tensor, Tensor]],
        records: Iterable[Record] = (),
        *,
        every: int = 20,
        disk: Disk = DISK,
    ) -> Folder:
        """Make a folder; it is there whole or not at all.

        Args:
            path: the output folder; made if it is not there.
            session: what it is about; `base` is filled in.
            base: first weight (d, v) and second moment (d, d) of each layer.
            records: steps that have been taken already.
            every, disk: see the class.

        Raises:
            StoreError: the folder holds edits already.
            OSError: it cannot be written.
        """
        path, store = Path(path), store_of(path)
        if store.exists():
            raise StoreError(f"{path}: holds edits already; resume it, or use another folder")
        path.mkdir(parents=True, exist_ok=True)
        _clear_unfinished(path)
        work = path / f".{STORE}.{os.getpid()}.partial"
        for part in _PARTS:
            (work / part).mkdir(parents=True)
        lock, whole = None, work
        try:
            lock = Lock(work / "lock", path)
            names = {}
            for n, (weight, moment) in base.items():
                parts = {"weight": weight, "moment": moment}
                file = put(disk, work / "base", f"layer-{n:03d}", ".safetensors", files.blocks(parts, None))
                names[n] = file.name
            replace(session, base=names).write(disk, work)
            journal = FolderJournal(work / "records", disk, [])
            for record in records:
                journal.append(record)
            for folder in (*(work / part for part in _PARTS), work):
                disk.sync_folder(folder)
            try:
                disk.rename(work, store)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise StoreError(f"{path}: another process has begun to write edits into it") from None
                raise
            whole = store
            disk.sync_folder(path)
        except BaseException:
            if lock is not None:
                lock.close()
            shutil.rmtree(whole, ignore_errors=True)
            raise
        disk.reached("folder")
        return cls(path, lock, Session.read(store), disk, every)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, every: int = 20, disk: Disk = DISK) -> Folder:
        """Open a folder for writing, and mend what a killed process or a damaged file has left.

        Raises:
            FolderBusyError: another process writes to it.
            StoreError: there is none, or what cannot be done without is damaged.
        """
        path, store = Path(path), store_of(path)
        if not store.is_dir():
            raise StoreError(f"{path}: holds no edits (no folder {STORE} in it)")
        lock = Lock(store / "lock", path)
        try:
            session = Session.read(store)
            for part in (store, *(store / part for part in _PARTS)):
                clear_partial(part)
            return cls(path, lock, session, disk, every)
        except BaseException:
            lock.close()
            raise

    def close(self) -> None:
        """Give the folder back."""
        self.ledger.close()
        self._lock.close()

    def first(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """First weight (d, v) and second moment (d, d) of a layer.

        Raises:
            StoreError: the file is damaged.
        """
        path = self.store / "base" / self.session.base[layer]
        if not intact(path):
            raise StoreError(f"{path}: content and hash differ; put a copy of the file in its place")
        parts = files.read(path)
        return parts["weight"].to(device), parts["moment"]

    def plan(self, facts: Sequence[Fact]) -> None:
        """Enter facts that are about to be written.

        Raises:
            StoreError: the ledger cannot be written.
        """
        try:
            self._sync()
            self.ledger.plan(facts)
        except sqlite3.Error as error:
            raise StoreError(f"{self.ledger.path}: cannot be written: {error}") from None
        self.disk.reached("plan")

    def failed(self, facts: Sequence[Fact], reason: str) -> None:
        """Mark planned facts as failed."""
        with suppress(sqlite3.Error):
            self.ledger.failed(facts, reason)

    def append(self, record: Record) -> None:
        """Make a step durable, then enter it in the ledger, which may stay behind when the disk is full or unreadable.

        Raises:
            OSError: nothing has been changed.
        """
        self.journal.append(record)
        try:
            self._sync()
        except (sqlite3.Error, StoreError, OSError) as error:
            logger.warning("%s: stays behind for now: %s", self.ledger.path, error)
        self.disk.reached("ledger")

    def snapshot(self, layers: Mapping[int, tuple[Tensor, object]], *, due: bool) -> None:
        """Take a snapshot: now, or where one is due.

        Raises:
            OSError: it cannot be written.
        """
        stack = self.journal.index.stack
        if not stack:
            return
        if self._last is None or stack[-1].kind in ("undo", "reset"):
            fitting = (m.number for m, _ in self.snapshots.manifests() if m is not None and m.fits(self.journal.index))
            self._last = max(fitting, default=0)
        if stack[-1].number - self._last >= (self.every if due else 1):
            self.snapshots.write(self.journal.index, layers)
            self._last = stack[-1].number

    def _sync(self) -> None:
        known, entries = self.ledger.known, self.journal.entries
        if known >= len(entries):
            return
        present = self.journal.index  # behind every step one entry is new, which this has already: nothing to make
        index = present if known == len(entries) - 1 else journals.Index(entries[:known])
        with self.ledger.at_once():
            for entry in entries[known:]:
                if index is not present:
                    index.push(entry)
                if not entry.damaged:
                    self.ledger.take(self.journal.header(entry.number), entry.digest, index)

    def _entries(self) -> list[Entry]:
        """Entries of all records that can be built upon; what lies behind a lost one is set aside."""
        headers, digests, wrong = journals.scan(self.store / "records", self.ledger.digests(), _refuse)
        for problem in wrong:
            logger.warning("%s", problem)
        if found := self.ledger.damage(headers, digests):
            self._renew_ledger(found[0])
        known = self.ledger.known
        if known > len(headers):  # records at the end are gone
            logger.warning("%s: records %d to %d are missing", self.store / "records", len(headers) + 1, known)
        whole = len(headers) if None not in headers else self._reaches(headers)
        if whole < max(known, len(headers)):
            self._set_aside(whole + 1, len(headers))
        entries = []
        for number, header in enumerate(headers[:whole], 1):
            if header is None:
                entries.append(self._lost(number, digests[number - 1]))
            else:
                entries.append(header.entry(digests[number - 1]))
        return entries

    def _renew_ledger(self, problem: str) -> None:
        """Put a damaged ledger aside; of its rows those stay that are whole and that no record has."""
        planned: list[Fact] = []
        with suppress(StoreError):
            planned = [row.fact for row in self.ledger.edits(state="planned") if row.whole]
        self.ledger.close()
        self.ledger = _ledger_anew(self.store, problem)
        self.ledger.plan(planned)

    def _reaches(self, headers: Sequence[Record | None]) -> int:
        """How many records can be stood upon: up to a good snapshot behind the damage, and on while none is missing."""
        reach = next((i for i, header in enumerate(headers) if header is None), len(headers))
        for manifest, _ in self.snapshots.manifests():
            if manifest is not None and all(intact(self.snapshots.folder / name) for name in manifest.files.values()):
                reach = max(reach, min(manifest.number, len(headers)))
                break
        while reach < len(headers) and headers[reach] is not None:
            reach += 1
        return reach

    def _set_aside(self, first: int, last: int) -> None:
        reason = f"lost with a damaged record; the files are in {STORE}/damaged"
        logger.warning(
            "%s: records from %d on cannot be built upon and are set aside in %s; their edits are marked as failed",
            self.path, first, self.store / "damaged",
        )  # fmt: skip
        (self.store / "damaged").mkdir(exist_ok=True)
        self.ledger.forget_from(first, reason)
        for path in sorted((self.store / "records").iterdir()):
            if path.name[:6].isdigit() and first <= int(path.name[:6]) <= last:
                self.disk.rename(path, self.store / "damaged" / path.name)
        self.disk.sync_folder(self.store / "records")

    def _lost(self, number: int, digest: str) -> Entry:
        rows = self.ledger.edits(batch=number)
        about = tuple((row.fact.subject, row.fact.prompt, row.fact.relation) for row in rows)
        return journals.damaged_entry(number, tuple(row.fact.id for row in rows), about, digest)


def _refuse(problem: str) -> None:
    raise StoreError(problem)


def _ledger(store: Path) -> Ledger:
    path = store / "ledger.sqlite"
    try:
        return Ledger(path)
    except StoreError as error:
        return _ledger_anew(store, str(error))


def _ledger_anew(store: Path, problem: str) -> Ledger:
    logger.warning("%s; it is made anew from the records", problem)
    (store / "damaged").mkdir(exist_ok=True)
    for file in store.glob("ledger.sqlite*"):
        os.replace(file, store / "damaged" / file.name)
    return Ledger(store / "ledger.sqlite")


def _clear_unfinished(path: Path) -> None:
    """Remove what a process that was killed while it made the folder has left."""
    for work in path.glob(f".{STORE}.*.partial"):
        with suppress(StoreError, OSError):
            Lock(work / "lock", path).close()
            shutil.rmtree(work, ignore_errors=True)
