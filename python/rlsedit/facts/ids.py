"""Ids of facts that come without one: made from the text, so that the same fact has the same id wherever it comes from.

Earlier versions took the number of the line in a file, and the text of the whole line on standard input; folders that
they have written are still read (`store.again`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from rlsedit.facts.fact import Fact

__all__ = ["has_text_id", "numbered", "occurrence", "statement", "text_id"]


def statement(fact: Fact) -> tuple[str, str, str]:
    """What is written into the model: prompt, subject and new completion."""
    return fact.prompt, fact.subject, fact.target_new


def text_id(fact: Fact) -> str:
    """Twelve hexadecimal digits from prompt, subject and new completion."""
    text = json.dumps(statement(fact), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def numbered(fact: Fact, times: int = 1) -> Fact:
    """The fact with the id of its text; `times` is how often the same statement has come, this one included."""
    return replace(fact, id=text_id(fact) + (f"-{times}" if times > 1 else ""))


def occurrence(fact: Fact) -> int:
    """How often the statement had come when the id was made from the text; 0 where it was not made so."""
    name, sign, times = fact.id.partition("-")
    if name != text_id(fact):
        return 0
    return int(times) if times.isdecimal() else int(not sign)


def has_text_id(fact: Fact) -> bool:
    """Whether the id is one that is made from the text."""
    return occurrence(fact) > 0
