"""What does a batch of edits cost on a GPU, beside AlphaEdit's solve and plain torch, and how far from the floors?

Device events, the back ends and their rivals taking turns, medians with spread; beside each time its error against
float64, the floor from bytes and flops (docs/cuda.md), and what the call costs the host. What fails or hangs is
recorded and the run goes on, in a new process where that took the GPU away from this one. The file has at any time what
was measured until then; where the time was used up the exit status is 75, and `--resume` goes on behind such a file.
Kernels that wait for each other (appends) come last.
`--device cpu` with small sizes runs the same code anywhere, for checking the benchmark itself; `--emulate-cuda` adds
the CUDA kernels under their emulator, and `--pretend-cuda` makes of that a GPU with events and graphs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

import checkout  # noqa: F401
import gpu_cases
import torch
from gpu_bench import BYTES, FLOPS, Bench, wake, works
from harness import arguments, report, result_of, write
from on_gpu import UNFINISHED

import rlsedit_kernels as rk
from rlsedit_kernels.backends.precision import ieee_products

SECTIONS = ("ceilings", "updates", "parts", "factors", "layers", "appends")
"""Of a run, in this order: kernels that wait for each other at the end."""


MOST_PROCESSES = 8
"""That may follow each other, each behind a failure that took the GPU away from the one before, or behind a hang."""


def follow(words: list[str]) -> None:
    """The command anew in the place of this process, with other words behind it, and nothing of its hold on the GPU."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the folder itself is closed by now
            if int(name) > 2:
                os.set_inheritable(int(name), False)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *words])


def main() -> int:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="the current GPU, or a check without")
    parser.add_argument("--d", type=int, default=14336)
    parser.add_argument("--u", type=int, nargs="+", default=[100, 1])
    parser.add_argument("--v", type=int, default=4096)
    parser.add_argument("--factors", type=int, nargs="*", default=[32, 64, 128, 256, 512])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--budget", type=float, default=450.0, help="seconds after which nothing more is started")
    parser.add_argument("--hang", type=float, default=90.0, help="seconds of one call that is given up then")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections, for a second run")
    parser.add_argument("--commit", help="of this checkout, where git does not tell it")
    parser.add_argument("--resume", type=Path, help="result of a run that did not end: measure what it lacks")
    parser.add_argument("--begun", type=float, nargs=2, help=argparse.SUPPRESS)  # when, and how many processes
    parser.add_argument("--emulate-cuda", action="store_true", help="the CUDA kernels under their emulator")
    parser.add_argument("--pretend-cuda", action="store_true", help="a rehearsal on a pretended GPU, with small sizes")
    options = parser.parse_args()
    if options.pretend_cuda:
        from support import pretended_cuda

        pretended_cuda.install()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu with small sizes checks the benchmark itself")
    if options.emulate_cuda:
        from support import emulated

        emulated.install()
    bench = Bench(options.device, options.repetitions, options.budget)
    card = torch.cuda.get_device_name() if options.device == "cuda" else "none"
    begun, before = options.begun or (time.time(), 0.0)
    if earlier := options.json if before else options.resume:
        bench.take(json.loads(earlier.read_text(encoding="utf-8"))["rows"])
    if before:
        bench.begin -= time.time() - begun

    def settings(finished: bool) -> dict[str, object]:
        return {
            "gpu": card,
            "cuda": torch.version.cuda,
            "d": options.d,
            "v": options.v,
            "dtype": "float32",
            "tf32 of torch": torch.backends.cuda.matmul.fp32_precision == "tf32",
            "floors": f"{BYTES / 1e12:g} TB/s, {FLOPS / 1e12:g} TFLOP/s",
            "back ends": {row.name: row.reason or "available" for row in rk.backends()},
            "seconds": round(time.monotonic() - bench.begin, 1),
            "finished": finished,
        }

    def targets() -> list[dict[str, object]]:
        return gpu_cases.targets(bench, options.d, options.u, options.factors)

    def keep(finished: bool = False) -> None:
        if options.json:
            result = result_of("gpu", settings(finished), [*bench.rows, *targets()])
            if options.commit:
                result["machine"]["commit"] = options.commit
            write(result, options.json)

    def end(finished: bool) -> None:
        keep(finished)
        report("gpu", settings(finished), bench.rows, None)
        report("gpu", settings(finished), targets(), None)  # last, and with columns of its own: a screen shows it whole
        sys.stdout.flush()

    def go_on() -> None:
        """A new process does what is left, where there may be one more."""
        if not options.json or before >= MOST_PROCESSES:
            return
        keep()
        words = sys.argv[: sys.argv.index("--begun")] if "--begun" in sys.argv else sys.argv
        print("the GPU is lost to this process; a new one goes on", file=sys.stderr, flush=True)
        follow([*words, "--begun", str(begun), str(before + 1)])

    def look() -> None:
        """Behind a failure: does the GPU still answer this process?"""
        if options.device == "cuda" and not works():
            go_on()

    def give_up() -> None:
        go_on()
        end(False)
        os._exit(1)  # the interpreter would wait for the device

    bench.keep, bench.failed = keep, look
    if options.device == "cuda":
        bench.watch(options.hang, give_up)
    given = {
        "ceilings": [(options.d,)],
        "factors": [(options.factors,)],
        "layers": [(max(options.d // 4, 16), options.u[0])],
    }
    with ieee_products():  # rivals too, whatever an image sets in TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
        if options.device == "cuda":
            wake(min(options.d, 4096))
        for name in (name for name in SECTIONS if name in options.only):
            for arguments_of in given.get(name, [(name, options.d, u, options.v) for u in options.u]):
                bench.section(name, getattr(gpu_cases, name if name in given else "with_problem"), *arguments_of)
        end(bench.finished())
    return 0 if bench.finished() else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
