"""Priors, keys and comparisons for states that are spread over ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import Ranks
from support import builders

KINDS = ("ridge", "anchor", "anchor_keys", "null_space", "precision")


def prior(kind: str, d: int, condition: float = 100.0) -> rk.Prior:
    """A prior of each kind, of this condition where it has one."""
    rng = np.random.default_rng(0)
    if kind == "ridge":
        return rk.Prior.ridge(d, 1.0)
    if kind == "anchor":
        return rk.Prior.anchor(builders.spd(d, condition, rng, 1.0))
    if kind == "anchor_keys":
        return rk.Prior.anchor_keys(rng.standard_normal((2 * d, d)), 1.0, 0.5)
    if kind == "null_space":
        return rk.Prior.null_space(builders.orthogonal(d, rng)[:, : max(1, 2 * d // 3)], 2.0)
    return rk.Prior.precision(builders.spd(d, condition, rng, 1.0))


def keys(u: int, d: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 0.3) -> torch.Tensor:
    """(u, d), the same on every rank."""
    return (torch.randn(u, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def columns(ranks: Ranks, K: torch.Tensor) -> DTensor:
    """The same keys as tensor parallelism leaves them."""
    return ranks.dtensor(K[:, ranks.rows(K.shape[1])].contiguous(), K.shape[1], 1)


def full(value: Any) -> torch.Tensor:
    """A DTensor on one rank; nobody else writes to it."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def gathered(tree: Any) -> Any:
    """A `state_dict` with whole tensors."""
    if isinstance(tree, dict):
        return {name: gathered(value) for name, value in tree.items()}
    return full(tree) if isinstance(tree, torch.Tensor) else tree


def locals_of(state: Any) -> list[torch.Tensor]:
    """Copies of all that a rank keeps of a state."""
    form, probes = state._form, state._probes
    tensors = [value for value in vars(form).values() if isinstance(value, torch.Tensor)] if form is not None else []
    return [value.clone() for value in (*tensors, probes.z, probes.image)]
