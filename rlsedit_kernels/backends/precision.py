"""Products in IEEE precision and in the dtype of their tensors, whatever the process has allowed elsewhere.

A recurrence in single-pass TF32 breaks down within tens of batches (docs/mathematics.md), so neither the global
switches of torch nor autocast may reach it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# Every switch through which torch lowers the precision of a float32 product. The per-backend attributes
# are read and written, not torch.{get,set}_float32_matmul_precision: those raise when the two interfaces
# have been mixed by the caller.
_SWITCHES: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def untouched() -> bool:
    """Whether products are already formed as `ieee_products` has them."""
    if torch._C._is_any_autocast_enabled():
        return False
    return all(switch.fp32_precision in ("ieee", "none") for switch in _SWITCHES)


@contextlib.contextmanager
def ieee_products() -> Iterator[None]:
    """Within the block, torch forms matrix products in the dtype of their tensors, and float32 ones in IEEE float32.

    Autocast is off there, on every device.
    """
    if untouched():
        yield
        return
    cast = torch._C._is_any_autocast_enabled()
    before = [switch.fp32_precision for switch in _SWITCHES]
    changed = [value not in ("ieee", "none") for value in before]
    with torch._C._DisableAutocast() if cast else contextlib.nullcontext():
        if not any(changed):
            yield
            return
        try:
            for switch in _SWITCHES:
                switch.fp32_precision = "ieee"
            yield
        finally:
            for switch, value in zip(_SWITCHES, before, strict=True):
                switch.fp32_precision = value
