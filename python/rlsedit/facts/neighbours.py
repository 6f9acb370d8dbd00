"""Neighbours of facts: what must stay as it is, and what of it the edits themselves change."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from rlsedit.facts.fact import Fact

__all__ = ["right_answers", "without_edited_neighbours"]


def without_edited_neighbours(facts: Sequence[Fact]) -> list[Fact]:
    """The facts without those neighbours that name a subject which one of the facts edits under the same relation.

    They are no neighbours then: what they should say has changed. Where facts have no relation, the answer that was
    right before stands for it: a neighbour has the relation of an edit whose `target_true` is its own right answer.

    Args:
        facts: all that are edited together, in any order.

    Returns:
        As many facts in the same order; `neighbours` and `neighbour_answers` of some are shorter.
    """
    subjects: dict[tuple[str, str | None], set[str]] = defaultdict(set)
    for fact in facts:
        subjects[_relation(fact, fact.target_true)].add(fact.subject)
    patterns = {
        relation: re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in sorted(names, key=len)[::-1]))
        for relation, names in subjects.items()
    }
    written = {fact.text.rstrip() for fact in facts}

    def edited(fact: Fact, prompt: str, answer: str | None) -> bool:
        pattern = patterns.get(_relation(fact, answer))
        return prompt.rstrip() in written or (pattern is not None and pattern.search(prompt) is not None)

    found = []
    for fact in facts:
        right = right_answers(fact) or (None,) * len(fact.neighbours)
        kept = [i for i, text in enumerate(fact.neighbours) if not edited(fact, text, right[i])]
        answers = tuple(fact.neighbour_answers[i] for i in kept) if fact.neighbour_answers else ()
        found.append(replace(fact, neighbours=tuple(fact.neighbours[i] for i in kept), neighbour_answers=answers))
    return found


def right_answers(fact: Fact) -> tuple[str, ...]:
    """Of its neighbours; none where they are not known."""
    return fact.neighbour_answers or (() if fact.target_true is None else (fact.target_true,) * len(fact.neighbours))


def _relation(fact: Fact, answer: str | None) -> tuple[str, str | None]:
    """What tells the relations of statements apart: the name of it, or an answer that was right before all edits."""
    return (fact.relation, None) if fact.relation else ("", answer)
