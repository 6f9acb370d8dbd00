"""The problem of a profile: priors that agree with each other, and a float64 truth that another solution confirms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels.profile import Problem


@pytest.fixture
def problem() -> Problem:
    return Problem(60, 7, 9)


def test_the_anchor_in_all_its_guises(problem) -> None:
    S, factor = problem.information(), problem.prior.factor
    assert torch.allclose(factor.precision(), S, atol=1e-12)
    assert torch.allclose(factor.covariance() @ S, torch.eye(60, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(problem.covariance().double(), factor.covariance(), rtol=1e-6, atol=1e-3)
    assert torch.allclose(factor.root_inverse @ factor.root, torch.eye(60, dtype=torch.float64), atol=1e-12)
    assert torch.linalg.cond(S) == pytest.approx(factor.condition, rel=1e-6)


def test_the_projector(problem) -> None:
    P = problem.projector().double()
    assert torch.allclose(P @ P, P, atol=1e-6)
    assert P.trace().item() == pytest.approx(problem.free, abs=1e-4)
    assert torch.equal(P, P.mT)


def test_the_basis_of_the_null_space(problem) -> None:
    N = problem.null_basis()
    assert N.shape == (60, problem.free)
    assert N.dtype == problem.dtype
    assert torch.allclose(N.mT @ N, torch.eye(problem.free), atol=1e-6)
    assert torch.allclose(N @ N.mT, problem.projector(), atol=1e-6)


def test_a_batch_tells_about_as_much_as_was_known() -> None:
    problem = Problem(400, 3, 100)
    K = problem.batch(0)[0].double()
    known = (K @ problem.prior.factor.covariance() * K).sum(dim=1).mean()
    free = (K @ problem.projector().double() * K).sum(dim=1).mean() / problem.l2
    assert known.item() == pytest.approx(1.0, abs=0.3)
    assert free.item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("batches", [1, 3])
def test_the_exact_weight_is_the_batch_solution(problem, batches) -> None:
    """Normal equations in NumPy, from S_0 itself."""
    S, right = problem.information().numpy().copy(), np.zeros((60, 7))
    W0 = problem.weight.double().numpy()
    for i in range(batches):
        K, V = (a.double().numpy() for a in problem.batch(i))
        S += K.T @ K
        right += K.T @ (V - K @ W0)
    expected = W0 + np.linalg.solve(S, right)
    found = problem.exact(batches).numpy()
    assert np.linalg.norm(found - expected) <= 1e-9 * np.linalg.norm(expected - W0)


def test_the_exact_weight_in_a_null_space(problem) -> None:
    P, W0 = problem.projector().double(), problem.weight.double()
    K, V = (a.double() for a in problem.batch(0))
    left = P @ K.mT @ K + problem.l2 * torch.eye(60, dtype=torch.float64)
    expected = W0 + torch.linalg.solve(left, P @ K.mT @ (V - K @ W0))
    found = problem.exact(1, "null_space")
    assert (found - expected).norm() <= 1e-6 * (expected - W0).norm()


def test_the_same_numbers_in_both_precisions() -> None:
    narrow, wide = Problem(24, 5, 3), Problem(24, 5, 3, dtype=torch.float64)
    assert torch.equal(narrow.weight.double(), wide.weight)
    assert torch.equal(narrow.batch(2)[0].double(), wide.batch(2)[0].float().double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 5, 6), "d must be an int of at least 8, got 4"),
        ((16, 0, 6), "v must be an int of at least 1, got 0"),
        ((16, 5, True), "u must be an int"),
    ],
)
def test_wrong_sizes(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Problem(*arguments)


def test_wrong_dtype() -> None:
    with pytest.raises(TypeError, match=r"torch[.]float64, got torch[.]bfloat16"):
        Problem(16, 4, 2, dtype=torch.bfloat16)


def test_presets_name_the_layers_of_published_models() -> None:
    assert (rk.profile.SHAPES["llama3-8b"].d, rk.profile.SHAPES["llama3-8b"].v) == (14336, 4096)
    assert {"gpt2-xl", "gpt-j-6b", "llama3.2-3b", "llama3-70b", "qwen2.5-7b", "qwen3-8b", "mistral-7b"} < set(
        rk.profile.SHAPES
    )
