"""guard="auto": a state repairs itself or refuses, and what it refuses leaves no trace."""

from __future__ import annotations

import contextlib
import copy
from itertools import islice

import pytest
import torch
from support.bits import same

import rlsedit_kernels as rk
from rlsedit_kernels.diagnostics import Truth, make_stream, measures
from rlsedit_kernels.states.guard import EVERY

D, U = 48, 8


def damaged(state: rk.CovarianceState | rk.SquareRootState, by: float) -> None:
    """An error of size `by` in what the state keeps."""
    form = state._form
    kept = next(A for A in (getattr(form, n, None) for n in ("C", "matrix", "A", "R")) if A is not None)
    kept *= 1.0 + by


def written(state, count: int, stream: str = "weak-1") -> list[tuple[torch.Tensor, float]]:
    batches = [(b.K, b.noise) for b in islice(make_stream(stream, D, U).batches(), count)]
    for K, noise in batches:
        state.update(K, noise)
    return batches


def snapshot(state) -> dict:
    return copy.deepcopy(state.state_dict())


def make(kind: str, **arguments):
    if kind == "square_root":
        return rk.SquareRootState(rk.Prior.ridge(D, 10.0), **arguments)
    return rk.CovarianceState(rk.Prior.ridge(D, 10.0), form=kind, **arguments)


KINDS = ("plain", "whitened", "inverse_root", "square_root")


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_state_refuses_and_nothing_changes(kind) -> None:
    state = make(kind)
    batches = written(state, 16)
    damaged(state, 0.5)
    before, K = snapshot(state), batches[0][0]
    for _ in range(2):
        with pytest.raises(rk.BreakdownError, match="broken: probes of C S have drifted"):
            state.update(K)
        assert same(snapshot(state), before)
    with pytest.raises(rk.BreakdownError):
        state.remove(K)
    assert same(snapshot(state), before)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_guard_it_goes_on(kind) -> None:
    state = make(kind, guard="off")
    K = written(state, 16)[0][0]
    damaged(state, 0.5)
    state.update(K)
    assert state.health().status == "broken"
    assert state.health().worst_drift == state.health().drift


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", [0.5, 4e-3])
def test_with_a_history_it_is_rebuilt(kind, by) -> None:
    kept: list[tuple[torch.Tensor, float]] = []
    state = make(kind, history=lambda: kept)
    kept += written(state, 16)
    damaged(state, by)
    K = next(make_stream("weak-1", D, U, seed=1).batches()).K
    state.update(K)
    health = state.health()
    assert health.repairs == 1
    assert health.status == "ok"
    assert state.steps == 17
    exact = make(kind, dtype=torch.float64)
    for keys in [*(k for k, _ in kept), K]:
        exact.update(keys)
    assert float((state.covariance().double() - exact.covariance()).norm() / exact.covariance().norm()) < 1e-5


def test_an_automatic_form_moves_before_there_is_damage() -> None:
    state = rk.CovarianceState(make_stream("wind-up", D, U).prior)
    batches = written(state, 16)
    assert state.form == "whitened"
    damaged(state, 1e-3)
    state.update(batches[0][0])
    health = state.health()
    assert (health.form, health.storage) != ("whitened", "torch.float32")
    assert "its probes have drifted by 1" in health.reason
    assert health.repairs == 1
    assert health.ok


def test_an_explicit_form_is_kept() -> None:
    state = make("plain")
    batches = written(state, 16)
    damaged(state, 5e-3)
    state.update(batches[0][0])
    assert (state.form, state.health().storage) == ("plain", "torch.float32")
    assert state.health().status == "warning"


def test_what_was_forgotten_or_forbidden_is_not_rebuilt() -> None:
    """A rebuild from batches would lose it."""
    for change in ({"forget": 0.99}, {"noise": 0.0}):
        state = rk.CovarianceState(rk.Prior.ridge(D, 10.0), form="plain", history=lambda: pytest.fail("rebuilt"))
        batches = written(state, 14)
        state.update(batches[0][0][:2], **change)
        state.update(batches[1][0])  # from here on there are probes again
        damaged(state, 0.5)
        with pytest.raises(rk.BreakdownError):
            state.update(batches[0][0])


@pytest.mark.parametrize("hard", [[], ["first"], ["last"]], ids=["alone", "after a hard write", "before one"])
def test_a_restriction_is_rebuilt_and_a_hard_write_is_not(hard) -> None:
    """The state knows the directions of the one alone."""
    kept: list[tuple[torch.Tensor, float]] = []
    state = make("plain", history=lambda: kept)
    if hard == ["first"]:
        state.commit(torch.ones(1, D), 0.0)
    state.restrict(torch.eye(D)[:, :2])
    if hard == ["last"]:
        state.commit(torch.ones(1, D), 0.0)
    kept += written(state, 16 - len(hard))
    state._form.form.C.mul_(1.5)
    with pytest.raises(rk.BreakdownError) if hard else contextlib.nullcontext():
        state.update(kept[0][0])
    assert state.health().repairs == (not hard)


