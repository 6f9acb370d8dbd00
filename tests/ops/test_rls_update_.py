"""rls_update_ against the definition S <- forget S + K'K / noise, inverted densely in float64."""

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
@pytest.mark.parametrize(("noise", "forget"), [(1.0, 1.0), (0.1, 1.0), (4.0, 0.9)])
def test_matches_the_definition(batch, d, u, dtype, noise, forget, backend, poisoned_memory) -> None:
    C = builders.symmetric(batch, d, dtype, 0)
    K = builders.key_batch(batch, u, d, dtype, 1)
    information = forget * np.linalg.inv(C.double().cpu().numpy()) + (K.double().mT @ K.double()).cpu().numpy() / noise
    expected = np.linalg.inv(information)
    gain, info = rk.ops.rls_update_(C, K, noise, forget)
    assert not info.any()
    tolerance = tolerances.solve(max(u, d), 100.0, dtype)
    assert tolerances.relative_error(C, expected) < tolerance
    assert torch.equal(C, C.mT)
    assert gain.is_contiguous()
    assert tolerances.relative_error(gain, expected @ K.double().mT.cpu().numpy() / noise) < tolerance


@pytest.mark.parametrize("C_layout", LAYOUTS)
@pytest.mark.parametrize("K_layout", LAYOUTS)
def test_any_strides(C_layout, K_layout, dtype, backend, poisoned_memory) -> None:
    C, K = builders.symmetric((2,), 43, dtype, 2), builders.key_batch((2,), 8, 43, dtype, 3)
    C_view, K_view = View(C, C_layout), View(K, K_layout)
    expected_C, expected_gain, _ = rk.reference.rls_update_(C, K, 0.5, 0.95)
    gain, _ = rk.ops.rls_update_(C_view.tensor, K_view.tensor, 0.5, 0.95)
    assert tolerances.relative_error(C_view.tensor, expected_C) < tolerances.solve(8, 5.0, dtype)
    assert tolerances.relative_error(gain, expected_gain) < tolerances.solve(8, 5.0, dtype)
    assert C_view.untouched_outside()
    assert K_view.untouched_outside()


@dtypes
@pytest.mark.parametrize("forget", [1.0, 0.9])
def test_a_failed_batch_element_is_left_alone(dtype, forget, backend) -> None:
    C = builders.symmetric((3,), 12, dtype, 4)
    K = builders.key_batch((3,), 4, 12, dtype, 5)
    C[1] = -10.0 * torch.eye(12, dtype=dtype)
    C[1] -= 1e3 * (K[1].mT @ K[1] + (K[1].mT @ K[1]).mT) / 2
    before = C.clone()
    _, info = rk.ops.rls_update_(C, K, 1.0, forget)
    expected, _, expected_info = rk.reference.rls_update_(before, K, 1.0, forget)
    assert info.tolist() == expected_info.tolist()
    assert int(info[1]) > 0
    assert torch.equal(C[1], before[1])
    for i in (0, 2):
        assert tolerances.relative_error(C[i], expected[i]) < tolerances.solve(4, 10.0, dtype)


@dtypes
def test_nan_keys_are_reported_and_write_nothing(dtype, backend) -> None:
    C, K = builders.symmetric((), 12, dtype, 6), builders.key_batch((), 4, 12, dtype, 7)
    K[2, 3] = float("nan")
    before = C.clone()
    _, info = rk.ops.rls_update_(C, K)
    assert int(info) > 0
    assert torch.equal(C, before)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"noise": -0.5}, ValueError, r"rls_update_: noise must be finite and >= 0, got -0.5"),
        ({"noise": float("inf")}, ValueError, r"noise must be finite"),
        ({"forget": 0.0}, ValueError, r"forget must be in \(0, 1\], got 0.0"),
        ({"forget": 1.5}, ValueError, r"forget must be in \(0, 1\], got 1.5"),
        ({"forget": float("nan")}, ValueError, r"forget must be in"),
        ({"forget": None}, TypeError, r"forget must be a Python number, got NoneType"),
        (
            {"K": torch.ones(2, 4)},
            ValueError,
            r"K must have shape \(..., u, d\) with d = C.shape\[-1\] = 3, u >= 1, got \(2, 4\)",
        ),
    ],
)
def test_wrong_arguments(kwargs, error, message) -> None:
    C = torch.eye(3)
    arguments = {"K": torch.ones(2, 3), **kwargs}
    with pytest.raises(error, match=message):
        rk.ops.rls_update_(C, **arguments)
    assert torch.equal(C, torch.eye(3))
