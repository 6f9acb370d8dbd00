"""The contract of info on every back end: the first bad pivot, gain and Z of NaN, C untouched; its neighbours sound."""

from __future__ import annotations

import math

import pytest
import torch
from support import builders
from support.cases import dtypes

import rlsedit_kernels as rk

INF, NAN = math.inf, math.nan
# The diagonal of a matrix that is diagonal otherwise, and the first of its pivots that is not positive and finite.
DIAGONALS = [
    ([INF], 1),
    ([NAN], 1),
    ([0.0], 1),
    ([-3.0, 5.0], 1),
    ([5.0, -3.0], 2),
    ([5.0, INF], 2),
    ([5.0, NAN, 2.0], 2),
    ([2.0, INF, -1.0], 2),
    ([2.0, -1.0, INF], 2),
    ([2.0, NAN, -1.0], 2),
    ([2.0, 3.0, INF, NAN, -1.0], 3),
    ([1.0] * 40 + [-1.0] + [1.0] * 9 + [INF] + [1.0] * 29, 41),
    ([1.0] * 70 + [INF] + [1.0] * 4 + [-1.0], 71),
]
diagonals = pytest.mark.parametrize(
    ("diagonal", "bad"), DIAGONALS, ids=[f"u{len(d)}-{d[bad - 1]}-at-{bad}" for d, bad in DIAGONALS]
)


def stacked(diagonal: list[float], dtype: torch.dtype) -> torch.Tensor:
    """(3, u, u): the matrix between two that are sound."""
    good = 2.0 * torch.eye(len(diagonal), dtype=dtype)
    return torch.stack([good, torch.diag(torch.tensor(diagonal, dtype=dtype)), good])


@dtypes
@diagonals
def test_cholesky_gives_the_first_bad_pivot(diagonal, bad, dtype, backend) -> None:
    L, info = rk.ops.cholesky(stacked(diagonal, dtype))
    assert info.tolist() == [0, bad, 0]
    assert torch.equal(L[0], L[2])
    assert L[0].isfinite().all()


@dtypes
@diagonals
def test_gain_solve_gives_no_number(diagonal, bad, dtype, backend) -> None:
    u = len(diagonal)
    Y = builders.columns((3,), 4, u, dtype, 0)
    Y[:, 0] = 0.0  # a solve may pass over zeros
    gain, Z, info = rk.ops.gain_solve(Y, stacked(diagonal, dtype), 0.0)
    assert info.tolist() == [0, bad, 0]
    for X in (gain, Z):
        assert X[1].isnan().all()
        assert X[0].isfinite().all()
        assert X[2].isfinite().all()


@dtypes
@pytest.mark.parametrize("forget", [1.0, 0.5])
@pytest.mark.parametrize("d", [4, 300])
def test_a_covariance_that_failed_keeps_every_bit(d, dtype, forget, backend) -> None:
    """Also where it is not symmetric, and holds Inf, NaN and -0.0."""
    C = torch.eye(d, dtype=dtype).repeat(3, 1, 1)
    C[1, 0, 0], C[1, 1, 0], C[1, 0, 1] = -5.0, 0.25, -0.0
    C[1, d - 2, d - 2], C[1, d - 1, d - 2] = INF, NAN
    K = torch.zeros(3, 2, d, dtype=dtype)
    K[:, 0, 0] = K[:, 1, 1] = 2.0
    before = C.clone()
    gain, info = rk.ops.rls_update_(C, K, 1.0, forget)
    assert (info != 0).tolist() == [False, True, False]
    assert gain[1].isnan().all()
    assert gain[0].isfinite().all()
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    assert torch.equal(C[1].view(bits), before[1].view(bits))
    assert not torch.equal(C[0], before[0])


@dtypes
def test_what_overflows_is_reported(dtype, backend) -> None:
    largest = torch.finfo(dtype).max
    for C, K in (
        (torch.full((3, 3), INF, dtype=dtype), torch.ones(1, 3, dtype=dtype)),
        (torch.eye(3, dtype=dtype) * largest**0.75, torch.ones(1, 3, dtype=dtype) * largest**0.25),
    ):
        before = C.clone()
        gain, info = rk.ops.rls_update_(C, K)
        assert int(info) == 1
        assert gain.isnan().all()
        assert torch.equal(C, before)


@dtypes
def test_a_weight_does_not_take_the_gain_of_a_factor_that_failed(dtype, backend) -> None:
    C = torch.eye(3, dtype=dtype)
    C[0, 0] = -1.0
    K = 2.0 * torch.eye(3, dtype=dtype)[:2]
    gain, info = rk.ops.rls_update_(C, K)
    assert int(info) == 1
    W = torch.ones(3, 2, dtype=dtype)
    rk.ops.weight_update_(W, K, torch.ones(2, 2, dtype=dtype), gain)
    assert W.isnan().all()
