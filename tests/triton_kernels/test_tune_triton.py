"""bench/tune_triton.py: nothing but the op is timed, the best take turns, and the present row is among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import tune_triton
from gpu_bench import Problem

from rlsedit_kernels.triton_kernels import tuning
from rlsedit_kernels.triton_kernels.tuning import Tiles

TILES = [Tiles(rows, 32, 32) for rows in (16, 32, 64, 128, 256, 512, 1024)]
COST = dict(zip(TILES, (7.0, 3.0, 1.0, 4.0, 2.0, 5.0, 6.0), strict=True))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Tiles]:
    """The tiles of every call that was timed; the present row stands behind most others."""
    calls: list[Tiles] = []

    def seconds(function: Any, device: str) -> float:
        function()
        calls.append(tuning.tiles("gain_products", torch.empty(0), 8))
        return COST[calls[-1]]

    monkeypatch.setattr(tune_triton, "seconds", seconds)
    monkeypatch.setattr(tune_triton.triton_kernels, "gain_products", lambda C, K: None)
    return calls


def test_the_best_take_turns_with_the_present_row(timed, capsys) -> None:
    problem, kept = Problem(20, 3, 4, "cpu"), tuning.tiles
    found = tune_triton.ranked("gain_products", problem, TILES, TILES[0], 3, "cpu", float("inf"))
    assert [median for median, _ in found] == [1.0, 2.0, 3.0, 4.0, 5.0, 7.0]
    assert [each for _, each in found][-1] == TILES[0]
    last = timed[3 * len(TILES) :]
    assert len(last) == 3 * 6
    assert last[:6] == last[6:12] == last[12:]
    assert tuning.tiles is kept


def test_what_fails_is_said_and_left_out(timed, capsys, monkeypatch) -> None:
    def fails(C: torch.Tensor, K: torch.Tensor) -> None:
        if tuning.tiles("gain_products", C, 8) == TILES[2]:
            raise RuntimeError("no room")

    monkeypatch.setattr(tune_triton.triton_kernels, "gain_products", fails)
    found = tune_triton.ranked("gain_products", Problem(20, 3, 4, "cpu"), TILES, TILES[2], 1, "cpu", float("inf"))
    assert [median for median, _ in found] == [2.0, 3.0, 4.0, 5.0, 6.0]
    assert "RuntimeError: no room" in capsys.readouterr().err


def test_nothing_is_timed_once_the_time_is_used_up(timed) -> None:
    assert tune_triton.ranked("gain_products", Problem(20, 3, 4, "cpu"), TILES, TILES[0], 3, "cpu", -1.0) == []
    assert timed == []
