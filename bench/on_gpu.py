"""Builds, tests and measures all that needs a GPU, step by step, on a machine that is lent for minutes.

Needs the checkout and the packages of a usual CUDA image, no `make` and no index. Each step has a limit of its own and
is killed with all its processes when it is over; what fails or hangs is said, and the run goes on. What does not fit
into `--limit` any more is left for a second call, whose `--steps` the last line names; it builds first, which takes
moments where the build is still there. Everything that was printed is
in OUT/gpu.log, the measurements in OUT/gpu.json. `--pretend-cuda` rehearses all of it without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import shlex
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

SHOWN = 30
"""Lines of a step's output that are shown, the last ones: more is in the log."""

GRACE = 15.0
"""Seconds in which a step that was killed has ended, unless it sits in the driver behind a kernel that hangs."""

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
    """

    arguments: Sequence[str]
    limit: float
    least: float
    environment: Mapping[str, str] = field(default_factory=dict)
    budget: bool = False


def plan(out: Path, pretended: bool = False, commit: str | None = None) -> dict[str, Step]:
    """All steps by name, in the order in which they are worth their time."""
    there = importlib.util.find_spec
    workers = ["--dist", "worksteal", "--max-worker-restart", "8", "-n", str(min(16, os.cpu_count() or 1))]
    # A kernel that hangs takes one worker with it, and after a few of them the rest of the tests is given up.
    pytest = ["-m", "pytest", "--device", "cuda", "-q", "-rfE", "-p", "no:cacheprovider"]
    pytest += workers if there("xdist") else []
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
        "triton": Step([*pytest, "tests/ops", "tests/triton_kernels", "-k", "triton"], 560, 120, interpreted),
        "stability": Step(
            ["-m", "rlsedit", "stability", "--device", "cuda", *streams, "--out", str(out / "gpu_stability")],
            200,
            45,
            {"PYTHONPATH": path},
        ),
        "tune": Step(["bench/tune_triton.py"], 560, 150, {}, budget=True),
    }
    if pretended:  # nothing is built, the command line knows no pretended GPU, and an emulator takes its time
        kept = (name for name in steps if name not in ("build", "stability", "tune"))
        steps = {name: replace(steps[name], limit=8 * steps[name].limit) for name in kept}
    return steps


def run(name: str, step: Step, seconds: float, log: TextIO) -> int:
    """Exit status of a step that may take so many seconds; 124 where it took longer and was killed."""
    command = [sys.executable, *step.arguments]
    if step.budget:
        command += ["--budget", str(round(max(seconds - 30.0, 20.0)))]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    _say(f"== {name}: {shlex.join(command[1:])} (at most {seconds:.0f} s)", log)
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
    lines: deque[str] = deque(maxlen=SHOWN)

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            log.write(line)
            log.flush()
            lines.append(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    status = 124
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = child.wait(timeout=seconds)
    finally:
        _kill(child)
    try:
        child.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:  # the pipe stays open too: nobody waits for it
        _say(f"{name} was killed and has not ended", log)
    reader.join(GRACE)
    sys.stdout.writelines(tuple(lines))
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of log and results")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds of all steps together")
    parser.add_argument("--steps", help="some of them, comma-separated; all, unless told")
    parser.add_argument("--commit", help="of this checkout, for the results, where git does not tell it")
    parser.add_argument("--pretend-cuda", action="store_true", help="a rehearsal without a GPU")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    steps = plan(out, options.pretend_cuda, options.commit)
    wanted = options.steps.split(",") if options.steps else list(steps)
    if unknown := [name for name in wanted if name not in steps]:
        parser.error(f"--steps: expected some of {', '.join(steps)}, got {', '.join(unknown)}")
    wanted.append("build")  # on a machine that is new, the last call's is gone
    out.mkdir(parents=True, exist_ok=True)
    with (out / "gpu.log").open("a", encoding="utf-8") as log:
        return execute({name: steps[name] for name in steps if name in wanted}, options.limit, log)


def execute(steps: Mapping[str, Step], limit: float, log: TextIO) -> int:
    """Run them one after the other and say how each ended; 0 where all were run and none failed."""
    until = time.monotonic() + limit
    rows, failed, left = [], [], []
    for name, step in steps.items():
        rest = until - time.monotonic()
        if rest < min(step.least, step.limit):
            left.append(name)
            continue
        if "waiting" in failed and "-k" in step.arguments:  # time-outs of what hangs would use up all that is left
            step = replace(step, arguments=[*step.arguments[:-1], f"({step.arguments[-1]}) and not {QR}"])
        begin = time.monotonic()
        status = run(name, step, min(step.limit, rest), log)
        rows.append(f"{name:10} {time.monotonic() - begin:6.0f} s  {_ended(status)}")
        failed += [name] if status else []
        if name == "build" and status:
            left += [other for other in steps if other != name]  # every other step would test something else
            break
    _say("== how it ended", log)
    for row in rows:
        _say(row, log)
    if left:
        _say(f"left: --steps {','.join(left)}", log)
    return 1 if failed or left else 0


def _ended(status: int) -> str:
    return {0: "ok", 124: "killed: it took too long"}.get(status, f"failed ({status})")


def _kill(child: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, and so have those that it started
        os.killpg(child.pid, signal.SIGKILL)


def _say(text: str, log: TextIO) -> None:
    print(text, flush=True)
    log.write(text + "\n")
    log.flush()


if __name__ == "__main__":
    sys.exit(main())
