"""Between the coordinates of the keys and the whitened ones, by the float64 factor C_0 = T T' of the prior."""

from __future__ import annotations

import torch

from rlsedit_kernels.priors import PriorFactor

_NARROW = 16
"""Up to as many columns a product is formed by rows of the transpose: a third of the time on a CPU, and less."""


def product(A: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A x."""
    return A @ x if x.shape[1] > _NARROW else (x.mT.contiguous() @ A.mT).mT


def _at(A: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A where `like` is; a factor that has to be brought over is d x d, so callers do that rarely."""
    return A if A.device == like.device else A.to(like.device)


def whiten(factor: PriorFactor, z: torch.Tensor) -> torch.Tensor:
    """T^-1 z."""
    return z / (factor.scale or 1.0) if factor.root_inverse is None else product(_at(factor.root_inverse, z), z)


def unwhiten(factor: PriorFactor, x: torch.Tensor) -> torch.Tensor:
    """T x."""
    return x * (factor.scale or 1.0) if factor.root is None else product(_at(factor.root, x), x)


def unwhiten_transposed(factor: PriorFactor, y: torch.Tensor) -> torch.Tensor:
    """T' y."""
    return y * (factor.scale or 1.0) if factor.root is None else product(_at(factor.root, y).mT, y)


def whitened64(C: torch.Tensor, factor: PriorFactor) -> torch.Tensor:
    """C~ = T^-1 C T^-T (r, r) float64 of a covariance C (d, d)."""
    return whiten(factor, whiten(factor, C.to(torch.float64)).mT)
