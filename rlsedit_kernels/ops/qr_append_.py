"""qr_append_: rows appended to a triangular factor, R'R <- R'R + K'K."""

from __future__ import annotations

import torch

from rlsedit_kernels.ops import _checks
from rlsedit_kernels.ops._register import register

OP = "qr_append_"


def fake(R: torch.Tensor, K: torch.Tensor) -> None:
    """Nothing is returned."""


register(OP, fake)


def qr_append_(R: torch.Tensor, K: torch.Tensor) -> torch.Tensor:
    """Streaming QR: append the rows of a batch to an upper-triangular factor, in place.

    R <- R_new with R_new'R_new = R'R + K'K, R_new upper triangular with a diagonal >= 0: the triangular factor of
    the stacked matrix [R; K], whose QR decomposition costs 4/3 d^3 flops and more where this takes 2 d^2 u. A
    batch with noise nu is appended as K / sqrt(nu); forgetting scales R by sqrt(forget) before.

    Args:
        R: (..., d, d) float32 or float64, any strides. The upper triangle is changed; what is below the diagonal
            is neither read nor written. Rows with a negative diagonal are negated (R'R stays the same).
        K: (..., u, d) keys, dtype, device and leading dimensions of R; u >= 1, more than d as well. Must not share
            memory with R.

    Returns:
        R itself.

    Raises:
        TypeError, ValueError: dtype, device or shape do not fit, or R overlaps itself
            or another argument.

    Numerics: Householder reflectors, normwise backward stable: |R_new'R_new - (R'R + K'K)| is a small multiple of
    u eps of its norm (Higham, theorem 19.4), whatever the rank of [R; K]. Rows of any size that the dtype can square
    under a root are safe: nothing overflows before R_new does.
    """
    R = _checks.square(OP, "R", R, "d")
    K = _checks.keys(OP, K, R, "R")
    _checks.writable(OP, "R", R, K=K)
    torch.ops.rlsedit_kernels.qr_append_.default(R, K)
    return R
