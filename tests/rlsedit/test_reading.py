"""Terms of the loss are read a few positions at a time: the same numbers, and never the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.language_models import CONFIG, FACTS, random_moments, tiny, tokenizer
from torch import Tensor

from rlsedit.config import EditConfig
from rlsedit.editor import Editor
from rlsedit.metrics import evaluate
from rlsedit.models import Adapter, parts
from rlsedit.targets.objective import answer_loss, divergence, log_probabilities
from rlsedit.targets.reading import read_terms

VOCABULARY = 400


@pytest.mark.parametrize("at_once", [1, 3, 4, 100])
@pytest.mark.parametrize("ends", [0, 3])
@pytest.mark.parametrize("answers", [0, 5])
def test_terms_and_gradients(monkeypatch: pytest.MonkeyPatch, at_once: int, ends: int, answers: int) -> None:
    if answers + ends == 0:
        return
    monkeypatch.setattr(parts, "LOGITS", at_once * VOCABULARY)
    model = Adapter.for_model(tiny("llama"))
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(answers + ends, 32, dtype=torch.float64, generator=generator)
    hidden = (first + 0.3 * torch.randn(first.shape, dtype=torch.float64, generator=generator)).requires_grad_()
    tokens = torch.randint(VOCABULARY, (answers,), generator=generator)
    weights = torch.rand(answers + ends, dtype=torch.float64, generator=generator)
    with model.frozen():
        old = log_probabilities(model.logits(first[answers:]))
        logits = model.logits(hidden)
        plain = [answer_loss(logits[:answers], tokens), divergence(logits[answers:], old)]
        (gradient,) = torch.autograd.grad((torch.cat(plain) * weights).sum(), hidden)
        starts: list[Tensor | None] = [None] * ends
        begin = read_terms(model, first, tokens, starts)
        read = read_terms(model, hidden, tokens, starts)
        (found,) = torch.autograd.grad((torch.cat([read.answer, read.drift]) * weights).sum(), hidden)
    torch.testing.assert_close(begin.drift, torch.zeros(ends, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(read.answer, plain[0])
    torch.testing.assert_close(read.drift, plain[1])
    torch.testing.assert_close(found, gradient)
    assert read.wrong.tolist() == (logits[:answers].argmax(-1) != tokens).tolist()


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Numbers of positions whose logits are formed, where four fit."""
    monkeypatch.setattr(parts, "LOGITS", 4 * VOCABULARY)
    seen: list[int] = []
    yield seen
    assert len(seen) > 4
    assert max(seen) == 4


@pytest.mark.parametrize("method", ["rlsedit", "pmet", "ultraedit", "ft"])
def test_writing_forms_few_logits(largest: list[int], method: str) -> None:
    """Of 4 facts in 3 contexts with up to 4 answer tokens each."""
    model = tiny("llama", torch.float32)
    config = EditConfig.for_model(
        model, method, layers=CONFIG.layers, steps=2, ft_steps=2, contexts=2, context_length=3, mom2_weight=20.0
    )
    editor = Editor(model, tokenizer(), method, config, moments=random_moments(model, CONFIG.layers))
    model.lm_head.register_forward_pre_hook(lambda _module, args: largest.append(args[0].shape[:-1].numel()))
    editor.edit(FACTS)


def test_scores_form_few_logits(largest: list[int]) -> None:
    model = tiny("llama")
    wanted = evaluate(model, tokenizer(), FACTS, max_tokens=1)  # a prompt at a time
    model.lm_head.register_forward_pre_hook(lambda _module, args: largest.append(args[0].shape[:-1].numel()))
    found = evaluate(model, tokenizer(), FACTS)
    for row, other in zip(found.rows, wanted.rows, strict=True):
        assert row == {k: pytest.approx(v, rel=1e-9) if isinstance(v, float) else v for k, v in other.items()}
