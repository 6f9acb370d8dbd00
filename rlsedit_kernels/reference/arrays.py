"""Anything array-like, tensors included, as a float64 NumPy array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def float64(value: Any) -> Array:
    """`value` (array, list, tensor on any device) as a float64 array; a copy where a conversion is needed."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def transposed(A: Array) -> Array:
    """A' over the last two axes."""
    return np.swapaxes(A, -1, -2)
