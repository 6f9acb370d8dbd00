"""ShardedSquareRootState: the same as one process to rounding, the same on all ranks to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import builders
from support.bits import same
from support.ranks import run
from support.sharded import full, gathered
from support.tolerances import relative_error, solve

import rlsedit_kernels as rk
from rlsedit_kernels.backends import fallback
from rlsedit_kernels.distributed import Ranks, ShardedSquareRootState
from rlsedit_kernels.distributed.square_root_volume import append_bytes, append_check_bytes
from rlsedit_kernels.distributed.volume import Received, confirm_bytes
from rlsedit_kernels.errors import BreakdownError, LeverageError, RankError, UnderdeterminedError

SIZES = (1, 2, 3, 4)
CASES = [("ridge", 3), ("anchor", 5), ("anchor", 40), ("null_space", 41), ("nothing", 20)]
each_size = pytest.mark.parametrize("size", SIZES)
V = 6


def prior_of(kind: str, d: int) -> rk.Prior:
    rng = np.random.default_rng(d)
    if kind == "anchor":
        return rk.Prior.anchor(builders.spd(d, 100.0, rng), lam=0.05)
    if kind == "null_space":
        return rk.Prior.null_space(builders.orthogonal(d, rng)[:, : 2 * d // 3], 2.0)
    return rk.Prior.ridge(d, 0.0 if kind == "nothing" else 0.5)


def keys(u: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return builders.tensor(builders.keys(u, d, np.random.default_rng(seed)) * 2.0, dtype)


def targets(u: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return builders.tensor(np.random.default_rng(100 + seed).standard_normal((u, V)), dtype)


def snapshot(state: Any) -> list[torch.Tensor]:
    """What this rank has of a state, and what it remembers."""
    form, counters = state._form, state._counters
    numbers = [float(counters.steps), counters.largest_key, form.trace, float(state._writes)]
    return [form.L.clone(), state._probes.z.clone(), state._probes.image.clone(), torch.tensor(numbers)]


def _stream(ranks: Ranks | None, kind: str, d: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every method along a stream, over ranks or in one process."""
    prior = prior_of(kind, d)
    state: Any = rk.SquareRootState(prior, dtype=dtype)
    B: Any = torch.zeros(state.factor.shape[0], V, dtype=dtype)
    if ranks is not None:
        state = ShardedSquareRootState(prior, ranks, dtype=dtype)
        B = state.zeros(V)
    found: dict[str, torch.Tensor] = {}
    first = keys(d + 2 if kind == "nothing" else 3, d, 1, dtype)
    state.append_with(B, first, targets(len(first), 1, dtype), 0.5)
    found["gain"] = full(state.gain(keys(4, d, 2, dtype), 0.7))
    found["half"] = state.half(keys(4, d, 2, dtype))
    found["update"] = full(state.update(keys(4, d, 2, dtype), 0.7, 0.9))
    state.commit(keys(2, d, 3, dtype), 0.3)
    found["R"] = full(state.factor)
    state.load_state_dict(state.state_dict())
    state.refactor([(first, 0.5), (keys(2, d, 3, dtype), 0.3), (keys(4, d, 2, dtype), 0.7)])
    found["R of refactor"] = full(state.factor)
    B = torch.zeros_like(B) if ranks is None else state.zeros(V)
    state.append_with(B, keys(4, d, 8, dtype), targets(4, 8, dtype), 0.5)
    state.append_with(B, keys(5, d, 4, dtype), targets(5, 4, dtype), 2.0, 0.95)
    state.append_with(B, keys(3, d, 5, dtype), targets(3, 5, dtype), 0.4)
    found["B"], found["solution"] = full(B), full(state.solve(B))
    state.remove_with(B, keys(3, d, 5, dtype), targets(3, 5, dtype), 0.4)
    found["B without"] = full(B)
    found["removal"] = full(state.remove(keys(5, d, 4, dtype), 2.0))
    found["R without"] = full(state.factor)
    found["drift"] = torch.tensor(state.health().drift)
    found["counters"] = torch.tensor([float(state.steps), state.health().largest_leverage])
    if state.rank > 3:
        Q = builders.tensor(builders.orthogonal(d, np.random.default_rng(9))[:, :2], dtype)
        state.restrict(Q)
        found["restricted"] = full(state.update(keys(4, d, 6, dtype), 0.6))
        state.commit(keys(4, d, 7, dtype), 0.6)
        found["restricted removal"] = full(state.remove(keys(4, d, 6, dtype), 0.6))
        eye = torch.eye(d, dtype=torch.float64)
        found["C"] = full(state.apply(eye)) if ranks is not None else state._form.covariance64()
        found["rank"] = torch.tensor(state.rank)
        found["held"] = Q.mT @ found["restricted"]
        found["drift afterwards"] = torch.tensor(state.health().drift)
    return found


