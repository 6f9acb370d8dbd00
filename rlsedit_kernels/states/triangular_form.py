"""The triangular form: R upper triangular with R'R = S on the space of edits, changed by orthogonal transforms."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from rlsedit_kernels import ops
from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states import triangular
from rlsedit_kernels.states.keys import Keys
from rlsedit_kernels.states.pivots import Pivoted
from rlsedit_kernels.states.reading import squared_norm
from rlsedit_kernels.states.saving import saved_figures, saved_tensor


def over_root(A: torch.Tensor, noise: float) -> torch.Tensor:
    """A / sqrt(noise), also for a noise whose root underflows the dtype of A, or overflows it."""
    shift, limits = math.sqrt(noise), torch.finfo(A.dtype)
    if limits.tiny <= shift <= limits.max:
        return A / shift
    return (A.to(torch.float64) / shift).to(A.dtype)


class TriangularForm(Pivoted):
    """R (r, r) in an orthonormal basis (d, r) of the space of edits; no basis where that is the whole space."""

    name = "square_root"
    maps = False
    """Whether `apply` speaks whitened coordinates."""

    def __init__(self, R: torch.Tensor, basis: torch.Tensor | None, regular: bool) -> None:
        self.R = R
        self.basis = basis
        self.trace = squared_norm(R)
        self._regular = regular

    @classmethod
    def start(cls, factor: PriorFactor, dtype: torch.dtype, device: torch.device) -> TriangularForm:
        """R_0 from the float64 factor of the prior, rounded once."""
        R, basis = triangular.start(factor, device)
        return cls(R.to(dtype), None if basis is None else basis.to(dtype), True)

    @classmethod
    def nothing(cls, d: int, dtype: torch.dtype, device: torch.device) -> TriangularForm:
        """R = 0."""
        return cls(torch.zeros(d, d, dtype=dtype, device=device), None, False)

    def replaced(self, R: torch.Tensor, trace: float) -> TriangularForm:
        """The form with another factor."""
        twin = TriangularForm.__new__(TriangularForm)
        twin.R, twin.basis, twin.trace, twin._regular = R, self.basis, trace, self._regular
        return twin

    def clone(self) -> TriangularForm:
        """An independent copy."""
        return self.replaced(self.R.clone(), self.trace)

    def to(self, device: torch.device, dtype: torch.dtype) -> TriangularForm:
        """A copy elsewhere."""
        basis = None if self.basis is None else self.basis.to(device=device, dtype=dtype)
        return TriangularForm(self.R.to(device=device, dtype=dtype, copy=True), basis, self._regular)

    @property
    def dtype(self) -> torch.dtype:
        return self.R.dtype

    @property
    def rank(self) -> int:
        """r."""
        return self.R.shape[0]

    @property
    def pivots(self) -> torch.Tensor:
        """The diagonal of R (r)."""
        return self.R.diagonal()

    def coordinates(self, K: torch.Tensor) -> torch.Tensor:
        """Keys (u, r) in the basis; K itself where there is none."""
        return K if self.basis is None else ops.key_products(self.basis, K)

    def rows(self, op: str, K: Keys, inner: torch.Tensor, noise: float, forget: float) -> tuple[torch.Tensor, float]:
        """What a batch appends, (u, r) = K / sqrt(noise) in the basis, and |R|^2 with it; `inner` is `coordinates`.

        Raises:
            ValueError: R could overflow on the way.
        """
        rows = over_root(inner, noise)
        squared = K.squared / noise if self.basis is None else squared_norm(rows)
        return rows, self.room_for(op, squared, forget)

    def back(self, gain: torch.Tensor) -> torch.Tensor:
        """Columns (d, p) of columns (r, p) in the basis."""
        return gain if self.basis is None else ops.key_products(self.basis.mT, gain.mT).mT

    def append_(self, rows: torch.Tensor, forget: float, trace: float) -> None:
        """R'R <- forget R'R + rows'rows in place; `trace` is what came with the rows."""
        if forget != 1.0:
            self.R.mul_(math.sqrt(forget))
        ops.qr_append_(self.R, rows)
        self.trace = trace

    def append_with_(
        self, rows: torch.Tensor, B: torch.Tensor, targets: torch.Tensor, forget: float, trace: float
    ) -> None:
        """The same with a right-hand side B (r, v)."""
        if forget != 1.0:
            self.R.mul_(math.sqrt(forget))
            B.mul_(math.sqrt(forget))
        ops.qr_append_rhs_(self.R, B, rows, targets)
        self.trace = trace

    def appended(self, rows: torch.Tensor, forget: float, trace: float) -> TriangularForm:
        """A copy that holds the rows as well."""
        R = self.R.clone() if forget == 1.0 else self.R * math.sqrt(forget)
        ops.qr_append_(R, rows)
        return self.replaced(R, trace)

    def half(self, keys: torch.Tensor) -> torch.Tensor:
        """H (r, u) = R^-T K' for keys in the basis: K C K' = H'H, and K W = H'B for W = R^-1 B."""
        self.require_regular()
        return torch.linalg.solve_triangular(self.R.mT, keys.mT, upper=False)

    def gain_before(self, H: torch.Tensor, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Gain (d, u) = R^-1 H (noise I + H'H)^-1 of keys that R does not hold yet, and the factor of that system.

        Of the two ways to a gain this is the accurate one. With the keys appended it is R_new^-1 R_new^-T K' / noise,
        where R_new knows the keys so well that the product is far smaller than its factors: wrong by more than itself
        at rho 0.6, where this one still has three digits.
        """
        L = triangular.system(H, noise)
        weighted = torch.cholesky_solve(H.to(torch.float64).mT, L).mT
        return self.back(self._solve(weighted.to(self.dtype))), L

    def gain_after(self, keys: torch.Tensor) -> torch.Tensor:
        """S^-1 K' (d, u): the gain, for noise 1, of keys that R holds."""
        self.require_regular()
        return self.back(ops.qr_gain(self.R, keys))

    def solve(self, B: torch.Tensor) -> torch.Tensor:
        """R^-1 B (d, v)."""
        self.require_regular()
        return self.back(self._solve(B))

    def _solve(self, B: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self.R, B, upper=True)

    def removed(
        self, rows: torch.Tensor, B: torch.Tensor | None, targets: torch.Tensor | None
    ) -> tuple[TriangularForm, torch.Tensor | None, torch.Tensor, float]:
        """The form, and B, without these rows (float64) and targets.

        Returns:
            the form, B (r, v) or None, the gain F (I - K F)^-1 (d, u) for the rows K, F = S^-1 K', and the leverage.

        Raises:
            LeverageError: the rows cannot be taken out in this precision.
        """
        self.require_regular()
        X = triangular.solve_rows(self.R, rows)
        A, leverage = triangular.leverage(X, torch.finfo(self.dtype).eps)
        F = triangular.solve_columns(self.R, X.mT)
        gain = torch.cholesky_solve(F.mT, torch.linalg.cholesky(A)).mT
        R = self.R.clone()
        wide = None if B is None else B.to(torch.float64, copy=True)
        triangular.remove_rows_(R, X, A, wide)
        if B is not None and wide is not None and targets is not None:
            # Taken out so far are the rows as the state predicts them, K W; what they differed by is left.
            error = targets.to(torch.float64) - X @ B.to(torch.float64)
            wide.addmm_(triangular.solve_rows(R, rows).mT, error, alpha=-1.0)
            wide = wide.to(self.dtype)
        return self.replaced(R, squared_norm(R)), wide, self.back(gain.to(self.dtype)), leverage

    def restricted(self, Q: torch.Tensor) -> TriangularForm:
        """The form on what is orthogonal to Q (d, q), float64: the factor of N'S N for an orthonormal basis N of it."""
        self.require_regular()
        basis = None if self.basis is None else self.basis.to(torch.float64)
        # what was forbidden before lies outside of the basis to its rounding
        tolerance = 1e-10 if basis is None else 100.0 * torch.finfo(self.dtype).eps
        N = triangular.complement(Q if basis is None else basis.mT @ Q, tolerance)
        if N.shape[1] == 0:
            raise ValueError("restrict: Q spans the whole space of edits: nothing could be written any more")
        R = triangular.factor_of(self.R.to(torch.float64) @ N).to(self.dtype)
        return TriangularForm(R, (N if basis is None else basis @ N).to(self.dtype), True)

    def inverse64(self) -> torch.Tensor:
        """A root (d, r) of C = S^-1 in float64: the inverse of R, in the coordinates of the keys."""
        self.require_regular()
        identity = torch.eye(self.rank, dtype=torch.float64, device=self.R.device)
        half = torch.linalg.solve_triangular(self.R.to(torch.float64), identity, upper=True)
        return half if self.basis is None else self.basis.to(torch.float64) @ half

    def covariance64(self) -> torch.Tensor:
        """C (d, d) float64."""
        half = self.inverse64()
        C = half @ half.mT
        return (C + C.mT) * 0.5

    def precision64(self) -> torch.Tensor:
        """S (d, d) float64, the pseudo-inverse of C."""
        R = self.R.to(torch.float64)
        if self.basis is not None:
            R = R @ self.basis.to(torch.float64).mT
        S = R.mT @ R
        return (S + S.mT) * 0.5

    def apply(self, y: torch.Tensor) -> torch.Tensor:
        """C y for float64 columns y (d, p), in float64 arithmetic."""
        basis = None if self.basis is None else self.basis.to(torch.float64)
        inner = y if basis is None else basis.mT @ y
        solved = triangular.solve_columns(self.R, triangular.solve_rows(self.R, inner.mT).mT)
        return solved if basis is None else basis @ solved

    def saved(self) -> dict[str, object]:
        """What `restore` needs."""
        basis = None if self.basis is None else self.basis.clone()
        return {"R": self.R.clone(), "basis": basis, "trace": self.trace, "regular": self._regular}

    @classmethod
    def restore(cls, saved: Mapping[str, object], d: int, dtype: torch.dtype, device: torch.device) -> TriangularForm:
        """The form that `saved` was taken from; a restriction that a state over ranks kept beside R is worked in."""
        R = saved_tensor(saved, "R", (None, None), dtype, device)
        basis = None
        if saved.get("basis") is not None:
            basis = saved_tensor(saved, "basis", (d, R.shape[0]), dtype, device)
        if R.shape[0] != R.shape[1] or (basis is None and R.shape[0] != d):
            raise ValueError(f"load_state_dict: R must be ({d}, {d}), got {tuple(R.shape)}")
        trace, regular = saved_figures(saved)
        form = cls(R, basis, regular)
        form.trace = trace
        if saved.get("held") is None:
            return form
        held = saved_tensor(saved, "held", (R.shape[0], None), torch.float64, device)
        return form.restricted(held if basis is None else basis.to(torch.float64) @ held)
