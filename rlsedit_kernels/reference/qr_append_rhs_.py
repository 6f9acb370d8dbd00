"""Reference of qr_append_rhs_: the triangular factor, and the right-hand side by its Q."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlsedit_kernels.reference.arrays import Array, float64, transposed
from rlsedit_kernels.reference.rows import triangle


def qr_append_rhs_(R: Any, B: Any, K: Any, V: Any) -> tuple[Array, Array]:
    """R_new (..., d, d) of `qr_append_` and B_new (..., d, v) = Q'[B; V], [R; K] = Q R_new."""
    R, B, K, V = np.triu(float64(R)), float64(B), float64(K), float64(V)
    new, Q = triangle(np.concatenate([R, K], axis=-2))
    return new, transposed(Q) @ np.concatenate([B, V], axis=-2)
