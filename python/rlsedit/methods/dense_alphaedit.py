"""AlphaEdit as published, one dense solve a batch: the baseline that the recursion is measured against."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .priors import null_basis
from .solver import Proposal, Start


@dataclass(frozen=True)
class DenseAlphaEdit:
    """[P (K'K + M) + L2 I] X = P K'E, M the sum of earlier K'K (Fang et al. 2025, eq. 14 and released code).

    Keeps P and M (d, d) and factors a d x d matrix for each batch. Not in `list_methods()`.
    """

    projector: Tensor
    past: Tensor
    l2: float
    noise: float

    @classmethod
    def make(cls, start: Start) -> DenseAlphaEdit:
        """The first state: P from the second moment, M = 0."""
        config = start.config
        basis = null_basis(start.moment, config.null_threshold)
        projector = (basis @ basis.T).to(device=start.device, dtype=start.dtype)
        return cls(projector, torch.zeros_like(projector), config.l2, config.noise)

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, DenseAlphaEdit]:
        """One dense solve with the (d, v) right-hand side."""
        keys, residual = keys.to(self.past.dtype), residual.to(self.past.dtype)
        past = self.past + keys.T @ keys / self.noise
        left = self.projector @ past
        left.diagonal().add_(self.l2)
        update = torch.linalg.solve(left, self.projector @ (keys.T @ residual) / self.noise)
        return Proposal(update, None), replace(self, past=past)

    def health(self) -> dict[str, object]:
        """Kind and size."""
        return {"kind": "dense", "d": len(self.past)}
