"""Restricted directions kept out of every batch by projection, over ranks; see `states/held.py`.

Each rank has the whole of the basis in the coordinates of the form, so that a batch sends nothing more. Hard writes are
not held: their directions would have to be put together in `write`, which sends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rlsedit_kernels.distributed.agreement import digest
from rlsedit_kernels.distributed.batch import Batch
from rlsedit_kernels.distributed.batch_keys import BatchKeys
from rlsedit_kernels.distributed.factor import ShardedFactor
from rlsedit_kernels.distributed.plain import PlainRows
from rlsedit_kernels.distributed.rows import downdate_rows_, times
from rlsedit_kernels.distributed.whitened import WhitenedRows
from rlsedit_kernels.states import batch as batches
from rlsedit_kernels.states.held import DEPENDENT, Directions, free_mix, joined
from rlsedit_kernels.states.products import Change, Products
from rlsedit_kernels.states.restriction import rounding
from rlsedit_kernels.states.saving import saved_tensor

__all__ = ["HeldRows", "holding", "restored", "restricted"]

_GROWN = 1e3


class HeldRows:
    """Rows of a covariance in the place of C with P C P, P = I - Q Q' and Q (m, q) float64 what the state holds.

    Keys and products are projected in the coordinates of the form; all else is the form's own.
    """

    def __init__(self, form: PlainRows | WhitenedRows, inner: torch.Tensor) -> None:
        self.form, self.inner = form, Directions(inner, form.dtype)
        self._grown = 1.0

    def __getattr__(self, name: str) -> Any:
        if name == "form" or name.startswith("__"):  # a copy that has nothing yet
            raise AttributeError(name)
        return getattr(self.form, name)

    def clone(self) -> HeldRows:
        """An independent copy; the directions, which nothing changes, are shared."""
        twin = HeldRows.__new__(HeldRows)
        twin.form, twin.inner, twin._grown = self.form.clone(), self.inner, self._grown
        return twin

    def to_(self, dtype: torch.dtype) -> None:
        """Round in place."""
        self.form.to_(dtype)
        self.inner = Directions(self.inner.wide, dtype)

    def coordinates(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Keys (u, m) in the coordinates of the form, without what is held."""
        return self.inner.outside_rows(self.form.coordinates(batch, dtype))

    def products(self, K: torch.Tensor) -> Products:
        """Y (m, u) = P C K' and G = K Y for keys that `coordinates` gave."""
        products = self.form.products(K)
        return Products(self.inner.outside_(products.Y), products.G)

    def change_(self, change: Change, sign: float) -> None:
        """As the form's."""
        self.form.change_(change, sign)

    change64_ = change_

    def scale_(self, factor: float) -> None:
        """C <- factor C; see `settle`."""
        self.form.scale_(factor)
        self._grown *= factor

    def settle(self) -> None:
        """C <- P C P, all ranks together, where forgetting has multiplied the rounding that no key tells of.

        C - Q B' - B Q' with B = (I - Q Q'/2) C Q, as the difference of two products that stay symmetric over ranks.
        """
        if self._grown <= _GROWN:
            return
        self._grown, ranks, Q = 1.0, self.form.ranks, self.inner.wide
        C = self.form.C if isinstance(self.form, PlainRows) else self.form.matrix
        B = ranks.gather(times(C, Q), self.form.columns)
        B = B - Q @ (Q.mT @ B) * 0.5
        size = float(torch.linalg.matrix_norm(B)) ** 0.5
        if size > 0.0:
            downdate_rows_(ranks, C, (Q * size + B / size) * 0.5**0.5, -1.0)
            downdate_rows_(ranks, C, (Q * size - B / size) * 0.5**0.5, 1.0)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows (m_p, p) of P C P x, for float64 columns x (m, p) that all ranks have."""
        y, ranks = self.form.apply(self.inner.outside_rows(x.mT).mT), self.form.ranks
        Q = self.inner.wide[ranks.rows(self.form.columns)]
        return y - Q @ ranks.ordered_sum(Q.mT @ y)

    def saved(self) -> dict[str, object]:
        """What `restore` of the form and `restored` need."""
        return {**self.form.saved(), "held_inner": self.inner.wide.clone()}


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


def restored(form: Any, saved: Mapping[str, object], device: torch.device) -> Any:
    """The form with what was saved of its directions; nothing is sent."""
    if not isinstance(form, PlainRows | WhitenedRows) or saved.get("held_inner") is None:
        return form
    return HeldRows(form, saved_tensor(saved, "held_inner", (form.columns, None), torch.float64, device))


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
    kept = form.form if isinstance(form, HeldRows) else form
    if not isinstance(kept, PlainRows | WhitenedRows):
        return form
    columns = kept.coordinates(keys, torch.float64).mT
    with kept.ranks.confirmed(op) as numbers:
        inner = joined(form.inner.wide if isinstance(form, HeldRows) else None, columns, DEPENDENT)
        numbers["the number of directions held"] = inner.shape[1]
    return HeldRows(kept, kept.ranks.broadcast(inner.contiguous(), 0))
