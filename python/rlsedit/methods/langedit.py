"""LangEdit (Sun et al. 2025, arXiv 2506.10800): AlphaEdit whose null space is that of statistics that grow.

    E_t = (N_(t-1) E_(t-1) + K'K) / (N_(t-1) + u),  N_0 = `langedit_samples`,  P_t the null space of E_(t-1)
    [P_t (K'K + M) + L2 I] dW = P_t K'E,  M the sum of earlier K'K

With Q_t a basis of P_t and A'A = M the gain is Q (L2 I + B'B)^-1 Q'K', B = A Q. Real statistics turn their null space
with every batch, so that nothing of C stays: the gain is then one solve with the smaller of B B' and B'B in float64,
and no d x d state is kept. Where P stays, or loses directions without turning, there is a state, which follows by
`restrict` (docs/mathematics.md, fact 9). The eigendecomposition for P_t is part of the method and remains its cost.
Where the statistics leave no null space, P = 0 and later batches write nothing, as by the rule; a warning says so.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

import rlsedit_kernels as rk

from .method import Method
from .priors import below, null_basis, null_space
from .solver import Proposal, Start, appended

logger = logging.getLogger(__name__)

FEW = 0.5
"""Up to so many keys for each dimension of the null space they are few, and a state costs more than it saves."""

TURNED = 1e-10
"""A basis of which more than this (root mean square over its directions) lies outside of the old one has turned."""

PROBES = 8
"""Random directions by which that is found."""


@dataclass(frozen=True)
class LangEditSolver:
    """State of one layer.

    Attributes:
        state: covariance on the present null space; None where it would not last, or while keys are few.
        basis: Q (d, r) float64 of the null space.
        moment, count: E and N.
        rows: all keys so far, A (n, d) with A'A = M / noise; None before the first batch.
        start: what the solver was made from.
        steps: batches so far.
        turned: whether the null space has turned with the last batch, as it is taken to before the first.
    """

    state: rk.CovarianceState | None
    basis: Tensor
    moment: Tensor
    count: float
    rows: Tensor | None
    start: Start
    steps: int = 0
    turned: bool = True

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, LangEditSolver]:
        """As AlphaEdit; afterwards statistics and null space take the keys in."""
        config, wide = self.start.config, keys.double()
        rows = appended(self.rows, keys, config.noise)
        gain, state = self._solved(keys, rows)
        count = self.count + len(keys)
        moment = (self.count * self.moment + wide.T @ wide) / count
        _, basis = below(moment, config.null_threshold)
        if basis.shape[1] == 0 < self.basis.shape[1]:
            logger.warning(
                "langedit: no eigenvalue of the statistics behind batch %d is below null_threshold = %g: nothing more "
                "is written to this layer", self.steps + 1, config.null_threshold,
            )  # fmt: skip
        turned = basis.shape[1] == 0 or _turned(self.basis, basis)
        if state is not None and not turned and basis.shape[1] < self.basis.shape[1]:
            complete, _ = torch.linalg.qr(self.basis.T @ basis, mode="complete")
            state.restrict(self.basis @ complete[:, basis.shape[1] :])
        following = replace(
            self, state=None if turned else state, basis=basis, moment=moment, count=count, rows=rows,
            steps=self.steps + 1, turned=turned,
        )  # fmt: skip
        return Proposal(gain @ residual, gain), following

    def _solved(self, keys: Tensor, rows: Tensor) -> tuple[Tensor, rk.CovarianceState | None]:
        """The gain (d, u) of a batch, the last of `rows`, and the state behind it where there is one."""
        if self.state is None and (self.turned or len(rows) <= FEW * self.basis.shape[1]):
            return self._from_keys(keys, rows).to(keys.dtype), None
        state = self._rebuilt() if self.state is None else self.state.clone()
        return state.update(keys, noise=self.start.config.noise), state

    def _from_keys(self, keys: Tensor, rows: Tensor) -> Tensor:
        """The gain (d, u) float64 without a state: Q B' (L2 I + B B')^-1, or Q (L2 I + B'B)^-1 B' for many rows."""
        config, inside = self.start.config, rows @ self.basis
        if inside.shape[1] == 0:
            return self.basis.new_zeros(len(self.basis), len(keys))
        few = inside.shape[0] <= inside.shape[1]
        system = inside @ inside.T if few else inside.T @ inside
        system.diagonal().add_(config.l2)
        factor = torch.linalg.cholesky(system)
        if few:
            batch = torch.eye(len(rows), dtype=system.dtype, device=system.device)[:, -len(keys) :]
            return self.basis @ (inside.T @ torch.cholesky_solve(batch, factor)) / config.noise**0.5
        return self.basis @ torch.cholesky_solve(self.basis.T @ keys.double().T, factor) / config.noise

    def _rebuilt(self) -> rk.CovarianceState:
        """A state that holds all keys so far, on the present null space."""
        prior = rk.Prior.null_space(self.basis, self.start.config.l2)
        state = rk.CovarianceState(prior, dtype=self.start.dtype, device=self.start.device)
        if self.rows is not None:
            state.refactor([(self.rows, 1.0)])
        return state

    def health(self) -> dict[str, object]:
        """The state's own report where there is one, with the rank of the null space and the number of keys kept."""
        report: dict[str, object] = {"form": "keys"} if self.state is None else asdict(self.state.health())
        rows = 0 if self.rows is None else len(self.rows)
        return {**report, "steps": self.steps, "null_space": self.basis.shape[1], "rows": rows}


def _turned(old: Tensor, new: Tensor) -> bool:
    """Whether a part of the space of `new` lies outside of that of `old`, by a few random directions of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(new.shape[1], PROBES, dtype=new.dtype, generator=generator, device="cpu").to(new.device)
    inside = new @ x
    outside = inside - old @ (old.T @ inside)
    return float(outside.norm() / inside.norm()) > TURNED


def make(start: Start) -> LangEditSolver:
    """The state of one layer."""
    moment = start.moment.to(start.device, torch.float64)
    basis = null_basis(moment, start.config.null_threshold)
    return LangEditSolver(None, basis, moment, start.config.langedit_samples, None, start)


METHOD = Method(
    "langedit",
    "LangEdit (Sun et al. 2025): AlphaEdit with the null space of statistics that grow",
    prior=null_space,
    solver=make,
    soft=True,
    entangled="the null space of later batches was set by the keys of earlier ones",
)
