"""The edited model as a Hugging Face folder around its edits, put in place so that a mixture of two never loads.

New files are written beside and synced; `model.json` then lists them with their hashes. From there on they are moved in
whatever happens: config.json goes first and comes back last, so that a folder caught in between does not load, and
`mend` completes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import StoreError
from .files import DISK, Disk, digest_of, put_plain
from .folder import store_of

__all__ = ["behind", "mend", "place", "unfinished", "wrong"]

logger = logging.getLogger(__name__)

_LIST = "model.json"
_WORK = ".model.partial"
_LAST = "config.json"


def place(path: Path, number: int, write: Callable[[Path], None], disk: Disk = DISK) -> None:
    """Put a model into the output folder.

    Args:
        path: the output folder, which holds edits.
        number: of the record that the model stands behind.
        write: writes all files into the folder it is given.
        disk: how files are moved.

    Raises:
        OSError: they cannot be written; the model that is there stays.
    """
    mend(path, disk)
    work = path / _WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        write(work)
        files = {}
        for file in sorted(part for part in work.rglob("*") if part.is_file()):
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
            files[str(file.relative_to(work))] = digest_of(file)
        disk.sync_folder(work)
        former = _read(path)
        stale = [] if former is None else sorted(set(former["files"]) - set(files))
        content = {"number": number, "files": files, "stale": stale}
        text = json.dumps({"digest": _digest(content), "content": content}, indent=1)
        put_plain(disk, store_of(path) / _LIST, text.encode())
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    disk.reached("model written")
    _move(path, content, disk)


def mend(path: Path, disk: Disk = DISK) -> None:
    """Complete a move that was cut short, or clear what was not complete."""
    work = path / _WORK
    if not work.is_dir():
        return
    content = _read(path)
    there = [] if content is None else [name for name in content["files"] if (work / name).is_file()]
    if content is not None and there and all(digest_of(work / name) == content["files"][name] for name in there):
        others = set(content["files"]) - set(there)
        if all((path / name).is_file() and digest_of(path / name) == content["files"][name] for name in others):
            _move(path, content, disk)
            return
    shutil.rmtree(work, ignore_errors=True)


def behind(path: Path) -> int | None:
    """Number of the record that the model in the folder stands behind; None where there is no whole model."""
    content = _read(path)
    if content is None or (path / _WORK).is_dir() or not (path / _LAST).is_file():
        return None
    return int(content["number"])


def unfinished(path: Path) -> str:
    """What to say of a folder that holds edits and no model, since no run into it has come to its end; else nothing."""
    if not store_of(path).is_dir() or (path / _LAST).is_file():
        return ""
    return (
        f"{path}: no model in the folder yet: `rlsedit edit MODEL --facts FILE --out {path} --resume` puts it there, "
        "MODEL being the one that was edited"
    )


def wrong(path: Path) -> list[str]:
    """What is damaged or missing, one line for each file."""
    try:
        content = _read(path, strict=True)
    except StoreError as error:
        return [str(error)]
    if content is None:
        return []
    found = []
    for name, digest in content["files"].items():
        file = path / name
        if not file.is_file():
            found.append(f"{file}: is missing")
        elif digest_of(file) != digest:
            found.append(f"{file}: content and hash differ")
    return found


def _move(path: Path, content: dict[str, Any], disk: Disk) -> None:
    work = path / _WORK
    names = [name for name in content["files"] if (work / name).is_file()]
    if names != [_LAST]:
        disk.remove(path / _LAST)
        disk.sync_folder(path)
    for name in content["stale"]:
        disk.remove(path / name)
    for name in sorted(names, key=lambda name: name == _LAST):
        if name == _LAST:
            disk.sync_folder(path)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        disk.rename(work / name, path / name)
        disk.reached("model file")
    disk.sync_folder(path)
    shutil.rmtree(work, ignore_errors=True)


def _read(path: Path, strict: bool = False) -> dict[str, Any] | None:
    """What model.json lists; None where there is none, or it is damaged and `strict` is False."""
    file = store_of(path) / _LIST
    try:
        found = json.loads(file.read_bytes())
        content = found["content"]
        if found["digest"] == _digest(content) and isinstance(content["files"], dict):
            return {"number": int(content["number"]), "files": content["files"], "stale": list(content["stale"])}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        pass
    message = f"{file}: content and hash differ"
    if strict:
        raise StoreError(message)
    logger.warning("%s; the model is written anew", message)
    return None


def _digest(content: object) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
