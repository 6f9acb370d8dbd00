"""A tiny model on disk for the commands of a module, with a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import language_models as lm


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm.on_disk(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cached (second moments) is shared by the tests of the module."""
    monkeypatch.setenv("RLSEDIT_CACHE", str(root / "cache"))
