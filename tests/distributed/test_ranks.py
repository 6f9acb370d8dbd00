"""Collectives of `Ranks`: the same bits on all ranks, uneven shards, and failures that all ranks hear of."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from typing import Any

import pytest
import torch
from support.ranks import run, stop

from rlsedit_kernels.distributed import Ranks, bounds
from rlsedit_kernels.distributed.ranks import _LIVES
from rlsedit_kernels.errors import RankError

SIZES = (1, 2, 3, 4)


def _collectives(ranks: Ranks, n: int) -> dict[str, torch.Tensor]:
    full = torch.arange(n * 3, dtype=torch.float64).view(n, 3)
    generator = torch.Generator().manual_seed(ranks.rank)
    term = torch.randn(5, 7, generator=generator)
    value = torch.full((2,), float(ranks.rank))
    ranks.barrier()
    return {
        "rows": ranks.gather(ranks.shard(full), n),
        "columns": ranks.gather_columns(ranks.shard(full).mT, n),
        "turned": ranks.gather(ranks.turn(ranks.shard(full).mT, n), 3),
        "sum": ranks.ordered_sum(term),
        "term": term,
        "broadcast": ranks.broadcast(value, ranks.size - 1),
        "dtensor": ranks.dtensor(ranks.shard(full), n).full_tensor(),
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n", [1, 5, 8])
def test_collectives_give_every_rank_the_same(size: int, n: int) -> None:
    full = torch.arange(n * 3, dtype=torch.float64).view(n, 3)
    found = run(size, _collectives, n)
    total = found[0]["term"].clone()
    for other in found[1:]:
        total += other["term"]
    for entry in found:
        for name in ("rows", "dtensor"):
            assert torch.equal(entry[name], full)
        assert torch.equal(entry["columns"], full.mT)
        assert torch.equal(entry["turned"], full.mT)
        assert torch.equal(entry["sum"], total)
        assert entry["broadcast"].tolist() == [size - 1.0] * 2


def test_bounds_are_those_of_torch_chunk() -> None:
    for n in range(1, 20):
        for size in range(1, 6):
            edges = bounds(n, size)
            chunks = [part.numel() for part in torch.arange(n).chunk(size)] + [0] * size
            assert [b - a for a, b in itertools.pairwise(edges)] == chunks[:size]


def _fails_alone(ranks: Ranks) -> str:
    try:
        with ranks.together("writing"):
            if ranks.rank == 1:
                raise ValueError("K must be finite")
    except ValueError as error:
        mine = f"own: {error}"
    except RankError as error:
        mine = str(error)
    with ranks.together("again"):
        pass
    return mine


def test_what_fails_on_one_rank_fails_on_all_and_they_go_on() -> None:
    found = run(3, _fails_alone)
    assert found[1] == "own: K must be finite"
    assert found[0] == found[2] == "writing: rank 1 failed: ValueError: K must be finite"


def _disagrees(ranks: Ranks) -> None:
    ranks.agree("update", steps=3, u=8 + (ranks.rank == 2))


def test_numbers_that_differ_are_an_error_everywhere() -> None:
    for outcome in run(3, _disagrees, check=False):
        assert isinstance(outcome.error, ValueError)
        assert "u must be the same on all ranks, got 8, 8, 9" in str(outcome.error)


def _raises_between_collectives(ranks: Ranks) -> None:
    with ranks.guarded("update"):
        if ranks.rank == 0:
            raise MemoryError("no room for the gain")
        ranks.gather(ranks.shard(torch.ones(8, 2)), 8)


def test_a_rank_that_raises_between_collectives_is_heard() -> None:
    begin = time.monotonic()
    found = run(3, _raises_between_collectives, check=False)
    assert isinstance(found[0].error, MemoryError)
    for outcome in found[1:]:
        assert isinstance(outcome.error, RankError)
        assert "rank 0 failed: MemoryError: no room for the gain" in str(outcome.error)
    assert time.monotonic() - begin < 15.0


def _dies(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os._exit(3)
    with ranks.guarded("update"):
        ranks.ordered_sum(torch.ones(4))


def test_a_rank_that_dies_is_named() -> None:
    found = run(3, _dies, check=False)
    assert isinstance(found[1].error, EOFError)
    for outcome in (found[0], found[2]):
        assert isinstance(outcome.error, RankError)
        assert "no sign of life from rank 1" in str(outcome.error)


def _confirms(ranks: Ranks) -> list[str]:
    found = []
    calls = [("update", 3, False), ("update", torch.nan, False), ("update", 3 + ranks.rank, False)]
    for what, u, bad in (*calls, ("update", 3, ranks.rank == 1)):
        try:
            with ranks.guarded("a call"), ranks.confirmed(what) as numbers:
                if bad:
                    raise ValueError("K must be finite")
                numbers["u"] = u
            found.append("agreed")
        except (ValueError, RankError) as error:
            found.append(str(error))
    try:
        with ranks.guarded("a call"), ranks.confirmed(("update", "remove")[ranks.rank % 2]) as numbers:
            numbers["u"] = 3
    except ValueError as error:
        found.append(str(error))
    ranks.barrier()
    return found


def test_numbers_and_failures_of_a_block_in_one_exchange() -> None:
    for rank, found in enumerate(run(2, _confirms)):
        assert found == [
            "agreed",
            "agreed",  # a NaN that all have
            "update: u must be the same on all ranks, got 3, 4; nothing was changed",
            "K must be finite" if rank else "update: rank 1 failed: ValueError: K must be finite",
            "the ranks must call the same method, got update, remove; nothing was changed",
        ]


def _moves(ranks: Ranks, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    term = torch.randn(n, 3, generator=torch.Generator().manual_seed(ranks.rank))
    rows = ranks.gather(ranks.ordered_rows(term), n)
    assert torch.equal(rows, ranks.ordered_sum(term))
    value = torch.full((2, 3), float(ranks.rank))
    if ranks.rank + 1 < ranks.size:
        ranks.send(value, ranks.rank + 1)
    if ranks.rank > 0:
        ranks.receive(value, ranks.rank - 1)
    return rows, value


@pytest.mark.parametrize(("size", "n"), [(1, 4), (3, 4), (4, 3)])
def test_rows_of_a_sum_and_what_is_sent_to_one(size: int, n: int) -> None:
    found = run(size, _moves, n)
    for rank, (rows, value) in enumerate(found):
        assert torch.equal(rows, found[0][0])
        assert value.unique().tolist() == [max(rank - 1, 0)]


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"timeout": 0.0}, ValueError),
        ({"timeout": float("inf")}, ValueError),
        ({"timeout": "5"}, TypeError),
        ({"mesh": "cpu"}, TypeError),
    ],
)
def test_arguments_are_checked(bad: dict[str, Any], error: type[Exception]) -> None:
    for outcome in run(2, _made, bad, check=False):
        assert isinstance(outcome.error, error)
        assert next(iter(bad)) in str(outcome.error)


def _made(ranks: Ranks, bad: dict[str, Any]) -> None:
    Ranks(**{"mesh": ranks.mesh, **bad})


def _starts_again(ranks: Ranks) -> tuple[str, str, int]:
    """As torchrun starts processes again, whose store and names of groups are those of the ones that failed."""
    texts = []
    for again in (ranks, Ranks(ranks.mesh)):
        try:
            with again.guarded("a step"):
                if again is ranks and ranks.rank == 1:
                    raise MemoryError("no room")
                time.sleep(0.2)
                again._reports.check()
            texts.append("nothing")
        except (MemoryError, RankError) as error:
            texts.append(str(error))
    _LIVES.pop(ranks.group)
    new = Ranks(ranks.mesh)
    new.barrier()
    return texts[0], texts[1], len(new.gather(new.shard(torch.ones(5)), 5))


def test_what_ended_a_group_does_not_end_the_one_that_is_started_again() -> None:
    found = run(3, _starts_again)
    stop()
    for rank, (text, repeated, rows) in enumerate(found):
        assert text.startswith("no room" if rank == 1 else "a step: rank 1 failed: MemoryError: no room")
        assert "this group of ranks has ended" in repeated
        assert rows == 5


def threads_of_many(ranks: Ranks) -> int:
    """Threads that are left of 20 `Ranks` which nobody has any more."""
    gc.collect()
    before = set(threading.enumerate())
    for _ in range(20):
        Ranks(ranks.mesh).barrier()
    gc.collect()
    until = time.monotonic() + 10.0
    while (left := set(threading.enumerate()) - before) and time.monotonic() < until:
        time.sleep(0.01)
    return len(left)


def test_ranks_that_nobody_has_leave_no_thread() -> None:
    """Each state that was made from a mesh left one, with its memory."""
    assert run(2, threads_of_many) == [0, 0]
