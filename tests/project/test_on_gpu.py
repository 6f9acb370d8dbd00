"""`bench/on_gpu.py` on steps of its own: what hangs is killed whole, what fails is said, what has no time is left."""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
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


def test_what_is_about_the_library_is_left_where_its_build_failed(on_gpu: ModuleType, tmp_path: Path) -> None:
    steps = {
        "build": on_gpu.Step(["-c", "raise SystemExit(1)"], 60, 0.1),
        "tests": on_gpu.Step(["-c", ""], 60, 0.1),
        "triton": on_gpu.Step(["-c", "print('compiled')"], 60, 0.1, library=False),
    }
    log = io.StringIO()
    assert on_gpu.execute(steps, 100.0, log) == 1
    assert "left: --steps tests\n" in log.getvalue()
    assert "== tests" not in log.getvalue()
    assert "\ncompiled\n" in log.getvalue()
    assert {name for name, step in on_gpu.plan(tmp_path).items() if not step.library} == {"triton", "tune"}


def test_kernels_run_under_the_sanitizer_where_there_is_one(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "memcheck" not in on_gpu.plan(tmp_path)
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "sanitizes with $2"\nexit 9\n', encoding="utf-8")
    tool.chmod(0o755)
    steps = on_gpu.plan(tmp_path)
    assert list(steps)[-2:] == ["memcheck", "tune"]
    assert "-n" not in steps["memcheck"].arguments  # what a worker does is not looked at
    assert "memcheck" not in on_gpu.plan(tmp_path, pretended=True)
    log = io.StringIO()
    assert on_gpu.execute({"memcheck": steps["memcheck"]}, 100.0, log) == 1
    assert "sanitizes with memcheck\n" in log.getvalue()
    assert "failed (9)" in log.getvalue()


SAYS = """
import sys, time
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("2 failed before that")
"""


def test_a_step_whose_time_is_over_says_what_it_has_found(on_gpu: ModuleType) -> None:
    """Tests print their failures in the end: one that were killed at once would leave dots."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = io.StringIO()
    assert on_gpu.execute({"tests": on_gpu.Step(["-c", SAYS], 6.0, 0.1)}, 100.0, log) == 1
    assert "2 failed before that\n" in log.getvalue()
    assert "killed: it took too long" in log.getvalue()
    assert "left" not in log.getvalue()  # a second call would give it no more time


def test_what_the_limit_cut_short_is_left(on_gpu: ModuleType) -> None:
    log, sleeps = io.StringIO(), ["-c", "import time; time.sleep(60)"]
    steps = {"short": on_gpu.Step(sleeps, 600, 0.1), "used": on_gpu.Step(["-c", "raise SystemExit(75)"], 60, 0.0)}
    assert on_gpu.execute(steps, 2.0, log) == 1
    assert "left: --steps short" in log.getvalue()
    log = io.StringIO()
    assert on_gpu.execute({"used": steps["used"]}, 100.0, log) == 1
    assert "not all of it: its time was used up\n" in log.getvalue()
    assert "left: --steps used\n" in log.getvalue()


def test_a_long_output_leaves_its_beginning_and_its_end(on_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of more than 16 MiB does not come back from every machine."""
    monkeypatch.setattr(on_gpu, "LOGGED", 1000)
    log = io.StringIO()
    code = "for i in range(1000): print('line', i)"
    assert on_gpu.execute({"talks": on_gpu.Step(["-c", code], 60, 0.1)}, 100.0, log) == 0
    said = log.getvalue().splitlines()
    assert len(log.getvalue()) < 2500
    assert [line for line in ("line 0", "line 1", "line 998", "line 999") if line not in said] == []
    (cut,) = (line for line in said if line.endswith("lines are left out here]"))
    before, after = (int(said[said.index(cut) + step].split()[1]) for step in (-1, 1))
    assert after - before - 1 == int(cut[1:].split()[0])


def test_how_a_step_ended_is_said_before_the_next_one(on_gpu: ModuleType) -> None:
    """All of it may be killed from outside, and its end never be said."""
    log = io.StringIO()
    on_gpu.execute({name: on_gpu.Step(["-c", ""], 60, 0.1) for name in ("one", "two")}, 100.0, log)
    lines = [line.split()[0] for line in log.getvalue().splitlines()]
    assert lines == ["==", "one", "==", "two", "==", "one", "two"]


def test_a_step_that_keeps_what_it_has_is_told_its_time(on_gpu: ModuleType) -> None:
    log = io.StringIO()
    step = on_gpu.Step(["-c", "import sys; print(sys.argv[1:])"], 600, 0.1, budget=True)
    assert on_gpu.execute({"bench": step}, 130.0, log) == 0
    assert "['--budget', '100']" in log.getvalue()


def test_what_outlives_its_kill_is_not_waited_for(on_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that sits in the driver behind a kernel which hangs: the other steps are worth the time."""
    monkeypatch.setattr(on_gpu, "_kill", lambda *_: None)
    monkeypatch.setattr(on_gpu, "GRACE", 0.2)
    steps = {"stuck": on_gpu.Step(["-c", "import time; time.sleep(5)"], 0.5, 0.1)}
    log, begin = io.StringIO(), time.monotonic()
    assert on_gpu.execute(steps, 100.0, log) == 1
    assert time.monotonic() - begin < 4.0
    assert "stuck was killed and has not ended" in log.getvalue()


def test_a_second_call_builds_first(on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was given back in between is bare: without a build, plain torch alone would be measured."""
    asked: list[list[str]] = []
    monkeypatch.setattr(on_gpu, "execute", lambda steps, limit, log: asked.append(list(steps)) or 0)
    for more in ([], ["--pretend-cuda"]):
        on_gpu.main(["--out", str(tmp_path), "--steps", "bench", "--commit", "abc", *more])
    assert asked == [["build", "bench"], ["bench"]]
    assert on_gpu.plan(tmp_path, commit="abc")["bench"].arguments[-2:] == ["--commit", "abc"]


def test_a_second_call_is_told_what_the_first_one_measured(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(on_gpu, "execute", lambda steps, limit, log: asked.append(list(steps["bench"].arguments)) or 0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        on_gpu.main(["--out", "out", "--steps", "bench", "--resume", "gpu.json"])
    (tmp_path / "gpu.json").touch()
    on_gpu.main(["--out", "out", "--steps", "bench", "--resume", "gpu.json"])
    assert asked[0][-2:] == ["--resume", str(tmp_path / "gpu.json")]


LOSES = """
import pytest, torch

@pytest.mark.parametrize("i", range(6))
def test_some(i, monkeypatch):
    if i == 2:
        def fails(*_):
            raise RuntimeError("an illegal memory access")
        torch.cuda.synchronize = fails
        fails()
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2", "--max-worker-restart", "4"]])
def test_a_test_that_loses_the_gpu_fails_no_other(workers: list[str], tmp_path: Path) -> None:
    """Behind an illegal access every call of its process fails: tests must not."""
    file = tmp_path / "test_lost.py"
    file.write_text(LOSES, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-rpfE", "-p", "no:cacheprovider", "-p", "conftest", *workers]
    command += ["-c", str(ROOT / "pyproject.toml"), "--device", "cuda", "--pretend-cuda", str(file)]
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if "CannotEmulate" in said:
        pytest.skip("CUDA kernels on the CPU: there is no C++ compiler")
    assert done.returncode != 0
    assert "the GPU is lost behind" in said
    summary = said.partition("short test summary")[2]
    assert summary.count("PASSED") == (5 if workers else 2), said
    assert {line.split()[1] for line in summary.splitlines() if line.startswith(("FAILED", "ERROR"))} == {
        "::test_some[2]"
    }
    assert "an illegal memory access" in summary
