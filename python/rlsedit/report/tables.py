"""Plain-text tables and the formatting of figures."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence

__all__ = ["estimate", "markdown_table", "seconds", "table"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str = "", limit: int = 0) -> str:
    """Lays cells out in columns under a header.

    Args:
        header: titles of the columns.
        rows: cells, each row as long as the header.
        align: one letter a column, "l" or "r"; by default the first left and the others right.
        limit: cells longer than this many characters are cut, 0 for none.

    Returns:
        Lines without trailing blanks.

    Raises:
        ValueError: if a row or `align` does not fit the header.
    """
    align = align or "l" + "r" * (len(header) - 1)
    if len(align) != len(header) or any(len(row) != len(header) for row in rows):
        raise ValueError(f"table: rows and align must have {len(header)} columns as the header")
    cells = [[_cut(_one_line(cell), limit) for cell in row] for row in (header, *rows)]
    widths = [max(_width(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(_pad(cell, w, a) for cell, w, a in zip(row, widths, align, strict=True)).rstrip() for row in cells
    ]
    rule = "  ".join("─" * w for w in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, align: str = "") -> str:
    """The same cells as a table in Markdown; bars in cells are escaped, since they would begin a cell.

    Args:
        header: titles of the columns.
        rows: cells, each row as long as the header.
        align: one letter a column, "l" or "r"; by default the first left and the others right.

    Raises:
        ValueError: if a row or `align` does not fit the header.
    """
    rows = list(rows)
    align = align or "l" + "r" * (len(header) - 1)
    if len(align) != len(header) or any(len(row) != len(header) for row in rows):
        raise ValueError(f"markdown_table: rows and align must have {len(header)} columns as the header")
    rule = "|".join("---:" if letter == "r" else "---" for letter in align)
    lines = ["| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def estimate(mean: float, stderr: float, *, percent: bool = True) -> str:
    """A mean with its standard error, in percent: "93.3 ± 3.2"; "n/a" where there is none."""
    if math.isnan(mean):
        return "n/a"
    scale = 100.0 if percent else 1.0
    text = f"{scale * mean:.1f}"
    return text if math.isnan(stderr) else f"{text} ± {scale * stderr:.1f}"


def seconds(value: float) -> str:
    """A time in the unit that suits it: "1.24 s", "8.3 ms", "640 us"."""
    if value >= 1.0:
        return f"{value:.2f} s"
    if value >= 1e-3:
        return f"{1e3 * value:.1f} ms"
    return f"{1e6 * value:.0f} us"


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _cut(text: str, limit: int) -> str:
    return text if not limit or len(text) <= limit else text[: limit - 3].rstrip() + "..."


def _width(text: str) -> int:
    """Columns on a terminal: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int, align: str) -> str:
    blanks = " " * (width - _width(text))
    return blanks + text if align == "r" else text + blanks
