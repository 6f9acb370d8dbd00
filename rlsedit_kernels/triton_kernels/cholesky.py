"""L L' = A + noise I, batched, one program a matrix; on the way L^-1, which turns the solves that follow into products.

Right-looking, in blocks of 16 (the smallest side of a tensor-core product):

      | D       |   D: factored and inverted in registers, 16 steps each
      | P  T    |   P <- P D^-T   a product with the inverse
      | P  T T  |   T <- T - P P' products, lower tiles only

then the inverse block row by block row: V_ij = -D_i^-1 sum_k L_ik V_kj. Between the steps the program's threads meet
at a barrier; nothing leaves the multiprocessor but L and V themselves. Bytes: 2 u^2 (3 with the inverse); flops u^3 / 3
(2 u^3 / 3 with the inverse), latency of u column steps. Made for u up to 512; correct beyond.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsedit_kernels.triton_kernels import launch
from rlsedit_kernels.triton_kernels.blocks import factor, load, lower_inverse, store

SIDE = 16


@triton.jit
def _tile(A, i0, j0, u, a_r, a_c, N: tl.constexpr):
    """A[i0 : i0 + N, j0 : j0 + N], zero outside of u x u."""
    i = (i0 + tl.arange(0, N)).to(tl.int64)[:, None]
    j = (j0 + tl.arange(0, N)).to(tl.int64)[None, :]
    return load(A, i, j, u, u, a_r, a_c)


@triton.jit
def _put(A, tile, i0, j0, u, a_r, a_c, N: tl.constexpr):
    i = (i0 + tl.arange(0, N)).to(tl.int64)[:, None]
    j = (j0 + tl.arange(0, N)).to(tl.int64)[None, :]
    store(A, tile, i, j, u, u, a_r, a_c)


@triton.jit(do_not_specialize=["noise"])
def cholesky_kernel(
    A, L, V, info, noise, u, a_b, a_r, a_c, l_b, l_r, l_c, v_b, INVERSE: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """L (b, u, u), its upper triangle zero; V (b, u, u) contiguous, its inverse; info (b)."""
    dtype = A.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    A += b * a_b
    L += b * l_b
    V += b * v_b
    r = tl.arange(0, N)[:, None]
    c = tl.arange(0, N)[None, :]
    shift = launch.scalar(noise, dtype)
    for i in range(0, u, N):
        for j in range(0, u, N):
            tile = _tile(A, i, j, u, a_r, a_c, N)
            keep = (i > j) | ((i == j) & (r >= c))
            tile = tl.where(keep, tile, 0.0) + tl.where((i == j) & (r == c), shift, 0.0).to(dtype)
            _put(L, tile, i, j, u, l_r, l_c, N)
            if INVERSE:
                _put(V, tl.zeros((N, N), dtype=dtype), i, j, u, u, 1, N)
    tl.debug_barrier()
    bad = 0
    for k in range(0, u, N):
        D = _tile(L, k, k, u, l_r, l_c, N)
        D = D + tl.trans(tl.where(r > c, D, 0.0))
        D = tl.where((r == c) & (k + r >= u), 1.0, D).to(dtype)  # beyond u: the identity
        D, bad = factor(D, k, bad, N)
        X = lower_inverse(D, N)
        _put(L, D, k, k, u, l_r, l_c, N)
        if INVERSE:
            _put(V, X, k, k, u, u, 1, N)
        for i in range(k + N, u, N):
            P = tl.dot(_tile(L, i, k, u, l_r, l_c, N), tl.trans(X), input_precision="ieee", out_dtype=dtype)
            _put(L, P, i, k, u, l_r, l_c, N)
        tl.debug_barrier()
        for i in range(k + N, u, N):
            P = _tile(L, i, k, u, l_r, l_c, N)
            for j in range(k + N, i + N, N):
                Q = _tile(L, j, k, u, l_r, l_c, N)
                T = _tile(L, i, j, u, l_r, l_c, N) - tl.dot(P, tl.trans(Q), input_precision="ieee", out_dtype=dtype)
                _put(L, tl.where((i > j) | (r >= c), T, 0.0), i, j, u, l_r, l_c, N)
        tl.debug_barrier()
    if INVERSE:
        for i in range(N, u, N):
            X = _tile(V, i, i, u, u, 1, N)
            for j in range(0, i, N):
                acc = tl.zeros((N, N), dtype=dtype)
                for k in range(j, i, N):
                    acc = tl.dot(
                        _tile(L, i, k, u, l_r, l_c, N), _tile(V, k, j, u, u, 1, N), acc,
                        input_precision="ieee", out_dtype=dtype,
                    )  # fmt: skip
                _put(V, -tl.dot(X, acc, input_precision="ieee", out_dtype=dtype), i, j, u, u, 1, N)
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
    for a, lower, v, flag in launch.views(A, L, V, info[..., None, None]):
        cholesky_kernel[(a.shape[0],)](
            a, lower, v, flag, launch.bits(noise), u, *a.stride(), *lower.stride(), v.stride(0),
            INVERSE=inverse, N=SIDE, num_warps=4, **launch.LAUNCH,
        )  # fmt: skip
    return L, V, info


@launch.on_its_device
def cholesky(A: torch.Tensor, *, input_precision: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.cholesky`; its products are always IEEE."""
    launch.precision(A, input_precision)
    L, _, info = factored(A)
    return L, info
