"""form="auto": the cheapest form that is safe for the prior and the keys seen.

Order of safety, as measured (bench/forms.py): plain, whitened, inverse root in float32, then the same three in
float64. What decides is rho and, where the prior's condition enters, that. Cost is counted in flops of a batch on
a state that is full (`flops`; bench/form_cost.py sets it beside the clock).

Float64 is left to what no float32 form can hold. On a CPU the plain form in float64 costs as much as the inverse root
(half the rate at half the flops) and keeps more digits; but it takes twice the bytes, and on many GPUs float64 runs at
a small fraction of the rate. Where nearly every batch needs care (new directions at a rho above 1e-3) the clock is
for float64: a careful batch costs the root 6 times the plain form, in float64 storage it is 1.8; a state that has the
bytes may ask for dtype=torch.float64.

One case is different: a ridge, as long as it is kept as columns. Float64 columns take the bytes and the time that a
root kept as columns would take in float32, no d x d matrix appears, and all digits are kept. A weak ridge therefore
starts whitened in float64; one that has become a matrix before it turns out weak moves to the inverse root.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states import inverse_root

PLAIN_LIMIT = 1e-5
"""Largest rho at which the plain form is taken. Up to 4e-5 its error of W is that of the whitened form where the
prior is well conditioned (bench/forms.py)."""

PLAIN_CONDITION = 3e-4
"""Largest (unit roundoff) * condition of the prior at which it is taken: C_0 itself, rounded, is off by that
much in whitened coordinates."""

WHITENED_LIMIT = 1e-4
"""Largest rho at which a covariance is kept in working precision: on a weak ridge W is off by 6e-4 at 3e-5, by 4e-3
at 3e-4 and by 2e-2 at 3e-3 (bench/forms.py)."""

INVERSE_ROOT_LIMIT = 1.0
"""Largest rho at which an inverse root is kept in working precision: W is off by 2e-4 at 0.3 and at 30 on the ridges
of bench/forms.py, but by 6e-4 and 3e-3 where keys of a steeper spectrum come a few at a time."""

BATCH = 100
"""Batch size at which costs of forms are compared; the comparison hardly depends on it."""

SAFETY = ("plain", "whitened", "inverse_root")


@dataclass(frozen=True)
class Choice:
    """A form by name, the dtype in which it is kept, and why."""

    form: str
    storage: torch.dtype
    reason: str


def rho(factor: PriorFactor, dtype: torch.dtype, largest_key: float) -> float:
    """The free warning: unit roundoff * lambda_max(C_0) * max |k|^2 / noise.

    It bounds the rounding error of C in units in which what the keys know is of order 1.
    """
    return 0.5 * torch.finfo(dtype).eps * factor.largest * largest_key


def flops(form: str, factor: PriorFactor, columns: int, dense: bool, dtype: torch.dtype = torch.float32) -> float:
    """Flops of one batch of `BATCH` keys on the state, products and downdate (one triangle).

    Measured on a CPU core at d = 2048, u = 100 (bench/form_cost.py), relative to the plain form: whitened as a matrix
    1.9 (here 2.3), inverse root 1.6 (2) and in whitened coordinates 2.7 (3.3); in float64 plain 1.7 (2) and whitened
    3.6 (4.7).
    """
    d, r, u = factor.d, factor.rank, BATCH
    if form == "plain":
        return 3.0 * d * d * u
    mapping = 0.0 if factor.root is None else 4.0 * d * r * u
    if form == "inverse_root":
        return mapping + 6.0 * r * r * u if inverse_root.mapped(factor, dtype) else 6.0 * d * r * u
    return mapping + (3.0 * r * r * u if dense else 4.0 * r * columns * u)


def choose(factor: PriorFactor, dtype: torch.dtype, largest_key: float, dense: bool = False) -> Choice:
    """Take a form for a stream whose largest `counters.weighted` so far is `largest_key`.

    A stream too hard for every form in float32 gets its state kept in float64, whatever the dtype of keys and
    gains.

    Args:
        factor: of the prior.
        dtype: of keys and gains.
        largest_key: largest |k|^2 / noise.
        dense: whether the state keeps a matrix already; false at the start.
    """
    level = rho(factor, dtype, largest_key)
    root_holds = level <= INVERSE_ROOT_LIMIT
    if dtype == torch.float32 and not root_holds:
        return _in_float64(factor, largest_key, dense, f"rho {level:.1e} is above {INVERSE_ROOT_LIMIT:g}")
    if not level <= WHITENED_LIMIT:
        why = f"rho {level:.1e} is above {WHITENED_LIMIT:g}"
        if dtype == torch.float32 and factor.root is None and not dense:
            return _in_float64(factor, largest_key, dense, f"{why}, and float64 columns cost no more than a root")
        also = "" if root_holds else f" (even it may not do: above {INVERSE_ROOT_LIMIT:g})"
        return Choice("inverse_root", dtype, f"{why}: no covariance in {dtype} would hold, its root does{also}")
    if factor.root is None:
        return Choice("whitened", dtype, f"a ridge needs no matrix to whiten by (rho {level:.1e})")
    plain = _plain_is_unsafe(factor, dtype, level)
    if plain is None and flops("plain", factor, 0, True) <= flops("whitened", factor, factor.rank, True):
        return Choice(
            "plain", dtype, f"rho {level:.1e} is at most {PLAIN_LIMIT:g}: the plain form is safe and the cheapest"
        )
    why = plain or f"the prior has rank {factor.rank} of {factor.d}: cheaper than the plain form"
    if flops("inverse_root", factor, factor.rank, True, dtype) < flops("whitened", factor, factor.rank, True):
        return Choice("inverse_root", dtype, f"{why}; the root needs no map of keys and gains")
    return Choice("whitened", dtype, why)


def _plain_is_unsafe(factor: PriorFactor, dtype: torch.dtype, level: float) -> str | None:
    if not level <= PLAIN_LIMIT:
        return f"rho {level:.1e} is above {PLAIN_LIMIT:g}: the plain form would lose digits in {dtype}"
    if not 0.5 * torch.finfo(dtype).eps * factor.condition <= PLAIN_CONDITION:
        return f"the prior has condition {factor.condition:.1e}: too much to round C_0 to {dtype}"
    return None


def _in_float64(factor: PriorFactor, largest_key: float, dense: bool, why: str) -> Choice:
    kept = choose(factor, torch.float64, largest_key, dense)
    return Choice(kept.form, torch.float64, f"{why}: no float32 covariance would hold, kept in float64")


def next_safer(factor: PriorFactor, dtype: torch.dtype, largest_key: float, form: _Kept, why: str) -> Choice | None:
    """Where a state goes that drifts although rho did not say so; None from the safest.

    To a root in working precision where rho allows one, else to float64; columns of a ridge stay columns.

    Args:
        factor, dtype, largest_key: as for `choose`.
        form: what is in use.
        why: for the reason.
    """
    if form.dtype == torch.float64:
        return None if form.name != "plain" else Choice("inverse_root", torch.float64, why)
    columns = factor.root is None and not form.dense
    if form.name == "inverse_root" or columns or not rho(factor, dtype, largest_key) <= INVERSE_ROOT_LIMIT:
        return Choice("whitened" if columns else form.name, torch.float64, why)
    return Choice("inverse_root", form.dtype, why)


class _Kept(Protocol):
    """What is asked of a form."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def dense(self) -> bool: ...


def _rank(form: str, storage: torch.dtype) -> tuple[bool, int]:
    return storage == torch.float64, SAFETY.index(form)


def safest(form: str, storage: torch.dtype) -> bool:
    """Whether an automatic state has nowhere safer to go."""
    return _rank(form, storage) == (True, len(SAFETY) - 1)


def safer(decided: Choice, form: str, storage: torch.dtype) -> bool:
    """Whether a choice is safer than what is in use; a state never goes back."""
    return _rank(decided.form, decided.storage) > _rank(form, storage)
