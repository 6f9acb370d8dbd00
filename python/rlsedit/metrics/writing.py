"""Fluency and consistency of what a model writes about the subjects of facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..facts import Fact
from ..models.adapter import Adapter
from ..prompts import encode
from .estimate import Estimate, estimate
from .generation import generate
from .texts import InverseFrequencies, ngram_entropy, similarity

__all__ = ["WritingReport", "evaluate_writing"]


@dataclass(frozen=True)
class WritingReport:
    """Result of `evaluate_writing`.

    Attributes:
        rows: one dictionary per fact: "id", "fluency" (bits; mean n-gram entropy of its texts), "consistency" (TF-IDF
            similarity of its texts to its references, None without references), "texts".
        summary: "fluency" and "consistency" over the facts that have them.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Estimate]


def evaluate_writing(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    adapter: Adapter | None = None,
    length: int = 100,
    seed: int = 0,
    rows: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> WritingReport:
    """Generate from each fact's generation prompts (from its own prompt where it has none), and score the texts.

    Args:
        model, tokenizer: a causal LM and its fast tokenizer.
        facts: at least one.
        adapter: for architectures that `Adapter.for_model` does not know.
        length: tokens of prompt and continuation together.
        seed, rows: as for `generate`.
        progress: called with (prompts done, all prompts).

    Raises:
        ValueError: no facts, or one whose prompt is too long for the model.
    """
    facts = list(facts)
    if not facts:
        raise ValueError("evaluate_writing: facts must hold at least one fact, got none")
    adapter = adapter or Adapter.for_model(model, edit=False)
    _check_lengths(adapter, tokenizer, facts)
    prompts = list(dict.fromkeys(prompt for fact in facts for prompt in _prompts(fact)))
    texts = dict(
        zip(
            prompts,
            generate(adapter, tokenizer, prompts, length=length, seed=seed, rows=rows, progress=progress),
            strict=True,
        )
    )
    references = [text for fact in facts for text in fact.references]
    inverse = InverseFrequencies(references) if references else None
    found = [_row(fact, [texts[prompt] for prompt in _prompts(fact)], inverse) for fact in facts]
    summary = {
        name: estimate([row[name] for row in found if row[name] is not None]) for name in ("fluency", "consistency")
    }
    return WritingReport(found, summary)


def _check_lengths(adapter: Adapter, tokenizer: Any, facts: Sequence[Fact]) -> None:
    longest = adapter.positions
    if longest is None:
        return
    for fact in facts:
        for prompt in _prompts(fact):
            if (size := len(encode(tokenizer, prompt).ids)) > longest:
                raise ValueError(
                    f"fact {fact.id!r}: too long for the model, which reads {longest} tokens: a prompt has {size} "
                    f"({prompt[:60]!r})"
                )


def _prompts(fact: Fact) -> tuple[str, ...]:
    return tuple(prompt.rstrip() for prompt in fact.generation) or (fact.text.rstrip(),)


def _row(fact: Fact, texts: list[str], inverse: InverseFrequencies | None) -> dict[str, Any]:
    consistency = None
    if fact.references and inverse is not None:
        consistency = similarity(" ".join(texts), " ".join(fact.references), inverse)
    fluency = sum(map(ngram_entropy, texts)) / len(texts)
    return {"id": fact.id, "fluency": fluency, "consistency": consistency, "texts": texts}
