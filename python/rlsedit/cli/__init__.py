"""The command `rlsedit`."""

from rlsedit.cli.main import main

__all__ = ["main"]
