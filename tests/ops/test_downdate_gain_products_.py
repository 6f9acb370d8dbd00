"""downdate_gain_products_ is downdate_ followed by gain_products, in one call."""

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
    C, Z = builders.symmetric(batch, d, dtype, 0), builders.columns(batch, d, 5, dtype, 1) * 0.1
    K = builders.key_batch(batch, u, d, dtype, 2)
    expected_C, expected_Y, expected_G = rk.reference.downdate_gain_products_(C, Z, K, -0.5)
    Y, G = rk.ops.downdate_gain_products_(C, Z, K, -0.5)
    tolerance = tolerances.product(max(d, 5), dtype)
    assert tolerances.relative_error(C, expected_C) < tolerance
    assert tolerances.relative_error(Y, expected_Y) < tolerance
    assert tolerances.relative_error(G, expected_G) < tolerance
    assert torch.equal(C, C.mT)
    assert torch.equal(G, G.mT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, dtype, backend, poisoned_memory) -> None:
    C, Z = builders.symmetric((2,), 35, dtype, 3), builders.columns((2,), 35, 4, dtype, 4) * 0.1
    K = builders.key_batch((2,), 9, 35, dtype, 5)
    C_view, Z_view, K_view = View(C, layout), View(Z, layout), View(K, layout)
    expected_C, expected_Y, _ = rk.reference.downdate_gain_products_(C, Z, K)
    Y, _ = rk.ops.downdate_gain_products_(C_view.tensor, Z_view.tensor, K_view.tensor)
    assert tolerances.relative_error(C_view.tensor, expected_C) < tolerances.product(35, dtype)
    assert tolerances.relative_error(Y, expected_Y) < tolerances.product(35, dtype)
    assert C_view.untouched_outside()
    assert Z_view.untouched_outside()
    assert K_view.untouched_outside()


@pytest.mark.parametrize(
    ("Z", "K", "message"),
    [
        (torch.ones(4, 2), torch.ones(2, 3), r"downdate_gain_products_: Z must have shape"),
        (torch.ones(3, 2), torch.ones(2, 4), r"downdate_gain_products_: K must have shape"),
    ],
)
def test_wrong_arguments(Z, K, message) -> None:
    C = torch.eye(3)
    with pytest.raises(ValueError, match=message):
        rk.ops.downdate_gain_products_(C, Z, K)
    assert torch.equal(C, torch.eye(3))
