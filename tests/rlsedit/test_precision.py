"""Half-precision models keep float32 masters, tiny edits add up, and weights that cannot be edited are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import language_models as lm
from torch import nn
from transformers import AutoModelForCausalLM

from rlsedit import Editor
from rlsedit.methods import get_method
from rlsedit.models import Adapter
from rlsedit.weights import EditedWeights

HALF = [torch.bfloat16, torch.float16]
EDITS, BATCH = 10_000, 10


def weights_of(family: str, dtype: torch.dtype) -> tuple[Adapter, EditedWeights]:
    adapter = Adapter.for_model(lm.tiny(family, dtype))
    return adapter, EditedWeights(adapter, (1,))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", HALF)
def test_ten_thousand_tiny_edits_do_not_vanish(dtype: torch.dtype, family: str) -> None:
    """Each is a sixty-fourth of the step of its weight: added to the weight itself, every one is rounded away."""
    adapter = Adapter.for_model(lm.tiny(family, dtype))
    adapter.rows(1).copy_(adapter.rows(1).sign() * adapter.rows(1).abs().clamp(min=0.01))  # none is subnormal
    weights, first = EditedWeights(adapter, (1,)), adapter.rows(1).double()
    tiny = (first.abs() * torch.finfo(dtype).eps / 64).float()
    naive = adapter.rows(1).clone()
    for _ in range(EDITS):
        weights.add(1, tiny)
        weights.keep()
        naive += tiny.to(dtype)
    wanted = first + EDITS * tiny.double()
    assert torch.equal(naive.double(), first), "the reason for a master"
    master, shown = weights.wide(1), adapter.rows(1)
    assert master.dtype == torch.float32
    drift = EDITS * torch.finfo(torch.float32).eps / 2  # 10,000 roundings that all go one way
    assert ((master.double() - wanted).abs() / wanted.abs()).max() < drift
    assert torch.equal(shown, master.to(dtype)), "rounded once, from the master"
    assert ((shown.double() - wanted).abs() / wanted.abs()).max() < torch.finfo(dtype).eps / 2 + drift
    assert ((shown.double() - first).abs() / first.abs()).min() > 64 * torch.finfo(dtype).eps


def stream(start: torch.Tensor, dtype: torch.dtype, naive: bool = False) -> torch.Tensor:
    """The weight of a model in `dtype` after 10,000 edits in batches of ten by the recursion, from `start`.

    The residuals pull one way, and each batch moves the weight less than the one before. `naive`: without a master.
    """
    model = lm.tiny("llama", dtype)
    adapter = Adapter.for_model(model)
    adapter.rows(1).copy_(start)
    weights = EditedWeights(adapter, (1,))
    width = torch.float64 if dtype == torch.float64 else torch.float32
    moment = lm.random_moments(model, (1,))[1]
    solver = get_method("rlsedit").start(moment, lm.CONFIG, width, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    pull = 0.05 * torch.randn(48, 32, generator=generator, dtype=torch.float64)
    for _ in range(EDITS // BATCH):
        keys = torch.randn(BATCH, 48, generator=generator, dtype=torch.float64)
        proposal, solver = solver.propose(keys.to(width), (keys @ pull).to(width), None)
        if naive:
            adapter.rows(1).add_(proposal.update.to(dtype))
        else:
            weights.add(1, proposal.update)
            weights.keep()
    return adapter.rows(1).double()


@pytest.mark.parametrize("dtype", HALF)
def test_ten_thousand_edits_by_the_recursion(dtype: torch.dtype) -> None:
    start = Adapter.for_model(lm.tiny("llama", dtype)).rows(1).double()
    wanted = stream(start, torch.float64)
    assert (wanted - start).norm() > 0.5 * start.norm()
    error = (stream(start, dtype) - wanted).norm()
    assert error < torch.finfo(dtype).eps / 2 * wanted.norm(), "one rounding, whatever the number of edits"
    assert (stream(start, dtype, naive=True) - wanted).norm() > 5 * error


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", HALF)
def test_model_and_folder_hold_the_rounded_master(tmp_path: Path, dtype: torch.dtype, family: str) -> None:
    model = lm.tiny(family, dtype)
    editor = Editor(model, lm.tokenizer(), config=lm.CONFIG, moments=lm.random_moments(model, (1, 2)))
    for fact in lm.FACTS:
        before = {n: editor._weights.wide(n).clone() for n in (1, 2)}
        editor.edit([fact])
        for n in (1, 2):
            master = editor._weights.wide(n)
            assert master.dtype == torch.float32
            assert not torch.equal(master, before[n])
            assert not torch.equal(master, master.to(dtype).float()), "it has more digits than the model shows"
            assert torch.equal(editor.adapter.rows(n), master.to(dtype))
    model.save_pretrained(tmp_path / "m")
    saved = Adapter.for_model(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto"))
    for n in (1, 2):
        assert saved.rows(n).dtype == dtype
        assert torch.equal(saved.rows(n), editor._weights.wide(n).to(dtype))


def test_half_precision_writes_what_float32_writes() -> None:
    """The masters of a bf16 model follow a float32 model of the same weights to within what keys in bf16 allow."""
    half = lm.tiny("llama", torch.bfloat16)
    wide = lm.tiny("llama", torch.bfloat16).float()
    shifts = []
    for model in (half, wide):
        editor = Editor(model, lm.tokenizer(), config=lm.CONFIG, moments=lm.random_moments(model, (1, 2)))
        first = editor.adapter.rows(1).to(torch.float32, copy=True)
        editor.edit(lm.FACTS[:2])
        shifts.append(editor._weights.wide(1).float() - first)
    assert (shifts[0] - shifts[1]).norm() < 0.3 * shifts[1].norm()


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 1e6), (torch.bfloat16, torch.inf), (torch.float16, torch.nan)]
)
def test_what_does_not_fit_is_refused_and_nothing_changes(dtype: torch.dtype, size: float) -> None:
    adapter, weights = weights_of("llama", dtype)
    shown, master = adapter.rows(1).clone(), weights.wide(1).clone()
    update = torch.zeros_like(master)
    update[3, 4] = size
    with pytest.raises(ValueError, match=rf"update of layer 1 must be finite in {dtype}, got NaN or Inf"):
        weights.add(1, update)
    assert torch.equal(adapter.rows(1), shown)
    assert torch.equal(weights.wide(1), master)


@pytest.mark.parametrize("dtype", HALF)
def test_undo_brings_master_and_weight_back(dtype: torch.dtype) -> None:
    adapter, weights = weights_of("llama", dtype)
    step = torch.randn(48, 32, generator=torch.Generator().manual_seed(1)) * 1e-3
    weights.add(1, step)
    weights.keep()
    shown, master = adapter.rows(1).clone(), weights.wide(1).clone()
    weights.show(1, torch.zeros_like(master))
    weights.add(1, step)
    weights.add(1, step)
    weights.undo()
    assert torch.equal(adapter.rows(1), shown)
    assert torch.equal(weights.wide(1), master)


# Weights that are no plain floating-point matrix.


class Int8Tensor(torch.Tensor):
    """A weight that says it is bfloat16 and is not, as those of torchao."""


Int8Tensor.__module__ = "torchao.quantization"


class Linear4bit(nn.Linear):
    """Named as that of bitsandbytes."""


class QuantLinear(nn.Module):
    """As GPTQ and AWQ pack it: no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qweight = nn.Parameter(torch.zeros(6, 32, dtype=torch.int32), requires_grad=False)


