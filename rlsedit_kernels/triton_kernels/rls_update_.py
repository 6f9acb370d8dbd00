"""The whole commit: gain of a batch, and C <- (C - Z Z') / forget, in five launches and without a look at info.

    gain_products, its reduction -> Cholesky and inverse of forget noise I + G -> gain, Z -> downdate where info == 0

    C (d, d) ==> Y (d, u) -> G (u, u) -> V = L^-1 (u, u)      tiles: 64 rows of C and all keys; the whole of G;
                     |                       |                64 rows of Y; lower 64 x 64 tiles of C, mirrored
                     +---------> Z, gain <---+   ==> C

Bytes: 2.5 d^2 and about 8 d u; flops 3 d^2 u + 4 d u^2.
"""

from __future__ import annotations

import torch

from rlsedit_kernels.triton_kernels import launch
from rlsedit_kernels.triton_kernels.downdate_ import change_
from rlsedit_kernels.triton_kernels.gain_products import gain_products
from rlsedit_kernels.triton_kernels.gain_solve import gain_solve


@launch.on_its_device
def rls_update_(
    C: torch.Tensor, K: torch.Tensor, noise: float = 1.0, forget: float = 1.0, *, input_precision: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.rls_update_`."""
    Y, G = gain_products(C, K, input_precision=input_precision)
    gain, Z, info = gain_solve(Y, G, forget * noise, input_precision=input_precision)
    change_(C, Z, -1.0, 1.0 / forget, info, input_precision)
    return gain, info
