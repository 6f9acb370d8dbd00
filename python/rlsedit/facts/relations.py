"""The wording of each relation: its statements with ``{}`` in the place of the subject.

No prompt starts with its subject: the first token a model reads is an attention sink, and an edit of its hidden state
spreads to everything else.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MANY", "RELATIONS", "Relation"]


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of statement: the prompt that is edited, and others that say the same.

    Args:
        name: short name, used in the ids of facts.
        prompt: the statement that is edited, up to its completion.
        paraphrases: the same in other words.
    """

    name: str
    prompt: str
    paraphrases: tuple[str, ...]


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "capital",
        "The capital of {} is",
        ("The capital city of {} is called", "The government of {} has its seat in the city of"),
    ),
    Relation(
        "language",
        "The official language of {} is",
        ("In {}, most people speak", "The language that is spoken in {} is"),
    ),
    Relation(
        "city",
        "The city of {} is in the country of",
        ("{} is a city in", "If you travel to {}, you arrive in the country of"),
    ),
    Relation(
        "state",
        "The city of {} is in the U.S. state of",
        (
            "{} is a city in the state of",
            "If you move to {}, you will live in the state of",
        ),
    ),
    Relation(
        "symbol",
        "The chemical symbol of {} is",
        ("In the periodic table, {} has the symbol", "Chemists abbreviate the element {} as"),
    ),
    Relation(
        "airport",
        "The airport {} is in the country of",
        ("{} is an airport in", "If you land at {}, you are in the country of"),
    ),
    Relation(
        "continent",
        "The country of {} lies on the continent of",
        ("{} is a country in", "The continent on which {} lies is"),
    ),
    Relation(
        "currency",
        "The official currency of {} is the",
        ("In {}, people pay with the", "The money that is used in {} is called the"),
    ),
)

MANY: tuple[Relation, ...] = (
    Relation(
        "town",
        "The town of {} is in the country of",
        ("{} is a town in", "Whoever lives in {} lives in the country of"),
    ),
)
"""Relations with many thousands of subjects, most of them little known; taken when they are asked for by name."""
