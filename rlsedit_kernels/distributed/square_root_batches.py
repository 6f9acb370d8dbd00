"""How a square-root state over ranks works a batch out: beside the state, until all ranks say that they are done."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from rlsedit_kernels.backends.precision import ieee_products
from rlsedit_kernels.distributed.agreement import digest
from rlsedit_kernels.distributed.batch_keys import BatchKeys, batch_keys
from rlsedit_kernels.distributed.probes import ShardedProbes
from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.distributed.right_hand_side import carried, targets
from rlsedit_kernels.distributed.session import GuardedByAll
from rlsedit_kernels.distributed.triangular import ShardedTriangular
from rlsedit_kernels.ops import _checks
from rlsedit_kernels.states import removal, triangular
from rlsedit_kernels.states.guard import Moment
from rlsedit_kernels.states.modes import writing
from rlsedit_kernels.states.square_root import SquareRootState
from rlsedit_kernels.states.triangular_form import over_root

__all__ = ["ShardedBatches", "ShardedRows"]


@dataclass(frozen=True)
class Arrived:
    """A batch that all ranks agree on: keys, noise > 0, forgetting factor."""

    keys: BatchKeys
    noise: float
    forget: float


@dataclass(frozen=True)
class ShardedRows:
    """A batch that every rank has worked out and none has written; see `PreparedRows`.

    Attributes:
        gain: (d, u), sharded over d.
        form, probes: what the state becomes.
        system: (u, u) Cholesky factor of forget noise I + K C K', float64; None for a state that this batch determines.
        hat: (u, u) = K g, float64, for such a state only.
        largest: the largest squared norm of a key.
        batch: the batch.
        moment: the state, and the changes it had seen, when it was prepared.
    """

    gain: DTensor
    form: ShardedTriangular
    probes: ShardedProbes
    system: torch.Tensor | None
    hat: torch.Tensor | None
    largest: float
    batch: Arrived
    moment: Moment

    def after(self, innovation: torch.Tensor) -> torch.Tensor:
        """What these columns (u, m) of E = V - K W add to the objective, and |E_after| of them; nothing is sent.

        (2,) float64.
        """
        noise, forget = self.batch.noise, self.batch.forget
        if self.system is not None:
            return triangular.after(self.system, innovation, noise, forget)
        assert self.hat is not None
        E = innovation.to(torch.float64)
        residual = E - self.hat @ E
        return torch.stack([(E * residual).sum() / noise, residual.norm()])


class ShardedBatches(GuardedByAll, SquareRootState):
    """What `ShardedSquareRootState` does with a batch, in parts of two kinds.

    `confirmed`: every rank alone; may raise, and then no rank goes on. `guarded`: sends and receives; what fails here
    ends the group. After the last `confirmed` there is nothing left but assignments.
    """

    ranks: Ranks
    _form: ShardedTriangular  # type: ignore[assignment]
    _probes: ShardedProbes  # type: ignore[assignment]

    def _arriving(
        self,
        op: str,
        K: object,
        noise: float,
        forget: float,
        more: Callable[[BatchKeys], float] | None = None,
        *,
        remaining: bool = False,
    ) -> Arrived:
        """A batch that fits, on every rank the same; `more` checks what else there is and gives its digest.

        Args:
            remaining: whether batches that stay are given with one that is removed.
        """
        with self.ranks.confirmed(op) as agreed:
            checked = _checks.noise(op, noise), _checks.forget(op, forget)
            self.refuse_hard_write(op, checked[0])
            keys = batch_keys(op, K, self.d, self.dtype, self.ranks)
            mark = 0.0 if more is None else more(keys)
            agreed.update(writes=self._writes, u=keys.u, itemsize=self.dtype.itemsize, noise=checked[0])
            agreed.update({"forget": checked[1], "K is sharded": keys.full is None})
            agreed.update({"a digest of K": keys.mark, "a digest of V": mark, "whether remaining is given": remaining})
        return Arrived(keys, *checked)

    def _with_right_hand_side(
        self, op: str, B: object, K: object, V: object, noise: float, forget: float
    ) -> tuple[Arrived, torch.Tensor, torch.Tensor]:
        """The batch, this rank's columns of B, and those of V."""
        found: list[torch.Tensor] = []

        def check(keys: BatchKeys) -> float:
            found.append(carried(op, B, self._form.L.shape[1], self.dtype, self.ranks))
            part, _, mark = targets(op, V, (keys.u, B.shape[1]), self.dtype, self.ranks)  # type: ignore[attr-defined]
            found.append(part)
            return mark

        batch = self._arriving(op, K, noise, forget, check)
        return batch, found[0], found[1]

    def _inner(self, batch: Arrived) -> tuple[torch.Tensor, float, float]:
        """The keys (u, r_p) in the coordinates of the form, the sum of their squares, and the largest |k|^2."""
        norms = batch.keys.squared_norms(self.ranks)
        keys, squared = self._form.coordinates(batch.keys, norms)
        return keys, squared, float(norms.max())

    def _prepared(self, op: str, K: object, noise: float, forget: float) -> ShardedRows:
        batch = self._arriving(op, K, noise, forget)
        self.look()
        self._bound.check_factor(op, self._form, batch.forget)
        with ieee_products():
            return self._before(op, batch) if self._form.regular else self._determined_by(op, batch)

    def _before(self, op: str, batch: Arrived) -> ShardedRows:
        """The gain from R before the batch (fact 15), and R with it."""
        form, ranks, probes = self._form, self.ranks, self._probes
        with ranks.guarded(op):
            keys, squared, largest = self._inner(batch)
            H = form.half(keys.mT)
        with ranks.confirmed(op) as agreed:
            trace = form.room_for(op, squared / batch.noise, batch.forget)
            system = triangular.system(H, batch.forget * batch.noise)
            weighted = form.weighted(H, system)
            agreed["a digest of K C K'"] = digest(system)
        with ranks.guarded(op):
            local = form.back(form.backward(weighted))
            if op != "gain":
                form = form.appended(over_root(keys, batch.noise), batch.forget, trace)
                probes = probes.moved(batch.keys, 1.0 / batch.noise, batch.forget)
        return self._last(
            op, ShardedRows(self.ranks.dtensor(local, self.d), form, probes, system, None, largest, batch, self._moment)
        )

    def _determined_by(self, op: str, batch: Arrived) -> ShardedRows:
        """The gain of a state that this batch determines."""
        ranks = self.ranks
        with ranks.guarded(op):
            keys, squared, largest = self._inner(batch)
        with ranks.confirmed(op):
            trace = self._form.room_for(op, squared / batch.noise, batch.forget)
        with ranks.guarded(op):
            rows = over_root(keys, batch.noise)
            form = self._form.appended(rows, batch.forget, trace)
        with ranks.confirmed(op):
            form.require_regular()
        with ranks.guarded(op):
            H = form.half(rows.mT)
            local = over_root(form.back(form.backward(H[form.own])), batch.noise)
            probes = self._probes.moved(batch.keys, 1.0 / batch.noise, batch.forget)
        wide = H.to(torch.float64)
        hat = wide.mT @ wide
        return self._last(
            op, ShardedRows(self.ranks.dtensor(local, self.d), form, probes, None, hat, largest, batch, self._moment)
        )

    def _last(self, op: str, prepared: ShardedRows) -> ShardedRows:
        """The last exchange: every rank has its share of the batch, and of a gain that is finite."""
        with self.ranks.confirmed(op):
            if not math.isfinite(float(prepared.gain.to_local().sum())):
                raise ValueError(f"{op}: the gain overflows {self.dtype}: scale K or raise noise")
        return prepared

    def _append(self, op: str, batch: Arrived, B: torch.Tensor | None, V: torch.Tensor | None) -> None:
        ranks = self.ranks
        self._bound.check_factor(op, self._form, batch.forget)
        with ranks.guarded(op):
            keys, squared, largest = self._inner(batch)
        with ranks.confirmed(op):
            trace = self._form.room_for(op, squared / batch.noise, batch.forget)
            new_B, targets = (None, None) if B is None or V is None else (B.clone(), over_root(V, batch.noise))
        with ranks.guarded(op):
            form = self._form.appended(over_root(keys, batch.noise), batch.forget, trace, new_B, targets)
            probes = self._probes.moved(batch.keys, 1.0 / batch.noise, batch.forget)
        with ranks.confirmed(op):
            pass
        if B is not None and new_B is not None:
            with writing(B):
                B.copy_(new_B)
        self._become(form, probes, largest, batch)

    def _removed(self, op: str, batch: Arrived, B: torch.Tensor | None, V: torch.Tensor | None) -> DTensor:
        form, ranks, root = self._form, self.ranks, math.sqrt(batch.noise)
        with ranks.confirmed(op):
            form.require_regular()
            removal.refuse_unwritten(self._counters)
        with ranks.guarded(op):
            rows = self._inner(batch)[0].to(torch.float64) / root
            X = form.forward(rows.mT)  # of all of R
            outside = X if form.held is None else form.half(rows.mT)
        with ranks.confirmed(op) as agreed:
            eps = torch.finfo(self.dtype).eps
            A, leverage = triangular.leverage(X.mT, eps)
            inner = A if form.held is None else triangular.leverage(outside.mT, eps)[0]
            weighted = torch.cholesky_solve(outside[form.own].mT, torch.linalg.cholesky(inner)).mT
            agreed["a digest of K C K'"] = digest(A)
        self._watch.refuse(self)
        with ranks.guarded(op):
            # A gain for the rows K / sqrt(noise), in float64 and rounded once
            local = over_root(form.back(form.backward(weighted).to(self.dtype)), batch.noise)
        with ranks.confirmed(op):
            wide = None if B is None else B.to(torch.float64, copy=True)
            new = form.replaced(form.without(X.mT, A, wide), math.nan)
        with ranks.guarded(op):
            new.measure()
            probes = self._probes.moved(batch.keys, -1.0 / batch.noise)
            if B is not None and V is not None and wide is not None:
                # Taken out so far are the rows as the state predicts them, K W; what they differed by is left.
                error = V.to(torch.float64) / root - X.mT @ B.to(torch.float64)
                wide.addmm_(new.forward(rows.mT), error, alpha=-1.0)
        with ranks.confirmed(op):
            pass
        if B is not None and wide is not None:
            with writing(B):
                B.copy_(wide)
        self._form, self._probes = new, probes
        self._count_removed(leverage)
        return ranks.dtensor(local, self.d)

    def _become(self, form: ShardedTriangular, probes: ShardedProbes, largest: float, batch: Arrived) -> None:
        self._bound.followed(self._form, form, math.sqrt(batch.forget))
        self._form, self._probes = form, probes
        self._count_written(largest, batch.noise, batch.forget)
