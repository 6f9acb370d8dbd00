"""The inverse root, Potter's form: C = A A' with A (m, r), a root of the covariance and never the covariance.

A batch with F = A'K' turns A into A (I - F M F'), M a root of the downdate (docs/mathematics.md, fact 12). C
cannot lose positive semi-definiteness, and what a difference costs in C, s eps where keys tell s times what was
known, costs sqrt(s) eps in A. Only products of size m x u are needed; the whole of A is kept from the start.

A root may be kept in either coordinates. In those of the keys, A_0 = T, keys and gains need no map and T need not
be kept: 6 d r u flops a batch against 4 d r u + 6 r^2 u. But A_0 brings the condition of the prior along as its
square root: W is off by about eps sqrt(condition). Beyond `MAPPED_FROM` (and for a ridge, whose map is a number)
the root is therefore kept in whitened coordinates, C = T A~ A~' T' from A~_0 = I.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from rlsedit_kernels import ops
from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states import wide
from rlsedit_kernels.states.adding import add_product_
from rlsedit_kernels.states.coordinates import moved_root, rounded, row_product, unwhiten, whiten, whitened64
from rlsedit_kernels.states.products import Change, Products
from rlsedit_kernels.states.saving import saved_tensor

MAPPED_FROM = 2e-5
"""From this value of (unit roundoff) sqrt(condition of the prior) on, whitened coordinates: a condition of 1e5 in
float32. There W is off by 2e-5 in the coordinates of the keys and by 5e-6 to 1e-5 in whitened ones, at 1e8 by up to
6e-4 and 8e-5 (bench/forms.py)."""


def mapped(factor: PriorFactor, dtype: torch.dtype) -> bool:
    """Whether the root is kept in whitened coordinates."""
    return factor.root is None or not 0.5 * torch.finfo(dtype).eps * factor.condition**0.5 <= MAPPED_FROM


class InverseRootForm:
    """A (m, r) with C = A A' (m = d), or C = T A A' T' in whitened coordinates (m = r)."""

    name = "inverse_root"

    def __init__(self, A: torch.Tensor, root: torch.Tensor | None, root_scale: float, maps: bool) -> None:
        self.A = A
        self.root = root
        self.root_scale = root_scale
        self.maps = maps

    @classmethod
    def start(cls, factor: PriorFactor, dtype: torch.dtype, device: torch.device) -> InverseRootForm:
        """A_0 = T or A~_0 = I; T is rounded once from float64 (a ridge keeps a number only)."""
        if mapped(factor, dtype):
            return cls._mapped(torch.eye(factor.rank, dtype=dtype, device=device), factor)
        assert factor.root is not None
        return cls._unmapped(rounded(factor.root, dtype, device))

    @classmethod
    def from_covariance(
        cls, C: torch.Tensor, factor: PriorFactor, dtype: torch.dtype, device: torch.device
    ) -> InverseRootForm:
        """The form that holds C = T C~ T': a float64 root of C~, also where C~ is singular."""
        matrix = whitened64(C, factor).to(device)
        matrix = (matrix + matrix.mT).mul_(0.5)
        L, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0:  # singular by a hard write or a restriction
            values, vectors = torch.linalg.eigh(matrix)
            L = vectors * values.clamp_min(0.0).sqrt()
        if mapped(factor, dtype):
            return cls._mapped(L.to(dtype), factor)
        return cls._unmapped(rounded(unwhiten(factor, L), dtype, device))

    @classmethod
    def _mapped(cls, A: torch.Tensor, factor: PriorFactor) -> InverseRootForm:
        root = None if factor.root is None else rounded(factor.root, A.dtype, A.device)
        return cls(A, root, factor.scale or 1.0, True)

    @classmethod
    def _unmapped(cls, A: torch.Tensor) -> InverseRootForm:
        return cls(A, None, 1.0, False)

    def clone(self) -> InverseRootForm:
        """An independent copy; the prior's root, which nothing changes, is shared."""
        return InverseRootForm(self.A.clone(), self.root, self.root_scale, self.maps)

    def to_(self, device: torch.device, dtype: torch.dtype, factor: PriorFactor) -> None:
        """Move in place; the coordinates stay."""
        self.A = self.A.to(device=device, dtype=dtype)
        self.root = moved_root(self.root, factor, dtype, device)

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def columns(self) -> int:
        """Columns of the representation: all of them."""
        return self.A.shape[1]

    @property
    def dense(self) -> bool:
        return True

    def coordinates(self, K: torch.Tensor) -> torch.Tensor:
        """Keys (u, m) in the coordinates of the form."""
        if self.root is None:
            return K * self.root_scale if self.maps else K
        return ops.key_products(self.root, K)

    def products(self, K: torch.Tensor) -> Products:
        """F (r, u) = A'K', Y (m, u) = A F and G (u, u) = F'F."""
        rows = ops.key_products(self.A, K)  # F'
        G = row_product(rows, rows.mT)
        times = partial(torch.matmul, self.A) if self.dtype == torch.float64 else None
        return Products(ops.key_products(self.A.mT, rows).mT, (G + G.mT).mul_(0.5), rows.mT, times)

    def back(self, gain: torch.Tensor) -> torch.Tensor:
        """A gain (m, u) of the form, in the coordinates of the keys (d, u)."""
        if self.root is None:
            return gain * self.root_scale if self.maps else gain
        return ops.key_products(self.root.mT, gain.mT).mT

    def change_(self, change: Change, sign: float) -> None:
        """A <- A + sign left right'."""
        assert change.right is not None
        add_product_(self.A, change.left, change.right, sign)

    def coordinates64(self, K: torch.Tensor) -> torch.Tensor:
        """`coordinates` in float64, from the prior's root that the state works with."""
        K = K.to(torch.float64)
        return K * self.root_scale if self.root is None else wide.transposed_product(self.root, K.mT).mT

    def products64(self, K: torch.Tensor) -> Products:
        """`products` in float64 arithmetic, without a float64 copy of A."""
        F = wide.transposed_product(self.A, K.mT)
        G = F.mT @ F
        times = partial(wide.product, self.A)
        return Products(times(F), (G + G.mT).mul_(0.5), F, times)

    def back64(self, gain: torch.Tensor) -> torch.Tensor:
        """`back` in float64."""
        return gain * self.root_scale if self.root is None else wide.product(self.root, gain)

    def change64_(self, change: Change, sign: float) -> None:
        """`change_` with a float64 change: the difference is formed in float64 and A rounded once."""
        assert change.right is not None
        wide.add_(self.A, change.left, change.right, sign)

    def scale_(self, factor: float) -> None:
        """C <- factor C."""
        self.A.mul_(factor**0.5)

    def whitened64(self, factor: PriorFactor) -> torch.Tensor:
        """C~ (r, r) float64."""
        A = self.A.to(torch.float64)
        return _gram(A if self.maps else whiten(factor, A))

    def covariance(self, dtype: torch.dtype) -> torch.Tensor:
        """C (d, d), worked out in float64."""
        return _gram(self.back64(self.A.to(torch.float64))).to(dtype)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """A A'x for float64 columns x (m, p), in float64 arithmetic."""
        return wide.product(self.A, wide.transposed_product(self.A, x))

    def saved(self) -> dict[str, object]:
        """What `restore` needs; the prior's root comes from the prior."""
        return {"A": self.A.clone(), "maps": self.maps}

    @classmethod
    def restore(
        cls, saved: Mapping[str, object], factor: PriorFactor, dtype: torch.dtype, device: torch.device
    ) -> InverseRootForm:
        """The form that `saved` was taken from."""
        maps = saved.get("maps")
        if not isinstance(maps, bool):
            raise ValueError(f"load_state_dict: maps must be a bool, got {type(maps).__name__}")
        A = saved_tensor(saved, "A", (factor.rank if maps else factor.d, factor.rank), dtype, device)
        return cls._mapped(A, factor) if maps else cls._unmapped(A)


def _gram(A: torch.Tensor) -> torch.Tensor:
    """A A', exactly symmetric."""
    product = A @ A.mT
    return (product + product.mT).mul_(0.5)
