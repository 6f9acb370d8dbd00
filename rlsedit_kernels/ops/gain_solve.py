"""gain_solve: gain = Y (noise I + G)^-1 and the columns Z of the downdate, from one Cholesky factor."""

from __future__ import annotations

import torch

from rlsedit_kernels.ops import _checks
from rlsedit_kernels.ops._register import register

OP = "gain_solve"


def fake(Y: torch.Tensor, G: torch.Tensor, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return Y.new_empty(Y.shape), Y.new_empty(Y.shape), Y.new_empty(Y.shape[:-2], dtype=torch.int32)


register(OP, fake)


def gain_solve(Y: torch.Tensor, G: torch.Tensor, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gain of a batch and the columns by which its commit downdates the covariance.

    With L L' = noise I + G:  Z = Y L^-T,  gain = Z L^-1 = Y (noise I + G)^-1,  Z Z' = gain Y'.

    Args:
        Y: (..., d, u) = C K'.
        G: (..., u, u) = K Y, symmetric (the lower triangle is read); dtype, device, leading dimensions of Y.
        noise: >= 0 and finite in the dtype of Y; 0 is a hard write and needs a positive definite G.

    Returns:
        gain (..., d, u), Z (..., d, u), contiguous, and info (...) int32 as that of `cholesky`; gain and Z
        are NaN where info != 0.

    Raises:
        TypeError, ValueError: dtype, device, shape or noise do not fit.

    Numerics: two triangular solves, row-wise backward stable (Higham, theorem 8.5).
    """
    Y = _checks.matrix(OP, "Y", Y, "d", "u")
    u = ("u = Y.shape[-1]", Y.shape[-1])
    G = _checks.fitting(OP, "G", G, "Y", Y, u, u)
    return torch.ops.rlsedit_kernels.gain_solve.default(Y, G, _checks.noise(OP, noise, Y.dtype))
