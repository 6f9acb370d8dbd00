"""SquareRootState: streaming QR as a state. What it promises beyond the golden problems."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from support import builders
from support.bits import same
from support.tolerances import relative_error

import rlsedit_kernels as rk

D = 40
FORMS = ["plain", "whitened", "inverse_root", "square_root"]


def anchor(condition: float = 100.0) -> rk.Prior:
    return rk.Prior.anchor(builders.spd(D, condition, np.random.default_rng(0)), lam=0.05)


def space() -> rk.Prior:
    return rk.Prior.null_space(builders.orthogonal(D, np.random.default_rng(1))[:, :25], 2.0)


PRIORS = {"ridge": lambda: rk.Prior.ridge(D, 0.5), "anchor": anchor, "null_space": space}
each_prior = pytest.mark.parametrize("kind", PRIORS)


def keys(u: int, seed: int = 1, dtype: torch.dtype = torch.float32, d: int = D) -> torch.Tensor:
    return builders.tensor(builders.keys(u, d, np.random.default_rng(seed)) * 2.0, dtype)


def new(prior: rk.Prior, form: str, dtype: torch.dtype) -> rk.CovarianceState | rk.SquareRootState:
    if form == "square_root":
        return rk.SquareRootState(prior, dtype=dtype)
    return rk.CovarianceState(prior, form=form, dtype=dtype)


def snapshot(state: rk.SquareRootState) -> dict:
    return copy.deepcopy(state.state_dict())


def unchanged(state: rk.SquareRootState, before: dict) -> bool:
    now = state.state_dict()
    tensors = torch.equal(now["tensors"]["R"], before["tensors"]["R"])
    probes = all(torch.equal(now["probes"][name], before["probes"][name]) for name in ("z", "image"))
    return tensors and probes and now["counters"] == before["counters"]


def written(kind: str, dtype: torch.dtype, steps: int = 5) -> tuple[rk.SquareRootState, list]:
    state, batches = rk.SquareRootState(PRIORS[kind](), dtype=dtype), []
    for seed in range(steps):
        batches.append((keys(6, seed, dtype), [0.3, 1.0, 4.0][seed % 3]))
        state.commit(*batches[-1])
    return state, batches


class TestState:
    @each_prior
    def test_gain_changes_nothing_and_update_is_both(self, kind, dtype) -> None:
        state, _ = written(kind, dtype)
        before, K = snapshot(state), keys(5, 11, dtype)
        gain = state.gain(K, 0.7)
        assert unchanged(state, before)
        twin = state.clone()
        assert torch.equal(twin.update(K, 0.7), gain)
        state.commit(K, 0.7)
        assert torch.equal(state.factor, twin.factor)
        assert state.steps == twin.steps == 6

    @each_prior
    def test_forgetting_in_the_gain(self, kind) -> None:
        """g = S_new^-1 K' / noise holds with forgetting too."""
        state, _ = written(kind, torch.float64)
        K = keys(5, 12, torch.float64)
        gain = state.update(K, 0.7, 0.8)
        assert relative_error(gain, state.covariance() @ K.mT / 0.7) < 1e-10

    def test_a_write_needs_the_state_it_was_prepared_for(self) -> None:
        state, _ = written("anchor", torch.float32)
        prepared = state.prepare(keys(3))
        state.commit(keys(2, 5))
        before = snapshot(state)
        with pytest.raises(ValueError, match="prepare it again"):
            state.write(prepared)
        assert unchanged(state, before)

    @each_prior
    def test_saved_and_restored_to_the_bit(self, kind, dtype) -> None:
        state, _ = written(kind, dtype)
        twin = rk.SquareRootState(PRIORS[kind](), dtype=dtype)
        twin.load_state_dict(snapshot(state))
        K = keys(4, 20, dtype)
        assert torch.equal(state.update(K), twin.update(K))
        assert torch.equal(state.factor, twin.factor)
        assert state.health() == twin.health()

    def test_a_foreign_state_is_refused(self) -> None:
        state, _ = written("anchor", torch.float32)
        before, saved = snapshot(state), snapshot(state)
        other = snapshot(written("ridge", torch.float32)[0])
        broken = {**saved, "tensors": {**saved["tensors"], "R": saved["tensors"]["R"][:3]}}
        covariance = rk.CovarianceState(anchor(), form="plain").state_dict()
        for wrong, message in [(other, "another prior"), (broken, "R must be"), (covariance, "form must be")]:
            with pytest.raises(ValueError, match=message):
                state.load_state_dict(wrong)
        with pytest.raises(ValueError, match=r"float32, this state is torch\.float64"):
            rk.SquareRootState(anchor(), dtype=torch.float64).load_state_dict(saved)
        assert unchanged(state, before)

    def test_to_and_clone_are_independent(self) -> None:
        state, _ = written("null_space", torch.float32)
        before = snapshot(state)
        wide, twin = state.to(dtype=torch.float64), state.clone()
        wide.commit(keys(3, dtype=torch.float64))
        twin.commit(keys(3))
        assert wide.factor.dtype == torch.float64
        assert relative_error(wide.covariance(), twin.covariance()) < 1e-5
        assert unchanged(state, before)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda s: s.update(keys(3), 0.0), ValueError, r"noise must be > 0 for a triangular factor"),
            (lambda s: s.commit(keys(3), -1.0), ValueError, r"commit: noise must be finite and >= 0"),
            (lambda s: s.gain(keys(3)[:, 1:]), ValueError, r"K must have shape \(u, d\) with u >= 1 and d = 40"),
            (lambda s: s.commit(keys(3) * math.nan), ValueError, r"commit: K must be finite"),
            (lambda s: s.commit(keys(3), 1.0, 0.0), ValueError, r"forget must be in \(0, 1\]"),
            (lambda s: s.commit(torch.full((2, D), 1e38)), ValueError, r"R would grow to .* scale K or raise noise"),
            (lambda s: s.update(torch.full((2, D), 1e38)), ValueError, r"R would grow to"),
            (lambda s: s.commit([1.0]), TypeError, r"K must be a torch.Tensor, got list"),
            (lambda s: s.remove(keys(3), 0.0), ValueError, r"noise must be > 0"),
            (lambda s: s.restrict(torch.ones(D, 2)), ValueError, r"columns of Q must be orthonormal"),
            (lambda s: s.restrict(torch.eye(D)), ValueError, r"Q spans the whole space"),
            (lambda s: s.append_with(torch.ones(3, 2), keys(3), torch.ones(3, 2)), ValueError, r"B must have shape"),
            (lambda s: s.append_with(torch.ones(D, 2), keys(3), torch.ones(3, 4)), ValueError, r"V must have shape"),
            (lambda s: s.append_with(torch.ones(D, 2).double(), keys(3), torch.ones(3, 2)), TypeError, r"B must have"),
            (lambda s: s.append_with(None, keys(3), torch.ones(3, 2)), TypeError, r"B must be a torch.Tensor"),
            (lambda s: s.convert("qr"), ValueError, r"form must be one of .*'square_root', got 'qr'"),
            (lambda s: s.to(dtype=torch.float16), TypeError, r"dtype must be torch.float32 or torch.float64"),
        ],
    )
    def test_wrong_arguments_change_nothing(self, call, error, message) -> None:
        state, _ = written("anchor", torch.float32)
        before = snapshot(state)
        with pytest.raises(error, match=message):
            call(state)
        assert unchanged(state, before)

    def test_wrong_construction(self) -> None:
        with pytest.raises(TypeError, match="prior must be a Prior, got int"):
            rk.SquareRootState(3)
        with pytest.raises(TypeError, match="dtype must be"):
            rk.SquareRootState(anchor(), dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="positive definite"):
            rk.SquareRootState(rk.Prior.precision(-np.eye(4)))

    def test_health_of_a_stream(self, dtype) -> None:
        health = written("anchor", dtype)[0].health()
        assert (health.status, health.form, health.steps) == ("ok", "square_root", 5)
        assert health.drift < 100 * torch.finfo(dtype).eps
        assert health.ok

    def test_health_sees_a_damaged_factor(self) -> None:
        state, _ = written("anchor", torch.float32)
        state._form.R[3, 3] *= 1.3
        health = state.health()
        assert health.drift > 1e-3
        assert health.status != "ok"


