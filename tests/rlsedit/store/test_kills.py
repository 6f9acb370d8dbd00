"""A process that is killed at any instant loses no edit; 200 of them: `python bench/kills.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = int(os.environ.get("KILLS", "8"))


@pytest.mark.slow
def test_killed_processes_are_followed_to_the_same_bits() -> None:
    path = os.pathsep.join(part for part in sys.path if part)
    script = Path(__file__).resolve().parents[3] / "bench" / "kills.py"
    run = subprocess.run(
        [sys.executable, str(script), "--count", str(COUNT), "--seed", "7"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout, run.stderr
    result = json.loads(run.stdout[run.stdout.index("{") :])
    assert result["wrong"] == []
    assert sum(result["kills"].values()) >= COUNT
    assert result["kills"].get("at a step of a commit", 0) > 0
