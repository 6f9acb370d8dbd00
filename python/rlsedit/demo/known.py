"""Which facts the demonstration edits: the first of the stream whose true answer the model knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlsedit.facts import Fact

if TYPE_CHECKING:
    from rlsedit.models import Adapter
    from rlsedit.report import ProgressBar

__all__ = ["Choice", "choose_known"]


@dataclass(frozen=True)
class Choice:
    """Facts that were chosen, and how many had to be asked for them."""

    facts: list[Fact]
    asked: int


def choose_known(
    adapter: Adapter, tokenizer: Any, stream: Sequence[Fact], count: int, bar: ProgressBar | None = None
) -> Choice:
    """Takes the first `count` facts of `stream` that the model knows.

    A fact counts as known if the model gives its true answer a higher mean log-probability per token than the new one,
    on the prompt itself; nothing else is looked at, so that the choice favours no method.

    Args:
        adapter: the unedited model.
        tokenizer: its tokenizer.
        stream: facts with true answers, in order.
        count: how many to take, at least 1.
        bar: shows the number found.

    Raises:
        ValueError: if the stream has fewer known facts than `count`.
    """
    from rlsedit.metrics import score_answers

    found: list[Fact] = []
    asked = 0
    while len(found) < count and asked < len(stream):
        chunk = stream[asked : asked + max(8, count - len(found))]
        queries = [(fact.text, answer) for fact in chunk for answer in (fact.target_true, fact.target_new) if answer]
        scores = score_answers(adapter, tokenizer, queries)
        for fact in chunk:
            asked += 1
            if fact.target_true is None:
                continue
            true, new = scores[fact.text, fact.target_true], scores[fact.text, fact.target_new]
            if true.log_probability > new.log_probability:
                found.append(fact)
                if len(found) == count:
                    break
        if bar is not None:
            bar.update(len(found))
    if len(found) < count:
        raise ValueError(f"demo: the model knows {len(found)} of the {len(stream)} facts there are, {count} wanted")
    return Choice(found, asked)