class TestFromNothing:
    def test_a_weight_once_d_rows_have_arrived(self, dtype, backend) -> None:
        state, rng = rk.SquareRootState(rk.Prior.ridge(D, 0.0), dtype=dtype), np.random.default_rng(3)
        assert not state.determined
        rows = builders.tensor(rng.standard_normal((D + 8, D)), dtype)
        for part in rows[:36].split(9):
            with pytest.raises(rk.UnderdeterminedError, match=r"knows \d+ of 40 directions"):
                state.gain(part)
            state.commit(part)
            health = state.health()
            assert health.status == "warning"
            assert "directions are known" in health.messages[0]
        with pytest.raises(rk.UnderdeterminedError):
            state.covariance()
        gain = state.update(rows[36:])
        S = (rows.double().mT @ rows.double()).numpy()
        limit = 1e4 * torch.finfo(dtype).eps
        assert state.determined
        assert relative_error(gain, np.linalg.solve(S, rows[36:].double().mT.numpy())) < limit
        assert relative_error(state.precision(), S) < 100 * torch.finfo(dtype).eps
        assert state.health().status == "ok"

    def test_dependent_rows_do_not_determine(self) -> None:
        state = rk.SquareRootState(rk.Prior.ridge(D, 0.0))
        state.commit(torch.cat([keys(20), keys(20), keys(20) * 3.0]))
        assert not state.determined
        with pytest.raises(rk.UnderdeterminedError, match="knows 20 of 40 directions"):
            state.covariance()

    def test_a_covariance_cannot(self) -> None:
        nothing = rk.Prior.ridge(D, 0.0)
        with pytest.raises(ValueError, match="lam is 0, so S_0 is zero"):
            rk.CovarianceState(nothing)
        state = rk.SquareRootState(nothing)
        state.commit(keys(60))
        with pytest.raises(ValueError, match="lam is 0, so S_0 is zero"):
            state.convert("plain")


