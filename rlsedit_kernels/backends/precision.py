"""Products in IEEE precision, whatever the process has allowed elsewhere.

A recurrence in single-pass TF32 breaks down within tens of batches (docs/mathematics.md), so the global
switches of torch must not reach it.
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


@contextlib.contextmanager
def ieee_products() -> Iterator[None]:
    """Within the block, float32 matrix products of torch are carried out in IEEE float32."""
    before = [switch.fp32_precision for switch in _SWITCHES]
    changed = [value not in ("ieee", "none") for value in before]
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
