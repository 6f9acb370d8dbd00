"""Output of the commands: on a terminal with a moving bar, in a file or pipe as plain lines."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

__all__ = ["Console", "ProgressBar"]

_REDRAW = 0.05  # seconds between redraws of a bar


class Console:
    """Writes lines, headings and progress bars to a stream.

    Control characters are written to terminals only; a pipe or file gets whole lines, one for each finished bar.

    Args:
        stream: where to write; standard output by default.
        quiet: whether nothing is written at all.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.quiet = quiet
        self.tty = bool(getattr(self.stream, "isatty", lambda: False)())
        self.unicode = "utf" in (getattr(self.stream, "encoding", None) or "").lower()
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        """Writes `text` as one or more lines, and remembers them for `transcript`."""
        text = text if self.unicode else _ascii(text)
        self.lines.append(text)
        if not self.quiet:
            self.stream.write(text + "\n")
            self.stream.flush()

    def heading(self, text: str) -> None:
        """Writes an underlined line with an empty one before it."""
        self.line()
        self.line(text)
        self.line("─" * len(text))

    def bar(self, label: str, total: int | None) -> ProgressBar:
        """A progress bar over `total` steps (None where they are not known); use it as a context manager."""
        return ProgressBar(self, label, total)

    def transcript(self) -> str:
        """All lines written so far."""
        return "\n".join(self.lines) + "\n"

    def overwrite(self, text: str) -> None:
        """Replaces the current line of a terminal; does nothing elsewhere."""
        if self.tty and not self.quiet:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write("\r\x1b[2K" + (text if self.unicode else _ascii(text))[:width])
            self.stream.flush()


class ProgressBar:
    """Shows how far a task is; leaves one line when it is done.

    Args:
        console: where it is shown.
        label: what is going on.
        total: number of steps, at least 1; None where it is not known, then there is only the label.
    """

    def __init__(self, console: Console, label: str, total: int | None) -> None:
        self._console, self._label, self._total = console, label, total
        self._begin = time.perf_counter()
        self._drawn = 0.0
        self._result: str | None = None

    def __enter__(self) -> ProgressBar:
        self.update(0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._console.overwrite("")
        if kind is None:
            self._console.line(f"{self._label}: {self._result or f'{self.elapsed:.1f} s'}")

    @property
    def elapsed(self) -> float:
        """Seconds since the bar was made."""
        return time.perf_counter() - self._begin

    def update(self, done: float, note: str = "") -> None:
        """Moves the bar to `done` steps and shows `note` behind it."""
        if self._total is None:
            self._console.overwrite(f"{self._label} ...")
            return
        now = time.perf_counter()
        if now - self._drawn < _REDRAW and done < self._total:
            return
        self._drawn = now
        full, empty = ("█", "░") if self._console.unicode else ("#", ".")
        part = min(1.0, max(0.0, done / self._total))
        filled = round(24 * part)
        bar = full * filled + empty * (24 - filled)
        self._console.overwrite(f"{self._label} {bar} {100 * part:3.0f} %  {self.elapsed:5.1f} s  {note}")

    def finish(self, result: str) -> None:
        """Sets the text that stands behind the label when the bar is gone."""
        self._result = result


def _ascii(text: str) -> str:
    for mark, plain in (("─", "-"), ("±", "+-"), ("·", "-"), ("→", "->"), ("×", "x")):
        text = text.replace(mark, plain)
    return text.encode("ascii", errors="replace").decode("ascii")
