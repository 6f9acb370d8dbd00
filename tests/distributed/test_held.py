"""Over ranks too, what is forbidden stays so to the rounding of one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.bits import same
from support.ranks import run
from support.sharded import full, gathered, keys, prior

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import Ranks, ShardedCovarianceState, checkpoint

D, Q = 13, 3
PROJECTED = ("plain", "whitened")
projected = pytest.mark.parametrize("form", PROJECTED)


def directions() -> torch.Tensor:
    return torch.linalg.qr(keys(D, D, 7, torch.float64))[0][:, :Q].contiguous()


def started(kind: str, form: str, ranks: Ranks | None, **more: Any) -> Any:
    if ranks is None:
        return rk.CovarianceState(prior(kind, D), form=form, **more)
    return ShardedCovarianceState(prior(kind, D), ranks, form=form, **more)


def followed(state: Any, batches: int, noise: float = 1e-5) -> float:
    """The largest part of a gain along what is forbidden."""
    worst = 0.0
    for i in range(batches):
        gain = full(state.update(keys(4, D, i, state.dtype), noise)).double()
        worst = max(worst, float((directions().mT @ gain).norm() / gain.norm()))
    return worst


def streamed(ranks: Ranks, kind: str, form: str) -> dict[str, Any]:
    state = started(kind, form, ranks, guard="off")
    state.update(keys(4, D, 99))
    state.restrict(directions())
    found: dict[str, Any] = {"along": followed(state, 60)}
    C = full(state.covariance()).double()
    found["C"], found["left"] = C, float((C @ directions()).norm() / C.norm())
    found["saved"], found["ok"] = gathered(state.state_dict()), state.health().ok
    twin = started(kind, form, ranks, guard="off")
    twin.load_state_dict(state.state_dict())
    more = keys(4, D, 98)
    found["gains"] = [full(other.update(more, 1e-5)) for other in (state, twin, state.clone())][:2]
    earlier = {**found["saved"], "tensors": {**found["saved"]["tensors"]}}
    del earlier["tensors"]["held_inner"]
    twin.load_state_dict(earlier)
    found["earlier"] = followed(twin, 10)
    state.refactor([(keys(4, D, i), 1e-5) for i in range(5)])
    found["rebuilt"] = followed(state, 60)
    return found


@pytest.mark.parametrize("kind", ["ridge", "anchor", "null_space"])
@projected
def test_a_long_stream_changes_nothing_in_forbidden_directions(kind: str, form: str) -> None:
    outcomes = run(2, streamed, kind, form)
    assert all(same(found, outcomes[0]) for found in outcomes[1:])
    found = outcomes[0]
    assert found["ok"]
    for name in ("along", "left", "earlier", "rebuilt"):
        assert found[name] < 2e-6, name
    assert torch.equal(*found["gains"])
    alone = started(kind, form, None, guard="off")
    alone.load_state_dict(found["saved"])
    C = alone.covariance().double()
    assert float((C - found["C"]).norm()) < 1e-4 * float(C.norm())
    assert followed(alone, 20) < 2e-6


def reread(ranks: Ranks, form: str, saved: Any, folder: str) -> list[float]:
    """What one process has saved, as a dictionary and as a checkpoint."""
    found = []
    for given in (saved, folder):
        state = started("anchor", form, ranks, guard="off")
        if given is folder:
            checkpoint.load(folder, {"one": state})
        else:
            state.load_state_dict(saved)
        found.append(followed(state, 20))
    return found


@projected
def test_ranks_hold_what_one_process_did(form: str, tmp_path: Path) -> None:
    state = started("anchor", form, None)
    state.restrict(directions())
    state.update(keys(4, D, 1))
    folder = str(tmp_path / "checkpoints")
    checkpoint.save(folder, {"one": state}, step=1)
    for found in run(2, reread, form, state.state_dict(), folder):
        assert max(found) < 2e-6


def knows(ranks: Ranks, form: str, condition: float) -> list[float]:
    S = torch.logspace(0, 1, D, base=condition, dtype=torch.float64)
    state = ShardedCovarianceState(rk.Prior.precision(torch.diag(S)), ranks, form=form)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    ends = torch.eye(D, dtype=torch.float64)[:, [0, -1]]
    state.restrict(ends @ turn)
    C = full(state.product(torch.eye(D, dtype=torch.float64)))
    return [float(C[:, 0].norm()), float(C[:, -1].norm()) * condition, float((C[1, 1] * S[1] - 1.0).abs())]


@pytest.mark.parametrize("form", [*PROJECTED, "inverse_root"])
def test_all_directions_are_forbidden_however_well_the_prior_knows_them(form: str) -> None:
    for found in run(2, knows, form, 1e8):
        assert max(found) < 1e-4


def forgot(ranks: Ranks, form: str) -> tuple[float, bool]:
    state = started("ridge", form, ranks)
    state.restrict(directions())
    for i in range(400):
        state.update(keys(D, D, i, scale=1.0), 1.0, 0.5)
    bare = state._form.form
    kept = bare.C if form == "plain" else bare.matrix
    return float(kept.abs().max()), state.health().ok


@projected
def test_what_nothing_tells_of_does_not_grow_with_forgetting(form: str) -> None:
    for largest, ok in run(2, forgot, form):
        assert largest < 1.0
        assert ok


def grown(ranks: Ranks, form: str) -> list[float]:
    """By how much forgetting has multiplied what rounding leaves, as more is held and after it was saved."""
    state = started("ridge", form, ranks, guard="off")
    state.restrict(directions())
    for i in range(5):
        state.update(keys(D, D, i), 1.0, 0.5)
    found = [state._form.grown]
    twin = started("ridge", form, ranks, guard="off")
    twin.load_state_dict(state.state_dict())
    found.append(twin._form.grown)
    state.update(keys(1, D, 9), 0.0)
    return [*found, state._form.grown]


@projected
def test_what_has_grown_is_saved_and_stays_known_when_more_is_held(form: str) -> None:
    for found in run(2, grown, form):
        assert found == [32.0, 32.0, 32.0]


N, U, V = 32, 8, 3


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some(batch: int) -> torch.Tensor:
    """Keys that lie anywhere."""
    return (randn(U, N, seed=100 + batch) / N**0.5).float()


def along(Q: torch.Tensor, gain: torch.Tensor) -> float:
    """What part of a gain lies in the rows of Q."""
    gain = full(gain).double()
    return float((Q.double() @ gain).norm() / (Q.norm() * gain.norm()))


def within_null_space(rank: int) -> tuple[rk.Prior, torch.Tensor, torch.Tensor]:
    Q = torch.linalg.qr(randn(N, N, seed=4))[0]
    return rk.Prior.null_space(Q[:, :rank].contiguous(), 1.0), Q[:, :rank], Q[:, rank:].mT


def confined(ranks: Ranks, rank: int, noise: float) -> tuple[float, torch.Tensor]:
    given, _, outside = within_null_space(rank)
    state = ShardedCovarianceState(given, ranks, form="plain")
    worst = max(along(outside, state.update(some(i), noise)) for i in range(60))
    return worst, full(state.covariance())


@pytest.mark.parametrize("rank", [4, 16, 28])
@pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-6])
def test_no_edit_goes_where_the_prior_forbids_it(rank: int, noise: float) -> None:
    """By subtraction alone a third of the gain did, at noise 1e-6."""
    outcomes = run(3, confined, rank, noise)
    assert all(same(found, outcomes[0]) for found in outcomes[1:])
    worst, C = outcomes[0]
    assert worst < 1e-5
    if noise < 1.0:
        assert float((within_null_space(rank)[2].float() @ C).norm()) < 1e-6 * float(C.norm())


def everything_held(ranks: Ranks, first: str) -> dict[str, Any]:
    given, inside, outside = within_null_space(24)
    state = ShardedCovarianceState(given, ranks, form="plain")
    Q = torch.linalg.qr(torch.cat([inside[:, :2], outside[:1].mT], dim=1))[0]
    if first == "noise":
        state.update(some(0), 1e-6)
    state.restrict(Q)
    K = randn(2, N, seed=77).float()[: 1 if first == "restricted" else 2]  # 3 directions are held at any rho
    state.commit(K, 0.0)
    known = K.double() @ inside[:, 2:] @ inside[:, 2:].mT  # what of them prior and restriction let change
    found: dict[str, Any] = {"count": len(K) + 2, "restricted": 0.0, "written": 0.0}
    for i in range(60):
        gain = state.update(some(i), 1e-6)
        found["restricted"] = max(found["restricted"], along(torch.cat([Q.mT, outside]), gain))
        found["written"] = max(found["written"], along(known, gain))
    found["held"] = state._form.inner.wide.shape[1]
    found["saved"] = gathered(state.state_dict())
    twin = ShardedCovarianceState(given, ranks, form="plain")
    twin.load_state_dict(state.state_dict())
    found["gains"] = [full(other.update(some(70), 1e-6)) for other in (state, twin, state.clone())][:2]
    alone = rk.CovarianceState(given, form="plain")
    alone.load_state_dict(found["saved"])
    back = ShardedCovarianceState(given, ranks, form="plain")
    back.load_state_dict(alone.state_dict())
    found["elsewhere"] = max(
        max(along(torch.cat([Q.mT, outside]), gain), along(known, gain))
        for i in range(20)
        for gain in (alone.update(some(80 + i), 1e-6), back.update(some(80 + i), 1e-6))
    )
    found["of_prior"] = alone._form.of_prior
    return found


@pytest.mark.parametrize("first", ["restricted", "noise"])
def test_restrictions_and_hard_writes_join_what_the_prior_forbids(first: str) -> None:
    outcomes = run(2, everything_held, first)
    assert all(same(found, outcomes[0]) for found in outcomes[1:])
    found = outcomes[0]
    assert found["restricted"] < 1e-6
    assert found["written"] < 1e-5
    assert found["held"] == found["count"]
    assert torch.equal(*found["gains"])
    assert found["elsewhere"] < 1e-5
    assert found["of_prior"] == 8


def forgetting_within(ranks: Ranks) -> tuple[float, float]:
    given, inside, outside = within_null_space(16)
    state = ShardedCovarianceState(given, ranks, form="plain")
    state.restrict(inside[:, :2].contiguous())
    worst = 0.0
    for i in range(300):
        K = randn(N, N, seed=i).float()
        worst = max(worst, along(torch.cat([inside[:, :2].mT, outside]), state.update(K, 1e-3, 0.5)))
    return float(state._form.form.C.abs().max()), worst


def test_rounding_outside_of_a_null_space_does_not_grow_with_forgetting() -> None:
    for largest, worst in run(2, forgetting_within):
        assert largest < 1.0
        assert worst < 1e-5


def written_hard(ranks: Ranks | None, form: str, noise: float, count: int, batches: int = 100) -> dict[str, Any]:
    """Hard writes of 5 keys each behind a batch of this noise, and what a stream of noise 1e-6 does to them."""
    given = rk.Prior.ridge(N, 1.0)
    state: Any = (
        rk.CovarianceState(given, form=form, guard="off")
        if ranks is None
        else ShardedCovarianceState(given, ranks, form=form, guard="off")
    )
    state.commit(some(-95), noise)
    K = torch.cat([(randn(5, N, seed=70 + i) / N**0.5).float() for i in range(count)])
    for rows in K.split(5):
        state.commit(rows, 0.0)
    found = {"before": state.health().status, "unheld": state._counters.unheld}
    W = torch.zeros(N, V, dtype=torch.float64)
    for i in range(batches):
        k = some(200 + i)
        W += full(state.update(k, 1e-6)).double() @ (k.double() @ randn(N, V, seed=8) - k.double() @ W)
    found["moved"] = float((K.double() @ W).norm() / (K.norm() * W.norm()))
    found["messages"], found["saved"] = state.health().messages, gathered(state.state_dict())
    return found


@projected
@pytest.mark.parametrize("noise", [1.0, 1e-6])
@pytest.mark.parametrize("count", [1, 3])
def test_hard_writes_stay_or_health_says_that_they_do_not(form: str, noise: float, count: int) -> None:
    """They broke the state: what rounding left of them is not to be told from what C knows, for any noise."""
    outcomes = run(2, written_hard, form, noise, count)
    assert all(same(found, outcomes[0]) for found in outcomes[1:])
    found, alone = outcomes[0], written_hard(None, form, noise, count)
    assert (found["before"], found["unheld"]) == (alone["before"], alone["unheld"])
    assert found["before"] == "ok"
    if noise < 1.0:
        assert found["moved"] < 1e-6
        assert found["unheld"] == 0
        assert found["saved"]["tensors"]["held_inner"].shape == (N, 5 * count)
    else:
        assert any(f"{count} hard writes, beyond 1/8 of the space" in text for text in found["messages"])


def prepared_twice(ranks: Ranks) -> float:
    """A hard write that is written behind another batch's preparation, which has changed what the form holds."""
    given, _, outside = within_null_space(16)
    state = ShardedCovarianceState(given, ranks, form="plain")
    K = randn(1, N, seed=77).float()
    hard = state.prepare(K, 0.0)
    state.prepare(some(0), 1e-6)
    state.write(hard)
    return max(along(outside, state.update(some(i), 1e-6)) for i in range(20))


def test_a_hard_write_that_was_prepared_earlier_lifts_nothing() -> None:
    assert max(run(2, prepared_twice)) < 1e-5


def auto_that_stays(ranks: Ranks) -> tuple[str, float]:
    """An automatic state that has no history to move by."""
    given, _, outside = within_null_space(31)
    state = ShardedCovarianceState(given, ranks)
    state.update(some(0), 1.0)
    worst = max(along(outside, state.update(some(i), 1e-6)) for i in range(1, 40))
    return state.form, worst


def test_a_plain_state_that_cannot_move_is_held_to_its_prior() -> None:
    for form, worst in run(2, auto_that_stays):
        assert form == "plain"
        assert worst < 1e-5
