"""qr_append_rhs_: the same factor as qr_append_, and W = R^-1 B the minimiser, along a stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import builders, tolerances
from support.cases import dtypes, sized, sizes
from support.views import LAYOUTS, View

import rlsedit_kernels as rk


@sizes
@dtypes
@pytest.mark.parametrize("v", [1, 50])
def test_matches_the_reference(batch, d, u, v, dtype, backend, poisoned_memory) -> None:
    R, K = builders.triangular(batch, d, dtype, 0), builders.key_batch(batch, u, d, dtype, 1)
    B, V = builders.columns(batch, d, v, dtype, 2), builders.key_batch(batch, u, v, dtype, 3)
    expected_R, expected_B = rk.reference.qr_append_rhs_(R, B, K, V)
    alone = rk.ops.qr_append_(R.clone(), K)
    got = rk.ops.qr_append_rhs_(R, B, K, V)
    assert got[0] is R
    assert got[1] is B
    assert torch.equal(R, alone)
    tolerance = tolerances.solve(max(u, 8), 10.0, dtype)
    assert tolerances.relative_error(R, expected_R) < tolerance
    assert tolerances.relative_error(B, expected_B) < tolerance


@dtypes
def test_the_rotation_is_orthogonal(dtype, backend) -> None:
    """R'B gains K'V and nothing else, and no column of B or V becomes longer than both were."""
    R, K = builders.triangular((), 60, dtype, 4), builders.key_batch((), 25, 60, dtype, 5)
    B, V = builders.columns((), 60, 7, dtype, 6), builders.key_batch((), 25, 7, dtype, 7)
    product = R.double().mT @ B.double() + K.double().mT @ V.double()
    length = B.double().square().sum(0) + V.double().square().sum(0)
    rk.ops.qr_append_rhs_(R, B, K, V)
    assert tolerances.relative_error(R.double().mT @ B.double(), product) < tolerances.solve(25, 1.0, dtype)
    assert bool((B.double().square().sum(0) <= length * (1.0 + 100 * torch.finfo(dtype).eps)).all())


@dtypes
@pytest.mark.parametrize("u", [1, 20, 70])
def test_weight_of_a_stream(u, dtype, backend) -> None:
    """W = R^-1 B against a least-squares solution of all rows at once, by the SVD."""
    d, v, rng = sized(40, 20), 6, np.random.default_rng(8)
    R, B = 0.3 * torch.eye(d, dtype=dtype), torch.zeros(d, v, dtype=dtype)
    rows, targets = [0.3 * np.eye(d)], [np.zeros((d, v))]
    for _ in range(sized(30, 4)):
        K = builders.tensor(builders.keys(u, d, rng, "correlated"), dtype)
        V = builders.tensor(rng.standard_normal((u, v)), dtype)
        rk.ops.qr_append_rhs_(R, B, K, V)
        rows.append(K.double().cpu().numpy())
        targets.append(V.double().cpu().numpy())
    A = np.concatenate(rows)
    exact = np.linalg.lstsq(A, np.concatenate(targets), rcond=None)[0]
    W = torch.linalg.solve_triangular(R.double(), B.double(), upper=True)
    condition = np.linalg.cond(A)
    assert tolerances.relative_error(W, exact) < 30.0 * condition * torch.finfo(dtype).eps


@pytest.mark.parametrize("B_layout", LAYOUTS)
@pytest.mark.parametrize("V_layout", LAYOUTS)
def test_any_strides(B_layout, V_layout, dtype, backend, poisoned_memory) -> None:
    d = sized(53, 22)
    R, K = builders.triangular((2,), d, dtype, 9), builders.key_batch((2,), 11, d, dtype, 10)
    B, V = builders.columns((2,), d, 37, dtype, 11), builders.key_batch((2,), 11, 37, dtype, 12)
    R_view, B_view, V_view = View(R, V_layout), View(B, B_layout), View(V, V_layout)
    expected_R, expected_B = rk.reference.qr_append_rhs_(R, B, K, V)
    rk.ops.qr_append_rhs_(R_view.tensor, B_view.tensor, K, V_view.tensor)
    assert tolerances.relative_error(R_view.tensor, expected_R) < tolerances.solve(11, 10.0, dtype)
    assert tolerances.relative_error(B_view.tensor, expected_B) < tolerances.solve(11, 10.0, dtype)
    assert torch.equal(V_view.tensor, V)
    assert R_view.untouched_outside()
    assert B_view.untouched_outside()
    assert V_view.untouched_outside()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"B": torch.ones(4, 2)},
            ValueError,
            r"B must have shape \(..., d, v\) with d = R.shape\[-1\] = 3, v >= 1, got",
        ),
        ({"V": torch.ones(3, 2)}, ValueError, r"V must have shape \(..., u, v\) with u = K.shape\[-2\] = 2, v = "),
        ({"V": torch.ones(2, 4)}, ValueError, r"V must have shape .* v = B.shape\[-1\] = 2, got \(2, 4\)"),
        ({"B": torch.ones(3, 0)}, ValueError, r"B must have shape"),
        ({"B": torch.ones(3, 1).expand(3, 2)}, ValueError, r"B is written in place and must not overlap itself"),
        ({"V": torch.ones(2, 2).double()}, TypeError, r"V must have the dtype of the first argument"),
        ({"B": None}, TypeError, r"B must be a torch.Tensor, got NoneType"),
        ({"B": torch.ones(5, 3, 2)}, ValueError, r"B and R must have the same leading dimensions"),
    ],
)
def test_wrong_arguments(kwargs, error, message) -> None:
    R = torch.eye(3)
    arguments = {"B": torch.ones(3, 2), "K": torch.ones(2, 3), "V": torch.ones(2, 2), **kwargs}
    with pytest.raises(error, match=r"qr_append_rhs_: " + message):
        rk.ops.qr_append_rhs_(R, **arguments)
    assert torch.equal(R, torch.eye(3))
