"""CovarianceState: forms and their choice, low rank and dense, guarantees after an error, saving."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support import builders
from support.bits import same
from support.tolerances import relative_error

import rlsedit_kernels as rk
from rlsedit_kernels.states import batch as batches
from rlsedit_kernels.states import choice


def anchor(d: int = 40, condition: float = 100.0, seed: int = 0, largest: float = 1.0) -> rk.Prior:
    return rk.Prior.anchor(builders.spd(d, condition, np.random.default_rng(seed), largest))


def keys(u: int, d: int = 40, seed: int = 1, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return builders.tensor(builders.keys(u, d, np.random.default_rng(seed)) * scale, dtype)


def snapshot(state: rk.CovarianceState) -> dict:
    return copy.deepcopy(state.state_dict())


class TestForms:
    def test_auto_takes_plain_where_rho_is_small(self) -> None:
        state = rk.CovarianceState(anchor())
        assert state.form == "undecided"
        state.commit(keys(5, scale=0.1))
        assert state.form == "plain"
        assert "rho" in state.health().reason

    def test_auto_takes_whitened_where_rho_is_large(self) -> None:
        state = rk.CovarianceState(anchor(condition=1e6))
        state.commit(keys(5, scale=0.03))
        assert state.form == "whitened"
        assert "rho" in state.health().reason

    def test_auto_takes_whitened_where_the_prior_is_ill_conditioned(self) -> None:
        state = rk.CovarianceState(anchor(condition=1e6, largest=1e6))
        state.commit(keys(5, scale=0.01))
        assert state.form == "whitened"
        assert "condition" in state.health().reason

    def test_auto_keeps_a_weak_prior_in_float64(self) -> None:
        state = rk.CovarianceState(rk.Prior.ridge(40, 0.003))
        gain = state.update(keys(5))
        health = state.health()
        assert gain.dtype == torch.float32
        assert (health.dtype, health.storage) == ("torch.float32", "torch.float64")
        assert "no float32 covariance would hold" in health.reason

    def test_auto_takes_plain_in_float64(self) -> None:
        state = rk.CovarianceState(anchor(condition=1e6), dtype=torch.float64)
        state.commit(keys(5))
        assert state.form == "plain"

    def test_auto_takes_whitened_for_a_ridge_and_a_small_null_space(self) -> None:
        ridge = rk.CovarianceState(rk.Prior.ridge(40, 1.0))
        ridge.commit(keys(3))
        Q = builders.orthogonal(40, np.random.default_rng(0))[:, :10]
        space = rk.CovarianceState(rk.Prior.null_space(Q, 100.0), dtype=torch.float64)
        space.commit(keys(3))
        assert (ridge.form, space.form) == ("whitened", "whitened")

    def test_auto_moves_when_larger_keys_come_and_loses_nothing(self) -> None:
        prior = anchor()
        state, whitened = rk.CovarianceState(prior), rk.CovarianceState(prior, form="whitened")
        small, large = [keys(4, seed=s, scale=0.1) for s in range(5)], keys(4, seed=9, scale=3.0)
        for K in small:
            state.commit(K)
            whitened.commit(K)
        assert state.form == "plain"
        gain = state.update(large)
        assert state.form == "inverse_root"
        assert "moved from plain float32 after 5 batches" in state.health().reason
        assert relative_error(gain, whitened.update(large)) < 1e-4
        assert relative_error(state.covariance(), whitened.covariance()) < 1e-4

    @pytest.mark.parametrize("noise", [1e-2, 1e-4, 1e-6, 1e-8, 1e4])
    def test_auto_takes_the_form_of_the_same_batches_without_noise(self, noise) -> None:
        """K at noise nu and K / sqrt(nu) at noise 1 are the same rows of the problem."""
        prior = rk.Prior.ridge(40, 1.0)
        state, scaled, again, scaled_again = (rk.CovarianceState(prior) for _ in range(4))
        exact = rk.CovarianceState(prior, form="plain", dtype=torch.float64)
        batches = [keys(8, seed=s) for s in range(40)]
        for K in batches:
            gain = state.update(K, noise)
            scaled.update(K / noise**0.5)
            truth = exact.update(K.double(), noise)
        again.refactor((K, noise) for K in batches)
        scaled_again.refactor((K / noise**0.5, 1.0) for K in batches)
        for one, other in ((state, scaled), (again, scaled_again)):
            assert (one.form, one.health().storage) == (other.form, other.health().storage)
            assert one.health().rho == pytest.approx(other.health().rho)
        assert state.health().status == "ok"
        assert relative_error(gain, truth) < 1e-4

    def test_choice_follows_the_cost_where_all_is_safe(self) -> None:
        factor = anchor().factor
        assert choice.choose(factor, torch.float64, 1.0).form == "plain"
        assert choice.flops("plain", factor, 0, True) < choice.flops("whitened", factor, 0, True)

    @pytest.mark.parametrize("kind", ["ridge", "anchor", "null_space"])
    def test_the_switch_from_columns_to_a_matrix_is_invisible(self, kind, dtype, backend) -> None:
        rng = np.random.default_rng(5)
        prior = {
            "ridge": rk.Prior.ridge(64, 0.8),
            "anchor": anchor(64, 1e3),
            "null_space": rk.Prior.null_space(builders.orthogonal(64, rng)[:, :50], 2.0),
        }[kind]
        state, plain = (
            rk.CovarianceState(prior, form="whitened", dtype=dtype),
            rk.CovarianceState(prior, form="plain", dtype=dtype),
        )
        seen = []
        for s in range(12):
            K = keys(7, 64, seed=s, dtype=dtype)
            assert relative_error(state.update(K), plain.update(K)) < 1e3 * torch.finfo(dtype).eps * 100
            seen.append((state.health().dense, state.health().columns))
        assert seen[0] == (False, 7)
        assert seen[-1][0]
        assert [dense for dense, _ in seen] == sorted(dense for dense, _ in seen)
        assert relative_error(state.covariance(), plain.covariance()) < 1e3 * torch.finfo(dtype).eps * 100

    def test_columns_survive_forgetting_removal_and_many_chunks(self) -> None:
        prior = rk.Prior.ridge(900, 1.0)
        state = rk.CovarianceState(prior, dtype=torch.float64)
        written = []
        for s in range(4):
            K = keys(90, 900, seed=s, dtype=torch.float64)
            state.commit(K, 0.5, 0.97)
            written.append((K, None, 0.5))
        assert not state.health().dense
        assert relative_error(state.covariance(), rk.reference.batch_covariance(prior, written, 0.97)) < 1e-10
        K = written[-1][0]
        state.remove(K, 0.5)
        S = rk.reference.batch_precision(prior, written, 0.97) - (K.mT @ K).numpy() / 0.5
        assert not state.health().dense
        assert relative_error(state.covariance(), np.linalg.inv(S)) < 1e-10

    def test_no_matrix_is_kept_for_a_ridge_with_few_edits(self) -> None:
        state = rk.CovarianceState(rk.Prior.ridge(20_000, 1.0))  # d x d would be 1.6 GB
        state.commit(torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0)))
        assert state.health().columns == 3
        assert state.gain(torch.ones(1, 20_000)).shape == (20_000, 1)


class TestCare:
    """Batches that tell far more than was known are worked out in float64."""

    @pytest.mark.parametrize("form", ["plain", "whitened", "inverse_root"])
    def test_a_weak_prior_keeps_its_digits(self, form) -> None:
        prior = rk.Prior.ridge(60, 0.01)
        rng = np.random.default_rng(0)
        state = rk.CovarianceState(prior, form=form)
        written = []
        for _ in range(8):
            K = builders.tensor(builders.keys(80, 60, rng), torch.float32)
            state.commit(K)
            written.append((K, None, 1.0))
        assert state.health().careful_steps >= 1
        assert relative_error(state.covariance(), rk.reference.batch_covariance(prior, written)) < 1e-5

    def test_without_care_the_digits_would_be_lost(self, monkeypatch) -> None:
        """The test above can fail: the same stream without the careful step."""
        monkeypatch.setattr(batches, "CAREFUL_FROM", float("inf"))
        prior = rk.Prior.ridge(60, 0.01)
        rng = np.random.default_rng(0)
        state = rk.CovarianceState(prior, form="plain")
        K = builders.tensor(builders.keys(80, 60, rng), torch.float32)
        try:
            state.commit(K)
        except rk.BreakdownError:
            return
        assert relative_error(state.covariance(), rk.reference.batch_covariance(prior, [(K, None, 1.0)])) > 1e-4

    def test_ordinary_batches_do_not_pay(self) -> None:
        state = rk.CovarianceState(anchor(), form="whitened")
        for s in range(5):
            state.commit(keys(4, seed=s))
        assert state.health().careful_steps == 0


class TestGuarantees:
    @pytest.fixture(params=["plain", "whitened", "inverse_root"])
    def state(self, request) -> rk.CovarianceState:
        state = rk.CovarianceState(anchor(), form=request.param)
        state.commit(keys(6))
        return state

    @pytest.mark.parametrize("method", ["gain", "commit", "update", "remove"])
    @pytest.mark.parametrize(
        ("K", "kwargs", "error", "message"),
        [
            (torch.ones(2, 39), {}, ValueError, r"K must have shape \(u, d\) with u >= 1 and d = 40, got \(2, 39\)"),
            (torch.ones(40), {}, ValueError, r"K must have shape"),
            (torch.ones(0, 40), {}, ValueError, r"u >= 1"),
            (torch.ones(2, 40, dtype=torch.int64), {}, TypeError, r"K must be floating point, got torch.int64"),
            ([[1.0] * 40], {}, TypeError, r"K must be a torch.Tensor, got list"),
            (torch.full((2, 40), float("nan")), {}, ValueError, r"K must be finite"),
            (torch.full((2, 40), float("inf")), {}, ValueError, r"K must be finite"),
            (torch.ones(2, 40, device="meta"), {}, ValueError, r"K must be on the device of the state, cpu, got meta"),
            (torch.ones(2, 40), {"noise": -1.0}, ValueError, r"noise must be finite and >= 0, got -1.0"),
            (torch.ones(2, 40), {"noise": float("nan")}, ValueError, r"noise must be finite"),
            (torch.ones(2, 40), {"noise": None}, TypeError, r"noise must be a Python number"),
        ],
    )
    def test_bad_input_changes_nothing(self, state, method, K, kwargs, error, message) -> None:
        before = snapshot(state)
        with pytest.raises(error, match=message):
            getattr(state, method)(K, **kwargs)
        assert same(snapshot(state), before)

    @pytest.mark.parametrize("forget", [0.0, -1.0, 1.1, float("nan")])
    def test_bad_forget_changes_nothing(self, state, forget) -> None:
        before = snapshot(state)
        with pytest.raises(ValueError, match=r"forget must be in \(0, 1\]"):
            state.commit(keys(2), forget=forget)
        assert same(snapshot(state), before)

    def test_overflow_is_refused(self, state) -> None:
        before = snapshot(state)
        with pytest.raises(ValueError, match="overflow"):
            state.commit(torch.full((2, 40), 1e25))
        assert same(snapshot(state), before)

    def test_loss_of_definiteness_is_refused(self) -> None:
        state = rk.CovarianceState(anchor(), form="plain")
        state._form.C.sub_(2.0 * torch.eye(40) * state._form.C.diagonal().max())
        before = snapshot(state)
        with pytest.raises(rk.BreakdownError, match=r"nothing was written.*refactor"):
            state.commit(keys(6, scale=5.0))
        assert same(snapshot(state), before)

    def test_removal_of_what_was_never_written_is_refused(self, state) -> None:
        before = snapshot(state)
        with pytest.raises(rk.LeverageError, match=r"leverage.*refactor"):
            state.remove(keys(3, seed=77, scale=50.0))
        assert same(snapshot(state), before)

    def test_removal_of_the_only_knowledge_is_refused_and_refactoring_cures_it(self) -> None:
        prior = rk.Prior.ridge(10, 1e-4)
        state = rk.CovarianceState(prior)
        first, second = keys(4, 10, seed=1), keys(12, 10, seed=2)
        state.commit(first)
        state.commit(second)
        with pytest.raises(rk.LeverageError):
            state.remove(second)
        state.refactor([(first, 1.0)])
        assert state.steps == 1
        assert relative_error(state.covariance(), rk.reference.batch_covariance(prior, [(first, None)])) < 1e-5

    def test_a_hard_write_cannot_be_removed(self, state) -> None:
        with pytest.raises(ValueError, match=r"remove: noise must be > 0"):
            state.remove(keys(2), noise=0.0)

    @pytest.mark.parametrize(
        ("Q", "error", "message"),
        [
            (torch.ones(40, 2), ValueError, "columns of Q must be orthonormal"),
            (torch.ones(39, 2), ValueError, r"Q must have shape \(d, q\) with d = 40"),
            (torch.full((40, 1), float("nan")), ValueError, "orthonormal"),
            (3, TypeError, "Q must be a torch.Tensor"),
        ],
    )
    def test_bad_restriction_changes_nothing(self, state, Q, error, message) -> None:
        before = snapshot(state)
        with pytest.raises(error, match=message):
            state.restrict(Q)
        assert same(snapshot(state), before)

    def test_a_prepared_batch_is_written_once_and_in_its_own_state(self, state) -> None:
        prepared = state.prepare(keys(3, seed=5))
        state.write(prepared)
        with pytest.raises(ValueError, match="state has changed"):
            state.write(prepared)

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"form": "qr"}, ValueError, "form must be one of"),
            ({"dtype": torch.float16}, TypeError, "dtype must be torch.float32 or torch.float64"),
            ({"prior": torch.eye(3)}, TypeError, "prior must be a Prior, got Tensor"),
            ({"device": "abacus"}, ValueError, "device must be cpu, cuda, .* got 'abacus'"),
            ({"device": "cuda:99"}, ValueError, "device must be cpu, cuda, .* got 'cuda:99'"),
            ({"device": 3.0}, TypeError, "device must be a torch.device, a name or None, got float"),
        ],
    )
    def test_wrong_construction(self, kwargs, error, message) -> None:
        arguments = {"prior": anchor(), **kwargs}
        with pytest.raises(error, match=message):
            rk.CovarianceState(arguments.pop("prior"), **arguments)


class TestHealth:
    def test_a_fresh_and_a_used_state_are_well(self, dtype) -> None:
        state = rk.CovarianceState(anchor(), dtype=dtype)
        assert state.health().ok
        for s in range(10):
            state.commit(keys(5, seed=s, dtype=dtype), 0.5, 0.99)
        state.remove(keys(5, seed=9, dtype=dtype), 0.5)
        health = state.health()
        assert health.status == "ok"
        assert health.steps == 9
        assert health.smallest_pivot is not None
        assert health.smallest_pivot > 0.999
        assert health.drift < 1e3 * torch.finfo(dtype).eps * 100
        assert 0.0 < health.largest_leverage < 1.0
        assert health.as_dict()["form"] == state.form

    @pytest.mark.parametrize("form", ["plain", "whitened", "inverse_root"])
    def test_drift_sees_a_damaged_state(self, form) -> None:
        state = rk.CovarianceState(anchor(), form=form, dtype=torch.float64)
        for s in range(12):
            state.commit(keys(5, seed=s, dtype=torch.float64))
        assert state.health().drift < 1e-9
        matrix = {"plain": "C", "whitened": "matrix", "inverse_root": "A"}[form]
        power = 0.5 if form == "inverse_root" else 1.0  # of a root, C is the square
        getattr(state._form, matrix).mul_(1.01**power)
        assert state.health().drift == pytest.approx(0.01, rel=1e-3)
        assert state.health().status == "warning"
        getattr(state._form, matrix).mul_(2.0**power)
        assert state.health().status == "broken"
        assert not state.health().ok

    @pytest.mark.parametrize("form", ["plain", "whitened", "inverse_root"])
    def test_drift_goes_on_after_a_hard_write_and_a_restriction(self, form) -> None:
        state = rk.CovarianceState(anchor(), form=form, dtype=torch.float64)
        state.commit(keys(3, dtype=torch.float64), noise=0.0)
        state.restrict(torch.eye(40, dtype=torch.float64)[:, :2])
        state.commit(keys(5, seed=4, dtype=torch.float64))
        assert state.health().drift < 1e-9

    @pytest.mark.parametrize("form", ["plain", "whitened", "inverse_root"])
    def test_probes_that_a_hard_write_puts_off_are_the_same_whenever_they_are_made(self, form) -> None:
        one, other = (rk.CovarianceState(anchor(), form=form) for _ in range(2))
        for seed, noise in enumerate((0.0, 0.0, 2.0, 0.0)):
            for state in (one, other):
                state.commit(keys(2, seed=seed), noise=noise)
            one.health()
            twin = other.clone()
            other.commit(keys(1, seed=9))  # what the twin shares with it until then stays what it was
            assert same(snapshot(one), snapshot(twin))
            other = twin
        for state in (one, other):
            state.remove(keys(2, seed=2), noise=2.0)
        assert same(snapshot(one), snapshot(other))

    def test_a_singular_moment_is_lifted_and_said(self) -> None:
        rng = np.random.default_rng(0)
        K = rng.standard_normal((15, 40))
        state = rk.CovarianceState(rk.Prior.anchor(K.T @ K))
        health = state.health()
        assert health.lifted == 25
        assert health.status == "warning"
        assert any("lifted" in message and "lam > 0" in message for message in health.messages)
        gain = state.update(keys(4))
        assert bool(torch.isfinite(gain).all())
        assert state.health().storage == "torch.float64"

    def test_a_condition_of_1e10_is_kept_safe_and_said(self) -> None:
        prior = anchor(condition=1e10)
        state = rk.CovarianceState(prior)
        written = []
        for s in range(20):
            K = keys(4, seed=s)
            state.commit(K)
            written.append((K, None))
        health = state.health()
        assert health.storage == "torch.float64"
        assert health.lifted == 0
        assert health.condition == pytest.approx(1e10, rel=1e-3)
        assert any("ill-conditioned" in message for message in health.messages)
        K = keys(4, seed=99)
        expected = rk.reference.batch_covariance(prior, [*written, (K, None)]) @ K.double().mT.numpy()
        assert relative_error(state.gain(K), expected) < 1e-4


class TestSaving:
    @pytest.mark.parametrize("form", ["plain", "whitened", "inverse_root", "auto"])
    @pytest.mark.parametrize("steps", [0, 3, 20])
    def test_a_restored_state_goes_on_to_the_same_bits(self, form, steps) -> None:
        prior = anchor(condition=1e5)
        state = rk.CovarianceState(prior, form=form)
        for s in range(steps):
            state.commit(keys(3, seed=s), 0.7)
        twin = rk.CovarianceState(prior, form="auto")
        twin.load_state_dict(state.state_dict())
        for s in range(40, 44):
            assert torch.equal(state.update(keys(3, seed=s)), twin.update(keys(3, seed=s)))
        assert torch.equal(state.covariance(), twin.covariance())
        assert state.health() == twin.health()

    def test_it_survives_torch_save(self, tmp_path) -> None:
        state = rk.CovarianceState(anchor(), form="whitened")
        state.commit(keys(3))
        torch.save(state.state_dict(), tmp_path / "state.pt")
        twin = rk.CovarianceState(anchor())
        twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(state.covariance(), twin.covariance())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.update(version=99), "version must be 1, got 99"),
            (lambda s: s.update(dtype="torch.float64"), "saved state is torch.float64"),
            (lambda s: s["prior"].update(lam=3.0), "another prior"),
            (lambda s: s.pop("probes"), "lacks probes"),
            (lambda s: s["tensors"].update(C=torch.eye(39)), r"C must be torch.float32 of shape \(40, 40\)"),
            (lambda s: s["tensors"]["C"].fill_(float("nan")), "C must be finite"),
            (lambda s: s.update(form="qr"), "unknown form 'qr'"),
            (lambda s: s.update(storage="torch.float16"), "storage must be torch.float32 or torch.float64, got 'torch"),
        ],
    )
    def test_a_wrong_file_is_refused_and_changes_nothing(self, change, message) -> None:
        state = rk.CovarianceState(anchor(), form="plain")
        state.commit(keys(3))
        before, saved = snapshot(state), snapshot(state)
        change(saved)
        with pytest.raises(ValueError, match=message):
            state.load_state_dict(saved)
        assert same(snapshot(state), before)

    @pytest.mark.parametrize("form", ["plain", "whitened", "inverse_root"])
    def test_clone_and_to_are_independent(self, form) -> None:
        state = rk.CovarianceState(anchor(), form=form)
        state.commit(keys(3))
        before = state.covariance()
        twin, wide = state.clone(), state.to(dtype=torch.float64)
        twin.commit(keys(3, seed=8))
        wide.commit(keys(3, seed=8))
        assert torch.equal(state.covariance(), before)
        assert wide.covariance().dtype == torch.float64
        assert relative_error(wide.covariance(), twin.covariance()) < 1e-5
        assert "CovarianceState" in repr(state)


@pytest.mark.parametrize("form", ["plain", "whitened", "inverse_root"])
def test_a_state_in_another_dtype_is_saved_and_read_to_the_bit(form) -> None:
    """The copy went on with the prior's root as it had been rounded to float32, what was read with the exact one."""
    S = torch.diag(torch.logspace(0, 6, 40, dtype=torch.float64))
    state = rk.CovarianceState(rk.Prior.precision(S), form=form)
    state.commit(keys(3))
    state.restrict(torch.eye(40)[:, 1:3])
    state.commit(keys(2, seed=1), noise=0.0)
    wide = state.to(dtype=torch.float64)
    loaded = rk.CovarianceState(state.prior, form=form, dtype=torch.float64)
    loaded.load_state_dict(wide.state_dict())
    for i in range(2, 6):
        K = keys(3, seed=i).double()
        assert torch.equal(loaded.update(K), wide.update(K))
    assert torch.equal(loaded.covariance(), wide.covariance())
    assert float(wide.covariance()[:, 1:3].abs().max()) < 1e-6 * float(wide.covariance().abs().max())


