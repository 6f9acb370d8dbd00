"""The library of the CUDA kernels as nvcc compiles it, run on a CPU: its host code, and its kernels' PTX.

The emulator of `support.emulated` compiles the sources with a C++ compiler, so that what stands behind `#ifdef` for a
GPU (the inline assembly) and what nvcc makes of the rest are not looked at there. Here nvcc compiles everything; only
CUDA's runtime is replaced (`runtime.cpp`), and a kernel is translated from PTX to C++ (`translate.py`) when it is first
launched.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rlsedit_kernels.backends import cuda
from support.emulated import CannotEmulate, ptx_architecture, uses_ptx
from support.ptx import module, translate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
SOURCES = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "ptx"
MACHINE = ("machine.cpp", "profile.cpp", "runtime.cpp")
LIBRARIES = ("-ltorch_cpu", "-lc10", "-ldl")

_COMPILE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def _compiler(name: str, variable: str) -> str:
    found = shutil.which(os.environ.get(variable, name))
    if found is None:
        raise CannotEmulate(f"{name} was not found")
    return found


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{command[0]} failed:\n{done.stderr[-4000:]}")


def _built(target: Path, inputs: Iterable[Path | str], build: Callable[[Path], None], *, alone: bool = False) -> Path:
    """`target` with a digest of its inputs in its name; built once, also beside other processes.

    alone: those of other inputs go. Of a kernel there may be several, compiled for several kinds of arguments.
    """
    digest = hashlib.sha256()
    for item in inputs:
        digest.update(item.read_bytes() if isinstance(item, Path) else item.encode())
    path = target.with_name(f"{target.stem}-{digest.hexdigest()[:16]}{target.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f"{target.stem}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            for stale in path.parent.glob(f"{target.stem}-*{target.suffix}") if alone else ():
                stale.unlink()
            building = path.with_suffix(".building")
            build(building)
            building.rename(path)
    return path


def compile_library() -> Path:
    """The library, its kernels as PTX, linked with what stands for CUDA's runtime.

    Raises:
        CannotEmulate: a compiler is not here.
    """
    nvcc, link = _compiler("nvcc", "CUDACXX"), _link()
    package = Path(torch.__file__).parent
    architecture = ptx_architecture()
    objects = BUILD / f"objects_{architecture}"
    to_ptx = [nvcc, "-c", f"-arch=compute_{architecture}", f"-code=compute_{architecture}", "--no-compress"]
    to_ptx += ["-std=c++17", "-O3", "-DNDEBUG", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    to_ptx += [f'-DRLSEDIT_CUDA_ARCHITECTURES="{architecture}-virtual"', "-isystem", str(package / "include")]
    to_ptx += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-lineinfo"]

    def build(target: Path) -> None:
        objects.mkdir(parents=True, exist_ok=True)
        sources = sorted(SOURCES.glob("*.cu"))
        outputs = [str(objects / f"{path.stem}.o") for path in sources]
        commands = [[*to_ptx, str(path), "-o", output] for path, output in zip(sources, outputs, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_call, commands))
        _call([*link, *outputs, *LIBRARIES, "-o", str(target)])

    inputs = [torch.__version__, str(to_ptx), str(link), *_files()]
    return _built(BUILD / f"library_{architecture}.so", inputs, build, alone=True)


def compile_machine() -> Path:
    """What stands for CUDA's runtime alone: with the library its kernels would take the place of the emulated ones.

    Raises:
        CannotEmulate: a compiler is not here.
    """
    link = _link()

    def build(target: Path) -> None:
        _call([*link, *LIBRARIES, "-o", str(target)])

    return _built(BUILD / "machine.so", [torch.__version__, str(link), *_files()], build, alone=True)


def _link() -> list[str]:
    command = [_compiler("g++", "CXX"), "-std=c++17", "-O1", "-march=native", "-fPIC", "-shared"]
    command += ["-fvisibility=hidden", f"-I{SOURCES}", f"-I{HERE}", f"-L{Path(torch.__file__).parent / 'lib'}"]
    return [*command, *(str(HERE / name) for name in MACHINE)]


def _files() -> list[Path]:
    return sorted({*SOURCES.rglob("*.[ch]*"), *HERE.glob("*.h"), *(HERE / name for name in MACHINE)})


def compile_kernel(kernel: module.Kernel) -> Path:
    """A library with `ptx_kernel`, the kernel in C++; while there is a profile (`profile.py`), one that counts."""
    source = translate.cpp(kernel)
    name = hashlib.sha256(kernel.name.encode()).hexdigest()[:12]
    command = [_compiler("g++", "CXX"), "-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-shared"]
    command += ["-w", f"-I{HERE}", *(["-DPTX_PROFILE"] if counting else []), "-x", "c++"]

    def build(target: Path) -> None:
        text = target.with_suffix(".cpp")
        text.write_text(source)
        _call([*command, str(text), "-o", str(target)])
        text.unlink()

    return _built(
        BUILD / "kernels" / f"{'counting_' if counting else ''}{name}.so",
        [str(command), source, HERE / "instructions.h"],
        build,
    )


@cache
def _modules(ptx: str) -> dict[str, module.Kernel]:
    return module.kernels(ptx)


counting = False
"""Whether kernels are compiled to count what they do; `profile.counted` says so."""

_changes: list[Callable[[str], str]] = []


@_COMPILE
def _compile(ptx: int, length: int, name: bytes) -> int | None:
    try:
        text = ctypes.string_at(ptx, length).rstrip(b"\0").decode()
        kernel = _modules(text)[name.decode()]
        for change in _changes:
            kernel = replace(kernel, text=change(kernel.text))
        return ctypes.CDLL(str(compile_kernel(kernel)))._handle
    except Exception as error:  # a callback has nobody to raise to
        print(f"{name.decode()}: {type(error).__name__}: {error}", file=sys.stderr)
        return None


@cache
def machine() -> ctypes.CDLL:
    """The library, loaded so that kernels find what their threads do together."""
    path = compile_library() if uses_ptx() else compile_machine()
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    library.ptx_set_compiler(_compile)
    return library


@contextmanager
def changed(change: Callable[[str], str]) -> Iterator[None]:
    """Kernels of the library have a mistake, say: `change` is given their PTX."""
    _changes.append(change)
    machine().ptx_forget()
    try:
        yield
    finally:
        _changes.remove(change)
        machine().ptx_forget()


def launch(
    handle: int, grid: tuple[int, ...], threads: int, shared: int, arguments: Sequence[Any], name: str = "kernel"
) -> None:
    """A kernel by the handle of its library (`compile_kernel`), with ctypes values as its parameters.

    Raises:
        RuntimeError: it does what a GPU does not allow, or waits for ever.
    """
    pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
    run = machine().ptx_launch
    run.restype = ctypes.c_char_p
    sizes = (ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid)))
    failure = run(ctypes.c_void_p(handle), name.encode(), sizes, threads, ctypes.c_size_t(shared), pointers)
    if failure is not None:
        raise RuntimeError(failure.decode())


def load() -> Path:
    """The kernels, loaded for the dispatch key CPU of the private namespace.

    Raises:
        CannotEmulate: a compiler is not here.
    """
    path = compile_library()
    available, reason = cuda.load_library(path, path, "CPU")
    assert available, reason
    machine()
    return path
