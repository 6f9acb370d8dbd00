"""Files truncated and altered, disks that are full, and two writers: what is wrong is named, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from support.editors import differing, editor, everything, facts, resumed
from torch import Tensor

from rlsedit.store import modelfiles, records
from rlsedit.store.check import problems, reading
from rlsedit.store.errors import FolderBusyError, StoreError
from rlsedit.store.files import DISK, Disk, put
from rlsedit.store.folder import Folder

BATCHES = 5
EVERY = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    """A folder with five batches, two snapshots and a model, and everything behind each batch."""
    folder = tmp_path_factory.mktemp("made") / "out"
    one = editor(steps=2, contexts=0)
    one.save(folder, every=EVERY)
    states = [everything(one)]
    for i in range(BATCHES):
        one.edit(facts(2, 2 * i))
        states.append(everything(one))
    modelfiles.place(folder, BATCHES, one.model.save_pretrained)  # type: ignore[operator, arg-type]
    one.close()
    assert problems(folder) == []
    return folder, states


def damages(path: Path) -> Iterator[tuple[str, bytes]]:
    content = path.read_bytes()
    yield "truncated", content[: len(content) // 2]
    for share in (0.02, 0.5, 0.97):
        at = int(share * len(content))
        yield f"flipped at {at}", content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_every_file_truncated_and_flipped_is_found_and_named(
    made: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    """Each in turn: `problems` names it; a resume gives the bits of some step, or refuses and names it."""
    folder, states = made
    fewer = 0
    for name in files(folder):
        if name.name == "lock":
            continue  # says who writes; nothing is read from it
        for how, content in damages(folder / name):
            where = f"{name} {how}"
            copy = tmp_path / "copy"
            shutil.copytree(folder, copy)
            (copy / name).write_bytes(content)
            found = problems(copy)
            if name.suffix == ".sqlite" and not found:  # a byte that nobody reads
                assert rows(copy / name) == rows(folder / name), where
            else:
                assert any(str(copy / name) in line for line in found), (where, found)
            if name.parts[1:2] in (("session.json",), ("base",)):  # what cannot be made anew
                with pytest.raises(StoreError, match=re.escape(str(copy / name))):
                    resumed(copy, every=EVERY)
                shutil.rmtree(copy)
                continue
            one = resumed(copy, every=EVERY)
            assert one.folder is not None
            step = len(one.folder.journal.entries)
            assert differing(everything(one), states[step]) == [], where
            applied = {row.fact.id for row in one.folder.ledger.edits(state="applied")}
            assert applied == {f"f{i}" for i in range(2 * step)}, where
            if step < BATCHES:
                fewer += 1
                assert name.parent.name == "records", where
                assert int(name.name[:6]) == step + 1 > 4, (
                    where
                )  # behind the last snapshot; what is before is not needed
                assert {row.fact.id for row in one.folder.ledger.edits(state="failed")} == {
                    f"f{i}" for i in range(2 * step, 2 * BATCHES)
                }
                one.edit(facts(2 * (BATCHES - step), 2 * step), batch_size=2)
                assert differing(everything(one), states[BATCHES]) == [], where
            one.close()
            shutil.rmtree(copy)
    assert fewer == 4


def rows(ledger: Path) -> list[object]:
    """All that a ledger says, by rows and by what its indices find."""
    with contextlib.closing(sqlite3.connect(ledger)) as db:
        edits = db.execute("SELECT * FROM edits ORDER BY id, batch").fetchall()
        found = [
            db.execute(f"SELECT count(*) FROM edits WHERE {name} = ?", (row[column],)).fetchone()
            for row in edits
            for name, column in (("id", 1), ("batch", 5))
        ]
        return [[row[1:] for row in edits], found, db.execute("SELECT * FROM records ORDER BY number").fetchall()]


def test_every_byte_of_the_ledger(made: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path) -> None:
    """A flipped bit is found, or changes nothing that is read; an opened folder has the ledger of its records again."""
    folder, _ = made
    name = Path("rlsedit") / "ledger.sqlite"
    content, wanted = (folder / name).read_bytes(), rows(folder / name)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    used = [at for at, byte in enumerate(content) if byte]
    noticed = 0
    for at in used[:: max(1, len(used) // 200)]:
        (copy / name).write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        found = problems(copy)
        if not found:
            assert rows(copy / name) == wanted, at
            continue
        noticed += 1
        assert all(str(copy / name) in line for line in found), (at, found)
        with reading(copy) as (ledger, _):  # whatever is wrong, it can be shown
            ledger.edits()
        if noticed % 8 == 0:  # which takes longer
            Folder.open(copy).close()
            assert rows(copy / name) == wanted, at
            assert problems(copy) == []
            shutil.rmtree(copy / "rlsedit" / "damaged")
    assert noticed > 50


def test_a_ledger_is_made_anew_in_one_go(
    made: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk was waited for once a record, of which a folder may have ten thousand; to show them it is not at all."""
    copy, said = tmp_path / "copy", []
    shutil.copytree(made[0], copy)
    name = copy / "rlsedit" / "ledger.sqlite"
    wanted = rows(name)
    name.unlink()

    class Heard(sqlite3.Connection):
        def execute(self, text: str, *more: object) -> sqlite3.Cursor:
            said.append(text)
            return super().execute(text, *more)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **more: connect(*given, **more, factory=Heard))
    with reading(copy) as (ledger, note):
        assert len(ledger.edits()) == 2 * BATCHES
        assert "shown from the records" in note
    assert not name.exists()
    said.clear()
    Folder.open(copy).close()
    monkeypatch.undo()
    assert said.count("COMMIT") == 1
    assert rows(name) == wanted


