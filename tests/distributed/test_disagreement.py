"""Ranks that were given different arguments: an error on all of them at once, nothing changed, and they can go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.bits import same
from support.ranks import run
from support.sharded import columns, full, keys, locals_of

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import Ranks, ShardedCovarianceState, ShardedSquareRootState, StateBank
from rlsedit_kernels.distributed.filter import ShardedRLSFilter
from rlsedit_kernels.errors import RankError

D, V = 9, 4
FORMS = ("plain", "whitened", "inverse_root", "square_root")
PRIOR = rk.Prior.ridge(D, 0.7)


def made(ranks: Ranks, form: str, **more: Any) -> Any:
    if form == "square_root":
        return ShardedSquareRootState(PRIOR, ranks, **more)
    return ShardedCovarianceState(PRIOR, ranks, form=form, **more)


def filtered(ranks: Ranks, form: str, **more: Any) -> ShardedRLSFilter:
    state = "square_root" if form == "square_root" else "covariance"
    form = "auto" if form == "square_root" else form
    return ShardedRLSFilter(torch.zeros(D, V), PRIOR, ranks, state, layout="in_out", form=form, **more)


def parts(state: Any) -> list[Any]:
    found = locals_of(state) if state._form is not None else [state._probes.z.clone(), state._probes.image.clone()]
    return [*found, state.steps, state._writes]


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, TypeError, RankError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def damage(form: Any) -> None:
    """Break a state on the ranks that have its first row."""
    matrix = next(getattr(form, name) for name in ("L", "C", "A", "matrix") if hasattr(form, name))
    if matrix.shape[0] and form.ranks.rank == 0:
        matrix[0, 0] *= 3.0


def batches() -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    return [(keys(3, D, seed), keys(3, V, 50 + seed), 1.0) for seed in range(4)]


def _constructed(ranks: Ranks, form: str) -> list[str]:
    last = ranks.rank == ranks.size - 1
    history = list if last else None
    return [
        said(lambda: made(ranks, form, guard="off" if last else "auto")),
        said(lambda: made(ranks, form, history=history)),
        said(lambda: filtered(ranks, form, guard="off" if last else "auto")),
        said(lambda: filtered(ranks, form, history=history)),
        said(lambda: made(ranks, form).update(keys(3, D, 1))),
    ]


@pytest.mark.parametrize("form", FORMS)
def test_a_guard_or_a_history_of_some_ranks_is_refused_when_a_state_is_made(form: str) -> None:
    """A square-root state was made, and its ranks fell out of step with its first check."""
    for found in run(2, _constructed, form):
        for text, what in zip(found, ["whether guard is on", "whether there is a history"] * 2, strict=False):
            assert f"{what} must be the same on all ranks" in text
        assert found[-1] == "nothing"


def _repaired(ranks: Ranks, form: str, of: str) -> tuple[list[str], bool]:
    """A state that breaks where one rank alone has a history, then one whose history fails on one rank."""
    subject: Any = filtered(ranks, form) if of == "filter" else made(ranks, form)
    state = subject.state if of == "filter" else subject
    given = batches() if of == "filter" else [(K, noise) for K, _, noise in batches()]
    for batch in given:
        subject.update(*batch)
    damage(state._form)
    before, found = parts(state), []

    def failing() -> list[Any]:
        if ranks.rank:
            raise OSError("no such file")
        return given

    for history in (given.copy if ranks.rank == 0 else None, failing):
        subject.history = history
        try:
            subject.update(*given[0])
        except (ValueError, OSError, RankError) as error:
            found.append(f"{type(error).__name__}: {error}")
    unchanged = same(before, parts(state))
    subject.history = given.copy
    subject.update(*given[0])  # which repairs it: the ranks can go on
    return found, unchanged and state.health().repairs == 1


@pytest.mark.parametrize("of", ["state", "filter"])
@pytest.mark.parametrize("form", ["plain", "inverse_root", "square_root"])
def test_a_state_is_repaired_by_all_ranks_or_by_none(form: str, of: str) -> None:
    """One rank said that the state was broken, and the others waited for it to rebuild it with them."""
    for rank, (found, well) in enumerate(run(2, _repaired, form, of)):
        assert "whether there is a history must be the same on all ranks" in found[0]
        assert ("OSError: no such file" if rank else "RankError: look: rank 1 failed: OSError: no such file") in found[
            1
        ]
        assert well


def _removed(ranks: Ranks, form: str, of: str) -> tuple[str, bool]:
    subject: Any = filtered(ranks, form) if of == "filter" else made(ranks, form)
    state = subject.state if of == "filter" else subject
    huge, target = torch.ones(1, D) * 1e6, [torch.ones(1, V)] if of == "filter" else []
    first = batches()[0] if of == "filter" else (batches()[0][0], 1.0)
    subject.update(*first)
    subject.update(huge, *target, 1e-6)
    before = parts(state)
    text = said(lambda: subject.remove(huge, *target, 1e-6, remaining=[first] if ranks.rank == 0 else None))
    unchanged = same(before, parts(state))
    subject.remove(huge, *target, 1e-6, remaining=[first])
    return text, unchanged and state.steps == 1


@pytest.mark.parametrize("of", ["state", "filter"])
@pytest.mark.parametrize("form", FORMS)
def test_batches_that_remain_are_given_to_all_ranks_or_to_none(form: str, of: str) -> None:
    """A rank without them said that the batch cannot be removed, and the others waited for it to rebuild the state."""
    for text, well in run(2, _removed, form, of):
        assert "whether remaining is given must be the same on all ranks" in text
        assert well


def _gained(ranks: Ranks, form: str) -> tuple[str, bool]:
    state = made(ranks, form)
    before = parts(state)
    text = said(lambda: state.update(keys(3, D, 1)) if ranks.rank else state.gain(keys(3, D, 1)))
    unchanged = same(before, parts(state))
    state.update(keys(3, D, 1))
    return text, unchanged


@pytest.mark.parametrize("form", FORMS)
def test_a_gain_on_some_ranks_and_an_update_on_others_is_neither(form: str) -> None:
    """The batch was written on some ranks, and said so only with the next one."""
    for text, unchanged in run(2, _gained, form):
        assert "the ranks must call the same method, got gain, update" in text
        assert unchanged


def _banked(ranks: Ranks) -> tuple[list[str], bool, int]:
    bank = StateBank({e: rk.Prior.ridge(D, 1.0) for e in range(4)}, ranks)
    given = {e: (keys(3, D, e), 1.0) for e in range(4)}
    bank.update(given)
    before, first = bank.state_dict()["states"], ranks.rank == 0
    found = [
        said(lambda: bank.update(given, gather=first)),
        said(lambda: bank.gain(given, gather=first)),
        said(lambda: bank.remove(given, gather=first)),
        said(lambda: bank.gain(given) if first else bank.update(given)),
    ]
    unchanged = same(before, bank.state_dict()["states"])
    return found, unchanged, len(bank.update(given, gather=True))


def test_ranks_of_a_bank_ask_for_the_same() -> None:
    """Ranks that wanted all gains waited for those that did not."""
    for found, unchanged, gains in run(2, _banked):
        assert all("whether gains go to all ranks must be the same on all ranks" in text for text in found[:3])
        assert "the ranks must call the same method, got gain, update" in found[3]
        assert unchanged
        assert gains == 4


def _restricted(ranks: Ranks, form: str) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    Q = torch.linalg.qr(keys(2, D, 9).mT)[0].contiguous()
    rows, turned = ranks.dtensor(ranks.shard(Q), D), columns(ranks, Q)
    found, gains = [], []
    for given in (Q, rows):
        state = made(ranks, form)
        state.update(keys(3, D, 1))
        if given is rows:
            found = [
                said(lambda state=state: state.restrict(turned)),
                said(lambda state=state: state.restrict(2 * rows)),
            ]
            found.append(said(lambda state=state: state.restrict(Q if ranks.rank else rows)))
        state.restrict(given)
        gains.append(full(state.update(keys(3, D, 2))))
    return found, gains[0], gains[1]


@pytest.mark.parametrize("form", FORMS)
def test_directions_may_come_as_rows_of_the_ranks(form: str) -> None:
    """A square-root state failed on them, with an error of torch's about mixed tensors."""
    for found, whole, sharded in run(2, _restricted, form):
        assert "Q must be sharded over d (Shard(0)) or replicated" in found[0]
        assert "must be orthonormal" in found[1]
        assert "must be the same on all ranks" in found[2]
        assert float((whole - sharded).norm()) < 1e-5 * float(whole.norm())
