"""What all stand-ins share: moves and casts that mean nothing to them, and a refusal of everything unknown."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlsedit_kernels.backends.precision import ieee_products
from rlsedit_kernels.states.modes import version

VERIFIED = 1e-3
"""Largest relative difference to the original solve that `verify` lets pass; published code solves in float32."""

Handler = Callable[..., Any]

_DEFAULTS: Mapping[str, Any] = {"alpha": 1, "left": True, "out": None, "unitriangular": False}
"""Keywords of functions of torch that mean nothing with these values."""


class VerificationError(ValueError):
    """The first batch differs from what the original solve gives."""


def require_function(name: str, given: object) -> None:
    """Raises:
    TypeError: what is to be replaced cannot be called.
    """
    if not callable(given):
        raise TypeError(f"dropin.{name} must be the function that is replaced, got {type(given).__name__}")


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
                return _call(kind.handlers[func], func, args, kwargs or {})
        names = [kind.__name__ for kind in types]
        raise TypeError(
            f"dropin: {getattr(func, '__name__', func)} of {names} is no part of an expression that is known here; "
            "this code is of another version than docs/dropin.md describes"
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"dropin: {type(self).__name__}.{name} is no part of the solve that is known here; this code is of another "
            "version than docs/dropin.md describes"
        )

    def to(self, *_: Any, **__: Any) -> Any:
        """Itself: a state lives where the keys are."""
        return self._moved()

    def _moved(self) -> Any:
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


def _call(handler: Handler, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call it with the keywords that mean something; one that it does not know changes the expression."""
    told = {key: value for key, value in kwargs.items() if not _is_default(key, value)}
    try:
        inspect.signature(handler).bind(*args, **told)
    except TypeError:
        name, words = getattr(func, "__name__", func), ", ".join(f"{key}={told[key]!r:.40}" for key in told)
        raise TypeError(
            f"dropin: {name} with {len(args)} operands and ({words}) is no part of the known solve"
        ) from None
    return handler(*args, **told)


def _is_default(key: str, value: Any) -> bool:
    return key in _DEFAULTS and (value is None or isinstance(value, (int, float))) and value == _DEFAULTS[key]


class Held:
    """A tensor that an expression was written with, and that must be the same when the expression is worth something.

    Torch would have computed with its values at once; here they are read later.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, version(tensor)

    def read(self, name: str) -> Tensor:
        """The tensor.

        Raises:
            ValueError: it was changed in place since.
        """
        if version(self._tensor) != self._version:
            raise ValueError(f"dropin: {name} was changed in place between the expression and its solve")
        return self._tensor

    def is_same(self, other: Tensor) -> bool:
        """Whether another tensor has the dtype, device and elements that this one was held with."""
        mine = self._tensor
        alike = version(mine) == self._version and other.dtype == mine.dtype and other.device == mine.device
        return alike and torch.equal(other, mine)


def layer_of(where: str, key: Any, count: int) -> int:
    """The layer that an index like i or (i, :, :) means.

    Raises:
        TypeError: it is no index of one of `count` layers.
    """
    first, *rest = key if isinstance(key, tuple) else (key,)
    try:
        found = operator.index(first)
    except TypeError:
        found = count
    whole = all(part is Ellipsis or (isinstance(part, slice) and part == slice(None)) for part in rest)
    if isinstance(first, bool) or not -count <= found < count or not whole:
        raise TypeError(f"dropin.{where}: matrices are taken layer by layer, as in P[i, :, :], got [{key!r}]")
    return found % count


def check_shape(where: str, name: str, tensor: object, *shape: int) -> Tensor:
    """The tensor.

    Raises:
        TypeError: it is none.
        ValueError: it has another shape; -1 stands for any size.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"dropin.{where}: {name} must be a tensor, got {type(tensor).__name__}")
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(want not in (-1, have) for want, have in zip(shape, got, strict=True)):
        raise ValueError(f"dropin.{where}: {name} must have shape {shape}, got {got}")
    return tensor


def check_on(where: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Refuse a tensor that does not lie where the keys lie: torch would, too.

    Raises:
        ValueError: it lies elsewhere.
    """
    if tensor.device != device:
        raise ValueError(f"dropin.{where}: {name} must be on the device of the keys, {device}, got {tensor.device}")


def add(handler: Handler) -> dict[Any, Handler]:
    """Handlers for tensor + stand."""
    return dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), handler)


def matmul(handler: Handler) -> dict[Any, Handler]:
    """Handlers for tensor @ stand."""
    return dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__), handler)


def verify(found: Tensor, system: Tensor, right: Tensor, what: str) -> None:
    """Compare with the original solve, in float64.

    Raises:
        VerificationError: they differ by more than `VERIFIED` in the Frobenius norm.
    """
    with torch.no_grad(), ieee_products():  # residuals may come out of an optimisation, with its graph
        exact = torch.linalg.solve(system.double(), right.double())
        error = float(torch.linalg.norm(found.double() - exact) / torch.linalg.norm(exact).clamp_min(1e-300))
    if not error <= VERIFIED:
        raise VerificationError(
            f"dropin: the first batch of {what} differs from the original solve by {error:.2e} (relative); weights and "
            "state are as they were. Is the prior the one that this code uses?"
        )


def rows_of(gram: Tensor) -> Tensor:
    """Rows A (r, d) float64 with A'A = gram, for a cache of earlier keys (d, d) that is handed over.

    Raises:
        ValueError: it has a negative eigenvalue beyond its rounding error, and so is no sum of K K'.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    low, high = torch.stack([values[0], values[-1]]).tolist()
    if not low >= -max(_NEGATIVE, 4.0 * torch.finfo(gram.dtype).eps) * max(high, 0.0):
        raise ValueError(
            f"dropin: a cache of earlier keys must be a sum of K K', got the eigenvalue {low:.3g} beside {high:.3g}"
        )
    keep = values > values[-1].clamp_min(0) * 1e-12
    return (vectors[:, keep] * values[keep].sqrt()).T


_NEGATIVE = 1e-4
"""Largest negative eigenvalue of a sum of K K', relative to the largest one, that rounding in float32 explains."""
