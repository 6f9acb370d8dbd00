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
