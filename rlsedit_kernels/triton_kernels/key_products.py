"""Y = K A for a few rows K and any matrix A: the product kernel of `weight_update_`, without targets.

              d              n             a program takes a tile of Y and a part of d; parts are added in order
      +---------------+    +----+
    u |  ===[K]====>  |  d | A  |  =  Y    layers side by side in the grid
      +---------------+    +----+

Bytes: d n; flops 2 d n u.
"""

from __future__ import annotations

import torch

from rlsedit_kernels.triton_kernels import launch
from rlsedit_kernels.triton_kernels.weight_update_ import product


@launch.on_its_device
def key_products(A: torch.Tensor, K: torch.Tensor, *, input_precision: str | None = None) -> torch.Tensor:
    """See `ops.key_products`."""
    used = launch.precision(A, input_precision)
    Y = torch.empty((*K.shape[:-1], A.shape[-1]), dtype=A.dtype, device=A.device)
    nothing = A.new_zeros(1, 1, 1)
    for a, k, y in launch.views(A, K, Y):
        product(nothing.expand(y.shape), k, a, y, 1, used)
    return Y
