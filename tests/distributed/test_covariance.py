"""ShardedCovarianceState: ranks agree to the bit, and with one process to rounding, whatever it is asked to do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.bits import same
from support.ranks import run
from support.sharded import KINDS, columns, full, gathered, keys, prior
from support.tolerances import relative_error
from torch.distributed.tensor import Replicate, Shard

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import Ranks, ShardedCovarianceState
from rlsedit_kernels.errors import BreakdownError, LeverageError, RankError

FORMS = ("plain", "whitened", "inverse_root")
CASES = tuple((kind, form) for kind in KINDS for form in FORMS)


def bound(kind: str, dtype: torch.dtype) -> float:
    """Of the relative difference between two orders of summation: a few eps times the condition of the prior."""
    return 8.0 * torch.finfo(dtype).eps * prior(kind, 13).factor.condition


def dtype_of(case: int, size: int) -> torch.dtype:
    """Both dtypes for every case, at one size or another."""
    return (torch.float32, torch.float64)[(case + size) % 2]


def batches(d: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, float, float]]:
    """More keys than a rank has rows, and forgetting."""
    return [(keys(u, d, u, dtype), noise, forget) for u, noise, forget in ((9, 0.5, 0.9), (4, 2.0, 1.0))]


def cases(d: int, size: int) -> list[int]:
    """All of them on two and four ranks; some where it is about one rank, or ranks with few rows or none."""
    return list(range(len(CASES)))[:: (1 if size in (2, 4) else 2) if d == 13 else 4]


def streams(ranks: Ranks, d: int, sharded: bool) -> list[dict[str, Any]]:
    found = []
    for case in cases(d, ranks.size):
        (kind, form), dtype = CASES[case], dtype_of(case, ranks.size)
        state = ShardedCovarianceState(prior(kind, d), ranks, form=form, dtype=dtype)
        gains = [
            full(state.update(columns(ranks, K) if sharded else K, noise, forget))
            for K, noise, forget in batches(d, dtype)
        ]
        probes = gathered(state.state_dict())["probes"]
        found.append({"gains": gains, "C": full(state.covariance()), "probes": probes, "drift": state.health().drift})
    return found


@pytest.mark.parametrize(
    ("size", "d", "sharded"),
    [(1, 13, False), (2, 13, True), (3, 13, False), (4, 13, True), (4, 3, True), (4, 5, False)],
)
def test_all_forms_and_priors(size: int, d: int, sharded: bool) -> None:
    found = run(size, streams, d, sharded)
    assert all(same(entry, found[0]) for entry in found[1:])
    for case, got in zip(cases(d, size), found[0], strict=True):
        (kind, form), dtype = CASES[case], dtype_of(case, size)
        state = rk.CovarianceState(prior(kind, d), form=form, dtype=dtype)
        limit = bound(kind, dtype)
        for (K, noise, forget), gain in zip(batches(d, dtype), got["gains"], strict=True):
            assert relative_error(gain, state.update(K, noise, forget)) <= limit, (kind, form)
        assert relative_error(got["C"], state.covariance()) <= limit, (kind, form)
        assert relative_error(got["probes"]["image"], state._probes.image) <= limit
        assert got["drift"] <= 10.0 * limit
        if form == "plain" or (form, kind) == ("whitened", "ridge"):
            assert torch.equal(got["C"], got["C"].mT)


def both_ways(ranks: Ranks) -> list[torch.Tensor]:
    K, found = keys(6, 13, 1), []
    whole = ranks.dtensor(K[ranks.rows(6)].contiguous(), 6, 0).redistribute(ranks.mesh, [Replicate()])
    for given in (K, columns(ranks, K), whole, K.double()):
        for form in FORMS:
            found.append(full(ShardedCovarianceState(prior("anchor", 13), ranks, form=form).update(given)))
    return found


def test_it_does_not_matter_how_keys_come() -> None:
    found = run(2, both_ways)[0]
    assert all(torch.equal(gain, found[i % 3]) for i, gain in enumerate(found))


def life(state: Any, ranks: Ranks | None) -> dict[str, torch.Tensor]:
    """All that a state can be asked for, one after the other; ranks: of a sharded one."""
    d, dtype = state.d, state.dtype
    K = [keys(u, d, u, dtype) for u in (4, 20, 3, 5, 2, 6)]
    Q = torch.linalg.qr(keys(d, d, 7, dtype))[0][:, :2].contiguous()
    if ranks is not None:
        K = [columns(ranks, k) if i % 2 else k for i, k in enumerate(K)]
        Q = ranks.dtensor(Q[ranks.rows(d)], d, 0)
    found = {"first": state.update(K[0], 0.5), "more keys than d": state.update(K[1])}
    state.commit(K[2])
    found["removed"] = state.remove(K[0], 0.5)
    found["C after a removal"] = state.covariance()
    free = state.clone()
    state.restrict(Q)
    found["restricted"] = state.update(K[3])
    found["hard write"] = state.update(K[4], 0.0)
    found["after a hard write"] = state.update(K[5])
    found["drift"] = torch.tensor(state.health().drift)
    state = free
    state.refactor(iter([(K[1], 1.0), (K[2], 1.0)]))
    found["rebuilt"] = state.covariance()
    found["left out"] = state.remove(K[2], remaining=[(K[1], 1.0)])
    prepared = state.prepare(K[5], 0.5)
    state.write(prepared)
    found["prepared"], found["C"] = prepared.gain, state.covariance()
    return {name: full(value) for name, value in found.items()}


def lives(ranks: Ranks, kind: str, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    start = prior(kind, 13)
    return [life(ShardedCovarianceState(start, ranks, form=form, dtype=dtype), ranks) for form in FORMS]


@pytest.mark.parametrize(
    ("size", "kind", "dtype"), [(2, "anchor", torch.float32), (2, "ridge", torch.float64), (3, "anchor", torch.float64)]
)
def test_a_whole_life(size: int, kind: str, dtype: torch.dtype) -> None:
    found = run(size, lives, kind, dtype)
    assert all(same(entry, found[0]) for entry in found[1:])
    for form, got in zip(FORMS, found[0], strict=True):
        expected = life(rk.CovarianceState(prior(kind, 13), form=form, dtype=dtype), None)
        for name in set(expected) - {"drift"}:
            # removal divides by 1 - leverage, a hard write by the smallest eigenvalue of K C K'
            assert relative_error(got[name], expected[name]) <= 200.0 * bound(kind, dtype), (kind, form, name)
        assert float(got["drift"]) <= 200.0 * bound(kind, dtype)


def hard_ones(ranks: Ranks | None) -> list[tuple[torch.Tensor, int, bool]]:
    """A weak prior, whose batches need care, and an ill-conditioned one, whose root keeps whitened coordinates."""
    found = []
    weak = {"prior": rk.Prior.ridge(13, 0.02), "scale": 2.0}
    steep = {"prior": prior("precision", 13, 1e8), "scale": 0.3}
    for case in (weak, steep):
        for form in ("whitened", "inverse_root"):
            start: Any = case["prior"]
            state: Any = rk.CovarianceState(start, form=form, guard="off")
            if form == "whitened":
                state._form._densify()  # as a sharded one is from the start
            if ranks is not None:
                state = ShardedCovarianceState(start, ranks, form=form, guard="off")
            for seed in range(3):
                state.commit(keys(3, 13, seed, scale=case["scale"]))  # type: ignore[arg-type]
            gain = state.gain(keys(3, 13, 9, scale=case["scale"]))  # type: ignore[arg-type]
            found.append((full(gain), state.health().careful_steps, state._form.maps))
    return found


def test_batches_that_need_care_and_mapped_roots() -> None:
    found, expected = run(3, hard_ones), hard_ones(None)
    assert all(same(entry, found[0]) for entry in found[1:])
    for case, (got, want) in enumerate(zip(found[0], expected, strict=True)):
        exact = rk.CovarianceState(
            rk.Prior.ridge(13, 0.02) if case < 2 else prior("precision", 13, 1e8), form="plain", dtype=torch.float64
        )
        scale = 2.0 if case < 2 else 0.3
        for seed in range(3):
            exact.commit(keys(3, 13, seed, scale=scale))
        truth = exact.gain(keys(3, 13, 9, scale=scale))
        assert relative_error(got[0], truth) <= 4.0 * relative_error(want[0], truth) + 1e-5, case
        assert got[1:] == want[1:]
    assert all(steps == 3 and maps for _, steps, maps in found[0])


def moving(
    ranks: Ranks | None, with_history: bool, by_noise: bool = False
) -> tuple[str, str, tuple[str, ...], torch.Tensor, str]:
    """A stream whose keys grow, or whose noise falls, so that an automatic form has to give way."""
    written: list[tuple[torch.Tensor, float]] = []
    history = (lambda: list(written)) if with_history else None
    start = prior("anchor", 13)
    state: Any = rk.CovarianceState(start, history=history)
    if ranks is not None:
        state = ShardedCovarianceState(start, ranks, history=history)
    for seed in range(4):
        K, noise = keys(3, 13, seed, scale=0.1 if by_noise else 0.1 * 4.0**seed), 16.0**-seed if by_noise else 1.0
        state.commit(K, noise)
        written.append((K, noise))
    health = state.health()
    return health.form, health.reason, health.messages, full(state.covariance()), health.status


@pytest.mark.parametrize("by_noise", [False, True])
def test_an_automatic_form_moves_by_its_history(by_noise: bool) -> None:
    expected = moving(None, False, by_noise)
    assert "moved from plain float32" in expected[1]
    found = run(2, moving, True, by_noise)
    assert same(found[0], found[1])
    assert found[0][:2] == expected[:2]
    assert found[0][4] == "ok"
    assert relative_error(found[0][3], expected[3]) <= bound("anchor", torch.float32)
    form, reason, messages, _, status = run(2, moving, False, by_noise)[0]
    assert (form, status) == ("plain", "warning")  # it was "ok", with a message that a safer form is called for
    assert "moved" not in reason
    assert any("there is no history" in text and "the state stays plain" in text for text in messages)


def spoilt(ranks: Ranks, with_history: bool) -> Any:
    """Rows that one rank has lost."""
    written = [(keys(3, 13, seed), 1.0) for seed in range(4)]
    history = (lambda: written) if with_history else None
    state = ShardedCovarianceState(prior("anchor", 13), ranks, form="plain", history=history)
    for K, noise in written:
        state.commit(K, noise)
    if ranks.rank == ranks.size - 1:
        state._form.C.mul_(3.0)
    before = state._form.C.clone()
    try:
        state.look()
    except BreakdownError as error:
        assert torch.equal(state._form.C, before)
        return str(error)
    return full(state.covariance()), state.health().repairs


def test_the_guard_rebuilds_or_refuses_on_all_ranks() -> None:
    expected = rk.CovarianceState(prior("anchor", 13), form="plain")
    expected.refactor([(keys(3, 13, seed), 1.0) for seed in range(4)])
    for C, repairs in run(2, spoilt, True):
        assert repairs == 1
        assert relative_error(C, expected.covariance()) <= bound("anchor", torch.float32)
    for text in run(2, spoilt, False):
        assert "probes of C S have drifted" in text


def saving(ranks: Ranks, form: str, singles: dict[str, Any]) -> Any:
    state = ShardedCovarianceState(prior("anchor", 13), ranks, form=form)
    for seed in range(2):
        state.commit(keys(3, 13, seed))
    saved = state.state_dict()
    twin = ShardedCovarianceState(prior("anchor", 13), ranks, form=form)
    twin.load_state_dict(saved)
    again = state.clone()
    gains = [full(one.update(keys(4, 13, 5))) for one in (state, twin, again)]
    assert same(gains, [gains[0]] * 3)
    assert same(gathered(state.state_dict()), gathered(twin.state_dict()))
    other = ShardedCovarianceState(prior("anchor", 13), ranks, form=form)
    other.load_state_dict(singles)
    bad = copy.copy(saved) | {"dtype": "torch.float64" if ranks.rank else "torch.float32"}
    kept = gathered(other.state_dict())
    try:
        other.load_state_dict(bad)
    except (ValueError, RankError) as error:
        text = str(error)
    assert same(kept, gathered(other.state_dict()))
    return gathered(saved), full(other.covariance()), text


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded(form: str) -> None:
    single = rk.CovarianceState(prior("anchor", 13), form=form)
    for seed in range(2):
        single.commit(keys(3, 13, seed))
    found = run(3, saving, form, single.state_dict())
    assert same(found[0][:2], found[1][:2])
    saved, C, _ = found[0]
    twin = rk.CovarianceState(prior("anchor", 13), form=form)
    twin.load_state_dict(saved)
    limit = bound("anchor", torch.float32)
    assert relative_error(twin.gain(keys(4, 13, 5)), single.gain(keys(4, 13, 5))) <= limit
    assert twin.steps == 2
    assert relative_error(C, single.covariance()) <= limit
    assert "rank 1 failed: ValueError: load_state_dict: the saved state is torch.float64" in found[0][2]


def misused(ranks: Ranks) -> list[str]:
    state = ShardedCovarianceState(prior("anchor", 13), ranks)
    K = keys(4, 13, 1)
    rows = ranks.dtensor(K[ranks.rows(4)].contiguous(), 4, 0)
    texts = []
    for call in (
        lambda: state.update(rows),
        lambda: state.update(K, -1.0),
        lambda: state.update(K, forget=0.0),
        lambda: state.remove(K, 0.0),
        lambda: state.remove(K, 1e-6),
        lambda: state.restrict(K.mT),
        lambda: state.refactor([(K, 0.0)]),
        lambda: ShardedCovarianceState(prior("anchor", 13), ranks, form="plain").update(K * 1e25),
        lambda: state.health(thorough=True),
        lambda: state.precision(),
        lambda: state.convert("plain"),
        lambda: state.to(dtype=torch.float64),
        lambda: state.take_covariance(torch.eye(13), 1.0),
        lambda: ShardedCovarianceState(prior("anchor", 13), ranks, form="dense"),
        lambda: ShardedCovarianceState(prior("anchor", 13), ranks, guard="maybe"),
        lambda: ShardedCovarianceState(rk.Prior.ridge(13, 0.0), ranks),
        lambda: ShardedCovarianceState(prior("anchor", 13 + ranks.rank), ranks),
        lambda: ShardedCovarianceState(rk.Prior.ridge(13, 1.0 + ranks.rank), ranks),
    ):
        try:
            call()
        except (ValueError, RuntimeError, LeverageError) as error:
            texts.append(str(error))
    state.update(K)
    return texts


def test_what_is_refused_says_why_and_all_can_go_on() -> None:
    wanted = (
        "sharded over d (Shard(1)) or replicated",
        "noise must be finite and >= 0",
        "forget must be in (0, 1]",
        "a hard write left no trace",
        "holds 0 batches",
        "columns of Q must be orthonormal",
        "noise must be > 0 for every batch",
        "overflows",
        "thorough=True takes C apart",
        "prior.information()",
        "refactor(batches)",
        "refactor(batches)",
        "refactor(batches)",
        "form must be one of",
        "guard must be",
        "lam is 0",
        "d must be the same on all ranks, got 13, 14",
        "a digest of the prior must be the same",
    )
    for texts in run(2, misused):
        assert len(texts) == len(wanted)
        assert all(part in text for part, text in zip(wanted, texts, strict=True)), texts


def products(ranks: Ranks) -> list[torch.Tensor]:
    state = ShardedCovarianceState(prior("null_space", 13), ranks, form="whitened", dtype=torch.float64)
    state.commit(keys(3, 13, 0, torch.float64))
    x = keys(2, 13, 1, torch.float64).mT.contiguous()
    given = ranks.dtensor(x[ranks.rows(13)], 13, 0)
    assert given.placements == (Shard(0),)
    return [full(state.product(x)), full(state.product(given)), full(state.covariance()) @ x]


def test_products_stand_in_for_a_dense_covariance() -> None:
    one, other, dense = run(4, products)[3]
    assert torch.equal(one, other)
    assert relative_error(one, dense) <= 1e-13
