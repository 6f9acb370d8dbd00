"""Scores of the CounterFact benchmark (Meng et al. 2022, ROME, section 3.2 and its released evaluation)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from ..facts import Fact
from ..models.adapter import Adapter
from .estimate import Estimate, estimate, estimate_of_means, harmonic
from .scoring import Answer, Query, check_queries, score_answers

GROUPS = ("efficacy", "paraphrase", "neighbourhood")
KINDS = ("success", "accuracy", "tokens", "magnitude")
SUCCESSES = tuple(f"{group}_success" for group in GROUPS)
PORTABILITY = ("portability_accuracy", "portability_tokens", "portability_any")
METRICS = (*(f"{group}_{kind}" for group in GROUPS for kind in KINDS), *PORTABILITY)


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
        efficacy, paraphrase   success p(new) > p(true); magnitude p(new) - p(true); accuracy: every token of the new
                               answer is the likeliest; tokens: the share of its tokens that are (zsRE's accuracy)
        neighbourhood          the same with the neighbour's right answer first
        portability            accuracy and tokens of the best of the answers that count as right; any: of one of the
                               questions at least, all tokens (MQuAKE's multi-hop accuracy, here by teacher forcing)

    Args:
        model: a causal LM.
        tokenizer: its fast tokenizer.
        facts: at least one.
        adapter: for architectures that `Adapter.for_model` does not know.
        max_tokens: token budget of one forward pass.
        progress: called with (prompts done, all prompts).

    Raises:
        ValueError: no facts, or one that cannot be encoded or is too long for the model.
    """
    facts = list(facts)
    if not facts:
        raise ValueError("evaluate: facts must hold at least one fact, got none")
    adapter = adapter or Adapter.for_model(model, edit=False)
    queries, about = _asked(facts)
    answers = score_answers(adapter, tokenizer, queries, max_tokens=max_tokens, progress=progress, about=about)
    rows = [_row(fact, answers) for fact in facts]
    return EvalReport(rows, summarise(rows))


def check_scored(adapter: Adapter, tokenizer: Any, facts: Sequence[Fact]) -> None:
    """Refuse facts that `evaluate` could not score, before any work is done.

    Raises:
        ValueError: naming the first that cannot be encoded or is too long for the model.
    """
    check_queries(adapter, tokenizer, *_asked(facts))


def _asked(facts: Sequence[Fact]) -> tuple[list[Query], Callable[[Query], str]]:
    """All that is scored, and what says whose a pair is."""

    def about(query: Query) -> str:
        return f"fact {next(fact.id for fact in facts if query in _all_queries(fact))!r}"

    return [query for fact in facts for query in _all_queries(fact)], about


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


def _all_queries(fact: Fact) -> list[Query]:
    asked = [query for group in _queries(fact) for pair in group for query in pair if query]
    return asked + [query for choices in _portable(fact) for query in choices]


def _portable(fact: Fact) -> list[list[Query]]:
    return [[(prompt.rstrip(), answer) for answer in answers] for prompt, answers in fact.portability]


def _row(fact: Fact, answers: dict[Query, Answer]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": fact.id}
    groups = _queries(fact)
    for name, pairs in zip(GROUPS, groups, strict=True):
        rivals = [(answers[right], answers[other]) for right, other in pairs if other is not None and other != right]
        first = [answers[right] for right, _ in pairs]
        row[f"{name}_success"] = _mean([float(a.log_probability > b.log_probability) for a, b in rivals])
        row[f"{name}_magnitude"] = _mean([math.exp(a.log_probability) - math.exp(b.log_probability) for a, b in rivals])
        row[f"{name}_accuracy"] = _mean([float(answer.is_argmax) for answer in first])
        row[f"{name}_tokens"] = _mean([answer.share for answer in first])
    best = [max((answers[query] for query in choices), key=lambda answer: answer.share) for choices in _portable(fact)]
    row["portability_accuracy"] = _mean([float(answer.is_argmax) for answer in best])
    row["portability_tokens"] = _mean([answer.share for answer in best])
    row["portability_any"] = float(any(answer.is_argmax for answer in best)) if best else None
    right, rival = groups[0][0]
    row["log_probability_new"] = answers[right].log_probability
    row["log_probability_true"] = None if rival is None else answers[rival].log_probability
    return row


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    """Means with standard errors (s / sqrt(n), s with n - 1) and 95 % bootstrap intervals over facts.

    The standard error of the score, the harmonic mean of the three successes, is that of the jackknife over facts.
    """
    summary = {name: estimate([row[name] for row in rows if row.get(name) is not None]) for name in METRICS}
    return {**summary, "score": _score(rows)}


def paired_differences(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    """How much more `rows` have than `others`, fact by fact: what is hard or easy about a fact drops out of the error.

    Args:
        rows, others: of `EvalReport` or alike, of the same facts.

    Returns:
        Metric -> Estimate of the difference of the means over the facts that both have, errors and intervals as in
        `summarise`; "score": of the two harmonic means, facts left out and drawn in pairs.

    Raises:
        ValueError: rows of different facts.
    """
    by_id = {row["id"]: row for row in others}
    if len(by_id) != len(others) or {row["id"] for row in rows} != set(by_id) or len(rows) != len(others):
        raise ValueError("paired_differences: both must be of the same facts, each once")
    pairs = [(row, by_id[row["id"]]) for row in rows]
    found = {
        name: estimate([a[name] - b[name] for a, b in pairs if a.get(name) is not None and b.get(name) is not None])
        for name in METRICS
    }
    values = np.hstack([_successes([a for a, _ in pairs]), _successes([b for _, b in pairs])])
    half = len(SUCCESSES)
    found["score"] = estimate_of_means(values, lambda m: harmonic(m[..., :half]) - harmonic(m[..., half:]))
    return found


def _score(rows: Sequence[dict[str, Any]]) -> Estimate:
    return estimate_of_means(_successes(rows), harmonic)


def _successes(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """(facts, 3), NaN where a fact has no such value."""
    return np.array([[math.nan if row[name] is None else row[name] for name in SUCCESSES] for row in rows], float)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