def _small_panels(ranks: Ranks, *args: Any) -> dict[str, torch.Tensor]:
    """The stream with panels so narrow that a rank has several."""
    before, fallback.PANEL = fallback.PANEL, 4
    try:
        return _stream(ranks, *args)
    finally:
        fallback.PANEL = before


@each_size
@pytest.mark.parametrize(("kind", "d"), CASES)
def test_a_stream_is_that_of_one_process(size: int, kind: str, d: int, dtype: torch.dtype) -> None:
    every = run(size, _small_panels, kind, d, dtype)
    for found in every[1:]:
        assert {name: True for name in found} == {name: torch.equal(found[name], every[0][name]) for name in found}
    alone, eps = _stream(None, kind, d, dtype), torch.finfo(dtype).eps
    for name, value in every[0].items():
        if name.startswith("drift"):
            assert float(value) < 1e2 * eps, name
        elif name == "held":  # nothing is written in the directions of Q
            assert float(value.abs().max()) < 1e2 * eps * float(every[0]["restricted"].abs().max())
        else:
            assert relative_error(value, alone[name]) < 5e3 * eps, name
    assert torch.equal(every[0]["R"], every[0]["R"].triu())
    assert bool((every[0]["R without"].diagonal() >= 0).all())


def _against_reference(ranks: Ranks, dtype: torch.dtype) -> list[torch.Tensor]:
    state = ShardedSquareRootState(prior_of("anchor", 30), ranks, dtype=dtype)
    gains = [full(state.update(keys(4, 30, seed, dtype), 0.7, 0.98)) for seed in range(5)]
    removal = full(state.remove(keys(4, 30, 4, dtype), 0.7))
    return [*gains, removal, full(state.factor)]


@pytest.mark.parametrize("size", [2, 3])
def test_a_stream_is_that_of_the_reference(size: int, dtype: torch.dtype) -> None:
    found = run(size, _against_reference, dtype)[0]
    reference, limit = rk.reference.SquareRootState(prior_of("anchor", 30)), solve(4, 400.0, dtype)
    for seed in range(5):
        assert relative_error(found[seed], reference.update(keys(4, 30, seed, dtype), 0.7, 0.98)) < limit
    assert relative_error(found[5], reference.remove(keys(4, 30, 4, dtype), 0.7)) < limit
    assert relative_error(found[6], reference.factor) < limit


