"""Build of the native parts: CMake behind setuptools, and never in the way of an installation.

Everything declarative stands in pyproject.toml. Environment switches:

RLSEDIT_SKIP_NATIVE=1      install without the native parts
RLSEDIT_REQUIRE_NATIVE=1   fail when the native CPU library cannot be built (for continuous integration)
RLSEDIT_CUDA=0             leave out the CUDA library; 1: fail when it cannot be built; unset: build it where nvcc is
RLSEDIT_CUDA_ARCH          architectures of the CUDA library, such as "80;90a"; "all": sm_80, sm_90a, sm_100 and PTX, as
                           far as the compiler knows them; unset: those of the GPUs here, sm_90a where there is none
CXX, CXXFLAGS, CUDACXX     the usual ones, honoured by CMake

Whatever prevents a build is written to `rlsedit_kernels/_native_build.txt` or `_cuda_build.txt`, from which
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
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "rlsedit_kernels"
LIBRARY = "_C_cpu.so"
NOTE = "_native_build.txt"
CUDA_LIBRARY = "_C_cuda.so"
CUDA_NOTE = "_cuda_build.txt"
ALL_ARCHITECTURES = ("80-real", "90a-real", "100-real", "100-virtual")

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


def compiler_of_cuda() -> str | None:
    """nvcc: $CUDACXX, on the path, under $CUDA_HOME or where toolkits are installed."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which("nvcc", path=str(Path(home) / "bin"))


def architectures(nvcc: str) -> str:
    """For CMake: what RLSEDIT_CUDA_ARCH asks for, else the GPUs that are here, else sm_90a."""
    asked = os.environ.get("RLSEDIT_CUDA_ARCH", "")
    if asked == "all":
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
        found = [name for name in ALL_ARCHITECTURES if "compute_" + name.split("-")[0].rstrip("a") in known]
        return ";".join(found)
    if asked:
        names = asked.replace(",", ";").replace(" ", ";").split(";")
        return ";".join(name if "-" in name else f"{name}-real" for name in names if name)
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return "90a-real"
    lines = done.stdout.split() if done.returncode == 0 else []
    numbers = sorted({line.replace(".", "") for line in lines if line.replace(".", "").isdigit()})
    return ";".join(f"{'90a' if number == '90' else number}-real" for number in numbers) or "90a-real"


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
        self.try_cuda(package)

    def try_cuda(self, package: Path) -> None:
        """The CUDA library, whatever became of the other one."""
        note = package / CUDA_NOTE
        note.unlink(missing_ok=True)
        try:
            if os.environ.get("RLSEDIT_SKIP_NATIVE", "0") not in ("", "0"):
                raise CannotBuild("skipped at installation by RLSEDIT_SKIP_NATIVE")
            if os.environ.get("RLSEDIT_CUDA", "") == "0":
                raise CannotBuild("skipped at installation by RLSEDIT_CUDA=0")
            self.build_cuda(package)
        except CannotBuild as error:
            (package / CUDA_LIBRARY).unlink(missing_ok=True)
            note.write_text(f"{error}\n", encoding="utf-8")
            if os.environ.get("RLSEDIT_CUDA", "") == "1":
                raise
            logger.info("%s: no CUDA library (%s)", PACKAGE, error)

    def build_cuda(self, package: Path) -> None:
        nvcc = compiler_of_cuda()
        if nvcc is None:
            raise CannotBuild("nvcc, the CUDA compiler, was not found")
        torch_dir, torch_version = torch_location()
        if tuple(int(part) for part in torch_version.split(".")[:2]) < (2, 11):
            raise CannotBuild(f"torch {torch_version} is older than 2.11, whose stable ABI the CUDA library uses")
        options = {
            "TORCH_DIR": torch_dir,
            "CMAKE_CUDA_COMPILER": nvcc,
            "CMAKE_CUDA_ARCHITECTURES": architectures(nvcc),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": package,
        }
        self.cmake(ROOT / "csrc" / "cuda", "cuda", options, "is there a CUDA toolkit with its headers?")
        if not (package / CUDA_LIBRARY).is_file():
            raise CannotBuild(f"the build left no {CUDA_LIBRARY}")

    def build_native(self, package: Path) -> None:
        torch_dir, torch_version = torch_location()
        options: dict[str, object] = {
            "TORCH_DIR": torch_dir,
            "TORCH_VERSION": torch_version,
            "RLSEDIT_VERSION": version(),
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": package,
        }
        if (directory := pybind11_location()) is not None:
            options["pybind11_DIR"] = directory
        self.cmake(ROOT, "native", options, "is there a C++ compiler?")
        if not (package / LIBRARY).is_file():
            raise CannotBuild(f"the build left no {LIBRARY}")

    def cmake(self, source: Path, name: str, options: Mapping[str, object], hint: str) -> None:
        """Configure and build a project of CMake."""
        cmake = shutil.which("cmake")
        if cmake is None:
            raise CannotBuild("cmake was not found")
        build = Path(self.build_temp).resolve() / name
        configure = [cmake, f"-S{source}", f"-B{build}", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-D{key}={value}" for key, value in options.items()]
        if shutil.which("ninja"):
            configure.append("-GNinja")
        self.call(configure, f"configuring with CMake failed ({hint})")
        jobs = str(self.parallel or min(os.cpu_count() or 1, 8))
        self.call([cmake, "--build", str(build), "--parallel", jobs], "compiling failed")

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
        files = [package / name for name in (LIBRARY, NOTE, CUDA_LIBRARY, CUDA_NOTE)]
        built = [*files, *package.glob("_info*.so")]
        return [str(path) for path in built if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        sources = (path for path in ROOT.glob("csrc/**/*") if path.is_file())
        return ["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in sources)]


# The extension only says that the wheel is not pure; CMake knows the sources.
setup(ext_modules=[Extension(f"{PACKAGE}._C_cpu", sources=[])], cmdclass={"build_ext": CMakeBuild})