def test_what_is_planned_outlives_a_damaged_row(made: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path) -> None:
    folder, _ = made
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    one = Folder.open(copy)
    one.plan(facts(2, 20))
    one.close()
    with contextlib.closing(sqlite3.connect(copy / "rlsedit" / "ledger.sqlite", isolation_level=None)) as db:
        db.execute("UPDATE edits SET state = 'removed' WHERE id = 'f3'")
    one = Folder.open(copy)
    assert one.ledger.counts() == {"applied": 2 * BATCHES, "planned": 2}
    one.close()


def test_a_damaged_record_before_a_snapshot_is_only_missed_by_removal(
    made: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, states = made
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    record = next((copy / "rlsedit" / "records").glob("000002-*"))
    record.write_bytes(record.read_bytes()[:-9])
    one = resumed(copy)
    assert differing(everything(one), states[BATCHES]) == []
    before = everything(one)
    with pytest.raises(StoreError, match=r"000002-batch-.*is damaged"):
        one.remove(["f2"])
    assert differing(everything(one), before) == []
    one.remove(["f0"])  # its own record is whole
    one.undo()
    assert differing(everything(one), before) == []


class Full(Disk):
    """A disk on which the n-th step and all after it fail."""

    def __init__(self) -> None:
        self.left = -1

    def _next(self) -> None:
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1

    def write(self, stream: BinaryIO, data: bytes) -> None:
        if self.left == 0:
            super().write(stream, data[: len(data) // 2])
        self._next()
        super().write(stream, data)

    def sync(self, stream: BinaryIO) -> None:
        self._next()
        super().sync(stream)

    def rename(self, old: Path, new: Path) -> None:
        self._next()
        super().rename(old, new)

    def sync_folder(self, folder: Path) -> None:
        self._next()
        super().sync_folder(folder)


@pytest.mark.parametrize("time", ["then", "now", "later"])  # hashes before that of the folder's own and behind it
def test_of_two_last_records_the_folder_takes_its_own_or_is_refused(
    made: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path, time: str
) -> None:
    """Of folders that were put together the first by its hash was taken; the ledger was then damaged and made anew."""
    folder, states = made
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (own,) = (copy / "rlsedit" / "records").glob("000005-*")
    record, parent = records.load(own, "cpu")
    other = put(DISK, own.parent, "000005-batch", ".safetensors", records.encode(replace(record, time=time), parent))
    assert problems(copy) == [f"{other}: is a second record 5"]
    one = resumed(copy)
    assert differing(everything(one), states[BATCHES]) == []
    one.close()
    (copy / "rlsedit" / "ledger.sqlite").unlink()
    with pytest.raises(StoreError, match=r"record 5 may be 000005-.* and 000005-.*, and nothing tells which: move all"):
        resumed(copy)
    assert own.exists()
    assert other.exists()
    other.unlink()
    resumed(copy).close()


def test_a_full_disk_at_every_write(tmp_path: Path) -> None:
    """The batch at hand is written whole or not at all; with room again the stream goes on to the same bits."""
    whole = editor(steps=2, contexts=0, layers=(2,))
    states = [everything(whole)]
    for i in range(3):
        whole.edit(facts(2, 2 * i))
        states.append(everything(whole))
    at, refused = 0, 0
    while True:
        folder, disk = tmp_path / str(at), Full()
        one = editor(steps=2, contexts=0, layers=(2,))
        one.save(folder, every=2, disk=disk)
        one.edit(facts(2))
        disk.left = at
        try:
            one.edit(facts(2, 2))  # a record, and a snapshot
            done = 2
        except OSError as error:
            done, refused = 1, refused + (error.errno == errno.ENOSPC)
        untouched, disk.left = disk.left > 0, -1
        assert differing(everything(one), states[done]) == [], at
        assert [row.state for row in one.folder.ledger.edits()][2:] == ["applied" if done == 2 else "failed"] * 2  # type: ignore[union-attr]
        if done == 1:
            one.edit(facts(2, 2))
        one.close()
        assert problems(folder) == [], at
        again = resumed(folder)
        again.edit(facts(2, 4))
        assert differing(everything(again), states[3]) == [], at
        again.close()
        if untouched:
            break
        at += 1
    assert refused >= 4
    assert at > refused + 6  # the snapshot's writes too: there the batch stands


def test_a_full_disk_while_the_folder_is_made(tmp_path: Path) -> None:
    one = editor(steps=2, contexts=0, layers=(2,))
    one.edit(facts(2))
    for at in range(100):
        disk = Full()
        disk.left = at
        try:
            one.save(tmp_path / "out", disk=disk)
        except OSError:
            if one.folder is None:
                assert list((tmp_path / "out").iterdir()) == [], at
                continue
            break  # the folder is there, the snapshot is not
        break
    disk.left = -1
    assert at > 8
    one.edit(facts(2, 2))
    expected = everything(one)
    one.close()
    assert differing(everything(resumed(tmp_path / "out")), expected) == []


def test_a_ledger_that_cannot_be_written_follows_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = editor(steps=2, contexts=0)
    one.save(tmp_path)

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("rlsedit.store.ledger.Ledger.take", full)
        one.edit(facts(2))
    assert [row.state for row in one.folder.ledger.edits()] == ["planned"] * 2  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        patch.setattr("rlsedit.store.ledger.Ledger.plan", full)
        with pytest.raises(StoreError, match="cannot be written: database or disk is full"):
            one.edit(facts(2, 2))
    expected = everything(one)
    one.close()
    again = resumed(tmp_path)
    assert [row.state for row in again.folder.ledger.edits()] == ["applied"] * 2  # type: ignore[union-attr]
    assert differing(everything(again), expected) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="a small tmpfs needs root")
def test_a_small_tmpfs(tmp_path: Path) -> None:
    import subprocess

    room = tmp_path / "room"
    room.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=420k", "tmpfs", str(room)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        one, whole = (editor(steps=2, contexts=0, layers=(2,)) for _ in range(2))
        one.save(room / "out", every=2)
        done, full = 0, False
        while not full:
            try:
                one.edit(facts(2, 2 * done))
                done += 1
            except (OSError, StoreError):
                full = True
            assert done < 500
        assert done > 0
        for i in range(done):
            whole.edit(facts(2, 2 * i))
        assert differing(everything(one), everything(whole)) == []
        one.close()
        subprocess.run(["mount", "-o", "remount,size=8m", str(room)], check=True)
        again = resumed(room / "out")
        assert differing(everything(again), everything(whole)) == []
        for e in (again, whole):
            e.edit(facts(2, 2 * done))
        assert differing(everything(again), everything(whole)) == []
        again.close()
        assert problems(room / "out") == []
    finally:
        subprocess.run(["umount", "-l", str(room)], check=False)


def _hold(folder: str, ready: object, stop: object) -> None:
    one = resumed(Path(folder))
    ready.set()  # type: ignore[attr-defined]
    stop.wait(60)  # type: ignore[attr-defined]
    os._exit(0 if one.folder is not None else 1)  # as a process that is killed: nothing is closed


def test_two_writers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = editor(steps=2, contexts=0)
    one.save(tmp_path)
    one.edit(facts(2))
    expected = everything(one)
    one.close()
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), ready, stop))
    other.start()
    try:
        assert ready.wait(120)
        before = {path: (tmp_path / path).read_bytes() for path in files(tmp_path) if path.suffix != ".sqlite-shm"}
        with pytest.raises(FolderBusyError, match=rf"written by process {other.pid} on host {os.uname().nodename}"):
            resumed(tmp_path)
        with reading(tmp_path) as (ledger, note):  # reading goes on
            assert note == ""
            assert [row.state for row in ledger.edits()] == ["applied"] * 2
        assert problems(tmp_path) == []
        after = {path: (tmp_path / path).read_bytes() for path in files(tmp_path) if path.suffix != ".sqlite-shm"}
        assert before == after
    finally:
        stop.set()
        other.join(60)
    again = resumed(tmp_path)
    assert f"process {other.pid}" in caplog.text
    assert differing(everything(again), expected) == []
    again.close()
    assert (tmp_path / "rlsedit" / "lock").read_bytes() == b""


def test_another_root_of_the_prior_repeats_from_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Eigenvectors come in any turn: on another machine a state kept in their coordinates would be another one."""
    from rlsedit.methods import priors

    one = editor("alphaedit", steps=2, contexts=0, null_threshold=0.6)
    one.save(tmp_path, every=1)
    for i in range(2):
        one.edit(facts(2, 2 * i))
    assert one._layers[1].solver.state.form == "whitened"  # type: ignore[index, union-attr]
    expected = everything(one)
    one.close()
    real = priors.null_basis

    def turned(moment: Tensor, threshold: float) -> Tensor:
        return real(moment, threshold).flip(1)

    monkeypatch.setattr(priors, "null_basis", turned)
    again = resumed(tmp_path)
    assert "taken on another machine" in caplog.text
    for name, value in everything(again).items():
        if name.startswith(("model", "master")):
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
