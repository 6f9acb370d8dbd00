"""The stand-ins of other code bases are importable by the names that those have."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

NAMES = ("toy", "AlphaEdit", "memit", "RLSEdit", "easyeditor")


@pytest.fixture(autouse=True)
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers" / "foreign"))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        del sys.modules[name]


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    """For code that keeps its tensors on the CPU, whatever the device of the session."""
    with torch.device("cpu"):
        yield
