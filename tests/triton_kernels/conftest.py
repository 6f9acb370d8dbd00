"""Compilation is tested without Triton's interpreter, results with it or on a GPU (see `make test`, `make gpu`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsedit_kernels.backends.triton import interpreted


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    runs = interpreted() or config.getoption("--device") == "cuda"
    return True if collection_path.name == ("test_compile.py" if runs else "test_kernels.py") else None
