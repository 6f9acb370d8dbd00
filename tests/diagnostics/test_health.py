"""health() against the truth: it speaks before W is off, is silent where W is right, and what it recommends cures."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels.diagnostics import (
    HEALTHY,
    STREAMS,
    Truth,
    checkpoints,
    filter_step,
    make_steps,
    make_stream,
    measures,
    run_trials,
)
from rlsedit_kernels.states import triangular
from rlsedit_kernels.states.guard import EVERY

D, U, BATCHES = 32, 8, 64
OURS = ("plain", "whitened", "inverse-root", "square-root", "guarded")


@pytest.mark.parametrize("name", STREAMS)
def test_it_speaks_in_time_and_not_without_reason(name) -> None:
    """The bands of docs/stability.md, on every stream; and a guarded filter breaks nowhere but where W itself does."""
    steps = make_steps(OURS, published=False)
    for trial in run_trials(make_stream(name, D, U), steps, BATCHES, at=checkpoints(BATCHES, 5)):
        assert trial.warned_in_time is not False, trial.step
        assert not trial.false_alarm, trial.step
        if trial.step == "guarded":
            assert trial.refused_at is None
            assert trial.broke_at is None or name == "condition-1e12"


def test_a_stream_that_goes_bad_late_is_flagged_before() -> None:
    """Repeated keys under a form that is left alone: right for a hundred batches, useless after five hundred."""
    (trial,) = run_trials(make_stream("repeated", D, U), {"plain": filter_step("plain")}, 800)
    assert trial.broke_at is not None
    assert trial.broke_at > 100
    assert trial.warned_in_time
    assert trial.points[10].status == "ok"
    assert trial.points[-1].status == "broken"


def test_the_guard_keeps_the_same_stream() -> None:
    (trial,) = run_trials(make_stream("repeated", D, U), {"guarded": filter_step("guarded")}, 800)
    assert trial.worst < 5e-3
    assert trial.points[-1].error_W < 1e-3
    assert trial.points[-1].form == "inverse_root float64"


def hard_state(**arguments) -> tuple[rk.RLSFilter, Truth, list]:
    """A stream that the plain form does not hold."""
    stream = make_stream("weak-0.01", D, U)
    rls = rk.RLSFilter(stream.W_0, stream.prior, layout="in_out", guard="off", **arguments)
    truth, batches = Truth(stream), list(islice(stream.batches(), 40))
    for batch in batches:
        rls.update(batch.K, batch.V)
        truth.add(batch)
    return rls, truth, batches


class TestCures:
    def test_refactor(self) -> None:
        rls, truth, batches = hard_state(form="plain")
        before = rls.health()
        assert before.status != "ok"
        assert any("refactor" in message for message in before.messages)
        assert measures.weight_errors(rls.weight, truth.now())[0] > 1e-3
        rls.refactor([(b.K, b.V, b.noise) for b in batches])
        after = rls.health()
        assert measures.weight_errors(rls.weight, truth.now())[0] < HEALTHY
        assert after.drift < before.drift / 10

    @pytest.mark.parametrize("arguments", [{"form": "inverse_root"}, {"form": "plain", "dtype": torch.float64}, {}])
    def test_another_form_or_float64(self, arguments) -> None:
        before = hard_state(form="plain")[0].health()
        assert any("form='inverse_root' or float64" in message for message in before.messages)
        rls, truth, _ = hard_state(**arguments)
        assert measures.weight_errors(rls.weight, truth.now())[0] < HEALTHY
        assert rls.health().status == "ok"

    def test_a_wider_weight_or_the_carried_solution(self) -> None:
        stream = make_stream("condition-1e10", D, U)
        errors = {}
        for name, arguments in {
            "gain": {},
            "float64": {"dtype": torch.float64},
            "carried": {"state": "square_root"},
        }.items():
            rls, truth = rk.RLSFilter(stream.W_0, stream.prior, layout="in_out", **arguments), Truth(stream)
            for batch in islice(stream.batches(), 40):
                rls.update(batch.K, batch.V)
                truth.add(batch)
            errors[name] = measures.weight_errors(rls.weight, truth.now())[0]
            if name == "gain":
                assert any("float64" in message for message in rls.health().messages)
            if name == "float64":
                assert rls.health().status == "ok"
        assert errors["gain"] > HEALTHY
        assert errors["float64"] < 1e-5
        assert errors["carried"] < errors["gain"]


class TestWeight:
    @pytest.mark.parametrize("track_bounds", [True, False])
    def test_rounding_is_estimated(self, track_bounds) -> None:
        """Within a factor of six of what a float32 weight really loses on an exact state, with and without W_0."""
        for name in ("easy", "condition-1e4", "condition-1e8", "consistent", "weak-1"):
            stream = make_stream(name, D, U)
            rls, truth = (
                rk.RLSFilter(
                    stream.W_0, stream.prior, "square_root", layout="in_out", solution="gain", track_bounds=track_bounds
                ),
                Truth(stream),
            )
            for batch in islice(stream.batches(), 100):
                rls.update(batch.K, batch.V)
                truth.add(batch)
            estimate, error = rls.health().weight_error, measures.weight_errors(rls.weight, truth.now())[0]
            assert estimate is not None
            assert error / 6 < estimate < 6 * error, name

    def test_a_change_that_is_lost_in_rounding_is_not_taken_for_none(self) -> None:
        """The weight is off by more than it should move, so that J, which knows its errors, exceeds |V - K W_0|^2."""
        stream, W_0 = (
            make_stream("easy", 24, 4, 3),
            100.0 * torch.randn(24, 3, generator=torch.Generator().manual_seed(5)),
        )
        rls = rk.RLSFilter(W_0, rk.Prior.ridge(24, 1.0), layout="in_out")
        for batch in islice(stream.batches(), 200):
            rls.update(batch.K, (batch.K.double() @ W_0.double() + 1e-3 * batch.V).float())
        assert rls.health().status == "warning"

    @pytest.mark.parametrize("size", [0.0, 1e-20])
    def test_keys_that_tell_nothing_are_no_error(self, size) -> None:
        stream = make_stream("easy", 24, 4, 3)
        rls = rk.RLSFilter(torch.full((24, 3), 100.0), rk.Prior.ridge(24, 1.0), layout="in_out")
        for batch in islice(stream.batches(), 5):
            rls.update(batch.K * size, batch.V)
        assert rls.health().status == "ok"

    @pytest.mark.parametrize("track_bounds", [True, False])
    def test_a_large_first_weight_is_seen(self, track_bounds) -> None:
        """A model's weight beside a small change of it: the state is perfect, the change is lost in rounding."""
        stream = make_stream("weak-1", D, U)
        W_0 = 3e4 * torch.randn(D, 4, generator=torch.Generator().manual_seed(0))
        rls = rk.RLSFilter(W_0, stream.prior, layout="in_out", track_bounds=track_bounds)
        for batch in islice(stream.batches(), 60):
            V = (batch.K.double() @ W_0.double() + batch.V).float()
            rls.update(batch.K, V)
        found = rls.health()
        assert rls.state.health().status == "ok"
        assert found.status == "warning"
        assert any("rounding to torch.float32 costs the weight" in message for message in found.messages)
        assert found.weight_error is not None
        assert found.weight_error > 1e-3

    @pytest.mark.parametrize("state", ["covariance", "square_root"])
    def test_without_bounds_a_batch_taken_back_is_none(self, state) -> None:
        stream = make_stream("weak-1", D, U)
        rls = rk.RLSFilter(stream.W_0, stream.prior, state, layout="in_out", track_bounds=False)
        first, second = islice(stream.batches(), 2)
        rls.update(first.K, first.V, 1e3)
        alone = rls.health().weight_error
        rls.update(second.K, second.V, 1e3)
        rls.remove(second.K, second.V, 1e3)
        assert rls.health().weight_error == pytest.approx(alone, rel=1.0)
        rls.remove(first.K, first.V, 1e3)
        assert rls.health().weight_error is None

    @pytest.mark.parametrize("lam", [1e-3, 1e-2, 1e-1])
    @pytest.mark.parametrize("apart", [1e-6, 1e-4])
    def test_what_conflicts_cost_a_carried_solution_is_estimated(self, lam, apart) -> None:
        """Keys parallel but for `apart` with other targets each time: "ok" until W was off by several per cent."""
        randn, d, warned = torch.randn, 32, False
        base = randn(1, d, generator=torch.Generator().manual_seed(3))
        rls = rk.RLSFilter(torch.zeros(d, 3), rk.Prior.ridge(d, lam), "square_root", layout="in_out", guard="off")
        rows = [lam * torch.eye(d, dtype=torch.float64), torch.zeros(0, d, dtype=torch.float64)]
        sides = [torch.zeros(d, 3, dtype=torch.float64)]
        for step in range(300):
            generator = torch.Generator().manual_seed(100 + step)
            K, V = base + apart * randn(4, d, generator=generator), randn(4, 3, generator=generator)
            rls.update(K, V)
            rows.append(K.double())
            sides.append(V.double())
            if step not in (4, 16, 40, 100, 299):
                continue
            A, B = torch.cat(rows), torch.cat(sides)
            order = A.norm(dim=1).argsort(descending=True)
            Q, R = torch.linalg.qr(A[order])
            true = torch.linalg.solve_triangular(R, Q.mT @ B[order], upper=True)
            error = float((R @ (rls.weight.double() - true)).norm() / (R @ true).norm())
            found = rls.health()
            assert found.weight_error is not None
            assert error / 4 < found.weight_error < 4 * error
            warned = warned or found.status == "warning"
            assert warned or error < 3e-3
        assert warned or lam == 0.1

    def test_extremes_of_a_factor(self) -> None:
        """Within a factor of two, from below."""
        for condition in (1.0, 1e3, 1e6):
            U = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(1)).double())[0]
            R = triangular.factor_of((U * torch.logspace(0, -1, 60, base=condition).double()) @ U.mT)
            largest, inverse = triangular.extremes(R)
            values = torch.linalg.svdvals(R)
            assert 0.5 * float(values[0]) < largest < 1.001 * float(values[0])
            assert 0.5 / float(values[-1]) < inverse < 1.001 / float(values[-1])

    def test_health_of_a_filter_that_knows_too_little_is_told(self) -> None:
        """It ended in an UnderdeterminedError."""
        rls = rk.RLSFilter(torch.ones(8, 2), rk.Prior.ridge(8, 0.0), "square_root", layout="in_out")
        rls.update(torch.eye(8)[:3], torch.ones(3, 2))
        found = rls.health()
        assert found.status == "warning"
        assert any("3 of 8 directions are known" in message for message in found.messages)
        assert found.weight_error is None


