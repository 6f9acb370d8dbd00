"""Where caches live, and how a folder or file is written whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "atomic_directory",
    "atomic_save_tensors",
    "atomic_write_text",
    "cache_dir",
    "check_cache",
    "check_spared",
    "check_writable",
    "naming",
    "naming_cache",
    "saving_tensors",
]

_CACHE = "; RLSEDIT_CACHE names another folder for the cache"


def cache_dir(*parts: str) -> Path:
    """The folder of this package's caches, with `parts` appended; it is not created.

    Returns:
        ``$RLSEDIT_CACHE`` if set, else ``$XDG_CACHE_HOME/rlsedit``, else ``~/.cache/rlsedit``.
    """
    explicit = os.environ.get("RLSEDIT_CACHE")
    if explicit:
        base = Path(explicit).expanduser()
    else:
        xdg = os.environ.get("XDG_CACHE_HOME")
        base = (Path(xdg) if xdg else Path.home() / ".cache") / "rlsedit"
    return base.joinpath(*parts)


def check_writable(
    what: str, path: str | os.PathLike[str], *, beside: bool = False, file: bool = False, hint: str = ""
) -> None:
    """Refuse a place where nothing can be written, before the work is done whose results go there; leaves no trace.

    Args:
        what: how a message calls it, such as "--out".
        path: a file or folder that is to be written, there or not.
        beside: whether a folder that is there is replaced, for which its parent has to be writable.
        file: whether a file is written, which cannot take the place of a folder.
        hint: end of the message.

    Raises:
        OSError: saying why.
    """
    target = Path(path).absolute()
    if file and target.is_dir():
        raise IsADirectoryError(f"{what}: {path} is a folder, needs a file")
    try:
        place = target if target.is_dir() and not beside else target.parent
        while not place.exists() and place != place.parent:
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise type(error)(f"{what}: cannot write to {path}: {error.strerror or error}{hint}") from None


def check_spared(what: str, path: str | os.PathLike[str], reads: Iterable[str | os.PathLike[str] | None]) -> None:
    """Refuse an output in the place of something that the command reads, or of a folder around it.

    Args:
        what: how a message calls it, such as "--out".
        path: a file or folder that is replaced if it is there.
        reads: files and folders that must stay; None is passed over.

    Raises:
        ValueError: naming what would be lost.
    """
    out = os.path.realpath(path)
    for read in reads:
        if read is None or not os.path.exists(read):
            continue
        for name in {os.path.abspath(read), os.path.realpath(read)}:  # a link and what it leads to
            if os.path.commonpath([out, name]) == out:
                told = "is" if name == out else "holds"
                raise ValueError(
                    f"{what}: {path} {told} {read}, which is read here and would be lost; needs another place"
                )


def check_cache(folder: str | os.PathLike[str]) -> None:
    """`check_writable` for a folder of the cache.

    Raises:
        OSError: naming the variable that puts the cache elsewhere.
    """
    check_writable("cache", folder, hint=_CACHE)


@contextmanager
def naming(where: str | os.PathLike[str]) -> Iterator[None]:
    """What fails while a file is written names the place: the system does so when a file is opened, and no more then.

    Raises:
        OSError: as it was, naming `where` if it named nothing.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), os.fspath(where)) from error


@contextmanager
def naming_cache(folder: str | os.PathLike[str]) -> Iterator[None]:
    """What fails while a file of the cache is written says how to put the cache elsewhere.

    Raises:
        OSError: as it was, with that at its end.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"cache: cannot write to {folder}: {error.strerror or error}{_CACHE}") from error


@contextmanager
def saving_tensors(where: str | os.PathLike[str]) -> Iterator[None]:
    """What safetensors raises where a disk is full or fails, an exception of its own, becomes the system's error.

    Raises:
        OSError: naming `where`.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise OSError(f"{where}: cannot be written: {error}") from error
        raise OSError(int(found[1]), os.strerror(int(found[1])), os.fspath(where)) from error


@contextmanager
def atomic_directory(target: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder beside `target` and renames it to `target` on success.

    Whatever fails inside the block, `target` is left as it was and the temporary folder is removed. A process
    that is killed leaves at most a hidden folder whose name starts with a dot; `target` never is half
    written.

    Args:
        target: the folder to make; its parents are created.
        replace: whether an existing non-empty `target` is replaced (moved aside first, removed last).
            Without it, the one that is there wins, as when two processes fill the same cache.

    Raises:
        OSError: if the folder cannot be written.
    """
    final = Path(os.path.realpath(target))  # behind a link, what it leads to
    final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    try:
        os.chmod(work, 0o777 & ~_umask())
        yield work
        _move_into_place(work, final, replace)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def atomic_write_text(target: str | os.PathLike[str], text: str) -> None:
    """Writes `text` (UTF-8) to a temporary file beside `target` and renames it over `target`."""
    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent)
    try:
        with naming(final), os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, final)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def atomic_save_tensors(
    target: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors and metadata as safetensors to a temporary file beside `target` and renames it over `target`."""
    from safetensors.torch import save_file

    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent)
    os.close(handle)
    try:
        content = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
        with saving_tensors(final):
            save_file(content, name, None if metadata is None else dict(metadata))
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, final)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _move_into_place(work: Path, final: Path, replace: bool) -> None:
    old: Path | None = None
    if final.is_dir() and any(final.iterdir()):
        if not replace:
            return
        old = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".old", dir=final.parent))
        os.rename(final, old / "previous")
    try:
        os.rename(work, final)
    except OSError:
        if old is not None:
            os.rename(old / "previous", final)
        elif not replace and final.is_dir():
            return
        raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
