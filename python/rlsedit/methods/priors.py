"""The priors that methods share, from the second moment of a layer's input and the hyper-parameters."""

from __future__ import annotations

import torch
from torch import Tensor

import rlsedit_kernels as rk

from ..config import EditConfig


def anchor(moment: Tensor, config: EditConfig) -> rk.Prior:
    """S_0 = mu^2 mom2_weight E[k k'].

    Raises:
        ValueError: mu is 0, so that the prior would be zero.
    """
    return weighted(moment, config, 0.0)


def weighted(moment: Tensor, config: EditConfig, lam: float) -> rk.Prior:
    """S_0 = mu^2 mom2_weight E[k k'] + lam^2 I.

    Raises:
        ValueError: mu and lam are 0, so that the prior would be zero.
    """
    if config.mu == 0 and lam == 0:
        raise ValueError("EditConfig: mu must be positive (or lam, for 'rlsedit'), got 0: the prior would be zero")
    return rk.Prior.anchor(config.mom2_weight * moment, mu=config.mu, lam=lam)


def unweighted(moment: Tensor, _config: EditConfig) -> rk.Prior:
    """S_0 = E[k k']: a weight of the anchor changes no equality constraint, and is a factor of gamma in a soft one."""
    return rk.Prior.anchor(moment)


def null_space(moment: Tensor, config: EditConfig) -> rk.Prior:
    """C_0 = P / L2, P the projector on the null space (docs/mathematics.md, fact 3)."""
    return rk.Prior.null_space(null_basis(moment, config.null_threshold), config.l2)


def null_basis(moment: Tensor, threshold: float) -> Tensor:
    """Orthonormal basis (d, r) of the eigenvectors of E[k k'] with eigenvalue below `threshold` (Fang et al. 2025).

    Raises:
        ValueError: no eigenvalue is below the threshold (the prior would be zero, nothing could be written), or all.
    """
    values, basis = below(moment, threshold)
    rank = basis.shape[1]
    if rank == 0:
        raise ValueError(
            f"EditConfig: null_threshold must exceed the smallest eigenvalue of E[k k'], {values[0]:.3g} "
            f"(median {values[len(values) // 2]:.3g}), got {threshold}; the null space is empty"
        )
    if rank == len(values):
        raise ValueError(
            f"EditConfig: null_threshold must lie below the largest eigenvalue of E[k k'], {values[-1]:.3g}, got "
            f"{threshold}; nothing would be protected"
        )
    return basis


def below(moment: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues (d,) of E[k k'], ascending, and eigenvectors (d, r) of those below `threshold`; 0 <= r <= d."""
    values, vectors = torch.linalg.eigh(moment.double())
    return values, vectors[:, : int((values < threshold).sum())].contiguous()
