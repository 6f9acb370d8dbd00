"""GSM8K, HumanEval and MBPP: numbers out of texts, pass@k, programs that are right and wrong, whole runs."""

from __future__ import annotations

import itertools
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from support.language_models import tiny, tokenizer

from rlsedit.tasks import TASKS, Limits, TaskOptions, code, gsm8k, isolation, run_task
from rlsedit.tasks.code import pass_at_k
from rlsedit.tasks.gsm8k import final_number

SUMS = [
    {"question": f"Ann has {i} eggs and buys 2. How many?", "answer": f"{i}+2=<<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}"}
    for i in range(5)
]
HUMAN = [
    {
        "task_id": f"Mine/{i}", "entry_point": f"add{i}",
        "prompt": f'def add{i}(a, b):\n    """The sum of a, b and {i}."""\n',
        "canonical_solution": f"    return a + b + {i}\n",
        "test": f"def check(candidate):\n    assert candidate(1, 2) == {i + 3}\n    assert candidate(-1, 1) == {i}\n",
    }
    for i in range(4)
]  # fmt: skip
BASIC = [
    {
        "task_id": i, "text": f"Write a function to add {i}.", "code": f"def add(a):\r\n  return a + {i}",
        "test_imports": ["import math"], "test_setup_code": "four = add(4)",
        "test_list": [f"assert add(2) == {i + 2}", f"assert math.isclose(add(0), {i})"],
    }
    for i in range(6)
]  # fmt: skip


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("text", "last", "marked"),
    [
        ("so 3 + 4 = 7\n#### 7", 7, 7),
        ("#### 1,234", 1234, 1234),
        ("#### $18.50\nQuestion 3", Decimal("18.5"), Decimal("18.5")),
        ("#### -5 eggs", -5, -5),
        ("The answer is $1,000.", 1000, None),
        ("It costs 12.00", 12, None),
        ("3 dogs, 4 cats", 4, None),
        ("none", None, None),
        ("#### none 3 \n4", 3, 3),
        ("5 #### none", None, None),
        (".5", Decimal("0.5"), None),
        ("", None, None),
    ],
)
def test_final_numbers(text: str, last: Any, marked: Any) -> None:
    assert final_number(text) == last
    assert final_number(text, marked=True) == marked


def test_gsm8k_counts_marked_and_last_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def says(_adapter: object, _tokenizer: object, prompts: list[str], **options: Any) -> list[list[str]]:
        seen.update(prompts=prompts, **options)
        return [[" 2+2=4\n#### 4"], [" it is 5"], [" 7\n#### 99"]]

    monkeypatch.setattr(gsm8k, "complete", says)
    path = write(tmp_path / "sums.jsonl", SUMS)
    model = tiny("llama", max_position_embeddings=2048)
    report = run_task("gsm8k", model, tokenizer(), path, options=TaskOptions(shots=1, held_out=2))
    assert [row["correct"] for row in report.rows] == [True, True, False]
    assert [row["correct_marked"] for row in report.rows] == [True, False, False]
    assert report.summary["correct"].mean == pytest.approx(2 / 3)
    assert report.rows[0]["label"] == "4"
    assert seen["prompts"][0] == (
        "Question: Ann has 0 eggs and buys 2. How many?\nAnswer: 0+2=2\n#### 2\n\n"
        "Question: Ann has 2 eggs and buys 2. How many?\nAnswer:"
    )
    assert "\nQuestion:" in seen["stop"]


