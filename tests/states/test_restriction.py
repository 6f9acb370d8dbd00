"""What a restriction forbids stays forbidden when the state is rebuilt."""

from __future__ import annotations

import pytest
import torch

import rlsedit_kernels as rk

D, U, V = 24, 5, 3
FORMS = ("auto", "plain", "whitened", "inverse_root", "square_root")
PRIORS = ("ridge", "anchor", "null_space")
FILTERS = {form: {"form": form} for form in FORMS[:-1]} | {
    "square_root, gain": {"state": "square_root", "solution": "gain"}
}
forms = pytest.mark.parametrize("form", FORMS)
priors = pytest.mark.parametrize("name", PRIORS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prior(name: str) -> rk.Prior:
    if name == "ridge":
        return rk.Prior.ridge(D, 1.0)
    if name == "null_space":
        return rk.Prior.null_space(torch.linalg.qr(randn(D, D - 3, seed=4))[0], 1.0)
    X = randn(4 * D, D, seed=5)
    return rk.Prior.anchor(X.mT @ X / D, lam=0.5)


def made(form: str, name: str, **arguments) -> rk.CovarianceState | rk.SquareRootState:
    if form == "square_root":
        return rk.SquareRootState(prior(name), **arguments)
    return rk.CovarianceState(prior(name), form=form, **arguments)


def basis(count: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.linalg.qr(randn(D, count, seed=seed))[0]


def size(A: torch.Tensor) -> float:
    return float(A.double().norm())


@forms
@priors
@dtypes
def test_a_rebuilt_state_is_that_of_the_stream(form, name, dtype) -> None:
    keys = [randn(U, D, seed=10 + i).to(dtype) for i in range(5)]
    one, two = basis().to(dtype), basis(2, seed=2).to(dtype)
    state, limit = made(form, name, dtype=dtype), 2e3 * torch.finfo(dtype).eps
    state.update(keys[0])
    state.restrict(one)
    state.update(keys[1])
    state.restrict(two)
    for K in keys[2:]:
        state.update(K)
    expected = state.covariance()
    loaded = made(form, name, dtype=dtype)
    loaded.load_state_dict(state.state_dict())
    converted = state.convert("inverse_root" if form != "inverse_root" else "plain")
    for other in (state, state.clone(), loaded, converted, state.to(dtype=dtype)):
        other.refactor([(K, 1.0) for K in keys])
        C = other.covariance()
        assert size(C - expected) < limit * size(expected)
        for Q in (one, two):
            assert size(C @ Q) < limit * size(C)
        assert other.steps == 5
        assert other.health().status == "ok"
        other.update(keys[0])
        other.remove(keys[0], remaining=[(K, 1.0) for K in keys])
        assert size(other.covariance() @ one) < limit * size(C)


@pytest.mark.parametrize("kind", FILTERS)
@priors
def test_the_weight_stays_what_it_is_in_forbidden_directions(kind, name) -> None:
    Q, dtype = basis(), torch.float32
    rls = rk.RLSFilter(randn(D, V, seed=3).to(dtype), prior(name), layout="in_out", **FILTERS[kind])
    batches = [(randn(U, D, seed=20 + i).to(dtype), randn(U, V, seed=30 + i).to(dtype), 0.5) for i in range(5)]
    rls.update(*batches[0])
    rls.state.restrict(Q)
    frozen = Q.mT @ rls.weight.double()
    for batch in batches[1:]:
        rls.update(*batch)
    before, objective = rls.weight.clone(), rls.objective
    rls.refactor(batches)
    assert size(Q.mT @ rls.weight.double() - frozen) < 1e-5
    assert size(rls.weight - before) < 1e-4 * size(before)
    assert rls.objective == pytest.approx(objective, rel=1e-4)
    other = rls.clone()
    rls.remove(*batches[3])
    other.remove(*batches[3], remaining=batches[:3] + batches[4:])
    assert size(Q.mT @ other.weight.double() - frozen) < 1e-5
    assert size(other.weight - rls.weight) < 1e-4 * size(before)
    assert other.objective == pytest.approx(rls.objective, rel=1e-3)


def test_a_carried_solution_refuses() -> None:
    rls = rk.RLSFilter(torch.zeros(D, V), prior("ridge"), "square_root", layout="in_out")
    rls.state.restrict(basis())
    with pytest.raises(ValueError, match="restricted outside of the filter"):
        rls.refactor([])
    assert rls.state.rank == D - 2


@forms
def test_the_guard_rebuilds_what_is_restricted(form) -> None:
    kept: list = []
    state, Q = made(form, "anchor", history=lambda: kept), basis()
    state.restrict(Q)
    for i in range(16):
        K = randn(U, D, seed=i).float()
        state.update(K)
        kept.append((K, 1.0))
    kept_in = next(A for A in (getattr(state._form, n, None) for n in ("C", "matrix", "A", "R")) if A is not None)
    kept_in *= 1.5
    state.update(K)
    assert state.health().repairs == 1
    assert size(state.covariance().double() @ Q) < 1e-4 * size(state.covariance())


def test_hard_writes_are_lifted_and_restrictions_are_not() -> None:
    state, Q, hard = made("whitened", "ridge"), basis(), torch.eye(D)[:1]
    state.restrict(Q)
    state.update(hard, 0.0)
    state.refactor([(hard, 1.0)])
    C = state.covariance().double()
    assert float(C[0, 0]) > 0.1
    assert size(C @ Q) < 1e-5
    assert state._counters.singular_writes == state._counters.restrictions == 1


@forms
def test_a_state_of_an_earlier_version_is_read(form) -> None:
    state = made(form, "ridge")
    state.restrict(basis())
    saved = state.state_dict()
    del saved["restriction"], saved["counters"]["restrictions"]
    twin = made(form, "ridge")
    twin.load_state_dict(saved)
    assert torch.equal(twin.covariance(), state.covariance())


def test_the_same_restriction_twice_forbids_nothing_more() -> None:
    state = rk.SquareRootState(rk.Prior.ridge(16, 1.0))
    Q = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))[0]
    ranks = []
    for step in (lambda: state.restrict(Q), lambda: state.restrict(Q), lambda: state.refactor([])):
        step()
        ranks.append(state.rank)
    assert ranks == [13, 13, 13]


