"""Records of the published data sets as facts: which format a record has, and what its fields become.

| format | told by | facts of a record |
|---|---|---|
| ours | `Fact`'s fields | one |
| CounterFact, multi-CounterFact (Meng et al. 2022) | `requested_rewrite`, an object | one |
| MQuAKE-CF (Zhong et al. 2023) | `requested_rewrite`, a list | one a rewrite; the first has the questions |
| zsRE in MEND's format (Mitchell et al. 2022) | `src`, `alt` | one |
| EasyEdit's: zsRE, WikiData (KnowEdit, Zhang et al. 2024) | `target_new`, `ground_truth` or `locality` | one |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["fields_of"]

Record = dict[str, Any]


def fields_of(record: Record) -> list[Record]:
    """The fields of `Fact` for each fact of a record; ids are left out where the record has none.

    Raises:
        ValueError, TypeError: a field that is missing or of the wrong kind; the message names it.
    """
    for known, read in _FORMATS:
        if known(record):
            return read(record)
    return [dict(record)]


def _counterfact(record: Record) -> list[Record]:
    fields = {
        **_rewrite(record["requested_rewrite"], "requested_rewrite"),
        "paraphrases": _list(record, "paraphrase_prompts"),
        "neighbours": _list(record, "neighborhood_prompts"),
        "generation": _list(record, "generation_prompts"),
    }
    return [_with_id(fields, record)]


def _mquake(record: Record) -> list[Record]:
    rewrites = record["requested_rewrite"]
    if not rewrites:
        raise ValueError("requested_rewrite must hold at least one rewrite, got none")
    found = []
    for index, rewrite in enumerate(rewrites):
        where = f"requested_rewrite[{index}]"
        fields = _rewrite(rewrite, where)
        question = rewrite.get("question")
        if isinstance(question, str) and question.strip():
            fields["paraphrases"] = (question,)
        if "case_id" in record:
            fields["id"] = f"{record['case_id']}.{index}"
        if index == 0:
            answers = _answers("new_answer", [record.get("new_answer"), *_list(record, "new_answer_alias")])
            fields["portability"] = [[question, answers] for question in _list(record, "questions")]
        found.append(fields)
    return found


def _zsre_mend(record: Record) -> list[Record]:
    """The answer to be written is `alt`, as in MEND and EasyEdit (MEMIT's release writes `answers[0]` instead).

    `loc` is a question that the edit must leave alone.
    """
    subject = _text(record, "subject")
    fields: Record = {
        "prompt": _template(_text(record, "src"), subject, "src"),
        "subject": subject,
        "target_new": _text(record, "alt"),
        "paraphrases": [record["rephrase"]] if record.get("rephrase") else (),
        "portability": list(_mend_portability(record)),
    }
    if answers := record.get("answers"):
        fields["target_true"] = _answers("answers", answers)[0]
    if record.get("loc") and record.get("loc_ans"):
        fields["neighbours"] = [_question(_text(record, "loc"))]
        fields["neighbour_answers"] = [_text(record, "loc_ans")]
    return [_with_id(fields, record)]


def _easyedit(record: Record) -> list[Record]:
    subject = _text(record, "subject")
    neighbours, kept = [], []
    for prompt, answers in _pairs(record, "locality"):
        neighbours.append(prompt)
        kept.append(answers[0])
    fields: Record = {
        "prompt": _template(_text(record, "prompt"), subject, "prompt"),
        "subject": subject,
        "target_new": _text(record, "target_new"),
        "paraphrases": [record["rephrase_prompt"]] if record.get("rephrase_prompt") else (),
        "neighbours": neighbours,
        "neighbour_answers": kept,
        "portability": [[prompt, answers] for prompt, answers in _pairs(record, "portability")],
    }
    if truth := record.get("ground_truth"):
        fields["target_true"] = _answers("ground_truth", truth)[0]
    return [_with_id(fields, record)]


def _rewrite(rewrite: object, where: str) -> Record:
    if not isinstance(rewrite, dict):
        raise TypeError(f"{where} must be an object, got {type(rewrite).__name__}")
    fields: Record = {"relation": rewrite.get("relation_id") or ""}
    for name in ("prompt", "subject"):
        if name not in rewrite:
            raise ValueError(f"{where}.{name} is missing")
        fields[name] = rewrite[name]
    for name in ("target_new", "target_true"):
        target = rewrite.get(name)
        if isinstance(target, dict):
            target = target.get("str")
        if target is None and name == "target_new":
            raise ValueError(f"{where}.target_new.str is missing")
        if target is not None:
            fields[name] = target
    return fields


def _with_id(fields: Record, record: Record) -> Record:
    for name in ("case_id", "id"):
        if name in record:
            return {**fields, "id": record[name]}
    return fields


def _text(record: Record, name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {'nothing' if value is None else type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name} must not be empty, got {value!r}")
    return value.strip()


def _list(record: Record, name: str, where: str = "") -> list[Any]:
    value = record.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise TypeError(f"{where or name} must be a list, got {type(value).__name__}")
    return value


def _template(text: str, subject: str, name: str) -> str:
    """`text` with {} in the place of the subject's first occurrence."""
    if subject not in text:
        raise ValueError(f"{name} must contain the subject {subject!r}, got {text!r}")
    return text.replace(subject, "{}", 1)


def _question(text: str) -> str:
    return text if text.endswith("?") else text + "?"


def _answers(name: str, value: object) -> list[str]:
    """Answers that count as right: a string, or strings in lists; the first is the one that is asked for."""
    found = list(dict.fromkeys(text.strip() for text in _flat(value) if text.strip()))
    if not found:
        raise ValueError(f"{name} must hold an answer, got {value!r}")
    return found


def _flat(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _flat(item)


def _pairs(record: Record, name: str) -> Iterator[tuple[str, list[str]]]:
    """(prompt, answers) of {kind: [{"prompt": .., "ground_truth": ..}]}."""
    kinds = record.get(name) or {}
    if not isinstance(kinds, dict):
        raise TypeError(f"{name} must be an object, got {type(kinds).__name__}")
    for kind in kinds:
        for index, entry in enumerate(_list(kinds, kind, f"{name}.{kind}")):
            where = f"{name}.{kind}[{index}]"
            if not isinstance(entry, dict):
                raise TypeError(f"{where} must be an object, got {type(entry).__name__}")
            yield _text(entry, "prompt"), _answers(f"{where}.ground_truth", entry.get("ground_truth"))


def _mend_portability(record: Record) -> Iterator[list[Any]]:
    """A question that follows from the edit, as "Model Editing Hurt" and EasyEdit add it to zsRE."""
    found = record.get("portability")
    if isinstance(found, dict) and found.get("New Question"):
        yield [_text(found, "New Question"), _answers("portability.New Answer", found.get("New Answer"))]


_FORMATS: tuple[tuple[Callable[[Record], bool], Callable[[Record], list[Record]]], ...] = (
    (lambda r: isinstance(r.get("requested_rewrite"), list), _mquake),
    (lambda r: "requested_rewrite" in r, _counterfact),
    (lambda r: "src" in r and "alt" in r, _zsre_mend),
    (lambda r: "target_new" in r and ("ground_truth" in r or "locality" in r), _easyedit),
)
