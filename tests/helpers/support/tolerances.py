"""Tolerances, each with its reason. Errors are relative in the Frobenius norm unless said."""

from __future__ import annotations

import numpy as np
import torch

GOLDEN = {torch.float64: 1e-9, torch.float32: 2e-4}
"""Stated with the problems: float64 leaves five digits to the conditioning of the problems."""

GOLDEN_REMOVAL = {torch.float64: 1e-8, torch.float32: 2e-4}
"""Removal divides by 1 - leverage."""

GOLDEN_ANCHOR_32 = 2e-3
"""The anchor problem is the worst conditioned of the five (about 1e5 with its keys)."""


def product(d: int, dtype: torch.dtype) -> float:
    """Sum of d products of random signs: sqrt(d) eps, with a factor for the distribution's tail."""
    return 8.0 * float(np.sqrt(d)) * torch.finfo(dtype).eps


def solve(u: int, condition: float, dtype: torch.dtype) -> float:
    """A Cholesky solve: backward error of a few u eps, times the condition (Higham, theorem 10.4)."""
    return 10.0 * u * condition * torch.finfo(dtype).eps


def relative_error(got: object, expected: object) -> float:
    """|got - expected| / |expected| in the Frobenius norm; infinite where `got` is not finite."""
    a = got.detach().cpu().double().numpy() if isinstance(got, torch.Tensor) else np.asarray(got, dtype=np.float64)
    b = expected.detach().cpu().double().numpy() if isinstance(expected, torch.Tensor) else np.asarray(expected)
    if not np.isfinite(a).all():
        return float("inf")
    norm = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / (norm if norm > 0.0 else 1.0)
