"""What `gpu.py` measures with: device events, candidates that take turns, rows that say what failed or hung."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from harness import summary

import rlsedit_kernels as rk

Function = Callable[[], object]

# What the floors are reckoned with (an H200): bytes and float32-accurate flops (3xTF32) in a second.
BYTES, FLOPS = 4.3e12, 130e12

# Cycles by which the host may run ahead of the device, about 1 ms: 300 launches.
HEAD_START = 2_000_000


def seconds(function: Function, device: str) -> float:
    """One call: device events on a GPU, the clock elsewhere.

    The device is kept busy until the host has put the call on the stream: the events would else measure the Python of
    a short op and not its kernels.
    """
    if device != "cuda":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def host_seconds(function: Function) -> float:
    """Until the host has put a call on the stream, and is free again."""
    found = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        found.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return min(found)


def works() -> bool:
    """Whether the GPU still answers this process: behind a kernel that failed, every call fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def wake(n: int) -> None:
    """Products of n x n matrices for a second: an idle GPU has low clocks, and the first rows would be slow."""
    A, end = torch.randn(n, n, device="cuda"), time.monotonic() + 1.0
    while time.monotonic() < end:
        torch.mm(A, A)
        torch.cuda.synchronize()


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """|got - exact| / |exact|, Frobenius."""
    return float((got.double() - exact).norm() / exact.norm())


def floor(bytes_moved: float, flops: float) -> float:
    """The larger of both times, in ms."""
    return 1e3 * max(bytes_moved / BYTES, flops / FLOPS)


MOST = 1000
"""Repetitions of an entry that is not said to be slow."""

NOT_RUN = "not run: the time is used up"

SIZES = ("what", "d", "u", "v", "count")
"""What tells comparisons apart."""


@dataclass
class Entry:
    """A candidate: what is timed, its error against float64 (by name of the result), how often at most."""

    name: str
    run: Function
    errors: Callable[[], dict[str, float]] | None = None
    most: int = MOST


