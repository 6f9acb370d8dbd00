"""The store that ends with rank 0: what fails there is heard, and what rank 0 need not wait for comes to its end."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import end, fork
from support.rank_kills import tcp_store

from rlsedit_kernels import Prior

SIZE, D = 3, 7


def _work(rank: int, folder: str, case: str, pipe: Any) -> None:
    import torch.distributed as dist

    from rlsedit_kernels.distributed import Ranks, ShardedCovarianceState

    torch.set_num_threads(1)
    store = tcp_store(Path(folder) / "port", rank, SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60))
    state = ShardedCovarianceState(Prior.ridge(D, 1.0), Ranks(timeout=20.0), form="plain")
    prepared = state.prepare(torch.eye(D)[:2])
    try:
        if case == "raises":
            if rank == 0:
                with state.ranks.guarded("a step"):
                    raise MemoryError("no room")
            state.update(torch.eye(D)[:2])
        elif rank > 0:
            time.sleep(1.0)
        state.write(prepared)
        text = "written"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    pipe.send(text)
    os._exit(0)  # at once, and with rank 0 the store


def _texts(folder: Path, case: str) -> list[str]:
    pipes, processes = fork(SIZE, _work, str(folder), case)
    try:
        assert all(pipe.poll(60.0) for pipe in pipes)
        return [pipe.recv() for pipe in pipes]
    finally:
        end(processes)


@pytest.mark.parametrize("case", ["raises", "is done first"])
def test_rank_0_may_end_before_the_others(case: str, tmp_path: Path) -> None:
    found = _texts(tmp_path, case)
    if case == "raises":
        assert found[0] == "MemoryError: no room"
        assert all("a step: rank 0 failed: MemoryError: no room" in text for text in found[1:]), found
    else:
        assert found == ["written"] * SIZE
