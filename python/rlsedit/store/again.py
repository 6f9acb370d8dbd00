"""Facts that a folder is given again: under which ids it knows them, which it holds, and which were taken out of it.

Both ways of giving facts, a file and a stream, ask here, so that the same fact meets the same answer in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..facts import Fact
from ..facts.ids import has_text_id, occurrence, statement
from .index import same_statement
from .ledger import Edit

__all__ = ["Again", "FormerIds", "taken_out", "told_apart"]

# of a line's number in a file, of a line's text on standard input; ".0" where a record held several facts
_FORMER = re.compile(r"(\d+|[0-9a-f]{12})(\.\d+)?")


class FormerIds:
    """Ids that earlier versions gave to facts without one, by what the facts state.

    Args:
        rows: all rows of the ledger.
    """

    def __init__(self, rows: Iterable[Edit]) -> None:
        self._ids: dict[tuple[str, str, str], list[str]] = {}
        self._known: set[str] = set()
        for row in rows:
            self._known.add(row.fact.id)
            if _FORMER.fullmatch(row.fact.id) and not has_text_id(row.fact):
                ids = self._ids.setdefault(statement(row.fact), [])
                if row.fact.id not in ids:
                    ids.append(row.fact.id)

    def renamed(self, fact: Fact) -> Fact:
        """The fact under the id that the folder has for it, where its own was made from its text.

        One that the folder has under the id of its text keeps it: a number may be somebody's own id.
        """
        if fact.id in self._known:
            return fact
        ids = self._ids.get(statement(fact), [])
        times = occurrence(fact) if ids else 0
        return replace(fact, id=ids[times - 1]) if 0 < times <= len(ids) else fact


def taken_out(rows: Sequence[Edit]) -> Edit | None:
    """The last of the rows of one fact that is not in the model, if it was taken out and not asked for since."""
    return rows[-1] if rows and rows[-1].state == "removed" else None


@dataclass(frozen=True)
class Again:
    """What becomes of facts that are given to a folder with edits.

    Attributes:
        facts: all of them, under the ids of the folder.
        left: those to be written: not in the model, and not taken out of it unless they are wanted again.
        out: ledger rows of those that were taken out, undone or replaced, and stay out.
        outdated: those never written that a later fact replaces which is in the model already.
    """

    facts: list[Fact]
    left: list[Fact]
    out: list[Edit]
    outdated: list[Fact]


def told_apart(facts: Sequence[Fact], rows: Sequence[Edit], again: bool, replacing: bool) -> Again:
    """Tell which facts are left to be written.

    Args:
        facts: in their order.
        rows: all rows of the ledger.
        again: whether what was taken out is written again; with `replacing` less what a later fact would replace.
        replacing: whether a later fact about the same replaces an earlier one.

    Raises:
        ValueError: the model holds another edit with the id of a fact.
    """
    former = FormerIds(rows)
    inside = {row.fact.id: row.fact for row in rows if row.state == "applied"}
    last = {(row.fact.id, statement(row.fact)): row for row in rows if row.state != "applied"}
    given = {fact.id for fact in facts}
    facts = [fact if (new := former.renamed(fact)).id in given else new for fact in facts]
    later: dict[str, list[Fact]] = {}
    left: list[Fact] = []
    out: list[Edit] = []
    outdated: list[Fact] = []
    for fact in reversed(facts):
        known, row = inside.get(fact.id), taken_out([last[key]] if (key := (fact.id, statement(fact))) in last else [])
        about = later.setdefault(fact.subject.casefold(), [])
        over = [other for other in about if same_statement(fact, other)] if replacing else []
        if known is not None:
            if statement(known) != statement(fact):
                raise ValueError(
                    f"--facts: id {fact.id!r} is that of another edit in the folder: {known.text} {known.target_new}"
                )
        elif row is None and any(other.id in inside for other in over):
            outdated.append(fact)
        elif row is None or (again and not over):
            left.append(fact)
        else:
            out.append(row)
        about.append(fact)
    return Again(facts, left[::-1], out[::-1], outdated[::-1])
