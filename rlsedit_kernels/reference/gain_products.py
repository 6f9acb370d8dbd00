"""Reference of gain_products: Y = C K', G = K Y."""

from __future__ import annotations

from typing import Any

from rlsedit_kernels.reference.arrays import Array, float64, transposed


def gain_products(C: Any, K: Any) -> tuple[Array, Array]:
    """Y (..., d, u) = C K' and G (..., u, u) = K Y, made symmetric."""
    C, K = float64(C), float64(K)
    Y = C @ transposed(K)
    G = K @ Y
    return Y, 0.5 * (G + transposed(G))
