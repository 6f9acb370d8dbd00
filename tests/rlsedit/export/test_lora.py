"""The adapter, loaded back by the real PEFT; and what it says of its own error."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import language_models as lm

from rlsedit import EditConfig, Editor, evaluate
from rlsedit.export import (
    Checkpoint,
    between,
    changes_of_model,
    export_lora,
    factorise,
    vllm_rank,
    write_lora,
)
from rlsedit.export.lora import VLLM_RANKS
from rlsedit.models import Adapter

IDS = torch.tensor([[5, 9, 40, 41, 7, 300], [12, 13, 14, 15, 16, 17]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.double()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def with_peft(pair: Any, folder: Path) -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that are missing or too many
        return peft.PeftModel.from_pretrained(pair.load(), str(folder))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "qwen3"])
def test_peft_gives_the_edited_model(make_pair: Any, tmp_path: Path, family: str) -> None:
    pair = make_pair(family)
    report = pair.lora(tmp_path / "lora")
    assert report.exact
    assert [(layer.rank, layer.rank_of_change) for layer in report.layers] == [(4, 4), (4, 4)], "four facts"
    assert all(layer.frobenius < 1e-6 for layer in report.layers)
    wanted, plain = logits(pair.editor.model), logits(pair.load())
    assert apart(plain, wanted) > 1e-3, "the edit is no triviality"
    model = with_peft(pair, tmp_path / "lora")
    assert apart(logits(model), wanted) < 1e-5
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {1.0}
    merged = model.merge_and_unload()
    for name, value in pair.editor.model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adapter_of_a_half_precision_model_comes_from_the_master(
    make_pair: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    pair = make_pair("llama", dtype)
    report = pair.lora(tmp_path / "lora")
    assert report.exact
    assert report.rank == 4
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for n, master in pair.masters().items():
        left, right = (
            tensors[f"base_model.model.model.layers.{n}.mlp.down_proj.lora_{x}.weight"].double() for x in "BA"
        )
        first = pair.editor._first[n].double().T
        assert apart(first + left @ right, master.double().T) < 1e-7
        assert apart(pair.editor.adapter.rows(n).double(), master.double()) > 1e-5, "what the model shows is coarser"
    rounding = 8 * torch.finfo(dtype).eps
    assert apart(logits(with_peft(pair, tmp_path / "lora")), logits(pair.editor.model)) < rounding


def test_two_half_precision_folders_give_the_rank_of_the_edit(make_pair: Any, tmp_path: Path) -> None:
    """Without the master the change holds the rounding of W; the factors leave it out and say so."""
    pair = make_pair("llama", torch.bfloat16)
    factors = factorise(between(Checkpoint(pair.base), Checkpoint(pair.edited)))
    for (_, part), (n, master) in zip(factors, pair.masters().items(), strict=True):
        assert part.rank <= 4
        exact = master.double().T - pair.editor._first[n].double().T
        shown = pair.editor.adapter.rows(n).double().T - pair.editor._first[n].double().T
        assert apart(part.left.double() @ part.right.double(), exact) < apart(shown, exact)
    write_lora(factors, tmp_path / "lora", base="b")
    assert apart(logits(with_peft(pair, tmp_path / "lora")), logits(pair.editor.model)) < 0.05


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_truncation_is_the_best_and_is_stated(pair: Any, tmp_path: Path, rank: int) -> None:
    report = pair.lora(tmp_path / "lora", rank=rank)
    assert not report.exact
    assert json.loads((tmp_path / "lora" / "rlsedit-export.json").read_text())["exact"] is False
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for layer, (n, master) in zip(report.layers, pair.masters().items(), strict=True):
        left, right = (tensors[f"base_model.model.{layer.module}.lora_{x}.weight"].double() for x in "BA")
        assert left.shape == (32, rank)
        assert right.shape == (rank, 48)
        change = (master.double() - pair.editor._first[n].double()).T
        values = torch.linalg.svdvals(change)
        assert layer.frobenius == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-4)
        assert layer.frobenius == pytest.approx(apart(left @ right, change), rel=1e-9)
        assert layer.spectral == pytest.approx(float(values[rank] / values[0]), rel=1e-6)
        assert layer.rank_of_change == 4


def test_layers_of_different_rank(tmp_path: Path, make_pair: Any) -> None:
    """`rank_pattern` and `alpha_pattern` for PEFT; alpha = r over all for vLLM, which reads neither."""
    pair = make_pair()
    factors = factorise(between(Checkpoint(pair.base), Checkpoint(pair.edited)))
    short = factorise([factors[0][0]], 2)
    write_lora([*short, factors[1]], tmp_path / "lora", base="b")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    module = "model.layers.1.mlp.down_proj"
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {module: 2}
    assert config["target_modules"] == [module, "model.layers.2.mlp.down_proj"]
    model = with_peft(pair, tmp_path / "lora")
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {1.0}
    by_hand = pair.load()
    with torch.no_grad():
        for change, part in [*short, factors[1]]:
            by_hand.get_parameter(change.parameter).add_(part.left @ part.right)
    assert apart(logits(model), logits(by_hand)) < 1e-5


def test_many_layers_of_several_ranks(tmp_path: Path) -> None:
    """PEFT shortens lists of twenty modules and more; only the layers that were edited may be met by them."""
    peft = pytest.importorskip("peft")
    model = lm.tiny("llama", torch.float32, num_hidden_layers=30)
    base, adapter, layers = deepcopy(model), Adapter.for_model(model), [n for n in range(30) if n % 5]
    before = {n: adapter.rows(n).clone() for n in layers}
    for n in layers:
        adapter.rows(n).add_(0.1 * torch.randn(48, 1 + n % 3) @ torch.randn(1 + n % 3, 32))
    changes = changes_of_model(adapter, before, {n: adapter.rows(n) for n in layers})
    report = write_lora(factorise(changes), tmp_path / "lora", base="b")
    assert [layer.rank for layer in report.layers] == [1 + n % 3 for n in layers]
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    assert sum(hasattr(module, "lora_A") for module in loaded.modules()) == len(layers)
    assert apart(logits(loaded), logits(model)) < 1e-4


def test_what_vllm_asks_for(make_pair: Any, tmp_path: Path) -> None:
    """vllm/lora/peft_helper.py and utils.py: no bias, no DoRA, nothing else saved, names behind a fixed prefix."""
    for family, transposed in (("llama", False), ("gpt2", True)):
        make_pair(family).lora(tmp_path / family)
        config = json.loads((tmp_path / family / "adapter_config.json").read_text())
        assert config["bias"] == "none"
        assert config["modules_to_save"] is None
        assert not config["use_dora"]
        assert not config["use_rslora"]
        assert config["lora_alpha"] / config["r"] == 1
        assert config["fan_in_fan_out"] is transposed
        names = load_file(tmp_path / family / "adapter_model.safetensors").keys()
        wanted = {f"base_model.model.{m}.lora_{x}.weight" for m in config["target_modules"] for x in "AB"}
        assert names == wanted
    assert [vllm_rank(r) for r in (1, 2, 8, 9, 100, 257, 512, 513)] == [1, 8, 8, 16, 128, 320, 512, None]
    assert tuple(sorted(VLLM_RANKS)) == VLLM_RANKS


def test_scores_of_adapter_and_weights(make_pair: Any, tmp_path: Path) -> None:
    pair = make_pair()
    before = {name: value.clone() for name, value in pair.editor.model.state_dict().items()}
    report = pair.lora(tmp_path / "lora", rank=1, facts=lm.FACTS)
    assert all(torch.equal(before[name], value) for name, value in pair.editor.model.state_dict().items())
    assert report.scores is not None
    assert report.scores["edited"] == pair.editor.evaluate(lm.FACTS)
    real = evaluate(with_peft(pair, tmp_path / "lora").merge_and_unload(), lm.tokenizer(), lm.FACTS)
    for mine, theirs in zip(report.scores["adapter"].rows, real.rows, strict=True):
        assert mine["log_probability_new"] == pytest.approx(theirs["log_probability_new"], abs=1e-4)
    assert any(
        abs(a["log_probability_new"] - b["log_probability_new"]) > 1e-3
        for a, b in zip(report.scores["adapter"].rows, report.scores["edited"].rows, strict=True)
    ), "rank 1 of 4 is not the same"
    edited, adapter = (report.scores[n].summary["efficacy_success"].mean for n in ("edited", "adapter"))
    assert report.efficacy_loss == edited - adapter
    content = json.loads((tmp_path / "lora" / "rlsedit-export.json").read_text())
    assert content["efficacy_loss"] == report.efficacy_loss
    assert content["scores"]["adapter"]["rows"][0]["id"] == "a"
    exact = pair.lora(tmp_path / "exact", facts=lm.FACTS)
    assert exact.efficacy_loss == 0
    for mine, theirs in zip(exact.scores["adapter"].rows, exact.scores["edited"].rows, strict=True):
        assert mine["log_probability_new"] == pytest.approx(theirs["log_probability_new"], abs=1e-4)


def test_an_editor_that_has_not_edited(tmp_path: Path) -> None:
    model = lm.tiny("llama", torch.float32)
    editor = Editor(model, lm.tokenizer(), config=lm.CONFIG, moments=lm.random_moments(model, (1, 2)))

    def export() -> Any:
        after = {n: editor._weights.wide(n) for n in (1, 2)}
        return export_lora(editor.adapter, editor.tokenizer, editor._first, after, tmp_path / "lora")

    with pytest.raises(ValueError, match="nothing to export"):
        export()
    assert not (tmp_path / "lora").exists()
    editor.edit(lm.FACTS[:1])
    assert export().rank == 1


def test_what_is_there_is_kept(pair: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ValueError, match="is not empty"):
        pair.lora(tmp_path / "out")
    for rank in (0, 33):
        with pytest.raises(ValueError, match=rf"rank must be in \[1, 32\] .* got {rank}"):
            pair.lora(tmp_path / "new", rank=rank)
    assert not (tmp_path / "new").exists()
    pair.lora(tmp_path / "out", replace=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "rlsedit-export.json",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_editor_exports_what_it_holds(tmp_path: Path, dtype: torch.dtype) -> None:
    """The same bytes after `save` and `resume`, from the masters; one edit fewer is one rank fewer."""
    model, tokenizer = lm.tiny("llama", dtype), lm.tokenizer()
    config = EditConfig.for_model(model, "rlsedit", layers=(1, 2), steps=3, contexts=1, context_length=3)
    d = model.config.intermediate_size
    moments = {n: torch.eye(d, dtype=torch.float64) for n in (1, 2)}
    editor = Editor(model, tokenizer, "rlsedit", config, moments=moments)
    with pytest.raises(ValueError, match="nothing to export"):
        editor.export_lora(tmp_path / "none")
    editor.save(tmp_path / "store")
    editor.edit(lm.FACTS, batch_size=2)
    report = editor.export_lora(tmp_path / "first")
    assert [(layer.rank, layer.rank_of_change) for layer in report.layers] == [(4, 4), (4, 4)]
    editor.close()
    again = Editor.resume(tmp_path / "store", lm.tiny("llama", dtype), tokenizer)
    again.export_lora(tmp_path / "second")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    again.remove([lm.FACTS[1].id])
    assert [layer.rank for layer in again.export_lora(tmp_path / "third").layers] == [3, 3]
