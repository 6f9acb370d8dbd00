"""The edited model as a folder: only the edited bytes differ from the base's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import language_models as lm
from support.bits import same
from transformers import AutoTokenizer

from rlsedit.export import Checkpoint, between, export_folder, given, write_folder

DOWN = "model.layers.{}.mlp.down_proj.weight"


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_loads_is_the_edited_model(make_pair: Any, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    pair = make_pair(family, dtype)
    base = Checkpoint(pair.base)
    changes = between(base, Checkpoint(pair.edited))
    assert [change.module.split(".")[2] for change in changes] == ["1", "2"]
    assert {change.layout for change in changes} == {"in_out" if family == "gpt2" else "out_in"}
    out = write_folder(base, changes, tmp_path / "out")
    assert same(pair.load(out), pair.editor.model)
    text = "Oslo is a city in Norway"
    assert AutoTokenizer.from_pretrained(out)(text) == lm.tokenizer()(text)


@pytest.mark.parametrize("shards", [True, False])
def test_only_the_edited_bytes_differ(make_pair: Any, tmp_path: Path, shards: bool) -> None:
    pair = make_pair(shards=shards)
    base = Checkpoint(pair.base)
    changes = between(base, Checkpoint(pair.edited))
    out = write_folder(base, changes, tmp_path / "out")
    touched = {base.entries[change.tensor].file.name for change in changes}
    assert len(base.files) == (1 if not shards else len(base.files))
    assert len(touched) < len(base.files) or not shards
    for file in pair.base.iterdir():
        mine, theirs = file.read_bytes(), (out / file.name).read_bytes()
        if file.name not in touched:
            assert mine == theirs, file.name
            continue
        inside = [base.entries[c.tensor] for c in changes if base.entries[c.tensor].file.name == file.name]
        differing = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
        assert differing
        assert all(any(e.start <= i < e.stop for e in inside) for i in differing)
    assert {p.name for p in out.iterdir()} == {p.name for p in pair.base.iterdir()} | {"rlsedit-export.json"}
    report = json.loads((out / "rlsedit-export.json").read_text())
    assert [row["name"] for row in report["tensors"]] == [DOWN.format(1), DOWN.format(2)]
    assert [row["after"] for row in report["tensors"]] == [Checkpoint(out).digest(c.tensor) for c in changes]


def test_tied_embeddings_stay_tied(make_pair: Any, tmp_path: Path) -> None:
    pair = make_pair(tied=True)
    base = Checkpoint(pair.base)
    assert "lm_head.weight" not in base.entries
    model = pair.load(write_folder(base, between(base, Checkpoint(pair.edited)), tmp_path / "out"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same(model, pair.editor.model)


def test_a_tied_weight_saved_twice_on_one_side_is_no_change(make_pair: Any, tmp_path: Path) -> None:
    pair = make_pair(shards=False, tied=True)
    shutil.copytree(pair.base, tmp_path / "twice")
    tensors = load_file(tmp_path / "twice" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    twice, edited = Checkpoint(tmp_path / "twice"), Checkpoint(pair.edited)
    assert len(between(twice, edited)) == len(between(Checkpoint(pair.base), edited)) == 2
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight is in .*twice and not in .*edited"):
        between(Checkpoint(tmp_path / "twice"), edited)


def test_names_without_the_prefix_of_the_base_model(make_pair: Any, tmp_path: Path) -> None:
    """GPT-2 on the hub: "h.0..." for "transformer.h.0...", and masks that are no parameters."""
    pair = make_pair("gpt2", shards=False)
    shutil.copytree(pair.base, tmp_path / "hub")
    tensors = load_file(pair.base / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(bare, tmp_path / "hub" / "model.safetensors", {"format": "pt"})
    base = Checkpoint(tmp_path / "hub")
    changes = between(base, Checkpoint(pair.edited))
    assert [c.tensor for c in changes] == ["h.1.mlp.c_proj.weight", "h.2.mlp.c_proj.weight"]
    assert [c.module for c in changes] == ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]
    assert same(pair.load(write_folder(base, changes, tmp_path / "out")), pair.editor.model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_by_layer_or_by_name_are_rounded_once(make_pair: Any, tmp_path: Path, family: str) -> None:
    pair = make_pair(family, torch.bfloat16)
    layout, masters = pair.editor.adapter.layout, pair.masters()
    assert all(master.dtype == torch.float32 for master in masters.values())
    by_layer = export_folder(pair.base, masters, tmp_path / "layer")
    names = [change.tensor for change in between(Checkpoint(pair.base), Checkpoint(pair.edited))]
    stored = [master if layout == "in_out" else master.T for master in masters.values()]
    by_name = export_folder(pair.base, dict(zip(names, stored, strict=True)), tmp_path / "name")
    assert same(pair.load(by_layer), pair.editor.model)
    assert same(pair.load(by_name), pair.editor.model)
    half = {n: master.to(torch.float16) for n, master in masters.items()}
    with pytest.raises(ValueError, match=r"is stored in torch\.bfloat16; needs a weight of that dtype or a wider one"):
        export_folder(pair.base, half, tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_values_out_of_range_are_refused(make_pair: Any, tmp_path: Path) -> None:
    pair = make_pair("llama", torch.float16)
    masters = pair.masters()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight must be finite in torch\.float16"):
        export_folder(pair.base, {1: masters[1] * 1e6}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_links_only_of_weights_that_stay(pair: Any, tmp_path: Path) -> None:
    """`save_pretrained` writes into the config.json that is there, `cp` into any file: copies are the default."""
    base = Checkpoint(pair.base)
    changes = between(base, Checkpoint(pair.edited))
    staying = {file.name for file in base.files} - {base.entries[change.tensor].file.name for change in changes}
    copied = write_folder(base, changes, tmp_path / "copied")
    linked = write_folder(base, changes, tmp_path / "linked", link=True)
    assert staying
    for file in pair.base.iterdir():
        assert not (copied / file.name).samefile(file)
        assert (linked / file.name).samefile(file) == (file.name in staying)
    before = (pair.base / "config.json").read_bytes()
    model = pair.load(linked)
    model.config.bos_token_id = 2
    model.config.save_pretrained(linked)
    assert (linked / "config.json").read_bytes() != before
    assert (pair.base / "config.json").read_bytes() == before


def test_links_of_a_cache_are_followed(pair: Any, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(pair.base, blobs)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    base = Checkpoint(snapshot)
    for link in (False, True):
        out = write_folder(base, between(base, Checkpoint(pair.edited)), tmp_path / f"out{link}", link=link)
        assert not any(path.is_symlink() for path in out.iterdir())
        assert same(pair.load(out), pair.editor.model)
    assert same(pair.load(blobs), pair.load()), "the cache is as it was"


def test_other_copies_of_the_weights_stay_behind(pair: Any, tmp_path: Path) -> None:
    shutil.copytree(pair.base, tmp_path / "base")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.gguf", ".hidden", "rlsedit-report.json"):
        (tmp_path / "base" / name).write_bytes(b"stale")
    (tmp_path / "base" / "modeling_own.py").write_text("")
    base = Checkpoint(tmp_path / "base")
    out = write_folder(base, between(base, Checkpoint(pair.edited)), tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    assert "modeling_own.py" in names
    assert not names & {"consolidated.safetensors", "pytorch_model.bin", "model.gguf", ".hidden", "rlsedit-report.json"}


def test_what_is_there_is_kept(pair: Any, tmp_path: Path) -> None:
    base = Checkpoint(pair.base)
    changes = between(base, Checkpoint(pair.edited))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ValueError, match="is not empty"):
        write_folder(base, changes, tmp_path / "out")
    with pytest.raises(ValueError, match="is the base model itself"):
        write_folder(base, changes, pair.base, replace=True)
    with pytest.raises(ValueError, match="is a file"):
        write_folder(base, changes, tmp_path / "out" / "mine")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    write_folder(base, changes, tmp_path / "out", replace=True)
    assert not (tmp_path / "out" / "mine").exists()


def test_a_failure_leaves_nothing(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    base = Checkpoint(pair.base)
    changes = between(base, Checkpoint(pair.edited))
    monkeypatch.setattr("rlsedit.export.folder.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_folder(base, changes, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_wrong_weights_are_named(pair: Any) -> None:
    base, weight = Checkpoint(pair.base), torch.zeros(48, 32)
    with pytest.raises(ValueError, match="at least one weight"):
        given(base, {})
    with pytest.raises(ValueError, match=r"weights: 9 is not in"):
        given(base, {9: weight})
    with pytest.raises(ValueError, match=r"weights: 'model\.layers\.1' is not in"):
        given(base, {"model.layers.1": weight})
    with pytest.raises(ValueError, match=r"weights: 1 must have shape \(32, 48\), got \(48, 32\)"):
        given(base, {1: weight.T})
    with pytest.raises(ValueError, match=r"must have shape \(32, 48\), got \(48, 32\)"):
        given(base, {DOWN.format(1): weight})
    for name, shape in (("model.embed_tokens.weight", (400, 32)), ("model.norm.weight", (32,))):
        with pytest.raises(ValueError, match=r"is no weight of a linear layer"):
            given(base, {name: torch.zeros(shape)})
