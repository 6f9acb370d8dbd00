"""qr_gain: two triangular solves, and the gain of the recursion when R holds the batch."""

from __future__ import annotations

import pytest
import torch
from support import builders, tolerances
from support.cases import dtypes, sized, sizes
from support.views import LAYOUTS, View

import rlsedit_kernels as rk


@sizes
@dtypes
def test_matches_the_reference(batch, d, u, dtype, backend, poisoned_memory) -> None:
    R, K = builders.triangular(batch, d, dtype, 0), builders.key_batch(batch, u, d, dtype, 1)
    gain = rk.ops.qr_gain(R, K)
    assert gain.is_contiguous()
    assert gain.shape == (*batch, d, u)
    assert tolerances.relative_error(gain, rk.reference.qr_gain(R, K)) < tolerances.solve(8, 100.0, dtype)


@dtypes
def test_each_row_solves_its_own_nearby_problem(dtype, backend) -> None:
    """Backward error row by row, whatever the condition: |S g - K'| against |S| |g|."""
    d = sized(200, 70)
    R, K = builders.triangular((), d, dtype, 2, condition=1e8), builders.key_batch((), 13, d, dtype, 3)
    gain = rk.ops.qr_gain(R, K).double()
    R64 = R.double()
    half = R64 @ gain
    X = torch.linalg.solve_triangular(R64.mT, K.double().mT, upper=False)
    residual = (half - X).norm(dim=0)
    scale = R64.abs() @ gain.abs()
    growth = (R64.mT.abs() @ X.abs()).norm() / K.double().norm()
    assert bool((residual <= 200 * torch.finfo(dtype).eps * growth * scale.norm(dim=0)).all())


@dtypes
def test_near_the_identity_a_gain_is_as_exact_as_two_solves_of_torch(dtype, backend) -> None:
    """What an element loses is small there, and taken off once: a rounding each would double the error."""
    d = sized(300, 130)
    R = builders.triangular((), d, torch.float64, 8).triu(1) * 0.3
    R = (R + torch.eye(d)).to(dtype)
    K = builders.key_batch((), 40, d, dtype, 9)
    exact = rk.reference.qr_gain(R, K)
    half = torch.linalg.solve_triangular(R.mT, K.mT, upper=False)
    plain = torch.linalg.solve_triangular(R, half, upper=True)
    error = tolerances.relative_error
    # In float64 the reference is two solves too: where torch calls the same routine (AArch64), they agree to the bit.
    allowed = 2.0 * max(error(plain, exact), torch.finfo(dtype).eps)
    assert error(rk.ops.qr_gain(R, K), exact) <= allowed


@dtypes
def test_gain_after_the_append_is_that_of_the_covariance(dtype, backend) -> None:
    """Fact 1: g = C_new K'; the covariance op and the triangular factor agree."""
    C = builders.symmetric((), 64, dtype, 4)
    K = builders.key_batch((), 10, 64, dtype, 5)
    R = torch.linalg.cholesky(torch.linalg.inv(C.double())).mT.contiguous().to(dtype)
    gain, _ = rk.ops.rls_update_(C, K)
    rk.ops.qr_append_(R, K)
    assert tolerances.relative_error(rk.ops.qr_gain(R, K), gain) < tolerances.solve(10, 100.0, dtype)


@dtypes
def test_below_the_diagonal_nothing_is_read(dtype, backend) -> None:
    R, K = builders.triangular((), 70, dtype, 6), builders.key_batch((), 9, 70, dtype, 7)
    marked = R + torch.full_like(R, float("nan")).tril(-1).nan_to_num(0.0)
    marked[torch.ones_like(R, dtype=torch.bool).tril(-1)] = float("nan")
    assert torch.equal(rk.ops.qr_gain(marked, K), rk.ops.qr_gain(R, K))


@pytest.mark.parametrize("R_layout", LAYOUTS)
@pytest.mark.parametrize("K_layout", LAYOUTS)
def test_any_strides(R_layout, K_layout, dtype, backend, poisoned_memory) -> None:
    d = sized(221, 67)
    R, K = builders.triangular((2,), d, dtype, 8), builders.key_batch((2,), 21, d, dtype, 9)
    R_view, K_view = View(R, R_layout), View(K, K_layout)
    gain = rk.ops.qr_gain(R_view.tensor, K_view.tensor)
    assert tolerances.relative_error(gain, rk.reference.qr_gain(R, K)) < tolerances.solve(21, 100.0, dtype)
    assert torch.equal(R_view.tensor, R)
    assert torch.equal(K_view.tensor, K)
    assert R_view.untouched_outside()
    assert K_view.untouched_outside()


@pytest.mark.parametrize(
    ("R", "K", "error", "message"),
    [
        (torch.ones(3, 4), torch.ones(2, 4), ValueError, r"R must have shape \(..., d, d\)"),
        (torch.eye(3), torch.ones(2, 4), ValueError, r"K must have shape \(..., u, d\) with d = R.shape\[-1\] = 3"),
        (torch.eye(3), torch.ones(2, 3).double(), TypeError, r"K must have the dtype of the first argument"),
        (torch.eye(3), None, TypeError, r"K must be a torch.Tensor, got NoneType"),
    ],
)
def test_wrong_arguments(R, K, error, message) -> None:
    with pytest.raises(error, match=r"qr_gain: " + message):
        rk.ops.qr_gain(R, K)
