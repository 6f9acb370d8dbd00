"""C <- C + alpha Z Z' in place, then Y = C K' and G = K Y of the new C: one pass over C.

A program owns a block of rows. It walks along them tile by tile, changes each tile, writes it back, and multiplies it
with the next keys while it is there:

            +------+------+------+----
    rows I: | C_I0 | C_I1 | C_IJ | ..      C_IJ += alpha Z_I Z_J' ;  Y_I += C_IJ K_J'
            +------+------+------+----

No tile is touched by two programs, so nothing waits. A tile above the diagonal is formed as the transpose of the one
below, from the same numbers in the same order: C stays exactly symmetric although both halves are computed.

Bytes: 2 d^2, against 2.5 d^2 of the two ops one after the other; flops 4 d^2 u, against 3 d^2 u. For u beyond the keys
of a tile (tuning.py) the two ops run one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsedit_kernels.triton_kernels import launch, tuning
from rlsedit_kernels.triton_kernels.blocks import load, store
from rlsedit_kernels.triton_kernels.downdate_ import downdate_
from rlsedit_kernels.triton_kernels.gain_products import gain_products, reduce


@triton.jit(do_not_specialize=["alpha", "blocks"])
def downdate_gain_products_kernel(
    C, Z, K, Y, P, alpha, d, w, u, blocks,
    c_b, c_r, c_c, z_b, z_r, z_c, k_b, k_r, k_c, y_b, y_r, y_c,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of rows of C and of Y, and what it adds to G."""
    dtype = C.dtype.element_ty
    own = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    i = (own * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    keys = tl.arange(0, KEYS).to(tl.int64)
    C += b * c_b
    Z += b * z_b
    K += b * k_b
    factor = launch.scalar(alpha, dtype)
    acc = tl.zeros((ROWS, KEYS), dtype=dtype)
    for other in range(0, blocks):
        j = (other * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        low = tl.where(own >= other, i, j)
        high = tl.where(own >= other, j, i)
        change = tl.zeros((ROWS, ROWS), dtype=dtype)
        for start in range(0, w, STEP):
            k = (start + tl.arange(0, STEP)).to(tl.int64)
            left = load(Z, low[:, None], k[None, :], d, w, z_r, z_c)
            right = load(Z, high[None, :], k[:, None], d, w, z_r, z_c)
            change = tl.dot(left, right, change, input_precision=PRECISION, out_dtype=dtype)
        tile = load(C, i[:, None], j[None, :], d, d, c_r, c_c)
        below = tile + factor * change
        above = tile + factor * tl.trans(change)
        tile = tl.where((own > other) | ((own == other) & (i[:, None] >= j[None, :])), below, above)
        store(C, tile, i[:, None], j[None, :], d, d, c_r, c_c)
        part = load(K, keys[None, :], j[:, None], u, d, k_r, k_c)
        acc = tl.dot(tile, part, acc, input_precision=PRECISION, out_dtype=dtype)
    store(Y + b * y_b, acc, i[:, None], keys[None, :], d, u, y_r, y_c)
    left = load(K, keys[:, None], i[None, :], u, d, k_r, k_c)
    part = tl.dot(left, acc, input_precision=PRECISION, out_dtype=dtype)
    store(P + (b * blocks + own) * u * u, part, keys[:, None], keys[None, :], u, u, u, 1)


@launch.on_its_device
def downdate_gain_products_(
    C: torch.Tensor, Z: torch.Tensor, K: torch.Tensor, alpha: float = -1.0, *, input_precision: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.downdate_gain_products_`."""
    d, w, u = C.shape[-1], Z.shape[-1], K.shape[-2]
    t = tuning.tiles("downdate_gain_products_", C, u)
    if u > t.keys:
        downdate_(C, Z, alpha, input_precision=input_precision)
        return gain_products(C, K, input_precision=input_precision)
    Y, G = C.new_empty((*C.shape[:-1], u)), C.new_empty((*C.shape[:-2], u, u))
    used, blocks = launch.precision(C, input_precision), launch.ceil_div(d, t.rows)
    for c, z, k, y, g in launch.views(launch.by_rows(C), Z, K, Y, G):
        P = C.new_empty((c.shape[0], blocks, u, u))
        downdate_gain_products_kernel[blocks, c.shape[0]](
            c, z, k, y, P, launch.bits(alpha), d, w, u, blocks, *c.stride(), *z.stride(), *k.stride(), *y.stride(),
            ROWS=t.rows, KEYS=t.keys, STEP=min(t.depth, 32), PRECISION=used,
            num_warps=t.warps, num_stages=t.stages, **launch.LAUNCH,
        )  # fmt: skip
        reduce(P, g)
    return Y, G
