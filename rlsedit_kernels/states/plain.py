"""The plain form: C itself, d x d, downdated in place. Cheapest per batch; safe while rho is small."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rlsedit_kernels import ops
from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states import wide
from rlsedit_kernels.states.coordinates import whitened64
from rlsedit_kernels.states.products import Change, Products
from rlsedit_kernels.states.saving import saved_tensor


class PlainForm:
    """C (d, d) in the coordinates of the keys."""

    name = "plain"
    maps = False

    def __init__(self, C: torch.Tensor) -> None:
        self.C = C

    @classmethod
    def start(cls, factor: PriorFactor, dtype: torch.dtype, device: torch.device) -> PlainForm:
        """C_0 from the float64 factor of the prior, rounded once."""
        return cls(factor.covariance(device).to(dtype))

    @classmethod
    def from_covariance(
        cls, C: torch.Tensor, factor: PriorFactor, dtype: torch.dtype, device: torch.device
    ) -> PlainForm:
        """The form that holds a given C."""
        return cls(C.to(device=device, dtype=dtype, copy=True))

    def clone(self) -> PlainForm:
        """An independent copy."""
        return PlainForm(self.C.clone())

    def to_(self, device: torch.device, dtype: torch.dtype, factor: PriorFactor) -> None:
        """Move in place."""
        self.C = self.C.to(device=device, dtype=dtype)

    @property
    def columns(self) -> int:
        """Columns of the representation: all of them."""
        return self.C.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.C.dtype

    @property
    def dense(self) -> bool:
        return True

    def coordinates(self, K: torch.Tensor) -> torch.Tensor:
        """Keys (u, d) in the coordinates of the form."""
        return K

    def products(self, K: torch.Tensor) -> Products:
        """Y (d, u) = C K' and G (u, u) = K Y for keys in the coordinates of the form."""
        return Products(*ops.gain_products(self.C, K))

    def back(self, gain: torch.Tensor) -> torch.Tensor:
        """A gain (d, u) of the form, in the coordinates of the keys."""
        return gain

    def change_(self, change: Change, sign: float) -> None:
        """C <- C + sign Z Z', Z the left factor of the change."""
        ops.downdate_(self.C, change.left, sign)

    def coordinates64(self, K: torch.Tensor) -> torch.Tensor:
        """`coordinates` in float64."""
        return K.to(torch.float64)

    def products64(self, K: torch.Tensor) -> Products:
        """`products` in float64 arithmetic, row block by row block: no float64 copy of C."""
        return wide.products(self.C, K)

    def back64(self, gain: torch.Tensor) -> torch.Tensor:
        """`back` in float64."""
        return gain

    def change64_(self, change: Change, sign: float) -> None:
        """`change_` with a float64 Z: the difference is formed in float64 and rounded once."""
        wide.change_(self.C, change.left, sign)

    def scale_(self, factor: float) -> None:
        """C <- factor C."""
        self.C.mul_(factor)

    def covariance(self, dtype: torch.dtype) -> torch.Tensor:
        """C (d, d), a copy."""
        return self.C.to(dtype, copy=True)

    def whitened64(self, factor: PriorFactor) -> torch.Tensor:
        """C~ = T^-1 C T^-T (r, r) float64."""
        return whitened64(self.C, factor)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """C x for float64 columns x (d, p), in float64 arithmetic."""
        return wide.product(self.C, x)

    def saved(self) -> dict[str, object]:
        """What `restore` needs."""
        return {"C": self.C.clone()}

    @classmethod
    def restore(
        cls, saved: Mapping[str, object], factor: PriorFactor, dtype: torch.dtype, device: torch.device
    ) -> PlainForm:
        """The form that `saved` was taken from."""
        return cls(saved_tensor(saved, "C", (factor.d, factor.d), dtype, device))
