"""Keys of which one direction is 1e8 times as large as the others, and how far a covariance of them is off."""

from __future__ import annotations

from typing import Any

import torch

D, U = 8, 4


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def keys(batch: int, dtype: torch.dtype, size: float = 1e8) -> torch.Tensor:
    K = randn(U, D, seed=100 + batch)
    K[:, 0] *= size
    return K.to(dtype)


def off(
    mp: Any,
    C: torch.Tensor,
    root: torch.Tensor | None,
    batches: list[tuple[torch.Tensor, float]],
    S_0: torch.Tensor | None = None,
) -> float:
    """|S^1/2' C S^1/2 - I| of S = S_0 + sum K'K / noise, S_0 = I if it is not given, C given or as its root."""
    S = mp.eye(D) if S_0 is None else mp.matrix(S_0.tolist())
    for K, noise in batches:
        k = mp.matrix(K.double().tolist())
        S += k.T * k / mp.mpf(noise)
    L = mp.cholesky(S)
    if root is None:
        product = L.T * mp.matrix(C.double().tolist()) * L
    else:
        half = L.T * mp.matrix(root.double().tolist())
        product = half * half.T
    return float(mp.mnorm(product - mp.eye(D), "f"))
