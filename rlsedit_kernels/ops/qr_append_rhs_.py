"""qr_append_rhs_: rows appended to a triangular system, the right-hand side rotated along."""

from __future__ import annotations

import torch

from rlsedit_kernels.ops import _checks
from rlsedit_kernels.ops._register import register

OP = "qr_append_rhs_"


def fake(R: torch.Tensor, B: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> None:
    """Nothing is returned."""


register(OP, fake)


def qr_append_rhs_(
    R: torch.Tensor, B: torch.Tensor, K: torch.Tensor, V: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Streaming QR of a least-squares problem: append the rows [K V] to the triangular system [R B], in place.

    With Q the orthogonal matrix that maps [R; K] to [R_new; 0]:  [R_new B_new; 0 rest] = Q [R B; K V]. The minimiser
    of |R W - B|^2 + |K W - V|^2 is then W = R_new^-1 B_new, one triangular solve whenever it is wanted.

    Args:
        R: (..., d, d) float32 or float64 as for `qr_append_`; the upper triangle is changed.
        B: (..., d, v), dtype, device and leading dimensions of R; changed.
        K: (..., u, d) keys, u >= 1.
        V: (..., u, v) targets.

    Returns:
        R and B themselves.

    Raises:
        TypeError, ValueError: dtype, device or shape do not fit, or R or B overlap themselves
            or another argument.

    Numerics: that of `qr_append_`; columns of B do not mix. 2 d u (d + 2 v) flops.
    """
    R = _checks.square(OP, "R", R, "d")
    B = _checks.fitting(OP, "B", B, "R", R, ("d = R.shape[-1]", R.shape[-1]), ("v", None))
    K = _checks.keys(OP, K, R, "R")
    V = _checks.fitting(OP, "V", V, "R", R, ("u = K.shape[-2]", K.shape[-2]), ("v = B.shape[-1]", B.shape[-1]))
    _checks.writable(OP, "R", R, B=B, K=K, V=V)
    _checks.writable(OP, "B", B, K=K, V=V)
    torch.ops.rlsedit_kernels.qr_append_rhs_.default(R, B, K, V)
    return R, B