class TestRemoval:
    @each_prior
    def test_is_the_stream_without_the_batch(self, kind, dtype) -> None:
        state, batches = written(kind, dtype)
        K, noise = batches.pop(2)
        F = state._form.covariance64() @ K.double().mT
        expected = F @ torch.linalg.inv(noise * torch.eye(6, dtype=torch.float64) - K.double() @ F)
        gain = state.remove(K, noise)
        without = rk.SquareRootState(PRIORS[kind](), dtype=dtype)
        for batch in batches:
            without.commit(*batch)
        limit = 2e3 * torch.finfo(dtype).eps
        assert relative_error(gain, expected) < limit
        if kind != "null_space":
            assert relative_error(state.factor, without.factor) < limit
        assert relative_error(state.precision(), without.precision()) < limit
        assert torch.equal(state.factor, state.factor.triu())
        assert bool((state.factor.diagonal() > 0).all())
        assert state.health().status == "ok"
        assert state.health().largest_leverage < 1.0

    def test_u_beyond_a_panel_and_beyond_d(self) -> None:
        rng = np.random.default_rng(4)
        prior = rk.Prior.ridge(300, 1.0)
        for u in (1, 150, 400):
            state, other = rk.SquareRootState(prior), rk.SquareRootState(prior)
            stays, goes = (builders.tensor(builders.keys(n, 300, rng), torch.float32) for n in (200, u))
            state.commit(stays)
            state.commit(goes)
            other.commit(stays)
            state.remove(goes)
            assert relative_error(state.factor, other.factor) < 1e-5

    def test_leverage_is_found_before_anything_is_written(self, dtype) -> None:
        state = rk.SquareRootState(rk.Prior.ridge(D, 1e-5), dtype=dtype)
        state.commit(keys(6, 0, dtype))
        K = torch.ones(1, D, dtype=dtype) * 1e3
        state.commit(K, 1e-6)
        before = snapshot(state)
        with pytest.raises(rk.LeverageError, match=r"has leverage .* nothing was changed"):
            state.remove(K, 1e-6)
        with pytest.raises(rk.LeverageError):
            state.remove(keys(4, 9, dtype), 1e-9)  # never written
        assert unchanged(state, before)

    @pytest.mark.parametrize("form", FORMS)
    def test_with_a_history_it_refactors_instead(self, form, dtype) -> None:
        state = new(rk.Prior.ridge(D, 1e-3), form, dtype)
        stays, goes = keys(60, 0, dtype), torch.ones(1, D, dtype=dtype) * 1e7
        state.commit(stays)
        state.commit(goes, 1e-6)
        with pytest.raises(rk.LeverageError):
            state.remove(goes, 1e-6)
        gain = state.remove(goes, 1e-6, remaining=[(stays, 1.0)])
        expected = rk.SquareRootState(rk.Prior.ridge(D, 1e-3), dtype=torch.float64)
        expected.commit(stays.double())
        assert relative_error(state.covariance(), expected.covariance()) < 1e3 * torch.finfo(dtype).eps
        assert state.steps == 1
        # W - g (V - K W) is the weight without the batch: g = C_new K' / noise
        assert relative_error(gain, expected.covariance().double() @ goes.double().mT / 1e-6) < 1e-2

    def test_the_right_hand_side_follows(self, dtype) -> None:
        rng = np.random.default_rng(6)
        state, other = (rk.SquareRootState(anchor(), dtype=dtype) for _ in range(2))
        B, other_B = torch.zeros(D, 3, dtype=dtype), torch.zeros(D, 3, dtype=dtype)
        batches = [(keys(6, s, dtype), builders.tensor(rng.standard_normal((6, 3)), dtype), 0.5) for s in range(4)]
        for i, (K, V, noise) in enumerate(batches):
            state.append_with(B, K, V, noise)
            if i != 1:
                other.append_with(other_B, K, V, noise)
        state.remove_with(B, *batches[1])
        limit = 2e3 * torch.finfo(dtype).eps
        assert relative_error(state.solve(B), other.solve(other_B)) < limit
        assert relative_error(B, other_B) < limit

    def test_remove_is_the_inverse_of_commit_for_a_thousand_batches(self) -> None:
        """A sliding window: nothing creeps in."""
        state, window = rk.SquareRootState(rk.Prior.ridge(D, 1.0)), []
        for seed in range(300):
            window.append(keys(4, seed))
            state.commit(window[-1])
            if len(window) > 10:
                state.remove(window.pop(0))
        S = np.eye(D) + sum((K.double().mT @ K.double()).numpy() for K in window)
        assert relative_error(state.precision(), S) < 2e-5


