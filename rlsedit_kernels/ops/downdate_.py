"""downdate_: C <- C + alpha Z Z' in place, one triangle computed and mirrored."""

from __future__ import annotations

import torch

from rlsedit_kernels.ops import _checks
from rlsedit_kernels.ops._register import register

OP = "downdate_"


def fake(C: torch.Tensor, Z: torch.Tensor, alpha: float = -1.0) -> None:
    """Nothing is returned."""


register(OP, fake)


def downdate_(C: torch.Tensor, Z: torch.Tensor, alpha: float = -1.0) -> torch.Tensor:
    """Symmetric rank-u change of the covariance, in place.

    C <- C + alpha Z Z'. With alpha = -1 a batch is written (a downdate of the covariance, an update of the
    information), with alpha = +1 it is taken back.

    Args:
        C: (..., d, d) float32 or float64, symmetric, any strides; changed.
        Z: (..., d, u), dtype, device and leading dimensions of C; u >= 1. Must not share memory with C.
        alpha: factor, finite in the dtype of C.

    Returns:
        C itself, exactly symmetric.

    Raises:
        TypeError, ValueError: dtype, device, shape or alpha do not fit, or C overlaps itself
            or another argument.

    Numerics: accumulated in the dtype of C; no d x d temporary.
    """
    C = _checks.square(OP, "C", C, "d")
    Z = _checks.fitting(OP, "Z", Z, "C", C, ("d = C.shape[-1]", C.shape[-1]), ("u", None))
    _checks.writable(OP, "C", C, Z=Z)
    torch.ops.rlsedit_kernels.downdate_.default(C, Z, _checks.finite_number(OP, "alpha", alpha, C.dtype))
    return C
