"""Facts about what has been edited already: found before anything is written."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from ..facts import Fact
from ..reports import Conflict
from .index import Index, same_statement

__all__ = ["POLICIES", "OnConflict", "batches", "find", "settle"]

logger = logging.getLogger(__name__)

OnConflict = Literal["keep-both", "replace", "refuse"]
POLICIES = ("keep-both", "replace", "refuse")
_SHOWN = 5


def find(facts: Sequence[Fact], index: Index) -> list[Conflict]:
    """Conflicts with edits in the model, then those among the facts themselves."""
    found = index.conflicts(facts)
    earlier: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        same = earlier[fact.subject.casefold()]
        found += [Conflict(fact.id, other.id, fact.subject) for other in same if same_statement(fact, other)]
        same.append(fact)
    return found


def settle(facts: Sequence[Fact], index: Index, policy: str) -> list[Conflict]:
    """Refuse facts, or log what is done about their conflicts.

    Raises:
        ValueError: an id is in the model already; a conflict, where the policy is "refuse".
    """
    found = find(facts, index)
    replaced = {conflict.old for conflict in found} if policy == "replace" else set()
    if taken := [fact.id for fact in facts if fact.id in index.live and fact.id not in replaced]:
        raise ValueError(
            f"Editor.edit: facts must have ids that are not in the model, got {taken[:_SHOWN]}; remove these edits "
            "first, or give other ids"
        )
    if found:
        shown = ", ".join(f"{c.new!r} and {c.old!r} ({c.subject})" for c in found[:_SHOWN])
        shown += f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        if policy == "refuse":
            raise ValueError(f"Editor.edit: facts are about what has been edited already: {shown}; nothing was written")
        logger.warning("edits about the same: %s; %s", shown, "the later replaces the earlier" if replaced else
                       "both are kept")  # fmt: skip
    return found


def batches(facts: Sequence[Fact], size: int, apart: bool) -> list[list[Fact]]:
    """Facts in batches of at most `size`; with `apart` two facts about the same do not share one."""
    found: list[list[Fact]] = []
    for fact in facts:
        last = found[-1] if found else None
        full = last is None or len(last) == size
        if full or (apart and last is not None and any(same_statement(fact, other) for other in last)):
            found.append([fact])
        else:
            assert last is not None
            last.append(fact)
    return found
