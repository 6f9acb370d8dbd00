"""Two ways from a stream of batches to its weight: by gains, or by a right-hand side that is carried along."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlsedit_kernels import ops
from rlsedit_kernels.errors import BreakdownError
from rlsedit_kernels.states import CovarianceState, SquareRootState, triangular
from rlsedit_kernels.states.adding import add_product_
from rlsedit_kernels.states.batch import BatchFactor
from rlsedit_kernels.states.coordinates import row_product
from rlsedit_kernels.states.keys import Keys, Values, reach
from rlsedit_kernels.states.modes import normal_mode, version, writing
from rlsedit_kernels.states.prepared import Prepared, PreparedRows
from rlsedit_kernels.states.reading import Norms, blocks, norm, squared_norm
from rlsedit_kernels.states.restriction import held_change, require_directions
from rlsedit_kernels.states.triangular_form import TriangularForm

_COLUMNS = 1024

SHARE = 0.1
"""Of the worst case: what errors of independent sign come to. Where W is off by more than 1e-5 on streams of
`rk.diagnostics`, it is within a factor of four of that, but for priors whose condition float32 cannot hold."""
_HEADROOM = 0.125
_GAIN_STEPS = 16
"""Batches whose gains are added to a carried solution between two triangular solves, where it is read after each."""

Written = tuple[Keys, Values, float]
"""A batch as it was written: K (u, d), V (u, v), noise."""


Check = Callable[[float, float, float], None]
"""Gets |V - K W| without and with a batch that is to be taken back, and its cost, before anything is written."""

RESTRICTED = (
    "refactor: the state was restricted outside of the filter, and a carried right-hand side does not know of it: use "
    "solution='gain'"
)


@dataclass(frozen=True)
class Outcome:
    """What one batch did.

    Attributes:
        innovation_norm: |V - K W| without the batch; NaN where there was no weight yet.
        residual_norm: |V - K W| with the batch; NaN where there is no weight yet.
        cost: what the batch adds to the objective, by fact 6.
        initial: |V - K W_0|, where it was formed anyway.
    """

    innovation_norm: float
    residual_norm: float
    cost: float
    initial: float | None = None


class GainSolution:
    """W <- W + g (V - K W), W in place, with the gain of either state.

    Args:
        state: gives the gains.
        W: (d, v) in row form, a view of the weight that is kept.
        W_0: (d, v) a copy of it, where |V - K W_0| is wanted with every batch; not changed.
        shared: whether others may write to W behind the version counter (`parameter.data`).
    """

    rounds = True
    """Whether the weight is rounded with every batch."""

    def __init__(
        self,
        state: CovarianceState | SquareRootState,
        W: torch.Tensor,
        W_0: torch.Tensor | None = None,
        shared: bool = False,
    ) -> None:
        self.state = state
        self.W = W
        self.W_0 = W_0
        self._shared = shared
        self._size = math.inf  # |W| is at most this, while W has this version
        self._version: int | None = None

    def copied(self, state: CovarianceState | SquareRootState, W: torch.Tensor) -> GainSolution:
        """The same for copies of state and weight; W_0, which nothing changes, is shared."""
        return GainSolution(state, W, self.W_0)

    def take(self, W: torch.Tensor) -> None:
        """The view of the weight, which is not copied with the rest: its owner keeps the tensor."""
        self.W, self._version = W, None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "W"}

    def refresh(self) -> None:
        """W is always up to date."""

    def own_error(self, _objective: float) -> float:
        """|e| of W in the S-norm from rounding something else than W: there is nothing else."""
        return 0.0

    def update(self, K: Keys, V: Values, noise: float, forget: float) -> Outcome:
        """Write a batch; weight and state untouched where it fails."""
        prepared = self.state.prepare(K, noise, forget)  # first: a guard may rebuild the weight with the state
        innovation = self._write(prepared, K, V)
        self.state.write(prepared)  # type: ignore[arg-type]
        asked, more = Norms(), []
        asked.ask(innovation)
        if self.W_0 is not None:
            asked.ask(misfit(K, V, self.W_0))
        if isinstance(self.state, SquareRootState):
            more.append(prepared.after(innovation))  # type: ignore[union-attr]
        else:
            _ask_after(asked, prepared.factored, innovation, forget * noise)  # type: ignore[union-attr]
        sizes, numbers = asked.read(*more)
        innovation_norm, initial = sizes[0], None if self.W_0 is None else sizes[1]
        if isinstance(self.state, SquareRootState):
            cost, residual_norm = numbers
        else:
            whitened, residual_norm = sizes[-2:]
            cost = forget * whitened**2
        self._changed(prepared.size * innovation_norm)
        return Outcome(innovation_norm, residual_norm, cost, initial)

    def remove(self, K: Keys, V: Values, noise: float, check: Check) -> Outcome:
        """Take back a batch; weight and state untouched where it fails."""
        residual = misfit(K, V, self.W)

        def possible(gain: torch.Tensor) -> None:
            after = torch.addmm(residual, K.rows, gain @ residual)  # V - K (W - g residual)
            check(norm(after), norm(residual), _inner(after, residual) / noise)

        gain = self.state.take_back(K, noise, possible)
        with writing(self.W):
            add_product_(self.W, gain, residual.mT, -1.0)
        innovation = misfit(K, V, self.W)
        self._version = None
        return Outcome(norm(innovation), norm(residual), _inner(innovation, residual) / noise)

    def rebuild(self, W_0: torch.Tensor, written: list[Written]) -> float:
        """State and weight from kept batches, in float64; the objective."""
        require_directions(self.state._counters, self.state._restriction)
        fresh, B, objective = carried64(self.state, W_0, written)
        change = fresh.solve(B)
        if (Q := self.state._restriction) is not None:
            change, more = held_change(fresh._form.apply(Q), Q, change, self.W - W_0)
            objective += more
        self.state.refactor([(K, noise) for K, _, noise in written])  # type: ignore[misc]
        with writing(self.W):
            self.W.copy_(change.add_(W_0))
        self._version = None
        return objective

    def _write(self, prepared: Prepared | PreparedRows, K: Keys, V: Values) -> torch.Tensor:
        """W <- W + g (V - K W), and V - K W of before (u, v).

        No weight may become Inf: the product must fit the dtype with room for the sum. |g| |V - K W| is at most
        |g| (|V| + |K| |W|), and |W| grows by no more than that with every batch: W itself is looked at where the bound
        does not tell enough, or where it has been changed by somebody else. Where others may do so unseen V - K W is
        formed first: on a CPU that costs no more than the change in one, and a pass over W less.
        """
        limit = 0.25 * torch.finfo(self.W.dtype).max
        first = misfit(K, V, self.W) if self._shared and self.W.device.type == "cpu" else None
        if first is not None:
            bound = float(torch.linalg.vector_norm(first))
        else:
            if self._version is None or self._version != version(self.W):
                self._size = float(torch.linalg.vector_norm(self.W))
            bound = V.size + math.sqrt(K.squared) * self._size
        if not prepared.size * bound < limit:
            size = norm(prepared.gain) * norm(misfit(K, V, self.W))
            if not size < limit:
                raise ValueError(
                    f"update: the change of the weight may reach {size:.1e}, which {self.W.dtype} cannot hold; scale V"
                )
        with writing(self.W):
            if first is None:
                return ops.weight_update_(self.W, K.rows, V.rows, prepared.gain)
            add_product_(self.W, prepared.gain, first.mT)
        return first

    def _changed(self, size: float) -> None:
        """The weight has been changed, by this much at most."""
        self._size += size
        self._version = None if self._shared else version(self.W)


class Carried:
    """What a carried solution remembers of its weight, in one process or over ranks: whether W is that of R and B.

    Attributes:
        _size: |B|^2 is at most this.
        _current: whether W is that of R and B.
        _change: W - W_0 of R and B, where it is known without a solve.
        _steps: batches in it since a solve.
        _read: whether W was asked for since the last batch.
        _writes: the moment of the state to which B belongs.
    """

    rounds = False
    """Whether the weight is rounded with every batch."""

    state: SquareRootState
    _change: Any

    def _begin(self) -> None:
        """A stream without batches."""
        self._size, self._current, self._change = 0.0, True, None
        self._steps, self._read, self._writes = 0, False, self.state._writes

    def _by_gain(self) -> bool:
        """Whether the next batch is to be added to W - W_0 by its gain: W was read behind the last one."""
        return self._change is not None and self._read and self._steps < _GAIN_STEPS

    def _moved(self, size: float) -> None:
        """R and B are those of another stream now, and |B|^2 is at most this."""
        self._size, self._writes = size, self.state._writes
        self._current, self._change, self._read, self._steps = False, None, False, self._steps + 1

    def check_alone(self) -> None:
        """ValueError where R is not the one that B belongs to."""
        if self.state._writes != self._writes:
            raise ValueError(
                "the state was changed outside of the filter, and the right-hand side with it is no longer that of the "
                "stream: write and remove through the filter, or use solution='gain'"
            )


class CarriedSolution(Carried):
    """[R B] <- Q'[R B; K D] with D = V - K W_0, and W = W_0 + R^-1 B by one triangular solve when it is asked for.

    A weight that is made anew from R and B does not inherit the rounding errors of the weights before it: with a
    prior too weak to pull them out again, those of the gain form stay and add up. The solve costs d^2 v flops, though.
    Where W is read between one batch and the next, a batch is added to W - W_0 by its gain, in O(d u (d + v)), and a
    solve forgets the errors of that every `_GAIN_STEPS` batches. R and B do not depend on what is read.

    Args:
        state: holds R.
        W: (d, v) in row form, a view of the weight that is kept; W_0 at the start.
        W_0: (d, v), a copy that is not changed.
    """

    def __init__(self, state: SquareRootState, W: torch.Tensor, W_0: torch.Tensor) -> None:
        self.state = state
        self.W = W
        self.W_0 = W_0
        self.B = torch.zeros(state.rank, W.shape[1], dtype=state.dtype, device=state.device)
        self._begin()

    def copied(self, state: SquareRootState, W: torch.Tensor) -> CarriedSolution:
        """The same for copies of state and weight; W_0, which nothing changes, is shared."""
        twin = copy.copy(self)
        twin.state, twin.B = state, self.B.clone()
        twin._change = None if self._change is None else self._change.clone()
        twin.take(W)
        return twin

    def take(self, W: torch.Tensor) -> None:
        """The view of the weight, which is not copied with the rest: its owner keeps the tensor."""
        self.W = W
        if self.B.is_inference():
            self.B = self.B.clone()
            self._change = None if self._change is None else self._change.clone()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "W"}

    def refresh(self) -> None:
        """Bring W up to date.

        Raises:
            UnderdeterminedError: the stream started from nothing and has seen too little.
            BreakdownError: the solution is not finite: R is singular to working precision.
        """
        self._read = True
        if self._current:
            return
        self.check_alone()
        if self._change is None:
            change = self.state.solve(self.B)
            if not math.isfinite(float(change.sum())) and not bool(torch.isfinite(change).all()):
                raise BreakdownError("the weight is not finite: R is singular to working precision; use float64")
            with normal_mode():  # whoever reads, later batches are added to it
                self._change = torch.empty_like(self.W_0).copy_(change)  # LAPACK's has columns where ours has rows
            self._steps = 0
        with writing(self.W):
            torch.add(self.W_0, self._change, out=self.W)
        self._current = True

    def update(self, K: Keys, V: Values, noise: float, forget: float) -> Outcome:
        """Write a batch; R and B untouched where it fails."""
        K, noise, forget = self.state.checked_batch("update", K, noise, forget)
        self.check_alone()
        self.state.look()
        D = misfit(K, V, self.W_0)
        determined = self.state.determined
        asked, more, gain = Norms(), [], None
        asked.ask(D)
        if determined:
            H = self.state.half(K)
            innovation = less_products(D, H.mT, self.B)
            asked.ask(innovation)
            if self._by_gain():
                gain, system = self.state._form.gain_before(H, forget * noise)
                asked.ask(gain)
            else:
                system = triangular.system(H, forget * noise)
            more.append(triangular.after(system, innovation, noise, forget))
        (initial, *sizes), figures = asked.read(*more)
        size = forget * self._size + initial**2 / noise
        if not math.sqrt(size) < _HEADROOM * torch.finfo(self.B.dtype).max:
            raise ValueError(f"update: the right-hand side would grow to {math.sqrt(size):.1e}; scale V or raise noise")
        if determined:
            cost, residual_norm = figures
            if not math.isfinite(cost):
                raise ValueError(f"update: K R^-1 overflows {self.state.dtype}: keys of size {reach(K)} are too large")
            self.state._append_with("update", self.B, K, D, noise, forget)
            change = self._change
            self._moved(size)
            if gain is not None and change is not None and math.prod(sizes) < _HEADROOM * torch.finfo(change.dtype).max:
                ops.weight_update_(change, K.rows, D, gain)
                self._change = change
            outcome = Outcome(sizes[0], residual_norm, cost, initial)
        else:
            before = squared_norm(self.B)
            self.state._append_with("update", self.B, K, D, noise, forget)
            # An orthogonal transform keeps lengths: what B did not take up is the cost of the batch.
            cost = max(forget * before + initial**2 / noise - squared_norm(self.B), 0.0)
            residual_norm = norm(self._error(K, D)) if self.state.determined else math.nan
            self._moved(size)
            outcome = Outcome(math.nan, residual_norm, cost, initial)
        return outcome

    def saved(self) -> dict[str, object]:
        """What `restore` needs beside state and weight: tensors (copies) and plain values."""
        change = None if self._change is None else self._change.clone()
        numbers = {"size": self._size, "current": self._current, "read": self._read, "steps": self._steps}
        return {"B": self.B.clone(), "change": change, **numbers}

    def restore(self, B: torch.Tensor, change: torch.Tensor | None, numbers: Mapping[str, Any]) -> None:
        """Go on where `saved` was taken; the state has been restored before, the weight is by its owner."""
        self.B, self._size, self._current = B, float(numbers["size"]), bool(numbers["current"])
        self._change, self._steps = change, int(numbers.get("steps", 0))
        self._read, self._writes = bool(numbers.get("read", False)), self.state._writes

    def own_error(self, objective: float) -> float:
        """|e| of W in the S-norm that comes from rounding R and B with every batch, estimated without history.

        The solution is that of rows and targets off by (unit roundoff) |[R B]| (Higham, theorem 20.3): |R e| is about
        u |R| (|R^-1| sqrt(J) + |W - W_0|). Where batches contradict each other J is large, and R need not be wrong.
        """
        self.refresh()
        moved = norm(self.W - self.W_0)
        return rounding_of_factor(triangular.extremes(self.state._form.R), self.B.dtype, objective, moved)

    def remove(self, K: Keys, V: Values, noise: float, check: Check) -> Outcome:
        """Take back a batch; R and B untouched where it fails."""
        K, noise, _ = self.state.checked_batch("remove", K, noise, 1.0)
        self.check_alone()
        D = misfit(K, V, self.W_0)
        residual = self._error(K, D)

        def possible(form: TriangularForm, B: torch.Tensor) -> None:
            innovation = less_products(D, form.half(form.coordinates(K.rows)).mT, B)
            check(norm(innovation), norm(residual), _inner(innovation, residual) / noise)

        self.state.take_back_with(self.B, K, D, noise, possible)
        self._moved(squared_norm(self.B))
        innovation = self._error(K, D)
        return Outcome(norm(innovation), norm(residual), _inner(innovation, residual) / noise, norm(D))

    def rebuild(self, W_0: torch.Tensor, written: list[Written]) -> float:
        """R and B from kept batches, in float64 and rounded once; the objective."""
        if self.state._restriction is not None:
            raise ValueError(RESTRICTED)
        fresh, B, objective = carried64(self.state, W_0, written)
        self.state.adopt(fresh)
        self.B = B.to(self.B.dtype)
        self._moved(squared_norm(self.B))
        return objective

    def _error(self, K: Keys, D: torch.Tensor) -> torch.Tensor:
        """V - K W of the present stream."""
        return less_products(D, self.state.half(K).mT, self.B)


Solution = GainSolution | CarriedSolution


def rounding_of_factor(extremes: tuple[float, float], dtype: torch.dtype, objective: float, moved: float) -> float:
    """`CarriedSolution.own_error` from |R| and |R^-1|, the dtype of R and B, J and |W - W_0|."""
    largest, inverse = extremes
    error = SHARE * 0.5 * torch.finfo(dtype).eps * largest
    return error * (inverse * math.sqrt(max(objective, 0.0)) + moved)


def misfit(K: Keys, V: Values, W: torch.Tensor) -> torch.Tensor:
    """V - K W (u, v)."""
    return less_products(V.rows, K.rows, W)


def less_products(V: torch.Tensor, K: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """The same of tensors."""
    product = ops.key_products(W, K)
    return torch.sub(V, product, out=product)


def carried64(
    state: CovarianceState | SquareRootState, W_0: torch.Tensor, written: Iterable[Written]
) -> tuple[SquareRootState, torch.Tensor, float]:
    """A float64 triangular state with its right-hand side and objective, from the prior and these batches."""
    fresh = SquareRootState(state.prior, dtype=torch.float64, device=state.device, guard="off")
    B = torch.zeros(fresh.rank, W_0.shape[1], dtype=torch.float64, device=state.device)
    wide, total = W_0.to(torch.float64), 0.0
    for K, V, noise in written:
        keys = replace(K, rows=K.rows.to(torch.float64))
        D = torch.addmm(V.rows.to(torch.float64), keys.rows, wide, alpha=-1.0)
        fresh.append_with(B, keys, D, noise)
        total += squared_norm(D) / noise
    return fresh, B, max(total - squared_norm(B), 0.0)


def _after(factored: BatchFactor, innovation: torch.Tensor, noise: float) -> tuple[float, float]:
    """|root' E| and |E - G root root' E|, the residual, for the noise with which the batch was factored."""
    asked = Norms()
    _ask_after(asked, factored, innovation, noise)
    whitened, residual = asked.read()[0]
    return whitened, residual


def _ask_after(asked: Norms, factored: BatchFactor, innovation: torch.Tensor, noise: float) -> None:
    """Ask for the two norms of `_after`, block of columns by block: no buffer of the size of E.

    Where nothing was truncated root root' is (noise I + G)^-1, and the residual noise root root' E: one product less
    than the difference, which loses what it leaves where the leverage is near 1.
    """
    root, whole = factored.root, noise > 0.0 and factored.rank == len(factored.G)
    scaled = factored.batch if factored.batch is not None and factored.batch.scales is not None else None
    back = root * (noise if scaled is None else scaled.noise) if whole else root
    whitened, residual = asked.ask(), asked.ask()
    for block in blocks(innovation, _COLUMNS, dim=1):
        error = block.to(root.dtype) if scaled is None else scaled.units(block).to(root.dtype)
        first = row_product(root.mT, error)
        asked.add(whitened, first)
        after = row_product(back, first)
        after = after if whole else torch.addmm(error, factored.G, after, alpha=-1.0)
        asked.add(residual, after if scaled is None else scaled.given(after))


def _inner(A: torch.Tensor, B: torch.Tensor) -> float:
    return float((A.double() * B.double()).sum())
