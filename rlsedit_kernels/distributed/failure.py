"""What ranks tell each other when something goes wrong, through the store that they met at."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from rlsedit_kernels.errors import RankError

__all__ = ["Reports", "rank_error"]

PATIENCE = 5.0
"""Seconds that the others have for a sign of life once one rank has lost contact."""


STORE_PATIENCE = 30.0
"""Seconds that one waits for an answer of the store; a file on a busy disk may need some."""

HEARD_PATIENCE = 2.0
"""Seconds that the process with the store gives the others to hear of a failure before it goes on, and may exit."""


class Reports:
    """Messages of failures of one process group; the first one ends the group for all.

    Args:
        group: of the ranks.
        rank, size: of this process in it.

    Nothing is told or heard before `begin`.
    """

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store: _Limited | None = None
        self._prefix = f"rlsedit_kernels/{group.group_name}"
        self._ended: str | None = None
        self._keeps = size > 1 and dist.get_rank() == 0
        self._with_keeper = size > 1 and 0 in dist.get_process_group_ranks(group)
        self.lost: str | None = None
        """Why the store answers no more; None as long as it does."""

    def begin(self, life: int) -> None:
        """Messages can be sent from here on.

        Args:
            life: a number that these processes have in common, and none that had the same names before: where torchrun
                starts them again the store is the old one, with all that was reported to it.
        """
        if self.size > 1:
            self._prefix = f"{self._prefix}/{life:x}"
            self._store = _Limited(dist.distributed_c10d._get_default_store())

    def post(self, what: str, error: BaseException) -> None:
        """Tell all ranks that this one has failed."""
        text = f"{what}: rank {self.rank} failed: {type(error).__name__}: {error}"
        self._ended = self._ended or text
        if self._store is not None:
            try:
                if self._store.add(f"{self._prefix}/failures", 1) == 1:
                    self._store.set(f"{self._prefix}/failure", text)
            except RuntimeError:  # the store is gone with its process
                return
            self._until_heard([])

    def check(self, *, sending: bool = True) -> None:
        """Hear of failures.

        The process with the store may have come to its end in peace: that it is gone is an error only for what needs
        it, and of no matter to a group that it does not belong to.

        Args:
            sending: whether something is about to be sent or received.

        Raises:
            RankError: a rank has reported a failure, now or earlier; or rank 0 is gone and is to take part.
        """
        if self._ended is None and self.lost is None and self._store is not None:
            try:
                if self._store.check([f"{self._prefix}/failure"]):
                    self._ended = self._store.get(f"{self._prefix}/failure").decode()
                    self._store.set(f"{self._prefix}/heard/{self.rank}", "1")
            except RuntimeError as error:
                self.lost = str(error)
        if self._ended is None and self.lost is not None and sending and self._with_keeper:
            self._ended = f"the process that keeps the store of this group (that of rank 0) is gone: {self.lost}"
        if self._ended is not None:
            raise RankError(f"{self._ended}; this group of ranks has ended, start it again")

    def explain(self, what: str, error: BaseException) -> RankError:
        """The error of a collective that did not come to its end: who reported a failure, or who is gone."""
        try:
            self.check()
            gone = self._silent()
            self.check()
        except RankError as known:
            return known
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        if gone:
            names = ", ".join(str(rank) for rank in gone)
            text = f"{what}: no sign of life from rank {names} for {PATIENCE:g} s: {first}"
        elif self._store is None:
            text = f"{what}: {first}"
        elif self.lost is not None:
            text = f"{what}: the store is gone, by which the ranks could tell each other why: {first}"
        else:
            text = f"{what}: all ranks are alive, but out of step: {first}"
        self._ended = text
        if self._store is not None and self.lost is None:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"{self._prefix}/failure", text)
            self._until_heard(gone)
        return RankError(f"{text}; this group of ranks has ended, start it again")

    def _silent(self) -> list[int]:
        """Ranks that have not come here within `PATIENCE`."""
        if self._store is None or self.lost is not None:
            return []
        names = [f"{self._prefix}/alive/{rank}" for rank in range(self.size)]
        try:
            self._store.set(names[self.rank], "1")
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                if self._store.check(names) or self._store.check([f"{self._prefix}/failure"]):
                    break
                time.sleep(0.05)
            return [rank for rank, name in enumerate(names) if not self._store.check([name])]
        except RuntimeError as error:
            self.lost = str(error)
            return []

    def _until_heard(self, gone: list[int]) -> None:
        """Where the store may end with this process: until the others know of the failure, but not for long."""
        if not self._keeps or self._store is None:
            return
        others = [rank for rank in range(self.size) if rank != self.rank and rank not in gone]
        until = time.monotonic() + HEARD_PATIENCE
        with contextlib.suppress(RuntimeError):
            while others and time.monotonic() < until:
                if self._store.check([f"{self._prefix}/heard/{rank}" for rank in others]):
                    return
                time.sleep(0.02)


_Call = tuple[Callable[..., Any], tuple[Any, ...], "queue.SimpleQueue[Any]"]
"""What to ask, and where the answer goes. It must not hold the object that asks, which could never end."""


def _serve(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (asked := calls.get()) is not None:
        call, args, box = asked
        try:
            box.put(call(*args))
        except Exception as error:
            box.put(error)
        del asked, call, args, box


class _Limited:
    """A store whose answers are waited for no longer than `STORE_PATIENCE`.

    Its own time limit is for waiting operations only: where the process that keeps a TCPStore hangs rather than dies,
    `check` and `set` block for ever. They are therefore called in a thread of their own, which ends with this object.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lost = False
        weakref.finalize(self, self._calls.put, None).atexit = False
        threading.Thread(target=_serve, args=(self._calls,), name="rlsedit-store", daemon=True).start()

    def check(self, names: list[str]) -> bool:
        return self._ask(self._store.check, names)

    def get(self, name: str) -> bytes:
        return self._ask(self._store.get, name)

    def set(self, name: str, value: str) -> None:
        self._ask(self._store.set, name, value)

    def add(self, name: str, value: int) -> int:
        return self._ask(self._store.add, name, value)

    def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        box: queue.SimpleQueue[Any] = queue.SimpleQueue()
        try:
            if self._lost:
                raise queue.Empty
            self._calls.put((call, args, box))
            answer = box.get(timeout=STORE_PATIENCE)
        except queue.Empty:
            self._lost = True
            raise RuntimeError(f"no answer from it within {STORE_PATIENCE:g} s") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def rank_error(what: str, messages: Mapping[int, str]) -> str:
    """One sentence from the messages of the ranks that failed."""
    return f"{what}: " + "; ".join(f"rank {rank} failed: {text}" for rank, text in messages.items())
