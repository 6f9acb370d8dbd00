"""Two ways from a stream of batches to its weight: by gains, or by a right-hand side that is carried along."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from rlsedit_kernels import ops
from rlsedit_kernels.errors import BreakdownError
from rlsedit_kernels.states import CovarianceState, SquareRootState, triangular
from rlsedit_kernels.states.batch import BatchFactor
from rlsedit_kernels.states.keys import squared_norm

_ROWS = 64
_COLUMNS = 1024
_ELEMENTS = 1 << 22
_HEADROOM = 0.125

Written = tuple[torch.Tensor, torch.Tensor, float]
"""A batch as it was written: K (u, d), V (u, v), noise."""


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
    """

    rounds = True
    """Whether the weight is rounded with every batch."""

    def __init__(self, state: CovarianceState | SquareRootState, W: torch.Tensor) -> None:
        self.state = state
        self.W = W

    def refresh(self) -> None:
        """W is always up to date."""

    def update(self, K: torch.Tensor, V: torch.Tensor, noise: float, forget: float) -> Outcome:
        """Write a batch; weight and state untouched where it fails."""
        prepared = self.state.prepare(K, noise, forget)  # first: a guard may rebuild the weight with the state
        if not _sizes(prepared.gain, V, K, self.W) < _limit(self.W):  # it may be too large: is it?
            self._check_size(norm(prepared.gain) * norm(torch.addmm(V, K, self.W, alpha=-1.0)))
        innovation = ops.weight_update_(self.W, K, V, prepared.gain)
        innovation_norm = norm(innovation)
        self.state.write(prepared)  # type: ignore[arg-type]
        if isinstance(self.state, SquareRootState):
            cost, residual_norm = prepared.after(innovation)  # type: ignore[union-attr]
        else:
            whitened, residual_norm = _after(prepared.factored, innovation)  # type: ignore[union-attr]
            cost = forget * whitened**2
        return Outcome(innovation_norm, residual_norm, cost)

    def remove(self, K: torch.Tensor, V: torch.Tensor, noise: float) -> Outcome:
        """Take back a batch."""
        residual = torch.addmm(V, K, self.W, alpha=-1.0)
        gain = self.state.remove(K, noise)
        self.W.addmm_(gain, residual, alpha=-1.0)
        innovation = torch.addmm(V, K, self.W, alpha=-1.0)
        return Outcome(norm(innovation), norm(residual), _inner(innovation, residual) / noise)

    def rebuild(self, W_0: torch.Tensor, written: list[Written]) -> float:
        """State and weight from kept batches, in float64; the objective."""
        fresh, B, objective = carried64(self.state, W_0, written)
        change = fresh.solve(B)
        self.state.refactor([(K, noise) for K, _, noise in written])
        self.W.copy_(change.add_(W_0))
        return objective

    def _check_size(self, size: float) -> None:
        """No weight may become Inf: the product must fit the dtype with room for the sum."""
        if not size < _limit(self.W):
            raise ValueError(
                f"update: the change of the weight may reach {size:.1e}, which {self.W.dtype} cannot hold; scale V"
            )


def _limit(W: torch.Tensor) -> float:
    """How large a change of the weight may be."""
    return 0.25 * torch.finfo(W.dtype).max


def _sizes(gain: torch.Tensor, V: torch.Tensor, K: torch.Tensor, W: torch.Tensor) -> float:
    """A bound of |gain| |V - K W|, in the dtype's own arithmetic: infinite where that overflows."""
    found = torch.stack([torch.linalg.vector_norm(A) for A in (gain, V, K, W)])
    of_gain, of_targets, of_keys, of_weight = found.tolist()
    return float(of_gain * (of_targets + of_keys * of_weight))


