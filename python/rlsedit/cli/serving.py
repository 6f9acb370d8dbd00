"""A stream of facts from standard input or a growing file: batches of what has arrived, an answer for each line."""

from __future__ import annotations

import errno
import json
import os
import queue
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from rlsedit.editor import Editor
    from rlsedit.facts import Fact
    from rlsedit.store.conflicts import OnConflict

__all__ = ["serve"]

_POLL = 0.1  # seconds
_LONGEST = 1 << 20  # bytes of a line
_WAITING = 1024  # lines read ahead
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
_OF_THE_LEDGER = ("is full", "disk I/O error", "readonly database")


def serve(
    editor: Editor, source: Path, batch: int, *, follow: bool, on_conflict: OnConflict, again: bool = False,
    begun: Callable[[], object] | None = None,
) -> None:  # fmt: skip
    """Write facts as they come, until the source ends or the process is told to end.

    Each line is answered by one JSON object on standard output: {"id", "status": "applied", "batch"} once it is
    durable, "already" where the same edit is in the model, "removed" where it was taken out of it and stays out,
    "refused" for a conflict, "failed" where it could not be written, "error" (with "line") for a line that is no fact.
    SIGTERM or SIGINT ends the process behind the batch at hand; lines without an answer have not been written. A second
    one ends it at once, without the batch at hand.

    Args:
        editor: kept in a folder.
        source: a file, or "-" for standard input.
        batch: facts of one batch at most.
        follow: whether the end of the file is waited at.
        on_conflict: as for `Editor.edit`.
        again: whether what was taken out of the model is written again.
        begun: called before the first batch of what has come is written.

    Raises:
        OSError: the disk is full or fails, or the source cannot be read. Everything that is wrong with a fact is
            answered.
    """
    stop = threading.Event()
    lines: queue.Queue[tuple[int, bytes] | None] = queue.Queue(_WAITING)
    wrong: list[Exception] = []
    stream = _opened(source)
    reader = threading.Thread(target=_read, args=(stream, source, follow, lines, stop, wrong), daemon=True)
    with _until_told(stop):
        if planned := editor.planned:
            _write(editor, planned, on_conflict)
        desk = _Desk(editor, on_conflict, again)
        reader.start()
        while (arrived := _arrived(lines, batch, stop)) is not None:
            waiting = [item for item in arrived if not desk.admit(*item)]
            if desk.holds and begun is not None:
                begun()
                begun = None
            desk.write()
            for item in waiting:
                desk.admit(*item)
                desk.write()
        if wrong:
            raise wrong[0]
        assert editor.folder is not None
        stack = editor.folder.journal.index.stack
        if stack and stack[-1].kind == "batch":  # a stream that brings nothing leaves a finished model as it is
            editor.finish()
    stop.set()


