"""gain_solve against two triangular solves in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import builders, tolerances
from support.cases import dtypes, sizes
from support.views import LAYOUTS, View

import rlsedit_kernels as rk


@sizes
@dtypes
@pytest.mark.parametrize("noise", [0.01, 1.0, 50.0])
def test_matches_the_reference(batch, d, u, dtype, noise, backend, poisoned_memory) -> None:
    Y = builders.columns(batch, d, u, dtype, 0)
    G = builders.symmetric(batch, u, dtype, 1)
    gain, Z, info = rk.ops.gain_solve(Y, G, noise)
    expected_gain, expected_Z, _ = rk.reference.gain_solve(Y, G, noise)
    condition = (1.0 + noise) / (0.01 + noise)
    assert not info.any()
    assert info.shape == batch
    assert gain.is_contiguous()
    assert Z.is_contiguous()
    assert tolerances.relative_error(gain, expected_gain) < tolerances.solve(u, condition, dtype)
    assert tolerances.relative_error(Z, expected_Z) < tolerances.solve(u, condition, dtype)


@pytest.mark.parametrize("Y_layout", LAYOUTS)
@pytest.mark.parametrize("G_layout", LAYOUTS)
def test_any_strides(Y_layout, G_layout, dtype, backend, poisoned_memory) -> None:
    Y, G = builders.columns((2,), 29, 13, dtype, 2), builders.symmetric((2,), 13, dtype, 3)
    Y_view, G_view = View(Y, Y_layout), View(G, G_layout)
    gain, Z, _ = rk.ops.gain_solve(Y_view.tensor, G_view.tensor, 0.3)
    expected_gain, expected_Z, _ = rk.reference.gain_solve(Y, G, 0.3)
    assert tolerances.relative_error(gain, expected_gain) < tolerances.solve(13, 5.0, dtype)
    assert tolerances.relative_error(Z, expected_Z) < tolerances.solve(13, 5.0, dtype)
    assert Y_view.untouched_outside()
    assert G_view.untouched_outside()
    assert torch.equal(Y_view.tensor, Y)
    assert torch.equal(G_view.tensor, G)


@dtypes
def test_Z_is_the_root_of_the_downdate(dtype, backend) -> None:
    Y, G = builders.columns((), 50, 21, dtype, 4), builders.symmetric((), 21, dtype, 5)
    gain, Z, _ = rk.ops.gain_solve(Y, G, 0.1)
    left, right = Z.double() @ Z.double().mT, gain.double() @ Y.double().mT
    assert tolerances.relative_error(left, right) < tolerances.solve(21, 10.0, dtype)


@dtypes
def test_hard_write(dtype, backend) -> None:
    """noise = 0: gain G = Y."""
    Y, G = builders.columns((), 30, 9, dtype, 6), builders.symmetric((), 9, dtype, 7)
    gain, _, info = rk.ops.gain_solve(Y, G, 0.0)
    assert int(info) == 0
    assert tolerances.relative_error(gain.double() @ G.double(), Y) < tolerances.solve(9, 100.0, dtype)


@dtypes
def test_failure_is_info_of_its_own_batch_element(dtype, backend) -> None:
    Y, G = builders.columns((3,), 10, 4, dtype, 8), builders.symmetric((3,), 4, dtype, 9)
    G[1] -= 5.0 * torch.eye(4, dtype=dtype)
    gain, Z, info = rk.ops.gain_solve(Y, G, 0.5)
    expected = rk.reference.gain_solve(Y, G, 0.5)
    assert info.tolist() == expected[2].tolist()
    assert info.tolist()[0] == 0
    assert info.tolist()[1] > 0
    for i in (0, 2):
        assert np.isfinite(gain[i].cpu().numpy()).all()
        assert tolerances.relative_error(Z[i], expected[1][i]) < tolerances.solve(4, 5.0, dtype)


@pytest.mark.parametrize(
    ("Y", "G", "noise", "error", "message"),
    [
        (
            torch.ones(4, 2),
            torch.eye(3),
            1.0,
            ValueError,
            r"gain_solve: G must have shape \(..., u, u\) with u = Y.shape\[-1\] = 2",
        ),
        (torch.ones(4, 0), torch.eye(0), 1.0, ValueError, r"Y must have shape \(..., d, u\), both >= 1"),
        (torch.ones(4), torch.eye(4), 1.0, ValueError, r"Y must have shape"),
        (torch.ones(4, 2), torch.eye(2).double(), 1.0, TypeError, r"G must have the dtype"),
        (torch.ones(4, 2), torch.eye(2), -1.0, ValueError, r"noise must be finite and >= 0, got -1.0"),
        (torch.ones(4, 2), torch.eye(2), float("nan"), ValueError, r"noise must be finite and >= 0, got nan"),
        (torch.ones(4, 2), torch.eye(2), "1", TypeError, r"noise must be a Python number, got str"),
        (torch.ones(2, 4, 2), torch.eye(2), 1.0, ValueError, r"G and Y must have the same leading dimensions"),
    ],
)
def test_wrong_arguments(Y, G, noise, error, message) -> None:
    with pytest.raises(error, match=message):
        rk.ops.gain_solve(Y, G, noise)
