"""What `pip install` builds from: the source distribution holds every source of the native parts and both packages."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_sources_are_in_the_source_distribution(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"}
    for folder in ("csrc", "rlsedit_kernels", "python/rlsedit"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".txt", ".typed") and path.name != "_native_build.txt":
                wanted.add(path.relative_to(ROOT).as_posix())
    missing = sorted(name for name in wanted - held if not name.endswith("_cuda_build.txt"))
    assert not missing
