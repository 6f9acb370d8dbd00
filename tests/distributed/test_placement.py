"""Placement of states on ranks: its bound, groups kept together, and what no rank can keep."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsedit_kernels.distributed import Placement, place

SIZES = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=40)


@given(SIZES, st.integers(1, 9))
def test_largest_load_is_within_the_bound_of_longest_first(sizes: list[float], ranks: int) -> None:
    found = place(sizes, ranks)
    mean, largest = sum(sizes) / ranks, max(sizes)
    assert max(found.loads) <= mean + (1.0 - 1.0 / ranks) * largest + 1e-9 * mean
    _whole(found, sizes, ranks)


@given(st.lists(st.tuples(st.floats(0.01, 100.0), st.sampled_from("abc")), min_size=1, max_size=40), st.integers(1, 9))
def test_groups_cost_at_most_the_tolerance(states: list[tuple[float, str]], ranks: int) -> None:
    sizes = [size for size, _ in states]
    together = place(sizes, ranks, groups=[name for _, name in states])
    _whole(together, sizes, ranks)
    assert max(together.loads) <= 1.05 * max(place(sizes, ranks).loads) * (1 + 1e-9)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 3))
def test_longest_first_is_within_four_thirds_of_the_best(sizes: list[int], ranks: int) -> None:
    best = min(
        max(sum(size for size, at in zip(sizes, owners, strict=True) if at == rank) for rank in range(ranks))
        for owners in itertools.product(range(ranks), repeat=len(sizes))
    )
    assert max(place(sizes, ranks).loads) <= (4.0 / 3.0 - 1.0 / (3.0 * ranks)) * best + 1e-9


def _whole(found: Placement, sizes: list[float], ranks: int) -> None:
    """Every state is on one rank, and loads are the sums of what is there."""
    assert found.sharded == ()
    assert found.ranks == ranks
    assert sorted(i for rank in range(ranks) for i in found.of(rank)) == list(range(len(sizes)))
    for rank in range(ranks):
        assert found.loads[rank] == pytest.approx(sum(sizes[i] for i in found.of(rank)))


def test_experts_of_a_layer_stay_side_by_side() -> None:
    layers = [layer for layer in range(2) for _ in range(16)]
    found = place([1.0] * 32, 4, groups=layers)
    assert found.balance == 1.0
    for rank in range(4):
        kept = found.of(rank)
        assert len({layers[i] for i in kept}) == 1
        assert kept == tuple(range(kept[0], kept[0] + 8))
    scattered = place([1.0] * 32, 4)
    assert scattered.balance == 1.0
    assert scattered.of(0) == tuple(range(0, 32, 4))


def test_groups_give_way_to_balance() -> None:
    # two of 6 in one group fill 12 of a mean of 10: they part
    found = place([6.0, 6.0, 4.0, 4.0], 2, groups=["a", "a", "b", "b"])
    assert found.loads == (10.0, 10.0)
    # whole groups, where they come out even: 3 + 3 against 2 + 2 + 2, which longest first misses (7 and 5)
    sizes, groups = [3.0, 3.0, 2.0, 2.0, 2.0], ["a", "a", "b", "b", "b"]
    assert place(sizes, 2, groups=groups).loads == (6.0, 6.0)
    assert sorted(place(sizes, 2).loads) == [5.0, 7.0]


def test_work_is_balanced_and_memory_kept() -> None:
    found = place([1.0, 1.0, 4.0, 4.0], 2, work=[8.0, 8.0, 1.0, 1.0], memory=6.0)
    assert found.loads == (9.0, 9.0)
    assert found.bytes == (5.0, 5.0)
    # by work alone states 0 and 1 would stay with 2 and 3 apart; a full rank is passed over
    tight = place([3.0, 3.0, 2.0], 2, work=[1.0, 9.0, 0.5], memory=5.0)
    assert sorted(tight.bytes) == [3.0, 5.0]
    assert max(tight.bytes) <= 5.0
    assert tight.sharded == ()


def test_a_state_larger_than_a_rank_is_sharded() -> None:
    found = place([100.0, 8.0, 7.0, 6.0], 4, memory=40.0)
    assert found.owners[0] is None
    assert found.sharded == (0,)
    assert found.bytes == (33.0, 32.0, 31.0, 25.0)
    assert sum(found.loads) == 121.0


def test_what_finds_no_room_is_sharded_too() -> None:
    # 6 + 6 + 6 on two ranks of 10: the third fits neither, but its halves do
    found = place([6.0, 6.0, 6.0], 2, memory=10.0)
    assert len(found.sharded) == 1
    assert found.bytes == (9.0, 9.0)


@given(SIZES, st.integers(1, 6), st.floats(0.2, 3.0))
def test_the_memory_limit_is_kept_or_refused(sizes: list[float], ranks: int, share: float) -> None:
    memory = share * sum(sizes) / ranks
    groups = [size > 50.0 for size in sizes]
    if share < 1.0 - 1e-6:
        with pytest.raises(ValueError, match="more ranks"):
            place(sizes, ranks, memory=memory, groups=groups)
        return
    found = place(sizes, ranks, memory=memory * (1 + 1e-6), groups=groups)
    assert max(found.bytes) <= memory * (1 + 2e-6)
    assert sum(found.bytes) == pytest.approx(sum(sizes))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"sizes": [1.0, 0.0], "ranks": 2}, "sizes[1] must be finite and > 0, got 0"),
        ({"sizes": [float("nan")], "ranks": 2}, "sizes[0] must be finite"),
        ({"sizes": [1.0], "ranks": 0}, "ranks must be >= 1, got 0"),
        ({"sizes": [1.0], "ranks": 2, "work": [-1.0]}, "work[0] must be finite and >= 0"),
        ({"sizes": [1.0], "ranks": 2, "work": [1.0, 2.0]}, "work must have one entry a state, 1, got 2"),
        ({"sizes": [1.0], "ranks": 2, "groups": []}, "groups must have one entry a state"),
        ({"sizes": [1.0], "ranks": 2, "memory": 0.0}, "memory must be positive"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        place(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"sizes": ["a"], "ranks": 2}, {"sizes": [1.0], "ranks": 2.0}])
def test_types_are_checked(arguments: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        place(**arguments)  # type: ignore[arg-type]
