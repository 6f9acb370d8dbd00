"""Reference of weight_update_: returns the new weight and the innovation."""

from __future__ import annotations

from typing import Any

from rlsedit_kernels.reference.arrays import Array, float64


def weight_update_(W: Any, K: Any, V: Any, gain: Any) -> tuple[Array, Array]:
    """W + gain E (..., d, v) and E = V - K W (..., u, v)."""
    W, K = float64(W), float64(K)
    E = float64(V) - K @ W
    return W + float64(gain) @ E, E
