"""Files of records by themselves: what is read of them, and what `scan` says of a folder. No model is needed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlsedit.facts import Fact
from rlsedit.store import tensors
from rlsedit.store.errors import StoreError
from rlsedit.store.files import DISK, put
from rlsedit.store.journal import FolderJournal, MemoryJournal, scan
from rlsedit.store.records import LayerRows, Record, encode, load


def record(number: int, name: str = "") -> Record:
    rows = LayerRows(keys=torch.full((1, 3), float(number)), target=torch.ones(1, 2))
    fact = Fact(name or f"fact {number}", "The capital of {} is", "France", "Rome")
    return Record(
        number, "batch", f"time {number}", (fact,), owners=(0,), noise=0.5, layers={2: rows}, sums={2: "sum"},
        sizes={2: 1.5}, report={"loss": 0.25},
    )  # fmt: skip


def written(folder: Path, *records: Record) -> FolderJournal:
    folder.mkdir()
    journal = FolderJournal(folder, DISK, [])
    for one in records:
        journal.append(one)
    return journal


def found(folder: Path) -> tuple[list[int | None], list[str]]:
    """Numbers of the records that can be read, and what is wrong, without the folder."""
    headers, _, wrong = scan(folder)
    return [None if header is None else header.number for header in headers], [
        line.replace(f"{folder}/", "").replace(f"{folder}", "folder") for line in wrong
    ]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    journal = written(tmp_path / "records", record(1), record(2))
    for one in (journal, memory := MemoryJournal()):
        if one is memory:
            memory.append(record(1))
            memory.append(record(2))
        read = one.load(2, "cpu")
        assert replace(read, layers={}) == replace(record(2), layers={})
        assert torch.equal(read.layers[2].keys, record(2).layers[2].keys)
        assert torch.equal(read.layers[2].target, record(2).layers[2].target)
        assert read.layers[2].residual is None
    assert journal.header(2) == replace(record(2), layers={})
    headers, digests, wrong = scan(tmp_path / "records")
    assert headers == [journal.header(1), journal.header(2)]
    assert digests == [entry.digest for entry in journal.entries]
    assert wrong == []


def test_records_have_their_numbers(tmp_path: Path) -> None:
    journal = written(tmp_path / "records", record(1))
    with pytest.raises(StoreError, match="the next record must have number 2, got 3"):
        journal.append(record(3))
    assert len(list((tmp_path / "records").iterdir())) == len(journal.entries) == 1


def test_what_is_missing_foreign_or_damaged_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    journal = written(folder, record(1), record(2), record(3))
    (folder / ".hidden").touch()
    assert found(folder) == ([1, 2, 3], [])
    (folder / "notes.txt").touch()
    assert found(folder) == ([1, 2, 3], ["notes.txt: is no file of this folder"])
    (folder / "notes.txt").unlink()
    second = journal.path(2)
    kept = second.read_bytes()
    second.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert found(folder) == ([1, None, 3], [f"{second.name}: content and hash differ"])
    with pytest.raises(StoreError, match="is damaged; what it holds is needed"):
        journal.load(2, "cpu")
    second.unlink()
    assert found(folder) == ([1, None, 3], ["folder: record 2 is missing"])


def test_a_record_of_another_stream_is_not_taken(tmp_path: Path) -> None:
    folder, other = tmp_path / "records", tmp_path / "other"
    journal = written(folder, record(1), record(2), record(3))
    foreign = written(other, record(1), record(2, "another"), record(3))
    journal.path(2).unlink()
    shutil.copy(foreign.path(2), folder)
    assert found(folder) == ([1, 2, None], [f"{journal.path(3).name}: does not follow the record before it"])


@pytest.mark.parametrize("name", [f"another {i}" for i in range(4)])  # their hashes stand before that of ours or behind
def test_a_second_record_of_a_number_is_named_and_a_damaged_one_hides_no_other(tmp_path: Path, name: str) -> None:
    """The first by its hash was taken, and the record behind the other one then followed none."""
    folder, other = tmp_path / "records", tmp_path / "other"
    journal = written(folder, record(1), record(2), record(3))
    foreign = written(other, record(1), record(2, name))
    copy = Path(shutil.copy(foreign.path(2), folder))
    assert found(folder) == ([1, 2, 3], [f"{copy.name}: is a second record 2"])
    copy.write_bytes(b"damaged")
    assert found(folder) == ([1, 2, 3], [f"{copy.name}: content and hash differ"])
    assert scan(folder)[1] == [entry.digest for entry in journal.entries]


@pytest.mark.parametrize("name", [f"another {i}" for i in range(4)])
def test_of_two_last_records_that_counts_which_the_ledger_has(tmp_path: Path, name: str) -> None:
    """The first by its hash was taken: of folders that were put together it could be that of the other one."""
    folder = tmp_path / "records"
    journal = written(folder, record(1), record(2))
    foreign = written(tmp_path / "other", record(1), record(2, name))
    shutil.copy(foreign.path(2), folder)
    for mine, its in ((journal, foreign), (foreign, journal)):
        headers, digests, wrong = scan(folder, {1: mine.entries[0].digest, 2: mine.entries[1].digest})
        assert headers == [mine.header(1), mine.header(2)]
        assert digests == [entry.digest for entry in mine.entries]
        assert wrong == [f"{folder / its.path(2).name}: is a second record 2"]


def test_of_two_last_records_none_is_taken_where_nothing_tells(tmp_path: Path) -> None:
    folder, told = tmp_path / "records", []
    journal = written(folder, record(1), record(2))
    foreign = written(tmp_path / "other", record(1), record(2, "another"))
    shutil.copy(foreign.path(2), folder)
    first, last = sorted([journal.path(2).name, foreign.path(2).name])
    message = f"{folder}: record 2 may be {first} and {last}, and nothing tells which: move all but one of them away"
    for known in ({}, {1: journal.entries[0].digest, 2: "0" * 32}):
        headers, _, wrong = scan(folder, known, told.append)
        assert headers == [journal.header(1), None]
        assert wrong == [message] == [told.pop()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format must be 1, got 2"),
        ({"kind": "other"}, "format must be 1"),
        ({"parent": None}, "is no record of edits: KeyError"),
        ({"facts": None}, "is no record of edits: KeyError"),
    ],
)
def test_a_whole_file_of_another_kind_is_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    path = put(DISK, tmp_path, "000001-batch", ".safetensors", encode(record(1), ""))
    content = {**tensors.read_metadata(path), **change}
    content = {name: value for name, value in content.items() if value is not None}
    monkeypatch.setattr("rlsedit.store.tensors.read_metadata", lambda path: content)
    with pytest.raises(StoreError, match=message):
        load(path)
