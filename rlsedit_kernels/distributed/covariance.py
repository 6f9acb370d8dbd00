"""ShardedCovarianceState: the covariance of a stream of batches, each rank its rows.

The state itself is `CovarianceState`: this file says how a batch is checked by all ranks, multiplied, confirmed and
only then written, and what is done by replaying batches where one process would form something d x d.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rlsedit_kernels.distributed import held as holds
from rlsedit_kernels.distributed import restriction as restrictions
from rlsedit_kernels.distributed.agreement import digest, digest_of_saved
from rlsedit_kernels.distributed.batch import Batch
from rlsedit_kernels.distributed.batch_keys import batch_keys
from rlsedit_kernels.distributed.factor import PriorName, sharded_factor
from rlsedit_kernels.distributed.forms import FORM_CLASSES
from rlsedit_kernels.distributed.plain import PlainRows
from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.distributed.replay import Replaying
from rlsedit_kernels.distributed.row_probes import RowProbes, applied, dense_rows
from rlsedit_kernels.distributed.rows import saved_rows
from rlsedit_kernels.distributed.session import GuardedByAll, known_to_all
from rlsedit_kernels.distributed.whitened import WhitenedRows
from rlsedit_kernels.errors import BreakdownError
from rlsedit_kernels.ops import _checks
from rlsedit_kernels.priors import Prior
from rlsedit_kernels.states import batch as batches
from rlsedit_kernels.states import choice, removal, restriction
from rlsedit_kernels.states.batch import BatchFactor
from rlsedit_kernels.states.forms import FORMS
from rlsedit_kernels.states.guard import History, Watch
from rlsedit_kernels.states.health import Health
from rlsedit_kernels.states.keys import shaped_basis
from rlsedit_kernels.states.modes import normal_mode
from rlsedit_kernels.states.prepared import Prepared, require_current
from rlsedit_kernels.states.products import Change, Products
from rlsedit_kernels.states.saving import as_saved
from rlsedit_kernels.states.state import checked_start

__all__ = ["ShardedCovarianceState"]

_COLUMNS = 128


class ShardedCovarianceState(GuardedByAll, Replaying):
    """A `CovarianceState` whose rows lie on the ranks of a mesh; all ranks call the same methods in the same order.

    Keys of a batch are a tensor (u, d) that every rank has, or a DTensor over the mesh, Shard(1) (what a row-parallel
    layer sees) or Replicate. Gains are DTensors (d, u), Shard(0): `to_local()` is what a row-parallel weight needs,
    `full_tensor()` what other weights need. Nothing of size d x d is sent by any batch (`volume.py`). The u x u system
    is factored on every rank; its bits are compared before anything is written.

    Args:
        prior: that every rank has. It is factored in float64 on every rank, which keeps its rows; the state does not
            keep the prior.
        ranks: `Ranks`, a one-dimensional mesh, or None for all processes.
        form: as for `CovarianceState`. "auto" decides as that does for the first keys; later it moves to a safer form
            where `history` is given, by replaying it, else `health()` says that it would.
        dtype: torch.float32 or torch.float64.
        guard: as for `CovarianceState`.
        history: gives pairs (K, noise) of all batches that the state holds, the same on all ranks.

    Raises:
        TypeError, ValueError: wrong arguments, or ranks that have been given different ones.
        RankError: another rank has failed.

    Numerics: those of the single state, in another order of summation. The whitened form keeps a matrix from the start.
    Every method raises on all ranks or on none; where all could raise without a doubt about the others (wrong input on
    one rank, a breakdown) they can go on, and after a rank that failed between two collectives the group has ended. The
    state is unchanged in both cases.
    """

    def __init__(
        self,
        prior: Prior,
        ranks: Ranks | DeviceMesh | None = None,
        *,
        form: str = "auto",
        dtype: torch.dtype = torch.float32,
        guard: str = "auto",
        history: History | None = None,
    ) -> None:
        self.ranks = ranks if isinstance(ranks, Ranks) else Ranks(ranks)
        self._kept = ""
        with self.ranks.guarded("ShardedCovarianceState"):
            with self.ranks.confirmed("ShardedCovarianceState") as numbers:
                checked_start("ShardedCovarianceState", prior, dtype)
                if form not in FORMS:
                    names = ", ".join(map(repr, FORMS))
                    raise ValueError(f"ShardedCovarianceState: form must be one of {names}, got {form!r}")
                Watch(guard, history)
                numbers.update(form=FORMS.index(form), itemsize=dtype.itemsize, d=prior.d)
                numbers.update({"whether guard is on": guard != "off", "whether there is a history": bool(history)})
            self._keep_rows = form in ("plain", "auto")
            super().__init__(prior, form=form, dtype=dtype, device=self.ranks.device, guard=guard, history=history)
        self.prior = PriorName(prior)

    @property
    def rank(self) -> int:
        """Of this process among those that share the state."""
        return self.ranks.rank

    def gain(self, K: Any, noise: float = 1.0) -> torch.Tensor:
        """As `CovarianceState.gain`; a DTensor (d, u), Shard(0)."""
        return self._prepared_by_all("gain", K, noise, 1.0).gain

    def prepare(self, K: Any, noise: float = 1.0, forget: float = 1.0) -> Prepared:
        """First half of `update`: everything that can fail and all that is sent, nothing written.

        Raises:
            TypeError, ValueError: the input is wrong here, or not the same on all ranks.
            BreakdownError: as for `CovarianceState.gain`.
            RankError: it is wrong on another rank, or that rank has failed.
        """
        return self._prepared_by_all("update", K, noise, forget)

    def _prepared_by_all(self, op: str, K: Any, noise: float, forget: float) -> Prepared:
        with self._session(op):
            batch = self._begin(op, K, noise, forget)
            with self._unmoved_by_errors():
                form: Any = self._choose(batch, noise)
                scaled, units = batch.in_range(forget * noise)
                products = self._products(form, scaled, weight := forget * noise if units is None else units.noise)
                inner = self._inner
                with self.ranks.confirmed(op) as numbers:
                    factored = replace(self._solved(op, form, products, weight), batch=units)
                    gain = form.back(factored.gain)
                    gain = (gain if units is None else units.gain(gain)).to(self.dtype)
                    if not bool(torch.isfinite(gain).all()):
                        raise ValueError(f"{op}: the gain overflows {self.dtype}: keys of {batch.largest**0.5:.1e}")
                    numbers[_SYSTEM] = digest(factored.G, factored.root)
                if forget != 1.0:
                    self._bound.check_covariance(op, form, self._factor, self.dtype, forget)
            whole = self.ranks.dtensor(gain.contiguous(), self.d)
            keys: Any = batch
            found = Prepared(whole, math.nan, factored, inner, keys, float(noise), float(forget), self._moment)
            if noise > 0.0:
                return found
            held = holds.told(op, form, self._factor, scaled, factored.root, self._most(form, batch))
            return holds.HardWrite(**vars(found), before=form, held=held)

    def write(self, prepared: Prepared) -> None:
        """As `CovarianceState.write`: nothing is sent. A rank that fails here ends the group, as its rows are lost.

        Raises:
            ValueError: the state has changed since `prepare`; nothing was written here, and the ranks can go on.
        """
        require_current(prepared, self)
        with self.ranks.guarded("write"):
            super().write(prepared)

    def remove(
        self, K: Any, noise: float = 1.0, *, remaining: Iterable[tuple[Any, float]] | None = None
    ) -> torch.Tensor:
        """As `CovarianceState.remove`; the gain as a DTensor (d, u), Shard(0).

        Raises:
            LeverageError, BreakdownError: as there.
            TypeError, ValueError, RankError: as for `prepare`.
        """
        with self._session("remove"):
            batch: Any = self._begin("remove", K, noise, remaining=remaining is not None)
            return super().remove(batch, float(noise), remaining=remaining)

    def restrict(self, Q: Any) -> None:
        """As `CovarianceState.restrict`.

        Args:
            Q: (d, q), orthonormal columns: a tensor that every rank has, or a DTensor over the mesh, Shard(0).
        """
        with self._session("restrict"):
            with self.ranks.confirmed("restrict"):
                shaped_basis("restrict", Q, self.d)
                rows = restrictions.own_rows("restrict", Q, self.ranks)
            batch = self._begin("restrict", Q.mT)
            Qt = batch.local.to(torch.float64)
            product = self.ranks.ordered_sum(Qt @ Qt.mT)
            off = float((product - torch.eye(batch.u, dtype=product.dtype, device=product.device)).abs().max())
            if not off <= 1e-4:
                raise known_to_all(
                    ValueError(f"restrict: the columns of Q must be orthonormal, got Q'Q - I of {off:.2e}")
                )
            held = restrictions.joined(self._restriction, rows, self.d, self.ranks)
            with self._unmoved_by_errors():
                form: Any = self._choose(batch, 0.0)
                singular = self._counters.singular_writes > 0
                self._form, change = holds.restricted("restrict", form, self._factor, rows, self._probes.z, singular)
            if change is not None:
                form.change_(change, -1.0)
            self._restriction = held
            self._restricted()

    def refactor(self, written: Iterable[tuple[Any, float]]) -> None:
        """Rebuild the state by replaying kept batches on the prior in float64; nothing d x d is formed or sent.

        Restrictions stay in force: every rank keeps its rows of their directions. Hard writes are lifted.

        Args:
            written: pairs (K, noise), noise > 0, of all batches that the state shall hold, the same on all ranks. An
                automatic form is chosen for the largest of the keys, so that it has to see all batches first.
        """
        with self._session("refactor"):
            with self.ranks.confirmed("refactor"):
                restriction.require_directions(self._counters, self._restriction)
            found = self._replayed(written, None)
            self._form, self._reason, self._kept = found.form, found.reason, ""
            self._counters, self._probes, self._stale = found.counters, found.probes, found.stale
            self._watch.repaired()
            self._writes += 1

    def product(self, x: Any) -> DTensor:
        """C x for a few columns, worked out in float64: what stands in for a dense covariance.

        Args:
            x: (d, p), a tensor that every rank has, or a DTensor over the mesh, Shard(0) or Replicate.

        Returns:
            (d, p) float64, Shard(0).
        """
        with self._session("product"):
            with self.ranks.confirmed("product") as numbers:
                turned = x.mT if isinstance(x, torch.Tensor) and x.dim() == 2 else x
                keys = batch_keys("product", turned, self.d, torch.float64, self.ranks)
                numbers.update(self._header(x, keys))
            return self.ranks.dtensor(applied(self._form, self._factor, keys.local.mT.contiguous()), self.d)

    def covariance(self) -> DTensor:
        """C (d, d) in the dtype of the state, as a DTensor, Shard(0); a copy.

        Of the plain form, and of a ridge in the whitened form, every rank has its rows and nothing is sent. Otherwise
        C is put together from its products with unit vectors, a few columns at a time: as much is sent as for some
        5 d / u batches. It is meant for checks; `product` gives C x.
        """
        with self._session("covariance"):
            with self.ranks.confirmed("covariance") as numbers:
                numbers.update(steps=self._writes)
            form = self._form
            if isinstance(form, PlainRows):
                rows = form.C.clone()
            elif isinstance(form, WhitenedRows) and self._factor.root is None:
                rows = form.matrix * self._factor.scale**2  # type: ignore[operator]
            else:
                rows = dense_rows(form, self._factor, _COLUMNS)
            return self.ranks.dtensor(rows.to(self.dtype), self.d)

    def precision(self) -> NoReturn:
        """Not to be had without the whole matrix on every rank.

        Raises:
            RuntimeError: always, with what to do instead.
        """
        raise RuntimeError(
            "precision: a sharded state has no S: it would take a d x d inversion. Add the batches up, "
            "prior.information() + sum K'K / noise, or invert covariance().full_tensor() on a machine that holds it"
        )

    def health(self, *, thorough: bool = False) -> Health:
        """As `CovarianceState.health`, from products of rows with four vectors; the same on all ranks.

        Raises:
            ValueError: `thorough`, which takes an eigendecomposition of all of C.
        """
        with self._session("health"):
            with self.ranks.confirmed("health") as numbers:
                if thorough:
                    raise ValueError(
                        "health: thorough=True takes C apart as one dense matrix, which no rank has: load state_dict() "
                        "gathered into a CovarianceState on a machine that holds it, or read `drift`"
                    )
                numbers.update(steps=self._writes)
            self._settle()
            found = super().health()
        status = found.status if not (self._kept and found.ok) else "warning"
        return replace(found, status=status, messages=(*found.messages, *filter(None, [self._kept])))

    def look(self) -> None:
        """As `CovarianceState.look`."""
        with self._session("look"):
            with self.ranks.confirmed("look") as numbers:
                numbers.update(steps=self._writes)
            self._settle()
            self._watch.look(self)

    def state_dict(self) -> dict[str, object]:
        """As that of `CovarianceState`, with DTensors, Shard(0), in the place of matrices; all ranks call it."""
        with self._session("state_dict"):
            with self.ranks.confirmed("state_dict") as numbers:
                numbers.update(steps=self._writes)
            self._settle()
            saved = super().state_dict()
            if self._restriction is not None:
                saved["restriction"] = self.ranks.dtensor(self._restriction.clone(), self.d)
            return saved

    def load_state_dict(self, saved: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave: DTensors over the mesh of these ranks, or whole tensors of a single state.

        Raises:
            TypeError, ValueError: it does not fit here, or differs between ranks; RankError: it does not fit elsewhere.
        """
        twin = self.clone()
        with self._session("load_state_dict"):
            with self.ranks.confirmed("load_state_dict") as numbers:
                with as_saved():
                    super(ShardedCovarianceState, twin).load_state_dict({**saved, "restriction": None})
                    twin._restriction = restrictions.restored(saved, self.d, self.ranks)
                    form, tensors = twin._form, saved["tensors"]
                    twin._form = holds.restored(form, self._factor, tensors)  # type: ignore[arg-type]
                old = twin._form is form and form is not None and twin._restriction is not None
                numbers["a digest of what is loaded"] = digest_of_saved(saved)
            if old:
                rows: Any = twin._restriction
                twin._form = holds.holding("load_state_dict", form, self._factor, rows, twin._probes.z)
            twin._kept = ""
            watch, writes = self._watch, self._writes + 1
            self.__dict__.update(twin.__dict__)
            self._watch, self._writes = watch, writes
            watch.resume(self._counters)

    def clone(self) -> ShardedCovarianceState:
        """An independent copy without a history; nothing is sent."""
        twin = super().clone()
        assert isinstance(twin, ShardedCovarianceState)
        return twin

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> NoReturn:
        """Raises:
        RuntimeError: always: a sharded state lives on the devices of its ranks, in the dtype it was made with.
        """
        raise RuntimeError("to: make another ShardedCovarianceState and refactor(batches) it")

    def convert(self, form: str) -> NoReturn:
        """Raises:
        RuntimeError: always: it would take C as one dense matrix.
        """
        raise RuntimeError(
            f"convert: make ShardedCovarianceState(prior, ranks, form={form!r}) and refactor(batches) it"
        )

    def take_covariance(self, C: torch.Tensor, largest_key: float) -> NoReturn:
        """Raises:
        RuntimeError: always, as for `convert`.
        """
        raise RuntimeError("take_covariance: a sharded state takes batches, not a dense covariance: refactor(batches)")

    @contextlib.contextmanager
    def _session(self, op: str) -> Iterator[None]:
        """One call: what goes wrong here is told to the others unless they find it by themselves."""
        with self.ranks.guarded(op), normal_mode():
            try:
                yield
            except BreakdownError as error:  # from the same bits on every rank
                raise known_to_all(error) from None

    def _begin(self, op: str, K: Any, noise: float = 1.0, forget: float = 1.0, *, remaining: bool = False) -> Batch:
        """Check a batch on all ranks and make the sums that everything else needs."""
        with self.ranks.confirmed(op) as numbers:
            noise = removal.checked_noise(noise) if op == "remove" else _checks.noise(op, noise)
            forget = _checks.forget(op, forget)
            keys = batch_keys(op, K, self.d, self.dtype, self.ranks)
            numbers.update(self._header(K, keys), noise=noise, forget=forget)
            numbers["whether remaining is given"] = remaining
        self._settle()
        if op in ("update", "gain"):
            self._watch.look(self)
            self._settle()
            if isinstance(self._form, holds.HeldRows):
                self._form.settle()
        return Batch(keys, self.ranks, self.d, self._probes.z)

    def _keys(self, op: str, K: Any) -> Any:
        return K  # a Batch, checked when it was made

    def _products(self, form: Any, batch: Any, weight: float) -> Products:
        """Products of the form with a batch of this noise, forgetting included; in float64 where it needs care."""
        K = form.coordinates(batch, form.dtype)
        products: Products = form.products(K)
        self._inner, self._scale = form.largest(batch, K), 0.0
        if not bool(torch.isfinite(products.G).all()):
            return products
        if batches.needs_care(products, weight):
            if form.dtype != torch.float64:
                products = form.products(form.coordinates(batch, torch.float64))
            products = replace(products, stack=batches.stacked(products, weight), times=None)
        if self._counters.singular_writes and not batches.regular(products, weight, torch.finfo(form.dtype).eps):
            known: Any = self._known(batch)
            self._scale = float(known.amax())
        return products

    def _solved(self, op: str, form: Any, products: Products, noise: float) -> BatchFactor:
        if not bool(torch.isfinite(products.G).all()):
            raise ValueError(f"{op}: K C K' overflows {self.dtype}: the keys are too large")
        return batches.factor(products, noise, torch.finfo(form.dtype).eps, self._scale)

    def _known(self, batch: Any) -> torch.Tensor | None:
        """The diagonal (u,) of K C_0 K', float64, where C is singular by design: what its rounding is compared with."""
        if not self._counters.singular_writes:
            return None
        return self._factor.inward(batch.local.to(torch.float64).mT.contiguous()).square().sum(dim=0)

    def _removal(self, K: Any, noise: float) -> tuple[Any, torch.Tensor, Change, float]:
        form: Any = self._choose(K, noise)
        products = form.products(form.coordinates(K, torch.float64))
        known = self._known(K)
        with self.ranks.confirmed("remove") as numbers:
            if known is not None:
                removal.refuse_forgone(form, products.G, known)
            reach = math.sqrt(self._factor.largest * K.largest / noise)
            eps, working = batches.epsilons(form.dtype, self.dtype)
            gain, change, leverage = batches.removal(products, noise, eps, working, reach)
            rows = form.back(gain).to(self.dtype)
            numbers[_SYSTEM] = digest(products.G)
        return form, self.ranks.dtensor(rows.contiguous(), self.d), change, leverage

    def _gain_of_removed(self, K: Any, noise: float) -> torch.Tensor:
        form: Any = self._choose(K, noise)
        Y = form.products(form.coordinates(K, torch.float64)).Y
        return self.ranks.dtensor(form.back(Y / noise).to(self.dtype).contiguous(), self.d)

    def _hold(self, prepared: Prepared) -> None:
        assert isinstance(prepared, holds.HardWrite)
        form = self._form
        if form is prepared.before:  # not where a batch that was prepared since has changed what is held
            self._form = prepared.held
        self._count_unheld(form, prepared.factored.root)

    def _within_prior(self, form: Any) -> Any:
        return holds.within_prior("update", form, self._factor)

    def _change(self, form: Any, factored: BatchFactor) -> None:
        if factored.rank == 0:
            return  # as for a single state
        form.change_(factored.change, -1.0)
        self._counters.careful_steps += factored.change.dtype != form.dtype

    def _moved(self, form: Any, decided: choice.Choice) -> Any:
        """The decided form by replaying `history`; None without one, or where batches cannot tell all of the state."""
        history, counters = self._watch.history, self._counters
        known = 0 if self._restriction is None else counters.restrictions
        if history is None or counters.forgot or counters.singular_writes > known:
            why = (
                "there is no history" if history is None else "its batches do not tell what was forgotten or forbidden"
            )
            self._kept = (
                f"a safer form is called for ({decided.reason}), and the state stays {form.name}: a sharded state "
                f"moves by replaying history=..., and {why}"
            )
            return None
        moved = self._replayed(self._given_history(), decided).form
        self._kept = ""
        return moved

    def _start(self, name: str, storage: torch.dtype) -> Any:
        return FORM_CLASSES[name].start(self._factor, storage)

    def _factor_and_probes(self, prior: Prior) -> tuple[Any, Any]:
        factor = sharded_factor(prior, self.ranks, "ShardedCovarianceState", plain=self._keep_rows)
        return factor, RowProbes.start(factor)

    def _restored(self, name: str, tensors: Mapping[str, object], storage: torch.dtype) -> Any:
        return FORM_CLASSES[name].restore(tensors, self._factor, storage)

    def _saved_probes(self) -> dict[str, torch.Tensor]:
        probes = self._probes
        return {n: self.ranks.dtensor(getattr(probes, n).clone(), self.d) for n in ("z", "image")}

    def _restored_probes(self, saved: Mapping[str, object]) -> Any:
        shape = (self.d, self._probes.z.shape[1])
        return RowProbes(*(saved_rows(saved, name, shape, torch.float64, self.ranks) for name in ("z", "image")))


_SYSTEM = "the digest of the u x u system (machines of two kinds, or two versions of a library, may compute other bits)"
