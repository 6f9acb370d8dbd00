"""LyapLock (Wang et al. 2025, arXiv 2505.15702): the weight of the anchor follows a queue of its violations.

With A = mom2_weight E[k k'], D_t = W_t - W_0 and L_t = tr(D_t' A D_t), the change of batch t minimises

    |K_t W - (K_t W_(t-1) + E_t)|^2 + sum_(s<t) |K_s W - K_s W_s|^2 + q_t tr((W - W_0)' A (W - W_0))
    q_(t+1) = max(q_t + L_t / (alpha L_1) - 1, 1),  q_1 = 1

(the released code's V = 1, b = 0 and a Z = q with a = 1 / sqrt(alpha L_1)). Earlier targets are the outputs that were
reached, not those that were asked for: the gradient that batch t - 1 leaves is then g = K_(t-1)' (E - K dW), and

    dW_t = C_t (K_t' E_t - g),  C_t = (q_t A + sum_(s<=t) K_s'K_s)^-1

While q stays both parts come from gains, g_t E_t - (g_(t-1) - g_t K_t g_(t-1)) (E - K dW)_(t-1). Where q moves, C is
refactorised and g gains (q_t - q_(t-1)) A D.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

import rlsedit_kernels as rk

from ..config import EditConfig
from .method import Method
from .priors import anchor, weighted
from .solver import Proposal, Start, appended


@dataclass(frozen=True)
class Last:
    """What batch t - 1 leaves: its keys (u, d) and gain (d, u), the error that remained (u, v), and D (d, v)."""

    keys: Tensor
    gain: Tensor
    remaining: Tensor
    shift: Tensor


@dataclass(frozen=True)
class LyapLockSolver:
    """State of one layer.

    Attributes:
        state: covariance with the anchor `weight` times A.
        moment: E[k k'] float64.
        gram: mu^2 A in the dtype of the state.
        weight, moved: q for the next batch, and by how much it has just changed.
        limit: alpha L_1, None before the first batch.
        rows: all keys before the next batch, for refactorisation.
        last: None before the first batch.
    """

    state: rk.CovarianceState
    moment: Tensor
    gram: Tensor
    config: EditConfig
    weight: float = 1.0
    moved: float = 0.0
    limit: float | None = None
    rows: Tensor | None = None
    last: Last | None = None

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, LyapLockSolver]:
        """dW_t and the state with the queue of batch t + 1."""
        noise, last = self.config.noise, self.last
        following = self.state.clone()
        gain = following.update(keys, noise=noise)
        update = gain @ residual
        if last is not None:
            update += gain @ ((keys @ last.gain) @ last.remaining) - last.gain @ last.remaining
            if self.moved != 0.0:  # a dense product, as C was made anew: in float64, since C and A nearly cancel
                pull = (self.moved * self.config.mu**2 * self.config.mom2_weight) * (self.moment @ last.shift.double())
                update -= (following.to(dtype=torch.float64).covariance() @ pull).to(update.dtype)
        shift = update if last is None else last.shift + update
        after = replace(self, state=following, moved=0.0, last=Last(keys, gain, residual - keys @ update, shift))
        return Proposal(update, None), replace(after._queued(), rows=appended(self.rows, keys, noise))

    def _queued(self) -> LyapLockSolver:
        """The queue takes the loss of this batch in; where the weight moves, the covariance is made anew."""
        assert self.last is not None
        shift = self.last.shift
        loss = float(torch.sum(shift * (self.gram @ shift), dtype=torch.float64))
        limit = self.config.lyap_alpha * loss if self.limit is None else self.limit
        weight = max(self.weight + loss / limit - 1.0, 1.0) if limit > 0 else self.weight
        if weight == self.weight:
            return replace(self, limit=limit if limit > 0 else None)
        prior = weighted(weight * self.moment, self.config, 0.0)
        state = rk.CovarianceState(prior, dtype=self.state.dtype, device=self.state.device)
        if self.rows is not None:
            state.refactor([(self.rows, 1.0)])
        gain = state.update(self.last.keys, noise=self.config.noise)
        last = replace(self.last, gain=gain)
        return replace(self, state=state, weight=weight, moved=weight - self.weight, limit=limit, last=last)

    def health(self) -> dict[str, object]:
        """The state's own report, with the weight of the anchor."""
        return {**asdict(self.state.health()), "anchor_weight": self.weight}


def make(start: Start) -> LyapLockSolver:
    """The state of one layer."""
    config = start.config
    state = rk.CovarianceState(anchor(start.moment, config), dtype=start.dtype, device=start.device)
    gram = config.mu**2 * config.mom2_weight * start.moment
    return LyapLockSolver(
        state, start.moment.to(start.device, torch.float64), gram.to(start.device, start.dtype), config
    )


METHOD = Method(
    "lyaplock",
    "LyapLock (Wang et al. 2025): the weight of the anchor follows a queue of its violations",
    prior=anchor,
    solver=make,
    soft=True,
    entangled="the weight of the anchor was set by the edits that would go",
)
