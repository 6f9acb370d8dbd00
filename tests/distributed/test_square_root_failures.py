"""A rank that fails in the middle of a batch: every rank hears of it, and no rank has changed anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import builders
from support.ranks import run
from torch.distributed.device_mesh import DeviceMesh

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import Ranks, ShardedRLSFilter, ShardedSquareRootState
from rlsedit_kernels.errors import RankError

D, V = 9, 4


def keys(seed: int) -> torch.Tensor:
    return builders.tensor(builders.keys(3, D, np.random.default_rng(seed)), torch.float32)


def parts(state: Any) -> list[torch.Tensor]:
    """What this rank has of a state."""
    return [state._form.L.clone(), state._probes.image.clone(), torch.tensor([state.steps, state._writes])]


class Failing(Ranks):
    """Ranks of which one has no memory left when it comes to its collective of this number."""

    def __init__(self, mesh: DeviceMesh, bad: int) -> None:
        self.bad, self.calls, self.at = bad, 0, -1
        super().__init__(mesh, timeout=15.0)

    def _wait(self, what: str, start: Callable[[], Any]) -> None:
        self.calls += 1
        if self.rank == self.bad and self.calls == self.at:
            raise MemoryError("no room")
        super()._wait(what, start)


def _ranks(bad: int) -> Failing:
    """A group of its own, so that the next one is not touched by its end."""
    return Failing(DeviceMesh.from_group(dist.new_group(list(range(dist.get_world_size()))), "cpu"), bad)


def _subject(ranks: Ranks, kind: str) -> tuple[list[Callable[[], Any]], Callable[[], list[torch.Tensor]]]:
    """Calls, and what this rank has."""
    prior = rk.Prior.anchor(builders.spd(D, 10.0, np.random.default_rng(0)), lam=0.5)
    if kind == "state":
        state = ShardedSquareRootState(prior, ranks)
        B = state.zeros(V)
        state.append_with(B, keys(0), torch.ones(3, V))
        calls: list[Callable[[], Any]] = [
            lambda: state.update(keys(1)),
            lambda: state.append_with(B, keys(2), torch.ones(3, V)),
            lambda: state.remove_with(B, keys(0), torch.ones(3, V)),
        ]
        return calls, lambda: [*parts(state), B.to_local().clone()]
    weight = ranks.dtensor(torch.ones(D, V)[ranks.rows(D)], D)
    solution = "gain" if kind == "gain" else "carried"
    rls = ShardedRLSFilter(weight, prior, ranks, "square_root", layout="in_out", solution=solution)
    rls.update(keys(0), torch.ones(3, V))
    if kind != "unread":
        _ = rls.weight
    calls = [lambda: rls.update(keys(1), torch.ones(3, V)), lambda: rls.remove(keys(0), torch.ones(3, V))]
    solution: Any = rls._solution
    return calls, lambda: [*parts(rls.state), rls._weight.clone(), torch.tensor(rls.objective), *_carried(solution)]


def _carried(solution: Any) -> list[torch.Tensor]:
    if not hasattr(solution, "B"):
        return []
    change = [] if solution._change is None else [solution._change.W.clone()]
    return [solution.B.to_local().clone(), torch.tensor([solution._read, solution._steps]), *change]


def _fails(ranks: Ranks, kind: str, which: int, shares: list[float]) -> list[tuple[str, bool]]:
    """A call in which the last rank but one fails, after these shares of its collectives."""
    trial = _ranks(-1)
    calls, _ = _subject(trial, kind)
    before = trial.calls
    calls[which]()
    length = trial.calls - before
    found = []
    for share in shares:
        failing = _ranks(2)
        calls, state = _subject(failing, kind)
        kept, text = state(), ""
        dist.barrier()  # or a rank that is late hears of the failure before it has come to the call
        failing.at = failing.calls + max(1, round(share * length))
        try:
            calls[which]()
        except (MemoryError, RankError) as error:
            text = f"{type(error).__name__}: {error}"
        same = all(torch.equal(a, b) for a, b in zip(kept, state(), strict=True))
        found.append((text, same))
    return found


CASES = [("state", 0), ("state", 1), ("state", 2), ("gain", 0), ("gain", 1), ("carried", 0), ("carried", 1)]
CASES += [("unread", 0)]


@pytest.mark.parametrize(("kind", "which"), CASES)
def test_a_rank_that_fails_at_any_point_of_a_batch(kind: str, which: int) -> None:
    shares = [0.0, 0.5, 1.0] if which == 0 else [0.6, 1.0]
    for rank, found in enumerate(run(4, _fails, kind, which, shares)):
        for text, unchanged in found:  # heard of, not given up after a time limit
            assert unchanged
            assert text == "MemoryError: no room" if rank == 2 else "rank 2 failed: MemoryError: no room" in text
