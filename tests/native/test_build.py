"""setup.py where something is missing: the installation goes on and the reason is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTE = Path("rlsedit_kernels") / "_native_build.txt"
CUDA_NOTE = Path("rlsedit_kernels") / "_cuda_build.txt"


def build(target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` into `target`."""
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(target),
        "--build-temp",
        str(target / "temp"),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"RLSEDIT_SKIP_NATIVE": "1"}, "skipped at installation by RLSEDIT_SKIP_NATIVE"),
        ({"CXX": "/nonexistent/c++"}, "configuring with CMake failed"),
        ({"PATH": "/nonexistent"}, "cmake was not found"),
    ],
    ids=["skipped", "no-compiler", "no-cmake"],
)
def test_the_installation_goes_on_and_says_why(tmp_path: Path, environment: dict[str, str], why: str) -> None:
    done = build(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert why in (tmp_path / NOTE).read_text(encoding="utf-8")
    assert not (tmp_path / "rlsedit_kernels" / "_C_cpu.so").exists()


def test_the_cuda_library_has_a_reason_of_its_own(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="/nonexistent/c++", RLSEDIT_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / CUDA_NOTE).read_text(encoding="utf-8") == "skipped at installation by RLSEDIT_CUDA=0\n"
    assert not (tmp_path / "rlsedit_kernels" / "_C_cuda.so").exists()


def test_the_cuda_library_can_be_required(tmp_path: Path) -> None:
    done = build(
        tmp_path, CXX="/nonexistent/c++", CUDACXX="/nonexistent/nvcc", CUDA_HOME="/nonexistent", RLSEDIT_CUDA="1"
    )
    assert done.returncode != 0
    assert "nvcc, the CUDA compiler, was not found" in done.stderr


def test_it_can_be_required(tmp_path: Path) -> None:
    done = build(tmp_path, RLSEDIT_REQUIRE_NATIVE="1", CXX="/nonexistent/c++")
    assert done.returncode != 0
    assert "configuring with CMake failed" in done.stderr
