"""RLSFilter: a weight kept at the minimiser of a growing least-squares problem with two anchors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from rlsedit_kernels.errors import BreakdownError, LeverageError, UnderdeterminedError
from rlsedit_kernels.filter_saving import Saving
from rlsedit_kernels.ops import _checks
from rlsedit_kernels.ops.contract import aligned
from rlsedit_kernels.priors import Prior
from rlsedit_kernels.rounding import Rounding
from rlsedit_kernels.solutions import CarriedSolution, Check, GainSolution, Outcome, Solution, misfit
from rlsedit_kernels.states import CovarianceState, Health, SquareRootState
from rlsedit_kernels.states.guard import checked_history
from rlsedit_kernels.states.health import WEIGHT_WARNING
from rlsedit_kernels.states.keys import Keys, Values, finite, measured_keys, measures, placed, shaped_keys, triples
from rlsedit_kernels.states.modes import normal_mode
from rlsedit_kernels.states.reading import norm, scalars
from rlsedit_kernels.states.removal import checked_noise

FilterHistory = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor, float]]]
"""Gives (K, V, noise) of all batches that a filter holds, the one at hand not among them."""

LAYOUTS = ("in_out", "out_in")
STATES = ("covariance", "square_root")
SOLUTIONS = {"covariance": ("gain",), "square_root": ("carried", "gain")}
"""Ways to the weight by state, the default first."""

COST_ERROR = 0.25
PEAK_ERROR = 0.25
"""Parts of the cost of a batch that is taken back, and of the largest objective so far, by which the objective may
become negative by rounding. Removals of a leverage near 1 multiply errors, most with huge and very unequal keys
in float32, and what is refused must be clearly wrong."""


@dataclass(frozen=True)
class Step:
    """What one batch did; norms are Frobenius norms.

    Attributes:
        innovation_norm: |E|, E = V - K W before the batch (a priori error); NaN where there was no weight yet.
        residual_norm: |V - K W| after it (a posteriori error); NaN where there is no weight yet. After a hard write it
            is what was not written: of keys too near each other to be told apart (`CovarianceState.gain`).
        objective: J_t, the minimum of the objective over all batches so far (docs/mathematics.md, fact 6).
        parameter_bound: |W_t - W_0| is at most this (fact 7); None where lambda = 0 or bounds are not tracked.
        anchor_bound: |K_0 (W_t - W_0)| is at most this (fact 7); None where mu = 0 or bounds are not tracked.
    """

    innovation_norm: float
    residual_norm: float
    objective: float
    parameter_bound: float | None
    anchor_bound: float | None


class RLSFilter(Saving):
    """Minimiser of sum_s |K_s W - V_s|^2 / noise_s + lambda^2 |W - W_0|^2 + mu^2 |K_0 (W - W_0)|^2.

    Args:
        weight: W_0, (d, v) for layout "in_out" (row form, `Conv1D`), (v, d) for "out_in" (`nn.Linear`). Kept
            in the dtype of the state: a float16 or bfloat16 weight gets a float32 master.
        prior: S_0 of the recursion. The state lives where the weight does; the prior may lie on the CPU all the same
            (`CovarianceState`, `device`).
        state: "covariance" (`CovarianceState`) or "square_root" (`SquareRootState`, streaming QR: for a prior too weak
            for a covariance in this dtype, or none at all).
        layout: "in_out" or "out_in"; never guessed, because a square weight would hide a mistake.
        form: form of the covariance, as for `CovarianceState`.
        solution: how the weight is found. "gain": W <- W + g E with every batch, the only way of a covariance.
            "carried" (square_root, its default): the right-hand side is rotated along and W = W_0 + R^-1 B is solved
            for when `weight` is read; more accurate where the prior is weak.
        dtype: torch.float32 or torch.float64; None takes that of the weight, float32 for half precision.
        track_bounds: whether to form V - K W_0 as well, which the bounds need: a second product K W a batch
            and a copy of W_0.
        inplace: write to the tensor `weight` itself (its dtype must be that of the state), not to a copy.
        guard: "auto" checks the state as the stream goes on (`states/guard.py`): one that drifts is rebuilt from
            `history` together with the weight, and moves to a safer form where the form is automatic; one that is
            broken and cannot be repaired refuses further batches. "off" leaves it to the caller to ask `health()`.
        history: gives (K, V, noise) of all batches that are held, the one at hand not among them; called only when the
            filter must be rebuilt.

    Raises:
        TypeError, ValueError: an argument does not fit.

    `clone`, `copy.deepcopy`, `pickle` and `torch.save` give an independent filter that goes on to the same bits, with a
    weight of its own (one that is written in place stays that of its layer where one `torch.save` has both). It has no
    history, since that of the original gives the batches of the original: set `history` of the copy. `state_dict`
    gives tensors and plain values.
    """

    @normal_mode()
    def __init__(
        self,
        weight: torch.Tensor,
        prior: Prior,
        state: str = "covariance",
        *,
        layout: str,
        form: str = "auto",
        dtype: torch.dtype | None = None,
        solution: str | None = None,
        track_bounds: bool = True,
        inplace: bool = False,
        guard: str = "auto",
        history: FilterHistory | None = None,
    ) -> None:
        working, chosen = checked_arguments(weight, prior, state, layout, form, dtype, solution, inplace)
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("RLSFilter: weight must be finite, got NaN or Inf")
        self.layout = layout
        self._weight = weight.detach() if inplace else weight.detach().to(working, copy=True)
        self._track_bounds = track_bounds
        carried = chosen == "carried"
        self._initial = self._row_form().clone() if track_bounds or carried else None
        self.state: CovarianceState | SquareRootState
        self._solution: Solution
        if state == "covariance":
            self.state = CovarianceState(prior, form=form, dtype=working, device=weight.device, guard=guard)
            self._solution = GainSolution(self.state, self._row_form(), self._initial, inplace)
        else:
            self.state = SquareRootState(prior, dtype=working, device=weight.device, guard=guard)
            if carried:
                assert self._initial is not None
                self._solution = CarriedSolution(self.state, self._row_form(), self._initial)
            else:
                self._solution = GainSolution(self.state, self._row_form(), self._initial, inplace)
        self._begin(history)

    def _begin(self, history: FilterHistory | None) -> None:
        """Figures of a stream without batches, and what the guard rebuilds it from."""
        self._objective = 0.0
        self._peak = 0.0  # the largest objective: what rounding has left in it is relative to this
        self._errors = 0.0  # |E_all|^2, innovations against W_0, each over its noise
        self._forgotten = 1.0  # product of the forgetting factors: what is left of the prior
        self._rounding = self._new_rounding()
        self.history = history

    @property
    def history(self) -> FilterHistory | None:
        """What the guard rebuilds the filter from; None: it does not. It may be set at any time.

        Raises:
            TypeError: it cannot be called; ValueError: the filter does not keep W_0.
        """
        return self._history

    @history.setter
    def history(self, history: FilterHistory | None) -> None:
        if checked_history(history) is not None and self._initial is None:
            raise ValueError("RLSFilter: history needs W_0, which track_bounds=False does not keep with the gain form")
        self._history = history
        self.state._watch.rebuild = None if history is None else self._rebuild

    def _rebuild(self) -> None:
        assert self._history is not None
        self.refactor(self._history())

    @property
    def weight(self) -> torch.Tensor:
        """The weight in its layout, dtype of the state. Not a copy: it is always the same tensor.

        With solution="carried" it is solved for here, when batches have come since it was last read (d^2 v flops); one
        that is read behind every batch is solved for every 16 batches, and changed by gains in O(d u (d + v)) between.

        Raises:
            UnderdeterminedError: the filter started from nothing and has seen too little.
        """
        self._solution.refresh()
        return self._weight

    @property
    def objective(self) -> float:
        """J_t of the batches so far."""
        return self._objective

    def update(self, K: torch.Tensor, V: torch.Tensor, noise: float = 1.0, forget: float = 1.0) -> Step:
        """Write a batch: keys K shall map to V.

        Args:
            K: (u, d) keys.
            V: (u, v) targets.
            noise: >= 0, the reciprocal of the weight of the batch; 0 is a hard write (not with a triangular state).
            forget: forgetting factor in (0, 1].

        Raises:
            TypeError, ValueError, BreakdownError: as the state's `update`; weight and state untouched.
        """
        keys, values = self._pair("update", K, V)
        with normal_mode():
            outcome = self._solution.update(keys, values, noise, forget)
            self._objective = forget * self._objective + outcome.cost
            self._peak = max(forget * self._peak, self._objective)
            self._track(keys, values, noise, forget, outcome)
            self._rounding.write(keys, noise, forget, self._row_form() if self._solution.rounds else None)
        return self._step(outcome)

    @normal_mode()
    def health(self, *, thorough: bool = False) -> Health:
        """`health()` of the state, with the error that rounding leaves in the weight itself.

        A weight that is changed in place is rounded with every batch. Where S is ill-conditioned, or W_0 far larger
        than W - W_0, that alone may cost digits in float32, however good the state is. Cures: dtype=torch.float64,
        or state="square_root", which solves for the weight anew.

        Without W_0 (`track_bounds=False` with the gain form) what batches have changed stands for W - W_0, each by
        itself: an estimate that is too small where they undo each other.

        Args:
            thorough: as for `CovarianceState.health`.
        """
        found = self.state.health(thorough=thorough)
        size = self._shift()
        if size == 0.0 or not math.isfinite(size) or self.state.steps == 0:  # with no batch left W is W_0
            return found
        try:
            W = self._current()
        except (BreakdownError, UnderdeterminedError):
            return found  # which says so
        error = self._rounding.error(W, self._solution.rounds) / size
        advice = "use float64, or the carried solution"
        if not self._solution.rounds and found.ok:
            error, advice = max(error, self._solution.own_error(self._objective) / size), "use float64"
        if error > WEIGHT_WARNING and self._initial is not None and self._same(W, self._initial):
            return found  # nothing that was written has changed it
        found = replace(found, weight_error=error)
        if not error > WEIGHT_WARNING:
            return found
        message = f"rounding to {self.state.dtype} costs the weight about {error:.1e}: {advice}"
        return replace(found, status="warning" if found.ok else found.status, messages=(*found.messages, message))

    def remove(
        self,
        K: torch.Tensor,
        V: torch.Tensor,
        noise: float = 1.0,
        *,
        remaining: Iterable[tuple[torch.Tensor, torch.Tensor, float]] | None = None,
    ) -> Step:
        """Take back a batch: afterwards weight, state and objective are those of the stream without it.

        Args:
            K, V: as they were when the batch was written.
            noise: > 0, that of then over the product of the forgetting factors since.
            remaining: (K, V, noise) of all batches that stay. Where they are given, a batch that cannot be taken out
                of the state in its precision is left out by rebuilding everything from them (`refactor`).

        Returns:
            The step, with `innovation_norm` the error of the batch after removal and `residual_norm` before.

        Raises:
            LeverageError: it cannot be removed in this precision, or cannot have been written (no batch is left, or the
                objective would become negative), and `remaining` was not given; weight and state untouched.
            BreakdownError: the guard found the state broken, and `remaining` was not given.
        """
        noise = checked_noise(noise)
        keys, values = self._pair("remove", K, V)
        with normal_mode():
            try:
                outcome = self._solution.remove(keys, values, noise, self._possible(noise))
            except BreakdownError:  # LeverageError too
                if remaining is None:
                    raise
                try:
                    residual = self._misfit(keys, values, self._current())
                except BreakdownError:
                    residual = math.nan  # there is no weight of a broken factor
                self.refactor(remaining)
                return self._step(Outcome(self._misfit(keys, values, self._current()), residual, 0.0))
            self._objective -= outcome.cost
            self._track(keys, values, noise, 1.0, outcome, sign=-1.0)
            self._rounding.remove(keys, noise)
        return self._step(outcome)

    def refactor(self, written: Iterable[tuple[torch.Tensor, torch.Tensor, float]]) -> None:
        """Rebuild state, weight, objective and bounds from W_0, the prior and kept batches, in float64.

        Args:
            written: (K, V, noise), noise > 0, of all batches that shall be held; forgetting starts anew. A restriction
                of the state stays in force: in its directions the weight stays what it is.

        Raises:
            TypeError: not triples (K, V, noise).
            ValueError: a batch does not fit, the state of a filter that carries its solution was restricted, or the
                filter does not keep W_0 (`track_bounds=False` with the gain form).
        """
        if self._initial is None:
            raise ValueError("refactor: W_0 is not kept with track_bounds=False: write the batches to a new filter")
        given = triples("refactor", written)
        batches = [(*self._pair("refactor", K, V), _checks.noise("refactor", noise)) for K, V, noise in given]
        if any(noise == 0.0 for _, _, noise in batches):
            raise ValueError("refactor: noise must be > 0 for every batch")
        with normal_mode():
            self._objective = self._peak = self._solution.rebuild(self._initial, batches)
            self._errors, self._forgotten = 0.0, 1.0
            self._rounding = self._new_rounding()
            for keys, values, noise in batches:
                self._track(keys, values, noise, 1.0, None)
                self._rounding.write(keys, noise, 1.0, None)

    def _new_rounding(self) -> Rounding:
        return Rounding(self.state.prior, self.state.dtype)

    def _possible(self, noise: float) -> Check:
        """Refuses a batch whose cost is clearly more than all there is: a sum of squares is never negative."""
        rounds = self._solution.rounds
        W = self._row_form() if rounds or self._initial is None else self._initial
        error = self._rounding.error(W, rounds) + torch.finfo(self.state.dtype).eps * math.sqrt(max(self._errors, 0.0))
        error *= 8.0 * math.sqrt(noise * self.state.d)  # of V - K W: K'K / noise is part of S

        def check(innovation: float, residual: float, cost: float) -> None:
            rounding = (4.0 * error * (innovation + residual) + error * error) / noise
            if not math.isfinite(rounding):
                return
            if self._objective - cost < -(COST_ERROR * abs(cost) + PEAK_ERROR * self._peak + rounding):
                raise LeverageError(
                    f"remove: the objective would become {self._objective - cost:.4g}, and a sum of squares is never "
                    "negative: the batch was not written as it is given here, or has been taken back already; nothing "
                    "was changed"
                )

        return check

    @staticmethod
    def _misfit(K: Keys, V: Values, W: torch.Tensor) -> float:
        """|V - K W|."""
        return norm(misfit(K, V, W))

    @staticmethod
    def _same(W: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether two weights (d, v) are the same to the bit."""
        return torch.equal(W, other)

    def _current(self) -> torch.Tensor:
        """W (d, v), up to date."""
        self._solution.refresh()
        return self._row_form()

    def _pair(self, op: str, K: object, V: object) -> tuple[Keys, Values]:
        """A checked batch; the host waits once."""
        keys = shaped_keys(op, K, self.state.d, self.state.dtype, self.state.device)
        outputs = self._row_form().shape[1]
        if not isinstance(V, torch.Tensor):
            raise TypeError(f"{op}: V must be a torch.Tensor, got {type(V).__name__}")
        if not V.dtype.is_floating_point:
            raise TypeError(f"{op}: V must be floating point, got {V.dtype}")
        if tuple(V.shape) != (keys.shape[0], outputs):
            raise ValueError(
                f"{op}: V must have shape (u, v) with u = K.shape[0] = {keys.shape[0]} and v = {outputs}, "
                f"got {tuple(V.shape)}"
            )
        if V.device != keys.device:
            raise ValueError(f"{op}: V must be on the device of the state, {keys.device}, got {V.device}")
        values = placed(V.detach().to(keys.dtype))
        *found, size = scalars([*measures(keys), torch.linalg.vector_norm(values)])
        checked = measured_keys(op, keys, found)
        if not math.isfinite(size):
            finite(op, "V", values)
        return checked, Values(values, size)

    def _track(
        self, K: Keys, V: Values, noise: float, forget: float, outcome: Outcome | None, sign: float = 1.0
    ) -> None:
        """Without W_0 the innovation stands for V - K W_0: |E|^2 / noise less the cost is what the batch moves W by."""
        self._forgotten *= forget
        if self._initial is None:
            assert outcome is not None
            error = outcome.innovation_norm**2
        elif outcome is None or outcome.initial is None:
            error = self._misfit(K, V, self._initial) ** 2
        else:
            error = outcome.initial**2
        self._errors = forget * self._errors + sign * (error / noise if noise > 0.0 else math.inf if error else 0.0)

    def _shift(self) -> float:
        """|W - W_0| in the S-norm, as far as the difference of two sums tells it; see `_track`.

        Where the weight is off by more than it has moved, J is too large by the square of that, and the difference
        is negative: it is not known, and not zero.
        """
        least = 4.0 * torch.finfo(self.state.dtype).eps * self._errors
        return math.sqrt(max(self._errors - self._objective, least, 0.0))

    def _step(self, outcome: Outcome) -> Step:
        return Step(
            innovation_norm=outcome.innovation_norm,
            residual_norm=outcome.residual_norm,
            objective=self._objective,
            parameter_bound=self._bound(self.state.prior.lam),
            anchor_bound=self._bound(self.state.prior.mu),
        )

    def _bound(self, weight: float | None) -> float | None:
        """|E_all| / (2 lambda), with lambda^2 forgotten like the rest of the prior; sqrt(J) / lambda once restricted.

        A restriction holds what earlier batches did to the weight, also where W_0 would fit all that came after.
        """
        if not weight or not self._track_bounds:
            return None
        if self._forgotten == 0.0:
            return math.inf  # nothing is left of the prior
        squared = self._objective if self.state._counters.restrictions else 0.25 * self._errors
        return math.sqrt(max(squared, 0.0)) / (weight * math.sqrt(self._forgotten))


