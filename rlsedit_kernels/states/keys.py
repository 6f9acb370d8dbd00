"""Checks of what a state is given, shared by all states: shape, dtype, device and values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlsedit_kernels.ops.contract import aligned
from rlsedit_kernels.states.reading import norm, scalars

_SHORT = 1e-12
"""Below this norm of the longest key squares of its elements may have underflowed in float32."""


@dataclass(frozen=True)
class Keys:
    """Keys of a batch that have been checked, with what their values were read from the device for.

    Methods of states that take keys take these too, and do not check or read them again in the dtype that they have.

    Attributes:
        rows: (u, d), finite, in the dtype and on the device of the state.
        largest: squared norm of the longest key.
        squared: |K|^2, the sum of the squared norms.
    """

    rows: torch.Tensor
    largest: float
    squared: float

    def __len__(self) -> int:
        return self.rows.shape[0]


KeysLike = torch.Tensor | Keys
"""What a method takes: keys as they come, or checked ones."""


@dataclass(frozen=True)
class Values:
    """Targets of a batch that have been checked.

    Attributes:
        rows: (u, v), finite, in the dtype and on the device of the weight.
        size: |V| in the Frobenius norm; infinite where that overflows.
    """

    rows: torch.Tensor
    size: float


def located(device: torch.device | str | None) -> torch.device:
    """A device as its tensors name it, None for the CPU: "cuda" is the current GPU, such as "cuda:0".

    Raises:
        TypeError, ValueError: it is no device, or none that is here.
    """
    if not isinstance(device, (torch.device, str, type(None))):
        raise TypeError(f"device must be a torch.device, a name or None, got {type(device).__name__}")
    try:
        asked = torch.device("cpu" if device is None else device)
        return asked if asked.type == "cpu" else torch.empty(0, device=asked).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device must be cpu, cuda, cuda:1, ..., one that is here, got {str(device)!r}") from error


def checked_keys(op: str, K: object, d: int, dtype: torch.dtype, device: torch.device) -> Keys:
    """Keys (u, d) of a stream, finite, in the dtype of the state; the host waits once."""
    if isinstance(K, Keys):
        if K.rows.dtype == dtype and K.rows.device == device and K.rows.shape[1] == d:
            return K
        K = K.rows
    rows = shaped_keys(op, K, d, dtype, device)
    return measured_keys(op, rows, scalars(measures(rows)))


def shaped_keys(op: str, K: object, d: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The part of `checked_keys` that needs no values: type, shape and device."""
    if not isinstance(K, torch.Tensor):
        raise TypeError(f"{op}: K must be a torch.Tensor, got {type(K).__name__}")
    if not K.dtype.is_floating_point:
        raise TypeError(f"{op}: K must be floating point, got {K.dtype}")
    if K.dim() != 2 or K.shape[1] != d or K.shape[0] == 0:
        raise ValueError(f"{op}: K must have shape (u, d) with u >= 1 and d = {d}, got {tuple(K.shape)}")
    if K.device != device:
        raise ValueError(f"{op}: K must be on the device of the state, {device}, got {K.device}")
    return placed(K.detach().to(dtype))


def placed(rows: torch.Tensor) -> torch.Tensor:
    """`rows`, or a copy where they lie where no kernel reads them (`contract.aligned`): the caller's own memory."""
    return rows if aligned(rows) else rows.clone()


