"""Build of the native parts: CMake behind setuptools, and never in the way of an installation.

Everything declarative stands in pyproject.toml. Environment switches:

RLSEDIT_SKIP_NATIVE=1      install without the native parts
RLSEDIT_REQUIRE_NATIVE=1   fail when the native CPU library cannot be built (for continuous integration)
RLSEDIT_CUDA=0             leave out the CUDA library; 1: fail when it cannot be built; unset: build it where nvcc is
RLSEDIT_CUDA_ARCH          architectures of the CUDA library, such as "80;90a"; "all": sm_80, sm_90a, sm_100 and PTX, as
                           far as the compiler knows them; unset: those of the GPUs here, sm_90a where there is none
CXX, CXXFLAGS, LDFLAGS, CUDACXX, CMAKE_BUILD_PARALLEL_LEVEL     the usual ones, honoured by CMake

cmake and ninja are those of the environment of the interpreter that runs this file, else those on the path.

Whatever prevents a build is written to `rlsedit_kernels/_native_build.txt` or `_cuda_build.txt`, from which
`rlsedit_kernels.backends()` takes its reason.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import OptionError

ROOT = Path(__file__).resolve().parent
PACKAGE = "rlsedit_kernels"
LIBRARY = "_C_cpu.so"
NOTE = "_native_build.txt"
CUDA_LIBRARY = "_C_cuda.so"
CUDA_NOTE = "_cuda_build.txt"
ALL_ARCHITECTURES = ("80-real", "90a-real", "100-real", "100-virtual")
# CMake reads these when it configures a folder for the first time, and never again.
REMEMBERED = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX")
SETTINGS = "settings.json"
HINT = "it needs a compiler of C++17, and ninja or make"
# Not the "-Werror" of a command that is repeated before its errors.
ERROR = re.compile(r"\b(error|Error|fatal)\s*:|^CMake Error|cannot find|undefined reference")

logger = logging.getLogger("setup")


class CannotBuild(Exception):
    """The native parts cannot be built here; the text is the reason a user reads."""


def switch(name: str) -> bool | None:
    """A switch of the environment: True for 1, False for 0, None where it is empty or unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise OptionError(f"{name} must be 0, 1 or empty, got {value!r}")
    return value == "1" if value else None


def check_wanted(skip: bool | None) -> None:
    if skip:
        raise CannotBuild("skipped at installation by RLSEDIT_SKIP_NATIVE")
    if os.name != "posix":  # flags and scratch memory are those of Linux and macOS
        raise CannotBuild("the native parts are for Linux and macOS; elsewhere the ops run in plain torch")


