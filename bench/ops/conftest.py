"""Every op benchmark runs over the case table and the back ends that serve the CPU: `pytest bench/ops`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import CASES, Case

import rlsedit_kernels as rk


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=("cpu", "torch"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    info = next(row for row in rk.backends() if row.name == request.param)
    if not info.available:
        pytest.skip(f"back end {info.name!r}: {info.reason}")
    with rk.use_backend(info.name):
        yield info.name
