"""Reference of key_products."""

from __future__ import annotations

from typing import Any

from rlsedit_kernels.reference.arrays import Array, float64


def key_products(A: Any, K: Any) -> Array:
    """K A (..., u, n)."""
    return float64(K) @ float64(A)
