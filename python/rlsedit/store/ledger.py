"""The ledger of edits: one SQLite file that people and programs may read while it is written.

The records are what counts; the ledger is their index, with what is planned or has failed besides. It is brought up to
date from them whenever a folder is opened, and made anew where it is damaged. A rollback journal serves: readers wait
for a commit (milliseconds), it works on any file system, and opening the file changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from ..facts import Fact
from .errors import StoreError
from .index import Index
from .records import Record

__all__ = ["STATES", "Edit", "Ledger", "now"]

logger = logging.getLogger(__name__)

STATES = ("planned", "applied", "removed", "failed")
_COLUMNS = "id, request, subject, state, batch, removed_by, time, reason"
_DAMAGED = (sqlite3.Error, UnicodeDecodeError)  # the second where a name of the schema is in a message
_OF_RECORDS = "number, kind, digest, time"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS edits (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL, request TEXT NOT NULL, subject TEXT NOT NULL, state TEXT NOT NULL,
    batch INTEGER, removed_by INTEGER, time TEXT NOT NULL, reason TEXT NOT NULL, digest TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS edits_id ON edits (id);
CREATE INDEX IF NOT EXISTS edits_batch ON edits (batch);
CREATE TABLE IF NOT EXISTS records (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, digest TEXT NOT NULL, time TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Edit:
    """One row: an edit that was asked for, and what became of it.

    Attributes:
        seq: order of the requests.
        fact: what was asked for.
        state: one of `STATES`.
        batch: number of the record that wrote it, None before.
        removed_by: number of the record that took it out, None while it is in.
        time: of the last change, UTC.
        reason: of a failure, or how it was taken out.
        whole: whether the row has the hash that it was written with.
    """

    seq: int
    fact: Fact
    state: str
    batch: int | None
    removed_by: int | None
    time: str
    reason: str
    whole: bool


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Ledger:
    """The SQLite file.

    Args:
        path: the file; made if it is not there, unless `write` is False. ":memory:" is none.
        write: False opens it for reading only, while another process may write.

    Raises:
        StoreError: it is no ledger, or damaged.
    """

    def __init__(self, path: Path | str, write: bool = True) -> None:
        self.path = path
        try:
            if write:
                self._db = sqlite3.connect(str(path), timeout=30, isolation_level=None, check_same_thread=False)
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            else:
                name = f"{Path(path).resolve().as_uri()}?mode=ro"
                self._db = sqlite3.connect(name, uri=True, timeout=30, isolation_level=None)
            self._check()
        except _DAMAGED as error:
            raise StoreError(f"{path}: the ledger cannot be read: {error}") from None

    def _check(self) -> None:
        with closing(self._db.execute("PRAGMA integrity_check")) as found:  # with the indices, by which rows are found
            problems = [row[0] for row in found]
        if problems != ["ok"]:
            raise sqlite3.DatabaseError(problems[0])
        self._db.execute(f"SELECT seq, {_COLUMNS}, digest FROM edits LIMIT 0").fetchone()
        self._db.execute(f"SELECT {_OF_RECORDS} FROM records LIMIT 0").fetchone()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @property
    def known(self) -> int:
        """Number of the last record that has been taken in."""
        return int(self._db.execute("SELECT coalesce(max(number), 0) FROM records").fetchone()[0])

    def digests(self) -> dict[int, str]:
        """Hashes of the records that have been taken in, by number; none where they cannot be read."""
        with suppress(*_DAMAGED):
            return dict(self._db.execute("SELECT number, digest FROM records"))
        return {}

    def damage(self, headers: Sequence[Record | None], digests: Sequence[str]) -> list[str]:
        """What is not as it was written, or not as the records have it, one line each; a ledger may be behind them.

        Args:
            headers, digests: of all records, as `journal.scan` gives them; a record that is missing here says nothing.
        """
        try:
            rows = self.edits()
            records = self._db.execute(f"SELECT {_OF_RECORDS} FROM records ORDER BY number").fetchall()
        except (StoreError, *_DAMAGED) as error:
            return [str(error) if isinstance(error, StoreError) else f"{self.path}: cannot be read: {error}"]
        found = [f"{self.path}: the row of edit {row.fact.id!r} and its hash differ" for row in rows if not row.whole]
        if [number for number, *_ in records] != list(range(1, len(records) + 1)):
            return [*found, f"{self.path}: its records are not numbered one by one"]
        entries = []
        for (number, kind, own, time), header, digest in zip(records, headers, digests, strict=False):
            if digest and own != digest:
                found.append(f"{self.path}: has another hash for record {number}")
            elif header is not None and (kind, time) != (header.kind, header.time):
                found.append(f"{self.path}: has another kind or time for record {number}")
            if header is not None:
                entries.append(header.entry(digest))
        if len(entries) == len(records) and not found:
            applied = {row.fact.id: row.batch for row in rows if row.state == "applied"}
            if applied != {name: place.number for name, place in Index(entries).live.items()}:
                found.append(f"{self.path}: its applied edits are not those of the records")
        return found

    def plan(self, facts: Sequence[Fact]) -> None:
        """Enter facts that are about to be written; planned or failed ones of the same ids are replaced."""
        with self._transaction():
            for fact in facts:
                self._db.execute("DELETE FROM edits WHERE id = ? AND state IN ('planned', 'failed')", (fact.id,))
                self._insert(fact, "planned", None, None, now(), "")

    def failed(self, facts: Sequence[Fact], reason: str) -> None:
        """Mark planned facts as failed."""
        with self._transaction():
            for fact in facts:
                self._change("id = ? AND state = 'planned'", (fact.id,), state="failed", reason=reason, time=now())

    def take(self, record: Record, digest: str, index: Index) -> None:
        """Take the next record in; `index` stands behind it."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", (record.number, record.kind, digest, record.time)
            )
            for fact in record.facts:
                self._db.execute("DELETE FROM edits WHERE id = ? AND state IN ('planned', 'failed')", (fact.id,))
                self._db.execute("DELETE FROM edits WHERE id = ? AND batch = ?", (fact.id, record.number))
                self._insert(fact, "applied", record.number, None, record.time, "")
            reason = "replaced" if record.kind == "batch" else "taken out"
            if record.kind in ("undo", "reset"):
                self._mirror(record, index)
                return
            for name in record.removed:
                self._change(
                    "id = ? AND state = 'applied' AND batch != ?", (name, record.number),
                    state="removed", removed_by=record.number, time=record.time, reason=reason,
                )  # fmt: skip

    def forget_from(self, number: int, reason: str) -> None:
        """Records from this number on are lost: their edits have failed, what they took out is in again."""
        with self._transaction():
            self._db.execute("DELETE FROM records WHERE number >= ?", (number,))
            lost = dict(state="failed", batch=None, removed_by=None, reason=reason, time=now())
            self._change("batch >= ?", (number,), **lost)
            self._change("removed_by >= ?", (number,), state="applied", removed_by=None, reason="", time=now())

    def edits(
        self, *, state: str | None = None, name: str | None = None, batch: int | None = None, text: str | None = None,
        limit: int | None = None,
    ) -> list[Edit]:  # fmt: skip
        """Rows in the order of the requests.

        Args:
            state: only those in this state.
            name: only those with this id.
            batch: only those of this record.
            text: only those whose request holds this text, whatever its case.
            limit: only the last so many.

        Raises:
            StoreError: a row cannot be read.
        """
        where, values = ["1"], []
        for clause, value in (("state = ?", state), ("id = ?", name), ("batch = ?", batch)):
            if value is not None:
                where.append(clause)
                values.append(value)
        if text is not None:
            self._db.create_function("holds", 2, _holds, deterministic=True)
            where.append("holds(request, ?)")
            values.append(text)
        query = f"SELECT seq, digest, {_COLUMNS} FROM edits WHERE {' AND '.join(where)} ORDER BY seq DESC"
        try:
            rows = self._db.execute(query + (f" LIMIT {limit:d}" if limit is not None else ""), values).fetchall()
            return [_edit(row) for row in reversed(rows)]
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise StoreError(f"{self.path}: the ledger cannot be read: {error}") from None

    def counts(self) -> dict[str, int]:
        """Number of edits in each state."""
        return dict(self._db.execute("SELECT state, count(*) FROM edits GROUP BY state"))

    def _mirror(self, record: Record, index: Index) -> None:
        """After an undo: what the index says is in is in."""
        rows = self._db.execute("SELECT seq, id, batch, state FROM edits WHERE batch IS NOT NULL").fetchall()
        for seq, name, batch, state in rows:
            place = index.live.get(name)
            inside = place is not None and place.number == batch
            if inside and state != "applied":
                self._change("seq = ?", (seq,), state="applied", removed_by=None, reason="", time=record.time)
            elif not inside and state == "applied":
                self._change(
                    "seq = ?", (seq,), state="removed", removed_by=record.number, reason="undone", time=record.time
                )

    def _insert(
        self, fact: Fact, state: str, batch: int | None, removed_by: int | None, time: str, reason: str
    ) -> None:
        request = json.dumps(fact.to_dict(), ensure_ascii=False)
        values = (fact.id, request, fact.subject, state, batch, removed_by, time, reason)
        self._db.execute(
            f"INSERT INTO edits ({_COLUMNS}, digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*values, _digest(values))
        )

    def _change(self, where: str, values: Iterable[object], **changes: object) -> None:
        names = [name.strip() for name in _COLUMNS.split(",")]
        for seq, *row in self._db.execute(f"SELECT seq, {_COLUMNS} FROM edits WHERE {where}", tuple(values)).fetchall():  # type: ignore[arg-type]
            new = tuple(changes.get(name, old) for name, old in zip(names, row, strict=True))
            assigned = ", ".join(f"{name} = ?" for name in names)
            self._db.execute(f"UPDATE edits SET {assigned}, digest = ? WHERE seq = ?", (*new, _digest(new), seq))

    def at_once(self) -> AbstractContextManager[None]:
        """What is entered inside goes to the disk together, or not at all: the disk is waited for once."""
        return self._transaction()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


class _Transaction:
    """BEGIN and COMMIT, or nothing inside of another one, which then has them."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db, self._outermost = db, not db.in_transaction

    def __enter__(self) -> None:
        if self._outermost:
            self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        if not self._outermost:
            return
        if kind is None:
            try:
                self._db.execute("COMMIT")
                return
            except sqlite3.Error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")


def _edit(row: tuple) -> Edit:  # type: ignore[type-arg]
    seq, digest, *values = row
    _id, request, _subject, state, batch, removed_by, time, reason = values
    fact = Fact(**json.loads(request))
    whole = digest == _digest(values) and isinstance(seq, int)
    return Edit(seq, fact, state, batch, removed_by, time, reason, whole)


def _holds(request: str, text: str) -> bool:
    """Whether a text of a request holds this one, by `casefold`: SQLite's `lower` knows ASCII alone."""
    left, wanted = [json.loads(request)], text.casefold()
    while left:
        value = left.pop()
        if isinstance(value, str):
            if wanted in value.casefold():
                return True
        elif value is not None:
            left += value.values() if isinstance(value, dict) else value
    return False


def _digest(values: Iterable[object]) -> str:
    text = json.dumps(list(values), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
