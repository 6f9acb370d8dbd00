"""`python -m rlsedit` is the command `rlsedit`."""

from __future__ import annotations

import sys

__all__ = ["run"]


def run() -> int:
    """Runs the command line; Ctrl-C while it is being imported is no traceback either."""
    try:
        from rlsedit.cli import main
    except KeyboardInterrupt:
        sys.stderr.write("rlsedit: interrupted; nothing has begun\n")
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(run())
