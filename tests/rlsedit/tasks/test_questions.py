"""GLUE, MMLU and known facts: labels, prompts, examples, scores against the model itself, and bad records."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.language_models import tiny, tokenizer

from rlsedit.models import Adapter
from rlsedit.tasks import TASKS, TaskOptions, retained, run_task
from rlsedit.tasks.choices import with_shots
from rlsedit.tasks.task import TaskReport

PLACES = [("Oslo", "Norway"), ("Lima", "Peru"), ("Tokyo", "Japan")] * 4
SINGLE = [{"sentence": f"{word} is a city in {place} {i}", "label": i % 2, "idx": i}
          for i, (word, place) in enumerate(PLACES)]  # fmt: skip
PAIRS = [{"sentence1": r["sentence"], "sentence2": SINGLE[-i]["sentence"], "label": i % 2}
         for i, r in enumerate(SINGLE)]  # fmt: skip
WORDS = [{**r, "label": ("entailment", "not_entailment")[r["label"]]} for r in PAIRS]
QUIZ = [{"question": f"Where is Oslo, {i}?", "subject": f"s{i % 2}", "choices": ["Peru", "Norway", "Japan", "Lima"],
         "answer": i % 4} for i in range(12)]  # fmt: skip
RECORDS = {"sst": SINGLE, "cola": SINGLE, "mrpc": PAIRS, "rte": PAIRS, "nli": WORDS, "mmlu": QUIZ}
ANSWERS = {"sst": ("negative", "positive"), "cola": ("no", "yes"), "mrpc": ("no", "yes"), "rte": ("True", "False"),
           "nli": ("True", "False"), "mmlu": "ABCD"}  # fmt: skip


def write(path: Path, records: list[Any]) -> Path:
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def log_probability(model: torch.nn.Module, prompt: str, answer: str) -> float:
    ids, size = tokenizer()(f"{prompt} {answer}")["input_ids"], len(tokenizer()(prompt)["input_ids"])
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logs[t - 1, ids[t]] for t in range(size, len(ids))) / (len(ids) - size))


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("shots", [0, 2])
def test_the_likeliest_answer_is_compared_with_the_label(
    name: str, shots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are taken from the run; scores are recomputed with the model's own forward pass."""
    from rlsedit.tasks import choices

    model = tiny("llama", max_position_embeddings=1024)
    asked: list[tuple[str, str]] = []
    own = choices.score_answers
    monkeypatch.setattr(choices, "score_answers", lambda a, t, q, **k: own(a, t, asked.extend(q) or q, **k))
    path = write(tmp_path / "records.jsonl.gz", RECORDS[name])
    options = TaskOptions(shots=shots, held_out=4, max_tokens=300)
    report = run_task(name, model, tokenizer(), path, limit=6, options=options)
    answers = ANSWERS[name]
    prompts = list(dict.fromkeys(prompt for prompt, _ in asked))
    assert len(report.rows) == 6
    assert report.settings["shots"] == shots
    hits = 0
    for row, prompt, record in zip(report.rows, prompts, RECORDS[name][4:10], strict=True):
        found = [log_probability(model, prompt, answer) for answer in answers]
        assert row["log_probabilities"] == pytest.approx(found, rel=1e-6)
        assert row["answer"] == answers[found.index(max(found))]
        label = record.get("label", record.get("answer"))
        assert row["label"] == answers[{"entailment": 0, "not_entailment": 1}.get(label, label)]
        hits += row["answer"] == row["label"]
        text = record.get("sentence", record.get("sentence1", record.get("question")))
        assert text in prompt.split("\n\n")[-1]
        for example in RECORDS[name][:shots]:
            assert example.get("sentence", example.get("sentence1", example.get("question"))) in prompt
        assert RECORDS[name][shots].get("sentence", "nothing") not in prompt
        assert prompt.endswith(":")
    assert report.summary["accuracy"].mean == pytest.approx(hits / 6)
    assert report.summary["accuracy"].count == 6


