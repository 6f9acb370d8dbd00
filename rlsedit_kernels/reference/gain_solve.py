"""Reference of gain_solve: gain = Y (noise I + G)^-1, Z = Y L^-T."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from rlsedit_kernels.reference.arrays import Array, float64
from rlsedit_kernels.reference.cholesky import cholesky


def gain_solve(Y: Any, G: Any, noise: float) -> tuple[Array, Array, NDArray[np.int32]]:
    """gain (..., d, u), Z (..., d, u), info (...); gain and Z are NaN where info != 0."""
    Y, G = float64(Y), float64(G)
    L, info = cholesky(G + noise * np.eye(G.shape[-1]))
    gain, Z = np.full_like(Y, np.nan), np.full_like(Y, np.nan)
    for index in np.ndindex(*Y.shape[:-2]):
        if info[index] == 0:
            Z[index] = solve_triangular(L[index], Y[index].T, lower=True).T
            gain[index] = solve_triangular(L[index], Z[index].T, lower=True, trans="T").T
    return gain, Z, info