def test_checks_are_rare(monkeypatch) -> None:
    state = make("plain")
    seen: list[int] = []
    measured = type(state._watch)._measured
    monkeypatch.setattr(type(state._watch), "_measured", lambda w, s: seen.append(s.steps) or measured(w, s))
    K = next(make_stream("easy", D, U).batches()).K * 1e-3
    for _ in range(3 * EVERY + 1):
        state.update(K)
    assert seen == [1, 2, 4, 8, 16, 32, 64, 128, 192]
    state.update(1e3 * K, noise=1e-4)  # worked out in float64: the batch after it is checked
    assert state.health().careful_steps == 1
    state.update(K)
    assert seen[-1] == 3 * EVERY + 2
    state.gain(K)
    state.gain(K)
    assert len(seen) == 10


def test_a_copy_guards_itself() -> None:
    state = make("plain")
    batches = written(state, 16)
    twin = state.clone()
    damaged(twin, 0.5)
    state.update(batches[0][0])
    with pytest.raises(rk.BreakdownError):
        twin.update(batches[0][0])


@pytest.mark.parametrize("form", ["whitened", "square_root"])
@pytest.mark.parametrize("guard", ["auto", "off"])
def test_another_form_has_the_same_guard(form, guard) -> None:
    state = make("plain", guard=guard)
    written(state, 4)
    twin = state.convert(form)
    assert twin._watch.guard == guard
    assert twin.history is None


@pytest.mark.parametrize("kind", ["covariance", "square_root"])
def test_bad_arguments(kind) -> None:
    make_state = rk.CovarianceState if kind == "covariance" else rk.SquareRootState
    with pytest.raises(ValueError, match="guard must be 'auto' or 'off', got 'on'"):
        make_state(rk.Prior.ridge(D, 1.0), guard="on")
    with pytest.raises(TypeError, match="history must be callable"):
        make_state(rk.Prior.ridge(D, 1.0), history=[])


class TestFilter:
    @pytest.mark.parametrize("state", ["covariance", "square_root"])
    @pytest.mark.parametrize("by", [0.5, 4e-3])
    def test_weight_and_state_are_rebuilt_together(self, state, by) -> None:
        stream, kept = make_stream("weak-1", D, U), []
        rls = rk.RLSFilter(stream.W_0, stream.prior, state, layout="in_out", history=lambda: kept)
        truth = Truth(stream)
        for count, batch in enumerate(islice(stream.batches(), 40), start=1):
            rls.update(batch.K, batch.V, batch.noise)
            kept.append((batch.K, batch.V, batch.noise))
            truth.add(batch)
            if count == 32:
                damaged(rls.state, by)
                rls._row_form().mul_(1.0 + by)
        assert rls.health().repairs == 1
        assert rls.health().status == "ok"
        assert measures.weight_errors(rls.weight, truth.now())[0] < 1e-4
        assert rls.objective == pytest.approx(truth.innovations - truth.now().norm(truth.now().shift) ** 2, rel=1e-3)

    @pytest.mark.parametrize("state", ["covariance", "square_root"])
    def test_a_refusal_leaves_the_weight(self, state) -> None:
        stream = make_stream("weak-1", D, U)
        rls = rk.RLSFilter(
            stream.W_0, stream.prior, state, layout="in_out", form="plain" if state == "covariance" else "auto"
        )
        batches = list(islice(stream.batches(), 17))
        for batch in batches[:16]:
            rls.update(batch.K, batch.V)
        before, objective = rls.weight.clone(), rls.objective
        damaged(rls.state, 0.5)
        with pytest.raises(rk.BreakdownError):
            rls.update(batches[16].K, batches[16].V)
        assert objective == rls.objective
        assert rls.state.steps == 16
        if state == "covariance":
            assert torch.equal(rls.weight, before)

    def test_history_needs_the_first_weight(self) -> None:
        W = torch.zeros(D, 2)
        with pytest.raises(ValueError, match="history needs W_0"):
            rk.RLSFilter(W, rk.Prior.ridge(D, 1.0), layout="in_out", track_bounds=False, history=lambda: [])
        with pytest.raises(TypeError, match="history must be callable"):
            rk.RLSFilter(W, rk.Prior.ridge(D, 1.0), layout="in_out", history=3)


