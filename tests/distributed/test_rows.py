"""Arithmetic on rows: every tile of a downdate lies mirrored to the bit, and ranks without rows take part."""

from __future__ import annotations

import pytest
import torch
from support.ranks import run

from rlsedit_kernels.distributed import Ranks, rows


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(d: int, dtype: torch.dtype) -> torch.Tensor:
    A = randn(d, d, seed=1).to(dtype)
    return A + A.mT


def downdated(ranks: Ranks, d: int, dtype: torch.dtype, working: torch.dtype, tile: int) -> torch.Tensor:
    before, rows._TILE = rows._TILE, tile
    try:
        C = ranks.shard(symmetric(d, dtype))
        for seed, sign in ((2, -1.0), (3, 1.0)):
            rows.downdate_rows_(ranks, C, randn(d, 5, seed=seed).to(working), sign)
        return ranks.gather(C, d).clone()
    finally:
        rows._TILE = before


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("d", [2, 26])
@pytest.mark.parametrize("tile", [4, 1024])
@pytest.mark.parametrize(
    ("dtype", "working"),
    [(torch.float32, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.float64)],
)
def test_a_downdate_stays_symmetric(size: int, d: int, tile: int, dtype: torch.dtype, working: torch.dtype) -> None:
    outcomes = run(size, downdated, d, dtype, working, tile)
    assert all(torch.equal(found, outcomes[0]) for found in outcomes)
    found, true = outcomes[0], symmetric(d, dtype).double()
    assert torch.equal(found, found.mT)
    for seed, sign in ((2, -1.0), (3, 1.0)):
        Z = randn(d, 5, seed=seed).to(working).double()
        true += sign * Z @ Z.mT
    assert float((found.double() - true).abs().max()) < 40 * torch.finfo(dtype).eps * float(true.abs().max())


@pytest.mark.parametrize("shape", [(7, 9), (0, 9), (7, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("working", [torch.float32, torch.float64])
def test_products_of_what_a_rank_has(shape: tuple[int, int], dtype: torch.dtype, working: torch.dtype) -> None:
    if dtype.itemsize > working.itemsize:
        working = dtype
    n, m = shape
    A, x, y = randn(n, m, seed=1).to(dtype), randn(m, 3, seed=2).to(working), randn(n, 3, seed=3).to(working)
    for found, true in ((rows.times(A, x), A.to(working) @ x), (rows.transposed_times(A, y), y.mT @ A.to(working))):
        assert found.dtype == working
        assert found.shape == true.shape
        torch.testing.assert_close(found, true)
