"""Reference of qr_append_: the triangular factor of the stacked matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlsedit_kernels.reference.arrays import Array, float64
from rlsedit_kernels.reference.rows import triangle


def qr_append_(R: Any, K: Any) -> Array:
    """The upper-triangular R_new (..., d, d) with R_new'R_new = R'R + K'K and a diagonal >= 0."""
    return triangle(np.concatenate([np.triu(float64(R)), float64(K)], axis=-2))[0]
