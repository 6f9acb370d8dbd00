"""--text, and the second moments that the commands which edit measure on it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from rlsedit.models import Adapter
    from rlsedit.report import Console

__all__ = ["add_text", "measured", "read_given"]


def add_text(parser: argparse._ActionsContainer) -> None:
    """--text."""
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help="UTF-8 text, plain or .gz, on which the second moments are measured (default: the prose of Python's "
        "documentation)",
    )  # fmt: skip


def read_given(file: Path | None, name: str = "--text") -> list[str] | None:
    """The paragraphs of a text, read before a model is loaded, since a file may be no text; None where none is given.

    Raises:
        FileNotFoundError, ValueError: naming the option.
    """
    from rlsedit.texts import read_text

    if file is None:
        return None
    if not file.exists():
        raise FileNotFoundError(f"{name}: no file {file}")
    try:
        return read_text(file)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def measured(
    console: Console, adapter: Adapter, tokenizer: Any, layers: Iterable[int], texts: list[str] | None
) -> dict[int, Tensor]:
    """Second moments (d, d) of the inputs of `layers`, measured on `texts` or taken from the cache.

    Args:
        console: shows that it is being done.
        adapter, tokenizer: of the model.
        layers: edited layers.
        texts: paragraphs; None for the prose that ships with Python.
    """
    from rlsedit.moments import second_moments
    from rlsedit.paths import cache_dir
    from rlsedit.texts import installed_prose

    with console.bar("second moments of the layer inputs", None):
        texts = installed_prose() if texts is None else texts
        folder = cache_dir("moments")
        return second_moments(adapter.model, tokenizer, sorted(set(layers)), texts, cache_dir=folder, adapter=adapter)
