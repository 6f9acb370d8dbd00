"""A folder of edits of a model that lies on many processes: rank 0 writes it, the others are told what is in it.

Everything that is kept is what one process would keep, so that a folder may be resumed by any number of processes, by
one among them. There are no snapshots: weights and states are parts, and are made anew from the records.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..facts import Fact
from ..models.adapter import Adapter
from ..store import tensors as files
from ..store.errors import StoreError
from ..store.files import DISK, Disk, intact
from ..store.folder import Folder, store_of
from ..store.index import Index
from ..store.records import Entry, Record
from ..store.session import Session
from .part import Part
from .processes import Processes
from .saving import whole_weight

__all__ = ["SharedFolder"]


class SharedJournal:
    """The journal of a folder that rank 0 holds; every rank has the entries, records are read by rank 0 and sent."""

    def __init__(self, processes: Processes, folder: Folder | None) -> None:
        self._processes, self._folder = processes, folder
        self.entries: list[Entry] = processes.shared(None if folder is None else folder.journal.entries)
        self.index = Index(self.entries)
        if folder is not None:
            self.entries, self.index = folder.journal.entries, folder.journal.index

    def append(self, record: Record) -> None:
        """Rank 0 writes the record; all know of it or none.

        Raises:
            OSError, RankError: it could not be written.
        """
        with self._processes.together("Editor: the record"):
            if self._folder is not None:
                self._folder.append(record)
        entry = self._processes.shared(None if self._folder is None else self.entries[-1])
        if self._folder is None:
            self.entries.append(entry)
            self.index.push(entry)

    def load(self, number: int, device: torch.device | str) -> Record:
        """The record with this number, from rank 0.

        Raises:
            StoreError, RankError: its file is damaged.
        """
        journal = None if self._folder is None else self._folder.journal
        record: Record = self._processes.of_first("Editor: a record", lambda: journal and journal.load(number, "cpu"))
        return replace(record, layers={n: rows.to(device) for n, rows in record.layers.items()})

    def header(self, number: int) -> Record:
        """The record without its tensors.

        Raises:
            StoreError, RankError: its file is damaged.
        """
        journal = None if self._folder is None else self._folder.journal
        found: Record = self._processes.of_first("Editor: a record", lambda: journal and journal.header(number))
        return found


class SharedLedger:
    """What the ledger of rank 0 says."""

    def __init__(self, processes: Processes, folder: Folder | None) -> None:
        self._processes, self._folder = processes, folder

    def edits(self, **wanted: Any) -> list[Any]:
        """See `Ledger.edits`."""
        ledger = None if self._folder is None else self._folder.ledger
        found: list[Any] = self._processes.of_first("Editor: the ledger", lambda: ledger and ledger.edits(**wanted))
        return found


class SharedFolder:
    """In the place of `Folder`; the same calls on all processes.

    Args:
        processes: those that hold the model.
        folder: on rank 0, the folder itself.
        path: of it.
        parts: which part of each edited weight is here.
    """

    snapshots = None

    def __init__(self, processes: Processes, folder: Folder | None, path: Path, parts: Mapping[int, Part]) -> None:
        self._processes, self._folder, self._parts = processes, folder, parts
        self.path, self.store = path, store_of(path)
        self.session: Session = processes.shared(None if folder is None else folder.session)
        self.journal = SharedJournal(processes, folder)
        self.ledger = SharedLedger(processes, folder)

    @classmethod
    def create(
        cls, adapter: Adapter, path: str | os.PathLike[str], session: Session,
        base: Mapping[int, tuple[Tensor, Tensor]], records: Iterable[Record] = (), *, every: int = 20,
        disk: Disk = DISK,
    ) -> SharedFolder:  # fmt: skip
        """As `Folder.create`; `base` holds parts of the first weights, which come to rank 0 one by one.

        Raises:
            StoreError, OSError, RankError: as there, on every rank.
        """
        processes = _many(adapter)
        parts = {n: adapter.part(n) for n in base}
        whole = {n: (whole_weight(processes, weight, parts[n]), moment) for n, (weight, moment) in base.items()}
        folder: Folder | None = None
        with processes.together("Editor.save"):
            if processes.writes:
                laid = {n: (_as_stored(weight, adapter.layout), moment) for n, (weight, moment) in whole.items()}
                folder = Folder.create(path, session, laid, records, every=every, disk=disk)
        return cls(processes, folder, Path(path), parts)

    @classmethod
    def open(
        cls, adapter: Adapter, path: str | os.PathLike[str], *, every: int = 20, disk: Disk = DISK
    ) -> SharedFolder:
        """As `Folder.open`.

        Raises:
            FolderBusyError, StoreError, RankError: as there, on every rank.
        """
        processes = _many(adapter)
        folder: Folder | None = None
        with processes.together("Editor.resume"):
            if processes.writes:
                folder = Folder.open(path, every=every, disk=disk)
        found = cls(processes, folder, Path(path), {})
        layers = [n for n in found.session.config.layers if n < adapter.num_layers]
        found._parts = {n: adapter.part(n) for n in layers}
        return found

    def close(self) -> None:
        """Give the folder back."""
        if self._folder is not None:
            self._folder.close()

    def first(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """This process's part of the first weight, and the second moment (d, d); every process reads the file.

        Raises:
            StoreError: it cannot be read here, or is damaged.
        """
        path = self.store / "base" / self.session.base[layer]
        if not path.is_file():
            raise StoreError(f"{path}: every process reads this file; rank {self._processes.rank} does not see it")
        if not intact(path):
            raise StoreError(f"{path}: content and hash differ; put a copy of the file in its place")
        found = files.read(path)
        return self._parts[layer].of(found["weight"]).to(device), found["moment"]

    def plan(self, facts: Sequence[Fact]) -> None:
        """Enter facts that are about to be written.

        Raises:
            StoreError, RankError: the ledger cannot be written.
        """
        with self._processes.together("Editor: the ledger"):
            if self._folder is not None:
                self._folder.plan(facts)

    def failed(self, facts: Sequence[Fact], reason: str) -> None:
        """Mark planned facts as failed; nothing is exchanged."""
        if self._folder is not None:
            self._folder.failed(facts, reason)

    def append(self, record: Record) -> None:
        """Make a step durable.

        Raises:
            OSError, RankError: nothing has been changed.
        """
        self.journal.append(record)

    def snapshot(self, layers: Mapping[int, tuple[Tensor, object]], *, due: bool) -> None:
        """There are none."""


def _many(adapter: Adapter) -> Processes:
    assert isinstance(adapter.processes, Processes)
    return adapter.processes


def _as_stored(weight: Tensor, layout: str) -> Tensor:
    """With the strides that the row form of one process's parameter has: they are part of the bits of products."""
    return weight if layout == "in_out" else weight.T.contiguous().T
