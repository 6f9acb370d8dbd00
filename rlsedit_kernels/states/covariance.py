"""CovarianceState: C = S^-1 of a growing least-squares problem, at a cost that depends on the new batch only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from rlsedit_kernels.errors import BreakdownError
from rlsedit_kernels.ops import _checks
from rlsedit_kernels.priors import Prior, PriorFactor
from rlsedit_kernels.states import batch as batches
from rlsedit_kernels.states import choice, held, rebuilding, removal, report, restriction, saving, scaled
from rlsedit_kernels.states.batch import BatchFactor
from rlsedit_kernels.states.counters import Counters
from rlsedit_kernels.states.forgetting import Bound
from rlsedit_kernels.states.forms import FORM_CLASSES, FORMS, Form
from rlsedit_kernels.states.guard import History, Watch
from rlsedit_kernels.states.health import Health, Probes
from rlsedit_kernels.states.keys import Keys, KeysLike, checked_basis, checked_keys, located, reach
from rlsedit_kernels.states.modes import normal_mode
from rlsedit_kernels.states.moving import Moving
from rlsedit_kernels.states.prepared import Prepared, require_current
from rlsedit_kernels.states.products import Change
from rlsedit_kernels.states.reading import scalars
from rlsedit_kernels.states.state import checked_dtype, checked_start


class CovarianceState(Moving):
    """The covariance C_t = (S_0 + sum_s K_s'K_s / noise_s)^-1 of a stream of batches.

    With Y = C K', G = K Y and nu the noise of a batch (docs/mathematics.md):
    gain g = Y (nu I + G)^-1, commit C <- C - g Y'. Keys are rows, the weight is in row form:
    W <- W + g (V - K W).

    Args:
        prior: what is known before the first batch.
        form: "plain" (C itself), "whitened" (C = T C~ T' with the prior's root), "inverse_root" (Potter's
            form, C = A A': at twice the work of the plain form the only one that survives a weak prior in
            float32), or "auto": the cheapest form that is safe for the prior and the keys seen. It may move
            to a safer one while the stream runs, and keeps its state in float64 where nothing in float32
            would hold (`states/choice.py`); `health()` says what was taken and why.
        dtype: torch.float32 or torch.float64, of keys and gains, and of the covariance unless "auto" finds
            float32 too narrow for it.
        device: where the state lives; None for the CPU. The prior's arrays may lie elsewhere, as when they come from a
            file: it is factored where they lie, and the state takes what it needs over once, rounded to `dtype`. The
            float64 factor stays there: checks send a few vectors to it.
        guard: "auto" checks the state as the stream goes on (`states/guard.py`): one that drifts is rebuilt from
            `history`, or moves to a safer form where the form is automatic; one that is broken and cannot be repaired
            refuses further batches. "off" leaves it to the caller to ask `health()`.
        history: gives pairs (K, noise) of all batches the state holds; called only when it must be rebuilt.

    Raises:
        TypeError, ValueError: wrong arguments, or a prior that is not positive definite.

    Numerics: the prior is factored in float64 whatever `dtype` is. Every method checks all that could fail
    before it writes; after an exception the state is what it was before the call.
    """

    @normal_mode()
    def __init__(
        self,
        prior: Prior,
        *,
        form: str = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        guard: str = "auto",
        history: History | None = None,
    ) -> None:
        self.prior = checked_start("CovarianceState", prior, dtype)
        if form not in FORMS:
            raise ValueError(f"CovarianceState: form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
        self.dtype = dtype
        self.device = located(device)
        self._requested = form
        self._counters = Counters()
        self._writes, self._own = 0, object()
        self._stale: int | None = None  # seed of the probes that a hard write has put off
        self._watch = Watch(guard, history)
        self._bound = Bound()
        self._factor, self._probes = self._factor_and_probes(prior)
        self._form: Form | None = None
        self._reason = "undecided until the first keys are seen"
        if form != "auto":
            self._form = self._start(form, dtype)
            self._reason = "asked for"

    @property
    def form(self) -> str:
        """The form in use; "undecided" before the first keys of an automatic choice."""
        return "undecided" if self._form is None else self._form.name

    def gain(self, K: torch.Tensor, noise: float = 1.0) -> torch.Tensor:
        """Gain of a batch, nothing changed: g = Y (noise I + G)^-1.

        Args:
            K: (u, d) keys, u >= 1, any floating dtype (cast to that of the state).
            noise: >= 0, the reciprocal of the weight of the batch; 0 is a hard write.

        Returns:
            (d, u). For noise > 0 it equals C_new K' / noise, C_new the covariance after a commit. For
            noise = 0 and dependent keys the system is solved on the range of G. There keys count as dependent that are
            nearer than sqrt(8 max(u, 8) eps) of their size (3e-3 in float32): rounding of C leaves no more.

        Raises:
            TypeError, ValueError: K or noise do not fit; NaN or Inf in K.
            BreakdownError: the covariance has lost positive semi-definiteness.
        """
        return self.prepare(K, noise).gain

    def commit(self, K: torch.Tensor, noise: float = 1.0, forget: float = 1.0) -> None:
        """Write a batch into the covariance: C <- (C - Y (forget noise I + G)^-1 Y') / forget.

        Args:
            K, noise: as for `gain`. With noise = 0 the batch is preserved by all later ones, to the rounding of one
                batch as by `restrict`, or while rho is small by C alone where hard writes span more than 1/8 of the
                space (`states/held.py`).
            forget: forgetting factor in (0, 1]; the prior is forgotten too.

        Raises:
            As `gain`; nothing is written then.
        """
        self.update(K, noise, forget)

    def update(self, K: torch.Tensor, noise: float = 1.0, forget: float = 1.0) -> torch.Tensor:
        """`gain` and `commit` at once, from one pair of products.

        Returns:
            The gain (d, u) of the batch, forgetting included: Y (forget noise I + G)^-1.
        """
        self.write(prepared := self.prepare(K, noise, forget))
        return prepared.gain

    def prepare(self, K: KeysLike, noise: float = 1.0, forget: float = 1.0) -> Prepared:
        """First half of `update`: all that can fail, nothing written. What `write` takes has `gain` (d, u).

        A caller with several states prepares all of them, changes its weights, and then writes all of them.
        """
        noise, forget, keys = _checks.noise("update", noise), _checks.forget("update", forget), self._keys("update", K)
        self.look()
        with normal_mode(), self._unmoved_by_errors():
            prepared = self._prepared("update", keys, noise, forget)
            if forget != 1.0:
                self._bound.check_covariance("update", self._form, self._factor, self.dtype, forget)
            if not math.isfinite(prepared.size) and not bool(torch.isfinite(prepared.gain).all()):
                raise ValueError(f"update: the gain overflows {self.dtype}: keys of size {reach(keys)}")
            return prepared

    def write(self, prepared: Prepared) -> None:
        """Second half of `update`.

        Raises:
            ValueError: the state has changed since `prepare`.
        """
        require_current(prepared, self)
        assert self._form is not None
        with normal_mode():
            if prepared.noise > 0.0:
                self._settle()
            self._change(self._form, prepared.factored)
            if prepared.noise == 0.0:
                self._hold(prepared)
            if prepared.forget != 1.0:
                self._form.scale_(1.0 / prepared.forget)
                self._bound.changed(self._form, 1.0 / prepared.forget)
            self._record(prepared)

    def remove(
        self,
        K: KeysLike,
        noise: float = 1.0,
        *,
        remaining: Iterable[tuple[torch.Tensor, float]] | None = None,
    ) -> torch.Tensor:
        """Take back a batch that was written with this noise (docs/mathematics.md, fact 5).

        With F = C K' and A = noise I - K F: C <- C + F A^-1 F'. The weight of the stream without the batch
        is W - g (V - K W) with the returned g = F A^-1.

        Args:
            K: (u, d), the keys of the batch.
            noise: > 0, the noise it was written with, over the product of the forgetting factors since then.
            remaining: pairs (K, noise) of all batches that stay. Where they are given, a batch that cannot be taken
                out by a downdate is left out by rebuilding the covariance from them (`refactor`).

        Returns:
            (d, u).

        Raises:
            LeverageError: the state knows these directions by this batch alone, or they are those of a hard write or a
                restriction, and `remaining` was not given; or the state holds no batch any more.
            BreakdownError: the guard found the state broken, and `remaining` was not given.
            TypeError, ValueError: K or noise do not fit; a hard write (noise 0) cannot be taken back.
        """
        noise, keys = removal.checked_noise(noise), self._keys("remove", K)
        removal.refuse_unwritten(self._counters)
        try:
            return self.take_back(keys, noise)
        except BreakdownError:
            if remaining is None:
                raise
        self.refactor(remaining)
        with normal_mode():
            return self._gain_of_removed(keys, noise)

    @normal_mode()
    def take_back(self, keys: Keys, noise: float, check: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
        """`remove` of what has been checked. `check` gets the gain, and may raise, before anything is written."""
        removal.refuse_unwritten(self._counters)
        with self._unmoved_by_errors():
            form, gain, change, leverage = self._removal(keys, noise)
            self._watch.refuse(self)
            if check is not None:
                check(gain)
        self._settle()
        form.change64_(change, 1.0)
        self._bound.forget()
        self._probes.remove(keys, noise)
        self._count_removed(leverage)
        return gain

    @normal_mode()
    def restrict(self, Q: torch.Tensor) -> None:
        """Forbid all later edits in the directions Q: C <- C - C Q (Q'C Q)^-1 Q'C (docs/mathematics.md, fact 9).

        The directions stay forbidden to the rounding of one batch (`states/held.py`): for 8 d q u flops a batch more
        and 20 d q bytes, but not where the form is "inverse_root", whose rounding there is that of A, squared.

        Args:
            Q: (d, q), orthonormal columns.

        Raises:
            TypeError, ValueError: Q does not fit or its columns are not orthonormal to 1e-4.
        """
        wide = checked_basis("restrict", Q, self.d)
        keys = self._keys("restrict", Q.mT)
        with self._unmoved_by_errors():
            self._form = restriction.applied(self._choose(keys, 0.0), self._factor, self._counters, wide)
        self._restriction = restriction.joined(self._restriction, wide)
        self._restricted()

    @normal_mode()
    def refactor(self, written: Iterable[tuple[torch.Tensor, float]]) -> None:
        """Rebuild the covariance from the prior and kept batches, in float64: the cure for every breakdown.

        Restrictions stay in force (the state keeps their directions, d x q numbers), hard writes are lifted.

        Args:
            written: pairs (K, noise), noise > 0, of all batches that the state shall hold.
        """
        restriction.require_directions(self._counters, self._restriction)
        C, fresh, probes = rebuilding.rebuilt(self, written)
        self.take_covariance(C, fresh.largest_weighted)
        assert self._form is not None
        fresh.largest_inner = fresh.largest_inner if self._form.maps else fresh.largest_key
        stale = None if self._restriction is None else 20 + fresh.singular_writes
        self._counters, self._probes, self._stale = fresh, probes, stale

    def covariance(self) -> torch.Tensor:
        """C (d, d), exactly symmetric, in the dtype of the state; a copy."""
        with normal_mode():
            if self._form is None:
                return self._factor.covariance(self.device).to(self.dtype)
            return self._form.covariance(self.dtype)

    @normal_mode()
    def precision(self) -> torch.Tensor:
        """S = C^-1 (d, d) float64, by one dense inversion; the pseudo-inverse where C is singular by design."""
        if self._form is None:
            return self._factor.precision(self.device)
        return report.precision(self._form, self._factor, singular=self._counters.singular_writes > 0)

    @normal_mode()
    def health(self, *, thorough: bool = False) -> Health:
        """Form, conditioning and measured drift of the state, and what to do about it.

        Args:
            thorough: also take C apart in float64 (one dense eigendecomposition, about 10 d^3 flops): its smallest
                eigenvalue, condition and asymmetry, and the error of the probes in the S-norm, which is that of W.
                Otherwise one product of C with four vectors. Nothing is changed.
        """
        self._settle()
        return report.health(self, thorough=thorough)

    def state_dict(self) -> dict[str, object]:
        """Tensors and plain values from which `load_state_dict` restores the state to the bit."""
        form = self._form
        return {
            **saving.header(self),
            "requested": self._requested,
            "reason": self._reason,
            "form": None if form is None else form.name,
            "storage": None if form is None else str(form.dtype),
            "tensors": {} if form is None else form.saved(),
            "probes": self._saved_probes(),
        }

    @normal_mode()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, into a state made with the same prior and dtype.

        Raises:
            ValueError: the prior, dtype, version or a tensor does not fit; the state is unchanged.
        """
        with saving.as_saved():
            saving.check_header(self, saved, "requested", "reason", "storage")
            name, form, directions = saved["form"], None, saving.restored_restriction(self, saved)
            if saved["requested"] not in FORMS or (name is not None and name not in FORM_CLASSES):
                raise ValueError(f"load_state_dict: unknown form {name!r} (asked for: {saved['requested']!r})")
            if name is not None:
                form = self._restored(name, saved["tensors"], saving.restored_storage(saved))
                form = held.restored(form, self._factor, saved["tensors"], directions, self.device)
            probes, counters = self._restored_probes(saved["probes"]), Counters.restored(saved["counters"])
            if form is None and counters.steps:
                raise ValueError(f"load_state_dict: a state of {counters.steps} batches must have a form, got {name!r}")
        self._resume(form, probes, counters, directions)
        self._stale, self._requested, self._reason = None, saved["requested"], saved["reason"]

    @normal_mode()
    def take_covariance(self, C: torch.Tensor, largest_key: float) -> None:
        """Become the state that holds C (d, d) float64, in the form asked for; a broken one is sound again."""
        decided = choice.Choice(self._requested, self.dtype, self._reason)
        if self._requested == "auto":
            decided = choice.choose(self._factor, self.dtype, largest_key, dense=True)
        self._form = held.holding(self._from_covariance(decided, C), self._factor, self._restriction)
        self._reason = decided.reason
        self._watch.repaired()
        self._writes += 1

    @normal_mode()
    def clone(self) -> CovarianceState:
        """An independent copy without a history; the prior is shared."""
        twin = self._twin()
        twin._form = None if self._form is None else self._form.clone()
        twin._probes = self._probes.to(self.device) if self._stale is None else self._probes
        return twin

    @normal_mode()
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> CovarianceState:
        """A copy on another device or in another dtype, with the history."""
        if dtype is not None:
            checked_dtype("CovarianceState.to", dtype)
        self._settle()
        twin = self.clone()
        twin.device, twin.dtype = located(device or self.device), dtype or self.dtype
        twin.history = self.history
        twin._probes = self._probes.to(twin.device)
        twin._restriction = None if self._restriction is None else self._restriction.to(twin.device)
        if twin._form is not None:
            kept = self._form.dtype if dtype is None and self._form is not None else twin.dtype
            twin._form.to_(twin.device, kept, self._factor)
        return twin

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.prior!r}, form={self.form!r}, dtype={self.dtype}, "
            f"device={str(self.device)!r}, steps={self.steps})"
        )

    def _factor_and_probes(self, prior: Prior) -> tuple[PriorFactor, Probes]:
        return prior.factor, Probes.start(prior.factor, self.device)

    def _start(self, name: str, storage: torch.dtype) -> Form:
        form = FORM_CLASSES[name].start(self._factor, storage, self.device)
        self._bound.know(form, self._factor.largest)
        return form

    def _from_covariance(self, decided: choice.Choice, C: torch.Tensor) -> Form:
        return FORM_CLASSES[decided.form].from_covariance(C, self._factor, decided.storage, self.device)

    def _restored(self, name: str, tensors: Mapping[str, object], storage: torch.dtype) -> Form:
        return FORM_CLASSES[name].restore(tensors, self._factor, storage, self.device)

    @normal_mode()
    def _saved_probes(self) -> dict[str, torch.Tensor]:
        self._settle()
        return self._probes.saved()

    def _restored_probes(self, saved: Mapping[str, object]) -> Probes:
        return saving.restored_probes(self, saved)

    def _keys(self, op: str, K: object) -> Keys:
        return checked_keys(op, K, self.d, self.dtype, self.device)

    def _prepared(self, op: str, keys: Keys, noise: float, forget: float) -> Prepared:
        """Factor and gain of a batch, in float64 where it needs care; where it does not, the host waits once."""
        form, batch = self._choose(keys, noise), scaled.scaled(keys, forget * noise)
        eps, weight = torch.finfo(form.dtype).eps, batch.noise
        inner = form.coordinates(batch.rows.to(form.dtype))
        products = form.products(inner)
        attempt, gain, asked = None, None, batches.figures(products.G)
        if weight > 0.0:
            attempt = batches.Attempt.of(products, weight)
            gain = batch.gain(form.back(attempt.gain).to(self.dtype))
            asked += [attempt.info, attempt.pivot, torch.linalg.vector_norm(gain)]
        total, largest, *tried = scalars(asked + batches.longest(inner, batch))
        if not math.isfinite(total) and not bool(torch.isfinite(products.G).all()):
            raise ValueError(f"{op}: K C K' overflows {self.dtype}: keys of size {reach(keys)} are too large")
        careful = batches.needs_care(products, weight, largest)
        factored = None
        if attempt is not None and not careful:
            info, pivot, size, *_ = tried
            factored = attempt.found(weight, eps, largest, info, pivot)
        if factored is None or gain is None:
            del attempt, gain  # buffers of the size of a gain
            scale = restriction.scale(form, self._factor, self._counters, batch.rows)
            if careful and form.dtype != torch.float64:
                products = form.products64(form.coordinates64(batch.rows))
            factored = (batches.factor if careful else batches.truncated)(products, weight, eps, scale)
            wide = factored.change.dtype != form.dtype
            gain = batch.gain((form.back64 if wide else form.back)(factored.gain)).to(self.dtype)
            size = float(torch.linalg.vector_norm(gain))
        longest = keys.largest if inner is batch.rows else tried[-1] * tried[-1]
        if batch.scales is not None:
            factored = replace(factored, batch=batch)
        return Prepared(gain, size, factored, longest, keys, noise, forget, self._moment)

    def _removal(self, K: Keys, noise: float) -> tuple[Form, torch.Tensor, Change, float]:
        """The form, the gain (d, u), the change that takes a batch out, and its leverage."""
        form = self._choose(K, noise)
        inner = form.coordinates64(K.rows)
        products = form.products64(inner)
        removal.refuse_forbidden(form, self._factor, self._counters, K.rows, products.G)
        reach = math.sqrt(self._factor.largest * K.largest / noise)
        eps, working = batches.epsilons(form.dtype, self.dtype)
        gain, change, leverage = batches.removal(products, noise, eps, working, reach)
        return form, form.back64(gain).to(self.dtype), change, leverage

    def _gain_of_removed(self, K: Keys, noise: float) -> torch.Tensor:
        """F A^-1 = C_new K' / noise, C_new without the batch."""
        form = self._choose(K, noise)
        return form.back64(form.products64(form.coordinates64(K.rows)).Y / noise).to(self.dtype)

    def _change(self, form: Form, factored: BatchFactor) -> None:
        if factored.rank == 0:
            return  # hard writes and restrictions leave nothing to learn from these keys
        careful = factored.change.dtype != form.dtype
        (form.change64_ if careful else form.change_)(factored.change, -1.0)
        self._counters.careful_steps += careful

    def _record(self, prepared: Prepared) -> None:
        counters, pivot = self._counters, prepared.factored.pivot
        self._count_written(prepared.keys.largest, prepared.noise, prepared.forget)
        counters.largest_inner = max(counters.largest_inner, prepared.inner)
        if pivot is not None:
            counters.smallest_pivot = pivot if counters.smallest_pivot is None else min(counters.smallest_pivot, pivot)
        if prepared.noise > 0.0:
            self._probes.write(prepared.keys, prepared.noise, prepared.forget)
        else:
            self._singular_write()
