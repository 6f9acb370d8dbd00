"""Directions kept out of every batch by projection, over ranks; see `states/held.py`.

Of restrictions and hard writes each rank has the whole of a basis in the coordinates of the form, so that a batch sends
nothing more for them. What a null-space prior forbids is far more: a rank has its rows of a basis, and the projection
is put together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlsedit_kernels.distributed.agreement import digest
from rlsedit_kernels.distributed.batch import Batch
from rlsedit_kernels.distributed.batch_keys import BatchKeys, aligned
from rlsedit_kernels.distributed.factor import ShardedFactor
from rlsedit_kernels.distributed.plain import PlainRows
from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.distributed.rows import downdate_rows_, saved_rows, times
from rlsedit_kernels.distributed.whitened import WhitenedRows
from rlsedit_kernels.states import batch as batches
from rlsedit_kernels.states.held import DEPENDENT, DEPENDENT_KEYS, GROWN, Directions, free_mix, joined, restored_growth
from rlsedit_kernels.states.prepared import Prepared
from rlsedit_kernels.states.products import Change, Products
from rlsedit_kernels.states.restriction import rounding
from rlsedit_kernels.states.saving import saved_tensor

__all__ = ["HardWrite", "HeldRows", "Outside", "holding", "restored", "restricted", "told", "within_prior"]

_COLUMNS = 256


@dataclass(frozen=True)
class HardWrite(Prepared):
    """A batch of noise 0, for which all has been sent that holding it needs.

    Attributes:
        before: the form that it was prepared for.
        held: that form as it is to hold the batch, or itself.
    """

    before: Any
    held: Any


class Outside:
    """An orthonormal basis N (d, n) of what a null-space prior forbids, each rank its rows; all methods send.

    Args:
        ranks: that share it.
        rows: N_p (d_p, n), float64.
        dtype: of the form.
    """

    def __init__(self, ranks: Ranks, rows: torch.Tensor, dtype: torch.dtype) -> None:
        self.ranks, self.rows = ranks, Directions(rows, dtype)

    @classmethod
    def of(cls, op: str, factor: ShardedFactor, dtype: torch.dtype) -> Outside:
        """That of a prior; d x r numbers are gathered for it, once."""
        assert factor.root is not None
        ranks = factor.ranks
        T = ranks.gather(factor.root.to(ranks.device), factor.d)
        with ranks.confirmed(op) as numbers:
            N = torch.linalg.qr(T, mode="complete")[0][:, factor.rank :]
            numbers["a digest of what the prior forbids"] = digest(N)
        return cls(ranks, ranks.shard(N), dtype)

    def to(self, dtype: torch.dtype) -> Outside:
        """For a form of another dtype."""
        return Outside(self.ranks, self.rows.wide, dtype)

    def without(self, X: torch.Tensor) -> torch.Tensor:
        """(I - N N') X (d, p) for columns that all ranks have; n x p and d x p numbers are sent."""
        N, ranks, d = self.rows.of(X.dtype), self.ranks, X.shape[0]
        inner = ranks.ordered_sum(N.mT @ X[ranks.rows(d)])
        return X - ranks.gather(N @ inner, d)

    def without_rows(self, y: torch.Tensor) -> torch.Tensor:
        """This rank's rows of (I - N N') y, from its rows (d_p, p) float64."""
        return y - self.rows.wide @ self.ranks.ordered_sum(self.rows.wide.mT @ y)


class HeldRows:
    """Rows of a covariance in the place of C with P C P, P = I - Q Q' - N N'.

    Keys and products are projected in the coordinates of the form; all else is the form's own.

    Attributes:
        form: keeps the rows.
        inner: Q (m, q), what restrictions and hard writes hold, orthogonal to N; the same on all ranks.
        within: N, or None where the form stays within the prior by itself.
        grown: as for `states.held.HeldForm`; above `GROWN` until `settle` is called.
    """

    def __init__(
        self, form: PlainRows | WhitenedRows, inner: torch.Tensor, within: Outside | None = None, grown: float = 1.0
    ) -> None:
        self.form, self.inner, self.within = form, Directions(inner, form.dtype), within
        self.grown = grown

    def __getattr__(self, name: str) -> Any:
        if name == "form" or name.startswith("__"):  # a copy that has nothing yet
            raise AttributeError(name)
        return getattr(self.form, name)

    def clone(self) -> HeldRows:
        """An independent copy; the directions, which nothing changes, are shared."""
        twin = HeldRows.__new__(HeldRows)
        twin.form, twin.inner, twin.within, twin.grown = self.form.clone(), self.inner, self.within, self.grown
        return twin

    def to_(self, dtype: torch.dtype) -> None:
        """Round in place."""
        self.form.to_(dtype)
        self.inner = Directions(self.inner.wide, dtype)
        self.within = None if self.within is None else self.within.to(dtype)

    def coordinates(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Keys (u, m) in the coordinates of the form, without what is held."""
        K = self.inner.outside_rows(self.form.coordinates(batch, dtype))
        return K if self.within is None else aligned(self.within.without(K.mT.contiguous()).mT)

    def products(self, K: torch.Tensor) -> Products:
        """Y (m, u) = P C K' and G = K Y for keys that `coordinates` gave."""
        products = self.form.products(K)
        Y = self.inner.outside_(products.Y)
        return Products(Y if self.within is None else self.within.without(Y), products.G)

    def change_(self, change: Change, sign: float) -> None:
        """As the form's."""
        self.form.change_(change, sign)

    change64_ = change_

    def scale_(self, factor: float) -> None:
        """C <- factor C; see `settle`."""
        self.form.scale_(factor)
        self.grown *= factor

    def settle(self) -> None:
        """C <- P C P, all ranks together, where forgetting has multiplied the rounding that no key tells of."""
        if self.grown <= GROWN:
            return
        self.grown, ranks = 1.0, self.form.ranks
        self._clear(self.inner.wide)
        if self.within is not None:
            for rows in self.within.rows.wide.split(_COLUMNS, dim=1):
                self._clear(ranks.gather(rows.contiguous(), self.form.columns))

    def _clear(self, Q: torch.Tensor) -> None:
        """C <- (I - Q Q') C (I - Q Q') for orthonormal columns (m, q) float64 that all ranks have.

        C - Q B' - B Q' with B = (I - Q Q'/2) C Q, as the difference of two products that stay symmetric over ranks.
        """
        ranks = self.form.ranks
        C = self.form.C if isinstance(self.form, PlainRows) else self.form.matrix
        B = ranks.gather(times(C, Q), self.form.columns)
        B = B - Q @ (Q.mT @ B) * 0.5
        size = float(torch.linalg.matrix_norm(B)) ** 0.5
        if size > 0.0:
            downdate_rows_(ranks, C, (Q * size + B / size) * 0.5**0.5, -1.0)
            downdate_rows_(ranks, C, (Q * size - B / size) * 0.5**0.5, 1.0)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows (m_p, p) of P C P x, for float64 columns x (m, p) that all ranks have."""
        x, ranks = self.inner.outside_rows(x.mT).mT, self.form.ranks
        y = self.form.apply(x if self.within is None else self.within.without(x.contiguous()))
        Q = self.inner.wide[ranks.rows(self.form.columns)]
        y = y - Q @ ranks.ordered_sum(Q.mT @ y)
        return y if self.within is None else self.within.without_rows(y)

    def saved(self) -> dict[str, object]:
        """What `restore` of the form and `restored` need."""
        kept = {**self.form.saved(), "held_inner": self.inner.wide.clone(), "held_grown": self.grown}
        if self.within is not None:
            kept["held_outside"] = self.form.ranks.dtensor(self.within.rows.wide.clone(), self.form.columns)
        return kept


def holding(op: str, form: Any, factor: ShardedFactor, rows: torch.Tensor, z: torch.Tensor) -> Any:
    """The form that holds directions, of which this rank has rows (d_p, q) float64; as it is where it needs none.

    Args:
        op: for messages.
        form, factor: of the state.
        rows: see above.
        z: of the probes of the state.
    """
    keys = _free_keys(op, factor, rows, z)
    return form if keys is None else _holding(op, form, keys)


def restricted(
    op: str, form: Any, factor: ShardedFactor, rows: torch.Tensor, z: torch.Tensor, singular: bool
) -> tuple[Any, Change | None]:
    """The form that holds directions, and what the restriction takes out of C, not written yet.

    Args:
        op, form, factor, rows, z: as for `holding`.
        singular: whether C is singular by design already.

    Raises:
        BreakdownError: C is indefinite, on all ranks.
    """
    keys = _free_keys(op, factor, rows, z)
    if keys is None:
        return form, None  # the prior lets nothing change there
    products = form.products(form.coordinates(keys, torch.float64))
    with factor.ranks.confirmed(op) as numbers:
        factored = batches.factor(products, 0.0, rounding(products, form.dtype), float(singular))
        numbers["the digest of the restricted system"] = digest(factored.G, factored.root)
    return _holding(op, form, keys), factored.change if factored.rank else None


def told(op: str, form: Any, factor: ShardedFactor, batch: Batch, root: torch.Tensor, most: float) -> Any:
    """The form that holds what a hard write tells: K' root (m, w), root that of its factored system.

    As it is where it needs no projection, or where more than `most` of the space of edits would be held.
    """
    kept, known = _bare(form), form.inner.wide.shape[1] if isinstance(form, HeldRows) else 0
    held = known + root.shape[1]
    if not isinstance(kept, PlainRows | WhitenedRows) or held == known or held > most * factor.rank:
        return form
    K = kept.coordinates(batch, torch.float64)
    return _extended(op, form, K.mT @ root.to(torch.float64), DEPENDENT_KEYS)


def within_prior(op: str, form: Any, factor: ShardedFactor) -> Any:
    """The plain form that holds what a null-space prior forbids, too; the form as it is where there is no need."""
    kept = _bare(form)
    if not isinstance(kept, PlainRows) or factor.rank == factor.d or (kept is not form and form.within is not None):
        return form
    within = Outside.of(op, factor, kept.dtype)
    if kept is form:
        return HeldRows(kept, torch.zeros(factor.d, 0, dtype=torch.float64, device=factor.ranks.device), within)
    columns = within.without(form.inner.wide)
    with factor.ranks.confirmed(op) as numbers:
        U, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
        inner = U[:, sizes > DEPENDENT].contiguous()
        numbers["the number of directions held within the prior"] = inner.shape[1]
    return HeldRows(kept, factor.ranks.broadcast(inner, 0), within, form.grown)


def restored(form: Any, factor: ShardedFactor, saved: Mapping[str, object]) -> Any:
    """The form with what was saved of its directions; nothing is sent."""
    if not isinstance(form, PlainRows | WhitenedRows) or saved.get("held_inner") is None:
        return form
    inner = saved_tensor(saved, "held_inner", (form.columns, None), torch.float64, factor.ranks.device)
    first, within = saved.get("held_of_prior", 0), None
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first <= inner.shape[1]:
        raise ValueError(f"load_state_dict: held_of_prior must be from 0 to {inner.shape[1]}, got {first!r}")
    if first:  # of a single state
        within = Outside(factor.ranks, factor.ranks.shard(inner[:, :first]), form.dtype)
    elif saved.get("held_outside") is not None:
        shape = (factor.d, factor.d - factor.rank)
        rows = saved_rows(saved, "held_outside", shape, torch.float64, factor.ranks)
        within = Outside(factor.ranks, rows, form.dtype)
    return HeldRows(form, inner[:, first:].contiguous(), within, restored_growth(saved))


def _free_keys(op: str, factor: ShardedFactor, rows: torch.Tensor, z: torch.Tensor) -> Batch | None:
    """Keys that span what the prior lets change of these directions, with K C_0 K' = I."""
    ranks, inward = factor.ranks, factor.inward(rows)
    with ranks.confirmed(op) as numbers:
        mix = free_mix(inward, factor.smallest)
        numbers["the number of directions that the prior lets change"] = len(mix)
    if not len(mix):
        return None
    ranks.broadcast(mix, 0)  # it is not unique
    return Batch(BatchKeys((mix @ rows.mT).contiguous(), None, 0.0), ranks, factor.d, z)


def _holding(op: str, form: Any, keys: Batch) -> Any:
    kept = _bare(form)
    if not isinstance(kept, PlainRows | WhitenedRows):
        return form
    return _extended(op, form, kept.coordinates(keys, torch.float64).mT, DEPENDENT)


def _extended(op: str, form: Any, columns: torch.Tensor, tolerance: float) -> HeldRows:
    """The form that holds these columns (m, w) float64, which all ranks have, too."""
    kept, known = _bare(form), form if isinstance(form, HeldRows) else None
    within = None if known is None else known.within
    if within is not None:
        columns = within.without(columns)
    with kept.ranks.confirmed(op) as numbers:
        inner = joined(None if known is None else known.inner.wide, columns, tolerance)
        numbers["the number of directions held"] = inner.shape[1]
    grown = 1.0 if known is None else known.grown
    return HeldRows(kept, kept.ranks.broadcast(inner.contiguous(), 0), within, grown)


def _bare(form: Any) -> Any:
    return form.form if isinstance(form, HeldRows) else form
