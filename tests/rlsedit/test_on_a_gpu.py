"""What needs no language model, on a GPU: solves of the methods, weights, records, snapshots and low-rank changes.

Second moments lie on the CPU, as read from a file; `--device cuda`, with a GPU or a pretended one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.default_device import plain_torch_under
from support.method_streams import CONFIG, D, V, moment, stream
from support.published import RULES
from support.tolerances import relative_error

from rlsedit.deviations import Deviations
from rlsedit.export.lowrank import low_rank, noise_edge
from rlsedit.facts import Fact
from rlsedit.methods import get_method
from rlsedit.methods.dense import published
from rlsedit.methods.method import Start
from rlsedit.parallel.one import OneProcess
from rlsedit.parallel.processes import Processes
from rlsedit.recording import Recorder, recording
from rlsedit.store import tensors
from rlsedit.store.journal import MemoryJournal
from rlsedit.store.packing import pack, unpack
from rlsedit.store.records import LayerRows, Record
from rlsedit.store.removal import take_out
from rlsedit.weights import EditedWeights
from rlsedit.writing import LayerState
from rlsedit.writing.job import applied

if torch.get_default_device().type != "cuda":
    pytest.skip("needs --device cuda, with a GPU or --pretend-cuda", allow_module_level=True)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BATCHES = 4
METHODS = [*RULES, "alphaedit_dense"]


@pytest.fixture(autouse=True, params=["cpu", "cuda"], ids=["default-cpu", "default-cuda"])
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    with plain_torch_under(request.param):
        yield


def second_moment() -> torch.Tensor:
    with CPU:
        return moment()


def batches(name: str, device: torch.device, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    with CPU:
        made = stream(name)[:BATCHES]
    return [tuple(part.to(device, dtype) for part in batch) for batch in made]


@pytest.mark.parametrize("name", METHODS)
def test_solves(name: str) -> None:
    """Double precision: that a float32 state is as good on a GPU is what tests/states shows."""

    def updates(device: torch.device) -> list[torch.Tensor]:
        solver = get_method(name).start(second_moment(), CONFIG, torch.float64, device)
        found = []
        for batch in batches(name, device, torch.float64):
            proposal, solver = solver.propose(*batch)
            found.append(proposal.update)
        assert solver.health() is not None
        return found

    for mine, theirs in zip(updates(GPU), updates(CPU), strict=True):
        assert mine.device == GPU
        assert relative_error(mine, theirs) < 1e-8


@pytest.mark.parametrize("name", RULES)
def test_published_solves(name: str) -> None:
    def updates(device: torch.device) -> list[torch.Tensor]:
        solve = published(name, Start(second_moment(), CONFIG, torch.float64, device))
        assert solve is not None
        return [solve(*batch) for batch in batches(name, device, torch.float64)]

    for mine, theirs in zip(updates(GPU), updates(CPU), strict=True):
        assert mine.device == GPU
        assert relative_error(mine, theirs) < 1e-8


@pytest.mark.parametrize("name", METHODS)
def test_snapshots(name: str, tmp_path) -> None:
    """Written from the GPU, read back to it, and gone on with to the same bits."""
    method, (first, *others) = get_method(name), batches(name, GPU, torch.float32)
    solver = method.start(second_moment(), CONFIG, torch.float32, GPU)
    _, solver = solver.propose(*first)
    kept: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(pack(solver, "solver", kept)))
    (tmp_path / "state").write_bytes(b"".join(tensors.blocks(kept, None)))
    again = unpack(
        tree, tensors.read(tmp_path / "state", GPU), method.start(second_moment(), CONFIG, torch.float32, GPU)
    )
    for batch in others:
        (mine, solver), (theirs, again) = again.propose(*batch), solver.propose(*batch)
        solver, again = again, solver
        assert torch.equal(mine.update, theirs.update)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights(dtype: torch.dtype) -> None:
    with CPU:
        first = torch.randn(D, V, generator=torch.Generator().manual_seed(5))
    weight = first.to(GPU, dtype)
    weights = edited({0: weight})
    before = tensors.checksum(weight)
    assert before == tensors.checksum(first.to(dtype))
    weights.add(0, torch.full((D, V), 0.5, device=GPU))
    assert weights.wide(0).device == weight.device == GPU
    assert tensors.checksum(weight) != before
    weights.put(0, first.to(GPU) + 1.0)
    weights.undo()
    assert tensors.checksum(weight) == before


def edited(given: dict[int, torch.Tensor]) -> EditedWeights:
    adapter: Any = SimpleNamespace(rows=given.__getitem__, processes=OneProcess(), module="mlp")
    return EditedWeights(adapter, list(given))


@pytest.mark.parametrize("name", ["rlsedit", "memit", "alphaedit"])
def test_edits_are_taken_back(name: str) -> None:
    """A ledger in memory, on the host; the rows go to the GPU when they are needed."""

    def left(device: torch.device) -> torch.Tensor:
        method, journal, weight = get_method(name), MemoryJournal(), torch.zeros(D, V, device=device)
        weights, gram = edited({0: weight}), second_moment().to(device, torch.float32)
        solver = method.start(second_moment(), CONFIG, torch.float32, device)
        states = {0: LayerState(solver, Deviations(torch.zeros_like(weight), gram))}
        for number, (keys, residual, _) in enumerate(batches(name, device, torch.float32), 1):
            rows = LayerRows(keys, residual, target=states[0].deviations.target(keys, residual))
            states = {0: applied(method, CONFIG, weights, states[0], 0, rows)}
            facts = tuple(Fact(f"{number}-{i}", "The {} is", f"s{number}-{i}", "new") for i in range(len(keys)))
            noise = method.noise(CONFIG, len(keys))
            journal.append(Record(number, "batch", "", facts, noise=noise, layers={0: rows}))
        take_out(method, CONFIG, weights, states, journal, journal.index, ["1-0", "2-3"])
        return weight

    mine = left(GPU)
    assert mine.device == GPU
    assert relative_error(mine, left(CPU)) < 1e-4


def test_values_on_the_host_are_sent_by_the_gpu() -> None:
    """NCCL sends nothing from the host; tokens that were drawn there, and marks of files, come back to it."""

    def sent(value: torch.Tensor, _source: int = 0) -> torch.Tensor:
        assert value.device == GPU
        return value

    processes = Processes.__new__(Processes)
    processes.ranks = SimpleNamespace(device=GPU, broadcast=sent, ordered_sum=sent)  # type: ignore[assignment]
    given = (torch.tensor([3, 4], device=CPU), torch.tensor([True], device=CPU), torch.ones(2, device=GPU))
    for found in (processes.same(*given), processes.total(*given)):
        for mine, value in zip(found, given, strict=True):
            assert (mine.device, mine.dtype, mine.tolist()) == (value.device, value.dtype, value.tolist())


@pytest.mark.parametrize("dense", [1024, 16])
def test_low_rank(dense: int) -> None:
    with CPU:
        left, right = (torch.randn(700, 3, generator=torch.Generator().manual_seed(i)) for i in range(2))
    found = low_rank((left @ right.mT).to(GPU), 1e-3, dense=dense)
    assert (found.left.device, found.rank) == (GPU, 3)
    assert found.frobenius < 1e-6
    assert noise_edge(left.to(GPU), torch.bfloat16) == pytest.approx(noise_edge(left, torch.bfloat16))


def test_a_recorded_stream(tmp_path) -> None:
    def saved(device: torch.device) -> bytes:
        recorder = Recorder(width=4)
        solver = recording(get_method("rlsedit"), recorder).start(
            second_moment(), replace(CONFIG, layers=(0,)), torch.float64, device
        )
        for keys, residual, _ in batches("rlsedit", device, torch.float64):
            _, solver = solver.propose(keys, residual)
        recorder.save(tmp_path / "stream.safetensors")
        return (tmp_path / "stream.safetensors").read_bytes()

    assert len(saved(GPU)) == len(saved(CPU)) > 0
