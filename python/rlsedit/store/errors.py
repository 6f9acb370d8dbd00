"""What can be wrong with a folder of edits."""

from __future__ import annotations

__all__ = ["FolderBusyError", "StoreError"]


class StoreError(ValueError):
    """A folder that is damaged, incomplete or of another model; the message names the file and says what to do."""


class FolderBusyError(StoreError):
    """Another process writes to the folder; the message names its pid and host."""
