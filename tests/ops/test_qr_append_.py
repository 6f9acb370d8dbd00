"""qr_append_ in the manner of SciPy's test_decomp_update.py: what must hold of a factor, on rows of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import lapack
from support import builders, tolerances
from support.cases import dtypes, sized, sizes
from support.views import LAYOUTS, View

import rlsedit_kernels as rk


def information(*rows: torch.Tensor) -> np.ndarray:
    """sum A'A in float64."""
    return sum((A.double().mT @ A.double()).cpu().numpy() for A in rows)


def check_factor(R: torch.Tensor, expected: np.ndarray, steps: int, u: int) -> None:
    """R'R, the triangle and the diagonal: all that a factor promises."""
    assert torch.equal(R, R.triu())
    assert bool((R.diagonal(dim1=-2, dim2=-1) >= 0.0).all())
    limit = 10.0 * u * torch.finfo(R.dtype).eps * np.sqrt(steps)
    assert tolerances.relative_error(R.double().mT @ R.double(), expected) < limit


@sizes
@dtypes
def test_factor_of_the_stacked_matrix(batch, d, u, dtype, backend, poisoned_memory) -> None:
    R, K = builders.triangular(batch, d, dtype, 0), builders.key_batch(batch, u, d, dtype, 1)
    before = R.clone()
    assert rk.ops.qr_append_(R, K) is R
    check_factor(R, information(before, K), 1, max(u, 8))
    exact = rk.reference.qr_append_(before, K)
    assert tolerances.relative_error(R, exact) < tolerances.solve(max(u, 8), 10.0, dtype)


@dtypes
@pytest.mark.parametrize("u", [1, 3, 16, 40, 64, 65, 100, 130])
@pytest.mark.parametrize("kind", ["plain", "correlated", "duplicated", "tiny", "huge"])
def test_a_stream_of_appends(u, kind, dtype, backend) -> None:
    """Backward error of t batches of u rows: at most 10 u eps sqrt(t)."""
    d, steps, rng = sized(97, 21), sized(40, 4), np.random.default_rng(3)
    R = builders.triangular((), d, dtype, 2, condition=1e4)
    total = information(R)
    for _ in range(steps):
        K = builders.tensor(builders.keys(u, d, rng, kind), dtype)
        total = total + information(K)
        rk.ops.qr_append_(R, K)
    check_factor(R, total, steps, u)


@dtypes
def test_diagonal_matches_that_of_another_order(dtype, backend) -> None:
    """Equal problems give equal factors: the order of the rows does not matter."""
    R, K = builders.triangular((), 50, dtype, 4), builders.key_batch((), 30, 50, dtype, 5)
    one, other = R.clone(), R.clone()
    rk.ops.qr_append_(one, K)
    for part in (K[17:], K[:9], K[9:17]):
        rk.ops.qr_append_(other, part)
    assert tolerances.relative_error(one, other) < tolerances.solve(30, 10.0, dtype)


@dtypes
@pytest.mark.parametrize("rows", [5, 40, 41])
def test_from_nothing(rows, dtype, backend) -> None:
    """R = 0: the factor of K itself, rank-deficient until d independent rows are there."""
    R, K = torch.zeros(40, 40, dtype=dtype), builders.key_batch((), rows, 40, dtype, 6)
    rk.ops.qr_append_(R, K)
    check_factor(R, information(K), 1, max(rows, 8))
    noise = 100 * torch.finfo(dtype).eps * float(R.diagonal().max())  # what is left where there were no rows
    assert int((R.diagonal() > noise).sum()) == min(rows, 40)


@dtypes
def test_zero_and_dependent_rows(dtype, backend) -> None:
    R, K = torch.zeros(30, 30, dtype=dtype), builders.key_batch((), 6, 30, dtype, 7)
    K[3] = 0.0
    K[4] = 2.0 * K[1]
    K[:, 11] = 0.0
    rk.ops.qr_append_(R, K)
    check_factor(R, information(K), 1, 8)
    zero = torch.zeros(3, 30, dtype=dtype)
    before = R.clone()
    rk.ops.qr_append_(R, zero)
    assert torch.equal(R, before)


@dtypes
def test_columns_that_shrink_within_a_panel(dtype, backend) -> None:
    """Each is a tenth of the one before once that is reduced: its square is no difference of products of the rows."""
    rng, d, u = np.random.default_rng(19), 20, 14
    left, right = (np.linalg.qr(rng.standard_normal((n, u)))[0] for n in (u, d))
    K = builders.tensor(left * 10.0 ** -np.arange(u) @ right.T, dtype)
    R = torch.zeros(d, d, dtype=dtype)
    exact = rk.reference.qr_append_(R, K)
    rk.ops.qr_append_(R, K)
    lost = (R.double() - torch.as_tensor(exact, device=R.device).double()).diagonal().abs().max()
    assert float(lost) < 20 * torch.finfo(dtype).eps


