"""What filters and states over ranks say of themselves is what one process says."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.ranks import run
from torch.distributed.tensor import DTensor

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import Ranks, ShardedCovarianceState, ShardedRLSFilter, ShardedSquareRootState
from rlsedit_kernels.states import triangular

D, V = 24, 3
PLACES = ("rows", "columns", "everywhere")


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def laid(ranks: Ranks, W: torch.Tensor, place: str) -> torch.Tensor | DTensor:
    if place == "everywhere":
        return W
    dim = ("rows", "columns").index(place)
    own = ranks.rows(W.shape[dim])
    return ranks.dtensor(W.narrow(dim, own.start, own.stop - own.start).contiguous(), W.shape[dim], dim)


def started(ranks: Ranks | None, W: torch.Tensor, prior: rk.Prior, state: str, place: str) -> rk.RLSFilter:
    if ranks is None:
        return rk.RLSFilter(W, prior, state, layout="in_out", guard="off")
    return ShardedRLSFilter(laid(ranks, W, place), prior, ranks, state, layout="in_out", guard="off")


def of_a_large_weight(ranks: Ranks | None, state: str, place: str = "") -> list[Any]:
    """Health of a change that is small beside W_0, and behind keys that tell nothing and change nothing."""
    W, found = (1e6 * randn(D, V, seed=1)).float(), []
    for size in (1.0, 1e-20):
        rls = started(ranks, W, rk.Prior.ridge(D, 1.0), state, place)
        for seed in range(5):
            K = (size * randn(4, D, seed=10 + seed)).float()
            rls.update(K, (K.double() @ W.double() + randn(4, V, seed=50 + seed)).float())
        found.append(rls.health())
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("state", ["covariance", "square_root"])
def test_a_weight_that_rounding_costs_digits_is_told_of(state: str, place: str) -> None:
    """Health ended the group of ranks with a TypeError."""
    alone = of_a_large_weight(None, state)
    outcomes = run(2, of_a_large_weight, state, place)
    assert outcomes[0] == outcomes[1]
    assert [found.status for found in alone] == ["warning", "ok"]
    for found, one in zip(outcomes[0], alone, strict=True):
        assert found.status == one.status
        assert (found.weight_error is None) == (one.weight_error is None)
    assert any("rounding to torch.float32 costs the weight" in text for text in outcomes[0][0].messages)
    assert outcomes[0][0].weight_error == pytest.approx(alone[0].weight_error, rel=0.3)


def contradicted(ranks: Ranks | None, lam: float, apart: float, place: str = "") -> list[Any]:
    """Health while keys parallel but for `apart` come with other targets each time."""
    base = randn(1, D, seed=3)
    rls = started(ranks, torch.zeros(D, V), rk.Prior.ridge(D, lam), "square_root", place)
    found = []
    for step in range(41):
        K = (base + apart * randn(4, D, seed=100 + step)).float()
        rls.update(K, randn(4, V, seed=500 + step).float())
        if step in (4, 16, 40):
            found.append(rls.health())
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("lam", "apart"), [(1e-3, 1e-6), (1e-1, 1e-4)])
def test_what_conflicts_cost_a_carried_solution_is_estimated(size: int, lam: float, apart: float, place: str) -> None:
    """Over ranks it was left out, and health "ok" where W was off by several per cent."""
    alone = contradicted(None, lam, apart)
    outcomes = run(size, contradicted, lam, apart, place)
    assert all(found == outcomes[0] for found in outcomes)
    for found, one in zip(outcomes[0], alone, strict=True):
        assert found.weight_error == pytest.approx(one.weight_error, rel=0.2)
        assert found.status == one.status
    assert lam > 1e-3 or outcomes[0][-1].status == "warning"


def knows_too_little(ranks: Ranks | None) -> Any:
    rls = started(ranks, torch.ones(D, V), rk.Prior.ridge(D, 0.0), "square_root", "rows")
    rls.update(torch.eye(D)[:3], torch.ones(3, V))
    found = rls.health()
    rls.update(torch.eye(D), torch.zeros(D, V))
    return found, rls.health()


def test_a_filter_that_knows_too_little_says_so_and_goes_on() -> None:
    alone = knows_too_little(None)
    for found in run(2, knows_too_little):
        assert [h.status for h in found] == [h.status for h in alone] == ["warning", "ok"]
        assert found[0].messages == alone[0].messages
        assert found[0].weight_error is None


def extremes_of(ranks: Ranks, R: torch.Tensor) -> tuple[float, float]:
    rls = started(ranks, torch.zeros(len(R), V), rk.Prior.precision(R.mT @ R), "square_root", "rows")
    return rls.state._form.extremes()  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_extremes_of_a_factor_are_those_of_one_process(size: int) -> None:
    R = triangular.factor_of(randn(60, 60, seed=1) * torch.logspace(0, -3, 60, dtype=torch.float64))
    outcomes = run(size, extremes_of, R)
    assert all(found == outcomes[0] for found in outcomes)
    assert outcomes[0] == pytest.approx(triangular.extremes(R.float()), rel=1e-2)


def found_broken_by_a_removal(ranks: Ranks | None) -> list[str]:
    given = [(randn(2, D, seed=i).float(), randn(2, V, seed=i + 9).float()) for i in range(6)]
    rls: Any = started(ranks, randn(D, V, seed=3).float(), rk.Prior.ridge(D, 1.0), "square_root", "rows")
    rls.state._watch.guard = "auto"
    for K, targets in given:
        rls.update(K, targets)
    form = rls.state._form
    (form.R if ranks is None else form.L).mul_(3.0)
    found = []
    for call in (rls.remove, rls.update):
        with pytest.raises(rk.BreakdownError) as error:
            call(*given[0])
        found.append(str(error.value)[:60])
    rls.refactor([(K, targets, 1.0) for K, targets in given])
    rls.update(*given[0])
    return found


def test_a_state_that_a_removal_has_found_broken_goes_on_refusing() -> None:
    """The copy that the removal worked on took this knowledge with it."""
    alone = found_broken_by_a_removal(None)
    assert run(2, found_broken_by_a_removal) == [alone, alone]


def took_nothing_back(ranks: Ranks) -> list[str]:
    found = []
    for cls in (ShardedCovarianceState, ShardedSquareRootState):
        state = cls(rk.Prior.ridge(D, 1.0), ranks)
        with pytest.raises(rk.LeverageError, match="the state holds 0 batches") as error:
            state.remove(torch.eye(D)[:2], remaining=[])
        state.commit(torch.eye(D)[:2])
        found.append(str(error.value))
    return found


def test_what_was_never_written_is_not_taken_back_by_a_rebuild() -> None:
    for found in run(2, took_nothing_back):
        assert found[0] == found[1]


def copied(ranks: Ranks) -> list[Any]:
    found: list[Any] = []
    for cls in (ShardedCovarianceState, ShardedSquareRootState):
        state = cls(rk.Prior.ridge(D, 1.0), ranks)
        K = randn(3, D, seed=1).float()
        state.update(K)
        twin = copy.deepcopy(state)
        assert twin.ranks is state.ranks
        found += [twin.update(2.0 * K).full_tensor(), state.update(2.0 * K).full_tensor(), repr(state)]
        with pytest.raises(TypeError, match=r"cannot be pickled.*distributed\.checkpoint"):
            pickle.dumps(state)
    return found


def test_states_are_copied_with_their_ranks_and_named() -> None:
    for found in run(2, copied):
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[3], found[4])
        assert found[2].startswith("ShardedCovarianceState(")
        assert found[5].startswith("ShardedSquareRootState(")
