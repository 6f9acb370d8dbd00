"""The inverse root: the fact behind it, what it survives that a covariance does not, and how "auto" reaches it."""

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
from rlsedit_kernels.states import choice, inverse_root
from rlsedit_kernels.states.batch import factor, removal
from rlsedit_kernels.states.products import Products

D = 40
properties = settings(max_examples=15, deadline=None, derandomize=True)


def anchor(condition: float = 1e3, largest: float = 1.0, d: int = D) -> rk.Prior:
    return rk.Prior.anchor(builders.spd(d, condition, np.random.default_rng(0), largest))


def keys(u: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64, d: int = D) -> torch.Tensor:
    return builders.tensor(builders.keys(u, d, np.random.default_rng(seed)) * scale, dtype)


PRIORS = {
    "ridge": lambda: rk.Prior.ridge(D, 0.7),
    "anchor": anchor,
    "null_space": lambda: rk.Prior.null_space(builders.orthogonal(D, np.random.default_rng(0))[:, :25], 3.0),
}


@pytest.fixture(params=["keys", "whitened"])
def coordinates(request, monkeypatch) -> str:
    """Both coordinates, forced (a ridge has only the whitened ones)."""
    monkeypatch.setattr(inverse_root, "MAPPED_FROM", math.inf if request.param == "keys" else 0.0)
    return request.param


class TestFact12:
    @properties
    @given(st.integers(0, 10_000), st.sampled_from([0.05, 1.0, 30.0]))
    def test_update_and_removal_by_definition(self, seed, noise) -> None:
        rng = np.random.default_rng(seed)
        u = int(rng.integers(1, 9))
        A = torch.from_numpy(rng.standard_normal((D, D)))
        F = A.mT @ torch.from_numpy(builders.keys(u, D, rng)).mT
        G, eye = F.mT @ F, torch.eye(u, dtype=torch.float64)
        made = factor(Products(A @ F, G, F), noise, 1e-16)
        new = A - made.change.left @ made.change.right.mT
        L = torch.linalg.cholesky(noise * eye + G)
        M = torch.linalg.inv(L.mT) @ torch.linalg.inv(L + math.sqrt(noise) * eye)
        assert relative_error(new, A - A @ F @ M @ F.mT) < 1e-11
        C = A @ A.mT - A @ F @ torch.linalg.inv(noise * eye + G) @ F.mT @ A.mT
        assert relative_error(new @ new.mT, C) < 1e-11
        assert relative_error(made.gain, A @ F @ torch.linalg.inv(noise * eye + G)) < 1e-11

        F = new.mT @ torch.linalg.solve(A.mT, F)  # of the same keys, afterwards
        gain, change, leverage = removal(Products(new @ F, F.mT @ F, F), noise, 1e-16)
        back = new + change.left @ change.right.mT
        assert relative_error(back @ back.mT, A @ A.mT) < 1e-8
        assert leverage == pytest.approx(float(torch.linalg.eigvalsh(F.mT @ F)[-1]) / noise)
        assert relative_error(gain, new @ F @ torch.linalg.inv(noise * eye - F.mT @ F)) < 1e-8

    def test_a_hard_write_is_a_projection(self) -> None:
        rng = np.random.default_rng(3)
        A = torch.from_numpy(rng.standard_normal((D, D)))
        K = torch.from_numpy(builders.keys(6, D, rng))
        F = A.mT @ torch.cat([K, K[:2], 3.0 * K[:1]]).mT
        change = factor(Products(A @ F, F.mT @ F, F), 0.0, 1e-16).change
        projected = A - change.left @ change.right.mT
        N = torch.linalg.solve(A, projected)  # I - F M F'
        assert change.right.shape[1] == 6
        assert relative_error(N @ N, N) < 1e-10
        assert relative_error(N, N.mT) < 1e-10
        assert float((N @ F).abs().max()) < 1e-10

    def test_the_truncated_and_the_plain_system_change_c_alike(self) -> None:
        """The eigenvalue variant of the root, which a soft but singular system takes."""
        rng = np.random.default_rng(4)
        A = torch.from_numpy(rng.standard_normal((D, D)))
        F = A.mT @ torch.from_numpy(builders.keys(5, D, rng)).mT
        F = torch.cat([F, 0.0 * F[:, :1]], dim=1)
        G, noise = F.mT @ F, 0.3
        G[-1, -1] -= 1e-6 * noise  # a pivot that a healthy state cannot have
        cut = factor(Products(A @ F, G, F), noise, 1e-16).change
        new = A - cut.left @ cut.right.mT
        C = A @ A.mT - A @ F @ torch.linalg.inv(noise * torch.eye(6, dtype=torch.float64) + G) @ F.mT @ A.mT
        assert cut.right is not F
        assert relative_error(new @ new.mT, C) < 1e-10


