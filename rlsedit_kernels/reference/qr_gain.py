"""Reference of qr_gain: two triangular solves."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import solve_triangular

from rlsedit_kernels.reference.arrays import Array, float64, transposed


def qr_gain(R: Any, K: Any) -> Array:
    """(R'R)^-1 K' (..., d, u)."""
    R, gain = float64(R), np.ascontiguousarray(transposed(float64(K)))
    for index in np.ndindex(*gain.shape[:-2]):
        gain[index] = solve_triangular(R[index], solve_triangular(R[index], gain[index], trans="T"))
    return gain