class TestThorough:
    @pytest.mark.parametrize("form", ["plain", "whitened", "inverse_root", "square_root"])
    def test_it_takes_the_state_apart(self, form) -> None:
        stream = make_stream("condition-1e6", D, U)
        state = (
            rk.SquareRootState(stream.prior) if form == "square_root" else rk.CovarianceState(stream.prior, form=form)
        )
        for batch in islice(stream.batches(), 20):
            state.update(batch.K)
        quick, found = state.health(), state.health(thorough=True)
        assert quick.error is None
        assert found.status == quick.status == "ok"
        assert found.smallest_eigenvalue is not None
        assert 0.0 < found.smallest_eigenvalue < found.largest_eigenvalue < 1.01
        assert found.asymmetry < 1e-6
        assert found.error < 1e-2

    def test_its_error_is_that_of_the_state(self) -> None:
        state = rk.CovarianceState(rk.Prior.ridge(D, 3.0), form="plain", guard="off")
        for batch in islice(make_stream("weak-1", D, U).batches(), 20):
            state.update(batch.K)
        state._form.C *= 1.05
        found = state.health(thorough=True)
        assert found.error == pytest.approx(0.05, rel=0.1)
        assert found.status == "warning"
        values, vectors = torch.linalg.eigh(state._form.C)
        state._form.C -= 3.0 * values[0] * torch.outer(vectors[:, 0], vectors[:, 0])
        found = state.health(thorough=True)
        assert found.smallest_eigenvalue < 0.0
        assert found.error == math.inf
        assert found.status == "broken"
        assert any("not positive definite" in message for message in found.messages)

    def test_before_the_first_keys(self) -> None:
        assert rk.CovarianceState(rk.Prior.ridge(D, 3.0)).health(thorough=True).error == pytest.approx(0.0, abs=1e-12)


