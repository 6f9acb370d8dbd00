"""UltraEdit (Gu et al. 2025, arXiv 2505.14679): one ridge solve from a layer's inputs and the gradients of its outputs.

    v_i = -rate |k^_i|^2 g^_i,   dW = (K'K + I)^-1 K'V

over all tokens of a batch, k^ and g^ being inputs and gradients normalised by their running mean and spread
("lifelong normalisation"). Nothing but these statistics outlives a batch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

import rlsedit_kernels as rk

from .method import Method
from .solver import Proposal, Start, gain_alone


@dataclass(frozen=True)
class Normaliser:
    """Running mean and sum of squares of features (n, f); as released, a batch adds n times its unbiased variance."""

    count: int
    mean: Tensor
    squares: Tensor

    def with_batch(self, features: Tensor) -> Normaliser:
        """Statistics after a batch (n, f)."""
        n, total = len(features), self.count + len(features)
        delta = features.mean(0) - self.mean
        spread = features.var(0) if n > 1 else torch.zeros_like(delta)
        squares = self.squares + n * spread + (self.count * n / total) * delta.square()
        return Normaliser(total, self.mean + (n / total) * delta, squares)

    def __call__(self, features: Tensor) -> Tensor:
        """(x - mean) / standard deviation."""
        eps = torch.finfo(features.dtype).eps
        deviation = (self.squares / (self.count - 1 + eps)).sqrt()
        return (features - self.mean) / (deviation + eps)


@dataclass(frozen=True)
class UltraEditSolver:
    """State of one layer: the statistics, and the ridge that is never updated."""

    state: rk.CovarianceState
    rate: float
    normaliser: Normaliser | None = None

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, UltraEditSolver]:
        """For inputs K (n, d) and gradients of the loss in the outputs (n, v), in the place of a residual."""
        features = torch.cat([keys, residual], 1)
        before = self.normaliser or Normaliser(0, torch.zeros_like(features[0]), torch.zeros_like(features[0]))
        normaliser = before.with_batch(features)
        seen, gradients = normaliser(features).split([keys.shape[1], residual.shape[1]], 1)
        values = -self.rate * seen.square().sum(1, keepdim=True) * gradients
        gain, following = gain_alone(self.state, keys, 1.0)
        return Proposal(gain @ values, None), replace(self, state=following, normaliser=normaliser)

    def health(self) -> dict[str, object]:
        """The state's own report."""
        return asdict(self.state.health())


def make(start: Start) -> UltraEditSolver:
    """The state of one layer."""
    prior = rk.Prior.ridge(len(start.moment), 1.0)
    return UltraEditSolver(
        rk.CovarianceState(prior, dtype=start.dtype, device=start.device), start.config.ultraedit_rate
    )


METHOD = Method(
    "ultraedit",
    "UltraEdit (Gu et al. 2025): one ridge solve from normalised inputs and gradients, no z*",
    prior=lambda moment, _config: rk.Prior.ridge(len(moment), 1.0),
    solver=make,
    commit="never",
    signal="gradients",
    entangled="its running statistics normalise all later edits",
)
