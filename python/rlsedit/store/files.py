"""Files that survive: written beside, synced, renamed, with the hash of their content in the name.

`Disk` is the one place where this package touches the disk, so that a test can fill it up or kill the process at any
step. A file NAME-<hash><suffix> proves by itself that it is whole: `intact` reads it and compares.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..paths import naming

__all__ = ["DISK", "Disk", "clear_partial", "digest_of", "intact", "put", "put_plain", "stem_of", "uninterrupted"]

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
_NAMED = re.compile(r"(?P<stem>.+)-(?P<digest>[0-9a-f]{32})(?P<suffix>\.[a-z]+)")
_BLOCK = 1 << 22


class Disk:
    """Writes, syncs and renames; a subclass may fail at any of it."""

    def write(self, stream: BinaryIO, data: bytes) -> None:
        """Append `data`."""
        stream.write(data)

    def sync(self, stream: BinaryIO) -> None:
        """Return once the content is on the medium."""
        stream.flush()
        os.fsync(stream.fileno())

    def rename(self, old: Path, new: Path) -> None:
        """Atomic; replaces `new`."""
        os.replace(old, new)

    def sync_folder(self, folder: Path) -> None:
        """Return once names in `folder` are on the medium."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, path: Path) -> None:
        """Remove a file if it is there."""
        path.unlink(missing_ok=True)

    def reached(self, point: str) -> None:
        """Called between the steps of a commit with the name of what has just become durable."""


DISK = Disk()


def put(disk: Disk, folder: Path, stem: str, suffix: str, blocks: Iterable[bytes]) -> Path:
    """Write blocks into `folder` as <stem>-<hash><suffix>, durable when this returns, or not there at all.

    Raises:
        OSError: it could not be written; nothing of it is left.
    """
    work, digest = folder / f".{stem}{suffix}{PARTIAL}", hashlib.blake2b(digest_size=16)
    final: Path | None = None
    try:
        with naming(folder), open(work, "wb") as stream:
            for block in blocks:
                digest.update(block)
                disk.write(stream, block)
            disk.sync(stream)
        final = folder / f"{stem}-{digest.hexdigest()}{suffix}"
        disk.rename(work, final)
        disk.sync_folder(folder)
    except BaseException:
        for path in (work, final):
            if path is not None:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
        raise
    return final


def put_plain(disk: Disk, path: Path, data: bytes) -> None:
    """Write a file under its own name, replacing what is there; whole or not at all."""
    work = path.parent / f".{path.name}{PARTIAL}"
    try:
        with naming(path), open(work, "wb") as stream:
            disk.write(stream, data)
            disk.sync(stream)
        disk.rename(work, path)
        disk.sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            work.unlink(missing_ok=True)
        raise


def digest_of(path: Path) -> str:
    """Hash (BLAKE2b, 32 hex digits) of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def intact(path: Path) -> bool:
    """Whether a file is there and its content has the hash that stands in its name."""
    match = _NAMED.fullmatch(path.name)
    try:
        return match is not None and digest_of(path) == match["digest"]
    except OSError:
        return False


def stem_of(path: Path) -> str | None:
    """The name without hash and suffix; None for a name of another form."""
    match = _NAMED.fullmatch(path.name)
    return None if match is None else match["stem"]


def clear_partial(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for path in folder.glob(f".*{PARTIAL}"):
        if path.is_file():
            with suppress(OSError):
                path.unlink()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is done: what is on the disk and what is in memory change together.

    Their handlers are put off; blocking the signals is not enough: the system hands one that the main thread blocks to
    another thread, of which torch has some, and Python runs its handler in the main thread all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _put_off(signal.SIGINT), _put_off(signal.SIGTERM):
        yield


@contextmanager
def _put_off(kind: signal.Signals) -> Iterator[None]:
    """What has come by the end of the block is sent again there."""
    handler = signal.getsignal(kind)
    come: list[int] = []
    if handler is None or handler is signal.SIG_IGN:  # None: it is not one of Python's
        yield
        return
    try:
        signal.signal(kind, lambda *_: come.append(kind))
        yield
    finally:
        signal.signal(kind, handler)
        if come:
            signal.raise_signal(kind)
