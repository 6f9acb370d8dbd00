"""The facts of a stream: their order, deliberate conflicts, and those that are measured at a checkpoint."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ..facts import Fact
from ..facts.neighbours import right_answers

__all__ = ["groups", "ordered", "with_conflicts"]


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
            right = right_answers(fact)
            following.append(
                replace(
                    fact, id=f"{fact.id}{sign}{round_}", target_new=answer, target_true=before.target_new,
                    neighbours=fact.neighbours if right else (), neighbour_answers=right, portability=(), references=(),
                )
            )  # fmt: skip
        stream += following
        last = following
    return stream


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
