"""SST-2, MRPC, CoLA, RTE and NLI by the log-probability of the answers, with the structure of AlphaEdit's glue_eval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..models.adapter import Adapter
from .choices import answered, choose, with_shots
from .classification import classification
from .files import choice_field, read_records, text_field
from .task import Progress, Task, TaskOptions, TaskReport, split

__all__ = ["TASKS"]

_ROOM = 8  # tokens of the longest answer


@dataclass(frozen=True)
class _Question:
    """How one data set is asked: fields, label as in its files -> index of the answer, prompt, answers."""

    name: str
    summary: str
    texts: tuple[str, ...]
    labels: dict[Any, int]
    answers: tuple[str, ...]
    prompt: Callable[..., str]


_QUESTIONS = (
    _Question(
        "sst", "SST-2: is a sentence of a film review positive", ("sentence",), {0: 0, 1: 1}, ("negative", "positive"),
        lambda sentence: f"Review: {sentence}\nSentiment:",
    ),
    _Question(
        "mrpc", "MRPC: do two sentences say the same", ("sentence1", "sentence2"), {0: 0, 1: 1}, ("no", "yes"),
        lambda first, second: (
            f"Sentence 1: {first}\nSentence 2: {second}\nQuestion: Do both sentences mean the same thing?\nAnswer:"
        ),
    ),
    _Question(
        "cola", "CoLA: is a sentence grammatical", ("sentence",), {0: 0, 1: 1}, ("no", "yes"),
        lambda sentence: f"{sentence}\nQuestion: Does this sentence make sense?\nAnswer:",
    ),
    _Question(
        "rte", "RTE: does one sentence follow from a text", ("sentence1", "sentence2"),
        {0: 0, 1: 1, "entailment": 0, "not_entailment": 1}, ("True", "False"),
        lambda text, claim: f"{text}\nQuestion: {claim} True or False?\nAnswer:",
    ),
    _Question(
        "nli", "NLI: does one sentence follow from a text (labels in words)", ("sentence1", "sentence2"),
        {"entailment": 0, "not_entailment": 1}, ("True", "False"),
        lambda text, claim: f"{text}\nQuestion: {claim} True or False?\nAnswer:",
    ),
)  # fmt: skip


def _load(question: _Question, path: Path, on_error: Literal["raise", "skip"]) -> list[dict[str, Any]]:
    def check(record: dict[str, Any]) -> dict[str, Any]:
        texts = [text_field(record, name).strip() for name in question.texts]
        return {"texts": texts, "label": choice_field(record, "label", question.labels)}

    return read_records(path, check, on_error)


def _run(
    question: _Question, adapter: Adapter, tokenizer: Any, records: Sequence[dict[str, Any]], options: TaskOptions,
    progress: Progress | None,
) -> TaskReport:  # fmt: skip
    shown, scored = split(question.name, records, options, 0)
    examples = [f"{question.prompt(*r['texts'])} {question.answers[r['label']]}\n\n" for r in shown]
    asked = [question.prompt(*record["texts"]) for record in scored]
    prompts, cut = with_shots(adapter, tokenizer, examples, asked, _ROOM)
    chosen, scores = choose(adapter, tokenizer, prompts, [question.answers] * len(prompts), options, progress)
    labels = [record["label"] for record in scored]
    rows = [
        {"label": question.answers[label], "answer": answered(question.answers, answer), "log_probabilities": row}
        for label, answer, row in zip(labels, chosen, scores, strict=True)
    ]
    settings = {
        "shots": len(examples),
        "fewer_shots": cut,
        "labels": dict(Counter(row["label"] for row in rows)),
        "answers": dict(Counter(row["answer"] or "none" for row in rows)),
    }
    classes = max(len(question.answers), 1 + max(chosen))  # no answer is a class of its own
    return TaskReport(rows, classification(labels, chosen, classes), settings)


TASKS = tuple(Task(q.name, q.summary, partial(_load, q), partial(_run, q)) for q in _QUESTIONS)
