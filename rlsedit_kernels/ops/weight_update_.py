"""weight_update_: W <- W + gain (V - K W) in place, the innovation returned."""

from __future__ import annotations

import torch

from rlsedit_kernels.ops import _checks
from rlsedit_kernels.ops._register import register

OP = "weight_update_"


def fake(W: torch.Tensor, K: torch.Tensor, V: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return torch.empty(V.shape, dtype=W.dtype, device=W.device)


register(OP, fake)


def weight_update_(W: torch.Tensor, K: torch.Tensor, V: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """What a batch does to the weight: W <- W + gain (V - K W), in place.

    The other half of a batch beside `rls_update_`, whose gain it takes: K W moves towards V, all the way as noise goes
    to 0. An `nn.Linear` stores the transpose of W: pass `layer.weight.data.mT`.

    Args:
        W: (..., d, v) float32 or float64, any strides; changed.
        K: (..., u, d) keys, dtype, device and leading dimensions of W; u >= 1.
        V: (..., u, v) targets.
        gain: (..., d, u).

    Returns:
        The innovation V - K W of before, (..., u, v), contiguous.

    Raises:
        TypeError, ValueError: dtype, device or shape do not fit, or W overlaps itself
            or another argument.

    Numerics: sums in the dtype of W. 4 d u v flops; W is read twice and written once. The gain of a factor that failed
    (`info` of `rls_update_` or `gain_solve`) is NaN, and W then becomes NaN too: look at `info` first.
    """
    W = _checks.matrix(OP, "W", W, "d", "v")
    # Sizes, and what a message says of them.
    d, v = ("d = W.shape[-2]", W.shape[-2]), ("v = W.shape[-1]", W.shape[-1])
    hint = f": W is {tuple(W.shape)}, which is (..., d, v); an nn.Linear stores the transpose, layer.weight.data.mT"
    K = _checks.fitting(OP, "K", K, "W", W, ("u", None), d, hint=hint)
    u = ("u = K.shape[-2]", K.shape[-2])
    V = _checks.fitting(OP, "V", V, "W", W, u, v)
    gain = _checks.fitting(OP, "gain", gain, "W", W, d, u)
    _checks.writable(OP, "W", W, K=K, V=V, gain=gain)
    return torch.ops.rlsedit_kernels.weight_update_.default(W, K, V, gain)
