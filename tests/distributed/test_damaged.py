"""Saved states that are not as they were saved, on one rank or on all: refused by all, and nothing changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from support.ranks import run
from torch.distributed.tensor import DTensor

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import Ranks, ShardedCovarianceState, ShardedSquareRootState
from rlsedit_kernels.errors import RankError
from rlsedit_kernels.states.counters import Counters

D = 7
FORMS = ("plain", "whitened", "inverse_root", "square_root")
WAYS = ("missing", "NaN", "text", "None", "shape")
OTHERWISE = {"restriction", "reason", "smallest_pivot", "largest_leverage"}
"""What may be None, or any text."""


def keys(seed: int) -> torch.Tensor:
    return torch.randn(3, D, generator=torch.Generator().manual_seed(seed))


def made(ranks: Ranks | None, form: str) -> Any:
    prior = rk.Prior.anchor(torch.diag(torch.arange(1.0, D + 1)).double(), lam=0.3)
    if ranks is None:
        return rk.SquareRootState(prior) if form == "square_root" else rk.CovarianceState(prior, form=form)
    if form == "square_root":
        return ShardedSquareRootState(prior, ranks)
    return ShardedCovarianceState(prior, ranks, form=form)


def places(tree: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        yield (*before, name)
        if isinstance(value, Mapping):
            yield from places(value, (*before, name))


def damaged(tree: Any, place: tuple[str, ...], way: str) -> Any:
    """A copy with something else at one place; None where that would be no damage."""
    new = dict(tree)
    name, *below = place
    if below:
        new[name] = damaged(tree[name], tuple(below), way)
        return None if new[name] is None else new
    value = new[name]
    if way == "missing":
        del new[name]
    elif way in ("text", "None"):
        new[name] = "x" if way == "text" else None
        return None if value is new[name] else new
    elif isinstance(value, torch.Tensor):
        new[name] = value * torch.nan if way == "NaN" else torch.zeros(2, 3)
    elif way == "NaN" and isinstance(value, float):
        new[name] = float("nan")
    else:
        return None
    return new


def harmless(tree: Any, place: tuple[str, ...], way: str) -> bool:
    """Whether a state may come like that: figures that earlier versions did not save, and what may be None."""
    value = tree
    for name in place:
        value = value[name]
    if way == "missing":
        return value is None or place[0] in ("counters", "restriction")
    return way in ("None", "text") and place[-1] in OTHERWISE


def bits(state: Any) -> list[Any]:
    """What a rank has of a state."""
    found: list[Any] = [state._writes, repr(state._counters)]
    for tensor in (*vars(state._form).values(), state._probes.z, state._probes.image):
        if isinstance(tensor, torch.Tensor):
            found += (tensor.to_local() if isinstance(tensor, DTensor) else tensor).flatten().tolist()
    return found


def _loaded(ranks: Ranks | None, form: str, everywhere: bool) -> list[str]:
    """What is wrong with how damaged states were taken."""
    state, wrong = made(ranks, form), []
    for seed in range(3):
        state.update(keys(seed))
    saved = state.state_dict()
    mine = everywhere or ranks is None or ranks.rank == 1
    other = made(ranks, form)
    other.update(keys(7))
    cases = [(place, way) for place in places(saved) for way in WAYS if damaged(saved, place, way) is not None]
    for place, way in cases:
        before, text = bits(other), ""
        try:
            other.load_state_dict(damaged(saved, place, way) if mine else saved)
        except (ValueError, RankError) as error:
            text = str(error)
        if (bits(other) != before or "has ended" in text) if text else not (everywhere and harmless(saved, place, way)):
            wrong.append(f"{'/'.join(place)} {way}: {text or 'loaded'}")
            if "has ended" in text:
                return wrong
    for nothing in (None, 3, {}, {"tensors": []}):
        try:
            other.load_state_dict(nothing if mine else saved)
            wrong.append(f"{nothing}: loaded")
        except (ValueError, RankError):
            pass
    other.load_state_dict(saved)  # the ranks can go on
    other.update(keys(3))
    state.update(keys(3))
    return wrong if bits(other)[2:] == bits(state)[2:] else [*wrong, "the stream goes on otherwise"]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_damaged_on_one_rank_is_refused_by_all(form: str) -> None:
    """A rank died of a collective that the others did not make, or the group of ranks ended."""
    assert run(2, _loaded, form, False) == [[], []]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_damaged_on_all_ranks_or_in_one_process_is_refused(form: str) -> None:
    assert run(2, _loaded, form, True) == [[], []]
    assert _loaded(None, form, True) == []


def test_counters_are_those_that_were_saved() -> None:
    assert Counters.restored({"steps": -1}).steps == -1  # an earlier version took back more than was written
    assert Counters.restored({"steps": 3, "smallest_pivot": 0.5, "largest_key": float("inf")}).steps == 3
    for bad in ({"singular_writes": -1}, {"steps": True}, {"forgot": 1}, {"worst_drift": float("nan")}, {"other": 1}):
        with pytest.raises(ValueError, match="load_state_dict: "):
            Counters.restored(bad)
