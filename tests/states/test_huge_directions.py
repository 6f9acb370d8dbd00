"""Directions of which a batch tells 1e8 times as much as of others: a root keeps both, against 60 digits."""

from __future__ import annotations

import pytest
import torch
from support.huge import D, U, keys, off, randn

import rlsedit_kernels as rk

V = 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [1.0, 1e-4])
def test_an_inverse_root_keeps_what_is_small_beside_a_huge_direction(dtype, noise) -> None:
    """By way of noise I + F'F, where noise and all other directions are lost, C was off by half of itself."""
    mp = pytest.importorskip("mpmath").mp.clone()
    mp.dps = 60
    state = rk.CovarianceState(rk.Prior.precision(torch.eye(D, dtype=torch.float64)), form="inverse_root", dtype=dtype)
    given = []
    for batch in range(12):
        K = keys(batch, dtype)
        state.update(K, noise)
        given.append((K, noise))
        if batch in (0, 3, 11):
            assert off(mp, state.covariance(), state._form.A, given) < (1e-4 if dtype == torch.float32 else 3e-5)
    assert state.health().drift < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["keys", "prior"])
def test_an_automatic_filter_goes_on(dtype, where) -> None:
    """It refused the second batch, its probes having drifted by more than themselves."""
    S = torch.eye(D, dtype=torch.float64)
    if where == "prior":
        S[0, 0] = 1e-16
    W_0, goal = randn(D, V, seed=9).to(dtype), randn(D, V, seed=7)
    found = rk.RLSFilter(W_0.clone(), rk.Prior.precision(S), layout="in_out")
    rows, sides = [torch.linalg.cholesky(S).mT], [torch.zeros(D, V, dtype=torch.float64)]
    for batch in range(40):
        K = keys(batch, dtype, 1e8 if where == "keys" else 1.0)
        T = (K.double() @ goal + randn(U, V, seed=5000 + batch)).to(dtype)
        found.update(K, T)
        rows.append(K.double())
        sides.append(T.double() - K.double() @ W_0.double())
    Q, R = torch.linalg.qr(torch.cat(rows))
    change = torch.linalg.solve_triangular(R, Q.mT @ torch.cat(sides), upper=True)
    error = (R @ (found.weight.double() - W_0.double() - change)).norm() / (R @ change).norm()
    assert float(error) < (1e-5 if dtype == torch.float32 else 1e-9)
    assert found.health().ok
    assert found.state.form == "inverse_root"
