"""Which edits a model holds: the steps that count, where each live edit stands, and which edits are about the same."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..facts import Fact
from ..reports import Conflict
from .records import Entry

__all__ = ["Index", "Place", "same_statement"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an edit was written: number of the record, position among its facts."""

    number: int
    position: int


class Index:
    """Follows a stream of entries; undo and reset take steps off the stack of those that count."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.stack: list[Entry] = []
        self.live: dict[str, Place] = {}
        self._subjects: dict[str, dict[str, tuple[str, str]]] = {}
        for entry in entries:
            self.push(entry)

    def push(self, entry: Entry) -> None:
        """Take the next entry in."""
        if entry.kind in ("undo", "reset"):
            kept = [] if entry.kind == "reset" else self.stack[:-1]
            twin = Index(kept)
            self.stack, self.live, self._subjects = twin.stack, twin.live, twin._subjects
            return
        self.stack.append(entry)
        for name in entry.removed:
            self._forget(name)
        for position, (name, (subject, prompt, relation)) in enumerate(zip(entry.ids, entry.about, strict=True)):
            self.live[name] = Place(entry.number, position)
            self._subjects.setdefault(_plain(subject), {})[name] = (
                sys.intern(_plain(prompt)),
                sys.intern(_plain(relation)),
            )

    def conflicts(self, facts: Sequence[Fact]) -> list[Conflict]:
        """Edits in the model about the same subject with the same prompt or the same (named) relation."""
        found: list[Conflict] = []
        for fact in facts:
            for name, (prompt, relation) in self._subjects.get(_plain(fact.subject), {}).items():
                if prompt == _plain(fact.prompt) or (relation and relation == _plain(fact.relation)):
                    found.append(Conflict(fact.id, name, fact.subject))
        return found

    def positions(self, entry: Entry) -> set[int]:
        """Positions of an entry's facts that are still in the model."""
        return {i for i, name in enumerate(entry.ids) if self.live.get(name) == Place(entry.number, i)}

    def _forget(self, name: str) -> None:
        place = self.live.pop(name, None)
        if place is None:
            return
        entry = next(entry for entry in reversed(self.stack) if entry.number == place.number)
        subject = _plain(entry.about[place.position][0])
        self._subjects[subject].pop(name)
        if not self._subjects[subject]:
            del self._subjects[subject]


def same_statement(one: Fact, other: Fact) -> bool:
    """Whether two facts are about the same subject, with the same prompt or the same (named) relation."""
    if _plain(one.subject) != _plain(other.subject):
        return False
    relation = _plain(one.relation)
    return _plain(one.prompt) == _plain(other.prompt) or (bool(relation) and relation == _plain(other.relation))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
