"""The ops in plain torch: the last resort, on whatever device torch serves.

Slower than the native kernels, but under the same contract: no synchronisation, no d x d temporary,
exactly symmetric results; where info != 0, no gain and C untouched. The dtype is that of the tensors, under
autocast too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from rlsedit_kernels.backends.precision import ieee_products

# Rows of C that one step of a downdate touches: its temporary is at most _ROWS x d.
_ROWS = 256

# Columns of R that are reduced together.
PANEL = 64


def gain_products(C: torch.Tensor, K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with ieee_products():
        Y = (K @ C).mT.contiguous() if _reads_better_by_rows(C) else (C @ K.mT).contiguous()
        G = K @ Y
    return Y, (G + G.mT).mul_(0.5)


def _reads_better_by_rows(C: torch.Tensor) -> bool:
    """A column-major C is symmetric too: multiply it from the side on which torch needs no copy."""
    return C.stride(-2) == 1 and C.stride(-1) != 1


def key_products(A: torch.Tensor, K: torch.Tensor) -> torch.Tensor:
    with ieee_products():
        return (K @ A).contiguous()


def cholesky(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    L, info = torch.linalg.cholesky_ex(A)
    pivots = L.diagonal(dim1=-2, dim2=-1)
    if L.device.type == "cpu" and math.isfinite(pivots.sum().item()):  # a look costs nothing there
        return L.contiguous(), info
    # Not every library that torch calls reports a pivot of NaN (cuSOLVER: pytorch issue 64818), and none one of Inf.
    # What it leaves behind the pivot that it does report says nothing.
    lost = pivots.isfinite().logical_not_()
    first = torch.where(lost.any(-1), lost.to(torch.int32).argmax(-1) + 1, 0)
    info = torch.where((first > 0) & ((info == 0) | (first < info)), first, info)
    return L.contiguous(), info.to(torch.int32)


def _failed(info: torch.Tensor) -> torch.Tensor | None:
    """(..., 1, 1), true where info != 0; None where that is known to be nowhere, which a GPU is not asked."""
    if info.device.type == "cpu" and not info.any():
        return None
    return (info != 0)[..., None, None]


def gain_solve(Y: torch.Tensor, G: torch.Tensor, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gain, Z, info, _ = _gain_solve(Y, G, noise)
    return gain, Z, info


def _gain_solve(
    Y: torch.Tensor, G: torch.Tensor, noise: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`gain_solve`, and where it failed."""
    A = G.clone()
    A.diagonal(dim1=-2, dim2=-1).add_(_in_dtype(noise, G.dtype))
    L, info = cholesky(A)
    with ieee_products():
        Z = torch.linalg.solve_triangular(L.mT, Y, upper=True, left=False)
        gain = torch.linalg.solve_triangular(L, Z, upper=False, left=False)
    gain, Z, failed = gain.contiguous(), Z.contiguous(), _failed(info)
    if failed is not None:  # no gain exists: make sure that nobody mistakes what is returned for one
        gain.masked_fill_(failed, math.nan)
        Z.masked_fill_(failed, math.nan)
    return gain, Z, info, failed


def _in_dtype(number: float, dtype: torch.dtype) -> float:
    """The number as a kernel in `dtype` has it: Inf where it overflows, where torch would raise."""
    return number if abs(number) <= torch.finfo(dtype).max else math.copysign(math.inf, number)


def downdate_(C: torch.Tensor, Z: torch.Tensor, alpha: float = -1.0) -> None:
    _change_(C, Z, _in_dtype(alpha, C.dtype))


def _change_(
    C: torch.Tensor, Z: torch.Tensor, alpha: float, scale: float = 1.0, failed: torch.Tensor | None = None
) -> None:
    """C <- scale (C + alpha Z Z'), some rows at a time; where `failed` (..., 1, 1), not a bit of C changes."""
    d = C.shape[-1]
    with ieee_products():
        for start in range(0, d, _ROWS):
            stop = min(start + _ROWS, d)
            old, above = C[..., start:stop, :stop], C[..., :start, start:stop]
            product = Z[..., start:stop, :] @ Z[..., :stop, :].mT
            rows = old.add_(product, alpha=alpha) if failed is None else torch.add(old, product, alpha=alpha)
            if scale != 1.0:
                rows.mul_(scale)
            block = rows[..., start:]
            block.copy_(block.tril() + block.tril(-1).mT)
            if failed is None:
                above.copy_(rows[..., :start].mT)
            else:
                above.copy_(torch.where(failed, above, rows[..., :start].mT))
                old.copy_(torch.where(failed, old, rows))


