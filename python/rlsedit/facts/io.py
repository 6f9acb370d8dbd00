"""Files of facts: JSON lines or a JSON array, plain or gzipped, in our fields or those of a published data set."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from rlsedit.facts.fact import Fact
from rlsedit.facts.formats import fields_of
from rlsedit.facts.hub import cached_file
from rlsedit.facts.ids import has_text_id, numbered, text_id
from rlsedit.jsonlines import records
from rlsedit.paths import atomic_write_text

__all__ = ["fact_from_record", "facts_from_record", "load_facts", "save_facts"]

logger = logging.getLogger(__name__)

_FIELDS = frozenset(Fact.__dataclass_fields__)
_REQUIRED = ("prompt", "subject", "target_new")
_OF_LOG = "state"
"""What `rlsedit log --json` says of a request beside the fact."""


def load_facts(path: str | os.PathLike[str], on_error: Literal["raise", "skip"] = "raise") -> list[Fact]:
    """Reads facts from a file of JSON lines (or one JSON array, gzipped if its name ends in ``.gz``), or Parquet.

    A record has the fields of `Fact`, or those of CounterFact, MQuAKE-CF or zsRE (`facts/formats.py`). A missing id is
    made from the text (`facts/ids.py`), so that it is the same in every file and place; the second of two equal facts
    without ids gets "-2" at its end, the third "-3". A record of MQuAKE-CF holds one fact or several.

    Args:
        path: the file, UTF-8; or ``hf://datasets/OWNER/NAME/FILE``, a file that Hugging Face's cache holds.
        on_error: "raise" stops at the first bad record, "skip" leaves bad records out and logs each as a
            warning.

    Returns:
        The facts in the order of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a bad record, naming file, line and field; for a file that is no text, or one
            without facts.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'load_facts: on_error must be "raise" or "skip", got {on_error!r}')
    facts: list[Fact] = []
    seen: dict[str, str] = {}
    times: Counter[str] = Counter()
    skipped = 0
    for where, _, record in records(cached_file(path), "a file with one fact per line"):
        try:
            if isinstance(record, json.JSONDecodeError):
                raise ValueError(f"not valid JSON: {record.msg} at column {record.colno}")
            found: list[Fact] = []
            for fact, made in _read(record):
                if made:
                    time = 1 + times[fact.id] + sum(text_id(other) == fact.id for other in found)
                    while (fact := numbered(fact, time)).id in seen:  # given to another
                        time += 1
                elif fact.id in seen:
                    raise ValueError(f"id must be unique, got {fact.id!r} again (first at {seen[fact.id]})")
                found.append(fact)
        except (ValueError, TypeError) as error:
            if on_error == "raise":
                raise ValueError(f"{where}: {error}") from None
            skipped += 1
            logger.warning("%s: skipped: %s", where, error)
            continue
        seen.update((fact.id, where) for fact in found)
        times.update(text_id(fact) for fact in found if has_text_id(fact))
        facts += found
    if not facts:
        tail = f" ({skipped} bad records skipped)" if skipped else ""
        raise ValueError(f"{path}: no facts in this file{tail}")
    return facts


def fact_from_record(record: object) -> Fact:
    """Makes a `Fact` from one decoded JSON object that holds one.

    Raises:
        ValueError: if a field is missing, unknown or bad, the message names it; or for a record of several facts.
        TypeError: if a field has the wrong type.
    """
    found = facts_from_record(record)
    if len(found) > 1:
        raise ValueError(f"a record must hold one fact, got {len(found)}: use facts_from_record")
    return found[0]


def facts_from_record(record: object) -> list[Fact]:
    """The facts of one decoded JSON object, in our fields or those of a published data set; one or more.

    Where the record has no id the text gives it (`facts/ids.py`).

    Raises:
        ValueError: if a field is missing, unknown or bad; the message names the field.
        TypeError: if a field has the wrong type.
    """
    return [fact for fact, _ in _read(record)]


def _read(record: object) -> list[tuple[Fact, bool]]:
    """Facts, and whether the id of each was made here."""
    if not isinstance(record, dict):
        raise TypeError(f"a record must be a JSON object, got {type(record).__name__}")
    facts = []
    for fields in fields_of(record):
        made = fields.get("id") is None
        fact = _fact(fields)
        facts.append((numbered(fact) if made else fact, made))
    return facts


def _fact(fields: dict[str, Any]) -> Fact:
    for name in _REQUIRED:
        if name not in fields:
            raise ValueError(f"{name} is missing; the record has {', '.join(sorted(fields)) or 'no fields'}")
    fields.pop(_OF_LOG, None)
    unknown = sorted(set(fields) - _FIELDS)
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(_FIELDS))}")
    identity = fields.get("id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        fields["id"] = str(identity)
    elif identity is None:
        fields["id"] = "?"  # the text, which is known once the fields are checked, gives it
    for name in ("target_new", "target_true", "subject"):
        if isinstance(fields.get(name), str):
            fields[name] = fields[name].strip()
    if isinstance(fields.get("prompt"), str):
        fields["prompt"] = fields["prompt"].rstrip()
    for name in ("paraphrases", "neighbours", "generation"):  # the tokenising code adds the blank before the target
        if isinstance(fields.get(name), list):
            fields[name] = [item.rstrip() if isinstance(item, str) else item for item in fields[name]]
    return Fact(**fields)


def save_facts(facts: Iterable[Fact], path: str | os.PathLike[str]) -> None:
    """Writes facts as JSON lines that `load_facts` reads back equal; the file appears whole or not at all."""
    lines = (json.dumps(fact.to_dict(), ensure_ascii=False) for fact in facts)
    atomic_write_text(path, "".join(line + "\n" for line in lines))
