"""`python -m rlsedit` is the command `rlsedit`."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

__all__ = ["run"]

_INTERRUPTED = 130
_SOON = 0.01  # seconds


def run() -> int:
    """Runs the command line; Ctrl-C, also while it is being imported, ends the process."""
    _send_again()
    try:
        from rlsedit.cli import main
    except KeyboardInterrupt:
        sys.stderr.write("rlsedit: interrupted; nothing has begun\n")
        status = _INTERRUPTED
    else:
        status = main()
    if status == _INTERRUPTED:
        _leave(status)
    return status


def _send_again() -> None:
    """Lets a Ctrl-C that comes while an object is destroyed come again.

    Python reports what a destructor raises, and goes on. `regex`, with which transformers compiles patterns while it is
    imported, has many that are written in Python: what came there was lost.
    """
    if not hasattr(signal, "setitimer"):  # Windows
        return
    report = sys.unraisablehook

    def ignored(what: sys.UnraisableHookArgs) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _SOON)  # sent at once it would be raised here, and lost once more
        else:
            report(what)

    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.unraisablehook = ignored


def _leave(status: int) -> None:
    """End the process without waiting for its threads, as an interpreter does.

    What interrupts a wait for a thread, in a loader of models for one, can leave a lock behind that nobody gives back:
    that thread would wait for ever, and the process for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, or nobody reads any more
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(run())
