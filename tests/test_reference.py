"""The truth of all other tests, against 60 digits: hard problems, any dtype, and nothing of its caller's changed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.op_arguments import arguments

import rlsedit_kernels as rk
from rlsedit_kernels.ops.schemas import SCHEMAS

mpmath = pytest.importorskip("mpmath")
mp = mpmath.mp.clone()
mp.dps = 60
ref = rk.reference
D, U, V = 6, 3, 2
UNIT = 2.3e-16


def exact(A: Any) -> Any:
    return mp.matrix(np.asarray(A, dtype=np.float64).tolist())


def size(A: Any) -> float:
    return float(mp.mnorm(A, "f"))


def off(found: Any, expected: Any) -> float:
    """|found - expected| / |expected|."""
    return size(exact(found) - expected) / (size(expected) or 1.0)


def condition(A: Any) -> float:
    return size(A) * size(A**-1)


def orthogonal(rng: np.random.Generator, n: int = D) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def covariance(rng: np.random.Generator, decades: float, n: int = D) -> np.ndarray:
    Q = orthogonal(rng, n)
    C = (Q * np.logspace(0, -decades, n)) @ Q.T
    return 0.5 * (C + C.T)


def keys(rng: np.random.Generator, scale: float = 1.0, apart: float = 0.0) -> np.ndarray:
    """Keys; with `apart` the second differs from the first by that much."""
    K = rng.standard_normal((U, D)) * scale
    if apart:
        K[1] = K[0] + apart * K[1]
    return K


HARD = [
    (c, k, nu, apart) for c in (0, 8, 12) for k in (1.0, 1e-8, 1e8) for nu in (1.0, 1e-8, 1e8) for apart in (0.0, 1e-6)
]
hard = pytest.mark.parametrize(("decades", "scale", "noise", "apart"), HARD)


@hard
def test_ops_on_a_covariance(decades, scale, noise, apart) -> None:
    """To a few roundings times the condition of what is solved."""
    rng = np.random.default_rng(1)
    C, K = covariance(rng, decades), keys(rng, scale, apart)
    c, k = exact(C), exact(K)
    Y, G = ref.gain_products(C, K)
    assert off(Y, c * k.T) < 4 * UNIT
    assert off(G, k * c * k.T) < 8 * UNIT
    assert np.array_equal(G, G.T)
    system = exact(G) + mp.mpf(noise) * mp.eye(U)
    limit = 20 * UNIT * condition(system)
    gain, Z, info = ref.gain_solve(Y, G, noise)
    L, bad = ref.cholesky(G + noise * np.eye(U))
    if info or bad:
        assert limit > 1.0  # not definite, to rounding
        return
    assert off(L @ L.T, system) < 8 * UNIT
    assert off(gain, exact(Y) * system**-1) < limit
    assert off(Z @ Z.T, exact(Y) * system**-1 * exact(Y).T) < limit
    new, found, _ = ref.rls_update_(C, K, noise, 0.75)
    system = k * c * k.T + mp.mpf(0.75 * noise) * mp.eye(U)
    left = (c - c * k.T * system**-1 * k * c) / mp.mpf(0.75)
    assert off(found, c * k.T * system**-1) < 20 * UNIT * condition(system)
    assert size(exact(new) - left) < 20 * UNIT * condition(system) * size(c)
    W, T = rng.standard_normal((D, V)), rng.standard_normal((U, V))
    moved, E = ref.weight_update_(W, K, T, gain)
    innovation = exact(T) - k * exact(W)
    assert size(exact(E) - innovation) < 8 * UNIT * (size(exact(T)) + size(k) * size(exact(W)))
    expected = exact(W) + exact(gain) * exact(E)
    assert size(exact(moved) - expected) < 8 * UNIT * (size(exact(W)) + size(exact(gain)) * size(exact(E)))
    assert off(ref.downdate_(C, Z, -0.5), c - exact(Z) * exact(Z).T / 2) < 8 * UNIT


@pytest.mark.parametrize("decades", [0, 4, 8, 12])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_ops_on_a_triangle(decades, scale) -> None:
    """Rows of R from 1 to 1e-12 of the first: to a few roundings times the condition of R, not of R'R."""
    rng = np.random.default_rng(2)
    R = np.triu(np.diag(np.logspace(0, -decades, D)) @ (np.eye(D) + 0.3 * rng.standard_normal((D, D))))
    R *= np.where(np.diagonal(R) < 0.0, -1.0, 1.0)[:, None]
    K, T, B = keys(rng, scale), rng.standard_normal((U, V)), rng.standard_normal((D, V))
    r, k = exact(R), exact(K)
    S = r.T * r + k.T * k
    new, side = ref.qr_append_rhs_(R, B, K, T)
    assert np.array_equal(new, ref.qr_append_(R, K))
    assert np.array_equal(new, np.triu(new))
    assert (np.diagonal(new) >= 0.0).all()
    L = mp.cholesky(S)
    off_S = L**-1 * (exact(new).T * exact(new) - S) * (L**-1).T
    limit = 50 * UNIT * condition(L)
    assert size(off_S) < limit  # in the norm of S itself
    solution = S**-1 * (r.T * exact(B) + k.T * exact(T))
    error = L.T * ((exact(new)) ** -1 * exact(side) - solution)
    assert size(error) < limit * (size(L.T * solution) + size(exact(B)) + size(exact(T)))
    gain = ref.qr_gain(new, K)
    n = exact(new)
    expected = n * (n.T * n) ** -1 * k.T
    assert size(n * exact(gain) - expected) < limit * size(expected)


