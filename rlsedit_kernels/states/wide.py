"""Float64 arithmetic on a float32 matrix, row block by row block: no float64 copy of it is ever made.

Blocks are widened one after the other in the same place: memory that is new for each has to be made and cleared first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rlsedit_kernels import ops
from rlsedit_kernels.states.adding import add_product_
from rlsedit_kernels.states.coordinates import product as times
from rlsedit_kernels.states.products import Products
from rlsedit_kernels.states.reading import blocks

_ROWS = 256
"""Of a block. Fewer are a little faster on a machine at rest, and far slower where its threads wait for a core."""


def _widened(A: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """First row and float64 block of rows of A (n, m), one after the other; each is gone with the next."""
    place, start = None, 0
    for part in blocks(A, _ROWS):
        if A.dtype == torch.float64:
            yield start, part
        else:
            if place is None:
                place = torch.empty(part.shape, dtype=torch.float64, device=A.device)
            yield start, place[: len(part)].copy_(part)
        start += len(part)


def product(A: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A x (n, p) in float64 for A (n, m) of any dtype and a float64 x (m, p)."""
    found = torch.empty(A.shape[0], x.shape[1], dtype=torch.float64, device=A.device)
    for start, rows in _widened(A):
        found[start : start + len(rows)] = times(rows, x)
    return found


def transposed_product(A: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A'x (m, p) in float64 for A (n, m) of any dtype and a float64 x (n, p)."""
    y = torch.zeros(x.shape[1], A.shape[1], dtype=torch.float64, device=A.device)
    for start, rows in _widened(A):
        y.add_(times(rows.mT, x[start : start + len(rows)]).mT)
    return y.mT


def products(C: torch.Tensor, K: torch.Tensor) -> Products:
    """Y (d, u) = C K' and an exactly symmetric G (u, u) = K Y, float64."""
    if C.dtype == torch.float64:
        return Products(*ops.gain_products(C, K))
    Y = product(C, K.mT.contiguous())
    G = K @ Y
    return Products(Y, (G + G.mT).mul_(0.5))


def assemble(
    n: int, identity: float, terms: Sequence[tuple[torch.Tensor, float]], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """identity I + sum_i s_i Z_i Z_i' (n, n), formed in float64 and rounded once to `dtype`; exactly symmetric."""
    C = torch.empty(n, n, dtype=dtype, device=device)
    for start in range(0, n, _ROWS):
        stop = min(start + _ROWS, n)
        rows = torch.zeros(stop - start, stop, dtype=torch.float64, device=device)
        rows[:, start:].diagonal().fill_(identity)
        for Z, sign in terms:
            rows.addmm_(Z[start:stop].to(torch.float64), Z[:stop].to(torch.float64).mT, alpha=sign)
        _store(C, rows, start, stop)
    return C


def change_(C: torch.Tensor, Z: torch.Tensor, sign: float) -> None:
    """C <- C + sign Z Z' in place for a float64 Z (d, u), rounded once; exactly symmetric.

    One triangle is computed, in blocks of rows, and mirrored.
    """
    if C.dtype == torch.float64:
        ops.downdate_(C, Z, sign)
        return
    place = torch.empty(min(_ROWS, C.shape[0]) * C.shape[0], dtype=torch.float64, device=C.device)
    for start in range(0, C.shape[0], _ROWS):
        stop = min(start + _ROWS, C.shape[0])
        rows = place[: (stop - start) * stop].view(stop - start, stop).copy_(C[start:stop, :stop])
        add_product_(rows, Z[start:stop], Z[:stop], sign)
        _store(C, rows, start, stop)


def add_(A: torch.Tensor, left: torch.Tensor, right: torch.Tensor, sign: float) -> None:
    """A <- A + sign left right' in place for float64 left (n, w) and right (m, w), rounded once."""
    if A.dtype == torch.float64:
        add_product_(A, left, right, sign)
        return
    place = torch.empty(min(_ROWS, A.shape[0]), A.shape[1], dtype=torch.float64, device=A.device)
    for start in range(0, A.shape[0], _ROWS):
        part = A[start : start + _ROWS]
        rows = place[: len(part)].copy_(part)
        add_product_(rows, left[start : start + _ROWS], right, sign)
        part.copy_(rows)


def _store(C: torch.Tensor, rows: torch.Tensor, start: int, stop: int) -> None:
    """Write rows (stop - start, stop) of the lower triangle and their mirror image."""
    diagonal = rows[:, start:]
    diagonal.copy_(diagonal.tril() + diagonal.tril(-1).mT)
    C[start:stop, :stop].copy_(rows)
    C[:start, start:stop].copy_(C[start:stop, :start].mT)
