"""The CUDA kernels on a CPU: the same sources, compiled by the C++ compiler with an emulator of CUDA's execution.

`csrc/cuda/host/emulate.h` says what the emulator checks beyond results. `pytest tests/ops --emulate-cuda` runs the
tests of the ops on it, as the back end "cuda"; `tests/cuda` uses it without that option. With `--ptx` the emulator runs
what nvcc makes of the sources instead (`support.ptx`).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from rlsedit_kernels.backends import cuda, registry

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc" / "cuda"
_active: list[bool] = []
_ptx: list[str] = []


class CannotEmulate(Exception):
    """The kernels cannot be compiled for the CPU here; the text says why."""


def active() -> bool:
    """Whether `install` was called: the tests of the ops run on emulated kernels."""
    return bool(_active)


def use_ptx(architecture: str = "90a") -> None:
    """Before `load`: let the kernels be what nvcc compiles for an architecture."""
    _ptx.append(architecture)


def uses_ptx() -> bool:
    """Whether `use_ptx` was called."""
    return bool(_ptx)


def ptx_architecture() -> str:
    """What PTX is made for."""
    return _ptx[-1] if _ptx else "90a"


def compile_for_cpu(sources: list[Path], target: Path, *, with_torch: bool = True, races: bool = False) -> Path:
    """A shared library of CUDA sources for the CPU; once for the same sources, also beside other processes.

    With `races` it reports accesses that nothing orders; it loads where ThreadSanitizer's runtime is loaded first.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise CannotEmulate("there is no C++ compiler")
    package = Path(torch.__file__).parent
    command = [compiler, "-std=c++17", "-O1", "-march=native", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-pthread"]
    # Bound to itself, and at once: the machine that runs PTX has the same emulator in it, for all libraries to see.
    command += ["-Wl,-Bsymbolic-functions", "-Wl,-z,now"]
    command += ["-DRLSEDIT_EMULATE", f"-I{SOURCES}", "-Wno-unknown-pragmas"]
    command += ["-fsanitize=thread", "-g1"] if races else []
    command += ["-x", "c++", *map(str, sources)]
    if with_torch:
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem{package / 'include'}"]
        command += [f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10"]
    digest = hashlib.sha256(f"{torch.__version__} {command}".encode())
    for path in sorted({*SOURCES.rglob("*.[ch]*"), *sources}):
        digest.update(path.read_bytes())
    library = target.with_name(f"{target.name}-{digest.hexdigest()[:16]}.so")
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f"{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            for stale in library.parent.glob(f"{target.name}-*.so"):
                stale.unlink()
            building = library.with_suffix(".building")
            done = subprocess.run([*command, "-o", str(building)], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise AssertionError(f"the CUDA sources do not compile for the CPU:\n{done.stderr[-4000:]}")
            building.rename(library)
    return library


def compile_kernels(*, races: bool = False) -> Path:
    """All kernels as one library for the CPU."""
    name = "kernels_races" if races else "kernels"
    return compile_for_cpu(sorted(SOURCES.glob("*.cu")), ROOT / "build" / "emulated" / name, races=races)


@cache
def load() -> Path:
    """The emulated kernels, loaded for the dispatch key CPU of the private namespace.

    In a process that began with ThreadSanitizer's runtime (`support.races`) they report their races.

    Raises:
        CannotEmulate: there is no compiler.
    """
    if _ptx:
        from support.ptx import library as ptx

        return ptx.load()
    library = compile_kernels(races=hasattr(ctypes.CDLL(None), "__tsan_init"))
    available, reason = cuda.load_library(library, library, "CPU")
    assert available, reason
    return library


def install() -> None:
    """Let the back end "cuda" be the emulated kernels, on CPU tensors, when it is forced."""
    load()
    kernels = registry.Loaded(cuda.kernels("CPU"))
    table = tuple(
        replace(row, devices=frozenset({"cpu"}), load=lambda: kernels, automatic=False) if row.name == "cuda" else row
        for row in registry._TABLE
    )
    registry._TABLE = table
    registry._BY_NAME.update({row.name: row for row in table})
    registry._loaded.cache_clear()
    _active.append(True)


@contextmanager
def descending() -> Iterator[None]:
    """Blocks, warps and lanes run in descending order: what depends on it is a race, or needs a later block."""
    switch = ctypes.CDLL(str(load())).rlsedit_emulate_descending
    switch(1)
    try:
        yield
    finally:
        switch(0)


@contextmanager
def beside(blocks: int) -> Iterator[None]:
    """So many blocks are under way at a time: one that does not wait for what it reads shows as a difference."""
    switch = ctypes.CDLL(str(load())).rlsedit_emulate_beside
    switch(blocks)
    try:
        yield
    finally:
        switch(1)


class GPU(NamedTuple):
    """What the kernels ask of a device before they are launched."""

    most_shared: int
    """Bytes of shared memory that a block may have."""
    processors: int
    warpgroups: bool = False


GPUS = {
    "H200": GPU(227 * 1024, 132, True),
    "A100": GPU(163 * 1024, 108),
    "RTX 4090": GPU(99 * 1024, 128),
    "B200": GPU(227 * 1024, 148),
    "one multiprocessor": GPU(99 * 1024, 1),
}


@contextmanager
def gpu(given: GPU) -> Iterator[None]:
    """The kernels find this GPU; without it an H200."""
    switch = ctypes.CDLL(str(load())).rlsedit_emulate_gpu
    switch(*given)
    try:
        yield
    finally:
        switch(*GPUS["H200"])


def launches() -> int:
    """Kernels launched so far."""
    return int(ctypes.CDLL(str(load())).rlsedit_emulate_launches())
