"""Builds, tests and measures all that needs a GPU, step by step, on a machine that is lent for minutes.

Needs the checkout and the packages of a usual CUDA image, no `make` and no index. Each step has a limit of its own and
is killed with all its processes when it is over, after a moment in which it may say what it has found; what fails or
hangs is said, and the run goes on. What does not fit into `--limit` any more, and what that cut short, is left for a
second call, whose `--steps` the last line names; it builds first, which takes moments where the build is still there,
and with `--resume` its measurements go on behind those of another call. What was printed is in OUT/gpu.log, but for the
middle of what is very long, the measurements in OUT/gpu.json. `--pretend-cuda` rehearses all of it without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent

SHOWN, WIDE = 30, 200
"""Lines of a step's output that are shown, the last ones, and characters of each: more is in the log."""

LOGGED = 800_000
"""Characters from the beginning of a step's output that are logged, and as many from its end."""

GRACE = 15.0
"""Seconds in which a step that was killed has ended, unless it sits in the driver behind a kernel that hangs."""

NOTICE = 15.0
"""Seconds before the end of its time at which a step is interrupted: tests then print the failures they have seen. What
does not answer, pytest gives up after 10."""

UNFINISHED = 75
"""Exit status of a step that ended by itself because its time was used up."""

QR = "qr_"
"""In the names of the tests of kernels whose blocks wait for each other."""


@dataclass(frozen=True)
class Step:
    """A command of this interpreter.

    Attributes:
        arguments: behind the interpreter.
        limit: seconds after which it is killed.
        least: seconds without which it is not begun.
        environment: what is set for it.
        budget: give it `--budget`, the seconds that there are for it: it ends by itself and keeps what it has.
        library: it is about the CUDA library, and there is no use in it where that could not be built.
        under: a program that runs the interpreter, with its options.
    """

    arguments: Sequence[str]
    limit: float
    least: float
    environment: Mapping[str, str] = field(default_factory=dict)
    budget: bool = False
    library: bool = True
    under: Sequence[str] = ()


def plan(out: Path, pretended: bool = False, commit: str | None = None, resume: Path | None = None) -> dict[str, Step]:
    """All steps by name, in the order in which they are worth their time."""
    there = importlib.util.find_spec
    workers = ["--dist", "worksteal", "--max-worker-restart", "8", "-n", str(min(16, os.cpu_count() or 1))]
    # A kernel that hangs takes one worker with it, and after a few of them the rest of the tests is given up.
    alone = ["-m", "pytest", "--device", "cuda", "-q", "-rfE", "-p", "no:cacheprovider"]
    pytest = alone + (workers if there("xdist") else [])
    pytest += ["--timeout", "120", "--timeout-method", "thread"] if there("pytest_timeout") and not pretended else []
    pytest += ["--pretend-cuda"] if pretended else []
    gpu = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*on_a_gpu.py"))
    if not there("transformers"):
        gpu = [path for path in gpu if not path.startswith(("tests/rlsedit", "tests/diagnostics", "tests/dropin"))]
    kernels = ["tests/ops", "tests/cuda/test_kernels.py"]
    path = os.pathsep.join(filter(None, ("python", os.environ.get("PYTHONPATH"))))
    one = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    interpreted = {**one, "TRITON_INTERPRET": "1"} if pretended else one
    small = ["--pretend-cuda", "--d", "48", "--u", "5", "1", "--v", "12", "--factors", "32", "--repetitions", "1"]
    named = ["--commit", commit] if commit else []
    named += ["--resume", str(resume)] if resume else []
    streams = ["--dk", "256", "--batch", "64", "--batches", "300"]
    steps = {
        "build": Step(["setup.py", "build_ext", "--inplace"], 400, 60, {"RLSEDIT_CUDA": "1"}),
        # Blocks that wait for each other first, briefly: should they hang, the rest of the tests does without them.
        "waiting": Step([*pytest, "tests/ops", "-k", f"cuda and {QR} and not triton"], 150, 30, one),
        "tests": Step([*pytest, *kernels, *gpu, "-k", "not triton"], 420, 60, one),
        "wgmma": Step(
            [*pytest, *kernels, "-k", "not triton and (products or rls_update_ or weight)"],
            240,
            45,
            {**one, "RLSEDIT_CUDA_WGMMA": "1"},
        ),
        "bench": Step(
            ["bench/gpu.py", "--json", str(out / "gpu.json"), *named, *(small if pretended else [])],
            500,
            120,
            one if pretended else {},
            budget=True,
        ),
        # Some 400 variants are compiled, a quarter of an hour of one process.
        "triton": Step(
            [*pytest, "tests/ops", "tests/triton_kernels", "-k", "triton"], 560, 120, interpreted, library=False
        ),
        "stability": Step(
            ["-m", "rlsedit", "stability", "--device", "cuda", *streams, "--out", str(out / "gpu_stability")],
            200,
            45,
            {"PYTHONPATH": path},
        ),
        "tune": Step(["bench/tune_triton.py"], 560, 150, {}, budget=True, library=False),
    }
    if (sanitizer := _of_cuda("compute-sanitizer")) is not None and not pretended:
        # Accesses outside of what was allocated, which may well leave results right. torch asks for what some drivers
        # refuse: those errors are not meant.
        options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9", "--print-limit", "20"]
        tune = steps.pop("tune")
        steps["memcheck"] = Step(
            [*alone, "tests/cuda/test_kernels.py", "-k", "not triton"], 300, 90, one, under=[sanitizer, *options]
        )
        steps["tune"] = tune
    if pretended:  # nothing is built, the command line knows no pretended GPU, and an emulator takes its time
        kept = (name for name in steps if name not in ("build", "stability", "tune"))
        steps = {name: replace(steps[name], limit=8 * steps[name].limit) for name in kept}
    return steps