def test_a_restored_state_is_checked_when_the_first_would_be(monkeypatch) -> None:
    """So that a stream that is resumed takes the same repairs, to the bit."""
    state = make("inverse_root")
    seen: list[tuple[int, int]] = []
    measured = type(state._watch)._measured
    monkeypatch.setattr(type(state._watch), "_measured", lambda w, s: seen.append((id(s), s.steps)) or measured(w, s))
    batches = list(islice(make_stream("easy", D, U).batches(), 30))
    for i, batch in enumerate(batches):
        state.update(batch.K, 1e-2 * 0.01 ** (i // 7) if i % 7 == 3 else 1.0)
        twin = make("inverse_root")
        twin.load_state_dict(state.state_dict())
        following = batches[(i + 1) % 30].K
        one, two = state.clone(), twin
        seen.clear()
        one.update(following)
        two.update(following)
        assert [steps for name, steps in seen if name == id(one)] == [steps for name, steps in seen if name == id(two)]
    assert state.health().careful_steps >= 4


@pytest.mark.parametrize("kind", ["plain", "square_root"])
def test_a_restored_state_is_rebuilt_when_the_first_would_be(kind) -> None:
    """A form that is kept by request may drift for a while once it has been rebuilt: a copy did not know of that."""
    kept: list[tuple[torch.Tensor, float]] = []
    state = make(kind, history=lambda: kept)
    kept += written(state, 16)
    damaged(state, 5e-3)
    state.update(*kept[0])
    kept.append(kept[0])
    assert state.health().repairs == 1
    loaded, twin = make(kind, history=lambda: kept), state.clone()
    loaded.load_state_dict(state.state_dict())
    twin.history = lambda: kept
    states, batches = (state, loaded, twin), kept[1:16]
    for one in states:
        for K, noise in batches:
            one.update(K, noise)
        damaged(one, 5e-3)
        one.update(*batches[0])  # batch 33 is looked at
    assert [one.health().repairs for one in states] == [1, 1, 1]
    for one in states[1:]:
        assert torch.equal(one.covariance(), state.covariance())


def test_an_earlier_state_that_is_loaded_is_rebuilt_as_in_a_new_one() -> None:
    kept: list[tuple[torch.Tensor, float]] = []
    state = make("plain", history=lambda: kept)
    kept += written(state, 8)
    saved = state.state_dict()
    for _ in range(2):
        state.load_state_dict(saved)
        damaged(state, 5e-3)
        state.update(*kept[0])
        assert state.health().repairs == 1


class TestBroken:
    """A state that was found broken goes on refusing until it is repaired, and says so."""

    @staticmethod
    def uses(state, K: torch.Tensor) -> list:
        uses = [lambda: state.gain(K), lambda: state.prepare(K), lambda: state.update(K), lambda: state.commit(K)]
        if isinstance(state, rk.SquareRootState):
            B = torch.zeros(state.rank, 2)
            uses.append(lambda: state.append_with(B, K, torch.zeros(len(K), 2)))
        return [*uses, lambda: state.remove(K)]

    def refuses(self, state, K: torch.Tensor) -> None:
        before = snapshot(state)
        for use in self.uses(state, K) * 2:
            with pytest.raises(rk.BreakdownError):
                use()
        assert same(snapshot(state), before)
        assert state.health().status == "broken"
        with pytest.raises(rk.BreakdownError):
            state.clone().gain(K)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("first", range(6))
    def test_whatever_found_it(self, kind, first) -> None:
        state = make(kind)
        K = written(state, 16)[0][0]
        damaged(state, 0.5)
        uses = self.uses(state, K)
        if first >= len(uses):
            pytest.skip("a triangular state has one more")
        with pytest.raises(rk.BreakdownError):
            uses[first]()
        self.refuses(state, K)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("cure", ["refactor", "load_state_dict", "take_covariance"])
    def test_until_it_is_repaired(self, kind, cure) -> None:
        state = make(kind)
        batches = written(state, 16)
        saved, C = state.state_dict(), state.covariance().double()
        damaged(state, 0.5)
        with pytest.raises(rk.BreakdownError):
            state.gain(batches[0][0])
        if cure == "refactor":
            state.refactor(batches)
        elif cure == "load_state_dict":
            state.load_state_dict(saved)
        elif kind == "square_root":
            pytest.skip("it takes no covariance")
        else:
            state.take_covariance(C, 1.0)
        assert state.health().status == "ok"
        state.update(batches[0][0])

    @pytest.mark.parametrize("how", ["commit", "append_with", "update"])
    def test_every_way_to_write_rows_is_checked(self, how) -> None:
        """Forgetting winds a few directions up until R is lost; found at the same batch however it is written."""
        state, B = rk.SquareRootState(rk.Prior.ridge(16, 1.0)), torch.zeros(16, 1)
        random = torch.Generator().manual_seed(0)
        basis = torch.randn(4, 16, generator=random)

        def write() -> None:
            K = torch.randn(2, 4, generator=random) @ basis
            if how == "append_with":
                state.append_with(B, K, torch.zeros(2, 1), forget=0.9)
            else:
                getattr(state, how)(K, forget=0.9)

        def follow() -> None:
            for _ in range(1000):
                write()

        with pytest.raises(rk.BreakdownError):
            follow()
        assert state.steps == 256
        assert state.health().status == "broken"
        with pytest.raises(rk.BreakdownError):
            state.gain(torch.randn(1, 16))

    def test_an_indefinite_covariance_is_not_forgotten(self) -> None:
        """Found by a batch and not by a check: other keys may see nothing of it."""
        state = make("plain")
        K = written(state, 3)[0][0]
        v = torch.eye(D)[0]
        state._form.C -= 2.0 * float(state._form.C[0, 0]) * v[:, None] * v
        with pytest.raises(rk.BreakdownError, match="negative eigenvalue"):
            state.gain(v[None])
        other = torch.eye(D)[1:2]
        with pytest.raises(rk.BreakdownError, match="has broken down: K C K' has the negative eigenvalue"):
            state.gain(other)
        self.refuses(state, K)

    def test_the_history_cures_what_a_batch_has_found(self) -> None:
        kept: list[tuple[torch.Tensor, float]] = []
        state = make("plain", history=lambda: kept)
        kept += written(state, 3)
        v = torch.eye(D)[0]
        state._form.C -= 2.0 * float(state._form.C[0, 0]) * v[:, None] * v
        with pytest.raises(rk.BreakdownError, match="negative eigenvalue"):
            state.gain(v[None])
        state.gain(v[None])
        assert state.health().repairs == 1
        assert state.health().status == "ok"

    @pytest.mark.parametrize("kind", KINDS)
    def test_counters_of_an_older_version_are_read(self, kind) -> None:
        state = make(kind)
        K = written(state, 3)[0][0]
        saved = state.state_dict()
        known = {"steps", "largest_key", "smallest_pivot", "largest_leverage", "singular_writes", "careful_steps",
                 "careful_checked", "worst_drift", "repairs", "forgot", "largest_inner"}  # fmt: skip
        saved["counters"] = {name: value for name, value in saved["counters"].items() if name in known}
        twin = make(kind)
        twin.load_state_dict({name: value for name, value in saved.items() if name in _NAMES})
        assert torch.equal(twin.update(K), state.update(K))


_NAMES = ("version", "prior", "dtype", "requested", "reason", "form", "storage", "tensors", "counters", "probes")


def test_a_rebuild_does_not_touch_the_right_hand_side_of_others() -> None:
    """B belongs to the R that it was rotated with."""
    state = rk.SquareRootState(rk.Prior.ridge(D, 10.0), history=lambda: pytest.fail("rebuilt"))
    K = written(state, 16)[0][0]
    damaged(state, 0.5)
    with pytest.raises(rk.BreakdownError):
        state.append_with(torch.zeros(D, 2), K, torch.zeros(len(K), 2))


class TestAfterAHardWrite:
    """In what was written hard K C K' is rounding, of either sign: that says nothing about the state."""

    @pytest.mark.parametrize("form", ["plain", "whitened"])
    def test_a_second_one_that_is_refused_harms_nothing(self, form: str) -> None:
        state = rk.CovarianceState(rk.Prior.ridge(16, 1.0), form=form)
        K, other = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
        state.commit(K, 0.0)
        for noise in (0.0, 1e-3):
            with contextlib.suppress(rk.BreakdownError):
                state.commit(K, noise)
        state.commit(other)
        assert state.health().ok

    def test_nor_does_a_second_restriction(self) -> None:
        state = rk.CovarianceState(rk.Prior.ridge(16, 1.0))
        Q = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))[0]
        state.restrict(Q)
        with contextlib.suppress(rk.BreakdownError):
            state.restrict(Q)
        state.commit(torch.randn(2, 16))
        assert state.health().ok


def test_a_batch_that_was_prepared_for_another_form_is_not_written() -> None:
    prior = rk.Prior.anchor(torch.diag(torch.linspace(1.0, 2.0, 16)).double())
    state = rk.CovarianceState(prior)
    K = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    prepared = state.prepare(K)
    state.gain(1000.0 * K)  # for which the form moves
    with pytest.raises(ValueError, match="prepare it again"):
        state.write(prepared)
