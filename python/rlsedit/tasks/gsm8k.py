"""GSM8K (Cobbe et al. 2021): word problems, solved in words; the last number has to be right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

from ..metrics.estimate import estimate
from ..models.adapter import Adapter
from .choices import with_shots
from .completing import complete
from .files import read_records, text_field
from .task import Progress, Task, TaskOptions, TaskReport, split

__all__ = ["TASK", "final_number"]

_MARK = "####"
_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_CALCULATION = re.compile(r"<<[^>]*>>")
_SHOTS, _NEW_TOKENS = 5, 256
_STOP = ("\nQuestion:", "\n\n\n")


def final_number(text: str, *, marked: bool = False) -> Decimal | None:
    """The number that ends an answer: the first behind "####", or else the last of all; None where there is none.

    Thousands separators and a dollar sign are dropped; 18 and 18.00 are the same number.

    Args:
        marked: only a number behind "####" counts.
    """
    _, found, behind = text.partition(_MARK)
    if found:
        match = _NUMBER.search(behind.split("\n")[0])
        return None if match is None else _value(match[0])
    numbers = [] if marked else _NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def _check(record: dict[str, Any]) -> dict[str, Any]:
    question, answer = text_field(record, "question").strip(), text_field(record, "answer").strip()
    if final_number(answer, marked=True) is None:
        raise ValueError(f'answer must end in "#### NUMBER", got {answer[-40:]!r}')
    return {"question": question, "answer": _CALCULATION.sub("", answer)}


def _load(path: Path, on_error: Literal["raise", "skip"]) -> list[dict[str, Any]]:
    return read_records(path, _check, on_error)


def _run(
    adapter: Adapter, tokenizer: Any, records: Sequence[dict[str, Any]], options: TaskOptions, progress: Progress | None
) -> TaskReport:
    shown, scored = split("gsm8k", records, options, _SHOTS)
    new_tokens = options.new_tokens or _NEW_TOKENS
    examples = [f"Question: {record['question']}\nAnswer: {record['answer']}\n\n" for record in shown]
    questions = [f"Question: {record['question']}\nAnswer:" for record in scored]
    prompts, cut = with_shots(adapter, tokenizer, examples, questions, new_tokens)
    texts = complete(
        adapter, tokenizer, prompts, new_tokens=new_tokens, stop=_STOP, rows=options.rows, progress=progress
    )
    rows: list[dict[str, Any]] = []
    for record, (text,) in zip(scored, texts, strict=True):
        right = final_number(record["answer"])
        marked, last = final_number(text, marked=True), final_number(text)
        rows.append(
            {
                "label": str(right),
                "answer": None if last is None else str(last),
                "correct": last == right,
                "correct_marked": marked == right,
                "text": text,
            }
        )
    summary = {name: estimate([float(row[name]) for row in rows]) for name in ("correct", "correct_marked")}
    return TaskReport(rows, summary, {"shots": len(examples), "fewer_shots": cut, "new_tokens": new_tokens})


TASK = Task("gsm8k", "GSM8K: word problems, exact match of the final number", _load, _run)
