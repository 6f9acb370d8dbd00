"""`rlsedit methods`: the editing methods there are."""

from __future__ import annotations

import argparse

NAME = "methods"
HELP = "list the editing methods"
DESCRIPTION = "List the editing methods, each with its source."
EXAMPLES = ("rlsedit methods",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none of its own."""


def run(_: argparse.Namespace) -> int:
    """Prints names and summaries."""
    from rlsedit.methods import get_method, list_methods
    from rlsedit.report import Console, table

    rows = [(name, get_method(name).summary) for name in list_methods()]
    Console().line(table(("method", "what it does"), rows, align="ll"))
    return 0
