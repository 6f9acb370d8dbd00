"""What cannot have been written is not taken back, and what was written is."""

from __future__ import annotations

import random
from itertools import islice

import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels.diagnostics import STREAMS, make_stream

D, U, V = 64, 6, 5
FORMS = ("auto", "plain", "whitened", "inverse_root", "square_root")
FILTERS = {
    **{form: {"form": form} for form in FORMS[:-1]},
    "no bounds": {"track_bounds": False},
    "carried": {"state": "square_root"},
    "square_root, gain": {"state": "square_root", "solution": "gain"},
}
forms = pytest.mark.parametrize("form", FORMS)
filters = pytest.mark.parametrize("kind", FILTERS)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def anchor() -> rk.Prior:
    M = randn(500, D, seed=1).double()
    return rk.Prior.anchor(15000 * M.mT @ M / 500)


def made(form: str, prior: rk.Prior, **arguments) -> rk.CovarianceState | rk.SquareRootState:
    if form == "square_root":
        return rk.SquareRootState(prior, **arguments)
    return rk.CovarianceState(prior, form=form, **arguments)


class TestStates:
    @forms
    def test_nothing_is_taken_back_from_nothing(self, form) -> None:
        state, K = made(form, anchor()), randn(U, D)
        state.update(K)
        state.remove(K)
        before = state.covariance()
        for remaining in (None, []):
            with pytest.raises(rk.LeverageError, match="holds 0 batches"):
                state.remove(K, remaining=remaining)
        assert state.steps == 0
        assert torch.equal(state.covariance(), before)
        if form == "square_root":
            B = torch.zeros(D, V)
            with pytest.raises(rk.LeverageError, match="holds 0 batches"):
                state.remove_with(B, K, randn(U, V))
            assert not B.any()

    @forms
    def test_a_state_below_zero_is_broken(self, form) -> None:
        """As an earlier version may have saved it."""
        state = made(form, anchor())
        state.update(randn(U, D))
        saved = state.state_dict()
        saved["counters"]["steps"] = -1
        state.load_state_dict(saved)
        health = state.health()
        assert health.status == "broken"
        assert "1 batches more were taken back than written" in health.messages[-1]

    @forms
    def test_an_eigenvalue_above_one_is_reported(self, form) -> None:
        state, K = made(form, anchor()), randn(U, D)
        state.update(randn(U, D, seed=3) * 0.1)
        state.update(K)
        assert state.health(thorough=True).status == "ok"
        state.remove(K)
        assert state.health(thorough=True).status == "ok"
        state.remove(K)
        health = state.health(thorough=True)
        assert health.largest_eigenvalue > 1.005
        assert health.status == "warning"
        assert "more than 1 is not possible without forgetting" in health.messages[-1]

    @forms
    def test_forgetting_may_bring_one_above(self, form) -> None:
        state = made(form, anchor())
        state.update(randn(U, D), forget=0.5)
        health = state.health(thorough=True)
        assert health.largest_eigenvalue > 1.5
        assert health.status == "ok"

    def test_without_a_prior_there_is_no_bound(self) -> None:
        state = rk.SquareRootState(rk.Prior.ridge(8, 0.0))
        state.update(0.1 * torch.eye(8))
        assert state.health(thorough=True).status == "ok"

    @pytest.mark.parametrize("prior", ["ridge", "anchor"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("form", FORMS[:-1])
    def test_a_hard_write_is_not_taken_back(self, form, prior, dtype) -> None:
        state = made(form, anchor() if prior == "anchor" else rk.Prior.ridge(D, 1.0), dtype=dtype)
        hard, other = randn(2, D), randn(U, D, seed=3)
        state.update(hard, 0.0)
        state.update(other)
        before, kept = state.covariance(), [(other, 1.0)]
        for _ in range(2):
            with pytest.raises(rk.LeverageError, match=r"a hard write \(noise 0\) or a restriction lets"):
                state.remove(hard)
        assert torch.equal(state.covariance(), before)
        assert state.steps == 2
        state.remove(other)
        state.update(other)
        state.remove(hard, remaining=kept)
        assert state.steps == 1


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(U, D, seed=seed), randn(U, V, seed=seed + 100)


def filter_of(kind: str, prior: rk.Prior) -> rk.RLSFilter:
    return rk.RLSFilter(randn(D, V, seed=9), prior, layout="in_out", **FILTERS[kind])


class TestFilters:
    @filters
    @pytest.mark.parametrize("others", [0, 1])
    def test_what_was_taken_back_is_not_taken_back_again(self, kind, others) -> None:
        """A sum of squares below zero shows it, also where the state holds batches that are not this one."""
        rls = filter_of(kind, anchor())
        for seed in range(1, 1 + others):
            K, E = pair(seed)
            rls.update(0.1 * K, 0.1 * E)
        K, E = pair(0)
        rls.update(K, E)
        rls.remove(K, E)
        before = rls.weight.clone(), rls.state.covariance(), rls.objective
        with pytest.raises(rk.LeverageError, match="objective would become -" if others else "holds 0 batches"):
            rls.remove(K, E)
        assert torch.equal(rls.weight, before[0])
        assert torch.equal(rls.state.covariance(), before[1])
        assert rls.objective == before[2]
        assert rls.state.steps == others
        rls.update(K, E)

    @filters
    def test_other_targets_are_not_taken_back(self, kind) -> None:
        rls = filter_of(kind, anchor())
        K, E = pair(0)
        rls.update(K, E)
        with pytest.raises(rk.LeverageError, match="objective would become -"):
            rls.remove(K, 30.0 * E)
        rls.remove(K, E)

    @filters
    def test_the_rest_cures_it(self, kind) -> None:
        if kind == "no bounds":
            pytest.skip("keeps no W_0")
        rls = filter_of(kind, anchor())
        K, E = pair(0)
        rls.update(0.1 * K, 0.1 * E)
        step = rls.remove(K, E, remaining=[(0.1 * K, 0.1 * E, 1.0)])
        assert step.objective > 0.0
        assert rls.state.steps == 1

    @filters
    def test_targets_that_the_weight_gives_already(self, kind) -> None:
        """All costs are rounding errors then, of either sign."""
        rls = filter_of(kind, anchor())
        W = randn(D, V, seed=9)
        keys = [randn(U, D, seed=seed) * 10.0**seed for seed in range(-3, 1)]
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
            for K in keys:
                rls.update(K, K @ W)
            for i in order:
                rls.remove(keys[i], keys[i] @ W)
        assert rls.state.steps == 0

    @filters
    def test_a_large_batch_that_has_come_and_gone(self, kind) -> None:
        rls = filter_of(kind, anchor())
        small = [pair(seed) for seed in range(1, 6)]
        K, E = pair(0)
        for k, e in small:
            rls.update(k, 1e-3 * e + k @ randn(D, V, seed=9))
        rls.update(K, 1e4 * E)
        rls.remove(K, 1e4 * E)
        for k, e in small:
            rls.remove(k, 1e-3 * e + k @ randn(D, V, seed=9))
        assert rls.state.steps == 0


@pytest.mark.parametrize("kind", ["auto", "inverse_root", "carried", "square_root, gain"])
def test_what_was_written_is_taken_back(kind) -> None:
    """Streams of all kinds, in another order: refused is what a downdate cannot do, never what the objective says."""
    taken = 0
    for seed, name in enumerate(STREAMS):
        stream = make_stream(name, 16, 4, seed=seed % 2)
        rls = rk.RLSFilter(stream.W_0, stream.prior, layout="in_out", guard="off", **FILTERS[kind])
        given = list(islice(stream.batches(), 12))
        for batch in given:
            rls.update(batch.K, batch.V, batch.noise)
        random.Random(seed).shuffle(given)
        for batch in given:
            refused = ""
            try:
                rls.remove(batch.K, batch.V, batch.noise)
                taken += 1
            except rk.LeverageError as error:
                refused = str(error)
            assert "objective" not in refused, name
    assert taken > 100
