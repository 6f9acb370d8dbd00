"""Algebra on a triangular factor in blocks is that of the whole, whatever part of a block is left over."""

from __future__ import annotations

import pytest
import torch

from rlsedit_kernels.states import triangular

ROWS = triangular._ROWS
sizes = pytest.mark.parametrize("r", [3, triangular._PANEL + 1, ROWS, 2 * ROWS + 5])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(r: int) -> torch.Tensor:
    """Upper triangular, of a condition below ten."""
    return torch.diag(torch.linspace(1.0, 2.0, r, dtype=torch.float64)) + randn(r, r).triu(1) * (0.3 / r**0.5)


@sizes
def test_solves(r: int) -> None:
    R, K, B = factor(r), randn(4, r, seed=1), randn(r, 3, seed=2)
    given = K.clone(), B.clone()
    torch.testing.assert_close(triangular.solve_rows(R, K) @ R, K, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(R @ triangular.solve_columns(R, B), B, rtol=0.0, atol=1e-12)
    assert torch.equal(K, given[0])
    assert torch.equal(B, given[1])


@sizes
def test_norms_are_estimated_from_below(r: int) -> None:
    values = torch.linalg.svdvals(factor(r))
    largest, smallest = triangular.extremes(factor(r))
    assert 0.9 * float(values[0]) < largest < float(values[0]) * (1.0 + 1e-12)
    assert 0.9 / float(values[-1]) < smallest < (1.0 + 1e-12) / float(values[-1])


@sizes
@pytest.mark.parametrize("carried", [True, False])
def test_rows_are_taken_out_of_all_blocks(r: int, carried: bool) -> None:
    """R'R loses K'K = (X R)'(X R), and R'B loses (X R)'X B; what stays is triangular with a diagonal > 0."""
    R, K, B = factor(r), randn(4, r, seed=1), randn(r, 3, seed=2)
    more = triangular.factor_of(torch.cat([R, K]))
    X = triangular.solve_rows(more, K)
    A, largest = triangular.leverage(X, torch.finfo(torch.float64).eps)
    assert largest == pytest.approx(float(torch.linalg.svdvals(X)[0]) ** 2, rel=1e-12)
    left = torch.linalg.solve_triangular(R.mT, more.mT @ B - K.mT @ (X @ B), upper=False)
    triangular.remove_rows_(more, X, A, B if carried else None)
    torch.testing.assert_close(more, R, rtol=0.0, atol=1e-11)
    if carried:
        torch.testing.assert_close(B, left, rtol=0.0, atol=1e-10)