def torchao() -> nn.Module:
    module = nn.Linear(48, 32, bias=False, dtype=torch.bfloat16)
    weight = torch.zeros(32, 48, dtype=torch.bfloat16).as_subclass(Int8Tensor)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def eight_bits(dtype: torch.dtype) -> nn.Module:
    module = nn.Linear(48, 32, bias=False)
    module.weight = nn.Parameter(torch.zeros(32, 48, dtype=dtype), requires_grad=False)
    return module


def adapted() -> nn.Module:
    module = nn.Linear(48, 32, bias=False)
    module.base_layer = nn.Linear(48, 32, bias=False)
    return module


@pytest.mark.parametrize(
    ("make", "got", "words"),
    [
        (torchao, "Linear with weight of Int8Tensor, torch.bfloat16", "load it without TorchAoConfig"),
        (lambda: Linear4bit(48, 32), "Linear4bit", "load it without BitsAndBytesConfig"),
        (QuantLinear, "QuantLinear", "GPTQ and AWQ cannot be undone: edit the unquantised model"),
        (lambda: eight_bits(torch.int8), "weight of torch.int8", "load a quantised model unquantised"),
        (
            lambda: eight_bits(torch.float8_e4m3fn),
            "weight of torch.float8_e4m3fn",
            "load a quantised model unquantised",
        ),
        (adapted, "Linear", "merge the adapter first"),
    ],
)
@pytest.mark.parametrize("layer", [0, 2])
def test_quantised_layers_are_refused_with_advice(make: Any, got: str, words: str, layer: int) -> None:
    """Also where only one of the edited layers is quantised."""
    model = lm.tiny("llama", torch.float32)
    model.model.layers[layer].mlp.down_proj = make()
    with pytest.raises(ValueError, match=r"must be a plain nn\.Linear or Conv1D with a floating-point weight") as error:
        Editor(model, lm.tokenizer(), config=lm.CONFIG)
    assert got in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize("kind", ["bitsandbytes", "gptq", "awq", "torchao", "fp8", "mxfp4", "hqq", None])
def test_quantised_models_are_refused_by_their_config(kind: str | None) -> None:
    model = lm.tiny("llama", torch.float32)
    model.config.quantization_config = {"quant_method": kind} if kind else {"bits": 4}
    name = kind or "of unknown kind"
    with pytest.raises(
        ValueError, match=rf"must not be quantised, got a quantization_config \({name}\); .*unquantised"
    ):
        Editor(model, lm.tokenizer(), config=lm.CONFIG)
    assert Adapter.for_model(model, edit=False).num_layers == 5, "measuring is no harm"


def test_what_gguf_files_become_is_plain() -> None:
    transformers = pytest.importorskip("transformers.utils.quantization_config")
    model = lm.tiny("llama", torch.float32)
    model.config.quantization_config = transformers.GgufConfig()
    assert Editor(model, lm.tokenizer(), config=lm.CONFIG).adapter.num_layers == 5