def test_checked_keys_of_another_layer_are_refused() -> None:
    """A state passes keys on that were checked already; those of a layer of another width are not its own."""
    wide = rk.CovarianceState(rk.Prior.ridge(8, 1.0), form="plain")
    narrow = rk.CovarianceState(rk.Prior.ridge(6, 1.0), form="plain")
    checked = wide.prepare(torch.ones(2, 8)).keys
    with pytest.raises(ValueError, match=r"K must have shape \(u, d\) with u >= 1 and d = 6, got \(2, 8\)"):
        narrow.update(checked)


@pytest.mark.parametrize("kind", [rk.CovarianceState, rk.SquareRootState])
@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([torch.ones(2, 6)], r"batches must be pairs \(K, noise\), got a Tensor"),  # two rows would unpack
        ([(torch.ones(2, 6),)], r"batches must be pairs \(K, noise\), got a tuple of 1"),
        ([(torch.ones(2, 6), torch.ones(2, 3), 1.0)], r"batches must be pairs \(K, noise\), got a tuple of 3"),
        (None, r"batches must be an iterable of pairs \(K, noise\), got NoneType"),
    ],
)
def test_what_a_state_is_rebuilt_from_is_named(kind, written, message) -> None:
    state = kind(rk.Prior.ridge(6, 1.0))
    state.commit(torch.eye(6))
    before = state.precision()
    with pytest.raises(TypeError, match=f"refactor: {message}"):
        state.refactor(written)
    assert torch.equal(state.precision(), before)


def test_what_a_filter_is_rebuilt_from_is_named() -> None:
    rls = rk.RLSFilter(torch.zeros(6, 3), rk.Prior.ridge(6, 1.0), layout="in_out")
    with pytest.raises(TypeError, match=r"refactor: batches must be triples \(K, V, noise\), got a tuple of 2"):
        rls.refactor([(torch.ones(2, 6), 1.0)])
