"""gain = Y (noise I + G)^-1 and Z = Y L^-T with L L' = noise I + G: two launches.

The first factors and inverts L (cholesky.py); in the second a program takes a block of rows of Y:

              K <= J                 J                       K >= J                J
            +---------+           +-----+                  +---------+         +--------+
    rows of | Y_K ==> |  V_JK' =  | Z_J |          rows of | Z_K ==> | V_KJ =  | gain_J |
            +---------+           +-----+                  +---------+         +--------+

    Z_J    = sum_{K <= J} Y_K V_JK'      V = L^-1, tiles of keys J, K
    gain_J = sum_{K >= J} Z_K V_KJ       Z comes back from the cache, after a barrier

Bytes: 3 d u; flops 2 d u^2. Where info != 0 gain and Z are NaN. Up to 32 keys "tf32x3" is IEEE: sums of few terms do
not average what TF32 leaves out, and there is little to multiply.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsedit_kernels.triton_kernels import launch, tuning
from rlsedit_kernels.triton_kernels.blocks import load, store
from rlsedit_kernels.triton_kernels.cholesky import factored


@triton.jit
def gain_solve_kernel(
    Y, V, info, gain, Z, d, u, y_b, y_r, y_c, v_b, z_b,
    ROWS: tl.constexpr, KEYS: tl.constexpr, COMMON: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of rows of gain and Z, both (b, d, u) contiguous."""
    dtype = Y.dtype.element_ty
    u = launch.multiple(u, COMMON)
    y_r = launch.multiple(y_r, COMMON)
    b = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    Y += b * y_b
    V += b * v_b
    Z += b * z_b
    gain += b * z_b
    failed = tl.load(info + b) != 0
    for first in range(0, u, KEYS):
        j = (first + tl.arange(0, KEYS)).to(tl.int64)
        acc = tl.zeros((ROWS, KEYS), dtype=dtype)
        for start in range(0, first + KEYS, KEYS):
            k = (start + tl.arange(0, KEYS)).to(tl.int64)
            y = load(Y, rows[:, None], k[None, :], d, u, y_r, y_c)
            v = load(V, j[None, :], k[:, None], u, u, u, 1)
            acc = tl.dot(y, v, acc, input_precision=PRECISION, out_dtype=dtype)
        acc = tl.where(failed, float("nan"), acc).to(dtype)
        store(Z, acc, rows[:, None], j[None, :], d, u, u, 1)
    tl.debug_barrier()
    for first in range(0, u, KEYS):
        j = (first + tl.arange(0, KEYS)).to(tl.int64)
        acc = tl.zeros((ROWS, KEYS), dtype=dtype)
        for start in range(first, u, KEYS):
            k = (start + tl.arange(0, KEYS)).to(tl.int64)
            z = load(Z, rows[:, None], k[None, :], d, u, u, 1)
            v = load(V, k[:, None], j[None, :], u, u, u, 1)
            acc = tl.dot(z, v, acc, input_precision=PRECISION, out_dtype=dtype)
        acc = tl.where(failed, float("nan"), acc).to(dtype)
        store(gain, acc, rows[:, None], j[None, :], d, u, u, 1)


@launch.on_its_device
def gain_solve(
    Y: torch.Tensor, G: torch.Tensor, noise: float, *, input_precision: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.gain_solve`."""
    d, u = Y.shape[-2:]
    gain, Z = (torch.empty_like(Y, memory_format=torch.contiguous_format) for _ in range(2))
    used, t = launch.precision(Y, input_precision), tuning.tiles("gain_solve", Y, u)
    used = "ieee" if u <= 32 and used == "tf32x3" else used
    _, V, info = factored(G, noise, inverse=True)
    for y, v, flag, g, z in launch.views(Y, V, info[..., None, None], gain, Z):
        common = launch.common(y, u, y.stride(1))
        gain_solve_kernel[launch.ceil_div(d, t.rows), y.shape[0]](
            y, v, flag, g, z, d, u, *y.stride(), v.stride(0), z.stride(0),
            ROWS=t.rows, KEYS=t.keys, COMMON=common, PRECISION=used,
            num_warps=t.warps, num_stages=launch.stages(t.stages, common), **launch.LAUNCH,
        )  # fmt: skip
    return gain, Z, info
