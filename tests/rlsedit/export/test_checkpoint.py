"""Folders that cannot be read, and pairs of folders that are no model and its edit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import language_models as lm

from rlsedit.export import Checkpoint, between


@pytest.fixture
def copy(make_pair: Any, tmp_path: Path) -> Path:
    shutil.copytree(make_pair(shards=False).edited, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_read_as_safetensors_reads_them(make_pair: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    lm.tiny("llama", dtype).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    found = Checkpoint(tmp_path / "m")
    assert len(found.files) > 3
    for file in found.files:
        for name, value in load_file(file).items():
            assert found.entries[name].file == file
            assert found.tensor(name).dtype == value.dtype
            assert torch.equal(found.tensor(name), value)


def test_folders_that_hold_no_safetensors(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Checkpoint(tmp_path)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds pytorch_model\.bin, needs safetensors: convert it once with"):
        Checkpoint(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        Checkpoint(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        Checkpoint(copy)


def test_quantised_folders_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is quantised \(gptq\); needs the unquantised model"):
        Checkpoint(copy)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_files_that_are_cut_off(copy: Path, keep: int) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(ValueError, match="cut off"):
        Checkpoint(copy)


def test_headers_that_are_damaged(copy: Path) -> None:
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[20] ^= 0xFF
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="no safetensors header"):
        Checkpoint(copy)


def test_an_index_that_leads_astray(pair: Any, tmp_path: Path) -> None:
    shutil.copytree(pair.base, tmp_path / "m")
    index = tmp_path / "m" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    shard = next(iter(good["weight_map"].values()))
    (tmp_path / "m" / shard).rename(tmp_path / "m" / "away")
    with pytest.raises(FileNotFoundError, match=rf"{shard} is missing"):
        Checkpoint(tmp_path / "m")
    for bad in ({"weight_map": {"x": "../base/x.safetensors"}}, {"weight_map": {"x": 3}}):
        index.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="must name files of its folder"):
            Checkpoint(tmp_path / "m")
    index.write_text("[]")
    with pytest.raises(ValueError, match="is no index"):
        Checkpoint(tmp_path / "m")


def test_a_model_does_not_differ_from_itself(make_pair: Any, copy: Path) -> None:
    pair = make_pair(shards=False)
    with pytest.raises(ValueError, match="nothing to export"):
        between(Checkpoint(pair.base), Checkpoint(pair.base))
    with pytest.raises(ValueError, match="nothing to export"):
        between(Checkpoint(copy), Checkpoint(pair.edited))


def test_changes_that_are_no_edit(make_pair: Any, copy: Path) -> None:
    base = Checkpoint(make_pair(shards=False).base)

    def nudge(name: str) -> Any:
        return lambda tensors: tensors[name].view(-1)[:1].add_(1.0)

    rewrite(copy, nudge("model.layers.3.input_layernorm.weight"))
    with pytest.raises(ValueError, match=r"layers\.3\.input_layernorm\.weight .* is no weight of a linear layer"):
        between(base, Checkpoint(copy))
    rewrite(copy, lambda tensors: tensors["model.layers.3.input_layernorm.weight"].view(-1)[:1].add_(-1.0))
    rewrite(copy, nudge("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight .* no weight of a linear layer"):
        between(base, Checkpoint(copy))


def test_pairs_that_do_not_belong_together(make_pair: Any, copy: Path) -> None:
    pair = make_pair(shards=False)
    with pytest.raises(ValueError, match=r"of one architecture; model_type is 'gpt2' in .* and 'llama' in"):
        between(Checkpoint(make_pair("gpt2").base), Checkpoint(pair.edited))
    with pytest.raises(ValueError, match=r"is F32 \[.*\] in .* and BF16 .*; needs the same dtype"):
        between(Checkpoint(pair.base), Checkpoint(make_pair("llama", torch.bfloat16).edited))
    rewrite(copy, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight is in .*base and not in .*copy"):
        between(Checkpoint(pair.base), Checkpoint(copy))


def test_one_sharded_and_one_not(make_pair: Any) -> None:
    whole, parts = make_pair(shards=False), make_pair(shards=True)
    names = [change.tensor for change in between(Checkpoint(whole.base), Checkpoint(parts.edited))]
    assert names == ["model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"]
