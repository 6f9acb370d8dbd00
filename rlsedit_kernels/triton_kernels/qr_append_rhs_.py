"""[R B] <- top of Q'[R B; K V]: rows appended to a triangular system, panel by panel, one launch a panel.

    panel p (N rows of R)        program 0: columns of panel p + 1 are corrected, then factored at once (look-ahead)
      +----+----+---------+      others:    blocks of the columns behind it, and of B, are corrected
      |  p |  0 | 1 2 ... |
      +----+----+---------+      correction:  D = (X S)'K - E R,  K <- K - X (2 R + D),  R <- R + D
           | p+1|

A panel is factored by Householder reflectors in registers, column by column, and handed on as X (u, N), X S and E in
the compact WY form; the reflectors are applied as corrections of R (csrc/cpu/reflectors.h says why). Up to 128 rows at
a time; more go in one after the other.

Bytes: d^2 of R and 2 d v of B once, d / N times the rows (they stay in the second-level cache); flops 2 d u (d + 2 v).
The critical path is d / N launches of N column steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsedit_kernels.triton_kernels import launch
from rlsedit_kernels.triton_kernels.blocks import lower_inverse

MOST_ROWS = 128
PANEL = 32
COLUMNS = 64


@triton.jit
def _corrected(
    A, rows, top_row, first, last, height, u, work, a_r, a_c, w_r,
    WIDTH: tl.constexpr, U: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns [first, first + WIDTH) below `last` of A (its N rows from top_row on) and of the batch's rows (u, .).

    A is written; the rows (U, WIDTH) are returned. `work`: the block reflector, N signs, X, X S and E.
    """
    dtype = A.dtype.element_ty
    n = tl.arange(0, N).to(tl.int64)
    k = tl.arange(0, U).to(tl.int64)
    j = (first + tl.arange(0, WIDTH)).to(tl.int64)
    at = A + (top_row + n)[:, None] * a_r + j[None, :] * a_c
    inside = ((top_row + n)[:, None] < height) & (j[None, :] < last)
    top = tl.load(at, mask=inside, other=0.0) * tl.load(work + n)[:, None]
    batch = tl.load(rows + k[:, None] * w_r + j[None, :], mask=(k[:, None] < u) & (j[None, :] < last), other=0.0)
    xs = tl.load(work + N + U * N + k[None, :] * N + n[:, None])
    change = tl.dot(xs, batch, input_precision=PRECISION, out_dtype=dtype)
    e = tl.load(work + N + 2 * U * N + n[:, None] * N + n[None, :])
    change -= tl.dot(e, top, input_precision=PRECISION, out_dtype=dtype)
    new = top + change
    tl.store(at, new, mask=inside)
    x = tl.load(work + N + k[:, None] * N + n[None, :])
    return batch - tl.dot(x, top + new, input_precision=PRECISION, out_dtype=dtype)


