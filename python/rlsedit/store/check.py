"""Reads a folder of edits without changing it: what it holds, and everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import journal, modelfiles
from .errors import StoreError
from .files import DISK, intact
from .folder import store_of
from .index import Index
from .ledger import Ledger
from .records import Record
from .session import Session
from .snapshots import Snapshots

__all__ = ["problems", "reading"]


@contextmanager
def reading(path: Path) -> Iterator[tuple[Ledger, str]]:
    """The ledger of a folder for reading, also while another process writes, and a note where it had to be made anew.

    Raises:
        StoreError: the folder holds no edits.
    """
    store = store_of(path)
    if not store.is_dir():
        raise StoreError(f"{path}: holds no edits (no folder {store.name} in it)")
    file, note = store / "ledger.sqlite", ""
    try:
        ledger = Ledger(file, write=False)
        ledger.edits()
    except StoreError as error:
        note = f"{error}; shown from the records"
        ledger = Ledger(":memory:")  # nothing of it stays, so no disk is waited for
        for record, digest, index in _records(store):
            ledger.take(record, digest, index)
    try:
        yield ledger, note
    finally:
        ledger.close()


def problems(path: Path) -> list[str]:
    """Everything that is damaged, missing or in disagreement, one line each, naming the file.

    Raises:
        StoreError: the folder holds no edits.
    """
    store = store_of(path)
    if not store.is_dir():
        raise StoreError(f"{path}: holds no edits (no folder {store.name} in it)")
    found: list[str] = []
    try:
        session = Session.read(store)
        for name in session.base.values():
            if not intact(store / "base" / name):
                there = (store / "base" / name).exists()
                found.append(f"{store / 'base' / name}: {'content and hash differ' if there else 'is missing'}")
    except StoreError as error:
        found.append(str(error))
    of_records, of_ledger = _records_and_ledger(store)
    found += of_records
    found += Snapshots(store / "snapshots", DISK).wrong()
    found += of_ledger
    found += modelfiles.wrong(path)
    return found


def _records_and_ledger(store: Path) -> tuple[list[str], list[str]]:
    """What is wrong with the records, and with the ledger."""
    path = store / "ledger.sqlite"
    try:
        ledger = Ledger(path, write=False)
    except StoreError as error:
        return journal.scan(store / "records")[2], [str(error)]
    try:
        headers, digests, wrong = journal.scan(store / "records", ledger.digests())
        found = ledger.damage(headers, digests)
        if not found and ledger.known > len(headers):
            found.append(f"{path}: knows records up to {ledger.known}, the last on the disk is {len(headers)}")
    finally:
        ledger.close()
    return wrong, found


def _records(store: Path) -> Iterator[tuple[Record, str, Index]]:
    headers, digests, _ = journal.scan(store / "records")
    index = Index()
    for header, digest in zip(headers, digests, strict=True):
        if header is None:
            return
        index.push(header.entry(digest))
        yield header, digest, index
