"""What does a batch of edits cost on a GPU, beside AlphaEdit's solve and plain torch, and how far from the floors?

Device events, the back ends and their rivals taking turns, medians with spread; beside each time its error against
float64 and the floor from bytes and flops (docs/cuda.md). What fails is recorded with its message and the run goes on;
what hangs ends it, with what was measured until then. Kernels that wait for each other (appends) come last.
`--device cpu` with small sizes runs the same code anywhere, for checking the benchmark itself; `--emulate-cuda` adds
the CUDA kernels under their emulator, and `--pretend-cuda` makes of that a GPU with events and graphs.
"""

from __future__ import annotations

import os
import sys
import time

import checkout  # noqa: F401
import gpu_cases
import torch
from gpu_bench import BYTES, FLOPS, Bench, wake
from harness import arguments, report

import rlsedit_kernels as rk
from rlsedit_kernels.backends.precision import ieee_products

SECTIONS = ("ceilings", "updates", "parts", "factors", "layers", "appends")
"""Of a run, in this order: kernels that wait for each other at the end."""


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="the current GPU, or a check without")
    parser.add_argument("--d", type=int, default=14336)
    parser.add_argument("--u", type=int, nargs="+", default=[100, 1])
    parser.add_argument("--v", type=int, default=4096)
    parser.add_argument("--factors", type=int, nargs="*", default=[32, 64, 128, 256, 512])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--budget", type=float, default=450.0, help="seconds after which nothing more is started")
    parser.add_argument("--hang", type=float, default=90.0, help="seconds of one call after which the run ends")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections, for a second run")
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
    bench = Bench(options.device, options.repetitions, options.budget, target=options.json)
    card = torch.cuda.get_device_name() if options.device == "cuda" else "none"

    def finish() -> None:
        bench.section(gpu_cases.targets, options.d, options.u, options.factors)
        settings = {
            "gpu": card,
            "cuda": torch.version.cuda,
            "d": options.d,
            "v": options.v,
            "dtype": "float32",
            "tf32 of torch": torch.backends.cuda.matmul.fp32_precision == "tf32",
            "floors": f"{BYTES / 1e12:g} TB/s, {FLOPS / 1e12:g} TFLOP/s",
            "back ends": {row.name: row.reason or "available" for row in rk.backends()},
            "seconds": round(time.monotonic() - bench.begin, 1),
        }
        report("gpu", settings, bench.rows, options.json)

    def give_up() -> None:
        finish()
        sys.stdout.flush()
        os._exit(1)  # the interpreter would wait for the device

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
                bench.section(getattr(gpu_cases, name if name in given else "with_problem"), *arguments_of)
        finish()


if __name__ == "__main__":
    main()
