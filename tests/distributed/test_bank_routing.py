"""What a router gives, by expert; and a stream that updates only the experts it names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import StateBank, route

D = 24
MOMENT = torch.diag(torch.logspace(0, -2, D, dtype=torch.float64))


def _mixture(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """The output of the down projections of a mixture of experts, row by row: sum_j weights_j W_(e_j)' k_j."""
    out = torch.zeros(x.shape[0], W.shape[2], dtype=x.dtype)
    for row, (own, factors) in enumerate(zip(experts.tolist(), weights.tolist(), strict=True)):
        for choice, (expert, factor) in enumerate(zip(own, factors, strict=True)):
            if expert >= 0:
                out[row] += factor * x[row, choice] @ W[expert]
    return out


def test_routed_rows_give_each_expert_what_it_adds_to_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    n, k, d, count = 9, 3, 5, 6
    keys = torch.randn(n, k, d, dtype=torch.float64, generator=generator)
    experts = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(n)])
    experts[4, 1] = -1
    weights = torch.rand(n, k, dtype=torch.float64, generator=generator)
    W = torch.randn(count, d, 4, dtype=torch.float64, generator=generator)
    routed = route(keys, experts, weights)
    assert list(routed) == sorted(set(experts.flatten().tolist()) - {-1})
    out = torch.zeros(n, 4, dtype=torch.float64)
    for expert, (rows, own) in routed.items():
        assert rows.tolist() == [row for row in range(n) if expert in experts[row].tolist()]
        out[rows] += own @ W[expert]
    assert torch.allclose(out, _mixture(keys, experts, weights, W), rtol=1e-13)
    same = route(keys[:, 0], experts)
    for expert, (rows, own) in same.items():
        assert torch.equal(rows, routed[expert].rows)
        assert torch.equal(own, keys[rows, 0])


def test_a_routed_stream_updates_the_experts_it_names_only() -> None:
    common = rk.Prior.anchor(MOMENT, lam=0.1)
    bank = StateBank({(3, e): common for e in range(8)})
    keys = 0.1 * torch.randn(6, D, generator=torch.Generator().manual_seed(1))
    routed = route(keys, torch.tensor([[0, 5], [5, 2], [2, 0], [0, 2], [5, -1], [2, 5]]))
    bank.update({(3, e): (own, 1.0) for e, (_, own) in routed.items()})
    assert [bank.state((3, e)).steps for e in range(8)] == [1, 0, 1, 0, 0, 1, 0, 0]  # type: ignore[union-attr]
    single = rk.CovarianceState(common)
    single.update(keys[[0, 1, 4, 5]])
    assert torch.allclose(bank.covariance((3, 5)), single.covariance(), rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "experts", "error", "text"),
    [
        (torch.ones(3, 4), torch.zeros(3, 2), TypeError, "experts must be integers"),
        (torch.ones(3, 4), torch.zeros(3, dtype=torch.int64), ValueError, r"experts must have shape \(n, k\)"),
        (torch.ones(2, 4), torch.tensor([[0], [1], [2]]), ValueError, r"keys must have shape \(3, d\)"),
        (torch.ones(2, 4), torch.tensor([[0, 1], [2, 2]]), ValueError, "in row 1"),
        ([1.0], torch.tensor([[0]]), TypeError, "keys must be a torch.Tensor"),
    ],
)
def test_what_a_router_gives_is_checked(keys: Any, experts: torch.Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        route(keys, experts)
