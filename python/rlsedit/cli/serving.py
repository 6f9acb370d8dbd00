"""A stream of facts from standard input or a growing file: batches of what has arrived, an answer for each line."""

from __future__ import annotations

import hashlib
import json
import queue
import signal
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


def serve(editor: Editor, source: Path, batch: int, *, follow: bool, on_conflict: OnConflict) -> None:
    """Write facts as they come, until the source ends or the process is told to end.

    Each line is answered by one JSON object on standard output: {"id", "status": "applied", "batch"} once it is
    durable, "already" where the same edit is in the model, "refused" for a conflict, "failed" where it could not be
    written, "error" (with "line") for a line that is no fact. SIGTERM or SIGINT ends the process behind the batch at
    hand; lines without an answer have not been written. A second one ends it at once, without the batch at hand.

    Args:
        editor: kept in a folder.
        source: a file, or "-" for standard input.
        batch: facts of one batch at most.
        follow: whether the end of the file is waited at.
        on_conflict: as for `Editor.edit`.
    """
    stop = threading.Event()
    lines: queue.Queue[tuple[int, bytes] | None] = queue.Queue(_WAITING)
    reader = threading.Thread(target=_read, args=(source, follow, lines, stop), daemon=True)
    with _until_told(stop):
        if planned := editor.planned:
            _write(editor, planned, on_conflict)
        reader.start()
        while (arrived := _arrived(lines, batch, stop)) is not None:
            facts: list[Fact] = []
            for number, line in arrived:
                _admit(editor, facts, line, number, str(source) == "-", on_conflict)
            if facts:
                _write(editor, facts, on_conflict)
        editor.finish()
    stop.set()


def _admit(
    editor: Editor, facts: list[Fact], line: bytes, number: int, standard: bool, on_conflict: OnConflict
) -> None:
    """Take the fact of a line into the batch, or answer why not."""
    from rlsedit.facts.io import fact_from_record
    from rlsedit.prompts import Context
    from rlsedit.store.conflicts import find
    from rlsedit.targets.rows import fact_rows

    if not line.strip():
        return
    fact = None
    try:
        if len(line) > _LONGEST:
            raise ValueError(f"a line must not be longer than {_LONGEST} bytes")
        text = line.decode("utf-8-sig")
        record = json.loads(text)
        name = hashlib.blake2b(text.strip().encode(), digest_size=6).hexdigest() if standard else str(number)
        fact = fact_from_record(record, default_id=name)
        fact_rows(editor.tokenizer, [fact], [Context("", 1.0)])
        assert editor.folder is not None
        index = editor.folder.journal.index
        place = index.live.get(fact.id)
        if place is not None:
            old = editor.folder.ledger.edits(name=fact.id, state="applied")[-1].fact
            if (old.prompt, old.subject, old.target_new) == (fact.prompt, fact.subject, fact.target_new):
                _answer(id=fact.id, status="already", batch=place.number)
                return
        found = find([*facts, fact], index)
        mine = [conflict.old for conflict in found if conflict.new == fact.id]
        if on_conflict == "refuse" and mine:
            _answer(id=fact.id, status="refused", conflicts=mine)
            return
        taken = place is not None and not (on_conflict == "replace" and fact.id in mine)
        if taken or any(fact.id == other.id for other in facts):
            raise ValueError(f"id must be unique, got {fact.id!r} again")
    except (ValueError, TypeError, RecursionError) as error:
        known = {} if fact is None else {"id": fact.id.encode(errors="replace").decode()}
        _answer(line=number, **known, status="error", error=_text(error))
        return
    facts.append(fact)


def _write(editor: Editor, facts: list[Fact], on_conflict: OnConflict) -> None:
    """Write a batch and answer; facts of a batch that fails are tried one by one."""
    try:
        report = editor.edit(facts, batch_size=len(facts), finish=False, on_conflict=on_conflict)
    except (ValueError, TypeError, OSError) as error:
        if len(facts) == 1:
            _answer(id=facts[0].id, status="failed", error=_text(error))
            return
        for fact in facts:
            if fact.id in _live(editor):  # of a part of the batch that had been written
                _answer(id=fact.id, status="applied", batch=_live(editor)[fact.id].number)
            else:
                _write(editor, [fact], on_conflict)
        return
    for fact in facts:
        old = [conflict.old for conflict in report.conflicts if conflict.new == fact.id]
        named = {} if not old else {"replaced" if on_conflict == "replace" else "conflicts": old}
        place = _live(editor).get(fact.id)
        _answer(id=fact.id, status="applied", batch=None if place is None else place.number, **named)


def _live(editor: Editor) -> dict[str, Any]:
    assert editor.folder is not None
    return editor.folder.journal.index.live


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


def _read(source: Path, follow: bool, lines: queue.Queue[tuple[int, bytes] | None], stop: threading.Event) -> None:
    """Put lines into the queue; a last line without an end counts where nothing more is waited for."""
    stream: BinaryIO = sys.stdin.buffer if str(source) == "-" else open(source, "rb")  # noqa: SIM115
    number, part = 0, b""
    with suppress(ValueError, OSError):  # the stream is closed under us when the process ends
        while not stop.is_set():
            piece = stream.readline(_LONGEST + 2 - min(len(part), _LONGEST + 1))
            part = part + piece if len(part) <= _LONGEST else part
            if piece.endswith(b"\n"):
                number += 1
                _put(lines, (number, part.rstrip(b"\r\n") if len(part) <= _LONGEST else part), stop)
                part = b""
            elif not piece:
                if not follow or str(source) == "-":
                    break
                time.sleep(_POLL)
        if part and not stop.is_set():
            _put(lines, (number + 1, part), stop)
    _put(lines, None, stop)


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
