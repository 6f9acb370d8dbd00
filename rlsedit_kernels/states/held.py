"""Directions that a state leaves alone, kept out of every batch by projection.

A covariance whose C Q is 0 by subtraction alone keeps the rounding errors of Q'C Q, and every batch adds to them. With
noise far below 1 what the keys know of the other directions falls below these errors, and edits go where they are
forbidden: in float32, behind 1,000 batches of noise 1e-6, all of them. With the projection P = I - Q Q' in the place of
the subtraction the state is that of P C P, whatever rounding leaves in C: exact to the rounding of one batch. The
inverse root needs none of it, since what its rounding leaves of Q'C Q is squared, nor does the triangular factor,
which is kept in a basis of what is free (docs/stability.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states.coordinates import unwhiten_transposed, whitened64
from rlsedit_kernels.states.plain import PlainForm
from rlsedit_kernels.states.products import Change, Products
from rlsedit_kernels.states.saving import saved_tensor
from rlsedit_kernels.states.whitened import WhitenedForm

MOST = 0.125
"""Part of the space of edits up to which hard writes are held: with keys (u, d) and q directions a batch costs 8 d q u
flops more, a third of the plain form's 3 d^2 u there. Keys beyond it are kept by C alone, as all hard writes of an
inverse root are, while rho is at most `choice.PLAIN_LIMIT`: from there on all are held, since C alone would not keep
them, and `health()` warns of those that are not. What `restrict` forbids is always held."""

DEPENDENT = 1e-5
"""A direction given in float32 that is nearer to others than this is one of them."""

DEPENDENT_KEYS = 1e-9
"""The same of keys that a hard write has told."""

GROWN = 1e3
"""So many times forgetting may multiply what rounding has left in held directions before it is cleared."""


class Directions:
    """An orthonormal basis Q (n, q) in float64, and rounded to a working dtype."""

    def __init__(self, wide: torch.Tensor, dtype: torch.dtype) -> None:
        self.wide = wide
        self.narrow = wide.to(dtype)

    def of(self, dtype: torch.dtype) -> torch.Tensor:
        """Q in this dtype, one of the two."""
        return self.wide if dtype == torch.float64 else self.narrow

    def outside_rows(self, K: torch.Tensor) -> torch.Tensor:
        """K (I - Q Q') for rows (u, n); new."""
        Q = self.of(K.dtype)
        return torch.addmm(K, K @ Q, Q.mT, alpha=-1.0)

    def outside_(self, Y: torch.Tensor) -> torch.Tensor:
        """(I - Q Q') Y for columns (n, u), in place."""
        Q = self.of(Y.dtype)
        return Y.addmm_(Q, Q.mT @ Y, alpha=-1.0)

    def outside_both(self, C: torch.Tensor) -> torch.Tensor:
        """P C P (n, n) for a symmetric C, exactly symmetric; new. P = I - Q Q'.

        C - Q B' - B Q' with B = (I - Q Q'/2) C Q.
        """
        Q = self.of(C.dtype)
        B = C @ Q
        B = torch.addmm(B, Q, Q.mT @ B, alpha=-0.5)
        taken = Q @ B.mT
        return C - (taken + taken.mT)


class HeldForm:
    """A form of the covariance in the place of C with P C P, P = I - Q Q' and Q what a state holds.

    Keys are projected before the products of the form, products after them, and with these gains and changes, in the
    coordinates of the form. All else is the form's own.

    Attributes:
        form: keeps C.
        outer: Q (d, q) float64.
        inner: an orthonormal basis (m, q) of T'Q, in the coordinates of the form; Q where T is a number or none.
        of_prior: so many columns of Q, the first ones, are what the prior itself forbids (`within_prior`).
        grown: by how much forgetting has multiplied C since what rounding leaves in Q'C Q was cleared.
    """

    def __init__(
        self,
        form: PlainForm | WhitenedForm,
        outer: torch.Tensor,
        inner: torch.Tensor | None = None,
        of_prior: int = 0,
        grown: float = 1.0,
    ) -> None:
        self.form = form
        self.outer = outer
        self.of_prior = of_prior
        self.inner = Directions(outer if inner is None else inner, form.dtype)
        self.grown = grown

    def __getattr__(self, name: str) -> Any:
        if name == "form" or name.startswith("__"):  # a copy that has nothing yet
            raise AttributeError(name)
        return getattr(self.form, name)

    @property
    def count(self) -> int:
        """q."""
        return self.outer.shape[1]

    def clone(self) -> HeldForm:
        """An independent copy; the directions, which nothing changes, are shared."""
        twin = HeldForm.__new__(HeldForm)
        twin.form, twin.outer, twin.inner, twin.grown = self.form.clone(), self.outer, self.inner, self.grown
        twin.of_prior = self.of_prior
        return twin

    def to_(self, device: torch.device, dtype: torch.dtype, factor: PriorFactor) -> None:
        """Move in place."""
        other = self.form.maps and dtype != self.form.dtype  # T is rounded anew, and T'Q with it
        self.form.to_(device, dtype, factor)
        self.outer, inner = self.outer.to(device), self.inner.wide.to(device)
        if other:
            inner = joined(None, self.form.coordinates64(self.outer.mT).mT, DEPENDENT_KEYS)
        self.inner = Directions(inner, dtype)

    def coordinates(self, K: torch.Tensor) -> torch.Tensor:
        """Keys (u, m) in the coordinates of the form, without what is held."""
        return self.inner.outside_rows(self.form.coordinates(K))

    def coordinates64(self, K: torch.Tensor) -> torch.Tensor:
        """`coordinates` in float64."""
        return self.inner.outside_rows(self.form.coordinates64(K))

    def products(self, K: torch.Tensor) -> Products:
        """Y (m, u) = P C K' and G = K Y for keys that `coordinates` gave."""
        return self._outside(self.form.products(K))

    def products64(self, K: torch.Tensor) -> Products:
        """`products` in float64 arithmetic."""
        return self._outside(self.form.products64(K))

    def _outside(self, products: Products) -> Products:
        return Products(self.inner.outside_(products.Y), products.G)

    def back(self, gain: torch.Tensor) -> torch.Tensor:
        """As the form's: what has no part in T'Q has none in Q once T has been applied."""
        return self.form.back(gain)

    def back64(self, gain: torch.Tensor) -> torch.Tensor:
        """As the form's."""
        return self.form.back64(gain)

    def change_(self, change: Change, sign: float) -> None:
        """As the form's."""
        self.form.change_(change, sign)

    def change64_(self, change: Change, sign: float) -> None:
        """As the form's."""
        self.form.change64_(change, sign)

    def scale_(self, factor: float) -> None:
        """C <- factor C. No key tells of what is held: rounding there would grow until the dtype cannot hold it."""
        self.form.scale_(factor)
        self.grown *= factor
        if self.grown > GROWN:
            self.clear_()

    def clear_(self) -> None:
        """C <- P C P where C is kept as a matrix."""
        self.grown = 1.0
        kept = self.form.C if isinstance(self.form, PlainForm) else self.form.matrix
        if kept is not None:
            kept.copy_(self.inner.outside_both(kept))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """P C P x for float64 columns x (m, p), in float64 arithmetic."""
        return self.inner.outside_(self.form.apply(self.inner.outside_rows(x.mT).mT))

    def covariance(self, dtype: torch.dtype) -> torch.Tensor:
        """C (d, d), worked out in float64."""
        if isinstance(self.form, PlainForm):
            return self.inner.outside_both(self.form.C.to(torch.float64)).to(dtype)
        return self.form.with_matrix(self._whitened()).covariance(dtype)

    def whitened64(self, factor: PriorFactor) -> torch.Tensor:
        """C~ (r, r) float64."""
        if isinstance(self.form, PlainForm):
            return whitened64(self.covariance(torch.float64), factor)
        return self._whitened()

    def _whitened(self) -> torch.Tensor:
        assert isinstance(self.form, WhitenedForm)
        return self.inner.outside_both(self.form.whitened64())

    def saved(self) -> dict[str, object]:
        """What `restore` of the form and `restored` need."""
        kept = {"held": self.outer.clone(), "held_inner": self.inner.wide.clone(), "held_of_prior": self.of_prior}
        return {**self.form.saved(), **kept, "held_grown": self.grown}


def bare(form: Any) -> Any:
    """The form itself, without what is held."""
    return form.form if isinstance(form, HeldForm) else form


def free_rows(factor: PriorFactor, Q: torch.Tensor) -> torch.Tensor:
    """Keys K (q, d) float64 that span what the prior lets change of Q (d, q), with K C_0 K' = I.

    Of other keys for the same directions those that the prior knows far better than others would count as none.
    """
    return free_mix(unwhiten_transposed(factor, Q), factor.smallest) @ Q.mT


def free_mix(inner: torch.Tensor, smallest: float) -> torch.Tensor:
    """A (p, q) with orthonormal A (T'Q)', for T'Q (r, q) float64 and the smallest eigenvalue of C_0."""
    _, sizes, V = torch.linalg.svd(inner, full_matrices=False)
    keep = sizes > DEPENDENT * smallest**0.5
    return (V[keep] / sizes[keep, None]).contiguous()


def holding(form: Any, factor: PriorFactor, Q: torch.Tensor | None) -> Any:
    """The form that holds these directions (d, q), float64, too; the form as it is where it needs no projection."""
    if Q is None or not isinstance(bare(form), PlainForm | WhitenedForm):
        return form
    return _extended(form, free_rows(factor, Q).mT, DEPENDENT)


def within_prior(form: Any, factor: PriorFactor) -> Any:
    """The plain form that holds what a null-space prior forbids, too; the form as it is where there is no need.

    Other forms cannot leave the range of T. This one is held to it by subtraction alone, as by a restriction.
    """
    kept = bare(form)
    if not isinstance(kept, PlainForm) or factor.rank == factor.d or (kept is not form and form.of_prior):
        return form
    assert factor.root is not None
    outside = torch.linalg.qr(factor.root, mode="complete")[0][:, factor.rank :]
    grown = form.grown if isinstance(form, HeldForm) else 1.0
    confined = HeldForm(kept, outside.to(kept.C.device).contiguous(), None, factor.d - factor.rank, grown)
    return confined if kept is form else _extended(confined, form.outer, DEPENDENT)


def holding_keys(form: Any, factor: PriorFactor, K: torch.Tensor, root: torch.Tensor, most: float = MOST) -> Any:
    """The form that holds what a hard write has told: K' root (d, w), root that of its factored system.

    As it is where it needs no projection, or where more than `most` of the space of edits would be held.
    """
    known = form.count - form.of_prior if isinstance(form, HeldForm) else 0
    if not isinstance(bare(form), PlainForm | WhitenedForm) or known + root.shape[1] > most * factor.rank:
        return form
    return _extended(form, K.to(torch.float64).mT @ root.to(torch.float64), DEPENDENT_KEYS)


def carried(form: Any, other: Any) -> Any:
    """Another form of the same covariance that holds what `form` does."""
    if not isinstance(form, HeldForm) or not isinstance(bare(other), PlainForm | WhitenedForm):
        return other
    return _extended(other, form.outer[:, form.of_prior :], DEPENDENT)


def restored(
    form: Any,
    factor: PriorFactor,
    saved: Mapping[str, object],
    restriction: torch.Tensor | None,
    device: torch.device,
) -> Any:
    """The form with what was saved of its directions; a state of an earlier version has those of its restrictions."""
    if not isinstance(form, PlainForm | WhitenedForm):
        return form
    if saved.get("held_inner") is None:
        return holding(form, factor, restriction)
    rank = factor.rank if form.maps else factor.d
    inner = saved_tensor(saved, "held_inner", (rank, None), torch.float64, device)
    if saved.get("held") is not None:
        outer = saved_tensor(saved, "held", (factor.d, inner.shape[1]), torch.float64, device)
    elif form.maps and factor.root_inverse is not None:  # saved by ranks
        outer = joined(None, factor.root_inverse.to(device).mT @ inner, DEPENDENT_KEYS)
    else:
        outer = inner
    of_prior = saved.get("held_of_prior", 0)
    if saved.get("held_outside") is not None:  # saved by ranks
        outside = saved_tensor(saved, "held_outside", (factor.d, factor.d - factor.rank), torch.float64, device)
        outer, of_prior = torch.cat([outside, inner], dim=1), outside.shape[1]
        inner = outer
    if not isinstance(of_prior, int) or isinstance(of_prior, bool) or not 0 <= of_prior <= outer.shape[1]:
        raise ValueError(f"load_state_dict: held_of_prior must be from 0 to {outer.shape[1]}, got {of_prior!r}")
    return HeldForm(form, outer, inner, of_prior, restored_growth(saved))


def restored_growth(saved: Mapping[str, object]) -> float:
    """`grown` of what was saved; 1 where an earlier version did not save it."""
    grown = saved.get("held_grown", 1.0)
    if isinstance(grown, bool) or not isinstance(grown, (int, float)) or not 0.0 < grown < math.inf:
        raise ValueError(f"load_state_dict: held_grown must be a finite number above 0, got {grown!r}")
    return float(grown)


def _extended(form: Any, columns: torch.Tensor, tolerance: float) -> Any:
    """The form that holds these columns (d, w) float64 too."""
    known = form if isinstance(form, HeldForm) else None
    outer = joined(None if known is None else known.outer, columns, tolerance)
    new = outer[:, 0 if known is None else known.count :]
    if new.shape[1] == 0:
        return form
    kept, inner = bare(form), None
    if kept.maps:
        inner = joined(None if known is None else known.inner.wide, kept.coordinates64(new.mT).mT, DEPENDENT_KEYS)
    return HeldForm(kept, outer, inner, *((0, 1.0) if known is None else (known.of_prior, known.grown)))


def joined(held: torch.Tensor | None, columns: torch.Tensor, tolerance: float) -> torch.Tensor:
    """An orthonormal basis that begins with the one held and spans these columns (n, w) too, float64."""
    columns = columns / columns.norm(dim=0).clamp_min(torch.finfo(columns.dtype).tiny)
    columns = _outside(held, columns)
    U, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    new = U[:, sizes > tolerance]
    if held is None:
        return new.contiguous()
    return torch.cat([held, torch.linalg.qr(_outside(held, new))[0]], dim=1)


def _outside(held: torch.Tensor | None, columns: torch.Tensor) -> torch.Tensor:
    """(I - Q Q') of columns, twice: once leaves what cancellation makes."""
    for _ in range(0 if held is None else 2):
        assert held is not None
        columns = columns - held @ (held.mT @ columns)
    return columns
