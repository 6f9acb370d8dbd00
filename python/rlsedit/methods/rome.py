"""ROME (Meng et al. 2022, eq. 2) as released: one fact, one layer, two kinds of key.

    dW = C_0 k (v* - W k_e)' / (k_e' C_0 k),   C_0 = E[k k']^-1

k is the mean key over the contexts and k_e that of the bare prompt. The mixture is what r-ROME mends.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

import rlsedit_kernels as rk

from .method import Method
from .priors import unweighted
from .solver import Proposal, Start, gain_alone


@dataclass(frozen=True)
class RomeSolver:
    """Gain of a hard write for k, scaled so that k_e and not k meets its target; never commits."""

    state: rk.CovarianceState

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, RomeSolver]:
        """For keys (1, d), residual (1, v) and bare (1, d)."""
        if len(keys) != 1 or bare is None:
            raise ValueError(f"rome: keys must be one at a time, with that of the bare prompt; got {len(keys)}")
        gain, following = gain_alone(self.state, keys, 0.0)
        match = float(bare @ gain)
        if not abs(match) > 1e-6:
            raise ValueError(
                f"rome: the key of the bare prompt must not be orthogonal to the mean key, got {match:.1e}; use r_rome"
            )
        gain = gain / match
        return Proposal(gain @ residual, gain), RomeSolver(following)

    def health(self) -> dict[str, object]:
        """The state's own report."""
        return asdict(self.state.health())


def make(start: Start) -> RomeSolver:
    """The state of one layer."""
    prior = unweighted(start.moment, start.config)
    return RomeSolver(rk.CovarianceState(prior, dtype=start.dtype, device=start.device))


METHOD = Method(
    "rome",
    "ROME (Meng et al. 2022) as released: one fact and one layer at a time, an equality constraint",
    prior=unweighted,
    solver=make,
    commit="never",
    single=True,
    removable="solve",
)