def downdate_gain_products_(
    C: torch.Tensor, Z: torch.Tensor, K: torch.Tensor, alpha: float = -1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    downdate_(C, Z, alpha)
    return gain_products(C, K)


def weight_update_(W: torch.Tensor, K: torch.Tensor, V: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    with ieee_products():
        E = (V - K @ W).contiguous()
        if W.dim() == 2:
            W.addmm_(gain, E)
        else:
            W.add_(gain @ E)
    return E


def rls_update_(
    C: torch.Tensor, K: torch.Tensor, noise: float = 1.0, forget: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    Y, G = gain_products(C, K)
    gain, Z, info, failed = _gain_solve(Y, G, forget * noise)
    _change_(C, Z, -1.0, _in_dtype(1.0 / forget, C.dtype), failed)
    return gain, info


def reflectors(block: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """X (..., u, n): the lower parts of the Householder vectors that map [block; rows] to a triangle.

    Args:
        block: (..., n, n), upper triangular, diagonal >= 0.
        rows: (..., u, n).
    """
    return torch.geqrf(torch.cat([block, rows], dim=-2))[0][..., block.shape[-1] :, :]


def reflector_factors(X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """N, the inverse of S, and E = M S' of the correction R_new = R + (X S)'K - E R (csrc/cpu/reflectors.h)."""
    gram = X.mT @ X
    squares = gram.diagonal(dim1=-2, dim2=-1)
    N = gram.triu(1) + torch.diag_embed(0.5 * (1.0 + squares))
    M = 2.0 * gram.tril(-1) + torch.diag_embed(squares)
    return N, torch.linalg.solve_triangular(N, M.mT, upper=True).mT


def reflect_(X: torch.Tensor, N: torch.Tensor, E: torch.Tensor, top: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The new `top` (..., n, m) of [top; rows] after the reflectors; `rows` (..., u, m) in place."""
    new = top + torch.linalg.solve_triangular(N.mT, X.mT @ rows, upper=False) - E @ top
    rows.sub_(X @ (top + new))
    return new


def _append(R: torch.Tensor, K: torch.Tensor, B: torch.Tensor | None, V: torch.Tensor | None) -> None:
    """[R B] <- top of Q'[R B; K V], panel by panel.

    The reflectors are LAPACK's, but they are applied as corrections of R and not as R negated (csrc/cpu/reflectors.h).
    """
    K, d = K.clone(), R.shape[-1]
    V = None if V is None else V.clone()
    with ieee_products():
        for start in range(0, d, PANEL):
            stop = min(start + PANEL, d)
            block = R[..., start:stop, start:stop].triu()
            sign = torch.where(block.diagonal(dim1=-2, dim2=-1) < 0.0, -1.0, 1.0).to(R.dtype)[..., None]
            X = reflectors(sign * block + 0.0, K[..., start:stop])
            N, E = reflector_factors(X)
            columns = [(R[..., start:stop, start:], K[..., start:])]
            if B is not None and V is not None:
                columns.append((B[..., start:stop, :], V))
            for i, (place, rows) in enumerate(columns):
                top = sign * place
                if i == 0:
                    top[..., : stop - start] = sign * block
                new = reflect_(X, N, E, top, rows)
                if i == 0:
                    diagonal = new.diagonal(dim1=-2, dim2=-1)
                    diagonal.copy_(diagonal.abs())
                    new[..., : stop - start] = new[..., : stop - start].triu() + place[..., : stop - start].tril(-1)
                place.copy_(new)


def qr_append_(R: torch.Tensor, K: torch.Tensor) -> None:
    _append(R, K, None, None)


def qr_append_rhs_(R: torch.Tensor, B: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> None:
    _append(R, K, B, V)


def qr_gain(R: torch.Tensor, K: torch.Tensor) -> torch.Tensor:
    with ieee_products():
        half = torch.linalg.solve_triangular(R.mT, K.mT, upper=False)
        return torch.linalg.solve_triangular(R, half, upper=True).contiguous()


def kernels() -> dict[str, Callable[..., object]]:
    """Every op of the schema table."""
    return {
        "gain_products": gain_products,
        "key_products": key_products,
        "cholesky": cholesky,
        "gain_solve": gain_solve,
        "downdate_": downdate_,
        "downdate_gain_products_": downdate_gain_products_,
        "rls_update_": rls_update_,
        "weight_update_": weight_update_,
        "qr_append_": qr_append_,
        "qr_append_rhs_": qr_append_rhs_,
        "qr_gain": qr_gain,
    }
