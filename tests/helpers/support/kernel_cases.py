"""Arguments for every kernel of the private namespace, by dimensions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from rlsedit_kernels.backends import cuda
from support import builders

ENGINES = {
    "tf32x3": (torch.float32, "tf32x3"),
    "float32": (torch.float32, "ieee"),
    "float64": (torch.float64, "ieee"),
}
"""How products are formed: dtype and `input_precision`."""


def arguments(op: str, dtype: torch.dtype, batch: tuple[int, ...] = (2,), d: int = 77, u: int = 21) -> tuple[Any, ...]:
    """What an op takes, and no more is made: matrices of `batch`, d x d, with u keys; 9 targets."""
    C, K = partial(builders.symmetric, batch, d, dtype, 0), partial(builders.key_batch, batch, u, d, dtype, 1)
    Z, R = partial(builders.columns, batch, d, u, dtype, 2), partial(builders.triangular, batch, d, dtype, 3)
    B, V = partial(builders.columns, batch, d, 9, dtype, 4), partial(builders.key_batch, batch, u, 9, dtype, 5)
    A, G = partial(builders.symmetric, batch, d, dtype, 6), partial(builders.symmetric, batch, u, dtype, 7)
    wanted: dict[str, tuple[Any, ...]] = {
        "gain_products": (C, K),
        "key_products": (B, K),
        "cholesky": (A,),
        "gain_solve": (Z, G, 0.5),
        "downdate_": (C, Z, -0.5),
        "downdate_gain_products_": (C, lambda: 0.1 * Z(), K, -0.5),
        "rls_update_": (C, K, 0.5, 0.9),
        "qr_append_": (R, K),
        "qr_append_rhs_": (R, B, K, V),
        "qr_gain": (R, K),
        "weight_update_": (B, K, V, Z),
        "add_product_": (B, Z, lambda: V().mT, -0.5),
    }
    return tuple(value() if callable(value) else value for value in wanted[op])


def results(op: str, given: tuple[Any, ...], precision: str) -> list[torch.Tensor]:
    """What an op returns, and its arguments as it leaves them."""
    returned = cuda.kernel(op)(*given, input_precision=precision)
    outputs = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
    return [*outputs, *(value for value in given if isinstance(value, torch.Tensor))]