@pytest.mark.parametrize("kind", [rk.CovarianceState, rk.SquareRootState])
def test_directions_that_were_not_saved_are_not_lifted_in_silence(kind) -> None:
    state = kind(rk.Prior.ridge(16, 1.0))
    state.commit(torch.randn(2, 16))
    state.restrict(torch.eye(16)[:, :3])
    saved = {**state.state_dict(), "restriction": None}
    twin = kind(rk.Prior.ridge(16, 1.0))
    twin.load_state_dict(saved)
    with pytest.raises(ValueError, match="directions were not saved"):
        twin.refactor([])


HARD = [kind for kind in FILTERS if "square_root" not in kind]


@pytest.mark.parametrize("kind", HARD)
@priors
@dtypes
def test_what_lies_where_nothing_may_change_changes_nothing(kind, name, dtype) -> None:
    """K C K' is rounding there, of either sign: its reciprocal is no gain."""
    rls = rk.RLSFilter(randn(D, V, seed=3).to(dtype), prior(name), layout="in_out", **FILTERS[kind])
    Q, limit = basis().to(dtype), 1e3 * torch.finfo(dtype).eps
    rls.update(randn(U, D, seed=20).to(dtype), randn(U, V, seed=30).to(dtype))
    rls.state.restrict(Q)
    before, C = rls.weight.clone(), rls.state.covariance()
    for again in (Q, Q[:, :1], Q @ torch.tensor([[0.6], [-0.8]], dtype=dtype)):
        rls.state.restrict(again)
        step = rls.update(again.mT, randn(again.shape[1], V, seed=31).to(dtype), 0.0)
        assert step.residual_norm == pytest.approx(step.innovation_norm, rel=1e-3)
        rls.update(again.mT, randn(again.shape[1], V, seed=32).to(dtype), 0.5)
    assert size(rls.weight - before) < limit * size(before)
    assert size(rls.state.covariance() - C) < limit * size(C)
    half = torch.cat([Q[:, :1].mT, randn(1, D, seed=33).to(dtype)])  # what may change does
    goal = randn(2, V, seed=34).to(dtype)
    rls.update(half, goal, 0.0)
    assert size(Q.mT @ (rls.weight - before)) < limit * size(before)
    if name != "null_space":
        assert size(half[1:] @ rls.weight - goal[1:]) < limit * size(goal)
    assert rls.health(thorough=True).status == "ok"


@pytest.mark.parametrize("kind", HARD)
@priors
@dtypes
def test_a_thorough_check_knows_what_is_singular_by_design(kind, name, dtype) -> None:
    for seed in range(6):
        rls = rk.RLSFilter(randn(D, V, seed=3).to(dtype), prior(name), layout="in_out", **FILTERS[kind])
        rls.update(randn(1, D, seed=seed).to(dtype), randn(1, V, seed=seed).to(dtype), 0.0)
        found = rls.health(thorough=True)
        assert found.status == "ok", found.messages
        assert found.smallest_eigenvalue == pytest.approx(1.0, rel=1e-3)
        for A in (getattr(rls.state._form, name, None) for name in ("C", "matrix")):
            if A is not None:
                A[0, 0] -= 2.0 * A.abs().max()
                assert rls.health(thorough=True).status == "broken"


@pytest.mark.parametrize("kind", FILTERS)
def test_the_bounds_hold_behind_a_restriction(kind) -> None:
    """It holds what the first batch did, which the errors against W_0 of the others do not tell."""
    W, lam = randn(D, V, seed=3), 0.5
    X = randn(4 * D, D, seed=5)
    given = rk.Prior.anchor(X.mT @ X / D, mu=0.7, lam=lam)
    rls = rk.RLSFilter(W, given, layout="in_out", **FILTERS[kind])
    K, goal = randn(U, D, seed=20), randn(U, V, seed=30)
    rls.update(K, goal)
    rls.state.restrict(torch.linalg.qr(K.mT)[0][:, :2])
    for i in range(8):
        pull = randn(U, D, seed=40 + i)
        step = rls.update(pull, pull @ W, 0.01)  # where W_0 fits
    rls.remove(K, goal)
    step = rls.update(pull, pull @ W, 1.0)
    shift = rls.weight - W
    assert size(shift) <= step.parameter_bound
    assert float((X @ shift / D**0.5).norm()) <= step.anchor_bound
