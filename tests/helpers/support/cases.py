"""The case table of the op tests: sizes that are multiples of nothing, u beyond d, batches."""

from __future__ import annotations

import pytest
import torch

from rlsedit_kernels.backends import triton
from support import emulated


def sized(n: int, interpreted: int) -> int:
    """n, or a smaller size with edges of its own where kernels are interpreted: a column of a panel takes ms there."""
    return interpreted if triton.interpreted() or emulated.active() else n


SIZES = [
    # batch, d, u
    ((), 1, 1),
    ((), 7, 3),
    ((), 48, 48),
    ((), 33, 57),
    ((), 129, 17),
    ((), 300, 100),
    ((3,), 65, 31),
    ((2, 3), 19, 5),
]
INTERPRETED_SIZES = [
    ((), 1, 1),
    ((), 7, 3),
    ((), 20, 20),
    ((), 17, 37),
    ((), 50, 17),
    ((), 35, 34),
    ((2,), 19, 18),
    ((2, 2), 9, 5),
]
if triton.interpreted():
    SIZES = INTERPRETED_SIZES
sizes = pytest.mark.parametrize(
    ("batch", "d", "u"), SIZES, ids=[f"{'x'.join(map(str, b)) or '1'}-d{d}-u{u}" for b, d, u in SIZES]
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
