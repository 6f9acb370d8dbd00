"""Forgetting over ranks is refused by all of them before C overflows or R loses a pivot, as one process does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.bits import same
from support.ranks import run
from support.sharded import full, locals_of

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import Ranks, ShardedCovarianceState, ShardedRLSFilter, ShardedSquareRootState
from rlsedit_kernels.distributed.volume import Received

FORMS = ("plain", "whitened", "inverse_root", "square_root")
FORGET = 1 / 16
"""Small, so that C overflows after tens of batches, not hundreds; a power of two, so that it is exact."""

FILTERS = ({}, {"state": "square_root"}, {"state": "square_root", "solution": "gain"})


def started(ranks: Ranks, form: str, d: int, dtype: torch.dtype = torch.float32) -> Any:
    prior = rk.Prior.ridge(d, 1.0)
    if form == "square_root":
        return ShardedSquareRootState(prior, ranks, dtype=dtype)
    return ShardedCovarianceState(prior, ranks, form=form, dtype=dtype)


def until_refused(ranks: Ranks, d: int, dtype: torch.dtype) -> list[tuple[int, str, bool, bool]]:
    """One direction is told of, the others grow as FORGET^-t: how far it goes, and what is left behind."""
    K, found = torch.eye(d, dtype=dtype)[:1], []
    for form in FORMS:
        state = started(ranks, form, d, dtype)
        for count in range(300):
            before = locals_of(state)
            try:
                state.update(K, forget=FORGET)
            except rk.BreakdownError as error:
                kept = same(before, locals_of(state)) and state.steps == count
                found.append((count, str(error), kept, bool(torch.isfinite(full(state.update(K))).all())))
                break
    return found


@pytest.mark.parametrize(("size", "d", "dtype"), [(2, 5, torch.float32), (3, 2, torch.float32), (2, 3, torch.float64)])
def test_it_is_refused_where_one_process_refuses_it(size: int, d: int, dtype: torch.dtype) -> None:
    outcomes = run(size, until_refused, d, dtype)
    assert all(outcome == outcomes[0] for outcome in outcomes[1:])
    assert len(outcomes[0]) == len(FORMS)
    for form, (count, text, kept, goes_on) in zip(FORMS, outcomes[0], strict=True):
        prior = rk.Prior.ridge(d, 1.0)
        single: Any = (
            rk.SquareRootState(prior, dtype=dtype)
            if form == "square_root"
            else rk.CovarianceState(prior, form=form, dtype=dtype)
        )
        for _ in range(count):
            single.commit(torch.eye(d, dtype=dtype)[:1], forget=FORGET)
        with pytest.raises(rk.BreakdownError, match=f"forget = {FORGET}"):
            single.commit(torch.eye(d, dtype=dtype)[:1], forget=FORGET)
        assert f"forget = {FORGET}" in text
        assert kept
        assert goes_on


def filtered(ranks: Ranks) -> list[tuple[bool, bool, float]]:
    d, found = 4, []
    K, V = torch.eye(d)[:1], torch.ones(1, 3)
    for more in FILTERS:
        rls = ShardedRLSFilter(torch.zeros(d, 3), rk.Prior.ridge(d, 1.0), ranks, layout="in_out", **more)
        refused = False
        for _ in range(50):
            before = rls.weight.clone()
            try:
                rls.update(K, V, forget=FORGET)
            except rk.BreakdownError:
                refused = True
                break
        unchanged = torch.equal(before, rls.weight)
        found.append((refused, unchanged, rls.update(K, V).residual_norm))
    return found


def test_a_filter_refuses_and_goes_on() -> None:
    for found in run(2, filtered):
        assert all(refused and unchanged and residual < 1.0 for refused, unchanged, residual in found)


def sent(ranks: Ranks) -> list[tuple[int, int]]:
    """Bytes of a batch with forgetting and of one without, where all directions are told of."""
    found = []
    for form in FORMS:
        state = started(ranks, form, 4)
        state._watch.guard = "off"
        state.commit(torch.eye(4), forget=0.7)
        received = [Received(), Received()]
        for forget, counter in zip((0.7, 1.0), received, strict=True):
            with counter:
                state.commit(torch.eye(4), forget=forget)
        found.append((received[0].bytes, received[1].bytes))
    return found


def test_nothing_is_sent_while_the_bound_is_enough() -> None:
    for found in run(2, sent):
        assert all(forgetting == other > 0 for forgetting, other in found)
