"""ShardedRLSFilter: a weight changed where it lies is that of one process, and the same on all ranks to the bit."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from support import builders
from support.bits import same
from support.ranks import run
from support.sharded import full
from support.tolerances import relative_error
from torch.distributed.tensor import DTensor, Replicate, Shard

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import Ranks
from rlsedit_kernels.distributed.filter import ShardedRLSFilter
from rlsedit_kernels.errors import LeverageError, RankError, UnderdeterminedError

V = 7
FIGURES = ("innovation_norm", "residual_norm", "objective", "parameter_bound", "anchor_bound")
WAYS = [
    ("covariance", "gain", "plain"),
    ("covariance", "gain", "whitened"),
    ("covariance", "gain", "inverse_root"),
    ("square_root", "gain", "auto"),
    ("square_root", "carried", "auto"),
]


def prior_of(d: int) -> rk.Prior:
    return rk.Prior.anchor(builders.spd(d, 50.0, np.random.default_rng(d)), lam=0.4)


def batch(seed: int, d: int, dtype: torch.dtype, u: int = 3) -> tuple[torch.Tensor, torch.Tensor, float]:
    rng = np.random.default_rng(seed)
    K, targets = builders.keys(u, d, rng) * 2.0, rng.standard_normal((u, V))
    return builders.tensor(K, dtype), builders.tensor(targets, dtype), [0.7, 1.5, 0.4][seed % 3]


def weight_of(d: int, dtype: torch.dtype) -> torch.Tensor:
    """W_0 (d, v)."""
    return builders.tensor(np.random.default_rng(7).standard_normal((d, V)), dtype)


def lay(ranks: Ranks, weight: torch.Tensor, place: str, layout: str) -> torch.Tensor:
    """The weight, given in row form, as a rank has it."""
    given = (weight if layout == "in_out" else weight.mT).contiguous()
    if place == "everywhere":
        return given
    dim = {"rows": 0, "columns": 1}[place] ^ (layout == "out_in")
    n = given.shape[dim]
    return ranks.dtensor(given.narrow(dim, ranks.rows(n).start, len(range(n)[ranks.rows(n)])).contiguous(), n, dim=dim)


def shared(ranks: Ranks, value: torch.Tensor) -> torch.Tensor:
    """A matrix sharded over its columns."""
    n = value.shape[1]
    return ranks.dtensor(value[:, ranks.rows(n)].contiguous(), n, dim=1)


def snapshot(rls: Any) -> list[torch.Tensor]:
    """What this rank has of a filter."""
    tensors = [rls._weight.clone(), torch.tensor([rls.objective, rls._errors, float(rls.state._writes)])]
    tensors += [value.clone() for value in vars(rls.state._form).values() if isinstance(value, torch.Tensor)]
    B = getattr(rls._solution, "B", None)
    return tensors if B is None else [*tensors, full(B.to_local())]


def _along(rls: Any, ranks: Ranks | None, d: int, dtype: torch.dtype) -> dict[str, Any]:
    """A stream with a removal and a rebuild; keys and targets come whole and sharded in turn."""
    found: dict[str, Any] = {"steps": []}
    for seed in range(4):
        K, targets, noise = batch(seed, d, dtype)
        if ranks is not None and seed % 2:
            K = shared(ranks, K)
        if ranks is not None and seed > 1:
            targets = shared(ranks, targets)
        found["steps"].append(rls.update(K, targets, noise, 0.9 if seed == 1 else 1.0))
        found[f"W {seed}"] = full(rls.weight)
    found["steps"].append(rls.remove(*batch(2, d, dtype)))
    found["W without"] = full(rls.weight)
    found["health"] = rls.health().weight_error
    rls.refactor([batch(seed, d, dtype) for seed in (0, 3)])
    found["W anew"], found["objective anew"] = full(rls.weight), rls.objective
    return found


def _filtered(ranks: Ranks, d: int, way: tuple[str, str, str], place: str, layout: str, dtype: torch.dtype) -> Any:
    state, solution, form = way
    weight = lay(ranks, weight_of(d, dtype), place, layout)
    rls = ShardedRLSFilter(weight, prior_of(d), ranks, state, layout=layout, solution=solution, form=form)
    found = _along(rls, ranks, d, dtype)
    assert type(rls.weight) is type(weight)
    if isinstance(weight, DTensor):
        assert rls.weight.placements == weight.placements
    return found


@pytest.mark.parametrize("place", ["rows", "columns", "everywhere"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("size", "d"), [(1, 9), (2, 5), (3, 16), (4, 5)])
def test_a_stream_is_that_of_one_process(size: int, d: int, way: tuple[str, str, str], place: str) -> None:
    dtype = torch.float32 if size == 3 else torch.float64
    layout = "in_out" if size % 2 else "out_in"
    every = run(size, _filtered, d, way, place, layout, dtype)
    for found in every[1:]:
        for name, value in every[0].items():
            equal = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
            assert equal, name
    state, solution, form = way
    given = weight_of(d, dtype) if layout == "in_out" else weight_of(d, dtype).mT
    alone = rk.RLSFilter(given, prior_of(d), state, layout=layout, solution=solution, form=form)
    expected, limit = _along(alone, None, d, dtype), 1e4 * torch.finfo(dtype).eps
    for name, value in every[0].items():
        if isinstance(value, torch.Tensor):
            assert relative_error(value, expected[name]) < limit, name
    for step, other in zip(every[0]["steps"], expected["steps"], strict=True):
        for figure in FIGURES:
            assert getattr(step, figure) == pytest.approx(getattr(other, figure), rel=limit), figure
    if solution == "carried":  # over ranks what rounding R and B costs is not estimated
        assert 0.0 < every[0]["health"] <= 1.01 * expected["health"]
    else:
        assert every[0]["health"] == pytest.approx(expected["health"], rel=1e-2)
    written = [batch(seed, d, torch.float64) for seed in (0, 3)]
    anew = rk.reference.batch_solution(prior_of(d), written, weight_of(d, torch.float64))
    got = every[0]["W anew"] if layout == "in_out" else every[0]["W anew"].mT
    assert relative_error(got, anew) < limit


def _directions(d: int) -> list[torch.Tensor]:
    Q = builders.orthogonal(d, np.random.default_rng(3))
    return [builders.tensor(Q[:, :2].copy(), torch.float64), builders.tensor(Q[:, 2:3].copy(), torch.float64)]


def _restricted(rls: Any, d: int) -> dict[str, Any]:
    """Batches with restrictions between them, and a rebuild without one of the batches."""
    for seed, Q in enumerate((*_directions(d), None)):
        rls.update(*batch(seed, d, torch.float64))
        if Q is not None:
            rls.state.restrict(Q)
    before = full(rls.weight)
    rls.refactor([batch(seed, d, torch.float64) for seed in (0, 2)])
    found = {"before": before, "anew": full(rls.weight), "objective": rls.objective}
    rls.update(*batch(3, d, torch.float64))
    return {**found, "more": full(rls.weight)}


def _restricted_over_ranks(ranks: Ranks, d: int, way: tuple[str, str], place: str, layout: str) -> dict[str, Any]:
    weight = lay(ranks, weight_of(d, torch.float64), place, layout)
    rls = ShardedRLSFilter(weight, prior_of(d), ranks, way[0], layout=layout, solution="gain", form=way[1])
    return _restricted(rls, d)


@pytest.mark.parametrize(("place", "layout"), [("rows", "in_out"), ("columns", "out_in"), ("everywhere", "in_out")])
@pytest.mark.parametrize("way", [("covariance", "plain"), ("covariance", "inverse_root"), ("square_root", "auto")])
@pytest.mark.parametrize(("size", "d"), [(2, 9), (3, 16)])
def test_a_restricted_filter_is_rebuilt_as_that_of_one_process(
    size: int, d: int, way: tuple[str, str], place: str, layout: str
) -> None:
    every = run(size, _restricted_over_ranks, d, way, place, layout)
    weight = weight_of(d, torch.float64)
    given = weight if layout == "in_out" else weight.mT.contiguous()
    alone = _restricted(
        rk.RLSFilter(given, prior_of(d), way[0], layout=layout, solution="gain", form=way[1], dtype=torch.float64), d
    )
    Q = torch.cat(_directions(d), dim=1)
    rows = (lambda W: W) if layout == "in_out" else (lambda W: W.mT)
    for found in every:
        for name in ("before", "anew", "more"):
            assert relative_error(found[name], alone[name]) < 1e-9, name
            assert torch.equal(found[name], every[0][name])
        assert found["objective"] == pytest.approx(alone["objective"], rel=1e-9)
        assert relative_error(Q.mT @ rows(found["anew"]), Q.mT @ rows(found["before"])) < 1e-9
        assert relative_error(found["anew"], found["before"]) > 1e-3


def _carried_and_restricted(ranks: Ranks) -> str:
    rls = ShardedRLSFilter(
        weight_of(9, torch.float64), prior_of(9), ranks, "square_root", layout="in_out", solution="carried"
    )
    rls.update(*batch(0, 9, torch.float64))
    rls.state.restrict(_directions(9)[0])
    with pytest.raises(ValueError, match="use solution='gain'") as caught:
        rls.refactor([batch(0, 9, torch.float64)])
    ranks.barrier()  # the ranks can go on
    return str(caught.value)


def test_a_carried_right_hand_side_that_knows_no_restriction_is_not_rebuilt() -> None:
    assert all("restricted outside of the filter" in text for text in run(2, _carried_and_restricted))


def _asked_for_information(ranks: Ranks) -> int:
    prior, asked, information = prior_of(9), [], rk.Prior.information

    def counted(self: rk.Prior) -> torch.Tensor:
        asked.append(1)
        return information(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rk.Prior, "information", counted)
        rls = ShardedRLSFilter(weight_of(9, torch.float64), prior, ranks, layout="in_out")
        rls.refactor([batch(0, 9, torch.float64)])
    return len(asked)


def test_the_information_of_the_prior_is_formed_for_its_factor_alone() -> None:
    """It is d x d, and was formed with every filter and every rebuild for its trace."""
    once = 1 + 1  # of the state, and of the float64 state that rebuilds
    assert all(count <= once for count in run(2, _asked_for_information))


def _from_nothing(ranks: Ranks, place: str) -> tuple[Any, ...]:
    weight = lay(ranks, weight_of(6, torch.float64), place, "in_out")
    rls = ShardedRLSFilter(weight, rk.Prior.ridge(6, 0.0), ranks, "square_root", layout="in_out")
    first = rls.update(*batch(0, 6, torch.float64))
    try:
        _ = rls.weight
        text = ""
    except UnderdeterminedError as error:
        text = str(error)
    second = rls.update(*batch(1, 6, torch.float64, u=5))
    return first, second, text, full(rls.weight)


@pytest.mark.parametrize("place", ["rows", "columns"])
def test_from_nothing(place: str) -> None:
    alone = rk.RLSFilter(weight_of(6, torch.float64), rk.Prior.ridge(6, 0.0), "square_root", layout="in_out")
    alone.update(*batch(0, 6, torch.float64))
    expected = alone.update(*batch(1, 6, torch.float64, u=5))
    for first, second, text, weight in run(3, _from_nothing, place):
        assert math.isnan(first.innovation_norm)
        assert "knows 3 of 6 directions" in text
        assert second.objective == pytest.approx(expected.objective, rel=1e-8)
        assert relative_error(weight, alone.weight) < 1e-8


def _inplace(ranks: Ranks) -> tuple[bool, bool]:
    weight = lay(ranks, weight_of(8, torch.float32), "columns", "out_in")
    before = weight.to_local().clone()
    copy = ShardedRLSFilter(weight, prior_of(8), ranks, "square_root", layout="out_in")
    copy.update(*batch(0, 8, torch.float32))
    _ = copy.weight
    untouched = torch.equal(weight.to_local(), before)
    rls = ShardedRLSFilter(weight, prior_of(8), ranks, "square_root", layout="out_in", inplace=True)
    rls.update(*batch(0, 8, torch.float32))
    return untouched, torch.equal(full(rls.weight), full(weight)) and torch.equal(full(weight), full(copy.weight))


def test_the_given_weight_is_changed_only_where_that_is_asked_for() -> None:
    assert run(2, _inplace) == [(True, True)] * 2


def _refused(ranks: Ranks, way: tuple[str, str, str]) -> list[tuple[str, bool]]:
    state, solution, form = way
    weight = lay(ranks, weight_of(8, torch.float64), "rows", "in_out")
    rls = ShardedRLSFilter(weight, prior_of(8), ranks, state, layout="in_out", solution=solution, form=form)
    K, targets, noise = batch(0, 8, torch.float64)
    rls.update(K, targets, noise)
    calls = [
        lambda: rls.update(K, targets[:, 1:], noise),
        lambda: rls.update(K, targets * (math.nan if ranks.rank == 1 else 1.0), noise),
        lambda: rls.update(K, targets + ranks.rank, noise),
        lambda: rls.update(K, targets, noise + ranks.rank),
        lambda: rls.update(K, targets * 1e200, noise),
        lambda: rls.remove(batch(5, 8, torch.float64)[0] * 1e3, targets, 1e-9),
        lambda: rls.remove(K, targets, 0.0),
        lambda: rls.update(K, targets, "1"),
    ]
    found = []
    for call in calls:
        before, text = snapshot(rls), ""
        try:
            call()
        except (ValueError, TypeError, RankError, LeverageError) as error:
            text = f"{type(error).__name__}: {error}"
        found.append((text, same(before, snapshot(rls))))
    rls.remove(K, targets, noise)
    found.append(("", relative_error(full(rls.weight), weight_of(8, torch.float64)) < 1e-9))
    return found


@pytest.mark.parametrize("way", [WAYS[1], WAYS[3], WAYS[4]])
def test_what_is_refused_is_refused_by_all_and_changes_nothing(way: tuple[str, str, str]) -> None:
    texts = [
        "V must have shape",
        "rank 1 failed: ValueError: update: V must be finite",
        "a digest of V must be the same on all ranks",
        "noise must be the same on all ranks",
        "scale V",
        "LeverageError",
        "noise must be > 0",
        "noise must be a Python number",
        "",
    ]
    for rank, found in enumerate(run(2, _refused, way)):
        for text, (got, unchanged) in zip(texts, found, strict=True):
            assert unchanged, (text, got)
            assert ("V must be finite" if rank == 1 and "rank 1" in text else text) in got


def _placed(ranks: Ranks, which: str) -> None:
    weight: Any = weight_of(6, torch.float32)
    if which == "partial":
        weight = lay(ranks, weight, "rows", "in_out")
        weight = DTensor.from_local(weight.to_local(), ranks.mesh, [Replicate()], run_check=False)
    if which == "bits":
        weight = weight + ranks.rank
    if which == "uneven":
        rows = slice(0, 4) if ranks.rank == 0 else slice(4, 6)
        weight = DTensor.from_local(
            weight[rows], ranks.mesh, [Shard(0)], run_check=False, shape=weight.shape, stride=weight.stride()
        )
    if which == "nan" and ranks.rank == 0:
        weight[0, 0] = math.nan
    state = "square_root" if which != "state" or ranks.rank else "covariance"
    ShardedRLSFilter(weight, prior_of(6), ranks, state, layout="in_out")


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("partial", "weight must have shape"),
        ("bits", "a digest of the weight"),
        ("uneven", "must have 3 of 6 along dimension 0"),
        ("nan", "weight must be finite"),
        ("state", "state must be the same on all ranks"),
    ],
)
def test_wrong_construction(which: str, message: str) -> None:
    for outcome in run(2, _placed, which, check=False):
        assert isinstance(outcome.error, (ValueError, RankError))
        assert message in str(outcome.error)


def _repaired(ranks: Ranks) -> tuple[int, torch.Tensor]:
    batches = [batch(seed, 8, torch.float64) for seed in range(4)]
    weight = lay(ranks, weight_of(8, torch.float64), "rows", "in_out")
    rls = ShardedRLSFilter(weight, prior_of(8), ranks, "square_root", layout="in_out", history=lambda: batches)
    for entry in batches:
        rls.update(*entry)
    if ranks.rank == 0:
        rls.state._form.L[1, 1] *= 1.5
    rls.update(*batch(4, 8, torch.float64))
    return rls.health().repairs, full(rls.weight)


def test_a_broken_state_is_rebuilt_with_its_weight() -> None:
    expected = rk.RLSFilter(weight_of(8, torch.float64), prior_of(8), "square_root", layout="in_out")
    for seed in range(5):
        expected.update(*batch(seed, 8, torch.float64))
    for repairs, weight in run(2, _repaired):
        assert repairs == 1
        assert relative_error(weight, expected.weight) < 1e-10


def _copied(ranks: Ranks) -> list[str]:
    rls = ShardedRLSFilter(weight_of(8, torch.float32), prior_of(8), ranks, layout="in_out")
    found = []
    for use in (copy.deepcopy, copy.copy, pickle.dumps, lambda f: f.clone(), lambda f: f.state_dict()):
        try:
            use(rls)
        except RuntimeError as error:
            found.append(str(error))
    return found


def test_a_filter_over_ranks_is_not_copied() -> None:
    """Its parts of the weight are those of a model, and its ranks are processes."""
    for found in run(2, _copied):
        assert len(found) == 5
        assert all("neither copied nor saved as a whole" in text for text in found)


def _followed(ranks: Ranks, way: tuple[str, str, str], cast: bool) -> list[torch.Tensor]:
    state, solution, form = way
    weight = lay(ranks, weight_of(8, torch.float32), "rows", "in_out")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        rls = ShardedRLSFilter(weight, prior_of(8), ranks, state, layout="in_out", solution=solution, form=form)
        for seed in range(4):
            rls.update(*batch(seed, 8, torch.float32))
        rls.remove(*batch(1, 8, torch.float32))
        found = [full(rls.weight), torch.tensor([rls.objective, rls.health().drift])]
        rls.refactor([batch(seed, 8, torch.float32) for seed in range(3)])
        return [*found, full(rls.weight), *snapshot(rls)]


@pytest.mark.parametrize("way", WAYS)
def test_autocast_does_not_reach_it(way: tuple[str, str, str]) -> None:
    for one, other in zip(run(2, _followed, way, False), run(2, _followed, way, True), strict=True):
        assert same(one, other)
