"""Solvers on `rlsedit_kernels`: the covariance of an anchor or null-space prior, kept up to date."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

import rlsedit_kernels as rk

from ..config import EditConfig
from .method import Proposal, check_moment


@dataclass(frozen=True)
class RecursionSolver:
    """One layer's covariance state.

    Args:
        state: covariance, not changed by `propose`.
        noise: of each batch.
        commit: whether a batch enters the state; if not, every batch is solved against the prior alone.
    """

    state: rk.CovarianceState
    noise: float
    commit: bool

    def propose(self, keys: Tensor, residual: Tensor) -> tuple[Proposal, RecursionSolver]:
        """gain = C K' (noise I + K C K')^-1, update = gain E; the commit is made on a copy of the state."""
        if not self.commit:
            gain = self.state.gain(keys, noise=self.noise)
            return Proposal(gain @ residual, gain), self
        following = self.state.clone()
        gain = following.update(keys, noise=self.noise)
        return Proposal(gain @ residual, gain), replace(self, state=following)

    def health(self) -> dict[str, object]:
        """The state's own report."""
        return asdict(self.state.health())


def anchor_solver(commit: bool, ridge: bool = False) -> Callable[..., RecursionSolver]:
    """Factory of solvers with S_0 = mu^2 mom2_weight E[k k'], plus lam^2 I where `ridge` is set."""

    def make(
        moment: Tensor, config: EditConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> RecursionSolver:
        check_moment(moment, config)
        lam = config.lam if ridge else 0.0
        if config.mu == 0 and lam == 0:
            raise ValueError("EditConfig: mu must be positive (or lam, for 'rlsedit'), got 0: the prior would be zero")
        prior = rk.Prior.anchor(config.mom2_weight * moment, mu=config.mu, lam=lam)
        return RecursionSolver(rk.CovarianceState(prior, dtype=dtype, device=device), config.noise, commit)

    return make


def null_basis(moment: Tensor, threshold: float) -> Tensor:
    """Orthonormal basis (d, r) of the eigenvectors of E[k k'] with eigenvalue below `threshold` (Fang et al. 2025).

    Raises:
        ValueError: no eigenvalue is below the threshold (the prior would be zero, nothing could be written), or all.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    rank = int((values < threshold).sum())
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
    return vectors[:, :rank].contiguous()


def null_space_solver(
    moment: Tensor, config: EditConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> RecursionSolver:
    """Solver with C_0 = P / L2, P the projector on the null space (docs/mathematics.md, fact 3: AlphaEdit)."""
    check_moment(moment, config)
    prior = rk.Prior.null_space(null_basis(moment, config.null_threshold), config.l2)
    return RecursionSolver(rk.CovarianceState(prior, dtype=dtype, device=device), config.noise, True)
