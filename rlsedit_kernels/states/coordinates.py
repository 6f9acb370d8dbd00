"""Between the coordinates of the keys and the whitened ones, by the float64 factor C_0 = T T' of the prior."""

from __future__ import annotations

import torch

from rlsedit_kernels import ops
from rlsedit_kernels.priors import PriorFactor

NARROW = 16
"""Up to as many columns go to a matrix on another device, and not the matrix to them."""

FEW = 512
"""Up to as many rows or columns a product is one of few keys: half of the time that torch takes on a CPU for a batch
of them, and a third for probes."""


def row_product(K: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """K A, of one dtype."""
    return ops.key_products(A, K) if 0 < len(K) <= FEW and A.numel() else K @ A


def product(A: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A x, of one dtype."""
    return row_product(x.mT, A.mT).mT


def _applied(A: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A x where x is. A prior on the host and a state on a GPU: the smaller of the two goes to the other."""
    if A.device == x.device:
        return product(A, x)
    if x.shape[1] > NARROW:
        return product(A.to(x.device), x)
    return (A @ x.to(A.device)).to(x.device)  # by torch: a back end that is forced for the GPU does not serve the host


def rounded(T: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A copy of a float64 root, contiguous."""
    return torch.empty(T.shape, dtype=dtype, device=device).copy_(T)


def moved_root(
    root: torch.Tensor | None, factor: PriorFactor, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """T of a form elsewhere. In another dtype it is rounded anew, as it will be when the form is saved and read."""
    if root is None or root.dtype == dtype:
        return None if root is None else root.to(device)
    assert factor.root is not None
    return rounded(factor.root, dtype, device)


def whiten(factor: PriorFactor, z: torch.Tensor) -> torch.Tensor:
    """T^-1 z."""
    return z / (factor.scale or 1.0) if factor.root_inverse is None else _applied(factor.root_inverse, z)


def unwhiten(factor: PriorFactor, x: torch.Tensor) -> torch.Tensor:
    """T x."""
    return x * (factor.scale or 1.0) if factor.root is None else _applied(factor.root, x)


def unwhiten_transposed(factor: PriorFactor, y: torch.Tensor) -> torch.Tensor:
    """T' y."""
    return y * (factor.scale or 1.0) if factor.root is None else _applied(factor.root.mT, y)


def whitened64(C: torch.Tensor, factor: PriorFactor) -> torch.Tensor:
    """C~ = T^-1 C T^-T (r, r) float64 of a covariance C (d, d)."""
    return whiten(factor, whiten(factor, C.to(torch.float64)).mT)