@pytest.mark.parametrize("name", ["sst", "mmlu"])
def test_a_model_that_is_broken_has_no_answer_and_is_never_right(name: str, tmp_path: Path) -> None:
    """It would have the share of records whose answer stands first, as a sound model might."""
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    path = write(tmp_path / "records.jsonl", RECORDS[name])
    report = run_task(name, model, tokenizer(), path, options=TaskOptions(held_out=2))
    assert {row["answer"] for row in report.rows} == {None}
    assert {score: value.mean for score, value in report.summary.items()} == dict.fromkeys(report.summary, 0.0)
    if name == "sst":
        assert report.settings["answers"] == {"none": 10}


def test_entailment_is_true_in_rte_and_nli_alike(tmp_path: Path) -> None:
    """GLUE numbers entailment 0 and not_entailment 1."""
    rte, nli = (TASKS[name].load(write(tmp_path / f"{name}.jsonl", RECORDS[name]), "raise") for name in ("rte", "nli"))
    assert rte == nli
    assert [record["label"] for record in rte] == [record["label"] for record in PAIRS]


def test_mmlu_letters_numbers_and_subjects(tmp_path: Path) -> None:
    letters = [{**record, "answer": "ABCD"[record["answer"]]} for record in QUIZ]
    load = TASKS["mmlu"].load
    assert load(write(tmp_path / "a.jsonl", QUIZ), "raise") == load(write(tmp_path / "b.jsonl", letters), "raise")
    report = run_task("mmlu", tiny("llama"), tokenizer(), tmp_path / "a.jsonl", options=TaskOptions(held_out=3))
    by_subject = [[r["answer"] == r["label"] for r in report.rows if r["subject"] == s] for s in ("s0", "s1")]
    expected = sum(sum(hits) / len(hits) for hits in by_subject) / 2
    assert report.summary["accuracy_of_subjects"].mean == pytest.approx(expected)
    assert report.summary["accuracy_of_subjects"].count == 2


