"""The facts of docs/mathematics.md as properties, each against dense float64 algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import builders
from support.tolerances import relative_error

import rlsedit_kernels as rk

properties = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
noises = st.sampled_from([0.1, 1.0, 7.5])


def stream(seed: int, steps: int, d: int = 24, v: int = 6, kind: str = "plain") -> tuple[rk.Prior, torch.Tensor, list]:
    """An anchor prior, W_0 and batches (K, V, noise) in float64, of varying width and noise."""
    rng = np.random.default_rng(seed)
    prior = rk.Prior.anchor(builders.spd(d, 1e3, rng, largest=5.0), mu=1.3, lam=0.4)
    W = torch.from_numpy(rng.standard_normal((d, v)))
    batches = []
    for _ in range(steps):
        u = int(rng.integers(1, 9))
        K = torch.from_numpy(builders.keys(u, d, rng, kind) * 3.0)
        batches.append((K, torch.from_numpy(rng.standard_normal((u, v))), float(rng.choice([0.2, 1.0, 3.0]))))
    return prior, W, batches


def written(prior: rk.Prior, W: torch.Tensor, batches: list, **kwargs: object) -> rk.RLSFilter:
    rls = rk.RLSFilter(W, prior, layout="in_out", **kwargs)
    for K, V, noise in batches:
        rls.update(K, V, noise)
    return rls


@properties
@given(seeds, noises)
def test_fact_1_the_gain_is_the_new_covariance_times_the_keys(seed, noise) -> None:
    prior, _, batches = stream(seed, 3)
    state = rk.CovarianceState(prior, dtype=torch.float64)
    for K, _, _ in batches:
        gain = state.update(K, noise)
        assert relative_error(gain, state.covariance() @ K.mT / noise) < 1e-9


@properties
@given(seeds)
def test_fact_2_any_residual_is_a_pseudo_target(seed) -> None:
    """W_t minimises for the targets K W_{t-1} + E, whatever residual E is handed over."""
    prior, W, batches = stream(seed, 5)
    state = rk.CovarianceState(prior, dtype=torch.float64)
    weight, pseudo = W.clone(), []
    for K, E, noise in batches:  # E: any numbers
        pseudo.append((K, K @ weight + E, noise))
        weight = weight + state.update(K, noise) @ E
    assert relative_error(weight, rk.reference.batch_solution(prior, pseudo, W)) < 1e-9


@properties
@given(seeds, st.sampled_from([0.5, 10.0]))
def test_fact_3_alphaedit_is_the_recursion_on_the_null_space(seed, l2) -> None:
    """solve[P (K'K + M) + L2 I, P K'E] = g E with C_0 = P / L2 and raw keys."""
    rng = np.random.default_rng(seed)
    d, r = 24, 15
    Q = builders.orthogonal(d, rng)[:, :r]
    P = torch.from_numpy(Q @ Q.T)
    state = rk.CovarianceState(rk.Prior.null_space(P, l2), dtype=torch.float64)
    wrong = rk.CovarianceState(rk.Prior.ridge(d, math.sqrt(l2)), dtype=torch.float64)
    cache = torch.zeros(d, d, dtype=torch.float64)
    for _ in range(4):
        K = torch.from_numpy(builders.keys(5, d, rng) * 4.0)
        E = torch.from_numpy(rng.standard_normal((5, 3)))
        eye = torch.eye(d, dtype=torch.float64)
        published = torch.linalg.solve(P @ (K.mT @ K + cache) + l2 * eye, P @ K.mT @ E)
        cache += K.mT @ K
        assert relative_error(state.update(K) @ E, published) < 1e-9
        assert relative_error(wrong.update(K) @ E, published) > 1e-2


@properties
@given(seeds)
def test_fact_4_noise_zero_is_a_hard_write_and_a_hard_preservation(seed) -> None:
    prior, W, batches = stream(seed, 3)
    rls = rk.RLSFilter(W, prior, layout="in_out")
    hard_K, hard_V, _ = batches[0]
    step = rls.update(hard_K, hard_V, noise=0.0)
    assert step.residual_norm < 1e-9 * max(1.0, step.innovation_norm)
    for K, V, noise in batches[1:]:
        rls.update(K, V, noise)
    assert relative_error(hard_K @ rls.weight, hard_V) < 1e-8
    expected = rk.reference.batch_solution(prior, [(hard_K, hard_V, 0.0), *batches[1:]], W)
    assert relative_error(rls.weight, expected) < 1e-8


@pytest.mark.parametrize("form", ["plain", "whitened", "inverse_root"])
def test_fact_4_dependent_keys_are_written_on_their_range(form) -> None:
    prior, _W, batches = stream(3, 1)
    K = torch.cat([batches[0][0], batches[0][0][:1], 2.0 * batches[0][0][:1]])
    state = rk.CovarianceState(prior, form=form, dtype=torch.float64)
    gain = state.update(K, noise=0.0)
    C = rk.reference.batch_covariance(prior, [])
    expected = C @ K.numpy().T @ np.linalg.pinv(K.numpy() @ C @ K.numpy().T, rcond=1e-10, hermitian=True)
    assert relative_error(gain, expected) < 1e-7
    assert float((state.covariance() @ K.mT).abs().max()) < 1e-9


@pytest.mark.parametrize("form", ["plain", "whitened", "inverse_root"])
@pytest.mark.parametrize(("lam", "size"), [(1e4, 1.0), (1.0, 1e-5)], ids=["strong prior", "small keys"])
def test_fact_4_a_hard_write_is_exact_however_small_its_keys(form, lam, size) -> None:
    """What counts as rounding is relative to K C_0 K' itself, 1e-7 and less here."""
    state = rk.CovarianceState(rk.Prior.ridge(24, lam), form=form)
    for seed in range(2):
        K = size * torch.randn(3, 24, generator=torch.Generator().manual_seed(seed))
        gain = state.update(K, noise=0.0)
        torch.testing.assert_close(K @ gain, torch.eye(3), rtol=0.0, atol=1e-5)


@properties
@given(seeds)
def test_fact_5_removal_gives_the_stream_without_the_batch(seed) -> None:
    prior, W, batches = stream(seed, 6)
    index = seed % len(batches)
    rls = written(prior, W, batches)
    rls.remove(*batches[index])
    without = written(prior, W, batches[:index] + batches[index + 1 :])
    assert relative_error(rls.state.covariance(), without.state.covariance()) < 1e-9
    assert relative_error(rls.weight, without.weight) < 1e-8
    assert rls.objective == pytest.approx(without.objective, rel=1e-8, abs=1e-9)


@properties
@given(seeds, st.sampled_from(["covariance", "square_root"]))
def test_fact_5_a_batch_before_others_that_forget_counts_by_what_is_left_of_it(seed, state) -> None:
    """Written with nu and forgotten by beta in each of k batches since, it is a batch of noise nu / beta^k."""
    prior, W, batches = stream(seed, 5)
    forget, index = 0.9, seed % 4
    rls = rk.RLSFilter(W, prior, state, layout="in_out")
    for K, V, noise in batches:
        rls.update(K, V, noise, forget)
    left = [(K, V, noise / forget ** (4 - s)) for s, (K, V, noise) in enumerate(batches)]
    rls.remove(*left.pop(index))
    faded = rk.Prior.precision(forget**5 * prior.information())
    assert relative_error(rls.weight, rk.reference.batch_solution(faded, left, W)) < 1e-7
    assert relative_error(rls.state.covariance(), rk.reference.batch_covariance(faded, left)) < 1e-8
    exact = rk.reference.batch_objective(faded, left, rls.weight, W)
    assert rls.objective == pytest.approx(exact, rel=1e-7, abs=1e-9)


@properties
@given(seeds, st.sampled_from([1.0, 0.95]))
def test_fact_6_the_cost_recursion_is_the_objective(seed, forget) -> None:
    prior, W, batches = stream(seed, 6)
    rls = rk.RLSFilter(W, prior, layout="in_out")
    for t, (K, V, noise) in enumerate(batches):
        before, C, last = rls.weight.clone(), rls.state.covariance(), rls.objective
        step = rls.update(K, V, noise, forget)
        exact = rk.reference.batch_objective(prior, batches[: t + 1], rls.weight, W, forget)
        assert step.objective == pytest.approx(exact, rel=1e-9)
        E, G = V - K @ before, K @ C @ K.mT
        added = float((E * torch.linalg.solve(noise * torch.eye(len(K)) + G / forget, E)).sum())
        assert step.objective == pytest.approx(forget * last + added, rel=1e-7)
        assert step.residual_norm == pytest.approx(float((V - K @ rls.weight).norm()), rel=1e-9)


@properties
@given(seeds, st.sampled_from([1.0, 0.9]))
def test_fact_7_deviation_bounds_hold(seed, forget) -> None:
    rng = np.random.default_rng(seed)
    d, v, lam, mu = 20, 5, 0.3, 0.7
    K0 = torch.from_numpy(rng.standard_normal((30, d)))
    prior = rk.Prior.anchor_keys(K0, mu=mu, lam=lam)
    W = torch.from_numpy(rng.standard_normal((d, v)))
    rls = rk.RLSFilter(W, prior, layout="in_out")
    errors, left = 0.0, 1.0
    for _ in range(6):
        K, V = torch.from_numpy(rng.standard_normal((4, d))), torch.from_numpy(rng.standard_normal((4, v)))
        step = rls.update(K, V, 0.5, forget)
        errors, left = forget * errors + float((V - K @ W).norm()) ** 2 / 0.5, left * forget
        assert step.parameter_bound == pytest.approx(math.sqrt(errors / left) / (2 * lam))
        assert step.anchor_bound == pytest.approx(math.sqrt(errors / left) / (2 * mu))
        assert float((rls.weight - W).norm()) <= step.parameter_bound
        assert float((K0 @ (rls.weight - W)).norm()) <= step.anchor_bound


@properties
@given(seeds)
def test_fact_7_the_step_is_bounded_by_the_ridge(seed) -> None:
    """|g| <= 1 / (2 lambda sqrt(nu)), and <= s / (nu lambda^2 + s^2) where s = |K_t| <= lambda sqrt(nu)."""
    prior, _, batches = stream(seed, 4)
    assert prior.lam is not None
    state = rk.CovarianceState(prior, dtype=torch.float64)
    for K, _, noise in batches:
        K = K * (0.5 + seed % 3) * 0.1
        gain, lam = state.update(K, noise), prior.lam * math.sqrt(noise)
        norm, s = float(torch.linalg.matrix_norm(gain, 2)), float(torch.linalg.matrix_norm(K, 2))
        assert norm <= 1.0 / (2.0 * lam) * (1 + 1e-12)
        if s <= lam:
            assert norm <= s / (lam**2 + s**2) * (1 + 1e-12)


@properties
@given(seeds, st.sampled_from([0.8, 0.99]))
def test_fact_8_forgetting(seed, forget) -> None:
    prior, _, batches = stream(seed, 5)
    for form in ("plain", "whitened", "inverse_root"):
        state = rk.CovarianceState(prior, form=form, dtype=torch.float64)
        for K, _, noise in batches:
            state.commit(K, noise, forget)
        assert relative_error(state.covariance(), rk.reference.batch_covariance(prior, batches, forget)) < 1e-9


@properties
@given(seeds)
def test_fact_9_restriction(seed) -> None:
    prior, _W, batches = stream(seed, 4)
    rng = np.random.default_rng(seed)
    Q = torch.from_numpy(builders.orthogonal(24, rng)[:, :5])
    for form in ("plain", "whitened", "inverse_root"):
        state = rk.CovarianceState(prior, form=form, dtype=torch.float64)
        expected = rk.reference.CovarianceState(prior)
        for K, _, noise in batches[:2]:
            state.commit(K, noise)
            expected.commit(K, noise)
        state.restrict(Q)
        expected.restrict(Q)
        for K, _, noise in batches[2:]:
            assert relative_error(state.update(K, noise), expected.update(K, noise)) < 1e-8
        assert relative_error(state.covariance(), expected.covariance()) < 1e-8
        assert float((state.covariance() @ Q).abs().max()) < 1e-10


@properties
@given(seeds)
def test_order_does_not_matter(seed) -> None:
    prior, W, batches = stream(seed, 5)
    forward, backward = written(prior, W, batches), written(prior, W, batches[::-1])
    assert relative_error(forward.weight, backward.weight) < 1e-9
    assert forward.objective == pytest.approx(backward.objective, rel=1e-9)


@properties
@given(seeds, st.sampled_from(["correlated", "duplicated"]))
def test_forms_agree_along_a_stream(seed, kind) -> None:
    prior, W, batches = stream(seed, 8, kind=kind)
    forms = [written(prior, W, batches, form=form) for form in ("plain", "whitened", "inverse_root")]
    K = batches[0][0] + 1.0
    for one in forms:
        assert relative_error(one.weight, rk.reference.batch_solution(prior, batches, W)) < 1e-8
        assert relative_error(one.weight, forms[0].weight) < 1e-9
        assert relative_error(one.state.covariance(), forms[0].state.covariance()) < 1e-8
        assert relative_error(one.state.gain(K), forms[0].state.gain(K)) < 1e-8
