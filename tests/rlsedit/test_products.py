"""Products of linear modules of real tokens alone, and by oneDNN, are those of torch."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.language_models import FACTS, FAMILIES, HYBRID, tiny, tokenizer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from rlsedit.models import Adapter, products
from rlsedit.models.products import Tokens, linear_products
from rlsedit.models.replay import capture
from rlsedit.prompts import Context, align
from rlsedit.targets.bucket import Bucket, make_buckets
from rlsedit.targets.prepare import prepare_rows
from rlsedit.targets.rows import fact_rows

MASK = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
CONTEXTS = [Context("", 0.5), Context("The yen is. ", 0.25), Context("Because you and I think Oslo is. ", 0.25)]
ONEDNN = pytest.mark.parametrize("onednn", [False, True], ids=["mkl", "onednn"])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> bool:
    """The library of products, whatever is faster on this processor."""
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN in this build of torch")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: onednn)
    return onednn


def linear(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    made = Conv1D(6, 4) if kind == "conv1d" else nn.Linear(4, 6, bias=kind == "bias")
    return made.to(dtype).requires_grad_(False)


@ONEDNN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "bias", "conv1d"])
@pytest.mark.parametrize("padded", [False, True])
def test_values_and_gradients(engine: bool, kind: str, dtype: torch.dtype, padded: bool) -> None:
    module, tokens = linear(kind, dtype), Tokens.of(MASK) if padded else None
    states = torch.randn(3, 5, 4, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    real = MASK.bool() if padded else torch.ones(3, 5, dtype=torch.bool)
    outer = torch.randn(3, 5, 6, dtype=dtype, generator=torch.Generator().manual_seed(2))
    wanted = module(states)
    (gradient,) = torch.autograd.grad((wanted * outer)[real].sum(), states)
    with linear_products(module.modules(), tokens):
        found = module(states)
        with torch.no_grad():
            torch.testing.assert_close(module(states), found)
    tolerance = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[real], wanted[real], **tolerance)
    assert bool(found.isfinite().all())
    own = torch.where(real[..., None], outer, 1e3)  # what arrives where no token is goes nowhere
    (back,) = torch.autograd.grad((found * own).sum(), states)
    torch.testing.assert_close(back, gradient, **tolerance)
    assert bool((back[~real] == 0).all())


def test_what_padding_holds_reaches_nothing() -> None:
    module, states = linear("bias", torch.float64), torch.full((3, 5, 4), torch.nan, dtype=torch.float64)
    states[MASK.bool()] = 1.0
    with linear_products([module], Tokens.of(MASK)):
        assert bool(module(states).isfinite().all())


def test_little_padding_is_left_in() -> None:
    assert Tokens.of(torch.ones(2, 8)) is None
    mask = torch.ones(2, 8)
    mask[0, 0] = 0
    assert Tokens.of(mask) is None
    mask[0, 1] = 0
    assert Tokens.of(mask) is not None
    assert Tokens.of(torch.zeros(2, 8)) is None


@ONEDNN
def test_modules_are_left_as_they_were(engine: bool) -> None:
    """Also one that has a `forward` of its own, and one that is trained: neither is touched inside."""
    own, trained, other = linear("plain", torch.float32), linear("bias", torch.float32), linear("plain", torch.float32)
    own.forward = lambda states: states  # type: ignore[method-assign]
    trained.requires_grad_(True)
    states = torch.ones(3, 5, 4)
    with contextlib.suppress(InterruptedError), linear_products([own, trained, other], Tokens.of(MASK)):
        assert own(states) is states
        trained(states).sum().backward()
        assert trained.weight.grad is not None
        trained.weight.requires_grad_(False)
        trained.bias.grad = None
        trained(states).sum().backward()
        assert trained.bias.grad.tolist() == [15.0] * 6
        with torch.autocast("cpu", torch.bfloat16):
            assert other(states).dtype == torch.bfloat16
        assert "forward" in other.__dict__
        raise InterruptedError
    assert "forward" in own.__dict__
    assert "forward" not in trained.__dict__
    assert "forward" not in other.__dict__


@pytest.mark.filterwarnings("ignore:TF32")  # of torch, when its flags are set
def test_onednn_is_taken_where_it_is_faster_and_not_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    module, states = linear("bias", torch.float32), torch.ones(2, 4)
    capabilities = {"avx512_f": True, "cpu_name": "AMD EPYC"}
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    fresh = products.onednn_is_faster.__wrapped__
    assert fresh()
    for changes in ({"avx512_f": False}, {"cpu_name": "Intel(R) Xeon(R) Platinum 8488C"}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda changes=changes: {**capabilities, **changes})
        assert not fresh()
    with monkeypatch.context() as patch:  # a torch whose own op takes something else
        patch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        patch.setattr(products, "_product", lambda *_, **__: torch.ops.mkldnn._linear_pointwise(states))
        assert not fresh()
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    with linear_products([module]):
        assert "forward" in module.__dict__
        assert module(states.double().float()).shape == (2, 6)
    with torch.backends.mkldnn.flags(enabled=False), linear_products([module]):
        assert "forward" not in module.__dict__


@ONEDNN
@pytest.mark.parametrize("family", [*FAMILIES, *HYBRID])
def test_padded_rows_give_the_logits_of_each_row_alone(engine: bool, family: str) -> None:
    """In float32, which oneDNN multiplies; rows padded in front and behind where the family allows it."""
    model = tiny(family, torch.float32)
    adapter = Adapter.for_model(model, edit=False)
    rows = [[5, 9, 40, 41, 7, 300], [77, 8, 6], [12, 13, 14, 15, 16, 17, 18, 19, 20]]
    batch = align(rows, [3, 0, 6], front=adapter.cached)
    with adapter.frozen(), torch.no_grad():
        calls = capture(adapter, batch.ids, batch.mask, batch.positions)
        logits = adapter.logits(calls.run(adapter, calls.hidden, 0, adapter.num_layers))
        for i, row in enumerate(rows):
            wanted = model(torch.tensor([row])).logits[0]
            torch.testing.assert_close(logits[i][batch.mask[i].bool()], wanted, rtol=1e-3, atol=2e-4)


def test_a_step_multiplies_real_tokens_alone() -> None:
    """Counted: linear modules multiply for rows of many lengths in one bucket what they do in buckets of one length."""
    adapter = Adapter.for_model(tiny("llama"))
    rows = fact_rows(tokenizer(), FACTS, CONTEXTS)
    with adapter.frozen():
        prepared = prepare_rows(adapter, rows, 2, 512)
        (together,) = make_buckets(adapter, prepared, 2, len(CONTEXTS), 1 << 20)
        lengths = sorted({p.length for p in prepared})
        delta = torch.zeros(len(FACTS), 32, dtype=torch.float64)

        def flops(bucket: Bucket) -> float:
            with FlopCounterMode(display=False) as counter:
                bucket.terms(delta)
            each = counter.get_flop_counts()["Global"]
            return float(sum(each.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm)))

        apart = 0.0
        for length in lengths:
            part = [p for p in prepared if p.length == length]
            (bucket,) = make_buckets(adapter, part, 2, len(CONTEXTS), 1 << 20)
            apart += flops(bucket)
        found = flops(together)
    assert len(lengths) > 3
    padded = max(lengths) * len(prepared) / sum(p.length for p in prepared)
    assert padded > 1.5, "there must be padding for this test to say something"
    assert found == apart > 0
