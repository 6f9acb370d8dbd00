"""The native CPU library by other compilers: with sanitizers, by clang, and for AArch64 under an emulator.

The kernels of its product engine are checked against plain loops by a program of their own (engine_trial.cpp); the ops,
with their threads, run in another one (ops_trial.cpp). Neither needs torch or Python.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from rlsedit_kernels.backends import cpu
from rlsedit_kernels.ops.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]
ENGINES = sorted((ROOT / "csrc" / "cpu").glob("engine*.cpp"))
TRIAL = Path(__file__).with_name("engine_trial.cpp")
SOURCES = [*ENGINES, TRIAL]
OPS = [*sorted({*(ROOT / "csrc" / "cpu").glob("*.cpp")} - {*ENGINES}), Path(__file__).with_name("ops_trial.cpp")]
COUNT = len(SCHEMAS | cpu.HELPERS)
STRICT = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-fno-math-errno", f"-I{ROOT / 'csrc' / 'cpu'}")
# All engines that this processor has are compiled in.
HERE = ("-march=native",) if platform.machine() == "x86_64" else ()
SANITIZED = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *HERE)
THREADS = ("-O1", "-g1", "-fsanitize=thread")  # threads share work alike on every engine: the oldest serves
OF_TORCH = ("csrc/stable/library.h", "csrc/stable/ops.h", "csrc/stable/tensor.h", "headeronly/core/ScalarType.h",
            "headeronly/util/Exception.h")  # fmt: skip


def program(*names: str) -> str:
    """The first of these that is on the path; the test is skipped where none is."""
    for name in names:
        if name and (found := shutil.which(name)):
            return found
    pytest.skip(f"none of {', '.join(filter(None, names))} is on the path")


def compile_with(compiler: str, target: Path, *flags: str, sources: list[Path] = SOURCES) -> None:
    command = [compiler, *STRICT, *flags, *map(str, sources), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def without_torch(folder: Path) -> str:
    """The flag with which torch's headers are those of `without_torch.h`."""
    for name in OF_TORCH:
        (folder / "torch" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "torch" / name).write_text(f'#include "{Path(__file__).with_name("without_torch.h")}"\n')
    return f"-I{folder}"


def check_sanitizer(compiler: str, folder: Path, flags: tuple[str, ...]) -> None:
    """Skip the test where the compiler does not have it, or its programs do not run here."""
    source, target = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n", encoding="utf-8")
    try:
        compile_with(compiler, target, *flags, sources=[source])
        run([str(target)])
    except AssertionError as error:
        pytest.skip(f"{compiler} has no sanitizers: {error}")


def run(command: list[str], engine: str = "") -> str:
    """The engine that was used; fails where a kernel is wrong or a sanitizer objects."""
    environment = {**os.environ, "RLSEDIT_CPU_ENGINE": engine, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The product engine, compiled with sanitizers."""
    compiler, folder = program(os.environ.get("CXX", ""), "c++", "g++"), tmp_path_factory.mktemp("engines")
    check_sanitizer(compiler, folder, SANITIZED)
    objects = [folder / f"{path.stem}.o" for path in ENGINES]
    for path, target in zip(ENGINES, objects, strict=True):
        compile_with(compiler, target, *SANITIZED, "-c", sources=[path])
    return objects


def test_no_kernel_leaves_its_operands_or_what_the_language_defines(engines: list[Path], tmp_path: Path) -> None:
    compiler, target = program(os.environ.get("CXX", ""), "c++", "g++"), tmp_path / "trial"
    compile_with(compiler, target, *SANITIZED, sources=[*engines, TRIAL])
    used = {run([str(target)], engine) for engine in ("", "avx2", "baseline")}
    assert "baseline" in used


@pytest.mark.slow
def test_no_op_leaves_its_tensors(engines: list[Path], tmp_path: Path) -> None:
    compiler, target = program(os.environ.get("CXX", ""), "c++", "g++"), tmp_path / "trial"
    compile_with(compiler, target, *SANITIZED, without_torch(tmp_path), sources=[*engines, *OPS])
    for engine in ("", "avx2", "baseline"):
        assert f"{COUNT} ops, " in run([str(target), "150000"], engine)


@pytest.mark.slow
def test_threads_of_an_op_wait_for_what_they_read(tmp_path: Path) -> None:
    """The threads are the program's own: ThreadSanitizer does not see how those of OpenMP wait for each other."""
    compiler, target = program(os.environ.get("CXX", ""), "c++", "g++"), tmp_path / "trial"
    check_sanitizer(compiler, tmp_path, THREADS)
    compile_with(compiler, target, *THREADS, without_torch(tmp_path), sources=[*ENGINES, *OPS])
    assert f"{COUNT} ops, " in run([str(target), "60000"])


def test_clang_makes_the_same_engine(tmp_path: Path) -> None:
    compile_with(program("clang++"), tmp_path / "trial", "-O3", *HERE)
    for engine in ("", "avx2", "baseline"):
        run([str(tmp_path / "trial")], engine)


def test_on_aarch64_the_vectors_of_every_processor_serve(tmp_path: Path) -> None:
    compiler = program("aarch64-linux-gnu-g++")
    emulator = program("qemu-aarch64-static", "qemu-aarch64")
    compile_with(compiler, tmp_path / "trial", "-O3", "-static")
    assert run([emulator, str(tmp_path / "trial")], "avx2") == "baseline"