class TestForm:
    @pytest.mark.parametrize("prior", PRIORS)
    def test_along_a_stream_of_everything(self, prior, coordinates, dtype) -> None:
        prior = PRIORS[prior]()
        state = rk.CovarianceState(prior, form="inverse_root", dtype=dtype)
        plain = rk.CovarianceState(prior, form="plain", dtype=torch.float64)
        limit = 1e4 * torch.finfo(dtype).eps
        assert state._form.maps == (coordinates == "whitened" or prior.kind == "ridge")
        assert relative_error(state.covariance(), plain.covariance()) < limit
        for s in range(6):
            K = keys(5, s, 0.5, dtype)
            gain = state.update(K, 0.5, 0.9)
            assert relative_error(gain, plain.update(K.double(), 0.5, 0.9)) < limit
        assert relative_error(state.remove(K, 0.5), plain.remove(K.double(), 0.5)) < limit
        assert relative_error(state.covariance(), plain.covariance()) < limit
        assert relative_error(state.precision(), plain.precision()) < 10 * limit
        assert state.health().drift < limit
        twin = rk.CovarianceState(prior, dtype=dtype)
        twin.load_state_dict(state.state_dict())
        Q = builders.tensor(builders.orthogonal(D, np.random.default_rng(1))[:, :3], dtype)
        for one in (state, twin, plain):
            one.restrict(Q.to(one.dtype))
            one.commit(keys(4, 50, 1.0, one.dtype), noise=0.0)
        assert relative_error(state.covariance(), plain.covariance()) < limit
        assert torch.equal(state.covariance(), twin.covariance())
        assert state.health() == twin.health()
        assert state.health().drift < limit
        assert float((state.covariance() @ Q).abs().max()) < limit

    def test_the_precision_of_a_singular_state_is_a_pseudo_inverse(self, coordinates, dtype) -> None:
        prior = anchor()
        state = rk.CovarianceState(prior, form="inverse_root", dtype=dtype)
        expected = rk.reference.CovarianceState(prior)
        K, hard = keys(5, 0, 1.0, dtype), keys(3, 1, 1.0, dtype)
        state.commit(K)
        state.commit(hard, noise=0.0)
        expected.commit(K)
        expected.commit(hard, noise=0.0)
        N = expected._N
        inner = np.linalg.pinv(N.T @ state.covariance().double().numpy() @ N)
        assert relative_error(inner, N.T @ expected.precision() @ N) < 1e5 * torch.finfo(dtype).eps
        values = torch.linalg.eigvalsh(state.precision())
        assert int((values > 1e-9 * values[-1]).sum()) == D - 3

    def test_what_is_well_known_is_no_null_space(self) -> None:
        """C~ of 1e-6 beside the 1e-14 that rounding leaves of a hard write: a root tells them apart."""
        state = rk.CovarianceState(rk.Prior.ridge(D, 0.01), form="inverse_root")
        state.commit(keys(5, 0, 10.0, torch.float32))
        state.commit(keys(3, 1, 1.0, torch.float32), noise=0.0)
        values = torch.linalg.eigvalsh(state.precision())
        assert int((values > 1e-9 * values[-1]).sum()) == D - 3

    @pytest.mark.parametrize("condition", [1e2, 1e8])
    def test_coordinates_follow_the_condition_of_the_prior(self, condition) -> None:
        state = rk.CovarianceState(anchor(condition), form="inverse_root")
        assert state._form.maps == (condition > 1e5)
        assert not rk.CovarianceState(anchor(condition), form="inverse_root", dtype=torch.float64)._form.maps

    def test_an_ill_conditioned_prior_needs_whitened_coordinates(self, monkeypatch) -> None:
        """Over a few streams: of a single one the ratio is anything between 0.15 and 0.25."""
        prior = anchor(1e8, d=80)
        errors = {}
        for name, limit in {"chosen": inverse_root.MAPPED_FROM, "keys": math.inf}.items():
            monkeypatch.setattr(inverse_root, "MAPPED_FROM", limit)
            errors[name] = 0.0
            for stream in range(4):
                state = rk.CovarianceState(prior, form="inverse_root")
                written = []
                for s in range(10):
                    K = keys(8, 100 * stream + s, 0.1, torch.float32, d=80)
                    state.commit(K)
                    written.append((K, None))
                C = rk.reference.batch_covariance(prior, written)
                errors[name] += _in_norm_of(C, state._form.covariance(torch.float64).numpy())
        assert errors["chosen"] < 0.25 * errors["keys"]

    @pytest.mark.parametrize("singular", [False, True])
    def test_from_covariance(self, singular, coordinates) -> None:
        prior = anchor()
        state = rk.CovarianceState(prior, form="plain", dtype=torch.float64)
        state.commit(keys(7, 0))
        if singular:
            state.commit(keys(4, 1), noise=0.0)
        C = state.covariance()
        form = inverse_root.InverseRootForm.from_covariance(C, prior.factor, torch.float64, C.device)
        assert relative_error(form.covariance(torch.float64), C) < 1e-11

    def test_it_is_positive_semi_definite_by_construction(self) -> None:
        """Noise on the root that would make a covariance indefinite leaves it what it is."""
        state = rk.CovarianceState(anchor(), form="inverse_root")
        state._form.A.add_(torch.randn(D, D, generator=torch.Generator().manual_seed(0)), alpha=3.0)
        for s in range(20):
            state.commit(keys(6, s, 30.0, torch.float32))
        assert state.health().smallest_pivot > 0.99
        assert float(torch.linalg.eigvalsh(state._form.covariance(torch.float64))[0]) > 0.0

    def test_damaged_coordinates_are_refused_and_change_nothing(self) -> None:
        state = rk.CovarianceState(anchor(), form="inverse_root")
        state.commit(keys(3, 0, dtype=torch.float32))
        saved = state.state_dict()
        saved["tensors"]["maps"] = 1
        before = state.covariance()
        with pytest.raises(ValueError, match="maps must be a bool, got int"):
            state.load_state_dict(saved)
        assert torch.equal(state.covariance(), before)


