"""What `pip install` builds from: all sources of the native parts and of both packages, tests, and nothing compiled."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (".py", ".cpp", ".h", ".cu", ".txt", ".typed", ".md", ".svg", ".json", ".npz", ".toml")
NOTES = ("_native_build.txt", "_cuda_build.txt")


def test_sources_are_in_the_source_distribution(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "CHANGELOG.md", "Makefile"}
    for folder in ("csrc", "rlsedit_kernels", "python/rlsedit", "tests", "docs", "bench"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SOURCES and path.name not in NOTES:
                wanted.add(path.relative_to(ROOT).as_posix())
    assert not sorted(wanted - held)
    # A checkout in which something was compiled holds it for one processor and one Python.
    assert not sorted(name for name in held if name.endswith((".so", ".pyc")) or Path(name).name in NOTES)
