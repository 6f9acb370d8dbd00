"""Build of the native parts: CMake behind setuptools, and never in the way of an installation.

Everything declarative stands in pyproject.toml. Environment switches:

RLSEDIT_SKIP_NATIVE=1      install without the native parts
RLSEDIT_REQUIRE_NATIVE=1   fail when the native CPU library cannot be built (for continuous integration)
CXX, CXXFLAGS              the usual ones, honoured by CMake

Whatever prevents the build is written to `rlsedit_kernels/_native_build.txt`, from which
`rlsedit_kernels.backends()` takes its reason.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "rlsedit_kernels"
LIBRARY = "_C_cpu.so"
NOTE = "_native_build.txt"

logger = logging.getLogger("setup")


class CannotBuild(Exception):
    """The native parts cannot be built here; the text is the reason a user reads."""


def version() -> str:
    return str(runpy.run_path(str(ROOT / PACKAGE / "_version.py"))["__version__"])


def torch_location() -> tuple[Path, str]:
    """Directory and version of the torch whose headers are used, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild(
            "torch is not installed in the environment of the build; install torch first and then "
            "this package with --no-build-isolation"
        )
    directory = Path(next(iter(spec.submodule_search_locations)))
    found = runpy.run_path(str(directory / "version.py"))["__version__"]
    if tuple(int(part) for part in found.split(".")[:2]) < (2, 10):
        raise CannotBuild(f"torch {found} is older than 2.10, the first with the stable ABI that is used")
    if not (directory / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise CannotBuild(f"torch {found} was installed without its headers")
    return directory, str(found)


def pybind11_location() -> str | None:
    try:
        import pybind11
    except ImportError:
        return None
    return pybind11.get_cmake_dir()


class CMakeBuild(build_ext):
    """Configure and build with CMake; on failure leave the reason instead of the library."""

    def run(self) -> None:
        target = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        package = target / PACKAGE
        package.mkdir(parents=True, exist_ok=True)
        note = package / NOTE
        note.unlink(missing_ok=True)
        try:
            if os.environ.get("RLSEDIT_SKIP_NATIVE", "0") not in ("", "0"):
                raise CannotBuild("skipped at installation by RLSEDIT_SKIP_NATIVE")
            self.build_native(package)
        except CannotBuild as error:
            for stale in (package / LIBRARY, *package.glob("_info*.so")):  # they would hide the reason
                stale.unlink(missing_ok=True)
            note.write_text(f"{error}\n", encoding="utf-8")
            if os.environ.get("RLSEDIT_REQUIRE_NATIVE", "0") not in ("", "0"):
                raise
            logger.warning("%s: no native CPU library (%s); the torch fallback serves", PACKAGE, error)

    def build_native(self, package: Path) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise CannotBuild("cmake was not found")
        torch_dir, torch_version = torch_location()
        build = Path(self.build_temp).resolve() / "native"
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DTORCH_DIR={torch_dir}",
            f"-DTORCH_VERSION={torch_version}",
            f"-DRLSEDIT_VERSION={version()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
        ]
        if shutil.which("ninja"):
            configure.append("-GNinja")
        if (directory := pybind11_location()) is not None:
            configure.append(f"-Dpybind11_DIR={directory}")
        self.call(configure, "configuring with CMake failed (is there a C++ compiler?)")
        jobs = str(self.parallel or min(os.cpu_count() or 1, 8))
        self.call([cmake, "--build", str(build), "--parallel", jobs], "compiling failed")
        if not (package / LIBRARY).is_file():
            raise CannotBuild(f"the build left no {LIBRARY}")

    def call(self, command: list[str], failure: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        logger.info("%s", done.stdout)
        if done.returncode != 0:
            text = (done.stderr.strip() or done.stdout.strip()).splitlines()
            logger.warning("%s", "\n".join(text[-40:]))
            errors = [line.strip() for line in text if "rror" in line] or text
            raise CannotBuild(f"{failure}: {errors[0][:300] if errors else 'no output'}")

    # The library may be missing; nothing else in setuptools is to look for it.
    def get_outputs(self) -> list[str]:
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / PACKAGE
        built = [package / LIBRARY, package / NOTE, *package.glob("_info*.so")]
        return [str(path) for path in built if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.[ch]*"))]


# The extension only says that the wheel is not pure; CMake knows the sources.
setup(ext_modules=[Extension(f"{PACKAGE}._C_cpu", sources=[])], cmdclass={"build_ext": CMakeBuild})
