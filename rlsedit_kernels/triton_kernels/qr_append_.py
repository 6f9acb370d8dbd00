"""R'R <- R'R + K'K for an upper triangular R: `qr_append_rhs_` without a right-hand side.

    R   +---+---+---+    a program owns 32 columns of R and of K: for every panel before its own it waits until
        | 0 | . | j |    that is reduced, corrects its tile there and its part of K; then it reduces its own
    K   +---+---+---+

Bytes: d^2 of R once and d / 32 times the rows, which stay in the second-level cache; flops 2 d^2 u.
"""

from __future__ import annotations

import torch

from rlsedit_kernels.triton_kernels import launch
from rlsedit_kernels.triton_kernels.qr_append_rhs_ import append


@launch.on_its_device
def qr_append_(R: torch.Tensor, K: torch.Tensor, *, input_precision: str | None = None) -> None:
    """See `ops.qr_append_`."""
    append(R, K, None, None, input_precision)
