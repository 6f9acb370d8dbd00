"""`bench/on_gpu.py` on steps of its own: what hangs is killed whole, what fails is said, what has no time is left."""

from __future__ import annotations

import importlib
import io
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("on_gpu")


def test_what_the_steps_name_is_there(on_gpu: ModuleType, tmp_path: Path) -> None:
    for pretended in (False, True):
        steps = on_gpu.plan(tmp_path, pretended)
        for step in steps.values():
            for path in (a for a in step.arguments if a.startswith(("tests/", "bench/", "setup"))):
                assert (ROOT / path).exists(), path
        assert [path for path in steps["tests"].arguments if path.endswith("on_a_gpu.py")]


def test_a_step_that_hangs_is_killed_with_what_it_has_started(on_gpu: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    late = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    hangs = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {late!r}])"
    steps = {"hangs": on_gpu.Step(["-c", hangs], 1.5, 0.1), "other": on_gpu.Step(["-c", "print('there')"], 60, 0.1)}
    log, begin = io.StringIO(), time.monotonic()
    assert on_gpu.execute(steps, 100.0, log) == 1
    said = log.getvalue()
    assert "begun" in said
    assert "killed: it took too long" in said
    assert "there" in said
    assert "left" not in said
    time.sleep(max(0.0, begin + 5.0 - time.monotonic()))
    assert not mark.exists()


def test_what_has_no_time_is_left_for_a_second_call(on_gpu: ModuleType) -> None:
    steps = {"short": on_gpu.Step(["-c", ""], 60, 0.1), "long": on_gpu.Step(["-c", "print('run')"], 900, 500)}
    log = io.StringIO()
    assert on_gpu.execute(steps, 60.0, log) == 1
    assert "left: --steps long" in log.getvalue()
    assert "\nrun\n" not in log.getvalue()
    assert on_gpu.execute({"short": steps["short"]}, 60.0, io.StringIO()) == 0


def test_behind_blocks_that_hang_the_other_tests_do_without_them(on_gpu: ModuleType) -> None:
    fails, shows = ["-c", "raise SystemExit(3)"], ["-c", "import sys; print(sys.argv[1:])", "-k", "not triton"]
    environment = {"OMP_NUM_THREADS": "1"}
    steps = {"waiting": on_gpu.Step(fails, 60, 0.1), "tests": on_gpu.Step(shows, 60, 0.1, environment)}
    log = io.StringIO()
    assert on_gpu.execute(steps, 100.0, log) == 1
    assert "failed (3)" in log.getvalue()
    assert "['-k', '(not triton) and not qr_']" in log.getvalue()


def test_nothing_else_is_tested_where_the_build_failed(on_gpu: ModuleType) -> None:
    steps = {"build": on_gpu.Step(["-c", "raise SystemExit(1)"], 60, 0.1), "tests": on_gpu.Step(["-c", ""], 60, 0.1)}
    log = io.StringIO()
    assert on_gpu.execute(steps, 100.0, log) == 1
    assert "left: --steps tests" in log.getvalue()
    assert "== tests" not in log.getvalue()


def test_a_step_that_keeps_what_it_has_is_told_its_time(on_gpu: ModuleType) -> None:
    log = io.StringIO()
    step = on_gpu.Step(["-c", "import sys; print(sys.argv[1:])"], 600, 0.1, budget=True)
    assert on_gpu.execute({"bench": step}, 130.0, log) == 0
    assert "['--budget', '100']" in log.getvalue()
