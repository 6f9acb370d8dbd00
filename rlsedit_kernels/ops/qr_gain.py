"""qr_gain: (R'R)^-1 K' by two triangular solves."""

from __future__ import annotations

import torch

from rlsedit_kernels.ops import _checks
from rlsedit_kernels.ops._register import register

OP = "qr_gain"


def fake(R: torch.Tensor, K: torch.Tensor) -> torch.Tensor:
    return R.new_empty((*R.shape[:-1], K.shape[-2]))


register(OP, fake)


def qr_gain(R: torch.Tensor, K: torch.Tensor) -> torch.Tensor:
    """Gain of a batch from the triangular factor that already holds it: R^-1 R^-T K'.

    With R'R = S_new, the information after the batch, this is the gain of the recursion for noise = 1 (K and V
    over sqrt(noise) otherwise): W <- W + gain (V - K W) (docs/mathematics.md, fact 1).

    Args:
        R: (..., d, d) float32 or float64, upper triangular and non-singular; below the diagonal nothing is read.
        K: (..., u, d) keys, dtype, device and leading dimensions of R; u >= 1.

    Returns:
        gain (..., d, u), contiguous; Inf or NaN where R is singular.

    Raises:
        TypeError, ValueError: dtype, device or shape do not fit.

    Numerics: each solve is row-wise backward stable (Higham, theorem 8.5).
    """
    R = _checks.square(OP, "R", R, "d")
    K = _checks.keys(OP, K, R, "R")
    result: torch.Tensor = torch.ops.rlsedit_kernels.qr_gain.default(R, K)
    return result
