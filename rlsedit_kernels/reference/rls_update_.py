"""Reference of rls_update_, from the definition: S <- forget S + K'K / noise, by dense inverses."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsedit_kernels.reference.arrays import Array, float64, transposed
from rlsedit_kernels.reference.gain_products import gain_products
from rlsedit_kernels.reference.gain_solve import gain_solve


def rls_update_(C: Any, K: Any, noise: float = 1.0, forget: float = 1.0) -> tuple[Array, Array, NDArray[np.int32]]:
    """The new C, the gain (..., d, u) and info (...); C is the old one where info != 0.

    For noise > 0 and info = 0, C_new = (forget C^-1 + K'K / noise)^-1 and gain = C_new K' / noise; the same
    numbers are formed here by the Woodbury identity, so that noise = 0 and a singular C are covered.
    """
    C = float64(C)
    Y, G = gain_products(C, K)
    gain, Z, info = gain_solve(Y, G, forget * noise)
    good = (info == 0)[..., None, None]
    return np.where(good, (C - Z @ transposed(Z)) / forget, C), gain, info