@dtypes
@pytest.mark.parametrize("first", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("second", [1e-20, 1.0, 1e20])
def test_rows_of_any_size(first, second, dtype, backend) -> None:
    """1e+20 squared is Inf in float32 and 1e-20 squared is 0: neither may be met on the way."""
    R = builders.triangular((), 45, dtype, 8) * first
    K = builders.key_batch((), 12, 45, dtype, 9) * second
    K[3] *= 1e-3
    scale = max(first, second)
    expected = information(R.double() / scale, K.double() / scale)
    rk.ops.qr_append_(R, K)
    assert bool(torch.isfinite(R).all())
    check_factor(R.double() / scale, expected, 1, round(12 * torch.finfo(dtype).eps / torch.finfo(torch.float64).eps))


@pytest.mark.parametrize("size", [1e-170, 1e170, 1e-310])
def test_float64_rows_whose_squares_do_not_exist(size) -> None:
    with rk.use_backend("cpu" if "cpu" in {row.name for row in rk.backends() if row.available} else "torch"):
        K = builders.key_batch((), 25, 20, torch.float64, 10).cpu() * size
        R = torch.zeros(20, 20, dtype=torch.float64, device="cpu")
        rk.ops.qr_append_(R, K)
    scale = 2.0 ** round(np.log2(size))
    accuracy = max(1e-13, 100 * 5e-324 / size)
    scaled = (R.cpu().numpy() / scale, K.cpu().numpy() / scale)
    assert tolerances.relative_error(scaled[0].T @ scaled[0], scaled[1].T @ scaled[1]) < accuracy


@dtypes
def test_a_negative_diagonal_is_turned(dtype, backend) -> None:
    R, K = builders.triangular((), 37, dtype, 11), builders.key_batch((), 5, 37, dtype, 12)
    turned = R.clone()
    turned[::3] *= -1.0
    rk.ops.qr_append_(R, K)
    rk.ops.qr_append_(turned, K)
    assert tolerances.relative_error(turned, R) < tolerances.solve(8, 10.0, dtype)
    assert bool((turned.diagonal() >= 0.0).all())


@dtypes
def test_below_the_diagonal_nothing_is_touched(dtype, backend) -> None:
    d = sized(70, 35)
    R, K = builders.triangular((), d, dtype, 13), builders.key_batch((), 9, d, dtype, 14)
    below = torch.full_like(R, 77.0).tril(-1)
    below[5, 2] = float("nan")
    marked = R + below.nan_to_num(0.0)
    marked[5, 2] = float("nan")
    rk.ops.qr_append_(R, K)
    rk.ops.qr_append_(marked, K)
    assert torch.equal(marked.triu(), R)
    assert torch.equal(marked.tril(-1).nan_to_num(0.5), below.nan_to_num(0.5))


@pytest.mark.parametrize("R_layout", LAYOUTS)
@pytest.mark.parametrize("K_layout", LAYOUTS)
def test_any_strides(R_layout, K_layout, dtype, backend, poisoned_memory) -> None:
    d = sized(83, 22)
    R, K = builders.triangular((2,), d, dtype, 15), builders.key_batch((2,), 21, d, dtype, 16)
    R_view, K_view = View(R, R_layout), View(K, K_layout)
    rk.ops.qr_append_(R_view.tensor, K_view.tensor)
    expected = rk.reference.qr_append_(R, K)
    assert tolerances.relative_error(R_view.tensor, expected) < tolerances.solve(21, 10.0, dtype)
    assert torch.equal(K_view.tensor, K)
    assert R_view.untouched_outside()
    assert K_view.untouched_outside()


@pytest.mark.parametrize(
    ("R", "K", "error", "message"),
    [
        (torch.ones(3, 4), torch.ones(2, 4), ValueError, r"R must have shape \(..., d, d\) with d >= 1, got \(3, 4\)"),
        (torch.eye(3), torch.ones(2, 4), ValueError, r"K must have shape \(..., u, d\) with d = R.shape\[-1\] = 3"),
        (torch.eye(3), torch.ones(0, 3), ValueError, r"K must have shape .* u >= 1, got \(0, 3\)"),
        (torch.eye(3), torch.ones(2, 3).double(), TypeError, r"K must have the dtype of the first argument"),
        (torch.eye(3).half(), torch.ones(2, 3).half(), TypeError, r"R must be float32 or float64"),
        (torch.eye(3), torch.ones(2, 2, 3), ValueError, r"K and R must have the same leading dimensions"),
        (torch.ones(1, 1).expand(3, 3), torch.ones(2, 3), ValueError, r"R is written in place and must not overlap"),
        (torch.eye(3), [[1.0, 2.0, 3.0]], TypeError, r"K must be a torch.Tensor, got list"),
    ],
)
def test_wrong_arguments(R, K, error, message) -> None:
    before = R.clone()
    with pytest.raises(error, match=r"qr_append_: " + message):
        rk.ops.qr_append_(R, K)
    assert torch.equal(R, before)


def test_small_batches_do_not_round_r_anew(backend) -> None:
    """What the reflectors are applied as corrections for: over a stream, a fraction of the error of LAPACK's tpqrt."""
    d, u, steps, rng = sized(64, 20), 8, sized(300, 12), np.random.default_rng(17)
    R = builders.triangular((), d, torch.float32, 18)
    lapacks, total = np.asfortranarray(R.cpu().numpy()), information(R)
    for _ in range(steps):
        K = builders.tensor(builders.keys(u, d, rng) * 1e-2, torch.float32)
        total = total + information(K)
        rk.ops.qr_append_(R, K)
        lapacks = lapack.stpqrt(0, min(32, d), lapacks, np.asfortranarray(K.cpu().numpy()))[0]
    lapacks = np.triu(lapacks).astype(np.float64)
    ours = tolerances.relative_error(R.double().mT @ R.double(), total)
    theirs = tolerances.relative_error(lapacks.T @ lapacks, total)
    assert ours < 10 * torch.finfo(torch.float32).eps
    assert ours < 0.5 * theirs
