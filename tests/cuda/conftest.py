"""The CUDA kernels on the CPU, compiled once; skipped with its reason where there is no compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import emulated

from rlsedit_kernels.backends import cuda


@pytest.fixture(scope="session")
def kernels() -> Any:
    """The private namespace: with kernels for CPU tensors, or on a GPU (--device cuda) with those that run there."""
    if torch.get_default_device().type == "cuda" and not emulated.active():
        available, reason = cuda.load()
        if not available:
            pytest.skip(f"CUDA kernels: {reason}")
        return getattr(torch.ops, cuda.NAMESPACE)
    try:
        emulated.load()
    except emulated.CannotEmulate as error:
        pytest.skip(f"CUDA kernels on the CPU: {error}")
    return getattr(torch.ops, cuda.NAMESPACE)


@pytest.fixture
def emulator(kernels: Any) -> Any:
    """The kernels, where they are emulated: the order of blocks and warps can be chosen there."""
    if torch.get_default_device().type == "cuda" and not emulated.active():
        pytest.skip("about the order in which the emulator runs")
    return kernels
