"""L L' = A + noise I, batched, one program a matrix; on request L^-1, which turns the solves that follow into products.

Left-looking, in panels of 32 columns:

      | L- L       |   D <- A_kk - L_k- L_k-'    products with the panels in front
      | L- L  D    |   D: factored and inverted by one elimination on [D | I], 32 steps
      | L- L  P    |   P <- (A_ik - L_i- L_k-') D^-T, up to 64 rows at a time

then the inverse, 32 rows at a time: V_i = -D_i^-1 (L_i- V). Between panels the program's threads meet at a barrier;
nothing leaves the multiprocessor but L and V themselves. Bytes: 2 u^2 (3 with the inverse), and u / 64 times as many
from the caches; flops u^3 / 3 (2 u^3 / 3 with the inverse), latency of u elimination steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsedit_kernels.triton_kernels import launch
from rlsedit_kernels.triton_kernels.blocks import factor, load, store

SIDE = 32
MOST_ROWS = 64


@triton.jit
def _taken_off(P, A, B, i, j, end, m, n, a_r, a_c, b_r, b_c, N: tl.constexpr):
    """P less rows i of A (m x .) times columns j of B (. x n), the first `end` of what they share."""
    for start in range(0, end, N):
        k = (start + tl.arange(0, N)).to(tl.int64)
        left = load(A, i[:, None], k[None, :], m, end, a_r, a_c)
        right = load(B, k[:, None], j[None, :], end, n, b_r, b_c)
        P -= tl.dot(left, right, input_precision="ieee", out_dtype=P.dtype)
    return P


@triton.jit
def _diagonal_block(A, L, V, shift, bad, k, u, a_r, a_c, l_r, l_c, INVERSE: tl.constexpr, N: tl.constexpr):
    """L_kk into L, its inverse into V where that is wanted; returns the transpose of the inverse, and info so far."""
    n = tl.arange(0, N)
    i = (k + n).to(tl.int64)
    r = i[:, None]
    c = i[None, :]
    D = load(A, tl.maximum(r, c), tl.minimum(r, c), u, u, a_r, a_c)
    D = tl.where(r == c, tl.where(r < u, D + shift, 1.0), D).to(A.dtype.element_ty)  # beyond u: the identity
    D = _taken_off(D, L, L, i, i, k, u, u, l_r, l_c, l_c, l_r, N)
    unit = tl.where(r == c, 1.0, 0.0).to(D.dtype)
    both, bad = factor(tl.reshape(tl.trans(tl.join(D, unit), (0, 2, 1)), (N, 2 * N)), k, bad, N)
    D, inverse = tl.split(tl.trans(tl.reshape(both, (N, 2, N)), (0, 2, 1)))
    store(L, D, r, c, u, u, l_r, l_c)
    if INVERSE:
        store(V, inverse, r, c, u, u, u, 1)
    return tl.trans(inverse), bad


@triton.jit(do_not_specialize=["noise"])
def cholesky_kernel(
    A, L, V, info, noise, u, a_b, a_r, a_c, l_b, l_r, l_c, v_b,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """L (b, u, u), its upper triangle zero; V (b, u, u) contiguous, its inverse; info (b)."""
    dtype = A.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    A += b * a_b
    L += b * l_b
    V += b * v_b
    shift = launch.scalar(noise, dtype)
    n = tl.arange(0, N)
    r = tl.arange(0, ROWS)
    bad = 0
    for k in range(0, u, N):
        j = (k + n).to(tl.int64)
        turned, bad = _diagonal_block(A, L, V, shift, bad, k, u, a_r, a_c, l_r, l_c, INVERSE, N)
        for first in range(k + N, u, ROWS):
            i = (first + r).to(tl.int64)
            P = load(A, i[:, None], j[None, :], u, u, a_r, a_c)
            P = _taken_off(P, L, L, i, j, k, u, u, l_r, l_c, l_c, l_r, N)
            P = tl.dot(P, turned, input_precision="ieee", out_dtype=dtype)
            store(L, P, i[:, None], j[None, :], u, u, l_r, l_c)
        for first in range(0, k, ROWS):
            i = (first + r).to(tl.int64)
            store(L, tl.zeros((ROWS, N), dtype=dtype), i[:, None], j[None, :], k, u, l_r, l_c)
            if INVERSE:
                store(V, tl.zeros((ROWS, N), dtype=dtype), i[:, None], j[None, :], k, u, u, 1)
        tl.debug_barrier()
    if INVERSE:
        for k in range(N, u, N):
            i = (k + n).to(tl.int64)
            inverse = load(V, i[:, None], i[None, :], u, u, u, 1)
            for first in range(0, k, ROWS):
                j = (first + r).to(tl.int64)
                T = _taken_off(tl.zeros((N, ROWS), dtype=dtype), L, V, i, j, k, u, k, l_r, l_c, u, 1, N)
                T = tl.dot(inverse, T, input_precision="ieee", out_dtype=dtype)
                store(V, T, i[:, None], j[None, :], u, k, u, 1)
            tl.debug_barrier()
    tl.store(info + b, bad)


def factored(
    A: torch.Tensor, noise: float = 0.0, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L (..., u, u) of A + noise I from the lower triangle of A, its inverse (or L again), and info (...)."""
    u = A.shape[-1]
    L = torch.empty_like(A, memory_format=torch.contiguous_format)
    V = torch.empty_like(L) if inverse else L
    info = torch.empty(A.shape[:-2], dtype=torch.int32, device=A.device)
    n = 16 if launch.INTERPRETED else SIDE
    rows = min(launch.power_of_two(u), n if launch.INTERPRETED else MOST_ROWS)  # small there: to have edges
    for a, lower, v, flag in launch.views(A, L, V, info[..., None, None]):
        cholesky_kernel[(a.shape[0],)](
            a, lower, v, flag, launch.bits(noise), u, *a.stride(), *lower.stride(), v.stride(0),
            INVERSE=inverse, ROWS=rows, N=n, num_warps=4, num_stages=1, **launch.LAUNCH,
        )  # fmt: skip
    return L, V, info


@launch.on_its_device
def cholesky(A: torch.Tensor, *, input_precision: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.cholesky`; its products are always IEEE."""
    launch.precision(A, input_precision)
    L, _, info = factored(A)
    return L, info
