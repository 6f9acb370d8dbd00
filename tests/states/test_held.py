"""What is forbidden stays so to the rounding of one batch, however long the stream and however small its noise."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.least_squares import Problem, Term

import rlsedit_kernels as rk
from rlsedit_kernels.errors import LeverageError
from rlsedit_kernels.states import held

D, U, V = 32, 6, 3
COVARIANCES = ("plain", "whitened", "inverse_root")
PROJECTED = ("plain", "whitened")
FORMS = (*COVARIANCES, "square_root")
forms = pytest.mark.parametrize("form", FORMS)
projected = pytest.mark.parametrize("form", PROJECTED)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(count: int, seed: int = 1) -> torch.Tensor:
    return torch.linalg.qr(randn(D, count, seed=seed))[0]


def precision(condition: float) -> torch.Tensor:
    B = orthonormal(D, seed=5)
    S = (B * torch.logspace(0, 1, D, base=condition, dtype=torch.float64)) @ B.mT
    return (S + S.mT) * 0.5


def made(form: str, given: rk.Prior, **arguments: Any) -> Any:
    if form == "square_root":
        return rk.SquareRootState(given, **arguments)
    return rk.CovarianceState(given, form=form, **arguments)


def size(A: torch.Tensor) -> float:
    return float(A.double().norm())


class Stream:
    """A state with its weight in float64, and the problem that they solve."""

    def __init__(self, form: str, condition: float, dtype: torch.dtype = torch.float32) -> None:
        S = precision(condition)
        given = rk.Prior.precision(S) if condition > 1.0 else rk.Prior.ridge(D, 1.0)
        self.state = made(form, given, dtype=dtype, guard="off")
        self.problem = Problem(S if condition > 1.0 else torch.eye(D, dtype=torch.float64), randn(D, V, seed=9))
        self.W = self.problem.W_0.clone()
        self.mix = orthonormal(D, seed=6) * torch.logspace(0, -1, D, dtype=torch.float64)
        self.C_0 = self.problem.covariance()

    def keys(self, seed: int, count: int = U) -> torch.Tensor:
        """Correlated, with k C_0 k' = 1."""
        K = randn(count, D, seed=100 + seed) @ self.mix.mT
        return (K / ((K @ self.C_0) * K).sum(dim=1, keepdim=True).sqrt()).to(self.state.dtype)

    def write(self, K: torch.Tensor, goal: torch.Tensor, noise: float) -> None:
        gain, wide = self.state.update(K, noise).double(), K.double()
        self.W = self.W + gain @ (goal - wide @ self.W)
        if noise == 0.0:
            self.problem.hold(wide, goal)
        else:
            self.problem.terms.append(Term(wide, goal, noise))

    def forbid(self, way: str, count: int = 3) -> torch.Tensor:
        """The directions (d, q) that nothing may change from now on."""
        if way == "hard":
            K = self.keys(-1, count)
            self.write(K, randn(count, V, seed=3), 0.0)
            return torch.linalg.qr(K.double().mT)[0]
        Q = orthonormal(count).to(self.state.dtype)
        self.state.restrict(Q)
        self.problem.restrict(Q.double().mT)
        return torch.linalg.qr(Q.double())[0]

    def run(self, noise: float, batches: int) -> None:
        goal = randn(D, V, seed=8)
        for i in range(batches):
            K = self.keys(i)
            self.write(K, K.double() @ goal + 0.1 * noise**0.5 * randn(U, V, seed=5000 + i), noise)


@pytest.mark.parametrize("way", ["restrict", "hard"])
@pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("form", COVARIANCES)
@dtypes
def test_a_long_stream_changes_nothing_in_forbidden_directions(form, condition, noise, way, dtype) -> None:
    """By subtraction alone W was off by 1e-6, 1e-3 and 1 of what changes in float32, along Q and elsewhere."""
    stream = Stream(form, condition, dtype)
    stream.write(stream.keys(-2), randn(U, V, seed=2), 1.0)
    Q = stream.forbid(way)
    frozen, before = Q.mT @ stream.W, stream.W.clone()
    stream.run(noise, 200)
    changed, C = size(stream.W - before), stream.state.covariance().double()
    exactly, closely = (1e-12, 1e-10) if dtype == torch.float64 else (1e-5 if form == "inverse_root" else 2e-6, 2e-3)
    assert size(Q.mT @ stream.W - frozen) < exactly * changed
    assert size(C @ Q) < exactly * size(C)
    if form == "plain" and condition > 1e3:
        return  # too ill-conditioned a prior for this form, restricted or not
    assert size(stream.W - stream.problem.weight()) < closely * changed
    assert size(C - stream.problem.covariance()) < closely * size(C)
    assert stream.state.health(thorough=True).ok


