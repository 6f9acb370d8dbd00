"""Ceilings of the machine, measured once for all tests of this folder."""

from __future__ import annotations

import pytest
import torch

from rlsedit_kernels import profile


@pytest.fixture(scope="session")
def found() -> profile.Ceilings:
    return profile.ceilings(torch.device("cpu"))
