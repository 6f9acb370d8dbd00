"""What goes wrong on one rank of a sharded covariance is heard on all of them, and no state is half changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from support.bits import same
from support.ranks import run
from support.sharded import columns, full, keys, locals_of, prior

from rlsedit_kernels.distributed import Ranks, ShardedCovarianceState, ShardedSquareRootState
from rlsedit_kernels.errors import LeverageError, RankError

D = 13


def started(ranks: Ranks, form: str = "plain") -> ShardedCovarianceState:
    state = ShardedCovarianceState(prior("anchor", D), ranks, form=form)
    state.commit(keys(3, D, 1))
    return state


def refused(ranks: Ranks, form: str) -> tuple[list[tuple[str, str]], torch.Tensor]:
    """One rank at a time gives something else than the others; all go on afterwards."""
    state, last = started(ranks, form), ranks.rank == ranks.size - 1
    K = keys(4, D, 2)
    bad, other = K.clone(), keys(4, D, 3)
    bad[1, 2] = torch.nan
    calls: tuple[Callable[[], Any], ...] = (
        lambda: state.update(bad if last else K),
        lambda: state.update(K[:, :5] if last else K),
        lambda: state.update(K.long() if last else K),
        lambda: state.update(None if last else K),
        lambda: state.update(columns(ranks, bad)),
        lambda: state.update(K, -1.0 if last else 1.0),
        lambda: state.restrict(K if last else torch.eye(D)[:, :2]),
        lambda: state.refactor([(bad if last else K, 1.0)]),
        lambda: state.update(K[:3] if last else K),
        lambda: state.update(K.double() if last else K),
        lambda: state.update(other if last else K),
        lambda: state.update(K, 2.0 if last else 1.0),
        lambda: state.update(K, forget=0.5 if last else 1.0),
        lambda: state.update(columns(ranks, K) if last else K),
        lambda: state.remove(K) if last else state.update(K),
        lambda: state.health() if last else state.update(K),
        lambda: state.refactor([(K, 1.0)] * (1 + last)),
    )
    found = []
    for call in calls:
        before = locals_of(state)
        try:
            call()
            found.append(("", ""))
        except (ValueError, TypeError, RankError) as error:
            found.append((type(error).__name__, str(error)))
        assert same(before, locals_of(state))
        assert state.steps == 1
    behind = state.clone()
    behind.commit(other)
    try:
        (behind if last else state).update(K)
    except ValueError as error:
        found.append(("ValueError", str(error)))
    return found, full(state.update(K))


@pytest.mark.parametrize("form", ["plain", "inverse_root"])
def test_wrong_or_different_input_is_refused_by_all_ranks(form: str) -> None:
    wanted = (
        "finite, got NaN",
        "K must have shape",
        "K must be floating point",
        "K must be a torch.Tensor",
        "finite, got NaN",
        "noise must be finite and >= 0",
        "Q must have shape",
        "finite, got NaN",
        "u must be the same on all ranks, got 4, 3",
        "the number of the dtype of K must be the same",
        "the digest of K must be the same",
        "noise must be the same on all ranks, got 1, 2",
        "forget must be the same on all ranks, got 1, 0.5",
        "whether K is sharded must be the same",
        "the ranks must call the same method, got update, remove",
        "the ranks must call the same method, got update, health",
        "whether there is another batch must be the same",
        "the number of changes so far must be the same",
    )
    outcomes = run(2, refused, form)
    undisturbed = run(2, undisturbed_gain, form)[0]
    for rank, (found, gain) in enumerate(outcomes):
        assert len(found) == len(wanted)
        for i, ((kind, text), part) in enumerate(zip(found, wanted, strict=True)):
            assert part in text, (rank, i, text)
            at = 0 if i == 4 else 1  # where the input is wrong; from the ninth call on it only differs
            assert (kind == "RankError") == (i < 8 and rank != at), (rank, i, kind)
            assert kind != "RankError" or f"rank {at} failed" in text
        assert torch.equal(gain, undisturbed)


def undisturbed_gain(ranks: Ranks, form: str) -> torch.Tensor:
    return full(started(ranks, form).update(keys(4, D, 2)))


def broken_at(ranks: Ranks, form: str, place: str, how: str) -> tuple[str, bool, str]:
    """The last rank raises or dies at a place within an update; what the rank raises, and then raises again."""
    state = started(ranks, form)
    before, again = locals_of(state), ""

    def fails(*args: Any, **kwargs: Any) -> Any:
        if how == "dies":
            os._exit(3)
        raise MemoryError("no room")

    target = {
        "coordinates": (type(state._form), "coordinates"),
        "products": (type(state._form), "products"),
        "gather": (Ranks, "gather"),
        "ordered_sum": (Ranks, "ordered_sum"),
        "factor": ("rlsedit_kernels.states.batch", "factor"),
        "back": (type(state._form), "back"),
    }[place]
    patch: Any = mock.patch(f"{target[0]}.{target[1]}", fails) if isinstance(target[0], str) else None
    patch = patch or mock.patch.object(target[0], target[1], fails)
    with patch if ranks.rank == ranks.size - 1 else mock.patch("os.environ", os.environ):
        try:
            state.update(keys(4, D, 2))
            text = "nothing"
        except (MemoryError, RankError) as error:
            text = f"{type(error).__name__}: {error}"
    try:
        state.health()
    except RankError as error:
        again = str(error)
    return text, same(before, locals_of(state)) and state.steps == 1, again


@pytest.mark.parametrize(
    ("form", "place", "ends"),
    [
        ("plain", "factor", False),
        ("inverse_root", "back", False),
        ("plain", "gather", True),
        ("inverse_root", "products", True),
        ("whitened", "ordered_sum", True),
    ],
)
def test_a_rank_that_raises_is_heard_and_nothing_is_written(form: str, place: str, ends: bool) -> None:
    outcomes = [outcome.value for outcome in run(3, broken_at, form, place, "raises", check=False, limit=40.0)]
    from support.ranks import stop

    if ends:
        stop()
    for rank, (text, unchanged, again) in enumerate(outcomes):
        assert unchanged
        assert text.startswith("MemoryError" if rank == 2 else "RankError"), text
        assert rank == 2 or "rank 2 failed: MemoryError: no room" in text
        assert ("has ended" in again) == ends


@pytest.mark.parametrize(("form", "place"), [("plain", "coordinates"), ("inverse_root", "factor")])
def test_a_rank_that_dies_is_named_and_nothing_is_written(form: str, place: str) -> None:
    outcomes = run(3, broken_at, form, place, "dies", check=False, limit=40.0)
    assert isinstance(outcomes[2].error, EOFError)
    for outcome in outcomes[:2]:
        text, unchanged, _ = outcome.value
        assert unchanged
        assert "no sign of life from rank 2" in text, text


def refused_alike(ranks: Ranks, form: str) -> list[str]:
    """What all ranks find by themselves; the group lives on."""
    state, found = started(ranks, form), []
    K, Q = keys(2, D, 4), torch.eye(D)[:, :2]
    prepared = state.prepare(K)
    state.commit(K)
    calls: list[Callable[[], Any]] = [lambda: state.write(prepared)]
    calls += [lambda Q=Q: state.restrict(Q) for Q in (None, Q[:5], Q.long())]  # type: ignore[misc]
    for call in calls:
        before = locals_of(state)
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        found.append(str(caught.value))
        assert same(before, locals_of(state))
    state.restrict(Q)
    before = locals_of(state)
    with pytest.raises(LeverageError) as refusal:
        state.remove(0.5 * Q.mT)
    found.append(str(refusal.value))
    assert same(before[:-2], locals_of(state)[:-2])  # probes are made anew behind a restriction
    state.remove(K)
    return found


@pytest.mark.parametrize("form", ["plain", "whitened", "inverse_root"])
def test_what_all_ranks_refuse_leaves_the_group_alive(form: str) -> None:
    wanted = (
        "has changed since",
        "Q must be a torch.Tensor",
        "Q must have shape",
        "Q must be floating",
        "lets nothing",
    )
    for found in run(2, refused_alike, form):
        for text, part in zip(found, wanted, strict=True):
            assert part in text


def misbuilt(ranks: Ranks, kind: type[Any]) -> list[str]:
    """Batches for a rebuild that are none, on one rank or on all."""
    state, K, found = kind(prior("anchor", D), ranks), keys(2, D, 1), []
    state.commit(K)
    for given in (None, [K], [(K, 1.0, 2)], [(K, 1.0)] if ranks.rank else [(K,)]):
        with pytest.raises((TypeError, RankError)) as caught:
            state.refactor(given)
        found.append(str(caught.value))
    state.refactor([(K, 1.0)])
    return found


@pytest.mark.parametrize("kind", [ShardedCovarianceState, ShardedSquareRootState])
def test_batches_that_are_none_leave_the_group_alive(kind: type[Any]) -> None:
    for found in run(2, misbuilt, kind):
        assert "must be an iterable of pairs (K, noise), got NoneType" in found[0]
        assert "must be pairs (K, noise), got a Tensor" in found[1]
        assert all("must be pairs (K, noise), got a tuple of" in text for text in found[2:])