@forms
@dtypes
def test_all_directions_are_forbidden_however_well_the_prior_knows_them(form, dtype) -> None:
    """One of them was left out where the prior knew it 1e6 times as well as another, and edits went there."""
    for condition in (1e4, 1e6, 1e8):
        S = torch.diag(torch.logspace(0, 1, D, base=condition, dtype=torch.float64))
        state = made(form, rk.Prior.precision(S), dtype=dtype)
        turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
        Q = torch.eye(D, dtype=torch.float64)[:, [0, -1]]
        state.restrict((Q @ turn).to(dtype))
        C = state.covariance().double()
        for q, known in ((Q[:, 0], 1.0), (Q[:, 1], condition)):
            assert size(C @ q) * known < 1e-4
        rest = 1.0 / S.diagonal()[1:-1]
        assert size(C.diagonal()[1:-1] - rest) < 1e-5 * size(rest)


@forms
def test_what_the_stream_has_learnt_is_forbidden_too(form) -> None:
    state = made(form, rk.Prior.ridge(D, 1.0))
    eye = torch.eye(D)
    for _ in range(50):
        state.update(30.0 * eye[:8], 0.01)
    known = float(state.covariance()[0, 0])
    assert known < 1e-6
    state.restrict(eye[:, [0, 20]])
    C = state.covariance()
    assert size(C[:, [0, 20]]) < 1e-3 * known
    assert float(C[1, 1]) == pytest.approx(known, rel=1e-3)


COPIES = {
    "clone": lambda state: state.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "to": lambda state: state.to(dtype=torch.float64),
    "convert": lambda state: state.convert("plain" if state.form == "whitened" else "whitened"),
}


@pytest.mark.parametrize("way", COPIES)
@projected
def test_copies_hold_what_the_original_does(form, way) -> None:
    stream = Stream(form, 1e3)
    Q = torch.cat([stream.forbid("restrict"), stream.forbid("hard", 1)], dim=1)
    stream.run(1e-3, 20)
    C = stream.state.covariance().double()
    twin = COPIES[way](stream.state)
    assert size(twin.covariance() - C) < 1e-5 * size(C)
    for i in range(50, 100):
        gain = twin.update(stream.keys(i).to(twin.dtype), 1e-5).double()
        assert size(Q.mT @ gain) < 1e-6 * size(gain)
    assert size(stream.state.covariance() - C) < 1e-6 * size(C)


@pytest.mark.parametrize("condition", [1.0, 1e3])
@projected
def test_a_saved_state_goes_on_to_the_bit(form, condition) -> None:
    stream = Stream(form, condition)
    stream.forbid("restrict")
    stream.forbid("hard", 1)
    stream.run(1e-3, 3)
    twin = made(form, stream.state.prior)
    twin.load_state_dict(stream.state.state_dict())
    for i in range(40, 60):
        assert torch.equal(twin.update(stream.keys(i), 1e-4), stream.state.update(stream.keys(i), 1e-4))
    saved = stream.state.state_dict()
    saved["tensors"]["held_inner"] = saved["tensors"]["held_inner"][:, 1:]
    before = twin.covariance()
    with pytest.raises(ValueError, match="held must be"):
        twin.load_state_dict(saved)
    assert torch.equal(twin.covariance(), before)


@projected
def test_a_state_of_an_earlier_version_holds_its_restrictions(form) -> None:
    stream = Stream(form, 1e3)
    Q = stream.forbid("restrict")
    saved = stream.state.state_dict()
    del saved["tensors"]["held"], saved["tensors"]["held_inner"]
    twin = made(form, stream.state.prior, guard="off")
    twin.load_state_dict(saved)
    for i in range(50):
        gain = twin.update(stream.keys(i), 1e-6).double()
        assert size(Q.mT @ gain) < 1e-6 * size(gain)


