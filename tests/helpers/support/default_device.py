"""The device of factories that are not told one, as a user's program may set it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import rlsedit_kernels as rk


@contextmanager
def plain_torch_under(device: str) -> Iterator[None]:
    """Under the default device `device`, with the ops in plain torch."""
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        with rk.use_backend("torch"):
            yield
    finally:
        torch.set_default_device(before)
