"""Batches that cannot be taken back because they were not written, or left no trace, as far as a state can know."""

from __future__ import annotations

from typing import Any

import torch

from rlsedit_kernels.errors import LeverageError
from rlsedit_kernels.ops import _checks
from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states.counters import Counters
from rlsedit_kernels.states.report import null_fraction
from rlsedit_kernels.states.restriction import prior_products


def checked_noise(noise: float) -> float:
    """The noise > 0 of a batch that is to be taken back; TypeError or ValueError."""
    if (found := _checks.noise("remove", noise)) == 0.0:
        raise ValueError("remove: noise must be > 0: a hard write left no trace to remove; use refactor(batches)")
    return found


def refuse_unwritten(counters: Counters, form: Any = None) -> None:
    """LeverageError where no batch is left to be taken back; of a factor (`form`) UnderdeterminedError first."""
    if form is not None:
        form.require_regular()
    if counters.steps < 1:
        raise LeverageError(
            f"remove: the state holds {counters.steps} batches, written less taken back: this one was never written, "
            "or has been taken back already; nothing was changed"
        )


def refuse_forbidden(form: Any, factor: PriorFactor, counters: Counters, K: torch.Tensor, G: torch.Tensor) -> None:
    """LeverageError where a hard write or a restriction has left nothing of C in the directions of the keys.

    Args:
        form: of the covariance.
        factor, counters: of the prior, of the state.
        K: (u, d) keys.
        G: (u, u) = K C K', float64. It is compared with K C_0 K'.
    """
    if counters.singular_writes:
        refuse_forgone(form, G, prior_products(form, factor, K))


def refuse_forgone(form: Any, G: torch.Tensor, known: torch.Tensor) -> None:
    """`refuse_forbidden` for the diagonal (u,) of K C_0 K', float64."""
    left = (G.diagonal() / known.clamp_min(torch.finfo(torch.float64).tiny)).amax()
    if float(left) <= null_fraction(form):
        raise LeverageError(
            "remove: the keys lie where a hard write (noise 0) or a restriction lets nothing change: a batch of noise "
            "0 left no trace that could be taken back; nothing was changed. Rebuild with refactor(batches that stay)"
        )