@projected
def test_a_rebuilt_state_holds_its_restrictions(form) -> None:
    stream = Stream(form, 1e3)
    Q = stream.forbid("restrict")
    stream.state.refactor([(stream.keys(i), 1e-6) for i in range(20)])
    for i in range(20, 70):
        gain = stream.state.update(stream.keys(i), 1e-6).double()
        assert size(Q.mT @ gain) < 1e-6 * size(gain)


@projected
def test_what_nothing_tells_of_does_not_grow_with_forgetting(form) -> None:
    """Keys do not reach what is held: the rounding there would be multiplied by 1/0.5 with each of 400 batches."""
    state = made(form, rk.Prior.ridge(D, 1.0))
    state.restrict(orthonormal(3).float())
    for i in range(400):
        state.update(randn(D, D, seed=i).float(), 1.0, 0.5)
    bare = held.bare(state._form)
    assert float((bare.C if form == "plain" else bare.matrix).abs().max()) < 1.0
    assert state.health().ok


@projected
def test_a_batch_in_forbidden_directions_is_not_taken_back(form) -> None:
    stream = Stream(form, 1e3)
    Q = stream.forbid("restrict")
    stream.write(stream.keys(1), randn(U, V, seed=2), 1.0)
    with pytest.raises(LeverageError, match="lets nothing change"):
        stream.state.remove(Q.mT[:1].float())


