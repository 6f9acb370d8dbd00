"""cholesky: batched lower Cholesky factor with LAPACK's info, without an exception."""

from __future__ import annotations

import torch

from rlsedit_kernels.ops import _checks
from rlsedit_kernels.ops._register import register

OP = "cholesky"


def fake(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return A.new_empty(A.shape), A.new_empty(A.shape[:-2], dtype=torch.int32)


register(OP, fake)


def cholesky(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower factor L of A = L L', of many small matrices at once.

    Args:
        A: (..., u, u) float32 or float64; only the lower triangle is read.

    Returns:
        L (..., u, u), contiguous, with a zero upper triangle, and info (...) int32: 0 where the factor is
        valid, j > 0 where the leading minor of order j is the first that is not positive and finite; L is
        then unspecified.

    Raises:
        TypeError: not a dense float32/float64 tensor.
        ValueError: not square, or empty.

    Numerics: backward error at most about u eps |L||L'| (Higham, Accuracy and Stability, theorem 10.3).
    """
    A = _checks.square(OP, "A", A, "u")
    return torch.ops.rlsedit_kernels.cholesky.default(A)