class _Desk:
    """Takes lines in, answers those that are not to be written, and hands the others to the editor.

    Args:
        editor, on_conflict, again: see `serve`.
    """

    def __init__(self, editor: Editor, on_conflict: OnConflict, again: bool) -> None:
        from rlsedit.store.again import FormerIds

        assert editor.folder is not None
        self._editor, self._on_conflict, self._again = editor, on_conflict, again
        self._former = FormerIds(editor.folder.ledger.edits())
        self._facts: list[Fact] = []
        self._waiting: list[Fact] = []
        self._going: set[str] = set()  # edits in the model that what was taken in replaces

    @property
    def holds(self) -> bool:
        """Whether anything was taken in that is not written yet."""
        return bool(self._facts)

    def write(self) -> None:
        """Write what was taken in."""
        facts, self._facts, self._waiting, self._going = self._facts, [], [], set()
        if facts:
            _write(self._editor, facts, self._on_conflict)

    def admit(self, number: int, line: bytes) -> bool:
        """Take the fact of a line into the batch, or answer why not; False where the answer depends on the batch.

        Such a line is to be taken again behind the batch: each is answered as if the lines had come one by one.
        """
        from rlsedit.checking import TooLongError
        from rlsedit.store.errors import StoreError

        if not line.strip():
            return True
        fact = None
        try:
            fact = self._former.renamed(_fact(line))
            self._check(fact)
            if self._waits(fact):
                self._waiting.append(fact)
                return False
            answer = self._known(fact)
        except TooLongError as error:
            assert fact is not None
            assert self._editor.folder is not None
            with suppress(StoreError):  # the answer counts
                self._editor.folder.plan([fact])
                self._editor.folder.failed([fact], _text(error))
            answer = {"id": fact.id, "status": "failed", "error": _text(error)}
        except Exception as error:
            _unless_full(error)
            known = {} if fact is None else {"id": fact.id.encode(errors="replace").decode()}
            answer = {"line": number, **known, "status": "error", "error": _text(error)}
        if answer is None:
            assert fact is not None
            self._facts.append(fact)
            if self._on_conflict == "replace":
                assert self._editor.folder is not None
                self._going |= {conflict.old for conflict in self._editor.folder.journal.index.conflicts([fact])}
        else:
            _answer(**answer)
        return True

    def _waits(self, fact: Fact) -> bool:
        """Whether the batch has the fact, would replace it, or is waited for by a fact about the same."""
        from rlsedit.facts.ids import statement
        from rlsedit.store.index import same_statement

        if any(fact.id == other.id and statement(fact) == statement(other) for other in self._facts):
            return True
        about = self._on_conflict == "replace" and any(same_statement(fact, other) for other in self._waiting)
        return about or fact.id in self._going

    def _check(self, fact: Fact) -> None:
        """Refuse what the model cannot read before it can fail a whole batch."""
        from rlsedit.checking import check_lengths
        from rlsedit.prompts import Context
        from rlsedit.targets.rows import fact_rows

        editor = self._editor
        assert editor.folder is not None
        fact_rows(editor.tokenizer, [fact], [Context("", 1.0)])
        check_lengths(editor.adapter, editor.tokenizer, [fact], editor.method, editor.folder.session.contexts)

    def _known(self, fact: Fact) -> dict[str, object] | None:
        """The answer to a fact that is not to be written; None where it is."""
        from rlsedit.facts.ids import statement
        from rlsedit.store.again import taken_out
        from rlsedit.store.conflicts import find

        assert self._editor.folder is not None
        index, ledger = self._editor.folder.journal.index, self._editor.folder.ledger
        place, rows = index.live.get(fact.id), ledger.edits(name=fact.id)
        same = [row for row in rows if statement(row.fact) == statement(fact)]
        if place is not None and any(row.state == "applied" for row in same):
            return {"id": fact.id, "status": "already", "batch": place.number}
        row = None if place is not None or self._again else taken_out(same)
        if row is not None:
            return {"id": fact.id, "status": "removed", "reason": row.reason}
        found = find([*self._facts, fact], index)
        mine = [conflict.old for conflict in found if conflict.new == fact.id]
        if self._on_conflict == "refuse" and mine:
            return {"id": fact.id, "status": "refused", "conflicts": mine}
        taken = place is not None and not (self._on_conflict == "replace" and fact.id in mine)
        if taken or any(fact.id == other.id for other in self._facts):
            raise ValueError(f"id must be unique, got {fact.id!r} again")
        return None


def _fact(line: bytes) -> Fact:
    from rlsedit.facts.io import fact_from_record
    from rlsedit.jsonlines import decoded

    if len(line) > _LONGEST:
        raise ValueError(f"a line must not be longer than {_LONGEST} bytes")
    return fact_from_record(decoded(line.decode("utf-8-sig")))


def _write(editor: Editor, facts: list[Fact], on_conflict: OnConflict) -> None:
    """Write a batch and answer; facts of a batch that fails are tried one by one."""
    assert editor.folder is not None
    before = len(editor.folder.journal.entries)
    report, failure = None, ""
    try:
        report = editor.edit(facts, batch_size=len(facts), finish=False, on_conflict=on_conflict)
    except Exception as error:
        _unless_full(error)
        failure = _text(error)
    if report is None:  # not in the handler: its traceback holds what the batch had, a GPU's memory too
        if len(facts) == 1:
            editor.folder.failed(facts, failure)  # where it was planned by a run that ended
            _answer(id=facts[0].id, status="failed", error=failure)
            return
        written = _written(editor, before)
        for fact in facts:
            if fact.id in written:  # with a part of the batch
                _answer(id=fact.id, status="applied", batch=written[fact.id])
            else:
                _write(editor, [fact], on_conflict)
        return
    written = _written(editor, before)
    gone: set[str] = set()
    for fact in facts:
        old = [conflict.old for conflict in report.conflicts if conflict.new == fact.id and conflict.old not in gone]
        named = {} if not old else {"replaced" if on_conflict == "replace" else "conflicts": old}
        gone.update(named.get("replaced", ()))
        _answer(id=fact.id, status="applied", batch=written[fact.id], **named)