@projected
def test_what_is_held_is_bounded_for_hard_writes_and_free_for_others(form) -> None:
    state, most = made(form, rk.Prior.ridge(D, 1.0)), int(held.MOST * D)
    state.update(randn(U, D).float())
    assert not isinstance(state._form, held.HeldForm)
    for i in range(most + 2):
        state.update(randn(1, D, seed=i).float(), 0.0)
    assert state._form.count == most
    state.update(randn(1, D, seed=1).float(), 0.0)  # nothing new
    state.restrict(orthonormal(D // 2, seed=7).float())
    assert state._form.count == most + D // 2
    state.restrict(orthonormal(D // 2, seed=7).float())
    assert state._form.count == most + D // 2


def test_directions_outside_of_a_null_space_forbid_nothing_in_it() -> None:
    """Given in float32 they have rounding in it."""
    basis = orthonormal(D)
    state = made("whitened", rk.Prior.null_space(basis[:, 4:], 1.0), dtype=torch.float64)
    before = state.covariance()
    state.restrict(basis[:, :2].float().double())
    assert size(state.covariance() - before) < 1e-6
    assert not isinstance(state._form, held.HeldForm)


class TestNullSpace:
    """What the prior forbids a plain covariance leaves alone as well, however small the noise."""

    @staticmethod
    def stream(state: Any, N: torch.Tensor, noise: float, batches: int, first: int = 0) -> list[torch.Tensor]:
        """Gains (d, u) of batches of keys that lie anywhere."""
        return [state.update(randn(U, D, seed=100 + i) / D**0.5, noise) for i in range(first, first + batches)]

    @staticmethod
    def prior(rank: int) -> tuple[rk.Prior, torch.Tensor, torch.Tensor]:
        Q = orthonormal(D, seed=4)
        return rk.Prior.null_space(Q[:, :rank], 1.0), Q[:, :rank], Q[:, rank:]

    @staticmethod
    def truth(N: torch.Tensor, noise: float, batches: int) -> torch.Tensor:
        rows = [N.mT, *(randn(U, D, seed=100 + i).float().double() / D**0.5 / noise**0.5 for i in range(batches))]
        half = torch.linalg.qr(torch.cat(rows) @ N)[1]
        root = N @ torch.linalg.inv(half)
        return root @ root.mT

    @pytest.mark.parametrize("rank", [4, 16, 28])
    @pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-6])
    def test_no_edit_goes_where_the_prior_forbids_it(self, rank, noise) -> None:
        """At noise 1e-6 it broke down on what subtraction had left there."""
        given, N, outside = self.prior(rank)
        state = rk.CovarianceState(given, form="plain")
        for gain in self.stream(state, N, noise, 100):
            assert size(outside.mT @ gain.double()) < 1e-5 * size(gain)
        C, true = state.covariance().double(), self.truth(N, noise, 100)
        assert size(C - true) < (5e-6 if noise == 1.0 else 1e-3 if noise == 1e-3 else 0.2) * size(true)
        if noise < 1.0:
            assert size(outside.mT @ C) < 1e-6 * size(C)
        assert state.form == "plain"

    def test_it_pays_only_where_it_has_to(self) -> None:
        """At noise 1 the form is the one without a projection."""
        given, N, _ = self.prior(16)
        state = rk.CovarianceState(given, form="plain")
        self.stream(state, N, 1.0, 3)
        assert not isinstance(state._form, held.HeldForm)
        self.stream(state, N, 1e-6, 1)
        assert state._form.of_prior == 16

    @pytest.mark.parametrize("first", ["restricted", "noise"])
    def test_restrictions_and_hard_writes_join_it(self, first) -> None:
        given, N, outside = self.prior(24)
        state = rk.CovarianceState(given, form="plain")
        Q = torch.linalg.qr(torch.cat([N[:, :2], outside[:, :1]], dim=1))[0]
        if first == "noise":
            self.stream(state, N, 1e-6, 1)
        state.restrict(Q)
        K = randn(2, D, seed=77).float()[: 1 if first == "restricted" else 2]  # 3 directions are held at any rho
        state.commit(K, 0.0)
        for gain in self.stream(state, N, 1e-6, 60):
            held_keys = K.double() @ N[:, 2:] @ N[:, 2:].mT  # what of them prior and restriction let change
            assert size(torch.cat([Q, outside], dim=1).mT @ gain.double()) < 1e-6 * size(gain)
            assert size(held_keys @ gain.double()) < 1e-5 * size(held_keys) * size(gain)
        assert state._form.of_prior == 8
        assert state._form.count == 8 + 2 + len(K)

    @pytest.mark.parametrize("way", ["state_dict", "clone", "pickle", "deepcopy"])
    def test_copies_go_on_to_the_bit(self, way) -> None:
        given, N, _ = self.prior(16)
        state = rk.CovarianceState(given, form="plain")
        self.stream(state, N, 1e-6, 3)
        if way == "state_dict":
            twin = rk.CovarianceState(given, form="plain")
            twin.load_state_dict(state.state_dict())
        else:
            ways = {"clone": lambda s: s.clone(), "pickle": lambda s: pickle.loads(pickle.dumps(s))}
            twin = ways.get(way, copy.deepcopy)(state)
        for a, b in zip(self.stream(state, N, 1e-6, 3, 3), self.stream(twin, N, 1e-6, 3, 3), strict=True):
            assert torch.equal(a, b)
        saved = state.state_dict()
        saved["tensors"]["held_of_prior"] = 99
        with pytest.raises(ValueError, match="held_of_prior must be from 0 to 16, got 99"):
            twin.load_state_dict(saved)

    @pytest.mark.parametrize("form", ["whitened", "inverse_root", "auto", "square_root"])
    def test_other_forms_take_over_what_was_forbidden_beside_it(self, form) -> None:
        given, N, outside = self.prior(16)
        state = rk.CovarianceState(given, form="plain")
        self.stream(state, N, 1e-3, 2)
        state.restrict(N[:, :2].contiguous())
        twin = state.convert(form)
        assert size(twin.covariance().double() - state.covariance().double()) < 1e-5 * size(state.covariance())
        other = getattr(twin._form, "outer", None)
        assert other is None or other.shape[1] in (2, 18)
        for gain in self.stream(twin, N, 1e-3, 20, 2):
            assert size(torch.cat([N[:, :2], outside], dim=1).mT @ gain.double()) < 2e-6 * size(gain)


class TestManyHardWrites:
    """Beyond 1/8 of the space they are held where keys tell so much that C alone would not keep them."""

    @staticmethod
    def left(state: Any, K: torch.Tensor, batches: int) -> float:
        """By how much a stream of noise 1e-6 moves the targets of K, of what it changes."""
        W = torch.zeros(D, V, dtype=torch.float64)
        for i in range(batches):
            k = (randn(U, D, seed=300 + i) / D**0.5).to(state.dtype)
            W += state.update(k, 1e-6).double() @ (k.double() @ randn(D, V, seed=8) - k.double() @ W)
        return size(K.double() @ W) / (size(K) * size(W))

    @pytest.mark.parametrize("form", PROJECTED)
    @pytest.mark.parametrize("noise", [1.0, 1e-6])
    def test_they_stay_or_health_says_that_they_do_not(self, form, noise) -> None:
        state = rk.CovarianceState(rk.Prior.ridge(D, 1.0), form=form, guard="off")
        state.commit((randn(U, D, seed=5) / D**0.5).float(), noise)
        K = torch.cat([(randn(5, D, seed=70 + i) / D**0.5).float() for i in range(3)])
        for rows in K.split(5):
            state.commit(rows, 0.0)
        if noise == 1.0:
            assert state._counters.unheld == 3
            assert state.health().status == "ok"
        moved = self.left(state, K, 100)
        if noise < 1.0:
            assert state._form.count == 15
            assert state._counters.unheld == 0
            assert moved < 1e-6
        else:
            assert any("3 hard writes, beyond 1/8 of the space" in text for text in state.health().messages)
        twin = rk.CovarianceState(rk.Prior.ridge(D, 1.0), form=form, guard="off")
        twin.load_state_dict(state.state_dict())
        assert twin.health().messages == state.health().messages


@projected
@pytest.mark.parametrize("what", ["restrict", "hard write", "load", "clone"])
def test_what_has_grown_stays_known_when_more_is_held(form, what) -> None:
    """It was counted from 1 again, so that rounding could grow by `GROWN` once more before it was cleared."""
    state, Q = made(form, rk.Prior.ridge(D, 1.0), guard="off"), orthonormal(4).float()
    if form == "whitened":
        state._form._densify()
    state.restrict(Q[:, :2])
    K = randn(D, D, seed=3).float()
    for _ in range(9):
        state.update(K, 1.0, 0.5)
    assert state._form.grown == 2.0**9 < held.GROWN
    if what == "restrict":
        state.restrict(Q[:, 2:])
    elif what == "hard write":
        state.update(randn(1, D, seed=4).float(), 0.0)
    elif what == "load":
        saved, state = state.state_dict(), made(form, rk.Prior.ridge(D, 1.0), guard="off")
        state.load_state_dict(saved)
    else:
        state = state.clone()
    assert state._form.grown == 2.0**9
    state.update(K, 1.0, 0.5)
    assert state._form.grown == 1.0  # cleared


def test_a_saved_growth_that_is_none_is_refused_and_an_earlier_version_saved_none() -> None:
    state = made("plain", rk.Prior.ridge(D, 1.0), guard="off")
    state.restrict(orthonormal(2).float())
    state.update(randn(U, D).float(), 1.0, 0.5)
    saved = state.state_dict()
    for wrong in (0.0, -1.0, float("inf"), "1", True):
        with pytest.raises(ValueError, match="held_grown must be a finite number above 0, got"):
            state.load_state_dict({**saved, "tensors": {**saved["tensors"], "held_grown": wrong}})
    assert state._form.grown == 2.0
    state.load_state_dict({**saved, "tensors": {k: v for k, v in saved["tensors"].items() if k != "held_grown"}})
    assert state._form.grown == 1.0


def test_a_plain_form_that_is_held_to_its_prior_keeps_what_has_grown() -> None:
    basis = orthonormal(D)[:, : D - 4]
    state = made("plain", rk.Prior.null_space(basis, 1.0), guard="off")
    state.restrict((basis @ torch.linalg.qr(randn(D - 4, 2, seed=2))[0]).float())
    assert state._form.of_prior == 0
    for _ in range(5):
        state.update(0.1 * randn(D, D, seed=3).float(), 1.0, 0.5)
    assert state._form.grown == 32.0
    state.update(randn(1, D, seed=4).float(), 1e-4)  # from this rho on the form is held to its prior
    assert (state._form.of_prior, state._form.grown) == (4, 32.0)