def measures(rows: torch.Tensor) -> list[torch.Tensor]:
    """Two numbers () of keys (u, d), on their device, by which `measured_keys` knows all it wants to."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    return [norms.max(), torch.linalg.vector_norm(norms, dtype=torch.float64)]


def measured_keys(op: str, rows: torch.Tensor, found: Sequence[float]) -> Keys:
    """Keys of which `measures` have been read; ValueError where they hold NaN or Inf."""
    longest, size = found
    if not math.isfinite(size):
        finite(op, "K", rows)
    if not _SHORT <= longest < math.inf:  # finite keys whose squares overflow their dtype, or underflow
        longest, size = float(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).max()), norm(rows)
    return Keys(rows, _square(longest), _square(size))


def shaped_basis(op: str, Q: object, d: int) -> torch.Tensor:
    """The part of `checked_basis` that needs no values: type and shape."""
    if not isinstance(Q, torch.Tensor):
        raise TypeError(f"{op}: Q must be a torch.Tensor, got {type(Q).__name__}")
    if Q.dim() != 2 or Q.shape[0] != d or not 1 <= Q.shape[1] <= d:
        raise ValueError(f"{op}: Q must have shape (d, q) with d = {d} and 1 <= q <= d, got {tuple(Q.shape)}")
    if not Q.dtype.is_floating_point:
        raise TypeError(f"{op}: Q must be floating point, got {Q.dtype}")
    return Q


def checked_basis(op: str, Q: object, d: int) -> torch.Tensor:
    """Directions Q (d, q) with orthonormal columns, in float64."""
    Q = shaped_basis(op, Q, d)
    wide = Q.detach().to(torch.float64)
    off = float((wide.mT @ wide - torch.eye(Q.shape[1], dtype=wide.dtype, device=Q.device)).abs().max())
    if not off <= 1e-4:
        raise ValueError(f"{op}: the columns of Q must be orthonormal, got Q'Q - I of {off:.2e}")
    return wide


def finite(op: str, name: str, value: torch.Tensor) -> torch.Tensor:
    """`value`, or ValueError where it holds NaN or Inf; one reduction, no mask."""
    # A sum is not finite wherever an element is not; where it overflows by itself the elements are looked at.
    if not math.isfinite(float(value.sum())) and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{op}: {name} must be finite, got NaN or Inf")
    return value


def reach(K: Keys) -> str:
    """The largest number of keys, for a message."""
    return f"{float(K.rows.abs().max()):.1e}"


def _square(x: float) -> float:
    return x * x  # x**2 raises where this is infinite


def right_hand_side(
    op: str, B: object, V: object, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """V (u, v) in the dtype of the state, for B (r, v) and shape (r, u); both checked but for their values."""
    r, u = shape
    for name, value in (("B", B), ("V", V)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.device != device:
            raise ValueError(f"{op}: {name} must be on the device of the state, {device}, got {value.device}")
    assert isinstance(B, torch.Tensor)
    assert isinstance(V, torch.Tensor)
    if B.dtype != dtype:
        raise TypeError(f"{op}: B must have the dtype of the state, {dtype}, got {B.dtype}")
    if B.dim() != 2 or B.shape[0] != r:
        raise ValueError(f"{op}: B must have shape (r, v) with r = {r}, got {tuple(B.shape)}")
    if tuple(V.shape) != (u, B.shape[1]):
        raise ValueError(f"{op}: V must have shape (u, v) = {(u, B.shape[1])}, got {tuple(V.shape)}")
    return placed(V.detach().to(dtype))


def pairs(op: str, written: object) -> Iterator[tuple[Any, Any]]:
    """Kept batches, which shall be pairs (K, noise), one by one; TypeError where it comes to something else."""
    return _tuples(op, written, ("K", "noise"))


def triples(op: str, written: object) -> Iterator[tuple[Any, Any, Any]]:
    """The same for (K, V, noise)."""
    return _tuples(op, written, ("K", "V", "noise"))


def _tuples(op: str, written: object, names: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    wanted = f"{'pairs' if len(names) == 2 else 'triples'} ({', '.join(names)})"
    if not isinstance(written, Iterable):
        raise TypeError(f"{op}: batches must be an iterable of {wanted}, got {type(written).__name__}")
    for batch in written:
        if not isinstance(batch, (tuple, list)) or len(batch) != len(names):
            size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise TypeError(f"{op}: batches must be {wanted}, got a {type(batch).__name__}{size}")
        yield tuple(batch)
