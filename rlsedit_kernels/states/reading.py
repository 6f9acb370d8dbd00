"""Numbers read from a device at once: every reading makes the host wait for all that was launched before it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_ROWS = 64
_CACHED = 1 << 18
_ELEMENTS = 1 << 22


def scalars(asked: Sequence[torch.Tensor]) -> list[float]:
    """Numbers () of any dtype, read at once."""
    if all(one.device.type == "cpu" for one in asked):  # nothing to wait for
        return [float(one) for one in asked]
    return torch.stack([one.to(torch.float64) for one in asked]).tolist()


def blocks(A: torch.Tensor, size: int = _ROWS, dim: int = 0) -> tuple[torch.Tensor, ...]:
    """Blocks of `size` rows or columns, more where they are short: small enough for a CPU's cache.

    On a GPU, where each is a launch, large ones.
    """
    elements = _CACHED if A.device.type == "cpu" else _ELEMENTS
    size = max(size, elements // max(A.shape[1 - dim], 1))
    return (A,) if A.shape[dim] <= size else A.split(size, dim)


class Norms:
    """Frobenius norms, accumulated in float64 without a float64 copy; asked for one by one and read at once."""

    def __init__(self) -> None:
        self._parts: list[list[torch.Tensor]] = []

    def ask(self, A: torch.Tensor | None = None) -> int:
        """For the norm of A, and of what `add` adds to it; its place in what `read` gives."""
        self._parts.append([])
        if A is not None:
            self.add(len(self._parts) - 1, A)
        return len(self._parts) - 1

    def add(self, place: int, A: torch.Tensor) -> None:
        """Make the norm at `place` one of A as well."""
        parts = blocks(A)
        if A.device.type != "cpu" or A.dtype == torch.float64 or len(parts) == 1:  # a CPU makes a float64 copy of each
            self._parts[place] += [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
            return
        wide = torch.empty_like(parts[0], dtype=torch.float64)
        self._parts[place] += [torch.linalg.vector_norm(wide[: len(part)].copy_(part)) for part in parts]

    def read(self, *more: torch.Tensor) -> tuple[list[float], list[float]]:
        """The norms, and the numbers in these tensors, all in one reading."""
        numbers = [part for row in self._parts for part in row]
        numbers += [number for one in more for number in one.reshape(-1).unbind()]
        found = iter(scalars(numbers))
        norms = [math.hypot(*(next(found) for _ in row)) for row in self._parts]
        return norms, list(found)


def norm(A: torch.Tensor) -> float:
    """Frobenius norm, accumulated in float64, without a float64 copy of A."""
    asked = Norms()
    asked.ask(A)
    return asked.read()[0][0]


def squared_norm(A: torch.Tensor) -> float:
    """|A|^2 in the Frobenius norm, as `norm`; infinite where it is too large."""
    size = norm(A)
    return size * size