def test_an_ill_conditioned_prior_is_fine_in_float64() -> None:
    prior = make_stream("condition-1e10", D, U).prior
    assert rk.CovarianceState(prior, dtype=torch.float64).health().status == "ok"
    assert rk.CovarianceState(prior).health().status == "warning"


def test_a_drift_that_has_passed_is_remembered() -> None:
    stream = make_stream("easy", D, U)
    state = rk.CovarianceState(stream.prior, form="plain")
    batches = list(islice(stream.batches(), EVERY + 1))
    for batch in batches[:16]:
        state.update(batch.K)
    state._form.C *= 1.01
    state.update(batches[16].K)
    state._form.C /= 1.01
    found = state.health()
    assert found.drift < 3e-3
    assert found.worst_drift == pytest.approx(0.01, rel=0.05)
    assert found.status == "warning"
    assert any("in between" in message for message in found.messages)
    twin = rk.CovarianceState(stream.prior, form="plain")
    twin.load_state_dict(state.state_dict())
    assert twin.health() == found


@pytest.mark.parametrize("form", ["plain", "whitened"])
def test_taken_apart_an_indefinite_covariance_is_broken(form: str) -> None:
    """A few probes need not see one direction; the eigenvalues do."""
    prior = rk.Prior.precision(torch.diag(torch.linspace(1.0, 2.0, 32, dtype=torch.float64)))
    state = rk.CovarianceState(prior, form=form, guard="off")
    for seed in range(8):
        state.commit(torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)))
    kept = state._form.C if form == "plain" else state._form.matrix
    assert state.health(thorough=True).ok
    values, vectors = torch.linalg.eigh(kept)
    kept -= 1.001 * values[0] * vectors[:, :1] * vectors[:, 0]
    health = state.health(thorough=True)
    assert health.status == "broken"
    assert any("it is not positive definite" in message for message in health.messages)
    assert health.smallest_eigenvalue < 0.0
