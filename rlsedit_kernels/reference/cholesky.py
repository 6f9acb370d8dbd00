"""Reference of cholesky: LAPACK's dpotrf, matrix by matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from rlsedit_kernels.reference.arrays import Array, float64


def cholesky(A: Any) -> tuple[Array, NDArray[np.int32]]:
    """L (..., u, u) with A = L L' (upper triangle zero) and LAPACK's info (...)."""
    A = float64(A)
    L = np.empty_like(A)
    info = np.empty(A.shape[:-2], dtype=np.int32)
    for index in np.ndindex(*A.shape[:-2]):
        L[index], info[index] = lapack.dpotrf(A[index], lower=1, clean=1)
    return L, info
