"""Token rows of the target objective: each fact in every context, and its KL prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..facts import Fact
from ..prompts import Context, Encoding, encode

KL_PROMPT = "{} is a"


@dataclass(frozen=True)
class Row:
    """One token row.

    Attributes:
        fact: index of its fact in the batch.
        kind: "nll" for a prompt with its target, "kl" for the KL prompt.
        encoding: ids, place of the subject and of the target.
        context: index of the context (0 is the bare prompt; also for "kl").
    """

    fact: int
    kind: str
    encoding: Encoding
    context: int = 0

    @property
    def inputs(self) -> tuple[int, ...]:
        """Ids the model has to read: all but the last, whose successor is never asked for; all of a KL prompt."""
        return self.encoding.ids[:-1] if self.kind == "nll" else self.encoding.ids

    @property
    def pivot(self) -> int:
        """Index of the last subject token, where the variable is added."""
        assert self.encoding.pivot is not None
        return self.encoding.pivot

    @property
    def wanted(self) -> range:
        """Indices whose logits the objective uses."""
        first = self.encoding.prompt_len - 1 if self.kind == "nll" else len(self.inputs) - 1
        return range(first, len(self.inputs))


def fact_rows(tokenizer: Any, facts: Sequence[Fact], contexts: Sequence[Context]) -> list[Row]:
    """All rows of a batch of facts, in the order fact, context, KL prompt last.

    Raises:
        ValueError: a fact without subject in its prompt, with an empty target, or whose subject has no tokens.
    """
    rows: list[Row] = []
    for i, fact in enumerate(facts):
        for c, context in enumerate(contexts):
            text, span = _place(fact.prompt, fact.subject, context.prefix, fact.id)
            rows.append(Row(i, "nll", encode(tokenizer, text, subject=span, target=fact.target_new), c))
        text, span = _place(KL_PROMPT, fact.subject, "", fact.id)
        rows.append(Row(i, "kl", encode(tokenizer, text, subject=span)))
    return rows


def _place(prompt: str, subject: str, prefix: str, name: str) -> tuple[str, tuple[int, int]]:
    if prompt.count("{}") != 1:
        raise ValueError(f"fact {name!r}: prompt must contain '{{}}' once, the place of the subject, got {prompt!r}")
    if not subject.strip():
        raise ValueError(f"fact {name!r}: subject must be a non-empty text, got {subject!r}")
    before, after = prompt.split("{}")
    start = len(prefix) + len(before)
    return f"{prefix}{before}{subject}{after}".rstrip(), (start, start + len(subject))
