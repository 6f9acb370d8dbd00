"""A covariance made anew, in float64, from the prior and the batches that it is to hold."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rlsedit_kernels.ops import _checks
from rlsedit_kernels.states import inverse_root, report, restriction
from rlsedit_kernels.states.coordinates import unwhiten_transposed
from rlsedit_kernels.states.counters import Counters
from rlsedit_kernels.states.health import Probes
from rlsedit_kernels.states.held import DEPENDENT_KEYS, Directions, joined
from rlsedit_kernels.states.keys import checked_keys, pairs
from rlsedit_kernels.states.moving import Moving


def rebuilt(state: Moving, written: Iterable[tuple[torch.Tensor, float]]) -> tuple[torch.Tensor, Counters, Probes]:
    """C (d, d) float64 of these batches under the prior and the restrictions of a state, which is not changed.

    Args:
        state: gives prior, restrictions, and the form asked for.
        written: as for `CovarianceState.refactor`.

    Returns:
        C, the counters of such a stream (`largest_inner` in whitened coordinates, where a form may have these), and
        probes that hold its batches, but not the restrictions.
    """
    factor, counters = state._factor, Counters()
    information = state.prior.factor.precision(state.device)
    probes, within = Probes.start(factor, state.device), _Whitened(state)
    for K, noise in pairs("refactor", written):
        keys = checked_keys("refactor", K, state.d, state.dtype, state.device)
        if _checks.noise("refactor", noise) == 0.0:
            raise ValueError("refactor: noise must be > 0 for every batch")
        wide = keys.rows.to(torch.float64)
        information.addmm_(wide.mT, wide, alpha=1.0 / noise)
        probes.write(keys, noise, 1.0)
        counters.steps += 1
        counters.see(keys.largest, noise)
        counters.largest_inner = max(counters.largest_inner, within.largest(wide))
    C = report.inverse_on_range(information, factor)
    if state._restriction is not None:
        C = restriction.restricted(C, state._restriction)
        counters.singular_writes = counters.restrictions = 1
    return C, counters, probes


class _Whitened:
    """Squared lengths of keys as a form in whitened coordinates has them, without what is restricted."""

    def __init__(self, state: Moving) -> None:
        self._factor, asked = state._factor, state._requested
        rooted = asked == "inverse_root" and inverse_root.mapped(self._factor, state.dtype)
        self._wanted = rooted or asked in ("auto", "whitened")
        self._held: Directions | None = None
        if self._wanted and state._restriction is not None:
            forbidden = unwhiten_transposed(self._factor, state._restriction)
            self._held = Directions(joined(None, forbidden, DEPENDENT_KEYS), torch.float64)

    def largest(self, K: torch.Tensor) -> float:
        """The largest |k T|^2 of keys (u, d) float64; 0 where no form asks for it."""
        if not self._wanted:
            return 0.0
        inner = unwhiten_transposed(self._factor, K.mT).mT
        inner = inner if self._held is None else self._held.outside_rows(inner)
        return float(torch.linalg.vector_norm(inner, dim=1).max()) ** 2
