"""Trials whose steps work on a GPU (`--device cuda`, with a GPU or a pretended one); the truth stays on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from support.default_device import plain_torch_under

import rlsedit_kernels as rk
from rlsedit.cli.main import main
from rlsedit_kernels.diagnostics import FORMS, STREAMS, Stream, Truth, make_steps, make_stream, run_trials, theory

if torch.get_default_device().type != "cuda":
    pytest.skip("needs --device cuda, with a GPU or --pretend-cuda", allow_module_level=True)

D, U, BATCHES = 24, 4, 12


@pytest.fixture(autouse=True, params=["cpu", "cuda"], ids=["default-cpu", "default-cuda"])
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    with plain_torch_under(request.param):
        yield


class Watching:
    """A step of one's own, which notes where it was given what."""

    def __init__(self, stream: Stream) -> None:
        self.weight, self.seen = stream.W_0.clone(), {stream.W_0.device}

    def update(self, K: torch.Tensor, V: torch.Tensor, noise: float, forget: float) -> None:
        self.seen |= {K.device, V.device}


@pytest.mark.parametrize("name", STREAMS)
def test_errors_are_those_of_the_cpu(name: str) -> None:
    steps = make_steps(tuple(FORMS), ("float64",))
    there, here = (run_trials(make_stream(name, D, U), steps, BATCHES, device=where) for where in ("cuda", None))
    for mine, theirs in zip(there, here, strict=True):
        if theirs.step.endswith("float64"):
            assert mine.refused_at is theirs.refused_at is None, mine.reason
            assert mine.worst < max(10.0 * theirs.worst, 1e-12)
            assert all(point.error_C is not None for point in mine.points)


def test_steps_are_fed_where_they_work() -> None:
    made: list[Watching] = []

    def make(stream: Stream) -> Watching:
        made.append(Watching(stream))
        return made[-1]

    (trial,) = run_trials(make_stream("easy", D, U), {"mine": make}, 3, device="cuda")
    assert made[0].seen == {torch.device("cuda", 0)}
    assert trial.points[-1].error_W > 0.1


def test_theory() -> None:
    """Worked out on the CPU whatever the default device."""
    assert theory.consistency(8, 4, 2, 4, at=[4])
    truth = Truth(make_stream("easy", D, U))
    assert truth.now().W.device.type == "cpu"


@pytest.mark.parametrize("forced", ["torch", "cuda"])
def test_the_command(forced: str, tmp_path, capsys) -> None:
    if (info := next(row for row in rk.backends() if row.name == forced)).reason:
        pytest.skip(f"back end {forced!r}: {info.reason}")
    command = ["stability", "--dk", "16", "--batch", "4", "--batches", "8", "--streams", "weak-0.1", "--device", "cuda"]
    assert main([*command, "--backend", forced, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert "weak-0.1" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert (settings["device"], settings["backend"]) == ("cuda", forced)
    assert f"on cuda, back end {forced}" in (tmp_path / "out" / "stability.md").read_text(encoding="utf-8")
