"""guard="auto": a state that looks at itself now and then, and repairs itself or refuses before a weight is written.

The check is `health()`'s cheap one, the drift of a few probes. It is made before batches 2, 3, 5, 9, 17, 33, then
before every `EVERY`-th, and after any batch that had to be worked out in float64, since those are the ones that do
harm. What it costs, spread over the batches between two checks, is in bench/results/health_cost.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from rlsedit_kernels.errors import BreakdownError
from rlsedit_kernels.states.counters import Counters
from rlsedit_kernels.states.health import DRIFT_BROKEN, DRIFT_WARNING

GUARDS = ("auto", "off")

EVERY = 64
"""Batches between two checks once a stream has settled."""

FAR = 16
"""So many times more batches lie between two checks where the prior's factor is on another device than the state: a
check has to bring it over."""

MOVE_FROM = 0.2
"""An automatic form gives way from this fraction of the drift at which `health()` warns: before there is damage."""

History = Callable[[], Iterable[tuple[torch.Tensor, float]]]
"""Gives (K, noise) of all batches that a state holds, the one at hand not among them."""


_Callable = TypeVar("_Callable", bound=Callable[..., Any] | None)


class Watch:
    """The guard of one state.

    Args:
        guard: "auto" or "off".
        history: what the state is rebuilt from when it drifts; None: it moves to a safer form, or refuses.

    Raises:
        ValueError, TypeError: no such guard, or a history that cannot be called.
    """

    def __init__(self, guard: str, history: History | None) -> None:
        if guard not in GUARDS:
            raise ValueError(f"guard must be {' or '.join(map(repr, GUARDS))}, got {guard!r}")
        self.guard = guard
        self.history = checked_history(history)
        self.rebuild: Callable[[], None] | None = None
        """Set by an owner that must be rebuilt together with its state (`RLSFilter`)."""
        self.worst = 0.0
        """The largest drift beyond its warning that was seen since the state was built; 0 if there was none."""
        self.fault: str | None = None
        """Why the state refuses; None once it is repaired."""
        self._writes = -1
        self._careful = 0

    def copy(self, history: History | None = None) -> Watch:
        """For a copy of the state, which its owner does not own and which gets other batches, unless `history` says."""
        twin = Watch(self.guard, history)
        twin.worst, twin._writes, twin._careful = self.worst, self._writes, self._careful
        twin.fault = self.fault
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Pickled and deep copies have no history either."""
        return {**self.__dict__, "history": None, "rebuild": None}

    def keep(self, counters: Counters) -> None:
        """Note with a batch that is written what was seen before it: a check alone changes nothing of a state."""
        counters.worst_drift = max(counters.worst_drift, self.worst)
        counters.careful_checked = self._careful

    def resume(self, counters: Counters) -> None:
        """Go on as the guard of the state whose counters these are."""
        self.fault = None
        self.worst, self._writes, self._careful = counters.worst_drift, -1, counters.careful_checked

    def repaired(self) -> None:
        """The state has been made anew."""
        self.worst, self.fault = 0.0, None

    def broke(self, error: BreakdownError) -> None:
        """A batch has shown that the covariance is indefinite: it is so for all that come after it."""
        if self.guard != "off" and self.fault is None:
            self.fault = f"the state has broken down: {error}"

    def look(self, state: Guarded, *, repair: bool = True) -> None:
        """Check `state` if it is time to; repair it if need be, and if it may be repaired here.

        Raises:
            BreakdownError: it is broken, or was found so earlier, and cannot be repaired; nothing was changed.
        """
        if self.guard == "off":
            return
        why, verdict = "it broke down", "broken"
        if self.fault is None:
            if not self._due(state):
                return
            drift, verdict = self._measured(state)
            if verdict == "ok":
                return
            why = f"its probes have drifted by {drift:.1e}"
            if verdict == "broken":
                self.fault = _broken(state, drift)
        repaired = repair and self._rebuilt(state, verdict)
        if repaired:
            self.repaired()
            drift, verdict = self._measured(state)
            if verdict == "broken":
                self.fault = _broken(state, drift)
        if repair and verdict != "broken":  # what has drifted once will do so again
            repaired = state._give_way(why) or repaired
        state._counters.repairs += repaired
        if self.fault is not None:
            raise BreakdownError(self.fault)

    def refuse(self, state: Guarded) -> None:
        """Check `state` now; for what is rare and cannot be made again after a repair.

        Raises:
            BreakdownError: it is broken.
        """
        if self.guard == "off" or state._form is None or not getattr(state._form, "regular", True):
            return
        if self.fault is None:
            drift, verdict = self._measured(state)
            if verdict == "broken":
                self.fault = _broken(state, drift)
        if self.fault is not None:
            raise BreakdownError(self.fault)

    def _rebuilt(self, state: Guarded, verdict: str) -> bool:
        counters = state._counters
        kept = counters.restrictions if state._restriction is not None and self.rebuild is None else 0
        if counters.forgot or counters.singular_writes > kept or not state._has_history():
            return False  # a rebuild from batches would lose what was forgotten or forbidden
        if verdict != "broken" and counters.steps < counters.again:
            return False  # a form that is kept by request may drift for a while
        repairs = counters.repairs
        if self.rebuild is not None:
            self.rebuild()
        else:
            state.refactor(state._given_history())
        state._counters.repairs, state._counters.again = repairs, state.steps + EVERY
        return True

    def _measured(self, state: Guarded) -> tuple[float, str]:
        form = state._form
        state._settle()
        drift = state._probes.drift(form, state._factor)
        name = "plain" if form is None else form.name
        self.worst = max(self.worst, drift if drift > DRIFT_WARNING[name] else 0.0)
        self._writes, self._careful = state._writes, state._counters.careful_steps
        if not drift < DRIFT_BROKEN[name]:
            return drift, "broken"
        return drift, "ok" if drift <= MOVE_FROM * DRIFT_WARNING[name] else "drifting"

    def _due(self, state: Guarded) -> bool:
        counters, form = state._counters, state._form
        steps = counters.steps
        if form is None or steps < 1 or self._writes == state._writes or not getattr(form, "regular", True):
            return False
        root = state._factor.root
        every = EVERY if root is None or root.device == state.device else FAR * EVERY
        early = steps <= EVERY and steps & (steps - 1) == 0
        return early or steps % every == 0 or counters.careful_steps > self._careful


