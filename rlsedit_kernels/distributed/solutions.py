"""The two ways to a weight over ranks: by gains, or by a right-hand side that is carried along (`solutions.py`).

Whatever is sent for a batch is sent before anything of it is written. Removal works on a copy of the state.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rlsedit_kernels.distributed.batch_keys import BatchKeys
from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.distributed.session import known_to_all
from rlsedit_kernels.distributed.square_root import ShardedSquareRootState
from rlsedit_kernels.distributed.weight import ShardedWeight, Targets
from rlsedit_kernels.errors import BreakdownError
from rlsedit_kernels.solutions import _HEADROOM, RESTRICTED, Carried, Check, Outcome, _after, rounding_of_factor
from rlsedit_kernels.states import SquareRootState, triangular
from rlsedit_kernels.states.reading import squared_norm
from rlsedit_kernels.states.restriction import held_step, require_directions

__all__ = ["ShardedCarriedSolution", "ShardedGainSolution"]

Batches = list[tuple[BatchKeys, Targets, float]]


class ShardedGainSolution:
    """W <- W + g (V - K W), each rank its part of W, with the gain of either state.

    Args:
        state: gives the gains, as DTensors.
        weight: W, changed in place.
        W_0: a copy of it at the start; None where neither bounds nor a rebuild are wanted.
        prior: of the state.
        track: whether |V - K W_0| is wanted.
    """

    rounds = True
    """Whether the weight is rounded with every batch."""

    def __init__(self, state: Any, weight: ShardedWeight, W_0: ShardedWeight | None, prior: Any, track: bool) -> None:
        self.state, self.weight, self.W_0, self.prior = state, weight, W_0, prior
        self.ranks: Ranks = state.ranks
        self._track = track

    def refresh(self) -> None:
        """W is always up to date."""

    def own_error(self, _objective: float) -> float:
        """See `GainSolution.own_error`."""
        return 0.0

    def update(self, K: BatchKeys, V: Targets, noise: float, forget: float) -> Outcome:
        """Write a batch; weight and state untouched where it fails."""
        prepared = self.state.prepare(K.tensor(self.ranks, self.state.d), noise, forget)
        ranks, weight = self.ranks, self.weight
        with ranks.guarded("update"):
            E, share = weight.sent_error(K, V), weight.sent_share(prepared.gain)
            initial = self._sent_initial(K, V)
            if isinstance(self.state, SquareRootState):
                cost, residual = prepared.after(E).tolist()
            else:
                whitened, residual = _after(prepared.factored, E, forget * noise)
                cost = forget * whitened * whitened
            size, residual, cost = weight.sent_totals(squared_norm(E), residual * residual, cost)
            reach = float(_sum_of(ranks, squared_norm(prepared.gain.to_local())))
        with ranks.confirmed("update") as agreed:
            limit = 0.25 * torch.finfo(E.dtype).max
            if not math.sqrt(reach) * math.sqrt(size) < limit:
                raise ValueError(
                    f"update: the change of the weight may reach {math.sqrt(reach * size):.1e}, which {E.dtype} cannot "
                    "hold; scale V"
                )
            agreed.update({"the size of the innovation": size, "the cost": cost})
        weight.add_(share, E)
        self.state.write(prepared)
        return Outcome(math.sqrt(size), math.sqrt(residual), cost, initial)

    def remove(self, K: BatchKeys, V: Targets, noise: float, check: Check) -> Outcome:
        """Take back a batch."""
        twin, weight, ranks = self.state.clone(), self.weight, self.ranks
        with _told(self.state, twin):
            gain = twin.remove(K.tensor(ranks, self.state.d), noise)
        with ranks.guarded("remove"):
            residual, share = weight.sent_error(K, V), weight.sent_share(gain)
            initial = self._sent_initial(K, V)
            hat = ranks.ordered_sum(K.local.to(torch.float64) @ gain.to_local().to(torch.float64))
            wide = residual.to(torch.float64)
            innovation = wide + hat @ wide  # V - K (W - g (V - K W))
            figures = weight.sent_totals(squared_norm(innovation), squared_norm(wide), float((innovation * wide).sum()))
        with ranks.confirmed("remove") as agreed:
            check(math.sqrt(figures[0]), math.sqrt(figures[1]), figures[2] / noise)
            agreed.update({"the size of the residual": figures[1]})
        weight.add_(share, residual, alpha=-1.0)
        _become(self.state, twin)
        return Outcome(math.sqrt(figures[0]), math.sqrt(figures[1]), figures[2] / noise, initial)

    def rebuild(self, _W_0: Any, written: Batches) -> float:
        """State and weight from kept batches, in float64; the objective.

        In the directions of a restriction the weight stays what it is.
        """
        assert self.W_0 is not None
        state, ranks, weight = self.state, self.ranks, self.weight
        with ranks.confirmed("refactor"):
            require_directions(state._counters, state._restriction)
        fresh, B, objective = carried64(self.prior, ranks, self.W_0, written)
        change = fresh.solve(B)
        twin = state.clone()
        twin.refactor([(K.tensor(ranks, state.d), noise) for K, _, noise in written])
        with ranks.guarded("refactor"):
            part, more = weight.sent_change(change), 0.0
            if state._restriction is not None:
                part, more = self._sent_held(fresh, state._restriction, part)
        with ranks.confirmed("refactor") as agreed:
            agreed["the objective"] = objective = objective + more
        weight.W.copy_(part + self.W_0.W)
        _become(self.state, twin)
        return objective

    def _sent_held(
        self, fresh: ShardedSquareRootState, held: torch.Tensor, part: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """`restriction.held_change` of this rank's part of a change; d x q and q x v numbers are sent.

        Args:
            fresh: holds C of the batches without the restriction.
            held: this rank's rows (d_p, q) of its directions, float64.
            part: of the change, float64.
        """
        assert self.W_0 is not None
        ranks, weight, d = self.ranks, self.weight, self.state.d
        Q = ranks.gather(held, d)
        image = fresh.apply(Q).to_local()  # rows of C Q
        G = ranks.ordered_sum(held.mT @ image)
        gone = weight.W.to(torch.float64) - self.W_0.W.to(torch.float64) - part
        rows = weight.place == "rows"
        missing = ranks.ordered_sum(held.mT @ gone) if rows else Q.mT @ gone
        solved, more = held_step(G, missing)
        return part + (image if rows else ranks.gather(image, d)) @ solved, weight.sent_totals(more)[0]

    def _sent_initial(self, K: BatchKeys, V: Targets) -> float | None:
        if self.W_0 is None or not self._track:
            return None
        return math.sqrt(self.weight.sent_totals(squared_norm(self.W_0.sent_error(K, V)))[0])


class ShardedCarriedSolution(Carried):
    """[R B] <- Q'[R B; K D] with D = V - K W_0, B by columns, and W = W_0 + R^-1 B when it is asked for.

    As in one process (`CarriedSolution`) a batch is added to W - W_0 by its gain where W was read behind the last one,
    and a solve forgets the errors of that every `_GAIN_STEPS` batches. Each rank keeps W - W_0 where it has W.

    Args:
        state: holds R.
        weight: W, changed in place when it is asked for.
        W_0: a copy of it at the start.
    """

    state: ShardedSquareRootState
    _change: ShardedWeight | None

    def __init__(self, state: ShardedSquareRootState, weight: ShardedWeight, W_0: ShardedWeight) -> None:
        self.state, self.weight, self.W_0 = state, weight, W_0
        self.ranks = state.ranks
        self.B = state.zeros(weight.shape[1])
        self._begin()

    def refresh(self) -> None:
        """Bring W up to date; all ranks together. Behind a batch that was added by its gain nothing is sent.

        Raises:
            UnderdeterminedError: the stream started from nothing and has seen too little.
            BreakdownError: the solution is not finite: R is singular to working precision.
        """
        self._read = True
        if self._current:
            return
        if self._change is None:
            with self.ranks.confirmed("weight"):
                self.check_alone()
            change = self.state.solve(self.B)
            with self.ranks.guarded("weight"):
                part = self.weight.sent_change(change)
            with self.ranks.confirmed("weight"):
                if not bool(torch.isfinite(change.to_local()).all()):
                    raise BreakdownError("the weight is not finite: R is singular to working precision; use float64")
                self._change = self.W_0.like(part)
            self._steps = 0
        else:
            self.check_alone()
        self.weight.put(self.W_0, self._change)
        self._current = True

    def update(self, K: BatchKeys, V: Targets, noise: float, forget: float) -> Outcome:
        """Write a batch; R and B untouched where it fails."""
        self.check_alone()
        state, ranks = self.state, self.ranks
        state.look()
        by_gain = self._by_gain()
        keys = K.tensor(ranks, state.d)
        with ranks.guarded("update"):
            error = self.W_0.sent_error(K, V)
            D = self.W_0.sent_columns(error)
            initial = _sum_of(ranks, squared_norm(D))
        size = forget * self._size + initial / noise if noise > 0.0 else math.inf
        with ranks.confirmed("update") as agreed:
            state.refuse_hard_write("update", noise)
            if not math.sqrt(size) < _HEADROOM * torch.finfo(D.dtype).max:
                raise ValueError(
                    f"update: the right-hand side would grow to {math.sqrt(size):.1e}; scale V or raise noise"
                )
            agreed["whether weight was read behind the last batch, by all ranks together,"] = by_gain
        targets = ranks.dtensor(D, self.weight.shape[1], dim=1)
        if state.determined:
            H, B = state.half(keys), self.B.to_local()
            innovation = torch.addmm(D, H.mT, B, alpha=-1.0)
            system = triangular.system(H, forget * noise)
            cost, residual = triangular.after(system, innovation, noise, forget).tolist()
            with ranks.guarded("update"):
                totals = _sums_of(ranks, squared_norm(innovation), cost, residual * residual)
            if not math.isfinite(totals[1]):
                message = f"update: K R^-1 overflows {state.dtype}: keys of size {math.sqrt(K.size):.1e} are too large"
                raise known_to_all(ValueError(message))
            step = self._sent_step(K, H, system, error, totals[0]) if by_gain else None
            change = self._change
            state.append_with(self.B, keys, targets, noise, forget)
            self._moved(size)
            if change is not None and step is not None:
                change.add_(*step)
                self._change = change
            return Outcome(math.sqrt(totals[0]), math.sqrt(totals[2]), totals[1], math.sqrt(initial))
        twin, new_B = state.clone(), ranks.dtensor(self.B.to_local().clone(), self.weight.shape[1], dim=1)
        twin.append_with(new_B, keys, targets, noise, forget)
        after = self._sent_error(twin, keys, D, new_B) if twin.determined else None
        with ranks.guarded("update"):
            sizes = _sums_of(ranks, squared_norm(self.B.to_local()), squared_norm(new_B.to_local()))
            missed = math.nan if after is None else math.sqrt(_sum_of(ranks, squared_norm(after)))
        with ranks.confirmed("update"):
            pass
        self.B = new_B
        _become(state, twin)
        self._moved(size)
        # An orthogonal transform keeps lengths: what B did not take up is the cost of the batch.
        cost = max(forget * sizes[0] + initial / noise - sizes[1], 0.0)
        return Outcome(math.nan, missed, cost, math.sqrt(initial))

    def _sent_step(
        self, K: BatchKeys, H: torch.Tensor, system: torch.Tensor, D: torch.Tensor, innovation: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What this rank's part of W - W_0 is changed by, as rows of the gain and D - K (W - W_0); None: too large.

        Args:
            K: keys of the batch, which R does not hold yet.
            H, system: R^-T K' and `triangular.system` of it.
            D: V - K W_0 as `ShardedWeight.sent_error` gives it.
            innovation: |V - K W|^2.
        """
        assert self._change is not None
        ranks, form = self.ranks, self.state._form
        with ranks.guarded("update"):
            gain = ranks.dtensor(form.back(form.backward(form.weighted(H, system))), self.state.d)
            reach = _sum_of(ranks, squared_norm(gain.to_local()))
            if not math.sqrt(innovation) * math.sqrt(reach) < _HEADROOM * torch.finfo(D.dtype).max:
                return None
            return self.weight.sent_share(gain), D - self._change.sent_product(K)

    def own_error(self, objective: float) -> float:
        """`CarriedSolution.own_error`, all ranks together: 20 products and solutions with four vectors are sent."""
        self.refresh()
        with self.ranks.guarded("health"):
            moved = math.sqrt(self.weight.sent_sums(squared_norm(self.weight.W - self.W_0.W))[0])
            return rounding_of_factor(self.state._form.extremes(), self.state.dtype, objective, moved)

    def remove(self, K: BatchKeys, V: Targets, noise: float, check: Check) -> Outcome:
        """Take back a batch."""
        self.check_alone()
        state, ranks, v = self.state, self.ranks, self.weight.shape[1]
        keys = K.tensor(ranks, state.d)
        with ranks.guarded("remove"):
            D = self.W_0.sent_columns(self.W_0.sent_error(K, V))
        residual = self._sent_error(state, keys, D, self.B)
        twin, new_B = state.clone(), ranks.dtensor(self.B.to_local().clone(), v, dim=1)
        with _told(state, twin):
            twin.remove_with(new_B, keys, ranks.dtensor(D, v, dim=1), noise)
        innovation = self._sent_error(twin, keys, D, new_B)
        inner = float((innovation.double() * residual.double()).sum())
        with ranks.guarded("remove"):
            totals = _sums_of(
                ranks,
                squared_norm(innovation),
                squared_norm(residual),
                inner,
                squared_norm(D),
                squared_norm(new_B.to_local()),
            )
        with ranks.confirmed("remove"):
            check(math.sqrt(totals[0]), math.sqrt(totals[1]), totals[2] / noise)
        self.B = new_B
        _become(state, twin)
        self._moved(totals[4])
        return Outcome(math.sqrt(totals[0]), math.sqrt(totals[1]), totals[2] / noise, math.sqrt(totals[3]))

    def rebuild(self, _W_0: Any, written: Batches) -> float:
        """R and B from kept batches, in float64 and rounded once; the objective."""
        if self.state._restriction is not None:
            raise known_to_all(ValueError(RESTRICTED))
        fresh, B, objective = carried64(self.state.prior, self.ranks, self.W_0, written)
        local = B.to_local().to(self.state.dtype)
        with self.ranks.guarded("refactor"):
            size = _sum_of(self.ranks, squared_norm(local))
        with self.ranks.confirmed("refactor"):
            pass
        self.state.adopt(fresh)
        self.B = self.ranks.dtensor(local, self.weight.shape[1], dim=1)
        self._moved(size)
        return objective

    @staticmethod
    def _sent_error(state: ShardedSquareRootState, keys: torch.Tensor, D: torch.Tensor, B: DTensor) -> torch.Tensor:
        """This rank's columns of V - K W of the present stream."""
        return torch.addmm(D, state.half(keys).mT, B.to_local(), alpha=-1.0)

    def check_alone(self) -> None:
        """See `Carried.check_alone`; all ranks find the same where they have compared the writes of the state."""
        try:
            super().check_alone()
        except ValueError as error:
            raise known_to_all(error) from None


