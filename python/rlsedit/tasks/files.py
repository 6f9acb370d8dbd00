"""Files of records: JSON lines or a JSON array, plain or gzipped, with the fields a task needs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rlsedit.jsonlines import records

__all__ = ["read_records"]

logger = logging.getLogger(__name__)

Check = Callable[[dict[str, Any]], dict[str, Any]]
"""Takes a decoded record and gives the fields a task needs; raises ValueError naming the field."""


def read_records(path: Path, check: Check, on_error: Literal["raise", "skip"] = "raise") -> list[dict[str, Any]]:
    """Reads the records of a file.

    Args:
        path: UTF-8 JSON lines or one JSON array, gzipped if the name ends in ``.gz``.
        check: makes of a record what the task needs.
        on_error: "raise" stops at the first bad record, "skip" leaves bad ones out with a warning for each.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a bad record, naming file, line and field; no text; no records.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'read_records: on_error must be "raise" or "skip", got {on_error!r}')
    found, skipped = [], 0
    for where, _number, record in records(path, "a file of records"):
        try:
            if isinstance(record, json.JSONDecodeError):
                raise ValueError(f"not valid JSON: {record.msg} at column {record.colno}")
            if not isinstance(record, dict):
                raise ValueError(f"a record must be a JSON object, got {type(record).__name__}")
            found.append(check(record))
        except ValueError as error:
            if on_error == "raise":
                raise ValueError(f"{where}: {error}") from None
            skipped += 1
            logger.warning("%s: skipped: %s", where, error)
    if not found:
        tail = f" ({skipped} bad ones skipped)" if skipped else ""
        raise ValueError(f"{path}: no records in this file{tail}")
    return found


def text_field(record: dict[str, Any], name: str, *, empty: bool = False) -> str:
    """A field that must be a text; not an empty one unless `empty`."""
    value = _field(record, name)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"{name} must be a {'' if empty else 'non-empty '}text, got {_short(value)}")
    return value


def texts_field(record: dict[str, Any], name: str, *, least: int = 1) -> list[str]:
    """A field that must be a list of at least `least` non-empty texts."""
    value = _field(record, name)
    if not isinstance(value, list) or len(value) < least or not all(isinstance(v, str) and v.strip() for v in value):
        raise ValueError(f"{name} must be a list of at least {least} non-empty texts, got {_short(value)}")
    return value


def choice_field(record: dict[str, Any], name: str, choices: dict[Any, int]) -> int:
    """A field that must be one of the keys of `choices`; its value there."""
    value = _field(record, name)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {_short(value)}")
    return choices[value]


def _field(record: dict[str, Any], name: str) -> Any:
    if name not in record:
        raise ValueError(f"{name} is missing; the record has {', '.join(sorted(record)) or 'no fields'}")
    return record[name]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
