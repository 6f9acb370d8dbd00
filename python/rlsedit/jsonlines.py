"""Files of records: JSON lines or one JSON array, plain or gzipped, or Parquet, with the place of every record."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["decoded", "read_file", "records"]


def decoded(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: no JSON, or an object that has a name twice, of which one value would be lost.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def records(path: Path, needs: str) -> Iterator[tuple[str, int, Any]]:
    """Yields (place, number, decoded record or the error of decoding it), numbers from 1; empty lines are passed over.

    Args:
        path: the file; an array if its first character is a bracket, Parquet if its name ends so (needs pyarrow).
        needs: what belongs there, for messages: "a file with one fact per line".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, a broken gzip file, no UTF-8, an array that is not valid JSON, or no Parquet file.
    """
    if path.suffix == ".parquet":
        yield from _parquet(path, needs)
        return
    text = read_file(path, needs)
    if text.lstrip().startswith("["):
        try:
            array = decoded(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise ValueError(f"{path}: not valid JSON: nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
        for number, record in enumerate(array, 1):
            yield f"{path}, record {number}", number, record
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(" \t\r"):  # the white space of JSON, not all that Python knows
            continue
        try:
            yield f"{path}:{number}", number, decoded(line)
        except json.JSONDecodeError as error:
            yield f"{path}:{number}", number, error
        except (RecursionError, ValueError) as error:  # too deep, a number of too many digits, a name twice
            yield f"{path}:{number}", number, json.JSONDecodeError(str(error), line, 0)


def _parquet(path: Path, needs: str) -> Iterator[tuple[str, int, Any]]:
    """The rows of a Parquet file, as data sets on Hugging Face's hub have them."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: a Parquet file needs the package pyarrow, which is not installed") from None
    if path.is_dir():
        raise ValueError(f"{path}: a folder, needs {needs}")
    number = 0
    try:
        with path.open("rb") as file:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, record {number}", number, record
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole Parquet file: {' '.join(str(error).split())}") from None


def read_file(path: Path, needs: str) -> str:
    """The text of a UTF-8 file, gzipped if its name ends in ``.gz``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, a broken gzip file, or no UTF-8.
    """
    if path.is_dir():
        raise ValueError(f"{path}: a folder, needs {needs}")
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file: {error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8: {error.reason} at byte {error.start}") from None
