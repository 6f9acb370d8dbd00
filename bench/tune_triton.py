"""Times candidate tiles of the Triton kernels on this GPU and prints the best rows of each for the tuning table.

Candidates are compiled first, by several processes at once, at a small size of the same divisibility, so that the
timing finds them in Triton's cache; one that does not compile or does not fit in shared memory is left out. Each is
timed twice, then the best and the present row take turns. Nothing is written: a row goes into the table
(`triton_kernels/tuning.py`) by hand, with the device it was measured on. What fails is said and the run goes on.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager

import checkout  # noqa: F401
import torch
from gpu_bench import Problem, seconds, wake
from harness import arguments

from rlsedit_kernels import triton_kernels
from rlsedit_kernels.triton_kernels import tuning
from rlsedit_kernels.triton_kernels.tuning import Tiles

SIZES = {"few": 8, "many": 100}
MOST_SUMS = 64
"""Running sums of a thread: as many again hold the products of a step, and a thread has 255 registers."""

FINALISTS = 5
"""Candidates that take turns in the end."""


def candidates(kernel: str, size: str) -> Iterator[Tiles]:
    """Powers of two around the present row, without those that only spill or differ in what the kernel ignores."""
    keys, depths, stages = (16, 32) if size == "few" else (32, 64, 128), (16, 32, 64), (2, 3, 4)
    if kernel in ("downdate_", "gain_solve"):
        keys, depths = (16, 32, 64), (32,)
    if kernel == "downdate_gain_products_":
        keys, depths, stages = (16, 32) if size == "few" else (128,), (16, 32), (1, 2)
    for rows, k, depth, warps, s in itertools.product((32, 64, 128), keys, depths, (4, 8), stages):
        widest = {"downdate_": rows, "downdate_gain_products_": max(rows, k)}.get(kernel, k)
        if rows * widest <= MOST_SUMS * 32 * warps:
            yield Tiles(rows, k, depth, warps, s)


def call_of(kernel: str, p: Problem) -> Callable[[], object]:
    """The op that the kernel is the heart of, on operands that are there: nothing else is timed."""
    if kernel == "gain_products":
        return lambda: triton_kernels.gain_products(p.C, p.K)
    Y = p.K.mT.contiguous()
    if kernel == "downdate_":
        return lambda: triton_kernels.downdate_(p.C, Y, -1e-6)
    if kernel == "downdate_gain_products_":
        return lambda: triton_kernels.downdate_gain_products_(p.C, Y, p.K, -1e-6)
    G = p.K @ Y
    return lambda: triton_kernels.gain_solve(Y, G, 1.0)


@contextmanager
def chosen(tiles: Tiles) -> Iterator[None]:
    """Every kernel has these tiles."""
    kept = tuning.tiles
    tuning.tiles = lambda *_, **__: tiles
    try:
        yield
    finally:
        tuning.tiles = kept


def compiled(kernel: str, size: str, tiles: Tiles, d: int, device: str, until: float) -> str:
    """In a process of its own: compile; what went wrong, or nothing."""
    if time.time() > until:
        return "not compiled: the time for it is used up"
    try:
        with chosen(tiles):
            call_of(kernel, Problem(512 + d % 256, SIZES[size], 16, device))()
    except Exception as failure:  # too much shared memory, or Triton cannot compile it: no candidate
        return f"{type(failure).__name__}: {failure}".splitlines()[0][:120]
    return ""


def _pretend() -> None:
    from support import pretended_cuda

    pretended_cuda.install()


def present_row(kernel: str, size: str) -> Tiles:
    """What the table has."""
    return tuning.tiles(kernel, torch.empty(0), SIZES[size])


def planned(options: argparse.Namespace) -> list[tuple[str, str, Tiles]]:
    """The present row of each kernel and size, then its candidates; all in turns, should the time not last."""
    groups = []
    for kernel, size in itertools.product(options.kernels, SIZES):
        present = present_row(kernel, size)
        tiles = itertools.islice(dict.fromkeys([present, *candidates(kernel, size)]), options.most)
        groups.append([(kernel, size, each) for each in tiles])
    return [job for turn in itertools.zip_longest(*groups) for job in turn if job is not None]


def prepared(jobs: list[tuple[str, str, Tiles]], options: argparse.Namespace) -> list[tuple[str, str, Tiles]]:
    """The jobs that compile, in their order."""
    begin, good = time.monotonic(), set()
    start = _pretend if options.pretend_cuda else None
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"), start) as pool:
        until = time.time() + options.compile_budget
        futures = {pool.submit(compiled, *job, options.d, options.device, until): job for job in jobs}
        for future in as_completed(futures):
            try:
                failure = future.result()
            except Exception as error:  # its process died
                failure = f"{type(error).__name__}: {error}"
            if failure:
                print(f"{futures[future]}: {failure}", file=sys.stderr, flush=True)
            else:
                good.add(futures[future])
    print(f"{len(good)} of {len(jobs)} compiled in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    return [job for job in jobs if job in good]


def ranked(
    kernel: str, problem: Problem, tiles: Iterable[Tiles], present: Tiles, repetitions: int, device: str, until: float
) -> list[tuple[float, Tiles]]:
    """Median seconds of the best tiles and of the present ones, the fastest first."""
    run, first = call_of(kernel, problem), {}

    def once(each: Tiles) -> float:
        with chosen(each):
            return seconds(run, device)

    for each in tiles:
        if time.monotonic() > until:
            break
        try:
            once(each)  # not counted
            first[each] = min(once(each) for _ in range(2))
        except Exception as failure:
            print(f"{kernel} {each}: {type(failure).__name__}: {failure}", file=sys.stderr, flush=True)
    last = sorted(first, key=lambda each: first[each])[:FINALISTS]
    last += [present] if present in first and present not in last else []
    times: dict[Tiles, list[float]] = {each: [] for each in last}
    for _ in range(repetitions):
        for each in last:
            times[each].append(once(each))
    return sorted(((statistics.median(found), each) for each, found in times.items()), key=lambda pair: pair[0])


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--d", type=int, default=14336)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="the current GPU, or a check without")
    parser.add_argument("--kernels", nargs="+", default=sorted({key[0] for key in tuning._TABLE}))
    parser.add_argument("--most", type=int, default=1000, help="candidates of each kernel and size")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile at the same time")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds after which nothing more is timed")
    parser.add_argument("--compile-budget", type=float, default=240.0, help="seconds after which none is compiled")
    parser.add_argument("--pretend-cuda", action="store_true", help="a rehearsal, with TRITON_INTERPRET=1 and --d 48")
    options = parser.parse_args()
    if options.pretend_cuda:
        _pretend()
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here")
    until = time.monotonic() + options.budget
    jobs = planned(options)
    ready = prepared(jobs, options)
    if options.device == "cuda":
        wake(min(options.d, 4096))
    for kernel, size in itertools.product(options.kernels, SIZES):
        problem = Problem(options.d, SIZES[size], 16, options.device)
        tiles, present = [job[2] for job in ready if job[:2] == (kernel, size)], present_row(kernel, size)
        found = ranked(kernel, problem, tiles, present, options.repetitions, options.device, until)
        for place, (median, each) in enumerate(found):
            if place < 3 or each == present:
                note = ", the present row" if each == present else ""
                print(f'("{kernel}", "cuda", 4, "{size}"): {each},  # {1e3 * median:.3f} ms{note}', flush=True)


if __name__ == "__main__":
    main()
