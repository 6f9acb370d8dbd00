"""gain = R^-1 R^-T K': X R = K from the first block column on, then gain' R' = X from the last one back.

One launch a block column c; program 0 corrects the next one and solves it at once, the others correct the rest:

    forth:  X_c = K_c R_cc^-1,  K_j <- K_j - X_c R_cj  (j > c)
    back:   Y_c = X_c R_cc^-T,  X_j <- X_j - Y_c R_jc' (j < c)

Diagonal blocks are inverted before, all at once; a solve with one is two products and a step of refinement, so that the
inverse costs no stability. Bytes: d^2 of R (each half twice), 2 d / 32 times the rows; flops 2 d^2 u.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsedit_kernels.triton_kernels import launch
from rlsedit_kernels.triton_kernels.blocks import lower_inverse

SIDE = 32
COLUMNS = 64


@triton.jit
def _block(R, first, d, r_r, r_c, N: tl.constexpr):
    """The diagonal block from `first` on, the identity beyond d."""
    n = tl.arange(0, N)
    at = (first + n).to(tl.int64)
    r = n[:, None]
    c = n[None, :]
    A = tl.load(R + at[:, None] * r_r + at[None, :] * r_c, mask=(c >= r) & (first + c < d), other=0.0)
    return tl.where((r == c) & (first + r >= d), 1.0, A).to(R.dtype.element_ty)


@triton.jit
def inverse_kernel(R, V, d, r_b, r_r, r_c, v_b, N: tl.constexpr):
    """V (b, d / N, N, N) contiguous: the inverses of the diagonal blocks."""
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0).to(tl.int64)
    V += b * v_b + p * N * N
    X = tl.trans(lower_inverse(tl.trans(_block(R + b * r_b, p * N, d, r_r, r_c, N)), N))
    n = tl.arange(0, N)
    tl.store(V + n[:, None] * N + n[None, :], X)


@triton.jit
def _solved(x, R, V, p, d, r_r, r_c, TURNED: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """x R_pp^-1, or x R_pp^-T."""
    dtype = x.dtype
    n = tl.arange(0, N)
    A = _block(R, p * N, d, r_r, r_c, N)
    inverse = tl.load(V + p * N * N + n[:, None] * N + n[None, :])
    if TURNED:
        A = tl.trans(A)
        inverse = tl.trans(inverse)
    y = tl.dot(x, inverse, input_precision=PRECISION, out_dtype=dtype)
    left = x - tl.dot(y, A, input_precision=PRECISION, out_dtype=dtype)
    return y + tl.dot(left, inverse, input_precision=PRECISION, out_dtype=dtype)


@triton.jit
def _corrected(
    X, R, solved, first, p, d, u, k, r_r, r_c,
    TURNED: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns [first, first + WIDTH) of X less the solved block p times its block of R."""
    dtype = X.dtype.element_ty
    j = (first + tl.arange(0, WIDTH)).to(tl.int64)[None, :]
    n = (p * N + tl.arange(0, N)).to(tl.int64)[:, None]
    inside = (k < u) & (j < d)
    x = tl.load(X + k * d + j, mask=inside, other=0.0)
    if TURNED:
        block = tl.load(R + j * r_r + n * r_c, mask=(n < d) & (j < d), other=0.0)
    else:
        block = tl.load(R + n * r_r + j * r_c, mask=(n < d) & (j < d), other=0.0)
    return x - tl.dot(solved, block, input_precision=PRECISION, out_dtype=dtype)