class TestRestriction:
    @each_prior
    def test_later_gains_leave_the_directions_alone(self, kind, dtype) -> None:
        state, _ = written(kind, dtype)
        Q = builders.tensor(builders.orthogonal(D, np.random.default_rng(8))[:, :4], dtype)
        reference = rk.CovarianceState(PRIORS[kind](), form="plain", dtype=torch.float64)
        for K, noise in written(kind, torch.float64)[1]:
            reference.commit(K, noise)
        reference.restrict(Q.double())
        state.restrict(Q)
        assert relative_error(state.covariance(), reference.covariance()) < 1e3 * torch.finfo(dtype).eps
        gain = state.update(keys(5, 30, dtype))
        assert float((Q.mT @ gain).abs().max()) < 1e2 * torch.finfo(dtype).eps * float(gain.abs().max())
        assert state.health().status == "ok"

    def test_refactor_is_the_stream_itself(self, dtype) -> None:
        state, batches = written("anchor", dtype)
        expected, limit = state.factor, 1e2 * torch.finfo(dtype).eps
        state.refactor(batches)
        assert relative_error(state.factor, expected) < limit
        state.restrict(torch.eye(D, dtype=dtype)[:, :2])
        expected = state.covariance()
        state.refactor(batches)
        assert relative_error(state.covariance(), expected) < 10 * limit


class TestForms:
    @each_prior
    @pytest.mark.parametrize("source", FORMS)
    @pytest.mark.parametrize("target", FORMS)
    def test_conversion_is_exact_to_rounding(self, kind, source, target, dtype) -> None:
        prior = PRIORS[kind]()
        state = new(prior, source, dtype)
        for seed in range(4):
            state.commit(keys(6, seed, dtype), 0.5)
        other = state.convert(target)
        assert other.form == target
        assert other.steps == 4
        limit = 1e2 * torch.finfo(dtype).eps
        assert relative_error(other.covariance(), state.covariance()) < limit
        K = keys(5, 40, dtype)
        before = state.covariance()
        assert relative_error(other.update(K, 0.3), state.gain(K, 0.3)) < 10 * limit
        assert torch.equal(state.covariance(), before)
        assert other.health().ok

    @pytest.mark.parametrize("source", ["plain", "whitened", "inverse_root"])
    def test_a_hard_write_survives_the_conversion(self, source, dtype) -> None:
        state = rk.CovarianceState(anchor(), form=source, dtype=dtype)
        hard = keys(3, 50, dtype)
        state.commit(keys(6, 1, dtype))
        state.commit(hard, 0.0)
        other = state.convert("square_root")
        assert isinstance(other, rk.SquareRootState)
        assert other.rank == D - 3
        assert relative_error(other.covariance(), state.covariance()) < 1e3 * torch.finfo(dtype).eps
        gain = other.gain(keys(4, 51, dtype))
        assert float((hard @ gain).abs().max()) < 1e3 * torch.finfo(dtype).eps

    @each_prior
    def test_all_forms_agree_along_a_stream(self, kind, dtype, backend) -> None:
        """W, gain, covariance and cost after every batch."""
        prior, rng = PRIORS[kind](), np.random.default_rng(7)
        W = builders.tensor(rng.standard_normal((D, 5)), dtype)
        filters = {
            form: rk.RLSFilter(W, prior, layout="in_out", form=form) for form in ("plain", "whitened", "inverse_root")
        }
        filters["carried"] = rk.RLSFilter(W, prior, "square_root", layout="in_out")
        filters["gain"] = rk.RLSFilter(W, prior, "square_root", layout="in_out", solution="gain")
        limit = 3e3 * torch.finfo(dtype).eps
        for seed in range(8):
            K, V = keys(1 + seed, seed, dtype), builders.tensor(rng.standard_normal((1 + seed, 5)), dtype)
            gains = {name: rls.state.gain(K, 0.4) for name, rls in filters.items()}
            steps = {name: rls.update(K, V, 0.4, 0.97) for name, rls in filters.items()}
            for name, rls in filters.items():
                assert relative_error(gains[name], gains["whitened"]) < limit, name
                assert relative_error(rls.weight, filters["whitened"].weight) < limit, name
                assert relative_error(rls.state.covariance(), filters["whitened"].state.covariance()) < limit, name
                for figure in ("objective", "innovation_norm", "residual_norm", "parameter_bound", "anchor_bound"):
                    one, other = (getattr(steps[x], figure) for x in (name, "whitened"))
                    assert one == (None if other is None else pytest.approx(other, rel=limit)), (name, figure)


