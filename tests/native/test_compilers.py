"""The kernels of the product engine by other compilers: with sanitizers, by clang, and for AArch64 under an emulator.

They are checked against plain loops by a program of their own (engine_trial.cpp), without torch and Python.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*sorted((ROOT / "csrc" / "cpu").glob("engine*.cpp")), Path(__file__).with_name("engine_trial.cpp")]
STRICT = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-fno-math-errno", f"-I{ROOT / 'csrc' / 'cpu'}")
# All engines that this processor has are compiled in.
HERE = ("-march=native",) if platform.machine() == "x86_64" else ()
SANITIZED = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *HERE)


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


def run(command: list[str], engine: str = "") -> str:
    """The engine that was used; fails where a kernel is wrong or a sanitizer objects."""
    environment = {**os.environ, "RLSEDIT_CPU_ENGINE": engine, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip()


def test_no_kernel_leaves_its_operands_or_what_the_language_defines(tmp_path: Path) -> None:
    compiler, target = program(os.environ.get("CXX", ""), "c++", "g++"), tmp_path / "trial"
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n", encoding="utf-8")
    try:
        compile_with(compiler, tmp_path / "empty", *SANITIZED, sources=[empty])
    except AssertionError as error:
        pytest.skip(f"{compiler} has no sanitizers: {error}")
    compile_with(compiler, target, *SANITIZED)
    used = {run([str(target)], engine) for engine in ("", "avx2", "baseline")}
    assert "baseline" in used


def test_clang_makes_the_same_engine(tmp_path: Path) -> None:
    compile_with(program("clang++"), tmp_path / "trial", "-O3", *HERE)
    for engine in ("", "avx2", "baseline"):
        run([str(tmp_path / "trial")], engine)


def test_on_aarch64_the_vectors_of_every_processor_serve(tmp_path: Path) -> None:
    compiler = program("aarch64-linux-gnu-g++")
    emulator = program("qemu-aarch64-static", "qemu-aarch64")
    compile_with(compiler, tmp_path / "trial", "-O3", "-static")
    assert run([emulator, str(tmp_path / "trial")], "avx2") == "baseline"
