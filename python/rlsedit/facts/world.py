"""Counterfactual facts about the real world in the shape of CounterFact, a deterministic stream for a seed.

The rule: the subjects of all relations are split by a hash of their name, three quarters to be edited and
one quarter to serve as neighbours, so that no neighbour is ever edited in any relation. Within a relation
the subjects come in an order drawn from the seed; the relations take turns. The new answer is drawn from
the relation's other answers, so that it is of the right kind. Neighbours with the same true answer come
first, then others of the relation.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest

from rlsedit.facts.fact import Fact
from rlsedit.facts.relations import MANY, RELATIONS, Relation
from rlsedit.facts.sources import SOURCES, Pair, clean_pairs

__all__ = ["relation_pairs", "world_facts"]

_NEIGHBOUR_SHARE = 4  # one subject in four
_FEW, _SPARE = 1000, 8  # above so many neighbours to choose from, a part of them is drawn


def relation_pairs(relation: str) -> list[Pair]:
    """The cleaned (subject, answer) pairs of one relation, sorted.

    Raises:
        ValueError: if there is no such relation.
        ImportError: if a package is missing; the message names the pip command.
    """
    if relation not in SOURCES:
        raise ValueError(f"relation_pairs: relation must be one of {', '.join(SOURCES)}, got {relation!r}")
    return clean_pairs(SOURCES[relation]())


def world_facts(
    seed: int = 0,
    *,
    limit: int | None = None,
    relations: Iterable[str] | None = None,
    neighbours: int = 4,
) -> list[Fact]:
    """Makes the stream of facts that belongs to `seed`; a longer one starts with the shorter ones.

    Args:
        seed: fixes order, new answers and neighbours.
        limit: at most this many facts; all of them (more than a thousand) by default.
        relations: names from `RELATIONS` and `MANY`; all of `RELATIONS` by default. "town" has over 20,000 facts.
        neighbours: at most this many neighbours for each fact, at least 0.

    Raises:
        ValueError: for an unknown relation, a limit below 1 or a negative number of neighbours.
        ImportError: if a package that carries facts is missing; the message names the pip command.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"world_facts: limit must be at least 1, got {limit}")
    if neighbours < 0:
        raise ValueError(f"world_facts: neighbours must be at least 0, got {neighbours}")
    names = [relation.name for relation in RELATIONS] if relations is None else list(relations)
    for name in names:
        if name not in SOURCES:
            raise ValueError(f"world_facts: relations must be among {', '.join(SOURCES)}, got {name!r}")
    chosen = [relation for relation in (*RELATIONS, *MANY) if relation.name in names]
    columns = [_relation_facts(r, relation_pairs(r.name), seed, neighbours) for r in chosen]
    stream = (fact for turn in zip_longest(*columns) for fact in turn if fact is not None)
    return list(islice(stream, limit))


def _relation_facts(relation: Relation, pairs: Sequence[Pair], seed: int, neighbours: int) -> Iterator[Fact]:
    rng = random.Random(f"{seed}:{relation.name}")
    answers = [(answer, _first_word(answer), answer.casefold()) for answer in sorted({answer for _, answer in pairs})]
    reserve = [pair for pair in pairs if _is_neighbour(pair[0])]
    edited = [pair for pair in pairs if not _is_neighbour(pair[0])]
    rng.shuffle(edited)
    near = _Reserve(relation, reserve)
    for subject, true in edited:
        draw = random.Random(f"{seed}:{relation.name}:{subject}")
        own, name = _first_word(true), subject.casefold()
        others = [answer for answer, first, folded in answers if first != own and folded not in name]
        if not others:
            continue
        new = draw.choice(others)
        chosen = near.draw(draw, true, new, neighbours)
        yield Fact(
            id=f"{relation.name}/{subject}",
            prompt=relation.prompt,
            subject=subject,
            target_new=new,
            target_true=true,
            paraphrases=tuple(template.replace("{}", subject) for template in relation.paraphrases),
            neighbours=tuple(text for text, _ in chosen),
            neighbour_answers=tuple(answer for _, answer in chosen),
            relation=relation.name,
        )


class _Reserve:
    """Subjects of a relation that are never edited, and the prompts about them."""

    def __init__(self, relation: Relation, pairs: Sequence[Pair]) -> None:
        self._relation, self._pairs = relation, pairs
        self._by_answer: dict[str, list[Pair]] = defaultdict(list)
        for pair in pairs:
            self._by_answer[pair[1]].append(pair)

    def draw(self, draw: random.Random, true: str, new: str, count: int) -> list[Pair]:
        """Prompts and their right answers: those with the same answer first, none with the new one."""
        same = list(self._by_answer[true])
        draw.shuffle(same)
        few = len(self._pairs) <= _FEW
        others = self._pairs if few else draw.sample(self._pairs, min(len(self._pairs), _SPARE * (count + 1)))
        rest = [pair for pair in others if pair[1] not in (true, new)]
        draw.shuffle(rest)
        prompt = self._relation.prompt
        return [(prompt.replace("{}", subject), answer) for subject, answer in (same + rest)[:count]]


def _is_neighbour(subject: str) -> bool:
    return hashlib.sha256(subject.encode()).digest()[0] % _NEIGHBOUR_SHARE == 0


def _first_word(text: str) -> str:
    return text.casefold().split()[0]
