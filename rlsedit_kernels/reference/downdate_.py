"""Reference of downdate_: C + alpha Z Z'. Returns the result; NumPy arrays need no in-place twin."""

from __future__ import annotations

from typing import Any

from rlsedit_kernels.reference.arrays import Array, float64, transposed


def downdate_(C: Any, Z: Any, alpha: float = -1.0) -> Array:
    """C + alpha Z Z' (..., d, d)."""
    Z = float64(Z)
    return float64(C) + alpha * (Z @ transposed(Z))
