"""A carried solution that is read behind every batch: changed by gains, and solved for every sixteenth time."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import islice

import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels.diagnostics import make_stream
from rlsedit_kernels.solutions import _GAIN_STEPS

D, U, V = 48, 6, 10
EASY = make_stream("easy", D, U, V).prior


def batches(name: str, count: int) -> list:
    return list(islice(make_stream(name, D, U, V).batches(), count))


def first_weight(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(D, V, dtype=dtype, generator=torch.Generator().manual_seed(5))


def made(prior: rk.Prior, dtype: torch.dtype = torch.float32, layout: str = "in_out") -> rk.RLSFilter:
    W = first_weight().to(dtype)
    return rk.RLSFilter(W if layout == "in_out" else W.mT.contiguous(), prior, "square_root", layout=layout)


def followed(rls: rk.RLSFilter, given: list, *, read: bool) -> rk.RLSFilter:
    for batch in given:
        rls.update(batch.K.to(rls.state.dtype), batch.V.to(rls.state.dtype), batch.noise, batch.forget)
        if read:
            _ = rls.weight
    return rls


def solves(rls: rk.RLSFilter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every triangular solve for the weight."""
    found: list[int] = []
    solve = rls.state.solve

    def counted(B: torch.Tensor) -> torch.Tensor:
        found.append(len(found))
        return solve(B)

    monkeypatch.setattr(rls.state, "solve", counted)
    return found


def null_space() -> rk.Prior:
    Q = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(6)))[0][:, :30]
    return rk.Prior.null_space(Q @ Q.mT, 1.0)


@pytest.mark.parametrize(
    "name", ["easy", "anchored", "condition-1e6", "weak-0.01", "tiny", "huge", "mixed", "forgetting", "falling-noise"]
)
def test_it_is_as_exact_as_one_that_is_solved_for_once(name) -> None:
    prior, given = make_stream(name, D, U, V).prior, batches(name, 10 * _GAIN_STEPS - 1)
    exact = followed(made(prior, torch.float64), given, read=False)
    solved, read = (followed(made(prior), given, read=read) for read in (False, True))
    R = exact.state.factor
    errors = [float((R @ (rls.weight - exact.weight)).norm()) for rls in (solved, read)]
    assert read._solution._steps > 0  # gains were added
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_it_lives_in_the_space_of_edits(layout) -> None:
    given = batches("easy", 12)
    exact = followed(made(null_space(), torch.float64, layout), given, read=False)
    read = followed(made(null_space(), torch.float32, layout), given, read=True)
    assert float((read.weight - exact.weight).norm()) < 1e-6 * float(exact.weight.norm())


def test_one_batch_in_sixteen_is_solved_for(monkeypatch) -> None:
    rls, found = made(EASY), []
    count = solves(rls, monkeypatch)
    for batch in batches("easy", 3 * (_GAIN_STEPS + 1)):
        rls.update(batch.K, batch.V)
        _ = rls.weight, rls.weight
        found.append(len(count))
    assert found == [1 + i // (_GAIN_STEPS + 1) for i in range(len(found))]


def test_nothing_is_solved_for_that_nobody_reads(monkeypatch) -> None:
    rls, given = made(EASY), batches("easy", 6)
    count = solves(rls, monkeypatch)
    followed(rls, given[:4], read=False)
    assert not count
    _ = rls.weight
    assert len(count) == 1
    followed(rls, given[4:], read=False)
    assert rls._solution._change is None  # the second of them came unread: its gain would be of no use
    _ = rls.weight
    assert len(count) == 2


def test_reading_changes_nothing_but_the_weight() -> None:
    given = batches("weak-0.01", 20)
    alone, read = (followed(made(rk.Prior.ridge(D, 0.01)), given, read=read) for read in (False, True))
    assert torch.equal(alone.state.factor, read.state.factor)
    assert torch.equal(alone._solution.B, read._solution.B)
    assert alone.objective == read.objective


def loaded(rls: rk.RLSFilter) -> rk.RLSFilter:
    twin = made(rls.state.prior)
    twin.load_state_dict(rls.state_dict())
    return twin


@pytest.mark.parametrize(
    "way", [rk.RLSFilter.clone, lambda rls: pickle.loads(pickle.dumps(rls)), loaded], ids=["clone", "pickle", "dict"]
)
@pytest.mark.parametrize("read", [False, True], ids=["not-read", "read"])
def test_a_copy_goes_on_to_the_same_bits(way: Callable[[rk.RLSFilter], rk.RLSFilter], read: bool) -> None:
    given = batches("easy", 2 * _GAIN_STEPS)
    rls = followed(made(EASY), given[:5], read=True)
    rls.update(given[5].K, given[5].V)
    if read:
        _ = rls.weight
    twin = way(rls)
    assert torch.equal(twin.weight, rls.weight)
    for batch in given[6:]:
        for one in (rls, twin):
            one.update(batch.K, batch.V)
        assert torch.equal(twin.weight, rls.weight)


def test_a_filter_saved_before_gains_were_added_goes_on() -> None:
    given = batches("easy", 8)
    rls = followed(made(EASY), given[:4], read=True)
    saved = rls.state_dict()
    for name in ("change", "read", "steps"):
        del saved["carried"][name]
    twin = made(EASY)
    twin.load_state_dict(saved)
    assert torch.equal(twin.weight, rls.weight)
    followed(rls, given[4:], read=True)
    followed(twin, given[4:], read=True)
    assert float((twin.weight - rls.weight).norm()) < 1e-6 * float(rls.weight.norm())


@pytest.mark.parametrize("change", ["remove", "refactor"])
def test_what_takes_batches_back_is_followed_by_a_solve(change, monkeypatch) -> None:
    given = batches("easy", 5)
    rls = followed(made(EASY), given, read=True)
    if change == "remove":
        rls.remove(given[1].K, given[1].V)
    else:
        rls.refactor([(b.K, b.V, b.noise) for i, b in enumerate(given) if i != 1])
    count = solves(rls, monkeypatch)
    left = followed(made(EASY), [b for i, b in enumerate(given) if i != 1], read=False)
    assert float((rls.weight - left.weight).norm()) < 2e-6 * float(left.weight.norm())
    assert len(count) == 1


def test_a_change_too_large_for_its_gain_is_left_to_the_solve(monkeypatch) -> None:
    """A gain of 1e12 and a target of 8e25: near the end of float32, and so may be what the product is added to."""
    rls = made(rk.Prior.ridge(D, 1e-14))
    K = torch.eye(D)[:1]
    rls.update(K, torch.ones(1, V))
    _ = rls.weight
    count = solves(rls, monkeypatch)
    rls.update(torch.eye(D)[1:2] * 1e-12, torch.full((1, V), 8e25))
    assert torch.isfinite(rls.weight).all()
    assert len(count) == 1


def test_a_batch_that_is_refused_leaves_the_weight_as_it_was() -> None:
    given = batches("easy", 4)
    rls = followed(made(EASY), given[:3], read=True)
    before = rls.weight.clone()
    with pytest.raises(ValueError, match="right-hand side"):
        rls.update(given[3].K, torch.full((U, V), 3e38))
    assert torch.equal(rls.weight, before)
    rls.update(given[3].K, given[3].V)
    twin = followed(made(EASY), given, read=True)
    assert torch.equal(rls.weight, twin.weight)
