"""downdate_gain_products_: the downdate of one batch and the products of the next in one pass over C."""

from __future__ import annotations

import torch

from rlsedit_kernels.ops import _checks
from rlsedit_kernels.ops._register import register

OP = "downdate_gain_products_"


def fake(C: torch.Tensor, Z: torch.Tensor, K: torch.Tensor, alpha: float = -1.0) -> tuple[torch.Tensor, torch.Tensor]:
    u = K.shape[-2]
    return C.new_empty((*C.shape[:-1], u)), C.new_empty((*C.shape[:-2], u, u))


register(OP, fake)


def downdate_gain_products_(
    C: torch.Tensor, Z: torch.Tensor, K: torch.Tensor, alpha: float = -1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finish one batch and begin the next: downdate C, then the products of new keys with it.

    C <- C + alpha Z Z', then Y = C K', G = K Y. For a stream whose next keys are known while the present
    batch is written.

    Args:
        C: (..., d, d) float32 or float64, symmetric; changed.
        Z: (..., d, w) columns of the downdate, w >= 1.
        K: (..., u, d) keys of the next batch, u >= 1. Neither Z nor K may share memory with C.
        alpha: factor, finite in the dtype of C.

    Returns:
        Y (..., d, u) and G (..., u, u) as `gain_products` of the new C gives them.

    Raises:
        TypeError, ValueError: dtype, device, shape or alpha do not fit, or C overlaps itself
            or another argument.

    Numerics: as `downdate_` and `gain_products`.
    """
    C = _checks.square(OP, "C", C, "d")
    Z = _checks.fitting(OP, "Z", Z, "C", C, ("d = C.shape[-1]", C.shape[-1]), ("w", None))
    K = _checks.keys(OP, K, C)
    _checks.writable(OP, "C", C, Z=Z, K=K)
    factor = _checks.finite_number(OP, "alpha", alpha, C.dtype)
    return torch.ops.rlsedit_kernels.downdate_gain_products_.default(C, Z, K, factor)
