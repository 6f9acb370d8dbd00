"""Tiles of matrices, and small matrices inside a program: a Cholesky factor, a triangular inverse (N x N, N constexpr).

Triton cannot index a tile, so a column (row) is taken out by a masked sum and put back by a select; N steps each. A
column comes from the registers of one warp, a row from those of all: a step takes one row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(A, i, j, m, n, a_r, a_c):
    """A[i, j] for int64 indices i and j, zero outside of m x n; i and j may come in either order of axes."""
    return tl.load(A + i * a_r + j * a_c, mask=(i < m) & (j < n), other=0.0)


@triton.jit
def store(A, tile, i, j, m, n, a_r, a_c):
    """A[i, j] <- tile inside of m x n."""
    tl.store(A + i * a_r + j * a_c, tile, mask=(i < m) & (j < n))


@triton.jit
def factor(A, first, bad, N: tl.constexpr):
    """[L | L^-1] for [A | I] (N, 2 N), A symmetric; `bad` becomes first + k + 1 at the first bad pivot k.

    Zeros above L. A pivot is bad where it is not positive or not finite; 1 is taken in its place and what follows has
    no meaning.
    """
    r = tl.arange(0, N)
    c = tl.arange(0, 2 * N)
    for k in range(0, N):
        x = tl.sum(tl.where(c[None, :] == k, A, 0.0), axis=1)
        y = tl.sum(tl.where(r[:, None] == k, A, 0.0), axis=0)
        pivot = tl.sum(tl.where(c == k, y, 0.0), axis=0)
        good = (pivot > 0.0) & (pivot - pivot == 0.0)
        bad = tl.where((bad == 0) & (good == 0), first + k + 1, bad)
        size = tl.where(good, pivot, 1.0).to(A.dtype)
        # tl.sqrt of float32 is an approximation, tl.sqrt_rn does not know float64
        size = tl.sqrt(size) if A.dtype == tl.float64 else tl.sqrt_rn(size)
        x = tl.where(r > k, x / size, 0.0)[:, None]
        y = tl.where(c >= k, y / size, 0.0)[None, :]
        A = tl.where((r[:, None] == k) & (c[None, :] >= k), y, tl.where(c[None, :] == k, x, A - x * y))
    return tl.where((r[:, None] >= c[None, :]) | (c[None, :] >= N), A, 0.0), bad


@triton.jit
def unit_upper_inverse(M, N: tl.constexpr):
    """(I + M)^-1 - I for a strictly upper triangular M, row by row from the last one by substitution."""
    r = tl.arange(0, N)[:, None]
    c = tl.arange(0, N)[None, :]
    T = tl.trans(M)
    X = tl.zeros((N, N), dtype=M.dtype)
    for before in range(1, N):
        k = N - 1 - before
        x = tl.sum(tl.where(c == k, T, 0.0), axis=1)[:, None]  # row k of M
        known = tl.sum(x * X + tl.where(r == c, x, 0.0), axis=0)  # of M (X + I)
        X = tl.where(r == k, -known[None, :], X)
    return X


@triton.jit
def reciprocal(x):
    """1 / x, rounded once: division of float32 is an approximation, tl.div_rn does not know float64."""
    one = tl.full(x.shape, 1.0, dtype=x.dtype)
    if x.dtype == tl.float64:
        return one / x
    else:
        return tl.div_rn(one, x)
