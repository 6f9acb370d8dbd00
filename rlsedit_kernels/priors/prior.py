"""Prior: the five ways in which S_0, and with it C_0, can be given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch

from rlsedit_kernels.priors import factor as factors
from rlsedit_kernels.priors.factor import PriorFactor

KINDS = ("ridge", "anchor", "anchor_keys", "null_space", "precision")

RESOLUTION = 4.0
"""Eigenvalues of a second moment below this many eps of the dtype it was given in are its rounding error."""

_SYMMETRY = 1e-5
_PROJECTOR = 1e-4


class Prior:
    """S_0 = lambda^2 I + mu^2 K_0'K_0 in one of five forms, kept and factored in float64.

    Make one with `ridge`, `anchor`, `anchor_keys`, `null_space` or `precision`; a prior is never changed
    after that and can be shared by several states. Its factor is computed at first use and kept.

    Attributes:
        kind: one of "ridge", "anchor", "anchor_keys", "null_space", "precision".
        d: dimension of a key.
        lam, mu, l2: the scalars of the kind, None where they have no meaning.
        arrays: the matrices it was made from, float64, by name.
    """

    def __init__(
        self, kind: str, d: int, arrays: Mapping[str, torch.Tensor], *, given_eps: float = 0.0, **scalars: float
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"Prior: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = kind
        self.d = d
        self.arrays = dict(arrays)
        self._given_eps = given_eps
        self.lam = scalars.get("lam")
        self.mu = scalars.get("mu")
        self.l2 = scalars.get("l2")

    @classmethod
    def ridge(cls, d: int, lam: float) -> Prior:
        """S_0 = lam^2 I.

        Args:
            d: dimension of a key, >= 1.
            lam: in units of a key. 0 means nothing known: only `SquareRootState` can start from that, and has a
                weight once d independent keys have arrived; every other use raises ValueError.
        """
        if isinstance(d, bool) or not isinstance(d, int):
            raise TypeError(f"Prior.ridge: d must be an int, got {type(d).__name__}")
        if d < 1:
            raise ValueError(f"Prior.ridge: d must be >= 1, got {d}")
        return cls("ridge", d, {}, lam=_number("ridge", "lam", lam))

    @classmethod
    def anchor(cls, second_moment: torch.Tensor | np.ndarray, mu: float = 1.0, lam: float = 0.0) -> Prior:
        """S_0 = lam^2 I + mu^2 M, with M the (weighted) uncentred second moment of the keys to be left alone.

        The papers' "15,000 x second moment" is M = 15000 E[k k'] with mu = 1.

        Args:
            second_moment: M (d, d), symmetric positive semi-definite. A singular M with lam = 0 is lifted
                (see `PriorFactor.notes`), which `health()` reports.
            mu: >= 0.
            lam: >= 0; lam and mu not both 0.
        """
        M = _symmetric("anchor", "second_moment", second_moment)
        mu, lam = _number("anchor", "mu", mu), _number("anchor", "lam", lam)
        _not_both_zero("anchor", mu, lam)
        return cls("anchor", M.shape[0], {"second_moment": M}, given_eps=_eps(second_moment), mu=mu, lam=lam)

    @classmethod
    def anchor_keys(cls, K0: torch.Tensor | np.ndarray, mu: float, lam: float) -> Prior:
        """S_0 = lam^2 I + mu^2 K0'K0.

        Args:
            K0: (n, d) anchor keys, one per row.
            mu: >= 0.
            lam: >= 0; must be > 0 unless K0 has full column rank (otherwise S_0 is lifted and reported).
        """
        K = _matrix("anchor_keys", "K0", K0)
        mu, lam = _number("anchor_keys", "mu", mu), _number("anchor_keys", "lam", lam)
        _not_both_zero("anchor_keys", mu, lam)
        return cls("anchor_keys", K.shape[1], {"K0": K}, mu=mu, lam=lam)

    @classmethod
    def null_space(cls, projector_or_basis: torch.Tensor | np.ndarray, l2: float) -> Prior:
        """C_0 = P / l2: edits stay in the range of P (AlphaEdit, whose L2 this is; docs/mathematics.md, fact 3).

        Args:
            projector_or_basis: P (d, d), an orthogonal projector, or Q (d, r), r < d, with orthonormal
                columns and P = Q Q'.
            l2: > 0.
        """
        A = _matrix("null_space", "projector_or_basis", projector_or_basis)
        l2 = _number("null_space", "l2", l2, positive=True)
        d, r = A.shape
        if r > d:
            raise ValueError(
                f"Prior.null_space: projector_or_basis must be (d, d) or (d, r) with r < d, got {tuple(A.shape)}"
            )
        Q = _basis_of_projector(A) if r == d else _orthonormal(A)
        return cls("null_space", d, {"basis": Q}, l2=l2)

    @classmethod
    def precision(cls, S0: torch.Tensor | np.ndarray) -> Prior:
        """S_0 as given.

        Args:
            S0: (d, d), symmetric positive definite; a singular or indefinite one is refused.
        """
        S = _symmetric("precision", "S0", S0)
        return cls("precision", S.shape[0], {"S0": S})

    @property
    def is_nothing(self) -> bool:
        """Whether S_0 = 0: a ridge with lam = 0."""
        return self.kind == "ridge" and self.lam == 0.0

    @cached_property
    def factor(self) -> PriorFactor:
        """C_0 = T T' in float64.

        Raises:
            ValueError: S_0 is not positive definite (indefinite, for a second moment).
        """
        if self.is_nothing:
            raise ValueError(
                "Prior.ridge: lam is 0, so S_0 is zero and has no inverse: give lam > 0, or use SquareRootState "
                "(RLSFilter with state='square_root'), which can start from nothing"
            )
        if self.kind == "ridge":
            assert self.lam is not None
            return factors.scalar(self.d, 1.0 / self.lam)
        if self.kind == "null_space":
            assert self.l2 is not None
            return factors.from_basis(self.arrays["basis"], self.l2)
        name = {"anchor": "second_moment", "anchor_keys": "K0'K0", "precision": "S0"}[self.kind]
        lift = None if self.kind == "precision" else max(factors.LIFT, RESOLUTION * self._given_eps)
        return factors.from_precision(self.information(), name=f"Prior.{self.kind}: {name}", lift=lift)

    def information(self) -> torch.Tensor:
        """S_0 (d, d) float64 as defined, before any lifting; for a null space its pseudo-inverse sense, l2 P."""
        if self.kind == "precision":
            return self.arrays["S0"].clone()
        if self.kind == "null_space":
            assert self.l2 is not None
            return (self.arrays["basis"] @ self.arrays["basis"].mT) * self.l2
        assert self.lam is not None
        S = torch.zeros(self.d, self.d, dtype=torch.float64, device=self._device())
        if self.kind == "anchor":
            assert self.mu is not None
            S.add_(self.arrays["second_moment"], alpha=self.mu**2)
        elif self.kind == "anchor_keys":
            assert self.mu is not None
            K0 = self.arrays["K0"]
            S.addmm_(K0.mT, K0, alpha=self.mu**2)
            S = (S + S.mT).mul_(0.5)
        S.diagonal().add_(self.lam**2)
        return S

    @property
    def trace(self) -> float:
        """tr(S_0) of what `information` gives, which is not formed for it."""
        if self.kind == "precision":
            return float(self.arrays["S0"].diagonal().sum())
        if self.kind == "null_space":
            assert self.l2 is not None
            return self.l2 * self.arrays["basis"].shape[1]
        assert self.lam is not None
        found = self.d * self.lam**2
        if self.kind == "anchor":
            assert self.mu is not None
            found += self.mu**2 * float(self.arrays["second_moment"].diagonal().sum())
        elif self.kind == "anchor_keys":
            assert self.mu is not None
            found += self.mu**2 * float(self.arrays["K0"].square().sum())
        return found

    def signature(self) -> dict[str, object]:
        """A short description by which a saved state recognises the prior that it was made with."""
        probe = torch.cos(torch.arange(self.d, dtype=torch.float64, device="cpu") * 0.7).to(self._device())
        sums = {name: float((A @ probe[: A.shape[1]]).square().sum()) for name, A in self.arrays.items()}
        return {"kind": self.kind, "d": self.d, "lam": self.lam, "mu": self.mu, "l2": self.l2, "sums": sums}

    def _device(self) -> torch.device:
        return next(iter(self.arrays.values())).device if self.arrays else torch.device("cpu")

    def __repr__(self) -> str:
        scalars = ", ".join(f"{n}={v:g}" for n in ("lam", "mu", "l2") if (v := getattr(self, n)) is not None)
        return f"Prior.{self.kind}(d={self.d}{', ' if scalars else ''}{scalars})"


def _eps(value: torch.Tensor | np.ndarray) -> float:
    """Machine epsilon of the dtype that an array was given in."""
    info = torch.finfo(value.dtype) if isinstance(value, torch.Tensor) else np.finfo(value.dtype)
    return float(info.eps)


def _number(kind: str, name: str, value: object, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"Prior.{kind}: {name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number) or number < 0.0 or (positive and number == 0.0):
        raise ValueError(f"Prior.{kind}: {name} must be finite and {'> 0' if positive else '>= 0'}, got {value!r}")
    return number


def _not_both_zero(kind: str, mu: float, lam: float) -> None:
    if mu == 0.0 and lam == 0.0:
        raise ValueError(f"Prior.{kind}: lam and mu are both 0: S_0 would be zero; give lam > 0 or mu > 0")


def _matrix(kind: str, name: str, value: torch.Tensor | np.ndarray) -> torch.Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"Prior.{kind}: {name} must be a torch.Tensor or a numpy array, got {type(value).__name__}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"Prior.{kind}: {name} must be floating point, got {value.dtype}")
    if value.dim() != 2 or 0 in value.shape:
        raise ValueError(
            f"Prior.{kind}: {name} must be a matrix with at least one row and column, got {tuple(value.shape)}"
        )
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"Prior.{kind}: {name} must be finite, got NaN or Inf")
    return value.detach().to(torch.float64, copy=True)


def _symmetric(kind: str, name: str, value: torch.Tensor | np.ndarray) -> torch.Tensor:
    A = _matrix(kind, name, value)
    if A.shape[0] != A.shape[1]:
        raise ValueError(f"Prior.{kind}: {name} must be square (d, d), got {tuple(A.shape)}")
    skew = float((A - A.mT).abs().max())
    if skew > _SYMMETRY * float(A.abs().max()):
        raise ValueError(
            f"Prior.{kind}: {name} must be symmetric, got a largest difference of {skew:.2e} to its transpose"
        )
    return (A + A.mT).mul_(0.5)


def _orthonormal(Q: torch.Tensor) -> torch.Tensor:
    off = float((Q.mT @ Q - torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)).abs().max())
    if off > _PROJECTOR:
        raise ValueError(f"Prior.null_space: the columns of a basis must be orthonormal, got Q'Q - I of {off:.2e}")
    # Once more in float64: a basis that was orthonormal to float32 becomes so to float64, span unchanged.
    return torch.linalg.qr(Q)[0]


def _basis_of_projector(P: torch.Tensor) -> torch.Tensor:
    scale = max(float(P.abs().max()), 1e-300)
    skew = float((P - P.mT).abs().max())
    values, vectors = torch.linalg.eigh((P + P.mT).mul_(0.5))
    off = float(torch.minimum(values.abs(), (values - 1.0).abs()).max())
    if skew > _PROJECTOR * scale or off > _PROJECTOR:
        raise ValueError(
            "Prior.null_space: a projector must be symmetric with eigenvalues 0 and 1, "
            f"got asymmetry {skew:.2e} and eigenvalues off by {off:.2e}"
        )
    Q = vectors[:, values > 0.5]
    if Q.shape[1] == 0:
        raise ValueError("Prior.null_space: the projector is zero: nothing could be written; lower the threshold")
    return Q.contiguous()
