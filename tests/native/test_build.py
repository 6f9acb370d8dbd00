"""setup.py where something is missing: the installation goes on and the reason is kept."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parents[2]
NOTE = Path("rlsedit_kernels") / "_native_build.txt"
CUDA_NOTE = Path("rlsedit_kernels") / "_cuda_build.txt"


def build(
    target: Path, source: Path = ROOT, python: Path = Path(sys.executable), **environment: str
) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` of `source` into `target`."""
    command = [
        str(python),
        "setup.py",
        "build_ext",
        "--build-lib",
        str(target),
        "--build-temp",
        str(target / "temp"),
    ]
    return subprocess.run(
        command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """An interpreter whose environment has no programs beside it."""
    venv.create(tmp_path / "bare", symlinks=True, with_pip=False)
    return tmp_path / "bare" / "bin" / "python"


def packages() -> str:
    """Where setuptools and torch are, for an environment that has neither."""
    return os.pathsep.join({str(Path(module.__file__).parents[1]) for module in (setuptools, torch)})


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What is compiled, in a folder of its own."""
    copy = tmp_path / "a checkout"
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    (copy / "rlsedit_kernels").mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "rlsedit_kernels/_version.py"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"RLSEDIT_SKIP_NATIVE": "1"}, "skipped at installation by RLSEDIT_SKIP_NATIVE"),
        ({"CXX": "/nonexistent/c++"}, "configuring with CMake failed"),
        ({"PATH": "/nonexistent"}, "configuring with CMake failed"),
    ],
    ids=["skipped", "no-compiler", "no-path"],
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


def test_without_cmake_the_installation_goes_on_and_says_why(tmp_path: Path, bare_python: Path) -> None:
    done = build(tmp_path, python=bare_python, PATH="/nonexistent", PYTHONPATH=packages())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / NOTE).read_text(encoding="utf-8") == "cmake was not found (pip install cmake ninja)\n"


def test_without_ninja_and_make_the_reason_names_both(tmp_path: Path, bare_python: Path) -> None:
    cmake = shutil.which("cmake")
    assert cmake is not None
    (bare_python.parent / "cmake").write_text(f'#!/bin/sh\nexec "{cmake}" "$@"\n', encoding="utf-8")
    (bare_python.parent / "cmake").chmod(0o755)
    assert build(tmp_path, python=bare_python, PATH="/nonexistent", PYTHONPATH=packages()).returncode == 0
    assert "a compiler of C++17, and ninja or make" in (tmp_path / NOTE).read_text(encoding="utf-8")


def test_elsewhere_than_on_linux_and_macos_the_native_parts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    script = runpy.run_path(str(ROOT / "setup.py"))
    script["check_wanted"](None)
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        with pytest.raises(script["CannotBuild"], match=r"for Linux and macOS; elsewhere .* plain torch"):
            script["check_wanted"](None)


def test_cmake_is_found_beside_the_interpreter(tmp_path: Path, bare_python: Path) -> None:
    """A pip of an environment that is not activated does not put its programs on the path."""
    (bare_python.parent / "cmake").write_text(
        "#!/bin/sh\necho 'error: this is the cmake' >&2; exit 1\n", encoding="utf-8"
    )
    (bare_python.parent / "cmake").chmod(0o755)
    assert build(tmp_path, python=bare_python, PYTHONPATH=packages()).returncode == 0
    assert "this is the cmake" in (tmp_path / NOTE).read_text(encoding="utf-8")


def test_what_an_uninstalled_torch_leaves_behind_is_no_torch(tmp_path: Path, bare_python: Path) -> None:
    only = tmp_path / "only"
    (only / "torch" / "lib").mkdir(parents=True)
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        if (found := Path(setuptools.__file__).parents[1] / name).is_dir():
            (only / name).symlink_to(found)
    done = build(tmp_path, python=bare_python, PYTHONPATH=str(only))
    assert done.returncode == 0, done.stderr
    assert "torch is not installed" in (tmp_path / NOTE).read_text(encoding="utf-8")


def test_a_folder_that_was_moved_and_other_flags_are_configured_anew(tmp_path: Path, checkout: Path) -> None:
    """CMake refuses a cache made for another folder, and goes on with the compiler and the flags of its first time."""
    target = checkout / "build"
    assert build(target, checkout, RLSEDIT_CUDA="0", CXXFLAGS="-Werror -Dnamespace=first").returncode == 0
    assert "compiling failed" in (why := (target / NOTE).read_text(encoding="utf-8"))
    assert "error:" in why
    assert "first" in why
    target = checkout.rename(tmp_path / "moved") / "build"
    assert build(target, tmp_path / "moved", RLSEDIT_CUDA="0", CXXFLAGS="-Dnamespace=second").returncode == 0
    assert "compiling failed" in (why := (target / NOTE).read_text(encoding="utf-8"))
    assert "second" in why


def test_the_library_does_without_the_build_info(tmp_path: Path, checkout: Path) -> None:
    """Headers of Python or of pybind11 that do not fit took the kernels with them."""
    for source in (checkout / "csrc" / "cpu").glob("*.cpp"):
        source.write_text("", encoding="utf-8")  # what the library holds is no matter here
    (checkout / "csrc" / "info" / "info.cpp").write_text("#error no such header\n", encoding="utf-8")
    package = tmp_path / "build" / "rlsedit_kernels"
    package.mkdir(parents=True)
    (package / "_info.of.an.older.build.so").touch()
    done = build(package.parent, checkout, RLSEDIT_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert (package / "_C_cpu.so").is_file(), (package / NOTE.name).read_text(encoding="utf-8")
    assert not (package / NOTE.name).exists()
    assert not list(package.glob("_info*.so"))


def test_the_reason_names_the_compiler_that_is_not_there(tmp_path: Path) -> None:
    build(tmp_path, CXX="/nonexistent/c++", RLSEDIT_CUDA="0")
    assert "/nonexistent/c++" in (tmp_path / NOTE).read_text(encoding="utf-8")


def test_another_nvcc_does_not_stand_in_for_the_one_asked_for(tmp_path: Path, bare_python: Path) -> None:
    """A compiler that was chosen for its version is not replaced by whatever is on the path."""
    (bare_python.parent / "nvcc").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    (bare_python.parent / "nvcc").chmod(0o755)
    build(
        tmp_path,
        CXX="/nonexistent/c++",
        CUDACXX="/nonexistent/nvcc",
        CUDA_HOME=str(bare_python.parents[1]),
        PATH=str(bare_python.parent),
    )
    assert "CUDACXX is /nonexistent/nvcc" in (tmp_path / CUDA_NOTE).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["RLSEDIT_SKIP_NATIVE", "RLSEDIT_REQUIRE_NATIVE", "RLSEDIT_CUDA"])
def test_a_switch_is_0_or_1(tmp_path: Path, name: str) -> None:
    done = build(tmp_path, **{"RLSEDIT_SKIP_NATIVE": "1", name: "off"})
    assert done.returncode != 0
    assert f"{name} must be 0, 1 or empty, got 'off'" in done.stderr
    assert not (tmp_path / "rlsedit_kernels").exists()
