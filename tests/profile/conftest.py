"""Ceilings of the machine, and a small problem with a profile of it, once for all tests of this folder."""

from __future__ import annotations

import pytest
import torch

from rlsedit_kernels import profile
from rlsedit_kernels.profile import Problem, Settings


@pytest.fixture(scope="session")
def found() -> profile.Ceilings:
    return profile.ceilings(torch.device("cpu"))


@pytest.fixture(scope="session")
def problem() -> Problem:
    return Problem(96, 20, 8)


@pytest.fixture(scope="session")
def whole(problem, found) -> profile.Profile:
    quick = Settings(repetitions=3, cold=False)
    return profile.measure(profile.catalogue("cpu"), problem, quick, found=found)
