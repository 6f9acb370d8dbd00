"""Folders that are whole or not there: written aside, synced, renamed; and digests of what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from rlsedit_kernels.errors import CheckpointError

__all__ = [
    "DISK",
    "MANIFEST",
    "Disk",
    "aside_of",
    "digest_of",
    "folder_of",
    "leftovers",
    "manifest_bytes",
    "read_manifest",
    "steps_in",
    "verify",
]

MANIFEST = "manifest.json"
"""Step, extra, structure of the states, and size and digest of every other file of a checkpoint."""

PARTIAL = ".partial"
_STEP = re.compile(r"step-(\d{10,})")
_BLOCK = 1 << 22


class Disk:
    """What makes a checkpoint durable, and where it stands; a test puts one here that fails, or kills the process."""

    def reached(self, point: str) -> None:
        """Called with the name of what has just been done."""

    def write(self, path: Path, data: bytes) -> None:
        """A new file, on the medium when this returns."""
        with open(path, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def sync(self, folder: Path) -> None:
        """Return once the names in `folder` are on the medium."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def publish(self, aside: Path, final: Path) -> None:
        """Give a finished folder its name: the one moment at which a checkpoint begins to exist."""
        self.reached("complete")
        os.rename(aside, final)
        self.reached("renamed")
        self.sync(final.parent)

    def discard(self, folder: Path) -> None:
        """Remove a checkpoint: it loses its name first, so that no half of it is ever taken for a checkpoint."""
        if not folder.name.endswith(PARTIAL):
            gone = folder.with_name(f"{folder.name}.{os.getpid()}{PARTIAL}")
            os.rename(folder, gone)
            self.reached("unnamed")
            folder = gone
        shutil.rmtree(folder)


DISK = Disk()


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:010d}"


def aside_of(folder: Path, step: int, token: str) -> Path:
    """Where it is written before it is complete; the token is of this attempt alone."""
    return folder / f"step-{step:010d}.{token}{PARTIAL}"


def steps_in(folder: Path) -> list[int]:
    """Steps of which `folder` has a checkpoint, ascending."""
    if not folder.is_dir():
        return []
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def leftovers(folder: Path) -> list[Path]:
    """What killed saves have left in `folder`."""
    return [path for path in folder.glob(f"step-*{PARTIAL}") if path.is_dir()]


def digest_of(path: Path) -> str:
    """BLAKE2b of a file, 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def manifest_bytes(content: dict[str, Any]) -> bytes:
    """The manifest with its own digest."""
    text = json.dumps(content, sort_keys=True)
    return json.dumps({"digest": _digest(text), "content": content}, sort_keys=True, indent=1).encode()


def read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a checkpoint, and its digest.

    Raises:
        CheckpointError: it is missing, damaged or not a manifest.
    """
    path = folder / MANIFEST
    try:
        read = json.loads(path.read_bytes())
        content, digest = read["content"], read["digest"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {folder.name} is no checkpoint, or has lost files") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if _digest(json.dumps(content, sort_keys=True)) != digest:
        raise CheckpointError(f"{path} is damaged: its content does not have the digest that it states")
    return content, digest


def verify(folder: Path, files: dict[str, Any], part: int, parts: int) -> None:
    """Check that all files are there and no others, and the digests of every `parts`-th file from `part` on.

    Raises:
        CheckpointError: with the name of a file that is missing, foreign or damaged.
    """
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(set(files) - there):
        raise CheckpointError(f"{folder / name} is missing")
    for name in sorted(there - set(files)):
        raise CheckpointError(f"{folder / name} is foreign: this checkpoint has no such file")
    for index, name in enumerate(sorted(files)):
        path = folder / name
        if path.stat().st_size != files[name]["bytes"]:
            raise CheckpointError(f"{path} is damaged: {path.stat().st_size} bytes of {files[name]['bytes']}")
        if index % parts == part and digest_of(path) != files[name]["digest"]:
            raise CheckpointError(f"{path} is damaged: its content does not have the digest in {MANIFEST}")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