@dataclass(frozen=True)
class Moment:
    """Which state it was, and how many changes it had seen; a copy is another state."""

    state: object
    writes: int


class Guarded:
    """A state with a guard, what the guard asks of it, and the moments that batches are prepared at."""

    device: torch.device
    _watch: Watch
    _counters: Counters
    _factor: Any
    _form: Any
    _probes: Any
    _writes: int
    _own: object = None  # told apart from those of all other states, copies among them
    _origin: Moment | None = None  # of a copy: when it was one with another state
    _restriction: torch.Tensor | None = None  # basis (d, q) of what is forbidden

    @property
    def _moment(self) -> Moment:
        return Moment(self._own, self._writes)

    def _is_at(self, moment: Moment) -> bool:
        """Whether nothing has changed since; a copy that has not changed is still what it is a copy of."""
        return moment == self._moment or (moment == self._origin and moment.writes == self._writes)

    @property
    def form(self) -> str:
        """The form in use, by name."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Batches committed less batches removed."""
        return self._counters.steps

    @property
    def history(self) -> History | None:
        """Gives the batches so far when the state must be rebuilt; may be set, as for a copy that has none.

        Raises:
            TypeError: what is set cannot be called.
        """
        return self._watch.history

    @history.setter
    def history(self, history: History | None) -> None:
        self._watch.history = checked_history(history)

    def refactor(self, written: Iterable[tuple[torch.Tensor, float]]) -> None:
        """Rebuild the state from the prior and kept batches."""
        raise NotImplementedError

    def _give_way(self, why: str) -> bool:
        """Move to the next safer form; whether there was one."""
        raise NotImplementedError

    def _settle(self) -> None:
        """Make probes that have been put off."""
        raise NotImplementedError

    def _has_history(self) -> bool:
        """Whether there is something to rebuild the state from."""
        return self._watch.rebuild is not None or self._watch.history is not None

    def _given_history(self) -> Iterable[tuple[torch.Tensor, float]]:
        """What the history gives."""
        assert self._watch.history is not None
        return self._watch.history()


def checked_history(history: _Callable) -> _Callable:
    """`history`, or TypeError where it cannot be called."""
    if history is not None and not callable(history):
        raise TypeError(f"history must be callable and give the batches so far, got {type(history).__name__}")
    return history


def _broken(state: Guarded, drift: float) -> str:
    cures = ["give history=...", "call refactor(batches)"]
    if getattr(state, "_requested", "auto") != "auto":
        cures.append("use form='auto'")
    if state._form is None or state._form.dtype != torch.float64:
        cures.append("use float64")
    return (
        f"the {state.form} state is broken: probes of C S have drifted by {drift:.1e} after {state.steps} batches; "
        f"nothing was written. What helps: {', or '.join(cures)}"
    )
