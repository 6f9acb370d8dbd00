"""A panel of N columns reduced by Householder reflectors, and its block reflector, inside a program.

The rows come as two tiles of U each, the second below the first: one of 128 rows would need more registers than there
are.

With a = R[j, j] >= 0 and x the rows' column j: r = hypot(a, |x|), y = x / (a + r), tau = 2 / (1 + y'y) = 1 + a / r, and

    R_new = R + tau (y'K - y'y R),   K_new = K - y (R + R_new)

For the panel, X = [y_1 .. y_N], S upper triangular:

    R_new = R + S'X'K - E R,   K_new = K - X (R + R_new)
    S'^-1 = strictly lower X'X + diagonal 1 / tau,   E = 2 I - S': -S' off the diagonal, tau_j |y_j|^2 on it

or, without E, with L = strictly lower S' and W = X'K:  R_new - R = L (W + R) + tau W - tau |y|^2 R.

    R   [ N x N  ]      tiles in registers: the panel's block of R, G (N x N), S, T; the rows pass through once for G
    X   [ U x N  ]      and once for T
    Y   [ U x N  ]

Bytes: the panel's block of R and 2 U N rows once, N (2 U + N) numbers written for those behind. Flops 2 (2 U) N^2 for
G, as many for T, and N steps of about 12 N^2.

A column step needs of the rows x'K alone, and takes it from their Gram matrix G = K'K, which is brought up to date
instead of them: with m = (R + R_new)[j] / (a + r),

    K_new = K - x m,   G_new = G - m' g - g' m + x'x m'm,   g = x'K = G[j]

What the steps do to the rows is gathered in T, K_new = K + K T, and applied once behind them. So a step works on tiles
of N x N; in one of rows, to take a column out takes longer than all else. G loses digits where a column shrinks: its
square has the rounding error of the largest that it had. A column whose square has fallen below a quarter of that is
not reduced before the rows are brought up to date and G is formed of them anew. That is rare: rows that R outweighs
change little, and rows that outweigh R are used up by the first panels.

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
def _zeros(like, tile):
    """Zeros, as a tile that is loaded lies in registers: Triton knows no other way to ask for that."""
    return tl.load(like + tile, mask=tile < 0, other=0.0)


@triton.jit
def _reflected(R, G, S, overs, largest, j, left, h, r_r, r_c, N: tl.constexpr):
    """Column steps from j on, until G has to be formed anew: where they stopped, S, T, and each column's 1 / (a + r).

    R: the panel's block, of which `left` columns are there; its rows that are done are stored, those with a negative
    diagonal turned. Into h signs, tau, tau |y|^2. All tiles lie as G, which was loaded, does, a row in one warp: only g
    goes from warp to warp, once in a step.
    """
    dtype = G.dtype
    tiny = 1e-290 if dtype == tl.float64 else 1e-30
    c = tl.arange(0, N)
    r = c[:, None]
    tile = r * N + c[None, :]
    scale, back = _scale(largest)
    scale = tl.where(c < left, scale, 0.0)
    across = tl.minimum(c, left - 1).to(tl.int64) * r_c
    here = R + r.to(tl.int64) * r_r + across[None, :]
    inside = (r <= c[None, :]) & (c[None, :] < left)
    diagonal = tl.sum(tl.where(r == c[None, :], tl.load(here, mask=inside, other=0.0), 0.0), axis=0) * scale
    squares = tl.sum(tl.where(r == c[None, :], G, 0.0), axis=0)
    peaks = squares
    A = _zeros(h, tile)
    T = _zeros(h, tile)
    first = j
    one = tl.where(c == j, 1.0, 0.0).to(dtype)  # products and not selects: fewer instructions
    square = tl.sum(squares * one, axis=0)
    alpha = tl.sum(diagonal * one, axis=0)
    row = R + j * tl.cast(r_r, tl.int64)
    while (j < N) & (square != -1.0):
        one = tl.where(c == j, 1.0, 0.0).to(dtype)
        one_r = tl.where(r == j, 1.0, 0.0).to(dtype)
        a = tl.load(row + across) * scale  # what stands left of the diagonal is not used
        a_r = tl.load(row + across[:, None]) * scale[:, None]
        g_r = tl.sum(G * one[None, :], axis=1, keep_dims=True)
        g = tl.gather(tl.sum(g_r, axis=1), c, 0)  # g_r as a row; what follows is done to both, not exchanged again
        turned = tl.where(alpha < 0.0, -1.0, 1.0).to(dtype)
        alpha *= turned
        gone = square < tiny  # not for a NaN
        length = tl.sqrt(alpha * alpha + tl.where(gone, 1.0, square))
        over = tl.where(gone, 0.0, 1.0 / (alpha + length))
        tau = tl.where(gone, 2.0, 1.0 + alpha / length)
        size = square * over * over
        a *= turned
        a_r *= turned
        new = a + tau * (g * over - size * a)
        new_r = a_r + tau * (g_r * over - size * a_r)
        A = tl.where(r == j, new[None, :], A)
        m = tl.where(c > j, over * (a + new), 0.0)
        m_r = tl.where(r > j, over * (a_r + new_r), 0.0)
        half = 0.5 * square
        rest = g - half * m
        G -= m_r * rest[None, :] + (g_r - half * m_r) * m[None, :]
        squares -= 2.0 * m * rest
        peaks = tl.maximum(peaks, squares)
        T -= (tl.sum(T * one[None, :], axis=1, keep_dims=True) + one_r) * m[None, :]
        # row j of S' from the products with the reflectors in front
        known = tl.sum(S * (g * over * overs)[None, :], axis=1, keep_dims=True)
        S += (one_r - known) * tau * one[None, :]
        overs += over * one
        tl.store(h + j, turned)
        tl.store(h + N + j, tau)
        tl.store(h + 2 * N + j, tau * size)
        row += tl.where(j + 1 < left, r_r, 0)
        j += 1
        one = tl.where(c == j, 1.0, 0.0).to(dtype)
        square = tl.sum(tl.where(squares < 0.25 * peaks, -1.0, squares) * one, axis=0)
        alpha = tl.sum(diagonal * one, axis=0)
    tl.store(here, A * back[None, :], mask=(r >= first) & (r < j) & inside)
    return j, S, T, overs


@triton.jit
def reduce_panel(R, X, Y, largest, col, d, h, r_r, r_c, N: tl.constexpr, U: tl.constexpr, PRECISION: tl.constexpr):
    """Columns [col, col + N), with the rows [X; Y]: their block of R, and into h signs, tau, tau |y|^2, X and S.

    largest: `column_sizes`. Behind S, h has room for 2 N numbers more. G goes through the place of X.
    """
    careful: tl.constexpr = "tf32x3" if PRECISION == "tf32" else PRECISION
    dtype = X.dtype
    n = tl.arange(0, N)
    k = tl.arange(0, U)
    r = n[:, None]
    tile = r * N + n[None, :]
    S_at = h + 3 * N + 2 * U * N
    room = S_at + N * N
    largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(X), tl.abs(Y)), axis=0))
    scale, _ = _scale(largest)
    X *= scale[None, :]
    Y *= scale[None, :]
    tl.store(room + n, largest)
    tl.store(room + N + n, tl.zeros((N,), dtype=dtype))
    R += col * (r_r + r_c)
    left = (d - col).to(tl.int32)
    j = 0
    while j < N:
        G = tl.dot(tl.trans(X), X, input_precision="ieee", out_dtype=dtype)
        G += tl.dot(tl.trans(Y), Y, input_precision="ieee", out_dtype=dtype)
        tl.store(h + 3 * N + tile, G)
        tl.debug_barrier()
        G = tl.load(h + 3 * N + tile)
        S = tl.load(S_at + tile, mask=tile < j * N * N, other=0.0)
        overs = tl.sum(tl.load(room + N + 0 * r + n[None, :], mask=tile < N, other=0.0), axis=0)
        j, S, T, overs = _reflected(R, G, S, overs, tl.load(room + n), j, left, h, r_r, r_c, N)
        tl.store(S_at + tile, S)
        tl.store(room + N + n, overs)
        X += tl.dot(X, T, input_precision=careful, out_dtype=dtype)
        Y += tl.dot(Y, T, input_precision=careful, out_dtype=dtype)
        tl.debug_barrier()
    overs = tl.load(room + N + n)[None, :]
    at = h + 3 * N + k[:, None] * N + n[None, :]
    tl.store(at, X * overs)
    tl.store(at + U * N, Y * overs)
