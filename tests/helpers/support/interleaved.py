"""Programs of one launch under Triton's interpreter, out of order: a wait that a kernel has forgotten shows.

The interpreter runs programs one after the other, so that whatever a program should wait for is there. Here every
program first takes its ticket; then the one with the highest that can go on does, until it waits or publishes.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

from triton.runtime import interpreter


class _Program(threading.Thread):
    """A program of the grid; it runs only while it has the turn."""

    def __init__(self, place: tuple[int, int, int], body: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.place = place
        self.body = body
        self.turn, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.ticket = -1
        self.waits = self.ended = False
        self.error: BaseException | None = None

    def run(self) -> None:
        self.turn.acquire()
        try:
            self.body()
        except BaseException as error:  # handed to the thread that runs the test
            self.error = error
        self.ended = True
        self.done.release()

    def go_on(self) -> None:
        """Give it the turn until it gives it back."""
        interpreter.interpreter_builder.set_grid_idx(*self.place)
        self.turn.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def give_back(self) -> None:
        """Called by the program itself."""
        self.done.release()
        self.turn.acquire()


def _run(programs: list[_Program]) -> None:
    for program in programs:
        program.start()
        program.go_on()  # to its ticket
    left = [program for program in programs if not program.ended]
    while left:
        able = [program for program in left if not program.waits]
        if not able:
            raise AssertionError(f"{len(left)} programs wait, and none publishes")
        latest = max(able, key=lambda program: program.ticket)
        latest.go_on()
        if not latest.waits:  # it has published or ended
            for program in left:
                program.waits = False
        left = [program for program in left if not program.ended]


class _Collector:
    """Stands where the interpreter keeps the kernel: takes the programs of a grid, and runs them with the last."""

    def __init__(self, kernel: Callable[..., None], count: int) -> None:
        self.kernel, self.count = kernel, count
        self.programs: list[_Program] = []
        # what the interpreter reads of a kernel
        self.__name__, self.__globals__ = kernel.__name__, kernel.__globals__
        self.__signature__ = inspect.signature(kernel)

    def __call__(self, **arguments: Any) -> None:
        place = interpreter.interpreter_builder.grid_idx
        self.programs.append(_Program(tuple(place), lambda: self.kernel(**arguments)))
        if len(self.programs) == self.count:
            _run(self.programs)


@contextlib.contextmanager
def latest_first() -> Iterator[list[int]]:
    """Every launch in this order; gives how often programs had to wait, launch by launch."""
    builder = type(interpreter.interpreter_builder)
    launch, atomic = interpreter.GridExecutor.__call__, builder.create_atomic_rmw
    waits: list[int] = []

    def atomic_rmw(self: Any, op: Any, at: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        result = atomic(self, op, at, value, mask, sem, scope)
        program, kind = threading.current_thread(), str(sem).lower()
        assert isinstance(program, _Program)
        if program.ticket < 0:
            program.ticket = int(result.data.item())
            program.give_back()
        elif "acquire" in kind and int(result.data.item()) == 0:
            waits[-1] += 1
            program.waits = True
            program.give_back()
        elif "release" in kind:
            program.give_back()
        return result

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = self.fn
        waits.append(0)
        self.fn = _Collector(kernel, math.prod(self.grid))
        try:
            return launch(self, *args, **kwargs)
        finally:
            self.fn = kernel

    interpreter.GridExecutor.__call__, builder.create_atomic_rmw = launched, atomic_rmw
    try:
        yield waits
    finally:
        interpreter.GridExecutor.__call__, builder.create_atomic_rmw = launch, atomic