def test_gsm8k_on_a_model(tmp_path: Path) -> None:
    done = []
    path = write(tmp_path / "sums.jsonl", SUMS)
    report = run_task(
        "gsm8k", tiny("llama", max_position_embeddings=2048), tokenizer(), path,
        options=TaskOptions(shots=0, held_out=0, new_tokens=6), progress=lambda *a: done.append(a),
    )  # fmt: skip
    assert done[-1] == (5, 5)
    for row in report.rows:
        assert row["correct"] == (final_number(row["text"]) == Decimal(row["label"]))


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one() -> None:
    for n, c in ((5, 0), (5, 2), (5, 5), (4, 1)):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(range(n), k))
            expected = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(expected)
    for wrong in ((1, 0, 2), (3, 4, 1), (3, -1, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match="pass_at_k"):
            pass_at_k(*wrong)


def run_code(name: str, path: Path, texts: list[list[str]], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """A task whose model says `texts`."""
    monkeypatch.setattr(code, "complete", lambda *_, **__: texts)
    model = tiny("llama", max_position_embeddings=4096)
    given = TaskOptions(trust_code=True, limits=Limits(cpu_seconds=1, wall_seconds=10), **options)
    return run_task(name, model, tokenizer(), path, options=given)


def test_human_eval_runs_what_the_model_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "human.jsonl", HUMAN)
    right = [[record["canonical_solution"]] for record in HUMAN]
    report = run_code("humaneval", path, right, monkeypatch)
    assert report.summary["pass@1"].mean == 1.0
    assert list(report.summary) == ["pass@1"]
    wrong = [["    return a + b\n"], ["    import os; os._exit(0)\n"], ["    while True: pass\n"], ["    return a +\n"]]
    report = run_code("humaneval", path, wrong, monkeypatch)
    assert [row["right"] for row in report.rows] == [1, 0, 0, 0], "without adding, only the first is right"
    assert [row["endings"] for row in report.rows] == [["passed"], ["no verdict"], ["timeout"], ["error"]]
    assert report.settings["endings"] == {"passed": 1, "no verdict": 1, "timeout": 1, "error": 1}
    assert report.settings["sampling"] == "greedy"
    assert report.settings["isolation"] == isolation()


def test_several_samples_give_pass_at_k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "human.jsonl", HUMAN[1:3])
    good, bad = "    return a + b + 1\n", "    return 0\n"
    report = run_code("humaneval", path, [[good] * 3 + [bad] * 7, [bad] * 10], monkeypatch, samples=10)
    assert report.summary["pass@1"].mean == pytest.approx(0.15)
    assert report.summary["pass@10"].mean == pytest.approx(0.5)
    assert report.settings["sampling"] == {"temperature": 0.8, "top_p": 0.95}


def test_mbpp_runs_setup_and_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "basic.jsonl", BASIC)
    texts = [["def add(a):\n    return a + 4"], ["def add(a):\n    return a + 4"], ["def sub(a): pass"]]
    report = run_code("mbpp", path, texts, monkeypatch, held_out=3, shots=2)
    assert [row["right"] for row in report.rows] == [0, 1, 0]
    assert [row["id"] for row in report.rows] == ["3", "4", "5"]
    assert report.rows[2]["details"][0].startswith("NameError")
    records = TASKS["mbpp"].load(path, "raise")
    assert records[0]["question"].endswith("assert math.isclose(add(0), 0)\n[BEGIN]\n")
    assert records[0]["solution"] == "def add(a):\n  return a + 0\n[DONE]\n\n"


@pytest.mark.parametrize(("name", "records"), [("humaneval", HUMAN), ("mbpp", BASIC)])
def test_code_of_a_real_if_clueless_model(name: str, records: list[Any], tmp_path: Path) -> None:
    done = []
    options = TaskOptions(limit=2, new_tokens=4, held_out=3, samples=2, trust_code=True)
    report = run_task(
        name, tiny("llama", max_position_embeddings=4096), tokenizer(), write(tmp_path / "r.jsonl", records),
        options=options, progress=lambda *a: done.append(a),
    )  # fmt: skip
    assert report.summary["pass@1"].mean == 0.0
    assert [len(row["texts"]) for row in report.rows] == [2, 2]
    assert done[0] == (1, 8)
    assert done[-1] == (8, 8)


def test_code_is_not_run_where_the_system_does_not_shut_it_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "isolation", lambda: {"network": True, "files": False})
    monkeypatch.setattr(code, "run_program", lambda *_: pytest.fail("ran"))
    with pytest.raises(ValueError, match=r"does not close or limit files; trust_code"):
        run_task("humaneval", tiny("llama"), tokenizer(), write(tmp_path / "h.jsonl", HUMAN))


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("gsm8k", {"question": "x", "answer": "7"}, 'answer must end in "#### NUMBER"'),
        ("humaneval", {"task_id": "a", "prompt": "def f(): ", "test": "x"}, "entry_point is missing"),
        ("mbpp", {"task_id": 1, "text": "x", "code": "y", "test_list": []}, "test_list must be a list of at least 1"),
        ("mbpp", {"text": "x", "code": "y", "test_list": ["z"]}, "task_id must be"),
    ],
)
def test_bad_records(name: str, record: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f":1: {words}"):
        TASKS[name].load(write(tmp_path / "bad.jsonl", [record]), "raise")


def test_human_eval_has_no_examples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="asked without examples"):
        run_task("humaneval", tiny("llama"), tokenizer(), write(tmp_path / "h.jsonl", HUMAN),
                 options=TaskOptions(shots=1, trust_code=True))  # fmt: skip
