"""Small, sound arguments for every op of the schema table."""

from __future__ import annotations

from typing import Any

import torch

from support import builders


def arguments(
    op: str, dtype: torch.dtype, batch: tuple[int, ...] = (), *, d: int = 12, u: int = 5, v: int = 4
) -> tuple[Any, ...]:
    """What `op` takes: keys of d dimensions, u of them, and v columns of targets."""
    C = builders.symmetric(batch, d, dtype, 0)
    K = builders.key_batch(batch, u, d, dtype, 1)
    Z = builders.columns(batch, d, u, dtype, 2) * 0.1
    G = builders.symmetric(batch, u, dtype, 3)
    R = builders.triangular(batch, d, dtype, 5)
    B, V = builders.columns(batch, d, v, dtype, 6), builders.key_batch(batch, u, v, dtype, 7)
    given: dict[str, tuple[Any, ...]] = {
        "gain_products": (C, K),
        "key_products": (B, K),
        "cholesky": (C,),
        "gain_solve": (builders.columns(batch, d, u, dtype, 4), G, 0.5),
        "downdate_": (C, Z, -1.0),
        "downdate_gain_products_": (C, Z, K, -1.0),
        "rls_update_": (C, K, 0.5, 0.9),
        "weight_update_": (B, K, V, Z),
        "qr_append_": (R, K),
        "qr_append_rhs_": (R, B, K, V),
        "qr_gain": (R, K),
    }
    return given[op]


def tensors(returned: object) -> list[torch.Tensor]:
    """What an op returned, as a list."""
    if returned is None:
        return []
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]  # type: ignore[list-item]
