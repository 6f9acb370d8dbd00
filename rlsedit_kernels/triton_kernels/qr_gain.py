"""gain = R^-1 R^-T K': X R = K from the first block column on, then gain' R' = X from the last one back.

Two launches. A program owns a block column c and up to 64 keys; it takes in the columns solved before it as soon as
they are there (dataflow.py says why programs may wait for each other), then solves its own and publishes it:

    +---+---+---+      a program has the diagonal block D of its block column and takes in, tile by tile,
    | . | F | . |      forth what stands above it (F), back what stands beside it (B)
        | D | B |
            +---+

    forth:  X_c' = R_cc^-T (K_c' - sum_{p < c} R_pc' X_p')
    back:   Y_c' = R_cc^-1 (X_c' - sum_{p > c} R_cp Y_p')

A diagonal block is inverted before its column is waited for; a solve with it is two products and a step of refinement,
so that the inverse costs no stability. With its diagonal D taken out, R_cc = D (I + M), (I + M)^-1 is taken as I + S: a
product with I costs no rounding, so that near the identity, where M and S are small, neither do those with them.

X (keys, d) lies in a workspace, and Y takes its place. So the right operand of every product has adjacent terms, as the
tensor cores of Hopper want it, and gets into shared memory without bank conflicts.

Bytes: d^2 of R (each half twice); every program reads what was solved before it from the second-level cache. Flops
2 d^2 u. The critical path: 2 d / 64 block columns one after the other (float64: 2 d / 32), each a
flag and four small products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsedit_kernels.triton_kernels import launch
from rlsedit_kernels.triton_kernels.blocks import load, reciprocal, store, unit_upper_inverse
from rlsedit_kernels.triton_kernels.dataflow import board, publish, take_ticket, wait_for

SIDE = {4: 64, 8: 32}  # by bytes of an element
MOST_KEYS = 64


@triton.jit
def _diagonal_block(R, first, d, r_r, r_c, BACK: tl.constexpr, N: tl.constexpr):
    """M, S and 1 / D of the diagonal block from `first` on (the identity beyond d), forth of its transpose."""
    n = tl.arange(0, N)
    at = (first + n).to(tl.int64)
    r = n[:, None]
    c = n[None, :]
    A = tl.load(R + at[:, None] * r_r + at[None, :] * r_c, mask=(c >= r) & (first + c < d), other=0.0)
    diagonal = tl.sum(tl.where(r == c, tl.where(first + r < d, A, 1.0), 0.0), axis=0).to(A.dtype)
    over = reciprocal(diagonal)
    A = tl.where(c > r, A, 0.0)
    if BACK:
        M = A * over[:, None]
        return M, unit_upper_inverse(M, N), over
    else:
        M = A * over[None, :]
        return tl.trans(M), tl.trans(unit_upper_inverse(M, N)), over


@triton.jit(do_not_specialize=["batches", "groups", "blocks", "u"])
def solve_kernel(
    K, R, X, gain, flags, batches, groups, blocks, d, u, k_b, k_r, k_c, r_b, r_r, r_c,
    BACK: tl.constexpr, U: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X (b, u, d) and gain (b, d, u), contiguous. X = K R^-1; BACK: X = X R^-T, and gain its transpose."""
    number = take_ticket(flags)
    share = batches * groups
    own = number % share  # the same keys of the same matrix in every block column
    place = number // share
    b = (own % batches).to(tl.int64)
    R += b * r_b
    X += b * u * d
    key = (own // batches * U + tl.arange(0, U)).to(tl.int64)[None, :]
    n = tl.arange(0, N)
    p = blocks - 1 - place if BACK else place
    column = (p * N + n).to(tl.int64)[:, None]
    x = load(X, key, column, u, d, d, 1) if BACK else load(K + b * k_b, key, column, u, d, k_r, k_c)
    M, S, over = _diagonal_block(R, p * N, d, r_r, r_c, BACK, N)
    lost = tl.zeros_like(x)  # what x loses, taken off once: near the identity it is small, and so are its roundings
    for before in range(0, place):
        q = blocks - 1 - before if BACK else before
        i = (q * N + n).to(tl.int64)
        block = load(R, column, i[None, :], d, d, r_r, r_c) if BACK else load(R, i[None, :], column, d, d, r_r, r_c)
        wait_for(flags, before * share + own)
        solved = load(X, key, i[:, None], u, d, d, 1)
        lost -= tl.dot(block, solved, input_precision=PRECISION, out_dtype=x.dtype)
    x = (x + lost) * over[:, None]
    y = x + tl.dot(S, x, input_precision=PRECISION, out_dtype=x.dtype)
    x = (x - y) - tl.dot(M, y, input_precision=PRECISION, out_dtype=x.dtype)
    y += x + tl.dot(S, x, input_precision=PRECISION, out_dtype=x.dtype)
    store(X, y, key, column, u, d, d, 1)
    publish(flags, number)
    if BACK:
        store(gain + b * d * u, y, column, key, d, u, u, 1)


@launch.on_its_device
def qr_gain(R: torch.Tensor, K: torch.Tensor, *, input_precision: str | None = None) -> torch.Tensor:
    """See `ops.qr_gain`."""
    d, u = R.shape[-1], K.shape[-2]
    used = launch.precision(R, input_precision)
    gain = R.new_empty((*R.shape[:-1], u))
    U = min(launch.power_of_two(u), MOST_KEYS)
    side = 32 if launch.INTERPRETED else SIDE[R.element_size()]
    groups, blocks = launch.ceil_div(u, U), launch.ceil_div(d, side)
    for r, k, g in launch.views(R, K, gain):
        batch = r.shape[0]
        tickets = blocks * groups * batch
        X = R.new_empty((batch, u, d))
        for back in (False, True):
            solve_kernel[(tickets,)](
                k, r, X, g, board(tickets, R), batch, groups, blocks, d, u, *k.stride(), *r.stride(),
                BACK=back, U=U, N=side, PRECISION=used, num_warps=4, num_stages=1, **launch.LAUNCH,
            )  # fmt: skip
    return gain
