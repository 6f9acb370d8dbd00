"""Forgetting until numbers end is refused in time, and said of a state that an earlier version has let go so far."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import StateBank
from rlsedit_kernels.states.forgetting import Bound

D = 8
FORMS = ("auto", "plain", "whitened", "inverse_root", "square_root")
FILTERS = {
    "covariance": {},
    "carried": {"state": "square_root"},
    "square_root, gain": {"state": "square_root", "solution": "gain"},
}
forms = pytest.mark.parametrize("form", FORMS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def made(form: str, prior: rk.Prior | None = None, **arguments) -> rk.CovarianceState | rk.SquareRootState:
    prior = prior or rk.Prior.ridge(D, 1.0)
    if form == "square_root":
        return rk.SquareRootState(prior, **arguments)
    return rk.CovarianceState(prior, form=form, **arguments)


def key(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.eye(D, dtype=dtype)[:1]


@forms
@dtypes
@pytest.mark.parametrize("guard", ["auto", "off"])
@pytest.mark.parametrize("restored", [False, True])
def test_it_is_refused_before_anything_is_lost(form, dtype, guard, restored) -> None:
    """One direction is told of, the others grow as 2^t; from a saved state too, whose size is not known."""
    state, last = made(form, dtype=dtype, guard=guard), 0
    for last in range(2000):
        before = copy.deepcopy(state.state_dict())
        try:
            state.commit(key(dtype), forget=0.5)
        except rk.BreakdownError as error:
            text = str(error)
            break
        if restored and last % 40 == 39:
            twin = made(form, dtype=dtype, guard=guard)
            twin.load_state_dict(state.state_dict())
            state = twin
    assert abs(last - math.log2(torch.finfo(dtype).max)) < 5
    assert "forget = 0.5" in text
    assert "form='auto'" not in text
    assert ("float64, which" in text) == (dtype == torch.float32)
    assert state.steps == before["counters"]["steps"]
    for name, value in before["tensors"].items():
        kept = state.state_dict()["tensors"][name]
        assert torch.equal(value, kept) if isinstance(value, torch.Tensor) else True
    assert bool(torch.isfinite(state.covariance()).all())
    assert bool(torch.isfinite(state.gain(key(dtype))).all())
    state.commit(key(dtype))
    state.refactor([(key(dtype), 1.0)])
    state.commit(key(dtype), forget=0.5)


@pytest.mark.parametrize("kind", FILTERS)
def test_a_filter_refuses_and_nothing_is_written(kind) -> None:
    rls = rk.RLSFilter(torch.zeros(D, 2), rk.Prior.ridge(D, 1.0), layout="in_out", **FILTERS[kind])
    V = torch.ones(1, 2)

    def follow() -> None:
        for _ in range(200):
            rls.update(key(), V, forget=0.5)

    with pytest.raises(rk.BreakdownError, match=r"forget = 0\.5"):
        follow()
    before = rls.weight.clone(), rls.state.covariance(), rls.objective
    with pytest.raises(rk.BreakdownError, match=r"forget = 0\.5"):
        rls.update(key(), V, forget=0.5)
    assert torch.equal(rls.weight, before[0])
    assert torch.equal(rls.state.covariance(), before[1])
    assert rls.objective == before[2]
    rls.update(key(), V)


@forms
def test_what_is_excited_goes_on(form) -> None:
    state = made(form)
    for _ in range(400):
        state.commit(torch.eye(D), forget=0.5)
    assert bool(torch.isfinite(state.covariance()).all())


@pytest.mark.parametrize("kind", FILTERS)
def test_a_prior_forgotten_entirely_bounds_nothing(kind) -> None:
    rls = rk.RLSFilter(torch.zeros(D, 2), rk.Prior.ridge(D, 1.0), layout="in_out", **FILTERS[kind])
    for _ in range(1100):
        step = rls.update(torch.eye(D), torch.ones(D, 2), forget=0.5)
    assert math.isinf(step.parameter_bound)


@pytest.mark.parametrize("form", ["plain", "whitened", "inverse_root", "square_root"])
def test_the_device_is_not_asked(form, monkeypatch) -> None:
    """As long as the bound is enough."""
    state, seen = made(form), []
    monkeypatch.setattr(Bound, "know", lambda *a: seen.append(a))
    for _ in range(100):
        state.commit(torch.eye(D), forget=0.7)
    assert not seen


@forms
def test_a_state_that_went_too_far_is_broken(form) -> None:
    """As an earlier version has saved it."""
    state = made(form, guard="off")
    state.commit(key())
    inner = state._form
    if form == "square_root":
        inner.R *= 2.0**-100
        inner.R[1, 1] = 0.0
    elif form == "plain":
        inner.C[1, 1] = math.inf
    elif form == "inverse_root":
        inner.A *= 2.0**70
    else:
        inner.identity = math.inf
    assert state.health().status == "broken"
    if form == "square_root":
        with pytest.raises(rk.BreakdownError, match="a pivot of R has fallen to 0"):
            state.gain(torch.ones(1, D))


def test_advice_fits() -> None:
    """Nobody is told to use what is in use."""
    state = rk.CovarianceState(rk.Prior.ridge(32, 1.0))
    for seed in range(4):
        K = 1e8 * torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
        state.update(K)
    health = state.health()
    assert health.storage == "torch.float64"
    assert not any("use float64" in text for text in health.messages)
    for form, dtype in (("auto", torch.float64), ("plain", torch.float32), ("square_root", torch.float64)):
        state = made(form, dtype=dtype)
        for _ in range(3):
            state.update(key(dtype))
        inner = state._form
        if form == "auto":
            inner.identity *= 3.0
        else:
            kept = inner.C if form == "plain" else inner.R
            kept *= 3.0
        with pytest.raises(rk.BreakdownError) as caught:
            state.remove(key(dtype) * 0.1)
        assert ("use form='auto'" in str(caught.value)) == (form == "plain")
        assert ("use float64" in str(caught.value)) == (form == "plain")


@pytest.mark.parametrize("kind", [rk.CovarianceState, rk.SquareRootState])
def test_a_bound_keeps_no_form_alive(kind) -> None:
    state = kind(rk.Prior.ridge(16, 1.0))
    state.commit(torch.randn(2, 16))
    left = weakref.ref(state._form)
    state.refactor([])
    gc.collect()
    assert left() is None


def test_a_bank_looks_as_well() -> None:
    bank = StateBank({0: rk.Prior.ridge(8, 1.0), 1: rk.Prior.ridge(8, 1.0)}, form="plain")
    K = torch.eye(8)[:1]
    for _ in range(37):
        bank.update({0: (K, 1.0), 1: (K, 1.0)}, forget=0.1)
    with pytest.raises(rk.BreakdownError, match="forget"):
        bank.update({0: (K, 1.0), 1: (K, 1.0)}, forget=0.1)
    state = bank.state(0)
    assert bool(torch.isfinite(state.covariance()).all())
    with pytest.raises(rk.BreakdownError, match="forget"):  # what the bank has forgotten is known to the state
        state.commit(K, 1.0, 0.1)


def test_one_broken_state_of_a_bank_is_one() -> None:
    bank = StateBank({i: rk.Prior.ridge(8, 1.0) for i in range(3)}, form="plain")
    batch = {i: (torch.eye(8)[:2], 1.0) for i in range(3)}
    bank.update(batch)
    bank.state(0)._form.C.neg_()
    with pytest.raises(rk.BreakdownError):
        bank.update({i: (3.0 * torch.eye(8)[4:6], 1.0) for i in range(3)})
    bank.update({i: batch[i] for i in (1, 2)})
