"""The whitened form: C = T C~ T' with the prior's root T, C~ started at the identity.

C~ keeps its eigenvalues in (0, 1], so that an ill-conditioned prior does no harm in float32. While few
columns have been written, C~ = c I + sum_i s_i Z_i Z_i' (c > 0, s_i = +-1) is kept as these columns, in
chunks; from 0.75 r columns on it is cheaper as a matrix. Both give the same gains to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from rlsedit_kernels import ops
from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states import wide
from rlsedit_kernels.states.coordinates import moved_root, row_product, whitened64
from rlsedit_kernels.states.products import Change, Products
from rlsedit_kernels.states.saving import saved_tensor

DENSE_FROM = 0.75
"""Fraction of r from which on a matrix is cheaper than columns: 4 r m u flops against 3 r^2 u a batch."""

CHUNK = 256


@dataclass
class Chunk:
    """Columns Z[:, :used] that enter C~ with one sign."""

    Z: torch.Tensor
    used: int
    sign: float

    @property
    def filled(self) -> torch.Tensor:
        return self.Z[:, : self.used]


class WhitenedForm:
    """C~ (r, r), as columns while they are few, as a matrix afterwards."""

    name = "whitened"
    maps = True

    def __init__(
        self,
        root: torch.Tensor | None,
        root_scale: float,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.root = root
        self.root_scale = root_scale
        self.rank = rank
        self.dtype = dtype
        self.device = device
        self.identity = 1.0
        self.chunks: list[Chunk] = []
        self.matrix: torch.Tensor | None = None

    @classmethod
    def start(cls, factor: PriorFactor, dtype: torch.dtype, device: torch.device) -> WhitenedForm:
        """C~_0 = I; the root is rounded once from float64 (a ridge keeps a number only)."""
        root = None if factor.root is None else factor.root.to(device=device, dtype=dtype).contiguous()
        return cls(root, factor.scale or 1.0, factor.rank, dtype, device)

    @classmethod
    def from_covariance(
        cls, C: torch.Tensor, factor: PriorFactor, dtype: torch.dtype, device: torch.device
    ) -> WhitenedForm:
        """The form that holds C = T C~ T', computed in float64: a change of form in the middle of a stream."""
        form = cls.start(factor, dtype, device)
        matrix = whitened64(C, factor)
        form.matrix = ((matrix + matrix.mT) * 0.5).to(device=device, dtype=dtype)
        return form

    def with_matrix(self, matrix: torch.Tensor) -> WhitenedForm:
        """A form that keeps this C~ (r, r), in its dtype, with the same root."""
        twin = WhitenedForm(self.root, self.root_scale, self.rank, matrix.dtype, self.device)
        twin.matrix = matrix
        return twin

    @property
    def columns(self) -> int:
        return self.rank if self.matrix is not None else sum(chunk.used for chunk in self.chunks)

    @property
    def dense(self) -> bool:
        return self.matrix is not None

    def coordinates(self, K: torch.Tensor) -> torch.Tensor:
        """K~ = K T (u, r)."""
        return K * self.root_scale if self.root is None else ops.key_products(self.root, K)

    def products(self, K: torch.Tensor) -> Products:
        """Y~ (r, u) = C~ K~' and G (u, u) = K~ Y~."""
        if self.matrix is not None:
            return Products(*ops.gain_products(self.matrix, K))
        if any(chunk.Z.dtype != self.dtype for chunk in self.chunks):
            wider = self.products64(K.to(torch.float64))
            return Products(wider.Y.to(self.dtype), wider.G.to(self.dtype))
        rows = K * self.identity  # Y'
        for chunk in self.chunks:
            Z = chunk.filled
            rows.add_(ops.key_products(Z.mT, ops.key_products(Z, K)), alpha=chunk.sign)
        G = row_product(K, rows.mT)
        return Products(rows.mT, (G + G.mT).mul_(0.5))

    def back(self, gain: torch.Tensor) -> torch.Tensor:
        """g = T g~ (d, u)."""
        return gain * self.root_scale if self.root is None else ops.key_products(self.root.mT, gain.mT).mT

    def change_(self, change: Change, sign: float) -> None:
        """C~ <- C~ + sign Z Z', Z the left factor of the change."""
        Z = change.left
        if self.matrix is None and self.columns + Z.shape[1] > DENSE_FROM * self.rank:
            self._densify()
        if self.matrix is not None:
            ops.downdate_(self.matrix, Z, sign)
        else:
            self._append(Z, sign)

    def coordinates64(self, K: torch.Tensor) -> torch.Tensor:
        """`coordinates` in float64, from the root that the state works with."""
        K = K.to(torch.float64)
        return K * self.root_scale if self.root is None else wide.product(self.root.mT, K.mT).mT

    def products64(self, K: torch.Tensor) -> Products:
        """`products` in float64 arithmetic, without a float64 copy of C~."""
        if self.matrix is not None:
            return wide.products(self.matrix, K)
        Y = self.apply(K.mT)
        G = K @ Y
        return Products(Y, (G + G.mT).mul_(0.5))

    def back64(self, gain: torch.Tensor) -> torch.Tensor:
        """`back` in float64."""
        return gain * self.root_scale if self.root is None else wide.product(self.root, gain)

    def change64_(self, change: Change, sign: float) -> None:
        """`change_` with a float64 Z: the difference is formed in float64 and a matrix rounded once.

        Columns stay in float64: rounded one by one they would lose what the difference leaves.
        """
        Z = change.left
        if self.matrix is not None:
            wide.change_(self.matrix, Z, sign)
            return
        full = self.columns + Z.shape[1] > DENSE_FROM * self.rank
        self._append(Z, sign)
        if full:
            self._densify()

    def scale_(self, factor: float) -> None:
        """C~ <- factor C~."""
        if self.matrix is not None:
            self.matrix.mul_(factor)
            return
        self.identity *= factor
        for chunk in self.chunks:
            chunk.filled.mul_(factor**0.5)

    def whitened64(self, factor: PriorFactor | None = None) -> torch.Tensor:
        """C~ (r, r) float64."""
        if self.matrix is not None:
            return self.matrix.to(torch.float64, copy=True)
        terms = [(chunk.filled, chunk.sign) for chunk in self.chunks]
        return wide.assemble(self.rank, self.identity, terms, torch.float64, self.device)

    def covariance(self, dtype: torch.dtype) -> torch.Tensor:
        """C = T C~ T' (d, d), worked out in float64."""
        matrix = self.whitened64()
        if self.root is None:
            return matrix.mul_(self.root_scale**2).to(dtype)
        root = self.root.to(torch.float64)
        product = root @ matrix @ root.mT
        return (product + product.mT).mul_(0.5).to(dtype)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """C~ x for float64 columns x (r, p), in float64 arithmetic."""
        if self.matrix is not None:
            return wide.product(self.matrix, x)
        y = x * self.identity
        for chunk in self.chunks:
            Z = chunk.filled
            y += chunk.sign * wide.product(Z, wide.product(Z.mT, x))
        return y

    def clone(self) -> WhitenedForm:
        """An independent copy; the root, which nothing changes, is shared."""
        twin = WhitenedForm(self.root, self.root_scale, self.rank, self.dtype, self.device)
        twin.identity = self.identity
        twin.matrix = None if self.matrix is None else self.matrix.clone()
        twin.chunks = [replace(chunk, Z=chunk.Z.clone()) for chunk in self.chunks]
        return twin

    def to_(self, device: torch.device, dtype: torch.dtype, factor: PriorFactor) -> None:
        """Move in place."""
        self.device, self.dtype = device, dtype
        self.root = moved_root(self.root, factor, dtype, device)
        if self.matrix is not None:
            self.matrix = self.matrix.to(device=device, dtype=dtype)
        for chunk in self.chunks:
            chunk.Z = chunk.Z.to(device=device, dtype=torch.promote_types(chunk.Z.dtype, dtype))

    def saved(self) -> dict[str, object]:
        """What `restore` needs; the root comes from the prior."""
        if self.matrix is not None:
            return {"matrix": self.matrix.clone()}
        return {
            "identity": self.identity,
            "signs": [chunk.sign for chunk in self.chunks],
            "chunks": [chunk.filled.clone() for chunk in self.chunks],
        }

    @classmethod
    def restore(
        cls, saved: Mapping[str, object], factor: PriorFactor, dtype: torch.dtype, device: torch.device
    ) -> WhitenedForm:
        """The form that `saved` was taken from."""
        form = cls.start(factor, dtype, device)
        if "matrix" in saved:
            form.matrix = saved_tensor(saved, "matrix", (form.rank, form.rank), dtype, device)
            return form
        form.identity = float(saved["identity"])  # type: ignore[arg-type]
        chunks, signs = saved["chunks"], saved["signs"]
        for Z, sign in zip(chunks, signs, strict=True):  # type: ignore[call-overload]
            checked = saved_tensor({"chunk": Z}, "chunk", (form.rank, None), None, device)
            form.chunks.append(form._chunk(sign, checked.dtype))
            form.chunks[-1].Z[:, : checked.shape[1]].copy_(checked)
            form.chunks[-1].used = checked.shape[1]
        return form

    def _chunk(self, sign: float, dtype: torch.dtype) -> Chunk:
        """An empty chunk; columns contiguous in memory, so that its filled part is one block."""
        return Chunk(torch.empty(CHUNK, self.rank, dtype=dtype, device=self.device).mT, 0, sign)

    def _append(self, Z: torch.Tensor, sign: float) -> None:
        while Z.shape[1]:
            last = self.chunks[-1] if self.chunks else None
            if last is None or last.sign != sign or last.Z.dtype != Z.dtype or last.used == last.Z.shape[1]:
                last = self._chunk(sign, Z.dtype)
                self.chunks.append(last)
            width = min(Z.shape[1], last.Z.shape[1] - last.used)
            last.Z[:, last.used : last.used + width].copy_(Z[:, :width])
            last.used += width
            Z = Z[:, width:]

    def _densify(self) -> None:
        terms = [(chunk.filled, chunk.sign) for chunk in self.chunks]
        self.matrix = wide.assemble(self.rank, self.identity, terms, self.dtype, self.device)
        self.chunks.clear()
