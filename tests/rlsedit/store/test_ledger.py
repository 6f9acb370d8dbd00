"""The ledger by itself: what becomes of a row, and of a file that is not what it should be. No model is needed."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest

from rlsedit.facts import Fact
from rlsedit.store.errors import StoreError
from rlsedit.store.index import Index
from rlsedit.store.ledger import Ledger
from rlsedit.store.records import Record


def fact(name: str, subject: str = "France", new: str = "Rome") -> Fact:
    return Fact(name, "The capital of {} is", subject, new, relation="capital")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger(tmp_path / "ledger.sqlite")) as made:
        yield made


def follow(ledger: Ledger, *records: Record) -> Iterator[None]:
    """Records taken in one by one, as when they are written."""
    index = Index()
    for record in records:
        index.push(record.entry(digest(record)))
        ledger.take(record, digest(record), index)
        yield


def digest(record: Record) -> str:
    return f"digest {record.number}"


def damage(ledger: Ledger, *records: Record) -> list[str]:
    return ledger.damage(records, [digest(record) for record in records])


def batch(number: int, *names: str, removed: tuple[str, ...] = ()) -> Record:
    return Record(number, "batch", f"time {number}", tuple(map(fact, names)), removed)


def rows(ledger: Ledger) -> dict[str, tuple[str, int | None, int | None, str, str]]:
    return {r.fact.id: (r.state, r.batch, r.removed_by, r.time, r.reason) for r in ledger.edits()}


def test_an_undo_changes_the_rows_of_its_step_alone(ledger: Ledger) -> None:
    steps = [batch(1, "a", "b"), batch(2, "c", removed=("a",)), Record(3, "undo", "time 3")]
    taken = follow(ledger, *steps)
    list(islice(taken, 2))
    assert rows(ledger)["a"] == ("removed", 1, 2, "time 2", "replaced")
    next(taken)
    assert rows(ledger) == {
        "a": ("applied", 1, None, "time 3", ""),
        "b": ("applied", 1, None, "time 1", ""),
        "c": ("removed", 2, 3, "time 3", "undone"),
    }
    assert damage(ledger, *steps) == []


def test_records_that_are_lost_leave_their_edits_failed_and_what_they_took_out_in(ledger: Ledger) -> None:
    steps = [batch(1, "a", "b"), batch(2, "c", removed=("a",)), Record(3, "remove", "time 3", removed=("b",))]
    list(follow(ledger, *steps))
    ledger.forget_from(2, "lost")
    found = rows(ledger)
    assert found["a"][:3] == found["b"][:3] == ("applied", 1, None)
    assert found["c"][:3] == ("failed", None, None)
    assert [found[name][4] for name in "abc"] == ["", "", "lost"]
    assert ledger.known == 1
    assert damage(ledger, steps[0]) == []


def test_a_change_happens_whole_or_not_at_all(ledger: Ledger) -> None:
    ledger.plan([fact("a")])
    with pytest.raises(AttributeError):
        ledger.plan([fact("a", new="Lyon"), fact("b"), None])  # type: ignore[list-item]
    assert [edit.fact for edit in ledger.edits()] == [fact("a")]
    ledger.plan([fact("a", new="Lyon"), fact("b")])
    ledger.failed([fact("b")], "too long")
    assert [(e.fact.id, e.fact.target_new, e.state, e.reason) for e in ledger.edits()] == [
        ("a", "Lyon", "planned", ""),
        ("b", "Rome", "failed", "too long"),
    ]
    assert ledger.counts() == {"planned": 1, "failed": 1}


def test_rows_that_were_changed_by_others_are_found(ledger: Ledger) -> None:
    step = batch(1, "a", "b")
    list(follow(ledger, step))
    ledger._change("id = ?", ("a",), state="removed")  # with a hash that is right
    assert damage(ledger, step) == [f"{ledger.path}: its applied edits are not those of the records"]
    ledger._db.execute("UPDATE edits SET state = 'applied' WHERE id = 'a'")
    assert damage(ledger, step) == [f"{ledger.path}: the row of edit 'a' and its hash differ"]
    ledger._db.execute("UPDATE records SET number = 2")
    assert damage(ledger, step)[1:] == [f"{ledger.path}: its records are not numbered one by one"]


def test_another_hash_kind_or_time_of_a_record_is_found(ledger: Ledger) -> None:
    list(follow(ledger, batch(1, "a")))
    for column, what in (("digest", "hash for record 1"), ("kind", "kind or time"), ("time", "kind or time")):
        (before,) = ledger._db.execute(f"SELECT {column} FROM records").fetchone()
        ledger._db.execute(f"UPDATE records SET {column} = 'other'")
        (found,) = damage(ledger, batch(1, "a"))
        assert what in found
        ledger._db.execute(f"UPDATE records SET {column} = ?", (before,))
    assert damage(ledger, batch(1, "a")) == []


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("france", ["a", "c"]),
        ("FRANCE", ["a", "c"]),
        ("émile", ["b"]),
        ("ÉMILE", ["b"]),
        ('the "first"', ["c"]),
        ("Strasse", ["c"]),
        ("prompt", []),
        ("nowhere", []),
    ],
)
def test_requests_are_found_by_their_text_whatever_its_case(ledger: Ledger, text: str, ids: list[str]) -> None:
    """Letters beyond ASCII were found in their own case alone, and names of fields in every request."""
    ledger.plan([fact("a"), fact("b", "Émile"), Fact("c", 'The "first" {} is', "France", "straße")])
    assert [edit.fact.id for edit in ledger.edits(text=text)] == ids
    assert [edit.fact.id for edit in ledger.edits(text=text, limit=1)] == ids[-1:]


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("table", ["edits", "records"])
def test_a_table_of_another_shape_is_no_ledger(tmp_path: Path, table: str, write: bool) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"ALTER TABLE {table} DROP COLUMN digest")
        database.commit()
    with pytest.raises(StoreError, match="the ledger cannot be read: no such column"):
        Ledger(path, write=write)


def test_a_reader_makes_no_file_and_changes_none(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with pytest.raises(StoreError, match="unable to open"):
        Ledger(path, write=False)
    assert not path.exists()
    with closing(Ledger(path)) as writer:
        writer.plan([fact("a")])
        with closing(Ledger(path, write=False)) as reader, pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.plan([fact("b")])
        assert [edit.fact.id for edit in writer.edits()] == ["a"]
