"""What is worked out row block by row block is what one float64 product gives, in one block or in many."""

from __future__ import annotations

import math

import pytest
import torch

from rlsedit_kernels.states import wide
from rlsedit_kernels.states.reading import Norms, norm, scalars

ROWS = wide._ROWS
sizes = pytest.mark.parametrize("n", [3, ROWS, ROWS + 1, 2 * ROWS + 5])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(n: int, dtype: torch.dtype) -> torch.Tensor:
    A = randn(n, n)
    return (A + A.mT).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float64) -> bool:
    return float((found - expected).abs().max()) <= 4.0 * torch.finfo(dtype).eps * len(expected) ** 0.5 * float(
        expected.abs().max()
    )


@sizes
@dtypes
def test_products(n: int, dtype: torch.dtype) -> None:
    A, C, K = randn(n, 7, seed=1).to(dtype), symmetric(n, dtype), randn(5, n, seed=2)
    x, y = randn(7, 2, seed=3), randn(n, 2, seed=4)
    assert close(wide.product(A, x), A.double() @ x)
    assert close(wide.transposed_product(A, y), A.double().mT @ y)
    found = wide.products(C, K)
    assert close(found.Y, C.double() @ K.mT)
    assert close(found.G, K @ C.double() @ K.mT)
    assert torch.equal(found.G, found.G.mT)


@sizes
@dtypes
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_changes_are_rounded_once_and_exactly_symmetric(n: int, dtype: torch.dtype, sign: float) -> None:
    C, Z = symmetric(n, dtype), randn(n, 3, seed=1)
    expected = C.double() + sign * (Z @ Z.mT)
    wide.change_(C, Z, sign)
    assert close(C.double(), expected, dtype)
    assert torch.equal(C, C.mT)
    A, left, right = randn(n, 6, seed=2).to(dtype), randn(n, 3, seed=3), randn(6, 3, seed=4)
    expected = A.double() + sign * (left @ right.mT)
    wide.add_(A, left, right, sign)
    assert close(A.double(), expected, dtype)


@sizes
@dtypes
def test_columns_make_a_matrix(n: int, dtype: torch.dtype) -> None:
    one, two = randn(n, 3, seed=1).to(dtype), randn(n, 2, seed=2).to(dtype)
    C = wide.assemble(n, 2.5, [(one, -1.0), (two, 0.5)], dtype, torch.device("cpu"))
    expected = 2.5 * torch.eye(n, dtype=torch.float64) - one.double() @ one.double().mT
    assert close(C.double(), expected + 0.5 * (two.double() @ two.double().mT), dtype)
    assert C.dtype == dtype
    assert torch.equal(C, C.mT)


@pytest.mark.parametrize("n", [1, 64, 65, 200])
@dtypes
def test_norms_are_read_at_once_in_float64(n: int, dtype: torch.dtype) -> None:
    A, B = (randn(n, 3, seed=1) * 1e25).to(dtype), randn(5, 2, seed=2).to(dtype)
    size, other = float(A.double().norm()), float(B.double().norm())
    assert norm(A) == pytest.approx(size, rel=1e-14)
    asked = Norms()
    both, alone, none = asked.ask(A), asked.ask(B), asked.ask()
    asked.add(both, 2.0 * A)
    found, more = asked.read(torch.tensor(3), torch.tensor([4.0, 5.0]))
    assert found[both] == pytest.approx(math.hypot(size, 2.0 * size), rel=1e-14)
    assert found[alone] == pytest.approx(other, rel=1e-14)
    assert found[none] == 0.0
    assert more == [3.0, 4.0, 5.0]
    assert scalars([torch.tensor(True), torch.tensor(0.5)]) == [1.0, 0.5]