@dataclass
class Bench:
    """The rows of a run, and the time that is left for it.

    Attributes:
        keep: called behind every comparison: should the process be killed, its rows are there.
        failed: called behind a failure.
    """

    device: str
    repetitions: int
    budget: float
    begin: float = field(default_factory=time.monotonic)
    rows: list[dict[str, object]] = field(default_factory=list)
    keep: Callable[[], object] = lambda: None
    failed: Callable[[], object] = lambda: None
    doing: tuple[float, dict[str, object]] | None = None  # since when, and what

    def compare(self, what: str, shape: dict[str, int], entries: Sequence[Entry], least: float | None = None) -> None:
        """Time the entries in turns; each leaves one row, with its failure where it fails.

        Those that have a row, from a process before this one, are left out.
        """
        base: dict[str, object] = {"what": what, **shape}
        known = {row.get("name") for row in self.rows if base.items() <= row.items()}
        alive: list[Entry] = []
        for entry in (entry for entry in entries if entry.name not in known):
            if time.monotonic() - self.begin > self.budget:
                self.rows.append({**base, "name": entry.name, "failed": NOT_RUN})
                continue
            self.doing = time.monotonic(), {**base, "name": entry.name}
            if (failure := self._attempt(entry)) is not None:
                self.rows.append({**base, "name": entry.name, "failed": failure})
                self.failed()
            else:
                alive.append(entry)
        times: dict[str, list[float]] = {entry.name: [] for entry in alive}
        for i in range(self.repetitions):
            for entry in tuple(alive):
                self.doing = time.monotonic(), {**base, "name": entry.name}
                if i >= entry.most or (times[entry.name] and time.monotonic() - self.begin >= self.budget):
                    continue
                try:
                    times[entry.name].append(seconds(entry.run, self.device))
                except Exception as failure:
                    alive.remove(entry)
                    self.rows.append({**base, "name": entry.name, "failed": _text(failure)})
                    self.failed()
        for entry in alive:
            self.doing = time.monotonic(), {**base, "name": entry.name}
            row = {**base, "name": entry.name, **summary(times[entry.name]), "floor_ms": least}
            if self.device == "cuda" and entry.most == MOST:
                row["host_ms"] = 1e3 * host_seconds(entry.run)
            self.rows.append(row)
            try:
                row |= entry.errors() if entry.errors is not None else {}
            except Exception as failure:  # the time stands; say that its error is not known
                row["failed"] = f"error against float64: {_text(failure)}"
                self.failed()
            print(f"{what} {shape} {entry.name}: {row['median_ms']:.3f} ms", file=sys.stderr, flush=True)
        self.doing = time.monotonic(), {"what": f"after {what}", **shape}
        self.keep()

    def section(self, name: str, function: Callable[..., None], *arguments: object) -> None:
        """A part of the run; one that fails between its comparisons is a row too, and one for which it is too late."""
        if time.monotonic() - self.begin > self.budget:
            self.rows.append({"what": name, "failed": NOT_RUN})
            return
        self.doing = time.monotonic(), {"what": name}
        try:
            function(self, *arguments)
        except Exception as failure:
            self.rows.append({"what": name, "failed": _text(failure)})
            self.failed()

    def finished(self) -> bool:
        """Whether nothing was left out for want of time."""
        return not any(row.get("failed") == NOT_RUN for row in self.rows)

    def take(self, rows: Sequence[dict[str, object]]) -> None:
        """Rows of an earlier run, but for comparisons that it did not come to the end of: those take turns anew."""
        mine = [row for row in rows if row["what"] != "target" and "name" in row]
        again = [_sizes(row) for row in mine if row.get("failed") == NOT_RUN]
        self.rows += [row for row in mine if _sizes(row) not in again]

    def watch(self, limit: float, give_up: Callable[[], None]) -> None:
        """From a thread of its own: `give_up` once a call takes longer than `limit` seconds."""

        def look() -> None:
            while True:
                time.sleep(min(1.0, limit / 4))
                if (doing := self.doing) is not None and time.monotonic() - doing[0] > limit:
                    self.rows.append({**doing[1], "failed": f"hangs: no answer in {limit:g} s"})
                    print(self.rows[-1], file=sys.stderr, flush=True)
                    give_up()
                    return

        threading.Thread(target=look, daemon=True).start()

    def _attempt(self, entry: Entry) -> str | None:
        """Two calls to warm up; the message of what went wrong."""
        try:
            for _ in range(2):
                entry.run()
            if self.device == "cuda":
                torch.cuda.synchronize()
        except Exception as failure:
            return _text(failure)
        return None

    def median(self, what: str, name: str, **shape: int) -> float | None:
        """A median that was measured."""
        for row in self.rows:
            if row["what"] == what and row["name"] == name and all(row.get(k) == v for k, v in shape.items()):
                value = row.get("median_ms")
                return value if isinstance(value, float) else None
        return None


def _sizes(row: dict[str, object]) -> tuple[object, ...]:
    return tuple(row.get(key) for key in SIZES)


def _text(failure: Exception) -> str:
    """Its first line, and the last one of what Triton says, which begins with a place; all of it is printed."""
    traceback.print_exception(failure)
    cause: BaseException = failure
    while type(cause).__module__.startswith("triton") and cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in f"{type(failure).__name__}: {failure}".splitlines() if line.strip()]
    if type(failure).__module__.startswith("triton"):
        last = f"{type(cause).__name__}: {cause}".strip().splitlines()[-1].strip()
        lines[0] += f" ... {last}" if last not in lines[0] else ""
    return lines[0][:300]


class Problem:
    """A layer with a batch: C symmetric positive definite, keys with k'Ck about 1, W, V, and a triangular factor R."""

    def __init__(self, d: int, u: int, v: int, device: str) -> None:
        generator = torch.Generator(device=device).manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        columns = randn(d, 64) / d**0.5
        self.C = torch.eye(d, device=device) + columns @ columns.mT
        self.C = (self.C + self.C.mT) / 2
        self.K, self.V, self.W = randn(u, d) / d**0.5, randn(u, v), randn(d, v) / d**0.5
        self.R = randn(d, d).triu() / (4.0 * d**0.5)
        self.R.diagonal().abs_().add_(1.0)


def backends_of(device: str) -> list[str]:
    """Back ends that serve the device, the plain one last."""
    return [row.name for row in rk.backends() if row.available and (device in row.devices or "*" in row.devices)]
