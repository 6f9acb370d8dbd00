"""ShardedSquareRootState: streaming QR with the factor over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NoReturn

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rlsedit_kernels.backends.precision import ieee_products
from rlsedit_kernels.distributed import restriction as restrictions
from rlsedit_kernels.distributed import square_root_saving as saving
from rlsedit_kernels.distributed.agreement import digest, digest_of_prior
from rlsedit_kernels.distributed.batch_keys import BatchKeys
from rlsedit_kernels.distributed.probes import ShardedProbes
from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.distributed.right_hand_side import carried
from rlsedit_kernels.distributed.session import session
from rlsedit_kernels.distributed.square_root_batches import ShardedBatches, ShardedRows
from rlsedit_kernels.distributed.triangular import ShardedTriangular
from rlsedit_kernels.errors import BreakdownError
from rlsedit_kernels.priors import Prior
from rlsedit_kernels.priors.factor import scalar
from rlsedit_kernels.states import removal, report
from rlsedit_kernels.states.counters import Counters
from rlsedit_kernels.states.forgetting import Bound
from rlsedit_kernels.states.guard import History
from rlsedit_kernels.states.health import Health, Probes
from rlsedit_kernels.states.keys import KeysLike, checked_basis, pairs, shaped_basis
from rlsedit_kernels.states.modes import normal_mode
from rlsedit_kernels.states.prepared import require_current
from rlsedit_kernels.states.restriction import require_directions
from rlsedit_kernels.states.square_root import SquareRootState
from rlsedit_kernels.states.state import checked_dtype

__all__ = ["ShardedRows", "ShardedSquareRootState"]


class ShardedSquareRootState(ShardedBatches):
    """`SquareRootState` with R over ranks: each keeps columns of R, that is rows of R', as contiguous shards.

    Every rank calls the same methods in the same order. Nothing of size d x d is sent: a batch costs u x d numbers for
    H = R^-T K', the same for the reflectors, and (ranks - 1) / 2 times that for the gain (`append_bytes`). A batch is
    worked out beside the state, R included, and becomes the state only after all ranks have said that they are done:
    while it is worked out a rank holds its share of R twice.

    Args:
        prior: as for `SquareRootState`, the same on all ranks, to the bit. It is factored on every rank.
        ranks: the ranks, or their one-dimensional mesh; None for all processes.
        dtype: torch.float32 or torch.float64.
        guard, history: as for `SquareRootState`; the history gives the same batches on all ranks.

    Raises:
        TypeError, ValueError: wrong arguments, a prior that is not positive definite, or ranks that differ in them.
        RankError: another rank has failed.

    Keys K (u, d) are a tensor that all ranks have, or a DTensor sharded over d or replicated. Gains come as DTensors
    (d, u) sharded over d. Errors are those of `SquareRootState`, on all ranks; where only one rank has reason to
    raise, the others raise `RankError`. In both cases the state is unchanged and can go on, unless the message says
    that the group of ranks has ended.
    """

    @normal_mode()
    def __init__(
        self,
        prior: Prior,
        ranks: Ranks | DeviceMesh | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        guard: str = "auto",
        history: History | None = None,
    ) -> None:
        self.ranks = ranks if isinstance(ranks, Ranks) else Ranks(ranks)
        with self.ranks.confirmed("ShardedSquareRootState") as agreed:
            super().__init__(prior, dtype=dtype, device=self.ranks.device, guard=guard, history=history)
            form, probes = self._form, self._first_probes
            agreed.update({"itemsize of the dtype": dtype.itemsize, "a digest of the prior": digest_of_prior(prior)})
            agreed.update({"whether guard is on": guard != "off", "whether there is a history": history is not None})
            agreed["a digest of the basis (machines of two kinds may find different ones: give a basis)"] = self._mark
        with self.ranks.guarded("ShardedSquareRootState"):
            form.measure()
            self._probes = ShardedProbes.start(probes, self.ranks)
        del self._first_probes

    def _start(self) -> None:
        """What a rank does alone."""
        self._counters, self._bound, self._mark = Counters(), Bound(), 0.0
        if self.prior.is_nothing:
            self._factor = scalar(self.prior.d, 1.0)
            self._form = ShardedTriangular.nothing(self.prior.d, self.dtype, self.ranks)
            self._first_probes = Probes.start(self._factor, torch.device("cpu"))
            self._first_probes.image.zero_()
            return
        there = "factor" in self.prior.__dict__
        try:
            factor = self.prior.factor
            self._form, self._mark = ShardedTriangular.start(factor, self.dtype, self.ranks)
            self._first_probes = Probes.start(factor, torch.device("cpu"))
            self._factor = replace(factor, root=None, root_inverse=None)  # matrices of d x d are nobody's to keep
        finally:
            if not there:
                self.prior.__dict__.pop("factor", None)

    @property
    def factor(self) -> DTensor:
        """R (d, d), or (r, r) in the basis of a proper subspace, sharded over its columns; a copy."""
        return self.ranks.dtensor(self._form.L.mT.clone(), self._form.L.shape[1], dim=1)

    @session
    def gain(self, K: torch.Tensor, noise: float = 1.0) -> DTensor:
        """`SquareRootState.gain`; (d, u), sharded over d."""
        return self._prepared("gain", K, noise, 1.0).gain

    @session
    def prepare(self, K: torch.Tensor, noise: float = 1.0, forget: float = 1.0) -> ShardedRows:  # type: ignore[override]
        """First half of `update`: everything that is sent and all that can fail, nothing written."""
        return self._prepared("update", K, noise, forget)

    def write(self, prepared: ShardedRows) -> None:  # type: ignore[override]
        """Second half of `update`; nothing is sent.

        Raises:
            ValueError: the state has changed since `prepare`.
        """
        require_current(prepared, self)
        self._become(prepared.form, prepared.probes, prepared.largest, prepared.batch)

    @session
    def commit(self, K: torch.Tensor, noise: float = 1.0, forget: float = 1.0) -> None:
        """`SquareRootState.commit`."""
        batch = self._arriving("commit", K, noise, forget)
        self.look()
        with ieee_products():
            self._append("commit", batch, None, None)

    @session
    def append_with(
        self, B: torch.Tensor, K: KeysLike, V: torch.Tensor, noise: float = 1.0, forget: float = 1.0
    ) -> None:
        """`commit` with a right-hand side rotated along, in place; every rank changes its columns of it.

        Args:
            B: (r, v), DTensor sharded over v; see `zeros`.
            K, noise, forget: as for `commit`.
            V: (u, v) targets, less what the weight gave before the stream: all of it on all ranks, or sharded over v.
        """
        batch, mine, part = self._with_right_hand_side("append_with", B, K, V, noise, forget)
        self._watch.look(self, repair=False)
        with ieee_products():
            self._append("append_with", batch, mine, part)

    @normal_mode()
    def zeros(self, v: int) -> DTensor:
        """A right-hand side (r, v) of zeros, sharded over v."""
        columns = self.ranks.rows(v)
        local = torch.zeros(
            self._form.L.shape[1], columns.stop - columns.start, dtype=self.dtype, device=self.ranks.device
        )
        return self.ranks.dtensor(local, v, dim=1)

    @session
    def solve(self, B: torch.Tensor) -> DTensor:
        """R^-1 B (d, v), sharded over d, of B (r, v) sharded over v: one all-to-all and one triangular solve.

        Raises:
            UnderdeterminedError: the state started from nothing and has seen too little.
        """
        form, ranks = self._form, self.ranks
        with ranks.confirmed("solve") as agreed:
            form.require_regular()
            local = carried("solve", B, form.L.shape[1], self.dtype, ranks)
            agreed.update(writes=self._writes, v=B.shape[1])
        with ieee_products(), ranks.guarded("solve"):
            y = ranks.turn(form.outside_held(local), B.shape[1])
            return ranks.dtensor(form.back(form.backward(y)), self.d)

    @session
    def half(self, K: KeysLike) -> torch.Tensor:
        """`SquareRootState.half`; all of H (r, u) on all ranks."""
        batch = self._arriving("half", K, 1.0, 1.0, self._regular)
        with ieee_products(), self.ranks.guarded("half"):
            keys, _, _ = self._inner(batch)
            return self._form.half(keys.mT)

    def _regular(self, _keys: BatchKeys) -> float:
        self._form.require_regular()
        return 0.0

    def _written(self, _keys: BatchKeys) -> float:
        removal.refuse_unwritten(self._counters, self._form)
        return 0.0

    @session
    def apply(self, Y: torch.Tensor) -> DTensor:
        """C Y (d, p) float64, sharded over d: what to use in the place of a covariance that is nowhere.

        Args:
            Y: (d, p), on all ranks.
        """
        with self.ranks.confirmed("apply") as agreed:
            self._form.require_regular()
            wide = Y.detach().to(torch.float64)
            if wide.dim() != 2 or wide.shape[0] != self.d or wide.shape[1] == 0:
                raise ValueError(f"apply: Y must have shape (d, p) with d = {self.d} and p >= 1, got {tuple(Y.shape)}")
            agreed.update(writes=self._writes, columns=wide.shape[1], digest_of_Y=digest(wide))
        with ieee_products(), self.ranks.guarded("apply"):
            return self.ranks.dtensor(self._form.apply(self.ranks.shard(wide)), self.d)

    @session
    def remove(
        self, K: KeysLike, noise: float = 1.0, *, remaining: Iterable[tuple[torch.Tensor, float]] | None = None
    ) -> DTensor:
        """`SquareRootState.remove`; the gain (d, u) is sharded over d."""
        batch = self._arriving("remove", K, noise, 1.0, self._written, remaining=remaining is not None)
        with ieee_products():
            try:
                return self._removed("remove", batch, None, None)
            except BreakdownError:
                if remaining is None:
                    raise
            self.refactor(remaining)
            # F (noise I - K F)^-1 = C_new K' / noise, C_new without the batch
            with self.ranks.guarded("remove"):
                inner, _, _ = self._inner(batch)
                local = self._form.back(self._form.backward(self._form.half(inner.mT)[self._form.own]))
            return self.ranks.dtensor(local.div_(batch.noise), self.d)

    @session
    def remove_with(self, B: torch.Tensor, K: KeysLike, V: torch.Tensor, noise: float = 1.0) -> None:
        """`remove` with the right-hand side of `append_with`, in place."""
        batch, mine, part = self._with_right_hand_side("remove_with", B, K, V, noise, 1.0)
        with ieee_products():
            self._removed("remove_with", batch, mine, part)

    @session
    def restrict(self, Q: torch.Tensor) -> None:
        """Forbid all later edits in the directions Q (docs/mathematics.md, fact 9).

        R stays what it was, since the factor of N'S N would be a dense QR decomposition over all ranks. With U an
        orthonormal basis of the range of R^-T Q, C becomes R^-1 (I - U U') R^-T; U is made anew with every batch, for
        q x d numbers that are sent, and the products with it are formed in float64.

        Args:
            Q: (d, q), orthonormal columns: a tensor that all ranks have, or a DTensor over the mesh, Shard(0).
        """
        form, ranks = self._form, self.ranks
        with ranks.confirmed("restrict") as agreed:
            form.require_regular()
            shaped_basis("restrict", Q, self.d)
            rows = restrictions.own_rows("restrict", Q, ranks)
            agreed.update({"writes": self._writes, "q": Q.shape[1], "Q is a DTensor": isinstance(Q, DTensor)})
        with ranks.guarded("restrict"):
            whole = ranks.gather(rows, self.d) if isinstance(Q, DTensor) else Q
        with ranks.confirmed("restrict") as agreed:
            wide = checked_basis("restrict", whole, self.d)
            agreed["digest_of_Q"] = digest(wide)
        with ieee_products():
            with ranks.guarded("restrict"):
                inner = wide if form.basis is None else form.everywhere64(ranks.shard(wide))
            with ranks.confirmed("restrict") as agreed:
                held = inner if form.held is None else torch.cat([form.held, inner], dim=1)
                U, sizes, _ = torch.linalg.svd(held, full_matrices=False)
                held = U[:, sizes > 1e-10].contiguous()
                if held.shape[1] == form.L.shape[1]:
                    raise ValueError("restrict: Q spans the whole space of edits: nothing could be written any more")
                agreed["directions"] = held.shape[1]
            with ranks.guarded("restrict"):
                ranks.broadcast(held, 0)  # a basis is not unique
                restricted = form.with_held(held)
                probes = self._probes.begun_again(restricted)
                known = restrictions.joined(self._restriction, rows, self.d, ranks)
            with ranks.confirmed("restrict"):
                pass
        self._form, self._probes, self._restriction = restricted, probes, known
        self._writes += 1
        self._counters.singular_writes += 1
        self._counters.restrictions += 1

    @session
    def refactor(self, written: Iterable[tuple[torch.Tensor, float]]) -> None:
        """Rebuild R from the prior and kept batches, in float64. Restrictions stay in force.

        Args:
            written: pairs (K, noise), noise > 0, of all batches that the state shall hold; the same on all ranks.
        """
        with self.ranks.confirmed("refactor"):
            require_directions(self._counters, self._restriction)
        fresh = ShardedSquareRootState(self.prior, self.ranks, dtype=torch.float64, guard="off")
        batches = pairs("refactor", written)  # looked at when the first of them is asked for
        while True:
            with self.ranks.confirmed("refactor") as agreed:
                batch = next(batches, None)
                agreed["batches"] = fresh.steps + (batch is not None)
            if batch is None:
                break
            fresh.commit(*batch)
        if self._restriction is not None:
            with self.ranks.guarded("refactor"):
                directions = self.ranks.gather(self._restriction, self.d)
            fresh.restrict(directions)
        self.adopt(fresh)

    def adopt(self, fresh: SquareRootState) -> None:
        """Become what another state of the same prior and ranks is, rounded to the dtype of this one."""
        assert isinstance(fresh, ShardedSquareRootState)
        self._form = fresh._form.to_dtype(self.dtype)
        self._counters, self._probes = fresh._counters, fresh._probes
        self._watch.repaired()
        self._writes += 1

    def covariance(self) -> NoReturn:
        """Not there.

        Raises:
            ValueError: always: C needs every row of R on every rank.
        """
        raise ValueError("covariance: a state over ranks keeps no dense C: use apply(Y) for C Y, or collect() for a "
                         "SquareRootState where it fits")  # fmt: skip

    def precision(self) -> NoReturn:
        """Not there; see `covariance`."""
        raise ValueError("precision: a state over ranks keeps no dense S = R'R: use factor (R, sharded), or collect() "
                         "for a SquareRootState where it fits")  # fmt: skip

    @session
    def health(self, *, thorough: bool = False) -> Health:
        """Conditioning and measured drift, the same on all ranks: one forward substitution with four vectors.

        Raises:
            ValueError: `thorough`, which takes a dense C apart.
        """
        with self.ranks.confirmed("health") as agreed:
            if thorough:
                raise ValueError("health: thorough needs a dense C: use collect().health(thorough=True) where it fits")
            agreed["writes"] = self._writes
        with ieee_products():
            return report.factor_health(self)

    @session
    def collect(self) -> SquareRootState:
        """The same state in one process, on every rank: r x r numbers are sent, for states that fit everywhere."""
        return saving.collected(self)

    @session
    def look(self) -> None:
        """`SquareRootState.look`, by all ranks together."""
        super().look()

    def state_dict(self) -> dict[str, object]:
        """Tensors (those over ranks as DTensors) and plain values from which the state is restored to the bit."""
        return saving.state_dict(self)

    @session
    def load_state_dict(self, saved: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave, here or in a `SquareRootState`, over any number of ranks.

        Raises:
            ValueError: the prior, dtype, version or a tensor does not fit; the state is unchanged.
        """
        saving.load_state_dict(self, saved)

    def convert(self, form: str) -> NoReturn:
        """Not there.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"convert: a state over ranks is not converted to {form!r}: write its batches to a new "
                         "ShardedCovarianceState, or use collect().convert(form) where it fits")  # fmt: skip

    def clone(self) -> ShardedSquareRootState:
        """An independent copy without a history; the prior and the ranks are shared."""
        twin = self._twin()
        twin._form, twin._probes = self._form.clone(), self._probes.clone()
        return twin

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ShardedSquareRootState:
        """A copy in another dtype, with the history; the device is that of the mesh."""
        if device is not None and torch.device(device).type != self.ranks.device.type:
            raise ValueError(f"to: a state over ranks lives on the device of its mesh, {self.device}, got {device}")
        if dtype is not None:
            checked_dtype("ShardedSquareRootState.to", dtype)
        twin = self.clone()
        twin.dtype, twin.history = dtype or self.dtype, self.history
        twin._form = twin._form.to_dtype(twin.dtype)
        return twin

    def __repr__(self) -> str:
        return (
            f"ShardedSquareRootState({self.prior!r}, ranks={self.ranks.size}, dtype={self.dtype}, steps={self.steps})"
        )
