"""The case table of the op tests: sizes that are multiples of nothing, u beyond d, batches."""

from __future__ import annotations

import pytest
import torch

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
sizes = pytest.mark.parametrize(
    ("batch", "d", "u"), SIZES, ids=[f"{'x'.join(map(str, b)) or '1'}-d{d}-u{u}" for b, d, u in SIZES]
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
