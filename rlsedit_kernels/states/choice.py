"""form="auto": the cheapest form that is safe for the prior and the keys seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsedit_kernels.priors import PriorFactor

PLAIN_LIMIT = 1e-5
"""Largest rho at which the plain form is taken. Up to 4e-5 its error of W is that of the whitened form where the
prior is well conditioned (bench/forms.py)."""

PLAIN_CONDITION = 3e-4
"""Largest (unit roundoff) * condition of the prior at which it is taken: C_0 itself, rounded, is off by that
much in whitened coordinates."""

BATCH = 100
"""Batch size at which costs of forms are compared; the comparison hardly depends on it."""


WHITENED_LIMIT = 1e-3
"""Largest rho at which a float32 covariance is kept at all; above it only float64 holds (or a square root)."""


@dataclass(frozen=True)
class Choice:
    """A form by name, the dtype in which it is kept, and why."""

    form: str
    storage: torch.dtype
    reason: str


def rho(factor: PriorFactor, dtype: torch.dtype, largest_key: float) -> float:
    """The free warning: unit roundoff * lambda_max(C_0) * max |k|^2.

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
    """Take a form for a stream whose largest squared key norm so far is `largest_key`.

    A prior too weak for float32 (rho above `WHITENED_LIMIT`) gets a covariance kept in float64, whatever the
    dtype of keys and gains.
    """
    level = rho(factor, dtype, largest_key)
    if dtype == torch.float32 and not level <= WHITENED_LIMIT:
        kept = choose(factor, torch.float64, largest_key)
        why = f"rho {level:.1e} is above {WHITENED_LIMIT:g}: no float32 covariance would hold, kept in float64"
        return Choice(kept.form, torch.float64, why)
    if factor.root is None:
        return Choice("whitened", dtype, f"a ridge needs no matrix to whiten by (rho {level:.1e})")
    if not level <= PLAIN_LIMIT:
        why = f"rho {level:.1e} is above {PLAIN_LIMIT:g}: the plain form would lose digits in {dtype}"
        return Choice("whitened", dtype, why)
    if not 0.5 * torch.finfo(dtype).eps * factor.condition <= PLAIN_CONDITION:
        why = f"the prior has condition {factor.condition:.1e}: too much to round C_0 to {dtype}"
        return Choice("whitened", dtype, why)
    if flops("whitened", factor, factor.rank, True) < flops("plain", factor, 0, True):
        why = f"the prior has rank {factor.rank} of {factor.d}: cheaper than the plain form"
        return Choice("whitened", dtype, why)
    return Choice(
        "plain", dtype, f"rho {level:.1e} is at most {PLAIN_LIMIT:g}: the plain form is safe and the cheapest"
    )


def _rank(form: str, storage: torch.dtype) -> tuple[bool, bool]:
    return storage == torch.float64, form == "whitened"


def safest(form: str, storage: torch.dtype) -> bool:
    """Whether an automatic state has nowhere safer to go."""
    return _rank(form, storage) == (True, True)


def safer(decided: Choice, form: str, storage: torch.dtype) -> bool:
    """Whether a choice is safer than what is in use; a state never goes back."""
    return _rank(decided.form, decided.storage) > _rank(form, storage)
