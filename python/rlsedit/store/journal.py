"""The steps of a stream in the order written, in memory or as one file each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class _File:
    """A file in the place of a record; no header where it is damaged."""

    path: Path
    header: Record | None = None
    parent: str = ""

    @property
    def digest(self) -> str:
        return self.path.stem[-32:]


def scan(
    folder: Path, known: Mapping[int, str] | None = None, unclear: Callable[[str], None] | None = None
) -> tuple[list[Record | None], list[str], list[str]]:
    """Headers of all records in order (None where a file is damaged or missing), their hashes, and what is wrong.

    Of several whole files with one number that follow the record before it, as where two folders were put together,
    that counts which the ledger has; where it has none of them, the one that the record behind it names.

    Args:
        folder: of the records.
        known: hashes that the ledger has, by number.
        unclear: called with what is wrong where neither tells; the record is then taken for missing.
    """
    read, wrong = _files(folder)
    headers: list[Record | None] = []
    digests: list[str] = []
    for number in range(1, max(read, default=0) + 1):
        files, before = read.get(number, []), digests[-1] if digests else ""
        wrong += [f"{file.path}: content and hash differ" for file in files if file.header is None]
        whole = [file for file in files if file.header is not None]
        following = [file for file in whole if not before or file.parent == before]
        wrong += [f"{f.path}: does not follow the record before it" for f in whole if f not in following]
        named = {file.parent for file in read.get(number + 1, []) if file.header is not None}
        taken = _taken(following, (known or {}).get(number), named)
        if len(following) > 1 and taken is None:
            names = " and ".join(file.path.name for file in following)
            told = f"{folder}: record {number} may be {names}, and nothing tells which: move all but one of them away"
            wrong.append(told)
            if unclear is not None:
                unclear(told)
        elif taken is not None:
            wrong += [f"{file.path}: is a second record {number}" for file in following if file is not taken]
        if not files:
            wrong.append(f"{folder}: record {number} is missing")
        headers.append(None if taken is None else taken.header)
        digests.append(taken.digest if taken is not None else files[-1].digest if files and not following else "")
    return headers, digests, wrong


def _files(folder: Path) -> tuple[dict[int, list[_File]], list[str]]:
    """What is there by number, in the order of names, and what is no record."""
    found: dict[int, list[_File]] = {}
    wrong: list[str] = []
    for path in sorted(folder.iterdir()):
        stem = stem_of(path)
        if path.name.startswith("."):
            continue
        if stem is None or not stem[:6].isdigit():
            wrong.append(f"{path}: is no file of this folder")
            continue
        found.setdefault(int(stem[:6]), []).append(_File(path, *records.load(path)) if intact(path) else _File(path))
    return found, wrong


def _taken(following: Sequence[_File], known: str | None, named: Collection[str]) -> _File | None:
    """The one that counts of the files that follow; None where nothing tells."""
    if len(following) < 2:
        return following[0] if following else None
    for told in ({known}, named):
        if len(fitting := [file for file in following if file.digest in told]) == 1:
            return fitting[0]
    return None


def damaged_entry(number: int, ids: tuple[str, ...], about: tuple[tuple[str, str, str], ...], digest: str) -> Entry:
    """An entry for a record whose file is no longer whole, out of what the ledger says."""
    return Entry(number, "batch", ids, (), about, digest, damaged=True)


def rows_on(rows: LayerRows, index: torch.Tensor) -> LayerRows:
    """Some of the rows."""
    parts = {name: getattr(rows, name) for name in ("keys", "residual", "target", "bare")}
    where = {name: value[index.to(value.device)] for name, value in parts.items() if value is not None}
    return LayerRows(**where)