def checked_arguments(
    weight: object,
    prior: object,
    state: str,
    layout: str,
    form: str,
    dtype: torch.dtype | None,
    solution: str | None,
    inplace: bool,
) -> tuple[torch.dtype, str]:
    """The dtype to work in and the way to the weight; TypeError or ValueError where arguments of a filter do not fit.

    Only shapes and types are looked at.
    """
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"RLSFilter: weight must be a torch.Tensor, got {type(weight).__name__}")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"RLSFilter: weight must be floating point, got {weight.dtype}; dequantise it first")
    if layout not in LAYOUTS:
        raise ValueError(f"RLSFilter: layout must be 'in_out' or 'out_in', got {layout!r}")
    if state not in STATES:
        raise ValueError(f"RLSFilter: state must be one of {', '.join(map(repr, STATES))}, got {state!r}")
    chosen = SOLUTIONS[state][0] if solution is None else solution
    if chosen not in SOLUTIONS[state]:
        known = " or ".join(map(repr, SOLUTIONS[state]))
        raise ValueError(f"RLSFilter: solution must be {known} for state {state!r}, got {solution!r}")
    if state != "covariance" and form != "auto":
        raise ValueError(f"RLSFilter: form is that of a covariance; state {state!r} takes none, got {form!r}")
    if not isinstance(prior, Prior):
        raise TypeError(f"RLSFilter: prior must be a Prior, got {type(prior).__name__}")
    axis = 0 if layout == "in_out" else 1
    if weight.dim() != 2 or weight.shape[axis] != prior.d:
        shape = "(d, v)" if axis == 0 else "(v, d)"
        raise ValueError(
            f"RLSFilter: weight must have shape {shape} for layout {layout!r} with d = prior.d = {prior.d}, "
            f"got {tuple(weight.shape)}"
        )
    working = dtype or (weight.dtype if weight.dtype in _checks.DTYPES else torch.float32)
    if inplace and not aligned(weight):
        raise ValueError(
            "RLSFilter: inplace needs a weight at an address that is a multiple of its element size, got one with a "
            f"remainder of {weight.data_ptr() % weight.element_size()}: give a clone() of it"
        )
    if inplace and weight.dtype != working:
        raise TypeError(f"RLSFilter: inplace needs a weight of the dtype of the state, {working}, got {weight.dtype}")
    return working, chosen
