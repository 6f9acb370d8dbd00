"""What all stand-ins share: moves and casts that mean nothing to them, and a refusal of everything unknown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

VERIFIED = 1e-3
"""Largest relative difference to the original solve that `verify` lets pass; published code solves in float32."""

SAME_KEYS = 1e-3
"""Largest relative difference between the trace of K K' and |K|^2 of the keys it should be made of."""

Handler = Callable[..., Any]


class VerificationError(ValueError):
    """The first batch differs from what the original solve gives."""


class Stand:
    """Base of the stand-ins.

    Attributes:
        shape, dtype, device: those of what it stands for; code asks for them to make an identity beside it.
    """

    handlers: Mapping[Any, Handler] = {}
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    def like(self, other: Any) -> None:
        """Take shape, dtype and device over."""
        self.shape, self.dtype, self.device = tuple(other.shape), other.dtype, other.device

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As of a tensor."""
        return len(self.shape)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for kind in types:
            if issubclass(kind, Stand) and func in kind.handlers:
                return kind.handlers[func](*args, **(kwargs or {}))
        names = [kind.__name__ for kind in types]
        raise TypeError(
            f"dropin: {getattr(func, '__name__', func)} of {names} is no part of an expression that is known here; "
            "this code is of another version than docs/dropin.md describes"
        )

    def to(self, *_: Any, **__: Any) -> Any:
        """Itself: a state lives where the keys are."""
        return self

    cuda = cpu = float = double = half = bfloat16 = detach = contiguous = to

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(
            f"dropin: arithmetic with {type(self).__name__} is no part of the solve that is known here; this code is "
            "of another version than docs/dropin.md describes"
        )

    __add__ = __radd__ = __iadd__ = __sub__ = __rsub__ = __isub__ = __neg__ = _refuse
    __mul__ = __rmul__ = __imul__ = __truediv__ = __rtruediv__ = __itruediv__ = __pow__ = _refuse
    __matmul__ = __rmatmul__ = __imatmul__ = _refuse


def add(handler: Handler) -> dict[Any, Handler]:
    """Handlers for tensor + stand."""
    return dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), handler)


def matmul(handler: Handler) -> dict[Any, Handler]:
    """Handlers for tensor @ stand."""
    return dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__), handler)


def check_keys(gram: Tensor, keys: Tensor) -> None:
    """Refuse a Gram matrix K K' (d, d) that is not that of the keys (d, u), by its trace.

    Raises:
        ValueError: they do not belong together.
    """
    have, want = float(gram.diagonal().double().sum()), float(keys.double().square().sum())
    if not abs(have - want) <= SAME_KEYS * max(want, 1e-30):
        raise ValueError(
            f"dropin: K K' must be that of the keys of this batch, got trace {have:.6g} beside |K|^2 = {want:.6g}; is "
            "there another term in the system?"
        )


def verify(found: Tensor, system: Tensor, right: Tensor, what: str) -> None:
    """Compare with the original solve, in float64.

    Raises:
        VerificationError: they differ by more than `VERIFIED` in the Frobenius norm.
    """
    with torch.no_grad():  # residuals may come out of an optimisation, with its graph
        exact = torch.linalg.solve(system.double(), right.double())
        error = float(torch.linalg.norm(found.double() - exact) / torch.linalg.norm(exact).clamp_min(1e-300))
    if not error <= VERIFIED:
        raise VerificationError(
            f"dropin: the first batch of {what} differs from the original solve by {error:.2e} (relative); weights and "
            "state are as they were. Is the prior the one that this code uses?"
        )


def rows_of(gram: Tensor) -> Tensor:
    """Rows A (r, d) float64 with A'A = gram, for a cache of earlier keys that is handed over."""
    values, vectors = torch.linalg.eigh(gram.double())
    keep = values > values[-1].clamp_min(0) * 1e-12
    return (vectors[:, keep] * values[keep].sqrt()).T
