"""The best approximation of a change of rank r, and the rank beyond which there is nothing but rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LowRank", "low_rank", "noise_edge"]

_DENSE = 1024  # up to this size a full decomposition costs seconds at most
_SPARE = 16  # columns of the random sketch beyond the singular values that are wanted
_ROUNDINGS = {torch.float16: 1, torch.bfloat16: 1}  # written once, from a master
_MANY = 64  # a float32 or float64 weight is rounded with every batch


@dataclass(frozen=True)
class LowRank:
    """B A (out, in), the best approximation of rank r of a change D, with balanced factors.

    Attributes:
        left: B (out, r), U_r sqrt(S_r).
        right: A (r, in), sqrt(S_r) V_r'.
        rank: r.
        full: singular values of D above the rounding of the weights it is the difference of.
        frobenius: |D - B A|_F / |D|_F of the factors as they are, rounding included.
        spectral: sigma_(r+1) / sigma_1.
    """

    left: Tensor
    right: Tensor
    rank: int
    full: int
    frobenius: float
    spectral: float

    @property
    def exact(self) -> bool:
        """Whether what is left out is no more than the rounding of the weights."""
        return self.rank >= self.full


def noise_edge(weight: Tensor, dtype: torch.dtype) -> float:
    """Largest singular value to be expected of rounding errors in a weight.

    Rounding to nearest leaves errors of standard deviation 0.4 u |w|, u the unit roundoff. A matrix of independent
    entries of deviations s_ij has a norm of about max_i |s_i.| + max_j |s_.j| (Bandeira and van Handel 2016).
    A weight in half precision is rounded once, one in float32 with every batch: 64 batches are allowed for.

    Args:
        weight: (m, n).
        dtype: in which it is stored.
    """
    weight = weight.double()
    largest = float(weight.norm(dim=0).max() + weight.norm(dim=1).max())
    return 0.5 * math.sqrt(_ROUNDINGS.get(dtype, _MANY)) * torch.finfo(dtype).eps / 2 * largest


def low_rank(
    change: Tensor, edge: float, rank: int | None = None, *, dtype: torch.dtype = torch.float32, dense: int = _DENSE
) -> LowRank:
    """Truncated singular value decomposition of a change (Eckart and Young 1936), in float64.

    Args:
        change: D (out, in), not zero.
        edge: singular values up to this one are rounding errors; see `noise_edge`.
        rank: largest rank, at least 1; None for that of D above `edge`.
        dtype: of the factors.
        dense: sizes up to this one are decomposed in full. Above, a random sketch with two power iterations finds the
            leading part (Halko, Martinsson, Tropp 2011, algorithm 4.4), and is widened until it reaches below `edge`.

    Raises:
        ValueError: a rank below 1 or above min(out, in), a change that is zero or not finite.
    """
    change = change.double()
    limit = min(change.shape)
    if rank is not None and not 1 <= rank <= limit:
        raise ValueError(f"rank must be in [1, {limit}] for a weight {tuple(change.shape)}, got {rank}")
    norm = float(change.norm())
    if not norm > 0 or not math.isfinite(norm):
        raise ValueError(f"change must be finite and not zero, got norm {norm}")
    u, s, v = _triplets(change, edge, dense)
    full = max(1, int((s > edge).sum()))
    kept = full if rank is None else min(rank, full)
    root = s[:kept].sqrt()
    left, right = (u[:, :kept] * root).to(dtype).contiguous(), (root[:, None] * v[:kept]).to(dtype).contiguous()
    rest = float((change - left.double() @ right.double()).norm())
    following = float(s[kept]) if kept < len(s) else 0.0
    return LowRank(left, right, kept, full, rest / norm, following / float(s[0]))


def _triplets(change: Tensor, edge: float, dense: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values and vectors, descending: all of them, or at least those above `edge`."""
    if min(change.shape) > dense:
        size = 8 * _SPARE
        while 4 * size <= min(change.shape):
            found = _sketch(change, size)
            if int((found[1] > edge).sum()) <= size - _SPARE:
                return found
            size *= 2
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return u, s, v


def _sketch(change: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(change.shape[1], size, dtype=torch.float64, generator=generator, device="cpu")
    start = start.to(change.device)
    basis = torch.linalg.qr(change @ start)[0]
    for _ in range(2):
        basis = torch.linalg.qr(change @ torch.linalg.qr(change.T @ basis)[0])[0]
    u, s, v = torch.linalg.svd(basis.T @ change, full_matrices=False)
    return basis @ u, s, v