def priors() -> dict[str, tuple[rk.Prior, Any, Any]]:
    """Each kind with its S_0 and N in digits."""
    rng = np.random.default_rng(3)
    M, K_0, Q = covariance(rng, 8), rng.standard_normal((4, D)), orthogonal(rng)[:, :4]
    eye = mp.eye(D)
    return {
        "ridge": (rk.Prior.ridge(D, 1e-3), mp.mpf(1e-3) ** 2 * eye, eye),
        "anchor": (rk.Prior.anchor(M, 10.0, 1e-3), mp.mpf(1e-3) ** 2 * eye + 100 * exact(M), eye),
        "anchor_keys": (
            rk.Prior.anchor_keys(K_0, 10.0, 1e-6),
            mp.mpf(1e-6) ** 2 * eye + 100 * exact(K_0).T * exact(K_0),
            eye,
        ),
        "precision": (rk.Prior.precision(M), exact(M), eye),
        "null_space": (rk.Prior.null_space(Q, 1e-4), mp.mpf(1e-4) * exact(Q) * exact(Q).T, exact(Q)),
    }


def stream(seed: int = 4) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Keys from 1e-3 to 1e6, some nearly parallel; noise from 1e-6 to 1e6."""
    rng = np.random.default_rng(seed)
    given = []
    for scale, noise, apart in (
        (1.0, 1.0, 0.0),
        (1e6, 1.0, 1e-3),
        (1e-3, 1e-6, 0.0),
        (1e3, 1e-6, 1e-2),
        (1.0, 1e6, 0.0),
    ):
        given.append((keys(rng, scale, apart * scale), rng.standard_normal((U, V)), noise))
    return given


class Digits:
    """The batch problem of a prior and a stream, by its normal equations in 60 digits."""

    def __init__(self, S: Any, N: Any, given: list[Any], forget: float = 1.0, weight: Any = None) -> None:
        self.N, self.S, rhs = N, S, mp.zeros(D, V)
        for K, T, noise in given:
            self.S, rhs = mp.mpf(forget) * self.S, mp.mpf(forget) * rhs
            error = exact(T) - (exact(K) * exact(weight) if weight is not None else mp.zeros(U, V))
            self.S += exact(K).T * exact(K) / mp.mpf(noise)
            rhs += exact(K).T * error / mp.mpf(noise)
        self.C = N * (N.T * self.S * N) ** -1 * N.T
        self.change = self.C * rhs
        self.root = mp.cholesky(N.T * self.S * N).T * N.T

    @property
    def limit(self) -> float:
        """A few roundings times the condition of a root of S."""
        return 100 * UNIT * math.sqrt(condition(self.N.T * self.S * self.N))

    def off(self, change: Any, expected: Any) -> float:
        """In the S-norm."""
        return size(self.root * (change - expected)) / size(self.root * expected)


@pytest.mark.parametrize("kind", list(priors()))
@pytest.mark.parametrize("forget", [1.0, 0.5, 1e-6])
def test_the_batch_solution(kind, forget) -> None:
    """By the normal equations it was off by 1e-3 where one batch knew its keys 1e12 times better than the prior."""
    given, (prior, S, N) = stream(), priors()[kind]
    weight = np.random.default_rng(5).standard_normal((D, V))
    true = Digits(S, N, given, forget, weight)
    W = ref.batch_solution(prior, given, weight, forget)
    assert true.off(exact(W) - exact(weight), true.change) < 1e-9
    assert off(ref.batch_covariance(prior, given, forget), true.C) < true.limit
    assert off(ref.batch_precision(prior, given, forget), true.S) < 1e-14
    J = size(true.root * true.change) ** 2  # at W_0 less J at the minimum
    at = [ref.batch_objective(prior, given, X, weight, forget) for X in (weight, W)]
    assert at[0] - at[1] == pytest.approx(J, rel=1e-6)


@pytest.mark.parametrize("kind", list(priors()))
def test_the_states(kind) -> None:
    """A gain by the pseudo-inverse of noise I + K C K' lost the noise where it was 1e-12 of that."""
    prior, S, N = priors()[kind]
    state = ref.CovarianceState(prior)
    for i, (K, T, noise) in enumerate(stream()):
        forget = 0.5 if i == 2 else 1.0
        S = mp.mpf(forget) * S
        true = Digits(S, N, [(K, T, noise)])
        gain = state.update(K, noise, forget)
        expected = true.C * exact(K).T / mp.mpf(noise)
        assert true.off(exact(gain), expected) < true.limit
        S = true.S
        assert off(state.covariance(), true.C) < true.limit
    assert off(state.precision(), N * N.T * S * N * N.T) < 1e-12
    K, _, noise = stream()[-1]
    left = S - exact(K).T * exact(K) / mp.mpf(noise)
    true = Digits(left, N, [])
    gain = state.remove(K, noise)
    assert off(state.covariance(), true.C) < true.limit
    expected = true.C * exact(K).T / mp.mpf(noise)
    assert true.off(exact(gain), expected) < true.limit
    with pytest.raises(ValueError, match="no batch with these keys and noise was written"):
        state.remove(K, noise)


