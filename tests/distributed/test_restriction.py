"""What a restriction forbids stays forbidden when a state over ranks is rebuilt, saved, loaded or gathered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.bits import same
from support.ranks import run
from support.sharded import full, gathered, keys, prior
from support.tolerances import relative_error

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import Ranks, ShardedCovarianceState, ShardedSquareRootState, checkpoint

FORMS = ("plain", "whitened", "inverse_root", "square_root")
D = 13


def started(kind: str, form: str, ranks: Ranks | None, d: int = D, **more: Any) -> Any:
    if form == "square_root":
        return rk.SquareRootState(prior(kind, d), **more) if ranks is None else ShardedSquareRootState(
            prior(kind, d), ranks, **more
        )  # fmt: skip
    if ranks is None:
        return rk.CovarianceState(prior(kind, d), form=form, **more)
    return ShardedCovarianceState(prior(kind, d), ranks, form=form, **more)


def batches(d: int = D) -> list[tuple[torch.Tensor, float]]:
    return [(keys(u, d, u, torch.float64), noise) for u, noise in ((4, 0.5), (3, 1.0), (5, 2.0))]


def directions(d: int = D) -> list[torch.Tensor]:
    """Two that overlap."""
    Q = torch.linalg.qr(keys(d, d, 7, torch.float64))[0]
    return [Q[:, :2].contiguous(), torch.stack([Q[:, 1], Q[:, 2]], dim=1)] if d > 3 else [Q[:, :1].contiguous()]


def streamed(state: Any, ranks: Ranks | None, d: int = D) -> Any:
    """Batches with restrictions between them; over ranks the second comes as rows, where that can be."""
    written, Qs = batches(d), directions(d)
    state.update(*written[0])
    for i, Q in enumerate(Qs):
        rows = i == 1 and ranks is not None and state.form != "square_root"
        state.restrict(ranks.dtensor(ranks.shard(Q), d) if rows and ranks is not None else Q)
        state.update(*written[1 + i])
    return state


def image(state: Any, ranks: Ranks | None, x: torch.Tensor) -> torch.Tensor:
    """C x."""
    if ranks is None:
        return state.covariance() @ x
    return full(state.apply(x) if state.form == "square_root" else state.product(x))


def rebuilt(ranks: Ranks, kind: str, form: str, d: int) -> dict[str, Any]:
    state = streamed(started(kind, form, ranks, d, dtype=torch.float64), ranks, d)
    found = {"before": image(state, ranks, torch.eye(d, dtype=torch.float64))}
    state.refactor(batches(d)[: state.steps])
    found["after"] = image(state, ranks, torch.eye(d, dtype=torch.float64))
    found["gain"] = full(state.update(keys(2, d, 9, torch.float64)))
    found["drift"] = state.health().drift
    found["saved"] = gathered(state.state_dict())
    return found


@pytest.mark.parametrize(
    ("size", "kind", "d"), [(2, "anchor", D), (3, "null_space", D), (2, "ridge", D), (3, "ridge", 2)]
)
@pytest.mark.parametrize("form", FORMS)
def test_a_rebuilt_state_is_that_of_one_process(size: int, kind: str, d: int, form: str) -> None:
    outcomes = run(size, rebuilt, kind, form, d)
    assert all(same(found, outcomes[0]) for found in outcomes[1:])
    found, single = outcomes[0], streamed(started(kind, form, None, d, dtype=torch.float64), None, d)
    single.refactor(batches(d)[: single.steps])
    C = single.covariance()
    assert relative_error(found["after"], C) <= 1e-11
    for Q in directions(d):
        assert float((found["after"] @ Q).norm()) <= 1e-12 * float(C.norm())
        assert float((found["before"] @ Q).norm()) <= 1e-12 * float(C.norm())
    assert relative_error(found["gain"], single.update(keys(2, d, 9, torch.float64))) <= 1e-11
    assert found["drift"] <= 1e-9
    held, wanted = found["saved"]["restriction"], single._restriction
    assert relative_error(held @ held.mT, wanted @ wanted.mT) <= 1e-12


def repaired(ranks: Ranks, form: str) -> tuple[int, torch.Tensor]:
    """The guard rebuilds from the history what it has found broken."""
    state = streamed(started("anchor", form, ranks, history=batches), ranks)
    state._watch.fault = "found broken"
    state.update(keys(2, D, 9))
    return state._counters.repairs, image(state, ranks, torch.cat(directions(), dim=1))


@pytest.mark.parametrize("form", FORMS)
def test_the_guard_repairs_a_restricted_state(form: str) -> None:
    for repairs, left in run(2, repaired, form):
        assert repairs == 1
        assert float(left.norm()) <= 1e-5


def wrote(ranks: Ranks, form: str, folder: str) -> None:
    checkpoint.save(folder, {"one": streamed(started("anchor", form, ranks), ranks)}, step=1)


def reread(ranks: Ranks, form: str, folder: str, saved: Any) -> list[torch.Tensor]:
    """Of a checkpoint of another number of ranks, and of what one process has saved."""
    found = []
    for given in (folder, saved):
        state = started("anchor", form, ranks)
        if given is folder:
            checkpoint.load(folder, {"one": state})
        else:
            state.load_state_dict(given)
        state.refactor(batches())
        found.append(image(state, ranks, torch.cat(directions(), dim=1)))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_directions_are_saved_with_the_state(form: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    run(3, wrote, form, folder)
    single = streamed(started("anchor", form, None), None)
    for found in run(2, reread, form, folder, single.state_dict()):
        assert all(float(left.norm()) <= 1e-5 for left in found)
    alone = started("anchor", form, None)
    checkpoint.load(folder, {"one": alone})
    assert relative_error(alone.covariance(), single.covariance()) <= 1e-4
    assert alone.steps == single.steps
    assert alone.health().drift == pytest.approx(0.0, abs=1e-3)
    gain = alone.clone().update(keys(2, D, 9))
    assert relative_error(gain, single.clone().update(keys(2, D, 9))) <= 1e-4
    alone.refactor(batches())
    assert float(image(alone, None, torch.cat(directions(), dim=1).float()).norm()) <= 1e-5


def wrote_in_a_basis(ranks: Ranks, folder: str) -> None:
    state = streamed(started("null_space", "square_root", ranks, dtype=torch.float64), ranks)
    checkpoint.save(folder, {"one": state}, step=1)


def test_a_restricted_factor_of_a_subspace_is_read_by_one_process(tmp_path: Path) -> None:
    """Over ranks the restriction stands beside R; one process works it into R."""
    run(3, wrote_in_a_basis, str(tmp_path))
    alone, single = (started("null_space", "square_root", None, dtype=torch.float64) for _ in range(2))
    checkpoint.load(str(tmp_path), {"one": alone})
    streamed(single, None)
    assert relative_error(alone.covariance(), single.covariance()) <= 1e-11
    assert alone.rank == single.rank
    alone.remove(*batches()[2])
    single.remove(*batches()[2])
    assert relative_error(alone.covariance(), single.covariance()) <= 1e-10


def collected(ranks: Ranks) -> tuple[torch.Tensor, dict[str, Any]]:
    state = streamed(started("null_space", "square_root", ranks, dtype=torch.float64), ranks)
    alone = state.collect()
    counters = vars(alone._counters) == vars(state._counters)
    alone.refactor(batches())
    return alone.covariance() @ torch.cat(directions(), dim=1), {"counters": counters}


def test_a_collected_state_keeps_the_directions() -> None:
    for left, found in run(2, collected):
        assert float(left.norm()) <= 1e-12
        assert found["counters"]


def older(ranks: Ranks, form: str) -> str:
    """A state of an earlier version, which did not save them."""
    state = streamed(started("anchor", form, ranks), ranks)
    saved = state.state_dict()
    del saved["restriction"]
    twin = started("anchor", form, ranks)
    twin.load_state_dict(saved)
    with pytest.raises(ValueError, match="would lift a restriction") as caught:
        twin.refactor(batches())
    twin.update(keys(2, D, 9))
    return str(caught.value)


@pytest.mark.parametrize("form", ["plain", "square_root"])
def test_directions_that_are_not_known_are_not_lifted(form: str) -> None:
    assert all("earlier version" in text for text in run(2, older, form))


def pressed(ranks: Ranks, kind: str, form: str, dtype: torch.dtype) -> dict[str, Any]:
    state = started(kind, form, ranks, dtype=dtype)
    state.update(keys(4, D, 4, dtype))
    for Q in directions():
        state.restrict(Q.to(dtype))
    before, sizes = image(state, ranks, torch.eye(D, dtype=dtype)), []
    for Q in directions():
        state.restrict(Q.to(dtype))
        sizes.append(full(state.update(Q.to(dtype).mT.contiguous(), 0.0)).norm())
    return {"before": before, "after": image(state, ranks, torch.eye(D, dtype=dtype)), "sizes": torch.stack(sizes)}


@pytest.mark.parametrize("kind", ["ridge", "anchor", "null_space"])
@pytest.mark.parametrize("form", FORMS[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_lies_where_nothing_may_change_changes_nothing(kind: str, form: str, dtype: torch.dtype) -> None:
    """As in one process: K C K' is rounding there, and its reciprocal is no gain."""
    outcomes = run(2, pressed, kind, form, dtype)
    assert all(same(found, outcomes[0]) for found in outcomes[1:])
    found, limit = outcomes[0], 1e3 * torch.finfo(dtype).eps
    assert relative_error(found["after"], found["before"]) <= limit
    assert float(found["sizes"].max()) <= limit
