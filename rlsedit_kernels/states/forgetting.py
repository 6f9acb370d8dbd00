"""Forgetting until numbers end: what no batch tells of grows in C, and shrinks in R, by each forgetting factor.

A bound is carried along without asking the device; only where it is used up the true size is read.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch

from rlsedit_kernels.errors import BreakdownError
from rlsedit_kernels.priors import PriorFactor

_HEADROOM = 0.125
"""C may grow to this fraction of the largest number of the dtype."""


class ForgettingError(BreakdownError):
    """The state is sound, and can forget no more."""


def limit(dtype: torch.dtype) -> float:
    """What C may grow to."""
    return _HEADROOM * torch.finfo(dtype).max


def size(form: Any, factor: PriorFactor) -> float:
    """Bound of the largest number of C, from the diagonal of what a form of the covariance keeps; the host waits.

    Of a form that is spread over ranks all of them ask together.
    """
    if (spread := getattr(form, "largest_diagonal", None)) is not None:
        found = spread()
    elif (C := getattr(form, "C", getattr(form, "matrix", None))) is not None:
        found = float(C.diagonal().max())
    elif (A := getattr(form, "A", None)) is not None:
        found = float(A.square().sum(dim=1).max())
    else:
        added = sum(float(chunk.filled.double().square().sum()) for chunk in form.chunks if chunk.sign > 0.0)
        found = form.identity + added
    return found * factor.largest if form.maps else found


class Bound:
    """What is known of the size of one form without reading it: of C from above, of the pivots of R from below."""

    def __init__(self) -> None:
        self._form: weakref.ref[Any] | None = None  # a bound keeps no form alive that the state has left
        self._value = math.nan

    def __getstate__(self) -> dict[str, Any]:
        return {"_form": None, "_value": math.nan}

    def _is_of(self, form: Any) -> bool:
        return self._form is not None and self._form() is form

    def know(self, form: Any, value: float) -> None:
        """For a form as it is now."""
        self._form, self._value = weakref.ref(form), value

    def changed(self, form: Any, factor: float) -> None:
        """The form has been multiplied by this; additions to S only make the bound safer."""
        if self._is_of(form):
            self._value *= factor

    def followed(self, form: Any, by: Any, factor: float) -> None:
        """Another form has taken the place of one, multiplied by this."""
        if self._is_of(form):
            self.know(by, self._value * factor)

    def forget(self) -> None:
        """The form has changed in a way that the bound does not hold for."""
        self._form = None

    def check_covariance(self, op: str, form: Any, factor: PriorFactor, dtype: torch.dtype, forget: float) -> None:
        """BreakdownError where C / forget may overflow; nothing is written."""
        if self._is_of(form) and self._value / forget < limit(dtype):
            return
        self.know(form, size(form, factor))
        if not self._value / forget < limit(dtype):
            raise ForgettingError(f"{op}: C has grown to {self._value:.1e} {_advice(forget, dtype)}")

    def check_factor(self, op: str, form: Any, forget: float) -> None:
        """BreakdownError where a pivot of sqrt(forget) R may be too small for R^-1 R^-T; nothing is written."""
        if forget != 1.0:
            self.require_pivots(op, form, forget)

    def require_pivots(self, op: str, form: Any, forget: float) -> None:
        """`check_factor`, without forgetting too."""
        if not form.regular:
            return
        floor = limit(form.dtype) ** -0.5
        if self._is_of(form) and self._value * math.sqrt(forget) > floor:
            return
        self.know(form, form.smallest_pivot())
        if not self._value * math.sqrt(forget) > floor:
            raise ForgettingError(f"{op}: a pivot of R has fallen to {self._value:.1e} {_advice(forget, form.dtype)}")


def _advice(forget: float, dtype: torch.dtype) -> str:
    wider = ", or use float64, which lasts eight times as long" if dtype == torch.float32 else ""
    return (
        f"where no batch tells of anything, and {dtype} cannot hold more of it (forget = {forget:g}); nothing was "
        f"written. Keep all directions excited, write with forget=1, or start again with refactor(batches){wider}"
    )