@triton.jit
def _correct(
    A, rows, top_row, first, last, height, u, work, a_r, a_c, w_r,
    WIDTH: tl.constexpr, U: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same, the rows written back."""
    batch = _corrected(A, rows, top_row, first, last, height, u, work, a_r, a_c, w_r, WIDTH, U, N, PRECISION)
    k = tl.arange(0, U).to(tl.int64)[:, None]
    j = (first + tl.arange(0, WIDTH)).to(tl.int64)[None, :]
    tl.store(rows + k * w_r + j, batch, mask=(k < u) & (j < last))


@triton.jit
def _reflected(A, X, N: tl.constexpr, U: tl.constexpr):
    """A (N, N) upper triangular, diagonal >= 0, after the rows X (U, N) have gone in; X becomes the reflectors."""
    dtype = A.dtype
    r = tl.arange(0, N)[:, None]
    c = tl.arange(0, N)
    for j in range(0, N):
        x = tl.sum(tl.where(c[None, :] == j, X, 0.0), axis=1)
        a = tl.sum(tl.where(r == j, A, 0.0), axis=0)
        alpha = tl.sum(tl.where(c == j, a, 0.0), axis=0).to(tl.float64)
        # |x| and the hypotenuse in float64, scaled: safe for any size
        wide = x.to(tl.float64)
        largest = tl.max(tl.abs(wide), axis=0)
        largest = tl.where(largest > 0.0, largest, 1.0)
        scaled = wide / largest
        sigma = largest * tl.sqrt(tl.sum(scaled * scaled, axis=0))
        large = tl.maximum(alpha, sigma)
        ratio = tl.minimum(alpha, sigma) / tl.where(large > 0.0, large, 1.0)
        length = large * tl.sqrt(1.0 + ratio * ratio)
        some = sigma > 0.0
        y = tl.where(some, wide / tl.where(some, alpha + length, 1.0), 0.0).to(dtype)
        wide = y.to(tl.float64)
        square = tl.sum(wide * wide, axis=0)
        tau = (2.0 / (1.0 + square)).to(dtype)
        q = tl.sum(y[:, None] * X, axis=0)
        new = tl.where(c > j, a + tau * (q - square.to(dtype) * a), a)  # y = 0 leaves a alone: q and square are 0
        X = tl.where(c[None, :] > j, X - y[:, None] * (a + new)[None, :], tl.where(c[None, :] == j, y[:, None], X))
        new = tl.where(c == j, length.to(dtype), new)
        A = tl.where(r == j, new[None, :], A)
    return A, X


@triton.jit
def _factor(R, batch, col, d, work, r_r, r_c, N: tl.constexpr, U: tl.constexpr):
    """The panel of columns [col, col + N): its block of R, and the block reflector for the columns behind it."""
    dtype = R.dtype.element_ty
    n = tl.arange(0, N).to(tl.int64)
    k = tl.arange(0, U).to(tl.int64)
    r = tl.arange(0, N)[:, None]
    c = tl.arange(0, N)[None, :]
    at = R + (col + n)[:, None] * r_r + (col + n)[None, :] * r_c
    inside = (c >= r) & (col + c < d)
    A = tl.load(at, mask=inside, other=0.0)
    sign = tl.where(tl.sum(tl.where(r == c, A, 0.0), axis=1) < 0.0, -1.0, 1.0).to(dtype)
    A, batch = _reflected(A * sign[:, None], batch, N, U)
    tl.store(at, A, mask=inside)
    gram = tl.dot(tl.trans(batch), batch, input_precision="ieee", out_dtype=dtype)
    square = tl.where(r == c, gram, 0.0)
    # The inverse of S, transposed: strictly lower gram and (1 + |x|^2) / 2; M = E S'^-1 has twice that, less I.
    lower = tl.where(r > c, gram, 0.0)
    turned = lower_inverse(lower + tl.where(r == c, 0.5 * (1.0 + square), 0.0).to(dtype), N)
    e = tl.dot(2.0 * lower + square, turned, input_precision="ieee", out_dtype=dtype)
    xs = tl.dot(batch, tl.trans(turned), input_precision="ieee", out_dtype=dtype)
    tl.store(work + n, sign)
    tl.store(work + N + k[:, None] * N + n[None, :], batch)
    tl.store(work + N + U * N + k[:, None] * N + n[None, :], xs)
    tl.store(work + N + 2 * U * N + n[:, None] * N + n[None, :], e)


@triton.jit
def _first_panel(R, rows, d, u, work, r_r, r_c, N: tl.constexpr, U: tl.constexpr):
    k = tl.arange(0, U).to(tl.int64)[:, None]
    j = tl.arange(0, N).to(tl.int64)[None, :]
    _factor(R, tl.load(rows + k * d + j, mask=(k < u) & (j < d), other=0.0), 0, d, work, r_r, r_c, N, U)


@triton.jit
def _next_panel(
    R, rows, top_row, col, d, u, here, there, r_r, r_c, U: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    batch = _corrected(R, rows, top_row, col, d, d, u, here, r_r, r_c, d, N, U, N, PRECISION)
    _factor(R, batch, col, d, there, r_r, r_c, N, U)


@triton.jit(do_not_specialize=["panel", "blocks", "u"])
def append_kernel(
    R, B, rows, targets, work, panel, blocks, d, v, u,
    r_b, r_r, r_c, b_b, b_r, b_c, size,
    FIRST: tl.constexpr, U: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Step `panel`: program 0 takes the next panel, 1 to blocks the columns of R behind it, the rest those of B.

    rows (b, u, d) and targets (b, u, v) contiguous, a copy of the batch; work (b, 2, size) holds the block reflectors
    of this panel and of the next: N signs, X, X S, E. FIRST: nothing to apply yet, program 0 factors panel 0.
    """
    pid = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    R += b * r_b
    rows += b * u * d
    here = work + (b * 2 + panel % 2) * size
    there = work + (b * 2 + (panel + 1) % 2) * size
    top_row = (panel * N).to(tl.int64)
    if FIRST:
        _first_panel(R, rows, d, u, there, r_r, r_c, N, U)
    elif pid == 0:
        if top_row + N < d:
            _next_panel(R, rows, top_row, top_row + N, d, u, here, there, r_r, r_c, U, N, PRECISION)
    elif pid <= blocks:
        column = top_row + 2 * N + (pid - 1) * WIDTH
        _correct(R, rows, top_row, column, d, d, u, here, r_r, r_c, d, WIDTH, U, N, PRECISION)
    else:
        place = (pid - 1 - blocks) * WIDTH
        _correct(B + b * b_b, targets + b * u * v, top_row, place, v, d, u, here, b_r, b_c, v, WIDTH, U, N, PRECISION)


def append(
    R: torch.Tensor, K: torch.Tensor, B: torch.Tensor | None, V: torch.Tensor | None, input_precision: str | None
) -> None:
    """The rows [K V] go into [R B] in place; B and V may be missing."""
    used = launch.precision(R, input_precision)
    n = 16 if launch.INTERPRETED else PANEL  # a column step costs the interpreter the same, whatever the panel
    given = (R, K) if B is None or V is None else (R, K, B, V)
    for parts in launch.views(*given):
        for start in range(0, K.shape[-2], MOST_ROWS):
            chunk = slice(start, min(start + MOST_ROWS, K.shape[-2]))
            r, rows = parts[0], parts[1][:, chunk].clone(memory_format=torch.contiguous_format)
            b, targets = r, rows
            if len(parts) == 4:
                b, targets = parts[2], parts[3][:, chunk].clone(memory_format=torch.contiguous_format)
            _append_rows(r, rows, b, targets, len(parts) == 4, n, used)


def _append_rows(
    R: torch.Tensor, rows: torch.Tensor, B: torch.Tensor, targets: torch.Tensor, carries: bool, n: int, used: str
) -> None:
    batch, u, d = rows.shape
    v = B.shape[-1] if carries else 0
    U = launch.power_of_two(u)
    size = n + 2 * U * n + n * n
    work = torch.empty(batch, 2, size, dtype=R.dtype, device=R.device)
    for panel in range(-1, launch.ceil_div(d, n) - (0 if carries else 1)):
        behind = max(d - (panel + 2) * n, 0)
        blocks = launch.ceil_div(behind, COLUMNS)
        programs = 1 if panel < 0 else 1 + blocks + launch.ceil_div(v, COLUMNS)
        append_kernel[programs, batch](
            R, B, rows, targets, work, panel, blocks, d, v, u,
            *R.stride(), *B.stride(), size,
            FIRST=panel < 0, U=U, N=n, WIDTH=COLUMNS, PRECISION=used, num_warps=8 if U > 64 else 4, num_stages=1,
            **launch.LAUNCH,
        )  # fmt: skip


@launch.on_its_device
def qr_append_rhs_(
    R: torch.Tensor, B: torch.Tensor, K: torch.Tensor, V: torch.Tensor, *, input_precision: str | None = None
) -> None:
    """See `ops.qr_append_rhs_`."""
    append(R, K, B, V, input_precision)
