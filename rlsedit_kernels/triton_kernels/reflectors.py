"""A panel of N columns reduced by Householder reflectors, and its block reflector, inside a program.

The rows come as two tiles of U each, the second below the first: one of 128 rows would need more registers than there
are.

With a = R[j, j] >= 0 and x the rows' column j: r = hypot(a, |x|), y = x / (a + r), tau = 2 / (1 + y'y), and

    R_new = R + tau (y'K - y'y R),   K_new = K - y (R + R_new);   on the diagonal R_new = a + x'x / (a + r)

A column step waits for one sum over the rows: x'K, of which the columns in front give the Gram products of y, each
times its 1 / (a + r), and column j gives x'x. For the panel, X = [y_1 .. y_N], S upper triangular:

    R_new = R + S'X'K - E R,   K_new = K - X (R + R_new)
    S'^-1 = strictly lower X'X + diagonal 1 / tau,   E = 2 I - S': -S' off the diagonal, tau_j |y_j|^2 on it

or, without E, with L = strictly lower S' and W = X'K:  R_new - R = L (W + R) + tau W - tau |y|^2 R.

Columns are scaled by powers of two, which change no reflector, so that x'K neither overflows nor vanishes; what is left
of a column below 1e-15 of its largest element (float64: 1e-145) counts as nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scale(largest):
    """Powers of two near 1 / largest, and their inverses; neither is subnormal."""
    if largest.dtype == tl.float64:
        bits = (2046 << 52) - (largest.to(tl.int64, bitcast=True) & (2047 << 52))
        bits = tl.minimum(tl.maximum(bits, 1 << 52), 2045 << 52)
        back = (2046 << 52) - bits
    else:
        bits = (254 << 23) - (largest.to(tl.int32, bitcast=True) & (255 << 23))
        bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
        back = (254 << 23) - bits
    return bits.to(largest.dtype, bitcast=True), back.to(largest.dtype, bitcast=True)


@triton.jit
def column_sizes(R, col, d, r_r, r_c, N: tl.constexpr):
    """The largest magnitudes of the columns of R's block from (col, col) on.

    Row by row: the layout of a tile would become that of the column steps, and not suit them.
    """
    c = tl.arange(0, N)
    here = R + (col + c).to(tl.int64) * r_c
    largest = tl.zeros((N,), dtype=R.dtype.element_ty)
    for j in range(0, N):
        row = tl.load(here + (col + j) * r_r, mask=(c >= j) & (col + c < d), other=0.0)
        largest = tl.maximum(largest, tl.abs(row))
    return largest


@triton.jit
def _reflected(R, X, Y, largest, col, d, r_r, r_c, N: tl.constexpr):
    """The block of R from (col, col) on after the rows [X; Y] have gone in; reflectors, S, signs, tau, tau |y|^2.

    Rows of R with a negative diagonal, of sign -1, are turned. largest: `column_sizes`.
    """
    dtype = X.dtype
    tiny = 1e-290 if dtype == tl.float64 else 1e-30
    r = tl.arange(0, N)[:, None]
    c = tl.arange(0, N)
    here = R + (col + c).to(tl.int64) * r_c
    scale, back = _scale(tl.maximum(largest, tl.max(tl.maximum(tl.abs(X), tl.abs(Y)), axis=0)))
    sign = tl.full((N,), 1.0, dtype=dtype)
    X *= scale[None, :]
    Y *= scale[None, :]
    overs = tl.zeros((N,), dtype=dtype)
    taus = tl.zeros((N,), dtype=dtype)
    shrink = tl.zeros((N,), dtype=dtype)
    A = tl.zeros((N, N), dtype=dtype)
    S = tl.zeros((N, N), dtype=dtype)
    for j in range(0, N):
        one = tl.where(c == j, 1.0, 0.0).to(dtype)  # products and not selects: fewer instructions
        a = tl.load(here + (col + j) * r_r, mask=(c >= j) & (col + c < d), other=0.0) * scale
        x = tl.sum(X * one[None, :], axis=1)
        y = tl.sum(Y * one[None, :], axis=1)
        g = tl.sum(x[:, None] * X + y[:, None] * Y, axis=0)
        alpha = tl.sum(a * one, axis=0)
        turned = tl.where(alpha < 0.0, -1.0, 1.0).to(dtype)
        sign = tl.where(c == j, turned, sign)
        a *= turned
        alpha *= turned
        square = tl.sum(g * one, axis=0)
        gone = square < tiny  # not for a NaN
        over = tl.where(gone, 0.0, 1.0 / tl.where(gone, 1.0, alpha + tl.sqrt(alpha * alpha + square)))
        growth = square * over
        size = growth * over
        tau = 2.0 / (1.0 + size)
        g *= over
        new = tl.where(c > j, a + tau * (g - size * a), alpha + growth)
        A = tl.where(r == j, new[None, :], A)
        change = tl.where(c > j, over * (a + new), 0.0)[None, :]
        X -= x[:, None] * change
        Y -= y[:, None] * change
        # row j of S' from the products with the reflectors in front
        known = tl.sum(S * (g * overs)[None, :], axis=1)
        column = (tl.where(tl.arange(0, N) == j, 1.0, 0.0) - known) * tau
        S += column[:, None] * one[None, :]
        overs += over * one
        taus += tau * one
        shrink += tau * size * one
    X *= overs[None, :]
    Y *= overs[None, :]
    tl.store(here[None, :] + (col + r) * r_r, A * back[None, :], mask=(c[None, :] >= r) & (col + c[None, :] < d))
    return X, Y, S, sign, taus, shrink


@triton.jit
def reduce_panel(R, X, Y, largest, col, d, h, r_r, r_c, N: tl.constexpr, U: tl.constexpr):
    """Columns [col, col + N), with the rows [X; Y]: their block of R, and into h signs, tau, tau |y|^2, X and L."""
    n = tl.arange(0, N)
    k = tl.arange(0, U)
    X, Y, S, sign, tau, shrink = _reflected(R, X, Y, largest, col, d, r_r, r_c, N)
    tl.store(h + n, sign)
    tl.store(h + N + n, tau)
    tl.store(h + 2 * N + n, shrink)
    at = h + 3 * N + k[:, None] * N + n[None, :]
    tl.store(at, X)
    tl.store(at + U * N, Y)
    lower = tl.where(n[:, None] < n[None, :], S, 0.0)  # transposed
    tl.store(h + 3 * N + 2 * U * N + n[:, None] + n[None, :] * N, lower)