@triton.jit
def _solve_first(X, R, V, p, d, u, k, r_r, r_c, TURNED: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    j = p * N + tl.arange(0, N).to(tl.int64)[None, :]
    inside = (k < u) & (j < d)
    x = tl.load(X + k * d + j, mask=inside, other=0.0)
    tl.store(X + k * d + j, _solved(x, R, V, p, d, r_r, r_c, TURNED, N, PRECISION), mask=inside)


@triton.jit
def _solve_next(
    X, R, V, solved, p, after, d, u, k, r_r, r_c, TURNED: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    x = _corrected(X, R, solved, after * N, p, d, u, k, r_r, r_c, TURNED, N, N, PRECISION)
    j = after * N + tl.arange(0, N).to(tl.int64)[None, :]
    tl.store(X + k * d + j, _solved(x, R, V, after, d, r_r, r_c, TURNED, N, PRECISION), mask=(k < u) & (j < d))


@triton.jit
def _correct(
    X, R, solved, first, end, p, d, u, k, r_r, r_c,
    TURNED: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x = _corrected(X, R, solved, first, p, d, u, k, r_r, r_c, TURNED, WIDTH, N, PRECISION)
    j = (first + tl.arange(0, WIDTH)).to(tl.int64)[None, :]
    tl.store(X + k * d + j, x, mask=(k < u) & (j < end))


@triton.jit(do_not_specialize=["step", "blocks", "u"])
def solve_kernel(
    X, R, V, step, blocks, d, u, r_b, r_r, r_c, v_b,
    FIRST: tl.constexpr, TURNED: tl.constexpr, U: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Step of a solve of X (b, u, d), contiguous, in place: block columns are numbered in the order of solving."""
    pid = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    X += b * u * d
    R += b * r_b
    V += b * v_b
    k = (tl.program_id(1) * U + tl.arange(0, U)).to(tl.int64)[:, None]
    p = (blocks - 1 - step if TURNED else step).to(tl.int64)
    after = (p - 1 if TURNED else p + 1).to(tl.int64)
    if FIRST:
        _solve_first(X, R, V, p, d, u, k, r_r, r_c, TURNED, N, PRECISION)
    else:
        own = p * N + tl.arange(0, N).to(tl.int64)[None, :]
        solved = tl.load(X + k * d + own, mask=(k < u) & (own < d), other=0.0)
        if pid == 0:
            _solve_next(X, R, V, solved, p, after, d, u, k, r_r, r_c, TURNED, N, PRECISION)
        elif TURNED:  # what lies before the next block, counted from the left
            _correct(X, R, solved, (pid - 1) * WIDTH, after * N, p, d, u, k, r_r, r_c, TURNED, WIDTH, N, PRECISION)
        else:  # what lies behind the next block
            column = (after + 1) * N + (pid - 1) * WIDTH
            _correct(X, R, solved, column, d, p, d, u, k, r_r, r_c, TURNED, WIDTH, N, PRECISION)


@launch.on_its_device
def qr_gain(R: torch.Tensor, K: torch.Tensor, *, input_precision: str | None = None) -> torch.Tensor:
    """See `ops.qr_gain`."""
    d, u = R.shape[-1], K.shape[-2]
    used = launch.precision(R, input_precision)
    gain = R.new_empty((*R.shape[:-1], u))
    U = min(launch.power_of_two(u), 64)
    blocks = launch.ceil_div(d, SIDE)
    for r, k, g in launch.views(R, K, gain):
        batch = r.shape[0]
        X = k.clone(memory_format=torch.contiguous_format)
        V = torch.empty(batch, blocks, SIDE, SIDE, dtype=R.dtype, device=R.device)
        inverse_kernel[blocks, batch](r, V, d, *r.stride(), V.stride(0), N=SIDE, num_warps=4, **launch.LAUNCH)
        for turned in (False, True):
            for step in range(-1, blocks - 1):
                rest = (blocks - step - 2) * SIDE if turned else d - (step + 2) * SIDE
                programs = 1 if step < 0 else 1 + launch.ceil_div(max(rest, 0), COLUMNS)
                solve_kernel[programs, launch.ceil_div(u, U), batch](
                    X, r, V, max(step, 0), blocks, d, u, *r.stride(), V.stride(0),
                    FIRST=step < 0, TURNED=turned, U=U, N=SIDE, WIDTH=COLUMNS, PRECISION=used,
                    num_warps=4, num_stages=2, **launch.LAUNCH,
                )  # fmt: skip
        g.copy_(X.mT)
    return gain
