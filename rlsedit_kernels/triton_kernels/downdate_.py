"""C <- scale (C + alpha Z Z') in place, exactly symmetric.

A program takes one tile of the lower triangle, adds the product of two row blocks of Z and stores the tile and its
mirror image; programs above the diagonal return at once:

      | .           |     tile (I, J), I >= J:  C_IJ + alpha Z_I Z_J' -> (I, J) and, transposed, -> (J, I)
      | x .         |     the diagonal tile is mirrored inside: rounding of hi and lo parts (tf32x3) does not commute
      | x x .       |

Bytes: d^2 / 2 read, d^2 written, 2 d u tiles of Z from the cache; flops d^2 u.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsedit_kernels.triton_kernels import launch, tuning
from rlsedit_kernels.triton_kernels.blocks import load, store


@triton.jit(do_not_specialize=["alpha", "scale"])
def downdate_kernel(
    C, Z, info, alpha, scale, d, u,
    c_b, c_r, c_c, z_b, z_r, z_c,
    HAS_INFO: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, COMMON: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One lower tile and its mirror image; nothing where info != 0."""
    dtype = C.dtype.element_ty
    u = launch.multiple(u, COMMON)
    z_r = launch.multiple(z_r, COMMON)
    low, high = tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    wanted = low >= high
    if HAS_INFO:
        wanted = wanted & (tl.load(info + b) == 0)
    if wanted:
        i = (low * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        j = (high * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        Z += b * z_b
        acc = tl.zeros((ROWS, ROWS), dtype=dtype)
        for start in range(0, u, KEYS):
            k = (start + tl.arange(0, KEYS)).to(tl.int64)
            left = load(Z, i[:, None], k[None, :], d, u, z_r, z_c)
            right = load(Z, j[None, :], k[:, None], d, u, z_r, z_c)
            acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=dtype)
        C += b * c_b
        tile = load(C, i[:, None], j[None, :], d, d, c_r, c_c)
        tile = (tile + launch.scalar(alpha, dtype) * acc) * launch.scalar(scale, dtype)
        if low == high:
            tile = tl.where(i[:, None] >= j[None, :], tile, tl.trans(tile))
        store(C, tile, i[:, None], j[None, :], d, d, c_r, c_c)
        if low != high:
            store(C, tile, i[:, None], j[None, :], d, d, c_c, c_r)


def change_(
    C: torch.Tensor,
    Z: torch.Tensor,
    alpha: float,
    scale: float = 1.0,
    info: torch.Tensor | None = None,
    input_precision: str | None = None,
) -> None:
    """C <- scale (C + alpha Z Z') where info == 0."""
    d, u = Z.shape[-2:]
    used, t = launch.precision(C, input_precision), tuning.tiles("downdate_", C, u)
    flags = torch.empty(C.shape[:-2], dtype=torch.int32, device=C.device) if info is None else info  # not read if new
    blocks = launch.ceil_div(d, t.rows)
    for c, z, flag in launch.views(launch.by_rows(C), Z, flags[..., None, None]):
        common = launch.common(z, u, z.stride(1))
        downdate_kernel[blocks, blocks, c.shape[0]](
            c, z, flag, launch.bits(alpha), launch.bits(scale), d, u, *c.stride(), *z.stride(),
            HAS_INFO=info is not None, ROWS=t.rows, KEYS=t.keys, COMMON=common, PRECISION=used,
            num_warps=t.warps, num_stages=launch.stages(t.stages, common), **launch.LAUNCH,
        )  # fmt: skip


@launch.on_its_device
def downdate_(C: torch.Tensor, Z: torch.Tensor, alpha: float = -1.0, *, input_precision: str | None = None) -> None:
    """See `ops.downdate_`."""
    change_(C, Z, alpha, input_precision=input_precision)
