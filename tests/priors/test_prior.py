"""Prior: the five kinds, their factors in float64, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import builders
from support.tolerances import relative_error

import rlsedit_kernels as rk
from rlsedit_kernels.priors import factor as factors

D = 30


def spd(condition: float = 100.0, seed: int = 0) -> np.ndarray:
    return builders.spd(D, condition, np.random.default_rng(seed))


def tall(n: int = 50, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, D))


PRIORS = {
    "ridge": lambda: rk.Prior.ridge(D, 0.7),
    "anchor": lambda: rk.Prior.anchor(spd(), mu=1.5, lam=0.1),
    "anchor_keys": lambda: rk.Prior.anchor_keys(tall(), mu=0.5, lam=0.2),
    "null_space": lambda: rk.Prior.null_space(builders.orthogonal(D, np.random.default_rng(2))[:, :12], 3.0),
    "precision": lambda: rk.Prior.precision(spd(1e4)),
}


@pytest.mark.parametrize("kind", PRIORS)
def test_the_trace_is_that_of_the_information_and_does_not_form_it(kind, monkeypatch) -> None:
    prior = PRIORS[kind]()
    expected = float(prior.information().diagonal().sum())
    monkeypatch.setattr(rk.Prior, "information", None)
    assert prior.trace == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", PRIORS)
class TestFactor:
    def test_root_gives_the_covariance(self, kind) -> None:
        prior = PRIORS[kind]()
        expected = rk.reference.batch_covariance(prior, [])
        assert relative_error(prior.factor.covariance(), expected) < 1e-10
        assert torch.equal(prior.factor.covariance(), prior.factor.covariance().mT)

    def test_root_inverse_is_the_left_inverse(self, kind) -> None:
        factor = PRIORS[kind]().factor
        if factor.root is None:
            assert factor.method == "scalar"
            return
        eye = torch.eye(factor.rank, dtype=torch.float64)
        assert relative_error(factor.root_inverse @ factor.root, eye) < 1e-10
        assert factor.root.shape == (D, factor.rank)

    def test_extreme_eigenvalues(self, kind) -> None:
        factor = PRIORS[kind]().factor
        values = np.linalg.eigvalsh(factor.covariance().numpy())[-factor.rank :]
        assert factor.largest == pytest.approx(values[-1], rel=1e-6)
        assert factor.smallest == pytest.approx(values[0], rel=1e-6)
        assert factor.condition == pytest.approx(values[-1] / values[0], rel=1e-6)

    def test_information_inverts_it(self, kind) -> None:
        prior = PRIORS[kind]()
        product = prior.factor.covariance() @ prior.information()
        projector = product if kind == "null_space" else torch.eye(D, dtype=torch.float64)
        assert relative_error(product @ product, projector) < 1e-8

    def test_signature_tells_priors_apart(self, kind) -> None:
        prior = PRIORS[kind]()
        assert prior.signature() == PRIORS[kind]().signature()
        others = [PRIORS[other]().signature() for other in PRIORS if other != kind]
        assert prior.signature() not in others
        assert kind in repr(prior)


class TestLargeMatrices:
    """Above EIGEN_LIMIT a Cholesky factor serves; here the limit is lowered."""

    def test_cholesky_road(self, monkeypatch) -> None:
        monkeypatch.setattr(factors, "EIGEN_LIMIT", 10)
        prior = rk.Prior.precision(spd(1e6))
        exact = rk.reference.batch_covariance(prior, [])
        assert prior.factor.method == "cholesky"
        assert relative_error(prior.factor.covariance(), exact) < 1e-8
        assert prior.factor.condition == pytest.approx(1e6, rel=0.05)
        eye = torch.eye(D, dtype=torch.float64)
        assert relative_error(prior.factor.root_inverse @ prior.factor.root, eye) < 1e-8

    def test_a_singular_matrix_takes_the_other_road(self, monkeypatch) -> None:
        monkeypatch.setattr(factors, "EIGEN_LIMIT", 10)
        prior = rk.Prior.anchor(tall(12).T @ tall(12))
        assert prior.factor.method == "eigen"
        assert prior.factor.lifted == D - 12

    def test_states_agree_on_both_roads(self, monkeypatch) -> None:
        K = torch.from_numpy(builders.keys(5, D, np.random.default_rng(3)))
        gains = []
        for limit in (10, 10_000):
            monkeypatch.setattr(factors, "EIGEN_LIMIT", limit)
            gains.append(rk.CovarianceState(rk.Prior.precision(spd()), form="whitened", dtype=torch.float64).update(K))
        assert relative_error(gains[0], gains[1]) < 1e-10


class TestIllConditioned:
    def test_singular_moment_is_lifted(self) -> None:
        K = tall(10)
        factor = rk.Prior.anchor(K.T @ K).factor
        assert factor.lifted == D - 10
        assert "lifted" in factor.notes[0]
        assert factor.condition == pytest.approx(1.0 / factors.LIFT, rel=1e-3)

    def test_a_ridge_makes_lifting_unnecessary(self) -> None:
        K = tall(10)
        factor = rk.Prior.anchor(K.T @ K, lam=0.1).factor
        assert factor.lifted == 0
        assert factor.notes == ()

    def test_condition_1e10_is_kept(self) -> None:
        factor = rk.Prior.anchor(spd(1e10)).factor
        assert factor.lifted == 0
        assert factor.condition == pytest.approx(1e10, rel=1e-3)
        assert "ill-conditioned" in factor.notes[0]

    def test_rounding_of_a_float32_moment_is_no_error(self) -> None:
        K = torch.randn(15, D, generator=torch.Generator().manual_seed(0))
        moment = K.mT @ K  # float32: slightly negative eigenvalues
        assert rk.Prior.anchor(moment).factor.lifted == D - 15

    def test_an_indefinite_moment_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"second_moment must be positive semi-definite, got eigenvalues"):
            _ = rk.Prior.anchor(spd() - 0.5 * np.eye(D)).factor

    @pytest.mark.parametrize("S", [np.zeros((D, D)), tall(10).T @ tall(10) - 1e-3 * np.eye(D), -np.eye(D)])
    def test_a_precision_that_is_not_definite_is_refused(self, S) -> None:
        with pytest.raises(ValueError, match=r"Prior.precision: S0 must be positive definite, got eigenvalues"):
            rk.CovarianceState(rk.Prior.precision(S))


def test_the_given_matrix_may_change_afterwards() -> None:
    S = torch.eye(D, dtype=torch.float64)
    prior = rk.Prior.precision(S)
    S.zero_()
    assert relative_error(prior.factor.covariance(), np.eye(D)) < 1e-12


def test_projector_and_basis_are_the_same_prior() -> None:
    Q = builders.orthogonal(D, np.random.default_rng(4))[:, :9]
    by_basis, by_projector = rk.Prior.null_space(Q, 2.0), rk.Prior.null_space(Q @ Q.T, 2.0)
    assert by_projector.factor.rank == 9
    assert relative_error(by_basis.factor.covariance(), by_projector.factor.covariance()) < 1e-12


def test_a_basis_of_float32_is_made_orthonormal_to_float64() -> None:
    Q = torch.from_numpy(builders.orthogonal(D, np.random.default_rng(5))[:, :9]).float()
    basis = rk.Prior.null_space(Q, 1.0).arrays["basis"]
    assert relative_error(basis.mT @ basis, np.eye(9)) < 1e-14
    assert relative_error(basis @ basis.mT, Q @ Q.mT) < 1e-6


NAN = np.full((D, D), np.nan)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rk.Prior.ridge(0, 1.0), ValueError, r"Prior.ridge: d must be >= 1, got 0"),
        (lambda: rk.Prior.ridge(2.5, 1.0), TypeError, r"Prior.ridge: d must be an int, got float"),
        (lambda: rk.Prior.ridge(3, -1.0), ValueError, r"Prior.ridge: lam must be finite and >= 0, got -1.0"),
        (lambda: rk.Prior.ridge(3, 0.0).factor, ValueError, r"Prior.ridge: lam is 0, so S_0 is zero"),
        (lambda: rk.Prior.ridge(3, float("nan")), ValueError, r"lam must be finite"),
        (lambda: rk.Prior.ridge(3, "1"), TypeError, r"lam must be a number, got str"),
        (lambda: rk.Prior.anchor(spd(), mu=0.0, lam=0.0), ValueError, r"lam and mu are both 0: S_0 would be zero"),
        (lambda: rk.Prior.anchor(spd(), mu=-1.0), ValueError, r"mu must be finite and >= 0"),
        (lambda: rk.Prior.anchor(NAN), ValueError, r"second_moment must be finite, got NaN or Inf"),
        (lambda: rk.Prior.anchor(tall()), ValueError, r"second_moment must be square \(d, d\), got \(50, 30\)"),
        (lambda: rk.Prior.anchor(np.triu(spd())), ValueError, r"second_moment must be symmetric"),
        (
            lambda: rk.Prior.anchor([[1.0]]),
            TypeError,
            r"must be a torch.Tensor or a numpy array, got list",
        ),
        (
            lambda: rk.Prior.anchor(torch.eye(3, dtype=torch.int64)),
            TypeError,
            r"must be floating point",
        ),
        (lambda: rk.Prior.anchor_keys(np.ones(3), 1.0, 1.0), ValueError, r"K0 must be a matrix"),
        (lambda: rk.Prior.anchor_keys(tall(), 0.0, 0.0), ValueError, r"both 0"),
        (
            lambda: rk.Prior.null_space(2.0 * np.eye(D), 1.0),
            ValueError,
            r"must be symmetric with eigenvalues 0 and 1",
        ),
        (lambda: rk.Prior.null_space(np.zeros((D, D)), 1.0), ValueError, r"the projector is zero"),
        (lambda: rk.Prior.null_space(np.ones((D, 2)), 1.0), ValueError, r"columns of a basis must be orthonormal"),
        (lambda: rk.Prior.null_space(np.ones((2, D)), 1.0), ValueError, r"must be \(d, d\) or \(d, r\) with r < d"),
        (lambda: rk.Prior.null_space(np.eye(D), 0.0), ValueError, r"l2 must be finite and > 0"),
        (lambda: rk.Prior("magic", 3, {}), ValueError, r"kind must be one of"),
    ],
)
def test_wrong_arguments(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()
