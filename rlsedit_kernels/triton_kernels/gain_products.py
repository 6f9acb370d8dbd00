"""Y = C K' (d, u) and G = K Y (u, u), one pass over C.

A program takes a block of rows of C and a block of keys, and walks along the rows:

              d                     keys
      +---------------+            +--+
    d |  ===[C]====>  | x   K'  =  |Y_| --> partial G = K[:, rows] Y_ , summed over row blocks in a second kernel,
      +---------------+            +--+     in a fixed order: the same bits from run to run

Bytes: d^2 of C once (u <= 128), 2 d u of K and Y; flops 2 d^2 u + 2 d u^2. G comes out exactly symmetric: the two sums
for (i, j) and (j, i) are added before they are halved. A partial G for every 64 rows is little for a usual batch;
one of thousands of keys, where it would fill the memory, is two plain products instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsedit_kernels.triton_kernels import launch, tuning
from rlsedit_kernels.triton_kernels.blocks import load, store
from rlsedit_kernels.triton_kernels.weight_update_ import product

MOST_PARTS = 2**28
"""Elements that the partial G may take together."""


@triton.jit(do_not_specialize=["blocks"])
def gain_products_kernel(
    C, K, Y, P, d, u, blocks,
    c_b, c_r, c_c, k_b, k_r, k_c, y_b, y_r, y_c,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of Y, and what it adds to G: P (b, blocks, u, u) contiguous."""
    dtype = C.dtype.element_ty
    block = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    keys = (tl.program_id(1) * KEYS + tl.arange(0, KEYS)).to(tl.int64)
    C += b * c_b
    K += b * k_b
    acc = tl.zeros((ROWS, KEYS), dtype=dtype)
    for start in range(0, d, DEPTH):
        k = (start + tl.arange(0, DEPTH)).to(tl.int64)
        tile = load(C, rows[:, None], k[None, :], d, d, c_r, c_c)
        part = load(K, keys[None, :], k[:, None], u, d, k_r, k_c)
        acc = tl.dot(tile, part, acc, input_precision=PRECISION, out_dtype=dtype)
    store(Y + b * y_b, acc, rows[:, None], keys[None, :], d, u, y_r, y_c)
    P += (b * blocks + block) * u * u
    SPAN: tl.constexpr = min(KEYS, 64)  # this product, not the one above, decides on the shared memory
    for start in tl.range(0, u, SPAN, num_stages=1):
        i = (start + tl.arange(0, SPAN)).to(tl.int64)
        left = load(K, i[:, None], rows[None, :], u, d, k_r, k_c)
        part = tl.dot(left, acc, input_precision=PRECISION, out_dtype=dtype)
        store(P, part, i[:, None], keys[None, :], u, u, u, 1)


@triton.jit(do_not_specialize=["blocks"])
def reduce_kernel(P, G, u, blocks, g_b, g_r, g_c, SIDE: tl.constexpr, STEP: tl.constexpr):
    """G[i, j] = G[j, i] = half of sum_m P[m, i, j] + sum_m P[m, j, i], one lower tile a program."""
    dtype = G.dtype.element_ty
    if tl.program_id(0) >= tl.program_id(1):
        b = tl.program_id(2).to(tl.int64)
        i = (tl.program_id(0) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
        j = (tl.program_id(1) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
        P += b * blocks * u * u
        here = tl.zeros((SIDE, SIDE), dtype=dtype)
        there = tl.zeros((SIDE, SIDE), dtype=dtype)
        for start in range(0, blocks, STEP):
            for step in tl.static_range(STEP):  # loads that do not wait for each other
                m = tl.cast(start + step, tl.int64)
                rows = tl.where(m < blocks, u, 0)
                here += load(P + m * u * u, i[:, None], j[None, :], rows, u, u, 1)
                there += load(P + m * u * u, j[:, None], i[None, :], rows, u, u, 1)
        tile = 0.5 * (here + tl.trans(there))
        store(G + b * g_b, tile, i[:, None], j[None, :], u, u, g_r, g_c)
        store(G + b * g_b, tile, i[:, None], j[None, :], u, u, g_c, g_r)


def reduce(P: torch.Tensor, G: torch.Tensor) -> None:
    """G (b, u, u) from the partial sums P (b, blocks, u, u)."""
    batch, blocks, u, _ = P.shape
    side = launch.ceil_div(u, 16)
    reduce_kernel[side, side, batch](P, G, u, blocks, *G.stride(), SIDE=16, STEP=8, num_warps=4, **launch.LAUNCH)


def _by_products(C: torch.Tensor, K: torch.Tensor, Y: torch.Tensor, G: torch.Tensor, used: str) -> None:
    """Y and G without partial sums of G, as two plain products."""
    Y.zero_()
    G.zero_()
    product(Y, C, K.mT, Y, 1, used)
    product(G, K, Y, G, 1, used)
    G.copy_(0.5 * (G + G.mT))


@launch.on_its_device
def gain_products(
    C: torch.Tensor, K: torch.Tensor, *, input_precision: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.gain_products`."""
    d, u = C.shape[-1], K.shape[-2]
    Y, G = C.new_empty((*C.shape[:-1], u)), C.new_empty((*C.shape[:-2], u, u))
    used, t = launch.precision(C, input_precision), tuning.tiles("gain_products", C, u)
    blocks = launch.ceil_div(d, t.rows)
    for c, k, y, g in launch.views(launch.by_rows(C), K, Y, G):
        if c.shape[0] * blocks * u * u > MOST_PARTS:
            _by_products(c, k, y, g, used)
            continue
        P = C.new_empty((c.shape[0], blocks, u, u))
        gain_products_kernel[blocks, launch.ceil_div(u, t.keys), c.shape[0]](
            c, k, y, P, d, u, blocks, *c.stride(), *k.stride(), *y.stride(),
            ROWS=t.rows, KEYS=t.keys, DEPTH=t.depth, PRECISION=used,
            num_warps=t.warps, num_stages=t.stages, **launch.LAUNCH,
        )  # fmt: skip
        reduce(P, g)
    return Y, G
