"""gain_products against float64, on every back end, layout and size."""

from __future__ import annotations

import pytest
import torch
from support import builders, tolerances
from support.cases import dtypes, sizes
from support.views import LAYOUTS, View

import rlsedit_kernels as rk


@sizes
@dtypes
def test_matches_the_reference(batch, d, u, dtype, backend, poisoned_memory) -> None:
    C = builders.symmetric(batch, d, dtype, 0)
    K = builders.key_batch(batch, u, d, dtype, 1)
    Y, G = rk.ops.gain_products(C, K)
    expected_Y, expected_G = rk.reference.gain_products(C, K)
    assert Y.shape == (*batch, d, u)
    assert Y.is_contiguous()
    assert G.shape == (*batch, u, u)
    assert G.is_contiguous()
    assert tolerances.relative_error(Y, expected_Y) < tolerances.product(d, dtype)
    assert tolerances.relative_error(G, expected_G) < tolerances.product(d, dtype)
    assert torch.equal(G, G.mT)


@pytest.mark.parametrize("C_layout", LAYOUTS)
@pytest.mark.parametrize("K_layout", LAYOUTS)
@dtypes
def test_any_strides(C_layout, K_layout, dtype, backend, poisoned_memory) -> None:
    C = builders.symmetric((2,), 37, dtype, 2)
    K = builders.key_batch((2,), 11, 37, dtype, 3)
    C_view, K_view = View(C, C_layout), View(K, K_layout)
    Y, G = rk.ops.gain_products(C_view.tensor, K_view.tensor)
    expected_Y, expected_G = rk.reference.gain_products(C, K)
    assert tolerances.relative_error(Y, expected_Y) < tolerances.product(37, dtype)
    assert tolerances.relative_error(G, expected_G) < tolerances.product(37, dtype)
    assert C_view.untouched_outside()
    assert K_view.untouched_outside()


@pytest.mark.parametrize("kind", ["correlated", "duplicated", "tiny", "huge"])
def test_kinds_of_keys(kind, dtype, backend) -> None:
    C = builders.symmetric((), 64, dtype, 4, condition=1e6)
    K = builders.key_batch((), 20, 64, dtype, 5, kind)
    Y, G = rk.ops.gain_products(C, K)
    expected_Y, expected_G = rk.reference.gain_products(C, K)
    assert tolerances.relative_error(Y, expected_Y) < tolerances.product(64, dtype)
    assert tolerances.relative_error(G, expected_G) < tolerances.product(64, dtype)


def test_error_is_that_of_the_torch_sequence(backend) -> None:
    """At most twice the error of plain float32 products against float64 (the rule for every kernel)."""
    C = builders.symmetric((), 512, torch.float32, 6, condition=1e4)
    K = builders.key_batch((), 64, 512, torch.float32, 7)
    exact, _ = rk.reference.gain_products(C, K)
    ours = tolerances.relative_error(rk.ops.gain_products(C, K)[0], exact)
    torchs = tolerances.relative_error(C @ K.mT, exact)
    assert ours <= 2.0 * torchs


def test_global_precision_switches_do_not_reach_it(backend) -> None:
    C = builders.symmetric((), 200, torch.float32, 8)
    K = builders.key_batch((), 40, 200, torch.float32, 9)
    expected = rk.ops.gain_products(C, K)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got = rk.ops.gain_products(C, K)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("C", "K", "error", "message"),
    [
        ([1.0], torch.ones(2, 3), TypeError, r"gain_products: C must be a torch.Tensor, got list"),
        (torch.ones(3, 4), torch.ones(2, 3), ValueError, r"C must have shape \(..., d, d\).*got \(3, 4\)"),
        (torch.eye(0), torch.ones(2, 0), ValueError, r"C must have shape"),
        (
            torch.eye(3),
            torch.ones(2, 4),
            ValueError,
            r"K must have shape \(..., u, d\) with d = C.shape\[-1\] = 3, u >= 1, got \(2, 4\)",
        ),
        (torch.eye(3), torch.ones(3), ValueError, r"K must have shape"),
        (torch.eye(3), torch.ones(0, 3), ValueError, r"K must have shape .* u >= 1, got \(0, 3\)"),
        (
            torch.eye(3),
            torch.ones(2, 3).double(),
            TypeError,
            r"K must have the dtype of the first argument, torch.float32",
        ),
        (torch.eye(3).half(), torch.ones(2, 3).half(), TypeError, r"C must be float32 or float64, got torch.float16"),
        (torch.eye(3).to_sparse(), torch.ones(2, 3), TypeError, r"C must be a dense"),
        (torch.eye(3), torch.ones(2, 3, device="meta"), ValueError, r"K must be on the device"),
        (
            torch.eye(3),
            torch.ones(4, 2, 3),
            ValueError,
            r"K and C must have the same leading dimensions, got \(4,\) and \(\)",
        ),
    ],
)
def test_wrong_arguments(C, K, error, message) -> None:
    with pytest.raises(error, match=message):
        rk.ops.gain_products(C, K)