class CarriedSolution:
    """[R B] <- Q'[R B; K D] with D = V - K W_0, and W = W_0 + R^-1 B by one triangular solve when it is asked for.

    A weight that is made anew from R and B does not inherit the rounding errors of the weights before it: with a
    prior too weak to pull them out again, those of the gain form stay and add up.

    Args:
        state: holds R.
        W: (d, v) in row form, a view of the weight that is kept; W_0 at the start.
        W_0: (d, v), a copy that is not changed.
    """

    rounds = False

    def __init__(self, state: SquareRootState, W: torch.Tensor, W_0: torch.Tensor) -> None:
        self.state = state
        self.W = W
        self.W_0 = W_0
        self.B = torch.zeros(state.rank, W.shape[1], dtype=state.dtype, device=state.device)
        self._size = 0.0  # |B|^2 is at most this
        self._current = True
        self._writes = state._writes

    def refresh(self) -> None:
        """Bring W up to date.

        Raises:
            UnderdeterminedError: the stream started from nothing and has seen too little.
            BreakdownError: the solution is not finite: R is singular to working precision.
        """
        if self._current:
            return
        self._check_alone()
        change = self.state.solve(self.B)
        if not math.isfinite(float(change.sum())) and not bool(torch.isfinite(change).all()):
            raise BreakdownError("the weight is not finite: R is singular to working precision; use float64")
        torch.add(self.W_0, change, out=self.W)
        self._current = True

    def update(self, K: torch.Tensor, V: torch.Tensor, noise: float, forget: float) -> Outcome:
        """Write a batch; R and B untouched where it fails."""
        K, noise, forget = self.state.checked_batch("update", K, noise, forget)
        self._check_alone()
        self.state.look()
        D = torch.addmm(V, K, self.W_0, alpha=-1.0)
        initial = norm(D)
        size = forget * self._size + initial**2 / noise
        if not math.sqrt(size) < _HEADROOM * torch.finfo(self.B.dtype).max:
            raise ValueError(f"update: the right-hand side would grow to {math.sqrt(size):.1e}; scale V or raise noise")
        if self.state.determined:
            H = self.state.half(K)
            innovation = torch.addmm(D, H.mT, self.B, alpha=-1.0)
            cost, residual_norm = triangular.after(triangular.system(H, forget * noise), innovation, noise, forget)
            self.state.append_with(self.B, K, D, noise, forget)
            outcome = Outcome(norm(innovation), residual_norm, cost, initial)
        else:
            before = squared_norm(self.B)
            self.state.append_with(self.B, K, D, noise, forget)
            # An orthogonal transform keeps lengths: what B did not take up is the cost of the batch.
            cost = max(forget * before + initial**2 / noise - squared_norm(self.B), 0.0)
            residual_norm = norm(self._error(K, D)) if self.state.determined else math.nan
            outcome = Outcome(math.nan, residual_norm, cost, initial)
        self._size, self._current, self._writes = size, False, self.state._writes
        return outcome

    def remove(self, K: torch.Tensor, V: torch.Tensor, noise: float) -> Outcome:
        """Take back a batch."""
        K, noise, _ = self.state.checked_batch("remove", K, noise, 1.0)
        self._check_alone()
        D = torch.addmm(V, K, self.W_0, alpha=-1.0)
        residual = self._error(K, D)
        self.state.remove_with(self.B, K, D, noise)
        self._size, self._current, self._writes = squared_norm(self.B), False, self.state._writes
        innovation = self._error(K, D)
        return Outcome(norm(innovation), norm(residual), _inner(innovation, residual) / noise, norm(D))

    def rebuild(self, W_0: torch.Tensor, written: list[Written]) -> float:
        """R and B from kept batches, in float64 and rounded once; the objective."""
        fresh, B, objective = carried64(self.state, W_0, written)
        self.state.adopt(fresh)
        self.B = B.to(self.B.dtype)
        self._size, self._current, self._writes = squared_norm(self.B), False, self.state._writes
        return objective

    def _error(self, K: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
        """V - K W of the present stream."""
        return torch.addmm(D, self.state.half(K).mT, self.B, alpha=-1.0)

    def _check_alone(self) -> None:
        if self.state._writes != self._writes:
            raise ValueError(
                "the state was changed outside of the filter, and the right-hand side with it is no longer that of the "
                "stream: write and remove through the filter, or use solution='gain'"
            )


Solution = GainSolution | CarriedSolution


def carried64(
    state: CovarianceState | SquareRootState, W_0: torch.Tensor, written: Iterable[Written]
) -> tuple[SquareRootState, torch.Tensor, float]:
    """A float64 triangular state with its right-hand side and objective, from the prior and these batches."""
    fresh = SquareRootState(state.prior, dtype=torch.float64, device=state.device)
    B = torch.zeros(fresh.rank, W_0.shape[1], dtype=torch.float64, device=state.device)
    wide, total = W_0.to(torch.float64), 0.0
    for K, V, noise in written:
        D = torch.addmm(V.to(torch.float64), K.to(torch.float64), wide, alpha=-1.0)
        fresh.append_with(B, K, D, noise)
        total += squared_norm(D) / noise
    return fresh, B, max(total - squared_norm(B), 0.0)


def _after(factored: BatchFactor, innovation: torch.Tensor) -> tuple[float, float]:
    """|root' E| and |E - G root root' E|, the residual, block of columns by block: no buffer of the size of E."""

    def both() -> Iterator[torch.Tensor]:
        for block in innovation.split(_COLUMNS, dim=1):
            error = block.to(factored.G.dtype)
            whitened = factored.root.mT @ error
            yield whitened
            yield torch.addmm(error, factored.G, factored.root @ whitened, alpha=-1.0)

    found = norms(both())
    return math.hypot(*found[::2]), math.hypot(*found[1::2])


def _inner(A: torch.Tensor, B: torch.Tensor) -> float:
    return float((A.double() * B.double()).sum())


def norm(A: torch.Tensor) -> float:
    """Frobenius norm, accumulated in float64, without a float64 copy of A."""
    return norms([A])[0]


def norms(matrices: Iterable[torch.Tensor]) -> list[float]:
    """`norm` of each, taken one after the other; the host waits once for all of them."""
    parts = [[torch.linalg.vector_norm(part, dtype=torch.float64) for part in _blocks(A)] for A in matrices]
    found = iter(torch.stack([part for row in parts for part in row]).tolist())
    return [math.hypot(*(next(found) for _ in row)) for row in parts]


def _blocks(A: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Blocks of rows: small ones fit a CPU's cache, and each is a launch on a GPU."""
    return A.split(_ROWS if A.device.type == "cpu" else max(_ROWS, _ELEMENTS // A.shape[1]))
