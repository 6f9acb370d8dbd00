"""A product added to a large matrix in place: a root's change by a batch, a weight's by one that is taken back."""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from rlsedit_kernels.backends import active_backend
from rlsedit_kernels.backends.cpu import NAMESPACE


def add_product_(A: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float = 1.0) -> None:
    """A <- A + alpha left right', in place.

    On a CPU by the second half of `weight_update_`, where the ops run on the native library: on processors on which
    torch's products leave half of the vector width unused it takes half of their time. Elsewhere by torch.

    Args:
        A: (m, n) float32 or float64, any strides.
        left, right: (m, k) and (n, k), of its dtype and device.

    Numerics: sums over k in the dtype of A.
    """
    if A.device.type == "cpu" and active_backend("weight_update_") == "cpu":
        getattr(torch.ops, NAMESPACE).add_product_.default(A, left, right, alpha)
        increment_version(A)
    else:
        A.addmm_(left, right.mT, alpha=alpha)
