"""HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021): programs that a model writes, run against their tests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..metrics.estimate import estimate
from ..models.adapter import Adapter
from .choices import with_shots
from .completing import complete
from .files import read_records, text_field, texts_field
from .sandbox import isolation, run_program
from .task import Progress, Task, TaskOptions, TaskReport, split

__all__ = ["TASKS", "pass_at_k"]

_KS = (1, 10, 100)
_DONE = "[DONE]"


def pass_at_k(samples: int, right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that one of k of the n samples is right (Chen et al. 2021, eq. 1).

    Args:
        samples: n, at least k.
        right: c, in [0, n].
        k: at least 1.

    Raises:
        ValueError: a value out of range.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass_at_k: needs 1 <= k <= samples and 0 <= right <= samples, got {k}, {samples}, {right}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


@dataclass(frozen=True)
class _Suite:
    """How one data set is asked and tested. A record has "id", "question", "solution" and what `program` needs."""

    name: str
    summary: str
    shots: int
    new_tokens: int
    stop: tuple[str, ...]
    check: Callable[[dict[str, Any]], dict[str, Any]]
    program: Callable[[dict[str, Any], str], str]


def _human_eval(record: dict[str, Any]) -> dict[str, Any]:
    prompt = text_field(record, "prompt")
    return {
        "id": text_field(record, "task_id"), "question": prompt, "solution": "",
        "test": text_field(record, "test"), "entry": text_field(record, "entry_point"),
    }  # fmt: skip


def _human_eval_program(record: dict[str, Any], text: str) -> str:
    return f"{record['question']}{text}\n\n{record['test']}\n\ncheck({record['entry']})\n"


def _mbpp(record: dict[str, Any]) -> dict[str, Any]:
    tests = texts_field(record, "test_list")
    task = text_field(record, "text" if "text" in record or "prompt" not in record else "prompt").strip()
    code = text_field(record, "code").replace("\r\n", "\n").strip()
    setup = text_field(record, "test_setup_code", empty=True) if "test_setup_code" in record else ""
    imports = texts_field(record, "test_imports", least=0) if "test_imports" in record else []
    identity = record.get("task_id")
    if isinstance(identity, bool) or not isinstance(identity, (int, str)):
        raise ValueError(f"task_id must be a number or a text, got {identity!r}")
    question = (
        "You are an expert Python programmer, and here is your task: "
        f"{task} Your code should pass these tests:\n\n" + "\n".join(tests) + "\n[BEGIN]\n"
    )
    return {
        "id": str(identity),
        "question": question,
        "solution": f"{code}\n{_DONE}\n\n",
        "tests": tests,
        "setup": setup,
        "imports": imports,
    }


def _mbpp_program(record: dict[str, Any], text: str) -> str:
    # the setup stands behind the program: it makes objects of classes that the program defines
    return "\n\n".join([*record["imports"], text, record["setup"], *record["tests"]]) + "\n"


_SUITES = (
    _Suite(
        "humaneval", "HumanEval: functions from their docstrings, run against tests", 0, 384,
        ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ", "\n@", "\n```"),
        _human_eval, _human_eval_program,
    ),
    _Suite(
        "mbpp", "MBPP: short programs from a sentence and three tests, run against them", 3, 256,
        (_DONE, "\nYou are an expert"), _mbpp, _mbpp_program,
    ),
)  # fmt: skip


def _load(suite: _Suite, path: Path, on_error: Literal["raise", "skip"]) -> list[dict[str, Any]]:
    return read_records(path, suite.check, on_error)


def _run(
    suite: _Suite, adapter: Adapter, tokenizer: Any, records: Sequence[dict[str, Any]], options: TaskOptions,
    progress: Progress | None,
) -> TaskReport:  # fmt: skip
    enforced = isolation()
    if (missing := [name for name, held in enforced.items() if not held]) and not options.trust_code:
        raise ValueError(
            f"{suite.name}: runs code that the model writes, and this system does not close or limit "
            f"{', '.join(missing)}; trust_code (--trust-code) runs it all the same"
        )
    shown, scored = _split(suite, records, options)
    new_tokens, count = options.new_tokens or suite.new_tokens, options.samples
    examples = [record["question"] + record["solution"] for record in shown]
    questions = [record["question"] for record in scored]
    prompts, cut = with_shots(adapter, tokenizer, examples, questions, new_tokens)
    total = 2 * len(scored) * count
    texts = complete(
        adapter, tokenizer, prompts, new_tokens=new_tokens, stop=suite.stop, samples=count,
        temperature=options.temperature, top_p=options.top_p, seed=options.seed, rows=options.rows,
        progress=None if progress is None else lambda done, _: progress(done, total),
    )  # fmt: skip
    rows, endings = [], Counter[str]()
    for record, own in zip(scored, texts, strict=True):
        outcomes = []
        for text in own:
            outcomes.append(run_program(suite.program(record, text), options.limits))
            endings[outcomes[-1].status] += 1
            if progress is not None:
                progress(total // 2 + endings.total(), total)
        rows.append(
            {
                "id": record["id"],
                "samples": count,
                "right": sum(outcome.passed for outcome in outcomes),
                "endings": [outcome.status for outcome in outcomes],
                "details": [outcome.detail for outcome in outcomes],
                "texts": own,
            }
        )
    summary = {f"pass@{k}": estimate([pass_at_k(count, row["right"], k) for row in rows]) for k in _KS if k <= count}
    sampling = "greedy" if count == 1 else {"temperature": options.temperature, "top_p": options.top_p}
    settings = {
        "shots": len(examples), "fewer_shots": cut, "new_tokens": new_tokens, "samples": count, "sampling": sampling,
        "endings": dict(endings), "isolation": enforced,
    }  # fmt: skip
    return TaskReport(rows, summary, settings)


def _split(suite: _Suite, records: Sequence[Any], options: TaskOptions) -> tuple[list[Any], list[Any]]:
    """HumanEval has no examples and scores every record."""
    if suite.shots:
        return split(suite.name, records, options, suite.shots)
    if options.shots:
        raise ValueError(f"{suite.name}: is asked without examples, got shots = {options.shots}")
    if not records:
        raise ValueError(f"{suite.name}: needs at least one record, got none")
    return [], list(records[: options.limit])


TASKS = tuple(Task(s.name, s.summary, partial(_load, s), partial(_run, s)) for s in _SUITES)
