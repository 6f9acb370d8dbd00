"""What the two kinds of state have in common: `CovarianceState` keeps C = S^-1, `SquareRootState` a factor of S."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch

from rlsedit_kernels.ops import _checks
from rlsedit_kernels.priors import Prior
from rlsedit_kernels.states.counters import Counters
from rlsedit_kernels.states.forgetting import Bound
from rlsedit_kernels.states.guard import Guarded
from rlsedit_kernels.states.modes import normal_mode

_State = TypeVar("_State", bound="State")


class State(Guarded):
    """A state of a stream: a prior, and all that its batches have told.

    A subclass has `gain`, `prepare`, `write` and what follows from them, and `clone`.
    """

    prior: Prior
    dtype: torch.dtype
    _bound: Bound

    @property
    def d(self) -> int:
        """Dimension of a key."""
        return self.prior.d

    @normal_mode()
    def look(self) -> None:
        """The guard's check, if it is time for one; every batch makes it by itself.

        Raises:
            BreakdownError: the state is broken and could not be repaired; nothing was changed.
        """
        self._watch.look(self)

    @normal_mode()
    def convert(self, form: str) -> State:
        """A new state in another form, "square_root" among them; this one is unchanged (`states/conversion.py`).

        Returns:
            A `SquareRootState` for "square_root", else a `CovarianceState`.

        Raises:
            ValueError: no such form, or the prior is nothing: a covariance needs one.
            UnderdeterminedError: the state started from nothing and has seen too little.
        """
        from rlsedit_kernels.states import conversion  # it knows both kinds of state, which stand above this file

        self._settle()
        return conversion.converted(self, form)

    def clone(self: _State) -> _State:
        """An independent copy without a history; the prior is shared."""
        raise NotImplementedError

    def _twin(self: _State) -> _State:
        """A copy with counters and guard of its own; form and probes are those of the original still."""
        twin = copy.copy(self)
        twin._counters = copy.copy(self._counters)
        twin._watch, twin._bound = self._watch.copy(), Bound()
        twin._own, twin._origin = object(), self._moment
        return twin

    def __setstate__(self, found: dict[str, Any]) -> None:
        self.__dict__.update(found)
        if torch.is_inference_mode_enabled():  # what is read or copied there is of that mode
            self.__dict__.update(self.clone().__dict__)

    def _resume(self, form: Any, probes: Any, counters: Counters, restriction: torch.Tensor | None) -> None:
        """Become what was saved; nothing can fail any more."""
        self._form, self._probes, self._counters, self._restriction = form, probes, counters, restriction
        self._watch.resume(counters)
        self._writes += 1

    def _count_written(self, largest: float, noise: float, forget: float) -> None:
        """A batch has been written whose longest key has this squared norm."""
        counters = self._counters
        self._writes += 1
        counters.steps += 1
        counters.see(largest, noise)
        counters.forgot = counters.forgot or forget != 1.0
        self._watch.keep(counters)

    def _count_removed(self, leverage: float) -> None:
        """A batch of this leverage has been taken back."""
        counters = self._counters
        self._writes += 1
        counters.steps -= 1
        counters.largest_leverage = max(leverage, counters.largest_leverage or 0.0)
        self._watch.keep(counters)


def checked_start(name: str, prior: object, dtype: object) -> Prior:
    """`prior`; TypeError, in the name of the class, unless it is a `Prior` and `dtype` one that states work in."""
    if not isinstance(prior, Prior):
        raise TypeError(f"{name}: prior must be a Prior, got {type(prior).__name__}")
    checked_dtype(name, dtype)
    return prior


def checked_dtype(op: str, dtype: object) -> None:
    """TypeError unless `dtype` is one that states work in."""
    if dtype not in _checks.DTYPES:
        raise TypeError(f"{op}: dtype must be torch.float32 or torch.float64, got {dtype}")
