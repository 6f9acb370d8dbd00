"""Inputs that are built, not hoped for: symmetric matrices of a given condition, keys of a given kind."""

from __future__ import annotations

import numpy as np
import torch


def orthogonal(d: int, rng: np.random.Generator) -> np.ndarray:
    """A random orthogonal matrix (d, d)."""
    Q, R = np.linalg.qr(rng.standard_normal((d, d)))
    return Q * np.sign(np.diag(R))


def spd(d: int, condition: float, rng: np.random.Generator, largest: float = 1.0) -> np.ndarray:
    """Symmetric positive definite (d, d) with eigenvalues spread geometrically over the given condition."""
    values = largest * np.logspace(0.0, -np.log10(condition), d)
    Q = orthogonal(d, rng)
    A = (Q * values) @ Q.T
    return 0.5 * (A + A.T)


def keys(u: int, d: int, rng: np.random.Generator, kind: str = "plain") -> np.ndarray:
    """Keys (u, d): "plain", "correlated" (a few shared directions), "duplicated" or "tiny" and "huge"."""
    K = rng.standard_normal((u, d)) / np.sqrt(d)
    if kind == "correlated":
        K += rng.standard_normal((u, 2)) @ rng.standard_normal((2, d)) / np.sqrt(d) * 3.0
    elif kind == "duplicated":
        K[u // 2 :] = K[: u - u // 2]
    elif kind == "tiny":
        K *= 1e-6
    elif kind == "huge":
        K *= 1e3
    return K


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers in float32, the same on every device, on that of the tests."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cpu").to(torch.get_default_device())


def tensor(A: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A torch copy in `dtype` on the device of the tests."""
    return torch.from_numpy(np.array(A)).to(dtype).to(torch.get_default_device())


def symmetric(batch: tuple[int, ...], d: int, dtype: torch.dtype, seed: int, condition: float = 100.0) -> torch.Tensor:
    """Exactly symmetric positive definite (*batch, d, d)."""
    rng = np.random.default_rng(seed)
    stack = np.stack([spd(d, condition, rng) for _ in range(int(np.prod(batch, dtype=int)))])
    A = tensor(stack.reshape(*batch, d, d), dtype)
    return (A + A.mT) * 0.5


def key_batch(
    batch: tuple[int, ...], u: int, d: int, dtype: torch.dtype, seed: int, kind: str = "plain"
) -> torch.Tensor:
    """Keys (*batch, u, d)."""
    rng = np.random.default_rng(seed)
    stack = np.stack([keys(u, d, rng, kind) for _ in range(int(np.prod(batch, dtype=int)))])
    return tensor(stack.reshape(*batch, u, d), dtype)


def columns(batch: tuple[int, ...], d: int, u: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Columns (*batch, d, u) of a downdate."""
    return key_batch(batch, u, d, dtype, seed).mT.contiguous()


def triangular(batch: tuple[int, ...], d: int, dtype: torch.dtype, seed: int, condition: float = 100.0) -> torch.Tensor:
    """Upper-triangular factors (*batch, d, d) with a positive diagonal, of matrices of the given condition."""
    A = symmetric(batch, d, torch.float64, seed, condition)
    return torch.linalg.cholesky(A).mT.contiguous().to(dtype)