def test_carried_right_hand_side_against_the_gain_where_the_prior_is_weak() -> None:
    """With W read from R and B no error is handed on; by gains those of the first weights stay.

    The prior is nearly a hard write (rho about 30): what a gain step gets wrong in a direction that nothing holds
    back is never put right, since later batches see it only through their own keys.
    """
    d, u, rng = 128, 32, np.random.default_rng(0)
    mixing = rng.standard_normal((d, d)) * np.logspace(0.0, -2.0, d)
    prior, W = rk.Prior.ridge(d, 1e-4), torch.zeros(d, 6)
    carried = rk.RLSFilter(W, prior, "square_root", layout="in_out")
    gain = rk.RLSFilter(W, prior, "square_root", layout="in_out", solution="gain")
    S, rhs = 1e-8 * np.eye(d), np.zeros((d, 6))
    for _ in range(20):
        K = rng.standard_normal((u, d)) @ mixing.T
        K = torch.from_numpy(K / np.linalg.norm(K, axis=1)[:, None] * 2.2).float()
        V = torch.from_numpy(rng.standard_normal((u, 6))).float()
        carried.update(K, V)
        gain.update(K, V)
        S += (K.double().mT @ K.double()).numpy()
        rhs += (K.double().mT @ V.double()).numpy()
    exact = np.linalg.solve(S, rhs)

    def error(weight: torch.Tensor) -> float:
        E = weight.double().numpy() - exact
        return float(np.sqrt(np.sum(E * (S @ E)) / np.sum(exact * (S @ exact))))

    assert carried.state.health().rho > 20.0
    assert error(carried.weight) < 2e-4
    assert error(gain.weight) > 3.0 * error(carried.weight)


def test_the_gain_is_taken_before_the_batch_for_a_reason() -> None:
    """R with the keys appended gives C_new K' as a difference that a weak prior leaves no digit of."""
    d, u, rng = 96, 24, np.random.default_rng(1)
    mixing = rng.standard_normal((d, d)) * np.logspace(0.0, -2.0, d)
    state = rk.SquareRootState(rk.Prior.ridge(d, 1e-3))
    K = torch.from_numpy(rng.standard_normal((u, d)) @ mixing.T)
    K = (K / K.norm(dim=1, keepdim=True) * 3.0).float()
    exact = rk.SquareRootState(rk.Prior.ridge(d, 1e-3), dtype=torch.float64).gain(K)
    before = state.gain(K)
    state.commit(K)
    after = rk.ops.qr_gain(state.factor, K)
    assert relative_error(before, exact) < 3e-3
    assert relative_error(after, exact) > 10 * relative_error(before, exact)


@each_prior
def test_what_a_loaded_state_saves_is_what_it_was_given(kind) -> None:
    """|R|^2, by which an overflow is known before it happens, among it: it is followed and not read from R again."""
    for dtype in (torch.float32, torch.float64):
        state, _ = written(kind, dtype)
        state.commit(keys(3, 12, dtype), noise=0.5, forget=0.7)
        B = torch.zeros(state.rank, 2, dtype=dtype)
        state.append_with(B, keys(2, 13, dtype), torch.ones(2, 2, dtype=dtype), forget=0.9)
        twin = rk.SquareRootState(PRIORS[kind](), dtype=dtype)
        twin.load_state_dict(snapshot(state))
        assert same(twin.state_dict(), state.state_dict())
        assert twin._form.trace == pytest.approx(float(state.factor.double().square().sum()), rel=1e-5)
