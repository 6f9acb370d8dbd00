"""Text on which second moments are measured: a user's file, or the prose that ships with Python."""

from __future__ import annotations

import ast
import gzip
import os
import random
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["installed_prose", "paragraphs", "read_text"]

_SENTENCE = re.compile(r"[.!?][\"')]?$")
_FROM_ONE_MODULE = 12  # paragraphs, so that no module dominates


def read_text(path: str | os.PathLike[str]) -> list[str]:
    """The paragraphs of a UTF-8 text file (gzipped if its name ends in ``.gz``), which blank lines separate.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no text or holds none.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{file}: a folder, needs a text file")
    data = file.read_bytes()
    if file.name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file}: not a whole gzip file: {error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8: {error.reason} at byte {error.start}") from None
    found = [block.strip() for block in re.split(r"\n[ \t]*\n", text) if block.strip()]
    if not found:
        raise ValueError(f"{file}: no text in this file")
    return found


def paragraphs(text: str, *, least: int = 200, letters: float = 0.93) -> Iterator[str]:
    """Yields the paragraphs of `text` that read like prose, each on one line.

    Args:
        text: any text; blank lines separate its paragraphs.
        least: shortest paragraph, in characters.
        letters: smallest share of letters and blanks; tables and code have less.
    """
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        plain = sum(c.isalpha() or c == " " for c in line)
        if len(line) >= least and plain >= letters * len(line) and _SENTENCE.search(line):
            yield line


def installed_prose(tokens: int = 30_000, seed: int = 0) -> list[str]:
    """English prose that ships with Python: the language reference of `pydoc` and the docstrings of the library.

    Args:
        tokens: about this many tokens in all, at 4.5 characters each; at least 1.
        seed: fixes which modules are read and in which order.

    Returns:
        Paragraphs; the same for the same Python and seed.

    Raises:
        ValueError: if there is hardly any, as where Python was installed without its sources.
    """
    budget = round(4.5 * tokens)
    rng = random.Random(seed)
    found: list[str] = []
    for paragraph in _prose(rng):
        if budget <= 0:
            break
        found.append(paragraph)
        budget -= len(paragraph) + 2
    if sum(map(len, found)) < 2 * tokens:
        raise ValueError("installed_prose: the documentation of Python is not installed here; give a text file instead")
    return found


def _prose(rng: random.Random) -> Iterator[str]:
    """One module's docstrings after the other, every fourth time a paragraph of the reference, no line twice."""
    reference = list(dict.fromkeys(_reference()))
    rng.shuffle(reference)
    seen: set[str] = set()
    for text in _docstrings(rng):
        fresh = list(dict.fromkeys(p for p in paragraphs(text) if p not in seen))
        if not fresh:
            continue
        fresh = rng.sample(fresh, min(_FROM_ONE_MODULE, len(fresh)))
        if reference:
            fresh.append(reference.pop())
        seen.update(fresh)
        yield from fresh
    yield from reversed(reference)


def _reference() -> list[str]:
    try:
        from pydoc_data import topics
    except ImportError:
        return []
    return [p for name in sorted(topics.topics) for p in paragraphs(topics.topics[name])]


def _docstrings(rng: random.Random) -> Iterator[str]:
    """The docstrings of each module of the standard library, in one text a module; tests are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
    files = [f for f in root.rglob("*.py") if not skipped.intersection(f.relative_to(root).parts)]
    files.sort(key=lambda f: f.relative_to(root).as_posix())
    rng.shuffle(files)
    for file in files:
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes)]
        yield "\n\n".join(text for text in texts if text)
