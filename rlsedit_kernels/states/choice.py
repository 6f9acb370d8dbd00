"""form="auto": the cheapest form that is safe for the prior and the keys seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsedit_kernels.priors import PriorFactor

PLAIN_LIMIT = 1e-6
"""Largest rho at which the plain form is taken (design, section 2): above it the error of W grows with rho."""

BATCH = 100
"""Batch size at which costs of forms are compared; the comparison hardly depends on it."""


@dataclass(frozen=True)
class Choice:
    """A form by name, and why."""

    form: str
    reason: str


def rho(factor: PriorFactor, dtype: torch.dtype, largest_key: float) -> float:
    """The free warning of the design: unit roundoff * lambda_max(C_0) * max |k|^2.

    It bounds the rounding error of C in units in which what the keys know is of order 1.
    """
    return 0.5 * torch.finfo(dtype).eps * factor.largest * largest_key


def flops(form: str, factor: PriorFactor, columns: int, dense: bool) -> float:
    """Flops of one batch of `BATCH` keys on the state, products and downdate (one triangle)."""
    d, r, u = factor.d, factor.rank, BATCH
    if form == "plain":
        return 3.0 * d * d * u
    mapping = 0.0 if factor.root is None else 4.0 * d * r * u
    return mapping + (3.0 * r * r * u if dense else 4.0 * r * columns * u)


def choose(factor: PriorFactor, dtype: torch.dtype, largest_key: float) -> Choice:
    """Take a form for a stream whose largest squared key norm so far is `largest_key`."""
    level = rho(factor, dtype, largest_key)
    if factor.root is None:
        return Choice("whitened", f"a ridge needs no matrix to whiten by (rho {level:.1e})")
    if not level <= PLAIN_LIMIT:
        return Choice(
            "whitened",
            f"rho {level:.1e} is above {PLAIN_LIMIT:g}: the plain form would lose digits in {dtype}",
        )
    plain = flops("plain", factor, 0, True)
    whitened = flops("whitened", factor, factor.rank, True)
    if whitened < plain:
        return Choice("whitened", f"the prior has rank {factor.rank} of {factor.d}: cheaper than the plain form")
    return Choice("plain", f"rho {level:.1e} is at most {PLAIN_LIMIT:g}: the plain form is safe and the cheapest")
