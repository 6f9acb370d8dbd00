"""[R B] <- top of Q'[R B; K V]: rows appended to a triangular system, panel by panel, in one launch.

         panel of N columns          a program owns the columns of a panel, or of B, and their part of the new rows:
    +---+---+---+---+ +-----+          1. for each panel p before it, as soon as p's reflectors are there:
    | 0 | . | . | j | |  B  |               W = X'K,  D = L (W + R) + tau W - tau |y|^2 R
    +---+---+---+ . | | .   |               K <- K - X (2 R + D),  R <- R + D
        | 1 | . | . | | .   |          2. its own columns are reduced (reflectors.py), their reflectors published
        +---+---+---+ +-----+        dataflow.py says why programs may wait for each other.

Up to 128 rows at a time; more go in one after the other. The rows stay in registers, R and B are read and written once.
The reflectors are applied as corrections of R (csrc/cpu/reflectors.h says why).

Bytes: d^2 of R and 2 d v of B once; the reflectors of d / N panels, N (u + N) numbers each, are read from the
second-level cache by every program behind. Flops 2 d u (d + 2 v). The critical path: d / N panels one after the other,
each a flag, a correction and N column steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsedit_kernels.triton_kernels import launch
from rlsedit_kernels.triton_kernels.blocks import load, store
from rlsedit_kernels.triton_kernels.dataflow import board, publish, take_ticket, wait_for
from rlsedit_kernels.triton_kernels.reflectors import column_sizes, reduce_panel

MOST_ROWS = 128
PANEL = 32


@triton.jit
def _rows(K, start, first, last, u, k_r, k_c, N: tl.constexpr, U: tl.constexpr):
    """Rows [start, start + U) and columns [first, first + N) of the new rows."""
    k = (start + tl.arange(0, U)).to(tl.int64)[:, None]
    j = (first + tl.arange(0, N)).to(tl.int64)[None, :]
    return load(K, k, j, u, last, k_r, k_c)


@triton.jit
def _corrected(
    A, X, Y, first, last, height, h, flags, panels, batches, a_r, a_c, size,
    N: tl.constexpr, U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns [first, first + N) below `last` of A, and of the new rows [X; Y] (2 U, N), after `panels` panels.

    h: the block reflectors of the panels, `size` apart; flags: theirs, `batches` apart.
    """
    dtype = A.dtype.element_ty
    n = tl.arange(0, N).to(tl.int64)
    k = tl.arange(0, U).to(tl.int64)
    j = (first + tl.arange(0, N)).to(tl.int64)[None, :]
    for p in range(0, panels):
        row = p * N + n[:, None]
        top = load(A, row, j, height, last, a_r, a_c)
        wait_for(flags, p * batches)
        at = h + 3 * N + k[None, :] * N + n[:, None]
        W = tl.dot(tl.load(at), X, input_precision=PRECISION, out_dtype=dtype)
        W += tl.dot(tl.load(at + U * N), Y, input_precision=PRECISION, out_dtype=dtype)
        top *= tl.load(h + n)[:, None]
        at = h + 3 * N + 2 * U * N + n[None, :] * N + n[:, None]
        lower = tl.load(at, mask=n[:, None] > n[None, :], other=0.0)
        change = tl.dot(lower, W + top, input_precision=PRECISION, out_dtype=dtype)
        change += tl.load(h + N + n)[:, None] * W - tl.load(h + 2 * N + n)[:, None] * top
        new = top + change
        store(A, new, row, j, height, last, a_r, a_c)
        new += top
        at = h + 3 * N + k[:, None] * N + n[None, :]
        X -= tl.dot(tl.load(at), new, input_precision=PRECISION, out_dtype=dtype)
        Y -= tl.dot(tl.load(at + U * N), new, input_precision=PRECISION, out_dtype=dtype)
        h += size
    return X, Y


@triton.jit(do_not_specialize=["batches", "panels", "u"])
def append_kernel(
    R, B, K, V, work, flags, batches, panels, d, v, u,
    r_b, r_r, r_c, b_b, b_r, b_c, k_b, k_r, k_c, v_b, v_r, v_c, size,
    N: tl.constexpr, U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A ticket's columns: those of a panel of R, panel by panel, then of B; matrices of a batch side by side.

    work (b, panels, size): the block reflectors, each 3 N numbers (signs, tau, tau |y|^2), X and S, of
    which L is strictly lower S', and room for 2 N numbers.
    """
    number = take_ticket(flags)
    own = number % batches
    place = number // batches
    b = own.to(tl.int64)
    h = work + b * panels * size
    if place < panels:
        first = place * N
        R += b * r_b
        K += b * k_b
        X = _rows(K, 0, first, d, u, k_r, k_c, N, U)
        Y = _rows(K, U, first, d, u, k_r, k_c, N, U)
        largest = column_sizes(R, first.to(tl.int64), d, r_r, r_c, N)
        X, Y = _corrected(R, X, Y, first, d, d, h, flags + own, place, batches, r_r, r_c, size, N, U, PRECISION)
        reduce_panel(R, X, Y, largest, first.to(tl.int64), d, h + place.to(tl.int64) * size, r_r, r_c, N, U, PRECISION)
        publish(flags, number)
    else:
        first = (place - panels) * N
        V += b * v_b
        X = _rows(V, 0, first, v, u, v_r, v_c, N, U)
        Y = _rows(V, U, first, v, u, v_r, v_c, N, U)
        _corrected(B + b * b_b, X, Y, first, v, d, h, flags + own, panels, batches, b_r, b_c, size, N, U, PRECISION)


def append(
    R: torch.Tensor, K: torch.Tensor, B: torch.Tensor | None, V: torch.Tensor | None, input_precision: str | None
) -> None:
    """The rows [K V] go into [R B] in place; B and V may be missing."""
    used = launch.precision(R, input_precision)
    n = 16 if launch.INTERPRETED else PANEL  # a column step costs the interpreter the same, whatever the panel
    given = (R, K) if B is None or V is None else (R, K, B, V)
    for r, k, *others in launch.views(*given):
        b, v = others or (None, None)
        for start in range(0, k.shape[1], MOST_ROWS):
            rows = slice(start, min(start + MOST_ROWS, k.shape[1]))
            _append_rows(r, k[:, rows], b, None if v is None else v[:, rows], n, used)


def _append_rows(
    R: torch.Tensor, K: torch.Tensor, B: torch.Tensor | None, V: torch.Tensor | None, n: int, used: str
) -> None:
    batch, u, d = K.shape
    v = 0 if B is None else B.shape[-1]
    B, V = (R, K) if B is None or V is None else (B, V)
    U = launch.power_of_two(launch.ceil_div(u, 2))
    panels, size = launch.ceil_div(d, n), 5 * n + 2 * U * n + n * n
    tickets = (panels + launch.ceil_div(v, n)) * batch
    work = torch.empty(batch, panels, size, dtype=R.dtype, device=R.device)
    append_kernel[(tickets,)](
        R, B, K, V, work, board(tickets, R), batch, panels, d, v, u,
        *R.stride(), *B.stride(), *K.stride(), *V.stride(), size,
        N=n, U=U, PRECISION=used, num_warps=8 if R.element_size() * U > 256 else 4, num_stages=1, **launch.LAUNCH,
    )  # fmt: skip


@launch.on_its_device
def qr_append_rhs_(
    R: torch.Tensor, B: torch.Tensor, K: torch.Tensor, V: torch.Tensor, *, input_precision: str | None = None
) -> None:
    """See `ops.qr_append_rhs_`."""
    append(R, K, B, V, input_precision)