def tool(name: str) -> str | None:
    """A program of this interpreter's environment, which need not be on the path (venv/bin/pip leaves it)."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def version() -> str:
    return str(runpy.run_path(str(ROOT / PACKAGE / "_version.py"))["__version__"])


def torch_location() -> tuple[Path, str]:
    """Directory and version of the torch whose headers are used, without importing it."""
    spec = importlib.util.find_spec("torch")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places or not (Path(places[0]) / "version.py").is_file():  # an uninstalled torch may leave its folder behind
        raise CannotBuild(
            "torch is not installed in the environment of the build; install torch first and then "
            "this package with --no-build-isolation"
        )
    directory = Path(places[0])
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
    """nvcc: $CUDACXX and no other, or on the path, under $CUDA_HOME or where toolkits are installed."""
    if asked := os.environ.get("CUDACXX"):
        return shutil.which(asked)
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


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


def first_error(output: str) -> str:
    """What went wrong first: its line in the output of a compiler or a linker, the whole paragraph of CMake."""
    lines = output.splitlines() or ["no output"]
    first = next((i for i, line in enumerate(lines) if ERROR.search(line)), len(lines) - 1)
    message = lines[first].strip()
    if message.startswith("CMake Error at"):
        for line in lines[first + 1 :]:
            if line and not line.startswith(" "):
                break
            message += f" {line.strip()}" if line.strip() else ""
    return message[:300]


class CMakeBuild(build_ext):
    """Configure and build with CMake; on failure leave the reason instead of the library."""

    def run(self) -> None:
        skip, required, cuda = switch("RLSEDIT_SKIP_NATIVE"), switch("RLSEDIT_REQUIRE_NATIVE"), switch("RLSEDIT_CUDA")
        target = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        package = target / PACKAGE
        package.mkdir(parents=True, exist_ok=True)
        note = package / NOTE
        note.unlink(missing_ok=True)
        try:
            check_wanted(skip)
            self.build_native(package)
        except CannotBuild as error:
            for stale in (package / LIBRARY, *package.glob("_info*.so")):  # they would hide the reason
                stale.unlink(missing_ok=True)
            note.write_text(f"{error}\n", encoding="utf-8")
            if required:
                raise
            logger.warning("%s: no native CPU library (%s); the torch fallback serves", PACKAGE, error)
        self.try_cuda(package, skip, cuda)

    def try_cuda(self, package: Path, skip: bool | None, wanted: bool | None) -> None:
        """The CUDA library, whatever became of the other one."""
        note = package / CUDA_NOTE
        note.unlink(missing_ok=True)
        try:
            check_wanted(skip)
            if wanted is False:
                raise CannotBuild("skipped at installation by RLSEDIT_CUDA=0")
            self.build_cuda(package)
        except CannotBuild as error:
            (package / CUDA_LIBRARY).unlink(missing_ok=True)
            note.write_text(f"{error}\n", encoding="utf-8")
            if wanted:
                raise
            logger.info("%s: no CUDA library (%s)", PACKAGE, error)

    def build_cuda(self, package: Path) -> None:
        nvcc = compiler_of_cuda()
        if nvcc is None:
            asked = os.environ.get("CUDACXX")
            raise CannotBuild(f"nvcc, the CUDA compiler, was not found{f' (CUDACXX is {asked})' if asked else ''}")
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
        try:
            self.cmake(ROOT, "native", options, HINT)
        except CannotBuild:  # the build info, say, whose headers of Python or pybind11 may not fit: no op needs it
            for stale in package.glob("_info*.so"):
                stale.unlink()
            self.cmake(ROOT, "native", options, HINT, "_C_cpu")
            logger.warning("%s: no build info", PACKAGE)
        if not (package / LIBRARY).is_file():
            raise CannotBuild(f"the build left no {LIBRARY}")

    def cmake(
        self, source: Path, name: str, options: Mapping[str, object], hint: str, target: str | None = None
    ) -> None:
        """Configure and build a project of CMake, or one target of it."""
        cmake, ninja = tool("cmake"), tool("ninja")
        if cmake is None:
            raise CannotBuild("cmake was not found (pip install cmake ninja)")
        build = Path(self.build_temp).resolve() / name
        configure = [cmake, f"-S{source}", f"-B{build}", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-D{key}={value}" for key, value in options.items()]
        if ninja is not None:
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        settings = json.dumps([configure, {key: os.environ.get(key) for key in REMEMBERED}], indent=1)
        self.forget(build, settings)
        self.call(configure, f"configuring with CMake failed ({hint})")
        (build / SETTINGS).write_text(settings, encoding="utf-8")
        command = [cmake, "--build", str(build), *(["--target", target] if target else [])]
        if self.parallel or "CMAKE_BUILD_PARALLEL_LEVEL" not in os.environ:
            command += ["--parallel", str(self.parallel or min(os.cpu_count() or 1, 8))]
        self.call(command, "compiling failed")

    @staticmethod
    def forget(build: Path, settings: str) -> None:
        """Configure anew where anything is asked for differently: a checkout that was moved, another compiler or flags.

        CMake would refuse another source or generator, and go on with the compiler and the flags of the first time.
        """
        known = build / SETTINGS
        if known.is_file() and known.read_text(encoding="utf-8") == settings:
            return
        known.unlink(missing_ok=True)
        if (build / "CMakeCache.txt").is_file():
            (build / "CMakeCache.txt").unlink()
            shutil.rmtree(build / "CMakeFiles", ignore_errors=True)

    def call(self, command: list[str], failure: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        logger.info("%s", done.stdout)
        if done.returncode != 0:
            output = f"{done.stderr}\n{done.stdout}".strip()
            logger.warning("%s", "\n".join(output.splitlines()[-40:]))
            raise CannotBuild(f"{failure}: {first_error(output)}")

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
