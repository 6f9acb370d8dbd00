"""Checks of what a state is given, shared by all states: shape, dtype, device and values."""

from __future__ import annotations

import math

import torch


def located(device: torch.device | str | None) -> torch.device:
    """A device as its tensors name it, None for the CPU: "cuda" is the current GPU, such as "cuda:0"."""
    asked = torch.device("cpu" if device is None else device)
    return asked if asked.type == "cpu" or asked.index is not None else torch.empty(0, device=asked).device


def checked_keys(op: str, K: object, d: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Keys (u, d) of a stream, finite, in the dtype of the state."""
    if not isinstance(K, torch.Tensor):
        raise TypeError(f"{op}: K must be a torch.Tensor, got {type(K).__name__}")
    if not K.dtype.is_floating_point:
        raise TypeError(f"{op}: K must be floating point, got {K.dtype}")
    if K.dim() != 2 or K.shape[1] != d or K.shape[0] == 0:
        raise ValueError(f"{op}: K must have shape (u, d) with u >= 1 and d = {d}, got {tuple(K.shape)}")
    if K.device != device:
        raise ValueError(f"{op}: K must be on the device of the state, {device}, got {K.device}")
    return finite(op, "K", K.detach().to(dtype))


def checked_basis(op: str, Q: object, d: int) -> torch.Tensor:
    """Directions Q (d, q) with orthonormal columns, in float64."""
    if not isinstance(Q, torch.Tensor):
        raise TypeError(f"{op}: Q must be a torch.Tensor, got {type(Q).__name__}")
    if Q.dim() != 2 or Q.shape[0] != d or not 1 <= Q.shape[1] <= d:
        raise ValueError(f"{op}: Q must have shape (d, q) with d = {d} and 1 <= q <= d, got {tuple(Q.shape)}")
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


def largest_norm(K: torch.Tensor) -> float:
    """Largest squared norm of a row."""
    return float(torch.linalg.vector_norm(K.detach(), dim=1).max()) ** 2


def squared_norm(A: torch.Tensor) -> float:
    """|A|^2 in the Frobenius norm, accumulated in float64."""
    return float(torch.linalg.vector_norm(A, dtype=torch.float64)) ** 2
