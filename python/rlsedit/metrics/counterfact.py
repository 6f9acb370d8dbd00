"""Scores of the CounterFact benchmark (Meng et al. 2022, ROME, section 3.2 and its released evaluation)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..facts import Fact
from ..models.adapter import Adapter
from .scoring import Answer, Query, score_answers

SUCCESSES = ("efficacy_success", "paraphrase_success", "neighbourhood_success")
METRICS = (
    "efficacy_success", "efficacy_accuracy", "paraphrase_success", "paraphrase_accuracy",
    "neighbourhood_success", "neighbourhood_accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Mean over facts, its standard error, and the number of facts it is taken over."""

    mean: float
    stderr: float
    count: int


@dataclass(frozen=True)
class EvalReport:
    """Result of `evaluate`.

    Attributes:
        rows: one dictionary per fact: "id" and each metric as a mean over its prompts, None where the fact has no
            such prompts (or no true answer, for a success); "log_probability_new", "log_probability_true".
        summary: metric -> Estimate over the facts that have it; "score" is the harmonic mean of the three successes.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Estimate] = field(default_factory=dict)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    adapter: Adapter | None = None,
    max_tokens: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> EvalReport:
    """Efficacy, paraphrase and neighbourhood of `facts` in `model`.

    With p(a) = exp(mean log-probability of the tokens of a):
        efficacy, paraphrase   success p(new) > p(true); accuracy: every token of the new answer is the likeliest
        neighbourhood          success p(true) > p(new); accuracy: every token of the neighbour's right answer is

    Args:
        model: a causal LM.
        tokenizer: its fast tokenizer.
        facts: at least one.
        adapter: for architectures that `Adapter.for_model` does not know.
        max_tokens: token budget of one forward pass.
        progress: called with (prompts done, all prompts).

    Raises:
        ValueError: no facts, or one that cannot be encoded.
    """
    facts = list(facts)
    if not facts:
        raise ValueError("evaluate: facts must hold at least one fact, got none")
    adapter = adapter or Adapter.for_model(model, edit=False)
    queries = [query for fact in facts for group in _queries(fact) for pair in group for query in pair if query]
    answers = score_answers(adapter, tokenizer, queries, max_tokens=max_tokens, progress=progress)
    rows = [_row(fact, answers) for fact in facts]
    return EvalReport(rows, summarise(rows))


Pair = tuple[Query, Query | None]
"""The answer that should win, and its rival where there is one."""


def _queries(fact: Fact) -> tuple[list[Pair], list[Pair], list[Pair]]:
    def written(prompt: str) -> Pair:
        return (prompt, fact.target_new), (None if fact.target_true is None else (prompt, fact.target_true))

    answers: Sequence[str | None] = fact.neighbour_answers or [fact.target_true] * len(fact.neighbours)
    kept: list[Pair] = [
        ((prompt.rstrip(), answer), (prompt.rstrip(), fact.target_new))
        for prompt, answer in zip(fact.neighbours, answers, strict=True)
        if answer is not None
    ]
    return [written(fact.text.rstrip())], [written(prompt.rstrip()) for prompt in fact.paraphrases], kept


def _row(fact: Fact, answers: dict[Query, Answer]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": fact.id}
    groups = _queries(fact)
    for name, pairs in zip(("efficacy", "paraphrase", "neighbourhood"), groups, strict=True):
        wins = [
            answers[right].log_probability > answers[rival].log_probability
            for right, rival in pairs
            if rival is not None and rival != right
        ]
        row[f"{name}_success"] = _mean([float(win) for win in wins])
        row[f"{name}_accuracy"] = _mean([float(answers[right].is_argmax) for right, _ in pairs])
    right, rival = groups[0][0]
    row["log_probability_new"] = answers[right].log_probability
    row["log_probability_true"] = None if rival is None else answers[rival].log_probability
    return row


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    """Means with standard errors (s / sqrt(n), s with n - 1); that of the score by the jackknife over facts."""
    summary = {name: _estimate([row[name] for row in rows if row[name] is not None]) for name in METRICS}
    complete = [[row[name] for name in SUCCESSES] for row in rows]
    score = _harmonic([summary[name].mean for name in SUCCESSES])
    n = len(complete)
    without = []
    if n > 1:
        for i in range(n):
            rest = complete[:i] + complete[i + 1 :]
            without.append(_harmonic([_mean([r[j] for r in rest if r[j] is not None]) for j in range(3)]))
    known = [value for value in without if not math.isnan(value)]
    centre = sum(known) / len(known) if known else math.nan
    spread = sum((value - centre) ** 2 for value in known)
    stderr = math.sqrt((len(known) - 1) / len(known) * spread) if len(known) > 1 else math.nan
    return {**summary, "score": Estimate(score, stderr, n)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _estimate(values: Sequence[float]) -> Estimate:
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, 0)
    mean = sum(values) / n
    if n == 1:
        return Estimate(mean, math.nan, 1)
    return Estimate(mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n), n)


def _harmonic(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None and not math.isnan(value)]
    if len(known) < len(values):
        return math.nan
    return 0.0 if min(known) == 0 else len(known) / sum(1 / value for value in known)
