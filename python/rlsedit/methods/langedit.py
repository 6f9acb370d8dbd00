"""LangEdit (Sun et al. 2025, arXiv 2506.10800): AlphaEdit whose null space is that of statistics that grow.

    E_t = (N_(t-1) E_(t-1) + K'K) / (N_(t-1) + u),  N_0 = `langedit_samples`,  P_t the null space of E_(t-1)
    [P_t (K'K + M) + L2 I] dW = P_t K'E,  M the sum of earlier K'K

With Q_t a basis of P_t that is C = Q (Q' (L2 I + M) Q)^-1 Q'. Where P loses directions and does not turn, C follows by
`restrict` (docs/mathematics.md, fact 9); where it turns or grows, C is rebuilt from the keys kept. The
eigendecomposition for P_t is part of the method and remains its cost.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

import rlsedit_kernels as rk

from ..config import EditConfig
from .method import Method, Proposal, Start
from .priors import null_basis, null_space
from .solver import appended

TURNED = 1e-10
"""A basis of which more than this (root mean square over its columns) lies outside of the old one has turned."""


@dataclass(frozen=True)
class LangEditSolver:
    """State of one layer.

    Attributes:
        state: covariance on the present null space.
        basis: Q (d, r) float64 of it.
        moment, count: E and N.
        rows: all keys so far, A with A'A = M / noise; None before the first batch.
        config: hyper-parameters.
    """

    state: rk.CovarianceState
    basis: Tensor
    moment: Tensor
    count: float
    rows: Tensor | None
    config: EditConfig

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, LangEditSolver]:
        """As AlphaEdit; afterwards statistics and null space take the keys in.

        Raises:
            ValueError: no null space is left.
        """
        following = self.state.clone()
        gain = following.update(keys, noise=self.config.noise)
        wide = keys.double()
        count = self.count + len(keys)
        moment = (self.count * self.moment + wide.T @ wide) / count
        basis = null_basis(moment, self.config.null_threshold)
        rows = appended(self.rows, keys, self.config.noise)
        grown = replace(self, moment=moment, count=count, rows=rows, basis=basis)
        return Proposal(gain @ residual, gain), grown._moved(following, self.basis)

    def _moved(self, state: rk.CovarianceState, old: Tensor) -> LangEditSolver:
        """`state`, on the null space `old`, taken to the present one."""
        inside = old.T @ self.basis
        turn = torch.linalg.matrix_norm(self.basis - old @ inside) / self.basis.shape[1] ** 0.5
        if float(turn) > TURNED:
            assert self.rows is not None
            prior = rk.Prior.null_space(self.basis, self.config.l2)
            state = rk.CovarianceState(prior, dtype=state.dtype, device=state.device)
            state.refactor([(self.rows, 1.0)])
        elif self.basis.shape[1] < old.shape[1]:
            lost = old @ torch.linalg.qr(inside, mode="complete")[0][:, self.basis.shape[1] :]
            state.restrict(lost)
        return replace(self, state=state)

    def health(self) -> dict[str, object]:
        """The state's own report, with the rank of the null space."""
        return {**asdict(self.state.health()), "null_space": self.basis.shape[1]}


def make(start: Start) -> LangEditSolver:
    """The state of one layer."""
    moment = start.moment.to(start.device, torch.float64)
    basis = null_basis(moment, start.config.null_threshold)
    prior = rk.Prior.null_space(basis, start.config.l2)
    state = rk.CovarianceState(prior, dtype=start.dtype, device=start.device)
    return LangEditSolver(state, basis, moment, start.config.langedit_samples, None, start.config)


METHOD = Method(
    "langedit",
    "LangEdit (Sun et al. 2025): AlphaEdit with the null space of statistics that grow",
    prior=null_space,
    solver=make,
    entangled="the null space of later batches was set by the keys of earlier ones",
)