def _of_cuda(name: str) -> str | None:
    """A tool of CUDA's toolkit, on the path or where toolkits are installed."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=os.path.join(home, "bin"))


def run(name: str, step: Step, seconds: float, log: TextIO) -> int:
    """Exit status of a step that may take so many seconds; 124 where it took longer and was interrupted or killed."""
    command = [*step.under, sys.executable, *step.arguments]
    if step.budget:
        command += ["--budget", str(round(max(seconds - 30.0, 20.0)))]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    _say(f"== {name}: {shlex.join([*step.under, *command[len(step.under) + 1 :]])} (at most {seconds:.0f} s)", log)
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # all that it starts is killed with it
    )
    printed = Printed(log)

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            printed.add(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    notice, status = min(NOTICE, seconds / 4), 124
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = child.wait(timeout=seconds - notice)
        if status == 124:
            _kill(child, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=notice)
    finally:
        _kill(child)
    try:
        child.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:  # the pipe stays open too: nobody waits for it
        _say(f"{name} was killed and has not ended", log)
    reader.join(GRACE)
    printed.end()
    return status


class Printed:
    """A step's output: logged, but for the middle of what is very long, and its last lines shown in the end."""

    def __init__(self, log: TextIO) -> None:
        self.log, self.size, self.left_out = log, 0, 0
        self.shown: deque[str] = deque(maxlen=SHOWN)
        self.late: deque[str] = deque()
        self.late_size = 0

    def add(self, line: str) -> None:
        self.shown.append(line)
        self.size += len(line)
        if self.size <= LOGGED:
            self.log.write(line)
            self.log.flush()
            return
        self.late.append(line)
        self.late_size += len(line)
        while self.late_size > LOGGED:
            self.late_size -= len(self.late.popleft())
            self.left_out += 1

    def end(self) -> None:
        if self.left_out:
            self.log.write(f"[{self.left_out} lines are left out here]\n")
        self.log.writelines(tuple(self.late))
        self.log.flush()
        sys.stdout.writelines(f"{line.rstrip()[:WIDE]}\n" for line in tuple(self.shown))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of log and results")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds of all steps together")
    parser.add_argument("--steps", help="some of them, comma-separated; all, unless told")
    parser.add_argument("--commit", help="of this checkout, for the results, where git does not tell it")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="gpu.json of another call: measure what it lacks")
    parser.add_argument("--pretend-cuda", action="store_true", help="a rehearsal without a GPU")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    if options.resume is not None and not options.resume.is_file():
        parser.error(f"--resume: no file {options.resume}")
    steps = plan(out, options.pretend_cuda, options.commit, options.resume and options.resume.resolve())
    wanted = options.steps.split(",") if options.steps else list(steps)
    if unknown := [name for name in wanted if name not in steps]:
        parser.error(f"--steps: expected some of {', '.join(steps)}, got {', '.join(unknown)}")
    wanted.append("build")  # on a machine that is new, the last call's is gone
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands would ignore it
    with (out / "gpu.log").open("a", encoding="utf-8") as log:
        return execute({name: steps[name] for name in steps if name in wanted}, options.limit, log)


def execute(steps: Mapping[str, Step], limit: float, log: TextIO) -> int:
    """Run them one after the other and say how each ended; 0 where all were run and none failed."""
    until = time.monotonic() + limit
    rows, failed, left = [], [], []
    for name, step in steps.items():
        rest = until - time.monotonic()
        if rest < min(step.least, step.limit) or ("build" in failed and step.library):
            left.append(name)
            continue
        if "waiting" in failed and "-k" in step.arguments:  # time-outs of what hangs would use up all that is left
            step = replace(step, arguments=[*step.arguments[:-1], f"({step.arguments[-1]}) and not {QR}"])
        begin, given = time.monotonic(), min(step.limit, rest)
        status = run(name, step, given, log)
        rows.append(f"{name:10} {time.monotonic() - begin:6.0f} s  {_ended(status)}")
        if status == UNFINISHED or (status == 124 and given < step.limit):
            left.append(name)
        failed += [name] if status else []
        _say(rows[-1], log)  # should all of this be killed from outside
    _say("== how it ended", log)
    for row in rows:
        _say(row, log)
    if left:
        _say(f"left: --steps {','.join(left)}", log)
    return 1 if failed or left else 0


def _ended(status: int) -> str:
    known = {0: "ok", 124: "killed: it took too long", UNFINISHED: "not all of it: its time was used up"}
    return known.get(status, f"failed ({status})")


def _kill(child: subprocess.Popen[str], how: signal.Signals = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, and so have those that it started
        os.killpg(child.pid, how)


def _say(text: str, log: TextIO) -> None:
    print(text, flush=True)
    log.write(text + "\n")
    log.flush()


if __name__ == "__main__":
    sys.exit(main())
