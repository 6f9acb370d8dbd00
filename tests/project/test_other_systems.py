"""Where Linux is not: without the modules that Windows lacks the package imports, and what cannot work says so."""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlsedit_kernels
from rlsedit.store.errors import StoreError
from rlsedit.store.lock import Lock
from rlsedit_kernels.profile.machine import used_bytes

ABSENT = ("fcntl", "grp", "pwd", "resource", "termios")


def import_all() -> None:
    """Every module but the kernels of Triton, which has no build for other systems, and the libraries."""
    for name in ABSENT:
        sys.modules[name] = None  # type: ignore[assignment]
    for found in pkgutil.walk_packages(rlsedit_kernels.__path__, "rlsedit_kernels."):
        if not found.name.startswith(("rlsedit_kernels.triton_kernels", "rlsedit_kernels._")):
            importlib.import_module(found.name)


def test_every_module_of_the_kernels_imports_without_what_windows_lacks() -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {Path(__file__).stem} as here;"
    code += "here.import_all()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_folder_of_edits_is_refused_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(StoreError, match=r"flock.*edit on Linux or macOS"):
        Lock(tmp_path / "lock", tmp_path)
    assert not (tmp_path / "lock").exists()


def test_memory_in_use_is_unknown_where_there_is_no_c_library_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def windows(name: str | None) -> None:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")

    def no_proc(self: Path, **_: object) -> str:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(ctypes, "CDLL", windows)
    monkeypatch.setattr(Path, "read_text", no_proc)
    assert used_bytes(torch.device("cpu")) is None
