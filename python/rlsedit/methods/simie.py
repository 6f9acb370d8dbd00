"""SimIE (Guo et al. 2025, Towards Lifelong Model Editing via Simulating Ideal Editor) over MEMIT.

The editor underneath proposes W~ from W_(t-1); with K the inputs of the layer at all tokens of the batch's statements,

    W_t = W_(t-1) + (lambda I + sum_(s<=t) K_s'K_s)^-1 K_t'K_t (W~ - W_(t-1))

which is the recursion on a ridge, with residual K_t (W~ - W_(t-1)) and noise 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import Tensor

import rlsedit_kernels as rk

from . import memit
from .method import Method
from .solver import Proposal, RecursionSolver, Removable, Solver, Start


@dataclass(frozen=True)
class SimIESolver:
    """State of one layer: the recursion on the ridge, and the editor underneath."""

    ridge: Solver
    base: Solver

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, SimIESolver]:
        """For token inputs K (n, d) and residuals K (W~ - W) (n, v)."""
        proposal, following = self.ridge.propose(keys, residual)
        return proposal, replace(self, ridge=following)

    def seen(self, keys: Tensor) -> SimIESolver:
        """With the editor underneath as it is after a batch of its keys (u, d): nothing is written, a form may move."""
        return replace(self, base=self.base.propose(keys, keys[:, :1])[1])

    def removed(self, keys: Tensor) -> tuple[Tensor, SimIESolver]:
        """Token rows taken out of the ridge."""
        gain, following = self._removable().removed(keys)
        return gain, replace(self, ridge=following)

    def rebuilt(self, rows: Callable[[], Iterable[tuple[Tensor, Tensor, float]]]) -> tuple[Tensor, SimIESolver]:
        """The ridge made anew from token rows."""
        shift, following = self._removable().rebuilt(rows)
        return shift, replace(self, ridge=following)

    def _removable(self) -> Removable:
        if not isinstance(self.ridge, Removable):
            raise TypeError(f"simie: the ridge must be a solver that can remove, got {type(self.ridge).__name__}")
        return self.ridge

    def health(self) -> dict[str, object]:
        """The report of the ridge's state."""
        return self.ridge.health()


def make(start: Start) -> SimIESolver:
    """The state of one layer."""
    prior = rk.Prior.ridge(len(start.moment), start.config.simie_ridge**0.5)
    state = rk.CovarianceState(prior, dtype=start.dtype, device=start.device)
    base = memit.METHOD.start(start.moment, start.config, start.dtype, start.device)
    return SimIESolver(RecursionSolver(state, lambda _keys: 1.0, "batch"), base)


METHOD = Method(
    "simie",
    "SimIE (Guo et al. 2025) over MEMIT: the parameter shift of an ideal editor, on a ridge over token features",
    prior=memit.METHOD.prior,
    noise=lambda _config, _keys: 1.0,
    solver=make,
    objective=lambda config: (config.simie_ridge**0.5, 0.0),
    signal="tokens",
    removable="downdate",
)
