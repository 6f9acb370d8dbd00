"""A carried solution over ranks that is read behind every batch: added to by gains, solved for every sixteenth time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from support.ranks import run
from support.sharded import columns, full, prior

import rlsedit_kernels as rk
from rlsedit_kernels.diagnostics import make_stream
from rlsedit_kernels.distributed import Ranks
from rlsedit_kernels.distributed.filter import ShardedRLSFilter
from rlsedit_kernels.distributed.square_root_volume import carried_bytes
from rlsedit_kernels.distributed.volume import Received
from rlsedit_kernels.solutions import _GAIN_STEPS

D, U, V = 48, 6, 10
EASY = make_stream("easy", D, U, V).prior
PLACES = [("rows", "in_out"), ("columns", "out_in"), ("everywhere", "in_out")]


def given(name: str, count: int) -> list[Any]:
    return list(islice(make_stream(name, D, U, V).batches(), count))


def first_weight(d: int = D, v: int = V, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(d, v, dtype=dtype, generator=torch.Generator().manual_seed(5))


def laid(ranks: Ranks, W: torch.Tensor, place: str, layout: str = "in_out") -> torch.Tensor:
    """The weight, given in row form, as a rank has it."""
    W = W if layout == "in_out" else W.mT.contiguous()
    if place == "everywhere":
        return W.clone()
    dim = ("rows", "columns").index(place) ^ (layout == "out_in")
    own = ranks.rows(W.shape[dim])
    return ranks.dtensor(W.narrow(dim, own.start, own.stop - own.start).contiguous(), W.shape[dim], dim)


def made(ranks: Ranks | None, start: rk.Prior, place: str = "rows", layout: str = "in_out", **more: Any) -> Any:
    """A filter whose solution is carried, over ranks or in one process."""
    W = first_weight(start.d)
    if ranks is None:
        return rk.RLSFilter(W if layout == "in_out" else W.mT.contiguous(), start, "square_root", layout=layout, **more)
    return ShardedRLSFilter(laid(ranks, W, place, layout), start, ranks, "square_root", layout=layout, **more)


def followed(rls: Any, batches: list[Any], *, read: bool) -> Any:
    for batch in batches:
        dtype = rls.state.dtype
        rls.update(batch.K.to(dtype), batch.V.to(dtype), batch.noise, batch.forget)
        if read:
            _ = rls.weight
    return rls


def solves(rls: Any) -> list[int]:
    """Grows with every triangular solve for the weight."""
    found: list[int] = []
    solve = rls.state.solve

    def counted(B: torch.Tensor) -> torch.Tensor:
        found.append(len(found))
        return solve(B)

    rls.state.solve = counted
    return found


def _both(ranks: Ranks, name: str, place: str, layout: str, count: int) -> list[Any]:
    """Weight, R, B and objective of a stream, its weight read at the end alone and behind every batch."""
    found, start, batches = [], make_stream(name, D, U, V).prior, given(name, count)
    for read in (False, True):
        rls = followed(made(ranks, start, place, layout), batches, read=read)
        steps = rls._solution._steps
        W = full(rls.weight)
        parts = W if layout == "in_out" else W.mT.contiguous()
        found.append((parts, full(rls.state.factor), full(rls._solution.B), rls.objective, steps))
    return found


@pytest.mark.parametrize(
    ("name", "size", "place"),
    [
        ("easy", 2, 0),
        ("anchored", 3, 1),
        ("condition-1e6", 2, 2),
        ("weak-0.01", 3, 0),
        ("tiny", 2, 1),
        ("huge", 3, 2),
        ("forgetting", 2, 0),
        ("falling-noise", 3, 1),
    ],
)
def test_it_is_as_exact_as_one_that_is_solved_for_once(name: str, size: int, place: int) -> None:
    count = 3 * _GAIN_STEPS - 1
    every = run(size, _both, name, *PLACES[place], count)
    start, batches = make_stream(name, D, U, V).prior, given(name, count)
    exact = rk.RLSFilter(first_weight().double(), start, "square_root", layout="in_out", dtype=torch.float64)
    followed(exact, batches, read=False)
    R, alone = exact.state.factor, followed(made(None, start), batches, read=True)
    for (solved, *unread), (read, *behind) in every:
        errors = [float((R @ (W.double() - exact.weight)).norm()) for W in (solved, read, alone.weight)]
        assert errors[1] < 1.5 * errors[0]
        assert errors[1] < 2.0 * errors[2]
        assert torch.equal(unread[0], behind[0])  # reading changes nothing but the weight
        assert torch.equal(unread[1], behind[1])
        assert unread[2] == behind[2]
        assert behind[3] > 0  # gains were added
        assert torch.equal(read, every[0][1][0])  # the same bits on all ranks


def _counted_solves(ranks: Ranks | None, place: str) -> list[int]:
    rls, found = made(ranks, EASY, place), []
    count = solves(rls)
    for i, batch in enumerate(given("easy", 2 * (_GAIN_STEPS + 1))):
        rls.update(batch.K.float(), batch.V.float())
        if i % 23 != 20:  # now and then nobody reads
            _ = rls.weight, rls.weight
        found.append(len(count))
    return found


@pytest.mark.parametrize(("size", "place"), [(1, "rows"), (3, "columns")])
def test_it_is_solved_for_when_one_process_solves_for_it(size: int, place: str) -> None:
    alone = _counted_solves(None, place)
    assert alone[-1] < len(alone) / 5
    assert run(size, _counted_solves, place) == [alone] * size


CASES = [("ridge", 3, 1), ("anchor", 23, 5), ("null_space", 22, 6)]


def _received(ranks: Ranks, kind: str, d: int, v: int, place: str, sharded: bool) -> list[int]:
    start, W = prior(kind, d), first_weight(d, v)
    rls = ShardedRLSFilter(laid(ranks, W, place), start, ranks, "square_root", layout="in_out", guard="off")
    found = []
    for seed in range(4):
        K = torch.randn(5, d, generator=torch.Generator().manual_seed(seed))
        targets = torch.randn(5, v, generator=torch.Generator().manual_seed(50 + seed))
        for call in (
            lambda K=K, targets=targets: rls.update(*((columns(ranks, A) if sharded else A) for A in (K, targets))),
            lambda: rls.weight,
        ):
            with Received() as counter:
                call()
            found.append(counter.bytes)
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("kind", "d", "v"), CASES)
def test_the_bytes_received_are_those_of_the_formula(size: int, kind: str, d: int, v: int) -> None:
    rank = prior(kind, d).factor.rank if kind == "null_space" else None
    for place, _ in PLACES:
        sharded = bool((size + d) % 2)
        for process, found in enumerate(run(size, _received, kind, d, v, place, sharded)):
            first, step, weight = (
                carried_bytes(
                    what, d, v, 5, size, process, place=place, rank=rank, keys_sharded=sharded, targets_sharded=sharded
                )
                for what in ("update", "step", "weight")
            )
            assert found == [first, weight, step, 0, step, 0, step, 0], (place, process)


def test_a_step_sends_nothing_of_the_size_of_the_weight() -> None:
    for place, _ in PLACES:
        step, solve = (carried_bytes(what, 4096, 4096, 8, 4, 0, place=place) for what in ("step", "weight"))
        assert step < solve / 50
    with pytest.raises(ValueError, match="what must be one of"):
        carried_bytes("read", 4, 4, 1, 2, 0, place="rows")


def _small(ranks: Ranks, d: int, v: int, place: str) -> torch.Tensor:
    start, W = prior("anchor", d), first_weight(d, v)
    rls = ShardedRLSFilter(laid(ranks, W, place), start, ranks, "square_root", layout="in_out")
    return full(_along_small(rls, d, v))


def _along_small(rls: Any, d: int, v: int) -> torch.Tensor:
    for seed in range(4):
        K = torch.randn(2, d, generator=torch.Generator().manual_seed(seed))
        rls.update(K, torch.randn(2, v, generator=torch.Generator().manual_seed(50 + seed)))
        _ = rls.weight
    return rls.weight


@pytest.mark.parametrize("place", ["rows", "columns", "everywhere"])
@pytest.mark.parametrize(("size", "d", "v"), [(4, 2, 5), (4, 9, 1), (3, 1, 1)])
def test_ranks_without_rows_or_columns_take_part(size: int, d: int, v: int, place: str) -> None:
    alone = rk.RLSFilter(first_weight(d, v), prior("anchor", d), "square_root", layout="in_out")
    expected = _along_small(alone, d, v)
    for W in run(size, _small, d, v, place):
        torch.testing.assert_close(W, expected, rtol=1e-4, atol=1e-5)


def _taken_back(ranks: Ranks, change: str, place: str) -> tuple[int, torch.Tensor, torch.Tensor]:
    batches = given("easy", 8)
    rls = followed(made(ranks, EASY, place), batches[:5], read=True)
    if change == "remove":
        rls.remove(batches[1].K.float(), batches[1].V.float())
    else:
        rls.refactor([(b.K.float(), b.V.float(), b.noise) for i, b in enumerate(batches[:5]) if i != 1])
    count = solves(rls)
    first = full(rls.weight)
    solved = len(count)
    return solved, first, full(followed(rls, batches[5:], read=True).weight)


@pytest.mark.parametrize("place", ["rows", "columns"])
@pytest.mark.parametrize("change", ["remove", "refactor"])
def test_what_takes_batches_back_is_followed_by_a_solve(change: str, place: str) -> None:
    batches, start = given("easy", 8), EASY
    left = [b for i, b in enumerate(batches) if i != 1]
    expected = [followed(made(None, start), part, read=False).weight for part in (left[:4], left)]
    for solved, *found in run(2, _taken_back, change, place):
        assert solved == 1
        for W, other in zip(found, expected, strict=True):
            assert float((W - other).norm()) < 2e-6 * float(other.norm())


def _too_large(ranks: Ranks) -> tuple[int, bool, int]:
    rls = made(ranks, rk.Prior.ridge(D, 1e-14))
    rls.update(torch.eye(D)[:1], torch.ones(1, V))
    _ = rls.weight
    count = solves(rls)
    rls.update(torch.eye(D)[1:2] * 1e-12, torch.full((1, V), 8e25))
    before = len(count)
    return before, bool(torch.isfinite(full(rls.weight)).all()), len(count)


def test_a_change_too_large_for_its_gain_is_left_to_the_solve() -> None:
    """A gain of 1e12 and a target of 8e25: near the end of float32, and so may be what the product is added to."""
    assert run(2, _too_large) == [(0, True, 1)] * 2


def _refused(ranks: Ranks, where: str) -> tuple[str, bool, bool]:
    """A batch that cannot be written, or that not all ranks want to write alike, then the stream goes on."""
    batches = given("easy", 5)
    rls, other = (followed(made(ranks, EASY), batches[:3], read=True) for _ in range(2))
    before, text = full(rls.weight), ""
    K, targets = batches[3].K.float(), batches[3].V.float()
    calls: dict[str, Callable[[], Any]] = {
        "size": lambda: rls.update(K, torch.full((U, V), 3e38)),
        "reader": lambda: rls.update(batches[3].K.float(), batches[3].V.float()),
        "one rank": lambda: rls.update(K, targets * (float("nan") if ranks.rank else 1.0)),
    }
    if where == "reader":  # one rank reads behind the next batch, the other does not
        for one in (rls, other):
            one.update(K, targets)
        if ranks.rank == 0:
            _ = rls.weight
        before, batches[3] = other.weight, batches[4]
        before = full(before)
    try:
        calls[where]()
    except (ValueError, rk.errors.RankError) as error:
        text = f"{type(error).__name__}: {error}"
    unchanged = torch.equal(full(rls.weight), before)
    for one in (rls, other):
        one.update(batches[3].K.float(), batches[3].V.float())
    return text, unchanged, torch.equal(full(rls.weight), full(other.weight))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("size", "the right-hand side would grow"),
        ("reader", "whether weight was read behind the last batch, by all ranks together, must be the same on all"),
        ("one rank", "V must be finite"),
    ],
)
def test_a_batch_that_is_refused_leaves_the_weight_as_it_was(where: str, message: str) -> None:
    for text, unchanged, alike in run(2, _refused, where):
        assert message in text
        assert unchanged
        assert alike


def _overflowing(ranks: Ranks) -> tuple[str, bool, torch.Tensor]:
    rls = made(ranks, rk.Prior.ridge(D, 1e-25))
    text, before = "", full(rls.weight)
    try:
        rls.update(torch.full((1, D), 1e15), torch.ones(1, V))
    except ValueError as error:
        text = str(error)
    unchanged = torch.equal(full(rls.weight), before) and rls.state.steps == 0
    rls.update(torch.eye(D)[:2], torch.ones(2, V))
    return text, unchanged, full(rls.weight)


def test_keys_that_overflow_behind_the_factor_are_refused() -> None:
    """They made the objective NaN, or ended the group of ranks."""
    for text, unchanged, W in run(2, _overflowing):
        assert "K R^-1 overflows torch.float32" in text
        assert unchanged
        assert bool(torch.isfinite(W).all())


def _in_inference_mode(ranks: Ranks, place: str, mode: bool) -> list[torch.Tensor]:
    found = []
    with torch.inference_mode(mode):
        weight = laid(ranks, first_weight(), place)
        rls = ShardedRLSFilter(weight, EASY, ranks, "square_root", layout="in_out", inplace=place != "rows")
        for batch in given("easy", 4):
            rls.update(batch.K.float(), batch.V.float())
            found.append(full(rls.weight))
    for batch in given("easy", 6)[4:]:
        rls.update(batch.K.float(), batch.V.float())
        found.append(full(rls.weight))
    return found


@pytest.mark.parametrize("place", ["rows", "columns", "everywhere"])
def test_a_weight_that_is_read_in_inference_mode_is_one_that_later_batches_can_be_added_to(place: str) -> None:
    for one, other in zip(
        run(2, _in_inference_mode, place, False), run(2, _in_inference_mode, place, True), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _resumed(ranks: Ranks, first: int, count: int) -> list[torch.Tensor]:
    """The stream from W_0 on, made anew behind `first` batches as after a restart."""
    batches, found = given("easy", count), []
    rls = made(ranks, EASY)
    if first:
        rls.refactor([(b.K.float(), b.V.float(), b.noise) for b in batches[:first]])
    for batch in batches[first:]:
        rls.update(batch.K.float(), batch.V.float())
        found.append(full(rls.weight))
    return found


def test_a_stream_made_anew_from_its_batches_goes_on_over_other_ranks() -> None:
    whole = run(3, _resumed, 0, 12)[0][7:]
    for size in (1, 2, 4):
        for W, other in zip(run(size, _resumed, 7, 12)[0], whole, strict=True):
            assert float((W - other).norm()) < 2e-6 * float(other.norm())


def _restricted(ranks: Ranks) -> str:
    batches = given("easy", 4)
    rls = followed(made(ranks, EASY), batches[:3], read=True)
    rls.state.restrict(torch.eye(D)[:, :2])
    with pytest.raises(ValueError, match="changed outside of the filter") as caught:
        rls.update(batches[3].K.float(), batches[3].V.float())
    ranks.barrier()  # the ranks can go on
    return str(caught.value)


def test_a_state_that_was_restricted_outside_of_the_filter_takes_no_gain() -> None:
    assert all("use solution='gain'" in text for text in run(2, _restricted))