def test_examples_that_do_not_fit_are_left_out_from_the_last_on() -> None:
    adapter = Adapter.for_model(tiny("llama"), edit=False)  # reads 96 tokens
    size = len(tokenizer()("Oslo is a city. ")["input_ids"])
    examples = ["Oslo is a city. "] * 40
    prompts, cut = with_shots(adapter, tokenizer(), examples, ["Lima is", "Lima " * 20 + "is"], 5)
    for prompt in prompts:
        used = prompt.count("Oslo")
        question = len(tokenizer()(prompt.removeprefix("Oslo is a city. " * used))["input_ids"])
        assert used * size + question + 5 <= 96 < (used + 1) * size + question + 5
    assert cut == 2
    assert with_shots(adapter, tokenizer(), examples[:1], ["Lima is"], 5)[1] == 0
    with pytest.raises(ValueError, match="do not fit the 96"):
        with_shots(adapter, tokenizer(), [], ["Lima " * 90], 5)


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("sst", {"sentence": "x"}, "label is missing; the record has sentence"),
        ("sst", {"sentence": "x", "label": -1}, "label must be one of 0, 1, got -1"),
        ("sst", {"sentence": "x", "label": True}, "label must be one of 0, 1, got True"),
        ("sst", {"sentence": "x", "label": [1]}, r"label must be one of 0, 1, got \[1\]"),
        ("cola", {"sentence": " ", "label": 1}, "sentence must be a non-empty text, got ' '"),
        ("mrpc", {"sentence1": "x", "sentence2": 3, "label": 1}, "sentence2 must be a non-empty text, got 3"),
        ("nli", {"sentence1": "x", "sentence2": "y", "label": "maybe"}, "label must be one of 'entailment'"),
        ("rte", ["x"], "a record must be a JSON object, got list"),
        ("mmlu", {"question": "x", "choices": ["a"], "answer": 0}, "choices must be a list of at least 2"),
        ("mmlu", {"question": "x", "choices": ["a", "b"], "answer": 2}, "answer must be one of 0, 'A', 1, 'B', got 2"),
        ("known", {"prompt": "x is"}, "attribute is missing"),
    ],
)
def test_a_bad_record_is_named_or_left_out(
    name: str, record: Any, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = {**RECORDS, "known": [{"prompt": "Oslo is in", "attribute": "Norway"}]}[name][0]
    path = write(tmp_path / "records.jsonl", [good, record, good])
    with pytest.raises(ValueError, match=rf"records\.jsonl:2: {words}"):
        TASKS[name].load(path, "raise")
    assert len(TASKS[name].load(path, "skip")) == 2
    assert "records.jsonl:2: skipped" in caplog.text
    (tmp_path / "array.json").write_text(json.dumps([good, record]))
    with pytest.raises(ValueError, match=rf"array\.json, record 2: {words}"):
        TASKS[name].load(tmp_path / "array.json", "raise")


def test_bad_files(tmp_path: Path) -> None:
    load = TASKS["sst"].load
    for name, data, words in (
        ("a.jsonl", b'{"sentence": "x", "label": 1}\n{"sent', r"a\.jsonl:2: not valid JSON: .* at column"),
        ("b.json", b'[{"sentence": "x",\n "label": 1}', r"b\.json:2: not valid JSON"),
        ("c.jsonl", b"\n\n", "no records in this file"),
        ("d.jsonl", b'{"sentence": "\xff"}', r"d\.jsonl:1: not UTF-8"),
        ("e.jsonl.gz", b"no gzip", "not a whole gzip file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=words):
            load(tmp_path / name, "raise")
    with pytest.raises(ValueError, match="a folder"):
        load(tmp_path, "raise")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", "raise")


def test_too_few_records(tmp_path: Path) -> None:
    path = write(tmp_path / "records.jsonl", SINGLE[:10])
    with pytest.raises(ValueError, match=r"sst: needs more than 10 records.*got 10"):
        run_task("sst", tiny("llama"), tokenizer(), path)


def test_known_facts_and_what_is_retained(tmp_path: Path) -> None:
    model = tiny("llama")
    prompts = ["Oslo is the capital of", "Lima is in", "I think Tokyo lies in"]
    likeliest = []
    for prompt in prompts:
        with torch.no_grad():
            token = int(model(torch.tensor([tokenizer()(prompt)["input_ids"]])).logits[0, -1].argmax())
        likeliest.append(tokenizer().decode([token]))
    records = [{"known_id": i, "prompt": p, "attribute": "Norway"} for i, p in enumerate(prompts)]
    path = write(tmp_path / "known.jsonl", records)
    report = run_task("known", model, tokenizer(), path)
    assert [row["id"] for row in report.rows] == ["0", "1", "2"]
    for row, prompt in zip(report.rows, prompts, strict=True):
        assert row["probability"] == pytest.approx(math.exp(log_probability(model, prompt, "Norway")), rel=1e-6)
        assert row["known"] == (row["tokens"] == 1.0)
    with torch.no_grad():  # a model that says Norway after everything
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(400, dtype=torch.float64))
        model.lm_head.bias[tokenizer()("a Norway")["input_ids"][-1]] = 9.0
    assert len(tokenizer()("a Norway")["input_ids"]) == 2
    certain = run_task("known", model, tokenizer(), path, limit=2)
    assert certain.summary["known"].mean == 1.0
    assert certain.summary["known"].count == 2

    def of(*known: bool) -> TaskReport:
        return TaskReport([{"id": str(i), "known": value} for i, value in enumerate(known)], {})

    assert retained(of(True, True, False, True), of(True, False, True, True)).mean == pytest.approx(2 / 3)
    assert retained(of(False), of(True)).count == 0
    with pytest.raises(ValueError, match="same facts"):
        retained(of(True, True), of(True))


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    records = [
        {"known_id": i, "prompt": f"{name} is in", "attribute": "Peru"} for i, name in enumerate(["Lima", "Oslo"])
    ]
    Path("known_1000.json.gz").write_bytes(gzip.compress(json.dumps(records).encode()))
    names: dict[str, Any] = {"model": tiny("llama"), "tokenizer": tokenizer()}
    exec(code, names)
    assert names["records"] == TASKS["known"].read(Path("known_1000.json.gz"), "raise")
    assert len(names["before"].rows) == 2
    assert "Estimate" in capsys.readouterr().out
