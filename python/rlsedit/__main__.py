"""`python -m rlsedit` is the command `rlsedit`."""

import sys

from rlsedit.cli import main

if __name__ == "__main__":
    sys.exit(main())
