"""PTX as text: the kernels of a module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


class Unknown(Exception):
    """Something of PTX that is not translated; the text names it."""


@dataclass
class Kernel:
    """An `.entry` of a PTX module."""

    name: str
    text: str
    """From the parameters to the end of the body."""
    module: str
    """The module in front of its kernels: variables in shared memory."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Names of source files by number, where the module was compiled with `-lineinfo`."""

    @property
    def most_threads(self) -> int:
        found = re.search(r"\.(?:max|req)ntid\s+(\d+)", self.text)
        return int(found.group(1)) if found else 1024


def kernels(ptx: str) -> dict[str, Kernel]:
    """The kernels of a PTX module by name."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]*)"', ptx, flags=re.MULTILINE))
    ptx = re.sub(r"//[^\n]*|^\s*\.file\s[^\n]*", "", ptx, flags=re.MULTILINE)
    ptx = re.sub(r"^\s*\.loc\s[^\n]*", lambda line: line[0].replace(",", " ") + ";", ptx, flags=re.MULTILINE)
    starts = [match.start() for match in re.finditer(r"(?:\.visible\s+)?\.entry\s", ptx)]
    if not starts:
        return {}
    module = ptx[: starts[0]]
    found = {}
    for start, end in zip(starts, [*starts[1:], len(ptx)], strict=True):
        text = ptx[start:end]
        name = re.match(r"(?:\.visible\s+)?\.entry\s+([\w$]+)", text).group(1)  # type: ignore[union-attr]
        found[name] = Kernel(name, text[: _end(text)], module, files)
    return found


def _end(text: str) -> int:
    """Behind the brace that closes the first one."""
    depth = 0
    for match in re.finditer(r"[{}]", text):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.end()
    raise Unknown("a kernel without an end")
