"""Runs generated Python programs in a process of their own with limits, and says what the system does not enforce.

Always, on a POSIX system: an isolated interpreter (`-I -S`: standard library only), an empty temporary directory, no
inherited environment or file descriptors, limits of processor time, address space, file size, processes and open
files, a session of its own that is killed as a whole when the time is over, output cut.

Where Linux allows namespaces (as root, or a user with user namespaces): no network, no sight of other processes, a file
system that is read-only but for a small one in memory, nothing left running. As root the program runs as a user of its
own, or as nobody where the system has few users.

Not enforced: reading what the user can read (as root: what everybody can), and a program that looks for the verdict in
the interpreter that runs it. It is a guard against code that goes wrong, not against an attacker.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

__all__ = ["ISOLATION", "Limits", "Outcome", "isolation", "run_program"]

ISOLATION = ("network", "other processes", "files", "number of processes")
"""What is closed or limited beyond the process itself where the system allows it."""

_CHILD = Path(__file__).with_name("child.py")
_GRACE = 2.0  # seconds for the start and the end of the interpreter
_VERDICT_BYTES = 65_536


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    Attributes:
        cpu_seconds: processor time of one process, whole seconds.
        wall_seconds: time by the clock; generous, so that a busy machine does not fail a right program.
        memory: address space of one process, bytes.
        file_bytes: one file, bytes.
        disk: all files, bytes, where the file system is closed.
        processes: processes and threads at a time (of the user as a whole where there is no user namespace).
        files: open file descriptors.
        output: bytes of output that are kept.

    Raises:
        ValueError: a limit of zero or less, or one that is no whole number (but for `wall_seconds`).
    """

    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    memory: int = 512 << 20
    file_bytes: int = 16 << 20
    disk: int = 64 << 20
    processes: int = 8
    files: int = 64
    output: int = 16_384

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.name != "wall_seconds"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value > 0:
                kind = "whole number" if whole else "number"
                raise ValueError(f"Limits: {field.name} must be a {kind} above 0, got {value!r}")


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: "passed" (it came to its end without an exception), "error" (an exception, SystemExit included),
            "timeout" (processor time or clock), "killed" (a signal), "no verdict" (it left without coming to its end,
            as by `os._exit(0)`).
        detail: the exception, signal or exit status.
        output: the first bytes of its standard output and error, decoded.
        seconds: by the clock, the start of the interpreter included.
        enforced: those of `ISOLATION` that held.
    """

    status: str
    detail: str
    output: str
    seconds: float
    enforced: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the program came to its end without an exception."""
        return self.status == "passed"


def run_program(code: str, limits: Limits | None = None) -> Outcome:
    """Runs a program and waits for its end.

    Args:
        code: source; it runs as a module called "program", without input.
        limits: the defaults of `Limits` if None.

    Raises:
        OSError: the system is not POSIX, or cannot start a process.
        TypeError: code is no text.
    """
    if os.name != "posix":
        raise OSError("running generated code needs a POSIX system: its limits do not exist here")
    if not isinstance(code, str):
        raise TypeError(f"run_program: code must be a str, got {type(code).__name__}")
    limits = limits or Limits()
    nonce = secrets.token_hex(16)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rlsedit-run-", ignore_cleanup_errors=True) as directory:
        request = {"code": code, "nonce": nonce, "limits": asdict(limits), "directory": directory}
        output, verdict, late = _run(json.dumps(request).encode("utf-8", "surrogatepass"), directory, limits)
    seconds = time.monotonic() - start
    status, detail, enforced = _judge(verdict, nonce, limits, late)
    return Outcome(status, detail, output.decode("utf-8", "replace"), seconds, enforced)


@lru_cache(maxsize=1)
def isolation() -> dict[str, bool]:
    """Which of `ISOLATION` this system enforces, by running an empty program once."""
    outcome = run_program("")
    return {name: name in outcome.enforced for name in ISOLATION}


def _run(request: bytes, directory: str, limits: Limits) -> tuple[bytes, bytes, bool]:
    """Starts the child, feeds it, and reads output and verdict until it is gone or its time is over."""
    read_end, write_end = os.pipe()
    environment = {"LANG": "C.UTF-8", "HOME": directory, "TMPDIR": directory}
    command = [sys.executable, "-I", "-S", "-B", str(_CHILD), str(write_end)]
    try:
        process = subprocess.Popen(
            command, cwd=directory, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, pass_fds=(write_end,), start_new_session=True,
        )  # fmt: skip
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    assert process.stdin is not None
    assert process.stdout is not None
    kept = {read_end: bytearray(), process.stdout.fileno(): bytearray()}
    room = {read_end: _VERDICT_BYTES, process.stdout.fileno(): limits.output}
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(request)
        late = _drain(process, kept, room, time.monotonic() + limits.wall_seconds + _GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found = bytes(kept[process.stdout.fileno()]), bytes(kept[read_end])
        process.stdout.close()
        os.close(read_end)
    return (*found, late)


def _drain(process: subprocess.Popen[bytes], kept: dict[int, bytearray], room: dict[int, int], deadline: float) -> bool:
    """Reads until the child is gone; the first bytes are kept, the rest is thrown away. True when time was over."""
    with selectors.DefaultSelector() as selector:
        for descriptor in kept:
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            gone = process.poll() is not None
            ready = selector.select(0 if gone else 0.02)
            for key, _ in ready:
                chunk = os.read(key.fd, 65_536)
                if not chunk:
                    selector.unregister(key.fd)
                kept[key.fd] += chunk[: room[key.fd] - len(kept[key.fd])]
            if gone and not any(key.fd in selector.get_map() for key, _ in ready):
                return False
    return True


def _judge(verdict: bytes, nonce: str, limits: Limits, late: bool) -> tuple[str, str, tuple[str, ...]]:
    """Status, detail and what was enforced; lines without the nonce are not from the child's own code."""
    enforced: tuple[str, ...] = ()
    ran: dict | None = None
    ended: dict | None = None
    for number, line in enumerate(verdict.split(b"\n")):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict):
            continue
        if number == 0:
            enforced = tuple(name for name in ISOLATION if name in entry.get("enforced", ()))
        elif entry.get("nonce") == nonce:
            ran, ended = (entry, ended) if "ran" in entry else (ran, entry)
    code = None if ended is None else ended.get("code")
    if ran is not None and ran["error"]:
        return "error", str(ran["error"]), enforced
    if ran is not None and code == 0:
        return "passed", "", enforced
    if late or (ended is not None and code is None):
        return "timeout", f"still running after {limits.wall_seconds:g} s", enforced
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        kind = "timeout" if code == -signal.SIGXCPU else "killed"
        return kind, f"{signal.Signals(-code).name}; processor time {limits.cpu_seconds} s", enforced
    if code is not None and code < 0:
        return "killed", signal.Signals(-code).name, enforced
    return "no verdict", "no end seen" if code is None else f"left with exit status {code} before its end", enforced