def _unless_full(error: BaseException) -> None:
    """Raise an error that says the disk is full, or fails: nothing that follows could be written either.

    Raises:
        OSError: the disk is full, fails, or may only be read.
    """
    cause: BaseException | None = error
    while cause is not None:
        full = isinstance(cause, OSError) and cause.errno in _OF_THE_DISK
        if full or (isinstance(cause, sqlite3.Error) and any(words in str(cause) for words in _OF_THE_LEDGER)):
            raise error
        cause = cause.__cause__ or cause.__context__


def _written(editor: Editor, before: int) -> dict[str, int]:
    """The steps behind step `before` by the facts that they have written; some may have been replaced since."""
    assert editor.folder is not None
    return {name: entry.number for entry in editor.folder.journal.entries[before:] for name in entry.ids}


def _answer(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text.encode(errors="replace").decode()[:500]


def _arrived(
    lines: queue.Queue[tuple[int, bytes] | None], batch: int, stop: threading.Event
) -> list[tuple[int, bytes]] | None:
    """At least one line and at most `batch` of those that are there; None at the end."""
    found: list[tuple[int, bytes]] = []
    while not stop.is_set():
        try:
            item = lines.get(timeout=_POLL) if not found else lines.get_nowait()
        except queue.Empty:
            if found:
                return found
            continue
        if item is None:
            lines.put(None)
            return found or None
        found.append(item)
        if len(found) == batch:
            return found
    return None


def _opened(source: Path) -> BinaryIO:
    if str(source) != "-":
        return open(source, "rb")
    if sys.stdin is None:
        raise ValueError("--facts: standard input is closed")
    return sys.stdin.buffer


def _read(
    stream: BinaryIO, source: Path, follow: bool, lines: queue.Queue[tuple[int, bytes] | None], stop: threading.Event,
    wrong: list[Exception],
) -> None:  # fmt: skip
    """Put lines into the queue; a last line without an end counts where nothing more comes behind it.

    A file that is waited at is followed by its name: where another takes its place, or it becomes shorter, as logs are
    rotated, it is read from its beginning.
    """
    follow = follow and str(source) != "-"
    number, part, anew = 0, b"", False
    try:
        while not stop.is_set():
            piece = stream.readline(_LONGEST + 2 - min(len(part), _LONGEST + 1))
            part = part + piece if len(part) <= _LONGEST else part
            if piece.endswith(b"\n") or (anew and not piece and part):
                number += 1
                _put(lines, (number, part.rstrip(b"\r\n") if len(part) <= _LONGEST else part), stop)
                part = b""
            elif not piece and anew:
                time.sleep(_POLL)
                with suppress(FileNotFoundError):  # moved once more
                    stream, number, anew = _opened(source), 0, False
            elif not piece:
                if not follow:
                    break
                time.sleep(_POLL)
                anew = _rotated(source, stream)  # what was written to the former file in between is still read
        if part and not stop.is_set():
            _put(lines, (number + 1, part), stop)
    except (ValueError, OSError) as error:
        if not stop.is_set():  # else the stream was closed under us, since the process ends
            wrong.append(error)
    _put(lines, None, stop)


def _rotated(source: Path, stream: BinaryIO) -> bool:
    """Whether the name leads to another file by now, or the file is shorter than what has been read of it."""
    try:
        found = os.stat(source)
    except OSError:  # between the old file and the new one
        return False
    held = os.fstat(stream.fileno())
    return (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino) or found.st_size < stream.tell()


def _put(lines: queue.Queue[Any], item: object, stop: threading.Event) -> None:
    while not stop.is_set():
        with suppress(queue.Full):
            lines.put(item, timeout=_POLL)
            return


@contextmanager
def _until_told(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`; the second of them raises KeyboardInterrupt."""

    def told(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before: list[tuple[signal.Signals, Callable[..., Any] | int | None]] = []
    for kind in (signal.SIGTERM, signal.SIGINT):
        with suppress(ValueError):  # not in the main thread
            before.append((kind, signal.signal(kind, told)))
    try:
        yield
    finally:
        for kind, handler in before:
            signal.signal(kind, handler)