@pytest.mark.parametrize("kind", ["ridge", "anchor", "precision", "anchor_keys"])
def test_the_factor_of_a_state(kind) -> None:
    prior, S, N = priors()[kind]
    state = ref.SquareRootState(prior)
    for K, _, noise in stream():
        state.commit(K, noise)
    R, true = state.factor, Digits(S, N, stream())
    assert np.array_equal(R, np.triu(R))
    assert (np.diagonal(R) > 0.0).all()
    assert off(R.T @ R, true.S) < 1e-13
    inverse = true.root**-1
    assert size(inverse.T * (exact(R).T * exact(R) - true.S) * inverse) < 1e-5


class TestHardWrites:
    """What a hard write holds is N; what it tells is the constrained minimiser."""

    @pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
    def test_keys_written_twice_hold_what_they_held_once(self, scale) -> None:
        """The second time they held two directions more, whatever rounding had left of them."""
        rng = np.random.default_rng(6)
        prior, K, T = rk.Prior.ridge(D, 1.0), keys(rng, scale), rng.standard_normal((U, V))
        once, twice = [(K, T, 0.0)], [(K, T, 0.0), (3.0 * K[:2], 3.0 * T[:2], 0.0), (K, T, 0.0)]
        assert np.allclose(ref.batch_covariance(prior, twice), ref.batch_covariance(prior, once), atol=1e-14)
        assert np.allclose(ref.batch_solution(prior, twice), ref.batch_solution(prior, once), rtol=1e-13)
        state = ref.CovarianceState(prior)
        for k, _, _ in twice:
            state.update(k, 0.0)
        assert np.allclose(state.covariance(), ref.batch_covariance(prior, once), atol=1e-14)
        assert not state.gain(K, 0.0).any()  # of what is held: it was some 1e16

    @pytest.mark.parametrize("kind", ["ridge", "anchor", "precision"])
    def test_it_is_the_limit_of_small_noise(self, kind) -> None:
        rng = np.random.default_rng(7)
        prior, S, N = priors()[kind]
        K, T, soft = keys(rng), rng.standard_normal((U, V)), stream()[0]
        true = Digits(S, N, [soft])
        gain = true.C * exact(K).T * (exact(K) * true.C * exact(K).T) ** -1
        change = true.change + gain * (exact(T) - exact(K) * true.change)
        state = ref.CovarianceState(prior)
        state.update(soft[0], soft[2])
        assert off(state.gain(K, 0.0), gain) < 1e-10
        assert true.off(exact(ref.batch_solution(prior, [soft, (K, T, 0.0)])), change) < 1e-10
        left = true.C - gain * exact(K) * true.C
        assert size(exact(ref.batch_covariance(prior, [soft, (K, T, 0.0)])) - left) < 1e-10 * size(left)

    def test_dependent_keys_have_the_gain_of_the_pseudo_inverse(self) -> None:
        rng = np.random.default_rng(8)
        K, prior = keys(rng), rk.Prior.precision(covariance(rng, 4))
        twice = np.concatenate([K, K[:1]])
        gain = ref.CovarianceState(prior).gain(twice, 0.0)
        alone = ref.CovarianceState(prior).gain(K, 0.0)
        assert np.allclose(gain[:, 0], 0.5 * alone[:, 0], rtol=1e-9)
        assert np.allclose(gain[:, 0], gain[:, 3], rtol=1e-9)

    def test_a_tiny_key_beside_a_huge_one_is_held_too(self) -> None:
        K = np.eye(D)[:2] * np.array([[1e9], [1e-9]])
        C = ref.batch_covariance(rk.Prior.ridge(D, 1.0), [(K, None, 0.0)])
        assert np.allclose(C, np.diag([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]))


