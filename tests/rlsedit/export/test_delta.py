"""The delta: back to the last bit as bits, to rounding as factors, onto its base model only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import language_models as lm
from support.bits import same

from rlsedit.export import Checkpoint, apply_delta, between, delta_changes, load_delta, save_delta, write_folder

ONE = "model.layers.1.mlp.down_proj.weight"


def delta_of(pair: Any, out: Path, form: str = "bits") -> Any:
    base = Checkpoint(pair.base)
    changes = between(base, Checkpoint(pair.edited))
    return save_delta(base, changes, out / "edits.safetensors", form=form, method="rlsedit", edits=4)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def with_header(file: Path, change: Any) -> None:
    with safe_open(file, "pt") as stream:
        about = json.loads(stream.metadata()["rlsedit_delta"])
    change(about)
    save_file(load_file(file), file, {"rlsedit_delta": json.dumps(about)})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bits_come_back(make_pair: Any, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    pair = make_pair(family, dtype)
    delta = delta_of(pair, tmp_path)
    assert [entry.form for entry in delta.entries] == ["bits", "bits"]
    assert [entry.error for entry in delta.entries] == [0.0, 0.0]
    model = pair.load()
    apply_delta(model, tmp_path / "edits.safetensors")
    assert same(state(model), state(pair.editor.model))
    base = Checkpoint(pair.base)
    out = write_folder(base, delta_changes(base, delta), tmp_path / "out")
    assert same(state(pair.load(out)), state(pair.editor.model))


def test_a_float_difference_would_not_come_back(pair: Any, tmp_path: Path) -> None:
    """The reason for bit patterns: W_0 + (W - W_0) is another number in places."""
    first, last = pair.load().state_dict()[ONE], pair.editor.model.state_dict()[ONE]
    assert not torch.equal(first + (last - first), last)
    delta_of(pair, tmp_path)
    assert torch.equal(apply_and_read(pair, tmp_path), last)


def apply_and_read(pair: Any, folder: Path) -> torch.Tensor:
    model = pair.load()
    apply_delta(model, folder / "edits.safetensors")
    return model.state_dict()[ONE]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factors_are_smaller_and_exact_to_rounding(make_pair: Any, tmp_path: Path, family: str) -> None:
    pair = make_pair(family)
    delta = delta_of(pair, tmp_path, "auto")
    assert [(entry.form, entry.rank) for entry in delta.entries] == [("factors", 4), ("factors", 4)]
    assert all(0 < entry.error < 2**-23 for entry in delta.entries)
    model = pair.load()
    apply_delta(model, delta)
    for name, value in pair.editor.model.state_dict().items():
        if not torch.equal(model.state_dict()[name], value):
            assert name in {entry.name for entry in delta.entries}
            assert ((model.state_dict()[name] - value).norm() / value.norm()) < 2**-23
    smaller = (tmp_path / "edits.safetensors").stat().st_size
    delta_of(pair, tmp_path, "bits")
    assert smaller < (tmp_path / "edits.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_auto_keeps_bits_where_factors_would_not_be_exact(make_pair: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    assert {entry.form for entry in delta_of(make_pair("llama", dtype), tmp_path, "auto").entries} == {"bits"}


def test_a_delta_says_what_it_is(pair: Any, tmp_path: Path) -> None:
    written = delta_of(pair, tmp_path)
    delta = load_delta(tmp_path / "edits.safetensors")
    assert delta == written
    assert (delta.method, delta.edits, delta.base) == ("rlsedit", 4, "base")
    assert delta.config["model_type"] == "llama"
    assert len(delta.fingerprint) == 64
    assert delta.versions["torch"]
    assert [entry.name for entry in delta.entries] == [ONE, ONE.replace(".1.", ".2.")]
    assert delta.entries[0].before == Checkpoint(pair.base).digest(ONE)
    assert [p.name for p in tmp_path.iterdir()] == ["edits.safetensors"]


@pytest.mark.parametrize("form", ["bits", "factors"])
def test_another_base_is_refused_by_name(pair: Any, tmp_path: Path, form: str) -> None:
    delta = delta_of(pair, tmp_path, form)
    model = pair.load()
    second = delta.entries[1].name
    with torch.no_grad():
        model.get_parameter(second)[0, 0].add_(1e-6)
    before = state(model)
    with pytest.raises(ValueError, match=rf"{second} is not that of the base model 'base' the delta was made from"):
        apply_delta(model, delta)
    assert same(before, state(model)), "the first weight fits, and is not written either"


@pytest.mark.parametrize("form", ["bits", "factors"])
def test_an_edited_model_is_refused(pair: Any, tmp_path: Path, form: str) -> None:
    delta = delta_of(pair, tmp_path, form)
    with pytest.raises(ValueError, match=rf"{ONE} holds this edit already"):
        apply_delta(pair.load(pair.edited), delta)
    with pytest.raises(ValueError, match=rf"{ONE} holds this edit already"):
        delta_changes(Checkpoint(pair.edited), delta)
    model = pair.load()
    apply_delta(model, delta)
    before = state(model)
    with pytest.raises(ValueError, match=r"holds this edit already|another model, or one that has been edited"):
        apply_delta(model, delta)
    assert same(before, state(model))


def test_other_architectures_and_dtypes_are_refused(make_pair: Any, tmp_path: Path) -> None:
    pair = make_pair()
    delta = delta_of(pair, tmp_path)
    with pytest.raises(ValueError, match=r"made from 'base' with model_type = 'llama', this model has 'gpt2'"):
        apply_delta(make_pair("gpt2").load(), delta)
    with pytest.raises(ValueError, match=r"made from 'base' with num_hidden_layers = 5, this model has 3"):
        apply_delta(lm.tiny("llama", torch.float32, num_hidden_layers=3), delta)
    with pytest.raises(ValueError, match=r"must be float32 .* got bfloat16; load the model with dtype=torch\.float32"):
        apply_delta(pair.load().to(torch.bfloat16), delta)
    with pytest.raises(ValueError, match=r"must be float32 .* got bfloat16"):
        delta_changes(Checkpoint(make_pair("llama", torch.bfloat16).base), delta)
    wrapped = pair.load()
    wrapped.model.layers[1].mlp.down_proj = torch.nn.Sequential(wrapped.model.layers[1].mlp.down_proj)
    with pytest.raises(ValueError, match=rf"{ONE} must be a plain linear layer of shape \(32, 48\), got Sequential"):
        apply_delta(wrapped, delta)


@pytest.mark.parametrize("form", ["bits", "factors"])
def test_a_damaged_file_is_found(pair: Any, tmp_path: Path, form: str) -> None:
    delta_of(pair, tmp_path, form)
    good, bad, model = tmp_path / "edits.safetensors", tmp_path / "bad.safetensors", pair.load()
    before, data = state(model), good.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    places = [0, 3, 9, start // 2, start, (start + len(data)) // 2, len(data) - 1]
    for at in places:
        bad.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"bad\.safetensors"):
            apply_delta(model, bad)
    for keep in (0, 5, start - 1, start, len(data) - 1):
        bad.write_bytes(data[:keep])
        with pytest.raises(ValueError, match=r"bad\.safetensors"):
            apply_delta(model, bad)
    assert same(before, state(model))


def test_altered_headers_are_refused(pair: Any, tmp_path: Path) -> None:
    file = tmp_path / "edits.safetensors"

    def fails(change: Any, words: str) -> None:
        delta_of(pair, tmp_path)
        with_header(file, change)
        with pytest.raises(ValueError, match=words):
            load_delta(file)

    fails(lambda about: about.update(format=2), r"format 2, this version reads 1")
    fails(lambda about: about.pop("fingerprint"), r"incomplete: KeyError 'fingerprint'")
    fails(lambda about: about["config"].update(vocab_size=1), "has been altered")
    fails(lambda about: about["entries"][0].update(before="0" * 64), "has been altered")
    fails(lambda about: about["entries"].pop(), "has been altered")
    fails(lambda about: about["entries"][0].update(form="zip"), "incomplete: KeyError 'zip'")
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="no delta of rlsedit"):
        load_delta(file)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_delta(tmp_path / "nothing")
    with pytest.raises(ValueError, match="form must be 'auto', 'bits' or 'factors', got 'zip'"):
        delta_of(pair, tmp_path, "zip")


def test_onto_the_base_under_other_names(make_pair: Any, tmp_path: Path) -> None:
    """A delta made from a folder that save_pretrained wrote goes onto the files of the hub."""
    pair = make_pair("gpt2", shards=False)
    delta = delta_of(pair, tmp_path)
    shutil.copytree(pair.base, tmp_path / "hub")
    tensors = load_file(pair.base / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(bare, tmp_path / "hub" / "model.safetensors", {"format": "pt"})
    hub = Checkpoint(tmp_path / "hub")
    out = write_folder(hub, delta_changes(hub, delta), tmp_path / "out")
    assert same(state(pair.load(out)), state(pair.editor.model))
