"""Ctrl-C and SIGTERM during a step: they wait until it is whole, whatever threads the process has."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.editors import differing, editor, everything, facts, resumed

from rlsedit.store.files import Disk, uninterrupted

SETTINGS = dict(steps=1, contexts=0)


@pytest.fixture(autouse=True)
def another_thread() -> Iterator[None]:
    """One that the system may hand a signal to which the main thread blocks, as torch's threads are."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    yield
    over.set()
    thread.join()


def _send(kind: signal.Signals) -> None:
    """To the process as a whole, and time for it to arrive."""
    os.kill(os.getpid(), kind)
    until = time.monotonic() + 0.1
    while time.monotonic() < until:
        pass


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_at_the_end_of_the_block(kind: signal.Signals) -> None:
    order: list[str] = []
    before = signal.signal(kind, lambda *_: order.append("answered"))
    try:
        with uninterrupted():
            _send(kind)
            order.append("done")
        assert order == ["done", "answered"]
        _send(kind)
        assert order == ["done", "answered", "answered"]
    finally:
        signal.signal(kind, before)


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            _send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_failed_is_told_with_the_interrupt() -> None:
    def fail() -> None:
        with uninterrupted():
            _send(signal.SIGINT)
            raise OSError("the disk")

    with pytest.raises(KeyboardInterrupt) as caught:
        fail()
    assert "the disk" in str(caught.value.__context__)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Interrupted(Disk):
    """Sends Ctrl-C when a step is on the disk as a whole, and not yet in memory."""

    def __init__(self) -> None:
        self.sent = 0

    def reached(self, point: str) -> None:
        if point == "ledger":
            self.sent += 1
            _send(signal.SIGINT)


def test_ctrl_c_while_a_batch_becomes_durable_leaves_it_whole(tmp_path: Path) -> None:
    one, disk = editor(**SETTINGS), Interrupted()
    one.save(tmp_path / "out", disk=disk)
    with pytest.raises(KeyboardInterrupt):
        one.edit(facts(2), batch_size=2)
    assert disk.sent == 1
    assert one.folder is not None
    assert len(one.folder.journal.entries) == one._number == 1
    assert [row.state for row in one.folder.ledger.edits()] == ["applied"] * 2
    one.close()
    other = resumed(tmp_path / "out")
    assert differing(everything(other), everything(one)) == []
    other.close()
