"""gain = R^-1 R^-T K': X R = K from the first block column on, then gain' R' = X from the last one back.

Two launches. A program owns a block column c and up to 64 keys; it takes in the columns solved before it as soon as
they are there (dataflow.py says why programs may wait for each other), then solves its own and publishes it:

    forth:  X_c = (K_c - sum_{p < c} X_p R_pc) R_cc^-1
    back:   Y_c = (X_c - sum_{p > c} Y_p R_cp') R_cc^-T

A diagonal block is inverted before its column is waited for; a solve with it is two products and a step of refinement,
so that the inverse costs no stability. It is taken as (I + M) D, D its diagonal, and its inverse as D^-1 (I + S): a
product with I costs no rounding, so that near the identity, where M and S are small, neither do those with them. X lies
in the place of the gain, transposed, and Y takes its place.

Bytes: d^2 of R (each half twice); every program reads what was solved before it from the second-level cache. Flops
2 d^2 u. The critical path: 2 d / 64 block columns one after the other (float64: 2 d / 32), each a
flag and four small products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsedit_kernels.triton_kernels import launch
from rlsedit_kernels.triton_kernels.blocks import load, reciprocal, store, unit_lower_inverse
from rlsedit_kernels.triton_kernels.dataflow import board, publish, take_ticket, wait_for

SIDE = {4: 64, 8: 32}  # by bytes of an element
MOST_KEYS = 64


@triton.jit
def _diagonal_block(R, first, d, r_r, r_c, TURNED: tl.constexpr, N: tl.constexpr):
    """M, S and 1 / D of the diagonal block from `first` on (the identity beyond d); TURNED: of its transpose."""
    n = tl.arange(0, N)
    at = (first + n).to(tl.int64)
    r = n[:, None]
    c = n[None, :]
    A = tl.load(R + at[:, None] * r_r + at[None, :] * r_c, mask=(c >= r) & (first + c < d), other=0.0)
    diagonal = tl.sum(tl.where(r == c, tl.where(first + r < d, A, 1.0), 0.0), axis=0).to(A.dtype)
    over = reciprocal(diagonal)
    A = tl.where(c > r, A, 0.0)
    if TURNED:
        M = tl.trans(A) * over[None, :]
        return M, unit_lower_inverse(M, N), over
    else:
        M = A * over[None, :]
        return M, tl.trans(unit_lower_inverse(tl.trans(M), N)), over


@triton.jit(do_not_specialize=["batches", "groups", "blocks", "u"])
def solve_kernel(
    K, R, gain, flags, batches, groups, blocks, d, u, k_b, k_r, k_c, r_b, r_r, r_c,
    TURNED: tl.constexpr, U: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gain (b, d, u), contiguous: (K R^-1)'; TURNED: R^-1 times what it was, in place."""
    number = take_ticket(flags)
    share = batches * groups
    own = number % share  # the same keys of the same matrix in every block column
    place = number // share
    b = (own % batches).to(tl.int64)
    R += b * r_b
    gain += b * d * u
    k = (own // batches * U + tl.arange(0, U)).to(tl.int64)[:, None]
    n = tl.arange(0, N)
    p = blocks - 1 - place if TURNED else place
    j = (p * N + n).to(tl.int64)[None, :]
    x = load(gain, j, k, d, u, u, 1) if TURNED else load(K + b * k_b, k, j, u, d, k_r, k_c)
    M, S, over = _diagonal_block(R, p * N, d, r_r, r_c, TURNED, N)
    lost = tl.zeros_like(x)  # what x loses, taken off once: near the identity it is small, and so are its roundings
    for before in range(0, place):
        q = blocks - 1 - before if TURNED else before
        i = (q * N + n).to(tl.int64)
        block = load(R, j, i[:, None], d, d, r_r, r_c) if TURNED else load(R, i[:, None], j, d, d, r_r, r_c)
        wait_for(flags, before * share + own)
        solved = load(gain, i[None, :], k, d, u, u, 1)
        lost -= tl.dot(solved, block, input_precision=PRECISION, out_dtype=x.dtype)
    x = (x + lost) * over[None, :]
    y = x + tl.dot(x, S, input_precision=PRECISION, out_dtype=x.dtype)
    x = (x - y) - tl.dot(y, M, input_precision=PRECISION, out_dtype=x.dtype)
    y += x + tl.dot(x, S, input_precision=PRECISION, out_dtype=x.dtype)
    store(gain, y, j, k, d, u, u, 1)
    publish(flags, number)


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
        for turned in (False, True):
            solve_kernel[(tickets,)](
                k, r, g, board(tickets, R), batch, groups, blocks, d, u, *k.stride(), *r.stride(),
                TURNED=turned, U=U, N=side, PRECISION=used, num_warps=4, num_stages=1, **launch.LAUNCH,
            )  # fmt: skip
    return gain
