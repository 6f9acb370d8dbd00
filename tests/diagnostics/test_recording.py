"""Streams recorded from an editor: what its solvers were given, and the same solution again."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from support.language_models import CONFIG, FACTS, random_moments, tiny, tokenizer

import rlsedit_kernels as rk
from rlsedit.editor import Editor
from rlsedit.methods import get_method
from rlsedit.models import Adapter
from rlsedit.recorded import load_streams, save_streams
from rlsedit.recording import Recorder, recording
from rlsedit_kernels.diagnostics import Batch, Truth, filter_step, make_stream, run_trials


def edited(method: str, recorder: Recorder | None) -> Editor:
    model = tiny("llama")
    recipe = get_method(method) if recorder is None else recording(get_method(method), recorder)
    config = replace(CONFIG, null_threshold=1.0)
    editor = Editor(model, tokenizer(), recipe, config, moments=random_moments(model, CONFIG.layers))
    editor.edit(FACTS, batch_size=2)
    return editor


@pytest.mark.parametrize("method", ["rlsedit", "alphaedit"])
def test_the_recorded_stream_has_the_weights_for_a_solution(method, tmp_path) -> None:
    recorder = Recorder(width=None)
    editor = edited(method, recorder)
    plain = edited(method, None)
    recorder.save(tmp_path / "run.safetensors", "a tiny model")
    streams = load_streams(tmp_path / "run.safetensors")
    assert set(streams) == set(CONFIG.layers)
    for layer, stream in streams.items():
        after = editor.adapter.rows(layer)
        torch.testing.assert_close(after, plain.adapter.rows(layer))  # recording changes nothing
        truth, batches = Truth(stream), list(stream.batches())
        assert sum(len(batch.K) for batch in batches) == len(FACTS)
        for batch in batches:
            truth.add(batch)
        change = after - Adapter.for_model(tiny("llama")).rows(layer)
        assert float((truth.now().W - change).norm() / change.norm()) < 1e-4
        assert "a tiny model" in stream.summary


def test_a_snapshot_leaves_the_recording_out() -> None:
    packing = pytest.importorskip("rlsedit.store.packing")
    editor, plain = edited("rlsedit", Recorder()), edited("rlsedit", None)
    kept, wanted = ({}, {}), ({}, {})
    for out, one in ((kept, editor), (wanted, plain)):
        for layer, state in one._layers.items():
            out[0][layer] = packing.pack(state, str(layer), out[1])
    assert kept[1].keys() == wanted[1].keys()
    solver = next(iter(kept[0].values()))["fields"]["solver"]["fields"]
    assert set(solver) == {"state", "commit", "count"}


def test_it_can_be_followed(tmp_path) -> None:
    recorder = Recorder(width=3)
    edited("rlsedit", recorder)
    recorder.save(tmp_path / "run.safetensors")
    stream = next(iter(load_streams(tmp_path / "run.safetensors").values()))
    assert stream.v == 3
    (trial,) = run_trials(stream, {"guarded": filter_step("guarded")}, 10)
    assert trial.points[-1].batches == 2
    assert trial.worst < 1e-3


def test_an_undone_batch_is_replaced() -> None:
    recorder = Recorder(width=None)
    solver = recording(get_method("rlsedit"), recorder).start(torch.eye(6), replace(CONFIG, layers=(0,)), torch.float64)
    generator = torch.Generator().manual_seed(0)
    K = torch.randn(3, 2, 6, dtype=torch.float64, generator=generator)
    E = torch.randn(3, 2, 4, dtype=torch.float64, generator=generator)
    _, following = solver.propose(K[0], E[0])
    following.propose(K[1], E[1])
    again, last = following.propose(K[2], E[2])
    (log,) = recorder._logs
    assert len(log.batches) == 2
    assert torch.equal(log.batches[1].K, K[2].float())
    other, _ = solver.propose(K[0], E[0])
    recorder_two = Recorder(width=None)
    clean = recording(get_method("rlsedit"), recorder_two).start(
        torch.eye(6), replace(CONFIG, layers=(0,)), torch.float64
    )
    _, clean_following = clean.propose(K[0], E[0])
    expected, _ = clean_following.propose(K[2], E[2])
    assert torch.equal(again.update, expected.update)
    assert last.state.steps == 2
    assert torch.equal(other.update, clean.propose(K[0], E[0])[0].update)


@pytest.mark.parametrize("method", ["memit", "evoedit", "lyaplock", "ft"])
def test_what_is_no_recursion_is_refused(method) -> None:
    with pytest.raises(ValueError, match="must be one recursion"):
        recording(get_method(method), Recorder())


def test_every_kind_of_prior_comes_back(tmp_path) -> None:
    source = make_stream("growing-noise", 12, 3)
    batches = [replace(batch, forget=0.9) for batch in islice(source.batches(), 4)]
    Q = torch.linalg.qr(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)))[0]
    A = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    priors = {
        0: rk.Prior.ridge(12, 2.0),
        1: rk.Prior.anchor(A.T @ A, mu=2.0, lam=0.5),
        2: rk.Prior.anchor_keys(A, mu=1.0, lam=0.1),
        3: rk.Prior.null_space(Q, 0.5),
        4: rk.Prior.precision(A.T @ A),
    }
    save_streams(tmp_path / "x.safetensors", {layer: (prior, batches) for layer, prior in priors.items()})
    for layer, stream in load_streams(tmp_path / "x.safetensors").items():
        assert torch.equal(stream.prior.information(), priors[layer].information())
        for one, two in zip(batches, stream.batches(), strict=True):
            assert torch.equal(one.K, two.K)
            assert torch.equal(one.V, two.V)
            assert (one.noise, one.forget) == (two.noise, two.forget)


def test_bad_files_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        load_streams(tmp_path / "missing.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        load_streams(tmp_path / "junk.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="must have the schema"):
        load_streams(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="at least one layer"):
        save_streams(tmp_path / "x.safetensors", {})
    save_streams(tmp_path / "y.safetensors", {0: (rk.Prior.ridge(4, 1.0), [Batch(torch.ones(1, 4), torch.ones(1, 2))])})
    with pytest.raises(ValueError, match="width must be"):
        Recorder(width=0)
