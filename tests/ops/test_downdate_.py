"""downdate_ against float64: in place, exactly symmetric, nothing outside the view written."""

from __future__ import annotations

import pytest
import torch
from support import builders, tolerances
from support.cases import dtypes, sizes
from support.views import LAYOUTS, View

import rlsedit_kernels as rk


@sizes
@dtypes
@pytest.mark.parametrize("alpha", [-1.0, 1.0, 0.25])
def test_matches_the_reference(batch, d, u, dtype, alpha, backend, poisoned_memory) -> None:
    C = builders.symmetric(batch, d, dtype, 0)
    Z = builders.columns(batch, d, u, dtype, 1)
    expected = rk.reference.downdate_(C, Z, alpha)
    pointer = C.data_ptr()
    result = rk.ops.downdate_(C, Z, alpha)
    assert result is C
    assert C.data_ptr() == pointer
    assert torch.equal(C, C.mT)
    assert tolerances.relative_error(C, expected) < tolerances.product(u, dtype)


@pytest.mark.parametrize("C_layout", LAYOUTS)
@pytest.mark.parametrize("Z_layout", LAYOUTS)
@dtypes
def test_any_strides(C_layout, Z_layout, dtype, backend, poisoned_memory) -> None:
    C, Z = builders.symmetric((2,), 41, dtype, 2), builders.columns((2,), 41, 6, dtype, 3)
    C_view, Z_view = View(C, C_layout), View(Z, Z_layout)
    rk.ops.downdate_(C_view.tensor, Z_view.tensor)
    assert tolerances.relative_error(C_view.tensor, rk.reference.downdate_(C, Z)) < tolerances.product(6, dtype)
    assert torch.equal(C_view.tensor, C_view.tensor.mT)
    assert C_view.untouched_outside()
    assert Z_view.untouched_outside()
    assert torch.equal(Z_view.tensor, Z)


@dtypes
def test_back_and_forth(dtype, backend) -> None:
    C = builders.symmetric((), 90, dtype, 4)
    Z = builders.columns((), 90, 30, dtype, 5)
    before = C.clone()
    rk.ops.downdate_(C, Z, -1.0)
    assert not torch.equal(C, before)
    rk.ops.downdate_(C, Z, 1.0)
    assert tolerances.relative_error(C, before) < tolerances.product(30, dtype)


@pytest.mark.parametrize(
    ("C", "Z", "alpha", "error", "message"),
    [
        (
            torch.eye(3),
            torch.ones(4, 2),
            -1.0,
            ValueError,
            r"downdate_: Z must have shape \(..., d, u\) with d = C.shape\[-1\] = 3",
        ),
        (torch.eye(3), torch.ones(3, 0), -1.0, ValueError, r"u >= 1"),
        (torch.eye(3), torch.ones(3, 2), float("inf"), ValueError, r"alpha must be finite"),
        (torch.ones(1, 1).expand(3, 3), torch.ones(3, 2), -1.0, ValueError, r"must not overlap itself"),
        (torch.eye(3), torch.ones(3, 2).double(), -1.0, TypeError, r"Z must have the dtype"),
        (torch.eye(3).expand(2, 3, 3), torch.ones(2, 3, 2), -1.0, ValueError, r"must not overlap itself"),
        (torch.ones(5).as_strided((3, 3), (1, 1)), torch.ones(3, 2), -1.0, ValueError, r"must not overlap itself"),
    ],
)
def test_wrong_arguments(C, Z, alpha, error, message) -> None:
    before = C.clone()
    with pytest.raises(error, match=message):
        rk.ops.downdate_(C, Z, alpha)
    assert torch.equal(C, before)
