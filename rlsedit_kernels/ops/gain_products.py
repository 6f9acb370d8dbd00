"""gain_products: Y = C K' and G = K Y, the two products from which a gain is made."""

from __future__ import annotations

import torch

from rlsedit_kernels.ops import _checks
from rlsedit_kernels.ops._register import register

OP = "gain_products"


def fake(C: torch.Tensor, K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    u = K.shape[-2]
    return C.new_empty((*C.shape[:-1], u)), C.new_empty((*C.shape[:-2], u, u))


register(OP, fake)


def gain_products(C: torch.Tensor, K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Products of a batch of keys with the covariance, in one pass over C.

    Y = C K', G = K Y (docs/mathematics.md).

    Args:
        C: (..., d, d) float32 or float64, symmetric: either triangle or both may be read.
        K: (..., u, d) keys, one per row; the dtype, device and leading dimensions of C; u >= 1.

    Returns:
        Y (..., d, u) and G (..., u, u), contiguous; G is exactly symmetric.

    Raises:
        TypeError: not a dense float32/float64 tensor, or dtypes differ.
        ValueError: shapes or devices do not fit.

    Numerics: accumulated in the dtype of C; each element of Y is within about d eps |C||K'| of the exact value.
    """
    C = _checks.square(OP, "C", C, "d")
    K = _checks.keys(OP, K, C)
    return torch.ops.rlsedit_kernels.gain_products.default(C, K)
