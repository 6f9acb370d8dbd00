"""All contenders that this machine can run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from rlsedit_kernels.backends import backends
from rlsedit_kernels.profile.contenders.contender import Contender
from rlsedit_kernels.profile.contenders.published import (
    AlphaEdit,
    AlphaEditCholesky,
    DenseCholesky,
    Memit,
    ReferenceRLSEdit,
    Woodbury,
)
from rlsedit_kernels.profile.contenders.recursion import Ahead, Filter, Fused, Together, Unfused
from rlsedit_kernels.profile.problem import NULL, Problem

__all__ = ["BASELINE", "catalogue", "named"]

BASELINE = "rlsedit, ops"
"""The contender that all others are compared with."""

_FORMS = (
    ("plain", torch.float32, False),
    ("whitened", torch.float32, True),
    ("whitened", torch.float32, False),
    ("inverse_root", torch.float32, False),
    ("square_root", torch.float32, False),
    ("plain", torch.float64, False),
)


def catalogue(device: torch.device | str = "cpu", layers: int = 1) -> tuple[Contender, ...]:
    """This package first, in each back end that serves the device and each form; then the published sequences, and what
    a dense solve can be at its best."""
    kind = torch.device(device).type
    served = [row.name for row in backends() if row.available and (kind in row.devices or "*" in row.devices)]
    return (*_ours(served, layers), *_theirs(kind))


def named(names: Iterable[str], available: Sequence[Contender]) -> list[Contender]:
    """Contenders whose names contain one of `names`, in the order of the catalogue.

    Raises:
        ValueError: a name that fits none.
    """
    wanted = list(names)
    for name in wanted:
        if not name.strip() or not any(name.lower() in one.name.lower() for one in available):
            known = "; ".join(one.name for one in available)
            raise ValueError(f"contenders: none is called {name!r}; there are {known}")
    return [one for one in available if any(name.lower() in one.name.lower() for name in wanted)]


def _ours(served: Sequence[str], layers: int) -> Iterable[Contender]:
    def ops(name: str, kind: type[Fused], summary: str, backend: str | None) -> Contender:
        return Contender(
            name,
            lambda p: kind(p, p.covariance()),
            summary,
            "anchor",
            bytes=lambda p: _matrices(p, 1) + _weights(p, 2),
            flops=lambda p: 3.0 * p.d**2 * p.u,
            backend=backend,
        )

    yield ops(BASELINE, Fused, "rls_update_ and two products for the weight", None)
    for backend in served[1:]:
        yield ops(f"{BASELINE} [{backend}]", Fused, f"the same on the back end {backend!r}", backend)
    if layers > 1:
        yield Contender(
            "rlsedit, layers at once",
            Together,
            "rls_update_ on a leading dimension of layers",
            "anchor",
            bytes=lambda p: p.layers * (_matrices(p, 1) + _weights(p, 2)),
            flops=lambda p: p.layers * 3.0 * p.d**2 * p.u,
            at_once=True,
        )
    yield ops("rlsedit, op by op", Unfused, "gain_products, gain_solve, downdate_", None)
    yield ops("rlsedit, next keys known", Ahead, "downdate and next products in one pass over C", None)
    for form, dtype, matrix in _FORMS:
        yield _filter(form, dtype, matrix)
    yield Contender(
        "AlphaEdit by recursion",
        lambda p: Fused(p, p.projector().div_(p.l2)),
        "AlphaEdit's weights from rls_update_ with C_0 = P / L2",
        "null_space",
        bytes=lambda p: _matrices(p, 1) + _weights(p, 2),
        flops=lambda p: 3.0 * p.d**2 * p.u,
    )


def _filter(form: str, dtype: torch.dtype, matrix: bool) -> Contender:
    width = 8 if dtype == torch.float64 else 4
    kept = {"plain": 1, "whitened": 2, "inverse_root": 1, "square_root": 1}[form]
    work = {"plain": 3.0, "whitened": 7.0, "inverse_root": 6.0, "square_root": 4.0}[form]
    weights = 5.0 if form == "square_root" else 3.0  # the right-hand side, W - W_0, and for a moment a solution
    wide = ", float64" if dtype == torch.float64 else ""
    early = form == "whitened" and not matrix
    note = " (columns at first, a matrix later)" if early else " (as a matrix, after many batches)" if matrix else ""
    return Contender(
        f"RLSFilter {form}{', from the start' if early else ''}{wide}",
        lambda p: Filter(p, form, torch.float64 if p.dtype == torch.float64 else dtype, matrix=matrix),
        f"the {form} form{note}, checks, probes and deviation bounds included",
        "anchor",
        bytes=lambda p: (kept * width + 16.0 + 8.0) * p.d**2 + weights * width * p.d * p.v,
        flops=lambda p: work * p.d**2 * p.u * width / 4,
        start=(lambda p: 2.0 * 4.0 / 3.0 * p.d**3) if form == "square_root" else None,  # float64 QR of the prior's root
        shared=lambda p: p.prior,
    )


def _theirs(kind: str) -> Iterable[Contender]:
    yield Contender(
        "plain torch Woodbury",
        Woodbury,
        "full products and fresh buffers",
        "anchor",
        bytes=lambda p: _matrices(p, 3) + _weights(p, 3),
        flops=lambda p: 6.0 * p.d**2 * p.u,
    )
    yield Contender(
        "RLSEdit, released sequence",
        ReferenceRLSEdit,
        "state and weight to the host and back each batch",
        "anchor",
        bytes=lambda p: _matrices(p, 4) + _weights(p, 4),
        flops=lambda p: 6.0 * p.d**2 * p.u,
    )
    for host in (True, False) if kind != "cpu" else (True,):
        where = "as released: P and cache on the host" if host else "P and cache on the device"
        yield Contender(
            "AlphaEdit, released" if host else "AlphaEdit, resident",
            lambda p, host=host: AlphaEdit(p, host=host),  # type: ignore[misc]
            f"a dense float32 solve, {where}" if kind != "cpu" else "a dense float32 solve",
            "null_space",
            bytes=lambda p: _matrices(p, 6) + _weights(p, 4),
            flops=lambda p: p.d**2 * (2.0 / 3.0 * p.d + 2.0 * p.d + 2.0 * p.v + 6.0 * p.u),
            age=lambda p: 2.0 * p.d**2 * p.u,
        )
    yield Contender(
        "MEMIT, float64",
        Memit,
        "a dense float64 solve, nothing kept of the batches before",
        "anchor",
        history=False,
        bytes=lambda p: 4 * 8.0 * p.d**2 + _weights(p, 4),
        flops=lambda p: 2.0 * p.d**2 * (2.0 / 3.0 * p.d + 6.0 * p.u),
        age=lambda p: 0.0,
    )
    for dtype, name in ((None, "dense Cholesky"), (torch.float64, "dense Cholesky, float64")):
        width = 8.0 if dtype is not None else 4.0
        yield Contender(
            name,
            lambda p, dtype=dtype: DenseCholesky(p, dtype or p.dtype),  # type: ignore[misc]
            "the best that a dense solve can be: S grown in place, a Cholesky factor, u columns"
            + (", the dtype of the recursion" if dtype is None else ", float64"),
            "anchor",
            bytes=lambda p, width=width: (2.0 * width + 8.0) * p.d**2 + _weights(p, 3),  # type: ignore[misc]
            flops=lambda p, width=width: width / 4.0 * p.d**2 * (p.d / 3.0 + 4.0 * p.u),  # type: ignore[misc]
        )
    yield Contender(
        "AlphaEdit, Cholesky",
        AlphaEditCholesky,
        "the same for AlphaEdit: a Cholesky factor in its null space, the dtype of the recursion",
        "null_space",
        bytes=lambda p: _matrices(p, 3) + 8.0 * p.d**2 + _weights(p, 3),
        flops=lambda p: (NULL * p.d) ** 2 * (NULL * p.d / 3.0 + 4.0 * p.u) + 4.0 * NULL * p.d**2 * p.u,
    )


def _matrices(p: Problem, n: int) -> float:
    return float(n * p.dtype.itemsize * p.d**2)


def _weights(p: Problem, n: int) -> float:
    return float(n * p.dtype.itemsize * p.d * p.v)