def carried64(
    prior: Any, ranks: Ranks, W_0: ShardedWeight, written: Batches
) -> tuple[ShardedSquareRootState, DTensor, float]:
    """A float64 triangular state with its right-hand side and objective, from the prior and these batches."""
    fresh = ShardedSquareRootState(prior, ranks, dtype=torch.float64, guard="off")
    v = W_0.shape[1]
    B, wide, total = fresh.zeros(v), W_0.to(torch.float64), 0.0
    for K, V, noise in written:
        with ranks.guarded("refactor"):
            D = wide.sent_columns(wide.sent_error(K, V))
            total += _sum_of(ranks, squared_norm(D)) / noise
        fresh.append_with(B, K.tensor(ranks, fresh.d), ranks.dtensor(D, v, dim=1), noise)
    with ranks.guarded("refactor"):
        taken = _sum_of(ranks, squared_norm(B.to_local()))
    return fresh, B, max(total - taken, 0.0)


def _sums_of(ranks: Ranks, *parts: float) -> list[float]:
    """Sums over the ranks."""
    return ranks.ordered_sum(torch.tensor(parts, dtype=torch.float64, device=ranks.device)).tolist()


def _sum_of(ranks: Ranks, part: float) -> float:
    return _sums_of(ranks, part)[0]


@contextlib.contextmanager
def _told(state: Any, twin: Any) -> Iterator[None]:
    """A state whose copy has been found broken is broken itself, and refuses what comes."""
    try:
        yield
    except BreakdownError:
        state._watch.fault = twin._watch.fault
        raise


def _become(state: Any, twin: Any) -> None:
    """`state` with all that its changed copy has learnt, but for its own guard; nothing is sent."""
    watch, writes = state._watch, state._writes + 1
    state.__dict__.update(twin.__dict__)
    state._watch, state._writes = watch, writes
    watch.resume(state._counters)