class TestWeakPrior:
    """A stream whose first batches tell almost everything: rho about 0.3."""

    @staticmethod
    def error(form: str, lam: float = 0.01, d: int = 96, batches: int = 40) -> tuple[float, rk.CovarianceState]:
        rng = np.random.default_rng(0)
        mixing = rng.standard_normal((d, d)) * np.logspace(0.0, -2.0, d)
        rls = rk.RLSFilter(torch.zeros(d, 4), rk.Prior.ridge(d, lam), layout="in_out", form=form)
        written = []
        for _ in range(batches):
            K = rng.standard_normal((16, d)) @ mixing.T
            K = builders.tensor(K * np.sqrt(500.0) / np.linalg.norm(K, axis=1, keepdims=True), torch.float32)
            V = builders.tensor(rng.standard_normal((16, 4)), torch.float32)
            try:
                rls.update(K, V)
            except rk.BreakdownError:
                return math.inf, rls.state
            written.append((K, V, 1.0))
        S = rk.reference.batch_precision(rls.state.prior, written)
        W = rk.reference.batch_solution(rls.state.prior, written, np.zeros((d, 4)))
        off = rls.weight.double().numpy() - W
        return float(np.sqrt(np.sum(off * (S @ off)) / np.sum(W * (S @ W)))), rls.state

    def test_the_root_keeps_what_the_whitened_covariance_loses(self) -> None:
        root, state = self.error("inverse_root")
        whitened, _ = self.error("whitened")
        assert 0.2 < state.health().rho < 0.5
        assert root < 1e-3
        assert whitened > 10.0 * root
        assert state.health().status == "ok"

    def test_auto_holds_wherever_it_is_asked(self) -> None:
        for lam in (1.0, 0.1, 0.01, 1e-3, 1e-5):
            error, state = self.error("auto", lam)
            assert error < 1e-3, (lam, state.health())

    def test_too_weak_a_prior_is_said(self) -> None:
        _, state = self.error("inverse_root", 1e-3, batches=2)
        health = state.health()
        assert health.status != "ok"
        assert any("rho" in message and "use float64" in message for message in health.messages)


