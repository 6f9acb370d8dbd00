"""Counts floating-point operations and bytes of a step, by stage, for any code that is made of torch calls.

Bytes are the least that each call has to move: every tensor argument that it reads, once, and every result that it
writes, once; what a cache saves between two calls is not taken off, what a call moves more than once is not put on.
Symmetric results are counted in full, because they are written in full; the ops of this package that work on one
triangle are counted with the half of C that they read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlsedit_kernels.profile.stages import OTHER, metered

__all__ = ["Count", "Counter", "count"]


@dataclass
class Count:
    """Work of one stage.

    Attributes:
        flops: floating-point operations; a multiplication and an addition are two.
        bytes: moved between memory and processor, at least.
        wide: those of `flops` that are done in float64.
    """

    flops: float = 0.0
    bytes: float = 0.0
    wide: float = 0.0

    def scaled(self, factor: float) -> Count:
        """That many times the work."""
        return Count(self.flops * factor, self.bytes * factor, self.wide * factor)

    @classmethod
    def total(cls, parts: Iterable[Count]) -> Count:
        """The sum."""
        parts = list(parts)
        return cls(sum(c.flops for c in parts), sum(c.bytes for c in parts), sum(c.wide for c in parts))


def count(step: Callable[[], object]) -> dict[str, Count]:
    """Run a step once and count its work by stage."""
    counter = Counter()
    with metered(counter), counter:
        step()
    return counter.stages


def _batch(shape: torch.Size) -> int:
    return prod(shape[:-2])


def _mm(a: torch.Tensor, b: torch.Tensor) -> float:
    return 2.0 * a.numel() * b.shape[-1]


def _solve(a: torch.Tensor, b: torch.Tensor, *_: Any) -> float:
    n = a.shape[-1]
    columns = b.shape[-1] if b.dim() == a.dim() else 1
    return _batch(a.shape) * (2.0 / 3.0 * n**3 + 2.0 * n * n * columns)


def _triangular(a: torch.Tensor, b: torch.Tensor, *_: Any) -> float:
    return float(a.shape[-1]) * b.numel()


def _svd(a: torch.Tensor, *_: Any) -> float:
    """By way of a QR factorisation, with both kinds of vectors, as eigenvalues are counted with theirs."""
    n, m = sorted(a.shape[-2:])
    return _batch(a.shape) * (6.0 * m * n * n + 20.0 * n**3)


def _gain_products(C: torch.Tensor, K: torch.Tensor) -> float:
    d, u = C.shape[-1], K.shape[-2]
    return _batch(C.shape) * (2.0 * d * d * u + d * u * u)


def _gain_solve(Y: torch.Tensor, G: torch.Tensor, *_: Any) -> float:
    d, u = Y.shape[-2], Y.shape[-1]
    return _batch(Y.shape) * (u**3 / 3.0 + 2.0 * d * u * u)


def _downdate(C: torch.Tensor, Z: torch.Tensor, *_: Any) -> float:
    return _batch(C.shape) * float(C.shape[-1]) ** 2 * Z.shape[-1]


def _qr_append(R: torch.Tensor, K: torch.Tensor, *_: Any) -> float:
    return _batch(R.shape) * 2.0 * float(R.shape[-1]) ** 2 * K.shape[-2]


def _qr_append_rhs(R: torch.Tensor, B: torch.Tensor, K: torch.Tensor, *_: Any) -> float:
    return _qr_append(R, K) + _batch(R.shape) * 4.0 * R.shape[-1] * K.shape[-2] * B.shape[-1]


# By name without its overload. What is not here counts its bytes alone: it is additions, copies and the like.
_FLOPS: dict[str, Callable[..., float]] = {
    "aten::mm": lambda a, b, *_: _mm(a, b),
    "aten::bmm": lambda a, b, *_: _mm(a, b),
    "aten::mv": lambda a, b: 2.0 * a.numel(),
    "aten::addmv": lambda c, a, b, *_: 2.0 * a.numel(),
    "aten::addmv_": lambda c, a, b, *_: 2.0 * a.numel(),
    "aten::addr": lambda a, *_: 2.0 * a.numel(),
    "aten::addr_": lambda a, *_: 2.0 * a.numel(),
    "aten::dot": lambda a, b: 2.0 * a.numel(),
    "aten::addmm": lambda c, a, b, *_: _mm(a, b),
    "aten::addmm_": lambda c, a, b, *_: _mm(a, b),
    "aten::baddbmm": lambda c, a, b, *_: _mm(a, b),
    "aten::baddbmm_": lambda c, a, b, *_: _mm(a, b),
    "aten::_linalg_solve_ex": _solve,
    "aten::linalg_lu_factor_ex": lambda a, *_: _batch(a.shape) * 2.0 / 3.0 * a.shape[-1] ** 3,
    "aten::linalg_cholesky_ex": lambda a, *_: _batch(a.shape) * a.shape[-1] ** 3 / 3.0,
    "aten::linalg_inv_ex": lambda a, *_: _batch(a.shape) * 2.0 * a.shape[-1] ** 3,
    "aten::cholesky_inverse": lambda a, *_: _batch(a.shape) * 2.0 / 3.0 * a.shape[-1] ** 3,
    "aten::cholesky_solve": lambda b, a, *_: 2.0 * a.shape[-1] * b.numel(),
    "aten::linalg_solve_triangular": _triangular,
    "aten::linalg_lu_solve": lambda a, _pivots, b, *_: 2.0 * a.shape[-1] * b.numel(),
    "aten::_linalg_svd": _svd,
    "aten::linalg_qr": lambda a, *_: (
        _batch(a.shape) * (2.0 * a.shape[-2] * a.shape[-1] ** 2 - 2 / 3 * a.shape[-1] ** 3)
    ),
    "aten::_linalg_eigh": lambda a, *_: _batch(a.shape) * 9.0 * a.shape[-1] ** 3,
    "rlsedit_kernels::gain_products": _gain_products,
    "rlsedit_kernels::cholesky": lambda a: _batch(a.shape) * a.shape[-1] ** 3 / 3.0,
    "rlsedit_kernels::gain_solve": _gain_solve,
    "rlsedit_kernels::downdate_": _downdate,
    "rlsedit_kernels::downdate_gain_products_": lambda C, Z, K, *_: _downdate(C, Z) + _gain_products(C, K),
    "rlsedit_kernels::rls_update_": lambda C, K, *_: _gain_products(C, K) + _gain_solve(K.mT, K) + _downdate(C, K.mT),
    "rlsedit_kernels::weight_update_": lambda W, K, V, gain: 2.0 * _mm(K, W),
    "rlsedit_kernels::qr_append_": _qr_append,
    "rlsedit_kernels::qr_append_rhs_": _qr_append_rhs,
    "rlsedit_kernels::qr_gain": lambda R, K: 2.0 * _batch(R.shape) * float(R.shape[-1]) ** 2 * K.shape[-2],
}

# How often C (R, W) is read and written: one triangle read, all of it written; R has one triangle only. The fused
# update reads C for the products and one triangle of it for the downdate; W is read for the innovation and changed.
_PASSES: dict[str, float] = {
    "rlsedit_kernels::downdate_": 1.5,
    "rlsedit_kernels::downdate_gain_products_": 1.5,
    "rlsedit_kernels::rls_update_": 2.5,
    "rlsedit_kernels::weight_update_": 3.0,
    "rlsedit_kernels::qr_append_": 1.0,
    "rlsedit_kernels::qr_append_rhs_": 1.0,
    "rlsedit_kernels::qr_gain": 1.0,
}

_VIEWS = frozenset({"aten::detach", "aten::alias", "aten::_unsafe_view", "aten::lift_fresh", "aten::empty"})


class Counter(TorchDispatchMode):
    """Adds up the calls it sees, under the stage that is open."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: dict[str, Count] = {}
        self._stage = OTHER

    def begin(self, name: str) -> None:
        self._stage = name

    def end(self, name: str) -> None:
        self._stage = OTHER

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        if name in _VIEWS or func.is_view or name.startswith(("aten::new_empty", "aten::empty_")):
            return out
        entry = self.stages.setdefault(self._stage, Count())
        if name in _FLOPS:
            flops = _FLOPS[name](*args)
            entry.flops += flops
            if args[0].dtype == torch.float64:
                entry.wide += flops
        entry.bytes += self._bytes(name, func, args, kwargs or {}, out)
        return out

    @staticmethod
    def _bytes(name: str, func: Any, args: tuple, kwargs: dict, out: Any) -> float:
        read = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if name in _PASSES:
            first, rest = read[0], read[1:]
            moved = _PASSES[name] * _size(first)
            if name == "rlsedit_kernels::qr_append_rhs_":
                moved += _size(rest[0])  # read below, written here
        else:
            moved, rest = 0.0, read
            if name.endswith("_"):  # in place: what is written is an argument
                moved += _size(read[0])
            if name in ("aten::copy_", "aten::fill_", "aten::zero_"):
                moved -= _size(read[0])  # written, not read
        results = [a for a in tree_leaves(out) if isinstance(a, torch.Tensor)]
        known = {id(a) for a in read}
        return moved + sum(map(_size, rest)) + sum(_size(a) for a in results if id(a) not in known)


def _size(a: torch.Tensor) -> float:
    return float(a.numel() * a.element_size())
