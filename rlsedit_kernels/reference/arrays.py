"""Anything array-like, tensors included, as a float64 NumPy array of one's own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def float64(value: Any) -> Array:
    """`value` (array, list, tensor of any real dtype on any device) as a float64 array: always a copy.

    Raises:
        TypeError: it is complex.
    """
    if hasattr(value, "detach"):
        if value.is_complex():
            raise TypeError(f"reference: a real array is needed, got {value.dtype}")
        value = value.detach().cpu().double().resolve_neg().numpy()  # NumPy has no bfloat16, and no negated views
    elif np.iscomplexobj(value):
        raise TypeError(f"reference: a real array is needed, got {np.asarray(value).dtype}")
    return np.array(value, dtype=np.float64)


def transposed(A: Array) -> Array:
    """A' over the last two axes."""
    return np.swapaxes(A, -1, -2)
