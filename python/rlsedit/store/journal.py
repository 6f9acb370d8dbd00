"""The steps of a stream in the order written, in memory or as one file each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from . import records
from .errors import StoreError
from .files import Disk, intact, put, stem_of
from .index import Index
from .records import Entry, LayerRows, Record

__all__ = ["FolderJournal", "Journal", "MemoryJournal"]


class Journal(Protocol):
    """Keeps records; `index` always stands behind the last of them."""

    index: Index
    entries: list[Entry]

    def append(self, record: Record) -> None:
        """Keep the next record; raises OSError with nothing changed if it cannot be kept."""

    def load(self, number: int, device: torch.device | str) -> Record:
        """A record with its tensors on a device."""


class MemoryJournal:
    """Records in the memory of the host: about 4 u (2 d + 3 v) bytes a layer and batch of u rows in float32."""

    def __init__(self) -> None:
        self.index = Index()
        self.entries: list[Entry] = []
        self._records: list[Record] = []

    def append(self, record: Record) -> None:
        """Keep a record, its tensors on the CPU."""
        layers = {n: rows.to("cpu") for n, rows in record.layers.items()}
        self._records.append(replace(record, layers=layers))
        self.entries.append(record.entry())
        self.index.push(self.entries[-1])

    def load(self, number: int, device: torch.device | str) -> Record:
        """The record with this number."""
        record = self._records[number - 1]
        return replace(record, layers={n: rows.to(device) for n, rows in record.layers.items()})

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)


class FolderJournal:
    """One file for each record, <number>-<kind>-<hash>.safetensors, each naming the hash of the one before.

    Args:
        folder: where they are.
        disk: how they are written.
        entries: what `scan` found.
    """

    def __init__(self, folder: Path, disk: Disk, entries: list[Entry]) -> None:
        self.index = Index(entries)
        self.entries = entries
        self._folder, self._disk = folder, disk

    def append(self, record: Record) -> None:
        """Write a record; it counts from the moment the name is on the disk."""
        if record.number != len(self.entries) + 1:
            raise StoreError(f"journal: the next record must have number {len(self.entries) + 1}, got {record.number}")
        parent = self.entries[-1].digest if self.entries else ""
        stem = f"{record.number:06d}-{record.kind}"
        path = put(self._disk, self._folder, stem, ".safetensors", records.encode(record, parent))
        self.entries.append(record.entry(path.stem[-32:]))
        self.index.push(self.entries[-1])
        self._disk.reached("record")

    def path(self, number: int) -> Path:
        """The file of a record."""
        entry = self.entries[number - 1]
        return self._folder / f"{number:06d}-{entry.kind}-{entry.digest}.safetensors"

    def load(self, number: int, device: torch.device | str) -> Record:
        """The record with this number.

        Raises:
            StoreError: its file is damaged.
        """
        path = self.path(number)
        if self.entries[number - 1].damaged or not intact(path):
            raise StoreError(f"{path}: is damaged; what it holds is needed for this and cannot be made anew")
        return records.load(path, device)[0]

    def header(self, number: int) -> Record:
        """The record without its tensors.

        Raises:
            StoreError: its file is damaged.
        """
        return records.load(self.path(number))[0]


def scan(folder: Path) -> tuple[list[Record | None], list[str], list[str]]:
    """Headers of all records in order (None where a file is damaged or missing), their hashes, and what is wrong."""
    by_number: dict[int, list[Path]] = {}
    wrong: list[str] = []
    for path in sorted(folder.iterdir()):
        stem = stem_of(path)
        if path.name.startswith("."):
            continue
        if stem is None or not stem[:6].isdigit():
            wrong.append(f"{path}: is no file of this folder")
            continue
        by_number.setdefault(int(stem[:6]), []).append(path)
    headers: list[Record | None] = []
    digests: list[str] = []
    for number in range(1, max(by_number, default=0) + 1):
        paths = by_number.get(number, [])
        header, digest = None, paths[-1].stem[-32:] if paths else ""
        for path in paths:
            if not intact(path):
                wrong.append(f"{path}: content and hash differ")
                continue
            found, parent = records.load(path)
            if number > 1 and digests[-1] and parent != digests[-1]:
                wrong.append(f"{path}: does not follow the record before it")
            elif header is not None:
                wrong.append(f"{path}: is a second record {number}")
            else:
                header, digest = found, path.stem[-32:]
        if not paths:
            wrong.append(f"{folder}: record {number} is missing")
        headers.append(header)
        digests.append(digest)
    return headers, digests, wrong


def damaged_entry(number: int, ids: tuple[str, ...], about: tuple[tuple[str, str, str], ...], digest: str) -> Entry:
    """An entry for a record whose file is no longer whole, out of what the ledger says."""
    return Entry(number, "batch", ids, (), about, digest, damaged=True)


def rows_on(rows: LayerRows, index: torch.Tensor) -> LayerRows:
    """Some of the rows."""
    parts = {name: getattr(rows, name) for name in ("keys", "residual", "target", "bare")}
    where = {name: value[index.to(value.device)] for name, value in parts.items() if value is not None}
    return LayerRows(**where)
