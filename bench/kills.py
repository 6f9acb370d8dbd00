"""200 kills (SIGKILL) of a real editing process, with comparison of bits: `python bench/kills.py [--count N]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from support.kills import main

if __name__ == "__main__":
    raise SystemExit(main())