class TestAuto:
    def test_it_starts_with_the_root_where_the_prior_is_weak(self) -> None:
        state = rk.CovarianceState(anchor(1e2, largest=1e-4))
        state.commit(keys(5, 0, dtype=torch.float32))
        health = state.health()
        assert (health.form, health.storage) == ("inverse_root", "torch.float32")
        assert "no covariance in torch.float32 would hold" in health.reason

    def test_it_moves_to_the_root_while_the_stream_runs_and_loses_nothing(self) -> None:
        """By way of a prior whose covariance, rounded to float32, loses two digits: condition 1e8."""
        prior = anchor(1e8, largest=1e4)
        state, exact = rk.CovarianceState(prior), rk.CovarianceState(prior, dtype=torch.float64)
        for s in range(8):
            K = keys(5, s, 0.1, torch.float32)
            state.commit(K)
            exact.commit(K.double())
        assert state.form == "whitened"
        K = keys(5, 99, 1.0, torch.float32)
        gain = state.update(K)
        health = state.health()
        assert (health.form, health.storage) == ("inverse_root", "torch.float32")
        assert health.reason.startswith("moved from whitened float32 after 8 batches: rho")
        assert health.drift < 1e-4
        assert relative_error(gain, exact.update(K.double())) < 1e-4
        C, got = (one._form.covariance(torch.float64).numpy() for one in (exact, state))
        assert _in_norm_of(C, got) < 5e-4
        assert health.steps == 9

    def test_it_moves_on_to_float64_and_never_back(self) -> None:
        prior = anchor(1e2)
        state, exact = rk.CovarianceState(prior), rk.CovarianceState(prior, dtype=torch.float64)
        forms = []
        for s, scale in enumerate((0.1, 3.0, 0.1, 30.0, 1e3, 1e3, 0.1)):
            K = keys(4, s, scale, torch.float32)
            gain = state.update(K)
            assert relative_error(gain, exact.update(K.double())) < 1e-3
            forms.append((state.form, str(state._form.dtype).removeprefix("torch.")))
        assert forms[:4] == [("plain", "float32"), *[("inverse_root", "float32")] * 3]
        assert {dtype for _, dtype in forms[4:]} == {"float64"}
        assert "moved from inverse_root float32 after 4 batches" in state.health().reason

    def test_a_batch_that_is_refused_moves_nothing(self) -> None:
        state = rk.CovarianceState(anchor(1e2))
        state.commit(keys(4, 0, 0.1, torch.float32))
        before = state.health()
        with pytest.raises(rk.LeverageError):
            state.remove(keys(4, 1, 30.0, torch.float32))
        assert state.health() == before

    def test_columns_of_a_ridge_stay_columns_when_they_move_to_float64(self) -> None:
        state = rk.CovarianceState(rk.Prior.ridge(400, 1.0))
        exact = rk.CovarianceState(rk.Prior.ridge(400, 1.0), dtype=torch.float64)
        for s, scale in enumerate((1.0, 100.0)):
            K = keys(3, s, scale, torch.float32, d=400)
            assert relative_error(state.update(K), exact.update(K.double())) < 1e-5
        health = state.health()
        assert (health.form, health.storage, health.columns) == ("whitened", "torch.float64", 6)
        assert "moved from whitened float32" in health.reason

    def test_a_ridge_that_has_become_a_matrix_moves_to_the_root(self) -> None:
        state = rk.CovarianceState(rk.Prior.ridge(D, 1.0))
        for s in range(8):
            state.commit(keys(5, s, 1.0, torch.float32))
        assert state.health().dense
        state.commit(keys(5, 99, 100.0, torch.float32))
        assert (state.form, state._form.dtype) == ("inverse_root", torch.float32)

    def test_a_weak_ridge_in_float64_stays_there_as_a_matrix(self) -> None:
        state = rk.CovarianceState(rk.Prior.ridge(D, 0.01))
        seen = []
        for s in range(10):
            state.commit(keys(5, s, 1.0, torch.float32))
            health = state.health()
            seen.append((health.form, health.storage, health.dense))
        assert seen[0] == ("whitened", "torch.float64", False)
        assert seen[-1] == ("whitened", "torch.float64", True)

    def test_float64_has_a_last_resort_too(self) -> None:
        factor_ = rk.Prior.ridge(D, 1e-7).factor
        chosen = choice.choose(factor_, torch.float32, 1.0)
        assert (chosen.form, chosen.storage) == ("inverse_root", torch.float64)
        assert choice.safest(chosen.form, chosen.storage)
        assert "may not do" in choice.choose(rk.Prior.ridge(D, 1e-9).factor, torch.float64, 1.0).reason

    def test_cost_counts_the_map(self) -> None:
        mild, hard = anchor(1e2).factor, anchor(1e8).factor
        cost = {name: choice.flops(name, mild, D, True) for name in ("plain", "whitened", "inverse_root")}
        assert cost["plain"] < cost["inverse_root"] < cost["whitened"]
        assert choice.flops("inverse_root", hard, D, True) > choice.flops("whitened", hard, D, True)


def _in_norm_of(C: np.ndarray, other: np.ndarray) -> float:
    """|C^-1/2 other C^-1/2 - I|."""
    L = np.linalg.cholesky(C)
    return float(np.linalg.norm(np.linalg.solve(L, np.linalg.solve(L, other).T) - np.eye(len(C))))
