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

    A fact counts as known if every token of the true answer is the likeliest one after the prompt, so that the model
    writes it by itself; nothing else is looked at, and the choice favours no method.

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
        chunk = stream[asked : asked + max(16, count - len(found))]
        scores = score_answers(adapter, tokenizer, [(f.text, f.target_true) for f in chunk if f.target_true])
        for fact in chunk:
            asked += 1
            if fact.target_true and scores[fact.text, fact.target_true].is_argmax:
                found.append(fact)
                if len(found) == count:
                    break
        if bar is not None:
            bar.update(len(found))
    if len(found) < count:
        raise ValueError(f"demo: the model knows {len(found)} of the {len(stream)} facts there are, {count} wanted")
    return Choice(found, asked)
