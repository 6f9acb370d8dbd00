"""rls_update_: the whole commit of a batch, fused."""

from __future__ import annotations

import torch

from rlsedit_kernels.ops import _checks
from rlsedit_kernels.ops._register import register

OP = "rls_update_"


def fake(
    C: torch.Tensor, K: torch.Tensor, noise: float = 1.0, forget: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    return C.new_empty((*C.shape[:-1], K.shape[-2])), C.new_empty(C.shape[:-2], dtype=torch.int32)


register(OP, fake)


def rls_update_(
    C: torch.Tensor, K: torch.Tensor, noise: float = 1.0, forget: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of recursive least squares on the covariance: its gain, and C downdated in place.

    With Y = C K', G = K Y and L L' = forget noise I + G:
    gain = Y (L L')^-1,  Z = Y L^-T,  C <- (C - Z Z') / forget  (docs/mathematics.md, facts 1 and 8). The weight of the
    batch is W <- W + gain (V - K W).

    Args:
        C: (..., d, d) float32 or float64, symmetric; changed where info == 0, untouched elsewhere.
        K: (..., u, d) keys, dtype, device and leading dimensions of C; u >= 1.
        noise: >= 0 and finite in the dtype of C (the reciprocal of the weight of the batch).
        forget: forgetting factor in (0, 1], with a reciprocal that is finite in the dtype of C.

    Returns:
        gain (..., d, u), equal to C_new K' / noise where noise > 0, and info (...) int32: 0, or the order of
        the first leading minor of (forget noise I + G) that is not positive and finite; the gain is NaN
        there.

    Raises:
        TypeError, ValueError: dtype, device, shape, noise or forget do not fit, or C overlaps itself.

    Numerics: the plain form of the recursion; see `CovarianceState` for forms that survive float32 on
    ill-conditioned priors.
    """
    C = _checks.square(OP, "C", C, "d")
    K = _checks.keys(OP, K, C)
    _checks.writable(OP, "C", C)
    noise, forget = _checks.noise(OP, noise, C.dtype), _checks.forget(OP, forget, C.dtype)
    return torch.ops.rlsedit_kernels.rls_update_.default(C, K, noise, forget)
