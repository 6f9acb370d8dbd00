"""Facts about the world: enough of them, deterministic, unambiguous, with neighbours that are never edited."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from rlsedit.facts import Fact, world
from rlsedit.facts.relations import RELATIONS
from rlsedit.facts.sources import PACKAGES, TOWNS, clean_pairs
from rlsedit.facts.world import relation_pairs, world_facts

NAMES = [relation.name for relation in RELATIONS]

for package in (*PACKAGES, TOWNS):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def facts() -> list:  # type: ignore[type-arg]
    return world_facts(0)


def test_counts(facts: list) -> None:  # type: ignore[type-arg]
    found = Counter(fact.relation for fact in facts)
    assert set(found) == set(NAMES)
    assert min(found.values()) >= 40, found
    assert len(facts) >= 1000


def test_every_fact_is_whole_and_unique(facts: list) -> None:  # type: ignore[type-arg]
    assert len({fact.id for fact in facts}) == len(facts)
    assert len({fact.text for fact in facts}) == len(facts)
    for fact in facts:
        assert fact.target_true
        assert not fact.prompt.startswith("{}"), "the first token is an attention sink"
        assert fact.target_new != fact.target_true
        assert len(fact.paraphrases) >= 2
        assert all(fact.subject in text for text in fact.paraphrases)
        assert len(fact.neighbours) == len(fact.neighbour_answers)
        assert fact.target_new not in fact.neighbour_answers


def test_no_subject_gives_its_answer_away(facts: list) -> None:  # type: ignore[type-arg]
    for fact in facts:
        for target in (fact.target_true, fact.target_new):
            assert not set(target.casefold().split()) & set(fact.subject.casefold().split()), fact
            assert len(target) <= 3 or target.casefold() not in fact.subject.casefold(), fact


def test_neighbours_are_right_and_never_edited(facts: list) -> None:  # type: ignore[type-arg]
    edited = {fact.subject for fact in facts}
    truth = {name: dict(relation_pairs(name)) for name in NAMES}
    for fact in facts:
        known = truth[fact.relation]
        assert known[fact.subject] == fact.target_true
        start, end = fact.prompt.split("{}")
        for prompt, answer in zip(fact.neighbours, fact.neighbour_answers, strict=True):
            subject = prompt.removeprefix(start).removesuffix(end)
            assert subject not in edited
            assert known[subject] == answer
    assert sum(bool(fact.neighbours) for fact in facts) == len(facts)


def test_towns_are_many_and_keep_the_promises_of_the_others() -> None:
    towns = world_facts(0, relations=["town"])
    assert len({fact.subject for fact in towns}) == len(towns) >= 10_000
    truth, edited = dict(relation_pairs("town")), {fact.subject for fact in towns}
    for fact in towns:
        assert truth[fact.subject] == fact.target_true != fact.target_new
        assert len(fact.neighbours) == 4
        for prompt, answer in zip(fact.neighbours, fact.neighbour_answers, strict=True):
            subject = prompt.removeprefix("The town of ").removesuffix(" is in the country of")
            assert subject not in edited
            assert truth[subject] == answer != fact.target_new
    assert world_facts(0, relations=["town"], limit=50) == towns[:50]


def test_only_the_facts_that_are_asked_for_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of over twenty thousand towns."""
    made: list[str] = []
    whole = world.Fact

    def counted(**fields: Any) -> Fact:
        made.append(fields["id"])
        return whole(**fields)

    monkeypatch.setattr(world, "Fact", counted)
    found = world_facts(0, limit=5, relations=["town", "symbol"])
    assert sorted(made[:5]) == sorted(fact.id for fact in found)
    assert len(made) <= 6


def test_deterministic_and_a_prefix_of_longer_streams(facts: list) -> None:  # type: ignore[type-arg]
    assert world_facts(0, limit=25) == facts[:25]
    assert world_facts(0) == facts
    other = world_facts(1, limit=25)
    assert other != facts[:25]
    assert {fact.relation for fact in facts[: len(NAMES)]} == set(NAMES), "relations take turns"


def test_arguments() -> None:
    assert {fact.relation for fact in world_facts(0, limit=9, relations=["symbol", "capital"])} == {"symbol", "capital"}
    assert all(not fact.neighbours for fact in world_facts(0, limit=9, neighbours=0))
    for wrong in ({"limit": 0}, {"neighbours": -1}, {"relations": ["mayor"]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            world_facts(0, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mayor"):
        relation_pairs("mayor")


def test_cleaning() -> None:
    pairs = [
        ("Kuwait", "Kuwait City"), ("Mexico", "Mexico City"), ("Spain", "Madrid"), ("Spain", "Madrid"),
        ("Bolivia", "Sucre"), ("Bolivia", "La Paz"), ("Congo (DRC)", "Kinshasa"), ("Peru", "Lima / Callao"),
        ("tungsten", "W"), (" Malta ", "Valletta"), ("New York", "New Jersey"), ("Åland", "Mariehamn"),
    ]  # fmt: skip
    assert clean_pairs(pairs) == [("Malta", "Valletta"), ("Spain", "Madrid"), ("tungsten", "W"), ("Åland", "Mariehamn")]


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "countryinfo", None)
    with pytest.raises(ImportError, match=r"countryinfo is not installed; .* pip install countryinfo airportsdata"):
        relation_pairs("capital")
