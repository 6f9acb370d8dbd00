"""Tables of a Markdown text, read as a renderer reads them: a bar begins a cell unless a backslash is before it."""

from __future__ import annotations

import re


def tables(text: str) -> list[list[list[str]]]:
    """Rows of cells of each table, the rule left out.

    Raises:
        AssertionError: a row has not as many cells as the header, or there is no rule below it.
    """
    found = []
    for block in re.findall(r"(?:^[ ]*\|.*\n?)+", text, re.MULTILINE):
        rows = [_cells(line) for line in block.strip().splitlines()]
        assert len(rows) > 1, f"a header alone: {block}"
        assert all(re.fullmatch(r":?-{3,}:?", cell) for cell in rows[1]), f"no rule below the header: {block}"
        for row in rows:
            assert len(row) == len(rows[0]), f"{len(row)} cells below {len(rows[0])} titles: {row}"
        found.append([rows[0], *rows[2:]])
    return found


def _cells(line: str) -> list[str]:
    line = line.strip()
    assert line.endswith("|"), line
    assert not line.endswith("\\|"), line
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line[1:-1])]
