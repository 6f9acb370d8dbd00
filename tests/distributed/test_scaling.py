"""The scaling table: a cell by hand, what must rise and fall, volumes that were counted, and the documentation."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import sharded as helpers
from support.ranks import run

from rlsedit_kernels.distributed import Ranks, ShardedCovarianceState, scaling
from rlsedit_kernels.distributed.scaling import FORMS, GPUS, MODELS, Rates
from rlsedit_kernels.distributed.volume import Received, batch_bytes

ROOT = Path(__file__).resolve().parents[2]
LLAMA = MODELS[0]


def test_a_cell_by_hand() -> None:
    """One GPU and eight, d = 14,336, v = 4,096, u = 100, the plain form; d^2 = 205,520,896, d v = 58,720,256."""
    alone = scaling.single(LLAMA, "plain", 100, Rates())
    products = 2 * 205_520_896 * 100 / 100e12  # above 4 d^2 / 4.3e12 = 1.9e-4
    downdate = 6 * 205_520_896 / 4.3e12  # above d^2 u / 100e12 = 2.1e-4
    weight = 2 * (2 * 58_720_256 * 100 / 67e12)  # above 4 d v / 4.3e12 and 8 d v / 4.3e12
    solve = 4 * 14_336 * 100**2 / 100e12  # above 16 d u / 4.3e12
    assert alone.time == pytest.approx((products + downdate + weight + solve) / 0.75 + 45e-6, rel=1e-12)
    assert alone.time == pytest.approx(1.45e-3, rel=5e-3)
    assert alone.memory == 4 * 205_520_896

    eight = scaling.sharded(LLAMA, "plain", 100, 8, Rates())
    keys = 7 * 1792 * 100 * 4
    small = 2 * 7 * 8 * 12 + 2 * 7 * 63 * 8  # two exchanges of 12 numbers; 500 float64 of probes, in parts of 63
    error = 2 * 7 * 51_200 * 4  # K W, 409,600 numbers
    assert eight.received == 2 * keys + small + error == 12_910_800
    assert eight.communication == pytest.approx(8 * 20e-6 + 12_910_800 / (450e9 * 0.8), rel=1e-12)
    assert eight.memory == 1792 * 14_336 * 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gpus", [2, 3, 8, 64])
def test_traffic_is_what_the_formula_of_volumes_says(form: str, gpus: int) -> None:
    for d, u in ((14336, 100), (1000, 7)):
        pieces = scaling.traffic(form, d, u, 64, gpus, weight=False)
        assert sum(bytes_ for _, bytes_ in pieces) == batch_bytes(form, d, u, gpus, prior_root=True)


def _counted(ranks: Ranks, form: str, d: int, u: int) -> tuple[int, int]:
    state = ShardedCovarianceState(helpers.prior("precision", d), ranks, form=form, guard="off")
    state.update(helpers.columns(ranks, helpers.keys(u, d, 1)))
    with Received() as received:
        state.update(helpers.columns(ranks, helpers.keys(u, d, 2)))
    return received.bytes, sum(received.calls.values())


@pytest.mark.parametrize("form", FORMS)
def test_traffic_is_what_is_counted(form: str) -> None:
    d, u = 20, 3
    pieces = scaling.traffic(form, d, u, 0, 3, weight=False)
    for counted in run(3, _counted, form, d, u):
        assert counted == (sum(bytes_ for _, bytes_ in pieces), len(pieces))


def test_what_must_rise_and_fall() -> None:
    rates = Rates()
    for model in MODELS:
        for form in FORMS if model.experts == 1 else ("plain", "whitened"):
            cost = scaling.bank if model.experts > 1 else scaling.sharded
            costs = [cost(model, form, 100, count, rates) for count in GPUS]
            for less, more in itertools.pairwise(costs):
                assert more.memory < less.memory
                assert more.received > less.received
                assert less.gpus == 1 or more.compute < less.compute
            wider = replace(model, d=2 * model.d)
            for count in GPUS:
                here = cost(model, form, 100, count, rates)
                assert cost(wider, form, 100, count, rates).time > here.time
                assert cost(model, form, 200, count, rates).time > here.time
                assert cost(model, form, 100, count, replace(rates, memory=9e12, kernel_flops=9e14)).time <= here.time
                slower = cost(model, form, 100, count, replace(rates, nvlink=5e9, infiniband=5e8))
                assert (slower.communication > here.communication) == (count > 1)


def test_rows_of_the_table() -> None:
    rows = scaling.table(Rates())
    assert len(rows) == 3 * len(FORMS) * len(GPUS) + len(GPUS)
    for row in rows:
        assert row["layer_ms"] == pytest.approx(row["compute_ms"] + row["communication_ms"])
        assert row["efficiency"] <= 1.0
        assert row["speedup"] == pytest.approx(row["efficiency"] * row["gpus"])
        assert row["gpus"] > 1 or (row["speedup"], row["received_MB"]) == (1.0, 0.0)
        assert row.get("fused_layer_ms", 0.0) <= row["layer_ms"]
    tight = scaling.table(Rates(room=50e9), models=MODELS[2:3], forms=("plain",))
    assert [row["fits"] for row in tight] == [False] + [True] * 6  # five layers of 11.3 GB


def test_where_it_pays() -> None:
    rates = Rates()
    for form, count in itertools.product(FORMS, (2, 8)):
        least = scaling.pays_from(form, 100, count, rates)
        for d, faster in ((least, True), (None if least is None else least - 256, False)):
            if d:
                model = scaling.Model("", d, round(d / 3.5), 1)
                here = scaling.sharded(model, form, 100, count, rates).time
                assert (here < scaling.single(model, form, 100, rates).time) == faster


def test_the_efficiency_of_kernels_comes_from_a_measurement() -> None:
    d, u = 14336, 100
    floors = {"gain_products": 2 * d * d * u / 100e12, "downdate_": 6 * d * d / 4.3e12}
    rows = [{"what": what, "name": "cuda", "d": d, "u": u, "median_ms": 2e3 * s} for what, s in floors.items()]
    rows.append({"what": "downdate_", "name": "torch", "d": d, "u": u, "median_ms": 1e9})
    result: dict[str, Any] = {"settings": {"gpu": "NVIDIA H200"}, "rows": rows}
    assert Rates().measured(result).efficiency == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"bench/gpu\.py on a GPU"):
        Rates().measured({**result, "settings": {"gpu": "none"}})


@pytest.mark.parametrize("bad", [{"memory": 0.0}, {"efficiency": 1.5}, {"node": -1}, {"near": float("nan")}])
def test_rates_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Rates: {next(iter(bad))} must be"):
        Rates(**bad)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.delitem(sys.modules, "scaling", raising=False)
    import scaling as module  # type: ignore[import-not-found]

    yield module
    sys.modules.pop("scaling", None)


def test_documentation_and_result_are_what_the_command_gives(command: Any) -> None:
    options, rates, source = command.parsed([])
    rows = scaling.table(rates, u=options.u)
    text = command.DOCS.read_text(encoding="utf-8")
    assert command.fill(text, command.markdown(rows, rates, options.u, source)) == text
    stored = json.loads((ROOT / "bench" / "results" / "scaling.json").read_text(encoding="utf-8"))
    assert stored["settings"]["rates"].keys() == command.WORDS.keys()
    assert stored["rows"] == rows, "run: python bench/scaling.py --json bench/results/scaling.json --docs"


def test_every_assumption_is_a_flag(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, rates, _ = command.parsed(["--infiniband", "25e9", "--near", "1e-5", "--node", "4"])
    assert rates == replace(Rates(), infiniband=25e9, near=1e-5, node=4)
    for bad in (["--efficiency", "2"], ["--u", "0"], ["--node", "-8"]):
        with pytest.raises(SystemExit) as caught:
            command.parsed(bad)
        assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
    assert torch.finfo(torch.float32).bits == 8 * scaling.ITEM
