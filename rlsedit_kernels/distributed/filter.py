"""ShardedRLSFilter: `RLSFilter` for a weight and a state that lie on many ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rlsedit_kernels.distributed.agreement import digest
from rlsedit_kernels.distributed.batch_keys import BatchKeys, batch_keys
from rlsedit_kernels.distributed.covariance import ShardedCovarianceState
from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.distributed.right_hand_side import targets
from rlsedit_kernels.distributed.session import session
from rlsedit_kernels.distributed.solutions import ShardedCarriedSolution, ShardedGainSolution
from rlsedit_kernels.distributed.square_root import ShardedSquareRootState
from rlsedit_kernels.distributed.weight import ShardedWeight, Targets, check_part, local_part, place_of
from rlsedit_kernels.filter import LAYOUTS, STATES, FilterHistory, RLSFilter, Step, checked_arguments
from rlsedit_kernels.ops import _checks
from rlsedit_kernels.priors import Prior
from rlsedit_kernels.rounding import Rounding
from rlsedit_kernels.states import Health
from rlsedit_kernels.states.keys import triples
from rlsedit_kernels.states.modes import normal_mode
from rlsedit_kernels.states.reading import squared_norm
from rlsedit_kernels.states.removal import checked_noise

__all__ = ["ShardedRLSFilter"]

_NO_COPY = (
    "ShardedRLSFilter: a filter over ranks is neither copied nor saved as a whole: save the weight with its model and "
    "the batches (rlsedit_kernels.distributed.checkpoint for state.state_dict()), make the filter anew from W_0 and "
    "refactor(batches) it"
)

_PLACES = ("rows", "columns", "everywhere")


class ShardedRLSFilter(RLSFilter):
    """`RLSFilter` over ranks: every rank changes the part of W that it has, and W is never gathered.

    | weight | as | what is sent for it, a batch |
    |---|---|---|
    | sharded over d (row-parallel) | DTensor, Shard over d | the sum over ranks of K W (u x v), twice with bounds |
    | sharded over v (FSDP2 of `nn.Linear`) | DTensor, Shard over v | the gain (d x u); the keys if they come sharded |
    | everywhere | a tensor, or a replicated DTensor | the same |

    With solution="carried" no gain is sent, and reading `weight` costs a triangular solve. Where it is read behind
    every batch the gains are sent, and it is solved for every 16 batches (docs/distributed.md).

    Args:
        weight: W_0 as for `RLSFilter`, where it lies; a DTensor over the mesh of the ranks, or a tensor that all have.
        prior: the same on all ranks.
        ranks: the ranks, or their one-dimensional mesh; None for all processes.
        state: "covariance" (`ShardedCovarianceState`) or "square_root" (`ShardedSquareRootState`).
        layout, form, solution, dtype, track_bounds, inplace, guard: as for `RLSFilter`; the same on all ranks.
        history: as for `RLSFilter`, the same batches on all ranks.

    Raises:
        TypeError, ValueError: an argument does not fit, or differs between ranks.
        RankError: it does not fit on another rank.

    Every rank calls the same methods in the same order, `weight` and `health` among them. `Step` has the same bits on
    all ranks.
    """

    @normal_mode()
    def __init__(
        self,
        weight: torch.Tensor,
        prior: Prior,
        ranks: Ranks | DeviceMesh | None = None,
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
        self.ranks = ranks if isinstance(ranks, Ranks) else Ranks(ranks)
        with self.ranks.confirmed("ShardedRLSFilter") as agreed:
            working, chosen = checked_arguments(weight, prior, state, layout, form, dtype, solution, inplace)
            place = place_of(weight, layout, self.ranks)
            check_part(weight, self.ranks)
            local = local_part(weight)
            if not bool(torch.isfinite(local).all()):
                raise ValueError("RLSFilter: weight must be finite, got NaN or Inf")
            v = weight.shape[1 if layout == "in_out" else 0]
            agreed.update(layout=LAYOUTS.index(layout), state=STATES.index(state), v=v, itemsize=working.itemsize)
            agreed.update({"where the weight lies": _PLACES.index(place), "track_bounds": track_bounds})
            agreed.update({"whether the solution is carried": chosen == "carried"})
            agreed["whether there is a history"] = history is not None
            agreed["a digest of the weight"] = digest(local) if place == "everywhere" else 0.0
        self.layout = layout
        self._given = weight
        self._prior = prior
        self._weight = local if inplace else local.to(working, copy=True)
        self._track_bounds = track_bounds
        row_form = self._weight if layout == "in_out" else self._weight.mT
        self._part = ShardedWeight(self.ranks, row_form, place, (prior.d, v))
        carried = chosen == "carried"
        self._initial: Any = self._part.clone() if track_bounds or carried else None
        self._solution: Any
        if state == "covariance":
            self.state = ShardedCovarianceState(prior, self.ranks, form=form, dtype=working, guard=guard)
        else:
            self.state = ShardedSquareRootState(prior, self.ranks, dtype=working, guard=guard)
        if carried:
            assert isinstance(self.state, ShardedSquareRootState)
            assert self._initial is not None
            self._solution = ShardedCarriedSolution(self.state, self._part, self._initial)
        else:
            self._solution = ShardedGainSolution(self.state, self._part, self._initial, prior, track_bounds)
        with self.ranks.confirmed("ShardedRLSFilter"):
            self._begin(history)

    @property
    def weight(self) -> torch.Tensor:
        """The weight where it lies, in its layout and the dtype of the state; all ranks read it together.

        Raises:
            UnderdeterminedError: the filter started from nothing and has seen too little.
        """
        with self.ranks.guarded("weight"), normal_mode():
            self._solution.refresh()
        if not isinstance(self._given, DTensor):
            return self._weight
        mesh, shape, stride = self._given.device_mesh, self._given.shape, self._given.stride()
        return DTensor.from_local(
            self._weight, mesh, self._given.placements, run_check=False, shape=shape, stride=stride
        )

    @session
    def update(self, K: torch.Tensor, V: torch.Tensor, noise: float = 1.0, forget: float = 1.0) -> Step:
        """Write a batch: keys K shall map to V.

        Args:
            K: (u, d) keys: a tensor that all ranks have, or a DTensor sharded over d or replicated.
            V: (u, v) targets: a tensor that all ranks have, or a DTensor sharded over v or replicated.
            noise, forget: as for `RLSFilter.update`.

        Raises:
            TypeError, ValueError, BreakdownError: as the state's `update`; weight and state untouched.
            RankError: another rank has failed; weight and state untouched.
        """
        self._confirm_batch("update", noise, forget, remaining=False)
        return super().update(K, V, noise, forget)

    @session
    def remove(
        self,
        K: torch.Tensor,
        V: torch.Tensor,
        noise: float = 1.0,
        *,
        remaining: Iterable[tuple[torch.Tensor, torch.Tensor, float]] | None = None,
    ) -> Step:
        """`RLSFilter.remove`; K and V as for `update`."""
        self._confirm_batch("remove", noise, 1.0, remaining=remaining is not None)
        return super().remove(K, V, noise, remaining=remaining)

    @session
    def refactor(self, written: Iterable[tuple[torch.Tensor, torch.Tensor, float]]) -> None:
        """`RLSFilter.refactor`; the same batches on all ranks."""
        with self.ranks.confirmed("refactor") as agreed:
            if self._initial is None:
                raise ValueError("refactor: W_0 is not kept with track_bounds=False: write the batches to a new filter")
            batches = [(K, V, _checks.noise("refactor", noise)) for K, V, noise in triples("refactor", written)]
            if any(noise == 0.0 for _, _, noise in batches):
                raise ValueError("refactor: noise must be > 0 for every batch")
            agreed["batches"] = len(batches)
        super().refactor(batches)

    @session
    def health(self, *, thorough: bool = False) -> Health:
        """`RLSFilter.health`, by all ranks together."""
        return super().health(thorough=thorough)

    def state_dict(self) -> NoReturn:
        """Raises:
        RuntimeError: always: the parts of its weight are those of the model. Save the model, `state.state_dict()` and
            the batches (`distributed.checkpoint`), make the filter anew and `refactor(batches)` it.
        """
        raise RuntimeError(_NO_COPY)

    def load_state_dict(self, saved: object) -> NoReturn:
        """Raises:
        RuntimeError: always, as for `state_dict`.
        """
        raise RuntimeError(_NO_COPY)

    def clone(self) -> NoReturn:
        """Raises:
        RuntimeError: always, as for `state_dict`.
        """
        raise RuntimeError(_NO_COPY)

    def __getstate__(self) -> NoReturn:
        raise RuntimeError(_NO_COPY)

    def _rebuild(self) -> None:
        assert self._history is not None
        with self.ranks.confirmed("look"):
            written = list(self._history())
        self.refactor(written)

    def _confirm_batch(self, op: str, noise: float, forget: float, *, remaining: bool) -> None:
        with self.ranks.confirmed(op) as agreed:
            noise = checked_noise(noise) if op == "remove" else _checks.noise(op, noise)
            agreed.update(noise=noise, forget=_checks.forget(op, forget))
            agreed["whether remaining is given"] = remaining

    def _pair(self, op: str, K: object, V: object) -> Any:
        with self.ranks.confirmed(op) as agreed:
            keys = batch_keys(op, K, self.state.d, self.state.dtype, self.ranks)
            local, full, mark = targets(op, V, (keys.u, self._part.shape[1]), self.state.dtype, self.ranks)
            agreed.update(u=keys.u, writes=self.state._writes)
            agreed.update({"whether K is sharded": keys.full is None, "whether V is sharded": full is None})
            agreed.update({"a digest of K": keys.mark, "a digest of V": mark})
        with self.ranks.guarded(op):
            keys = replace(keys, size=float(keys.squared_norms(self.ranks).sum()))
        return keys, Targets(local, full, self._part.shape[1])

    def _misfit(self, K: Any, V: Any, W: Any) -> float:  # type: ignore[override]
        with self.ranks.guarded("RLSFilter"):
            return float(self._part.sent_totals(squared_norm(W.sent_error(K, V)))[0]) ** 0.5

    @staticmethod
    def _same(W: Any, other: Any) -> bool:
        return bool(W.sent_sums(float(not torch.equal(W.W, other.W)))[0] == 0.0)

    def _row_form(self) -> Any:
        return self._part

    def _new_rounding(self) -> Rounding:
        return ShardedRounding(self._prior, self.state.dtype, _size, self._prior.trace)


class ShardedRounding(Rounding):
    """Of the rounding errors of a weight each rank adds up those of its part: they are squares, and nothing is sent."""

    def error(self, W: Any, summed: bool) -> float:
        """See `Rounding.error`; all ranks together."""
        tau = self._trace / self._d
        total, size = W.sent_sums(self._sum, squared_norm(W.W))
        once = tau * self._unit**2 * size
        return math.sqrt(max(total / tau, once) if summed and tau > 0.0 else once)


def _size(value: BatchKeys | ShardedWeight) -> float:
    """|K|^2, or of a weight the part of this rank."""
    return squared_norm(value.W) if isinstance(value, ShardedWeight) else value.size
