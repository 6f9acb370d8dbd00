"""The CUDA kernels on the CPU, compiled once; skipped with its reason where there is no compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import emulated

from rlsedit_kernels.backends import cuda


@pytest.fixture(scope="session")
def kernels() -> Any:
    """The private namespace, with kernels for CPU tensors."""
    try:
        emulated.load()
    except emulated.CannotEmulate as error:
        pytest.skip(f"CUDA kernels on the CPU: {error}")
    return getattr(torch.ops, cuda.NAMESPACE)
