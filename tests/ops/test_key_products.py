"""key_products against float64: any matrix and its transpose, few keys and many, nothing outside written."""

from __future__ import annotations

import pytest
import torch
from support import builders, tolerances
from support.cases import dtypes, sizes
from support.views import LAYOUTS, View

import rlsedit_kernels as rk

error = tolerances.relative_error


@sizes
@dtypes
@pytest.mark.parametrize("n", [1, 67])
def test_matches_the_reference(batch, d, u, n, dtype, backend, poisoned_memory) -> None:
    A, K = builders.columns(batch, d, n, dtype, 0), builders.key_batch(batch, u, d, dtype, 1)
    Y = rk.ops.key_products(A, K)
    assert Y.shape == (*batch, u, n)
    assert Y.is_contiguous()
    assert error(Y, rk.reference.key_products(A, K)) < tolerances.product(d, dtype)


@dtypes
@pytest.mark.parametrize("A_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("u", [1, 6, 21])
def test_any_strides(u, layout, A_layout, dtype, backend, poisoned_memory) -> None:
    A, K = builders.columns((2,), 41, 35, dtype, 0), builders.key_batch((2,), u, 41, dtype, 1)
    expected = rk.reference.key_products(A, K)
    view, keys = View(A, A_layout), View(K, layout)
    assert error(rk.ops.key_products(view.tensor, keys.tensor), expected) < tolerances.product(41, dtype)
    assert view.untouched_outside()
    assert keys.untouched_outside()
    assert torch.equal(view.tensor, A)
    assert torch.equal(keys.tensor, K)


@dtypes
@pytest.mark.parametrize("u", range(1, 10))
def test_few_keys_and_many_columns(u, dtype, backend, poisoned_memory) -> None:
    """Rows of A are read in pieces of a length that depends on the number of keys; here with a rest behind them."""
    A, K = builders.columns((), 33, 413, dtype, 0), builders.key_batch((), u, 33, dtype, 1)
    view = View(A, "sliced")
    assert error(rk.ops.key_products(view.tensor, K), rk.reference.key_products(A, K)) < tolerances.product(33, dtype)


@dtypes
@pytest.mark.parametrize("u", [1, 21])
@pytest.mark.parametrize("turned", [False, True])
def test_the_innovation_is_that_of_the_weight_update(u, turned, dtype, backend) -> None:
    """V - K W of a weight that stays is to be comparable with that of one that is changed."""
    d, v = 300, 70
    W, K = builders.columns((), d, v, dtype, 0), builders.key_batch((), u, d, dtype, 1)
    W = W.mT.contiguous().mT if turned else W
    V = builders.key_batch((), u, v, dtype, 2)
    expected = V - rk.ops.key_products(W, K)
    assert torch.equal(rk.ops.weight_update_(W, K, V, torch.zeros(d, u, dtype=dtype)), expected)


A, K = torch.ones(3, 5), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ((torch.ones(3, 0), K), ValueError, r"A must have shape \(..., d, n\), both >= 1, got \(3, 0\)"),
        (
            (A, torch.ones(2, 4)),
            ValueError,
            r"K must have shape \(..., u, d\) with d = A.shape\[-2\] = 3, u >= 1, got \(2, 4\)",
        ),
        ((A, torch.ones(0, 3)), ValueError, r"K must have shape"),
        ((A.expand(4, 3, 5), K), ValueError, r"K and A must have the same leading dimensions"),
        ((A, K.double()), TypeError, r"K must have the dtype"),
        ((A.half(), K), TypeError, r"A must be float32 or float64"),
        (([[1.0]], K), TypeError, r"A must be a torch.Tensor"),
    ],
)
def test_wrong_arguments(given, kind, message) -> None:
    with pytest.raises(kind, match=f"key_products: {message}"):
        rk.ops.key_products(*given)