def _sharded_keys(ranks: Ranks, kind: str, d: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    states = [ShardedSquareRootState(prior_of(kind, d), ranks) for _ in range(2)]
    found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for seed in range(3):
        K, part = keys(4, d, seed, torch.float32), targets(4, seed, torch.float32)
        columns, outputs = ranks.rows(d), ranks.rows(V)
        sharded = ranks.dtensor(K[:, columns].contiguous(), d, dim=1)
        shared = ranks.dtensor(part[:, outputs].contiguous(), V, dim=1)
        for state, batch, wanted, seen in zip(states, (K, sharded), (part, shared), found, strict=True):
            B = state.zeros(V)
            seen += [full(state.update(batch, 0.5)), state.half(batch)]
            state.append_with(B, batch, wanted)
            seen += [full(B), full(state.remove(batch, 0.5)), full(state.factor)]
    return found


@each_size
@pytest.mark.parametrize(("kind", "d"), [("anchor", 13), ("null_space", 10)])
def test_keys_that_come_sharded_give_the_same_bits(size: int, kind: str, d: int) -> None:
    for whole, sharded in run(size, _sharded_keys, kind, d):
        assert same(whole, sharded)


def _saves(ranks: Ranks, kind: str, saved: Any) -> Any:
    state = ShardedSquareRootState(prior_of(kind, 11), ranks)
    if saved is None:
        if kind == "nothing":
            state.commit(keys(13, 11, 0, torch.float32))
        for seed in range(3):
            state.commit(keys(4, 11, seed, torch.float32))
        if kind == "anchor":
            state.restrict(torch.eye(11)[:, 2:4])
    else:
        state.load_state_dict(saved)
    found = state.state_dict()
    return gathered(found), full(state.gain(keys(4, 11, 9, torch.float32))), state.collect().state_dict()


@pytest.mark.parametrize("kind", ["anchor", "null_space", "nothing"])
def test_a_state_is_restored_to_the_bit_on_other_ranks(kind: str) -> None:
    whole, gain, single = run(3, _saves, kind, None)[0]
    for size in (1, 2, 4):
        again, repeated, _ = run(size, _saves, kind, whole)[0]
        for part in ("tensors", "probes"):
            for name, value in whole[part].items():
                seen = again[part][name]
                assert torch.equal(seen, value) if isinstance(value, torch.Tensor) else seen == value
        assert again["counters"] == whole["counters"]
        assert relative_error(repeated, gain) < 1e-5
    alone = rk.SquareRootState(prior_of(kind, 11))
    alone.load_state_dict(single)
    assert relative_error(gain, alone.gain(keys(4, 11, 9, torch.float32))) < 1e-4
    if kind != "anchor":  # not restricted: what one process has goes back over ranks
        again, _, _ = run(2, _saves, kind, single)[0]
        assert torch.equal(again["tensors"]["L"], whole["tensors"]["L"])


KEYS = keys(3, 7, 0)
WIDTHS = (torch.float64, torch.float32, torch.float64)
REFUSED: list[tuple[str, Callable[[Any, Ranks], Any], type[Exception], str]] = [
    ("hard", lambda s, r: s.update(KEYS, 0.0), ValueError, "noise must be > 0 for a triangular factor"),
    ("shape", lambda s, r: s.gain(keys(3, 8, 0)), ValueError, r"K must have shape \(u, d\)"),
    ("nan", lambda s, r: s.commit(KEYS * math.nan), ValueError, "K must be finite"),
    ("room", lambda s, r: s.update(KEYS * 1e160), ValueError, "R would grow to"),
    ("forget", lambda s, r: s.commit(KEYS, 1.0, 0.0), ValueError, r"forget must be in \(0, 1\]"),
    ("type", lambda s, r: s.commit([1.0]), TypeError, "K must be a torch.Tensor"),
    ("leverage", lambda s, r: s.remove(KEYS * 1e3, 1e-9), LeverageError, "has leverage"),
    ("B", lambda s, r: s.append_with(torch.zeros(7, 2), KEYS, torch.ones(3, 2)), TypeError, "B must be a DTensor"),
    ("V", lambda s, r: s.append_with(s.zeros(2), KEYS, torch.ones(3, 4)), ValueError, "V must have shape"),
    ("Q", lambda s, r: s.restrict(torch.ones(7, 2)), ValueError, "must be orthonormal"),
    ("all", lambda s, r: s.restrict(torch.eye(7)), ValueError, "spans the whole space"),
    ("load", lambda s, r: s.load_state_dict({**s.state_dict(), "version": 9}), ValueError, "version must be"),
    ("dense", lambda s, r: s.covariance(), ValueError, r"use apply\(Y\)"),
    ("S", lambda s, r: s.precision(), ValueError, r"collect\(\)"),
    ("form", lambda s, r: s.convert("plain"), ValueError, "ShardedCovarianceState"),
    ("thorough", lambda s, r: s.health(thorough=True), ValueError, "dense C"),
    ("dtype", lambda s, r: s.to(dtype=torch.float16), TypeError, "dtype must be"),
    ("alone", lambda s, r: s.update(KEYS * (math.nan if r.rank == 1 else 1.0)), RankError, "rank 1 failed.*finite"),
    ("u", lambda s, r: s.update(keys(3 + r.rank, 7, 0)), ValueError, "u must be the same on all ranks, got 3, 4, 5"),
    ("bits", lambda s, r: s.commit(keys(3, 7, r.rank)), ValueError, "a digest of K must be the same"),
    ("noise", lambda s, r: s.commit(KEYS, 1.0 + r.rank), ValueError, "noise must be the same on all ranks"),
    ("dtypes", lambda s, r: s.to(dtype=WIDTHS[r.rank]).commit(KEYS), ValueError, "itemsize must be the same"),
    ("order", lambda s, r: s.commit(KEYS) if r.rank else s.update(KEYS), ValueError, "same method"),
    ("V bits", lambda s, r: s.append_with(s.zeros(2), KEYS, torch.ones(3, 2) * r.rank), ValueError, "a digest of V"),
    (
        "sharded",
        lambda s, r: s.gain(KEYS if r.rank else _first_columns(r)),
        ValueError,
        "K is sharded must be the same",
    ),
]


def _first_columns(ranks: Ranks) -> torch.Tensor:
    return ranks.dtensor(KEYS[:, :3].contiguous(), 7, dim=1)


def _refused(ranks: Ranks) -> dict[str, tuple[BaseException | None, bool]]:
    state = ShardedSquareRootState(prior_of("anchor", 7), ranks, dtype=torch.float64)
    state.commit(keys(4, 7, 5))
    outcomes: dict[str, tuple[BaseException | None, bool]] = {}
    for name, call, _, _ in REFUSED:
        before, error = snapshot(state), None
        try:
            call(state, ranks)
        except Exception as raised:
            error = raised
        outcomes[name] = (error, same(before, snapshot(state)))
    after = ShardedSquareRootState(prior_of("anchor", 7), ranks, dtype=torch.float64)
    after.commit(keys(4, 7, 5))
    agreed = torch.equal(full(state.update(keys(2, 7, 6))), full(after.update(keys(2, 7, 6))))
    outcomes["they go on"] = (None, agreed)
    return outcomes


def test_what_is_refused_is_refused_by_all_and_changes_nothing() -> None:
    every = run(3, _refused)
    for rank, outcomes in enumerate(every):
        for name, _, kind, message in REFUSED:
            error, unchanged = outcomes[name]
            assert unchanged, name
            if name == "alone" and rank == 1:
                assert isinstance(error, ValueError)
                continue
            assert isinstance(error, kind), (rank, name, error)
            with pytest.raises(kind, match=message):
                raise error
        assert outcomes["they go on"][1]


def _construction(ranks: Ranks, which: int) -> None:
    priors = [rk.Prior.ridge(5, 1.0), rk.Prior.ridge(5, 1.0 + ranks.rank), prior_of("anchor", 5), 3]
    dtype = torch.bfloat16 if which == 2 else torch.float32
    ShardedSquareRootState(priors[which], ranks, dtype=dtype)


@pytest.mark.parametrize(
    ("which", "kind", "message"),
    [(1, ValueError, "a digest of the prior"), (2, TypeError, "dtype"), (3, TypeError, "Prior")],
)
def test_wrong_construction(which: int, kind: type[Exception], message: str) -> None:
    for outcome in run(2, _construction, which, check=False):
        assert isinstance(outcome.error, kind)
        assert message in str(outcome.error)


def _underdetermined(ranks: Ranks) -> tuple[list[str], torch.Tensor, bool, bool]:
    state, texts = ShardedSquareRootState(prior_of("nothing", 9), ranks, dtype=torch.float64), []
    early = state.determined
    for seed in (0, 1):
        for call in (state.gain, state.update, state.half, state.remove):
            before = snapshot(state)
            try:
                call(keys(4, 9, seed))
            except UnderdeterminedError as error:
                texts.append(str(error))
            assert same(before, snapshot(state))
        state.commit(keys(4, 9, seed))
    messages = state.health().messages
    assert "directions are known" in messages[-1]
    return texts, full(state.update(keys(4, 9, 2), 0.5)), early, state.determined


def test_a_state_of_nothing() -> None:
    alone = rk.SquareRootState(prior_of("nothing", 9), dtype=torch.float64)
    for seed in (0, 1):
        alone.commit(keys(4, 9, seed))
    expected = alone.update(keys(4, 9, 2), 0.5)
    for texts, gain, early, late in run(4, _underdetermined):
        assert len(texts) == 8
        assert "knows 8 of 9 directions" in texts[5] or "knows 4 of 9" in texts[5]
        assert (early, late) == (False, True)
        assert relative_error(gain, expected) < 1e-10


def _guarded(ranks: Ranks, repaired: bool) -> tuple[str, int, bool, torch.Tensor]:
    batches = [(keys(4, 12, seed), 0.5) for seed in range(4)]
    history = (lambda: batches) if repaired else None
    state = ShardedSquareRootState(prior_of("anchor", 12), ranks, dtype=torch.float64, history=history)
    for batch in batches:
        state.commit(*batch)
    if ranks.rank == 0:
        state._form.L[1, 1] *= 1.5
    before, text = snapshot(state), ""
    try:
        state.update(keys(3, 12, 8))
    except BreakdownError as error:
        text = str(error)
    return text, state.health().repairs, same(before, snapshot(state)), full(state.factor)


def test_a_broken_state_is_rebuilt_or_refuses_on_all_ranks() -> None:
    for text, _, unchanged, _ in run(3, _guarded, False):
        assert "the square_root state is broken" in text
        assert unchanged
    alone = rk.SquareRootState(prior_of("anchor", 12), dtype=torch.float64)
    for seed in range(4):
        alone.commit(keys(4, 12, seed), 0.5)
    alone.commit(keys(3, 12, 8))
    for text, repairs, _, R in run(3, _guarded, True):
        assert (text, repairs) == ("", 1)
        assert relative_error(R, alone.factor) < 1e-12


def _leverage(ranks: Ranks) -> torch.Tensor:
    state = ShardedSquareRootState(rk.Prior.ridge(8, 1e-3), ranks)
    stays, goes = keys(12, 8, 0, torch.float32), torch.ones(1, 8) * 1e7
    state.commit(stays)
    state.commit(goes, 1e-6)
    with pytest.raises(LeverageError):
        state.remove(goes, 1e-6)
    state.remove(goes, 1e-6, remaining=[(stays, 1.0)])
    return full(state.factor)


def test_with_a_history_a_removal_refactors() -> None:
    alone = rk.SquareRootState(rk.Prior.ridge(8, 1e-3))
    alone.commit(keys(12, 8, 0, torch.float32))
    assert relative_error(run(3, _leverage)[0], alone.factor) < 1e-5


def _history_of_one_rank_is_longer(ranks: Ranks) -> None:
    state = ShardedSquareRootState(prior_of("ridge", 6), ranks)
    state.refactor([(keys(2, 6, seed), 1.0) for seed in range(2 + ranks.rank)])


def test_histories_that_differ_are_found() -> None:
    for outcome in run(2, _history_of_one_rank_is_longer, check=False):
        assert isinstance(outcome.error, ValueError)
        assert "batches must be the same on all ranks, got 2, 3" in str(outcome.error)


def _copies(ranks: Ranks) -> bool:
    state = ShardedSquareRootState(prior_of("anchor", 9), ranks)
    state.commit(keys(3, 9, 0, torch.float32))
    before = snapshot(state)
    twin, wide, prepared = state.clone(), state.to(dtype=torch.float64), state.prepare(keys(3, 9, 1))
    twin.commit(keys(3, 9, 1))
    wide.commit(keys(3, 9, 1))
    untouched = same(before, snapshot(state)) and relative_error(full(wide.factor), full(twin.factor)) < 1e-6
    state.write(prepared)
    with pytest.raises(ValueError, match="prepare it again"):
        state.write(prepared)
    return untouched and torch.equal(full(state.factor), full(twin.factor)) and "ranks=3" in repr(state)


def test_copies_are_independent_and_a_batch_is_written_once() -> None:
    assert all(run(3, _copies))


def _counted(ranks: Ranks, kind: str, d: int, u: int, dtype: torch.dtype) -> dict[str, int]:
    state, found = ShardedSquareRootState(prior_of(kind, d), ranks, dtype=dtype, guard="off"), {}
    calls = {"gain": state.gain, "update": state.update, "commit": state.commit}
    for name, call in calls.items():
        with Received() as counter:
            call(keys(u, d, 0, dtype))
        found[name] = counter.bytes
    with Received() as counter:
        state.health()
    found["health"] = counter.bytes
    return found


@each_size
@pytest.mark.parametrize(("kind", "d"), [("ridge", 3), ("anchor", 23), ("null_space", 22)])
def test_the_bytes_received_are_those_of_the_formula(size: int, kind: str, d: int, dtype: torch.dtype) -> None:
    rank = prior_of(kind, d).factor.rank if kind == "null_space" else None
    for process, found in enumerate(run(size, _counted, kind, d, 5, dtype)):
        for op in ("gain", "update", "commit"):
            assert found[op] == append_bytes(op, d, 5, size, process, dtype, rank=rank), (op, process)
        pivot = 8 * (size - 1)
        assert found["health"] == confirm_bytes(size) + append_check_bytes(d, size, process, rank=rank) + pivot


def test_the_volume_is_that_of_keys_and_not_of_the_state() -> None:
    small, large = (append_bytes("update", d, 100, 8, 0) for d in (4096, 8192))
    assert large / small == pytest.approx(2.0, rel=0.05)
    with pytest.raises(ValueError, match="op must be one of"):
        append_bytes("remove", 5, 1, 2, 0)
