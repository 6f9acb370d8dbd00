"""One writer for one folder: a lock of the operating system, which dies with its process, and who holds it."""

from __future__ import annotations

import json
import logging
import os
import socket
from datetime import datetime, timezone
from pathlib import Path

from .errors import FolderBusyError, StoreError

__all__ = ["Lock"]

logger = logging.getLogger(__name__)


class Lock:
    """An exclusive lock (flock) on a file that names its holder's pid and host.

    The lock ends with its process however that ends; what the file still says then is taken over and logged.

    Args:
        path: the file; made if it is not there.
        folder: how messages call what is locked.

    Raises:
        FolderBusyError: another process holds it.
        StoreError: the system has no such locks (Windows).
    """

    def __init__(self, path: Path, folder: Path) -> None:
        try:
            import fcntl
        except ImportError:
            raise StoreError(
                f"{folder}: a folder of edits needs locks (flock) and syncs that this system does not have; "
                "edit on Linux or macOS"
            ) from None
        self._pid = os.getpid()
        self._handle: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _holder(self._handle)
            os.close(self._handle)
            self._handle = None
            raise FolderBusyError(
                f"{folder}: is being written by process {holder.get('pid', '?')} on host {holder.get('host', '?')} "
                f"since {holder.get('since', '?')}; wait until it ends, or use another folder"
            ) from None
        former = _holder(self._handle)
        if former:
            logger.warning(
                "%s: process %s on host %s ended without closing it; taking over",
                folder, former.get("pid"), former.get("host"),
            )  # fmt: skip
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}))

    def close(self) -> None:
        """Give the lock back."""
        if self._handle is not None:
            self._write("")
            os.close(self._handle)
            self._handle = None

    def _write(self, text: str) -> None:
        assert self._handle is not None
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, text.encode(), 0)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None and self._pid == os.getpid():  # a fork does not own it
            self.close()


def _holder(handle: int) -> dict[str, object]:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
