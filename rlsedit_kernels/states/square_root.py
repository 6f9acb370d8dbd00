"""SquareRootState: the triangular factor R of the information, R'R = S, kept up to date by streaming QR."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from rlsedit_kernels.errors import BreakdownError
from rlsedit_kernels.ops import _checks
from rlsedit_kernels.priors import Prior, PriorFactor
from rlsedit_kernels.priors.factor import scalar
from rlsedit_kernels.states import removal, report, restriction, saving
from rlsedit_kernels.states.counters import Counters
from rlsedit_kernels.states.forgetting import Bound
from rlsedit_kernels.states.guard import History, Watch
from rlsedit_kernels.states.health import Health, Probes
from rlsedit_kernels.states.keys import (
    Keys,
    KeysLike,
    checked_basis,
    checked_keys,
    finite,
    located,
    pairs,
    reach,
    right_hand_side,
)
from rlsedit_kernels.states.modes import normal_mode, writing
from rlsedit_kernels.states.prepared import PreparedRows, require_current
from rlsedit_kernels.states.state import State, checked_dtype, checked_start
from rlsedit_kernels.states.triangular_form import TriangularForm, over_root


class SquareRootState(State):
    """R upper triangular with R'R = S_t = S_0 + sum_s K_s'K_s / noise_s: streaming QR, the square-root form.

    The rows K / sqrt(noise) of a batch are appended by orthogonal transforms (`ops.qr_append_`), in 2 d^2 u flops.
    Nothing can lose definiteness, and what is rounded is the square root of what the covariance rounds: the form
    that is left where a prior is too weak for every other one in float32. With H = R^-T K' the gain of a batch is
    R^-1 H (noise I + H'H)^-1, from R before the batch. A weight is better taken from a right-hand side that is
    rotated along (`append_with`, `solve`): W = W_0 + R^-1 B does not inherit the rounding errors of earlier weights.

    Args:
        prior: what is known before the first batch; any prior of which a factor exists, and `Prior.ridge(d, 0.0)`:
            nothing. A state that starts from nothing has a gain once d independent keys have arrived.
        dtype: torch.float32 or torch.float64, of keys, gains and R.
        device: where the state lives; None for the CPU. As for `CovarianceState`, the prior may lie elsewhere.
        guard, history: as for `CovarianceState`. There is no safer form to move to: a state that drifts is rebuilt
            from its history, one that is broken refuses.

    Raises:
        TypeError, ValueError: wrong arguments, or a prior that is not positive definite.

    Numerics: the prior is factored in float64 whatever `dtype` is. Every method checks all that could fail before
    it writes; after an exception the state is what it was before the call. Where edits live in a proper subspace (a
    null-space prior, a restriction) R is the factor in an orthonormal basis of it.
    """

    _form: TriangularForm
    _probes: Probes

    @normal_mode()
    def __init__(
        self,
        prior: Prior,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        guard: str = "auto",
        history: History | None = None,
    ) -> None:
        self.prior = checked_start("SquareRootState", prior, dtype)
        self.dtype = dtype
        self.device = located(device)
        self._writes, self._own = 0, object()
        self._watch = Watch(guard, history)
        self._start()

    def _start(self) -> None:
        self._counters, self._bound = Counters(), Bound()
        if self.prior.is_nothing:
            self._factor: PriorFactor = scalar(self.prior.d, 1.0)  # no prior to whiten errors by
            self._form = TriangularForm.nothing(self.prior.d, self.dtype, self.device)
        else:
            self._factor = self.prior.factor
            self._form = TriangularForm.start(self._factor, self.dtype, self.device)
            self._bound.know(self._form, self._factor.largest**-0.5)
        self._probes = Probes.start(self._factor, self.device)
        if self.prior.is_nothing:
            self._probes.image.zero_()

    @property
    def rank(self) -> int:
        """Dimension of the space in which edits live."""
        return self._form.rank

    @property
    def form(self) -> str:
        """The name of the form, "square_root"."""
        return self._form.name

    @property
    def determined(self) -> bool:
        """Whether R is regular; false only for a state that started from nothing and has seen too little."""
        return self._form.regular

    @property
    def factor(self) -> torch.Tensor:
        """R (d, d), or (r, r) in the basis of a proper subspace; a copy."""
        return self._form.R.clone()

    def gain(self, K: torch.Tensor, noise: float = 1.0) -> torch.Tensor:
        """Gain of a batch, nothing changed: S_new^-1 K' / noise = C K' (noise I + K C K')^-1.

        Args:
            K: (u, d) keys, u >= 1, any floating dtype (cast to that of the state).
            noise: > 0, the reciprocal of the weight of the batch.

        Returns:
            (d, u).

        Raises:
            TypeError, ValueError: K or noise do not fit; NaN or Inf in K; noise = 0.
            BreakdownError: the guard has found the state broken.
            UnderdeterminedError: the state started from nothing and this batch does not determine it either.
        """
        return self.prepare(K, noise).gain

    def commit(self, K: torch.Tensor, noise: float = 1.0, forget: float = 1.0) -> None:
        """Append a batch, in place: R'R <- forget R'R + K'K / noise.

        Args:
            K, noise: as for `gain`. A hard write (noise = 0) has no finite factor; see `restrict`.
            forget: forgetting factor in (0, 1]; the prior is forgotten too.

        Raises:
            TypeError, ValueError, BreakdownError: as `gain`; nothing is written then.
        """
        keys, noise, forget = self.checked_batch("commit", K, noise, forget)
        self.look()
        self._bound.check_factor("commit", self._form, forget)
        with normal_mode():
            rows, trace = self._form.rows("commit", keys, self._form.coordinates(keys.rows), noise, forget)
            self._form.append_(rows, forget, trace)
            self._record(keys, noise, forget)

    def append_with(
        self, B: torch.Tensor, K: KeysLike, V: torch.Tensor, noise: float = 1.0, forget: float = 1.0
    ) -> None:
        """`commit` with a right-hand side rotated along, in place: R'B <- forget R'B + K'V / noise.

        Args:
            B: (r, v), dtype and device of the state, r = `rank`; zeros at the start of a stream. Changed.
            K, noise, forget: as for `commit`.
            V: (u, v) targets, less what the weight gave before the stream (V - K W_0).

        Raises:
            TypeError, ValueError: as `commit`, or B or V do not fit; R and B untouched.
            BreakdownError: the guard has found the state broken. It does not rebuild R here, to which B belongs.
        """
        keys, noise, forget = self.checked_batch("append_with", K, noise, forget)
        targets = right_hand_side("append_with", B, V, (self.rank, len(keys)), self.dtype, self.device)
        with normal_mode():
            self._watch.look(self, repair=False)
        self._append_with("append_with", B, keys, finite("append_with", "V", targets), noise, forget)

    def _append_with(self, op: str, B: torch.Tensor, keys: Keys, V: torch.Tensor, noise: float, forget: float) -> None:
        """`append_with` of what has been checked."""
        self._bound.check_factor(op, self._form, forget)
        with normal_mode():
            rows, trace = self._form.rows(op, keys, self._form.coordinates(keys.rows), noise, forget)
            with writing(B):
                self._form.append_with_(rows, B, over_root(V, noise), forget, trace)
            self._record(keys, noise, forget)

    def solve(self, B: torch.Tensor) -> torch.Tensor:
        """R^-1 B (d, v), what the stream adds to the weight: one triangular solve.

        Raises:
            UnderdeterminedError: the state started from nothing and has seen too little.
        """
        with normal_mode():
            return self._form.solve(B)

    def half(self, K: KeysLike) -> torch.Tensor:
        """H (r, u) = R^-T K': K C K' = H'H, and K (W - W_0) = H'B for a right-hand side B carried along."""
        keys = checked_keys("half", K, self.d, self.dtype, self.device)
        with normal_mode():
            return self._form.half(self._form.coordinates(keys.rows))

    def update(self, K: torch.Tensor, noise: float = 1.0, forget: float = 1.0) -> torch.Tensor:
        """`commit` and `gain` at once.

        Returns:
            The gain (d, u) of the batch, forgetting included.
        """
        self.write(prepared := self.prepare(K, noise, forget))
        return prepared.gain

    def prepare(self, K: KeysLike, noise: float = 1.0, forget: float = 1.0) -> PreparedRows:
        """First half of `update`: everything that can fail, nothing written."""
        keys, noise, forget = self.checked_batch("update", K, noise, forget)
        self.look()
        self._bound.check_factor("update", self._form, forget)
        with normal_mode():
            inner = self._form.coordinates(keys.rows)
            rows, trace = self._form.rows("update", keys, inner, noise, forget)
            form, system = None, None
            if self._form.regular:
                gain, system = self._form.gain_before(self._form.half(inner), forget * noise)
            else:
                form = self._form.appended(rows, forget, trace)
                gain = over_root(form.gain_after(rows), noise)
            size = float(torch.linalg.vector_norm(gain))
            if not math.isfinite(size) and not bool(torch.isfinite(gain).all()):
                Bound().require_pivots("update", self._form, forget)
                raise ValueError(f"update: the gain overflows {self.dtype}: keys of size {reach(keys)}")
            return PreparedRows(gain, size, rows, trace, system, form, keys, noise, forget, self._moment)

    @normal_mode()
    def write(self, prepared: PreparedRows) -> None:
        """Second half of `update`.

        Raises:
            ValueError: the state has changed since `prepare`.
        """
        require_current(prepared, self)
        if prepared.form is not None:
            self._form = prepared.form
        else:
            self._form.append_(prepared.rows, prepared.forget, prepared.trace)
        self._record(prepared.keys, prepared.noise, prepared.forget)

    def remove(
        self,
        K: KeysLike,
        noise: float = 1.0,
        *,
        remaining: Iterable[tuple[torch.Tensor, float]] | None = None,
    ) -> torch.Tensor:
        """Take back a batch that was written with this noise: R'R <- R'R - K'K / noise.

        Saunders' downdate in blocks, worked out in float64 and rounded once. The weight of the stream without the
        batch is W - g (V - K W) with the returned g = F (noise I - K F)^-1, F = C K'.

        Args:
            K: (u, d), the keys of the batch.
            noise: > 0, the noise it was written with, over the product of the forgetting factors since then.
            remaining: pairs (K, noise) of all batches that stay. Where they are given, a batch that cannot be taken
                out by a downdate is left out by rebuilding R from them (`refactor`).

        Returns:
            (d, u).

        Raises:
            LeverageError: the state knows these directions by this batch alone, and `remaining` was not given; or the
                state holds no batch any more.
            BreakdownError: the guard found the state broken, and `remaining` was not given.
            UnderdeterminedError: the state started from nothing and has seen too little.
            TypeError, ValueError: K or noise do not fit.
        """
        keys, noise, _ = self.checked_batch("remove", K, noise, 1.0)
        removal.refuse_unwritten(self._counters, self._form)
        try:
            return self.take_back(keys, noise)
        except BreakdownError:
            if remaining is None:
                raise
        self.refactor(remaining)
        with normal_mode():
            # F (noise I - K F)^-1 = C_new K' / noise, C_new without the batch
            return over_root(self._form.gain_after(over_root(self._form.coordinates(keys.rows), noise)), noise)

    @normal_mode()
    def take_back(self, keys: Keys, noise: float, check: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
        """`remove` of what has been checked. `check` gets the gain, and may raise, before anything is written."""
        removal.refuse_unwritten(self._counters, self._form)
        form, _, gain, leverage = self._form.removed(self._wide_rows(keys, noise), None, None)
        self._watch.refuse(self)
        gain = over_root(gain, noise)
        if check is not None:
            check(gain)
        self._form = form
        self._unrecord(keys, noise, leverage)
        return gain

    def remove_with(self, B: torch.Tensor, K: KeysLike, V: torch.Tensor, noise: float = 1.0) -> None:
        """`remove` with the right-hand side of `append_with`, in place: R'B <- R'B - K'V / noise."""
        keys, noise, _ = self.checked_batch("remove", K, noise, 1.0)
        targets = finite(
            "remove", "V", right_hand_side("remove", B, V, (self.rank, len(keys)), self.dtype, self.device)
        )
        self.take_back_with(B, keys, targets, noise)

    @normal_mode()
    def take_back_with(
        self,
        B: torch.Tensor,
        keys: Keys,
        V: torch.Tensor,
        noise: float,
        check: Callable[[TriangularForm, torch.Tensor], None] | None = None,
    ) -> None:
        """`remove_with` of what has been checked. `check` gets what R and B become, before they are written."""
        removal.refuse_unwritten(self._counters, self._form)
        wide = V.to(torch.float64) / math.sqrt(noise)
        form, new_B, _, leverage = self._form.removed(self._wide_rows(keys, noise), B, wide)
        self._watch.refuse(self)
        assert new_B is not None
        if check is not None:
            check(form, new_B)
        with writing(B):
            B.copy_(new_B)
        self._form = form
        self._unrecord(keys, noise, leverage)

    def restrict(self, Q: torch.Tensor) -> None:
        """Forbid all later edits in the directions Q: C <- C - C Q (Q'C Q)^-1 Q'C (docs/mathematics.md, fact 9).

        R becomes the factor of N'S N, N an orthonormal basis of what is orthogonal to Q: one dense QR.

        Args:
            Q: (d, q), orthonormal columns.

        Raises:
            TypeError, ValueError: Q does not fit, its columns are not orthonormal to 1e-4, or it leaves nothing.
        """
        wide = checked_basis("restrict", Q, self.d)
        with normal_mode():
            self._form = self._form.restricted(wide)
            self._restriction = restriction.joined(self._restriction, wide)
            self._writes += 1
            self._counters.restrictions += 1
            self._counters.singular_writes += 1
            self._probes.begin_again(self._form, self._factor, seed=20 + self._counters.singular_writes)

    @normal_mode()
    def refactor(self, written: Iterable[tuple[torch.Tensor, float]]) -> None:
        """Rebuild R from the prior and kept batches, in float64 and rounded once. Restrictions stay in force.

        Args:
            written: pairs (K, noise), noise > 0, of all batches that the state shall hold.
        """
        restriction.require_directions(self._counters, self._restriction)
        fresh = SquareRootState(self.prior, dtype=torch.float64, device=self.device, guard="off")
        for K, noise in pairs("refactor", written):
            fresh.commit(K, noise)
        if self._restriction is not None:
            fresh.restrict(self._restriction)
        self.adopt(fresh)

    @normal_mode()
    def adopt(self, fresh: SquareRootState) -> None:
        """Become what another state of the same prior and device is, rounded to the dtype of this one."""
        self._form = fresh._form.to(self.device, self.dtype)
        self._counters, self._probes = fresh._counters, fresh._probes
        self._watch.repaired()
        self._writes += 1

    def covariance(self) -> torch.Tensor:
        """C = (R'R)^-1 (d, d), exactly symmetric, in the dtype of the state."""
        with normal_mode():
            return self._form.covariance64().to(self.dtype)

    @normal_mode()
    def precision(self) -> torch.Tensor:
        """S = R'R (d, d) float64; the pseudo-inverse of C where edits live in a proper subspace."""
        return self._form.precision64()

    @normal_mode()
    def health(self, *, thorough: bool = False) -> Health:
        """Conditioning and measured drift of the state, and what to do about it.

        Args:
            thorough: as for `CovarianceState.health`; otherwise two triangular solves with four vectors.
        """
        return report.factor_health(self, thorough=thorough)

    def _give_way(self, _why: str) -> bool:
        """There is no safer form."""
        return False

    def _settle(self) -> None:
        """Its probes are never put off."""

    def state_dict(self) -> dict[str, object]:
        """Tensors and plain values from which `load_state_dict` restores the state to the bit."""
        form = self._form
        return {
            **saving.header(self), "form": form.name, "tensors": form.saved(), "probes": self._probes.saved()
        }  # fmt: skip

    @normal_mode()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, into a state made with the same prior and dtype.

        Raises:
            ValueError: the prior, dtype, version or a tensor does not fit; the state is unchanged.
        """
        with saving.as_saved():
            saving.check_header(self, saved)
            if saved["form"] != self.form:
                raise ValueError(f"load_state_dict: form must be {self.form!r}, got {saved['form']!r}")
            form = TriangularForm.restore(saved["tensors"], self.d, self.dtype, self.device)
            probes, counters = saving.restored_probes(self, saved["probes"]), Counters.restored(saved["counters"])
            directions = saving.restored_restriction(self, saved)
        self._resume(form, probes, counters, directions)

    @normal_mode()
    def clone(self) -> SquareRootState:
        """An independent copy without a history; the prior is shared."""
        twin = self._twin()
        twin._form, twin._probes = self._form.clone(), self._probes.to(self.device)
        return twin

    @normal_mode()
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SquareRootState:
        """A copy on another device or in another dtype, with the history."""
        if dtype is not None:
            checked_dtype("SquareRootState.to", dtype)
        twin = self.clone()
        twin.device, twin.dtype = located(device or self.device), dtype or self.dtype
        twin._form, twin._probes = twin._form.to(twin.device, twin.dtype), twin._probes.to(twin.device)
        twin.history = self.history
        twin._restriction = None if self._restriction is None else self._restriction.to(twin.device)
        return twin

    def __repr__(self) -> str:
        return f"SquareRootState({self.prior!r}, dtype={self.dtype}, device={str(self.device)!r}, steps={self.steps})"

    def checked_batch(self, op: str, K: object, noise: float, forget: float) -> tuple[Keys, float, float]:
        """Keys (u, d) in the dtype of the state, noise > 0 and forget; TypeError or ValueError in the name of `op`."""
        noise, forget = _checks.noise(op, noise), _checks.forget(op, forget)
        keys = checked_keys(op, K, self.d, self.dtype, self.device)
        self.refuse_hard_write(op, noise)
        return keys, noise, forget

    @staticmethod
    def refuse_hard_write(op: str, noise: float) -> None:
        """ValueError where noise is 0."""
        if noise == 0.0:
            raise ValueError(
                f"{op}: noise must be > 0 for a triangular factor: a hard write is infinite information. Use "
                "restrict(Q) with an orthonormal basis Q of the keys, or CovarianceState"
            )

    def _wide_rows(self, K: Keys, noise: float) -> torch.Tensor:
        return self._form.coordinates(K.rows).to(torch.float64) / math.sqrt(noise)

    def _record(self, K: Keys, noise: float, forget: float) -> None:
        self._bound.changed(self._form, math.sqrt(forget))
        self._count_written(K.largest, noise, forget)
        self._probes.write(K, noise, forget)

    def _unrecord(self, K: Keys, noise: float, leverage: float) -> None:
        self._count_removed(leverage)
        self._probes.remove(K, noise)
