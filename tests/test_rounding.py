"""The estimate of what rounding a weight has cost follows its recursion, with one batch after the other."""

from __future__ import annotations

import math

import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels.rounding import EVERY, RELATIVE, Rounding

D = 8
S_0 = torch.diag(torch.linspace(1.0, 3.0, D, dtype=torch.float64))
PRIORS = {"ridge": (rk.Prior.ridge(D, 2.0), 4.0 * D), "precision": (rk.Prior.precision(S_0), float(S_0.trace()))}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("forget", [1.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_that_of_the_recursion(kind: str, forget: float, dtype: torch.dtype) -> None:
    """|W| is measured with batches 1, 2, 4, ... and every 32nd; hard writes (noise 0) add nothing, and forget too."""
    prior, trace = PRIORS[kind]
    rounding, unit, total, size = Rounding(prior, dtype), 0.5 * torch.finfo(dtype).eps * RELATIVE, 0.0, 0.0
    for step in range(1, 2 * EVERY + 4):
        K, W, noise = randn(3, D, seed=step), step * randn(D, 2, seed=step), (1.0, 0.2, 0.0)[step % 3]
        rounding.write(K, noise, forget, W)
        trace = forget * trace + (float(K.square().sum()) / noise if noise else 0.0)
        if step in (1, 2, 4, 8, 16) or step % EVERY == 0:
            size = float(W.square().sum())
        total = forget**2 * total + (trace / D) ** 2 * unit**2 * size
        once = trace / D * unit**2 * float(W.square().sum())
        assert rounding.error(W, summed=True) == pytest.approx(
            math.sqrt(max(total / (trace / D), once)), rel=1e-9, abs=0.0
        )
        assert rounding.error(W, summed=False) == pytest.approx(math.sqrt(once), rel=1e-9, abs=0.0)


def test_a_batch_that_is_taken_back_leaves_the_trace() -> None:
    prior, trace = PRIORS["ridge"]
    rounding, K, W = Rounding(prior, torch.float32), randn(3, D), torch.ones(D, 2)
    rounding.write(K, 0.5, 1.0, None)
    before = rounding.error(W, summed=False)
    rounding.remove(K, 0.5)
    assert before**2 / rounding.error(W, summed=False) ** 2 == pytest.approx(
        1.0 + 2.0 * float(K.square().sum()) / trace
    )
    rounding.remove(1e3 * K, 0.5)
    assert rounding.error(W, summed=True) == rounding.error(W, summed=False) == 0.0
