"""The facts of a stream: their order, deliberate conflicts, and neighbours that the stream itself edits."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ..facts import Fact

__all__ = ["groups", "ordered", "with_conflicts", "without_edited_neighbours"]


def ordered(facts: Sequence[Fact], order: int) -> list[Fact]:
    """The facts in the order of the file for 0, shuffled by that seed otherwise."""
    found = list(facts)
    if order:
        random.Random(order).shuffle(found)
    return found


def with_conflicts(facts: Sequence[Fact], times: int, seed: int = 0) -> list[Fact]:
    """The facts, then `times` rounds in which each is written again with another answer.

    The new answer is one that another fact of the same relation is given, or of any fact where the relation has no
    other; the answer of the round before stands as `target_true`, so that success means that the last one written wins.
    Neighbours keep the right answers that they had. What followed from the first answer (portability, references) does
    not follow from another and is left out. Ids get "~1", "~2", ..., with more signs where a fact has such an id.

    Raises:
        ValueError: fewer than two different answers.
    """
    if times == 0:
        return list(facts)
    by_relation: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        by_relation[fact.relation].append(fact.target_new)
    every = sorted({fact.target_new for fact in facts})
    if len(every) < 2:
        raise ValueError("with_conflicts: facts must have at least two different answers, got one")
    ids, sign = {fact.id for fact in facts}, "~"
    while not ids.isdisjoint(f"{name}{sign}{round_}" for name in ids for round_ in range(1, times + 1)):
        sign += "~"
    choose = random.Random(seed)
    stream, last = list(facts), list(facts)
    for round_ in range(1, times + 1):
        following = []
        for fact, before in zip(facts, last, strict=True):
            near = sorted(set(by_relation[fact.relation]) - {before.target_new})
            answer = choose.choice(near or [a for a in every if a != before.target_new])
            right = _right_answers(fact)
            following.append(
                replace(
                    fact, id=f"{fact.id}{sign}{round_}", target_new=answer, target_true=before.target_new,
                    neighbours=fact.neighbours if right else (), neighbour_answers=right, portability=(), references=(),
                )
            )  # fmt: skip
        stream += following
        last = following
    return stream


def without_edited_neighbours(facts: Sequence[Fact]) -> list[Fact]:
    """The facts without those neighbours that name a subject which the stream edits under the same relation.

    They are no neighbours then: what they should say has changed. Where facts have no relation, the answer that was
    right before stands for it: a neighbour has the relation of an edit whose `target_true` is its own right answer.
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
        right = _right_answers(fact) or (None,) * len(fact.neighbours)
        kept = [i for i, text in enumerate(fact.neighbours) if not edited(fact, text, right[i])]
        answers = tuple(fact.neighbour_answers[i] for i in kept) if fact.neighbour_answers else ()
        found.append(replace(fact, neighbours=tuple(fact.neighbours[i] for i in kept), neighbour_answers=answers))
    return found


def _right_answers(fact: Fact) -> tuple[str, ...]:
    """Of its neighbours; none where they are not known."""
    return fact.neighbour_answers or (() if fact.target_true is None else (fact.target_true,) * len(fact.neighbours))


def _relation(fact: Fact, answer: str | None) -> tuple[str, str | None]:
    """What tells the relations of statements apart: the name of it, or an answer that was right before all edits."""
    return (fact.relation, None) if fact.relation else ("", answer)


def groups(
    written: Sequence[Fact], batch: int, first: int, sample: int, once: int | None = None
) -> dict[str, list[Fact]]:
    """What is measured at a checkpoint.

    Args:
        written: all facts so far, in the order of the stream; of one written again only the last counts in "all".
        batch: facts of the last batch.
        first: facts at the beginning of the stream.
        sample: at most so many of a group, evenly spread; 0 for all.
        once: facts of the stream before it writes them again, in the same order; None where it never does.

    Returns:
        "batch" (the last one), "all", and "first" unless that is 0 or all there is.
    """
    latest = {index % (once or len(written)): fact for index, fact in enumerate(written)}
    found = {"batch": list(written[-batch:]), "all": list(latest.values())}
    if 0 < first < len(found["all"]):
        found["first"] = found["all"][:first]
    return {name: _spread(facts, sample) for name, facts in found.items()}


def _spread(facts: list[Fact], sample: int) -> list[Fact]:
    if not sample or len(facts) <= sample:
        return facts
    return [facts[i * len(facts) // sample] for i in range(sample)]
