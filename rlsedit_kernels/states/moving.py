"""How an automatic covariance state moves to a safer form while its stream runs (`states/choice.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from rlsedit_kernels.errors import BreakdownError, LeverageError
from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states import choice
from rlsedit_kernels.states.counters import weighted
from rlsedit_kernels.states.forgetting import ForgettingError
from rlsedit_kernels.states.held import MOST, carried, holding_keys, within_prior
from rlsedit_kernels.states.state import State


class Moving(State):
    """What a covariance state needs to choose its form and to leave it again."""

    _reason: str
    _requested: str
    _factor: PriorFactor
    _stale: int | None

    @contextlib.contextmanager
    def _unmoved_by_errors(self, blamed: bool = True) -> Iterator[None]:
        """An automatic state that has moved for a batch which is then refused goes back to the form it had.

        Where the batch has shown that C is indefinite the guard remembers it, if it is this state that is `blamed`. Not
        after a hard write or a restriction: in their directions K C K' is nothing but rounding, of either sign.
        """
        before, inner = (self._form, self._reason, self._writes), self._counters.largest_inner
        try:
            yield
        except BaseException as error:
            self._form, self._reason, self._writes = before
            self._counters.largest_inner = inner
            known = isinstance(error, (LeverageError, ForgettingError)) or self._counters.singular_writes
            if blamed and isinstance(error, BreakdownError) and not known:
                self._watch.broke(error)
            raise

    def _choose(self, K: Any, noise: float) -> Any:
        """The form for keys with a `largest`; an automatic one gives way when larger keys or less noise ask for it."""
        form = self._form
        largest = max(self._counters.largest_weighted, weighted(K.largest, noise))
        if form is None or (self._requested == "auto" and not choice.safest(form.name, form.dtype)):
            decided = choice.choose(self._factor, self.dtype, largest, dense=form is not None and form.dense)
            if form is None:
                self._form, self._reason = self._start(decided.form, decided.storage), decided.reason
            elif choice.safer(decided, form.name, form.dtype):
                self._move(form, decided)
        assert self._form is not None
        if choice.rho(self._factor, self._form.dtype, largest) > choice.PLAIN_LIMIT:
            self._form = self._within_prior(self._form)
        return self._form

    def _within_prior(self, form: Any) -> Any:
        """The form that stays within its prior; as it is where it does by itself."""
        return within_prior(form, self._factor)

    def _give_way(self, why: str) -> bool:
        """Move an automatic state to the next safer form; whether it has moved."""
        form = self._form
        if form is None or self._requested != "auto":
            return False
        decided = choice.next_safer(self._factor, self.dtype, self._counters.largest_weighted, form, why)
        return decided is not None and self._move(form, decided)

    def _move(self, form: Any, decided: choice.Choice) -> bool:
        moved = self._moved(form, decided)
        if moved is None:
            return False
        self._settle()  # the probes of the form that is left say what the move has cost
        was = f"{form.name} {str(form.dtype).removeprefix('torch.')}"
        self._form = moved
        self._counters.moved(form, moved, self._factor.largest)
        self._writes += 1  # what was prepared for the other form does not fit this one
        self._reason = f"moved from {was} after {self._counters.steps} batches: {decided.reason}"
        return True

    def _moved(self, form: Any, decided: choice.Choice) -> Any:
        """The decided form with what `form` has learnt, by the covariance in float64; None where it cannot be had."""
        if decided.form == form.name and self._factor.root is None:  # columns stay columns
            twin = form.clone()
            twin.to_(self.device, decided.storage, self._factor)
            return twin
        return carried(form, self._from_covariance(decided, form.covariance(torch.float64)))

    def _hold(self, prepared: Any) -> None:
        """Hold what a hard write has told, where the form needs it and rho or what is held already lets it."""
        form, factored = self._form, prepared.factored
        rows, told = prepared.keys.rows if factored.batch is None else factored.batch.rows, factored.root
        self._form = holding_keys(form, self._factor, rows, told, self._most(form, prepared.keys))
        self._count_unheld(form, told)

    def _most(self, form: Any, keys: Any) -> float:
        """Part of the space of edits that hard writes may hold, these keys with a `largest` among them."""
        largest = max(self._counters.largest_weighted, weighted(keys.largest, 0.0))
        return 1.0 if choice.rho(self._factor, form.dtype, largest) > choice.PLAIN_LIMIT else MOST

    def _count_unheld(self, form: Any, told: torch.Tensor) -> None:
        """A hard write behind which the state still has this form, and what it has told (u, w)."""
        self._counters.unheld += self._form is form and form.name in ("plain", "whitened") and told.shape[1] > 0

    def _singular_write(self) -> None:
        self._counters.singular_writes += 1
        self._stale = 20 + self._counters.singular_writes

    def _restricted(self) -> None:
        self._writes += 1
        self._singular_write()
        self._counters.restrictions += 1

    def _settle(self) -> None:
        """Probes after a hard write or a restriction; put off until something asks for them or is told to them."""
        if self._stale is not None:
            assert self._form is not None
            probes = self._probes.to(self.device)
            probes.begin_again(self._form, self._factor, self._stale)
            self._probes, self._stale = probes, None

    def _start(self, name: str, storage: torch.dtype) -> Any:
        """A form that holds the prior alone."""
        raise NotImplementedError

    def _from_covariance(self, decided: choice.Choice, C: torch.Tensor) -> Any:
        """The decided form that holds C (d, d) float64."""
        raise NotImplementedError
