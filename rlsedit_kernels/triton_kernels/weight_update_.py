"""E = V - K W and W <- W + gain E in place: what a batch does to the weight, two launches of one product kernel.

A program takes a tile of the result and walks along the shared dimension:  out = base + sign left right

              k                  n                n
      +---------------+        +----+           +----+
    m |  ===[left]==> |  x   k |  | |right =  m | [] |  out      layers side by side in the grid
      +---------------+        |  v |           +----+
                               +----+

K W has few tiles and a long shared dimension: it is cut into parts, so that every multiprocessor has work, and a third
launch adds them in order.
Bytes: 3 d v (W read twice, written once); flops 4 d v u.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsedit_kernels.triton_kernels import launch, tuning
from rlsedit_kernels.triton_kernels.blocks import load, store

PROGRAMS, LEAST = 1024, 512
"""How many programs a product is cut into, and the least that a part takes of the shared dimension."""


@triton.jit(do_not_specialize=["span", "parts"])
def product_kernel(
    base, left, right, out, m, n, k, span, parts, sign,
    b_b, b_r, b_c, l_b, l_r, l_c, r_b, r_r, r_c, o_b, o_r, o_c,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, L_R: tl.constexpr, R_C: tl.constexpr,
):  # fmt: skip
    """out (b, m, n) = base + sign left (b, m, k) right (b, k, n), sign 1 or -1; out may be base.

    Not WHOLE: out (b, parts, m, n), m n apart, takes the product alone, each part `span` of k. K, L_R, R_C: what k,
    l_r and r_c are multiples of.
    """
    dtype = out.dtype.element_ty
    k = launch.multiple(k, K)
    l_r = launch.multiple(l_r, L_R)
    r_c = launch.multiple(r_c, R_C)
    span = launch.multiple(span, DEPTH)
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    acc = tl.zeros((ROWS, COLUMNS), dtype=dtype)
    part = tl.program_id(2) % parts
    b = (tl.program_id(2) // parts).to(tl.int64)
    left += b * l_b
    right += b * r_b
    for start in range(part * span, tl.minimum((part + 1) * span, k), DEPTH):
        p = (start + tl.arange(0, DEPTH)).to(tl.int64)
        x = load(left, i[:, None], p[None, :], m, k, l_r, l_c)
        y = load(right, p[:, None], j[None, :], k, n, r_r, r_c)
        acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=dtype)
    if WHOLE:
        old = load(base + b * b_b, i[:, None], j[None, :], m, n, b_r, b_c)
        store(out + b * o_b, old + sign * acc, i[:, None], j[None, :], m, n, o_r, o_c)
    else:
        store(out + (b * parts + part) * m * n, acc, i[:, None], j[None, :], m, n, o_r, o_c)


@triton.jit(do_not_specialize=["m", "parts"])
def sum_kernel(base, P, out, m, n, parts, sign, b_b, b_r, b_c, o_b, o_r, o_c, WIDTH: tl.constexpr):
    """A piece of a row of out (b, m, n) = base + sign times the sum of P (b, parts, m, n), part after part."""
    i = tl.program_id(0).to(tl.int64)
    j = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    acc = tl.zeros((WIDTH,), dtype=out.dtype.element_ty)
    for part in range(0, parts):
        acc += tl.load(P + ((b * parts + part) * m + i) * n + j, mask=j < n, other=0.0)
    old = tl.load(base + b * b_b + i * b_r + j * b_c, mask=j < n, other=0.0)
    tl.store(out + b * o_b + i * o_r + j * o_c, old + sign * acc, mask=j < n)


def product(
    base: torch.Tensor, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, sign: int, used: str
) -> None:
    """out (b, m, n) = base + sign left (b, m, k) right (b, k, n), sign 1 or -1; out may be base."""
    result = base, out
    # Tensor cores take a right operand of tf32 with adjacent terms, and a left one as it comes.
    turned = right.stride(1) != 1 and left.stride(2) == 1
    if turned:
        base, left, right, out = base.mT, right.mT, left.mT, out.mT
    (batch, m, k), n = left.shape, right.shape[2]
    t = tuning.tiles("gain_products", out, min(m, k))
    columns = 64 if t.rows >= 64 else t.rows
    down, across = launch.ceil_div(m, t.rows), launch.ceil_div(n, columns)
    parts = max(1, min(PROGRAMS // max(1, down * across * batch), k // LEAST))
    span = launch.ceil_div(launch.ceil_div(k, parts), 32) * 32
    parts = launch.ceil_div(k, span)
    if parts > 1:
        P = out.new_empty((batch, parts, *result[1].shape[1:]))
        out = P.mT if turned else P
    fits = [launch.common(out, size) for size in (k, left.stride(1), right.stride(2))]
    product_kernel[down, across, batch * parts](
        base, left, right, out, m, n, k, span, parts, sign,
        *base.stride(), *left.stride(), *right.stride(), out.stride(0), *out.stride()[-2:],
        ROWS=t.rows, COLUMNS=columns, DEPTH=32, WHOLE=parts == 1, PRECISION=used, K=fits[0], L_R=fits[1], R_C=fits[2],
        num_warps=4, num_stages=launch.stages(3, fits[0]), **launch.LAUNCH,
    )  # fmt: skip
    if parts > 1:
        base, out = result
        m, n = out.shape[1:]
        sum_kernel[m, launch.ceil_div(n, 1024), batch](
            base, P, out, m, n, parts, sign, *base.stride(), *out.stride(), WIDTH=1024, num_warps=4, **launch.LAUNCH
        )


@launch.on_its_device
def weight_update_(
    W: torch.Tensor, K: torch.Tensor, V: torch.Tensor, gain: torch.Tensor, *, input_precision: str | None = None
) -> torch.Tensor:
    """See `ops.weight_update_`."""
    used = launch.precision(W, input_precision)
    E = torch.empty(V.shape, dtype=W.dtype, device=W.device)
    for w, k, v, g, e in launch.views(W, K, V, gain, E):
        product(v, k, w, e, -1, used)
        product(w, g, e, w, 1, used)
    return E
