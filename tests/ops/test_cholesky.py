"""cholesky against LAPACK in float64: factors, info, batches."""

from __future__ import annotations

import pytest
import torch
from support import builders, tolerances
from support.cases import dtypes
from support.views import LAYOUTS, View

import rlsedit_kernels as rk


@pytest.mark.parametrize(
    ("batch", "u"), [((), 1), ((), 2), ((), 31), ((), 64), ((), 100), ((), 257), ((5,), 33), ((2, 3), 7)]
)
@dtypes
def test_matches_the_reference(batch, u, dtype, backend, poisoned_memory) -> None:
    A = builders.symmetric(batch, u, dtype, 0, condition=50.0)
    L, info = rk.ops.cholesky(A)
    expected, _ = rk.reference.cholesky(A)
    assert info.dtype == torch.int32
    assert info.shape == batch
    assert not info.any()
    assert torch.equal(L, L.tril())
    assert tolerances.relative_error(L, expected) < tolerances.solve(u, 50.0, dtype)
    backward = tolerances.relative_error(L.double() @ L.double().mT, A)
    assert backward < 4.0 * u * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", LAYOUTS)
@dtypes
def test_any_strides(layout, dtype, backend, poisoned_memory) -> None:
    A = builders.symmetric((3,), 23, dtype, 1)
    view = View(A, layout)
    L, info = rk.ops.cholesky(view.tensor)
    assert not info.any()
    assert tolerances.relative_error(L.double() @ L.double().mT, A) < 100 * torch.finfo(dtype).eps
    assert view.untouched_outside()
    assert torch.equal(view.tensor, A)


@dtypes
def test_reads_the_lower_triangle_only(dtype, backend) -> None:
    A = builders.symmetric((), 40, dtype, 2)
    poisoned = A.tril() + torch.full_like(A, float("nan")).triu(1)
    L, info = rk.ops.cholesky(poisoned)
    assert int(info) == 0
    assert torch.equal(L, rk.ops.cholesky(A)[0])


@pytest.mark.parametrize("bad", [0, 4, 29, 70])
@dtypes
def test_info_is_the_first_bad_minor(bad, dtype, backend) -> None:
    A = torch.eye(71, dtype=dtype).repeat(3, 1, 1)
    A[1, bad, bad] = -1.0
    L, info = rk.ops.cholesky(A)
    assert info.tolist() == [0, bad + 1, 0]
    assert info.tolist() == rk.reference.cholesky(A)[1].tolist()
    assert torch.equal(L[0], torch.eye(71, dtype=dtype))
    assert torch.equal(L[2], torch.eye(71, dtype=dtype))


@dtypes
def test_singular_and_nan_are_reported(dtype, backend) -> None:
    A = torch.stack([torch.ones(5, 5), torch.full((5, 5), float("nan")), torch.zeros(5, 5)]).to(dtype)
    _, info = rk.ops.cholesky(A)
    assert bool((info > 0).all())


@pytest.mark.parametrize(
    ("A", "error", "message"),
    [
        (torch.ones(3, 4), ValueError, r"cholesky: A must have shape \(..., u, u\).*got \(3, 4\)"),
        (torch.ones(3), ValueError, r"A must have shape"),
        (torch.eye(3).to(torch.int64), TypeError, r"A must be float32 or float64"),
        (None, TypeError, r"A must be a torch.Tensor, got NoneType"),
    ],
)
def test_wrong_arguments(A, error, message) -> None:
    with pytest.raises(error, match=message):
        rk.ops.cholesky(A)
