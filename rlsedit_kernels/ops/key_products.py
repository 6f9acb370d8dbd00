"""key_products: K A, a few rows times any matrix."""

from __future__ import annotations

import torch

from rlsedit_kernels.ops import _checks
from rlsedit_kernels.ops._register import register

OP = "key_products"


def fake(A: torch.Tensor, K: torch.Tensor) -> torch.Tensor:
    return A.new_empty((*K.shape[:-1], A.shape[-1]))


register(OP, fake)


def key_products(A: torch.Tensor, K: torch.Tensor) -> torch.Tensor:
    """Product K A of a batch of keys with any matrix, in one pass over it.

    The predictions of a batch, K W, where the weight W is not to be changed (`weight_update_` gives V - K W beside its
    change), and a map of keys by a root of the prior. Of a symmetric matrix `gain_products` gives C K' and K C K'.

    Args:
        A: (..., d, n) float32 or float64, any strides: the transpose of what an `nn.Linear` stores is as good.
        K: (..., u, d) keys, dtype, device and leading dimensions of A; u >= 1.

    Returns:
        K A (..., u, n), contiguous.

    Raises:
        TypeError, ValueError: dtype, device or shape do not fit.

    Numerics: accumulated in the dtype of A; each element is within about d eps |K||A| of the exact value.
    """
    A = _checks.matrix(OP, "A", A, "d", "n")
    K = _checks.fitting(OP, "K", K, "A", A, ("u", None), ("d = A.shape[-2]", A.shape[-2]))
    return torch.ops.rlsedit_kernels.key_products.default(A, K)
