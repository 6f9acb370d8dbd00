"""Over ranks too, a root keeps what is small beside a direction of which a batch tells 1e8 times as much."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.bits import same
from support.huge import D, keys, off
from support.ranks import run
from support.sharded import columns, full

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import Ranks, ShardedCovarianceState

IDENTITY = torch.eye(D, dtype=torch.float64)


WEAK = torch.diag(torch.logspace(0, -6, D, dtype=torch.float64))
"""A precision of such a condition that A is kept in whitened coordinates."""


def following(ranks: Ranks, dtype: torch.dtype, noise: float) -> tuple[list[torch.Tensor], float]:
    state = ShardedCovarianceState(rk.Prior.precision(IDENTITY), ranks, form="inverse_root", dtype=dtype)
    found = []
    for batch in range(12):
        K = keys(batch, dtype)
        state.update(columns(ranks, K) if batch % 2 else K, noise)
        if batch in (0, 3, 11):
            found.append(full(state.product(IDENTITY)))
    return found, state.health().drift


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [1.0, 1e-4])
def test_an_inverse_root_keeps_what_is_small_beside_a_huge_direction(
    size: int, dtype: torch.dtype, noise: float
) -> None:
    """By way of noise I + F'F, where noise and all other directions are lost, C was off by more than half of itself."""
    mp = pytest.importorskip("mpmath").mp.clone()
    mp.dps = 60
    outcomes = run(size, following, dtype, noise)
    assert all(same(found, outcomes[0]) for found in outcomes)
    (first, second, last), drift = outcomes[0]
    given = [(keys(batch, dtype), noise) for batch in range(12)]
    for C, count in ((first, 1), (second, 4), (last, 12)):
        assert off(mp, C, None, given[:count]) < (5e-3 if noise < 1.0 else 1e-5)
    assert drift < 1e-4


def mapped(ranks: Ranks, way: str) -> Any:
    state = ShardedCovarianceState(rk.Prior.precision(WEAK), ranks, form="inverse_root", guard="off")
    assert state._form.maps
    given = [(keys(batch, torch.float32), 1.0) for batch in range(6)]
    for K, noise in given:
        state.update(K, noise)
    if way == "refactor":
        state.refactor(given)
    return full(state.product(IDENTITY))


@pytest.mark.parametrize("way", ["update", "refactor"])
def test_a_root_in_whitened_coordinates_is_that_of_one_process(way: str) -> None:
    """A Q of the factorisation is put together from all ranks there."""
    mp = pytest.importorskip("mpmath").mp.clone()
    mp.dps = 60
    outcomes = run(2, mapped, way)
    assert same(outcomes[0], outcomes[1])
    given = [(keys(batch, torch.float32), 1.0) for batch in range(6)]
    alone = rk.CovarianceState(rk.Prior.precision(WEAK), form="inverse_root", guard="off")
    for K, noise in given:
        alone.update(K, noise)
    error = off(mp, alone._form.covariance(torch.float64), None, given, WEAK)
    assert off(mp, outcomes[0], None, given, WEAK) < 2.0 * error
