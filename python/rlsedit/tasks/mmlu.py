"""MMLU (Hendrycks et al. 2021) by the log-probability of the letter of each choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..metrics.estimate import estimate
from ..models.adapter import Adapter
from .choices import answered, choose, with_shots
from .classification import classification
from .files import choice_field, read_records, text_field, texts_field
from .task import Progress, Task, TaskOptions, TaskReport, split

__all__ = ["TASK"]

_LETTERS = "ABCDEFGHIJ"
_ROOM = 4


def _check(record: dict[str, Any]) -> dict[str, Any]:
    choices = texts_field(record, "choices", least=2)
    if len(choices) > len(_LETTERS):
        raise ValueError(f"choices must be at most {len(_LETTERS)}, got {len(choices)}")
    allowed = {key: i for i in range(len(choices)) for key in (i, _LETTERS[i])}
    subject = text_field(record, "subject") if "subject" in record else ""
    question = text_field(record, "question").strip()
    return {
        "question": question, "choices": choices, "subject": subject, "answer": choice_field(record, "answer", allowed),
    }  # fmt: skip


def _load(path: Path, on_error: Literal["raise", "skip"]) -> list[dict[str, Any]]:
    return read_records(path, _check, on_error)


def _question(record: dict[str, Any]) -> str:
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, record["choices"], strict=False))
    return f"{record['question']}\n{choices}\nAnswer:"


def _run(
    adapter: Adapter, tokenizer: Any, records: Sequence[dict[str, Any]], options: TaskOptions, progress: Progress | None
) -> TaskReport:
    shown, scored = split("mmlu", records, options, 0)
    examples = [f"{_question(record)} {_LETTERS[record['answer']]}\n\n" for record in shown]
    prompts, cut = with_shots(adapter, tokenizer, examples, [_question(record) for record in scored], _ROOM)
    letters = [_LETTERS[: len(record["choices"])] for record in scored]
    chosen, scores = choose(adapter, tokenizer, prompts, letters, options, progress)
    rows = [
        {
            "subject": record["subject"],
            "label": _LETTERS[record["answer"]],
            "answer": answered(own, answer),
            "log_probabilities": row,
        }
        for record, own, answer, row in zip(scored, letters, chosen, scores, strict=True)
    ]
    none = max(map(len, letters))  # no answer is a class of its own
    classes = [answer if answer < len(own) else none for own, answer in zip(letters, chosen, strict=True)]
    summary = classification([r["answer"] for r in scored], classes, max(none, 1 + max(classes)))
    by_subject: dict[str, list[float]] = {}
    for row in rows:
        by_subject.setdefault(row["subject"], []).append(float(row["answer"] == row["label"]))
    # over subjects, each counting the same, whatever its number of questions
    summary["accuracy_of_subjects"] = estimate([sum(hits) / len(hits) for hits in by_subject.values()])
    settings = {"shots": len(examples), "fewer_shots": cut, "subjects": len(by_subject)}
    return TaskReport(rows, summary, settings)


TASK = Task("mmlu", "MMLU: questions with four answers from school and university subjects", _load, _run)
