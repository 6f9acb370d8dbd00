"""Where a stream comes from: files that are rotated while they are followed, and sources that cannot be read."""

from __future__ import annotations

import errno
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import edit, resume
from support.editors import editor, facts

from rlsedit.cli import main, serving
from rlsedit.facts import save_facts

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def followed(tmp_path: Path) -> Iterator[tuple[Path, queue.Queue[Any], list[Exception]]]:
    """A file that is followed, and the lines that were read of it."""
    file, lines, stop = tmp_path / "log", queue.Queue[Any](), threading.Event()
    file.write_bytes(b"one\ntwo\n")
    wrong: list[Exception] = []
    reader = threading.Thread(target=serving._read, args=(serving._opened(file), file, True, lines, stop, wrong))
    reader.start()
    assert [lines.get(timeout=10) for _ in range(2)] == [(1, b"one"), (2, b"two")]
    yield file, lines, wrong
    stop.set()
    reader.join()
    assert not wrong


def test_another_file_of_the_name(followed: tuple[Path, queue.Queue[Any], list[Exception]]) -> None:
    """The last lines of the former file come first, one without an end too; the name may be free for a while."""
    file, lines, _ = followed
    with open(file, "ab") as former:
        former.write(b"thr")
        former.flush()
        file.rename(file.with_suffix(".1"))
        time.sleep(3 * serving._POLL)
        former.write(b"ee\nfour")
        former.flush()
        assert lines.get(timeout=10) == (3, b"three")
    (file.with_suffix(".new")).write_bytes(b"five\n")
    file.with_suffix(".new").rename(file)
    assert [lines.get(timeout=10) for _ in range(2)] == [(4, b"four"), (1, b"five")]
    with open(file, "ab") as stream:
        stream.write(b"six\n")
    assert lines.get(timeout=10) == (2, b"six")


def test_a_file_that_is_cut_short(followed: tuple[Path, queue.Queue[Any], list[Exception]]) -> None:
    file, lines, _ = followed
    os.truncate(file, 0)
    time.sleep(3 * serving._POLL)
    file.write_bytes(b"a\n")
    assert lines.get(timeout=10) == (1, b"a")
    with pytest.raises(queue.Empty):
        lines.get(timeout=3 * serving._POLL)


def test_a_source_that_cannot_be_read_ends_the_stream_with_its_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no end of the facts."""

    class Failing:
        def readline(self, _: int) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "stdin")

    save_facts(facts(2), tmp_path / "two.jsonl")
    assert main(edit(root, tmp_path / "two.jsonl", tmp_path / "out")) == 0
    again = resume(root / "llama", "-", tmp_path / "out")
    monkeypatch.setattr(serving, "_opened", lambda _: Failing())
    assert main(again) == 2
    assert "stdin: Input/output error" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("RLSEDIT_CACHE", str(root / "cache"))
    monkeypatch.setattr("sys.stdin", None)
    assert main(again) == 2
    assert "--facts: standard input is closed" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_failing_disk_is_not_the_fault_of_a_fact(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = editor()
    one.save(tmp_path / "out")
    assert one.folder is not None

    def failing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(one.folder, "append", failing)
        with pytest.raises(OSError, match=os.strerror(number)):
            serving._write(one, facts(2), "keep-both")
    assert not capsys.readouterr().out
    serving._write(one, facts(2), "keep-both")
    assert capsys.readouterr().out.count('"applied"') == 2
    one.close()
