"""Races of the CUDA kernels, found on a CPU: the emulated kernels under ThreadSanitizer.

`csrc/cuda/host/fibers.h` says what orders two threads there: barriers of a block or a warp, release and acquire between
blocks, and launches; a shuffle or a product of the tensor cores does not. Every pair of accesses without an order is
reported, whatever its result was. Blocks run beside each other, in both orders.

`python -m support.races [OP ...]` with `tests/helpers` on the path runs them where the runtime is loaded already;
`python -m support.races --barriers` lets each barrier of the sources order nothing, in turns, and prints which are
missed (half an hour).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rlsedit_kernels.backends import cuda
from support import emulated, kernel_cases


def runtime() -> str:
    """ThreadSanitizer's runtime, which has to be loaded before anything else.

    Raises:
        CannotEmulate: there is none here.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise emulated.CannotEmulate("there is no C++ compiler")
    found = subprocess.run([compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        raise emulated.CannotEmulate("the compiler has no ThreadSanitizer")
    return str(path.resolve())


def watched(command: list[str]) -> tuple[str, list[str]]:
    """What a Python command prints, and the races of the libraries that it loads, a text each.

    Raises:
        CannotEmulate: ThreadSanitizer is not there, or does not run here.
        AssertionError: the command failed.
    """
    options = "exitcode=66 history_size=1"
    environment = {**os.environ, "LD_PRELOAD": runtime(), "TSAN_OPTIONS": options, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[1]), str(emulated.ROOT), os.environ.get("PYTHONPATH", "")]
    )
    for fixed in ([], ["setarch", "-R"]):  # it wants its memory at addresses that randomisation may have taken
        done = subprocess.run(
            [*fixed, sys.executable, *command], capture_output=True, text=True, env=environment, check=False
        )
        if "FATAL: ThreadSanitizer" not in done.stderr or shutil.which("setarch") is None:
            break
    if "FATAL: ThreadSanitizer" in done.stderr:
        raise emulated.CannotEmulate(done.stderr.strip().splitlines()[0])
    found = re.findall(r"^WARNING: ThreadSanitizer: .*?^SUMMARY: .*?$", done.stderr, re.MULTILINE | re.DOTALL)
    assert done.returncode in (0, 66), done.stderr[-4000:]
    return done.stdout, found


def found_in(ops: list[str]) -> tuple[str, list[str]]:
    """What `python -m support.races` prints for some ops, and the races."""
    emulated.compile_kernels(races=True)  # by this process: a compiler does not like the runtime in itself
    return watched(["-m", "support.races", *ops])


def brief(race: str) -> str:
    """The lines of a report that say where, without the emulator's own."""
    lines = [line for line in race.splitlines() if re.search(r" of size |csrc/cuda/(?!host)|tests/cuda|SUMMARY", line)]
    return "\n".join(dict.fromkeys(line.strip() for line in lines))


# Leading dimensions, d and u: several tiles of keys and of d with edges, by 16 bytes and not, a walk that blocks share,
# more rows than go in at a time, a factor in shared and in global memory.
SIZES = {
    "gain_products": [((2,), 77, 21), ((), 132, 100), ((), 516, 5)],
    "key_products": [((2,), 77, 21), ((), 140, 130)],
    "cholesky": [((2,), 77, 1), ((), 200, 1)],
    "gain_solve": [((2,), 77, 21), ((), 70, 100), ((), 40, 200)],
    "downdate_": [((2,), 77, 21), ((), 132, 100)],
    "downdate_gain_products_": [((2,), 77, 21), ((), 136, 32)],
    "rls_update_": [((), 140, 40)],
    "qr_append_": [((2,), 77, 21), ((), 100, 131)],
    "qr_append_rhs_": [((), 100, 40)],
    "qr_gain": [((2,), 77, 21), ((), 165, 70)],
    "weight_update_": [((2,), 77, 21), ((), 140, 130)],
}


def cases(op: str) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Engine, leading dimensions, d and u: every engine at the first size, tf32x3 at all of them."""
    return [(name, *SIZES[op][0]) for name in kernel_cases.ENGINES] + [("tf32x3", *size) for size in SIZES[op][1:]]


def main(ops: list[str]) -> None:
    """Run the cases of ops in either order, blocks beside each other; print how many launches it took."""
    for op in ops or SIZES:
        for name, batch, d, u in cases(op):
            dtype, precision = kernel_cases.ENGINES[name]
            before = emulated.launches()
            for order in (emulated.descending, lambda: emulated.beside(3)):
                with order():
                    cuda.kernel(op)(*kernel_cases.arguments(op, dtype, batch, d, u), input_precision=precision)
            print(op, name, *batch, d, u, emulated.launches() - before, flush=True)


USERS = {
    "cholesky.cu": ("cholesky", "gain_solve"),
    "triangle.h": ("cholesky", "gain_solve"),
    "gain_solve.cu": ("gain_solve",),
    "downdate_.cu": ("downdate_",),
    "downdate_gain_products_.cu": ("downdate_gain_products_",),
    "tile.h": ("downdate_", "gain_products"),
    "qr_append_rhs_.cu": ("qr_append_", "qr_append_rhs_"),
    "reflectors.h": ("qr_append_",),
    "qr_gain.cu": ("qr_gain",),
    "dataflow.h": ("qr_append_", "qr_gain"),
}
"""Ops that run the barriers of a source."""


def barriers() -> Iterator[tuple[str, int, str]]:
    """Source, line and text of every barrier."""
    for source in USERS:
        for number, line in enumerate((emulated.SOURCES / source).read_text(encoding="utf-8").splitlines(), 1):
            if re.match(r"[^/]*__sync(threads|warp)\(\)", line):
                yield source, number, line.strip()


def missed() -> None:
    """Print for every barrier the races that there are where it orders nothing."""
    for source, number, line in barriers():
        os.environ["RLSEDIT_UNORDERED"] = f"{source}:{number}"
        counts = {}
        for op in USERS[source]:
            counts[op] = len(found_in([op])[1])
            if counts[op]:
                break
        print(f"{source}:{number}", "missed:" if any(counts.values()) else "NOT MISSED:", counts, line, flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--barriers"]:
        missed()
    else:
        emulated.load()
        main(sys.argv[1:])
