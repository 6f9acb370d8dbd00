"""Questions with a few answers: the one with the highest mean log-probability of its tokens is the model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..metrics.scoring import score_answers
from ..models.adapter import Adapter
from ..prompts import encode
from .task import Progress, TaskOptions

__all__ = ["answered", "choose", "context_length", "with_shots"]


def choose(
    adapter: Adapter,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    options: TaskOptions,
    progress: Progress | None,
) -> tuple[list[int], list[list[float]]]:
    """The answer with the highest mean log-probability per token after each prompt; the first one of equals.

    A model whose logits are not finite prefers none: that is no answer, and never the right one.

    Returns:
        Index of the answer, or the number of answers where there is none, and the log-probabilities of all, for each
        prompt.
    """
    queries = [(prompt, answer) for prompt, own in zip(prompts, answers, strict=True) for answer in own]
    found = score_answers(adapter, tokenizer, queries, max_tokens=options.max_tokens, progress=progress)
    scores = [
        [found[prompt, answer].log_probability for answer in own] for prompt, own in zip(prompts, answers, strict=True)
    ]
    return [_preferred(row) for row in scores], scores


def answered(answers: Sequence[str], index: int) -> str | None:
    """The answer of that index as `choose` gives it, None where there is none."""
    return answers[index] if index < len(answers) else None


def _preferred(scores: list[float]) -> int:
    if any(map(math.isnan, scores)) or max(scores) == -math.inf:
        return len(scores)
    return max(range(len(scores)), key=scores.__getitem__)


def context_length(adapter: Adapter) -> int | None:
    """Tokens that the model can read, None where its configuration does not tell."""
    return adapter.positions


def with_shots(
    adapter: Adapter, tokenizer: Any, examples: Sequence[str], questions: Sequence[str], room: int
) -> tuple[list[str], int]:
    """Each question behind the examples, as many from the first on as the model can read.

    Args:
        examples: solved ones, each with the blank lines that follow it.
        questions: without a space at the end.
        room: tokens to keep free behind the question.

    Returns:
        The prompts, and the number of questions that had to do with fewer examples.

    Raises:
        ValueError: a question that is too long by itself.
    """
    longest = context_length(adapter)
    if longest is None:
        return ["".join(examples) + question for question in questions], 0
    sizes = [len(encode(tokenizer, example).ids) for example in examples]
    prompts, cut = [], 0
    for question in questions:
        left = longest - room - len(encode(tokenizer, question).ids)
        if left < 0:
            raise ValueError(
                f"a question of {longest - room - left} tokens and {room} for its answer do not fit the {longest} that "
                f"the model reads: {question[:60]!r}"
            )
        used = 0
        while used < len(sizes) and sizes[used] <= left:
            left -= sizes[used]
            used += 1
        cut += used < len(sizes)
        prompts.append("".join(examples[:used]) + question)
    return prompts, cut