def numbers(op: str, given: tuple[Any, ...]) -> list[np.ndarray]:
    found = getattr(ref, op)(*given)
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_ops_change_and_share_nothing(op, batch) -> None:
    given = [a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments(op, torch.float64, batch)]
    before = [a.copy() if isinstance(a, np.ndarray) else a for a in given]
    for found in numbers(op, tuple(given)):
        assert not any(np.shares_memory(found, a) for a in given if isinstance(a, np.ndarray))
        if found.dtype == np.float64:
            found[...] = math.nan
    for a, b in zip(given, before, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_ops_take_every_floating_dtype_as_it_is(op, dtype) -> None:
    """bfloat16 was refused: NumPy has none."""
    narrow = tuple(a.to(dtype) if isinstance(a, torch.Tensor) else a for a in arguments(op, torch.float64))
    wide = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in narrow)
    for a, b in zip(numbers(op, narrow), numbers(op, wide), strict=True):
        assert np.array_equal(a, b, equal_nan=True)


def test_what_is_no_real_array_is_refused() -> None:
    negated = torch._neg_view(torch.eye(3, dtype=torch.float64))
    assert np.array_equal(ref.downdate_(negated, torch.zeros(3, 1)), -np.eye(3))
    for C in (torch.eye(3, dtype=torch.complex128), np.eye(3) + 0j):
        with pytest.raises(TypeError, match=r"reference: a real array is needed, got .*complex128"):
            ref.downdate_(C, np.zeros((3, 1)))


def test_nothing_of_the_caller_is_kept() -> None:
    """A filter went on with what its caller made of K, and `batch_precision` gave the prior's own matrix away."""
    prior = rk.Prior.precision(torch.eye(3, dtype=torch.float64))
    ref.batch_precision(prior, [])[...] = 7.0
    assert torch.equal(prior.arrays["S0"], torch.eye(3, dtype=torch.float64))
    K, T = np.ones((1, 3)), np.ones((1, 2))
    found, state = ref.RLSFilter(np.zeros((3, 2)), prior), ref.CovarianceState(prior)
    found.update(K, T)
    state.update(K)
    W, C = found.weight, state.covariance()
    K *= 5.0
    T *= 5.0
    assert np.array_equal(found.weight, W)
    assert np.array_equal(state.covariance(), C)
